"""CPUID: the feature bits that the harness knows by name, and the CPU profile that is made of leaves.

A :class:`CpuProfile` is what the guest sees; the same leaves go to KVM_SET_CPUID2 and to the reference model.
Sources: SDM vol. 2A CPUID, APM vol. 3 appendix E, Intel APX specification (leaf 7.1 EDX[21]).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Final

# name -> (leaf, subleaf, register, bit)
FEATURES: Final[dict[str, tuple[int, int, str, int]]] = {
    "fpu": (1, 0, "edx", 0), "vme": (1, 0, "edx", 1), "de": (1, 0, "edx", 2), "pse": (1, 0, "edx", 3),
    "tsc": (1, 0, "edx", 4), "msr": (1, 0, "edx", 5), "pae": (1, 0, "edx", 6), "cx8": (1, 0, "edx", 8),
    "apic": (1, 0, "edx", 9), "sep": (1, 0, "edx", 11), "mtrr": (1, 0, "edx", 12), "pge": (1, 0, "edx", 13),
    "cmov": (1, 0, "edx", 15), "pat": (1, 0, "edx", 16), "pse36": (1, 0, "edx", 17), "clflush": (1, 0, "edx", 19),
    "fxsr": (1, 0, "edx", 24), "sse": (1, 0, "edx", 25), "sse2": (1, 0, "edx", 26),
    "sse3": (1, 0, "ecx", 0), "cx16": (1, 0, "ecx", 13), "pcid": (1, 0, "ecx", 17), "sse42": (1, 0, "ecx", 20),
    "movbe": (1, 0, "ecx", 22), "popcnt": (1, 0, "ecx", 23), "xsave": (1, 0, "ecx", 26), "osxsave": (1, 0, "ecx", 27),
    "avx": (1, 0, "ecx", 28), "rdrand": (1, 0, "ecx", 30), "hypervisor": (1, 0, "ecx", 31),
    "fsgsbase": (7, 0, "ebx", 0), "bmi1": (7, 0, "ebx", 3), "smep": (7, 0, "ebx", 7), "bmi2": (7, 0, "ebx", 8),
    "invpcid": (7, 0, "ebx", 10), "mpx": (7, 0, "ebx", 14), "rdseed": (7, 0, "ebx", 18), "adx": (7, 0, "ebx", 19),
    "smap": (7, 0, "ebx", 20), "umip": (7, 0, "ecx", 2), "pku": (7, 0, "ecx", 3), "ospke": (7, 0, "ecx", 4),
    "shstk": (7, 0, "ecx", 7), "la57": (7, 0, "ecx", 16), "rdpid": (7, 0, "ecx", 22), "fsrm": (7, 0, "edx", 4),
    "ibt": (7, 0, "edx", 20), "apx": (7, 1, "edx", 21),
    "xsaveopt": (0xD, 1, "eax", 0), "xsavec": (0xD, 1, "eax", 1), "xgetbv1": (0xD, 1, "eax", 2),
    "xsaves": (0xD, 1, "eax", 3),
    "syscall": (0x80000001, 0, "edx", 11), "nx": (0x80000001, 0, "edx", 20), "pdpe1gb": (0x80000001, 0, "edx", 26),
    "rdtscp": (0x80000001, 0, "edx", 27), "lm": (0x80000001, 0, "edx", 29), "lahf_lm": (0x80000001, 0, "ecx", 0),
    "svm": (0x80000001, 0, "ecx", 2), "cr8_legacy": (0x80000001, 0, "ecx", 4), "abm": (0x80000001, 0, "ecx", 5),
    "tbm": (0x80000001, 0, "ecx", 21), "vmx": (1, 0, "ecx", 5),
}  # fmt: skip


_HEAD: Final = struct.Struct("<I4x")  # struct kvm_cpuid2 before its entries
_ENTRY: Final = struct.Struct("<7I12x")  # struct kvm_cpuid_entry2


@dataclass(frozen=True, slots=True)
class CpuidEntry:
    """One CPUID leaf as in ``struct kvm_cpuid_entry2``; flags bit 0: the subleaf index is significant."""

    function: int
    index: int = 0
    flags: int = 0
    eax: int = 0
    ebx: int = 0
    ecx: int = 0
    edx: int = 0


@dataclass(frozen=True)
class CpuProfile:
    """The processor that a guest sees: its CPUID leaves. Vendor, features and address widths follow from them."""

    cpuid: tuple[CpuidEntry, ...]

    @property
    def rows(self) -> list[list[int]]:
        """The leaves as rows of numbers: function, index, flags, EAX, EBX, ECX, EDX."""
        return [[getattr(e, f.name) for f in fields(CpuidEntry)] for e in self.cpuid]

    @classmethod
    def from_rows(cls, rows: Iterable[Iterable[int]]) -> CpuProfile:
        """The inverse of :attr:`rows`. TypeError when a row is none."""
        return cls(tuple(CpuidEntry(*row) for row in rows))

    def leaf(self, function: int, index: int = 0) -> CpuidEntry | None:
        """The entry that CPUID with these inputs selects, or None. Subleaves count only where flags say so."""
        return self._by_key.get((function, index)) or self._by_key.get((function, -1))

    @cached_property
    def _by_key(self) -> dict[tuple[int, int], CpuidEntry]:
        return {(e.function, e.index if e.flags & 1 else -1): e for e in self.cpuid}

    @cached_property
    def packed(self) -> bytes:
        """The leaves as ``struct kvm_cpuid2`` lays them out, for KVM_SET_CPUID2."""
        rows = (_ENTRY.pack(e.function, e.index, e.flags, e.eax, e.ebx, e.ecx, e.edx) for e in self.cpuid)
        return _HEAD.pack(len(self.cpuid)) + b"".join(rows)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the leaves."""
        import hashlib  # when it is used: see harness/case.py

        return hashlib.sha256(json.dumps(self.rows).encode()).hexdigest()

    @cached_property
    def vendor(self) -> str:
        """``AuthenticAMD``, ``GenuineIntel`` or what the leaves say."""
        entry = self.leaf(0)
        if entry is None:
            return ""
        raw = b"".join(v.to_bytes(4, "little") for v in (entry.ebx, entry.edx, entry.ecx))
        return raw.decode("ascii", "replace")

    @property
    def amd(self) -> bool:
        """Behaves as an AMD processor where AMD and Intel differ (Hygon is AMD's too)."""
        return self.vendor in ("AuthenticAMD", "HygonGenuine")

    @cached_property
    def features(self) -> frozenset[str]:
        """Names from :data:`FEATURES` whose bit is set."""
        found = []
        for name, (function, index, register, bit) in FEATURES.items():
            entry = self.leaf(function, index)
            if entry is not None and getattr(entry, register) >> bit & 1:
                found.append(name)
        return frozenset(found)

    @cached_property
    def maxphyaddr(self) -> int:
        """Physical address width in bits (leaf 80000008H EAX[7:0]; 36 without it, SDM vol. 3A 4.1.4)."""
        entry = self.leaf(0x80000008)
        return entry.eax & 0xFF if entry is not None and entry.eax & 0xFF else 36

    @cached_property
    def xcr0_supported(self) -> int:
        """XCR0 bits that XSETBV accepts (leaf DH subleaf 0, EDX:EAX)."""
        entry = self.leaf(0xD, 0)
        return entry.edx << 32 | entry.eax if entry is not None else 0

    def xsave_offset(self, component: int) -> int | None:
        """Offset in bytes of an XSAVE component in the standard format (leaf DH), None when not enumerated."""
        entry = self.leaf(0xD, component)
        return entry.ebx if entry is not None and entry.eax else None


