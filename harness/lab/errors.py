"""What can go wrong in the lab, apart from the kernel under test. Every text says what to do next."""

from __future__ import annotations

import errno
from pathlib import Path

from harness.verdict import BAD_INPUT, Verdict


class LabError(Exception):
    """Our infrastructure failed: never a verdict on the kernel. ``status`` is the exit status (lost: 4)."""

    status = Verdict.LOST.status


class LabInputError(LabError):
    """What the user gave cannot be used: a file that is no kernel, a tree that is none, an unknown configuration."""

    status = BAD_INPUT


def unreadable(path: Path, error: OSError) -> str:
    """Why a file that the user named cannot be read, and what to do about it."""
    match error.errno:
        case errno.ENOENT | errno.ENOTDIR:
            return f"{path} is not there: check the path"
        case errno.EISDIR:
            inside = next((path / name for name in ("vmlinux", "kvm.ko") if (path / name).is_file()), "a file in it")
            return f"{path} is a folder: give {inside}"
        case errno.EACCES | errno.EPERM:
            return f"{path}: no permission to read it: run as root, or give a copy that you may read"
        case _:
            return f"{path} cannot be read ({error.strerror or error}): give another copy of it"


class LostError(LabError):
    """The machine under our kernel died, or fell silent before the suite began."""


class NoKvmError(LabError):
    """The kernel under test has no KVM although the hardware is there: the kernel's defect (regressed: 1)."""

    status = Verdict.REGRESSED.status
