"""Control and debug registers: MOV CRn, MOV DRn, LMSW, SMSW, CLTS, INVLPG, INVPCID, WBINVD, XGETBV, XSETBV, PKRU.

SDM vol. 2B MOV (control registers), MOV (debug registers); vol. 3A 2.5, 4.4.1, 9.8.5; vol. 3B 17.2; APM vol. 2 3.1.
"""

from __future__ import annotations

from typing import Final

from harness.reference.cpu import AC, CS, DB, GP, MASK, UD, Cpu, Fault, ModelError
from harness.reference.insn import Insn, Operation, Row
from harness.reference.paging import read_pdptes
from harness.reference.segments import privileged, umip
from harness.state import CR4_BITS

CR0_PE, CR0_ET, CR0_TS, CR0_WP = 1, 1 << 4, 1 << 3, 1 << 16
CR0_NW, CR0_CD, CR0_PG = 1 << 29, 1 << 30, 1 << 31
_CR0_KNOWN: Final = 0xE005003F
CR4 = {name: 1 << bit for bit, name in CR4_BITS.items()}
EFER_LME, EFER_LMA = 1 << 8, 1 << 10
_BD: Final = 1 << 13
_DR7_GD: Final = 1 << 13

# CR4 bit -> features of which one must be there; a bit without them is reserved (SDM vol. 3A 2.5).
_CR4_FEATURES: Final[dict[str, tuple[str, ...]]] = {
    "VME": ("vme",), "PVI": ("vme",), "TSD": ("tsc",), "DE": ("de",), "PSE": ("pse",), "PAE": ("pae",),
    "PGE": ("pge",), "OSFXSR": ("fxsr",), "OSXMMEXCPT": ("sse",), "UMIP": ("umip",), "LA57": ("la57",),
    "VMXE": ("vmx",), "FSGSBASE": ("fsgsbase",), "PCIDE": ("pcid",), "OSXSAVE": ("xsave",), "SMEP": ("smep",),
    "SMAP": ("smap",), "PKE": ("pku",), "CET": ("shstk", "ibt"),
}  # fmt: skip
_CR4_ALWAYS: Final = ("MCE", "PCE")
_CR4_UNKNOWN: Final = ("SMXE", "PKS", "UINTR", "LAM_SUP", "FRED")
"""Bits whose CPUID feature the harness does not name."""


def _new_translation(cpu: Cpu) -> None:
    cpu.mem.flush()
    cpu.forget_code()
    cpu.mode_changed()


# --- CR0 ------------------------------------------------------------------------------------------------------------


def write_cr0(cpu: Cpu, value: int) -> None:
    """MOV to CR0, with the entry to and exit from IA-32e mode (SDM vol. 2B MOV; vol. 3A 9.8.5)."""
    old = cpu.cr0
    if value >> 32:
        raise Fault(GP, 0)
    value = value & _CR0_KNOWN | CR0_ET
    if (value & CR0_PG and not value & CR0_PE) or (value & CR0_NW and not value & CR0_CD):
        raise Fault(GP, 0)
    if not value & CR0_WP and cpu.cr4 & CR4["CET"]:
        raise Fault(GP, 0)
    efer, pdptr = cpu.efer, cpu.pdptr
    if value & CR0_PG:
        if not old & CR0_PG and efer & EFER_LME:
            if not cpu.cr4 & CR4["PAE"] or cpu.seg[CS].l or (not cpu.amd and not cpu.tr.type & 8):
                raise Fault(GP, 0)
            efer |= EFER_LMA
        if cpu.cr4 & CR4["PAE"] and not efer & EFER_LME and (old ^ value) & (CR0_PG | CR0_CD | CR0_NW):
            pdptr = read_pdptes(cpu, cpu.cr3)
    elif old & CR0_PG:
        if cpu.long64 or cpu.cr4 & CR4["PCIDE"]:
            raise Fault(GP, 0)
        efer &= ~EFER_LMA
    cpu.cr0, cpu.efer, cpu.pdptr = value, efer, pdptr
    _new_translation(cpu)


# --- CR3, CR4, CR8 --------------------------------------------------------------------------------------------------


def pae_paging(cpu: Cpu) -> bool:
    """PAE paging is on: the PDPTE registers count (SDM vol. 3A 4.1.1)."""
    return bool(cpu.cr0 & CR0_PG and cpu.cr4 & CR4["PAE"] and not cpu.efer & EFER_LMA)


