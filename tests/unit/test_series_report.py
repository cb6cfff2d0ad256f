"""A series' report: what is good without having been executed is said, a mail's lines are short, KTAP adds up."""

import re
import shlex
from dataclasses import replace

import pytest

from harness.series import brief
from harness.series.behaviour import Change
from harness.series.coverage import Reached
from harness.series.git import Commit
from harness.series.page import page
from harness.series.report import WIDTH, ktap_report, text_report
from harness.series.verdict import Build, CellReport, Code, LayoutReport, Outcome, PatchReport, SeriesReport

COMMIT = Commit("1" * 40, "t", ("0" * 40,), "A Uthor", "KVM: x86: Emulate # what was not")
NO_CHANGE = Commit("1" * 40, "t", ("0" * 40,), "A Uthor", "KVM: x86: Tidy\n\nNo functional change intended.")
BASE = Commit("0" * 40, "t", (), "A Uthor", "Linux 7.3")
CHANGED = Build("default", 12.0, code=Code(False, frozenset({"em_mov", "em_xchg"}), text=("code: 2 functions",)))
IDENTICAL = Build("default", 12.0, code=Code(True, text=("code: identical",)))
BROKEN = Build("default", 3.0, ("emulate.c:3:16: error: 'y' undeclared",), "build.log")
AGREES = CellReport("svm", "smoke", counts={"agree": 3}, checks=3)


def change(verdict, summary="rcx: expected 0x1, got 0x2", name="gpr/mov@long#0"):
    def record(verdict, summary=""):
        return {"case": name, "id": "0" * 12, "verdict": verdict, "checks": 1, "summary": summary, "allowed": 1}

    return Change(name, record("agree"), record(verdict, summary) | {"allowed": 2})


COMMAND = "kvm-harness lab run --kernel /home/somebody/.cache/kvm-harness/kernels/{:064d}/bzImage --config svm -k {{}}"
FAILS = replace(AGREES, changes=(change("mismatch"),), command=COMMAND.format(0))
OTHER = replace(AGREES, changes=(change("agree", ""),))
LOST = replace(AGREES, problem="the emulator died")


def patch(*cells, build=CHANGED, commit=COMMIT, reached=("em_mov em_xchg", "", ""), **more):
    found = Reached(*(frozenset(names.split()) for names in reached)) if build is CHANGED else Reached()
    return PatchReport(1, commit, (build,), cells, found, **more)


def report(*patches, planned=None):
    numbered = tuple(replace(p, number=n) for n, p in enumerate(patches, 1))
    return SeriesReport("base..main", BASE, ("svm",), numbered, planned or len(patches), host="QEMU")


# --- what ran ---------------------------------------------------------------------------------------------------------


def test_a_cell_that_ended_early_says_of_how_many_cases():
    early = replace(FAILS, counts={"mismatch": 501, "agree": 1094}, checks=1600, extent="1595 of 7374 cases ran")
    told = "1600 checks, 0 s; 1595 of 7374 cases ran: enough of them had failed"
    assert told in " ".join(text_report(report(patch(early))).split())
    assert "1595 of 7374 cases ran: enough" in page(report(patch(early)))
    assert "enough" not in text_report(report(patch(FAILS)))


@pytest.mark.parametrize(("tier", "cell", "told"), [
    ("smoke", AGREES, True), ("auto", AGREES, False), ("smoke", FAILS, False), ("smoke", CellReport("svm", ""), False),
])  # fmt: skip
def test_good_by_the_smoke_tier_alone_says_so(tier, cell, told):
    made = replace(report(patch(cell)), tier=tier)
    text = " ".join(text_report(made).split())
    assert ("as far as the smoke tier tells: it runs each access path once" in text) == told
    assert ("As far as the smoke tier tells" in page(made)) == told


def test_of_what_is_not_known_nothing_is_claimed():
    made = report(patch(FAILS, reached=("", "", "em_mov em_xchg")))
    assert "reached ?/2" in text_report(made)
    assert "0 of 2 functions that changed, or whose data did, are known to have been executed" in " ".join(
        text_report(made).split()
    )
    assert "reached # SKIP not known whether what it changed was executed" in ktap_report(made)


