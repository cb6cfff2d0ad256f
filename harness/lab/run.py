"""``kvm-harness lab run``: cells one after the other, a journal and verdicts for each, one table at the end."""

from __future__ import annotations

import json
import shutil
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, TextIO

from harness.case import Case
from harness.journal import Journal, read_run
from harness.judge import Result
from harness.judge import outcome as ending
from harness.known import load_known
from harness.lab.bare_arbiter import Arbiter
from harness.lab.bare_emulator import BareEmulator
from harness.lab.cache import Progress
from harness.lab.errors import LabError, LabInputError, LostError, NoKvmError
from harness.lab.planner import cell_plan
from harness.lab.profile import Profile, load_profile, refused_instruction, write_profile
from harness.lab.reproducer import reduce_reproducers
from harness.lab.session import DEADLINE, Cell, CellRun, reader
from harness.lockstep import Difference
from harness.reference.machine import ReferenceMachine
from harness.report.emit_c import EmitError, emit_c
from harness.report.failure import failure_text
from harness.report.junit import junit_report
from harness.report.ktap import ktap_report
from harness.report.text import summary_lines
from harness.report.views import kept_word
from harness.selection import matcher, nothing_matches
from harness.verdict import Verdict, exit_status
from harness.words import counted

CASES_FOLDER: Final = "cases"
EVEX_OPERANDS: Final = "apx_evex/"
EGPR_OPERANDS: Final = ("apx/", EVEX_OPERANDS)
"""Cases in which R16-R31 are operands: of what KVM emulates, too. What today's KVM does there stands in the profile."""
_SHOWN: Final = 5  # failures told in full on the terminal; all are in the journal


@dataclass
class CellOutcome:
    """What a cell came to. ``problem`` is why it did not end, "" when it did."""

    cell: str
    folder: Path
    records: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    first_result: float = 0.0
    rate: float = 0.0
    problem: str = ""

    @property
    def status(self) -> int:
        """The exit status of this cell alone."""
        verdicts = [Verdict(r["verdict"]) for r in self.records]
        return exit_status([*verdicts, Verdict.LOST] if self.problem else verdicts)

    def row(self) -> list[str]:
        """For the table of cells."""
        count = Counter(r["verdict"] for r in self.records)
        checks = sum(r["checks"] for r in self.records)
        bad = sum(count[v.value] for v in Verdict if v.status == 1)
        told = ", ".join(f"{count[v.value]} {v.value}" for v in Verdict if count[v.value] and v is not Verdict.AGREE)
        ending = "lost" if self.problem else "bad" if bad else "good" if self.status == 0 else "nothing ran"
        return [self.cell, ending, f"{len(self.records)}", f"{checks}", told or "-", f"{self.seconds:.1f} s"]


@dataclass(frozen=True)
class Options:
    """How cells are run.

    ``only`` are names of Cases, None for all. ``profile`` is what the KVM is expected to be able to do, in the place of
    the checked-in one. ``trace``: names of kernel functions; the journal tells which of them were called. ``record``:
    the journal keeps all that Cases show. ``most_bad``: so many failures are enough, the rest is not run; 0 for no
    limit. ``reduce``: the C reproducers are made small, which takes one more boot. ``header``: goes into the journal's
    first line.
    """

    tier: str = "full"
    select: str | None = None
    fail_fast: bool = False
    machines: int = 2
    write_profile: bool = False
    deadline: float = DEADLINE  # seconds for each cell
    cold: bool = False  # boot every machine
    only: frozenset[str] | None = None
    profile: Profile | None = None
    trace: tuple[str, ...] = ()
    record: bool = False
    most_bad: int = 0
    reduce: bool = False
    header: Mapping[str, Any] = field(default_factory=dict)


