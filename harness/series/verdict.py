"""Verdicts on patches: builds, code, cells, reached, behaviour, layout, and what they come to together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Final

from harness.report.views import Record, verdict_of
from harness.series.behaviour import Change
from harness.series.coverage import Reached
from harness.series.git import Commit
from harness.verdict import Verdict


class Outcome(Enum):
    """What a patch came to, worst first. ``status`` is the exit status, ``bisect`` what `git bisect run` is told."""

    BAD = "bad"  # it brings a splat, a mismatch, a regression, or a wrong layout
    UNBUILDABLE = "does not build"
    UNTRUE = "not what it says"  # "no functional change", and behaviour changed
    LOST = "lost"  # the infrastructure failed: no verdict
    GOOD = "good"

    @property
    def status(self) -> int:
        """Exit status of a series whose worst patch this is."""
        return {Outcome.LOST: Verdict.LOST.status, Outcome.GOOD: 0}.get(self, 1)


@dataclass(frozen=True)
class Code:
    """What a patch did to the machine code of one flavour of the kernel.

    ``functions`` changed, ``added`` are new; ``tables`` is data that changed or is new, ``users`` the functions that
    refer to it; ``removed`` are gone; ``text`` is for people. ``against``: the commit it was compared with, where that
    is not the patch's parent.
    """

    identical: bool
    functions: frozenset[str] = frozenset()
    added: frozenset[str] = frozenset()
    tables: frozenset[str] = frozenset()
    users: frozenset[str] = frozenset()
    removed: frozenset[str] = frozenset()
    renamed: Mapping[str, str] = field(default_factory=dict)
    objects: frozenset[str] = frozenset()
    text: tuple[str, ...] = ()
    against: str = ""

    @property
    def touched(self) -> frozenset[str]:
        """Functions that do not do what they did, or not with the same data."""
        return self.functions | self.added | self.users

    @property
    def brief(self) -> str:
        """A word or two, for tables."""
        if self.identical:
            return "identical"
        kinds = (("function", self.functions | self.added), ("data", self.tables), ("removed", self.removed))
        parts = [
            f"{len(names)} {kind}{'s' * (kind == 'function' and len(names) > 1)}" for kind, names in kinds if names
        ]
        return ", ".join(parts) or "changed"

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return {
            "identical": self.identical, "functions": sorted(self.functions), "added": sorted(self.added),
            "tables": sorted(self.tables), "users": sorted(self.users), "removed": sorted(self.removed),
            "renamed": dict(self.renamed), "objects": sorted(self.objects), "against": self.against,
        }  # fmt: skip


@dataclass(frozen=True)
class Build:
    """How one flavour of a patch's kernel was built. ``errors``: the compiler's first lines, if it does not build."""

    flavour: str
    seconds: float = 0.0
    errors: tuple[str, ...] = ()
    log: str = ""
    code: Code | None = None

    @property
    def good(self) -> bool:
        """There is a kernel."""
        return not self.errors

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return {
            "flavour": self.flavour, "seconds": round(self.seconds, 1), "errors": list(self.errors), "log": self.log,
            "code": self.code.to_json() if self.code is not None else None,
        }  # fmt: skip


@dataclass(frozen=True)
class CellReport:
    """A patch in one cell. ``changes``: what the kernel shows otherwise than the one before it.

    ``inherited``: failures that an earlier patch has brought, with its number; 0 is BASE. ``problem``: why there is no
    result, empty if there is one. ``command`` runs a Case of it again, ``{}`` standing for its name. ``extent``: how
    far it came, where it ended before its last Case since enough had failed.
    """

    cell: str
    tier: str
    folder: str = ""
    counts: Mapping[str, int] = field(default_factory=dict)
    checks: int = 0
    changes: tuple[Change, ...] = ()
    inherited: Mapping[str, int] = field(default_factory=dict)
    quarantined: tuple[str, ...] = ()
    problem: str = ""
    seconds: float = 0.0
    command: str = ""
    extent: str = ""

    @property
    def failures(self) -> list[Change]:
        """What this patch has brought that is bad."""
        return [c for c in self.changes if c.fails]

    @property
    def others(self) -> list[Change]:
        """What behaves otherwise, and may."""
        return [c for c in self.changes if not c.fails]

    @property
    def verdict(self) -> Verdict:
        """The worst that this patch has brought here."""
        found = {c.verdict for c in self.failures}
        if found:
            return next(v for v in Verdict if v in found)
        return Verdict.LOST if self.problem else Verdict.AGREE

    @property
    def brief(self) -> str:
        """A word or two, for tables."""
        if self.failures:
            return f"{len(self.failures)} {self.verdict.value}"
        if self.problem:
            return "lost"
        mended = sum(c.mended for c in self.others)
        counts = ((mended, "mended"), (len(self.others) - mended, "changed"), (len(self.inherited), "inherited"))
        more = [f"{count} {what}" for count, what in counts if count]
        return ", ".join(more if len(self.others) > mended else ["agree", *more])

    def to_json(self) -> dict[str, Any]:
        """A JSON object; ``verdict`` is null where nothing ran."""
        verdict = self.verdict.value if self.tier or self.problem else None
        return {
            "cell": self.cell, "tier": self.tier, "folder": self.folder, "verdict": verdict,
            "counts": dict(self.counts), "checks": self.checks, "changes": [c.to_json() for c in self.changes],
            "inherited": dict(self.inherited), "quarantined": list(self.quarantined), "problem": self.problem,
            "seconds": round(self.seconds, 1), "extent": self.extent,
        }  # fmt: skip


def counts_of(records: Iterable[Record]) -> dict[str, int]:
    """Records by verdict, in order of precedence."""
    found = Counter(verdict_of(r) for r in records)
    return {v.value: found[v] for v in Verdict if found[v]}


@dataclass(frozen=True)
class LayoutReport:
    """The register layout that a patch leaves: whether its checks hold, and what changed of it, for people."""

    good: bool = True
    text: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()

    @property
    def brief(self) -> str:
        """A word or two, for tables."""
        return "wrong" if not self.good else "changed" if self.changed else "ok" if self.text else "n/a"

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return {"good": self.good, "text": list(self.text), "changed": list(self.changed)}


@dataclass(frozen=True)
class PatchReport:
    """Everything about one patch. ``number`` counts from 1. ``seconds``: wall-clock time of all of it."""

    number: int
    commit: Commit
    builds: tuple[Build, ...] = ()
    cells: tuple[CellReport, ...] = ()
    reached: Reached = field(default_factory=Reached)
    layout: LayoutReport = field(default_factory=LayoutReport)
    seconds: float = 0.0

    @property
    def outcome(self) -> Outcome:
        """What it comes to."""
        if not self.layout.good or any(cell.failures for cell in self.cells):
            return Outcome.BAD
        if any(not build.good for build in self.builds):
            return Outcome.UNBUILDABLE
        if self.commit.claims_no_change and self.changed:
            return Outcome.UNTRUE
        if any(cell.problem for cell in self.cells):
            return Outcome.LOST
        return Outcome.GOOD

    @property
    def identical(self) -> bool:
        """It left every machine instruction and every byte of data as it was, in all flavours."""
        return bool(self.builds) and all(b.code is not None and b.code.identical for b in self.builds)

    @property
    def changed(self) -> int:
        """Cases that behave otherwise, in all cells, and may."""
        return sum(len(cell.others) for cell in self.cells)

    @property
    def behaviour(self) -> str:
        """A word or two, for tables."""
        if self.identical:
            return "same code"
        failing = sum(len(c.failures) for c in self.cells)
        if failing:
            return f"{failing} worse"
        if not any(c.tier and not c.problem for c in self.cells):
            return "-"
        mended = sum(c.mended for cell in self.cells for c in cell.others)
        if mended:
            return f"{mended} mended" + (f", {self.changed - mended} changed" if self.changed > mended else "")
        return f"{self.changed} changed" if self.changed else "same"

    @property
    def inherited(self) -> dict[int, int]:
        """How many failures it has from earlier patches, by their number; 0 is BASE."""
        return dict(Counter(origin for cell in self.cells for origin in cell.inherited.values()))

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return {
            "number": self.number, "commit": self.commit.id, "subject": self.commit.subject,
            "author": self.commit.author, "claims no functional change": self.commit.claims_no_change,
            "outcome": self.outcome.value, "builds": [b.to_json() for b in self.builds],
            "cells": [c.to_json() for c in self.cells], "reached": self.reached.to_json(),
            "behaviour": self.behaviour, "layout": self.layout.to_json(), "seconds": round(self.seconds, 1),
        }  # fmt: skip


@dataclass(frozen=True)
class SeriesReport:
    """A series: BASE and the patches judged so far. ``planned`` is how many there are."""

    title: str
    base: Commit
    cells: tuple[str, ...]
    patches: tuple[PatchReport, ...]
    planned: int
    quarantined: Mapping[str, Mapping[str, tuple[str, str]]] = field(default_factory=dict)  # cell -> name -> twice
    base_failures: Mapping[str, Mapping[str, Record]] = field(default_factory=dict)  # cell -> name -> record
    seconds: float = 0.0
    compiling: float = 0.0
    host: str = ""
    tier: str = "auto"

    @property
    def smoke(self) -> bool:
        """No more than the smoke tier was asked for, and something ran."""
        return self.tier == "smoke" and any(c.tier for p in self.patches for c in p.cells)

    @property
    def first_bad(self) -> PatchReport | None:
        """The first patch that is not good, lost ones aside."""
        return next((p for p in self.patches if p.outcome.status == 1), None)

    @property
    def complete(self) -> bool:
        """Every patch has been judged."""
        return len(self.patches) == self.planned

    @property
    def status(self) -> int:
        """The exit status: 1 when a patch is bad, else 4 when one was lost or not judged, else 0."""
        found = {p.outcome.status for p in self.patches}
        if 1 in found:
            return 1
        return Verdict.LOST.status if found - {0} or not self.complete else 0


FORMAT: Final = 1
"""Of the report as JSON."""
