"""What a kernel showed, Case by Case, against what it showed before: worse, better, or other but allowed.

A recording is a journal's records by name. Where a Case agrees with the model, two equal recordings mean the same to
the byte: the same number of exits, and the same checksum of what the model leaves open (harness.lockstep.Outcome).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Final

from harness.known import load_known
from harness.report.views import BAD, Record, verdict_of
from harness.verdict import Verdict
from harness.words import counted

Signature = tuple[str, str, int, int, str]

_FAILS: Final = tuple(v for v in BAD if v is not Verdict.LOST)
_RIGHT: Final = (Verdict.AGREE, Verdict.HEALED)
_EXCUSED: Final = (Verdict.SUSPECT, Verdict.KNOWN, Verdict.UNSUPPORTED)
_NUMBER: Final = re.compile(r"0x[0-9a-f]+|\d+")


def signature(record: Record) -> Signature:
    """All that a record tells of what the kernel did; equal if it did the same."""
    summary = _settled(str(record["summary"]))
    if verdict_of(record) is Verdict.SPLAT:  # line numbers, processes and addresses are not what makes it another one
        summary = _NUMBER.sub("#", summary)
    return (str(record["id"]), str(record["verdict"]), int(record["checks"]), int(record.get("allowed", 0)), summary)


def _settled(summary: str) -> str:
    """Without the console's path, which a splat's summary ends in."""
    return summary.partition("; console: ")[0]


def varies(record: Record | None) -> bool:
    """It diverges in a way that known_divergences.toml says to show at some runs only."""
    return (
        record is not None
        and verdict_of(record) is Verdict.KNOWN
        and str(record["summary"]).partition(":")[0] in _now_and_then()
    )


def right(record: Record | None) -> bool:
    """It is as it must be, or as known_divergences.toml says that it is at some runs."""
    return record is not None and (verdict_of(record) in _RIGHT or varies(record))


def lost(record: Record | None) -> bool:
    """The infrastructure failed: it says nothing of the kernel."""
    return record is not None and verdict_of(record) is Verdict.LOST


def kind(record: Record) -> tuple[str, ...]:
    """What went wrong, without the values: they are others at each run where a Case is flaky. Empty if nothing did."""
    verdict = verdict_of(record)
    if verdict is Verdict.AGREE:
        return ()
    differs = tuple(record.get("differs", ()))
    said = () if differs and differs != ("exit",) else (_NUMBER.sub("#", _settled(str(record["summary"]))),)
    return (verdict.value, *differs, *said)


@cache
def _now_and_then() -> frozenset[str]:
    return frozenset(row.name for row in load_known() if row.sometimes)


@dataclass(frozen=True)
class Change:
    """A Case that does not behave as before. ``before`` is None when it did not run before.

    ``why``: what BASE showed and this kernel shows, where the model allows both.
    """

    name: str
    before: Record | None
    after: Record
    why: str = ""

    @property
    def verdict(self) -> Verdict:
        """What that means for the kernel: *regressed* too where it was right and now is excused or known."""
        after = verdict_of(self.after)
        if after in _EXCUSED and right(self.before) and not right(self.after):
            return Verdict.REGRESSED
        return after

    @property
    def fails(self) -> bool:
        """It is bad now, and was not, or not in this way."""
        return self.verdict in _FAILS

    @property
    def mended(self) -> bool:
        """It was bad and no longer is."""
        return self.before is not None and verdict_of(self.before) in _FAILS and not self.fails

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return {"case": self.name, "before": self.before, "after": self.after, "why": self.why}


@dataclass
class Recording:
    """What is known of a cell's kernel.

    ``flaky``: Cases that did not show the same twice on BASE. They are excused for what is in ``shown``, the kinds
    (:func:`kind`) of all that BASE showed of them, and for nothing else.
    """

    records: dict[str, Record] = field(default_factory=dict)
    flaky: dict[str, tuple[str, str]] = field(default_factory=dict)
    shown: dict[str, set[tuple[str, ...]]] = field(default_factory=dict)

    @classmethod
    def of_twice(cls, first: Mapping[str, Record], second: Mapping[str, Record]) -> Recording:
        """From two runs of one kernel."""
        made = cls(dict(first))
        made.quarantine(second)
        return made

    def quarantine(self, again: Mapping[str, Record]) -> list[str]:
        """Take note of one more run of the same kernel; the Cases that turn out to be flaky by it."""
        found = []
        for name, record in again.items():
            old = self.records.get(name)
            if old is None or lost(old):
                self.records[name] = record
            elif name in self.flaky:
                if not lost(record):
                    self.shown[name].add(kind(record))
            elif not (lost(record) or signature(old) == signature(record) or _by_turns(old, record)):
                self.flaky[name] = (_told(old), _told(record))
                self.shown[name] = {kind(old), kind(record)}
                found.append(name)
        return found

    def failures(self) -> dict[str, Record]:
        """What is bad, save what BASE shows by itself of flaky Cases."""
        return {n: r for n, r in self.records.items() if verdict_of(r) in _FAILS and not self._excused(n, r)}

    def changes(self, records: Mapping[str, Record]) -> list[Change]:
        """What of ``records`` is not as it was. Of a flaky Case only what is bad and BASE never showed."""
        return [change for name, record in records.items() if (change := self._change(name, record))]

    def _change(self, name: str, record: Record) -> Change | None:
        old = self.records.get(name)
        change = Change(name, None if lost(old) else old, record)
        if lost(record) or (old is not None and signature(old) == signature(record)):
            return None
        if name in self.flaky:
            return change if change.fails and not self._excused(name, record) else None
        if lost(old):
            return change if change.fails else None
        if old is None:
            return None if varies(record) else change
        return None if _by_turns(old, record) else change

    def _excused(self, name: str, record: Record) -> bool:
        return name in self.flaky and kind(record) in self.shown[name]

    def after(self, records: Mapping[str, Record]) -> Recording:
        """The recording of the next kernel, of which ``records`` are all that was run."""
        kept = {n: r for n, r in records.items() if not lost(r)}
        return Recording({**self.records, **kept}, self.flaky, self.shown)


def _by_turns(old: Record, record: Record) -> bool:
    """A divergence that shows at some runs only came or went."""
    return (varies(old) or varies(record)) and right(old) and right(record)


def _told(record: Record) -> str:
    allowed = f", allowed {record['allowed']:#x}" if record.get("allowed") else ""
    checks = counted(record["checks"], "check")
    return f"{record['verdict']}, {checks}{allowed} {_settled(str(record['summary']))}".strip()


def change_text(change: Change) -> str:
    """One line: what a Case showed before and shows now."""
    if change.fails:
        return f"{change.verdict.value}: {_settled(str(change.after['summary']))}"
    if change.why:
        return change.why
    if change.before is None:
        return f"not run before; now {_told(change.after)}"
    old, new = signature(change.before), signature(change.after)
    if old[1:3] == new[1:3] and old[4] == new[4]:
        return "other values where the model allows several (undefined flags, segments that cannot be used)"
    return f"{_told(change.before)} -> {_told(change.after)}"


def worst_first(changes: Iterable[Change]) -> Iterator[Change]:
    """Failures by precedence, then the rest."""
    order = {v: n for n, v in enumerate(Verdict)}
    return iter(sorted(changes, key=lambda c: (not c.fails, order[c.verdict])))
