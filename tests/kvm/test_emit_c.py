"""The C reproducer does on /dev/kvm what the harness did: same exits, same values, and the verdict as exit status."""

import random
import subprocess
from dataclasses import replace

import pytest

from harness.case import (
    Action,
    Blob,
    Case,
    Complete,
    Inject,
    Memory,
    Run,
    SaveRestore,
    SetState,
    Show,
    Slot,
    Step,
    VmShape,
)
from harness.cpuid import CpuidEntry, CpuProfile
from harness.exits import Halt, Shutdown
from harness.kvm_machine import KvmMachine
from harness.lockstep import Difference, compare_registers, lockstep
from harness.machine import Recording, record
from harness.modes import CODE_BASE, DATA_BASE, setup
from harness.reference.machine import ReferenceMachine
from harness.report.emit_c import EmitError, emit_c
from harness.report.reduce import reduced, same_difference
from harness.state import pack_sections, unpack_sections

HOST = "a test */ with /* comment signs"
CMPXCHG = bytes.fromhex("0fb1d1f4")  # cmpxchg ecx,edx; hlt


@pytest.fixture(scope="module")
def profile(kvm):
    return kvm.supported_cpuid()


@pytest.fixture
def machine(kvm):
    with KvmMachine(kvm) as machine:
        yield machine


def case_of(profile, code, registers=None, mode="long", **more):
    start = setup(mode, entry=CODE_BASE, profile=profile)
    memory = Memory((*start.blobs, Blob(CODE_BASE, code)))
    return Case("trial", memory, start.state.with_(registers or {}), profile, bits=start.bits, **more)


def cmpxchg(profile):
    return case_of(profile, CMPXCHG, {"rax": 0x1111111122222222, "rcx": 0x3333333344444444})


def altered(seen, values):
    """An Observation with other register values in it."""
    names = tuple(seen.sections)
    return replace(seen, sections=pack_sections(unpack_sections(seen.sections).with_(values), names))


def last_exit_differs_in(machine, case, values):
    """What the case shows on this KVM, and the Difference if ``values`` were right at its last exit with registers."""
    steps = record(machine, case)
    action = max(n for n, step in enumerate(steps) if step and step[-1].sections)
    got = steps[action][-1]
    wrong = altered(got, values)
    shown = [seen for step in steps[: action + 1] for seen in step]
    found = Difference(len(shown) - 1, action, wrong, got, compare_registers(wrong, got))
    assert {d.name for d in found.registers} == set(values)
    return shown, found


def run_c(tmp_path, source):
    path = tmp_path / "repro.c"
    path.write_text(source)
    flags = ["-Wall", "-Wextra", "-Werror", "-O2"]
    subprocess.run(["gcc", *flags, "-o", str(tmp_path / "repro"), str(path)], check=True)
    return subprocess.run([str(tmp_path / "repro")], capture_output=True, text=True, timeout=30, check=False)


def test_known_defect_shows_in_c(machine, profile, tmp_path):
    case = cmpxchg(profile)
    seen = record(machine, case)[0][0]
    state = unpack_sections(seen.sections)
    if state.gpr[1] != 0x44444444:
        pytest.skip("this KVM has not the emulator's cmpxchg defect")
    right = altered(seen, {"rcx": 0x3333333344444444})
    found = lockstep(case, Recording([[right]]), machine).difference
    done = run_c(tmp_path, emit_c(case, found, HOST))
    assert done.stdout == "exit 0: halt\nrcx: expected 0x3333333344444444 got 0x44444444\nDEFECT REPRODUCED\n"
    assert done.returncode == 1


def test_agreeing_values_are_no_defect(machine, profile, tmp_path):
    case = case_of(profile, b"\x48\xff\xc0\xf4", {"rax": 41})  # inc rax; hlt
    _, found = last_exit_differs_in(machine, case, {"rax": 43})
    right = replace(found, registers=(replace(found.registers[0], expected=42, got=43),))
    done = run_c(tmp_path, emit_c(case, right, HOST))
    assert (done.returncode, done.stdout) == (0, "exit 0: halt\nnot reproduced: agrees\n")


def test_without_a_difference_the_exits_are_shown(profile, tmp_path):
    done = run_c(tmp_path, emit_c(case_of(profile, b"\xe6\x70\xf4", {"rax": 0x1F}), None, HOST))
    assert done.stdout == "exit 0: io write port 0x70 size 1 count 1 data 1f\nexit 1: halt\n"
    assert done.returncode == 0


