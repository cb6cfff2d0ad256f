"""What people read of seeded bugs: the catalogue, a line for each as it is tried, the table at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from harness.lab.edits import Edit
from harness.lab.lines import table
from harness.lab.mutant_peers import PeerTrial
from harness.lab.mutants import Fate, Trial, write_json
from harness.words import counted

LeftOut = Mapping[str, Mapping[str, Sequence[str]]]
"""Tests of upstream's that did not count: configuration -> reason -> names."""


def trial_line(trial: Trial) -> str:
    """One line as soon as it is known."""
    if trial.fate is Fate.CAUGHT:
        where = ", ".join(trial.differs[:3]) or trial.verdict
        return (
            f"{trial.name}: caught in {trial.configuration} by {trial.case}: {where} "
            f"(build {trial.build:.1f} s, run {trial.run:.1f} s)"
        )
    times = f" (build {trial.build:.1f} s, run {trial.run:.1f} s, {trial.cases} Cases)" if trial.build else ""
    return f"{trial.name}: {trial.fate.value}: {trial.summary}{times}"


def trials_table(trials: Sequence[Trial]) -> list[str]:
    """All of them, a line each, and their sum."""
    rows = [["seeded bug", "class", "fate", "seen in", "by", "what", "build", "run"]]
    for t in trials:
        what = (", ".join(t.differs[:2]) + (" ..." if len(t.differs) > 2 else "")) or t.verdict or "-"
        rows.append([
            t.name, str(t.bug_class), t.fate.value, t.configuration or "-", t.case or "-", what,
            f"{t.build:.1f} s" if t.build else "-", f"{t.run:.1f} s" if t.run else "-",
        ])  # fmt: skip
    counts = {fate: sum(t.fate is fate for t in trials) for fate in Fate}
    told = ", ".join(f"{count} {fate.value}" for fate, count in counts.items() if count)
    classes = len({t.bug_class for t in trials if t.fate is Fate.CAUGHT})
    spent = sum(t.build + t.run for t in trials)
    total = f"{len(trials)} seeded bugs: {told}; {classes} classes caught; {spent:.0f} s of building and running"
    return [*table(rows), total]


def list_table(mutants: Sequence[Edit]) -> list[str]:
    """The catalogue for people."""
    rows = [["seeded bug", "class", "configurations", "-k", "what it does"]]
    for m in mutants:
        note = f" (equivalent: {m.equivalent})" if m.equivalent else ""
        rows.append([m.name, str(m.bug_class), ",".join(m.configurations), m.select, m.title + note])
    return table(rows)


def write_results(
    out: Path, tree: Path, trials: Sequence[Trial], peers: Mapping[str, PeerTrial], left_out: LeftOut
) -> None:
    """All results as one JSON file; with ``peers`` both suites side by side, as Markdown, in ``peers.md``."""
    body = {"tree": str(tree), "trials": [t.to_json() for t in trials]}
    write_json(
        out / "mutants.json", {**body, "peers": [p.to_json() for p in peers.values()], "left out": dict(left_out)}
    )
    if peers:
        (out / "peers.md").write_text(peers_markdown(trials, peers, left_out))


def peer_line(trial: PeerTrial) -> str:
    """One line as soon as it is known."""
    if trial.problem:
        return f"{trial.name}: upstream's tests: lost: {trial.problem}"
    if not trial.test:
        return f"{trial.name}: {counted(trial.tests, 'test')} of upstream's saw nothing ({trial.seconds:.0f} s)"
    return f"{trial.name}: {trial.test} of upstream's sees it in {trial.configuration}: {trial.outcome}"


def peers_table(trials: Sequence[Trial], peers: Mapping[str, PeerTrial], left_out: LeftOut) -> list[str]:
    """This suite and upstream's, side by side; then which of upstream's tests did not count."""
    rows, total = _side_by_side(trials, peers)
    return [*table(rows), total, *_left_out_lines(left_out)]


def peers_markdown(trials: Sequence[Trial], peers: Mapping[str, PeerTrial], left_out: LeftOut) -> str:
    """What :func:`peers_table` says, for docs/mutants.md."""
    (head, *rows), total = _side_by_side(trials, peers)
    lines = ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]
    lines += ["", f"{total[0].upper()}{total[1:]}.", "", *(f"- {line}" for line in _left_out_lines(left_out))]
    return "".join(f"{line}\n" for line in lines)


def _side_by_side(trials: Sequence[Trial], peers: Mapping[str, PeerTrial]) -> tuple[list[list[str]], str]:
    """The rows of the table, its head first, and the sum."""
    rows = [["seeded bug", "class", "this suite", "upstream's tests"]]
    tried = [t for t in trials if t.name in peers]
    for t in tried:
        theirs = peers[t.name]
        ours = f"{t.case}: {', '.join(t.differs[:2]) or t.verdict}" if t.fate is Fate.CAUGHT else t.fate.value
        seen = f"{theirs.test}: {theirs.outcome}" if theirs.test else "lost" if theirs.problem else "-"
        rows.append([t.name, str(t.bug_class), ours, seen])
    mine = sum(t.fate is Fate.CAUGHT for t in tried)
    both = sum(bool(peers[t.name].test) for t in tried)
    return rows, f"of {len(tried)} seeded bugs this suite sees {mine}, upstream's tests see {both}"


def _left_out_lines(left_out: LeftOut) -> list[str]:
    """A line for each configuration."""
    return [
        f"tests of upstream's that did not count in {name}: "
        + "; ".join(f"{reason} ({len(tests)}): {', '.join(tests)}" for reason, tests in sorted(reasons.items()))
        for name, reasons in left_out.items()
    ]
