"""The catalogue of seeded bugs: each names what it breaks, who has to see it, and Cases that exist there."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest

from harness.cli import main
from harness.cpuid import with_features
from harness.lab import catalogue as module
from harness.lab import mutant_peers, mutants, sources
from harness.lab.cache import digest
from harness.lab.catalogue import CLASSES, catalogue, choose, edits_for
from harness.lab.configurations import CONFIGURATIONS
from harness.lab.edits import MUTANTS, EditError
from harness.lab.errors import LabInputError
from harness.lab.hardware import Emulator
from harness.lab.image import Image
from harness.lab.kernel import Kernel
from harness.lab.mutant_peers import PeerCampaign, PeerTrial, Suites, Yardstick, try_peers
from harness.lab.mutant_text import peers_table, trials_table, write_results
from harness.lab.mutants import Bench, Campaign, Control, Fate, Trial, _first_bad, exit_status
from harness.lab.peers import PeerResult, PeerTest
from harness.lab.profile import load_profile
from harness.lab.results import CellOutcome
from harness.lab.session import Cell
from harness.paths import all_cases, forced_cases
from harness.selection import matcher
from harness.verdict import Verdict

ALL = catalogue()
RUN = [m for m in ALL.values() if not m.equivalent]


@pytest.fixture(scope="module")
def plans():
    """Configuration -> the names of the Cases that its cell can run."""
    out = {}
    for name, config in CONFIGURATIONS.items():
        profile = load_profile(name, "7.3")
        if profile is None:  # none is checked in: what it shares with its neighbour, and APX
            profile = load_profile("svm", "7.3")
            cases = all_cases(with_features(profile.cpuid, add=["apx"]))
            out[name] = {c.name for c in cases}
        else:
            cases = (forced_cases if config.forced else all_cases)(profile.cpuid)
            out[name] = {c.name for c in cases if not profile.unsupported(c)}
    return out


@pytest.mark.parametrize("mutant", RUN, ids=lambda m: m.name)
def test_each_selects_cases_in_each_of_its_configurations(mutant, plans):
    selects = matcher(mutant.select)
    for name in mutant.configurations:
        assert any(selects(case) for case in plans[name]), f"{name}: no Case matches {mutant.select!r}"


def test_at_least_twenty_bugs_over_the_classes_that_svm_and_the_emulator_show():
    found = [m for m in RUN if not m.source.stem.startswith("apx")]
    assert len(found) >= 20
    assert {m.bug_class for m in found} >= {1, 4, 5, 6, 8, 10, 12, 21, 22, 23, 24, 25, 26, 27, 29, 30, 32, 33, 35}


def test_every_class_is_explained():
    text = (MUTANTS / "README.md").read_text()
    rows = {int(n) for row in re.findall(r"^\| ([\d, ]+) \|", text, re.MULTILINE) for n in row.split(",")}
    assert rows == set(CLASSES)


def test_names_say_nothing_twice():
    titles = [m.title for m in ALL.values()]
    assert len(set(titles)) == len(titles)


# --- choosing


def test_only_takes_names_classes_and_files():
    assert [m.name for m in choose(["cr2-stale"])] == ["cr2-stale"]
    assert {m.bug_class for m in choose(["23"])} == {23}
    assert {m.source.stem for m in choose(["svm"])} == {"svm"}
    assert len(choose(["23", "cr2-stale"])) == len(choose(["23"])) + 1
    assert choose() == list(ALL.values())


def test_configurations_restrict_what_is_run():
    chosen = choose(["emul-ah-is-spl", "cr2-stale"], ["svm"])
    assert {m.name: m.configurations for m in chosen} == {"emul-ah-is-spl": ("svm",), "cr2-stale": ("svm",)}
    with pytest.raises(LabInputError, match="none of them"):
        choose(["cr2-stale"], ["svm-emul"])


@pytest.mark.parametrize(("only", "config", "says"), [
    (["nosuch"], [], "no seeded bug 'nosuch'"), ([], ["nosuch"], "no configuration 'nosuch'"),
])  # fmt: skip
def test_what_is_not_there_is_named(only, config, says):
    with pytest.raises(LabInputError, match=says):
        choose(only, config)


def test_a_tree_gets_what_configuration_and_bug_need():
    apx = list(CONFIGURATIONS["apx"].edits)
    assert apx
    assert [e.name for e in edits_for(ALL["apx-get-xsave-zeroes"], "apx")] == [*apx, "apx-get-xsave-zeroes"]
    assert [e.name for e in edits_for(None, "apx")] == apx
    assert edits_for(None, "svm") == ()


ENTRY = """
[[edit]]
name = "a"
title = "A"
kernels = "7.2.."
{}
[[edit.change]]
file = "a.c"
find = "x"
replace = "y"
"""


@pytest.mark.parametrize(("lines", "says"), [
    ("", "class must be"),
    ("class = 99", "class must be"),
    ("class = 1", "configurations must name"),
    ('class = 1\nconfigurations = ["vmx"]', "no configuration 'vmx'"),
    ('class = 1\nconfigurations = ["svm"]', "select must say"),
    ('class = 1\nconfigurations = ["svm"]\nselect = "gpr and"', "select: -k"),
    ('class = 1\nconfigurations = ["svm"]\nselect = "gpr"\nneeds = ["nosuch"]', "needs 'nosuch'"),
])  # fmt: skip
def test_an_entry_that_proves_nothing_is_refused(lines, says, tmp_path, monkeypatch):
    (tmp_path / "some.toml").write_text(ENTRY.format(lines))
    monkeypatch.setattr(module, "MUTANTS", tmp_path)
    with pytest.raises(EditError, match=says):
        catalogue()


# --- fates


@pytest.mark.parametrize(("fates", "status"), [
    ([Fate.CAUGHT, Fate.EQUIVALENT], 0),
    ([Fate.CAUGHT, Fate.SURVIVED, Fate.LOST], 1),
    ([Fate.CAUGHT, Fate.LOST, Fate.UNFIT], 4),
    ([Fate.CAUGHT, Fate.UNFIT], 2),
    ([Fate.CAUGHT, Fate.OTHER_KERNELS], 0),
    ([Fate.OTHER_KERNELS], 2),
    ([], 2),
])  # fmt: skip
def test_exit_status(fates, status):
    assert exit_status(fates) == status


class _Control:
    bad: ClassVar = {"gpr/known@long#0": "rax"}


def test_what_the_unmodified_kernel_shows_catches_nothing(tmp_path):
    def record(case, verdict):
        return {"case": case, "verdict": verdict.value, "checks": 1}

    bad = [record("gpr/known@long#0", Verdict.MISMATCH), record("gpr/new@long#0", Verdict.SPLAT)]
    quiet = [record("a", Verdict.AGREE), record("b", Verdict.KNOWN), record("c", Verdict.UNSUPPORTED)]
    assert _first_bad(CellOutcome("svm", tmp_path, [*quiet, *bad]), _Control) == bad[1]
    assert _first_bad(CellOutcome("svm", tmp_path, [*quiet, bad[0]]), _Control) is None
    suspect = record("gpr/right_before@long#0", Verdict.SUSPECT)
    assert _first_bad(CellOutcome("svm", tmp_path, [*quiet, suspect]), _Control) == suspect


# --- a campaign whose cells leave the records that they are told to

NAMES = ("gpr/mov@long#0", "gpr/xchg@long#0")


def toy_cell(name="svm", image="i", accel="tcg", kernel="k"):
    kernel = Kernel("toy", "7.3.9", "7.3", Path("/dev/null"), None, kernel * 32)
    emulator = Emulator("toy", Path("/bin/true"), None, "e" * 32, frozenset())
    return Cell(CONFIGURATIONS[name], kernel, emulator, Image(Path("/dev/null"), image * 32), accel)


@pytest.fixture
def cells(monkeypatch):
    """What the next cells show: a list of verdicts by Case each, taken from the front; all that is left agrees."""
    shown = []

    def run_cell(cell, folder, options, progress, status):
        told = shown.pop(0) if shown else {}
        found = [(name, told.get(name, Verdict.AGREE)) for name in sorted(options.only)]
        records = [{"case": n, "verdict": v.value, "checks": 1, "summary": v.value} for n, v in found]
        return CellOutcome(cell.name, folder, records)

    monkeypatch.setattr(mutants, "run_cell", run_cell)
    monkeypatch.setattr(mutants, "cell_plan", lambda *_: SimpleNamespace(key="plan", names=NAMES))
    return shown


class Toy(Campaign):
    """A campaign without a tree."""

    def __init__(self, out, cell):
        self.bench = Bench(cell.emulator, cell.image, lambda _: cell.accel)
        self.out, self.progress, self._series, self._snapshot = out, print, (7, 3), "0" * 32
        self._controls = {"svm": Control(cell, out / "control", print)}


BUG = replace(ALL["cr2-stale"], select="gpr", configurations=("svm",))
KERNELS = SimpleNamespace(get=lambda name: toy_cell().kernel)


def tried(campaign):
    """What one configuration makes of the bug."""
    campaign.control("svm").ask(frozenset(NAMES))
    before = Trial(BUG.name, 27, Fate.UNFIT, summary="no Case matches")
    return campaign._in("svm", BUG, before, KERNELS, campaign.out / "svm")


def test_a_bug_that_nothing_sees_has_survived(cells, tmp_path):
    assert tried(Toy(tmp_path, toy_cell())).fate is Fate.SURVIVED


def test_a_bug_that_loses_cases_has_not_survived(cells, tmp_path):
    cells += [{}, {NAMES[1]: Verdict.LOST}]
    found = tried(Toy(tmp_path, toy_cell()))
    assert found.fate is Fate.LOST
    assert found.summary == f"1 Case lost: {NAMES[1]}"


def test_a_bug_that_one_case_sees_is_caught_whatever_was_lost(cells, tmp_path):
    cells += [{}, {NAMES[0]: Verdict.LOST, NAMES[1]: Verdict.MISMATCH}]
    assert tried(Toy(tmp_path, toy_cell())).fate is Fate.CAUGHT


def test_what_the_unmodified_kernel_loses_proves_nothing_and_is_asked_again(cells, tmp_path):
    cells += [{NAMES[0]: Verdict.LOST}]
    campaign = Toy(tmp_path, toy_cell())
    assert tried(campaign).cases == 1
    control = Control(toy_cell(), tmp_path / "control", print)
    assert list(control.bad) == [NAMES[0]]
    control.ask(frozenset(NAMES))
    assert control.bad == {}


def known_of(campaign):
    return {"trial": campaign.key(BUG), "control": campaign.control("svm").key}


@pytest.mark.parametrize("cell", [toy_cell(image="j"), toy_cell(accel="kvm")])
def test_results_are_of_one_image_and_one_accelerator(cells, tmp_path, cell):
    before, after = known_of(Toy(tmp_path, toy_cell())), known_of(Toy(tmp_path, cell))
    assert all(before[what] != after[what] for what in before)


@pytest.mark.parametrize("name", [
    "known_divergences.toml", "harness/judge.py", "harness/known.py", "harness/host.py", "harness/lockstep.py",
    "harness/vcpu.py", "harness/pool.py", "harness/lab/agent.py", "ci/qemu/profiles/svm@7.3.json",
])  # fmt: skip
def test_results_are_of_all_that_judges(cells, tmp_path, monkeypatch, name):
    before = known_of(Toy(tmp_path, toy_cell()))
    changed = sources.ROOT.parent / name

    def digest_tree(root, files):
        return digest(*(f"{path} is another" if path == changed else path for path in sorted(files)))

    monkeypatch.setattr(sources, "digest_tree", digest_tree)
    sources.harness_digest.cache_clear()
    one = known_of(Toy(tmp_path, toy_cell()))
    changed = None
    sources.harness_digest.cache_clear()
    other = known_of(Toy(tmp_path, toy_cell()))
    sources.harness_digest.cache_clear()
    assert before["trial"] != one["trial"]
    assert all(one[what] != other[what] for what in one)


@pytest.mark.parametrize("more", [{"lacks": frozenset({"0f c7 in long"})}, {"outcomes": {NAMES[0]: "hang"}}])
def test_results_are_of_what_the_profile_excuses(cells, tmp_path, monkeypatch, more):
    before = known_of(Toy(tmp_path, toy_cell()))
    wider = replace(load_profile("svm", "7.3"), **more)
    monkeypatch.setattr(mutants, "load_profile", lambda *_: wider)
    after = known_of(Toy(tmp_path, toy_cell()))
    assert all(before[what] != after[what] for what in before)


def test_a_trial_survives_json_and_the_table_names_its_register():
    trial = Trial("cr2-stale", 27, Fate.CAUGHT, "svm", "fault/x@long#0", "mismatch", ("cr2", "memory"), "s", 20.5, 9, 7)
    assert Trial.from_json(trial.to_json()) == trial
    text = "\n".join(trials_table([trial, Trial("b", 1, Fate.SURVIVED)]))
    assert "cr2, memory" in text
    assert "1 caught, 1 survived" in text


YARDSTICK = Yardstick(10, (
    ("selftests", "slow", "pass", 9.5), ("selftests", "quick", "pass", 0.5), ("selftests", "quicker", "pass", 0.1),
    ("selftests", "stuck", "timeout", 10.1), ("selftests", "debug_regs", "fail", 0.2),
    ("selftests", "vmx", "skip", 0.1),
))  # fmt: skip


def test_only_what_the_unmodified_kernel_passes_in_time_counts_the_quickest_first():
    assert YARDSTICK.counting(8) == [["selftests", "quicker"], ["selftests", "quick"]]
    assert [name for _, name in YARDSTICK.counting(10)] == ["quicker", "quick", "slow"]
    assert YARDSTICK.left_out(10) == {"not through in 10 s": ["stuck"], "fail": ["debug_regs"], "skip": ["vmx"]}
    assert Yardstick.from_json(json.loads(json.dumps(YARDSTICK.to_json()))) == YARDSTICK


def test_upstreams_own_test_of_register_synchronization_may_take_twice_as_long():
    shown = Yardstick(5, (("selftests", "x86/sync_regs_test", "pass", 9.5), ("selftests", "slow", "pass", 9.5)))
    assert shown.counting(5) == [["selftests", "x86/sync_regs_test"]]
    assert shown.left_out(5) == {"not through in 5 s": ["slow"]}


class _ToyMachine:
    """Upstream's tests, on a machine where they end as they are told to."""

    def __init__(self, shown):
        self._shown, self.names, self.seconds = shown, None, None

    def only(self, names):
        self.names = list(names)

    def limit(self, seconds):
        self.seconds = seconds("a")

    def __len__(self):
        return len(self._shown)

    def run(self):
        for name, outcome in self._shown:
            yield PeerResult(PeerTest("selftests", name), outcome, 1.0)


