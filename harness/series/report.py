"""A series as text for a mail, as KTAP and as JSON. (harness/series/page.py makes the page.)"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from harness.series import brief
from harness.series.behaviour import change_text, worst_first
from harness.series.coverage import reached_lines
from harness.series.page import page
from harness.series.state import write, write_text
from harness.series.verdict import FORMAT, Outcome, PatchReport, SeriesReport
from harness.words import counted

WIDTH: Final = 75  # of a mail, so that it can be quoted
_LABEL: Final = re.compile(r"\s*(?:[\w-]+: +)?")
_DEEPEST: Final = 20  # columns that continued lines are indented by at most
_WORD: Final = re.compile(r"""(?:'[^']*'|"[^"]*"|[^ '"]|['"])+?(?= |$)""")  # of a command for a shell
_MOST: Final = 6  # Cases told of one cell; all are in the JSON
_MOST_LINES: Final = 24  # of what code changed, or of a compiler's words


def write_reports(folder: Path, report: SeriesReport) -> None:
    """Every view of what is known so far, into the series' folder. LabError when the disk is full."""
    write_text(folder / "report.txt", text_report(report))
    write_text(folder / "report.ktap", ktap_report(report))
    write_text(folder / "report.html", page(report))
    write(folder / "report.json", json_report(report))  # the last one: where it is, all are


# --- text -------------------------------------------------------------------------------------------------------------


def text_report(report: SeriesReport) -> str:
    """For a mail: the table, then what is to be said of each patch, the first bad one with all that shows it again."""
    lines = [*_head(report), "", *_overview(report), *[""] * bool(report.patches), *_conclusion(report)]
    for patch in report.patches:
        lines += ["", *patch_lines(patch, report)]
    lines += ["", *brief.base_lines(report)]
    lines.append(
        f"{report.seconds:.0f} s {'in all' if report.complete else 'up to here'}, {report.compiling:.0f} s of it "
        f"compiling; {report.host}; cells: "
        f"{', '.join(report.cells)}"
    )
    return "\n".join(text.rstrip() for line in lines for text in _wrapped(line)) + "\n"


def _wrapped(line: str) -> list[str]:
    """A line as several of a mail's width, the later ones indented; a command so that it can be pasted as it is.

    What has no blank in it, such as a path, stays whole.
    """
    if len(line) <= WIDTH:
        return [line]
    label = _LABEL.match(line)
    assert label is not None  # it matches anything
    room = len(label[0]) if 0 < len(label[0]) <= _DEEPEST else 2
    if not label[0].strip().startswith(brief.AGAIN):
        return textwrap.wrap(line, WIDTH, subsequent_indent=" " * room, break_long_words=False, break_on_hyphens=False)
    lines, now = [], label[0]
    for word in _WORD.findall(line[len(label[0]) :]):
        if now.strip() and now != label[0] and len(now) + len(word) + 2 > WIDTH:
            lines.append(f"{now}\\")
            now = " " * room
        now += f"{word} "
    return [*lines, now]


def _head(report: SeriesReport) -> list[str]:
    return [f"kvm-harness series {report.title}", f"BASE is {report.base}"]


def _overview(report: SeriesReport) -> Iterator[str]:
    """A few lines a patch: a table would be too wide for a mail."""
    for patch in report.patches:
        yield from brief.overview(patch, WIDTH)


def _conclusion(report: SeriesReport) -> Iterator[str]:
    first = report.first_bad
    judged = len(report.patches)
    if first is not None:
        yield f"first bad patch: {first.number} of {report.planned}, {first.commit}: {first.outcome.value}"
        yield from brief.evidence(first)
    elif report.status:
        lost = [str(p.number) for p in report.patches if p.outcome is Outcome.LOST]
        why = f"lost: patch{'es' * (len(lost) > 1)} {', '.join(lost)}" if lost else "not every patch was judged"
        yield f"no verdict: {why}; the same command goes on with what is not finished, another --out begins anew"
    else:
        yield "the patch is good" if judged == 1 else f"all {judged} patches are good"
        for patch in report.patches:
            if lacking := brief.unexecuted(patch):
                yield f"but {lacking}" if judged == 1 else f"but of patch {patch.number}: {lacking}"
        if report.smoke:
            yield f"as far as the smoke tier tells: {brief.SMOKE}"
    if not report.complete:
        yield f"{judged} of {counted(report.planned, 'patch', 'patches')} judged so far"


