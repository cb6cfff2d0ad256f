"""What the tests of the reference model share: a Cpu in any mode, made by hand, and ways to look at it."""

from __future__ import annotations

import pytest

from harness.case import Blob, Case, Memory, Slot, VmShape
from harness.cpuid import FEATURES, CpuidEntry, CpuProfile, with_features
from harness.exits import Halt
from harness.modes import (
    CODE_BASE,
    STUBS,
    setup,
)
from harness.reference import execute
from harness.reference.cpu import (
    Cpu,
    Fault,
)

INTEL = (0x756E6547, 0x6C65746E, 0x49656E69)
AMD = (0x68747541, 0x444D4163, 0x69746E65)
LEFT_OUT = {"vmx", "svm", "tbm", "apx", "shstk", "ibt", "mpx", "osxsave", "ospke"}


def profile(vendor: tuple[int, int, int] = INTEL, *, without: tuple[str, ...] = ()) -> CpuProfile:
    """A processor with every feature that the harness names but virtualization and CET; 40 address bits."""
    base = CpuProfile((
        CpuidEntry(0, 0, 0, 0xD, *vendor), CpuidEntry(1), CpuidEntry(7, 0, 1, 1), CpuidEntry(7, 1, 1),
        CpuidEntry(0xD, 0, 1, 7, 576, 832), CpuidEntry(0xD, 1, 1, 0xF), CpuidEntry(0xD, 2, 1, 256, 576),
        CpuidEntry(0x80000000, 0, 0, 0x80000008), CpuidEntry(0x80000001), CpuidEntry(0x80000008, 0, 0, 0x3028),
    ))  # fmt: skip
    return with_features(base, add=[f for f in FEATURES if f not in LEFT_OUT and f not in without])


def start(
    mode: str, code: str = "f4", *, cpu: CpuProfile | None = None, blobs: tuple[Blob, ...] = (), **flat: int
) -> Cpu:
    """A Cpu in ``mode`` with ``code`` (hex) at RIP; ``flat`` registers with ``__`` for the dot."""
    chosen = cpu or profile()
    s = setup(mode, entry=CODE_BASE, profile=chosen)
    memory = Memory((*s.blobs, Blob(CODE_BASE, bytes.fromhex(code)), *blobs))
    state = s.state.with_({name.replace("__", "."): value for name, value in flat.items()})
    shape = VmShape((Slot(0, 0x20000), Slot(0x200000, 0x1000)))
    return Cpu(Case(f"test/{mode}", memory, state, chosen, shape=shape, bits=s.bits))


def run(cpu: Cpu, steps: int = 50) -> Cpu:
    """Step until HLT."""
    for _ in range(steps):
        execute.step(cpu)
        if any(isinstance(e, Halt) for e in cpu.pending_exits):
            return cpu
    raise AssertionError(f"no HLT in {steps} steps, RIP {cpu.rip:#x}")


def stub(cpu: Cpu) -> int:
    """The vector whose stub halted the Cpu."""
    assert STUBS < cpu.linear_rip() < STUBS + 0x1000, hex(cpu.rip)
    return (cpu.linear_rip() - STUBS) // 16


def words(cpu: Cpu, address: int, size: int, count: int) -> tuple[int, ...]:
    """``count`` little-endian words of ``size`` bytes at a linear address."""
    return tuple(cpu.mem.linear_read(address + size * i, size) for i in range(count))


def faults(function, *args, **more) -> tuple[int, int | None]:
    with pytest.raises(Fault) as seen:
        function(*args, **more)
    return seen.value.vector, seen.value.error
