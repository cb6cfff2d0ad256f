"""The reference model's memory against the manuals: segmentation, paging, MMIO, on hand-built tables."""

from __future__ import annotations

import pytest
from reference_cpu import faults, profile, start, words

from harness.exits import Mmio
from harness.modes import (
    ABSENT_PAGE,
    DATA_BASE,
    READONLY_PAGE,
)
from harness.reference.cpu import (
    AC,
    DS,
    FS,
    GP,
    PAGE_FAULT,
    SS,
    STACK,
    Cpu,
    Fault,
    ModelError,
)

# --- segmentation ---------------------------------------------------------------------------------------------------


def test_a_segment_limit_counts_the_last_byte():
    cpu = start("prot32", ds__limit=0xFFF)
    cpu.mem.write(DS, 0xFFC, 4, 0x12345678)
    assert cpu.mem.read(DS, 0xFFC, 4) == 0x12345678
    assert faults(cpu.mem.read, DS, 0xFFD, 4) == (GP, 0)
    assert faults(cpu.mem.read, SS, 0xFFFFFFF0, 4) == (STACK, 0)


def test_expand_down_reaches_from_past_the_limit_to_its_upper_bound():
    cpu = start("prot32", ds__type=7, ds__limit=0xFFF, ds__db=0)
    assert faults(cpu.mem.read, DS, 0xFFF, 1) == (GP, 0)
    cpu.mem.read(DS, 0x1000, 1)
    cpu.mem.read(DS, 0xFFFF, 1)
    assert faults(cpu.mem.read, DS, 0xFFFF, 2) == (GP, 0)
    cpu = start("prot32", ds__type=7, ds__limit=0xFFF, ds__db=1)
    cpu.mem.read(DS, 0x10000, 4)


@pytest.mark.parametrize(
    ("type_", "read", "write"), [(1, True, False), (3, True, True), (9, False, False), (11, True, False)]
)
def test_the_segment_type_allows_reads_and_writes(type_, read, write):
    cpu = start("prot32", ds__type=type_)
    assert read or faults(cpu.mem.read, DS, 0, 4) == (GP, 0)
    assert write or faults(cpu.mem.write, DS, 0, 4, 0) == (GP, 0)
    if read:
        cpu.mem.read(DS, 0, 4)
    if write:
        cpu.mem.write(DS, 0, 4, 0)


def test_an_unusable_segment_is_gp_outside_64_bit_mode():
    assert faults(start("prot32", ds__unusable=1).mem.read, DS, 0, 1) == (GP, 0)
    start("long", ds__unusable=1).mem.read(DS, DATA_BASE, 1)


def test_64_bit_mode_has_only_the_bases_of_fs_and_gs_and_wants_canonical_addresses():
    cpu = start("long", ds__base=0x5000, fs__base=DATA_BASE)
    cpu.mem.write(FS, 8, 8, 0x1122334455667788)
    assert cpu.mem.read(DS, DATA_BASE + 8, 8) == 0x1122334455667788
    assert faults(cpu.mem.read, DS, 1 << 47, 1) == (GP, 0)
    assert faults(cpu.mem.read, SS, (1 << 47) - 4, 8) == (STACK, 0)
    assert faults(start("long5").mem.read, DS, 1 << 56, 1) == (GP, 0)
    assert faults(start("long5").mem.read, DS, 1 << 48, 1)[0] == PAGE_FAULT


def test_real_mode_checks_the_limit_alone_and_wraps_nowhere():
    cpu = start("real", ds__type=1)
    cpu.mem.write(DS, 0xFFFE, 2, 0xABCD)
    assert faults(cpu.mem.read, DS, 0xFFFF, 2) == (GP, 0)
    assert faults(cpu.mem.write, SS, 0xFFFF, 2, 0) == (STACK, 0)


def test_alignment_check_needs_cpl_3_am_and_ac():
    cpu = start("prot32-user", rflags=2 | AC, cr0=0x40011 | 0x20)
    assert faults(cpu.mem.read, DS, 1, 4) == (17, 0)
    cpu.mem.read(DS, 4, 4)
    start("prot32", rflags=2 | AC, cr0=0x40011 | 0x20).mem.read(DS, 1, 4)


