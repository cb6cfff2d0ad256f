"""The APX guests: macros against an assembler that knows APX, and what the model makes of every entry."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.case import Run
from harness.cpuid import FEATURES, CpuidEntry, CpuProfile, with_features
from harness.guest import GUESTS_DIR, assemble, load
from harness.lab.debian import FetchError
from harness.lab.disassembler import Binutils, Fetch, cached_package
from harness.paths import all_cases
from harness.reference.cpu import UD
from harness.reference.machine import ReferenceMachine
from harness.state import unpack_sections

MACROS = (
    ("ev_rr 0x01, %r18, %r17, v=%r16, nd=1, nf=1", "{nf} addq %r18, %r17, %r16"),
    ("ev_rr 0x01, %r17, %r30, w=0, pp=1", "{evex} addw %r17w, %r30w"),
    ("ev_rr 0x10, %r31, %r9, v=%r21, w=0, nd=1", "adcb %r31b, %r9b, %r21b"),
    ("ev_rr 0xaf, %r17, %r28, v=%rcx, nd=1", "imulq %r28, %r17, %rcx"),
    ("ev_rm 0x29, %r27, 0x12345678, %r20", "{evex} subq %r27, 0x12345678(%r20)"),
    ("ev_rm 0x03, %r9, 0x11223344, %r28, w=0", "{evex} addl 0x11223344(%r28), %r9d"),
    ("ev_rmx 0x33, %r16, 0x11223344, %rbx, %r31, 2, v=%r22, nd=1", "xorq 0x11223344(%rbx,%r31,4), %r16, %r22"),
    ("ev_xr 0xd3, 4, %r26, nf=1", "{nf} shlq %cl, %r26"),
    ("ev_xr 0xd0, 7, %r17, v=%r23, nd=1, w=0", "sarb $1, %r17b, %r23b"),
    ("ev_xm 0xf7, 3, 0x11223344, %r28, v=%r30, nd=1", "negq 0x11223344(%r28), %r30"),
    ("ev_xr 0xf7, 6, %r25, nf=1, w=0", "{nf} divl %r25d"),
    ("cc_rr 0x39, 4, 1, %r17, %r16", "ccmpeq {dfv=cf} %r17, %r16"),
    ("cc_rr 0x85, 11, 15, %r24, %r16", "ctestfq {dfv=of,sf,zf,cf} %r24, %r16"),
    ("cc_rm 0x3b, 10, 8, %r22, 0x11223344, %r20, w=0", "ccmptl {dfv=of} 0x11223344(%r20), %r22d"),
    ("cc_xr 0x83, 12, 4, 7, %r31, w=0, pp=1; .byte 0x80", "ccmplw {dfv=sf} $-128, %r31w"),
    ("cc_xm 0xf6, 3, 2, 0, 0x11223344, %r12, w=0; .byte 0x55", "ctestaeb {dfv=zf} $0x55, 0x11223344(%r12)"),
    ("ev_rr 0x45, %r23, %r16", "cfcmovneq %r16, %r23"),
    ("ev_rm 0x45, %r25, 0x11223344, %rsp, nf=1", "cfcmovneq %r25, 0x11223344(%rsp)"),
    ("ev_rr 0x45, %r23, %r16, v=%r28, nd=1, nf=1, w=0", "cfcmovnel %r16d, %r23d, %r28d"),
    ("ev_rr 0x45, %r17, %r30, v=%r21, nd=1", "cmovneq %r30, %r17, %r21"),
    ("ev_xr 0x45, 0, %r29, w=0, pp=3, nd=1", "setzune %r29b"),
    ("ev_xr 0xff, 6, %r31, v=%r16, nd=1, w=0", "push2 %r31, %r16"),
    ("ev_xr 0x8f, 0, %r17, v=%rax, nd=1, w=1", "pop2p %r17, %rax"),
    ("ev_rr 0x66, %r16, %r31, v=%r25, nd=1, pp=1", "adcx %r31, %r16, %r25"),
    ("ev_rr 0xf5, %r28, %r17, nf=1", "{nf} lzcntq %r17, %r28"),
    ("ev_rr 0xf1, %r18, %r27, w=0, pp=1", "{evex} crc32w %r27w, %r18d"),
    ("ev_rm 0x61, %r20, 0x11223344, %r28", "{evex} movbeq %r20, 0x11223344(%r28)"),
    ("ev_rr 0xf5, %r17, %r24, v=%r31, pp=3, m=2", "pdep %r24, %r31, %r17"),
    ("ev_rr 0xf0, %r17, %r24, pp=3, m=3; .byte 13", "{evex} rorx $13, %r24, %r17"),
    ("rex2_xm 0xc7, 1, 0x11223344, %r20, 1", "cmpxchg16b 0x11223344(%r20)"),
    ("rex2_x 0x01, 6, %r31", "lmsw %r31w"),
)


def check_macros(fetch: Fetch, folder: Path) -> int:
    """Assemble every line both ways; the number of lines."""
    tools = Binutils(fetch)
    apx = (GUESTS_DIR / "apx.S").read_text()
    start = apx.index(".macro rex2_x ")
    own = apx[start : apx.index(".macro t_system")]
    source = folder / "one.S"
    for macro, native in MACROS:
        source.write_text(f'.include "apx.inc"\n{own}\n.text\n{macro}\n')
        ours = load(assemble(source, bits=64, defines={})).blobs[0].data
        assert ours.hex() == tools.assemble(native + "\n").hex(), f"{macro} / {native}"
    return len(MACROS)


def test_macros_give_the_bytes_of_an_assembler_that_knows_apx(tmp_path: Path) -> None:
    try:
        check_macros(cached_package, tmp_path)
    except (FileNotFoundError, FetchError) as error:
        pytest.skip(str(error))


def apx_profile() -> CpuProfile:
    vendor = (0x756E6547, 0x6C65746E, 0x49656E69)
    base = CpuProfile((
        CpuidEntry(0, 0, 0, 0x29, *vendor), CpuidEntry(1), CpuidEntry(7, 0, 1, 1), CpuidEntry(7, 1, 1),
        CpuidEntry(0xD, 0, 1, 0x80207, 576, 1088), CpuidEntry(0xD, 1, 1), CpuidEntry(0xD, 2, 1, 256, 576),
        CpuidEntry(0xD, 9, 1, 8, 832), CpuidEntry(0xD, 19, 1, 128, 960), CpuidEntry(0x29, 0, 1, 0, 1),
        CpuidEntry(0x80000000, 0, 0, 0x80000008), CpuidEntry(0x80000001), CpuidEntry(0x80000008, 0, 0, 0x3028),
    ))  # fmt: skip
    left_out = {"vmx", "svm", "tbm", "shstk", "ibt", "mpx", "osxsave", "ospke", "la57"}
    return with_features(base, add=[name for name in FEATURES if name not in left_out])


@pytest.fixture(scope="module")
def ends() -> dict[str, int | None]:
    """Name of every 64-bit APX Case -> vector of the stub in which the model halts, None: at its end."""
    found: dict[str, int | None] = {}
    model = ReferenceMachine()
    for case in all_cases(apx_profile(), families=["apx", "apx_evex", "apx_xsave"]):
        if case.bits != 64:
            continue
        model.load(case)
        seen = model.apply(Run(64))[-1]
        assert seen.exit.kind == "halt", f"{case.name}: {seen.exit}"
        rip = unpack_sections(seen.sections).rip - 1
        found[case.name] = (rip - 0x4000) // 16 if 0x4000 <= rip < 0x5000 else None
    return found


def test_the_model_answers_for_every_entry(ends: dict[str, int | None]) -> None:
    assert len(ends) > 2500


def test_entries_named_so_are_undefined_and_no_others(ends: dict[str, int | None]) -> None:
    for name, vector in ends.items():
        entry = name.partition("@")[0]
        if entry.endswith("_ud"):
            assert vector == UD, name
        elif "long#" in name and not entry.endswith(("_ud", "_nf")):
            assert vector != UD or entry.startswith(("apx/rdfsbase", "apx_evex/not_nf")), name
