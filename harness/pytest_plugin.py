"""The pytest plugin: fixtures (kvm, vm, vcpu, host, lockstep), --kvm-device, a header line, results for the journal.

Each Case of the suite is a test item.  A worker of pytest-xdist opens its own VMs; what it found travels with the test
report, and only the controlling process writes the journal.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, NoReturn

import pytest

from harness import selection
from harness.case import Case, VmShape
from harness.cpuid import CpuProfile
from harness.guest import GuestError
from harness.host import Host
from harness.journal import Journal, JournalError
from harness.judge import Result, Runner
from harness.known import load_known
from harness.kvm_machine import KvmMachine
from harness.report.text import summary_lines
from harness.report.views import CASES_FOLDER, kept_word, replay_words
from harness.vcpu import Vcpu
from harness.verdict import BAD_INPUT, NO_KVM, Verdict
from harness.vm import DEFAULT_DEVICE, Kvm, KvmUnusableError, Vm

CASE_LIMIT: Final = 1.0
"""Seconds that one KVM_RUN of the suite may take; its guests are a handful of instructions."""
PROPERTY: Final = "kvm-harness"
_BAD: Final = (Verdict.SPLAT, Verdict.MISMATCH, Verdict.REGRESSED)

kvm_key: pytest.StashKey[Kvm] = pytest.StashKey()
host_key: pytest.StashKey[Host] = pytest.StashKey()
runner_key: pytest.StashKey[Runner] = pytest.StashKey()
results_key: pytest.StashKey[list[dict[str, Any]]] = pytest.StashKey()
ending_key: pytest.StashKey[tuple[str, int]] = pytest.StashKey()
journal_key: pytest.StashKey[Journal] = pytest.StashKey()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("kvm-harness")
    group.addoption("--kvm-device", type=Path, default=DEFAULT_DEVICE, help="KVM device to test (default: /dev/kvm)")
    group.addoption("--kvm-out", type=Path, default=None, help="folder for the journal and the Cases that failed")
    group.addoption(
        "--kvm-select", default=None, metavar="EXPR",
        help="only Cases whose own name matches; -k also looks at the names of files and folders",
    )  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "kvm: needs a usable /dev/kvm")
    config.stash[results_key] = []
    try:
        selection.check(config.getoption("--kvm-select"))
    except selection.SelectionError as error:
        raise pytest.UsageError(str(error).replace("-k", "--kvm-select", 1)) from error
    config.option.keyword = selection.alias(config.option.keyword)  # so that Case names may stand in -k
    out: Path | None = config.getoption("--kvm-out")
    if out is not None and not hasattr(config, "workerinput"):
        host = _host(config)
        try:
            config.stash[journal_key] = Journal(out, {"host": host.describe(), "device": str(host.kvm.device)})
        except JournalError as error:
            _end(config, str(error), error.status)


def pytest_unconfigure(config: pytest.Config) -> None:
    if (journal := config.stash.get(journal_key, None)) is not None:
        journal.close()
    if (runner := config.stash.get(runner_key, None)) is not None:
        runner.machine.close()
    if (host := config.stash.get(host_key, None)) is not None:
        host.close()
        host.kvm.close()


def _host(config: pytest.Config) -> Host:
    """The host under test; pytest ends with status 3 and the reason when there is no usable KVM."""
    found = config.stash.get(host_key, None)
    if found is None:
        try:
            found = config.stash[host_key] = Host(Kvm(config.getoption("--kvm-device")))
        except KvmUnusableError as error:
            _end(config, str(error), NO_KVM)
    return found


def _end(config: pytest.Config, text: str, status: int) -> NoReturn:
    """End the session; ``kvm-harness run`` finds the status in the stash, since pytest has meanings of its own."""
    config.stash[ending_key] = (text, status)
    pytest.exit(text, returncode=status)


def pytest_report_header(config: pytest.Config) -> str:
    device = config.getoption("--kvm-device")
    try:
        with Kvm(device) as kvm:
            return f"KVM: {device}: {Host(kvm).describe()}"
    except KvmUnusableError as error:
        return f"KVM: none: {error}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if "kvm" in getattr(item, "fixturenames", ()):
            item.add_marker("kvm")
    expression: str | None = config.getoption("--kvm-select")
    if expression is not None:
        selects = selection.matcher(expression)
        chosen = [item for item in items if isinstance(item, CaseItem) and selects(item.case.name)]
        left = set(chosen)
        config.hook.pytest_deselected(items=[item for item in items if item not in left])
        items[:] = chosen


class CaseSuite:
    """In a test module, a name bound to a CaseSuite becomes one test item for each Case that ``cases(profile)`` gives.

    Plain items: for tens of thousands of Cases a fixture request each would cost more than running them.
    """

    def __init__(self, cases: Callable[[CpuProfile], Iterable[Case]]) -> None:
        self.cases = cases


class _SuiteCollector(pytest.Collector):
    suite: CaseSuite

    def collect(self) -> Iterator[CaseItem]:
        try:
            cases = list(self.suite.cases(_host(self.config).profile))
        except GuestError as error:
            if hasattr(self.config, "workerinput"):
                raise self.CollectError(str(error)) from error
            _end(self.config, str(error), BAD_INPUT)
        for case in cases:
            item: CaseItem = CaseItem.from_parent(self, name=case.name)
            item.case = case
            item.extra_keyword_matches.add(selection.alias(case.name))
            yield item


class CaseItem(pytest.Item):
    """One Case beside the reference model."""

    case: Case

    def runtest(self) -> None:
        judge(self, self.case, _runner(self.config))

    def reportinfo(self) -> tuple[Path, None, str]:
        return self.path, None, self.name


@pytest.hookimpl
def pytest_pycollect_makeitem(collector: pytest.Module | pytest.Class, name: str, obj: object) -> object:
    if not isinstance(obj, CaseSuite):
        return None
    made: _SuiteCollector = _SuiteCollector.from_parent(collector, name=name)
    made.suite = obj
    return made


def pytest_collection_finish() -> None:
    """Tens of thousands of items live to the end of the run: the garbage collector need not look at them each time."""
    gc.collect()
    gc.freeze()


# --- fixtures ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def host(pytestconfig: pytest.Config) -> Host:
    """The host under test, with its probes."""
    return _host(pytestconfig)


@pytest.fixture(scope="session")
def kvm(host: Host) -> Kvm:
    """The open KVM device."""
    return host.kvm


@pytest.fixture
def vm(kvm: Kvm) -> Iterator[Vm]:
    """A fresh VM with 128 KiB of RAM at 0."""
    with Vm(kvm, VmShape()) as made:
        yield made


@pytest.fixture
def vcpu(vm: Vm, host: Host) -> Iterator[Vcpu]:
    """A fresh vCPU with the host's guest CPUID."""
    with Vcpu(vm, host.profile) as made:
        yield made


