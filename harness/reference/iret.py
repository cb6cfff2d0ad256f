"""INT n, INT3, INTO, INT1 and IRET (SDM vol. 2A INT n, IRET; APM vol. 3 INT, IRET; vol. 3A 20.3 for virtual-8086)."""

from __future__ import annotations

from typing import Final

from harness.modes import decode_segment
from harness.reference import descriptors as desc
from harness.reference.cpu import (
    AC,
    ARITH,
    BP,
    CS,
    DB,
    DF,
    DS,
    ES,
    FS,
    GP,
    GS,
    ID,
    IF,
    IOPL,
    MASK,
    NP,
    NT,
    OF,
    OFLOW,
    RF,
    RSP,
    SS,
    TF,
    VIF,
    VIP,
    VM,
    Cpu,
    Fault,
    ModelError,
)
from harness.reference.events import deliver
from harness.reference.insn import Insn, Operation, Row
from harness.state import Segment

_CR4_VME: Final = 1
_BASIC: Final = ARITH | TF | DF | NT
_CR4_CET: Final = 1 << 23


# --- software interrupts --------------------------------------------------------------------------------------------


def int_n(insn: Insn) -> Operation:
    """INT n: in virtual-8086 mode #GP(0) below IOPL 3, or the redirection map of VME (SDM vol. 3A 20.3.3)."""
    vector = insn.imm & 0xFF

    def op(cpu: Cpu) -> None:
        if cpu.vm86:
            if cpu.cr4 & _CR4_VME and not _redirected(cpu, vector):
                _int_vme(cpu, vector)
                return
            if cpu.rflags & IOPL != IOPL:
                raise Fault(GP, 0)
        deliver(cpu, vector, None, True, cpu.rip)

    return op


def _redirected(cpu: Cpu, vector: int) -> bool:
    """Whether the TSS's interrupt redirection bit map sends ``vector`` to protected mode (SDM vol. 3A 20.3.3.4)."""
    if not cpu.tr.type & 8 or cpu.tr.limit < 0x67:
        raise Fault(GP, 0)
    at = cpu.mem.linear_read(cpu.tr.base + 0x66 & MASK[32], 2) - 32 + (vector >> 3)
    if at > cpu.tr.limit or at < 0:
        raise Fault(GP, 0)
    return bool(cpu.mem.linear_read(cpu.tr.base + at & MASK[32], 1) >> (vector & 7) & 1)


def _int_vme(cpu: Cpu, vector: int) -> None:
    """An interrupt that stays in virtual-8086 mode (SDM vol. 3A 20.3.3.4 methods 5 and 6)."""
    flags, virtual = cpu.rflags & 0xFFFF, cpu.rflags & IOPL != IOPL
    if virtual:
        flags = flags & ~IF | IOPL | (IF if cpu.rflags & VIF else 0)
    entry = cpu.mem.linear_read(vector * 4, 4, system=False)
    sp = cpu.sp()
    for n, (value, undefined) in enumerate(((flags, cpu.undefined), (cpu.seg[CS].selector, 0), (cpu.rip, 0))):
        cpu.mem.write(SS, sp - 2 * n - 2 & MASK[16], 2, value & 0xFFFF, undefined)
    cpu.set_sp(sp - 6)
    cpu.seg[CS] = desc.real_segment(cpu, cpu.seg[CS], entry >> 16)
    cpu.rip = entry & 0xFFFF
    cpu.rflags &= ~(TF | RF | NT | (VIF if virtual else IF))
    cpu.mode_changed()


def int3(insn: Insn) -> Operation:
    """INT3: #BP, a trap; the gate's DPL is checked, virtual-8086 IOPL is not (SDM vol. 2A INT n)."""
    return lambda cpu: deliver(cpu, BP, None, True, cpu.rip)


def into(insn: Insn) -> Operation:
    """INTO: #OF when OF is set."""

    def op(cpu: Cpu) -> None:
        if cpu.flags(OF):
            deliver(cpu, OFLOW, None, True, cpu.rip)

    return op


def int1(insn: Insn) -> Operation:
    """INT1: #DB as if by hardware, no DPL check, DR6 as it is (SDM vol. 2A INT n)."""

    def op(cpu: Cpu) -> None:
        cpu.trap_bits = 0
        deliver(cpu, DB, None, False, cpu.rip)

    return op


