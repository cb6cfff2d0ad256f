"""What all access paths share: start registers, guest RAM, and the making of Cases out of a guest's entries."""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Final

from harness.case import Blob, Case, Memory, Run
from harness.cpuid import CpuProfile
from harness.guest import GUESTS_DIR, Guest, assemble, load
from harness.modes import (
    DATA_BASE,
    SEL_KCODE,
    SEL_UCODE32,
    STACK_TOP,
    STUBS,
    Setup,
    assembler_constants,
    bits_of,
    setup,
)
from harness.state import MSR_INDEX, PAT_RESET, CpuState

RUN_LIMIT: Final = 64
_RSP: Final = 4
_ARITHMETIC_FLAGS: Final = (0x1, 0x4, 0x10, 0x40, 0x80, 0x800)  # CF PF AF ZF SF OF
_IOPL3: Final = 0x3000
_CORNERS: Final = (
    0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0x100000000,
    0x7FFFFFFFFFFFFFFF, 0x8000000000000000, 0xFFFFFFFFFFFFFFFF, 0xFFFFFFFF80000000,
)  # fmt: skip

# Byte k of register n is 8n+k: every byte of the 32 registers is unique, so a wrong one is recognized at sight.
_PATTERN: Final = tuple(int.from_bytes(bytes(range(8 * n, 8 * n + 8)), "little") for n in range(32))

SYSTEM_MSRS: Final = tuple(
    sorted(
        (MSR_INDEX[name], value)
        for name, value in {
            "star": (SEL_UCODE32 | 3) << 48 | SEL_KCODE << 32,
            "lstar": STUBS + 16 * 0x90,
            "cstar": STUBS + 16 * 0x91,
            "syscall_mask": 0x40600,
            "kernel_gs_base": 0x1122334455667788 & 0x7FFFFFFFFFFF,
            "sysenter_cs": SEL_KCODE,
            "sysenter_esp": 0x1EF00,
            "sysenter_eip": STUBS + 16 * 0x92,
            "pat": PAT_RESET,
        }.items()
    )
)
"""MSRs with which SYSCALL and SYSENTER end in stubs of their own."""

# Features without which a mode, or an entry (by the start of its name), does not exist.
_MODE_FEATURES: Final = {
    "pse": ("pse",), "pae": ("pae",), "compat": ("lm",), "compat-user": ("lm",), "long": ("lm",),
    "long-user": ("lm",), "long5": ("lm", "la57"),
}  # fmt: skip
_ENTRY_FEATURES: Final = (
    ("cmpxchg16b", "cx16"), ("cmpxchg8b", "cx8"), ("cmov", "cmov"), ("syscall", "syscall"), ("real_to_long", "lm"),
    ("xsetbv", "xsave"), ("osxsave", "xsave"), ("movbe", "movbe"),
)  # fmt: skip
# (mode or any, start of the Case's name) -> the trait of harness/host.py that a host must have.
_ENTRY_TRAITS: Final = (
    ("long-user", "flags/pushf", "rflags-at-long-cpl3"), ("long-user", "flags/popf", "rflags-at-long-cpl3"),
    ("long-user", "flags/toggle", "rflags-at-long-cpl3"), ("long-user", "fault/tf_flag", "rflags-at-long-cpl3"),
    ("long-user", "msr/cpuid", "cpuid-at-long-cpl3"), ("long-user", "segment/", "selectors-at-long-cpl3"),
    ("long-user", "apx_off/cpuid", "cpuid-at-long-cpl3"),
    ("long-user", "control/cr1", "cr1-at-long-cpl3"), ("long-user", "control/cr5", "cr1-at-long-cpl3"),
    ("long-user", "fault/icebp", "icebp-at-long-cpl3"),
    ("compat", "segment/iret", "iret-in-compat"), ("compat-user", "segment/iret", "iret-in-compat"),
    ("", "msr/cpuid_7", "cpuid-leaf-7"), ("", "msr/cpuid_1", "cpuid-leaf-1"), ("", "control/osxsave", "cpuid-leaf-1"),
    ("", "msr/wrmsr_random_pat", "pat-reserved-types"),
)  # fmt: skip


@dataclass(frozen=True)
class Family:
    """One access path: a guest source, the modes it runs in, how many start states each entry gets.

    ``msrs``: the system MSRs are set and observed. ``iopl``: every second start state has IOPL 3.
    ``features``: needed by its 64-bit entries.
    """

    name: str
    modes: tuple[str, ...]
    seeds: int = 1
    msrs: bool = False
    iopl: bool = False
    features: frozenset[str] = frozenset()

    @property
    def source(self) -> str:
        """File name under ``guests/``."""
        return f"{self.name}.S"


