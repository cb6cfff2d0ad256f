"""The table of unprivileged instructions, legacy, REX2, VEX and EVEX, on the lab's own QEMU against the model.

``KVM_HARNESS_TEMPLATE_STATES`` random states for each of some 8,400 templates (1,000: four minutes), seed in
``KVM_HARNESS_TEMPLATE_SEED``.
"""

from __future__ import annotations

import os
from collections import Counter

from harness.fuzz.batch import Batch
from harness.lab.bare_emulator import BareEmulator
from harness.lab.hardware import pinned_qemu

STATES = int(os.environ.get("KVM_HARNESS_TEMPLATE_STATES", "25"))
SEED = int(os.environ.get("KVM_HARNESS_TEMPLATE_SEED", "0"))


def test_every_template_agrees_with_the_model() -> None:
    emulator = pinned_qemu(print)
    assert "apx" in emulator.features
    counts: Counter[str] = Counter()
    wrong: list[str] = []
    with BareEmulator(emulator, cpu="max,+svm,+apxf", limit=30) as machine:
        batch = Batch(machine.profile, STATES, SEED)
        for template in batch.templates(SEED):
            tally = batch.run(machine, template)
            counts.update(templates=1, compared=tally.compared, unanswered=tally.unanswered)
            if tally.differences:
                wrong.append(f"{tally.differences[0]} ({len(tally.differences)} of {STATES} states)")
    print(dict(counts))
    assert not wrong, f"{len(wrong)} templates:\n" + "\n".join(wrong[:40])
    assert counts["templates"] > 8000
    assert counts["compared"] > 0.97 * STATES * counts["templates"]
