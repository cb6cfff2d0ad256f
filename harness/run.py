"""``kvm-harness run``: the suite as a pytest session of its own, whose only voice is a Progress."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Generator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest

from harness import selection
from harness.host import Host
from harness.journal import NAME, free_folder, new_folder, read_run
from harness.known import load_known
from harness.paths import FAMILY_NAMES, all_cases
from harness.paths.common import guest_for
from harness.pytest_plugin import PROPERTY, ending_key, host_key
from harness.report.progress import Progress
from harness.report.text import summary_lines
from harness.report.views import BAD, verdict_of
from harness.verdict import BAD_INPUT, INTERRUPTED, Verdict, exit_status
from harness.vm import Kvm
from harness.words import counted

ROOT: Final = Path(__file__).resolve().parent.parent
_LISTING: Final = "kvm-harness run --list"
_SHOWN_IN_FULL: Final = 10
"""Failures that a run shows in full detail; the rest is in its report."""


class RunError(Exception):
    """The run did not come to a verdict; ``status`` is the exit status."""

    def __init__(self, text: str, status: int) -> None:
        super().__init__(text)
        self.status = status


@dataclass(frozen=True)
class Request:
    """What to run: ``expression`` is ``-k``, ``workers`` 0 runs in this process, ``out`` None makes a new folder."""

    device: Path
    out: Path | None = None
    expression: str | None = None
    workers: int = 0
    fail_fast: bool = False


def case_names(device: Path, expression: str | None) -> list[str]:
    """The names of the Cases that a run with this ``-k`` would select here; nothing runs.

    Raises KvmUnusableError, GuestError; SelectionError when there is none.
    """
    selection.check(expression)  # before the Cases are made
    with Kvm(device) as kvm:
        host = Host(kvm)
        try:
            names = [case.name for case in all_cases(host.profile)]
        finally:
            host.close()
    return selection.selected(expression, names, _LISTING)


def run_suite(request: Request, progress: Progress) -> int:
    """Run, tell of it, and return the exit status of the verdicts.

    Raises KvmUnusableError, SelectionError, KnownError, GuestError, JournalError, and RunError for everything else that
    keeps a run from its end.
    """
    Kvm(request.device).close()
    selection.check(request.expression)
    # What would go wrong in every worker or with every Case is said once, here.
    load_known()
    guest_for("walk.S", "real")
    out = free_folder(request.out) if request.out else new_folder()
    voice = _Voice(progress, request)
    progress.wait("making the cases ...")
    try:
        status = int(pytest.main(_options(request, out), plugins=[voice]))
    except KeyboardInterrupt:  # before pytest was ready for one
        voice.interrupted, status = True, int(pytest.ExitCode.INTERRUPTED)
    progress.close(keep=not voice.interrupted and voice.problem is None)
    if voice.problem is not None:
        raise RunError(*voice.problem)
    if voice.interrupted:
        raise RunError(f"interrupted; finished results are in {out}" if voice.count else "interrupted", INTERRUPTED)
    if voice.stopped:
        status = int(pytest.ExitCode.TESTS_FAILED)
    if voice.broken:
        progress.say("\n".join(voice.broken))
        raise RunError("the suite could not be loaded: see above", Verdict.LOST.status)
    if status == pytest.ExitCode.NO_TESTS_COLLECTED:
        _forget(request, out)
        raise RunError(selection.nothing_matches(request.expression, FAMILY_NAMES, _LISTING), BAD_INPUT)
    if status == pytest.ExitCode.USAGE_ERROR:
        raise RunError("pytest could not begin; see above", BAD_INPUT)
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise RunError(f"pytest itself failed; see above; finished results are in {out}", Verdict.LOST.status)
    return _conclude(out, voice, progress, status)


def _options(request: Request, out: Path) -> list[str]:
    options = [
        str(ROOT / "tests" / "kvm" / "test_registers.py"), "-c", str(ROOT / "pyproject.toml"),
        "-o", "addopts=-p harness.pytest_plugin", "--capture=no", f"--kvm-device={request.device}",
        f"--kvm-out={out}",
    ]  # fmt: skip
    for plugin in ("terminal", "cacheprovider", "logging", "unraisableexception", "threadexception"):
        options += ["-p", f"no:{plugin}"]
    if request.expression is not None:
        options.append(f"--kvm-select={request.expression}")  # not -k: that is true of every Case for 'test'
    if request.workers:
        options += ["-n", str(request.workers)]
    if request.fail_fast:
        options.append("--maxfail=1")
    return options


def _conclude(out: Path, voice: _Voice, progress: Progress, status: int) -> int:
    records = read_run(out).records
    for line in summary_lines(records):
        progress.say(line)
    hidden = voice.failures - _SHOWN_IN_FULL
    if hidden > 0:
        progress.say(f"not shown above: {counted(hidden, 'more failure')}: kvm-harness report {out}")
    progress.say(f"results: {out}")
    if progress.failed is not None:
        raise RunError(f"{progress.failed.strerror}: the results are in {out}", Verdict.LOST.status)
    decided = exit_status(verdict_of(r) for r in records)
    if status == pytest.ExitCode.TESTS_FAILED and decided == 0:
        return Verdict.LOST.status  # a Case ended without a verdict: the harness itself failed
    return decided


def _forget(request: Request, out: Path) -> None:
    """Nothing ran: leave no folder behind that was made for it."""
    if request.out is None:
        with suppress(OSError):
            (out / NAME).unlink()
            out.rmdir()


def _end_workers() -> None:
    """At once: left alone, a worker would first go on for seconds. Their results are here, their VMs go with them."""
    for path in Path("/proc/self/task").glob("*/children"):
        with suppress(OSError):
            for pid in path.read_text().split():
                os.kill(int(pid), signal.SIGKILL)


class _Voice:
    """Plugin, in the process that writes the journal: tells what happens, in place of pytest's own reporter."""

    def __init__(self, progress: Progress, request: Request) -> None:
        self._progress, self._request = progress, request
        self.problem: tuple[str, int] | None = None
        self.interrupted = self.stopped = self._told = False
        self.broken: list[str] = []  # collecting failed
        self.count = self.failures = 0

    @pytest.hookimpl(wrapper=True)
    def pytest_sessionstart(self) -> Generator[None, Any, Any]:
        """Workers start with SIGINT blocked: on Ctrl-C, which reaches all, this process alone speaks and ends them."""
        if not self._request.workers:
            return (yield)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            return (yield)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self._begin(session.config, len(session.items))

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node: Any, ids: list[str]) -> None:
        self._begin(node.config, len(ids))

    def _begin(self, config: pytest.Config, total: int) -> None:
        if total and not self._told:
            self._told = True
            self._progress.say(f"{counted(total, 'case')} on {config.stash[host_key].describe()}")
        if total:
            self._progress.begin(total)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        found = [json.loads(str(value)) for name, value in report.user_properties if name == PROPERTY]
        if report.when == "call" and found:
            self.count += 1
            self._progress.done(verdict_of(found[0]))
            if verdict_of(found[0]) in BAD:
                self._failure(report.longreprtext)
        elif report.failed:  # no verdict: a worker died, or the harness failed
            self._failure(f"{report.nodeid}: {report.longreprtext}")

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.broken.append(report.longreprtext)

    def pytest_internalerror(self, excrepr: object) -> None:
        self._progress.say(str(excrepr))

    def _failure(self, text: str) -> None:
        self.failures += 1
        if self.failures <= _SHOWN_IN_FULL:
            self._progress.say(f"\n{text}\n")

    def pytest_keyboard_interrupt(self, excinfo: pytest.ExceptionInfo[BaseException]) -> None:
        # pytest and xdist stop for reasons of their own by subclasses of it: --fail-fast, errors in collection.
        self.interrupted = type(excinfo.value) is KeyboardInterrupt
        self.stopped = not self.interrupted and self._request.fail_fast and self.failures > 0
        if self.interrupted:
            _end_workers()

    def pytest_unconfigure(self, config: pytest.Config) -> None:
        self.problem = config.stash.get(ending_key, None)
