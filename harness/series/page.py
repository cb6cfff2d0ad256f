"""A series as one self-contained page: patches by configurations, and behind each patch what its verdict rests on."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Final

from harness.report.html import STYLE
from harness.report.views import CASES_FOLDER
from harness.series import brief
from harness.series.behaviour import Change, change_text, worst_first
from harness.series.coverage import reached_lines
from harness.series.verdict import CellReport, Outcome, PatchReport, SeriesReport
from harness.words import counted

_DEEP: Final = " " * 4  # how the lines below a Case are indented in brief.evidence()
_MOST: Final = 40  # Cases shown of one cell
_COLOUR: Final = {
    Outcome.BAD: "bad", Outcome.UNBUILDABLE: "bad", Outcome.UNTRUE: "bad", Outcome.LOST: "note", Outcome.GOOD: "good",
}  # fmt: skip
_OPTION: Final = re.compile(r"(?<!\S)--?\w[\w-]*")
_MORE: Final = """
body { max-width: 92rem; }
.patches th { white-space: nowrap; } .patches .subject { min-width: 14rem; }
.patches td:nth-child(3) { min-width: 6rem; }
.banner code { display: block; padding-left: 1rem; white-space: pre-wrap; }
.banner code.deep { padding-left: 2.5rem; opacity: .8; }
.banner code:not(.deep) { margin-top: .4rem; }
.whole { white-space: nowrap; }
.patches td.num { width: 1%; } td a { color: inherit; }
section { border-top: 1px solid var(--line); margin-top: 1.6rem; } section h2 { margin-top: 1rem; }
pre { overflow-x: auto; background: var(--band); padding: .6rem .8rem; margin: .4rem 0;
  font: 13px/1.4 ui-monospace, "DejaVu Sans Mono", monospace; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1rem; margin: .6rem 0; }
