"""A series as it was mailed: `git am` in a work tree of the lab's own, so that its commits can be built like others.

The commits become objects beside the private copy of the user's tree; neither the user's checkout nor their
repository learns of them. They come out the same whenever the same mails are applied to the same commit.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from harness.lab.cache import Progress
from harness.lab.errors import LabInputError
from harness.lab.ksource import PrivateCopy, git
from harness.series.git import Commit, Repository
from harness.words import counted

_IDENTITY: Final = {"GIT_COMMITTER_NAME": "kvm-harness", "GIT_COMMITTER_EMAIL": "kvm-harness@localhost"}
_PLACE: Final = re.compile(r"\[[^]]*?\b0*(\d+)/0*(\d+)\]")
_GZIP: Final = b"\x1f\x8b"
_SPECIAL: Final = re.compile(r"[][*?!#\\ ]")  # in patterns of gitignore(5)
_REJECT_LINES: Final = 40


class ApplyError(LabInputError):
    """A patch does not apply. The text names it, and shows what was rejected."""


def apply_mbox(copy: PrivateCopy, mbox: Path, base: Commit, progress: Progress) -> Commit:
    """The last commit of ``mbox`` on top of ``base``; it is found with ``copy.environment()``.

    ``copy`` must be locked by the caller (harness.lab.kbuild.workspace). Raises LabInputError for what is no mailbox
    with patches, ApplyError when a patch does not apply, LabError.
    """
    with _work_tree(copy, read_mailbox(mbox).files) as work:
        progress(f"{mbox.name}: applying its patches to {base}")
        work.checkout(base)
        try:
            work.git("am", "--quiet", "--empty=drop", "--committer-date-is-author-date", str(mbox.absolute()))
        except LabInputError as error:
            raise work.rejected(mbox, error) from error
        tip = work.repository().commit("HEAD")
    if tip.id == base.id:
        raise LabInputError(f"{mbox} has no patch that changes anything")
    return tip


@dataclass(frozen=True)
class Mailbox:
    """What the patches of a mailbox name: their files, and how many there are by ``[PATCH 2/5]``.

    ``missing`` are the numbers of those that are not in it.
    """

    files: frozenset[str]
    count: int = 0
    missing: tuple[int, ...] = ()

    def __str__(self) -> str:
        if not self.missing:
            return ""
        numbers = ", ".join(map(str, self.missing))
        return f"without patch{'es' * (len(self.missing) > 1)} {numbers} of {self.count}"


def read_mailbox(mbox: Path) -> Mailbox:
    """What is in a mailbox, as ``git am`` reads it: base64 and quoted-printable mails, too.

    LabInputError for what cannot be read, holds no patch or one that git cannot parse, or is out of order.
    """
    try:
        with mbox.open("rb") as file:
            start = file.read(2)
    except OSError as error:
        raise LabInputError(f"{mbox}: {error.strerror}: give --mbox a file of patches as they were mailed") from error
    if start == _GZIP:
        raise LabInputError(f"{mbox} is compressed: gunzip it")
    with tempfile.TemporaryDirectory(prefix="kvm-harness-mbox-") as name:
        folder = Path(name)
        with contextlib.suppress(LabInputError):  # what git cannot split has no mails
            git(folder, "mailsplit", "-b", f"-o{folder}", "--", str(mbox.absolute()))
        mails = sorted(folder.iterdir())
        patches = [patch for number, mail in enumerate(mails, 1) if (patch := _patch(mail, number, mbox)).files]
    if not patches:
        raise LabInputError(
            f"{mbox} holds no patch by mail: give what `git format-patch --stdout` or `b4 am` writes, or a mailbox "
            "with the series"
        )
    numbers, counts = [p.number for p in patches], {p.count for p in patches}
    files = frozenset(name for patch in patches for name in patch.files)
    if len(counts) > 1 or 0 in counts:  # not one series as `git format-patch -n` numbers it
        return Mailbox(files)
    if numbers != sorted(set(numbers)):
        said = ", ".join(map(str, numbers))
        raise LabInputError(f"{mbox} holds the patches {said} in this order: `b4 am` sorts a series")
    (count,) = counts
    return Mailbox(files, count, tuple(sorted({*range(1, count + 1)} - {*numbers})))


@dataclass(frozen=True)
class _Patch:
    """One mail's: its files, with the old names of those renamed; its ``number`` of ``count``, 0 if it has none."""

    files: frozenset[str]
    number: int = 0
    count: int = 0


