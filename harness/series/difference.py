"""Two builds of one object side by side: which of their items are the same but for names, and what became of the rest.

Renames are found, not guessed: an item that is gone and a new one with the same shape are taken as a pair, and count as
the same only if everything they refer to, and everything that refers to them, is consistent with all such pairs.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Final, NamedTuple

from harness.series.normal import OF, Item, ObjectRecord

_UNREPORTED: Final = ("__pfx_", "__initcall__", "__UNIQUE_ID_", "__addressable_")
"""Names that compiler, objtool and macros make up: they are compared, but say nothing to people."""


class Difference(NamedTuple):
    """What became of one symbol of one object. Sizes in bytes; None where there is no such thing on that side.

    ``kind`` is as :class:`harness.series.normal.Item` has it; ``was`` is the symbol's name before, if it had another;
    ``moved``: its content is the same, its place among its neighbours is not, and that counts. ``users`` of data are
    the functions of the new build that refer to it.
    """

    file: str
    symbol: str
    kind: str
    section: str
    old_size: int | None
    new_size: int | None
    was: str = ""
    moved: bool = False
    users: tuple[str, ...] = ()


class Rename(NamedTuple):
    """A symbol that changed nothing but its name."""

    file: str
    old: str
    new: str
    kind: str


@dataclass(eq=False)
class Pair:
    """One object in both builds, and the names in it that were replaced."""

    file: str
    old: ObjectRecord
    new: ObjectRecord
    renames: dict[str, str] = field(default_factory=dict)

    def find_renames(self) -> None:
        """Fill ``renames``: what is gone against what is new."""
        new_keys = {item.key for item in self.new.items}
        known = {item.key for item in self.old.items}
        gone = [item for item in self.old.items if item.key not in new_keys]
        fresh = [item for item in self.new.items if item.key not in known]
        for plain in (True, False):  # what is called after a function follows that function's new name
            left = [i for i in gone if plain == (OF not in i.key) and self._translate(i.key, {}) not in new_keys]
            taken = {self._translate(i.key, {}) for i in gone}
            right = [i for i in fresh if plain == (OF not in i.key) and i.key not in taken]
            self._match(left, right)

    def _match(self, gone: Iterable[Item], fresh: Iterable[Item]) -> None:
        candidates: dict[tuple[object, ...], list[str]] = defaultdict(list)
        for item in fresh:
            candidates[_likeness(item)].append(item.key)
        for item in gone:
            if names := candidates.get(_likeness(item)):
                self.renames[item.key] = names.pop(0)

    def shared_renames(self) -> Iterator[tuple[str, str]]:
        """Those that other objects must follow."""
        for item in self.old.items:
            if item.shared and item.key in self.renames:
                yield item.key, self.renames[item.key]

    def _translate(self, name: str, shared: Mapping[str, str]) -> str:
        """What a name of the old build is in the new one."""
        if name in self.renames:
            return self.renames[name]
        if name.startswith('"'):
            return name
        base, of, root = name.partition(OF)
        if not of:
            return name if name in self._own else shared.get(name, name)
        root, mark, number = root.partition("#")
        return f"{base}{of}{self._translate(root, shared)}{mark}{number}"

    @cached_property
    def _own(self) -> set[str]:
        return {item.key for item in self.old.items}

    def compare(self, shared: Mapping[str, str]) -> tuple[list[Difference], list[Rename], list[Difference]]:
        """(differences, renames without any, items that only stand elsewhere in their sections)."""
        after = {item.key: item for item in self.new.items}
        pairs: list[tuple[Item, Item]] = []
        found: list[Difference] = []
        renamed: list[Rename] = []
        for old in self.old.items:
            new = after.pop(self._translate(old.key, shared), None)
            if new is None:
                found.append(Difference(self.file, old.key, old.kind, old.section, old.size, None))
                continue
            pairs.append((old, new))
            was = old.key if old.key != new.key else ""
            if old.shape != new.shape or [self._translate(t, shared) for t in old.targets] != [*new.targets]:
                found.append(Difference(self.file, new.key, new.kind, new.section, old.size, new.size, was))
            elif was and OF not in was and not was.startswith(_UNREPORTED) and "#" not in was:
                renamed.append(Rename(self.file, old.key, new.key, new.kind))
        found += [Difference(self.file, new.key, new.kind, new.section, None, new.size) for new in after.values()]
        return [*_without_consequences(found)], renamed, _moved(self.file, pairs, {d.section for d in found})


def compare_objects(pairs: list[Pair]) -> Iterator[tuple[Pair, list[Difference], list[Rename], list[Difference]]]:
    """Each pair that is not the same to the last name, with :meth:`Pair.compare`'s answer."""
    differing = [pair for pair in pairs if pair.old.digest != pair.new.digest]
    shared: dict[str, str] = {}
    for pair in differing:
        pair.find_renames()
        shared.update(pair.shared_renames())
    for pair in pairs:
        if pair in differing or (shared and any(t in shared for item in pair.old.items for t in item.targets)):
            yield pair, *pair.compare(shared)


def _likeness(item: Item) -> tuple[object, ...]:
    """What an item and the same under another name have in common."""
    base = item.key.partition(OF)[0] if OF in item.key else ""
    return item.kind, item.section, item.size, item.shape, item.shared, base


def _without_consequences(found: list[Difference]) -> Iterator[Difference]:
    """Leave out what only follows from a function that differs anyway: its table entries, its switch's targets."""
    named = {d.symbol for d in found if OF not in d.symbol and d.kind in ("function", "data")}
    for difference in found:
        base, of, root = difference.symbol.partition(OF)
        follows = bool(of) and (difference.kind == "table" or base.startswith(".")) and root.partition("#")[0] in named
        follows |= difference.kind == "section" and bool(named)
        follows |= difference.symbol.startswith("__pfx_") and difference.symbol.removeprefix("__pfx_") in named
        if not follows:
            yield difference


def _moved(file: str, pairs: list[tuple[Item, Item]], differing: set[str]) -> list[Difference]:
    """What stands in another order than before, in sections that hold the same things as before."""
    by_section: dict[str, list[tuple[Item, Item]]] = defaultdict(list)
    for old, new in pairs:
        if old.kind in ("function", "data") and old.section == new.section and old.section not in differing:
            by_section[old.section].append((old, new))
    found: list[Difference] = []
    for rows in by_section.values():
        rows.sort(key=lambda row: (row[0].offset, row[0].size))
        order = sorted(range(len(rows)), key=lambda n: (rows[n][1].offset, rows[n][1].size))
        rank = {n: place for place, n in enumerate(order)}
        stay = _longest_rising([rank[n] for n in range(len(rows))])
        for n, (old, new) in enumerate(rows):
            if n not in stay:
                found.append(Difference(file, new.key, new.kind, new.section, old.size, new.size))
    return found


def _longest_rising(numbers: list[int]) -> set[int]:
    """The places of a longest rising subsequence."""
    ends: list[int] = []  # places: ends[k] ends the best one of length k + 1
    values: list[int] = []
    before: list[int] = []
    for place, number in enumerate(numbers):
        k = bisect_left(values, number)
        before.append(ends[k - 1] if k else -1)
        ends[k : k + 1] = [place]
        values[k : k + 1] = [number]
    found: set[int] = set()
    place = ends[-1] if ends else -1
    while place >= 0:
        found.add(place)
        place = before[place]
    return found
