"""The kernel proper, an ELF file, out of the bzImage that it is booted from."""

from __future__ import annotations

import lzma
import shutil
import subprocess
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Final

from harness.lab.errors import LabInputError
from harness.lab.kernel import release_of

_PAYLOAD: Final = 0x248  # of the setup header; the length follows (Documentation/arch/x86/boot.rst)


def vmlinux_of(image: Path) -> bytes:
    """The compressed payload of a bzImage, decompressed: vmlinux without its symbols, but with BTF if it has any.

    Raises LabInputError when the file is no bzImage, or what decompresses it is not installed.
    """
    release_of(image)
    data = image.read_bytes()
    start = ((data[0x1F1] or 4) + 1) * 512 + int.from_bytes(data[_PAYLOAD : _PAYLOAD + 4], "little")
    payload = data[start : start + int.from_bytes(data[_PAYLOAD + 4 : _PAYLOAD + 8], "little")]
    for magic, decompress in _FORMATS.items():
        if payload.startswith(magic):
            try:
                found = decompress(payload)
            except (EOFError, OSError, lzma.LZMAError, zlib.error) as error:
                raise LabInputError(f"{image}: its kernel cannot be decompressed: {error}") from error
            if found.startswith(b"\x7fELF"):
                return found
    raise LabInputError(f"{image}: its kernel is compressed in a way that is not known here: give its vmlinux")


def _xz(data: bytes) -> bytes:
    return lzma.LZMADecompressor(lzma.FORMAT_XZ).decompress(data)  # the kernel's size follows


def _lzma(data: bytes) -> bytes:
    return lzma.LZMADecompressor(lzma.FORMAT_ALONE).decompress(data)


def _gzip(data: bytes) -> bytes:
    return zlib.decompressobj(zlib.MAX_WBITS | 16).decompress(data)


def _with(command: str, package: str) -> Callable[[bytes], bytes]:
    def run(data: bytes) -> bytes:
        if shutil.which(command) is None:
            raise LabInputError(f"{command} is needed to decompress this kernel: apt-get install {package}")
        # The kernel's size after the end makes it complain, after it has written all there is.
        return subprocess.run([command, "-dc"], input=data, capture_output=True, check=False).stdout

    return run


_FORMATS: Final[dict[bytes, Callable[[bytes], bytes]]] = {
    b"\x1f\x8b": _gzip,
    b"\xfd7zXZ\0": _xz,
    b"]\0\0": _lzma,
    b"\x02\x21": _with("lz4", "lz4"),
    b"\x28\xb5\x2f\xfd": _with("zstd", "zstd"),
}
