"""The normal form of an object: its functions, data and tables, free of what says nothing about the code.

Two objects with equal items do the same. Names are kept apart from content: an item's ``shape`` is a digest of its
bytes, with the *n*-th thing it refers to as *n*, and ``targets`` are those things. So a rename is seen as one.

Names that compilers and macros number (``__func__.12``, ``__UNIQUE_ID_x34``, a switch's table, which has none) change
when anything is added before them; here they are called after the function that refers to them first.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final, NamedTuple

from harness.lab.errors import LabInputError
from harness.series.elf import (
    SHF_MERGE,
    SHN_ABS,
    SHN_COMMON,
    STB_LOCAL,
    STB_WEAK,
    STT_FILE,
    read_object,
)
from harness.series.pieces import Piece, Pieces, Reference

OF: Final = " of "
"""Stands in the name of what has none of its own: ``.rodata of em_call``, ``__ex_table of vmx_vmexit``."""
_BUG_TABLE: Final = "__bug_table"
_FUNCTION_NAMES: Final = ("__func__", "__FUNCTION__", "__PRETTY_FUNCTION__")
_NUMBERED: Final = re.compile(r"(__UNIQUE_ID_.*?|__addressable_.*?|__BTF_ID__.*?)_*\d+")
_INITCALL: Final = re.compile(r"(__initcall__kmod_.*?)__\d+_\d+_(.*)")  # a counter and __LINE__
_KASAN_REGISTRY: Final = re.compile(r"\.data of _sub_[DI]_\d+_\d+(#\d+)?")
"""What gcc's constructors for KASAN register: name, file, line and size of each global variable."""
_DIGEST: Final = 12  # bytes


class Item(NamedTuple):
    """One function, data object, table entry group, label or section of an object.

    ``key`` is its name, unique in the object; ``kind`` is ``function``, ``data``, ``table``, ``label`` or ``section``;
    ``shared`` says that other objects know it by that name; ``offset`` is that in its section, ``size`` in bytes.
    """

    key: str
    kind: str
    section: str
    shared: bool
    offset: int
    size: int
    shape: str
    targets: tuple[str, ...]

    @property
    def owner(self) -> str:
        """The function that this belongs to; its own name when it stands for itself."""
        return self.key.partition(OF)[2].partition("#")[0] or self.key


@dataclass(frozen=True)
class ObjectRecord:
    """An object's items, and the file they were read from: ``stamp`` is its size and modification time."""

    stamp: tuple[int, int]
    in_order: bool
    items: tuple[Item, ...]

    @cached_property
    def digest(self) -> str:
        """Equal for objects with the same items, names included."""
        return _digest(repr((self.in_order, self.items)).encode())

    def to_json(self) -> list[Any]:
        """For :meth:`from_json`."""
        return [*self.stamp, self.in_order, [[*item] for item in self.items]]

    @classmethod
    def from_json(cls, data: list[Any]) -> ObjectRecord:
        """What :meth:`to_json` gave."""
        size, mtime, in_order, items = data
        return cls((size, mtime), in_order, tuple(Item._make((*item[:-1], tuple(item[-1]))) for item in items))


def record_object(path: Path) -> ObjectRecord:
    """The items of an object file. Raises ObjectError when it is none, OSError."""
    status = path.stat()
    pieces = Pieces(read_object(path))
    _give_names(pieces)
    return ObjectRecord((status.st_size, status.st_mtime_ns), pieces.in_order, tuple(_items(pieces)))


def whole_file(path: Path, *more: Path, without: str) -> ObjectRecord:
    """A file (or several) that is compared as it is, but for a path in it that says where the build stands.

    Of an object the debugging information is left aside. LabInputError when objcopy cannot do that.
    """
    status = path.stat()
    content = b"".join(_without_debugging(file) for file in (path, *more)).replace(without.encode(), b"")
    item = Item(path.name, "file", "", False, 0, len(content), _digest(content), ())
    return ObjectRecord((status.st_size, status.st_mtime_ns), True, (item,))


