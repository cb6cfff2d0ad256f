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
from harness.lab.cache import Progress, cached, digest, digest_tree, quiet
from harness.lab.errors import LabError, LabInputError

_PATCHED_IN: Final = frozenset({"bare-machine", "cr8-lock"})

_SELFTEST: Final = Path(__file__).resolve().parents[2] / "tests" / "lab" / "apx_selftest"
_SELFTEST_CFLAGS: Final = (
    "-std=gnu11", "-O2", "-Wall", "-Wextra", "-ffreestanding", "-fno-pic", "-fno-pie", "-mcmodel=small",
    "-mno-red-zone", "-mgeneral-regs-only", "-fno-stack-protector", "-fcf-protection=none",
    "-fno-asynchronous-unwind-tables",
)  # fmt: skip
_SELFTEST_MACHINE: Final = (
    "-machine", "pc", "-accel", "tcg", "-cpu", "max,+apxf,+xsavec,+xsaves", "-m", "64", "-nodefaults",
    "-display", "none", "-serial", "stdio", "-no-reboot", "-device", "isa-debug-exit,iobase=0xf4,iosize=4",
)  # fmt: skip
_SELFTEST_LIMIT: Final = 120.0  # seconds; it takes about one
_SUMMARY: Final = re.compile(r"^passed (0x[0-9a-f]+) failed (0x[0-9a-f]+)$", re.MULTILINE)


@dataclass(frozen=True)
class Emulator:
    """An emulator that is ready to be started.

    ``firmware`` is the directory for ``-L``, None where the emulator finds its own. ``digest`` changes whenever the
    emulator may behave differently. ``features`` are names of what it can do beyond stock QEMU 7.2: ``bare-machine``
    (runs Cases by itself: harness/lab/bare_emulator.py), ``cr8-lock`` (does
    not die where a nested guest writes CR8), ``apx`` (``-cpu max,+apxf``), ``kvm`` (can use the host's KVM).
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


@dataclass(frozen=True)
class SelfTest:
    """What an emulator's self-test found: counts of checks, and its whole output (``FAIL`` begins a failed check)."""

    passed: int
    failed: int
    output: str


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
    return Emulator(name, binary, folder / "firmware", key, shown | _PATCHED_IN)


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


# --- the self-test of its APX ----------------------------------------------------------------------------------------


def apx_selftest(emulator: Emulator, progress: Progress = quiet) -> SelfTest:
    """Run ``tests/lab/apx_selftest`` on the bare emulator, once for each emulator and version of the test.

    A failed check is the emulator's defect: nothing that a KVM shows on it about APX counts. Raises LabInputError where
    the emulator has no APX, LabError where the test cannot be built or does not come to its end.
    """
    if "apx" not in emulator.features:
        raise LabInputError(f"{emulator.name} does not emulate APX: let the lab use its own QEMU")
    key = digest(emulator.digest, " ".join((*_SELFTEST_CFLAGS, *_SELFTEST_MACHINE)), _selftest_digest())

    def run(folder: Path) -> None:
        progress(f"self-test of APX on {emulator.name}")
        output = _run_selftest(emulator, _build_selftest(folder))
        (folder / "output").write_text(output)

    output = (cached("apx-selftest", key, run) / "output").read_text()
    summary = _SUMMARY.search(output)
    assert summary is not None
    return SelfTest(int(summary[1], 16), int(summary[2], 16), output)


def _selftest_digest() -> str:
    files = [path for path in _SELFTEST.glob("*") if path.is_file()]
    if not files:
        raise LabError(f"{_SELFTEST} is missing: run kvm-harness from a whole checkout of the project")
    return digest_tree(_SELFTEST, files)


def _build_selftest(folder: Path) -> Path:
    objects = []
    for source in sorted((*_SELFTEST.glob("*.c"), *_SELFTEST.glob("*.S"))):
        target = folder / f"{source.name}.o"
        compiler = ("cc", *_SELFTEST_CFLAGS, "-c") if source.suffix == ".c" else ("as", "--64", "-I", str(_SELFTEST))
        _tool(*compiler, str(source), "-o", str(target))
        objects.append(str(target))
    elf, image = folder / "selftest.elf", folder / "selftest.bin"
    script = str(_SELFTEST / "selftest.ld")
    _tool("ld", "-m", "elf_x86_64", "-z", "noexecstack", "-T", script, "-o", str(elf), *objects)
    _tool("objcopy", "-O", "binary", str(elf), str(image))
    return image


def _tool(*command: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise LabError(f"{command[0]} is not on this machine: sh ci/packages.sh") from error
    if done.returncode:
        raise LabError(f"the self-test of the emulator does not build: {' '.join(command)}:\n{done.stderr.strip()}")


def _run_selftest(emulator: Emulator, image: Path) -> str:
    command = [*emulator.command, *_SELFTEST_MACHINE, "-kernel", str(image)]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False,
            timeout=_SELFTEST_LIMIT,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise LabError(f"the self-test on {emulator.name} did not end in {_SELFTEST_LIMIT:g} s") from error
    if not _SUMMARY.search(done.stdout):
        last = "\n".join((done.stdout + done.stderr).splitlines()[-5:])
        raise LabError(f"the self-test on {emulator.name} broke off (status {done.returncode}):\n{last}")
    return done.stdout