def _runner(config: pytest.Config) -> Runner:
    found = config.stash.get(runner_key, None)
    if found is None:
        host = _host(config)
        known = load_known(release=host.kernel)
        found = config.stash[runner_key] = Runner(KvmMachine(host.kvm, limit=CASE_LIMIT), host, known)
    return found


@pytest.fixture(scope="session")
def runner(pytestconfig: pytest.Config) -> Runner:
    """Judges Cases on this host."""
    return _runner(pytestconfig)


@pytest.fixture
def lockstep(request: pytest.FixtureRequest, runner: Runner) -> Callable[[Case], Result]:
    """Run a Case beside the reference model; fails the test on a mismatch, skips it where the host cannot run it."""
    return lambda case: judge(request.node, case, runner)


def judge(item: pytest.Item, case: Case, runner: Runner) -> Result:
    """Run a Case, keep its result for the journal, and end the test item accordingly."""
    from harness.reference.cpu import ModelError
    from harness.reference.machine import ReferenceMachine
    from harness.report.failure import failure_text

    try:
        result = runner.run(case, ReferenceMachine())
    except ModelError as error:
        result = Result(case.name, case.id, Verdict.LOST, 0, f"the model cannot run this guest: {error}")
    item.user_properties.append((PROPERTY, json.dumps(result.to_json())))
    if result.verdict in _BAD:
        out: Path | None = item.config.getoption("--kvm-out")
        again = replay_words(case.id if out is None else _keep(case, out))
        difference = result.difference
        if difference is not None:
            text = failure_text(case, difference, runner.host.describe(), again)
        else:
            text = f"{case.name}  [{case.id}]: {result.summary}\n{again}"
        pytest.fail(text, pytrace=False)
    if result.verdict is Verdict.LOST:
        pytest.fail(result.summary, pytrace=False)
    if result.verdict is Verdict.UNSUPPORTED:
        pytest.skip(result.summary)
    return result


def _keep(case: Case, out: Path) -> str:
    """Write the Case into the run's folder; what ``replay`` is to be given."""
    path = out / CASES_FOLDER / f"{case.id}.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(case.to_json()))
    except OSError:  # its record will say so too
        return case.id
    return kept_word(path)


# --- results ----------------------------------------------------------------------------------------------------------


class _Results:
    """Takes what the tests found, in whichever process they ran, and tells it."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.chosen = 0

    @pytest.hookimpl
    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self._chosen(len(session.items))

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node: Any, ids: list[str]) -> None:
        self._chosen(len(ids))

    def _chosen(self, count: int) -> None:
        """How many Cases are to run: a journal without its end can then say how far it came. (Each worker tells.)"""
        if count and self.chosen != count:
            self.chosen = count
            self._append({"chosen": count})

    def _append(self, record: Mapping[str, Any]) -> None:
        if (journal := self.config.stash.get(journal_key, None)) is not None:
            try:
                journal.append(record)
            except JournalError as error:
                _end(self.config, str(error), error.status)

    @pytest.hookimpl
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call":
            return
        for name, value in report.user_properties:
            if name == PROPERTY:
                record = json.loads(str(value))
                if record in self.config.stash[results_key][-1:]:
                    continue
                self.config.stash[results_key].append(record)
                self._append(record)

    @pytest.hookimpl
    def pytest_sessionfinish(self, exitstatus: int) -> None:
        journal = self.config.stash.get(journal_key, None)
        failed = any(Verdict(r["verdict"]) in _BAD for r in self.config.stash[results_key])
        asked = self.config.getoption("maxfail") and failed  # xdist stops by an interrupt of its own
        if journal is not None and (asked or exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)):
            journal.append({"finished": True, "enough": bool(asked)})

    @pytest.hookimpl
    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        records = self.config.stash[results_key]
        if lines := summary_lines(records):
            terminalreporter.section("kvm-harness")
            for line in lines:
                terminalreporter.write_line(line)


@pytest.hookimpl(trylast=True)
def pytest_sessionstart(session: pytest.Session) -> None:
    if not hasattr(session.config, "workerinput"):
        session.config.pluginmanager.register(_Results(session.config), "kvm-harness-results")