def _patch(mail: Path, number: int, mbox: Path) -> _Patch:
    """What one mail holds; no files if it is no patch. LabInputError for a damaged one."""
    message, patch = mail.with_suffix(".message"), mail.with_suffix(".patch")
    subject = "a mail without a subject"
    try:
        said = git(mail.parent, "mailinfo", "-k", str(message), str(patch), stdin=mail)
        subject = next((line[9:] for line in said.splitlines() if line.startswith("Subject: ")), subject)
        if not patch.stat().st_size:
            return _Patch(frozenset())
        # Forwards it names the files as they become, backwards as they were.
        directions = ((), ("--reverse",))
        named = [git(mail.parent, "apply", "--allow-empty", "--numstat", "-z", *d, str(patch)) for d in directions]
    except LabInputError as error:
        words = str(error).partition(": ")[2]
        raise LabInputError(
            f"{mbox}: mail {number} holds a patch that git cannot read: {subject}\n{words}"
        ) from error
    files = frozenset(record.split("\t")[-1] for record in "".join(named).split("\0") if record)
    place = _PLACE.match(subject)
    return _Patch(files, int(place[1]), int(place[2])) if place else _Patch(files)


@contextlib.contextmanager
def _work_tree(copy: PrivateCopy, files: frozenset[str]) -> Iterator[_WorkTree]:
    folder = copy.folder / "mail"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        yield _WorkTree(copy, folder, files)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class _WorkTree:
    """A repository of one branch, which borrows the user's objects, and only those files that patches touch."""

    def __init__(self, copy: PrivateCopy, folder: Path, files: frozenset[str]) -> None:
        self.folder = folder
        self._environment = {**copy.environment(), **_IDENTITY}
        folder.mkdir()
        git(folder, "init", "--quiet", ".")
        shallow = Path(git(copy.tree, "rev-parse", "--path-format=absolute", "--git-path", "shallow").strip())
        if shallow.is_file():
            shutil.copyfile(shallow, folder / ".git" / "shallow")
        patterns = "".join("/" + _SPECIAL.sub(r"\\\g<0>", name) + "\n" for name in sorted(files))
        (folder / ".git" / "info").mkdir(exist_ok=True)
        (folder / ".git" / "info" / "sparse-checkout").write_text(patterns, errors="surrogateescape")

    def git(self, *words: str) -> str:
        return git(self.folder, "-c", "core.sparseCheckout=true", *words, environment=self._environment)

    def repository(self) -> Repository:
        return Repository(self.folder, self._environment)

    def checkout(self, commit: Commit) -> None:
        self.git("checkout", "--quiet", "--detach", commit.id)

    def rejected(self, mbox: Path, error: LabInputError) -> ApplyError:
        """Which patch it was, and what of it has no place."""
        state = self.folder / ".git" / "rebase-apply"
        if not (state / "next").is_file():
            return ApplyError(f"{mbox}: {error}")
        number, last = ((state / name).read_text().strip() for name in ("next", "last"))
        message = (state / "final-commit").read_text(errors="replace") if (state / "final-commit").is_file() else ""
        subject = message.strip().partition("\n")[0] or "a mail without a subject"
        with contextlib.suppress(LabInputError):
            self.git("apply", "--reject", "--whitespace=nowarn", str(state / "patch"))
        rejects = sorted(self.folder.rglob("*.rej"))
        shown = "\n".join(path.read_text(errors="replace").rstrip() for path in rejects).splitlines()
        words = re.sub(r"^hint:.*\n?", "", str(error), flags=re.MULTILINE).strip()
        words = words.replace(f"git says of {self.folder}: ", "")
        lines = [f"  {line}".rstrip() for line in shown[:_REJECT_LINES]]
        if len(shown) > _REJECT_LINES:
            lines.append(f"  ... and {counted(len(shown) - _REJECT_LINES, 'more line')}")
        hint = "give --base the commit that the series was made on (its `base-commit:` line), or a rebased series"
        head = f"{mbox}: mail {number} of {last} does not apply: {subject}"
        return ApplyError("\n".join([head, words, *lines, hint]))
