"""Options of `lab run` that do not go together: said before anything is built."""

import argparse
from types import SimpleNamespace

import pytest

from harness.cli import main
from harness.lab.cli import add_verbs, command_again
from harness.lab.configurations import configuration


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--config", "apx", "--debian", "6.12"], "apx: its kernel is edited source, not a stock one: give --tree"),
        (["--config", "svm", "--variant", "debug"], "--variant debug is for kernels that are built here: give --tree"),
        (["--config", "svm,nonsense"], "no configuration 'nonsense'"),
        (["-k", "("], "-k '(': give parts of Case names"), (["-k", ""], "-k '' is empty: leave -k out"),
        (["--list", "--debian", "5.10"], "no stock kernel '5.10': there are 6.1"),
        (["--list", "--tree", "/"], "/ is no Linux source tree"),
        (["--list", "--config", "apx", "--debian", "6.12"], "its kernel is edited source"),
        (["--list", "--variant", "debug"], "give --tree DIR"),
        (["--list", "--modules", "/nonexistent"], "--modules goes with --kernel"),
        (["--list", "--config", "svm-emul", "-k", "gprs"], "lab run --list lists all of them; families: forced"),
        (["--out", "/dev/null"], "/dev/null: cannot write there: it is no folder; give another --out"),
    ],
)
def test_refused(capsys, words, error):
    assert main(["lab", "run", *words]) == 2
    assert error in capsys.readouterr().err


def test_a_shell_without_a_terminal_is_refused_before_anything_is_fetched(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("KVM_HARNESS_CACHE", str(tmp_path))
    assert main(["lab", "shell"]) == 2
    assert "needs a terminal on stdin and stdout" in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]


def test_the_cache_is_summed_up(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("KVM_HARNESS_CACHE", str(tmp_path))
    (tmp_path / "lab" / "trees" / "one").mkdir(parents=True)
    (tmp_path / "lab" / "trees" / "one" / "vmlinux").write_bytes(bytes(3_000_000))
    (tmp_path / "guests" / "two").mkdir(parents=True)
    assert main(["lab", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    at = next(n for n, line in enumerate(lines) if line.startswith("in the cache ("))
    assert lines[at + 1].split()[:5] == ["trees", "1", "of", "3", "MB"]
    assert lines[at + 2].split()[:3] == ["guests", "1", "of"]


def listed(capsys, *words):
    assert main(["lab", "run", "--list", *words]) == 0
    return capsys.readouterr().out.splitlines()


def test_names_are_listed_and_nothing_is_built(capsys, tmp_path, monkeypatch):
    """Those of the tier, of every cell, that -k selects."""
    monkeypatch.setenv("KVM_HARNESS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    full = listed(capsys, "-k", "gpr/ and @long#")
    smoke = listed(capsys, "-k", "gpr/ and @long#", "--tier", "smoke")
    assert all(name.startswith("gpr/") and "@long#" in name for name in full)
    assert len(full) == len(set(full)) > len(smoke) > 0
    assert set(smoke) < set(full)
    both = listed(capsys, "-k", "xchg and @long#", "--config", "svm,svm-emul", "--debian", "6.1,newest")
    assert {name.partition("/")[0] for name in both} >= {"gpr", "mmio", "forced"}
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.glob("*/*")] == ["cache/guests"], "which are assembled"


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--machines", "0"], "give a number, 1 or more"), (["--deadline", "0"], "give minutes"),
        (["--deadline", "nan"], "give minutes"), (["--tier", "x"], "use smoke or full"), (["x"], "unrecognized"),
    ],
)  # fmt: skip
def test_refused_by_the_parser(capsys, words, error):
    with pytest.raises(SystemExit) as ended:
        main(["lab", "run", *words])
    assert ended.value.code == 2
    text = capsys.readouterr().err
    assert text.startswith("usage: kvm-harness lab run")
    assert error in text


@pytest.mark.parametrize("verb", [["lab", "peers", "--build-selftests"], ["mutants"]])
def test_results_cannot_be_in_a_file(capsys, verb):
    assert main([*verb, "--out", "/dev/null"]) == 2
    assert "/dev/null: cannot write there: it is no folder; give another --out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "--config svm --debian newest"), (["--debian", "6.1,6.12"], "--config svm --debian 6.12"),
        (["--kernel", "a dir/bzImage"], "--config svm --kernel '/usr/a dir/bzImage'"),
        (["--tree", "linux", "--variant", "debug"], "--config svm --tree /usr/linux --variant debug"),
        (["--qemu", "system"], "--config svm --debian newest --qemu system"),
    ],
)  # fmt: skip
def test_the_command_that_runs_a_case_again(monkeypatch, words, told):
    """From whatever folder."""
    monkeypatch.chdir("/usr")
    parser = argparse.ArgumentParser()
    verbs = parser.add_subparsers()
    add_verbs(lambda name, function: verbs.add_parser(name))
    cell = SimpleNamespace(configuration=configuration("svm"), kernel=SimpleNamespace(series="6.12"))
    assert command_again(parser.parse_args(["run", *words]), cell) == f"kvm-harness lab run {told} -k"
