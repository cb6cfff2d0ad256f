"""Boots on a real emulator. Most guests are a few instructions long and start in half a second."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from harness.lab import boot as boot_module
from harness.lab import warm
from harness.lab.boot import CONSOLE, Boot, BootSpec, How
from harness.lab.errors import LabError, LostError
from harness.lab.hardware import pinned_qemu
from harness.lab.kernel import debian_kernel
from harness.lab.splat import find_splats

ROOT = Path(__file__).resolve().parents[2]
START = """
        .code32
        .text
        .long   0x1BADB002, 0, -0x1BADB002      # a multiboot header
        .globl  _start
print:  mov     $0x3fd, %dx                     # COM1: until the line status says that there is room
        in      %dx, %al
        test    $0x20, %al
        jz      print
        lodsb
        test    %al, %al
        jz      1f
        mov     $0x3f8, %dx
        out     %al, %dx
        jmp     print
1:      ret
off:    mov     $0x604, %dx                     # PM1a_CNT: S5, SLP_EN
        mov     $0x2000, %ax
        out     %ax, %dx
halt:   cli
        hlt
        jmp     halt
_start: mov     $stack, %esp
        mov     $hello, %esi
        call    print
"""
END = """
        .data
hello:  .asciz  "hello\\n"
count:  .asciz  "0000000\\n"
none:   .quad   0
        .bss
        .skip   4096
stack:
"""
GUESTS = {
    "off": "jmp off",
    "halt": "jmp halt",
    "reset": "mov $0xfe, %al; out %al, $0x64; jmp halt",  # the keyboard controller pulls the reset line
    "triple": "lidt none; ud2",
    "flood": """
1:      mov     $count, %esi
        call    print
        mov     $count + 6, %edi        # one more, in ASCII
2:      incb    (%edi)
        cmpb    $'9', (%edi)
        jbe     1b
        movb    $'0', (%edi)
        dec     %edi
        jmp     2b
""",
    "echo": """
1:      mov     $0x3fd, %dx             # until the line status says that a byte has come
        in      %dx, %al
        test    $1, %al
        jz      1b
        mov     $0x3f8, %dx
        in      %dx, %al
        out     %al, %dx
        jmp     1b
""",
}


@pytest.fixture(scope="module")
def emulator():
    return pinned_qemu(print)


@pytest.fixture(scope="module")
def guest(tmp_path_factory):
    """The multiboot kernel of a guest from GUESTS, by name."""
    folder = tmp_path_factory.mktemp("guests")

    def build(name):
        out = folder / name
        text = START + GUESTS[name.removesuffix("-com2")] + END
        if name.endswith("-com2"):
            text = text.replace("$0x3f", "$0x2f")
        (folder / f"{name}.S").write_text(text)
        subprocess.run(["as", "--32", "-o", f"{out}.o", f"{out}.S"], check=True)
        subprocess.run(["ld", "-m", "elf_i386", "-Ttext=0x100000", "-o", out, f"{out}.o"], check=True)
        return out

    return build


@pytest.fixture
def spec(emulator, guest):
    """The machine of a guest from GUESTS, by name."""
    return lambda name, **fields: BootSpec(emulator, guest(name), memory=64, **fields)


def gone(pid, limit=30.0):
    """The process has ended (and a parent has collected it) within the limit."""
    end = time.monotonic() + limit
    while time.monotonic() < end:
        if not Path(f"/proc/{pid}").exists():
            return True
        time.sleep(0.05)
    return False


def until(condition, limit=60.0):
    """Wait for something that takes a machine under load its time."""
    end = time.monotonic() + limit
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    assert condition()


def counted(lines):
    """The numbers of a flood's whole lines are without a gap."""
    numbers = [int(line) for line in lines if len(line) == 7]
    return numbers == list(range(len(numbers))) and len(numbers) > 0


# --- how machines end -------------------------------------------------------------------------------------------------


