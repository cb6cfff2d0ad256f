"""Finds what a kernel complains about in its log: warnings, oopses, sanitizer and lockdep reports, stalls, panics.

The text may be a console's (with or without time stamps, with a program's output in between), records of /dev/kmsg
(Documentation/ABI/testing/dev-kmsg), or bare messages.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final


@dataclass(frozen=True)
class Splat:
    """One complaint.

    ``kind`` is a key of :data:`KINDS`. ``title`` is its decisive line, without what differs from run to run (processor,
    process, offsets). ``text`` is all of its lines, ``seconds`` the kernel's own time of the first, where the log has it.
    """

    kind: str
    title: str
    text: str
    seconds: float | None = None


KINDS: Final = {
    "panic": "the kernel gave up",
    "oops": "the kernel faulted",
    "bug": "BUG, BUG_ON or a check that reports as BUG",
    "warning": "WARN, WARN_ON and their kin",
    "kasan": "KASAN, KFENCE, KMSAN, KCSAN: a wrong memory access",
    "ubsan": "UBSAN: undefined behaviour",
    "lockdep": "lockdep, RCU and locking rules",
    "hung": "a task hangs",
    "lockup": "a processor does not get on: soft or hard lockup, workqueue lockup",
    "stall": "RCU stall",
    "msr": "an MSR access of the kernel that the processor refused",
    "entry": "KVM says that VMRUN or VMLAUNCH, or an instruction of VMX, failed",
}

# What a message must begin with, by kind; the first that matches counts. Sources: kernel/panic.c, lib/bug.c,
# arch/x86/kernel/dumpstack.c, arch/x86/mm/fault.c, arch/x86/kernel/traps.c, mm/kasan/report.c, lib/ubsan.c,
# kernel/locking/lockdep.c, kernel/hung_task.c, kernel/watchdog*.c, kernel/rcu/tree_stall.h, arch/x86/kvm.
_STARTS: Final[tuple[tuple[str, str], ...]] = (
    ("panic", r"Kernel panic - not syncing"),
    ("panic", r"PANIC: early exception|(?:traps: )?PANIC: double fault"),
    ("kasan", r"BUG: (?:KASAN|KFENCE|KMSAN|KCSAN): "),
    ("oops", r"BUG: (?:kernel NULL pointer dereference|unable to handle|stack guard page was hit|TASK stack guard page)"),
    ("oops", r"(?:Oops: )*general protection fault[,:]"),
    ("oops", r"[A-Za-z].{0,120}: [0-9a-f]{4} \[#\d+\]"),  # die(): "Oops: 0002 [#1] SMP", "invalid opcode: 0000 [#1]"
    ("oops", r"BUG: Bad page|Bad pagetable: "),
    ("lockup", r"(?:watchdog: |NMI watchdog: )?BUG: (?:soft|hard) lockup"),
    ("lockup", r"(?:watchdog: |NMI watchdog: )?(?:CPU\d+: )?Watchdog detected hard LOCKUP"),
    ("lockup", r"BUG: workqueue lockup"),
    ("bug", r"kernel BUG at "),
    ("bug", r"BUG: "),
    ("lockdep", r"WARNING: (?:possible (?:recursive locking|circular locking|irq lock inversion)|inconsistent lock state)"),
    ("lockdep", r"WARNING: (?:suspicious RCU usage|bad unlock balance|bad contention|held lock freed|lock held when)"),
    ("lockdep", r"WARNING: (?:[\w-]+-safe -> [\w-]+-unsafe lock order|Nested lock was not taken|no locks held)"),
    ("lockdep", r"WARNING: .* (?:still has locks held|is leaving the kernel with locks)|\[ BUG: Invalid wait context"),
    ("lockdep", r"INFO: trying to register non-static key|\[ BUG: "),
    ("warning", r"WARNING: (?:CPU: \d+ PID: \d+ at|\S+:\d+ at|at|stack recursion|kernel stack)\b"),
    ("ubsan", r"UBSAN: \S+ in "),
    ("hung", r"INFO: task .+ blocked .*for more than \d+ seconds"),
    ("stall", r"(?:rcu: )?INFO: rcu\w* .*\bstalls?\b"),
    ("msr", r"unchecked MSR access error: "),
    ("entry", r"KVM: entry failed, hardware error|\*\*\* Guest State \*\*\*"),
    ("entry", r"(?:kvm(?:_amd|_intel)?|SVM|VMX): .*(?:dump_invalid_vmc[bs]=1|last attempted VM(?:RUN|entry)|unexpected exit)"),
    ("entry", r"(?:kvm(?:_intel)?: )?(?:vmread|vmwrite|vmclear|vmptrld|invept|invvpid) failed"),
)  # fmt: skip
_START: Final = re.compile("|".join(f"(?P<_{i}>{pattern})" for i, (_, pattern) in enumerate(_STARTS)))

_STAMP: Final = re.compile(r"\[ *(\d+\.\d{6})\](?:\[ *[TC]\d+\])? ?")
_KMSG: Final = re.compile(r"(?:\d+,\d+,(\d+),[^;]*;)")
_ESCAPE: Final = re.compile(r"\\x([0-9a-f]{2})")
_CUT: Final = re.compile(r"-+\[ cut here \]-+")
_END: Final = re.compile(r"---\[ end (?:trace|Kernel panic)")
_RULE: Final = re.compile(r"[=-]{20,}$")
_WARNING: Final = re.compile(
    r"WARNING: (?:CPU: \d+ PID: \d+ at )?(?P<place>\S+:\d+)(?: at)? (?P<function>[^+,]+)(?:\+0x[^,]*?)?"
    r"(?: (?P<module>\[\w+\]))?(?:, CPU#.*)?$"
)
_OFFSET: Final = re.compile(r"\+0x[0-9a-f]+/0x[0-9a-f]+")
_LINES_LIMIT: Final = 300  # of one splat
# Splats that others begin with: the fault's own lines follow them in the same report.
_SAME: Final = {
    ("oops", "oops"), ("bug", "oops"), ("bug", "bug"), ("kasan", "kasan"), ("lockdep", "lockdep"), ("panic", "panic"),
    ("ubsan", "ubsan"), ("entry", "entry"), ("stall", "stall"),
}  # fmt: skip


@dataclass
class _Open:
    """A splat whose end has not been seen."""

    kind: str  # "" while only the line that cuts it off was seen
    title: str
    seconds: float | None
    lines: list[str] = field(default_factory=list)

    def splat(self) -> Splat:
        return Splat(self.kind, self.title, "\n".join(self.lines), self.seconds)