# --- what was not executed --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reached", "words"),
    [
        (("a b", "", ""), "good"), (("", "a b", ""), "good, but nothing of what it changed was executed"),
        (("", "", "a"), "good, but nothing of what it changed is known to have been executed"),
        (("", "a", "b"), "good, but nothing of what it changed is known to have been executed"),
        (("a", "b", ""), "good, but 1 of 2 functions that it changed was not executed"),
        (("a", "b c", ""), "good, but 2 of 3 functions that it changed were not executed"),
        (("a", "b", "c"), "good, but 2 of 3 functions that it changed are not known to have been executed"),
    ],
)  # fmt: skip
def test_a_good_verdict_says_what_it_does_not_rest_on(reached, words):
    made = patch(AGREES, reached=reached)
    assert brief.verdict(made) == words
    lacking = words.removeprefix("good").removeprefix(", ")
    text, html = text_report(report(made)), page(report(made))
    assert f"  verdict:   {words}" in " ".join(text.replace("\n             ", " ").splitlines())
    assert html.count(words) >= (2 if lacking else 1), "in the table, and beside the patch's name"
    assert ("but not all that was changed was executed" in html) == bool(lacking)
    lines = text.splitlines()
    assert lines[3].startswith("  1  good ")
    assert lines[4].startswith("     but " if lacking else "     builds ")
    assert " ".join(f"{lines[4]} {lines[5]}".split()).startswith(lacking)
    assert (report(made).status, made.to_json()["outcome"]) == (0, "good")


def test_the_conclusion_names_the_patches_of_which_nothing_was_executed():
    text = text_report(report(patch(AGREES), patch(AGREES, reached=("", "em_mov", ""))))
    assert "\nall 2 patches are good\nbut of patch 2: nothing of what it changed was executed\n" in text


@pytest.mark.parametrize("made", [patch(build=IDENTICAL), patch(FAILS, reached=("", "a", "")), patch(build=BROKEN)])
def test_no_more_is_said_of_what_is_identical_or_bad(made):
    assert brief.verdict(made) == made.outcome.value


# --- for a mail -------------------------------------------------------------------------------------------------------


def test_lines_of_a_mail_are_short_and_commands_can_be_pasted():
    said = "rcx: expected 0x1122334455667788, got 0x8877665544332211 (xor 0x99); rsp: expected 0x1, got 0x2"
    names = " ".join(f"em_function_{n}" for n in range(30))
    worse = replace(FAILS, changes=(change("mismatch", said), change("agree", "", "alu/" + "x" * 40 + "@long#0")))
    long = replace(COMMIT, message="KVM: x86: " + "A subject of many words " * 6)
    text = text_report(report(patch(worse, commit=long, reached=("", names, "")), patch(LOST, build=BROKEN)))
    for line in text.splitlines():
        assert len(line) <= WIDTH or " " not in line.strip().removesuffix(" \\"), "a path has no place to break at"
    assert WIDTH <= 75
    command = re.search(r"again: +((?:.*\\\n)*.*)\n", text)[1]
    assert "\\\n" in command
    assert shlex.split(command.replace("\\\n", "")) == shlex.split(COMMAND.format(0).format("'gpr/mov@long#0'"))
    assert "got 0x8877665544332211" in " ".join(text.split())


@pytest.mark.parametrize("folder", ["it's mine", 'say "what"', "a {} b", "two  blanks", "plain"])
def test_a_command_with_any_path_in_it_can_be_pasted(folder):
    image = f"/home/{'x' * 30}/{folder}/bzImage"
    again = f"kvm-harness lab run --kernel {shlex.quote(image)} --config svm -k {{}}"
    worse = replace(FAILS, changes=(change("mismatch"),), command=again)
    text = text_report(report(patch(worse)))
    command = re.search(r"again: +((?:.*\\\n)*.*)\n", text)[1]
    words = shlex.split(command.replace("\\\n", ""))
    assert (words[4], words[-1]) == (image, "gpr/mov@long#0")


# --- KTAP -------------------------------------------------------------------------------------------------------------

