"""The thin executor: runs a Case beside what is expected of it, on the KVM at hand. No pytest, no model, no verdict.

It is what goes into the lab, where Python is ten times slower; harness/judge.py decides, wherever Python is fast.
"""

from __future__ import annotations

import errno
import time
from dataclasses import dataclass, field

from harness.case import Case
from harness.kvm_ioctl import KvmError
from harness.kvm_machine import KvmMachine
from harness.lockstep import Difference, lockstep
from harness.machine import Machine


@dataclass(slots=True)  # not frozen: one is made for every Case, and a frozen one costs three times as much
class Finding:
    """What running one Case showed. ``refused``: KVM did not take the start state; ``killed``: it killed the VM.

    ``allowed`` is :attr:`harness.lockstep.Outcome.allowed`.
    """

    checks: int = 0
    difference: Difference | None = None
    refused: str = ""
    killed: str = ""
    allowed: int = 0
    seconds: float = field(default=0.0, compare=False)

    @property
    def clean(self) -> bool:
        """Everything agreed."""
        return self.difference is None and not self.refused and not self.killed


def execute(case: Case, expected: Machine, machine: KvmMachine) -> Finding:
    """Run ``case`` in lockstep with ``expected``. Errors of ``expected`` pass through."""
    finding = None
    try:
        finding = _execute(case, expected, machine)
    finally:
        if finding is None or not finding.clean:
            machine.distrust()
    return finding


def _execute(case: Case, expected: Machine, machine: KvmMachine) -> Finding:
    began = time.perf_counter()
    try:
        outcome = lockstep(case, expected, machine)
    except KvmError as error:
        if error.errno == errno.EIO:
            return Finding(killed=str(error), seconds=time.perf_counter() - began)
        return Finding(refused=str(error), seconds=time.perf_counter() - began)
    except LookupError as error:
        return Finding(refused=str(error), seconds=time.perf_counter() - began)
    return Finding(outcome.checks, outcome.difference, "", "", outcome.allowed, time.perf_counter() - began)
