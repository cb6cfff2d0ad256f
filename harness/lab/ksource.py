"""Private copies of kernel trees: what the lab builds from, so that the user's checkout is read and never written.

A copy lives in the cache under the tree's path; bringing it up to date writes only files whose content differs, so that
builds from it are incremental. A git tree's state, uncommitted changes and untracked files included, becomes a git tree
object outside the user's repository, and is checked out from there; any other tree (an unpacked tarball) is compared
file by file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import stat
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from harness.lab.cache import Progress, area, cached, digest, quiet
from harness.lab.debian import FetchError, fetch_package, unpack
from harness.lab.edits import Edit, Edited, edited
from harness.lab.errors import LabError, LabInputError

_SUITES: Final = {
    "6.1": "bookworm",
    "6.12": "bookworm-backports",
    "7.2": "trixie-backports",
    "7.3": "trixie-backports",
}
_TREE_FILES: Final = ("Makefile", "Kbuild", "Kconfig", "arch/x86/kvm/Kconfig")
# What a build inside a tree leaves there. The rest of it goes by `make mrproper` in the copy.
_PRODUCTS: Final = (".o", ".ko", ".a", ".cmd", ".mod", ".order", ".symvers", ".dwo")


def debian_source(series: str, progress: Progress = quiet) -> Path:
    """The unpacked source of Debian's kernel of a series (``"6.1"``, ``"6.12"``, ``"7.3"``) in the cache.

    Do not change what is in there. Raises LabInputError for a series that Debian is not known to have, LabError when it
    cannot be fetched.
    """
    if series not in _SUITES:
        raise LabInputError(f"Debian's source of Linux {series} is not known here: choose one of {', '.join(_SUITES)}")
    progress(f"source of Linux {series}: looking for Debian's linux-source-{series}")
    try:
        package = fetch_package(f"linux-source-{series}", _SUITES[series])
    except FetchError as error:
        raise LabError(str(error)) from error

    def make(scratch: Path) -> None:
        progress(f"source of Linux {series}: unpacking {package.name}")
        packed = scratch / "package"
        try:
            unpack(package, packed)
        except FetchError as error:
            raise LabError(str(error)) from error
        (tarball,) = packed.glob("usr/src/linux-source-*.tar.xz")
        done = subprocess.run(
            ["tar", "--extract", "--xz", "--file", tarball, "--directory", scratch, "--no-same-owner"],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise LabError(f"{tarball.name} cannot be unpacked: {done.stderr.strip()}: is xz-utils there, and room?")
        shutil.rmtree(packed)

    # The package's folder in the cache is named by its checksum.
    return cached("sources", package.parent.name[:32], make) / f"linux-source-{series}"


def release_of(tree: Path) -> tuple[str, tuple[int, int]]:
    """(``"7.3.4"``, ``(7, 3)``) of a kernel tree's Makefile. Raises LabInputError when it has none."""
    try:
        head = (tree / "Makefile").read_text(errors="replace")
    except OSError as error:
        raise LabInputError(f"{tree} is no Linux source tree: Makefile: {error.strerror}") from error
    return release_in(head, str(tree))


def release_in(makefile: str, where: str) -> tuple[str, tuple[int, int]]:
    """The same of a Makefile's text; ``where`` is what it is of, for errors."""
    found = dict(re.findall(r"^(VERSION|PATCHLEVEL|SUBLEVEL|EXTRAVERSION) *= *(\S*)", makefile[:2000], re.MULTILINE))
    try:
        series = int(found["VERSION"]), int(found["PATCHLEVEL"])
    except (KeyError, ValueError) as error:
        raise LabInputError(f"{where} is no Linux source tree: its Makefile names no kernel version") from error
    return f"{series[0]}.{series[1]}.{found.get('SUBLEVEL', '0')}{found.get('EXTRAVERSION', '')}", series


