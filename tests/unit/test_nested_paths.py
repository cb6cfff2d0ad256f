"""The model's guests of guests: what is in the VMCB and in L1's registers after L2 has left."""

import pytest

from harness import vmcb
from harness.cpuid import CpuidEntry, CpuProfile, with_features
from harness.exits import Halt, Io
from harness.machine import record
from harness.paths import all_cases
from harness.paths.nested import VMCB
from harness.reference.machine import ReferenceMachine
from harness.state import unpack_sections

VENDOR = {"ebx": 0x68747541, "edx": 0x69746E65, "ecx": 0x444D4163}
HAS = ["lm", "nx", "syscall", "pae", "pse", "svm", "msr", "sep", "fxsr", "sse"]
PROFILE = with_features(CpuProfile((CpuidEntry(0, **VENDOR),)), add=HAS)
CASES = {c.name.removeprefix("nested/"): c for c in all_cases(PROFILE, families=["nested"]) if "apx" not in c.requires}
STUB = 0x4000


class After:
    """A Case run by the model: ``seen``, the last state, and the VMCB's fields."""

    def __init__(self, name):
        self.case, machine = CASES[name], ReferenceMachine()
        self.seen = [o for step in record(machine, self.case) for o in step]
        self.state = unpack_sections(self.seen[-1].sections)
        page = machine.cpu.mem.pages().get(VMCB)
        self.page = page if page is not None else self.case.memory.image(self.case.shape.slots[0])[VMCB : VMCB + 4096]

    def field(self, name):
        return vmcb.read(self.page, name)

    def saved(self, name):
        at = vmcb.REGISTERS[name]
        return int.from_bytes(self.page[at : at + 8], "little")

    @property
    def code(self):
        return self.field("exit_code")


@pytest.mark.parametrize(("entry", "code"), [
    ("vmmcall", 0x81), ("cpuid", 0x72), ("hlt", 0x78), ("out", 0x7B), ("in", 0x7B), ("rdmsr", 0x7C), ("cr0_read", 0x00),
    ("cr0_write", 0x10), ("cr3_write", 0x13), ("dr7_read", 0x27), ("dr0_write", 0x30), ("ud", 0x46), ("gp", 0x4D),
    ("divide", 0x40), ("wbinvd", 0x89), ("invlpg", 0x79), ("pushf", 0x70), ("sidt", 0x66),
])  # fmt: skip
@pytest.mark.parametrize("kind", ["same", "high", "pae"])
def test_what_is_intercepted_leaves_with_its_code(kind, entry, code):
    after = After(f"{kind}_{entry}@long#0")
    assert after.code == code
    assert [o.exit for o in after.seen] == [Halt()]


def test_each_level_gets_its_own_rax_rsp_and_rip_back():
    after = After("high_registers@long#0")
    start = after.case.start
    assert after.state.gpr[4] == start.gpr[4]
    assert after.state.gpr[0] == VMCB
    assert after.state.gpr[6] == 0x1234567, "RSI is nobody's but the one who wrote it last"
    assert after.saved("rax") == 0x77777777
    assert after.saved("rip") >> 32 == 0xFFFF8000
    assert after.state.rip >> 32 == 0


def test_an_intercepted_page_fault_shows_its_address_and_does_not_write_cr2():
    after = After("same_page_fault_store@long#0")
    assert (after.field("exit_info1"), after.field("exit_info2")) == (2, 0x1C010)
    assert after.saved("cr2") == after.state.cr2 == 0


def test_port_accesses_tell_port_size_and_next_rip():
    after = After("same_in@long#0")
    assert after.field("exit_info1") == 0x12 << 16 | 2 << 4 | 1
    assert after.field("exit_info2") - after.saved("rip") == 3


def test_what_is_not_intercepted_leaves_for_userspace_in_l2():
    after = After("pae_out_runs@long#0")
    assert [type(o.exit) for o in after.seen] == [Io, Io, Halt]
    inside = unpack_sections(after.seen[0].sections)
    assert (inside.efer & 0x400, inside.cs.db, inside.pdptr[0] & 1) == (0, 1, 1)
    assert after.state.efer & 0x400


def test_the_shadow_of_sti_is_saved():
    assert After("same_shadow@long#0").field("shadow") & 1
    assert not After("same_vmmcall@long#0").field("shadow") & 1


@pytest.mark.parametrize(("name", "vector"), [
    ("inject_ud", 6), ("inject_gp", 13), ("inject_interrupt", 0x91), ("ud_runs", 6),
])  # fmt: skip
def test_events_reach_the_handler_of_l2(name, vector):
    after = After(f"same_{name}@long#0")
    assert after.code == 0x78
    assert after.saved("rip") == STUB + 16 * vector
    assert not after.field("event_injection") >> 31 & 1


@pytest.mark.parametrize("what", ["asid", "intercept", "svme", "cr0", "cr0_high", "dr7"])
def test_a_guest_that_cannot_be_is_refused(what):
    after = After(f"same_invalid_{what}@long#0")
    assert after.code == vmcb.EXIT_INVALID
    assert [o.exit for o in after.seen] == [Halt()]


@pytest.mark.parametrize(("entry", "vector"), [("vmrun_refused_address", 13), ("vmrun_without_svme", 6)])
def test_vmrun_that_faults(entry, vector):
    after = After(f"l1_{entry}@long#0")
    assert after.state.rip == STUB + 16 * vector + 1


def test_vmload_loads_what_vmrun_does_not():
    after = After("l1_vmload@long#0")
    assert after.state.tr == vmcb.unpack_segment(after.page, "tr")
    assert after.state.fs.base == after.case.start.fs.base

