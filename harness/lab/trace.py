"""Which kernel functions were executed: ftrace's function profile, as the runner inside the lab sees it.

Documentation/trace/ftrace.rst: ``set_ftrace_filter`` takes line numbers of ``available_filter_functions``, which costs
the kernel nothing, while each name makes it look at every function. The profile's ``trace_stat/function<cpu>`` shows
30 characters of a name, or offsets from ``_text`` where the kernel has the option ``prof-text-offset``.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

TRACING: Final = Path("/sys/kernel/tracing")
SHOWN: Final = 30
"""Characters of a name that the profile shows."""


class FunctionProfile:
    """Counts calls of some functions from :meth:`start` on."""

    def __init__(self, tracing: Path = TRACING) -> None:
        self._tracing = tracing
        self._missing: list[str] = []
        self._offsets = False
        self._error = ""

    def start(self, names: Iterable[str]) -> None:
        """Follow the functions of these names. What goes wrong, :meth:`result` tells."""
        try:
            self._start(dict.fromkeys(names))
        except OSError as error:
            self._error = f"this kernel has no function profile: {error}"

    def _start(self, wanted: Mapping[str, None]) -> None:
        if not (self._tracing / "available_filter_functions").exists():
            _mount(self._tracing)
        lines: list[int] = []
        seen = set()
        with open(self._tracing / "available_filter_functions") as file:
            for number, line in enumerate(file, 1):
                name = line.split(None, 1)[0]
                if name in wanted:
                    lines.append(number)
                    seen.add(name)
        self._missing = [name for name in wanted if name not in seen]
        with suppress(OSError):  # Linux 6.1 has it not
            (self._tracing / "options" / "prof-text-offset").write_text("1")
            self._offsets = True
        if not lines:
            return  # an empty filter would mean every function of the kernel
        fd = os.open(self._tracing / "set_ftrace_filter", os.O_WRONLY | os.O_TRUNC)
        try:
            for number in lines:
                os.write(fd, b"%d\n" % number)
        finally:
            os.close(fd)
        (self._tracing / "function_profile_enabled").write_text("1")

    def result(self) -> dict[str, Any]:
        """``seen``: what was called, as the profile shows it; ``offsets``: from ``_text``, not by name.

        ``missing``: names of functions that ftrace cannot follow; ``error``: why there is nothing to show.
        """
        if self._error:
            return {"error": self._error}
        seen: dict[str, None] = {}
        for stat in (self._tracing / "trace_stat").glob("function*"):
            for line in stat.read_text().splitlines():
                words = line.split()
                if len(words) >= 2 and words[1].isdecimal():
                    seen[words[0]] = None
        return {"seen": list(seen), "offsets": self._offsets, "missing": self._missing}


def _mount(where: Path) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"tracefs", bytes(where), b"tracefs", 0, None):
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error), str(where))
