"""Where a kernel's register map is read: the running kernel's BTF, or a file with BTF or DWARF in it."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Protocol

from elftools.common.exceptions import DWARFError, ELFError
from elftools.elf.elffile import ELFFile

from harness.lab.bzimage import vmlinux_of
from harness.lab.errors import LabInputError, unreadable
from harness.lab.initramfs import modinfo, read_module
from harness.series.btf import Btf, BtfError, Member
from harness.series.dwarf import Dwarf
from harness.series.layout import Layout

RUNNING: Final = Path("/sys/kernel/btf")
_BTF_MAGIC: Final = b"\x9f\xeb"
_ENUM, _STRUCT = "kvm_reg", "kvm_vcpu_arch"
_ADVICE: Final = (
    "give a vmlinux or kvm.ko with BTF (CONFIG_DEBUG_INFO_BTF, CONFIG_DEBUG_INFO_BTF_MODULES), or anything of KVM "
    "that was compiled with debugging information (of distributions' kernels that is in a package of its own, -dbg)"
)


class LayoutError(LabInputError):
    """There is no register map to be read; the text says what to give instead."""


class Types(Protocol):
    """Something that knows types by name."""

    def enumeration(self, name: str) -> dict[str, int] | None:
        """The enumerators of an enumeration; None when it is not there."""

    def structure(self, name: str) -> dict[str, Member] | None:
        """The members of a structure; None when it is not there."""


def running_layout() -> Layout:
    """That of the kernel this runs on: from vmlinux's BTF, or else from that of KVM's modules. Raises LayoutError."""
    main = RUNNING / "vmlinux"
    try:
        base = _btf(main.read_bytes(), main)
    except FileNotFoundError:
        raise LayoutError(f"this kernel shows no BTF ({main} is not there): {_ADVICE}") from None
    except OSError as error:
        raise LayoutError(f"{unreadable(main, error)}; or {_ADVICE}") from error
    modules = sorted(RUNNING.glob("kvm*"))
    for path in (main, *modules):
        types = base if path == main else _btf(read_module(path), path, base)
        if found := _layout(types, f"{path}, Linux {os.uname().release}"):
            return found
    names = ", ".join(path.name for path in modules)
    others = f"nor those of {names}" if modules else "and no module of KVM is loaded"
    raise LayoutError(f"the running kernel's types ({main}) have no enum {_ENUM}, {others}: load KVM, or {_ADVICE}")


def file_layout(path: Path, base: Path | None = None) -> Layout:
    """That of a vmlinux, a bzImage, a module, an object or a file of BTF.

    A module's BTF goes on where its kernel's ends: that is ``base``, or the running kernel's if the module is its own.
    Raises LayoutError when there is none, LabInputError for files that cannot be read.
    """
    for types, how in _sources(path, base):
        if found := _layout(types, f"{path}, {how}"):
            return found
    raise LayoutError(f"{path} has no enum {_ENUM} and struct {_STRUCT} in BTF or DWARF: {_ADVICE}")


def _layout(types: Types, source: str) -> Layout | None:
    try:
        enumerators, members = types.enumeration(_ENUM), types.structure(_STRUCT)
    except (BtfError, DWARFError, ELFError) as error:
        raise LayoutError(f"{source}: {error}") from error
    if not enumerators or not members:
        return None
    found = Layout.of(source, enumerators, members)
    if not found.ids:
        raise LayoutError(f"{source}: enum {_ENUM} names no register")
    return found


def _sources(path: Path, base: Path | None) -> Iterator[tuple[Types, str]]:
    data = read_module(path)
    if not data:
        raise LayoutError(f"{path} is empty: {_ADVICE}")
    if data[0x202:0x206] == b"HdrS":
        data = vmlinux_of(path)
    if data.startswith(_BTF_MAGIC):
        split = base or (RUNNING / "vmlinux" if path.parent == RUNNING and path.name != "vmlinux" else None)
        yield _btf(data, path, _base(split) if split else None), "BTF"
        return
    try:
        elf = ELFFile(io.BytesIO(data))
        blob, dwarf = elf.get_section_by_name(".BTF"), elf.has_dwarf_info(strict=True)
        module = elf.get_section_by_name(".gnu.linkonce.this_module") is not None
    except ELFError as error:
        raise LayoutError(f"{path} is no kernel, module or object ({error}): {_ADVICE}") from error
    if blob is None and not dwarf:
        raise LayoutError(f"{path} has neither BTF nor DWARF: {_ADVICE}")
    if dwarf:
        yield Dwarf(elf), "DWARF"
    if blob is not None:
        release = _release(path, data) if module else ""
        own = base or (_kernel_of(path, release) if module else None)
        yield _btf(blob.data(), path, _base(own, release) if own else None), f"BTF{f' on top of {own}' if own else ''}"


def _release(path: Path, data: bytes) -> str:
    """The kernel that a module is for."""
    return next((value.split()[0] for name, value in modinfo(data, path) if name == "vermagic"), "")


def _kernel_of(path: Path, release: str) -> Path:
    """What a module's BTF goes on from: a kernel installed with it, or the running one."""
    if release == os.uname().release:
        return RUNNING / "vmlinux"
    for folder in path.absolute().parents:
        for name in (f"boot/vmlinuz-{release}", "vmlinuz", "build/vmlinux", "vmlinux"):
            if release in (name.partition("-")[2], folder.name) and (folder / name).is_file():
                return folder / name
    raise LayoutError(f"{path} is of {release}, and its BTF goes on where that kernel's ends: give --base VMLINUX")


def _base(path: Path, release: str = "") -> Btf:
    """A kernel's BTF, for a module of ``release``: another kernel's would give wrong answers, not errors."""
    data = read_module(path)
    if data[0x202:0x206] == b"HdrS":
        data = vmlinux_of(path)
    if not data.startswith(_BTF_MAGIC):
        try:
            section = ELFFile(io.BytesIO(data)).get_section_by_name(".BTF")
        except ELFError as error:
            raise LayoutError(f"{path} is no kernel ({error}): give the one that the module was built with") from error
        if section is None:
            raise LayoutError(f"{path} has no BTF: give the kernel that the module was built with")
        banner = re.search(rb"Linux version (\S+) ", data)
        if release and banner and banner[1].decode(errors="replace") != release:
            theirs = banner[1].decode(errors="replace")
            raise LayoutError(f"{path} is Linux {theirs}, but the module is of {release}: give that kernel")
        data = section.data()
    return _btf(data, path)


def _btf(data: bytes, path: Path, base: Btf | None = None) -> Btf:
    try:
        return Btf(data, base)
    except BtfError as error:
        raise LayoutError(f"{path}: {error}") from error
