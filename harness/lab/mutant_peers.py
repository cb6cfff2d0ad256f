"""Seeded bugs and upstream's own tests: which of them KVM's selftests and kvm-unit-tests see.

They run on the same kernels. A test counts where the unmodified kernel passes it in little time; it has caught the bug
if it fails, hangs or makes the kernel complain, twice in a row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from harness.lab.cache import Progress, digest, quiet
from harness.lab.edits import Edit, EditError
from harness.lab.errors import LostError
from harness.lab.kbuild import BuildError
from harness.lab.mutants import Campaign, Kernels, alone, read_json, write_json
from harness.lab.peers import Peers, PeerTest
from harness.lab.session import Cell
from harness.words import counted

SECONDS: Final = 5
"""What a test may take on the unmodified kernel, unless it is said: docs/mutants.md has the durations behind it."""
_ABOUT_REGISTERS: Final = frozenset({"x86/sync_regs_test"})
"""May take twice that: to leave out the one that is about what the seeded bugs break would be unfair."""
_PATIENCE: Final = 5
"""So many times that is what it may take with a bug, before it hangs: the host may be busy."""
_BAD: Final = ("fail", "timeout", "splat")
_FOLDER: Final = "-peers"  # of a configuration's control
_YARDSTICK: Final = "yardstick.json"


@dataclass(frozen=True)
class Suites:
    """Built tests of upstream's: folders as ``lab peers`` takes them; ``seconds`` that a test may take to count."""

    selftests: Path | None = None
    unit_tests: Path | None = None
    seconds: int = SECONDS

    @property
    def key(self) -> str:
        """Changes with the folders (the one of selftests that we build is named by its content)."""
        return digest(str(self.selftests), str(self.unit_tests))

    def peers(self, cell: Cell, folder: Path, progress: Progress = quiet) -> Peers:
        """All of them, on a cell."""
        made = Peers(cell, folder, progress)
        if self.selftests is not None:
            made.add_selftests(self.selftests)
        if self.unit_tests is not None:
            made.add_unit_tests(self.unit_tests)
        return made


@dataclass(frozen=True)
class Yardstick:
    """What the unmodified kernel makes of the tests: (suite, name, outcome, seconds) each, within ``limit``."""

    limit: int
    shown: tuple[tuple[str, str, str, float], ...]

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return asdict(self)

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> Yardstick:
        """The inverse of :meth:`to_json`. KeyError, TypeError or ValueError when it is none."""
        return cls(int(body["limit"]), tuple((str(s), str(n), str(o), float(t)) for s, n, o, t in body["shown"]))

    def counting(self, seconds: int) -> list[list[str]]:
        """[suite, name] of those that pass within ``seconds``, the quickest first."""
        good = [row for row in self.shown if row[2] == "pass" and row[3] <= allowed(row[1], seconds)]
        return [[suite, name] for suite, name, _, _ in sorted(good, key=lambda row: row[3])]

    def left_out(self, seconds: int) -> dict[str, list[str]]:
        """The names of the others, by reason."""
        out = dict[str, list[str]]()
        for _, name, outcome, spent in self.shown:
            if outcome != "pass" or spent > allowed(name, seconds):
                slow = outcome in ("pass", "timeout")
                out.setdefault(f"not through in {allowed(name, seconds)} s" if slow else outcome, []).append(name)
        return out


def allowed(name: str, seconds: int) -> int:
    """What a test may take where tests may take ``seconds``."""
    return 2 * seconds if name in _ABOUT_REGISTERS else seconds


@dataclass(frozen=True)
class PeerTrial:
    """What upstream's tests made of a seeded bug: ``test`` saw it (empty: none did), by ``outcome``."""

    name: str
    configuration: str = ""
    test: str = ""
    outcome: str = ""
    said: str = ""
    tests: int = 0
    seconds: float = 0.0
    problem: str = ""

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return asdict(self)

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> PeerTrial:
        """The inverse of :meth:`to_json`. TypeError when it is none."""
        return cls(**body)


def measure(suites: Suites, cell: Cell, folder: Path, progress: Progress) -> Yardstick:
    """Run all tests on an unmodified kernel, ``suites.seconds`` each and no more. LostError."""
    peers = suites.peers(cell, folder, progress)
    peers.limit(lambda name: allowed(name, suites.seconds))
    progress(f"control: {counted(len(peers), 'test')} of upstream's on the unmodified kernel, {cell.name}")
    return Yardstick(suites.seconds, tuple((r.test.suite, r.test.name, r.outcome, r.seconds) for r in peers.run()))


def try_peers(
    name: str, cells: Sequence[tuple[Cell, Sequence[Sequence[str]]]], suites: Suites, folder: Path, progress: Progress
) -> PeerTrial:
    """Run the tests on a kernel with the bug ``name``, cell by cell, up to the first that sees it twice."""
    tests, seconds = 0, 0.0
    for cell, names in cells:
        where = cell.configuration.name
        try:
            for result in _some(suites, cell, folder / where, names).run():
                tests += 1
                seconds += result.seconds
                if result.outcome in _BAD and _again(suites, cell, folder / f"{where}-again", result.test):
                    said = " ".join(result.said.split())[-300:]
                    return PeerTrial(name, where, result.test.name, result.outcome, said, tests, seconds)
        except LostError as error:
            return PeerTrial(name, where, tests=tests, seconds=seconds, problem=str(error))
        progress(f"{name}: {counted(len(names), 'test')} of upstream's passed in {where}")
    return PeerTrial(name, tests=tests, seconds=seconds)


