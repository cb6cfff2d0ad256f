"""Upstream's tests on the kernel under test: its KVM selftests, and kvm-unit-tests in a QEMU inside the image.

Both come prebuilt, as folders. A machine is told what to run, test by test, over one channel: it says how each ended
and the end of what it printed. One that dies or falls silent had the running test; the rest goes to a fresh one.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import tomllib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final

from elftools.common.exceptions import ELFError
from elftools.elf.elffile import ELFFile

from harness.lab import wire
from harness.lab.boot import CONSOLE_LOG, Boot
from harness.lab.cache import Progress, quiet
from harness.lab.conversation import GREETING_LIMIT
from harness.lab.errors import LabError, LabInputError, LostError
from harness.lab.hardware import Emulator
from harness.lab.image import payload
from harness.lab.session import Cell
from harness.lab.splat import find_splats
from harness.selection import matcher
from harness.words import counted

SELFTESTS: Final = "selftests"
UNIT_TESTS: Final = "unit-tests"
FILE: Final = Path(__file__).resolve().parents[2] / "ci" / "qemu" / "peers.toml"

_MEMORY: Final = 2048  # MiB of the machine: some selftests want hundreds
_SMP: Final = 2
_GRACE: Final = 30.0  # seconds beyond its limit after which a test's silence is the machine's
_BOOTS: Final = 8
_SELFTEST_LIMIT: Final = 120  # seconds: kselftest's `settings`
_UNIT_LIMIT: Final = 90  # seconds: kvm-unit-tests' own
_SKIP: Final = 4  # exit status (tools/testing/selftests/kselftest.h)
_TIMEOUT: Final = (124, 137)  # of coreutils' timeout: ended at its TERM, at its KILL
_UNIT_STATUS: Final = {1: "pass", 77 << 1 | 1: "skip"}  # isa-debug-exit: what the test writes, doubled, plus one
_REPORT: Final = re.compile(r"^(PASS|FAIL|SKIP|XFAIL|XPASS): ", re.MULTILINE)

_START: Final = rb"""#!/bin/sh
# Runs what arrives on the channel: a line is "LIMIT COMMAND". Answers with the end of its output and its status.
for name in /sys/class/virtio-ports/*/name; do
    read -r port < "$name"
    [ "$port" = CHANNEL ] && port=${name%/name} && exec 3<> "/dev/${port##*/}"
done
ulimit -n 8192
mkdir -p /dev/shm && busybox mount -t tmpfs shm /dev/shm  # where sem_open() makes semaphores
cd /payload
echo ready >&3
while read -r limit command <&3 && [ "$limit" != end ]; do
    read -r before _ < /proc/uptime
    timeout -k 5 "$limit" sh -c "$command" > /tmp/output 2>&1 < /dev/null 3<&-
    status=$?
    read -r after _ < /proc/uptime
    # Counted here, for only the end of a long output is sent.
    counts=$(for word in PASS FAIL SKIP; do busybox grep -c "^$word: " /tmp/output; done)
    tail -c 3000 /tmp/output | tr -d '\000\r' | busybox sed 's/^/| /; $a\' >&3
    echo 1 > /sys/kernel/debug/clear_warn_once
    echo "ended $status $before $after" $counts >&3
