"""Splats are found in what kernels really print.

``data/console-*.txt`` are consoles of Debian's kernels, registers and long stacks cut out, while a small module did one
thing wrong after the other; the lines of the other tests follow the kernel's printk()s.
"""

import os
import re
from pathlib import Path

import pytest

from harness.lab import agent
from harness.lab.splat import _STARTS, KINDS, SplatScanner, begins, find_splats

DATA = Path(__file__).parent / "data"
OOPS = [
    ("oops", "BUG: kernel NULL pointer dereference, address: 0000000000000008"),
    ("oops", "BUG: unable to handle page fault for address: ffffc8fffff00000"),
    ("oops", "general protection fault, probably for non-canonical address 0xdead000000000122: 0000 [#7]"),
    ("oops", "divide error: 0000 [#9]"),
    ("oops", "invalid opcode: 0000 [#11]"),
]
SIX = [
    ("warning", "WARNING at drivers/trouble/trouble.c:22 warn.isra.0 [trouble]"),
    ("warning", "WARNING at drivers/trouble/trouble.c:23 warnmsg.isra.0 [trouble]: trouble: 42 is not right"),
    ("bug", "BUG: scheduling while atomic: insmod/"),
    ("warning", "WARNING at init/main.c:{line} do_one_initcall: initcall init_trouble [trouble] returned with"),
    ("bug", "kernel BUG at drivers/trouble/trouble.c:29!"),
    *OOPS,
    ("lockup", "watchdog: BUG: soft lockup - CPU#1 stuck for 10s! [spinner:"),
    ("lockup", "watchdog: BUG: soft lockup - CPU#1 stuck for 10s! [spinner:"),
    ("panic", "Kernel panic - not syncing: sysrq triggered crash"),
]
SEVEN = [
    ("warning", "WARNING at trouble.c:22 warn.isra.0 [trouble]"),
    ("warning", "WARNING at trouble.c:23 warnmsg.isra.0 [trouble]"),
    ("bug", "BUG: scheduling while atomic: insmod/"),
    ("warning", "WARNING at init/main.c:1375 do_one_initcall"),
    ("bug", "kernel BUG at trouble.c:29!"),
    *OOPS,
    ("lockup", "watchdog: BUG: soft lockup - CPU#0 stuck for 10s! [spinner:"),
    ("stall", "rcu: INFO: rcu_preempt self-detected stall on CPU"),
    ("lockup", "watchdog: BUG: soft lockup - CPU#0 stuck for 15s! [spinner:"),
    ("stall", "rcu: INFO: rcu_preempt detected stalls on CPUs/tasks:"),
    ("panic", "Kernel panic - not syncing: sysrq triggered crash"),
]


def console(name):
    return (DATA / f"console-{name}.txt").read_text()


def check(splats, expected):
    assert [s.kind for s in splats] == [kind for kind, _ in expected]
    for splat, (_, title) in zip(splats, expected, strict=True):
        assert splat.title.removeprefix("Oops: ").startswith(title), splat.title


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("6.1", [(kind, title.format(line=1322)) for kind, title in SIX]),
        ("6.12", [(kind, title.format(line=1293)) for kind, title in SIX]),
        ("7.3", SEVEN),
    ],
)
def test_a_console_on_which_all_went_wrong(name, expected):
    check(find_splats(console(name)), expected)


@pytest.mark.parametrize("name", ["6.1", "6.12", "7.3"])
def test_hung_tasks_and_a_panic_with_its_stack(name):
    splats = find_splats(console(f"{name}-hung"))
    assert [s.kind for s in splats] == ["hung", "hung", "panic"]
    assert splats[0].title.startswith("INFO: task insmod:")
    assert splats[2].title == "Kernel panic - not syncing: trouble: no way out"
    assert "init_trouble" in splats[2].text


@pytest.mark.parametrize("name", ["6.1", "6.12", "7.3"])
def test_a_healthy_boot_and_harmless_words_are_none(name):
    healthy = console(name).partition("### warn\n")[0]
    assert "WARNING: this is no splat" in healthy
    assert find_splats(healthy) == []


@pytest.mark.parametrize("name", ["6.1", "6.12", "7.3"])
def test_stacks_that_somebody_asked_for_are_none(name):
    asked = console(name).partition("### sysrq\n")[2].partition("Kernel panic")[0]
    assert "NMI backtrace for cpu" in asked
    assert find_splats(asked) == []


