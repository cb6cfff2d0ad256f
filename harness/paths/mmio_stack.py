"""Stacks in the MMIO hole: the stack pointer, and what is pushed and popped, while userspace has to do each access."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Final

from harness.case import Case, Run
from harness.cpuid import CpuProfile
from harness.modes import MMIO_LINEAR
from harness.paths.common import Family, cases

_FAMILY: Final = Family("mmio_stack", ("real", "prot16", "prot32", "compat", "long"))

_EXITS: Final = {"ret_far": 2, "iret": 3}
"""Entries that go where the device says: the exits up to there."""


def mmio_stack_cases(profile: CpuProfile) -> Iterator[Case]:
    """The Cases of this family: SS has its base at the hole, where it has one at all."""
    for case in cases(_FAMILY, profile):
        start = case.start
        if case.bits != 64:
            selector = start.ss.selector if start.cr0 & 1 else MMIO_LINEAR >> 4
            start = replace(start, ss=replace(start.ss, base=MMIO_LINEAR, selector=selector))
        exits = next((n for name, n in _EXITS.items() if f"/{name}" in case.name), 64)
        yield replace(case, start=start, actions=(Run(exits),))
