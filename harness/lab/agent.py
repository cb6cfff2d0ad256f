"""The runner inside the lab: executes the Cases of a plan on /dev/kvm, streams what they showed. No pytest, no model.

Started by the payload's ``start`` script. Talks over the virtio-serial port that harness/lab/wire.py names.
"""

from __future__ import annotations

import gc
import json
import os
import select
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, TextIO

from harness.case import Case
from harness.kvm_machine import KvmMachine
from harness.lab.plan import PlanReader
from harness.lab.splat import begins
from harness.lab.trace import FunctionProfile
from harness.lab.wire import CHANNEL, PLAN_DISK, finding_json, observation_json
from harness.machine import Recording
from harness.runner import Finding, execute
from harness.vm import Kvm, KvmUnusableError

CASE_LIMIT: Final = 5.0
"""Seconds that one KVM_RUN may take here: emulated, the longest guest takes a fraction of one."""
FLUSH: Final = 0.2
EXECUTED: Final = 1.0
"""Seconds between two answers on what was executed, while Cases come to more than to agree."""
_DEBUGFS: Final = Path("/sys/kernel/debug")


class KernelLog:
    """Follows /dev/kmsg; ``news()`` is what WARNs, oopses and the like it has said since the last call."""

    def __init__(self) -> None:
        self._fd = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
        os.lseek(self._fd, 0, os.SEEK_END)
        self._poll = select.poll()  # a third of what a read takes that ends in BlockingIOError
        self._poll.register(self._fd, select.POLLIN)

    def news(self) -> str:
        """A splat's lines since the last call, without their prefixes; empty when there is none. One poll when quiet.

        Only how it may begin matters here; what it is, the outside finds out.
        """
        if not self._poll.poll(0):
            return ""
        try:
            while not begins(first := _text(os.read(self._fd, 8192))):
                pass
        except BlockingIOError:
            return ""
        except BrokenPipeError:  # records were overwritten before they were read
            first = "(kernel log overflowed)"
        lines = [first]
        quiet_since = time.monotonic()
        while time.monotonic() - quiet_since < 0.2:  # a splat comes in many records: wait for its end
            try:
                lines.append(_text(os.read(self._fd, 8192)))
                quiet_since = time.monotonic()
            except BlockingIOError:
                time.sleep(0.02)
            except BrokenPipeError:
                continue
        return "\n".join(lines)


def _text(record: bytes) -> str:
    return record.decode(errors="replace").partition(";")[2].split("\n")[0]


def open_channel() -> int:
    """The virtio-serial port with our name. FileNotFoundError when there is none."""
    for name in Path("/sys/class/virtio-ports").glob("*/name"):
        if name.read_text().strip() == CHANNEL:
            return os.open(f"/dev/{name.parent.name}", os.O_RDWR)
    raise FileNotFoundError(f"no virtio-serial port named {CHANNEL}")


