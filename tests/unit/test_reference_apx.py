"""APX in the model, worked out by hand: encodings, enablement, new destinations, flags, conditions, stack, XSAVE."""

from __future__ import annotations

from dataclasses import replace

import pytest
from reference_cpu import faults, profile, run, start, stub, words

from harness.case import Blob
from harness.cpuid import CpuidEntry, CpuProfile, with_features
from harness.modes import ABSENT_PAGE, DATA_BASE, READONLY_PAGE, STACK_TOP
from harness.reference.cpu import AF, ARITH, CF, GP, NM, OF, PAGE_FAULT, PF, SF, UD, ZF, Cpu, Fault, ModelError
from harness.reference.decoder import decode

ALL = (1 << 64) - 1
AREA = DATA_BASE + 0x400
E19 = 1 << 19


def apx_profile(*extra: CpuidEntry) -> CpuProfile:
    """The processor of the other tests, with APX and the leaves of component 19 where MPX was."""
    base = profile()
    leaves = [e for e in base.cpuid if (e.function, e.index) != (0xD, 0)]
    leaves.append(CpuidEntry(0xD, 0, 1, 0x80207, 576, 1088))
    leaves += [CpuidEntry(0xD, 9, 1, 8, 832), CpuidEntry(0xD, 19, 1, 128, 960)]
    return with_features(CpuProfile((*leaves, *extra)), add=["apx"])


APX = apx_profile()


def machine(code: str, mode: str = "long", cpu: CpuProfile = APX, data: bytes = b"", **flat: int) -> Cpu:
    return start(mode, code.replace(" ", "") + "f4", cpu=cpu, blobs=(Blob(DATA_BASE, data),), **flat)


def after(code: str, **more) -> Cpu:
    return run(machine(code, **more))


def is_ud(code: str, apx: int = 1) -> bool:
    try:
        return decode(bytes.fromhex(code).ljust(15, b"\x11"), None, 64, apx=apx).row.mnemonic == "(bad)"
    except Fault as fault:
        return fault.vector == UD


# --- encodings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("62 fc 7c 10 ff f1", "push2 r16,r17"),
        ("62 f4 e4 18 ff f1", "push2p rbx,rcx"),
        ("62 ec fc 14 01 d1", "{nf} add r16,r17,r18"),
        ("62 ec 8c 04 39 c8", "ccmpe {dfv=cf} r16,r17"),
        ("62 f4 0c 03 84 c8", "ctestae {dfv=cf} al,cl"),
        ("62 f4 7f 18 44 c3", "setzue bl"),
        ("62 f4 7f 08 44 c3", "{evex} sete bl"),
        ("62 f4 7d 18 6b c3 01", "imulzu ax,bx,0x1"),
        ("62 f4 64 18 44 c3", "cmove ebx,eax,ebx"),
        ("62 f4 7c 0c 40 01", "cfcmovo DWORD PTR [rcx],eax"),
        ("62 f2 64 0c f2 d8", "{nf} andn ebx,ebx,eax"),
        ("62 f4 78 08 01 04 23", "{evex} add DWORD PTR [rbx+r20*1],eax"),
        ("c4 e2 f8 f3 d8", "blsi rax,rax"),
        ("d5 f9 c7 4d eb", "cmpxchg16b [r29-0x15]"),
    ],
)
def test_text(code: str, text: str) -> None:
    insn = decode(bytes.fromhex(code), None, 64, apx=1)
    assert (insn.text(), insn.length) == (text, len(bytes.fromhex(code)))


