"""What options take, for argparse: anything else is refused with what to give."""

from __future__ import annotations

import argparse


def positive(text: str) -> int:
    """A whole number of 1 and more."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text}: give a number, 1 or more")
    return int(text)


def minutes(text: str) -> float:
    """A span of time, more than nothing."""
    try:
        found = float(text)
    except ValueError:
        found = 0.0
    if not 0 < found < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: give minutes, as in 90")
    return found
