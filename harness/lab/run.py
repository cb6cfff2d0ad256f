"""``kvm-harness lab run``: cells one after the other, a journal and verdicts for each, one table at the end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TextIO

from harness.case import Case
from harness.journal import read_run
from harness.judge import Result
from harness.known import load_known
from harness.lab.bare_arbiter import Arbiter
from harness.lab.bare_emulator import BareEmulator
from harness.lab.cache import Progress
from harness.lab.errors import LabError, LabInputError, LostError, NoKvmError
from harness.lab.lines import StatusLine, table
from harness.lab.plan import Plan
from harness.lab.planner import cell_plan
from harness.lab.profile import Profile, load_profile, write_profile
from harness.lab.reproducer import reduce_reproducers
from harness.lab.results import EVEX_OPERANDS, CellOutcome, CellResults, regressed
from harness.lab.session import DEADLINE, Cell, CellRun
from harness.reference.machine import ReferenceMachine
from harness.report.junit import junit_report
from harness.report.ktap import ktap_report
from harness.report.text import summary_lines
from harness.selection import matcher, nothing_matches
from harness.verdict import Verdict, exit_status


@dataclass(frozen=True)
class Options:
    """How cells are run.

    ``only`` are names of Cases, None for all. ``profile`` is what the KVM is expected to be able to do, in the place of
    the checked-in one. ``trace``: names of kernel functions; the journal tells which of them were called. ``record``:
    the journal keeps all that Cases show. ``most_bad``: so many failures are enough, the rest is not run; 0 for no
    limit. ``reduce``: the C reproducers are made small, which takes one more boot. ``again``: the command that runs a
    Case of this cell again, up to its name, if not :attr:`Cell.again`. ``header``: goes into the journal's first line.
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
    again: str = ""
    header: Mapping[str, Any] = field(default_factory=dict)


def run_cell(cell: Cell, folder: Path, options: Options, progress: Progress, status: TextIO) -> CellOutcome:
    """Run one cell; results are in ``folder`` as they come. LabError and JournalError pass through."""
    outcome = CellOutcome(cell.name, folder)
    profile = demanded(_profile(cell, folder, options, progress), cell)
    plan = cell_plan(cell.configuration, profile, options.tier, progress)
    chosen, skipped = _choice(plan, options)
    line = StatusLine(cell.name, status)
    say = line.say(progress)
    results = CellResults(cell, outcome, plan, _header(cell, plan, options, len(chosen) + len(skipped)), say)
    arbiter = _Arbitration(cell)

    def take(result: Result, allowed: int) -> None:
        results.take(result, allowed)
        line.update(run)

    run = CellRun(
        cell, plan, profile, folder, take, known=load_known(release=cell.kernel.release), machines=options.machines,
        most_bad=1 if options.fail_fast else options.most_bad, deadline=options.deadline, arbiter=arbiter,
        trace=options.trace, record=options.record, progress=say, tick=lambda: line.update(run), cold=options.cold,
    )  # fmt: skip
    try:
        for result in skipped:
            take(result, 0)
        if chosen:
            run.run(chosen)
        _conclude(run, results, profile, options, say)
    except NoKvmError as error:
        results.take_whole(regressed("KVM", str(error)))
        results.finish()
    except LabError as error:
        outcome.problem = str(error)
        results.journal.append({"lost": str(error), "error": type(error).__name__})
    finally:
        line.clear()
        arbiter.close()
        results.journal.close()
        outcome.seconds = time.monotonic() - outcome.began
        outcome.first_result, outcome.rate = run.tally.first_result, run.tally.rate
    return outcome


def _profile(cell: Cell, folder: Path, options: Options, progress: Progress) -> Profile:
    """What the cell's KVM is expected to do: as given, as checked in, or else as it says when it is asked."""
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
    return profile


def _choice(plan: Plan, options: Options) -> tuple[list[int], list[Result]]:
    """Indices of the Cases to run, and results of those that the profile rules out. LabInputError for none of both."""
    selects = _selection(options)
    chosen = [n for n, name in enumerate(plan.names) if selects(name)]
    skipped = [Result(n, id_, Verdict.UNSUPPORTED, 0, reason) for n, id_, reason in plan.skipped if selects(n)]
    if not chosen and not skipped:
        names = (*plan.names, *(name for name, *_ in plan.skipped))
        raise LabInputError(nothing_matches(options.select, names, "kvm-harness lab run --list"))
    return chosen, skipped


def _header(cell: Cell, plan: Plan, options: Options, count: int) -> dict[str, Any]:
    """The journal's first line, of a run of ``count`` Cases."""
    return {
        "host": f"Linux {cell.kernel.release} in {cell.emulator.name} ({cell.accel})", "device": "lab",
        "cell": cell.name, "configuration": cell.configuration.name, "kernel": cell.kernel.label,
        "series": cell.kernel.series, "tier": options.tier, "plan": plan.key, "chosen": count,
        "again": options.again or cell.again, **options.header,
    }  # fmt: skip


def _conclude(run: CellRun, results: CellResults, profile: Profile, options: Options, say: Progress) -> None:
    """No more Cases are to run: what that says of the kernel as a whole, and what else the journal is to have."""
    cell, journal, tally = run.cell, results.journal, run.tally
    assert run.plan is not None
    for result in profile_results(profile, run):
        results.take_whole(result)
    if run.probed is not None:
        journal.append({"probed": run.probed.to_json()})
    for index, steps in run.recorded.items():
        journal.append({"recorded": run.plan.names[index], "steps": steps})
    if results.failed and options.reduce:
        reduce_reproducers(cell, profile, results.failed, results.host, results.outcome.folder, say)
    if options.trace:
        journal.append({"executed": list(run.executed.values()), "machines": tally.boots})
    if options.write_profile:
        _add_to_profile(cell, profile, results, say)
    if not tally.total or tally.done >= tally.total or run.enough:
        results.finish(enough=run.enough)


def _add_to_profile(cell: Cell, profile: Profile, results: CellResults, say: Progress) -> None:
    """Into the profile just written: what only running the Cases shows."""
    refused, endings = results.refused - {""}, results.endings
    if refused or endings:
        profile = replace(profile, lacks=profile.lacks | refused, outcomes=endings)
        path = write_profile(cell.configuration.name, cell.kernel.series, profile)
        say(f"{cell.name}: instructions that its emulator lacks added to {path}: {', '.join(sorted(refused))}")
        say(f"{cell.name}: outcomes recorded in {path}: {len(endings)}")


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


def run_cells(
    cells: Sequence[Cell], out: Path, options: Options, again: Callable[[Cell], str], say: Say, status: TextIO
) -> int:
    """Run cells one after the other; the exit status of them all. ``again``: the option of that name, for each."""
    outcomes = []
    for cell in cells:
        name = f"{cell.configuration.name}-{cell.kernel.series}"
        folder = out if len(cells) == 1 else out / name
        say(f"{cell.name}: {cell.kernel.label}, {cell.emulator.name}, {cell.accel}")
        outcome = run_cell(cell, folder, replace(options, again=again(cell)), say, status)
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
