"""MemoryDiff: where two images of guest RAM differ, the one comparison of RAM byte by byte."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from harness.case import PAGE

_LINE: Final = 32  # bytes compared at once in a page that differs: byte by byte, a page takes 20 ms in the lab


@dataclass(frozen=True, slots=True)
class MemoryDiff:
    """A run of differing bytes in guest RAM, at most 16 of them."""

    gpa: int
    expected: bytes
    got: bytes

    def __str__(self) -> str:
        return f"memory {self.gpa:#x}: expected {self.expected.hex(' ')}, got {self.got.hex(' ')}"


def byte_diff(gpa: int, expected: bytes, got: bytes, ignore: Mapping[int, int]) -> list[MemoryDiff]:
    """Where two images of RAM at ``gpa`` differ, bits of ``ignore`` (byte address -> mask) left aside."""
    out: list[MemoryDiff] = []
    size, shown = len(expected), 0  # up to where differences are shown already
    for page in range(0, size, PAGE):
        if expected[page : page + PAGE] == got[page : page + PAGE]:
            continue
        for line in range(page, min(page + PAGE, size), _LINE):
            if expected[line : line + _LINE] == got[line : line + _LINE]:
                continue
            for offset in range(max(line, shown), min(line + _LINE, size)):
                if offset >= shown and (expected[offset] ^ got[offset]) & ~ignore.get(gpa + offset, 0):
                    shown = min(offset + 16, size)
                    out.append(MemoryDiff(gpa + offset, expected[offset:shown], got[offset:shown]))
    return out
