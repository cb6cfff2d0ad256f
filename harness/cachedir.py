"""Where the harness keeps what can be made again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_directory() -> Path:
    """``$KVM_HARNESS_CACHE``, or ``kvm-harness`` in the user's cache directory (XDG Base Directory Specification)."""
    if override := os.environ.get("KVM_HARNESS_CACHE"):
        return Path(override).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "kvm-harness"
