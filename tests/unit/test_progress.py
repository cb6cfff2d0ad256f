"""Progress: a line that updates itself on a terminal, ten lines elsewhere, and never a reason to end a run."""

import errno
import io
import os
from types import SimpleNamespace

import pytest

from harness.lab.lines import StatusLine
from harness.report.progress import Progress
from harness.verdict import Verdict


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def run_of(total, stream, *, terminal, each=0.01, wrong=()):
    clock = Clock()
    progress = Progress(stream, terminal=terminal, clock=clock)
    progress.wait("making the cases ...")
    progress.begin(total)
    for n in range(total):
        clock.now += each
        progress.done(Verdict.MISMATCH if n in wrong else Verdict.AGREE)
    return progress


def test_a_line_every_tenth_off_a_terminal():
    out = io.StringIO()
    run_of(1000, out, terminal=False, wrong=(5,))
    lines = out.getvalue().splitlines()
    assert len(lines) == 10
    assert lines[0] == "100/1000 cases, 10%, 100/s, 1 mismatch, 1 s"
    assert lines[9] == "1000/1000 cases, 100%, 100/s, 1 mismatch, 10 s"
    assert "\r" not in out.getvalue()


def test_few_cases_have_few_lines():
    out = io.StringIO()
    run_of(3, out, terminal=False)
    assert [line.split()[0] for line in out.getvalue().splitlines()] == ["1/3", "2/3", "3/3"]


def test_one_line_on_a_terminal_ten_times_a_second():
    out = io.StringIO()
    progress = run_of(1000, out, terminal=True)
    text = out.getvalue()
    assert "\n" not in text
    assert 95 <= text.count("\r\x1b[K") <= 105
    assert text.endswith("1000/1000 cases, 100%, 100/s, 0 mismatches, 10 s")
    progress.close()
    assert out.getvalue().endswith("\r\x1b[K")


def test_the_last_state_may_stay():
    out = io.StringIO()
    run_of(1000, out, terminal=True).close(keep=True)
    assert out.getvalue().endswith("\r\x1b[K1000/1000 cases, 100%, 100/s, 0 mismatches, 10 s\n")
    nothing = io.StringIO()
    progress = Progress(nothing, terminal=True)
    progress.wait("making the cases ...")
    progress.close(keep=True)
    assert nothing.getvalue().endswith("\r\x1b[K")


def test_the_line_fits_the_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    out = io.StringIO()
    run_of(10, out, terminal=True)
    assert all(len(part) <= 19 for part in out.getvalue().split("\r\x1b[K"))


def test_what_is_said_stays_above_the_line():
    out = io.StringIO()
    clock = Clock()
    progress = Progress(out, terminal=True, clock=clock)
    progress.begin(2)
    shown = out.getvalue().split("\r\x1b[K")[-1]
    progress.say("a mismatch")
    assert out.getvalue().endswith(f"\r\x1b[Ka mismatch\n{shown}")


def test_lost_cases_are_counted_apart():
    progress = Progress(io.StringIO(), terminal=False, clock=Clock())
    progress.begin(4)
    for verdict in (Verdict.LOST, Verdict.SPLAT, Verdict.KNOWN):
        progress.done(verdict)
    assert "1 mismatch, 1 lost" in progress.line()


def test_a_reader_that_went_away_does_not_end_the_run():
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as stream:
        progress = run_of(100, stream, terminal=False)
        progress.say("more")
    assert progress.failed is None


def test_a_full_disk_is_remembered():
    with open("/dev/full", "w") as stream:
        progress = run_of(100, stream, terminal=False)
    assert progress.failed is not None
    assert progress.failed.errno == errno.ENOSPC


@pytest.mark.parametrize("term", ["dumb", ""])
def test_a_dumb_terminal_is_none(monkeypatch, term):
    monkeypatch.setenv("TERM", term)
    out = io.StringIO()
    out.isatty = lambda: True
    progress = Progress(out)
    progress.wait("not shown")
    assert out.getvalue() == ""


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_line_of_a_cell_does_not_wrap(monkeypatch):
    """The names of Debian's kernels are long."""
    monkeypatch.setenv("COLUMNS", "80")
    moments = iter((0.0, 100.0))
    monkeypatch.setattr("harness.lab.lines.time.monotonic", lambda: next(moments))
    tally = SimpleNamespace(done=12345, total=33862, rate=1234.0, bad=0, began=0.0)
    out = Terminal()
    StatusLine("svm-shadow × 7.3.4+deb13-cloud-amd64", out).update(SimpleNamespace(tally=tally, machines=2))
    assert out.getvalue().startswith("\r\x1b[Ksvm-shadow × 7.3.4+deb13-cloud-amd64: 12345/33862 cases, 1,234 checks/s")
    assert len(out.getvalue().removeprefix("\r\x1b[K")) == 79