class Agent:
    """Takes jobs from a channel until it is told to end."""

    def __init__(self, fd: int, plan: Path) -> None:
        self._fd = fd
        self._plan_path = plan
        self._lines: TextIO = os.fdopen(os.dup(fd), "r", buffering=1)
        self._plan: PlanReader | None = None
        self._log = KernelLog()
        self._trace: FunctionProfile | None = None
        self._record = False
        self._later: list[str] = []
        self._said = 0.0
        self._traced = -EXECUTED  # when it was last told what was executed

    def say(self, text: str) -> None:
        """One line to the outside, now, after all that was said later."""
        data = "\n".join([*self._later, text, ""]).encode()
        self._later.clear()
        self._said = time.monotonic()
        while data:
            data = data[os.write(self._fd, data) :]

    def say_later(self, text: str) -> None:
        """One line to the outside, within FLUSH seconds of Cases: a write costs as much as running a Case."""
        if time.monotonic() - self._said > FLUSH:
            self.say(text)
        else:
            self._later.append(text)

    def serve(self) -> None:
        """The main loop."""
        try:
            kvm = Kvm()
        except KvmUnusableError as error:
            self.say(f"no-kvm {error}")
            return
        with kvm, KvmMachine(kvm, limit=CASE_LIMIT) as machine:
            self.say(f"hello {json.dumps(_greeting(kvm))}")
            for line in self._lines:
                order = json.loads(line)
                if order.get("end"):
                    self._tell_executed(whole=True)
                    break
                if "trace" in order:
                    self._trace = FunctionProfile()
                    self._trace.start(order["trace"])
                if order.get("probe"):
                    probed = _probe(kvm)
                    self._tell("-")
                    self.say(f"probed {json.dumps(probed)}")
                if "job" in order:
                    self._record = bool(order.get("record"))
                    self._job(machine, order["job"], order.get("only"), order.get("careful", False))

    def _job(self, machine: KvmMachine, number: int, only: list[int] | None, careful: bool) -> None:
        if self._plan is None:
            self._plan = PlanReader(self._plan_path.open("rb"))
        group = self._plan.groups[number]
        cases = self._plan.group(number)
        chosen = range(group.count) if only is None else [i - group.first for i in only]
        say = self.say if careful else self.say_later
        self._tell("-")  # what was said since the last Case is not the next one's
        for n in chosen:
            case, steps = cases[n]
            finding = execute(case, Recording(steps), machine)
            index = group.first + n
            if finding.clean:
                say(f"+ {index} {finding.checks} {finding.allowed} {finding.seconds:.6f}")
            else:
                self.say(f"- {index} {json.dumps(finding_json(_with_memory(finding, machine)))}")
            if self._record:
                self.say(f"= {index} {json.dumps(_recorded(case, machine))}")
                if not finding.clean:
                    machine.distrust()  # as after the run that was judged
            self._tell(str(index))
            if not finding.clean and time.monotonic() - self._traced > EXECUTED:
                self._tell_executed(whole=False)  # where so many fail that the machine is ended, nobody asks at the end
        self.say(f"done {number}")

    def _tell_executed(self, *, whole: bool) -> None:
        """Which functions were called so far, if that is asked; ``whole``: this machine runs no more Cases."""
        if self._trace is not None:
            self.say(f"executed {json.dumps({**self._trace.result(), 'whole': whole})}")
            self._traced = time.monotonic()

    def _tell(self, index: str) -> None:
        """Pass on what the kernel log has to say; ``index``: of the Case that has run, or ``-``."""
        if news := self._log.news():
            self.say(f"splat {index} {json.dumps(news)}")
            with suppress(OSError):  # WARN_ONCE speaks again, so that blame does not depend on the order of Cases
                (_DEBUGFS / "clear_warn_once").write_text("1")


def _recorded(case: Case, machine: KvmMachine) -> list[list[dict[str, Any] | None]]:
    """All that a Case shows, action by action: exits, registers, RAM."""
    machine.load(case)
    steps: list[list[dict[str, Any] | None]] = []
    for action in case.actions:
        steps.append([])
        for seen in machine.apply(action):
            if seen.sections:
                seen.pages = machine.pages()
            steps[-1].append(observation_json(seen))
    return steps


def _with_memory(finding: Finding, machine: KvmMachine) -> Finding:
    if finding.difference is not None and finding.difference.got is not None:
        with suppress(RuntimeError):
            finding.difference.got.pages = machine.pages()
    return finding


def _greeting(kvm: Kvm) -> dict[str, Any]:
    from harness.host import Host

    host = Host(kvm)
    return {
        "kernel": host.kernel, "module": host.module, "parameters": host.parameters,
        "cpuid": [[e.function, e.index, e.flags, e.eax, e.ebx, e.ecx, e.edx] for e in host.profile.cpuid],
        "sync": kvm.sync_fields, "describe": host.describe(),
    }  # fmt: skip


def _probe(kvm: Kvm) -> dict[str, Any]:
    from harness.host import Host

    host = Host(kvm, limit=CASE_LIMIT)
    try:
        return dict(host.to_json())
    finally:
        host.close()


def main(path: str = PLAN_DISK) -> int:
    """Serve; a failure of our own goes to the outside as ``fault`` and to the console."""
    gc.disable()  # what a run makes is freed by reference counts, or kept until the machine is switched off
    fd = open_channel()
    agent = Agent(fd, Path(path))
    say: Callable[[str], None] = agent.say
    try:
        agent.serve()
    except Exception:
        traceback.print_exc()
        say("fault " + json.dumps(traceback.format_exc()))
        return 4
    return 0


if __name__ == "__main__":
    sys.exit(main())