def patch_lines(patch: PatchReport, report: SeriesReport) -> Iterator[str]:
    """One patch in words."""
    yield f"patch {patch.number}/{report.planned}: {patch.commit.subject}"
    yield f"  {patch.commit.id} by {patch.commit.author}"
    yield f"  verdict:   {brief.verdict(patch)}"
    for build in patch.builds:
        if build.good:
            yield f"  builds:    yes ({build.flavour}, {build.seconds:.0f} s)"
        else:
            yield f"  builds:    no ({build.flavour}); the compiler says:"
            yield from (f"    {line}" for line in build.errors[:_MOST_LINES])
        if build.code is not None:
            yield from (f"  {line}" for line in _first([*build.code.text], _MOST_LINES))
            if build.code.against:
                yield f"  (compared with {build.code.against}, the last one that built)"
    yield from _cell_lines(patch)
    if any(b.good and b.code is not None and not b.code.identical for b in patch.builds):
        yield from _labelled("reached", reached_lines(patch.reached))
    claims = "; the message says no functional change" if patch.commit.claims_no_change else ""
    yield f"  behaviour: {patch.behaviour}{claims}"
    for line in patch.layout.changed if patch.layout.good else patch.layout.text:
        yield f"  layout:    {line}"


def _cell_lines(patch: PatchReport) -> Iterator[str]:
    for cell in patch.cells:
        if cell.tier or cell.problem:
            yield f"  {cell.cell + ':':10s} {brief.ran(cell)}"
        if cell.problem:
            yield f"    lost: {cell.problem}"
        mended = [c for c in cell.others if c.mended]
        changed = [c for c in cell.others if not c.mended]
        for kind, changes in (("", cell.failures), ("mended: ", mended), ("changed: ", changed)):
            shown = list(worst_first(changes))
            for change in shown[:_MOST]:
                yield f"    {kind}{change.name}: {change_text(change)}"
            if len(shown) > _MOST:
                yield f"    {kind}... and {len(shown) - _MOST} more"
        if cell.inherited:
            yield f"    {brief.inherited(cell)}"
        if cell.quarantined:
            yield from _labelled("  quarantined (flaky)", [", ".join(cell.quarantined)])


def _labelled(label: str, lines: Sequence[str]) -> Iterator[str]:
    for line in lines:
        wrapped = textwrap.wrap(line, WIDTH - 13, break_long_words=False, break_on_hyphens=False)
        for text in wrapped:
            yield f"  {label + ':' if label else '':10s} {text}"
            label = ""


def _first(lines: list[str], most: int) -> list[str]:
    return lines if len(lines) <= most else [*lines[:most], f"  ... and {counted(len(lines) - most, 'more line')}"]


# --- KTAP -------------------------------------------------------------------------------------------------------------


def ktap_report(report: SeriesReport) -> str:
    """The kernel's test format: a test for each patch, a subtest for each part of its verdict.

    A patch is ``ok`` just where all its parts are.
    """
    lines = ["KTAP version 1", f"# {report.title}, BASE {report.base}", f"1..{report.planned}"]
    for patch in report.patches:
        tests = list(_ktap_tests(patch))
        lines += ["  KTAP version 1", f"  # Subtest: {_ktap(patch.commit.subject)}", f"  1..{len(tests)}"]
        for number, (good, name, note, diagnosis) in enumerate(tests, 1):
            lines += [f"  # {_line(text)}" for text in diagnosis]
            lines.append(f"  {'ok' if good else 'not ok'} {number} {_ktap(name)}" + (f" # {note}" if note else ""))
        good = patch.outcome is Outcome.GOOD
        note = " # ERROR lost" if patch.outcome is Outcome.LOST else ""
        name = f"{patch.commit.short} {_ktap(patch.commit.subject)}"
        lines += [] if good else [f"# {_line(brief.verdict(patch))}"]
        lines.append(f"{'ok' if good else 'not ok'} {patch.number} {name}{note}")
    lines += [f"not ok {n} # ERROR not judged" for n in range(len(report.patches) + 1, report.planned + 1)]
    return "\n".join(lines) + "\n"


