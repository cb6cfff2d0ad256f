"""How ``replay`` finds a Case: by file, by the id of one that a run here has kept, by name; and what it says if not."""

import json
import shlex
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from harness.case import CaseError
from harness.cpuid import CpuidEntry, CpuProfile
from harness.paths import all_cases
from harness.replay import find_case
from harness.report.views import kept_word

HERE = SimpleNamespace(profile=CpuProfile((CpuidEntry(0, eax=1), CpuidEntry(1), CpuidEntry(0x80000001, edx=1 << 29))))


@pytest.fixture
def lab_case(tmp_path, monkeypatch):
    """A Case's file below out/, with an id that no Case of this host has."""
    monkeypatch.chdir(tmp_path)
    case = next(c for c in all_cases(HERE.profile, families=["gpr"]) if "@long#" in c.name)
    made = replace(case, name="forced/gpr/in_a_lab@long#0")
    kept = Path("out", "a lab's run", "cases", f"{made.id}.json")
    kept.parent.mkdir(parents=True)
    kept.write_text(json.dumps(made.to_json()))
    return kept


def test_the_word_for_a_kept_case_finds_it_from_any_folder(lab_case, tmp_path, monkeypatch):
    (word,) = shlex.split(kept_word(lab_case))
    (tmp_path / "elsewhere").mkdir()
    for folder in (tmp_path, tmp_path / "elsewhere"):
        monkeypatch.chdir(folder)
        assert find_case(word, HERE).case.name == "forced/gpr/in_a_lab@long#0"


def test_an_id_is_found_below_out_and_elsewhere_its_file_is_asked_for(lab_case, tmp_path, monkeypatch):
    assert find_case(lab_case.stem, HERE).again == str(lab_case)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(CaseError) as caught:
        find_case(lab_case.stem, HERE)
    text = str(caught.value)
    assert f"no Case with id or name '{lab_case.stem}'" in text
    assert f"below {tmp_path}/elsewhere/out" in text
    assert "give its file, cases/ID.json in the run's --out folder" in text
    assert "run --list" in text


def test_a_name_is_found_with_its_number_without_and_as_ktap_writes_it(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    case = next(c for c in all_cases(HERE.profile, families=["gpr"]) if c.name.endswith("#0"))
    for word in (case.name, case.name.removesuffix("#0"), case.name.replace("#", ".")):
        assert find_case(word, HERE).case == case
    with pytest.raises(CaseError, match="no Case with id or name 'gpr/nosuch'"):
        find_case("gpr/nosuch", HERE)
