"""The kernels of a series: each commit built in each flavour, its code against that of the last one that built."""

from __future__ import annotations

import gzip
import json
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from harness.lab.cache import Progress
from harness.lab.edits import named
from harness.lab.kbuild import BuildError, BuiltKernel, Keep, Variant, kernel_from_tree, kernel_key
from harness.series.code import CodeChange, CodeRecord, compare, record
from harness.series.git import Commit
from harness.series.normal import OF
from harness.series.state import read, write
from harness.series.verdict import Build, Code

KVM_OBJECTS: Final = ("arch/x86/kvm/", "virt/kvm/")
_RECORD: Final = "code.json.gz"
_NOT_RUN: Final = ".orc_unwind"  # tables of stack unwinding: of no account for what a cell reaches
_VERSION: Final = "2"  # of what is kept of a build: raise it when records are made differently


@dataclass(frozen=True)
class Flavour:
    """A way to build a commit: a variant of the lab's kernel configuration, with kernel edits on top."""

    variant: Variant = "default"
    edits: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """For folders and people."""
        return "+".join([self.variant, *self.edits])


@dataclass(frozen=True)
class Built:
    """A kernel with the record of its code."""

    kernel: BuiltKernel
    record: CodeRecord

    @property
    def functions(self) -> tuple[str, ...]:
        """The functions of KVM's objects, as symbols name them."""
        names = {
            item.key.partition("#")[0]
            for file, found in self.record.objects.items() if file.startswith(KVM_OBJECTS)
            for item in found.items if item.kind == "function"
        }  # fmt: skip
        return tuple(sorted(names))

    @property
    def system_map(self) -> Path:
        """Its symbols by address."""
        return self.kernel.vmlinux.with_name("System.map")


@dataclass
class Line:
    """One flavour along the series: the last commit that was built. ``build`` does the next one."""

    tree: Path
    flavour: Flavour
    progress: Progress
    jobs: int | None = None
    last: Built | None = None
    commit: Commit | None = None

    def build(self, commit: Commit, folder: Path) -> tuple[Build, Built | None]:
        """Build a commit, and compare its code with the last one's. What the compiler says against it is in the Build.

        Raises EditError where an edit does not fit the commit, LabError.
        """
        name = self.flavour.name
        kept = folder / f"build-{name}.json"
        edits = [named(edit) for edit in self.flavour.edits]
        key = kernel_key(commit.tree, self.flavour.variant, edits)
        before = read(kept) or {}
        if before.get("key") == key and before.get("errors"):
            return Build(name, before["seconds"], tuple(before["errors"]), before["log"]), None
        began = time.monotonic()
        try:
            kernel = kernel_from_tree(
                self.tree, variant=self.flavour.variant, revision=commit.id, edits=edits,
                keep=Keep("code", _VERSION, self._keep), progress=self.progress, jobs=self.jobs,
            )  # fmt: skip
        except BuildError as error:
            seconds = time.monotonic() - began
            log = folder / f"build-{name}.log"
            folder.mkdir(parents=True, exist_ok=True)
            log.write_bytes(error.log.read_bytes())
            found = Build(name, seconds, error.errors, str(log))
            write(kept, {"key": key, "seconds": seconds, "errors": error.errors, "log": str(log)})
            return found, None
        seconds = float(before["seconds"]) if before.get("key") == key else time.monotonic() - began
        write(kept, {"key": key, "seconds": seconds, "errors": [], "log": ""})
        assert kernel.kept is not None
        built = Built(kernel, _load(kernel.kept))
        code = self._code(built, commit)
        self.last, self.commit = built, commit
        return Build(name, seconds, (), "", code), built

    def _keep(self, build: Path, folder: Path) -> None:
        known = self.last.record if self.last is not None else None
        with gzip.open(folder / _RECORD, "wt", compresslevel=1) as file:
            json.dump(record(build, known).to_json(), file)

    def _code(self, built: Built, commit: Commit) -> Code | None:
        if self.last is None or self.commit is None:
            return None
        against = "" if self.commit.id in commit.parents else str(self.commit)
        return code_of(compare(self.last.record, built.record), against)


def _load(folder: Path) -> CodeRecord:
    with gzip.open(folder / _RECORD, "rt") as file:
        return CodeRecord.from_json(json.load(file))


def code_of(change: CodeChange, against: str = "") -> Code:
    """A change of code as verdicts see it."""
    added = {d.symbol.partition("#")[0] for d in change.added if d.kind == "function"}
    here = [d for d in change.differences if d.new_size is not None and not d.symbol.startswith(_NOT_RUN)]
    functions = {
        (d.symbol.partition(OF)[2] or d.symbol).partition("#")[0]
        for d in here if d.kind in ("function", "table") or d.symbol.startswith(".")
    }  # fmt: skip
    return Code(
        change.identical,
        frozenset(functions - added),
        frozenset(added),
        frozenset(d.symbol for d in here if d.kind == "data"),
        frozenset(user for d in here if d.kind == "data" for user in d.users),
        frozenset(d.symbol for d in change.removed if d.kind in ("function", "data")),
        {r.old: r.new for r in change.renamed},
        frozenset(d.file for d in change.differences),
        tuple(change.text().splitlines()),
        against,
    )


def reaches(code: Code, base: Built, executed: Collection[str], unknown: Collection[str]) -> bool:
    """Whether a cell that executes those functions may execute what has changed. When in doubt, it may.

    ``unknown``: functions of BASE of which nobody knows. Data is reached by those that refer to it; new functions by
    those that changed.
    """
    followed = set(base.functions)
    touched = code.functions | code.users
    return not touched or any(n in executed or n in unknown or n not in followed for n in touched)
