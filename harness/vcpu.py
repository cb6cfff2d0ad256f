"""Vcpu: a vCPU's file descriptor and mapped kvm_run, its state by section, and KVM_RUN with a time limit.

A watchdog thread sets ``kvm_run.immediate_exit`` and signals the running thread, the way
Documentation/virt/kvm/api.rst section 5 ("immediate_exit") wants a vCPU kicked without a race; it also ends a guest
that never leaves KVM_RUN by itself.
"""

from __future__ import annotations

import ctypes
import fcntl
import math
import mmap
import os
import signal
import struct
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from threading import get_ident
from time import monotonic
from typing import Final

from harness import kvm_ioctl as k
from harness.cpuid import CpuProfile
from harness.kvm_ioctl import Argument, enter, ioctl
from harness.vm import Owner, Vm

RUN_LIMIT: Final = 5.0
"""Seconds that one KVM_RUN may take. The longest guest of the suite takes milliseconds, minutes are a hang."""

plain_ioctl = fcntl.ioctl
_KICK: Final = signal.SIGRTMIN + 3
_NEVER: Final = math.inf
_XSAVE_HEADER: Final = 512
_APX, _PKRU = 19, 9


class RunTimeoutError(Exception):
    """The guest did not leave KVM_RUN within its time limit."""


class _Watchdog:
    """Ends KVM_RUNs that outlive their deadline. One thread for the process, started at first use."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._vcpus: weakref.WeakSet[Vcpu] = weakref.WeakSet()
        self._thread: threading.Thread | None = None
        self._pid = 0

    def prepare(self) -> None:
        """Install the kick's (empty) handler and start the thread; again after a fork."""
        if self._pid == os.getpid():
            return
        with self._lock:
            if self._pid == os.getpid():
                return
            if threading.current_thread() is threading.main_thread():
                signal.signal(_KICK, lambda *_: None)
            self._vcpus.clear()
            self._thread = threading.Thread(target=self._watch, name="kvm-watchdog", daemon=True)
            self._thread.start()
            self._pid = os.getpid()

    def watch(self, vcpu: Vcpu) -> None:
        """Look after a vCPU from now on, for as long as it lives."""
        self.prepare()
        with self._lock:
            self._vcpus.add(vcpu)

    def _watch(self) -> None:
        while True:
            time.sleep(0.05)
            now = monotonic()
            with self._lock:
                late = [vcpu for vcpu in self._vcpus if now > vcpu.deadline]
            for vcpu in late:
                vcpu.expire()
                with suppress(ProcessLookupError):
                    signal.pthread_kill(vcpu.thread, _KICK)


_WATCHDOG: Final = _Watchdog()


