"""CpuState: every register of a vCPU by its manual's name, its diff, and its way to and from the KVM structures.

The byte layouts below are those of ``struct kvm_regs``, ``kvm_sregs``, ``kvm_sregs2``, ``kvm_debugregs``,
``kvm_xcrs`` and ``kvm_vcpu_events`` (arch/x86/include/uapi/asm/kvm.h).  They are spelled as ``struct`` formats so that
this module, which the reference model imports, never touches the KVM bindings; tests/unit/test_state.py holds them
against harness/kvm_ioctl.py.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from operator import attrgetter, itemgetter
from typing import Any, Final

MASK64: Final = (1 << 64) - 1

GPR_NAMES: Final = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", *(f"r{n}" for n in range(8, 32)))
"""The 32 general-purpose registers in their encoding order (SDM vol. 2A 2.1, APX spec for R16-R31)."""

SEGMENT_NAMES: Final = ("es", "cs", "ss", "ds", "fs", "gs", "ldtr", "tr")
"""ES..GS in their Sreg encoding order (SDM vol. 2A table B-8), then the two system segments."""

RFLAGS_BITS: Final = {
    0: "CF", 2: "PF", 4: "AF", 6: "ZF", 7: "SF", 8: "TF", 9: "IF", 10: "DF", 11: "OF", 12: "IOPL0", 13: "IOPL1",
    14: "NT", 16: "RF", 17: "VM", 18: "AC", 19: "VIF", 20: "VIP", 21: "ID",
}  # fmt: skip
CR0_BITS: Final = {
    0: "PE", 1: "MP", 2: "EM", 3: "TS", 4: "ET", 5: "NE", 16: "WP", 18: "AM", 29: "NW", 30: "CD", 31: "PG",
}  # fmt: skip
CR4_BITS: Final = {
    0: "VME", 1: "PVI", 2: "TSD", 3: "DE", 4: "PSE", 5: "PAE", 6: "MCE", 7: "PGE", 8: "PCE", 9: "OSFXSR",
    10: "OSXMMEXCPT", 11: "UMIP", 12: "LA57", 13: "VMXE", 14: "SMXE", 16: "FSGSBASE", 17: "PCIDE", 18: "OSXSAVE",
    20: "SMEP", 21: "SMAP", 22: "PKE", 23: "CET", 24: "PKS", 25: "UINTR", 28: "LAM_SUP", 32: "FRED",
}  # fmt: skip
EFER_BITS: Final = {
    0: "SCE", 8: "LME", 10: "LMA", 11: "NX", 12: "SVME", 13: "LMSLE", 14: "FFXSR", 15: "TCE", 21: "AIBRSE",
}  # fmt: skip
XCR0_BITS: Final = {
    0: "X87", 1: "SSE", 2: "AVX", 3: "BNDREGS", 4: "BNDCSR", 5: "OPMASK", 6: "ZMM_Hi256", 7: "Hi16_ZMM", 9: "PKRU",
    17: "TILECFG", 18: "TILEDATA", 19: "APX",
}  # fmt: skip
DR6_BITS: Final = {0: "B0", 1: "B1", 2: "B2", 3: "B3", 11: "BLD", 13: "BD", 14: "BS", 15: "BT", 16: "RTM"}
DR7_BITS: Final = {
    0: "L0", 1: "G0", 2: "L1", 3: "G1", 4: "L2", 5: "G2", 6: "L3", 7: "G3", 8: "LE", 9: "GE", 11: "RTM", 13: "GD",
}  # fmt: skip
BIT_NAMES: Final[Mapping[str, Mapping[int, str]]] = {
    "rflags": RFLAGS_BITS, "cr0": CR0_BITS, "cr4": CR4_BITS, "efer": EFER_BITS, "xcr0": XCR0_BITS, "dr6": DR6_BITS,
    "dr7": DR7_BITS,
}  # fmt: skip

# MSRs that hold register state: name -> index (SDM vol. 4, APM vol. 2 appendix A).
MSR_INDEX: Final = {
    "sysenter_cs": 0x174, "sysenter_esp": 0x175, "sysenter_eip": 0x176, "pat": 0x277, "star": 0xC0000081,
    "lstar": 0xC0000082, "cstar": 0xC0000083, "syscall_mask": 0xC0000084, "kernel_gs_base": 0xC0000102,
    "tsc_aux": 0xC0000103,
}  # fmt: skip
MSR_NAME: Final = {index: name for name, index in MSR_INDEX.items()}
PAT_RESET: Final = 0x0007040600070406


@dataclass(frozen=True, slots=True)
class Segment:
    """A segment register with its hidden part.

    ``limit`` is in bytes (granularity already applied, as in ``struct kvm_segment``); ``type`` is the 4-bit descriptor
    type, ``s`` 1 for code/data.
    """

    selector: int = 0
    base: int = 0
    limit: int = 0xFFFF
    type: int = 3
    s: int = 1
    dpl: int = 0
    present: int = 1
    avl: int = 0
    l: int = 0
    db: int = 0
    g: int = 0
    unusable: int = 0


@dataclass(frozen=True, slots=True)
class Table:
    """GDTR or IDTR."""

    base: int = 0
    limit: int = 0xFFFF


@dataclass(frozen=True, slots=True)
class Events:
    """The part of ``struct kvm_vcpu_events`` that is architectural state between two instructions.

    ``shadow`` is 1 while interrupts are held off after MOV SS or STI.  (KVM tells the two kinds apart on VMX only, so
    it is a truth value here.)
    """

    shadow: int = 0
    nmi_masked: int = 0
    nmi_pending: int = 0
    smm: int = 0
    exception_injected: int = 0
    exception_pending: int = 0
    exception_nr: int = 0
    exception_has_error: int = 0
    exception_error: int = 0
    interrupt_injected: int = 0
    interrupt_nr: int = 0
    interrupt_soft: int = 0
    triple_fault: int = 0


_REAL_CS: Final = Segment(type=0xB)
_LDT_OFF: Final = Segment(type=2, s=0)
_TR_RESET: Final = Segment(type=0xB, s=0)


@dataclass(frozen=True)
class CpuState:
    """The whole register state of one vCPU. Defaults are those of a vCPU in real mode with everything cleared.

    ``gpr`` holds 32 values in encoding order (R16-R31 are zero and meaningless unless the profile has APX);
    ``pdptr`` is meaningful under PAE paging only; ``msrs`` maps MSR index to value for every MSR under observation.
    """

    gpr: tuple[int, ...] = (0,) * 32
    rip: int = 0
    rflags: int = 2
    es: Segment = Segment()
    cs: Segment = _REAL_CS
    ss: Segment = Segment()
    ds: Segment = Segment()
    fs: Segment = Segment()
    gs: Segment = Segment()
    ldtr: Segment = _LDT_OFF
    tr: Segment = _TR_RESET
    gdtr: Table = Table()
    idtr: Table = Table(0, 0x3FF)
    cr0: int = 0x10
    cr2: int = 0
    cr3: int = 0
    cr4: int = 0
    cr8: int = 0
    efer: int = 0
    apic_base: int = 0xFEE00900
    xcr0: int = 1
    pdptr: tuple[int, int, int, int] = (0, 0, 0, 0)
    dr: tuple[int, int, int, int] = (0, 0, 0, 0)
    dr6: int = 0xFFFF0FF0
    dr7: int = 0x400
    ssp: int = 0
    pkru: int = 0
    msrs: tuple[tuple[int, int], ...] = ()
    events: Events = Events()

    def flat(self) -> dict[str, int]:
        """Every register under its flat name: ``rax``, ``cs.base``, ``gdtr.limit``, ``pdptr2``, ``msr.star``."""
        out = dict(zip(GPR_NAMES, self.gpr, strict=True))
        out["rip"] = self.rip
        out["rflags"] = self.rflags
        for name in SEGMENT_NAMES:
            seg = getattr(self, name)
            for part in SEGMENT_PARTS:
                out[f"{name}.{part}"] = getattr(seg, part)
        for name in ("gdtr", "idtr"):
            table = getattr(self, name)
            out[f"{name}.base"] = table.base
            out[f"{name}.limit"] = table.limit
        for name in _SCALARS:
            out[name] = getattr(self, name)
        out.update((f"pdptr{i}", v) for i, v in enumerate(self.pdptr))
        out.update((f"dr{i}", v) for i, v in enumerate(self.dr))
        out.update((msr_flat_name(index), value) for index, value in self.msrs)
        for part in EVENT_PARTS:
            out[f"events.{part}"] = getattr(self.events, part)
        return out

    def with_general(self, gpr: tuple[int, ...], rip: int, rflags: int) -> CpuState:
        """A copy with other general registers; made ten times as fast as by ``replace``, for every Case has one."""
        made = object.__new__(CpuState)
        made.__dict__.update(self.__dict__, gpr=gpr, rip=rip, rflags=rflags)
        return made

    def with_(self, changes: Mapping[str, int]) -> CpuState:
        """A copy with the registers named in ``changes`` (flat names) replaced. KeyError names an unknown register."""
        plain: dict[str, Any] = {}
        lists: dict[str, list[int]] = {}
        parts: dict[str, dict[str, int]] = {}
        msrs = dict(self.msrs)
        for name, value in changes.items():
            if name in GPR_INDEX:
                lists.setdefault("gpr", list(self.gpr))[GPR_INDEX[name]] = value
            elif name in _SCALARS or name in ("rip", "rflags"):
                plain[name] = value
            elif name.startswith("msr."):
                msrs[msr_index(name)] = value
            elif "." in name and name.split(".", 1)[0] in (*SEGMENT_NAMES, "gdtr", "idtr", "events"):
                owner, part = name.split(".", 1)
                parts.setdefault(owner, {})[part] = value
            elif name[:-1] in ("pdptr", "dr") and name[-1].isdigit() and int(name[-1]) < 4:
                lists.setdefault(name[:-1], list(getattr(self, name[:-1])))[int(name[-1])] = value
            else:
                raise KeyError(f"no register named {name!r}")
        for owner, values in parts.items():
            try:
                plain[owner] = replace(getattr(self, owner), **values)
            except TypeError:
                raise KeyError(f"no register named {owner}.{'/'.join(values)}") from None
        plain.update((name, tuple(values)) for name, values in lists.items())
        if msrs != dict(self.msrs):
            plain["msrs"] = tuple(sorted(msrs.items()))
        return replace(self, **plain)

    @classmethod
    def from_flat(cls, values: Mapping[str, int]) -> CpuState:
        """The inverse of :meth:`flat`; registers left out keep their defaults."""
        return cls().with_(values)


SEGMENT_PARTS: Final = tuple(f.name for f in fields(Segment))
EVENT_PARTS: Final = tuple(f.name for f in fields(Events))
GPR_INDEX: Final = {name: i for i, name in enumerate(GPR_NAMES)}
_SCALARS: Final = (
    "cr0", "cr2", "cr3", "cr4", "cr8", "efer", "apic_base", "xcr0", "dr6", "dr7", "ssp", "pkru",
)  # fmt: skip


def flat_text(state: CpuState) -> str:
    """``state.flat()`` as the shortest JSON, keys sorted.

    Most states share everything but the general registers with the last ones: that much is kept.
    """
    general = {**dict(zip(GPR_NAMES, state.gpr, strict=True)), "rip": state.rip, "rflags": state.rflags}
    text: str = _flat_form(_REST(state)) % _SORTED(general)
    return text


_GENERAL: Final = sorted((*GPR_NAMES, "rip", "rflags"))
_SORTED: Final = itemgetter(*_GENERAL)
_REST_NAMES: Final = tuple(f.name for f in fields(CpuState) if f.name not in ("gpr", "rip", "rflags"))
_REST: Final = attrgetter(*_REST_NAMES)


@lru_cache(maxsize=256)
def _flat_form(rest: tuple[Any, ...]) -> str:
    """The text of a state with places for its general registers. (``%d``, for True is equal to 1, and kept as such.)"""
    flat = CpuState(**dict(zip(_REST_NAMES, rest, strict=True))).flat()
    rows = [f'"{name}":' + ("%d" if name in _GENERAL else f"{value:d}") for name, value in sorted(flat.items())]
    return "{" + ",".join(rows) + "}"


def msr_flat_name(index: int) -> str:
    """``msr.star`` for a known MSR, ``msr.0x10`` for any other."""
    return f"msr.{MSR_NAME.get(index) or hex(index)}"


def msr_index(flat_name: str) -> int:
    """The inverse of :func:`msr_flat_name`. KeyError when it is neither a known name nor a number."""
    name = flat_name.removeprefix("msr.")
    if name in MSR_INDEX:
        return MSR_INDEX[name]
    try:
        return int(name, 0)
    except ValueError:
        raise KeyError(f"no MSR named {name!r}") from None


# --- difference -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class FieldDiff:
    """One register that differs. ``bits`` names the bits in ``xor`` where the register has named bits."""

    name: str
    expected: int
    got: int
    bits: tuple[str, ...] = field(default=())

    @property
    def xor(self) -> int:
        """The bits in which the two values differ."""
        return self.expected ^ self.got

    def __str__(self) -> str:
        tail = f"  ({' '.join(self.bits)})" if self.bits else ""
        return f"{self.name}: expected {self.expected:#x}, got {self.got:#x}, xor {self.xor:#x}{tail}"


def bit_names(register: str, value: int) -> tuple[str, ...]:
    """Names of the bits set in ``value`` of ``register``; unnamed ones as ``bit N``; empty for plain registers."""
    names = BIT_NAMES.get(register)
    if names is None:
        return ()
    return tuple(names.get(i, f"bit {i}") for i in range(value.bit_length()) if value >> i & 1)


def diff(expected: CpuState, got: CpuState, ignore: Mapping[str, int] | None = None) -> list[FieldDiff]:
    """Registers in which two states differ, bits of ``ignore`` (flat name -> mask of undefined bits) left aside.

    A segment that was loaded with a null selector has no architectural content but that selector, FS and GS base in
    long mode, and SS.DPL, which holds the CPL; the rest is not compared once both sides call it null, unusable or not
    present, the last two being the words of VMX and SVM for the first (SDM vol. 3C 25.4.1; APM vol. 2 4.8.3, 15.5.1).
    """
    ignore = ignore or {}
    left, right = expected.flat(), got.flat()
    dead = {
        f"{seg}.{part}"
        for seg in SEGMENT_NAMES
        if _empty(left, seg) and _empty(right, seg)
        for part in SEGMENT_PARTS
        if part != "selector" and (seg, part) != ("ss", "dpl")
        if part != "base" or seg not in ("fs", "gs") or not left["efer"] & 1 << 10
    }
    out = []
    for name, want in left.items():
        have = right.get(name, want)
        if want != have and name not in dead and (want ^ have) & ~ignore.get(name, 0):
            out.append(FieldDiff(name, want, have, bit_names(name, (want ^ have) & ~ignore.get(name, 0))))
    return out


def _empty(flat: Mapping[str, int], segment: str) -> bool:
    """Unusable, not present, or loaded with a null selector in protected mode."""
    if flat[f"{segment}.unusable"] or not flat[f"{segment}.present"]:
        return True
    protected = flat["cr0"] & 1 and not flat["rflags"] & 1 << 17
    return bool(protected and segment not in ("cs", "tr") and not flat[f"{segment}.selector"] & 0xFFFC)


# --- the KVM structures ---------------------------------------------------------------------------------------------

_KVM_REGS: Final = struct.Struct("<18Q")
_KVM_REGS_ORDER: Final = (0, 3, 1, 2, 6, 7, 4, 5, *range(8, 16))  # rax rbx rcx rdx rsi rdi rsp rbp r8..r15
_in_kvm_order: Final = itemgetter(*_KVM_REGS_ORDER)
_SEGMENT: Final = struct.Struct("<QIH9Bx")
_SREGS_SEGMENTS: Final = ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldtr")
_DTABLE: Final = struct.Struct("<QH6x")
_CONTROL: Final = struct.Struct("<7Q")  # cr0 cr2 cr3 cr4 cr8 efer apic_base
_SREGS_HEAD: Final = struct.Struct("<" + "QIH9Bx" * 8 + "QH6x" * 2 + "7Q")
_DEBUGREGS: Final = struct.Struct("<4QQQQ72x")
_EVENTS: Final = struct.Struct("<BBBBI BBBB BBBx I I BBBB B26x B Q")

SIZEOF: Final = {"regs": 144, "sregs": 312, "sregs2": 320, "debugregs": 128, "events": 64}

# KVM_VCPUEVENT_VALID_* (asm/kvm.h)
_EVENTS_VALID_NMI_PENDING, _EVENTS_VALID_SHADOW, _EVENTS_VALID_SMM = 1, 4, 8


def pack_regs(s: CpuState) -> bytes:
    """``struct kvm_regs`` (144 bytes)."""
    return _KVM_REGS.pack(*_in_kvm_order(s.gpr), s.rip, s.rflags)


def _segment_tuple(s: Segment) -> tuple[int, ...]:
    return (s.base, s.limit, s.selector, s.type, s.present, s.dpl, s.db, s.s, s.l, s.g, s.avl, s.unusable)


def pack_sregs_head(s: CpuState) -> bytes:
    """The part that ``struct kvm_sregs`` and ``struct kvm_sregs2`` share: segments, tables, control registers."""
    values: list[int] = []
    for name in _SREGS_SEGMENTS:
        values.extend(_segment_tuple(getattr(s, name)))
    return _SREGS_HEAD.pack(
        *values, s.gdtr.base, s.gdtr.limit, s.idtr.base, s.idtr.limit,
        s.cr0, s.cr2, s.cr3, s.cr4, s.cr8, s.efer, s.apic_base,
    )  # fmt: skip


def pack_sregs(s: CpuState) -> bytes:
    """``struct kvm_sregs`` (312 bytes), interrupt_bitmap empty."""
    return pack_sregs_head(s) + bytes(32)


def pae_paging(s: CpuState) -> bool:
    """PAE paging: the one mode in which the PDPTRs exist (SDM vol. 3A 4.4.1)."""
    return bool(s.cr0 >> 31 & 1 and s.cr4 >> 5 & 1 and not s.efer >> 10 & 1)


def pack_sregs2(s: CpuState) -> bytes:
    """``struct kvm_sregs2`` (320 bytes); KVM_SREGS2_FLAGS_PDPTRS_VALID under PAE paging."""
    pae = pae_paging(s)
    return pack_sregs_head(s) + struct.pack("<5Q", int(pae), *(s.pdptr if pae else (0, 0, 0, 0)))


def pack_debugregs(s: CpuState) -> bytes:
    """``struct kvm_debugregs`` (128 bytes)."""
    return _DEBUGREGS.pack(*s.dr, s.dr6, s.dr7, 0)


def pack_events(s: CpuState) -> bytes:
    """``struct kvm_vcpu_events`` (64 bytes) with NMI_PENDING, SHADOW and SMM marked valid."""
    e = s.events
    flags = _EVENTS_VALID_NMI_PENDING | _EVENTS_VALID_SHADOW | _EVENTS_VALID_SMM
    return _EVENTS.pack(
        e.exception_injected, e.exception_nr, e.exception_has_error, e.exception_pending, e.exception_error,
        e.interrupt_injected, e.interrupt_nr, e.interrupt_soft, e.shadow,
        0, e.nmi_pending, e.nmi_masked, 0, flags, e.smm, 0, 0, 0, e.triple_fault, 0, 0,
    )  # fmt: skip


def unpack_regs(data: bytes) -> dict[str, Any]:
    """CpuState fields held by ``struct kvm_regs``; R16-R31 read as zero."""
    v = _KVM_REGS.unpack_from(data)
    gpr = [0] * 32
    for slot, index in enumerate(_KVM_REGS_ORDER):
        gpr[index] = v[slot]
    return {"gpr": tuple(gpr), "rip": v[16], "rflags": v[17]}


def unpack_sregs(data: bytes) -> dict[str, Any]:
    """CpuState fields held by ``struct kvm_sregs`` or, by its length, ``struct kvm_sregs2``."""
    v = _SREGS_HEAD.unpack_from(data)
    out: dict[str, Any] = {}
    for n, name in enumerate(_SREGS_SEGMENTS):
        base, limit, selector, type_, present, dpl, db, s, l, g, avl, unusable = v[12 * n : 12 * n + 12]
        out[name] = Segment(selector, base, limit, type_, s, dpl, present, avl, l, db, g, unusable)
    out["gdtr"], out["idtr"] = Table(v[96], v[97]), Table(v[98], v[99])
    out.update(zip(("cr0", "cr2", "cr3", "cr4", "cr8", "efer", "apic_base"), v[100:107], strict=True))
    if len(data) == SIZEOF["sregs2"]:
        out["pdptr"] = struct.unpack_from("<4Q", data, 288)
    return out


def unpack_debugregs(data: bytes) -> dict[str, Any]:
    """CpuState fields held by ``struct kvm_debugregs``."""
    v = _DEBUGREGS.unpack_from(data)
    return {"dr": v[:4], "dr6": v[4], "dr7": v[5]}


def unpack_events(data: bytes) -> dict[str, Any]:
    """CpuState fields held by ``struct kvm_vcpu_events``. What is stale (the number of no exception) reads as zero."""
    (injected, nr, has_error, pending, error, int_injected, int_nr, soft, shadow,
     _nmi_injected, nmi_pending, nmi_masked, _sipi, _flags, smm, _, _, _, triple, _, _) = (
        _EVENTS.unpack_from(data)
    )  # fmt: skip
    some = bool(injected or pending)
    return {
        "events": Events(
            shadow=int(bool(shadow)),
            nmi_masked=nmi_masked,
            nmi_pending=nmi_pending,
            smm=smm,
            exception_injected=injected,
            exception_pending=pending,
            exception_nr=nr if some else 0,
            exception_has_error=has_error if some else 0,
            exception_error=error if some else 0,
            interrupt_injected=int_injected,
            interrupt_nr=int_nr if int_injected else 0,
            interrupt_soft=soft if int_injected else 0,
            triple_fault=triple,
        )
    }


def pack_sections(state: CpuState, names: Iterable[str]) -> dict[str, bytes]:
    """The named sections of ``state`` as bytes (see :data:`SECTIONS`)."""
    return {name: SECTIONS[name][0](state) for name in names}


_NO_GPR: Final = (0,) * 32


def unpack_sections(sections: Mapping[str, bytes]) -> CpuState:
    """The state held by ``sections``; registers no section holds keep their defaults."""
    out: dict[str, Any] = {}
    egpr: tuple[int, ...] = ()
    for name, data in sections.items():
        values = SECTIONS[name][1](data)
        egpr = values.pop("egpr", egpr)
        out.update(values)
    if egpr:
        out["gpr"] = out.get("gpr", _NO_GPR)[:16] + egpr
    return CpuState(**out)


def stack_top(state: CpuState) -> int:
    """Linear address of SS:SP; in 64-bit mode the base of SS counts as zero (APM vol. 2 4.5.3)."""
    return state.gpr[4] & MASK64 if state.cs.l else state.ss.base + (state.gpr[4] & 0xFFFFFFFF)


def _pack_u64s(values: Iterable[int]) -> bytes:
    values = tuple(values)
    return struct.pack(f"<{len(values)}Q", *values)


def _unpack_msrs(data: bytes) -> dict[str, Any]:
    v = struct.unpack(f"<{len(data) // 8}Q", data)
    return {"msrs": tuple(zip(v[::2], v[1::2], strict=True))}


# Section -> (pack, unpack). The first five are KVM structures to the byte; the rest are compact images of what
# KVM_GET_XCRS, KVM_GET_XSAVE2 (components 19 and 9), KVM_GET_MSRS and KVM_GET_ONE_REG hold.
SECTIONS: Final[Mapping[str, tuple[Any, Any]]] = {
    "regs": (pack_regs, unpack_regs),
    "sregs": (pack_sregs, unpack_sregs),
    "sregs2": (pack_sregs2, unpack_sregs),
    "events": (pack_events, unpack_events),
    "debugregs": (pack_debugregs, unpack_debugregs),
    "xcr0": (lambda s: _pack_u64s((s.xcr0,)), lambda d: {"xcr0": struct.unpack("<Q", d)[0]}),
    "egpr": (lambda s: _pack_u64s(s.gpr[16:]), lambda d: {"egpr": struct.unpack("<16Q", d)}),
    "pkru": (lambda s: struct.pack("<I", s.pkru), lambda d: {"pkru": struct.unpack("<I", d)[0]}),
    "msrs": (lambda s: _pack_u64s(x for pair in s.msrs for x in pair), _unpack_msrs),
    "ssp": (lambda s: _pack_u64s((s.ssp,)), lambda d: {"ssp": struct.unpack("<Q", d)[0]}),
}
