"""Two runs side by side, Case by Case: two hosts, two kernels, before and after a patch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from harness.journal import RunResults
from harness.report.views import Record, counts_text, title_lines, verdict_of
from harness.verdict import BAD_INPUT, Verdict
from harness.words import counted

_MOST: Final = 40  # lines of one kind
_NAMES: Final = 5  # names after a count


@dataclass(frozen=True)
class Comparison:
    """``changed``: (record in A, record in B) whose verdicts differ; ``rewritten``: the same name, other content.

    ``otherwise``: the same verdict, but not the same behaviour where the model allows several (undefined flags, how
    many items an exit holds).
    """

    a: RunResults
    b: RunResults
    changed: tuple[tuple[Record, Record], ...]
    only_a: tuple[Record, ...]
    only_b: tuple[Record, ...]
    same: int
    rewritten: int
    otherwise: tuple[Record, ...] = ()  # as in B

    @property
    def worse(self) -> bool:
        """A Case that agreed in A no longer does in B."""
        return any(verdict_of(before) is Verdict.AGREE for before, _ in self.changed)

    @property
    def status(self) -> int:
        """Exit status: 1 when something got worse, 4 when a run is not whole, 2 with no Case in both, else 0."""
        if self.worse:
            return Verdict.MISMATCH.status
        if self.a.complete and self.b.complete and not self.changed and not self.same:
            return BAD_INPUT
        return 0 if self.a.complete and self.b.complete else Verdict.LOST.status


def compare_runs(a: RunResults, b: RunResults) -> Comparison:
    """Match the Cases of two runs by name; also by cell where a run has several."""
    by_cell = any(len(run.cells) > 1 for run in (a, b))
    left, right = _by_name(a, by_cell), _by_name(b, by_cell)
    both = [(left[key], right[key]) for key in left if key in right]
    changed = [(x, y) for x, y in both if x["verdict"] != y["verdict"]]
    return Comparison(
        a, b, tuple(changed), tuple(left[k] for k in left if k not in right),
        tuple(right[k] for k in right if k not in left), len(both) - len(changed),
        sum(1 for x, y in both if x["id"] != y["id"]),
        tuple(y for x, y in both if x["verdict"] == y["verdict"] and x["id"] == y["id"] and _shown(x) != _shown(y)),
    )  # fmt: skip


def _shown(record: Record) -> tuple[object, ...]:
    return record["checks"], record.get("allowed", 0)


def _by_name(run: RunResults, by_cell: bool) -> Mapping[tuple[str, str], Record]:
    return {(run.cell(r) if by_cell else "", r["case"]): r for r in run.records}


def comparison_text(found: Comparison) -> str:
    """The view for people."""
    out = [f"{name}  {line}" for name, run in (("A", found.a), ("B", found.b)) for line in _head(run)]
    out.append("")
    out += _changes(found)
    for name, records in (("A", found.only_a), ("B", found.only_b)):
        if records:
            out.append(f"only in {name}: {counted(len(records), 'case')} ({counts_text(records)}): {_names(records)}")
    if found.rewritten:
        many = counted(found.rewritten, "case has", "cases have")
        out.append(f"{many} the same name but not the same content: another CPUID or harness")
    if found.otherwise:
        many = counted(len(found.otherwise), "case behaves", "cases behave")
        out.append(
            f"{many} otherwise where the model allows it (undefined flags, batched I/O): {_names(found.otherwise)}"
        )
    if not found.changed and not found.same:
        out.append("nothing to compare: no case is in both; give two runs with the same -k, or without")
    out.append(f"{counted(len(found.changed), 'verdict')} changed, {counted(found.same, 'is', 'are')} the same")
    return "\n".join(out) + "\n"


def _head(run: RunResults) -> Iterator[str]:
    yield f"{run.folder}: {counted(len(run.records), 'case')}: {counts_text(run.records)}"
    yield from (f"  {line}" for line in title_lines(run))


def _changes(found: Comparison) -> Iterator[str]:
    """First what agreed before; limits of a host by reason, everything else Case by Case."""
    kinds = Counter((verdict_of(x), verdict_of(y)) for x, y in found.changed)
    order = list(Verdict)
    for before, after in sorted(kinds, key=lambda k: (k[0] is not Verdict.AGREE, order.index(k[1]))):
        pairs = [(x, y) for x, y in found.changed if (verdict_of(x), verdict_of(y)) == (before, after)]
        yield f"{before.value} -> {after.value}: {counted(len(pairs), 'case')}"
        lines = list(_limits(pairs) if after is Verdict.UNSUPPORTED else _one_by_one(pairs))
        yield from (f"  {line}" for line in lines[:_MOST])
        if len(lines) > _MOST:
            yield f"  ... and {len(lines) - _MOST} more"
        yield ""


def _one_by_one(pairs: Sequence[tuple[Record, Record]]) -> Iterator[str]:
    for before, after in pairs:
        said = after["summary"] or before["summary"]
        yield f"{after['id']} {after['case']}" + (f": {said}" if said else "")


def _limits(pairs: Sequence[tuple[Record, Record]]) -> Iterator[str]:
    for reason, count in Counter(after["summary"] for _, after in pairs).most_common():
        yield f"{count:5d} × {reason}: {_names([y for _, y in pairs if y['summary'] == reason])}"


def _names(records: Sequence[Record]) -> str:
    more = f", ... and {len(records) - _NAMES} more" if len(records) > _NAMES else ""
    return ", ".join(r["case"] for r in records[:_NAMES]) + more
