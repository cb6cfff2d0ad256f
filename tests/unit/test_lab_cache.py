"""The lab's cache: what was built once is found again, nothing half-made stays, and the oldest entries go."""

import argparse
import errno
import os
import threading

import pytest

from harness.lab.cache import area, cached, digest, prune
from harness.lab.cli import _tier
from harness.lab.errors import LabError


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KVM_HARNESS_CACHE", str(tmp_path))


def test_an_entry_is_made_once_by_any_number_of_threads():
    made = []

    def make(folder):
        made.append(folder)
        (folder / "x").write_text("1")

    threads = [threading.Thread(target=cached, args=("kind", "key", make)) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert (cached("kind", "key", make) / "x").read_text() == "1"


def test_what_fails_leaves_nothing_and_a_full_disk_is_said():
    def fail(folder):
        (folder / "x").write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(LabError, match="No space left on device: make room"):
        cached("kind", "key", fail)
    assert [p.name for p in area("kind").iterdir()] == [".key.lock"]


def test_a_digest_knows_where_parts_end():
    assert digest("ab", "c") != digest("a", "bc") != digest("abc")


def test_entries_that_were_not_used_for_longest_go():
    for n in range(4):
        folder = cached("kind", f"k{n}", lambda folder: None)
        os.utime(folder, (n, n))
    os.utime(area("kind") / "k0", (9, 9))
    prune("kind", 2)
    assert sorted(p.name for p in area("kind").iterdir() if p.is_dir()) == ["k0", "k3"]


def test_tiers_together_are_the_widest():
    assert [_tier(text) for text in ("smoke", "full", "smoke,full", "full,smoke")] == ["smoke", "full", "full", "full"]
    with pytest.raises(argparse.ArgumentTypeError, match="no tier 'quick': use smoke or full"):
        _tier("smoke,quick")
