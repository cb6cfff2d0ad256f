"""``series`` and ``bisect-run`` on the command line: what is wrong with their input is said, with its status."""

import errno
import os
import resource
import subprocess
import sys
from dataclasses import replace

import pytest
from series_toy import CASES, Tree, code

from harness.cli import main
from harness.lab.configurations import configuration
from harness.lab.errors import LabError
from harness.lab.hardware import Emulator
from harness.lab.image import Image
from harness.lab.kbuild import workspace
from harness.lab.run import Options
from harness.series import bisect
from harness.series.bisect import BAD, GOOD, SKIP, UNUSABLE, Question
from harness.series.cells import CellResult
from harness.series.state import read, write

HARNESS = [sys.executable, "-m", "harness"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KVM_HARNESS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def tree(tmp_path):
    made = Tree(tmp_path / "linux")
    made.commit("patch", code(mov="return x + 1;"))
    return made


def harness(*words):
    done = subprocess.run([*HARNESS, *map(str, words)], capture_output=True, text=True, timeout=120, check=False)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["base..main"], "is no git tree"), ([], "give the series: a range BASE..TIP, or --mbox FILE --base REV"),
        (["base..main", "--mbox", "x", "--base", "base"], "and no range"), (["--mbox", "x"], "goes with --base REV"),
        (["base..main", "--base", "base"], "--base goes with --mbox"),
        (["base..main", "--config", ""], "no configuration ''"),
    ],
)  # fmt: skip
def test_wrong_words(tmp_path, words, said):
    status, text = harness("series", *words, "--tree", tmp_path)
    assert status == 2
    assert said in text


@pytest.mark.parametrize("option", ["--machines", "--jobs"])
@pytest.mark.parametrize("value", ["0", "-1", "x", "1.5"])
def test_a_senseless_number(option, value):
    status, text = harness("series", f"{option}={value}")
    assert (status, "give a number, 1 or more" in text) == (2, True)


def test_results_in_a_file(tree, tmp_path):
    (tmp_path / "file").write_text("")
    status, text = harness("series", "base..main", "--tree", tree.path, "--out", tmp_path / "file")
    assert (status, "file: cannot write there: it is no folder; give another --out" in text) == (2, True)


def test_results_where_the_lock_cannot_be(tree, tmp_path):
    (tmp_path / "out" / ".lock").mkdir(parents=True)
    status, text = harness("series", "base..main", "--tree", tree.path, "--out", tmp_path / "out")
    assert (status, "out/.lock: cannot write there: Is a directory; give another --out" in text) == (2, True)


def test_an_unknown_range(tree):
    status, text = harness("series", "nope..main", "--tree", tree.path)
    assert (status, "has no commit 'nope'" in text) == (2, True)


def test_a_dirty_tree(tree):
    tree.write("Kconfig", "# changed\n")
    status, text = harness("series", "base..main", "--tree", tree.path)
    assert (status, "uncommitted changes" in text) == (2, True)


def test_an_unknown_configuration(tree):
    status, text = harness("series", "base..main", "--tree", tree.path, "--config", "vax")
    assert (status, "no configuration 'vax'" in text) == (2, True)


def test_a_mailbox_that_does_not_apply(tree, tmp_path):
    (tmp_path / "x.mbox").write_text(tree.git("format-patch", "--stdout", "base..main"))
    status, text = harness("series", "--mbox", tmp_path / "x.mbox", "--base", "main", "--tree", tree.path)
    assert status == 2
    assert "mail 1 of 1 does not apply: patch" in text
    assert "+\treturn x + 1;" in text


@pytest.mark.parametrize(("content", "said"), [(None, "No such file"), ("hello", "holds no patch by mail")])
def test_a_mailbox_that_is_none_waits_for_nobody(tree, tmp_path, content, said):
    """Not even where another run builds the same tree."""
    if content is not None:
        (tmp_path / "x.mbox").write_text(content)
    with workspace(tree.path):
        status, text = harness("series", "--mbox", tmp_path / "x.mbox", "--base", "base", "--tree", tree.path)
    assert status == 2
    assert said in text
    assert "waiting" not in text


def test_a_full_disk(tmp_path):
    """A file-size limit stands in for the full device: the write comes up short in the same way."""
    target = tmp_path / "report.json"
    write(target, {"whole": True})
    pid = os.fork()
    if pid == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            write(target, {"long": "x" * 5000})
        except LabError as error:
            os._exit(error.status if "make room, and give the same command again" in str(error) else 99)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 4
    assert read(target) == {"whole": True}
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]


# --- git bisect run ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        ["--bogus"], ["--tier", "auto"], ["--config", "vax"], ["-k", "("], ["-k", ""], ["--machines", "0"],
        ["--jobs", "x"],
    ],
)  # fmt: skip
def test_bisect_stops_at_a_command_that_cannot_be_used(tree, words):
    assert harness("bisect-run", "--tree", tree.path, *words)[0] == UNUSABLE


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "no room"), RuntimeError("a defect of ours")])
def test_bisect_never_takes_an_error_of_ours_for_a_bad_commit(error, monkeypatch):
    def fails(args):
        raise error

    monkeypatch.setattr("harness.series.bisect.bisect_run", fails)
    assert main(["bisect-run"]) == UNUSABLE


