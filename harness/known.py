"""Known divergences: data that says where a KVM differs from the architecture, with the exact wrong value.

A row excuses nothing but what it names: the Cases, the register, the kind of wrong value and the hosts.  When such a
Case agrees again it is *healed*.
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Final

from harness.case import PAGE, Case, Observation
from harness.exits import Debug, Halt, Hypercall, Mmio, Shutdown, Timeout
from harness.kernels import KernelRange, series_of
from harness.lockstep import Difference, compare_registers
from harness.memory_diff import MemoryDiff
from harness.modes import STUBS
from harness.state import FieldDiff, diff, pack_sections, stack_top, unpack_sections

FILE: Final = Path(__file__).resolve().parent.parent / "known_divergences.toml"
_KEYS: Final = {"name", "cases", "module", "register", "wrong", "why", "reproducer", "reference"}
_OPTIONAL: Final = {"kernels", "sometimes"}
_WRONG: Final = (
    "zero-extended-32", "upper-not-written", "half-written", "no-exception", "timeout", "late-step", "lost-step",
    "whole-rep", "runs-on", "no-shutdown", "past-int", "no-hypercall",
)
_HLT: Final = 0xF4
_INT: Final = 0xCD
_UD: Final = 6
_HEX: Final = re.compile(r"0x[0-9a-fA-F]+")
_MOVBE_LOAD: Final = re.compile(rb"(\x66?)([\x40-\x4f]?)\x0f\x38\xf0")


class KnownError(ValueError):
    """known_divergences.toml is not usable."""


@dataclass(frozen=True)
class KnownDivergence:
    """One row. ``cases`` are patterns of Case names, ``module`` of the host's vendor module, ``register`` of names.

    ``wrong`` is the exact wrong value: a number, or

    - ``zero-extended-32``: the expected value with its upper 32 bits cleared
    - ``clear N``, ``set N``: the expected value with the bits of N cleared or set
    - ``saved clear N``: a saved word lacks the bits of N
    - ``upper-not-written``: an item of the stack still holds its initial bytes above the lower two
    - ``half-written``: a store that faulted left bytes at the end of its first page
    - ``no-exception``: the guest goes on where an exception must be
    - ``exception N``: it ends in the handler of vector N, where it must not or from another instruction; beside
      registers of the row, the frame on the stack and what was never written may differ
    - ``past-int``: an exception frame holds the address after an INT n where it must hold that of the INT n
    - ``runs-on``: the guest goes on past the HLT that ends it, to the next one
    - ``timeout``: it does not leave KVM_RUN
    - ``no-shutdown``: it hangs, ends in an internal error or reaches a handler where a triple fault must shut it down
    - ``no-hypercall``: a hypercall that must leave for userspace does not, but returns 0
    - ``mmio-items N``: an access to MMIO lies N of its sizes away from the right one
    - ``read-before-ud 0xN``: a MOVBE reads MMIO at address N before #UD is queued; no register changes
    - ``late-step``: the debug exit of a single step comes after one more instruction, an HLT
    - ``lost-step``: it does not come, for that HLT ends the guest
    - ``whole-rep``: that of one iteration of a REP MOVSB comes after all of them

    ``kernels`` are those that have it, as in ``6.1..6.2`` or ``7.2..``. ``sometimes``: it shows at some runs only, and
    one that agrees says nothing of it.
    """

    name: str
    cases: tuple[str, ...]
    module: tuple[str, ...]
    register: tuple[str, ...]
    wrong: str | int
    why: str
    reproducer: str
    reference: str
    kernels: KernelRange | None = None
    sometimes: bool = False

    def on(self, release: str) -> bool:
        """This row holds on a kernel of that release (``uname -r``)."""
        return self.kernels is None or series_of(release) in self.kernels

    def covers(self, case_name: str, module: str) -> bool:
        """This row speaks of this Case on this host."""
        return self.is_for(module) and any(fnmatchcase(case_name, p) for p in self.cases)

    def is_for(self, module: str) -> bool:
        """This row speaks of hosts with this vendor module."""
        return any(fnmatchcase(module, p) for p in self.module)

    def explains(self, case: Case, difference: Difference) -> bool:
        """Everything that differs is what this row names, with exactly the wrong value."""
        if self.wrong == "timeout":
            return difference.got is not None and isinstance(difference.got.exit, Timeout)
        if self.wrong in ("late-step", "lost-step"):
            return (_late_step if self.wrong == "late-step" else _lost_step)(case, difference)
        if self.wrong == "no-shutdown":
            want, got = difference.expected, difference.got
            if want is None or got is None or not isinstance(want.exit, Shutdown):
                return False
            return not got.exit.comparable or _stub(got) is not None
        if self.wrong == "no-hypercall":
            return _no_hypercall(difference)
        if isinstance(self.wrong, str) and self.wrong.startswith("mmio-items "):
            return _mmio_items(case, difference) == int(self.wrong.split()[1])
        if isinstance(self.wrong, str) and self.wrong.startswith("read-before-ud "):
            return _read_before_ud(case, difference) == int(self.wrong.split()[1], 0)
        if difference.exits_differ:
            return False
        if self.wrong == "whole-rep":
            return _whole_rep(case, difference)
        if self.wrong == "past-int":
            return not difference.registers and len(difference.memory) == 1 and _past_int(case, difference.memory[0])
        if isinstance(self.wrong, str) and self.wrong.startswith("saved clear "):
            bits = int(self.wrong.split()[2], 0)
            return not difference.registers and len(difference.memory) == 1 and _cleared(difference.memory[0], bits)
        if self.wrong == "upper-not-written":
            return not difference.registers and all(_upper_not_written(case, d) for d in difference.memory)
        if self.wrong == "half-written":
            return not difference.registers and all(_page_end(d) for d in difference.memory)
        if self.wrong == "runs-on":
            registers = [(d.name, d.got - d.expected) for d in difference.registers]
            return not difference.memory and _stub(difference.expected) is None and registers == [("rip", 1)]
        if self._about_exceptions:
            return self._exception(case, difference)
        if not difference.registers or not all(_saved_flags(difference, d) for d in difference.memory):
            return False
        return all(self._names(d) and d.got == self._value(d) for d in difference.registers)

    @property
    def _about_exceptions(self) -> bool:
        return isinstance(self.wrong, str) and self.wrong.startswith(("exception ", "no-exception"))

    def _exception(self, case: Case, difference: Difference) -> bool:
        """Only registers that the row names differ, and a frame on the stack; the handler is the wrong one."""
        if not all(self._names(d) for d in difference.registers):
            return False
        if not all(_in_frame(difference, d) or d.got == _initial(case, d) for d in difference.memory):
            return False  # what comes after a wrong exception never wrote
        if self.wrong == "no-exception":
            return _stub(difference.expected) is not None and _stub(difference.got) is None
        return _stub(difference.got) == int(str(self.wrong).split()[1])

    def _names(self, found: FieldDiff) -> bool:
        return any(fnmatchcase(found.name, pattern) for pattern in self.register)

    def _value(self, found: FieldDiff) -> int:
        if isinstance(self.wrong, int):
            return self.wrong
        if self.wrong == "zero-extended-32":
            return found.expected & 0xFFFFFFFF
        verb, _, number = self.wrong.partition(" ")
        bits = int(number, 0)
        return found.expected & ~bits if verb == "clear" else found.expected | bits


def _saved_flags(difference: Difference, found: MemoryDiff) -> bool:
    """Memory differs in the very bits in which RFLAGS does: its image in the frame of the exception that followed.

    Undefined bits are left aside, in both.
    """
    assert difference.expected is not None
    undefined = difference.expected.pages_ignore
    flags = next(
        (d.xor & ~difference.expected.ignore.get("rflags", 0) for d in difference.registers if d.name == "rflags"), 0
    )
    pairs = enumerate(zip(found.expected, found.got, strict=True))
    memory = sum(((a ^ b) & ~undefined.get(found.gpa + n, 0)) << 8 * n for n, (a, b) in pairs)
    while flags and not flags & 0xFF:  # a MemoryDiff starts at the first byte that differs
        flags >>= 8
    return bool(flags) and memory == flags


def _cleared(found: MemoryDiff, bits: int) -> bool:
    """All that differs is that these bits are set where they must be, and clear where KVM has written them."""
    want, got = (int.from_bytes(data, "little") for data in (found.expected, found.got))
    while not bits & 0xFF:  # a MemoryDiff starts at the first byte that differs
        bits >>= 8
    return want ^ got == bits == want & bits


def _late_step(case: Case, difference: Difference) -> bool:
    """Past the HLT that follows, and nothing else is other than it should be."""
    want, got = difference.expected, difference.got
    if want is None or got is None or not isinstance(want.exit, Debug) or not isinstance(got.exit, Debug):
        return False
    pc = want.exit.pc
    if replace(want.exit, pc=pc + 1) != got.exit or _byte(case, pc) != _HLT:
        return False
    return _one_further(want, got)


def _lost_step(case: Case, difference: Difference) -> bool:
    """The HLT that follows ended the guest, and nothing else is other than it should be."""
    want, got = difference.expected, difference.got
    if want is None or got is None or not isinstance(want.exit, Debug) or not isinstance(got.exit, Halt):
        return False
    return _byte(case, want.exit.pc) == _HLT and _one_further(want, got)


def _one_further(want: Observation, got: Observation) -> bool:
    registers = compare_registers(want, got)
    return [(d.name, d.got - d.expected) for d in registers] == [("rip", 1)]


def _byte(case: Case, gpa: int) -> int:
    """Initial RAM (code is identity-mapped: harness/modes.py); -1 outside of it."""
    slot = next((s for s in case.shape.slots if s.gpa <= gpa < s.gpa + s.size), None)
    return -1 if slot is None else case.memory.image(slot)[gpa - slot.gpa]


def _whole_rep(case: Case, difference: Difference) -> bool:
    """The counter is down to zero, the pointers are where it says, and only bytes in between were written."""
    assert difference.expected is not None
    state = unpack_sections(difference.expected.sections)
    mask = (1 << case.bits) - 1
    left = state.gpr[_RCX] & mask
    first = state.es.base + (state.gpr[_RDI] & mask)
    after = {"rcx": state.gpr[_RCX] - left, "rsi": state.gpr[_RSI] + left, "rdi": state.gpr[_RDI] + left}
    differing = (m.gpa + i for m in difference.memory for i, b in enumerate(m.expected) if b != m.got[i])
    return (
        left > 0
        and {d.name: d.got for d in difference.registers} == after
        and all(first <= gpa < first + left for gpa in differing)
    )


_RCX, _RSP, _RSI, _RDI = 1, 4, 6, 7


def _past_int(case: Case, found: MemoryDiff) -> bool:
    """Bytes 1:0 of a saved RIP (no guest crosses 64 KiB) are 2 more than they must be, and there stands an INT n."""
    want, got = (int.from_bytes(data[:2], "little") for data in (found.expected, found.got))
    return got == want + 2 and found.expected[2:] == found.got[2:] and _byte(case, case.start.cs.base + want) == _INT


def _page_end(found: MemoryDiff) -> bool:
    """Only the last 8 bytes of a page differ (the widest store has 8)."""
    differing = [found.gpa + i for i, (a, b) in enumerate(zip(found.expected, found.got, strict=True)) if a != b]
    return all(gpa % PAGE >= PAGE - 8 for gpa in differing)


def _no_hypercall(difference: Difference) -> bool:
    """The guest has gone on to its end with RAX = 0 in place of a hypercall exit."""
    want, got = difference.expected, difference.got
    if want is None or got is None or not isinstance(want.exit, Hypercall) or not isinstance(got.exit, Halt):
        return False
    differ = {d.name: d for d in compare_registers(want, got)}
    rip = differ.pop("rip", None)
    differ.pop("rax", None)
    return not differ and unpack_sections(got.sections).gpr[0] == 0 and rip is not None and rip.got == rip.expected + 1


def _mmio_items(case: Case, difference: Difference) -> int | None:
    """How many of its sizes an access to MMIO lies away from the right one, of the same size and direction.

    What is written must be the last item of PUSHA, DI.
    """
    want = difference.expected.exit if difference.expected is not None else None
    got = difference.got.exit if difference.got is not None else None
    if not isinstance(want, Mmio) or not isinstance(got, Mmio) or (want.size, want.write) != (got.size, got.write):
        return None
    if got.write and got.data != (case.start.gpr[_RDI] & ((1 << 8 * got.size) - 1)).to_bytes(got.size, "little"):
        return None
    items, rest = divmod(got.address - want.address, want.size)
    return None if rest else items


def _read_before_ud(case: Case, difference: Difference) -> int | None:
    """The address of a MOVBE's MMIO read in place of the handler of #UD, if the exception is queued and nothing else.

    The guest has loaded general registers and DS before: they are as in the handler, but for RSP, and all else is as
    at the start.
    """
    want, got = difference.expected, difference.got
    if got is None or not got.sections or not isinstance(got.exit, Mmio) or want is None or _stub(want) != _UD:
        return None
    handler, state, start = unpack_sections(want.sections), unpack_sections(got.sections), case.start
    events = state.events
    queued = replace(
        start.events, exception_pending=events.exception_pending, exception_injected=events.exception_injected,
        exception_nr=_UD,
    )  # fmt: skip
    gpr = (*handler.gpr[:_RSP], start.gpr[_RSP], *handler.gpr[_RSP + 1 :])
    before = replace(start, gpr=gpr, rip=state.rip, ds=handler.ds, events=queued)
    if not events.exception_pending | events.exception_injected or got.exit.write:
        return None
    if diff(unpack_sections(pack_sections(before, tuple(got.sections))), state):
        return None
    return got.exit.address if got.exit.size == _movbe_load(case, state.cs.base + state.rip) else None


def _movbe_load(case: Case, at: int) -> int:
    """The operand size in bytes of the MOVBE from memory that stands there; 0 where there is none."""
    code = bytes(max(_byte(case, at + n), 0) for n in range(5))
    found = _MOVBE_LOAD.match(code)
    if found is None or (found[2] and case.bits != 64):
        return 0
    return 8 if found[2] and found[2][0] & 8 else 2 if bool(found[1]) != (case.bits == 16) else 4


def _stub(seen: Observation | None) -> int | None:
    """The vector in whose stub a guest has ended."""
    if seen is None or not seen.sections:
        return None
    state = unpack_sections(seen.sections)
    at = state.cs.base + state.rip - 1 - STUBS
    return at >> 4 if 0 <= at < 0x1000 and not at & 15 else None


def _in_stubs(rip: int) -> bool:
    return STUBS <= rip < STUBS + 0x1000


def _upper_not_written(case: Case, found: MemoryDiff) -> bool:
    """All that differs are the upper bytes of an item of the stack: what lay there before is there."""
    item = 8 if case.bits == 64 else 4
    rows = enumerate(zip(found.expected, found.got, _initial(case, found), strict=True), found.gpa)
    return all(got == want or (got == old and gpa % item >= 2) for gpa, (want, got, old) in rows)


def _initial(case: Case, found: MemoryDiff) -> bytes:
    """What lay there at the start."""
    slot = next(s for s in case.shape.slots if s.gpa <= found.gpa < s.gpa + s.size)
    at = found.gpa - slot.gpa
    return case.memory.image(slot)[at : at + len(found.got)]


def _in_frame(difference: Difference, found: MemoryDiff) -> bool:
    """It lies on the stack that the guest ended with, one way or the other: an exception's frame, of at most 48 bytes.

    (SDM vol. 3A 6.14.2: six words of eight bytes; in virtual-8086 mode ten of four.) A KVM whose delivery of exceptions
    takes SS for flat puts it at linear SP.
    """
    states = [unpack_sections(seen.sections) for seen in (difference.expected, difference.got) if seen is not None]
    tops = [top for state in states for top in (stack_top(state), state.gpr[4])]
    return any(top <= found.gpa and found.gpa + len(found.got) <= top + 48 for top in tops)


def _usable(wrong: object) -> bool:
    if isinstance(wrong, int) or wrong in _WRONG:
        return True
    verb, _, number = str(wrong).partition(" ")
    if verb == "mmio-items":
        return number.removeprefix("-").isdecimal()
    number = number.removeprefix("clear ") if verb == "saved" else number
    return (verb in ("clear", "set", "saved", "read-before-ud") and _HEX.fullmatch(number) is not None) or (
        verb == "exception" and number.isdecimal()
    )


def load_known(path: Path = FILE, release: str | None = None) -> tuple[KnownDivergence, ...]:
    """The rows of the file; those that hold on a kernel of that release. KnownError says which is wrong and how."""
    try:
        rows = tomllib.loads(path.read_text()).get("divergence", [])
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise KnownError(f"{path}: {error}") from error
    out = []
    for n, row in enumerate(rows):
        if wrong := sorted((set(row) - _OPTIONAL) ^ _KEYS):
            raise KnownError(f"{path}: divergence {n + 1}: missing or unknown: {', '.join(wrong)}")
        if not _usable(row["wrong"]):
            raise KnownError(
                f"{path}: divergence {n + 1}: wrong must be a number, 'clear 0xN', 'set 0xN', 'saved clear 0xN', "
                f"'read-before-ud 0xN', 'mmio-items N', 'exception N' or one of {', '.join(_WRONG)}"
            )
        lists = {key: tuple(row[key]) for key in ("cases", "module", "register")}
        try:
            kernels = KernelRange.parse(row["kernels"]) if "kernels" in row else None
        except ValueError as error:
            raise KnownError(f"{path}: divergence {n + 1}: {error}") from error
        out.append(KnownDivergence(**{**row, **lists, "kernels": kernels}))
    return tuple(row for row in out if release is None or row.on(release))