@pytest.mark.parametrize(
    "code",
    [
        "62 f4 7d 08 00 c3", "62 f4 7e 08 01 c3", "62 f4 54 08 01 c3", "62 f4 7c 00 01 c3", "62 f4 7c 0c 11 c3",
        "62 f4 7c 18 39 c3", "62 f4 04 14 39 c3", "62 f4 06 04 39 c3", "62 f4 05 04 38 c3", "62 f4 67 18 44 c3",
        "62 f4 7f 0c 44 c3", "62 f4 64 18 69 c3", "62 f4 65 18 ff f1", "62 f4 64 1c ff f1", "62 f4 7c 08 ff f1",
        "62 f4 64 18 ff 31", "62 f4 7c 08 8f c3", "62 f4 5c 18 8f cb", "62 f4 7d 08 f0 c3", "62 f4 7f 08 f1 c3",
        "62 f4 7c 0c 60 c3", "62 f4 7d 0c 66 c3", "62 f4 64 18 88 c3", "62 f4 7c 0c f7 d3", "62 f4 64 18 f7 e3",
        "62 f4 7c 08 ff d3", "62 f4 7c 08 fe d3", "62 f4 7c 08 04 c3", "62 f4 7e 08 44 c3", "62 f4 64 0c 44 c3",
        "62 f2 64 18 f3 d8", "62 f2 64 28 f3 d8", "62 f2 65 0c f7 d8", "62 f3 67 08 f0 d8", "62 f2 64 08 f3 c0",
        "62 f4 7c 28 01 c3", "62 f4 7c 48 01 c3", "62 f4 7c 09 01 c3", "62 f4 7c 88 01 c3", "66 62 f4 7c 08 01 c3",
        "f2 62 f4 7c 08 01 c3", "f0 62 f4 7c 08 01 03", "48 62 f4 7c 08 01 03", "d5 00 62 f4 7c 08 01 03",
        "62 f4 7c 08 89 c3", "66 c4 e2 78 f3 d8", "48 c4 e2 78 f3 d8", "c4 e2 7c f3 d8", "c4 e3 73 f0 c1 05",
    ],
)  # fmt: skip
def test_undefined_encodings_with_vex_and_evex(code: str) -> None:
    assert is_ud(code)


@pytest.mark.parametrize("byte", range(256))
def test_rex2_reserves_rows_prefixes_and_escapes(byte: int) -> None:
    reserved = byte >> 4 in (4, 7, 0xA, 0xE) or byte in (
        0x0F, 0x26, 0x2E, 0x36, 0x3E, 0x62, 0x64, 0x65, 0x66, 0x67, 0xC4, 0xC5, 0xD5, 0xF0, 0xF2, 0xF3,
    )  # fmt: skip
    if reserved and byte != 0xA1:
        assert is_ud(f"d5 10 {byte:02x}")
    if byte >> 4 in (3, 8):
        assert is_ud(f"d5 90 {byte:02x}")


@pytest.mark.parametrize(
    ("code", "bad"),
    [
        ("d5 00 a1", False), ("d5 77 a1", False), ("64 d5 00 a1", False), ("d5 08 a1", True), ("66 d5 00 a1", True),
        ("67 d5 00 a1", True), ("f2 d5 00 a1", True), ("f3 d5 00 a1", True), ("f0 d5 00 a1", True),
        ("48 d5 18 89 c0", True), ("48 66 d5 18 89 c0", False), ("d5 90 ae 20", True), ("d5 90 ae 28", True),
        ("d5 90 ae 30", True), ("d5 90 c7 18", True), ("d5 90 c7 20", True), ("d5 90 c7 28", True),
        ("d5 90 ae 38", False), ("d5 90 c7 08", False), ("f0 d5 10 01 00", False), ("f0 d5 10 89 00", True),
    ],
)  # fmt: skip
def test_what_may_be_around_rex2(code: str, bad: bool) -> None:
    assert is_ud(code) is bad


def test_62_is_evex_in_64_bit_mode_only_and_bound_elsewhere() -> None:
    assert decode(bytes.fromhex("62 07"), None, 32, apx=1).text() == "bound eax,[edi]"
    assert is_ud("62 f4 7c 08 01 c3", apx=0)
    with pytest.raises(ModelError, match="VEX or EVEX"):
        decode(bytes.fromhex("62 f1 7c 48 28 c0 00"), None, 64, apx=1)  # AVX-512


