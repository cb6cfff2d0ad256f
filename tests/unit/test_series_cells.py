"""Cells as jobs: what counts as finished, and a pool whose workers never outlive the command."""

import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from harness.journal import Journal
from harness.lab.configurations import configuration
from harness.lab.hardware import Emulator
from harness.lab.image import Image
from harness.lab.kernel import Kernel
from harness.lab.run import Options
from harness.lab.session import Cell
from harness.series.cells import CellJob, LocalPool, finished, progress_of, read_result, run_job, workers_for

RECORD = {"case": "a/b@long#0", "id": "0" * 12, "verdict": "agree", "checks": 1, "summary": "", "seconds": 0.1}
PROGRAM = """
import os, time
from harness.series.cells import LocalPool

if __name__ == "__main__":
    pool = LocalPool(2)
    print(pool.submit(os.getpid).result(), flush=True)
    pool.submit(time.sleep, 600)
    pool.submit(time.sleep, 600)
    time.sleep(600)
"""


@pytest.fixture
def job(tmp_path):
    kernel = Kernel("toy", "7.3.9", "7.3", tmp_path / "bzImage", None, "k" * 32)
    emulator = Emulator("toy", Path("/bin/true"), None, "e" * 32, frozenset())
    cell = Cell(configuration("svm"), kernel, emulator, Image(tmp_path / "root", "i" * 32))
    return CellJob(cell, tmp_path / "cell", Options("smoke"))


def write(job, *lines, key=None):
    journal = Journal(job.folder, {"key": key or job.key, "chosen": 2})
    for line in lines:
        journal.append(line)
    journal.close()


def test_a_job_travels(job):
    assert pickle.loads(pickle.dumps(job)) == job
    assert pickle.loads(pickle.dumps(job)).key == job.key


def test_a_finished_journal_of_this_very_job_is_enough(job):
    assert not finished(job)
    write(job, RECORD, {"finished": True, "seconds": 3.0})
    assert finished(job)
    assert run_job(job) == job.folder  # and no kernel, emulator or image is there to run it with
    assert read_result(job.folder).seconds == 3.0
    assert list(read_result(job.folder).records) == ["a/b@long#0"]


@pytest.mark.parametrize("lines", [[RECORD], [RECORD, {"lost": "died", "error": "LostError"}], []])
def test_an_unfinished_one_is_not(job, lines):
    write(job, *lines)
    assert not finished(job)
    assert read_result(job.folder).problem


def test_nor_is_another_jobs(job):
    write(job, {"finished": True}, key="of another kernel")
    assert not finished(job)


@pytest.mark.parametrize(
    "options", [Options("full"), Options("smoke", record=True), Options("smoke", only=frozenset({"a"}))]
)
def test_the_key_is_of_all_that_decides(job, options):
    assert CellJob(job.cell, job.folder, options).key != job.key
    assert CellJob(job.cell, job.folder, job.options, "2").key != job.key
    assert CellJob(job.cell, job.folder / "elsewhere", job.options).key == job.key


def test_functions_to_follow_are_in_a_file(job, tmp_path):
    (tmp_path / "trace.json").write_text('["em_mov"]')
    following = replace(job, trace=tmp_path / "trace.json")
    assert following.functions == ("em_mov",)
    assert following.key != job.key
    assert len(pickle.dumps(following)) < 8000


def test_how_far_a_job_is(job):
    assert progress_of(job) == (0, 0)
    write(job, RECORD)
    assert progress_of(job) == (1, 2)
    more = replace(job, folder=job.folder / "more")
    write(more, RECORD, RECORD, RECORD)
    assert progress_of(more) == (2, 2), "what is found of the kernel as a whole is no Case"


def test_machines_side_by_side():
    assert workers_for(10_000) == 1
    assert workers_for(1) == len(os.sched_getaffinity(0))


def test_workers_die_with_a_command_that_is_killed(tmp_path):
    program = tmp_path / "pool.py"
    program.write_text(PROGRAM)
    process = subprocess.Popen([sys.executable, program], stdout=subprocess.PIPE, text=True)
    worker = int(process.stdout.readline())
    time.sleep(0.5)
    os.kill(worker, 0)
    process.send_signal(signal.SIGKILL)
    process.wait()
    for _ in range(50):
        if not Path(f"/proc/{worker}").exists() or "zombie" in Path(f"/proc/{worker}/status").read_text():
            return
        time.sleep(0.1)
    pytest.fail(f"worker {worker} is still there")


def test_stop_ends_what_runs():
    pool = LocalPool(1)
    worker = pool.submit(os.getpid).result()
    running = pool.submit(time.sleep, 600)
    while not running.running():
        time.sleep(0.05)
    began = time.monotonic()
    pool.stop()
    assert time.monotonic() - began < 5
    assert not Path(f"/proc/{worker}").exists()
