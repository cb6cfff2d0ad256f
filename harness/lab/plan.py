"""Plans: Cases with what is expected of them, made where Python is fast, for a runner that has no model.

A plan is one file: a line of JSON (the header), then groups of pickled Cases with their Observations. Cases of one
group start from the same RAM. It goes into the lab as a raw disk; the runner reads the groups it is told to.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Final

from harness.case import PAGE, Case, Observation
from harness.cpuid import CpuProfile
from harness.exits import Exit
from harness.state import Events, Segment, Table

FORMAT: Final = 1
SIZE: Final = 1 << 30
"""Bytes of every plan's file, most of them a hole: a machine that goes on with another plan sees the same disk."""
_WORKERS: Final = 2
_GROUP: Final = 400  # Cases: a fraction of a second's work, so that two machines end at the same time

Steps = list[list[Observation]]
Runs = tuple[tuple[int, bytes], ...]


@dataclass(frozen=True)
class Group:
    """Where a group lies in the file, and the index of its first Case in the plan."""

    offset: int
    length: int
    first: int
    count: int


@dataclass(frozen=True)
class Plan:
    """A plan in a file. ``names`` and ``ids`` are the Cases' by index; ``skipped``: (name, id, reason) of the rest."""

    path: Path
    key: str
    groups: tuple[Group, ...]
    names: tuple[str, ...]
    ids: tuple[str, ...]
    skipped: tuple[tuple[str, str, str], ...]

    @cached_property
    def _open(self) -> PlanReader:
        return PlanReader(self.path.open("rb"), keep=8)  # machines side by side, each with groups of its own

    def planned(self, index: int) -> tuple[Case, Steps]:
        """One Case with what is expected of it."""
        number = next(n for n, g in enumerate(self.groups) if g.first <= index < g.first + g.count)
        return self._open.group(number)[index - self.groups[number].first]


class PlanReader:
    """Reads groups of a plan from a file or a disk. ValueError when it holds no plan of this format."""

    def __init__(self, file: BinaryIO, keep: int = 1) -> None:
        """``keep`` groups stay in memory once they were read."""
        self._file, self._keep = file, keep
        line = file.readline()
        try:
            header = json.loads(line)
            if header["plan"] != FORMAT:
                raise ValueError(f"a plan of format {header['plan']}")
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"no plan of format {FORMAT} ({error})") from error
        self.header: dict[str, Any] = header
        self.groups = tuple(Group(*g) for g in header["groups"])
        self._profiles: list[CpuProfile] = []
        self._cached: dict[int, list[tuple[Case, Steps]]] = {}  # the one that was used last is the last

    def group(self, number: int) -> list[tuple[Case, Steps]]:
        """The Cases of a group, with their Observations."""
        if number in self._cached:
            self._cached[number] = self._cached.pop(number)
            return self._cached[number]
        group = self.groups[number]
        if not self._profiles:
            self._file.seek(self.header["profiles"][0])
            self._profiles = pickle.loads(self._file.read(self.header["profiles"][1]))
        self._file.seek(group.offset)
        loader = _Unpickler(io.BytesIO(self._file.read(group.length)))
        loader.profiles = self._profiles
        found: list[tuple[Case, Steps]] = loader.load()
        for case, steps in found:
            for observations in steps:
                for seen in observations:
                    if seen.pages:
                        seen.pages = _pages(case, seen.pages)  # type: ignore[arg-type]  # Runs until here
        self._cached[number] = found
        while len(self._cached) > self._keep:
            del self._cached[next(iter(self._cached))]
        return found


def read_plan(path: Path) -> Plan:
    """Open a plan. ValueError when it is none."""
    with path.open("rb") as file:
        header = PlanReader(file).header
    return Plan(
        path, header["key"], tuple(Group(*g) for g in header["groups"]), tuple(c[0] for c in header["cases"]),
        tuple(c[1] for c in header["cases"]), tuple(tuple(s) for s in header["skipped"]),
    )  # fmt: skip


