"""Is it the same code? On Debian's kernel source, built incrementally: 15 to 50 s of two processors for each edit."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from harness.lab.edits import Change, Edit, KernelRange, named
from harness.lab.kbuild import Workspace, workspace
from harness.lab.ksource import debian_source
from harness.series.code import CodeChange, CodeRecord, compare, record
from harness.series.elf import read_object
from harness.series.layout import check, violated
from harness.series.normal import record_object
from harness.series.typeinfo import file_layout

EMULATE = "arch/x86/kvm/emulate.c"
SALC = "static int em_salc(struct x86_emulate_ctxt *ctxt)"
ROW = "I(DstAcc | ByteOp | No64, em_salc)"


def edit(*changes: tuple[str, str, str]) -> Edit:
    """(file, what is there once, what becomes of it)."""
    rows = tuple(Change(file, find, "replace", text) for file, find, text in changes)
    return Edit("seeded", "Seeded", KernelRange.parse("7.3"), rows)


@pytest.fixture(scope="module")
def work() -> Iterator[Workspace]:
    with workspace(debian_source("7.3", print), progress=print) as found:
        yield found
        found.checkout(found.copy.snapshot(None))


@pytest.fixture(scope="module")
def base(work: Workspace) -> CodeRecord:
    work.checkout(work.copy.snapshot(None))
    work.make_image()
    return record(work.build)


@pytest.fixture
def change(work: Workspace, base: CodeRecord) -> Callable[[Edit], CodeChange]:
    def build(edit: Edit) -> CodeChange:
        work.checkout(work.copy.snapshot(None), [edit])
        work.make_image()
        found = compare(base, record(work.build, base))
        print(found.text())
        return found

    return build


def names(change: CodeChange) -> set[tuple[str, str]]:
    return {(d.file, d.symbol) for d in change.differences}


def test_record_holds_the_whole_kernel(work: Workspace, base: CodeRecord) -> None:
    assert len(base.objects) > 1000
    for name in ("arch/x86/kvm/svm/svm.o", "arch/x86/boot/compressed/misc.o", "arch/x86/kernel/vmlinux.lds"):
        assert name in base.objects
    assert not [name for name in base.objects if name.startswith(("scripts/", "tools/"))]
    assert record(work.build) == base
    assert CodeRecord.from_json(json.loads(json.dumps(base.to_json()))) == base


def test_comment_and_blank_lines(change: Callable[[Edit], CodeChange]) -> None:
    found = change(
        edit(
            (EMULATE, "#include <linux/kvm_host.h>", "/* One\n * more. */\n\n#include <linux/kvm_host.h>"),
            (EMULATE, SALC, f"/* Set AL on carry. */\n\n\n{SALC}"),
            ("arch/x86/kvm/x86.c", "int kvm_emulate_halt(struct kvm_vcpu *vcpu)\n",
             "/* Halt. */\n\nint kvm_emulate_halt(struct kvm_vcpu *vcpu)\n"),
        )
    )  # fmt: skip
    assert found.identical
    assert not found.renamed


def test_rename_of_a_static_function(change: Callable[[Edit], CodeChange]) -> None:
    definition, use = (EMULATE, SALC, SALC.replace("salc", "set_al")), (EMULATE, ROW, ROW.replace("salc", "set_al"))
    found = change(edit(definition, use))
    assert found.identical
    assert [(r.old, r.new) for r in found.renamed] == [("em_salc", "em_set_al")]


def test_rename_of_a_global_function_across_files(change: Callable[[Edit], CodeChange]) -> None:
    old, new = "emulator_writeback_register_cache(", "x86_emulate_flush_registers("
    head = "void {}struct x86_emulate_ctxt *ctxt)"
    found = change(
        edit(
            (EMULATE, head.format(old), head.format(new)),
            ("arch/x86/kvm/kvm_emulate.h", head.format(old), head.format(new)),
            ("arch/x86/kvm/regs.c", f"{old}vcpu->arch", f"{new}vcpu->arch"),
        )
    )
    assert found.identical
    assert [(r.old + "(", r.new + "(") for r in found.renamed] == [(old, new)]


def test_one_flag_of_an_opcode_table(change: Callable[[Edit], CodeChange]) -> None:
    found = change(edit((EMULATE, ROW, ROW.replace(" | No64", ""))))
    assert not found.identical
    assert names(found) == {("arch/x86/kvm/emulate.o", "opcode_table")}
    assert "x86_decode_insn" in found.changed[0].users
    assert "data opcode_table: changed" in found.text()


def test_changed_function_is_the_only_one(change: Callable[[Edit], CodeChange]) -> None:
    bug = named("emul-ah-is-spl")
    found = change(bug)
    assert bug.changes[0].within == "decode_register"
    assert found.functions
    assert {d.file for d in found.differences} == {"arch/x86/kvm/emulate.o"}
    # decode_register() is inlined or not as the compiler likes; nothing else may be named.
    assert {*found.functions} <= {"decode_register", "decode_register_operand", "x86_decode_insn"}


def test_correct_refactoring_that_changes_code(change: Callable[[Edit], CodeChange]) -> None:
    old = "ctxt->dst.val = 0xFF * !!(ctxt->eflags & X86_EFLAGS_CF);"
    new = "ctxt->dst.val = 0;\n\tbarrier();\n\tif (ctxt->eflags & X86_EFLAGS_CF)\n\t\tctxt->dst.val = 0xFF;"
    found = change(edit((EMULATE, old, new)))
    assert found.functions == ("em_salc",)
    assert names(found) == {("arch/x86/kvm/emulate.o", "em_salc")}


def test_every_byte_of_the_emulators_tables_counts(work: Workspace, base: CodeRecord, tmp_path: Path) -> None:
    """Bytes of the real object's tables, inverted: one in 100, chosen anew each run."""
    work.checkout(work.copy.snapshot(None))
    work.make("arch/x86/kvm/emulate.o")
    path = work.build / "arch/x86/kvm/emulate.o"
    elf, image, broken = read_object(path), path.read_bytes(), tmp_path / "emulate.o"
    rodata = next(s for s in elf.sections if s.name == ".rodata")
    filled = {n for r in elf.relocations[rodata.number] for n in range(r.offset, r.offset + 8)}
    table = next(s for s in elf.symbols if s.name == "opcode_table")
    places = [n for n in range(table.value, table.value + table.size) if n not in filled]
    old = CodeRecord({"emulate.o": record_object(path)}, "", "")
    seed = random.randrange(1 << 32)
    for place in random.Random(seed).sample(places, len(places) // 100):
        copy = bytearray(image)
        copy[rodata.offset + place] ^= 1 << random.Random(place).randrange(8)
        broken.write_bytes(copy)
        found = compare(old, CodeRecord({"emulate.o": record_object(broken)}, "", ""))
        assert names(found) == {("emulate.o", "opcode_table")}, (seed, place)


def test_layout_of_a_kernel_that_was_built(work: Workspace, base: CodeRecord, tmp_path: Path) -> None:
    work.layout_object(tmp_path / "layout.o")
    found = file_layout(tmp_path / "layout.o")
    assert not violated(check(found))
    assert found.ids["ERAPS"] == found.ids["CR3"]
