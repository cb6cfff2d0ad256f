"""The mailbox between the harness and QEMU's device ``bare-machine``, and the emulator that reads it.

Both share one memory file: the mailbox, then the RAM of the guest. One byte through a socket says that a request
stands in the mailbox, one byte back that it is done. The layout is that of ``struct BareMailbox`` in the device's
source (``hw/i386/bare-machine.c``, in ``ci/qemu/bare/``), and its registers are the KVM structures of harness/state.py.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
import struct
import subprocess
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from enum import IntEnum
from pathlib import Path
from typing import Final, Protocol, Self

from harness.case import CaseError, Slot, VmShape
from harness.cpuid import CpuidEntry
from harness.lab.errors import LabError, LostError
from harness.lab.spawn import spawn

DEVICE: Final = "bare-machine"
MEMORY: Final = 32 << 20
"""Bytes that mailbox and guest RAM share; only what is touched is there."""
RAM: Final = 0x40000  # offset of the first slot

_MAGIC: Final = 0x45524142
_VERSION: Final = 1
_SECTIONS: Final = {
    "regs": (0x100, 144), "debugregs": (0x200, 128), "events": (0x280, 64), "xcr0": (0x2C0, 8), "pkru": (0x2C8, 4),
    "egpr": (0x300, 128), "sregs2": (0x400, 320),
}  # fmt: skip
_MSRS, _MSR_COUNT = 0x600, 64
_SLOTS, _SLOT_COUNT = 0xA00, 16
_PAGES: Final = 0x1000
_LEAVES, _LEAF_COUNT = 0x9000, 256
_ACCESSES, _ACCESS_COUNT = 0xC000, 4096
_HEAD: Final = struct.Struct("<4I")  # magic, version, operation, result
_REQUEST: Final = struct.Struct("<2I2Q4I")  # step, time limit, seed, reads, inject, vector, error, flush
_COUNTS: Final = struct.Struct("<6I")  # MSRs, slots, pages, leaves, accesses, detail
_REQUEST_AT, _COUNTS_AT = 0x10, 0x38
_SLOT: Final = struct.Struct("<3Q")
_LEAF: Final = struct.Struct("<7I12x")
_ACCESS: Final = struct.Struct("<2QI2B2x")
_ANSWER_LIMIT: Final = 20.0  # seconds beyond a request's own limit


class EmulatorLike(Protocol):
    """What starting an emulator takes (harness/lab/hardware.py has the real ones)."""

    @property
    def name(self) -> str: ...
    @property
    def binary(self) -> Path: ...
    @property
    def firmware(self) -> Path | None: ...


class Operation(IntEnum):
    """A request."""

    QUERY_CPUID = 1
    SET_CPUID = 2
    SHAPE = 3
    LOAD = 4
    RUN = 5


class Result(IntEnum):
    """How a request ended."""

    OK = 1
    HALT = 2
    SHUTDOWN = 3
    ACCESS = 4  # an instruction touched a port or a hole, and is complete
    DEBUG = 5
    TIMEOUT = 6
    BAD_MSR = 7
    BAD_SHAPE = 8
    OTHER = 9


@dataclass(frozen=True, slots=True)
class Access:
    """A port or hole that an instruction touched; ``data`` as read or written."""

    address: int
    data: bytes
    write: bool
    port: bool


class Mailbox:
    """A running emulator with the device, as a context manager: leaving it ends the emulator.

    Entering raises LabError for an emulator without the device, or one that does not start.
    """

    def __init__(self, emulator: EmulatorLike, cpu: str) -> None:
        self.emulator, self.cpu = emulator, cpu
        self._stack = contextlib.ExitStack()
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            fd = os.memfd_create("bare-machine", os.MFD_CLOEXEC)
            stack.callback(os.close, fd)
            os.ftruncate(fd, MEMORY)
            self.memory = stack.enter_context(mmap.mmap(fd, MEMORY))
            self._errors = stack.enter_context(tempfile.TemporaryFile())
            self._bell, theirs = socket.socketpair()
            stack.enter_context(self._bell)
            with theirs:
                self._start(fd, theirs.fileno(), stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _start(self, memory: int, bell: int, stack: contextlib.ExitStack) -> None:
        words = [str(self.emulator.binary), "-nodefaults", "-no-user-config", "-display", "none"]
        if self.emulator.firmware is not None:
            words += ["-L", str(self.emulator.firmware)]
        backend = f"memory-backend-file,id=ram,mem-path=/proc/self/fd/{memory},share=on,size={MEMORY}"
        words += ["-machine", "none", "-accel", "tcg", "-cpu", f"{self.cpu},apic-id=0", "-object", backend]
        words += ["-device", f"{DEVICE},memory=ram,fd={bell}"]
        try:
            # Not guarded: threads hand it on, and it ends with its socket.
            self._process = spawn(words, (memory, bell), self._errors.fileno(), guarded=False)
        except OSError as error:
            raise LabError(f"{self.emulator.binary}: {error.strerror}: run `kvm-harness lab build`") from error
        stack.callback(self._end)
        with contextlib.suppress(LostError):
            self.request(Operation.QUERY_CPUID)
            magic, version, *_ = _HEAD.unpack_from(self.memory)
            if (magic, version) == (_MAGIC, _VERSION):
                return
            raise LabError(f"{self.emulator.name} speaks version {version} of the bare machine, not {_VERSION}: "
                           "run `kvm-harness lab build`")  # fmt: skip
        raise LabError(
            f"{self.emulator.name} has no device {DEVICE}, or does not start with it: use the lab's own QEMU. "
            f"It said: {self._said()}"
        )

    def _end(self) -> None:
        """The emulator ends by itself when its socket does, and has nothing to save."""
        self._bell.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def _said(self) -> str:
        self._errors.seek(0)
        return self._errors.read(1000).decode(errors="replace").strip() or "nothing"

    # --- requests ---

    def request(self, operation: Operation, limit: float = 0.0) -> Result:
        """Have ``operation`` done; ``limit`` is the time in seconds that it may take by itself.

        Raises LostError when the emulator died over it or is stuck.
        """
        memory = self.memory
        struct.pack_into("<2I", memory, 8, operation, 0)
        try:
            self._bell.settimeout(limit + _ANSWER_LIMIT)
            self._bell.send(b"!")
            answered = self._bell.recv(1)
        except TimeoutError:
            raise LostError(f"{self.emulator.name} is stuck in {operation.name}; it said: {self._said()}") from None
        except OSError:
            answered = b""
        if not answered:
            raise LostError(f"{self.emulator.name} died in {operation.name}; it said: {self._said()}")
        return Result(_HEAD.unpack_from(memory)[3])

    def fill(self, *, step: bool = False, limit: float = 0.0, seed: int = 0, reads: int = 0,
             inject: tuple[int, int, int] = (0, 0, 0), flush: bool = False) -> None:  # fmt: skip
        """What the next LOAD or RUN needs. ``inject``: kind (1 exception, 2 interrupt, 3 NMI), vector, error code."""
        _REQUEST.pack_into(
            self.memory, _REQUEST_AT, step, int(limit * 1000), seed & (1 << 64) - 1, reads, *inject, flush
        )

    @property
    def reads(self) -> int:
        """How many reads the devices have answered."""
        return int(_REQUEST.unpack_from(self.memory, _REQUEST_AT)[3])

    @property
    def detail(self) -> int:
        """What a BAD_MSR, BAD_SHAPE or OTHER is about."""
        return int(_COUNTS.unpack_from(self.memory, _COUNTS_AT)[5])

    def _count(self, which: int, value: int) -> None:
        struct.pack_into("<I", self.memory, _COUNTS_AT + 4 * which, value)

    # --- contents ---

    def put(self, sections: Mapping[str, bytes]) -> None:
        """Write sections of a state. CaseError when there are more MSRs than fit."""
        self._count(0, 0)
        for name, data in sections.items():
            if name == "msrs":
                if len(data) > 16 * _MSR_COUNT:
                    raise CaseError(f"the bare machine observes at most {_MSR_COUNT} MSRs")
                self.memory[_MSRS : _MSRS + len(data)] = data
                self._count(0, len(data) // 16)
            else:
                at, size = _SECTIONS[name]
                self.memory[at : at + size] = data

    def get(self, names: Iterable[str]) -> dict[str, bytes]:
        """Read sections of the state where the vCPU stands."""
        memory = self.memory
        out = {}
        for name in names:
            if name == "msrs":
                count = _COUNTS.unpack_from(memory, _COUNTS_AT)[0]
                out[name] = memory[_MSRS : _MSRS + 16 * count]
            else:
                at, size = _SECTIONS[name]
                out[name] = memory[at : at + size]
        return out

    def shape(self, shape: VmShape) -> dict[Slot, int]:
        """Lay out RAM; each slot's offset in :attr:`memory`. CaseError when it does not fit."""
        if len(shape.slots) > _SLOT_COUNT or RAM + sum(s.size for s in shape.slots) > MEMORY:
            raise CaseError(f"the bare machine has {_SLOT_COUNT} slots and {(MEMORY - RAM) >> 20} MiB of RAM")
        at, out = RAM, {}
        for n, slot in enumerate(shape.slots):
            _SLOT.pack_into(self.memory, _SLOTS + n * _SLOT.size, slot.gpa, slot.size, at)
            out[slot] = at
            at += slot.size
        self._count(1, len(out))
        if self.request(Operation.SHAPE) is not Result.OK:
            raise LostError(f"{self.emulator.name} refused slot {self.detail}")
        return out

    def rewritten(self, pages: Sequence[int]) -> None:
        """Offsets in :attr:`memory` of the pages whose code the next LOAD must forget."""
        struct.pack_into(f"<{len(pages)}I", self.memory, _PAGES, *(offset >> 12 for offset in pages))
        self._count(2, len(pages))

    def query_cpuid(self, function: int, index: int = 0) -> CpuidEntry:
        """What the emulator's own CPUID shows."""
        _LEAF.pack_into(self.memory, _LEAVES, function, index, 0, 0, 0, 0, 0)
        self._count(3, 1)
        self.request(Operation.QUERY_CPUID)
        return CpuidEntry(*_LEAF.unpack_from(self.memory, _LEAVES))

    def set_cpuid(self, leaves: Sequence[CpuidEntry]) -> None:
        """Be the processor of these leaves; the emulator's own for none. CaseError when there are too many."""
        if len(leaves) > _LEAF_COUNT:
            raise CaseError(f"the bare machine takes at most {_LEAF_COUNT} CPUID leaves")
        for n, leaf in enumerate(leaves):
            values = [getattr(leaf, f.name) for f in fields(CpuidEntry)]
            _LEAF.pack_into(self.memory, _LEAVES + n * _LEAF.size, *values)
        self._count(3, len(leaves))
        self.request(Operation.SET_CPUID)

    def accesses(self) -> list[Access]:
        """Ports and holes touched in the last RUN, in order. LostError when they were too many to tell."""
        count = _COUNTS.unpack_from(self.memory, _COUNTS_AT)[4]
        if count > _ACCESS_COUNT:
            raise LostError(f"one instruction touched ports or holes {count} times: more than the bare machine tells")
        out = []
        for n in range(count):
            address, data, size, write, port = _ACCESS.unpack_from(self.memory, _ACCESSES + n * _ACCESS.size)
            out.append(Access(address, data.to_bytes(8, "little")[:size], bool(write), bool(port)))
        return out
