"""The suite in the lab, on Debian's stock kernel: it agrees, and every way to lose a machine ends as it should."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Final

import pytest

import harness.lab.warm
from harness.journal import read_run
from harness.lab.cache import area
from harness.lab.configurations import configuration
from harness.lab.errors import LabError, LostError
from harness.lab.hardware import pinned_qemu
from harness.lab.image import base_image
from harness.lab.initramfs import initramfs, modules_to_load
from harness.lab.kernel import debian_kernel
from harness.lab.payload import runner_payload
from harness.lab.planner import cell_plan
from harness.lab.profile import load_profile
from harness.lab.run import Options, run_cell
from harness.lab.session import Cell, CellRun
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


def test_reproducers_of_what_fails_are_small_and_compile(cell, tmp_path, monkeypatch):
    monkeypatch.setattr("harness.lab.run.load_known", lambda release: ())  # so that what is known fails
    emulated = replace(cell, configuration=configuration("svm-emul"))
    options = Options(machines=1, most_bad=3, reduce=True, only=frozenset({"forced/alu/aam7@prot32#0"}))
    outcome = run_cell(emulated, tmp_path, options, print, io.StringIO())
    (record,) = [r for r in outcome.records if r["verdict"] == "mismatch"]
    (source,) = (tmp_path / "cases").glob("*.c")
    assert source.stem == record["id"]
    assert source.stat().st_size < 30_000
    assert "lab run --kernel BZIMAGE --config svm-emul -k 'forced/alu/aam7@prot32#0'\n" in source.read_text()
    subprocess.run(["gcc", "-O2", "-Wall", "-Wextra", "-Werror", "-o", tmp_path / "repro", source], check=True)


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
    with pytest.raises(LostError, match=r"before the suite began.*panic"):
        run(replace(cell, configuration=broken), plan, profile, tmp_path)


def test_a_kernel_that_finds_no_root_is_lost_and_says_so(cell, plan, profile, tmp_path):
    without = replace(cell.kernel, initramfs=None)  # stock kernels have virtio and squashfs as modules
    with pytest.raises(LostError, match=r"before the suite began: .*panic.*Unable to mount root"):
        run(replace(cell, kernel=without), plan, profile, tmp_path)


@pytest.fixture(scope="module")
def modules(cell):
    """The /lib/modules/<release> of the cell's kernel."""
    found = [p.parent for p in area("kernel").rglob("modules.builtin") if p.parent.name == cell.kernel.release]
    assert len(found) == 1
    return found[0]


def test_a_kernel_without_squashfs_is_refused(modules, tmp_path):
    lesser = tmp_path / "modules"
    shutil.copytree(modules, lesser, ignore=shutil.ignore_patterns("squashfs.ko*", "virtio_blk.ko*"))
    done = lab("--kernel", str(next(modules.parent.rglob("vmlinuz"))), "--modules", str(lesser))
    assert done.returncode == 2
    assert "has no virtio_blk, no squashfs, neither built in" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_kernel_without_kvm_is_regressed(cell, modules, tmp_path):
    lesser = initramfs([m for m in modules_to_load(modules) if not m.name.startswith("kvm")])
    without = replace(cell, kernel=replace(cell.kernel, initramfs=lesser))
    said = []
    outcome = run_cell(without, tmp_path, Options("smoke"), said.append, io.StringIO())
    assert (outcome.status, outcome.problem) == (1, "")
    assert [r["verdict"] for r in outcome.records] == ["regressed"]
    assert any("no KVM: this kernel made no /dev/kvm (the processor has svm)" in line for line in said)


def test_a_processor_without_virtualization_is_lost(cell, plan, profile, tmp_path):
    without = replace(cell.configuration, cpu="max,-svm")
    with pytest.raises(LabError, match=r"no /dev/kvm .the processor has neither svm nor vmx") as error:
        run(replace(cell, configuration=without), plan, profile, tmp_path)
    assert error.value.status == 4


def test_an_emulator_that_is_not_there_is_lost_and_says_what_to_do(cell, plan, profile, tmp_path):
    gone = replace(cell, emulator=replace(cell.emulator, binary=tmp_path / "qemu-system-x86_64"))
    with pytest.raises(LostError, match="is not there: run `kvm-harness lab build`"):
        run(gone, plan, profile, tmp_path)