@pytest.fixture
def machines(monkeypatch):
    """The machines that were asked, and what they show: one takes a list of (test, outcome) from the front."""
    shown, asked = [], []

    def peers(suites, cell, folder, progress=print):
        asked.append(_ToyMachine(shown.pop(0)))
        return asked[-1]

    monkeypatch.setattr(Suites, "peers", peers)
    return SimpleNamespace(shown=shown, asked=asked)


class ToyWithKernels(Toy):
    """A campaign whose kernels are there, to be built by nobody."""

    def unmodified(self, configuration):
        return toy_cell(configuration)

    def unmodified_key(self, configuration):
        return "unmodified"

    def kernels_key(self, mutant):
        return mutant.name


@pytest.fixture
def peer_campaign(machines, tmp_path, monkeypatch):
    class Kernels:
        def __init__(self, *_):
            pass

        def __enter__(self):
            return KERNELS

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(mutant_peers, "Kernels", Kernels)
    monkeypatch.setattr(mutants, "cell_plan", lambda *_: SimpleNamespace(key="plan", names=NAMES))
    return lambda seconds=10: PeerCampaign(ToyWithKernels(tmp_path, toy_cell()), Suites(seconds=seconds))


CONTROL = [("a", "pass"), ("b", "skip"), ("c", "pass"), ("d", "fail")]


