"""What counts as the same behaviour, as worse, as merely other; and what ftrace's profile says of changed functions."""

import pytest

from harness.series import behaviour
from harness.series.behaviour import Change, Recording, change_text, signature, worst_first
from harness.series.coverage import Reached, Symbols, reached, reached_lines
from harness.verdict import Verdict


def record(name="gpr/mov@long#0", verdict="agree", checks=1, summary="", allowed=0):
    out = {"case": name, "id": "0123456789ab", "verdict": verdict, "checks": checks, "summary": summary, "seconds": 1}
    return out | ({"allowed": allowed} if allowed else {})


def recording(*records):
    by_name = {r["case"]: r for r in records}
    return Recording.of_twice(by_name, by_name)


def changes(before, after):
    return recording(before).changes({after["case"]: after})


def test_the_same_twice_is_no_change():
    assert changes(record(allowed=7), record(allowed=7)) == []


@pytest.mark.parametrize("other", [record(allowed=8), record(checks=2), record(verdict="healed")])
def test_what_the_model_allows_but_base_did_not_show_is_changed_and_does_not_fail(other):
    (found,) = changes(record(allowed=7), other)
    assert not found.fails
    assert not found.mended


def test_time_is_no_behaviour():
    assert signature(record() | {"seconds": 9.0}) == signature(record())


def test_a_new_failure_fails():
    (found,) = changes(record(), record(verdict="mismatch", summary="rax: expected 0x1, got 0x2"))
    assert found.fails
    assert change_text(found) == "mismatch: rax: expected 0x1, got 0x2"


def test_an_old_failure_is_nobodys():
    bad = record(verdict="mismatch", summary="rax: expected 0x1, got 0x2")
    assert changes(bad, bad) == []
    assert recording(bad).failures() == {bad["case"]: bad}


def test_a_failure_that_ends_is_mended():
    (found,) = changes(record(verdict="mismatch", summary="rax"), record())
    assert found.mended
    assert not found.fails


@pytest.mark.parametrize("verdict", ["unsupported", "known", "suspect"])
def test_what_was_right_and_is_now_excused_has_regressed(verdict):
    (found,) = changes(record(), record(verdict=verdict, summary="this KVM's emulator lacks 0f c7 in long"))
    assert found.verdict is Verdict.REGRESSED
    assert found.fails


def test_what_was_excused_before_may_stay_so():
    (found,) = changes(record(verdict="known", summary="a"), record(verdict="unsupported", summary="b"))
    assert not found.fails


def test_a_splat_is_the_same_wherever_its_line_has_moved():
    before = record(verdict="splat", summary="WARNING: CPU: 0 PID: 91 at arch/x86/kvm/x86.c:120 f+0x1/0x2; console: a")
    after = record(verdict="splat", summary="WARNING: CPU: 0 PID: 88 at arch/x86/kvm/x86.c:131 f+0x3/0x2; console: b")
    assert changes(before, after) == []


def test_lost_cases_say_nothing():
    assert changes(record(), record(verdict="lost", summary="emulator died")) == []


def test_flaky_cases_are_quarantined_by_name():
    steady, shaky = record("a"), record("b")
    found = Recording.of_twice({"a": steady, "b": shaky}, {"a": steady, "b": record("b", allowed=3)})
    assert list(found.flaky) == ["b"]
    assert found.changes({"b": record("b", allowed=4), "a": steady}) == []


def bad(name="a", differs=("rax",), values="0x1, got 0x2", **more):
    return record(name, "mismatch", summary=f"{differs[0]}: expected {values}", **more) | {"differs": list(differs)}


def test_a_flaky_case_is_excused_for_what_base_has_shown_whatever_the_values():
    base = Recording.of_twice({"a": record("a")}, {"a": bad()})
    assert base.changes({"a": bad(values="0x7, got 0x9")}) == []
    assert base.after({"a": bad(values="0x7, got 0x9")}).failures() == {}


