"""The reference model's events against the manuals: exceptions, interrupts, IRET, far transfers, by built frames."""

from __future__ import annotations

import struct

import pytest
from reference_cpu import faults, run, start, stub, words

from harness.case import Blob
from harness.modes import (
    ABSENT_PAGE,
    CODE_BASE,
    DATA_BASE,
    GDT,
    IDT,
    KERNEL_STACK_TOP,
    SEL_CODE64,
    SEL_CONFORMING,
    SEL_CS,
    SEL_DS,
    SEL_KDATA,
    SEL_SS,
    SEL_TSS,
    SEL_UCS,
    SEL_UDS,
    SEL_USS,
    STACK_TOP,
    STUBS,
    TSS,
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
    TS,
    UD,
    VM,
    Fault,
    ModelError,
)
from harness.state import Segment

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
