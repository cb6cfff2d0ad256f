"""Valid start states: every mode of the processor with its descriptor tables, page tables and exception stubs.

Guest-physical layout (one RAM slot 0..0x20000)::

    0x00000 IVT (real mode)         0x05000 page tables
    0x01000 GDT                     0x0A000 code (CODE_BASE)
    0x01800 LDT                     0x10000 data (DATA_BASE), by segment: DS, ES +0x1000, FS +0x2000, GS +0x3000
    0x02000 IDT                     0x18000 current stack, top 0x1A000
    0x03000 TSS                     0x1C000 page not present, 0x1D000 page read-only (in paged modes)
    0x04000 stubs, 16 bytes each    0x1E000 kernel stack, top 0x1F000
    0xA0000..0xBFFFF no slot: MMIO, mapped identically wherever there is paging

Every exception ends in a HLT of its own at ``STUBS + 16 * vector``, at CPL0.  Accessed, dirty and busy bits are set
from the start, so nothing changes behind the scenes.  Sources: SDM vol. 3A 3.4.5 (descriptors), 4 (paging), 6.14
(64-bit gates), 8.2 (TSS), 20.2 (real-mode IVT), 20.3 (virtual-8086).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from typing import Any, Final

from harness.case import Blob
from harness.cpuid import CpuProfile
from harness.state import CpuState, Segment, Table

MODES: Final = (
    "real", "prot16", "prot32", "pse", "pae", "vm86", "compat", "compat-user", "prot32-user", "long", "long-user",
    "long5",
)  # fmt: skip

GDT, LDT, IDT, TSS, STUBS, PAGE_TABLES = 0x1000, 0x1800, 0x2000, 0x3000, 0x4000, 0x5000
CODE_BASE: Final = 0xA000
CODE_END: Final = 0x10000
DATA_BASE: Final = 0x10000
STACK_BASE: Final = 0x18000
STACK_TOP: Final = 0x1A000
STACK_END: Final = 0x1C000
ABSENT_PAGE: Final = 0x1C000
HIGH: Final = 0xFFFF800000000000
"""Where 64-bit modes with 4-level paging have all of memory a second time."""
READONLY_PAGE: Final = 0x1D000
KERNEL_STACK_TOP: Final = 0x1F000
RAM_SIZE: Final = 0x20000
MMIO_LINEAR: Final = 0xA0000
MMIO_END: Final = 0xC0000
SEGMENT_BASES: Final = {
    "ds": DATA_BASE, "es": DATA_BASE + 0x1000, "fs": DATA_BASE + 0x2000, "gs": DATA_BASE + 0x3000, "ss": STACK_BASE,
}  # fmt: skip

# Selectors in the GDT (table indicator and RPL clear). The user's have DPL 3.
SEL_CS, SEL_DS, SEL_ES, SEL_FS, SEL_GS, SEL_SS = 0x08, 0x10, 0x18, 0x20, 0x28, 0x30
SEL_TSS, SEL_LDT = 0x40, 0x50  # 16 bytes each in long mode
SEL_UCS, SEL_UDS, SEL_USS, SEL_UES, SEL_UFS, SEL_UGS = 0x60, 0x68, 0x70, 0x78, 0x80, 0x88
SEL_FLAT, SEL_CODE32, SEL_CODE64, SEL_CODE16, SEL_KSS16 = 0x90, 0x98, 0xA0, 0xA8, 0xB0
SEL_ABSENT, SEL_READONLY, SEL_EXPAND, SEL_CONFORMING, SEL_MMIO = 0xB8, 0xC0, 0xC8, 0xD0, 0xD8
SEL_KCODE, SEL_KDATA, SEL_UCODE32, SEL_UDATA, SEL_UCODE64, SEL_UDATA64 = 0x100, 0x108, 0x110, 0x118, 0x120, 0x128
"""SEL_KCODE.. are in the order that SYSCALL/SYSRET and SYSENTER/SYSEXIT count from STAR and SYSENTER_CS."""
SEL_LDT_DATA, SEL_LDT_CODE = 0x04, 0x0C
GDT_LIMIT: Final = 0x7FF
FLAT_LIMIT: Final = 0xFFFFFFFF

_CODE, _DATA = 0xB, 0x3  # accessed: execute/read, read/write
_PAGED: Final = frozenset({"pse", "pae", "compat", "compat-user", "long", "long-user", "long5"})
_LMA: Final = frozenset({"compat", "compat-user", "long", "long-user", "long5"})
_USER: Final = frozenset({"vm86", "compat-user", "prot32-user", "long-user"})
_BITS16: Final = frozenset({"real", "prot16", "vm86"})
_BITS64: Final = frozenset({"long", "long-user", "long5"})

_CR0_PE, _CR0_MP, _CR0_ET, _CR0_NE, _CR0_WP, _CR0_PG = 1, 1 << 1, 1 << 4, 1 << 5, 1 << 16, 1 << 31
_CR4_PSE, _CR4_PAE, _CR4_OSFXSR, _CR4_OSXMMEXCPT = 1 << 4, 1 << 5, 1 << 9, 1 << 10
_CR4_LA57, _CR4_OSXSAVE = 1 << 12, 1 << 18
_EFER_SCE, _EFER_LME, _EFER_LMA, _EFER_NX = 1, 1 << 8, 1 << 10, 1 << 11
_XCR0_X87, _XCR0_SSE, _XCR0_APX = 1, 1 << 1, 1 << 19


@dataclass(frozen=True)
class Setup:
    """A start state and the RAM it needs (tables and stubs, not the code). ``bits``: size of code at ``entry``."""

    mode: str
    bits: int
    cpl: int
    state: CpuState
    blobs: tuple[Blob, ...]


def bits_of(mode: str) -> int:
    """Code size of a mode: 16, 32 or 64."""
    return 16 if mode in _BITS16 else 64 if mode in _BITS64 else 32


def cpl_of(mode: str) -> int:
    """Privilege level at which a mode starts."""
    return 3 if mode in _USER else 0


def paged(mode: str) -> bool:
    """True when CR0.PG is set in this mode."""
    return mode in _PAGED


def setup(mode: str, *, entry: int, profile: CpuProfile | None = None) -> Setup:
    """The start state of ``mode`` with RIP at linear address ``entry``, and its tables.

    ``profile`` decides EFER.NX, EFER.SCE and (for APX) CR4.OSXSAVE with XCR0; without one everything but APX is there.
    ValueError for an unknown mode, or a 16-bit entry above 64 KiB.
    """
    if mode not in MODES:
        raise ValueError(f"no mode named {mode!r}: use one of {', '.join(MODES)}")
    if mode in _BITS16 and entry > 0xFFFF:
        raise ValueError(f"entry {entry:#x} is out of reach of 16-bit code with CS base 0")
    gdt = _gdt(mode)
    state = _control(CpuState(rip=entry), mode, profile)
    state = _segments(state, mode, gdt)
    top = STACK_TOP - state.ss.base
    gpr = (0, 0, 0, 0, top, *(0,) * 27)
    blobs = [Blob(STUBS, b"".join(b"\xf4".ljust(16, b"\xcc") for _ in range(256)))]
    if mode == "real":
        blobs.append(Blob(0, b"".join(struct.pack("<HH", STUBS + 16 * n, 0) for n in range(256))))
    else:
        blobs += [
            Blob(GDT, b"".join(gdt.get(8 * n, b"").ljust(8, b"\0") for n in range(256) if gdt.get(8 * n) != b"")),
            Blob(LDT, encode_segment(_LDT_DATA) + encode_segment(replace(_LDT_CODE, db=int(bits_of(mode) == 32)))),
            Blob(IDT, _idt(mode)),
            Blob(TSS, _tss(mode)),
        ]
    blobs += _page_tables(mode)
    return Setup(mode, bits_of(mode), cpl_of(mode), replace(state, gpr=gpr), tuple(blobs))


# --- descriptors ----------------------------------------------------------------------------------------------------


def encode_segment(seg: Segment, *, wide: bool = False) -> bytes:
    """The descriptor whose hidden part is ``seg``: 8 bytes, or 16 for a system segment in long mode (``wide``).

    ValueError when a byte limit does not fit the granularity (SDM vol. 3A 3.4.5).
    """
    limit = seg.limit
    if seg.g:
        if limit & 0xFFF != 0xFFF:
            raise ValueError(f"limit {limit:#x} is not one of 4 KiB granularity")
        limit >>= 12
    if limit > 0xFFFFF:
        raise ValueError(f"limit {seg.limit:#x} needs 4 KiB granularity")
    access = seg.type | seg.s << 4 | seg.dpl << 5 | seg.present << 7
    flags = limit >> 16 | seg.avl << 4 | seg.l << 5 | seg.db << 6 | seg.g << 7
    low = struct.pack(
        "<HHBBBB", limit & 0xFFFF, seg.base & 0xFFFF, seg.base >> 16 & 0xFF, access, flags, seg.base >> 24 & 0xFF
    )
    return low + struct.pack("<II", seg.base >> 32, 0) if wide else low


def decode_segment(selector: int, data: bytes) -> Segment:
    """The hidden part that loading ``selector`` makes of a descriptor of 8 or 16 bytes."""
    low, mid, high, access, flags, top = struct.unpack_from("<HHBBBB", data)
    limit = low | (flags & 0xF) << 16
    base = mid | high << 16 | top << 24
    if len(data) >= 16:
        base |= int.from_bytes(data[8:12], "little") << 32
    g = flags >> 7
    return Segment(
        selector=selector, base=base, limit=limit << 12 | 0xFFF if g else limit, type=access & 0xF,
        s=access >> 4 & 1, dpl=access >> 5 & 3, present=access >> 7, avl=flags >> 4 & 1, l=flags >> 5 & 1,
        db=flags >> 6 & 1, g=g,
    )  # fmt: skip


def _flat(type_: int, dpl: int = 0, *, db: int = 1, l: int = 0) -> Segment:
    return Segment(limit=FLAT_LIMIT, type=type_, dpl=dpl, db=db, l=l, g=1)


_LDT_DATA: Final = Segment(base=DATA_BASE + 0x4000, limit=0x3FFF, type=_DATA, dpl=3)
_LDT_CODE: Final = Segment(base=0, limit=0xFFFF, type=_CODE)


def _data(mode: str, name: str, dpl: int) -> Segment:
    """A data segment: based and limited, or flat in 64-bit mode (where FS and GS keep a base); AVL in some."""
    base, avl = SEGMENT_BASES[name], int(name in ("es", "gs"))
    if mode in _BITS64:
        return replace(_flat(_DATA, dpl), base=base if name in ("fs", "gs") else 0, avl=avl)
    end = STACK_END if name == "ss" else STACK_BASE
    return Segment(base=base, limit=end - base - 1, type=_DATA, dpl=dpl, db=int(bits_of(mode) == 32), avl=avl)


def _code(mode: str, dpl: int) -> Segment:
    if mode == "prot16":
        return Segment(base=0, limit=0xFFFF, type=_CODE, dpl=dpl)
    return _flat(_CODE, dpl, db=int(mode not in _BITS64), l=int(mode in _BITS64))


def _gdt(mode: str) -> dict[int, bytes]:
    """Selector -> descriptor. The upper half of a 16-byte one is ``b""`` at its own place (it is in the lower's)."""
    wide = mode in _LMA
    tss_type = 3 if mode == "prot16" else 0xB
    tss_limit = 0x2B if mode == "prot16" else 0x67
    rows: dict[int, Segment] = {
        SEL_CS: _code(mode, 0), SEL_UCS: _code(mode, 3), SEL_FLAT: _flat(_DATA, 3),
        SEL_CODE32: _flat(_CODE), SEL_CODE64: _flat(_CODE, db=0, l=1), SEL_CODE16: Segment(limit=0xFFFF, type=_CODE),
        SEL_KSS16: Segment(base=STACK_BASE, limit=0x7FFF, type=_DATA),
        SEL_ABSENT: replace(_flat(_DATA, 3), present=0), SEL_READONLY: replace(_flat(1, 3)),
        SEL_EXPAND: Segment(base=DATA_BASE, limit=0xFFF, type=7, dpl=3, db=0),
        SEL_CONFORMING: replace(_code(mode, 0), type=0xF),
        SEL_MMIO: Segment(base=MMIO_LINEAR, limit=MMIO_END - MMIO_LINEAR - 1, type=_DATA, dpl=3, db=1),
        SEL_KCODE: _flat(_CODE, db=int(not wide), l=int(wide)), SEL_KDATA: _flat(_DATA),
        SEL_UCODE32: _flat(_CODE, 3), SEL_UDATA: _flat(_DATA, 3), SEL_UCODE64: _flat(_CODE, 3, db=0, l=1),
        SEL_UDATA64: _flat(_DATA, 3),
        SEL_TSS: Segment(base=TSS, limit=tss_limit, type=tss_type, s=0),
        SEL_LDT: Segment(base=LDT, limit=0x7FF, type=2, s=0),
    }  # fmt: skip
    for name, kernel, user in _DATA_SELECTORS:
        rows[kernel] = _data(mode, name, 0)
        rows[user] = _data(mode, name, 3)
    out = {sel: encode_segment(seg, wide=wide and not seg.s) for sel, seg in rows.items()}
    if wide:
        out[SEL_TSS + 8] = out[SEL_LDT + 8] = b""
    return out


_DATA_SELECTORS: Final = (
    ("ds", SEL_DS, SEL_UDS), ("es", SEL_ES, SEL_UES), ("fs", SEL_FS, SEL_UFS), ("gs", SEL_GS, SEL_UGS),
    ("ss", SEL_SS, SEL_USS),
)  # fmt: skip


def _idt(mode: str) -> bytes:
    """256 interrupt gates to the stubs; DPL 3 for INT3, INTO and vectors from 80H, so INT n meets both kinds."""
    out = b""
    for n in range(256):
        offset = STUBS + 16 * n
        access = 0x80 | (3 if n in (3, 4) or n >= 0x80 else 0) << 5
        if mode in _LMA:
            out += struct.pack("<HHBBHII", offset, SEL_CODE64, 0, access | 0xE, 0, 0, 0)
        elif mode == "prot16":
            out += struct.pack("<HHBBH", offset, SEL_CS, 0, access | 0x6, 0)
        else:
            out += struct.pack("<HHBBH", offset, SEL_CS, 0, access | 0xE, 0)
    return out


def _tss(mode: str) -> bytes:
    """The TSS: the kernel's stack and, save in the 16-bit one, an I/O map base past the limit."""
    if mode == "prot16":
        return struct.pack("<HHH", 0, KERNEL_STACK_TOP - STACK_BASE, SEL_KSS16).ljust(0x2C, b"\0")
    if mode in _LMA:
        return struct.pack("<IQ", 0, KERNEL_STACK_TOP).ljust(0x66, b"\0") + struct.pack("<H", 0x68)
    return struct.pack("<III", 0, KERNEL_STACK_TOP, SEL_KDATA).ljust(0x66, b"\0") + struct.pack("<H", 0x68)


# --- registers ------------------------------------------------------------------------------------------------------


def _control(state: CpuState, mode: str, profile: CpuProfile | None) -> CpuState:
    has = (lambda name: name != "apx") if profile is None else (lambda name: name in profile.features)
    cr0 = _CR0_ET | _CR0_NE
    cr4 = efer = cr3 = 0
    if mode != "real":
        cr0 |= _CR0_PE | _CR0_MP
    if mode in _PAGED:
        cr0 |= _CR0_PG | _CR0_WP
        cr3 = PAGE_TABLES
    if mode == "pse":
        cr4 = _CR4_PSE
    elif mode == "pae":
        cr4 = _CR4_PAE
        state = replace(state, pdptr=(PAGE_TABLES + 0x1000 | 1, 0, 0, 0))
    if mode in _LMA:
        cr4 = _CR4_PAE | _CR4_OSFXSR | _CR4_OSXMMEXCPT
        efer = _EFER_LME | _EFER_LMA | (_EFER_NX if has("nx") else 0) | (_EFER_SCE if has("syscall") else 0)
        if has("apx"):
            cr4 |= _CR4_OSXSAVE
            state = replace(state, xcr0=_XCR0_X87 | _XCR0_SSE | _XCR0_APX)
    if mode == "long5":
        cr4 |= _CR4_LA57
        cr3 = _PML5
    rflags = 0x23002 if mode == "vm86" else 2  # VM, IOPL 3
    return replace(state, cr0=cr0, cr3=cr3, cr4=cr4, efer=efer, rflags=rflags, dr6=0xFFFF0FF0, dr7=0x400)


def _segments(state: CpuState, mode: str, gdt: dict[int, bytes]) -> CpuState:
    if mode in ("real", "vm86"):
        dpl = cpl_of(mode)
        values: dict[str, Any] = {n: Segment(selector=b >> 4, base=b, dpl=dpl) for n, b in SEGMENT_BASES.items()}
        values["cs"] = Segment(type=_DATA if mode == "vm86" else _CODE, dpl=dpl)
    else:
        rpl = cpl_of(mode)
        user = mode in _USER
        values = {n: decode_segment((u if user else k) | rpl, gdt[u if user else k]) for n, k, u in _DATA_SELECTORS}
        cs = SEL_UCS if user else SEL_CS
        values["cs"] = decode_segment(cs | rpl, gdt[cs])
    if mode == "real":
        return replace(state, **values, gdtr=Table(0, 0xFFFF), idtr=Table(0, 0x3FF))
    values["tr"] = decode_segment(SEL_TSS, gdt[SEL_TSS])
    values["ldtr"] = decode_segment(SEL_LDT, gdt[SEL_LDT])
    idt_limit = 0xFFF if mode in _LMA else 0x7FF
    return replace(state, **values, gdtr=Table(GDT, GDT_LIMIT), idtr=Table(IDT, idt_limit))


# --- paging ---------------------------------------------------------------------------------------------------------

_P, _RW, _US, _A, _D, _PS = 1, 2, 4, 1 << 5, 1 << 6, 1 << 7
_TABLE: Final = _P | _RW | _US | _A
_PML5: Final = PAGE_TABLES + 0x4000


def _leaf(address: int) -> int:
    """Flags of the 4 KiB page at ``address``: code, data, stack and MMIO belong to the user, the rest does not."""
    if address == ABSENT_PAGE:
        return 0
    user = CODE_BASE <= address < KERNEL_STACK_TOP - 0x1000 or address >= RAM_SIZE
    return _P | _A | _D | (0 if address == READONLY_PAGE else _RW) | (_US if user else 0)


def _table(entries: dict[int, int], width: int) -> bytes:
    out = bytearray(4096)
    for index, value in entries.items():
        out[index * width : (index + 1) * width] = value.to_bytes(width, "little")
    return bytes(out)


def _page_tables(mode: str) -> list[Blob]:
    """Identity maps: 4 KiB pages first, then one large page (4 MiB with PSE, 2 MiB with PAE and above)."""
    if mode not in _PAGED:
        return []
    at = PAGE_TABLES
    if mode == "pse":
        pages = {n: n << 12 | _leaf(n << 12) if _leaf(n << 12) else 0 for n in range(1024)}
        directory = {0: at + 0x1000 | _TABLE, 1: 0x400000 | _TABLE | _D | _PS}
        return [Blob(at, _table(directory, 4)), Blob(at + 0x1000, _table(pages, 4))]
    pages = {n: n << 12 | _leaf(n << 12) if _leaf(n << 12) else 0 for n in range(512)}
    large = 0x200000 | _TABLE | _D | _PS
    if mode == "pae":  # a PDPTE has no R/W, U/S, A (SDM vol. 3A table 4-8)
        return [
            Blob(at, _table({0: at + 0x1000 | _P}, 8)),
            Blob(at + 0x1000, _table({0: at + 0x2000 | _TABLE, 1: large}, 8)),
            Blob(at + 0x2000, _table(pages, 8)),
        ]
    blobs = [  # the same at linear 0 and at HIGH
        Blob(at, _table({0: at + 0x1000 | _TABLE, 256: at + 0x1000 | _TABLE}, 8)),
        Blob(at + 0x1000, _table({0: at + 0x2000 | _TABLE}, 8)),
        Blob(at + 0x2000, _table({0: at + 0x3000 | _TABLE, 1: large}, 8)),
        Blob(at + 0x3000, _table(pages, 8)),
    ]
    if mode == "long5":
        blobs.append(Blob(_PML5, _table({0: at | _TABLE}, 8)))
    return blobs


# --- what guests know -----------------------------------------------------------------------------------------------


def assembler_constants(mode: str) -> dict[str, int]:
    """Symbols for ``as --defsym``: addresses as this mode's code sees them, and selectors with its RPL.

    ``DS_OFF`` .. ``SS_OFF``: offset of the area that belongs to that segment register; ``MMIO_OFF``: offset of the
    hole once ``SEL_MMIO`` is in a segment register (64-bit code needs none).  ``SEL_FLAT`` is 4 GiB, base 0.
    """
    bits, rpl = bits_of(mode), cpl_of(mode)
    flat64 = bits == 64
    out = {
        "BITS": bits, "USER": int(rpl == 3), "REALSEG": int(mode in ("real", "vm86")),
        "CODE_BASE": CODE_BASE, "DATA_LINEAR": DATA_BASE, "MMIO_LINEAR": MMIO_LINEAR,
        "MMIO_OFF": MMIO_LINEAR if flat64 else 0, "ABSENT_LINEAR": ABSENT_PAGE, "READONLY_LINEAR": READONLY_PAGE,
        "STACK_OFF": STACK_TOP if flat64 else STACK_TOP - STACK_BASE, "STUBS": STUBS,
        "GDT_LINEAR": GDT, "GDT_LIMIT": GDT_LIMIT, "IDT_LINEAR": 0 if mode == "real" else IDT,
        "CR3_VALUE": PAGE_TABLES if mode in _PAGED else 0,
        "DS_OFF": DATA_BASE if flat64 else 0, "ES_OFF": DATA_BASE + 0x1000 if flat64 else 0, "FS_OFF": 0, "GS_OFF": 0,
    }  # fmt: skip
    if out["REALSEG"]:
        out.update({f"SEL_{n.upper()}": b >> 4 for n, b in SEGMENT_BASES.items()})
        out.update(SEL_CS=0, SEL_FLAT=0, SEL_MMIO=MMIO_LINEAR >> 4, SEL_OTHER=(DATA_BASE + 0x4000) >> 4)
        return out
    user = mode in _USER
    out.update({f"SEL_{n.upper()}": (u if user else k) | rpl for n, k, u in _DATA_SELECTORS})
    out.update(
        SEL_CS=(SEL_UCS if user else SEL_CS) | rpl, SEL_FLAT=SEL_FLAT | rpl, SEL_MMIO=SEL_MMIO | rpl,
        SEL_OTHER=SEL_LDT_DATA | rpl, SEL_LDT_DATA=SEL_LDT_DATA | rpl, SEL_LDT_CODE=SEL_LDT_CODE | rpl,
        SEL_ABSENT=SEL_ABSENT | rpl, SEL_READONLY=SEL_READONLY | rpl, SEL_EXPAND=SEL_EXPAND | rpl,
        SEL_CONFORMING=SEL_CONFORMING | rpl, SEL_CODE16=SEL_CODE16, SEL_CODE32=SEL_CODE32, SEL_CODE64=SEL_CODE64,
        SEL_KCODE=SEL_KCODE, SEL_KDATA=SEL_KDATA, SEL_UCODE32=SEL_UCODE32 | 3, SEL_UDATA=SEL_UDATA | 3,
        SEL_UCODE64=SEL_UCODE64 | 3, SEL_TSS=SEL_TSS, SEL_LDT=SEL_LDT,
    )  # fmt: skip
    return out
