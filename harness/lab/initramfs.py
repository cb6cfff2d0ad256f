"""The initramfs of a modular kernel: its modules in the order they must be loaded, and a script that loads them."""

from __future__ import annotations

import gzip
import io
import lzma
import shutil
import subprocess
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from elftools.common.exceptions import ELFError
from elftools.elf.elffile import ELFFile

from harness.lab.cache import Progress, cached, digest, quiet
from harness.lab.debian import FetchError, fetch_package, unpack
from harness.lab.errors import LabError, LabInputError, opened, unreadable
from harness.lab.image import RECIPE, SUITE

REQUIRED: Final = ("virtio_pci", "virtio_blk", "squashfs", "virtio_console", "kvm")
"""Modules without which a lab cannot work: they must be in the kernel, or loadable."""
_HARDWARE: Final = ("kvm_amd", "kvm_intel")  # at least one of them
_INIT: Final = RECIPE / "initramfs-init"


@dataclass(frozen=True)
class Module:
    """A loadable module: its name with underscores, and the contents of its .ko file, not compressed."""

    name: str
    data: bytes


def module_name(file: str) -> str:
    """The kernel's name of the module in ``kvm-amd.ko.xz``."""
    return file.partition(".ko")[0].replace("-", "_")


def modules_to_load(folder: Path) -> list[Module]:
    """What a lab must load of ``/lib/modules/<release>``, in an order that loads; empty when all of it is built in.

    Raises LabInputError when a module is neither loadable nor built in.
    """
    files = {module_name(path.name): path for path in sorted(folder.rglob("*.ko*")) if path.is_file()}
    builtin = _builtin(folder)
    have = files.keys() | builtin
    missing = [name for name in REQUIRED if name not in have]
    if not any(name in have for name in _HARDWARE):
        missing.append(" or ".join(_HARDWARE))
    if missing:
        raise LabInputError(
            f"{folder}: the kernel has no {', no '.join(missing)}, neither built in (modules.builtin) nor as a module: "
            "configure it in (ci/qemu/kernel.config has all that a lab needs)"
        )
    loaded: dict[str, Module] = {}

    def add(name: str, wanted_by: str) -> None:
        if name in loaded or name in builtin:
            return
        if name not in files:
            raise LabInputError(f"{folder}: no module {name}, which {wanted_by} needs: install all of the modules")
        module = Module(name, read_module(files[name]))
        for dependency in dependencies(module.data, files[name]):
            add(dependency, name)
        loaded[name] = module

    for name in (*REQUIRED, *_HARDWARE):
        if name in have:
            add(name, "the lab")
    return list(loaded.values())


def _builtin(folder: Path) -> frozenset[str]:
    try:
        lines = (folder / "modules.builtin").read_text().splitlines()
    except OSError as error:
        raise LabInputError(
            f"{error.filename}: {error.strerror}: expected a directory as /lib/modules/<release>, made by "
            "`make modules_install`"
        ) from error
    return frozenset(module_name(Path(line).name) for line in lines)


def read_module(path: Path) -> bytes:
    """The contents of a .ko file, decompressed. Raises LabInputError when it cannot be read or is damaged."""
    decompress = _DECOMPRESS.get(path.suffix)
    try:
        with opened(path) as file:
            data = file.read()
    except OSError as error:
        raise LabInputError(unreadable(path, error)) from error
    try:
        return decompress(data) if decompress else data
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        what = f"is damaged or no {path.suffix} file ({error}): copy it again"
        raise LabInputError(f"{path} does not unpack, it {what}") from error


def _zstd(data: bytes) -> bytes:
    tool = shutil.which("zstd")
    if tool is None:
        raise LabError("zstd is not on this machine, and the kernel's modules are compressed with it: install zstd")
    done = subprocess.run([tool, "-dcq"], input=data, capture_output=True, check=False)
    if done.returncode:
        raise OSError(done.stderr.decode(errors="replace").strip())
    return done.stdout


_DECOMPRESS: Final[dict[str, Callable[[bytes], bytes]]] = {
    ".xz": lzma.decompress,
    ".gz": gzip.decompress,
    ".zst": _zstd,
}


def modinfo(data: bytes, path: Path) -> Iterator[tuple[str, str]]:
    """The tags of a module: ("depends", "kvm"), ("vermagic", "6.12.0 SMP ..."). Raises LabInputError."""
    try:
        section = ELFFile(io.BytesIO(data)).get_section_by_name(".modinfo")
    except ELFError as error:
        raise LabInputError(f"{path} is no kernel module: {error}") from error
    if section is None:
        raise LabInputError(f"{path} is no kernel module: it has no section .modinfo")
    for entry in section.data().split(b"\0"):
        name, _, value = entry.decode(errors="replace").partition("=")
        if name:
            yield name, value


def dependencies(data: bytes, path: Path) -> list[str]:
    """Names of the modules that this one says it needs. (Packages carry no modules.dep: depmod makes it later.)"""
    words = [value for name, value in modinfo(data, path) if name == "depends"]
    return [word.replace("-", "_") for word in ",".join(words).split(",") if word]


def initramfs(modules: Sequence[Module], progress: Progress = quiet) -> Path:
    """An initramfs that loads these modules and hands over to the root image; from the cache if it was made before.

    KVM's modules get their parameters from the kernel command line, as built-in ones do. Raises LabError.
    """

    def make(folder: Path) -> None:
        progress(f"packing an initramfs with {', '.join(module.name for module in modules)}")
        try:
            busybox = unpack(fetch_package("busybox-static", SUITE)) / "bin" / "busybox"
        except FetchError as error:
            raise LabError(f"the initramfs needs busybox: {error}") from error
        (folder / "initramfs.cpio").write_bytes(_archive(busybox, modules))

    key = digest(SUITE, _INIT, *(part for module in modules for part in (module.name, module.data)))
    return cached("initramfs", key, make) / "initramfs.cpio"


def _archive(busybox: Path, modules: Sequence[Module]) -> bytes:
    """A cpio archive, not compressed: the guest would pay for unpacking it."""
    # A module, and the shell pattern of its parameters: kernels take its name in either spelling.
    order = "".join(f"{module.name} {module.name.replace('_', '[_-]')}.*\n" for module in modules)
    members: list[tuple[str, int, bytes]] = [
        *((name, 0o040755, b"") for name in ("bin", "dev", "modules", "proc", "root")),
        ("bin/busybox", 0o100755, busybox.read_bytes()),
        ("init", 0o100755, _INIT.read_bytes()),
        ("modules/list", 0o100644, order.encode()),
        *((f"modules/{module.name}.ko", 0o100644, module.data) for module in modules),
        ("TRAILER!!!", 0, b""),
    ]
    return b"".join(_member(number, *member) for number, member in enumerate(members, 1))


def _member(inode: int, name: str, mode: int, data: bytes) -> bytes:
    """One member of a newc archive (Documentation/driver-api/early-userspace/buffer-format.rst)."""
    path = name.encode() + b"\0"
    # inode, mode, uid, gid, links, mtime, size, device, special device, length of the name, no checksum
    numbers = (inode, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(path), 0)
    header = b"070701" + b"".join(b"%08x" % number for number in numbers) + path
    return _padded(header) + _padded(data)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)
