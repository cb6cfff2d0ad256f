"""The text of a failure: what a maintainer wants to read first, at most 100 columns, plain."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from harness.case import Case
from harness.exits import InternalError
from harness.lockstep import Difference, exit_text
from harness.memory_diff import MemoryDiff
from harness.report.listing import (
    Insn,
    disassemble,
    exit_address,
    linear,
    listing,
    registers_used,
    source_line,
    stands_at,
)
from harness.report.views import replay_words
from harness.state import GPR_NAMES, FieldDiff, bit_names
from harness.words import counted

WIDTH: Final = 100
_LABEL: Final = 12
_MAX_INSNS: Final = 24
_MAX_RUNS: Final = 8


def failure_text(case: Case, difference: Difference, host: str, again: str | None = None) -> str:
    """Everything about one failure in lines of at most 100 columns; then, in one, the command that runs it again.

    In order: case, guest source line, exit, what differs (and only that), disassembly, start values of the registers
    that the code uses, host. ``again`` is that command; without one, ``replay`` of the Case's id.
    """
    code = listing(case, difference)
    out = [*labelled("case", f"{case.name}  [{case.id}]"), *_guest(case, difference), *_exit(case, difference)]
    if difference.registers:
        out += ["", *_register_table(difference)]
    if difference.memory:
        out += ["", *_memory(difference)]
    if code:
        out += ["", "code", *(f"  {line}"[:WIDTH].rstrip() for line in _code_lines(code, case, difference))]
    out += ["", *start_values(case, code, [d.name for d in difference.registers]), "", *labelled("host", host)]
    return "\n".join([*out, again or replay_words(case.id)])


def labelled(label: str, text: str) -> list[str]:
    """``text`` after its label, wrapped beside it."""
    return textwrap.wrap(
        text, WIDTH, initial_indent=f"{label:<{_LABEL}}", subsequent_indent=" " * _LABEL, break_on_hyphens=False
    ) or [label]


def _guest(case: Case, difference: Difference) -> list[str]:
    if not case.origin:
        return []
    here = ""
    at = exit_address(difference)
    if at is not None:
        here = source_line(case, at - 1)  # RIP is past the instruction that left the guest
    start = source_line(case, linear(case.start))
    text = case.origin
    if here:
        text = f"{here}  ({case.origin}" + (f", starts at {start})" if start and start != here else ")")
    elif start:
        text = f"{start}  ({case.origin}; the exit is outside it)"
    return labelled("guest", text)


def _exit(case: Case, difference: Difference) -> list[str]:
    action = case.actions[difference.action].kind if difference.action < len(case.actions) else "?"
    where = f"exit {difference.index} (action {difference.action}: {action})"
    expected = exit_text(difference.expected)
    got = exit_text(difference.got)
    if not difference.exits_differ:
        at = exit_address(difference)
        return labelled("differs at", f"{where}: {got}" + (f" at {at:#x}" if at is not None else ""))
    out = [*labelled("differs at", where), *labelled("expected", expected), *labelled("got", got)]
    if difference.got and isinstance(difference.got.exit, InternalError) and difference.got.exit.code:
        lacking = disassemble(difference.got.exit.code, case.bits, 0)[0]
        words = f"{lacking.code.hex(' ')}  {lacking.text}".strip()
        out += labelled("", f"(this KVM's emulator lacks: {words})")
    return out


def _register_table(difference: Difference) -> Iterator[str]:
    ignore = difference.expected.ignore if difference.expected else {}
    rows = [("register", "expected", "got", "xor")]
    rows += [(d.name, f"{d.expected:#x}", f"{d.got:#x}", f"{d.xor:#x}") for d in difference.registers]
    w = [max(len(row[i]) for row in rows) for i in range(4)]
    notes = ["bits", *(_bits(d, ignore.get(d.name, 0)) for d in difference.registers)]
    for row, note in zip(rows, notes, strict=True):
        line = f"{row[0]:<{w[0]}}  {row[1]:>{w[1]}}  {row[2]:>{w[2]}}  {row[3]:>{w[3]}}"
        room = WIDTH - len(line) - 2
        if len(note) <= room:
            yield f"{line}  {note}".rstrip() if any(notes[1:]) else line
        else:
            yield line
            indent = " " * (w[0] + 2)
            yield from textwrap.wrap(note, WIDTH, initial_indent=indent, subsequent_indent=indent)


def _bits(d: FieldDiff, undefined: int) -> str:
    words = [f"{name} {_value(d, name)}".rstrip() for name in d.bits]
    text = ", ".join(words)
    if d.xor & undefined:
        left = " ".join(bit_names(d.name, d.xor & undefined)) or hex(d.xor & undefined)
        text += f" (undefined, not compared: {left})"
    return text.strip()


def _value(d: FieldDiff, bit: str) -> str:
    """``0->1`` for a named bit: expected, got."""
    for i in range(d.xor.bit_length()):
        if d.xor >> i & 1 and bit_names(d.name, 1 << i) == (bit,):
            return f"{d.expected >> i & 1}->{d.got >> i & 1}"
    return ""


def _memory(difference: Difference) -> Iterator[str]:
    ignore = difference.expected.pages_ignore if difference.expected else {}
    shown = difference.memory[:_MAX_RUNS]
    for n, run in enumerate(shown):
        mark = _marks(run, ignore)
        label = f"memory {run.gpa:#x}"
        yield f"{label:<20}expected  {run.expected.hex(' ')}"
        yield f"{'':<20}got       {run.got.hex(' ')}"
        yield f"{'':<30}{mark}".rstrip()
        if n == len(shown) - 1 and len(difference.memory) > len(shown):
            yield f"... and {counted(len(difference.memory) - len(shown), 'more run')} of bytes"


def _marks(run: MemoryDiff, ignore: Mapping[int, int]) -> str:
    pairs = enumerate(zip(run.expected, run.got, strict=True))
    return " ".join("^^" if (a ^ b) & ~ignore.get(run.gpa + i, 0) else "  " for i, (a, b) in pairs)


def _code_lines(code: list[Insn], case: Case, difference: Difference) -> Iterator[str]:
    for n, insn in enumerate(code):
        if len(code) > _MAX_INSNS and n == 4:
            yield f"... {counted(len(code) - _MAX_INSNS, 'instruction')} ..."
        if len(code) <= _MAX_INSNS or n < 4 or n >= len(code) - _MAX_INSNS + 4:
            yield str(insn)
    at = exit_address(difference)
    if at is not None and at != code[-1].address + len(code[-1].code):
        whose = "expected exit" if stands_at(difference.got) is None else "exit"
        yield f"{whose} at {at:#x}, outside this code"


def start_values(case: Case, code: list[Insn], more: Sequence[str] = ()) -> list[str]:
    """What the general-purpose registers that ``code`` uses, and those of ``more``, hold at the start; RFLAGS."""
    wanted = {*registers_used(code), *more}
    start = case.start.flat()
    names = [n for n in GPR_NAMES if n in wanted]
    words = [f"{n}={start[n]:#x}" for n in (*names, "rflags")]
    return labelled("start", " ".join(words))
