"""Shifts, rotates, double shifts, bit tests, bit scans and bit counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from harness.reference.alu import result_flags
from harness.reference.cpu import AF, ARITH, CF, MASK, OF, PF, SF, ZF, Cpu, ModelError
from harness.reference.insn import Insn, Operation, Row

Shifter = Callable[[Cpu, int, int], int]
"""(cpu, value, masked non-zero count) -> result, flags set."""


def _finish_shift(cpu: Cpu, r: int, size: int, carry: int, overflow: int, count: int, lost: bool) -> int:
    """Flags of SHL, SHR, SAR: AF undefined, OF defined for a count of 1 only, CF undefined when ``lost``."""
    cpu.rflags = cpu.rflags & ~(ARITH & ~AF) | result_flags(r, size) | (CF if carry else 0) | (OF if overflow else 0)
    cpu.undefined = AF | (OF if count != 1 else 0) | (CF if lost else 0)
    return r


def _shl(size: int) -> Shifter:
    def f(cpu: Cpu, a: int, n: int) -> int:
        wide = a << n
        r = wide & MASK[size]
        carry = wide >> size & 1
        # CF is undefined for SHL and SHR by the operand size or more (SDM vol. 2B SAL/SAR/SHL/SHR, Flags Affected).
        return _finish_shift(cpu, r, size, carry, (r >> (size - 1)) ^ carry, n, n >= size)

    return f


def _shr(size: int) -> Shifter:
    def f(cpu: Cpu, a: int, n: int) -> int:
        return _finish_shift(cpu, a >> n, size, a >> (n - 1) & 1, a >> (size - 1), n, n >= size)

    return f


def _sar(size: int) -> Shifter:
    def f(cpu: Cpu, a: int, n: int) -> int:
        value = a - (1 << size) if a >> (size - 1) else a
        return _finish_shift(cpu, value >> n & MASK[size], size, value >> (n - 1) & 1, 0, n, False)

    return f


def _finish_rotate(cpu: Cpu, r: int, carry: int, overflow: int, count: int) -> int:
    """Flags of the rotates: CF, and OF for a count of 1; the others are left alone (SDM vol. 2B RCL/RCR/ROL/ROR)."""
    cpu.rflags = cpu.rflags & ~(CF | OF) | (CF if carry else 0) | (OF if overflow else 0)
    cpu.undefined = cpu.undefined & ~(CF | OF) | (OF if count != 1 else 0)
    return r


def _rol(size: int) -> Shifter:
    def f(cpu: Cpu, a: int, n: int) -> int:
        k = n % size
        r = (a << k | a >> (size - k)) & MASK[size]
        return _finish_rotate(cpu, r, r & 1, (r >> (size - 1)) ^ (r & 1), n)

    return f


def _ror(size: int) -> Shifter:
    def f(cpu: Cpu, a: int, n: int) -> int:
        k = n % size
        r = (a >> k | a << (size - k)) & MASK[size]
        top = r >> (size - 1)
        return _finish_rotate(cpu, r, top, top ^ (r >> (size - 2) & 1), n)

    return f


def _rcl(size: int) -> Shifter:
    def f(cpu: Cpu, a: int, n: int) -> int:
        k, width = n % (size + 1), size + 1
        wide = cpu.flags(CF) << size | a
        wide = (wide << k | wide >> (width - k)) & (1 << width) - 1
        r, carry = wide & MASK[size], wide >> size
        return _finish_rotate(cpu, r, carry, (r >> (size - 1)) ^ carry, n)

    return f


def _rcr(size: int) -> Shifter:
    def f(cpu: Cpu, a: int, n: int) -> int:
        k, width = n % (size + 1), size + 1
        wide = cpu.flags(CF) << size | a
        wide = (wide >> k | wide << (width - k)) & (1 << width) - 1
        r = wide & MASK[size]
        return _finish_rotate(cpu, r, wide >> size, (r >> (size - 1)) ^ (r >> (size - 2) & 1), n)

    return f


_SHIFTERS: Final = {"rol": _rol, "ror": _ror, "rcl": _rcl, "rcr": _rcr, "shl": _shl, "shr": _shr, "sar": _sar}


def _shift(name: str) -> Callable[[Insn], Operation]:
    """A count of zero changes no flag, and still writes the operand (a 32-bit register is zero-extended)."""

    def operation(insn: Insn) -> Operation:
        size, count = insn.sizes[0], insn.read(1)
        shifter, mask = _SHIFTERS[name](size), 63 if size == 64 else 31

        def f(cpu: Cpu, a: int) -> int:
            n = count(cpu) & mask
            return shifter(cpu, a, n) if n else a

        return insn.update(0, f)

    return operation


def _double_shift(left: bool) -> Callable[[Insn], Operation]:
    """SHLD, SHRD (SDM vol. 2B). A 16-bit operand shifted by more than 16: result and flags are undefined."""

    def operation(insn: Insn) -> Operation:
        size, filler, count = insn.sizes[0], insn.read(1), insn.read(2)
        mask = 63 if size == 64 else 31

        def f(cpu: Cpu, a: int) -> int:
            n = count(cpu) & mask
            if not n:
                return a
            if n > size:
                raise ModelError(f"{insn.text()} at {cpu.start_rip:#x}: a count above the operand size is undefined")
            b = filler(cpu)
            if left:
                r, carry = (a << n | b >> (size - n)) & MASK[size], a >> (size - n) & 1
            else:
                r, carry = (a >> n | b << (size - n)) & MASK[size], a >> (n - 1) & 1
            return _finish_shift(cpu, r, size, carry, (a ^ r) >> (size - 1), n, False)

        return insn.update(0, f)

    return operation


# --- bit tests ------------------------------------------------------------------------------------------------------

_BIT_EFFECT: Final[dict[str, Callable[[int, int], int]]] = {
    "bt": lambda a, bit: a, "bts": lambda a, bit: a | bit, "btr": lambda a, bit: a & ~bit,
    "btc": lambda a, bit: a ^ bit,
}  # fmt: skip


def _bit_test(name: str) -> Callable[[Insn], Operation]:
    """BT, BTS, BTR, BTC: CF is the bit; ZF unaffected, the others undefined.

    With a register as bit offset, memory is a bit string: the operand-sized unit that holds the bit is accessed, at a
    signed distance (SDM vol. 2A BT, vol. 1 4.6.4 table 3-2).
    """
    effect = _BIT_EFFECT[name]

    def operation(insn: Insn) -> Operation:
        size, offset = insn.sizes[0], insn.read(1)
        sign = 1 << (size - 1)

        def f(cpu: Cpu, a: int) -> int:
            n = offset(cpu) & (size - 1)
            cpu.rflags = cpu.rflags & ~CF | a >> n & 1
            cpu.undefined = cpu.undefined & ZF | OF | SF | AF | PF
            return effect(a, 1 << n)

        if not insn.is_memory(0):
            if name != "bt":
                return insn.update(0, f)
            read = insn.read(0)

            def test(cpu: Cpu) -> None:
                f(cpu, read(cpu))

            return test
        ea, seg, mask, nbytes = insn.address(), insn.seg, MASK[insn.addrsize], size >> 3
        string, store = insn.operands[1][0] == "G", name != "bt"

        def op(cpu: Cpu) -> None:
            where = ea(cpu)
            if string:
                n = offset(cpu)
                where = where + ((n ^ sign) - sign) // size * nbytes & mask
            value = f(cpu, cpu.mem.read(seg, where, nbytes, for_write=store))
            if store:
                cpu.mem.write(seg, where, nbytes, value)

        return op

    return operation


# --- scans and counts -----------------------------------------------------------------------------------------------


def _scan(forward: bool) -> Callable[[Insn], Operation]:
    """BSF, BSR. A source of zero leaves the destination alone: APM vol. 3 says so, and Intel's processors do it."""

    def operation(insn: Insn) -> Operation:
        read, write = insn.read(1), insn.write(0)

        def op(cpu: Cpu) -> None:
            a = read(cpu)
            if a:
                write(cpu, ((a & -a) if forward else a).bit_length() - 1)
            cpu.rflags = cpu.rflags & ~ZF | (0 if a else ZF)
            cpu.undefined = ARITH & ~ZF

        return op

    return operation


