"""The lab's own emulator: it can be built here, its machines start, and its APX passes the bare self-test."""

import dataclasses
import re
import shutil
import subprocess

import pytest

from harness.lab import hardware, qemu_build
from harness.lab.errors import LabInputError, LostError
from harness.lab.selftest import SOURCES, apx_selftest


@pytest.fixture(scope="module")
def emulator():
    return hardware.pinned_qemu(print)


def test_second_request_builds_nothing(emulator):
    lines = []
    assert hardware.pinned_qemu(lines.append) == emulator
    assert not lines


def test_features(emulator):
    assert emulator.features >= {"apx", "cr8-lock", "kvm"}


def test_firmware_has_what_booting_a_kernel_needs(emulator):
    names = {path.name for path in emulator.firmware.iterdir()}
    assert names >= {"bios-256k.bin", "linuxboot_dma.bin", "multiboot_dma.bin", "pvh.bin", "kvmvapic.bin"}


@pytest.mark.parametrize("machine", ["pc", "q35", "microvm"])
def test_machines_and_devices_start(emulator, machine):
    bus = "device" if machine == "microvm" else "pci"
    options = ["-machine", machine, "-accel", "tcg", "-cpu", "max,+svm,+apxf", "-m", "64", "-nodefaults"]
    devices = ["-device", f"virtio-serial-{bus}", "-device", f"virtio-rng-{bus}"]
    command = [*emulator.command, *options, *devices, "-display", "none", "-S", "-monitor", "stdio"]
    done = subprocess.run(command, input="quit\n", text=True, capture_output=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr


def test_apx_selftest_passes(emulator):
    result = apx_selftest(emulator)
    failed = [line for line in result.output.splitlines() if line.startswith("FAIL")]
    assert (result.failed, failed) == (0, [])
    assert result.passed >= 215


def test_selftest_that_expects_something_else_fails(emulator, tmp_path, monkeypatch):
    monkeypatch.setenv("KVM_HARNESS_CACHE", str(tmp_path / "cache"))
    sources = tmp_path / "selftest"
    shutil.copytree(SOURCES, sources)
    encodings = sources / "encodings.c"
    encodings.write_text(encodings.read_text().replace('"66 REX2", NO_FAULT', '"66 REX2", UD'))
    result = apx_selftest(emulator, sources=sources)
    assert result.failed == 1
    assert "FAIL 66 REX2" in result.output


def test_selftest_of_an_emulator_that_dies_is_no_result(emulator, tmp_path, monkeypatch):
    monkeypatch.setenv("KVM_HARNESS_CACHE", str(tmp_path))
    dead = tmp_path / "qemu"
    dead.write_text("#!/bin/sh\necho dead >&2; kill -9 $$\n")
    dead.chmod(0o755)
    with pytest.raises(LostError, match=r"killed by SIGKILL(.|\n)*dead"):
        apx_selftest(dataclasses.replace(emulator, binary=dead, digest="dead"))


def test_emulator_without_apx_is_refused(emulator):
    with pytest.raises(LabInputError, match="does not emulate APX"):
        apx_selftest(dataclasses.replace(emulator, features=frozenset()))


def test_patches_apply_without_fuzz(tmp_path):
    tarball = qemu_build._source(print)
    text = "".join(patch.read_text() for patch in qemu_build.patches())
    changed = set(re.findall(r"^--- a/(\S+)$", text, re.MULTILINE))
    members = [f"qemu-{qemu_build.RELEASE}/{name}" for name in sorted(changed)]
    subprocess.run(["tar", "-C", tmp_path, "-xf", tarball, *members], check=True)
    root = tmp_path / f"qemu-{qemu_build.RELEASE}"
    for patch in qemu_build.patches():
        subprocess.run(["patch", "-p1", "--fuzz=0", "-s", "-d", root, "-i", patch], check=True)
    assert not list(root.rglob("*.rej"))
