"""The layout of KVM's registers that a patch leaves, against BASE's: the verdict's part of harness/series/layout.py."""

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


def layout_report(found: Layout | None, base: Layout | None) -> LayoutReport:
    """Whether a patch's register map breaks a rule that BASE's does not, and what of it is not as in BASE."""
    if found is None:
        return LayoutReport(base is None, () if base is None else ("the register map can no longer be read",))
    before = {c.rule for c in check(base) if c.outcome == "violated"} if base is not None else set()
    broken = [c for c in check(found) if c.outcome == "violated" and c.rule not in before]
    return LayoutReport(
        not broken,
        tuple(f"{c.rule}: {c.detail}" for c in broken) or tuple(layout_text(found).splitlines()),
        changes(base, found) if base is not None else (),
    )
