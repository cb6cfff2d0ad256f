"""The fetch-execute loop: one instruction, its faults, its debug traps; and the fast loop over many."""

from __future__ import annotations

from functools import lru_cache
from typing import Final

from harness.reference import events, svm
from harness.reference.cpu import CS, DB, MASK, NMI, RCX, RF, SHADOW_MOV_SS, TF, Cpu, Fault, ModelError
from harness.reference.decoder import Truncated, decode
from harness.reference.insn import Insn, Operation

PAGE: Final = 4096
FORCE_EMULATION: Final = b"\x0f\x0b\x6b\x76\x6d"
"""UD2 and "kvm": KVM with kvm.force_emulation_prefix steps over it and emulates what follows (x86.c, handle_ud())."""
DR6_BS: Final = 1 << 14
_NO_TRAP: Final = frozenset({"int", "int3", "into", "int1", "icebp", "syscall", "sysenter"})
"""Instructions that leave for a handler with TF clear: no single-step trap of their own (SDM vol. 3B 17.3.1.4)."""


@lru_cache(maxsize=1 << 16)
def compile_code(
    code: bytes, bits: int, features: frozenset[str], amd: bool, apx: int
) -> tuple[Insn, Operation, bool, bool]:
    """Decode and compile the instruction at the start of ``code``: (insn, operation, no trap, REP string)."""
    insn = decode(code, None, bits, features=features, amd=amd, apx=apx)
    row = insn.row
    string = bool(insn.rep) and any(p[0] in "XY" for p in insn.operands)
    return insn, row.operation(insn), row.mnemonic in _NO_TRAP, string


class CodeEntry:
    """A compiled instruction at an address. ``version`` -1: check its bytes every time (it spans two pages)."""

    __slots__ = ("code", "insn", "next", "no_trap", "op", "page", "string", "version")

    def __init__(
        self, op: Operation, next_rip: int, code: bytes, no_trap: bool, string: bool, insn: Insn | None = None
    ) -> None:
        self.op, self.next, self.code, self.insn = op, next_rip, code, insn
        self.no_trap, self.string = no_trap, string
        self.page = self.version = -1


def _fetch(cpu: Cpu) -> tuple[Insn, Operation, bool, bool]:
    """Read as much code as the instruction needs, page by page: a byte that is not needed cannot fault."""
    rip, mem = cpu.rip, cpu.mem
    n = min(15, PAGE - (cpu.linear_rip() & (PAGE - 1)))
    if not cpu.long64:
        n = min(n, max(cpu.seg[CS].limit - rip + 1, 1))
    while True:
        try:
            return compile_code(mem.fetch(rip, n), cpu.bits, cpu.features, cpu.amd, cpu.apx)
        except Truncated:
            n += 1


def _forced(cpu: Cpu) -> None:
    """The prefix itself does nothing: to the guest the instruction after it is any other."""


def _forced_entry(cpu: Cpu) -> CodeEntry | None:
    """The force-emulation prefix, if that is what is at RIP and this Case has it."""
    if not cpu.forced:
        return None
    rip, size = cpu.rip, len(FORCE_EMULATION)
    try:
        if cpu.mem.fetch(rip, 2) != FORCE_EMULATION[:2] or cpu.mem.fetch(rip, size) != FORCE_EMULATION:
            return None
    except Fault:  # past the end of what can be fetched: a shorter instruction may be there all the same
        return None
    return CodeEntry(_forced, rip + size & MASK[64 if cpu.long64 else 32], FORCE_EMULATION, True, False)


def lookup(cpu: Cpu) -> CodeEntry:
    """The compiled instruction at RIP, checked against memory. Fault when it cannot be fetched or is invalid."""
    rip, mem = cpu.rip, cpu.mem
    entry: CodeEntry | None = cpu.code.get(rip)
    if entry is not None:
        if entry.version >= 0 and mem.code_version(entry.page) == entry.version:
            return entry
        parts = mem.fetch_parts(rip, len(entry.code))
        if mem.fetch(rip, len(entry.code)) != entry.code:
            entry = None
    if entry is None and (entry := _forced_entry(cpu)) is not None:
        cpu.code[rip] = entry
        parts = mem.fetch_parts(rip, len(entry.code))
    elif entry is None:
        insn, op, no_trap, string = _fetch(cpu)
        entry = CodeEntry(op, rip + insn.length & MASK[64 if cpu.long64 else 32], insn.code, no_trap, string, insn)
        cpu.code[rip] = entry
        parts = mem.fetch_parts(rip, insn.length)
    if len(parts) == 1:
        entry.page = parts[0][0] >> 12
        entry.version = mem.code_version(entry.page)
    return entry


