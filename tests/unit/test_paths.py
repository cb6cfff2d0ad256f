"""The suite's Cases: many, distinct, stable, and each starts where its origin says."""

import pytest

from harness.case import Case, Step
from harness.cpuid import CpuidEntry, CpuProfile, with_features
from harness.exits import Debug, Halt
from harness.modes import CODE_BASE, CODE_END, MODES
from harness.paths import _MORE, FAMILIES, FAMILY_NAMES, all_cases
from harness.paths.common import guest_for
from harness.reference.machine import ReferenceMachine

PROFILE = with_features(CpuProfile((CpuidEntry(0),)), add=["lm", "nx", "syscall", "pae", "pse"])


@pytest.fixture(scope="module")
def suite():
    return all_cases(PROFILE)


def test_names_are_unique_and_ids_differ(suite):
    assert len({c.name for c in suite}) == len(suite) > 5000
    some = suite[::37]
    assert len({c.id for c in some}) == len(some)


def test_every_mode_and_every_family_has_cases(suite):
    assert {c.name.split("@")[1].split("#")[0] for c in suite} == set(MODES)
    assert {c.name.split("/")[0] for c in suite} == set(FAMILY_NAMES)


def test_generation_is_stable(suite):
    again = all_cases(PROFILE)
    assert [c.name for c in again] == [c.name for c in suite]
    assert all(a.start == b.start for a, b in zip(again[::101], suite[::101], strict=True))


def test_a_case_starts_at_the_entry_its_origin_names(suite):
    for case in suite[::53]:
        if case.name.count("/") > 1 or case.name.startswith(("upper/", "hypercall/", "nested/", "wrap/", "smm/")):
            continue  # the guests of other families, entries of other names, a code segment with a base
        family, rest = case.name.split("/")
        entry, mode = rest.split("@")
        guest = guest_for(f"{family}.S", mode.split("#")[0])
        assert case.start.rip == guest.entries[entry]
        assert CODE_BASE <= case.start.rip < CODE_END
        assert case.origin == f"guests/{family}.S:t_{entry}"
        assert f"mode:{mode.split('#')[0]}" in case.requires


def test_ram_of_every_case_fits_its_shape(suite):
    for memory in {id(c.memory): c for c in suite}.values():
        memory.memory.check(memory.shape)


def test_one_memory_is_shared_by_all_entries_of_a_guest_in_a_mode(suite):
    plain = [c for c in suite if c.name.split("/")[0] not in _MORE]
    assert len({id(c.memory) for c in plain}) == sum(len(f.modes) for f in FAMILIES)


def test_registers_have_values_of_their_own_and_a_valid_stack(suite):
    plain = [c for c in suite if c.name.split("/")[0] not in ("mmio_stack", "upper", "hypercall")]
    for case in plain[::29]:
        values = [v for n, v in enumerate(case.start.gpr[:16]) if n != 4 and v.bit_length() > 16]
        assert len(set(values)) >= len(values) - 3, "corners may meet"
        assert case.start.ss.base + case.start.gpr[4] == 0x1A000
        if case.bits != 64:
            assert all(v < 1 << 32 for v in case.start.gpr)


def test_apx_registers_are_filled_only_for_a_profile_with_apx():
    plain = all_cases(PROFILE, families=["flags"])
    assert not any(any(c.start.gpr[16:]) for c in plain)
    apx = all_cases(with_features(PROFILE, add=["apx"]), families=["apx"])
    for case in apx:
        assert any(case.start.gpr[16:]) == (case.bits == 64) == ("apx" in case.requires)


def test_a_case_survives_json(suite):
    for case in suite[::2500]:
        assert Case.from_json(case.to_json()).id == case.id


def test_a_stepped_case_ends_before_its_hlt():
    """As many steps as the name says and the mode adds lead to the HLT; the model counts them."""
    for case in all_cases(PROFILE, families=["step"]):
        machine = ReferenceMachine()
        machine.load(case)
        (action,) = case.actions
        seen = machine.apply(action)
        assert [s.exit for s in seen if isinstance(s.exit, Debug)] != []
        assert not seen[-1].exit.terminal, case.name
        assert isinstance(machine.apply(Step(1))[-1].exit, Halt), case.name


def test_unknown_family_is_refused():
    with pytest.raises(ValueError, match="no family named nosuch"):
        all_cases(PROFILE, families=["nosuch"])
