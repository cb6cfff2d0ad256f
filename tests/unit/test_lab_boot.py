"""Command lines, the inbox and the errors of boots, without an emulator; tests/lab/test_boot.py has real ones."""

import os
import threading
import time
from dataclasses import replace

import pytest

from harness.cpuid import CpuidEntry, CpuProfile
from harness.lab.boot import CONSOLE, Arrival, Boot, BootSpec, Ending, How
from harness.lab.bootspec import command_line, nested_extension
from harness.lab.errors import LabError, LostError
from harness.lab.hardware import Emulator
from harness.lab.inbox import Inbox


@pytest.fixture
def spec(tmp_path):
    """A spec whose emulator is a shell script: ``spec(script, **fields)``."""

    def make(script="exit 0", **fields):
        binary = tmp_path / "emulator"
        binary.write_text(f"#!/bin/sh\n{script}\n")
        binary.chmod(0o755)
        kernel = tmp_path / "kernel"
        kernel.write_bytes(b"")
        return BootSpec(Emulator("scripted", binary, None, "0", frozenset()), kernel, **fields)

    return make


class Full(Inbox):
    """An inbox to be filled by hand."""

    def put(self, channel, data):
        self._put(Arrival(channel, data, 0.0))

    def close(self, error=None):
        self._close(error)


@pytest.fixture
def inbox():
    return Full(("console", "results"))


# --- what to boot -----------------------------------------------------------------------------------------------------


def test_disks_come_in_their_order_read_only_and_with_any_name(spec, tmp_path):
    words = command_line(spec(disks=(tmp_path / "a,b", tmp_path / "c")), {"console": 3, "qmp": 4})
    nodes = [words[i + 1] for i, word in enumerate(words) if word == "-blockdev"]
    assert [f'{tmp_path}/{name}"' in node for name, node in zip(("a,b", "c"), nodes, strict=True)] == [True, True]
    assert all('"read-only": true' in node for node in nodes)
    assert [w for w in words if w.startswith("virtio-blk-pci")] == [f"virtio-blk-pci,drive=disk{i}" for i in (0, 1)]


def test_every_stream_has_its_descriptor(spec):
    machine = spec(channels=("kvm-harness.results",), serials=("com2",))
    text = " ".join(command_line(machine, {"console": 3, "com2": 5, "kvm-harness.results": 6, "qmp": 4}))
    assert "id=serial0,fd=3" in text
    assert "id=serial1,fd=5" in text
    assert "id=channel0,fd=6 -device virtserialport,chardev=channel0,name=kvm-harness.results" in text
    assert "id=qmp,fd=4 -mon chardev=qmp,mode=control" in text


@pytest.mark.parametrize(("smp", "accel"), [(1, "tcg"), (2, "tcg,thread=single")])
def test_several_emulated_processors_take_turns(spec, smp, accel):
    words = command_line(replace(spec(), smp=smp), {"console": 3, "qmp": 4})
    assert words[words.index("-accel") + 1] == accel


def test_kernel_parameters_are_one_word(spec):
    words = command_line(spec(append=("console=ttyS0", "kvm_amd.npt=0")), {"console": 3, "qmp": 4})
    assert words[words.index("-append") + 1] == "console=ttyS0 kvm_amd.npt=0"


@pytest.mark.parametrize(
    ("leaf", "ecx", "module", "nested", "extension"),
    [
        (0x80000001, 1 << 2, "kvm_amd", "1\n", "svm"),
        (0x80000001, 1 << 2, "kvm_amd", "Y\n", "svm"),
        (0x80000001, 1 << 2, "kvm_amd", "0\n", None),
        (0x80000001, 0, "kvm_amd", "1\n", None),
        (1, 1 << 5, "kvm_intel", "Y\n", "vmx"),
        (1, 1 << 5, "kvm_intel", "N\n", None),
        (1, 1 << 5, "kvm_amd", "1\n", None),
        (1, 1 << 5, None, "", None),
    ],
)
def test_nested_virtualization_needs_both_cpuid_and_the_module_s_consent(
    tmp_path, leaf, ecx, module, nested, extension
):
    if module:
        folder = tmp_path / module / "parameters"
        folder.mkdir(parents=True)
        (folder / "nested").write_text(nested)
    assert nested_extension(CpuProfile((CpuidEntry(leaf, ecx=ecx),)), tmp_path) == extension


# --- emulators that do not start --------------------------------------------------------------------------------------


def test_a_missing_emulator_is_lost_and_says_what_to_do(spec, tmp_path):
    machine = spec()
    machine.emulator.binary.unlink()
    with pytest.raises(LostError, match=r"emulator is not there: run `kvm-harness lab build`"), Boot(machine, tmp_path):
        pass


