"""Far JMP, CALL and RET: real mode, code segments, call gates (SDM vol. 2A JMP, CALL, vol. 2B RET; vol. 3A 5.8)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from harness.modes import decode_segment
from harness.reference import descriptors as desc
from harness.reference.cpu import CS, GP, MASK, NP, RSP, SS, TS, Cpu, Fault, ModelError
from harness.reference.events import Frame, null_stack, tss64_pointer, tss_stack
from harness.reference.insn import Insn, Operation, Row
from harness.reference.iret import Stack, check_target, checked_return, load_sp
from harness.state import Segment

_CR4_CET: Final = 1 << 23
_Target = Callable[[Cpu], tuple[int, int]]


def far_size(insn: Insn) -> int:
    """Operand size of a far pointer in memory: AMD ignores REX.W (APM vol. 3 CALL (Far), JMP (Far), LFS)."""
    return 32 if insn.opsize == 64 and insn.amd else insn.opsize


def far_pointer(insn: Insn) -> _Target:
    """A function that gives (selector, offset) of the far pointer operand."""
    if insn.operands[0][0] == "A":
        pair = insn.imm2, insn.imm & MASK[insn.opsize]
        return lambda cpu: pair
    ea, seg, n = insn.address(), insn.seg, far_size(insn) >> 3

    def target(cpu: Cpu) -> tuple[int, int]:
        raw = cpu.mem.read_bytes(seg, ea(cpu), n + 2)
        return int.from_bytes(raw[n:], "little"), int.from_bytes(raw[:n], "little")

    return target


def jmp_far(insn: Insn) -> Operation:
    """JMP ptr16:16/32, m16:16/32/64."""
    target, size = far_pointer(insn), far_size(insn)

    def op(cpu: Cpu) -> None:
        _no_cet(cpu)
        selector, offset = target(cpu)
        if not cpu.pe or cpu.vm86:
            _real_target(cpu, selector, offset)
        else:
            _jmp_protected(cpu, selector, offset & MASK[size])
        cpu.mode_changed()

    return op


def call_far(insn: Insn) -> Operation:
    """CALL ptr16:16/32, m16:16/32/64."""
    target, size = far_pointer(insn), far_size(insn)

    def op(cpu: Cpu) -> None:
        _no_cet(cpu)
        selector, offset = target(cpu)
        if not cpu.pe or cpu.vm86:
            frame = _current(cpu)
            frame.push(cpu.seg[CS].selector, size >> 3)
            frame.push(cpu.rip, size >> 3)
            _real_target(cpu, selector, offset)
            cpu.set_sp(frame.sp)
        else:
            _call_protected(cpu, selector, offset & MASK[size], size >> 3)
        cpu.mode_changed()

    return op


def ret_far(insn: Insn) -> Operation:
    """RET far, with or without an immediate (SDM vol. 2B RET)."""
    size, extra = insn.opsize, insn.imm & 0xFFFF if insn.operands else 0

    def op(cpu: Cpu) -> None:
        _no_cet(cpu)
        stack = Stack(cpu, size)
        rip, selector = stack.pop(), stack.pop() & 0xFFFF
        if not cpu.pe or cpu.vm86:
            _real_target(cpu, selector, rip)
            cpu.set_sp(stack.pointer() + extra)
        else:
            _ret_protected(cpu, stack, selector, rip, extra)
        cpu.mode_changed()

    return op


def _no_cet(cpu: Cpu) -> None:
    if cpu.cr4 & _CR4_CET:
        raise ModelError("far transfers with CR4.CET are not modelled")


def _current(cpu: Cpu) -> Frame:
    return Frame(cpu, cpu.seg[SS], cpu.sp(), cpu.stack_bits)


def _real_target(cpu: Cpu, selector: int, offset: int) -> None:
    if offset > cpu.seg[CS].limit:
        raise Fault(GP, 0)
    cpu.seg[CS] = desc.real_segment(cpu, cpu.seg[CS], selector)
    cpu.rip = offset


def _descriptor(cpu: Cpu, selector: int) -> tuple[Segment, bytes]:
    if desc.null(selector):
        raise Fault(GP, 0)
    data = desc.read(cpu, selector)
    return decode_segment(selector, data), data


def _check_code(cpu: Cpu, selector: int, seg: Segment) -> None:
    """Rights of a direct far JMP or CALL to a code segment (SDM vol. 3A 5.8.1)."""
    error = desc.error_of(selector)
    if not seg.type & desc.CODE:
        raise Fault(GP, error)
    if not desc.code_mode_ok(cpu, seg):
        raise Fault(GP, error)
    if seg.type & desc.CONFORMING:
        if seg.dpl > cpu.cpl:
            raise Fault(GP, error)
    elif selector & 3 > cpu.cpl or seg.dpl != cpu.cpl:
        raise Fault(GP, error)
    if not seg.present:
        raise Fault(NP, error)


def _go(cpu: Cpu, selector: int, data: bytes, rip: int, cpl: int) -> None:
    desc.load_code(cpu, selector, data, cpl)
    cpu.rip = rip


def _jmp_protected(cpu: Cpu, selector: int, offset: int) -> None:
    seg, data = _descriptor(cpu, selector)
    if seg.s:
        _check_code(cpu, selector, seg)
        check_target(cpu, seg, offset)
        _go(cpu, selector, data, offset, cpu.cpl)
        return
    gate = _call_gate(cpu, selector, seg)
    code = gate.code
    error = desc.error_of(gate.selector)
    if code.dpl > cpu.cpl if code.type & desc.CONFORMING else code.dpl != cpu.cpl:
        raise Fault(GP, error)
    if not code.present:
        raise Fault(NP, error)
    check_target(cpu, code, gate.offset)
    _go(cpu, gate.selector, gate.data, gate.offset, cpu.cpl)


@dataclass(frozen=True, slots=True)
class _CallGate:
    """A call gate and the code segment that it leads to. ``size`` in bytes; ``count`` parameters."""

    size: int
    count: int
    selector: int
    offset: int
    code: Segment
    data: bytes


def _call_gate(cpu: Cpu, selector: int, seg: Segment) -> _CallGate:
    """Check a system descriptor that a far JMP or CALL names (SDM vol. 3A 5.8.3, 5.8.4)."""
    error = desc.error_of(selector)
    tasks = (desc.TSS16, desc.TSS32, desc.TASK_GATE)
    gates = (desc.CALL32,) if cpu.lma else (desc.CALL16, desc.CALL32, *tasks)
    if seg.type not in gates:
        raise Fault(GP, error)
    if seg.dpl < cpu.cpl or seg.dpl < selector & 3:
        raise Fault(GP, error)
    raw = desc.read_system(cpu, selector)
    if cpu.lma and raw[13] & 0x1F:
        raise Fault(GP, error)
    if not seg.present:
        raise Fault(NP, error)
    if seg.type in tasks:
        raise ModelError(f"far transfer to selector {selector:#x}: task switch")
    target = int.from_bytes(raw[2:4], "little")
    offset = int.from_bytes(raw[0:2], "little")
    if seg.type == desc.CALL32:
        offset |= int.from_bytes(raw[6:8], "little") << 16
    if cpu.lma:
        offset |= int.from_bytes(raw[8:12], "little") << 32
    code, data = _descriptor(cpu, target)
    if not code.s or not code.type & desc.CODE or code.dpl > cpu.cpl or (cpu.lma and (not code.l or code.db)):
        raise Fault(GP, desc.error_of(target))
    size = 8 if cpu.lma else 4 if seg.type == desc.CALL32 else 2
    return _CallGate(size, raw[4] & 0x1F, target, offset, code, data)


def _call_protected(cpu: Cpu, selector: int, offset: int, size: int) -> None:
    seg, data = _descriptor(cpu, selector)
    if seg.s:
        _check_code(cpu, selector, seg)
        frame = _current(cpu)
        frame.push(cpu.seg[CS].selector, size)
        frame.push(cpu.rip, size)
        check_target(cpu, seg, offset)
        _go(cpu, selector, data, offset, cpu.cpl)
        cpu.set_sp(frame.sp)
        return
    gate = _call_gate(cpu, selector, seg)
    if not gate.code.present:
        raise Fault(NP, desc.error_of(gate.selector))
    if gate.code.type & desc.CONFORMING or gate.code.dpl == cpu.cpl:
        frame = _current(cpu)
        frame.push(cpu.seg[CS].selector, gate.size)
        frame.push(cpu.rip, gate.size)
        check_target(cpu, gate.code, gate.offset)
        _go(cpu, gate.selector, gate.data, gate.offset, cpu.cpl)
        cpu.set_sp(frame.sp)
    elif cpu.lma:
        _call_inner64(cpu, gate)
    else:
        _call_inner(cpu, gate)


def _call_inner64(cpu: Cpu, gate: _CallGate) -> None:
    """A 64-bit call gate to an inner level: RSP from the TSS, SS null (SDM vol. 3A 5.8.5.1)."""
    level = gate.code.dpl
    sp = tss64_pointer(cpu, 4 + 8 * level, 0)
    if not cpu.canonical(sp):
        raise Fault(TS, desc.error_of(cpu.tr.selector))
    frame = Frame(cpu, cpu.seg[SS], sp, 64, level, level)
    for value in (cpu.seg[SS].selector, cpu.gpr[RSP], cpu.seg[CS].selector, cpu.rip):
        frame.push(value, 8)
    check_target(cpu, gate.code, gate.offset)
    cpu.seg[SS] = null_stack(cpu, level)
    _go(cpu, gate.selector, gate.data, gate.offset, level)
    cpu.gpr[RSP] = frame.sp


def _call_inner(cpu: Cpu, gate: _CallGate) -> None:
    """A 16- or 32-bit call gate to an inner level: new stack, parameters copied (SDM vol. 3A 5.8.5)."""
    level, size = gate.code.dpl, gate.size
    selector, sp = tss_stack(cpu, level)
    ss, data = desc.check_stack(cpu, selector, level, vector=TS)
    old = Stack(cpu, size * 8)
    params = [old.pop() for _ in range(gate.count)]
    bits = 32 if ss.db else 16
    frame = Frame(cpu, ss, sp & MASK[bits], bits, desc.error_of(selector), level)
    frame.push(cpu.seg[SS].selector, size)
    frame.push(cpu.gpr[RSP], size)
    for value in reversed(params):
        frame.push(value, size)
    frame.push(cpu.seg[CS].selector, size)
    frame.push(cpu.rip, size)
    check_target(cpu, gate.code, gate.offset)
    cpu.seg[SS] = desc.finish(cpu, ss, data)
    _go(cpu, gate.selector, gate.data, gate.offset, level)
    cpu.write_reg(bits, RSP, frame.sp)


def _ret_protected(cpu: Cpu, stack: Stack, selector: int, rip: int, extra: int) -> None:
    code, data = checked_return(cpu, selector)
    level = selector & 3
    if level == cpu.cpl:
        check_target(cpu, code, rip)
        sp = stack.pointer() + extra
        _go(cpu, selector, data, rip, level)
        cpu.set_sp(sp)
        return
    stack.done += extra
    sp, ss_selector = stack.pop(), stack.pop() & 0xFFFF
    null_ok = bool(cpu.lma and code.l and level != 3 and ss_selector & 3 == level)
    ss, ss_data = desc.check_stack(cpu, ss_selector, level, null_ok=null_ok)
    check_target(cpu, code, rip)
    cpu.seg[SS] = desc.finish(cpu, ss, ss_data)
    _go(cpu, selector, data, rip, level)
    load_sp(cpu, sp + extra & MASK[64])
    desc.drop_inner(cpu, level)


FAR_ROWS: Final = [
    Row("jmp far", "EA", "Ap", jmp_far, "SDM 2A JMP", modes="no64"),
    Row("jmp far", "FF /5:m", "Mp", jmp_far, "SDM 2A JMP"),
    Row("call far", "9A", "Ap", call_far, "SDM 2A CALL", modes="no64"),
    Row("call far", "FF /3:m", "Mp", call_far, "SDM 2A CALL"),
    Row("retf", "CB", "", ret_far, "SDM 2B RET"),
    Row("retf", "CA", "Iw", ret_far, "SDM 2B RET"),
]
