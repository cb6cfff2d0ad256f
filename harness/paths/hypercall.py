"""Hypercalls (Documentation/virt/kvm/x86/hypercalls.rst): what a 32-bit caller passes and gets has 32 bits.

The one that leaves for userspace (KVM_HC_MAP_GPA_RANGE, by KVM_CAP_EXIT_HYPERCALL) shows its arguments there, and what
userspace answers comes back in RAX. In compatibility mode registers have upper halves that a hypercall must not see.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Final

from harness.case import Case, VmShape
from harness.cpuid import CpuProfile
from harness.modes import bits_of
from harness.paths.common import Family, cases
from harness.paths.upper import with_upper_halves
from harness.state import GPR_NAMES

_CAP_EXIT_HYPERCALL: Final = 201
_MAP_GPA_RANGE: Final = 12
_SHAPE: Final = VmShape(caps=((_CAP_EXIT_HYPERCALL, (1 << _MAP_GPA_RANGE,)),))
_MODES: Final = ("real", "prot16", "prot32", "compat", "compat-user", "long", "long-user", "long5")
_FAMILY: Final = Family("hypercall", _MODES)
_TRAIT: Final = "trait:hypercall"

_VARIANTS: Final[dict[str, dict[str, int]]] = {
    "poll": {"rax": 1},
    "unknown": {"rax": 99},
    "zero": {"rax": 0},
    "map": {"rax": _MAP_GPA_RANGE, "rbx": 0x7000, "rcx": 3, "rdx": 0x15},
    "map_high": {"rax": _MAP_GPA_RANGE, "rbx": 0xFFFFE000, "rcx": 1, "rdx": 0xFFFFFFF0},
    "map_unaligned": {"rax": _MAP_GPA_RANGE, "rbx": 0x7001, "rcx": 3, "rdx": 0x15},
    "map_nothing": {"rax": _MAP_GPA_RANGE, "rbx": 0x7000, "rcx": 0, "rdx": 0x15},
}
_WIDE: Final[dict[str, dict[str, int]]] = {
    "number_64": {"rax": 1 << 32 | 1},
    "map_64": {"rax": _MAP_GPA_RANGE, "rbx": 0x1234567000, "rcx": 1 << 33, "rdx": 1 << 63 | 0x10},
}
"""For 64-bit callers alone: values that do not fit 32 bits."""


def hypercall_cases(profile: CpuProfile) -> Iterator[Case]:
    """The Cases of this family; ``upper_`` in a name: the registers of 32-bit code have upper halves."""
    instruction = "vmmcall" if profile.amd else "vmcall"
    for case in cases(_FAMILY, profile):
        entry, _, where = case.name.partition("/")[2].partition("@")
        if entry != instruction:
            continue
        mode = where.partition("#")[0]
        variants = {**_VARIANTS, **(_WIDE if bits_of(mode) == 64 else {})}
        for name, registers in variants.items():
            gpr = list(case.start.gpr)
            for register, value in registers.items():
                gpr[GPR_NAMES.index(register)] = value
            start = replace(case.start, gpr=tuple(gpr))
            made = replace(
                case, name=f"hypercall/{name}@{where}", start=start, shape=_SHAPE, requires=case.requires | {_TRAIT}
            )
            yield made
            if mode.startswith("compat"):
                yield replace(with_upper_halves(made), name=f"hypercall/upper_{name}@{where}")
