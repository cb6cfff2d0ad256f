"""The journal: whole lines, one run a folder, nothing lost."""

import json
import os
import signal
import subprocess
import sys

import pytest

from harness.journal import NAME, Journal, JournalError, new_folder, read_journal, read_run


def record(name="gpr/x@long#0", verdict="agree", **more):
    return {"case": name, "id": "0123456789ab", "verdict": verdict, "checks": 1, "summary": "", "seconds": 0.1, **more}


def lines_of(folder):
    return (folder / NAME).read_text().splitlines(keepends=True)


def test_what_is_appended_is_read_back(tmp_path):
    journal = Journal(tmp_path / "a" / "b", {"host": "h"})
    journal.append({"case": "x"})
    journal.close()
    header, record = read_journal(tmp_path / "a" / "b")
    assert header["host"] == "h"
    assert record == {"case": "x"}


def test_second_run_into_the_same_folder_is_refused_while_the_first_is_open(tmp_path):
    journal = Journal(tmp_path, {})
    with pytest.raises(JournalError, match="another run is writing there") as error:
        Journal(tmp_path, {})
    assert error.value.status == 2
    journal.close()


def test_folder_with_results_is_refused(tmp_path):
    Journal(tmp_path, {}).close()
    with pytest.raises(JournalError, match="earlier run"):
        Journal(tmp_path, {})


def test_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(JournalError, match="give another --out"):
        Journal(tmp_path / "file", {})


def test_a_folder_of_cells_names_theirs(tmp_path):
    for cell in ("svm-6.1", "svm-7.3"):
        Journal(tmp_path / cell, {}).close()
    with pytest.raises(JournalError, match=r"holds no run .*; give one of .*/svm-6.1, .*/svm-7.3"):
        read_run(tmp_path)
    with pytest.raises(JournalError, match="none is not there; give the --out folder of a run"):
        read_run(tmp_path / "none")


def test_torn_last_line_is_dropped(tmp_path):
    journal = Journal(tmp_path, {})
    journal.append({"case": "x"})
    journal.close()
    with (tmp_path / NAME).open("a") as f:
        f.write('{"case": "y", "ver')
    assert [r.get("case") for r in read_journal(tmp_path)] == [None, "x"]


def test_damage_before_the_last_line_is_said(tmp_path):
    Journal(tmp_path, {}).close()
    with (tmp_path / NAME).open("a") as f:
        f.write("garbage\n{}\n")
    with pytest.raises(JournalError, match=":2: damaged"):
        list(read_journal(tmp_path))


def test_missing_journal_is_said(tmp_path):
    with pytest.raises(JournalError, match="give the --out folder of a run"):
        list(read_journal(tmp_path / "none"))


def test_foreign_file_is_no_journal(tmp_path):
    (tmp_path / NAME).write_text('{"x": 1}\n')
    with pytest.raises(JournalError, match="not a journal"):
        list(read_journal(tmp_path))


