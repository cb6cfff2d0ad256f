"""Registers with upper halves in compatibility mode, where code sees 32 bits of them.

KVM_GET_REGS and KVM_SET_REGS are raw: all 64 bits of what 64-bit code left there go in, stay as long as nothing writes
the register, and come out. A 32-bit write clears the upper half, narrower ones leave it (SDM vol. 1 3.4.1.1; what
happens to upper halves in the change of modes itself, which manuals leave open, is not looked at).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Final

from harness.case import Case
from harness.cpuid import CpuProfile
from harness.paths.common import Family, cases

_FAMILIES: Final = (Family("gpr", ("compat", "compat-user")), Family("io", ("compat",)), Family("mmio", ("compat",)))
_RSP: Final = 4
_LEGACY: Final = 16
_LEFT_OPEN: Final = ("gpr/enter", "gpr/leave")
"""KVM's emulator leaves the upper half of RBP where these write EBP; no 64-bit code may rely on either value."""


def with_upper_halves(case: Case) -> Case:
    """``case`` with an upper half of its own in each register but RSP."""
    gpr = tuple(
        value if n == _RSP or n >= _LEGACY else value | (0xA0000000 + 0x01010101 * n) << 32
        for n, value in enumerate(case.start.gpr)
    )
    return replace(case, start=replace(case.start, gpr=gpr))


def upper_cases(profile: CpuProfile) -> Iterator[Case]:
    """The Cases of this family: those of others, in compatibility mode; their names start with ``upper/``."""
    for family in _FAMILIES:
        for case in cases(family, profile, seeds=1):
            if not case.name.startswith(_LEFT_OPEN):
                yield replace(with_upper_halves(case), name=f"upper/{case.name}")
