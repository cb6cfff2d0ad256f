"""The reference model's system instructions against the manuals: segments, control registers, MSRs, ports, strings."""

from __future__ import annotations

import struct
from dataclasses import replace

import pytest
from reference_cpu import AMD, INTEL, profile, run, start, stub, words

from harness.case import Blob
from harness.cpuid import CpuidEntry, CpuProfile
from harness.exits import Halt, Io
from harness.modes import (
    ABSENT_PAGE,
    CODE_BASE,
    DATA_BASE,
    GDT,
    KERNEL_STACK_TOP,
    LDT,
    SEL_CS,
    SEL_DS,
    SEL_EXPAND,
    SEL_LDT,
    SEL_READONLY,
    SEL_TSS,
    SEL_UDS,
    STACK_TOP,
    TSS,
    encode_segment,
    setup,
)
from harness.reference import execute
from harness.reference.cpu import (
    CS,
    DS,
    FS,
    GP,
    GS,
    NP,
    PAGE_FAULT,
    SS,
    UD,
    Cpu,
    ModelError,
)
from harness.reference.msr import cpuid_leaf
from harness.state import Segment, Table

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
    assert stub(wrmsr(0xC0000082, 1 << 47, cpu=profile(without=("la57",)))) == GP
    assert stub(wrmsr(0xC0000082, 1 << 56)) == GP  # with LA57 in CPUID 57 bits count, whatever CR4.LA57 says
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
