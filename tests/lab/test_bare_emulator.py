"""The bare emulator against the reference model. Needs the lab's own QEMU, which the first run builds; no KVM."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from harness.case import Action, Blob, Case, Complete, Inject, Memory, Run, SaveRestore, SetState, Slot, Step, VmShape
from harness.cpuid import with_features
from harness.exits import Halt, Io, Mmio, Shutdown, Timeout
from harness.lab.bare_arbiter import Arbiter, load_defects
from harness.lab.bare_emulator import BareEmulator
from harness.lab.errors import LostError
from harness.lab.hardware import Emulator, pinned_qemu
from harness.lockstep import Outcome, lockstep
from harness.machine import record
from harness.modes import CODE_BASE, MODES, setup
from harness.paths import all_cases
from harness.reference.cpu import ModelError
from harness.reference.machine import ReferenceMachine
from harness.state import unpack_sections

OUT_HLT = b"\xb0\x5a\xe6\x10\xe4\x11\xf4"  # mov al, 0x5a; out 0x10, al; in al, 0x11; hlt


@pytest.fixture(scope="module")
def emulator() -> Emulator:
    return pinned_qemu(print)


@pytest.fixture(scope="module")
def bare(emulator: Emulator) -> Iterator[BareEmulator]:
    with BareEmulator(emulator) as machine:
        yield machine


def _case(bare: BareEmulator, mode: str, code: bytes, *actions: Action, shape: VmShape | None = None) -> Case:
    start = setup(mode, entry=CODE_BASE, profile=bare.profile)
    memory = Memory((*start.blobs, Blob(CODE_BASE, code)))
    actions = actions or (Run(64),)
    return Case(f"test@{mode}", memory, start.state, bare.profile, shape or VmShape(), actions, start.bits)


def _agree(bare: BareEmulator, case: Case) -> Outcome:
    outcome = lockstep(case, ReferenceMachine(), bare)
    assert outcome.difference is None, outcome.difference.summary()
    return outcome


@pytest.mark.parametrize("cpu", ["max,+svm", "max,+svm,+apxf"])
def test_the_suite_agrees_but_for_listed_defects(emulator: Emulator, cpu: str) -> None:
    if "apxf" in cpu and "apx" not in emulator.features:
        pytest.skip("this QEMU has no APX")
    defects = load_defects()
    model, unlisted, met, shown, agreed = ReferenceMachine(), [], set(), set(), 0
    with BareEmulator(emulator, cpu=cpu) as machine:
        for case in all_cases(machine.profile):
            if any(":" not in need and need not in machine.profile.features for need in case.requires):
                continue
            try:
                found = lockstep(case, model, machine).difference
            except ModelError:
                continue
            rows = {d.name for d in defects if d.covers(case.name)}
            met |= rows
            if found is None:
                agreed += 1
            elif rows:
                shown |= rows
            else:
                unlisted.append(f"{case.name}: {found.summary()}")
    assert not unlisted
    assert shown == met, "a listed defect no longer shows: take its row out"
    assert met
    assert agreed > 20_000


@pytest.mark.parametrize("mode", [m for m in MODES if m not in ("vm86", "long-user", "compat-user", "prot32-user")])
def test_every_mode_runs_to_its_exits(bare: BareEmulator, mode: str) -> None:
    exits = [seen.exit for step in record(bare, _case(bare, mode, OUT_HLT)) for seen in step]
    assert exits == [Io(0x10, 1, True, b"\x5a"), Io(0x11, 1, False), Halt()]


def test_a_wrong_value_is_a_difference(bare: BareEmulator) -> None:
    case = _case(bare, "long", b"\x48\xff\xc0\xf4")  # inc rax; hlt
    gpr = (41, *case.start.gpr[1:])
    other = replace(case, start=replace(case.start, gpr=gpr))

    class Other(ReferenceMachine):
        def load(self, case: Case, sections: object = None) -> None:
            super().load(other)

    found = lockstep(case, Other(), bare).difference
    assert found is not None
    assert [(d.name, d.expected, d.got) for d in found.registers if d.name == "rax"] == [("rax", 42, 1)]


def test_the_order_of_cases_does_not_matter(bare: BareEmulator) -> None:
    cases = all_cases(bare.profile, families=("segment", "control", "resume"), seeds=1)[::7]
    cases = [c for c in cases if not c.requires - bare.profile.features - {r for r in c.requires if ":" in r}]
    forth = {c.name: record(bare, c) for c in cases}
    back = {c.name: record(bare, c) for c in reversed(cases)}
    assert forth == back


def test_code_that_changed_between_two_cases_is_not_run_again(bare: BareEmulator) -> None:
    for value in (1, 2, 1):
        case = _case(bare, "long", b"\xb0" + bytes([value]) + b"\xf4")  # mov al, value; hlt
        (seen,) = record(bare, case)[0]
        assert unpack_sections(seen.sections).gpr[0] == value


def test_code_that_changes_itself(bare: BareEmulator) -> None:
    # mov byte [rip+1], 0x77; mov al, 0 (becomes 0x77); hlt
    _agree(bare, _case(bare, "long", b"\xc6\x05\x01\x00\x00\x00\x77\xb0\x00\xf4"))


@pytest.mark.parametrize(
    "actions",
    [
        (Step(3),), (Run(), SetState((("rax", 7), ("rflags", 0x8D6))), Run(64)), (Run(), SaveRestore(), Run(64)),
        (Run(1, complete=False), Complete(), Run(64)), (Run(), SetState((("cr2", 0x1000),), "sregs"), Run(64)),
        (Run(), Inject("exception", 6), Run(64)), (Run(), Inject("exception", 13, 0x18), Run(64)),
        (Run(), Inject("interrupt", 0x40), Run(64)), (Run(), Inject("nmi"), Run(64)),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("mode", ["real", "prot16", "prot32", "pae", "compat", "long"])
def test_actions_do_what_they_do_to_the_model(bare: BareEmulator, mode: str, actions: Sequence[Action]) -> None:
    _agree(bare, _case(bare, mode, OUT_HLT, *actions))


def test_a_triple_fault_is_a_shutdown_and_leaves_nothing_behind(bare: BareEmulator) -> None:
    case = _case(bare, "long", b"\x0f\x0b")  # ud2, with no IDT
    idtr = replace(case.start.idtr, limit=0)
    (seen,) = record(bare, replace(case, start=replace(case.start, idtr=idtr)))[0]
    assert seen.exit == Shutdown()
    _agree(bare, _case(bare, "long", OUT_HLT))


def test_a_guest_that_never_leaves_times_out(emulator: Emulator) -> None:
    with BareEmulator(emulator, limit=0.2) as machine:
        began = time.monotonic()
        (seen,) = record(machine, _case(machine, "long", b"\xeb\xfe"))[0]  # jmp .
        assert seen.exit == Timeout(0.2)
        assert 0.2 <= time.monotonic() - began < 5
        _agree(machine, _case(machine, "long", OUT_HLT))


def test_slots_elsewhere_and_the_holes_between_them(bare: BareEmulator) -> None:
    shape = VmShape((Slot(0, 0x20000), Slot(0x100000, 0x4000), Slot(0x300000, 0x1000)))
    # mov eax, [0x100ffe]; mov [0x300010], eax; mov [0x103ffe], eax (half of it beyond the slot); hlt
    code = bytes.fromhex("8b0425fe0f1000 890425 10003000 890425fe3f1000 f4")
    case = _case(bare, "long", code, shape=shape)
    case = replace(case, memory=case.memory.plus(Blob(0x100FFE, b"\x11\x22\x33\x44")))
    tables = Blob(0x7000 + 8 * 0, (0x8000 | 7).to_bytes(8, "little"))
    big = Blob(0x8000, b"".join((n << 12 | 0x67).to_bytes(8, "little") for n in range(512)))
    second = Blob(0x7008, (0x200000 | 0xE7).to_bytes(8, "little"))
    case = replace(case, memory=case.memory.plus(tables, big, second))
    steps = record(bare, case)[0]
    assert Mmio(0x104000, 2, True, b"\x33\x44") in [s.exit for s in steps]
    assert bare.read(0x300010, 4) == b"\x11\x22\x33\x44"
    assert bare.read(0x103FFE, 2) == b"\x11\x22"
    _agree(bare, case)


def test_unaligned_and_odd_accesses_to_a_hole_come_whole(bare: BareEmulator) -> None:
    code = bytes.fromhex("48 89 04 25 03 00 0a 00 f4")  # mov [0xa0003], rax; hlt
    case = _case(bare, "long", code)
    exits = [s.exit for s in record(bare, case)[0]]
    assert exits[0] == Mmio(0xA0003, 8, True, bytes(8))
    _agree(bare, case)
    across = _case(bare, "long", bytes.fromhex("48 8b 04 25 fb 0f 0a 00 f4"))  # mov rax, [0xa0ffb]: 5 and 3 bytes
    exits = [s.exit for s in record(bare, across)[0]]
    assert exits[:2] == [Mmio(0xA0FFB, 5, False), Mmio(0xA1000, 3, False)]
    _agree(bare, across)


def test_the_processor_is_that_of_the_case(bare: BareEmulator) -> None:
    code = bytes.fromhex("b801000000 31c9 0fa2 f30fb8c0 f4")  # cpuid leaf 1; popcnt eax, eax; hlt
    _agree(bare, _case(bare, "long", code))
    case = _case(bare, "long", code)
    less = with_features(bare.profile, remove=("popcnt", "movbe"))
    without = replace(case, profile=less)
    _agree(bare, without)
    assert bare.lacking(less) == frozenset()
    more = with_features(bare.profile, add=("shstk",))
    assert bare.lacking(more) == {"shstk"}
    # movbe eax, [rsp] is #UD where CPUID does not have it, and none where it has
    movbe = _case(bare, "long", bytes.fromhex("0f38f00424f4"))
    (with_it,) = record(bare, movbe)[0]
    (without_it,) = record(bare, replace(movbe, profile=less))[0]
    assert unpack_sections(with_it.sections).rip == CODE_BASE + 6
    assert unpack_sections(without_it.sections).rip == 0x4000 + 16 * 6 + 1


def test_an_emulator_that_dies_is_lost_and_started_anew(emulator: Emulator) -> None:
    with BareEmulator(emulator) as machine:
        case = _case(machine, "long", OUT_HLT)
        _agree(machine, case)
        assert machine._box is not None
        assert machine._box._process is not None
        machine._box._process.send_signal(signal.SIGKILL)
        with pytest.raises(LostError, match="died"):
            record(machine, case)
        _agree(machine, case)


def test_no_emulator_outlives_us(emulator: Emulator, tmp_path: Path) -> None:
    words = (emulator.name, str(emulator.binary), str(emulator.firmware or ""), emulator.digest)
    script = (
        "import sys, time; from pathlib import Path; from harness.lab.hardware import Emulator;"
        "from harness.lab.bare_emulator import BareEmulator;"
        "e = Emulator(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]) if sys.argv[3] else None, sys.argv[4],"
        " frozenset());"
        "b = BareEmulator(e).__enter__(); print(b._box._process.pid, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", script, *words], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        process.kill()
    for _ in range(100):
        if not Path(f"/proc/{pid}").exists() or "State:\tZ" in Path(f"/proc/{pid}/status").read_text():
            return
        time.sleep(0.05)
    os.kill(pid, signal.SIGKILL)
    pytest.fail("the emulator was still there")


def test_the_arbiter_blames_the_emulator_for_its_own_only(bare: BareEmulator) -> None:
    arbiter = Arbiter(bare, ReferenceMachine())
    cases = {c.name: c for c in all_cases(bare.profile, families=("segment", "gpr"))}
    bad, good = cases["segment/limit_out_ds@prot32#0"], cases["gpr/mov_from_al@real#0"]
    found = lockstep(bad, ReferenceMachine(), bare).difference
    assert found is not None
    assert "no-segment-limits" in arbiter.suspect(bad, found)
    assert "not yet listed" in Arbiter(bare, ReferenceMachine(), ()).suspect(bad, found)
    other = replace(found, registers=found.registers[1:])
    assert arbiter.suspect(bad, other) == ""
    assert arbiter.suspect(good, found) == ""
    assert arbiter.suspect(replace(bad, requires=bad.requires | {"fep"}), found) == ""
