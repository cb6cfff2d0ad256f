"""The reference model's memory, events and system instructions against the manuals: hand-built tables and frames."""

from __future__ import annotations

import struct
from dataclasses import replace

import pytest

from harness.case import Blob, Case, Memory, Slot, VmShape
from harness.cpuid import FEATURES, CpuidEntry, CpuProfile, with_features
from harness.exits import Halt, Io, Mmio
from harness.modes import (
    ABSENT_PAGE,
    CODE_BASE,
    DATA_BASE,
    GDT,
    IDT,
    KERNEL_STACK_TOP,
    LDT,
    READONLY_PAGE,
    SEL_CODE64,
    SEL_CONFORMING,
    SEL_CS,
    SEL_DS,
    SEL_EXPAND,
    SEL_KDATA,
    SEL_LDT,
    SEL_READONLY,
    SEL_SS,
    SEL_TSS,
    SEL_UCS,
    SEL_UDS,
    SEL_USS,
    STACK_TOP,
    STUBS,
    TSS,
    encode_segment,
    setup,
)
from harness.reference import events, execute
from harness.reference.cpu import (
    AC,
    CS,
    DS,
    ES,
    FS,
    GP,
    GS,
    NP,
    PAGE_FAULT,
    SS,
    STACK,
    TS,
    UD,
    VM,
    Cpu,
    Fault,
    ModelError,
)
from harness.reference.msr import cpuid_leaf
from harness.state import Segment, Table

INTEL = (0x756E6547, 0x6C65746E, 0x49656E69)
AMD = (0x68747541, 0x444D4163, 0x69746E65)
LEFT_OUT = {"vmx", "svm", "tbm", "apx", "shstk", "ibt", "mpx", "osxsave", "ospke"}


def profile(vendor: tuple[int, int, int] = INTEL, *, without: tuple[str, ...] = ()) -> CpuProfile:
    """A processor with every feature that the harness names but virtualization and CET; 40 address bits."""
    base = CpuProfile((
        CpuidEntry(0, 0, 0, 0xD, *vendor), CpuidEntry(1), CpuidEntry(7, 0, 1, 1), CpuidEntry(7, 1, 1),
        CpuidEntry(0xD, 0, 1, 7, 576, 832), CpuidEntry(0xD, 1, 1, 0xF), CpuidEntry(0xD, 2, 1, 256, 576),
        CpuidEntry(0x80000000, 0, 0, 0x80000008), CpuidEntry(0x80000001), CpuidEntry(0x80000008, 0, 0, 0x3028),
    ))  # fmt: skip
    return with_features(base, add=[f for f in FEATURES if f not in LEFT_OUT and f not in without])


def start(
    mode: str, code: str = "f4", *, cpu: CpuProfile | None = None, blobs: tuple[Blob, ...] = (), **flat: int
) -> Cpu:
    """A Cpu in ``mode`` with ``code`` (hex) at RIP; ``flat`` registers with ``__`` for the dot."""
    chosen = cpu or profile()
    s = setup(mode, entry=CODE_BASE, profile=chosen)
    memory = Memory((*s.blobs, Blob(CODE_BASE, bytes.fromhex(code)), *blobs))
    state = s.state.with_({name.replace("__", "."): value for name, value in flat.items()})
    shape = VmShape((Slot(0, 0x20000), Slot(0x200000, 0x1000)))
    return Cpu(Case(f"test/{mode}", memory, state, chosen, shape=shape, bits=s.bits))


def run(cpu: Cpu, steps: int = 50) -> Cpu:
    """Step until HLT."""
    for _ in range(steps):
        execute.step(cpu)
        if any(isinstance(e, Halt) for e in cpu.pending_exits):
            return cpu
    raise AssertionError(f"no HLT in {steps} steps, RIP {cpu.rip:#x}")


def stub(cpu: Cpu) -> int:
    """The vector whose stub halted the Cpu."""
    assert STUBS < cpu.linear_rip() < STUBS + 0x1000, hex(cpu.rip)
    return (cpu.linear_rip() - STUBS) // 16


def words(cpu: Cpu, address: int, size: int, count: int) -> tuple[int, ...]:
    """``count`` little-endian words of ``size`` bytes at a linear address."""
    return tuple(cpu.mem.linear_read(address + size * i, size) for i in range(count))


def faults(function, *args, **more) -> tuple[int, int | None]:
    with pytest.raises(Fault) as seen:
        function(*args, **more)
    return seen.value.vector, seen.value.error


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
    assert faults(start("long5").mem.read, DS, 1 << 47, 1)[0] == PAGE_FAULT


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


# --- event delivery -------------------------------------------------------------------------------------------------


def test_real_mode_pushes_flags_cs_ip_and_clears_if_tf_ac():
    cpu = run(start("real", "0f0b", rflags=0x302 | AC, cs__base=0))
    assert stub(cpu) == UD
    top = STACK_TOP
    assert words(cpu, top - 6, 2, 3) == (CODE_BASE, 0, 0x302)
    assert cpu.gpr[4] == top - 0x18000 - 6
    assert cpu.rflags & (0x300 | AC) == 0


def test_real_mode_pushes_no_error_code():
    cpu = run(start("real", "8ad8a1ffff"))  # mov ax, [ffff]: #GP
    assert stub(cpu) == GP
    assert words(cpu, STACK_TOP - 6, 2, 1) == (CODE_BASE + 2,)