def test_the_unmodified_kernel_is_asked_once_and_a_bug_runs_what_it_passes_on_one_machine(machines, peer_campaign):
    other = replace(BUG, name="other")
    machines.shown += [CONTROL, [("a", "pass"), ("c", "pass")], [("a", "pass"), ("c", "fail")], [("c", "fail")]]
    campaign = peer_campaign()
    trials = list(campaign.run([BUG, other]))
    assert [(t.test, t.outcome, t.tests) for t in trials] == [("", "", 2), ("c", "fail", 2)]
    control, first, second, again = machines.asked
    assert (control.names, control.seconds) == (None, 10)
    assert first.names == second.names == [["selftests", "a"], ["selftests", "c"]]
    assert again.names == [["selftests", "c"]]
    assert first.seconds > control.seconds, "a busy host hangs no test"
    assert campaign.left_out() == {"svm": {"skip": ["b"], "fail": ["d"]}}


def test_a_test_that_saw_a_bug_goes_first_with_the_next(machines, peer_campaign):
    machines.shown += [CONTROL, [("a", "pass"), ("c", "fail")], [("c", "fail")], [("c", "fail")], [("c", "fail")]]
    list(peer_campaign().run([BUG, replace(BUG, name="other")]))
    assert machines.asked[3].names == [["selftests", "c"], ["selftests", "a"]]


