"""The comparison of tests/unit/test_apx_text.py with disassemblers that are fetched if the cache has none."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from harness.lab.debian import fetch_package


@pytest.fixture(scope="module")
def texts() -> ModuleType:
    path = Path(__file__).parents[1] / "unit" / "test_apx_text.py"
    spec = importlib.util.spec_from_file_location("apx_text", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_form_reads_as_objdump_shows_it(texts: ModuleType) -> None:
    assert texts.check_objdump(fetch_package) > 10_000


def test_every_form_reads_as_llvm_shows_it(texts: ModuleType) -> None:
    assert texts.check_llvm(fetch_package) > 9_000
