"""Entry: from its first moment on, an interrupt is one line and status 130."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType


def _quit(number: int, frame: FrameType | None) -> None:
    os.write(2, b"kvm-harness: interrupted\n")
    os._exit(128 + signal.SIGINT)


def main() -> int:
    """The command line (harness/cli.py), which takes over the interrupts once it is loaded."""
    signal.signal(signal.SIGINT, _quit)
    from harness.cli import main as run

    try:
        return run()
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # nothing is left to interrupt but the interpreter's own end


if __name__ == "__main__":
    sys.exit(main())
