"""An exit as ``struct kvm_run`` shows it (api.rst section 5), as an object of harness/exits.py."""

from __future__ import annotations

from typing import Final

from harness import kvm_ioctl as k
from harness.exits import (
    Debug,
    Exit,
    FailEntry,
    Halt,
    Hypercall,
    InternalError,
    Io,
    IrqWindow,
    Mmio,
    Msr,
    Shutdown,
    Unknown,
)
from harness.vcpu import Vcpu

HALT: Final = Halt()
_HYPERCALL_ARGS: Final = 3
"""Of KVM_HC_MAP_GPA_RANGE, the one hypercall that goes to userspace; the other places hold what was there before."""


def read_exit(vcpu: Vcpu, reason: int) -> Exit:
    """What ``kvm_run`` says of an exit with this exit_reason."""
    run = vcpu.run_page
    match reason:
        case k.KVM_EXIT_HLT:
            return HALT
        case k.KVM_EXIT_IO:
            io = run.io
            write = io.direction == k.KVM_EXIT_IO_OUT
            data = bytes(vcpu.io_data(io.data_offset, io.size * io.count)) if write else b""
            return Io(io.port, io.size, write, data, io.count)
        case k.KVM_EXIT_MMIO:
            mmio = run.mmio
            data = bytes(mmio.data[: mmio.len]) if mmio.is_write else b""
            return Mmio(mmio.phys_addr, mmio.len, bool(mmio.is_write), data)
        case k.KVM_EXIT_DEBUG:
            arch = run.debug.arch
            return Debug(arch.exception, arch.pc, arch.dr6)
        case k.KVM_EXIT_SHUTDOWN:
            return Shutdown()
        case k.KVM_EXIT_X86_RDMSR | k.KVM_EXIT_X86_WRMSR:
            write = reason == k.KVM_EXIT_X86_WRMSR
            return Msr(run.msr.index, write, run.msr.data if write else 0)
        case k.KVM_EXIT_HYPERCALL:
            return Hypercall(run.hypercall.nr, tuple(run.hypercall.args[:_HYPERCALL_ARGS]))
        case k.KVM_EXIT_IRQ_WINDOW_OPEN:
            return IrqWindow()
        case k.KVM_EXIT_INTERNAL_ERROR:
            failure = run.emulation_failure
            code = b""
            if failure.suberror == k.KVM_INTERNAL_ERROR_EMULATION and failure.ndata >= 1 and failure.flags & 1:
                code = bytes(failure.insn_bytes[: failure.insn_size])
            return InternalError(failure.suberror, code)
        case k.KVM_EXIT_FAIL_ENTRY:
            return FailEntry(run.fail_entry.hardware_entry_failure_reason)
        case _:
            return Unknown(reason, k.EXIT_NAMES.get(reason, ""))
