"""An object's contents, cut into functions, data objects and tables, with every reference between them resolved.

What a relocation refers to is shown as (piece, offset in it), whatever form it has in the file: by symbol, by section
and offset, or, for a call inside one section, as a displacement that the assembler knew and no relocation tells of.
String literals and constants that the linker merges are no pieces: a reference to one is its content.
"""

from __future__ import annotations

import hashlib
import re
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Final, NamedTuple

from harness.series.elf import (
    SHF_ALLOC,
    SHF_EXECINSTR,
    SHF_MERGE,
    SHF_STRINGS,
    SHF_WRITE,
    SHN_ABS,
    SHN_COMMON,
    SHN_UNDEF,
    STB_LOCAL,
    STT_FILE,
    STT_SECTION,
    ElfObject,
    Relocation,
    Section,
    Symbol,
)

EXEMPT: Final = ".discard"
"""Allocated sections that do not count begin like this: the linker throws them away."""
ORC: Final = ".orc_unwind"
_STRIDES: Final = {
    "__ex_table": (12,),
    "__bug_table": (16, 12, 8),
    ".altinstructions": (14, 12, 13),
    ".parainstructions": (16,),
    "__jump_table": (16,),
    ".static_call_sites": (8,),
    "__mcount_loc": (8,),
    "__patchable_function_entries": (8,),
    ".smp_locks": (4,),
    ".return_sites": (4,),
    ".retpoline_sites": (4,),
    ".call_sites": (4,),
    ".ibt_endbr_seal": (4,),
    ".cfi_sites": (4,),
    ".kcfi_traps": (4,),
    ".orc_unwind_ip": (4,),
}
"""Tables of places in code: bytes an entry has (as the kernels since 6.1 have it). Each begins with its place."""
_PC_RELATIVE: Final = {2: 4, 4: 4, 9: 4, 24: 8, 41: 4, 42: 4}  # R_X86_64_PC32, PLT32, GOTPCREL*, PC64: bytes they fill
_WIDTHS: Final = {0: 0, 1: 8, 10: 4, 11: 4, 12: 2, 13: 2, 14: 1, 15: 1} | _PC_RELATIVE
_PC32, _PLT32 = 2, 4
_LONGEST: Final = 160  # characters of a string literal that are shown as they are

# No-operations that compilers and assemblers put between functions, and int3.
_FILL: Final = re.compile(
    rb"(?:[\x00\x90\xcc]|\x66\x90|\x66*\x2e?\x0f\x1f(?:\x00|\x40.|\x44..|\x80.{4}|\x84.{5}))*", re.DOTALL
)
_TEXT: Final = re.compile(rb"[^\0]*\0+")
# How KASAN describes a stack frame in its reports: per variable offset, size, length of the name, name:line.
_FRAME: Final = re.compile(rb"\d+(?: \d+ \d+ \d+ [^\s:]+:\d+)+ ?")
_VARIABLE: Final = re.compile(rb" (\d+ \d+) \d+ [^\s:]+:\d+")
# Opcodes of near calls and jumps; what follows them is the displacement.
_JUMP: Final = re.compile(rb"[\xe8\xe9]|\x0f[\x80-\x8f]|\xeb", re.DOTALL)


@dataclass(eq=False, slots=True)
class Piece:
    """A function, a data object, or one function's entries in a table.

    ``spans`` are the (section index, start, end) it is made of; ``name`` is its symbol's, empty when it has none.
    """

    section: Section
    spans: list[tuple[int, int, int]]
    name: str = ""
    binding: int = STB_LOCAL
    owner: Piece | None = None  # of table entries: the function they are about
    stride: int = 0  # and what each of them has, in bytes
    key: str = ""  # given by harness/series/normal.py

    def add(self, section: int, start: int, end: int) -> None:
        """Extend it."""
        if self.spans and self.spans[-1][0] == section and self.spans[-1][2] == start:
            self.spans[-1] = section, self.spans[-1][1], end
        else:
            self.spans.append((section, start, end))

    @property
    def start(self) -> int:
        """Where it begins in its section."""
        return self.spans[0][1]

    @property
    def size(self) -> int:
        """In bytes."""
        return sum(end - start for _, start, end in self.spans)

    @property
    def kind(self) -> str:
        """``function``, ``data`` or ``table``."""
        return "table" if self.owner else "function" if self.section.code else "data"


class Reference(NamedTuple):
    """What stands at ``offset`` of a section, ``width`` bytes of it. ``type`` is the relocation's.

    ``target`` is a piece, or a text: a name that another object defines, or the content of what is merged. ``at`` is
    the place in it.
    """

    offset: int
    width: int
    type: int
    target: Piece | str
    at: int


