"""A run as KTAP, the kernel's test format (Documentation/dev-tools/ktap.rst): a test for each family, subtests below.

In KTAP a ``#`` ends a name, so ``gpr/mov@long#0`` is ``gpr/mov@long.0`` here.
"""

from __future__ import annotations

from collections.abc import Iterator

from harness.journal import RunResults
from harness.report.views import BAD, Record, family_and_mode, replay_command, title_lines, verdict_of
from harness.verdict import Verdict


def ktap_report(run: RunResults) -> str:
    """The whole text."""
    return "\n".join(_lines(run)) + "\n"


def _lines(run: RunResults) -> Iterator[str]:
    families: dict[str, list[Record]] = {}
    for record in run.records:
        name = " ".join(filter(None, (run.cell(record), family_and_mode(record["case"])[0])))
        families.setdefault(name or "cases", []).append(record)
    broken = run.incomplete_because()
    yield "KTAP version 1"
    yield from (f"# {line}" for line in title_lines(run))
    yield f"1..{len(families) + len(broken)}"
    for number, (name, records) in enumerate(families.items(), 1):
        yield "  KTAP version 1"
        yield f"  # Subtest: {_name(name)}"
        yield f"  1..{len(records)}"
        for n, record in enumerate(records, 1):
            yield from _test(run, n, record)
        yield f"{_result(not any(verdict_of(r) in BAD for r in records))} {number} {_name(name)}"
    for number, text in enumerate(broken, len(families) + 1):
        yield f"not ok {number} results are whole # ERROR {text}"


def _test(run: RunResults, number: int, record: Record) -> Iterator[str]:
    verdict = verdict_of(record)
    if verdict in BAD:
        yield f"  # {verdict.value}: {_line(record['summary'])}"
        yield f"  # {replay_command(run, record)}"
    yield f"  {_result(verdict not in BAD)} {number} {_name(record['case'])}{_directive(verdict, record)}"


def _directive(verdict: Verdict, record: Record) -> str:
    words = {
        Verdict.UNSUPPORTED: "SKIP", Verdict.KNOWN: "XFAIL", Verdict.SUSPECT: "XFAIL", Verdict.LOST: "ERROR",
    }  # fmt: skip
    return f" # {words[verdict]} {_line(record['summary'])}".rstrip() if verdict in words else ""


def _result(good: bool) -> str:
    return "ok" if good else "not ok"


def _name(text: str) -> str:
    return _line(text).replace("#", ".")


def _line(text: str) -> str:
    return " ".join(text.split())