def test_text_time_and_extent_of_a_report():
    warning = find_splats(console("6.12"))[1]
    assert warning.seconds == 12.652336
    assert warning.text.startswith("[   12.652336] ------------[ cut here ]------------\n[   12.6")
    assert warning.text.endswith("---[ end trace 0000000000000000 ]---")
    assert "### " not in warning.text


def test_the_words_of_a_warning_are_kept_where_the_cut_is_not_on_the_console():
    assert "trouble: 42 is not right" in find_splats(console("7.3"))[1].text.splitlines()[0]


LOCKDEP = """\
[   12.345678] ============================================
[   12.345700] WARNING: possible recursive locking detected
[   12.345710] 7.3.4 #1 Not tainted
[   12.345720] --------------------------------------------
[   12.345730] qemu/77 is trying to acquire lock:
[   12.345740] ffff888001234567 (&kvm->slots_lock){+.+.}-{4:4}, at: kvm_vm_ioctl+0x12/0x34 [kvm]
[   12.345750]
[   12.345760] but task is already holding lock:
[   12.345770] stack backtrace:
[   12.345780] CPU: 0 UID: 0 PID: 77 Comm: qemu Not tainted 7.3.4 #1
[   12.345790] Call Trace:
[   12.345800]  <TASK>
[   12.345810]  dump_stack_lvl+0x5d/0x80
[   12.345820]  </TASK>
[   12.345830] kvm: something else
"""
KASAN = """\
[    5.000001] ==================================================================
[    5.000002] BUG: KASAN: slab-out-of-bounds in kvm_arch_vcpu_ioctl+0x5b/0xd0 [kvm]
[    5.000003] Write of size 8 at addr ffff888008c3d4a0 by task runner/55
[    5.000004]
[    5.000005] Call Trace:
[    5.000006]  <TASK>
[    5.000007]  </TASK>
[    5.000008] Memory state around the buggy address:
[    5.000009] ==================================================================
[    5.000010] Disabling lock debugging due to kernel taint
"""
UBSAN = """\
[    7.100000] ------------[ cut here ]------------
[    7.100001] UBSAN: array-index-out-of-bounds in arch/x86/kvm/x86.c:99:8
[    7.100002] index 17 is out of range for type 'unsigned long [17]'
[    7.100003] ---[ end trace ]---
"""


