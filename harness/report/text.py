"""A run as plain text: what is not as it should be, and the counts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from harness.journal import RunResults
from harness.report.views import (
    BAD,
    NOTED,
    Record,
    checks,
    counts_text,
    reason,
    reasons,
    replay_command,
    title_lines,
    verdict_of,
    with_verdict,
)
from harness.verdict import Verdict
from harness.words import counted

_TITLES = (
    (Verdict.UNSUPPORTED, "not possible on this host"), (Verdict.HEALED, "healed"),
    (Verdict.KNOWN, "known divergence"),
)  # fmt: skip


def summary_lines(records: Sequence[Record]) -> list[str]:
    """What a run came to: counts by verdict, every limit of the host once with its count, known divergences."""
    if not records:
        return []
    lines = [f"{counted(len(records), 'case')}, {counted(checks(records), 'check')}: {counts_text(records)}"]
    for verdict, title in _TITLES:
        lines += [f"  {title}: {count:5d} × {why}" for why, count in reasons(records, verdict)]
    return lines


def text_report(run: RunResults) -> str:
    """The whole view: each Case that neither agrees nor is a limit of the host, with the command that shows it.

    Of those that one row of the known divergences explains, the first stands for all.
    Of a run that did not come to its end, that is said before anything it came to.
    """
    lines = [*title_lines(run), *run.incomplete_because(), *_cases(run), *summary_lines(run.records)]
    return "\n".join(lines) + "\n"


def _cases(run: RunResults) -> Iterator[str]:
    known = dict(reasons(run.records, Verdict.KNOWN))
    for record in with_verdict(run.records, *BAD) + with_verdict(run.records, *NOTED):
        verdict = verdict_of(record)
        more = 0
        if verdict is Verdict.KNOWN:
            more = known.pop(reason(record), 0) - 1
            if more < 0:  # its row has had its line
                continue
        cell = f" [{run.cell(record)}]" if len(run.cells) > 1 else ""
        yield f"{record['verdict']:10s} {record['id']} {record['case']}{cell}: {record['summary']}"
        if verdict in BAD:
            yield f"{'':10s} {replay_command(run, record)}"
        if more:
            yield f"{'':10s} and {more} more of this row"