def test_killed_writer_leaves_every_finished_line(tmp_path):
    code = (
        "import sys; from pathlib import Path; from harness.journal import Journal\n"
        "j = Journal(Path(sys.argv[1]), {})\n"
        "for n in range(100): j.append({'case': n})\n"
        "print('ready', flush=True)\n"
        "while True: j.append({'case': 'more'})\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE) as child:
        child.stdout.readline()
        os.kill(child.pid, signal.SIGKILL)
    cases = [r["case"] for r in list(read_journal(tmp_path))[1:]]
    assert cases[:100] == list(range(100))


def test_full_disk_keeps_what_was_written(tmp_path):
    """A file-size limit stands in for the full device: the write comes up short in the same way (ENOSPC, EFBIG)."""
    code = (
        "import resource, signal, sys; from pathlib import Path; from harness.journal import Journal, JournalError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))\n"
        "j = Journal(Path(sys.argv[1]), {})\n"
        "try:\n"
        "    for n in range(100): j.append({'case': n})\n"
        "except JournalError as e: print(e, e.status)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert "finished results are kept" in done.stdout
    assert done.stdout.strip().endswith("4")
    cases = [r["case"] for r in list(read_journal(tmp_path))[1:]]
    assert cases == list(range(len(cases)))
    assert len(cases) > 5
    assert (tmp_path / NAME).read_text().endswith("\n")
    json.loads((tmp_path / NAME).read_text().splitlines()[-1])


# --- reading what is left of a run ----------------------------------------------------------------------------------


def written(folder, *records, finished=True, **header):
    journal = Journal(folder, {"host": "h", **header})
    for one in records:
        journal.append(one)
    if finished:
        journal.append({"finished": True})
    journal.close()
    return folder


def test_a_whole_run_is_complete(tmp_path):
    run = read_run(written(tmp_path, record(), record("gpr/y@real#0")))
    assert [r["case"] for r in run.records] == ["gpr/x@long#0", "gpr/y@real#0"]
    assert run.complete
    assert run.incomplete_because() == []
    assert (run.header["host"], run.folder) == ("h", tmp_path)


def test_a_run_without_its_end_is_incomplete(tmp_path):
    run = read_run(written(tmp_path, record(), finished=False))
    assert not run.complete
    assert run.incomplete_because() == ["incomplete: the run was interrupted or lost before its end"]


def test_a_run_without_its_end_says_how_far_it_came(tmp_path):
    whole = {"case": "profile/npt", "id": "", "verdict": "regressed", "checks": 1, "summary": "gone", "seconds": 0.0}
    run = read_run(written(tmp_path / "a", record(), whole, finished=False, chosen=3))
    assert run.incomplete_because()[0].endswith("before its end; 1 of 3 cases ran")
    run = read_run(written(tmp_path / "b", {"chosen": 40}, record(), record("gpr/y@real#0"), finished=False))
    assert run.incomplete_because()[0].endswith("before its end; 2 of 40 cases ran")
    lost = {"lost": "no machine came up\nconsole: ..."}
    run = read_run(written(tmp_path / "c", {"chosen": 40}, record(), lost, finished=False))
    assert run.incomplete_because() == [
        "incomplete: the run was lost (no machine came up) before its end; 1 of 40 cases ran"
    ]


@pytest.mark.parametrize(
    "garbage",
    [
        b"garbage\n", b'{"case": "y", "ver\n', b"[]\n", b'{"case": "y"}\n', b"\xff\xfe\n", b"\n",
        b'{"case":"y","id":"x","verdict":"splendid","checks":1,"summary":"","seconds":0}\n',
    ],
)  # fmt: skip
def test_a_damaged_line_is_left_out_and_said(tmp_path, garbage):
    written(tmp_path, record("a/a@real#0"), record("a/b@real#0"))
    lines = (tmp_path / NAME).read_bytes().splitlines(keepends=True)
    (tmp_path / NAME).write_bytes(b"".join((*lines[:2], garbage, *lines[2:])))
    run = read_run(tmp_path)
    assert [r["case"] for r in run.records] == ["a/a@real#0", "a/b@real#0"]
    assert [d.line for d in run.damage] == [3]
    assert run.finished
    assert not run.complete
    assert f"{tmp_path / NAME}:3: damaged" in run.incomplete_because()[0]


def test_a_damaged_header_does_not_hide_the_rest(tmp_path):
    written(tmp_path, record())
    (tmp_path / NAME).write_text("garb" + "".join(lines_of(tmp_path))[4:])
    run = read_run(tmp_path)
    assert [d.line for d in run.damage] == [1]
    assert len(run.records) == 1


@pytest.mark.parametrize("text", ["", "no journal\n", '{"x": 1}\n', '{"journal": 99}\n'])
def test_what_is_no_journal_is_refused(tmp_path, text):
    (tmp_path / NAME).write_text(text)
    with pytest.raises(JournalError, match="not a journal"):
        read_run(tmp_path)


def test_cells_come_from_the_header_or_from_the_records(tmp_path):
    assert read_run(written(tmp_path / "a", record())).cells == ("",)
    assert read_run(written(tmp_path / "b", record(), cell="svm × 7.3")).cells == ("svm × 7.3",)
    run = read_run(written(tmp_path / "c", record(cell="two"), record(), cell="one"))
    assert run.cells == ("one", "two")
    assert run.cell(run.records[0]) == "two"


def test_new_folders_are_not_there_yet(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = new_folder()
    first.mkdir(parents=True)
    assert first.parent.name == "out"
    assert not new_folder().exists()
