"""Cells as jobs: independent of each other, each with a folder of its own, for any executor of concurrent.futures.

A job and its result are plain data; what it found is in its folder's journal, so that a job whose journal is finished
is never run again. The local pool is processes of this machine; a cluster's executor needs no more than the same
harness and the same folders on its machines.
"""

from __future__ import annotations

import ctypes
import io
import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Collection, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, Final

from harness.case import Case
from harness.journal import NAME, JournalError, RunResults, read_journal, read_run
from harness.lab.cache import area, cached, digest, quiet
from harness.lab.errors import LabError
from harness.lab.planner import cell_plan
from harness.lab.profile import load_profile
from harness.lab.run import Options, run_cell
from harness.lab.session import Cell
from harness.lab.sources import harness_digest

LOG: Final = "cell.log"
"""Beside a cell's journal: what it had to say while it ran."""
_KEY: Final = "key"
_ATTEMPTS: Final = 2
_RECORDINGS: Final = "recordings"  # of bases, in the cache
_PR_SET_PDEATHSIG: Final = 1


@dataclass(frozen=True)
class CellJob:
    """One run of a cell. ``shared``: its results go into the cache too, and may come from there.

    ``trace``: a file with the names of the kernel functions to follow, as JSON. (Jobs are small: Python 3.11's pool of
    processes cannot be stopped while one that is larger than a pipe waits for a worker.)
    """

    cell: Cell
    folder: Path
    options: Options
    shared: str = ""  # which of several equal runs
    trace: Path | None = None

    @property
    def key(self) -> str:
        """Changes with everything that decides what the run can find."""
        cell, options = self.cell, self.options
        configuration = replace(cell.configuration, needs=frozenset())  # a set has no order, nor any part in this
        return digest(
            cell.kernel.digest, repr(configuration), cell.emulator.digest, cell.image.digest, cell.accel,
            options.tier, repr(options.select), repr(options.only and sorted(options.only)), repr(self.functions),
            repr(options.record), repr(options.most_bad), self.shared, harness_digest(),
        )  # fmt: skip


    @property
    def functions(self) -> tuple[str, ...]:
        """What is in the file ``trace``."""
        return tuple(json.loads(self.trace.read_text())) if self.trace is not None else ()


@dataclass(frozen=True)
class CellResult:
    """What a cell's journal says: one record for each Case, and what its kernel was seen to be.

    ``problem``: why it did not come to its end, empty if it did; ``error``: the name of that error's class.
    ``enough``: it ended early, so many of the ``chosen`` Cases had failed. ``probed``: its KVM's profile, as JSON;
    ``executed``: answers of :class:`harness.lab.trace.FunctionProfile`, of fewer than ``machines``, or not of the
    ``whole`` run, where some were lost. ``recorded``: all that Cases showed, where that was asked for.
    """

    folder: Path
    records: Mapping[str, Mapping[str, Any]]
    problem: str = ""
    error: str = ""
    probed: Mapping[str, Any] | None = None
    executed: tuple[Mapping[str, Any], ...] = ()
    recorded: Mapping[str, Any] = field(default_factory=dict)
    machines: int = 0
    seconds: float = 0.0
    enough: bool = False
    chosen: int = 0

    @property
    def run(self) -> RunResults:
        """The journal as reports see it."""
        return read_run(self.folder)


def read_result(folder: Path) -> CellResult:
    """What is in a cell's folder. JournalError when there is no journal."""
    records: dict[str, Mapping[str, Any]] = {}
    found: dict[str, Any] = {}
    recorded: dict[str, Any] = {}
    for line in read_journal(folder):
        if "case" in line:
            records[str(line["case"])] = line
        elif "recorded" in line:
            recorded[str(line["recorded"])] = line["steps"]
        else:
            found.update(line)
    problem = "" if found.get("finished") else str(found.get("lost") or "it was not finished")
    return CellResult(
        folder, records, problem, str(found.get("error", "")), found.get("probed"), tuple(found.get("executed", ())),
        recorded, int(found.get("machines", 0)), float(found.get("seconds", 0.0)),
        bool(found.get("enough")), int(found.get("chosen", 0)),
    )  # fmt: skip


