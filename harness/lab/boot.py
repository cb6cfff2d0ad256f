"""A machine while it runs, and how it ended. (The process itself begins in harness/lab/spawn.py.)

A machine talks over byte streams: its console, further serial ports, and virtio-serial channels that the guest finds by
name. Each is one end of a socket pair that the emulator inherits, so there is no socket file to be left behind or to
have too long a name. One thread of each :class:`Boot` starts the emulator, takes in all that arrives whether anybody
reads or not, speaks QMP, and collects the emulator when it ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import logging
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from qemu.qmp import QMPClient, QMPError, Runstate

from harness.lab.bootspec import CONSOLE, QMP, BootSpec, command_line, migration_channel, outer_acceleration
from harness.lab.cache import Progress, quiet
from harness.lab.errors import LabError, LostError
from harness.lab.inbox import Arrival, Inbox
from harness.lab.spawn import spawn
from harness.lab.splat import find_splats

__all__ = ["CONSOLE", "Arrival", "Boot", "BootSpec", "Ending", "How", "outer_acceleration"]

CONSOLE_LOG: Final = "console.log"
SILENT_LOG: Final = "silent.txt"
EMULATOR_LOG: Final = "emulator.log"
CONSOLE_LIMIT: Final = 64 << 20
"""Bytes of console output that one machine may write; what comes after is dropped, and the log says so."""

_START_LIMIT: Final = 30.0  # seconds from the start of the emulator until it answers over QMP
_MOVE_LIMIT: Final = 120.0  # seconds to write a machine to a file, or to read it
_END_LIMIT: Final = 5.0  # seconds for what a dead emulator left in its QMP socket
_UNREAD_LIMIT: Final = 32 << 20  # bytes of a channel that nobody has read, after which the guest has to wait
_PIECE: Final = 1 << 16
_PANIC_TAIL: Final = 1 << 18
_DROPPED: Final = b"\n[kvm-harness: the machine writes too much; the rest is dropped]\n"

logging.getLogger("qemu.qmp").addHandler(logging.NullHandler())  # what it has to say arrives as exceptions too


class How(Enum):
    """How a machine ended."""

    POWERED_OFF = "the guest powered off"
    RESET = "the guest reset itself"
    PANICKED = "the guest's kernel panicked"
    DIED = "the emulator died"
    STOPPED = "ended by us"


@dataclass(frozen=True)
class Ending:
    """The end of a machine. ``status`` is the emulator's exit status, negative for a signal's number."""

    how: How
    status: int
    seconds: float  # since the emulator was started
    stderr: str  # what the emulator itself had to say
    panic: str = ""  # the line in which the guest's kernel told why it panicked, if it did

    def __str__(self) -> str:
        after = f"after {self.seconds:.1f} s"
        if self.how is How.PANICKED:
            return f"{self.how.value} {after}: {self.panic}"
        if self.how is not How.DIED:
            return f"{self.how.value} {after}"
        cause = f"exit status {self.status}"
        if self.status < 0:
            cause = "killed by " + next((s.name for s in signal.Signals if s == -self.status), f"signal {-self.status}")
        said = "".join(f"\n  {line}" for line in self.stderr.strip().splitlines()[-8:])
        return f"{self.how.value} ({cause}) {after}" + (f"; it said:{said}" if said else ", without a word")


class Boot(Inbox):
    """A running machine, as a context manager: leaving it leaves no process, no socket and no thread.

    ``folder`` (made if need be) gets ``console.log`` and ``emulator.log``. Entering returns once the emulator answers;
    LostError says why it did not. How to read what it sends: :class:`Inbox`.
    """

    def __init__(self, spec: BootSpec, folder: Path, progress: Progress = quiet) -> None:
        super().__init__(spec.streams)
        self.spec, self.folder = spec, folder
        self._progress = progress
        self._thread = threading.Thread(target=self._main, name="emulator", daemon=True)
        self._process: subprocess.Popen[bytes] | None = None
        self._started = 0.0
        self._ends: dict[str, socket.socket] = {}  # ours of each stream
        self._paused: set[str] = set()  # streams with too much unread
        self._loop: asyncio.AbstractEventLoop | None = None
        self._listen: Callable[[str], None] = lambda name: None
        self._qmp = QMPClient("kvm-harness")
        self._unlogged: OSError | None = None  # why the console could not be logged
        self._answers = False  # QMP is up
        self._stopping = False
        self._ending: Ending | None = None

    def __enter__(self) -> Self:
        self.spec.check()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise LabError(f"{self.folder}: {error.strerror}: give another output folder") from error
        how = "starting" if self.spec.incoming is None else "going on with"
        self._progress(f"{how} {self.spec.kernel.name} on {self.spec.emulator.name} ({self.spec.accel})")
        self._thread.start()
        try:
            with self._changed:
                self._changed.wait_for(lambda: self._answers or self._closed)
                if not self._answers:
                    raise self._error or LostError(f"{self.spec.emulator.binary}: {self._ending}")
            if self.spec.incoming is not None:
                self._resume()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self._stop()

    @property
    def pid(self) -> int:
        """The emulator's process."""
        assert self._process is not None
        return self._process.pid

    @property
    def ending(self) -> Ending | None:
        """How the machine ended, None while it runs."""
        return self._ending

    def wait(self, timeout: float) -> Ending | None:
        """How the machine ended; None when it still runs after ``timeout`` seconds. Nobody needs to read meanwhile.

        Raises LabError when the console could not be logged.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._closed, timeout)
            if self._ending is None and self._error is not None:
                raise self._error
            return self._ending

    def send(self, channel: str, data: bytes, timeout: float = 10.0) -> None:
        """Write to a stream. Raises LostError when the machine has ended or takes nothing for ``timeout`` seconds."""
        try:
            if self._closed:
                raise BrokenPipeError
            end = self._ends[channel]
            end.settimeout(timeout)
            end.sendall(data)
        except TimeoutError:
            raise LostError(f"the guest reads nothing from {channel}; see {self.folder / CONSOLE_LOG}") from None
        except OSError:
            raise LostError(f"{channel}: {self.wait(_END_LIMIT) or 'closed by the emulator'}") from None

    def execute(self, command: str, timeout: float = 10.0, **arguments: object) -> object:
        """A QMP command's result. Raises LostError when the emulator has ended, does not answer, or refuses."""
        if self._closed or self._loop is None:
            raise LostError(f"QMP {command}: {self._ending}")
        future = asyncio.run_coroutine_threadsafe(self._execute(command, arguments), self._loop)
        try:
            return future.result(timeout)
        except (QMPError, TimeoutError, CancelledError) as error:
            future.cancel()
            said = str(error) or "no answer"
            raise LostError(f"QMP {command}: {said}; see {self.folder / EMULATOR_LOG}") from error

    def inspect(self) -> None:
        """Write what the emulator says of the processor to SILENT_LOG, twice within a second: does it still move?

        For a machine that says nothing any more. An emulator that does not answer either leaves what it said before.
        """
        with contextlib.suppress(LostError, OSError), open(self.folder / SILENT_LOG, "w") as file:
            for _ in range(2):
                for about in ("status", "registers", "lapic", "pic"):
                    command: dict[str, Any] = {"command-line": f"info {about}"}
                    said = self.execute("human-monitor-command", **command)
                    file.write(f"info {about}\n{said}\n")
                    file.flush()
                self.wait(0.5)

    def save(self, path: Path) -> None:
        """Write the whole machine to a file, for :attr:`BootSpec.incoming`; it stands still meanwhile, then goes on.

        Raises LostError when the emulator fails in it: no room for some hundred MB, for instance.
        """
        self.execute("stop")
        try:
            self.execute("migrate", channels=[migration_channel(path)])
            self._until("query-migrate", "setup", "active", "device", "completed")
        finally:
            self.execute("cont")

    def _resume(self) -> None:
        """Let a machine that was read from a file go on."""
        self._until("query-status", "inmigrate", "paused")
        self.execute("cont")

    def _until(self, query: str, *states: str) -> None:
        """Wait until a query's status is the last of ``states``; it may be the others before."""
        end = time.monotonic() + _MOVE_LIMIT
        while (state := _status(self.execute(query))) != states[-1]:
            if state not in states or time.monotonic() > end:
                raise LostError(f"QMP {query}: {state}; see {self.folder / EMULATOR_LOG}")
            time.sleep(0.01)

    def quit(self, timeout: float = 10.0) -> Ending:
        """End the emulator by QMP, or by SIGKILL when it does not listen."""
        self._stopping = True
        with contextlib.suppress(LostError):
            self.execute("quit", timeout)
            self.wait(timeout)
        return self.kill()

    def kill(self) -> Ending:
        """End the emulator by SIGKILL, and wait for it. What had arrived stays readable."""
        self._stop()
        if self._ending is None:
            raise self._error or LostError("the emulator was never started")
        return self._ending

    def _stop(self) -> None:
        with self._changed:
            self._stopping = True
            if self._process is not None:
                self._process.kill()
        self._thread.join()

    # --- in the emulator's thread ---

    def _main(self) -> None:
        error: Exception | None = None
        try:
            with contextlib.ExitStack() as stack:
                log = stack.enter_context(open(self.folder / CONSOLE_LOG, "wb", buffering=0))
                said = stack.enter_context(open(self.folder / EMULATOR_LOG, "wb", buffering=0))
                asyncio.run(self._tend(stack, log, said.fileno()))
            if self._ending is not None and self._ending.how is How.DIED:
                error = LostError(f"{self._ending}\n  console: {self.folder / CONSOLE_LOG}")
        except OSError as problem:
            where = problem.filename or self.folder
            error = LabError(f"{where}: {problem.strerror}: make room there, or give another output folder")
        except Exception as problem:
            error = problem
        self._close(error)

    async def _tend(self, stack: contextlib.ExitStack, log: io.FileIO, said: int) -> None:
        """Start the emulator, take in what arrives, and see it end."""
        qmp = self._start(stack, said)
        stack.callback(self._kill)
        exited = self._watch(stack, log)
        reason = await self._converse(qmp, exited)
        status = self._kill()  # what never answered is still there
        for name in self._ends:
            while self._take_in(name, log):
                pass
        self._finish(status, reason)

    def _kill(self) -> int:
        """Kill and collect the emulator if it is still there; its status."""
        assert self._process is not None
        self._process.kill()
        return self._process.wait()

    def _start(self, stack: contextlib.ExitStack, said: int) -> socket.socket:
        """Start the emulator with an end of each stream; return our end of QMP's."""
        theirs: dict[str, socket.socket] = {}
        try:
            qmp, theirs[QMP] = socket.socketpair()
            stack.enter_context(qmp)
            for name in self.spec.streams:
                self._ends[name], theirs[name] = socket.socketpair()
                stack.enter_context(self._ends[name]).setblocking(False)
            fds = {name: end.fileno() for name, end in theirs.items()}
            words = command_line(self.spec, fds)
            with self._changed:
                if self._stopping:
                    raise LostError("ended by us before it began")
                self._started = time.monotonic()
                self._process = spawn(words, fds.values(), said)
        finally:
            for end in theirs.values():
                end.close()
        return qmp

    def _watch(self, stack: contextlib.ExitStack, log: io.FileIO) -> asyncio.Event:
        """From now on take in what arrives; return what is set when the process has ended."""
        assert self._process is not None
        loop = asyncio.get_running_loop()
        self._loop = loop
        exited = asyncio.Event()
        pidfd = os.pidfd_open(self._process.pid)
        stack.callback(os.close, pidfd)

        def gone() -> None:
            loop.remove_reader(pidfd)
            exited.set()

        def listen(name: str) -> None:
            loop.add_reader(self._ends[name], readable, name)

        def readable(name: str) -> None:
            if not self._take_in(name, log) or name in self._paused:
                loop.remove_reader(self._ends[name])

        loop.add_reader(pidfd, gone)
        self._listen = listen
        for name in self._ends:
            listen(name)
        return exited

    def _take_in(self, name: str, log: io.FileIO) -> bool:
        """Read once from a stream; False when there is nothing, or it has ended."""
        try:
            data = os.read(self._ends[name].fileno(), _PIECE)
        except OSError:  # nothing there, or the emulator died with something of ours unread
            return False
        if not data:
            return False
        if name == CONSOLE:
            data = self._log(data, log)
        with self._changed:
            unread = self._put(Arrival(name, data, time.monotonic() - self._started)) if data else 0
            if name != CONSOLE and unread > _UNREAD_LIMIT:
                self._paused.add(name)
        return True

    def _log(self, data: bytes, log: io.FileIO) -> bytes:
        """Write console output to its log; return what of it is kept."""
        left = CONSOLE_LIMIT - log.tell()
        if left <= 0:
            return b""
        if len(data) > left:
            data = data[:left] + _DROPPED
        try:
            log.write(data)
        except OSError as error:
            self._unlogged = self._unlogged or error
            self._kill()
        return data

    def _taken(self, channel: str, unread: int) -> None:
        if channel in self._paused and unread <= _UNREAD_LIMIT // 2 and self._loop is not None:
            self._paused.discard(channel)
            with contextlib.suppress(RuntimeError):  # the loop has ended: all was taken in
                self._loop.call_soon_threadsafe(self._listen, channel)

    async def _converse(self, end: socket.socket, exited: asyncio.Event) -> str:
        """QMP until the emulator has ended; return the reason that it gave for its end, if any."""
        qmp = self._qmp
        try:
            await asyncio.wait_for(qmp.connect(end), _START_LIMIT)
        except (QMPError, TimeoutError):
            with contextlib.suppress(TimeoutError):  # it is dying, and has an exit status to tell
                await asyncio.wait_for(exited.wait(), 1.0)
            return ""
        with self._changed:
            self._answers = True
            self._changed.notify_all()
        await exited.wait()
        with contextlib.suppress(TimeoutError):
            while qmp.runstate == Runstate.RUNNING:  # until it has seen the end of its socket, and all before it
                await asyncio.wait_for(qmp.runstate_changed(), _END_LIMIT)
        reason = ""
        while not qmp.events.empty():
            event: dict[str, Any] = dict(await qmp.events.get())
            if event["event"] == "SHUTDOWN":
                reason = str(event["data"].get("reason", ""))
        with contextlib.suppress(Exception):  # that the other side has gone is no news
            await qmp.disconnect()
        return reason

    async def _execute(self, command: str, arguments: dict[str, object]) -> object:
        return await self._qmp.execute(command, arguments)

    def _finish(self, status: int, reason: str) -> None:
        """Say how it ended, by what the emulator told of its end and its status."""
        if self._unlogged is not None:
            raise OSError(self._unlogged.errno, self._unlogged.strerror, str(self.folder / CONSOLE_LOG))
        seconds = time.monotonic() - self._started
        panic = _panic_line(self.folder / CONSOLE_LOG)
        if reason == "guest-shutdown":
            how = How.POWERED_OFF
        elif reason in ("guest-reset", "guest-panic"):
            how = How.PANICKED if panic else How.RESET
        else:
            how = How.STOPPED if self._stopping else How.DIED
        said = (self.folder / EMULATOR_LOG).read_text(errors="replace")
        self._ending = Ending(how, status, seconds, said, panic)


def _status(answer: object) -> str:
    return str(answer.get("status", "setup")) if isinstance(answer, dict) else "setup"


def _panic_line(log: Path) -> str:
    """The line in which the kernel said why it panicked, from the end of its console log."""
    with open(log, "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - _PANIC_TAIL))
        text = file.read().decode(errors="replace")
    return next((splat.title for splat in find_splats(text) if splat.kind == "panic"), "")