def test_a_guest_that_powers_off(spec, tmp_path):
    said = []
    with Boot(spec("off"), tmp_path / "out", said.append) as boot:
        pid = boot.pid
        assert list(boot.lines(CONSOLE, 30.0)) == [b"hello"]
        ending = boot.wait(10.0)
    assert (ending.how, ending.status, ending.panic) == (How.POWERED_OFF, 0, "")
    assert said == [f"starting off on {spec('off').emulator.name} (tcg)"]
    assert (tmp_path / "out" / "console.log").read_bytes() == b"hello\n"
    assert gone(pid)


@pytest.mark.parametrize("name", ["reset", "triple"])
def test_a_guest_that_resets_itself(spec, tmp_path, name):
    with Boot(spec(name), tmp_path) as boot:
        assert boot.wait(30.0).how is How.RESET
        assert list(boot.lines(CONSOLE, 1.0)) == [b"hello"]


def test_nothing_is_left_behind(spec, tmp_path):
    with Boot(spec("off"), tmp_path, lambda text: None) as boot:
        boot.wait(30.0)
    before = sorted(os.listdir("/proc/self/fd")), threading.active_count()
    for _ in range(2):
        with Boot(spec("off", channels=("a", "b"), serials=("c",)), tmp_path) as boot:
            boot.wait(30.0)
    assert (sorted(os.listdir("/proc/self/fd")), threading.active_count()) == before
    assert sorted(os.listdir(tmp_path)) == ["console.log", "emulator.log"]


def test_two_boots_at_once(spec, tmp_path):
    with Boot(spec("flood"), tmp_path / "1") as one, Boot(spec("off"), tmp_path / "2") as two:
        assert list(two.lines(CONSOLE, 30.0)) == [b"hello"]
        lines = one.lines(CONSOLE, 30.0)
        assert [next(lines) for _ in range(3)] == [b"hello", b"0000000", b"0000001"]
        assert two.wait(10.0).how is How.POWERED_OFF
        assert one.ending is None


def test_an_option_that_the_emulator_does_not_know(spec, tmp_path):
    machine = spec("off", options=("-no-such-option",))
    with pytest.raises(LostError, match=r"exit status 1.*\n.*no-such-option: invalid option"), Boot(machine, tmp_path):
        pass


def test_an_emulator_killed_in_the_middle_is_lost_and_what_arrived_is_kept(spec, tmp_path):
    lines = []
    with Boot(spec("flood"), tmp_path) as boot:
        flow = boot.lines(CONSOLE, 30.0)
        lines += [next(flow) for _ in range(1000)]
        os.kill(boot.pid, signal.SIGKILL)
        with pytest.raises(LostError, match=r"the emulator died \(killed by SIGKILL\)"):
            lines.extend(flow)
        assert boot.ending.how is How.DIED
    logged = (tmp_path / "console.log").read_bytes().split(b"\n")
    assert lines == [line for line in logged if line]
    assert lines[0] == b"hello"
    assert counted(lines[1:])


def test_an_emulator_ended_from_outside_is_lost_with_its_words(spec, tmp_path):
    with Boot(spec("halt"), tmp_path) as boot:
        os.kill(boot.pid, signal.SIGTERM)
        assert boot.wait(10.0).how is How.DIED
        with pytest.raises(LostError, match="terminating on signal 15"):
            list(boot.arrivals(1.0))


# --- who does not listen ----------------------------------------------------------------------------------------------


def test_a_guest_that_writes_much_to_nobody(spec, tmp_path):
    with Boot(spec("flood"), tmp_path) as boot:
        until(lambda: (tmp_path / "console.log").stat().st_size > 50_000)
        assert boot.kill().how is How.STOPPED
        lines = list(boot.lines(CONSOLE, 1.0))
    assert counted(lines[1:])
    assert len(lines) > 5000


def test_what_the_guest_could_not_deliver_yet_is_taken_in_after_its_death(spec, tmp_path, monkeypatch):
    monkeypatch.setattr(boot_module, "_UNREAD_LIMIT", 100)
    with Boot(spec("flood-com2", serials=("com2",)), tmp_path) as boot:
        until(lambda: "com2" in boot._paused)
        assert boot.wait(1.0) is None
        before = boot._streams["com2"].unread
        boot.kill()
        text = boot.read("com2", 1.0)
    assert len(text) > before > 100
    assert counted(text.split(b"\n")[1:])


