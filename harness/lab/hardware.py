"""The lab's hardware: the emulator that stands in for a processor with hardware virtualization.

Ours is QEMU of one pinned release with the patches of ``ci/qemu/patches/``, built from Debian's source tarball into
the cache. The distribution's can be used instead, with its defects: see ``ci/qemu/README.md``.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from harness.lab import qemu_build
from harness.lab.cache import Progress, cached, digest, quiet
from harness.lab.errors import LabError

_KNOWN: Final = frozenset({"bare-machine", "cr8-lock", "resume"})  # of ours: by its patches, by its version


@dataclass(frozen=True)
class Emulator:
    """An emulator that is ready to be started.

    ``firmware`` is the directory for ``-L``, None where the emulator finds its own. ``digest`` changes whenever the
    emulator may behave differently. ``features`` are names of what it can do beyond stock QEMU 7.2: ``bare-machine``
    (runs Cases by itself: harness/lab/bare_emulator.py), ``cr8-lock`` (does
    not die where a nested guest writes CR8), ``apx`` (``-cpu max,+apxf``), ``kvm`` (can use the host's KVM), ``resume``
    (writes a machine to a file and goes on from there).
    """

    name: str
    binary: Path
    firmware: Path | None
    digest: str
    features: frozenset[str]

    @property
    def command(self) -> tuple[str, ...]:
        """The beginning of its command line."""
        return (str(self.binary),) if self.firmware is None else (str(self.binary), "-L", str(self.firmware))


def pinned_qemu(progress: Progress = quiet) -> Emulator:
    """The project's own QEMU, from the cache; built (some minutes) where the cache has none of this recipe.

    Raises LabError: no network, a wrong checksum, tools that the build lacks, a build that fails.
    """
    key = qemu_build.recipe_digest()
    folder = cached("qemu", key, lambda scratch: qemu_build.build(scratch, key, progress))
    binary = folder / qemu_build.BINARY
    try:
        shown = _shown_features(binary)
    except LabError as error:
        raise LabError(f"{error}\nLibraries it needs may be gone: remove {folder} to have it built anew") from error
    name = f"QEMU {qemu_build.RELEASE} with the project's patches"
    return Emulator(name, binary, folder / "firmware", key, shown | _KNOWN)


def system_qemu() -> Emulator:
    """The machine's own ``qemu-system-x86_64``. Raises LabError if there is none, or it does not start."""
    found = shutil.which(qemu_build.BINARY)
    if found is None:
        raise LabError(
            f"{qemu_build.BINARY} is not on this machine: apt-get install qemu-system-x86, or let the lab use its own"
        )
    binary = Path(found).resolve()
    features = _shown_features(binary)
    release = re.search(r"version (\S+)", _output(binary, "--version"))
    return Emulator(f"this machine's QEMU {release[1] if release else '?'}", binary, None, digest(binary), features)


def _shown_features(binary: Path) -> frozenset[str]:
    """Those features that an emulator lists by itself."""
    found = set()
    if "apxf" in _output(binary, "-cpu", "help").split():
        found.add("apx")
    if "kvm" in _output(binary, "-accel", "help").split():
        found.add("kvm")
    return frozenset(found)


def _output(binary: Path, *arguments: str) -> str:
    try:
        done = subprocess.run([binary, *arguments], capture_output=True, text=True, check=False)
    except OSError as error:
        raise LabError(f"{binary}: {error.strerror}") from error
    if done.returncode:
        raise LabError(f"{binary} does not start here: {done.stderr.strip()[-500:]}")
    return done.stdout
