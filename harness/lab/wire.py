"""What the runner inside the lab and the planner outside say to each other: one line a message, over one channel.

    outside -> inside                        inside -> outside
    {"job": G, "only": [I, ...] | null,      hello {...}       the KVM that was found (its name and CPUID)
     "careful": bool, "record": bool}        no-kvm TEXT       none that can be used
    {"probe": true}                          probed {...}      what it can do (Host.to_json)
    {"trace": [NAME, ...]}                   + I CHECKS ALLOWED SECONDS   Case I of the plan agreed
    {"end": true}                            executed {...}   which of the functions to trace (FunctionProfile.result):
                                                               at the end ("whole"), and now and then after a "-"
                                             - I {...}         a Finding that is not clean
                                             = I [[...], ...]  all that it showed, action by action (``record``)
                                             splat I {...}     the kernel log spoke up while Case I (-: none) ran
                                             done G            job G is finished
                                             fault TEXT        the runner itself failed

Lines arrive in the order of the job, a few Cases late; in a ``careful`` job each as soon as its Case is finished, so
that the running one is the next.
"""

from __future__ import annotations

from typing import Any, Final

from harness.case import Observation
from harness.exits import exit_from_json
from harness.lockstep import Difference, compare_registers
from harness.memory_diff import MemoryDiff
from harness.runner import Finding

CHANNEL: Final = "kvm-harness.results"
PLAN_DISK: Final = "/dev/vdc"


def observation_json(seen: Observation | None) -> dict[str, Any] | None:
    """An Observation as JSON; ``pages`` included."""
    if seen is None:
        return None
    return {
        "exit": seen.exit.to_json(),
        "sections": {name: data.hex() for name, data in seen.sections.items()},
        "pages": [[gpa, data.hex()] for gpa, data in sorted(seen.pages.items())],
        "ignore": dict(seen.ignore),
        "accept": {name: list(values) for name, values in seen.accept.items()},
        "pages_ignore": sorted(seen.pages_ignore.items()),
    }


def observation_from_json(body: dict[str, Any] | None) -> Observation | None:
    """The inverse of :func:`observation_json`."""
    if body is None:
        return None
    return Observation(
        exit_from_json(body["exit"]),
        {name: bytes.fromhex(data) for name, data in body["sections"].items()},
        {gpa: bytes.fromhex(data) for gpa, data in body["pages"]},
        body["ignore"],
        {name: tuple(values) for name, values in body["accept"].items()},
        dict(map(tuple, body["pages_ignore"])),
    )


def finding_json(finding: Finding) -> dict[str, Any]:
    """A Finding as JSON; the pages of what was seen travel along, for whoever reads guest RAM later."""
    out: dict[str, Any] = {"checks": finding.checks, "seconds": round(finding.seconds, 6)}
    out |= {"refused": finding.refused, "killed": finding.killed, "allowed": finding.allowed}
    if (d := finding.difference) is not None:
        out["difference"] = {
            "index": d.index, "action": d.action, "expected": observation_json(d.expected),
            "got": observation_json(d.got), "memory": [[m.gpa, m.expected.hex(), m.got.hex()] for m in d.memory],
        }  # fmt: skip
    return out


def finding_from_json(body: dict[str, Any]) -> Finding:
    """The inverse of :func:`finding_json`. KeyError, TypeError or ValueError when it is none."""
    difference = None
    if (d := body.get("difference")) is not None:
        expected, got = observation_from_json(d["expected"]), observation_from_json(d["got"])
        registers = compare_registers(expected, got) if expected is not None and got is not None else ()
        memory = tuple(MemoryDiff(gpa, bytes.fromhex(want), bytes.fromhex(have)) for gpa, want, have in d["memory"])
        difference = Difference(d["index"], d["action"], expected, got, registers, memory)
    return Finding(
        body["checks"], difference, body["refused"], body["killed"], body["allowed"], float(body["seconds"])
    )
