"""Guests: assemble a ``guests/*.S``, load the ELF image, know its symbols and lines.

``as`` and ``ld`` come from binutils; the result is cached by the hash of everything that went into it.
"""

from __future__ import annotations

import bisect
import hashlib
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Final

from elftools.common.exceptions import ELFError
from elftools.elf.elffile import ELFFile
from elftools.elf.sections import SymbolTableSection

from harness.cachedir import cache_directory
from harness.case import Blob, CaseError, Memory, VmShape

GUESTS_DIR: Final = Path(__file__).resolve().parent.parent / "guests"
LINKER_SCRIPT: Final = GUESTS_DIR / "guest.ld"
ENTRY_PREFIX: Final = "t_"
_MACHINES: Final = ("EM_386", "EM_X86_64")


class GuestError(Exception):
    """A guest cannot be assembled or loaded; the text says why and what to do."""


@dataclass(frozen=True)
class Guest:
    """A loaded guest: its bytes, and every symbol with its linear address."""

    path: Path
    blobs: tuple[Blob, ...]
    symbols: Mapping[str, int]
    global_names: frozenset[str]

    @cached_property
    def entries(self) -> dict[str, int]:
        """Global symbols that start with ``t_``, without that prefix, in address order."""
        found = [(n, a) for n, a in self.symbols.items() if n.startswith(ENTRY_PREFIX) and n in self.global_names]
        return {name.removeprefix(ENTRY_PREFIX): address for name, address in sorted(found, key=lambda x: (x[1], x[0]))}

    def line(self, address: int) -> tuple[str, int] | None:
        """Source file and line of the code at ``address`` (DWARF), or None."""
        starts, rows = self._lines
        at = bisect.bisect_right(starts, address) - 1
        return rows[at] if at >= 0 else None

    @cached_property
    def _lines(self) -> tuple[list[int], list[tuple[str, int] | None]]:
        table: dict[int, tuple[str, int] | None] = {}
        with self.path.open("rb") as file:
            elf = ELFFile(file)
            if not elf.has_dwarf_info():
                return [], []
            dwarf = elf.get_dwarf_info()
            for unit in dwarf.iter_CUs():
                program = dwarf.line_program_for_CU(unit)
                if program is None:
                    continue
                first = 0 if program["version"] >= 5 else 1
                names = [entry.name.decode() for entry in program["file_entry"]]
                for row in program.get_entries():
                    if row.state is None:
                        continue
                    known = 0 <= row.state.file - first < len(names)
                    here = (names[row.state.file - first], row.state.line) if known else None
                    table[row.state.address] = None if row.state.end_sequence else here
        starts = sorted(table)
        return starts, [table[a] for a in starts]


# --- assembling -----------------------------------------------------------------------------------------------------


def assemble(source: Path, *, bits: int, defines: Mapping[str, int], forced: bool = False) -> Path:
    """Assemble ``source`` for 16, 32 or 64-bit code, link it at CODE_BASE, and give the path of the (cached) ELF.

    ``defines`` become ``--defsym``; BITS is always defined. With ``forced`` every instruction of ``source`` itself
    (not of what it includes) gets KVM's force-emulation prefix. GuestError: no assembler, no source, or what the
    assembler said.
    """
    if bits not in (16, 32, 64):
        raise GuestError(f"{source}: code size {bits}: use 16, 32 or 64")
    as_, ld = _tool("as"), _tool("ld")
    symbols = {**defines, "BITS": bits}
    try:
        key = _key(source, bits, {**symbols, "(forced)": int(forced)}, as_, ld)
    except OSError as error:
        raise GuestError(f"{error.filename or source}: {error.strerror}") from error
    cached = cache_directory() / "guests" / f"{source.stem}-{bits}-{key}.elf"
    if cached.exists():
        return cached
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cached.parent) as scratch:
            obj, elf = Path(scratch, "guest.o"), Path(scratch, "guest.elf")
            width = "--64" if bits == 64 else "--32"
            emulation = "elf_x86_64" if bits == 64 else "elf_i386"
            syms = [word for name, value in symbols.items() for word in ("--defsym", f"{name}={value}")]
            where = source.resolve().parent
            paths = ["-I", ".", "-I", str(GUESTS_DIR)]
            text = force_emulation(source.read_text(), source.name) if forced else None
            _run([as_, width, "-g", *paths, *syms, "-o", str(obj), "-" if forced else source.name], source, where, text)
            _run([ld, "-m", emulation, "-T", str(LINKER_SCRIPT), "-o", str(elf), str(obj)], source, where)
            elf.replace(cached)  # atomic: other processes see all of it or nothing
    except OSError as error:
        what = f"{error.filename or cached}: {error.strerror}"
        raise GuestError(f"{what} (the cache; KVM_HARNESS_CACHE moves it)") from error
    return cached


_PREFIX: Final = ".byte 0x0f,0x0b,0x6b,0x76,0x6d; "
_LABEL: Final = re.compile(r"^\s*[\w.\\()]+:")
_UNFORCED: Final = re.compile(r"^(?:\.|#|fin\b|[\w.$]+\s*=|$)")


