"""Assembling and loading guests, and what is said when that goes wrong."""

import struct

import pytest
from elftools.elf.elffile import ELFFile

from harness.case import Slot, VmShape
from harness.guest import GuestError, assemble, load
from harness.modes import CODE_BASE
from harness.paths.common import guest_for

SOURCE = """
.if BITS == 16
.code16
.endif
.globl t_one, t_two, helper
t_one: mov $VALUE, %eax
        hlt
t_two: hlt
helper: ret
t_local: ret
"""


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KVM_HARNESS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "one.S"
    path.write_text(SOURCE)
    return path


def build(source, bits=64, **defines):
    return assemble(source, bits=bits, defines={"VALUE": 7, **defines})


@pytest.mark.parametrize(("bits", "code"), [(16, "66b807000000f4"), (32, "b807000000f4"), (64, "b807000000f4")])
def test_code_is_at_code_base_in_the_size_asked_for(source, bits, code):
    guest = load(build(source, bits))
    assert [b.gpa for b in guest.blobs] == [CODE_BASE]
    assert guest.blobs[0].data.startswith(bytes.fromhex(code))


def test_entries_are_the_global_t_symbols_in_order(source):
    guest = load(build(source))
    assert list(guest.entries) == ["one", "two"]
    assert guest.entries["one"] == CODE_BASE
    assert guest.symbols["helper"] > guest.entries["two"]


def test_addresses_have_source_lines(source):
    guest = load(build(source))
    assert guest.line(guest.entries["one"]) == ("one.S", 6)
    assert guest.line(guest.entries["one"] + 1) == ("one.S", 6)
    assert guest.line(guest.entries["two"]) == ("one.S", 8)
    assert guest.line(0) is None
    assert guest.line(0xFFFF) is None


def test_same_input_is_taken_from_the_cache_and_changed_input_is_not(source, tmp_path):
    first = build(source)
    stamp = first.stat().st_mtime_ns
    assert build(source) == first
    assert first.stat().st_mtime_ns == stamp
    assert build(source, VALUE=8) != first
    (tmp_path / "x.inc").write_text("")
    second = build(source)
    assert second != first
    source.write_text(SOURCE + "nop\n")
    assert build(source) != second
    assert not [p for p in first.parent.iterdir() if p.is_dir()], "no scratch left"


def test_missing_assembler_says_what_to_install(source, monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(GuestError, match="apt-get install binutils"):
        build(source)


def test_assembler_words_are_passed_on(source):
    source.write_text("nosuch %eax\n")
    with pytest.raises(GuestError, match=r"(?s)one.S: as failed:.*no such instruction"):
        build(source)


def test_guest_too_large_is_refused_by_the_linker_script(source):
    source.write_text(".fill 0x6001\n")
    with pytest.raises(GuestError, match="guest larger"):
        build(source)


def test_missing_source_and_wrong_size(tmp_path, source):
    with pytest.raises(GuestError, match="No such file"):
        build(tmp_path / "none.S")
    with pytest.raises(GuestError, match="use 16, 32 or 64"):
        build(source, 8)


def test_missing_file(tmp_path):
    with pytest.raises(GuestError, match="No such file"):
        load(tmp_path / "none.elf")


@pytest.mark.parametrize("data", [b"", b"\x7f", b"MZ" + bytes(100), b"#!/bin/sh\n"])
def test_not_elf(tmp_path, data):
    path = tmp_path / "bad.elf"
    path.write_bytes(data)
    with pytest.raises(GuestError, match="not an ELF file"):
        load(path)


def test_not_x86(source, tmp_path):
    data = bytearray(build(source).read_bytes())
    data[18:20] = struct.pack("<H", 183)
    path = tmp_path / "arm.elf"
    path.write_bytes(data)
    with pytest.raises(GuestError, match="EM_AARCH64, not for x86"):
        load(path)


@pytest.mark.parametrize("bits", [32, 64])
def test_truncated_anywhere_is_a_clear_error_or_still_whole(source, tmp_path, bits):
    data = build(source, bits).read_bytes()
    path = tmp_path / "cut.elf"
    refused = 0
    for size in [*range(4, 300), *range(300, len(data), 61)]:
        path.write_bytes(data[:size])
        try:
            load(path)
        except GuestError as error:
            refused += "truncated" in str(error)
    assert refused > 290


def test_no_loadable_segment(source, tmp_path):
    data = bytearray(build(source).read_bytes())
    struct.pack_into("<H", data, 0x38, 0)  # e_phnum
    path = tmp_path / "none.elf"
    path.write_bytes(data)
    with pytest.raises(GuestError, match="no loadable segment"):
        load(path)


def test_segment_outside_the_given_memory(source):
    elf = build(source)
    with pytest.raises(GuestError, match="outside guest memory"):
        load(elf, VmShape(slots=(Slot(0, 0x8000),)))


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("addq_rr %r17, %r16", "d55801c8"),
        ("rex2_rmx 0x8b, %r31, 0x10, %r16, %r17, 3", "d57c8bbcc810000000"),
        ("pushp_r %r16", "d51850"),
        ("push2_rr %r17, %r16", "62fc7c10fff1"),
        ("add3 %r18, %r17, %r16, 1", "62ecfc1401d1"),
        ("ccmp_rr 4, 1, %r17, %r16", "62ec8c0439c8"),
        ("jmpabs_i 0x1122334455667788", "d500a18877665544332211"),
    ],
)
def test_apx_macros_give_the_bytes_of_real_assemblers(source, line, code):
    """Bytes on which GNU as 2.44 and clang 19 agree (a macro's displacement has always 32 bits)."""
    source.write_text(f'.include "apx_macros.inc"\n{line}\n')
    data = load(build(source)).blobs[0].data
    assert data.hex() == code


@pytest.mark.parametrize("mode", ["real", "prot32", "long"])
def test_symbols_are_those_that_pyelftools_finds(mode):
    guest = guest_for("gpr.S", mode)
    with guest.path.open("rb") as file:
        table = ELFFile(file).get_section_by_name(".symtab")
        every = [
            s for s in table.iter_symbols()
            if s.name and s["st_info"]["type"] in ("STT_NOTYPE", "STT_FUNC", "STT_OBJECT")
            and s["st_shndx"] not in ("SHN_ABS", "SHN_UNDEF")
        ]  # fmt: skip
    assert guest.symbols == {s.name: s["st_value"] for s in every}
    assert guest.global_names == {s.name for s in every if s["st_info"]["bind"] == "STB_GLOBAL"}
    assert guest.entries