# --- IRET -----------------------------------------------------------------------------------------------------------


class Stack:
    """Reads the stack from the top down without moving the stack pointer."""

    def __init__(self, cpu: Cpu, size: int) -> None:
        self.cpu, self.size, self.done = cpu, size, 0

    def pop(self) -> int:
        """The next slot of ``size`` bits."""
        return self.pop_undefined(False)[0]

    def pop_undefined(self, masked: bool = True) -> tuple[int, int]:
        """The next slot and its undefined bits."""
        cpu, n = self.cpu, self.size >> 3
        at = self.pointer()
        self.done += n
        if masked:
            return cpu.mem.read_undefined(SS, at, n)
        return cpu.mem.read(SS, at, n), 0

    def pointer(self) -> int:
        """The stack pointer after what has been popped."""
        return (self.cpu.gpr[RSP] + self.done) & MASK[self.cpu.stack_bits]


def write_flags(cpu: Cpu, value: int, undefined: int, mask: int) -> None:
    """Replace the RFLAGS bits of ``mask``; RF is the step loop's to clear for every other instruction."""
    cpu.rflags = (cpu.rflags & ~mask | value & mask) | 2
    cpu.undefined = cpu.undefined & ~mask | undefined & mask


def flag_mask(cpu: Cpu, size: int) -> int:
    """RFLAGS bits that IRET may change in protected mode at this CPL (SDM vol. 2A IRET)."""
    mask = _BASIC
    if size > 16:
        mask |= RF | AC | ID
    if cpu.cpl <= (cpu.rflags & IOPL) >> 12:
        mask |= IF
    if cpu.cpl == 0:
        mask |= IOPL | (VIF | VIP if size > 16 else 0)
    return mask


def iret(insn: Insn) -> Operation:
    """IRET, IRETD, IRETQ."""
    size = insn.opsize

    def op(cpu: Cpu) -> None:
        if cpu.cr4 & _CR4_CET:
            raise ModelError("IRET with CR4.CET is not modelled")
        if not cpu.pe:
            _iret_real(cpu, size)
        elif cpu.vm86:
            _iret_vm86(cpu, size)
        else:
            _iret_protected(cpu, size)
        cpu.nmi_masked = 0
        cpu.mode_changed()

    return op


def _iret_real(cpu: Cpu, size: int) -> None:
    stack = Stack(cpu, size)
    rip, selector = stack.pop(), stack.pop() & 0xFFFF
    flags, undefined = stack.pop_undefined()
    if rip > cpu.seg[CS].limit:
        raise Fault(GP, 0)
    mask = _BASIC | IF | IOPL | (RF | AC | ID if size > 16 else 0)
    write_flags(cpu, flags, undefined, mask)
    cpu.set_sp(stack.pointer())
    cpu.rip = rip
    cpu.seg[CS] = desc.real_segment(cpu, cpu.seg[CS], selector)


def _iret_vm86(cpu: Cpu, size: int) -> None:
    """IRET in virtual-8086 mode; with VME below IOPL 3 it works on VIF (SDM vol. 3A 20.3, table 20-2; vol. 2A IRET)."""
    virtual = cpu.rflags & IOPL != IOPL
    if virtual and (not cpu.cr4 & _CR4_VME or size != 16):
        raise Fault(GP, 0)
    stack = Stack(cpu, size)
    rip, selector = stack.pop(), stack.pop() & 0xFFFF
    flags, undefined = stack.pop_undefined()
    if rip > cpu.seg[CS].limit:
        raise Fault(GP, 0)
    if virtual:
        if flags & TF or (cpu.rflags & VIP and flags & IF):
            raise Fault(GP, 0)
        write_flags(cpu, flags | (VIF if flags & IF else 0), undefined, _BASIC | VIF)
    else:
        write_flags(cpu, flags, undefined, _BASIC | IF | (RF | AC | ID if size > 16 else 0))
    cpu.set_sp(stack.pointer())
    cpu.rip = rip
    cpu.seg[CS] = desc.real_segment(cpu, cpu.seg[CS], selector)


