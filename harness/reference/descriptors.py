"""Descriptors: reading them from the GDT and LDT, and the checks of every load of a segment register.

SDM vol. 3A 3.4.5, 5.5-5.8 and the pseudo code of MOV, LDS, LLDT, LTR; APM vol. 2 4.7-4.11.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from harness.modes import decode_segment
from harness.reference.cpu import CS, DS, ES, FS, GP, GS, MASK, NP, SHADOW_MOV_SS, SS, STACK, TS, Cpu, Fault
from harness.state import Segment

ACCESSED: Final = 1
CODE: Final = 8
CONFORMING: Final = 4  # of a code segment; expand-down of a data segment
RW: Final = 2  # readable code, writable data
LDT, TSS16, TSS16_BUSY, CALL16, TASK_GATE, INT16, TRAP16 = 2, 1, 3, 4, 5, 6, 7
TSS32, TSS32_BUSY, CALL32, INT32, TRAP32 = 9, 0xB, 0xC, 0xE, 0xF
"""Types of system descriptors (SDM vol. 3A table 3-2)."""


def null(selector: int) -> bool:
    """Whether a selector is null: index 0 of the GDT, any RPL (SDM vol. 3A 3.4.2)."""
    return not selector & 0xFFFC


def error_of(selector: int, ext: int = 0) -> int:
    """Selector error code (SDM vol. 3A 6.13)."""
    return selector & 0xFFFC | ext


def locate(cpu: Cpu, selector: int, size: int = 8) -> int | None:
    """Linear address of a descriptor of ``size`` bytes; None when it is past the limit of its table."""
    if selector & 4:
        if cpu.ldtr.unusable:
            return None
        base, limit = cpu.ldtr.base, cpu.ldtr.limit
    else:
        base, limit = cpu.gdtr.base, cpu.gdtr.limit
    offset = selector & 0xFFF8
    if offset + size - 1 > limit:
        return None
    return base + offset & (MASK[64] if cpu.lma else MASK[32])


def read(cpu: Cpu, selector: int, vector: int = GP, ext: int = 0) -> bytes:
    """The 8 bytes of a descriptor; ``vector`` with the selector as error code when past the table's limit."""
    at = locate(cpu, selector)
    if at is None:
        raise Fault(vector, error_of(selector, ext))
    return cpu.mem.linear_read(at, 8).to_bytes(8, "little")


def read_system(cpu: Cpu, selector: int, vector: int = GP, ext: int = 0) -> bytes:
    """A system descriptor: 16 bytes in IA-32e mode (SDM vol. 3A 3.5.2, 7.2.3), 8 otherwise."""
    data = read(cpu, selector, vector, ext)
    if cpu.lma:
        at = locate(cpu, selector, 16)
        if at is None:
            raise Fault(vector, error_of(selector, ext))
        data += cpu.mem.linear_read(at + 8 & MASK[64], 8).to_bytes(8, "little")
    return data


def set_type(cpu: Cpu, selector: int, data: bytes, bits: int) -> None:
    """Or ``bits`` (accessed, busy) into the type of the descriptor in memory, unless they are set there."""
    at = locate(cpu, selector)
    if at is not None and data[5] | bits != data[5]:
        cpu.mem.linear_write(at + 5 & MASK[64], 1, data[5] | bits)


def accessed(cpu: Cpu, selector: int, data: bytes) -> Segment:
    """The hidden part of a code or data segment, its accessed bit set here and in memory (SDM vol. 3A 3.4.5.1)."""
    set_type(cpu, selector, data, ACCESSED)
    seg = decode_segment(selector, data)
    return replace(seg, type=seg.type | ACCESSED)


def null_segment(cpu: Cpu, old: Segment, selector: int, dpl: int = 0) -> Segment:
    """What loading a null selector makes of a segment register.

    Intel clears the base. AMD keeps it up to family 17H (APM vol. 2 4.5.3); CPUID 80000021H EAX[6] says that it is
    cleared (vol. 3 appendix E), and so it is on a family 19H part that does not show the bit.
    """
    base = old.base if cpu.amd and not _null_clears_base(cpu) else 0
    return replace(old, selector=selector, base=base, dpl=dpl, present=0, unusable=1)


def _null_clears_base(cpu: Cpu) -> bool:
    said, first = cpu.profile.leaf(0x80000021), cpu.profile.leaf(1)
    family = 0
    if first is not None:
        family = first.eax >> 8 & 0xF
        family += first.eax >> 20 & 0xFF if family == 0xF else 0
    return bool(family >= 0x19 or (said is not None and said.eax >> 6 & 1))


