"""Judge: from what running a Case showed to its verdict, with the limits and known divergences of where it ran."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from harness.case import Case
from harness.host import VECTORS, Host, delivered_vector
from harness.known import KnownDivergence
from harness.kvm_machine import KvmMachine
from harness.lockstep import Difference
from harness.machine import Machine
from harness.runner import Finding, execute
from harness.verdict import Verdict

Read = Callable[[int, int], bytes]
"""Guest RAM where the machine stands: (guest-physical address, size) -> bytes, empty outside of it."""


@dataclass(frozen=True)
class Result:
    """What one Case came to. ``summary`` is one line: what differs, or why it was not run."""

    name: str
    id: str
    verdict: Verdict
    checks: int = 0
    summary: str = ""
    seconds: float = 0.0
    difference: Difference | None = field(default=None, compare=False)

    def to_json(self) -> Mapping[str, Any]:
        """The journal's line. ``differs`` names what differs, where something does."""
        more = {"differs": list(self.difference.where)} if self.difference is not None else {}
        return {
            "case": self.name, "id": self.id, "verdict": self.verdict.value, "checks": self.checks,
            "summary": self.summary, "seconds": round(self.seconds, 6), **more,
        }  # fmt: skip


class Limits(Protocol):
    """What the place where Cases run cannot do: a probed Host, or the checked-in profile of a lab cell."""

    @property
    def module(self) -> str:
        """The vendor module behind the KVM: kvm_amd, kvm_intel ..."""

    def unsupported(self, case: Case) -> str:
        """Why it cannot run ``case`` at all, or an empty string."""

    @property
    def outcomes(self) -> Mapping[str, str]:
        """Case -> how it is known to end where KVM cannot do better yet (:func:`outcome`)."""

    def excuse(self, case: Case, difference: Difference, read: Read) -> str:
        """Why a difference is a limit and no defect, or an empty string."""


def _any_of(patterns: Iterable[str]) -> re.Pattern[str]:
    """What fnmatchcase would find for one of them."""
    return re.compile("|".join(map(fnmatch.translate, patterns)) or r"(?!)")


class Judge:
    """Gives verdicts. ``known`` are the divergences that are expected of this KVM."""

    def __init__(self, limits: Limits, known: Sequence[KnownDivergence] = ()) -> None:
        self.limits = limits
        self._known = known
        self._patterns: tuple[re.Pattern[str], list[tuple[re.Pattern[str], KnownDivergence]]] | None = None

    def skip(self, case: Case) -> Result | None:
        """The result of a Case that need not be run, None for one that must."""
        reason = self.limits.unsupported(case)
        return Result(case.name, case.id, Verdict.UNSUPPORTED, 0, reason) if reason else None

    def covered(self, name: str) -> list[KnownDivergence]:
        """The known divergences that speak of this Case, here."""
        if self._patterns is None:
            here = [row for row in self._known if row.is_for(self.limits.module)]
            each = [(_any_of(row.cases), row) for row in here]
            self._patterns = _any_of([pattern for row in here for pattern in row.cases]), each
        some, each = self._patterns
        return [row for pattern, row in each if pattern.match(name)] if some.match(name) else []

    def simple(self, name: str) -> bool:
        """Nothing is said of this Case beforehand: if it agrees, that is all."""
        return name not in self.limits.outcomes and not self.covered(name)

    def judge(self, case: Case, finding: Finding, read: Read) -> Result:
        """The verdict on what running ``case`` showed."""

        def result(verdict: Verdict, summary: str) -> Result:
            return Result(case.name, case.id, verdict, finding.checks, summary, finding.seconds, found)

        found = finding.difference
        if finding.killed:
            return result(Verdict.SPLAT, f"the kernel killed the VM: {finding.killed}")
        if finding.refused:
            return result(Verdict.MISMATCH, f"start state refused: {finding.refused}")
        rows, recorded = self.covered(case.name), self.limits.outcomes.get(case.name, "")
        if found is None:
            if recorded:
                return result(Verdict.HEALED, f"works; what is recorded is {recorded}")
            if healed := [row for row in rows if not row.sometimes]:
                return result(Verdict.HEALED, f"{healed[0].name} no longer diverges")
            return result(Verdict.AGREE, "")
        for row in rows:
            if row.explains(case, found):
                return result(Verdict.KNOWN, f"{row.name}: {found.summary()}")
        if recorded:
            now = outcome(found)
            if now == recorded:
                return result(Verdict.KNOWN, f"{_OUTCOME}{now}")
            return result(Verdict.MISMATCH, f"{now}; what is recorded is {recorded}: {found.summary()}")
        if reason := self.limits.excuse(case, found, read):
            return result(Verdict.UNSUPPORTED, reason)
        return result(Verdict.MISMATCH, found.summary())


_OUTCOME: Final = "as recorded for this KVM, "


def outcome(difference: Difference) -> str:
    """How a Case ended that should have ended otherwise: the kind, and the wrong values if that is all."""
    got = difference.got
    if got is None:
        return "no exit"
    vector = delivered_vector(got)
    if vector is not None and vector != delivered_vector(difference.expected):
        return VECTORS.get(vector, f"exception {vector}")
    if difference.exits_differ:
        return {"shutdown": "shutdown", "internal-error": "emulation failure", "timeout": "hang"}.get(
            got.exit.kind, f"wrong exit: {got.exit}"
        )
    wrong = [f"{d.name}={d.got:#x}" for d in difference.registers]
    wrong += [f"memory {m.gpa:#x}={m.got.hex()}" for m in difference.memory]
    return f"wrong value: {' '.join(wrong)}"


class Runner:
    """Runs Cases on this machine's KVM and judges them at once. ``known`` are the divergences expected of it."""

    def __init__(self, machine: KvmMachine, host: Host, known: Sequence[KnownDivergence] = ()) -> None:
        self.machine, self.host = machine, host
        self._judge = Judge(host, known)

    def run(self, case: Case, expected: Machine) -> Result:
        """Run ``case`` in lockstep with ``expected`` and judge the outcome. Errors of ``expected`` pass through."""
        skipped = self._judge.skip(case)
        if skipped is not None:
            return skipped
        return self._judge.judge(case, execute(case, expected, self.machine), self.machine.read)
