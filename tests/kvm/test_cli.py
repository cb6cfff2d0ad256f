"""The command line as a user meets it: exit statuses, errors, and nothing finished ever lost."""

import contextlib
import json
import os
import pty
import re
import resource
import shlex
import signal
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

import pytest

from harness.journal import NAME, JournalError, read_journal, read_run

ROOT = Path(__file__).resolve().parents[2]
SOME = "gpr and long and not user"


def harness(*words, **options):
    command = [sys.executable, "-m", "harness", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, **options)


def start(*words):
    command = [sys.executable, "-m", "harness", *map(str, words)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )  # fmt: skip


def finished(folder):
    return [r for r in read_journal(folder) if "case" in r]


def wait_for_results(folder, count, child):
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and child.poll() is None:
        try:
            if len(finished(folder)) >= count:
                return
        except JournalError:
            pass  # not there yet
        time.sleep(0.05)
    pytest.fail(f"no {count} results: {child.communicate()[0]}")


@pytest.mark.parametrize("verb", ["run", "probe", "replay"])
def test_no_kvm_is_status_3_and_says_what_to_do(verb, tmp_path):
    words = ["x"] if verb == "replay" else []
    done = harness(verb, "--kvm-device", tmp_path / "none", *words)
    assert done.returncode == 3
    assert "no such device (load kvm_amd or kvm_intel" in done.stderr
    assert "Traceback" not in done.stderr


def test_not_a_kvm_device_is_status_3():
    done = harness("run", "--kvm-device", "/dev/null")
    assert done.returncode == 3
    assert "not a KVM device" in done.stderr


def test_selecting_nothing_is_not_success(tmp_path):
    done = harness("run", "-k", "nosuchthing", "--out", tmp_path / "o")
    assert done.returncode == 2
    assert "no Case matches" in done.stderr
    assert "kvm-harness run --list lists all of them; families: gpr, alu, " in done.stderr