def test_real_mode_idt_limit_is_checked():
    cpu = start("real", "cd20", idtr__limit=0x7F)
    run(cpu)
    assert stub(cpu) == GP
    with pytest.raises(events.TripleFault):
        run(start("real", "cd20", idtr__limit=0x1F))


def test_protected_mode_interrupt_gate_on_the_same_stack():
    cpu = run(start("prot32", "cd80", rflags=0x4302))
    assert stub(cpu) == 0x80
    assert words(cpu, STACK_TOP - 12, 4, 3) == (CODE_BASE + 2, SEL_CS, 0x4302)
    assert cpu.rflags & 0x4300 == 0


def test_a_trap_gate_leaves_if_alone_and_a_16_bit_gate_pushes_words():
    gate = struct.pack("<HHBBH", STUBS + 16 * 0x80, SEL_CS, 0, 0xE7, 0)
    cpu = run(start("prot32", "cd80", rflags=0x202, blobs=(Blob(IDT + 8 * 0x80, gate),)))
    assert words(cpu, STACK_TOP - 6, 2, 3) == (CODE_BASE + 2, SEL_CS, 0x202)
    assert cpu.rflags & 0x200


def test_faults_push_rf_and_an_error_code():
    cpu = run(start("prot32", "66b8f3ff8ed8"))  # mov ds, fff3: beyond the GDT
    assert stub(cpu) == GP
    error, eip, cs, flags = words(cpu, STACK_TOP - 16, 4, 4)
    assert (error, eip, cs, flags) == (0xFFF0, CODE_BASE + 4, SEL_CS, 0x10002)
    assert not cpu.rflags & 0x10000


def test_an_inner_handler_gets_the_stack_of_the_tss():
    cpu = run(start("prot32-user", "0f0b"))
    assert stub(cpu) == UD
    frame = words(cpu, KERNEL_STACK_TOP - 20, 4, 5)
    assert frame == (CODE_BASE, SEL_UCS | 3, 0x10002, STACK_TOP - 0x18000, SEL_USS | 3)
    assert (cpu.seg[SS].selector, cpu.seg[CS].selector, cpu.cpl) == (SEL_KDATA, SEL_CS, 0)
    assert cpu.gpr[4] == KERNEL_STACK_TOP - 20


def test_a_16_bit_tss_gives_a_16_bit_stack():
    blob = struct.pack("<HHH", 0, 0x7000, 0xB0)
    cpu = start("prot32-user", "0f0b", tr__type=3, tr__limit=0x2B, blobs=(Blob(TSS, blob),), rsp=0x12341000)
    run(cpu)
    assert cpu.seg[SS].selector == 0xB0
    assert cpu.gpr[4] & 0xFFFF == 0x7000 - 20
    assert words(cpu, 0x18000 + 0x7000 - 8, 4, 1) == (0x12341000,)


def test_vm86_pushes_the_data_segments_and_nulls_them():
    cpu = run(start("vm86", "0f0b", gs__selector=0x1300))
    assert stub(cpu) == UD
    frame = words(cpu, KERNEL_STACK_TOP - 36, 4, 9)
    assert frame[:3] == (CODE_BASE, 0, 0x33002)
    assert frame[3:] == (STACK_TOP - 0x18000, 0x1800, 0x1100, 0x1000, 0x1200, 0x1300)
    assert all(cpu.seg[i].unusable and not cpu.seg[i].selector for i in (ES, DS, FS, GS))
    assert not cpu.rflags & VM


def test_int_n_in_vm86_needs_iopl_3():
    assert stub(run(start("vm86", "cd80"))) == 0x80
    cpu = run(start("vm86", "cd80", rflags=0x20002))
    assert stub(cpu) == GP
    assert words(cpu, KERNEL_STACK_TOP - 40, 4, 1) == (0,)


@pytest.mark.parametrize("mode", ["prot32-user", "long-user", "compat-user"])
def test_int_n_needs_the_gates_dpl(mode):
    cpu = run(start(mode, "cd20"))
    assert stub(cpu) == GP
    size = 8 if mode != "prot32-user" else 4
    frame = words(cpu, cpu.gpr[4], size, 2)
    assert frame == (0x20 << 3 | 2, CODE_BASE)


def test_64_bit_delivery_aligns_and_always_pushes_ss_rsp():
    cpu = run(start("long", "0f0b", rsp=STACK_TOP - 3))
    assert stub(cpu) == UD
    assert cpu.gpr[4] == STACK_TOP - 0x10 - 40
    assert words(cpu, cpu.gpr[4], 8, 5) == (CODE_BASE, SEL_CS, 0x10002, STACK_TOP - 3, SEL_SS)
    assert cpu.seg[SS].selector == SEL_SS


def test_64_bit_delivery_to_an_inner_level_makes_ss_null():
    cpu = run(start("long-user", "0f0b"))
    assert (cpu.seg[SS].selector, cpu.seg[SS].unusable, cpu.cpl) == (0, 1, 0)
    assert words(cpu, KERNEL_STACK_TOP - 40, 8, 5)[3:] == (STACK_TOP, SEL_USS | 3)


def test_ist_switches_the_stack_without_a_change_of_level():
    gate = struct.pack("<HHBBHII", STUBS + 16 * UD, SEL_CODE64, 2, 0x8E, 0, 0, 0)
    blobs = (Blob(IDT + 16 * UD, gate), Blob(TSS + 0x24 + 8, struct.pack("<Q", 0x1E804)))
    cpu = run(start("long", "0f0b", blobs=blobs))
    assert cpu.gpr[4] == 0x1E800 - 40
    assert cpu.seg[SS].selector == SEL_SS


