"""Named edits of a kernel tree: small changes that the lab needs (ci/qemu/edits), and seeded bugs (ci/qemu/mutants).

An edit is data, in TOML::

    [[edit]]
    name = "apx-on-svm"
    title = "Let KVM expose APX on SVM"
    kernels = "7.2.."                       # Linux series: "6.1", "6.1..6.12", "7.2..", or several with commas
    [[edit.change]]
    file = "arch/x86/kvm/cpuid.c"
    within = "kvm_initialize_cpu_caps"      # optional: the function, table or macro that holds the anchor
    find = "F(AVX10),"                      # the anchor: must be there exactly once; blanks match any blanks
    after = "SCATTERED_F(APX),"             # or `before`, or `replace`
    unless = 'F\\(APX\\)'                    # optional: a regular expression; where it is found, nothing is to be done

A seeded bug also says what it breaks and who must see it: ``class`` (its number in the list of register bug classes),
``configurations`` of the lab, ``select`` (pytest's ``-k``), and ``equivalent``: why nothing can see it, if that is so.
``needs`` names edits that a tree must have before this one.

Nothing here writes: :func:`edited` gives the new text of files, harness/lab/kbuild.py puts it into its private copy.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from harness.kernels import KernelRange
from harness.lab.cache import digest
from harness.lab.errors import LabInputError

EDITS: Final = Path(__file__).parents[2] / "ci" / "qemu" / "edits"
MUTANTS: Final = Path(__file__).parents[2] / "ci" / "qemu" / "mutants"

_MODES: Final = ("replace", "before", "after")
_EDIT_KEYS: Final = {
    "name", "title", "kernels", "change", "class", "configurations", "select", "equivalent", "needs",
}  # fmt: skip
_CHANGE_KEYS: Final = {"file", "within", "find", "unless", *_MODES}


class EditError(LabInputError):
    """An edit is malformed, not meant for this kernel, or no longer fits it. The text says which anchor, and where."""


@dataclass(frozen=True)
class Change:
    """One anchor in one file, and what becomes of it."""

    file: str
    find: str
    mode: str  # replace, before, after
    text: str
    within: str = ""
    unless: str = ""


@dataclass(frozen=True)
class Edit:
    """A named change of a kernel tree."""

    name: str
    title: str
    kernels: KernelRange
    changes: tuple[Change, ...]
    bug_class: int | None = None
    configurations: tuple[str, ...] = ()
    select: str = ""
    equivalent: str = ""
    needs: tuple[str, ...] = ()
    source: Path = field(default=Path(), compare=False)

    @property
    def digest(self) -> str:
        """Changes when what the edit does to a tree changes."""
        return digest(self.name, *(part for c in self.changes for part in (c.file, c.find, c.mode, c.text, c.within)))

    @property
    def files(self) -> tuple[str, ...]:
        """The files it touches, in the order of its changes."""
        return tuple(dict.fromkeys(change.file for change in self.changes))


@dataclass(frozen=True)
class Edited:
    """What edits make of a tree: new texts by file name, and the names of edits that it already contains."""

    texts: Mapping[str, str]
    already_there: tuple[str, ...]


def load(path: Path) -> tuple[Edit, ...]:
    """The edits of one TOML file, in its order. Raises EditError with the place of what is wrong."""
    try:
        data = tomllib.loads(path.read_text())
    except OSError as error:
        raise EditError(f"{path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise EditError(f"{path}: {error}") from error
    _known_keys(path.name, data, {"edit"})
    edits = tuple(_edit(path, number, table) for number, table in enumerate(data.get("edit", []), 1))
    if not edits:
        raise EditError(f"{path}: has no [[edit]]")
    return edits


def load_all(folder: Path) -> dict[str, Edit]:
    """Every edit below ``folder`` by name, sorted by file. Raises EditError, also for a name that is there twice."""
    found: dict[str, Edit] = {}
    for path in sorted(folder.glob("*.toml")):
        for edit in load(path):
            if edit.name in found:
                other = found[edit.name].source.name
                raise EditError(f"{path}: edit {edit.name} is in {other} too: rename one of them")
            found[edit.name] = edit
    return found


def named(name: str) -> Edit:
    """The edit or seeded bug of that name. Raises EditError."""
    known = {**load_all(MUTANTS), **load_all(EDITS)}
    if name not in known:
        raise EditError(f"there is no kernel edit {name!r}: known are {', '.join(sorted(known))}")
    return known[name]


def edited(edits: Iterable[Edit], tree: Path, series: tuple[int, int]) -> Edited:
    """The new texts of the files that ``edits``, one after the other, change in ``tree``, which stays as it is.

    ``series`` is the tree's, such as ``(7, 3)``. Raises EditError where an edit is not meant for it or does not fit.
    """
    texts: dict[str, str] = {}
    there: list[str] = []
    for edit in edits:
        if series not in edit.kernels:
            raise EditError(
                f"kernel edit {edit.name} is for Linux {edit.kernels}; {tree} is {series[0]}.{series[1]}: leave it out "
                f"or widen its range in {edit.source}"
            )
        needed = False
        for change in edit.changes:
            old = texts[change.file] if change.file in texts else _read(edit, tree, change.file)
            if _is_there(change, old):
                continue
            needed = True
            texts[change.file] = _apply(edit, change, old)
        if not needed:
            there.append(edit.name)
    return Edited(texts, tuple(there))


# --- reading ---------------------------------------------------------------------------------------------------------


def _known_keys(where: str, table: Mapping[str, Any], known: set[str]) -> None:
    if unknown := sorted(set(table) - known):
        raise EditError(f"{where}: unknown key {unknown[0]!r}: known are {', '.join(sorted(known))}")


def _text(where: str, table: Mapping[str, Any], key: str, *, required: bool = False) -> str:
    value = table.get(key, "")
    if not isinstance(value, str) or (required and not value.strip()):
        raise EditError(f"{where}: {key} must be a text" + (", and not an empty one" if required else ""))
    return value


def _names(where: str, table: Mapping[str, Any], key: str) -> tuple[str, ...]:
    value = table.get(key, [])
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise EditError(f"{where}: {key} must be a list of names")
    return tuple(value)


def _edit(path: Path, number: int, table: Mapping[str, Any]) -> Edit:
    where = f"{path.name}, edit {number}"
    name = _text(where, table, "name", required=True)
    where = f"{path.name}, edit {name}"
    _known_keys(where, table, _EDIT_KEYS)
    if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name):
        raise EditError(f"{where}: a name is small letters, digits and hyphens")
    try:
        kernels = KernelRange.parse(_text(where, table, "kernels", required=True))
    except ValueError as error:
        raise EditError(f"{where}: {error}") from error
    bug_class = table.get("class")
    if bug_class is not None and (type(bug_class) is not int or bug_class < 1):
        raise EditError(f"{where}: class must be the number of a bug class")
    changes = tuple(_change(f"{where}, change {n}", item) for n, item in enumerate(table.get("change", []), 1))
    if not changes:
        raise EditError(f"{where}: has no [[edit.change]]")
    return Edit(
        name=name,
        title=_text(where, table, "title", required=True),
        kernels=kernels,
        changes=changes,
        bug_class=bug_class,
        configurations=_names(where, table, "configurations"),
        select=_text(where, table, "select"),
        equivalent=_text(where, table, "equivalent"),
        needs=_names(where, table, "needs"),
        source=path,
    )


def _change(where: str, table: Mapping[str, Any]) -> Change:
    _known_keys(where, table, _CHANGE_KEYS)
    modes = [mode for mode in _MODES if mode in table]
    if len(modes) != 1:
        raise EditError(f"{where}: needs exactly one of {', '.join(_MODES)}")
    file = _text(where, table, "file", required=True)
    if Path(file).is_absolute() or ".." in Path(file).parts:
        raise EditError(f"{where}: {file} must be a path inside the tree")
    unless = _text(where, table, "unless")
    try:
        re.compile(unless)
    except re.error as error:
        raise EditError(f"{where}: unless: {error}") from error
    return Change(
        file=file,
        find=_text(where, table, "find", required=True),
        mode=modes[0],
        text=_text(where, table, modes[0], required=modes[0] != "replace"),
        within=_text(where, table, "within"),
        unless=unless,
    )


# --- changing --------------------------------------------------------------------------------------------------------


def _read(edit: Edit, tree: Path, file: str) -> str:
    try:
        # Sources are ASCII or UTF-8, but not everywhere in old trees; newlines stay what they are.
        return (tree / file).read_bytes().decode(errors="surrogateescape")
    except OSError as error:
        raise EditError(f"kernel edit {edit.name} does not fit this tree: {file}: {error.strerror}") from error


def _is_there(change: Change, old: str) -> bool:
    """Whether the tree has this change already, in the block it is for, or in the file when that has no such block."""
    if not change.unless:
        return False
    blocks = _blocks(change.within, old)
    return re.search(change.unless, blocks[0][0] if len(blocks) == 1 else old) is not None


def _apply(edit: Edit, change: Change, old: str) -> str:
    start, end = _region(edit, change, old)
    anchor = _anchor(change.find)
    matches = list(anchor.finditer(old, start, end))
    if len(matches) != 1:
        lines = [str(old.count("\n", 0, match.start()) + 1) for match in matches or anchor.finditer(old)]
        place = f"{change.file}, in {change.within}" if change.within else change.file
        elsewhere = "elsewhere in the file at" if not matches else "at"
        raise EditError(
            f"kernel edit {edit.name} does not fit this tree: {place}: the anchor {' '.join(change.find.split())!r} is "
            f"there {len(matches)} times instead of once"
            + (f" ({elsewhere} line {', '.join(lines[:8])})" if lines else "")
            + f": adapt {edit.source}"
        )
    match, text = matches[0], change.text.strip("\n")
    if change.mode == "after":
        text = f"{match[0]}\n{text}"
    elif change.mode == "before":
        text = f"{text}\n{match[0]}"
    return old[: match.start()] + text + old[match.end() :]


def _anchor(find: str) -> re.Pattern[str]:
    """The anchor's words, whatever blanks are between them; at word boundaries, so that `a1` is not found in `aa12`."""
    words = find.split()
    left = r"(?<!\w)" if re.match(r"\w", words[0]) else ""
    right = r"(?!\w)" if re.search(r"\w$", words[-1]) else ""
    return re.compile(left + r"\s+".join(map(re.escape, words)) + right)


