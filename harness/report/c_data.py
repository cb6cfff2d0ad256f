"""RAM as C: the code with its disassembly, tables as arithmetic progressions, the rest as bytes; zeros left out."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from harness.case import Blob, Case
from harness.lockstep import Difference
from harness.report.listing import Insn, linear, listing

_MIN_FILL = 4
_ZERO = bytes(8)


@dataclass(frozen=True, slots=True)
class Fill:
    """``count`` 64-bit words, ``stride`` bytes apart: value, value + step, ...  (page tables, IDTs, stubs)."""

    gpa: int
    count: int
    stride: int
    value: int
    step: int


def memory_c(case: Case, difference: Difference | None) -> str:
    """The arrays ``slots``, ``fills`` and ``blobs`` of the reproducer."""
    code = listing(case, difference)
    start = linear(case.start)
    size = sum(len(i.code) for i in code)
    fills: list[Fill] = []
    blobs: list[Blob] = []
    for slot in case.shape.slots:
        image = bytearray(case.memory.image(slot))
        if code and slot.gpa <= start < slot.gpa + slot.size:
            image[start - slot.gpa : start - slot.gpa + size] = bytes(size)
        more = list(find_fills(bytes(image), slot.gpa))
        taken = {(f.gpa - slot.gpa + n * f.stride) // 8 for f in more for n in range(f.count)}
        for i in taken:
            image[8 * i : 8 * i + 8] = _ZERO
        fills += more
        blobs += byte_runs(bytes(image), slot.gpa, taken)
    out = [f"#define NSLOTS {len(case.shape.slots)}", "static const struct slot slots[NSLOTS] = {"]
    out += [f"\t{{ {s.gpa:#x}, {s.size:#x} }}," for s in case.shape.slots]
    out += ["};", "", "static const struct fill fills[] = {"]
    out += [f"\t{{ {f.gpa:#x}, {f.count}, {f.stride}, {f.value:#x}, {f.step:#x} }}," for f in fills]
    out += ["\t{ 0 }", "};", ""]
    names = []
    if code:
        out += [*_code(code), ""]
    for blob in blobs:
        name = f"ram_{blob.gpa:x}"
        out += [f"static const uint8_t {name}[] = {{", *_bytes(blob.data), "};", ""]
        names.append(f"\t{{ {blob.gpa:#x}, sizeof({name}), {name} }},")
    if code:  # last: it may begin or end inside a word
        names.append(f"\t{{ {start:#x}, sizeof(code), code }},")
    out += ["static const struct blob blobs[] = {", *names, "\t{ 0 }", "};"]
    return "\n".join(out) + "\n"


def _code(code: list[Insn]) -> Iterator[str]:
    yield "static const uint8_t code[] = {"
    for insn in code:
        note = f" /* {comment(insn.text)} */" if insn.text else ""
        yield (f"\t{', '.join(f'{b:#04x}' for b in insn.code)},".ljust(40) + note).rstrip()
    yield "};"


def _bytes(data: bytes) -> Iterator[str]:
    for n in range(0, len(data), 16):
        yield "\t" + " ".join(f"{b:#04x}," for b in data[n : n + 16])


def comment(text: str) -> str:
    """``text`` fit to stand in a C comment."""
    return text.replace("*/", "* /").replace("/*", "/ *")


def find_fills(image: bytes, gpa: int) -> Iterator[Fill]:
    """Arithmetic progressions of at least four non-zero words, in contiguous or every second word."""
    words = struct.unpack(f"<{len(image) // 8}Q", image)
    left = {i for i, w in enumerate(words) if w}
    for i in range(len(words)):
        if i not in left:
            continue
        count, stride = max((_length(words, left, i, s), -s) for s in (1, 2))
        if count >= _MIN_FILL:
            step = words[i - stride] - words[i] & (1 << 64) - 1
            left.difference_update(range(i, i - stride * count, -stride))
            yield Fill(gpa + 8 * i, count, -8 * stride, words[i], step)


def _length(words: tuple[int, ...], left: set[int], i: int, stride: int) -> int:
    if i + stride not in left:
        return 1
    step = words[i + stride] - words[i]
    n = 1
    while i + n * stride in left and not (words[i] + n * step - words[i + n * stride]) & (1 << 64) - 1:
        n += 1
    return n


def byte_runs(image: bytes, gpa: int, taken: set[int]) -> Iterator[Blob]:
    """The stretches of 64-bit words that are not zero. One zero word does not end a stretch; a ``taken`` one does."""
    start = last = -2
    for i in range(len(image) // 8):
        if image[8 * i : 8 * i + 8] == _ZERO:
            continue
        if i - last > 2 or i - 1 in taken:
            if start >= 0:
                yield Blob(gpa + 8 * start, image[8 * start : 8 * last + 8])
            start = i
        last = i
    if start >= 0:
        yield Blob(gpa + 8 * start, image[8 * start : 8 * last + 8])
