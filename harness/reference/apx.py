"""APX: legacy instructions promoted to EVEX map 4, and the new ones there (CCMP, CTEST, CFCMOV, SETZU, PUSH2, POP2).

A promoted row is the legacy row under a new opcode: its operation is the same function, which reads and writes its
first operand through :class:`~harness.reference.insn.Insn`, where the new data destination comes in.

Sources: Intel APX architecture specification; the tables of Intel's XED for which encodings exist (opcode, pp, ND, NF,
ModRM); for the conditional instructions also the notes of the LLVM implementer from Intel, "All about APX conditional
ISA".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Final

from harness.reference.alu import ALU_ROWS, FUNCTIONS
from harness.reference.bmi import keep_flags
from harness.reference.control import CONTROL_ROWS
from harness.reference.cpu import ARITH, CF, GP, MASK, OF, PF, RSP, SF, SS, ZF, Cpu, Fault
from harness.reference.data import CONDITIONS, DATA_ROWS, condition
from harness.reference.insn import Insn, Operation, Row, undefined_opcode
from harness.reference.shift import SHIFT_ROWS

_LEGACY: Final = {row.opcode: row for row in (*ALU_ROWS, *SHIFT_ROWS, *DATA_ROWS, *CONTROL_ROWS)}


def _optional_flags(operation: Callable[[Insn], Operation]) -> Callable[[Insn], Operation]:
    def promoted(insn: Insn) -> Operation:
        op = operation(insn)
        return keep_flags(op) if insn.nf else op

    return promoted


def _promote(fields: str, legacy: str, opcode: str = "") -> Row:
    """The row of the legacy ``opcode`` with an EVEX prefix, whose ``fields`` are as in Row; LOCK is #UD there."""
    row = _LEGACY[legacy]
    return replace(
        row, opcode=f"EVEX{fields} {opcode or legacy}", operation=_optional_flags(row.operation),
        section=f"APX {row.mnemonic.upper()}; {row.section}", modes="64", lock=False,
    )  # fmt: skip


def _arithmetic() -> list[Row]:
    rows = []
    for n, name in enumerate(("add", "or", "adc", "sbb", "and", "sub", "xor")):
        fields = ".ND" if name in ("adc", "sbb") else ".ND.NF"  # the readers of a flag have no NF
        opcodes = [f"{8 * n + k:02X} /r" for k in range(4)] + [f"{op} /{n}" for op in ("80", "81", "83")]
        rows += [_promote(fields, opcode) for opcode in opcodes]
    for opcode in ("F6 /2", "F7 /2"):
        rows.append(_promote(".ND", opcode))  # NOT: writes no flags anyway, NF is #UD (XED)
    for opcode in ("F6 /3", "F7 /3", "FE /0", "FF /0", "FE /1", "FF /1"):
        rows.append(_promote(".ND.NF", opcode))
    for n in (4, 5, 6, 7):
        rows += [_promote(".NF", f"{op} /{n}") for op in ("F6", "F7")]
    rows.append(_promote(".ND.NF", "0F AF /r", "AF /r"))
    rows += [_promote(".ZU.NF", opcode) for opcode in ("69 /r", "6B /r")]
    rows.append(_promote(".66.ND", "66 0F 38 F6 /r", "66 /r"))
    rows.append(_promote(".F3.ND", "F3 0F 38 F6 /r", "66 /r"))
    return rows


def _shifts() -> list[Row]:
    rows = []
    for n in range(8):  # /6 is the alias of SHL that it is in the legacy maps (XED and objdump; LLVM lacks it)
        fields = ".ND" if n in (2, 3) else ".ND.NF"
        rows += [_promote(fields, f"{op} /{n}") for op in ("C0", "C1", "D0", "D1", "D2", "D3")]
    for legacy, opcode in (("A4", "24"), ("A5", "A5"), ("AC", "2C"), ("AD", "AD")):
        rows.append(_promote(".ND.NF", f"0F {legacy} /r", f"{opcode} /r"))
    return rows


def _others() -> list[Row]:
    return [
        _promote(".NF", "F3 0F B8 /r", "88 /r"),
        _promote(".NF", "F3 0F BC /r", "F4 /r"),
        _promote(".NF", "F3 0F BD /r", "F5 /r"),
        _promote("", "F2 0F 38 F0 /r", "F0 /r"),
        _promote("", "F2 0F 38 F1 /r", "F1 /r"),
        _promote("", "NR 0F 38 F0 /r:m", "60 /r"),  # the EVEX forms of MOVBE have a register form too
        _promote("", "NR 0F 38 F1 /r:m", "61 /r"),
        _promote(".F3", "66 0F 38 82 /r:m", "F2 /r:m"),
    ]


# --- conditional compare and test -----------------------------------------------------------------------------------

_DEFAULT: Final = tuple(
    (OF if n & 8 else 0) | (SF if n & 4 else 0) | (ZF if n & 2 else 0) | (CF | PF if n & 1 else 0) for n in range(16)
)
"""Flags for a default flags value: PF is a copy of CF, AF is zero ("All about APX conditional ISA")."""


def _conditional(name: str) -> Callable[[Insn], Operation]:
    """CCMP, CTEST: compare if the source condition holds, else load the default flags.

    A memory operand is read in both cases: a false condition suppresses no fault.
    """

    def operation(insn: Insn) -> Operation:
        f, left, right, flags = FUNCTIONS[name, insn.sizes[0]], insn.read(0), insn.read(1), _DEFAULT[insn.dfv]
        test = _source_condition(insn.scc)

        def op(cpu: Cpu) -> None:
            a, b = left(cpu), right(cpu)
            if test(cpu):
                f(cpu, a, b)
            else:
                cpu.rflags, cpu.undefined = cpu.rflags & ~ARITH | flags, 0

        return op

    return operation


