"""Segment registers and descriptor tables: MOV, PUSH, POP, LDS.., LGDT.., LLDT, LTR, LAR, LSL, VERR, VERW, ARPL.

SDM vol. 2A and 2B under each name; vol. 3A 2.4 and 5.10 for the system ones; UMIP: vol. 3A 2.5.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Final

from harness.modes import decode_segment
from harness.reference import descriptors as desc
from harness.reference.cpu import CS, DS, ES, FS, GP, GS, MASK, NP, RSP, SS, UD, ZF, Cpu, Fault
from harness.reference.insn import Insn, Operation, Row
from harness.reference.transfers import far_size
from harness.state import MASK64, Table

CR4_UMIP: Final = 1 << 11
_BUSY: Final = 2
_LAR_TYPES: Final = frozenset({1, 2, 3, 4, 5, 9, 0xB, 0xC})
_LSL_TYPES: Final = frozenset({1, 2, 3, 9, 0xB})


def privileged(cpu: Cpu) -> None:
    """#GP(0) unless CPL is 0."""
    if cpu.cpl:
        raise Fault(GP, 0)


def umip(cpu: Cpu) -> None:
    """#GP(0) at CPL > 0 while CR4.UMIP is set (SDM vol. 3A 2.5)."""
    if cpu.cr4 & CR4_UMIP and cpu.cpl:
        raise Fault(GP, 0)


def protected_only(cpu: Cpu) -> None:
    """#UD in real and virtual-8086 mode."""
    if not cpu.pe or cpu.vm86:
        raise Fault(UD)


# --- MOV, PUSH, POP, LDS --------------------------------------------------------------------------------------------


def mov_from_sreg(insn: Insn) -> Operation:
    """MOV r/m, Sreg: 16 bits to memory, zero-extended to a wider register (SDM vol. 2B MOV)."""
    index = insn.reg & 7
    if index > 5:
        return _ud
    if insn.is_memory(0):
        ea, seg = insn.address(), insn.seg
        return lambda cpu: cpu.mem.write(seg, ea(cpu), 2, cpu.seg[index].selector)
    size, rm = insn.opsize, insn.rm
    return lambda cpu: cpu.write_reg(size, rm, cpu.seg[index].selector)


def _ud(cpu: Cpu) -> None:
    raise Fault(UD)


def mov_to_sreg(insn: Insn) -> Operation:
    """MOV Sreg, r/m16: #UD for CS; SS holds off interrupts (SDM vol. 2B MOV)."""
    index = insn.reg & 7
    if index > 5 or index == CS:
        return _ud
    if insn.is_memory(1):
        ea, seg = insn.address(), insn.seg

        def source(cpu: Cpu) -> int:
            return cpu.mem.read(seg, ea(cpu), 2)

    else:
        rm = insn.rm

        def source(cpu: Cpu) -> int:
            return cpu.gpr[rm] & 0xFFFF

    def op(cpu: Cpu) -> None:
        desc.load_segment(cpu, index, source(cpu))
        if index == SS:
            desc.set_shadow(cpu)

    return op


def push_sreg(index: int) -> Callable[[Insn], Operation]:
    """PUSH Sreg. Intel may write only 16 bits of a 32-bit slot (SDM vol. 2B PUSH)."""

    def compile_push(insn: Insn) -> Operation:
        size = insn.opsize
        undefined = 0xFFFF0000 if size == 32 and not insn.amd else 0

        def op(cpu: Cpu) -> None:
            top = cpu.gpr[RSP] - (size >> 3) & MASK[cpu.stack_bits]
            cpu.mem.write(SS, top, size >> 3, cpu.seg[index].selector, undefined)
            cpu.set_sp(top)

        return op

    return compile_push


def pop_sreg(index: int) -> Callable[[Insn], Operation]:
    """POP Sreg; RSP moves only when the load succeeded, and with the old stack size (SDM vol. 2B POP)."""

    def compile_pop(insn: Insn) -> Operation:
        size = insn.opsize

        def op(cpu: Cpu) -> None:
            bits = cpu.stack_bits
            top = cpu.gpr[RSP] & MASK[bits]
            value, _ = cpu.mem.read_undefined(SS, top, size >> 3)
            desc.load_segment(cpu, index, value & 0xFFFF)
            cpu.write_reg(bits, RSP, top + (size >> 3))
            if index == SS:
                desc.set_shadow(cpu)

        return op

    return compile_pop


