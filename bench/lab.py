"""What the lab costs: each figure beside a C program, or the bare command, in the same run.

``make bench-lab``, or ``python bench/lab.py [--kernels own,7.3] [--repeats N] [--no-rebuild] [--json]``. ``own`` is a
kernel built from Debian's newest source (the first time takes some minutes). The C side is bench/loop.c, linked
statically, as the payload of the same machine. A figure is the median of its repeats. Exit status 1 when a target is
missed, 4 when the lab fails.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Final

from harness import kvm_ioctl as k
from harness.lab.boot import CONSOLE, Boot
from harness.lab.cache import quiet
from harness.lab.cli import SOURCE_SERIES
from harness.lab.configurations import configuration
from harness.lab.errors import LabError
from harness.lab.hardware import pinned_qemu
from harness.lab.image import base_image, payload
from harness.lab.kbuild import kernel_from_tree, workspace
from harness.lab.kernel import Kernel, debian_kernel
from harness.lab.ksource import debian_source
from harness.lab.plan import Plan, read_plan, write_plan
from harness.lab.planner import cell_plan
from harness.lab.profile import Profile, load_profile
from harness.lab.run import Options, run_cell
from harness.lab.session import Cell, CellRun

LOOP_C: Final = Path(__file__).with_name("loop.c")
OWN: Final = "own"
TOUCHED: Final = "arch/x86/kvm/emulate.c"
FIRST_EXIT_TARGET: Final = 4.0  # seconds
SUITE_TARGET: Final = 30.0  # seconds
CHECKS_TARGET: Final = 1500.0  # a second
_LOOPS: Final = 20_000
_SEQUENCES: Final[dict[str, tuple[str, tuple[int, ...]]]] = {
    "SET_REGS KVM_RUN GET_REGS": ("", (k.KVM_SET_REGS, k.KVM_RUN, k.KVM_GET_REGS)),
    "[regs by kvm_run] KVM_RUN": (f"-d {k.KVM_SYNC_X86_REGS} -v {k.KVM_SYNC_X86_REGS}", (k.KVM_RUN,)),
}  # for bench/loop.c: its options, the requests


@dataclass(frozen=True)
class Figure:
    """One line. ``beside``: what it is compared with, and its figure. ``met``: whether a target was reached."""

    name: str
    value: float
    unit: str
    beside: str = ""
    target: str = ""
    met: bool | None = None

    def __str__(self) -> str:
        number = f"{self.value:,.0f}" if self.value >= 100 else f"{self.value:.1f}"
        text = f"  {self.name:<62}{number:>9} {self.unit}"
        text += f"   beside {self.beside}" if self.beside else ""
        return text + (f"   (target {self.target}: {'met' if self.met else 'MISSED'})" if self.target else "")


def say(text: str) -> None:
    """Progress, apart from the figures."""
    print(f"  .. {text}", file=sys.stderr, flush=True)


def build_loop(folder: Path) -> Path:
    """bench/loop.c for an image that has other libraries than this machine."""
    out = folder / "loop"
    subprocess.run(["gcc", "-O2", "-Wall", "-static", "-o", str(out), str(LOOP_C)], check=True)
    return out


@contextmanager
def c_machine(cell: Cell, loop: Path, folder: Path, commands: Sequence[str]) -> Iterator[Boot]:
    """A machine whose payload runs loop.c with each of these arguments; it prints a line for each."""
    start = "#!/bin/sh\n" + "".join(f"/payload/loop {words}\n" for words in commands)
    disk = payload({"start": start.encode(), "loop": loop})
    with Boot(cell.spec([disk]), folder) as boot:
        yield boot


def numbers(boot: Boot) -> Iterator[tuple[float, int]]:
    """(seconds since the emulator was started, number) of each line of the console that is a number."""
    rest = b""
    for arrival in boot.arrivals(120.0):
        if arrival.channel == CONSOLE:
            *lines, rest = (rest + arrival.data).split(b"\n")
            yield from ((arrival.seconds, int(line)) for line in lines if line.strip().isdigit())


# --- from the start of the emulator to the first exit ---------------------------------------------------------------


def first_exit(cell: Cell, plan: Plan, profile: Profile, folder: Path) -> float:
    """Seconds until the first finished Case is here."""
    run = CellRun(cell, plan, profile, folder, lambda *_: None, machines=1)
    run.run([0])
    return run.tally.first_result


def c_first_exit(cell: Cell, loop: Path, folder: Path) -> float:
    """Seconds until a C program has said that its guest came to an exit."""
    with c_machine(cell, loop, folder, [f"1 {k.KVM_RUN:#x}"]) as boot:
        return next(seconds for seconds, _ in numbers(boot))


def first_exit_figures(cells: Sequence[Cell], loop: Path, folder: Path, repeats: int) -> Iterator[Figure]:
    """Each kernel."""
    for cell in cells:
        profile = profile_of(cell)
        cases, _ = cell_plan(cell.configuration, profile, "smoke", say).planned(0)
        write_plan(folder / "one", "bench", [cases])
        plan = read_plan(folder / "one")
        pairs = [
            (first_exit(cell, plan, profile, folder / f"r{n}"), c_first_exit(cell, loop, folder / f"c{n}"))
            for n in range(repeats)
        ]
        ours, c = (median(column) for column in zip(*pairs, strict=True))
        own = not cell.kernel.label.startswith("Debian")
        yield Figure(
            f"emulator start -> first exit of a guest, {cell.kernel.label}", ours, "s",
            f"{c:.1f} s for a C program in the same machine",
            f"{FIRST_EXIT_TARGET:g} s" if own else "", ours <= FIRST_EXIT_TARGET if own else None,
        )  # fmt: skip


def profile_of(cell: Cell) -> Profile:
    """The checked-in profile. LabError when there is none."""
    found = load_profile(cell.configuration.name, cell.kernel.series)
    if found is None:
        raise LabError(f"{cell.name}: no profile is checked in")
    return found


# --- the suite ------------------------------------------------------------------------------------------------------


def suite_figures(cell: Cell, loop: Path, folder: Path, repeats: int) -> Iterator[Figure]:
    """The smoke tier in one configuration, beside C loops in the same machine."""
    cell_plan(cell.configuration, profile_of(cell), "smoke", say)  # warm: the plan is there
    times, rates, bad = [], [], 0
    for n in range(repeats):
        outcome = run_cell(cell, folder / f"suite{n}", Options("smoke"), quiet, io.StringIO())
        times.append(outcome.seconds)
        rates.append(outcome.rate)
        bad += outcome.status != 0
    commands = [
        f"{options} {_LOOPS} {' '.join(map(hex, requests))}" for options, requests in _SEQUENCES.values()
    ]
    with c_machine(cell, loop, folder / "loop-c", commands) as boot:
        loops = [_LOOPS / nanoseconds * 1e9 for _, nanoseconds in numbers(boot)]
    beside = ", ".join(f"{rate:,.0f}/s of C: {name}" for name, rate in zip(_SEQUENCES, loops, strict=True))
    seconds, checks = median(times), median(rates)
    checked = sum(r["checks"] for r in outcome.records)
    yield Figure(
        f"smoke tier ({len(outcome.records)} cases, {checked} checks), {cell.name}, boot included", seconds, "s",
        "", f"{SUITE_TARGET:g} s", seconds <= SUITE_TARGET and not bad,
    )  # fmt: skip
    yield Figure(
        "checks inside, both machines together, after the first result", checks, "/s", beside,
        f"{CHECKS_TARGET:,.0f}/s", checks >= CHECKS_TARGET,
    )  # fmt: skip


# --- rebuilding -----------------------------------------------------------------------------------------------------


def rebuild_figures(tree: Path) -> Iterator[Figure]:
    """One file of KVM touched: our build of it, beside plain make in the same build directory."""
    seconds = {}
    for who in ("ours", "make"):
        with workspace(tree) as work:
            snapshot = work.copy.snapshot(None)
            work.checkout(snapshot)
            work.make_image()  # whatever was built there last
            file = work.copy.source / TOUCHED
            file.touch()
            began = time.monotonic()
            if who == "ours":
                work.copy.snapshot(None)
                work.checkout(snapshot)
                work.make_image()
            else:
                work.make("bzImage")
            seconds[who] = time.monotonic() - began
    name = f"kernel rebuilt after {TOUCHED} was touched"
    yield Figure(name, seconds["ours"], "s", f"{seconds['make']:.1f} s for make alone")


# --- all of it ------------------------------------------------------------------------------------------------------


def kernels(names: Sequence[str]) -> list[Kernel]:
    """By name: ``own``, or a series of Debian's."""
    return [
        kernel_from_tree(debian_source(SOURCE_SERIES, say), progress=say).kernel if n == OWN else debian_kernel(n, say)
        for n in names
    ]