@pytest.mark.parametrize(
    ("gate", "vector", "error"),
    [
        ((0, SEL_CS, 0, 0x0E, 0), NP, 0x80 << 3 | 2), ((0, SEL_CS, 0, 0x89, 0), GP, 0x80 << 3 | 2),
        ((0, 0, 0, 0x8E, 0), GP, 0), ((0, 0xFF8, 0, 0x8E, 0), GP, 0xFF8), ((0, SEL_DS, 0, 0x8E, 0), GP, SEL_DS),
    ],
)  # fmt: skip
def test_bad_gates_fault_with_the_entry_or_the_selector(gate, vector, error):
    cpu = run(start("prot32", "cd80", blobs=(Blob(IDT + 8 * 0x80, struct.pack("<HHBBH", *gate)),)))
    assert stub(cpu) == vector
    assert words(cpu, cpu.gpr[4] + 0x18000, 4, 1) == (error,)


def test_ext_is_set_when_an_exception_cannot_be_delivered():
    cpu = run(start("prot32", "0f0b", blobs=(Blob(IDT + 8 * UD, bytes(8)),)))
    assert stub(cpu) == GP
    assert words(cpu, cpu.gpr[4] + 0x18000, 4, 1) == (UD << 3 | 3,)


def test_a_short_tss_is_ts_with_tr():
    cpu = start("prot32-user", "0f0b", tr__limit=7)
    with pytest.raises(events.TripleFault):
        run(cpu)
    assert faults(events.tss_stack, cpu, 0, 1) == (TS, SEL_TSS | 1)


def test_contributory_and_page_faults_make_a_double_fault():
    gp = Fault(GP, 0)
    pf = Fault(PAGE_FAULT, 0, 0)
    assert events.escalate(GP, gp) == (8, 0)
    assert events.escalate(PAGE_FAULT, gp) == (8, 0)
    assert events.escalate(PAGE_FAULT, pf) == (8, 0)
    assert events.escalate(GP, pf) == (PAGE_FAULT, 0)
    assert events.escalate(UD, gp) == (GP, 0)
    cpu = run(start("prot32", "a1ffffffff", blobs=(Blob(IDT + 8 * GP, bytes(8)),)))
    assert stub(cpu) == 8
    assert words(cpu, cpu.gpr[4] + 0x18000, 4, 2) == (0, CODE_BASE)
    with pytest.raises(events.TripleFault):
        run(start("prot32", "a1ffffffff", idtr__limit=0))


def test_a_page_fault_sets_cr2():
    cpu = run(start("long", "a1" + struct.pack("<Q", ABSENT_PAGE + 4).hex()))
    assert (stub(cpu), cpu.cr2) == (PAGE_FAULT, ABSENT_PAGE + 4)


# --- INT, IRET ------------------------------------------------------------------------------------------------------


def test_iret_in_real_mode():
    stack = struct.pack("<HHH", CODE_BASE + 0x10, 0, 0x0AD7)
    cpu = start("real", "cf", blobs=(Blob(STACK_TOP, stack), Blob(CODE_BASE + 0x10, b"\xf4")))
    run(cpu)
    assert (cpu.rip, cpu.rflags, cpu.gpr[4]) == (CODE_BASE + 0x11, 0xAD7, 0x2006)


def test_iret_to_an_outer_level_loads_the_stack_and_drops_inner_segments():
    stack = struct.pack("<5I", CODE_BASE + 0x10, SEL_UCS | 3, 0x3202, 0x1000, SEL_USS | 3)
    cpu = start("prot32", "cf", blobs=(Blob(STACK_TOP, stack),))
    execute.step(cpu)
    assert (cpu.cpl, cpu.rip, cpu.gpr[4], cpu.rflags) == (3, CODE_BASE + 0x10, 0x1000, 0x3202)
    assert cpu.seg[DS].unusable
    assert cpu.seg[SS].selector == SEL_USS | 3


def test_iret_at_cpl_3_cannot_change_iopl_or_if():
    stack = struct.pack("<3I", CODE_BASE + 0x10, SEL_UCS | 3, 0x3ED7)
    cpu = start("prot32-user", "cf", blobs=(Blob(STACK_TOP, stack),))
    execute.step(cpu)
    assert cpu.rflags == 0xCD7


def test_iret_to_vm86():
    stack = struct.pack("<9I", 0x20, 0xA00, 0x23202, 0x300, 0x1800, 0x1100, 0x1000, 0x1200, 0x1300)
    cpu = start("prot32", "cf", blobs=(Blob(STACK_TOP, stack), Blob(0xA020, b"\xf4")))
    execute.step(cpu)
    assert (cpu.vm86, cpu.cpl, cpu.linear_rip(), cpu.gpr[4]) == (True, 3, 0xA020, 0x300)
    assert cpu.seg[GS] == Segment(0x1300, 0x13000, 0xFFFF, 3, 1, 3)


def test_iretq_pops_the_stack_at_the_same_level_too():
    stack = struct.pack("<5Q", CODE_BASE + 0x10, SEL_CS, 0x202, 0x19000, SEL_SS)
    cpu = start("long", "48cf", blobs=(Blob(STACK_TOP, stack),))
    execute.step(cpu)
    assert (cpu.rip, cpu.gpr[4], cpu.rflags) == (CODE_BASE + 0x10, 0x19000, 0x202)


