"""The table while a series runs: repainted on a terminal, a line for each patch elsewhere."""

import dataclasses
import io
import os

import pytest

from harness.series.coverage import Reached
from harness.series.git import Commit
from harness.series.live import Live
from harness.series.verdict import Build, CellReport, Code, LayoutReport, PatchReport

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
    live.building(0, "default")
    live.doing("linux: building bzImage: 812 files")
    live.cells(1, {"svm": (10, 4000)}, 3)
    live.patch(report)
    live.close()
    lines = out.getvalue().splitlines()
    assert lines[0].endswith("  building BASE (default); then 2 patches")
    assert lines[1].endswith("  building BASE (default); then 2 patches: linux: building bzImage: 812 files")
    assert lines[2].endswith("  running patch 1 of 2, 3 cell runs to go; then 1 more: svm 10/4000")
    del lines[:2]
    assert lines[1] == 'patch 1/2 111111111111 ("KVM: x86: patch 1"): good'
    assert lines[2] == "  builds 12 s · code - · svm smoke: agree · behaviour same · layout n/a"
    assert "\x1b" not in out.getvalue()


def test_what_an_interrupt_leaves_on_a_terminal_stays(report, clock, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    out = Terminal()
    live = Live(COMMITS, ["svm"], out, clock=clock)
    live.building(1, "default")
    live.patch(report)
    before = screen(out.getvalue())
    live.leave()
    out.write("what is finished is kept\n")
    live.close()
    assert screen(out.getvalue()) == [*before[:-1], "what is finished is kept", ""]


def test_how_long_the_rest_takes_is_told_by_what_was_judged_here(report, clock):
    out = io.StringIO()
    live = Live([*COMMITS, *COMMITS], ["svm"], out, clock=clock)
    live.patch(report)  # by an earlier run
    live.building(2, "default")
    assert out.getvalue().splitlines()[-1].endswith("  building patch 2 of 4 (default); then 2 more")
    live.patch(dataclasses.replace(report, number=2))
    live.building(3, "default")
    assert out.getvalue().splitlines()[-1].endswith("  building patch 3 of 4 (default); then 1 more, about 1 min 00 s")


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
    live.building(1, "default")
    live.cells(1, {"svm": (10, 4000)}, 1)
    assert "10/4000" in screen(out.getvalue())[1]
    live.patch(report)
    assert screen(out.getvalue())[3].endswith(" s  judged patch 1 of 2; then 1 more, about 1 min 30 s")
    live.say("something that stays")
    live.building(2, "default")
    live.doing("linux: building bzImage")
    rows = screen(out.getvalue())
    assert rows[0] == "something that stays"
    assert rows[1].split()[:3] == ["#", "patch", "verdict"]
    assert rows[2].split()[:5] == ["1", "KVM:", "x86:", "patch", "1"]
    assert "good" in rows[2]
    assert rows[3].split()[0] == "2"
    assert rows[4].endswith(" s  building patch 2 of 2 (default)")
    assert rows[5] == "  linux: building bzImage"
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
    live.building(1, "default")
    live.doing("building")
    live.patch(report)
    live.close()


# --- what fits --------------------------------------------------------------------------------------------------------

SUBJECT = "KVM: x86: Do without the detour over orig_val in em_xchg() where nothing needs it"
CODE = Code(False, frozenset({"a", "b"}))


def painted(monkeypatch, clock, columns, cells, *, never="", judged=2):
    """The rows on a terminal that wide, when ``judged`` patches of three are, and the third is built."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("shutil.get_terminal_size", lambda: os.terminal_size((columns, 40)))
    commits = [Commit(f"{n}" * 40, "t", (), "A", SUBJECT) for n in (1, 2, 3)]
    reached = Reached(frozenset({"a"} - set(never)), frozenset(never))
    out = Terminal()
    live = Live(commits, cells, out, clock=clock)
    live.building(0, "default")
    for number in range(1, judged + 1):
        live.building(number, "default")
        reports = tuple(CellReport(cell, "smoke", counts={"agree": 9}) for cell in cells)
        build = Build("default", 112.0, code=CODE)
        live.patch(PatchReport(number, commits[number - 1], (build,), reports, reached, LayoutReport(text=("ok",))))
    live.building(judged + 1 if judged else 0, "default")
    live.doing("linux: building bzImage vmlinux: " + "x" * 200)
    rows = screen(out.getvalue())
    assert all(len(row) < columns for row in rows)
    return rows


@pytest.mark.parametrize("never", ["", "ab"])
def test_a_table_fits_with_a_shorter_subject(monkeypatch, clock, never):
    rows = painted(monkeypatch, clock, 100, ["svm"], never=never)
    assert rows[0].split() == ["#", "patch", "verdict", "builds", "code", "svm", "reached", "behaviour", "layout"]
    assert rows[1].startswith("1  KVM: x86: ")
    assert "..." in rows[1]
    assert rows[1].split()[-3:] == [f"0/{len(never)}" if never else "1/1", "same", "ok"]
    assert (rows[2] == "     but nothing of what it changed was executed") == bool(never)


@pytest.mark.parametrize(
    ("columns", "cells"), [(80, 1), (80, 3), (50, 4), (80, 4), (132, 4)]
)  # a table of one cell needs 91 columns for a subject that says anything
def test_what_is_no_table_in_that_width_is_a_few_lines_a_patch(monkeypatch, clock, columns, cells):
    names = ["svm", "svm-shadow", "svm-emul", "svm-debug"][:cells]
    rows = painted(monkeypatch, clock, columns, names, never="ab")
    assert rows[0].startswith("  1  good             KVM: x86: ")
    text = " ".join(" ".join(rows).split())
    told = " · ".join(["builds 112 s", "code 2 functions", *(f"{name} smoke: agree" for name in names)])
    assert text.count(f"but nothing of what it changed was executed {told}") == 2
    assert text.count("reached 0/2 · behaviour same · layout ok") == 2
    assert any(row.startswith("  3  ...  ") for row in rows)


def test_a_terminal_of_next_to_nothing_is_no_error(monkeypatch, clock):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("shutil.get_terminal_size", lambda: os.terminal_size((1, 1)))
    out = Terminal()
    live = Live(COMMITS, ["svm"], out, clock=clock)
    live.building(1, "default")
    live.patch(PatchReport(1, COMMITS[0], (Build("default", 12.0, code=CODE),), (CellReport("svm", "smoke"),)))
    assert out.getvalue() == "\n\x1b[1A\x1b[J\n", "one line, painted twice"


def test_a_wide_terminal_shows_as_much_of_a_subject_as_a_table_takes(monkeypatch, clock):
    rows = painted(monkeypatch, clock, 200, ["svm", "svm-shadow", "svm-emul", "svm-debug"])
    assert "KVM: x86: Do without the detour over orig..." in rows[1]


def test_no_patch_is_at_work_while_base_is(monkeypatch, clock):
    rows = painted(monkeypatch, clock, 80, ["svm"], judged=0)
    assert rows[0].endswith(" s  building BASE (default); then 3 patches")
    assert SUBJECT[:12] not in " ".join(rows)
