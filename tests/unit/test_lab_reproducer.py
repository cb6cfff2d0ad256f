"""Reproducers of a lab cell: small where that shows the same in the cell, and whole where it does not."""

from random import Random
from types import SimpleNamespace

import pytest

from harness.case import Blob, Case, Memory, Observation, Run
from harness.cpuid import CpuidEntry, CpuProfile
from harness.exits import Halt
from harness.judge import Result
from harness.lab import reproducer
from harness.lab.errors import LostError
from harness.lab.plan import PlanReader
from harness.lab.reproducer import reduce_reproducers
from harness.lab.session import Cell
from harness.lockstep import Difference
from harness.modes import CODE_BASE, setup
from harness.report.emit_c import emit_c
from harness.report.reduce import thinned
from harness.state import FieldDiff
from harness.verdict import Verdict

PROFILE = CpuProfile((CpuidEntry(0, eax=1), CpuidEntry(1), CpuidEntry(0x80000001, edx=1 << 29)))
FILLING = Random(1).randbytes(10_000)
HOST = "Linux 7.3 somewhere"


@pytest.fixture(scope="module")
def case():
    start = setup("real", entry=CODE_BASE, profile=PROFILE)
    ram = Memory(start.blobs).plus(Blob(CODE_BASE, b"\xf4"), Blob(0x18000, FILLING))
    return Case("gpr/halt@real#0", ram, start.state, PROFILE, actions=(Run(8),), bits=16)


def differs(got):
    return Difference(0, 0, Observation(Halt(), {}), Observation(Halt(), {}), (FieldDiff("rax", 1, got),))


@pytest.fixture
def cell(monkeypatch):
    """A cell whose next run shows ``.shows``, or raises it; ``.ran`` are the Cases that it was given."""
    cell = SimpleNamespace(name="toy", configuration=SimpleNamespace(name="toy", edits=()), shows=None, ran=[])
    cell._command = lambda image: Cell._command(cell, image)
    cell.example = lambda name: Cell.example(cell, name)

    class Toy:
        def __init__(self, cell, plan, profile, folder, take, **more):
            self.plan, self.take = plan, take

        def run(self, chosen):
            with self.plan.path.open("rb") as file:
                cell.ran += [case for case, _ in PlanReader(file).group(0)]
            if isinstance(cell.shows, Exception):
                raise cell.shows
            verdict = Verdict.MISMATCH if cell.shows else Verdict.AGREE
            self.take(Result(self.plan.names[0], self.plan.ids[0], verdict, 1, "", 0.1, cell.shows), 0)

    monkeypatch.setattr(reproducer, "CellRun", Toy)
    return cell


@pytest.fixture
def whole(case, tmp_path):
    file = tmp_path / "case.c"
    file.write_text(emit_c(case, differs(2), HOST))
    return file


def test_the_model_takes_away_what_no_instruction_reads(case):
    thin = thinned(case, differs(2))
    assert thin.name == case.name
    images = [made.memory.image(case.shape.slots[0]) for made in (case, thin)]
    assert FILLING[:64] in images[0]
    assert FILLING[:64] not in images[1]


def test_what_shows_the_same_is_small_and_names_a_command_of_the_lab(case, cell, whole, tmp_path):
    before = whole.read_text()
    cell.shows = differs(2)
    reduce_reproducers(cell, None, [(case, differs(2), whole)], HOST, tmp_path, print)
    assert len(cell.ran) == 1
    assert len(whole.read_text()) < len(before) - 4 * len(FILLING)
    assert "kvm-harness lab run --kernel BZIMAGE --config toy -k 'gpr/halt@real#0'" in whole.read_text()
    assert HOST in whole.read_text()
    assert not list(tmp_path.rglob("plan"))


@pytest.mark.parametrize("shows", [differs(3), None, LostError("the emulator died")])
def test_what_does_not_stays_whole(case, cell, whole, tmp_path, shows):
    before = whole.read_text()
    cell.shows = shows
    reduce_reproducers(cell, None, [(case, differs(2), whole)], HOST, tmp_path, print)
    assert whole.read_text() == before
    assert not list(tmp_path.rglob("plan"))