def test_outside_of_slots_is_mmio_at_most_eight_bytes_an_exit():
    cpu = start("prot32", ds__base=0xA0000, ds__limit=0x1FFFF)
    cpu.mem.write(DS, 0x10, 4, 0x11223344)
    value = cpu.mem.read(DS, 0x20, 2)
    assert cpu.pending_exits == [Mmio(0xA0010, 4, True, b"\x44\x33\x22\x11"), Mmio(0xA0020, 2, False)]
    assert value == int.from_bytes(cpu.case.read_data(0, 2), "little")
    cpu.pending_exits.clear()
    cpu.mem.read_bytes(DS, 0, 16)
    assert [e.size for e in cpu.pending_exits if isinstance(e, Mmio)] == [8, 8]


def test_undefined_bits_in_memory_stay_until_they_are_written():
    cpu = start("prot32")
    cpu.mem.write(DS, 0, 4, 0xFF, undefined=0x80)
    assert cpu.mem.pages_ignore == {DATA_BASE: 0x80}
    assert cpu.mem.pages() == {DATA_BASE: b"\xff".ljust(4096, b"\0")}
    assert cpu.mem.read_undefined(DS, 0, 4) == (0xFF, 0x80)
    with pytest.raises(ModelError):
        cpu.mem.read(DS, 0, 4)
    cpu.mem.write(DS, 0, 1, 0)
    assert cpu.mem.pages_ignore == {}
    assert list(cpu.mem.pages()) == []


# --- paging ---------------------------------------------------------------------------------------------------------

P, W, U, A, D, PS, NX = 1, 2, 4, 0x20, 0x40, 0x80, 1 << 63


def entry(cpu: Cpu, address: int, value: int, size: int = 8) -> None:
    cpu.mem.physical_write(address, value.to_bytes(size, "little"))


def test_32_bit_paging_walks_two_levels_and_sets_a_and_d():
    cpu = start("pse", cr4=0)
    entry(cpu, 0x5000 + 4, 0x8000 | P | W | U, 4)
    entry(cpu, 0x8000 + 4 * 3, 0x10000 | P | W | U, 4)
    assert cpu.mem.translate(0x403123) == 0x10123
    assert words(cpu, 0x5004, 4, 1)[0] & (A | D) == A
    assert words(cpu, 0x800C, 4, 1)[0] & (A | D) == A
    cpu.mem.translate(0x403000, True)
    assert words(cpu, 0x800C, 4, 1)[0] & (A | D) == A | D


def test_pse_maps_4_mib_and_pse36_reaches_past_4_gib():
    cpu = start("pse")
    entry(cpu, 0x5000 + 4 * 2, 0x00C00000 | 3 << 13 | P | W | PS, 4)
    assert cpu.mem.translate(0x801234) == 0x3_00C01234
    entry(cpu, 0x5000 + 4 * 2, 0x00C00000 | 1 << 21 | P | W | PS, 4)
    assert faults(cpu.mem.translate, 0x801234) == (PAGE_FAULT, 9)
    cpu = start("pse", cpu=profile(without=("pse36",)))
    entry(cpu, 0x5000 + 4 * 2, 0x00C00000 | 1 << 13 | P | W | PS, 4)
    assert faults(cpu.mem.translate, 0x801234) == (PAGE_FAULT, 9)


def test_pae_walks_from_the_pdpte_registers():
    cpu = start("pae", pdptr1=0x8000 | P)
    entry(cpu, 0x8000, 0x9000 | P | W | U)
    entry(cpu, 0x9000, 0x10000 | P | W | U)
    assert cpu.mem.translate(0x40000042) == 0x10042
    assert faults(cpu.mem.translate, 0x80000000) == (PAGE_FAULT, 0)
    entry(cpu, 0x8008, 0x200000 | P | W | PS)
    assert cpu.mem.translate(0x40200042) == 0x200042
    entry(cpu, 0x8008, 0x202000 | P | W | PS)
    assert faults(cpu.mem.translate, 0x40200042) == (PAGE_FAULT, 9)


@pytest.mark.parametrize("mode", ["long", "long5"])
def test_long_mode_maps_4k_2m_and_1g(mode):
    cpu = start(mode)
    assert cpu.mem.translate(DATA_BASE + 5) == DATA_BASE + 5
    entry(cpu, 0x7000 + 8 * 5, 0x40000000 | P | W | PS)
    assert cpu.mem.translate(0xA12345) == 0x40012345
    entry(cpu, 0x6000 + 8 * 7, 0x80000000 | P | W | PS)
    assert cpu.mem.translate((7 << 30) + 0x1234567) == 0x81234567


def test_a_1_gib_page_is_a_reserved_bit_without_the_feature():
    cpu = start("long", cpu=profile(without=("pdpe1gb",)))
    entry(cpu, 0x6000 + 8 * 7, 0x80000000 | P | W | PS)
    assert faults(cpu.mem.translate, 7 << 30) == (PAGE_FAULT, 9)


