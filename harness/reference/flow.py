"""Near control transfers, and the instructions on RFLAGS: PUSHF, POPF, LAHF, SAHF, CLC ... STI."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from harness.reference.cpu import (
    AC,
    AF,
    ARITH,
    CF,
    CS,
    DF,
    GP,
    ID,
    IF,
    IOPL,
    MASK,
    NT,
    PF,
    RAX,
    RCX,
    RF,
    SF,
    SS,
    TF,
    UD,
    VIF,
    VIP,
    VM,
    ZF,
    Cpu,
    Fault,
    ModelError,
)
from harness.reference.data import CONDITIONS, condition
from harness.reference.insn import Insn, Operation, Row, undefined_opcode

_CR4_VME, _CR4_PVI = 1, 2

# --- near transfers -------------------------------------------------------------------------------------------------


def _jump(insn: Insn) -> Callable[[Cpu], None]:
    """A function that goes to the relative target."""
    displacement, size = insn.imm, insn.opsize
    mask, bits = MASK[size], insn.bits

    def wide(cpu: Cpu) -> None:
        target = (cpu.rip + displacement) & mask
        if not cpu.canonical(target):
            raise Fault(GP, 0)
        cpu.rip = target

    def narrow(cpu: Cpu) -> None:
        target = (cpu.rip + displacement) & mask
        if target > cpu.seg[CS].limit:
            raise Fault(GP, 0)
        cpu.rip = target

    return wide if bits == 64 else narrow


def _jcc(cc: int) -> Callable[[Insn], Operation]:
    test = condition(cc)

    def operation(insn: Insn) -> Operation:
        jump = _jump(insn)

        def op(cpu: Cpu) -> None:
            if test(cpu):
                jump(cpu)

        return op

    return operation


def _jmp_absolute(insn: Insn) -> Operation:
    read, size = insn.read(0), insn.opsize
    return lambda cpu: cpu.set_rip(read(cpu), size)


def _call(relative: bool) -> Callable[[Insn], Operation]:
    def operation(insn: Insn) -> Operation:
        size, displacement = insn.opsize, insn.imm
        read = None if relative else insn.read(0)

        def op(cpu: Cpu) -> None:
            target = cpu.check_rip(cpu.rip + displacement if read is None else read(cpu), size)
            cpu.push(cpu.rip, size)
            cpu.rip = target

        return op

    return operation


def _ret(insn: Insn) -> Operation:
    size, release = insn.opsize, insn.imm

    def op(cpu: Cpu) -> None:
        top = cpu.sp()
        cpu.rip = cpu.check_rip(cpu.mem.read(SS, top, size >> 3), size)
        cpu.set_sp(top + (size >> 3) + release)

    return op


def _loop(kind: str) -> Callable[[Insn], Operation]:
    """LOOP, LOOPE, LOOPNE: the counter is rCX of the address size; no flag is written.

    F2 and F3 on LOOPE and LOOPNE are reserved (SDM vol. 2A 2.1.1), and matter: AMD silicon obeys them.
    """

    def operation(insn: Insn) -> Operation:
        if insn.rep and kind != "loop":
            raise ModelError(f"{insn.code.hex(' ')}: a repeat prefix on {kind} is reserved")
        jump, size = _jump(insn), insn.addrsize

        def op(cpu: Cpu) -> None:
            count = cpu.gpr[RCX] - 1 & MASK[size]
            if count and (kind == "loop" or bool(cpu.flags(ZF)) is (kind == "loope")):
                jump(cpu)
            cpu.write_reg(size, RCX, count)

        return op

    return operation


def _jrcxz(insn: Insn) -> Operation:
    jump, mask = _jump(insn), MASK[insn.addrsize]

    def op(cpu: Cpu) -> None:
        if not cpu.gpr[RCX] & mask:
            jump(cpu)

    return op


# --- flags ----------------------------------------------------------------------------------------------------------


def _change(mask: int, value: int) -> Callable[[Insn], Operation]:
    """CLC, STC, CLD, STD."""

    def op(cpu: Cpu) -> None:
        cpu.rflags = cpu.rflags & ~mask | value
        cpu.undefined &= ~mask

    return lambda insn: op


def _cmc(insn: Insn) -> Operation:
    def op(cpu: Cpu) -> None:
        cpu.rflags ^= CF

    return op


_LOW = SF | ZF | AF | PF | CF


def _long_mode_only(insn: Insn, op: Operation) -> Operation:
    """LAHF and SAHF in 64-bit mode need CPUID.80000001H:ECX[0]."""
    if insn.bits != 64:
        return op

    def checked(cpu: Cpu) -> None:
        if "lahf_lm" not in cpu.features:
            raise Fault(UD)
        op(cpu)

    return checked


def _lahf(insn: Insn) -> Operation:
    def op(cpu: Cpu) -> None:
        cpu.gpr[RAX] = cpu.gpr[RAX] & ~0xFF00 | (cpu.flags(_LOW) | 2) << 8

    return _long_mode_only(insn, op)


def _sahf(insn: Insn) -> Operation:
    def op(cpu: Cpu) -> None:
        cpu.rflags = cpu.rflags & ~_LOW | cpu.gpr[RAX] >> 8 & _LOW
        cpu.undefined &= ~_LOW

    return _long_mode_only(insn, op)


def _iopl(cpu: Cpu) -> int:
    return cpu.rflags >> 12 & 3


def _pushf(insn: Insn) -> Operation:
    """PUSHF: VM and RF read as zero (SDM vol. 2B). Bits that are undefined are undefined in memory then."""
    size = insn.opsize

    def op(cpu: Cpu) -> None:
        image = cpu.rflags & ~(VM | RF)
        if cpu.vm86 and _iopl(cpu) < 3:
            if not cpu.cr4 & _CR4_VME or size != 16:
                raise Fault(GP, 0)
            image = image & ~IF | IOPL | (IF if cpu.rflags & VIF else 0)
        top = cpu.sp() - (size >> 3) & MASK[cpu.stack_bits]
        cpu.mem.write(SS, top, size >> 3, image & MASK[size], undefined=cpu.undefined)
        cpu.set_sp(top)

    return op


def _popf(insn: Insn) -> Operation:
    """POPF (SDM vol. 2B table 4-16): IOPL is CPL 0's to change, IF that of CPL <= IOPL, VM, VIF and VIP nobody's."""
    size = insn.opsize

    def op(cpu: Cpu) -> None:
        top = cpu.sp()
        image, undefined = cpu.mem.read_undefined(SS, top, size >> 3)
        mask = ARITH | TF | DF | NT
        if size > 16:
            mask |= AC | ID
        if cpu.vm86 and _iopl(cpu) < 3:
            if not cpu.cr4 & _CR4_VME or size != 16:
                raise Fault(GP, 0)
            if image & TF or (image & IF and cpu.rflags & VIP):
                raise Fault(GP, 0)
            cpu.rflags = cpu.rflags & ~VIF | (VIF if image & IF else 0)
        else:
            if cpu.cpl == 0:
                mask |= IF | IOPL
            elif cpu.cpl <= _iopl(cpu):
                mask |= IF
        cpu.rflags = cpu.rflags & ~(mask | RF) | image & mask
        cpu.undefined = undefined & ARITH
        cpu.set_sp(top + (size >> 3))

    return op


def _jcc_rows() -> list[Row]:
    rows = []
    for cc, name in enumerate(CONDITIONS):
        rows.append(Row(f"j{name}", f"{0x70 + cc:02X}", "Jb", _jcc(cc), "SDM 2A Jcc", size="n64"))
        rows.append(Row(f"j{name}", f"0F {0x80 + cc:02X}", "Jz", _jcc(cc), "SDM 2A Jcc", size="n64"))
    return rows


FLOW_ROWS: Final[list[Row]] = [
    *_jcc_rows(),
    Row("jmp", "EB", "Jb", _jump, "SDM 2A JMP", size="n64"),
    Row("jmp", "E9", "Jz", _jump, "SDM 2A JMP", size="n64"),
    Row("jmp", "FF /4", "Ev", _jmp_absolute, "SDM 2A JMP", size="n64"),
    Row("jmpabs", "REX2 A1", "Iq", _jmp_absolute, "APX 4 JMPABS", size="f64", modes="64"),
    Row("call", "E8", "Jz", _call(True), "SDM 2A CALL", size="n64"),
    Row("call", "FF /2", "Ev", _call(False), "SDM 2A CALL", size="n64"),
    Row("ret", "C3", "", _ret, "SDM 2B RET", size="n64"),
    Row("ret", "C2", "Iw", _ret, "SDM 2B RET", size="n64"),
    Row("loopne", "E0", "Jb", _loop("loopne"), "SDM 2A LOOP/LOOPcc", size="n64"),
    Row("loope", "E1", "Jb", _loop("loope"), "SDM 2A LOOP/LOOPcc", size="n64"),
    Row("loop", "E2", "Jb", _loop("loop"), "SDM 2A LOOP/LOOPcc", size="n64"),
    Row("jrcxz", "E3", "Jb", _jrcxz, "SDM 2A Jcc", size="n64"),
    Row("pushf", "9C", "", _pushf, "SDM 2B PUSHF", size="d64"),
    Row("popf", "9D", "", _popf, "SDM 2B POPF", "OSZAPCDI", size="d64"),
    Row("lahf", "9F", "", _lahf, "SDM 2A LAHF"),
    Row("sahf", "9E", "", _sahf, "SDM 2B SAHF", "SZAPC"),
    Row("cmc", "F5", "", _cmc, "SDM 2A CMC", "C"),
    Row("clc", "F8", "", _change(CF, 0), "SDM 2A CLC", "C"),
    Row("stc", "F9", "", _change(CF, CF), "SDM 2B STC", "C"),
    Row("cld", "FC", "", _change(DF, 0), "SDM 2A CLD", "D"),
    Row("std", "FD", "", _change(DF, DF), "SDM 2B STD", "D"),
    Row("(bad)", "D6", "", undefined_opcode, "SDM 2D table A-2", modes="64"),
]
