"""Start states are what the manuals ask for: hidden parts equal the descriptors, page tables give identity."""

import pytest

from harness.case import Memory, Slot
from harness.cpuid import CpuidEntry, CpuProfile, with_features
from harness.modes import (
    ABSENT_PAGE,
    CODE_BASE,
    GDT,
    IDT,
    MMIO_LINEAR,
    MODES,
    RAM_SIZE,
    READONLY_PAGE,
    STUBS,
    TSS,
    assembler_constants,
    encode_segment,
    setup,
)  # fmt: skip
from harness.state import Segment

PROTECTED = [m for m in MODES if m not in ("real", "vm86")]
PAGED = ["pse", "pae", "compat", "compat-user", "long", "long-user", "long5"]


def ram(mode):
    return Memory(setup(mode, entry=CODE_BASE).blobs).image(Slot(0, RAM_SIZE))


def u(data, at, size):
    return int.from_bytes(data[at : at + size], "little")


def descriptor(data, at):
    """An independent reading of a descriptor: base, limit, access byte, flags nibble (SDM vol. 3A figure 3-8)."""
    raw = u(data, at, 8)
    base = raw >> 16 & 0xFFFFFF | (raw >> 56) << 24
    limit = raw & 0xFFFF | (raw >> 48 & 0xF) << 16
    access, flags = raw >> 40 & 0xFF, raw >> 52 & 0xF
    return base, limit * 4096 + 4095 if flags & 8 else limit, access, flags


def walk(data, state, linear):
    """(physical, user, writable) of a linear address by the paging structures in RAM, or None. SDM vol. 3A 4.3-4.5."""
    if state.efer >> 10 & 1:
        levels, width = (5 if state.cr4 >> 12 & 1 else 4), 8
    elif state.cr4 >> 5 & 1:
        levels, width = 3, 8
    else:
        levels, width = 2, 4
    bits = 9 if width == 8 else 10
    table, user, write = state.cr3 & ~0xFFF, True, True
    for level in range(levels - 1, -1, -1):
        shift = 12 + bits * level
        index = linear >> shift & (3 if levels == 3 and level == 2 else (1 << bits) - 1)
        entry = u(data, table + index * width, width)
        if not entry & 1:
            return None
        pdpte = levels == 3 and level == 2
        if not pdpte:
            assert entry >> 5 & 1, "accessed"
            user, write = user and bool(entry & 4), write and bool(entry & 2)
        if level == 0 or (entry >> 7 & 1 and not pdpte):
            assert entry >> 6 & 1, "dirty"
            mask = (1 << shift) - 1
            return entry & ~mask & 0xFFFFFFFFFF | linear & mask, user, write
        table = entry & 0xFFFFF000
    raise AssertionError("no leaf")


@pytest.mark.parametrize("mode", PROTECTED)
def test_hidden_parts_are_those_of_the_gdt(mode):
    state, data = setup(mode, entry=CODE_BASE).state, ram(mode)
    for name in ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldtr"):
        seg = getattr(state, name)
        base, limit, access, flags = descriptor(data, GDT + (seg.selector & ~7))
        got = (seg.base, seg.limit, seg.type | seg.s << 4 | seg.dpl << 5 | seg.present << 7)
        assert got == (base, limit, access), name
        assert seg.avl | seg.l << 1 | seg.db << 2 | seg.g << 3 == flags, name
        assert seg.selector & 7 == (0 if name in ("tr", "ldtr") else setup(mode, entry=0).cpl)
        assert not seg.s or seg.type & 1, "accessed"


@pytest.mark.parametrize("mode", PAGED)
def test_paging_is_identity_for_ram_and_the_hole(mode):
    state, data = setup(mode, entry=CODE_BASE).state, ram(mode)
    top = 0x800000 if mode == "pse" else 0x400000
    for linear in [*range(0, 0x200000, 0x1000), 0x200123, top - 1]:
        if linear == ABSENT_PAGE:
            assert walk(data, state, linear) is None
            continue
        found = walk(data, state, linear)
        assert found is not None
        assert found[0] == linear
        assert found[2] == (linear != READONLY_PAGE)
    assert walk(data, state, top) is None
    assert walk(data, state, MMIO_LINEAR)[1]
    assert walk(data, state, CODE_BASE)[1]
    assert not walk(data, state, GDT)[1]


