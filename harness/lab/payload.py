"""The payload with the runner: what a machine of the lab starts when its image has booted."""

from __future__ import annotations

import importlib.util
import marshal
import sys
from pathlib import Path
from typing import Final

from harness.lab.cache import Progress, quiet
from harness.lab.image import PYTHON, payload
from harness.lab.sources import ROOT, closure, source

_START: Final = b"""#!/bin/sh
PYTHONPATH=/payload exec /usr/bin/python3 -S -s -B -m harness.lab.agent
"""
_PLANNERS: Final = ("harness.reference", "harness.paths")  # imported where plans are made


def runner_payload(progress: Progress = quiet, *, start: bytes = _START) -> Path:
    """The payload with the runner: the modules it imports, compiled where this Python is the image's, and ``start``."""
    files: dict[str, Path | bytes] = {"start": start}
    for name in sorted(closure("harness.lab.agent", _PLANNERS)):
        path = source(name)
        inside = path.relative_to(ROOT.parent)
        files[str(inside)] = path
        if sys.implementation.cache_tag == PYTHON:
            code = compile(path.read_bytes(), f"/payload/{inside}", "exec", dont_inherit=True)
            unchecked = importlib.util.MAGIC_NUMBER + (1).to_bytes(4, "little") + bytes(8)
            files[f"{inside.parent}/__pycache__/{path.stem}.{PYTHON}.pyc"] = unchecked + marshal.dumps(code)
    return payload(files, progress)
