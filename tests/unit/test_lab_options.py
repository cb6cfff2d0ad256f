"""Options of `lab run` that do not go together: said before anything is built."""

import pytest

from harness.cli import main


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--config", "apx", "--debian", "6.12"], "apx: its kernel is edited source, not a stock one: give --tree"),
        (["--config", "svm", "--variant", "debug"], "--variant debug is for kernels that are built here: give --tree"),
        (["--config", "svm,nonsense"], "no configuration 'nonsense'"),
        (["-k", "("], "-k '(': give parts of Case names"),
        (["--out", "/dev/null"], "/dev/null: cannot write there: it is no folder; give another --out"),
    ],
)
def test_refused(capsys, words, error):
    assert main(["lab", "run", *words]) == 2
    assert error in capsys.readouterr().err


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
