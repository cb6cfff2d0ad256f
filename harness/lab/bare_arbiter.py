"""The arbiter: whose defect is a difference, KVM's or that of the emulator under it?

A Case that differs on KVM in the lab runs once more on the emulator alone. If it differs there in the same way, the
emulator is to blame: the verdict is *suspect*. Defects that are known are listed in ``ci/qemu/bare/defects.toml``.
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Final

from harness.case import Case, Run, Step
from harness.exits import Timeout
from harness.lab.bare_emulator import BareEmulator
from harness.lab.errors import LabError
from harness.lockstep import Difference, exit_text, lockstep
from harness.machine import Machine

FILE: Final = Path(__file__).resolve().parents[2] / "ci" / "qemu" / "bare" / "defects.toml"
_KEYS: Final = {"name", "cases", "why", "reference"}
_FORCED: Final = "fep"  # needs KVM's force-emulation prefix, which means nothing without KVM


@dataclass(frozen=True)
class Defect:
    """A listed defect of the emulator. ``cases`` are patterns of the names of Cases that show it."""

    name: str
    cases: tuple[str, ...]
    why: str
    reference: str

    def covers(self, case_name: str) -> bool:
        """This row speaks of this Case."""
        return any(fnmatchcase(case_name, pattern) for pattern in self.cases)


def load_defects(path: Path = FILE) -> tuple[Defect, ...]:
    """Read the file. LabError says which row is wrong and how."""
    try:
        rows = tomllib.loads(path.read_text()).get("defect", [])
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise LabError(f"{path}: {error}") from error
    for n, row in enumerate(rows):
        if set(row) != _KEYS:
            raise LabError(f"{path}: defect {n + 1}: missing or unknown: {', '.join(sorted(set(row) ^ _KEYS))}")
    return tuple(Defect(**{**row, "cases": tuple(row["cases"])}) for row in rows)


def same_way(left: Difference, right: Difference) -> bool:
    """Two machines differ from what must be in the same way: the same exit, register values and bytes of RAM.

    Where both have the wrong exit, that is all there is to compare. How many exits came before does not count: KVM may
    report several items of port I/O in one.
    """
    if exit_text(left.got) != exit_text(right.got) and not (_hangs(left) and _hangs(right)):
        return False
    if left.exits_differ or right.exits_differ:
        return left.exits_differ and right.exits_differ
    # Only what they show: what must be there has undefined bits, which follow what was seen.
    return left.registers == right.registers and _shown(left) == _shown(right)


def _shown(found: Difference) -> list[tuple[int, bytes]]:
    return [(run.gpa, run.got) for run in found.memory]


def _hangs(found: Difference) -> bool:
    """It does not come to an exit, whatever the time limit was."""
    return found.got is not None and isinstance(found.got.exit, Timeout)


class Arbiter:
    """Asks the emulator. ``expected`` is what the Cases were compared with on KVM."""

    def __init__(self, emulator: BareEmulator, expected: Machine, defects: Sequence[Defect] | None = None) -> None:
        self.emulator, self.expected = emulator, expected
        self.defects = load_defects() if defects is None else tuple(defects)

    def suspect(self, case: Case, difference: Difference) -> str:
        """Why ``difference``, found on KVM, is the emulator's defect; empty when it is not, or cannot be told.

        Errors of ``expected`` pass through; LostError when the emulator dies.
        """
        if _FORCED in case.requires or self.emulator.lacking(case.profile) or not self.emulator.can(case):
            return ""
        if not all(isinstance(a, Step) or (isinstance(a, Run) and a.complete) for a in case.actions):
            return ""  # what userspace does to a vCPU is KVM's own affair: the bare machine only imitates it
        found = lockstep(case, self.expected, self.emulator).difference
        if found is None or not same_way(difference, found):
            return ""
        listed = next((row for row in self.defects if row.covers(case.name)), None)
        if listed is None:
            return f"the emulator alone does the same, for a reason not yet listed in {FILE.name}: {found.summary()}"
        return f"the emulator alone does the same: {listed.name}: {listed.why}"