def test_undefined_bits_and_accepted_values_are_not_judged(machine, profile, tmp_path):
    case = case_of(profile, b"\x48\xff\xc0\xf4", {"rax": 41})
    _, found = last_exit_differs_in(machine, case, {"rax": 7})
    expected = replace(found.expected, ignore={"rax": 0xFF})
    assert run_c(tmp_path, emit_c(case, replace(found, expected=expected), HOST)).returncode == 0
    expected = replace(found.expected, accept={"rax": (42,)})
    assert run_c(tmp_path, emit_c(case, replace(found, expected=expected), HOST)).returncode == 0
    expected = replace(found.expected, accept={"rax": (43,)})
    assert run_c(tmp_path, emit_c(case, replace(found, expected=expected), HOST)).returncode == 1


def form(code, wrong, **options):
    return {"code": bytes.fromhex(code), **options}, wrong


# Everything a Case can hold, and registers to be wrong about at the end of it.
RIP, RAX = {"rip": 1}, {"rax": 1}
OUT_INC_HLT = "e6 80 ff c0 f4"
FORMS = {
    "device reads": form("e4 60 89 c3 66 ed 8b 14 25 00 00 0a 00 f4", {"rdx": 1}, registers={"rdx": 0x70}, seed=7),
    "device writes": form("e7 80 a3 04 00 0a 00 00 00 00 00 f4", RAX, registers={"rax": 0x12345678}),
    "rep insb": form("f3 6c f4", {"rdi": 1}, registers={"rcx": 5, "rdi": DATA_BASE, "rdx": 0x60}, seed=9),
    "real mode": form("b0 05 e6 80 f4", {"rax": 6, "rflags": 0x46}, mode="real"),
    "protected": form("b0 05 e6 80 f4", {"ds.base": 4, "gdtr.limit": 5, "cr3": 0x1000}, mode="prot32"),
    "set regs": form(OUT_INC_HLT, RAX, actions=(Run(1), SetState((("rax", 5), ("rbx", 7))), Run(4))),
    "set sregs": form(OUT_INC_HLT, {"fs.base": 1}, actions=(Run(1), SetState((("fs.base", 0x5000),), "sregs"), Run(4))),
    "set sync": form(OUT_INC_HLT, RAX, actions=(Run(1), SetState((("rax", 9),), "sync"), Run(4))),
    "steps": form("ff c0 ff c3 f4", {"rbx": 7, "rip": 1}, actions=(Step(2),)),
    "steps over device reads": form("e4 60 66 ed ff c3 f4", {"rbx": 7}, actions=(Step(3),), seed=3),
    "a step over an MMIO read": form("8b 14 25 00 00 0a 00 90 f4", {"rdx": 1}, actions=(Step(2),), seed=4),
    "exception": form("ff c0 f4", {"rip": 1, "rsp": 2}, actions=(Inject("exception", 13, 0), Run(2))),
    "interrupt": form("ff c0 f4", RIP, registers={"rflags": 0x202}, actions=(Inject("interrupt", 0x21), Run(2))),
    "nmi": form("ff c0 f4", RIP, actions=(Inject("nmi"), Run(2))),
    "completion apart": form("e4 60 f4", {"rax": 0x100}, actions=(Run(1, False), Complete(), Run(1))),
    "save and restore": form(
        OUT_INC_HLT, {"rax": 5, "msr.lstar": 1, "dr0": 2}, registers={"msr.lstar": 0x1234, "dr0": 0x100},
        actions=(Run(1), SaveRestore(), Run(2)),
    ),
    "msrs, debug, events": form(
        "ff c0 f4", {"msr.star": 1, "dr1": 2, "events.nmi_masked": 0, "xcr0": 7},
        registers={"msr.star": 0x123, "dr1": 0x55, "dr7": 0x401, "events.nmi_masked": 1},
    ),
    "two slots": form("ff c0 f4", {"rax": 5}, shape=VmShape((Slot(0, 0x20000), Slot(0x100000, 0x1000)))),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_c_shows_what_the_harness_saw(machine, profile, tmp_path, name):
    options, values = FORMS[name]
    case = case_of(profile, **options)
    seen, found = last_exit_differs_in(machine, case, values)
    done = run_c(tmp_path, emit_c(case, found, HOST))
    shown = [f"exit {n}: {s.exit}" for n, s in enumerate(seen)]
    wrong = [f"{d.name}: expected {d.expected:#x} got {d.got:#x}" for d in found.registers]
    assert done.stdout.splitlines() == [*shown, *wrong, "DEFECT REPRODUCED"], done.stderr
    assert done.returncode == 1


def test_a_step_ends_at_its_debug_exit_and_not_at_a_device(machine, profile, tmp_path):
    """Two steps, the first over an IN: three exits. Taking each for a step would stop after two."""
    case = case_of(profile, bytes.fromhex("e460 ffc3 ffc3 f4"), actions=(Step(2),), seed=3)
    shown = [seen.exit for step in record(machine, case) for seen in step]
    assert [type(e).__name__ for e in shown] == ["Io", "Debug", "Debug"]
    done = run_c(tmp_path, emit_c(case, None, HOST))
    assert done.stdout.splitlines() == [f"exit {n}: {e}" for n, e in enumerate(shown)]


# --- without the RAM that is not needed -----------------------------------------------------------------------------

FILLING = Blob(DATA_BASE, random.Random(1).randbytes(0x5000))
OTHER_CODE = Blob(CODE_BASE + 0x100, random.Random(2).randbytes(0x1000))


def filled(profile, code, registers=None, **more):
    case = case_of(profile, bytes.fromhex(code), registers, **more)
    return replace(case, memory=case.memory.plus(FILLING, OTHER_CODE))


def compared(machine, case):
    return lockstep(case, ReferenceMachine(), machine).difference


def smaller(machine, case, run=None):
    found = compared(machine, case)
    left, again = reduced(case, found, run or (lambda c: compared(machine, c)))
    assert same_difference(found, again)
    return left, again


def bytes_of(case):
    (slot,) = case.shape.slots
    return sum(map(bool, case.memory.image(slot)))


def test_a_small_reproducer_shows_the_same(machine, profile, tmp_path):
    case = filled(profile, "8b 14 25 10 20 01 00 0f b1 d1 f4", {"rax": 0x1111111122222222, "rcx": 0x3333333344444444})
    whole = emit_c(case, compared(machine, case), HOST)
    left, found = smaller(machine, case)
    source = emit_c(left, found, HOST, again="a command -k 'a/name@long#0'")
    assert len(source) < 25_000 < 100_000 < len(whole)
    assert "The same under the harness: a command -k 'a/name@long#0'\n" in source
    assert run_c(tmp_path, source).stdout == run_c(tmp_path, whole).stdout


def test_what_the_guest_reads_stays(machine, profile):
    case = filled(profile, "8b 14 25 10 20 01 00 f4")  # mov edx, [0x12010]
    left, found = smaller(machine, case)
    assert found is None
    assert bytes_of(left) < bytes_of(case) - 20_000
    machine.load(left)
    (seen,) = machine.apply(left.actions[0])
    at = 0x12010 - DATA_BASE
    assert unpack_sections(seen.sections).gpr[2] == int.from_bytes(FILLING.data[at : at + 4], "little")


def test_what_a_wrong_kvm_reads_stays_too(machine, profile):
    """A difference that hangs on bytes which the model does not use: they are found by asking."""
    case = filled(profile, "ff c0 f4")
    seen = record(machine, case)[0][0]
    needed = DATA_BASE + 0x2345

    def run(candidate):
        (slot,) = candidate.shape.slots
        value = candidate.memory.image(slot)[needed]
        wrong = altered(seen, {"rbx": value})
        return Difference(0, 0, seen, wrong, compare_registers(seen, wrong))

    left, again = reduced(case, run(case), run)
    assert same_difference(run(case), again)
    assert bytes_of(left) < bytes_of(case) - 20_000


def test_a_guest_unknown_to_the_model_keeps_its_ram(machine, profile):
    case = filled(profile, "c5 f9 ef c0 f4")  # vpxor
    assert reduced(case, None, lambda c: None) == (case, None)


def test_memory_is_compared_byte_by_byte(machine, profile, tmp_path):
    case = case_of(profile, bytes.fromhex("c6042510000100 5a f4"))  # mov byte [0x10010], 0x5a; hlt
    seen = record(machine, case)
    page = bytearray(4096)
    page[0x10], page[0x11] = 0xA5, 1
    wrong = replace(seen[0][0], pages={DATA_BASE: bytes(page)})
    found = lockstep(case, Recording([[wrong]]), machine).difference
    done = run_c(tmp_path, emit_c(case, found, HOST))
    assert "memory 0x10010: expected 0xa5 got 0x5a\nmemory 0x10011: expected 0x01 got 0x00\n" in done.stdout
    assert done.returncode == 1


def test_another_exit_is_the_defect(machine, profile, tmp_path):
    case = case_of(profile, b"\xf4")
    seen = record(machine, case)
    wrong = replace(seen[0][0], exit=Shutdown(), sections={})
    found = lockstep(case, Recording([[wrong]]), machine).difference
    done = run_c(tmp_path, emit_c(case, found, HOST))
    assert (done.returncode, done.stdout.splitlines()[1]) == (1, "exit: expected shutdown got halt")


def test_another_exit_is_not_the_defect_where_that_was_in_a_register(machine, profile, tmp_path):
    """As on a kernel with another defect: what was wrong there cannot be looked at here."""
    case = case_of(profile, b"\x48\xff\xc0\xf4", {"rax": 41})
    _, found = last_exit_differs_in(machine, case, {"rax": 43})
    expected, got = (replace(seen, exit=Shutdown()) for seen in (found.expected, found.got))
    elsewhere = replace(found, expected=expected, got=got)
    done = run_c(tmp_path, emit_c(case, elsewhere, HOST))
    assert done.returncode == 2
    assert done.stdout.splitlines()[1:] == [
        "exit: expected shutdown got halt", "this defect cannot be tried here: the guest comes to another exit",
    ]  # fmt: skip


def test_an_exit_too_few_and_one_too_many(machine, profile, tmp_path):
    case = case_of(profile, b"\xf4")
    seen = record(machine, case)
    fewer = lockstep(case, Recording([[]]), machine).difference
    done = run_c(tmp_path, emit_c(case, fewer, HOST))
    assert (done.returncode, done.stdout.splitlines()[1]) == (1, "exit: expected no further exit got halt")
    more = lockstep(case, Recording([[*seen[0], *seen[0]]]), machine).difference
    done = run_c(tmp_path, emit_c(case, more, HOST))
    assert (done.returncode, done.stdout.splitlines()[1]) == (1, "exit: expected halt got no further exit")


def test_a_guest_that_ends_early_cannot_be_judged(machine, profile, tmp_path):
    case = cmpxchg(profile)
    seen = record(machine, case)[0][0]
    done = run_c(tmp_path, emit_c(case, Difference(3, 0, seen, replace(seen, exit=Halt())), HOST))
    assert done.returncode == 2
    assert "ended before exit 3" in done.stderr


def test_the_actions_on_extended_registers_have_a_c_form(profile, tmp_path):
    """This machine's KVM need not have APX: the source compiles, and says what it would do."""
    leaves = (*profile.cpuid, CpuidEntry(0xD, 19, 1, 128, 960))
    made = case_of(CpuProfile(leaves), b"\xe6\x10\xf4", requires=frozenset({"apx"}), actions=(
        Run(), SetState((("r17", 5), ("r31", 6)), "xsave-init"), SetState((("r18", 7),), "xsave"),
        Show("xsave"), Show("xsave2"),
    ))  # fmt: skip
    source = emit_c(made, None, "a host")
    assert "xsave_part(19, 968, &(uint64_t){ 0x5 }, 8, 2);" in source
    assert "xsave_part(19, 976, &(uint64_t){ 0x7 }, 8, 1);" in source
    assert 'plain_xsave = 1; seen("halt"); plain_xsave = 0;' in source
    (tmp_path / "a.c").write_text(source)
    command = ["gcc", "-O2", "-Wall", "-Wextra", "-Werror", "-c", "-o", str(tmp_path / "a.o"), str(tmp_path / "a.c")]
    subprocess.run(command, check=True)


def test_an_action_without_a_c_form_is_named(profile):
    class Dance(Action):
        kind = "dance"

    with pytest.raises(EmitError, match="dance"):
        emit_c(case_of(profile, b"\xf4", actions=(Dance(),)), None, HOST)
