"""Lengths and text of every REX2, VEX and EVEX form against two disassemblers that know APX.

They come from Debian (harness/lab/disassembler.py). Here they are used if the cache has them; tests/lab fetches them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from harness.lab.debian import FetchError
from harness.lab.disassembler import Binutils, Fetch, Llvm, cached_package
from harness.reference.decoder import decode
from harness.reference.templates import Template, templates

# Rows that a disassembler shows under the name of a later feature, or whose unused bits it does not allow.
NAMES_DIFFER = re.compile(r"nop |prefetch|[ms]fence ")


def forms(seed: int) -> Iterator[Template]:
    for t in templates(0x14000, 0xB000, seed=seed):
        if not t.name.partition(": ")[2].startswith(("plain", "rex ")):
            yield t


def plain(text: str) -> str:
    """Text without what says how an instruction is encoded."""
    text = re.sub(r" *[#<].*$", "", text.replace("\t", " ").strip().lower())
    text = re.sub(r"\{(evex|vex|rex2[^}]*)\} *|^(rex\S*|data16) |\b[a-z]+ ptr ", "", text)
    text = text.replace("movabs", "mov").replace("pushfq", "pushf").replace("popfq", "popf")
    return re.sub(r" +", " ", re.sub(r"\[([^]]*)\]", lambda m: f"[{address(m[1])}]", text))


def address(text: str) -> str:
    """``16+8*r17+base`` in any order and with any sign -> sorted terms, scale last."""
    terms = re.findall(r"([+-]?)([^+-]+)", re.sub(r"\s", "", text))
    out = []
    for sign, term in terms:
        parts = sorted(term.split("*"), key=lambda p: p[0].isdigit())
        if parts[0] in ("riz", "eiz") or (len(parts) == 1 and parts[0][0].isdigit() and not int(parts[0], 0)):
            continue
        if parts[0][0].isdigit():
            parts = [str(int(sign + parts[0], 0))]
        out.append("*".join(parts if len(parts) > 1 and parts[1] != "1" else parts[:1]))
    return "+".join(sorted(out))


def words(text: str) -> tuple[str, list[str]]:
    """Mnemonic with its decorations, and operands."""
    m = re.match(r"((?:\{nf\} |lock )?\S+(?: \{dfv=[^}]*\})?) ?(.*)$", plain(text))
    assert m is not None
    return m[1].replace(", ", ","), [op.strip() for op in m[2].split(",")] if m[2] else []


def same_operand(a: str, b: str) -> bool:
    if a == b:
        return True
    try:
        return abs(int(a, 0) - int(b, 0)) in (0, 1 << 8, 1 << 16, 1 << 32, 1 << 64)
    except ValueError:
        return False


def differs(template: Template, length: int, text: str) -> str | None:
    insn = decode(template.code, None, 64, apx=1)
    ours, theirs = words(insn.text()), words(text) if length else ("(bad)", [])
    same = len(ours[1]) == len(theirs[1]) and all(map(same_operand, ours[1], theirs[1]))
    if length == len(template.code) and ours[0] == theirs[0] and same:
        return None
    return f"{template.name}: {template.code.hex()}: {insn.text()} ({insn.length}) / {text} ({length})"


def check_objdump(fetch: Fetch, seed: int = 0) -> int:
    """Compare with objdump; the number of forms. AssertionError with what differs."""
    todo = [t for t in forms(seed) if not NAMES_DIFFER.match(t.name)]
    seen = Binutils(fetch).disassemble([t.code for t in todo])
    # "pushw", "OWORD PTR": objdump's names for a 16-bit immediate and for 16 bytes.
    seen = [(length, re.sub(r"\bpushw\b", "push", text)) for length, text in seen]
    wrong = [d for t, (length, text) in zip(todo, seen, strict=True) if (d := differs(t, length, text))]
    assert not wrong, f"{len(wrong)} of {len(todo)}:\n" + "\n".join(wrong[:30])
    return len(todo)


def llvm_lacks(t: Template) -> bool:
    """What LLVM 19 rejects, or shows wrongly, and objdump and XED do not."""
    name, _, form = t.name.partition(": ")
    _, opcode = name.split(" ", 1)
    return (
        bool(NAMES_DIFFER.match(t.name))
        or "w66" in form  # a 66H beside W in map 4
        or bool(re.search(r"\b(C0|C1|D0|D1|D2|D3) /6|\bF[67] /1", opcode))  # aliases
        or (" F2." in " " + opcode.replace("EVEX.", " ") and "ZU" in opcode and ("mem" in form or "w" in form.split()))
        or name.startswith(("push 50", "pop 58", "xchg 90", "clflush"))  # PUSHP whatever W says; NOP; CLFLUSHOPT
        or (".ZU.NF" in opcode and "nd nf" in form)  # {nf} imulzu
    )


def check_llvm(fetch: Fetch, seed: int = 0) -> int:
    """Compare with LLVM; the number of forms. AssertionError with what differs."""
    llvm = Llvm(fetch)
    wrong, count = [], 0
    for t in forms(seed):
        if llvm_lacks(t):
            continue
        count += 1
        length, text = llvm.disassemble(t.code)
        name, operands = words(text) if length else ("(bad)", [])
        if t.name.startswith("xchg") and not t.memory:
            operands.reverse()
        if re.search(r"\bD[01] /", t.name):
            operands.append("1")
        if difference := differs(t, length, f"{name} {','.join(operands)}"):
            wrong.append(difference)
    assert not wrong, f"{len(wrong)} of {count}:\n" + "\n".join(wrong[:30])
    return count


def test_every_form_reads_as_objdump_shows_it() -> None:
    try:
        assert check_objdump(cached_package) > 5_000
    except (FileNotFoundError, FetchError) as error:
        pytest.skip(str(error))


def test_every_form_reads_as_llvm_shows_it() -> None:
    try:
        assert check_llvm(cached_package) > 4_500
    except (OSError, FetchError) as error:
        pytest.skip(str(error))
