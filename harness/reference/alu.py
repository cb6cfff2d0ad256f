"""Integer arithmetic and logic: ADD..CMP, TEST, INC, DEC, NEG, NOT, MUL, DIV, the BCD adjustments, ADCX and ADOX.

Every flag is computed eagerly.  A function made here for one operand size takes (cpu, a, b), sets the flags and
returns the result; the operations glue it to operands.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from harness.reference.cpu import AF, ARITH, CF, DE, MASK, OF, PF, RAX, RDX, SF, ZF, Cpu, Fault
from harness.reference.insn import Insn, Operation, Row, undefined_opcode

PARITY: Final = tuple(PF if bin(i).count("1") % 2 == 0 else 0 for i in range(256))
"""PF for each low result byte (SDM vol. 1 3.4.3.1)."""
_KEEP: Final = ~ARITH
Binary = Callable[[Cpu, int, int], int]
Unary = Callable[[Cpu, int], int]


def result_flags(value: int, size: int) -> int:
    """SF, ZF and PF of a result."""
    return PARITY[value & 0xFF] | (ZF if not value else 0) | (SF if value >> (size - 1) & 1 else 0)


# --- two operands ---------------------------------------------------------------------------------------------------


def make_add(size: int, with_carry: bool = False) -> Binary:
    """ADD, ADC (SDM vol. 2A)."""
    mask, sign = MASK[size], 1 << (size - 1)

    def add(cpu: Cpu, a: int, b: int) -> int:
        total = a + b
        if with_carry:
            total += cpu.flags(CF)
        r = total & mask
        f = cpu.rflags & _KEEP | PARITY[r & 0xFF] | (a ^ b ^ r) & AF
        if total > mask:
            f |= CF
        if not r:
            f |= ZF
        elif r & sign:
            f |= SF
        if (a ^ r) & (b ^ r) & sign:
            f |= OF
        cpu.rflags = f
        cpu.undefined = 0
        return r

    return add


def make_sub(size: int, with_borrow: bool = False) -> Binary:
    """SUB, SBB, CMP, NEG (SDM vol. 2B)."""
    mask, sign = MASK[size], 1 << (size - 1)

    def sub(cpu: Cpu, a: int, b: int) -> int:
        total = a - b
        if with_borrow:
            total -= cpu.flags(CF)
        r = total & mask
        f = cpu.rflags & _KEEP | PARITY[r & 0xFF] | (a ^ b ^ r) & AF
        if total < 0:
            f |= CF
        if not r:
            f |= ZF
        elif r & sign:
            f |= SF
        if (a ^ b) & (a ^ r) & sign:
            f |= OF
        cpu.rflags = f
        cpu.undefined = 0
        return r

    return sub


def make_logic(kind: str) -> Callable[[int], Binary]:
    """AND, OR, XOR: OF and CF clear, AF undefined (SDM vol. 1 7.3.10 and appendix A)."""

    def make(size: int) -> Binary:
        sign = 1 << (size - 1)

        def finish(cpu: Cpu, r: int) -> int:
            f = cpu.rflags & (_KEEP | AF) | PARITY[r & 0xFF]
            if not r:
                f |= ZF
            elif r & sign:
                f |= SF
            cpu.rflags = f
            cpu.undefined = AF
            return r

        if kind == "and":
            return lambda cpu, a, b: finish(cpu, a & b)
        if kind == "or":
            return lambda cpu, a, b: finish(cpu, a | b)
        return lambda cpu, a, b: finish(cpu, a ^ b)

    return make


MAKERS: Final[dict[str, Callable[[int], Binary]]] = {
    "add": make_add, "or": make_logic("or"), "adc": lambda size: make_add(size, True),
    "sbb": lambda size: make_sub(size, True), "and": make_logic("and"), "sub": make_sub, "xor": make_logic("xor"),
    "cmp": make_sub,
}  # fmt: skip
FUNCTIONS: Final = {(name, size): make(size) for name, make in MAKERS.items() for size in (8, 16, 32, 64)}


def write_back(name: str) -> Callable[[Insn], Operation]:
    """``operand0 = f(operand0, operand1)``."""

    def operation(insn: Insn) -> Operation:
        f, source = FUNCTIONS[name, insn.sizes[0]], insn.read(1)
        return insn.update(0, lambda cpu, a: f(cpu, a, source(cpu)))

    return operation


def flags_only(name: str) -> Callable[[Insn], Operation]:
    """CMP and TEST: the flags of ``f(operand0, operand1)``."""

    def operation(insn: Insn) -> Operation:
        f, left, right = FUNCTIONS[name, insn.sizes[0]], insn.read(0), insn.read(1)

        def op(cpu: Cpu) -> None:
            f(cpu, left(cpu), right(cpu))

        return op

    return operation


# --- one operand ----------------------------------------------------------------------------------------------------


def _step(delta: int) -> Callable[[Insn], Operation]:
    """INC, DEC: as ADD and SUB of 1, CF left alone (SDM vol. 2A)."""

    def operation(insn: Insn) -> Operation:
        size = insn.sizes[0]
        mask, sign = MASK[size], 1 << (size - 1)
        overflow = sign if delta > 0 else sign - 1
        keep = _KEEP | CF

        def f(cpu: Cpu, a: int) -> int:
            r = a + delta & mask
            flags = cpu.rflags & keep | PARITY[r & 0xFF] | (a ^ 1 ^ r) & AF
            if not r:
                flags |= ZF
            elif r & sign:
                flags |= SF
            if r == overflow:
                flags |= OF
            cpu.rflags = flags
            cpu.undefined &= CF
            return r

        return insn.update(0, f)

    return operation


def _neg(insn: Insn) -> Operation:
    sub = FUNCTIONS["sub", insn.sizes[0]]
    return insn.update(0, lambda cpu, a: sub(cpu, 0, a))


def _not(insn: Insn) -> Operation:
    mask = MASK[insn.sizes[0]]
    return insn.update(0, lambda cpu, a: a ^ mask)


# --- multiply, divide -----------------------------------------------------------------------------------------------


def signed(value: int, size: int) -> int:
    """Two's complement value of ``size`` bits as a Python int."""
    return value - (1 << size) if value >> (size - 1) & 1 else value


