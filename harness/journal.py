"""The journal: an append-only file of results, one JSON object a line. Every report is a view of it.

A line is written whole and flushed as soon as its Case is finished, so that a run that was killed keeps all of them;
a torn last line is dropped on reading.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

NAME: Final = "journal.jsonl"
FORMAT: Final = 1


class JournalError(Exception):
    """A folder cannot take, or does not hold, a journal; the text says what to do. ``status`` is the exit status."""

    def __init__(self, text: str, status: int = 2) -> None:
        super().__init__(text)
        self.status = status


class Journal:
    """An open journal in a folder of its own; it is locked for as long as it is open.

    Raises JournalError when the folder already holds a run, is in use by another one, or can't be written.
    """

    def __init__(self, folder: Path, header: Mapping[str, Any]) -> None:
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(folder / NAME, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise JournalError(f"{folder}: cannot write there: {error.strerror}; give another --out") from error
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._fd)
            raise JournalError(f"{folder}: another run is writing there; give another --out") from None
        if os.fstat(self._fd).st_size:
            os.close(self._fd)
            raise JournalError(f"{folder}: holds the results of an earlier run; give another --out or remove it")
        self.append({"journal": FORMAT, "started": datetime.now(UTC).isoformat(timespec="seconds"), **header})

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one line. JournalError (status 4) when the disk is full; what was written before stays readable."""
        data = (json.dumps(record, separators=(",", ":")) + "\n").encode()
        end = os.fstat(self._fd).st_size
        try:
            written = os.write(self._fd, data)
            if written != len(data):
                os.ftruncate(self._fd, end)
                raise OSError(28, "No space left on device")
        except OSError as error:
            raise JournalError(
                f"{self.folder / NAME}: {error.strerror}; finished results are kept there: "
                "make room and start again with another --out", 4
            ) from error  # fmt: skip

    def close(self) -> None:
        """Close and unlock."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def read_journal(folder: Path) -> Iterator[dict[str, Any]]:
    """The records of a run, header first. JournalError when there is none or it is damaged before its last line."""
    path = folder / NAME if folder.is_dir() else folder
    try:
        lines = path.read_text().split("\n")
    except OSError as error:
        raise JournalError(f"{path}: {error.strerror}; give the --out folder of a run") from error
    torn = lines.pop()
    del torn
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise JournalError(f"{path}:{number}: damaged ({error})") from error
        if number == 1 and (not isinstance(record, dict) or record.get("journal") != FORMAT):
            raise JournalError(f"{path}: not a journal of format {FORMAT}")
        yield record
