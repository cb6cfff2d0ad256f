"""Vm and Vcpu on a real KVM: life cycle, time limit, exits, state in and out."""

import os
import signal
import struct
import threading
import time
from dataclasses import replace

import pytest

from harness import kvm_ioctl as k
from harness.case import (
    Blob,
    Case,
    Complete,
    Kick,
    Memory,
    Other,
    Run,
    SaveRestore,
    SetState,
    Show,
    Slot,
    Step,
    Switch,
    Try,
    VmShape,
)
from harness.exits import (
    Answer,
    Debug,
    FailEntry,
    Halt,
    InternalError,
    Interrupted,
    Io,
    Mmio,
    Shutdown,
    Timeout,
    Unknown,
)
from harness.kvm_exit import read_exit
from harness.kvm_machine import KvmMachine
from harness.lockstep import lockstep
from harness.machine import Recording, record
from harness.reference.machine import ReferenceMachine
from harness.runner import execute
from harness.state import CpuState, pack_sections, unpack_sections
from harness.vcpu import RunTimeoutError, Vcpu
from harness.vm import API_VERSION, Kvm, KvmUnusableError, Vm

START = CpuState(rip=0x1000).with_({"rsp": 0x1800, "rbx": 0x2000})


RUN = (Run(8),)


def real_mode(host, code, *, start=START, actions=RUN):
    memory = Memory((Blob(0x1000, bytes.fromhex(code)),))
    return Case("t", memory, start, host.profile, VmShape((Slot(0, 0x4000),)), actions, bits=16)


@pytest.fixture
def machine(kvm):
    with KvmMachine(kvm, limit=0.4) as made:
        yield made


def run(machine, case):
    return [seen for action in record(machine, case) for seen in action]


def state_of(seen):
    return unpack_sections(seen.sections)


def test_io_write_shows_completed_state(machine, host):
    out, halt = run(machine, real_mode(host, "b05a e610 f4"))
    assert out.exit == Io(0x10, 1, True, b"\x5a")
    assert state_of(out).rip == 0x1004
    assert halt.exit == Halt()
    assert state_of(halt).rip == 0x1005


def test_io_read_gets_what_the_case_answers(machine, host):
    case = real_mode(host, "e510 f4")
    _, halt = run(machine, case)
    assert state_of(halt).gpr[0] == int.from_bytes(case.read_data(0, 2), "little")


def test_mmio_read_and_write(machine, host):
    case = real_mode(host, "b800a0 8ed8 a13412 a33612 f4")  # mov ax,0xa000; mov ds,ax; mov ax,[0x1234]; mov [0x1236],ax
    read, write, _ = run(machine, case)
    assert read.exit == Mmio(0xA1234, 2, False)
    assert write.exit == Mmio(0xA1236, 2, True, case.read_data(0, 2))


def test_memory_difference_is_found_to_the_byte(machine, host):
    case = real_mode(host, "c6075a f4")  # mov byte [bx], 0x5a
    run(machine, case)
    (found,) = machine.memory_diff({}, {})
    assert (found.gpa, found.expected[0], found.got[0]) == (0x2000, 0, 0x5A)
    assert machine.memory_diff({}, {0x2000: 0xFF}) == []
    assert machine.memory_diff(machine.pages(), {}) == []


def test_a_signal_ends_the_run_of_a_guest_that_goes_on_where_it_was(machine, host):
    go_on = (SetState((("rip", 0x1002),)), Run(8))
    first, second, halt = run(machine, real_mode(host, "ebfe 43 f4", actions=(Kick(), Kick(), *go_on)))
    assert (first.exit, second.exit, halt.exit) == (Interrupted(), Interrupted(), Halt())
    assert [state_of(s).rip for s in (first, second, halt)] == [0x1000, 0x1000, 0x1004]
    assert state_of(halt).gpr[3] == 0x2001