class Vcpu(Owner):
    """One vCPU with its mapped kvm_run. ``get`` and ``put`` move the sections of harness/state.py."""

    def __init__(self, vm: Vm, profile: CpuProfile | None = None, number: int = 0) -> None:
        self.vm, self.kvm, self.profile = vm, vm.kvm, profile
        self.fd = ioctl(vm.fd, k.KVM_CREATE_VCPU, number)
        self._mapping = mmap.mmap(self.fd, vm.kvm.mmap_size)
        self.run_page = k.kvm_run.from_buffer(self._mapping)
        self._sync = memoryview(self._mapping)[k.kvm_run.s.offset : k.kvm_run.s.offset + ctypes.sizeof(k.kvm_sync_regs)]
        self._mirrored = self._dirty = False
        self.epoch = 0  # counts what may have changed the vCPU or RAM
        self._expired = False
        self._xsave = k.xsave(vm.kvm.xsave_size)
        # What some sections are read with: request, buffer, and what of it is the section.
        self._buffers: dict[str, tuple[int, bytearray, memoryview]] = {}
        for name, (get, _, size) in _STRUCTURES.items():
            buffer = bytearray(size)
            self._buffers[name] = get, buffer, memoryview(buffer)
        self._egpr_offset = profile.xsave_offset(_APX) if profile else None
        self._pkru_offset = profile.xsave_offset(_PKRU) if profile else None
        self.deadline, self.thread = _NEVER, 0
        _WATCHDOG.watch(self)
        try:
            if profile is not None:
                self.set_cpuid(profile)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._sync.release()
        super().close()  # the mapping goes with the last reference to run_page

    def set_cpuid(self, profile: CpuProfile) -> None:
        """KVM_SET_CPUID2."""
        ioctl(self.fd, k.KVM_SET_CPUID2, bytearray(profile.packed))

    # --- running ---

    def expire(self) -> None:
        """Called by the watchdog: the next or current KVM_RUN is to end with RunTimeoutError."""
        self._expired = True
        self.run_page.immediate_exit = 1

    def run(self, limit: float = RUN_LIMIT) -> int:
        """KVM_RUN until an exit to userspace; returns its exit_reason.

        Raises RunTimeoutError after ``limit`` seconds, KvmError for EIO (the kernel killed the VM) and the like.
        """
        self.epoch += 1
        self._dirty = False
        if self._expired:
            self._forget_expiry()
        self.thread = get_ident()
        self.deadline = monotonic() + limit
        try:
            enter(self.fd)
        except (InterruptedError, BlockingIOError):
            self._enter_again(limit)
        finally:
            self.deadline = _NEVER
        self._mirrored = True
        return self.run_page.exit_reason

    def _forget_expiry(self) -> None:
        """The watchdog came just when the last KVM_RUN had ended by itself: that was not for the next one."""
        self._expired = False
        self.run_page.immediate_exit = 0

    def _enter_again(self, limit: float) -> None:
        """KVM_RUN came back without an exit: until it has one, or is out of time."""
        while True:
            if self._expired:
                self._forget_expiry()
                raise RunTimeoutError(f"the guest did not leave KVM_RUN within {limit:g} s") from None
            with suppress(InterruptedError, BlockingIOError):
                return enter(self.fd)

    def complete(self, limit: float = RUN_LIMIT) -> int | None:
        """Complete the pending operation without running on. None, or the reason of a further exit that it led to.

        api.rst section 5: "the corresponding operations are complete (and guest state is consistent) only after
        userspace has re-entered the kernel with KVM_RUN".
        """
        self.epoch += 1
        self._expired = False
        self.thread = get_ident()
        self.deadline = monotonic() + limit
        self.run_page.immediate_exit = 1
        self._dirty, self._mirrored = False, True  # KVM stores into kvm_run on EINTR too
        try:
            enter(self.fd)
            return self.run_page.exit_reason
        except InterruptedError:
            if self._expired:
                self._expired = False
                raise RunTimeoutError(f"completing an exit took over {limit:g} s") from None
            return None
        finally:
            self.run_page.immediate_exit = 0
            self.deadline = _NEVER

    def io_data(self, offset: int, size: int) -> memoryview:
        """The bytes of a port I/O exit inside the shared mapping."""
        return memoryview(self._mapping)[offset : offset + size]

    # --- state ---

    def sync_enable(self, fields: int) -> None:
        """KVM_CAP_SYNC_REGS: KVM stores these fields into kvm_run at every exit."""
        if self.run_page.kvm_valid_regs != fields:
            self.run_page.kvm_valid_regs = fields
            self._mirrored = False

    def mirrored(self) -> dict[str, bytes]:
        """``regs``, ``sregs2`` and ``events`` as KVM stored them into kvm_run at the last exit; empty once changed.

        ``sregs2`` is made of ``kvm_sregs``, which holds all of it but the PDPTRs: under PAE paging it takes the ioctl.
        """
        if not self._mirrored or self._dirty:
            return {}
        regs, head, events = _STORED.unpack_from(self._sync)
        pae = head[_CR0_PG] & 0x80 and head[_CR4_PAE] & 0x20 and not head[_EFER_LMA] & 4
        return {"regs": regs, "sregs2": self.get("sregs2") if pae else head + _NO_PDPTRS, "events": events}

    def sync_put(self, name: str, data: bytes) -> None:
        """Set a section through kvm_run at the next KVM_RUN."""
        where, bit = _SYNC_PUT[name]
        self.epoch += 1
        self._sync[where] = data
        self.run_page.kvm_dirty_regs = self.run_page.kvm_dirty_regs | bit if self._dirty else bit
        self._dirty = True

    def control(self, request: int, arg: Argument = 0) -> int:
        """Any other ioctl of the vCPU that may change its state."""
        if self._dirty:
            self._flush()
        self._mirrored = False
        self.epoch += 1
        return ioctl(self.fd, request, arg)

    def _flush(self) -> None:
        """Hand over by ioctl what still waits in kvm_run for a KVM_RUN: the next ioctl must see it."""
        self._dirty = False
        waiting, self.run_page.kvm_dirty_regs = self.run_page.kvm_dirty_regs, 0
        for name, (offset, size, bit) in SYNC.items():
            if waiting & bit:
                self.put(name, bytes(self._sync[offset : offset + size]))

    def read(self, names: Sequence[str], into: dict[str, bytes]) -> dict[str, bytes]:
        """``into`` with the sections ``names``, as :meth:`get` reads each of them."""
        if self._dirty:
            self._flush()
        fd, buffers, call = self.fd, self._buffers, plain_ioctl
        request = 0
        try:
            for name in names:
                found = buffers.get(name)
                if found is None:
                    into[name] = _GETTERS[name](self)
                else:
                    request, buffer, shown = found
                    call(fd, request, buffer)
                    into[name] = shown.tobytes()
        except OSError as error:
            if isinstance(error, k.KvmError):
                raise
            raise k.KvmError(request, error.errno or 0) from None
        return into

    def get(self, name: str) -> bytes:
        """Read a section. KvmError when this KVM cannot; KeyError for a name not in harness.state.SECTIONS."""
        return self.read((name,), {})[name]

    def put(self, name: str, data: bytes) -> None:
        """Write a section (the inverse of :meth:`get`)."""
        if self._dirty:
            self._flush()
        self._mirrored = False
        self.epoch += 1
        if name in _STRUCTURES:
            _, request, size = _STRUCTURES[name]
            if len(data) != size:
                raise ValueError(f"section {name}: {len(data)} bytes, not {size}")
            transfer(self.fd, request, data)
            return
        _SETTERS[name](self, data)

    def get_msrs(self, indices: tuple[int, ...]) -> bytes:
        """Pairs (index, value) of u64 for the MSRs asked for. LookupError names the first that KVM refused."""
        if self._dirty:
            self._flush()
        buffer = bytearray(_msr_request(indices))
        got = transfer(self.fd, k.KVM_GET_MSRS, buffer)
        if got != len(indices):
            raise LookupError(f"KVM_GET_MSRS refused MSR {indices[got]:#x}")
        return bytes(buffer[_MSR_ENTRIES:])

    def put_msrs(self, data: bytes) -> None:
        """Set MSRs from pairs as :meth:`get_msrs` returns them. LookupError names the first that KVM refused."""
        count = len(data) // 16
        if not count:
            return
        done = transfer(self.fd, k.KVM_SET_MSRS, bytearray(struct.pack("<Q", count) + data))
        if done != count:
            index, value = struct.unpack_from("<QQ", data, 16 * done)
            raise LookupError(f"KVM_SET_MSRS refused MSR {index:#x} = {value:#x}")

    def _get_xcr0(self) -> bytes:
        xcrs = bytearray(ctypes.sizeof(k.kvm_xcrs))
        transfer(self.fd, k.KVM_GET_XCRS, xcrs)
        if not xcrs[0]:  # nr_xcrs, 16 at most: none on a host without XSAVE
            return _XCR0_RESET
        self._buffers["xcr0"] = k.KVM_GET_XCRS, xcrs, memoryview(xcrs)[_XCR0]  # from now on
        return bytes(xcrs[_XCR0])

    def _put_xcr0(self, data: bytes) -> None:
        buffer = k.kvm_xcrs(nr_xcrs=1)
        buffer.xcrs[0].value = struct.unpack("<Q", data)[0]
        ioctl(self.fd, k.KVM_SET_XCRS, buffer)

    def egpr_by(self, request: int) -> bytes:
        """Section ``egpr`` by KVM_GET_XSAVE or KVM_GET_XSAVE2, as ``request`` says."""
        if self._dirty:
            self._flush()
        return self._get_component(_APX, self._egpr_offset, 128, request)

    def put_egpr(self, data: bytes, *, in_use: bool) -> None:
        """Write section ``egpr`` with XSTATE_BV[19] as ``in_use`` says: clear, KVM is to take it for zeros."""
        if self._dirty:
            self._flush()
        self.epoch += 1
        self._put_component(_APX, self._egpr_offset, data, in_use=in_use)

    def _read_xsave(self, request: int = 0) -> bytearray:
        if not request:
            big = self.kvm.xsave_size > 4096 or self.kvm.capability(k.KVM_CAP_XSAVE2)
            request = k.KVM_GET_XSAVE2 if big else k.KVM_GET_XSAVE
        ioctl(self.fd, request, self._xsave)
        return bytearray(self._xsave)

    def _get_component(self, component: int, offset: int | None, size: int, request: int = 0) -> bytes:
        if offset is None:
            return bytes(size)
        area = self._read_xsave(request)
        present = struct.unpack_from("<Q", area, _XSAVE_HEADER)[0] >> component & 1
        return bytes(area[offset : offset + size]) if present else bytes(size)

    def _put_component(self, component: int, offset: int | None, data: bytes, *, in_use: bool = True) -> None:
        if offset is None:
            if any(data):
                raise LookupError(f"XSAVE component {component} is not enumerated by this profile")
            return
        area = self._read_xsave()
        area[offset : offset + len(data)] = data
        bits = struct.unpack_from("<Q", area, _XSAVE_HEADER)[0] & ~(1 << component) | in_use << component
        struct.pack_into("<Q", area, _XSAVE_HEADER, bits)
        ctypes.memmove(ctypes.addressof(self._xsave), bytes(area), len(area))
        ioctl(self.fd, k.KVM_SET_XSAVE, self._xsave)

    def _get_ssp(self) -> bytes:
        value = ctypes.c_uint64()
        reg = k.kvm_one_reg(id=k.KVM_X86_REG_KVM(k.KVM_REG_GUEST_SSP), addr=ctypes.addressof(value))
        ioctl(self.fd, k.KVM_GET_ONE_REG, reg)
        return struct.pack("<Q", value.value)

    def _put_ssp(self, data: bytes) -> None:
        value = ctypes.c_uint64(struct.unpack("<Q", data)[0])
        reg = k.kvm_one_reg(id=k.KVM_X86_REG_KVM(k.KVM_REG_GUEST_SSP), addr=ctypes.addressof(value))
        ioctl(self.fd, k.KVM_SET_ONE_REG, reg)


