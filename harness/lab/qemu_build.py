"""How the lab's QEMU is built: source, patches, compiler, firmware. ``harness/lab/hardware.py`` asks for the result."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.parse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, TextIO

from harness.lab.cache import Progress, area, cached, digest, digest_tree
from harness.lab.debian import FetchError, fetch_package, mirror, unpack
from harness.lab.errors import LabError

RECIPE: Final = Path(__file__).resolve().parents[2] / "ci" / "qemu"
BINARY: Final = "qemu-system-x86_64"
RELEASE: Final = "10.0.2"

_TARBALL: Final = f"qemu_{RELEASE}+ds.orig.tar.xz"
_TARBALL_SHA256: Final = "0901da33844a331bf8b3602b9c1fbd178e60b737c8e3ade678255bd090c9b9f1"  # as signed in Sources
_TARBALL_SUITE: Final = "bookworm-backports"
_SEABIOS: Final = "1.16.2-1"  # in bookworm
_MESON: Final = "1.7.0"
_MESON_SHA256: Final = "ae3f12953045f3c7c60e27f2af1ad862f14dee125b4ed9bcb8a842a5080dbf85"

_CONFIGURE: Final = (
    "--target-list=x86_64-softmmu",
    "--without-default-features",
    "--without-default-devices",
    "--with-devices-x86_64=ci",
    "--enable-system",
    "--enable-tcg",
    "--enable-kvm",
    "--enable-attr",
    "--enable-cap-ng",
    "--enable-virtfs",
    "--enable-fdt=system",
    "--disable-user",
    "--disable-docs",
    "--disable-tools",
    "--disable-guest-agent",
    "--disable-install-blobs",
    "--disable-debug-info",
)
# Debian's tarball has neither the Python wheels nor the UEFI images that QEMU's build would use.
_EDITS: Final = (
    ("pythondeps.toml", r"^pycotap = .*\n", ""),
    ("meson.build", r"unpack_edk2_blobs = bzip2\.found\(\)", "unpack_edk2_blobs = false"),
)
_FIRMWARE: Final = ("bios-256k.bin", "bios-microvm.bin")  # of SeaBIOS
_OPTION_ROMS: Final = ("kvmvapic", "linuxboot", "linuxboot_dma", "multiboot", "multiboot_dma", "pvh")

_PROGRAMS: Final = {
    "cc": "gcc", "ld": "binutils", "make": "make", "ninja": "ninja-build", "patch": "patch", "pkg-config": "pkg-config",
    "tar": "tar", "xz": "xz-utils",
}  # fmt: skip
_HEADERS: Final = {"libfdt.h": "libfdt-dev", "cap-ng.h": "libcap-ng-dev", "zlib.h": "zlib1g-dev"}
_LOG_LINES: Final = 20
_REPORT_EVERY: Final = 10.0  # seconds
_APT_HELPER: Final = Path("/usr/lib/apt/apt-helper")


def recipe_digest() -> str:
    """Of everything that decides what is built, except the machine's compiler and libraries."""
    fixed = "\n".join((_TARBALL_SHA256, _SEABIOS, _MESON_SHA256, *_CONFIGURE, repr(_EDITS)))
    return digest(fixed, RECIPE / "ci.mak", digest_tree(RECIPE, patches()))


def patches() -> list[Path]:
    """The project's patches in their order. Raises LabError where the checkout has none."""
    found = sorted((RECIPE / "patches").glob("*.patch"))
    if not found:
        raise LabError(f"{RECIPE / 'patches'} has no patches: run kvm-harness from a whole checkout of the project")
    return found


def build(entry: Path, key: str, progress: Progress) -> None:
    """Fill ``entry`` with the binary, ``firmware/``, ``build.log``. Raises LabError; then the log stays beside."""
    _require_tools()
    tarball = _source(progress)
    seabios = _seabios()  # before the long part: it may need the network
    work = entry / "work"
    source, build = work / "source", work / "build"
    source.mkdir(parents=True)
    build.mkdir()
    log_path = area("qemu") / f"{key}.log"
    with _log(log_path) as log:
        progress(f"unpacking {_TARBALL}")
        log.run("unpacking the source", "tar", "-C", source, "--strip-components=1", "-xf", tarball)
        for patch in patches():
            log.run(f"applying {patch.name}", "patch", "--strip=1", "--fuzz=0", "--directory", source, "--input", patch)
        for name, pattern, replacement in _EDITS:
            _edit(source / name, pattern, replacement)
        shutil.copyfile(RECIPE / "ci.mak", source / "configs/devices/x86_64-softmmu/ci.mak")
        progress("configuring QEMU")
        python = _python_with_meson(work, log)
        log.run("configuring QEMU", source / "configure", f"--python={python}", *_CONFIGURE, cwd=build)
        _compile(build, log, progress)
        log.run("stripping the binary", "strip", "--strip-all", "-o", entry / BINARY, build / BINARY)
        _option_roms(source, work / "roms", log)
    firmware = entry / "firmware"
    firmware.mkdir()
    for path in (*(seabios / name for name in _FIRMWARE), *(work / "roms" / f"{name}.bin" for name in _OPTION_ROMS)):
        shutil.copyfile(path, firmware / path.name)
    shutil.rmtree(work)
    log_path.rename(entry / "build.log")
    progress(f"QEMU {RELEASE} is built")