def test_a_guest_that_leaves_before_the_kick_is_shown_as_it_is(machine, host):
    assert run(machine, real_mode(host, "f4", actions=(Kick(),)))[0].exit == Halt()


def test_two_vcpus_run_in_turn_in_one_ram_and_agree_with_the_model(machine, host):
    # mov [bx], cl; out 0x10, al; mov al, [bx]; hlt -- and the same code on the other one
    case = real_mode(host, "880f e610 8a07 f4", start=START.with_({"rcx": 0x11}), actions=(
        Run(), Switch(1), Run(), Switch(0), Show(), Run(8), Switch(1), Run(8),
    ))  # fmt: skip
    case = replace(case, others=(Other(START.with_({"rcx": 0x22, "rip": 0x1000})),))
    outcome = lockstep(case, ReferenceMachine(), machine)
    assert outcome.difference is None
    assert outcome.checks == 5
    seen = run(machine, case)
    assert [state_of(s).gpr[0] & 0xFF for s in seen[-2:]] == [0x22, 0x22]
    assert lockstep(real_mode(host, "f4"), ReferenceMachine(), machine).difference is None, "the next Case has a VM"


def test_what_kvm_refuses_is_an_answer(machine, host):
    answers = run(machine, real_mode(host, "f4", actions=(Try((("xcr0", 2),)), Try((("xcr0", 1),)), Run())))
    assert [s.exit for s in answers] == [Answer("xcr0=0x2", False), Answer("xcr0=0x1", True), Halt()]


def test_guest_that_never_exits_ends_at_its_limit_and_the_next_case_runs(machine, host):
    began = time.monotonic()
    (seen,) = run(machine, real_mode(host, "ebfe"))
    assert seen.exit == Timeout(0.4)
    assert time.monotonic() - began < 5
    assert run(machine, real_mode(host, "f4"))[-1].exit == Halt()


def test_time_limit_works_off_the_main_thread(kvm, host):
    result = []

    def work():
        with Vm(kvm, VmShape((Slot(0, 0x4000),))) as vm, Vcpu(vm, host.profile) as vcpu:
            vm.load(Memory((Blob(0x1000, b"\xeb\xfe"),)))
            for name, data in pack_sections(START, ("sregs", "regs")).items():
                vcpu.put(name, data)
            with pytest.raises(RunTimeoutError):
                vcpu.run(0.3)
            result.append(True)

    with KvmMachine(kvm):  # the watchdog's signal handler is installed by the main thread
        thread = threading.Thread(target=work)
        thread.start()
        thread.join(10)
    assert result


def test_triple_fault_is_a_shutdown_and_shows_no_registers(machine, host):
    start = START.with_({"idtr.limit": 0, "cr0": 0x11, "cs.db": 1})  # protected mode with no IDT: #UD escalates
    (seen,) = run(machine, real_mode(host, "0f0b", start=start))
    assert seen.exit == Shutdown()
    assert not seen.sections
    assert run(machine, real_mode(host, "f4"))[-1].exit == Halt()


def test_exit_reasons_without_a_guest_to_make_them(machine, host):
    """FAIL_ENTRY and unknown reasons: their decoding only, on a kvm_run that KVM did not fill so."""
    machine.load(real_mode(host, "f4"))
    page = machine.vcpu.run_page
    page.fail_entry.hardware_entry_failure_reason = 0x80000021
    assert read_exit(machine.vcpu, k.KVM_EXIT_FAIL_ENTRY) == FailEntry(0x80000021)
    assert read_exit(machine.vcpu, 9999) == Unknown(9999)
    page.emulation_failure.suberror, page.emulation_failure.ndata = 1, 4
    page.emulation_failure.flags, page.emulation_failure.insn_size = 1, 2
    page.emulation_failure.insn_bytes[0], page.emulation_failure.insn_bytes[1] = 0x0F, 0x77
    assert read_exit(machine.vcpu, k.KVM_EXIT_INTERNAL_ERROR) == InternalError(1, b"\x0f\x77")


