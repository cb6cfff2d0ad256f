"""A run as one self-contained page: what failed, a table of families by modes, limits and known divergences."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from typing import Final

from harness.journal import RunResults
from harness.modes import MODES
from harness.report.views import (
    BAD,
    Record,
    checks,
    family_and_mode,
    reasons,
    replay_command,
    title_lines,
    verdict_of,
    with_verdict,
)
from harness.verdict import Verdict, worst

_FAILED: Final = frozenset(BAD)
_DASH: Final = "&ndash;"
_MEANING: Final = {
    Verdict.SPLAT: "the kernel broke: a warning, an oops, a killed VM",
    Verdict.MISMATCH: "registers, exits or memory differ from what must be",
    Verdict.REGRESSED: "something that this cell once could do is gone",
    Verdict.HEALED: "a known divergence that no longer diverges",
    Verdict.SUSPECT: "differs, and the emulator below differs in the same way",
    Verdict.KNOWN: "diverges exactly as known_divergences.toml says",
    Verdict.UNSUPPORTED: "not possible on this host, by a probe",
    Verdict.LOST: "the harness or its machine failed",
    Verdict.AGREE: "as the architecture has it",
}

STYLE: Final = """
:root { --ink: #1d2126; --soft: #5d6670; --line: #d9dee3; --page: #fff; --band: #f5f7f9;
  --good: #1a7f37; --goodbg: #e6f4ea; --bad: #b42318; --badbg: #fdecea; --note: #8a5a00; --notebg: #fdf3dc;
  --none: #5d6670; --nonebg: #eef1f4; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7ea; --soft: #9aa4ae; --line: #363d45; --page: #16191d;
  --band: #1e2328; --good: #6ccb86; --goodbg: #17301f; --bad: #ff8a7d; --badbg: #3b1a17; --note: #e8b84a;
  --notebg: #35290f; --none: #9aa4ae; --nonebg: #262c32; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1.5rem 1.25rem 3rem; color: var(--ink); background: var(--page);
  font: 15px/1.45 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .2rem; }
