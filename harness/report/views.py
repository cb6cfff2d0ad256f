"""What every view of a run has in common: how records are counted, grouped and named."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from harness.journal import RunResults
from harness.verdict import Verdict

Record = Mapping[str, Any]
"""One finished Case, as harness/runner.py writes it into the journal."""

CASES_FOLDER: Final = "cases"
"""Beside the journal: the Cases that failed, as files that ``replay`` takes."""
BAD: Final = (Verdict.SPLAT, Verdict.MISMATCH, Verdict.REGRESSED, Verdict.LOST)
NOTED: Final = (Verdict.HEALED, Verdict.SUSPECT, Verdict.KNOWN)
"""Neither agrees nor fails: told case by case."""

_LACKS: Final = re.compile(r"(emulator lacks .*) in [\w-]+$")  # one line an instruction, not one a mode


def verdict_of(record: Record) -> Verdict:
    """The verdict of a record."""
    return Verdict(record["verdict"])


def counts_text(records: Sequence[Record]) -> str:
    """``3 mismatch, 7183 unsupported, 20600 agree``: by precedence, without those that did not occur."""
    found = Counter(r["verdict"] for r in records)
    return ", ".join(f"{found[v.value]} {v.value}" for v in Verdict if found[v.value])


def checks(records: Iterable[Record]) -> int:
    """Comparisons of the whole visible state that were made."""
    return sum(int(r["checks"]) for r in records)


def with_verdict(records: Iterable[Record], *verdicts: Verdict) -> list[Record]:
    """The records with one of these verdicts: by precedence, then as they came."""
    order = {v: n for n, v in enumerate(Verdict)}
    return sorted((r for r in records if verdict_of(r) in verdicts), key=lambda r: order[verdict_of(r)])


def reason(record: Record) -> str:
    """What a record has in common with its like: of a known divergence that is its row's name."""
    summary = str(record["summary"])
    return summary.split(":")[0] if verdict_of(record) is Verdict.KNOWN else _LACKS.sub(r"\1", summary)


def reasons(records: Iterable[Record], verdict: Verdict) -> list[tuple[str, int]]:
    """(what is said, how often) for one verdict, most frequent first."""
    return Counter(reason(r) for r in records if verdict_of(r) is verdict).most_common()


def family_and_mode(name: str) -> tuple[str, str]:
    """``gpr/mov@long#0`` -> ``("gpr", "long")``; an empty string for a part that the name does not have."""
    rest, _, tail = name.partition("@")
    family, slash, _ = rest.partition("/")
    return family if slash else "", tail.partition("#")[0]


def replay_command(run: RunResults, record: Record) -> str:
    """The command that runs this Case again: as the run says, or by its file where it is kept."""
    if again := run.header.get("again"):
        return f"{again} {shlex.quote(record['case'])}" if record["id"] else str(again).removesuffix(" -k")
    kept = run.folder / CASES_FOLDER / f"{record['id']}.json"
    return replay_words(kept_word(kept) if kept.exists() else record["id"])


def replay_words(word: str) -> str:
    """The command that runs a Case again on this machine's KVM; ``word``, for a shell, says which."""
    return f"kvm-harness replay {word}"


def kept_word(file: Path) -> str:
    """What ``kvm-harness replay`` is given for a Case that was kept, from whatever folder."""
    return shlex.quote(str(file.absolute()))


def title_lines(run: RunResults) -> list[str]:
    """Where, when and in which cells the run was."""
    lines = [f"{run.header.get('host', 'unknown host')}, started {run.header.get('started', 'unknown')}"]
    lines += [f"cell {cell}" for cell in run.cells if cell]
    return [*lines, f"{run.extent}: enough of them had failed"] if run.enough and run.extent else lines