def _iret_protected(cpu: Cpu, size: int) -> None:
    if cpu.rflags & NT:
        if cpu.lma:
            raise Fault(GP, 0)
        raise ModelError("IRET with NT: task return")
    stack = Stack(cpu, size)
    rip, selector = stack.pop(), stack.pop() & 0xFFFF
    flags, undefined = stack.pop_undefined()
    if flags & VM and cpu.cpl == 0 and size == 32 and not cpu.lma:
        _to_vm86(cpu, stack, rip, selector, flags, undefined)
        return
    code, data = checked_return(cpu, selector)
    level = selector & 3
    outer = level > cpu.cpl
    if outer or cpu.long64:
        sp, ss_selector = stack.pop(), stack.pop() & 0xFFFF
        null_ok = bool(cpu.lma and code.l and level != 3)
        ss, ss_data = desc.check_stack(cpu, ss_selector, level, null_ok=null_ok)
        if desc.null(ss_selector) and ss_selector & 3 != level:
            raise Fault(GP, 0)
    check_target(cpu, code, rip)
    mask = flag_mask(cpu, size)
    if outer or cpu.long64:
        cpu.seg[SS] = desc.finish(cpu, ss, ss_data)
    desc.load_code(cpu, selector, data, level)
    cpu.rip = rip
    write_flags(cpu, flags, undefined, mask)
    if outer or cpu.long64:
        load_sp(cpu, sp)
    else:
        cpu.set_sp(stack.pointer())
    if outer:
        desc.drop_inner(cpu, level)


def load_sp(cpu: Cpu, sp: int) -> None:
    """RSP after a return that loads SS: only SP when the new stack is 16 bits wide (SDM vol. 1 6.2.3)."""
    if cpu.lma and cpu.seg[CS].l:
        cpu.gpr[RSP] = sp
    elif cpu.seg[SS].db:
        cpu.gpr[RSP] = sp & MASK[32]
    else:
        cpu.write_reg(16, RSP, sp)


def checked_return(cpu: Cpu, selector: int) -> tuple[Segment, bytes]:
    """The code segment that a far return or IRET goes to (SDM vol. 2A IRET, RET)."""
    if desc.null(selector):
        raise Fault(GP, 0)
    data = desc.read(cpu, selector)
    code = decode_segment(selector, data)
    level = selector & 3
    error = desc.error_of(selector)
    if not code.s or not code.type & desc.CODE or level < cpu.cpl:
        raise Fault(GP, error)
    if code.dpl > level if code.type & desc.CONFORMING else code.dpl != level:
        raise Fault(GP, error)
    if not desc.code_mode_ok(cpu, code):
        raise Fault(GP, error)
    if not code.present:
        raise Fault(NP, error)
    return code, data


def check_target(cpu: Cpu, code: Segment, rip: int) -> None:
    """#GP(0) for a target that is not canonical (64-bit code) or past the limit of the new CS."""
    if cpu.lma and code.l:
        if not cpu.canonical(rip):
            raise Fault(GP, 0)
    elif rip > code.limit:
        raise Fault(GP, 0)


def _to_vm86(cpu: Cpu, stack: Stack, rip: int, selector: int, flags: int, undefined: int) -> None:
    """Return to virtual-8086 mode: ESP, SS, ES, DS, FS, GS follow (SDM vol. 3A 20.2.5)."""
    esp = stack.pop()
    selectors = {index: stack.pop() & 0xFFFF for index in (SS, ES, DS, FS, GS)}
    if rip > 0xFFFF:
        raise Fault(GP, 0)
    selectors[CS] = selector
    write_flags(cpu, flags, undefined, _BASIC | RF | AC | ID | IF | IOPL | VIF | VIP | VM)
    for index, value in selectors.items():
        cpu.seg[index] = Segment(value, value << 4, 0xFFFF, 3, 1, 3)
    cpu.rip = rip
    cpu.gpr[RSP] = esp


INTERRUPT_ROWS: Final = [
    Row("int3", "CC", "", int3, "SDM 2A INT n"),
    Row("int", "CD", "Ib", int_n, "SDM 2A INT n"),
    Row("into", "CE", "", into, "SDM 2A INT n", modes="no64"),
    Row("int1", "F1", "", int1, "SDM 2A INT n"),
    Row("iret/iretd/iretq", "CF", "", iret, "SDM 2A IRET"),
]
