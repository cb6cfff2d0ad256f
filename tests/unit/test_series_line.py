"""A cell along a series: BASE's yardstick."""

from dataclasses import replace

import pytest

from harness.lab.configurations import configuration
from harness.lab.profile import load_profile
from harness.series.cells import CellResult
from harness.series.line import CellLine
from harness.series.verdict import CellReport

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


def record(number, verdict):
    return {"case": f"c{number}", "id": f"{number:012x}", "verdict": verdict, "checks": 1, "summary": "", "allowed": 0}


@pytest.mark.parametrize(("enough", "chosen", "told"), [(True, 9, "2 of 9 cases ran"), (True, 2, ""), (False, 9, "")])
def test_a_run_that_ended_before_its_last_case_says_so(result, enough, chosen, told):
    records = {"c1": record(1, "agree"), "c2": record(2, "agree")}
    whole = {"case": "kernel/log/oops", "id": "", "verdict": "splat", "checks": 0, "summary": "oops", "allowed": 0}
    line = CellLine("svm", configuration("svm"), None)
    line.begin(replace(result, records=records), replace(result, records=records))
    ended = replace(result, records={**records, "kernel/log/oops": whole}, enough=enough, chosen=chosen)
    taken = line.take(1, CellReport("svm", "full"), ended)
    assert taken.extent == told
