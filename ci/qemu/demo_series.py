#!/usr/bin/env python3
"""A series whose verdicts are known beforehand, put through `kvm-harness series`; part of the nightly run.

Out of Debian's source of Linux 7.3 it makes a scratch git repository (in the cache) with six patches: a rename, a
comment, a refactoring that changes code and nothing else, one flag of the emulator's opcode table, a register bug, its
fix. Exit status: 0 when each patch got just the verdict that it must get, 1 otherwise.

    .venv/bin/python ci/qemu/demo_series.py [--out DIR] [-- OPTIONS OF kvm-harness series]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.lab.cache import cached, digest, locked
from harness.lab.ksource import debian_source

KERNEL = "7.3"
REGS, EMULATE, X86, SVM = (f"arch/x86/kvm/{name}.c" for name in ("regs", "emulate", "x86", "svm/svm"))
IDENTITY = {
    f"GIT_{who}_{what}": value
    for who in ("AUTHOR", "COMMITTER")
    for what, value in (("NAME", "Demo"), ("EMAIL", "demo@example.org"), ("DATE", "2026-01-01T00:00:00Z"))
} | {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}


@dataclass(frozen=True)
class Patch:
    """A patch as replacements of text in a file, and what its verdict must be.

    ``identical``: no code changed. ``symbols``: functions and tables that must be listed as changed; ``renamed``: names
    that must be listed as renamed. ``fails``: the cell in which it must fail, and a word of the Case.
    """

    message: str
    file: str
    changes: tuple[tuple[str, str], ...]
    outcome: str
    behaviour: tuple[str, ...]
    identical: bool = False
    symbols: tuple[str, ...] = ()
    renamed: tuple[str, ...] = ()
    fails: tuple[str, str] | None = None


TAIL_OF_REGS = """\
#endif

	regs->rip = kvm_rip_read(vcpu);
	regs->rflags = kvm_get_rflags(vcpu);
}
"""
XCHG = "	I2bv(DstMem | SrcReg | ModRM | Lock{} , em_xchg),".replace(" ,", ",")
LATER = """\
	/* Write back the memory destination with implicit LOCK prefix. */
	ctxt->dst.val = ctxt->src.{}val;
