"""Views of a journal: text, JUnit, KTAP and HTML say the same of the same run."""

import re
import xml.etree.ElementTree as ET
import zlib
from html.parser import HTMLParser
from pathlib import Path

import pytest

from harness.journal import Damage, RunResults
from harness.report.compare import compare_runs, comparison_text
from harness.report.html import html_report
from harness.report.junit import junit_report
from harness.report.ktap import ktap_report
from harness.report.probe import probe_text
from harness.report.text import summary_lines, text_report
from harness.report.views import family_and_mode

ODD = 'rcx: expected 0x3 <&> "got" \x07 0x4'


def record(name, verdict="agree", summary="", **more):
    key = f"{zlib.crc32(name.encode()):012x}"
    return {"case": name, "id": key, "verdict": verdict, "checks": 2, "summary": summary, "seconds": 0.25, **more}


RECORDS = (
    record("gpr/mov@long#0"), record("gpr/mov@real#0"),
    record("gpr/add@long#0", "mismatch", ODD),
    record("alu/aam@real#0", "known", "aam-flags: rflags: expected 0x2, got 0x6"),
    record("alu/daa@real#0", "unsupported", "this KVM's emulator lacks 27 in real"),
    record("alu/daa@prot32#0", "unsupported", "this KVM's emulator lacks 27 in prot32"),
    record("alu/x@real#0", "splat", "the kernel killed the VM"),
    record("apx/y@long#0", "lost", "the model cannot run this guest"),
    record("apx/z@long#0", "healed", "some-row no longer diverges"),
)  # fmt: skip


def run_of(*records, finished=True, damage=(), folder=Path("/nowhere"), chosen=None, enough=False, **header):
    header = {"host": "Linux 7.3 <kvm_amd>", "started": "2026-11-23T12:00:00+00:00", **header}
    return RunResults(folder / "journal.jsonl", header, tuple(records), finished, tuple(damage), chosen, "", enough)


@pytest.fixture
def whole():
    return run_of(*RECORDS)


@pytest.fixture
def broken():
    return run_of(*RECORDS, finished=False, damage=(Damage(3, "no JSON"),))


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("gpr/mov@long#0", ("gpr", "long")), ("resume/pending/in@prot32#1", ("resume", "prot32")),
        ("alone", ("", "")), ("a/b", ("a", "")),
    ],
)  # fmt: skip
def test_family_and_mode(name, parts):
    assert family_and_mode(name) == parts


# --- text -----------------------------------------------------------------------------------------------------------


def test_summary_counts_by_verdict_and_groups_reasons():
    lines = summary_lines(RECORDS)
    assert lines[0] == "9 cases, 18 checks: 1 splat, 1 mismatch, 1 healed, 1 known, 2 unsupported, 1 lost, 2 agree"
    assert "  not possible on this host:     2 × this KVM's emulator lacks 27" in lines
    assert "  known divergence:     1 × aam-flags" in lines
    assert summary_lines([]) == []


def test_text_names_the_worst_first_and_how_to_replay_it(whole):
    lines = text_report(whole).splitlines()
    assert lines[0] == "Linux 7.3 <kvm_amd>, started 2026-11-23T12:00:00+00:00"
    assert [line.split()[0] for line in lines[1:8:2]] == ["splat", "mismatch", "lost", "healed"]
    assert lines[2].strip() == f"kvm-harness replay {RECORDS[6]['id']}"


def test_text_shows_the_first_case_of_a_known_divergence_and_how_many_more_there_are():
    aam = [record(f"alu/aam@real#{n}", "known", f"aam-flags: rflags: expected 0x2, got {n:#x}") for n in range(3)]
    other = record("step/out@real#0", "known", "late-step: exit: expected a, got b")
    lines = text_report(run_of(aam[0], other, *aam[1:])).splitlines()
    assert [line.split()[2] for line in lines if line.startswith("known ")] == ["alu/aam@real#0:", "step/out@real#0:"]
    assert [line.strip() for line in lines if "more of" in line] == ["and 2 more of this row"]
    assert lines.index("           and 2 more of this row") == lines.index(next(x for x in lines if "alu/aam" in x)) + 1


