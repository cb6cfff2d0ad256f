"""The code of a Case for people: disassembly (objdump), registers it uses, its source line (DWARF).

Every part degrades to nothing, or to hex bytes, where a tool or the guest's source is not there.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from harness.case import Case, Observation
from harness.lockstep import Difference
from harness.state import CpuState, unpack_sections

REACH: Final = 256
"""Bytes after the start within which an exit counts as the end of the code that ran."""
GUESS: Final = 48
"""Bytes to show where the exit lies elsewhere (in an exception stub, say)."""

_MACHINE: Final = {16: "i8086", 32: "i386", 64: "i386:x86-64"}
_LINE: Final = re.compile(r"^\s*([0-9a-f]+):\t((?:[0-9a-f]{2} )+)\s*(?:\t(.*))?$")


@dataclass(frozen=True, slots=True)
class Insn:
    """One instruction: linear address, bytes, Intel syntax (empty when there is no disassembler)."""

    address: int
    code: bytes
    text: str

    def __str__(self) -> str:
        return f"{self.address:x}: {self.code.hex(' '):<23} {self.text}".rstrip()


# --- exits and addresses --------------------------------------------------------------------------------------------


def stands_at(seen: Observation | None) -> int | None:
    """Linear address of CS:RIP at an exit, None when the machine shows no registers there."""
    if seen is None or "regs" not in seen.sections:
        return None
    return linear(unpack_sections(seen.sections))


def linear(state: CpuState) -> int:
    """CS.base + RIP, cut to 32 bits outside long mode."""
    address = state.cs.base + state.rip
    return address & ((1 << 64) - 1 if state.efer >> 10 & 1 else 0xFFFFFFFF)


def exit_address(difference: Difference | None) -> int | None:
    """Where the machines stand at the difference: the right one if it can say, else the judged one."""
    if difference is None:
        return None
    found = stands_at(difference.expected)
    return stands_at(difference.got) if found is None else found


def ram(case: Case, gpa: int, size: int) -> bytes:
    """Initial RAM at a guest-physical address, as far as its slot reaches."""
    for slot in case.shape.slots:
        if slot.gpa <= gpa < slot.gpa + slot.size:
            return case.memory.image(slot)[gpa - slot.gpa :][:size]
    return b""


# --- disassembly ----------------------------------------------------------------------------------------------------


def listing(case: Case, difference: Difference | None) -> list[Insn]:
    """The instructions from the start of a Case to the exit at which machines differ."""
    return code_until(case, exit_address(difference))


def code_until(case: Case, end: int | None) -> list[Insn]:
    """The instructions from the start of a Case to ``end``. (Code is identity-mapped: harness/modes.py.)"""
    start = linear(case.start)
    near = end is not None and start < end <= start + REACH
    # 15 bytes more, so that what straddles the exit is shown whole
    code = ram(case, start, (end - start if near and end is not None else GUESS) + 15)
    found = disassemble(code, case.bits, start)
    if not any(insn.text for insn in found):
        return disassemble(code[:-15], case.bits, start)
    if near:
        return [i for i in found if end is not None and i.address < end]
    for n, insn in enumerate(found):
        if insn.code == b"\xf4":
            return found[: n + 1]
    return [i for i in found if i.address < start + GUESS]


def disassemble(code: bytes, bits: int, address: int) -> list[Insn]:
    """``code`` as instructions; 16 bytes a line without text where binutils has no objdump."""
    objdump = shutil.which("objdump")
    if objdump and code:
        with tempfile.NamedTemporaryFile(suffix=".bin") as file:
            file.write(code)
            file.flush()
            command = [objdump, "-D", "-z", "-b", "binary", "-m", _MACHINE[bits], "-M", "intel", "--insn-width=15",
                       f"--adjust-vma={address:#x}", file.name]  # fmt: skip
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        rows = [m for m in map(_LINE.match, done.stdout.splitlines()) if m]
        if rows:
            return [Insn(int(m[1], 16), bytes.fromhex(m[2]), " ".join((m[3] or "").split())) for m in rows]
    return [Insn(address + n, code[n : n + 16], "") for n in range(0, len(code), 16)]


# Names of a GPR in any width -> the 64-bit one.
_GPR: Final = {
    name: full
    for full in ("rax", "rcx", "rdx", "rbx")
    for name in (full, f"e{full[1:]}", full[1:], f"{full[1]}l", f"{full[1]}h")
} | {name: full for full in ("rsp", "rbp", "rsi", "rdi") for name in (full, f"e{full[1:]}", full[1:], f"{full[1:]}l")}
_WORD: Final = re.compile(r"[a-z][a-z0-9]*")
_NUMBERED: Final = re.compile(r"r(\d\d?)[bwd]?$")

# Mnemonic -> registers it uses without naming them (SDM vol. 2).
_IMPLICIT: Final = {
    "cmpxchg": "rax", "cmpxchg8b": "rax rdx rbx rcx", "cmpxchg16b": "rax rdx rbx rcx", "mul": "rax rdx",
    "imul": "rax rdx", "div": "rax rdx", "idiv": "rax rdx", "mulx": "rdx", "cbw": "rax", "cwde": "rax", "cdqe": "rax",
    "cwd": "rax rdx", "cdq": "rax rdx", "cqo": "rax rdx", "lahf": "rax", "sahf": "rax", "daa": "rax", "das": "rax",
    "aaa": "rax", "aas": "rax", "aam": "rax", "aad": "rax", "loop": "rcx", "loope": "rcx", "loopne": "rcx",
    "rep": "rcx", "repz": "rcx", "repnz": "rcx", "jcxz": "rcx", "jecxz": "rcx", "jrcxz": "rcx", "push": "rsp",
    "pop": "rsp", "pushf": "rsp", "popf": "rsp", "pusha": "rsp", "popa": "rsp", "call": "rsp", "ret": "rsp",
    "iret": "rsp", "enter": "rsp rbp", "leave": "rsp rbp", "cpuid": "rax rcx", "rdmsr": "rcx", "wrmsr": "rax rcx rdx",
    "xsetbv": "rax rcx rdx", "xgetbv": "rcx", "syscall": "rcx r11", "sysret": "rcx r11", "sysexit": "rcx rdx",
}  # fmt: skip


def registers_used(insns: list[Insn]) -> list[str]:
    """GPRs that the code names or uses without naming, in encoding order."""
    found = set()
    for insn in insns:
        for word in _WORD.findall(insn.text):
            numbered = _NUMBERED.match(word)
            if numbered and 8 <= int(numbered[1]) < 32:
                found.add(f"r{numbered[1]}")
            elif word in _GPR:
                found.add(_GPR[word])
            found.update(_IMPLICIT.get(word, _IMPLICIT.get(word[:-1], "")).split())
    return [name for name in CpuState().flat() if name in found]


# --- source lines ---------------------------------------------------------------------------------------------------


def source_line(case: Case, address: int) -> str:
    """``guests/gpr.S:118`` for a linear address in the guest of ``case.origin``; empty when it cannot be told.

    The Case does not say with which constants its guest was assembled, so every mode of its code size is tried and the
    one whose bytes are in the Case's RAM is taken (assembled guests are cached).
    """
    source, _, _ = case.origin.partition(":")
    if not source.endswith((".S", ".s")):
        return ""
    try:
        return _source_line(case, source, address)
    except (ImportError, OSError, ValueError, LookupError):
        return ""


def _source_line(case: Case, source: str, address: int) -> str:
    from harness import guest, modes  # binutils and pyelftools: only where there is a source to look at

    path = Path(source) if Path(source).is_absolute() else guest.GUESTS_DIR.parent / source
    if not path.exists():
        return ""
    fitting = [m for m in modes.MODES if modes.bits_of(m) == case.bits]
    fitting.sort(key=lambda m: m not in re.split(r"[^a-z0-9-]+", case.name))
    for mode in fitting:
        try:
            elf = guest.assemble(path, bits=case.bits, defines=modes.assembler_constants(mode))
            image = guest.load(elf, case.shape)
        except guest.GuestError:
            continue
        if all(ram(case, b.gpa, len(b.data)) == b.data for b in image.blobs):
            if not any(b.gpa <= address < b.gpa + len(b.data) for b in image.blobs):
                return ""
            line = image.line(address)
            if line is None:
                return ""
            folder = source.rpartition("/")[0]
            return f"{folder}/{line[0]}:{line[1]}" if folder and "/" not in line[0] else f"{line[0]}:{line[1]}"
    return ""
