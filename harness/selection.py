"""The ``-k`` expression: pytest's, in which the names of Cases may stand as they are.

pytest's grammar has no ``@`` and no ``#``, so both are written as brackets, in the expression and in an alias of every
Case's name: ``gpr/mov@long#0`` is ``gpr/mov[long]0`` there. Expressions are checked here, because with worker processes
pytest would report a wrong one as an internal error.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Final

_ALIAS: Final = str.maketrans("@#", "[]")
_TOKEN: Final = re.compile(r"[()]|[^\s()]+")
_IDENTIFIER: Final = re.compile(r"[\w:+\-.\[\]\\/@#]+")
_WORDS: Final = ("and", "or", "not")
_HINT: Final = "give parts of Case names, joined by and, or, not and parentheses: 'mmio and not @real#'"


class SelectionError(ValueError):
    """An expression is none; the text says where, and what one looks like."""


def alias(name: str) -> str:
    """A Case's name, or an expression, in pytest's alphabet."""
    return name.translate(_ALIAS)


def check(expression: str | None) -> None:
    """Raise SelectionError unless it is an expression, with something in it; None, where none was given, is right.

    To pytest an empty one is everything, but a user who gives it has most likely left a variable unset.
    """
    if expression is None:
        return
    if not expression.strip():
        raise SelectionError(f"-k {expression!r} is empty: leave -k out to select everything, or {_HINT}")
    _parse(expression)


def nothing_matches(expression: str | None, names: Iterable[str], listing: str) -> str:
    """What to say where no Case is selected of those with ``names``; ``listing`` is the command that lists them."""
    families = dict.fromkeys(name.partition("/")[0] for name in names)
    return (
        f"no Case matches -k {expression!r}: names look like alu/add_rr_b@long#0, and {listing} lists all of them; "
        f"families: {', '.join(families)}"
    )


def selected(expression: str | None, names: Sequence[str], listing: str) -> list[str]:
    """Those of ``names`` that an expression selects, all without one. SelectionError when there is none."""
    check(expression)
    selects = matcher(expression or "")
    chosen = [name for name in names if selects(name)]
    if not chosen:
        raise SelectionError(nothing_matches(expression, names, listing))
    return chosen


def matcher(expression: str) -> Callable[[str], bool]:
    """Whether a Case's name is selected, as pytest decides: each word a part of it, in any case. SelectionError."""
    words, tree = _parse(expression)

    def selects(name: str) -> bool:
        low = name.lower()
        return tree is None or _holds(tree.body, [word.lower() in low for word in words])

    return selects


def _holds(node: ast.expr, found: list[bool]) -> bool:
    match node:
        case ast.BoolOp(op=ast.And()):
            return all(_holds(part, found) for part in node.values)
        case ast.BoolOp():
            return any(_holds(part, found) for part in node.values)
        case ast.UnaryOp():
            return not _holds(node.operand, found)
        case ast.Name(id=name):
            return found[int(name[1:])]
    raise TypeError(f"not an expression of words: {node!r}")


def _parse(expression: str) -> tuple[list[str], ast.Expression | None]:
    """The words of an expression, and the expression with ``x0``, ``x1`` ... in their place; None if it is empty."""
    words: list[str] = []
    python: list[str] = []
    for token in _TOKEN.finditer(expression):
        text = token[0]
        if text in ("(", ")", *_WORDS):
            python.append(text)
            continue
        good = _IDENTIFIER.match(text)
        end = good.end() if good else 0
        if end < len(text):
            raise SelectionError(f"-k {expression!r}: {text[end]!r} (column {token.start() + end + 1}): {_HINT}")
        python.append(f"x{len(words)}")
        words.append(text)
    if not python:
        return words, None  # everything
    tree: ast.Expression | None
    try:
        tree = ast.parse(" ".join(python), mode="eval")
    except (SyntaxError, RecursionError, MemoryError):
        tree = None
    allowed = (ast.Expression, ast.BoolOp, ast.UnaryOp, ast.Name, ast.And, ast.Or, ast.Not, ast.Load)
    if tree is None or not all(isinstance(node, allowed) for node in ast.walk(tree)):
        raise SelectionError(f"-k {expression!r}: {_HINT}")
    return words, tree
