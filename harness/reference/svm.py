"""SVM seen from inside a guest: VMRUN, #VMEXIT, VMLOAD, VMSAVE, STGI, CLGI (APM vol. 2 chapter 15, vol. 3).

Enough for a guest that runs a guest: intercepts of instructions, ports, MSRs and exceptions, injected events, states
that VMRUN refuses. No nested paging, no virtual interrupts, no intercepts of events from outside; a block that asks for
more is a ModelError.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from harness import vmcb
from harness.reference import events
from harness.reference.control import CR4, cr4_reserved, pae_paging
from harness.reference.cpu import FS, GP, GS, MASK, RAX, RCX, RDX, SHADOW_STI, UD, VM, Cpu, Fault, ModelError
from harness.reference.insn import Insn, Operation, Row
from harness.reference.msr import VM_HSAVE_PA, msr, set_msr
from harness.reference.paging import read_pdptes
from harness.reference.segments import privileged
from harness.state import MASK64, CpuState

_SVME: Final = 1 << 12
_EFER_LME, _EFER_LMA = 1 << 8, 1 << 10
_CR0_PE, _CR0_NW, _CR0_CD, _CR0_PG = 1, 1 << 29, 1 << 30, 1 << 31
_DR7_OFF: Final = 0x400
_DR6_ONES: Final = 0xFFFF0FF0
_RFLAGS_KNOWN: Final = 0x3F7FD7
_PAGE: Final = 4096
_NRIPS: Final = 1 << 3
_VALID: Final = 1 << 31
_HOST: Final = ("gdtr", "idtr", "efer", "cr3", "cr4", "pdptr", "rip")
_ZERO: Final = ("intercepts3", "tsc_offset", "tlb_control", "virtual_interrupt", "nested_paging", "lbr", "clean")
_SOFT: Final = 1 << 3 | 1 << 4
_FOR_CPL0: Final = frozenset(
    {"lidt", "lgdt", "lldt", "ltr", "invd", "hlt", "invlpg", "wbinvd", "vmrun", "vmload", "vmsave", "stgi", "clgi",
     "xsetbv"}
)  # fmt: skip
"""Their #GP for CPL > 0 comes before the intercept (APM vol. 2 15.7, table 15-7)."""
_STRING_BITS: Final = 0x1F80
"""Address size and segment in EXITINFO1 of IOIO: of string instructions (15.10.2); left open for the others."""


@dataclass(frozen=True)
class Guest:
    """The guest that runs now: its block's address, what it intercepts, and the host's registers.

    ``cr`` and ``dr`` have reads in bits 15:0 and writes in 31:16; bit n of ``vectors`` is exit code EXIT_FIRST + n.
    """

    address: int
    cr: int
    dr: int
    exceptions: int
    vectors: int
    iopm: int
    msrpm: int
    host: CpuState
    undefined: int

    def wants(self, code: int) -> bool:
        """Whether the instruction with this exit code is intercepted."""
        return bool(self.vectors >> (code - vmcb.EXIT_FIRST) & 1)


# --- VMRUN ----------------------------------------------------------------------------------------------------------


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
    """VMRUN (15.5): keep the host's registers, go on with the guest's."""
    bits = insn.addrsize

    def op(cpu: Cpu) -> None:
        _enabled(cpu)
        address = _block_address(cpu, bits)
        block = cpu.mem.physical_read(address, _PAGE)
        _check(block)
        field = {name: vmcb.read(block, name) for name in vmcb.CONTROL if name != "instruction"}
        guest = Guest(
            address, field["cr_intercepts"], field["dr_intercepts"], field["exceptions"],
            field["intercepts2"] << 32 | field["intercepts1"], field["iopm"] & ~0xFFF, field["msrpm"] & ~0xFFF,
            cpu.state(), cpu.undefined,
        )  # fmt: skip
        _save_host(cpu)
        cpu.guest = guest
        if _invalid(cpu, guest, block):
            leave(cpu, vmcb.EXIT_INVALID)
            return
        _load(cpu, guest.host, block)
        _inject(cpu, field["event_injection"])

    return op


def _check(block: bytes) -> None:
    for name, known in vmcb.intercepts(*vmcb.EXITS).items():
        if vmcb.read(block, name) & ~known:
            raise ModelError(f"VMCB {name} {vmcb.read(block, name):#x}: only {known:#x} is modelled")
    for name in _ZERO:
        if vmcb.read(block, name):
            raise ModelError(f"VMCB {name} is not zero: not modelled")
    if vmcb.read(block, "exceptions") & _SOFT:
        raise ModelError("intercepts of INT3 and INTO are not modelled")


