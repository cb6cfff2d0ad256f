"""Which Linux series something is about: ``6.1``, ``6.1..6.12``, ``7.2..``."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class KernelRange:
    """Which Linux series, as ``first..last`` pairs, both included; ``last`` may be open."""

    spans: tuple[tuple[tuple[int, int], tuple[int, int] | None], ...]

    @classmethod
    def parse(cls, text: str) -> KernelRange:
        """Read ``"6.1"``, ``"6.1..6.12"``, ``"7.2.."`` or several with commas. Raises ValueError."""
        spans: list[tuple[tuple[int, int], tuple[int, int] | None]] = []
        for part in text.split(","):
            match = re.fullmatch(r"\s*(\d+)\.(\d+)(\.\.(?:(\d+)\.(\d+))?)?\s*", part)
            if match is None:
                raise ValueError(f"{part.strip()!r} is no range of kernels: write 6.1, 6.1..6.12 or 7.2..")
            first = int(match[1]), int(match[2])
            last = first if match[3] is None else (int(match[4]), int(match[5])) if match[4] else None
            spans.append((first, last))
        return cls(tuple(spans))

    def __contains__(self, series: object) -> bool:
        """Whether ``(major, minor)`` is meant."""
        return isinstance(series, tuple) and any(a <= series and (b is None or series <= b) for a, b in self.spans)

    def __str__(self) -> str:
        shown = [
            f"{a[0]}.{a[1]}" + ("" if b == a else " and later" if b is None else f" to {b[0]}.{b[1]}")
            for a, b in self.spans
        ]
        return ", ".join(shown)


def series_of(release: str) -> tuple[int, int]:
    """``(7, 3)`` of ``7.3.4+deb13-cloud-amd64``. ValueError for what is no release."""
    match = re.match(r"(\d+)\.(\d+)", release)
    if match is None:
        raise ValueError(f"{release!r} is no release of Linux")
    return int(match[1]), int(match[2])
