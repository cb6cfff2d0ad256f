"""The suite in the lab, on Debian's stock kernel: it agrees, and every way to lose a machine ends as it should."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from harness.journal import read_run
from harness.lab.configurations import configuration
from harness.lab.errors import LabError, LostError
from harness.lab.hardware import pinned_qemu
from harness.lab.image import base_image
from harness.lab.kernel import debian_kernel
from harness.lab.planner import cell_plan
from harness.lab.profile import load_profile
from harness.lab.session import Cell, CellRun, runner_payload
from harness.verdict import Verdict

HARNESS = [sys.executable, "-m", "harness"]
SERIES = "7.3"
FEW = "gpr/xchg and long"  # some hundred Cases


def lab(*words, **more):
    return subprocess.run([*HARNESS, "lab", "run", *words], capture_output=True, text=True, timeout=900, **more)


@pytest.fixture(scope="module")
def cell():
    return Cell(configuration("svm"), debian_kernel(SERIES, print), pinned_qemu(print), base_image(print))


@pytest.fixture(scope="module")
def profile(cell):
    found = load_profile("svm", cell.kernel.series)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def plan(cell, profile):
    return cell_plan(cell.configuration, profile, "smoke", print)


class Results(list):
    """What a CellRun reports."""

    def __call__(self, result, allowed):
        self.append(result)

    @property
    def verdicts(self):
        return {r.verdict for r in self}


def run(cell, plan, profile, folder, count=200, **more):
    results = Results()
    CellRun(cell, plan, profile, folder, results, machines=1, **more).run(range(count))
    return results


def test_smoke_tier_on_a_stock_kernel_is_good(tmp_path):
    done = lab("--debian", SERIES, "--tier", "smoke", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    found = read_run(tmp_path)
    assert found.complete
    assert sum(r["checks"] for r in found.records) >= 4000
    assert (tmp_path / "junit.xml").exists()
    assert (tmp_path / "results.ktap").read_text().startswith("KTAP version 1")


def test_a_file_that_is_no_kernel_is_refused(tmp_path):
    bad = tmp_path / "bzImage"
    bad.write_bytes(b"no kernel" * 1000)
    done = lab("--kernel", str(bad))
    assert done.returncode == 2
    assert str(bad) in done.stderr
    assert "Traceback" not in done.stderr


def test_a_selection_of_nothing_is_not_0(tmp_path):
    done = lab("--debian", SERIES, "--tier", "smoke", "-k", "nosuchcase", "--out", str(tmp_path / "out"))
    assert done.returncode == 2
    assert "no Case matches" in done.stderr


def test_a_kernel_that_panics_at_boot_is_lost(cell, plan, profile, tmp_path):
    broken = replace(cell.configuration, parameters=("init=/nonexistent", "rdinit=/nonexistent"))
    with pytest.raises(LostError, match="before the suite began"):
        run(replace(cell, configuration=broken), plan, profile, tmp_path)


def test_a_kernel_whose_kvm_does_not_load_is_lost(cell, plan, profile, tmp_path):
    without = replace(cell.configuration, cpu="max,-svm")
    with pytest.raises(LabError, match="/dev/kvm"):
        run(replace(cell, configuration=without), plan, profile, tmp_path)


def emulators(parent):
    """Processes below ``parent`` that are emulators, by their command."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
            command = (stat.parent / "cmdline").read_bytes()
        except OSError:
            continue
        if int(fields[1]) == parent and b"qemu-system" in command.split(b"\0")[0]:
            found.append(int(stat.parent.name))
    return found


def begin(out, *words):
    process = subprocess.Popen(
        [*HARNESS, "lab", "run", "--debian", SERIES, "--tier", "smoke", "--out", str(out), *words],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    journal = out / "journal.jsonl"
    deadline = time.monotonic() + 300
    while not journal.exists() or len(journal.read_text().splitlines()) < 100:
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return process


def test_an_emulator_killed_in_the_middle_costs_no_result(tmp_path):
    process = begin(tmp_path / "out")
    os.kill(emulators(process.pid)[0], signal.SIGKILL)
    text, _ = process.communicate(timeout=600)
    assert process.returncode == 0, text
    assert "machine lost" in text
    names = [r["case"] for r in read_run(tmp_path / "out").records]
    assert len(names) == len(set(names)) > 4000


def test_ctrl_c_leaves_results_and_no_emulator(tmp_path):
    process = begin(tmp_path / "out")
    below = emulators(process.pid)
    process.send_signal(signal.SIGINT)
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 130, text
    assert "Traceback" not in text
    assert len(read_run(tmp_path / "out").records) >= 99
    assert below
    assert not any(Path(f"/proc/{pid}").exists() for pid in below)


WARN = """------------[ cut here ]------------
WARNING: CPU: 0 PID: 1 at arch/x86/kvm/regs.h:12 kvm_read_cr0+0x1/0x2 [kvm]
---[ end trace 0000000000000000 ]---"""


def with_start(monkeypatch, lines):
    """Payloads whose start script does ``lines`` in the background, ten seconds on."""
    script = b"#!/bin/sh\n(sleep 10; " + lines.encode() + b") &\n"
    script += b"PYTHONPATH=/payload exec /usr/bin/python3 -S -s -B -m harness.lab.agent\n"
    made = runner_payload(start=script)
    monkeypatch.setattr("harness.lab.session.runner_payload", lambda progress: made)


def test_a_warning_of_the_kernel_is_blamed_on_one_case(cell, plan, profile, tmp_path, monkeypatch):
    with_start(monkeypatch, "while read -r line; do echo \"$line\" > /dev/kmsg; done <<'EOF'\n" + WARN + "\nEOF\n")
    results = run(cell, plan, profile, tmp_path, len(plan.names))
    splats = [r for r in results if r.verdict is Verdict.SPLAT]
    assert len(splats) == 1
    assert "kvm_read_cr0" in splats[0].summary


def test_a_panic_in_the_suite_is_the_kernels_and_the_rest_still_runs(cell, plan, profile, tmp_path, monkeypatch):
    with_start(monkeypatch, "[ -e /tmp/once ] || echo c > /proc/sysrq-trigger")
    results = Results()
    with pytest.raises(LostError, match="machines were lost"):  # every machine panics ten seconds on
        CellRun(cell, plan, profile, tmp_path, results, machines=1).run(range(len(plan.names)))
    assert Verdict.SPLAT in results.verdicts
    assert any("panic" in r.summary.lower() for r in results if r.verdict is Verdict.SPLAT)
    assert sum(r.verdict is Verdict.AGREE for r in results) > 100


def test_what_a_profile_has_and_the_kernel_lacks_is_regressed(cell, profile, tmp_path):
    more = replace(profile, capabilities={**profile.capabilities, "KVM_CAP_OF_TOMORROW": 1})
    now = CellRun(cell, None, None, tmp_path, lambda *_: None).probe()
    assert profile.lost(now) == []
    assert more.lost(now) == ["capability KVM_CAP_OF_TOMORROW"]


def test_a_damaged_profile_says_what_to_do(tmp_path, monkeypatch):
    (tmp_path / "svm@7.3.json").write_text(json.dumps({"profile": 99}))
    monkeypatch.setattr("harness.lab.profile.FOLDER", tmp_path)
    with pytest.raises(LabError, match="--write-profile"):
        load_profile("svm", "7.3")
