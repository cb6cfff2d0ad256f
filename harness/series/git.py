"""The git side of a series: which commits it has, and what git and the lab say against them. Nothing is written."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from harness.lab.errors import LabInputError
from harness.lab.ksource import git, release_in

OLDEST: Final = (6, 1)
"""The first Linux that the lab's kernel configuration, profiles and layouts know."""

_FIELDS: Final = "%H%x00%T%x00%P%x00%an%x00%B"
_NO_CHANGE: Final = re.compile(
    r"\bno\s+(?:intended\s+)?functional\s+changes?\b|\bno\s+change\s+in\s+functionality\b|\bNFCI?\b", re.IGNORECASE
)
_SHOWN: Final = 5


@dataclass(frozen=True)
class Commit:
    """A commit. ``tree`` names its content, ``message`` is all of it."""

    id: str
    tree: str
    parents: tuple[str, ...]
    author: str
    message: str

    @property
    def short(self) -> str:
        """Twelve digits, as kernel people quote commits."""
        return self.id[:12]

    @property
    def subject(self) -> str:
        """The first line of the message."""
        return self.message.strip().partition("\n")[0]

    @property
    def claims_no_change(self) -> bool:
        """The message says "no functional change" in one of its usual forms."""
        return _NO_CHANGE.search(self.message) is not None

    def __str__(self) -> str:
        return f'{self.short} ("{self.subject}")'


@dataclass(frozen=True)
class PatchRange:
    """BASE, and the commits after it in the order in which they are applied."""

    base: Commit
    commits: tuple[Commit, ...]


class Repository:
    """A user's tree as git knows it. ``environment``: git's variables, where more than the tree's objects count.

    Raises LabInputError for what is no git tree.
    """

    def __init__(self, tree: Path, environment: Mapping[str, str] | None = None) -> None:
        self.tree = tree.expanduser().absolute()
        self._environment = environment or {}
        if not self.tree.is_dir():
            raise LabInputError(f"{tree}: no such directory: give --tree a git checkout of Linux")
        try:
            self.git("rev-parse", "--git-dir")
        except LabInputError as error:
            if "not a git repository" not in str(error):
                raise
            raise LabInputError(
                f"{tree} is no git tree: commits are asked for; without git there is kvm-harness lab run --tree"
            ) from error

    def git(self, *words: str) -> str:
        """What git says; LabInputError with its words when it refuses."""
        return git(self.tree, *words, environment=self._environment)

    @property
    def shallow(self) -> bool:
        """The clone has not all of its history."""
        return self.git("rev-parse", "--is-shallow-repository").strip() == "true"

    def commit(self, revision: str) -> Commit:
        """The commit of a name. LabInputError when there is none."""
        try:
            id_ = self.git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}").strip()
        except LabInputError as error:
            more = self._shallow_hint() if self.shallow else f"git -C {self.tree} log --oneline lists what there is"
            raise LabInputError(f"{self.tree} has no commit {revision!r}: {more}") from error
        return _commits(self.git("log", "-1", "-z", f"--format={_FIELDS}", id_))[0]

    def range(self, text: str) -> PatchRange:
        """``BASE..TIP`` (``BASE..`` is up to HEAD). LabInputError for what is no linear series of commits."""
        if not text.strip():
            raise LabInputError("the range is empty: give BASE..TIP")
        if "..." in text or ".." not in text:
            example = text.replace("...", "..") if "..." in text else self._ranges_with(text)
            raise LabInputError(f"{text!r} is no range BASE..TIP: two dots between two commits, as in {example}")
        first, _, last = text.partition("..")
        if not first:
            raise LabInputError(f"{text!r} names no BASE: the commit before the first patch, as in HEAD~3{text}")
        base, tip = self.commit(first), self.commit(last or "HEAD")
        self._check_ancestry(base, tip, first, last or "HEAD")
        commits = _commits(
            self.git("log", "-z", "--reverse", "--topo-order", f"--format={_FIELDS}", tip.id, f"^{base.id}")
        )
        if not commits:
            raise LabInputError(f"{text}: no commits: {first} and {last or 'HEAD'} are the same")
        if merges := [c for c in commits if len(c.parents) > 1]:
            named = "".join(f"\n  {c}" for c in merges[:_SHOWN])
            raise LabInputError(
                f"{text} has {len(merges)} merge commit{'s' * (len(merges) > 1)}: a series is one patch after the "
                f"other; give a range between two merges, or rebase it{named}"
            )
        for commit in (base, commits[-1]):
            self.check_age(commit)
        return PatchRange(base, tuple(commits))

    def _ranges_with(self, text: str) -> str:
        """The ranges that somebody may have meant who gave one commit, of those that are not empty."""
        one = self.commit(text)
        found = [f"{text}~1..{text} for that commit alone"] if one.parents else []
        found += [f"{text}..HEAD for all after it"] if one.id != self.commit("HEAD").id else []
        return ", or ".join(found) or "v7.3..HEAD"

    def release(self, commit: Commit) -> tuple[str, tuple[int, int]]:
        """The release of a commit, as in a Makefile and as numbers. LabInputError for one that is no Linux."""
        try:
            makefile = self.git("show", f"{commit.id}:Makefile")
        except LabInputError as error:
            raise LabInputError(f"{self.tree}: {commit} is no Linux source tree: it has no Makefile") from error
        try:
            return release_in(makefile, f"{self.tree}: {commit}")
        except LabInputError as error:
            raise LabInputError(f"{error}; give a tree of Linux with --tree") from error

    def check_age(self, commit: Commit) -> None:
        """LabInputError for a commit that is no Linux, or an older one than the lab knows."""
        release, series = self.release(commit)
        if series < OLDEST:
            raise LabInputError(
                f"{commit} is Linux {release}: kernels before {OLDEST[0]}.{OLDEST[1]} are unsupported: the lab's "
                "kernel configuration, what its cells expect of a KVM, and the layouts of KVM's registers begin there; "
                "port the series to a newer kernel, or run yours without all that: kvm-harness lab run --kernel BZIMAGE"
            )

    def check_clean(self) -> None:
        """LabInputError when files that git knows have changes that no commit has."""
        said = self.git("status", "--porcelain", "--untracked-files=no", "--ignore-submodules")
        names = [line[3:] for line in said.splitlines()]
        if names:
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            raise LabInputError(
                f"{self.tree} has uncommitted changes, which are in no patch of a series: {', '.join(names[:_SHOWN])}"
                f"{more}: commit or stash them, or leave them out of it by --allow-dirty"
            )

    def _check_ancestry(self, base: Commit, tip: Commit, first: str, last: str) -> None:
        try:
            fork = self.git("merge-base", base.id, tip.id).strip()
        except LabInputError as error:  # no common commit within reach
            why = self._shallow_hint() if self.shallow else "they have no common history"
            raise LabInputError(f"{first} is no ancestor of {last}: {why}") from error
        if fork == tip.id != base.id:
            raise LabInputError(f"{first}..{last} is empty, for {last} is older: give {last}..{first}")
        if fork != base.id:
            raise LabInputError(
                f"{first} is no ancestor of {last}: they part at {self.commit(fork)}; for that series give "
                f"{fork[:12]}..{last}"
            )

    def _shallow_hint(self) -> str:
        return f"this is a shallow clone without it: git -C {self.tree} fetch --unshallow (or --deepen=N), then again"


def _commits(text: str) -> list[Commit]:
    out = []
    words = text.split("\0")
    for n in range(0, len(words) - 1, 5):
        id_, tree, parents, author, message = words[n : n + 5]
        out.append(Commit(id_, tree, tuple(parents.split()), author, message))
    return out
