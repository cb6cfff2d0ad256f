"""Known divergences: data that says where a KVM differs from the architecture, with the exact wrong value.

A row excuses nothing but what it names: the Cases, the register, the kind of wrong value and the hosts.  When such a
Case agrees again it is *healed*.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Final

from harness.case import PAGE, Case
from harness.exits import Timeout
from harness.lockstep import Difference
from harness.machine import MemoryDiff
from harness.modes import STUBS
from harness.state import FieldDiff

FILE: Final = Path(__file__).resolve().parent.parent / "known_divergences.toml"
_KEYS: Final = {"name", "cases", "module", "register", "wrong", "why", "reproducer", "reference"}
_WRONG: Final = ("zero-extended-32", "not-written", "half-written", "no-exception", "timeout")


class KnownError(ValueError):
    """known_divergences.toml is not usable."""


@dataclass(frozen=True)
class KnownDivergence:
    """One row. ``cases`` are patterns of Case names, ``module`` patterns of the host's vendor module.

    ``wrong`` is the exact wrong value: a number; ``zero-extended-32``, the expected value with its upper 32 bits
    cleared; ``clear N`` or ``set N``, the expected value with the bits of N cleared or set; ``not-written``, memory
    that should have been written still holds its initial bytes; ``half-written``, a store that faulted left bytes at
    the end of its first page; ``no-exception``, the guest goes on where an exception must be; ``timeout``, it does not
    leave KVM_RUN.
    """

    name: str
    cases: tuple[str, ...]
    module: tuple[str, ...]
    register: tuple[str, ...]
    wrong: str | int
    why: str
    reproducer: str
    reference: str

    def covers(self, case_name: str, module: str) -> bool:
        """This row speaks of this Case on this host."""
        return any(fnmatchcase(module, p) for p in self.module) and any(fnmatchcase(case_name, p) for p in self.cases)

    def explains(self, case: Case, difference: Difference) -> bool:
        """Everything that differs is what this row names, with exactly the wrong value."""
        if self.wrong == "timeout":
            return difference.got is not None and isinstance(difference.got.exit, Timeout)
        if difference.exits_differ:
            return False
        if self.wrong == "not-written":
            return not difference.registers and all(_not_written(case, d) for d in difference.memory)
        if self.wrong == "half-written":
            return not difference.registers and all(_page_end(d) for d in difference.memory)
        if self.wrong == "no-exception":
            rip = next((d for d in difference.registers if d.name == "rip"), None)
            return rip is not None and _in_stubs(rip.expected) and not _in_stubs(rip.got)
        if not difference.registers or not all(_saved_flags(difference, d) for d in difference.memory):
            return False
        return all(d.name in self.register and d.got == self._value(d) for d in difference.registers)

    def _value(self, found: FieldDiff) -> int:
        if isinstance(self.wrong, int):
            return self.wrong
        if self.wrong == "zero-extended-32":
            return found.expected & 0xFFFFFFFF
        verb, _, number = self.wrong.partition(" ")
        bits = int(number, 0)
        return found.expected & ~bits if verb == "clear" else found.expected | bits


def _saved_flags(difference: Difference, found: MemoryDiff) -> bool:
    """Memory differs in the very bits in which RFLAGS does: its image in the frame of the exception that followed."""
    flags = next((d.xor for d in difference.registers if d.name == "rflags"), 0)
    memory = int.from_bytes(found.expected, "little") ^ int.from_bytes(found.got, "little")
    while flags and not flags & 0xFF:  # a MemoryDiff starts at the first byte that differs
        flags >>= 8
    return bool(flags) and memory == flags


def _page_end(found: MemoryDiff) -> bool:
    """Only the last 8 bytes of a page differ (the widest store has 8)."""
    differing = [found.gpa + i for i, (a, b) in enumerate(zip(found.expected, found.got, strict=True)) if a != b]
    return all(gpa % PAGE >= PAGE - 8 for gpa in differing)


def _in_stubs(rip: int) -> bool:
    return STUBS <= rip < STUBS + 0x1000


def _not_written(case: Case, found: MemoryDiff) -> bool:
    slot = next(s for s in case.shape.slots if s.gpa <= found.gpa < s.gpa + s.size)
    at = found.gpa - slot.gpa
    initial = case.memory.image(slot)[at : at + len(found.got)]
    return all(got in (want, old) for want, got, old in zip(found.expected, found.got, initial, strict=True))


def _usable(wrong: object) -> bool:
    if isinstance(wrong, int) or wrong in _WRONG:
        return True
    verb, _, number = str(wrong).partition(" ")
    return verb in ("clear", "set") and number.startswith("0x")


def load_known(path: Path = FILE) -> tuple[KnownDivergence, ...]:
    """Read the file. KnownError says which row is wrong and how."""
    try:
        rows = tomllib.loads(path.read_text()).get("divergence", [])
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise KnownError(f"{path}: {error}") from error
    out = []
    for n, row in enumerate(rows):
        if set(row) != _KEYS:
            wrong = sorted(set(row) ^ _KEYS)
            raise KnownError(f"{path}: divergence {n + 1}: missing or unknown: {', '.join(wrong)}")
        if not _usable(row["wrong"]):
            raise KnownError(
                f"{path}: divergence {n + 1}: wrong must be a number, 'clear 0xN', 'set 0xN' "
                f"or one of {', '.join(_WRONG)}"
            )
        lists = {key: tuple(row[key]) for key in ("cases", "module", "register")}
        out.append(KnownDivergence(**{**row, **lists}))
    return tuple(out)