@pytest.mark.parametrize("after", [
    bad(differs=("rax", "rcx")), bad(differs=("exit",)), record("a", "splat", summary="WARNING: at f"),
    record("a", "suspect", summary="s"), record("a", "known", summary="row: rax"),
])  # fmt: skip
def test_a_flaky_case_is_not_excused_for_what_base_never_showed(after):
    base = Recording.of_twice({"a": record("a")}, {"a": bad()})
    (found,) = base.changes({"a": after})
    assert found.fails


def test_a_failure_that_base_never_showed_stays_in_the_list_of_failures():
    base = Recording.of_twice({"a": record("a")}, {"a": record("a", allowed=5)})
    assert list(base.after({"a": bad()}).failures()) == ["a"]
    base.quarantine({"a": bad()})
    assert base.after({"a": bad()}).failures() == {}


def test_another_exit_is_another_kind():
    base = Recording.of_twice({"a": record("a")}, {"a": bad(differs=("exit",), values="hlt, got io 0x10")})
    assert base.changes({"a": bad(differs=("exit",), values="hlt, got io 0x20")}) == []
    assert base.changes({"a": bad(differs=("exit",), values="hlt, got shutdown")})


def test_a_case_that_was_lost_once_is_not_flaky():
    lost, agrees = record("a", "lost", summary="the emulator died"), record("a", allowed=3)
    for first, second in ((lost, agrees), (agrees, lost)):
        base = Recording.of_twice({"a": first}, {"a": second})
        assert base.flaky == {}
        assert base.records == {"a": agrees}
        assert base.changes({"a": agrees}) == []


def test_a_case_that_base_lost_has_no_yardstick_but_the_model():
    base = recording(record("a", "lost", summary="the emulator died"))
    assert base.changes({"a": record("a", allowed=3)}) == []
    (found,) = base.changes({"a": bad()})
    assert found.fails


def test_what_diverges_now_and_then_is_no_change(monkeypatch):
    monkeypatch.setattr(behaviour, "_now_and_then", lambda: frozenset({"past-int"}))
    shows = record(verdict="known", summary="past-int: memory 0x1efd8")
    assert changes(record(), shows) == changes(shows, record()) == []
    assert Recording.of_twice({shows["case"]: record()}, {shows["case"]: shows}).flaky == {}
    (found,) = changes(record(), record(verdict="known", summary="another: memory 0x1efd8"))
    assert found.verdict is Verdict.REGRESSED


@pytest.mark.parametrize("verdict", ["mismatch", "splat", "unsupported", "suspect"])
def test_what_diverges_now_and_then_is_excused_for_that_only(monkeypatch, verdict):
    monkeypatch.setattr(behaviour, "_now_and_then", lambda: frozenset({"past-int"}))
    shows = record(verdict="known", summary="past-int: memory 0x1efd8")
    (found,) = changes(shows, record(verdict=verdict, summary="rax: expected 0x1, got 0x2"))
    assert found.fails


def test_a_third_run_of_base_can_quarantine_too():
    found = recording(record("a"))
    assert found.quarantine({"a": record("a")}) == []
    assert found.quarantine({"a": record("a", verdict="mismatch", summary="x")}) == ["a"]
    assert found.failures() == {}


def test_the_next_recording_keeps_what_was_not_run_again():
    base = recording(record("a"), record("b"))
    after = base.after({"b": record("b", allowed=5), "c": record("c", verdict="lost")})
    assert set(after.records) == {"a", "b"}
    assert after.changes({"b": record("b", allowed=5)}) == []
    assert base.records["b"] == record("b")


def test_failures_are_told_first():
    rows = [record("a", allowed=1), record("b", verdict="mismatch"), record("c", verdict="splat")]
    found = [Change(r["case"], record(r["case"]), r) for r in rows]
    assert [c.name for c in worst_first(found)] == ["c", "b", "a"]


# --- reached ----------------------------------------------------------------------------------------------------------