def write_cr3(cpu: Cpu, value: int) -> None:
    """MOV to CR3: reserved upper bits #GP(0); bit 63 with PCIDE is not stored; PAE loads the PDPTEs (SDM 3A 4.4.1)."""
    if cpu.cr4 & CR4["PCIDE"]:
        value &= ~(1 << 63)
    if cpu.lma:
        if value >> cpu.profile.maxphyaddr:
            raise Fault(GP, 0)
    elif pae_paging(cpu):
        cpu.pdptr = read_pdptes(cpu, value)
    cpu.cr3 = value
    _new_translation(cpu)


def cr4_reserved(cpu: Cpu) -> int:
    """CR4 bits that this processor does not have."""
    allowed = sum(CR4[name] for name in _CR4_ALWAYS)
    for name, features in _CR4_FEATURES.items():
        if any(f in cpu.features for f in features):
            allowed |= CR4[name]
    return ~allowed


def write_cr4(cpu: Cpu, value: int) -> None:
    """MOV to CR4 (SDM vol. 2B MOV; vol. 3A 2.5, 4.10.1 for PCIDE, 4.4.1 for the PDPTEs)."""
    old = cpu.cr4
    changed = old ^ value
    unknown = sum(CR4[name] for name in _CR4_UNKNOWN)
    if value & cr4_reserved(cpu) & ~unknown:
        raise Fault(GP, 0)
    if value & unknown:
        raise ModelError(f"CR4 value {value:#x}: whether this processor has these bits is not known")
    if cpu.lma and (not value & CR4["PAE"] or changed & CR4["LA57"]):
        raise Fault(GP, 0)
    if changed & value & CR4["PCIDE"] and (not cpu.lma or cpu.cr3 & 0xFFF):
        raise Fault(GP, 0)
    if value & CR4["CET"] and not cpu.cr0 & CR0_WP:
        raise Fault(GP, 0)
    if (
        cpu.cr0 & CR0_PG
        and value & CR4["PAE"]
        and not cpu.lma
        and changed & (CR4["PAE"] | CR4["PGE"] | CR4["PSE"] | CR4["SMEP"])
    ):
        cpu.pdptr = read_pdptes(cpu, cpu.cr3)
    cpu.cr4 = value
    _new_translation(cpu)


def write_cr8(cpu: Cpu, value: int) -> None:
    """MOV to CR8: four bits (SDM vol. 3A 10.8.6)."""
    if value >> 4:
        raise Fault(GP, 0)
    cpu.cr8 = value


def write_cr2(cpu: Cpu, value: int) -> None:
    """MOV to CR2."""
    cpu.cr2 = value


_CR_WRITERS: Final = {0: write_cr0, 2: write_cr2, 3: write_cr3, 4: write_cr4, 8: write_cr8}


def _ud(cpu: Cpu) -> None:
    raise Fault(UD)


def _cr_size(insn: Insn) -> int:
    return 64 if insn.bits == 64 else 32


def mov_to_cr(insn: Insn) -> Operation:
    """MOV CRn, r: always 32 bits, 64 in 64-bit mode. #UD for CR1, CR5-CR7, CR9-CR15."""
    writer, rm, size = _CR_WRITERS.get(insn.reg), insn.rm, _cr_size(insn)
    if writer is None:
        return _ud
    write = writer

    def op(cpu: Cpu) -> None:
        privileged(cpu)
        write(cpu, cpu.gpr[rm] & MASK[size])

    return op


def mov_from_cr(insn: Insn) -> Operation:
    """MOV r, CRn."""
    rm, size = insn.rm, _cr_size(insn)
    if insn.reg not in _CR_WRITERS:
        return _ud
    name = f"cr{insn.reg}"

    def op(cpu: Cpu) -> None:
        privileged(cpu)
        cpu.write_reg(size, rm, getattr(cpu, name))

    return op


def lmsw(insn: Insn) -> Operation:
    """LMSW: CR0 bits 3:0; PE can be set, not cleared (SDM vol. 2A LMSW)."""
    source = insn.read(0)

    def op(cpu: Cpu) -> None:
        privileged(cpu)
        value = source(cpu)
        write_cr0(cpu, cpu.cr0 & ~0xE | value & 0xF)

    return op


def smsw(insn: Insn) -> Operation:
    """SMSW: 16 bits to memory; a wider register gets as many bits of CR0 (SDM vol. 2B SMSW)."""
    ea, seg, size, rm = insn.address(), insn.seg, insn.opsize, insn.rm
    memory = insn.memory

    def op(cpu: Cpu) -> None:
        umip(cpu)
        if memory:
            cpu.mem.write(seg, ea(cpu), 2, cpu.cr0 & 0xFFFF)
        else:
            cpu.write_reg(size, rm, cpu.cr0)

    return op


def clts(insn: Insn) -> Operation:
    """CLTS (SDM vol. 2A)."""

    def op(cpu: Cpu) -> None:
        privileged(cpu)
        cpu.cr0 &= ~CR0_TS
        cpu.mode_changed()

    return op


