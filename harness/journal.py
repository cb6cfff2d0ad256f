"""The journal: an append-only file of results, one JSON object a line. Every report is a view of it.

A line is written whole and flushed as soon as its Case is finished, so that a run that was killed keeps all of them;
a torn last line is dropped on reading. A line damaged later is left out, and said.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from harness.verdict import BAD_INPUT, Verdict
from harness.words import counted

NAME: Final = "journal.jsonl"
FORMAT: Final = 1
_NAMED: Final = 9
OUT: Final = Path("out")
"""Where runs go for which no folder was given."""


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
        self.folder, self._fd = folder, open_in(folder, NAME)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._fd)
            raise JournalError(f"{folder}: another run is writing there; give another --out") from None
        if os.fstat(self._fd).st_size:
            os.close(self._fd)
            raise _taken(folder)
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


def results_folder(folder: Path) -> Path:
    """``folder``, made where it is not there yet. JournalError where that cannot be, or nothing written into it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _not_there(folder, error) from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise JournalError(f"{folder}: cannot write there: no permission; give another --out")
    return folder


def open_in(folder: Path, name: str) -> int:
    """Descriptor of a file in a :func:`results_folder`, to lock it or append to it; made if need be. JournalError."""
    path = results_folder(folder) / name
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise _not_there(path, error) from error


def free_folder(folder: Path) -> Path:
    """A :func:`results_folder` in which no run has left its journal. JournalError."""
    path = results_folder(folder) / NAME
    if path.exists() and path.stat().st_size:
        raise _taken(folder)
    return folder


def _taken(folder: Path) -> JournalError:
    return JournalError(f"{folder}: holds the results of an earlier run; give another --out or remove it")


def _not_there(folder: Path, error: OSError) -> JournalError:
    status = Verdict.LOST.status if error.errno in (errno.ENOSPC, errno.EDQUOT) else BAD_INPUT
    what = "it is no folder" if error.errno in (errno.EEXIST, errno.ENOTDIR) else error.strerror
    return JournalError(f"{folder}: cannot write there: {what}; give another --out", status)


def new_folder() -> Path:
    """A folder under ``out/`` that is not there yet, named after the time."""
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    folder = OUT / stamp
    number = 1
    while folder.exists():
        number += 1
        folder = OUT / f"{stamp}-{number}"
    return folder


@dataclass(frozen=True)
class Damage:
    """A line of a journal that is not what was written: its number (from 1) and what is wrong with it."""

    line: int
    what: str


@dataclass(frozen=True)
class RunResults:
    """What a journal holds: all that reports and comparisons are made of.

    ``path``: the journal; ``header``: of the run (host, started, and ``cell`` where a lab ran it); ``records``: one for
    each finished Case; ``finished``: the run came to its end; ``damage``: lines that were left out; ``chosen``: how
    many Cases were to run, None where the journal does not say; ``lost``: why the run ended early, if it said so;
    ``enough``: it ended when so many Cases had failed as it was asked to look for.
    """

    path: Path
    header: Mapping[str, Any]
    records: tuple[Mapping[str, Any], ...]
    finished: bool
    damage: tuple[Damage, ...] = ()
    chosen: int | None = None
    lost: str = ""
    enough: bool = False

    @property
    def folder(self) -> Path:
        """Where the run's other files are."""
        return self.path.parent

    @property
    def complete(self) -> bool:
        """Everything that the run was to find is here."""
        return self.finished and not self.damage

    def cell(self, record: Mapping[str, Any]) -> str:
        """The lab's configuration and kernel that a record is of ("svm × 7.3"); empty for a run on this machine."""
        return str(record.get("cell") or self.header.get("cell") or "")

    @cached_property
    def cells(self) -> tuple[str, ...]:
        """Every cell that has records, in alphabetical order; at least one, which may have no name."""
        return tuple(sorted({self.cell(r) for r in self.records} or {self.cell({})}))

    @property
    def extent(self) -> str:
        """``20 of 300 cases ran``: how far a run came that did not run all its Cases; empty for one that did."""
        return extent(self.records, self.chosen)

    def incomplete_because(self) -> list[str]:
        """One line for each thing that keeps the results from being whole."""
        out = [f"{self.path}:{d.line}: damaged ({d.what}); the other lines are shown" for d in self.damage]
        if not self.finished:
            how = f"was lost ({self.lost})" if self.lost else "was interrupted or lost"
            out.append(f"incomplete: the run {how} before its end" + (f"; {self.extent}" if self.extent else ""))
        return out


