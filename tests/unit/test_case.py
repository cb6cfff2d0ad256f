"""Case: identity, files, what makes one unusable."""

import dataclasses
import hashlib
import json

import pytest

from harness.case import (
    Blob,
    Case,
    CaseError,
    Inject,
    Memory,
    Other,
    Run,
    SaveRestore,
    SetState,
    Slot,
    Step,
    VmShape,
    device_data,
    load_case,
)
from harness.cpuid import CpuidEntry, CpuProfile, with_features
from harness.state import CpuState

PROFILE = CpuProfile((CpuidEntry(0, 0, 0, 7, 0x68747541, 0x444D4163, 0x69746E65), CpuidEntry(7, 0, 1, 1)))


def make(**changes):
    values = {
        "name": "t/x@real", "memory": Memory((Blob(0x1000, b"\xf4"),)), "start": CpuState(rip=0x1000),
        "profile": PROFILE, "bits": 16, "requires": frozenset({"mode:real"}), "seed": 7,
        "actions": (SetState((("rax", 5),), "sregs"), Run(4), Inject("exception", 14, 6), Step(2), SaveRestore()),
    }  # fmt: skip
    return Case(**(values | changes))


def test_json_round_trip_is_the_same_case():
    case = make()
    again = Case.from_json(json.loads(json.dumps(case.to_json())))
    assert again == case
    assert again.id == case.id


def canonical_id(case):
    """The id as it has always been: the hash of the shortest JSON of what decides what happens, keys sorted."""
    body = case.to_json()
    cpuid = hashlib.sha256(json.dumps(body["cpuid"]).encode()).hexdigest()
    wanted = {name: body[name] for name in ("name", "start", "shape", "actions", "seed", "bits", "requires")}
    wanted |= {"format": body["kvm-harness-case"], "memory": case.memory.digest, "profile": cpuid}
    if case.others:
        digests = [hashlib.sha256(json.dumps(o[1]).encode()).hexdigest() for o in body["others"]]
        wanted["others"] = [[o[0], digest] for o, digest in zip(body["others"], digests, strict=True)]
    return hashlib.sha256(json.dumps(wanted, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:12]


def test_an_id_is_what_it_has_always_been():
    """Journals, known cases and recordings refer to them."""
    assert make().id == "d01bc4ab244d"
    states = [
        CpuState(rip=0x1000), CpuState(rip=0x1000, rflags=0x46), CpuState(gpr=tuple(range(32)), cr2=5),
        CpuState().with_({"msr.star": 1, "msr.0x10": 2}), CpuState().with_({"msr.star": 2, "events.shadow": 1}),
    ]  # fmt: skip
    for start in states:
        for more in ({}, {"others": (Other(states[-1]), Other(start, with_features(PROFILE, add=["bmi1"])))}):
            case = make(start=start, name='t/"quoted" ä\u2028', **more)
            assert case.id == canonical_id(case)


def test_what_is_kept_between_ids_does_not_depend_on_their_order():
    shadow = CpuState().with_({"events.shadow": True, "rax": 3})
    ids = {make(start=start).id for start in (shadow, CpuState().with_({"events.shadow": 1, "rax": 3}))}
    assert len(ids) == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "t/y"},
        {"memory": Memory((Blob(0x1000, b"\x90\xf4"),))},
        {"memory": Memory((Blob(0x1001, b"\xf4"),))},
        {"start": CpuState(rip=0x1000, cr2=1)},
        {"profile": with_features(PROFILE, add=["bmi1"])},
        {"shape": VmShape((Slot(0, 0x3000),))},
        {"shape": VmShape(irqchip="split")},
        {"actions": (Run(5),)},
        {"seed": 8},
        {"bits": 32},
        {"requires": frozenset()},
    ],
)
def test_id_depends_on_everything_that_decides_what_happens(changes):
    assert make(**changes).id != make().id


def test_id_does_not_depend_on_where_the_source_lies():
    assert make(origin="guests/x.S:t_x").id == make().id


def test_edited_case_file_is_refused():
    body = make().to_json()
    body["seed"] = 9
    with pytest.raises(CaseError, match="it was edited"):
        Case.from_json(body)


@pytest.mark.parametrize(
    ("text", "words"),
    [("{}", "not a kvm-harness case"), ("[1", "not JSON"), ('{"kvm-harness-case": 1}', "damaged"), ("3", "not a kvm")],
)
def test_bad_case_file_says_what_is_wrong(tmp_path, text, words):
    path = tmp_path / "case.json"
    path.write_text(text)
    with pytest.raises(CaseError, match=words) as error:
        load_case(path)
    assert str(path) in str(error.value)


def test_missing_case_file(tmp_path):
    with pytest.raises(CaseError, match="No such file"):
        load_case(tmp_path / "none.json")


def test_memory_image_lays_later_blobs_over_earlier_ones():
    memory = Memory((Blob(0, b"aaaa"),)).plus(Blob(1, b"b"), Blob(0x1000, b"c"))
    assert memory.image(Slot(0, 0x1000))[:5] == b"abaa\0"
    assert memory.image(Slot(0x1000, 0x1000))[0] == ord("c")


def test_blob_outside_memory_is_refused():
    with pytest.raises(CaseError, match=r"0x1fff\.\.0x2001 lies outside"):
        Memory((Blob(0x1FFF, b"xx"),)).check(VmShape((Slot(0, 0x2000),)))


@pytest.mark.parametrize("slot", [Slot(1, 0x1000), Slot(0, 0), Slot(0, 0x1001)])
def test_unaligned_slot_is_refused(slot):
    with pytest.raises(CaseError, match="multiples of 4096"):
        VmShape((slot,))


def test_unknown_irqchip_is_refused():
    with pytest.raises(CaseError, match="none, split, full"):
        VmShape(irqchip="pic")


def test_devices_answer_every_read_differently_and_repeatably():
    answers = {device_data(1, n, 8) for n in range(1000)} | {device_data(2, n, 8) for n in range(1000)}
    assert len(answers) == 2000
    assert device_data(1, 5, 4) == device_data(1, 5, 8)[:4]


def test_profile_knows_vendor_and_features():
    assert PROFILE.vendor == "AuthenticAMD"
    assert PROFILE.amd
    assert "apx" in with_features(PROFILE, add=["apx"]).features
    assert "apx" not in with_features(with_features(PROFILE, add=["apx"]), remove=["apx"]).features


def test_cases_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        make().seed = 1