def write_plan(path: Path, key: str, cases: Sequence[Case], skipped: Iterable[tuple[str, str, str]] = ()) -> None:
    """Run the reference model over ``cases`` and write the plan. ModelError names the Case the model cannot run."""
    from concurrent.futures import ProcessPoolExecutor  # not at the top: the runner in the lab imports this module
    from multiprocessing import get_context

    batches = list(_batches(cases))
    profiles = list({id(p): p for c in cases for p in (c.profile, *(o.profile for o in c.others)) if p}.values())
    global _WORK  # how a forked worker finds the Cases: they are far cheaper to inherit than to send
    _WORK = (batches, profiles)
    try:
        if len(cases) < 1000:
            blobs = [_expectations(n) for n in range(len(batches))]
        else:
            with ProcessPoolExecutor(_WORKERS, mp_context=get_context("fork")) as pool:
                blobs = list(pool.map(_expectations, range(len(batches))))
    finally:
        _WORK = ([], [])
    body = [pickle.dumps(profiles, protocol=5), *blobs]
    sizes = [len(b) for b in body]
    ordered = [c for batch in batches for c in batch]

    def header(start: int) -> bytes:
        offset, groups, first = start + sizes[0], [], 0
        for size, batch in zip(sizes[1:], batches, strict=True):
            groups.append([offset, size, first, len(batch)])
            offset += size
            first += len(batch)
        text = {
            "plan": FORMAT, "key": key, "profiles": [start, sizes[0]], "groups": groups,
            "cases": [[c.name, c.id] for c in ordered], "skipped": list(skipped),
        }  # fmt: skip
        return json.dumps(text, separators=(",", ":")).encode() + b"\n"

    start = 0
    while start != (start := -(-len(header(start)) // PAGE) * PAGE):
        pass
    if start + sum(sizes) > SIZE:
        raise ValueError(f"a plan of {start + sum(sizes)} bytes does not fit on its disk of {SIZE}")
    with path.open("wb") as file:
        file.write(header(start).ljust(start, b"\0"))
        for blob in body:
            file.write(blob)
        file.truncate(SIZE)
        os.fsync(file.fileno())


_WORK: tuple[list[list[Case]], list[CpuProfile]] = ([], [])


def _batches(cases: Iterable[Case]) -> Iterator[list[Case]]:
    """Cases that start from the same RAM, together: it is written once, and what they share is sent once."""
    alike: dict[int, list[Case]] = {}
    for case in cases:
        alike.setdefault(id(case.memory), []).append(case)
    for found in alike.values():
        for start in range(0, len(found), _GROUP):
            yield found[start : start + _GROUP]


def _expectations(number: int) -> bytes:
    """One group as it goes into the file."""
    from harness.machine import record
    from harness.reference.machine import ReferenceMachine

    batches, profiles = _WORK
    out = []
    interned: dict[bytes, bytes] = {}
    model = ReferenceMachine()
    for case in batches[number]:
        steps = record(model, case)
        for observations in steps:
            for seen in observations:
                seen.sections = {name: interned.setdefault(data, data) for name, data in seen.sections.items()}
                if seen.pages:
                    seen.pages = _runs(case, seen.pages)  # type: ignore[assignment]
        out.append((case, steps))
    buffer = io.BytesIO()
    pickler = _Pickler(buffer, protocol=5)
    pickler.profiles = {id(p): n for n, p in enumerate(profiles)}
    pickler.dump(out)
    return buffer.getvalue()


class _Pickler(pickle.Pickler):
    profiles: dict[int, int]

    def persistent_id(self, obj: Any) -> int | None:
        return self.profiles[id(obj)] if isinstance(obj, CpuProfile) else None

    def reducer_override(self, obj: Any) -> Any:
        """Frozen classes with slots by their constructor: their own way of unpickling takes five times as long."""
        if isinstance(obj, (Segment, Table, Events, Observation, Exit)):
            return type(obj), tuple(getattr(obj, f.name) for f in fields(obj))
        return NotImplemented


class _Unpickler(pickle.Unpickler):
    profiles: list[CpuProfile]

    def persistent_load(self, pid: Any) -> CpuProfile:
        return self.profiles[int(pid)]


def _page_of(case: Case, gpa: int) -> bytes:
    for slot in case.shape.slots:
        if slot.gpa <= gpa < slot.gpa + slot.size:
            return case.memory.image(slot)[gpa - slot.gpa : gpa - slot.gpa + PAGE]
    raise ValueError(f"page {gpa:#x} lies in no slot")


_WORDS: Final = struct.Struct("<512Q")


def _runs(case: Case, pages: Mapping[int, bytes]) -> Runs:
    """The 8-byte words of ``pages`` that differ from the initial RAM, neighbours joined."""
    out: list[tuple[int, bytes]] = []
    for gpa, page in sorted(pages.items()):
        old = _page_of(case, gpa)
        start = -1
        for n, (a, b) in enumerate(zip(_WORDS.unpack(old), _WORDS.unpack(page), strict=True)):
            if a != b and start < 0:
                start = n
            elif a == b and start >= 0:
                out.append((gpa + 8 * start, page[8 * start : 8 * n]))
                start = -1
        if start >= 0:
            out.append((gpa + 8 * start, page[8 * start :]))
        elif old == page:
            out.append((gpa, page[:8]))  # a page that was written with what it held
    return tuple(out)


def _pages(case: Case, runs: Runs) -> dict[int, bytes]:
    out: dict[int, bytearray] = {}
    for gpa, data in runs:
        base = gpa & ~(PAGE - 1)
        page = out.get(base)
        if page is None:
            page = out[base] = bytearray(_page_of(case, base))
        page[gpa - base : gpa - base + len(data)] = data
    return {gpa: bytes(page) for gpa, page in out.items()}
