"""The failure text says what a maintainer needs: which exit, which fields, which bits, which code, how to replay."""

import shutil
from dataclasses import replace

import pytest

from harness import guest
from harness.case import Blob, Case, Memory, Observation, Run
from harness.cpuid import CpuProfile
from harness.exits import Halt, InternalError, Io, Shutdown
from harness.lockstep import Difference, compare_registers, exit_text
from harness.memory_diff import MemoryDiff
from harness.modes import CODE_BASE, assembler_constants, setup
from harness.report.agreement import agreement_text
from harness.report.c_data import byte_runs, find_fills
from harness.report.failure import failure_text
from harness.report.listing import Insn, disassemble, registers_used, source_line
from harness.state import pack_sections

HOST = "Linux 6.18.44, kvm_pvm"
CMPXCHG = bytes.fromhex("0fb1d1f4")

needs_objdump = pytest.mark.skipif(not shutil.which("objdump"), reason="no objdump")


def case_of(code=CMPXCHG, registers=None, mode="long", **more):
    start = setup(mode, entry=CODE_BASE)
    memory = Memory((*start.blobs, Blob(CODE_BASE, code)))
    return Case("gpr/long/x", memory, start.state.with_(registers or {}), CpuProfile(()), bits=start.bits, **more)


def seen(case, values, exit_=None, **more):
    state = case.start.with_({"rip": CODE_BASE + 4, **values})
    return Observation(exit_ or Halt(), pack_sections(state, ("regs", "sregs")), **more)


def registers(case, expected, got, **more):
    left, right = seen(case, expected, **more), seen(case, got)
    return Difference(0, 0, left, right, compare_registers(left, right))


def text_of(case, difference, host=HOST):
    text = failure_text(case, difference, host)
    named = failure_text(case, difference, host, "a command").splitlines()
    assert named == [*text.splitlines()[:-1], "a command"]
    assert max(map(len, text.splitlines())) <= 100
    assert text.isascii()
    assert text.splitlines()[-1] == f"kvm-harness replay {case.id}"
    return text


@needs_objdump
def test_layout():
    case = case_of(registers={"rax": 0x1111111122222222, "rcx": 0x3333333344444444}, actions=(Run(8),))
    difference = registers(case, {}, {"rcx": 0x44444444, "rflags": 0x97})
    expected = f"""\
case        gpr/long/x  [{case.id}]
differs at  exit 0 (action 0: run): halt at 0xa004

register            expected         got                 xor  bits
rcx       0x3333333344444444  0x44444444  0x3333333300000000
rflags                   0x2        0x97                0x95  CF 0->1, PF 0->1, AF 0->1, SF 0->1

code
  a000: 0f b1 d1                cmpxchg ecx,edx
  a003: f4                      hlt

start       rax=0x1111111122222222 rcx=0x3333333344444444 rdx=0x0 rflags=0x2

host        Linux 6.18.44, kvm_pvm
kvm-harness replay {case.id}"""
    assert text_of(case, difference) == expected


def test_only_what_differs_is_listed():
    case = case_of()
    text = text_of(case, registers(case, {"cs.base": 0}, {"ds.base": 4}))
    table = text.split("\n\n")[1]
    assert [line.split()[0] for line in table.splitlines()] == ["register", "ds.base"]


def test_bits_are_named_and_undefined_ones_left_out():
    case = case_of()
    text = text_of(case, registers(case, {}, {"rflags": 0x52}, ignore={"rflags": 0x10}))
    assert "ZF 0->1 (undefined, not compared: AF)" in text
    assert "bits" in text


def test_many_bits_wrap():
    case = case_of()
    text = text_of(case, registers(case, {}, {"rflags": 0x3F7FD7, "cr4": 0x13FFFFF}))
    assert "ID 0->1" in text
    assert "SMAP 0->1" in text


def test_memory_marks_the_bytes():
    case = case_of()
    both = seen(case, {}, pages_ignore={0x10002: 0xFF})
    run = MemoryDiff(0x10000, bytes(4), bytes((0, 1, 2, 3)))
    text = text_of(case, Difference(0, 0, both, both, (), (run,)))
    assert "memory 0x10000      expected  00 00 00 00\n" in text
    assert "                    got       00 01 02 03\n" in text
    assert "                                 ^^    ^^\n" in text


def test_long_memory_lists_are_cut():
    case = case_of()
    both = seen(case, {})
    runs = tuple(MemoryDiff(0x10000 + 32 * n, bytes(16), b"\1" * 16) for n in range(20))
    assert "... and 12 more runs of bytes" in text_of(case, Difference(0, 0, both, both, (), runs))


def test_exits_differ():
    case = case_of()
    io = Observation(Io(0xE9, 1, True, b"A"), {})
    text = text_of(case, Difference(3, 0, io, Observation(Shutdown(), {})))
    assert "differs at  exit 3 (action 0: run)\n" in text
    assert "expected    io write port 0xe9 size 1 count 1 data 41\n" in text
    assert "got         shutdown\n" in text
    assert "register" not in text


def test_a_missing_exit_is_said():
    case = case_of()
    assert "got         no further exit\n" in text_of(case, Difference(1, 0, seen(case, {}), None))


@needs_objdump
def test_an_instruction_the_emulator_lacks_is_named():
    case = case_of(bytes.fromhex("f30fb8c1f4"))
    lacks = Observation(InternalError(1, bytes.fromhex("f30fb8c1f4")), {})
    text = text_of(case, Difference(0, 0, seen(case, {}), lacks))
    assert "(this KVM's emulator lacks: f3 0f b8 c1  popcnt eax,ecx)" in text