def test_iret_with_nt_is_gp_in_ia_32e_mode_and_a_task_return_elsewhere():
    assert stub(run(start("long", "48cf", rflags=0x4002))) == GP
    with pytest.raises(ModelError):
        execute.step(start("prot32", "cf", rflags=0x4002))


def test_iret_unmasks_nmis():
    stack = struct.pack("<3I", CODE_BASE, SEL_CS, 2)
    cpu = start("prot32", "cf", blobs=(Blob(STACK_TOP, stack),), events__nmi_masked=1)
    execute.step(cpu)
    assert cpu.nmi_masked == 0


# --- far transfers --------------------------------------------------------------------------------------------------


def far32(selector: int, offset: int) -> str:
    return struct.pack("<IH", offset, selector).hex()


def test_far_call_and_return_in_protected_mode():
    cpu = start("prot32", "9a" + far32(SEL_CS, CODE_BASE + 0x20), blobs=(Blob(CODE_BASE + 0x20, b"\xcb"),))
    execute.step(cpu)
    assert words(cpu, STACK_TOP - 8, 4, 2) == (CODE_BASE + 7, SEL_CS)
    execute.step(cpu)
    assert (cpu.rip, cpu.gpr[4]) == (CODE_BASE + 7, 0x2000)


def test_a_conforming_segment_keeps_the_cpl():
    cpu = start("prot32-user", "ea" + far32(SEL_CONFORMING | 3, CODE_BASE + 0x20))
    execute.step(cpu)
    assert (cpu.cpl, cpu.seg[CS].selector, cpu.seg[CS].dpl) == (3, SEL_CONFORMING | 3, 0)


@pytest.mark.parametrize(("selector", "error"), [(0, 0), (SEL_CS, SEL_CS), (SEL_UDS | 3, SEL_UDS), (0xFFF8, 0xFFF8)])
def test_far_jumps_that_are_not_allowed(selector, error):
    cpu = run(start("prot32-user", "ea" + far32(selector, CODE_BASE)))
    assert stub(cpu) == GP
    assert words(cpu, KERNEL_STACK_TOP - 24, 4, 1) == (error,)


def call_gate(count: int, kind: int = 0xC, dpl: int = 3) -> bytes:
    return struct.pack("<HHBBH", CODE_BASE + 0x20, SEL_CS, count, 0x80 | dpl << 5 | kind, 0)


def test_a_call_gate_to_an_inner_level_copies_parameters():
    blobs = (Blob(GDT + 0x200, call_gate(2)), Blob(STACK_TOP, struct.pack("<2I", 0x1111, 0x2222)))
    cpu = start("prot32-user", "9a" + far32(0x203, 0xDEAD), blobs=blobs)
    execute.step(cpu)
    assert (cpu.cpl, cpu.rip, cpu.seg[SS].selector) == (0, CODE_BASE + 0x20, SEL_KDATA)
    frame = words(cpu, KERNEL_STACK_TOP - 24, 4, 6)
    assert frame == (CODE_BASE + 7, SEL_UCS | 3, 0x1111, 0x2222, 0x2000, SEL_USS | 3)


def test_a_far_return_to_an_outer_level_drops_parameters_on_both_stacks():
    blobs = (Blob(GDT + 0x200, call_gate(2)), Blob(CODE_BASE + 0x20, b"\xca\x08\x00"))
    cpu = start("prot32-user", "9a" + far32(0x203, 0), blobs=blobs)
    execute.step(cpu)
    execute.step(cpu)
    assert (cpu.cpl, cpu.rip, cpu.gpr[4]) == (3, CODE_BASE + 7, 0x2008)


def test_a_16_bit_call_gate_at_the_same_level():
    cpu = start("prot32", "9a" + far32(0x200, 0), blobs=(Blob(GDT + 0x200, call_gate(0, 4)),))
    execute.step(cpu)
    assert words(cpu, STACK_TOP - 4, 2, 2) == (CODE_BASE + 7, SEL_CS)


def test_a_64_bit_call_gate_uses_rsp0_and_a_null_stack_segment():
    gate = struct.pack("<HHBBHII", CODE_BASE + 0x20, SEL_CODE64, 0, 0xEC, 0, 0, 0)
    pointer = Blob(DATA_BASE, struct.pack("<IH", 0, 0x203))
    cpu = start("long-user", "ff1c25" + struct.pack("<I", DATA_BASE).hex(), blobs=(Blob(GDT + 0x200, gate), pointer))
    execute.step(cpu)
    assert (cpu.cpl, cpu.rip, cpu.seg[SS].selector) == (0, CODE_BASE + 0x20, 0)
    frame = words(cpu, KERNEL_STACK_TOP - 32, 8, 4)
    assert frame == (CODE_BASE + 7, SEL_UCS | 3, STACK_TOP, SEL_USS | 3)


def test_a_far_jump_in_real_mode_sets_base_and_checks_the_limit():
    cpu = start("real", "ea30000010")
    execute.step(cpu)
    assert (cpu.rip, cpu.seg[CS].selector, cpu.seg[CS].base) == (0x30, 0x1000, 0x10000)
    assert stub(run(start("real", "66ea0000010000a0"))) == GP


# --- segment registers and tables -----------------------------------------------------------------------------------


def load_ds(selector: int, mode: str = "prot32", **more: int) -> Cpu:
    return start(mode, "66b8" + struct.pack("<H", selector).hex() + "8ed8f4", **more)


