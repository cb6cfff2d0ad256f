"""A cell's profile: what must be there, what ends as recorded, what contradicts itself."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from harness.case import Case, Memory, Observation
from harness.cpuid import CpuidEntry, CpuProfile, with_features
from harness.exits import Halt, InternalError, Shutdown, Timeout
from harness.host import instruction_name
from harness.judge import Judge, outcome
from harness.lab import profile as module
from harness.lab.configurations import CONFIGURATIONS
from harness.lab.kernel import Kernel
from harness.lab.profile import Profile, load_profile, refused_instruction, write_profile
from harness.lab.run import demanded
from harness.lab.session import Cell
from harness.lockstep import Difference, compare_registers
from harness.modes import HIGH, STUBS
from harness.runner import Finding
from harness.state import CpuState, pack_sections
from harness.verdict import Verdict

LEAVES = CpuProfile((CpuidEntry(7, 1, 1), CpuidEntry(0xD, 0, 1, 0x80207), CpuidEntry(0xD, 19, 1, 128, 960)))
APX = with_features(LEAVES, add=["apx"])
NAME = "apx/mmio_store_r20@long#0"
CASE = Case(NAME, Memory(()), CpuState(), CpuProfile(()))


def cell(cpuid=APX, **more):
    nothing = {k: {} for k in ("parameters", "capabilities", "modes", "delivery", "traits", "single_step")}
    return Profile(cell="apx", module="kvm_amd", vendor="AuthenticAMD", cpuid=cpuid, **nothing | more)


def xcr0(profile, bits):
    rows = [replace(e, eax=bits) if (e.function, e.index) == (0xD, 0) else e for e in profile.cpuid]
    return CpuProfile(tuple(rows))


def at(exit_=None, **registers):
    state = CpuState().with_(registers)
    return Observation(exit_ or Halt(), pack_sections(state, ("regs", "sregs2")) if exit_ is None else {})


def differs(expected, got):
    return Difference(0, 0, expected, got, compare_registers(expected, got))


# --- outcomes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("got", "text"),
    [
        (at(Shutdown()), "shutdown"),
        (at(InternalError(1, b"\xd5\x18\x89\xc0")), "emulation failure"),
        (at(Timeout(5.0)), "hang"),
        (at(rip=STUBS + 16 * 6 + 1), "#UD"),
        (at(rip=STUBS + 16 * 17 + 1), "exception 17"),
        (at(rcx=0x1234, rdx=7), "wrong value: rcx=0x1234 rdx=0x7"),
        (None, "no exit"),
    ],
)
def test_how_a_case_ended(got, text):
    expected = at(rcx=0, rdx=0)
    found = Difference(0, 0, expected, None) if got is None else differs(expected, got)
    assert outcome(found) == text


def judged(recorded, difference):
    judge = Judge(cell(outcomes={NAME: recorded} if recorded else {}))
    assert judge.simple(NAME) == (not recorded)
    return judge.judge(CASE, Finding(1, difference), lambda gpa, size: b"")


def test_what_ends_as_recorded_is_known_and_a_change_of_it_is_a_mismatch():
    shutdown, undefined = differs(at(), at(Shutdown())), differs(at(), at(rip=STUBS + 16 * 6 + 1))
    assert judged("shutdown", shutdown).verdict is Verdict.KNOWN
    changed = judged("shutdown", undefined)
    assert changed.verdict is Verdict.MISMATCH
    assert "#UD; what is recorded is shutdown" in changed.summary


def test_what_works_against_the_record_is_healed_and_without_one_is_as_ever():
    assert judged("shutdown", None).verdict is Verdict.HEALED
    assert judged("", differs(at(), at(Shutdown()))).verdict is Verdict.MISMATCH
    assert judged("", None).verdict is Verdict.AGREE


def test_a_wrong_value_must_be_the_recorded_one_to_the_bit():
    recorded = "wrong value: rcx=0x1234"
    assert judged(recorded, differs(at(rcx=0), at(rcx=0x1234))).verdict is Verdict.KNOWN
    assert judged(recorded, differs(at(rcx=0), at(rcx=0x1235))).verdict is Verdict.MISMATCH


def test_outcomes_are_in_the_file_a_line_each(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "FOLDER", tmp_path)
    written = cell(outcomes={NAME: "shutdown", "apx/lmsw_r16@long#0": "#UD"})
    path = write_profile("apx", "7.3", written)
    assert f'  "{NAME}": "shutdown"' in path.read_text().splitlines()
    assert load_profile("apx", "7.3") == written
    body = json.loads(path.read_text())
    del body["outcomes"]
    assert Profile.from_json(body).outcomes == {}, "profiles of before there were any"


def running(*has):
    kernel = Kernel("7.3", "7.3.4", "7.3", Path("bzImage"), None, "0", frozenset(has))
    return Cell(CONFIGURATIONS["apx"], kernel, None, None)


def test_a_kernel_that_offers_the_feature_by_itself_has_no_excuse_but_for_evex():
    recorded = {NAME: "#UD", "apx_evex/mmio_ndd_load@long#0": "#UD"}
    assert demanded(cell(outcomes=recorded), running()).outcomes == recorded
    assert demanded(cell(outcomes=recorded), running("apx-leaf-29")).outcomes == recorded
    assert set(demanded(cell(outcomes=recorded), running("apx-on-svm")).outcomes) == {"apx_evex/mmio_ndd_load@long#0"}


# --- what must be there ----------------------------------------------------------------------------------------------


def test_a_capability_that_lost_bits_is_told():
    had = replace(cell(), capabilities={"KVM_CAP_SYNC_REGS": 7, "KVM_CAP_NR_MEMSLOTS": 32764})
    less = replace(had, capabilities={"KVM_CAP_SYNC_REGS": 5, "KVM_CAP_NR_MEMSLOTS": 509})
    assert had.lost(less) == ["capability KVM_CAP_SYNC_REGS: bits 0x2"]
    assert less.lost(had) == []


@pytest.mark.parametrize(
    ("name", "was", "now", "lost"),
    [
        ("kvm_amd.npt", "Y", "N", True),
        ("kvm_amd.npt", "N", "Y", True),
        ("kvm_amd.npt", "Y", "1", False),
        ("kvm.force_emulation_prefix", "1", "0", True),
        ("kvm.force_emulation_prefix", "1", None, True),
        ("kvm_amd.nested", "1", "0", True),
        ("kvm_amd.nested", "0", "1", False),
        ("kvm_amd.vgif", "1", None, False),
        ("kvm_amd.avic", "Y", "N", False),
    ],
)
def test_parameters_that_kvm_does_not_take_are_told(name, was, now, lost):
    had, has = (replace(cell(), parameters={name: v} if v else {}) for v in (was, now))
    found = [text for text in had.lost(has) if text.startswith("parameter")]
    assert found == ([f"parameter {name}: {now or 'gone'}, not {was}"] if lost else [])


@pytest.mark.parametrize("path", sorted(module.FOLDER.glob("*.json")), ids=lambda path: path.stem)
def test_profiles_have_what_their_configurations_ask_for(path):
    name, _, series = path.stem.partition("@")
    had = load_profile(name, series)
    for word in CONFIGURATIONS[name].parameters:
        parameter, _, value = word.partition("=")
        asked = replace(had, parameters={**had.parameters, parameter: value})
        assert asked.lost(had) == had.lost(asked) == []


def test_lost_state_components_are_told():
    gone = cell(xcr0(APX, 0x207))
    assert "state component APX in XCR0" in cell().lost(gone)
    assert not gone.lost(cell())


@pytest.mark.parametrize(
    ("cpuid", "says"),
    [
        (APX, ""),
        (xcr0(with_features(APX, remove=["apx"]), 0x207), ""),
        (xcr0(APX, 0x207), "APX in CPUID without XCR0[19]"),
        (with_features(APX, remove=["apx"]), "XCR0[19] without APX in CPUID"),
        (xcr0(APX, 0x8021F), "XCR0[19] together with MPX"),
        (with_features(APX, add=["mpx"]), "XCR0[19] together with MPX"),
        (CpuProfile(tuple(e for e in APX.cpuid if e.index != 19)), "without state component 19"),
    ],
)
def test_a_cpuid_that_contradicts_itself_is_told(cpuid, says):
    found = cell(cpuid).contradictions()
    assert len(found) == bool(says)
    assert says in "".join(found)


@pytest.mark.parametrize("high", [0, HIGH])
def test_the_instruction_that_kvm_would_not_emulate_is_named(high):
    start = replace(CpuState(), efer=0x500, rip=high | 0xA6B0, cs=replace(CpuState().cs, l=1))
    refused = replace(start, rip=STUBS + 6 * 16 + 1, gpr=(0, 0, 0, 0, 0x19FD8, *start.gpr[5:]))
    ram = {0x19FD8: (high | 0xA6BB).to_bytes(8, "little"), 0xA6BB: bytes.fromhex("0f01f8")}
    case = replace(CASE, start=start, requires=("mode:long",))
    seen = [Observation(Halt(), pack_sections(s, ("regs", "sregs"))) for s in (start, refused)]
    found = Difference(0, 0, *seen)
    assert refused_instruction(case, found, lambda at, size: ram[at][:size]) == "0f 01 /7 in long"


@pytest.mark.parametrize(("code", "bits", "name"), [
    ("0f38f05308", 64, "0f 38 f0"), ("660f38f05308", 32, "66 0f 38 f0"), ("66440f38f14b08", 64, "66 0f 38 f1"),
    ("f20f38f0c0", 64, "f2 0f 38 f0"), ("66f20f38f1c0", 64, "66 f2 0f 38 f1"), ("660fc7f0", 32, "0f c7 /6"),
    ("6690", 32, "90"), ("f30fb8c0", 64, "f3 0f b8"),
])  # fmt: skip
def test_prefixes_that_select_an_instruction_are_in_its_name(code, bits, name):
    assert instruction_name(bytes.fromhex(code), bits) == name


def test_a_capability_of_the_other_vendor_is_no_loss():
    had = cell(capabilities={"KVM_CAP_SGX_ATTRIBUTE": 1, "KVM_CAP_SYNC_REGS": 7})
    assert had.lost(replace(had, capabilities={"KVM_CAP_SYNC_REGS": 7})) == []
    intel = replace(had, module="kvm_intel")
    assert intel.lost(replace(intel, capabilities={"KVM_CAP_SYNC_REGS": 7})) == ["capability KVM_CAP_SGX_ATTRIBUTE"]