def test_long_code_and_host_stay_in_bounds():
    case = case_of(b"\x90" * 100 + b"\xf4")
    state = case.start.with_({"rip": CODE_BASE + 101})
    at_end = Observation(Halt(), pack_sections(state, ("regs", "sregs")))
    text = text_of(case, Difference(0, 0, at_end, None), host="a host with a long name " * 10)
    assert "77 instructions ..." in text
    assert "a064: f4" in text


def test_without_objdump_there_are_hex_bytes(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    case = case_of()
    assert "a000: 0f b1 d1 f4\n" in text_of(case, registers(case, {}, {"rcx": 1}))


@needs_objdump
def test_code_size_is_that_of_the_case():
    code = bytes.fromhex("b83412f4")
    assert disassemble(code, 16, 0x7C00)[0] == Insn(0x7C00, code[:3], "mov ax,0x1234")
    assert disassemble(code + b"\0", 32, 0)[0].text == "mov eax,0xf41234"


def test_registers_of_the_code_in_any_width():
    insns = [Insn(0, b"", "add r8d,bl"), Insn(0, b"", "mov sil,BYTE PTR [ebp+ecx*2]"), Insn(0, b"", "mul edx")]
    assert registers_used(insns) == ["rax", "rcx", "rdx", "rbx", "rbp", "rsi", "r8"]
    assert registers_used([Insn(0, b"", "rep movs BYTE PTR es:[di],BYTE PTR ds:[si]")]) == ["rcx", "rsi", "rdi"]
    assert registers_used([Insn(0, b"", "push 0x1"), Insn(0, b"", "loop 0x10")]) == ["rcx", "rsp"]


def test_exit_lines():
    assert exit_text(None) == "no further exit"
    assert str(Io(0x60, 2, False, b"", 3)) == "io read port 0x60 size 2 count 3"
    assert str(InternalError(1, b"\x0f\x0b")) == "internal-error suberror 1 code 0f0b"


# --- source lines ---------------------------------------------------------------------------------------------------

SOURCE = ".code64\n.global t_x\nt_x:\n\tnop\n\tcmpxchg %edx, %ecx\n\thlt\n"


@pytest.fixture
def guest_case(tmp_path, monkeypatch):
    if not (shutil.which("as") and guest.LINKER_SCRIPT.exists()):
        pytest.skip("no assembler")
    monkeypatch.setenv("KVM_HARNESS_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "little.S"
    path.write_text(SOURCE)
    image = guest.load(guest.assemble(path, bits=64, defines=assembler_constants("long")))
    case = case_of(b"", origin=f"{path}:t_x")
    return replace(case, memory=case.memory.plus(*image.blobs)), path


def test_source_lines_come_from_the_guest(guest_case):
    case, path = guest_case
    assert source_line(case, CODE_BASE) == f"{path}:4"
    assert source_line(case, CODE_BASE + 3) == f"{path}:5"
    assert source_line(case, 0x4000) == ""


def test_failure_names_the_line_that_left_the_guest(guest_case):
    case, path = guest_case
    state = case.start.with_({"rip": CODE_BASE + 5})
    difference = Difference(0, 0, Observation(Halt(), pack_sections(state, ("regs", "sregs"))), None)
    words = " ".join(text_of(case, difference).split())
    assert f"guest {path}:6 ({path}:t_x, starts at {path}:4)" in words


def test_source_lines_degrade_to_the_origin(guest_case):
    case, path = guest_case
    altered = replace(case, memory=case.memory.plus(Blob(CODE_BASE, b"\xcc")))
    assert source_line(altered, CODE_BASE) == ""  # not the bytes of this source
    path.write_text("not assembler\n")
    assert source_line(case, CODE_BASE) == ""
    path.unlink()
    assert source_line(case, CODE_BASE) == ""
    assert str(path) in text_of(case, registers(case, {}, {"rcx": 1}))


# --- RAM as C -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["real", "pse", "pae", "long", "long5"])
def test_fills_and_runs_make_the_same_ram(mode):
    case = case_of(mode=mode)
    (slot,) = case.shape.slots
    image = case.memory.image(slot)
    rest, made = bytearray(image), bytearray(len(image))
    taken = set()
    for fill in find_fills(image, 0):
        for n in range(fill.count):
            at = fill.gpa + n * fill.stride
            made[at : at + 8] = (fill.value + n * fill.step & (1 << 64) - 1).to_bytes(8, "little")
            rest[at : at + 8] = bytes(8)
            taken.add(at // 8)
    for blob in byte_runs(bytes(rest), 0, taken):
        made[blob.gpa : blob.gpa + len(blob.data)] = blob.data
    assert made == image


# --- nothing differs ------------------------------------------------------------------------------------------------


@needs_objdump
def test_what_agrees_says_what_was_compared():
    case = case_of(registers={"rcx": 0x33}, actions=(Run(8),))
    steps = [[Observation(Io(0xE9, 1, True, b"A"), {}), seen(case, {})]]
    text = agreement_text(case, steps, 2, HOST)
    assert text == f"""\
case        gpr/long/x  [{case.id}]
compared    the reference model and KVM, 2 checks: every exit; all registers (regs, sregs) and 128
            KiB of RAM at 1 of them

exit 0      action 0, run: io write port 0xe9 size 1 count 1 data 41
exit 1      action 0, run: halt at 0xa004

code
  a000: 0f b1 d1                cmpxchg ecx,edx
  a003: f4                      hlt

start       rax=0x0 rcx=0x33 rdx=0x0 rflags=0x2

host        Linux 6.18.44, kvm_pvm"""
