"""KVM's register map: ``enum kvm_reg`` and the registers of ``struct kvm_vcpu_arch``, and the rules for them.

The names changed over time: Linux 6.1 to 6.18 have VCPU_REGS_RIP, VCPU_EXREG_PDPTR and masks of 32 bits; 7.x has
VCPU_REG_RIP, VCPU_REG_PDPTR, bitmaps, and RIP in a member of its own. Registers are called here without those prefixes.
A rule about what a kernel does not have is not applicable; it says so.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal

from harness.series.btf import Member
from harness.words import counted

GPRS: Final = ("RAX", "RCX", "RDX", "RBX", "RSP", "RBP", "RSI", "RDI", *(f"R{n}" for n in range(8, 16)))
"""By their encodings (Intel SDM vol. 2, table 2-2; AMD APM vol. 3, table 1-10)."""
EGPRS: Final = tuple(f"R{n}" for n in range(16, 32))
_PREFIX: Final = re.compile(r"_*VCPU_(?:EX|X)?REGS?_(?=\w)")
_BOUND: Final = re.compile(r"NR_\w+")

Outcome = Literal["ok", "violated", "n/a"]


@dataclass(frozen=True)
class Layout:
    """A kernel's register map. ``ids``: register without prefix to value; ``bounds``: the enumerators that only count.

    Of the members of ``struct kvm_vcpu_arch``, None is what it does not have. ``source`` says where it was read.
    """

    source: str
    ids: Mapping[str, int]
    bounds: Mapping[str, int]
    regs: Member | None
    rip: Member | None
    avail: Member | None
    dirty: Member | None

    @classmethod
    def of(cls, source: str, enumerators: Mapping[str, int], members: Mapping[str, Member]) -> Layout:
        """From ``enum kvm_reg`` and the members of ``struct kvm_vcpu_arch``."""
        ids = {_PREFIX.sub("", name, count=1): n for name, n in enumerators.items() if not _BOUND.fullmatch(name)}
        bounds = {name: n for name, n in enumerators.items() if _BOUND.fullmatch(name)}
        parts = (members.get(name) for name in ("regs", "rip", "regs_avail", "regs_dirty"))
        return cls(source, ids, bounds, *parts)

    @property
    def members(self) -> dict[str, Member | None]:
        """Those of ``struct kvm_vcpu_arch`` by their names there."""
        return {"regs": self.regs, "rip": self.rip, "regs_avail": self.avail, "regs_dirty": self.dirty}

    @property
    def gprs(self) -> int:
        """How many general-purpose registers it has: 16, or 32 with APX."""
        return 32 if any(name in self.ids for name in EGPRS) else 16


@dataclass(frozen=True)
class Check:
    """One rule and what came of it. ``detail`` names the values."""

    rule: str
    outcome: Outcome
    detail: str


def check(layout: Layout) -> tuple[Check, ...]:
    """Every rule, in a fixed order."""
    return tuple(_checks(layout))


def violated(checks: tuple[Check, ...]) -> bool:
    """Whether any rule is."""
    return any(c.outcome == "violated" for c in checks)


def changes(old: Layout, new: Layout) -> tuple[str, ...]:
    """What differs between two maps, a line each; none when they are the same wherever they were read."""
    before, after = _values(old), _values(new)
    names = [name for name in dict.fromkeys((*before, *after)) if before.get(name) != after.get(name)]
    return tuple(f"{name}: {before.get(name, 'none')} → {after.get(name, 'none')}" for name in names)


def layout_text(layout: Layout) -> str:
    """The table for people."""
    return "\n".join(_lines(layout, check(layout)))


def layout_json(layout: Layout) -> dict[str, Any]:
    """The same for programs."""
    checks = check(layout)
    return {
        "source": layout.source,
        "ids": dict(layout.ids),
        "bounds": dict(layout.bounds),
        "members": {name: member._asdict() if member else None for name, member in layout.members.items()},
        "checks": [asdict(c) for c in checks],
        "violated": violated(checks),
    }


def _values(layout: Layout) -> dict[str, str]:
    members = {name: _member(member) for name, member in layout.members.items() if member is not None}
    return {name: str(n) for name, n in (*layout.ids.items(), *layout.bounds.items())} | members


def _member(member: Member) -> str:
    elements = member.elements or 1
    many = f"{elements} × " if member.elements else ""
    return f"at {member.offset}, {many}{counted(member.size // elements, 'byte')}"


def _check(rule: str, wrong: list[str], fine: str) -> Check:
    return Check(rule, "violated" if wrong else "ok", "; ".join(wrong) or fine)


def _checks(layout: Layout) -> Iterator[Check]:
    ids = layout.ids
    wrong = [f"{name} is {ids.get(name, 'missing')}, not {n}" for n, name in enumerate(GPRS) if ids.get(name) != n]
    yield _check("RAX to R15 are at their encodings", wrong, "0 to 15")
    yield _egprs(layout)
    yield _rip(layout)
    yield _erapses(layout)
    yield _distinct(layout)
    yield _counts(layout)
    yield _storage(layout)
    for name, mask in (("regs_avail", layout.avail), ("regs_dirty", layout.dirty)):
        yield _mask(layout, name, mask)


def _egprs(layout: Layout) -> Check:
    rule = "R16 to R31 follow R15 without a gap"
    if layout.gprs == 16:
        return Check(rule, "n/a", "this kernel has no R16 to R31")
    ids = layout.ids
    wrong = [f"{name} is {ids.get(name, 'missing')}, not {n}" for n, name in enumerate(EGPRS, 16) if ids.get(name) != n]
    return _check(rule, wrong, "16 to 31")


def _rip(layout: Layout) -> Check:
    rule = "RIP is no index of a general-purpose register"
    if "RIP" not in layout.ids:
        return Check(rule, "n/a", "RIP has no id")
    rip = layout.ids["RIP"]
    if rip < layout.gprs:
        name = next((name for name, n in layout.ids.items() if n == rip and name != "RIP"), f"register {rip}")
        return Check(rule, "violated", f"RIP is {rip}, as {name}")
    return Check(rule, "ok", f"RIP is {rip}, the last of those is {layout.gprs - 1}")


def _erapses(layout: Layout) -> Check:
    rule = "ERAPS is another name of CR3"
    if "ERAPS" not in layout.ids:
        return Check(rule, "n/a", "this kernel has no ERAPS")
    eraps, cr3 = layout.ids["ERAPS"], layout.ids.get("CR3")
    return _check(rule, [] if eraps == cr3 else [f"ERAPS is {eraps}, CR3 is {cr3}"], f"both are {eraps}")


def _distinct(layout: Layout) -> Check:
    by_id: dict[int, list[str]] = {}
    for name, n in layout.ids.items():
        if name != "ERAPS":
            by_id.setdefault(n, []).append(name)
    wrong = [f"{n} is {' and '.join(names)}" for n, names in sorted(by_id.items()) if len(names) > 1]
    return _check("no two registers share an id", wrong, f"{len(by_id)} ids, {min(by_id)} to {max(by_id)}")


def _counts(layout: Layout) -> Check:
    rule = "what counts the registers counts them all"
    last = max(layout.ids.values())
    wanted = {
        "NR_VCPU_REGS": layout.ids.get("RIP", last) + 1,  # to Linux 6.18; the other two since 7.0
        "NR_VCPU_GENERAL_PURPOSE_REGS": layout.gprs,
        "NR_VCPU_TOTAL_REGS": last + 1,
    }
    known = {name: n for name, n in layout.bounds.items() if name in wanted}
    if not known:
        return Check(rule, "n/a", "this kernel has none of " + ", ".join(wanted))
    wrong = [f"{name} is {n}, not {wanted[name]}" for name, n in known.items() if n != wanted[name]]
    return _check(rule, wrong, ", ".join(f"{name} is {n}" for name, n in known.items()))


def _storage(layout: Layout) -> Check:
    rule = "regs[] holds the general-purpose registers; RIP has a place"
    if layout.regs is None or layout.regs.elements is None:
        return Check(rule, "n/a", "struct kvm_vcpu_arch has no regs[]")
    length, wrong = layout.regs.elements, []
    if length < layout.gprs:
        wrong.append(f"regs[] has {counted(length, 'element')}, {layout.gprs} are needed")
    if layout.regs.size != 8 * length:
        wrong.append(f"an element of regs[] has {counted(layout.regs.size // max(length, 1), 'byte')}, not 8")
    rip = layout.ids.get("RIP")
    if layout.rip is None and (rip is None or rip >= length):
        wrong.append(f"RIP is {rip}, regs[] has {counted(length, 'element')}, and there is no member rip")
    place = "in a member of its own" if layout.rip else f"regs[{rip}]"
    return _check(rule, wrong, f"{length} elements; RIP is {place}")


def _mask(layout: Layout, name: str, mask: Member | None) -> Check:
    rule = f"every id fits into {name}"
    if mask is None:
        return Check(rule, "n/a", f"struct kvm_vcpu_arch has no {name}")
    bits = 8 * mask.size
    outside = [f"{register} is {n}" for register, n in layout.ids.items() if not 0 <= n < bits]
    wrong = [f"it has {bits} bits, but {', '.join(outside)}"] if outside else []
    return _check(rule, wrong, f"the last is {max(layout.ids.values())}, it has {bits} bits")


def _lines(layout: Layout, checks: tuple[Check, ...]) -> Iterator[str]:
    yield f"register map   {layout.source}"
    yield ""
    rows = sorted(layout.ids.items(), key=lambda row: row[1])
    cells = [f"{n:3d} {name}" for name, n in rows]
    width = max(map(len, cells)) + 2
    lines = -(-len(cells) // 4)
    for line in range(lines):
        yield "  " + "".join(cell.ljust(width) for cell in cells[line::lines]).rstrip()
    yield ""
    for name, member in layout.members.items():
        if member is not None:
            yield f"  {name:12s} {_member(member)}"
    yield ""
    for c in checks:
        yield f"  {c.outcome:9s} {c.rule}: {c.detail}"