def test_an_empty_expression_is_status_2(tmp_path):
    done = harness("run", "-k", "", "--out", tmp_path / "o")
    assert done.returncode == 2
    assert "leave -k out to select everything" in done.stderr
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("some", [SOME, "test and real"])  # pytest's -k would take 'test' for the file's name
def test_what_is_listed_is_what_runs(tmp_path, some):
    listed = harness("run", "--list", "-k", some, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert (listed.returncode, listed.stderr, list(tmp_path.iterdir())) == (0, "", [])
    assert harness("run", "-k", some, "--out", tmp_path / "o").returncode == 0
    assert listed.stdout.splitlines() == [r["case"] for r in finished(tmp_path / "o")]


def test_a_list_of_nothing_is_status_2():
    done = harness("run", "--list", "-k", "nosuchthing")
    assert (done.returncode, done.stdout) == (2, "")
    assert "families: gpr, alu, " in done.stderr


def test_bad_expression_is_status_2(tmp_path):
    done = harness("run", "-k", "a and", "--out", tmp_path / "o")
    assert done.returncode == 2
    assert "'mmio and not @real#'" in done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("workers", [0, 2])
def test_the_name_of_a_case_selects_it(tmp_path, workers):
    done = harness("run", "-k", "alu/add_rr_b@long#0", "--out", tmp_path / "o", "-n", workers)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [r["case"] for r in finished(tmp_path / "o")] == ["alu/add_rr_b@long#0"]


def test_a_mode_can_be_selected_exactly(tmp_path):
    harness("run", "-k", "gpr and xchg_ecx and @long#", "--out", tmp_path / "o")
    assert [r["case"] for r in finished(tmp_path / "o")] == ["gpr/xchg_ecx@long#0"]


def test_a_name_without_k_is_explained():
    done = harness("run", "mmio")
    assert done.returncode == 2
    assert "use -k mmio" in done.stderr


def test_selecting_nothing_leaves_no_folder(tmp_path):
    done = harness("run", "-k", "nosuchthing", cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 2
    assert list(tmp_path.glob("out/*")) == []


def test_nothing_at_all_says_how_to_begin():
    done = harness()
    assert done.returncode == 2
    assert "kvm-harness --help" in done.stderr


def test_version():
    assert harness("--version").stdout.startswith("kvm-harness 0.")


def test_run_writes_a_journal_with_a_line_a_case(tmp_path):
    done = harness("run", "-k", SOME, "--out", tmp_path / "o")
    assert done.returncode == 0, done.stdout + done.stderr
    records = finished(tmp_path / "o")
    assert len(records) > 20
    assert f"{len(records)} cases" in done.stdout
    assert harness("report", tmp_path / "o").returncode == 0


def test_workers_find_the_same(tmp_path):
    one = harness("run", "-k", SOME, "--out", tmp_path / "1")
    two = harness("run", "-k", SOME, "--out", tmp_path / "2", "-n", "2")
    assert one.returncode == two.returncode

    def found(name):
        return sorted((r["case"], r["id"], r["verdict"], r["checks"]) for r in finished(tmp_path / name))

    assert found("1") == found("2")


def test_second_run_into_one_folder_is_refused(tmp_path):
    harness("run", "-k", SOME, "--out", tmp_path / "o")
    before = finished(tmp_path / "o")
    done = harness("run", "-k", SOME, "--out", tmp_path / "o")
    assert done.returncode == 2
    what = "holds the results of an earlier run; give another --out or remove it"
    assert done.stderr == f"kvm-harness: {tmp_path / 'o'}: {what}\n"
    assert finished(tmp_path / "o") == before


def test_a_run_off_a_terminal_tells_of_its_progress_in_ten_lines(tmp_path):
    done = harness("run", "-k", SOME, "--out", tmp_path / "o")
    assert len(re.findall(r"^\d+/\d+ cases, \d+%, \d+/s, 0 mismatches, \d+ s$", done.stdout, re.MULTILINE)) == 10
    assert "\r" not in done.stdout
    assert len(done.stdout.splitlines()) < 30


def test_a_run_on_a_terminal_has_one_line_that_updates_itself(tmp_path):
    controller, terminal = pty.openpty()
    command = [sys.executable, "-m", "harness", "run", "-k", SOME, "-n", "2", "--out", str(tmp_path / "o")]
    env = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    child = subprocess.Popen(command, stdout=terminal, stderr=terminal, env=env)
    os.close(terminal)
    text = ""
    with contextlib.suppress(OSError):  # EIO: the other end is closed
        while data := os.read(controller, 65536):
            text += data.decode()
    assert child.wait() == 0
    lines = text.split("\r\n")
    assert re.search(r"\r\x1b\[K\d+/\d+ cases, \d+%, \d+/s, 0 mismatches, \d+ s", text)
    stays = [line.split("\r\x1b[K")[-1] for line in lines]
    assert sum("100%" in line for line in stays) == 1
    assert sum(bool(re.search(r" \d\d?%,", line)) for line in stays) == 0, "the others are overwritten"
    assert "bringing up" not in text


@pytest.mark.parametrize("workers", [0, 2])
def test_interrupted_run_is_one_line_and_keeps_its_results(tmp_path, workers):
    child = start("run", "--out", tmp_path / "o", "-n", workers)
    wait_for_results(tmp_path / "o", 20, child)
    os.killpg(child.pid, signal.SIGINT)  # as a terminal does
    began = time.monotonic()
    text = child.communicate(timeout=60)[0]
    assert child.returncode == 130, text
    assert time.monotonic() - began < 5
    said = [line for line in text.splitlines() if "cases" not in line]
    assert said == [f"kvm-harness: interrupted; finished results are in {tmp_path / 'o'}"]
    records = finished(tmp_path / "o")
    assert len(records) >= 20
    run = read_run(tmp_path / "o")
    assert run.damage == ()
    assert run.incomplete_because()[0].endswith(f"{len(records)} of {run.chosen} cases ran")


@pytest.mark.parametrize(
    ("words", "milliseconds"),
    [
        *product((("run",), ("run", "-n", "2")), (60, 150, 400, 1000)),
        *product((("replay", "0" * 12),), (60, 150, 400)),  # an id of none: it looks through all Cases, for seconds
    ],
)
def test_an_interrupt_at_the_start_is_one_line(tmp_path, words, milliseconds):
    more = ("--out", tmp_path / "o") if words[0] == "run" else ()
    script = ROOT / "bin" / "kvm-harness"
    (tmp_path / "python").symlink_to(sys.executable)  # it starts the Python that lies beside it
    (tmp_path / "kvm-harness").write_text(script.read_text())
    command = ["sh", tmp_path / "kvm-harness", *words, *more]
    env = {**os.environ, "PYTHONPATH": ":".join(sys.path)}
    child = subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        env=env,
    )  # fmt: skip
    time.sleep(milliseconds / 1000)
    os.killpg(child.pid, signal.SIGINT)
    text = child.communicate(timeout=60)[0]
    assert child.returncode == 130, text
    assert re.fullmatch(r"(\d+ cases on .*\n)?kvm-harness: interrupted.*\n", text)


def test_killed_run_keeps_its_results(tmp_path):
    child = start("run", "--out", tmp_path / "o")
    wait_for_results(tmp_path / "o", 20, child)
    child.kill()
    child.communicate(timeout=60)
    assert len(finished(tmp_path / "o")) >= 20
    shown = harness("report", tmp_path / "o")
    assert shown.returncode == 4
    assert re.search(r"incomplete: .*; \d+ of \d\d\d\d+ cases ran", shown.stderr)


def test_full_disk_is_lost_not_failed_and_keeps_what_was_written(tmp_path):
    """A file-size limit makes the journal's write come up short, as a full disk does."""

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))

    done = harness("run", "--out", tmp_path / "o", preexec_fn=limit, env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"})
    assert done.returncode == 4, done.stdout + done.stderr
    assert "finished results are kept" in done.stdout + done.stderr
    assert len(finished(tmp_path / "o")) > 5


def test_a_reader_that_goes_away_does_not_end_the_run(tmp_path):
    child = start("run", "-k", SOME, "--out", tmp_path / "o")
    child.stdout.close()
    assert child.wait(timeout=120) == 0
    assert read_run(tmp_path / "o").complete


def test_full_standard_output_is_lost_but_the_results_are_whole(tmp_path):
    command = [sys.executable, "-m", "harness", "run", "-k", SOME, "--out", str(tmp_path / "o")]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=300, check=False)
    assert done.returncode == 4
    assert f"the results are in {tmp_path / 'o'}" in done.stderr
    assert read_run(tmp_path / "o").complete


