"""A cell's accounts: what the kernel says is told once, of whom it is; what is nobody's is not a Case's."""

import io
import signal
import time
from collections import deque
from pathlib import Path

import pytest

from harness.case import Blob, Case, Memory, Run
from harness.cpuid import CpuidEntry, CpuProfile
from harness.lab.boot import Ending, How
from harness.lab.configurations import configuration
from harness.lab.conversation import Conversation
from harness.lab.errors import LostError
from harness.lab.hardware import Emulator
from harness.lab.image import Image
from harness.lab.jobs import Job
from harness.lab.kernel import Kernel
from harness.lab.plan import read_plan, write_plan
from harness.lab.profile import load_profile
from harness.lab.run import Options, run_cell
from harness.lab.said import Said, of_kvm, slug
from harness.lab.session import Cell, CellRun
from harness.lab.splat import find_splats
from harness.lab.warm import FEATURE
from harness.modes import CODE_BASE, setup
from harness.verdict import Verdict

PROFILE = CpuProfile((CpuidEntry(0, eax=1), CpuidEntry(1), CpuidEntry(0x80000001, edx=1 << 29)))
BOOT = """\
[    0.068000] tsc: Unable to calibrate against PIT
[    1.200000] ------------[ cut here ]------------
[    1.200100] WARNING: CPU: 0 PID: 1 at arch/x86/kvm/x86.c:9700 kvm_x86_vendor_init+0x1/0x2 [kvm]
[    1.200200] Modules linked in: kvm_amd(+) kvm
[    1.200300] ---[ end trace 0000000000000000 ]---
"""
IN_CASE = """\
[   12.000000] ------------[ cut here ]------------
[   12.000100] WARNING: CPU: 0 PID: 77 at arch/x86/kvm/regs.h:12 kvm_read_cr0+0x1/0x2 [kvm]
[   12.000200] ---[ end trace 0000000000000000 ]---
"""
KMSG = """\
------------[ cut here ]------------
WARNING: CPU: 0 PID: 77 at arch/x86/kvm/regs.h:12 kvm_read_cr0+0x1/0x2 [kvm]
---[ end trace 0000000000000000 ]---"""
AT_END = """\
[   70.000000] BUG: KASAN: slab-use-after-free in kvm_destroy_vm+0x5b/0xd0 [kvm]
[   70.000100] Call Trace:
[   70.000200] ==================================================================
kvm-harness-init: payload ended with status 0
[   72.023512] reboot: Power down
"""
PANIC = "[   71.000000] Kernel panic - not syncing: Fatal exception\n"
INIT = "[   71.000000] Kernel panic - not syncing: Attempted to kill init! exitcode=0x00000100\n"


class Ended:
    """A machine that has ended, or is about to be."""

    def __init__(self, how):
        self.ending = Ending(how, 0, 1.0, "") if how is not None else None

    def wait(self, timeout):
        return self.ending

    def kill(self):
        return self.ending

    def inspect(self):
        assert self.ending is None


@pytest.fixture
def results():
    return []


@pytest.fixture
def run(tmp_path, results):
    start = setup("real", entry=CODE_BASE, profile=PROFILE)
    ram = Memory(start.blobs).plus(Blob(CODE_BASE, b"\xf4"))
    cases = [Case(f"a/b@real#{n}", ram, start.state, PROFILE, actions=(Run(8),), bits=16) for n in range(3)]
    write_plan(tmp_path / "plan", "key", cases)
    kernel = Kernel("toy", "7.3.9", "7.3", tmp_path / "bzImage", None, "k" * 32)
    emulator = Emulator("toy", Path("/bin/true"), None, "e" * 32, frozenset({FEATURE}))
    cell = Cell(configuration("svm"), kernel, emulator, Image(tmp_path / "root", "i" * 32))
    plan, profile = read_plan(tmp_path / "plan"), load_profile("svm", "7.3")
    said = []
    made = CellRun(cell, plan, profile, tmp_path, lambda r, _: results.append(r), progress=said.append)
    made.said = said
    return made


@pytest.fixture
def machine(run, tmp_path):
    return Conversation(run, tmp_path, "key", None)


def begin(machine, console="", cases=(0, 1)):
    """The suite begins: the machine has ``console`` behind it and ``cases`` in hand."""
    log = machine.folder / "console.log"
    log.write_text(console)
    machine._booted()
    machine.begun = True
    machine.hand.append(Job(0, deque(cases)))
    return log


def more(log, text):
    log.write_text(log.read_text() + text)


def finish(machine):
    machine.hand.clear()
    machine.ended = True


def told(results):
    return [(r.name, r.verdict) for r in results]


# --- what nobody was told of -----------------------------------------------------------------------------------------