def _require_tools() -> None:
    missing = [package for program, package in _PROGRAMS.items() if shutil.which(program) is None]
    if "gcc" not in missing:
        missing += [package for header, package in _HEADERS.items() if not _has_header(header)]
    if "pkg-config" not in missing and subprocess.run(["pkg-config", "--exists", "glib-2.0"], check=False).returncode:
        missing.append("libglib2.0-dev")
    if importlib.util.find_spec("ensurepip") is None:
        missing.append("python3-venv")
    if missing:
        raise LabError(
            f"building QEMU needs Debian packages that are not here: sh ci/packages.sh lab, or as root: "
            f"apt-get install {' '.join(missing)}"
        )


def _has_header(name: str) -> bool:
    return not subprocess.run(
        ["cc", "-E", "-o", os.devnull, "-"], input=f"#include <{name}>\n", text=True, capture_output=True, check=False
    ).returncode


def _source(progress: Progress) -> Path:
    """The tarball; fetched by apt's own downloader, so that the machine's proxy settings hold."""

    def fetch(folder: Path) -> None:
        progress(f"fetching {_TARBALL} (38 MiB)")
        try:
            uri = f"{mirror(_TARBALL_SUITE)}/pool/main/q/qemu/{urllib.parse.quote(_TARBALL)}"
        except FetchError as error:
            raise LabError(str(error)) from error
        _download(uri, folder / _TARBALL)

    path = cached("source", _TARBALL_SHA256, fetch) / _TARBALL
    try:
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise LabError(f"{path}: {error.strerror}: remove {path.parent} to have it fetched again") from error
    if found != _TARBALL_SHA256:
        raise LabError(f"{path} has SHA-256 {found}: it is damaged; remove {path.parent} to have it fetched again")
    return path