def _save_host(cpu: Cpu) -> None:
    """The host save area is the processor's own business: all of it is undefined from now on (APM vol. 2 15.5.1)."""
    area = msr(cpu, VM_HSAVE_PA)
    if cpu.mem.is_ram(area):
        cpu.mem.physical_write(area, cpu.mem.physical_read(area, _PAGE))
        cpu.mem.mark_undefined(area, (1 << 8 * _PAGE) - 1)


def _register(block: bytes, name: str) -> int:
    at = vmcb.REGISTERS[name]
    return int.from_bytes(block[at : at + 8], "little")


def _invalid(cpu: Cpu, guest: Guest, block: bytes) -> bool:
    """Whether the guest's state is one that VMRUN refuses (15.5.1, "Canonicalization and Consistency Checks")."""
    efer, cr0, cr4 = (_register(block, name) for name in ("efer", "cr0", "cr4"))
    cs = vmcb.unpack_segment(block, "cs")
    long = efer & _EFER_LME and cr0 & _CR0_PG
    return bool(
        not efer & _SVME
        or (cr0 & _CR0_NW and not cr0 & _CR0_CD)
        or cr0 >> 32
        or cr4 & cr4_reserved(cpu)
        or _register(block, "dr6") >> 32
        or _register(block, "dr7") >> 32
        or (long and not cr4 & CR4["PAE"])
        or (long and not cr0 & _CR0_PE)
        or (long and cs.l and cs.db)
        or not guest.wants(vmcb.EXITS["vmrun"])
        or not vmcb.read(block, "asid")
    )


def _load(cpu: Cpu, host: CpuState, block: bytes) -> None:
    """The guest's registers, all but those that VMLOAD moves."""
    state = vmcb.enter(host, block)
    long = state.efer & _EFER_LME and state.cr0 & _CR0_PG
    efer = state.efer | _EFER_LMA if long else state.efer & ~_EFER_LMA
    cpu.load_state(
        replace(
            state, efer=efer, dr6=state.dr6 | _DR6_ONES, dr7=state.dr7 | _DR7_OFF, rflags=state.rflags & _RFLAGS_KNOWN
        )
    )
    cpu.shadow = SHADOW_STI if vmcb.read(block, "shadow") & 1 else 0
    if pae_paging(cpu):
        cpu.pdptr = read_pdptes(cpu, cpu.cr3)
    cpu.gif = True


def _inject(cpu: Cpu, event: int) -> None:
    """EVENTINJ (15.20): as if the event had happened in the guest, without a check of intercepts or of the gate."""
    if not event & _VALID:
        return
    kind, vector = event >> 8 & 7, event & 0xFF
    if kind not in (0, 3, 4):
        raise ModelError(f"EVENTINJ {event:#x}: this type is not modelled")
    events.deliver(cpu, vector, event >> 32 if event >> 11 & 1 else None)


# --- #VMEXIT --------------------------------------------------------------------------------------------------------


def leave(cpu: Cpu, code: int, info1: int | None = None, info2: int | None = None, unsaid: int = 0) -> None:
    """#VMEXIT: the guest's registers into its block, then the host's (APM vol. 2 15.6). CR2 and DR6 stay the guest's.

    ``info1``, ``info2``: None where the exit code gives them no meaning; ``unsaid``: such bits of ``info1``.
    """
    guest, cpu.guest = cpu.guest, None
    assert guest is not None
    address, seen, host = guest.address, cpu.state(), guest.host
    if code != vmcb.EXIT_INVALID:
        for offset, data in vmcb.save_area(seen, vmcb.SWITCHED).items():
            cpu.mem.physical_write(address + offset, data)
        cpu.mem.mark_undefined(address + vmcb.RFLAGS, cpu.undefined)
        _put(cpu, address, "shadow", int(bool(cpu.shadow)))
    _put(cpu, address, "exit_code", code)
    _put(cpu, address, "exit_info1", info1 or 0, MASK64 if info1 is None else unsaid)
    _put(cpu, address, "exit_info2", info2 or 0, MASK64 if info2 is None else 0)
    _put(cpu, address, "exit_int_info", 0, MASK64 & ~_VALID)
    _put(cpu, address, "event_injection", 0, MASK64 & ~_VALID)
    features = cpu.profile.leaf(0x8000000A)
    if features and features.edx & _NRIPS:
        _put(cpu, address, "next_rip", 0, MASK64)
    _restore(cpu, seen, host)
    cpu.undefined, cpu.gif = guest.undefined, False


def _put(cpu: Cpu, address: int, name: str, value: int, undefined: int = 0) -> None:
    """Write a field of the control area; what the bits of ``undefined`` hold is not said."""
    at, size = vmcb.CONTROL[name]
    cpu.mem.physical_write(address + at, value.to_bytes(size, "little"))
    cpu.mem.mark_undefined(address + at, undefined)