@pytest.mark.parametrize(
    ("text", "kind", "title", "lines"),
    [
        (LOCKDEP, "lockdep", "WARNING: possible recursive locking detected", 13),
        (KASAN, "kasan", "BUG: KASAN: slab-out-of-bounds in kvm_arch_vcpu_ioctl [kvm]", 8),
        (UBSAN, "ubsan", "UBSAN: array-index-out-of-bounds in arch/x86/kvm/x86.c:99:8", 4),
    ],
)
def test_reports_of_the_sanitizers_and_of_lockdep(text, kind, title, lines):
    (splat,) = find_splats(text)
    assert (splat.kind, splat.title, len(splat.text.splitlines())) == (kind, title, lines)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("lockdep", "WARNING: possible circular locking dependency detected"),
        ("lockdep", "WARNING: possible irq lock inversion dependency detected"),
        ("lockdep", "WARNING: SOFTIRQ-safe -> SOFTIRQ-unsafe lock order detected"),
        ("lockdep", "WARNING: inconsistent lock state"),
        ("lockdep", "WARNING: bad unlock balance detected!"),
        ("lockdep", "WARNING: suspicious RCU usage"),
        ("lockdep", "WARNING: lock held when returning to user space!"),
        ("lockdep", "WARNING: runner/77 still has locks held!"),
        ("lockdep", "[ BUG: Invalid wait context ]"),
        ("lockdep", "INFO: trying to register non-static key."),
        ("kasan", "BUG: KFENCE: use-after-free read in kvm_put_kvm+0x12/0x34 [kvm]"),
        ("kasan", "BUG: KCSAN: data-race in kvm_vcpu_kick / vcpu_enter_guest"),
        ("bug", "BUG: sleeping function called from invalid context at kernel/locking/mutex.c:585"),
        ("bug", "BUG: spinlock bad magic on CPU#0, runner/77"),
        ("bug", "BUG: Bad page state in process runner  pfn:012ab"),
        ("bug", "BUG: using smp_processor_id() in preemptible [00000000] code: runner/77"),
        ("bug", "workqueue: BUG: workqueue leaked atomic, lock or RCU: kworker/0:1[9]"),
        ("oops", "BUG: unable to handle kernel paging request at ffffc90000000000"),
        ("oops", "BUG: TASK stack guard page was hit at 0000000012345678 (stack is 12345678..12345678)"),
        ("oops", "Oops: Oops: 0010 [#1] SMP KASAN NOPTI"),
        ("lockup", "watchdog: CPU0: Watchdog detected hard LOCKUP on cpu 0"),
        ("lockup", "NMI watchdog: Watchdog detected hard LOCKUP on cpu 1"),
        ("lockup", "BUG: workqueue lockup - pool cpus=0 node=0 flags=0x0 nice=0 stuck for 33s!"),
        ("hung", "INFO: task kvm worker:12 blocked in I/O wait for more than 122 seconds."),
        ("stall", "rcu: INFO: rcu_sched detected expedited stalls on CPUs/tasks: { 0-... } 21 jiffies s: 77"),
        ("stall", "INFO: rcu_tasks detected stalls on tasks:"),
        ("warning", "WARNING: CPU: 1 PID: 77 at arch/x86/kvm/x86.c:99 kvm_arch_vcpu_ioctl_run+0x1/0x2 [kvm]"),
        ("warning", "WARNING: at kvm_read_gpr+0x12/0x34 [kvm], CPU#0: runner/77"),
        ("panic", "Kernel panic - not syncing: Attempted to kill init! exitcode=0x00000b00"),
        ("panic", "traps: PANIC: double fault, error_code: 0x0"),
        ("panic", "PANIC: early exception 0x0d IP 10:ffffffff81234567 error 0 cr2 0xffff888001234567"),
        ("msr", "unchecked MSR access error: WRMSR to 0x1a0 (tried to write 0x01) at rIP: 0x0 (f+0x1/0x2)"),
        ("entry", "kvm_amd: SVM vCPU0 VMCB 0000000012345678, last attempted VMRUN on CPU 0"),
        ("entry", "kvm_intel: set kvm_intel.dump_invalid_vmcs=1 to dump internal KVM state."),
        ("entry", "kvm_intel: vmwrite failed: field=6820 val=2 err=12"),
        ("entry", "KVM: entry failed, hardware error 0x80000021"),
    ],
)
def test_every_kind_in_every_form_of_the_log(kind, message):
    for line in (
        message,
        f"[   12.345678] {message}",
        f"[   12.345678][  T123] {message}\r",
        f"4,1234,12345678,-;{message}",
        f"4,1234,12345678,-,caller=T123;{message}",
    ):
        (splat,) = find_splats(f"{line}\n")
        assert splat.kind == kind
        assert kind in KINDS
        assert splat.seconds == (None if line == message else 12.345678)


@pytest.mark.parametrize(
    "message",
    [
        "Kernel command line: console=ttyS0 panic=-1 note=BUG: note=Kernel panic - not syncing",
        "Command line: WARNING: CPU: 0 PID: 1 at here",
        "Spectre V2 : WARNING: Unprivileged eBPF is enabled with eIBRS on, data leaks possible!",
        "WARNING: 'bootconfig' found on the kernel command line but CONFIG_BOOT_CONFIG is not set.",
        "WARNING: polling idle and HT enabled, performance may degrade",
        "DEBUG: nothing",
        "kvm: a BUG: in the middle",
        "INFO: task runner:77 is blocked on a mutex likely owned by task other:78.",
        "INFO: NMI handler (nmi_cpu_backtrace_handler) took too long to run: 74.091 msecs",
        "INFO: lockdep is turned off.",
        "rcu: \tHierarchical RCU implementation, no stalls",
        "traps: runner[77] general protection fault ip:401000 sp:7ffc0000 error:0 in runner[401000+1000]",
        "runner[77]: segfault at 0 ip 0000000000401000 sp 00007ffc00000000 error 4 in runner[401000+1000]",
        "kvm: KVM_SET_TSS_ADDR need to be called before entering vcpu",
        "kvm_amd: Nested Virtualization enabled",
        "kasan: KernelAddressSanitizer initialized (generic)",
        "hrtimer: interrupt took 12345678 ns",
        "clocksource: timekeeping watchdog on CPU0: Marking clocksource 'tsc' as unstable:",
        "audit: type=1701 msg='BUG: x'",
    ],
)
def test_ordinary_lines_are_none(message):
    for line in (message, f"[   12.345678] {message}", f"6,1234,12345678,-;{message}"):
        assert find_splats(f"{line}\n") == []


