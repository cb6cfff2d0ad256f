"""One case, two cases."""

import pytest

from harness.words import counted


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ((1, "case"), "1 case"), ((0, "case"), "0 cases"), ((2, "case"), "2 cases"),
        ((2, "mismatch", "mismatches"), "2 mismatches"), ((1, "mismatch", "mismatches"), "1 mismatch"),
        ((33862, "check", "", ","), "33,862 checks"),
    ],
)  # fmt: skip
def test_numbers_have_their_nouns(words, text):
    assert counted(*words) == text
