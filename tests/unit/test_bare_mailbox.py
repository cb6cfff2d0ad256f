"""The bare emulator, as far as it needs no QEMU: its layout, its list of defects, what it says of a wrong emulator."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from harness.case import Case, Memory, Observation
from harness.cpuid import CpuProfile
from harness.exits import Halt, Io, Mmio
from harness.lab import bare_mailbox
from harness.lab.bare_arbiter import load_defects, same_way
from harness.lab.bare_emulator import BareEmulator, _exits
from harness.lab.bare_mailbox import Access, Mailbox, Operation, Result
from harness.lab.errors import LabError
from harness.lockstep import Difference
from harness.memory_diff import MemoryDiff
from harness.paths import _MORE, FAMILIES
from harness.state import SIZEOF, CpuState, FieldDiff, pack_sections

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class _Emulator:
    name: str
    binary: Path
    firmware: Path | None = None


def _device() -> str:
    found = [p for p in (ROOT / "ci" / "qemu").rglob("*.patch") if "hw/i386/bare-machine.c" in p.read_text()]
    assert len(found) == 1
    return found[0].read_text()


def test_numbers_are_those_of_the_device() -> None:
    source = _device()
    defined = {name: int(value, 0) for name, value in re.findall(r"#define BARE_(\w+)\s+(\w+)", source)}
    assert defined["VERSION"] == bare_mailbox._VERSION
    assert defined["MAGIC"] == bare_mailbox._MAGIC
    assert defined["RAM"] == bare_mailbox.RAM
    assert defined["MSRS"] == bare_mailbox._MSR_COUNT
    assert defined["SLOTS"] == bare_mailbox._SLOT_COUNT
    assert defined["LEAVES"] == bare_mailbox._LEAF_COUNT
    assert defined["ACCESSES"] == bare_mailbox._ACCESS_COUNT
    offsets = {n: int(at, 0) for n, at in re.findall(r"offsetof\(BareMailbox, (\w+)\) != (\w+)\)", source)}
    assert offsets["regs"] == bare_mailbox._SECTIONS["regs"][0]
    assert offsets["sregs2"] == bare_mailbox._SECTIONS["sregs2"][0]
    assert offsets["msrs"] == bare_mailbox._MSRS
    assert offsets["pages"] == bare_mailbox._PAGES
    assert offsets["leaves"] == bare_mailbox._LEAVES
    assert offsets["accesses"] == bare_mailbox._ACCESSES


def test_names_of_requests_and_results_are_those_of_the_device() -> None:
    source = _device().replace("\n+", "\n")
    operations = re.search(r"enum \{ (OP_.*?) \};", source, re.DOTALL)
    results = re.search(r"enum \{\s+(RESULT_.*?),?\s+\};", source, re.DOTALL)
    assert operations
    assert results
    names = [n.strip().removesuffix(" = 1") for n in operations[1].split(",")]
    assert names == [f"OP_{o.name}" for o in Operation]
    names = [n.strip().removesuffix(" = 1") for n in results[1].split(",")]
    assert names == [f"RESULT_{r.name}" for r in Result]


def test_sections_have_the_size_of_their_place() -> None:
    packed = pack_sections(CpuState(), bare_mailbox._SECTIONS)
    assert {n: len(d) for n, d in packed.items()} == {n: size for n, (_, size) in bare_mailbox._SECTIONS.items()}
    assert SIZEOF["sregs2"] == bare_mailbox._SECTIONS["sregs2"][1]


def test_items_of_one_port_in_a_row_are_one_exit() -> None:
    def out(port: int, data: bytes) -> Access:
        return Access(port, data, True, True)

    read = Access(0x10, b"\x01\x02", False, True)
    assert _exits([out(0x10, b"a"), out(0x10, b"b")]) == [Io(0x10, 1, True, b"ab", 2)]
    assert _exits([out(0x10, b"a"), out(0x11, b"b")]) == [Io(0x10, 1, True, b"a"), Io(0x11, 1, True, b"b")]
    assert _exits([read, read]) == [Io(0x10, 2, False, b"", 2)]
    hole = Access(0xA0000, b"abc", True, False)
    assert _exits([hole, hole]) == [Mmio(0xA0000, 3, True, b"abc")] * 2


def test_an_emulator_that_is_not_there_is_said_so() -> None:
    with pytest.raises(LabError, match="lab build"), Mailbox(_Emulator("none", Path("/nowhere/qemu")), "max"):
        pass


def test_an_emulator_without_the_device_is_said_so() -> None:
    with pytest.raises(LabError, match="no device bare-machine"), Mailbox(_Emulator("true", Path("/bin/true")), "max"):
        pass


def test_actions_need_a_case() -> None:
    with pytest.raises(RuntimeError, match="load a Case first"):
        BareEmulator(_Emulator("none", Path("/nowhere/qemu"))).memory_diff({}, {})


def test_listed_defects_name_families_of_the_suite() -> None:
    families = {f.name for f in FAMILIES} | set(_MORE)
    for defect in load_defects():
        assert defect.why
        assert defect.reference
        assert {pattern.partition("/")[0] for pattern in defect.cases} <= families, defect.name


def test_a_damaged_list_says_which_row(tmp_path: Path) -> None:
    path = tmp_path / "defects.toml"
    path.write_text('[[defect]]\nname = "x"\ncases = []\nwhy = "y"\n')
    with pytest.raises(LabError, match="defect 1: missing or unknown: reference"):
        load_defects(path)


def test_same_way_compares_values_and_memory() -> None:
    state = pack_sections(CpuState(), ("regs",))
    expected, got = Observation(Halt(), state), Observation(Halt(), state)
    one = Difference(0, 0, expected, got, (FieldDiff("rax", 1, 2),), (MemoryDiff(0, b"a", b"b"),))
    assert same_way(one, replace(one, index=3))
    assert not same_way(one, replace(one, registers=(FieldDiff("rax", 1, 3),)))
    assert not same_way(one, replace(one, memory=()))
    assert not same_way(one, replace(one, got=Observation(Io(1, 1, False), state)))
    other = replace(one, got=Observation(Io(1, 1, False), state), registers=(), memory=())
    assert same_way(other, replace(other, index=7))


def test_a_case_that_does_not_fit_is_refused_before_anything_starts() -> None:
    machine = BareEmulator(_Emulator("none", Path("/nowhere/qemu")))
    case = Case("x", Memory(()), CpuState(), CpuProfile(()))
    with pytest.raises(LabError, match="nowhere"):
        machine.load(case)