def test_a_console_without_end_does_not_fill_the_disk(spec, tmp_path, monkeypatch):
    monkeypatch.setattr(boot_module, "CONSOLE_LIMIT", 1 << 12)
    with Boot(spec("flood"), tmp_path) as boot:
        until(lambda: (tmp_path / "console.log").stat().st_size > 1 << 12)
        assert boot.wait(0.5) is None
        boot.kill()
        text = boot.read(CONSOLE, 1.0)
        assert boot.read(CONSOLE, 1.0) == b""
    assert text == (tmp_path / "console.log").read_bytes()
    assert text.endswith(b"writes too much; the rest is dropped]\n")
    assert len(text) < (1 << 12) + 200


def test_a_full_disk_is_said(spec, tmp_path):
    (tmp_path / "console.log").symlink_to("/dev/full")
    with Boot(spec("flood"), tmp_path) as boot:
        with pytest.raises(LabError, match=r"console\.log: No space left on device: make room"):
            list(boot.lines(CONSOLE, 30.0))
        assert gone(boot.pid)


def test_silence_is_a_timeout_and_no_end(spec, tmp_path):
    with Boot(spec("halt"), tmp_path) as boot:
        assert next(boot.lines(CONSOLE, 30.0)) == b"hello"
        with pytest.raises(TimeoutError):
            next(boot.arrivals(0.3))
        assert boot.ending is None


# --- talking to it ----------------------------------------------------------------------------------------------------


def test_what_is_sent_arrives(spec, tmp_path):
    with Boot(spec("echo"), tmp_path) as boot:
        lines = boot.lines(CONSOLE, 30.0)
        assert next(lines) == b"hello"
        boot.send(CONSOLE, b"to the guest and back\n")
        assert next(lines) == b"to the guest and back"


def test_sending_to_a_dead_machine_is_lost(spec, tmp_path):
    with Boot(spec("off"), tmp_path) as boot:
        boot.wait(30.0)
        with pytest.raises(LostError, match=f"{CONSOLE}: the guest powered off"):
            boot.send(CONSOLE, b"x")
        with pytest.raises(LostError, match="QMP query-status: the guest powered off"):
            boot.execute("query-status")


def test_sending_to_a_guest_that_does_not_read_ends_by_itself(spec, tmp_path):
    with (
        Boot(spec("halt", channels=("nobody",)), tmp_path) as boot,
        pytest.raises(LostError, match=r"reads nothing from nobody; see .*console\.log"),
    ):
        boot.send("nobody", bytes(4 << 20), timeout=0.5)


def test_the_emulator_answers_over_qmp_and_quits(spec, tmp_path):
    with Boot(spec("halt"), tmp_path) as boot:
        assert boot.execute("query-status")["status"] == "running"
        assert "EIP=" in boot.execute("human-monitor-command", **{"command-line": "info registers"})
        with pytest.raises(LostError, match="QMP no-such-command: The command no-such-command has not been found"):
            boot.execute("no-such-command")
        assert boot.quit().how is How.STOPPED
        assert boot.ending.status == 0


def test_a_hanging_emulator_is_killed_all_the_same(spec, tmp_path):
    with Boot(spec("halt"), tmp_path) as boot:
        os.kill(boot.pid, signal.SIGSTOP)
        with pytest.raises(LostError, match="no answer"):
            boot.execute("query-status", timeout=0.3)
        assert boot.quit(timeout=0.3).how is How.STOPPED


# --- going on where another one was ---


def answers(boot, text):
    """The echo guest gives a line back."""
    boot.send(CONSOLE, text + b"\n")
    return next(boot.lines(CONSOLE, 30.0)) == text


def test_a_machine_that_was_saved_goes_on_and_so_does_another_one(spec, tmp_path):
    with Boot(spec("echo"), tmp_path / "1") as boot:
        assert next(boot.lines(CONSOLE, 30.0)) == b"hello"
        boot.save(tmp_path / "a,state")
        assert answers(boot, b"after")
    for _ in range(2):
        said = []
        with Boot(spec("echo", incoming=tmp_path / "a,state"), tmp_path / "2", said.append) as boot:
            assert answers(boot, b"again")  # the first line: this one has never said hello
        assert said[0].startswith("going on with echo")


