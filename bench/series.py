"""What a series costs: twenty patches, half of them pure renames, one configuration.

``make bench-series``, or ``python bench/series.py [--out DIR] [-- OPTIONS OF kvm-harness series]``. Prints the total,
how much of it is compiling, and what the cells and everything else take beside. The first time it also makes BASE: a
kernel from scratch. Exit status 1 when a target is missed: 30 s beside the build for a patch that changes one file; no
boot where the code is identical.
"""

from __future__ import annotations

import argparse
import json
import re
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Final

DEMO: Final = runpy.run_path(str(Path(__file__).parents[1] / "ci" / "qemu" / "demo_series.py"))
RENAMES: Final = (
    ("regs", "__get_regs"), ("regs", "__set_regs"), ("regs", "kvm_is_valid_cr0"), ("msrs", "kvm_on_user_return"),
    ("msrs", "kvm_probe_user_return_msr"), ("cpuid", "kvm_check_cpuid"), ("irq", "pending_userspace_extint"),
    ("irq", "get_userspace_extint"), ("lapic", "kvm_lapic_msr_read"), ("emulate", "stack_size"),
)  # fmt: skip
EMULATE: Final = "arch/x86/kvm/emulate.c"
FLAG: Final = " | PageTable"  # of rows of the opcode table: what it changes, only a guest with shadow paging can see
BESIDE: Final = 30.0  # seconds


def make_series(tree: Path) -> str:
    """Twenty commits on BASE: a rename, a flag less, a rename, ... The last one's id."""
    git, commit = DEMO["git"], DEMO["commit"]
    tip = "base"
    for number, (name, function) in enumerate(RENAMES, 1):
        file = f"arch/x86/kvm/{name}.c"
        text = re.sub(rf"\b{function}\b", f"{function}_renamed", git(tree, "show", f"{tip}:{file}"))
        tip = commit(tree, tip, f"KVM: x86: Rename {function}()\n\nNo functional change intended.\n", {file: text})
        text = git(tree, "show", f"{tip}:{EMULATE}").replace(FLAG, "", 1)
        tip = commit(tree, tip, f"KVM: x86: Row {number} of the opcode table writes no page table\n", {EMULATE: text})
    return str(tip)


def main() -> int:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for the results (default: a temporary one)")
    parser.add_argument("options", nargs="*", help="for kvm-harness series, after --")
    args = parser.parse_args()
    tree = DEMO["make_tree"]()
    out = args.out or Path(tempfile.mkdtemp(prefix="bench-series-"))
    words = ["series", f"base..{make_series(tree)}", "--tree", tree, "--config", "svm", "--out", out, *args.options]
    command = [sys.executable, "-m", "harness", *words]
    if status := subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode:
        print(f"the series ended with status {status}: see {out}")
        return status
    report = json.loads((out / "report.json").read_text())
    same = [p for p in report["patches"] if p["behaviour"] == "same code"]
    other = [p for p in report["patches"] if p["behaviour"] != "same code"]
    beside = [p["seconds"] - sum(b["seconds"] for b in p["builds"]) for p in other]
    booted = [p["number"] for p in same if any(c["tier"] for c in p["cells"])]
    print(f"{len(report['patches'])} patches: {report['seconds']:.0f} s, {report['compiling']:.0f} s of it compiling")
    for name, patches in (("identical code", same), ("one file changed", other)):
        times = [p["seconds"] for p in patches]
        print(f"  {name}: {len(patches)} patches, {median(times):.0f} s each (at most {max(times):.0f} s)")
    print(f"  beside the build: {median(beside):.0f} s (at most {max(beside):.0f} s; target {BESIDE:.0f} s)")
    print(f"  booted for identical code: {booted or 'none'}")
    return 1 if max(beside) > BESIDE or booted or len(same) != len(RENAMES) else 0


if __name__ == "__main__":
    sys.exit(main())