def test_loading_sets_the_accessed_bit_in_memory():
    raw = bytearray(encode_segment(Segment(base=DATA_BASE, limit=0xFFF, type=2)))
    cpu = start("prot32", "66b800028ed8f4", blobs=(Blob(GDT + 0x200, bytes(raw)),))
    run(cpu)
    assert cpu.seg[DS] == Segment(0x200, DATA_BASE, 0xFFF, 3)
    assert words(cpu, GDT + 0x205, 1, 1)[0] & 1


@pytest.mark.parametrize(
    ("mode", "selector", "vector"),
    [("prot32", 0xB8, NP), ("prot32", SEL_TSS, GP), ("prot32-user", SEL_DS | 3, GP), ("prot32-user", SEL_UDS | 3, None),
     ("prot32", SEL_CS, None), ("prot32", SEL_READONLY, None), ("prot32", SEL_EXPAND, None), ("prot32", 4, None)],
)  # fmt: skip
def test_loading_a_data_segment(mode, selector, vector):
    cpu = load_ds(selector, mode)
    if vector is None:
        execute.step(cpu)
        execute.step(cpu)
        assert cpu.seg[DS].selector == selector
    else:
        assert stub(run(cpu)) == vector


def test_a_null_selector_clears_the_base_on_intel_and_not_on_old_amd():
    code = "31c08ee0f4"
    intel = run(start("long", code))
    assert (intel.seg[FS].unusable, intel.seg[FS].base) == (1, 0)
    amd = run(start("long", code, cpu=profile(AMD)))
    assert (amd.seg[FS].unusable, amd.seg[FS].base) == (1, 0x12000)
    clears = CpuProfile((*profile(AMD).cpuid, CpuidEntry(0x80000021, 0, 0, 1 << 6)))
    assert run(start("long", code, cpu=clears)).seg[FS].base == 0


def test_mov_ss_checks_rpl_and_holds_off_events():
    cpu = start("prot32", "66b830008ed0f4")
    execute.step(cpu)
    execute.step(cpu)
    assert cpu.shadow
    assert stub(run(start("prot32", "66b831008ed0"))) == GP
    assert stub(run(start("prot32", "66b800008ed0"))) == GP
    assert run(start("long", "66b800008ed0f4")).seg[SS].unusable
    assert stub(run(start("prot32", "8ec8"))) == UD


def test_lgdt_and_sgdt():
    table = Blob(DATA_BASE, struct.pack("<HI", 0x1234, 0x89ABCDEF))
    cpu = start("prot32", "0f011500000000" + "0f010510000000" + "f4", blobs=(table,))
    run(cpu)
    assert cpu.gdtr == Table(0x89ABCDEF, 0x1234)
    assert cpu.mem.read_bytes(DS, 0x10, 6) == table.data
    cpu = start("prot32", "660f011500000000f4", blobs=(table,))
    assert run(cpu).gdtr.base == 0xABCDEF
    assert stub(run(start("prot32-user", "0f011500000000"))) == GP


def test_umip_keeps_the_tables_from_the_user():
    code = "0f01042500000100f4"
    start_ = start("long-user", code)
    execute.step(start_)
    assert start_.rip == CODE_BASE + 8
    assert stub(run(start("long-user", code, cr4=0x20 | 1 << 11))) == GP


def test_lldt_and_ltr():
    cpu = start("prot32", "66b850000f00d0f4")
    run(cpu)
    assert (cpu.ldtr.selector, cpu.ldtr.base, cpu.ldtr.type) == (SEL_LDT, LDT, 2)
    busy = encode_segment(Segment(base=TSS, limit=0x67, type=9, s=0))
    cpu = run(start("prot32", "66b800020f00d8f4", blobs=(Blob(GDT + 0x200, busy),)))
    assert (cpu.tr.selector, cpu.tr.type) == (0x200, 0xB)
    assert words(cpu, GDT + 0x205, 1, 1) == (0x8B,)
    assert stub(run(start("prot32", "66b840000f00d8"))) == GP  # already busy
    assert run(start("prot32", "31c00f00d0f4")).ldtr.unusable
    assert stub(run(start("real", "0f00d0"))) == UD


def test_lar_lsl_verr_verw():
    def after(op: str, selector: int) -> Cpu:
        cpu = start("prot32", "b8" + struct.pack("<I", selector).hex() + op)
        execute.step(cpu)
        execute.step(cpu)
        return cpu

    assert after("0f02c8", 0x90).gpr[1] == 0xCFF300
    assert after("0f03c8", 0x90).gpr[1] == 0xFFFFFFFF
    assert after("0f02c8", 0x90).rflags & 0x40
    assert not after("0f02c8", 0).rflags & 0x40
    assert after("0f00e0", SEL_READONLY).rflags & 0x40
    assert not after("0f00e8", SEL_READONLY).rflags & 0x40


def test_arpl_raises_the_rpl():
    cpu = start("prot32", "63c8", rax=0x10, rcx=3)
    execute.step(cpu)
    assert (cpu.gpr[0], cpu.rflags & 0x40) == (0x13, 0x40)


def test_push_of_a_segment_register_leaves_half_a_slot_undefined_on_intel_only():
    for vendor, ignored in ((INTEL, 2), (AMD, 0)):
        cpu = start("prot32", "1e", cpu=profile(vendor))
        execute.step(cpu)
        assert len(cpu.mem.pages_ignore) == ignored


# --- control registers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "value"),
    [("prot32", 0x80000010), ("prot32", 0x20000011), ("long", 0x100000033), ("long", 0x33)],
)
def test_cr0_values_that_are_gp(mode, value):
    cpu = start(mode, "0f22c0", rax=value)
    assert stub(run(cpu)) == GP


