"""What a bzImage says of itself, and the kernel inside: small ones made here, as the boot protocol lays them out."""

import gzip
import lzma
import struct
from pathlib import Path

import pytest

from harness.lab import bzimage
from harness.lab.bzimage import release_of, unpacked, vmlinux_of
from harness.lab.errors import LabInputError


def elf(note_type=18):
    """An ELF file with one program header: a Xen note (18: the PVH entry)."""
    note = struct.pack("<3I4sI", 4, 4, note_type, b"Xen\0", 0x1000000)
    header = struct.pack(
        "<4s5B7x2HI3QI6H", b"\x7fELF", 2, 1, 1, 0, 0, 2, 62, 1, 0x1000000, 64, 0, 0, 64, 56, 1, 0, 0, 0
    )
    program = struct.pack("<2I6Q", 4, 4, 120, 0, 0, len(note), len(note), 4)
    return header + program + note


def bzimage_of(path: Path, kernel: bytes, packed: bytes, *, size=None):
    """A bzImage whose payload is ``packed`` and the size of ``kernel``."""
    data = bytearray(0x1000)
    data[0x1F1] = 3
    data[0x202:0x206] = b"HdrS"
    data[0x20E:0x210] = (0x300).to_bytes(2, "little")
    data[0x500:0x520] = b"7.3.4-toy (me@here) #1 SMP\0".ljust(32, b"\0")
    length = (len(kernel) if size is None else size).to_bytes(4, "little")
    payload = packed if packed[:2] == b"\x1f\x8b" else packed + length
    data[0x248:0x250] = struct.pack("<2I", 0x800, len(payload))
    path.write_bytes(data.ljust(4 * 512 + 0x800, b"\0") + payload)
    return path


def xz(data):
    return lzma.compress(data, format=lzma.FORMAT_XZ)


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KVM_HARNESS_CACHE", str(tmp_path / "cache"))


def test_release_is_in_the_header(tmp_path):
    assert release_of(bzimage_of(tmp_path / "bzImage", elf(), xz(elf()))) == "7.3.4-toy"


@pytest.mark.parametrize("pack", [xz, gzip.compress, lambda d: lzma.compress(d, format=lzma.FORMAT_ALONE)])
def test_the_kernel_inside_comes_out_whole(tmp_path, pack):
    image = bzimage_of(tmp_path / "bzImage", elf(), pack(elf()))
    assert vmlinux_of(image) == elf()
    assert unpacked(image).read_bytes() == elf()
    assert unpacked(image) == unpacked(image)


def test_a_kernel_without_a_pvh_entry_starts_as_it_is(tmp_path):
    image = bzimage_of(tmp_path / "bzImage", elf(5), xz(elf(5)))
    assert vmlinux_of(image) == elf(5)
    assert unpacked(image) == image


def test_without_the_tool_it_starts_as_it_is_and_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(bzimage.shutil, "which", lambda name: None)
    image, said = bzimage_of(tmp_path / "bzImage", elf(), b"\x28\xb5\x2f\xfd rest"), []
    assert unpacked(image, said.append) == image
    assert "apt-get install zstd" in said[-1]
    with pytest.raises(LabInputError, match="apt-get install zstd"):
        vmlinux_of(image)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda data: data[:-8], "ends in the middle"),
        (lambda data: data[: 4 * 512 + 0x830] + b"\0\0\0\0" + data[4 * 512 + 0x834 :], "is damaged"),
        (lambda data: data[: 4 * 512 + 0x800] + b"????" + data[4 * 512 + 0x804 :], "not known here"),
        (lambda data: data[:0x202] + b"none" + data[0x206:], "no HdrS"),
        (lambda data: b"\x7fELF" + data[4:0x202] + b"none" + data[0x206:], "it may be vmlinux"),
        (lambda data: data[:0x500] + b"Minix" + bytes(27) + data[0x520:], "does not say its release"),
    ],
)  # fmt: skip
def test_a_damaged_one_is_refused(tmp_path, spoil, words):
    image = bzimage_of(tmp_path / "bzImage", elf(), xz(elf()))
    image.write_bytes(spoil(image.read_bytes()))
    with pytest.raises(LabInputError, match=words):
        vmlinux_of(image)


def test_a_kernel_of_another_size_is_damaged(tmp_path):
    image = bzimage_of(tmp_path / "bzImage", elf(), xz(elf()), size=5)
    with pytest.raises(LabInputError, match="should be 5"):
        vmlinux_of(image)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(LabInputError, match="is not there: check the path"):
        release_of(tmp_path / "none")
