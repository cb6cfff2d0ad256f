"""VMMCALL as KVM answers it: a paravirtual interface, not the architecture's.

Documentation/virt/kvm/x86/hypercalls.rst: number in RAX, up to four arguments in RBX, RCX, RDX, RSI, the result in RAX;
outside 64-bit mode all of them have 32 bits. Documentation/virt/kvm/api.rst 7.27 and 8.34: a hypercall that userspace
has asked for (KVM_CAP_EXIT_HYPERCALL) is an exit, and userspace gives its result.
"""

from __future__ import annotations

from typing import Final

from harness.exits import Hypercall
from harness.reference.cpu import RAX, RBX, RCX, RDX, Cpu, ModelError

_MAP_GPA_RANGE: Final = 12
_ENOSYS, _EPERM = -1000, -1
_KNOWN: Final = frozenset({1, 4, 5, 9, 10, 11})
"""Hypercalls that KVM may answer itself, by what its CPUID leaves for guests say."""
_PAGE: Final = 4096


def hypercall(cpu: Cpu, mask: int) -> None:
    """To userspace, or a result at once; registers have the bits of ``mask``."""
    number, address, count, attributes = (cpu.gpr[n] & mask for n in (RAX, RBX, RCX, RDX))
    if cpu.cpl:
        result = _EPERM
    elif number == _MAP_GPA_RANGE and cpu.hypercall_exits >> number & 1:
        if address % _PAGE or not count:
            raise ModelError("KVM_HC_MAP_GPA_RANGE of no whole pages: its error is not modelled")
        exit_ = Hypercall(number, (address, count, attributes))
        result = int.from_bytes(cpu.device_read(exit_, 8), "little")
    elif number in _KNOWN:
        raise ModelError(f"hypercall {number} is not modelled")
    else:
        result = _ENOSYS
    cpu.gpr[RAX] = result & mask
