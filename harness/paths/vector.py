"""Exceptions in a VM whose RAM nothing has touched yet: the delivery itself exits, and has to be taken up again.

With nested paging every page that the delivery needs (IDT, GDT, TSS, stack) is missing in the nested tables, with
shadow paging in the shadow ones: the processor reports the event it was about to deliver, and KVM must inject it again
with its error code (APM vol. 2 15.7.2 and 15.20).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Final

from harness.case import Action, Case, Run, SaveRestore
from harness.cpuid import CpuProfile
from harness.modes import cpl_of
from harness.paths.common import Family, cases

_MODES: Final = ("real", "prot16", "prot32", "pae", "compat", "compat-user", "long", "long-user")
_FAMILY: Final = Family("vector", _MODES)
_ACTIONS: Final[tuple[Action, ...]] = (Run(1), SaveRestore(), Run(64))
_IOPL3: Final = 0x3000


def vector_cases(profile: CpuProfile) -> Iterator[Case]:
    """The Cases of this family; at CPL 3 with IOPL 3, for their first exit is an OUT."""
    for case in cases(_FAMILY, profile):
        mode = case.name.partition("@")[2].partition("#")[0]
        start, requires = case.start, case.requires
        if cpl_of(mode) == 3:
            start = replace(start, rflags=start.rflags | _IOPL3)
            requires |= {"trait:iopl3-at-long-cpl3"} if mode == "long-user" else frozenset()
        yield replace(case, start=start, requires=requires, actions=_ACTIONS)