def test_replay_names_the_file_that_the_run_kept(tmp_path):
    kept = tmp_path / "cases" / f"{RECORDS[2]['id']}.json"
    kept.parent.mkdir()
    kept.write_text("{}")
    for view in (text_report, junit_report, ktap_report, html_report):
        assert f"kvm-harness replay {kept}" in view(run_of(*RECORDS, folder=tmp_path))


def test_a_run_in_the_lab_names_the_command_of_its_own():
    lab = run_of(*RECORDS, again="kvm-harness lab run --config svm --debian 7.3 -k")
    for view in (text_report, junit_report, ktap_report):
        assert "kvm-harness lab run --config svm --debian 7.3 -k 'gpr/add@long#0'" in view(lab)
        assert "replay" not in view(lab)
    whole = run_of(record("kernel/log/oops", "splat", "oops") | {"id": ""}, again="kvm-harness lab run --config svm -k")
    assert "\n           kvm-harness lab run --config svm\n" in text_report(whole)


def test_a_cell_is_told_once_and_with_each_case_where_there_are_several():
    one = text_report(run_of(*RECORDS, cell="svm × 7.3"))
    assert one.count("svm × 7.3") == 1
    two = text_report(run_of(*RECORDS, record("gpr/q@real#0", "mismatch", "x", cell="svm × 6.1"), cell="svm × 7.3"))
    assert "gpr/q@real#0 [svm × 6.1]: x" in two
    assert "gpr/add@long#0 [svm × 7.3]: rcx" in two


def test_a_run_that_stopped_at_a_failure_says_how_far_it_came():
    stopped = text_report(run_of(*RECORDS, chosen=40, enough=True))
    assert "9 of 40 cases ran: enough of them had failed" in stopped.splitlines()
    assert "cases ran" not in text_report(run_of(*RECORDS, chosen=9, enough=True))


def test_a_run_of_other_tests_too_has_not_stopped_at_a_failure():
    """As pytest's own over all of tests/kvm: what was chosen is more than the Cases."""
    assert "cases ran" not in text_report(run_of(*RECORDS, chosen=40))


def test_one_is_not_several():
    one = record("gpr/mov@long#0", checks=1)
    assert summary_lines([one]) == ["1 case, 1 check: 1 agree"]
    text = comparison_text(compare_runs(run_of(one), run_of({**one, "verdict": "mismatch"})))
    assert "agree -> mismatch: 1 case\n" in text
    assert text.endswith("1 verdict changed, 0 are the same\n")


# --- JUnit ----------------------------------------------------------------------------------------------------------


def test_junit_has_a_suite_for_a_family_and_a_test_for_a_case(whole):
    top = ET.fromstring(junit_report(whole))
    assert [s.get("name") for s in top] == ["gpr", "alu", "apx"]
    assert {name: top.get(name) for name in ("tests", "failures", "errors", "skipped")} == {
        "tests": "9", "failures": "2", "errors": "1", "skipped": "2"
    }  # fmt: skip
    assert top.find("testsuite/properties/property").get("value") == "Linux 7.3 <kvm_amd>"
    failed = top.find(".//testcase[@name='gpr/add@long#0']/failure")
    assert failed.get("type") == "mismatch"
    assert failed.get("message") == ODD.replace("\x07", "\ufffd")
    assert top.find(".//testcase[@name='alu/aam@real#0']/system-out").text.startswith("known: aam-flags")


def test_junit_has_an_error_for_what_is_missing(broken):
    top = ET.fromstring(junit_report(broken))
    errors = [e.get("message") for e in top.findall("testsuite[@name='the run itself']/testcase/error")]
    assert len(errors) == 2
    assert "journal.jsonl:3: damaged" in errors[0]
    assert top.get("errors") == "3"


# --- KTAP -----------------------------------------------------------------------------------------------------------

# As tools/testing/kunit/kunit_parser.py of Linux reads them.
RESULT = re.compile(r"^\s*(ok|not ok) ([0-9]+) ?(- )?([^#]*)( # (SKIP|XFAIL|ERROR|TODO|TIMEOUT)\b.*)?$")