def test_without_nci_ndd_nf_only_push2_and_pop2_are_left_in_map_4() -> None:
    assert is_ud("62 ec fc 14 01 d1", apx=2)
    assert is_ud("62 ec 8c 04 39 c8", apx=2)
    assert is_ud("62 f4 7c 0c 40 01", apx=2)
    assert not is_ud("62 fc 7c 10 ff f1", apx=2)
    assert not is_ud("62 ea 0f 00 f5 d8", apx=2)
    with pytest.raises(ModelError, match="29H"):
        is_ud("62 f4 7c 08 01 c3", apx=2)
    assert machine("90").apx == 1
    assert machine("90", cpu=apx_profile(CpuidEntry(0x29, 0, 0, 0, 1))).apx == 1
    assert machine("90", cpu=apx_profile(CpuidEntry(0x29))).apx == 2


@pytest.mark.parametrize("code", ["62 f4 7c 08 65 03", "62 f4 7d 08 f8 03", "62 f4 7c 08 fc 03", "62 f4 7e 08 f0 03"])
def test_map_4_instructions_that_are_not_modelled_are_said(code: str) -> None:
    if code == "62 f4 7c 08 65 03":
        assert is_ud(code)  # WRUSS has 66
        code = "62 f4 7d 08 65 03"
    with pytest.raises(ModelError, match="EVEX encoding"):
        is_ud(code)


# --- enablement ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", ["d5 58 01 c8", "62 ec fc 14 01 d1", "62 fc 7c 10 ff f1", "62 f2 64 0c f2 d8"])
def test_apx_needs_osxsave_and_xcr0(code: str) -> None:
    assert after(code).linear_rip() < 0xB000
    assert stub(after(code, xcr0=7)) == UD
    assert stub(after(code, cr4=0x620)) == UD
    assert stub(after(code, cpu=profile())) == UD


def test_vex_on_gprs_needs_neither_but_protected_mode() -> None:
    assert after("c4 e2 f0 f2 c3", cr4=0x620, rcx=1, rbx=3, xcr0=3).gpr[0] == 2
    assert after("c4 e2 70 f2 c3", mode="prot32", rcx=1, rbx=3).gpr[0] == 2
    assert stub(after("c4 e2 70 f2 c3", mode="real", rcx=1, rbx=3)) == UD
    assert stub(after("c4 e2 f0 f2 c3", cpu=profile(without=("bmi1",)))) == UD


def test_cr0_ts_does_not_guard_the_registers() -> None:
    assert after("d5 58 01 c8", r16=1, r17=2, cr0=0x80010039).gpr[16] == 3


# --- results ---------------------------------------------------------------------------------------------------------


def test_a_new_data_destination_is_zero_extended_and_the_source_stays() -> None:
    cpu = after("62 e4 6d 18 01 c8", rax=0x1111222233334444, r17=0x20, rdx=ALL)  # add dx, ax, r17w
    assert (cpu.gpr[2], cpu.gpr[0]) == (0x4464, 0x1111222233334444)
    cpu = after("62 f4 6c 18 00 08", rax=DATA_BASE, rcx=5, rdx=ALL, data=b"\xfe\xaa")  # add dl, [rax], cl
    assert (cpu.gpr[2], words(cpu, DATA_BASE, 1, 2), cpu.rflags & ARITH) == (3, (0xFE, 0xAA), CF | AF | PF)


def test_without_a_new_data_destination_narrow_results_merge() -> None:
    assert after("62 ec 7d 08 01 c8", r16=ALL, r17=1).gpr[16] == ALL & ~0xFFFF  # {evex} add r16w, r17w
    assert after("62 ec 7c 08 00 c8", r16=ALL, r17=1).gpr[16] == ALL & ~0xFF


def test_no_flags_form_keeps_defined_and_undefined_flags() -> None:
    cpu = after("62 ec fc 14 01 d1", r17=ALL, r18=1, rflags=0x202 | OF | SF)
    assert (cpu.gpr[16], cpu.rflags & ARITH, cpu.undefined) == (0, OF | SF, 0)
    assert after("21 c0 62 ec fc 14 01 d1", rax=1).undefined == AF


def test_shift_with_a_new_data_destination_and_count_zero() -> None:
    assert after("62 f4 65 18 c1 e0 20", rax=ALL, rbx=7).gpr[3] == 0xFFFF  # shl bx, ax, 32


