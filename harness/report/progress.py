"""How far a run is: one line that updates itself on a terminal, a line every tenth of the run elsewhere."""

from __future__ import annotations

import errno
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Final, TextIO

from harness.verdict import Verdict
from harness.words import counted

_EVERY: Final = 0.1  # seconds between two updates of the line
_TENTHS: Final = 10
_WRONG: Final = (Verdict.SPLAT, Verdict.MISMATCH, Verdict.REGRESSED)


class Progress:
    """Counts finished Cases and tells of them. Nothing it writes can end a run: after a failed write it is silent.

    ``failed`` is the error of that write, except when nobody reads any more (EPIPE).
    """

    def __init__(
        self, stream: TextIO | None = None, *, terminal: bool | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._stream = sys.stdout if stream is None else stream
        is_terminal = self._stream.isatty() and os.environ.get("TERM", "") not in ("", "dumb")
        self._terminal = is_terminal if terminal is None else terminal
        self._clock = clock
        self._began = self._last = clock()
        self._total = self._done = self._tenth = 0
        self._found: Counter[Verdict] = Counter()
        self._shown = ""
        self._silent = False
        self.failed: OSError | None = None

    def begin(self, total: int) -> None:
        """``total`` Cases are about to run; the clock starts."""
        if not self._done:
            self._began = self._clock()
        self._total = total
        self._update(force=True)

    def wait(self, text: str) -> None:
        """What is being done before the first Case; on a terminal only."""
        if self._terminal:
            self._draw(text)

    def done(self, verdict: Verdict) -> None:
        """One more Case is finished."""
        self._done += 1
        self._found[verdict] += 1
        self._update()

    def say(self, text: str) -> None:
        """Lines that stay."""
        shown, self._shown = self._shown, ""
        erase = "\r\x1b[K" if shown else ""
        self._write(f"{erase}{text}\n{shown}")
        self._shown = shown

    def close(self, *, keep: bool = False) -> None:
        """The end: the updating line stays as it is last, or goes."""
        if self._shown:
            if keep and self._done:
                self._draw(self.line())
            self._write("\n" if keep and self._done else "\r\x1b[K")
            self._shown = ""

    def line(self) -> str:
        """The state in words: ``2784/27833 cases, 10%, 3012/s, 0 mismatches, 4 s``."""
        seconds = self._clock() - self._began
        wrong = sum(self._found[v] for v in _WRONG)
        words = [counted(self._done, "case")]
        if self._total:
            words = [f"{self._done}/{counted(self._total, 'case')}", f"{100 * self._done // self._total}%"]
        words.append(f"{self._done / max(seconds, 0.001):.0f}/s")
        words.append(counted(wrong, "mismatch", "mismatches"))
        if lost := self._found[Verdict.LOST]:
            words.append(f"{lost} lost")
        return ", ".join([*words, f"{seconds:.0f} s"])

    def _update(self, force: bool = False) -> None:
        if self._terminal:
            now = self._clock()
            if force or now - self._last >= _EVERY or self._done == self._total:
                self._last = now
                self._draw(self.line())
        elif self._total and self._done:
            tenth = _TENTHS * self._done // self._total
            if tenth > self._tenth:
                self._tenth = tenth
                self._write(self.line() + "\n")

    def _draw(self, text: str) -> None:
        room = shutil.get_terminal_size().columns - 1  # a full line would wrap, and not be one any more
        self._shown = text[:room]
        self._write(f"\r\x1b[K{self._shown}")

    def _write(self, text: str) -> None:
        if self._silent:
            return
        try:
            self._stream.write(text)
            self._stream.flush()
        except OSError as error:
            self._silent = True
            if error.errno != errno.EPIPE:
                self.failed = error
            _discard(self._stream)


def _discard(stream: TextIO) -> None:
    """What is still buffered goes nowhere, or the interpreter would fail on it at its end."""
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, stream.fileno())
    except OSError:  # no file behind it
        pass
    finally:
        os.close(null)
