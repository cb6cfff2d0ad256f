"""``--help``: every verb says what it does, shows examples that can be typed, and lists its own exit statuses."""

import argparse
import re
import shlex

import pytest

from harness.cli import _parser, main
from harness.manual import PAGES
from harness.verdict import INTERRUPTED, NO_KVM

VERBS = sorted(PAGES)


def help_of(words, capsys):
    with pytest.raises(SystemExit) as ended:
        main([*words, "--help"])
    assert ended.value.code == 0
    return capsys.readouterr().out


def verbs(parser, prefix=""):
    """Every verb and sub-verb that a parser knows."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, inner in action.choices.items():
                yield prefix + name
                yield from verbs(inner, f"{prefix}{name} ")


def test_every_verb_has_a_page():
    assert sorted(verbs(_parser())) == VERBS


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_help_fits_on_a_terminal(verb, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert max(map(len, help_of(verb.split(), capsys).splitlines())) <= 80


@pytest.mark.parametrize("verb", VERBS)
def test_help_lists_the_statuses_of_this_verb(verb, capsys):
    text = help_of(verb.split(), capsys)
    listed = {int(n) for n in re.findall(r"^  (\d+) +\w", text[text.index("exit status") :], re.MULTILINE)}
    assert listed == set(PAGES[verb].statuses)
    assert INTERRUPTED in listed
    assert (NO_KVM in listed) == ("--kvm-device" in text), "who opens no KVM cannot miss it"


@pytest.mark.parametrize(
    ("verb", "example"), [(verb, line) for verb in VERBS for line in PAGES[verb].examples if "COMMAND" not in line]
)
def test_examples_can_be_typed(verb, example):
    """Words after kvm-harness up to a pipe are what the parser takes."""
    words = shlex.split(example)
    if words[0] == "git":
        words = words[words.index("run") + 1 :] if "run" in words else ["kvm-harness", "bisect-run"]
    words = words[1 : next((n for n, word in enumerate(words) if word in ("|", ">", "&&")), None)]
    assert " ".join(words).startswith(verb)
    assert callable(_parser().parse_args(words).function)


def test_lab_without_a_command_says_which_there_are(capsys):
    assert main(["lab"]) == 2
    assert "list, build, run, shell or peers" in capsys.readouterr().err