def test_pae_has_its_pdptes_loaded():
    state, data = setup("pae", entry=CODE_BASE).state, ram("pae")
    assert list(state.pdptr) == [u(data, state.cr3 + 8 * i, 8) for i in range(4)]


@pytest.mark.parametrize("mode", MODES)
def test_every_vector_ends_in_its_own_halt_at_cpl0(mode):
    state, data = setup(mode, entry=CODE_BASE).state, ram(mode)
    for n in range(256):
        assert data[STUBS + 16 * n] == 0xF4
        if mode == "real":
            assert (u(data, 4 * n + 2, 2) << 4) + u(data, 4 * n, 2) == STUBS + 16 * n
            continue
        wide = state.efer >> 10 & 1
        at = IDT + n * (16 if wide else 8)
        assert u(data, at, 2) | u(data, at + 6, 2) << 16 == STUBS + 16 * n
        assert data[at + 5] & 0x9F == (0x86 if mode == "prot16" else 0x8E)
        base, _limit, access, flags = descriptor(data, GDT + u(data, at + 2, 2))
        assert (base, access & 0xFA) == (0, 0x9A)
        assert flags >> 1 & 1 == wide, "a 64-bit gate needs 64-bit code"


@pytest.mark.parametrize("mode", [m for m in MODES if m != "real"])
def test_tss_leads_to_a_valid_kernel_stack(mode):
    state, data = setup(mode, entry=CODE_BASE).state, ram(mode)
    assert state.tr.base == TSS
    if mode == "prot16":
        assert state.tr.type == 3
        base, limit, access, _ = descriptor(data, GDT + u(data, TSS + 4, 2))
        top = base + u(data, TSS + 2, 2)
        assert top - base <= limit + 1
        assert access == 0x93
    elif state.efer >> 10 & 1:
        top = u(data, TSS + 4, 8)
    else:
        base, _, access, _ = descriptor(data, GDT + u(data, TSS + 8, 2))
        top = base + u(data, TSS + 4, 4)
        assert access == 0x93
    assert top == 0x1F000
    if mode != "prot16":
        assert u(data, TSS + 0x66, 2) > state.tr.limit


@pytest.mark.parametrize("mode", MODES)
def test_stack_pointer_and_entry_reach_their_places(mode):
    s = setup(mode, entry=CODE_BASE + 5)
    assert s.state.ss.base + s.state.gpr[4] == 0x1A000
    assert s.state.cs.base + s.state.rip == CODE_BASE + 5


@pytest.mark.parametrize("mode", ["real", "prot16", "prot32", "vm86", "compat"])
def test_segment_bases_differ(mode):
    state = setup(mode, entry=CODE_BASE).state
    assert len({getattr(state, n).base for n in ("cs", "ds", "es", "fs", "gs", "ss")}) == 6


def test_vm86_segments_are_what_virtual_8086_mode_demands():
    state = setup("vm86", entry=CODE_BASE).state
    assert state.rflags == 0x23002
    for name in ("cs", "ds", "es", "fs", "gs", "ss"):
        seg = getattr(state, name)
        assert (seg.base, seg.limit, seg.type, seg.dpl, seg.s) == (seg.selector << 4, 0xFFFF, 3, 3, 1)


def test_profile_decides_efer_and_apx():
    none = CpuProfile((CpuidEntry(0),))
    assert setup("long", entry=0, profile=none).state.efer == 0x500
    assert setup("long", entry=0).state.efer == 0xD01
    apx = setup("long", entry=0, profile=with_features(none, add=["apx"])).state
    assert apx.xcr0 >> 19 & 1
    assert apx.cr4 >> 18 & 1


def test_wrong_input_is_refused():
    with pytest.raises(ValueError, match="use one of"):
        setup("smm", entry=0)
    with pytest.raises(ValueError, match="out of reach"):
        setup("real", entry=0x10000)
    with pytest.raises(ValueError, match="granularity"):
        encode_segment(Segment(limit=0x1FFFFF))


def test_constants_are_as_the_mode_sees_them():
    for mode in MODES:
        state, c = setup(mode, entry=0).state, assembler_constants(mode)
        for name in ("ds", "es", "fs", "gs"):
            area = {"ds": 0x10000, "es": 0x11000, "fs": 0x12000, "gs": 0x13000}[name]
            assert getattr(state, name).base + c[f"{name.upper()}_OFF"] == area
            assert c[f"SEL_{name.upper()}"] == getattr(state, name).selector
        assert state.gpr[4] == c["STACK_OFF"]
