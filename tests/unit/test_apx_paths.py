"""What userspace does to R16-R31, to several vCPUs, and by signals: on the model, worked out by hand."""

import json
from dataclasses import replace

import pytest

from harness.case import (
    CAP_EXIT_HYPERCALL,
    CAP_USER_SPACE_MSR,
    Blob,
    Case,
    Complete,
    Kick,
    Memory,
    Other,
    Run,
    SetState,
    Show,
    Switch,
    Try,
    VmShape,
)
from harness.cpuid import CpuidEntry, CpuProfile, with_features, without_apx
from harness.exits import Answer, Halt, Hypercall, Interrupted, Io, Msr
from harness.modes import CODE_BASE, DATA_BASE, setup
from harness.paths import all_cases
from harness.reference.cpu import ModelError
from harness.reference.machine import ReferenceMachine
from harness.state import unpack_sections

BASE = CpuProfile((
    CpuidEntry(0, 0, 0, 0xD, 0x68747541, 0x444D4163, 0x69746E65), CpuidEntry(1), CpuidEntry(7, 0, 1, 1),
    CpuidEntry(7, 1, 1), CpuidEntry(0xD, 0, 1, 0x80003, 576, 1088), CpuidEntry(0xD, 19, 1, 128, 960),
    CpuidEntry(0x29, 0, 0, 0, 1), CpuidEntry(0x80000000, 0, 0, 0x8000000A), CpuidEntry(0x80000001),
    CpuidEntry(0x80000008, 0, 0, 0x3028), CpuidEntry(0x8000000A, 0, 0, 1, 8),
))  # fmt: skip
FEATURES = "lm nx syscall pae pse xsave fxsr sse apx svm tsc de msr"
APX = with_features(BASE, add=FEATURES.split())
EGPR = tuple(n * 0x1111 for n in range(16, 32))


def case(code, *actions, gpr=EGPR, profile=APX, **more):
    s = setup("long", entry=CODE_BASE, profile=profile)
    state = replace(s.state, gpr=(*s.state.gpr[:16], *gpr))
    memory = Memory((*s.blobs, Blob(CODE_BASE, bytes.fromhex(code))))
    return Case("test@long#0", memory, state, profile, actions=actions, requires=frozenset({"apx"}), **more)


def shown(c):
    """(exit, state) of everything that the model shows."""
    machine = ReferenceMachine()
    machine.load(c)
    seen = [o for action in c.actions for o in machine.apply(action)]
    return [(o.exit, unpack_sections(o.sections) if o.sections else None) for o in seen]


def last(c):
    return shown(c)[-1][1]


def test_values_given_with_xstate_bv_set_are_those_that_arrive():
    state = last(case("e610f4", Run(), SetState((("r17", 5),), "xsave"), Show()))
    assert state.gpr[16:19] == (EGPR[0], 5, EGPR[2])


def test_values_given_with_xstate_bv_clear_are_zeros():
    state = last(case("e610f4", Run(), SetState((("r17", 5),), "xsave-init"), Show("xsave2")))
    assert state.gpr[16:] == (0,) * 16
    assert state.gpr[4] != 0


@pytest.mark.parametrize(
    ("value", "accepted"),
    [
        (0x80003, True), (0x80001, True), (3, True), (0x80000, False), (0x8001B, False), (0x8000B, False),
        (0x10003, False),
    ],
)  # fmt: skip
def test_what_xcr0_may_hold(value, accepted):
    (_, (exit_, state)) = shown(case("e610f4", Run(), Try((("xcr0", value),))))
    assert exit_ == Answer(f"xcr0={value:#x}", accepted)
    assert state.xcr0 == (value if accepted else 0x80003)


def test_a_processor_without_apx_refuses_its_bit():
    bare = without_apx(APX)
    assert "apx" not in bare.features
    assert not bare.xcr0_supported >> 19
    assert bare.xsave_offset(19) is None
    assert bare.leaf(0x29) is None
    ((exit_, _),) = shown(case("f4", Try((("xcr0", 0x80003),)), gpr=(0,) * 16, profile=bare))
    assert exit_ == Answer("xcr0=0x80003", False)


def test_what_a_kick_shows_is_the_jump_to_itself():
    seen = shown(case("ebfeffc0f4", Kick(), Kick(), SetState((("rip", CODE_BASE + 2),)), Run()))
    assert [type(e) for e, _ in seen] == [Interrupted, Interrupted, Halt]
    assert [s.gpr[0] for _, s in seen] == [0, 0, 1]
    assert [s.rip - CODE_BASE for _, s in seen] == [0, 0, 5]


@pytest.mark.parametrize("code", ["f4", "e610", "0f0b", "90ebfe", "f3a4"])
def test_a_guest_that_is_somewhere_else_cannot_be_kicked(code):
    with pytest.raises(ModelError, match="must stand at a jump to itself"):
        shown(case(code, Kick()))


