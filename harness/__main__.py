"""Entry: from its first moment on, an interrupt is one line and status 130.

``bin/kvm-harness`` starts Python with SIGINT blocked, since the interpreter itself would answer one with a traceback.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

_INTERRUPTED = 130


def _quit(number: int, frame: FrameType | None) -> None:
    os.write(2, b"kvm-harness: interrupted\n")
    os._exit(_INTERRUPTED)


def main() -> int:
    """The command line (harness/cli.py), which takes over the interrupts once it is loaded."""
    signal.signal(signal.SIGINT, _quit)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    from harness.cli import main as run

    status = run()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # nothing is left to interrupt but the interpreter's own end
    if status == _INTERRUPTED:  # Python may have noted the KeyboardInterrupt, and would end itself by the signal
        sys.stdout.flush()
        os._exit(status)
    return status


if __name__ == "__main__":
    sys.exit(main())
