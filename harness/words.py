"""Numbers with their nouns, as people write them."""

from __future__ import annotations


def counted(number: int, one: str, many: str = "", form: str = "d") -> str:
    """``1 case``, ``2 cases``; ``many`` where an s is not enough (``mismatches``), ``form`` as in ``format()``."""
    return f"{number:{form}} {one if number == 1 else many or one + 's'}"


def span(seconds: float) -> str:
    """A time as people read it: ``45 s``, ``3 min 12 s``, ``1 h 05 min``."""
    whole = int(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole // 60 % 60:02d} min"
