"""Guests of guests: L1 runs L2 by VMRUN, and every register must be right on both sides of each transition.

L2 is either in L1's own mode (``same``), there but at addresses of 64 bits (``high``), or in 32-bit code with PAE
paging on tables of its own (``pae``). The VMCB lies in RAM, and so is compared at every exit like any other page.
Layout beyond that of harness/modes.py: 0x20000 VMCB, 0x23000 page tables of L2, 0x27000 the top of L2's stack, 0x28000
I/O permissions, 0x2C000 MSR permissions. The host's save area is where no RAM is: its contents are nobody's business.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final

from harness import vmcb
from harness.case import Blob, Case, Slot, VmShape
from harness.cpuid import CpuProfile
from harness.modes import FLAT_LIMIT, SEL_CODE32, SEL_FLAT, bits_of
from harness.paths.common import Family, cases, guest_for
from harness.state import CpuState, Segment

VMCB: Final = 0x20000
_TABLES, _STACK, _IOPM, _MSRPM = 0x23000, 0x27000, 0x28000, 0x2C000
_SHAPE: Final = VmShape((Slot(0, 0x30000),))
_FAMILY: Final = Family("nested", ("long", "pae"), features=frozenset({"svm"}))
_SVME: Final = 1 << 12
_HIGH: Final = 0xFFFF800000000000
_L1_PDPT: Final = 0x6000  # of the long modes (harness/modes.py)
_NE, _PG_PE = 1 << 5, 1 << 31 | 1
_STALE: Final = 0x5A5A5A5A5A5A5A5A  # in fields that #VMEXIT writes
_LARGE_USER: Final = 0xE7  # present, writable, user, accessed, dirty, 2 MiB


@dataclass(frozen=True)
class _L2:
    """What leaves L2, and what is odd about its VMCB. ``cr``, ``dr``: (reads, writes) by number."""

    exits: tuple[str, ...] = ("vmmcall",)
    exceptions: tuple[int, ...] = ()
    cr: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
    dr: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
    ports: tuple[int, ...] = ()
    msrs: tuple[int, ...] = ()  # bits of the permission map
    event: int = 0
    over: tuple[tuple[int, int], ...] = ()  # (offset, value of 8 bytes), over all that
    kinds: tuple[str, ...] = ("same", "high", "pae")


def _bit(msr: int, write: bool) -> int:
    first, offset = next((f, o) for f, o in vmcb.MSR_RANGES if f <= msr < f + 0x2000)
    return 8 * offset + 2 * (msr - first) + write


_PLAIN: Final = _L2()
_IN_OWN_TABLES: Final = ("same", "high")  # where the page that is not present is not, and L1's IDT is one for L2
_VALID_EVENT: Final = 1 << 31
_ENTRIES: Final[dict[str, _L2]] = {
    "cpuid": _L2(("cpuid",)),
    "hlt": _L2(("hlt",)),
    "hlt_leaves_for_userspace": _PLAIN,
    "out": _L2(("ioio",), ports=(0x10,)),
    "out_dx": _L2(("ioio",), ports=(0x8767,)),
    "in": _L2(("ioio",), ports=(0x13,)),
    "out_runs": _L2(("ioio", "vmmcall"), ports=(0x11, 0x24)),
    "in_runs": _PLAIN,
    "rdmsr": _L2(("msr",), msrs=(_bit(0xC0000081, False),)),
    "wrmsr": _L2(("msr",), msrs=(_bit(0x174, True),)),
    "rdmsr_runs": _L2(("msr", "vmmcall"), msrs=(_bit(0xC0000080, True),)),
    "cr0_read": _L2((), cr=((0,), ())),
    "cr0_write": _L2((), cr=((), (0,))),
    "cr3_write": _L2((), cr=((), (3,))),
    "cr4_read": _L2((), cr=((4,), ())),
    "dr7_read": _L2((), dr=((7,), ())),
    "dr0_write": _L2((), dr=((), (0,))),
    "wbinvd": _L2(("wbinvd",)),
    "invlpg": _L2(("invlpg",)),
    "pushf": _L2(("pushf",)),
    "sidt": _L2(("sidt",)),
    "ud": _L2(exceptions=(6,)),
    "gp": _L2(exceptions=(13,)),
    "divide": _L2(exceptions=(0,)),
    "page_fault": _L2(exceptions=(14,), kinds=_IN_OWN_TABLES),
    "page_fault_store": _L2(exceptions=(14,), kinds=_IN_OWN_TABLES),
    "ud_runs": _L2(("hlt",), kinds=("same",)),
    "twice": _L2(("vmmcall", "cpuid")),
    "invalid_asid": _L2(over=((vmcb.CONTROL["asid"][0], 0),), kinds=("same",)),
    "invalid_intercept": _L2(over=((vmcb.CONTROL["intercepts1"][0], 0),), kinds=("same",)),
    "invalid_svme": _L2(over=((vmcb.REGISTERS["efer"], 0xD00),), kinds=("same",)),
    "invalid_cr0": _L2(over=((vmcb.REGISTERS["cr0"], 0xA0000031),), kinds=("same",)),
    "invalid_cr0_high": _L2(over=((vmcb.REGISTERS["cr0"], 0x180000031),), kinds=("same",)),
    "invalid_dr7": _L2(over=((vmcb.REGISTERS["dr7"], 0x100000400),), kinds=("same",)),
}
_INJECTED: Final = {
    "inject_ud": 3 << 8 | 6, "inject_gp": 0x1234 << 32 | 1 << 11 | 3 << 8 | 13, "inject_interrupt": 0x91,
}
_NO_L2: Final = ("vmrun_", "vmload", "vmsave", "stgi")


def nested_cases(profile: CpuProfile) -> Iterator[Case]:
    """The Cases of this family: ``nested/KIND_ENTRY@MODE``, KIND being L2's and MODE L1's; ``l1`` without an L2."""
    for case in cases(_FAMILY, profile):
        entry, _, where = case.name.partition("/")[2].partition("@")
        case = replace(case, shape=_SHAPE, requires=case.requires | {"svm"})
        if entry.startswith(_NO_L2):
            yield _made(case, f"l1_{entry}@{where}", case.start, _PLAIN)
            continue
        for name, l2 in _variants(entry):
            for kind in l2.kinds:
                state = _l2_state(case, kind, entry)
                if state is not None:
                    yield _made(case, f"{kind}_{name}@{where}", state, l2)


def _variants(entry: str) -> Iterator[tuple[str, _L2]]:
    if entry == "inject":
        for name, event in _INJECTED.items():
            yield name, _L2(("hlt",), event=event | _VALID_EVENT, kinds=("same",))
    else:
        yield entry, _ENTRIES.get(entry, _PLAIN)


def _l2_state(case: Case, kind: str, entry: str) -> CpuState | None:
    """What L2 starts with, None where L1's mode has no such L2."""
    mode = next(r for r in case.requires if r.startswith("mode:")).removeprefix("mode:")
    wide = bits_of(mode) == 64
    symbols = guest_for(_FAMILY.source, mode).symbols
    if (kind != "same" and not wide) or (kind != "pae" and f"l2_{entry}" not in symbols):
        return None
    start = case.start
    gpr = (0x1122334455667788 if wide else 0x55667788, *start.gpr[1:4], _STACK, *start.gpr[5:])
    flat = Segment(selector=SEL_FLAT, limit=FLAT_LIMIT, type=3, db=1, g=1)
    state = replace(
        start, gpr=gpr, rip=symbols[f"l2_{entry}"], rflags=2, efer=start.efer | _SVME, ds=flat, es=flat,
        ss=replace(flat, selector=start.ss.selector),
    )  # fmt: skip
    if kind == "high":
        return replace(state, cr3=_TABLES, rip=state.rip | _HIGH, gpr=(*gpr[:4], _HIGH | _STACK, *gpr[5:]))
    if kind == "pae":
        code = Segment(selector=SEL_CODE32, limit=FLAT_LIMIT, type=0xB, db=1, g=1)
        return replace(
            state, cs=code, rip=symbols[f"l2pae_{entry}"], cr0=_PG_PE | _NE | 0x10, cr3=_TABLES, cr4=1 << 5,
            efer=_SVME,
        )  # fmt: skip
    return state


