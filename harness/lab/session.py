"""A cell of the lab: one kernel in one configuration, booted as often as it takes, its Cases judged as they arrive."""

from __future__ import annotations

import shlex
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from harness.case import Case, Observation, Pages
from harness.judge import Judge, Result
from harness.known import KnownDivergence
from harness.lab import wire
from harness.lab.boot import Boot, BootSpec
from harness.lab.cache import Progress, quiet
from harness.lab.configurations import Configuration
from harness.lab.conversation import Conversation
from harness.lab.errors import LostError
from harness.lab.hardware import Emulator
from harness.lab.image import Image
from harness.lab.jobs import Job, jobs
from harness.lab.kernel import COMMAND_LINE, Kernel
from harness.lab.payload import runner_payload
from harness.lab.plan import Plan
from harness.lab.profile import Profile
from harness.lab.said import slug
from harness.lab.warm import FEATURE, drop_warm, find_warm, warm_key
from harness.lockstep import Difference
from harness.runner import Finding
from harness.verdict import Verdict

BARE: Final = "bare-machine"
"""The feature of an emulator that runs a Case by itself, without a kernel."""
DEADLINE: Final = 7200.0
"""Seconds that all the Cases of a cell may take."""
BOOTS: Final = 8
"""Machines that one cell may lose before it is given up."""


@dataclass(frozen=True)
class Cell:
    """One kernel in one configuration on one emulator."""

    configuration: Configuration
    kernel: Kernel
    emulator: Emulator
    image: Image
    accel: str = "tcg"

    @property
    def name(self) -> str:
        """For people: ``svm × 7.3.4+deb13-cloud-amd64``."""
        return f"{self.configuration.name} × {self.kernel.release}"

    @property
    def emulated(self) -> bool:
        """The processor is that of the lab's own emulator: profiles that are checked in, and bare machines, have it."""
        return self.accel == "tcg" and BARE in self.emulator.features

    @property
    def again(self) -> str:
        """The command that runs a Case of this cell, up to its name; TREE stands for a tree that is edited first."""
        packed = self.kernel.image.with_name("bzImage")  # what boots itself may be the ELF file beside it
        return self._command(shlex.quote(str((packed if packed.is_file() else self.kernel.image).absolute())))

    def example(self, name: str) -> str:
        """The same for whoever has such a kernel: BZIMAGE stands for it."""
        return f"{self._command('BZIMAGE')} {shlex.quote(name)}"

    def _command(self, image: str) -> str:
        kernel = "--tree TREE" if self.configuration.edits else f"--kernel {image}"
        return f"kvm-harness lab run {kernel} --config {self.configuration.name} -k"

    def spec(self, disks: Sequence[Path]) -> BootSpec:
        """The machine to start; ``disks`` come after the root image."""
        return BootSpec(
            emulator=self.emulator, kernel=self.kernel.image, initramfs=self.kernel.initramfs,
            append=(*COMMAND_LINE, *self.configuration.parameters), disks=(self.image.root, *disks),
            cpu=self.configuration.cpu, channels=(wire.CHANNEL,), accel=self.accel,
        )  # fmt: skip


@dataclass
class Tally:
    """What a cell came to so far."""

    total: int = 0
    done: int = 0
    checks: int = 0
    bad: int = 0
    began: float = field(default_factory=time.monotonic)
    first_result: float = 0.0  # seconds from ``began``
    boots: int = 0

    @property
    def rate(self) -> float:
        """Checks per second since the first result."""
        span = time.monotonic() - self.began - self.first_result
        return self.checks / span if self.first_result and span > 0 else 0.0