def _without_debugging(path: Path) -> bytes:
    """The bytes of a file; of an ELF object without debugging information, which says where its sources stood."""
    content = path.read_bytes()
    if not content.startswith(b"\x7fELF"):
        return content
    with tempfile.NamedTemporaryFile() as stripped:
        command = ["objcopy", "--strip-debug", str(path), stripped.name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise LabInputError(f"{path}: objcopy cannot read it ({done.stderr.strip()}): build again")
        return Path(stripped.name).read_bytes()


# --- names ------------------------------------------------------------------------------------------------------------


def _give_names(pieces: Pieces) -> None:
    """A key for every piece: its symbol's name, or what it is called after the first function that refers to it."""
    taken: Counter[str] = Counter()
    roots: dict[int, str] = {}  # of a piece: the named one that led to it

    def give(piece: Piece, key: str, root: str | None = None) -> None:
        taken[key] += 1
        alone = taken[key] == 1 and (OF in key or piece.name == key)
        piece.key = key if alone else f"{key}#{taken[key]}"
        roots[id(piece)] = root or piece.key

    def follow(found: list[Piece]) -> None:
        for piece in found:  # which grows
            root = roots[id(piece)]
            for _, reference in _references(pieces, piece):
                target = reference.target
                if isinstance(target, Piece) and not target.key and not target.owner:
                    give(target, f"{_base(target)}{OF}{root}", root)
                    found.append(target)

    def loose(code: bool) -> None:
        for piece in pieces.pieces:
            if not piece.key and not piece.owner and piece.section.code == code:
                give(piece, _base(piece))
                follow([piece])

    def tables() -> None:
        found = [piece for piece in pieces.pieces if piece.owner and piece.owner.key and not piece.key]
        for piece in found:
            assert piece.owner is not None
            root = roots.get(id(piece.owner), piece.owner.key)
            give(piece, f"{piece.section.name}{OF}{root}", root)
        follow(found)

    named = [piece for piece in pieces.pieces if not piece.owner and piece.name and not _base(piece)]
    for piece in named:
        give(piece, piece.name)
    follow(named)
    tables()
    loose(code=True)
    tables()
    loose(code=False)


def _base(piece: Piece) -> str:
    """What a piece without a lasting name is; empty for one that has it."""
    if not piece.name:
        return piece.section.name
    if piece.kind == "data" and (match := re.fullmatch(r"(.+?)(?:\.\d+)+", piece.name)):
        return match[1]
    if match := _NUMBERED.fullmatch(piece.name):
        return match[1]
    if match := _INITCALL.fullmatch(piece.name):
        return f"{match[1]}_{match[2]}"
    return ""


def _references(pieces: Pieces, piece: Piece) -> Iterator[tuple[int, Reference]]:
    """Those of all spans of a piece, with their offsets from its start."""
    shift = 0
    for number, start, end in piece.spans:
        for reference in pieces.references_in(pieces.object.sections[number], start, end):
            yield reference.offset - start + shift, reference
        shift += end - start


# --- content ----------------------------------------------------------------------------------------------------------


def _items(pieces: Pieces) -> Iterator[Item]:
    functions = {s.name for s in pieces.object.symbols if s.type == 2}
    for piece in pieces.pieces:
        shared = bool(piece.name) and piece.binding != STB_LOCAL
        name = _function_name(pieces, piece)
        shape, targets = _content(pieces, piece)
        if name in functions:  # follows the function's name: any other text is content
            shape, targets = _digest(b"a function's name"), (f"name{OF}{name}",)
        elif _KASAN_REGISTRY.fullmatch(piece.key):
            shape, targets = _digest(b"registry"), ()
        yield Item(piece.key, piece.kind, piece.section.name, shared, piece.start, piece.size, shape, targets)
    for label in pieces.labels:
        shape = _digest(f"{label.at} {label.symbol.binding == STB_WEAK}".encode())
        yield Item(label.symbol.name, "label", label.piece.section.name, True, 0, 0, shape, (label.piece.key,))
    for symbol in pieces.object.symbols:
        if symbol.section in (SHN_ABS, SHN_COMMON) and symbol.binding != STB_LOCAL and symbol.type != STT_FILE:
            section, kind = ("*ABS*", "label") if symbol.section == SHN_ABS else ("*COMMON*", "data")
            shape = _digest(f"{symbol.value} {symbol.size} {symbol.binding == STB_WEAK}".encode())
            yield Item(symbol.name, kind, section, True, 0, symbol.size, shape, ())
    for head in pieces.sections:
        if not head.flags & SHF_MERGE:
            shape = _digest(f"{head.type} {head.flags} {head.alignment}".encode())
            yield Item(f"section {head.name}", "section", head.name, False, 0, 0, shape, ())


def _content(pieces: Pieces, piece: Piece) -> tuple[str, tuple[str, ...]]:
    """(shape, targets) of a piece."""
    content = bytearray()
    for number, start, end in piece.spans:
        content += pieces.object.data(pieces.object.sections[number])[start:end]
    targets: dict[str, int] = {}
    links: list[tuple[int, int, int, int]] = []
    for offset, (_, width, kind, target, at) in _references(pieces, piece):
        content[offset : offset + width] = bytes(width)
        name = target if isinstance(target, str) else target.key
        links.append((offset, kind, targets.setdefault(name, len(targets)), at))
    if piece.section.name == _BUG_TABLE and piece.owner:
        # struct bug_entry ends with `unsigned short line, flags`: where a WARN() stands in its file is no behaviour.
        for after in range(piece.stride, len(content) + 1, piece.stride):
            content[after - 4 : after - 2] = b"\0\0"
    head = f"{piece.section.name} {piece.size} {piece.binding == STB_WEAK} {links}".encode()
    return _digest(head, bytes(content)), tuple(targets)


def _function_name(pieces: Pieces, piece: Piece) -> str:
    """The text of ``__func__``."""
    if piece.kind != "data" or _base(piece) not in _FUNCTION_NAMES:
        return ""
    return pieces.object.data(piece.section)[piece.start : piece.start + piece.size].rstrip(b"\0").decode("latin-1")


def _digest(*parts: bytes) -> str:
    h = hashlib.blake2b(digest_size=_DIGEST)
    for part in parts:
        h.update(part)
    return h.hexdigest()
