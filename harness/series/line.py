"""A cell along a series: what its kernel showed at BASE and shows now, and which patch brought what is bad of it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

from harness.journal import JournalError
from harness.lab.boot import CONSOLE_LOG
from harness.lab.configurations import Configuration
from harness.lab.profile import Profile
from harness.lab.splat import find_splats
from harness.report.views import Record
from harness.series.behaviour import Change, Recording, lost, signature
from harness.series.builds import Flavour
from harness.series.cells import CellResult, read_result
from harness.series.coverage import Reached
from harness.series.verdict import CellReport, counts_of
from harness.verdict import Verdict

MOST_AGAIN: Final = 200
"""So many Cases that differ are no accident: they are not run again."""
BOOT: Final = "kernel/boot"
KVM: Final = "profile/KVM"
"""What ``lab run`` names a kernel without KVM."""
_PROFILE: Final = "profile/"
_TOLD: Final = 6  # names


@dataclass
class CellLine:
    """One cell: a configuration with a flavour of the kernel. ``origin``: which patch brought a failure; 0 is BASE."""

    name: str
    configuration: Configuration
    flavour: Flavour
    base: Recording = field(default_factory=Recording)
    now: Recording = field(default_factory=Recording)
    profile: Profile | None = None
    reached: Reached = field(default_factory=Reached)
    origin: dict[str, int] = field(default_factory=dict)
    kernel: Mapping[str, Any] = field(default_factory=dict)

    def begin(self, first: CellResult, second: CellResult) -> None:
        """Take the two runs of BASE for the yardstick."""
        self.base = Recording.of_twice(self.records(first), self.records(second))
        self.now = self.base.after({})
        self.profile = Profile.from_json(first.probed) if first.probed is not None else None
        self.origin = dict.fromkeys(self.base.failures(), 0)

    def records(self, result: CellResult) -> dict[str, Record]:
        """What a run of this cell showed, with what its kernel as a whole lacks against BASE.

        The cell's checked-in profile is a stock kernel's, and no yardstick here.
        """
        found = {n: r for n, r in result.records.items() if n == KVM or not n.startswith(_PROFILE)}
        if result.problem and not result.records and (record := _no_suite(result)):
            found[record["case"]] = record
        if self.profile is not None and result.probed is not None:
            for text in self.profile.lost(Profile.from_json(result.probed)):
                name = f"{_PROFILE}{text.partition(':')[0].replace(' ', '-')}"
                found.setdefault(name, _record(name, Verdict.REGRESSED, f"gone: {text}"))
        return found

    def suspects(self, records: Mapping[str, Record]) -> frozenset[str]:
        """Cases that differ from before and are worth another run: splats are not, nor are hundreds.

        (A record without an id is of the kernel as a whole, and no Case.)
        """
        found = [c for c in self.now.changes(records) if c.after["id"]]
        names = frozenset(c.name for c in found if c.verdict is not Verdict.SPLAT)
        return names if len(names) <= MOST_AGAIN else frozenset()

    def unsteady(self, again: Mapping[str, Record]) -> frozenset[str]:
        """Cases that, on their second run, showed what the kernel before has shown."""
        known = self.now.records
        return frozenset(
            name for name, record in again.items() if name in known and signature(known[name]) == signature(record)
        )

    def take(
        self, number: int, report: CellReport, result: CellResult, unsteady: frozenset[str] = frozenset()
    ) -> CellReport:
        """The report of patch ``number`` on what its run showed; from now on that is what the kernel shows."""
        records = {n: r for n, r in self.records(result).items() if n not in unsteady}
        changes = self.now.changes(records)
        self._follow(number, changes, records)
        quarantined = [*(n for n in records if n in self.base.flaky), *sorted(unsteady)]
        problem = "" if any(c.name in (BOOT, KVM) for c in changes) else result.problem
        problems = [problem, self._lost(records)]
        return replace(
            report, folder=str(result.folder), counts=counts_of(records.values()),
            checks=sum(int(r["checks"]) for r in records.values()), changes=tuple(changes),
            inherited=self.inherited(changes), quarantined=tuple(quarantined),
            problem="; ".join(filter(None, problems)), seconds=result.seconds,
        )  # fmt: skip

    def _lost(self, records: Mapping[str, Record]) -> str:
        """Cases of which nothing is known here, though BASE shows something: this kernel may die of them."""
        names = [n for n, r in records.items() if lost(r) and not lost(self.base.records.get(n))]
        return f"{len(names)} Case{'s' * (len(names) > 1)} lost: {_listed(names)}" if names else ""

    def inherited(self, changes: list[Change] | None = None) -> dict[str, int]:
        """The failures of the kernel as it is that ``changes`` have not brought, with the patches that have."""
        new = {c.name for c in changes or () if c.fails}
        return {name: self.origin[name] for name in self.now.failures() if name in self.origin and name not in new}

    def _follow(self, number: int, changes: list[Change], records: Mapping[str, Record]) -> None:
        booted = not any(name in records for name in (BOOT, KVM))
        after = self.now.after(records)
        if booted and records:
            gone = [n for n, r in after.records.items() if not r["id"] and n not in records]
            for name in gone:
                del after.records[name]
        self.now = after
        for change in changes:
            if change.fails:
                self.origin[change.name] = number
        failing = self.now.failures()
        self.origin = {name: origin for name, origin in self.origin.items() if name in failing}


def _listed(names: Collection[str]) -> str:
    told = ", ".join(list(names)[:_TOLD])
    return f"{told} and {len(names) - _TOLD} more" if len(names) > _TOLD else told


def _no_suite(result: CellResult) -> Record | None:
    """Of a kernel that has shown no Case: it died before the suite. None when it is not to blame."""
    for console in sorted(result.folder.glob(f"boot-*/{CONSOLE_LOG}")):
        if found := find_splats(console.read_text(errors="replace")):
            return _record(BOOT, Verdict.SPLAT, f"it does not boot: {found[0].title}; console: {console}")
    return None


def not_booting(result: CellResult) -> Record:
    """A kernel that never gets to the suite, twice, where BASE does."""
    return _record(BOOT, Verdict.SPLAT, f"it does not get to the suite, and BASE does: {result.problem}")


def _record(name: str, verdict: Verdict, summary: str) -> dict[str, Any]:
    return {"case": name, "id": "", "verdict": verdict.value, "checks": 1, "summary": summary, "seconds": 0.0}


def result_or_nothing(folder: Any) -> CellResult:
    """A cell's result; one without records where it could not even begin a journal."""
    try:
        return read_result(folder)
    except JournalError as error:
        return CellResult(folder, {}, str(error), type(error).__name__)
