"""The virtual machine control block of SVM: where its fields are, and its save area to and from a CpuState.

AMD64 Architecture Programmer's Manual vol. 2, appendix B (tables B-1, B-2) and 15.5. What a guest of the suite enters
with VMRUN is such a block, made here; the reference model reads and writes it by the same table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from harness.state import CpuState, Segment, Table

SIZE: Final = 4096
SAVE: Final = 0x400
# Control area: name -> (offset, size in bytes).
CONTROL: Final[Mapping[str, tuple[int, int]]] = {
    "cr_intercepts": (0x00, 4), "dr_intercepts": (0x04, 4), "exceptions": (0x08, 4), "intercepts1": (0x0C, 4),
    "intercepts2": (0x10, 4), "intercepts3": (0x14, 4), "iopm": (0x40, 8), "msrpm": (0x48, 8), "tsc_offset": (0x50, 8),
    "asid": (0x58, 4), "tlb_control": (0x5C, 1), "virtual_interrupt": (0x60, 8), "shadow": (0x68, 8),
    "exit_code": (0x70, 8), "exit_info1": (0x78, 8), "exit_info2": (0x80, 8), "exit_int_info": (0x88, 8),
    "nested_paging": (0x90, 8), "event_injection": (0xA8, 8), "nested_cr3": (0xB0, 8), "lbr": (0xB8, 8),
    "clean": (0xC0, 4), "next_rip": (0xC8, 8), "instruction_length": (0xD0, 1), "instruction": (0xD1, 15),
}  # fmt: skip
# State save area, from SAVE: registers of one number.
_PLAIN: Final[Mapping[str, tuple[int, int]]] = {
    "efer": (0xD0, 8), "cr4": (0x148, 8), "cr3": (0x150, 8), "cr0": (0x158, 8), "dr7": (0x160, 8), "dr6": (0x168, 8),
    "rflags": (0x170, 8), "rip": (0x178, 8), "rsp": (0x1D8, 8), "rax": (0x1F8, 8), "cr2": (0x240, 8),
}  # fmt: skip
_SEGMENTS: Final[Mapping[str, int]] = {
    "es": 0x00, "cs": 0x10, "ss": 0x20, "ds": 0x30, "fs": 0x40, "gs": 0x50, "ldtr": 0x70, "tr": 0x90,
}  # fmt: skip
_TABLES: Final[Mapping[str, int]] = {"gdtr": 0x60, "idtr": 0x80}
_CPL: Final = 0xCB
MSRS: Final[Mapping[int, int]] = {
    0xC0000081: 0x200, 0xC0000082: 0x208, 0xC0000083: 0x210, 0xC0000084: 0x218, 0xC0000102: 0x220,
    0x174: 0x228, 0x175: 0x230, 0x176: 0x238,
}  # fmt: skip
"""MSRs that VMLOAD and VMSAVE move: index -> offset from SAVE (STAR ... KernelGsBase, SYSENTER_*)."""
RFLAGS: Final = SAVE + 0x170
"""Offset of RFLAGS in the block."""
REGISTERS: Final[Mapping[str, int]] = {name: SAVE + at for name, (at, _) in _PLAIN.items()}
"""Registers of one number -> offset in the block; each has 8 bytes."""
SWITCHED: Final = ("es", "cs", "ss", "ds")
"""Segment registers that VMRUN and #VMEXIT switch; the others go by VMLOAD and VMSAVE (APM vol. 2 15.5.1, 15.5.2)."""
LOADED: Final = ("fs", "gs", "ldtr", "tr")

INTERCEPT_CPUID, INTERCEPT_HLT = 1 << 18, 1 << 24  # of intercepts1
INTERCEPT_VMRUN, INTERCEPT_VMMCALL = 1, 2  # of intercepts2

# Exit codes (appendix C). The first three groups are followed by a number; bit n of intercepts1 is code EXIT_FIRST + n,
# and intercepts2 goes on from there.
EXIT_CR, EXIT_DR, EXIT_EXCEPTION, EXIT_FIRST, EXIT_IOIO, EXIT_MSR = 0x00, 0x20, 0x40, 0x60, 0x7B, 0x7C
EXIT_WRITE: Final = 0x10
"""From the code of a read of a control or debug register to that of the write."""
EXIT_INVALID: Final = 0xFFFFFFFFFFFFFFFF
EXITS: Final[Mapping[str, int]] = {
    "sidt": 0x66, "sgdt": 0x67, "sldt": 0x68, "str": 0x69, "lidt": 0x6A, "lgdt": 0x6B, "lldt": 0x6C, "ltr": 0x6D,
    "rdtsc": 0x6E, "rdpmc": 0x6F, "pushf": 0x70, "popf": 0x71, "cpuid": 0x72, "rsm": 0x73, "iret": 0x74, "invd": 0x76,
    "pause": 0x77, "hlt": 0x78, "invlpg": 0x79, "invlpga": 0x7A, "ioio": EXIT_IOIO, "msr": EXIT_MSR, "vmrun": 0x80,
    "vmmcall": 0x81, "vmload": 0x82, "vmsave": 0x83, "stgi": 0x84, "clgi": 0x85, "rdtscp": 0x87, "wbinvd": 0x89,
    "xsetbv": 0x8D,
}  # fmt: skip
"""Instructions by name -> their exit codes."""
MSR_RANGES: Final = ((0, 0), (0xC0000000, 0x800), (0xC0010000, 0x1000))
"""First MSR, and where its bits begin in the permission map: two an MSR, for reads and writes (15.11)."""


