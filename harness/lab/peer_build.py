"""KVM's selftests built from a kernel tree, into the cache: statically, for an image with other libraries than ours."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Final

from harness.lab.cache import Progress, cached, digest, digest_tree, quiet
from harness.lab.errors import LabError, LabInputError
from harness.lab.kbuild import toolchain
from harness.lab.ksource import release_of

_SOURCES: Final = "tools/testing/selftests/kvm"
_NEEDED: Final = (_SOURCES, "tools/testing/selftests/cgroup", "tools/testing/selftests/rseq", "tools/include")
_LDFLAGS: Final = "-static -pthread -no-pie -s"
_VERSION: Final = "1"


def built_selftests(tree: Path, progress: Progress = quiet) -> Path:
    """The folder of the programs that a kernel tree's KVM selftests are built to, found again by content.

    The tree is only read. Raises LabInputError for what is no kernel tree, or does not build; LabError.
    """
    release, _ = release_of(tree)
    sources = tree / _SOURCES
    if not (sources / "Makefile").is_file():
        raise LabInputError(f"{tree} has no {_SOURCES}: give a whole kernel tree")
    files = (p for name in _NEEDED for p in (tree / name).rglob("*") if p.is_file() and p.suffix in (".c", ".h", ".S"))
    key = digest(_VERSION, release, toolchain(), _LDFLAGS, digest_tree(tree, files))

    def make(folder: Path) -> None:
        progress(f"building the KVM selftests of Linux {release} (about two minutes, once)")
        _build(tree, folder)

    return cached("selftests", key, make) / "kvm"


def _build(tree: Path, folder: Path) -> None:
    objects, out = folder / "obj", folder / "kvm"
    headers = objects / "usr" / "include"
    out.mkdir()
    jobs = f"-j{len(os.sched_getaffinity(0))}"
    _make(tree, f"O={objects}", "ARCH=x86", jobs, "headers")
    _make(
        tree / _SOURCES, f"OUTPUT={out}", "ARCH=x86", f"KHDR_INCLUDES=-isystem {headers}", f"LINUX_HDR_PATH={headers}/",
        f"LDFLAGS={_LDFLAGS}", jobs, "--keep-going", "all",
    )  # fmt: skip
    shutil.rmtree(objects)
    for path in out.rglob("*"):
        if path.is_file() and path.suffix in (".o", ".d"):
            path.unlink()


def _make(folder: Path, *words: str) -> None:
    done = subprocess.run(
        ["make", "-s", "-C", str(folder), *words],
        env={k: v for k, v in os.environ.items() if not k.startswith(("KBUILD_", "MAKE"))} | {"LC_ALL": "C"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if "error" in line.lower() or "***" in line]
        text = "\n  ".join((said or done.stderr.splitlines())[:8])
        if "No space left" in done.stderr:
            raise LabError(f"{folder}: no space left: make room, or set KVM_HARNESS_CACHE elsewhere")
        raise LabInputError(f"{folder} does not build:\n  {text}")
