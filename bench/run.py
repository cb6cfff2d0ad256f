"""What the harness costs: each figure beside a C program or another model, on the same /dev/kvm, in the same run.

``make bench``, or ``python bench/run.py [--quick] [--json] [--kvm-device PATH]``. The C side is bench/loop.c, built
here with gcc -O2; it issues the very ioctls that one Case of the harness takes, as recorded from the harness itself.
Repeats are interleaved; a figure is the median of its repeats, a ratio the median of the ratios of each repeat.
Exit status 1 when a target is missed, 3 without a usable KVM.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any, Final

from harness import kvm_ioctl as k
from harness import vcpu as vcpu_module
from harness.case import Blob, Case, Memory, Run, Slot, VmShape
from harness.exits import Halt
from harness.host import Host
from harness.kvm_machine import KvmMachine
from harness.lockstep import lockstep
from harness.machine import Recording, record
from harness.modes import CODE_BASE, setup
from harness.state import pack_regs
from harness.vcpu import SYNC
from harness.verdict import NO_KVM
from harness.vm import DEFAULT_DEVICE, Kvm, KvmUnusableError

LOOP_C: Final = Path(__file__).with_name("loop.c")
RATIO_TARGET: Final = 0.5
MODEL_TARGET: Final = 200_000
LINEAR_TARGET: Final = 0.8
"""Cases per second of the largest suite beside those of the smallest: linear cost keeps it at 1."""

# 64-bit: mov ecx, count; loop: add rax, rbx; xor rdx, rax; mov rsi, rdx; rol rdi, 3; dec rcx; jnz loop; hlt
_LOOP: Final = bytes.fromhex("4801d8 4831c2 4889d6 48c1c703 48ffc9 75ee f4")


@dataclass(frozen=True)
class Figure:
    """One line: a rate, what it stands beside, and the target of the ratio (or of the rate)."""

    name: str
    value: float
    unit: str
    beside: str = ""
    ratio: float | None = None
    target: float | None = None
    met: bool | None = None

    def __str__(self) -> str:
        text = f"  {self.name:<58}{self.value:>13,.0f} {self.unit}"
        if self.ratio is not None:
            text += f"  {self.ratio:.2f} of {self.beside}"
        if self.target is not None:
            target = f"{self.target:,.0f}" if self.target > 1 else f"{self.target:g}"
            text += f"  (target {target}: {'met' if self.met else 'MISSED'})"
        return text


def rate(count: int, work: Callable[[], object]) -> float:
    """``count`` divided by the seconds that ``work`` takes."""
    began = time.perf_counter()
    work()
    return count / (time.perf_counter() - began)


# --- cases per second -----------------------------------------------------------------------------------------------


def halting_cases(host: Host, count: int) -> list[Case]:
    """Real-mode Cases of one HLT that differ in their registers, as the Cases of a suite do."""
    start = setup("real", entry=CODE_BASE, profile=host.profile)
    memory = Memory((*start.blobs, Blob(CODE_BASE, b"\xf4")))
    shape = VmShape((Slot(0, 0xB000),))  # what the real-mode guest uses: its RAM is compared whole, at memcmp's speed
    gpr = start.state.gpr
    return [
        Case(
            f"bench/hlt/{n}", memory, replace(start.state, gpr=(n, *gpr[1:])), host.profile, shape,
            (Run(1),), bits=start.bits,
        )
        for n in range(count)
    ]  # fmt: skip


@contextmanager
def recorded_requests() -> Iterator[list[int]]:
    """The vCPU ioctls that happen inside, in order."""
    seen: list[int] = []
    plain = {name: vars(vcpu_module)[name] for name in ("ioctl", "plain_ioctl", "enter")}

    def recorded(name: str) -> Callable[..., Any]:
        def call(fd: int, request: int = k.KVM_RUN, *arg: Any) -> Any:
            seen.append(request)
            return plain[name](fd) if name == "enter" else plain[name](fd, request, *arg)

        return call

    vars(vcpu_module).update((name, recorded(name)) for name in plain)
    try:
        yield seen
    finally:
        vars(vcpu_module).update(plain)


def names_of(requests: Iterable[int]) -> str:
    """Ioctls by name."""
    return " ".join(k.request_name(request).removeprefix("KVM_") for request in requests)


class CaseRate:
    """Cases per second: the harness, C with the same ioctls, bare Python with the same ioctls."""

    def __init__(self, kvm: Kvm, host: Host, loop: Path, count: int, *, sync: bool) -> None:
        self.kvm, self.loop, self.count = kvm, loop, count
        self.machine = KvmMachine(kvm, sync=sync)
        self.cases = halting_cases(host, count)
        self.recordings = [Recording(record(self.machine, case)) for case in self.cases]
        with recorded_requests() as requests:
            lockstep(self.cases[0], self.recordings[0], self.machine)
        self.requests = tuple(requests)
        self.synced = k.KVM_SET_REGS not in self.requests
        self.valid = self.machine.vcpu.run_page.kvm_valid_regs

    def harness(self) -> float:
        """The harness's own path: load, run, compare everything."""

        def work() -> None:
            for case, expected in zip(self.cases, self.recordings, strict=True):
                outcome = lockstep(case, expected, self.machine)
                if outcome.checks != 1 or outcome.difference is not None:
                    raise SystemExit(f"{case.name}: {outcome}")

        return rate(self.count, work)

    def c(self, *requests: int) -> float:
        """bench/loop.c."""
        dirty = k.KVM_SYNC_X86_REGS if self.synced else 0
        options = ["-k", str(self.kvm.device), "-d", str(dirty), "-v", str(self.valid), str(self.count * 4)]
        command = [str(self.loop), *options, *map(hex, requests or self.requests)]
        nanoseconds = int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        return self.count * 4 / nanoseconds * 1e9

    def python(self) -> float:
        """The same ioctls from Python, nothing compared."""
        case, vcpu = self.cases[0], self.machine.vcpu
        self.machine.load(case)
        regs = pack_regs(case.start)
        buffer = ctypes.create_string_buffer(4096)
        set_regs = ctypes.create_string_buffer(regs, len(regs))
        calls = []
        for request in self.requests:
            arg = ctypes.addressof(set_regs if request == k.KVM_SET_REGS else buffer)
            calls.append((request, 0 if request == k.KVM_RUN else arg))
        offset, size, bit = SYNC["regs"]
        offset += k.kvm_run.s.offset
        page, fd = memoryview(vcpu.run_page).cast("B"), vcpu.fd

        def work() -> None:
            for _ in range(self.count):
                if self.synced:
                    page[offset : offset + size] = regs
                    vcpu.run_page.kvm_dirty_regs = bit
                for request, arg in calls:
                    k.ioctl(fd, request, arg)

        found = rate(self.count, work)
        vcpu.epoch += 1  # the machine did not see this
        return found

    def figures(self, repeats: int) -> list[Figure]:
        """Every figure of this kind of state transfer."""
        least = (k.KVM_RUN,) if self.synced else (k.KVM_SET_REGS, k.KVM_RUN, k.KVM_GET_REGS)
        rows = [(self.harness(), self.c(), self.python(), self.c(*least)) for _ in range(repeats)]
        ours, c, python, run = (median(column) for column in zip(*rows, strict=True))
        ratio = median(row[0] / row[1] for row in rows)
        bare = median(row[2] / row[1] for row in rows)
        how = "SYNC_REGS" if self.synced else "ioctls only"
        same = "C with the same ioctls"
        return [
            Figure(
                f"({how}) harness: HLT cases, everything compared", ours, "/s", same, ratio, RATIO_TARGET,
                ratio >= RATIO_TARGET,
            ),
            Figure(f"({how}) C: {self.sequence()}", c, "/s"),
            Figure(f"({how}) bare Python, the same, nothing compared", python, "/s", same, bare),
            Figure(f"({how}) C: {names_of(least)}, for scale", run, "/s"),
        ]  # fmt: skip

    def sequence(self) -> str:
        """The ioctls of one case, by name."""
        names = names_of(self.requests)
        return f"[regs by kvm_run] {names}" if self.synced else names

    def close(self) -> None:
        """Close the machine's VMs."""
        self.machine.close()