def _with_rip(error: ModelError, rip: int) -> ModelError:
    text = str(error)
    return error if f"{rip:#x}" in text else ModelError(f"{text} (RIP {rip:#x})")


def take(cpu: Cpu, fault: Fault) -> None:
    """Deliver a fault of the instruction at ``cpu.start_rip``. events.TripleFault when that ends in shutdown."""
    cpu.rip = cpu.start_rip
    cpu.repeat = False
    if svm.exception(cpu, fault.vector, fault.error, fault.cr2):
        return
    if fault.cr2 is not None:
        cpu.cr2 = fault.cr2
    events.deliver(cpu, fault.vector, fault.error)


def _instruction_breakpoint(cpu: Cpu) -> None:
    """#DB before the instruction when an enabled execution breakpoint is at it (SDM vol. 3B 17.3.1.1)."""
    here = cpu.linear_rip()
    for n in range(4):
        if cpu.dr7 >> 2 * n & 3 and not cpu.dr7 >> 16 + 4 * n & 15 and cpu.dr[n] == here:
            cpu.trap_bits |= 1 << n
    if cpu.trap_bits:
        raise Fault(DB)


def _restartable(cpu: Cpu, entry: CodeEntry) -> bool:
    """A REP string item is done that leaves more to do, if only to find rCX zero: not one at which ZF has ended it."""
    if not entry.string or entry.insn is None:
        return False
    return cpu.repeat or not cpu.gpr[RCX] & MASK[entry.insn.addrsize]


def step(cpu: Cpu) -> bool:
    """Execute one instruction, or one iteration of a REP, or deliver a pending NMI.

    Checks everything: breakpoints, single-step trap, RF, interrupt shadow. True after an item of a REP string
    instruction that a machine may still be in: all of them but one at which ZF has ended it.
    """
    rip = cpu.start_rip = cpu.rip
    flags, shadow = cpu.rflags, cpu.shadow
    if cpu.nmi_pending and cpu.gif and not cpu.nmi_masked and shadow != SHADOW_MOV_SS:
        cpu.nmi_pending = 0
        events.deliver(cpu, NMI)
        return False
    cpu.trap_bits = 0
    try:
        if cpu.dr7 & 0xFF and not flags & RF and shadow != SHADOW_MOV_SS:
            _instruction_breakpoint(cpu)
        entry = lookup(cpu)
        if entry.op is _forced:
            cpu.rip = entry.next
            return False
        if cpu.guest is not None and entry.insn is not None and svm.intercepted(cpu, entry.insn):
            return False
        cpu.shadow = 0
        cpu.rflags = flags & ~RF
        cpu.rip = entry.next
        entry.op(cpu)
    except Fault as fault:
        cpu.rflags |= flags & RF
        if fault.vector != DB:
            cpu.trap_bits = 0
        take(cpu, fault)
        return False
    except ModelError as error:
        cpu.rip = rip
        raise _with_rip(error, rip) from None
    string = _restartable(cpu, entry)
    if cpu.repeat:
        cpu.repeat = False
    else:
        cpu.retired += 1
    if flags & TF and not entry.no_trap:
        cpu.trap_bits |= DR6_BS
    if cpu.trap_bits and cpu.shadow != SHADOW_MOV_SS and not svm.exception(cpu, DB, None, None):
        events.deliver(cpu, DB)
    return string


def run(cpu: Cpu, budget: int) -> bool:
    """Execute until an instruction has exits (``cpu.pending_exits``); what :func:`step` returns for that one.

    ModelError after ``budget`` instructions without one; events.TripleFault on shutdown.
    """
    exits, mem = cpu.pending_exits, cpu.mem
    version = mem.code_version
    string = False
    for _ in range(budget):
        rip = cpu.rip
        entry = cpu.code.get(rip)
        if (
            entry is None
            or cpu.rflags & (TF | RF)
            or cpu.shadow
            or cpu.dr7 & 0xFF
            or version(entry.page) != entry.version
            or cpu.nmi_pending
            or cpu.guest is not None
        ):
            string = step(cpu)
        else:
            cpu.start_rip = rip
            cpu.rip = entry.next
            try:
                entry.op(cpu)
            except Fault as fault:
                if fault.vector != DB:
                    cpu.trap_bits = 0
                take(cpu, fault)
            except ModelError as error:
                cpu.rip = rip
                raise _with_rip(error, rip) from None
            else:
                string = entry.string and _restartable(cpu, entry)
                if cpu.repeat:
                    cpu.repeat = False
                else:
                    cpu.retired += 1
        if exits:
            return string
    raise ModelError(f"the guest did not exit in {budget} instructions; RIP is {cpu.rip:#x}")