def _carry_overflow(cpu: Cpu, lost: bool) -> None:
    """CF = OF = ``lost``; SF, ZF, AF, PF undefined (SDM vol. 2A IMUL, vol. 2B MUL)."""
    cpu.rflags = cpu.rflags & ~(CF | OF) | ((CF | OF) if lost else 0)
    cpu.undefined = SF | ZF | AF | PF


def _multiply(is_signed: bool) -> Callable[[Insn], Operation]:
    """MUL, IMUL with one operand: the product in AX or rDX:rAX."""

    def operation(insn: Insn) -> Operation:
        size, source = insn.sizes[0], insn.read(0)
        mask = MASK[size]

        def op(cpu: Cpu) -> None:
            a, b = cpu.read_reg(size, RAX), source(cpu)
            product = signed(a, size) * signed(b, size) if is_signed else a * b
            low, high = product & mask, product >> size & mask
            if size == 8:
                cpu.write_reg(16, RAX, product)
            else:
                cpu.write_reg(size, RAX, low)
                cpu.write_reg(size, RDX, high)
            _carry_overflow(cpu, product != signed(low, size) if is_signed else high != 0)

        return op

    return operation


def _imul(insn: Insn) -> Operation:
    """IMUL with two or three operands: the truncated product."""
    size, write = insn.sizes[0], insn.write(0)
    left, right = insn.read(len(insn.operands) - 2), insn.read(len(insn.operands) - 1)

    def op(cpu: Cpu) -> None:
        product = signed(left(cpu), size) * signed(right(cpu), size)
        low = product & MASK[size]
        write(cpu, low)
        _carry_overflow(cpu, product != signed(low, size))

    return op


def _divide(is_signed: bool) -> Callable[[Insn], Operation]:
    """DIV, IDIV: #DE when the divisor is zero or the quotient does not fit; all status flags undefined."""

    def operation(insn: Insn) -> Operation:
        size, source = insn.sizes[0], insn.read(0)
        mask = MASK[size]

        def op(cpu: Cpu) -> None:
            divisor = source(cpu)
            high = cpu.read_reg(size, RDX) if size > 8 else cpu.gpr[RAX] >> 8 & 0xFF
            dividend = high << size | cpu.read_reg(size, RAX)
            if divisor == 0:
                raise Fault(DE)
            if is_signed:
                dividend, divisor = signed(dividend, 2 * size), signed(divisor, size)
                quotient = abs(dividend) // abs(divisor)
                if (dividend < 0) != (divisor < 0):
                    quotient = -quotient
                if not -(1 << (size - 1)) <= quotient < 1 << (size - 1):
                    raise Fault(DE)
            else:
                quotient = dividend // divisor
                if quotient > mask:
                    raise Fault(DE)
            remainder = dividend - quotient * divisor
            if size == 8:
                cpu.write_reg(16, RAX, (remainder & 0xFF) << 8 | quotient & 0xFF)
            else:
                cpu.write_reg(size, RAX, quotient & mask)
                cpu.write_reg(size, RDX, remainder & mask)
            cpu.undefined = ARITH

        return op

    return operation


# --- BCD (SDM vol. 2A: AAA, AAD, AAM, AAS, DAA, DAS; not in 64-bit mode) ---------------------------------------------


def _set_status(cpu: Cpu, value: int, undefined: int) -> None:
    cpu.rflags = cpu.rflags & ~(ARITH & ~undefined) | value & ~undefined
    cpu.undefined = undefined