def run_cell(cell: Cell, folder: Path, options: Options, progress: Progress, status: TextIO) -> CellOutcome:
    """Run one cell; results are in ``folder`` as they come. LabError and JournalError pass through."""
    outcome = CellOutcome(cell.name, folder)
    began = time.monotonic()
    if not cell.emulated:
        if options.write_profile:
            raise LabInputError("--write-profile: profiles that are checked in are of the lab's own emulated processor")
        processor = f"{cell.emulator.name}, {cell.accel}"
        progress(f"not the lab's own emulated processor ({processor}): KVM is probed, and mismatches may be that one's")
    profile = options.profile
    if profile is None and cell.emulated:
        profile = load_profile(cell.configuration.name, cell.kernel.series)
    if profile is None or options.write_profile:
        progress(f"{cell.name}: asking this kernel's KVM what it can do")
        profile = probe_cell(cell, folder / "probe", progress)
        if options.write_profile:
            path = write_profile(cell.configuration.name, cell.kernel.series, profile)
            progress(f"{cell.name}: profile written to {path}")
    profile = demanded(profile, cell)
    plan = cell_plan(cell.configuration, profile, options.tier, progress)
    selects = _selection(options)
    chosen = [n for n, name in enumerate(plan.names) if selects(name)]
    skipped = [s for s in plan.skipped if selects(s[0])]
    if not chosen and not skipped:
        names = (*plan.names, *(name for name, *_ in plan.skipped))
        raise LabInputError(nothing_matches(options.select, names, "kvm-harness lab run --list"))
    header = {
        "host": f"Linux {cell.kernel.release} in {cell.emulator.name} ({cell.accel})", "device": "lab",
        "cell": cell.name, "configuration": cell.configuration.name, "kernel": cell.kernel.label,
        "series": cell.kernel.series, "tier": options.tier, "plan": plan.key, "chosen": len(chosen) + len(skipped),
        **options.header,
    }  # fmt: skip
    journal = Journal(folder, header)
    line = StatusLine(cell.name, status)
    shown = 0
    refused: set[str] = set()
    endings: dict[str, str] = {}
    failed: list[tuple[Case, Difference, Path]] = []

    def take(result: Result, allowed: int) -> None:
        nonlocal shown
        if not result.id:  # the kernel as a whole, and no Case
            take_whole(outcome, journal, line.say(progress), result)
            return
        record = {**result.to_json(), **({"allowed": allowed} if allowed else {})}
        outcome.records.append(record)
        journal.append(record)
        if result.verdict.status == 1:
            case, _ = plan.planned(plan.names.index(result.name))
            if result.difference is not None and case.name.startswith(EGPR_OPERANDS):
                endings[case.name] = ending(result.difference)
            elif result.difference is not None:
                refused.add(refused_instruction(case, result.difference, reader(case, result.difference)))
            kept = folder / CASES_FOLDER / f"{case.id}.json"
            kept.parent.mkdir(exist_ok=True)
            kept.write_text(json.dumps(case.to_json()))
            if shown < _SHOWN and result.difference is not None:
                with suppress(EmitError):
                    kept.with_suffix(".c").write_text(emit_c(case, result.difference, header["host"], kept_word(kept)))
                    failed.append((case, result.difference, kept.with_suffix(".c")))
            if (shown := shown + 1) <= _SHOWN:
                line.clear()
                text = result.summary
                if result.difference is not None:
                    text = failure_text(case, result.difference, header["host"], kept_word(kept))
                progress(f"{result.verdict.value}: {result.name}\n{text}\n  case file: {kept}")
        line.update(run)

    arbiter = _Arbitration(cell)
    run = CellRun(
        cell, plan, profile, folder, take, known=load_known(release=cell.kernel.release), machines=options.machines,
        most_bad=1 if options.fail_fast else options.most_bad, deadline=options.deadline, arbiter=arbiter,
        trace=options.trace, record=options.record, progress=line.say(progress), tick=lambda: line.update(run),
        cold=options.cold,
    )  # fmt: skip
    try:
        for name, id_, reason in skipped:
            take(Result(name, id_, Verdict.UNSUPPORTED, 0, reason), 0)
        if chosen:
            run.run(chosen)
        for result in profile_results(profile, run):
            take_whole(outcome, journal, progress, result)
        if run.probed is not None:
            journal.append({"probed": run.probed.to_json()})
        for index, steps in run.recorded.items():
            journal.append({"recorded": plan.names[index], "steps": steps})
        if failed and options.reduce:
            reduce_reproducers(cell, profile, failed, header["host"], folder, line.say(progress))
        if options.trace:
            journal.append({"executed": run.executed, "machines": run.tally.boots})
        if options.write_profile and (refused - {""} or endings):
            profile = replace(profile, lacks=profile.lacks | refused - {""}, outcomes=endings)
            path = write_profile(cell.configuration.name, cell.kernel.series, profile)
            progress(f"{cell.name}: instructions that its emulator lacks added to {path}: {', '.join(sorted(refused))}")
            progress(f"{cell.name}: outcomes recorded in {path}: {len(endings)}")
        if not run.tally.total or run.tally.done >= run.tally.total or run.enough:
            ended = {"finished": True, "enough": run.enough, "seconds": round(time.monotonic() - began, 1)}
            journal.append(ended)
    except NoKvmError as error:
        take_whole(outcome, journal, progress, regressed("KVM", str(error)))
        journal.append({"finished": True, "seconds": round(time.monotonic() - began, 1)})
    except LabError as error:
        outcome.problem = str(error)
        journal.append({"lost": str(error), "error": type(error).__name__})
    finally:
        line.clear()
        arbiter.close()
        journal.close()
        outcome.seconds = time.monotonic() - began
        outcome.first_result, outcome.rate = run.tally.first_result, run.tally.rate
    return outcome