def transfer(fd: int, request: int, data: bytes | bytearray) -> int:
    """An ioctl that reads bytes, or reads and fills a bytearray. What it returns; of bytes, 0.

    A third less time than by way of ctypes. ``data`` must be as long as the structure, and have up to 1024 bytes.
    Raises KvmError. For the vCPU's own requests only: no signal ends one of them that does not end the process
    (kvm_vcpu_ioctl() waits in mutex_lock_killable() alone).
    """
    try:
        result = plain_ioctl(fd, request, data)
    except OSError as error:
        raise k.KvmError(request, error.errno or 0) from None
    return result if isinstance(result, int) else 0


@lru_cache(maxsize=64)
def _msr_request(indices: tuple[int, ...]) -> bytes:
    """``struct kvm_msrs`` that asks for ``indices``; its entries (index, reserved, data) are pairs of u64."""
    return struct.pack(f"<Q{2 * len(indices)}Q", len(indices), *(x for index in indices for x in (index, 0)))


# Section -> (get, set, size in bytes)
_STRUCTURES: Final[Mapping[str, tuple[int, int, int]]] = {
    "regs": (k.KVM_GET_REGS, k.KVM_SET_REGS, ctypes.sizeof(k.kvm_regs)),
    "sregs": (k.KVM_GET_SREGS, k.KVM_SET_SREGS, ctypes.sizeof(k.kvm_sregs)),
    "sregs2": (k.KVM_GET_SREGS2, k.KVM_SET_SREGS2, ctypes.sizeof(k.kvm_sregs2)),
    "events": (k.KVM_GET_VCPU_EVENTS, k.KVM_SET_VCPU_EVENTS, ctypes.sizeof(k.kvm_vcpu_events)),
    "debugregs": (k.KVM_GET_DEBUGREGS, k.KVM_SET_DEBUGREGS, ctypes.sizeof(k.kvm_debugregs)),
}
_GETTERS: Final[Mapping[str, Callable[[Vcpu], bytes]]] = {
    "xcr0": Vcpu._get_xcr0,
    "egpr": lambda v: v._get_component(_APX, v._egpr_offset, 128),
    "pkru": lambda v: v._get_component(_PKRU, v._pkru_offset, 4),
    "ssp": Vcpu._get_ssp,
}
_SETTERS: Final[Mapping[str, Callable[[Vcpu, bytes], None]]] = {
    "xcr0": Vcpu._put_xcr0,
    "egpr": lambda v, d: v._put_component(_APX, v._egpr_offset, d),
    "pkru": lambda v, d: v._put_component(_PKRU, v._pkru_offset, d),
    "msrs": Vcpu.put_msrs,
    "ssp": Vcpu._put_ssp,
}
# Section -> (offset in kvm_run.s, size, KVM_SYNC_X86_*)
SYNC: Final[Mapping[str, tuple[int, int, int]]] = {
    name: (getattr(k.kvm_sync_regs, field).offset, getattr(k.kvm_sync_regs, field).size, bit)
    for name, field, bit in (
        ("regs", "regs", k.KVM_SYNC_X86_REGS),
        ("sregs", "sregs", k.KVM_SYNC_X86_SREGS),
        ("events", "events", k.KVM_SYNC_X86_EVENTS),
    )
}

