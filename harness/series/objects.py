"""The objects that a kernel was linked from, found in its build directory as kbuild recorded them.

``vmlinux.a`` lists what is in vmlinux (since Linux 6.1), ``modules.order`` and each module's ``.mod`` what is in
modules, the recorded link commands of arch/x86/boot what is in the boot code before them.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

from harness.lab.errors import LabInputError

_BOOT: Final = ("arch/x86/boot/compressed/.vmlinux.cmd", "arch/x86/boot/.setup.elf.cmd")
_LINKING: Final = (
    "arch/x86/kernel/vmlinux.lds",
    "arch/x86/boot/compressed/vmlinux.lds",
    "scripts/module.lds",
    ".vmlinux.cmd",
    ".vmlinux.unstripped.cmd",
)
"""How the objects are put together: scripts without their comments, commands with their flags."""
_OFFSETS: Final = re.compile(r"\b[vz]offset\.h\b")  # headers made of the linked kernel's addresses and sizes
_DERIVED: Final = ("piggy.o", ".mod.o")


class BuiltObject(NamedTuple):
    """``name`` is the path in the build directory. ``as_it_is``: compare the file (and ``sources``), not its items."""

    name: str
    path: Path
    as_it_is: bool = False
    sources: tuple[Path, ...] = ()


def built_objects(build: Path) -> list[BuiltObject]:
    """What counts of a finished build, each once. Raises LabInputError when there is none."""
    if not (build / "vmlinux.a").is_file():
        raise LabInputError(f"{build} holds no finished build of a kernel (no vmlinux.a, which Linux has since 6.1)")
    found: dict[str, BuiltObject] = {}
    for name in (*_vmlinux(build), *_modules(build)):
        if not name.endswith(_DERIVED):
            found.setdefault(name, BuiltObject(name, build / name))
    for name in _boot(build):
        if name not in found and not name.endswith(_DERIVED):
            found[name] = _boot_object(build, name)
    for name in _LINKING:
        if (build / name).is_file():
            found[name] = BuiltObject(name, build / name, as_it_is=True)
    return list(found.values())


def archive_members(archive: Path) -> list[Path]:
    """The objects of an archive that holds only their names, as kbuild's do; archives in it included.

    Raises LabInputError when the archive is damaged or of another kind.
    """
    done = subprocess.run(["ar", "t", archive], capture_output=True, text=True, check=False)
    members = [Path(line) for line in done.stdout.splitlines()]
    if done.returncode or not all(path.is_absolute() for path in members):
        reason = done.stderr.strip() or "it holds more than names"
        raise LabInputError(f"{archive} is no archive of kbuild ({reason}): build again")
    return members


def _vmlinux(build: Path) -> Iterator[str]:
    archives = ["vmlinux.a"]
    command = build / ".vmlinux.o.cmd"
    if command.is_file():  # trees that link libraries beside it name them there
        archives += [word for word in command.read_text().split() if word.endswith(".a") and word != "vmlinux.a"]
    for archive in archives:
        for path in archive_members(build / archive):
            yield _relative(build, path)
    for name in (".vmlinux.export.o", "init/version-timestamp.o"):
        if (build / name).is_file():
            yield name


def _modules(build: Path) -> Iterator[str]:
    """A module's ``.mod`` names its objects, one a line (before 6.2: in one line)."""
    order = build / "modules.order"
    for line in order.read_text().split() if order.is_file() else []:
        listed = (build / line).with_suffix(".mod")
        for word in listed.read_text().split() if listed.is_file() else []:
            yield _relative(build, build / word)


def _boot(build: Path) -> Iterator[str]:
    for name in _BOOT:
        command = build / name
        for word in command.read_text().split() if command.is_file() else []:
            if word.endswith(".o"):
                yield _relative(build, build / word)
            elif word.endswith(".a"):
                yield from (_relative(build, path) for path in archive_members(build / word))


def _boot_object(build: Path, name: str) -> BuiltObject:
    path = build / name
    recorded = path.with_name(f".{path.name}.cmd")
    text = recorded.read_text() if recorded.is_file() else ""
    if not _OFFSETS.search(text):
        return BuiltObject(name, path, as_it_is=path.read_bytes()[4:5] == b"\1")  # 32-bit code of the setup
    words = {word for word in re.findall(r"[\w./+-]+\.[chS]\b", text) if not _OFFSETS.search(word)}
    sources = {build / word for word in words if "arch/x86/boot/" in word or word.endswith(".c")}
    there = tuple(sorted(source for source in sources if source.is_file()))
    return BuiltObject(name, there[0], True, there[1:]) if there else BuiltObject(name, path, True)


def _relative(build: Path, path: Path) -> str:
    return str(path.relative_to(build)) if path.is_relative_to(build) else str(path)