# --- reports --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results") / "o"
    assert harness("run", "-k", SOME, "--out", folder).returncode == 0
    return folder


@pytest.mark.parametrize(
    ("name", "begin"),
    [("html", "<!DOCTYPE html>"), ("junit", "<?xml"), ("ktap", "KTAP version 1"), ("text", "Linux ")],
)
def test_one_view_is_printed(results, name, begin):
    done = harness("report", results, "--format", name)
    assert done.returncode == 0
    assert done.stdout.startswith(begin)


def test_several_views_become_files(results):
    done = harness("report", results, "--format", "html,text,junit,ktap")
    assert done.returncode == 0
    for path in map(Path, done.stdout.split()):
        assert path.parent == results
        assert path.stat().st_size > 100
        path.unlink()


def test_unknown_format_is_refused(results):
    done = harness("report", results, "--format", "pdf")
    assert done.returncode == 2
    assert "give text, html, junit, ktap" in done.stderr


def test_a_damaged_line_is_said_and_the_rest_is_shown(results, tmp_path):
    lines = (results / NAME).read_bytes().splitlines(keepends=True)
    (tmp_path / NAME).write_bytes(b"".join((*lines[:5], lines[5][:20] + b"\n", *lines[6:])))
    done = harness("report", tmp_path)
    assert done.returncode == 4
    assert f"{tmp_path / NAME}:6: damaged" in done.stderr
    assert f"{len(lines) - 4} cases" in done.stdout
    assert "Traceback" not in done.stderr