def test_a_test_that_fails_once_has_seen_nothing(machines, peer_campaign):
    machines.shown += [CONTROL, [("a", "fail"), ("c", "pass")], [("a", "pass")]]
    assert [t.test for t in peer_campaign().run([BUG])] == [""]


def test_an_interrupted_run_goes_on_where_it_was(machines, peer_campaign, tmp_path):
    machines.shown += [CONTROL, [("a", "pass")]]
    before = list(peer_campaign().run([BUG]))
    assert not machines.shown
    shutil.rmtree(tmp_path / BUG.name, ignore_errors=True)  # as when the suite tries it again
    assert list(peer_campaign().run([BUG])) == before, "neither is run again"
    machines.shown += [[("a", "pass")]]
    list(peer_campaign(8).run([BUG]))
    assert len(machines.asked) == 3, "less time is another question to the bug, not to the unmodified kernel"
    machines.shown += [CONTROL, [("a", "pass")]]
    list(peer_campaign(60).run([BUG]))
    assert (machines.asked[3].names, machines.asked[3].seconds) == (None, 60)


def test_the_table_of_peers_is_honest_in_both_columns(tmp_path):
    mine = Trial("cr2-stale", 27, Fate.CAUGHT, "svm", "fault/x@long#0", "mismatch", ("cr2",), "s")
    trials = [mine, Trial("b", 1, Fate.SURVIVED), Trial("c", 2, Fate.CAUGHT, case="gpr/y@long#0", verdict="splat")]
    peers = {"cr2-stale": PeerTrial("cr2-stale"), "b": PeerTrial("b", "svm", "x86/state_test", "fail")}
    left_out = {"svm": YARDSTICK.left_out(8)}
    lines = peers_table(trials, peers, left_out)
    assert lines[1].split() == ["cr2-stale", "27", "fault/x@long#0:", "cr2", "-"]
    assert lines[2].split()[2:] == ["survived", "x86/state_test:", "fail"]
    assert lines[3] == "of 2 seeded bugs this suite sees 1, upstream's tests see 1"
    assert lines[4:] == [
        "tests of upstream's that did not count in svm: fail (1): debug_regs; not through in 8 s (2): slow, stuck; "
        "skip (1): vmx"
    ]
    write_results(tmp_path, Path("linux"), trials, peers, left_out)
    markdown = (tmp_path / "peers.md").read_text()
    assert "| b | 1 | survived | x86/state_test: fail |\n" in markdown
    assert "\nOf 2 seeded bugs this suite sees 1, upstream's tests see 1.\n" in markdown
    assert lines[4] in markdown


@pytest.mark.parametrize("seconds", ["0", "-3", "1.5", "long"])
def test_no_time_for_a_test_is_refused(seconds, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["mutants", "--peers", f"--peer-seconds={seconds}"])
    assert stopped.value.code == 2
    assert f"{seconds}: give a number, 1 or more" in capsys.readouterr().err


def test_a_peer_trial_survives_json():
    trial = PeerTrial("b", "svm", "x86/state_test", "fail", "assert", 3, 4.5)
    assert PeerTrial.from_json(trial.to_json()) == trial
    assert Suites().key != Suites(MUTANTS).key
    assert try_peers("b", [], Suites(), MUTANTS, print) == PeerTrial("b")
