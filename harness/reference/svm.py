"""SVM seen from inside a guest: VMRUN, #VMEXIT, VMLOAD, VMSAVE, STGI, CLGI (APM vol. 2 chapter 15, vol. 3).

Enough for a guest that runs a guest: intercepts of VMMCALL, HLT, CPUID and of exceptions, no nested paging, no
interrupts to inject. A block that asks for more is a ModelError.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from harness import vmcb
from harness.reference.control import pae_paging
from harness.reference.cpu import FS, GP, GS, MASK, PAGE_FAULT, RAX, UD, VM, Cpu, Fault, ModelError, VmExit
from harness.reference.hypercall import hypercall
from harness.reference.insn import Insn, Operation, Row
from harness.reference.msr import VM_HSAVE_PA, msr, set_msr
from harness.reference.paging import read_pdptes
from harness.reference.segments import privileged
from harness.state import CpuState

_SVME: Final = 1 << 12
_DR7_OFF: Final = 0x400
_CR0_PE: Final = 1
_PAGE: Final = 4096
_NRIPS: Final = 1 << 3
_VALID: Final = 1 << 31
_HOST: Final = ("gdtr", "idtr", "efer", "cr3", "cr4", "pdptr", "rip")
_MODELLED: Final = {
    "intercepts1": vmcb.INTERCEPT_CPUID | vmcb.INTERCEPT_HLT,
    "intercepts2": vmcb.INTERCEPT_VMRUN | vmcb.INTERCEPT_VMMCALL,
}
_ZERO: Final = (
    "cr_intercepts", "dr_intercepts", "intercepts3", "tsc_offset", "tlb_control", "virtual_interrupt", "shadow",
    "nested_paging", "event_injection", "lbr", "clean",
)  # fmt: skip


@dataclass(frozen=True)
class Guest:
    """The guest that runs now: its block's address, what it intercepts, and the host's registers."""

    address: int
    intercepts1: int
    intercepts2: int
    exceptions: int
    host: CpuState
    undefined: int


def exception(cpu: Cpu, fault: Fault) -> VmExit | None:
    """The VmExit that an intercepted exception is, or None."""
    if isinstance(fault, VmExit):
        return fault
    if cpu.guest is None or not cpu.guest.exceptions >> fault.vector & 1:
        return None
    error = fault.error if fault.error is not None else None
    return VmExit(vmcb.EXIT_EXCEPTION + fault.vector, error, fault.cr2 if fault.vector == PAGE_FAULT else None)


# --- VMRUN and back -------------------------------------------------------------------------------------------------


def _enabled(cpu: Cpu) -> None:
    if not cpu.efer & _SVME or not cpu.pe or cpu.vm86:
        raise Fault(UD)
    privileged(cpu)


def _block_address(cpu: Cpu, bits: int) -> int:
    """rAX; #GP(0) unless it is a physical address of a whole page (APM vol. 3 VMRUN)."""
    address = cpu.gpr[RAX] & MASK[bits]
    if address % _PAGE or address >> cpu.profile.maxphyaddr:
        raise Fault(GP, 0)
    return address


def vmrun(insn: Insn) -> Operation:
    """VMRUN: keep the host's registers, go on with the guest's."""
    bits = insn.addrsize

    def op(cpu: Cpu) -> None:
        _enabled(cpu)
        cpu.intercept("intercepts2", vmcb.INTERCEPT_VMRUN, vmcb.EXIT_VMRUN)
        address = _block_address(cpu, bits)
        block = cpu.mem.physical_read(address, _PAGE)
        _check(block)
        host = cpu.state()
        one, two, vectors = (vmcb.read(block, name) for name in ("intercepts1", "intercepts2", "exceptions"))
        guest = Guest(address, one, two, vectors, host, cpu.undefined)
        _save_host(cpu)
        cpu.load_state(vmcb.enter(host, block))
        if pae_paging(cpu):
            cpu.pdptr = read_pdptes(cpu, cpu.cr3)
        cpu.guest, cpu.gif = guest, True

    return op


def _check(block: bytes) -> None:
    for name, known in _MODELLED.items():
        if vmcb.read(block, name) & ~known:
            raise ModelError(f"VMCB {name} {vmcb.read(block, name):#x}: only {known:#x} is modelled")
    for name in _ZERO:
        if vmcb.read(block, name):
            raise ModelError(f"VMCB {name} is not zero: not modelled")
    if not vmcb.read(block, "intercepts2") & vmcb.INTERCEPT_VMRUN or not vmcb.read(block, "asid"):
        raise ModelError("a VMCB without the intercept of VMRUN or an ASID: VMEXIT_INVALID is not modelled")


def _save_host(cpu: Cpu) -> None:
    """The host save area is the processor's own business: all of it is undefined from now on (APM vol. 2 15.5.1)."""
    area = msr(cpu, VM_HSAVE_PA)
    cpu.mem.physical_write(area, cpu.mem.physical_read(area, _PAGE))
    cpu.mem.mark_undefined(area, (1 << 8 * _PAGE) - 1)


