"""CpuState: names, byte layouts, difference."""

import ctypes
import random
from dataclasses import asdict, fields, replace

import pytest

from harness import kvm_ioctl as k
from harness.case import Observation
from harness.cpuid import CpuidEntry, CpuProfile
from harness.exits import Halt
from harness.lockstep import compare_registers
from harness.modes import setup
from harness.state import (
    GPR_NAMES,
    SECTIONS,
    SEGMENT_NAMES,
    SIZEOF,
    CpuState,
    Segment,
    bit_names,
    diff,
    pack_sections,
    unpack_sections,
)


def random_state(seed):
    rng = random.Random(seed)
    flat = CpuState(msrs=((0x174, 0), (0xC0000081, 0))).flat()
    sizes = {"selector": 16, "limit": 32, "base": 64}
    for name in flat:
        part = name.split(".")[-1]
        if name.startswith("events."):
            continue
        if name.startswith(("gdtr", "idtr")) and part == "limit":
            flat[name] = rng.getrandbits(16)
        elif "." in name and not name.startswith("msr."):
            flat[name] = rng.getrandbits(sizes.get(part, 64 if name.startswith(("gdtr", "idtr")) else 1))
        elif name == "pkru":
            flat[name] = rng.getrandbits(32)
        else:
            flat[name] = rng.getrandbits(64)
    return CpuState.from_flat(flat)


def test_flat_round_trip_keeps_every_register():
    state = random_state(1)
    assert CpuState.from_flat(state.flat()) == state


@pytest.mark.parametrize("section", sorted(SECTIONS))
def test_section_round_trip(section):
    """What a section packs it unpacks, and packing again gives the same bytes."""
    state = random_state(2).with_({"cr0": 1 << 31, "cr4": 1 << 5, "efer": 0})  # PAE paging: PDPTRs are state
    data = pack_sections(state, [section])
    assert pack_sections(unpack_sections(data), [section]) == data


@pytest.mark.parametrize("section", sorted(SECTIONS))
def test_a_register_that_differs_is_found_by_its_section_and_by_the_comparison(section):
    """Each register that a section holds, changed alone: where all else is equal, nothing may hide it."""
    delivered = {"events.exception_injected": 1, "events.interrupt_injected": 1}  # only then their numbers are state
    state = setup("pae", entry=0).state.with_({"cr8": 3, "msr.star": 1, "rbx": 5, **delivered})
    everything = ["regs", "sregs2" if section != "sregs" else "sregs", "events", "debugregs", "xcr0", "egpr", "msrs"]
    sections = [*everything, *([section] if section not in everything else [])]
    left = Observation(Halt(), pack_sections(state, sections))
    met = 0
    for name, value in state.flat().items():
        changed = state.with_({name: value ^ 1})
        if pack_sections(changed, [section]) == pack_sections(state, [section]):
            continue
        met += 1
        found = compare_registers(left, Observation(Halt(), pack_sections(changed, sections)))
        assert name in [d.name for d in found], name
    assert met >= {"regs": 18, "sregs": 100, "sregs2": 100, "egpr": 16, "debugregs": 6, "events": 8}.get(section, 1)


STRUCTURES = {
    "regs": k.kvm_regs, "sregs": k.kvm_sregs, "sregs2": k.kvm_sregs2, "debugregs": k.kvm_debugregs,
    "events": k.kvm_vcpu_events,
}  # fmt: skip


@pytest.mark.parametrize("section", sorted(STRUCTURES))
def test_sections_have_the_size_of_their_kvm_structure(section):
    assert len(pack_sections(CpuState(), [section])[section]) == ctypes.sizeof(STRUCTURES[section]) == SIZEOF[section]


def test_registers_lie_where_kvm_regs_has_them():
    state = CpuState(gpr=tuple(range(100, 132)), rip=7, rflags=0x46)
    regs = k.kvm_regs.from_buffer_copy(pack_sections(state, ["regs"])["regs"])
    assert {name: getattr(regs, name) for name in GPR_NAMES[:16]} == dict(zip(GPR_NAMES, range(100, 116), strict=False))
    assert (regs.rip, regs.rflags) == (7, 0x46)