def test_a_cell_that_is_not_through_at_its_deadline_is_lost_and_keeps_what_came(cell, plan, profile, tmp_path):
    results = Results()
    late = CellRun(cell, plan, profile, tmp_path, results, machines=1)
    late._take = lambda result, allowed: (results(result, allowed), setattr(late, "_deadline", 0.0))
    with pytest.raises(LostError, match=r"deadline of 0 minutes passed; .* Cases were run: give more time"):
        late.run(range(len(plan.names)))
    assert 0 < len(results) < len(plan.names)
    assert results.verdicts == {Verdict.AGREE}


def test_an_empty_cache_without_a_network_says_what_to_do(tmp_path):
    nowhere = {"KVM_HARNESS_CACHE": str(tmp_path), "KVM_HARNESS_DEBIAN_MIRROR": "http://127.0.0.1:9/debian"}
    done = lab("--debian", SERIES, "--tier", "smoke", env={**os.environ, **nowhere})
    assert done.returncode == 4, done.stdout + done.stderr
    assert "127.0.0.1" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], check=True)
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_is_said_and_what_fitted_is_readable(small_disk):
    done = lab("--debian", SERIES, "--tier", "smoke", "--out", str(small_disk / "out"))
    assert done.returncode == 4, done.stdout + done.stderr
    assert "No space left on device" in done.stderr
    assert "Traceback" not in done.stderr
    assert len(read_run(small_disk / "out").records) > 10


