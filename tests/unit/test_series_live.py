"""The table while a series runs: repainted on a terminal, a line for each patch elsewhere."""

import io
import os

import pytest

from harness.series.git import Commit
from harness.series.live import Live
from harness.series.verdict import Build, CellReport, PatchReport

COMMITS = [Commit(f"{n}" * 40, "t", (), "A", f"KVM: x86: patch {n}") for n in (1, 2)]


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock():
    now = [0.0]

    def read():
        now[0] += 30.0
        return now[0]

    return read


@pytest.fixture
def report():
    return PatchReport(1, COMMITS[0], (Build("default", 12.0),), (CellReport("svm", "smoke"),))


def test_elsewhere_it_is_lines(report, clock):
    out = io.StringIO()
    live = Live(COMMITS, ["svm"], out, clock=clock)
    live.doing("building")
    live.cells(1, {"svm": (10, 4000)})
    live.patch(report)
    live.close()
    lines = out.getvalue().splitlines()
    assert "building" in lines[0]
    assert "patch 1: svm 10/4000" in lines[1]
    assert lines[2] == 'patch 1/2 111111111111 ("KVM: x86: patch 1"): good'
    assert lines[3] == "  builds 12 s · code - · svm smoke: agree · behaviour same · layout n/a"
    assert "\x1b" not in out.getvalue()


def screen(text):
    """What a terminal shows of text with only newlines and "up N, clear" in it."""
    rows = [""]
    while text:
        if text.startswith("\x1b["):
            count, _, rest = text[2:].partition("A")
            assert rest.startswith("\x1b[J")
            rows = [*rows[: len(rows) - int(count) - 1], ""]
            text = rest[3:]
        elif text[0] == "\n":
            rows.append("")
            text = text[1:]
        else:
            rows[-1] += text[0]
            text = text[1:]
    return rows


def test_on_a_terminal_it_is_one_table(report, clock, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("shutil.get_terminal_size", lambda: os.terminal_size((200, 40)))
    out = Terminal()
    live = Live(COMMITS, ["svm"], out, clock=clock)
    live.doing("building")
    live.cells(1, {"svm": (10, 4000)})
    assert "10/4000" in screen(out.getvalue())[1]
    live.patch(report)
    live.say("something that stays")
    live.doing("building the next one")
    rows = screen(out.getvalue())
    assert rows[0] == "something that stays"
    assert rows[1].split()[:3] == ["#", "patch", "verdict"]
    assert rows[2].split()[:5] == ["1", "KVM:", "x86:", "patch", "1"]
    assert "good" in rows[2]
    assert rows[3].split()[0] == "2"
    assert rows[4].endswith("building the next one")
    live.close()
    assert screen(out.getvalue()) == ["something that stays", ""]


def test_a_narrow_and_low_terminal_is_never_left(report, clock, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("shutil.get_terminal_size", lambda: os.terminal_size((40, 4)))
    out = Terminal()
    live = Live(COMMITS, ["svm"], out, clock=clock)
    live.patch(report)
    live.doing("x" * 100)
    rows = screen(out.getvalue())
    assert len(rows) <= 3
    assert all(len(row) < 40 for row in rows)


def test_what_cannot_be_written_ends_nothing(report, clock):
    class Broken(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    live = Live(COMMITS, ["svm"], Broken(), clock=clock)
    live.doing("building")
    live.patch(report)
    live.close()
