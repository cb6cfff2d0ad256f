"""R16-R31 in a guest that runs a guest by SVM: VMRUN and #VMEXIT must leave them alone, as all but RAX and RSP.

APM vol. 2 15.5, 15.6: of the general registers only those two are switched; APX state is not SVM's at all.
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

_OUTER: Final = Family("apx_nested", ("long",), features=frozenset({"svm", "apx"}))
_VMCB: Final = DATA_BASE + 0x5000
_RSP: Final = STACK_TOP - 0x800
_EFER_SVME: Final = 1 << 12
_CONTROL: Final = {"intercepts2": vmcb.INTERCEPT_VMRUN | vmcb.INTERCEPT_VMMCALL, "asid": 1}
_MORE: Final = {
    "hlt": {"intercepts1": vmcb.INTERCEPT_HLT}, "cpuid": {"intercepts1": vmcb.INTERCEPT_CPUID},
    "ud": {"exceptions": 1 << 6},
}  # fmt: skip


def apx_nested_cases(profile: CpuProfile) -> Iterator[Case]:
    """The Cases of this family; their names start with ``apx_nested/``."""
    guest = guest_for(_OUTER.source, "long")
    for case in cases(_OUTER, profile):
        entry = case.name.partition("/")[2].partition("@")[0]
        address = guest.symbols.get(f"i_{entry}", guest.symbols["i_vmmcall"])
        inner = start_state(setup("long", entry=0, profile=profile), address, case.seed + 1)
        inner = replace(inner, efer=inner.efer | _EFER_SVME).with_({"rsp": _RSP})
        block = vmcb.block(inner, **_CONTROL, **_MORE.get(entry, {}))
        yield replace(case, memory=case.memory.plus(Blob(_VMCB, block)))
