"""XSAVE, XSAVEOPT, XSAVEC, XSAVES, XRSTOR, XRSTORS (SDM vol. 1 chapter 13; APX 3.1.4).

The model holds two state components: PKRU (9) and the EGPRs of APX (19). What the others put into memory is undefined
there; restoring them changes nothing that the model shows. A component in its initial configuration may be in use or
not ("it is possible for XINUSE[i] = 1 even when state component i is in its initial configuration", SDM vol. 1 13.6),
so that its bit of XSTATE_BV, and whether the optimizing instructions write it, are undefined too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from harness.reference.control import CR0_TS, CR4
from harness.reference.cpu import AC, GP, MASK, NM, UD, Cpu, Fault, ModelError
from harness.reference.insn import Insn, Operation, Row
from harness.reference.msr import XSS, msr
from harness.reference.segments import privileged

PKRU, APX = 9, 19
_MODELLED: Final = 1 << PKRU | 1 << APX
_REFUSED: Final = 1 << 11 | 1 << 12 | 1 << 17 | 1 << 18  # CET and tile state: restoring them has effects and faults
_HEADER, _XCOMP_BV, _EXTENDED = 512, 520, 576
_COMPACT: Final = 1 << 63
_CR0_AM: Final = 1 << 18
# Where x87 state, SSE state and MXCSR are in the legacy region (SDM vol. 1 13.5.1, 13.5.2): (components, offset, size).
_LEGACY: Final = ((1, 0, 24), (6, 24, 8), (1, 32, 128), (2, 160, 256))
_MXCSR: Final = 24


@dataclass(frozen=True, slots=True)
class _Area:
    """The XSAVE area of one instruction: segment and offset of its first byte, and the requested features."""

    seg: int
    start: int
    rfbm: int

    def at(self, offset: int) -> int:
        return self.start + offset & MASK[64]


def _area(insn: Insn, supervisor: bool, write: bool) -> Callable[[Cpu], _Area]:
    """Checks in the order #UD, #NM, #GP; the area must be aligned to 64 bytes (SDM vol. 2D XSAVE)."""
    ea, seg = insn.address(), insn.seg

    def enter(cpu: Cpu) -> _Area:
        if not cpu.cr4 & CR4["OSXSAVE"]:
            raise Fault(UD)
        if cpu.cr0 & CR0_TS:
            raise Fault(NM)
        if supervisor:
            privileged(cpu)
        start = ea(cpu)
        if cpu.mem.linear(seg, start, _EXTENDED, write) & 63:
            if cpu.cpl == 3 and cpu.cr0 & _CR0_AM and cpu.rflags & AC:
                raise ModelError("XSAVE area not aligned: #AC or #GP is the processor's choice")
            raise Fault(GP, 0)
        enabled = cpu.xcr0 | (msr(cpu, XSS) if supervisor else 0)
        rfbm = ((cpu.gpr[2] & MASK[32]) << 32 | cpu.gpr[0] & MASK[32]) & enabled
        if rfbm >> APX & 1 and not cpu.long64:
            raise ModelError("XSAVE of APX state outside 64-bit mode: no public source says what it does")
        if rfbm & _REFUSED:
            raise ModelError(f"XSAVE state components {rfbm & _REFUSED:#x} are not modelled")
        return _Area(seg, start, rfbm)

    return enter


def _offsets(cpu: Cpu, mask: int, compact: bool) -> dict[int, tuple[int, int]]:
    """Component -> (offset, size) of the extended region for ``mask`` (SDM vol. 1 13.4.2, 13.4.3)."""
    out, end = {}, _EXTENDED
    for n in range(2, 63):
        if not mask >> n & 1:
            continue
        entry = cpu.profile.leaf(0xD, n)
        if entry is None or not entry.eax:
            raise ModelError(f"CPUID leaf DH does not describe state component {n}")
        if compact:
            start = end + 63 & ~63 if entry.ecx & 2 else end
            end = start + entry.eax
        else:
            start = entry.ebx
        out[n] = start, entry.eax
    return out