def _decimal(subtract: bool) -> Callable[[Insn], Operation]:
    """DAA, DAS."""

    def op(cpu: Cpu) -> None:
        al, flags = cpu.gpr[RAX] & 0xFF, cpu.flags(AF | CF)
        sign = -1 if subtract else 1
        new, out = al, 0
        if al & 0xF > 9 or flags & AF:
            new += 6 * sign
            out |= AF
            if subtract and (al < 6):
                out |= CF
        if al > 0x99 or flags & CF:
            new += 0x60 * sign
            out |= CF
        elif not subtract:
            out &= ~CF
        elif flags & CF:
            out |= CF
        cpu.write_reg(8, RAX, new)
        _set_status(cpu, out | result_flags(new & 0xFF, 8), OF)

    return lambda insn: op


def _ascii(subtract: bool) -> Callable[[Insn], Operation]:
    """AAA, AAS."""

    def op(cpu: Cpu) -> None:
        ax, out = cpu.gpr[RAX] & 0xFFFF, 0
        if ax & 0xF > 9 or cpu.flags(AF):
            ax = (ax - 6 - 0x100 if subtract else ax + 0x106) & 0xFFFF
            out = AF | CF
        cpu.write_reg(16, RAX, ax & 0xFF0F)
        _set_status(cpu, out, OF | SF | ZF | PF)

    return lambda insn: op


def _aam(insn: Insn) -> Operation:
    base = insn.imm

    def op(cpu: Cpu) -> None:
        if base == 0:
            raise Fault(DE)
        high, low = divmod(cpu.gpr[RAX] & 0xFF, base)
        cpu.write_reg(16, RAX, high << 8 | low)
        _set_status(cpu, result_flags(low, 8), OF | AF | CF)

    return op


def _aad(insn: Insn) -> Operation:
    base = insn.imm

    def op(cpu: Cpu) -> None:
        ax = cpu.gpr[RAX] & 0xFFFF
        al = (ax & 0xFF) + (ax >> 8) * base & 0xFF
        cpu.write_reg(16, RAX, al)
        _set_status(cpu, result_flags(al, 8), OF | AF | CF)

    return op


def _salc(insn: Insn) -> Operation:
    """AL = CF ? FF : 0. Undocumented, on every processor; the bare CPU decides."""

    def op(cpu: Cpu) -> None:
        cpu.write_reg(8, RAX, 0xFF if cpu.flags(CF) else 0)

    return op


def _carry_chain(flag: int) -> Callable[[Insn], Operation]:
    """ADCX, ADOX: an addition whose only carry in and out is CF, or OF."""

    def operation(insn: Insn) -> Operation:
        size, a, b, write = insn.sizes[0], insn.read(0), insn.read(1), insn.write(0)

        def op(cpu: Cpu) -> None:
            total = a(cpu) + b(cpu) + bool(cpu.flags(flag))
            write(cpu, total & MASK[size])
            cpu.rflags = cpu.rflags & ~flag | (flag if total >> size else 0)

        return op

    return operation


# --- rows -----------------------------------------------------------------------------------------------------------


def _eight() -> list[Row]:
    """The six encodings of ADD, OR, ADC, SBB, AND, SUB, XOR, CMP and their immediate group (SDM vol. 2D table A-6)."""
    rows = []
    for n, name in enumerate(MAKERS):
        logic = name in ("and", "or", "xor")
        writes, undefined = ("OSZPC", "A") if logic else ("OSZAPC", "")
        section = f"SDM 2{'B' if name in ('or', 'sbb', 'sub', 'xor') else 'A'} {name.upper()}"
        operation = flags_only(name) if name == "cmp" else write_back(name)
        base = n << 3
        forms = (
            (f"{base:02X} /r", "Eb,Gb", "all"), (f"{base + 1:02X} /r", "Ev,Gv", "all"),
            (f"{base + 2:02X} /r", "Gb,Eb", "all"), (f"{base + 3:02X} /r", "Gv,Ev", "all"),
            (f"{base + 4:02X}", "AL,Ib", "all"), (f"{base + 5:02X}", "rAX,Iz", "all"), (f"80 /{n}", "Eb,Ib", "all"),
            (f"81 /{n}", "Ev,Iz", "all"), (f"82 /{n}", "Eb,Ib", "no64"), (f"83 /{n}", "Ev,Ibs", "all"),
        )  # fmt: skip
        rows += [
            Row(name, opcode, operands, operation, section, writes, undefined, modes=modes, lock=name != "cmp")
            for opcode, operands, modes in forms
        ]
    return rows


