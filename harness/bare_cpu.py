"""BareCpu: executes one unprivileged instruction on the processor that runs Python. No KVM, no emulator.

A trampoline in executable memory loads the registers, runs the bytes, and stores the registers.  It runs in 64-bit
mode, or in a 32-bit or 16-bit code segment of the same process (compatibility mode), so that the reference model's
unprivileged rows can be held against silicon.  The memory that instructions may touch is one window at the same
addresses as the guests' data (harness/modes.py), RAM ``0x10000..0x20000``.

An instruction that faults comes back with its exception vector: a signal handler of a few machine instructions moves
on to the trampoline's end.  Instructions must not branch away or change the environment.  x86-64 Linux only.
"""

from __future__ import annotations

import ctypes
import struct
from dataclasses import dataclass
from typing import Final

from harness.cpuid import CpuidEntry, CpuProfile

WINDOW: Final = 0x10000
WINDOW_SIZE: Final = 0x10000
_CODE_SIZE: Final = 0x2000
_STATE: Final = 0x1000  # offset of the register area in the code mapping
_RFLAGS, _HOST_RSP, _FAR_OUT, _FAR_BACK = _STATE + 128, _STATE + 136, _STATE + 152, _STATE + 160
_FAULT = _STATE + 144
_HANDLER: Final = 0x800  # offset of the signal handler in the code mapping
_ALT_STACK_SIZE: Final = 0x10000
_SIGNALS: Final = (4, 5, 7, 8, 11)  # SIGILL SIGTRAP SIGBUS SIGFPE SIGSEGV
_SA_SIGINFO, _SA_ONSTACK, _SA_NODEFER = 4, 0x08000000, 0x40000000
_UC_RIP, _UC_CS, _UC_TRAPNO = 168, 184, 200  # offsets in ucontext_t (sys/ucontext.h, x86-64)
_PROT_READ, _PROT_WRITE, _PROT_EXEC = 1, 2, 4
_MAP_PRIVATE, _MAP_ANONYMOUS, _MAP_32BIT, _MAP_FIXED_NOREPLACE = 2, 0x20, 0x40, 0x100000
_USER_CS64, _USER_CS32, _USER_DS = 0x33, 0x23, 0x2B
_DATA16, _CODE16 = 1 << 6, 2 << 1 | 1 << 6  # user_desc flags: contents (data, code), useable
_SYS_MODIFY_LDT: Final = 154
_SLOT: Final = 16
_NO_FAULT: Final = 0xFF
_CALLEE_SAVED: Final = bytes.fromhex("53 55 4154 4155 4156 4157 9c")  # push rbx rbp r12-r15, pushfq
_RESTORE: Final = bytes.fromhex("9d 415f 415e 415d 415c 5d 5b c3")  # popfq, pop r15-r12 rbp rbx, ret


class BareCpuError(OSError):
    """The bare CPU cannot be used here: not x86-64 Linux, or the address window is taken."""


@dataclass(frozen=True, slots=True)
class Registers:
    """16 general-purpose registers in encoding order, RFLAGS, and the vector of the exception there was (or None)."""

    gpr: tuple[int, ...]
    rflags: int
    fault: int | None = None


class _SigAction(ctypes.Structure):
    """struct sigaction of glibc, x86-64."""

    _fields_ = (
        ("handler", ctypes.c_void_p), ("mask", ctypes.c_uint8 * 128), ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )  # fmt: skip