def demanded(profile: Profile, cell: Cell) -> Profile:
    """What this kernel's KVM has to do: no excuses from another's record where it offers the feature by itself.

    Save EVEX in KVM's emulator, which nobody promises.
    """
    if not cell.kernel.has.intersection(cell.configuration.edits[:1]):
        return profile
    return replace(profile, outcomes={n: how for n, how in profile.outcomes.items() if n.startswith(EVEX_OPERANDS)})


def probe_cell(cell: Cell, folder: Path, progress: Progress) -> Profile:
    """What the KVM of a cell can do, by asking it in a boot of its own. LostError when nothing comes of it."""
    return CellRun(cell, None, None, folder, lambda *_: None, progress=progress).probe()


def _selection(options: Options) -> Callable[[str], bool]:
    """Whether a Case is to be run, by its name."""
    matches, only = matcher(options.select or ""), options.only
    return matches if only is None else lambda name: name in only and matches(name)


class _Arbitration:
    """Whether a mismatch is the emulator's own; it is asked at the first one. Called by any of the cell's threads."""

    def __init__(self, cell: Cell) -> None:
        self._cell = cell
        self._lock = threading.Lock()
        self._bare: BareEmulator | None = None

    def __call__(self, case: Case, result: Result) -> Result:
        """``result``, or *suspect* where the bare emulator differs from the model in the same way."""
        if result.difference is None or not self._cell.emulated:
            return result
        with self._lock:
            if self._bare is None:
                self._bare = BareEmulator(self._cell.emulator, cpu=self._cell.configuration.cpu).__enter__()
            try:
                why = Arbiter(self._bare, ReferenceMachine()).suspect(case, result.difference)
            except LostError:
                why = ""  # the emulator dies of it: no witness
        return replace(result, verdict=Verdict.SUSPECT, summary=why) if why else result

    def close(self) -> None:
        """End the emulator."""
        if self._bare is not None:
            self._bare.close()


def write_reports(folder: Path) -> None:
    """JUnit and KTAP views of a cell's journal, beside it."""
    run = read_run(folder)
    (folder / "junit.xml").write_text(junit_report(run))
    (folder / "results.ktap").write_text(ktap_report(run))


