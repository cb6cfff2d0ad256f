"""Kernels of the lab's own, built from a source tree: `allnoconfig` plus ci/qemu/kernel.config, in the cache.

:func:`kernel_from_tree` is what most callers need: it gives the finished kernel, at once when the same content was
built before. :func:`workspace` is underneath: the private copy of a tree, locked, brought to a state, and built step by
step.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Final, Literal

from harness.lab.cache import Progress, cached, digest, quiet
from harness.lab.edits import Edit, Edited
from harness.lab.errors import LabError, LabInputError
from harness.lab.kernel import Kernel
from harness.lab.ksource import PrivateCopy, private_copy, release_of
from harness.words import counted

Variant = Literal["default", "debug"]

_CONFIGS: Final = Path(__file__).parents[2] / "ci" / "qemu"
_FRAGMENTS: Final[dict[Variant, tuple[str, ...]]] = {
    "default": ("kernel.config",),
    "debug": ("kernel.config", "kernel-debug.config"),
}
_COMMANDS: Final = {  # command: Debian's package
    "make": "make",
    "gcc": "gcc",
    "ld": "binutils",
    "flex": "flex",
    "bison": "bison",
    "bc": "bc",
    "lz4": "lz4",
}
_HEADERS: Final = {"libelf.h": "libelf-dev"}
# Same bytes from the same source, whoever builds it, when and where.
_REPRODUCIBLE: Final = {
    "KBUILD_BUILD_TIMESTAMP": "Thu Jan  1 00:00:00 UTC 1970",
    "KBUILD_BUILD_USER": "kvm-harness",
    "KBUILD_BUILD_HOST": "lab",
    "KBUILD_BUILD_VERSION": "1",
    "LANG": "C",  # the compiler's quotes as well: the kernel's Makefile takes LC_ALL away
    "LC_ALL": "C",
}
_RECIPE: Final = "2"  # part of every kernel's key: raise it when this module builds differently
_PROGRESS_EVERY: Final = 5.0  # seconds
_EXHAUSTED: Final = re.compile(
    r"^.*(No space left on device|Killed signal terminated|Disk quota exceeded).*$", re.MULTILINE
)
_LINE: Final = re.compile(
    r"(CONFIG_\w+)=(\S+)\s*"
    r"(?:#\s*(?:from (?P<first>\d+\.\d+)|before (?P<end>\d+\.\d+)|(?P<required>required)))?"
)


class BuildError(LabInputError):
    """The tree does not build. ``errors``: the compiler's first lines, paths as in the tree; ``log``: all it said."""

    def __init__(self, text: str, errors: tuple[str, ...], log: Path) -> None:
        super().__init__(text)
        self.errors = errors
        self.log = log


@dataclass(frozen=True)
class BuiltKernel:
    """A kernel from a tree. All but ``build`` are in the cache for good, next to each other."""

    kernel: Kernel
    vmlinux: Path  # with symbols, without debugging information
    layout: Path  # an object with nothing but DWARF: struct kvm_vcpu with all it holds, and enum kvm_reg
    config: Path
    log: Path
    build: Path  # the build directory; it holds the objects of whatever was built there last
    seconds: float  # what it took to build, when it was built
    missing: tuple[str, ...]  # lines of the configuration that the tree did not take
    already_there: tuple[str, ...]  # edits that the tree already contains
    kept: Path | None = None  # the folder of what was made of the objects


@dataclass(frozen=True)
class Keep:
    """Something to be made of the objects of a kernel, and kept in the cache: ``make(build directory, folder)``.

    ``kind`` is the cache's, ``version`` changes when ``make`` does.
    """

    kind: str
    version: str
    make: Callable[[Path, Path], None]


def kernel_from_tree(
    tree: Path,
    *,
    variant: Variant = "default",
    revision: str | None = None,
    edits: Sequence[Edit] = (),
    keep: Keep | None = None,
    progress: Progress = quiet,
    jobs: int | None = None,
) -> BuiltKernel:
    """Build the kernel of a source tree as it is now, uncommitted changes included, or of a git ``revision`` of it.

    The tree itself is only read. ``jobs`` defaults to the processors at hand. Raises BuildError when it does not
    compile, EditError when an edit does not fit, LabInputError for what is no kernel tree or missing tools, LabError.
    """
    with workspace(tree, variant=variant, progress=progress, jobs=jobs) as work:
        snapshot = work.copy.snapshot(revision)
        key = kernel_key(snapshot, variant, edits)
        fresh = False

        def make(folder: Path) -> None:
            nonlocal fresh
            _make_entry(work, snapshot, edits, folder)
            fresh = True

        def make_kept(folder: Path) -> None:
            assert keep is not None
            if not fresh:  # the kernel was built some time ago, the objects are gone
                work.checkout(snapshot, edits)
                work.make_image()
            keep.make(work.build, folder)

        entry = cached("kernels", key, make)
        kept = cached(keep.kind, digest(key, keep.version), make_kept) if keep is not None else None
    return replace(_from_entry(entry, key, work), kept=kept)