MAP = """\
ffffffff81000000 T _text
ffffffff81000000 T startup
ffffffff81000100 t em_add
ffffffff81000140 T kvm_set_rflags
ffffffff81000140 T alias_of_it
ffffffff81000200 t kvm_vcpu_ioctl_x86_set_vcpu_events
ffffffff81000300 t kvm_vcpu_ioctl_x86_set_vcpu_event_none
ffffffff82000000 D some_data
"""


@pytest.fixture
def symbols(tmp_path):
    path = tmp_path / "System.map"
    path.write_text(MAP)
    return Symbols(path)


def answer(*seen, missing=(), offsets=True):
    return {"seen": list(seen), "missing": list(missing), "offsets": offsets}


def test_offsets_become_names(symbols):
    found = reached(["em_add", "kvm_set_rflags", "startup"], [answer("_text+0x104", "_text+0x144")], 1, symbols)
    assert found == Reached(frozenset({"em_add", "kvm_set_rflags"}), frozenset({"startup"}))


def test_names_are_shown_cut_and_may_be_ambiguous(symbols):
    long = ["kvm_vcpu_ioctl_x86_set_vcpu_events", "kvm_vcpu_ioctl_x86_set_vcpu_event_none", "em_add"]
    shown = "kvm_vcpu_ioctl_x86_set_vcpu_ev"
    found = reached(long, [answer(shown, offsets=False)], 1, symbols)
    assert found == Reached(frozenset(), frozenset({"em_add"}), frozenset(long[:2]))
    found = reached([long[0], "em_add"], [answer(shown, offsets=False)], 1, symbols)
    assert found == Reached(frozenset({long[0]}), frozenset({"em_add"}))


def test_what_ftrace_cannot_follow_is_not_known(symbols):
    found = reached(["em_add", "noinstr"], [answer(missing=["noinstr"])], 1, symbols)
    assert found == Reached(frozenset(), frozenset({"em_add"}), frozenset({"noinstr"}))


def test_a_lost_machine_may_have_executed_anything(symbols):
    found = reached(["em_add", "startup"], [answer("_text+0x104")], 2, symbols)
    assert found.executed == {"em_add"}
    assert found.unknown == {"startup"}
    assert found.problem == "a machine was lost"


def test_a_machine_that_was_ended_early_has_told_what_it_saw(symbols):
    early = [answer("_text+0x104") | {"whole": False}, answer("_text+0x144") | {"whole": False}]
    found = reached(["em_add", "kvm_set_rflags", "startup"], early, 2, symbols, enough=True)
    assert found.executed == {"em_add", "kvm_set_rflags"}
    assert found.unknown == {"startup"}
    assert found.problem == "so many Cases failed that the run was ended"


def test_what_no_run_could_follow_is_not_put_down_to_its_early_end(symbols):
    early = [answer("_text+0x104", missing=["noinstr"]) | {"whole": False}]
    found = reached(["em_add", "noinstr"], early, 1, symbols, enough=True)
    assert (found.unknown, found.problem) == ({"noinstr"}, "")
    assert "ftrace cannot follow them" in reached_lines(found)[1]


def test_a_kernel_without_the_profile_says_so(symbols):
    found = reached(["em_add"], [{"error": "no function profile"}], 1, symbols)
    assert found.unknown == {"em_add"}
    assert "no function profile" in reached_lines(found)[1]


def test_two_cells_together(symbols):
    one = Reached(frozenset("a"), frozenset("bc"), frozenset("d"))
    two = Reached(frozenset("b"), frozenset("ad"), frozenset("c"))
    assert one | two == Reached(frozenset("ab"), frozenset(), frozenset("cd"))


def test_never_executed_is_always_said():
    assert reached_lines(Reached(frozenset("a"), frozenset("b"))) == [
        "1 of 2 functions that changed, or whose data did, were executed", "changed but never executed: b",
    ]  # fmt: skip
    assert reached_lines(Reached()) == ["no function changed, nor data that one refers to"]
