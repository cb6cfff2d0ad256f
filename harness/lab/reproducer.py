"""C reproducers of what failed in a cell, without the RAM that is not needed, where that shows the same there."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from harness.case import Case
from harness.judge import Result
from harness.lab.cache import Progress
from harness.lab.errors import LabError
from harness.lab.plan import read_plan, write_plan
from harness.lab.profile import Profile
from harness.lab.session import Cell, CellRun
from harness.lockstep import Difference
from harness.report.emit_c import EmitError, emit_c
from harness.report.reduce import same_difference, thinned

FOLDER: Final = "reduced"
"""In a cell's folder: the console of the machine that ran the reduced Cases."""
_DEADLINE: Final = 300.0  # seconds


def reduce_reproducers(
    cell: Cell,
    profile: Profile,
    failed: Sequence[tuple[Case, Difference, Path]],
    host: str,
    folder: Path,
    progress: Progress,
) -> None:
    """Rewrite the C reproducers of Cases that differed: (Case, what differed, file); ``host`` is named in them.

    The Case itself is in a .json file beside each.

    The model takes RAM away; then the cell's kernel runs what is left, once, all Cases in one boot. A file whose Case
    does not show the same difference stays as it is, all of them if the machine is lost.
    """
    small = {case.name: thin for case, difference, _ in failed if (thin := thinned(case, difference)) is not None}
    if not small:
        return
    found: dict[str, Difference | None] = {}

    def take(result: Result, allowed: int) -> None:
        found[result.name] = result.difference

    where = folder / FOLDER
    where.mkdir(exist_ok=True)
    path = where / "plan"
    try:
        write_plan(path, "", list(small.values()))
        run = CellRun(cell, read_plan(path), profile, where, take, machines=1, deadline=_DEADLINE, progress=progress)
        run.run(range(len(small)))
    except LabError as error:
        progress(f"{cell.name}: reproducers are not reduced: {error}")
    finally:
        path.unlink(missing_ok=True)
    for case, difference, file in failed:
        now = found.get(case.name)
        if now is not None and same_difference(difference, now):
            with suppress(EmitError):
                file.write_text(emit_c(small[case.name], now, host, cell.example(case.name)))
