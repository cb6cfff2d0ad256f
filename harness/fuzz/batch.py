"""One instruction, many register states: a template runs in a loop in a guest, and the model says what it must do.

The guest takes state after state out of RAM, loads all 32 registers and the flags, runs the template, and puts back
what came out: a thousand states cost one start of the machine. Any machine that runs Cases and shows RAM will do.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final, Protocol

from harness import modes
from harness.case import Action, Blob, Case, Memory, Observation, Run, Slot, VmShape
from harness.cpuid import CpuProfile
from harness.reference.cpu import ARITH, Cpu, Fault, ModelError
from harness.reference.decoder import decode
from harness.reference.insn import Insn, Operation
from harness.reference.templates import RSP, WINDOW_SIZE, Template, templates
from harness.state import GPR_NAMES, MASK64, RFLAGS_BITS

# A record: 32 registers, flags, vector + 1 of a fault, room for an exception's frame, the window of memory operands.
_FLAGS, _VECTOR, _WINDOW = 256, 264, 384
RECORD: Final = _WINDOW + WINDOW_SIZE
_REGISTERS: Final = struct.Struct("<32Q")
_SLOT: Final = modes.DATA_BASE  # the record that is being run
_VARIABLES: Final = modes.DATA_BASE + 0x800  # address of the record in turn, records left
_STACK: Final = modes.STACK_TOP
_RECORDS: Final = 0x100000
WINDOW: Final = _SLOT + _WINDOW
_SHAPE: Final = VmShape(slots=(Slot(0, modes.RAM_SIZE), Slot(_RECORDS, 0x100000)))
MOST_STATES: Final = 0x100000 // RECORD
_PINS: Final = 48  # bytes of code for the pins of a template
_VECTORS: Final = (0, 1, 3, 5, 6, 7, 12, 13, 14, 17)
_CORNERS: Final = (
    0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1 << 63, (1 << 63) - 1,
    MASK64,
)  # fmt: skip


class Machine(Protocol):
    """What runs a batch."""

    def load(self, case: Case) -> None: ...

    def apply(self, action: Action) -> Iterable[Observation]: ...

    def read(self, gpa: int, size: int) -> bytes: ...


@dataclass
class Tally:
    """What came out of one template: states compared, states that the model does not answer for, differences."""

    compared: int = 0
    unanswered: int = 0
    differences: list[str] = field(default_factory=list)


# --- the guest ------------------------------------------------------------------------------------------------------


def _absolute(opcode: int, reg: int, address: int) -> bytes:
    """``opcode reg, [address]`` with a 64-bit operand, by REX.W or REX2."""
    tail = bytes([opcode, 4 | (reg & 7) << 3, 0x25]) + address.to_bytes(4, "little")
    if reg < 16:
        return bytes([0x48 | (reg >> 3) << 2]) + tail
    return bytes([0xD5, 0x48 | (reg >> 3 & 1) << 2]) + tail


def _constant(reg: int, value: int) -> bytes:
    """``movabs reg, value``."""
    tail = bytes([0xB8 | reg & 7]) + (value & MASK64).to_bytes(8, "little")
    return (bytes([0x48 | reg >> 3]) if reg < 16 else bytes([0xD5, 0x18 | reg >> 3 & 1])) + tail


def _imm32(opcode: str, value: int) -> bytes:
    return bytes.fromhex(opcode) + value.to_bytes(4, "little")


class _Guest:
    """The code around a template. ``rip`` is where the template is."""

    def __init__(self, gprs: int) -> None:
        registers = [n for n in range(gprs) if n != RSP]
        copy_in = _absolute(0x8B, 6, _VARIABLES) + _imm32("bf", _SLOT) + _imm32("b9", RECORD // 8) + b"\xf3\x48\xa5"
        flags = _imm32("48c7c4", _SLOT + _FLAGS) + b"\x9d"
        head = copy_in + flags + b"".join(_absolute(0x8B, n, _SLOT + 8 * n) for n in registers)
        self._head = head
        self.rip = modes.CODE_BASE + len(head) + _PINS
        store = b"".join(_absolute(0x89, n, _SLOT + 8 * n) for n in (*registers, RSP))
        store += _imm32("48c7c4", _STACK) + b"\x9c" + _imm32("8f0425", _SLOT + _FLAGS) + b"\xfc"
        store += _absolute(0x8B, 7, _VARIABLES) + _imm32("be", _SLOT) + _imm32("b9", RECORD // 8) + b"\xf3\x48\xa5"
        store += _imm32("48810425", _VARIABLES) + RECORD.to_bytes(4, "little") + _imm32("ff0c25", _VARIABLES + 8)
        self._store = store
        self._store_at = self.rip + 16
        loop = modes.CODE_BASE - (self._store_at + len(store) + 6)
        self._tail = store + b"\x0f\x85" + loop.to_bytes(4, "little", signed=True) + b"\xf4"

    def blobs(self) -> list[Blob]:
        """Everything but template and pins: the loop, and stubs that note the vector of a fault and go on."""
        out = [Blob(modes.CODE_BASE, self._head), Blob(self._store_at, self._tail)]
        for vector in _VECTORS:
            at = modes.STUBS + 16 * vector
            note = _imm32("c60425", _SLOT + _VECTOR) + bytes([vector + 1])
            out.append(Blob(at, note + b"\xe9" + (self._store_at - at - 13).to_bytes(4, "little", signed=True)))
        return out

    def template(self, template: Template) -> Blob:
        pins = b"".join(_constant(reg, value) for reg, value in template.pins)
        if len(pins) > _PINS or len(template.code) > 16:
            raise ValueError(f"{template.name}: too long for its place")
        return Blob(self.rip - _PINS, pins.ljust(_PINS, b"\x90") + template.code.ljust(16, b"\x90"))


# --- states, and what must come out ---------------------------------------------------------------------------------


def _random_register(rng: random.Random) -> int:
    kind = rng.random()
    if kind < 0.25:
        return rng.choice(_CORNERS)
    value = rng.getrandbits(rng.choice((4, 8, 16, 32, 64, 64)))
    return value if kind < 0.85 else -value & MASK64


class Batch:
    """Many states for the templates of one processor ``profile``; they follow from ``seed``.

    ValueError for more states than fit into a guest.
    """

    def __init__(self, profile: CpuProfile, states: int = 1000, seed: int = 0) -> None:
        if states > MOST_STATES:
            raise ValueError(f"{states} states: at most {MOST_STATES} fit")
        self.profile = profile
        rng = random.Random(seed)
        self._guest = _Guest(32 if "apx" in profile.features else 16)
        count = 32 if "apx" in profile.features else 16
        zeros = (0,) * (32 - count)
        self._states = [
            (tuple(_random_register(rng) for _ in range(count)) + zeros, 2 | rng.getrandbits(12) & ARITH,
             rng.randbytes(WINDOW_SIZE))
            for _ in range(states)
        ]  # fmt: skip
        records = b"".join(
            _REGISTERS.pack(*gpr) + struct.pack("<QQ", flags, 0) + bytes(_WINDOW - _VECTOR - 8) + window
            for gpr, flags, window in self._states
        )
        setup = modes.setup("long", entry=modes.CODE_BASE, profile=profile)
        variables = struct.pack("<QI", _RECORDS, states)
        self._memory = Memory(
            (*setup.blobs, *self._guest.blobs(), Blob(_VARIABLES, variables), Blob(_RECORDS, records))
        )
        self._start = setup.state
        self._size = RECORD * states
        self._cpu = Cpu(Case("batch", self._memory, self._start, profile, shape=_SHAPE))

    def templates(self, seed: int = 0) -> list[Template]:
        """The templates that this processor has."""
        return list(templates(WINDOW, self._guest.rip, seed=seed, features=self.profile.features))

    def case(self, template: Template) -> Case:
        """A Case that runs ``template`` on every state, and then halts."""
        memory = self._memory.plus(self._guest.template(template))
        return Case(f"batch/{template.name}", memory, self._start, self.profile, shape=_SHAPE)

    def run(self, machine: Machine, template: Template) -> Tally:
        """Run ``template`` on ``machine`` and compare every state with the model."""
        machine.load(self.case(template))
        exits = [seen.exit for seen in machine.apply(Run())]
        if [e.kind for e in exits] != ["halt"]:
            return Tally(differences=[f"{template.name}: the guest ended in {exits}"])
        return self.compare(template, machine.read(_RECORDS, self._size))

    def compare(self, template: Template, output: bytes) -> Tally:
        """What the records that came out differ in from what the model says."""
        insn = decode(template.code + bytes(15), None, 64, profile=self.profile, apx=1)
        op = insn.row.operation(insn)
        tally = Tally()
        for n, state in enumerate(self._states):
            try:
                expected = self._expect(template, insn, op, state)
            except ModelError:
                tally.unanswered += 1
                continue
            tally.compared += 1
            got = output[n * RECORD : (n + 1) * RECORD]
            if text := _difference(expected, got):
                tally.differences.append(f"{template.name}: {insn.text()}, state {n}: {text}")
        return tally

    def _expect(
        self, template: Template, insn: Insn, op: Operation, state: tuple[tuple[int, ...], int, bytes]
    ) -> tuple[tuple[int, ...], int, int, int, bytes]:
        """(registers, flags, undefined flags, vector + 1, window) after the template."""
        cpu = self._cpu
        gpr, flags, window = state
        cpu.gpr[:] = gpr
        for reg, value in template.pins:
            cpu.gpr[reg] = value
        cpu.rflags, cpu.undefined, cpu.shadow = flags, 0, 0
        cpu.start_rip, cpu.rip = template.rip, template.rip + insn.length
        before = tuple(cpu.gpr)
        if template.memory:
            cpu.mem.physical_write(WINDOW, window)
        try:
            op(cpu)
        except Fault as fault:
            return before, flags, 0, fault.vector + 1, b""
        if cpu.rip != template.rip + insn.length:
            raise ModelError(f"{template.name} does not go on at the next instruction")
        after = cpu.mem.physical_read(WINDOW, WINDOW_SIZE) if template.memory else window
        return tuple(cpu.gpr), cpu.rflags, cpu.undefined, 0, after


def _difference(expected: tuple[tuple[int, ...], int, int, int, bytes], got: bytes) -> str:
    gpr, flags, undefined, vector, window = expected
    registers = _REGISTERS.unpack_from(got)
    got_flags, got_vector = struct.unpack_from("<QQ", got, _FLAGS)
    out = []
    if got_vector != vector:
        return f"exception {got_vector - 1} instead of {vector - 1} (-1: none)"
    if registers != gpr:
        out += [
            f"{name} {value:#x} instead of {want:#x}"
            for n, (name, want, value) in enumerate(zip(GPR_NAMES, gpr, registers, strict=True))
            if want != value and not (vector and n == RSP)
        ]
    wrong = (flags ^ got_flags) & ~undefined & (ARITH | 0x400)
    if wrong:
        out.append("flags " + " ".join(RFLAGS_BITS[b] for b in range(12) if wrong >> b & 1) + " wrong")
    if not vector and got[_WINDOW:] != window:
        at = next(n for n in range(WINDOW_SIZE) if got[_WINDOW + n] != window[n])
        out.append(f"memory {at:#x} {got[_WINDOW + at :][:8].hex()} instead of {window[at : at + 8].hex()}")
    return "; ".join(out)