def test_zero_upper() -> None:
    assert after("62 f4 7f 18 44 c3", rbx=ALL, rflags=0x42).gpr[3] == 1
    assert after("62 f4 7f 08 44 c3", rbx=ALL, rflags=0x42).gpr[3] == ALL & ~0xFF | 1
    assert after("62 f4 7d 18 6b c3 02", rax=ALL, rbx=3).gpr[0] == 6
    cpu = after("62 f4 7f 18 44 03", rbx=DATA_BASE, rflags=0x42, data=b"\xaa" * 4)
    assert words(cpu, DATA_BASE, 4, 1) == (0xAAAAAA01,)


@pytest.mark.parametrize(
    ("flags", "dfv", "expected"),
    [
        (ZF, 8, CF | AF | PF), (0, 1, CF | PF), (0, 0xF, OF | SF | ZF | CF | PF), (0, 8, OF), (0, 4, SF), (0, 0, 0),
        (AF | PF, 2, ZF),
    ],
)  # fmt: skip
def test_ccmp(flags: int, dfv: int, expected: int) -> None:
    code = f"62 ec {0x84 | dfv << 3:02x} 04 39 c8"  # ccmpe r16, r17
    assert after(code, r16=1, r17=0x8000000000000002, rflags=0x202 | flags).rflags & ARITH == expected


def test_ccmp_true_and_false_take_the_parity_conditions_place() -> None:
    assert after("62 ec 84 0a 39 c8", r16=5, r17=5, rflags=0x202).rflags & ARITH == ZF | PF
    assert after("62 ec 84 0b 39 c8", r16=5, r17=5, rflags=0x206).rflags & ARITH == 0


def test_a_false_condition_suppresses_the_fault_of_cfcmov_and_not_of_ccmp_and_cmov() -> None:
    assert stub(after("62 ec 84 0b 3b 00", rax=0, r16=ABSENT_PAGE)) == PAGE_FAULT
    assert after("62 f4 fc 08 44 03", rax=ALL, rbx=ABSENT_PAGE).gpr[0] == 0  # cfcmove rax, [rbx]
    assert stub(after("62 f4 fc 08 45 03", rbx=ABSENT_PAGE)) == PAGE_FAULT
    assert stub(after("62 f4 e4 18 44 03", rbx=ABSENT_PAGE)) == PAGE_FAULT  # cmove rbx, rax, [rbx]
    assert after("62 f4 fc 0c 44 03", rbx=READONLY_PAGE).gpr[3] == READONLY_PAGE
    assert stub(after("62 f4 fc 0c 45 03", rbx=READONLY_PAGE)) == PAGE_FAULT


def test_cfcmov_registers() -> None:
    zero = {"rflags": 0x42}
    assert after("62 f4 7d 08 44 c3", rax=ALL, rbx=ALL - 1, **zero).gpr[0] == 0xFFFE
    assert after("62 f4 7d 08 45 c3", rax=ALL, rbx=ALL - 1, **zero).gpr[0] == 0
    assert after("62 f4 7c 0c 45 c3", rax=1, rbx=ALL, **zero).gpr[3] == 0
    cpu = after("62 f4 6c 1c 45 c3", rax=ALL, rbx=1, rdx=0, **zero)  # cfcmovne edx, eax, ebx
    assert (cpu.gpr[2], cpu.gpr[0]) == (0xFFFFFFFF, ALL)


def test_push2_and_pop2() -> None:
    cpu = after("62 fc 7c 10 ff f1", r16=0x16, r17=0x17)
    assert (cpu.gpr[4], words(cpu, STACK_TOP - 16, 8, 2)) == (STACK_TOP - 16, (0x17, 0x16))
    cpu = after("62 fc 7c 10 8f c1", rsp=STACK_TOP - 32, data=b"")
    assert cpu.gpr[4] == STACK_TOP - 16
    cpu = after("62 fc 7c 10 ff f1 62 fc 7c 10 8f c1", r16=0x16, r17=0x17)
    assert (cpu.gpr[16], cpu.gpr[17], cpu.gpr[4]) == (0x17, 0x16, STACK_TOP), "v is popped first"