def intercepts(*names: str) -> dict[str, int]:
    """The fields ``intercepts1`` and ``intercepts2`` for instructions by name."""
    bits = sum(1 << (EXITS[name] - EXIT_FIRST) for name in names)
    return {"intercepts1": bits & 0xFFFFFFFF, "intercepts2": bits >> 32}


def read(block: bytes, name: str) -> int:
    """A field of the control area."""
    at, size = CONTROL[name]
    return int.from_bytes(block[at : at + size], "little")


def pack_segment(seg: Segment) -> bytes:
    """16 bytes: selector, attributes, limit, base."""
    low = seg.type | seg.s << 4 | seg.dpl << 5 | seg.present << 7
    attributes = low | seg.avl << 8 | seg.l << 9 | seg.db << 10 | seg.g << 11
    limit = seg.limit & 0xFFFFFFFF
    return b"".join(v.to_bytes(n, "little") for v, n in ((seg.selector, 2), (attributes, 2), (limit, 4), (seg.base, 8)))


def segment_at(name: str) -> int:
    """Offset of a segment register in the block."""
    return SAVE + _SEGMENTS[name]


def unpack_segment(block: bytes, name: str) -> Segment:
    """A segment register of the save area of a whole block. A segment that is not present cannot be used."""
    at = segment_at(name)
    selector, a, limit, base = (
        int.from_bytes(block[at + start : at + end], "little") for start, end in ((0, 2), (2, 4), (4, 8), (8, 16))
    )
    return Segment(
        selector=selector, base=base, limit=limit, type=a & 15, s=a >> 4 & 1, dpl=a >> 5 & 3, present=a >> 7 & 1,
        avl=a >> 8 & 1, l=a >> 9 & 1, db=a >> 10 & 1, g=a >> 11 & 1, unusable=int(not a >> 7 & 1),
    )  # fmt: skip


def save_area(state: CpuState, segments: tuple[str, ...] = (*SWITCHED, *LOADED)) -> dict[int, bytes]:
    """Offset in the block -> bytes, of everything that the save area holds of ``state``."""
    out = {SAVE + _SEGMENTS[name]: pack_segment(getattr(state, name)) for name in segments}
    for name, at in _TABLES.items():
        table = getattr(state, name)
        out[SAVE + at + 4] = table.limit.to_bytes(4, "little")
        out[SAVE + at + 8] = table.base.to_bytes(8, "little")
    values = {**state.flat(), "efer": state.efer}
    out.update({SAVE + at: values[name].to_bytes(size, "little") for name, (at, size) in _PLAIN.items()})
    out[SAVE + _CPL] = bytes([state.ss.dpl])
    return out


def block(state: CpuState, **control: int) -> bytes:
    """A block to VMRUN into ``state``, with the fields of the control area that are named. KeyError for another."""
    out = bytearray(SIZE)
    for name, value in control.items():
        at, size = CONTROL[name]
        out[at : at + size] = value.to_bytes(size, "little")
    for at, data in save_area(state).items():
        out[at : at + len(data)] = data
    return bytes(out)


def enter(state: CpuState, block: bytes) -> CpuState:
    """``state`` with what VMRUN loads out of a block; the general registers but RAX and RSP stay."""
    plain = {name: int.from_bytes(block[SAVE + at :][:size], "little") for name, (at, size) in _PLAIN.items()}
    changes: dict[str, Any] = {name: unpack_segment(block, name) for name in SWITCHED}
    changes["ss"] = replace(changes["ss"], dpl=block[SAVE + _CPL])
    for name, at in _TABLES.items():
        limit = int.from_bytes(block[SAVE + at + 4 :][:4], "little")
        changes[name] = Table(int.from_bytes(block[SAVE + at + 8 :][:8], "little"), limit)
    return replace(state, **changes).with_(plain)
