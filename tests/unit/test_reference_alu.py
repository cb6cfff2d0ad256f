"""Facts about the reference model's computation, worked out by hand from the manuals."""

from __future__ import annotations

import pytest

from harness import modes
from harness.case import Blob, Case, Complete, Inject, Memory, Observation, Run, SetState, Step
from harness.cpuid import FEATURES, CpuidEntry, CpuProfile, with_features
from harness.exits import Debug, Halt, Io, Mmio, Shutdown
from harness.reference.cpu import AF, ARITH, CF, OF, PF, RF, SF, ZF, ModelError
from harness.reference.machine import ReferenceMachine
from harness.state import CpuState, unpack_sections

AMD = (0x68747541, 0x444D4163, 0x69746E65)
INTEL = (0x756E6547, 0x6C65746E, 0x49656E69)


def profile(vendor: tuple[int, int, int] = INTEL) -> CpuProfile:
    ebx, ecx, edx = vendor
    leaf_d = CpuidEntry(0xD, 0, 1, eax=0x80007)
    return with_features(CpuProfile((CpuidEntry(0, 0, 0, 13, ebx, ecx, edx), leaf_d)), add=FEATURES)


def case(code: str, mode: str = "long", vendor: tuple[int, int, int] = INTEL, **start: int) -> Case:
    setup = modes.setup(mode, entry=modes.CODE_BASE, profile=profile(vendor))
    memory = Memory((*setup.blobs, Blob(modes.CODE_BASE, bytes.fromhex(code) + b"\xf4")))
    return Case("t", memory, setup.state.with_(start), profile(vendor), bits=setup.bits, requires=frozenset({"apx"}))


def run(
    code: str, mode: str = "long", vendor: tuple[int, int, int] = INTEL, **start: int
) -> tuple[CpuState, Observation]:
    machine = ReferenceMachine()
    machine.load(case(code, mode, vendor, **start))
    (seen,) = machine.apply(Run())
    assert seen.exit == Halt()
    return unpack_sections(seen.sections), seen


def vector(state: CpuState) -> int | None:
    """The exception whose stub the guest halted in."""
    stub, inside = divmod(state.rip - 1 - modes.STUBS, 16)
    return stub if inside == 0 and 0 <= stub < 256 else None


# --- flags -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "rax", "rcx", "result", "flags"),
    [
        ("01 c8", 0x7FFFFFFF, 1, 0x80000000, OF | SF | AF | PF),
        ("01 c8", 0xFFFFFFFF, 1, 0, CF | ZF | AF | PF),
        ("48 01 c8", 0xFFFFFFFF, 1, 0x100000000, AF | PF),
        ("00 c8", 0x1FF, 1, 0x100, CF | ZF | AF | PF),
        ("00 cc", 0x7FFF, 1, 0x80FF, OF | SF | AF),
        ("66 29 c8", 0x10000, 1, 0x1FFFF, CF | SF | AF | PF),
        ("29 c8", 0x80000000, 1, 0x7FFFFFFF, OF | AF | PF),
        ("39 c8", 5, 5, 5, ZF | PF),
        ("f7 d8", 0x80000000, 0, 0x80000000, CF | OF | SF | PF),
        ("fe c0", 0x7F, 0, 0x80, OF | SF | AF),
        ("ff c8", 0, 0, 0xFFFFFFFF, SF | AF | PF),
        ("f7 d0", 0, 0, 0xFFFFFFFF, 0),
    ],
)
def test_arithmetic_flags(code: str, rax: int, rcx: int, result: int, flags: int) -> None:
    state, seen = run(code, rax=rax, rcx=rcx)
    assert (state.gpr[0], state.rflags & ARITH, seen.ignore) == (result, flags, {})


def test_inc_leaves_carry_alone_and_adc_uses_it() -> None:
    assert run("f9 ff c0 83 d1 00", rax=0xFFFFFFFF, rcx=4)[0].gpr[1] == 5


def test_and_leaves_af_undefined_and_clears_cf_and_of() -> None:
    state, seen = run("f9 21 c8", rax=0xF0, rcx=0x0F)
    assert seen.ignore == {"rflags": AF}
    assert state.rflags & (ARITH & ~AF) == ZF | PF


@pytest.mark.parametrize(
    ("code", "ignore"),
    [
        ("d1 e0", AF), ("c1 e0 02", AF | OF), ("c1 e0 20", 0), ("66 c1 e0 11", AF | OF | CF), ("c1 c0 04", OF),
        ("d1 c0", 0), ("f7 e1", SF | ZF | AF | PF), ("f7 f1", ARITH), ("0f bc c1", ARITH & ~ZF),
        ("0f a3 c1", OF | SF | AF | PF),
    ],
)  # fmt: skip
def test_undefined_flags(code: str, ignore: int) -> None:
    assert run(code, rax=1, rcx=2)[1].ignore.get("rflags", 0) == ignore