# --- instructions per second ----------------------------------------------------------------------------------------


def loop_code(turns: int) -> bytes:
    """The register loop: 6 * turns + 2 instructions."""
    return b"\xb9" + turns.to_bytes(4, "little") + _LOOP


def model_figures(host: Host, turns: int, repeats: int) -> list[Figure]:
    """The reference model beside unicorn stepped one instruction at a time from Python."""
    from harness.reference.machine import ReferenceMachine

    code = loop_code(turns)
    start = setup("long", entry=CODE_BASE, profile=host.profile)
    memory = Memory((*start.blobs, Blob(CODE_BASE, code)))
    state = replace(start.state, gpr=(1, 2, 3, 5, *start.state.gpr[4:7], 7, *start.state.gpr[8:]))
    case = Case("bench/loop", memory, state, host.profile, actions=(Run(1),), bits=64)
    instructions = 6 * turns + 2
    machine = ReferenceMachine(budget=instructions + 1)

    def model() -> None:
        machine.load(case)
        (seen,) = machine.apply(case.actions[0])
        if not isinstance(seen.exit, Halt):
            raise SystemExit(f"the model's loop ends in {seen.exit}")

    unicorn = unicorn_loops(code)
    rows = [(rate(instructions, model), *(rate(instructions, work) for work in unicorn)) for _ in range(repeats)]
    columns = [median(column) for column in zip(*rows, strict=True)]
    met = columns[0] >= MODEL_TARGET
    if not unicorn:
        return [Figure("reference model: register loop", columns[0], "insn/s", target=MODEL_TARGET, met=met)]
    ratio = median(row[0] / row[1] for row in rows)
    return [
        Figure("reference model: register loop", columns[0], "insn/s", "unicorn stepped", ratio, MODEL_TARGET, met),
        Figure("unicorn stepped from Python", columns[1], "insn/s"),
        Figure("unicorn running freely", columns[2], "insn/s"),
    ]


