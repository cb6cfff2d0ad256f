"""A series while it runs: the table so far, repainted on a terminal; a line for each patch elsewhere."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Final, TextIO

from harness.lab.run import table
from harness.series import brief
from harness.series.git import Commit
from harness.series.verdict import PatchReport

_REPAINT: Final = 0.2  # seconds
_TELL: Final = 20.0  # seconds between two lines of progress where there is no terminal
_UP: Final = "\x1b[{}A\x1b[J"


class Live:
    """Shows the patches of a series as they are judged. What it cannot write, it leaves out."""

    def __init__(
        self,
        commits: Sequence[Commit],
        cells: Sequence[str],
        stream: TextIO | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._terminal = self._stream.isatty() and os.environ.get("TERM", "") not in ("", "dumb")
        self._commits, self._cells = commits, cells
        self._rows: list[list[str]] = []
        self._doing = ""
        self._running: dict[str, str] = {}
        self._number = 0
        self._clock = clock
        self._began = self._last = clock()
        self._painted = 0  # lines on the terminal that are ours to repaint

    def say(self, text: str) -> None:
        """Something that stays."""
        self._write(f"{self._erase()}{text}\n")
        self._paint(force=True)

    def doing(self, text: str) -> None:
        """What is being done now."""
        self._doing = text.partition("\n")[0]
        self._running = {}
        self._paint()

    def cells(self, number: int, done: Mapping[str, tuple[int, int]]) -> None:
        """How far the cells of a patch are."""
        self._number = number
        begun = {name: both for name, both in done.items() if both[1]} or done  # the others may still be waiting
        self._running = {name: f"{n}/{total}" if total else "starts" for name, (n, total) in begun.items()}
        who = f"patch {number}" if number else "BASE"
        self._doing = f"{who}: " + ", ".join(f"{name} {text}" for name, text in self._running.items())
        self._paint()

    def patch(self, report: PatchReport) -> None:
        """A patch has its verdict."""
        words = brief.row(report, self._cells)
        self._rows.append(words)
        if self._terminal:
            self._paint(force=True)
            return
        total = len(self._commits)
        head = f"patch {report.number}/{total} {report.commit}: {brief.verdict(report)}"
        self._write(f"{head}\n  {' · '.join(brief.parts(report))}\n")

    def close(self) -> None:
        """Take away what is repainted."""
        self._write(self._erase())

    # --- how ---

    def _paint(self, force: bool = False) -> None:
        now = self._clock()
        if not self._terminal:
            if now - self._last >= _TELL and self._doing:
                self._last = now
                self._write(f"{now - self._began:5.0f} s  {self._doing}\n")
            return
        if not force and now - self._last < _REPAINT:
            return
        self._last = now
        size = shutil.get_terminal_size()
        lines = self._lines()[-(size.lines - 2) :]
        cut = [line[: size.columns - 1] for line in lines]
        self._write(self._erase() + "".join(f"{line}\n" for line in cut))
        self._painted = len(cut)

    def _lines(self) -> list[str]:
        heads = [*brief.HEADS, *self._cells, *brief.TAILS]
        rows = list(self._rows)
        if len(rows) < len(self._commits):
            commit = self._commits[len(rows)]
            running = [self._running.get(name, "") if self._number else "" for name in self._cells]
            subject = brief.short(commit.subject)
            rows.append([str(len(rows) + 1), subject, "", "", "", *running, *[""] * len(brief.TAILS)])
        seconds = self._clock() - self._began
        return [*table([heads, *rows]), f"{seconds:.0f} s  {self._doing}"]

    def _erase(self) -> str:
        painted, self._painted = self._painted, 0
        return _UP.format(painted) if painted else ""

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):
            self._terminal = False