h2 { font-size: 1.1rem; margin: 2rem 0 .6rem; }
p { margin: .2rem 0; }
.soft, caption { color: var(--soft); }
.tiles { display: flex; flex-wrap: wrap; gap: .6rem; margin: 1.2rem 0; }
.tile { border: 1px solid var(--line); border-radius: .5rem; padding: .5rem .9rem; min-width: 7rem; }
.tile b { display: block; font-size: 1.35rem; font-variant-numeric: tabular-nums; }
.good { color: var(--good); background: var(--goodbg); } .bad { color: var(--bad); background: var(--badbg); }
.note { color: var(--note); background: var(--notebg); } .none { color: var(--none); background: var(--nonebg); }
.banner { border-radius: .5rem; padding: .6rem .9rem; margin: .8rem 0; }
table { border-collapse: collapse; width: 100%; }
caption { text-align: left; padding-bottom: .4rem; }
th, td { border: 1px solid var(--line); padding: .3rem .5rem; text-align: left; vertical-align: top; }
thead th { background: var(--band); font-weight: 600; }
.num { width: 1%; }
.grid td, .num { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.wide { overflow-x: auto; }
code { font: 13px/1.4 ui-monospace, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; }
summary { cursor: pointer; }
"""


def html_report(run: RunResults) -> str:
    """The page; it refers to nothing outside itself."""
    verdict = worst(verdict_of(r) for r in run.records)
    words = _headline(run, verdict)
    body = [f"<h1>{escape(words)}</h1>", *(f'<p class="soft">{escape(line)}</p>' for line in title_lines(run))]
    body += [f'<p class="banner bad">{escape(text)}</p>' for text in run.incomplete_because()]
    body += [*_tiles(run.records), *_failures(run), *_grid(run.records)]
    body += _reasons(run.records, Verdict.KNOWN, "Known divergences", "Divergence")
    body += _cases(run, Verdict.HEALED, "Healed")
    body += _cases(run, Verdict.SUSPECT, "Suspect")
    body += _reasons(run.records, Verdict.UNSUPPORTED, "Not possible on this host", "Reason")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(words)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def _headline(run: RunResults, verdict: Verdict | None) -> str:
    failed = Counter(verdict_of(r) for r in run.records if verdict_of(r) in _FAILED)
    if failed:
        return "kvm-harness: " + ", ".join(f"{failed[v]} {v.value}" for v in Verdict if failed[v])
    if not run.complete:
        return "kvm-harness: incomplete"
    if verdict in (None, Verdict.UNSUPPORTED) and not any(verdict_of(r) is Verdict.AGREE for r in run.records):
        return "kvm-harness: nothing ran"
    return "kvm-harness: agrees"


def _colour(verdict: Verdict | None) -> str:
    if verdict in _FAILED:
        return "bad"
    return {Verdict.AGREE: "good", Verdict.UNSUPPORTED: "none", None: "none"}.get(verdict, "note")


def _tiles(records: Sequence[Record]) -> Iterator[str]:
    found = Counter(verdict_of(r) for r in records)
    yield '<div class="tiles">'
    yield f'<div class="tile"><b>{len(records):,}</b>cases</div>'
    yield f'<div class="tile"><b>{checks(records):,}</b>checks</div>'
    for verdict in Verdict:
        if found[verdict]:
            about = f'title="{escape(_MEANING[verdict])}"'
            yield f'<div class="tile {_colour(verdict)}" {about}><b>{found[verdict]:,}</b>{verdict.value}</div>'
    yield "</div>"


def _failures(run: RunResults) -> Iterator[str]:
    records = with_verdict(run.records, *BAD)
    if not records:
        return
    yield "<h2>What failed</h2>"
    yield "<table><thead><tr><th>Verdict</th><th>Case</th><th>What differs</th></tr></thead><tbody>"
    for r in records:
        cell = f'<br><span class="soft">{escape(run.cell(r))}</span>' if len(run.cells) > 1 else ""
        yield (
            f'<tr><td class="bad">{r["verdict"]}</td><td><code>{escape(r["case"])}</code>{cell}</td>'
            f"<td><code>{escape(r['summary'])}</code>"
            f'<br><code class="soft">{escape(replay_command(run, r))}</code></td></tr>'
        )
    yield "</tbody></table>"


def _grid(records: Iterable[Record]) -> Iterator[str]:
    """Families by modes: how many Cases ran, of how many, in the colour of the worst verdict."""
    table: dict[tuple[str, str], list[Verdict]] = {}
    for r in records:
        table.setdefault(family_and_mode(r["case"]), []).append(verdict_of(r))
    if not table:
        return
    families = list(dict.fromkeys(family for family, _ in table))
    seen = {mode for _, mode in table}
    modes = [*(m for m in MODES if m in seen), *sorted(seen.difference(MODES))]
    yield '<h2>Families and modes</h2><div class="wide"><table class="grid">'
    yield "<caption>Cases that ran (of how many, where the host cannot run all), in the colour of the worst verdict"
    heads = "".join(f"<th>{escape(mode) or _DASH}</th>" for mode in modes)
    yield f"</caption><thead><tr><th>Family</th>{heads}</tr></thead><tbody>"
    for family in families:
        squares = "".join(_square(table.get((family, mode))) for mode in modes)
        yield f"<tr><th>{escape(family) or _DASH}</th>{squares}</tr>"
    yield "</tbody></table></div>"


def _square(verdicts: list[Verdict] | None) -> str:
    if not verdicts:
        return "<td></td>"
    ran = [v for v in verdicts if v is not Verdict.UNSUPPORTED]
    failed = sum(v in _FAILED for v in verdicts)
    text = f"{len(ran)}" if len(ran) == len(verdicts) else f"{len(ran)}/{len(verdicts)}"
    if failed:
        text += f", {failed} bad"
    about = ", ".join(f"{n} {v.value}" for v, n in Counter(verdicts).most_common())
    # Limits of the host do not hide that the rest agrees; a failure hides everything.
    return f'<td class="{_colour(worst(ran))}" title="{escape(about)}">{text}</td>'


def _reasons(records: Sequence[Record], verdict: Verdict, title: str, head: str) -> Iterator[str]:
    rows = reasons(records, verdict)
    if not rows:
        return
    yield f"<h2>{title}</h2><table><thead><tr><th>Cases</th><th>{head}</th></tr></thead><tbody>"
    for reason, count in rows:
        text = f"<code>{escape(reason)}</code>"
        if verdict is Verdict.KNOWN:
            named = [r for r in records if verdict_of(r) is verdict and r["summary"].split(":")[0] == reason]
            items = "<br>".join(f"<code>{escape(r['case'])}: {escape(r['summary'])}</code>" for r in named)
            text = f"<details><summary>{text}</summary>{items}</details>"
        yield f'<tr><td class="num">{count:,}</td><td>{text}</td></tr>'
    yield "</tbody></table>"


def _cases(run: RunResults, verdict: Verdict, title: str) -> Iterator[str]:
    records = with_verdict(run.records, verdict)
    if not records:
        return
    yield f'<h2>{title}</h2><p class="soft">{escape(_MEANING[verdict])}</p><table><tbody>'
    for r in records:
        yield f"<tr><td><code>{escape(r['case'])}</code></td><td><code>{escape(r['summary'])}</code></td></tr>"
    yield "</tbody></table>"