def _zeros(trailing: bool) -> Callable[[Insn], Operation]:
    """LZCNT, TZCNT: CF when the source is zero, ZF when the result is; OF, SF, AF, PF undefined."""

    def operation(insn: Insn) -> Operation:
        size, read, write = insn.sizes[0], insn.read(1), insn.write(0)

        def op(cpu: Cpu) -> None:
            a = read(cpu)
            r = size - a.bit_length()
            if trailing and a:
                r = (a & -a).bit_length() - 1
            write(cpu, r)
            cpu.rflags = cpu.rflags & ~(CF | ZF) | (0 if a else CF) | (0 if r else ZF)
            cpu.undefined = OF | SF | AF | PF

        return op

    return operation


def _popcnt(insn: Insn) -> Operation:
    read, write = insn.read(1), insn.write(0)

    def op(cpu: Cpu) -> None:
        a = read(cpu)
        write(cpu, a.bit_count())
        cpu.rflags = cpu.rflags & ~ARITH | (0 if a else ZF)
        cpu.undefined = 0

    return op


def _crc32(insn: Insn) -> Operation:
    """CRC32C with the reflected polynomial 11EDC6F41H (SDM vol. 2A CRC32)."""
    size, read, write = insn.sizes[1], insn.read(1), insn.write(0)
    index = insn.reg

    def op(cpu: Cpu) -> None:
        crc = cpu.gpr[index] & 0xFFFFFFFF ^ read(cpu)
        for _ in range(size):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
        write(cpu, crc & 0xFFFFFFFF)

    def op8_16(cpu: Cpu) -> None:
        old = cpu.gpr[index] & 0xFFFFFFFF
        crc = (old ^ read(cpu)) & MASK[size]
        for _ in range(size):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
        write(cpu, crc ^ old >> size)

    return op if size >= 32 else op8_16


