"""In what a Case differs between two kernels: their recordings side by side, by the one comparison there is."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from harness.case import Action, Case, Observation, Pages
from harness.lab.session import Cell
from harness.lab.wire import observation_from_json
from harness.lockstep import Difference, lockstep
from harness.machine import Recording
from harness.memory_diff import MemoryDiff, byte_diff
from harness.report.emit_c import EmitError, emit_c
from harness.report.failure import failure_text
from harness.report.views import CASES_FOLDER
from harness.series.cells import CellResult, cases_of
from harness.series.verdict import CellReport

Steps = Sequence[Sequence[Observation]]


class Recorded(Recording):
    """A recording that can be judged: what a kernel showed, RAM included."""

    def __init__(self, steps: Steps) -> None:
        super().__init__(steps)
        self._case: Case | None = None
        self._seen: Observation | None = None

    def load(self, case: Case) -> None:
        """Rewind."""
        super().load(case)
        self._case = case

    def apply(self, action: Action) -> Iterable[Observation]:
        """What was seen at this action."""
        for seen in super().apply(action):
            self._seen = seen
            yield seen

    def memory_diff(self, pages: Pages, ignore: Mapping[int, int]) -> list[MemoryDiff]:
        """Where RAM, as it was seen last, differs from the Case's initial contents overlaid with ``pages``."""
        assert self._case is not None
        assert self._seen is not None
        out: list[MemoryDiff] = []
        for slot in self._case.shape.slots:
            left, right = (bytearray(self._case.memory.image(slot)) for _ in range(2))
            for image, overlay in ((left, pages), (right, self._seen.pages)):
                for gpa, data in overlay.items():
                    if slot.gpa <= gpa < slot.gpa + slot.size:
                        image[gpa - slot.gpa : gpa - slot.gpa + len(data)] = data
            out += byte_diff(slot.gpa, bytes(left), bytes(right), ignore)
        return out


def steps_from_json(body: Iterable[Iterable[dict[str, Any]]]) -> Steps:
    """What the runner inside recorded (harness/lab/wire.py)."""
    return [[seen for text in action if (seen := observation_from_json(text)) is not None] for action in body]


def difference(case: Case, before: Steps, after: Steps) -> Difference | None:
    """The first exit at which two kernels differ. None where only what no program can see does."""
    return lockstep(case, Recording(before), Recorded(after)).difference


_BACK = "as on BASE again"
_UNSEEN = "the same to every program; only the contents of what cannot be used differ"


def explained(report: CellReport, cell: Cell, base: CellResult, patched: CellResult) -> CellReport:
    """The report with what is behind behaviour that the model allows: what BASE showed, what this kernel shows.

    Each such Case is kept beside those that failed, with a C reproducer that expects BASE's values.
    """
    wanted = {c.name for c in report.others if c.name in base.recorded and c.name in patched.recorded}
    cases = cases_of(cell, report.tier, wanted) if wanted else {}
    host = f"Linux {cell.kernel.release} in {cell.emulator.name} ({cell.accel})"
    changes = []
    for change in report.changes:
        case = cases.get(change.name)
        if case is None or change.fails:
            changes.append(change)
            continue
        before, after = (steps_from_json(result.recorded[change.name]) for result in (base, patched))
        found = difference(case, before, after)
        if found is not None:
            _keep(case, found, Path(report.folder), host, cell.example(case.name))
            why = found.summary().replace("expected ", "BASE showed ", 1).replace("got ", "now ", 1)
        else:
            why = _UNSEEN if base.recorded[change.name] != patched.recorded[change.name] else _BACK
        changes.append(replace(change, why=why))
    return replace(report, changes=tuple(changes))


def _keep(case: Case, found: Difference, folder: Path, host: str, again: str) -> None:
    kept = folder / CASES_FOLDER / f"{case.id}.json"
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps(case.to_json()))
    kept.with_suffix(".txt").write_text(failure_text(case, found, host, again) + "\n")
    with suppress(EmitError):
        kept.with_suffix(".c").write_text(emit_c(case, found, host, again))
