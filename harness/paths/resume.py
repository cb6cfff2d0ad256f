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
from harness.modes import STUBS
from harness.paths.common import Family, cases

_NEW: Final = (("rbp", 0x5A5A1234), ("rdx", 0x0BADCAFE), ("rflags", 0x8D6))
# Registers that no entry of _WHILE_PENDING writes, but for INS, which moves rDI.
_OTHERS: Final = (("rbp", 0x5A5A1234), ("rsi", 0x1357), ("rdi", 0x2468))
_VARIANTS: Final[dict[str, tuple[Action, ...]]] = {
    "set_regs": (Run(), SetState(_NEW), Run(64)),
    "sync_regs": (Run(), SetState(_NEW, "sync"), Run(64)),
    "set_sregs": (Run(), SetState((("cr2", 0x12345000),), "sregs"), Run(64)),
    "save_restore": (Run(), SaveRestore(), Run(64)),
    "pending": (Run(1, complete=False), Complete(), Run(64)),
    "pending_rip": (Run(1, complete=False), SetState((("rip", STUBS + 16 * 0x77),)), Complete(), Run(64)),
    "pending_set": (Run(1, complete=False), SetState(_OTHERS), Complete(), Run(64)),
    "pending_sync": (Run(1, complete=False), SetState(_OTHERS, "sync"), Complete(), Run(64)),
}
_GUESTS: Final = (
    Family("io", ("real", "prot16", "prot32", "compat", "long")), Family("mmio", ("real", "prot32", "compat", "long")),
)  # fmt: skip
_ENTRIES: Final = ("out_imm", "out_dx", "in_imm", "in_dx", "load_", "store_")
_WRITES: Final = ("out_imm", "out_dx", "store_")
_WHILE_PENDING: Final[dict[str, tuple[str, ...]]] = {
    "pending_rip": _WRITES, "pending_set": (*_WRITES, "ins_"), "pending_sync": (*_WRITES, "ins_"),
}  # fmt: skip
"""Entries for which it is said what becomes of registers set meanwhile: nothing is left to do, or INS goes on from
them. (What a read is to end up in is KVM's own affair: its emulator then leaves that register as userspace set it.)
"""


def resume_cases(profile: CpuProfile) -> Iterator[Case]:
    """The Cases of this family; their names start with ``resume/``."""
    for family in _GUESTS:
        for case in cases(family, profile, seeds=1):
            entry = case.name.split("/", 1)[1]
            for name, actions in _VARIANTS.items():
                if not entry.startswith(_WHILE_PENDING.get(name, _ENTRIES)):
                    continue
                yield replace(case, name=f"resume/{name}/{entry}", actions=actions)