@pytest.mark.parametrize("words", [["--tree", "/"], ["--tree", "/", "-k", "("], ["--bogus"], ["--help"]])
def test_bisect_takes_no_commit_for_good_or_bad_where_nobody_listens(words):
    """Nor does Python's own status for output that it could not write mean anything to git but a bad commit."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as closed:
        done = subprocess.run([*HARNESS, "bisect-run", *words], stdout=closed, stderr=closed, timeout=120, check=False)
    assert done.returncode == UNUSABLE


def test_bisect_stops_without_a_tree(tmp_path):
    status, text = harness("bisect-run", "--tree", tmp_path, "--qemu", "system")
    assert (status, "is no git tree" in text) == (UNUSABLE, True)


def test_bisect_compares_behaviour_with_a_base_only(tree):
    status, text = harness("bisect-run", "--tree", tree.path, "--same-behaviour", "--qemu", "system")
    assert (status, "--same-behaviour compares with a good commit: give it with --base REV" in text) == (UNUSABLE, True)


@pytest.mark.parametrize("makefile", [None, "all:\n"])
def test_bisect_stops_in_a_tree_that_is_not_linux(tree, makefile):
    """No commit of it can be tested: git would skip one after the other."""
    if makefile is None:
        tree.git("rm", "-q", "Makefile")
    else:
        tree.write("Makefile", makefile)
    tree.git("commit", "-q", "-a", "-m", "something else")
    status, text = harness("bisect-run", "--tree", tree.path, "--qemu", "system")
    assert (status, "is no Linux source tree" in text) == (UNUSABLE, True)


def record(verdict, summary="", name=CASES[0]):
    return {"case": name, "id": "0" * 12, "verdict": verdict, "checks": 1, "summary": summary, "seconds": 0.1}


@pytest.fixture
def question(tree):
    emulator = Emulator("toy", tree.path, None, "0" * 32, frozenset())
    image = Image(tree.path, "1" * 32)
    return Question(tree.path, (configuration("svm"),), Options("smoke"), emulator, image, lambda c: "tcg")


def answer(question, monkeypatch, *records, problem="", base=None):
    """What git is told when the lab finds this; the kernel is built for real."""
    found = {"base": base or records, "": records}

    def run_job(job):
        rows = found["base" if job.shared else ""]
        results[job.folder] = CellResult(job.folder, {r["case"]: r for r in rows}, problem)
        return job.folder

    results = {}
    monkeypatch.setattr(bisect, "run_job", run_job)
    monkeypatch.setattr(bisect, "result_or_nothing", lambda folder: results[folder])
    return bisect.bisect(question, print)


@pytest.mark.parametrize(
    ("verdict", "status"),
    [
        ("splat", BAD), ("mismatch", BAD), ("regressed", BAD), ("healed", GOOD), ("suspect", GOOD), ("known", GOOD),
        ("unsupported", SKIP), ("lost", SKIP), ("agree", GOOD),
    ],
)  # fmt: skip
def test_bisect_tells_git_what_the_verdicts_mean(question, monkeypatch, verdict, status):
    assert answer(question, monkeypatch, record(verdict, "x")) == status


def test_one_bad_case_outweighs_what_was_lost(question, monkeypatch):
    rows = [record("lost"), record("mismatch", "x", CASES[1])]
    assert answer(question, monkeypatch, *rows, problem="the emulator died") == BAD


def test_a_lost_cell_is_skipped(question, monkeypatch):
    assert answer(question, monkeypatch, record("agree"), problem="the emulator died") == SKIP


def test_what_base_fails_in_does_not_count(question, monkeypatch):
    bad = record("mismatch", "x")
    assert answer(replace(question, base="base"), monkeypatch, bad) == GOOD
    assert answer(replace(question, base="base"), monkeypatch, bad, base=[record("agree")]) == BAD


def test_other_behaviour_counts_where_it_is_asked_for(question, monkeypatch):
    other = record("agree") | {"allowed": 7}
    with_base = replace(question, base="base")
    assert answer(with_base, monkeypatch, other, base=[record("agree")]) == GOOD
    assert answer(replace(with_base, same=True), monkeypatch, other, base=[record("agree")]) == BAD


def test_a_commit_that_does_not_build_is_skipped(question, tree, monkeypatch, capsys):
    tree.commit("broken", code(mov="return y;"))
    assert answer(question, monkeypatch, record("agree")) == SKIP
    assert "'y' undeclared" in capsys.readouterr().out


def test_an_old_kernel_is_skipped(question, tree, monkeypatch, capsys):
    tree.write("Makefile", (tree.path / "Makefile").read_text().replace("VERSION = 7", "VERSION = 5"))
    tree.commit("old", code())
    assert answer(question, monkeypatch, record("agree")) == SKIP
    assert "kernels before 6.1 are unsupported" in capsys.readouterr().out


def test_a_fix_that_is_not_committed_is_tested_too(question, tree, monkeypatch):
    """As the git bisect manual has it: a fix applied on top of each commit before it is tested."""
    tree.commit("broken", code(mov="return y;"))
    tree.write("arch/x86/kvm/emulate.c", code())
    assert answer(question, monkeypatch, record("agree")) == GOOD


def test_help_has_an_example_and_the_statuses():
    done = subprocess.run([*HARNESS, "bisect-run", "--help"], capture_output=True, text=True, check=True)
    assert "125 cannot be tested" in done.stdout
    assert "git bisect run" in done.stdout
