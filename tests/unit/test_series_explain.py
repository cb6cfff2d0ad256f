"""What is behind other behaviour: two recordings of a Case side by side."""

from dataclasses import replace

import pytest

from harness.case import Blob, Case, Memory, Observation, Run
from harness.cpuid import CpuProfile
from harness.exits import Halt
from harness.lab.wire import observation_json
from harness.lockstep import lockstep
from harness.machine import Recording
from harness.series.explain import Recorded, difference, steps_from_json
from harness.state import CpuState, Events, pack_sections

CODE = b"\x0f\xaf\xc8\xf4"  # imul ecx, eax leaves SF, ZF, AF and PF undefined (SDM vol. 2A, IMUL)
SECTIONS = ("regs", "sregs2", "events", "debugregs", "xcr0")


@pytest.fixture
def case():
    return Case("x/y@real#0", Memory((Blob(0x1000, CODE),)), CpuState(), CpuProfile(()), actions=(Run(),), bits=16)


def seen(case, pages=(), **registers):
    state = replace(case.start, **registers)
    return Observation(Halt(), pack_sections(state, SECTIONS), dict(pages))


def steps(*observations):
    """As the runner inside sends them."""
    return steps_from_json([[observation_json(o) for o in observations]])


def test_the_same_is_no_difference(case):
    assert difference(case, steps(seen(case)), steps(seen(case))) is None


def test_flags_that_the_model_leaves_open_are_named(case):
    found = difference(case, steps(seen(case, rflags=0x2)), steps(seen(case, rflags=0x46)))
    assert found.summary().startswith("rflags")
    assert [d.name for d in found.registers] == ["rflags"]


def test_another_exit(case):
    found = difference(case, steps(seen(case)), steps())
    assert found.exits_differ


def test_ram_on_either_side(case):
    page = bytearray(4096)
    page[:4] = CODE
    page[0x123] = 7
    one, two = seen(case), seen(case, {0x1000: bytes(page)})
    for before, after, want, got in ((one, two, 0, 7), (two, one, 7, 0)):
        found = difference(case, steps(before), steps(after))
        (memory,) = found.memory
        assert memory.gpa <= 0x1123 < memory.gpa + len(memory.got)
        at = 0x1123 - memory.gpa
        assert (memory.expected[at], memory.got[at]) == (want, got)


def test_undefined_bits_in_ram_are_behaviour_too(case):
    """PUSHF after an instruction that leaves flags undefined: the checksum tells two kernels apart."""

    def allowed(flags):
        page = bytearray(4096)
        page[:4], page[0x800] = CODE, flags
        expected = seen(case, {0x1000: CODE + bytes(4092)})
        expected.pages_ignore = {0x1800: 0x40}
        found = lockstep(case, Recording([[expected]]), Recorded(steps(seen(case, {0x1000: bytes(page)}))))
        return found.difference, found.allowed

    assert allowed(0) == (None, 0)
    assert allowed(0x40)[0] is None
    assert allowed(0x40)[1]
    assert allowed(0x80)[0] is not None


def test_what_is_left_of_an_exception_that_is_over_is_no_behaviour(case):
    """It depends on the host: KVM leaves its number behind when a page fault of its own comes in between."""

    def allowed(**events):
        left = seen(case)
        left.sections = {**left.sections, **pack_sections(replace(case.start, events=Events(**events)), ("events",))}
        return lockstep(case, Recording([[seen(case)]]), Recorded(steps(left)))

    assert allowed(exception_nr=13, exception_has_error=1).allowed == 0
    assert allowed(exception_pending=1, exception_nr=13).difference is not None
