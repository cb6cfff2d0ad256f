"""Machines that need not boot: one as it was when its runner said hello, kept in the cache.

The next machine of the same emulator, kernel, image, runner and command line goes on there: it has the first Case's
result less than a second after its emulator was started. One that is lost after such a start is followed by one
that boots, so nothing is blamed on a kernel that was not booted for it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from harness.lab.boot import CONSOLE_LOG, Boot
from harness.lab.bootspec import BootSpec
from harness.lab.cache import area, cached, digest, prune
from harness.lab.errors import LabError

KIND: Final = "machine"
FEATURE: Final = "resume"
"""Feature of an emulator that can go on from a file."""
KEPT: Final = 16
"""Machines that stay in the cache, of some hundred MB each; those that were not used for longest go."""
_VERSION: Final = "1"  # part of every key: raise it when the same words start another machine


@dataclass(frozen=True)
class Warm:
    """A machine to go on from: its whole state, and what its runner had said."""

    key: str
    state: Path
    hello: str

    @property
    def console(self) -> Path:
        """What its kernel said until then."""
        return self.state.parent / CONSOLE_LOG


def warm_key(spec: BootSpec, *contents: str) -> str:
    """The key of what ``spec`` starts; ``contents`` are digests of what its files hold. The last disk may be any."""
    files = [path for path in (spec.emulator.binary, spec.kernel, spec.initramfs, *spec.disks[:-1]) if path is not None]
    stamps = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    words = (spec.append, spec.cpu, spec.smp, spec.memory, spec.channels, spec.serials, spec.options)
    return digest(_VERSION, *contents, repr((stamps, words)))


def find_warm(key: str) -> Warm | None:
    """The machine of that key, if it was kept."""
    folder = area(KIND) / key
    try:
        os.utime(folder)  # used now
        return Warm(key, folder / "state", json.loads((folder / "hello.json").read_text()))
    except (OSError, ValueError):
        return None


def keep_warm(key: str, boot: Boot, hello: str) -> None:
    """Keep the machine as it is now; it stands still meanwhile. Raises LabError when there is no room for it."""

    def make(folder: Path) -> None:
        boot.save(folder / "state")
        (folder / "hello.json").write_text(json.dumps(hello))
        shutil.copyfile(boot.folder / CONSOLE_LOG, folder / CONSOLE_LOG)

    cached(KIND, key, make)
    prune(KIND, KEPT)


def drop_warm(key: str) -> None:
    """Forget the machine of that key."""
    with contextlib.suppress(LabError):
        shutil.rmtree(area(KIND) / key, ignore_errors=True)
