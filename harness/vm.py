"""Kvm, Vm: who owns which file descriptor and memory slot. Context managers; a Vm's vCPUs are of harness/vcpu.py."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from harness import kvm_ioctl as k
from harness.case import Memory, Slot, VmShape
from harness.cpuid import CpuidEntry, CpuProfile
from harness.kvm_ioctl import ioctl

DEFAULT_DEVICE: Final = Path("/dev/kvm")
API_VERSION: Final = 12
_SMM_SPACE: Final = 1 << 16  # address space 1, of a slot (api.rst 4.35, KVM_CAP_MULTI_ADDRESS_SPACE)


class KvmUnusableError(Exception):
    """There is no usable KVM behind a path; the text says why and what to do. Exit status 3."""


class Owner:
    """Base of what owns a file descriptor."""

    fd: int

    def close(self) -> None:
        """Give everything back. Calling it twice does nothing."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


class Kvm(Owner):
    """An open KVM device.

    Raises KvmUnusableError when the device is missing, may not be opened, is no KVM, or speaks another API version.
    """

    def __init__(self, device: Path | str = DEFAULT_DEVICE) -> None:
        self.fd = -1
        self.device = Path(device)
        try:
            self.fd = os.open(self.device, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise KvmUnusableError(_cannot_open(self.device, error)) from error
        try:
            version = ioctl(self.fd, k.KVM_GET_API_VERSION)
        except k.KvmError as error:
            self.close()
            raise KvmUnusableError(
                f"{self.device}: not a KVM device (KVM_GET_API_VERSION: {errno.errorcode.get(error.errno or 0)}); "
                "give --kvm-device the path of one, usually /dev/kvm"
            ) from error
        if version != API_VERSION:
            self.close()
            raise KvmUnusableError(
                f"{self.device}: KVM API version {version}, not {API_VERSION}: use a kernel since 2.6.22"
            )

    def capability(self, number: int) -> int:
        """KVM_CHECK_EXTENSION: 0 when it is not there."""
        return ioctl(self.fd, k.KVM_CHECK_EXTENSION, number)

    @cached_property
    def mmap_size(self) -> int:
        """Bytes of a vCPU's shared mapping (kvm_run, PIO page, coalesced ring)."""
        return ioctl(self.fd, k.KVM_GET_VCPU_MMAP_SIZE)

    @cached_property
    def xsave_size(self) -> int:
        """Bytes of a KVM_GET_XSAVE2 buffer for a VM without guest permissions beyond the default."""
        return max(self.capability(k.KVM_CAP_XSAVE2), 4096)

    @cached_property
    def sync_fields(self) -> int:
        """KVM_SYNC_X86_* fields that this KVM synchronizes (KVM_CAP_SYNC_REGS)."""
        return self.capability(k.KVM_CAP_SYNC_REGS)

    def supported_cpuid(self) -> CpuProfile:
        """KVM_GET_SUPPORTED_CPUID as a profile."""
        n = 64
        while True:
            buffer = k.cpuid2(n)
            try:
                ioctl(self.fd, k.KVM_GET_SUPPORTED_CPUID, buffer)
            except k.KvmError as error:
                if error.errno != errno.E2BIG or n > 4096:
                    raise
                n *= 2
                continue
            rows = (buffer.entries[i] for i in range(buffer.nent))
            return CpuProfile(tuple(CpuidEntry(e.function, e.index, e.flags, e.eax, e.ebx, e.ecx, e.edx) for e in rows))

    def msr_indices(self) -> tuple[int, ...]:
        """MSRs that can be saved and restored (KVM_GET_MSR_INDEX_LIST)."""
        probe = k.msr_list(0)
        with suppress(k.KvmError):
            ioctl(self.fd, k.KVM_GET_MSR_INDEX_LIST, probe)
        buffer = k.msr_list(probe.nmsrs)
        ioctl(self.fd, k.KVM_GET_MSR_INDEX_LIST, buffer)
        return tuple(buffer.indices[: buffer.nmsrs])


def _cannot_open(device: Path, error: OSError) -> str:
    if error.errno in (errno.ENOENT, errno.ENODEV, errno.ENXIO):
        return (
            f"{device}: no such device (load kvm_amd or kvm_intel, enable virtualization in the firmware, "
            "or run in the QEMU image)"
        )
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"{device}: permission denied (add yourself to group kvm and log in again, or run as root)"
    return f"{device}: cannot be opened: {error.strerror}; give --kvm-device the path of a KVM, usually /dev/kvm"


class Vm(Owner):
    """A virtual machine of a given shape: its slots are mapped, its interrupt controller made.

    Raises KvmError naming the ioctl that failed.
    """

    def __init__(self, kvm: Kvm, shape: VmShape = VmShape()) -> None:  # noqa: B008 -- frozen
        self.kvm, self.shape = kvm, shape
        self.ram: dict[Slot, mmap.mmap] = {}
        self.address: dict[Slot, int] = {}
        self.fd = ioctl(kvm.fd, k.KVM_CREATE_VM, 0)
        try:
            self._set_up()
        except BaseException:
            self.close()
            raise

    def _set_up(self) -> None:
        # VMX without unrestricted guest needs both below 4 GiB and outside RAM; elsewhere they do nothing.
        with suppress(k.KvmError):
            ioctl(self.fd, k.KVM_SET_IDENTITY_MAP_ADDR, 0xFFFBC000)
        with suppress(k.KvmError):
            ioctl(self.fd, k.KVM_SET_TSS_ADDR, 0xFFFBD000)
        for number, args in self.shape.caps:
            self.enable_capability(number, *args)
        if self.shape.irqchip == "split":
            self.enable_capability(k.KVM_CAP_SPLIT_IRQCHIP, 24)
        elif self.shape.irqchip == "full":
            ioctl(self.fd, k.KVM_CREATE_IRQCHIP)
        for number, slot in enumerate(self.shape.slots):
            ram = mmap.mmap(-1, slot.size, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)
            self.ram[slot] = ram
            self.address[slot] = ctypes.addressof(ctypes.c_char.from_buffer(ram))
            region = k.kvm_userspace_memory_region(
                slot=number, guest_phys_addr=slot.gpa, memory_size=slot.size, userspace_addr=self.address[slot]
            )
            ioctl(self.fd, k.KVM_SET_USER_MEMORY_REGION, region)
            if self.shape.smm:
                region.slot |= _SMM_SPACE
                ioctl(self.fd, k.KVM_SET_USER_MEMORY_REGION, region)

    def enable_capability(self, number: int, *args: int) -> None:
        """KVM_ENABLE_CAP on the VM."""
        request = k.kvm_enable_cap(cap=number)
        for i, value in enumerate(args):
            request.args[i] = value
        ioctl(self.fd, k.KVM_ENABLE_CAP, request)

    def load(self, memory: Memory) -> None:
        """Lay the initial contents over all of RAM."""
        for slot, ram in self.ram.items():
            ram[:] = memory.image(slot)

    def close(self) -> None:
        super().close()
        self.address.clear()
        for ram in self.ram.values():
            with suppress(BufferError):
                ram.close()
        self.ram.clear()
