"""The model's unprivileged rows against the processor that runs this test: random instructions, random state."""

from __future__ import annotations

import os
import platform
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import pytest

from harness import modes
from harness.bare_cpu import WINDOW, BareCpu, BareCpuError, Registers
from harness.case import Case, Memory
from harness.reference.alu import ALU_ROWS
from harness.reference.bmi import BMI_ROWS
from harness.reference.cpu import AF, ARITH, CF, DS, ES, OF, SF, ZF, Cpu, Fault, ModelError
from harness.reference.data import DATA_ROWS
from harness.reference.decoder import decode
from harness.reference.flow import FLOW_ROWS
from harness.reference.insn import VEX, Insn, Row
from harness.reference.shift import SHIFT_ROWS
from harness.reference.table import TABLE, Entry
from harness.state import CpuState, Segment

ROUNDS = int(os.environ.get("KVM_HARNESS_BARE_ROUNDS", "8000"))
SEED = os.environ.get("KVM_HARNESS_BARE_SEED", "1")
LOW, HIGH = WINDOW + 0x1000, WINDOW + 0xB000  # the part of the window that every mode of harness/modes.py backs
LEAVES = {"call", "ret", "jmp", "jmpabs", "popf"}
VALUES = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1 << 63, (1 << 63) - 1)
FLAT = Segment(selector=0x2B, limit=0xFFFFFFFF, type=3, dpl=3, db=1, g=1)


class Outside(Exception):
    """The instruction would touch memory that the bare CPU must not touch."""


class Twin:
    """A model Cpu in the same user-mode environment as a BareCpu, with the same memory window."""

    def __init__(self, bare: BareCpu, rng: random.Random) -> None:
        self.bare, self.rng = bare, rng
        profile = bare.profile()
        setup = modes.setup("long-user", entry=modes.CODE_BASE, profile=profile)
        state = setup.state
        if bare.bits != 64:
            wide = bare.bits == 32
            cs = replace(state.cs, base=0, limit=0xFFFFFFFF if wide else 0xFFFF, l=0, db=int(wide))
            data = FLAT if wide else replace(FLAT, base=bare.data_base, limit=0xFFFF, db=0, g=0)
            state = replace(state, cs=cs, ss=FLAT, ds=data, es=data)
        self.case = Case("bare", Memory(setup.blobs), state, profile, bits=bare.bits)
        self.cpu = Cpu(self.case)
        self.start: CpuState = state
        content = rng.randbytes(HIGH - LOW)
        for page in range(0, len(content), 4096):
            self.cpu.mem.physical_write(LOW + page, content[page : page + 4096])
        bare.set_memory(LOW, content)
        self._guard()

    def _guard(self) -> None:
        inner = self.cpu.mem.linear

        def linear(index: int, offset: int, size: int, write: bool) -> int:
            address = inner(index, offset, size, write)
            if not LOW <= address <= address + size <= HIGH:
                raise Outside
            return address

        self.cpu.mem.linear = linear  # type: ignore[method-assign]

    def window(self) -> bytes:
        return b"".join(self.cpu.mem.physical_read(at, 4096) for at in range(LOW, HIGH, 4096))

    def compare(self, insn: Insn, code: bytes, before: Registers) -> str | None:
        """Run ``insn`` on both; what differs. Fault, ModelError or Outside when it cannot be run."""
        cpu = self.cpu
        cpu.gpr[:] = [*before.gpr, *(0,) * 16]
        cpu.rflags, cpu.undefined, cpu.rip, cpu.shadow = before.rflags, 0, self.bare.rip + insn.length, 0
        try:
            insn.row.operation(insn)(cpu)
        except (ModelError, Outside):
            self.bare.set_memory(LOW, self.window())
            raise
        except Fault as fault:
            got = self.bare.execute(code if insn.row.mnemonic == "(bad)" else insn.code, before)
            self.bare.set_memory(LOW, self.window())
            unchanged = (got.gpr, got.rflags & 0xFFFF) == (before.gpr, before.rflags)
            return None if got.fault == fault.vector and unchanged else f"model {fault}, bare {got}"
        got = self.bare.execute(insn.code, before)
        if cpu.rip != self.bare.rip + insn.length:  # a branch that 66H truncates goes where nothing is mapped
            assert cpu.rip < 0x10000
            return None if got.fault == 14 else f"model branches to {cpu.rip:#x}, bare {got}"
        if got.fault is not None:
            self.bare.set_memory(LOW, self.window())
            return f"model runs it, bare #{got.fault}"
        wrong = [
            f"gpr{n}: model {want:#x}, bare {have:#x}"
            for n, (want, have) in enumerate(zip(cpu.gpr, got.gpr, strict=False))
            if want != have
        ]
        mask = ~cpu.undefined
        if (cpu.rflags ^ got.rflags) & mask & (ARITH | 0x400):
            wrong.append(f"rflags: model {cpu.rflags:#x} (undefined {cpu.undefined:#x}), bare {got.rflags:#x}")
        return "; ".join(wrong) or None


