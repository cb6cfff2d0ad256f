"""The catalogue of seeded bugs (ci/qemu/mutants/): kernel edits that each make one mistake, and who has to see it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Final

from harness.lab.configurations import CONFIGURATIONS
from harness.lab.edits import EDITS, MUTANTS, Edit, EditError, load_all
from harness.lab.errors import LabInputError
from harness.selection import SelectionError, check

CLASSES: Final = range(1, 36)
"""Numbers of the register bug classes in ci/qemu/mutants/README.md."""


def catalogue() -> dict[str, Edit]:
    """Every seeded bug by name, in the order of the files. EditError says which one lacks what."""
    found = load_all(MUTANTS)
    helpers = load_all(EDITS)
    for mutant in found.values():
        _check(mutant, helpers)
    return found


def _check(mutant: Edit, helpers: Iterable[str]) -> None:
    where = f"{mutant.source.name}, edit {mutant.name}"
    if mutant.bug_class not in CLASSES:
        raise EditError(f"{where}: class must be one of {CLASSES[0]}..{CLASSES[-1]}: what it is to prove")
    if not mutant.configurations:
        raise EditError(f"{where}: configurations must name at least one: who has to see it")
    if unknown := [name for name in mutant.configurations if name not in CONFIGURATIONS]:
        raise EditError(f"{where}: no configuration {unknown[0]!r}: use {', '.join(CONFIGURATIONS)}")
    if unknown := [name for name in mutant.needs if name not in set(helpers)]:
        raise EditError(f"{where}: needs {unknown[0]!r}, which is no edit of {EDITS}")
    if not mutant.select.strip():
        raise EditError(f"{where}: select must say which Cases have to see it, as pytest's -k does")
    try:
        check(mutant.select)
    except SelectionError as error:
        raise EditError(f"{where}: select: {error}") from error


def choose(only: Sequence[str] = (), configurations: Sequence[str] = ()) -> list[Edit]:
    """The seeded bugs that ``only`` names (by name, by number of their class or by file), all without it.

    With ``configurations`` those that these have to see, in these alone. LabInputError for what is not there.
    """
    everything = catalogue()
    if unknown := [name for name in configurations if name not in CONFIGURATIONS]:
        raise LabInputError(f"no configuration {unknown[0]!r}: use {', '.join(CONFIGURATIONS)}")
    wanted: set[str] = set()
    for word in only:
        matching = [m.name for m in everything.values() if word in (m.name, str(m.bug_class), m.source.stem)]
        if not matching:
            files = ", ".join(dict.fromkeys(m.source.stem for m in everything.values()))
            raise LabInputError(
                f"no seeded bug {word!r}: give names, numbers of classes or files ({files}); "
                "kvm-harness mutants --list shows them"
            )
        wanted.update(matching)
    chosen = [m for m in everything.values() if not only or m.name in wanted]
    if configurations:
        kept = [(m, tuple(name for name in m.configurations if name in configurations)) for m in chosen]
        chosen = [replace(m, configurations=names) for m, names in kept if names]
        if not chosen:
            raise LabInputError(f"none of them is to be seen in {', '.join(configurations)}")
    return chosen


def edits_for(mutant: Edit | None, configuration: str) -> tuple[Edit, ...]:
    """All that a tree needs for ``mutant`` in a configuration: that one's own edits, what it builds on, itself.

    Without a mutant, the unmodified kernel of that configuration.
    """
    helpers = load_all(EDITS)
    names = dict.fromkeys((*CONFIGURATIONS[configuration].edits, *(mutant.needs if mutant else ())))
    return (*(helpers[name] for name in names), *([mutant] if mutant else []))