class Label(NamedTuple):
    """A second name of a place in a piece."""

    symbol: Symbol
    piece: Piece
    at: int


class Pieces:
    """One object, cut up. ``pieces`` are in the order of sections and offsets, tables' after them."""

    def __init__(self, elf: ElfObject) -> None:
        self.object = elf
        self.pieces: list[Piece] = []
        self.labels: list[Label] = []
        self._of_section: dict[int, list[Piece]] = {}
        self._starts: dict[int, list[int]] = {}
        self._entries: dict[int, tuple[int, list[tuple[Piece, int]]]] = {}
        self._references: dict[int, list[Reference]] = {}
        self._place_cache: dict[int, list[tuple[Relocation, tuple[int, int] | None]]] = {}
        self._texts: dict[tuple[int, int], bytes] = {}
        self._nowhere = Piece(elf.sections[0], [(0, 0, 0)], key="nothing")
        tables = {s.number: stride for s in self.sections if (stride := self._stride(s))}
        unwinding = any(elf.sections[index].name == f"{ORC}_ip" for index in tables)
        for section in self.sections:
            if section.number in tables or section.flags & SHF_MERGE or (section.name == ORC and unwinding):
                continue
            self._cut(section)
        for index, stride in tables.items():
            self._gather(elf.sections[index], stride)

    @cached_property
    def sections(self) -> list[Section]:
        """The sections that count."""
        return [s for s in self.object.sections if s.flags & SHF_ALLOC and s.size and not s.name.startswith(EXEMPT)]

    @cached_property
    def in_order(self) -> bool:
        """Whether the order of functions may matter: they are not a C compiler's."""
        return not any(s.type == STT_FILE and s.name.endswith(".c") for s in self.object.symbols)

    # --- cutting ----------------------------------------------------------------------------------------------------

    def _cut(self, section: Section) -> None:
        """Sized symbols first, then what lies between them."""
        here = [
            s for s in self._symbols.get(section.number, ())
            if s.type not in (STT_SECTION, STT_FILE) and s.name and not s.name.startswith(".L")
        ]  # fmt: skip
        here.sort(key=lambda s: (s.value, -s.size, s.binding == STB_LOCAL))
        unsized: dict[int, Symbol] = {}
        more: list[Symbol] = []
        found: list[Piece] = []
        end = 0
        for symbol in here:
            if symbol.value < end or symbol.value >= section.size or symbol.value in unsized:
                more.append(symbol)
            elif symbol.size:
                end = min(symbol.value + symbol.size, section.size)
                found.append(Piece(section, [(section.number, symbol.value, end)], symbol.name, symbol.binding))
            else:
                unsized[symbol.value] = symbol
        for start, after in _between([(p.start, p.start + p.size) for p in found], section.size):
            found += self._gap(section, start, after, unsized)
        found.sort(key=lambda piece: piece.start)
        self._of_section[section.number] = found
        self._starts[section.number] = [piece.start for piece in found]
        self.pieces += found
        for symbol in more:
            if symbol.binding != STB_LOCAL and (place := self._locate(section.number, symbol.value)):
                self.labels.append(Label(symbol, *place))

    def _gap(self, section: Section, start: int, end: int, names: dict[int, Symbol]) -> Iterator[Piece]:
        """What has no sized symbol: cut where symbols without size are, and where anything refers to."""
        aims = self._aims.get(section.number, [])
        aims = aims[bisect_left(aims, start) : bisect_left(aims, end)]
        cuts = sorted({start, *(n for n in names if start <= n < end), *aims})
        data = self.object.data(section)
        for first, after in zip(cuts, [*cuts[1:], end], strict=True):
            symbol = names.get(first)
            wanted = symbol is not None or (first == start and start in aims) or first != start
            content = data[first:after]
            ends = [r.offset + _WIDTHS.get(r.type, 4) for r in self._relocations(section, first, after)]
            if symbol is None and not section.code:
                after = max(first + len(content.rstrip(b"\0")), *ends, first)  # not what aligns the next one
            if not wanted and not ends and (after == first or (section.code and _FILL.fullmatch(content))):
                continue
            readable = not section.flags & (SHF_WRITE | SHF_EXECINSTR)
            if wanted and symbol is None and readable and not ends and _TEXT.fullmatch(content):
                self._texts[section.number, first] = content.rstrip(b"\0")  # a literal that was not to be merged
                continue
            name, binding = (symbol.name, symbol.binding) if symbol else ("", STB_LOCAL)
            yield Piece(section, [(section.number, first, after)], name, binding)

    def _relocations(self, section: Section, start: int, end: int) -> list[Relocation]:
        rows = self.object.relocations.get(section.number, [])
        return rows[bisect_left(rows, (start,)) : bisect_left(rows, (end,))]

    @cached_property
    def _symbols(self) -> dict[int, list[Symbol]]:
        found: dict[int, list[Symbol]] = defaultdict(list)
        for symbol in self.object.symbols:
            found[symbol.section].append(symbol)
        return found

    @cached_property
    def _aims(self) -> dict[int, list[int]]:
        """Per section, the offsets that relocations refer to; without places in functions that tables tell of."""
        named = {s.section for s in self.object.symbols if s.type not in (STT_SECTION, STT_FILE)}
        found: dict[int, set[int]] = defaultdict(set)
        for section in self.sections:
            for _, place in self._places(section):
                if place and not (section.name in _STRIDES and place[0] in named):
                    found[place[0]].add(place[1])
        return {index: sorted(places) for index, places in found.items()}

    # --- tables of places in code -----------------------------------------------------------------------------------

    def _stride(self, section: Section) -> int:
        """The size of this table's entries; 0 when it is none, or none of a form that is known."""
        if section.name not in _STRIDES:
            return 0
        code = {r.offset for r, place in self._places(section) if place and self.object.sections[place[0]].code}
        for stride in _STRIDES[section.name]:
            if section.size % stride == 0 and all(n in code for n in range(0, section.size, stride)):
                return stride
        return 0

    def _gather(self, section: Section, stride: int) -> None:
        """Each function's entries, in their order, as one piece."""
        by_owner: dict[int, Piece] = {}
        entries: list[tuple[Piece, int]] = []
        places = {r.offset: place for r, place in reversed(self._places(section))}
        for start in range(0, section.size, stride):
            place = places[start]
            assert place is not None
            located = self._locate(*place)
            owner = located[0] if located else self._nowhere
            piece = by_owner.setdefault(id(owner), Piece(section, [], owner=owner, stride=stride))
            entries.append((piece, piece.size))
            piece.add(section.number, start, start + stride)
        self.pieces += by_owner.values()
        self._entries[section.number] = stride, entries
        if section.name == f"{ORC}_ip":
            self._add_orc(entries)

    def _add_orc(self, entries: list[tuple[Piece, int]]) -> None:
        """The n-th place of .orc_unwind_ip is what the n-th row of .orc_unwind is about."""
        for section in self.sections:
            if section.name == ORC:
                row = section.size // len(entries)
                for number, (piece, _) in enumerate(entries):
                    piece.add(section.number, number * row, (number + 1) * row)

    # --- references -------------------------------------------------------------------------------------------------

    def references(self, section: Section) -> list[Reference]:
        """All that a section refers to, by offset."""
        if section.number not in self._references:
            found = [self._resolve(section, r, place) for r, place in self._places(section)]
            if section.code:
                taken = {offset for r in found for offset in range(r.offset, r.offset + r.width)}
                found += self._jumps(section, taken)
                found.sort(key=lambda r: r.offset)
            self._references[section.number] = found
        return self._references[section.number]

    def references_in(self, section: Section, start: int, end: int) -> list[Reference]:
        """Those that stand between two offsets."""
        found = self.references(section)
        return found[bisect_left(found, start, key=_offset) : bisect_left(found, end, key=_offset)]

    def _resolve(self, section: Section, relocation: Relocation, place: tuple[int, int] | None) -> Reference:
        offset, number, index, addend = relocation
        width = _WIDTHS.get(number, 4)
        kind = _PC32 if number == _PLT32 else number
        symbol = self.object.symbols[index]
        if place is None:
            if number in _PC_RELATIVE and section.code:
                addend += _tail(self.object.data(section), offset)
            return Reference(offset, width, kind, symbol.name, addend)
        aim = self.object.sections[place[0]]
        if aim.flags & SHF_MERGE and (content := self._merged(aim, place[1])):
            return Reference(offset, width, kind, *content)
        if place in self._texts:
            return Reference(offset, width, kind, _quoted(self._texts[place]), 0)
        located = self._locate(*place)
        if located is None:
            return Reference(offset, width, kind, f"section {aim.name}", place[1])
        return Reference(offset, width, kind, *located)

    def _places(self, section: Section) -> list[tuple[Relocation, tuple[int, int] | None]]:
        """Each relocation of a section, with the (section index, offset) it refers to; None when that is elsewhere."""
        if section.number not in self._place_cache:
            rows = self.object.relocations.get(section.number, ())
            self._place_cache[section.number] = [(row, self._place(section, row)) for row in rows]
        return self._place_cache[section.number]

    def _place(self, section: Section, relocation: Relocation) -> tuple[int, int] | None:
        symbol = self.object.symbols[relocation.symbol]
        if symbol.section in (SHN_UNDEF, SHN_ABS, SHN_COMMON):
            return None
        offset = symbol.value + relocation.addend
        if relocation.type in _PC_RELATIVE and section.code:
            offset += _tail(self.object.data(section), relocation.offset)
        return symbol.section, offset

    def _locate(self, index: int, offset: int) -> tuple[Piece, int] | None:
        """The piece at an offset of a section, or the last one before it, and the place in it."""
        if index in self._entries:
            stride, entries = self._entries[index]
            number = min(max(offset, 0) // stride, len(entries) - 1)
            piece, at = entries[number]
            return piece, at + offset - number * stride
        pieces = self._of_section.get(index)
        if not pieces:
            return None
        piece = pieces[max(bisect_right(self._starts[index], offset) - 1, 0)]
        return piece, offset - piece.start

    def _merged(self, section: Section, offset: int) -> tuple[str, int] | None:
        """The content of a string literal or constant, and the place in it."""
        if not 0 <= offset < section.size:
            return None
        data, size = self.object.data(section), max(section.entry_size, 1)
        start = offset - offset % size
        if section.flags & SHF_STRINGS:
            if size == 1:
                return _quoted(data[offset:].partition(b"\0")[0]), 0
            end = start
            while end < section.size and any(data[end : end + size]):
                end += size
            return f"text {data[start:end].hex()}", offset - start
        return f"constant {data[start : start + size].hex()}", offset - start

    def _jumps(self, section: Section, taken: set[int]) -> Iterator[Reference]:
        """Calls and jumps from one function to another's first byte whose displacements the assembler knew.

        Nothing but their target tells them from other bytes. Taking others for one is harmless: two builds would have
        to change the number and the distance alike for the difference to go unseen.
        """
        pieces = [p for p in self._of_section.get(section.number, ()) if p.size]
        if len(pieces) < 2:
            return
        data = self.object.data(section)
        at_start = {piece.start: piece for piece in pieces}
        for piece in pieces:
            end = piece.start + piece.size
            for match in _JUMP.finditer(data, piece.start, end):
                offset = match.end()
                width = 1 if match[0] == b"\xeb" else 4
                if offset + width > end or offset in taken:
                    continue
                target = offset + width + int.from_bytes(data[offset : offset + width], "little", signed=True)
                if (aim := at_start.get(target)) is not None and aim is not piece:
                    yield Reference(offset, width, _PC32, aim, 0)


def _offset(reference: Reference) -> int:
    return reference.offset


def _between(spans: list[tuple[int, int]], size: int) -> Iterator[tuple[int, int]]:
    """What is left of 0..size."""
    last = 0
    for start, end in spans:
        if start > last:
            yield last, start
        last = max(last, end)
    if last < size:
        yield last, size


def _tail(code: bytes, offset: int) -> int:
    """From a displacement relative to RIP to the end of its instruction: its own 4 bytes and those of an immediate.

    Intel SDM vol. 2, appendix A: the opcodes with ModRM and an immediate. Where nothing tells an opcode from the end of
    the instruction before, the more usual one is taken; it can shift a reference by a few bytes, in both builds alike.
    """
    if offset < 2 or code[offset - 1] & 0xC7 != 5:
        return 4  # no ModRM of this form: a call or jump
    register = code[offset - 1] >> 3 & 7
    opcode, before = code[offset - 2], code[offset - 3] if offset > 2 else 0
    if before == 0x0F and opcode not in (0x80, 0x81, 0x83):
        return 5 if opcode in (0x70, 0x71, 0x72, 0x73, 0xA4, 0xAC, 0xBA, 0xC2, 0xC4, 0xC5, 0xC6) else 4
    if opcode in (0x6B, 0x80, 0x83, 0xC0, 0xC1, 0xC6) or (opcode == 0xF6 and register < 2):
        return 5
    if opcode in (0x69, 0x81, 0xC7) or (opcode == 0xF7 and register < 2):
        rex = before if before & 0xF0 == 0x40 else 0
        prefix = code[offset - 4] if rex and offset > 3 else before
        return 6 if prefix == 0x66 and not rex & 8 else 8
    return 4


def _quoted(content: bytes) -> str:
    if _FRAME.fullmatch(content):
        content = b"KASAN frame " + _VARIABLE.sub(rb" \1", content)
    text = content.decode("utf-8", "backslashreplace")
    if len(text) > _LONGEST:
        text = f"{text[:_LONGEST]}… {hashlib.sha256(content).hexdigest()[:24]}"
    return f'"{text}"'
