"""A cell along a series: BASE's yardstick."""

from dataclasses import replace

import pytest

from harness.lab.configurations import configuration
from harness.lab.profile import load_profile
from harness.series.cells import CellResult
from harness.series.line import CellLine

PROBED = load_profile("svm", "7.3").to_json()


@pytest.fixture
def result(tmp_path):
    return CellResult(tmp_path, {})


@pytest.mark.parametrize("first", [True, False])
def test_what_kvm_can_do_at_base_is_known_by_either_run(result, first):
    line = CellLine("svm", configuration("svm"), None)
    probed = replace(result, probed=PROBED)
    line.begin(probed if first else result, result if first else probed)
    less = {**PROBED, "capabilities": {}}
    assert "profile/capability-KVM_CAP_SYNC_REGS" in line.records(replace(result, probed=less))
    assert line.records(probed) == {}
