"""VMMCALL and VMCALL as KVM answers them: a paravirtual interface, not the architecture's.

Documentation/virt/kvm/x86/hypercalls.rst: number in RAX, up to four arguments in RBX, RCX, RDX, RSI, the result in RAX;
outside 64-bit mode all of them have 32 bits, and no other register changes. Documentation/virt/kvm/api.rst 7.27 and
8.34: a hypercall that userspace has asked for (KVM_CAP_EXIT_HYPERCALL) is an exit, and userspace gives its result.
Error numbers: include/uapi/linux/kvm_para.h.
"""

from __future__ import annotations

from typing import Final

from harness.exits import Hypercall
from harness.reference.cpu import MASK, RAX, RBX, RCX, RDX, UD, Cpu, Fault, ModelError
from harness.reference.insn import Insn, Operation, Row

_EPERM, _EINVAL, _ENOSYS = 1, 22, 1000
_POLL_IRQ, _MAP_GPA_RANGE = 1, 12
_BY_CPUID: Final = frozenset({5, 9, 10, 11})
"""Hypercalls that depend on paravirtual features and on other vCPUs."""
_PAGE: Final = 4096


def _result(cpu: Cpu, number: int, args: tuple[int, int, int]) -> int:
    if cpu.cpl:
        return -_EPERM
    if number == _POLL_IRQ:
        return 0
    if number in _BY_CPUID:
        raise ModelError(f"hypercall {number} depends on paravirtual features: not modelled")
    if number != _MAP_GPA_RANGE or not cpu.hypercall_exits >> number & 1:
        return -_ENOSYS
    address, pages, _ = args
    if address % _PAGE or not pages or address + pages * _PAGE >> 64:
        return -_EINVAL
    return int.from_bytes(cpu.device_read(Hypercall(number, args), 8), "little")


def _hypercall(insn: Insn, amd: bool) -> Operation:
    """VMMCALL on AMD, VMCALL on Intel. In a guest's guest whose host does not intercept it there is none."""
    size = 64 if insn.bits == 64 else 32
    if insn.amd is not amd:
        raise ModelError(f"{insn.code.hex(' ')}: KVM replaces the other vendor's hypercall instruction")

    def op(cpu: Cpu) -> None:
        if cpu.guest is not None:
            raise Fault(UD)
        number, *args = (cpu.gpr[n] & MASK[size] for n in (RAX, RBX, RCX, RDX))
        cpu.write_reg(size, RAX, _result(cpu, number, (args[0], args[1], args[2])))

    return op


HYPERCALL_ROWS: Final[list[Row]] = [
    Row("vmmcall", "NP 0F 01 =D9", "", lambda i: _hypercall(i, True), "APM 3 VMMCALL"),
    Row("vmcall", "NP 0F 01 =C1", "", lambda i: _hypercall(i, False), "SDM 3C VMCALL"),
]
