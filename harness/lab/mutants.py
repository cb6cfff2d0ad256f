"""``kvm-harness mutants``: seeds one bug after the other into a kernel, and tells whether the suite sees it.

Each bug is built into a kernel of its own, incrementally, and the Cases that have to see it run until the first one
that does. What the unmodified kernel of the same tree shows does not count: it runs the same Cases first (the
control).
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from enum import Enum
from io import StringIO
from pathlib import Path
from typing import Any, Final

from harness.journal import open_in
from harness.lab import ksource
from harness.lab.cache import Progress, digest, quiet
from harness.lab.catalogue import edits_for
from harness.lab.configurations import CONFIGURATIONS
from harness.lab.edits import Edit, EditError
from harness.lab.errors import LabError, LabInputError
from harness.lab.hardware import Emulator
from harness.lab.image import Image
from harness.lab.kbuild import BuildError, kernel_from_tree, kernel_key, workspace
from harness.lab.kernel import Kernel
from harness.lab.planner import cell_plan
from harness.lab.profile import Profile, load_profile
from harness.lab.results import CellOutcome
from harness.lab.run import Options, probe_cell, run_cell
from harness.lab.session import Cell
from harness.lab.sources import harness_digest
from harness.selection import matcher
from harness.verdict import BAD_INPUT, Verdict

OUT: Final = Path("out") / "mutants"
_TIER: Final = "full"
_TOLD: Final = 6  # names
_ONE_MACHINE: Final = 2000  # Cases that one machine runs in the time that a second one takes to boot


class Fate(Enum):
    """What became of a seeded bug."""

    CAUGHT = "caught"
    EQUIVALENT = "equivalent"  # nothing can see it, for the reason that the catalogue gives
    SURVIVED = "survived"
    LOST = "lost"  # the infrastructure failed
    UNFIT = "unfit"  # it does not fit this tree, does not compile, or no Case is to see it
    OTHER_KERNELS = "other kernels"  # it is for other series than this tree's


@dataclass(frozen=True)
class Trial:
    """What trying one seeded bug came to. ``case`` and ``differs`` say what caught it; times are in seconds."""

    name: str
    bug_class: int
    fate: Fate
    configuration: str = ""
    case: str = ""
    verdict: str = ""
    differs: tuple[str, ...] = ()
    summary: str = ""
    build: float = 0.0
    run: float = 0.0
    cases: int = 0

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return {**asdict(self), "fate": self.fate.value, "differs": list(self.differs)}

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> Trial:
        """The inverse of :meth:`to_json`. KeyError, TypeError or ValueError when it is none."""
        return cls(**{**body, "fate": Fate(body["fate"]), "differs": tuple(body["differs"])})


def exit_status(fates: Sequence[Fate]) -> int:
    """1 when one survived, 4 when one was lost, 2 when one did not fit or none was tried; else 0."""
    for fate, status in ((Fate.SURVIVED, 1), (Fate.LOST, Verdict.LOST.status), (Fate.UNFIT, BAD_INPUT)):
        if fate in fates:
            return status
    return 0 if Fate.CAUGHT in fates or Fate.EQUIVALENT in fates else BAD_INPUT


@dataclass(frozen=True)
class Bench:
    """Where the kernels run: an emulator, an image, and which accelerator a configuration is to have."""

    hardware: Emulator
    image: Image
    accel: Callable[[str], str]

    def cell(self, configuration: str, kernel: Kernel) -> Cell:
        """A cell with this kernel."""
        return Cell(CONFIGURATIONS[configuration], kernel, self.hardware, self.image, self.accel(configuration))


class Control:
    """The unmodified kernel in one configuration: what it can do, and which Cases it does not pass.

    What it has shown is kept in ``folder`` and not asked again as long as kernel, suite and emulator stay the same.
    """

    def __init__(self, cell: Cell, folder: Path, progress: Progress) -> None:
        self.cell, self._folder, self._progress = cell, folder, progress
        self.profile = self._profile()
        self.plan = cell_plan(cell.configuration, self.profile, _TIER, progress)
        self.key = digest(
            cell.kernel.digest, self.plan.key, cell.emulator.digest, cell.image.digest, cell.accel, harness_digest(),
            _text(self.profile),
        )  # fmt: skip
        known = read_json(folder / "control.json")
        if known.get("key") != self.key:
            known = {}
        self._seen: set[str] = set(known.get("seen", ()))
        self.bad: dict[str, str] = dict(known.get("bad", {}))

    def _profile(self) -> Profile:
        """The checked-in profile, or what the unmodified kernel shows where there is none."""
        found = load_profile(self.cell.configuration.name, self.cell.kernel.series)
        return found or probe_cell(self.cell, self._folder / "probe", self._progress)

    def matching(self, select: str) -> frozenset[str]:
        """The names of the Cases that an expression selects here."""
        selects = matcher(select)
        return frozenset(name for name in self.plan.names if selects(name))

    def ask(self, names: frozenset[str]) -> None:
        """Run those of the Cases that it has not run yet. LabError when it cannot be asked."""
        missing = names - self._seen
        if not missing:
            return
        self._progress(f"control: {len(missing)} Cases on the unmodified kernel, {self.cell.name}")
        shutil.rmtree(self._folder, ignore_errors=True)
        outcome = run_cell(self.cell, self._folder, _options(missing, self.profile), self._progress, StringIO())
        if outcome.problem:
            raise LabError(f"the unmodified kernel cannot be asked: {outcome.problem}")
        lost = {r["case"] for r in outcome.records if Verdict(r["verdict"]) is Verdict.LOST}
        fails = {r["case"] for r in outcome.records if _is_wrong(r)}
        bad = {r["case"]: r["summary"] for r in outcome.records if r["case"] in fails | lost}
        self.bad = {name: said for name, said in self.bad.items() if name not in missing} | bad
        self._seen |= missing - lost  # those are asked again the next time
        write_json(self._folder / "control.json", {"key": self.key, "seen": sorted(self._seen), "bad": self.bad})
        if self.bad:
            self._progress(f"control: {len(self.bad)} Cases are wrong on the unmodified kernel: they prove nothing")


class Campaign:
    """Tries seeded bugs on a kernel tree. Results are in ``out``, and found there again by what they depend on."""

    def __init__(self, tree: Path, out: Path, bench: Bench, progress: Progress = quiet) -> None:
        self.tree, self.out, self.bench, self.progress = tree, out, bench, progress
        self._controls: dict[str, Control] = {}
        self._series = ksource.release_of(tree)[1]
        with workspace(tree, progress=progress) as work:
            self._snapshot = work.copy.snapshot(None)

    def run(self, mutants: Sequence[Edit], *, again: bool = False) -> Iterator[Trial]:
        """Try ``mutants``, in order; ``again`` also those whose result is there. LabError when the control fails."""
        with alone(self.out):
            todo = [m for m in mutants if again or self._found(m) is None]
            self._ask_controls(todo)
            for mutant in mutants:
                trial = None if mutant in todo else self._found(mutant)
                yield trial or self._tried(mutant)

    def _ask_controls(self, mutants: Sequence[Edit]) -> None:
        """All that they will need of the unmodified kernels, in one run each."""
        runnable = [m for m in mutants if self.without_trying(m) is None]
        for name in dict.fromkeys(name for m in runnable for name in m.configurations):
            control = self.control(name)
            wanted = [control.matching(m.select) for m in runnable if name in m.configurations]
            control.ask(frozenset().union(*wanted))

    def control(self, configuration: str) -> Control:
        """The unmodified kernel in a configuration."""
        if configuration not in self._controls:
            cell = self.unmodified(configuration)
            self._controls[configuration] = Control(cell, self.out / "control" / configuration, self.progress)
        return self._controls[configuration]

    def unmodified(self, configuration: str) -> Cell:
        """A cell with the unmodified kernel. LabError."""
        kernel = kernel_from_tree(self.tree, edits=edits_for(None, configuration), progress=self.progress).kernel
        return self.bench.cell(configuration, kernel)

    def unmodified_key(self, configuration: str) -> str:
        """Changes with the unmodified kernel of a configuration."""
        return kernel_key(self._snapshot, edits=edits_for(None, configuration))

    # --- one seeded bug ---

    def without_trying(self, mutant: Edit) -> Trial | None:
        """What is known of it without a run."""
        assert mutant.bug_class is not None
        if mutant.equivalent:
            return Trial(mutant.name, mutant.bug_class, Fate.EQUIVALENT, summary=mutant.equivalent)
        if self._series not in mutant.kernels:
            return Trial(mutant.name, mutant.bug_class, Fate.OTHER_KERNELS, summary=f"for Linux {mutant.kernels}")
        return None

    def _found(self, mutant: Edit) -> Trial | None:
        """Its result, if it is there and nothing that it depends on has changed since."""
        if trial := self.without_trying(mutant):
            return trial
        kept = read_json(self.out / mutant.name / "result.json")
        if kept.get("key") != self.key(mutant):
            return None
        try:
            return Trial.from_json(kept["trial"])
        except (KeyError, TypeError, ValueError):
            return None

    def key(self, mutant: Edit) -> str:
        """Changes with everything that the result depends on."""
        parts = [mutant.select, self.kernels_key(mutant), self.bench.image.digest, harness_digest()]
        for name in mutant.configurations:
            profile = self._controls[name].profile if name in self._controls else self._checked_in(name)
            parts += [self.bench.accel(name), _text(profile)]
        return digest(*parts)

    def kernels_key(self, mutant: Edit) -> str:
        """Changes with its kernels and where they run."""
        keys = (kernel_key(self._snapshot, edits=edits_for(mutant, name)) for name in mutant.configurations)
        return digest(self.bench.hardware.digest, *mutant.configurations, *keys)

    def _checked_in(self, configuration: str) -> Profile | None:
        return load_profile(configuration, "{}.{}".format(*self._series))

    def _tried(self, mutant: Edit) -> Trial:
        self.progress(f"{mutant.name} (class {mutant.bug_class}): {mutant.title}")
        folder = self.out / mutant.name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        trial = self._try(mutant, folder)
        if trial.fate is not Fate.LOST:
            write_json(folder / "result.json", {"key": self.key(mutant), "trial": trial.to_json()})
        return trial

    def _try(self, mutant: Edit, folder: Path) -> Trial:
        """Build it, and run its Cases in its configurations until one sees it."""
        assert mutant.bug_class is not None
        nothing = f"no Case matches its select, {mutant.select!r}"
        found = Trial(mutant.name, mutant.bug_class, Fate.UNFIT, summary=nothing)
        with Kernels(self, mutant, folder) as kernels:
            try:
                for name in mutant.configurations:
                    found = self._in(name, mutant, found, kernels, folder / name)
                    if found.fate in (Fate.CAUGHT, Fate.LOST):
                        break
            except (BuildError, EditError) as error:
                found = replace(found, fate=Fate.UNFIT, summary=str(error))
            return replace(found, build=kernels.seconds)

    def _in(self, name: str, mutant: Edit, before: Trial, kernels: Kernels, folder: Path) -> Trial:
        """What one configuration adds to what is known ``before``. BuildError, EditError."""
        control = self.control(name)
        names = control.matching(mutant.select) - set(control.bad)
        if not names:
            return before
        cell = self.bench.cell(name, kernels.get(name))
        outcome = run_cell(cell, folder, _options(names, control.profile, fail_fast=True), quiet, StringIO())
        now = replace(
            before, fate=Fate.SURVIVED, summary=mutant.title, run=before.run + outcome.seconds,
            cases=before.cases + len(outcome.records),
        )  # fmt: skip
        if caught := _first_bad(outcome, control):
            return replace(
                now, fate=Fate.CAUGHT, summary=caught["summary"], configuration=name, case=caught["case"],
                verdict=caught["verdict"], differs=tuple(caught.get("differs", ())),
            )  # fmt: skip
        if problem := outcome.problem or _lost(outcome):
            return replace(now, fate=Fate.LOST, summary=problem, configuration=name)
        return now

    def build(self, edits: Sequence[Edit], image: Path) -> Kernel:
        """A kernel with ``edits``, its image in ``image``. BuildError, EditError."""
        with workspace(self.tree) as work:
            work.checkout(self._snapshot, edits)
            work.make("vmlinux")
            shutil.copyfile(work.build / "vmlinux", image)
            release = work.release
        return Kernel(
            f"{release} ({', '.join(e.name for e in edits)})", release, "{}.{}".format(*self._series), image, None,
            kernel_key(self._snapshot, edits=edits),
        )  # fmt: skip


class Kernels:
    """The kernels of one seeded bug, one for configurations that need the same edits; gone when it is left."""

    def __init__(self, campaign: Campaign, mutant: Edit, folder: Path) -> None:
        self._campaign, self._mutant, self._folder = campaign, mutant, folder
        self._built: dict[tuple[str, ...], Kernel] = {}
        self.seconds = 0.0

    def __enter__(self) -> Kernels:
        return self

    def __exit__(self, *_: object) -> None:
        for kernel in self._built.values():
            kernel.image.unlink(missing_ok=True)

    def get(self, configuration: str) -> Kernel:
        """The kernel for a configuration, built when it is asked for first. BuildError, EditError."""
        edits = edits_for(self._mutant, configuration)
        key = tuple(edit.name for edit in edits)
        if key not in self._built:
            began = time.monotonic()
            self._built[key] = self._campaign.build(edits, self._folder / f"vmlinux-{len(self._built)}")
            self.seconds += time.monotonic() - began
        return self._built[key]


def _text(profile: Profile | None) -> str:
    """All of a profile decides on Cases and verdicts."""
    return json.dumps(profile.to_json(), sort_keys=True) if profile is not None else ""


def _options(names: frozenset[str], profile: Profile, *, fail_fast: bool = False) -> Options:
    machines = 1 if len(names) < _ONE_MACHINE else 2
    return Options(_TIER, fail_fast=fail_fast, machines=machines, only=names, profile=profile)


def _first_bad(outcome: CellOutcome, control: Control) -> Mapping[str, Any] | None:
    """The first record that fails, and did not on the unmodified kernel."""
    return next((r for r in outcome.records if _is_wrong(r) and r["case"] not in control.bad), None)


def _is_wrong(record: Mapping[str, Any]) -> bool:
    """It fails; or is suspect: what the emulator does by itself, it does under the unmodified kernel too."""
    verdict = Verdict(record["verdict"])
    return verdict.status == 1 or verdict is Verdict.SUSPECT


def _lost(outcome: CellOutcome) -> str:
    """The Cases of which nothing is known: they may have seen it. Empty when there are none."""
    names = [str(r["case"]) for r in outcome.records if Verdict(r["verdict"]) is Verdict.LOST]
    return f"{len(names)} Case{'s' * (len(names) > 1)} lost: {', '.join(names[:_TOLD])}" if names else ""


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """Hold a folder of results. LabInputError when another run has it, JournalError when it cannot be one."""
    fd = open_in(out, "lock")
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise LabInputError(f"{out}: another run is writing there; give another --out") from None
    try:
        yield
    finally:
        os.close(fd)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file; an empty one when there is none."""
    try:
        body = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return body if isinstance(body, dict) else {}


def write_json(path: Path, body: Mapping[str, Any]) -> None:
    """Replace a file in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps(body, indent=1) + "\n")
    fresh.replace(path)
