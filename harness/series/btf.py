"""BTF, the kernel's compact type information: enumerations and structures by name.

Source: Documentation/bpf/btf.rst. A module's BTF is "split": its types and strings go on where vmlinux's end.
"""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

_HEADER: Final = struct.Struct("<HBBIIIII")  # magic, version, flags, own size, types' offset and size, strings' too
_TYPE: Final = struct.Struct("<III")  # name, info, size or type
_MAGIC: Final = 0xEB9F
_INT, _POINTER, _ARRAY, _STRUCT, _UNION, _ENUM, _TYPEDEF, _ENUM64 = 1, 2, 3, 4, 5, 6, 8, 19
_TRANSPARENT: Final = {_TYPEDEF, 9, 10, 11, 18}  # typedef, volatile, const, restrict, type tag: sized as what they name
# Bytes that follow each type, and each of its `vlen` members.
_TRAILERS: Final = {
    1: (4, 0), 2: (0, 0), 3: (12, 0), 4: (0, 12), 5: (0, 12), 6: (0, 8), 7: (0, 0), 8: (0, 0), 9: (0, 0), 10: (0, 0),
    11: (0, 0), 12: (0, 0), 13: (0, 8), 14: (4, 0), 15: (0, 12), 16: (0, 0), 17: (4, 0), 18: (0, 0), 19: (0, 12),
}  # fmt: skip


class BtfError(ValueError):
    """What is given is no BTF, is damaged, or is of a kind that is not known here."""


class Member(NamedTuple):
    """A structure's member: offset and size in bytes; how many elements it has if it is an array, else None."""

    offset: int
    size: int
    elements: int | None


class _Type(NamedTuple):
    name: int
    kind: int
    signed: bool  # for an enumeration; for a structure: members' offsets tell of bit fields
    members: int
    size: int  # or the type it refers to
    place: int  # of what follows
    data: bytes


class Btf:
    """One blob of BTF; with ``base`` that of a module, which is vmlinux's."""

    def __init__(self, data: bytes, base: Btf | None = None) -> None:
        """Raises BtfError."""
        try:
            magic, version, _, size, types, types_size, strings, strings_size = _HEADER.unpack_from(data)
            if magic != _MAGIC or version != 1:
                raise BtfError("this is no BTF of a little-endian kernel")
            own = data[size + strings : size + strings + strings_size]
            self._strings: bytes = base._strings + own if base else own
            self._types: list[_Type] = [*base._types] if base else [_Type(0, 0, False, 0, 0, 0, b"")]
            self._read(data, size + types, size + types + types_size)
        except (struct.error, IndexError) as error:
            raise BtfError(f"this BTF is damaged: {error}") from error

    def enumeration(self, name: str) -> dict[str, int] | None:
        """The enumerators of ``enum name``; None when there is no such type."""
        found = self._named(name, (_ENUM, _ENUM64))
        if found is None:
            return None
        values: dict[str, int] = {}
        for n in range(found.members):
            if found.kind == _ENUM64:
                text, low, high = struct.unpack_from("<III", found.data, found.place + 12 * n)
                value, bits = low | high << 32, 64
            else:
                text, value = struct.unpack_from("<II", found.data, found.place + 8 * n)
                bits = 32
            values[self._string(text)] = value - (1 << bits) if found.signed and value >> (bits - 1) else value
        return values

    def structure(self, name: str) -> dict[str, Member] | None:
        """The members of ``struct name``; None when there is no such type. Raises BtfError."""
        found = self._named(name, (_STRUCT,))
        if found is None:
            return None
        members: dict[str, Member] = {}
        for n in range(found.members):
            text, number, offset = struct.unpack_from("<III", found.data, found.place + 12 * n)
            bits = offset & 0xFFFFFF if found.signed else offset
            members[self._string(text)] = Member(bits // 8, self._size(number), self._count(number))
        return members

    def _read(self, data: bytes, place: int, end: int) -> None:
        while place < end:
            name, info, size = _TYPE.unpack_from(data, place)
            kind, members = info >> 24 & 0x1F, info & 0xFFFF
            if kind not in _TRAILERS:
                raise BtfError(f"this BTF has types of kind {kind}, which are newer than this reader")
            once, each = _TRAILERS[kind]
            self._types.append(_Type(name, kind, bool(info >> 31), members, size, place + 12, data))
            place += 12 + once + each * members
        if place > len(data):
            raise BtfError("this BTF is damaged: its types reach beyond its end")

    def _named(self, name: str, kinds: tuple[int, ...]) -> _Type | None:
        wanted = name.encode()
        return next((t for t in self._types if t.kind in kinds and t.name and self._is(t.name, wanted)), None)

    def _is(self, place: int, wanted: bytes) -> bool:
        return self._strings.startswith(wanted + b"\0", place)

    def _string(self, place: int) -> str:
        return self._strings[place : self._strings.find(b"\0", place)].decode(errors="replace")

    def _resolved(self, number: int) -> _Type:
        for _ in range(64):
            if number >= len(self._types):
                raise BtfError("a type refers to one that is not there: is this a module's BTF, without its kernel's?")
            found = self._types[number]
            if found.kind not in _TRANSPARENT:
                return found
            number = found.size
        raise BtfError("this BTF is damaged: a type refers to itself")

    def _count(self, number: int) -> int | None:
        found = self._resolved(number)
        return struct.unpack_from("<III", found.data, found.place)[2] if found.kind == _ARRAY else None

    def _size(self, number: int) -> int:
        """In bytes; of an array all of it."""
        found = self._resolved(number)
        if found.kind == _POINTER:
            return 8
        if found.kind == _ARRAY:
            element, _, count = struct.unpack_from("<III", found.data, found.place)
            return int(count) * self._size(element)
        return found.size if found.kind in (_INT, _STRUCT, _UNION, _ENUM, _ENUM64, 16) else 0
