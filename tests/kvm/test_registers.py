"""The register suite: every Case of harness.paths on this machine's KVM, beside the reference model."""

from harness.paths import all_cases
from harness.pytest_plugin import CaseSuite

registers = CaseSuite(all_cases)