def unicorn_loops(code: bytes) -> list[Callable[[], None]]:
    """The loop stepped, and run freely, in unicorn; nothing where it is not installed."""
    try:
        import unicorn
        from unicorn import x86_const as x86
    except ImportError:
        return []
    cpu: Any = vars(unicorn)["Uc"](unicorn.UC_ARCH_X86, unicorn.UC_MODE_64)
    cpu.mem_map(0, 0x20000)
    cpu.mem_write(CODE_BASE, code)
    end = CODE_BASE + len(code) - 1  # the HLT

    def stepped() -> None:
        rip = CODE_BASE
        while rip != end:
            cpu.emu_start(rip, end, count=1)
            rip = cpu.reg_read(x86.UC_X86_REG_RIP)

    def free() -> None:
        cpu.emu_start(CODE_BASE, end)

    return [stepped, free]


# --- the suite ------------------------------------------------------------------------------------------------------


def suite_figures(kvm: Kvm, host: Host, sample: int) -> list[Figure]:
    """A sample of the suite once, 4 times and 16 times as long: the cost of a Case must not grow with their number."""
    from harness.judge import Runner
    from harness.paths import all_cases
    from harness.reference.machine import ReferenceMachine

    every = list(all_cases(host.profile))
    cases = list(islice(every[:: max(len(every) // sample, 1)], sample))
    reference = ReferenceMachine()
    out: list[Figure] = []
    with KvmMachine(kvm) as machine:
        runner = Runner(machine, host)
        for case in cases:  # probes of the host happen once
            runner.run(case, reference)

        def suite(times: int) -> float:
            def work() -> None:
                for case in cases * times:
                    runner.run(case, reference)

            return rate(len(cases) * times, work)

        for factor in (1, 4, 16):
            found = suite(factor)
            first = out[0].value if out else found
            last = factor == 16
            out.append(
                Figure(
                    f"suite: {len(cases) * factor} cases through Runner", found, "cases/s", "the first", found / first,
                    LINEAR_TARGET if last else None, found / first >= LINEAR_TARGET if last else None,
                )
            )  # fmt: skip
    return out


# --- this machine ---------------------------------------------------------------------------------------------------


def machine_name(host: Host) -> str:
    """CPU model, kernel and KVM module."""
    cpu = "unknown CPU"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
            break
    return f"{cpu}, {host.describe()}, Python {sys.version.split()[0]}"


def build_loop(folder: Path) -> Path:
    """Compile bench/loop.c."""
    out = folder / "loop"
    subprocess.run(["gcc", "-O2", "-Wall", "-o", str(out), str(LOOP_C)], check=True)
    return out


def measure(kvm: Kvm, *, quick: bool, show: Callable[[Sequence[Figure]], None]) -> list[Figure]:
    """Everything, in order; ``show`` gets each group as it comes."""
    host = Host(kvm)
    out: list[Figure] = []
    repeats = 5 if quick else 15

    def add(figures: list[Figure]) -> None:
        out.extend(figures)
        show(figures)

    with tempfile.TemporaryDirectory() as folder:
        loop = build_loop(Path(folder))
        for sync in (True, False):
            rates = CaseRate(kvm, host, loop, 500 if quick else 2000, sync=sync)
            add(rates.figures(repeats))
            rates.close()
    add(model_figures(host, 2_000 if quick else 10_000, 3 if quick else 7))
    add(suite_figures(kvm, host, 25 if quick else 100))
    host.close()
    return out


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer repeats, for CI")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--kvm-device", type=Path, default=DEFAULT_DEVICE, metavar="PATH")
    args = parser.parse_args()
    try:
        kvm = Kvm(args.kvm_device)
    except KvmUnusableError as error:
        print(f"bench: {error}", file=sys.stderr)
        return NO_KVM
    with kvm:
        name = machine_name(Host(kvm))
        if not args.json:
            print(name)

        def show(figures: Sequence[Figure]) -> None:
            if not args.json:
                print(*figures, sep="\n", flush=True)

        figures = measure(kvm, quick=args.quick, show=show)
    if args.json:
        print(json.dumps({"machine": name, "figures": [asdict(figure) for figure in figures]}, indent=1))
    return 1 if any(figure.met is False for figure in figures) else 0


if __name__ == "__main__":
    sys.exit(main())