def finished(job: CellJob) -> bool:
    """Whether the job's folder already holds the result of just this job."""
    try:
        lines = list(read_journal(job.folder))
    except JournalError:
        return False
    return bool(lines) and lines[0].get(_KEY) == job.key and any("finished" in line for line in lines)


def run_job(job: CellJob) -> Path:
    """Run the cell unless it is finished; its folder. Raises LabInputError, JournalError (a full disk).

    A cell that is lost is run once more, from the beginning; the journal then says why it was lost.
    """
    if finished(job):
        return job.folder
    if job.shared:
        _shared(job)
    else:
        _attempt(job)
    return job.folder


def _shared(job: CellJob) -> None:
    """By the cache: another series on the same base has the same recordings."""
    kept = area(_RECORDINGS) / job.key
    if kept.is_dir():
        _discard(job.folder)
        _copy(kept / "cell", job.folder)
        return
    _attempt(job)
    if finished(job):
        cached(_RECORDINGS, job.key, lambda scratch: _copy(job.folder, scratch / "cell"))


def _copy(source: Path, target: Path) -> None:
    """Copy a folder; it appears whole, or not at all."""
    part = target.with_name(f".{target.name}.part")
    _discard(part)
    try:
        shutil.copytree(source, part)
        part.rename(target)
    except OSError as error:
        _discard(part)
        raise LabError(f"{target} cannot be written: {error}: make room and run again") from error


def _attempt(job: CellJob) -> None:
    options = replace(job.options, trace=job.functions, header={**job.options.header, _KEY: job.key})
    for left in reversed(range(_ATTEMPTS)):
        _discard(job.folder)
        job.folder.mkdir(parents=True)
        with open(job.folder / LOG, "a", buffering=1) as log:
            outcome = run_cell(job.cell, job.folder, options, partial(print, file=log), io.StringIO())
        if not outcome.problem or not left:
            return


def _discard(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def cases_of(cell: Cell, tier: str, names: Collection[str]) -> dict[str, Case]:
    """Cases of a cell by name, of those that it has. LabError."""
    profile = load_profile(cell.configuration.name, cell.kernel.series)
    if profile is None:
        return {}
    plan = cell_plan(cell.configuration, profile, tier, quiet)
    return {name: plan.planned(index)[0] for index, name in enumerate(plan.names) if name in names}


def progress_of(job: CellJob) -> tuple[int, int]:
    """(Cases done, Cases chosen) of a running job, by its journal; zeros before it has one."""
    try:
        with open(job.folder / NAME, "rb") as file:
            lines = file.read().count(b"\n")
            file.seek(0)
            header = file.readline()
        chosen = int(json.loads(header).get("chosen", 0))
        return max(0, min(lines - 1, chosen)), chosen  # what is found of the kernel as a whole has lines, too
    except (OSError, ValueError):
        return 0, 0


# --- the local pool ---------------------------------------------------------------------------------------------------


class LocalPool(ProcessPoolExecutor):
    """Processes of this machine, which end with this one, however it ends, and take their emulators along."""

    def __init__(self, workers: int) -> None:
        # Forked, and all of them before there is any thread: nothing is left behind where the parent is killed.
        fork = multiprocessing.get_context("fork")
        super().__init__(workers, mp_context=fork, initializer=_obey, initargs=(os.getpid(),))

    def stop(self) -> None:
        """End what runs, in the middle; unfinished cells start again the next time."""
        self.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            process.terminate()
            process.join(5.0)


def _obey(parent: int) -> None:
    """In a worker: interrupts are the parent's to handle, and without it there is nothing to do."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _leave)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _leave(number: int, frame: FrameType | None) -> None:
    os._exit(1)  # its emulators are killed by the kernel with the threads that started them


def workers_for(machines: int) -> int:
    """How many cells this machine can run side by side, with so many emulators each."""
    return max(1, len(os.sched_getaffinity(0)) // machines)