def test_leaving_and_entering_ia_32e_mode():
    cpu = start("prot32", "0f22c0f4", rax=0x80000011, cr3=0x5000, cr4=0x20, efer=0x100, blobs=(*setup(
        "compat", entry=CODE_BASE).blobs,))  # fmt: skip
    execute.step(cpu)
    assert cpu.efer == 0x500
    assert stub(run(start("prot32", "0f22c0", rax=0x80000011, cr4=0, efer=0x100))) == GP
    cpu = start("compat", "0f22c0", rax=0x11)
    execute.step(cpu)
    assert (cpu.efer & 0x400, cpu.paging) == (0, False)


def test_pae_loads_the_pdptes_and_checks_reserved_bits():
    cpu = start("pae", "0f22d8", rax=0x10020, blobs=(Blob(0x10020, struct.pack("<4Q", 0x6001, 0, 0x7001, 0)),))
    execute.step(cpu)
    assert cpu.pdptr == [0x6001, 0, 0x7001, 0]
    cpu = start("pae", "0f22d8", rax=0x10020, blobs=(Blob(0x10020, struct.pack("<4Q", 0x6003, 0, 0, 0)),))
    assert stub(run(cpu)) == GP


@pytest.mark.parametrize("value", [0, 0x20 | 1 << 12, 0x20 | 1 << 17 | 1 << 15, 0x20 | 1 << 13, 0x20 | 1 << 33])
def test_cr4_values_that_are_gp_in_64_bit_mode(value):
    assert stub(run(start("long", "0f22e0", rax=value))) == GP


def test_pcide_needs_a_clear_pcid_to_be_set():
    assert stub(run(start("long", "0f22e0", rax=0x20020, cr3=0x5018))) == GP
    cpu = start("long", "0f22e0", rax=0x20020)
    execute.step(cpu)
    assert cpu.cr4 == 0x20020


def test_cr3_has_no_bits_past_the_physical_width():
    assert stub(run(start("long", "0f22d8", rax=1 << 40 | 0x5000))) == GP


def test_lmsw_sets_pe_but_cannot_clear_it():
    cpu = start("prot32", "0f01f0", rax=0xE)
    execute.step(cpu)
    assert cpu.cr0 & 0xF == 0xF
    assert start("real").pe is False
    cpu = start("real", "0f01f0", rax=1)
    execute.step(cpu)
    assert cpu.pe


def test_control_registers_are_privileged_and_some_do_not_exist():
    assert stub(run(start("long-user", "0f20c0"))) == GP
    assert stub(run(start("long", "0f20c8"))) == UD
    assert stub(run(start("long", "440f22c0", rax=16))) == GP


def test_debug_registers():
    cpu = start("long", "0f23f8", rax=0xFFFFFFFF)
    execute.step(cpu)
    assert cpu.dr7 & 0xF400 == 0x2400
    cpu = start("long", "0f23e0", rax=0)  # DR4 is DR6
    execute.step(cpu)
    assert cpu.dr6 == 0xFFFF0FF0
    assert stub(run(start("long", "0f23e0", cr4=0x28))) == UD
    assert stub(run(start("long", "0f23f0", rax=1 << 32))) == GP
    cpu = run(start("long", "0f21c0", dr7=0x2400))
    assert (stub(cpu), cpu.dr6, cpu.dr7) == (1, 0xFFFF2FF0, 0x400)
    assert words(cpu, STACK_TOP - 40, 8, 3) == (CODE_BASE, SEL_CS, 0x10002)


def test_xsetbv():
    def outcome(value: int, **more: int) -> Cpu:
        return run(start("long", "0f01d1f4", rax=value, cr4=0x20 | 1 << 18, **more))

    assert outcome(7).xcr0 == 7
    assert stub(outcome(6)) == GP
    assert stub(outcome(5)) == GP
    assert stub(outcome(3, rcx=1)) == GP
    assert stub(run(start("long", "0f01d1", cr4=0x20))) == UD


# --- CPUID, MSRs, system calls --------------------------------------------------------------------------------------


def test_cpuid_follows_the_registers():
    cpu = start("long", cr4=0x20 | 1 << 18 | 1 << 22, xcr0=7)
    assert cpuid_leaf(cpu, 1, 0)[2] >> 27 & 1
    assert cpuid_leaf(cpu, 7, 0)[2] >> 4 & 1
    assert cpuid_leaf(cpu, 0xD, 0)[1] == 832
    cpu.xcr0 = 3
    assert cpuid_leaf(cpu, 0xD, 0)[1] == 576


def test_cpuid_past_the_last_leaf():
    assert cpuid_leaf(start("long", xcr0=7), 0x1000, 0)[1] == 832
    assert cpuid_leaf(start("long", cpu=profile(AMD)), 0x1000, 0) == (0, 0, 0, 0)


def wrmsr(index: int, value: int, **more) -> Cpu:
    state = {"rcx": index, "rax": value & 0xFFFFFFFF, "rdx": value >> 32}
    return run(start(more.pop("mode", "long"), "0f30f4", **state, **more))


