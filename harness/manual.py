"""What ``--help`` says of each verb: what it does and where it writes, examples, and the exit statuses it can have."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

_WIDTH: Final = 78  # a terminal of 80 columns


@dataclass(frozen=True)
class Page:
    """One verb: ``text`` for the list of verbs, ``about`` in full, command lines, and what its statuses mean."""

    text: str
    about: str
    examples: tuple[str, ...]
    statuses: Mapping[int, str]
    title: str = "exit status"

    @property
    def description(self) -> str:
        """What comes before the options."""
        return textwrap.fill(f"{self.text} {self.about}", _WIDTH, break_on_hyphens=False)

    @property
    def epilog(self) -> str:
        """What comes after them."""
        title = "example" if len(self.examples) == 1 else "examples"
        lines = [f"{title}:", *(f"  {line}" for line in self.examples), "", f"{self.title}:"]
        for status, meaning in self.statuses.items():
            lines += textwrap.wrap(
                meaning, _WIDTH, initial_indent=f"  {status:<3} ", subsequent_indent=" " * 6, break_on_hyphens=False
            )
        return "\n".join(lines)


_FULL: Final = "the output could not be written (disk full)"
_END: Final = {130: "interrupted"}
_KEPT: Final = {130: "interrupted; finished results are kept"}

PAGES: Final[Mapping[str, Page]] = {
    "probe": Page(
        "What this host's KVM can do, found by trying it.",
        "Prints the kernel, KVM's module and parameters, which processor modes and CPU features guests can use, and "
        "which instructions its emulator lacks. Small guests run for it; nothing is written.",
        ("kvm-harness probe", "kvm-harness probe --json | jq .modes"),
        {0: "printed", 2: "bad usage", 3: "no usable KVM; the text says what to do", 4: _FULL, **_END},
    ),
    "run": Page(
        "The register suite on this machine's KVM.",
        "Each Case is a tiny guest with its whole start state: it runs on KVM and on the reference model, and every "
        "register, exit and all RAM are compared at every exit. Failures are shown as they come. DIR gets "
        "journal.jsonl, of which `kvm-harness report` makes text, HTML, JUnit and KTAP, and cases/ID.json for each "
        "failure, which `kvm-harness replay` runs again.",
        (
            "kvm-harness run", "kvm-harness run -k 'mmio and not @real#' --fail-fast",
            "kvm-harness run -k 'alu/add_rr_b@long#0' --out out/one", "kvm-harness run --list -k 'mmio and long'",
        ),
        {
            0: "everything that ran agrees, or differs just as known_divergences.toml says; or listed",
            1: "a mismatch or a splat",
            2: "bad usage, no Case selected, or none that this host can run", 3: "no usable KVM",
            4: "lost: the harness failed, or the disk is full", **_KEPT,
        },
    ),
    "replay": Page(
        "One Case again on this machine's KVM, in full detail; or as one self-contained C file.",
        "Shows what was compared and what differs: guest source line, exit, registers with XOR and bit names, memory, "
        "disassembly. The verdict is the one that `kvm-harness run` gives. With --emit-c a C program is printed that "
        "shows the same with nothing but a compiler and /dev/kvm. Nothing is written.",
        (
            "kvm-harness replay 'alu/add_rr_b@long#0'",
            "kvm-harness replay out/20261123-120000/cases/3f2a9c17b0de.json",
            "kvm-harness replay 3f2a9c17b0de --emit-c > x.c && gcc -O2 -o x x.c && ./x",
        ),
        {
            0: "agrees, or differs just as known_divergences.toml says; with --emit-c: printed",
            1: "a mismatch or a splat", 2: "bad input, no such Case, or one that this host cannot run",
            3: "no usable KVM", 4: _FULL, **_END,
        },
    ),
    "report": Page(
        "Views of a run's journal: text, HTML, JUnit or KTAP.",
        "One view is printed. Of several, each becomes a file in DIR: report.txt, report.html, junit.xml, report.ktap. "
        "An interrupted or damaged run is shown as far as it can be read. Of a series' folder it is the "
        "series' report, which has no JUnit view, with the series' status.",
        (
            "kvm-harness report out/20261123-120000",
            "kvm-harness report out/20261123-120000 --format junit > junit.xml",
            "kvm-harness report out/20261123-120000 --format html,ktap",
        ),
        {
            0: "the run agrees, or differs just as is known", 1: "a mismatch, a splat, or something regressed",
            2: "bad input: no journal there, or nothing ran",
            4: "the run is incomplete, damaged or lost, or the output could not be written (disk full)", **_END,
        },
    ),
    "compare": Page(
        "Two runs side by side: two hosts, two kernels, before and after a patch.",
        "Cases are matched by name; what changed its verdict is listed, first what agreed before. Nothing is written.",
        ("kvm-harness compare out/before out/after",),
        {
            0: "no Case that agreed in A is worse in B", 1: "one is",
            2: "bad input: no journal there, or no Case is in both",
            4: "a run is incomplete or damaged, or the output could not be written (disk full)", **_END,
        },
    ),
    "layout": Page(
        "KVM's register map (enum kvm_reg, struct kvm_vcpu_arch) from BTF or DWARF, checked.",
        "Prints the ids of all registers, where struct kvm_vcpu_arch keeps them, and what became of each rule: ok, "
        "violated, or n/a where the kernel has no such thing. Nothing is written.",
        (
            "kvm-harness layout", "kvm-harness layout ~/linux/vmlinux",
            "kvm-harness layout kvm.ko --base vmlinux --json",
        ),
        {
            0: "no rule is violated", 1: "one is", 2: "bad input: a file that has no register map, or cannot be read",
            4: "a program that unpacks the file is not installed, or the disk is full", **_END,
        },
    ),
    "series": Page(
        "A verdict for every patch of a kernel series: BASE..TIP, or a mailbox.",
        "BASE runs first, twice. Then each patch is built; its machine code is compared with that before it, and where "
        "that differs the suite runs on it, nested in QEMU. The first bad patch is named with Case, values and a C "
        "reproducer. DIR gets report.txt (for a mail), .json, .ktap and .html, and below patches/ what they rest on. "
        "Your checkout is only read.",
        (
            "kvm-harness series v7.3..my-branch --tree ~/linux --config svm,svm-emul",
            "kvm-harness series --mbox series.mbox --base v7.3 --tree ~/linux",
            "kvm-harness series HEAD~1..HEAD --quick",
        ),
        {
            0: "all patches are good", 1: "a patch is bad, does not build, or is not what it says",
            2: "bad input, or BASE cannot be used", 4: "lost (infrastructure, disk full)",
            130: "interrupted; the same command goes on where it was",
        },
    ),
    "bisect-run": Page(
        "Is the kernel that is checked out good? For `git bisect run`.",
        "Builds the tree as it is checked out, uncommitted changes included, and runs the suite on it, nested in QEMU. "
        "What is wrong is told on stderr; results are kept in the cache. Your checkout is only read.",
        (
            "git bisect start BAD GOOD",
            "git bisect run kvm-harness bisect-run --config svm-emul -k 'alu and long'",
        ),
        {
            0: "good", 1: "bad (splat, mismatch, regressed)",
            125: "cannot be tested (does not build, too old, lost): git skips it",
            128: "the command cannot be used as it is: git stops", 130: "interrupted: git stops",
        },
        "exit status, for git bisect run",
    ),
    "mutants": Page(
        "Seeded kernel bugs, one after the other, in the lab: which ones the suite catches.",
        "The proof that a green verdict means something. Each bug is built into a kernel, and the suite runs until the "
        "first Case that sees it; the unmodified kernel runs the same Cases first. DIR gets mutants.json "
        "and a folder for each bug.",
        (
            "kvm-harness mutants --list", "kvm-harness mutants --only 23,cr2-stale --config svm",
        ),
        {
            0: "all are caught, or argued equivalent; or listed", 1: "one survived",
            2: "bad input; one does not fit the tree, does not compile or has no Case; or none was tried",
            4: "one was lost (infrastructure, disk full)", 130: "interrupted; the same command goes on where it was",
        },
    ),
    "lab": Page(
        "The suite on a kernel under test, nested in an emulator: list, build, run, shell, peers.",
        "Needs no hardware virtualization: a real kernel with its real kvm_amd boots in QEMU's emulation of AMD SVM. "
        "`sh ci/packages.sh lab` installs what building QEMU, images and kernels takes; docs/lab.md tells all of it.",
        ("kvm-harness lab run --debian 6.12 --tier smoke", "kvm-harness lab COMMAND --help"),
        {2: "no command was given", 130: "interrupted; each command's own --help has the others"},
    ),
    "lab list": Page(
        "Configurations, kernels and what is built already.",
        "Says which kernel series have a checked-in profile in each configuration, and how much is in the cache. "
        "Builds and fetches nothing.",
        ("kvm-harness lab list",),
        {0: "printed", 2: "bad usage", 4: "the cache cannot be used, or the disk is full", **_END},
    ),
    "lab build": Page(
        "Build or fetch what a run needs, and stop there.",
        "QEMU, the root image and the kernels go into the cache, ~/.cache/kvm-harness or KVM_HARNESS_CACHE; a machine "
        "without a network can use a copy of it. The first time takes 10 to 15 minutes.",
        ("kvm-harness lab build --config all --debian 6.1,6.12,7.3",),
        {
            0: "all of it is there", 2: "bad input: no such configuration or kernel, or a tree that does not compile",
            4: "lost: could not be fetched or built, or the disk is full", **_END,
        },
    ),
    "lab run": Page(
        "The suite on a kernel under test, nested in an emulator.",
        "A cell is a configuration on a kernel; cells run one after the other. DIR (of several cells: a folder each in "
        "it) gets journal.jsonl, junit.xml, results.ktap, the consoles in boot-N/, and cases/ID.json with a C "
        "reproducer for what fails. What a KVM must be able to do stands in ci/qemu/profiles/.",
        (
            "kvm-harness lab run --config svm,svm-shadow --debian 6.12 --tier smoke",
            "kvm-harness lab run --tree ~/linux -k 'mmio and long'",
        ),
        {
            0: "everything that ran agrees, or differs just as is known; or listed",
            1: "a mismatch, a splat, or something regressed",
            2: "bad input, no Case selected, a kernel that cannot be used, or a tree that does not compile",
            4: "lost: the machinery failed, or the disk is full", **_KEPT,
        },
    ),
    "lab shell": Page(
        "A shell inside, on the console of the machine.",
        "Boots the first of the cells that are named and connects this terminal with it; /dev/kvm is there, and "
        "python3 finds the harness. `exit` or Ctrl-] ends the machine, and with it everything inside.",
        ("kvm-harness lab shell --config svm-emul --debian 6.12",),
        {
            0: "the shell was ended", 2: "bad input, or no terminal",
            4: "lost: the machine died, or what it needs could not be had", 130: "interrupted before it was there",
        },
    ),
    "lab peers": Page(
        "Upstream's KVM selftests and kvm-unit-tests on the kernel under test: one table.",
        "DIR gets the table as peers.txt and peers.json, and the consoles. Failures that are expected, with reasons, "
        "stand in ci/qemu/peers.toml.",
        (
            "kvm-harness lab peers --debian 7.3 --build-selftests",
            "kvm-harness lab peers --tree ~/linux --unit-tests ~/kvm-unit-tests -k svm",
        ),
        {
            0: "all pass, skip, or fail as expected", 1: "a splat, or a failure that is not expected",
            2: "bad input, or nothing to run", 4: "lost: the machinery failed, or the disk is full", **_END,
        },
    ),
}  # fmt: skip
