"""Upstream's suites in the lab: programs and guests in their form, built here, each ending in another way."""

import json
import subprocess

import pytest

from harness.lab.configurations import configuration
from harness.lab.errors import LabInputError
from harness.lab.hardware import pinned_qemu
from harness.lab.image import base_image
from harness.lab.kernel import debian_kernel
from harness.lab.peers import Peers, run_peers, selftests
from harness.lab.session import Cell

PROGRAMS = {
    "x86/opens_kvm": 'return open("/dev/kvm", O_RDWR) < 0;',
    "x86/skips": 'puts("1..0 # SKIP - Requirement not met: vmx"); return 4;',
    "x86/fails": 'puts("==== Test Assertion Failure ====\\n  x86/fails.c:1: rip == 5"); return 254;',
    "hangs": "for (;;) pause();",
    "panics": 'sleep(1); int fd = open("/proc/sysrq-trigger", O_WRONLY); write(fd, "c", 1); sleep(60); return 0;',
    "warns": """
        int fd = open("/dev/kmsg", O_WRONLY);
        const char *lines[] = {"<4>------------[ cut here ]------------",
            "<4>WARNING: CPU: 0 PID: 1 at arch/x86/kvm/x86.c:5 kvm_arch_vcpu_ioctl_run+0x1/0x2 [kvm]",
            "<4>---[ end trace 0000000000000000 ]---"};
        for (int i = 0; i < 3; i++) write(fd, lines[i], strlen(lines[i]));
        return 0;""",
    "zlast": "return 0;",
}
HEAD = "#include <fcntl.h>\n#include <stdio.h>\n#include <string.h>\n#include <unistd.h>\n"

# A guest as kvm-unit-tests builds it: multiboot, its words on the first serial port, its end by isa-debug-exit.
FLAT = """
        .code32
        .text
        .long   0x1BADB002, 0, -0x1BADB002
        .globl  _start
_start: mov     $words, %esi
        mov     $0x3f8, %dx
1:      lodsb
        test    %al, %al
        jz      2f
        out     %al, %dx
        jmp     1b
2:      mov     $STATUS, %eax
        mov     $0xf4, %dx
        out     %eax, %dx
3:      hlt
        jmp     3b
        .data
words:  .ascii  "WORDS"
        .byte   0
"""
UNITS = {
    "good": (0, "PASS: one\\nPASS: two\\nSUMMARY: 2 tests\\n"),
    "bad": (1, "PASS: one\\nFAIL: two\\nSUMMARY: 2 tests, 1 unexpected failures\\n"),
}
CONFIG = """
# as upstream writes it
[good]
file = good.flat
smp = 2
extra_params = -cpu max -m 64

[bad]
file = bad.flat
test_args = 'a b'
timeout = 30

[other-parameters]
file = good.flat
check = /sys/module/kvm_amd/parameters/nested=2

[intel]
file = good.flat
groups = vmx nodefault

[i386]
file = good.flat
arch = i386

[absent]
file = absent.flat
"""


@pytest.fixture(scope="module")
def cell():
    return Cell(configuration("svm"), debian_kernel("7.3", print), pinned_qemu(print), base_image(print))


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("selftests")
    for name, body in PROGRAMS.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.with_suffix(".c").write_text(f"{HEAD}int main(void) {{ {body} }}\n")
        subprocess.run(["gcc", "-static", "-w", "-o", path, path.with_suffix(".c")], check=True)
    (folder / "settings").write_text("timeout=120\n")
    return folder


@pytest.fixture(scope="module")
def units(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kvm-unit-tests")
    (folder / "x86").mkdir()
    (folder / "x86" / "unittests.cfg").write_text(CONFIG)
    for name, (status, words) in UNITS.items():
        flat = folder / "x86" / f"{name}.flat"
        (folder / f"{name}.S").write_text(FLAT.replace("STATUS", str(status)).replace("WORDS", words))
        subprocess.run(["as", "--32", "-o", folder / f"{name}.o", folder / f"{name}.S"], check=True)
        subprocess.run(["ld", "-m", "elf_i386", "-Ttext=0x100000", "-o", flat, folder / f"{name}.o"], check=True)
    return folder


def test_each_ends_as_it_did_and_is_blamed_alone(cell, programs, tmp_path):
    peers = Peers(cell, tmp_path)
    peers.add_selftests(programs)
    peers.limit(lambda name: 3)
    results = {r.test.name: r for r in peers.run()}
    assert {name: r.outcome for name, r in results.items()} == {
        "x86/opens_kvm": "pass", "x86/skips": "skip", "x86/fails": "fail", "hangs": "timeout", "panics": "splat",
        "warns": "splat", "zlast": "pass",
    }  # fmt: skip
    assert "rip == 5" in results["x86/fails"].said
    assert "panic" in results["panics"].said.lower()
    assert "kvm_arch_vcpu_ioctl_run" in results["warns"].said
    assert 3 <= results["hangs"].seconds < 10
    assert sorted(p.name for p in tmp_path.glob("boot-*")) == ["boot-1", "boot-2"]  # the panic cost one


def test_unit_tests_run_in_a_qemu_on_that_kvm(cell, units, tmp_path):
    said = []
    status = run_peers([cell], None, units, tmp_path, None, said.append)
    results = {r["test"]: r for r in json.loads((tmp_path / "peers.json").read_text())}
    assert {name: r["outcome"] for name, r in results.items()} == {
        "good": "pass", "bad": "fail", "other-parameters": "skip", "intel": "skip", "i386": "skip", "absent": "skip",
    }  # fmt: skip
    assert results["good"]["checks"] == [2, 0, 0]
    assert results["bad"]["checks"] == [1, 1, 0]
    assert "FAIL: two" in results["bad"]["said"]
    assert status == 1
    sums = next(line for line in said if line.startswith("unit-tests: 6 tests in"))
    assert sums.endswith(" s: 1 pass, 4 skip, 1 fail; 4 checks")


def test_a_selection_of_nothing_is_refused(cell, programs, tmp_path):
    with pytest.raises(LabInputError, match="no test matches"):
        run_peers([cell], programs, None, tmp_path, "nosuch", print)


def test_what_needs_libraries_is_refused(tmp_path):
    (tmp_path / "x.c").write_text("int main(void) { return 0; }")
    subprocess.run(["gcc", "-o", tmp_path / "x", tmp_path / "x.c"], check=True)
    with pytest.raises(LabInputError, match="-static"):
        selftests(tmp_path)


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(LabInputError, match="holds no built selftests"):
        selftests(tmp_path)