def ktap_lines(text, indent):
    return [line.strip() for line in text.splitlines() if re.match(rf"{indent}(ok|not ok|1\.\.)", line)]


def test_ktap_is_nested_numbered_and_planned(whole):
    text = ktap_report(whole)
    assert text.startswith("KTAP version 1\n")
    for indent, plans in (("", ["1..3"]), ("  ", ["1..3", "1..4", "1..2"])):
        lines = ktap_lines(text, indent)
        assert [line for line in lines if line.startswith("1..")] == plans
        assert all(RESULT.match(line) for line in lines if not line.startswith("1.."))
    assert "not ok 1 gpr" in text.splitlines()
    assert "not ok 3 apx" in text.splitlines()


def test_ktap_directives(whole):
    lines = ktap_lines(ktap_report(whole), "  ")
    assert "ok 1 gpr/mov@long.0" in lines
    assert "not ok 3 gpr/add@long.0" in lines
    assert any(re.match(r"ok 1 alu/aam@real\.0 # XFAIL aam-flags", line) for line in lines)
    assert any(re.match(r"ok 2 alu/daa@real\.0 # SKIP this KVM", line) for line in lines)
    assert any(re.match(r"not ok 1 apx/y@long\.0 # ERROR the model", line) for line in lines)
    assert "ok 2 apx/z@long.0" in lines


def test_ktap_fails_where_results_are_missing(broken):
    assert re.search(r"^not ok 4 .* # ERROR .*journal.jsonl:3: damaged", ktap_report(broken), re.MULTILINE)


