"""``kvm-harness series``: BASE twice, then each patch: build, same code?, run, reached?, same behaviour?, verdict.

Whatever is finished is in the series' folder (harness/series/state.py) or in the cache; a run goes through all of it
again and finds there what need not be done twice.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, wait
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, Protocol

from harness.lab.edits import EditError
from harness.lab.errors import LabError, LabInputError
from harness.lab.hardware import Emulator
from harness.lab.image import Image
from harness.lab.run import Options
from harness.lab.session import Cell
from harness.series.builds import Built, Flavour, Line, reaches
from harness.series.cells import CellJob, CellResult, progress_of, run_job
from harness.series.coverage import Reached, Symbols, reached
from harness.series.explain import explained
from harness.series.git import Commit, PatchRange
from harness.series.layout import Layout
from harness.series.layouts import layout_report, read_layout
from harness.series.line import KVM, CellLine, SecondLook, not_booting, result_or_nothing
from harness.series.report import write_reports
from harness.series.state import Folder, write
from harness.series.verdict import Build, CellReport, Code, LayoutReport, PatchReport, SeriesReport

_POLL: Final = 0.5  # seconds between two looks at how far cells are
_BASE_RUNS: Final = 2
_MORE_RUNS: Final = 8  # of a Case that failed once and not again, on either kernel
_MOST_BAD: Final = 500  # new failures of a cell: a WARN() that every Case meets takes a quarter of a second each time


class Display(Protocol):
    """Shows a series while it runs."""

    def say(self, text: str) -> None:
        """Something that stays."""

    def building(self, number: int, flavour: str) -> None:
        """From now on the kernel of a patch (0: BASE) is built in a flavour."""

    def doing(self, text: str) -> None:
        """How far that is."""

    def cells(self, number: int, done: Mapping[str, tuple[int, int]], left: int) -> None:
        """How far the running cells of a patch (0: BASE) are: (done, chosen) by name; ``left``: all that are to end."""

    def patch(self, report: PatchReport) -> None:
        """A patch has its verdict."""


@dataclass(frozen=True)
class Setup:
    """Everything that a series needs beside its folder. ``tier``: ``auto``, ``smoke`` or ``full``."""

    tree: Path
    title: str
    patches: PatchRange
    cells: Sequence[CellLine]
    emulator: Emulator
    image: Image
    accel: Mapping[str, str]  # by cell
    tier: str = "auto"
    machines: int = 2
    jobs: int | None = None


@dataclass
class _Pending:
    """A patch whose cells are running."""

    number: int
    commit: Commit
    builds: tuple[Build, ...]
    built: Mapping[Flavour, Built]
    layout: LayoutReport
    jobs: dict[str, CellJob] = field(default_factory=dict)
    futures: dict[Future[Path], str] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)  # of cells that could not even begin


class SeriesRun:
    """Validates one series. ``ahead``: patches whose cells may still run while the next one is built."""

    def __init__(self, setup: Setup, folder: Folder, executor: Executor, display: Display, ahead: int = 0) -> None:
        self.setup, self.folder, self.display = setup, folder, display
        self._executor, self._ahead = executor, ahead
        flavours = list(dict.fromkeys(cell.flavour for cell in setup.cells))
        self._lines = {f: Line(setup.tree, f, display.doing, setup.jobs) for f in flavours}
        self._base: dict[Flavour, Built] = {}
        self._reports: list[PatchReport] = []
        self._layout: Layout | None = None  # of the last kernel that was built
        self._began = time.monotonic()
        self._compiling = 0.0

    def run(self) -> SeriesReport:
        """All of it. LabInputError when BASE cannot be used, LabError; what is finished is kept."""
        self._run_base()
        pending: list[_Pending] = []
        for number, commit in enumerate(self.setup.patches.commits, 1):
            pending.append(self._start(number, commit))
            while len(pending) > self._ahead:
                self._finish(pending.pop(0))
        for one in pending:
            self._finish(one)
        return self.report()

    def report(self) -> SeriesReport:
        """What is known so far."""
        setup = self.setup
        return SeriesReport(
            setup.title, setup.patches.base, tuple(c.name for c in setup.cells), tuple(self._reports),
            len(setup.patches.commits), {c.name: dict(c.base.flaky) for c in setup.cells if c.base.flaky},
            {c.name: c.base.failures() for c in setup.cells if c.base.failures()},
            time.monotonic() - self._began, self._compiling, setup.emulator.name, setup.tier,
        )  # fmt: skip

    # --- BASE ---

    def _run_base(self) -> None:
        commit = self.setup.patches.base
        for flavour, line in self._lines.items():
            self.display.building(0, flavour.name)
            build, built = line.build(commit, self.folder.path / "base")
            self._compiling += build.seconds
            if built is None:
                said = "\n".join(f"  {text}" for text in build.errors)
                raise LabInputError(
                    f"BASE {commit} does not build ({flavour.name}), so there is nothing to compare patches with:\n"
                    f"{said}\nall of it: {build.log}"
                )
            self._base[flavour] = built
            self._layout = self._layout or read_layout(built.kernel)
        tier = "smoke" if self.setup.tier == "smoke" else "full"
        jobs = {}
        for cell in self.setup.cells:
            built = self._base[cell.flavour]
            for run in range(1, _BASE_RUNS + 1):
                options = self._options(self._base_tier(cell, tier))
                name, where = f"{cell.name} {run}", self.folder.base(cell.name, run)
                trace = self._trace("base", cell.flavour, built.functions)
                jobs[name] = CellJob(self._cell(cell, built), where, options, str(run), trace)
        results = self._await(0, self._submit(jobs), jobs)
        for cell in self.setup.cells:
            twice = [results[f"{cell.name} {run}"] for run in range(1, _BASE_RUNS + 1)]
            for result in twice:
                if KVM in result.records:
                    raise LabInputError(f"BASE has no KVM in {cell.name}: {result.records[KVM]['summary']}")
                if result.problem:
                    raise LabError(f"BASE cannot be judged in {cell.name}: {result.problem}; see {result.folder}")
            cell.begin(*twice)
            built = self._base[cell.flavour]
            symbols = Symbols(built.system_map)
            cell.reached = reached(built.functions, twice[0].executed, twice[0].machines, symbols)
        write_reports(self.folder.path, self.report())

    def _base_tier(self, cell: CellLine, tier: str) -> str:
        return "smoke" if cell.flavour.variant == "debug" else tier

    # --- a patch ---

    def _start(self, number: int, commit: Commit) -> _Pending:
        """Build a patch, and start the cells that its code calls for."""
        folder = self.folder.patch(number)
        builds: list[Build] = []
        built: dict[Flavour, Built] = {}
        problems: dict[str, str] = {}
        for flavour, line in self._lines.items():
            self.display.building(number, flavour.name)
            try:
                build, kernel = line.build(commit, folder)
            except EditError as error:  # a lab's own edit: no fault of the patch
                problems |= {c.name: str(error) for c in self.setup.cells if c.flavour == flavour}
                continue
            builds.append(build)
            self._compiling += build.seconds
            if kernel is not None:
                built[flavour] = kernel
        layout = LayoutReport()
        if built:
            found = read_layout(next(iter(built.values())).kernel)
            layout = layout_report(found, self._layout)
            self._layout = found or self._layout
        pending = _Pending(number, commit, tuple(builds), built, layout, problems=problems)
        for cell in self.setup.cells:
            code = next((b.code for b in builds if b.flavour == cell.flavour.name), None)
            if cell.flavour not in built or code is None or code.identical:
                continue
            most_bad = len(cell.now.failures()) + _MOST_BAD
            options = self._options(self._tier(cell, code), most_bad)
            options = replace(options, again=self._edited(cell, commit))
            trace = self._trace(folder.relative_to(self.folder.path), cell.flavour, code.touched)
            pending.jobs[cell.name] = CellJob(
                self._cell(cell, built[cell.flavour]), folder / cell.name, options, trace=trace
            )
        pending.futures = self._submit(pending.jobs)
        return pending

    def _tier(self, cell: CellLine, code: Code) -> str:
        if self.setup.tier != "auto":
            return self._base_tier(cell, self.setup.tier)
        base = self._base[cell.flavour]
        full = reaches(code, base, cell.reached.executed, cell.reached.unknown)
        return self._base_tier(cell, "full" if full else "smoke")

    def _finish(self, pending: _Pending) -> None:
        """Wait for a patch's cells, and judge it."""
        results = self._await(pending.number, pending.futures, pending.jobs)
        looks, recorded = self._again(pending, results)
        cells: list[CellReport] = []
        found = Reached()
        for cell in self.setup.cells:
            job, result = pending.jobs.get(cell.name), results.get(cell.name)
            if job is None or result is None:
                problem = pending.problems.get(cell.name, "")
                cells.append(CellReport(cell.name, "", inherited=cell.inherited(), problem=problem))
                continue
            empty = CellReport(cell.name, job.options.tier, command=f"{job.options.again or job.cell.again} {{}}")
            taken = cell.take(pending.number, empty, result, looks.get(cell.name, SecondLook()))
            cells.append(explained(taken, job.cell, *recorded[cell.name]) if cell.name in recorded else taken)
            if names := job.functions:
                symbols = Symbols(pending.built[cell.flavour].system_map)
                found |= reached(names, result.executed, result.machines, symbols, enough=result.enough)
        seconds = sum(b.seconds for b in pending.builds) + sum(c.seconds for c in cells)
        report = PatchReport(
            pending.number, pending.commit, pending.builds, tuple(cells), found, pending.layout, seconds
        )
        self._reports.append(report)
        self.display.patch(report)
        write_reports(self.folder.path, self.report())

    def _again(
        self, pending: _Pending, results: dict[str, CellResult]
    ) -> tuple[dict[str, SecondLook], dict[str, tuple[CellResult, CellResult]]]:
        """Cases that differ run once more, on this kernel and on BASE: what cannot be seen again is no verdict.

        What is flaky on BASE is quarantined. Returned, by cell, are what came of it, and these runs, BASE's first,
        with all that they showed.
        """
        jobs: dict[str, CellJob] = {}
        for cell in self.setup.cells:
            result = results.get(cell.name)
            if result is None:
                continue
            suspects = cell.suspects(cell.records(result))
            if result.problem and not cell.records(result):
                suspects = frozenset([name for name, record in cell.base.records.items() if record["id"]][:1])
            if suspects:
                options = replace(pending.jobs[cell.name].options, only=suspects, record=True, reduce=False)
                jobs |= self._look(pending, cell, options)
                if result.problem:
                    del jobs[f"{cell.name} again"]
        found = self._await(pending.number, self._submit(jobs), jobs)
        unsteady: dict[str, frozenset[str]] = {}
        recorded: dict[str, tuple[CellResult, CellResult]] = {}
        for cell in self.setup.cells:
            on_base, second = found.get(f"{cell.name} on BASE again"), found.get(f"{cell.name} again")
            if on_base is not None and not on_base.problem:
                cell.base_again(cell.records(on_base))
                result = results[cell.name]
                if result.problem and not cell.records(result):
                    record = not_booting(result)
                    results[cell.name] = replace(result, records={record["case"]: record})
            if second is not None and not second.problem:
                unsteady[cell.name] = cell.unsteady(second.records)
            if on_base is not None and second is not None:
                recorded[cell.name] = on_base, second
        return self._more_often(pending, results, unsteady), recorded

    def _more_often(
        self, pending: _Pending, results: Mapping[str, CellResult], unsteady: Mapping[str, frozenset[str]]
    ) -> dict[str, SecondLook]:
        """What came of Cases that were not seen a second time: those that failed run several times more."""
        cells = [cell for cell in self.setup.cells if cell.name in unsteady]
        first = {c.name: {n: r for n, r in c.records(results[c.name]).items() if n in unsteady[c.name]} for c in cells}
        jobs: dict[str, CellJob] = {}
        runs = [f" {number}" for number in range(1, _MORE_RUNS + 1)]
        for cell in cells:
            if only := cell.failing(first[cell.name]):
                options = replace(pending.jobs[cell.name].options, only=only, reduce=False)
                for run in runs:
                    jobs |= self._look(pending, cell, options, run)
        found = self._await(pending.number, self._submit(jobs), jobs)
        looks = {}
        for cell in cells:
            on_base, mine = (
                [found[name + run].records for run in runs if name + run in found]
                for name in (f"{cell.name} on BASE again", f"{cell.name} again")
            )
            looks[cell.name] = cell.settle(first[cell.name], on_base, mine)
        return looks

    def _look(self, pending: _Pending, cell: CellLine, options: Options, run: str = "") -> dict[str, CellJob]:
        """Jobs: one more run on BASE, one on this kernel. ``run`` tells several apart."""
        mine, folder = pending.jobs[cell.name], run.replace(" ", "-")
        where = self.folder.path / "base" / cell.name / f"patch-{pending.number:04d}{folder}"
        again = mine.folder.parent / "again" / f"{cell.name}{folder}"
        return {
            f"{cell.name} on BASE again{run}": CellJob(
                self._cell(cell, self._base[cell.flavour]), where,
                replace(options, again=self._edited(cell, self.setup.patches.base)),
            ),
            f"{cell.name} again{run}": replace(mine, folder=again, options=options, trace=None),
        }

    # --- cells ---

    def _cell(self, cell: CellLine, built: Built) -> Cell:
        setup = self.setup
        return Cell(cell.configuration, built.kernel.kernel, setup.emulator, setup.image, setup.accel[cell.name])

    def _options(self, tier: str, most_bad: int = 0) -> Options:
        return Options(tier=tier, machines=self.setup.machines, most_bad=most_bad, reduce=most_bad > 0)

    def _trace(self, where: str | Path, flavour: Flavour, names: Iterable[str]) -> Path:
        """The file with functions to follow."""
        path = self.folder.path / where / f"trace-{flavour.name}.json"
        write(path, sorted(names))
        return path

    def _edited(self, cell: CellLine, commit: Commit) -> str:
        """How a user runs a Case of a cell again whose kernel is edited, up to its name; empty for other cells."""
        if not cell.configuration.edits:
            return ""
        tree = shlex.quote(str(self.setup.tree.expanduser().absolute()))
        config = f"--config {cell.configuration.name} -k"
        return f"git -C {tree} checkout {commit.id[:12]} && kvm-harness lab run --tree {tree} {config}"

    def _submit(self, jobs: Mapping[str, CellJob]) -> dict[Future[Path], str]:
        return {self._executor.submit(run_job, job): name for name, job in jobs.items()}

    def _await(
        self, number: int, futures: Mapping[Future[Path], str], jobs: Mapping[str, CellJob]
    ) -> dict[str, CellResult]:
        """The results of jobs, by name; meanwhile tell how far they are."""
        left = set(futures)
        while left:
            done, left = wait(left, _POLL, FIRST_COMPLETED)
            for future in done:
                _raise(future, futures[future])
            running = {futures[f]: progress_of(jobs[futures[f]]) for f in left if f.running()}
            self.display.cells(number, running, len(left))
        return {name: result_or_nothing(jobs[name].folder) for name in futures.values()}


def _raise(future: Future[Path], name: str) -> None:
    try:
        future.result()
    except BrokenExecutor as error:
        raise LabError(f"{name}: a worker process was killed: is there memory enough? {error}") from error
    except LabInputError as error:
        raise LabInputError(f"{name}: {error}") from error