def test_two_runs_at_once_do_not_meet(tmp_path):
    words = [*HARNESS, "lab", "run", "--debian", SERIES, "-k", FEW, "--machines", "1", "--out"]
    both = [subprocess.Popen([*words, tmp_path / n], stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for n in "ab"]
    texts = [process.communicate(timeout=600)[0].decode() for process in both]
    assert [process.returncode for process in both] == [0, 0], texts
    counts = [len(read_run(tmp_path / n).records) for n in "ab"]
    assert counts[0] == counts[1] > 100


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


# --- machines that need not boot ---


@pytest.fixture
def own_machines(tmp_path, monkeypatch):
    """Kept machines of this test alone."""
    monkeypatch.setattr("harness.lab.warm.KIND", f"machine-{tmp_path.name}")
    yield
    shutil.rmtree(area(f"machine-{tmp_path.name}"))


def test_a_machine_that_goes_on_shows_what_one_that_boots_does(cell, plan, profile, tmp_path, own_machines):
    said, found = [], []
    for folder in ("cold", "warm", "again"):
        found.append(run(cell, plan, profile, tmp_path / folder, 1000, progress=said.append))
    started = [line.split(" vmlinux")[0] for line in said if " vmlinux on " in line]
    assert started == ["starting", "going on with", "going on with"]
    assert [(r.name, r.verdict, r.checks) for r in found[0]] == [(r.name, r.verdict, r.checks) for r in found[1]]
    assert [(r.name, r.verdict, r.checks) for r in found[0]] == [(r.name, r.verdict, r.checks) for r in found[2]]


def test_a_kept_machine_that_is_of_no_use_is_made_anew(cell, plan, profile, tmp_path, own_machines):
    run(cell, plan, profile, tmp_path / "1", 10)
    (state,) = Path(area(harness.lab.warm.KIND)).glob("*/state")
    state.write_bytes(state.read_bytes()[:100_000])
    said = []
    assert len(run(cell, plan, profile, tmp_path / "2", 10, progress=said.append)) == 10
    assert any("the kept machine is of no use, so one boots" in line for line in said)
    assert state.stat().st_size > 1_000_000


def test_what_is_lost_after_going_on_is_asked_of_one_that_boots(cell, plan, profile, tmp_path, own_machines):
    run(cell, plan, profile, tmp_path / "1", 10)
    said, killed = [], []

    def take(result, allowed):
        if len(killed) < 1:
            killed.extend(emulators(os.getpid()))
            os.kill(killed[0], signal.SIGKILL)

    CellRun(cell, plan, profile, tmp_path / "2", take, machines=1, progress=said.append).run(range(1000))
    assert [line.split(" vmlinux")[0] for line in said if " vmlinux on " in line] == ["going on with", "starting"]


def test_cold_machines_boot_and_are_not_kept(cell, plan, profile, tmp_path, own_machines):
    said = []
    for folder in "ab":
        run(cell, plan, profile, tmp_path / folder, 10, progress=said.append, cold=True)
    assert sum("starting vmlinux" in line for line in said) == 2
    assert not list(area(harness.lab.warm.KIND).glob("*"))


WARN = """------------[ cut here ]------------
WARNING: CPU: 0 PID: 1 at arch/x86/kvm/regs.h:12 kvm_read_cr0+0x1/0x2 [kvm]
---[ end trace 0000000000000000 ]---"""


AFTER: Final = 'until [ "$(cat /sys/kernel/debug/kvm/exits)" -gt 300 ]; do sleep 0.1; done; '
"""Shell that waits until guests have run: the suite has begun."""


RUNNER: Final = "PYTHONPATH=/payload {}/usr/bin/python3 -S -s -B -m harness.lab.agent\n"
WARNS: Final = "while read -r line; do echo \"$line\" > /dev/kmsg; done <<'EOF'\n" + WARN + "\nEOF\n"
"""Shell that has the kernel's log warn."""


def with_start(monkeypatch, lines, *, once=False):
    """Payloads whose start script does ``lines`` beside the runner, once the suite has begun; $agent is the runner."""
    begin_with(monkeypatch, "agent=$$\n(" + AFTER + lines + ") &\n" + RUNNER.format("exec "), once=once)


def begin_with(monkeypatch, lines, *, once=False):
    """Payloads whose start script is ``lines``; with ``once`` only the first."""
    script = "#!/bin/sh\n" + lines
    disks = [runner_payload(start=script.encode()), *([runner_payload()] if once else [])]
    monkeypatch.setattr("harness.lab.session.runner_payload", lambda progress: disks.pop(0) if disks[1:] else disks[0])


def test_a_warning_of_the_kernel_is_blamed_on_one_case(cell, plan, profile, tmp_path, monkeypatch):
    with_start(monkeypatch, WARNS)
    results = run(cell, plan, profile, tmp_path, len(plan.names), cold=True)
    splats = [r for r in results if r.verdict is Verdict.SPLAT]
    assert len(splats) == 1
    assert "kvm_read_cr0" in splats[0].summary
    assert len(results) == len(plan.names) + 1  # the Case has a verdict of its own, too


def test_a_panic_in_the_suite_is_the_kernels_and_the_rest_still_runs(cell, plan, profile, tmp_path, monkeypatch):
    with_start(monkeypatch, "echo c > /proc/sysrq-trigger", once=True)
    results = run(cell, plan, profile, tmp_path, len(plan.names), cold=True)
    splats = [r for r in results if r.verdict is Verdict.SPLAT]
    assert len(splats) == 1
    assert "panic" in splats[0].summary.lower()
    assert {r.name for r in results if r.id} == set(plan.names)


def test_machines_that_panic_over_and_over_are_given_up(cell, plan, profile, tmp_path, monkeypatch):
    monkeypatch.setattr("harness.lab.session.BOOTS", 2)
    with_start(monkeypatch, "echo c > /proc/sysrq-trigger")
    with pytest.raises(LostError, match="2 machines were lost; given up"):
        run(cell, plan, profile, tmp_path, len(plan.names), cold=True)


def test_a_runner_that_is_killed_costs_a_machine_and_no_verdict(cell, plan, profile, tmp_path, monkeypatch):
    with_start(monkeypatch, "kill -9 $agent", once=True)
    results = run(cell, plan, profile, tmp_path, 600, cold=True)
    assert [r.name for r in results] == list(plan.names[:600])
    assert results.verdicts <= {Verdict.AGREE, Verdict.KNOWN, Verdict.SUSPECT}
    assert len(list(tmp_path.glob("boot-*"))) == 2


def test_a_kernel_that_falls_silent_once_is_asked_again(cell, plan, profile, tmp_path, monkeypatch):
    monkeypatch.setattr("harness.lab.conversation.SILENCE_LIMIT", 10.0)
    with_start(monkeypatch, "kill -STOP $agent", once=True)
    results = run(cell, plan, profile, tmp_path, 600, cold=True)
    assert [r.name for r in results] == list(plan.names[:600])
    assert Verdict.SPLAT not in results.verdicts
    assert len(list(tmp_path.glob("boot-*"))) == 2
    (silent,) = tmp_path.glob("boot-*/silent.txt")
    assert silent.read_text().count("RIP=") == 2
    assert "HLT=1" in silent.read_text(), "nothing runs there"


def test_a_kernel_that_falls_silent_again_is_bad(cell, plan, profile, tmp_path, monkeypatch):
    monkeypatch.setattr("harness.lab.conversation.SILENCE_LIMIT", 10.0)
    monkeypatch.setattr("harness.lab.session.BOOTS", 2)
    begin_with(
        monkeypatch, "agent=$$\n(" + AFTER.replace("300", "0") + "kill -STOP $agent) &\n" + RUNNER.format("exec ")
    )
    results = Results()
    with pytest.raises(LostError, match="2 machines were lost; given up"):
        CellRun(cell, plan, profile, tmp_path, results, machines=1, cold=True).run(range(200))
    splats = [r for r in results if r.verdict is Verdict.SPLAT]
    assert len(splats) == 1
    assert "fell silent for 10 s" in splats[0].summary


def test_a_guest_kernel_that_resets_itself_is_bad(cell, plan, profile, tmp_path, monkeypatch):
    with_start(monkeypatch, "echo b > /proc/sysrq-trigger", once=True)
    results = run(cell, plan, profile, tmp_path, 600, cold=True)
    splats = [r for r in results if r.verdict is Verdict.SPLAT]
    assert len(splats) == 1
    assert "the guest kernel reset itself" in splats[0].summary
    assert {r.name for r in results if r.id} == set(plan.names[:600])


# --- before the first Case and after the last ---


@pytest.mark.parametrize(
    ("lines", "name"),
    [
        (WARNS + RUNNER.format("exec "), "kernel/boot-log/WARNING-at-arch-x86-kvm-regs.h-kvm_read_cr0-kvm"),
        (RUNNER.format("") + WARNS, "kernel/log/WARNING-at-arch-x86-kvm-regs.h-kvm_read_cr0-kvm"),
        (RUNNER.format("") + "echo c > /proc/sysrq-trigger\n", "kernel/log/Kernel-panic-not-syncing-sysrq-triggered"),
        (RUNNER.format("") + "echo b > /proc/sysrq-trigger\n", "kernel/shutdown/the-guest-kernel-reset-itself"),
    ],
    ids=["warning-before", "warning-after", "panic-after", "reset-after"],
)
def test_what_the_kernel_does_outside_of_cases_is_bad(cell, tmp_path, monkeypatch, own_machines, lines, name):
    begin_with(monkeypatch, lines)
    options = Options("smoke", select=FEW, machines=1)
    outcome = run_cell(cell, tmp_path, options, print, io.StringIO())
    assert (outcome.status, outcome.problem) == (1, "")
    bad = [r for r in outcome.records if r["verdict"] == "splat"]
    assert [(r["case"].startswith(name), r["id"]) for r in bad] == [(True, "")], bad
    found = read_run(tmp_path)
    assert found.complete
    assert len(found.records) == found.header["chosen"] + 1 > 50


def test_a_machine_that_dies_before_it_says_what_kvm_can_do_is_followed_by_one_that_is_asked(
    cell, plan, profile, tmp_path, monkeypatch
):
    begin_with(
        monkeypatch,
        "agent=$$\n(" + AFTER.replace("300", "0") + "kill -9 $agent) &\n" + RUNNER.format("exec "),
        once=True,
    )
    asked = CellRun(cell, plan, profile, tmp_path, lambda *_: None, machines=1, cold=True)
    asked.run(range(200))
    assert asked.probed is not None
    assert profile.lost(asked.probed) == []
    assert len(list(tmp_path.glob("boot-*"))) == 2


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
