"""The instruction table: every row of every module, indexed for the decoder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from harness.reference.alu import ALU_ROWS
from harness.reference.apx import APX_ROWS
from harness.reference.bmi import BMI_ROWS
from harness.reference.data import DATA_ROWS
from harness.reference.flow import FLOW_ROWS
from harness.reference.insn import EVEX, REX2_ONLY, VEX, Row
from harness.reference.shift import SHIFT_ROWS
from harness.reference.system import SYSTEM_ROWS
from harness.reference.xsave import XSAVE_ROWS

_PREFIX_TEST: Final[dict[str, Callable[[bool, int], bool]]] = {
    "NP": lambda osz, rep: not rep and not osz,
    "NR": lambda osz, rep: not rep,
    "66": lambda osz, rep: osz and not rep,
    "F2": lambda osz, rep: rep == 0xF2,
    "F3": lambda osz, rep: rep == 0xF3,
}
"""Mandatory prefix -> whether the operand-size and repeat prefixes that are there select the row."""
_PP: Final = {"66": 1, "F3": 2, "F2": 3}
"""Mandatory prefix -> VEX.pp (SDM vol. 2A 2.3.6)."""


@dataclass(slots=True)
class Entry:
    """A Row with its opcode text taken apart.

    ``map`` is 0-3 for the legacy maps, REX2_ONLY, or the prefix's map on top of VEX or EVEX. ``pps``, ``nd``, ``nf``:
    what a VEX or EVEX prefix may hold ("*": either).
    """

    row: Row
    map: int
    opcodes: tuple[int, ...]
    operands: tuple[str, ...]
    prefix: str = ""
    modrm: bool = False
    ext: int = -1
    mod: str = ""
    exact: int = -1
    pps: tuple[int, ...] = ()
    nd: str = "0"
    nf: str = "0"

    def selected(self, modrm: int, osz: bool, rep: int) -> bool:
        """Whether this entry is the one for the ModRM byte (-1: none there) and the prefixes; ModRM.mod aside."""
        if self.prefix and not _PREFIX_TEST[self.prefix](osz, rep):
            return False
        if not self.modrm:
            return True
        if self.exact >= 0:
            return modrm == self.exact
        return self.ext < 0 or modrm >> 3 & 7 == self.ext

    def extended(self, modrm: int, pp: int, nd: int, nf: int) -> bool:
        """Whether this entry is the one for a VEX or EVEX prefix with these fields, and the ModRM byte."""
        if pp not in self.pps or (self.ext >= 0 and modrm >> 3 & 7 != self.ext) or not self.operand_fits(modrm):
            return False
        if self.nd == "SCC":  # NF's bit is one of the condition's
            return not nd
        return self.nd in ("*", "ZU", str(nd)) and self.nf in ("*", str(nf))

    @property
    def uses_vvvv(self) -> bool:
        """Whether the row itself has an operand in vvvv (a new data destination is not one)."""
        return any(p[0] == "B" for p in self.operands)

    def operand_fits(self, modrm: int) -> bool:
        """Whether ModRM.rm is memory or a register as the entry demands."""
        return not self.mod or (modrm >= 0xC0) == (self.mod == "r")


def parse(row: Row) -> Entry:
    """Take the manual's opcode notation apart. ValueError when it is not understood."""
    words = row.opcode.split()
    mandatory = words[0] in _PREFIX_TEST and len(words) > 1 and words[1][0] != "/"
    prefix = words.pop(0) if mandatory else ""
    operands = tuple(x for x in row.operands.split(",") if x)
    entry = Entry(row, 0, (), operands, prefix)
    if words[0] == "REX2":
        words.pop(0)
        entry.map = REX2_ONLY
    elif words[0].startswith(("VEX", "EVEX")):
        _parse_prefix(entry, words.pop(0))
    elif words[0] == "0F":
        words.pop(0)
        entry.map = 1
        if words[0] in ("38", "3A"):
            entry.map = 2 if words.pop(0) == "38" else 3
    first, *rest = words
    base = int(first.removesuffix("+r"), 16)
    entry.opcodes = tuple(range(base, base + 8)) if first.endswith("+r") else (base,)
    for word in rest:
        entry.modrm = True
        if word[0] == "=":
            entry.exact = int(word[1:], 16)
            continue
        ext, _, entry.mod = word[1:].partition(":")
        if ext != "r":
            entry.ext = int(ext)
    return entry


def _parse_prefix(entry: Entry, word: str) -> None:
    space, *fields = word.split(".")
    number = 4
    for name in fields:
        if name in _PP:
            entry.prefix = name
        elif name in ("M2", "M3"):
            number = int(name[1])
        elif name in ("NF", "NF1"):
            entry.nf = name[2:] or "*"
        elif name in ("ND", "ND1"):
            entry.nd = name[2:] or "*"
        elif name in ("ZU", "SCC"):
            entry.nd = name
        else:
            raise ValueError(f"{entry.row.opcode}: {name!r} is no field of a VEX or EVEX prefix")
    entry.map = (VEX if space == "VEX" else EVEX) + number
    by_size = entry.row.size == "v" and any(p[1:] in ("v", "z") for p in entry.operands)
    entry.pps = (_PP[entry.prefix],) if entry.prefix else (0, 1) if by_size else (0,)


class Table:
    """Rows by opcode map and byte. Where several match, the one that says more (prefix, ModRM, feature) comes first."""

    def __init__(self, rows: list[Row]) -> None:
        self.rows = tuple(rows)
        self._entries = {id(row): parse(row) for row in rows}
        self._index: dict[tuple[int, int], list[Entry]] = {}
        for entry in self._entries.values():
            for b in entry.opcodes:
                self._index.setdefault((entry.map, b), []).append(entry)
        for entries in self._index.values():
            entries.sort(key=lambda e: (e.exact < 0, e.prefix in ("", "NP", "NR"), not e.mod, e.ext < 0, not e.prefix))

    def lookup(self, map_: int, b: int) -> list[Entry]:
        """Candidates for an opcode byte, best first."""
        return self._index.get((map_, b), [])

    def entry(self, row: Row) -> Entry | None:
        """The parsed form of a row, None for a row outside of the table."""
        return self._entries.get(id(row))


ROWS: Final[list[Row]] = [
    *ALU_ROWS, *SHIFT_ROWS, *DATA_ROWS, *FLOW_ROWS, *BMI_ROWS, *APX_ROWS, *SYSTEM_ROWS, *XSAVE_ROWS,
]  # fmt: skip
TABLE: Final = Table(ROWS)