def test_reading_an_undefined_flag_is_not_answered() -> None:
    with pytest.raises(ModelError, match=r"undefined now: 0x40"):
        run("f7 e1 74 00")


def test_pushf_makes_undefined_bits_of_memory() -> None:
    _, seen = run("21 c0 9c")
    assert seen.pages_ignore == {modes.STACK_TOP - 8: AF}


# --- widths ----------------------------------------------------------------------------------------------------------

FULL = 0x1122334455667788


@pytest.mark.parametrize(
    ("code", "rax"),
    [
        ("b0 01", 0x1122334455667701), ("b4 01", 0x1122334455660188), ("66 b8 0100", 0x1122334455660001),
        ("b8 01000000", 1), ("48 c7 c0 ffffffff", (1 << 64) - 1), ("90", FULL), ("87 c0", 0x55667788),
        ("48 0f c8", 0x8877665544332211), ("48 98", 0x55667788), ("98", 0x7788), ("0f 4f c0", 0x55667788),
        ("c1 e0 00", 0x55667788),
    ],
)  # fmt: skip
def test_register_width(code: str, rax: int) -> None:
    assert run(code, rax=FULL)[0].gpr[0] == rax


def test_byte_registers_with_rex_are_spl_to_dil() -> None:
    state, _ = run("40 b6 01 b6 02", rdx=0, rsi=0)  # mov sil, 1; mov dh, 2
    assert (state.gpr[6], state.gpr[2]) == (1, 0x200)


def test_failing_cmpxchg32_keeps_its_destination_and_extends_rax() -> None:
    state, _ = run("0f b1 d1", rax=FULL, rcx=FULL + 1, rdx=9)
    assert (state.gpr[0], state.gpr[1]) == (0x55667789, FULL + 1)


def test_bsf_of_zero_keeps_its_destination() -> None:
    assert run("0f bc c1", rax=FULL, rcx=0)[0].gpr[0] == FULL


def test_division_faults() -> None:
    assert vector(run("f7 f1", rax=1, rcx=0)[0]) == 0
    assert vector(run("f7 f9", rax=0x80000000, rdx=0xFFFFFFFF, rcx=0xFFFFFFFF)[0]) == 0
    state, _ = run("48 f7 f9", rax=(1 << 64) - 7, rdx=(1 << 64) - 1, rcx=2)
    assert (state.gpr[0], state.gpr[2]) == ((1 << 64) - 3, (1 << 64) - 1)


def test_lock_on_a_register_is_undefined() -> None:
    assert vector(run("f0 01 c8")[0]) == 6


def test_the_fifteen_byte_limit() -> None:
    assert vector(run("66" * 15 + "90")[0]) == 13


# --- 32 registers ----------------------------------------------------------------------------------------------------


def test_rex2_reaches_every_register() -> None:
    state, _ = run("d5 58 01 c8 d5 7c 8b 7c c8 10 d5 18 50 41 5f", r16=modes.DATA_BASE - 8, r17=8, r31=5)
    assert (state.gpr[16], state.gpr[17], state.gpr[31], state.gpr[15]) == (modes.DATA_BASE, 8, 0, modes.DATA_BASE)


def test_rex2_without_xcr0_is_undefined() -> None:
    assert vector(run("d5 58 01 c8", xcr0=3)[0]) == 6


# --- vendors ---------------------------------------------------------------------------------------------------------


def test_66_near_branch_in_64_bit_mode() -> None:
    assert run("66 e9 0100 cc", vendor=AMD)[0].rip == modes.CODE_BASE + 6
    assert run("66 e9 01000000 cc", vendor=INTEL)[0].rip == modes.CODE_BASE + 8


# --- machine ---------------------------------------------------------------------------------------------------------


def observe(code: str, *actions: object, mode: str = "long", **start: int) -> list[Observation]:
    machine = ReferenceMachine()
    machine.load(case(code, mode, **start))
    return [seen for action in actions for seen in machine.apply(action)]  # type: ignore[arg-type]


def test_port_io_exits_and_state_after_completion() -> None:
    start = case("e4 10 e6 11", rax=0x100)
    machine = ReferenceMachine()
    machine.load(start)
    got = machine.apply(Run(8))
    data = start.read_data(0, 1)
    assert [o.exit for o in got] == [Io(0x10, 1, False), Io(0x11, 1, True, data), Halt()]
    assert unpack_sections(got[0].sections).gpr[0] == 0x100 | data[0]


