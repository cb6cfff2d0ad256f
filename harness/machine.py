"""Machine: runs a Case up to its next exit and shows its registers. Recording is one that replays what another showed.

KVM's machine is harness/kvm_machine.py, the reference model's harness/reference/machine.py; every feature of the
harness is two machines side by side in harness/lockstep.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final, Protocol

from harness.case import Action, Case, Observation, Pages
from harness.memory_diff import MemoryDiff

Sections = tuple[str, ...]


class Machine(Protocol):
    """What runs a Case. ``apply`` shows one Observation per exit, in order; a caller may stop taking them."""

    def load(self, case: Case) -> None:
        """Make the machine what the Case says, at its start state."""

    def apply(self, action: Action) -> Iterable[Observation]:
        """Do one action."""


class ComparableMachine(Machine, Protocol):
    """A machine whose RAM can be compared while it stands at an exit (the right-hand side of a lockstep)."""

    def memory_diff(self, pages: Pages, ignore: Mapping[int, int]) -> list[MemoryDiff]:
        """Where RAM differs from the Case's initial contents overlaid with ``pages``."""


class Recording:
    """A machine that shows what was recorded: Observations per action, in order."""

    def __init__(self, steps: Sequence[Sequence[Observation]]) -> None:
        self._steps = steps
        self._next = 0

    def load(self, case: Case) -> None:
        """Rewind. ValueError when the recording is not of this Case's shape."""
        if len(self._steps) != len(case.actions):
            raise ValueError(f"recording of {len(self._steps)} actions, the case has {len(case.actions)}")
        self._next = 0

    def apply(self, action: Action) -> Iterable[Observation]:
        """What was seen at this action."""
        self._next += 1
        return self._steps[self._next - 1]


def record(machine: Machine, case: Case) -> list[list[Observation]]:
    """Run a whole Case and keep what it shows."""
    machine.load(case)
    return [list(machine.apply(action)) for action in case.actions]


def case_sections(case: Case) -> Sections:
    """The sections that make up the visible state of a Case; the same on every machine."""
    return _CASE_SECTIONS[bool(case.start.msrs), "apx" in case.requires]


_ALWAYS: Final = ("regs", "sregs2", "events", "debugregs", "xcr0")
_CASE_SECTIONS: Final[Mapping[tuple[bool, bool], Sections]] = {
    (msrs, egpr): (*_ALWAYS, *(("msrs",) if msrs else ()), *(("egpr",) if egpr else ()))
    for msrs in (False, True)
    for egpr in (False, True)
}
