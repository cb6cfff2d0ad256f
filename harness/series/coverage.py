"""What the suite reached of what a patch changed: functions that were executed, joined with functions that changed."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from harness.lab.trace import SHOWN
from harness.words import counted

_FUNCTIONS: Final = "tTwW"  # types of nm


@dataclass(frozen=True)
class Reached:
    """Of some functions: those that a cell has executed, those that it has not, and those that nobody can tell of.

    Nobody can where ftrace cannot follow a function (noinstr code, assembly, cold parts), where two names look alike in
    its profile, or where the machine that ran it did not come to its end. ``problem``: why not more is known.
    """

    executed: frozenset[str] = frozenset()
    never: frozenset[str] = frozenset()
    unknown: frozenset[str] = frozenset()
    problem: str = ""

    def __or__(self, other: Reached) -> Reached:
        """What two cells have reached together."""
        executed = self.executed | other.executed
        unknown = (self.unknown | other.unknown) - executed
        never = (self.never | other.never) - executed - unknown
        return Reached(executed, never, unknown, self.problem or other.problem)

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return {
            "executed": sorted(self.executed), "never": sorted(self.never), "unknown": sorted(self.unknown),
            "problem": self.problem,
        }  # fmt: skip


class Symbols:
    """Functions of a kernel by address, from its System.map (the output of nm)."""

    def __init__(self, system_map: Path) -> None:
        self._names: dict[int, list[str]] = {}
        self._text = 0
        for line in system_map.read_text().splitlines():
            address, kind, name = line.split(None, 2)
            if name == "_text":
                self._text = int(address, 16)
            elif kind in _FUNCTIONS:
                self._names.setdefault(int(address, 16), []).append(name)
        self._addresses = sorted(self._names)

    def at(self, offset: int) -> Sequence[str]:
        """The names of the function that holds the byte at an offset from ``_text``."""
        index = bisect_right(self._addresses, self._text + offset) - 1
        return self._names[self._addresses[index]] if index >= 0 else ()


def reached(
    names: Collection[str],
    executed: Iterable[Mapping[str, Any]],
    machines: int,
    symbols: Symbols,
    *,
    enough: bool = False,
) -> Reached:
    """What answers of the function profile say of ``names``, which it was told to follow.

    ``machines`` is how many were started: where fewer have answered for the whole of their run, what none of them saw
    is not known. ``enough``: they were ended early on purpose, for so many Cases had failed.
    """
    seen: set[str] = set()
    missing: set[str] = set()
    answers = list(executed)
    for answer in answers:
        if problem := answer.get("error"):
            return Reached(unknown=frozenset(names), problem=str(problem))
        missing |= set(answer["missing"])
        seen |= _by_offset(answer["seen"], symbols) if answer["offsets"] else _by_name(answer["seen"], names)
    alike = {name for name in names if name not in seen and _cut(name) in seen}
    never = set(names) - seen - missing - alike
    if sum(answer.get("whole", True) for answer in answers) < max(1, machines):
        why = "so many Cases failed that the run was ended" if enough else "a machine was lost"
        why = "" if set(names) <= seen | missing else why
        return Reached(frozenset(seen & set(names)), frozenset(), frozenset(set(names) - seen), why)
    return Reached(frozenset(seen & set(names)), frozenset(never), frozenset((missing | alike) & set(names)))


def _by_offset(seen: Iterable[str], symbols: Symbols) -> set[str]:
    out: set[str] = set()
    for text in seen:
        base, plus, offset = text.partition("+")
        if base == "_text" and plus:
            out.update(symbols.at(int(offset, 16)))
    return out


def _by_name(seen: Iterable[str], names: Collection[str]) -> set[str]:
    """The profile shows the beginning of a name: where several begin so, it stays as it is shown."""
    whole: dict[str, list[str]] = {}
    for name in names:
        whole.setdefault(_cut(name), []).append(name)
    return {found[0] if len(found := whole.get(text, [text])) == 1 else text for text in seen}


def _cut(name: str) -> str:
    return name[:SHOWN]


def _line(head: str, names: Iterable[str]) -> str:
    return f"{head}: {', '.join(sorted(names))}"


def reached_lines(found: Reached) -> list[str]:
    """For people: always a line, and one for each kind of function that was not reached."""
    total = len(found.executed) + len(found.never) + len(found.unknown)
    if not total:
        return ["no function changed, nor data that one refers to"]
    which = f"{counted(total, 'function')} that changed, or whose data did"
    verb = "was" if total == 1 else "were"
    if found.unknown:
        verb = "is known to have been" if total == 1 else "are known to have been"
    lines = [f"{len(found.executed)} of {which}, {verb} executed"]
    if found.never:
        lines.append(_line("changed but never executed", found.never))
    if found.unknown:
        why = found.problem or "ftrace cannot follow them"
        lines.append(_line(f"changed, and not known whether executed ({why})", found.unknown))
    return lines
