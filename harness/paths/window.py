"""Interrupt windows: userspace asks to be told when an interrupt can be injected, and injects one there.

api.rst section 5, ``request_interrupt_window``. The RIP at that exit tells exactly how long STI holds interrupts off
(SDM vol. 2B STI; APM vol. 2 8.1.5), whatever the instruction in between leads to. (Of several instructions in a row
that hold them off only the first is sure to do so: SDM vol. 3A 6.8.3. So MOV SS has no Case with STI.)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Final

from harness.case import Action, Case, Inject, Run, Window
from harness.cpuid import CpuProfile
from harness.paths.common import Family, cases

_FAMILY: Final = Family("window", ("real", "prot16", "prot32", "compat", "long"))
_VECTOR: Final = 0x91
_IF: Final = 0x200
_ACTIONS: Final[tuple[Action, ...]] = (Window(64), Inject("interrupt", _VECTOR), Run(64))
_NEVER: Final[tuple[Action, ...]] = (Window(64),)
_TRAIT: Final = "trait:irq-window"


def window_cases(profile: CpuProfile, *, forced: bool = False) -> Iterator[Case]:
    """The Cases of this family."""
    for case in cases(_FAMILY, profile, forced=forced):
        entry = case.origin.rpartition(":t_")[2]
        flags = case.start.rflags | (_IF if entry == "open_from_the_start" else 0)
        yield replace(
            case, start=replace(case.start, rflags=flags), requires=case.requires | {_TRAIT},
            actions=_NEVER if entry in _CLOSED else _ACTIONS,
        )  # fmt: skip


_CLOSED: Final = ("never", "sti_before_ud", "sti_before_int")
"""Entries that end in a halt before the window opens."""
