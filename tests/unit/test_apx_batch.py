"""Templates and the loop that runs them on many states, with the model on both sides: what the batch itself must do."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from test_apx_guests import apx_profile

from harness.case import Action, Case, Observation
from harness.cpuid import with_features
from harness.fuzz.batch import MOST_STATES, RECORD, WINDOW, Batch
from harness.reference.decoder import decode
from harness.reference.machine import ReferenceMachine
from harness.reference.templates import Template, templates


class Model:
    """The reference model as a machine that shows its RAM; ``spoil`` flips a bit of what it shows."""

    def __init__(self, spoil: int = -1) -> None:
        self.machine, self.spoil = ReferenceMachine(), spoil

    def load(self, case: Case) -> None:
        self.machine.load(case)

    def apply(self, action: Action) -> Iterable[Observation]:
        return self.machine.apply(action)

    def read(self, gpa: int, size: int) -> bytes:
        cpu = self.machine.cpu
        assert cpu is not None
        out = bytearray(b"".join(cpu.mem.physical_read(at, 8) for at in range(gpa, gpa + size, 8)))
        if self.spoil >= 0:
            out[self.spoil // 8] ^= 1 << self.spoil % 8
        return bytes(out)


@pytest.fixture(scope="module")
def batch() -> Batch:
    return Batch(apx_profile(), 5)


@pytest.fixture(scope="module")
def some(batch: Batch) -> list[Template]:
    """Templates that leave no flag undefined: the model copies no undefined bits about."""
    found = [t for t in batch.templates() if not decode(t.code, None, 64, apx=1).row.undefined]
    return found[::61]


def test_there_are_thousands_and_they_are_stable() -> None:
    names = [t.name for t in templates(WINDOW, 0xB000)]
    assert len(names) == len(set(names)) > 8000
    assert [t.code for t in templates(WINDOW, 0xB000)] == [t.code for t in templates(WINDOW, 0xB000)]
    kinds = {name.partition(": ")[2].split()[0] for name in names}
    assert kinds == {"plain", "rex", "rex2", "vex", "evex"}
    assert sum("evex" in name for name in names) > 4000


def test_a_processor_without_apx_has_no_apx_templates() -> None:
    plain = Batch(with_features(apx_profile(), remove=["apx"]), 1)
    assert not [t.name for t in plain.templates() if "evex" in t.name or "rex2" in t.name]


def test_the_loop_gives_what_the_instruction_alone_gives(batch: Batch, some: list[Template]) -> None:
    machine, compared = Model(), 0
    for template in some:
        tally = batch.run(machine, template)
        assert not tally.differences
        compared += tally.compared
    assert compared > 4 * len(some)


@pytest.mark.parametrize(("bit", "said"), [(3 * 64, "rbx"), (RECORD * 8 + 31 * 64 + 5, "r31"), (256 * 8, "flags CF")])
def test_one_wrong_bit_is_seen_and_named(batch: Batch, bit: int, said: str) -> None:
    (template,) = (t for t in batch.templates() if t.name == "lea 8D /r:m: rex2 w mem")
    (difference,) = batch.run(Model(spoil=bit), template).differences
    assert said in difference
    assert f"state {bit // 8 // RECORD}" in difference


def test_memory_and_exceptions_are_compared(batch: Batch) -> None:
    (store,) = (t for t in batch.templates() if t.name == "mov 89 /r: rex2 w mem")
    assert "memory" in batch.run(Model(spoil=(384 + 63) * 8), store).differences[0]
    assert "exception 0 instead of -1" in batch.run(Model(spoil=264 * 8), store).differences[0]


def test_more_states_than_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=f"at most {MOST_STATES}"):
        Batch(apx_profile(), MOST_STATES + 1)
