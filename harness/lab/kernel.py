"""Kernels to boot: Debian's stock ones, and a user's own bzImage. (harness/lab/kbuild.py builds them from a tree.)"""

from __future__ import annotations

import re
import urllib.parse
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from harness.lab import debian
from harness.lab.bzimage import release_of, unpacked
from harness.lab.cache import Progress, cached, digest, quiet
from harness.lab.errors import LabError, LabInputError
from harness.lab.initramfs import initramfs, modinfo, modules_to_load, read_module

COMMAND_LINE: Final = (
    "console=ttyS0",
    "panic=-1",
    "loglevel=5",
    # A busy host makes an emulated TSC jump: the kernel would notice at some time of its own choosing.
    "tsc=unstable",
    "rcupdate.rcu_expedited=1",  # making a VM and ending it wait for grace periods: they take a third of the time
    # On a busy host the check that the timer interrupt arrives fails now and then, and the kernel panics of it.
    "no_timer_check",
    # Stock kernels test every cipher when they start: a second and more under software emulation.
    "cryptomgr.notests",
    "root=/dev/vda",
    "rootfstype=squashfs",
    "ro",
    "init=/sbin/kvm-harness-init",
)
"""What every kernel of the lab is told; a configuration adds its own.

Tried, and no faster by more than the noise: nokaslr, edd=off, lpj=, audit=0, lsm=none, acpiphp.disable=1,
8250.nr_uarts=1, rcupdate.rcu_expedited=1. Not used: mitigations=off, for it changes what KVM does on entering a guest.
"""


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

    ``release`` is what ``uname -r`` will say, ``series`` its first two numbers. ``image`` is what an emulator is given
    to start: a bzImage, or the ELF file that was inside. ``initramfs`` is None when all that the lab needs is built in.
    ``digest`` stands for the contents of both files. ``has``: edits asked for that its tree contains by itself.
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


def _kernel(origin: str, bzimage: Path, modules: Path | None, progress: Progress) -> Kernel:
    release = release_of(bzimage)
    needed = modules_to_load(modules) if modules is not None else []
    image = unpacked(bzimage, progress)
    loader = initramfs(needed, progress) if needed else None
    return Kernel(
        label=f"{origin} {release}",
        release=release,
        series=".".join(re.findall(r"\d+", release)[:2]),
        image=image,
        initramfs=loader,
        digest=digest(bzimage, *([loader] if loader else [])),
    )


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