@pytest.mark.parametrize(
    ("bits", "access", "error"),
    [
        (0, {}, 0), (0, {"write": True}, 2), (0, {"user": True}, 4), (0, {"fetch": True}, 0x10),
        (P | W, {"user": True}, 5), (P | U, {"user": True, "write": True}, 7), (P | U, {"write": True}, 3),
        (P | W | U | NX, {"fetch": True, "user": True}, 0x15), (P | W | NX, {"fetch": True}, 0x11),
        (P | W | 1 << 40, {}, 9), (P | W | 1 << 51, {"write": True}, 0xB),
    ],
)  # fmt: skip
def test_page_fault_error_codes(bits, access, error):
    cpu = start("long")
    entry(cpu, 0x8000 + 8 * 0x11, 0x10000 | bits)
    with pytest.raises(Fault) as seen:
        cpu.mem.translate(0x11008, **access)
    assert (seen.value.vector, seen.value.error, seen.value.cr2) == (PAGE_FAULT, error, 0x11008)


def test_the_rights_of_all_levels_combine():
    cpu = start("long")
    entry(cpu, 0x6000, 0x7000 | P | U)
    assert faults(cpu.mem.translate, DATA_BASE, True) == (PAGE_FAULT, 3)
    entry(cpu, 0x6000, 0x7000 | P | W)
    assert faults(cpu.mem.translate, DATA_BASE, False, True) == (PAGE_FAULT, 5)


def test_wp_clear_lets_the_supervisor_write_read_only_pages():
    assert faults(start("long").mem.translate, READONLY_PAGE, True) == (PAGE_FAULT, 3)
    cpu = start("long", cr0=0x80000033)
    cpu.mem.translate(READONLY_PAGE, True)
    assert faults(cpu.mem.translate, READONLY_PAGE, True, True) == (PAGE_FAULT, 7)


def test_nx_is_a_reserved_bit_without_efer_nx():
    cpu = start("long", efer=0x500)
    entry(cpu, 0x8000 + 8 * 0x11, 0x11000 | P | W | NX)
    assert faults(cpu.mem.translate, 0x11000) == (PAGE_FAULT, 9)
    assert faults(cpu.mem.translate, 0x11000, fetch=True) == (PAGE_FAULT, 9)


def test_smep_and_smap_keep_the_supervisor_out_of_user_pages():
    smep = start("long", cr4=0x20 | 1 << 20)
    assert faults(smep.mem.translate, DATA_BASE, fetch=True) == (PAGE_FAULT, 0x11)
    smap = start("long", cr4=0x20 | 1 << 21)
    assert faults(smap.mem.read, DS, DATA_BASE, 4) == (PAGE_FAULT, 1)
    smap.rflags |= AC
    smap.mem.read(DS, DATA_BASE, 4)
    assert faults(smap.mem.linear_read, DATA_BASE, 4) == (PAGE_FAULT, 1)


def test_protection_keys_guard_data_of_user_pages():
    cpu = start("long-user", cr4=0x20 | 1 << 22, pkru=1 << 6 | 1 << 9)
    entry(cpu, 0x8000 + 8 * 0x10, DATA_BASE | P | W | U | 3 << 59)
    entry(cpu, 0x8000 + 8 * 0x11, 0x11000 | P | W | U | 4 << 59)
    assert faults(cpu.mem.read, DS, DATA_BASE, 4) == (PAGE_FAULT, 0x25)
    cpu.mem.read(DS, 0x11000, 4)
    assert faults(cpu.mem.write, DS, 0x11000, 4, 0) == (PAGE_FAULT, 0x27)


def test_an_access_across_pages_translates_both_before_it_writes():
    cpu = start("long")
    with pytest.raises(Fault) as seen:
        cpu.mem.write(DS, ABSENT_PAGE - 2, 4, 0xFFFFFFFF)
    assert (seen.value.error, seen.value.cr2) == (2, ABSENT_PAGE)
    assert cpu.mem.read(DS, ABSENT_PAGE - 2, 2) == 0
    cpu.mem.write(DS, DATA_BASE + 0xFFE, 4, 0x44332211)
    assert cpu.mem.read(DS, DATA_BASE + 0x1000, 2) == 0x4433


def test_writing_a_page_table_takes_effect_at_once():
    cpu = start("long")
    cpu.mem.read(DS, DATA_BASE, 4)
    entry(cpu, 0x8000 + 8 * 0x10, 0)
    assert faults(cpu.mem.read, DS, DATA_BASE, 4) == (PAGE_FAULT, 0)