def test_wrmsr_rules():
    assert stub(wrmsr(0xC0000082, 1 << 47)) == GP
    assert wrmsr(0xC0000100, 0xFFFF800000000000).seg[FS].base == 0xFFFF800000000000
    assert stub(wrmsr(0x277, 2)) == GP
    assert stub(wrmsr(0xC0000080, 0x401)) == GP  # LME cannot change under paging
    assert stub(wrmsr(0xC0000080, 0xD01 | 1 << 12)) == GP
    assert wrmsr(0xC0000080, 0x900).efer == 0xD00  # Intel ignores LMA
    assert stub(wrmsr(0xC0000080, 0x900, cpu=profile(AMD))) == GP
    assert stub(wrmsr(0xFFFFFFFF, 0)) == GP
    assert stub(wrmsr(0xC0000103, 1, cpu=profile(without=("rdtscp", "rdpid")))) == GP
    assert stub(wrmsr(0xC0000082, 0, mode="long-user")) == GP
    with pytest.raises(ModelError):
        wrmsr(0x3A, 0)


STAR = 0x00180008 << 32 | 0x1000


def star(**more):
    return {"msr__star": STAR, "msr__lstar": CODE_BASE + 0x40, "msr__syscall_mask": 0x700, "efer": 0xD01, **more}


def test_syscall_and_sysret():
    cpu = start("long-user", "0f05", rflags=0x702, **star())
    execute.step(cpu)
    assert (cpu.rip, cpu.gpr[1], cpu.gpr[11], cpu.rflags) == (CODE_BASE + 0x40, CODE_BASE + 2, 0x702, 2)
    assert cpu.seg[CS] == Segment(8, 0, 0xFFFFFFFF, 0xB, 1, 0, 1, 0, 1, 0, 1)
    assert (cpu.seg[SS].selector, cpu.cpl) == (0x10, 0)
    cpu = start("long", "480f07", rcx=CODE_BASE + 9, r11=0x3FFFFF, **star())
    execute.step(cpu)
    assert (cpu.rip, cpu.rflags, cpu.seg[CS].selector, cpu.seg[SS].selector) == (CODE_BASE + 9, 0x3C7FD7, 0x2B, 0x23)
    cpu = run(start("long", "480f07", rcx=1 << 47, **star()))
    assert stub(cpu) == GP
    assert words(cpu, STACK_TOP - 40, 8, 2) == (CODE_BASE, SEL_CS)
    cpu = run(start("long", "480f07", rcx=1 << 47, cpu=profile(AMD), **star()))  # AMD: #GP at the target, CPL 3
    assert words(cpu, KERNEL_STACK_TOP - 40, 8, 2) == (1 << 47, 0x2B)
    assert stub(run(start("long-user", "0f05", **star(efer=0xD00)))) == UD
    assert stub(run(start("compat-user", "0f05", **star()))) == UD


def test_amd_has_syscall_in_compatibility_mode():
    cpu = start("compat-user", "0f05", cpu=profile(AMD), msr__cstar=CODE_BASE + 0x80, **star())
    execute.step(cpu)
    assert (cpu.rip, cpu.bits) == (CODE_BASE + 0x80, 64)


def sysenter_msrs(**more):
    return {"msr__sysenter_cs": 0x100, "msr__sysenter_esp": 0x19000, "msr__sysenter_eip": CODE_BASE + 0x40, **more}


def test_sysenter_and_sysexit():
    cpu = start("long-user", "0f34", rflags=0x202, **sysenter_msrs())
    execute.step(cpu)
    assert (cpu.rip, cpu.gpr[4], cpu.rflags, cpu.cpl) == (CODE_BASE + 0x40, 0x19000, 2, 0)
    assert (cpu.seg[CS].selector, cpu.seg[CS].l, cpu.seg[SS].selector) == (0x100, 1, 0x108)
    cpu = start("long", "0f35", rcx=0x1000, rdx=CODE_BASE + 5, **sysenter_msrs())
    execute.step(cpu)
    assert (cpu.rip, cpu.gpr[4], cpu.seg[CS].selector, cpu.bits) == (CODE_BASE + 5, 0x1000, 0x113, 32)
    assert stub(run(start("long-user", "0f34", cpu=profile(AMD), **sysenter_msrs()))) == UD
    assert stub(run(start("prot32", "0f34", msr__sysenter_cs=0))) == GP


def test_swapgs_and_fsgsbase():
    cpu = start("long", "0f01f8", gs__base=0x111, msr__kernel_gs_base=0x222)
    execute.step(cpu)
    assert (cpu.seg[GS].base, cpu.msrs[0xC0000102]) == (0x222, 0x111)
    assert stub(run(start("long-user", "0f01f8"))) == GP
    assert stub(run(start("long", "f3480faed0"))) == UD
    cpu = start("long", "f3480faed0", rax=0x1234, cr4=0x20 | 1 << 16)
    execute.step(cpu)
    assert cpu.seg[FS].base == 0x1234
    assert stub(run(start("long", "f3480faed0", rax=1 << 60, cr4=0x20 | 1 << 16))) == GP


# --- ports and flags ------------------------------------------------------------------------------------------------


def test_in_and_out():
    cpu = start("long", "e510e642f4", rax=0xFFFFFFFFFFFFFFFF)
    run(cpu)
    data = cpu.case.read_data(0, 4)
    assert cpu.gpr[0] == int.from_bytes(data, "little")
    assert cpu.pending_exits == [Io(0x10, 4, False), Io(0x42, 1, True, data[:1]), Halt()]


