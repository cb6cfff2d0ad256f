"""Interrupt and exception delivery: IVT, IDT, 64-bit IDT, and what happens when it fails itself.

SDM vol. 3A chapter 6 (6.12 protected mode, 6.14 64-bit mode, 6.15 the exceptions), vol. 3A 20.1.4 (real mode), 20.3.1
(virtual-8086), vol. 2A INT n; APM vol. 2 chapter 8.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from harness.modes import decode_segment
from harness.reference import descriptors as desc
from harness.reference.cpu import (
    AC,
    CS,
    DB,
    DF_VECTOR,
    DS,
    ES,
    FS,
    GP,
    GS,
    IF,
    MASK,
    NMI,
    NP,
    NT,
    RF,
    RSP,
    SS,
    STACK,
    TF,
    TS,
    VM,
    Cpu,
    Fault,
    ModelError,
)
from harness.state import MASK64, Segment

_CONTRIBUTORY: Final = frozenset({0, 10, 11, 12, 13, 21})
_PAGE: Final = frozenset({14, 20})
_TRAPS: Final = frozenset({NMI, 3, 4})
"""Vectors whose handler is entered with RF as it was: no fault (SDM vol. 3B 17.3.1.1)."""
_CR4_CET: Final = 1 << 23
_BD: Final = 1 << 13
_DR7_GD: Final = 1 << 13


class TripleFault(Exception):
    """A fault while delivering #DF: shutdown (SDM vol. 3A 6.15, interrupt 8)."""


@dataclass(frozen=True, slots=True)
class _Event:
    """What is delivered. ``ext`` is bit 0 of the error codes of failures; ``soft`` checks the gate's DPL."""

    vector: int
    error: int | None
    soft: bool
    rip: int
    flags: int
    undefined: int

    @property
    def ext(self) -> int:
        return 0 if self.soft else 1

    @property
    def idt_error(self) -> int:
        """Error code that points at the IDT entry (SDM vol. 3A 6.13)."""
        return self.vector << 3 | 2 | self.ext


def deliver(
    cpu: Cpu, vector: int, error: int | None = None, soft: bool = False, next_rip: int | None = None
) -> None:
    """Deliver an exception or interrupt; ``cpu.rip`` (or ``next_rip``) becomes the return address.

    ``soft``: INT n, INT3, INTO: the gate's DPL is checked and a failure raises Fault, an exception of that
    instruction.  Otherwise a failing delivery escalates as in SDM vol. 3A table 6-5. TripleFault when #DF fails.
    """
    if soft:
        _dispatch(cpu, _event(cpu, vector, error, True, next_rip))
        return
    while True:
        if vector == DB:
            _debug_status(cpu)
        event = _event(cpu, vector, error, False, next_rip)
        cpu.trap_bits = 0
        try:
            _dispatch(cpu, event)
            return
        except Fault as second:
            if second.cr2 is not None:
                cpu.cr2 = second.cr2
            if vector == DF_VECTOR:
                raise TripleFault from second
            vector, error = escalate(vector, second)


def escalate(first: int, second: Fault) -> tuple[int, int | None]:
    """(vector, error code) of what follows when ``second`` happens while ``first`` is delivered (table 6-5)."""
    bad = second.vector in _CONTRIBUTORY
    if (first in _CONTRIBUTORY and bad) or (first in _PAGE and (bad or second.vector in _PAGE)):
        return DF_VECTOR, 0
    return second.vector, second.error


def _debug_status(cpu: Cpu) -> None:
    """DR6 and DR7.GD at the entry to #DB (SDM vol. 3B 17.2.3, 17.2.4)."""
    bits = cpu.trap_bits
    if bits & 0xF:
        cpu.dr6 &= ~0xF
    cpu.dr6 |= bits
    cpu.dr7 &= ~_DR7_GD


def _event(cpu: Cpu, vector: int, error: int | None, soft: bool, next_rip: int | None) -> _Event:
    flags, undefined = cpu.rflags, cpu.undefined
    if soft:
        flags &= ~RF
    elif vector in (DF_VECTOR, 18):
        undefined |= RF  # aborts: the manual does not say
    elif vector == DB:
        flags |= RF if cpu.trap_bits & _BD else 0  # the one fault among them that pushes RF
    elif vector < 32 and vector not in _TRAPS:
        flags |= RF
    return _Event(vector, error, soft, cpu.rip if next_rip is None else next_rip, flags, undefined)


def _dispatch(cpu: Cpu, ev: _Event) -> None:
    if cpu.cr4 & _CR4_CET:
        raise ModelError("event delivery with CR4.CET is not modelled")
    if not cpu.pe:
        _real(cpu, ev)
    elif cpu.lma:
        _long(cpu, ev)
    else:
        _protected(cpu, ev)
    if ev.vector == NMI and not ev.soft:
        cpu.nmi_masked = 1
    cpu.shadow = 0
    cpu.mode_changed()


# --- real mode ------------------------------------------------------------------------------------------------------