def _shift_rows() -> list[Row]:
    rows = []
    for n, name in ((0, "rol"), (1, "ror"), (2, "rcl"), (3, "rcr"), (4, "shl"), (5, "shr"), (6, "shl"), (7, "sar")):
        # /6 is an alias of /4 (SDM 2D table A-6; APM 3 table A-6 lists SHL twice).
        writes, undefined = ("OC", "O") if n < 4 else ("OSZPC", "OAC")
        section = "SDM 2B RCL/RCR/ROL/ROR" if n < 4 else "SDM 2B SAL/SAR/SHL/SHR"
        for opcode, operands in (
            ("C0", "Eb,Ib"), ("C1", "Ev,Ib"), ("D0", "Eb,1"), ("D1", "Ev,1"), ("D2", "Eb,CL"), ("D3", "Ev,CL"),
        ):  # fmt: skip
            rows.append(Row(name, f"{opcode} /{n}", operands, _shift(name), section, writes, undefined))
    return rows


def _bit_rows() -> list[Row]:
    rows = []
    for n, name in enumerate(("bt", "bts", "btr", "btc")):
        section, lock, op = f"SDM 2A {name.upper()}", name != "bt", _bit_test(name)
        rows.append(Row(name, f"0F {0xA3 + 8 * n:02X} /r", "Ev,Gv", op, section, "C", "OSAP", lock=lock))
        rows.append(Row(name, f"0F BA /{n + 4}", "Ev,Ib", op, section, "C", "OSAP", lock=lock))
    return rows


SHIFT_ROWS: Final[list[Row]] = [
    *_shift_rows(),
    *_bit_rows(),
    Row("shld", "0F A4 /r", "Ev,Gv,Ib", _double_shift(True), "SDM 2B SHLD", "OSZPC", "OA"),
    Row("shld", "0F A5 /r", "Ev,Gv,CL", _double_shift(True), "SDM 2B SHLD", "OSZPC", "OA"),
    Row("shrd", "0F AC /r", "Ev,Gv,Ib", _double_shift(False), "SDM 2B SHRD", "OSZPC", "OA"),
    Row("shrd", "0F AD /r", "Ev,Gv,CL", _double_shift(False), "SDM 2B SHRD", "OSZPC", "OA"),
    Row("bsf", "0F BC /r", "Gv,Ev", _scan(True), "SDM 2A BSF", "Z", "OSAPC"),
    Row("bsr", "0F BD /r", "Gv,Ev", _scan(False), "SDM 2A BSR", "Z", "OSAPC"),
    Row("tzcnt", "F3 0F BC /r", "Gv,Ev", _zeros(True), "SDM 2B TZCNT", "ZC", "OSAP", feature="bmi1"),
    Row("lzcnt", "F3 0F BD /r", "Gv,Ev", _zeros(False), "SDM 2A LZCNT", "ZC", "OSAP", feature="abm"),
    Row("popcnt", "F3 0F B8 /r", "Gv,Ev", _popcnt, "SDM 2B POPCNT", "OSZAPC", feature="popcnt"),
    Row("crc32", "F2 0F 38 F0 /r", "Gy,Eb", _crc32, "SDM 2A CRC32", feature="sse42"),
    Row("crc32", "F2 0F 38 F1 /r", "Gy,Ev", _crc32, "SDM 2A CRC32", feature="sse42"),
]
