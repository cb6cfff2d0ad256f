"""A cell's run: its options, and its accounts."""

import io
from pathlib import Path

import pytest

from harness.case import Blob, Case, Memory, Run
from harness.cpuid import CpuidEntry, CpuProfile
from harness.lab.configurations import configuration
from harness.lab.errors import LostError
from harness.lab.hardware import Emulator
from harness.lab.image import Image
from harness.lab.kernel import Kernel
from harness.lab.plan import read_plan, write_plan
from harness.lab.profile import load_profile
from harness.lab.run import Options, run_cell
from harness.lab.session import Cell, CellRun
from harness.lab.warm import FEATURE
from harness.modes import CODE_BASE, setup

PROFILE = CpuProfile((CpuidEntry(0, eax=1), CpuidEntry(1), CpuidEntry(0x80000001, edx=1 << 29)))


@pytest.fixture
def results():
    return []


@pytest.fixture
def run(tmp_path, results):
    start = setup("real", entry=CODE_BASE, profile=PROFILE)
    ram = Memory(start.blobs).plus(Blob(CODE_BASE, b"\xf4"))
    cases = [Case(f"a/b@real#{n}", ram, start.state, PROFILE, actions=(Run(8),), bits=16) for n in range(3)]
    write_plan(tmp_path / "plan", "key", cases)
    kernel = Kernel("toy", "7.3.9", "7.3", tmp_path / "bzImage", None, "k" * 32)
    emulator = Emulator("toy", Path("/bin/true"), None, "e" * 32, frozenset({FEATURE}))
    cell = Cell(configuration("svm"), kernel, emulator, Image(tmp_path / "root", "i" * 32))
    plan, profile = read_plan(tmp_path / "plan"), load_profile("svm", "7.3")
    said = []
    made = CellRun(cell, plan, profile, tmp_path, lambda r, _: results.append(r), progress=said.append)
    made.said = said
    return made


# --- accounts ---


def test_a_case_with_a_splat_counts_once(run, results):
    run.agreed(0, 1, 0, 0.1)
    run.splat(0, "WARNING at x")
    assert (run.tally.done, len(results)) == (1, 2)


# --- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cold", [False, True])
def test_cold_machines_are_not_kept(run, tmp_path, monkeypatch, cold):
    made = []

    class Stops(CellRun):
        def run(self, chosen):
            made.append(self)
            raise LostError("enough is known")

    monkeypatch.setattr("harness.lab.run.CellRun", Stops)
    monkeypatch.setattr("harness.lab.run.cell_plan", lambda *_: run.plan)
    outcome = run_cell(run.cell, tmp_path / "out", Options(cold=cold, profile=run.profile), print, io.StringIO())
    assert outcome.problem == "enough is known"
    assert [m.keeps for m in made] == [not cold]
