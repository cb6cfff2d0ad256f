"""A toy kernel under git whose series is validated without a lab: its image says which Cases fail on it.

Building is real (make, gcc, objects compared); running is that of an executor which, as a cluster's would, takes jobs
and leaves their journals. It reads in the kernel's image what that kernel does: the strings in arch/x86/kvm/emulate.c.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections import Counter
from concurrent.futures import Executor, Future
from pathlib import Path

from harness.journal import Journal
from harness.lab.configurations import configuration
from harness.lab.hardware import Emulator
from harness.lab.image import Image
from harness.lab.profile import load_profile
from harness.lab.results import regressed
from harness.series.builds import Flavour
from harness.series.cells import finished
from harness.series.git import Repository
from harness.series.line import CellLine
from harness.series.run import SeriesRun, Setup
from harness.series.state import Folder

MAKEFILE = """\
VERSION = 7
PATCHLEVEL = 3
SUBLEVEL = 9
EXTRAVERSION =

allnoconfig:
	@cp $(KCONFIG_ALLCONFIG) $(KCONFIG_CONFIG)

bzImage:
	@mkdir -p $(O)/arch/x86/boot $(O)/arch/x86/kvm $(O)/include/config
	@gcc -O1 -fno-asynchronous-unwind-tables -Wall -Werror \\
		-c -o $(O)/arch/x86/kvm/emulate.o $(CURDIR)/arch/x86/kvm/emulate.c
	@echo 'savedcmd_arch/x86/kvm/x86.o := gcc -I$(CURDIR)/include -c -o x.o x.c ; tool' > $(O)/arch/x86/kvm/.x86.o.cmd
	@cd $(O) && rm -f vmlinux.a && ar cDPrST vmlinux.a arch/x86/kvm/emulate.o
	@cp $(O)/arch/x86/kvm/emulate.o $(O)/vmlinux
	@cp $(O)/vmlinux $(O)/arch/x86/boot/bzImage
	@echo 7.3.9 > $(O)/include/config/kernel.release
	@(echo "ffffffff81000000 T _text"; nm $(O)/vmlinux | sed 's/^0000000000/ffffffff81/') > $(O)/System.map
"""
IDENTITY = {
    f"GIT_{who}_{what}": value
    for who in ("AUTHOR", "COMMITTER")
    for what, value in (("NAME", "A Uthor"), ("EMAIL", "a@example.org"), ("DATE", "2026-01-01T00:00:00Z"))
} | {"GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_SYSTEM": "/dev/null"}
EMULATE = "arch/x86/kvm/emulate.c"
CASES = ("alu/add@long#0", "gpr/mov@long#0", "gpr/xchg@real#0", "mmio/load@pae#0")
EXECUTED = ("em_mov", "em_xchg")
PANIC = "[    1.234567] Kernel panic - not syncing: VFS: Unable to mount root fs on unknown-block(0,0)\n"


def code(*does, mov="return x;", line=0, name="em_mov", more=""):
    """emulate.c of a kernel that ``does`` things: ``fails CASE``, ``allows CASE``, ``panics``, ``hangs``, ..."""
    told = "".join(f'const char told_{n}[] = "does {text}";\n' for n, text in enumerate(does))
    return (
        "// a comment\n" * line + told + f"int {name}(int x)\n{{\n\t{mov}\n}}\n"
        "int em_xchg(int x)\n{\n\treturn x ^ 1;\n}\nint em_never(int x)\n{\n\treturn x * 3;\n}\n" + more
    )


def header(rip="VCPU_REG_RIP = NR_VCPU_GENERAL_PURPOSE_REGS"):
    """kvm_host.h, as far as the register map goes."""
    names = ["RAX", "RCX", "RDX", "RBX", "RSP", "RBP", "RSI", "RDI", *(f"R{n}" for n in range(8, 16))]
    listed = "".join(f"VCPU_REGS_{name}, " for name in names)
    return (
        f"enum kvm_reg {{ {listed} NR_VCPU_GENERAL_PURPOSE_REGS, {rip}, NR_VCPU_TOTAL_REGS }};\n"
        "struct kvm_vcpu_arch { unsigned long regs[NR_VCPU_GENERAL_PURPOSE_REGS]; unsigned long rip;\n"
        "unsigned long regs_avail[1]; unsigned long regs_dirty[1]; };\n"
        "struct kvm_vcpu { struct kvm_vcpu_arch arch; };\n"
    )


class Tree:
    """The toy's repository; BASE is its first commit."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir()
        self.git("init", "--quiet", "--initial-branch=main", ".")
        for name, text in {
            "Makefile": MAKEFILE, "Kbuild": "", "Kconfig": "", "arch/x86/kvm/Kconfig": "",
            "include/linux/kvm_host.h": header(),
        }.items():  # fmt: skip
            self.write(name, text)
        self.commit("Linux 7.3.9", code())
        self.git("tag", "base")

    def git(self, *words: str) -> str:
        return subprocess.run(
            ["git", "-C", self.path, *words], env=os.environ | IDENTITY, capture_output=True, text=True, check=True
        ).stdout

    def write(self, name: str, text: str) -> None:
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def commit(self, message: str, text: str) -> None:
        """A patch that makes emulate.c this text."""
        self.write(EMULATE, text)
        self.git("add", "--all")
        self.git("commit", "--quiet", "--allow-empty", "--message", message)


