"""CPUID, RDMSR, WRMSR, SWAPGS, FS and GS base, SYSCALL, SYSRET, SYSENTER, SYSEXIT.

SDM vol. 2A CPUID, vol. 2B RDMSR, SYSCALL.., vol. 4; APM vol. 3 under each name and appendix E, vol. 2 3.1.7 (EFER).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from harness.cpuid import CpuidEntry
from harness.exits import Msr
from harness.reference.control import CR4, EFER_LMA, EFER_LME
from harness.reference.cpu import CS, FS, GP, GS, IF, MASK, RF, RSP, SS, UD, VM, Cpu, Fault, ModelError
from harness.reference.insn import Insn, Operation, Row
from harness.reference.segments import privileged
from harness.state import MASK64, MSR_INDEX, PAT_RESET, Segment

APIC_BASE, EFER, FS_BASE, GS_BASE, XSS = 0x1B, 0xC0000080, 0xC0000100, 0xC0000101, 0xDA0
SYSENTER_CS, SYSENTER_ESP, SYSENTER_EIP = 0x174, 0x175, 0x176
PAT, STAR, LSTAR, CSTAR, FMASK = 0x277, 0xC0000081, 0xC0000082, 0xC0000083, 0xC0000084
KERNEL_GS_BASE, TSC_AUX, VM_HSAVE_PA = 0xC0000102, 0xC0000103, 0xC0010117
_SCE, _NX, _SVME, _FFXSR = 1, 1 << 11, 1 << 12, 1 << 14
_ADDRESSES: Final = frozenset({LSTAR, CSTAR, KERNEL_GS_BASE, FS_BASE, GS_BASE})
_RANGES: Final = ((0, 0x1FFF), (0x40000000, 0x4FFFFFFF), (0xC0000000, 0xC0001FFF), (0xC0010000, 0xC0011FFF))
"""Where MSRs can be (SDM vol. 3C 25.6.9, APM vol. 2 15.11; 4xxxxxxxH is the hypervisor's)."""
_NEEDS: Final = {
    SYSENTER_CS: ("sep",), SYSENTER_ESP: ("sep",), SYSENTER_EIP: ("sep",), PAT: ("pat",), STAR: ("syscall",),
    LSTAR: ("lm",), CSTAR: ("lm",), FMASK: ("syscall",), KERNEL_GS_BASE: ("lm",), FS_BASE: ("lm",), GS_BASE: ("lm",),
    TSC_AUX: ("rdtscp", "rdpid"), EFER: ("nx", "lm", "syscall"),
    VM_HSAVE_PA: ("svm",),
}  # fmt: skip
_KNOWN: Final = frozenset(MSR_INDEX.values()) | {APIC_BASE, EFER, FS_BASE, GS_BASE, VM_HSAVE_PA}


# --- CPUID ----------------------------------------------------------------------------------------------------------


def _xsave_size(cpu: Cpu, mask: int, compact: bool) -> int:
    """Bytes of the XSAVE area for the components of ``mask`` (SDM vol. 1 13.4)."""
    size = 576
    for n in range(2, 63):
        entry = cpu.profile.leaf(0xD, n)
        if not mask >> n & 1 or entry is None or not entry.eax:
            continue
        if compact:
            if entry.ecx & 2:
                size = size + 63 & ~63
            size += entry.eax
        else:
            size = max(size, entry.ebx + entry.eax)
    return size


def cpuid_leaf(cpu: Cpu, function: int, index: int) -> tuple[int, int, int, int]:
    """EAX, EBX, ECX, EDX that CPUID returns now.

    A leaf past the last one shows the highest basic leaf on Intel (SDM vol. 2A CPUID, INPUT EAX) and zeros on AMD
    (APM vol. 3 E.2). Some bits follow the registers: OSXSAVE, OSPKE, APIC, the XSAVE sizes, Intel's SYSCALL bit.
    """
    profile = cpu.profile
    entry = profile.leaf(function, index)
    if entry is None and not cpu.amd and function not in (0xB, 0x1F) and not _in_range(cpu, function):
        top = profile.leaf(0)
        function = top.eax if top is not None else 0
        entry = profile.leaf(function, index)
    if entry is None:
        if function in (0xB, 0x1F) and _in_range(cpu, function):
            first = profile.leaf(function, 0)
            return 0, 0, index & 0xFF, first.edx if first is not None else 0
        return 0, 0, 0, 0
    eax, ebx, ecx, edx = entry.eax, entry.ebx, entry.ecx, entry.edx
    if function == 1:
        ecx = ecx & ~(1 << 27) | (cpu.cr4 >> 18 & 1) << 27
        edx = edx & ~(1 << 9) | (edx & 1 << 9 if cpu.apic_base >> 11 & 1 else 0)
    elif function == 7 and index == 0:
        ecx = ecx & ~(1 << 4) | (cpu.cr4 >> 22 & 1) << 4
    elif function == 0xD and index == 0 and eax | edx:
        ebx = _xsave_size(cpu, cpu.xcr0, False)
    elif function == 0xD and index == 1 and eax & 0xA:
        ebx = _xsave_size(cpu, cpu.xcr0 | cpu.msrs.get(XSS, 0), True)
    elif function == 0x80000001 and not cpu.amd and not cpu.long64:
        edx &= ~(1 << 11)  # "always enumerated as 0 outside 64-bit mode" (SDM vol. 2A CPUID)
    return eax, ebx, ecx, edx


def _in_range(cpu: Cpu, function: int) -> bool:
    first: CpuidEntry | None = cpu.profile.leaf(function & 0x80000000)
    return first is not None and function <= first.eax


def cpuid(insn: Insn) -> Operation:
    """CPUID."""

    def op(cpu: Cpu) -> None:
        g = cpu.gpr
        g[0], g[3], g[1], g[2] = cpuid_leaf(cpu, g[0] & MASK[32], g[1] & MASK[32])

    return op


# --- MSRs -----------------------------------------------------------------------------------------------------------


def msr(cpu: Cpu, index: int) -> int:
    """An MSR that is plain storage; one that the Case does not observe is kept apart."""
    if index in cpu.msrs:
        return cpu.msrs[index]
    return cpu.unseen_msrs.get(index, PAT_RESET if index == PAT else 0)


def set_msr(cpu: Cpu, index: int, value: int) -> None:
    """Write an MSR that is plain storage."""
    (cpu.msrs if index in cpu.msrs else cpu.unseen_msrs)[index] = value


def _exists(cpu: Cpu, index: int) -> bool:
    """Whether this processor has an MSR. ModelError for one that the model does not know."""
    needs = _NEEDS.get(index)
    if needs is not None and not any(f in cpu.features for f in needs):
        return False
    if index not in _KNOWN:
        if not any(low <= index <= high for low, high in _RANGES):
            return False
        raise ModelError(f"MSR {index:#x} is not modelled")
    return True


def read_msr(cpu: Cpu, index: int) -> int:
    """The value RDMSR reads. #GP(0) for an MSR that is not there, or what userspace says where it answers for those."""
    if not _exists(cpu, index):
        if not cpu.msr_exits:
            raise Fault(GP, 0)
        return int.from_bytes(cpu.device_read(Msr(index, False), 8), "little")
    if index == APIC_BASE:
        return cpu.apic_base
    if index == EFER:
        return cpu.efer
    if index == FS_BASE:
        return cpu.seg[FS].base
    if index == GS_BASE:
        return cpu.seg[GS].base
    return msr(cpu, index)


def write_msr(cpu: Cpu, index: int, value: int) -> None:
    """WRMSR; #GP(0) for reserved bits and addresses that are not canonical. For an MSR that is not there as RDMSR."""
    if not _exists(cpu, index):
        if not cpu.msr_exits:
            raise Fault(GP, 0)
        cpu.device_write(Msr(index, True, value))
        return
    if index in _ADDRESSES and not cpu.canonical_base(value):
        raise Fault(GP, 0)
    if index == EFER:
        _write_efer(cpu, value)
    elif index in (FS_BASE, GS_BASE):
        set_base(cpu, FS if index == FS_BASE else GS, value)
    elif index == APIC_BASE:
        if value != cpu.apic_base:
            raise ModelError(f"APIC_BASE changes to {value:#x}: not modelled")
    elif index in (SYSENTER_ESP, SYSENTER_EIP):
        if cpu.amd:
            value &= MASK[32]  # 32-bit registers (APM vol. 2 6.1.2)
        elif not cpu.canonical_base(value):
            raise Fault(GP, 0)
        set_msr(cpu, index, value)
    elif index == PAT:
        if any(value >> n & 0xFF not in (0, 1, 4, 5, 6, 7) for n in range(0, 64, 8)):
            raise Fault(GP, 0)
        set_msr(cpu, index, value)
    elif index in (FMASK, TSC_AUX, SYSENTER_CS):
        if value >> 32:
            if cpu.amd or index == SYSENTER_CS:
                raise ModelError(f"MSR {index:#x}: bits 63:32 are reserved, what writing them does is not said")
            raise Fault(GP, 0)
        set_msr(cpu, index, value)
    elif index == VM_HSAVE_PA:
        if value & 0xFFF or value >> cpu.profile.maxphyaddr:  # APM vol. 2 15.30.4
            raise Fault(GP, 0)
        set_msr(cpu, index, value)
    else:
        set_msr(cpu, index, value)


def _write_efer(cpu: Cpu, value: int) -> None:
    """EFER (SDM vol. 3A 2.2.1; APM vol. 2 3.1.7): LME cannot change under paging; AMD #GPs on a change of LMA."""
    has = cpu.features
    allowed = EFER_LMA | (_SCE if "syscall" in has else 0) | (EFER_LME if "lm" in has else 0)
    allowed |= _NX if "nx" in has else 0
    if cpu.amd:
        if value & 0xE000 | value >> 15 or value & _FFXSR:
            raise ModelError(f"EFER value {value:#x}: whether this processor has these bits is not known")
        allowed |= _SVME if "svm" in has else 0
        if (value ^ cpu.efer) & EFER_LMA:
            raise Fault(GP, 0)
    if value & ~allowed or ((value ^ cpu.efer) & EFER_LME and cpu.paging):
        raise Fault(GP, 0)
    cpu.efer = value & ~EFER_LMA | cpu.efer & EFER_LMA
    cpu.mem.flush()
    cpu.forget_code()
    cpu.mode_changed()


def rdmsr(insn: Insn) -> Operation:
    """RDMSR: EDX:EAX."""

    def op(cpu: Cpu) -> None:
        privileged(cpu)
        value = read_msr(cpu, cpu.gpr[1] & MASK[32])
        cpu.gpr[0], cpu.gpr[2] = value & MASK[32], value >> 32

    return op


def wrmsr(insn: Insn) -> Operation:
    """WRMSR: EDX:EAX."""

    def op(cpu: Cpu) -> None:
        privileged(cpu)
        value = (cpu.gpr[2] & MASK[32]) << 32 | cpu.gpr[0] & MASK[32]
        write_msr(cpu, cpu.gpr[1] & MASK[32], value)

    return op


# --- FS and GS base -------------------------------------------------------------------------------------------------


def set_base(cpu: Cpu, index: int, value: int) -> None:
    """Write the hidden base of FS or GS."""
    cpu.seg[index] = replace(cpu.seg[index], base=value)


def swapgs(insn: Insn) -> Operation:
    """SWAPGS (SDM vol. 2B)."""

    def op(cpu: Cpu) -> None:
        privileged(cpu)
        base = cpu.seg[GS].base
        set_base(cpu, GS, msr(cpu, KERNEL_GS_BASE))
        set_msr(cpu, KERNEL_GS_BASE, base)

    return op


def read_base(insn: Insn, index: int) -> Operation:
    """RDFSBASE, RDGSBASE (SDM vol. 2B): #UD without CR4.FSGSBASE."""
    rm, size = insn.rm, 64 if insn.opsize == 64 else 32

    def op(cpu: Cpu) -> None:
        if not cpu.cr4 & CR4["FSGSBASE"]:
            raise Fault(UD)
        cpu.write_reg(size, rm, cpu.seg[index].base)

    return op


def write_base(insn: Insn, index: int) -> Operation:
    """WRFSBASE, WRGSBASE (SDM vol. 2D): #GP(0) for an address that is not canonical."""
    rm, size = insn.rm, 64 if insn.opsize == 64 else 32

    def op(cpu: Cpu) -> None:
        if not cpu.cr4 & CR4["FSGSBASE"]:
            raise Fault(UD)
        value = cpu.gpr[rm] & MASK[size]
        if not cpu.canonical_base(value):
            raise Fault(GP, 0)
        set_base(cpu, index, value)

    return op


def rdpid(insn: Insn) -> Operation:
    """RDPID: TSC_AUX (SDM vol. 2B)."""
    rm, size = insn.rm, 64 if insn.bits == 64 else 32
    return lambda cpu: cpu.write_reg(size, rm, msr(cpu, TSC_AUX))


# --- fast system calls ----------------------------------------------------------------------------------------------


def _flat_code(selector: int, dpl: int, l: int) -> Segment:
    return Segment(selector, 0, MASK[32], 0xB, 1, dpl, 1, 0, l, 1 - l, 1)


def _flat_stack(selector: int, dpl: int) -> Segment:
    return Segment(selector, 0, MASK[32], 3, 1, dpl, 1, 0, 0, 1, 1)


def _load(cpu: Cpu, cs: Segment, ss: Segment, rip: int) -> None:
    cpu.seg[CS], cpu.seg[SS], cpu.rip = cs, ss, rip
    cpu.mode_changed()


def _syscall_enabled(cpu: Cpu) -> None:
    if not cpu.efer & _SCE or (not cpu.amd and not cpu.long64):
        raise Fault(UD)
    if not cpu.pe:
        raise ModelError("SYSCALL and SYSRET in real mode: the manuals do not say")


def syscall(insn: Insn) -> Operation:
    """SYSCALL: Intel in 64-bit mode only; AMD also in compatibility and legacy mode (APM vol. 3 SYSCALL)."""

    def op(cpu: Cpu) -> None:
        _syscall_enabled(cpu)
        star = msr(cpu, STAR)
        selector = star >> 32 & 0xFFFC
        if cpu.lma:
            flags = cpu.flags(MASK64) & ~RF
            cpu.gpr[1], cpu.gpr[11] = cpu.rip, flags
            rip = msr(cpu, LSTAR if cpu.long64 else CSTAR)
            cpu.rflags = flags & ~msr(cpu, FMASK) | 2
        else:
            cpu.gpr[1] = cpu.rip & MASK[32]
            rip = star & MASK[32]
            cpu.rflags &= ~(VM | IF | RF)
        _load(cpu, _flat_code(selector, 0, int(cpu.lma)), _flat_stack((star >> 32 & 0xFFFC) + 8 & 0xFFFF, 0), rip)

    return op


def sysret(insn: Insn) -> Operation:
    """SYSRET: CS from STAR[63:48], plus 16 for 64-bit code. AMD leaves the rest of SS alone, and does not check RIP."""
    wide = insn.opsize == 64

    def op(cpu: Cpu) -> None:
        _syscall_enabled(cpu)
        privileged(cpu)
        base = msr(cpu, STAR) >> 48
        rip = cpu.gpr[1] if wide else cpu.gpr[1] & MASK[32]
        if wide and not cpu.amd and not cpu.canonical(rip):
            raise Fault(GP, 0)
        if cpu.lma:
            cpu.rflags = cpu.gpr[11] & 0x3C7FD7 | 2
            cpu.undefined = 0
        else:
            cpu.rflags |= IF
        selector = (base + 16 if wide else base) & 0xFFFF | 3
        ss = _flat_stack(base + 8 & 0xFFFF | 3, 3)
        if cpu.amd:
            ss = replace(cpu.seg[SS], selector=base + 8 & 0xFFFF, dpl=3)
        _load(cpu, _flat_code(selector, 3, int(wide)), ss, rip)

    return op


def sysenter(insn: Insn) -> Operation:
    """SYSENTER (SDM vol. 2B); AMD: #UD in long mode (APM vol. 3 SYSENTER)."""

    def op(cpu: Cpu) -> None:
        if cpu.amd and cpu.lma:
            raise Fault(UD)
        selector = msr(cpu, SYSENTER_CS) & 0xFFFC
        if not cpu.pe or not selector:
            raise Fault(GP, 0)
        mask = MASK64 if cpu.lma else MASK[32]
        cpu.rflags &= ~(VM | IF | RF)
        cpu.gpr[RSP] = msr(cpu, SYSENTER_ESP) & mask
        rip = msr(cpu, SYSENTER_EIP) & mask
        _load(cpu, _flat_code(selector, 0, int(cpu.lma)), _flat_stack(selector + 8 & 0xFFFF, 0), rip)

    return op


def sysexit(insn: Insn) -> Operation:
    """SYSEXIT: RSP from RCX, RIP from RDX (SDM vol. 2B); AMD: #UD in long mode."""
    wide = insn.opsize == 64

    def op(cpu: Cpu) -> None:
        if cpu.amd and cpu.lma:
            raise Fault(UD)
        base = msr(cpu, SYSENTER_CS) & 0xFFFC
        if not cpu.pe or not base or cpu.cpl:
            raise Fault(GP, 0)
        sp, rip = cpu.gpr[1], cpu.gpr[2]
        if wide:
            if not cpu.canonical(sp) or not cpu.canonical(rip):
                raise Fault(GP, 0)
        else:
            sp, rip = sp & MASK[32], rip & MASK[32]
        cpu.gpr[RSP] = sp
        selector = base + (32 if wide else 16) & 0xFFFF | 3
        _load(cpu, _flat_code(selector, 3, int(wide)), _flat_stack(selector + 8 & 0xFFFF, 3), rip)

    return op


def not_comparable(insn: Insn) -> Operation:
    """RDTSC, RDTSCP, RDPMC, RDRAND, RDSEED: their result is no function of the Case."""
    name = insn.row.mnemonic

    def op(cpu: Cpu) -> None:
        raise ModelError(f"{name}: its result is no function of the Case")

    return op


MSR_ROWS: Final = [
    Row("cpuid", "0F A2", "", cpuid, "SDM 2A CPUID"),
    Row("rdmsr", "0F 32", "", rdmsr, "SDM 2B RDMSR", feature="msr"),
    Row("wrmsr", "0F 30", "", wrmsr, "SDM 2D WRMSR", feature="msr"),
    Row("swapgs", "0F 01 =F8", "", swapgs, "SDM 2B SWAPGS", modes="64"),
    *(
        Row(f"{name}base", f"F3 0F AE /{n}:r", "Ry", make, section, modes="64", feature="fsgsbase")
        for n, (name, make, section) in enumerate((
            ("rdfs", lambda i: read_base(i, FS), "SDM 2B RDFSBASE"),
            ("rdgs", lambda i: read_base(i, GS), "SDM 2B RDFSBASE"),
            ("wrfs", lambda i: write_base(i, FS), "SDM 2D WRFSBASE"),
            ("wrgs", lambda i: write_base(i, GS), "SDM 2D WRFSBASE"),
        ))
    ),
    Row("rdpid", "F3 0F C7 /7:r", "Ry", rdpid, "SDM 2B RDPID", feature="rdpid"),
    Row("syscall", "0F 05", "", syscall, "SDM 2B SYSCALL", feature="syscall"),
    Row("sysret", "0F 07", "", sysret, "SDM 2B SYSRET", feature="syscall"),
    Row("sysenter", "0F 34", "", sysenter, "SDM 2B SYSENTER", feature="sep"),
    Row("sysexit", "0F 35", "", sysexit, "SDM 2B SYSEXIT", feature="sep"),
    Row("rdtsc", "0F 31", "", not_comparable, "SDM 2B RDTSC"),
    Row("rdtscp", "0F 01 =F9", "", not_comparable, "SDM 2B RDTSCP", feature="rdtscp"),
    Row("rdpmc", "0F 33", "", not_comparable, "SDM 2B RDPMC"),
]