def cases(
    family: Family, profile: CpuProfile, *, seeds: int | None = None, forced: bool = False
) -> Iterator[Case]:
    """The Cases of one family, by mode, then entry, then start state. GuestError when its source does not assemble.

    ``forced``: every instruction goes through KVM's emulator, by its force-emulation prefix.
    """
    prefix_name = "forced/" if forced else ""
    for mode in family.modes:
        guest, memory = _image(family.source, mode, profile, forced)
        base = setup(mode, entry=0, profile=profile)
        if family.msrs:
            base = replace(base, state=replace(base.state, msrs=SYSTEM_MSRS))
        requires = frozenset((f"mode:{mode}", *_MODE_FEATURES.get(mode, ())))
        if base.bits == 64:
            requires |= family.features
        if forced:
            requires |= {"fep"}
        for entry, address in guest.entries.items():
            needs = requires
            for prefix, feature in _ENTRY_FEATURES:
                if entry.startswith(prefix):
                    needs = needs | {feature}
            for where, prefix, trait in _ENTRY_TRAITS:
                if where in ("", mode) and f"{family.name}/{entry}".startswith(prefix):
                    needs = needs | {f"trait:{trait}"}
            entry_needs = needs
            for n in range(family.seeds if seeds is None else seeds):
                needs = entry_needs
                name = f"{prefix_name}{family.name}/{entry}@{mode}#{n}"
                seed = zlib.crc32(name.encode())
                start = start_state(base, address, seed, apx="apx" in needs & profile.features)
                if family.iopl and n % 2:
                    start = start.with_general(start.gpr, start.rip, start.rflags | _IOPL3)
                    if mode == "long-user":
                        needs |= {"trait:iopl3-at-long-cpl3"}
                yield Case(
                    name=name, memory=memory, start=start, profile=profile,
                    actions=_ACTIONS, bits=base.bits, requires=needs, seed=seed,
                    origin=f"guests/{family.source}:t_{entry}",
                )  # fmt: skip


_ACTIONS: Final = (Run(RUN_LIMIT),)


def start_state(base: Setup, address: int, seed: int, *, apx: bool = False) -> CpuState:
    """``base`` at linear ``address`` with general registers and arithmetic flags that ``seed`` determines.

    Most registers hold their pattern, some a corner value or a random one; RSP is the stack's. Outside 64-bit mode
    values have 32 bits (SDM vol. 1 3.4.1.1: the upper halves are undefined there); R16-R31 are zero without ``apx``.
    """
    rng = random.Random(seed)
    bits = rng.getrandbits(64)
    count = 32 if apx and base.bits == 64 else 16
    mask = 0xFFFFFFFFFFFFFFFF if base.bits == 64 else 0xFFFFFFFF
    gpr = list(_PATTERN[:count]) + [0] * (32 - count)
    for n in range(count):
        kind = bits >> 2 * (n & 15) & 3
        if kind == 1:
            gpr[n] = rng.getrandbits(64)
        elif kind == 2 and bits >> 32 + n & 1:
            gpr[n] = _CORNERS[rng.getrandbits(4)]
        gpr[n] &= mask
    gpr[_RSP] = base.state.gpr[_RSP]
    flags = base.state.rflags
    choice = rng.getrandbits(len(_ARITHMETIC_FLAGS))
    for n, flag in enumerate(_ARITHMETIC_FLAGS):
        if choice >> n & 1:
            flags |= flag
    return base.state.with_general(tuple(gpr), address - base.state.cs.base, flags)


@lru_cache(maxsize=256)
def guest_for(source: str, mode: str, forced: bool = False) -> Guest:
    """The guest ``guests/<source>`` as assembled for ``mode``; ``forced``: see :func:`harness.guest.assemble`."""
    constants = assembler_constants(mode)
    return load(assemble(GUESTS_DIR / source, bits=bits_of(mode), defines=constants, forced=forced))


@lru_cache(maxsize=256)
def _image(source: str, mode: str, profile: CpuProfile, forced: bool = False) -> tuple[Guest, Memory]:
    guest = guest_for(source, mode, forced)
    return guest, Memory((*setup(mode, entry=0, profile=profile).blobs, *_filling(), *guest.blobs))


@lru_cache(maxsize=1)
def _filling() -> tuple[Blob, ...]:
    """Contents for the data area and for the stack above its top, so that a read of the wrong place is seen."""
    rng = random.Random(0x4B564D)
    return Blob(DATA_BASE, rng.randbytes(0x5000)), Blob(STACK_TOP - 0x100, rng.randbytes(0x200))
