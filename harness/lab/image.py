"""What a kernel under test runs: the root image, and the payload that it starts. Both are squashfs files, read-only.

The root image (/dev/vda) is extracted from packages of one Debian suite, by the recipe in ``ci/qemu/image/``: Python
and a few tools for people. Nothing of the harness is in it but its init, so it is made once. The payload (/dev/vdb, on
/payload) holds what a boot is for; the init runs its ``start``.

Neither is compressed: in a guest without hardware virtualization, unpacking costs more than reading.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

from harness.lab import cache, debian
from harness.lab.cache import Progress, cached, digest
from harness.lab.errors import LabError, LabInputError
from harness.words import counted

SUITE: Final = "bookworm"
PYTHON: Final = "cpython-311"
"""Cache tag of the image's Python, which loads byte code of this tag at once if its header says ``unchecked-hash``."""
RECIPE: Final = Path(__file__).resolve().parents[2] / "ci" / "qemu" / "image"

_VERSION: Final = "4"  # part of every key: raise it when this module makes something else of the same parts
# Uncompressed, but the header names a compressor, which the kernel must have: ours and Debian's have zstd.
_SQUASHFS: Final = (
    "-comp", "zstd", "-noI", "-noD", "-noF", "-noX", "-no-xattrs",
    "-all-root", "-no-progress", "-quiet",
)  # fmt: skip
_MERGED_USR: Final = 'for d in bin sbin lib lib64; do mkdir -p "$1/usr/$d"; ln -s "usr/$d" "$1/$d"; done'
# One user is enough, its files are root's outside: no newuidmap, no ranges in /etc/subuid.
_AS_ROOT: Final = ("unshare", "--user", "--map-root-user", "--mount", "--pid", "--fork", "--")
_VERSIONS: Final = "/usr/share/kvm-harness/packages"
_INIT: Final = "/usr/sbin/kvm-harness-init"
_START: Final = "start"
_HINTS: Final = {
    "No space left|Disk quota": "make room (also in TMPDIR), or set KVM_HARNESS_CACHE elsewhere",
    "Failed to fetch|apt-get update": "check the network and apt's proxy settings, or set KVM_HARNESS_CACHE to a cache"
    " that was filled before",
}  # what a tool said, and what to do next


@dataclass(frozen=True)
class Image:
    """A root image: a squashfs file, and the digest of all that it was made from."""

    root: Path
    digest: str


def base_image(progress: Progress = cache.quiet) -> Image:
    """The root image, made by mmdebstrap if the cache does not have it (a minute, and the network, once).

    As root, or in a user namespace of the caller's own. Raises LabError, with what the failing tool said.
    """
    parts = [RECIPE / name for name in ("packages", "finish", "init")]
    try:
        key = digest(SUITE, _VERSION, *parts)
    except OSError as error:
        raise LabError(f"{error.filename}: {error.strerror}: the image's recipe is not where it was") from error

    def make(folder: Path) -> None:
        progress(f"making the root image from Debian's {SUITE} (about a minute, once)")
        archive = folder / "root.tar"
        _bootstrap(archive, folder)
        with open(archive, "rb") as file:
            _run(["sqfstar", *_SQUASHFS, str(folder / "root.sqsh")], stdin=file.fileno())
        archive.unlink()

    return Image(cached("image", key, make) / "root.sqsh", key)


def payload(files: Mapping[str, Path | bytes], progress: Progress = cache.quiet) -> Path:
    """A squashfs file with these files (relative path: a file to copy, or its content), found again by content.

    ``start`` must be among them; it, and files to copy that are executable, are executable inside. Raises
    LabInputError for a path that leaves the payload or a file that cannot be read, LabError when no squashfs came out.
    """
    if _START not in files:
        raise LabInputError(f"a payload needs a file {_START!r}: the program that the image runs")
    contents: dict[PurePosixPath, tuple[bytes, bool]] = {}
    for name, source in files.items():
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or path == PurePosixPath("."):
            raise LabInputError(f"{name!r}: a file of a payload is named by a path relative to it")
        try:
            data = source if isinstance(source, bytes) else source.read_bytes()
            executable = name == _START or (isinstance(source, Path) and os.access(source, os.X_OK))
        except OSError as error:
            raise LabInputError(f"{error.filename}: {error.strerror}: cannot become a file of the payload") from error
        contents[path] = (data, executable)
    key = digest(_VERSION, *(p for path, (data, x) in sorted(contents.items()) for p in (str(path), data, str(x))))

    def make(folder: Path) -> None:
        progress(f"packing a payload of {counted(len(contents), 'file')}")
        tree = folder / "tree"
        for path, (data, executable) in contents.items():
            target = tree / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
            target.chmod(0o755 if executable else 0o644)
        _run(["mksquashfs", str(tree), str(folder / "payload.sqsh"), *_SQUASHFS])
        shutil.rmtree(tree)

    return cached("payload", key, make) / "payload.sqsh"


def _bootstrap(archive: Path, folder: Path) -> None:
    """A tar file of the root file system. mmdebstrap has apt check the signatures."""
    packages = [line.strip() for line in (RECIPE / "packages").read_text().splitlines()]
    included = ",".join(line for line in packages if line and not line.startswith("#"))
    keyring = [f"--keyring={debian.KEYRING}"] if debian.KEYRING.is_file() else []
    try:
        mirror = debian.mirror(SUITE)
    except debian.FetchError as error:
        raise LabError(str(error)) from error
    _run([
        *([] if os.geteuid() == 0 else _AS_ROOT),
        "mmdebstrap", "--mode=root", "--variant=extract", "--format=tar", "--skip=output/mknod", *keyring,
        f"--architectures={debian.ARCHITECTURE}", f"--include={included}",
        "--aptopt=APT::Install-Recommends false", "--aptopt=Acquire::Retries 3",
        f"--setup-hook={_MERGED_USR}",
        f"--extract-hook={(RECIPE / 'finish').read_text()}",
        f"--extract-hook=upload {RECIPE / 'init'} {_INIT}",
        f'--extract-hook=chmod 755 "$1"{_INIT}',
        f"--extract-hook=download {_VERSIONS} {folder / 'packages'}",
        SUITE, str(archive), mirror,
    ])  # fmt: skip


def _run(command: Sequence[str], stdin: int = subprocess.DEVNULL) -> None:
    # Any date will do that is always the same: then so is the file.
    env = {**os.environ, "LC_ALL": "C", "SOURCE_DATE_EPOCH": "0"}
    try:
        done = subprocess.run(
            command, stdin=stdin, capture_output=True, text=True, errors="replace", check=False, env=env
        )
    except FileNotFoundError as error:
        raise _missing(command[0]) from error
    if done.returncode == 0:
        return
    said = (done.stderr + done.stdout).strip()
    if re.search(r"^unshare: (?!failed to execute)", said, re.MULTILINE):
        raise LabError(f"making the root image takes root, or user namespaces, and this user has none: {said}")
    if "unshare: failed to execute" in said:
        raise _missing("mmdebstrap")
    lines = "\n  ".join(said.splitlines()[-12:])
    hint = next((f": {hint}" for words, hint in _HINTS.items() if re.search(words, said)), "")
    raise LabError(f"{command[0]} failed with status {done.returncode}{hint}\n  {lines}")


def _missing(tool: str) -> LabError:
    package = {"mmdebstrap": "mmdebstrap", "unshare": "util-linux"}.get(tool, "squashfs-tools")
    return LabError(f"{tool} is not on this machine: install Debian's package {package}")
