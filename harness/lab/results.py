"""What a cell of the lab came to: its journal, the files of what failed, and what is told of it as it comes."""

from __future__ import annotations

import json
import shlex
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from harness.case import Case
from harness.journal import Journal
from harness.judge import Result
from harness.judge import outcome as ending
from harness.lab.cache import Progress
from harness.lab.plan import Plan
from harness.lab.profile import refused_instruction
from harness.lab.session import Cell, reader
from harness.lockstep import Difference
from harness.report.emit_c import EmitError, emit_c
from harness.report.failure import failure_text
from harness.report.views import CASES_FOLDER
from harness.verdict import Verdict, exit_status

EVEX_OPERANDS: Final = "apx_evex/"
EGPR_OPERANDS: Final = ("apx/", EVEX_OPERANDS)
"""Cases in which R16-R31 are operands: of what KVM emulates, too. What today's KVM does there stands in the profile."""
_SHOWN: Final = 5  # failures told in full on the terminal; all are in the journal


@dataclass
class CellOutcome:
    """What a cell came to. ``problem`` is why it did not end, "" when it did."""

    cell: str
    folder: Path
    records: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    first_result: float = 0.0
    rate: float = 0.0
    problem: str = ""
    began: float = field(default_factory=time.monotonic, compare=False)

    @property
    def status(self) -> int:
        """The exit status of this cell alone."""
        verdicts = [Verdict(r["verdict"]) for r in self.records]
        return exit_status([*verdicts, Verdict.LOST] if self.problem else verdicts)

    def row(self) -> list[str]:
        """For the table of cells."""
        count = Counter(r["verdict"] for r in self.records)
        checks = sum(r["checks"] for r in self.records)
        bad = sum(count[v.value] for v in Verdict if v.status == 1)
        told = ", ".join(f"{count[v.value]} {v.value}" for v in Verdict if count[v.value] and v is not Verdict.AGREE)
        ending = "lost" if self.problem else "bad" if bad else "good" if self.status == 0 else "nothing ran"
        return [self.cell, ending, f"{len(self.records)}", f"{checks}", told or "-", f"{self.seconds:.1f} s"]


class CellResults:
    """Takes the results of one cell and keeps them in its folder: a journal, and a file for each Case that failed.

    ``header`` is the journal's first line, ``say`` is told of the first failures in full. One result at a time.
    """

    def __init__(
        self, cell: Cell, outcome: CellOutcome, plan: Plan, header: Mapping[str, Any], say: Progress
    ) -> None:
        self.outcome = outcome
        self.host = str(header["host"])
        self.journal = Journal(outcome.folder, header)
        self.failed: list[tuple[Case, Difference, Path]] = []
        """Failures that have a C reproducer, the file."""
        self.refused: set[str] = set()
        """Instructions that KVM's emulator was seen to lack."""
        self.endings: dict[str, str] = {}
        """How Cases with R16-R31 as operands differed, by name."""
        self._cell, self._plan, self._say = cell, plan, say
        self._again = str(header["again"])
        self._shown = 0

    def take(self, result: Result, allowed: int = 0) -> None:
        """A Case's result, or one of the kernel as a whole. ``allowed``: of how many answers the model allows it is."""
        if not result.id:
            self.take_whole(result)
            return
        self._record({**result.to_json(), **({"allowed": allowed} if allowed else {})})
        if result.verdict.status == 1:
            self._take_failure(result)

    def take_whole(self, result: Result) -> None:
        """What was found of the kernel as a whole, as a record like any Case's."""
        self._record(dict(result.to_json()))
        self._say(f"{result.verdict.value}: {result.summary}")

    def finish(self, *, enough: bool = False) -> None:
        """The cell came to its end, or had ``enough`` failures."""
        seconds = round(time.monotonic() - self.outcome.began, 1)
        self.journal.append({"finished": True, "enough": enough, "seconds": seconds})

    def _record(self, record: dict[str, Any]) -> None:
        self.outcome.records.append(record)
        self.journal.append(record)

    def _take_failure(self, result: Result) -> None:
        case, _ = self._plan.planned(self._plan.names.index(result.name))
        file = self.outcome.folder / CASES_FOLDER / f"{case.id}.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(case.to_json()))
        self._shown += 1
        shown = self._shown <= _SHOWN
        text, difference = result.summary, result.difference
        if difference is not None:
            self._note(case, difference)
            if shown:
                text = failure_text(case, difference, self.host, f"{self._again} {shlex.quote(case.name)}")
                self._write_reproducer(case, difference, file)
        if shown:
            self._say(f"{result.verdict.value}: {result.name}\n{text}\n  case file: {file}")

    def _note(self, case: Case, difference: Difference) -> None:
        """What a profile would say of it."""
        if case.name.startswith(EGPR_OPERANDS):
            self.endings[case.name] = ending(difference)
        else:
            self.refused.add(refused_instruction(case, difference, reader(case, difference)))

    def _write_reproducer(self, case: Case, difference: Difference, file: Path) -> None:
        source = file.with_suffix(".c")
        with suppress(EmitError):
            source.write_text(emit_c(case, difference, self.host, self._cell.example(case.name)))
            self.failed.append((case, difference, source))


def regressed(what: str, summary: str) -> Result:
    """Something that the checked-in profile has is gone."""
    return Result(f"profile/{what.replace(' ', '-')}", "", Verdict.REGRESSED, 1, summary)