def force_emulation(text: str, name: str) -> str:
    """Assembler source with KVM's force-emulation prefix before each instruction; line numbers stay.

    The prefix is UD2 and the letters kvm (kvm.force_emulation_prefix; arch/x86/kvm/x86.c, handle_ud()). Directives,
    labels, calls of macros other than ``raw`` and HLT through ``fin`` are left alone.
    """
    macros = set(re.findall(r"^\s*\.macro\s+(\w+)", text, re.MULTILINE)) | _COMMON_MACROS
    out = [f'# 1 "{name}"']
    for line in text.split("\n"):
        label = _LABEL.match(line)
        head, rest = (line[: label.end()] + " ", line[label.end() :]) if label else ("", line)
        word = rest.split(None, 1)[0] if rest.strip() else ""
        plain = _UNFORCED.match(rest.strip()) or word in macros
        out.append(line if plain else f"{head}{_PREFIX}{rest.strip()}")
    return "\n".join(out)


_COMMON_MACROS: Final = frozenset(
    re.findall(r"^\.macro\s+(\w+)", (GUESTS_DIR / "common.inc").read_text(), re.MULTILINE)
) - {"raw"}


def _tool(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        raise GuestError(f"no {name!r} on PATH: apt-get install binutils")
    return path


@lru_cache(maxsize=8)
def _version(tool: str) -> bytes:
    return subprocess.run([tool, "--version"], capture_output=True, check=False).stdout


def _key(source: Path, bits: int, symbols: Mapping[str, int], *tools: str) -> str:
    h = hashlib.sha256(repr((source.name, bits, sorted(symbols.items()))).encode())
    includes = sorted({*source.resolve().parent.glob("*.inc"), *GUESTS_DIR.glob("*.inc")})
    for path in (source, LINKER_SCRIPT, *includes):
        h.update(hashlib.sha256(path.read_bytes()).digest())
    for tool in tools:
        h.update(_version(tool))
    return h.hexdigest()[:20]


def _run(command: list[str], source: Path, where: Path, text: str | None = None) -> None:
    done = subprocess.run(
        command, input=text, stdin=None if text is not None else subprocess.DEVNULL, capture_output=True, text=True,
        errors="replace", cwd=where, check=False,
    )  # fmt: skip
    if done.returncode:
        raise GuestError(f"{source}: {Path(command[0]).name} failed:\n{done.stderr.strip() or done.stdout.strip()}")


# --- loading --------------------------------------------------------------------------------------------------------


def load(elf: Path, shape: VmShape | None = None) -> Guest:
    """Load an ELF image. GuestError when it is none, not x86, cut short, empty, or outside the memory of ``shape``."""
    try:
        with elf.open("rb") as file:
            guest = _parse(elf, file.read(4), ELFFile(file))
    except OSError as error:
        raise GuestError(f"{elf}: {error.strerror}") from error
    except GuestError:
        raise
    except Exception as error:  # pyelftools on damaged bytes: ELFError, but also KeyError, AttributeError and others
        if elf.read_bytes()[:4] != b"\x7fELF":
            raise GuestError(f"{elf}: not an ELF file") from error
        raise GuestError(f"{elf}: damaged or truncated ELF file ({error})") from error
    try:
        Memory(guest.blobs).check(shape or VmShape())
    except CaseError as error:
        raise GuestError(f"{elf}: {error}") from error
    return guest


def _parse(path: Path, magic: bytes, elf: ELFFile) -> Guest:
    if magic != b"\x7fELF":
        raise ELFError("magic")
    if elf["e_machine"] not in _MACHINES:
        raise GuestError(f"{path}: built for {elf['e_machine']}, not for x86 (EM_386 or EM_X86_64)")
    size = path.stat().st_size
    blobs = []
    for segment in elf.iter_segments("PT_LOAD"):
        if segment["p_offset"] + segment["p_filesz"] > size:
            end = segment["p_offset"] + segment["p_filesz"]
            raise GuestError(f"{path}: truncated: a segment ends at byte {end}, the file at {size}")
        if segment["p_memsz"]:
            blobs.append(Blob(segment["p_paddr"], segment.data().ljust(segment["p_memsz"], b"\0")))
    if not blobs:
        raise GuestError(f"{path}: no loadable segment (link it: ld -T {LINKER_SCRIPT.name})")
    symbols: dict[str, int] = {}
    names: set[str] = set()
    for name, value, is_global in _symbols(elf):
        symbols[name] = value
        if is_global:
            names.add(name)
    return Guest(path, tuple(blobs), symbols, frozenset(names))


def _symbols(elf: ELFFile) -> Iterator[tuple[str, int, bool]]:
    """Name, value, and whether it is global, of every symbol that stands for a place.

    pyelftools makes objects of each field of each symbol: for the guests of a suite that takes seconds.
    """
    table = elf.get_section_by_name(".symtab")
    if not isinstance(table, SymbolTableSection):
        return
    strings = table.stringtable.data()
    layout, name_at, info_at, index_at, value_at = _SYMBOL[elf.elfclass]
    for entry in layout.iter_unpack(table.data()):
        start, info, index = entry[name_at], entry[info_at], entry[index_at]
        if start and info & 0xF in _PLACES and index not in _NOWHERE:
            yield strings[start : strings.index(b"\0", start)].decode(), entry[value_at], info >> 4 == _GLOBAL


# ELF class -> the layout of Elf32_Sym or Elf64_Sym, and where st_name, st_info, st_shndx and st_value are in it.
_SYMBOL: Final = {32: (struct.Struct("<IIIBBH"), 0, 3, 5, 1), 64: (struct.Struct("<IBBHQQ"), 0, 1, 3, 4)}
_PLACES: Final = (0, 1, 2)  # STT_NOTYPE, STT_OBJECT, STT_FUNC
_NOWHERE: Final = (0, 0xFFF1)  # SHN_UNDEF, SHN_ABS
_GLOBAL: Final = 1  # STB_GLOBAL