RESULT = re.compile(r"^(ok|not ok) ([0-9]+) ?(- )?([^#]*)( # (SKIP|XFAIL|ERROR|TODO|TIMEOUT)\b.*)?$")
EVERY = {
    "good": patch(AGREES), "good, not executed": patch(AGREES, reached=("", "em_mov", "")),
    "identical": patch(CellReport("svm", ""), build=IDENTICAL), "bad": patch(FAILS), "other": patch(OTHER),
    "bad and untrue": patch(FAILS, replace(OTHER, cell="svm-emul"), commit=NO_CHANGE),
    "untrue": patch(OTHER, commit=NO_CHANGE), "unbuildable": patch(CellReport("svm", ""), build=BROKEN),
    "lost": patch(LOST), "lost in part": patch(AGREES, replace(LOST, cell="svm-emul")),
    "bad and lost": patch(replace(FAILS, problem="the emulator died")),
    "untrue and lost": patch(replace(OTHER, problem="the emulator died"), commit=NO_CHANGE),
    "not begun": patch(CellReport("svm", "", problem="an edit does not fit")),
    "inherits": patch(replace(AGREES, inherited={"gpr/mov@long#0": 0})),
    "layout": patch(AGREES, layout=LayoutReport(False, ("VCPU_REGS_RIP is a GPR index",))),
}  # fmt: skip


def parsed(text, indent):
    """(ok, number, name, directive) of each test, after its plan was seen to hold."""
    lines = [line.removeprefix(indent) for line in text.splitlines() if re.match(rf"{indent}(ok|not ok|1\.\.)", line)]
    found = [RESULT.match(line).groups() for line in lines[1:]]
    assert lines[0] == f"1..{len(found)}"
    assert [int(number) for _, number, *_ in found] == list(range(1, len(found) + 1))
    return {name.strip(): (result == "ok", directive) for result, _, _, name, _, directive in found}


@pytest.mark.parametrize("made", EVERY.values(), ids=EVERY)
def test_a_patch_is_ok_where_all_its_parts_are(made):
    text = ktap_report(report(made))
    ((name, (good, directive)),) = parsed(text, "").items()
    parts = parsed(text, "  ")
    assert name == f"{'1' * 12} {made.commit.subject.replace('#', '.')}"
    assert good == (made.outcome is Outcome.GOOD) == all(ok for ok, _ in parts.values())
    assert (directive == "ERROR") == (made.outcome is Outcome.LOST)
    assert all(not ok for ok, how in parts.values() if how == "ERROR")
    assert all(ok for ok, how in parts.values() if how == "SKIP")


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("bad", ["svm smoke", "behaviour"]), ("bad and untrue", ["svm smoke", "behaviour"]), ("untrue", ["behaviour"]),
        ("unbuildable", ["builds default"]), ("lost", ["svm smoke"]), ("lost in part", ["svm-emul smoke"]),
        ("layout", ["layout"]), ("not begun", ["svm"]), ("bad and lost", ["svm smoke", "behaviour"]),
        ("untrue and lost", ["svm smoke", "behaviour"]),
    ],
)  # fmt: skip
def test_what_is_bad_of_a_patch_is_not_ok(name, wrong):
    text = ktap_report(report(EVERY[name]))
    assert [part for part, (ok, _) in parsed(text, "  ").items() if not ok] == wrong
    assert f"\n# {EVERY[name].outcome.value}\nnot ok 1 " in text


@pytest.mark.parametrize(
    ("name", "skipped"),
    [
        ("identical", ["svm", "behaviour", "layout"]), ("unbuildable", ["svm", "behaviour", "layout"]),
        ("good, not executed", ["reached", "layout"]), ("good", ["layout"]), ("lost", ["behaviour", "layout"]),
    ],
)  # fmt: skip
def test_what_was_not_seen_is_not_ok_without_a_word(name, skipped):
    parts = parsed(ktap_report(report(EVERY[name])), "  ")
    assert [part for part, (_, how) in parts.items() if how == "SKIP"] == skipped


def test_patches_that_were_not_judged_are_errors():
    text = ktap_report(report(patch(AGREES), planned=3))
    assert text.endswith("not ok 2 # ERROR not judged\nnot ok 3 # ERROR not judged\n")
