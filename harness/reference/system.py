"""SYSTEM_ROWS: every row of the table that is not plain computation, from the modules that implement them."""

from __future__ import annotations

from typing import Final

from harness.reference.control import CONTROL_ROWS
from harness.reference.hypercall import HYPERCALL_ROWS
from harness.reference.insn import Row
from harness.reference.iret import INTERRUPT_ROWS
from harness.reference.msr import MSR_ROWS
from harness.reference.portio import PORT_ROWS
from harness.reference.segments import SEGMENT_ROWS
from harness.reference.smm import SMM_ROWS
from harness.reference.strings import STRING_ROWS
from harness.reference.svm import SVM_ROWS
from harness.reference.transfers import FAR_ROWS

SYSTEM_ROWS: Final[list[Row]] = [
    *SEGMENT_ROWS, *FAR_ROWS, *INTERRUPT_ROWS, *CONTROL_ROWS, *MSR_ROWS, *PORT_ROWS, *STRING_ROWS,
    *HYPERCALL_ROWS, *SVM_ROWS, *SMM_ROWS,
]  # fmt: skip
