"""-k as in pytest, with the names of Cases as they are, and errors that say what to write."""

import pytest

from harness.selection import SelectionError, alias, check, matcher, nothing_matches, selected

NAMES = ("gpr/mov@long#0", "gpr/mov@long-user#0", "mmio/load_al@real#1")


@pytest.mark.parametrize(
    ("expression", "selected"),
    [
        ("gpr", [0, 1]), ("GPR", [0, 1]), ("not gpr", [2]), ("gpr and @long#", [0]), ("gpr/mov@long#0", [0]),
        ("mmio or (gpr and user)", [1, 2]), ("", [0, 1, 2]), ("not (mmio or user)", [0]), ("nothing", []), ("#1", [2]),
    ],
)  # fmt: skip
def test_words_are_parts_of_names(expression, selected):
    select = matcher(expression)
    assert [n for n, name in enumerate(NAMES) if select(name)] == selected


@pytest.mark.parametrize("expression", ["a*b", "a and", "and", "a b", "a (b)", "(a", "not", "a=b", "'a'", "a,b", "()"])
def test_what_is_no_expression_is_refused_with_an_example(expression):
    with pytest.raises(SelectionError, match="'mmio and not @real#'"):
        check(expression)


@pytest.mark.parametrize("expression", ["", "  "])
def test_an_empty_expression_is_not_taken_for_everything(expression):
    with pytest.raises(SelectionError, match=r"is empty: leave -k out to select everything, or give parts"):
        check(expression)


def test_where_nothing_matches_the_families_are_named():
    text = nothing_matches("gprs", NAMES, "kvm-harness run --list")
    assert text.startswith("no Case matches -k 'gprs'")
    assert "kvm-harness run --list lists all of them" in text
    assert text.endswith("families: gpr, mmio")


def test_the_wrong_character_is_named():
    with pytest.raises(SelectionError, match=r"'\*' \(column 6\)"):
        check("not a*b")


def test_pytest_takes_every_alias():
    expression = pytest.importorskip("_pytest.mark.expression").Expression
    for text in (*NAMES, "gpr and not @real#", "forced/a-b.c+d@long#0"):
        check(text)
        expression.compile(alias(text))


def test_names_are_selected_or_it_is_said_what_there_is():
    names = ["gpr/mov@long#0", "alu/add@real#0"]
    check(None)
    assert selected(None, names, "list") == names
    assert selected("alu", names, "list") == names[1:]
    with pytest.raises(SelectionError, match=r"no Case matches -k 'io': .* families: gpr, alu"):
        selected("io", names, "list")
    with pytest.raises(SelectionError, match="is empty"):
        selected("", names, "list")
