"""What the lab shows on a terminal: one line that says how far a cell is, and tables of aligned columns."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Sequence
from typing import TextIO

from harness.lab.cache import Progress
from harness.lab.session import CellRun
from harness.words import counted


class StatusLine:
    """One line that says how far a cell is: kept up to date on a terminal, now and then elsewhere."""

    def __init__(self, cell: str, stream: TextIO = sys.stderr) -> None:
        self._cell, self._stream = cell, stream
        self._tty = stream.isatty()
        self._last = time.monotonic()
        self._shown = False

    def update(self, run: CellRun) -> None:
        """Called at every result, and several times a second."""
        now = time.monotonic()
        if now - self._last < (0.2 if self._tty else 10.0):
            return
        self._last = now
        tally = run.tally
        if tally.done:
            text = f"{tally.done}/{counted(tally.total, 'case')}, {tally.rate:,.0f} checks/s, {tally.bad} bad"
        else:
            text = f"booting {tally.boots} of {counted(run.machines, 'machine')}"
        text = f"{self._cell}: {text}, {now - tally.began:.0f} s"
        room = shutil.get_terminal_size().columns - 1  # a full line would wrap, and leave the rest behind
        self._stream.write(f"\r\x1b[K{text[:room]}" if self._tty else f"{text}\n")
        self._stream.flush()
        self._shown = self._tty

    def clear(self) -> None:
        """Make room for something else."""
        if self._shown:
            self._stream.write("\r\x1b[K")
            self._stream.flush()
            self._shown = False

    def say(self, progress: Progress) -> Progress:
        """``progress`` on a line of its own."""

        def said(text: str) -> None:
            self.clear()
            progress(text)

        return said


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Aligned columns."""
    widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
