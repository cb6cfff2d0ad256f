"""The one place where emulators' processes begin. What is said to them then: harness/lab/boot.py, bare_mailbox.py."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from typing import Final

from harness.lab.errors import LabError

# The kernel kills the emulator when the thread that started it is gone, for whatever reason; the shell's test is for a
# parent that died before that was arranged.
_GUARD: Final = ("setpriv", "--pdeathsig", "KILL", "--", "sh", "-c", '[ "$PPID" = "$0" ] && exec "$@"')


def spawn(words: Sequence[str], fds: Iterable[int], output: int, *, guarded: bool = True) -> subprocess.Popen[bytes]:
    """Start an emulator that inherits ``fds`` and writes what it has to say to ``output`` (a descriptor).

    ``guarded``: it does not outlive the thread that calls this. Without, it must end by itself when a descriptor that
    it was given does. Raises OSError when it cannot be started, LabError when the tools for a guard are not here.
    """
    if guarded:
        for tool in (_GUARD[0], "sh"):
            if shutil.which(tool) is None:
                raise LabError(f"{tool} is not on this machine: install Debian's util-linux and dash")
        words = [*_GUARD, str(os.getpid()), *words]
    return subprocess.Popen(
        words,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        pass_fds=tuple(fds),
        process_group=0,  # Ctrl-C on the terminal is ours to handle
    )
