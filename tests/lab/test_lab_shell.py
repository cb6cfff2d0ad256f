"""A shell in the lab, as one types into it: on a terminal, in a real machine."""

import os
import pty
import select
import subprocess
import sys
import time

import pytest

SHELL = [sys.executable, "-m", "harness", "lab", "shell", "--config", "svm", "--debian", "7.3"]
PROMPT = b"# "


class Terminal:
    """A ``lab shell`` on a terminal of its own."""

    def __init__(self):
        self.master, slave = pty.openpty()
        self.process = subprocess.Popen(SHELL, stdin=slave, stdout=slave, stderr=slave)
        os.close(slave)
        self.said = b""

    def until(self, text, seconds=120):
        """Read on until the shell has said it, from here on."""
        start, end = len(self.said), time.monotonic() + seconds
        while text not in self.said[start:]:
            assert time.monotonic() < end, self.said.decode(errors="replace")
            if select.select([self.master], [], [], 1.0)[0]:
                try:
                    self.said += os.read(self.master, 4096)
                except OSError:  # nobody has the other end any more
                    assert text in self.said[start:], self.said.decode(errors="replace")

    def type(self, text):
        os.write(self.master, text)


@pytest.fixture
def terminal():
    shell = Terminal()
    yield shell
    shell.process.kill()
    shell.process.wait()
    os.close(shell.master)


def test_a_shell_finds_kvm_and_the_harness_and_ends_with_exit(terminal):
    terminal.until(PROMPT)
    terminal.type(b"python3 -c 'from harness.vm import Kvm; print(Kvm().capability(0) + 41, \"found\")'\n")
    terminal.until(b"42 found")  # KVM_CAP_IRQCHIP is there
    terminal.until(PROMPT)
    terminal.type(b"false; exit\n")
    terminal.until(b"Power down")
    assert terminal.process.wait(60) == 0


def test_ctrl_bracket_leaves_at_once(terminal):
    terminal.until(PROMPT)
    terminal.type(b"\x1d")
    assert terminal.process.wait(10) == 0


def test_a_kernel_that_dies_is_told(terminal):
    terminal.until(PROMPT)
    terminal.type(b"echo c > /proc/sysrq-trigger\n")
    assert terminal.process.wait(60) == 4
    terminal.until(b"the guest's kernel panicked")