def test_what_a_case_was_told_of_is_not_told_again_and_the_rest_is(tmp_path):
    console = tmp_path / "console.log"
    console.write_text(BOOT)
    said = Said(console)
    assert [s.title for s in said.booted()] == ["WARNING at arch/x86/kvm/x86.c:9700 kvm_x86_vendor_init [kvm]"]
    assert said.untold() == []
    said.told(find_splats(KMSG))
    console.write_text(BOOT + IN_CASE + AT_END)
    assert [s.title for s in said.untold()] == ["BUG: KASAN: slab-use-after-free in kvm_destroy_vm [kvm]"]


def test_a_kept_machines_boot_is_on_another_console(tmp_path):
    kept, console = tmp_path / "kept.log", tmp_path / "console.log"
    kept.write_text(BOOT)
    console.write_text(IN_CASE)
    said = Said(console, kept)
    assert len(said.booted()) == 1
    assert [s.title for s in said.untold()] == ["WARNING at arch/x86/kvm/regs.h:12 kvm_read_cr0 [kvm]"]


def test_the_end_of_our_own_init_is_no_splat(tmp_path):
    (tmp_path / "console.log").write_text(INIT)
    assert Said(tmp_path / "console.log").untold() == []


def test_a_slug_is_the_same_where_lines_have_moved():
    assert slug("WARNING at arch/x86/kvm/x86.c:97 f [kvm]") == slug("WARNING at arch/x86/kvm/x86.c:120 f [kvm]")
    assert slug("WARNING at a.c:1 f") != slug("WARNING at a.c:1 g")


def test_what_concerns_kvm_is_told_from_the_rest():
    assert of_kvm(find_splats(BOOT)[0])
    other = BOOT.replace("arch/x86/kvm/x86.c", "mm/slub.c").replace("kvm_x86_vendor_init", "f").replace(" [kvm]", "")
    assert not of_kvm(find_splats(other)[0])


# --- the kernel as a whole -------------------------------------------------------------------------------------------


def test_a_splat_while_kvm_begins_is_told(machine, results):
    begin(machine, BOOT)
    ((name, verdict),) = told(results)
    assert (name, verdict) == ("kernel/boot-log/WARNING-at-arch-x86-kvm-x86.c-kvm_x86_vendor_init-kvm", Verdict.SPLAT)
    assert results[0].id == ""


def test_a_quiet_boot_and_end_are_no_news(machine, results):
    log = begin(machine, "[    0.068000] tsc: Unable to calibrate against PIT\n")
    finish(machine)
    more(log, "[   72.023512] reboot: Power down\n")
    machine._after(Ended(How.POWERED_OFF))
    assert results == machine.run.said == []


@pytest.mark.parametrize(
    ("text", "how", "name"),
    [
        (AT_END, How.POWERED_OFF, "kernel/log/BUG-KASAN-slab-use-after-free-in-kvm_destroy_vm-kvm"),
        (PANIC, How.PANICKED, "kernel/log/Kernel-panic-not-syncing-Fatal-exception"),
        ("", How.RESET, "kernel/shutdown/the-guest-kernel-reset-itself"),
    ],
)
def test_what_the_kernel_does_after_the_last_case_is_told(machine, results, text, how, name):
    log = begin(machine, BOOT.replace("WARNING", "Notice").replace("cut here", "---"))
    finish(machine)
    more(log, text)
    results.clear()
    machine._after(Ended(how))
    assert told(results) == [(name, Verdict.SPLAT)]
    machine._after(Ended(how))
    assert len(results) == 1, "of several machines, once"


def test_a_panic_between_the_last_case_and_the_end_is_told(machine, results):
    log = begin(machine)
    machine.hand.clear()
    more(log, PANIC)
    machine.lost(Ended(How.PANICKED), LostError("closed"))
    assert told(results) == [("kernel/log/Kernel-panic-not-syncing-Fatal-exception", Verdict.SPLAT)]


def test_silence_after_the_last_case_is_lost(machine, results):
    begin(machine)
    machine.hand.clear()
    with pytest.raises(LostError, match="after the last Case"):
        machine.lost(Ended(None), TimeoutError("nothing for 1 s"))
    assert results == []


def test_a_message_of_the_log_without_a_splat_is_said(machine, results):
    begin(machine)
    machine._spoke("0", "(kernel log overflowed)\nkvm: hello")
    assert results == []
    assert "kernel log overflowed" in machine.run.said[-1]


def test_what_is_said_between_cases_is_no_cases(machine, results):
    begin(machine)
    machine._spoke("-", KMSG)
    machine._spoke("1", KMSG)
    assert [(r.name, bool(r.id)) for r in results] == [
        ("kernel/log/WARNING-at-arch-x86-kvm-regs.h-kvm_read_cr0-kvm", False), ("a/b@real#1", True),
    ]  # fmt: skip


# --- blame -----------------------------------------------------------------------------------------------------------


