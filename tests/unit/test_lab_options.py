"""Options of `lab run` that do not go together: said before anything is built."""

import pytest

from harness.cli import main


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--config", "apx", "--debian", "6.12"], "apx: its kernel is edited source, not a stock one: give --tree"),
        (["--config", "svm", "--variant", "debug"], "--variant debug is for kernels that are built here: give --tree"),
        (["--config", "svm,nonsense"], "no configuration 'nonsense'"),
    ],
)
def test_refused(capsys, words, error):
    assert main(["lab", "run", *words]) == 2
    assert error in capsys.readouterr().err