def _real(cpu: Cpu, ev: _Event) -> None:
    """IVT: four bytes a vector, 16-bit frame, no error code (SDM vol. 3A 20.1.4; vol. 2A INT n)."""
    if ev.vector * 4 + 3 > cpu.idtr.limit:
        raise Fault(GP)
    entry = cpu.mem.linear_read(cpu.idtr.base + ev.vector * 4 & MASK[32], 4)
    frame = Frame(cpu, cpu.seg[SS], cpu.sp(), 16 if not cpu.seg[SS].db else 32)
    frame.push(ev.flags, 2, ev.undefined)
    frame.push(cpu.seg[CS].selector, 2)
    frame.push(ev.rip, 2)
    selector, offset = entry >> 16, entry & 0xFFFF
    if offset > cpu.seg[CS].limit:
        raise Fault(GP)
    cpu.set_sp(frame.sp)
    cpu.seg[CS] = desc.real_segment(cpu, cpu.seg[CS], selector)
    cpu.rip = offset
    cpu.rflags &= ~(IF | TF | AC | RF)


class Frame:
    """Pushes on a stack that is perhaps not the current one; nothing of ``cpu`` changes."""

    def __init__(self, cpu: Cpu, ss: Segment, sp: int, bits: int, error: int | None = None, cpl: int | None = None):
        self.cpu, self.ss, self.sp, self.bits, self.error = cpu, ss, sp, bits, error
        self.cpl = cpu.cpl if cpl is None else cpl

    def push(self, value: int, size: int, undefined: int = 0) -> None:
        """Push ``size`` bytes; a fault leaves the registers as they were."""
        cpu = self.cpu
        self.sp = self.sp - size & MASK[self.bits]
        if self.bits == 64:
            linear = self.sp
            if not cpu.canonical(linear) or not cpu.canonical(linear + size - 1 & MASK64):
                raise Fault(STACK, self.error if self.error is not None else 0)
        else:
            linear = self._linear(size)
        cpu.mem.write_as(linear, (value & MASK[8 * size]).to_bytes(size, "little"), self.cpl, undefined)

    def _linear(self, size: int) -> int:
        ss, sp = self.ss, self.sp
        if self.cpu.pe and not self.cpu.vm86 and ss.type & 0xC == 4:
            bad = sp <= ss.limit or sp + size - 1 > (0xFFFFFFFF if ss.db else 0xFFFF)
        else:
            bad = sp + size - 1 > ss.limit
        if bad:
            raise Fault(STACK, self.error if self.error is not None else 0)
        return ss.base + sp & MASK[32]


# --- protected mode -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Gate:
    """An interrupt or trap gate, its code segment checked. ``level`` is the new CPL."""

    size: int
    selector: int
    offset: int
    trap: bool
    ist: int
    code: Segment
    data: bytes
    level: int


def _gate(cpu: Cpu, ev: _Event) -> _Gate:
    """Read and check the IDT entry and the code segment it names (SDM vol. 2A INT n; figures 6-2, 6-8)."""
    width = 16 if cpu.lma else 8
    if ev.vector * width + width - 1 > cpu.idtr.limit:
        raise Fault(GP, ev.idt_error)
    at = cpu.idtr.base + ev.vector * width & (MASK64 if cpu.lma else MASK[32])
    raw = cpu.mem.linear_read(at, width)
    kind, dpl = raw >> 40 & 0x1F, raw >> 45 & 3
    allowed = (desc.INT32, desc.TRAP32) if cpu.lma else (5, desc.INT16, desc.TRAP16, desc.INT32, desc.TRAP32)
    if kind not in allowed:
        raise Fault(GP, ev.idt_error)
    if ev.soft and dpl < cpu.cpl:
        raise Fault(GP, ev.idt_error)
    if not raw >> 47 & 1:
        raise Fault(NP, ev.idt_error)
    if kind == desc.TASK_GATE:
        raise ModelError(f"vector {ev.vector}: task gate")
    selector = raw >> 16 & 0xFFFF
    offset = raw & 0xFFFF
    if kind & 8:
        offset |= raw >> 32 & 0xFFFF0000
    if cpu.lma:
        offset |= raw >> 32 & 0xFFFFFFFF00000000
    if desc.null(selector):
        raise Fault(GP, ev.ext)
    data = desc.read(cpu, selector, GP, ev.ext)
    code = decode_segment(selector, data)
    if not code.s or not code.type & desc.CODE or code.dpl > cpu.cpl:
        raise Fault(GP, desc.error_of(selector, ev.ext))
    if cpu.lma and (not code.l or code.db):
        raise Fault(GP, desc.error_of(selector, ev.ext))
    if not code.present:
        raise Fault(NP, desc.error_of(selector, ev.ext))
    level = cpu.cpl if code.type & desc.CONFORMING else code.dpl
    if cpu.vm86 and level != 0:
        raise Fault(GP, desc.error_of(selector, ev.ext))
    size = 8 if cpu.lma else 4 if kind & 8 else 2
    return _Gate(size, selector, offset, bool(kind & 1), raw >> 32 & 7 if cpu.lma else 0, code, data, level)