def test_where_the_kernel_stamps_its_lines_a_program_cannot_fake_one():
    log = "[    1.000000] Run /init as init process\nWARNING: CPU: 0 PID: 1 at x.c:1 f+0x1/0x2\nBUG: a program's own\n"
    assert find_splats(log) == []


def test_a_program_s_unfinished_line_does_not_hide_one():
    (splat,) = find_splats("runner: case 12 ... [    3.000000] kernel BUG at arch/x86/kvm/x86.c:1!\n")
    assert splat.text == "[    3.000000] kernel BUG at arch/x86/kvm/x86.c:1!"


def test_a_record_of_several_lines():
    (splat,) = find_splats("4,1,5000000,-;first\\x0aWARNING: inconsistent lock state\\x0alast\n")
    assert splat.title == "WARNING: inconsistent lock state"


def test_a_cut_that_nothing_known_follows_is_one_all_the_same():
    (splat,) = find_splats("[    1.000000] ------------[ cut here ]------------\n[    1.000100] a new report\n")
    assert (splat.kind, splat.title) == ("warning", "a new report")


def test_a_report_ends_where_the_log_falls_silent():
    hung = "[    9.000000] INFO: task a:1 blocked for more than 5 seconds.\n[    9.000001]       Tainted: G\n"
    (splat,) = find_splats(hung + "[   14.000000] kvm: hello\n")
    assert "hello" not in splat.text


def test_there_is_a_sample_of_every_row():
    samples = [s for mark in test_every_kind_in_every_form_of_the_log.pytestmark for _, s in mark.args[1]]
    samples += [
        "BUG: kernel NULL pointer dereference, address: 0000000000000008", "kernel BUG at arch/x86/kvm/x86.c:99!",
        "general protection fault, probably for non-canonical address 0xdead000000000122: 0000 [#7]",
        "divide error: 0000 [#1] PREEMPT SMP NOPTI", "UBSAN: shift-out-of-bounds in arch/x86/kvm/x86.c:99:8",
        "WARNING: chain_key collision", "WARNING: suspicious RCU usage", "WARNING: bad contention detected!",
        "watchdog: BUG: soft lockup - CPU#1 stuck for 10s! [runner:77]",
        "kvm_amd: set kvm_amd.dump_invalid_vmcb=1 to dump internal KVM state.",
    ]  # fmt: skip
    for _, pattern in _STARTS:
        assert any(re.match(pattern, sample) for sample in samples), pattern
    for sample in samples:
        assert begins(sample)
        assert find_splats(sample)


@pytest.mark.parametrize(
    "sample",
    [
        "unchecked MSR access error: WRMSR to 0x1a0 (tried to write 0x01) at rIP: 0x0 (f+0x1/0x2)",
        "divide error: 0000 [#1] PREEMPT SMP NOPTI",
        "kvm_amd: set kvm_amd.dump_invalid_vmcb=1 to dump internal KVM state.",
        "kvm: vmread failed: field=6820",
    ],
)
def test_the_runner_inside_passes_on_what_begins_a_splat(tmp_path, monkeypatch, sample):
    """A FIFO has the records of /dev/kmsg, a read each."""
    end, write = os.pipe()
    monkeypatch.setattr(agent.os, "open", lambda *_: end)
    monkeypatch.setattr(agent.os, "lseek", lambda *_: 0)
    os.set_blocking(end, False)
    log = agent.KernelLog()
    os.write(write, b"6,1,1000000,-;kvm: hello\n")
    assert log.news() == ""
    os.write(write, f"4,2,2000000,-;{sample}\n".encode())
    assert find_splats(log.news())
    os.close(write)
    os.close(end)


@pytest.mark.parametrize("size", [1, 7, 64])
def test_fed_in_pieces_the_same_is_found(size):
    text = console("6.12")
    scanner = SplatScanner()
    for at in range(0, len(text), size):
        scanner.feed(text[at : at + size])
    assert scanner.finish() == find_splats(text)


def test_a_splat_shows_as_soon_as_its_decisive_line_is_there():
    scanner = SplatScanner()
    scanner.feed("[    1.000000] ------------[ cut here ]------------\n")
    assert scanner.splats == []
    scanner.feed("[    1.000100] WARNING: CPU: 0 PID: 1 at a.c:1 f+0x1/0x2\n")
    assert [s.title for s in scanner.splats] == ["WARNING at a.c:1 f"]
    scanner.feed("[    1.000200] Modules linked in: kvm\n")
    assert len(scanner.splats[0].text.splitlines()) == 3
