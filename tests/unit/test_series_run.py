"""Verdicts on a toy's series, patch by patch, and that a series goes on where it was, however it ended."""

import pytest
from series_toy import CASES, Elsewhere, Shown, Tree, code, header, report_json, validate

from harness.cli import main
from harness.lab.errors import LabError, LabInputError
from harness.series.cli import VIEWS
from harness.series.verdict import Outcome
from harness.verdict import Verdict


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """One for all, as kernels are found by their content."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KVM_HARNESS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def tree(tmp_path):
    return Tree(tmp_path / "linux")


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def outcomes(report):
    return [p.outcome for p in report.patches]


def words_of(path):
    """A text without its line breaks."""
    return " ".join(path.read_text().split())


def ran(executor, number):
    """(cell, tier) of what ran for a patch, runs for a second look aside."""
    return [(what.partition("/")[2], tier) for what, tier in executor.ran if what.startswith(f"{number:04d}/")]


def test_base_runs_twice_in_every_cell_and_in_full(tree, out):
    tree.commit("nothing", code())
    there = Elsewhere()
    validate(tree, out, there)
    assert there.ran == [("svm/1", "full"), ("svm/2", "full"), ("svm-emul/1", "full"), ("svm-emul/2", "full")]


def test_base_is_built_and_runs_before_any_patch_is_at_work(tree, out):
    tree.commit("real one", code(mov="return x + 2;"))
    shown = Shown()
    validate(tree, out, Elsewhere(), display=shown)
    numbers = [number for _, number in shown.told]
    assert numbers == sorted(numbers)
    assert [*dict.fromkeys(shown.told)] == [("building", 0), ("running", 0), ("building", 1), ("running", 1)]


def test_a_rename_and_a_comment_are_identical_and_nothing_is_booted(tree, out):
    tree.commit("rename", code(name="em_move"))
    tree.commit("comment", code(name="em_move", line=3))
    there = Elsewhere()
    report = validate(tree, out, there)
    assert outcomes(report) == [Outcome.GOOD, Outcome.GOOD]
    assert [p.behaviour for p in report.patches] == ["same code", "same code"]
    assert report.patches[0].builds[0].code.renamed == {"em_mov": "em_move"}
    assert len(there.ran) == 4  # BASE
    assert report.status == 0


def test_changed_code_that_is_reached_runs_in_full(tree, out):
    tree.commit("refactoring\n\nNo functional change intended.", code(mov="return x + 0 * x + (x & 1) - (x & 1);"))
    tree.commit("real one", code(mov="return x + 2;"))
    there = Elsewhere()
    report = validate(tree, out, there)
    second = report.patches[-1]
    assert second.outcome is Outcome.GOOD
    assert second.behaviour == "same"
    assert second.reached.executed == {"em_mov"}
    assert ran(there, 2) == [("svm", "full"), ("svm-emul", "full")]


def test_changed_code_that_nothing_reaches_runs_smoke_and_is_said(tree, out):
    text = code().replace("x * 3", "x * 5")
    tree.commit("unreached", text)
    there = Elsewhere()
    report = validate(tree, out, there)
    assert report.patches[0].reached.never == {"em_never"}
    assert ran(there, 1) == [("svm", "smoke"), ("svm-emul", "smoke")]
    assert "changed but never executed: em_never" in (out / "report.txt").read_text()


def test_a_bug_is_blamed_on_its_patch_and_its_fix_mends(tree, out):
    tree.commit("before", code(mov="return x + 1;"))
    tree.commit("bug", code(f"fails {CASES[1]} in svm-emul", mov="return x + 1;"))
    tree.commit("after", code(f"fails {CASES[1]} in svm-emul", mov="return x + 2;"))
    tree.commit("rename", code(f"fails {CASES[1]} in svm-emul", mov="return x + 2;", name="em_move"))
    tree.commit("fix", code(mov="return x + 2;", name="em_move"))
    report = validate(tree, out, Elsewhere())
    assert outcomes(report) == [Outcome.GOOD, Outcome.BAD, Outcome.GOOD, Outcome.GOOD, Outcome.GOOD]
    assert report.first_bad is report.patches[1]
    assert report.status == 1
    assert [p.inherited for p in report.patches] == [{}, {}, {2: 1}, {2: 1}, {}]
    assert report.patches[4].behaviour == "1 mended"
    text = (out / "report.txt").read_text()
    assert "first bad patch: 2 of 5" in text
    assert f"svm-emul: {CASES[1]}: mismatch: rcx: expected 0x1, got 0x2" in text
    assert "kvm-harness lab run --kernel" in text
    assert f"--config svm-emul -k '{CASES[1]}'" in text
    page = (out / "report.html").read_text()
    assert "First bad patch: 2, " in page
    assert '<code class="deep">again: ' in page, "what belongs to a Case stands below it"


def test_the_cell_that_agrees_stays_good(tree, out):
    tree.commit("bug", code(f"fails {CASES[1]} in svm-emul"))
    (patch,) = validate(tree, out, Elsewhere()).patches
    assert [c.verdict for c in patch.cells] == [Verdict.AGREE, Verdict.MISMATCH]


def test_what_base_fails_in_is_no_patchs_fault(tree, out):
    tree.commit("base has a bug", code(f"fails {CASES[0]}"))
    tree.git("tag", "--force", "base")
    tree.commit("innocent", code(f"fails {CASES[0]}", mov="return x + 1;"))
    report = validate(tree, out, Elsewhere())
    assert outcomes(report) == [Outcome.GOOD]
    assert report.patches[0].inherited == {0: 2}
    assert "BASE fails by itself in svm: 1 case" in (out / "report.txt").read_text()


def test_a_patch_that_does_not_build_is_named_and_the_series_goes_on(tree, out):
    tree.commit("broken", code(mov="return y;"))
    tree.commit("repaired", code(mov="return x + 1;"))
    report = validate(tree, out, Elsewhere())
    assert outcomes(report) == [Outcome.UNBUILDABLE, Outcome.GOOD]
    assert "'y' undeclared" in report.patches[0].builds[0].errors[0]
    assert report.patches[1].builds[0].code.against.endswith('("Linux 7.3.9")')
    text = (out / "report.txt").read_text()
    assert 'first bad patch: 1 of 2' in text
    assert "arch/x86/kvm/emulate.c:3:16: error: 'y' undeclared" in text
    assert report.status == 1


def test_a_base_that_does_not_build_ends_it(tree, out):
    tree.commit("broken", code(mov="return y;"))
    tree.git("tag", "--force", "base")
    tree.commit("patch", code())
    with pytest.raises(LabInputError, match=r"BASE .* does not build .*\n.*'y' undeclared"):
        validate(tree, out, Elsewhere())


def test_other_behaviour_is_told_and_counts_against_no_functional_change(tree, out):
    tree.commit("feature", code(f"allows {CASES[0]}"))
    tree.commit("back\n\nNo functional change.", code())
    report = validate(tree, out, Elsewhere())
    assert outcomes(report) == [Outcome.GOOD, Outcome.UNTRUE]
    assert [p.behaviour for p in report.patches] == ["2 changed", "2 changed"]
    assert report.status == 1


def flaky(tree, *does):
    """A series of one patch that ``does`` things, on a BASE whose first Case is flaky."""
    tree.commit("flaky base", code(f"shakes {CASES[0]}"))
    tree.git("tag", "--force", "base")
    tree.commit("patch", code(f"shakes {CASES[0]}", *does, mov="return x + 1;"))


def test_flaky_on_base_is_quarantined_by_name(tree, out):
    flaky(tree, f"allows {CASES[0]}")
    report = validate(tree, out, Elsewhere())
    assert outcomes(report) == [Outcome.GOOD]
    assert list(report.quarantined["svm"]) == [CASES[0]]
    text = (out / "report.txt").read_text()
    assert f"quarantined in svm, since BASE did not show the same twice:\n  {CASES[0]}" in text


@pytest.mark.parametrize(("does", "verdict"), [("fails", Verdict.MISMATCH), ("warns in", Verdict.SPLAT)])
def test_what_is_flaky_on_base_is_excused_for_what_base_has_shown_only(tree, out, does, verdict):
    flaky(tree, f"{does} {CASES[0]}")
    tree.commit("innocent", code(f"shakes {CASES[0]}", f"{does} {CASES[0]}", mov="return x + 2;"))
    report = validate(tree, out, Elsewhere(), configs=("svm",))
    assert outcomes(report) == [Outcome.BAD, Outcome.GOOD]
    assert [c.verdict for c in report.patches[0].cells[0].failures] == [verdict]
    assert report.patches[1].inherited == {1: 1}


def test_what_base_has_shown_of_a_flaky_case_is_excused(tree, out):
    tree.commit("patch", code(mov="return x + 1;"))
    there = Elsewhere(odd={CASES[0]: {1, 2}}, odd_base={CASES[0]: {2}})
    report = validate(tree, out, there, configs=("svm",))
    assert outcomes(report) == [Outcome.GOOD]
    assert report.base_failures == {}
    assert report.patches[0].cells[0].quarantined == (CASES[0],)


def test_a_failure_that_is_not_seen_again_is_neither_good_nor_bad(tree, out):
    tree.commit("innocent?", code(mov="return x + 1;"))
    there = Elsewhere(odd={CASES[0]: {1}})
    report = validate(tree, out, there, configs=("svm",))
    assert outcomes(report) == [Outcome.LOST]
    assert report.status == 4
    again = [j for j in there.jobs if j.options.only]
    assert [j.options.only for j in again] == [{CASES[0]}] * 18  # once and eight times, on either kernel
    told = f"unsteady: {CASES[0]} failed once, not in 9 more runs; BASE never"
    assert report.patches[0].cells[0].problem == told
    assert told in words_of(out / "report.txt")


@pytest.mark.parametrize("later", [{3}, {5, 7}, {10}])
def test_a_failure_that_comes_and_goes_is_its_patchs(tree, out, later):
    tree.commit("bug", code(mov="return x + 1;"))
    tree.commit("innocent", code(mov="return x + 2;"))
    tree.commit("innocent too", code(mov="return x + 3;"))
    report = validate(tree, out, Elsewhere(odd={CASES[0]: {1, 12} | later}), configs=("svm",))
    assert outcomes(report) == [Outcome.BAD, Outcome.GOOD, Outcome.GOOD]
    assert [p.inherited for p in report.patches] == [{}, {1: 1}, {1: 1}]
    (change,) = report.patches[0].cells[0].failures
    assert change.after["summary"] == "rsi: expected 0x1, got 0x3"


def test_a_failure_that_base_shows_too_when_asked_often_is_bases(tree, out):
    tree.commit("innocent", code(mov="return x + 1;"))
    there = Elsewhere(odd={CASES[0]: {1, 4}}, odd_base={CASES[0]: {7}})
    report = validate(tree, out, there, configs=("svm",))
    assert outcomes(report) == [Outcome.GOOD]
    assert list(report.quarantined["svm"]) == [CASES[0]]


def test_other_behaviour_that_is_not_seen_again_is_no_verdict_but_is_told(tree, out):
    class Shaken(Elsewhere):
        def _run(self, job):
            super()._run(job)
            if job.folder.parent.name == "0001":  # the first run of the patch
                journal = job.folder / "journal.jsonl"
                journal.write_text(journal.read_text().replace(f'"{CASES[0]}"', f'"{CASES[0]}", "allowed": 5'))

    tree.commit("innocent", code(mov="return x + 1;"))
    report = validate(tree, out, Shaken(), configs=("svm",))
    assert outcomes(report) == [Outcome.GOOD]
    assert report.patches[0].cells[0].quarantined == (CASES[0],)
    assert CASES[0] in (out / "report.txt").read_text()


def test_a_case_that_kills_its_machine_every_time_is_never_good(tree, out):
    tree.commit("kills", code(f"dies of {CASES[1]}"))
    tree.commit("fix", code(mov="return x + 1;"))
    report = validate(tree, out, Elsewhere(), configs=("svm",))
    assert outcomes(report) == [Outcome.LOST, Outcome.GOOD]
    assert report.status == 4
    assert report.patches[0].cells[0].problem == f"1 Case lost: {CASES[1]}"
    assert f"lost: 1 Case lost: {CASES[1]}" in (out / "report.txt").read_text()


def test_what_base_loses_too_is_nobodys(tree, out):
    tree.commit("base dies of it", code(f"dies of {CASES[1]}"))
    tree.git("tag", "--force", "base")
    tree.commit("still lost", code(f"dies of {CASES[1]}", mov="return x + 1;"))
    tree.commit("runs now\n\nNo functional change.", code(mov="return x + 2;"))
    report = validate(tree, out, Elsewhere(), configs=("svm",))
    assert outcomes(report) == [Outcome.GOOD, Outcome.GOOD]


def test_a_case_that_base_lost_once_is_judged_like_any_other(tree, out):
    tree.commit("unlucky base", code(f"dies once of {CASES[1]}"))
    tree.git("tag", "--force", "base")
    tree.commit("bug", code(f"fails {CASES[1]}"))
    report = validate(tree, out, Elsewhere(), configs=("svm",))
    assert report.quarantined == {}
    assert outcomes(report) == [Outcome.BAD]


def test_a_kernel_that_panics_at_boot_is_bad(tree, out):
    tree.commit("panics", code("panics"))
    tree.commit("fixed", code())
    report = validate(tree, out, Elsewhere(), configs=("svm",))
    assert outcomes(report) == [Outcome.BAD, Outcome.GOOD]
    (change,) = report.patches[0].cells[0].failures
    assert change.verdict is Verdict.SPLAT
    assert "it does not boot: Kernel panic - not syncing: VFS" in change.after["summary"]
    assert report.patches[1].inherited == {}


def test_a_kernel_that_never_speaks_is_bad_where_base_does(tree, out):
    tree.commit("hangs", code("hangs"))
    report = validate(tree, out, Elsewhere(), configs=("svm",))
    assert outcomes(report) == [Outcome.BAD]
    assert "does not get to the suite, and BASE does" in (out / "report.txt").read_text()


def test_a_kernel_without_kvm_has_regressed(tree, out):
    tree.commit("no kvm", code("no-kvm"))
    (patch,) = validate(tree, out, Elsewhere(), configs=("svm",)).patches
    assert patch.cells[0].verdict is Verdict.REGRESSED


def test_a_capability_lost_against_base_has_regressed(tree, out):
    tree.commit("loses", code("loses capabilities"))
    tree.commit("more", code("loses capabilities", mov="return x + 1;"))
    tree.commit("back", code(mov="return x + 1;"))
    report = validate(tree, out, Elsewhere(), configs=("svm",))
    assert outcomes(report) == [Outcome.BAD, Outcome.GOOD, Outcome.GOOD]
    assert report.patches[0].cells[0].verdict is Verdict.REGRESSED
    assert [p.inherited for p in report.patches] == [{}, {1: 1}, {}]


def test_what_a_stock_kernel_has_and_base_has_not_is_nobodys(tree, out):
    tree.commit("patch", code(mov="return x + 1;"))
    report = validate(tree, out, Elsewhere())
    assert report.base_failures == {}
    assert report.patches[0].inherited == {}


def test_a_lost_cell_is_no_verdict(tree, out):
    tree.commit("unlucky", code("emulator dies"))
    report = validate(tree, out, Elsewhere(), configs=("svm",))
    assert outcomes(report) == [Outcome.LOST]
    assert report.status == 4
    assert report.first_bad is None
    assert "no verdict: lost: patch 1;" in (out / "report.txt").read_text()


def test_a_lost_base_ends_it(tree, out):
    tree.commit("unlucky", code("emulator dies"))
    tree.git("tag", "--force", "base")
    tree.commit("patch", code())
    with pytest.raises(LabError, match="BASE cannot be judged in svm: the emulator died"):
        validate(tree, out, Elsewhere(), configs=("svm",))


def test_smoke_only(tree, out):
    tree.commit("patch", code(mov="return x + 1;"))
    there = Elsewhere()
    validate(tree, out, there, tier="smoke")
    assert {tier for _, tier in there.ran} == {"smoke"}


def test_a_second_configuration_is_compared_and_runs_smoke(tree, out):
    tree.commit("patch", code(mov="return x + 1;"))
    tree.commit("rename", code(mov="return x + 1;", name="em_move"))
    there = Elsewhere()
    report = validate(tree, out, there, configs=("svm",), second=True)
    assert [b.flavour for b in report.patches[0].builds] == ["default", "debug"]
    assert ran(there, 1) == [("svm", "full"), ("svm-debug", "smoke")]
    assert ran(there, 2) == []
    assert report.patches[1].identical


def test_a_broken_register_map_is_bad_though_no_code_changed(tree, out):
    tree.write("include/linux/kvm_host.h", header("VCPU_REG_RIP = 3, VCPU_REG_LAST = NR_VCPU_GENERAL_PURPOSE_REGS"))
    tree.commit("RIP is an index of RBX", code())
    tree.commit("innocent", code(line=2))
    report = validate(tree, out, Elsewhere())
    assert outcomes(report) == [Outcome.BAD, Outcome.GOOD]
    assert report.patches[0].layout.brief == "wrong"
    text = words_of(out / "report.txt")
    assert "layout: RIP is no index of a general-purpose register: RIP is 3, as RBX" in text


def test_a_register_map_that_only_changes_is_told(tree, out):
    tree.write("include/linux/kvm_host.h", header("VCPU_REG_RIP = NR_VCPU_GENERAL_PURPOSE_REGS, VCPU_REG_CR3"))
    tree.commit("another register", code())
    (patch,) = validate(tree, out, Elsewhere()).patches
    assert patch.outcome is Outcome.GOOD
    assert "CR3: none → 17" in patch.layout.changed


# --- going on ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def series(tree):
    tree.commit("before", code(mov="return x + 1;"))
    tree.commit("bug", code(f"fails {CASES[1]}", mov="return x + 1;"))
    tree.commit("broken", code(mov="return y;"))
    tree.commit("fix", code(mov="return x + 1;"))
    return tree


def told(out):
    """The verdicts, without times."""
    return [
        (p["outcome"], p["behaviour"], p["reached"], [(c["cell"], c["verdict"], c["counts"]) for c in p["cells"]])
        for p in report_json(out)["patches"]
    ]


def test_nothing_runs_twice(series, out):
    validate(series, out, Elsewhere())
    before = told(out)
    there = Elsewhere()
    validate(series, out, there)
    assert there.ran == []
    assert told(out) == before


@pytest.mark.parametrize("jobs", [0, 3, 4, 6, 8])
def test_a_series_that_was_stopped_goes_on_and_ends_the_same(series, out, tmp_path, jobs):
    whole = Elsewhere()
    validate(series, tmp_path / "whole", whole)
    first = Elsewhere(stop_after=jobs)
    with pytest.raises(KeyboardInterrupt):
        validate(series, out, first)
    second = Elsewhere()
    validate(series, out, second)
    assert first.ran + second.ran == whole.ran
    assert told(out) == told(tmp_path / "whole")


def test_a_cell_that_was_torn_in_the_middle_runs_again(series, out):
    validate(series, out, Elsewhere())
    before = told(out)
    journal = out / "patches" / "0002" / "svm" / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-30])
    there = Elsewhere()
    validate(series, out, there)
    assert there.ran == [("0002/svm", "full")]
    assert told(out) == before


def test_another_series_into_the_same_folder_is_refused(series, out):
    validate(series, out, Elsewhere())
    series.commit("one more", code())
    with pytest.raises(LabInputError, match=r"holds another series \(commits differ\): give another --out"):
        validate(series, out, Elsewhere())


def test_a_folder_with_something_else_is_refused_and_left_as_it_is(series, out):
    out.mkdir()
    (out / "thesis.tex").write_text("")
    with pytest.raises(LabInputError, match="holds something else than a series"):
        validate(series, out, Elsewhere())
    assert [p.name for p in out.iterdir()] == ["thesis.tex"]


def test_a_folder_that_cannot_be_read_is_refused(series, out, monkeypatch):
    def refuses(path):
        raise PermissionError(13, "Permission denied", str(path))

    out.mkdir()
    monkeypatch.setattr(type(out), "iterdir", refuses)
    with pytest.raises(LabInputError, match="cannot be read: no permission; give another --out"):
        validate(series, out, Elsewhere())


def test_other_options_into_the_same_folder_are_refused(series, out):
    validate(series, out, Elsewhere())
    with pytest.raises(LabInputError, match=r"holds this series with other options \(cells differ\)"):
        validate(series, out, Elsewhere(), configs=("svm-emul",))


def test_two_runs_into_one_folder(series, out):
    class Nosy(Elsewhere):
        def submit(self, function, job):
            with pytest.raises(LabInputError, match="another run validates this series there"):
                validate(series, out, Elsewhere())
            return super().submit(function, job)

    validate(series, out, Nosy(), configs=("svm",))


# --- views ------------------------------------------------------------------------------------------------------------


def test_ktap_says_the_same(series, out):
    validate(series, out, Elsewhere())
    lines = (out / "report.ktap").read_text().splitlines()
    assert lines[0] == "KTAP version 1"
    results = [line.split(" ")[0:2] for line in lines if line.startswith(("ok", "not"))]
    assert [r[0] for r in results] == ["ok", "not", "not", "ok"]
    assert "  not ok 1 builds default" in lines
    assert any(line.startswith("  not ok ") and line.endswith(" behaviour") for line in lines)
    assert f"  # {CASES[1]}: mismatch: rcx: expected 0x1, got 0x2" in lines


@pytest.mark.parametrize(
    ("name", "begin"), [("text", "kvm-harness series base..main"), ("html", "<!DOCTYPE"), ("ktap", "KTAP version 1")]
)
def test_report_shows_a_series_folder(series, out, capsys, name, begin):
    validate(series, out, Elsewhere())
    assert main(["report", str(out), "--format", name]) == 1
    shown = capsys.readouterr().out
    assert shown.startswith(begin)
    assert shown == (out / VIEWS[name]).read_text()


def test_report_names_the_files_of_a_series_and_what_there_is_not(series, out, capsys):
    with pytest.raises(KeyboardInterrupt):
        validate(series, out, Elsewhere(stop_after=0))
    assert main(["report", str(out)]) == 2
    assert "no report yet: BASE's runs are not finished" in capsys.readouterr().err
    with pytest.raises(KeyboardInterrupt):
        validate(series, out, Elsewhere(stop_after=5))
    assert main(["report", str(out), "--format", "html,ktap"]) == 4
    said = capsys.readouterr()
    assert said.out.split() == [str(out / "report.html"), str(out / "report.ktap")]
    assert "incomplete: 0 of 4 patches judged so far" in said.err
    assert main(["report", str(out), "--format", "junit"]) == 2
    assert "a series, which has no junit view: give text, html, ktap" in capsys.readouterr().err
    (out / "report.ktap").unlink()
    assert main(["report", str(out), "--format", "html,ktap"]) == 2
    assert "report.ktap is missing: give the series' command again" in capsys.readouterr().err
    (out / "report.json").write_text("{}")
    assert main(["report", str(out)]) == 2
    assert "'complete' of report.json is missing" in capsys.readouterr().err


def test_the_page_is_whole_and_refers_to_nothing_outside(series, out):
    validate(series, out, Elsewhere())
    page = (out / "report.html").read_text()
    assert "2 of 4 patches bad; the first is patch 2" in page
    assert page.rstrip().endswith("</html>")
    assert "http" not in page
    assert page.count("<tr>") == 5


def test_json_has_everything(series, out):
    report = validate(series, out, Elsewhere())
    found = report_json(out)
    assert found["status"] == 1
    assert found["first bad"] == report.patches[1].commit.id
    assert [p["outcome"] for p in found["patches"]] == ["good", "bad", "does not build", "good"]
    assert found["patches"][1]["cells"][0]["changes"][0]["after"]["summary"] == "rcx: expected 0x1, got 0x2"
