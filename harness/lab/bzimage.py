"""What a bzImage says of itself, and the kernel inside it (Documentation/arch/x86/boot.rst)."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import re
import shutil
import subprocess
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Final

from elftools.common.exceptions import ELFError
from elftools.elf.elffile import ELFFile
from elftools.elf.segments import NoteSegment

from harness.lab.cache import Progress, cached, digest, quiet
from harness.lab.errors import LabInputError, opened, unreadable

_SETUP_SECTS: Final = 0x1F1
_MAGIC: Final = 0x202
_KERNEL_VERSION: Final = 0x20E
_PAYLOAD_OFFSET: Final = 0x248
_PAYLOAD_LENGTH: Final = 0x24C
_PVH_ENTRY: Final = 18  # XEN_ELFNOTE_PHYS32_ENTRY


def release_of(image: Path) -> str:
    """The release (``uname -r``) in a bzImage's header. Raises LabInputError when it is none."""
    return _release(image, _read(image, 0x8200))


def _read(image: Path, size: int = -1) -> bytes:
    try:
        with opened(image) as file:
            return file.read(size)
    except OSError as error:
        raise LabInputError(f"{unreadable(image, error)}; a kernel's bzImage is needed (/boot/vmlinuz-...)") from error


def _release(image: Path, header: bytes) -> str:
    if header[_MAGIC : _MAGIC + 4] != b"HdrS":
        elf = header[:4] == b"\x7fELF"
        hint = "it may be vmlinux; the lab boots arch/x86/boot/bzImage" if elf else "give a bzImage"
        raise LabInputError(f"{image} is no bzImage (no HdrS in its header): {hint}")
    start = 0x200 + int.from_bytes(header[_KERNEL_VERSION : _KERNEL_VERSION + 2], "little")
    version = header[start:].partition(b"\0")[0].decode(errors="replace")
    if start == 0x200 or not re.match(r"\d+\.\d+", version):
        raise LabInputError(f"{image} does not say its release in its header: is it Linux, and all of it there?")
    return version.split()[0]


def vmlinux_of(image: Path) -> bytes:
    """The kernel inside a bzImage: vmlinux without its symbols, but with BTF if it has any.

    Raises LabInputError for a damaged one, one that is compressed in a way that is not known here, and where the
    program that unpacks it is not installed.
    """
    data = _read(image)
    _release(image, data)
    start = ((data[_SETUP_SECTS] or 4) + 1) * 512
    start += int.from_bytes(data[_PAYLOAD_OFFSET : _PAYLOAD_OFFSET + 4], "little")
    length = int.from_bytes(data[_PAYLOAD_LENGTH : _PAYLOAD_LENGTH + 4], "little")
    packed = data[start : start + length]
    if len(packed) < length or length <= 4:
        raise LabInputError(f"{image} ends in the middle of the kernel: copy it again")
    unpack = next((tool for magic, tool in _UNPACK.items() if packed.startswith(magic)), None)
    if unpack is None:
        raise LabInputError(f"{image}: its kernel is compressed in a way that is not known here: give its vmlinux")
    # The build appends the size to what it compressed, except where the format has it there anyway.
    content = packed if unpack is gzip.decompress else packed[:-4]
    size = int.from_bytes(packed[-4:], "little")
    try:
        kernel = unpack(content)
    except (OSError, EOFError, ValueError, lzma.LZMAError, zlib.error) as error:
        raise LabInputError(f"{image} is damaged, the kernel inside does not unpack: {error}") from error
    if len(kernel) != size:
        raise LabInputError(f"{image} is damaged: {len(kernel)} bytes are inside, and should be {size}")
    return kernel


def unpacked(image: Path, progress: Progress = quiet) -> Path:
    """The kernel inside a bzImage, as an ELF file in the cache that an emulator can start at its PVH entry.

    Unpacking outside saves an emulated processor a second or more. The bzImage itself where that cannot be had: no PVH
    entry (CONFIG_PVH), or a compression that this machine has no tool for. Raises LabInputError for a damaged one.
    """

    def make(folder: Path) -> None:
        progress(f"unpacking {image.name}")
        kernel = vmlinux_of(image)
        if _has_pvh_entry(kernel):
            (folder / "vmlinux").write_bytes(kernel)

    try:
        found = cached("vmlinux", digest(image), make) / "vmlinux"
    except NoToolError as error:
        progress(f"{error}; until then the kernel unpacks itself when it starts, which takes longer")
        return image
    return found if found.is_file() else image


class NoToolError(LabInputError):
    """The program that unpacks this format is not on this machine."""


def _tool(name: str) -> Callable[[bytes], bytes]:
    def unpack(data: bytes) -> bytes:
        if shutil.which(name) is None:
            raise NoToolError(f"{name} is needed to unpack this kernel: apt-get install {name}")
        done = subprocess.run([name, "-dcq"], input=data, capture_output=True, check=False)
        if done.returncode:
            raise OSError(done.stderr.decode(errors="replace").strip())
        return done.stdout

    return unpack


_UNPACK: Final[dict[bytes, Callable[[bytes], bytes]]] = {
    b"\x1f\x8b": gzip.decompress,
    b"BZh": bz2.decompress,
    b"\xfd7zXZ\0": lzma.decompress,
    b"]\0\0": lzma.decompress,
    b"\x28\xb5\x2f\xfd": _tool("zstd"),
    b"\x02\x21\x4c\x18": _tool("lz4"),
}


def _has_pvh_entry(kernel: bytes) -> bool:
    try:
        elf = ELFFile(io.BytesIO(kernel))
        parts = [part for part in elf.iter_segments() if isinstance(part, NoteSegment)]
        # Types that have a name in some other vendor's notes come as that name.
        xen: list[object] = [note["n_type"] for part in parts for note in part.iter_notes() if note["n_name"] == "Xen"]
    except (ELFError, ValueError):
        return False
    return _PVH_ENTRY in xen
