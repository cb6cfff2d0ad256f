"""Which Cases a cell runs, and the plan for them: made once, found again by what it was made from."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from harness.case import Case
from harness.guest import GUESTS_DIR
from harness.lab.cache import Progress, cached, digest, digest_tree, prune
from harness.lab.configurations import Configuration
from harness.lab.errors import LabInputError
from harness.lab.plan import Plan, read_plan, write_plan
from harness.lab.profile import Profile
from harness.lab.sources import ROOT, closure, source

TIERS: Final = ("smoke", "full")
KEPT: Final = 48
"""Plans that stay in the cache, of 20 to 150 MB each: two tiers of a dozen cells, before and after a change."""
_FINDERS: Final = ("harness.lab.cache", "harness.lab.debian")  # they only find what was planned


def plan_key(configuration: Configuration, profile: Profile, tier: str) -> str:
    """Changes with all that decides what a plan holds.

    These are the guests, the sources of planner, paths and model with all that they import, the guest CPUID and what
    the profile says of the KVM's abilities.
    """
    if tier not in TIERS:
        raise LabInputError(f"no tier {tier!r}: use {' or '.join(TIERS)}")
    return digest(
        digest_tree(ROOT, map(source, closure(__name__, _FINDERS))),
        digest_tree(GUESTS_DIR, (p for p in GUESTS_DIR.iterdir() if p.is_file())),
        profile.cpuid.digest, repr(sorted(profile.features)), str(configuration.forced), tier,
        repr([sorted(d.items()) for d in (profile.modes, profile.traits, profile.delivery)]),
    )  # fmt: skip


def cell_plan(configuration: Configuration, profile: Profile, tier: str, progress: Progress) -> Plan:
    """The plan of a cell: every Case of the tier that its KVM can run, with what the model expects."""
    key = plan_key(configuration, profile, tier)

    def make(folder: Path) -> None:
        progress(f"planning: the model runs every Case of tier {tier} for {configuration.name}")
        cases, skipped = [], []
        for case in cell_cases(configuration, profile, tier):
            if reason := profile.unsupported(case):
                skipped.append((case.name, case.id, reason))
            else:
                cases.append(case)
        write_plan(folder / "plan", key, cases, skipped)

    folder = cached("plan", key, make)
    os.utime(folder)  # used now
    prune("plan", KEPT)
    return read_plan(folder / "plan")


def cell_cases(configuration: Configuration, profile: Profile, tier: str) -> Iterable[Case]:
    """Every Case of the tier in a cell, those that its KVM cannot run included."""
    from harness.paths import all_cases, forced_cases

    found = forced_cases(profile.cpuid) if configuration.forced else all_cases(profile.cpuid)
    return found if tier == "full" else smoke(found)


def smoke(cases: Iterable[Case]) -> list[Case]:
    """One Case of each entry, in a mode that the entry's name chooses: every access path, every mode, in seconds."""
    entries: dict[str, list[Case]] = {}
    for case in cases:
        if not any(need == "apx" for need in case.requires) or "apx" in case.profile.features:
            entries.setdefault(case.name.partition("@")[0], []).append(case)
    return [found[zlib.crc32(name.encode()) % len(found)] for name, found in entries.items()]
