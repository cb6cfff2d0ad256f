"""APX under a real KVM: a kernel of our own on the emulated hardware. Builds kernels: minutes, the first time.

The cells themselves are `kvm-harness lab run --config apx,apx-compact`; here is what they are to be trusted for.
"""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest

from harness.lab.configurations import CONFIGURATIONS
from harness.lab.edits import named
from harness.lab.hardware import pinned_qemu
from harness.lab.image import base_image
from harness.lab.kbuild import kernel_from_tree
from harness.lab.ksource import debian_source
from harness.lab.results import CellOutcome
from harness.lab.run import Options, run_cell
from harness.lab.session import Cell
from harness.verdict import Verdict

APX = CONFIGURATIONS["apx"]


def run(folder: Path, select: str, *edits: str) -> CellOutcome:
    tree = debian_source("7.3", print)
    kernel = kernel_from_tree(tree, edits=[named(name) for name in (*APX.edits, *edits)], progress=print).kernel
    cell = Cell(APX, kernel, pinned_qemu(print), base_image(print))
    return run_cell(cell, folder, Options("smoke", select), print, io.StringIO())


def test_the_self_test_is_told_before_anything_about_kvm(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "harness", "lab", "run", "--config", "apx", "--tier", "smoke", "-k", "apx_off"]
    done = subprocess.run([*command, "--out", str(tmp_path / "out")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    told = next(n for n, line in enumerate(lines) if line.startswith("APX self-test of QEMU"))
    assert "221 passed, 0 failed" in lines[told]
    assert not any("apx × " in line for line in lines[:told])


def test_kvm_keeps_extended_registers_over_everything_that_ends_a_run(tmp_path: Path) -> None:
    outcome = run(tmp_path / "out", "apx_exits or apx_nested or apx_off")
    assert not outcome.problem
    assert {r["verdict"] for r in outcome.records} <= {Verdict.AGREE.value, Verdict.UNSUPPORTED.value}
    assert sum(r["checks"] for r in outcome.records) > 350


@pytest.mark.parametrize(
    ("mutant", "register"),
    [
        ("apx-get-xsave-r23-is-r22", "r23"),
        ("apx-set-xsave-keeps-stale", "r16"),
        ("apx-get-xsave-only-enabled", "r16"),
        ("apx-lost-on-nested-vmrun", "r16"),
        ("apx-xcr0-with-mpx", "xcr0"),
    ],
)
def test_a_seeded_bug_is_caught_and_the_register_named(tmp_path: Path, mutant: str, register: str) -> None:
    outcome = run(tmp_path / "out", named(mutant).select, mutant)
    bad = [r for r in outcome.records if r["verdict"] == Verdict.MISMATCH.value]
    assert any(register in r["summary"] for r in bad), [r["summary"] for r in bad[:10]]
