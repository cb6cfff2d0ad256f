"""The words of a series' verdicts that every view of it uses."""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from harness.report.views import CASES_FOLDER
from harness.series.behaviour import Change, change_text, worst_first
from harness.series.verdict import CellReport, Outcome, PatchReport, SeriesReport
from harness.words import counted

_MOST: Final = 6
SUBJECT: Final = 44

AGAIN: Final = "again:"
"""Labels a command."""
SMOKE: Final = "it runs each access path once, in one mode; by default all Cases run where changed code is reached"
"""What a good verdict by the smoke tier alone lacks."""
HEADS: Final = ("#", "patch", "verdict", "builds", "code")
TAILS: Final = ("reached", "behaviour", "layout")


def row(patch: PatchReport, cells: Sequence[str]) -> list[str]:
    """A patch in the table of patches by cells."""
    by_name = {cell.cell: cell for cell in patch.cells}
    return [
        f"{patch.number}", short(patch.commit.subject), outcome(patch), builds(patch),
        code(patch), *(cell_words(by_name.get(name)) for name in cells), reached(patch), patch.behaviour,
        layout(patch),
    ]  # fmt: skip


def parts(patch: PatchReport) -> list[str]:
    """``builds 12 s``, ``code 1 function``, ``svm full: agree``, ``reached 1/1``, ``behaviour same``, ``layout ok``."""
    words = [f"builds {builds(patch)}", f"code {code(patch)}"]
    words += [f"{cell.cell} {cell_words(cell)}" for cell in patch.cells if cell_words(cell) != "-"]
    words += [f"reached {reached(patch)}"] if reached(patch) != "-" else []
    return [*words, f"behaviour {patch.behaviour}", f"layout {layout(patch)}"]


def overview(patch: PatchReport, width: int) -> Iterator[str]:
    """A patch in a few lines of so many characters: verdict and subject, what it does not rest on, its parts."""
    yield first_line(patch.number, patch.outcome.value, patch.commit.subject, width)
    if lacking := unexecuted(patch):
        yield from textwrap.wrap(f"but {lacking}", width, initial_indent=" " * 5, subsequent_indent=" " * 5)
    yield from (f"     {line}" for line in joined(parts(patch), width - 7))


def first_line(number: int, word: str, subject: str, width: int) -> str:
    """``  3  good             KVM: x86: ...``: how a patch begins in a list."""
    return f"{number:3d}  {word:16s} {short(subject, max(width - 24, 3))}"


def joined(words: Sequence[str], width: int) -> list[str]:
    """Words with dots between them, in lines of so many characters that break at dots only."""
    lines = [""]
    for word in words:
        if lines[-1] and len(lines[-1]) + 3 + len(word) > width:
            lines[-1] += " ·"
            lines.append("")
        lines[-1] += f" · {word}" if lines[-1] else word
    return lines


def layout(patch: PatchReport) -> str:
    """What became of the layout of registers; a dash where nothing was built."""
    return patch.layout.brief if patch.builds and all(b.good for b in patch.builds) else "-"


def short(subject: str, room: int = SUBJECT) -> str:
    """A subject in as many characters as there is room for; in a table not more than 44."""
    return subject if len(subject) <= room else f"{subject[: room - 3].rstrip()}..."


def builds(patch: PatchReport) -> str:
    """``12 s`` or ``no``."""
    bad = [b for b in patch.builds if not b.good]
    return "no" if bad or not patch.builds else f"{sum(b.seconds for b in patch.builds):.0f} s"


def code(patch: PatchReport) -> str:
    """What became of the machine code."""
    changed = [b.code for b in patch.builds if b.code is not None and not b.code.identical]
    if changed:
        return changed[0].brief
    return "identical" if patch.identical else "-"


def cell_words(cell: CellReport | None) -> str:
    """``full: agree``; a dash for a cell that had nothing to do."""
    if cell is None:
        return "-"
    if not cell.tier:
        return "lost" if cell.problem else f"({len(cell.inherited)} inherited)" if cell.inherited else "-"
    return f"{cell.tier}: {cell.brief}"


