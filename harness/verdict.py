"""The verdicts, in their order of precedence, and the exit statuses (design.md). One enum, used everywhere."""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum
from typing import Final


class Verdict(Enum):
    """What a Case, a cell or a run came to. The order of definition is the order of precedence."""

    SPLAT = "splat"
    MISMATCH = "mismatch"
    REGRESSED = "regressed"
    HEALED = "healed"
    SUSPECT = "suspect"
    KNOWN = "known"  # diverges exactly as known_divergences.toml says: listed, does not fail
    UNSUPPORTED = "unsupported"
    LOST = "lost"
    AGREE = "agree"

    @property
    def status(self) -> int:
        """The exit status of a run whose worst verdict this is."""
        return _STATUS.get(self, 0)


_STATUS: Final = {Verdict.SPLAT: 1, Verdict.MISMATCH: 1, Verdict.REGRESSED: 1, Verdict.LOST: 4}
BAD_INPUT: Final = 2
NO_KVM: Final = 3
INTERRUPTED: Final = 130


def worst(verdicts: Iterable[Verdict]) -> Verdict | None:
    """The verdict that decides, None when there is none."""
    found = set(verdicts)
    return next((v for v in Verdict if v in found), None)


def exit_status(verdicts: Iterable[Verdict]) -> int:
    """The exit status of a run: that of the first verdict by precedence which has one that is not 0.

    A run in which nothing ran is bad input, never success.
    """
    found = set(verdicts)
    if not found - {Verdict.UNSUPPORTED}:
        return BAD_INPUT
    return next((v.status for v in Verdict if v in found and v.status), 0)
