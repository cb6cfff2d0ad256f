"""Guests under KVM_GUESTDBG_SINGLESTEP: after each instruction a debug exit, between them those to devices.

The last step is the one before the HLT: whether a step over HLT shows the halt or the step is KVM's own affair.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Final

from harness.case import Case, Step
from harness.cpuid import CpuProfile
from harness.paths.common import Family, cases

_FAMILY: Final = Family("step", ("real", "prot16", "prot32", "compat", "long"))
_LOADING_DS: Final = 2  # instructions that reach the MMIO hole through DS


def step_cases(profile: CpuProfile) -> Iterator[Case]:
    """The Cases of this family; their names start with ``step/``, then comes the number of steps (guests/step.S)."""
    for case in cases(_FAMILY, profile):
        count, _, what = case.name.partition("/")[2].partition("_")
        steps = int(count) + (_LOADING_DS if what.startswith("mmio_") and case.bits != 64 else 0)
        yield replace(case, actions=(Step(steps),))
