"""Kernels built from Debian's sources. The first run compiles whole kernels: ten minutes of two processors each."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from elftools.elf.elffile import ELFFile

from harness.kernels import KernelRange
from harness.lab.boot import Boot, How
from harness.lab.bootspec import BootSpec
from harness.lab.bzimage import release_of as release_in
from harness.lab.bzimage import vmlinux_of
from harness.lab.configurations import configuration
from harness.lab.edits import EDITS, MUTANTS, Change, Edit, edited, load_all, named
from harness.lab.hardware import pinned_qemu
from harness.lab.image import base_image
from harness.lab.kbuild import BuiltKernel, kernel_from_tree, workspace
from harness.lab.kernel import COMMAND_LINE
from harness.lab.ksource import debian_source, private_copy, release_of
from harness.lab.run import Options, run_cell
from harness.lab.session import Cell

ALL = {**load_all(EDITS), **load_all(MUTANTS)}


@pytest.fixture(scope="module")
def source() -> Path:
    return debian_source("7.3", print)


@pytest.fixture(scope="module")
def built(source: Path) -> BuiltKernel:
    return kernel_from_tree(source, progress=print)


def with_needs(edit: Edit) -> list[Edit]:
    return [*(named(name) for name in edit.needs), edit]


# --- configuration and image


def test_tree_takes_the_whole_configuration(built: BuiltKernel) -> None:
    assert built.missing == ()


def test_image_is_what_it_says(built: BuiltKernel) -> None:
    bzimage = built.kernel.image.with_name("bzImage")
    assert release_in(bzimage) == built.kernel.release
    assert f"{built.kernel.release} (kvm-harness@lab)".encode() in bzimage.read_bytes()
    assert vmlinux_of(bzimage)[:4] == built.kernel.image.read_bytes()[:4] == b"\x7fELF"
    assert built.kernel.series == "7.3"


def test_layout_names_the_registers(built: BuiltKernel) -> None:
    with open(built.layout, "rb") as file:
        dwarf = ELFFile(file).get_dwarf_info()
        named = {
            die.attributes["DW_AT_name"].value.decode(): die
            for unit in dwarf.iter_CUs()
            for die in unit.iter_DIEs()
            if "DW_AT_name" in die.attributes and die.tag in ("DW_TAG_structure_type", "DW_TAG_enumerator")
        }
        assert named["VCPU_REGS_RSP"].attributes["DW_AT_const_value"].value == 4
        members = {
            child.attributes["DW_AT_name"].value
            for child in named["kvm_vcpu_arch"].iter_children()
            if "DW_AT_name" in child.attributes
        }
        assert {b"regs", b"regs_avail", b"regs_dirty"} <= members


def test_kernel_boots_with_kvm(built: BuiltKernel, tmp_path: Path) -> None:
    spec = BootSpec(pinned_qemu(print), built.kernel.image, append=(*COMMAND_LINE, "loglevel=7"), cpu="max,+svm")
    with Boot(spec, tmp_path) as boot:
        ending = boot.wait(60)
    console = (tmp_path / "console.log").read_text(errors="replace")
    assert ending is not None
    assert ending.how is How.PANICKED  # no disk was given
    assert "Unable to mount root fs" in ending.panic
    assert f"Linux version {built.kernel.release} (kvm-harness@lab)" in console
    assert "kvm_amd: Nested Paging enabled" in console


# --- rebuilding


def test_nothing_is_done_for_what_is_there(built: BuiltKernel, source: Path) -> None:
    started = time.monotonic()
    assert kernel_from_tree(source).kernel == built.kernel
    assert time.monotonic() - started < 20


def test_one_changed_file_is_one_compilation(built: BuiltKernel, source: Path) -> None:
    with workspace(source) as work:
        snapshot = work.copy.snapshot(None)
        work.checkout(snapshot, [named("emul-ah-is-spl")])
        work.make("arch/x86/kvm/emulate.o")
        first = (work.build / "arch/x86/kvm/emulate.o").stat().st_mtime_ns
        x86 = (work.build / "arch/x86/kvm/x86.o").stat().st_mtime_ns
        work.checkout(snapshot)
        work.make("arch/x86/kvm/emulate.o", "arch/x86/kvm/x86.o")
        assert (work.build / "arch/x86/kvm/emulate.o").stat().st_mtime_ns > first
        assert (work.build / "arch/x86/kvm/x86.o").stat().st_mtime_ns == x86


# --- edits


@pytest.mark.parametrize("series", ["6.1", "6.12", "7.3"])
def test_every_edit_fits_the_kernels_it_names(series: str) -> None:
    tree = debian_source(series, print)
    number = release_of(tree)[1]
    meant = [edit for edit in ALL.values() if number in edit.kernels]
    assert meant
    for edit in meant:
        texts = edited(with_needs(edit), tree, number).texts
        assert any(texts[name] != (tree / name).read_text() for name in texts), edit.name


@pytest.mark.parametrize("name", list(ALL))
def test_every_edit_compiles(built: BuiltKernel, source: Path, name: str) -> None:
    edit = ALL[name]
    with workspace(source) as work:
        work.checkout(work.copy.snapshot(None), with_needs(edit))
        objects = {f"{file.removesuffix('.c')}.o" for file in edit.files if file.endswith(".c")}
        work.make(*sorted(objects or {"arch/x86/kvm/x86.o", "arch/x86/kvm/emulate.o", "arch/x86/kvm/svm/svm.o"}))
        assert "warning:" not in work.log.read_text()


def test_apx_is_offered_with_the_edit(source: Path, tmp_path: Path) -> None:
    kernel = kernel_from_tree(source, edits=[named("apx-on-svm")], progress=print)
    assert kernel.already_there == ()
    emulator = pinned_qemu(print)
    if "apxf" not in emulator.features:
        pytest.skip("this emulator has no APX")
    spec = BootSpec(emulator, kernel.kernel.image, append=(*COMMAND_LINE, "loglevel=7"), cpu="max,+svm,+apxf")
    with Boot(spec, tmp_path) as boot:
        boot.wait(60)
    assert "'APX registers'" in (tmp_path / "console.log").read_text(errors="replace")


# --- kernels that are broken


WARNS = Edit(
    "warns-at-a-leaf",
    "KVM warns when a guest executes CPUID with leaf 80000004H, and says nothing of KVM_CAP_NOP_IO_DELAY",
    KernelRange.parse("7.2.."),
    (
        Change(
            "arch/x86/kvm/cpuid.c", "ecx = kvm_ecx_read(vcpu);", "before", "WARN_ON_ONCE(eax == 0x80000004);",
            "kvm_emulate_cpuid",
        ),
        Change("arch/x86/kvm/x86.c", "case KVM_CAP_NOP_IO_DELAY:", "replace", "", "kvm_vm_ioctl_check_extension"),
    ),
)  # fmt: skip


def test_a_warning_is_blamed_on_the_cases_that_cause_it_and_a_lost_capability_is_regressed(
    source: Path, tmp_path: Path
) -> None:
    kernel = kernel_from_tree(source, edits=[WARNS], progress=print).kernel
    cell = Cell(configuration("svm"), kernel, pinned_qemu(print), base_image(print))
    outcome = run_cell(cell, tmp_path, Options("full", "msr/cpuid_8000000"), print, io.StringIO())
    assert (outcome.status, outcome.problem) == (1, "")
    verdicts: dict[str, set[str]] = {}
    for record in outcome.records:
        verdicts.setdefault(record["verdict"], set()).add(record["case"])
    cases = {r["case"] for r in outcome.records if r["case"].startswith("msr/")}
    guilty = {name for name in cases if name.startswith("msr/cpuid_80000004@")}
    assert len(guilty) > 5
    assert verdicts["splat"] == guilty
    assert verdicts["agree"] == cases  # what a Case shows is right all the same
    assert verdicts["regressed"] == {"profile/capability-KVM_CAP_NOP_IO_DELAY"}
    assert {r["summary"] for r in outcome.records if r["verdict"] == "regressed"} == {
        "gone: capability KVM_CAP_NOP_IO_DELAY"
    }


def test_a_tree_that_does_not_compile_is_named_with_the_compilers_words(source: Path, tmp_path: Path) -> None:
    tree = tmp_path / "linux"
    shutil.copytree(source, tree, copy_function=os.link, symlinks=True)
    broken = tree / "include" / "linux" / "kernel.h"  # the first file that is compiled includes it
    text = broken.read_text()
    broken.unlink()
    broken.write_text(text + "\nint kvm_harness_test(void) { return undeclared; }\n")
    command = [sys.executable, "-m", "harness", "lab", "run", "--tree", str(tree), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    shutil.rmtree(private_copy(tree).folder)
    assert done.returncode == 2, done.stderr
    assert f"{tree} does not build" in done.stderr
    assert "include/linux/kernel.h" in done.stderr
    assert "undeclared" in done.stderr
    assert "Traceback" not in done.stderr
