"""Verdicts, statuses, known divergences: what a run comes to."""

import pytest

from harness.case import Case, Memory, Observation
from harness.cpuid import CpuProfile
from harness.exits import Halt
from harness.known import KnownError, load_known
from harness.lockstep import Difference
from harness.memory_diff import MemoryDiff
from harness.state import CpuState, FieldDiff
from harness.verdict import Verdict, exit_status, worst

V = Verdict


@pytest.mark.parametrize(
    ("verdicts", "status"),
    [
        ([V.AGREE], 0),
        ([V.AGREE, V.UNSUPPORTED], 0),
        ([V.AGREE, V.KNOWN, V.HEALED, V.SUSPECT], 0),
        ([V.AGREE, V.MISMATCH, V.LOST], 1),
        ([V.AGREE, V.SPLAT], 1),
        ([V.AGREE, V.REGRESSED], 1),
        ([V.AGREE, V.UNSUPPORTED, V.LOST], 4),
        ([V.LOST], 4),
        ([], 2),
        ([V.UNSUPPORTED], 2),
    ],
)
def test_exit_status(verdicts, status):
    assert exit_status(verdicts) == status


def test_precedence_is_that_of_the_design():
    order = ["splat", "mismatch", "regressed", "healed", "suspect", "known", "unsupported", "lost", "agree"]
    assert [v.value for v in Verdict] == order
    assert worst([V.AGREE, V.MISMATCH, V.SPLAT]) is V.SPLAT


ROW = """
[[divergence]]
name = "n"
cases = ["alu/cmpxchg*"]
module = ["kvm_pvm"]
register = ["rcx"]
wrong = "zero-extended-32"
why = "w"
reproducer = "r"
reference = "f"
"""


CASE = Case("t", Memory(()), CpuState(), CpuProfile(()))


def difference(*registers, memory=()):
    seen = Observation(Halt(), {"regs": b""})
    return Difference(0, 0, seen, seen, registers, memory)


@pytest.fixture
def row(tmp_path):
    path = tmp_path / "known.toml"
    path.write_text(ROW)
    return load_known(path)[0]


def test_row_excuses_the_exact_wrong_value_only(row):
    assert row.explains(CASE, difference(FieldDiff("rcx", 0x3333333344444444, 0x44444444)))
    assert not row.explains(CASE, difference(FieldDiff("rcx", 0x3333333344444444, 0x44444445)))


def test_row_excuses_nothing_else_that_differs(row):
    wrong = FieldDiff("rcx", 0x3333333344444444, 0x44444444)
    assert not row.explains(CASE, difference(wrong, FieldDiff("rflags", 2, 3)))
    assert not row.explains(CASE, difference(FieldDiff("rdx", 0x3333333344444444, 0x44444444)))
    assert not row.explains(CASE, difference(wrong, memory=(MemoryDiff(0, b"a", b"b"),)))
    assert not row.explains(CASE, Difference(0, 0, None, None, (wrong,)))


def test_row_speaks_of_its_cases_on_its_hosts_only(row):
    assert row.covers("alu/cmpxchg_r32@long#0", "kvm_pvm")
    assert not row.covers("alu/cmpxchg_r32@long#0", "kvm_amd")
    assert not row.covers("alu/add_r32@long#0", "kvm_pvm")


def test_checked_in_file_is_usable():
    assert all(row.why for row in load_known())


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('why = "w"\n', "", "missing or unknown: why"),
        ('"zero-extended-32"', '"x"', "wrong must be"),
        ("[[", "[", "Exp"),
    ],
)
def test_bad_row_is_refused(tmp_path, old, new, words):
    path = tmp_path / "known.toml"
    path.write_text(ROW.replace(old, new))
    with pytest.raises(KnownError, match=words):
        load_known(path)