def test_an_emulator_that_cannot_be_executed_is_lost(spec, tmp_path):
    machine = spec()
    machine.emulator.binary.chmod(0o644)
    with pytest.raises(LostError, match="the emulator cannot be executed"), Boot(machine, tmp_path):
        pass


def test_a_missing_disk_is_named(spec, tmp_path):
    with (
        pytest.raises(LostError, match=r"root\.sqsh: cannot be read"),
        Boot(spec(disks=(tmp_path / "root.sqsh",)), tmp_path),
    ):
        pass


def test_an_emulator_that_dies_at_once_is_lost_with_its_words(spec, tmp_path):
    machine = spec("echo 'no such option' >&2; exit 3")
    with pytest.raises(LostError, match=r"exit status 3\) after \d+\.\d s; it said:\n  no such option"):
        Boot(machine, tmp_path / "out").__enter__()
    assert (tmp_path / "out" / "emulator.log").read_text() == "no such option\n"


def test_an_emulator_killed_at_its_start_is_lost_with_the_signal(spec, tmp_path):
    with pytest.raises(LostError, match=r"killed by SIGSEGV"), Boot(spec("kill -SEGV $$"), tmp_path / "out"):
        pass


def test_an_output_folder_that_cannot_be_made(spec, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LabError, match="give another output folder"), Boot(spec(), tmp_path / "file" / "out"):
        pass


def test_no_descriptor_and_no_thread_is_left_of_one_that_failed(spec, tmp_path):
    before = os.listdir("/proc/self/fd"), threading.active_count()
    for _ in range(3):
        with pytest.raises(LostError), Boot(spec("exit 1", channels=("a", "b")), tmp_path / "out"):
            pass
    assert (os.listdir("/proc/self/fd"), threading.active_count()) == before


# --- endings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ending", "text"),
    [
        (Ending(How.POWERED_OFF, 0, 4.21, ""), "the guest powered off after 4.2 s"),
        (Ending(How.PANICKED, 0, 3, "", "Kernel panic - not syncing: x"), "panicked after 3.0 s: Kernel panic - not"),
        (Ending(How.DIED, -9, 1, ""), "the emulator died (killed by SIGKILL) after 1.0 s, without a word"),
        (
            Ending(How.DIED, 1, 1, "a\nassertion failed\n"),
            "(exit status 1) after 1.0 s; it said:\n  a\n  assertion failed",
        ),
    ],
)
def test_an_ending_in_words(ending, text):
    assert text in str(ending)


# --- the inbox --------------------------------------------------------------------------------------------------------


def test_all_that_arrived_is_read_before_the_death_is_told(inbox):
    inbox.put("results", b"one\ntw")
    inbox.put("results", b"o\nthr")
    inbox.close(LostError("the emulator died"))
    lines = []
    for _ in range(2):
        with pytest.raises(LostError, match="died"):
            lines.extend(inbox.lines("results", 1.0))
    assert lines == [b"one", b"two", b"thr"]


def test_lines_go_on_after_a_silence_in_the_middle_of_one(inbox):
    inbox.put("results", b"one\ntw")
    got = []
    with pytest.raises(TimeoutError, match=r"nothing on results for 0\.01 s"):
        got.extend(inbox.lines("results", 0.01))
    inbox.put("results", b"o\nthree")
    inbox.close()
    got.extend(inbox.lines("results", 0.01))
    assert got == [b"one", b"two", b"three"]


def test_a_reader_that_stops_in_the_middle_finds_the_rest(inbox):
    inbox.put("results", b"one\ntwo\nthree\n")
    assert next(inbox.lines("results", 1.0)) == b"one"
    inbox.close()
    assert list(inbox.lines("results", 1.0)) == [b"two", b"three"]


def test_read_tells_silence_from_the_end(inbox):
    assert inbox.read("console", 0.01) is None
    inbox.put("console", b"a")
    inbox.put("console", b"b")
    inbox.close()
    assert [inbox.read("console", 1.0) for _ in range(3)] == [b"ab", b"", b""]


def test_streams_are_seen_in_the_order_of_arrival(inbox):
    for channel, data in (("results", b"1"), ("console", b"2"), ("results", b"3"), ("console", b"4")):
        inbox.put(channel, data)
    inbox.close()
    assert b"".join(arrival.data for arrival in inbox.arrivals(1.0)) == b"1234"


def test_arrivals_tell_silence_and_go_on(inbox):
    with pytest.raises(TimeoutError):
        next(inbox.arrivals(0.01))
    inbox.put("console", b"x")
    assert next(inbox.arrivals(0.01)).data == b"x"


def test_a_reader_wakes_up_at_once(inbox):
    threading.Timer(0.05, inbox.put, ("console", b"now")).start()
    start = time.monotonic()
    assert inbox.read("console", 10.0) == b"now"
    assert time.monotonic() - start < 5.0


def test_console_is_the_first_stream(spec):
    assert spec(channels=("a",)).streams == (CONSOLE, "a")
