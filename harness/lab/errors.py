"""What can go wrong in the lab, apart from the kernel under test. Every text says what to do next."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

from harness.verdict import BAD_INPUT, Verdict


class LabError(Exception):
    """Our infrastructure failed: never a verdict on the kernel. ``status`` is the exit status (lost: 4)."""

    status = Verdict.LOST.status


class LabInputError(LabError):
    """What the user gave cannot be used: a file that is no kernel, a tree that is none, an unknown configuration."""

    status = BAD_INPUT


def opened(path: Path) -> BinaryIO:
    """A file that the user named, to read from. A FIFO is not waited for: one that nobody writes to is empty.

    OSError, for :func:`unreadable` to put into words; ENODEV for a device, which may have no end.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        mode = os.fstat(fd).st_mode
        if stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
            raise OSError(errno.ENODEV, "it is a device")
        os.set_blocking(fd, True)
        return open(fd, "rb")
    except OSError:
        os.close(fd)
        raise


def unreadable(path: Path, error: OSError) -> str:
    """Why a file that the user named cannot be read, and what to do about it."""
    match error.errno:
        case errno.ENOENT | errno.ENOTDIR:
            return f"{path} is not there: check the path"
        case errno.EISDIR:
            inside = next((path / name for name in ("vmlinux", "kvm.ko") if (path / name).is_file()), "a file in it")
            return f"{path} is a folder: give {inside}"
        case errno.ENODEV:
            return f"{path} is a device: give a file"
        case errno.EACCES | errno.EPERM:
            return f"{path}: no permission to read it: run as root, or give a copy that you may read"
        case _:
            return f"{path} cannot be read ({error.strerror or error}): give another copy of it"


class LostError(LabError):
    """The machine under our kernel died, or fell silent before the suite began."""


class NoKvmError(LabError):
    """The kernel under test has no KVM although the hardware is there: the kernel's defect (regressed: 1)."""

    status = Verdict.REGRESSED.status