_SYNC_PUT: Final = {name: (slice(offset, offset + size), bit) for name, (offset, size, bit) in SYNC.items()}


def _offset(structure: type[ctypes.Structure], name: str) -> int:
    offset: int = getattr(structure, name).offset
    return offset


# kvm_regs, what of kvm_sregs is in kvm_sregs2 too (all but the interrupt bitmap), and kvm_vcpu_events in kvm_run.s.
_SREGS_SHARED: Final = _offset(k.kvm_sregs, "interrupt_bitmap")
_STORED: Final = struct.Struct(
    f"{SYNC['regs'][1]}s{_SREGS_SHARED}s{SYNC['sregs'][1] - _SREGS_SHARED}x{SYNC['events'][1]}s"
)
_NO_PDPTRS: Final = bytes(ctypes.sizeof(k.kvm_sregs2) - _SREGS_SHARED)
_CR0_PG: Final = _offset(k.kvm_sregs, "cr0") + 3
_CR4_PAE: Final = _offset(k.kvm_sregs, "cr4")
_EFER_LMA: Final = _offset(k.kvm_sregs, "efer") + 1
_XCR0_AT: Final = _offset(k.kvm_xcrs, "xcrs") + _offset(k.kvm_xcr, "value")
_XCR0: Final = slice(_XCR0_AT, _XCR0_AT + 8)
_XCR0_RESET: Final = struct.pack("<Q", 1)
_MSR_ENTRIES: Final = ctypes.sizeof(k.kvm_msrs)