def leave(cpu: Cpu, event: VmExit) -> None:
    """#VMEXIT: the guest's registers into its block, then the host's (APM vol. 2 15.6)."""
    guest = cpu.guest
    assert isinstance(guest, Guest)
    cpu.rip = cpu.start_rip
    seen, host = cpu.state(), guest.host
    for offset, data in vmcb.save_area(seen, vmcb.SWITCHED).items():
        cpu.mem.physical_write(guest.address + offset, data)
    cpu.mem.mark_undefined(guest.address + vmcb.RFLAGS, cpu.undefined)
    features = cpu.profile.leaf(0x8000000A)
    fields = {
        "exit_code": event.code, "exit_info1": event.info1, "exit_info2": event.info2, "exit_int_info": 0,
        "shadow": int(bool(cpu.shadow)), **({"next_rip": None} if features and features.edx & _NRIPS else {}),
    }  # fmt: skip
    for name, value in fields.items():
        at, size = vmcb.CONTROL[name]
        cpu.mem.physical_write(guest.address + at, (value or 0).to_bytes(size, "little"))
        if value is None:
            cpu.mem.mark_undefined(guest.address + at, MASK[64])
    at, _ = vmcb.CONTROL["exit_int_info"]
    cpu.mem.mark_undefined(guest.address + at, MASK[64] & ~_VALID)
    back = {name: getattr(host, name) for name in (*vmcb.SWITCHED, *_HOST)}
    gpr = (host.gpr[0], *seen.gpr[1:4], host.gpr[4], *seen.gpr[5:])
    flags, cr0 = host.rflags & ~VM, host.cr0 | _CR0_PE
    cpu.load_state(replace(seen, gpr=gpr, rflags=flags, cr0=cr0, dr7=_DR7_OFF, events=host.events, **back))
    cpu.undefined = guest.undefined
    cpu.guest, cpu.gif = None, False


# --- the rest -------------------------------------------------------------------------------------------------------


def vmmcall(insn: Insn) -> Operation:
    """VMMCALL: to the host. A guest's guest whose host does not intercept it has no such instruction."""
    mask = MASK[64 if insn.bits == 64 else 32]

    def op(cpu: Cpu) -> None:
        cpu.intercept("intercepts2", vmcb.INTERCEPT_VMMCALL, vmcb.EXIT_VMMCALL)
        if cpu.guest is not None:
            raise Fault(UD)
        hypercall(cpu, mask)

    return op


def vmsave(insn: Insn) -> Operation:
    """VMSAVE: FS, GS, TR, LDTR and the MSRs of system calls into the block at rAX."""
    bits = insn.addrsize

    def op(cpu: Cpu) -> None:
        _enabled(cpu)
        address, state = _block_address(cpu, bits), cpu.state()
        for name in vmcb.LOADED:
            cpu.mem.physical_write(address + vmcb.segment_at(name), vmcb.pack_segment(getattr(state, name)))
        for index, at in vmcb.MSRS.items():
            cpu.mem.physical_write(address + vmcb.SAVE + at, msr(cpu, index).to_bytes(8, "little"))

    return op


def vmload(insn: Insn) -> Operation:
    """VMLOAD: the inverse of VMSAVE."""
    bits = insn.addrsize

    def op(cpu: Cpu) -> None:
        _enabled(cpu)
        block = cpu.mem.physical_read(_block_address(cpu, bits), _PAGE)
        for index, at in vmcb.MSRS.items():
            set_msr(cpu, index, int.from_bytes(block[vmcb.SAVE + at :][:8], "little"))
        cpu.seg[FS], cpu.seg[GS], cpu.ldtr, cpu.tr = (vmcb.unpack_segment(block, name) for name in vmcb.LOADED)

    return op


def set_gif(insn: Insn, value: bool) -> Operation:
    """STGI, CLGI: the global interrupt flag."""

    def op(cpu: Cpu) -> None:
        _enabled(cpu)
        cpu.gif = value

    return op


SVM_ROWS: Final = [
    Row("vmrun", "NP 0F 01 =D8", "", vmrun, "APM 3 VMRUN", feature="svm"),
    Row("vmmcall", "NP 0F 01 =D9", "", vmmcall, "APM 3 VMMCALL"),
    Row("vmload", "NP 0F 01 =DA", "", vmload, "APM 3 VMLOAD", feature="svm"),
    Row("vmsave", "NP 0F 01 =DB", "", vmsave, "APM 3 VMSAVE", feature="svm"),
    Row("stgi", "NP 0F 01 =DC", "", lambda i: set_gif(i, True), "APM 3 STGI", feature="svm"),
    Row("clgi", "NP 0F 01 =DD", "", lambda i: set_gif(i, False), "APM 3 CLGI", feature="svm"),
]
