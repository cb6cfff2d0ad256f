"""The host profile: probes find limits, never excuse values, and do not depend on the CPU they run on."""

import os

import pytest

from harness.case import Observation
from harness.exits import Halt, InternalError
from harness.host import Host
from harness.kvm_machine import KvmMachine
from harness.lockstep import Difference
from harness.modes import MODES
from harness.paths import all_cases
from harness.state import FieldDiff


def test_profile_is_the_same_on_every_cpu(kvm):
    cpus = os.sched_getaffinity(0)
    seen = set()
    try:
        for cpu in cpus:
            os.sched_setaffinity(0, {cpu})
            seen.add(Host(kvm).profile)
    finally:
        os.sched_setaffinity(0, cpus)
    assert len(seen) == 1


def test_every_mode_is_judged(host):
    assert set(host.modes) == set(MODES)
    assert host.modes["real"] == ""


def test_an_instruction_every_kvm_has_is_not_lacking(host):
    assert not host.lacks("real", b"\x90")
    assert not host.lacks("long", b"\x90")


def test_an_instruction_is_not_lacking_because_of_one_that_follows_it(host):
    """Only KVM's word about this very instruction counts: a present one may run into one that is lacking."""
    assert not host.lacks("prot32", b"\x90\xcc")
    assert not host.lacks("prot32", b"\x0f\xc8\xf1")  # bswap eax; icebp


@pytest.mark.parametrize("register", ["rax", "rip", "rflags", "cs.base"])
def test_a_wrong_value_is_never_excused(host, kvm, register):
    """Where the guest reached its own HLT with a wrong register, no probe makes it a limit of the host."""
    case = next(c for c in all_cases(host.profile, families=["alu"]) if "mode:long" in c.requires)
    with KvmMachine(kvm) as machine:
        machine.load(case)
        (seen,) = machine.apply(case.actions[0])
        wrong = Difference(0, 0, seen, seen, (FieldDiff(register, 1, 2),))
        assert host.excuse(case, wrong, machine.read) == ""


def test_an_emulation_failure_of_an_instruction_the_emulator_has_is_not_excused(host, kvm):
    case = next(c for c in all_cases(host.profile, families=["alu"]) if "mode:long" in c.requires)
    with KvmMachine(kvm) as machine:
        machine.load(case)
        expected = Observation(Halt(), {})
        failed = Observation(InternalError(1, b"\x90" * 15), {})
        assert host.excuse(case, Difference(0, 0, expected, failed), machine.read) == ""
