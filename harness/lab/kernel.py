"""Kernels to boot: Debian's stock ones, and a user's own bzImage. (harness/lab/kbuild.py builds them from a tree.)"""

from __future__ import annotations

import re
import urllib.parse
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from harness.lab import debian
from harness.lab.cache import Progress, cached, digest, quiet
from harness.lab.errors import LabError, LabInputError
from harness.lab.initramfs import Module, archive, modinfo, modules_to_load, read_module

COMMAND_LINE: Final = (
    "console=ttyS0",
    "panic=-1",
    "loglevel=5",
    "tsc=unstable",
    "rcupdate.rcu_expedited=1",  # making a VM and ending it wait for grace periods: they take a third of the time
    "root=/dev/vda",
    "rootfstype=squashfs",
    "ro",
    "init=/sbin/kvm-harness-init",
)
"""What every kernel of the lab is told; a configuration adds its own."""


class _Stock(NamedTuple):
    suite: str
    image: str  # shell pattern of the package with vmlinuz
    others: tuple[str, ...] = ()  # those with the rest, where that is split


_SPLIT: Final = ("linux-base-", "linux-modules-")
STOCK: Final = {
    "6.1": _Stock("bookworm", "linux-image-6.1.*-cloud-amd64-unsigned"),
    "6.12": _Stock("bookworm-backports", "linux-image-6.12.*-cloud-amd64-unsigned"),
    "7.3": _Stock("trixie-backports", "linux-binary-7.3*-cloud-amd64", _SPLIT),
    "newest": _Stock("trixie-backports", "linux-binary-[0-9]*-cloud-amd64", _SPLIT),
}
"""Debian's kernels by series, and where each is found."""


@dataclass(frozen=True)
class Kernel:
    """A kernel that boots in the lab.

    ``release`` is what ``uname -r`` will say, ``series`` its first two numbers. ``initramfs`` is None when all that the
    lab needs is built in. ``digest`` stands for the contents of both files. ``has``: edits asked for that its tree
    contains by itself.
    """

    label: str
    release: str
    series: str
    image: Path
    initramfs: Path | None
    digest: str
    has: frozenset[str] = frozenset()


def debian_kernel(series: str, progress: Progress = quiet) -> Kernel:
    """Debian's kernel of a series of :data:`STOCK`, for virtual machines; fetched if the cache does not have it.

    Raises LabInputError for a series that is not there, LabError when it cannot be fetched.
    """
    if series not in STOCK:
        raise LabInputError(f"no stock kernel {series!r}: there are {', '.join(STOCK)}")
    stock = STOCK[series]
    progress(f"looking for Debian's kernel {series} in {stock.suite}")
    try:
        packages = [debian.fetch_package(stock.image, stock.suite)]
        name, version = packages[0].name.split("_")[:2]
        release = name.partition("-binary-")[2]
        packages += [
            debian.fetch_package(other + release, stock.suite, version=urllib.parse.unquote(version))
            for other in stock.others
        ]

        def make(folder: Path) -> None:
            progress(f"unpacking {', '.join(package.name for package in packages)}")
            for package in packages:
                debian.unpack(package, folder)

        folder = cached("kernel", digest(*packages), make)
    except debian.FetchError as error:
        raise LabError(f"Debian's kernel {series}: {error}") from error
    return _kernel("Debian", _only(folder, "vmlinuz*"), _only(folder, "modules.builtin").parent, progress)


def kernel_from_file(image: Path, modules: Path | None = None, progress: Progress = quiet) -> Kernel:
    """A user's own bzImage, with its ``/lib/modules/<release>`` unless all that the lab needs is built in.

    Raises LabInputError when the file is no kernel, or the modules are another kernel's or lack what a lab needs.
    """
    release = release_of(image)
    if modules is not None:
        if not modules.is_dir():
            raise LabInputError(f"{modules}: no such directory: expected a /lib/modules/{release}")
        if (theirs := _modules_release(modules)) not in (None, release):
            raise LabInputError(f"{modules} holds the modules of {theirs}, but {image} is {release}")
    return _kernel(image.name, image.absolute(), modules, progress)


def release_of(image: Path) -> str:
    """The release (``uname -r``) in a bzImage's header (Documentation/arch/x86/boot.rst). Raises LabInputError."""
    try:
        with open(image, "rb") as file:
            header = file.read(0x8200)
    except OSError as error:
        raise LabInputError(f"{image}: {error.strerror}") from error
    if header[0x202:0x206] != b"HdrS":
        hint = ": that is vmlinux; the lab boots arch/x86/boot/bzImage" if header[:4] == b"\x7fELF" else ""
        raise LabInputError(f"{image} is no bzImage (no HdrS in its header){hint}")
    start = 0x200 + int.from_bytes(header[0x20E:0x210], "little")
    version = header[start:].partition(b"\0")[0].decode(errors="replace")
    if start == 0x200 or not re.match(r"\d+\.\d+", version):
        raise LabInputError(f"{image} does not say its release in its header: is it Linux, and all of it there?")
    return version.split()[0]


def _kernel(origin: str, image: Path, modules: Path | None, progress: Progress) -> Kernel:
    release = release_of(image)
    initramfs = _initramfs(modules_to_load(modules), progress) if modules is not None else None
    return Kernel(
        label=f"{origin} {release}",
        release=release,
        series=".".join(re.findall(r"\d+", release)[:2]),
        image=image,
        initramfs=initramfs,
        digest=digest(image, *([initramfs] if initramfs else [])),
    )


def _initramfs(modules: list[Module], progress: Progress) -> Path | None:
    if not modules:
        return None
    try:
        busybox = debian.unpack(debian.fetch_package("busybox-static", "bookworm")) / "bin" / "busybox"
    except debian.FetchError as error:
        raise LabError(f"the initramfs needs busybox: {error}") from error
    data = archive(busybox, modules)

    def make(folder: Path) -> None:
        progress(f"packing an initramfs with {', '.join(module.name for module in modules)}")
        (folder / "initramfs.cpio").write_bytes(data)

    return cached("initramfs", digest(data), make) / "initramfs.cpio"


def _modules_release(folder: Path) -> str | None:
    """The release that the modules themselves name; None when there are none."""
    for path in folder.rglob("*.ko*"):
        for name, value in modinfo(read_module(path), path):
            if name == "vermagic":
                return value.split()[0]
    return None


def _only(folder: Path, pattern: str) -> Path:
    found = sorted(path for path in folder.rglob(pattern) if path.is_file())
    if len(found) != 1:
        raise LabError(f"{folder}: expected one file {pattern}, found {len(found)}: Debian's packages have changed")
    return found[0]