@pytest.mark.parametrize("name", ["cs", "ds", "es", "fs", "gs", "ss", "tr", "ldtr"])
def test_segments_lie_where_kvm_sregs2_has_them(name):
    segment = Segment(0x1234, 0xABCDEF, 0xFEDCB, 5, 1, 3, 1, 1, 1, 1, 1, 1)
    state = CpuState(**{name: segment})
    sregs = k.kvm_sregs2.from_buffer_copy(pack_sections(state, ["sregs2"])["sregs2"])
    seen = getattr(sregs, name.replace("ldtr", "ldt"))
    for part in ("selector", "base", "limit", "type", "s", "dpl", "present", "avl", "l", "db", "g", "unusable"):
        assert getattr(seen, part) == getattr(segment, part), part


def test_control_registers_lie_where_kvm_sregs2_has_them():
    values = {n: 0x1000 + i for i, n in enumerate(("cr0", "cr2", "cr3", "cr4", "cr8", "efer", "apic_base"))}
    state = CpuState().with_(values | {"gdtr.base": 0x11, "gdtr.limit": 0x22, "idtr.base": 0x33, "idtr.limit": 0x44})
    sregs = k.kvm_sregs2.from_buffer_copy(pack_sections(state, ["sregs2"])["sregs2"])
    assert {n: getattr(sregs, n) for n in values} == values
    assert (sregs.gdt.base, sregs.gdt.limit, sregs.idt.base, sregs.idt.limit) == (0x11, 0x22, 0x33, 0x44)


def test_pdptrs_are_marked_valid_only_under_pae_paging():
    pae = CpuState(cr0=1 << 31, cr4=1 << 5, pdptr=(1, 2, 3, 4))
    sregs = k.kvm_sregs2.from_buffer_copy(pack_sections(pae, ["sregs2"])["sregs2"])
    assert sregs.flags == k.KVM_SREGS2_FLAGS_PDPTRS_VALID
    assert tuple(sregs.pdptrs) == (1, 2, 3, 4)
    long = k.kvm_sregs2.from_buffer_copy(pack_sections(pae.with_({"efer": 1 << 10}), ["sregs2"])["sregs2"])
    assert long.flags == 0


def test_debug_registers_lie_where_kvm_debugregs_has_them():
    state = CpuState(dr=(1, 2, 3, 4), dr6=5, dr7=6)
    regs = k.kvm_debugregs.from_buffer_copy(pack_sections(state, ["debugregs"])["debugregs"])
    assert (tuple(regs.db), regs.dr6, regs.dr7) == ((1, 2, 3, 4), 5, 6)


def test_events_lie_where_kvm_vcpu_events_has_them():
    state = CpuState().with_({
        "events.shadow": 1, "events.nmi_masked": 1, "events.nmi_pending": 1, "events.smm": 1,
        "events.exception_injected": 1, "events.exception_nr": 14, "events.exception_has_error": 1,
        "events.exception_error": 6, "events.interrupt_injected": 1, "events.interrupt_nr": 0x20,
    })  # fmt: skip
    events = k.kvm_vcpu_events.from_buffer_copy(pack_sections(state, ["events"])["events"])
    assert (events.exception.injected, events.exception.nr, events.exception.error_code) == (1, 14, 6)
    assert (events.interrupt.injected, events.interrupt.nr, events.interrupt.shadow) == (1, 0x20, 1)
    assert (events.nmi.masked, events.nmi.pending, events.smi.smm) == (1, 1, 1)


def test_leaves_lie_where_kvm_cpuid2_has_them():
    entries = (CpuidEntry(0, 0, 0, 1, 2, 3, 4), CpuidEntry(0xD, 19, 1, 0xFFFFFFFF, 960, 7, 8))
    table = k.cpuid2(2)
    packed = CpuProfile(entries).packed
    assert len(packed) == ctypes.sizeof(table)
    ctypes.memmove(ctypes.addressof(table), packed, len(packed))
    assert table.nent == 2
    for row, entry in zip(table.entries, entries, strict=True):
        assert {f.name: getattr(row, f.name) for f in fields(entry)} == asdict(entry)


