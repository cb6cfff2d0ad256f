"""The layout of KVM's registers that a patch leaves: what its verdict takes from harness/series/layout.py."""

from __future__ import annotations

from harness.lab.kbuild import BuiltKernel
from harness.series.layout import Layout, changes, check, layout_text
from harness.series.typeinfo import LayoutError, file_layout
from harness.series.verdict import LayoutReport


def read_layout(kernel: BuiltKernel) -> Layout | None:
    """The register map of a kernel; None where it has none to be read."""
    try:
        return file_layout(kernel.layout)
    except LayoutError:
        return None


def layout_report(found: Layout | None, before: Layout | None) -> LayoutReport:
    """Whether a patch's register map breaks a rule that the one before it does not, and what of it is new."""
    if found is None:
        return LayoutReport(before is None, () if before is None else ("the register map can no longer be read",))
    known = {c.rule for c in check(before) if c.outcome == "violated"} if before is not None else set()
    broken = [c for c in check(found) if c.outcome == "violated" and c.rule not in known]
    return LayoutReport(
        not broken,
        tuple(f"{c.rule}: {c.detail}" for c in broken) or tuple(layout_text(found).splitlines()),
        changes(before, found) if before is not None else (),
    )