class PrivateCopy:
    """The lab's own copy of one kernel tree. One process may use it at a time: harness/lab/kbuild.py sees to that."""

    def __init__(self, tree: Path, folder: Path) -> None:
        self.tree = tree
        self.folder = folder
        self.source = folder / "source"
        self._edited = folder / "edited.json"

    def snapshot(self, revision: str | None) -> str:
        """Names the content of the tree as it is now, or of a revision of it. Raises LabInputError, LabError."""
        raise NotImplementedError

    def environment(self) -> Mapping[str, str]:
        """Variables by which git reads the tree's objects, and writes new ones into the copy's folder.

        What they wrote, :meth:`snapshot` finds too. LabInputError when the tree is no git tree.
        """
        raise LabInputError(f"{self.tree} is no git tree: make one there (git init; git add --all; git commit)")

    def checkout(self, snapshot: str, edits: Iterable[Edit]) -> Edited:
        """Make the copy what ``snapshot`` names, with ``edits`` in it.

        Files that come out as they were keep their time stamps. Raises EditError; the copy is then without edits.
        """
        before: dict[str, tuple[bytes, int]] = {}
        for name in self._names():
            with contextlib.suppress(FileNotFoundError):
                file = self.source / name
                before[name] = file.read_bytes(), file.stat().st_mtime_ns
        self.source.mkdir(parents=True, exist_ok=True)
        self._bring(snapshot)
        if (self.source / ".config").exists() or (self.source / "include" / "config").exists():
            _run(["make", "-s", "mrproper"], self.source)  # the tree had been built in: not what O= can live with
        result = edited(edits, self.source, release_of(self.source)[1])
        self._edited.write_text(json.dumps(sorted(result.texts)))
        for name, text in result.texts.items():
            _write(self.source / name, text.encode(errors="surrogateescape"))
        for name, (content, mtime) in before.items():
            file = self.source / name
            if file.is_file() and file.read_bytes() == content:
                os.utime(file, ns=(mtime, mtime))
        return result

    def _names(self) -> list[str]:
        """The files that are not as the snapshot had them."""
        try:
            names: list[str] = json.loads(self._edited.read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            return []
        return names

    def _bring(self, snapshot: str) -> None:
        raise NotImplementedError


def private_copy(tree: Path) -> PrivateCopy:
    """The copy that belongs to ``tree``, in the cache; not brought up to date yet. Raises LabInputError."""
    tree = tree.expanduser().absolute()
    if not tree.is_dir():
        raise LabInputError(f"{tree}: no such directory: give a Linux source tree")
    if lacking := [name for name in _TREE_FILES if not (tree / name).is_file()]:
        raise LabInputError(f"{tree} is no Linux source tree: it has no {lacking[0]}")
    tree = tree.resolve()
    folder = area("trees") / digest(str(tree))
    folder.mkdir(exist_ok=True)
    (folder / "tree").write_text(f"{tree}\n")
    return _GitCopy(tree, folder) if (tree / ".git").exists() else _PlainCopy(tree, folder)


# --- git trees -------------------------------------------------------------------------------------------------------

# Whatever the user has configured, git must neither start helpers nor leave out files.
_PLAIN: Final = tuple(
    word
    for setting in ("core.fsmonitor=false", "core.splitIndex=false", "core.sparseCheckout=false",
                    "core.hooksPath=/dev/null", "submodule.recurse=false", "advice.graftFileDeprecated=false")
    for word in ("-c", setting)
)  # fmt: skip


def git(
    tree: Path,
    *words: str,
    cwd: Path | None = None,
    environment: Mapping[str, str] | None = None,
    stdin: Path | None = None,
) -> str:
    """What git says about ``tree``; nothing there is written unless ``words`` ask for it.

    ``environment`` is added to the user's, of which git's own variables are left out; ``stdin`` is a file. Raises
    LabInputError with git's words when it refuses, LabError when it is not there or the disk is full.
    """
    clean = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")} | {"LC_ALL": "C"}
    clean |= {"GIT_OPTIONAL_LOCKS": "0", "GIT_NO_LAZY_FETCH": "1", "GIT_TERMINAL_PROMPT": "0"}
    return _run(["git", "-C", str(tree), *_PLAIN, *words], cwd or tree, {**clean, **(environment or {})}, stdin)


class _GitCopy(PrivateCopy):
    def snapshot(self, revision: str | None) -> str:
        if revision is not None:
            return self._git("rev-parse", "--verify", "--end-of-options", f"{revision}^{{tree}}").strip()
        index = self.folder / "snapshot.index"
        theirs = Path(self._git("rev-parse", "--path-format=absolute", "--git-path", "index").strip())
        if theirs.is_file():
            shutil.copy2(theirs, index)  # with its time stamp: git's knowledge of which files are unchanged
        else:
            index.unlink(missing_ok=True)
        index.with_suffix(".index.lock").unlink(missing_ok=True)
        self._git("add", "--all", index=index)
        return self._git("write-tree", index=index).strip()

    def _bring(self, snapshot: str) -> None:
        index = self.folder / "source.index"
        index.with_suffix(".index.lock").unlink(missing_ok=True)
        if not any(self.source.iterdir()):
            index.unlink(missing_ok=True)
        self._git(f"--work-tree={self.source}", "read-tree", "--reset", "-u", snapshot, index=index)

    def environment(self) -> dict[str, str]:
        own = self.folder / "objects"
        own.mkdir(exist_ok=True)
        theirs = git(self.tree, "rev-parse", "--path-format=absolute", "--git-path", "objects").strip()
        return {"GIT_OBJECT_DIRECTORY": str(own), "GIT_ALTERNATE_OBJECT_DIRECTORIES": theirs}

    def _git(self, *arguments: str, index: Path | None = None) -> str:
        environment = self.environment() | ({"GIT_INDEX_FILE": str(index)} if index is not None else {})
        where = git(self.tree, "rev-parse", "--absolute-git-dir").strip()
        git_dir = ["--git-dir", where] if arguments[0].startswith("--work-tree") else []
        return git(self.tree, *git_dir, *arguments, cwd=self.folder, environment=environment)


# --- all others ------------------------------------------------------------------------------------------------------


class _PlainCopy(PrivateCopy):
    """`scan.json`: what the user's tree held when it was last looked at, name: [size, mtime, what]; `what` is a hash of
    the content or a link's target. `held.json`: name: what, of the copy.
    """

    def snapshot(self, revision: str | None) -> str:
        if revision is not None:
            raise LabInputError(f"{self.tree} is no git tree: it has no revision {revision}")
        known = _load(self.folder / "scan.json")
        found: dict[str, list[object]] = {}
        limit = time.time_ns() - 2_000_000_000  # a file this young may change again within one tick of its time stamp
        for name, path, status in _walk(self.tree):
            old = known.get(name)
            if old is not None and old[:2] == [status.st_size, status.st_mtime_ns]:
                found[name] = old
            else:
                mtime = status.st_mtime_ns if status.st_mtime_ns < limit else 0
                found[name] = [status.st_size, mtime, _what(path, status)]
        _store(self.folder / "scan.json", found)
        return digest(*(f"{name}\0{found[name][2]}" for name in sorted(found)))

    def _bring(self, snapshot: str) -> None:
        scan = {name: str(entry[2]) for name, entry in _load(self.folder / "scan.json").items()}
        held: dict[str, str] = _load(self.folder / "held.json")
        for name in self._names():
            held[name] = ""
        stale = [name for name, what in scan.items() if held.get(name) != what]
        gone = [name for name in held if name not in scan]
        if not stale and not gone:
            return
        for name in (*stale, *gone):
            held.pop(name, None)
        _store(self.folder / "held.json", held)  # before the first write: what is interrupted is done again
        for name in gone:
            (self.source / name).unlink(missing_ok=True)
        for name in stale:
            held[name] = self._copy(name)
            if held[name] != scan[name]:
                raise LabError(f"{self.tree / name} changed while the tree was copied: run again")
        _store(self.folder / "held.json", held)

    def _copy(self, name: str) -> str:
        theirs, ours = self.tree / name, self.source / name
        ours.parent.mkdir(parents=True, exist_ok=True)
        if theirs.is_symlink():
            ours.unlink(missing_ok=True)
            ours.symlink_to(os.readlink(theirs))
            return f"link {os.readlink(theirs)}"
        content = theirs.read_bytes()
        _write(ours, content, theirs.stat().st_mode & 0o111)
        return hashlib.sha256(content).hexdigest()


def _walk(root: Path) -> Iterator[tuple[str, Path, os.stat_result]]:
    for folder, folders, files in os.walk(root):
        relative = os.path.relpath(folder, root)
        prefix = "" if relative == "." else f"{relative}/"
        links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        for name in (*files, *links):
            if name.endswith(_PRODUCTS) or (name.startswith("vmlinux") and not prefix):
                continue
            path = Path(folder, name)
            status = path.lstat()
            if stat.S_ISREG(status.st_mode) or stat.S_ISLNK(status.st_mode):
                yield prefix + name, path, status


def _what(path: Path, status: os.stat_result) -> str:
    if stat.S_ISLNK(status.st_mode):
        return f"link {os.readlink(path)}"
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _load(path: Path) -> dict[str, Any]:
    try:
        data: dict[str, Any] = json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
    return data


def _store(path: Path, data: Mapping[str, object]) -> None:
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps(data))
    fresh.replace(path)


