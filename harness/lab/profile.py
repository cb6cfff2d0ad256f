"""What a lab cell (configuration x kernel series) is expected to be able to do: checked in, not probed.

In the lab the hardware is ours. What a profile has and a probe of the running kernel does not show is *regressed*.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from harness.case import Case
from harness.cpuid import CpuProfile
from harness.host import delivered_vector, faulting_code, instruction_name, missing
from harness.judge import Read
from harness.lab.errors import LabError
from harness.lockstep import Difference
from harness.state import bit_names

FOLDER: Final = Path(__file__).resolve().parent.parent.parent / "ci" / "qemu" / "profiles"
FORMAT: Final = 1
_IDLE: Final = {"kvm_amd": frozenset({"KVM_CAP_SGX_ATTRIBUTE"})}
"""Capabilities that follow the kernel's configuration alone, and mean nothing with this module: no SGX with SVM."""
_MASKS: Final = frozenset(
    f"KVM_CAP_{name}" for name in (
        "ADJUST_CLOCK", "DISABLE_QUIRKS2", "EXIT_HYPERCALL", "GUEST_MEMFD_FLAGS", "MANUAL_DIRTY_LOG_PROTECT2",
        "MEMORY_ATTRIBUTES", "SET_GUEST_DEBUG2", "SYNC_REGS", "VM_TYPES", "X2APIC_API", "X86_DISABLE_EXITS", "XEN_HVM",
    )
)  # fmt: skip
"""Capabilities whose value is a set of bits, each something that KVM can do (api.rst)."""
# What configurations ask KVM for, and what it gives up by itself where it thinks that the hardware has it not.
_ASKED: Final = ("kvm_amd.npt", "kvm.force_emulation_prefix")
_GIVEN_UP: Final = ("kvm_amd.nested", "kvm_amd.vgif")
_UD: Final = 6
_APX, _APX_SIZE, _MPX = 19, 128, 0x18


@dataclass(frozen=True)
class Profile:
    """A KVM as probed (``Host.to_json`` with its CPUID) or as checked in.

    ``lacks`` are instructions that its emulator is known not to have, as ``0f c7 in long``. ``outcomes``: how Cases end
    today that a KVM with more support would run (:func:`harness.judge.outcome`), a line each.
    """

    cell: str
    module: str
    vendor: str
    parameters: Mapping[str, str]
    capabilities: Mapping[str, int]
    modes: Mapping[str, str]
    delivery: Mapping[str, str]
    traits: Mapping[str, str]
    single_step: Mapping[str, bool]
    cpuid: CpuProfile
    lacks: frozenset[str] = frozenset()
    outcomes: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def features(self) -> frozenset[str]:
        """Named CPU features of the guest CPUID; ``fep`` where KVM emulates on demand."""
        forced = self.parameters.get("kvm.force_emulation_prefix", "0") not in ("0", "N")
        return self.cpuid.features | ({"fep"} if forced else frozenset())

    def unsupported(self, case: Case) -> str:
        """Why this cell cannot run ``case`` at all, or an empty string."""
        return missing(case, self)

    def excuse(self, case: Case, difference: Difference, read: Read) -> str:
        """The instruction that this cell's emulator is known to lack, or an empty string."""
        what = refused_instruction(case, difference, read)
        return f"this KVM's emulator lacks {what}" if what in self.lacks else ""

    def lost(self, now: Profile) -> list[str]:
        """What this profile has and ``now`` has not, a line each: regressions."""
        idle = _IDLE.get(self.module, frozenset())
        out = [f"capability {name}" for name in self.capabilities if name not in now.capabilities and name not in idle]
        for name in sorted(_MASKS & self.capabilities.keys() & now.capabilities.keys()):
            if bits := self.capabilities[name] & ~now.capabilities[name]:
                out.append(f"capability {name}: bits {bits:#x}")
        out += self._parameters_lost(now)
        out += [f"CPU feature {name} in the guest CPUID" for name in sorted(self.features - now.features)]
        gone = self.cpuid.xcr0_supported & ~now.cpuid.xcr0_supported
        out += [f"state component {name} in XCR0" for name in bit_names("xcr0", gone)]
        for what, mine, its in (
            ("mode", self.modes, now.modes), ("trait", self.traits, now.traits),
            ("exception delivery in", self.delivery, now.delivery),
        ):  # fmt: skip
            worse = {name: its.get(name, "gone") for name, bad in mine.items() if not bad}
            out += [f"{what} {name}: {seen}" for name, seen in worse.items() if seen]
        out += [f"single step in {m}" for m, works in self.single_step.items() if works and not now.single_step.get(m)]
        return out

    def _parameters_lost(self, now: Profile) -> Iterator[str]:
        """Module parameters that are not as they were asked for, or off and were on."""
        for name in (*_ASKED, *_GIVEN_UP):
            mine, its = self.parameters.get(name, ""), now.parameters.get(name, "gone")
            if mine and (_on(mine) != _on(its) if name in _ASKED else _on(mine) and not _on(its)):
                yield f"parameter {name}: {its}, not {mine}"

    def contradictions(self) -> list[str]:
        """What the CPUID that this KVM offers says twice, and not alike (APX specification 3.1.4.1), a line each."""
        xcr0, component = self.cpuid.xcr0_supported, self.cpuid.leaf(0xD, _APX)
        out = []
        if "apx" in self.features and not xcr0 >> _APX & 1:
            out.append("APX in CPUID without XCR0[19]: no guest can use R16-R31")
        if "apx" not in self.features and xcr0 >> _APX & 1:
            out.append("XCR0[19] without APX in CPUID")
        if xcr0 >> _APX & 1 and (xcr0 & _MPX or "mpx" in self.features):
            out.append("XCR0[19] together with MPX")
        if xcr0 >> _APX & 1 and (component is None or component.eax != _APX_SIZE):
            out.append("XCR0[19] without state component 19 of 128 bytes, R16-R31")
        return out

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return {
            "profile": FORMAT, "cell": self.cell, "module": self.module, "vendor": self.vendor,
            "parameters": dict(self.parameters), "features": sorted(self.features),
            "capabilities": dict(sorted(self.capabilities.items())), "modes": dict(self.modes),
            "delivery": dict(self.delivery), "traits": dict(self.traits), "single_step": dict(self.single_step),
            "lacks": sorted(self.lacks), "outcomes": dict(sorted(self.outcomes.items())), "cpuid": self.cpuid.rows,
        }  # fmt: skip

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> Profile:
        """The inverse of :meth:`to_json`. KeyError, TypeError or ValueError when it is none."""
        if body["profile"] != FORMAT:
            raise ValueError(f"a profile of format {body['profile']}")
        keys = ("cell", "module", "vendor", "parameters", "capabilities", "modes", "delivery", "traits", "single_step")
        return cls(
            **{key: body[key] for key in keys},
            cpuid=CpuProfile.from_rows(body["cpuid"]),
            lacks=frozenset(body["lacks"]),
            outcomes=body.get("outcomes", {}),
        )

    @classmethod
    def probed(cls, cell: str, hello: Mapping[str, Any], probe: Mapping[str, Any]) -> Profile:
        """What the runner inside found: its greeting and the answer to ``probe``."""
        return cls(
            cell, str(hello["module"]), probe["vendor"], hello["parameters"], probe["capabilities"], probe["modes"],
            probe["exception_delivery"], probe["traits"], probe["single_step"], CpuProfile.from_rows(hello["cpuid"]),
        )  # fmt: skip