@pytest.mark.parametrize(
    ("code", "rsp", "vector"),
    [
        ("62 fc 7c 10 ff f1", STACK_TOP - 8, GP), ("62 fc 7c 10 8f c1", STACK_TOP - 24, GP),
        ("62 f4 7c 10 ff f4", STACK_TOP, UD), ("62 f4 5c 18 ff f0", STACK_TOP, UD),
        ("62 f4 64 18 8f c3", STACK_TOP, UD), ("62 f4 5c 18 8f c0", STACK_TOP, UD),
        ("62 fc 7c 10 ff f1", ABSENT_PAGE + 16, PAGE_FAULT),
    ],
)  # fmt: skip
def test_push2_and_pop2_that_fault_leave_everything_alone(code: str, rsp: int, vector: int) -> None:
    cpu = machine(code, rsp=rsp, r16=1, r17=2)
    insn = decode(bytes.fromhex(code), None, 64, apx=1)
    assert faults(insn.row.operation(insn), cpu)[0] == vector
    assert (cpu.gpr[4], cpu.gpr[16], cpu.gpr[17]) == (rsp, 1, 2)


def test_pushp_and_popp_are_push_and_pop() -> None:
    cpu = after("d5 18 50 d5 18 59", r16=0x1234)
    assert (cpu.gpr[17], cpu.gpr[4]) == (0x1234, STACK_TOP)


def test_jmpabs() -> None:
    assert after("d5 00 a1 0ca0000000000000 cc f4").rip == 0xA00D
    cpu = machine("d5 00 a1 0000000000800000")
    assert stub(run(cpu)) == GP


# --- XSAVE -----------------------------------------------------------------------------------------------------------

EGPRS = {f"r{n}": 0x0101010101010101 * n for n in range(16, 32)}


def area(xstate: int = 0, xcomp: int = 0, at: int = 960, values: int = 0) -> bytes:
    """The data area up to an XSAVE area at AREA, with a header and register values."""
    out = bytearray(0x400 + at + 128)
    out[0x600:0x608], out[0x608:0x610] = xstate.to_bytes(8, "little"), xcomp.to_bytes(8, "little")
    for n in range(16 if values else 0):
        out[0x400 + at + 8 * n : 0x408 + at + 8 * n] = (values + n).to_bytes(8, "little")
    return bytes(out)


def xsave(code: str, mask: int, data: bytes, **more) -> Cpu:
    return after(code, rbx=AREA, rax=mask & 0xFFFFFFFF, rdx=mask >> 32, data=data, xcr0=0x80207, **more)


def test_xsave_writes_component_19_and_its_bit() -> None:
    cpu = xsave("0f ae 23", E19, area(xstate=3), **EGPRS)
    assert words(cpu, AREA + 512, 8, 2) == (E19 | 3, 0)
    assert words(cpu, AREA + 960, 8, 16) == tuple(EGPRS.values())
    assert not cpu.mem.pages_ignore


def test_xsave_of_the_initial_state_leaves_its_bit_open() -> None:
    cpu = xsave("0f ae 23", E19, area(values=5))
    assert words(cpu, AREA + 960, 8, 16) == (0,) * 16
    assert cpu.mem.pages_ignore == {AREA + 514: 8}
    cpu = xsave("0f ae 33", E19, area(values=1))  # XSAVEOPT may leave what was there
    assert set(cpu.mem.pages_ignore) == {AREA + 514, *range(AREA + 960, AREA + 1088, 8)}


def test_xsave_of_other_components_is_undefined_memory() -> None:
    cpu = xsave("0f ae 23", 0x80007, area(), **EGPRS)
    ignored = cpu.mem.pages_ignore
    assert ignored[AREA + 24] == ignored[AREA + 32] == ignored[AREA + 576] == 0xFF
    assert AREA + 416 not in ignored
    assert AREA + 960 not in ignored
    assert (ignored[AREA + 512], ignored.get(AREA + 514)) == (7, None)


