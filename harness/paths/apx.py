"""KVM's interface to R16-R31 (EGPRs): they live in XSAVE component 19, and every way in or out may lose them.

What is done: exits of every kind, KVM_GET/SET_XSAVE and XSAVE2 with XSTATE_BV[19] set and clear, XCR0[19] off and on by
guest and userspace, a fresh VM, another vCPU with or without APX in between, signals, R16 beside RIP. Api.rst 4.42,
4.43 (KVM_GET_XSAVE, KVM_SET_XSAVE), 4.134 (KVM_GET_XSAVE2), section 5; APX specification 3.1.4.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Final

from harness.case import (
    CAP_EXIT_HYPERCALL,
    CAP_USER_SPACE_MSR,
    Action,
    Case,
    Complete,
    Inject,
    Kick,
    Other,
    Run,
    SaveRestore,
    SetState,
    Show,
    Step,
    Switch,
    Try,
    VmShape,
)
from harness.cpuid import CpuProfile, without_apx
from harness.modes import setup
from harness.paths.common import Family, cases, guest_for, start_state

_SOURCE: Final = Family("apx_exits", ("long",), features=frozenset({"apx"}))
_OFF: Final = Family("apx_off", ("long", "long-user"))
_ALL: Final = Run(64)

_ON, _BARE = 0x80003, 3  # XCR0 with x87 and SSE state, with and without APX's
_MPX: Final = 0x18
_R16: Final = (("r16", 0x1616161616161616), ("r23", 0x2323232300000001), ("r31", 1 << 63))
_EVERY: Final = tuple((f"r{n}", n * 0x0101010101010101) for n in range(16, 32))
_XCR0_OFF: Final = SetState((("xcr0", _BARE),), "sregs")
_XCR0_ON: Final = SetState((("xcr0", _ON),), "sregs")
_RIP: Final = 0x123456  # where nothing is: what R16 must not become

# MSRs that do not exist go to userspace (KVM_MSR_EXIT_REASON_UNKNOWN); so does KVM_HC_MAP_GPA_RANGE.
_MSR_EXITS: Final = VmShape(caps=((CAP_USER_SPACE_MSR, (2,)),))
_HYPERCALLS: Final = VmShape(caps=((CAP_EXIT_HYPERCALL, (1 << 12,)),))
_SHAPES: Final = {"rdmsr": _MSR_EXITS, "wrmsr": _MSR_EXITS, "hypercall": _HYPERCALLS}
_EXITS: Final = (
    "out", "in", "mmio_store", "mmio_load", "halt", "rdmsr", "wrmsr", "hypercall",
)  # fmt: skip
_WITHOUT: Final = ("cpuid", "rdmsr_kernel", "wrmsr_kernel", "xsetbv")
"""Entries in whose middle there is no exit to userspace, or that bring their own."""

# What happens at the exit, after which the guest goes on.
_AT_EXIT: Final[dict[str, tuple[Action, ...]]] = {
    "plain": (_ALL,),
    "pending": (Run(1, complete=False), Complete(), _ALL),
    "save_restore": (Run(), SaveRestore(), _ALL),
    "set_xsave": (Run(), SetState(_R16, "xsave"), Show("xsave"), Show("xsave2"), _ALL),
    "set_xsave_init": (Run(), SetState(_EVERY, "xsave-init"), Show("xsave"), Show("xsave2"), _ALL),
    "set_after_init": (Run(), SetState(_EVERY, "xsave-init"), SetState(_R16, "xsave"), _ALL),
    "set_regs": (Run(), SetState((("rbp", 0x5A5A1234), ("rdx", 0x0BADCAFE))), _ALL),
    "sync_regs": (Run(), SetState((("rbp", 0x5A5A1234), ("rdx", 0x0BADCAFE)), "sync"), _ALL),
    "set_sregs": (Run(), SetState((("cr2", 0x12345000),), "sregs"), _ALL),
    "rip_beside_r16": (
        Run(), SetState((("rip", _RIP),)), Show(), SetState(_R16[:1], "xsave"), Show("xsave2"), SaveRestore(), Show(),
    ),
    "xcr0_off": (Run(), _XCR0_OFF, Show("xsave"), Show("xsave2"), _ALL),
    "xcr0_off_on": (Run(), _XCR0_OFF, _XCR0_ON, _ALL),
    "xcr0_off_saved": (Run(), _XCR0_OFF, SaveRestore(), _XCR0_ON, _ALL),
    "xcr0_off_set": (Run(), _XCR0_OFF, SetState(_EVERY, "xsave"), Show(), _XCR0_ON, _ALL),
    "xcr0_with_mpx": (Run(), Try((("xcr0", _ON | _MPX),)), Show(), _ALL),
    "xcr0_with_half_mpx": (Run(), Try((("xcr0", _ON | 8),)), _ALL),
    "xcr0_without_x87": (Run(), Try((("xcr0", _ON & ~1),)), _ALL),
    "xcr0_apx_alone": (Run(), Try((("xcr0", _ON & ~2),)), _ALL),
    "exception": (Run(), Inject("exception", 6), _ALL),
    "nmi": (Run(), Inject("nmi"), _ALL),
}  # fmt: skip
# The entries that see all of it; the others see the first few.
_FEW: Final = ("plain", "pending", "save_restore", "set_xsave", "set_xsave_init", "rip_beside_r16")
_MOST: Final = ("out", "mmio_load", "halt")


def apx_exit_cases(profile: CpuProfile) -> Iterator[Case]:
    """The Cases of this family; their names start with ``apx_exits/``, then comes what userspace does."""
    found = {case.name.partition("/")[2].partition("@")[0]: case for case in cases(_SOURCE, profile)}
    for entry in _EXITS:
        case = replace(found[entry], shape=_SHAPES.get(entry, VmShape()))
        for name in _AT_EXIT if entry in _MOST else _FEW:
            if (entry, name) != ("halt", "pending"):
                yield _named(case, name, (*_AT_EXIT[name], *((_ALL,) if (entry, name) == ("halt", "plain") else ())))
    for name in ("plain", "pending"):  # two exits of one instruction: nothing may be done between them
        yield _named(found["mmio_add"], name, _AT_EXIT[name])
    yield _named(found["rep_ins"], "plain", (_ALL,))  # how many items an exit holds is KVM's choice
    for entry in _WITHOUT:
        yield _named(found[entry], "plain", (_ALL,))
    yield _named(found["step"], "step", (Step(4), _ALL))
    yield from _first_enable(found)
    yield from _kicked(found["spin"])
    yield from _two_vcpus(found, profile)


def _named(case: Case, what: str, actions: tuple[Action, ...]) -> Case:
    family, _, entry = case.name.partition("/")
    return replace(case, name=f"{family}/{what}/{entry}", actions=actions)


def _first_enable(found: dict[str, Case]) -> Iterator[Case]:
    """XCR0[19] has never been set: R16-R31 are zero, unless userspace has put something there."""
    for entry, on in (("first_enable", ()), ("enable_late", (_XCR0_ON,))):
        case = found[entry]
        start = replace(case.start, xcr0=_BARE)
        zero = replace(start, gpr=start.gpr[:16] + (0,) * 16)
        yield _named(replace(case, start=zero), "zero", (*_late(entry), *on, _ALL))
        yield _named(replace(case, start=start), "set_before", (*_late(entry), *on, _ALL))


def _late(entry: str) -> tuple[Action, ...]:
    return (Run(),) if entry == "enable_late" else ()


def _kicked(case: Case) -> Iterator[Case]:
    """A signal ends KVM_RUN while the guest's registers are in the processor."""
    go_on = (SetState((("rip", guest_for(_SOURCE.source, "long").symbols["after_spin"]),)), _ALL)
    for name, actions in {
        "signal": (Kick(), Kick(), Show("xsave2"), *go_on),
        "signal_save": (Kick(), SaveRestore(), Kick(), *go_on),
        "signal_set": (Kick(), SetState(_R16, "xsave"), Kick(), *go_on),
        "signal_init": (Kick(), SetState(_EVERY, "xsave-init"), Kick(), *go_on),
        "signal_xcr0": (Kick(), _XCR0_OFF, Kick(), _XCR0_ON, *go_on),
    }.items():
        yield _named(case, name, actions)


