"""The decoder against objdump, and the encodings that no disassembler in the lab knows (REX2)."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from harness.reference.cpu import GP, UD, Fault, ModelError
from harness.reference.decoder import Truncated, decode
from harness.reference.table import TABLE, Entry

FILL = b"\x11\x22\x33\x44\x55\x66\x77\x08\x19\x2a\x3b\x4c\x5d\x6e\x7f"
MODRM = ("00", "04:24", "04:8d", "05", "06", "44:24", "44:6b", "45", "80", "84:91", "86", "c0", "c1", "c6", "d3")
LEGACY_PREFIXES = ("", "66", "67", "6667", "2e", "64")
REX = ("", "48", "4f", "40")
SLOT = 16


def encodings(entry: Entry, bits: int) -> list[bytes]:
    """Sample encodings of a row: prefixes, REX, ModRM and SIB forms."""
    opcode = {0: b"", 1: b"\x0f", 2: b"\x0f\x38", 3: b"\x0f\x3a"}[entry.map]
    mandatory = b"" if entry.prefix in ("", "NP", "NR") else bytes.fromhex(entry.prefix)
    out = []
    for legacy in LEGACY_PREFIXES:
        for rex in REX if bits == 64 else ("",):
            for byte in {entry.opcodes[0], entry.opcodes[-1]}:
                head = bytes.fromhex(legacy) + mandatory + bytes.fromhex(rex) + opcode + bytes([byte])
                for form in MODRM if entry.modrm and entry.exact < 0 else ("",):
                    tail = bytearray(bytes.fromhex(form.replace(":", "")))
                    if tail and entry.ext >= 0:
                        tail[0] = tail[0] & 0xC7 | entry.ext << 3
                    if entry.exact >= 0:
                        tail = bytearray([entry.exact])
                    out.append(head + bytes(tail) + FILL)
    return out


def objdump(code: bytes, bits: int, isa: str, tmp_path: Path) -> dict[int, tuple[int, str]]:
    """Offset -> (length, text) of every instruction that objdump sees."""
    file = tmp_path / "code"
    file.write_bytes(code)
    arch = {16: "i8086", 32: "i386", 64: "i386:x86-64"}[bits]
    command = ["objdump", "-D", "-b", "binary", "-m", arch, "-M", f"intel,{isa}", "--insn-width=16", str(file)]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines = re.findall(r"^ *([0-9a-f]+):\t((?:[0-9a-f]{2} )+) *\t(.*)$", out, re.M)
    return {int(at, 16): (len(raw.split()), text) for at, raw, text in lines}


@pytest.mark.skipif(shutil.which("objdump") is None, reason="binutils are not installed")
@pytest.mark.parametrize(("bits", "amd"), [(16, False), (32, False), (64, False), (64, True)])
def test_lengths_agree_with_objdump(bits: int, amd: bool, tmp_path: Path) -> None:
    samples: list[tuple[bytes, str]] = []
    for row in TABLE.rows:
        entry = TABLE.entry(row)
        assert entry is not None
        if entry.map > 3 or row.mnemonic == "(bad)" or row.modes == ("no64" if bits == 64 else "64"):
            continue
        for code in encodings(entry, bits):
            try:
                insn = decode(code, 0, bits, amd=amd)
            except ModelError:
                continue  # VEX space
            if insn.row.mnemonic != "(bad)":
                samples.append((insn.code, insn.text()))
    assert len(samples) > 2000
    blob = b"".join(code.ljust(SLOT, b"\x90") for code, _ in samples)
    theirs = objdump(blob, bits, "amd64" if amd else "intel64", tmp_path)
    wrong = []
    for n, (code, text) in enumerate(samples):
        length, other = theirs.get(n * SLOT, (0, "out of step"))
        if length != len(code) and "(bad)" not in other:
            wrong.append(f"{code.hex(' ')}: {text} ({len(code)}) / {other} ({length})")
    assert not wrong, "\n".join(wrong[:40])


@pytest.mark.parametrize(
    ("code", "bits", "text"),
    [
        ("4801c8", 64, "add rax,rcx"),
        ("66 05 3412", 32, "add ax,0x1234"),
        ("83 c0 ff", 32, "add eax,0xffffffff"),
        ("00 e0", 64, "add al,ah"),
        ("40 00 e0", 64, "add al,spl"),
        ("45 8b 7c d8 10", 64, "mov r15d,DWORD PTR [r8+rbx*8+0x10]"),
        ("8b 05 10000000", 64, "mov eax,DWORD PTR [rip+0x10]"),
        ("8b 46 fe", 16, "mov ax,WORD PTR [bp-0x2]"),
        ("64 8a 07", 16, "mov al,BYTE PTR fs:[bx]"),
        ("8b 04 25 78563412", 64, "mov eax,DWORD PTR ds:[0x12345678]"),
        ("48 98", 64, "cdqe"),
        ("f0 ff 00", 64, "lock inc DWORD PTR [rax]"),
        ("0f 94 c1", 64, "sete cl"),
        ("c8 1000 02", 64, "enter 0x10,0x2"),
        ("41 90", 64, "xchg r8d,eax"),
        ("eb fe", 64, "jmp 0x1000"),
    ],
)
def test_text(code: str, bits: int, text: str) -> None:
    assert decode(bytes.fromhex(code), 0x1000, bits).text(0x1000) == text


# --- APX (bytes: two assemblers agree on the first four) -------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("d5 58 01 c8", "add r16,r17"),
        ("d5 7c 8b 7c c8 10", "mov r31,QWORD PTR [r16+r17*8+0x10]"),
        ("d5 10 50", "push r16"),
        ("d5 18 50", "pushp r16"),
        ("d5 18 90", "xchg r16,rax"),
        ("d5 80 af c1", "imul eax,ecx"),
        ("d5 00 a1 8877665544332211", "jmpabs 0x1122334455667788"),
        ("d5 00 00 e0", "add al,spl"),
    ],
)
def test_rex2(code: str, text: str) -> None:
    insn = decode(bytes.fromhex(code), 0, 64, apx=True)
    assert (insn.text(), insn.length) == (text, len(bytes.fromhex(code)))


def test_rex2_needs_enabling() -> None:
    with pytest.raises(Fault) as fault:
        decode(bytes.fromhex("d5 58 01 c8"), 0, 64, apx=False)
    assert fault.value.vector == UD


@pytest.mark.parametrize("high", ["00 40", "00 74", "00 a0", "00 a2", "00 e9", "80 31", "80 84", "08 a1"])
def test_rex2_reserved_rows_are_undefined(high: str) -> None:
    with pytest.raises(Fault) as fault:
        decode(bytes.fromhex("d5" + high) + FILL, 0, 64, apx=True)
    assert fault.value.vector == UD


def test_rex_before_rex2_is_undefined() -> None:
    with pytest.raises(Fault) as fault:
        decode(bytes.fromhex("48 d5 58 01 c8"), 0, 64, apx=True)
    assert fault.value.vector == UD


def test_d5_is_aad_outside_64_bit_mode() -> None:
    assert decode(bytes.fromhex("d5 0a"), 0, 32, apx=True).text() == "aad 0xa"


# --- limits ----------------------------------------------------------------------------------------------------------


def test_fifteen_bytes_are_the_most() -> None:
    assert decode(b"\x66" * 14 + b"\x90", 0, 64).length == 15
    with pytest.raises(Fault) as fault:
        decode(b"\x66" * 15 + b"\x90", 0, 64)
    assert (fault.value.vector, fault.value.error) == (GP, 0)


def test_a_cut_instruction_asks_for_more() -> None:
    for n in range(1, 5):
        with pytest.raises(Truncated):
            decode(bytes.fromhex("b878563412")[:n], 0, 64)


@pytest.mark.parametrize("code", ["f0 01 c8", "f0 39 08", "f0 90", "f0 8b 00", "8d c0", "fe d0", "ff f8", "06"])
def test_undefined_encodings(code: str) -> None:
    assert decode(bytes.fromhex(code) + FILL, 0, 64).row.mnemonic == "(bad)"


def test_unknown_instruction_names_bytes_and_rip() -> None:
    with pytest.raises(ModelError, match=r"0f 0e.*0x1234"):
        decode(bytes.fromhex("0f 0e") + FILL, 0x1234, 64)