def _write(path: Path, content: bytes, executable: int | None = None) -> None:
    """Replace a file in one step; its time stamp is now."""
    if executable is None:
        executable = path.stat().st_mode & 0o111
    fresh = path.with_name(f".{path.name}.new")
    fresh.write_bytes(content)
    fresh.chmod(0o644 | executable)
    fresh.replace(path)


def _run(
    command: list[str], cwd: Path, environment: Mapping[str, str] | None = None, stdin: Path | None = None
) -> str:
    try:
        with (stdin or Path(os.devnull)).open("rb") as given:
            done = subprocess.run(
                command,
                cwd=cwd,
                env=environment,
                stdin=given,
                capture_output=True,
                encoding="utf-8",
                errors="surrogateescape",
                check=False,
            )
    except FileNotFoundError as error:
        raise LabError(f"{command[0]} is not on this machine: apt-get install {command[0]}") from error
    if done.returncode:
        said = "\n".join((done.stderr or done.stdout).strip().splitlines()[:6])
        if "No space left" in said:
            raise LabError(f"{cwd}: no space left: make room, or set KVM_HARNESS_CACHE elsewhere\n{said}")
        raise LabInputError(f"{command[0]} says of {cwd if command[0] == 'make' else command[2]}: {said}")
    return done.stdout
