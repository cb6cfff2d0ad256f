"""Code that runs over the end of its 4 GiB, from EIP FFFFFFFFH to 0: wherever EIP is advanced it has to be cut."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Final

from harness.case import Case
from harness.cpuid import CpuProfile
from harness.paths.common import Family, cases, guest_for

_FAMILY: Final = Family("wrap", ("prot32",))
_LABEL: Final = "end_"


def wrap_cases(profile: CpuProfile, *, forced: bool = False) -> Iterator[Case]:
    """The Cases of this family: the label ``end_NAME`` of each entry (guests/wrap.S) is at EIP 0, by the base of CS."""
    for case in cases(_FAMILY, profile, forced=forced):
        entry = case.origin.rpartition(":t_")[2]
        base = guest_for(_FAMILY.source, "prot32", forced).symbols[_LABEL + entry]
        cs = replace(case.start.cs, base=base)
        yield replace(case, start=replace(case.start, cs=cs, rip=(case.start.rip - base) & 0xFFFFFFFF))
