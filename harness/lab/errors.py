"""What can go wrong in the lab, apart from the kernel under test. Every text says what to do next."""

from __future__ import annotations

from harness.verdict import BAD_INPUT, Verdict


class LabError(Exception):
    """Our infrastructure failed: never a verdict on the kernel. ``status`` is the exit status (lost: 4)."""

    status = Verdict.LOST.status


class LabInputError(LabError):
    """What the user gave cannot be used: a file that is no kernel, a tree that is none, an unknown configuration."""

    status = BAD_INPUT


class NoKvmError(LabError):
    """The kernel under test has booted, and has no KVM that can be used."""


class LostError(LabError):
    """The machine under our kernel died, or fell silent before the suite began."""
