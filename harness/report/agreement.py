"""The text of a Case in which nothing differs: what was compared, and at which exits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from harness.case import Case, Observation
from harness.report.failure import WIDTH, labelled, start_values
from harness.report.listing import Insn, code_until, linear, source_line, stands_at
from harness.words import counted

_MOST: Final = 20  # exits, and instructions


def agreement_text(case: Case, steps: Sequence[Sequence[Observation]], checks: int, host: str) -> str:
    """What both machines showed, lines of at most 100 columns.

    In order: case, guest source line, what was compared, every exit, the code, start values of the registers that it
    uses, host. ``steps`` is the model's recording (harness.machine.record): Observations per action.
    """
    code = _code(case, steps)
    out = labelled("case", f"{case.name}  [{case.id}]")
    if case.origin:
        start = source_line(case, linear(case.start))
        out += labelled("guest", f"{start}  ({case.origin})" if start else case.origin)
    out += labelled("compared", _compared(case, steps, checks))
    out += ["", *_exits(case, steps)]
    if code:
        out += ["", "code", *(f"  {insn}"[:WIDTH].rstrip() for insn in code[:_MOST])]
        out += [f"  ... {counted(len(code) - _MOST, 'more instruction')}"] if len(code) > _MOST else []
    return "\n".join([*out, "", *start_values(case, code), "", *labelled("host", host)])


def _compared(case: Case, steps: Sequence[Sequence[Observation]], checks: int) -> str:
    states = [seen for shown in steps for seen in shown if seen.sections]
    ram_size = sum(slot.size for slot in case.shape.slots) // 1024
    whole = f"; all registers ({', '.join(states[0].sections)}) and {ram_size} KiB of RAM" if states else ""
    times = f" at {len(states)} of them" if states and len(states) != sum(map(len, steps)) else ""
    return f"the reference model and KVM, {counted(checks, 'check')}: every exit{whole}{times}"


def _exits(case: Case, steps: Sequence[Sequence[Observation]]) -> list[str]:
    """The exits, numbered as in the text of a failure, each with the action that led to it."""
    lines: list[str] = []
    for number, (action, shown) in enumerate(zip(case.actions, steps, strict=True)):
        for seen in shown:
            at = stands_at(seen)
            where = f" at {at:#x}" if at is not None else ""
            lines.append(f"{f'exit {len(lines)}':<12}action {number}, {action.kind}: {seen.exit}{where}"[:WIDTH])
    more = len(lines) - _MOST
    return lines if more <= 0 else [*lines[:_MOST], f"... and {counted(more, 'more exit')}"]


def _code(case: Case, steps: Sequence[Sequence[Observation]]) -> list[Insn]:
    """From the start to the last exit."""
    places = [at for shown in steps for seen in shown if (at := stands_at(seen)) is not None]
    return code_until(case, places[-1] if places else None)
