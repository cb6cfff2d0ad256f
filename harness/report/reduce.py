"""A Case without the RAM that it does not need, for reproducers that are read by people.

Only long stretches of bytes are thinned out: other tests' code, filling of the data area. Descriptor and page tables,
handlers and the like are short in a reproducer, and stay whole, so that a KVM that behaves in yet another way still
finds what it would find under the harness.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Final

from harness.case import PAGE, Blob, Case, Memory, Observation, Slot
from harness.exits import Timeout
from harness.lockstep import Difference
from harness.reference.cpu import ModelError
from harness.reference.machine import ReferenceMachine
from harness.report.c_data import byte_runs, find_fills
from harness.report.listing import linear, listing

LINE: Final = 16
"""Bytes that stay or go together."""
_LONG: Final = 256  # bytes of a stretch that is worth it
_TABLE: Final = 16  # words in arithmetic progression that are no accident
_BUDGET: Final = 20_000  # instructions: what runs for longer has lost its way
_COMPARED: Final = ("exit", "sections", "ignore", "accept", "pages_ignore")
_Run = Callable[[Case], Difference | None]
_Seen = list[Observation]


def reduced(case: Case, difference: Difference | None, run: _Run) -> tuple[Case, Difference | None]:
    """``case`` with as little RAM as shows the same, and the difference it then shows: beside the first one's RAM.

    ``run`` compares a Case on KVM with the model. The model must do the same to the last byte, and KVM must differ in
    the same values; otherwise nothing is taken away.
    """
    seen = _model(case)
    if seen is None:
        return case, difference
    thin = _thinned(case, seen, difference)
    found = run(thin)
    if same_difference(difference, found):
        return thin, found
    if difference is None or difference.got is None or isinstance(difference.got.exit, Timeout):
        return case, difference  # trying many is not worth the time
    # KVM, being wrong, uses what the model does not: ask it about every step.
    thinning = _Thinning(case, _candidates(case, difference))
    thinning.take_away(lambda c: _same_outcome(case, seen, c) and same_difference(difference, run(c)))
    return thinning.case, run(thinning.case)


def thinned(case: Case, difference: Difference | None) -> Case | None:
    """``case`` without the RAM that the model does not need; whether KVM does is to be tried. None: leave it whole."""
    seen = _model(case)
    return _thinned(case, seen, difference) if seen is not None else None


def _thinned(case: Case, seen: _Seen, difference: Difference | None) -> Case:
    thinning = _Thinning(case, _candidates(case, difference))
    thinning.take_away(lambda c: _same_outcome(case, seen, c))
    return thinning.case


def same_difference(a: Difference | None, b: Difference | None) -> bool:
    """The same exit, the same registers, the same bytes, with the same values. What lies around them may differ."""
    if a is None or b is None:
        return a is b
    return _essence(a) == _essence(b)


def _essence(d: Difference) -> object:
    exits = (d.expected and d.expected.exit, d.got and d.got.exit)
    pairs = ((m.gpa + i, x, y) for m in d.memory for i, (x, y) in enumerate(zip(m.expected, m.got, strict=True)))
    return d.index, d.action, exits, d.registers, [p for p in pairs if p[1] != p[2]]


class _Thinning:
    """A Case from which lines of RAM are taken away, as long as a test holds."""

    def __init__(self, case: Case, lines: Sequence[int]) -> None:
        self.case = case
        self._lines = lines
        self._images = {slot: bytearray(case.memory.image(slot)) for slot in case.shape.slots}

    def take_away(self, holds: Callable[[Case], bool]) -> None:
        """Half of the lines, a quarter of them, ... down to single ones."""
        self._try(self._lines, holds)

    def _try(self, lines: Sequence[int], holds: Callable[[Case], bool]) -> None:
        if not lines:
            return
        saved = {gpa: self._swap(gpa, bytes(LINE)) for gpa in lines}
        candidate = self._made()
        if holds(candidate):
            self.case = candidate
            return
        for gpa, data in saved.items():
            self._swap(gpa, data)
        if len(lines) > 1:
            self._try(lines[: len(lines) // 2], holds)
            self._try(lines[len(lines) // 2 :], holds)

    def _swap(self, gpa: int, data: bytes) -> bytes:
        slot = next(s for s in self._images if s.gpa <= gpa < s.gpa + s.size)
        at = gpa - slot.gpa
        old = bytes(self._images[slot][at : at + LINE])
        self._images[slot][at : at + LINE] = data
        return old

    def _made(self) -> Case:
        blobs = tuple(Blob(slot.gpa, bytes(image)) for slot, image in self._images.items())
        return replace(self.case, memory=Memory(blobs))


def _candidates(case: Case, difference: Difference | None) -> list[int]:
    """Addresses of the lines that may go: in long stretches, outside of the code that is shown and of what differs."""
    code = listing(case, difference)
    kept = set(_lines(linear(case.start), sum(len(i.code) for i in code)))
    for run in difference.memory if difference else ():
        kept.update(_lines(run.gpa, len(run.expected)))
    return [gpa for slot in case.shape.slots for gpa in _long_stretches(case, slot) if gpa not in kept]


def _long_stretches(case: Case, slot: Slot) -> Iterator[int]:
    image = bytearray(case.memory.image(slot))
    tables = (f for f in find_fills(bytes(image), slot.gpa) if f.count >= _TABLE)
    words = {f.gpa - slot.gpa + n * f.stride for f in tables for n in range(f.count)}
    for at in words:
        image[at : at + 8] = bytes(8)
    for blob in byte_runs(bytes(image), slot.gpa, {at // 8 for at in words}):
        if len(blob.data) > _LONG:
            yield from _lines(blob.gpa, len(blob.data))


def _lines(gpa: int, size: int) -> range:
    return range(gpa & -LINE, gpa + size, LINE)


def _model(case: Case) -> _Seen | None:
    machine = ReferenceMachine(budget=_BUDGET)
    try:
        machine.load(case)
        return [seen for action in case.actions for seen in machine.apply(action)]
    except ModelError:
        return None


def _same_outcome(case: Case, seen: _Seen, other: Case) -> bool:
    """The model does the same with ``other``: exits, registers, and every byte that it writes."""
    again = _model(other)
    if again is None or len(again) != len(seen):
        return False
    for a, b in zip(seen, again, strict=True):
        if any(getattr(a, name) != getattr(b, name) for name in _COMPARED):
            return False
    return not seen or _same_ram(case, seen[-1], other, again[-1])


def _same_ram(case: Case, a: Observation, other: Case, b: Observation) -> bool:
    """Bytes that were changed hold the same in the end; the others hold that, or what they held at the start."""
    for gpa in {*a.pages, *b.pages}:
        first, second = _page(case, gpa), _page(other, gpa)
        ends = zip(a.pages.get(gpa, first), b.pages.get(gpa, second), first, second, strict=True)
        if not all(y == x or (x == old and y == new) for x, y, old, new in ends):
            return False
    return True


def _page(case: Case, gpa: int) -> bytes:
    slot = next(s for s in case.shape.slots if s.gpa <= gpa < s.gpa + s.size)
    return case.memory.image(slot)[gpa - slot.gpa :][:PAGE]
