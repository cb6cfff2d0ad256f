"""The emulator's recipe and its errors. Nothing here builds QEMU or needs a network."""

import os
import re
import time

import pytest

from harness.lab import hardware, qemu_build
from harness.lab.errors import LabError

TARBALL = "qemu_10.0.2+ds.orig.tar.xz"
SUBJECT = re.compile(r"Subject: \S+: .+")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KVM_HARNESS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def tools_present(monkeypatch):
    monkeypatch.setattr(qemu_build, "_require_tools", lambda: None)


def quiet(line):
    pass


def test_patches_are_a_series_with_messages():
    found = qemu_build.patches()
    assert [int(path.name[:4]) for path in found] == list(range(1, len(found) + 1))
    for path in found:
        subject, _, rest = path.read_text().partition("\n")
        message, separator, diff = rest.partition("\n---\n")
        assert SUBJECT.fullmatch(subject), path
        assert message.strip(), path
        assert separator, path
        assert "\n+++ b/" in diff, path
        assert all(len(line) <= 76 for line in message.splitlines()), path


def test_digest_follows_every_part_of_the_recipe(tmp_path, monkeypatch):
    digests = {qemu_build.recipe_digest()}
    monkeypatch.setattr(qemu_build, "_CONFIGURE", (*qemu_build._CONFIGURE, "--enable-debug"))
    digests.add(qemu_build.recipe_digest())
    (tmp_path / "patches").mkdir()
    (tmp_path / "ci.mak").write_text("CONFIG_Q35=y\n")
    (tmp_path / "patches" / "0001-a.patch").write_text("a")
    monkeypatch.setattr(qemu_build, "RECIPE", tmp_path)
    digests.add(qemu_build.recipe_digest())
    (tmp_path / "patches" / "0001-a.patch").write_text("b")
    digests.add(qemu_build.recipe_digest())
    (tmp_path / "patches" / "0001-a.patch").rename(tmp_path / "patches" / "0001-b.patch")
    digests.add(qemu_build.recipe_digest())
    (tmp_path / "ci.mak").write_text("CONFIG_I440FX=y\n")
    digests.add(qemu_build.recipe_digest())
    assert len(digests) == 6


def test_checkout_without_patches_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(qemu_build, "RECIPE", tmp_path)
    with pytest.raises(LabError, match="whole checkout"):
        hardware.pinned_qemu()


def test_missing_tools_name_their_packages(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LabError, match=r"sh ci/packages\.sh lab.*apt-get install gcc binutils make ninja-build"):
        hardware.pinned_qemu()


def test_wrong_checksum_is_refused(tmp_path, monkeypatch, own_cache, tools_present):
    pool = tmp_path / "mirror/pool/main/q/qemu"
    pool.mkdir(parents=True)
    (pool / TARBALL).write_bytes(b"something else")
    monkeypatch.setenv("KVM_HARNESS_DEBIAN_MIRROR", f"file://{tmp_path}/mirror")
    with pytest.raises(LabError, match="is not the file with SHA-256 0901da33"):
        hardware.pinned_qemu()
    assert not list(own_cache.rglob("qemu_*"))


def test_cold_cache_without_the_file_says_where_to_put_it(tmp_path, monkeypatch, own_cache, tools_present):
    monkeypatch.setenv("KVM_HARNESS_DEBIAN_MIRROR", f"file://{tmp_path}/mirror")
    with pytest.raises(LabError, match=r"could not be fetched(?s:.*)check the network") as caught:
        hardware.pinned_qemu()
    assert f"{own_cache}/lab/source/0901da33" in str(caught.value)


def test_damaged_tarball_in_the_cache_is_noticed(own_cache, tools_present):
    folder = own_cache / "lab/source" / qemu_build._TARBALL_SHA256
    folder.mkdir(parents=True)
    (folder / TARBALL).write_bytes(b"cut off")
    with pytest.raises(LabError, match="is damaged; remove"):
        hardware.pinned_qemu()


def test_failing_step_shows_the_end_of_the_log_and_where_it_is(tmp_path):
    path = tmp_path / "build.log"
    script = "i=0; while [ $i -lt 100 ]; do i=$((i+1)); echo line $i; done; echo 'error: no such thing' >&2; exit 3"
    with qemu_build._log(path) as log, pytest.raises(LabError) as caught:
        log.run("compiling QEMU", "sh", "-c", script)
    text = str(caught.value)
    assert text.startswith("compiling QEMU failed with status 3:\n")
    assert "line 100\nerror: no such thing\nthe whole log: " in text
    assert "line 50\n" not in text
    assert str(path) in text
    assert "line 1\n" in path.read_text()


def test_interrupted_step_leaves_no_process(tmp_path):
    with qemu_build._log(tmp_path / "log") as log:
        lines = log.lines("compiling QEMU", "sh", "-c", "echo $$; exec sleep 60")
        pid = int(next(lines))
        began = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            lines.throw(KeyboardInterrupt)
    assert time.monotonic() - began < 5
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_build_does_not_see_the_callers_compiler_flags(tmp_path, monkeypatch):
    monkeypatch.setenv("CFLAGS", "-O0")
    with qemu_build._log(tmp_path / "log") as log:
        assert list(log.lines("x", "sh", "-c", "echo [$CFLAGS]")) == ["[]\n"]


def test_cached_emulator_that_no_longer_starts_says_what_to_remove(own_cache):
    folder = own_cache / "lab/qemu" / qemu_build.recipe_digest()
    folder.mkdir(parents=True)
    binary = folder / qemu_build.BINARY
    binary.write_text("#!/bin/sh\necho 'libfdt.so.1: cannot open' >&2; exit 127\n")
    binary.chmod(0o755)
    with pytest.raises(LabError, match=rf"libfdt(?s:.*)remove {folder}"):
        hardware.pinned_qemu()


def test_no_system_qemu_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LabError, match="apt-get install qemu-system-x86"):
        hardware.system_qemu()


def test_emulator_command_names_the_firmware(tmp_path):
    ours = hardware.Emulator("ours", tmp_path / "qemu", tmp_path / "firmware", "0", frozenset())
    assert ours.command == (str(tmp_path / "qemu"), "-L", str(tmp_path / "firmware"))
    theirs = hardware.Emulator("theirs", tmp_path / "qemu", None, "0", frozenset())
    assert theirs.command == (str(tmp_path / "qemu"),)


def test_package_list_has_what_the_build_asks_for():
    words = set(re.findall(r"[\w.-]+", (qemu_build.RECIPE.parent / "packages.sh").read_text()))
    for package in (*qemu_build._PROGRAMS.values(), *qemu_build._HEADERS.values(), "libglib2.0-dev", "python3-venv"):
        assert package in words or package == "tar", package  # tar is on every Debian
