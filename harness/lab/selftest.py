"""The self-test of an emulator's APX, a program on the bare machine. Where it fails, the hardware is broken."""

from __future__ import annotations

import contextlib
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from harness.lab.boot import CONSOLE, EMULATOR_LOG, Boot
from harness.lab.bootspec import BootSpec
from harness.lab.cache import Progress, cached, digest, digest_tree, quiet
from harness.lab.errors import LabError, LabInputError, LostError
from harness.lab.hardware import Emulator

SOURCES: Final = Path(__file__).resolve().parents[2] / "tests" / "lab" / "apx_selftest"

_CFLAGS: Final = (
    "-std=gnu11", "-O2", "-Wall", "-Wextra", "-ffreestanding", "-fno-pic", "-fno-pie", "-mcmodel=small",
    "-mno-red-zone", "-mgeneral-regs-only", "-fno-stack-protector", "-fcf-protection=none",
    "-fno-asynchronous-unwind-tables",
)  # fmt: skip
_CPU: Final = "max,+apxf,+xsavec,+xsaves"
_EXIT: Final = ("-device", "isa-debug-exit,iobase=0xf4,iosize=4")  # how the program ends the emulator
_LIMIT: Final = 120.0  # seconds; it takes about one
_SUMMARY: Final = re.compile(r"^passed (0x[0-9a-f]+) failed (0x[0-9a-f]+)$", re.MULTILINE)


@dataclass(frozen=True)
class SelfTest:
    """What an emulator's self-test found: counts of checks, and its whole output (``FAIL`` begins a failed check)."""

    passed: int
    failed: int
    output: str


def apx_selftest(emulator: Emulator, progress: Progress = quiet, sources: Path = SOURCES) -> SelfTest:
    """Run ``tests/lab/apx_selftest`` on the bare emulator, once for each emulator and version of the test.

    A failed check is the emulator's defect: nothing that a KVM shows on it about APX counts. Raises LabInputError where
    the emulator has no APX, LabError where the test cannot be built or does not come to its end.
    """
    if "apx" not in emulator.features:
        raise LabInputError(f"{emulator.name} does not emulate APX: let the lab use its own QEMU")
    files = [path for path in sources.glob("*") if path.is_file()]
    if not files:
        raise LabError(f"{sources} is missing: run kvm-harness from a whole checkout of the project")
    key = digest(emulator.digest, " ".join((*_CFLAGS, _CPU, *_EXIT)), digest_tree(sources, files))

    def run(folder: Path) -> None:
        progress(f"self-test of APX on {emulator.name}")
        (folder / "output").write_text(_run(emulator, _build(sources, folder), folder))

    output = (cached("apx-selftest", key, run) / "output").read_text()
    summary = _SUMMARY.search(output)
    assert summary is not None
    return SelfTest(int(summary[1], 16), int(summary[2], 16), output)


def _build(sources: Path, folder: Path) -> Path:
    objects = []
    for source in sorted((*sources.glob("*.c"), *sources.glob("*.S"))):
        target = folder / f"{source.name}.o"
        compiler = ("cc", *_CFLAGS, "-c") if source.suffix == ".c" else ("as", "--64", "-I", str(sources))
        _tool(*compiler, str(source), "-o", str(target))
        objects.append(str(target))
    elf, image = folder / "selftest.elf", folder / "selftest.bin"
    script = str(sources / "selftest.ld")
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


def _run(emulator: Emulator, image: Path, folder: Path) -> str:
    """What the program prints on the first serial port."""
    with Boot(BootSpec(emulator, image, cpu=_CPU, memory=64, options=_EXIT), folder) as boot:
        if boot.wait(_LIMIT) is None:
            raise LabError(f"the self-test on {emulator.name} did not end in {_LIMIT:g} s")
        lines: list[str] = []
        with contextlib.suppress(LostError):  # the status with which it ends the emulator is the program's own
            lines += (line.decode(errors="replace") for line in boot.lines(CONSOLE, 1.0))
    output = "".join(f"{line}\n" for line in lines)
    if not _SUMMARY.search(output):
        last = "\n".join((output + (folder / EMULATOR_LOG).read_text(errors="replace")).splitlines()[-5:])
        raise LabError(f"the self-test on {emulator.name} broke off ({boot.ending}):\n{last}")
    return output