done 2> /dev/null
"""
_QEMU: Final = (
    "lib/ld-linux-x86-64.so.2 --library-path lib qemu/{binary} -L qemu/firmware -nodefaults -no-reboot -display none "
    "-machine accel=kvm -serial stdio -device pc-testdev -device isa-debug-exit,iobase=0xf4,iosize=0x4"
)
"""As x86/run of kvm-unit-tests starts it."""


@dataclass(frozen=True)
class PeerTest:
    """A test of a suite. ``command`` runs in the payload, ``limit`` is in seconds; ``skip``: why it is not run."""

    suite: str
    name: str
    command: str = ""
    limit: int = _SELFTEST_LIMIT
    skip: str = ""


@dataclass(frozen=True)
class PeerResult:
    """What a test came to: ``outcome`` is pass, skip, fail, timeout, splat or lost.

    ``checks``: (passed, failed, skipped) as a unit test counts its own. ``said``: the end of its output, or what the
    kernel said. ``known``: why it is expected to fail here.
    """

    test: PeerTest
    outcome: str
    seconds: float = 0.0
    checks: tuple[int, int, int] = (0, 0, 0)
    said: str = ""
    known: str = ""

    @property
    def status(self) -> int:
        """The exit status of this one alone."""
        if self.outcome == "lost":
            return LostError.status
        return 1 if self.outcome in ("fail", "timeout", "splat") and not self.known else 0

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return {
            "suite": self.test.suite, "test": self.test.name, "outcome": self.outcome,
            "seconds": round(self.seconds, 2), "checks": list(self.checks), "known": self.known, "said": self.said,
        }  # fmt: skip


# --- what there is to run --------------------------------------------------------------------------------------------


def selftests(folder: Path) -> dict[PeerTest, Path]:
    """The programs below a folder of built KVM selftests. LabInputError when there are none, or one needs libraries."""
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and os.access(p, os.X_OK)):
        with path.open("rb") as file:
            if file.read(4) != b"\x7fELF":
                continue
            try:
                elf = ELFFile(file)
                if elf["e_type"] == "ET_REL":
                    continue
                dynamic = any(part["p_type"] == "PT_INTERP" for part in elf.iter_segments())
            except ELFError as error:
                raise LabInputError(f"{path}: {error}: build the selftests again") from error
        if dynamic:
            raise LabInputError(f"{path} needs shared libraries: build the selftests with LDFLAGS='-static -pthread'")
        name = str(path.relative_to(folder))
        found[PeerTest(SELFTESTS, name, f"./selftests/{name}")] = path
    if not found:
        raise LabInputError(f"{folder} holds no built selftests: give the output folder of tools/testing/selftests/kvm")
    return found


def unit_tests(folder: Path) -> dict[PeerTest, Path | None]:
    """What x86/unittests.cfg below a built kvm-unit-tests lists. LabInputError when it is not there."""
    config = next((p for p in (folder / "x86" / "unittests.cfg", folder / "unittests.cfg") if p.is_file()), None)
    if config is None:
        raise LabInputError(f"{folder} is no built kvm-unit-tests: it has no x86/unittests.cfg")
    found: dict[PeerTest, Path | None] = {}
    for name, keys in _sections(config.read_text()):
        test, file = _unit_test(name, keys, config.parent)
        found[test] = file
    if not any(found.values()):
        raise LabInputError(f"{config} lists no test that is built: run make there")
    return found


def _sections(text: str) -> Iterator[tuple[str, dict[str, str]]]:
    """[NAME] and its KEY = VALUE lines; a value may go on over lines between triple quotes."""
    text = re.sub(r'"""(.*?)"""', lambda m: " ".join(m[1].split()), text, flags=re.DOTALL)
    for part in re.split(r"^\[", text, flags=re.MULTILINE)[1:]:
        name, _, body = part.partition("]")
        yield name, {k: v.strip() for k, v in re.findall(r"^([a-z_]+)\s*=[ \t]*(.*)$", body, re.MULTILINE)}


def _unit_test(name: str, keys: dict[str, str], folder: Path) -> tuple[PeerTest, Path | None]:
    file = folder / keys.get("file", "")
    skip = ""
    if keys.get("arch", "x86_64") != "x86_64":
        skip = f"for {keys['arch']}"
    elif keys.get("accel", "kvm") != "kvm":
        skip = f"for {keys['accel']}"
    elif "nodefault" in keys.get("groups", "").split():
        skip = "not run by default"
    elif not file.is_file():
        skip = f"{keys.get('file', 'its file')} is not built"
    extra = keys.get("extra_params") or keys.get("qemu_params", "")
    words = [_QEMU, "-smp", keys.get("smp", "1").replace("$MAX_SMP", str(_SMP)), "-kernel", f"units/{file.name}"]
    if arguments := keys.get("test_args", ""):
        words += ["-append", f"'{arguments.strip(chr(39))}'"]
    command = " ".join([*words, extra])
    for check in keys.get("check", "").split():
        where, _, value = check.partition("=")
        command = f'[ "$(cat {where} 2> /dev/null)" = "{value}" ] || exit {77 << 1 | 1}; {command}'
    limit = keys.get("timeout", "").rstrip("s")
    test = PeerTest(UNIT_TESTS, name, command, int(limit) if limit.isdigit() and int(limit) else _UNIT_LIMIT, skip)
    return test, None if skip else file


def _emulator_files(emulator: Emulator) -> dict[str, Path | bytes]:
    """An emulator with all that it needs of this machine, whatever the image has."""
    if "kvm" not in emulator.features:
        raise LabInputError(f"{emulator.name} cannot use KVM, so it cannot run kvm-unit-tests inside")
    done = subprocess.run(["ldd", str(emulator.binary)], capture_output=True, text=True, check=False)
    libraries = [Path(path) for path in re.findall(r"(/\S+) \(0x", done.stdout)]
    if done.returncode or not libraries:
        raise LabError(f"ldd {emulator.binary}: {done.stderr.strip() or 'not linked dynamically'}")
    files: dict[str, Path | bytes] = {f"lib/{path.name}": path for path in libraries}
    files["qemu/" + emulator.binary.name] = emulator.binary
    if emulator.firmware is not None:
        files |= {f"qemu/firmware/{p.name}": p for p in emulator.firmware.iterdir() if p.is_file()}
    return files


# --- running them ----------------------------------------------------------------------------------------------------


class Peers:
    """Runs tests of upstream's suites on a cell; each boot leaves its console in a folder under ``folder``."""

    def __init__(self, cell: Cell, folder: Path, progress: Progress = quiet) -> None:
        self.cell, self.folder, self._progress = cell, folder, progress
        self._tests: list[PeerTest] = []
        self._files: dict[str, Path | bytes] = {"start": _START.replace(b"CHANNEL", wire.CHANNEL.encode())}

    def add_selftests(self, folder: Path) -> None:
        """Take in built selftests. LabInputError."""
        for test, path in selftests(folder).items():
            self._tests.append(test)
            self._files[f"selftests/{test.name}"] = path

    def add_unit_tests(self, folder: Path) -> None:
        """Take in built kvm-unit-tests. LabInputError."""
        self._files |= _emulator_files(self.cell.emulator)
        qemu = _QEMU.format(binary=self.cell.emulator.binary.name)
        for test, path in unit_tests(folder).items():
            self._tests.append(replace(test, command=test.command.replace(_QEMU, qemu)))
            if path is not None:
                self._files[f"units/{path.name}"] = path

    def select(self, expression: str) -> None:
        """Keep the tests whose name matches. LabInputError when none does."""
        selects = matcher(expression)
        self._tests = [test for test in self._tests if selects(test.name)]
        if not self._tests:
            raise LabInputError(f"no test matches -k {expression!r}")

    def only(self, names: Sequence[Sequence[str]]) -> None:
        """Keep the tests with these (suite, name), in this order."""
        by_name = {(test.suite, test.name): test for test in self._tests}
        self._tests = [by_name[suite, name] for suite, name in names if (suite, name) in by_name]

    def limit(self, seconds: Callable[[str], int]) -> None:
        """Give no test more than ``seconds`` says of its name."""
        self._tests = [replace(test, limit=min(test.limit, seconds(test.name))) for test in self._tests]

    def __len__(self) -> int:
        return len(self._tests)

    def run(self) -> Iterator[PeerResult]:
        """Each test's result as it comes. LostError when machines are lost over and over, or before the first test."""
        disk = payload(self._files, self._progress)
        todo = [test for test in self._tests if not test.skip]
        yield from (PeerResult(test, "skip", said=test.skip) for test in self._tests if test.skip)
        for number in range(1, _BOOTS + 1):
            if not todo:
                return
            spec = replace(self.cell.spec([disk]), memory=_MEMORY, smp=_SMP)
            with Boot(spec, self.folder / f"boot-{number}", self._progress) as boot:
                for result in self._serve(boot, todo):
                    del todo[0]
                    yield result
        if todo:
            raise LostError(f"{self.cell.name}: {_BOOTS} machines were lost; given up. Consoles: {self.folder}")

    def _serve(self, boot: Boot, todo: Sequence[PeerTest]) -> Iterator[PeerResult]:
        """One boot: tests in their order, until they are through or the machine is lost with one of them."""
        log = boot.folder / CONSOLE_LOG
        try:
            ready = next(boot.lines(wire.CHANNEL, GREETING_LIMIT), b"")
        except TimeoutError:
            ready = b""
        if ready != b"ready":
            raise LostError(f"{self.cell.name}: {boot.ending or 'silence'} before the first test; console: {log}")
        for test in list(todo):
            before = log.stat().st_size
            try:
                boot.send(wire.CHANNEL, f"{test.limit} {test.command}\n".encode())
                result = _answer(test, boot)
            except (LostError, TimeoutError) as error:
                boot.kill()
                yield _blamed(test, log.read_bytes()[before:], error)
                return
            splats = find_splats(log.read_bytes()[before:].decode(errors="replace"))
            yield replace(result, outcome="splat", said=splats[0].title) if splats else result
        boot.send(wire.CHANNEL, b"end\n")
        boot.wait(10.0)


