"""Run two machines side by side, compare at every exit, stop at the first difference. The one comparison there is."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Final, NamedTuple

from harness.case import Case, Observation
from harness.exits import Exit, Io
from harness.machine import ComparableMachine, Machine
from harness.memory_diff import MemoryDiff
from harness.state import FieldDiff, diff, pack_sections, unpack_sections
from harness.words import counted

_VM: Final = 1 << 17
_RFLAGS_AT: Final = 136  # in struct kvm_regs, its last field


@dataclass(frozen=True)
class Difference:
    """The first exit at which two machines differ: ``index`` counts exits from 0, ``action`` indexes Case.actions.

    ``expected`` or ``got`` is None when that machine had no further exit. ``registers`` and ``memory`` hold only what
    differs; both empty when the exits themselves differ.
    """

    index: int
    action: int
    expected: Observation | None
    got: Observation | None
    registers: tuple[FieldDiff, ...] = ()
    memory: tuple[MemoryDiff, ...] = ()

    @property
    def exits_differ(self) -> bool:
        """The machines left the guest for different reasons."""
        return self.expected is None or self.got is None or not same_exit(self.expected.exit, self.got.exit)

    @property
    def where(self) -> tuple[str, ...]:
        """What differs, by name: registers and ``memory``, or ``exit`` when the exits themselves do."""
        if self.exits_differ:
            return ("exit",)
        return (*(d.name for d in self.registers), *(("memory",) if self.memory else ()))

    def summary(self) -> str:
        """One line: what differs first."""
        if self.exits_differ:
            return f"exit: expected {exit_text(self.expected)}, got {exit_text(self.got)}"
        if self.registers:
            more = f" (+{counted(len(self.registers) - 1, 'more register')})" if len(self.registers) > 1 else ""
            return f"{self.registers[0]}{more}"
        return str(self.memory[0]) if self.memory else "?"


class Outcome(NamedTuple):  # a tuple: one is made for every Case, and a frozen dataclass costs three times as much
    """A lockstep run: how many checks it made, and the first difference if there was one.

    ``allowed``: a checksum of what differed to the byte without being wrong (undefined flags, in memory too; the
    contents of null segments); 0 when nothing did. Two runs of one Case with the same ``expected`` behaved alike if it
    is the same.
    """

    checks: int
    difference: Difference | None = None
    allowed: int = 0


def exit_text(seen: Observation | None) -> str:
    """An exit for people."""
    return "no further exit" if seen is None else str(seen.exit)


def same_exit(expected: Exit, got: Exit) -> bool:
    """Whether two exits are the same event."""
    return expected is got or expected == got


def compare_registers(expected: Observation, got: Observation) -> tuple[FieldDiff, ...]:
    """Registers that differ; nothing when either side cannot show a state. Bytes first, decoded only if they differ."""
    left, right = expected.sections, got.sections
    if not left or not right or left == right:
        return ()
    if left.keys() != right.keys():
        raise ValueError(f"machines show different sections: {sorted(left)} and {sorted(right)}")
    if _alike(expected, left, right):
        return ()
    want, have = unpack_sections(left), unpack_sections(right)
    found = diff(want, have, expected.ignore)
    return tuple(d for d in found if d.got not in expected.accept.get(d.name, ()))


def _alike(expected: Observation, left: Mapping[str, bytes], right: Mapping[str, bytes]) -> bool:
    """Nothing differs but undefined flags and what no program can see; False where only decoding can tell."""
    ignore = expected.ignore
    flags = int.from_bytes(left["regs"][_RFLAGS_AT:], "little")
    for name, want in left.items():
        have = right[name]
        if want == have:
            continue
        if name == "regs":
            if want[:_RFLAGS_AT] != have[:_RFLAGS_AT]:
                return False
            if (flags ^ int.from_bytes(have[_RFLAGS_AT:], "little")) & ~ignore.get("rflags", 0):
                return False
        elif not _section_alike(name, want, have, left["regs"] if flags & _VM else b""):
            return False
    return True


@lru_cache(maxsize=4096)
def _section_alike(name: str, want: bytes, have: bytes, regs: bytes) -> bool:
    """One section shows the same to a program (``regs`` where RFLAGS.VM decides what segments mean)."""
    base = {"regs": regs} if regs else {}
    return not diff(unpack_sections({**base, name: want}), unpack_sections({**base, name: have}))


def compare(
    index: int, action: int, expected: Observation, got: Observation, machine: ComparableMachine, alike: bool = False
) -> Difference | None:
    """Compare everything visible at one exit. ``alike``: the sections are known to be equal to the byte."""
    if not same_exit(expected.exit, got.exit):
        return Difference(index, action, expected, got)
    registers = () if alike else compare_registers(expected, got)
    memory: Sequence[MemoryDiff] = ()
    if expected.sections and got.sections:
        memory = machine.memory_diff(expected.pages, expected.pages_ignore)
    if registers or memory:
        return Difference(index, action, expected, got, registers, tuple(memory))
    return None


def lockstep(case: Case, left: Machine, right: ComparableMachine) -> Outcome:
    """Run ``case`` on both machines. ``left`` says what must be, ``right`` is judged."""
    left.load(case)
    right.load(case)
    checks = allowed = 0
    for number, action in enumerate(case.actions):
        wanted = iter(left.apply(action))
        for got in right.apply(action):
            expected = next(wanted, None)
            if expected is None:
                return Outcome(checks, Difference(checks, number, None, got), allowed)
            if got.exit is not expected.exit and isinstance(got.exit, Io) and got.exit.count != 1:
                expected = _batch(expected, wanted, got.exit.count)
            checks += 1
            alike = expected.sections == got.sections
            plain = alike and got.sections and not expected.pages_ignore and same_exit(expected.exit, got.exit)
            if plain and not right.memory_diff(expected.pages, _NOTHING):
                continue  # the same to the byte, as nearly always
            found = compare(checks - 1, number, expected, got, right, alike)
            if found is not None:
                return Outcome(checks, found, allowed)
            if not alike:
                allowed = _checksum(allowed, expected, got)
            if expected.pages_ignore and got.sections:
                for ram in right.memory_diff(expected.pages, {}):  # only undefined bits can be left to differ
                    allowed = zlib.crc32(ram.got, zlib.crc32(b"%x" % ram.gpa, allowed))
        missing = next(wanted, None)
        if missing is not None:
            return Outcome(checks, Difference(checks, number, missing, None), allowed)
    return Outcome(checks, None, allowed) if allowed or checks != 1 else _AGREED


_AGREED: Final = Outcome(1)
_NOTHING: Final[Mapping[int, int]] = {}


def _checksum(value: int, expected: Observation, got: Observation) -> int:
    for name, data in got.sections.items():
        want = expected.sections.get(name, b"")
        if name == "events" and want != data:
            want, data = _current_events(want), _current_events(data)
        if want != data:
            value = zlib.crc32(data, zlib.crc32(name.encode(), value))
    return value


@lru_cache(maxsize=256)
def _current_events(data: bytes) -> bytes:
    """Without what is left of events that are over: that depends on the host's page faults and timers."""
    return pack_sections(unpack_sections({"events": data}), ("events",))["events"] if data else b""


def _batch(first: Observation, rest: Iterator[Observation], count: int) -> Observation:
    """The expected observation of a batched port I/O exit: ``first`` and as many further single items as it holds.

    A REP INS or OUTS may show several items in one KVM_EXIT_IO (api.rst: ``count``); architecturally they are one
    after the other, and only the state after the last of them is visible.
    """
    last, merged = first, first.exit
    if not isinstance(merged, Io):
        return first  # shown as a difference of exits
    while merged.count < count:
        item = next(rest, None)
        if item is None or not isinstance(item.exit, Io) or not _same_port(merged, item.exit):
            return first
        merged = replace(merged, data=merged.data + item.exit.data, count=merged.count + item.exit.count)
        last = item
    return replace(last, exit=merged)


def _same_port(a: Io, b: Io) -> bool:
    return (a.port, a.size, a.write) == (b.port, b.size, b.write)
