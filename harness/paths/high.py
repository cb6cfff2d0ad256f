"""64-bit code above 4 GiB: wherever RIP is advanced, saved or shown, all of its bits have to be there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Final

from harness.case import Case
from harness.cpuid import CpuProfile
from harness.modes import HIGH
from harness.paths.common import Family, cases

_FAMILIES: Final = tuple(
    Family(name, ("long",), msrs=name in ("msr", "fault", "control"))
    for name in ("io", "mmio", "flow", "control", "msr", "fault")
)
_FORCED: Final = ("io", "flow", "msr", "fault")


def high_cases(profile: CpuProfile, *, forced: bool = False) -> Iterator[Case]:
    """The Cases of this family: those of others, run where harness/modes.py has memory a second time."""
    for family in _FAMILIES:
        if forced and family.name not in _FORCED:
            continue
        for case in cases(family, profile, seeds=1, forced=forced):
            start = replace(case.start, rip=case.start.rip | HIGH)
            name = case.name.replace("forced/", "forced/high/") if forced else f"high/{case.name}"
            yield replace(case, name=name, start=start)
