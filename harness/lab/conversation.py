"""A cell's conversation with one machine: jobs go in, what Cases showed comes out; how it ends is somebody's doing."""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Final

from harness.lab import wire
from harness.lab.boot import CONSOLE_LOG, Boot, Ending, How
from harness.lab.errors import LabError, LostError, NoKvmError
from harness.lab.jobs import Job
from harness.lab.profile import Profile
from harness.lab.said import Said, of_kvm
from harness.lab.splat import find_splats
from harness.lab.warm import Warm, keep_warm

if TYPE_CHECKING:
    from harness.lab.session import CellRun

GREETING_LIMIT: Final = 180.0
"""Seconds from the start of the emulator until the runner inside speaks: silence for longer is infrastructure."""
SILENCE_LIMIT: Final = 90.0
"""Seconds without a finished Case once the suite has begun: then the kernel hangs."""
_NO_KVM: Final = re.compile(r"^kvm-harness-init: (no KVM.*?)\r?$", re.MULTILINE)  # what the image's init says of it
_ENDS_WITHIN: Final = 5.0  # seconds until an emulator that has closed its channel says how it ended
_RESET: Final = "the guest kernel reset itself"  # a triple fault, without a word
_AHEAD: Final = 2  # jobs that a runner has in hand, so that it never waits for the next


