"""Relocatable ELF objects (64-bit, little-endian): sections, symbols, relocations; no more than comparing code needs.

pyelftools reads the same, a hundred times slower: a kernel has half a million relocations. Source: the System V ABI,
chapter 4, and its AMD64 supplement, 4.1 to 4.4.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final, NamedTuple

SHT_NOBITS: Final = 8
_SHT_SYMTAB: Final = 2
_SHT_RELA: Final = 4
_SHT_SYMTAB_SHNDX: Final = 18
SHF_WRITE: Final = 1
SHF_ALLOC: Final = 2
SHF_EXECINSTR: Final = 4
SHF_MERGE: Final = 0x10
SHF_STRINGS: Final = 0x20
STT_FUNC: Final = 2
STT_SECTION: Final = 3
STT_FILE: Final = 4
STB_LOCAL: Final = 0
STB_WEAK: Final = 2
SHN_UNDEF: Final = 0
SHN_ABS: Final = 0xFFF1
SHN_COMMON: Final = 0xFFF2
_SHN_XINDEX: Final = 0xFFFF
_ET_REL: Final = 1
_EM_X86_64: Final = 62

_SECTION: Final = struct.Struct("<IIQQQQIIQQ")
_SYMBOL: Final = struct.Struct("<IBBHQQ")
_RELA: Final = struct.Struct("<QIIq")


class ObjectError(ValueError):
    """A file that is no relocatable object of x86-64, or a damaged one."""


class Section(NamedTuple):
    """One section; ``offset`` is that in the file, ``size`` in bytes, ``link`` and ``info`` as its type has it."""

    number: int
    name: str
    type: int
    flags: int
    offset: int
    size: int
    link: int
    info: int
    alignment: int
    entry_size: int

    @property
    def code(self) -> bool:
        """Whether it holds instructions."""
        return bool(self.flags & SHF_EXECINSTR)


class Symbol(NamedTuple):
    """One symbol; ``section`` is an index, or one of SHN_UNDEF, SHN_ABS and SHN_COMMON."""

    name: str
    type: int
    binding: int
    section: int
    value: int
    size: int


class Relocation(NamedTuple):
    """One relocation of the section it belongs to; ``symbol`` is an index."""

    offset: int
    type: int
    symbol: int
    addend: int


@dataclass(frozen=True)
class ElfObject:
    """A relocatable object in memory."""

    path: Path
    image: bytes
    sections: tuple[Section, ...]

    def data(self, section: Section) -> bytes:
        """A section's bytes; none when it has no place in the file (.bss)."""
        if section.type == SHT_NOBITS:
            return b""
        return self.image[section.offset : section.offset + section.size]

    @cached_property
    def symbols(self) -> list[Symbol]:
        """The symbol table, in its order."""
        table = next((s for s in self.sections if s.type == _SHT_SYMTAB), None)
        if table is None:
            return []
        names = self.data(self.sections[table.link])
        wide = next((s for s in self.sections if s.type == _SHT_SYMTAB_SHNDX and s.link == table.number), None)
        extended = [n for (n,) in struct.iter_unpack("<I", self.data(wide))] if wide else []
        return [
            Symbol(
                _string(names, name), info & 15, info >> 4,
                extended[number] if section == _SHN_XINDEX else section, value, size,
            )
            for number, (name, info, _, section, value, size) in enumerate(_SYMBOL.iter_unpack(self.data(table)))
        ]  # fmt: skip

    @cached_property
    def relocations(self) -> dict[int, list[Relocation]]:
        """The relocations of each section that has any, by its index, in the order of their offsets."""
        found: dict[int, list[Relocation]] = {}
        for section in self.sections:
            if section.type == _SHT_RELA:
                rows = [Relocation(o, t, s, a) for o, t, s, a in _RELA.iter_unpack(self.data(section))]
                found[section.info] = sorted(rows)
        return found


def read_object(path: Path) -> ElfObject:
    """Read an object file. Raises ObjectError when it is none, OSError."""
    image = path.read_bytes()
    if image[:6] != b"\x7fELF\2\1" or len(image) < 64:
        raise ObjectError(f"{path} is no 64-bit ELF file")
    kind, machine = struct.unpack_from("<HH", image, 16)
    if (kind, machine) != (_ET_REL, _EM_X86_64):
        raise ObjectError(f"{path} is no relocatable object for x86-64")
    (table,) = struct.unpack_from("<Q", image, 40)
    count, strings = struct.unpack_from("<HH", image, 60)
    try:
        first = _SECTION.unpack_from(image, table)
        count, strings = count or first[5], first[6] if strings == _SHN_XINDEX else strings
        rows = [_SECTION.unpack_from(image, table + _SECTION.size * n) for n in range(count)]
        names = image[rows[strings][4] : rows[strings][4] + rows[strings][5]]
    except (struct.error, IndexError) as error:
        raise ObjectError(f"{path} is damaged: {error}") from error
    sections = [
        Section(n, _string(names, name), type_, flags, offset, size, link, info, alignment, entry)
        for n, (name, type_, flags, _, offset, size, link, info, alignment, entry) in enumerate(rows)
    ]
    if any(s.type != SHT_NOBITS and s.offset + s.size > len(image) for s in sections):
        raise ObjectError(f"{path} is damaged: a section reaches beyond its end")
    return ElfObject(path, image, tuple(sections))


def _string(table: bytes, start: int) -> str:
    return table[start : table.index(b"\0", start)].decode(errors="replace")
