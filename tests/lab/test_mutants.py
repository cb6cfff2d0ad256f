"""Seeded bugs, end to end on Linux 7.3: one is caught, a harmless change survives, and neither is run twice."""

import json
import time

import pytest

from harness.lab.boot import outer_acceleration
from harness.lab.catalogue import catalogue
from harness.lab.edits import Change, Edit, KernelRange
from harness.lab.hardware import pinned_qemu
from harness.lab.image import base_image
from harness.lab.ksource import debian_source
from harness.lab.mutants import Bench, Campaign, Fate

FEW = "io/in_dx and @long#0"
HARMLESS = Edit(
    "harmless", "A constant is written in another way", KernelRange.parse("7.2.."),
    (Change("arch/x86/kvm/x86.c", "(vcpu->arch.pio.size < 4)", "replace", "(vcpu->arch.pio.size <= 3)",
            "complete_fast_pio_in"),),
    bug_class=23, configurations=("svm",), select=FEW,
)  # fmt: skip
NO_LONGER_FITS = Edit(
    "no-longer-fits", "An anchor that is not there", KernelRange.parse("7.2.."),
    (Change("arch/x86/kvm/x86.c", "(vcpu->arch.pio.size < 17)", "replace", "0", "complete_fast_pio_in"),),
    bug_class=23, configurations=("svm",), select=FEW,
)  # fmt: skip
OF_OLD = Edit("of-old", "For another kernel", KernelRange.parse("6.1"), HARMLESS.changes, bug_class=23,
              configurations=("svm",), select=FEW)  # fmt: skip


@pytest.fixture(scope="module")
def bench():
    return Bench(pinned_qemu(print), base_image(print), lambda name: outer_acceleration("svm"))


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("mutants")


@pytest.fixture(scope="module")
def trials(bench, out):
    mutants = [catalogue()["in-32-bit-keeps-upper-half"], HARMLESS, NO_LONGER_FITS, OF_OLD]
    campaign = Campaign(debian_source("7.3", print), out, bench, print)
    return {t.name: t for t in campaign.run(mutants)}


def test_a_register_bug_is_caught_and_named(trials, out):
    found = trials["in-32-bit-keeps-upper-half"]
    assert found.fate is Fate.CAUGHT
    assert found.differs[0] == "rax"
    assert found.case.startswith("io/")
    assert "in_" in found.case
    journal = out / found.name / "svm" / "journal.jsonl"
    assert found.case in journal.read_text()
    assert list((out / found.name / "svm" / "cases").glob("*.json")), "a case file to replay"


def test_a_change_of_nothing_survives(trials):
    found = trials["harmless"]
    assert found.fate is Fate.SURVIVED
    assert found.cases > 0


def test_what_does_not_fit_or_is_for_other_kernels_is_no_survivor(trials):
    assert trials["no-longer-fits"].fate is Fate.UNFIT
    assert "the anchor" in trials["no-longer-fits"].summary
    assert trials["of-old"].fate is Fate.OTHER_KERNELS


def test_what_is_known_is_not_run_again(bench, out, trials):
    began = time.monotonic()
    campaign = Campaign(debian_source("7.3", print), out, bench, print)
    again = list(campaign.run([catalogue()["in-32-bit-keeps-upper-half"], HARMLESS]))
    assert [t.to_json() for t in again] == [trials[t.name].to_json() for t in again]
    assert time.monotonic() - began < 60, "no kernel was built"


def test_a_changed_select_is_another_question(bench, out, trials):
    kept = json.loads((out / "harmless" / "result.json").read_text())
    campaign = Campaign(debian_source("7.3", print), out, bench, print)
    assert campaign.key(HARMLESS) == kept["key"]
    other = Edit(**{**HARMLESS.__dict__, "select": "io/out_dx"})
    assert campaign.key(other) != kept["key"]