def real_segment(cpu: Cpu, old: Segment, selector: int) -> Segment:
    """A segment register written in real or virtual-8086 mode: only selector and base (SDM vol. 3A 20.1.1).

    Virtual-8086 mode has fixed attributes (SDM vol. 3C 26.3.1.2).
    """
    if cpu.vm86:
        return Segment(selector, selector << 4, 0xFFFF, 3, 1, 3)
    return replace(old, selector=selector, base=selector << 4, unusable=0, present=1)


def check_stack(
    cpu: Cpu, selector: int, cpl: int, *, vector: int = GP, ext: int = 0, null_ok: bool = False
) -> tuple[Segment, bytes]:
    """The stack segment that ``selector`` names, for level ``cpl``; ``vector`` as its faults (#GP, or #TS from a TSS).

    Nothing is written; :func:`accessed` does that once nothing can fail. A not present one is #SS(selector).
    ``null_ok``: SS may be null (64-bit mode, CPL below 3).
    """
    if null(selector):
        if not null_ok:
            raise Fault(vector, ext)
        return null_segment(cpu, cpu.seg[SS], selector, cpl), b""
    data = read(cpu, selector, vector, ext)
    seg = decode_segment(selector, data)
    if selector & 3 != cpl or not seg.s or seg.type & CODE or not seg.type & RW or seg.dpl != cpl:
        raise Fault(vector, error_of(selector, ext))
    if not seg.present:
        raise Fault(STACK, error_of(selector, ext))
    return seg, data


def finish(cpu: Cpu, seg: Segment, data: bytes) -> Segment:
    """The segment with its accessed bit set, here and in memory; a null one (no ``data``) as it is."""
    return accessed(cpu, seg.selector, data) if data else seg


def load_segment(cpu: Cpu, index: int, selector: int) -> None:
    """Load ES, SS, DS, FS or GS by MOV, POP, LDS.. (SDM vol. 2B MOV; APM vol. 2 4.7), without MOV SS's shadow."""
    selector &= 0xFFFF
    cpu.seg[index] = checked_segment(cpu, index, selector)
    cpu.mode_changed()


def checked_segment(cpu: Cpu, index: int, selector: int) -> Segment:
    """The segment that loading ``selector`` into register ``index`` gives, with every check."""
    if not cpu.pe or cpu.vm86:
        return real_segment(cpu, cpu.seg[index], selector)
    if index == SS:
        null_ok = cpu.long64 and cpu.cpl < 3 and selector & 3 == cpu.cpl
        seg, data = check_stack(cpu, selector, cpu.cpl, null_ok=null_ok)
        return finish(cpu, seg, data)
    if null(selector):
        return null_segment(cpu, cpu.seg[index], selector)
    data = read(cpu, selector)
    seg = decode_segment(selector, data)
    readable = seg.s and (not seg.type & CODE or seg.type & RW)
    if not readable:
        raise Fault(GP, error_of(selector))
    if seg.type & (CODE | CONFORMING) != CODE | CONFORMING and max(selector & 3, cpu.cpl) > seg.dpl:
        raise Fault(GP, error_of(selector))
    if not seg.present:
        raise Fault(NP, error_of(selector))
    return accessed(cpu, selector, data)


def drop_inner(cpu: Cpu, cpl: int) -> None:
    """After a return to an outer level: null the data segments it may not use (SDM vol. 2A IRET, vol. 3A 5.8.6)."""
    for index in (ES, DS, FS, GS):
        seg = cpu.seg[index]
        if seg.unusable:
            continue
        conforming = seg.type & (CODE | CONFORMING) == CODE | CONFORMING
        if seg.dpl < cpl and not conforming:
            cpu.seg[index] = null_segment(cpu, seg, 0)


def load_code(cpu: Cpu, selector: int, data: bytes, cpl: int) -> None:
    """Load CS with RPL ``cpl`` from its descriptor, accessed bit included."""
    seg = accessed(cpu, selector, data)
    cpu.seg[CS] = replace(seg, selector=selector & 0xFFFC | cpl)


def set_shadow(cpu: Cpu) -> None:
    """MOV SS and POP SS hold off interrupts and debug traps for one instruction (SDM vol. 3A 6.8.3)."""
    cpu.shadow = SHADOW_MOV_SS


def code_mode_ok(cpu: Cpu, seg: Segment) -> bool:
    """L and D are not both set in IA-32e mode (SDM vol. 3A 3.4.5)."""
    return not (cpu.lma and seg.l and seg.db)


def tss_fault(cpu: Cpu, ext: int) -> Fault:
    """#TS with TR's selector: the TSS is too short for the stack pointer wanted (SDM vol. 3A 6.15)."""
    return Fault(TS, error_of(cpu.tr.selector, ext))
