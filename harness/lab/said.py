"""What a kernel said on its console, and what of that no Case was told of yet."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from harness.lab.splat import Splat, find_splats

# Exit code without a signal: our init came to its end. One that a signal killed may be the kernel's work.
_INIT_ENDED: Final = re.compile(r"Attempted to kill init! exitcode=0x[0-9a-f]{6}00")
_NUMBER: Final = re.compile(r"\b(?:0x[0-9a-f]+|\d+)\b")
_BETWEEN: Final = re.compile(r"[^\w.]+")
_KVM: Final = re.compile(r"kvm|svm|vmx", re.IGNORECASE)
_LOADED: Final = "Modules linked in:"


def slug(title: str) -> str:
    """A splat's title as part of a name: the same in another run, and where only line numbers are others."""
    return _BETWEEN.sub("-", _NUMBER.sub("", title)).strip("-")


def of_kvm(splat: Splat) -> bool:
    """Its lines speak of KVM; that its modules are loaded does not count."""
    return any(_KVM.search(line) for line in splat.text.splitlines() if _LOADED not in line)


class Said:
    """The consoles of one machine. ``boot``: that of its boot, where it was kept and went on; else ``console`` has it.

    What the kernel says while it boots is one thing, what it says from the suite's beginning on another.
    """

    def __init__(self, console: Path, boot: Path | None = None) -> None:
        self.console, self._boot = console, boot
        self._before = 0  # splats on ``console`` that are of the boot
        self._told: set[str] = set()

    def booted(self) -> list[Splat]:
        """The suite begins: what was said until now."""
        found = _read(self._boot or self.console)
        self._before = len(found) if self._boot is None else 0
        return found

    def told(self, splats: Iterable[Splat]) -> None:
        """A Case has been told of these (as /dev/kmsg has them; a console may lack their first line)."""
        self._told.update(slug(splat.title) for splat in splats)

    def untold(self) -> list[Splat]:
        """What the kernel has said since the suite began and nobody was told of. That our init ended is no splat."""
        found = [s for s in _read(self.console)[self._before :] if not _INIT_ENDED.search(s.title)]
        return [s for s in found if not any(_same(slug(s.title), told) for told in self._told)]


def _same(one: str, other: str) -> bool:
    return one.startswith(other) or other.startswith(one)


def _read(console: Path) -> list[Splat]:
    return find_splats(console.read_text(errors="replace")) if console.exists() else []
