"""``kvm-harness bisect-run``: is the kernel that is checked out here good? For `git bisect run`.

Exit status: 0 good, 1 bad, 125 cannot be tested (git skips the commit), 128 the command cannot be used at all, 130
interrupted (git stops).
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from harness.journal import JournalError
from harness.lab.cache import area, digest
from harness.lab.configurations import Configuration
from harness.lab.edits import named
from harness.lab.errors import LabError, LabInputError
from harness.lab.hardware import Emulator
from harness.lab.image import Image
from harness.lab.kbuild import kernel_from_tree
from harness.lab.kernel import Kernel
from harness.lab.run import Options
from harness.lab.session import Cell
from harness.selection import SelectionError, check
from harness.series.behaviour import Change, change_text, worst_first
from harness.series.builds import Flavour
from harness.series.cells import CellJob, CellResult, run_job
from harness.series.git import Repository
from harness.series.line import BOOT, CellLine, result_or_nothing
from harness.verdict import Verdict

GOOD: Final = 0
BAD: Final = 1
SKIP: Final = 125
UNUSABLE: Final = 128
_SHOWN: Final = 10
_WORDS: Final = {GOOD: "good", BAD: "bad", SKIP: "cannot be tested"}


@dataclass(frozen=True)
class Question:
    """What is asked of every kernel. ``base``: a revision that is good by definition; its failures do not count.

    ``same``: with a base, behaviour that differs from it is bad even where the model allows it.
    """

    tree: Path
    configurations: tuple[Configuration, ...]
    options: Options
    emulator: Emulator
    image: Image
    accel: Callable[[Configuration], str]
    base: str | None = None
    same: bool = False
    jobs: int | None = None


def bisect(question: Question, say: Callable[[str], None]) -> int:
    """Build the tree's kernel as it is checked out, run it, and answer git. LabInputError when nothing can be asked."""
    repository = Repository(question.tree)
    head = repository.commit("HEAD")
    base = repository.commit(question.base) if question.base is not None else None
    folder = area("bisect") / digest(str(repository.tree.resolve()))
    answers = []
    for config in question.configurations:
        line = CellLine(config.name, config, Flavour("default", config.edits))
        if base is not None:
            kernel = _kernel(question, config, base.id, say)
            results = [_run(question, config, kernel, folder / f"base-{config.name}-{n}", str(n)) for n in (1, 2)]
            if problem := next((r.problem for r in results if r.problem), ""):
                raise LabError(f"{question.base} cannot be judged in {config.name}: {problem}")
            line.begin(*results)
        try:
            repository.check_age(head)
            kernel = _kernel(question, config, _revision(repository), say)
        except LabInputError as error:  # too old, does not build, does not take the configuration's edit
            say(f"{head} cannot be tested: {error}")
            return SKIP
        result = _run(question, config, kernel, folder / config.name, "")
        answers.append(_answer(question, line, result, say, known_base=base is not None))
    answer = BAD if BAD in answers else SKIP if SKIP in answers else GOOD
    say(f"{head}: {_WORDS[answer]}")
    return answer


def _revision(repository: Repository) -> str | None:
    """HEAD, or None for the files as they are where some have changed since: a fix that is tried on each commit."""
    try:
        repository.check_clean()
    except LabInputError:
        return None
    return "HEAD"


def _kernel(question: Question, config: Configuration, revision: str | None, say: Callable[[str], None]) -> Kernel:
    edits = [named(name) for name in config.edits]
    return kernel_from_tree(
        question.tree, revision=revision, edits=edits, progress=say, jobs=question.jobs
    ).kernel


def _run(question: Question, config: Configuration, kernel: Kernel, folder: Path, shared: str) -> CellResult:
    cell = Cell(config, kernel, question.emulator, question.image, question.accel(config))
    shutil.rmtree(folder, ignore_errors=True)
    return result_or_nothing(run_job(CellJob(cell, folder, question.options, shared)))


def _answer(
    question: Question, line: CellLine, result: CellResult, say: Callable[[str], None], *, known_base: bool
) -> int:
    changes = line.now.changes(line.records(result))
    failures = [c for c in changes if c.fails and (known_base or c.name != BOOT)]  # without BASE it may be the lab
    others = [c for c in changes if not c.fails] if question.same and known_base else []
    for change in _first(worst_first([*failures, *others])):
        say(f"{line.name}: {change.name}: {change_text(change)}")
    if failures or others:
        return BAD
    if result.problem or any(r["verdict"] == Verdict.LOST.value for r in result.records.values()):
        say(f"{line.name}: lost: {result.problem or 'some cases were'}")
        return SKIP
    ran = any(r["verdict"] != Verdict.UNSUPPORTED.value for r in result.records.values())
    return GOOD if ran else SKIP


def _first(changes: Iterable[Change]) -> list[Change]:
    return list(changes)[:_SHOWN]


def bisect_run(args: argparse.Namespace) -> int:
    """The verb."""
    from harness.lab.boot import outer_acceleration
    from harness.lab.cli import hardware
    from harness.lab.image import base_image
    from harness.series.cli import chosen_configurations, say

    try:
        check(args.k)
        if args.same_behaviour and args.base is None:
            raise LabInputError("--same-behaviour compares with a good commit: give it with --base REV")
        repository = Repository(args.tree)
        repository.release(repository.commit("HEAD"))  # what is no Linux has no commit that can be tested
        configs = chosen_configurations(args.config)
        question = Question(
            args.tree, tuple(configs), Options(tier=args.tier, select=args.k, machines=args.machines),
            hardware(configs, args.qemu), base_image(say),
            lambda c: "tcg" if c.needs else outer_acceleration(c.extension), args.base, args.same_behaviour, args.jobs,
        )  # fmt: skip
        return bisect(question, say)
    except (LabInputError, SelectionError) as error:
        say(f"kvm-harness: {error}")
        return UNUSABLE
    except (LabError, JournalError) as error:
        say(f"kvm-harness: {error}")
        return SKIP
