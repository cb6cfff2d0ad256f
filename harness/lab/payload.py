"""The payload with the runner: what a machine of the lab starts when its image has booted."""

from __future__ import annotations

import ast
import importlib.util
import marshal
import sys
import threading
from pathlib import Path
from typing import Final

import harness
from harness.lab.cache import Progress, quiet
from harness.lab.image import PYTHON, payload

_START: Final = b"""#!/bin/sh
PYTHONPATH=/payload exec /usr/bin/python3 -S -s -B -m harness.lab.agent
"""


_PACKING: Final = threading.Lock()  # ast.parse() of CPython 3.11 can fail when two threads are in it


def runner_payload(progress: Progress = quiet, *, start: bytes = _START) -> Path:
    """The payload with the runner: the modules it imports, compiled where this Python is the image's, and ``start``."""
    files: dict[str, Path | bytes] = {"start": start}
    root = Path(harness.__file__).resolve().parent
    with _PACKING:
        names = sorted(_closure("harness.lab.agent"))
    for name in names:
        path = root.joinpath(*name.split(".")[1:])
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        inside = path.relative_to(root.parent)
        files[str(inside)] = path
        if sys.implementation.cache_tag == PYTHON:
            code = compile(path.read_bytes(), f"/payload/{inside}", "exec", dont_inherit=True)
            unchecked = importlib.util.MAGIC_NUMBER + (1).to_bytes(4, "little") + bytes(8)
            files[f"{inside.parent}/__pycache__/{path.stem}.{PYTHON}.pyc"] = unchecked + marshal.dumps(code)
    return payload(files, progress)


def _closure(start: str) -> set[str]:
    """The modules of the harness that ``start`` imports, and their packages."""
    root = Path(harness.__file__).resolve().parent
    found: set[str] = set()
    todo = [start]
    while todo:
        name = todo.pop()
        path = root.joinpath(*name.split(".")[1:])
        source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        if name in found or not source.is_file():
            continue
        found.add(name)
        todo.append(name.rpartition(".")[0] or name)
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.Import):
                todo += [a.name for a in node.names if a.name.startswith("harness")]
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("harness"):
                module = str(node.module)
                if module.startswith(("harness.reference", "harness.paths")):
                    continue  # the planner's, imported where it runs
                todo += [module, *(f"{module}.{a.name}" for a in node.names)]
    return found