def extent(records: Iterable[Mapping[str, Any]], chosen: int | None) -> str:
    """``20 of 300 cases ran``, where ``records`` are not of all that were ``chosen``; empty where they are."""
    ran = sum(1 for r in records if r["id"])  # what was found of a kernel as a whole has no id
    return "" if chosen is None or ran >= chosen else f"{ran} of {counted(chosen, 'case')} ran"


def read_run(folder: Path) -> RunResults:
    """The results of a run, as far as they can be read. JournalError when ``folder`` holds no journal."""
    path = _path(folder)
    header: Mapping[str, Any] = {}
    records: list[Mapping[str, Any]] = []
    damage: list[Damage] = []
    finished, chosen, lost, enough = False, None, "", False
    for number, line in enumerate(_whole_lines(path), 1):
        record = _parse(line)
        if isinstance(record, str):
            damage.append(Damage(number, record))
        elif "journal" in record and number == 1:
            header = _checked_header(path, record)
        elif "case" in record:
            if what := _wrong_with(record):
                damage.append(Damage(number, what))
            else:
                records.append(record)
        if isinstance(record, dict):
            finished = finished or "finished" in record
            chosen = record["chosen"] if isinstance(record.get("chosen"), int) else chosen
            enough = enough or bool(record.get("enough"))
            lost = str(record.get("lost", lost)).partition("\n")[0]
    if not header and (not records or not damage or damage[0].line != 1):
        raise JournalError(f"{path}: not a journal of format {FORMAT}; give the --out folder of a run")
    return RunResults(path, header, tuple(records), finished, tuple(damage), chosen, lost, enough)


def read_journal(folder: Path) -> Iterator[dict[str, Any]]:
    """The lines of a run, header first. JournalError when there is none or it is damaged before its last line."""
    path = _path(folder)
    for number, line in enumerate(_whole_lines(path), 1):
        record = _parse(line)
        if isinstance(record, str):
            raise JournalError(f"{path}:{number}: damaged ({record})")
        if number == 1:
            _checked_header(path, record)
        yield record


def _path(folder: Path) -> Path:
    return folder / NAME if folder.is_dir() else folder


def _whole_lines(path: Path) -> list[bytes]:
    """Without a torn last line, which a run that was killed may leave."""
    try:
        return path.read_bytes().split(b"\n")[:-1]
    except OSError as error:
        raise JournalError(f"{_no_run(path, error)}; give {_runs_near(path)}") from error


def _no_run(path: Path, error: OSError) -> str:
    if not isinstance(error, FileNotFoundError):
        return f"{path}: {error.strerror}"
    return f"{path.parent} holds no run (there is no {NAME} in it)" if path.name == NAME else f"{path} is not there"


def _runs_near(path: Path) -> str:
    """What to give in place of a folder that has no journal: a lab run of several cells has one in each of theirs."""
    inside = sorted(str(found.parent) for found in path.parent.glob(f"*/{NAME}")) if path.name == NAME else []
    return f"one of {', '.join(inside[:_NAMED])}" if inside else "the --out folder of a run"


def _parse(line: bytes) -> dict[str, Any] | str:
    """The object on a line, or what is wrong with it."""
    try:
        record = json.loads(line.decode())
    except ValueError as error:  # no UTF-8, or no JSON
        return str(error)
    return record if isinstance(record, dict) else "not a JSON object"


def _checked_header(path: Path, record: dict[str, Any]) -> dict[str, Any]:
    if record.get("journal") != FORMAT:
        raise JournalError(f"{path}: not a journal of format {FORMAT}; give the --out folder of a run")
    return record


def _wrong_with(record: Mapping[str, Any]) -> str:
    """Why a Case's record cannot be used, or an empty string."""
    for key, kind in _RECORD.items():
        if not isinstance(record.get(key), kind):
            return f"no usable {key!r}"
    return "" if record["verdict"] in _VERDICTS else f"unknown verdict {record['verdict']!r}"


_RECORD: Final[Mapping[str, type | tuple[type, ...]]] = {
    "case": str, "id": str, "verdict": str, "checks": int, "summary": str, "seconds": (int, float),
}  # fmt: skip
_VERDICTS: Final = frozenset(v.value for v in Verdict)