def test_single_step(machine, host):
    if not host.single_step["real"]:
        pytest.skip("no single step in real mode on this host")
    first, second = run(machine, real_mode(host, "90 40 f4", actions=(Step(2),)))
    assert isinstance(first.exit, Debug)
    assert (first.exit.pc, second.exit.pc) == (0x1001, 0x1002)
    assert state_of(second).gpr[0] == 1


def test_set_state_between_runs(machine, host):
    actions = (Run(), SetState((("rcx", 0x77),)), SetState((("cs.base", 0x10),), "sregs"), Run())
    seen = run(machine, real_mode(host, "e610 90 90 90 f4" + "90" * 16 + "f4", actions=actions))
    assert state_of(seen[-1]).gpr[1] == 0x77
    assert state_of(seen[-1]).cs.base == 0x10


def test_set_state_through_sync_regs(machine, host):
    seen = run(machine, real_mode(host, "e610 f4", actions=(Run(), SetState((("r15", 5),), "sync"), Run())))
    assert state_of(seen[-1]).gpr[15] == 5


def test_save_and_restore_into_a_fresh_vm_goes_on(machine, host):
    seen = run(machine, real_mode(host, "c6075a e610 40 f4", actions=(Run(), SaveRestore(), Run())))
    assert seen[-1].exit == Halt()
    assert state_of(seen[-1]).gpr[0] == 1
    assert machine.memory_diff({}, {})[0].gpa == 0x2000


def test_looking_at_a_pending_operation_needs_an_action_of_its_own(machine, host):
    pending, done, halt = run(machine, real_mode(host, "b05a e610 f4", actions=(Run(1, False), Complete(), Run())))
    assert pending.sections == {}
    assert state_of(done).rip == 0x1004
    assert halt.exit == Halt()


def test_state_of_one_case_does_not_leak_into_the_next(machine, host):
    dirty = START.with_({"dr0": 0x1234, "cr2": 0x99, "r8": 1, "msr.star": 0x55, "fs.base": 0x70, "rflags": 0xCD7})
    clean = START.with_({"msr.star": 0})
    want = run(machine, real_mode(host, "f4", start=clean))[-1].sections
    run(machine, real_mode(host, "f4", start=dirty))
    assert run(machine, real_mode(host, "f4", start=clean))[-1].sections == want


def test_a_case_that_differs_leaves_nothing_of_its_vm_to_the_next(machine, host):
    right, wrong = real_mode(host, "fec0 f4"), real_mode(host, "fec8 f4")  # inc al, dec al: same VM shape and profile
    expected = [list(seen) for seen in record(machine, right)]
    vcpu = machine.vcpu
    assert execute(right, Recording(expected), machine).clean
    assert machine.vcpu is vcpu
    assert not execute(wrong, Recording(expected), machine).clean
    assert execute(right, Recording(expected), machine).clean
    assert machine.vcpu is not vcpu


@pytest.mark.parametrize("sync", [True, False])
@pytest.mark.parametrize("changes", [
    {"dr0": 0x1234}, {"cr2": 0x99}, {"fs.base": 0x70}, {"idtr.limit": 0x2FF}, {"xcr0": 3}, {"msr.star": 0x55},
    {"cr8": 3}, {"rflags": 0xCD7}, {"r8": 1}, {"events.nmi_masked": 1},
])  # fmt: skip
def test_nothing_that_is_kept_between_cases_outlives_its_register(kvm, host, sync, changes):
    """Each register of a Case is that of the Case, whatever those before it had, and in whichever order they came."""
    if "xcr0" in changes and not {"xsave", "sse"} <= host.profile.features:
        pytest.skip("no XSAVE in the guest CPUID")
    clean = START.with_({"msr.star": 0})
    cases = [real_mode(host, "f4", start=start) for start in (clean, clean.with_(changes))]
    with KvmMachine(kvm, sync=sync) as fresh:
        want = [run(fresh, case)[-1].sections for case in cases]
    assert want[0] != want[1]
    with KvmMachine(kvm, sync=sync) as machine:
        for n in (0, 1, 1, 0, 0, 1):
            assert lockstep(cases[n], ReferenceMachine(), machine).difference is None
            assert machine.sections() == want[n]


