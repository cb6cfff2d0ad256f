"""Guests that run a guest by SVM: what VMRUN and #VMEXIT must switch, and what they must leave alone, R16-R31 first.

APM vol. 2 15.5, 15.6: of the general registers only RAX and RSP are switched. APX state is not SVM's at all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Final

from harness import vmcb
from harness.case import Blob, Case
from harness.cpuid import CpuProfile
from harness.modes import DATA_BASE, STACK_TOP, setup
from harness.paths.common import Family, cases, guest_for, start_state

_OUTER: Final = (
    Family("nested", ("long",), features=frozenset({"svm"})),
    Family("apx_nested", ("long",), features=frozenset({"svm", "apx"})),
)
_VMCB: Final = DATA_BASE + 0x5000
_RSP: Final = STACK_TOP - 0x800
_EFER_SVME: Final = 1 << 12
_CONTROL: Final = {"intercepts2": vmcb.INTERCEPT_VMRUN | vmcb.INTERCEPT_VMMCALL, "asid": 1}
_MORE: Final = {
    "hlt": {"intercepts1": vmcb.INTERCEPT_HLT}, "cpuid": {"intercepts1": vmcb.INTERCEPT_CPUID},
    "ud": {"exceptions": 1 << 6},
}  # fmt: skip


def nested_cases(profile: CpuProfile) -> Iterator[Case]:
    """The Cases of these families; their names start with ``nested/`` and ``apx_nested/``."""
    for family in _OUTER:
        guest = guest_for(family.source, "long")
        for case in cases(family, profile):
            entry = case.name.partition("/")[2].partition("@")[0]
            address = guest.symbols.get(f"i_{entry}", guest.symbols["i_vmmcall"])
            inner = start_state(setup("long", entry=0, profile=profile), address, case.seed + 1)
            inner = replace(inner, efer=inner.efer | _EFER_SVME).with_({"rsp": _RSP})
            block = vmcb.block(inner, **_CONTROL, **_MORE.get(entry, {}))
            yield replace(case, memory=case.memory.plus(Blob(_VMCB, block)))
