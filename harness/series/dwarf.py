"""Enumerations and structures by name from DWARF, in the form that harness/series/btf.py has for BTF."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from elftools.dwarf.die import DIE
from elftools.elf.elffile import ELFFile

from harness.series.btf import Member

_TRANSPARENT: Final = ("DW_TAG_typedef", "DW_TAG_volatile_type", "DW_TAG_const_type", "DW_TAG_restrict_type")


class Dwarf:
    """The debugging information of one ELF file. A kernel has thousands of units: those of KVM are looked at first."""

    def __init__(self, elf: ELFFile) -> None:
        self._info = elf.get_dwarf_info()
        self._found: dict[tuple[str, str], DIE] = {}
        self._units = self._in_order()

    def enumeration(self, name: str) -> dict[str, int] | None:
        """The enumerators of ``enum name``; None when there is no such type."""
        found = self._named("DW_TAG_enumeration_type", name)
        if found is None:
            return None
        return {_name(child): _value(child, "DW_AT_const_value") for child in found.iter_children()}

    def structure(self, name: str) -> dict[str, Member] | None:
        """The members of ``struct name``; None when there is no such type."""
        found = self._named("DW_TAG_structure_type", name)
        if found is None:
            return None
        return {
            _name(child): Member(_value(child, "DW_AT_data_member_location"), _size(child), _count(child))
            for child in found.iter_children()
            if child.tag == "DW_TAG_member"
        }

    def _in_order(self) -> Iterator[Any]:
        units = [(unit, _name(unit.get_top_DIE())) for unit in self._info.iter_CUs()]
        ours = [unit for unit, name in units if "/kvm/" in name]
        yield from ours
        yield from (unit for unit, name in units if "/kvm/" not in name)

    def _named(self, tag: str, name: str) -> DIE | None:
        while (tag, name) not in self._found:
            unit = next(self._units, None)
            if unit is None:
                return None
            for die in unit.iter_DIEs():
                if die.tag in ("DW_TAG_structure_type", "DW_TAG_enumeration_type") and die.has_children:
                    self._found.setdefault((die.tag, _name(die)), die)
        return self._found[tag, name]


def _name(die: DIE) -> str:
    attribute = die.attributes.get("DW_AT_name")
    return attribute.value.decode(errors="replace") if attribute else ""


def _value(die: DIE, attribute: str) -> int:
    found = die.attributes.get(attribute)
    return int(found.value) if found else 0


def _type(die: DIE) -> DIE | None:
    """What a member, array or typedef is made of, without the names for it."""
    while "DW_AT_type" in die.attributes:
        die = die.get_DIE_from_attribute("DW_AT_type")
        if die.tag not in _TRANSPARENT:
            return die
    return None


def _size(die: DIE) -> int:
    """The size of a member's type in bytes; of an array all of it."""
    found = _type(die)
    if found is None:
        return 0
    if found.tag == "DW_TAG_array_type":
        return _elements(found) * _size(found)
    if found.tag == "DW_TAG_pointer_type":
        return 8
    return _value(found, "DW_AT_byte_size")


def _count(die: DIE) -> int | None:
    found = _type(die)
    return _elements(found) if found is not None and found.tag == "DW_TAG_array_type" else None


def _elements(array: DIE) -> int:
    product = 1
    for bound in array.iter_children():
        if "DW_AT_count" in bound.attributes:
            product *= _value(bound, "DW_AT_count")
        else:  # DWARF 5, 5.13: the highest index; none for an array of unknown length
            product *= _value(bound, "DW_AT_upper_bound") + 1 if "DW_AT_upper_bound" in bound.attributes else 0
    return product
