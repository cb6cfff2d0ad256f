"""Access paths: every way in which a guest's registers meet KVM, as Cases.

A family is one source under ``guests/``; what differs between them is data, so it is a table here and no module each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Final

from harness.case import Case
from harness.cpuid import CpuProfile
from harness.modes import MODES
from harness.paths.absent import absent_cases
from harness.paths.apx import apx_exit_cases, apx_off_cases
from harness.paths.apx_nested import apx_nested_cases
from harness.paths.common import Family, cases
from harness.paths.high import high_cases
from harness.paths.hypercall import hypercall_cases
from harness.paths.mmio_stack import mmio_stack_cases
from harness.paths.nested import nested_cases
from harness.paths.resume import resume_cases
from harness.paths.smm import smm_cases
from harness.paths.step import step_cases
from harness.paths.upper import upper_cases
from harness.paths.vector import vector_cases
from harness.paths.window import window_cases
from harness.paths.wrap import wrap_cases

__all__ = ["FAMILIES", "FAMILY_NAMES", "Family", "all_cases", "cases"]

# The kinds of decoding differ by code size and by segmentation, not by paging: plain instructions need no more modes.
_DECODING: Final = ("real", "vm86", "prot32", "compat-user", "long", "long-user")
_MEMORY: Final = ("real", "prot16", "prot32", "pse", "pae", "compat", "long", "long-user", "long5")
_SYSTEM: Final = ("real", "prot16", "prot32", "pae", "vm86", "compat", "long", "long-user")

FAMILIES: Final = (
    Family("gpr", (*_DECODING, "pae")),
    Family("alu", ("real", "prot32", "compat-user", "long", "long-user"), seeds=2),
    Family("flow", (*_DECODING, "prot16", "pse")),
    Family("io", MODES, seeds=2, iopl=True),
    Family("mmio", _MEMORY),
    Family("control", _SYSTEM),
    Family("msr", MODES, msrs=True),
    Family("segment", tuple(m for m in MODES if m != "long5"), msrs=True),
    Family("string", MODES),
    Family("flags", MODES, seeds=2, iopl=True),
    Family("fault", MODES, msrs=True),
    Family("walk", ("real",)),
    Family("pdpte", ("pae",)),
    Family("apx", ("real", "prot32", "compat", "long", "long-user"), features=frozenset({"apx"})),
    Family("apx_evex", ("real", "prot32", "long", "long-user"), features=frozenset({"apx"})),
    Family("apx_xsave", ("long", "long-user"), features=frozenset({"apx"})),
)

# Families whose guests are those of others, or whose actions are not one run to the end.
_MORE: Final[Mapping[str, Callable[[CpuProfile], Iterator[Case]]]] = {
    "resume": resume_cases, "step": step_cases, "hypercall": hypercall_cases, "upper": upper_cases,
    "nested": nested_cases, "mmio_stack": mmio_stack_cases, "vector": vector_cases, "window": window_cases,
    "wrap": wrap_cases, "smm": smm_cases, "high": high_cases, "apx_exits": apx_exit_cases, "apx_off": apx_off_cases,
    "apx_nested": apx_nested_cases, "absent": absent_cases,
}  # fmt: skip

FAMILY_NAMES: Final = (*(f.name for f in FAMILIES), *_MORE)
"""Of all Cases that :func:`all_cases` makes: what their names begin with, up to the slash."""
_FORCED: Final = frozenset(
    {"gpr", "alu", "flow", "io", "mmio", "control", "msr", "segment", "string", "flags", "fault"}
)



def forced_cases(profile: CpuProfile) -> list[Case]:
    """The Cases of the families with plain entries once more, each instruction forced through KVM's emulator.

    They need ``kvm.force_emulation_prefix=1`` ("fep" in ``requires``).
    """
    found = [c for f in FAMILIES if f.name in _FORCED for c in cases(f, profile, forced=True)]
    for more in (wrap_cases, window_cases, high_cases):
        found.extend(more(profile, forced=True))
    return found


def all_cases(profile: CpuProfile, *, families: Iterable[str] | None = None, seeds: int | None = None) -> list[Case]:
    """Every Case of the suite for a guest that sees ``profile``, in a stable order with stable, unique names.

    ``families`` restricts, ``seeds`` overrides the number of start states per entry. A Case that this profile cannot
    run is in the list all the same: its ``requires`` says what it lacks. ValueError for an unknown family.
    """
    wanted = None if families is None else set(families)
    unknown = (wanted or set()).difference(FAMILY_NAMES)
    if unknown:
        raise ValueError(f"no family named {', '.join(sorted(unknown))}: use {', '.join(FAMILY_NAMES)}")
    out = [c for f in FAMILIES if wanted is None or f.name in wanted for c in cases(f, profile, seeds=seeds)]
    for name, more in _MORE.items():
        if wanted is None or name in wanted:
            out.extend(more(profile))
    return out