class CellRun:
    """Runs the Cases of a plan on a cell, on ``machines`` boots side by side. Results go to ``take`` as they arrive.

    Each boot leaves its console in a folder of its own under ``folder``. ``trace`` are names of kernel functions of
    which :attr:`executed` is to tell whether they were called; with ``record``, :attr:`recorded` holds all that Cases
    show. ``most_bad`` failures are enough, if it is not 0. Not to be used twice.
    """

    def __init__(
        self,
        cell: Cell,
        plan: Plan | None,
        profile: Profile | None,
        folder: Path,
        take: Callable[[Result, int], None],
        *,
        known: Sequence[KnownDivergence] = (),
        machines: int = 2,
        most_bad: int = 0,
        deadline: float = DEADLINE,
        arbiter: Callable[[Case, Result], Result] | None = None,
        trace: Sequence[str] = (),
        record: bool = False,
        progress: Progress = quiet,
        tick: Callable[[], None] = lambda: None,
        cold: bool = False,
    ) -> None:
        self.cell, self.plan, self.profile, self.folder = cell, plan, profile, folder
        self._take, self.machines, self._most_bad, self._progress = take, machines, most_bad, progress
        self._judge = Judge(profile, known) if profile is not None else None
        self._arbiter, self._deadline, self._tick = arbiter, deadline, tick
        self.trace, self.record = trace, record
        self.recorded: dict[int, Any] = {}  # by index, if ``record``: all Observations of a Case, as JSON
        self.executed: dict[str, Mapping[str, Any]] = {}  # by machine, the last it said, with a ``trace``
        self._lock = threading.Lock()
        self._idle = threading.Event()  # no worker is at work any more
        self._working = 0
        self._jobs: deque[Job] = deque()
        self._retried: set[int] = set()
        self._seen: set[str] = set()  # Cases with a result, and splats that belong to none
        self.tally = Tally()
        self.probed: Profile | None = None
        self.hello: Mapping[str, Any] = {}
        self._probe_wanted = True
        self._probe_deaths = 0  # machines that ended while they were being asked what their KVM can do
        self.probe_kills = False  # the kernel dies of that, which was told
        self._stop = False
        self._problem: BaseException | None = None
        self.keeps = not cold and plan is not None and cell.accel == "tcg" and FEATURE in cell.emulator.features
        self._cold = not self.keeps

    @property
    def enough(self) -> bool:
        """``most_bad`` failures were found; the rest of the Cases was not run."""
        return 0 < self._most_bad <= self.tally.bad

    # --- from outside ---

    def probe(self) -> Profile:
        """Boot and ask the KVM what it can do. LostError when nothing comes of it, twice."""
        try:
            self._serve(0)
        except LostError as error:
            self._progress(f"{error}; once more")
            self._serve(0)
        if self.probed is None:
            raise LostError(f"{self.cell.name}: the runner did not answer; console: {self.folder}")
        return self.probed

    def run(self, chosen: Iterable[int]) -> None:
        """Run the chosen Cases of the plan. LabError when the cell could not be run to its end; what came is taken."""
        assert self.plan is not None
        self._jobs = jobs(self.plan, chosen)
        self.tally.total = sum(len(j.indices) for j in self._jobs)
        self.machines = max(1, min(self.machines, len(self._jobs)))
        threads = [threading.Thread(target=self._worker, args=(n,), daemon=True) for n in range(self.machines)]
        self._working = len(threads)
        for thread in threads:
            thread.start()
        late = False
        try:
            # Not join(): Python 3.11 takes a thread for ended when a signal interrupts the wait for it.
            while not self._idle.wait(0.2):
                self._tick()
                late = late or time.monotonic() - self.tally.began > self._deadline
                self._stop = self._stop or late
        except BaseException:
            self._stop = True
            for thread in threads:
                thread.join()
            raise
        if self._problem is not None:
            raise self._problem
        if late and self.tally.done < self.tally.total:
            raise LostError(
                f"{self.cell.name}: the deadline of {self._deadline / 60:g} minutes passed; "
                f"{self.tally.done} of {self.tally.total} Cases were run: give more time with --deadline"
            )
        if self.probed is None and not self.probe_kills and not self.enough:
            raise LostError(f"{self.cell.name}: its KVM was not asked what it can do; consoles: {self.folder}")

    # --- a machine and its thread ---

    def _worker(self, number: int) -> None:
        try:
            while (self._jobs or self._probe_wanted) and not self._stop:
                self._serve(number)
        except BaseException as error:  # the other machine goes on with what is left
            with self._lock:
                self._problem = self._problem or error
        finally:
            with self._lock:
                self._working -= 1
                if not self._working:
                    self._idle.set()

    def _serve(self, number: int) -> None:
        """One boot: hand out jobs until there are none, or the machine is lost."""
        with self._lock:
            self.tally.boots += 1
            boot_number = self.tally.boots
        if boot_number > BOOTS:
            raise LostError(f"{self.cell.name}: {BOOTS} machines were lost; given up. Consoles: {self.folder}")
        runner = runner_payload(self._progress)
        cell = self.cell
        spec = cell.spec([runner, *([self.plan.path] if self.plan is not None else [])])
        spec.check()
        key = warm_key(spec, cell.emulator.digest, cell.kernel.digest, cell.image.digest)
        warm = None if self._cold else find_warm(key)
        if warm is not None:
            spec = replace(spec, incoming=warm.state)
        folder = self.folder / f"boot-{boot_number}"
        machine = Conversation(self, folder, key, warm)
        try:
            with Boot(spec, folder, self._progress) as boot:
                self._converse(machine, boot)
        except LostError as error:
            if warm is None or machine.begun:
                raise
            drop_warm(key)
            self._cold = True
            self._progress(f"{cell.name}: the kept machine is of no use, so one boots: {error}")

    def _converse(self, machine: Conversation, boot: Boot) -> None:
        try:
            machine.talk(boot)
        except (LostError, TimeoutError) as error:
            self._cold = self._cold or machine.warm is not None  # what is blamed on this kernel was booted for it
            machine.lost(boot, error)
        finally:
            self._give_back(machine)

    def _give_back(self, machine: Conversation) -> None:
        with self._lock:
            if machine.asked and not self.probe_kills:  # and has not answered: ask another one
                self._probe_wanted = True
            for job in reversed(machine.hand):
                if job.indices:
                    self._jobs.appendleft(job)
            machine.hand.clear()

    def next_job(self) -> Job | None:
        """A job for a machine."""
        with self._lock:
            return self._jobs.popleft() if self._jobs and not self._stop else None

    # --- what machines report ---

    def greeted(self, hello: Mapping[str, Any]) -> bool:
        """Take a greeting; True for the first machine, which is to be probed."""
        with self._lock:
            self.hello = self.hello or hello
            first, self._probe_wanted = self._probe_wanted, False
        return first

    def agreed(self, index: int, checks: int, allowed: int, seconds: float) -> None:
        """Case ``index`` showed what the model expects."""
        self._judged(index, Finding(checks, None, "", "", allowed, seconds))

    def _judged(self, index: int, finding: Finding) -> None:
        assert self.plan is not None
        assert self._judge is not None
        if finding.clean and self._judge.simple(self.plan.names[index]):
            name, id_ = self.plan.names[index], self.plan.ids[index]
            self.result(Result(name, id_, Verdict.AGREE, finding.checks, "", finding.seconds), finding.allowed)
            return
        with self._lock:  # one reader of the plan
            case, _ = self.plan.planned(index)
        result = self._judge.judge(case, finding, reader(case, finding.difference))
        if result.verdict is Verdict.MISMATCH and self._arbiter is not None:
            result = self._arbiter(case, result)
        self.result(result, finding.allowed)

    def differed(self, index: int, body: Mapping[str, Any]) -> None:
        """Case ``index`` came to a Finding that is not clean."""
        self._judged(index, wire.finding_from_json(dict(body)))

    def died_of_probe(self, what: str, silent: bool) -> None:
        """A machine ended while it was asked what its KVM can do: of ``what``, if that is the kernel's doing.

        A silence has to repeat for that.
        """
        self._probe_deaths += 1
        if what and (not silent or self._probe_deaths > 1):
            self.probe_kills = True
            self.kernel("probe", f"asked what its KVM can do: {what}")

    def kernel(self, where: str, text: str) -> None:
        """The kernel did ``text``, which is bad, and no Case is to blame. Told once."""
        name = f"kernel/{where}/{slug(text.partition('; console: ')[0])}"
        with self._lock:
            known = name in self._seen
            self._seen.add(name)
        if not known:
            self.result(Result(name, "", Verdict.SPLAT, 0, text), 0)

    def splat(self, index: int, title: str) -> None:
        """The kernel's log spoke up while Case ``index`` ran, or its kernel died of it."""
        assert self.plan is not None
        name, id_ = self.plan.names[index], self.plan.ids[index]
        self.result(Result(name, id_, Verdict.SPLAT, 0, title), 0)

    def lost(self, index: int, text: str) -> bool:
        """The machine was lost while Case ``index`` ran; True when it is to be tried once more."""
        assert self.plan is not None
        with self._lock:
            again = index not in self._retried
            self._retried.add(index)
        if not again:
            self.result(Result(self.plan.names[index], self.plan.ids[index], Verdict.LOST, 0, text), 0)
        return again

    def result(self, result: Result, allowed: int) -> None:
        """Hand a result on. A Case may have several: what it showed, and that the kernel's log spoke up."""
        with self._lock:
            tally = self.tally
            if result.id and result.name not in self._seen:
                self._seen.add(result.name)
                tally.done += 1
                tally.first_result = tally.first_result or time.monotonic() - tally.began
            tally.checks += result.checks
            if result.verdict.status == 1:
                tally.bad += 1
                self._stop = self._stop or self.enough
            self._take(result, allowed)


def reader(case: Case, difference: Difference | None) -> Callable[[int, int], bytes]:
    """Guest RAM as it was where the Case differed: its initial contents and the pages that the runner sent along."""
    seen: Observation | None = difference.got if difference is not None else None
    pages: Pages = seen.pages if seen is not None else {}

    def read(gpa: int, size: int) -> bytes:
        for slot in case.shape.slots:
            if slot.gpa <= gpa and gpa + size <= slot.gpa + slot.size:
                image = bytearray(case.memory.image(slot))
                for page, data in pages.items():
                    if slot.gpa <= page < slot.gpa + slot.size:
                        image[page - slot.gpa : page - slot.gpa + len(data)] = data
                return bytes(image[gpa - slot.gpa : gpa - slot.gpa + size])
        return b""

    return read
