"""The parts of the pool that need no KVM: start states packed once, and who may have nested state."""

from dataclasses import replace

import pytest

from harness import kvm_ioctl as k
from harness.modes import CODE_BASE, setup
from harness.pool import SHARED, Packer, may_be_nested
from harness.state import CpuState, Events, Segment, Table, pack_sections

START = setup("long", entry=CODE_BASE).state.with_({"msr.lstar": 0x1234})


def rest(packer, state, names=SHARED):
    return dict(packer.rest(state, names))


def test_packed_bytes_are_those_of_pack_sections():
    assert rest(Packer(), START) == dict(pack_sections(START, SHARED))


def test_general_registers_do_not_make_it_pack_again():
    packer = Packer()
    first = packer.rest(START, SHARED)
    assert packer.rest(START.with_({"rax": 5, "r15": 6, "rip": 7, "rflags": 0x46}), SHARED) is first


CHANGES = {
    "segment": {"fs": Segment(base=0x5000)}, "tr": {"tr": Segment(limit=5)}, "gdtr": {"gdtr": Table(1, 2)},
    "idtr": {"idtr": Table(3, 4)}, "cr0": {"cr0": 0x33}, "cr2": {"cr2": 1}, "cr3": {"cr3": 0x9000},
    "cr4": {"cr4": 0x20}, "cr8": {"cr8": 3}, "efer": {"efer": 0x500}, "apic_base": {"apic_base": 1 << 12},
    "pdptr": {"pdptr": (1, 2, 3, 4)}, "xcr0": {"xcr0": 7}, "dr": {"dr": (1, 0, 0, 0)}, "dr6": {"dr6": 0xFFFF0FF1},
    "dr7": {"dr7": 0x401}, "events": {"events": Events(nmi_masked=1)}, "msrs": {"msrs": ((0xC0000082, 9),)},
    "egpr": {"gpr": (*START.gpr[:16], *range(1, 17))},
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_every_other_register_does(name):
    """A key that forgot one would start a Case with the last one's value."""
    packer = Packer()
    packer.rest(START, SHARED)
    state = replace(START, **CHANGES[name])
    assert rest(packer, state) == dict(pack_sections(state, SHARED))


def test_every_field_of_the_state_is_either_packed_apart_or_part_of_the_key():
    elsewhere = {"rip", "rflags", "gpr", "ssp", "pkru"}  # with the general registers; ssp and pkru are in no section
    known = {*CHANGES, "es", "cs", "ss", "ds", "fs", "gs", "ldtr"} - {"segment", "egpr"}
    assert set(CpuState.__dataclass_fields__) - elsewhere == known


def test_other_sections_are_packed_anew():
    packer = Packer()
    packer.rest(START, SHARED)
    assert list(rest(packer, START, ("xcr0", "events"))) == ["xcr0", "events"]


@pytest.mark.parametrize("section", ["sregs", "sregs2"])
@pytest.mark.parametrize(
    ("values", "nested"), [({}, False), ({"cr4": 1 << 13 | 0x20}, True), ({"efer": 1 << 12 | 0xD00}, True)]
)
def test_a_guest_with_svm_or_vmx_enabled_may_have_nested_state(section, values, nested):
    state = START.with_(values)
    assert may_be_nested(pack_sections(state, ("regs", section))) is nested


def test_nothing_seen_is_not_nested():
    assert not may_be_nested({})


@pytest.mark.parametrize("structure", [k.kvm_sregs, k.kvm_sregs2])
def test_the_bytes_looked_at_are_where_the_structures_have_them(structure):
    from harness import pool

    assert structure.cr4.offset + 1 == pool._CR4_BYTE1
    assert structure.efer.offset + 1 == pool._EFER_BYTE1
