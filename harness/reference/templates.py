"""Templates: one encoding of every row in every form that matters, for running the table against another machine.

A template is one instruction: a row of the table x prefix (none, REX, REX2, VEX, EVEX) x operand size x register or
memory x ND, NF and the source conditions, with random registers and immediates. Its memory operand lies in a small
window whatever the random registers hold: some registers are *pinned* to values of the template's own.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Final, NamedTuple

from harness.reference.alu import ALU_ROWS
from harness.reference.apx import APX_ROWS
from harness.reference.bmi import BMI_ROWS
from harness.reference.cpu import MASK, Fault, ModelError
from harness.reference.data import DATA_ROWS
from harness.reference.decoder import decode
from harness.reference.flow import FLOW_ROWS
from harness.reference.insn import EVEX, REX2_ONLY, VEX, Insn, Row
from harness.reference.shift import SHIFT_ROWS
from harness.reference.table import TABLE, Entry

WINDOW_SIZE: Final = 64
RSP: Final = 4
_MIDDLE: Final = WINDOW_SIZE // 2
_SKIPPED: Final = frozenset({"enter", "leave", "ret", "call", "xlat", "ud0", "ud1", "ud2", "(bad)", "invpcid", "popf"})
_BIT_STRINGS: Final = ("bt", "bts", "btr", "btc")
_SOURCES: Final = (*ALU_ROWS, *SHIFT_ROWS, *DATA_ROWS, *FLOW_ROWS, *BMI_ROWS, *APX_ROWS)


class Template(NamedTuple):
    """One instruction. ``memory``: it reads or writes the window. ``pins``: registers that must hold these values.

    ``rip`` is where the code must be (branches go to what follows it). RSP is always pinned, to the window's middle.
    """

    name: str
    code: bytes
    memory: bool
    pins: tuple[tuple[int, int], ...]
    rip: int


class _Choice(NamedTuple):
    """One form of a row: prefix kind, operand-size 66H, W, memory operand, ND, NF, source condition."""

    space: str
    osz: bool = False
    w: int = 0
    memory: bool = False
    nd: int = 0
    nf: int = 0
    scc: int = -1

    @property
    def text(self) -> str:
        size = "w" * self.w + "66" * self.osz
        parts = (self.space, size, "nd" * self.nd, "nf" * self.nf, f"scc{self.scc}" * (self.scc >= 0))
        return " ".join(part for part in (*parts, "mem" if self.memory else "reg") if part)


def templates(window: int, rip: int, *, seed: int = 0, features: frozenset[str] | None = None) -> Iterator[Template]:
    """Every template of 64-bit code at ``rip`` with memory operands in ``window`` (64 bytes, 16-byte aligned).

    Some 8,000 of them, in a stable order with unique names; ``seed`` changes registers and immediates. ``features``:
    CPUID names, rows of others are left out. ValueError for a window above 2 GiB or not aligned.
    """
    if window % 16 or window >> 31:
        raise ValueError(f"window {window:#x}: must be 16-byte aligned and below 2 GiB")
    rng = random.Random(seed)
    for row in _SOURCES:
        entry = TABLE.entry(row)
        if entry is None or row.mnemonic in _SKIPPED or row.modes == "no64" or row.opcode == "FF /4":
            continue
        if features is not None and row.feature and row.feature not in features:
            continue
        for choice in _choices(row, entry):
            if choice.space in ("rex2", "evex") and features is not None and "apx" not in features:
                continue
            found = _make(row, entry, choice, window, rip, rng)
            if found is not None:
                yield found


def _choices(row: Row, entry: Entry) -> Iterator[_Choice]:
    sized = row.size in ("v", "d64", "y") and any(p[1:] in ("v", "z", "y") or p == "rAX" for p in entry.operands)
    sized = sized or (row.size == "v" and row.mnemonic.count("/") == 2)
    may_be_memory = [m for m in (False, True) if entry.mod != ("m" if not m else "r")] if entry.modrm else [False]
    if not any(p[0] in "EM" for p in entry.operands):
        may_be_memory = [False]
    sizes = [(False, 0), (True, 0), (False, 1), (True, 1)] if sized else [(False, 0), (False, 1)]
    for memory in may_be_memory:
        if entry.map >= VEX:
            for osz, w in sizes:
                if osz and (1 not in entry.pps or len(entry.pps) == 1):
                    continue
                yield from _prefixed(entry, osz, w, memory)
            continue
        spaces = "plain rex rex2" if entry.map < 2 else "rex2" if entry.map == REX2_ONLY else "plain rex"
        for space in spaces.split():
            for osz, w in sizes:
                if not (w and space == "plain"):
                    yield _Choice(space, osz, w, memory)


def _prefixed(entry: Entry, osz: bool, w: int, memory: bool) -> Iterator[_Choice]:
    """The forms of a VEX or EVEX row: every ND and NF that it allows, every source condition."""
    space = "vex" if entry.map < EVEX else "evex"
    if entry.nd == "SCC":
        for scc in range(16):
            yield _Choice(space, osz, w, memory, scc=scc)
        return
    for nd in (0, 1) if entry.nd in ("*", "ZU") else (int(entry.nd),):
        for nf in (0, 1) if entry.nf == "*" else (int(entry.nf),):
            yield _Choice(space, osz, w, memory, nd, nf)


# --- bytes ----------------------------------------------------------------------------------------------------------


class _Registers(NamedTuple):
    reg: int
    rm: int  # or the base
    sib: int  # index
    v: int


def _make(row: Row, entry: Entry, choice: _Choice, window: int, rip: int, rng: random.Random) -> Template | None:
    """A template of this form, None where the table says that there is none (#UD)."""
    for _ in range(20):  # a byte register that REX makes another, POP2 of one register twice: try again
        code = _encode(row, entry, choice, window, rip, rng)
        try:
            insn = decode(code + bytes(15), None, 64, apx=1)
        except (Fault, ModelError):
            return None
        if insn.row is row and insn.length == len(code) and not _undefined_pair(insn):
            pins = _pins(insn, window, rng)
            if pins is not None:
                name = f"{row.mnemonic} {row.opcode}: {choice.text}"
                memory = insn.memory or row.mnemonic.startswith(("push", "pop")) or "O" in row.operands
                return Template(name, code, memory, pins, rip)
    return None


def _undefined_pair(insn: Insn) -> bool:
    """PUSH2 and POP2 with RSP, POP2 of one register twice: #UD."""
    if insn.row.mnemonic not in ("push2", "pop2"):
        return False
    return RSP in (insn.vreg, insn.rm) or (insn.row.mnemonic == "pop2" and insn.vreg == insn.rm)


def _encode(row: Row, entry: Entry, choice: _Choice, window: int, rip: int, rng: random.Random) -> bytes:
    top = {"plain": 8, "rex": 16, "vex": 16}.get(choice.space, 32)
    r = _Registers(rng.randrange(top), rng.randrange(top), rng.randrange(top), rng.randrange(top))
    if not choice.memory:  # bits that select nothing are as an assembler leaves them
        r = r._replace(sib=0)
    if not entry.uses_vvvv and not (choice.nd and entry.nd == "*"):
        r = r._replace(v=0)
    head = bytes([0x66]) * (choice.osz and choice.space not in ("vex", "evex"))
    head += bytes([0x67]) * (choice.memory and rng.random() < 0.1)
    if entry.map < 4 and entry.prefix not in ("", "NP", "NR"):
        head += bytes.fromhex(entry.prefix)
    body = _prefix_bytes(entry, choice, r, rng) + bytes([rng.choice(entry.opcodes)])
    if entry.modrm:
        body += _modrm(entry, choice, r, rng)
    if "O" in row.operands:
        return head + body + (window + 16).to_bytes(8, "little")
    return head + body + _immediates(row, entry, choice, rip, rng, len(head + body))


def _prefix_bytes(entry: Entry, choice: _Choice, r: _Registers, rng: random.Random) -> bytes:
    """The prefix with its map, and the escape bytes that legacy maps have."""
    escape = {1: b"\x0f", 2: b"\x0f\x38", 3: b"\x0f\x3a"}.get(entry.map, b"")
    if choice.space == "plain":
        return escape
    low = (r.reg >> 3 & 1) << 2 | (r.sib >> 3 & 1) << 1 | r.rm >> 3 & 1
    if choice.space == "rex":
        return bytes([0x40 | choice.w << 3 | low]) + escape
    high = (r.reg >> 4) << 2 | (r.sib >> 4) << 1 | r.rm >> 4
    if choice.space == "rex2":
        return bytes([0xD5, (entry.map == 1) << 7 | high << 4 | choice.w << 3 | low])
    pp = entry.pps[0] if len(entry.pps) == 1 else int(choice.osz)
    p1 = choice.w << 7 | (~r.v & 15) << 3 | pp
    if choice.space == "vex":
        return bytes([0xC4, (~low & 7) << 5 | entry.map - VEX, p1])
    p0 = (~low & 7) << 5 | (~high >> 2 & 1) << 4 | (high & 1) << 3 | entry.map - EVEX
    p1 |= (~high >> 1 & 1) << 2
    p2 = choice.nd << 4 | (~r.v >> 4 & 1) << 3 | choice.nf << 2
    if choice.scc >= 0:
        p1, p2 = p1 & 0x87 | rng.getrandbits(4) << 3, choice.scc
    return bytes([0x62, p0, p1, p2])


def _modrm(entry: Entry, choice: _Choice, r: _Registers, rng: random.Random) -> bytes:
    """ModRM, SIB and displacement: a base, a base with index, or a bare 32-bit displacement."""
    reg = entry.ext if entry.ext >= 0 else r.reg & 7
    if not choice.memory:
        return bytes([0xC0 | reg << 3 | r.rm & 7])
    kind = rng.random()
    scale = rng.getrandbits(2)
    if kind < 0.45 and r.rm & 7 != 4:
        return bytes([0x40 | reg << 3 | r.rm & 7, rng.getrandbits(8)])
    sib = scale << 6 | (r.sib & 7) << 3 | r.rm & 7
    if kind < 0.75:
        return bytes([0x44 | reg << 3, sib, rng.getrandbits(8)])
    return bytes([0x84 | reg << 3, sib]) + rng.randrange(-(1 << 20), 1 << 20).to_bytes(4, "little", signed=True)


def _immediates(row: Row, entry: Entry, choice: _Choice, rip: int, rng: random.Random, length: int) -> bytes:
    """Immediates of random values; branches and JMPABS go to the next instruction."""
    out = b""
    size = 64 if choice.w else 16 if choice.osz else 32
    for pattern in entry.operands:
        if pattern[0] == "J":
            out += bytes(1 if pattern == "Jb" else 4 if size > 16 or row.size == "n64" else 2)
        elif pattern == "Iq":
            out += (rip + length + 8).to_bytes(8, "little")
        elif pattern[0] == "I":
            width = {"b": 1, "bs": 1, "w": 2, "v": size >> 3, "z": min(size, 32) >> 3}[pattern[1:]]
            out += _interesting(rng, 8 * width).to_bytes(width, "little")
    return out


def _interesting(rng: random.Random, bits: int) -> int:
    corners = (0, 1, 2, (1 << bits) - 1, 1 << bits - 1, (1 << bits - 1) - 1)
    return rng.choice(corners) if rng.random() < 0.3 else rng.getrandbits(bits)


# --- pins -----------------------------------------------------------------------------------------------------------


def _pins(insn: Insn, window: int, rng: random.Random) -> tuple[tuple[int, int], ...] | None:
    """Values that make the memory operand lie in the window; None when no value of the registers does."""
    pins = {RSP: window + _MIDDLE}
    if not insn.memory:
        return tuple(pins.items())
    target = window + 8 + rng.randrange(WINDOW_SIZE - 32)
    if insn.row.mnemonic in _BIT_STRINGS and insn.operands[1][0] == "G":
        if insn.reg in (RSP, insn.base, insn.index):
            return None
        target = window + 24
        pins[insn.reg] = rng.randrange(-64, 64) & MASK[insn.sizes[0]]  # bits from there
    if insn.base in (-1, RSP) or insn.index == insn.base or insn.index in pins:
        return None
    index = rng.randrange(1 << 12) if insn.index >= 0 else 0
    pins[insn.base] = target - insn.disp - index * insn.scale & MASK[insn.addrsize]
    if insn.index >= 0:
        pins[insn.index] = index
    return tuple(sorted(pins.items()))