def _enter(cpu: Cpu, gate: _Gate) -> None:
    """Load CS:RIP and the flags of the handler."""
    desc.load_code(cpu, gate.selector, gate.data, gate.level)
    cpu.rip = gate.offset
    cpu.rflags &= ~(TF | NT | RF | VM | (0 if gate.trap else IF))


def _protected(cpu: Cpu, ev: _Event) -> None:
    """IDT of protected mode (SDM vol. 3A 6.12.1)."""
    gate = _gate(cpu, ev)
    if gate.level == cpu.cpl:
        frame = Frame(cpu, cpu.seg[SS], cpu.sp(), cpu.stack_bits, ev.ext)
        _push_frame(cpu, frame, gate, ev)
        if gate.offset > gate.code.limit:
            raise Fault(GP, ev.ext)
        cpu.set_sp(frame.sp)
        _enter(cpu, gate)
        return
    selector, sp = tss_stack(cpu, gate.level, ev.ext)
    ss, data = desc.check_stack(cpu, selector, gate.level, vector=TS, ext=ev.ext)
    frame = Frame(cpu, ss, sp, 32 if ss.db else 16, desc.error_of(selector, ev.ext), gate.level)
    frame.sp &= MASK[frame.bits]
    if cpu.vm86:
        for index in (GS, FS, DS, ES):
            frame.push(cpu.seg[index].selector, gate.size)
    frame.push(cpu.seg[SS].selector, gate.size)
    frame.push(cpu.gpr[RSP], gate.size)
    _push_frame(cpu, frame, gate, ev)
    if gate.offset > gate.code.limit:
        raise Fault(GP, ev.ext)
    cpu.seg[SS] = desc.finish(cpu, ss, data)
    if cpu.vm86:
        for index in (GS, FS, DS, ES):
            cpu.seg[index] = desc.null_segment(cpu, cpu.seg[index], 0)
    _enter(cpu, gate)
    cpu.write_reg(frame.bits, RSP, frame.sp)


def _push_frame(cpu: Cpu, frame: Frame, gate: _Gate, ev: _Event) -> None:
    frame.push(ev.flags, gate.size, ev.undefined)
    frame.push(cpu.seg[CS].selector, gate.size)
    frame.push(ev.rip, gate.size)
    if ev.error is not None:
        frame.push(ev.error, gate.size)


def tss_stack(cpu: Cpu, level: int, ext: int = 0) -> tuple[int, int]:
    """(SS, ESP) of ``level`` from the 16- or 32-bit TSS; #TS(TR) past its limit (SDM vol. 3A 7.2.1, 7.6)."""
    wide = cpu.tr.type & 8
    offset, width = (4 + 8 * level, 4) if wide else (2 + 4 * level, 2)
    if offset + width + 1 > cpu.tr.limit:
        raise desc.tss_fault(cpu, ext)
    base = cpu.tr.base
    sp = cpu.mem.linear_read(base + offset & MASK[32], width)
    return cpu.mem.linear_read(base + offset + width & MASK[32], 2), sp


# --- IA-32e mode ----------------------------------------------------------------------------------------------------


def tss64_pointer(cpu: Cpu, offset: int, ext: int) -> int:
    """A stack pointer of the 64-bit TSS; #TS(TR) past its limit (SDM vol. 3A 7.7)."""
    if offset + 7 > cpu.tr.limit:
        raise desc.tss_fault(cpu, ext)
    return cpu.mem.linear_read(cpu.tr.base + offset & MASK64, 8)


def _long(cpu: Cpu, ev: _Event) -> None:
    """64-bit IDT: frames of 8-byte slots that always hold SS:RSP, aligned to 16; IST (SDM vol. 3A 6.14)."""
    gate = _gate(cpu, ev)
    inner = gate.level != cpu.cpl
    if gate.ist:
        sp = tss64_pointer(cpu, 0x24 + 8 * (gate.ist - 1), ev.ext)
    elif inner:
        sp = tss64_pointer(cpu, 4 + 8 * gate.level, ev.ext)
    else:
        sp = cpu.gpr[RSP]
    if not cpu.canonical(sp):
        raise Fault(STACK, ev.ext)
    frame = Frame(cpu, cpu.seg[SS], sp & ~0xF, 64, ev.ext, gate.level)
    frame.push(cpu.seg[SS].selector, 8)
    frame.push(cpu.gpr[RSP], 8)
    _push_frame(cpu, frame, gate, ev)
    if not cpu.canonical(gate.offset):
        raise Fault(GP, ev.ext)
    if inner:
        cpu.seg[SS] = null_stack(cpu, gate.level)
    _enter(cpu, gate)
    cpu.gpr[RSP] = frame.sp


def null_stack(cpu: Cpu, level: int) -> Segment:
    """SS after a change of level in 64-bit mode: null, its RPL the new CPL (SDM vol. 3A 6.14.4, 5.8.5.1)."""
    return replace(cpu.seg[SS], selector=level, base=0, dpl=level, present=0, unusable=1)