def test_two_vcpus_have_their_own_registers_and_one_ram():
    word = DATA_BASE.to_bytes(4, "little").hex()
    first = f"b801000000 890425{word} e610 8b1c25{word} f4"  # mov eax, 1; mov [word], eax; out; mov ebx, [word]; hlt
    second = f"030425{word} 890425{word} f4"  # add eax, [word]; mov [word], eax; hlt
    code = bytes.fromhex(first.replace(" ", "")).ljust(64, b"\x90") + bytes.fromhex(second.replace(" ", ""))
    made = case(code.hex(), Run(), Switch(1), Run(), Switch(0), Run())
    other = replace(made.start, rip=CODE_BASE + 64, gpr=(41, *made.start.gpr[1:16], *(7,) * 16))
    (_, one), (_, two), (_, back) = shown(replace(made, others=(Other(other),)))
    assert (one.gpr[16:], two.gpr[16:], back.gpr[16:]) == (EGPR, (7,) * 16, EGPR)
    assert two.gpr[0] == 42
    assert back.gpr[3] == 42


def test_a_vcpu_with_an_exit_pending_waits_for_its_turn():
    made = case("e410f4", Run(1, complete=False), Switch(1), Run(), Switch(0), Run())
    seen = shown(replace(made, others=(Other(made.start, without_apx(APX)),), seed=3))
    assert [e.kind for e, _ in seen] == ["io", "io", "halt"]
    assert seen[1][1].gpr[0] != seen[2][1].gpr[0], "each read of the device has an answer of its own"


def test_completing_shows_ram_as_another_vcpu_has_left_it():
    word = DATA_BASE.to_bytes(4, "little").hex()
    store = f"c70425{word}78563412 f4".replace(" ", "")
    made = case("e410f4" + store, Run(1, complete=False), Switch(1), Run(), Switch(0), Complete())
    made = replace(made, others=(Other(replace(made.start, rip=CODE_BASE + 3)),))
    machine = ReferenceMachine()
    machine.load(made)
    last = [o for action in made.actions for o in machine.apply(action)][-1]
    assert last.pages[DATA_BASE][:4] == b"\x78\x56\x34\x12"


def test_case_of_several_vcpus_survives_json_and_has_an_id_of_its_own():
    made = case("f4", Kick(), Switch(1), Try((("xcr0", 3),)), Show("xsave2"))
    two = replace(made, others=(Other(made.start, without_apx(APX)),))
    again = Case.from_json(json.loads(json.dumps(two.to_json())))
    assert again.id == two.id != made.id
    assert again.others[0].profile == without_apx(APX)
    assert again.actions == two.actions


def test_an_msr_that_is_not_there_goes_to_userspace_where_that_is_asked_for():
    shape = VmShape(caps=((CAP_USER_SPACE_MSR, (2,)),))
    code = "b9ffffff5f 0f32 f4".replace(" ", "")
    (exit_, state), _ = shown(case(code, Run(4), shape=shape, seed=9))
    assert exit_ == Msr(0x5FFFFFFF, False)
    answer = int.from_bytes(case(code, seed=9).read_data(0, 8), "little")
    assert (state.gpr[0], state.gpr[2]) == (answer & 0xFFFFFFFF, answer >> 32)
    assert isinstance(shown(case(code, Run(4)))[0][0], Halt), "#GP, whose stub halts"


def test_a_hypercall_goes_to_userspace_where_that_is_asked_for():
    shape = VmShape(caps=((CAP_EXIT_HYPERCALL, (1 << 12,)),))
    code = "b80c000000 bb00000100 b901000000 ba02000000 0f01d9 f4".replace(" ", "")
    (exit_, state), _ = shown(case(code, Run(4), shape=shape))
    assert exit_ == Hypercall(12, (0x10000, 1, 2))
    assert state.gpr[0] == int.from_bytes(case(code).read_data(0, 8), "little")
    assert last(case(code, Run(4))).gpr[0] == -1000 & (1 << 64) - 1, "-ENOSYS"


def test_every_case_of_the_family_runs_on_the_model_and_ends_as_it_should():
    machine = ReferenceMachine()
    found = list(all_cases(APX, families=["apx_exits", "apx_off"]))
    assert len(found) > 120
    kinds = set()
    for c in found:
        machine.load(c)
        seen = [o for action in c.actions for o in machine.apply(action)]
        kinds |= {o.exit.kind for o in seen}
        assert seen[-1].exit.kind in ("halt", "answer"), c.name
    assert {"io", "mmio", "msr", "hypercall", "debug", "interrupted", "answer"} <= kinds


def test_the_guest_without_apx_meets_undefined_opcodes():
    machine = ReferenceMachine()
    for c in all_cases(APX, families=["apx_off"]):
        if c.name.startswith(("apx_off/rex2", "apx_off/evex", "apx_off/jmpabs")):
            machine.load(c)
            state = unpack_sections(machine.apply(Run(4))[-1].sections)
            assert state.rip == 0x4000 + 16 * 6 + 1, c.name
            assert isinstance(machine.apply(Run(1))[-1].exit, (Halt, Io))