def load_far(index: int, insn: Insn) -> Operation:
    """LDS, LES, LFS, LGS, LSS: the register is written only if the segment load succeeds."""
    size = far_size(insn)
    ea, seg, reg, n = insn.address(), insn.seg, insn.reg, size >> 3

    def op(cpu: Cpu) -> None:
        raw = cpu.mem.read_bytes(seg, ea(cpu), n + 2)
        desc.load_segment(cpu, index, int.from_bytes(raw[n:], "little"))
        cpu.write_reg(size, reg, int.from_bytes(raw[:n], "little"))

    return op


# --- GDTR, IDTR, LDTR, TR -------------------------------------------------------------------------------------------


def store_table(name: str, insn: Insn) -> Operation:
    """SGDT, SIDT: limit, then 8 bytes of base in 64-bit mode, else 4 (SDM vol. 2B SGDT)."""
    ea, seg = insn.address(), insn.seg

    def op(cpu: Cpu) -> None:
        umip(cpu)
        table: Table = getattr(cpu, name)
        n = 8 if cpu.long64 else 4
        data = table.limit.to_bytes(2, "little") + (table.base & MASK[8 * n]).to_bytes(n, "little")
        cpu.mem.write_bytes(seg, ea(cpu), data)

    return op


def load_table(name: str, insn: Insn) -> Operation:
    """LGDT, LIDT: a 16-bit operand size loads 24 bits of base (SDM vol. 2A LGDT). Non-canonical base: #GP(0)."""
    ea, seg, size = insn.address(), insn.seg, insn.opsize

    def op(cpu: Cpu) -> None:
        privileged(cpu)
        n = 8 if cpu.long64 else 4
        raw = cpu.mem.read_bytes(seg, ea(cpu), 2 + n)
        base = int.from_bytes(raw[2:], "little")
        if cpu.long64:
            if not cpu.canonical_base(base):
                raise Fault(GP, 0)
        elif size == 16:
            base &= 0xFFFFFF
        setattr(cpu, name, Table(base, int.from_bytes(raw[:2], "little")))

    return op


def store_selector(name: str, insn: Insn) -> Operation:
    """SLDT, STR: 16 bits to memory, zero-extended to the register (SDM vol. 2B SLDT, STR)."""
    register = None if insn.memory else (insn.opsize, insn.rm)
    ea, seg = insn.address(), insn.seg

    def op(cpu: Cpu) -> None:
        protected_only(cpu)
        umip(cpu)
        value = getattr(cpu, name).selector
        if register is None:
            cpu.mem.write(seg, ea(cpu), 2, value)
        else:
            cpu.write_reg(*register, value)

    return op


def lldt(insn: Insn) -> Operation:
    """LLDT: a null selector makes LDTR unusable (SDM vol. 2A LLDT)."""
    source = insn.read(0)

    def op(cpu: Cpu) -> None:
        protected_only(cpu)
        privileged(cpu)
        selector = source(cpu) & 0xFFFF
        if desc.null(selector):
            cpu.ldtr = desc.null_segment(cpu, cpu.ldtr, selector)
            return
        if selector & 4:
            raise Fault(GP, desc.error_of(selector))
        data = desc.read_system(cpu, selector)
        seg = decode_segment(selector, data)
        if seg.s or seg.type != desc.LDT:
            raise Fault(GP, desc.error_of(selector))
        if not seg.present:
            raise Fault(NP, desc.error_of(selector))
        if cpu.lma and not cpu.canonical_base(seg.base):
            raise Fault(GP, desc.error_of(selector))
        cpu.ldtr = seg

    return op


