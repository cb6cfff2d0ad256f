"""The layout of KVM's registers that a patch leaves, against BASE's."""

from __future__ import annotations

from harness.lab.kbuild import BuiltKernel
from harness.series.verdict import Layout


def layout_of(kernel: BuiltKernel, base: Layout | None = None) -> Layout:
    """What ``kvm-harness layout`` says of a kernel, and what of it is not as in ``base``."""
    return Layout()
