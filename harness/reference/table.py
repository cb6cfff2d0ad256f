"""The instruction table: every row of every module, indexed for the decoder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from harness.reference.alu import ALU_ROWS
from harness.reference.data import DATA_ROWS
from harness.reference.flow import FLOW_ROWS
from harness.reference.insn import Row
from harness.reference.shift import SHIFT_ROWS
from harness.reference.system import SYSTEM_ROWS

_PREFIX_TEST: Final[dict[str, Callable[[bool, int], bool]]] = {
    "NP": lambda osz, rep: not rep and not osz,
    "NR": lambda osz, rep: not rep,
    "66": lambda osz, rep: osz and not rep,
    "F2": lambda osz, rep: rep == 0xF2,
    "F3": lambda osz, rep: rep == 0xF3,
}
"""Mandatory prefix -> whether the operand-size and repeat prefixes that are there select the row."""


@dataclass(slots=True)
class Entry:
    """A Row with its opcode text taken apart."""

    row: Row
    map: int
    opcodes: tuple[int, ...]
    operands: tuple[str, ...]
    prefix: str = ""
    modrm: bool = False
    ext: int = -1
    mod: str = ""
    exact: int = -1

    def selected(self, modrm: int, osz: bool, rep: int) -> bool:
        """Whether this entry is the one for the ModRM byte (-1: none there) and the prefixes; ModRM.mod aside."""
        if self.prefix and not _PREFIX_TEST[self.prefix](osz, rep):
            return False
        if not self.modrm:
            return True
        if self.exact >= 0:
            return modrm == self.exact
        return self.ext < 0 or modrm >> 3 & 7 == self.ext

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
        entry.map = 4
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


ROWS: Final[list[Row]] = [*ALU_ROWS, *SHIFT_ROWS, *DATA_ROWS, *FLOW_ROWS, *SYSTEM_ROWS]
TABLE: Final = Table(ROWS)