def ltr(insn: Insn) -> Operation:
    """LTR: an available TSS, which becomes busy (SDM vol. 2A LTR)."""
    source = insn.read(0)

    def op(cpu: Cpu) -> None:
        protected_only(cpu)
        privileged(cpu)
        selector = source(cpu) & 0xFFFF
        if desc.null(selector):
            raise Fault(GP, 0)
        if selector & 4:
            raise Fault(GP, desc.error_of(selector))
        data = desc.read(cpu, selector)
        seg = decode_segment(selector, data)
        types = (desc.TSS32,) if cpu.lma else (desc.TSS16, desc.TSS32)
        if seg.s or seg.type not in types:
            raise Fault(GP, desc.error_of(selector))
        if not seg.present:
            raise Fault(NP, desc.error_of(selector))
        data = desc.read_system(cpu, selector)
        if cpu.lma and data[13] & 0x1F:
            raise Fault(GP, desc.error_of(selector))
        seg = decode_segment(selector, data)
        if cpu.lma and not cpu.canonical_base(seg.base):
            raise Fault(GP, desc.error_of(selector))
        desc.set_type(cpu, selector, data, _BUSY)
        cpu.tr = replace(seg, type=seg.type | _BUSY)

    return op


# --- looking at descriptors -----------------------------------------------------------------------------------------


def _visible(cpu: Cpu, selector: int, types: frozenset[int]) -> bytes | None:
    """The descriptor, when LAR or LSL may look at it (SDM vol. 2A LAR, LSL)."""
    at = None if desc.null(selector) else desc.locate(cpu, selector)
    if at is None:
        return None
    data = desc.read(cpu, selector)
    seg = decode_segment(selector, data)
    if not seg.s:
        if seg.type not in ({2, 9, 0xB, 0xC} & types if cpu.lma else types):
            return None
        if cpu.lma:
            upper = desc.locate(cpu, selector, 16)
            if upper is None or cpu.mem.linear_read(upper + 13 & MASK64, 1) & 0x1F:
                return None
    conforming = seg.s and seg.type & (desc.CODE | desc.CONFORMING) == desc.CODE | desc.CONFORMING
    if not conforming and (cpu.cpl > seg.dpl or selector & 3 > seg.dpl):
        return None
    return data


def _lookup(insn: Insn, types: frozenset[int], value_of: Callable[[bytes], int]) -> Operation:
    ea, seg, rm, reg, size = insn.address(), insn.seg, insn.rm, insn.reg, insn.opsize
    memory = insn.memory

    def op(cpu: Cpu) -> None:
        protected_only(cpu)
        selector = cpu.mem.read(seg, ea(cpu), 2) if memory else cpu.gpr[rm] & 0xFFFF
        data = _visible(cpu, selector, types)
        cpu.undefined &= ~ZF
        if data is None:
            cpu.rflags &= ~ZF
            return
        cpu.rflags |= ZF
        cpu.write_reg(size, reg, value_of(data) & MASK[size])

    return op


def lar(insn: Insn) -> Operation:
    """LAR: the upper half of a descriptor and FFFF00H (APM vol. 3 LAR).

    The SDM calls bits 19:16 undefined; processors of both makers show what the descriptor holds there.
    """
    return _lookup(insn, _LAR_TYPES, lambda data: int.from_bytes(data[4:8], "little") & 0xFFFF00)


def lsl(insn: Insn) -> Operation:
    """LSL: the limit of a descriptor in bytes (SDM vol. 2A LSL)."""
    return _lookup(insn, _LSL_TYPES, lambda data: decode_segment(0, data).limit)


def verify(insn: Insn, write: bool) -> Operation:
    """VERR, VERW: ZF says whether the segment can be read or written at this CPL (SDM vol. 2B VERR)."""
    source = insn.read(0)

    def op(cpu: Cpu) -> None:
        protected_only(cpu)
        selector = source(cpu) & 0xFFFF
        cpu.undefined &= ~ZF
        cpu.rflags &= ~ZF
        if desc.null(selector) or desc.locate(cpu, selector) is None:
            return
        seg = decode_segment(selector, desc.read(cpu, selector))
        if not seg.s:
            return
        code = seg.type & desc.CODE
        good = (not code and seg.type & desc.RW) if write else (not code or seg.type & desc.RW)
        conforming = code and seg.type & desc.CONFORMING
        if good and (conforming or (cpu.cpl <= seg.dpl and selector & 3 <= seg.dpl)):
            cpu.rflags |= ZF

    return op