def reached(patch: PatchReport) -> str:
    """``3/4``: functions executed, of those that changed; ``?/4`` where nothing is known of any."""
    found = patch.reached
    total = len(found.executed) + len(found.never) + len(found.unknown)
    count = str(len(found.executed)) if found.executed or found.never else "?"
    return f"{count}/{total}" if total else "-"


def verdict(patch: PatchReport) -> str:
    """The outcome with all that qualifies it: what is inherited, and what no Case has executed."""
    lacking = unexecuted(patch)
    return f"{outcome(patch)}, but {lacking}" if lacking else outcome(patch)


def unexecuted(patch: PatchReport) -> str:
    """What a good verdict does not rest on, in words: changed functions that no Case has executed; empty if all were.

    Empty for every other outcome, too: no more is claimed there than what was seen.
    """
    found = patch.reached
    total = len(found.executed) + len(found.never) + len(found.unknown)
    left = total - len(found.executed)
    if patch.outcome is not Outcome.GOOD or not left:
        return ""
    if left == total:
        known = "is known to have been" if found.unknown else "was"
        return f"nothing of what it changed {known} executed"
    known = "are not known to have been" if found.unknown else "were not" if left > 1 else "was not"
    return f"{left} of {total} functions that it changed {known} executed"


def outcome(patch: PatchReport) -> str:
    """The outcome, with what is inherited."""
    before = ", ".join(f"{'BASE' if not n else f'#{n}'}" for n in sorted(patch.inherited))
    return f"{patch.outcome.value} (failures of {before} stay)" if before else patch.outcome.value


def evidence(patch: PatchReport) -> Iterator[str]:
    """What shows the first bad patch to be bad: Case, values, command, reproducer."""
    for build in patch.builds:
        if not build.good:
            yield from (f"  {line}" for line in build.errors)
            yield f"  all of the build's output: {build.log}"
    for cell in patch.cells:
        for change in list(worst_first(cell.failures or (cell.others if patch.outcome is Outcome.UNTRUE else [])))[:1]:
            yield f"  {cell.cell}: {change.name}: {change_text(change)}"
            yield from (f"    {line}" for line in how_to_see(cell, change))


def how_to_see(cell: CellReport, change: Change) -> list[str]:
    """The command that runs a failing Case again, and its files."""
    case = Path(cell.folder) / CASES_FOLDER / f"{change.after['id']}.json"
    lines = []
    if change.after["id"]:
        command = shlex.quote(change.name).join(cell.command.rsplit("{}", 1))  # a path may hold braces, too
        lines.append(f"{AGAIN}      {command}")
    if case.exists():
        lines.append(f"case:       {case}")
    if case.with_suffix(".c").exists():
        lines.append(f"reproducer: {case.with_suffix('.c')}")
    return lines


def ran(cell: CellReport, form: str = "d") -> str:
    """``full: 2 mismatch, 9 agree; 11 checks, 3 s``; how far it came if it ended early; ``form``: of numbers."""
    if not cell.tier:
        return "not run"
    counts = ", ".join(f"{n:{form}} {v}" for v, n in cell.counts.items())
    text = f"{cell.tier}: {counts}; {counted(cell.checks, 'check', form=form)}, {cell.seconds:.0f} s"
    return f"{text}; {cell.extent}: enough of them had failed" if cell.extent else text


def inherited(cell: CellReport) -> str:
    """Whose failures a cell still shows."""
    origins = sorted(set(cell.inherited.values()))
    whose = ", ".join("BASE" if not n else f"patch {n}" for n in origins)
    count = len(cell.inherited)
    return f"{counted(count, 'failure')} as {whose} brought {'them' if count > 1 else 'it'}"


def base_lines(report: SeriesReport) -> Iterator[str]:
    for cell, failures in report.base_failures.items():
        yield f"BASE fails by itself in {cell}: {counted(len(failures), 'case')}, which no patch is blamed for:"
        for name, record in list(failures.items())[:_MOST]:
            yield f"  {record['verdict']}: {name}: {record['summary']}"
        if len(failures) > _MOST:
            yield f"  ... and {len(failures) - _MOST} more"
    for cell, flaky in report.quarantined.items():
        yield f"quarantined in {cell}, since BASE did not show the same twice:"
        for name, (one, two) in flaky.items():
            yield f"  {name}: {one} | {two}"