def _on(value: str) -> str:
    """A parameter's value, empty for off: a bool is Y or N where a number is 1 or 0."""
    return {"Y": "1", "N": "", "0": ""}.get(value, value)


def refused_instruction(case: Case, difference: Difference, read: Read) -> str:
    """What KVM would not emulate where the model does execute it, as ``0f 02 in long``; else an empty string.

    It says so by an internal error, or by #UD where the instruction came through the force-emulation prefix.
    """
    got = difference.got
    if got is None:
        return ""
    code = getattr(got.exit, "code", b"")
    if not code and delivered_vector(got) == _UD and delivered_vector(difference.expected) != _UD:
        code = faulting_code(case, got, read)
    mode = next((r.removeprefix("mode:") for r in case.requires if r.startswith("mode:")), "real")
    return f"{instruction_name(code, case.bits)} in {mode}" if code else ""


def profile_path(configuration: str, series: str) -> Path:
    """Where the profile of a cell is checked in."""
    return FOLDER / f"{configuration}@{series}.json"


def load_profile(configuration: str, series: str) -> Profile | None:
    """The checked-in profile of a cell; for an unknown series that of the newest older one; None without any."""
    path = profile_path(configuration, series)
    if not path.is_file():
        known = {p.stem.partition("@")[2]: p for p in FOLDER.glob(f"{configuration}@*.json")}
        older = [s for s in known if _version(s) <= _version(series)]
        if not older:
            return None
        path = known[max(older, key=_version)]
    try:
        return Profile.from_json(json.loads(path.read_text()))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LabError(f"{path}: no usable profile ({error}): make it anew with `lab run --write-profile`") from error


def _version(series: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", series)[:2])


def write_profile(configuration: str, series: str, profile: Profile) -> Path:
    """Check in what a cell showed. Who does so has looked at the differences."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    path = profile_path(configuration, series)
    body = profile.to_json()
    rows = body.pop("cpuid")
    text = json.dumps(body, indent=1)[:-2] + ',\n "cpuid": [\n  '
    path.write_text(text + ",\n  ".join(json.dumps(row) for row in rows) + "\n ]\n}\n")
    return path