def test_io_permission_bit_map():
    bitmap = (Blob(TSS + 0x66, struct.pack("<H", 0x68)), Blob(TSS + 0x68, b"\xfe" + b"\xff" * 0x20))
    allowed = start("prot32-user", "e400", tr__limit=0x88, blobs=bitmap)
    execute.step(allowed)
    assert allowed.pending_exits == [Io(0, 1, False)]
    assert stub(run(start("prot32-user", "e500", tr__limit=0x88, blobs=bitmap))) == GP
    assert stub(run(start("prot32-user", "e400", tr__limit=0x68, blobs=bitmap))) == GP  # two bytes are read
    assert stub(run(start("prot32-user", "e400"))) == GP
    iopl = start("prot32-user", "e400", rflags=0x3002)
    execute.step(iopl)
    assert iopl.pending_exits
    assert stub(run(start("vm86", "e400"))) == GP  # IOPL 3 does not help there


def test_sti_shadow_cli_and_iopl():
    cpu = start("long", "fbfb")
    execute.step(cpu)
    assert cpu.shadow
    assert cpu.rflags & 0x200
    execute.step(cpu)
    assert not cpu.shadow
    assert stub(run(start("prot32-user", "fa"))) == GP
    cpu = start("prot32-user", "fb", cr4=2)
    execute.step(cpu)
    assert cpu.rflags >> 19 & 1
    assert stub(run(start("prot32-user", "fb", cr4=2, rflags=0x100002))) == GP


def test_hlt_is_privileged():
    assert stub(run(start("long-user", "f4"))) == GP


# --- strings --------------------------------------------------------------------------------------------------------


def test_rep_movs_copies_up_and_down():
    text = Blob(DATA_BASE, b"0123456789ABCDEF")
    cpu = run(start("long", "f3a4f4", rcx=5, rsi=DATA_BASE, rdi=DATA_BASE + 0x100, blobs=(text,)))
    assert cpu.mem.read_bytes(DS, DATA_BASE + 0x100, 6) == b"01234\0"
    assert (cpu.gpr[1], cpu.gpr[6], cpu.gpr[7]) == (0, DATA_BASE + 5, DATA_BASE + 0x105)
    cpu = run(start("long", "f3a5f4", rcx=2, rsi=DATA_BASE + 4, rdi=DATA_BASE + 0x104, rflags=0x402, blobs=(text,)))
    assert cpu.mem.read_bytes(DS, DATA_BASE + 0x100, 8) == b"01234567"
    assert cpu.gpr[6] == DATA_BASE - 4


def test_a_fault_in_the_middle_keeps_the_iterations_done():
    cpu = run(start("long", "f3abf4", rcx=5, rdi=ABSENT_PAGE - 8, rax=0x55555555))
    assert (stub(cpu), cpu.cr2) == (PAGE_FAULT, ABSENT_PAGE)
    assert (cpu.gpr[1], cpu.gpr[7]) == (3, ABSENT_PAGE)
    assert words(cpu, STACK_TOP - 48, 8, 2) == (2, CODE_BASE)


def test_repe_and_repne_stop_on_zf():
    text = (Blob(DATA_BASE, b"aaab"), Blob(DATA_BASE + 0x100, b"aaxb"))
    cpu = run(start("long", "f3a6f4", rcx=4, rsi=DATA_BASE, rdi=DATA_BASE + 0x100, blobs=text))
    assert (cpu.gpr[1], cpu.gpr[6], cpu.rflags & 0x40) == (1, DATA_BASE + 3, 0)
    cpu = run(start("long", "f2aef4", rcx=9, rax=ord("b"), rdi=DATA_BASE, blobs=text))
    assert (cpu.gpr[1], cpu.gpr[7], cpu.rflags & 0x40) == (5, DATA_BASE + 4, 0x40)


def test_a_32_bit_address_size_in_64_bit_mode_zero_extends_and_16_bits_wrap():
    high = 0xABCD00000000
    cpu = run(start("long", "67f3aaf4", rcx=high | 2, rdi=high | DATA_BASE))
    assert (cpu.gpr[1], cpu.gpr[7]) == (0, DATA_BASE + 2)
    cpu = run(start("real", "f3aaf4", rcx=0x50002, rdi=0xFFFF))
    assert (cpu.gpr[1], cpu.gpr[7]) == (0x50000, 1)
    cpu = run(start("long", "67f3aaf4", rcx=high, rdi=high | DATA_BASE))  # no iteration: no write
    assert (cpu.gpr[1], cpu.gpr[7]) == (high, high | DATA_BASE)


def test_rep_outs_one_exit_an_item_and_a_segment_override():
    cpu = start("prot32", "f3646e" + "f4", rcx=2, rdx=0x80, fs__base=DATA_BASE, blobs=(Blob(DATA_BASE, b"hi"),))
    execute.step(cpu)
    assert (cpu.pending_exits, cpu.rip, cpu.gpr[1]) == ([Io(0x80, 1, True, b"h")], CODE_BASE, 1)
    execute.step(cpu)
    assert (cpu.pending_exits[1:], cpu.rip) == ([Io(0x80, 1, True, b"i")], CODE_BASE + 3)


def test_rep_ins_without_permission_faults_even_with_no_count():
    assert stub(run(start("prot32-user", "f36c", rcx=0, rdx=0x80))) == GP


def test_a_data_breakpoint_traps_after_the_access():
    cpu = run(start("long", "891c25000001009090f4", dr0=DATA_BASE + 2, dr7=0x1 | 1 << 16 | 0x400))
    assert (stub(cpu), cpu.dr6) == (1, 0xFFFF0FF1)
    assert words(cpu, STACK_TOP - 40, 8, 1) == (CODE_BASE + 7,)


def test_the_start_state_is_whole():
    cpu = start("long")
    assert replace(cpu.state(), rip=0) == replace(cpu.case.start, rip=0)
