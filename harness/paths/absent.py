"""An instruction that the guest's CPUID does not have, on MMIO: #UD, and no exit to userspace.

The processor under KVM may have it, and executes it on RAM whatever the guest's CPUID says. On MMIO it comes to KVM's
emulator, which has to ask that CPUID before it does anything (SDM vol. 2B MOVBE: #UD if CPUID.01H:ECX[22] is 0).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Final

from harness.case import Case
from harness.cpuid import CpuProfile, with_features
from harness.paths.common import Family, cases

_MMIO: Final = Family("mmio", ("real", "prot32", "compat", "long"))
_FEATURE: Final = "movbe"


def absent_cases(profile: CpuProfile) -> Iterator[Case]:
    """The Cases of this family: those of MMIO that need the feature, without it; their names start with ``absent/``."""
    bare = with_features(profile, remove=(_FEATURE,))
    for case in cases(_MMIO, bare):
        if _FEATURE in case.requires:
            yield replace(case, name=f"absent/{case.name}", requires=case.requires - {_FEATURE})
