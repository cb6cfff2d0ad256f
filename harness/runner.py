"""The thin executor: runs a Case against what is expected of it and judges. No pytest, no model."""

from __future__ import annotations

import errno
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from harness.case import Case
from harness.host import Host
from harness.known import KnownDivergence
from harness.kvm_ioctl import KvmError
from harness.lockstep import Difference, lockstep
from harness.machine import KvmMachine, Machine
from harness.verdict import Verdict


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
        """The journal's line."""
        return {
            "case": self.name, "id": self.id, "verdict": self.verdict.value, "checks": self.checks,
            "summary": self.summary, "seconds": round(self.seconds, 6),
        }  # fmt: skip


class Runner:
    """Runs Cases on one KVM. ``known`` are the divergences that are expected of it."""

    def __init__(self, machine: KvmMachine, host: Host, known: Sequence[KnownDivergence] = ()) -> None:
        self.machine, self.host = machine, host
        self._known = known

    def run(self, case: Case, expected: Machine) -> Result:
        """Run ``case`` in lockstep with ``expected`` and judge the outcome. Errors of ``expected`` pass through."""
        began = time.perf_counter()

        def result(verdict: Verdict, checks: int, summary: str, difference: Difference | None = None) -> Result:
            return Result(case.name, case.id, verdict, checks, summary, time.perf_counter() - began, difference)

        if reason := self.host.unsupported(case):
            return result(Verdict.UNSUPPORTED, 0, reason)
        try:
            outcome = lockstep(case, expected, self.machine)
        except KvmError as error:
            if error.errno == errno.EIO:
                return result(Verdict.SPLAT, 0, f"the kernel killed the VM: {error}")
            return result(Verdict.MISMATCH, 0, f"start state refused: {error}")
        except LookupError as error:
            return result(Verdict.MISMATCH, 0, f"start state refused: {error}")
        rows = [row for row in self._known if row.covers(case.name, self.host.module)]
        found = outcome.difference
        if found is None:
            if rows:
                return result(Verdict.HEALED, outcome.checks, f"{rows[0].name} no longer diverges")
            return result(Verdict.AGREE, outcome.checks, "")
        for row in rows:
            if row.explains(case, found):
                return result(Verdict.KNOWN, outcome.checks, f"{row.name}: {found.summary()}", found)
        if reason := self.host.excuse(case, found, self.machine):
            return result(Verdict.UNSUPPORTED, outcome.checks, reason, found)
        return result(Verdict.MISMATCH, outcome.checks, found.summary(), found)