class Elsewhere(Executor):
    """Does jobs at once. ``ran``: (cell, kernel or "base" or "again", tier) of each that was not finished before.

    ``odd``: Cases that mismatch at some of their runs on other kernels than BASE, with the numbers of these runs;
    ``odd_base``: the same, on BASE. ``stop_after``: so many jobs, and it raises KeyboardInterrupt.
    """

    def __init__(self, odd=None, stop_after=None, odd_base=None):
        self.ran: list[tuple[str, str]] = []
        self.jobs = []
        self.odd = {False: odd or {}, True: odd_base or {}}
        self.runs = Counter()
        self.stop_after = stop_after

    def submit(self, function, job):
        future: Future[Path] = Future()
        if self.stop_after is not None and len(self.ran) >= self.stop_after:
            raise KeyboardInterrupt
        self.jobs.append(job)
        if not finished(job):
            self.ran.append((job.folder.parent.name + "/" + job.folder.name, job.options.tier))
            self._run(job)
        future.set_running_or_notify_cancel()
        future.set_result(job.folder)
        return future

    def _run(self, job):
        does = re.findall(rb"does ([^\0]*)\0", job.cell.kernel.image.read_bytes())
        does = [text.decode() for text in does]
        if job.folder.exists():
            subprocess.run(["rm", "-r", job.folder], check=True)
        journal = Journal(job.folder, {"key": job.key, "tier": job.options.tier, "chosen": len(CASES)})
        config = job.cell.configuration.name
        if "no-kvm" in does:
            journal.append(dict(regressed("KVM", "no KVM in this kernel").to_json()))
            journal.append({"finished": True})
            journal.close()
            return
        for word in ("panics", "hangs"):
            if word in does:
                journal.append({"lost": f"{word} before the suite began", "error": "LostError"})
                (job.folder / "boot-1").mkdir()
                (job.folder / "boot-1" / "console.log").write_text(PANIC if word == "panics" else "")
                journal.close()
                return
        base = "base" in job.folder.parts
        run = job.folder.name
        cases = CASES if job.options.tier == "full" else CASES[:2]
        for name in cases:
            if job.options.only and name not in job.options.only:
                continue
            record = {"case": name, "id": f"{abs(hash(name)) % 16**12:012x}", "verdict": "agree", "checks": 1}
            record |= {"summary": "", "seconds": 0.1}
            if f"fails {name}" in does or f"fails {name} in {config}" in does:
                record |= {"verdict": "mismatch", "summary": "rcx: expected 0x1, got 0x2"}
            if f"allows {name}" in does:
                record |= {"allowed": 77}
            if f"shakes {name}" in does and base and run == "2":
                record |= {"allowed": 78}
            self.runs[base, name] += 1
            if self.runs[base, name] in self.odd[base].get(name, ()):
                record |= {"verdict": "mismatch", "summary": "rsi: expected 0x1, got 0x3", "differs": ["rsi"]}
            if f"dies of {name}" in does or (f"dies once of {name}" in does and base and run == "2"):
                record |= {"verdict": "lost", "checks": 0, "summary": "the emulator was reset; console: somewhere"}
            if f"warns in {name}" in does:
                record |= {"verdict": "splat", "checks": 0, "summary": "WARNING: at kvm_emulate; console: somewhere"}
            journal.append(record)
        probed = load_profile("svm", "7.3").to_json()
        if "loses capabilities" in does:
            probed["capabilities"].popitem()
        gone = {"case": "profile/capability-OF_A_STOCK_KERNEL", "id": "", "verdict": "regressed", "checks": 1}
        journal.append(gone | {"summary": "gone: capability OF_A_STOCK_KERNEL", "seconds": 0.0})
        journal.append({"probed": probed})
        seen = [name for name in EXECUTED if name in job.functions]
        missing = [name for name in job.functions if name.startswith("noinstr")]
        journal.append({"executed": [{"seen": seen, "offsets": False, "missing": missing}], "machines": 1})
        if "emulator dies" in does:
            journal.append({"lost": "the emulator died", "error": "LostError"})
        else:
            journal.append({"finished": True, "seconds": 1.5})
        journal.close()


class Shown:
    """A Display that keeps what it is told."""

    def __init__(self):
        self.reports, self.told = [], []

    def say(self, text):
        pass

    def building(self, number, flavour):
        self.told.append(("building", number))

    def doing(self, text):
        pass

    def cells(self, number, done, left):
        self.told.append(("running", number))

    def patch(self, report):
        self.reports.append(report)


def validate(
    tree, out, executor, configs=("svm", "svm-emul"), tier="auto", second=False, range_="base..main", display=None
):
    """The report on the toy's series."""
    patches = Repository(tree.path).range(range_)
    cells = [CellLine(name, configuration(name), Flavour()) for name in configs]
    if second:
        cells += [CellLine(f"{name}-debug", configuration(name), Flavour("debug")) for name in configs]
    emulator = Emulator("toy", Path("/bin/true"), None, "0" * 32, frozenset())
    setup = Setup(
        tree.path, range_, patches, cells, emulator, Image(Path("/dev/null"), "1" * 32), {c.name: "tcg" for c in cells},
        tier, 1, 1,
    )  # fmt: skip
    about = {"commits": [c.id for c in patches.commits], "cells": [c.name for c in cells]}
    with Folder(out, about) as folder:
        return SeriesRun(setup, folder, executor, Shown() if display is None else display).run()


def report_json(out):
    """What programs read."""
    return json.loads((out / "report.json").read_text())