def test_a_report_needs_no_device(results):
    assert "--kvm-device" not in harness("report", "--help").stdout
    assert harness("report", results, "--kvm-device", "/dev/kvm").returncode == 2


def test_runs_are_compared(results, tmp_path):
    assert harness("compare", results, results).returncode == 0
    text = (results / NAME).read_text()
    (tmp_path / NAME).write_text(text.replace('"verdict":"agree"', '"verdict":"mismatch"', 1))
    done = harness("compare", results, tmp_path)
    assert done.returncode == 1
    assert "agree -> mismatch: 1 case" in done.stdout
    assert harness("compare", tmp_path, results).returncode == 0
    assert harness("compare", results, tmp_path / "none").returncode == 2


# --- replay ---------------------------------------------------------------------------------------------------------


def test_probe_json_is_json():
    found = json.loads(harness("probe", "--json").stdout)
    assert "real" in found["modes"]
    assert found["capabilities"]


def test_replay_of_nothing_is_status_2():
    done = harness("replay", "ffffffffffff")
    assert done.returncode == 2
    assert "no Case with id or name" in done.stderr


def test_replay_of_a_file_that_is_no_case(tmp_path):
    (tmp_path / "x.json").write_text("{}")
    done = harness("replay", tmp_path / "x.json")
    assert done.returncode == 2
    assert "not a kvm-harness case" in done.stderr


def test_replay_by_id(tmp_path):
    harness("run", "-k", SOME, "--out", tmp_path / "o")
    record = finished(tmp_path / "o")[0]
    done = harness("replay", record["id"])
    assert done.returncode == 0
    assert f"{record['case']} {record['id']}: agree, 1 check\n" in done.stdout


def test_replay_of_what_agrees_shows_what_was_compared():
    lines = harness("replay", "mmio/xchg_al@real#0").stdout.splitlines()
    assert re.fullmatch(r"mmio/xchg_al@real#0 [0-9a-f]{12}: agree, 3 checks", lines[0])
    text = " ".join(" ".join(lines).split())
    assert "guest guests/mmio.S:" in text
    assert "compared the reference model and KVM, 3 checks: every exit; all registers (regs, sregs2," in text
    assert "and 128 KiB of RAM at 2 of them" in text, "in the middle of a read-modify-write there is no state"
    exits = [line for line in lines if line.startswith("exit ")]
    assert exits[0] == "exit 0      action 0, run: mmio read address 0xa0340 size 1"
    assert exits[2].startswith("exit 2      action 0, run: halt at 0x")
    assert any("xchg" in line for line in lines)
    assert "start       rax=" in "\n".join(lines)


@pytest.mark.parametrize("case", ["alu/cmpxchg_fail_l@long#0", "alu/add_rr_b@long#0", "alu/daa@prot32#0"])
def test_replay_and_run_agree_on_verdict_and_status(case, tmp_path):
    ran = harness("run", "-k", case, "--out", tmp_path / "o")
    (record,) = finished(tmp_path / "o")
    done = harness("replay", case)
    assert done.returncode == ran.returncode
    assert done.stdout.startswith(f"{case} {record['id']}: {record['verdict']}, ")
    if record["verdict"] == "known":
        name = record["summary"].partition(":")[0]
        assert f"known as    {name}: " in done.stdout
        assert "(docs/trophies/" in done.stdout