def random_value(rng: random.Random) -> int:
    if rng.random() < 0.5:
        return rng.choice(VALUES)
    return rng.getrandbits(rng.choice((4, 8, 16, 32, 64)))


def random_code(row: Row, bits: int, rng: random.Random) -> bytes:
    """A random encoding of ``row``."""
    entry = TABLE.entry(row)
    assert entry is not None
    if entry.map > VEX:
        return random_vex_code(entry, bits, rng)
    head = bytearray()
    for byte, chance in ((0x66, 0.25), (0x67, 0.1), (0x2E, 0.03), (0xF0, 0.05), (0xF3, 0.03), (0xF2, 0.03)):
        if rng.random() < chance:
            head.append(byte)
    if entry.prefix not in ("", "NP", "NR"):
        head += bytes.fromhex(entry.prefix)
    if bits == 64 and rng.random() < 0.6:
        head.append(0x40 | rng.getrandbits(4))
    head += {0: b"", 1: b"\x0f", 2: b"\x0f\x38", 3: b"\x0f\x3a"}[entry.map]
    head.append(rng.choice(entry.opcodes))
    if entry.modrm:
        m = rng.getrandbits(8) | (0xC0 if rng.random() < 0.5 else 0)
        if entry.ext >= 0:
            m = m & 0xC7 | entry.ext << 3
        head.append(m if entry.mod != "r" else m | 0xC0)
    tail = bytes(rng.getrandbits(8) for _ in range(14))
    if entry.modrm and rng.random() < 0.5:
        tail = b"\x24" + tail[1:]
    if row.operands in ("Jb", "Jz"):
        tail = bytes(14)
    if "O" in row.operands:
        tail = (WINDOW + 0x6000 + rng.getrandbits(8)).to_bytes(8, "little") + bytes(4)
    if row.mnemonic == "enter":
        tail = bytes((rng.getrandbits(6), 0, rng.getrandbits(3)))
    return bytes(head) + tail


def random_vex_code(entry: Entry, bits: int, rng: random.Random) -> bytes:
    """A random encoding with a VEX prefix; now and then one that is #UD."""
    head = bytearray(b"\x67" if rng.random() < 0.1 else b"\x66" if rng.random() < 0.02 else b"")
    if bits == 64 and rng.random() < 0.02:
        head.append(0x48)
    v = ~rng.getrandbits(4) & 15 if any(p[0] == "B" for p in entry.operands) or rng.random() < 0.05 else 15
    p0 = rng.getrandbits(3) << 5 if bits == 64 else 0xC0 | rng.getrandbits(1) << 5
    p1 = rng.getrandbits(1) << 7 | v << 3 | (rng.random() < 0.03) << 2 | entry.pps[0]
    head += bytes((0xC4, p0 | entry.map - VEX, p1, entry.opcodes[0]))
    m = rng.getrandbits(8) | (0xC0 if rng.random() < 0.5 else 0)
    head.append(m & 0xC7 | entry.ext << 3 if entry.ext >= 0 else m)
    return bytes(head) + bytes(rng.getrandbits(8) for _ in range(8))


