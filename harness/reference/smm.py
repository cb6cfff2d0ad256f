"""System management mode: what an SMI saves and sets up, and RSM (APM vol. 2 chapter 10).

The state-save area is the one of processors with long mode (table 10-2). Fields that the table leaves to the
implementation are undefined. RSM's checks of the state it loads are not modelled.
"""

from __future__ import annotations

import struct
from dataclasses import replace
from typing import Final

from harness.reference.control import pae_paging
from harness.reference.cpu import CS, UD, Cpu, Fault, ModelError
from harness.reference.insn import Insn, Operation, Row
from harness.reference.paging import read_pdptes
from harness.state import SEGMENT_NAMES, Segment, Table

SMBASE: Final = 0x30000
"""Where it is after reset (10.2.1); nothing here moves it."""
_AREA, _SIZE = SMBASE + 0xFE00, 0x200
_ENTRY: Final = 0x8000
_REVISION: Final = 0x20064
_SEGMENTS: Final = 0x00  # ES, CS, SS, DS, FS, GS; then GDTR, LDTR, IDTR, TR; 16 bytes each
_GDTR, _LDTR, _IDTR, _TR = 0x60, 0x70, 0x80, 0x90
_EFER, _REVISION_AT, _SMBASE_AT = 0xD0, 0xFC, 0x100
_FIELDS: Final = {"cr4": 0x148, "cr3": 0x150, "cr0": 0x158, "dr7": 0x160, "dr6": 0x168, "rflags": 0x170, "rip": 0x178}
_GPRS: Final = 0x180  # R15 first, RAX last
_OPEN: Final = ((0xA0, 0xD0), (0xD8, 0xFC), (0x104, 0x148))
_LEFT_CR0: Final = ~(1 | 1 << 2 | 1 << 3 | 1 << 31)  # without PE, EM, TS, PG
_EFER_LME: Final = 1 << 8
_EFER_LMA: Final = 1 << 10


def _attributes(seg: Segment) -> int:
    low = seg.type | seg.s << 4 | seg.dpl << 5 | seg.present << 7
    return low | seg.avl << 12 | seg.l << 13 | seg.db << 14 | seg.g << 15


def enter(cpu: Cpu) -> None:
    """Take an SMI between two instructions (10.3)."""
    if "lm" not in cpu.features:
        raise ModelError("the state-save area of processors without long mode is not modelled")
    if cpu.smm or cpu.guest is not None:
        raise ModelError("an SMI in system management mode, or in a nested guest, is not modelled")
    area = bytearray(_SIZE)
    for n, name in enumerate(SEGMENT_NAMES[:6]):
        _put_segment(area, _SEGMENTS + 16 * n, getattr(cpu.state(), name))
    _put_segment(area, _LDTR, cpu.ldtr)
    _put_segment(area, _TR, cpu.tr)
    for at, table in ((_GDTR, cpu.gdtr), (_IDTR, cpu.idtr)):
        struct.pack_into("<IQ", area, at + 4, table.limit, table.base)
    struct.pack_into("<Q", area, _EFER, cpu.efer)
    struct.pack_into("<II", area, _REVISION_AT, _REVISION, SMBASE)
    for name, at in _FIELDS.items():
        struct.pack_into("<Q", area, at, getattr(cpu, name))
    struct.pack_into("<16Q", area, _GPRS, *reversed(cpu.gpr[:16]))
    mem = cpu.mem
    mem.physical_write(_AREA, bytes(area))
    for start, end in _OPEN:
        mem.mark_undefined(_AREA + start, (1 << 8 * (end - start)) - 1)
    for at in (*range(0, 0x60, 16), _LDTR, _TR):
        mem.mark_undefined(_AREA + at + 2, 0xFF00)  # how the upper attributes are packed
    mem.mark_undefined(_AREA + _FIELDS["rflags"], cpu.undefined)
    _set_up(cpu)


def _put_segment(area: bytearray, at: int, seg: Segment) -> None:
    struct.pack_into("<HHIQ", area, at, seg.selector, _attributes(seg), seg.limit, seg.base)


def _set_up(cpu: Cpu) -> None:
    """The environment of the handler (table 10-3)."""
    flat = Segment(selector=0, base=0, limit=0xFFFFFFFF, type=3, s=1, dpl=0, present=1, db=0, g=1)
    cpu.seg = [flat] * 6
    cpu.seg[CS] = replace(flat, selector=SMBASE >> 4, base=SMBASE)
    cpu.rip, cpu.rflags, cpu.undefined = _ENTRY, 2, 0
    cpu.cr0, cpu.cr4, cpu.efer, cpu.dr7 = cpu.cr0 & _LEFT_CR0, 0, 0, 0x400
    cpu.smm, cpu.nmi_masked, cpu.shadow = 1, 1, 0
    _forget(cpu)


def _forget(cpu: Cpu) -> None:
    cpu.mem.flush()
    cpu.forget_code()
    cpu.mode_changed()


def rsm(insn: Insn) -> Operation:
    """RSM (10.4): every register from the state-save area; #UD outside of system management mode."""

    def op(cpu: Cpu) -> None:
        if not cpu.smm:
            raise Fault(UD)
        area = cpu.mem.physical_read(_AREA, _SIZE)
        if struct.unpack_from("<I", area, _SMBASE_AT)[0] != SMBASE:
            raise ModelError("a moved SMBASE is not modelled")
        for n in range(6):
            cpu.seg[n] = _segment(area, _SEGMENTS + 16 * n)
        cpu.ldtr, cpu.tr = _segment(area, _LDTR), _segment(area, _TR)
        cpu.gdtr, cpu.idtr = _table(area, _GDTR), _table(area, _IDTR)
        for name, at in _FIELDS.items():
            setattr(cpu, name, struct.unpack_from("<Q", area, at)[0])
        efer = struct.unpack_from("<Q", area, _EFER)[0]
        cpu.efer = efer | _EFER_LMA if efer & _EFER_LME and cpu.cr0 >> 31 else efer & ~_EFER_LMA
        cpu.gpr[:16] = reversed(struct.unpack_from("<16Q", area, _GPRS))
        cpu.smm = cpu.nmi_masked = 0
        _forget(cpu)
        if pae_paging(cpu):
            cpu.pdptr = read_pdptes(cpu, cpu.cr3)

    return op


def _segment(area: bytes, at: int) -> Segment:
    selector, a, limit, base = struct.unpack_from("<HHIQ", area, at)
    return Segment(
        selector=selector, base=base, limit=limit, type=a & 15, s=a >> 4 & 1, dpl=a >> 5 & 3, present=a >> 7 & 1,
        avl=a >> 12 & 1, l=a >> 13 & 1, db=a >> 14 & 1, g=a >> 15 & 1, unusable=int(not a >> 7 & 1),
    )  # fmt: skip


def _table(area: bytes, at: int) -> Table:
    limit, base = struct.unpack_from("<IQ", area, at + 4)
    return Table(base, limit & 0xFFFF)


SMM_ROWS: Final = [Row("rsm", "0F AA", "", rsm, "APM 3 RSM")]
