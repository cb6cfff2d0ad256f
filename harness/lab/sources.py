"""Which sources of the harness something was made by: for keys of what is kept, and for what goes into the lab."""

from __future__ import annotations

import ast
import threading
from functools import cache
from pathlib import Path
from typing import Final

import harness
from harness.lab.cache import digest_tree

ROOT: Final = Path(harness.__file__).resolve().parent
_CHECKOUT: Final = ROOT.parent
_VIEWS: Final = ("series", "report")  # of what Cases came to
_PARSING: Final = threading.Lock()  # ast.parse() of CPython 3.11 can fail when two threads are in it


def source(name: str) -> Path:
    """The file of a module of the harness, which need not be there."""
    path = ROOT.joinpath(*name.split(".")[1:])
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


@cache
def closure(start: str, without: tuple[str, ...] = ()) -> frozenset[str]:
    """The modules of the harness that ``start`` imports, anywhere in them, and their packages.

    Nothing is followed whose name begins with one of ``without``.
    """
    found: set[str] = set()
    todo = [start]
    with _PARSING:
        while todo:
            name = todo.pop()
            if name in found or name.startswith(without) or not source(name).is_file():
                continue
            found.add(name)
            todo.append(name.rpartition(".")[0] or name)
            for node in ast.walk(ast.parse(source(name).read_text())):
                if isinstance(node, ast.Import):
                    todo += [a.name for a in node.names if a.name.startswith("harness")]
                elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("harness"):
                    todo += [str(node.module), *(f"{node.module}.{a.name}" for a in node.names)]
    return frozenset(found)


@cache
def harness_digest() -> str:
    """Of all that runs Cases and judges them: sources, guests, checked-in profiles, known divergences."""
    found = [p for p in ROOT.rglob("*.py") if p.relative_to(ROOT).parts[0] not in _VIEWS]
    found += [*(_CHECKOUT / "guests").iterdir(), *(_CHECKOUT / "ci" / "qemu" / "profiles").iterdir()]
    return digest_tree(_CHECKOUT, [*found, _CHECKOUT / "known_divergences.toml"])