# --- HTML -----------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    VOID = ("meta", "br")

    def __init__(self, text):
        super().__init__()
        self.open, self.links, self.words = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        if tag not in self.VOID:
            self.open.append(tag)
        self.links += [v for k, v in attributes if k in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_html_is_well_formed_and_self_contained(whole):
    page = Page(html_report(whole))
    assert page.open == []
    assert page.links == []
    assert "url(" not in html_report(whole)
    text = " ".join(page.words)
    assert "kvm-harness: 1 splat, 1 mismatch, 1 lost" in text
    assert ODD in text
    assert "Linux 7.3 <kvm_amd>" in text


def test_html_colours_a_square_by_its_worst_verdict(whole):
    text = html_report(whole)
    assert '<td class="good" title="1 agree">1</td>' in text
    assert '<td class="bad" title="1 agree, 1 mismatch">2, 1 bad</td>' in text
    assert '<td class="none" title="1 unsupported">0/1</td>' in text


def test_html_headlines():
    assert "<h1>kvm-harness: agrees</h1>" in html_report(run_of(RECORDS[0]))
    assert "<h1>kvm-harness: incomplete</h1>" in html_report(run_of(RECORDS[0], finished=False))
    assert "<h1>kvm-harness: nothing ran</h1>" in html_report(run_of(RECORDS[4]))


def test_html_says_what_is_missing(broken):
    text = " ".join(Page(html_report(broken)).words)
    assert "journal.jsonl:3: damaged" in text
    assert "incomplete" in text


def test_text_says_first_that_a_run_is_incomplete(broken):
    assert "incomplete" not in text_report(run_of(RECORDS[0]))
    cut = text_report(run_of(RECORDS[0], finished=False))
    assert 0 <= cut.index("incomplete") < cut.index("agree")
    assert "journal.jsonl:3: damaged" in text_report(broken)


# --- comparison -----------------------------------------------------------------------------------------------------


def test_equal_runs_compare_equal(whole):
    found = compare_runs(whole, run_of(*reversed(RECORDS)))
    assert (found.changed, found.only_a, found.only_b, found.same) == ((), (), (), 9)
    assert found.status == 0


def test_two_runs_without_a_case_in_common_are_no_comparison():
    found = compare_runs(run_of(record("a", "agree")), run_of(record("b", "agree")))
    assert found.status == 2
    assert "no case is in both" in comparison_text(found)


@pytest.mark.parametrize("verdict", ["mismatch", "splat", "unsupported", "known", "lost"])
def test_what_agreed_and_no_longer_does_is_status_1(verdict):
    found = compare_runs(run_of(RECORDS[0]), run_of({**RECORDS[0], "verdict": verdict, "summary": "why"}))
    assert found.status == 1
    text = comparison_text(found)
    assert f"agree -> {verdict}: 1 case" in text
    assert "gpr/mov@long#0" in text
    assert "why" in text


@pytest.mark.parametrize(("before", "after"), [("mismatch", "agree"), ("known", "mismatch"), ("unsupported", "agree")])
def test_other_changes_are_told_and_status_0(before, after):
    name = "gpr/mov@long#0"
    found = compare_runs(run_of(record(name, before, "then")), run_of(record(name, after)))
    assert found.status == 0
    assert f"{before} -> {after}: 1 case" in comparison_text(found)


def test_cases_of_one_side_are_named_and_counted():
    found = compare_runs(run_of(*RECORDS[:2]), run_of(*RECORDS[1:3]))
    text = comparison_text(found)
    assert "only in A: 1 case (1 agree): gpr/mov@long#0" in text
    assert "only in B: 1 case (1 mismatch): gpr/add@long#0" in text
    assert found.status == 0


def test_an_incomplete_side_is_no_success():
    assert compare_runs(run_of(RECORDS[0]), run_of(RECORDS[0], finished=False)).status == 4
    assert compare_runs(run_of(RECORDS[0]), run_of({**RECORDS[0], "verdict": "splat"}, finished=False)).status == 1


def test_cells_are_compared_one_by_one_only_where_there_are_several():
    a, b = run_of(record("x/y@real#0"), cell="svm × 6.1"), run_of(record("x/y@real#0", "mismatch"), cell="svm × 7.3")
    assert compare_runs(a, b).status == 1
    two = run_of(record("x/y@real#0", cell="p"), record("x/y@real#0", "mismatch", cell="q"))
    assert compare_runs(two, two).same == 2


def test_the_same_name_with_other_content_is_said():
    other = {**RECORDS[0], "id": "ffffffffffff"}
    assert "1 case has the same name but not the same content" in comparison_text(
        compare_runs(run_of(RECORDS[0]), run_of(other))
    )


def test_many_changes_are_cut():
    names = [f"gpr/{n}@long#0" for n in range(100)]
    text = comparison_text(compare_runs(run_of(*map(record, names)), run_of(*(record(n, "mismatch") for n in names))))
    assert "agree -> mismatch: 100 cases" in text
    assert "  ... and 60 more" in text


# --- probe ----------------------------------------------------------------------------------------------------------


def test_probe_says_of_each_behaviour_whether_it_is_good():
    found = {
        "device": "/dev/kvm", "capabilities": {"A": 1}, "vendor": "AuthenticAMD", "features": ["lm"], "apx": False,
        "modes": {"real": "", "pae": "ends in Shutdown()"}, "single_step": {"real": True},
        "exception_delivery": {"real": "", "prot32": "the frame is elsewhere"}, "emulator_lacks": {"daa": ["real"]},
        "traits": {"pat-reserved-types": "", "iret-in-compat": "IRET raises vector 13"},
    }  # fmt: skip
    lines = probe_text("a host", found).splitlines()
    assert "  good  WRMSR of a reserved memory type to PAT raises #GP" in lines
    at = lines.index("  odd   compatibility mode: IRET works")
    assert lines[at + 1].strip() == "here: IRET raises vector 13"
    assert "  odd   prot32       the frame is elsewhere" in lines
    assert "  good  real" in lines
    assert "  pae          no; ends in Shutdown()" in lines


def test_compare_tells_of_other_behaviour_that_is_allowed():
    first = {**RECORDS[0], "verdict": "agree", "summary": ""}
    found = compare_runs(run_of({**first, "allowed": 1}), run_of({**first, "allowed": 2}))
    assert [r["case"] for r in found.otherwise] == [first["case"]]
    assert found.status == 0
    assert f"1 case behaves otherwise where the model allows it (undefined flags, batched I/O): {first['case']}" in (
        comparison_text(found)
    )
    assert not compare_runs(run_of({**first, "allowed": 1}), run_of({**first, "allowed": 1})).otherwise
