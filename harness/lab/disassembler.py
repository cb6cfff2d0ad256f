"""Tools that know APX where the machine's own do not: GNU binutils 2.44 and libLLVM 19, from Debian, in the cache.

Nothing is installed: binutils of trixie run with that suite's own C library and loader; libLLVM 19 of bookworm is
loaded into this process and used through its C interface (llvm-c/Disassembler.h).
"""

from __future__ import annotations

import ctypes
import re
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from harness.cachedir import cache_directory
from harness.lab.debian import fetch_package, unpack

_BINUTILS: Final = (
    "binutils-x86-64-linux-gnu", "libbinutils", "libsframe1", "libctf0", "libctf-nobfd0", "libc6", "zlib1g", "libzstd1",
)  # fmt: skip
_SLOT: Final = 32  # bytes from one instruction to the next in what objdump gets; more than an instruction can have
_LINE: Final = re.compile(r"^ *([0-9a-f]+):\t((?:[0-9a-f]{2} )+) *\t(.*)$", re.MULTILINE)
_LLVM_OPTIONS: Final = 2 | 4  # LLVMDisassembler_Option_PrintImmHex, AsmPrinterVariant (Intel syntax)

Fetch = Callable[[str, str], Path]


def cached_package(name: str, suite: str) -> Path:
    """A package that the cache has, newest last by name. FileNotFoundError when it has none; asks no mirror."""
    found = sorted((cache_directory() / "debian" / "by-suite" / suite).glob(f"{name}_*.deb"))
    if not found:
        raise FileNotFoundError(f"{name} of Debian's {suite} is not in the cache: harness.lab.debian can fetch it")
    return found[-1]


class Binutils:
    """``as`` and ``objdump`` 2.44. ``fetch``: :func:`fetch_package`, or :func:`cached_package` to stay offline."""

    def __init__(self, fetch: Fetch = fetch_package) -> None:
        parts = [unpack(fetch(name, "trixie")) / "usr" for name in _BINUTILS]
        libraries = [str(p / "lib/x86_64-linux-gnu") for p in parts if (p / "lib/x86_64-linux-gnu").is_dir()]
        loader = next(p for part in parts for p in part.glob("lib/x86_64-linux-gnu/ld-linux-x86-64.so.2"))
        self._run = [str(loader), "--library-path", ":".join(libraries)]
        self._bin = parts[0] / "bin"

    def _tool(self, name: str, *arguments: str) -> str:
        command = [*self._run, str(self._bin / f"x86_64-linux-gnu-{name}"), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    def disassemble(self, codes: Sequence[bytes]) -> list[tuple[int, str]]:
        """(length, Intel-syntax text) of the instruction at the start of each of ``codes``, 64-bit code."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "code"
            file.write_bytes(b"".join(code[:_SLOT].ljust(_SLOT, b"\x90") for code in codes))
            out = self._tool(
                "objdump", "-D", "-b", "binary", "-m", "i386:x86-64", "-M", "intel", "--insn-width=16", str(file)
            )
        seen = {int(at, 16): (len(raw.split()), text.strip()) for at, raw, text in _LINE.findall(out)}
        return [seen.get(n * _SLOT, (0, "out of step")) for n in range(len(codes))]

    def assemble(self, source: str) -> bytes:
        """The .text of ``source``, AT&T syntax, 64-bit code. subprocess.CalledProcessError when as refuses it."""
        with tempfile.TemporaryDirectory() as folder:
            text, obj, raw = (str(Path(folder) / name) for name in ("a.s", "a.o", "a.bin"))
            Path(text).write_text(source)
            self._tool("as", "--64", "-o", obj, text)
            self._tool("objcopy", "-O", "binary", "-j", ".text", obj, raw)
            return Path(raw).read_bytes()


class Llvm:
    """libLLVM 19's disassembler. ``fetch`` as for :class:`Binutils`. OSError when it cannot be loaded here."""

    def __init__(self, fetch: Fetch = fetch_package) -> None:
        root = unpack(fetch("libllvm19", "bookworm"))
        self._lib = lib = ctypes.CDLL(str(next(root.glob("usr/lib/x86_64-linux-gnu/libLLVM.so.19*"))))
        for part in ("TargetInfo", "Target", "TargetMC", "Disassembler"):
            getattr(lib, f"LLVMInitializeX86{part}")()
        lib.LLVMCreateDisasm.restype = ctypes.c_void_p
        pointer = ctypes.c_void_p
        lib.LLVMCreateDisasm.argtypes = [ctypes.c_char_p, pointer, ctypes.c_int, pointer, pointer]
        lib.LLVMSetDisasmOptions.argtypes = [ctypes.c_void_p, ctypes.c_uint64]
        lib.LLVMDisasmInstruction.restype = ctypes.c_size_t
        lib.LLVMDisasmInstruction.argtypes = [
            ctypes.c_void_p, ctypes.c_char_p, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_char_p, ctypes.c_size_t,
        ]  # fmt: skip
        self._context = lib.LLVMCreateDisasm(b"x86_64-unknown-linux", None, 0, None, None)
        lib.LLVMSetDisasmOptions(self._context, _LLVM_OPTIONS)
        self._text = ctypes.create_string_buffer(256)

    def disassemble(self, code: bytes) -> tuple[int, str]:
        """(length, Intel-syntax text) of the first instruction of 64-bit ``code``; length 0 when LLVM rejects it."""
        code = code.ljust(_SLOT, b"\x90")
        length = self._lib.LLVMDisasmInstruction(self._context, code, len(code), 0, self._text, len(self._text))
        return length, self._text.value.decode().strip() if length else ""