def test_xsavec_is_compacted() -> None:
    cpu = xsave("0f c7 23", E19, area(), **EGPRS)
    assert words(cpu, AREA + 512, 8, 2) == (E19, 1 << 63 | E19)
    assert words(cpu, AREA + 576, 8, 16) == tuple(EGPRS.values())
    cpu = xsave("0f c7 23", E19 | 4, area(), **EGPRS)
    assert words(cpu, AREA + 832, 8, 16) == tuple(EGPRS.values())


def test_xrstor_loads_clears_or_keeps() -> None:
    assert xsave("0f ae 2b", E19, area(E19, values=0x100)).gpr[16:] == list(range(0x100, 0x110))
    assert xsave("0f ae 2b", E19, area(0, values=0x100), **EGPRS).gpr[16:] == [0] * 16
    assert xsave("0f ae 2b", 2 | 4, area(E19, values=0x100), **EGPRS).gpr[16:] == list(EGPRS.values())
    compact = area(E19, 1 << 63 | E19 | 4, at=832, values=0x200)
    assert xsave("0f ae 2b", E19, compact).gpr[16:] == list(range(0x200, 0x210))
    assert xsave("0f c7 1b", E19, compact).gpr[16:] == list(range(0x200, 0x210))


def test_xsave_then_xrstor_of_everything_gives_the_registers_back() -> None:
    cpu = xsave("0f ae 23 d5 50 31 c0 0f ae 2b", 0x80207, area(), **EGPRS)
    assert cpu.gpr[16:] == list(EGPRS.values())


@pytest.mark.parametrize(
    ("code", "data", "more", "vector"),
    [
        ("0f ae 2b", area(1 << 20), {}, GP), ("0f ae 2b", area(0x18), {}, GP), ("0f ae 2b", area(E19, 1), {}, GP),
        ("0f ae 2b", area(E19, 1 << 63 | 7), {}, GP), ("0f ae 2b", area(0, 1 << 63 | 1 << 20), {}, GP),
        ("0f c7 1b", area(E19), {}, GP), ("0f ae 23", area(), {"rbx": AREA + 8}, GP),
        ("0f ae 23", area(), {"cr0": 0x80010039}, NM), ("0f ae 23", area(), {"cr4": 0x620}, UD),
        ("0f c7 2b", area(), {"mode": "long-user"}, GP), ("0f ae 23", area(), {"rbx": READONLY_PAGE}, PAGE_FAULT),
        ("f0 0f ae 23", area(), {}, UD), ("0f c7 23", area(), {"cpu": profile(without=("xsavec",))}, UD),
    ],
)  # fmt: skip
def test_xsave_faults(code: str, data: bytes, more: dict, vector: int) -> None:
    cpu = after(code, **{"rbx": AREA, "rax": E19, "rdx": 0, "data": data, **more})
    assert stub(cpu) == vector


def test_xcr0_apx_and_mpx_exclude_each_other() -> None:
    both = with_features(apx_profile(CpuidEntry(0xD, 3, 1, 64, 960)), add=["mpx"])
    both = CpuProfile(tuple(replace(e, eax=0x8021F) if (e.function, e.index) == (0xD, 0) else e for e in both.cpuid))
    for value, good in ((0x80003, True), (0x1B, True), (0x8001B, False), (0x8000B, False), (0x80013, False)):
        cpu = machine("0f 01 d1", cpu=both, rax=value, rcx=0, rdx=0, xcr0=3)
        assert (run(cpu).xcr0 == value) is good


def test_the_registers_survive_xcr0_off_and_on() -> None:
    code = "b8 03000000 31 d2 31 c9 0f 01 d1 0d 00000800 0f 01 d1"
    cpu = after(code, **EGPRS)
    assert (cpu.xcr0, cpu.gpr[16:]) == (0x80003, list(EGPRS.values()))


def test_xsave_of_apx_outside_64_bit_mode_is_not_answered() -> None:
    with pytest.raises(ModelError, match="64-bit mode"):
        after("0f ae 23", mode="compat", rbx=0x400, rax=E19, rdx=0, cr4=0x40620, xcr0=0x80003)
