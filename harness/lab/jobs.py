"""What the machines of a cell are given to do."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from harness.lab.plan import Plan


@dataclass
class Job:
    """Cases of one group of the plan, by index, still to be run in this order."""

    group: int
    indices: deque[int]
    careful: bool = False  # every result at once: for Cases of which one may have killed a machine
    first: int = -1  # the first of them
    suspicion: str = ""  # what that machine died of, until a Case is blamed for it


def jobs(plan: Plan, chosen: Iterable[int]) -> deque[Job]:
    """The chosen Cases, by group."""
    wanted = set(chosen)
    out: deque[Job] = deque()
    for number, group in enumerate(plan.groups):
        indices = [i for i in range(group.first, group.first + group.count) if i in wanted]
        if indices:
            out.append(Job(number, deque(indices)))
    return out