def test_diff_names_field_values_xor_and_bits():
    (found,) = diff(CpuState(rflags=0x46), CpuState(rflags=0x887))
    assert (found.name, found.expected, found.got, found.xor) == ("rflags", 0x46, 0x887, 0x8C1)
    assert found.bits == ("CF", "ZF", "SF", "OF")
    assert str(found) == "rflags: expected 0x46, got 0x887, xor 0x8c1  (CF ZF SF OF)"


def test_diff_sees_every_register():
    """No register can differ unseen: flipping any one of them alone gives exactly that name."""
    usable = {f"{s}.{part}": value for s in SEGMENT_NAMES for part, value in (("unusable", 0), ("present", 1))}
    state = random_state(3).with_(usable)
    for name, value in state.flat().items():
        assert [d.name for d in diff(state, state.with_({name: value ^ 1}))] == [name]


def test_diff_leaves_undefined_bits_aside():
    assert diff(CpuState(rflags=0x2), CpuState(rflags=0x12), {"rflags": 0x10}) == []
    assert [d.xor for d in diff(CpuState(rflags=0x2), CpuState(rflags=0x13), {"rflags": 0x10})] == [0x11]


def test_diff_of_empty_segments_compares_selector_fs_gs_base_and_cpl_only():
    """Null (a selector of 0 in protected mode), unusable (VMX) and not present (SVM) say the same."""
    left = CpuState(cr0=1, efer=1 << 10).with_({
        "ds.selector": 0, "ds.base": 5, "fs.base": 5, "fs.unusable": 1, "es.unusable": 1, "ss.unusable": 1,
    })  # fmt: skip
    right = left.with_({"ds.base": 6, "fs.base": 6, "es.base": 7, "es.unusable": 0, "es.present": 0, "ss.dpl": 3})
    assert [d.name for d in diff(left, right)] == ["ss.dpl", "fs.base"]
    assert [d.name for d in diff(left.with_({"efer": 0}), right.with_({"efer": 0}))] == ["ss.dpl"]
    assert [d.name for d in diff(left, right.with_({"es.selector": 9}))] == ["es.selector", "ss.dpl", "fs.base"]


def test_diff_of_selector_0_in_real_mode_compares_everything():
    assert [d.name for d in diff(CpuState(), CpuState().with_({"ds.base": 16}))] == ["ds.base"]


def test_diff_of_a_segment_that_only_one_side_calls_empty_shows_it():
    assert "ds.present" in [d.name for d in diff(CpuState(), CpuState().with_({"ds.present": 0}))]


def test_unnamed_bits_are_numbered():
    assert bit_names("cr4", 1 << 5 | 1 << 40) == ("PAE", "bit 40")
    assert bit_names("rax", 3) == ()


@pytest.mark.parametrize("name", ["rxx", "cs.colour", "msr.nonsense", "pdptr4", "dr8", ""])
def test_unknown_register_is_refused_by_name(name):
    with pytest.raises(KeyError, match=name.split(".")[-1] or "no register"):
        CpuState().with_({name: 1})


def test_a_state_with_other_general_registers_is_what_replace_makes():
    gpr = tuple(range(100, 132))
    made = STATE_FOR_COPY.with_general(gpr, 7, 0x46)
    assert made == replace(STATE_FOR_COPY, gpr=gpr, rip=7, rflags=0x46)
    assert STATE_FOR_COPY.rip == 0x1000, "the original stays"
    assert pack_sections(made, ("regs",)) != pack_sections(STATE_FOR_COPY, ("regs",))


STATE_FOR_COPY = CpuState(rip=0x1000, cr2=5).with_({"msr.star": 3, "fs.base": 0x70})
