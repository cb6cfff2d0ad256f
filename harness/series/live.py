"""A series while it runs: the table so far, repainted on a terminal; a line for each patch elsewhere."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Final, TextIO

from harness.lab.lines import table
from harness.series import brief
from harness.series.git import Commit
from harness.series.verdict import PatchReport
from harness.words import counted, span

_REPAINT: Final = 0.2  # seconds
_TELL: Final = 20.0  # seconds between two lines of progress where there is no terminal
_LEAST: Final = 16  # characters of a subject in a table
_GAP: Final = "  "  # between two columns of harness.lab.lines.table()
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
        self._reports: list[PatchReport] = []
        self._number = 0  # of the patch that is built or runs; 0 is BASE
        self._stage = ""
        self._detail = ""
        self._running: dict[str, str] = {}
        self._clock = clock
        self._began = self._last = self._since = clock()
        self._took: list[float] = []  # seconds that each patch took which was built and judged here
        self._painted = 0  # lines on the terminal that are ours to repaint

    def say(self, text: str) -> None:
        """Something that stays."""
        self._write(f"{self._erase()}{text}\n")
        self._paint(force=True)

    def building(self, number: int, flavour: str) -> None:
        """The kernel of a patch (0: BASE) is built."""
        if number != self._number:
            self._since = self._clock()
        self._number, self._running = number, {}
        self._stage, self._detail = f"building {self._who()} ({flavour})", ""
        self._paint()

    def doing(self, text: str) -> None:
        """How far that is."""
        self._detail = text.partition("\n")[0]
        self._paint()

    def cells(self, number: int, done: Mapping[str, tuple[int, int]], left: int) -> None:
        """How far the cells of a patch are."""
        self._number = number
        self._stage = f"running {self._who()}, {counted(left, 'cell run')} to go" if left else f"judging {self._who()}"
        begun = {name: both for name, both in done.items() if both[1]} or done  # the others may still be waiting
        self._running = {name: f"{n}/{total}" if total else "starts" for name, (n, total) in begun.items()}
        self._detail = ", ".join(f"{name} {text}" for name, text in self._running.items())
        self._paint()

    def patch(self, report: PatchReport) -> None:
        """A patch has its verdict."""
        self._reports.append(report)
        if report.number == self._number:  # one that an earlier run has judged was not built here
            self._took.append(self._clock() - self._since)
        self._number, self._running = report.number, {}
        self._stage, self._detail = f"judged {self._who()}", ""
        if self._terminal:
            self._paint(force=True)
            return
        total = len(self._commits)
        head = f"patch {report.number}/{total} {report.commit}: {brief.verdict(report)}"
        self._write(f"{head}\n  {' · '.join(brief.parts(report))}\n")

    def close(self) -> None:
        """Take away what is repainted."""
        self._write(self._erase())

    def leave(self) -> None:
        """Repaint no more: what is there stays."""
        self._painted = 0

    # --- how ---

    def _paint(self, force: bool = False) -> None:
        now = self._clock()
        if not self._terminal:
            if now - self._last >= _TELL and self._stage:
                self._last = now
                self._write(f"{': '.join(filter(None, [self._status(now), self._detail]))}\n")
            return
        if not force and now - self._last < _REPAINT:
            return
        self._last = now
        size = shutil.get_terminal_size()
        width = max(size.columns - 1, 1)  # a full line would wrap
        lines = [*self._patches(width), self._status(now), f"  {self._detail}"][-max(size.lines - 2, 1) :]
        self._write(self._erase() + "".join(f"{line[:width].rstrip()}\n" for line in lines))
        self._painted = len(lines)

    def _who(self) -> str:
        return f"patch {self._number} of {len(self._commits)}" if self._number else "BASE"

    def _status(self, now: float) -> str:
        """Time so far, what is at work, what is left: ``12 s  building patch 3 of 5; then 2 more, about 6 min 00 s``.

        The estimate is that each of them takes as long as those did that are judged.
        """
        left = len(self._commits) - self._number
        then = f"; then {f'{left} more' if self._number else counted(left, 'patch', 'patches')}" if left else ""
        if left and self._took:
            then += f", about {span(round(sum(self._took) / len(self._took) * left, -1))}"
        return f"{span(now - self._began)}  {self._stage}{then}" if self._stage else span(now - self._began)

    def _patches(self, width: int) -> list[str]:
        """Those that are judged, and the one at work: a table where its columns fit, else a few lines for each."""
        subjects = [report.commit.subject for report in self._reports]
        rows = [brief.row(report, self._cells) for report in self._reports]
        if self._number and len(rows) < len(self._commits):
            subjects.append(self._commits[len(rows)].subject)
            running = [self._running.get(name, "") for name in self._cells]
            rows.append([str(len(rows) + 1), "", "", "", "", *running, *[""] * len(brief.TAILS)])
        if not rows:
            return []
        heads = [*brief.HEADS, *self._cells, *brief.TAILS]
        others = sum(max(len(row[n]) for row in [heads, *rows]) + len(_GAP) for n in range(len(heads)) if n != 1)
        room = min(width - others, brief.SUBJECT)
        if room < _LEAST:
            return self._listed(subjects, width)
        for row, subject in zip(rows, subjects, strict=True):
            row[1] = brief.short(subject, room)
        lines = table([heads, *rows])
        for number, report in reversed([*enumerate(self._reports, 2)]):
            if lacking := brief.unexecuted(report):
                lines.insert(number, f"{'':5s}but {lacking}")
        return lines

    def _listed(self, subjects: Sequence[str], width: int) -> list[str]:
        lines = [line for report in self._reports for line in brief.overview(report, width)]
        if len(subjects) > len(self._reports):
            lines.append(brief.first_line(len(subjects), "...", subjects[-1], width))
        return lines

    def _erase(self) -> str:
        painted, self._painted = self._painted, 0
        return _UP.format(painted) if painted else ""

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):
            self._terminal = False
