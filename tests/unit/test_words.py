"""One case, two cases."""

import pytest

from harness.words import counted, span


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


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.9, "59 s"), (60, "1 min 00 s"), (192, "3 min 12 s"), (3600, "1 h 00 min"), (7505, "2 h 05 min")],
)
def test_times_are_told_as_people_do(seconds, text):
    assert span(seconds) == text