def kernel_key(snapshot: str, variant: Variant = "default", edits: Sequence[Edit] = ()) -> str:
    """Changes with all that decides what a kernel becomes: source, edits, configuration, tools."""
    fragments = [_CONFIGS / name for name in _FRAGMENTS[variant]]
    return digest(_RECIPE, snapshot, variant, *fragments, *(edit.digest for edit in edits), toolchain())


def _make_entry(work: Workspace, snapshot: str, edits: Sequence[Edit], folder: Path) -> None:
    started = time.monotonic()
    changed = work.checkout(snapshot, edits)
    work.make_image()
    for name in ("arch/x86/boot/bzImage", "vmlinux", "System.map", ".config"):
        shutil.copyfile(work.build / name, folder / Path(name).name.removeprefix("."))
    work.layout_object(folder / "kvm-layout.o")
    seconds = time.monotonic() - started
    shutil.copyfile(work.log, folder / "build.log")
    about = {
        "release": work.release,
        "series": "{}.{}".format(*release_of(work.copy.source)[1]),
        "seconds": seconds,
        "missing": work.missing(),
        "already there": changed.already_there,
        "edits": [edit.name for edit in edits],
    }
    (folder / "about.json").write_text(json.dumps(about, indent=1))


def _from_entry(entry: Path, key: str, work: Workspace) -> BuiltKernel:
    about = json.loads((entry / "about.json").read_text())
    for line in about["missing"]:
        work.progress(f"Linux {about['release']} did not take {line}: see {_CONFIGS / 'kernel.config'}")
    names = [work.copy.tree.name, *about["edits"], *([work.variant] if work.variant != "default" else [])]
    return BuiltKernel(
        kernel=Kernel(
            label=f"{about['release']} ({', '.join(names)})",
            release=about["release"],
            series=about["series"],
            image=entry / "vmlinux",
            initramfs=None,
            digest=key,
            has=frozenset(about["already there"]),
        ),
        vmlinux=entry / "vmlinux",
        layout=entry / "kvm-layout.o",
        config=entry / "config",
        log=entry / "build.log",
        build=work.build,
        seconds=about["seconds"],
        missing=tuple(about["missing"]),
        already_there=tuple(about["already there"]),
    )


