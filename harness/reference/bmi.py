"""BMI1 and BMI2: instructions on GPRs with a VEX prefix, and with an EVEX one where APX is enabled.

SDM vol. 2 under each name. They need neither CR4.OSXSAVE nor XCR0 (exception type 13, SDM vol. 2A 2.5.1).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from harness.reference.alu import result_flags, signed
from harness.reference.cpu import AF, ARITH, CF, MASK, PF, RDX, SF, ZF, Cpu
from harness.reference.insn import Insn, Operation, Row
from harness.reference.segments import protected_only

Compute = Callable[[Cpu, int, int, int], int]
"""(cpu, size, first source, second source) -> result, flags set."""


def _finish(cpu: Cpu, flags: int, undefined: int) -> None:
    cpu.rflags = cpu.rflags & ~(ARITH & ~undefined) | flags & ~undefined
    cpu.undefined = undefined


def _andn(cpu: Cpu, size: int, a: int, b: int) -> int:
    r = ~a & b
    _finish(cpu, result_flags(r, size), AF | PF)
    return r


def _bextr(cpu: Cpu, size: int, a: int, control: int) -> int:
    """A start past the operand gives zero, a length past it means all the rest."""
    r = a >> (control & 0xFF) & (1 << (control >> 8 & 0xFF)) - 1
    _finish(cpu, 0 if r else ZF, AF | SF | PF)
    return r


def _blsi(cpu: Cpu, size: int, a: int, _: int) -> int:
    r = a & -a
    _finish(cpu, result_flags(r, size) | (CF if a else 0), AF | PF)
    return r


def _blsmsk(cpu: Cpu, size: int, a: int, _: int) -> int:
    r = (a ^ a - 1) & MASK[size]
    _finish(cpu, result_flags(r, size) & ~ZF | (0 if a else CF), AF | PF)
    return r


def _blsr(cpu: Cpu, size: int, a: int, _: int) -> int:
    r = a & a - 1 & MASK[size]
    _finish(cpu, result_flags(r, size) | (0 if a else CF), AF | PF)
    return r


def _bzhi(cpu: Cpu, size: int, a: int, index: int) -> int:
    n = index & 0xFF
    r = a & (1 << n) - 1
    _finish(cpu, result_flags(r, size) | (CF if n >= size else 0), AF | PF)
    return r


def _pdep(cpu: Cpu, size: int, a: int, mask: int) -> int:
    r = k = 0
    while mask:
        low = mask & -mask
        if a >> k & 1:
            r |= low
        mask ^= low
        k += 1
    return r


def _pext(cpu: Cpu, size: int, a: int, mask: int) -> int:
    r = k = 0
    while mask:
        low = mask & -mask
        if a & low:
            r |= 1 << k
        mask ^= low
        k += 1
    return r


def _rorx(cpu: Cpu, size: int, a: int, count: int) -> int:
    n = count & (size - 1)
    return (a >> n | a << (size - n)) & MASK[size]


def _sarx(cpu: Cpu, size: int, a: int, count: int) -> int:
    return signed(a, size) >> (count & (size - 1)) & MASK[size]


def _shlx(cpu: Cpu, size: int, a: int, count: int) -> int:
    return a << (count & (size - 1)) & MASK[size]


def _shrx(cpu: Cpu, size: int, a: int, count: int) -> int:
    return a >> (count & (size - 1))


def keep_flags(op: Operation) -> Operation:
    """``op`` without its effect on the status flags (EVEX.NF)."""

    def no_flags(cpu: Cpu) -> None:
        before, undefined = cpu.rflags & ARITH, cpu.undefined
        op(cpu)
        cpu.rflags, cpu.undefined = cpu.rflags & ~ARITH | before, undefined

    return no_flags


def _guard(insn: Insn, op: Operation) -> Operation:
    """A VEX prefix exists in protected mode only (SDM vol. 2A 2.3.1)."""
    if insn.nf:
        return keep_flags(op)
    if insn.bits == 64:
        return op

    def checked(cpu: Cpu) -> None:
        protected_only(cpu)
        op(cpu)

    return checked


def _gpr(compute: Compute) -> Callable[[Insn], Operation]:
    """``operand0 = compute(operand1, operand2)``; without operand 2, of operand 1 alone."""

    def operation(insn: Insn) -> Operation:
        size, write, first = insn.sizes[0], insn.write(0), insn.read(1)
        second = insn.read(2) if len(insn.operands) > 2 else lambda cpu: 0

        def op(cpu: Cpu) -> None:
            a, b = first(cpu), second(cpu)
            write(cpu, compute(cpu, size, a, b))

        return _guard(insn, op)

    return operation


def _mulx(insn: Insn) -> Operation:
    """MULX: the low half to operand 1, then the high half to operand 0; no flags (SDM vol. 2B MULX)."""
    size, high, low, source = insn.sizes[0], insn.write(0), insn.write(1), insn.read(2)

    def op(cpu: Cpu) -> None:
        product = (cpu.gpr[RDX] & MASK[size]) * source(cpu)
        low(cpu, product & MASK[size])
        high(cpu, product >> size)

    return _guard(insn, op)


# mnemonic, prefix fields, opcode, operands, operation, section, written, undefined flags, feature, whether EVEX has NF
_TABLE: Final = (
    ("andn", "M2", "F2 /r", "Gy,By,Ey", _gpr(_andn), "SDM 2A ANDN", "OSZC", "AP", "bmi1", True),
    ("bextr", "M2", "F7 /r", "Gy,Ey,By", _gpr(_bextr), "SDM 2A BEXTR", "OZC", "SAP", "bmi1", True),
    ("blsr", "M2", "F3 /1", "By,Ey", _gpr(_blsr), "SDM 2A BLSR", "OSZC", "AP", "bmi1", True),
    ("blsmsk", "M2", "F3 /2", "By,Ey", _gpr(_blsmsk), "SDM 2A BLSMSK", "OSZC", "AP", "bmi1", True),
    ("blsi", "M2", "F3 /3", "By,Ey", _gpr(_blsi), "SDM 2A BLSI", "OSZC", "AP", "bmi1", True),
    ("bzhi", "M2", "F5 /r", "Gy,Ey,By", _gpr(_bzhi), "SDM 2A BZHI", "OSZC", "AP", "bmi2", True),
    ("mulx", "F2.M2", "F6 /r", "Gy,By,Ey", _mulx, "SDM 2B MULX", "", "", "bmi2", False),
    ("pdep", "F2.M2", "F5 /r", "Gy,By,Ey", _gpr(_pdep), "SDM 2B PDEP", "", "", "bmi2", False),
    ("pext", "F3.M2", "F5 /r", "Gy,By,Ey", _gpr(_pext), "SDM 2B PEXT", "", "", "bmi2", False),
    ("rorx", "F2.M3", "F0 /r", "Gy,Ey,Ib", _gpr(_rorx), "SDM 2B RORX", "", "", "bmi2", False),
    ("sarx", "F3.M2", "F7 /r", "Gy,Ey,By", _gpr(_sarx), "SDM 2B SARX/SHLX/SHRX", "", "", "bmi2", False),
    ("shlx", "66.M2", "F7 /r", "Gy,Ey,By", _gpr(_shlx), "SDM 2B SARX/SHLX/SHRX", "", "", "bmi2", False),
    ("shrx", "F2.M2", "F7 /r", "Gy,Ey,By", _gpr(_shrx), "SDM 2B SARX/SHLX/SHRX", "", "", "bmi2", False),
)


def _rows() -> list[Row]:
    rows = []
    for name, fields, code, operands, operation, section, writes, undefined, feature, nf in _TABLE:
        for prefix, modes in ((f"VEX.{fields}", "all"), (f"EVEX.{fields}{'.NF' * nf}", "64")):
            rows.append(
                Row(name, f"{prefix} {code}", operands, operation, section, writes, undefined, "y", modes, feature)
            )
    return rows


BMI_ROWS: Final[list[Row]] = _rows()
