"""Finds what a kernel complains about in its log: warnings, oopses, sanitizer and lockdep reports, stalls, panics.

The text may be a console's (with or without time stamps, with a program's output in between), records of /dev/kmsg
(Documentation/ABI/testing/dev-kmsg), or bare messages.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Final


@dataclass(frozen=True)
class Splat:
    """One complaint.

    ``kind`` is a key of :data:`KINDS`. ``title`` is its decisive line without processor, process and code offsets, so
    that it is the same in another run. ``text`` is all of its lines, ``seconds`` the kernel's own time of the first,
    where the log has it.
    """

    kind: str
    title: str
    text: str
    seconds: float | None = None


KINDS: Final = {
    "panic": "the kernel gave up",
    "oops": "the kernel faulted",
    "bug": "BUG_ON, and the checks that report as BUG",
    "warning": "WARN_ON and its kin",
    "kasan": "KASAN, KFENCE, KMSAN, KCSAN: a wrong memory access",
    "ubsan": "UBSAN: undefined behaviour",
    "lockdep": "the rules of locking and of RCU",
    "hung": "a task hangs",
    "lockup": "a processor does not get on: soft, hard or workqueue lockup",
    "stall": "RCU stall",
    "msr": "an MSR access of the kernel's that the processor refused",
    "entry": "VMRUN, VM entry or another instruction of VMX failed under KVM",
}

# What a message must begin with; the first row that matches counts. From the printk()s of Linux 6.1 to 7.3 in
# kernel/panic.c, lib/bug.c, arch/x86/kernel/{dumpstack,traps}.c, arch/x86/mm/{fault,extable}.c, mm/kasan/report.c,
# lib/ubsan.c, kernel/locking/lockdep.c, kernel/{hung_task,watchdog,workqueue}.c, kernel/rcu/*.h and arch/x86/kvm.
_STARTS: Final = (
    ("panic", r"Kernel panic - not syncing"),
    ("panic", r"(?:traps: )?PANIC: "),
    ("kasan", r"BUG: (?:KASAN|KFENCE|KMSAN|KCSAN): "),
    ("oops", r"BUG: (?:kernel NULL pointer dereference|unable to handle |.*stack guard page was hit)"),
    ("oops", r"(?:Oops: )*general protection fault[,:]"),
    ("oops", r"[A-Z]?[a-z][\w -]{,40}: .{,100}\b[0-9a-f]{4} \[#\d+\]"),  # die(): "Oops: 0002 [#1] SMP"
    ("lockup", r"(?:(?:NMI )?watchdog: |workqueue: )?BUG: (?:soft|hard|workqueue) lockup"),
    ("lockup", r"(?:(?:NMI )?watchdog: )?(?:CPU\d+: )?Watchdog detected hard LOCKUP"),
    ("bug", r"kernel BUG at |(?:workqueue: )?BUG: "),
    ("warning", r"WARNING: (?:CPU: \d+ PID: \d+ at|\S+:\d+ at|at) \S"),
    ("lockdep", r"WARNING: (?:possible (?:recursive|circular|irq)|\S+-safe -> \S+-unsafe) lock"),
    ("lockdep", r"WARNING: (?:inconsistent lock state|Nested lock was not taken|suspicious RCU usage)"),
    ("lockdep", r"WARNING: (?:bad (?:unlock balance|contention)|held lock freed|lock held when|.* has locks held)"),
    ("lockdep", r"WARNING: chain_key collision|INFO: trying to register non-static key|\[ BUG: "),
    ("ubsan", r"UBSAN: \S+ in "),
    ("hung", r"INFO: task .+ blocked.* for more than \d+ seconds"),
    ("stall", r"(?:rcu: )?INFO: rcu\w* .*\bstalls?\b"),
    ("msr", r"unchecked MSR access error: "),
    ("entry", r"KVM: entry failed, hardware error"),  # of the program that runs the guest
    ("entry", r"(?:kvm_amd|kvm_intel|SVM): .*(?:last attempted VM|set kvm_\w+\.dump_invalid_vmc[bs]=1)"),
    ("entry", r"kvm(?:_intel)?: .*(?:vmread|vmwrite|vmclear|vmptrld|invept|invvpid) failed"),
)
_START: Final = re.compile("|".join(f"(?P<_{i}>{pattern})" for i, (_, pattern) in enumerate(_STARTS)))
# One report: the second kind's line belongs to the first.
_SAME: Final = {("bug", "oops"), ("oops", "oops"), ("oops", "bug"), ("panic", "panic"), ("entry", "entry")}

_CONSOLE: Final = re.compile(r"(?:<\d+>)?\[ *(\d+\.\d{6})\](?:\[ *[TC]\d+\])? ?")
_KMSG: Final = re.compile(r"\d+,\d+,(\d+),[^;]*;")
_ESCAPE: Final = re.compile(r"\\x([0-9a-f]{2})")
_CUT: Final = re.compile(r"-+\[ cut here \]-+")
_END: Final = re.compile(r"-+\[ end (?:trace|Kernel panic)")
_RULE: Final = re.compile(r"={20,}$")
_STACK_END: Final = re.compile(r" ?</TASK>")
# Linux 6.12: "WARNING: CPU: 0 PID: 1 at FILE:LINE FUNCTION", 7.3: "WARNING: FILE:LINE at FUNCTION, CPU#0: init/1".
_WARNING: Final = re.compile(r"WARNING: (?:CPU: \d+ PID: \d+ at )?(\S+:\d+)(?: at)? (.*?)(?:, CPU#\d.*)?$")
_OFFSET: Final = re.compile(r"\+0x[0-9a-f]+/0x[0-9a-f]+")
_LINES: Final = 300  # of one splat, at most
_AT_ONCE: Final = 0.001  # seconds between messages of one report
_GAP: Final = 2.0  # seconds of silence after which a report without an end is over


@dataclass
class _Open:
    """A splat whose end has not been seen. ``kind`` is empty while only the line that cuts it off was."""

    kind: str
    title: str
    seconds: float | None
    lines: list[str] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)  # without time stamps

    def splat(self) -> Splat:
        title = self.title
        if self.kind == "warning" and (match := _WARNING.match(title)):
            # What a WARN() says stands between the line that cuts it off and this one.
            said = " ".join(self.messages[1 : self.messages.index(title)]).strip()
            title = f"WARNING at {match[1]} {match[2]}" + (f": {said}" if said else "")
        return Splat(self.kind, _OFFSET.sub("", title).strip(), "\n".join(self.lines), self.seconds)


class SplatScanner:
    """Finds splats in a log that is still being written: feed it what arrives, cut anywhere."""

    def __init__(self) -> None:
        self._rest = ""  # of a line
        self._done: list[Splat] = []
        self._open: _Open | None = None
        self._stamped = False  # kernel messages have time stamps, so what has none is a program's
        self._last = 0.0  # when the last message came
        self._before = ("", "")  # that message, with and without its time stamp

    @property
    def splats(self) -> list[Splat]:
        """What was found so far, the last one perhaps not yet whole."""
        begun = [self._open.splat()] if self._open is not None and self._open.kind else []
        return [*self._done, *begun]

    def feed(self, text: str) -> None:
        """Take in more of the log."""
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            self._line(line.rstrip("\r"))

    def finish(self) -> list[Splat]:
        """The log has ended: all splats."""
        if self._rest:
            self.feed("\n")
        self._close()
        return self._done

    def _line(self, line: str) -> None:
        if match := _KMSG.match(line):
            message = _ESCAPE.sub(lambda m: chr(int(m[1], 16)), line[match.end() :])
            for part in message.split("\n"):
                self._message(part, line, int(match[1]) / 1e6)
        elif match := _CONSOLE.search(line):  # a program may have left its line unfinished
            self._stamped = True
            self._message(line[match.end() :], line[match.start() :], float(match[1]))
        elif not self._stamped:
            self._message(line, line, None)

    def _message(self, message: str, line: str, seconds: float | None) -> None:
        since, self._last = (seconds or 0.0) - self._last, seconds or 0.0
        if self._open is not None and since > _GAP:
            self._close()
        if _CUT.match(message):
            self._begin("", "", seconds)
        elif start := _START.match(message):
            self._started(_STARTS[int(str(start.lastgroup)[1:])][0], message, seconds, since)
        self._before = (line, message)
        if self._open is None:
            return
        self._open.lines.append(line)
        self._open.messages.append(message)
        if self._ends(self._open, message):
            self._close()

    def _started(self, kind: str, message: str, seconds: float | None, since: float) -> None:
        here = self._open
        if here is not None and not here.kind:
            here.kind, here.title = kind, message
        elif here is None or (here.kind, kind) not in _SAME:
            self._begin(kind, message, seconds)
            if kind == "warning" and here is None and seconds and since < _AT_ONCE and self._open is not None:
                # In Linux 7.3 the cut is of too low a level for most consoles; this may be what the WARN() says.
                self._open.lines.append(self._before[0])
                self._open.messages.append(self._before[1])

    def _ends(self, here: _Open, message: str) -> bool:
        if _END.match(message) or len(here.lines) >= _LINES:
            return True
        if here.kind in ("kasan", "ubsan") and _RULE.match(message):
            return True
        # These have no end of their own but the stack's; others have, or more stacks may follow.
        ends = here.kind in ("lockdep", "hung", "bug", "msr") and not here.title.startswith("kernel BUG")
        return ends and _STACK_END.match(message) is not None

    def _begin(self, kind: str, title: str, seconds: float | None) -> None:
        self._close()
        self._open = _Open(kind, title, seconds)

    def _close(self) -> None:
        if self._open is not None:
            here, self._open = self._open, None
            if not here.kind:  # cut off, and then nothing that is known
                here.kind, here.title = "warning", next((m for m in here.messages[1:] if m), here.messages[0])
            self._done.append(here.splat())


def begins(message: str) -> bool:
    """A kernel message, without prefixes, that a splat may begin with."""
    return _CUT.match(message) is not None or _START.match(message) is not None


def find_splats(text: str) -> list[Splat]:
    """Every splat in a kernel log, in its order."""
    scanner = SplatScanner()
    scanner._stamped = _CONSOLE.search(text) is not None
    scanner.feed(text)
    return scanner.finish()