def test_memory_that_the_last_case_left_is_not_the_next_ones(machine, host):
    """The last Case's RAM was seen to differ from its image, or not looked at: either way it is laid out anew."""
    writes, reads = real_mode(host, "c6075a f4"), real_mode(host, "8a07 f4")  # mov byte [bx], 0x5a; mov al, [bx]
    reads = replace(reads, memory=replace(reads.memory, blobs=(*reads.memory.blobs, Blob(0x3000, b"x"))))
    again = replace(writes, name="again")
    for case in (writes, reads, writes, again, reads, reads):
        assert lockstep(case, ReferenceMachine(), machine).difference is None, case.name
    run(machine, writes)
    assert state_of(run(machine, real_mode(host, "8a07 f4"))[-1]).gpr[0] == 0


def test_msrs_arrive_in_their_order_and_the_refused_one_is_named(vcpu):
    wanted = (0xC0000081, 0x174, 0xC0000083)  # STAR, SYSENTER_CS, CSTAR
    pairs = b"".join(struct.pack("<QQ", index, 0x10 + n) for n, index in enumerate(wanted))
    vcpu.put_msrs(pairs)
    assert vcpu.get_msrs(wanted) == pairs
    assert vcpu.get_msrs(()) == b""
    with pytest.raises(LookupError, match="KVM_GET_MSRS refused MSR 0x4fffffff"):
        vcpu.get_msrs((0x174, 0x4FFFFFFF))
    with pytest.raises(LookupError, match="KVM_SET_MSRS refused MSR 0x4fffffff = 0x7"):
        vcpu.put_msrs(pairs + struct.pack("<QQ", 0x4FFFFFFF, 7))


@pytest.mark.parametrize("enter", [k.enter_by_fcntl, k.enter_by_libc])
def test_both_ways_into_kvm_run_say_the_same(monkeypatch, machine, host, enter):
    """Which of them is used depends on Python's version."""
    monkeypatch.setattr("harness.vcpu.enter", enter)
    io, halt = run(machine, real_mode(host, "e610 f4"))
    assert (io.exit.kind, halt.exit) == ("io", Halt())
    assert run(machine, real_mode(host, "ebfe"))[0].exit == Timeout(0.4)
    assert run(machine, real_mode(host, "f4"))[-1].exit == Halt()
    machine.vcpu.run_page.immediate_exit = 1
    with pytest.raises(InterruptedError):
        enter(machine.vcpu.fd)
    machine.vcpu.run_page.immediate_exit = 0
    with pytest.raises(k.KvmError, match="KVM_RUN: EINVAL"):
        enter(machine.kvm.fd)


def test_sync_regs_and_ioctls_show_the_same(kvm, host):
    case = real_mode(host, "b83412 e610 f4")
    with KvmMachine(kvm, sync=True) as fast, KvmMachine(kvm, sync=False) as slow:
        assert lockstep(case, Recording([run(slow, case)]), fast).difference is None


def test_every_start_register_arrives(machine, host):
    """What SET put there GET shows: a value in one register shows in that register alone."""
    for name in ("rax", "rsp", "rdi", "r8", "r15", "cr2", "fs.base", "gs.limit", "dr3", "gdtr.base", "ldtr.selector"):
        start = START.with_({name: START.flat()[name] ^ 0x40})
        (seen,) = run(machine, real_mode(host, "f4", start=start))
        flat = unpack_sections(seen.sections).flat()
        assert flat[name] == start.flat()[name], name


# --- devices that are none ---


def test_missing_device(tmp_path):
    with pytest.raises(KvmUnusableError, match="no such device"):
        Kvm(tmp_path / "kvm")