def _restore(cpu: Cpu, seen: CpuState, host: CpuState) -> None:
    """The host goes on after its VMRUN, with breakpoints off."""
    back = {name: getattr(host, name) for name in (*vmcb.SWITCHED, *_HOST)}
    gpr = (host.gpr[0], *seen.gpr[1:4], host.gpr[4], *seen.gpr[5:])
    flags, cr0 = host.rflags & ~VM, host.cr0 | _CR0_PE
    cpu.load_state(replace(seen, gpr=gpr, rflags=flags, cr0=cr0, dr7=_DR7_OFF, events=host.events, **back))


# --- intercepts -----------------------------------------------------------------------------------------------------


def intercepted(cpu: Cpu, insn: Insn) -> bool:
    """Leave the guest if this instruction is intercepted; False when it is to be executed."""
    guest = cpu.guest
    assert guest is not None
    name = insn.row.mnemonic
    if name == "mov":
        return _register_move(cpu, guest, insn)
    if name in ("in", "out", "ins", "outs"):
        return guest.wants(vmcb.EXIT_IOIO) and _port(cpu, guest, insn)
    if name in ("rdmsr", "wrmsr"):
        return guest.wants(vmcb.EXIT_MSR) and _msr_access(cpu, guest, insn)
    code = vmcb.EXITS.get(name)
    if code is None or not guest.wants(code) or (name in _FOR_CPL0 and cpu.cpl):
        return False
    leave(cpu, code)
    return True


def _register_move(cpu: Cpu, guest: Guest, insn: Insn) -> bool:
    """MOV to and from control and debug registers (15.9); EXITINFO1 is there with decode assists only."""
    kinds = [operand[:1] for operand in insn.operands if operand in ("Cy", "Dy")]
    if not kinds or cpu.cpl:
        return False
    write = insn.operands[0] in ("Cy", "Dy")
    mask, code = (guest.cr, vmcb.EXIT_CR) if kinds[0] == "C" else (guest.dr, vmcb.EXIT_DR)
    if not mask >> (16 * write + insn.reg) & 1:
        return False
    leave(cpu, code + vmcb.EXIT_WRITE * write + insn.reg)
    return True


def _port(cpu: Cpu, guest: Guest, insn: Insn) -> bool:
    """IN and OUT (15.10): EXITINFO1 tells the access, EXITINFO2 is the next RIP."""
    name = insn.row.mnemonic
    if cpu.cpl or name not in ("in", "out"):
        raise ModelError(f"intercepted {name} at CPL {cpu.cpl} is not modelled")
    write = name == "out"
    operand, value = insn.operands if write else reversed(insn.operands)
    port = cpu.gpr[RDX] & 0xFFFF if operand == "DX" else insn.imm & 0xFF
    size = 1 if value == "AL" else min(insn.opsize, 32) >> 3
    bits = int.from_bytes(cpu.mem.physical_read(guest.iopm + (port >> 3), 2), "little") >> (port & 7)
    if not bits & (1 << size) - 1:
        return False
    info = port << 16 | size << 4 | (not write)
    leave(cpu, vmcb.EXIT_IOIO, info, cpu.rip + insn.length & MASK64, unsaid=_STRING_BITS)
    return True


def _msr_access(cpu: Cpu, guest: Guest, insn: Insn) -> bool:
    """RDMSR, WRMSR (15.11): by the permission map; what is outside of it is intercepted."""
    if cpu.cpl:
        return False
    index, write = cpu.gpr[RCX] & MASK[32], insn.row.mnemonic == "wrmsr"
    for first, offset in vmcb.MSR_RANGES:
        if first <= index < first + 0x2000:
            bit = 2 * (index - first) + write
            if not cpu.mem.physical_read(guest.msrpm + offset + (bit >> 3), 1)[0] >> (bit & 7) & 1:
                return False
    leave(cpu, vmcb.EXIT_MSR, int(write))
    return True


def exception(cpu: Cpu, vector: int, error: int | None, cr2: int | None) -> bool:
    """Leave the guest if this exception is intercepted (15.12): CR2 is then not written, EXITINFO2 has the address."""
    guest = cpu.guest
    if guest is None or vector > 31 or not guest.exceptions >> vector & 1:
        return False
    leave(cpu, vmcb.EXIT_EXCEPTION + vector, error, cr2)
    return True


# --- the rest -------------------------------------------------------------------------------------------------------


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
    Row("vmload", "NP 0F 01 =DA", "", vmload, "APM 3 VMLOAD", feature="svm"),
    Row("vmsave", "NP 0F 01 =DB", "", vmsave, "APM 3 VMSAVE", feature="svm"),
    Row("stgi", "NP 0F 01 =DC", "", lambda i: set_gif(i, True), "APM 3 STGI", feature="svm"),
    Row("clgi", "NP 0F 01 =DD", "", lambda i: set_gif(i, False), "APM 3 CLGI", feature="svm"),
]