def test_a_damaged_state_is_lost(spec, tmp_path):
    state = tmp_path / "state"
    with Boot(spec("echo"), tmp_path / "1") as boot:
        assert next(boot.lines(CONSOLE, 30.0)) == b"hello"
        boot.save(state)
    state.write_bytes(state.read_bytes()[:5000])
    with pytest.raises(LostError), Boot(spec("echo", incoming=state), tmp_path / "2"):
        pass


def test_a_machine_that_cannot_be_saved_goes_on(spec, tmp_path):
    with Boot(spec("echo"), tmp_path / "1") as boot:
        assert next(boot.lines(CONSOLE, 30.0)) == b"hello"
        with pytest.raises(LostError, match="QMP "):
            boot.save(tmp_path / "nowhere" / "state")
        assert answers(boot, b"all the same")


def test_kept_machines_are_few(spec, tmp_path, monkeypatch):
    monkeypatch.setenv("KVM_HARNESS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(warm, "KEPT", 2)
    with Boot(spec("echo"), tmp_path / "1") as boot:
        for key in ("a" * 32, "b" * 32, "c" * 32):
            warm.keep_warm(key, boot, f"hello of {key}")
            os.utime(warm.area(warm.KIND) / ("a" * 32))
    assert warm.find_warm("b" * 32) is None
    found = warm.find_warm("a" * 32)
    assert found.hello == "hello of " + "a" * 32
    assert found.state.stat().st_size > 1000
    warm.drop_warm("a" * 32)
    assert warm.find_warm("a" * 32) is None


# --- whoever started it fails -----------------------------------------------------------------------------------------


def test_an_exception_inside_leaves_no_emulator(spec, tmp_path):
    boot = Boot(spec("flood"), tmp_path)
    with pytest.raises(ZeroDivisionError), boot:
        _ = 1 / 0
    assert not Path(f"/proc/{boot.pid}").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_parent_that_is_killed_leaves_no_emulator(spec, tmp_path, number):
    machine = spec("flood")
    program = f"""
        import sys
        from pathlib import Path
        from harness.lab.boot import Boot, BootSpec
        from harness.lab.hardware import Emulator
        emulator = Emulator("q", Path({str(machine.emulator.binary)!r}), Path({str(machine.emulator.firmware)!r}),
                            "0", frozenset())
        with Boot(BootSpec(emulator, Path({str(machine.kernel)!r}), memory=64), Path({str(tmp_path)!r})) as boot:
            print(boot.pid, flush=True)
            boot.wait(60.0)
    """
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    pid = int(parent.stdout.readline())
    assert Path(f"/proc/{pid}").exists()
    parent.send_signal(number)
    _, stderr = parent.communicate(timeout=60)
    assert ("KeyboardInterrupt" in stderr) == (number == signal.SIGINT)
    assert gone(pid)


# --- Linux ------------------------------------------------------------------------------------------------------------

INIT = r"""
#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <unistd.h>

static int port(const char *wanted)
{
    char path[300], name[64];
    DIR *ports = opendir("/sys/class/virtio-ports");
    for (struct dirent *e; ports && (e = readdir(ports));) {
        snprintf(path, sizeof path, "/sys/class/virtio-ports/%s/name", e->d_name);
        FILE *f = fopen(path, "r");
        if (!f || !fgets(name, sizeof name, f) || strncmp(name, wanted, strlen(wanted)))
            continue;
        snprintf(path, sizeof path, "/dev/%s", e->d_name);
        return open(path, O_RDWR);
    }
    return -1;
}

int main(void)
{
    static char data[32 << 10]; /* what one write takes; the driver queues up to 128 of them */
    char line[100];
    mkdir("/sys", 0755);
    mkdir("/dev", 0755);
    mount("sysfs", "/sys", "sysfs", 0, "");
    mount("devtmpfs", "/dev", "devtmpfs", 0, "");
    int results = port("kvm-harness.results"), n;
    dprintf(results, "ready\n");
    while ((n = read(results, line, sizeof line)) > 0) {
        if (!strncmp(line, "echo", 4))
            dprintf(results, "%.*s", n, line);
        if (!strncmp(line, "much", 4)) {
            memset(data, 'x', sizeof data);
            for (long sent = 0, done; sent < 16 << 20; sent += done)
                done = write(results, data, sizeof data);
            dprintf(results, "\n");
            printf("all written\n");
            fflush(stdout);
        }
        if (!strncmp(line, "off", 3)) {
            dprintf(results, "last words\n");
            reboot(RB_POWER_OFF);
        }
        if (!strncmp(line, "die", 3))
            return 3;
    }
    return 1;
}
"""


def cpio(files):
    """An initramfs ("newc", Documentation/driver-api/early-userspace/buffer-format.rst) of files by name."""
    out = b""
    for name, mode, data in [*files, ("TRAILER!!!", 0, b"")]:
        fields = (0, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0)
        out += b"070701" + b"".join(b"%08x" % field for field in fields) + name.encode() + b"\0"
        out += bytes(-len(out) % 4) + data
        out += bytes(-len(out) % 4)
    return out


@pytest.fixture(scope="module")
def linux(emulator, tmp_path_factory):
    """A machine with Debian's kernel and an init that obeys what is sent over kvm-harness.results."""
    folder = tmp_path_factory.mktemp("linux")
    (folder / "init.c").write_text(INIT)
    subprocess.run(["gcc", "-static", "-O1", "-w", "-o", folder / "init", folder / "init.c"], check=True)
    initramfs = folder / "initramfs.cpio"
    console = ("dev", 0o40755, b"")
    initramfs.write_bytes(cpio([console, ("init", 0o100755, (folder / "init").read_bytes())]))
    return BootSpec(
        emulator,
        debian_kernel("6.12").image,
        initramfs,
        ("console=ttyS0", "panic=-1", "loglevel=5", "tsc=unstable"),
        channels=("kvm-harness.other", "kvm-harness.results"),
    )


def test_linux_finds_its_channels_by_name_and_its_last_words_arrive(linux, tmp_path):
    with Boot(linux, tmp_path) as boot:
        lines = boot.lines("kvm-harness.results", 120.0)
        assert next(lines) == b"ready"
        boot.send("kvm-harness.results", b"echo 1\n")
        assert next(lines) == b"echo 1"
        boot.send("kvm-harness.results", b"off\n")
        assert list(lines) == [b"last words"]
        assert boot.wait(30.0).how is How.POWERED_OFF
        assert boot.read("kvm-harness.other", 1.0) == b""


def test_a_channel_that_nobody_reads_makes_the_guest_wait_and_loses_nothing(linux, tmp_path, monkeypatch):
    monkeypatch.setattr(boot_module, "_UNREAD_LIMIT", 1 << 18)
    with Boot(linux, tmp_path) as boot:
        assert next(boot.lines("kvm-harness.results", 120.0)) == b"ready"
        boot.send("kvm-harness.results", b"much\n")
        time.sleep(2.0)
        assert b"all written" not in (tmp_path / "console.log").read_bytes()
        assert next(boot.lines("kvm-harness.results", 30.0)) == b"x" * (16 << 20)
        assert b"all written\r" in boot.lines(CONSOLE, 10.0)


def test_a_panic_is_told_with_its_reason(linux, tmp_path):
    with Boot(linux, tmp_path) as boot:
        assert next(boot.lines("kvm-harness.results", 120.0)) == b"ready"
        boot.send("kvm-harness.results", b"die\n")
        ending = boot.wait(30.0)
        text = b"\n".join(boot.lines(CONSOLE, 1.0)).decode()
    assert ending.how is How.PANICKED
    assert ending.panic == "Kernel panic - not syncing: Attempted to kill init! exitcode=0x00000300"
    assert [splat.kind for splat in find_splats(text)] == ["panic"]