_TEST, _MUL, _ALL = flags_only("and"), "SZAP", "OSZAPC"
ALU_ROWS: Final[list[Row]] = [
    *_eight(),
    Row("test", "84 /r", "Eb,Gb", _TEST, "SDM 2B TEST", "OSZPC", "A"),
    Row("test", "85 /r", "Ev,Gv", _TEST, "SDM 2B TEST", "OSZPC", "A"),
    Row("test", "A8", "AL,Ib", _TEST, "SDM 2B TEST", "OSZPC", "A"),
    Row("test", "A9", "rAX,Iz", _TEST, "SDM 2B TEST", "OSZPC", "A"),
    # /1 is an alias of /0 that the manuals leave out of the instruction's page (SDM 2D table A-6 note; APM 3 A.2).
    *(Row("test", f"F6 /{n}", "Eb,Ib", _TEST, "SDM 2B TEST", "OSZPC", "A") for n in (0, 1)),
    *(Row("test", f"F7 /{n}", "Ev,Iz", _TEST, "SDM 2B TEST", "OSZPC", "A") for n in (0, 1)),
    Row("not", "F6 /2", "Eb", _not, "SDM 2B NOT", lock=True),
    Row("not", "F7 /2", "Ev", _not, "SDM 2B NOT", lock=True),
    Row("neg", "F6 /3", "Eb", _neg, "SDM 2B NEG", _ALL, lock=True),
    Row("neg", "F7 /3", "Ev", _neg, "SDM 2B NEG", _ALL, lock=True),
    Row("mul", "F6 /4", "Eb", _multiply(False), "SDM 2B MUL", "OC", _MUL),
    Row("mul", "F7 /4", "Ev", _multiply(False), "SDM 2B MUL", "OC", _MUL),
    Row("imul", "F6 /5", "Eb", _multiply(True), "SDM 2A IMUL", "OC", _MUL),
    Row("imul", "F7 /5", "Ev", _multiply(True), "SDM 2A IMUL", "OC", _MUL),
    Row("imul", "0F AF /r", "Gv,Ev", _imul, "SDM 2A IMUL", "OC", _MUL),
    Row("imul", "69 /r", "Gv,Ev,Iz", _imul, "SDM 2A IMUL", "OC", _MUL),
    Row("imul", "6B /r", "Gv,Ev,Ibs", _imul, "SDM 2A IMUL", "OC", _MUL),
    Row("div", "F6 /6", "Eb", _divide(False), "SDM 2A DIV", "", _ALL),
    Row("div", "F7 /6", "Ev", _divide(False), "SDM 2A DIV", "", _ALL),
    Row("idiv", "F6 /7", "Eb", _divide(True), "SDM 2A IDIV", "", _ALL),
    Row("idiv", "F7 /7", "Ev", _divide(True), "SDM 2A IDIV", "", _ALL),
    Row("inc", "FE /0", "Eb", _step(1), "SDM 2A INC", "OSZAP", lock=True),
    Row("inc", "FF /0", "Ev", _step(1), "SDM 2A INC", "OSZAP", lock=True),
    Row("inc", "40+r", "Zv", _step(1), "SDM 2A INC", "OSZAP", modes="no64"),
    Row("dec", "FE /1", "Eb", _step(-1), "SDM 2A DEC", "OSZAP", lock=True),
    Row("dec", "FF /1", "Ev", _step(-1), "SDM 2A DEC", "OSZAP", lock=True),
    Row("dec", "48+r", "Zv", _step(-1), "SDM 2A DEC", "OSZAP", modes="no64"),
    *(Row("(bad)", f"FE /{n}", "", undefined_opcode, "SDM 2D table A-6") for n in range(2, 8)),
    Row("(bad)", "FF /7", "", undefined_opcode, "SDM 2D table A-6"),
    Row("daa", "27", "", _decimal(False), "SDM 2A DAA", "SZAPC", "O", modes="no64"),
    Row("das", "2F", "", _decimal(True), "SDM 2A DAS", "SZAPC", "O", modes="no64"),
    Row("aaa", "37", "", _ascii(False), "SDM 2A AAA", "AC", "OSZP", modes="no64"),
    Row("aas", "3F", "", _ascii(True), "SDM 2A AAS", "AC", "OSZP", modes="no64"),
    Row("aam", "D4", "Ib", _aam, "SDM 2A AAM", "SZP", "OAC", modes="no64"),
    Row("salc", "D6", "", _salc, "AMD K86 code optimization guide; in no manual of Intel's", modes="no64"),
    Row("aad", "D5", "Ib", _aad, "SDM 2A AAD", "SZP", "OAC", modes="no64"),
    Row("adcx", "66 0F 38 F6 /r", "Gy,Ey", _carry_chain(CF), "SDM 2A ADCX", "C", feature="adx"),
    Row("adox", "F3 0F 38 F6 /r", "Gy,Ey", _carry_chain(OF), "SDM 2A ADOX", "O", feature="adx"),
]
