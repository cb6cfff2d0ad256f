"""IN, OUT, HLT, CLI, STI (SDM vol. 2A, 2B; vol. 1 18.5 for I/O protection; vol. 3A 20.3 and 20.4 for VIF)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from harness.exits import Halt, Io
from harness.reference.cpu import GP, IF, IOPL, MASK, RAX, RDX, SHADOW_STI, VIF, VIP, Cpu, Fault
from harness.reference.insn import Insn, Operation, Row
from harness.reference.segments import privileged
from harness.state import MASK64

_CR4_VME, _CR4_PVI, _CR4_DE = 1, 2, 8


def io_allowed(cpu: Cpu, port: int, n: int) -> None:
    """#GP(0) unless IOPL or the TSS's permission bit map allows ``n`` bytes of ports (SDM vol. 1 18.5).

    Virtual-8086 mode goes by the bit map alone.
    """
    if not cpu.pe or (not cpu.vm86 and cpu.cpl <= (cpu.rflags & IOPL) >> 12):
        return
    tr, wrap = cpu.tr, MASK64 if cpu.lma else MASK[32]
    if tr.unusable or not tr.type & 8 or tr.limit < 0x67:
        raise Fault(GP, 0)
    at = cpu.mem.linear_read(tr.base + 0x66 & wrap, 2) + (port >> 3)
    if at + 1 > tr.limit:
        raise Fault(GP, 0)
    bits = cpu.mem.linear_read(tr.base + at & wrap, 2)
    if bits >> (port & 7) & (1 << n) - 1:
        raise Fault(GP, 0)


def io_watch(cpu: Cpu, port: int, n: int) -> None:
    """I/O breakpoints: R/W 10 with CR4.DE (SDM vol. 3B 17.2.4, 17.3.1.3)."""
    if not cpu.dr7 & 0xFF or not cpu.cr4 & _CR4_DE:
        return
    for i in range(4):
        length = (1, 2, 8, 4)[cpu.dr7 >> 18 + 4 * i & 3]
        start = cpu.dr[i] & ~(length - 1)
        if cpu.dr7 >> 2 * i & 3 and cpu.dr7 >> 16 + 4 * i & 3 == 2 and start < port + n and port < start + length:
            cpu.trap_bits |= 1 << i


def port_in(cpu: Cpu, port: int, n: int) -> int:
    """Read ``n`` bytes from a port."""
    io_watch(cpu, port, n)
    return int.from_bytes(cpu.device_read(Io(port, n, False), n), "little")


def port_out(cpu: Cpu, port: int, n: int, value: int) -> None:
    """Write ``n`` bytes to a port."""
    io_watch(cpu, port, n)
    cpu.device_write(Io(port, n, True, (value & MASK[8 * n]).to_bytes(n, "little")))


def io_size(insn: Insn, byte: bool) -> int:
    """Operand size of an I/O instruction in bits: REX.W does not widen it."""
    return 8 if byte else min(insn.opsize, 32)


def _port(insn: Insn, fixed: bool) -> Callable[[Cpu], int]:
    if fixed:
        number = insn.imm & 0xFF
        return lambda cpu: number
    return lambda cpu: cpu.gpr[RDX] & 0xFFFF


def in_(insn: Insn, byte: bool, fixed: bool) -> Operation:
    """IN AL/AX/EAX, imm8 or DX."""
    size, port = io_size(insn, byte), _port(insn, fixed)

    def op(cpu: Cpu) -> None:
        number = port(cpu)
        io_allowed(cpu, number, size >> 3)
        cpu.write_reg(size, RAX, port_in(cpu, number, size >> 3))

    return op


def out(insn: Insn, byte: bool, fixed: bool) -> Operation:
    """OUT imm8 or DX, AL/AX/EAX."""
    size, port = io_size(insn, byte), _port(insn, fixed)

    def op(cpu: Cpu) -> None:
        number = port(cpu)
        io_allowed(cpu, number, size >> 3)
        port_out(cpu, number, size >> 3, cpu.gpr[RAX])

    return op


def hlt(insn: Insn) -> Operation:
    """HLT: privileged; the machine stops behind it (SDM vol. 2A HLT)."""

    def op(cpu: Cpu) -> None:
        privileged(cpu)
        cpu.device_write(Halt())

    return op


def _virtual(cpu: Cpu) -> bool:
    """Whether CLI and STI act on VIF; #GP(0) when they may not act at all (SDM vol. 2A CLI table 3-7)."""
    if not cpu.pe or cpu.cpl <= (cpu.rflags & IOPL) >> 12:
        return False
    if cpu.cr4 & (_CR4_VME if cpu.vm86 else _CR4_PVI) and cpu.cpl == 3:
        return True
    raise Fault(GP, 0)


def cli(insn: Insn) -> Operation:
    """CLI."""

    def op(cpu: Cpu) -> None:
        cpu.rflags &= ~(VIF if _virtual(cpu) else IF)

    return op


def sti(insn: Insn) -> Operation:
    """STI: interrupts stay off for one more instruction if IF was clear (SDM vol. 2B STI)."""

    def op(cpu: Cpu) -> None:
        if _virtual(cpu):
            if cpu.rflags & VIP:
                raise Fault(GP, 0)
            cpu.rflags |= VIF
            return
        if not cpu.rflags & IF:
            cpu.rflags |= IF
            cpu.shadow = SHADOW_STI

    return op


PORT_ROWS: Final = [
    Row("in", "E4", "AL,Ib", lambda i: in_(i, True, True), "SDM 2A IN"),
    Row("in", "E5", "eAX,Ib", lambda i: in_(i, False, True), "SDM 2A IN"),
    Row("in", "EC", "AL,DX", lambda i: in_(i, True, False), "SDM 2A IN"),
    Row("in", "ED", "eAX,DX", lambda i: in_(i, False, False), "SDM 2A IN"),
    Row("out", "E6", "Ib,AL", lambda i: out(i, True, True), "SDM 2B OUT"),
    Row("out", "E7", "Ib,eAX", lambda i: out(i, False, True), "SDM 2B OUT"),
    Row("out", "EE", "DX,AL", lambda i: out(i, True, False), "SDM 2B OUT"),
    Row("out", "EF", "DX,eAX", lambda i: out(i, False, False), "SDM 2B OUT"),
    Row("cli", "FA", "", cli, "SDM 2A CLI", writes="I"),
    Row("sti", "FB", "", sti, "SDM 2B STI", writes="I"),
    Row("hlt", "F4", "", hlt, "SDM 2A HLT"),
]