# --- one tree, step by step ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def workspace(
    tree: Path, *, variant: Variant = "default", progress: Progress = quiet, jobs: int | None = None
) -> Iterator[Workspace]:
    """The private copy of ``tree`` and its build directory, locked: another process that wants it waits.

    Raises LabInputError when the tree is none, or when tools for building are missing.
    """
    _check_tools()
    copy = private_copy(tree)
    fd = os.open(copy.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress(f"{copy.tree}: another process builds it: waiting")
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield Workspace(copy, variant, progress, jobs or len(os.sched_getaffinity(0)), fd)
    finally:
        os.close(fd)


class Workspace:
    """Made by :func:`workspace`. ``copy``: the private tree; ``build``: objects, kept from one build to the next."""

    def __init__(self, copy: PrivateCopy, variant: Variant, progress: Progress, jobs: int, lock: int) -> None:
        self.copy = copy
        self.variant = variant
        self.progress = progress
        self.build = copy.folder / f"build-{variant}"
        self.log = copy.folder / f"build-{variant}.log"
        self._jobs = jobs
        self._lock = lock
        self._configured = copy.folder / f"configured-{variant}"

    def checkout(self, snapshot: str, edits: Sequence[Edit] = ()) -> Edited:
        """Bring copy and configuration to a state that ``copy.snapshot()`` named, with edits. Raises EditError."""
        self.progress(f"{self.copy.tree.name}: bringing the private copy up to date")
        changed = self.copy.checkout(snapshot, edits)
        self.log.write_bytes(b"")
        wanted = self._wanted()
        state = digest(snapshot, toolchain(), *(f"{symbol}={value}" for symbol, value, _ in wanted))
        kconfig = any("Kconfig" in name for name in changed.texts)
        if kconfig or not self._configured.is_file() or self._configured.read_text() != state:
            self._configured.unlink(missing_ok=True)
            self._configure(wanted)
            self._configured.write_text(state)
        return changed

    def make_image(self) -> Path:
        """Build the whole kernel; the path of what an emulator boots. Raises BuildError, LabError."""
        if not (self.build / "vmlinux").exists():
            self.progress(f"{self.copy.tree.name}: its first build here, which compiles all of it")
        self.make("bzImage")
        return self.build / "vmlinux"

    @property
    def release(self) -> str:
        """What ``uname -r`` will say of the kernel that was built last."""
        return (self.build / "include" / "config" / "kernel.release").read_text().strip()

    def make(self, *targets: str) -> float:
        """Build ``targets`` of the tree's make, such as ``arch/x86/kvm/x86.o``; how long it took, in seconds.

        Raises BuildError, LabError.
        """
        started = time.monotonic()
        command = [*self._make_command(), f"-j{self._jobs}", *targets]
        with open(self.log, "ab") as log:
            offset = log.tell()
            process = subprocess.Popen(
                command,
                cwd=self.copy.source,
                env=_environment(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=(self._lock,),  # a compiler that outlives us keeps others out of its build directory
            )
            try:
                self._follow(process, log.write, targets)
            except BaseException:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGTERM)
                process.wait()
                raise
        if process.returncode:
            self._failed(self.log.read_bytes()[offset:].decode(errors="replace"))
        return time.monotonic() - started

    def missing(self) -> list[str]:
        """Lines of the configuration that this tree did not take."""
        return self._missing(self._wanted(), self.build / ".config")

    def layout_object(self, output: Path) -> None:
        """Compile nothing but the types of KVM's vCPU, with debugging information, with the flags that KVM had."""
        flags = _compile_flags((self.build / "arch" / "x86" / "kvm" / ".x86.o.cmd").read_text())
        code = "#include <linux/kvm_host.h>\nstruct kvm_vcpu *kvm_harness_vcpu;\nenum kvm_reg kvm_harness_reg;\n"
        done = subprocess.run(
            [*flags, "-g", "-x", "c", "-c", "-o", str(output), "-"],
            cwd=self.build,
            env=_environment(),
            input=code,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise LabError(f"the layout of KVM's registers cannot be compiled:\n{_first_lines(done.stderr)}")

    def _make_command(self) -> list[str]:
        compiler = ["CC=ccache gcc"] if shutil.which("ccache") else []
        return ["make", f"O={self.build}", *compiler]

    def _follow(self, process: subprocess.Popen[bytes], keep: object, targets: Sequence[str]) -> None:
        """Keep what make says, and tell from time to time how far it is."""
        assert process.stdout is not None
        assert callable(keep)
        compiled, told = 0, time.monotonic()
        for line in process.stdout:
            keep(line)
            compiled += line.startswith(b"  CC ") or line.startswith(b"  AS ")
            if time.monotonic() - told >= _PROGRESS_EVERY:
                told = time.monotonic()
                so_far = f"{counted(compiled, 'file')} compiled"
                self.progress(f"{self.copy.tree.name}: building {' '.join(targets)}: {so_far}")
        process.wait()

    def _failed(self, said: str) -> None:
        if match := _EXHAUSTED.search(said):
            raise LabError(
                f"the build of {self.copy.tree} ran out of {'memory' if 'Killed' in match[1] else 'space'}: "
                f"{match[0].strip()}: make room and run again"
            )
        errors = compile_errors(said, self.copy.source)
        shown = "\n".join(f"  {line}" for line in errors)
        raise BuildError(f"{self.copy.tree} does not build:\n{shown}\nall of it: {self.log}", errors, self.log)

    def _wanted(self) -> list[tuple[str, str, bool]]:
        series = release_of(self.copy.source)[1]
        lines = [line for name in _FRAGMENTS[self.variant] for line in (_CONFIGS / name).read_text().splitlines()]
        return wanted_symbols(lines, series)

    def _configure(self, wanted: Sequence[tuple[str, str, bool]]) -> None:
        self.build.mkdir(exist_ok=True)
        mini, fresh = self.build / "lab.config", self.build / "lab.new"
        mini.write_text("".join(f"{symbol}={value}\n" for symbol, value, _ in wanted))
        fresh.unlink(missing_ok=True)
        done = subprocess.run(
            [*self._make_command(), "-s", f"KCONFIG_ALLCONFIG={mini}", f"KCONFIG_CONFIG={fresh}", "allnoconfig"],
            cwd=self.copy.source,
            env=_environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        with open(self.log, "a") as log:
            log.write(done.stdout + done.stderr)
        if done.returncode:
            self._failed(done.stdout + done.stderr)
        vital = {f"{symbol}={value}" for symbol, value, required in wanted if required}
        if lost := [line for line in self._missing(wanted, fresh) if line in vital]:
            raise LabInputError(
                f"{self.copy.tree} does not take {', '.join(lost)}, and without it a kernel cannot run the suite: if "
                f"this Linux has renamed it, add the new name to {_CONFIGS / 'kernel.config'}"
            )
        # Only a configuration that differs may have a new time stamp: make looks at it.
        current = self.build / ".config"
        if not current.is_file() or current.read_bytes() != fresh.read_bytes():
            fresh.replace(current)
        else:
            fresh.unlink()

    @staticmethod
    def _missing(wanted: Sequence[tuple[str, str, bool]], config: Path) -> list[str]:
        got = dict(re.findall(r"^(CONFIG_\w+)=(.*)$", config.read_text(), re.MULTILINE))
        return [f"{symbol}={value}" for symbol, value, _ in wanted if got.get(symbol, "n") != value]


# --- parts that need no tree -----------------------------------------------------------------------------------------


def wanted_symbols(lines: Sequence[str], series: tuple[int, int]) -> list[tuple[str, str, bool]]:
    """(symbol, value, required) of a fragment's lines that are meant for a Linux series, the last one of each symbol.

    Raises LabError for a line that is none: the fragments are the harness's own.
    """
    found: dict[str, tuple[str, str, bool]] = {}
    for line in lines:
        if not line.strip() or line.startswith("#"):
            continue
        match = _LINE.fullmatch(line.rstrip())
        if match is None:
            raise LabError(f"a kernel configuration fragment has a line that is none: {line!r}")
        if match["first"] and series < _version(match["first"]):
            continue
        if match["end"] and series >= _version(match["end"]):
            continue
        found[match[1]] = match[1], match[2], match["required"] is not None
    return list(found.values())


def compile_errors(said: str, source: Path, limit: int = 8) -> tuple[str, ...]:
    """The first errors in make's output, one line each, paths relative to the source."""
    patterns = (
        r"^\S+?:\d+(?::\d+)?: (?:fatal )?error: .*$",
        r"^.*(?:undefined reference to|multiple definition of|modpost: ERROR|ERROR: modpost).*$",
        r"^.*(?:: error:|: warning: objtool:|syntax error|\*\*\* ).*$",
    )
    for pattern in patterns:
        if found := re.findall(pattern, said, re.MULTILINE):
            lines = dict.fromkeys(line.replace(f"{source}/", "").replace("../source/", "") for line in found)
            return tuple(lines)[:limit]
    return tuple(line for line in said.splitlines() if line.strip())[-limit:]


@cache
def toolchain() -> str:
    """What compiles: part of every kernel's key."""
    return "\n".join(
        subprocess.run([tool, "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]
        for tool in ("gcc", "ld")
    )


def _check_tools() -> None:
    packages = [package for command, package in _COMMANDS.items() if shutil.which(command) is None]
    if "gcc" not in packages:
        for header, package in _HEADERS.items():
            probe = ["gcc", "-fsyntax-only", "-include", header, "-x", "c", os.devnull]
            if subprocess.run(probe, capture_output=True, check=False).returncode:
                packages.append(package)
    if packages:
        raise LabInputError(f"building a kernel needs packages that are not here: apt-get install {' '.join(packages)}")


def _environment() -> dict[str, str]:
    """The user's environment without what would change the build behind our back."""
    ours = ("KBUILD_", "KCONFIG_", "KCFLAGS", "KCPPFLAGS", "MAKE", "MFLAGS", "LC_", "LANGUAGE")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    for name in ("ARCH", "CROSS_COMPILE", "LLVM", "CC", "O", "V", "W", "LOCALVERSION", "GNUMAKEFLAGS"):
        kept.pop(name, None)
    return kept | _REPRODUCIBLE


def _compile_flags(cmd: str) -> list[str]:
    """The compiler call in a `.cmd` file of kbuild, without input, output, dependency file and warnings as errors."""
    match = re.match(r"(?:saved)?cmd_\S+ := (.*)", cmd)
    if match is None:
        raise LabError("kbuild's record of how x86.o was compiled cannot be read: build from scratch")
    words = shlex.split(re.split(r"\s(?:;|&&)\s", match[1])[0])
    end = words.index("-c")
    return [word for word in words[:end] if not word.startswith(("-Wp,-MMD", "-Werror"))]


def _version(text: str) -> tuple[int, int]:
    major, minor = text.split(".")
    return int(major), int(minor)


def _first_lines(text: str) -> str:
    return "\n".join(text.strip().splitlines()[:8])