def _region(edit: Edit, change: Change, old: str) -> tuple[int, int]:
    """Where to look: the whole file, or the one block named ``within``."""
    if not change.within:
        return 0, len(old)
    found = _blocks(change.within, old)
    if len(found) != 1:
        raise EditError(
            f"kernel edit {edit.name} does not fit this tree: {change.file} has {len(found)} blocks named "
            f"{change.within} instead of one: adapt {edit.source}"
        )
    return found[0].span()


def _blocks(name: str, text: str) -> list[re.Match[str]]:
    """The functions, tables, types and macros of that name at top level.

    Kernel style makes them easy to find: a block's head begins in column 0 and names it before the first brace, and it
    ends with the next `}` in column 0; a macro ends with the first line that has no backslash.
    """
    if not name:
        return []
    block = re.compile(
        rf"^(?![ \t\n#}}/*])[^;{{}}=#]*?\b{re.escape(name)}\b(?:[^;{{}}]*?\n\{{|[^;{{}}\n]*=?\s*\{{).*?^\}}",
        re.MULTILINE | re.DOTALL,
    )
    macro = re.compile(rf"^#define[ \t]+{re.escape(name)}\b(?:[^\n]*\\\n)*[^\n]*$", re.MULTILINE)
    return [*block.finditer(text), *macro.finditer(text)]
