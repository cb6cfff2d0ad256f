"""``kvm-harness replay``: one Case again on this machine's KVM, in full detail or as a C file."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from harness.case import Case, CaseError, load_case
from harness.host import Host
from harness.journal import OUT
from harness.judge import Result, Runner
from harness.known import KnownDivergence, load_known
from harness.kvm_machine import KvmMachine
from harness.machine import record
from harness.paths import FAMILY_NAMES, all_cases
from harness.reference.cpu import ModelError
from harness.reference.machine import ReferenceMachine
from harness.report.agreement import agreement_text
from harness.report.emit_c import emit_c
from harness.report.failure import failure_text, labelled
from harness.report.reduce import reduced
from harness.report.views import CASES_FOLDER, replay_words
from harness.verdict import Verdict
from harness.vm import Kvm
from harness.words import counted

_SHORTEST_ID = 4


@dataclass(frozen=True)
class Found:
    """A Case, and the word with which ``replay`` finds it again: its name, or the file it came from."""

    case: Case
    again: str


def find_case(text: str, host: Host) -> Found:
    """A Case by file, by id (or the start of one) or by name. CaseError when there is none."""
    path = Path(text)
    if path.is_dir():
        raise CaseError(f"{path}: is a folder; give one of its .json files")
    if path.suffix == ".json" or path.is_file():
        return Found(load_case(path), text)
    for kept in sorted(OUT.glob(f"**/{CASES_FOLDER}/{text}*.json")) if len(text) >= _SHORTEST_ID else ():
        return Found(load_case(kept), str(kept))
    family = text.partition("/")[0]
    suite = all_cases(host.profile, families=(family,) if family in FAMILY_NAMES else None)  # all of them take seconds
    # As in KTAP, where '#' begins a directive; or without the number, for the first of a kind.
    names = {text, f"{text}#0", re.sub(r"\.(\d+)$", r"#\1", text)}
    found = [c for c in suite if c.name in names]
    if not found and len(text) >= _SHORTEST_ID:
        found = [c for c in suite if c.id.startswith(text)]
    if not found:
        raise CaseError(
            f"no file, and no Case with id or name {text!r} on this host or below {OUT.absolute()}: for one that failed"
            f" in the lab or in a run elsewhere, give its file, {CASES_FOLDER}/ID.json in the run's --out folder; "
            "kvm-harness run --list lists the names of those here"
        )
    return Found(found[0], found[0].name)


@dataclass(frozen=True)
class Replay:
    """What one Case showed on this machine's KVM."""

    case: Case
    again: str
    host: str
    known: tuple[KnownDivergence, ...]
    result: Result
    _lockstep: Callable[[Case], Result]

    def text(self) -> str:
        """The result in full detail: what differs, or what was compared where nothing does."""
        result = self.result
        head = f"{self.case.name} {self.case.id}: {result.verdict.value}, {counted(result.checks, 'check')}"
        head += f": {result.summary}" if result.summary else ""
        if row := next((row for row in self.known if result.verdict is Verdict.KNOWN and self._is(row)), None):
            head = "\n".join([head, *labelled("known as", f"{row.name}: {row.why} ({row.reference})")])
        if result.difference is None and result.checks:
            steps = record(ReferenceMachine(), self.case)
            return f"{head}\n{agreement_text(self.case, steps, result.checks, self.host)}"
        if result.difference is None:
            return f"{head}\nhost: {self.host}"
        return f"{head}\n{failure_text(self.case, result.difference, self.host, self._command)}"

    def _is(self, row: KnownDivergence) -> bool:
        return self.result.summary.startswith(f"{row.name}: ")

    @property
    def _command(self) -> str:
        return replay_words(shlex.quote(self.again))

    def c_source(self) -> str:
        """The Case as a C file, without the RAM that it does not need. EmitError when it has no C form."""
        smaller, difference = reduced(self.case, self.result.difference, lambda c: self._lockstep(c).difference)
        return emit_c(smaller, difference, self.host, self._command)


def replay(text: str, device: Path, use: Callable[[Replay], None]) -> Result:
    """Run the Case that ``text`` names and hand what it showed to ``use``, while the KVM is open.

    Raises KvmUnusableError, CaseError, KnownError; ModelError, with the Case's name, when the model cannot run it.
    """
    with Kvm(device) as kvm, KvmMachine(kvm) as machine:
        host = Host(kvm)
        try:
            found = find_case(text, host)
            known = load_known(release=host.kernel)
            runner = Runner(machine, host, known)

            def once(case: Case) -> Result:
                return runner.run(case, ReferenceMachine())

            try:
                result = once(found.case)
            except ModelError as error:
                raise ModelError(f"{found.case.name}: the model cannot run this guest: {error}") from error
            use(Replay(found.case, found.again, host.describe(), known, result, once))
            return result
        finally:
            host.close()
