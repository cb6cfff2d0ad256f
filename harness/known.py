"""Known divergences: data that says where a KVM differs from the architecture, with the exact wrong value.

A row excuses nothing but what it names: the Cases, the register, the kind of wrong value and the hosts.  When such a
Case agrees again it is *healed*.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Final

from harness.lockstep import Difference
from harness.state import FieldDiff

FILE: Final = Path(__file__).resolve().parent.parent / "known_divergences.toml"
_KEYS: Final = {"name", "cases", "module", "register", "wrong", "why", "reproducer", "reference"}
_WRONG: Final = ("zero-extended-32",)


class KnownError(ValueError):
    """known_divergences.toml is not usable."""


@dataclass(frozen=True)
class KnownDivergence:
    """One row. ``cases`` are patterns of Case names, ``module`` patterns of the host's vendor module.

    ``wrong``: ``zero-extended-32`` (the expected value with its upper 32 bits cleared) or a number.
    """

    name: str
    cases: tuple[str, ...]
    module: tuple[str, ...]
    register: tuple[str, ...]
    wrong: str | int
    why: str
    reproducer: str
    reference: str

    def covers(self, case_name: str, module: str) -> bool:
        """This row speaks of this Case on this host."""
        return any(fnmatchcase(module, p) for p in self.module) and any(fnmatchcase(case_name, p) for p in self.cases)

    def explains(self, difference: Difference) -> bool:
        """Everything that differs is a named register with exactly the wrong value."""
        if difference.exits_differ or difference.memory or not difference.registers:
            return False
        return all(d.name in self.register and d.got == self._value(d) for d in difference.registers)

    def _value(self, found: FieldDiff) -> int:
        return found.expected & 0xFFFFFFFF if self.wrong == "zero-extended-32" else int(self.wrong)


def load_known(path: Path = FILE) -> tuple[KnownDivergence, ...]:
    """Read the file. KnownError says which row is wrong and how."""
    try:
        rows = tomllib.loads(path.read_text()).get("divergence", [])
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise KnownError(f"{path}: {error}") from error
    out = []
    for n, row in enumerate(rows):
        if set(row) != _KEYS:
            wrong = sorted(set(row) ^ _KEYS)
            raise KnownError(f"{path}: divergence {n + 1}: missing or unknown: {', '.join(wrong)}")
        if not isinstance(row["wrong"], int) and row["wrong"] not in _WRONG:
            raise KnownError(f"{path}: divergence {n + 1}: wrong must be a number or one of {', '.join(_WRONG)}")
        lists = {key: tuple(row[key]) for key in ("cases", "module", "register")}
        out.append(KnownDivergence(**{**row, **lists}))
    return tuple(out)
