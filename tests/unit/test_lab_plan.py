"""Plans: what the model expects travels whole, and the runner's messages say what they were made from."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from harness.case import Blob, Case, Memory, Observation, Other, Run, Switch
from harness.cpuid import CpuidEntry, CpuProfile
from harness.exits import Halt, Io, Shutdown
from harness.lab import planner
from harness.lab.cache import digest_tree
from harness.lab.configurations import CONFIGURATIONS
from harness.lab.jobs import jobs
from harness.lab.plan import PlanReader, read_plan, write_plan
from harness.lab.planner import smoke
from harness.lab.profile import load_profile
from harness.lab.sources import ROOT, closure
from harness.lab.wire import finding_from_json, finding_json
from harness.lockstep import Difference, compare_registers, lockstep
from harness.machine import Recording, record
from harness.memory_diff import MemoryDiff
from harness.modes import CODE_BASE, setup
from harness.reference.machine import ReferenceMachine
from harness.runner import Finding
from harness.state import pack_sections

PROFILE = CpuProfile((CpuidEntry(0, eax=1), CpuidEntry(1), CpuidEntry(0x80000001, edx=1 << 29)))


def case(name, code, memory=None, **more):
    start = setup("real", entry=CODE_BASE, profile=PROFILE)
    ram = (memory or Memory(start.blobs)).plus(Blob(CODE_BASE, code))
    state = start.state.with_({"rax": 0x1234, "rbx": 0x5A5A})
    return Case(name, ram, state, PROFILE, actions=(Run(8),), bits=16, **more)


STORE = case("store/a@real#0", b"\x89\x1e\x00\x10\xe6\x10\xf4")  # mov [0x1000], bx; out 0x10, al; hlt
MUL = case("mul/b@real#0", b"\xf7\xe3\xf4")  # mul bx; hlt: leaves flags undefined


@pytest.fixture
def plan(tmp_path):
    write_plan(tmp_path / "plan", "key", [STORE, MUL], [("not/run@pae#0", "0" * 12, "mode pae: no")])
    return read_plan(tmp_path / "plan")


def test_a_plan_holds_the_cases_and_what_the_model_shows(plan):
    assert plan.names == ("store/a@real#0", "mul/b@real#0")
    assert plan.ids == (STORE.id, MUL.id)
    assert plan.skipped == (("not/run@pae#0", "0" * 12, "mode pae: no"),)
    for index, original in enumerate((STORE, MUL)):
        got, steps = plan.planned(index)
        assert got == original
        assert got.id == original.id
        assert steps == record(ReferenceMachine(), original)


def test_a_case_of_several_vcpus_survives_the_plan(tmp_path):
    other = CpuProfile((CpuidEntry(0, eax=1), CpuidEntry(1)))
    two = replace(STORE, others=(Other(STORE.start, other), Other(MUL.start)), actions=(Run(8), Switch(1), Run(8)))
    write_plan(tmp_path / "two", "key", [two])
    got, steps = read_plan(tmp_path / "two").planned(0)
    assert (got, got.id) == (two, two.id)
    assert steps == record(ReferenceMachine(), two)


def test_memory_that_a_guest_wrote_survives_the_plan(plan):
    _, ((first, *_),) = plan.planned(0)
    page = first.pages[STORE.start.ds.base + 0x1000 & ~0xFFF]
    at = STORE.start.ds.base + 0x1000 & 0xFFF
    assert page[at : at + 2] == (STORE.start.gpr[3] & 0xFFFF).to_bytes(2, "little")


def test_a_plan_of_another_format_is_refused(tmp_path):
    path = tmp_path / "plan"
    path.write_bytes(b'{"plan": 0}\n')
    with pytest.raises(ValueError, match="no plan of format"):
        PlanReader(path.open("rb"))
    path.write_bytes(b"\x7fELF")
    with pytest.raises(ValueError, match="no plan of format"):
        PlanReader(path.open("rb"))


def test_jobs_are_the_chosen_cases_by_group(plan):
    assert [(job.group, list(job.indices)) for job in jobs(plan, [1])] == [(1, [1])]
    assert sum(len(job.indices) for job in jobs(plan, [0, 1])) == 2
    assert not jobs(plan, [])


def test_smoke_takes_one_case_of_each_entry_and_always_the_same():
    cases = [case(f"{family}/x@{mode}#0", b"\xf4") for family in "abc" for mode in ("real", "long", "pae")]
    chosen = [c.name for c in smoke(cases)]
    assert [name.partition("/")[0] for name in chosen] == ["a", "b", "c"]
    assert chosen == [c.name for c in smoke(cases)]


# --- the key of a plan ------------------------------------------------------------------------------------------------

PLANNING = """
import sys
from pathlib import Path
from harness.lab.planner import cell_cases
from harness.lab.plan import write_plan
from harness.lab.configurations import CONFIGURATIONS
from harness.lab.profile import load_profile