def _answer(test: PeerTest, boot: Boot) -> PeerResult:
    """What a test printed, and how it ended."""
    said: list[str] = []
    for line in boot.lines(wire.CHANNEL, test.limit + _GRACE):
        text = line.decode(errors="replace")
        if not text.startswith("ended "):
            said.append(text.removeprefix("| "))
            continue
        status, before, after, *counts = text.split()[1:]
        passed, failed, skipped = (int(n) for n in counts)
        outcome = _outcome(test, int(status))
        output = "\n".join(said).strip()
        return PeerResult(test, outcome, float(after) - float(before), (passed, failed, skipped), output)
    raise LostError(str(boot.wait(5.0) or "the machine closed its channel"))


def _outcome(test: PeerTest, status: int) -> str:
    if status in _TIMEOUT:
        return "timeout"
    if test.suite == UNIT_TESTS:
        return _UNIT_STATUS.get(status, "fail")
    return "pass" if status == 0 else "skip" if status == _SKIP else "fail"


def _blamed(test: PeerTest, log: bytes, error: Exception) -> PeerResult:
    """The machine ended, or fell silent, in this test: the kernel's defect when its log says so."""
    splats = find_splats(log.decode(errors="replace"))
    if splats:
        return PeerResult(test, "splat", said=splats[0].title)
    if isinstance(error, TimeoutError):
        return PeerResult(test, "splat", said=f"the machine fell silent: {error}")
    return PeerResult(test, "lost", said=str(error).splitlines()[0])