def test_mmio_read_modify_write_shows_two_exits_and_one_state() -> None:
    read, write, halt = observe("48 01 08", Run(8), rax=modes.MMIO_LINEAR, rcx=1)
    assert isinstance(read.exit, Mmio)
    assert isinstance(write.exit, Mmio)
    assert (read.exit.write, write.exit.write, read.sections) == (False, True, {})
    assert write.sections
    assert halt.exit == Halt()


def test_pending_operation_is_completed_by_complete() -> None:
    pending, done = observe("e4 10", Run(complete=False), Complete())
    assert (pending.exit, pending.sections) == (Io(0x10, 1, False), {})
    assert unpack_sections(done.sections).rip == modes.CODE_BASE + 2


def test_rep_outs_shows_every_item_and_accepts_the_restart_point_at_its_end() -> None:
    seen = observe("f3 6e", Run(8), rcx=2, rdx=0x10, rsi=modes.DATA_BASE)
    assert [o.exit.kind for o in seen] == ["io", "io", "halt"]
    rips = [unpack_sections(o.sections).rip - modes.CODE_BASE for o in seen]
    assert (rips, seen[0].accept, seen[1].accept) == ([0, 2, 3], {}, {"rip": (modes.CODE_BASE,)})


def test_a_rep_that_zf_has_ended_is_over_and_rf_is_clear() -> None:
    """As long as rCX has not ended it: a machine may have to find that out at its restart point."""
    differs = case("f3 ae").read_data(0, 1)[0] ^ 1
    start = {"rax": differs, "rdi": modes.MMIO_LINEAR}
    for count, rip, ignored, accepted in ((5, 2, 0, {}), (1, 2, RF, {"rip": (modes.CODE_BASE,)})):
        read, halt = observe("f3 ae", Run(8), rcx=count, **start)
        state = unpack_sections(read.sections)
        assert (state.rip - modes.CODE_BASE, state.gpr[1], state.rflags & RF) == (rip, count - 1, 0)
        assert (read.ignore.get("rflags", 0) & RF, read.accept) == (ignored, accepted)
        assert halt.exit == Halt()
    read, *_ = observe("f3 ae", Run(8), rcx=5, rdi=modes.MMIO_LINEAR, rax=differs ^ 1)
    assert (unpack_sections(read.sections).rip - modes.CODE_BASE, read.ignore["rflags"] & RF) == (0, RF)
    short = {"rcx": 0x10001, "rdi": 0x100, "rax": differs, "es.base": modes.MMIO_LINEAR}
    read, *_ = observe("67 f3 ae", Run(8), mode="prot32", **short)
    assert read.ignore["rflags"] & RF, "what counts is CX"


def test_step_shows_every_instruction() -> None:
    seen = observe("90 ff c0 ff c0", Step(3))
    assert [o.exit.pc - modes.CODE_BASE for o in seen if isinstance(o.exit, Debug)] == [1, 3, 5]
    assert unpack_sections(seen[-1].sections).gpr[0] == 2


def test_trap_flag_traps_after_the_next_instruction() -> None:
    state, _ = run("9c 48 81 0c 24 00010000 9d ff c0 ff c0")  # pushf; or [rsp], TF; popf; inc eax; inc eax
    assert (vector(state), state.gpr[0], state.dr6 >> 14 & 1) == (1, 1, 1)


def test_injected_exception_is_delivered_first() -> None:
    (seen,) = observe("90", Inject("exception", 13, 0x18), Run())
    assert vector(unpack_sections(seen.sections)) == 13


def test_set_state_takes_effect() -> None:
    (seen,) = observe("ff c0", SetState((("rax", 41),)), Run())
    assert unpack_sections(seen.sections).gpr[0] == 42


def test_self_modifying_code_is_seen() -> None:
    # mov byte [rip+1], 0x02 changes the immediate of mov al, 1 that follows
    assert run("c6 05 01000000 02 b0 01")[0].gpr[0] == 2


def test_triple_fault_is_a_shutdown() -> None:
    (seen,) = observe("0f 0b", Run(), **{"idtr.limit": 0})
    assert (seen.exit, seen.sections) == (Shutdown(), {})


def test_endless_guest_is_a_model_error() -> None:
    machine = ReferenceMachine(budget=1000)
    machine.load(case("eb fe"))
    with pytest.raises(ModelError, match="did not exit in 1000"):
        machine.apply(Run())


def test_unknown_instruction_names_bytes_and_rip() -> None:
    with pytest.raises(ModelError, match=r"0f 0e.*0xa000"):
        run("0f 0e")


def test_push_pop_edge_cases() -> None:
    state, _ = run("54 58")  # push rsp; pop rax
    assert state.gpr[0] == modes.STACK_TOP
    state, _ = run("6a 05 8f 04 24")  # push 5; pop [rsp]: addressed after the increment
    assert state.gpr[4] == modes.STACK_TOP
