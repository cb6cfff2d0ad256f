"""The table of unprivileged instructions, legacy, REX2, VEX and EVEX, on the lab's own QEMU against the model.

``KVM_HARNESS_TEMPLATE_STATES`` random states for each of some 8,400 templates (1,000: four minutes), seed in
``KVM_HARNESS_TEMPLATE_SEED``.
"""

from __future__ import annotations

import os
import re
from collections import Counter

import pytest

from harness.fuzz.batch import Batch
from harness.lab.bare_emulator import BareEmulator
from harness.lab.hardware import pinned_qemu

STATES = int(os.environ.get("KVM_HARNESS_TEMPLATE_STATES", "25"))
SEED = int(os.environ.get("KVM_HARNESS_TEMPLATE_SEED", "0"))

# Where this QEMU is wrong: templates, and why. The bare processor agrees with the model in each (tests/unit/
# test_bare_cpu.py), save that Intel allows the last one to "some older processors" (SDM vol. 2A BSF).
DEFECTS = {
    r"test F[67] /1: (plain|rex)": "the alias of TEST is #UD",
    r"cmpxchg8b\S* .*66 mem": "CMPXCHG8B and CMPXCHG16B with 66H are #UD",
    r"(crc32|movbe) .*: rex w66": "66H goes before REX.W",
    r"rc[lr] .*C[01] /[23]": "RCL and RCR by an immediate, a multiple of 9 (8 bits) or 17 (16), change their operand",
    r"bs[fr] .*: (plain|rex|rex2) (reg|mem)$": "BSF and BSR of zero clear the upper half of a 32-bit destination",
}


def test_every_template_agrees_with_the_model() -> None:
    emulator = pinned_qemu(print)
    if "apx" not in emulator.features:
        pytest.skip("this QEMU has no APX")
    counts: Counter[str] = Counter()
    wrong: list[str] = []
    with BareEmulator(emulator, cpu="max,+svm,+apxf", limit=30) as machine:
        batch = Batch(machine.profile, STATES, SEED)
        for template in batch.templates(SEED):
            tally = batch.run(machine, template)
            counts.update(templates=1, compared=tally.compared, unanswered=tally.unanswered)
            if not tally.differences:
                continue
            why = next((why for name, why in DEFECTS.items() if re.match(name, template.name)), None)
            if why is None:
                wrong.append(f"{tally.differences[0]} ({len(tally.differences)} of {STATES} states)")
            else:
                counts[why] += 1
    print(dict(counts))
    assert not wrong, f"{len(wrong)} templates:\n" + "\n".join(wrong[:40])
    assert counts["templates"] > 8000
    assert counts["compared"] > 0.97 * STATES * counts["templates"]