def _source_condition(scc: int) -> Callable[[Cpu], bool]:
    if scc in (10, 11):  # instead of the parity flag: always, never
        return lambda cpu: scc == 10
    return condition(scc)


def _compare_rows() -> list[Row]:
    ccmp, ctest = _conditional("cmp"), _conditional("and")
    forms = [
        ("ccmp", "38 /r", "Eb,Gb"), ("ccmp", "39 /r", "Ev,Gv"), ("ccmp", "3A /r", "Gb,Eb"), ("ccmp", "3B /r", "Gv,Ev"),
        ("ccmp", "80 /7", "Eb,Ib"), ("ccmp", "81 /7", "Ev,Iz"), ("ccmp", "83 /7", "Ev,Ibs"),
        ("ctest", "84 /r", "Eb,Gb"), ("ctest", "85 /r", "Ev,Gv"),
        # /1: alias of /0 as in the legacy map (objdump; LLVM lacks it).
        *(("ctest", f"F6 /{n}", "Eb,Ib") for n in (0, 1)), *(("ctest", f"F7 /{n}", "Ev,Iz") for n in (0, 1)),
    ]  # fmt: skip
    rows = []
    for name, opcode, operands in forms:
        operation, undefined = (ccmp, "") if name == "ccmp" else (ctest, "A")
        writes = "OSZAPC" if name == "ccmp" else "OSZPC"
        section = f"APX {name.upper()}scc"
        rows.append(Row(name, f"EVEX.SCC {opcode}", operands, operation, section, writes, undefined, modes="64"))
    return rows


# --- conditional moves ----------------------------------------------------------------------------------------------


def _cfcmov(cc: int) -> Callable[[Insn], Operation]:
    """CFCMOV: the last operand if the condition holds, else the one before it, or zero where there is none.

    No fault of a memory operand whose condition is false: it is not accessed. A register is written whole.
    """
    test = condition(cc)

    def operation(insn: Insn) -> Operation:
        taken, write = insn.read(len(insn.operands) - 1), insn.write(0)
        other = insn.read(1) if len(insn.operands) == 3 else _zero
        if insn.is_memory(0):

            def store(cpu: Cpu) -> None:
                if test(cpu):
                    write(cpu, taken(cpu))

            return store
        _, destination = insn.register(0)

        def op(cpu: Cpu) -> None:
            cpu.gpr[destination] = taken(cpu) if test(cpu) else other(cpu)

        return op

    return operation


def _zero(cpu: Cpu) -> int:
    return 0


def _cmov(cc: int) -> Callable[[Insn], Operation]:
    """CMOV with a new data destination: memory is always read, the register is written whole."""
    test = condition(cc)

    def operation(insn: Insn) -> Operation:
        taken, other = insn.read(2), insn.read(1)
        _, destination = insn.register(0)

        def op(cpu: Cpu) -> None:
            value = taken(cpu)
            cpu.gpr[destination] = value if test(cpu) else other(cpu)

        return op

    return operation


def _condition_rows() -> list[Row]:
    rows = []
    for cc, name in enumerate(CONDITIONS):
        opcode = f"{0x40 + cc:02X} /r"
        for fields, operands in (("", "Gv,Ev"), (".NF1", "Ev,Gv"), (".ND1.NF1", "Bv,Gv,Ev")):
            row = Row(f"cfcmov{name}", f"EVEX{fields} {opcode}", operands, _cfcmov(cc), "APX CFCMOVcc", modes="64")
            rows.append(row)
        rows.append(Row(f"cmov{name}", f"EVEX.ND1 {opcode}", "Bv,Gv,Ev", _cmov(cc), "APX CMOVcc", modes="64"))
        rows.append(_promote(".F2.ZU", f"0F {0x90 + cc:02X} /r", opcode))
    return rows


# --- PUSH2, POP2 ----------------------------------------------------------------------------------------------------


def _aligned_stack(cpu: Cpu) -> int:
    """RSP; #GP(0) unless it is a multiple of 16."""
    top = cpu.gpr[RSP]
    if top & 15:
        raise Fault(GP, 0)
    return top


def _push2(insn: Insn) -> Operation:
    """PUSH2 v, b: v is pushed first. RSP as an operand is #UD (objdump, XED)."""
    first, second = insn.vreg, insn.rm
    if RSP in (first, second):
        return undefined_opcode(insn)

    def op(cpu: Cpu) -> None:
        top = _aligned_stack(cpu) - 16 & MASK[64]
        cpu.mem.write(SS, top, 16, cpu.gpr[first] << 64 | cpu.gpr[second])
        cpu.gpr[RSP] = top

    return op


def _pop2(insn: Insn) -> Operation:
    """POP2 v, b: v is popped first. RSP as an operand, and one register twice, are #UD (objdump, XED)."""
    first, second = insn.vreg, insn.rm
    if RSP in (first, second) or first == second:
        return undefined_opcode(insn)

    def op(cpu: Cpu) -> None:
        top = _aligned_stack(cpu)
        value = cpu.mem.read(SS, top, 16)
        cpu.gpr[RSP] = top + 16 & MASK[64]
        cpu.gpr[first], cpu.gpr[second] = value & MASK[64], value >> 64

    return op


APX_ROWS: Final[list[Row]] = [
    *_arithmetic(),
    *_shifts(),
    *_others(),
    *_compare_rows(),
    *_condition_rows(),
    Row("push2", "EVEX.ND1 FF /6:r", "Bq,Eq", _push2, "APX PUSH2", size="f64", modes="64"),
    Row("pop2", "EVEX.ND1 8F /0:r", "Bq,Eq", _pop2, "APX POP2", size="f64", modes="64"),
]
