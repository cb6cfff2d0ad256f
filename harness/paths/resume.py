"""What userspace may do to a vCPU between two KVM_RUNs: partial writes, SYNC_REGS, a pending operation, a fresh VM.

The guests are those of the port I/O and MMIO families; what is done at their first exit differs (api.rst section 5, and
KVM_CAP_SYNC_REGS in section 6).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Final

from harness.case import Action, Case, Complete, Run, SaveRestore, SetState
from harness.cpuid import CpuProfile
from harness.paths.common import Family, cases

_NEW: Final = (("rbp", 0x5A5A1234), ("rdx", 0x0BADCAFE), ("rflags", 0x8D6))
_VARIANTS: Final[dict[str, tuple[Action, ...]]] = {
    "set_regs": (Run(), SetState(_NEW), Run(64)),
    "sync_regs": (Run(), SetState(_NEW, "sync"), Run(64)),
    "set_sregs": (Run(), SetState((("cr2", 0x12345000),), "sregs"), Run(64)),
    "save_restore": (Run(), SaveRestore(), Run(64)),
    "pending": (Run(1, complete=False), Complete(), Run(64)),
}
_GUESTS: Final = (
    Family("io", ("real", "prot16", "prot32", "compat", "long")), Family("mmio", ("real", "prot32", "compat", "long")),
)  # fmt: skip
_ENTRIES: Final = ("out_imm", "out_dx", "in_imm", "in_dx", "load_", "store_")


def resume_cases(profile: CpuProfile) -> Iterator[Case]:
    """The Cases of this family; their names start with ``resume/``."""
    for family in _GUESTS:
        for case in cases(family, profile, seeds=1):
            entry = case.name.split("/", 1)[1]
            if not entry.startswith(_ENTRIES):
                continue
            for name, actions in _VARIANTS.items():
                yield replace(case, name=f"resume/{name}/{entry}", actions=actions)