def _some(suites: Suites, cell: Cell, folder: Path, names: Sequence[Sequence[str]]) -> Peers:
    peers = suites.peers(cell, folder)
    peers.only(names)
    peers.limit(lambda name: _PATIENCE * allowed(name, suites.seconds))
    return peers


def _again(suites: Suites, cell: Cell, folder: Path, test: PeerTest) -> bool:
    return any(result.outcome in _BAD for result in _some(suites, cell, folder, [[test.suite, test.name]]).run())


class PeerCampaign:
    """Tries upstream's tests on the seeded bugs of a campaign; results are apart from the campaign's own.

    Those are cleared away when the suite has changed, and a bug is tried again; for upstream's tests nothing has.
    """

    def __init__(self, campaign: Campaign, suites: Suites) -> None:
        self._campaign, self._suites = campaign, suites
        self._yardsticks: dict[str, Yardstick] = {}
        self._saw: Counter[str] = Counter()  # how many bugs each test saw: those that saw most go first

    def run(self, mutants: Sequence[Edit], *, again: bool = False) -> Iterator[PeerTrial]:
        """One result for each that can be tried on this tree, in order. LostError when the control fails."""
        with alone(self._campaign.out):
            for mutant in mutants:
                if self._campaign.without_trying(mutant) is None:
                    trial = (None if again else self._found(mutant)) or self._tried(mutant)
                    self._saw[trial.test] += 1
                    yield trial

    def left_out(self) -> dict[str, dict[str, list[str]]]:
        """The tests that did not count, by configuration and reason, where the control has run."""
        kept = sorted((self._campaign.out / "control").glob(f"*{_FOLDER}/{_YARDSTICK}"))
        names = [path.parent.name.removesuffix(_FOLDER) for path in kept]
        found = {name: self._kept(name) for name in names}
        return {name: y.left_out(self._suites.seconds) for name, y in found.items() if y is not None}

    def _file(self, mutant: Edit) -> Path:
        return self._campaign.out / "peers" / mutant.name / "result.json"

    def _key(self, mutant: Edit) -> str:
        controls = map(self._control_key, mutant.configurations)
        return digest(self._campaign.kernels_key(mutant), str(self._suites.seconds), *controls)

    def _found(self, mutant: Edit) -> PeerTrial | None:
        kept = read_json(self._file(mutant))
        return PeerTrial.from_json(kept["trial"]) if kept.get("key") == self._key(mutant) else None

    def _tried(self, mutant: Edit) -> PeerTrial:
        self._campaign.progress(f"{mutant.name}: upstream's tests")
        folder = self._file(mutant).parent
        folder.mkdir(parents=True, exist_ok=True)
        with Kernels(self._campaign, mutant, folder) as kernels:
            try:
                cells = [
                    (self._campaign.bench.cell(name, kernels.get(name)), self._counting(name))
                    for name in mutant.configurations
                ]
            except (BuildError, EditError) as error:
                return PeerTrial(mutant.name, problem=str(error))
            trial = try_peers(mutant.name, cells, self._suites, folder, self._campaign.progress)
        if not trial.problem:
            write_json(self._file(mutant), {"key": self._key(mutant), "trial": trial.to_json()})
        return trial

    # --- the control

    def _control_folder(self, configuration: str) -> Path:
        return self._campaign.out / "control" / f"{configuration}{_FOLDER}"

    def _control_key(self, configuration: str) -> str:
        """Changes with everything that the unmodified kernel's results depend on."""
        bench = self._campaign.bench
        return digest(
            self._campaign.unmodified_key(configuration), bench.hardware.digest, bench.image.digest,
            bench.accel(configuration), self._suites.key,
        )  # fmt: skip

    def _kept(self, configuration: str) -> Yardstick | None:
        """What the unmodified kernel has shown before, if no test had less time than it is to have now."""
        kept = read_json(self._control_folder(configuration) / _YARDSTICK)
        if kept.get("key") != self._control_key(configuration):
            return None
        found = Yardstick.from_json(kept["yardstick"])
        return found if found.limit >= self._suites.seconds else None

    def _counting(self, configuration: str) -> list[list[str]]:
        """The tests that count in a configuration: the unmodified kernel is asked once."""
        if configuration not in self._yardsticks:
            found = self._kept(configuration)
            if found is None:
                folder = self._control_folder(configuration)
                cell = self._campaign.unmodified(configuration)
                found = measure(self._suites, cell, folder, self._campaign.progress)
                key = self._control_key(configuration)
                write_json(folder / _YARDSTICK, {"key": key, "yardstick": found.to_json()})
            self._yardsticks[configuration] = found
        counting = self._yardsticks[configuration].counting(self._suites.seconds)
        return sorted(counting, key=lambda row: -self._saw[row[1]])