def _download(uri: str, target: Path) -> None:
    options = ("APT::Sandbox::User=root", "Acquire::Retries=2", "Acquire::http::Timeout=30")
    command = [str(_APT_HELPER), *(f"-o{option}" for option in options), "download-file"]
    environment = {**os.environ, "LC_ALL": "C"}
    try:
        done = subprocess.run(
            [*command, uri, str(target), f"SHA256:{_TARBALL_SHA256}"],
            env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
    except FileNotFoundError as error:
        raise LabError(f"{_APT_HELPER} is not on this machine: QEMU's source is fetched with Debian's apt") from error
    if done.returncode:
        said = done.stdout + done.stderr
        if "Hash Sum mismatch" in said or "unexpected size" in said:
            raise LabError(
                f"{uri} is not the file with SHA-256 {_TARBALL_SHA256}: not used. Look for a proxy or mirror that "
                "alters it, or set KVM_HARNESS_DEBIAN_MIRROR to another one"
            )
        problem = "; ".join(line for line in said.splitlines() if line.startswith("E:")) or said.strip()
        raise LabError(
            f"{uri} could not be fetched: {problem}\nThe cache does not have it either: check the network, set "
            f"KVM_HARNESS_CACHE to a cache that was filled before, or put {target.name} into "
            f"{area('source') / _TARBALL_SHA256}/"
        )
    if target.is_symlink():  # apt copies nothing that is on this machine already
        there = target.resolve()
        target.unlink()
        shutil.copyfile(there, target)


def _edit(path: Path, pattern: str, replacement: str) -> None:
    text, count = re.subn(pattern, replacement, path.read_text(), flags=re.MULTILINE)
    if not count:
        raise LabError(f"{path.name} of QEMU has no {pattern!r} to replace: the recipe does not fit this source")
    path.write_text(text)


def _python_with_meson(work: Path, log: _Log) -> Path:
    """An interpreter with the pinned meson, in an environment of its own: Debian 12's meson is too old."""
    venv = work / "venv"
    log.run("making a Python environment", sys.executable, "-m", "venv", venv)
    pip = (venv / "bin" / "python", "-m", "pip", "--disable-pip-version-check")
    requirement = work / "meson.txt"
    requirement.write_text(f"meson=={_MESON} --hash=sha256:{_MESON_SHA256}\n")

    def fetch(folder: Path) -> None:
        command = (*pip, "download", "--quiet", "--no-deps", "--require-hashes", "--dest", folder)
        log.run("fetching meson with pip (check the network and pip's settings)", *command, "-r", requirement)

    wheels = cached("source", _MESON_SHA256, fetch)
    log.run("installing meson", *pip, "install", "--quiet", "--no-index", "--find-links", wheels, f"meson=={_MESON}")
    return venv / "bin" / "python"


def _compile(build: Path, log: _Log, progress: Progress) -> None:
    progress("compiling QEMU (about four minutes on two cores)")
    last = time.monotonic()
    for line in log.lines("compiling QEMU", "ninja", BINARY, cwd=build):
        if (step := re.match(r"\[(\d+)/(\d+)\]", line)) and time.monotonic() - last >= _REPORT_EVERY:
            progress(f"compiling QEMU: {step[1]} of {step[2]}")
            last = time.monotonic()


def _seabios() -> Path:
    try:
        return unpack(fetch_package("seabios", "bookworm", version=_SEABIOS)) / "usr/share/seabios"
    except FetchError as error:
        raise LabError(f"the firmware of the emulator is missing: {error}") from error


def _option_roms(source: Path, work: Path, log: _Log) -> None:
    """The ROMs behind ``-kernel``. QEMU's own build leaves them out where the compiler has no 32-bit libraries."""
    work.mkdir()
    settings = {"TOPSRC_DIR": source, "CC": "cc", "OBJCOPY": "objcopy", "PYTHON": sys.executable}
    (work / "config.mak").write_text("".join(f"{name}={value}\n" for name, value in settings.items()))
    makefile = source / "pc-bios/optionrom/Makefile"
    log.run("building the option ROMs", "make", "-f", makefile, *(f"{name}.bin" for name in _OPTION_ROMS), cwd=work)


class _Log:
    """The build's log file, and the commands whose output goes there."""

    def __init__(self, file: TextIO, path: Path) -> None:
        self._file = file
        self._path = path

    def run(self, what: str, *command: str | Path, cwd: Path | None = None) -> None:
        """Run to its end; where it fails, LabError shows the log's last lines."""
        for _ in self.lines(what, *command, cwd=cwd):
            pass

    def lines(self, what: str, *command: str | Path, cwd: Path | None = None) -> Iterator[str]:
        """The same, and its output line by line."""
        self._file.write(f"$ {' '.join(map(str, command))}\n")
        tail: list[str] = []
        try:
            with _started(command, cwd) as process:
                assert process.stdout is not None
                for line in process.stdout:
                    self._file.write(line)
                    tail = [*tail[1 - _LOG_LINES :], line]
                    yield line
        except FileNotFoundError as error:
            raise LabError(f"{what}: {command[0]}: {error.strerror}: sh ci/packages.sh lab") from error
        if process.returncode:
            shown = "".join(tail).rstrip()
            raise LabError(f"{what} failed with status {process.returncode}:\n{shown}\nthe whole log: {self._path}")


@contextlib.contextmanager
def _log(path: Path) -> Iterator[_Log]:
    with open(path, "w", encoding="utf-8", errors="replace") as file:
        yield _Log(file, path)


@contextlib.contextmanager
def _started(command: Sequence[str | Path], cwd: Path | None) -> Iterator[subprocess.Popen[str]]:
    """A process that does not outlive us: it is told to end when we are left before it has."""
    # What the environment says to compilers is not in the recipe's digest.
    environment = {k: v for k, v in os.environ.items() if k not in {"CFLAGS", "CPPFLAGS", "LDFLAGS", "MAKEFLAGS"}}
    process = subprocess.Popen(
        list(map(str, command)), cwd=cwd, env={**environment, "LC_ALL": "C"}, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
    )  # fmt: skip
    try:
        yield process
        process.wait()
    finally:
        if process.poll() is None:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
        if process.poll() is None:
            process.kill()
            process.wait()
        assert process.stdout is not None
        process.stdout.close()