dt { color: var(--soft); } dd { margin: 0; min-width: 0; } ul { margin: .2rem 0; padding-left: 1.2rem; }
.pill { border-radius: .4rem; padding: .05rem .5rem; font-size: .9rem; }
"""


def page(report: SeriesReport) -> str:
    """The page; it refers to nothing outside itself."""
    words = _headline(report)
    body = [f"<h1>{escape(words)}</h1>", f'<p class="soft">{escape(report.title)}</p>']
    body.append(f'<p class="soft">BASE is {escape(str(report.base))}</p>')
    if not report.complete:
        planned = counted(report.planned, "patch", "patches")
        body.append(f'<p class="banner note">{len(report.patches)} of {planned} judged so far</p>')
    if report.smoke and not report.status:
        body.append(f'<p class="banner note">As far as the smoke tier tells: {escape(brief.SMOKE)}</p>')
    body += [*_first_bad(report), *_table(report)]
    for patch in report.patches:
        body += _patch(patch, report)
    body += _base(report)
    body.append(
        f'<p class="soft">{report.seconds:.0f} s {"in all" if report.complete else "up to here"}, '
        f"{report.compiling:.0f} s of it compiling; {escape(report.host)}</p>"
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(words)}</title>\n<style>{STYLE}{_MORE}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def _headline(report: SeriesReport) -> str:
    first = report.first_bad
    if first is not None:
        bad = sum(p.outcome.status == 1 for p in report.patches)
        return f"{bad} of {counted(report.planned, 'patch', 'patches')} bad; the first is patch {first.number}"
    if report.status:
        return "No verdict on the whole series"
    good = "The patch is good" if report.planned == 1 else f"All {report.planned} patches good"
    return f"{good}, but not all that was changed was executed" if any(map(brief.unexecuted, report.patches)) else good


def _first_bad(report: SeriesReport) -> Iterator[str]:
    first = report.first_bad
    if first is None:
        return
    yield f'<div class="banner bad"><b>First bad patch: {first.number}, {escape(str(first.commit))}</b>'
    for line in brief.evidence(first):
        deep = ' class="deep"' if line.startswith(_DEEP) else ""
        yield f"<code{deep}>{_unbroken(line.removeprefix(_DEEP).removeprefix('  '))}</code>"
    yield "</div>"


def _unbroken(text: str) -> str:
    """A command whose options stay on one line: a browser would break them at their hyphens."""
    return _OPTION.sub(r'<span class="whole">\g<0></span>', escape(text))


def _table(report: SeriesReport) -> Iterator[str]:
    heads = "".join(f"<th>{escape(text)}</th>" for text in (*brief.HEADS, *report.cells, *brief.TAILS))
    yield '<div class="wide"><table class="patches"><caption>Patches by configurations; click a number for the rest'
    yield f"</caption><thead><tr>{heads}</tr></thead><tbody>"
    for patch in report.patches:
        words = brief.row(patch, report.cells)
        words[2] = brief.verdict(patch)
        number = f'<td class="num"><a href="#patch-{patch.number}">{words[0]}</a></td>'
        subject = f'<td class="subject">{escape(patch.commit.subject)}</td>'
        colours = [*_colours(patch, report)]
        squares = "".join(f'<td class="{c}">{escape(w)}</td>' for c, w in zip(colours, words[2:], strict=True))
        yield f"<tr>{number}{subject}{squares}</tr>"
    yield "</tbody></table></div>"


def _colours(patch: PatchReport, report: SeriesReport) -> Iterator[str]:
    yield _verdict_colour(patch)
    yield "bad" if any(not b.good for b in patch.builds) else ""
    yield "none" if patch.identical else ""
    by_name = {cell.cell: cell for cell in patch.cells}
    for name in report.cells:
        yield _cell_colour(by_name.get(name))
    yield "note" if patch.reached.never else ""
    untrue = patch.outcome is Outcome.UNTRUE
    yield "bad" if untrue or any(c.failures for c in patch.cells) else "note" if patch.changed else ""
    yield "" if patch.layout.good else "bad"


def _verdict_colour(patch: PatchReport) -> str:
    return "note" if brief.unexecuted(patch) else _COLOUR[patch.outcome]


def _cell_colour(cell: CellReport | None) -> str:
    if cell is None or not (cell.tier or cell.problem):
        return "none"
    if cell.failures:
        return "bad"
    return "note" if cell.problem or cell.others or cell.inherited else "good"


def _patch(patch: PatchReport, report: SeriesReport) -> Iterator[str]:
    yield f'<section id="patch-{patch.number}"><h2>{patch.number}/{report.planned} {escape(patch.commit.subject)} '
    yield f'<span class="pill {_verdict_colour(patch)}">{escape(brief.verdict(patch))}</span></h2>'
    yield f'<p class="soft"><code>{patch.commit.id}</code> by {escape(patch.commit.author)}</p><dl>'
    for build in patch.builds:
        said = f"yes, {build.seconds:.0f} s" if build.good else f"no<pre>{escape(chr(10).join(build.errors))}</pre>"
        yield f"<dt>builds ({escape(build.flavour)})</dt><dd>{said}</dd>"
        if build.code is not None:
            text = escape("\n".join(build.code.text).removeprefix("code: "))
            short = escape(build.code.brief)
            whole = f"<details><summary>{short}</summary><pre>{text}</pre></details>" if "\n" in text else text
            yield f"<dt>code</dt><dd>{whole}</dd>"
    for cell in patch.cells:
        if cell.tier or cell.problem:
            yield f"<dt>{escape(cell.cell)}</dt><dd>{_cell(cell)}</dd>"
    if any(b.good and b.code is not None and not b.code.identical for b in patch.builds):
        yield f"<dt>reached</dt><dd>{'<br>'.join(escape(line) for line in reached_lines(patch.reached))}</dd>"
    claims = "; the message says no functional change" if patch.commit.claims_no_change else ""
    yield f"<dt>behaviour</dt><dd>{escape(patch.behaviour + claims)}</dd>"
    lines = patch.layout.text if not patch.layout.good else patch.layout.changed
    if lines:
        yield f"<dt>layout</dt><dd><pre>{escape(chr(10).join(lines))}</pre></dd>"
    yield "</dl></section>"


def _cell(cell: CellReport) -> str:
    out = [brief.ran(cell, ",")]
    if cell.problem:
        out.append(f'<br><span class="note">lost: {escape(cell.problem)}</span>')
    mended = [c for c in cell.others if c.mended]
    changed = [c for c in cell.others if not c.mended]
    for title, changes in (("", cell.failures), ("mended", mended), ("changed", changed)):
        items = [f"<li>{_change(cell, c)}</li>" for c in list(worst_first(changes))[:_MOST]]
        if len(changes) > _MOST:
            items.append(f"<li>... and {len(changes) - _MOST} more</li>")
        if items:
            head = f"<summary>{len(changes)} {title}</summary>" if title else ""
            listed = f"<ul>{''.join(items)}</ul>"
            out.append(f"<details>{head}{listed}</details>" if title else listed)
    if cell.inherited:
        out.append(f"<br>{escape(brief.inherited(cell))}")
    if cell.quarantined:
        out.append(f"<br>quarantined (flaky): <code>{escape(', '.join(cell.quarantined))}</code>")
    return "".join(out)


def _change(cell: CellReport, change: Change) -> str:
    text = f"<code>{escape(change.name)}: {escape(change_text(change))}</code>"
    if not change.fails:
        return text
    for line in brief.how_to_see(cell, change):
        text += f'<br><code class="soft">{_unbroken(line)}</code>'
    source = Path(cell.folder) / CASES_FOLDER / f"{change.after['id']}.c"
    if source.is_file():
        text += f"<details><summary>C reproducer</summary><pre>{escape(source.read_text())}</pre></details>"
    return text


def _base(report: SeriesReport) -> Iterator[str]:
    lines = list(brief.base_lines(report))
    if lines:
        yield f"<section><h2>BASE</h2><pre>{escape(chr(10).join(lines))}</pre></section>"