def test_device_that_is_not_kvm():
    with pytest.raises(KvmUnusableError, match="/dev/null: not a KVM device"):
        Kvm("/dev/null")


def test_other_api_version(monkeypatch, kvm):
    monkeypatch.setattr("harness.vm.API_VERSION", API_VERSION + 1)
    with pytest.raises(KvmUnusableError, match="KVM API version 12"):
        Kvm(kvm.device)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become somebody else")
def test_no_permission(tmp_path):
    path = tmp_path / "kvm"
    path.touch(mode=0)
    pid = os.fork()
    if pid == 0:
        os.seteuid(65534)
        os._exit(_permission_child(path))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def _permission_child(path):
    try:
        Kvm(path)
    except KvmUnusableError as error:
        return 0 if "permission denied (add yourself to group kvm" in str(error) else 2
    return 1


def test_sigint_ends_a_run_inside_kvm(machine, host):
    machine.limit = 20
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run(machine, real_mode(host, "ebfe"))
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("irqchip", ["split", "full"])
def test_guest_runs_with_an_interrupt_controller_in_the_kernel(kvm, host, irqchip):
    """The port I/O exit is the same; HLT then waits in the kernel for an interrupt, until the time limit."""
    shape = VmShape((Slot(0, 0x4000),), irqchip)
    memory = Memory((Blob(0x1000, bytes.fromhex("e610 f4")),))
    case = Case("t", memory, START, host.profile, shape, (Run(2),), bits=16)
    with KvmMachine(kvm, limit=0.3) as machine:
        assert [seen.exit for seen in run(machine, case)] == [Io(0x10, 1, True, b"\0"), Timeout(0.3)]


def test_signals_do_not_keep_vms_from_being_made(kvm):
    """As a profiler's: KVM_CREATE_VM gives up with EINTR wherever one of them is pending."""
    before = signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, 2e-4, 2e-4)
    try:
        for _ in range(40):  # without a second try, some eight of them fail
            Vm(kvm, VmShape((Slot(0, 0x4000),))).close()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# --- what one Case leaves is not the next one's ---


def seen_in(machine, case):
    """What a Case shows, as what is to be expected of it again."""
    return [list(seen) for seen in record(machine, case)]


def test_undefined_bits_that_a_case_left_in_memory_are_not_the_next_ones(machine, host):
    """To the byte, RAM is then not what was expected: it is laid out anew."""
    writes = real_mode(host, "c6075a f4")  # mov byte [bx], 0x5a
    halts = replace(writes, start=START.with_({"rip": 0x1003}))
    ((right,),) = seen_in(machine, writes)
    expected = Recording([[replace(right, pages_ignore={0x2000: 0xFF})]])
    for _ in range(2):
        outcome = lockstep(writes, expected, machine)
        assert (outcome.difference, outcome.allowed != 0) == (None, True)
        assert lockstep(halts, ReferenceMachine(), machine).difference is None


def test_a_case_whose_expectation_fails_leaves_nothing_of_its_vm_to_the_next(machine, host):
    """What failed stands in a traceback that somebody may keep, and with it what the machine was about to do."""

    class Failing(Recording):
        def apply(self, action):
            yield from super().apply(action)
            raise ValueError("no more is known")

    case = real_mode(host, "40 40 f4", actions=(Step(2),))
    first = seen_in(machine, case)[0][:1]
    vcpu = machine.vcpu
    with pytest.raises(ValueError, match="no more is known") as kept:
        execute(case, Failing([first]), machine)
    assert run(machine, real_mode(host, "40 f4"))[0].exit == Halt()
    assert machine.vcpu is not vcpu
    del kept


@pytest.mark.parametrize("action", [Run(8), Kick()])
def test_a_watchdog_that_comes_too_late_ends_no_other_run(machine, host, action):
    machine.load(real_mode(host, "f4"))
    machine.vcpu.expire()  # as if the run before had ended in this very moment
    assert [seen.exit for seen in machine.apply(action)] == [Halt()]