"""
PATCHES = (
    Patch(
        "KVM: x86: Rename __get_regs() to vcpu_to_regs()\n\nNo functional change intended.\n",
        REGS, (("__get_regs(", "vcpu_to_regs("),), "good", ("same code",), identical=True, renamed=("vcpu_to_regs",),
    ),
    Patch(
        "KVM: x86: Say what x86.c is about\n\nEvery WARN() below moves to another line.\n\nNo functional change.\n",
        X86, (("#include \"ioapic.h\"\n", "/*\n * Everything about a vCPU that is neither its registers nor its\n"
               " * MMU nor its emulator.\n */\n#include \"ioapic.h\"\n"),),
        "good", ("same code",), identical=True,
    ),
    Patch(
        "KVM: x86: Read RIP and RFLAGS before the general-purpose registers\n\nNo functional change intended.\n",
        REGS, (("	regs->rax = kvm_rax_read_raw(vcpu);\n",
                "	regs->rip = kvm_rip_read(vcpu);\n	regs->rflags = kvm_get_rflags(vcpu);\n"
                "	regs->rax = kvm_rax_read_raw(vcpu);\n"),
               (TAIL_OF_REGS, "#endif\n}\n")),
        "good", ("same",), symbols=("vcpu_to_regs",),
    ),
    Patch(
        "KVM: x86: XCHG writes no page table\n\nGuests update page tables by other instructions.\n",
        EMULATE, ((XCHG.format(" | PageTable"), XCHG.format("")),), "good", ("same",), symbols=("opcode_table",),
    ),
    Patch(
        "KVM: x86: Do without the detour over orig_val in em_xchg()\n\nNo functional change intended.\n",
        EMULATE, ((LATER.format("orig_"), LATER.format("")),), "bad", ("worse",), symbols=("em_xchg",),
        fails=("svm-emul", "xchg"),
    ),
    Patch(
        "KVM: x86: em_xchg() needs the source's original value\n\nThe source's value is the destination's by then.\n",
        EMULATE, ((LATER.format(""), LATER.format("orig_")),), "good", ("mended",), symbols=("em_xchg",),
    ),
)  # fmt: skip


EXTRA: Mapping[str, Patch] = {
    "fault-compile": Patch(
        "KVM: x86: A patch that does not compile\n",
        EMULATE, ((LATER.format("orig_"), LATER.format("first_")),), "does not build", ("-",),
    ),
    "fault-panic": Patch(
        "KVM: x86: A kernel that panics at boot\n",
        X86, (("	kvm_mmu_x86_module_init();\n	mitigate", '	panic("KVM is not in the mood");\n	mitigate'),),
        "bad", ("worse",),
    ),
    "fault-kvm": Patch(
        "KVM: SVM: A kernel without KVM\n",
        SVM, (("	if (!kvm_is_svm_supported())\n		return", "	if (kvm_is_svm_supported())\n		return"),),
        "bad", ("worse",),
    ),
    "fault-warn": Patch(
        "KVM: x86: Warn of every XCHG with memory\n", EMULATE,
        ((LATER.format("orig_"), f"	WARN_ON_ONCE(ctxt->dst.type == OP_MEM);\n{LATER.format('orig_')}"),),
        "bad", ("worse",),
    ),
    "untrue": Patch(
        "KVM: x86: Tidy up em_imul_3op()\n\nNo functional change intended.\n", EMULATE,
        (("	ctxt->dst.val = ctxt->src2.val;\n	return em_imul(ctxt);\n",
          "	int rc;\n\n	ctxt->dst.val = ctxt->src2.val;\n	rc = em_imul(ctxt);\n"
          "	ctxt->eflags ^= X86_EFLAGS_AF;\n	return rc;\n"),), "not what it says", ("changed",),
    ),
}  # fmt: skip
"""Branches of one patch on BASE, for tests: what may go wrong, and behaviour that is allowed but not the same."""


def make_tree() -> Path:
    """The repository, in the cache: the tag ``base``, the branches ``demo`` and those of EXTRA."""
    source = debian_source(KERNEL, print)

    def make(folder: Path) -> None:
        tree = folder / "linux"
        print(f"copying {source.name} and making a git repository of it (a minute or two, once)", flush=True)
        subprocess.run(["cp", "-a", "--reflink=auto", source, tree], check=True)
        git(tree, "init", "--quiet", "--initial-branch=main", ".")
        git(tree, "config", "core.looseCompression", "1")
        git(tree, "add", "--all", "--force")
        git(tree, "commit", "--quiet", "--message", f"Linux {KERNEL}, as in Debian")
        git(tree, "tag", "base")

    tree = cached("demo", digest(KERNEL, source.parent.name), make) / "linux"
    with locked(tree.parent / "lock"):
        branch(tree, "demo", PATCHES)
        for name, patch in EXTRA.items():
            branch(tree, name, [patch])
    return tree


def branch(tree: Path, name: str, patches: Sequence[Patch]) -> None:
    """Make a branch of these patches on BASE, whatever is checked out."""
    tip = "base"
    for patch in patches:
        text = git(tree, "show", f"{tip}:{patch.file}")
        for old, new in patch.changes:
            if old not in text:
                raise SystemExit(f"{patch.file} has no longer what the demonstration changes:\n{old}")
            text = text.replace(old, new)
        tip = commit(tree, tip, patch.message, {patch.file: text})
    git(tree, "update-ref", f"refs/heads/{name}", tip)


def commit(tree: Path, parent: str, message: str, files: Mapping[str, str]) -> str:
    """A commit on ``parent`` that makes files these texts, without a look at what is checked out."""
    index = {"GIT_INDEX_FILE": str(tree.parent / "index")}
    git(tree, "read-tree", parent, more=index)
    for name, text in files.items():
        blob = git(tree, "hash-object", "-w", "--stdin", text=text).strip()
        git(tree, "update-index", "--cacheinfo", f"100644,{blob},{name}", more=index)
    content = git(tree, "write-tree", more=index).strip()
    return git(tree, "commit-tree", content, "-p", parent, text=message).strip()


def git(tree: Path, *words: str, text: str = "", more: Mapping[str, str] | None = None) -> str:
    """Run git in the repository, as nobody in particular: commits come out the same everywhere."""
    environment = os.environ | IDENTITY | (more or {})
    done = subprocess.run(
        ["git", "-C", tree, *words], check=True, env=environment, input=text, stdout=subprocess.PIPE, text=True
    )
    return done.stdout


def wrong(report: Mapping[str, Any], status: int) -> Iterator[str]:
    """Every respect in which the verdicts are not what they must be."""
    if status != 1:
        yield f"exit status {status}, not 1"
    if len(report["patches"]) != len(PATCHES):
        yield f"{len(report['patches'])} patches judged, not {len(PATCHES)}"
        return
    bad = next(n for n, p in enumerate(PATCHES) if p.outcome == "bad")
    if report["first bad"] != report["patches"][bad]["commit"]:
        yield f"the first bad patch is {report['first bad']}"
    for found, patch in zip(report["patches"], PATCHES, strict=True):
        for text in _wrong_patch(found, patch):
            yield f"patch {found['number']} ({found['subject']}): {text}"


def _wrong_patch(found: Mapping[str, Any], patch: Patch) -> Iterator[str]:
    if found["outcome"] != patch.outcome:
        yield f"judged {found['outcome']}, not {patch.outcome}"
    if not any(word in found["behaviour"] for word in patch.behaviour):
        yield f"behaviour {found['behaviour']!r}, not {' or '.join(patch.behaviour)}"
    code = found["builds"][0]["code"]
    if code["identical"] is not patch.identical:
        yield f"code {'identical' if code['identical'] else 'not identical'}"
    ran = [cell["cell"] for cell in found["cells"] if cell["tier"]]
    if patch.identical == bool(ran):
        yield f"ran in {', '.join(ran) or 'no cell'}"
    listed = {*code["functions"], *code["tables"], *code["added"]}
    if lacking := set(patch.symbols) - listed:
        yield f"{', '.join(lacking)} not listed as changed (but {', '.join(sorted(listed))})"
    if lacking := set(patch.renamed) - set(code["renamed"].values()):
        yield f"{', '.join(lacking)} not listed as renamed"
    if missed := set(patch.symbols) - set(code["tables"]) - set(found["reached"]["executed"]):
        yield f"{', '.join(missed)} not executed"
    failing = {c["cell"]: [x["after"] for x in c["changes"] if x["after"]["verdict"] == "mismatch"]
               for c in found["cells"]}  # fmt: skip
    if patch.fails is None:
        if any(failing.values()):
            yield f"mismatches: {failing}"
        return
    cell, word = patch.fails
    if not any(word in record["case"] for record in failing.get(cell, ())):
        yield f"no Case with {word!r} fails in {cell}"
    folder = next(Path(c["folder"]) for c in found["cells"] if c["cell"] == cell)
    if not list((folder / "cases").glob("*.c")):
        yield "no C reproducer"


def main(argv: Sequence[str]) -> int:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/demo-series"), metavar="DIR")
    parser.add_argument("options", nargs="*", help="for kvm-harness series, after --")
    args = parser.parse_args(argv)
    tree = make_tree()
    words = ["series", "base..demo", "--tree", tree, "--out", args.out, *args.options]
    command = [sys.executable, "-m", "harness", *words]
    status = subprocess.run(command, check=False).returncode
    try:
        report = json.loads((args.out / "report.json").read_text())
    except OSError as error:
        print(f"demonstration: no report: {error}")
        return 1
    problems = list(wrong(report, status))
    for text in problems:
        print(f"demonstration: {text}")
    print(f"demonstration: {'wrong' if problems else 'each patch got the verdict that it must get'}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
