"""Series of real kernels: the demonstration's verdicts, faults that only a kernel can have, SIGKILL, git bisect.

The demonstration (ci/qemu/demo_series.py) goes first: what it builds and records, the others find in the cache.
"""

import json
import os
import random
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from harness.lab.edits import MUTANTS, edited, load_all

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "ci" / "qemu" / "demo_series.py"
HARNESS = [sys.executable, "-m", "harness"]
QUICK = ("--quick",)
EMUL = ("--config", "svm-emul", "--tier", "smoke")


@pytest.fixture(scope="module")
def demo():
    return runpy.run_path(str(SCRIPT))


@pytest.fixture(scope="module")
def tree(demo):
    return demo["make_tree"]()


def series(tree, out, range_, *options, **more):
    command = [*HARNESS, "series", range_, "--tree", tree, "--out", out, *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, **more)
    assert "Traceback" not in done.stderr
    return done


def words(done):
    """What was printed, on one line: in a mail lines are wrapped."""
    return " ".join(done.stdout.split())


def report(out):
    return json.loads((out / "report.json").read_text())


def verdicts(out):
    """What a series came to, without times and paths."""
    return [
        (p["outcome"], p["behaviour"], p["reached"], [(c["cell"], c["verdict"], c["counts"]) for c in p["cells"]])
        for p in report(out)["patches"]
    ]


def test_the_demonstration(tmp_path):
    done = subprocess.run([sys.executable, SCRIPT, "--out", tmp_path / "out"], check=False)
    assert done.returncode == 0


def test_a_patch_that_does_not_compile(tree, tmp_path):
    done = series(tree, tmp_path / "out", "base..fault-compile", *QUICK)
    assert done.returncode == 1
    said = r"arch/x86/kvm/emulate\.c:3157:\d+: error: 'struct operand' has no member named 'first_val'"
    assert re.search(said, words(done))


def test_a_kernel_that_panics(tree, tmp_path):
    done = series(tree, tmp_path / "out", "base..fault-panic", *QUICK)
    assert done.returncode == 1
    assert "it does not boot: Kernel panic - not syncing: KVM is not in the mood" in words(done)


def test_a_kernel_that_has_lost_its_kvm(tree, tmp_path):
    done = series(tree, tmp_path / "out", "base..fault-kvm", *QUICK)
    assert done.returncode == 1
    (patch,) = report(tmp_path / "out")["patches"]
    assert patch["cells"][0]["verdict"] == "regressed"


def test_a_warning_is_blamed_on_the_cases_that_meet_it(tree, tmp_path):
    done = series(tree, tmp_path / "out", "base..fault-warn", *QUICK)
    assert done.returncode == 1
    (patch,) = report(tmp_path / "out")["patches"]
    failing = [c for c in patch["cells"][0]["changes"] if c["after"]["verdict"] == "splat"]
    assert failing
    assert all("em_xchg" in c["after"]["summary"] for c in failing)
    assert all("xchg" in c["case"] for c in failing)


def test_a_refactoring_that_changes_what_the_model_allows_is_not_what_it_says(tree, tmp_path):
    done = series(tree, tmp_path / "out", "base..untrue", *EMUL)
    assert done.returncode == 1
    (patch,) = report(tmp_path / "out")["patches"]
    assert patch["outcome"] == "not what it says"
    changes = patch["cells"][0]["changes"]
    assert changes
    assert all("imul" in c["case"] and c["why"].startswith("rflags: BASE showed") and "AF" in c["why"] for c in changes)
    assert list((Path(patch["cells"][0]["folder"]) / "cases").glob("*.c"))


def test_what_fails_everywhere_ends_early_and_is_known_to_have_been_executed(demo, tree, tmp_path):
    git, file = demo["git"], "arch/x86/kvm/regs.c"
    git(tree, "checkout", "--quiet", "base")
    good = git(tree, "show", f"base:{file}")
    wrong = good.replace("kvm_r12_write_raw(vcpu, regs->r12)", "kvm_r12_write_raw(vcpu, 0)")
    bad = demo["commit"](tree, "base", "KVM: x86: Lose R12\n", {file: wrong})
    assert series(tree, tmp_path / "out", f"base..{bad}", *QUICK).returncode == 1
    (patch,) = report(tmp_path / "out")["patches"]
    assert patch["reached"]["executed"] == ["__set_regs"]
    assert re.fullmatch(r"5\d\d of \d{4} cases ran", patch["cells"][0]["extent"])