def measure(names: Sequence[str], repeats: int, *, rebuild: bool) -> Iterator[Figure]:
    """Every figure, as it comes. LabError."""
    svm, emulator, image = configuration("svm"), pinned_qemu(say), base_image(say)
    cells = [Cell(svm, kernel, emulator, image) for kernel in kernels(names)]
    with tempfile.TemporaryDirectory(prefix="kvm-harness-") as name:
        folder = Path(name)
        loop = build_loop(folder)
        yield from first_exit_figures(cells, loop, folder, repeats)
        for cell in cells:
            yield from suite_figures(cell, loop, folder / cell.kernel.release, repeats)
    if rebuild:
        yield from rebuild_figures(debian_source(SOURCE_SERIES, say))


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kernels", default=f"{OWN},newest", metavar="A,B", help="own, or series of Debian's kernels")
    parser.add_argument("--repeats", type=int, default=3, metavar="N")
    parser.add_argument("--no-rebuild", action="store_true", help="leave out the rebuilt kernel")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    args = parser.parse_args()
    figures = []
    try:
        for figure in measure(args.kernels.split(","), args.repeats, rebuild=not args.no_rebuild):
            figures.append(figure)
            if not args.json:
                print(figure, flush=True)
    except LabError as error:
        print(f"bench-lab: {error}", file=sys.stderr)
        return error.status
    if args.json:
        print(json.dumps([asdict(figure) for figure in figures], indent=1))
    return 1 if any(figure.met is False for figure in figures) else 0


if __name__ == "__main__":
    sys.exit(main())
