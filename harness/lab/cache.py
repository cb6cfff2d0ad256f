"""The lab's part of the cache: what was built once is found again by the content it was built from.

Entries live in ``lab/<kind>/<key>/`` of the cache directory (harness/lab/debian.py says where that is); an entry
appears by one rename and is never changed. Any number of processes may ask for the same one: the first builds it, the
others wait.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Final

from harness.cachedir import cache_directory
from harness.lab.errors import LabError

Progress = Callable[[str], None]
"""Takes one line for people: what is being done now."""

_DIGITS: Final = 32


def quiet(text: str) -> None:
    """A Progress that says nothing."""


def digest(*parts: str | bytes | Path) -> str:
    """32 hex digits of SHA-256 over strings, bytes, and the contents (not the names) of files, each with its length."""
    h = hashlib.sha256()
    for part in parts:
        data = part.read_bytes() if isinstance(part, Path) else part.encode() if isinstance(part, str) else part
        h.update(len(data).to_bytes(8, "little"))
        h.update(data)
    return h.hexdigest()[:_DIGITS]


def digest_tree(root: Path, files: Iterable[Path]) -> str:
    """:func:`digest` of files with their names below ``root``."""
    parts: list[str | Path] = []
    for path in sorted(files):
        parts += [str(path.relative_to(root)), path]
    return digest(*parts)


def area(kind: str) -> Path:
    """The folder of one kind of entries; made if need be."""
    folder = cache_directory() / "lab" / kind
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LabError(f"{folder}: {error.strerror}: set KVM_HARNESS_CACHE to a directory of yours") from error
    return folder


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold ``path`` (a lock file, made if need be) for this process; others wait."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def cached(kind: str, key: str, make: Callable[[Path], None]) -> Path:
    """The entry's folder. If it is not there yet, ``make`` fills an empty one; if that raises, nothing stays.

    Raises LabError when the disk is full or the cache cannot be written.
    """
    folder = area(kind)
    target = folder / key
    if target.is_dir():
        return target
    with locked(folder / f".{key}.lock"):
        if target.is_dir():
            return target
        scratch = Path(tempfile.mkdtemp(prefix=f".{key}.", dir=folder))
        try:
            make(scratch)
            scratch.chmod(0o755)
            scratch.rename(target)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise LabError(f"{folder}: {error.strerror}: make room, or set KVM_HARNESS_CACHE elsewhere") from error
            raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return target


def sizes() -> dict[Path, tuple[int, int]]:
    """Folder of a kind -> the number of its entries and its size in MB on the disk, the largest first."""
    folders = [p for p in cache_directory().glob("*") if p.is_dir() and p.name != "lab"]
    folders += [p for p in (cache_directory() / "lab").glob("*") if p.is_dir()]
    found = {}
    for folder in folders:
        said = subprocess.run(["du", "-sm", str(folder)], capture_output=True, check=False)  # it may be changing
        entries = sum(not p.name.startswith(".") for p in folder.iterdir())
        found[folder] = (entries, int(said.stdout.split()[0]) if said.stdout else 0)
    return dict(sorted(found.items(), key=lambda item: -item[1][1]))


def prune(kind: str, keep: int) -> None:
    """Keep so many entries of a kind, those that were used last: who finds one sets its time stamp."""
    entries = [path for path in area(kind).iterdir() if path.is_dir() and not path.name.startswith(".")]
    for path in sorted(entries, key=lambda p: p.stat().st_mtime, reverse=True)[keep:]:
        shutil.rmtree(path, ignore_errors=True)
