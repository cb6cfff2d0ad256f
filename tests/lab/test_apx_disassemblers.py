"""APX text and macros (tests/unit/test_apx_text.py, test_apx_guests.py) against tools that are fetched where needed."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from harness.lab.debian import fetch_package


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"unit_{name}", Path(__file__).parents[1] / "unit" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def texts() -> ModuleType:
    return load("test_apx_text")


def test_every_form_reads_as_objdump_shows_it(texts: ModuleType) -> None:
    assert all(texts.check_objdump(fetch_package, seed) > 5_000 for seed in range(4))


def test_every_form_reads_as_llvm_shows_it(texts: ModuleType) -> None:
    assert all(texts.check_llvm(fetch_package, seed) > 4_500 for seed in range(4))


def test_the_macros_give_the_bytes_of_an_assembler_that_knows_apx(tmp_path: Path) -> None:
    assert load("test_apx_guests").check_macros(fetch_package, tmp_path) > 25