def _made(case: Case, name: str, l2_start: CpuState, l2: _L2) -> Case:
    memory = case.memory.plus(*_tables(l2_start), Blob(VMCB, _vmcb(l2_start, l2)), *_bitmaps(l2))
    return replace(case, name=f"nested/{name}", memory=memory)


def _vmcb(state: CpuState, l2: _L2) -> bytes:
    def numbers(pair: tuple[tuple[int, ...], tuple[int, ...]]) -> int:
        reads, writes = (sum(1 << n for n in part) for part in pair)
        return writes << 16 | reads

    page = bytearray(
        vmcb.block(
            state, cr_intercepts=numbers(l2.cr), dr_intercepts=numbers(l2.dr), iopm=_IOPM, msrpm=_MSRPM, asid=1,
            exceptions=sum(1 << n for n in l2.exceptions), event_injection=l2.event, exit_code=_STALE,
            exit_info1=_STALE, exit_info2=_STALE, **vmcb.intercepts("vmrun", *l2.exits),
        )
    )  # fmt: skip
    for at, value in l2.over:
        page[at : at + 8] = value.to_bytes(8, "little")
    return bytes(page)


def _tables(state: CpuState) -> list[Blob]:
    """Page tables of L2, if it has its own: L1's memory at two places, or the first 2 MiB by PAE."""
    if state.cr3 != _TABLES:
        return []
    if state.efer & 0x400:
        top = bytearray(4096)
        for index in (0, 256):
            top[8 * index : 8 * index + 8] = (_L1_PDPT | 0x27).to_bytes(8, "little")
        return [Blob(_TABLES, bytes(top))]
    directory = (_TABLES + 0x1000 | 1).to_bytes(8, "little")
    return [Blob(_TABLES, directory.ljust(32, b"\0")), Blob(_TABLES + 0x1000, _LARGE_USER.to_bytes(8, "little"))]


def _bitmaps(l2: _L2) -> list[Blob]:
    out = []
    for base, bits in ((_IOPM, l2.ports), (_MSRPM, l2.msrs)):
        out += [Blob(base + bit // 8, bytes([1 << bit % 8])) for bit in bits]
    return out

