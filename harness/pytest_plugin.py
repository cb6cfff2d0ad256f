"""The pytest plugin: fixtures (kvm, vm, vcpu, host, lockstep), --kvm-device, a header line, results for the journal.

Each Case of the suite is a test item.  A worker of pytest-xdist opens its own VMs; what it found travels with the test
report, and only the controlling process writes the journal.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from harness.case import Case, VmShape
from harness.host import Host
from harness.journal import Journal, JournalError
from harness.known import load_known
from harness.machine import KvmMachine
from harness.runner import Result, Runner
from harness.verdict import Verdict
from harness.vm import DEFAULT_DEVICE, Kvm, KvmUnusableError, Vcpu, Vm

PROPERTY: Final = "kvm-harness"
CASES_FOLDER: Final = "cases"
_BAD: Final = (Verdict.SPLAT, Verdict.MISMATCH, Verdict.REGRESSED)

kvm_key: pytest.StashKey[Kvm] = pytest.StashKey()
host_key: pytest.StashKey[Host] = pytest.StashKey()
results_key: pytest.StashKey[list[dict[str, Any]]] = pytest.StashKey()
journal_key: pytest.StashKey[Journal] = pytest.StashKey()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("kvm-harness")
    group.addoption("--kvm-device", type=Path, default=DEFAULT_DEVICE, help="KVM device to test (default: /dev/kvm)")
    group.addoption("--kvm-out", type=Path, default=None, help="folder for the journal and the Cases that failed")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "kvm: needs a usable /dev/kvm")
    config.stash[results_key] = []
    out: Path | None = config.getoption("--kvm-out")
    if out is not None and not hasattr(config, "workerinput"):
        host = _host(config)
        try:
            config.stash[journal_key] = Journal(out, {"host": host.describe(), "device": str(host.kvm.device)})
        except JournalError as error:
            raise pytest.UsageError(str(error)) from error


def pytest_unconfigure(config: pytest.Config) -> None:
    if (journal := config.stash.get(journal_key, None)) is not None:
        journal.close()
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
            pytest.exit(str(error), returncode=3)
    return found


def pytest_report_header(config: pytest.Config) -> str:
    device = config.getoption("--kvm-device")
    try:
        with Kvm(device) as kvm:
            return f"KVM: {device}: {Host(kvm).describe()}"
    except KvmUnusableError as error:
        return f"KVM: none: {error}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "kvm" in getattr(item, "fixturenames", ()):
            item.add_marker("kvm")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "register_case" in metafunc.fixturenames:
        from harness.paths import all_cases

        cases = all_cases(_host(metafunc.config).profile)
        metafunc.parametrize("register_case", cases, ids=[case.name for case in cases])


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


@pytest.fixture(scope="session")
def kvm_machine(kvm: Kvm) -> Iterator[KvmMachine]:
    """The machine that runs Cases on this KVM, reusing its VMs."""
    with KvmMachine(kvm) as machine:
        yield machine


@pytest.fixture(scope="session")
def runner(kvm_machine: KvmMachine, host: Host) -> Runner:
    """Judges Cases on this host."""
    return Runner(kvm_machine, host, load_known())


@pytest.fixture
def lockstep(request: pytest.FixtureRequest, runner: Runner, host: Host) -> Callable[[Case], Result]:
    """Run a Case beside the reference model; fails the test on a mismatch, skips it where the host cannot run it."""
    from harness.reference.machine import ReferenceMachine
    from harness.report.failure import failure_text

    def check(case: Case) -> Result:
        result = runner.run(case, ReferenceMachine())
        request.node.user_properties.append((PROPERTY, json.dumps(result.to_json())))
        out: Path | None = request.config.getoption("--kvm-out")
        if result.verdict in _BAD:
            if out is not None:
                _keep(case, out)
            difference = result.difference
            text = failure_text(case, difference, host.describe()) if difference is not None else result.summary
            pytest.fail(text, pytrace=False)
        if result.verdict is Verdict.UNSUPPORTED:
            pytest.skip(result.summary)
        return result

    return check


def _keep(case: Case, out: Path) -> None:
    folder = out / CASES_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{case.id}.json").write_text(json.dumps(case.to_json()))


# --- results ----------------------------------------------------------------------------------------------------------


class _Results:
    """Takes what the tests found, in whichever process they ran, and tells it."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config

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
                journal = self.config.stash.get(journal_key, None)
                if journal is not None:
                    try:
                        journal.append(record)
                    except JournalError as error:
                        pytest.exit(str(error), returncode=error.status)

    @pytest.hookimpl
    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if lines := summary_lines(self.config.stash[results_key]):
            terminalreporter.section("kvm-harness")
            for line in lines:
                terminalreporter.write_line(line)


@pytest.hookimpl(trylast=True)
def pytest_sessionstart(session: pytest.Session) -> None:
    if not hasattr(session.config, "workerinput"):
        session.config.pluginmanager.register(_Results(session.config), "kvm-harness-results")


def summary_lines(records: list[dict[str, Any]]) -> list[str]:
    """What a run came to: counts by verdict, every limit of the host once with its count, known divergences."""
    if not records:
        return []
    verdicts = Counter(r["verdict"] for r in records)
    checks = sum(r["checks"] for r in records)
    counts = ", ".join(f"{verdicts[v.value]} {v.value}" for v in Verdict if verdicts[v.value])
    lines = [f"{len(records)} cases, {checks} checks: {counts}"]
    for verdict, title in ((Verdict.UNSUPPORTED, "not possible on this host"), (Verdict.HEALED, "healed")):
        reasons = Counter(r["summary"] for r in records if r["verdict"] == verdict.value)
        lines += [f"  {title}: {count:5d} × {reason}" for reason, count in reasons.most_common()]
    known = Counter(r["summary"].split(":")[0] for r in records if r["verdict"] == Verdict.KNOWN.value)
    lines += [f"  known divergence: {count:5d} × {name}" for name, count in known.most_common()]
    return lines