def test_a_watchdog_that_comes_too_late_ends_no_completion(machine, host):
    machine.load(real_mode(host, "e610 f4"))
    list(machine.apply(Run(1, complete=False)))
    machine.vcpu.expire()
    assert [seen.exit for seen in machine.apply(Complete())] == [Halt()]
    assert [seen.exit for seen in machine.apply(Run())] == [Halt()]


TWO_SLOTS = VmShape((Slot(0, 0x4000), Slot(0x10000, 0x2000)))


@pytest.mark.parametrize("gpa", [0, 0x1FFF, 0x2001, 0x3FFF, 0x10000, 0x11FFF])
@pytest.mark.parametrize("before", ["c6075a f4", "f4"])
def test_a_byte_that_changes_behind_the_back_of_a_case_is_seen(machine, host, gpa, before):
    """Whatever is known of RAM from the Case before, which wrote a page (mov byte [bx], 0x5a) or none."""
    case = replace(real_mode(host, before), shape=TWO_SLOTS)
    ((right,),) = seen_in(machine, case)
    steps = [[replace(right, pages=machine.pages())]]
    slot = next(s for s in TWO_SLOTS.slots if s.gpa <= gpa < s.gpa + s.size)

    class Changed(Recording):
        """Lockstep asks it first: RAM is laid out, KVM has not run yet."""

        def apply(self, action):
            machine._warm.vm.ram[slot][gpa - slot.gpa] ^= 0xFF
            return super().apply(action)

    for _ in range(2):
        assert execute(case, Recording(steps), machine).clean
        assert execute(case, Recording(steps), machine).clean
        found = execute(case, Changed(steps), machine)
        assert found.difference is not None
        assert found.difference.where == ("memory",)
        assert found.difference.memory[0].gpa == gpa


@pytest.mark.parametrize("sync", [True, False])
@pytest.mark.parametrize("changes", [
    {"cr2": 0x77}, {"fs.base": 0x1230}, {"gs.selector": 0x10}, {"idtr.limit": 0x2FF}, {"dr1": 0x99},
    {"events.nmi_masked": 1}, {"xcr0": 3}, {"msr.star": 0x55},
])  # fmt: skip
def test_a_register_that_changes_behind_the_back_of_a_case_is_seen(kvm, host, sync, changes):
    """What the last Case showed is believed, and not written again; but never compared with."""
    if "xcr0" in changes and not {"xsave", "sse"} <= host.profile.features:
        pytest.skip("no XSAVE in the guest CPUID")
    case = real_mode(host, "f4", start=START.with_({"msr.star": 0}))
    with KvmMachine(kvm, sync=sync) as machine:
        for _ in range(2):
            assert execute(case, ReferenceMachine(), machine).clean
            vcpu, epoch = machine.vcpu, machine.vcpu.epoch
            state = machine.state().with_(changes)
            (name,) = (n for n, data in machine.sections().items() if pack_sections(state, (n,))[n] != data)
            vcpu.put(name, pack_sections(state, (name,))[name])
            vcpu.epoch = epoch
            found = execute(case, ReferenceMachine(), machine)
            assert found.difference is not None
            assert found.difference.where == tuple(changes)


@pytest.mark.parametrize("later", [0, 1])
def test_a_vm_whose_guest_may_have_nested_state_serves_no_other_case(machine, host, later):
    """As it was last seen, even if something may have changed it since: a single step ends with an ioctl."""
    case = real_mode(host, "f4")
    run(machine, case)
    warm = machine._warm
    assert warm.serves(case.shape, case.profile)
    warm.remember({**machine.sections(), **pack_sections(START.with_({"efer": 1 << 12}), ("sregs2",))})
    warm.vcpu.epoch += later
    assert not warm.serves(case.shape, case.profile)
    run(machine, case)
    assert machine._warm is not warm