def test_instruction_unknown_to_the_model_is_named(tmp_path):
    """A guest of VPXOR: bytes and RIP in one line, status 2, no traceback."""
    body = json.loads((ROOT / "docs/trophies/0001-cmpxchg-r32.json").read_text())
    body["memory"].append([0xA000, "c5f9efc0f4"])
    del body["id"]
    (tmp_path / "case.json").write_text(json.dumps(body))
    done = harness("replay", tmp_path / "case.json")
    assert done.returncode == 2
    assert "unknown instruction c5 f9" in done.stderr
    assert "RIP 0xa000" in done.stderr
    assert "Traceback" not in done.stderr


def test_missing_assembler_is_said(tmp_path):
    env = {**os.environ, "PATH": str(tmp_path), "KVM_HARNESS_CACHE": str(tmp_path / "cache")}
    done = harness("run", "--out", tmp_path / "o", env=env)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "apt-get install binutils" in done.stderr


def test_the_command_under_a_failure_works(tmp_path):
    """Of a Case that came from a file, and that no list has: the file."""
    case = tmp_path / "a case.json"
    case.write_text((ROOT / "docs/trophies/0001-cmpxchg-r32.json").read_text())
    done = harness("replay", case)
    if ": known, " not in done.stdout:
        pytest.skip("this KVM runs CMPXCHG natively, or has the defect mended")
    command = shlex.split(done.stdout.splitlines()[-1])
    assert command[:2] == ["kvm-harness", "replay"]
    assert harness(*command[1:]).stdout == done.stdout
    source = harness(*command[1:], "--emit-c").stdout
    assert len(source) < 40_000


@pytest.mark.parametrize("source", sorted(ROOT.glob("docs/trophies/*.c")), ids=lambda path: path.stem)
def test_c_files_of_the_trophies_compile_and_end_in_a_verdict(source, tmp_path, host):
    assert source.stat().st_size < 40_000
    subprocess.run(["gcc", "-O2", "-Wall", "-Wextra", "-Werror", "-o", tmp_path / "x", source], check=True)
    done = subprocess.run([tmp_path / "x"], capture_output=True, text=True, timeout=60, check=False)
    if "hypercall" in source.stem and host.traits["hypercall"]:
        assert done.returncode == 2, "this KVM has no such hypercall, and the program does not say so"
        return
    assert (done.returncode, done.stdout.splitlines()[-1]) in ((1, "DEFECT REPRODUCED"), (0, "not reproduced: agrees"))


def test_trophy_is_reproduced_by_its_case_and_by_the_c_made_of_it(tmp_path):
    case = ROOT / "docs/trophies/0001-cmpxchg-r32.json"
    done = harness("replay", case)
    assert done.returncode == 0, "known where it diverges, healed where it does not"
    if ": known, " not in done.stdout:
        pytest.skip("this KVM runs CMPXCHG natively, or has the defect mended")
    assert "known as    cmpxchg-r32-zero-extends: " in done.stdout
    assert "rcx" in done.stdout
    (tmp_path / "x.c").write_text(harness("replay", case, "--emit-c").stdout)
    subprocess.run(["gcc", "-O2", "-Wall", "-o", tmp_path / "x", tmp_path / "x.c"], check=True)
    shown = subprocess.run([tmp_path / "x"], capture_output=True, text=True, check=False)
    assert shown.returncode == 1
    assert "rcx" in shown.stdout


@pytest.mark.parametrize("words", [["probe"], ["probe", "--json"], ["--help"]])
def test_full_standard_output_is_lost_without_a_traceback(words):
    command = [sys.executable, "-m", "harness", *words]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    assert done.returncode != 1
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("number", ["-1", "100000"])
def test_senseless_number_of_workers_is_refused(number, tmp_path):
    done = harness("run", "-n", number, "--out", tmp_path / "o")
    assert done.returncode == 2
    assert "give 0" in done.stderr


def test_folder_in_place_of_a_case_is_refused():
    done = harness("replay", ROOT)
    assert done.returncode == 2
    assert "is a folder" in done.stderr