for name in ("svm", "svm-emul"):
    profile = load_profile(name, "7.3")
    cases = [next(iter(cell_cases(CONFIGURATIONS[name], profile, "full")))]
    assert not profile.unsupported(cases[0])
    write_plan(Path(sys.argv[1]), "key", cases)
print(*(module.__file__ for name, module in sys.modules.items() if name.partition(".")[0] == "harness"))
"""


@pytest.fixture
def hashed(monkeypatch):
    """The files that the key of a plan is made from."""
    found = set()

    def note(root, files):
        files = list(files)
        found.update(str(path) for path in files)
        return digest_tree(root, files)

    monkeypatch.setattr(planner, "digest_tree", note)
    planner.plan_key(CONFIGURATIONS["svm"], load_profile("svm", "7.3"), "smoke")
    return found


def test_the_key_is_of_every_module_that_takes_part_in_planning(hashed, tmp_path):
    used = subprocess.run(
        [sys.executable, "-c", PLANNING, tmp_path / "plan"], capture_output=True, text=True, check=True
    ).stdout.split()
    finders = {"cache.py", "debian.py"}
    assert len(used) > 50
    assert {name for name in used if name.rpartition("/")[2] not in finders} <= hashed


@pytest.mark.parametrize("name", ["vmcb.py", "guest.py", "host.py", "lab/profile.py", "paths/smm.py"])
def test_the_key_is_of_what_decides_what_a_case_is(hashed, name):
    assert str(ROOT / name) in hashed


def test_the_runner_goes_without_model_and_paths_and_with_all_else():
    found = closure("harness.lab.agent", ("harness.reference", "harness.paths"))
    assert {"harness", "harness.lab", "harness.lab.agent", "harness.lockstep", "harness.vcpu"} <= found
    assert not any(name.startswith(("harness.reference", "harness.paths")) for name in found)


# --- messages ---------------------------------------------------------------------------------------------------------


def through_the_wire(finding):
    return finding_from_json(json.loads(json.dumps(finding_json(finding))))


def test_a_difference_arrives_as_it_was_found():
    expected = Observation(Halt(), pack_sections(STORE.start, ("regs", "sregs2")), {0x6000: bytes(4096)}, {"rflags": 1})
    wrong = STORE.start.with_({"rbx": 0x1234})
    got = Observation(Halt(), pack_sections(wrong, ("regs", "sregs2")), {0x7000: b"\x01" * 4096})
    memory = (MemoryDiff(0x6000, b"\0\0", b"\x01\x02"),)
    finding = Finding(3, Difference(2, 0, expected, got, compare_registers(expected, got), memory), allowed=7)
    back = through_the_wire(finding)
    assert back == finding
    assert [d.name for d in back.difference.registers] == ["rbx"]


@pytest.mark.parametrize(
    "finding",
    [
        Finding(refused="KVM_SET_SREGS: EINVAL"),
        Finding(killed="KVM_RUN: EIO"),
        Finding(1, Difference(1, 0, Observation(Io(0x10, 1, True, b"\x01"), {}), None)),
        Finding(1, Difference(1, 0, None, Observation(Shutdown(), {}))),
    ],
)
def test_every_kind_of_finding_arrives(finding):
    assert through_the_wire(finding) == finding


# --- what may differ --------------------------------------------------------------------------------------------------


class Shown(Recording):
    """A recording whose RAM is as expected."""

    def memory_diff(self, pages, ignore):
        return []


def shown(case, change=lambda state: state):
    ((*rest, last),) = record(ReferenceMachine(), case)
    from harness.state import unpack_sections

    state = change(unpack_sections(last.sections))
    return Shown([[*rest, Observation(last.exit, pack_sections(state, last.sections), last.pages)]])


def test_undefined_flags_are_allowed_and_told():
    expected = Recording(record(ReferenceMachine(), MUL))
    assert lockstep(MUL, expected, shown(MUL)).allowed == 0
    other = lockstep(MUL, expected, shown(MUL, lambda s: s.with_({"rflags": s.rflags ^ 0x40})))
    assert other.difference is None
    assert other.allowed
    assert lockstep(MUL, expected, shown(MUL, lambda s: s.with_({"rflags": s.rflags ^ 0x80}))).allowed != other.allowed


def test_a_defined_flag_is_not():
    expected = Recording(record(ReferenceMachine(), MUL))
    found = lockstep(MUL, expected, shown(MUL, lambda s: s.with_({"rflags": s.rflags ^ 1}))).difference
    assert [d.name for d in found.registers] == ["rflags"]
