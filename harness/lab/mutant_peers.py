"""Seeded bugs and upstream's own tests: which of them KVM's selftests and kvm-unit-tests see.

They run on the same kernels. A test counts where the unmodified kernel passes it in little time; it has caught the bug
if it fails, hangs or makes the kernel complain, twice in a row.
"""

from __future__ import annotations

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

LONGEST: Final = 20.0
"""Seconds that a test may take on the unmodified kernel: what runs for minutes is left out."""
_BAD: Final = ("fail", "timeout", "splat")


@dataclass(frozen=True)
class Suites:
    """Built tests of upstream's: folders as ``lab peers`` takes them."""

    selftests: Path | None = None
    unit_tests: Path | None = None

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


def passing(suites: Suites, cell: Cell, folder: Path, progress: Progress) -> list[list[str]]:
    """[suite, name] of the tests that an unmodified kernel passes within LONGEST, the quickest first. LostError."""
    peers = suites.peers(cell, folder, progress)
    progress(f"control: {counted(len(peers), 'test')} of upstream's on the unmodified kernel, {cell.name}")
    good = [r for r in peers.run() if r.outcome == "pass" and r.seconds <= LONGEST]
    return [[r.test.suite, r.test.name] for r in sorted(good, key=lambda r: r.seconds)]


def try_peers(
    name: str, cells: Sequence[tuple[Cell, Sequence[Sequence[str]]]], suites: Suites, folder: Path, progress: Progress
) -> PeerTrial:
    """Run the tests on a kernel with the bug ``name``, cell by cell, up to the first that sees it twice."""
    tests, seconds = 0, 0.0
    for cell, names in cells:
        where = cell.configuration.name
        try:
            peers = suites.peers(cell, folder / where)
            peers.only(names)
            for result in peers.run():
                tests += 1
                seconds += result.seconds
                if result.outcome in _BAD and _again(suites, cell, folder / f"{where}-again", result.test):
                    said = " ".join(result.said.split())[-300:]
                    return PeerTrial(name, where, result.test.name, result.outcome, said, tests, seconds)
        except LostError as error:
            return PeerTrial(name, where, tests=tests, seconds=seconds, problem=str(error))
        progress(f"{name}: {counted(len(names), 'test')} of upstream's passed in {where}")
    return PeerTrial(name, tests=tests, seconds=seconds)


def _again(suites: Suites, cell: Cell, folder: Path, test: PeerTest) -> bool:
    peers = suites.peers(cell, folder)
    peers.only([[test.suite, test.name]])
    return any(result.outcome in _BAD for result in peers.run())


class PeerCampaign:
    """Tries upstream's tests on the seeded bugs of a campaign; results lie beside the campaign's own."""

    def __init__(self, campaign: Campaign, suites: Suites) -> None:
        self._campaign, self._suites = campaign, suites
        self._passing: dict[str, list[list[str]]] = {}

    def run(self, mutants: Sequence[Edit], *, again: bool = False) -> Iterator[PeerTrial]:
        """One result for each that can be tried on this tree, in order. LostError when the control fails."""
        with alone(self._campaign.out):
            for mutant in mutants:
                if self._campaign.without_trying(mutant) is None:
                    yield (None if again else self._found(mutant)) or self._tried(mutant)

    def _file(self, mutant: Edit) -> Path:
        return self._campaign.out / mutant.name / "peers.json"

    def _key(self, mutant: Edit) -> str:
        return digest(self._campaign.kernels_key(mutant), self._suites.key)

    def _found(self, mutant: Edit) -> PeerTrial | None:
        kept = read_json(self._file(mutant))
        return PeerTrial.from_json(kept["trial"]) if kept.get("key") == self._key(mutant) else None

    def _tried(self, mutant: Edit) -> PeerTrial:
        self._campaign.progress(f"{mutant.name}: upstream's tests")
        folder = self._file(mutant).parent / "peers"
        folder.mkdir(parents=True, exist_ok=True)
        with Kernels(self._campaign, mutant, folder) as kernels:
            try:
                cells = [
                    (self._campaign.bench.cell(name, kernels.get(name)), self._good(name))
                    for name in mutant.configurations
                ]
            except (BuildError, EditError) as error:
                return PeerTrial(mutant.name, problem=str(error))
            trial = try_peers(mutant.name, cells, self._suites, folder, self._campaign.progress)
        if not trial.problem:
            write_json(self._file(mutant), {"key": self._key(mutant), "trial": trial.to_json()})
        return trial

    def _good(self, configuration: str) -> list[list[str]]:
        """The tests that the unmodified kernel passes, asked once and kept."""
        if configuration not in self._passing:
            cell = self._campaign.control(configuration).cell
            folder = self._campaign.out / "control" / f"{configuration}-peers"
            key = digest(cell.kernel.digest, cell.emulator.digest, self._suites.key)
            kept = read_json(folder / "passing.json")
            if kept.get("key") != key:
                kept = {"key": key, "tests": passing(self._suites, cell, folder, self._campaign.progress)}
                write_json(folder / "passing.json", kept)
            self._passing[configuration] = kept["tests"]
        return self._passing[configuration]