# --- debug registers ------------------------------------------------------------------------------------------------


def _feature(cpu: Cpu, register: str, bit: int) -> int:
    leaf = cpu.profile.leaf(7, 0)
    return 0 if leaf is None else getattr(leaf, register) >> bit & 1


def dr6_value(cpu: Cpu, value: int) -> int:
    """What DR6 holds after a write: B0-B3, BD, BS, BT (SDM vol. 3B 17.2.3); BLD and RTM with their features."""
    writable = 0xE00F | _feature(cpu, "ecx", 24) << 11 | _feature(cpu, "ebx", 11) << 16
    return value & writable | 0xFFFF0FF0 & ~writable


def dr7_value(cpu: Cpu, value: int) -> int:
    """What DR7 holds after a write: bit 10 is 1; 12, 14 and 15 are 0, and 11 without RTM (SDM vol. 3B 17.2.4)."""
    return value & (0xFFFF23FF | _feature(cpu, "ebx", 11) << 11) | 0x400


def _dr_access(cpu: Cpu, n: int) -> int:
    """The debug register that MOV reaches: checks in order #UD, #GP, #DB for DR7.GD (SDM vol. 2B MOV)."""
    if n in (4, 5):
        if cpu.cr4 & CR4["DE"]:
            raise Fault(UD)
        n += 2
    privileged(cpu)
    if cpu.dr7 & _DR7_GD:
        cpu.trap_bits |= _BD
        raise Fault(DB)
    return n


def mov_to_dr(insn: Insn) -> Operation:
    """MOV DRn, r: bits 63:32 of DR6 and DR7 must be zero."""
    rm, size, number = insn.rm, _cr_size(insn), insn.reg
    if number > 7:
        return _ud

    def op(cpu: Cpu) -> None:
        n = _dr_access(cpu, number)
        value = cpu.gpr[rm] & MASK[size]
        if n < 4:
            cpu.dr[n] = value
            return
        if value >> 32:
            raise Fault(GP, 0)
        if n == 6:
            cpu.dr6 = dr6_value(cpu, value)
        else:
            cpu.dr7 = dr7_value(cpu, value)

    return op


def mov_from_dr(insn: Insn) -> Operation:
    """MOV r, DRn."""
    rm, size, number = insn.rm, _cr_size(insn), insn.reg
    if number > 7:
        return _ud

    def op(cpu: Cpu) -> None:
        n = _dr_access(cpu, number)
        cpu.write_reg(size, rm, cpu.dr[n] if n < 4 else cpu.dr6 if n == 6 else cpu.dr7)

    return op


# --- caches and TLB -------------------------------------------------------------------------------------------------


def cache_control(insn: Insn) -> Operation:
    """WBINVD, INVD: privileged, nothing to see."""
    return privileged


def invlpg(insn: Insn) -> Operation:
    """INVLPG: never faults on its operand (SDM vol. 2A INVLPG)."""

    def op(cpu: Cpu) -> None:
        privileged(cpu)
        cpu.mem.flush()
        cpu.forget_code()

    return op


def invpcid(insn: Insn) -> Operation:
    """INVPCID: type in a register, 16-byte descriptor in memory (SDM vol. 2A INVPCID)."""
    ea, seg, reg, size = insn.address(), insn.seg, insn.reg, _cr_size(insn)

    def op(cpu: Cpu) -> None:
        privileged(cpu)
        kind = cpu.gpr[reg] & MASK[size]
        raw = int.from_bytes(cpu.mem.read_bytes(seg, ea(cpu), 16), "little")
        pcid, linear = raw & 0xFFFFFFFFFFFFFFFF, raw >> 64
        bad = kind > 3 or pcid >> 12
        if kind < 2 and not cpu.cr4 & CR4["PCIDE"] and pcid:
            bad = True
        if bad or (kind == 0 and not cpu.canonical_base(linear)):
            raise Fault(GP, 0)
        cpu.mem.flush()
        cpu.forget_code()

    return op


# --- XCR0, PKRU, AC -------------------------------------------------------------------------------------------------


def xgetbv(insn: Insn) -> Operation:
    """XGETBV: ECX 0 is XCR0; 1 (XINUSE) is not modelled (SDM vol. 2D XGETBV)."""

    def op(cpu: Cpu) -> None:
        if not cpu.cr4 & CR4["OSXSAVE"]:
            raise Fault(UD)
        index = cpu.gpr[1] & MASK[32]
        if index == 1 and "xgetbv1" in cpu.features:
            raise ModelError("XGETBV with ECX 1 reads XINUSE, which is not architectural state here")
        if index:
            raise Fault(GP, 0)
        cpu.gpr[0], cpu.gpr[2] = cpu.xcr0 & MASK[32], cpu.xcr0 >> 32

    return op