class Conversation:
    """One boot's conversation. ``hand`` are the jobs it was given, the running Case first."""

    def __init__(self, run: CellRun, folder: Path, key: str, warm: Warm | None) -> None:
        self.run, self.folder, self._key, self.warm = run, folder, key, warm
        self.hand: deque[Job] = deque()
        self.begun = False  # the suite has: from here on silence and death are the kernel's
        self.ended = False  # it was told to, for there was nothing left to do, or never anything
        self.asked = False  # what its KVM can do, and it has not answered
        self._probing = False  # it is busy with that
        self._said = Said(folder / CONSOLE_LOG, warm.console if warm is not None else None)

    def talk(self, boot: Boot) -> None:
        """Serve until the machine has powered off."""
        run = self.run
        for line in self._lines(boot):
            word, _, rest = line.decode(errors="replace").partition(" ")
            match word:
                case "hello":
                    hello = json.loads(rest)
                    first = run.plan is None or run.greeted(hello)
                    clean = self._booted()
                    if first:
                        run.hello = hello
                    if first and clean:
                        self._keep(boot, rest)
                    if run.trace:
                        boot.send(wire.CHANNEL, json.dumps({"trace": list(run.trace)}).encode() + b"\n")
                    self._order(boot)
                    if first:
                        self.asked, self._probing = True, not self.hand
                        boot.send(wire.CHANNEL, b'{"probe": true}\n')
                    for _ in range(1, _AHEAD):
                        self._order(boot)
                    self.begun = bool(self.hand)
                case "probed":
                    self.asked = self._probing = False
                    run.probed = Profile.probed(run.cell.configuration.name, run.hello, json.loads(rest))
                    if run.plan is None:
                        boot.send(wire.CHANNEL, b'{"end": true}\n')
                case "+":
                    index, checks, allowed, seconds = rest.split()
                    job = self._finished(int(index))
                    run.agreed(int(index), int(checks), int(allowed), float(seconds))
                    self._settle(job)
                case "-":
                    text, _, body = rest.partition(" ")
                    job = self._finished(int(text))
                    run.differed(int(text), json.loads(body))
                    self._settle(job)
                case "=":
                    text, _, body = rest.partition(" ")
                    run.recorded[int(text)] = json.loads(body)
                case "splat":
                    text, _, body = rest.partition(" ")
                    self._spoke(text, json.loads(body))
                case "done":
                    self._probing = self.asked  # it comes after the first job
                    self._order(boot)
                case "executed":
                    run.executed[self.folder.name] = json.loads(rest)
                case "no-kvm":
                    raise self._no_kvm(rest)
                case "fault":
                    raise LabError(f"{run.cell.name}: the runner failed:\n{json.loads(rest)}")
                case _:
                    raise LabError(f"{run.cell.name}: the runner said {line[:80]!r}; console: {self.folder}")
            if run.plan is not None and not self.hand and not self.ended:
                self.ended = True
                boot.send(wire.CHANNEL, b'{"end": true}\n')
        self._after(boot)

    def _booted(self) -> bool:
        """Tell what the kernel said until its runner spoke. True when nothing of it concerns KVM."""
        run, clean = self.run, True
        for splat in self._said.booted():
            if of_kvm(splat):
                clean = False
                run.kernel("boot-log", f"{splat.title}; console: {self.folder / CONSOLE_LOG}")
            else:
                run._progress(f"{run.cell.name}: while it booted, and not of KVM: {splat.title}")
        return clean

    def _spoke(self, index: str, text: str) -> None:
        """The kernel's log did, while Case ``index`` ran, or none (``-``)."""
        found = find_splats(text)
        self._said.told(found)
        if not found:
            self.run._progress(f"{self.run.cell.name}: the kernel's log has what is no splat: {text[:200]!r}")
        elif index == "-":
            self.run.kernel("log", f"{found[0].title}; console: {self.folder / CONSOLE_LOG}")
        else:
            self.run.splat(int(index), found[0].title)

    def _keep(self, boot: Boot, hello: str) -> None:
        """Keep this machine, for others to go on from."""
        if self.warm is None and self.run.keeps:
            try:
                keep_warm(self._key, boot, hello)
            except LabError as error:
                self.run._progress(f"{self.run.cell.name}: this machine is not kept for the next run: {error}")

    def _no_kvm(self, text: str) -> LabError:
        """Whose fault it is: the kernel's, unless the processor that we gave it has no virtualization."""
        console = self.folder / CONSOLE_LOG
        said = _NO_KVM.findall(console.read_bytes().decode(errors="replace"))
        kind = LabError if any("neither svm nor vmx" in line for line in said) else NoKvmError
        return kind(f"{self.run.cell.name}: {'; '.join(said) or f'no KVM in this kernel: {text}'}; console: {console}")

    def _lines(self, boot: Boot) -> Iterable[bytes]:
        waited = 0.0
        limit = GREETING_LIMIT
        if self.warm is not None:
            yield f"hello {self.warm.hello}".encode()
            limit = SILENCE_LIMIT
        while True:
            try:
                for line in boot.lines(wire.CHANNEL, 1.0):
                    waited, limit = 0.0, SILENCE_LIMIT
                    yield line
                    if self.run._stop:
                        boot.kill()
                        return
                return
            except TimeoutError:
                waited += 1.0
                if self.run._stop:
                    boot.kill()
                    return
                if waited >= limit:
                    raise TimeoutError(f"nothing from its runner for {limit:g} s") from None

    def _order(self, boot: Boot) -> None:
        job = self.run.next_job()
        if job is not None:
            self.hand.append(job)
            order = {"job": job.group, "only": list(job.indices), "careful": job.careful, "record": self.run.record}
            boot.send(wire.CHANNEL, json.dumps(order).encode() + b"\n")

    def _finished(self, index: int) -> Job:
        job = self.hand[0]
        if not job.indices or job.indices[0] != index:
            raise LabError(f"{self.run.cell.name}: Case {index} came out of turn; console: {self.folder}")
        job.indices.popleft()
        if not job.indices:
            self.hand.popleft()
        return job

    def _settle(self, job: Job) -> None:
        """Gone through one by one, and what was suspected did not happen: the first Case is named for all."""
        if job.suspicion and not job.indices:
            self.run.splat(job.first, f"{job.suspicion}; not seen again when its Cases ran one by one")

    def _running(self) -> int | None:
        return self.hand[0].indices[0] if self.hand and self.hand[0].indices else None

    def _after(self, boot: Boot) -> None:
        """The channel ended: as it should have, or in the middle."""
        if self.run._stop:
            return
        served = self.run.probed is not None if self.run.plan is None else self.ended and self._running() is None
        served = served and not self._probing
        ending = boot.wait(30.0)
        if not served:
            raise LostError(str(ending or "the runner closed its channel"))
        if self._said_at_the_end(ending) or (ending is not None and ending.how is How.POWERED_OFF):
            return
        self.run._progress(f"{self.run.cell.name}: the machine did not switch itself off: {ending or 'killed'}")

    def _said_at_the_end(self, ending: Ending | None) -> bool:
        """After the last Case: tell what is the kernel's doing and nobody was told of. False when nothing is."""
        console = self.folder / CONSOLE_LOG
        found = [("log", splat.title) for splat in self._said.untold()]
        if not found and ending is not None and ending.how is How.RESET:
            found = [("shutdown", _RESET)]
        for where, title in found:
            self.run.kernel(where, f"{title}; console: {console}")
        return bool(found)

    def lost(self, boot: Boot, error: Exception) -> None:
        """Blame: the kernel when its log says so or it reset itself or falls silent twice, else our infrastructure."""
        run = self.run
        hung = isinstance(error, TimeoutError)
        ending = boot.ending if hung else boot.wait(_ENDS_WITHIN)
        if hung and ending is None:
            boot.inspect()
        if ending is None:
            boot.kill()
        console = self.folder / CONSOLE_LOG
        splats = self._said.untold()
        what = splats[0].title if splats else _RESET if ending is not None and ending.how is How.RESET else ""
        silence = f"the kernel fell silent for {SILENCE_LIMIT:g} s" if hung else ""
        if self._probing and run.plan is not None:
            run.died_of_probe(f"{what or silence}; console: {console}" if what or silence else "", silent=not what)
        elif not self.begun or (self._running() is None and hung and not what):
            told = [str(error) or "silence", *([what] if what and what not in str(error) else [])]
            when = "after the last Case" if self.begun else "before the suite began"
            raise LostError(f"{run.cell.name}: {when}: {'; '.join(told)}; console: {console}")
        elif self._running() is None:
            self._said_at_the_end(ending)
        else:
            self._blame(what, silence, f"{error}; console: {console}")
        run._progress(f"{run.cell.name}: machine lost ({str(error).splitlines()[0]}); the rest goes to a fresh one")

    def _blame(self, what: str, silence: str, error: str) -> None:
        """It ended in a Case: of ``what`` the kernel said or did, or in ``silence``, or for reasons of our own."""
        job, console = self.hand[0], self.folder / CONSOLE_LOG
        index = job.indices[0]
        if not job.careful:  # which of the last Cases it was, a second run tells; silence may be a busy host's
            job.careful, job.first = True, index
            job.suspicion = f"{what}; console: {console}" if what else ""
        elif what or silence:
            job.indices.popleft()
            job.suspicion = ""
            self.run.splat(index, f"{what or silence}; console: {console}")
        elif not self.run.lost(index, error):
            job.indices.popleft()
