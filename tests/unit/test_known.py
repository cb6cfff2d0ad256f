"""Known divergences excuse exactly what their row names, and nothing beside it."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from harness.case import Blob, Case, Memory, Observation, Step
from harness.cpuid import CpuProfile
from harness.exits import Debug, Halt, Hypercall, Io, Mmio, Timeout
from harness.judge import Judge
from harness.kernels import KernelRange
from harness.known import FILE, KnownDivergence, KnownError, load_known
from harness.lockstep import Difference, compare_registers
from harness.memory_diff import MemoryDiff
from harness.modes import CODE_BASE, DATA_BASE, STUBS, setup
from harness.runner import Finding
from harness.state import pack_sections, unpack_sections
from harness.verdict import Verdict

ROOT = FILE.parent


def row(wrong, register=("rflags",)):
    return KnownDivergence("x", ("*",), ("*",), tuple(register), wrong, "", "", "")


def case_of(code, mode="long"):
    start = setup(mode, entry=CODE_BASE)
    memory = Memory((*start.blobs, Blob(CODE_BASE, bytes.fromhex(code)), Blob(DATA_BASE, b"\x77" * 64)))
    return Case("step/x", memory, start.state, CpuProfile(()), bits=start.bits, actions=(Step(1),))


def seen(case, exit_, **values):
    state = case.start.with_(values)
    return Observation(exit_, pack_sections(state, ("regs", "sregs2")))


def differing(case, expected, got, memory=()):
    return Difference(0, 0, expected, got, compare_registers(expected, got), tuple(memory))


# --- the file -------------------------------------------------------------------------------------------------------


def test_every_row_names_files_that_are_there():
    for known in load_known():
        assert (ROOT / known.reproducer).is_file(), known.name
        assert (ROOT / known.reference).is_file(), known.name


def test_row_names_are_unique():
    names = [known.name for known in load_known()]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (('wrong = "timeout"', 'wrong = "whatever"'), "wrong must be"),
        (('why = "w"\n', ""), "missing or unknown: why"),
        (('why = "w"', "why = "), "Invalid value"),
    ],
)  # fmt: skip
def test_a_wrong_row_is_named(tmp_path, change, error):
    text = (
        '[[divergence]]\nname = "n"\ncases = ["*"]\nmodule = ["*"]\nregister = []\nwrong = "timeout"\nwhy = "w"\n'
        'reproducer = "r"\nreference = "f"\n'
    )
    path = tmp_path / "known.toml"
    path.write_text(text)
    assert load_known(path)[0].wrong == "timeout"
    path.write_text(text.replace(*change))
    with pytest.raises(KnownError, match=error):
        load_known(path)


def test_a_row_covers_its_cases_on_its_hosts():
    known = replace(row("timeout"), cases=("fault/int_*@real#?",), module=("kvm_pvm",))
    assert known.covers("fault/int_80@real#0", "kvm_pvm")
    assert not known.covers("fault/int_80@real#0", "kvm_amd")
    assert not known.covers("fault/int_80@long#0", "kvm_pvm")


def test_a_row_holds_on_its_kernels():
    everywhere, old, new = (
        replace(row("timeout"), kernels=text and KernelRange.parse(text)) for text in (None, "6.1..6.2", "7.2..")
    )
    assert [r.on("6.1.0-50-cloud-amd64") for r in (everywhere, old, new)] == [True, True, False]
    assert [r.on("6.12.95+deb12-cloud-amd64") for r in (everywhere, old, new)] == [True, False, False]
    assert [r.on("7.3.4") for r in (everywhere, old, new)] == [True, False, True]


def test_kernels_of_a_row_are_read_and_chosen_by(tmp_path):
    path = tmp_path / "known.toml"
    text = (
        '[[divergence]]\nname = "n"\ncases = ["*"]\nmodule = ["*"]\nregister = []\nwrong = "timeout"\nwhy = "w"\n'
        'reproducer = "r"\nreference = "f"\nkernels = "6.1..6.2"\n'
    )
    path.write_text(text)
    assert [r.name for r in load_known(path)] == ["n"]
    assert [r.name for r in load_known(path, "6.1.0-50-cloud-amd64")] == ["n"]
    assert load_known(path, "7.3.4") == ()
    path.write_text(text.replace("6.1..6.2", "before 6.3"))
    with pytest.raises(KnownError, match=r"write 6.1, 6.1..6.12 or 7.2.."):
        load_known(path)


def test_what_shows_only_sometimes_is_never_healed():
    case = case_of("cd40f4")
    limits = SimpleNamespace(outcomes={}, module="kvm_amd", unsupported=lambda case: "", excuse=lambda *_: "")
    clean = Finding(1, None, "", "", 0, 0.0)
    for sometimes, verdict in ((False, Verdict.HEALED), (True, Verdict.AGREE)):
        rows = [replace(row("past-int"), sometimes=sometimes)]
        assert Judge(limits, rows).judge(case, clean, lambda gpa, size: b"").verdict is verdict


# --- values ---------------------------------------------------------------------------------------------------------


def test_a_number_is_the_exact_value():
    case = case_of("f4")
    found = differing(case, seen(case, Halt(), rflags=0x46), seen(case, Halt(), rflags=0x6))
    assert row(0x6).explains(case, found)
    assert not row(0x46).explains(case, found)
    assert not row(0x6, ["rax"]).explains(case, found)


def test_cleared_set_and_zero_extended():
    case = case_of("f4")

    def explains(wrong, want, got, name="rflags"):
        found = differing(case, seen(case, Halt(), **{name: want}), seen(case, Halt(), **{name: got}))
        return row(wrong, [name]).explains(case, found)

    assert explains("clear 0x40000", 0x40002, 0x2)
    assert not explains("clear 0x40000", 0x40042, 0x2)
    assert explains("set 0x10000", 0x2, 0x10002)
    assert explains("zero-extended-32", 0x1111111122222222, 0x22222222, "rcx")
    assert not explains("zero-extended-32", 0x1111111122222222, 0x22222223, "rcx")


def test_a_timeout_and_a_missing_exception():
    case = case_of("f4")
    want = seen(case, Halt(), rip=STUBS + 0xD1)
    assert row("timeout").explains(case, differing(case, want, Observation(Timeout(1.0), {})))
    assert not row("timeout").explains(case, differing(case, want, seen(case, Halt())))
    goes_on, other_stub = seen(case, Halt(), rip=CODE_BASE + 1), seen(case, Halt(), rip=STUBS + 0x61)
    assert row("no-exception", ["rip"]).explains(case, differing(case, want, goes_on))
    assert not row("no-exception", ["rip"]).explains(case, differing(case, want, other_stub))
    assert not row("no-exception", ["rip"]).explains(case, differing(case, want, seen(case, Halt(), rip=9, rbx=1)))
    frame = unpack_sections(want.sections).gpr[4]
    near, far = MemoryDiff(frame, b"a", b"b"), MemoryDiff(frame + 48, b"a", b"b")
    assert row("no-exception", ["rip"]).explains(case, differing(case, want, goes_on, [near]))
    assert not row("no-exception", ["rip"]).explains(case, differing(case, want, goes_on, [far]))


def test_a_guest_that_runs_on_ends_at_the_next_hlt():
    case = case_of("f4f4")
    want = seen(case, Halt(), rip=CODE_BASE + 1)
    next_one = seen(case, Halt(), rip=CODE_BASE + 2)
    assert row("runs-on", ["rip"]).explains(case, differing(case, want, next_one))
    assert not row("runs-on", ["rip"]).explains(case, differing(case, want, next_one, [MemoryDiff(0, b"a", b"b")]))
    for wrong in ({"rip": CODE_BASE + 3}, {"rip": STUBS + 0x61}, {"rip": CODE_BASE + 2, "rbx": 4}):
        assert not row("runs-on", ["rip"]).explains(case, differing(case, want, seen(case, Halt(), **wrong)))


def test_an_exception_from_elsewhere_may_change_the_registers_that_are_named():
    case = case_of("f4")
    want, got = seen(case, Halt(), rip=STUBS + 0xD1), seen(case, Halt(), rip=STUBS + 0xD1, rbx=5)
    assert row("exception 13", ["r[ab]x"]).explains(case, differing(case, want, got))
    for registers in ([], ["rax"]):
        assert not row("exception 13", registers).explains(case, differing(case, want, got))
    assert not row("exception 6", ["rbx"]).explains(case, differing(case, want, got))
    unwritten, other = (MemoryDiff(DATA_BASE, b"ab", data) for data in (b"\x77\x77", b"\x77\x78"))
    assert row("exception 13", ["rbx"]).explains(case, differing(case, want, got, [unwritten]))
    assert not row("exception 13", ["rbx"]).explains(case, differing(case, want, got, [other]))


def test_only_the_upper_bytes_of_an_item_may_be_what_they_were():
    case = case_of("f4")
    both = seen(case, Halt())

    def explains(got):
        found = MemoryDiff(DATA_BASE, b"\0" * 8, got)
        return row("upper-not-written").explains(case, differing(case, both, both, [found]))

    assert explains(b"\0\0" + b"\x77" * 6)
    assert explains(b"\0\0\x77\x77\0\0\0\0")
    assert not explains(b"\x77" * 8)
    assert not explains(b"\0\0\x78\0\0\0\0\0")


def test_what_pusha_writes_last_is_di():
    case = case_of("60f4", "prot32")
    case = replace(case, start=case.start.with_({"rdi": 0x11223344}))
    want = seen(case, Mmio(0x1000, 4, True, b"abcd"))
    last = seen(case, Mmio(0x1000 - 28, 4, True, bytes.fromhex("44332211")))
    assert row("mmio-items -7").explains(case, Difference(0, 0, want, last))
    other = seen(case, Mmio(0x1000 - 28, 4, True, bytes.fromhex("44332212")))
    assert not row("mmio-items -7").explains(case, Difference(0, 0, want, other))


def test_a_saved_image_without_a_bit():
    case = case_of("f4")
    both = seen(case, Halt())

    def explains(want, got, wrong="saved clear 0x200", **values):
        found = differing(case, both, seen(case, Halt(), **values), [MemoryDiff(DATA_BASE, want, got)])
        return row(wrong).explains(case, found)

    assert explains(b"\x02\x73", b"\x00\x73")
    assert not explains(b"\x00\x73", b"\x02\x73")
    assert not explains(b"\x06\x73", b"\x00\x73")
    assert not explains(b"\x02\x73", b"\x00\x72")
    assert not explains(b"\x02\x73", b"\x00\x73", "saved clear 0x400")
    assert not explains(b"\x02\x73", b"\x00\x73", rax=5)


def test_a_saved_rip_past_an_int_n():
    case = case_of("cd40f4")
    both = seen(case, Halt())
    want = CODE_BASE.to_bytes(8, "little") + b"\x63" + bytes(7)

    def explains(got, case=case, **values):
        found = differing(case, both, seen(case, Halt(), **values), [MemoryDiff(DATA_BASE, want, got)])
        return row("past-int").explains(case, found)

    past = (CODE_BASE + 2).to_bytes(8, "little") + want[8:]
    assert explains(past)
    assert not explains((CODE_BASE + 1).to_bytes(8, "little") + want[8:])
    assert not explains(past[:8] + b"\x64" + bytes(7))
    assert not explains(past, rax=5)
    assert not explains(past, case=case_of("9090f4"))


# --- single steps ---------------------------------------------------------------------------------------------------


def late(case, pc=CODE_BASE + 2, **values):
    want = seen(case, Debug(1, CODE_BASE + 2, 0xFFFF4FF0), rip=CODE_BASE + 2)
    return differing(case, want, seen(case, Debug(1, pc, 0xFFFF4FF0), **{"rip": pc, **values}))


def test_a_late_step_has_executed_the_hlt_and_nothing_else():
    case = case_of("e680f4")
    assert row("late-step").explains(case, late(case, CODE_BASE + 3))
    assert not row("late-step").explains(case, late(case, CODE_BASE + 4))
    assert not row("late-step").explains(case, late(case, CODE_BASE + 3, rax=5))
    assert not row("late-step").explains(case, late(case, CODE_BASE + 3, rip=CODE_BASE + 4))
    assert not row("late-step").explains(case_of("e68090"), late(case, CODE_BASE + 3))


def test_another_exit_is_no_late_step():
    case = case_of("e680f4")
    found = late(case, CODE_BASE + 3)
    assert not row("late-step").explains(case, replace(found, got=replace(found.got, exit=Halt())))
    assert not row("late-step").explains(case, replace(found, got=replace(found.got, exit=Io(0x80, 1, True, b"x"))))
    assert not row("late-step").explains(case, replace(found, got=None))
    other = Debug(1, CODE_BASE + 3, 0xFFFF0FF0)
    assert not row("late-step").explains(case, replace(found, got=replace(found.got, exit=other)))


def whole_rep(case, got, memory=(), left=2):
    at = Debug(1, CODE_BASE, 0xFFFF4FF0)
    want = seen(case, at, rcx=left, rsi=DATA_BASE + 1, rdi=DATA_BASE + 0x101)
    values = {"rcx": 0, "rsi": DATA_BASE + 3, "rdi": DATA_BASE + 0x103, **got}
    return differing(case, want, seen(case, at, **values), memory)


def test_a_rep_in_one_step_has_done_what_was_left():
    case = case_of("f3a4f4")
    explains = row("whole-rep").explains
    assert explains(case, whole_rep(case, {}))
    assert explains(case, whole_rep(case, {}, [MemoryDiff(DATA_BASE + 0x101, b"\0\0\0", b"\1\2\0")]))
    assert not explains(case, whole_rep(case, {}, [MemoryDiff(DATA_BASE + 0x101, b"\0\0\0", b"\1\2\3")]))
    assert not explains(case, whole_rep(case, {"rcx": 1}))
    assert not explains(case, whole_rep(case, {"rsi": DATA_BASE + 4}))
    assert not explains(case, whole_rep(case, {"rax": 1}))
    assert not explains(case, whole_rep(case, {"rsi": DATA_BASE + 1, "rdi": DATA_BASE + 0x101}, left=0))


def test_a_rep_with_16_bit_addresses_counts_in_cx():
    case = case_of("f3a4f4", "real")
    high = 0xABCD0000
    at = Debug(1, CODE_BASE, 0xFFFF4FF0)
    want = seen(case, at, rcx=high | 2, rsi=0x201, rdi=high | 0x301)
    got = seen(case, at, rcx=high, rsi=0x203, rdi=high | 0x303)
    there = MemoryDiff(case.start.es.base + 0x301, b"\0\0", b"\1\2")
    assert row("whole-rep").explains(case, differing(case, want, got, [there]))
    elsewhere = MemoryDiff(case.start.es.base + 0x300, b"\0\0", b"\1\2")
    assert not row("whole-rep").explains(case, differing(case, want, got, [elsewhere]))


# --- flags in an exception's frame ----------------------------------------------------------------------------------


def flags_and_frame(want, got, image, undefined=0, image_undefined=0):
    case = case_of("f4")
    expected = seen(case, Halt(), rflags=want)
    expected.ignore, expected.pages_ignore = {"rflags": undefined}, {DATA_BASE: image_undefined}
    return case, differing(case, expected, seen(case, Halt(), rflags=got), [MemoryDiff(DATA_BASE, *image)])


def test_the_saved_image_may_differ_in_the_same_bits_only():
    assert row(0x86).explains(*flags_and_frame(0x6, 0x86, (b"\x06\0", b"\x86\0")))
    assert not row(0x86).explains(*flags_and_frame(0x6, 0x86, (b"\x06\0", b"\x87\0")))
    assert not row(0x86).explains(*flags_and_frame(0x6, 0x86, (b"\x06\1", b"\x86\0")))


def test_undefined_bits_need_not_be_the_same_in_the_saved_image():
    assert row(0x86).explains(*flags_and_frame(0x817, 0x86, (b"\x06", b"\x86"), 0x811))
    assert row(0x86).explains(*flags_and_frame(0x6, 0x86, (b"\x17", b"\x86"), 0, 0x11))
    assert not row(0x86).explains(*flags_and_frame(0x817, 0x86, (b"\x06", b"\x86"), 0x810))


# --- hypercalls -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("got", "exit_", "explained"),
    [
        ({"rax": 0}, Halt(), True),
        ({"rax": 1}, Halt(), False),
        ({"rax": 0, "rbx": 1}, Halt(), False),
        ({"rax": 0}, Io(0x10, 1, True, b"\0"), False),
    ],
)
def test_a_forgotten_hypercall_returns_0_and_the_guest_goes_on(got, exit_, explained):
    case = case_of("0f01d9f4", "compat")
    expected = seen(case, Hypercall(12, (0x7000, 3, 0x15)), rax=7, rip=CODE_BASE + 3)
    got = seen(case, exit_, rip=CODE_BASE + 4, **got)
    found = Difference(0, 0, expected, got)
    assert row("no-hypercall", ()).explains(case, found) is explained


def test_another_exit_that_is_missing_is_no_forgotten_hypercall():
    case = case_of("0f01d9f4", "compat")
    found = Difference(0, 0, seen(case, Io(0x10, 1, True, b"\0")), seen(case, Halt(), rax=0))
    assert not row("no-hypercall", ()).explains(case, found)


# --- #UD ------------------------------------------------------------------------------------------------------------


READ = Mmio(0xA0348, 4, False, b"")
QUEUED = {"events.exception_pending": 1, "events.exception_nr": 6}


@pytest.mark.parametrize(
    ("code", "vector", "exit_", "values", "explained"),
    [
        ("0f38f05308f4", 6, READ, {}, True),
        ("0f38f05308f4", 6, READ, {"events.exception_injected": 1}, True),
        ("660f38f05308f4", 6, Mmio(0xA0348, 2, False, b""), {}, True),
        ("480f38f05308f4", 6, Mmio(0xA0348, 8, False, b""), {}, True),
        ("0f38f05308f4", 13, READ, {}, False),
        ("0f38f05308f4", 6, Mmio(0xA034C, 4, False, b""), {}, False),
        ("0f38f05308f4", 6, Mmio(0xA0348, 8, False, b""), {}, False),
        ("0f38f05308f4", 6, Mmio(0xA0348, 4, True, bytes(4)), {}, False),
        ("8b5308f4", 6, READ, {}, False),
        ("0f38f05308f4", 6, READ, {"events.exception_pending": 0}, False),
        ("0f38f05308f4", 6, READ, {"events.exception_nr": 13}, False),
        ("0f38f05308f4", 6, READ, {"rdx": 1}, False),
        ("0f38f05308f4", 6, READ, {"rsp": 0xDEAD}, False),
        ("0f38f05308f4", 6, READ, {"rflags": 0xD7}, False),
        ("0f38f05308f4", 6, READ, {"cr2": 1}, False),
        ("0f38f05308f4", 6, READ, {"rip": CODE_BASE + 1}, False),
        ("0f38f05308f4", 6, Halt(), {}, False),
    ],
)
def test_a_device_is_read_before_ud_and_no_register_changes(code, vector, exit_, values, explained):
    case = case_of(code)
    handler = case.start.with_({"rip": STUBS + 16 * vector + 1, "rsp": case.start.gpr[4] - 40})
    at_read = case.start.with_(QUEUED | values)
    shown = [pack_sections(state, ("regs", "sregs2", "events")) for state in (handler, at_read)]
    found = differing(case, Observation(Halt(), shown[0]), Observation(exit_, shown[1]))
    assert row("read-before-ud 0xa0348", ()).explains(case, found) is explained


@pytest.mark.parametrize("wrong", ["read-before-ud 840", "read-before-ud 0xzz", "read-before-ud"])
def test_the_address_of_a_read_before_ud_is_hexadecimal(tmp_path, wrong):
    file = tmp_path / "known.toml"
    file.write_text(FILE.read_text().replace("read-before-ud 0xa0348", wrong))
    with pytest.raises(KnownError, match="read-before-ud 0xN"):
        load_known(file)


@pytest.mark.parametrize("module", ["kvm_amd", "kvm_pvm"])
def test_a_judge_finds_the_rows_that_cover_a_case(module):
    """It compiles their patterns together; each row still speaks of its own Cases alone."""
    rows = load_known()
    judge = Judge(SimpleNamespace(module=module, outcomes={}), rows)
    names = {p.replace("*", filling) for row in rows for p in row.cases for filling in ("", "x", "@long#0")}
    names |= {"", "alu/add_rr_b@long#0", "no/such@real#0"}
    found = {name: judge.covered(name) for name in names}
    assert found == {name: [row for row in rows if row.covers(name, module)] for name in names}
    assert any(found.values())
    assert Judge(SimpleNamespace(module=module, outcomes={})).covered("alu/add_rr_b@long#0") == []