# --- what is known, and the table ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class KnownFailure:
    """A test that is expected to fail here, and why. ``test`` is a pattern."""

    suite: str
    test: str
    why: str


def load_known_failures(path: Path = FILE) -> tuple[KnownFailure, ...]:
    """Read ci/qemu/peers.toml. LabError says what is wrong with it."""
    try:
        return tuple(KnownFailure(**row) for row in tomllib.loads(path.read_text()).get("failure", []))
    except (OSError, tomllib.TOMLDecodeError, TypeError) as error:
        raise LabError(f"{path}: {error}") from error


def explained(result: PeerResult, known: Iterable[KnownFailure]) -> PeerResult:
    """``result``, with the reason where its failure is expected."""
    if result.outcome not in ("fail", "timeout"):
        return result
    for row in known:
        if row.suite == result.test.suite and fnmatchcase(result.test.name, row.test):
            return replace(result, known=row.why)
    return result


def table(results: Sequence[PeerResult]) -> list[str]:
    """One line a test, and the sums."""
    width = max((len(r.test.name) for r in results), default=0)
    lines = [f"{'suite':<11} {'test':<{width}}  result   time     what else"]
    for r in results:
        checks = "" if not any(r.checks) else f"{r.checks[0]} of {counted(sum(r.checks[:2]), 'check')} pass"
        told = r.known or (_last_words(r.said) if r.outcome != "pass" else "")
        row = f"{r.test.suite:<11} {r.test.name:<{width}}  {r.outcome:<8} {r.seconds:5.1f} s  "
        lines.append((row + "; ".join(t for t in (checks, told) if t)).rstrip())
    for suite in (SELFTESTS, UNIT_TESTS):
        mine = [r for r in results if r.test.suite == suite]
        if not mine:
            continue
        count = Counter(r.outcome for r in mine)
        told = ", ".join(f"{count[o]} {o}" for o in ("pass", "skip", "fail", "timeout", "splat", "lost") if count[o])
        known = sum(bool(r.known) for r in mine)
        total = sum(sum(r.checks) for r in mine)
        lines.append(
            f"{suite}: {counted(len(mine), 'test')} in {sum(r.seconds for r in mine):.0f} s: {told}"
            + (f" ({known} of them expected: {FILE.name})" if known else "")
            + (f"; {counted(total, 'check')}" if total else "")
        )
    return lines


def run_peers(
    cells: Sequence[Cell], selftests: Path | None, units: Path | None, out: Path, select: str | None, say: Progress
) -> int:
    """Run upstream's tests on each cell: a table for people and one for programs in ``out``; the exit status."""
    known = load_known_failures()
    status = 0
    for cell in cells:
        folder = out if len(cells) == 1 else out / f"{cell.configuration.name}-{cell.kernel.series}"
        peers = Peers(cell, folder, say)
        if selftests is not None:
            peers.add_selftests(selftests)
        if units is not None:
            peers.add_unit_tests(units)
        peers.select(select or "")
        results: list[PeerResult] = []
        problem = ""
        try:
            for result in peers.run():
                results.append(explained(result, known))
                say(f"{len(results)}/{len(peers)} {result.test.name}: {result.outcome}, {result.seconds:.1f} s")
        except LostError as error:
            problem = str(error)
        lines = [f"{cell.name}: {cell.kernel.label}, {cell.emulator.name} ({cell.accel})", *table(results)]
        lines += [f"lost: {problem}"] if problem else []
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "peers.txt").write_text("".join(f"{line}\n" for line in lines))
        (folder / "peers.json").write_text(json.dumps([r.to_json() for r in results], indent=1))
        for line in lines:
            say(line)
        statuses = {status, LostError.status if problem else 0, *(r.status for r in results)}
        status = 1 if 1 in statuses else max(statuses)
    say(f"results: {out}")
    return status


def _last_words(said: str) -> str:
    """One line of an output that says most: why a test was skipped or what it asserted, else its last."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    with contextlib.suppress(StopIteration):
        return next(line for line in lines if re.search(r"SKIP|Assert|requirement|FAIL|not supported", line))[:100]
    return lines[-1][:100] if lines else ""
