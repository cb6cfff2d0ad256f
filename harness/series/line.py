"""A cell along a series: what its kernel showed at BASE and shows now, and which patch brought what is bad of it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from harness.journal import JournalError, extent
from harness.lab.boot import CONSOLE_LOG
from harness.lab.configurations import Configuration
from harness.lab.profile import Profile
from harness.lab.splat import find_splats
from harness.report.views import Record
from harness.series.behaviour import Change, Recording, kind, lost
from harness.series.builds import Flavour
from harness.series.cells import CellResult, read_result
from harness.series.coverage import Reached
from harness.series.verdict import CellReport, counts_of
from harness.verdict import Verdict
from harness.words import counted

MOST_AGAIN: Final = 200
"""So many Cases that differ are no accident: they are not run again."""
BOOT: Final = "kernel/boot"
KVM: Final = "profile/KVM"
"""What ``lab run`` names a kernel without KVM."""
_PROFILE: Final = "profile/"
_TOLD: Final = 6  # names


@dataclass(frozen=True)
class SecondLook:
    """What further runs of Cases that differ came to.

    ``unsteady``: seen once and not again. ``doubtful``: those of them that failed when they were seen, with the number
    of further runs. ``comes_and_goes``: Cases that failed again, in some of the runs only.
    """

    unsteady: frozenset[str] = frozenset()
    doubtful: Mapping[str, int] = field(default_factory=dict)
    comes_and_goes: frozenset[str] = frozenset()


@dataclass
class CellLine:
    """One cell: a configuration with a flavour of the kernel. ``origin``: which patch brought a failure; 0 is BASE.

    ``intermittent``: failures that a patch has brought and that show at some runs only; the patch, and their kind.
    """

    name: str
    configuration: Configuration
    flavour: Flavour
    base: Recording = field(default_factory=Recording)
    now: Recording = field(default_factory=Recording)
    profile: Profile | None = None
    reached: Reached = field(default_factory=Reached)
    origin: dict[str, int] = field(default_factory=dict)
    intermittent: dict[str, tuple[int, tuple[str, ...]]] = field(default_factory=dict)
    kernel: Mapping[str, Any] = field(default_factory=dict)

    def begin(self, first: CellResult, second: CellResult) -> None:
        """Take the two runs of BASE for the yardstick."""
        self.base = Recording.of_twice(self.records(first), self.records(second))
        self.now = self.base.after({})
        probed = first.probed or second.probed
        self.profile = Profile.from_json(probed) if probed is not None else None
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

    def base_again(self, records: Mapping[str, Record]) -> None:
        """Take note of one more run of BASE."""
        self.base.quarantine(records)
        for name in records:
            if lost(self.now.records.get(name)):
                self.now.records[name] = self.base.records[name]
                self.origin |= {name: 0} if name in self.base.failures() else {}

    def changes(self, records: Mapping[str, Record]) -> list[Change]:
        """What is not as the kernel before has shown it; of what comes and goes, only what is bad in another way."""
        return [c for c in self.now.changes(records) if not self._comes_and_goes(c)]

    def _comes_and_goes(self, change: Change) -> bool:
        _, known = self.intermittent.get(change.name, (0, None))
        return known is not None and (not change.fails or kind(change.after) == known)

    def failing(self, records: Mapping[str, Record]) -> frozenset[str]:
        """The Cases that are bad now, and were not."""
        return frozenset(c.name for c in self.changes(records) if c.fails)

    def suspects(self, records: Mapping[str, Record]) -> frozenset[str]:
        """Cases that differ from before and are worth another run: splats are not, nor are hundreds.

        (A record without an id is of the kernel as a whole, and no Case.)
        """
        found = [c for c in self.changes(records) if c.after["id"]]
        names = frozenset(c.name for c in found if c.verdict is not Verdict.SPLAT)
        return names if len(names) <= MOST_AGAIN else frozenset()

    def unsteady(self, again: Mapping[str, Record]) -> frozenset[str]:
        """Cases that, on their second run, showed what the kernel before has shown, or BASE shows now and then."""
        changed = {c.name for c in self.changes(again)}
        return frozenset(n for n, r in again.items() if n in self.now.records and n not in changed and not lost(r))

    def settle(
        self, first: Mapping[str, Record], on_base: Sequence[Mapping[str, Record]], mine: Sequence[Mapping[str, Record]]
    ) -> SecondLook:
        """What came of Cases that showed ``first`` and not again, from more runs of BASE and of this kernel.

        One that fails a second time, and not on BASE, is this kernel's.
        """
        for records in on_base:
            self.base_again({n: r for n, r in records.items() if n in first})
        doubtful = self.failing(first)
        again = doubtful & {name for records in mine for name in self.failing(records)}
        runs = {n: 1 + sum(n in r and not lost(r[n]) for r in mine) for n in doubtful - again}
        return SecondLook(frozenset(first) - again, runs, again)

    def take(
        self, number: int, report: CellReport, result: CellResult, look: SecondLook = SecondLook()
    ) -> CellReport:
        """The report of patch ``number`` on what its run showed; from now on that is what the kernel shows."""
        records = {n: r for n, r in self.records(result).items() if n not in look.unsteady}
        changes = self.changes(records)
        self._follow(number, changes, records)
        flaky = [*(n for n in records if n in self.base.flaky), *sorted(look.unsteady - look.doubtful.keys())]
        problem = "" if any(c.name in (BOOT, KVM) for c in changes) else result.problem
        problems = [problem, self._lost(records), _doubt(look.doubtful)]
        taken = replace(
            report, folder=str(result.folder), counts=counts_of(records.values()),
            checks=sum(int(r["checks"]) for r in records.values()), changes=tuple(changes),
            inherited=self.inherited(changes), quarantined=tuple(dict.fromkeys(flaky)),
            problem="; ".join(filter(None, problems)), seconds=result.seconds,
            extent=extent(result.records.values(), result.chosen) if result.enough else "",
        )  # fmt: skip
        found = {c.name: (number, kind(c.after)) for c in changes if c.fails and c.name in look.comes_and_goes}
        self.intermittent |= found
        return taken

    def _lost(self, records: Mapping[str, Record]) -> str:
        """Cases of which nothing is known here, though BASE shows something: this kernel may die of them."""
        names = [n for n, r in records.items() if lost(r) and not lost(self.base.records.get(n))]
        return f"{len(names)} Case{'s' * (len(names) > 1)} lost: {_listed(names)}" if names else ""

    def inherited(self, changes: list[Change] | None = None) -> dict[str, int]:
        """The failures of the kernel as it is that ``changes`` have not brought, with the patches that have."""
        new = {c.name for c in changes or () if c.fails}
        stay = {name: self.origin[name] for name in self.now.failures() if name in self.origin}
        stay |= {name: number for name, (number, _) in self.intermittent.items()}
        return {name: number for name, number in stay.items() if name not in new}

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


def _doubt(doubtful: Mapping[str, int]) -> str:
    """A failure that was seen once: neither good nor bad."""
    if not doubtful:
        return ""
    again = counted(min(doubtful.values()), "more run")
    return f"unsteady: {_listed(sorted(doubtful))} failed once, not in {again}; BASE never"


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