def die(machine, how, error, text=""):
    """It dies in its first Case, and the job is given to another."""
    log = machine.folder / "console.log"
    more(log, text)
    machine.lost(Ended(how), error)
    return machine.hand[0] if machine.hand else None


def test_a_silence_that_does_not_repeat_is_nobodys(machine, results):
    begin(machine)
    job = die(machine, None, TimeoutError("nothing for 1 s"))
    assert job.careful
    for index in (0, 1):
        machine._settle(machine._finished(index))
    assert results == []


def test_a_silence_that_repeats_is_the_cases(machine, results):
    begin(machine)
    die(machine, None, TimeoutError("nothing for 1 s"))
    die(machine, None, TimeoutError("nothing for 1 s"))
    assert told(results) == [("a/b@real#0", Verdict.SPLAT)]
    assert "fell silent for 90 s" in results[0].summary


def test_a_panic_that_does_not_repeat_is_told(machine, results):
    begin(machine)
    die(machine, How.PANICKED, LostError("closed"), PANIC)
    for index in (0, 1):
        machine._settle(machine._finished(index))
    assert told(results) == [("a/b@real#0", Verdict.SPLAT)]
    assert "not seen again" in results[0].summary


def test_what_an_earlier_case_was_told_of_is_not_what_a_later_one_died_of(machine, results):
    begin(machine)
    more(machine.folder / "console.log", IN_CASE)
    machine._spoke("0", KMSG)
    machine._finished(0)
    results.clear()
    assert not die(machine, How.DIED, LostError("killed")).suspicion


def test_a_guest_kernel_that_resets_itself_is_the_kernels(machine, results):
    begin(machine)
    assert "reset itself" in die(machine, How.RESET, LostError("the guest reset itself")).suspicion
    die(machine, How.RESET, LostError("the guest reset itself"))
    assert told(results) == [("a/b@real#0", Verdict.SPLAT)]
    assert "the guest kernel reset itself" in results[0].summary


def test_an_emulator_that_dies_twice_in_a_case_is_lost(machine, results):
    begin(machine)
    for _ in range(3):
        die(machine, How.DIED, LostError("killed by SIGKILL"))
    assert told(results) == [("a/b@real#0", Verdict.LOST)]


def test_a_case_with_a_splat_counts_once(run, results):
    run.agreed(0, 1, 0, 0.1)
    run.splat(0, "WARNING at x")
    run.kernel("log", "WARNING at y")
    assert (run.tally.done, len(results)) == (1, 3)


# --- the probe -------------------------------------------------------------------------------------------------------


def test_who_died_before_it_answered_is_followed_by_another_that_is_asked(run, machine):
    begin(machine)
    assert run.greeted({})
    machine.asked = True
    run._give_back(machine)
    assert run.greeted({})
    assert not run.greeted({})


@pytest.mark.parametrize(
    ("how", "error", "text"),
    [
        (How.PANICKED, LostError("closed"), PANIC),
        (How.RESET, LostError("the guest reset itself"), ""),
    ],
)
def test_who_dies_of_the_probe_blames_no_case(run, machine, results, how, error, text):
    log = begin(machine)
    machine.asked = machine._probing = True
    more(log, text)
    machine.lost(Ended(how), error)
    ((name, verdict),) = told(results)
    assert name.startswith("kernel/probe/")
    assert verdict is Verdict.SPLAT
    assert not machine.hand[0].careful
    assert run.probe_kills


def test_silence_in_the_probe_has_to_repeat(run, machine, results):
    begin(machine)
    machine.asked = machine._probing = True
    machine.lost(Ended(None), TimeoutError("nothing for 1 s"))
    assert results == []
    machine.lost(Ended(None), TimeoutError("nothing for 1 s"))
    assert told(results)[0][0].startswith("kernel/probe/asked-what-its-KVM-can-do-the-kernel-fell-silent")


# --- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cold", [False, True])
def test_cold_machines_are_not_kept(run, tmp_path, monkeypatch, cold):
    made = []

    class Stops(CellRun):
        def run(self, chosen):
            made.append(self)
            raise LostError("enough is known")

    monkeypatch.setattr("harness.lab.run.CellRun", Stops)
    monkeypatch.setattr("harness.lab.run.cell_plan", lambda *_: run.plan)
    outcome = run_cell(run.cell, tmp_path / "out", Options(cold=cold, profile=run.profile), print, io.StringIO())
    assert outcome.problem == "enough is known"
    assert [m.keeps for m in made] == [not cold]


def test_an_interrupt_waits_for_the_machines(run, monkeypatch):
    """What they have in hand is taken, and their emulators are collected."""
    ended = []

    def serve(number):
        signal.raise_signal(signal.SIGINT)
        time.sleep(0.5)
        ended.append(number)
        run._jobs.clear()
        run._probe_wanted = False

    monkeypatch.setattr(run, "_serve", serve)
    with pytest.raises(KeyboardInterrupt):
        run.run(range(3))
    assert ended == [0]