_KtapTest = tuple[bool, str, str, Sequence[str]]  # ok, name, directive, diagnosis


def _ktap_tests(patch: PatchReport) -> Iterator[_KtapTest]:
    for build in patch.builds:
        yield build.good, f"builds {build.flavour}", "", build.errors
    for cell in patch.cells:
        what = [f"{c.name}: {change_text(c)}" for c in worst_first(cell.failures)][:_MOST]
        said = [*what, *filter(None, [cell.problem])] + ([brief.inherited(cell)] if cell.inherited else [])
        good = not cell.failures and not cell.problem
        if cell.tier:
            yield good, f"{cell.cell} {cell.tier}", "ERROR lost" if cell.problem and not what else "", said
        else:
            skipped = "SKIP identical code" if patch.identical else "SKIP not run"
            yield good, cell.cell, "ERROR lost" if cell.problem else skipped, said
    yield from _ktap_reached(patch)
    yield _ktap_behaviour(patch)
    layout = brief.layout(patch)
    skipped = {"-": "SKIP nothing was built", "n/a": "SKIP the kernel does not tell"}.get(layout, "")
    yield patch.layout.good, "layout", skipped if patch.layout.good else "", (
        patch.layout.changed if patch.layout.good else patch.layout.text
    )


def _ktap_reached(patch: PatchReport) -> Iterator[_KtapTest]:
    """What was not executed makes no patch bad."""
    if brief.reached(patch) != "-":
        seen = "not known whether" if patch.reached.unknown else "nothing of"
        nothing = "" if patch.reached.executed else f"SKIP {seen} what it changed was executed"
        yield True, "reached", nothing, reached_lines(patch.reached)


def _ktap_behaviour(patch: PatchReport) -> _KtapTest:
    looked = any(cell.tier and (cell.failures or not cell.problem) for cell in patch.cells)
    if not looked and not patch.changed:
        return True, "behaviour", "SKIP identical code" if patch.identical else "SKIP not run", ()
    untrue = patch.commit.claims_no_change and patch.changed > 0
    good = not untrue and not any(cell.failures for cell in patch.cells)
    said = [patch.behaviour, *(["the message says no functional change"] if untrue else [])]
    others = [f"{c.name}: {change_text(c)}" for cell in patch.cells for c in cell.others]
    return good, "behaviour", "", [*said, *others[:_MOST]]


def _ktap(text: str) -> str:
    """For a test's name, where a # begins a directive."""
    return _line(text).replace("#", ".")


def _line(text: str) -> str:
    return " ".join(text.split())


# --- JSON -------------------------------------------------------------------------------------------------------------


def json_report(report: SeriesReport) -> dict[str, Any]:
    """Everything, for programs."""
    first = report.first_bad
    return {
        "kvm-harness-series": FORMAT, "title": report.title, "base": report.base.id, "cells": list(report.cells),
        "status": report.status, "complete": report.complete, "planned": report.planned,
        "first bad": first.commit.id if first is not None else None,
        "patches": [p.to_json() for p in report.patches],
        "quarantined": {cell: {n: list(t) for n, t in found.items()} for cell, found in report.quarantined.items()},
        "base failures": {cell: list(found.values()) for cell, found in report.base_failures.items()},
        "seconds": round(report.seconds, 1), "compiling": round(report.compiling, 1), "host": report.host,
    }  # fmt: skip