class _StackT(ctypes.Structure):
    """stack_t."""

    _fields_ = (("sp", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    return libc


class BareCpu:
    """Owns the code mapping and the memory window; a context manager. ``bits``: 64, 32 or 16.

    In 32- and 16-bit code only EAX..EDI exist. CS is flat but in 16-bit code; SS is flat; DS and ES start at
    ``data_base``: 0, or in 16-bit code the window, so that 16-bit offsets reach it.
    """

    def __init__(self, bits: int = 64) -> None:
        self.bits = bits
        self.data_base = WINDOW if bits == 16 else 0
        self._libc = _libc()
        self._code = self._map(0, _CODE_SIZE, _PROT_READ | _PROT_WRITE | _PROT_EXEC, _MAP_32BIT)
        try:
            self._window = self._map(WINDOW, WINDOW_SIZE, _PROT_READ | _PROT_WRITE, _MAP_FIXED_NOREPLACE)
        except BareCpuError:
            self._libc.munmap(self._code, _CODE_SIZE)
            raise
        if self._window != WINDOW:
            self.close()
            raise BareCpuError(f"the address window at {WINDOW:#x} is taken")
        self._slot = self._landing = 0
        self._build()
        self._old_actions: dict[int, _SigAction] = {}
        self._catch_signals()
        self._run = ctypes.CFUNCTYPE(None)(self._code)

    def _map(self, address: int, size: int, prot: int, flags: int) -> int:
        at = self._libc.mmap(address or None, size, prot, _MAP_PRIVATE | _MAP_ANONYMOUS | flags, -1, 0)
        if at is None or at == ctypes.c_void_p(-1).value:
            raise BareCpuError(ctypes.get_errno(), f"mmap of {size:#x} bytes at {address:#x} failed")
        return int(at)

    def close(self) -> None:
        """Give the memory and the signals back."""
        for number, old in self._old_actions.items():
            self._libc.sigaction(number, ctypes.byref(old), None)
        if self._old_actions:
            self._libc.sigaltstack(ctypes.byref(self._old_stack), None)
            self._libc.munmap(self._alt_stack, _ALT_STACK_SIZE)
        self._old_actions = {}
        self._libc.munmap(self._code, _CODE_SIZE)
        self._libc.munmap(self._window, WINDOW_SIZE)

    def __enter__(self) -> BareCpu:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- the trampoline ----------------------------------------------------------------------------------------------

    def _build(self) -> None:
        code = bytearray(_CALLEE_SAVED)

        def relative(opcode: str, target: int) -> None:
            code.extend(bytes.fromhex(opcode))
            code.extend(struct.pack("<i", target - (len(code) + 4)))

        relative("48 89 25", _HOST_RSP)  # mov [host_rsp], rsp
        if self.bits != 64:
            selector = self._segment16(1, WINDOW, _DATA16) if self.bits == 16 else _USER_DS
            code.extend(b"\xb8" + struct.pack("<I", selector))  # mov eax, selector; mov ds, eax; mov es, eax
            code.extend(bytes.fromhex("8e d8 8e c0"))
        relative("ff 35", _RFLAGS)  # push [rflags]
        code.append(0x9D)  # popfq
        for n in range(16):
            relative(f"{0x4C if n >= 8 else 0x48:02x} 8b {(n & 7) << 3 | 5:02x}", _STATE + 8 * n)  # mov gpr, [...]
        if self.bits != 64:
            relative("ff 2d", _FAR_OUT)  # jmp far m16:32
        self._slot = len(code)
        code.extend(b"\x90" * _SLOT)
        if self.bits != 64:
            prefix = "2e 66 ff 2e" if self.bits == 16 else "2e ff 2d"  # jmp far cs:[far_back]
            back = _FAR_BACK if self.bits == 16 else self._code + _FAR_BACK
            code.extend(bytes.fromhex(prefix) + back.to_bytes(2 if self.bits == 16 else 4, "little"))
        landing = self._landing = len(code)
        for n in range(16):
            relative(f"{0x4C if n >= 8 else 0x48:02x} 89 {(n & 7) << 3 | 5:02x}", _STATE + 8 * n)
        relative("48 8b 25", _HOST_RSP)
        code.append(0x9C)  # pushfq
        relative("8f 05", _RFLAGS)  # pop [rflags]
        code.extend(_RESTORE)
        ctypes.memmove(self._code, bytes(code), len(code))
        if self.bits != 64:
            base = self._code if self.bits == 16 else 0
            selector = self._segment16(0, self._code, _CODE16) if self.bits == 16 else _USER_CS32
            self._poke(_FAR_OUT, struct.pack("<IH", self._code + self._slot - base, selector))
            self._poke(_FAR_BACK, struct.pack("<IH", self._code + landing, _USER_CS64))

    def _catch_signals(self) -> None:
        """A fault in the slot goes on at the trampoline's end, on a stack of its own: RSP is the instruction's."""
        handler = bytearray(struct.pack("<3sI", b"\x48\x8b\x82", _UC_TRAPNO))  # mov rax, [rdx+trapno]
        handler += b"\x48\x89\x05" + struct.pack("<i", _FAULT - (_HANDLER + len(handler) + 7))  # mov [fault], rax
        handler += b"\x48\xb8" + struct.pack("<Q", self._code + self._landing)  # mov rax, landing
        handler += b"\x48\x89\x82" + struct.pack("<I", _UC_RIP)  # mov [rdx+rip], rax
        handler += b"\x66\xc7\x82" + struct.pack("<IH", _UC_CS, _USER_CS64) + b"\xc3"  # mov word [rdx+cs], cs64; ret
        self._poke(_HANDLER, bytes(handler))
        self._alt_stack = self._map(0, _ALT_STACK_SIZE, _PROT_READ | _PROT_WRITE, 0)
        self._old_stack = _StackT()
        new = _StackT(self._alt_stack, 0, _ALT_STACK_SIZE)
        self._libc.sigaltstack(ctypes.byref(new), ctypes.byref(self._old_stack))
        for number in _SIGNALS:
            action = _SigAction(handler=self._code + _HANDLER, flags=_SA_SIGINFO | _SA_ONSTACK | _SA_NODEFER)
            self._old_actions[number] = _SigAction()
            self._libc.sigaction(number, ctypes.byref(action), ctypes.byref(self._old_actions[number]))

    def _segment16(self, entry: int, base: int, flags: int) -> int:
        """A 16-bit segment of 64 KiB at ``base`` in an LDT entry (modify_ldt(2), struct user_desc); its selector."""
        desc = struct.pack("<4I", entry, base, 0xFFFF, flags)
        if self._libc.syscall(_SYS_MODIFY_LDT, 0x11, desc, len(desc)):
            raise BareCpuError(ctypes.get_errno(), "modify_ldt failed: this kernel has no 16-bit segments")
        return entry << 3 | 4 | 3

    def _poke(self, offset: int, data: bytes) -> None:
        ctypes.memmove(self._code + offset, data, len(data))

    @property
    def rip(self) -> int:
        """RIP at which instructions run."""
        return self._slot if self.bits == 16 else self._code + self._slot

    # --- use ---------------------------------------------------------------------------------------------------------

    def execute(self, code: bytes, before: Registers) -> Registers:
        """Run one instruction of at most 15 bytes; ``before.rflags`` must have TF clear."""
        self._poke(self._slot, code.ljust(_SLOT, b"\x90"))
        self._poke(_STATE, struct.pack("<17Q", *before.gpr[:16], before.rflags))
        self._poke(_FAULT, struct.pack("<Q", _NO_FAULT))
        self._run()
        values = struct.unpack("<19Q", ctypes.string_at(self._code + _STATE, 152))
        return Registers(values[:16], values[16], None if values[18] == _NO_FAULT else values[18])

    def memory(self, address: int, size: int) -> bytes:
        """Bytes of the window."""
        return ctypes.string_at(address, size)

    def set_memory(self, address: int, data: bytes) -> None:
        """Write bytes of the window."""
        if not WINDOW <= address <= address + len(data) <= WINDOW + WINDOW_SIZE:
            raise ValueError(f"{address:#x}+{len(data):#x} lies outside the window")
        ctypes.memmove(address, data, len(data))

    def cpuid(self, leaf: int, subleaf: int = 0) -> tuple[int, int, int, int]:
        """(EAX, EBX, ECX, EDX) of CPUID."""
        gpr = [0] * 16
        gpr[0], gpr[2 - 1], gpr[4] = leaf, subleaf, WINDOW + WINDOW_SIZE // 2
        out = self.execute(b"\x0f\xa2", Registers(tuple(gpr), 0x202)).gpr
        return out[0], out[3], out[1], out[2]

    def profile(self) -> CpuProfile:
        """The leaves that name this processor's vendor and features."""
        leaves = [(0, 0), (1, 0), (7, 0), (7, 1), (0xD, 0), (0xD, 1), (0x80000000, 0), (0x80000001, 0), (0x80000008, 0)]
        return CpuProfile(tuple(CpuidEntry(n, sub, int(n in (7, 0xD)), *self.cpuid(n, sub)) for n, sub in leaves))
