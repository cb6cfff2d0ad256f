"""System management mode: an SMI between two instructions, a handler, and RSM: every register must come back.

Where the handler changes the state-save area, that is what must come back. RAM is 0x20000 bytes as ever, and 64 KiB
from SMBASE on (0x30000: APM vol. 2 10.2.1), in both address spaces.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Final

from harness.case import Action, Blob, Case, Inject, Run, Slot, VmShape
from harness.cpuid import CpuProfile
from harness.guest import Guest
from harness.paths.common import Family, cases, guest_for

_FAMILY: Final = Family("smm", ("real", "prot16", "prot32", "pae", "compat", "long", "long5"))
_SMBASE: Final = 0x30000
_SHAPE: Final = VmShape((Slot(0, 0x20000), Slot(_SMBASE, 0x10000)), smm=True)
_ACTIONS: Final[tuple[Action, ...]] = (Run(1), Inject("smi"), Run(64))
_TRAIT: Final = "trait:smm"


def smm_cases(profile: CpuProfile) -> Iterator[Case]:
    """The Cases of this family: ``smm/HANDLER@MODE`` after an OUT, ``smm/in_HANDLER@MODE`` after an IN."""
    for case in cases(_FAMILY, profile):
        entry, _, where = case.name.partition("/")[2].partition("@")
        case = replace(case, requires=case.requires | {_TRAIT, "lm"})
        if not entry.startswith("go"):
            yield case
            continue
        guest = guest_for(_FAMILY.source, where.partition("#")[0])
        for name in (n.removeprefix("smm_") for n in guest.symbols if n.startswith("smm_")):
            memory = case.memory.plus(Blob(_SMBASE + 0x8000, _handler(guest, name)))
            prefix = "in_" if entry == "go_in" else ""
            yield replace(
                case, name=f"smm/{prefix}{name}@{where}", memory=memory, shape=_SHAPE, actions=_ACTIONS,
            )  # fmt: skip


def _handler(guest: Guest, name: str) -> bytes:
    """The bytes of a handler: it is 16-bit code that does not care where it is."""
    start, end = guest.symbols[f"smm_{name}"], guest.symbols[f"end_{name}"]
    blob = next(b for b in guest.blobs if b.gpa <= start < b.gpa + len(b.data))
    return blob.data[start - blob.gpa : end - blob.gpa]
