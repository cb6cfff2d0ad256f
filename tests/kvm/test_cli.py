"""The command line as a user meets it: exit statuses, errors, and nothing finished ever lost."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from harness.journal import JournalError, read_journal

ROOT = Path(__file__).resolve().parents[2]
SOME = "gpr and long and not user"


def harness(*words, **options):
    command = [sys.executable, "-m", "harness.cli", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, **options)


def start(*words):
    command = [sys.executable, "-m", "harness.cli", *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


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


def test_bad_expression_is_status_2(tmp_path):
    done = harness("run", "-k", "a and", "--out", tmp_path / "o")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr + done.stdout


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
    assert "earlier run" in done.stderr + done.stdout
    assert finished(tmp_path / "o") == before


def test_interrupted_run_is_status_130_and_keeps_its_results(tmp_path):
    child = start("run", "--out", tmp_path / "o")
    wait_for_results(tmp_path / "o", 20, child)
    child.send_signal(signal.SIGINT)
    text = child.communicate(timeout=60)[0]
    assert child.returncode == 130, text
    assert "finished results are in" in text
    assert len(finished(tmp_path / "o")) >= 20


def test_killed_run_keeps_its_results(tmp_path):
    child = start("run", "--out", tmp_path / "o")
    wait_for_results(tmp_path / "o", 20, child)
    child.kill()
    child.communicate(timeout=60)
    assert len(finished(tmp_path / "o")) >= 20
    shown = harness("report", tmp_path / "o")
    assert shown.returncode == 4
    assert "incomplete" in shown.stderr


def test_full_disk_is_lost_not_failed_and_keeps_what_was_written(tmp_path):
    """A file-size limit makes the journal's write come up short, as a full disk does."""

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))

    done = harness("run", "--out", tmp_path / "o", preexec_fn=limit, env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"})
    assert done.returncode == 4, done.stdout + done.stderr
    assert "finished results are kept" in done.stdout + done.stderr
    assert len(finished(tmp_path / "o")) > 5


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
    assert f"{record['case']} {record['id']}: agree" in done.stdout


@pytest.mark.parametrize("verb", ["probe", "run", "replay", "report"])
def test_help_has_an_example_and_the_statuses(verb):
    text = harness(verb, "--help").stdout
    assert "example: kvm-harness" in text
    assert "130 interrupted" in text


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


def test_trophy_is_reproduced_by_its_case_and_by_the_c_made_of_it(tmp_path):
    case = ROOT / "docs/trophies/0001-cmpxchg-r32.json"
    done = harness("replay", case)
    if done.returncode == 0:
        pytest.skip("this KVM runs CMPXCHG natively, or has the defect mended")
    assert done.returncode == 1
    assert "rcx" in done.stdout
    (tmp_path / "x.c").write_text(harness("replay", case, "--emit-c").stdout)
    subprocess.run(["gcc", "-O2", "-Wall", "-o", tmp_path / "x", tmp_path / "x.c"], check=True)
    shown = subprocess.run([tmp_path / "x"], capture_output=True, text=True, check=False)
    assert shown.returncode == 1
    assert "rcx" in shown.stdout


@pytest.mark.parametrize("words", [["probe"], ["probe", "--json"], ["--help"]])
def test_full_standard_output_is_lost_without_a_traceback(words):
    command = [sys.executable, "-m", "harness.cli", *words]
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
