"""What a probe of the host found, for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

# Trait of harness/host.py -> what is asked.
_ASKED: Final = {
    "iopl-at-long-cpl3": "64-bit CPL3 with IOPL 0: OUT raises #GP",
    "iopl3-at-long-cpl3": "64-bit CPL3 with IOPL 3: OUT is executed",
    "selectors-at-long-cpl3": "64-bit CPL3: MOV from CS shows the guest's selector",
    "rflags-at-long-cpl3": "64-bit CPL3: PUSHF shows the guest's RFLAGS",
    "cr1-at-long-cpl3": "64-bit CPL3: MOV from CR1 raises #UD",
    "cpuid-at-long-cpl3": "64-bit CPL3: CPUID shows the guest's leaves",
    "icebp-at-long-cpl3": "64-bit CPL3: the #DB of ICEBP saves the RIP after it",
    "iret-in-compat": "compatibility mode: IRET works",
    "cpuid-leaf-1": "CPUID leaf 1 shows what KVM_SET_CPUID2 set",
    "cpuid-leaf-7": "CPUID leaf 7 shows what KVM_SET_CPUID2 set",
    "pat-reserved-types": "WRMSR of a reserved memory type to PAT raises #GP",
    "hypercall": "a hypercall with KVM_CAP_EXIT_HYPERCALL returns to the guest or leaves for userspace",
    "irq-window": "KVM tells when an interrupt can be injected (KVM_EXIT_IRQ_WINDOW_OPEN)",
    "smm": "there is a system management mode, with memory of its own (KVM_CAP_X86_SMM)",
}
_GOOD, _ODD = "good", "odd "


def probe_text(host: str, found: Mapping[str, Any]) -> str:
    """The lines of ``kvm-harness probe``; ``found`` is :meth:`harness.host.Host.to_json`."""
    return "\n".join(_lines(host, found))


def _lines(host: str, found: Mapping[str, Any]) -> Iterator[str]:
    yield f"host          {host}"
    yield f"device        {found['device']}, {len(found['capabilities'])} capabilities"
    yield f"guest CPU     {found['vendor']}, {len(found['features'])} known features, APX: {_yes(found['apx'])}"
    yield ""
    yield "Modes: whether a guest runs in them, and whether KVM_GUESTDBG_SINGLESTEP stops after each instruction"
    for mode, bad in found["modes"].items():
        step = bad or f"single step: {_yes(found['single_step'][mode])}"
        yield f"  {mode:12s} {'runs' if not bad else 'no'}; {step}"
    yield ""
    yield "Exceptions: whether the handler finds what the architecture says (Cases that end otherwise are skipped)"
    for mode, odd in found["exception_delivery"].items():
        yield f"  {_ODD if odd else _GOOD}  {mode:12s} {odd}".rstrip()
    if found["emulator_lacks"]:
        yield ""
        yield "Instructions that this KVM's emulator says it lacks (Cases that need them are skipped)"
        for name, modes in found["emulator_lacks"].items():
            yield f"  {name:12s} in {', '.join(modes)}"
    if found["traits"]:
        yield ""
        yield "Behaviours that some Cases rely on (where one is odd, those are skipped)"
        for name, odd in found["traits"].items():
            yield f"  {_ODD if odd else _GOOD}  {_ASKED.get(name, name)}"
            if odd:
                yield f"        here: {odd}"


def _yes(value: object) -> str:
    return "yes" if value else "no"
