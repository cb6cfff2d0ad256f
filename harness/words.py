"""Numbers with their nouns, as people write them."""

from __future__ import annotations


def counted(number: int, one: str, many: str = "", form: str = "d") -> str:
    """``1 case``, ``2 cases``; ``many`` where an s is not enough (``mismatches``), ``form`` as in ``format()``."""
    return f"{number:{form}} {one if number == 1 else many or one + 's'}"
