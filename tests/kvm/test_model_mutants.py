"""The suite can fail: one broken line of the model, and `kvm-harness run` fails and names the right register."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from harness.journal import read_journal

ROOT = Path(__file__).resolve().parents[2]

MUTANTS = {
    # name: (file, line, broken line, -k, register named)
    "flag": ("alu.py", "        if total > mask:\n            f |= CF", "        if total > mask:\n            f |= 0",
             "alu and add_ and prot32", "rflags"),
    "width": ("cpu.py", "g[index] = g[index] & ~0xFFFF | value & 0xFFFF", "g[index] = value & 0xFFFF",
              "gpr and movi and prot32", "r"),
    "segment base": ("memory.py", "return (seg.base + offset) & 0xFFFFFFFF", "return offset & 0xFFFFFFFF",
                     "gpr and load and prot32", "r"),
    "RIP after I/O": ("portio.py", "        port_out(cpu, ", "        cpu.rip = cpu.start_rip + 1; port_out(cpu, ",
                      "io and out_imm and prot32", "rip"),
    "upper half": ("insn.py", "cpu.gpr[index] = f(cpu, cpu.gpr[index] & 0xFFFFFFFF)",
                   "cpu.gpr[index] = cpu.gpr[index] & ~0xFFFFFFFF | f(cpu, cpu.gpr[index] & 0xFFFFFFFF)",
                   "alu and add and long and not user", "r"),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_broken_model_fails_the_run(name, tmp_path):
    file, line, broken, expression, register = MUTANTS[name]
    for folder in ("harness", "guests", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for single in ("pyproject.toml", "known_divergences.toml"):
        shutil.copy(ROOT / single, tmp_path)
    path = tmp_path / "harness" / "reference" / file
    text = path.read_text()
    assert line in text, f"{file} has changed: give this mutant another line"
    path.write_text(text.replace(line, broken))
    command = [sys.executable, "-m", "harness.cli", "run", "-k", expression, "--out", "o"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    bad = [r for r in read_journal(tmp_path / "o") if r.get("verdict") == "mismatch"]
    assert bad
    assert any(r["summary"].startswith(register) for r in bad), bad[:3]
    assert "kvm-harness replay" in done.stdout
