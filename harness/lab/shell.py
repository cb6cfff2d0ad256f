"""A shell inside the lab: the console of the machine on this terminal."""

from __future__ import annotations

import contextlib
import os
import re
import select
import sys
import tempfile
import termios
import tty
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from harness.lab.boot import CONSOLE_LOG, Boot, How
from harness.lab.bootspec import CONSOLE
from harness.lab.errors import LabInputError, LostError
from harness.lab.payload import runner_payload
from harness.lab.session import Cell

_LEAVE: Final = b"\x1d"  # Ctrl-]
_START: Final = b"""#!/bin/sh
export PYTHONPATH=/payload TERM=linux HOME=/tmp
echo "kvm-harness: /dev/kvm is $(ls -l /dev/kvm 2>&1); python3 finds the harness; exit or Ctrl-] ends the machine"
busybox setsid true && sh -c true || exit 1
busybox setsid -c sh -i
exit 0  # what the shell ended with is its user's
"""
_FAILED: Final = re.compile(rb"^kvm-harness-init: (no payload.*?|payload ended with status [1-9]\d*)\r?$", re.MULTILINE)


def check_terminal() -> None:
    """LabInputError without one."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise LabInputError("lab shell needs a terminal on stdin and stdout")


def interactive(cell: Cell) -> int:
    """Boot ``cell`` and connect this terminal with its console, until the shell ends or Ctrl-] is typed.

    0; LostError when there was no shell, or the machine ended otherwise.
    """
    disks = [runner_payload(start=_START)]
    with (
        tempfile.TemporaryDirectory(prefix="kvm-harness-") as folder,
        Boot(cell.spec(disks), Path(folder), print) as boot,
        _raw(),
    ):
        while boot.ending is None:
            if (data := boot.read(CONSOLE, 0.02)) is not None:
                os.write(1, data)
            if select.select([0], [], [], 0)[0]:
                typed = os.read(0, 4096)
                if not typed or _LEAVE in typed:
                    break
                boot.send(CONSOLE, typed)
        console = (Path(folder) / CONSOLE_LOG).read_bytes()
        if failed := _FAILED.search(console):
            raise LostError(f"{cell.name}: no shell: {failed[1].decode()}")
        if boot.ending is not None and boot.ending.how is not How.POWERED_OFF:
            raise LostError(f"{cell.name}: {boot.ending}")
    return 0


@contextlib.contextmanager
def _raw() -> Iterator[None]:
    before = termios.tcgetattr(0)
    tty.setraw(0)
    try:
        yield
    finally:
        termios.tcsetattr(0, termios.TCSADRAIN, before)