def arpl(insn: Insn) -> Operation:
    """ARPL: raise the RPL of the destination to the source's (SDM vol. 2A ARPL)."""
    source, read, write = insn.read(1), insn.read(0), insn.write(0)

    def op(cpu: Cpu) -> None:
        protected_only(cpu)
        old, rpl = read(cpu), source(cpu) & 3
        if old & 3 < rpl:
            write(cpu, old & ~3 | rpl)
            cpu.rflags |= ZF
        else:
            cpu.rflags &= ~ZF
        cpu.undefined &= ~ZF

    return op


def _pushes() -> list[Row]:
    rows = []
    for index, push, pop, modes in (
        (ES, "06", "07", "no64"), (CS, "0E", "", "no64"), (SS, "16", "17", "no64"), (DS, "1E", "1F", "no64"),
        (FS, "0F A0", "0F A1", "all"), (GS, "0F A8", "0F A9", "all"),
    ):  # fmt: skip
        name = ("es", "cs", "ss", "ds", "fs", "gs")[index]
        rows.append(Row(f"push {name}", push, "", push_sreg(index), "SDM 2B PUSH", size="d64", modes=modes))
        if pop:
            rows.append(Row(f"pop {name}", pop, "", pop_sreg(index), "SDM 2B POP", size="d64", modes=modes))
    return rows


SEGMENT_ROWS: Final = [
    Row("mov", "8C /r", "Ew,Sw", mov_from_sreg, "SDM 2B MOV"),
    Row("mov", "8E /r", "Sw,Ew", mov_to_sreg, "SDM 2B MOV"),
    *_pushes(),
    Row("lds", "C5 /r:m", "Gv,Mp", lambda i: load_far(DS, i), "SDM 2A LDS", modes="no64"),
    Row("les", "C4 /r:m", "Gv,Mp", lambda i: load_far(ES, i), "SDM 2A LDS", modes="no64"),
    Row("lss", "0F B2 /r:m", "Gv,Mp", lambda i: load_far(SS, i), "SDM 2A LDS"),
    Row("lfs", "0F B4 /r:m", "Gv,Mp", lambda i: load_far(FS, i), "SDM 2A LDS"),
    Row("lgs", "0F B5 /r:m", "Gv,Mp", lambda i: load_far(GS, i), "SDM 2A LDS"),
    Row("sgdt", "0F 01 /0:m", "Ms", lambda i: store_table("gdtr", i), "SDM 2B SGDT"),
    Row("sidt", "0F 01 /1:m", "Ms", lambda i: store_table("idtr", i), "SDM 2B SIDT"),
    Row("lgdt", "0F 01 /2:m", "Ms", lambda i: load_table("gdtr", i), "SDM 2A LGDT"),
    Row("lidt", "0F 01 /3:m", "Ms", lambda i: load_table("idtr", i), "SDM 2A LIDT"),
    Row("sldt", "0F 00 /0", "Ev", lambda i: store_selector("ldtr", i), "SDM 2B SLDT"),
    Row("str", "0F 00 /1", "Ev", lambda i: store_selector("tr", i), "SDM 2B STR"),
    Row("lldt", "0F 00 /2", "Ew", lldt, "SDM 2A LLDT"),
    Row("ltr", "0F 00 /3", "Ew", ltr, "SDM 2A LTR"),
    Row("verr", "0F 00 /4", "Ew", lambda i: verify(i, False), "SDM 2B VERR", writes="Z"),
    Row("verw", "0F 00 /5", "Ew", lambda i: verify(i, True), "SDM 2B VERR", writes="Z"),
    Row("lar", "0F 02 /r", "Gv,Ew", lar, "SDM 2A LAR", writes="Z"),
    Row("lsl", "0F 03 /r", "Gv,Ew", lsl, "SDM 2A LSL", writes="Z"),
    Row("arpl", "63 /r", "Ew,Gw", arpl, "SDM 2A ARPL", writes="Z", modes="no64"),
]