def without_apx(profile: CpuProfile) -> CpuProfile:
    """A copy of ``profile`` of a processor that has no APX: no feature bit, no bit in XCR0, no state component 19."""
    rows = []
    for e in with_features(profile, remove=("apx",)).cpuid:
        if (e.function, e.index) == (0xD, 19) or e.function == 0x29:
            continue
        rows.append(replace(e, eax=e.eax & ~(1 << 19)) if (e.function, e.index) == (0xD, 0) else e)
    return CpuProfile(tuple(rows))


def with_features(profile: CpuProfile, *, add: Iterable[str] = (), remove: Iterable[str] = ()) -> CpuProfile:
    """A copy of ``profile`` with named feature bits set or cleared. KeyError for a name not in :data:`FEATURES`.

    A leaf that is not there is made for ``add``.
    """
    leaves = {(e.function, e.index): e for e in profile.cpuid}
    for names, value in ((add, 1), (remove, 0)):
        for name in names:
            function, index, register, bit = FEATURES[name]
            entry = leaves.get((function, index))
            if entry is None:
                if not value:
                    continue
                entry = CpuidEntry(function, index, int(function in (7, 0xD)))
            regs = {r: getattr(entry, r) for r in ("eax", "ebx", "ecx", "edx")}
            regs[register] = regs[register] & ~(1 << bit) | value << bit
            leaves[function, index] = CpuidEntry(entry.function, entry.index, entry.flags, **regs)
    return CpuProfile(tuple(leaves[key] for key in sorted(leaves)))