@pytest.mark.parametrize("name", ["set-regs-truncates-r12", "segment-base-32-bit", "emul-cmov-keeps-upper-half"])
def test_a_seeded_bug_is_bad_and_its_revert_is_good(demo, tree, tmp_path, name):
    bug = load_all(MUTANTS)[name]
    git = demo["git"]
    git(tree, "checkout", "--quiet", "base")
    texts = edited([bug], tree, (7, 3)).texts
    before = {file: git(tree, "show", f"base:{file}") for file in texts}
    bad = demo["commit"](tree, "base", f"KVM: {bug.title}\n", texts)
    tip = demo["commit"](tree, bad, f"Revert that\n\nThis reverts commit {bad}.\n", before)
    done = series(tree, tmp_path / "out", f"base..{tip}", "--config", bug.configurations[0])
    assert done.returncode == 1
    first, second = report(tmp_path / "out")["patches"]
    assert (first["outcome"], second["outcome"]) == ("bad", "good")
    assert "mended" in second["behaviour"]
    assert "mismatch" in done.stdout


def test_a_series_by_mail(demo, tree, tmp_path):
    mails = subprocess.run(
        ["git", "-C", tree, "format-patch", "--stdout", "base..demo~4"], capture_output=True, text=True, check=True
    ).stdout
    (tmp_path / "series.mbox").write_text(mails)
    command = [*HARNESS, "series", "--mbox", tmp_path / "series.mbox", "--base", "base", "--tree", tree]
    done = subprocess.run([*command, "--out", tmp_path / "out", *QUICK], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert [p["behaviour"] for p in report(tmp_path / "out")["patches"]] == ["same code", "same code"]


def test_killed_at_random_it_ends_with_the_same_verdicts(tree, tmp_path):
    assert series(tree, tmp_path / "whole", "base..demo", *EMUL).returncode == 1
    began = time.monotonic()
    assert series(tree, tmp_path / "timed", "base..demo", *EMUL).returncode == 1
    lasted = time.monotonic() - began
    out = tmp_path / "killed"
    command = [*HARNESS, "series", "base..demo", "--tree", tree, "--out", out, *EMUL]
    for _ in range(3):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(random.uniform(0.05, 0.5) * lasted)
        process.send_signal(signal.SIGKILL)
        process.wait()
        time.sleep(1.0)
        assert not emulators(out)
    assert series(tree, out, "base..demo", *EMUL).returncode == 1
    assert verdicts(out) == verdicts(tmp_path / "whole")


def emulators(out):
    """Emulators whose console goes into this folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if b"qemu" in (process / "cmdline").read_bytes():
                found += [f for f in (process / "fd").iterdir() if str(out) in os.readlink(f)]
        except OSError:
            continue
    return found


def test_a_full_disk_is_lost_and_the_series_goes_on_once_there_is_room(tree, tmp_path):
    """A real small file system, where root may mount one."""
    out = tmp_path / "small"
    out.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", out], check=False).returncode:
        pytest.skip("this user may not mount a file system")
    try:
        done = series(tree, out / "series", "base..demo~2", *QUICK)
        assert done.returncode == 4, done.stderr
        assert "make room" in done.stderr
        subprocess.run(["mount", "-o", "remount,size=200m", out], check=True)
        assert series(tree, out / "series", "base..demo~2", *QUICK).returncode == 0
    finally:
        subprocess.run(["umount", out], check=True)


def test_interrupted_it_says_how_to_go_on(tree, tmp_path):
    command = [*HARNESS, "series", "base..demo", "--tree", tree, "--out", tmp_path / "out", *QUICK]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    time.sleep(8.0)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "the same command goes on from there" in said
    assert "Traceback" not in said
    assert not emulators(tmp_path / "out")


def test_git_bisect_finds_the_bug(tree):
    """In the demonstration's own tree: a clone would have every kernel compiled anew."""

    def git(*words):
        return subprocess.run(["git", "-C", tree, *words], capture_output=True, text=True, check=True).stdout

    program = str(Path(sys.executable).parent / "kvm-harness")
    try:
        git("bisect", "start", "demo~1", "base")
        said = git(
            "bisect", "run", program, "bisect-run", "--config", "svm-emul", "--tier", "full", "-k", "xchg and long"
        )
    finally:
        git("bisect", "reset")
    assert "KVM: x86: Do without the detour over orig_val in em_xchg()" in said.split("is the first bad commit")[1]