def profile_results(profile: Profile, run: CellRun) -> Iterator[Result]:
    """What the checked-in profile has and the running KVM did not show; and what that KVM says of itself twice."""
    now = run.probed
    if now is None:
        return
    for text in profile.lost(now):
        yield regressed(text.partition(":")[0], f"gone: {text}")
    for text in now.contradictions():
        yield Result(f"cpuid/{text.partition(':')[0].replace(' ', '-')}", "", Verdict.MISMATCH, 1, text)


def take_whole(outcome: CellOutcome, journal: Journal, progress: Progress, result: Result) -> None:
    """What was found of the kernel as a whole, as a record like any Case's."""
    record = dict(result.to_json())
    outcome.records.append(record)
    journal.append(record)
    progress(f"{result.verdict.value}: {result.summary}")


def regressed(what: str, summary: str) -> Result:
    """Something that the checked-in profile has is gone."""
    return Result(f"profile/{what.replace(' ', '-')}", "", Verdict.REGRESSED, 1, summary)


class StatusLine:
    """One line that says how far a cell is: kept up to date on a terminal, now and then elsewhere."""

    def __init__(self, cell: str, stream: TextIO = sys.stderr) -> None:
        self._cell, self._stream = cell, stream
        self._tty = stream.isatty()
        self._last = time.monotonic()
        self._shown = False

    def update(self, run: CellRun) -> None:
        """Called at every result, and several times a second."""
        now = time.monotonic()
        if now - self._last < (0.2 if self._tty else 10.0):
            return
        self._last = now
        tally = run.tally
        if tally.done:
            text = f"{tally.done}/{counted(tally.total, 'case')}, {tally.rate:,.0f} checks/s, {tally.bad} bad"
        else:
            text = f"booting {tally.boots} of {counted(run.machines, 'machine')}"
        text = f"{self._cell}: {text}, {now - tally.began:.0f} s"
        room = shutil.get_terminal_size().columns - 1  # a full line would wrap, and leave the rest behind
        self._stream.write(f"\r\x1b[K{text[:room]}" if self._tty else f"{text}\n")
        self._stream.flush()
        self._shown = self._tty

    def clear(self) -> None:
        """Make room for something else."""
        if self._shown:
            self._stream.write("\r\x1b[K")
            self._stream.flush()
            self._shown = False

    def say(self, progress: Progress) -> Progress:
        """``progress`` on a line of its own."""

        def said(text: str) -> None:
            self.clear()
            progress(text)

        return said


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Aligned columns."""
    widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]


def cells_table(outcomes: Sequence[CellOutcome]) -> list[str]:
    """All cells of a run, a line each."""
    return table([["cell", "verdict", "cases", "checks", "what else", "time"], *(o.row() for o in outcomes)])


def cell_lines(outcome: CellOutcome) -> list[str]:
    """What one cell came to, for people."""
    lines = summary_lines(outcome.records)
    times = f"first result after {outcome.first_result:.1f} s, {outcome.rate:,.0f} checks/s"
    lines.append(f"  {times}, {outcome.seconds:.1f} s in all")
    if outcome.problem:
        lines.append(f"lost: {outcome.problem}")
    return lines


Say = Callable[[str], None]


def run_cells(cells: Sequence[Cell], out: Path, options: Options, say: Say, status: TextIO) -> int:
    """Run cells one after the other; the exit status of them all."""
    outcomes = []
    for cell in cells:
        name = f"{cell.configuration.name}-{cell.kernel.series}"
        folder = out if len(cells) == 1 else out / name
        say(f"{cell.name}: {cell.kernel.label}, {cell.emulator.name}, {cell.accel}")
        outcome = run_cell(cell, folder, options, say, status)
        outcomes.append(outcome)
        for line in cell_lines(outcome):
            say(line)
        write_reports(folder)
        if options.fail_fast and outcome.status:
            break
    if len(outcomes) > 1:
        for line in cells_table(outcomes):
            say(line)
    say(f"results: {out}")
    verdicts = [Verdict(r["verdict"]) for o in outcomes for r in o.records]
    return exit_status([*verdicts, *([Verdict.LOST] if any(o.problem for o in outcomes) else [])])