def xcr0_valid(cpu: Cpu, value: int) -> bool:
    """Whether XSETBV accepts ``value`` (SDM vol. 1 13.3; APX specification 3.1.4.2)."""
    if not value & 1 or value & ~cpu.profile.xcr0_supported:
        return False
    if value & 4 and not value & 2:
        return False
    avx512 = value >> 5 & 7
    if avx512 and (avx512 != 7 or not value & 4):
        return False
    if value >> 3 & 3 not in (0, 3) or value >> 17 & 3 not in (0, 3):
        return False
    return not (value >> 19 & 1 and value >> 3 & 3)


def xsetbv(insn: Insn) -> Operation:
    """XSETBV (SDM vol. 2D)."""

    def op(cpu: Cpu) -> None:
        if not cpu.cr4 & CR4["OSXSAVE"]:
            raise Fault(UD)
        privileged(cpu)
        value = (cpu.gpr[2] & MASK[32]) << 32 | cpu.gpr[0] & MASK[32]
        if cpu.gpr[1] & MASK[32] or not xcr0_valid(cpu, value):
            raise Fault(GP, 0)
        cpu.xcr0 = value
        cpu.mode_changed()

    return op


def rdpkru(insn: Insn) -> Operation:
    """RDPKRU (SDM vol. 2B)."""

    def op(cpu: Cpu) -> None:
        if not cpu.cr4 & CR4["PKE"]:
            raise Fault(UD)
        if cpu.gpr[1] & MASK[32]:
            raise Fault(GP, 0)
        cpu.gpr[0], cpu.gpr[2] = cpu.pkru, 0

    return op


def wrpkru(insn: Insn) -> Operation:
    """WRPKRU (SDM vol. 2D)."""

    def op(cpu: Cpu) -> None:
        if not cpu.cr4 & CR4["PKE"]:
            raise Fault(UD)
        if cpu.gpr[1] & MASK[32] or cpu.gpr[2] & MASK[32]:
            raise Fault(GP, 0)
        cpu.pkru = cpu.gpr[0] & MASK[32]
        cpu.mem.flush()

    return op


def set_ac(insn: Insn, value: int) -> Operation:
    """CLAC, STAC: #UD at CPL > 0 and in virtual-8086 mode (SDM vol. 2A CLAC)."""

    def op(cpu: Cpu) -> None:
        if cpu.cpl:
            raise Fault(UD)
        cpu.rflags = cpu.rflags & ~AC | value

    return op


CONTROL_ROWS: Final = [
    Row("mov", "0F 20 /r", "Ry,Cy", mov_from_cr, "SDM 2B MOV (control registers)", size="f64"),
    Row("mov", "0F 22 /r", "Cy,Ry", mov_to_cr, "SDM 2B MOV (control registers)", size="f64"),
    Row("mov", "0F 21 /r", "Ry,Dy", mov_from_dr, "SDM 2B MOV (debug registers)", size="f64"),
    Row("mov", "0F 23 /r", "Dy,Ry", mov_to_dr, "SDM 2B MOV (debug registers)", size="f64"),
    Row("smsw", "0F 01 /4", "Ev", smsw, "SDM 2B SMSW"),
    Row("lmsw", "0F 01 /6", "Ew", lmsw, "SDM 2A LMSW"),
    Row("clts", "0F 06", "", clts, "SDM 2A CLTS"),
    Row("invd", "0F 08", "", cache_control, "SDM 2A INVD"),
    Row("wbinvd", "0F 09", "", cache_control, "SDM 2D WBINVD"),
    Row("invlpg", "0F 01 /7:m", "M", invlpg, "SDM 2A INVLPG"),
    Row("invpcid", "66 0F 38 82 /r:m", "Gy,M", invpcid, "SDM 2A INVPCID", size="f64", feature="invpcid"),
    Row("xgetbv", "NP 0F 01 =D0", "", xgetbv, "SDM 2D XGETBV", feature="xsave"),
    Row("xsetbv", "NP 0F 01 =D1", "", xsetbv, "SDM 2D XSETBV", feature="xsave"),
    Row("rdpkru", "NP 0F 01 =EE", "", rdpkru, "SDM 2B RDPKRU", feature="pku"),
    Row("wrpkru", "NP 0F 01 =EF", "", wrpkru, "SDM 2D WRPKRU", feature="pku"),
    Row("clac", "NP 0F 01 =CA", "", lambda i: set_ac(i, 0), "SDM 2A CLAC", feature="smap"),
    Row("stac", "NP 0F 01 =CB", "", lambda i: set_ac(i, AC), "SDM 2B STAC", feature="smap"),
]