def _value(cpu: Cpu, component: int) -> int:
    if component == PKRU:
        return cpu.pkru
    return sum(value << 64 * n for n, value in enumerate(cpu.gpr[16:]))


def _in_use(cpu: Cpu, mask: int) -> tuple[int, int]:
    """XINUSE for ``mask``: (value, undefined bits)."""
    known = sum(1 << n for n in (PKRU, APX) if mask >> n & 1 and _value(cpu, n))
    return known, mask & ~known


# --- saving ---------------------------------------------------------------------------------------------------------


def _save(kind: str) -> Callable[[Insn], Operation]:
    compact = kind in ("xsavec", "xsaves")

    def operation(insn: Insn) -> Operation:
        enter = _area(insn, kind == "xsaves", True)

        def op(cpu: Cpu) -> None:
            area = enter(cpu)
            places = _offsets(cpu, area.rfbm & ~3, compact)
            legacy = [(at, size) for which, at, size in _LEGACY if area.rfbm & which]
            for at, size in (*legacy, (_HEADER, 16 if compact else 8), *places.values()):
                cpu.mem.check(area.seg, area.at(at), size, True)
            for at, size in legacy:
                cpu.mem.write(area.seg, area.at(at), size, 0, undefined=(1 << 8 * size) - 1)
            for component, (at, size) in places.items():
                _save_component(cpu, area, component, at, size, kind)
            _save_header(cpu, area, compact)

        return op

    return operation


def _save_component(cpu: Cpu, area: _Area, component: int, at: int, size: int, kind: str) -> None:
    where, every = area.at(at), (1 << 8 * size) - 1
    if not _MODELLED >> component & 1:
        cpu.mem.write(area.seg, where, size, 0, undefined=every)
        return
    value, undefined = _value(cpu, component), 0
    # The init optimization may skip a component in its initial configuration, the modified optimization one that is
    # as the last XRSTOR from this area loaded it (SDM vol. 1 13.9-13.11).
    skips = kind != "xsave" and not value
    if kind in ("xsaveopt", "xsaves") and cpu.xrstor_area == cpu.mem.linear(area.seg, area.start, 1, True):
        skips = True
    if skips:
        old, undefined = cpu.mem.read_undefined(area.seg, where, size)
        undefined |= old ^ value
    cpu.mem.write(area.seg, where, size, value, undefined=undefined)


def _save_header(cpu: Cpu, area: _Area, compact: bool) -> None:
    value, undefined = _in_use(cpu, area.rfbm)
    if compact:
        cpu.mem.write(area.seg, area.at(_HEADER), 8, value, undefined=undefined)
        cpu.mem.write(area.seg, area.at(_XCOMP_BV), 8, area.rfbm | _COMPACT)
        return
    old, unknown = cpu.mem.read_undefined(area.seg, area.at(_HEADER), 8)
    value |= old & ~area.rfbm
    cpu.mem.write(area.seg, area.at(_HEADER), 8, value, undefined=undefined | unknown & ~area.rfbm)


# --- restoring ------------------------------------------------------------------------------------------------------


def _restore(supervisor: bool) -> Callable[[Insn], Operation]:
    def operation(insn: Insn) -> Operation:
        enter = _area(insn, supervisor, False)

        def op(cpu: Cpu) -> None:
            area = enter(cpu)
            cpu.mem.check(area.seg, area.at(_HEADER), 64, False)
            xstate, unknown, xcomp = _header(cpu, area, supervisor)
            compact = bool(xcomp & _COMPACT)
            places = _offsets(cpu, xcomp & ~_COMPACT & ~3 if compact else area.rfbm & xstate & ~3, compact)
            for component in places:
                if area.rfbm & xstate >> component & 1:
                    cpu.mem.check(area.seg, area.at(places[component][0]), places[component][1], False)
            _check_mxcsr(cpu, area, compact, xstate)
            values = {}
            for component in (PKRU, APX):
                if area.rfbm >> component & 1:
                    values[component] = _component(cpu, area, component, places, xstate, unknown)
            _load(cpu, values)
            cpu.xrstor_area = cpu.mem.linear(area.seg, area.start, 1, False)

        return op

    return operation