def _two_vcpus(found: dict[str, Case], profile: CpuProfile) -> Iterator[Case]:
    """Another vCPU of the same VM runs in between, in the same thread: it may have other EGPRs, none, or no APX."""
    guest = guest_for(_SOURCE.source, "long")
    look, plain = guest.symbols["partner_look"], guest.symbols["partner_plain"]
    base, bare = setup("long", entry=0, profile=profile), without_apx(profile)
    full = start_state(base, look, 0x415058, apx=True)
    partners = {
        "apx": Other(full),
        "zero": Other(replace(start_state(base, plain, 1), gpr=(*full.gpr[:16], *(0,) * 16))),
        "off": Other(replace(full, rip=plain, xcr0=_BARE)),
        "no_apx": Other(start_state(setup("long", entry=0, profile=bare), plain, 2), bare),
    }
    for name, other in partners.items():
        for entry in _MOST:
            yield _named(
                replace(found[entry], others=(other,)), f"vcpu_{name}",
                (Run(), Switch(1), Run(), Switch(0), Show(), _ALL, Switch(1), Show("xsave2"), _ALL),
            )  # fmt: skip
        pending = (Run(1, complete=False), Switch(1), _ALL, Switch(0), Complete(), _ALL)
        yield _named(replace(found["in"], others=(other,)), f"vcpu_{name}_pending", pending)
    after = SetState((("rip", guest.symbols["after_spin"]),))
    both = replace(found["spin"], others=(Other(replace(full, rip=found["spin"].start.rip)),))
    turns = (Kick(), Switch(1), Kick(), Switch(0), Kick(), after, _ALL, Switch(1), after, _ALL)
    yield _named(both, "vcpu_signal", turns)


def apx_off_cases(profile: CpuProfile) -> Iterator[Case]:
    """A guest whose CPUID has no APX, on whatever processor: names start with ``apx_off/``. Every KVM can run them."""
    bare = without_apx(profile)
    for case in cases(_OFF, bare):
        yield case
        if case.name.startswith("apx_off/xsetbv_gp@"):
            yield _named(case, "userspace", (Try((("xcr0", _ON),)), Show(), _ALL))
