"""Is it the same code? Every allocated section of every object of two builds of a kernel, one against the other.

:func:`record` reads a build directory, :func:`compare` two records. Builds overwrite each other, so a record is kept:
it goes to JSON and back, and helps the next one: objects that have not changed since are not read again.

Equal means equal for this configuration and compiler: the same instructions and data, referring to the same things.
What does not count, and why:

- line numbers in ``__bug_table``: where a WARN() stands in its file moves with every line added above it. So do names
  and lines of variables in what KASAN says of stack frames and registers of global variables. Elsewhere a line number
  is an operand like any other (``might_sleep()``, lockdep's RCU checks, both in the debug variant): there it does
  count, for nothing tells it from other numbers, and a kernel that is run once too often is the lesser evil;
- names of symbols, if all that refer to one are consistent: they are listed as renamed; so is the text of ``__func__``;
- numbers that compiler and macros put into names (``key.12``, ``__UNIQUE_ID_x34``): they count what came before;
- the order of functions that a C compiler made: they are listed as moved. The order of data counts: code may reach
  from one object into the next in ways that relocations do not tell;
- ``.discard*`` sections (the linker drops them) and what is not loaded (debugging information, symbol tables);
- what the build makes out of the linked kernel: the build id, kallsyms, BTF, ``piggy.o`` (the kernel, compressed),
  modules' ``.mod.o`` (version magic, checksums of exports). ``misc.o`` and ``header.o`` of the boot code hold sizes and
  addresses of the linked kernel: instead of them, their sources in arch/x86/boot and the .c files they include are
  compared, comments and all.

Exception tables, alternatives, static calls, jump labels, ORC rows and the like do count. They are shown with the
function they are about, and only if that function is otherwise the same.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, Final

from harness.series.difference import Difference, Pair, Rename, compare_objects
from harness.series.normal import OF, Item, ObjectRecord, record_object, whole_file
from harness.series.objects import BuiltObject, built_objects
from harness.words import counted

_FORMAT: Final = 5  # of the JSON form: raise it when the normal form changes
_SHOWN: Final = 12  # lines per object, and names of renamed and moved symbols


@dataclass(frozen=True)
class CodeRecord:
    """What a build consists of: its objects by their paths in the build directory; compiler and configuration."""

    objects: Mapping[str, ObjectRecord]
    compiler: str
    configuration: str

    def item(self, file: str, symbol: str) -> Item:
        """One item of one object. Raises StopIteration when it is not there."""
        return next(item for item in self.objects[file].items if item.key == symbol)

    def users(self, file: str, symbol: str) -> tuple[str, ...]:
        """The functions that refer to a data object, themselves or by way of other data."""
        found: set[str] = set()
        seen, queue = {(file, symbol)}, [(file, symbol)]
        for here in queue:  # which grows
            for user in self._referrers.get(here, ()):
                file, item = user
                if item.kind == "function":
                    found.add(item.owner)
                elif (file, item.key) not in seen:
                    seen.add((file, item.key))
                    queue.append((file, item.key))
        return tuple(sorted(found))

    @cached_property
    def _referrers(self) -> dict[tuple[str, str], list[tuple[str, Item]]]:
        """By (file, symbol): which items refer to it, and the files they are in."""
        shared = {item.key: file for file, o in self.objects.items() for item in o.items if item.shared}
        found: dict[tuple[str, str], list[tuple[str, Item]]] = defaultdict(list)
        for file, record in self.objects.items():
            own = {item.key for item in record.items}
            for item in record.items:
                for target in item.targets if item.kind in ("function", "data") else ():
                    if target in own:
                        found[file, target].append((file, item))
                    elif target in shared:
                        found[shared[target], target].append((file, item))
        return found

    def to_json(self) -> dict[str, Any]:
        """For :meth:`from_json`."""
        return {
            "format": _FORMAT,
            "compiler": self.compiler,
            "configuration": self.configuration,
            "objects": {name: record.to_json() for name, record in self.objects.items()},
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> CodeRecord:
        """What :meth:`to_json` gave. Raises ValueError for the form of another version of the harness."""
        if data.get("format") != _FORMAT:
            raise ValueError("this record of a build is of another version of the harness: make it again")
        objects = {name: ObjectRecord.from_json(record) for name, record in data["objects"].items()}
        return cls(objects, data["compiler"], data["configuration"])


@dataclass(frozen=True)
class CodeChange:
    """How one build differs from another.

    ``changed`` kept their size, ``grew`` and ``shrank`` did not; ``moved`` are the same at another place among their
    neighbours; ``renamed`` have nothing but other names. ``objects`` is the number of objects that were compared.
    """

    objects: int
    changed: tuple[Difference, ...] = ()
    grew: tuple[Difference, ...] = ()
    shrank: tuple[Difference, ...] = ()
    added: tuple[Difference, ...] = ()
    removed: tuple[Difference, ...] = ()
    moved: tuple[Difference, ...] = ()
    renamed: tuple[Rename, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def identical(self) -> bool:
        """Whether nothing differs but names and the order of functions."""
        return not self.differences

    @cached_property
    def differences(self) -> tuple[Difference, ...]:
        """All that is not the same, by file."""
        found = (*self.changed, *self.grew, *self.shrank, *self.added, *self.removed)
        return tuple(sorted(found, key=lambda d: d.file))

    @cached_property
    def functions(self) -> tuple[str, ...]:
        """Functions of the new build that are not as they were; also those whose table entries are not."""
        names = {
            d.symbol.partition(OF)[2].partition("#")[0] or d.symbol
            for d in (*self.changed, *self.grew, *self.shrank, *self.added)
            if d.kind in ("function", "table") or d.symbol.startswith(".")
        }
        return tuple(sorted(names))

    def text(self) -> str:
        """For people: one line when nothing differs, else one for each difference."""
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        files = {d.file for d in self.differences}
        if self.identical:
            yield f"code: identical for this configuration and compiler ({self.objects} objects)"
        else:
            yield f"code: differs in {len(files)} of {self.objects} objects"
        for file, group in groupby(self.differences, key=lambda d: d.file):
            yield f"  {file}"
            rows = list(group)
            yield from (f"    {line}" for line in map(_line, rows[:_SHOWN]))
            if len(rows) > _SHOWN:
                yield f"    and {len(rows) - _SHOWN} more"
        if self.renamed:
            yield _listed("  renamed: ", [f"{r.old} → {r.new}" for r in self.renamed])
        if self.moved:
            yield _listed("  at another place in its file: ", [d.symbol for d in self.moved])
        yield from (f"  {note}" for note in self.notes)

    def to_json(self) -> dict[str, Any]:
        """Everything, for programs."""
        kinds = ("changed", "grew", "shrank", "added", "removed", "moved", "renamed")
        return {
            "identical": self.identical,
            "objects": self.objects,
            **{kind: [row._asdict() for row in getattr(self, kind)] for kind in kinds},
            "notes": [*self.notes],
        }


def record(build: Path, known: CodeRecord | None = None) -> CodeRecord:
    """Read what a kernel was built from, out of its build directory.

    ``known`` is the record of an earlier build in the same directory: objects whose files have not changed since are
    taken from it. Raises LabInputError when the directory holds no finished build of a kernel since 6.1.
    """
    build = build.absolute()
    before = known.objects if known else {}
    objects = {built.name: _record_one(build, built, before.get(built.name)) for built in built_objects(build)}
    config = (build / ".config").read_text()
    compiler = re.search(r'^CONFIG_CC_VERSION_TEXT="(.*)"$', config, re.MULTILINE)
    chosen = "\n".join(line for line in config.splitlines() if line.startswith("CONFIG_"))
    return CodeRecord(objects, compiler[1] if compiler else "", chosen)


def compare(old: CodeRecord, new: CodeRecord) -> CodeChange:
    """What differs between two builds."""
    pairs = [Pair(name, old.objects[name], new.objects[name]) for name in old.objects if name in new.objects]
    found: list[Difference] = []
    renamed: list[Rename] = []
    moved: list[Difference] = []
    for pair, differences, renames, moves in compare_objects(pairs):
        strict = [d for d in moves if d.kind != "function" or pair.new.in_order]
        found += [*differences, *(d._replace(moved=True) for d in strict)]
        renamed += renames
        moved += moves
    found += _whole_objects(old, new)
    if [pair.file for pair in pairs] != [name for name in new.objects if name in old.objects]:
        found.append(Difference("vmlinux", "order of objects", "link", "", 0, 0, moved=True))
    found = [d._replace(users=new.users(d.file, d.symbol)) if d.kind == "data" else d for d in found]
    return CodeChange(
        objects=len(old.objects.keys() | new.objects.keys()),
        changed=tuple(d for d in found if d.old_size == d.new_size),
        grew=tuple(d for d in found if _growth(d) > 0),
        shrank=tuple(d for d in found if _growth(d) < 0),
        added=tuple(d for d in found if d.old_size is None),
        removed=tuple(d for d in found if d.new_size is None),
        moved=tuple(moved),
        renamed=tuple(renamed),
        notes=(*_elsewhere(found, old, new), *_notes(old, new)),
    )


def _whole_objects(old: CodeRecord, new: CodeRecord) -> Iterator[Difference]:
    """All that is in objects that only one of the builds has."""
    for name, record in old.objects.items():
        for item in record.items if name not in new.objects else ():
            if item.kind not in ("table", "section"):
                yield Difference(name, item.key, item.kind, item.section, item.size, None)
    for name, record in new.objects.items():
        for item in record.items if name not in old.objects else ():
            if item.kind not in ("table", "section"):
                yield Difference(name, item.key, item.kind, item.section, None, item.size)


def _record_one(build: Path, built: BuiltObject, before: ObjectRecord | None) -> ObjectRecord:
    if before is not None and not built.sources:
        status = built.path.stat()
        if before.stamp == (status.st_size, status.st_mtime_ns):
            return before
    if built.as_it_is:
        return whole_file(built.path, *built.sources, without=str(build.parent))
    return record_object(built.path)


def _growth(difference: Difference) -> int:
    if difference.old_size is None or difference.new_size is None:
        return 0
    return difference.new_size - difference.old_size


def _line(d: Difference) -> str:
    name = f"{d.kind} {d.symbol}" + (f" (was {d.was})" if d.was else "")
    if d.old_size is None:
        return f"{name}: new, {counted(d.new_size or 0, 'byte')}"
    if d.new_size is None:
        return f"{name}: gone, {counted(d.old_size, 'byte')}"
    if d.moved:
        return f"{name}: at another place" + (f" in {d.section}" if d.section else "")
    if d.old_size == d.new_size:
        return f"{name}: changed" + (f", {counted(d.new_size, 'byte')}" if d.new_size else "")
    return f"{name}: {'grew' if d.new_size > d.old_size else 'shrank'}, {d.old_size} to {counted(d.new_size, 'byte')}"


def _listed(head: str, names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return head + ", ".join(names[:_SHOWN]) + more


def _elsewhere(found: Sequence[Difference], old: CodeRecord, new: CodeRecord) -> Iterator[str]:
    """What went from one object to another as it was. Still a difference, but one that says what it is."""
    gone = {d.symbol: d.file for d in found if d.new_size is None and d.kind in ("function", "data")}
    same: list[str] = []
    for d in found:
        if d.old_size is None and d.symbol in gone:
            before, after = old.item(gone[d.symbol], d.symbol), new.item(d.file, d.symbol)
            if (before.shape, before.targets) == (after.shape, after.targets):
                same.append(f"{d.symbol} ({gone[d.symbol]} → {d.file})")
    if same:
        yield _listed("the same in another object: ", same)


def _notes(old: CodeRecord, new: CodeRecord) -> Iterator[str]:
    if old.compiler != new.compiler:
        yield f"the compilers differ: {old.compiler} and {new.compiler}"
    before, after = set(old.configuration.splitlines()), set(new.configuration.splitlines())
    if before != after:
        lines = [*(f"-{line}" for line in sorted(before - after)), *(f"+{line}" for line in sorted(after - before))]
        yield _listed("the configurations differ: ", lines)