def _header(cpu: Cpu, area: _Area, supervisor: bool) -> tuple[int, int, int]:
    """XSTATE_BV, its undefined bits, XCOMP_BV; #GP(0) for a bad header (SDM vol. 1 13.8.1, 13.8.2, 13.12)."""
    xstate, unknown = cpu.mem.read_undefined(area.seg, area.at(_HEADER), 8)
    xcomp = cpu.mem.read(area.seg, area.at(_XCOMP_BV), 8)
    rest = cpu.mem.read(area.seg, area.at(_XCOMP_BV + 8), 48)
    enabled = cpu.xcr0 | (msr(cpu, XSS) if supervisor else 0)
    if xcomp & _COMPACT:
        mask = xcomp & ~_COMPACT
        bad = "xsavec" not in cpu.features or mask & ~enabled or xstate & ~mask or rest
    else:
        bad = supervisor or xcomp or rest & MASK[64] or xstate & ~enabled
    if bad:
        raise Fault(GP, 0)
    return xstate, unknown, xcomp


def _check_mxcsr(cpu: Cpu, area: _Area, compact: bool, xstate: int) -> None:
    """#GP(0) for reserved bits of an MXCSR that is loaded (SDM vol. 1 13.8); undefined ones come from XSAVE."""
    if area.rfbm & 2 and xstate & 2 if compact else area.rfbm & 6:
        mxcsr, undefined = cpu.mem.read_undefined(area.seg, area.at(_MXCSR), 4)
        if (mxcsr & ~undefined) >> 16:
            raise Fault(GP, 0)


def _component(
    cpu: Cpu, area: _Area, component: int, places: dict[int, tuple[int, int]], xstate: int, unknown: int
) -> int:
    """The value that XRSTOR loads into a modelled component: from memory, or the initial one, which is zero."""
    if not (xstate | unknown) >> component & 1:
        return 0
    at, size = places.get(component) or _offsets(cpu, 1 << component, False)[component]
    value = cpu.mem.read(area.seg, area.at(at), size)
    if unknown >> component & 1 and value:
        raise ModelError(f"XRSTOR of state component {component} whose XSTATE_BV bit is undefined")
    return value


def _load(cpu: Cpu, values: dict[int, int]) -> None:
    if APX in values:
        cpu.gpr[16:] = [values[APX] >> 64 * n & MASK[64] for n in range(16)]
    if PKRU in values:
        cpu.pkru = values[PKRU] & MASK[32]
        cpu.mem.flush()


def _row(name: str, opcode: str, operation: Callable[[Insn], Operation], feature: str) -> Row:
    # #UD with REX2: binutils assembles and disassembles none of them with it (PREFIX_REX2_ILLEGAL), XED neither.
    mnemonic, section = f"{name}/{name}/{name}64", f"SDM 2D {name.upper()}"
    return Row(mnemonic, f"NP 0F {opcode}:m", "M", operation, section, feature=feature, rex2=False)


XSAVE_ROWS: Final = [
    _row("xsave", "AE /4", _save("xsave"), "xsave"),
    _row("xrstor", "AE /5", _restore(False), "xsave"),
    _row("xsaveopt", "AE /6", _save("xsaveopt"), "xsaveopt"),
    _row("xrstors", "C7 /3", _restore(True), "xsaves"),
    _row("xsavec", "C7 /4", _save("xsavec"), "xsavec"),
    _row("xsaves", "C7 /5", _save("xsaves"), "xsaves"),
]
