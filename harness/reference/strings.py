"""String instructions: MOVS, CMPS, STOS, LODS, SCAS, INS, OUTS with REP, REPE, REPNE (SDM vol. 1 7.3.9, vol. 2B REP).

One iteration is one step: while more are to come, RIP goes back to the instruction's own start.  A fault in the middle
leaves RCX, RSI and RDI of the iterations that were completed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from harness.reference.alu import make_sub
from harness.reference.cpu import DF, ES, MASK, RAX, RCX, RDI, RDX, RSI, ZF, Cpu
from harness.reference.insn import Insn, Operation, Row
from harness.reference.portio import io_allowed, io_size, port_in, port_out

_Body = Callable[[Cpu, int, int], None]
"""One iteration: given the offsets in RSI and RDI. It moves no pointer."""


def _string(
    insn: Insn, size: int, body: _Body, *, si: bool, di: bool, compare: bool = False, port: bool = False
) -> Operation:
    """Wrap one iteration of ``size`` bits with the pointers, the count and the termination condition.

    ``port``: the I/O permission is checked even when the count is zero (an AMD Zen 4 does; the manuals do not say).
    """
    asz, rep, step = insn.addrsize, insn.rep, size >> 3
    mask = MASK[asz]
    until_zf = 0 if rep == 0xF3 else ZF

    def iteration(cpu: Cpu) -> None:
        gpr = cpu.gpr
        body(cpu, gpr[RSI] & mask, gpr[RDI] & mask)
        delta = -step if cpu.rflags & DF else step
        if si:
            cpu.write_reg(asz, RSI, gpr[RSI] + delta)
        if di:
            cpu.write_reg(asz, RDI, gpr[RDI] + delta)

    if not rep:
        return iteration

    def repeated(cpu: Cpu) -> None:
        count = cpu.gpr[RCX] & mask
        if port:
            io_allowed(cpu, cpu.gpr[RDX] & 0xFFFF, step)
        if not count:
            return
        iteration(cpu)
        count -= 1
        cpu.write_reg(asz, RCX, count)
        if count and not (compare and cpu.rflags & ZF == until_zf):
            cpu.again()

    return repeated


def _size(insn: Insn, byte: bool) -> int:
    return 8 if byte else insn.opsize


def movs(insn: Insn, byte: bool) -> Operation:
    """MOVS: the source segment can be overridden, the destination is ES."""
    size, seg = _size(insn, byte), insn.seg
    n = size >> 3

    def body(cpu: Cpu, si: int, di: int) -> None:
        cpu.mem.write(ES, di, n, cpu.mem.read(seg, si, n))

    return _string(insn, size, body, si=True, di=True)


def stos(insn: Insn, byte: bool) -> Operation:
    """STOS."""
    size = _size(insn, byte)
    n = size >> 3

    def body(cpu: Cpu, si: int, di: int) -> None:
        cpu.mem.write(ES, di, n, cpu.gpr[RAX] & MASK[size])

    return _string(insn, size, body, si=False, di=True)


def lods(insn: Insn, byte: bool) -> Operation:
    """LODS."""
    size, seg = _size(insn, byte), insn.seg

    def body(cpu: Cpu, si: int, di: int) -> None:
        cpu.write_reg(size, RAX, cpu.mem.read(seg, si, size >> 3))

    return _string(insn, size, body, si=True, di=False)


def cmps(insn: Insn, byte: bool) -> Operation:
    """CMPS: flags of source minus ES:rDI."""
    size, seg = _size(insn, byte), insn.seg
    n, compare = size >> 3, make_sub(size)

    def body(cpu: Cpu, si: int, di: int) -> None:
        left = cpu.mem.read(seg, si, n)
        compare(cpu, left, cpu.mem.read(ES, di, n))

    return _string(insn, size, body, si=True, di=True, compare=True)


def scas(insn: Insn, byte: bool) -> Operation:
    """SCAS: flags of the accumulator minus ES:rDI."""
    size = _size(insn, byte)
    n, compare = size >> 3, make_sub(size)

    def body(cpu: Cpu, si: int, di: int) -> None:
        compare(cpu, cpu.gpr[RAX] & MASK[size], cpu.mem.read(ES, di, n))

    return _string(insn, size, body, si=False, di=True, compare=True)


def ins(insn: Insn, byte: bool) -> Operation:
    """INS: the destination is probed before the port is read."""
    size = io_size(insn, byte)
    n = size >> 3

    def body(cpu: Cpu, si: int, di: int) -> None:
        port = cpu.gpr[RDX] & 0xFFFF
        io_allowed(cpu, port, n)
        cpu.mem.check(ES, di, n, True)
        cpu.mem.write(ES, di, n, port_in(cpu, port, n))

    return _string(insn, size, body, si=False, di=True, port=True)


def outs(insn: Insn, byte: bool) -> Operation:
    """OUTS."""
    size, seg = io_size(insn, byte), insn.seg
    n = size >> 3

    def body(cpu: Cpu, si: int, di: int) -> None:
        port = cpu.gpr[RDX] & 0xFFFF
        io_allowed(cpu, port, n)
        port_out(cpu, port, n, cpu.mem.read(seg, si, n))

    return _string(insn, size, body, si=True, di=False, port=True)


_Maker = Callable[[Insn, bool], Operation]


def _compiler(maker: _Maker, byte: bool) -> Callable[[Insn], Operation]:
    return lambda insn: maker(insn, byte)


def _rows() -> list[Row]:
    out = []
    table: tuple[tuple[str, int, str, str, _Maker, str], ...] = (
        ("ins", 0x6C, "Y{},DX", "SDM 2A INS", ins, ""), ("outs", 0x6E, "DX,X{}", "SDM 2B OUTS", outs, ""),
        ("movs", 0xA4, "Y{},X{}", "SDM 2B MOVS", movs, ""), ("cmps", 0xA6, "X{},Y{}", "SDM 2A CMPS", cmps, "OSZAPC"),
        ("stos", 0xAA, "Y{},{}", "SDM 2B STOS", stos, ""), ("lods", 0xAC, "{},X{}", "SDM 2A LODS", lods, ""),
        ("scas", 0xAE, "{},Y{}", "SDM 2B SCAS", scas, "OSZAPC"),
    )  # fmt: skip
    for name, opcode, operands, section, maker, writes in table:
        for byte in (True, False):
            width = "b" if byte else "z" if name in ("ins", "outs") else "v"
            text = operands.replace("X{}", "X" + width).replace("Y{}", "Y" + width)
            text = text.replace("{}", "AL" if byte else "rAX")
            out.append(Row(name, f"{opcode + (not byte):02X}", text, _compiler(maker, byte), section, writes=writes))
    return out


STRING_ROWS: Final = _rows()