def random_registers(insn: Insn, twin: Twin, rng: random.Random) -> Registers:
    """Random registers; those that address memory point into the window."""
    limit = (1 << 64) - 1 if insn.bits == 64 else (1 << 32) - 1
    gpr = [random_value(rng) & limit for _ in range(16)]
    middle = WINDOW + 0x6000
    gpr[4] = middle + rng.getrandbits(8)
    where = middle - (twin.bare.data_base if insn.seg in (DS, ES) else 0)
    if insn.memory and insn.base >= 0:
        gpr[insn.base] = where + rng.getrandbits(10) - insn.disp & limit
        if insn.index >= 0:
            gpr[insn.index] = rng.getrandbits(8)
        if insn.row.mnemonic in ("bt", "bts", "btr", "btc") and insn.reg not in (insn.base, insn.index):
            gpr[insn.reg] = rng.randrange(-2000, 2000) & limit
    if insn.row.mnemonic in ("enter", "leave"):
        gpr[5] = middle + 64
    if insn.row.mnemonic == "xlat":
        gpr[3] = where
    if insn.row.mnemonic in ("div", "idiv") and rng.random() < 0.7:
        gpr[2] = rng.choice((0, 0, limit, 1))
    if insn.row.mnemonic == "cmpxchg" and rng.random() < 0.4 and insn.mod == 3:
        gpr[0] = gpr[insn.rm] ^ (rng.getrandbits(64) << 32 & limit)
    gpr[4] = gpr[4] if WINDOW <= gpr[4] < WINDOW + 0x10000 else middle
    return Registers(tuple(gpr[:8] + ([0] * 8 if insn.bits != 64 else gpr[8:])), 0x202 | rng.getrandbits(12) & ARITH)


@pytest.fixture(params=[64, 32, 16])
def bare(request: pytest.FixtureRequest) -> Iterator[BareCpu]:
    if platform.machine() != "x86_64":
        pytest.skip("not an x86-64 processor")
    try:
        cpu = BareCpu(request.param)
    except BareCpuError as error:
        pytest.skip(str(error))
    with cpu:
        yield cpu


def test_rows_agree_with_the_processor(bare: BareCpu) -> None:
    rng = random.Random(f"{SEED}:{bare.bits}")
    twin = Twin(bare, rng)
    profile, bits = twin.case.profile, bare.bits
    rows = [
        row
        for row in (*ALU_ROWS, *SHIFT_ROWS, *DATA_ROWS, *FLOW_ROWS, *BMI_ROWS)
        if row.mnemonic not in LEAVES
        and not row.opcode.startswith("EVEX")
        and row.modes != ("no64" if bits == 64 else "64")
        and (not row.feature or row.feature in profile.features)
    ]
    ran: Counter[str] = Counter()
    wrong: dict[str, str] = {}
    for n in range(ROUNDS):
        row = rows[n % len(rows)]
        try:
            code = random_code(row, bits, rng)[:15]
            insn = decode(code, None, bits, profile=profile)
            before = random_registers(insn, twin, rng)
            found = twin.compare(insn, code, before)
        except (Fault, ModelError, Outside):
            continue
        ran[f"{insn.row.mnemonic} {insn.row.opcode}"] += 1
        if found:
            wrong.setdefault(insn.row.opcode, f"{insn.code.hex(' ')}: {insn.text()}: {found} (before: {before})")
        if n % 500 == 0:
            assert twin.window() == bare.memory(LOW, HIGH - LOW), f"memory differs after {insn.text()}"
    assert twin.window() == bare.memory(LOW, HIGH - LOW)
    assert not wrong, f"{len(wrong)} rows differ:\n" + "\n".join(wrong.values())
    never = [f"{r.mnemonic} {r.opcode}" for r in rows if f"{r.mnemonic} {r.opcode}" not in ran]
    assert not [name for name in never if not name.startswith(("cmpxchg8b", "bound"))], never
    assert sum(ran.values()) > ROUNDS * 0.5


def run_one(bare: BareCpu, code: str, gpr: dict[int, int], rflags: int = 0x202) -> Registers:
    values = [gpr.get(n, 0) for n in range(16)]
    values[4] = WINDOW + 0x8000
    return bare.execute(bytes.fromhex(code), Registers(tuple(values), rflags))


@pytest.mark.parametrize("bare", [64], indirect=True)
def test_failing_cmpxchg_leaves_its_destination_register_whole(bare: BareCpu) -> None:
    after = run_one(bare, "0f b1 d1", {0: 1 << 40 | 5, 1: 1 << 40 | 6, 2: 7})  # cmpxchg ecx, edx
    assert after.gpr[:2] == (6, 1 << 40 | 6)


@pytest.mark.parametrize("bare", [64], indirect=True)
def test_bare_flags_are_what_the_manual_says(bare: BareCpu) -> None:
    assert run_one(bare, "01 c8", {0: 0x7FFFFFFF, 1: 1}).rflags & ARITH == OF | SF | AF | 4
    assert run_one(bare, "29 c8", {0: 5, 1: 5}).rflags & ARITH == ZF | 4
    assert run_one(bare, "f9", {}).rflags & CF
