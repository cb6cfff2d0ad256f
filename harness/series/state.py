"""A series' folder: all that is known so far, so that whatever ends a run, the same command goes on where it was.

    series.json            what is being validated; another series gets another folder
    base/CELL/1, 2, ...    runs of BASE
    patches/NNNN/build-FLAVOUR.json, CELL/, ...
    report.txt, .json, .ktap, .html

Files appear by one rename, with their contents on the disk before it; cells by their journals' last line.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from harness.journal import NAME as JOURNAL
from harness.journal import OUT, open_in, results_folder
from harness.lab.cache import digest
from harness.lab.errors import LabError, LabInputError

NAME: Final = "series.json"
FORMAT: Final = 1
_WHICH: Final = frozenset({"series", "tree", "base", "commits"})  # of what a folder is about: the series itself


class Folder:
    """An open folder of a series; locked for as long as it is open. A context manager.

    Raises LabInputError when it holds another series or something else, or is in use; JournalError or LabError when it
    cannot be written.
    """

    def __init__(self, path: Path, about: Mapping[str, Any]) -> None:
        self.path = path
        if not (results_folder(path) / ".lock").exists():
            self._check_foreign()  # before a file is made there
        self._fd = open_in(path, ".lock")
        try:
            self._lock()
            self._check({"series": FORMAT, **about})
        except BaseException:
            os.close(self._fd)
            raise

    def __enter__(self) -> Folder:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise LabInputError(
                f"{self.path}: another run validates this series there: wait for it, or give another --out"
            ) from None

    def _check_foreign(self) -> None:
        try:
            others = [p for p in self.path.iterdir() if p.name != ".lock"]
        except PermissionError as error:
            raise LabInputError(f"{self.path}: cannot be read: no permission; give another --out") from error
        if read(self.path / NAME) is None and others:
            raise LabInputError(f"{self.path}: holds something else than a series: give another --out")

    def _check(self, about: Mapping[str, Any]) -> None:
        self._check_foreign()
        found = read(self.path / NAME)
        if found is not None and found != json.loads(json.dumps(about)):
            others = [k for k in about if found.get(k) != about[k]]
            which = "another series" if _WHICH.intersection(others) else "this series with other options"
            raise LabInputError(
                f"{self.path}: holds {which} ({', '.join(others)} differ): give another --out, or remove it"
            )
        if found is None:
            write(self.path / NAME, about)

    def base(self, cell: str, run: int) -> Path:
        """The folder of a run of BASE in a cell, counted from 1."""
        return self.path / "base" / cell / str(run)

    def patch(self, number: int) -> Path:
        """The folder of a patch, counted from 1."""
        return self.path / "patches" / f"{number:04d}"


def holds_series(folder: Path) -> bool:
    """Whether a folder is a series', and not a single run's."""
    return (folder / NAME).is_file() and not (folder / JOURNAL).exists()


def default_folder(about: Mapping[str, Any]) -> Path:
    """Where a series goes for which no folder was given: the same one for the same series."""
    return OUT / f"series-{digest(json.dumps(about, sort_keys=True))[:12]}"


def read(path: Path) -> Any:
    """The JSON in a file; None when there is none that is whole."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def write(path: Path, body: object) -> None:
    """Put JSON into a file, in one step. LabError when the disk is full or the folder cannot be written."""
    write_text(path, json.dumps(body, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Replace a file in one step. LabError when the disk is full or the folder cannot be written."""
    fresh = path.with_name(f".{path.name}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(fresh, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
    except OSError as error:
        fresh.unlink(missing_ok=True)
        raise LabError(
            f"{path}: {error.strerror}: what is finished is kept: make room, and give the same command again"
        ) from error
