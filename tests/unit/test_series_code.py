"""Is it the same code? Tried on small objects that gcc makes here, with the flags that matter of the kernel's."""

from __future__ import annotations

import itertools
import json
import struct
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from harness.lab.errors import LabInputError
from harness.series.code import CodeChange, CodeRecord, compare, record
from harness.series.elf import SHF_ALLOC, SHT_NOBITS, ObjectError, read_object
from harness.series.normal import record_object, whole_file

FLAGS = (
    "-O2", "-fno-pie", "-mcmodel=kernel", "-fno-asynchronous-unwind-tables", "-fcf-protection=none", "-fno-ipa-ra",
    "-mpreferred-stack-boundary=3", "-fno-stack-protector", "-ffreestanding", "-mno-sse", "-Wall", "-Wno-unused",
)  # fmt: skip
PRELUDE = r"""
#define NOINLINE __attribute__((noinline, noclone))
#define WARN(flags) asm volatile("1: ud2\n.pushsection __bug_table,\"aw\"\n2: .long 1b - .\n.long %c0 - .\n" \
    ".word %c1\n.word %c2\n.org 2b + 12\n.popsection" : : "i" (__FILE__), "i" (__LINE__), "i" (flags))
int printk(const char *text, ...);
void leave(int), enter(int), other(int);
"""
Change = Callable[[str | Mapping[str, str], str | Mapping[str, str]], CodeChange]


@pytest.fixture
def build(tmp_path: Path) -> Callable[..., CodeRecord]:
    numbers = itertools.count()

    def make(sources: str | Mapping[str, str], *more: str) -> CodeRecord:
        folder = tmp_path / str(next(numbers))
        folder.mkdir()
        objects = {}
        for name, text in ({"a.c": sources} if isinstance(sources, str) else sources).items():
            (folder / name).write_text(PRELUDE * name.endswith(".c") + text)
            subprocess.run(["gcc", *FLAGS, *more, "-c", name], cwd=folder, check=True)
            objects[name[:-2] + ".o"] = record_object((folder / name).with_suffix(".o"))
        return CodeRecord(objects, "gcc", "CONFIG_X=y")

    return make


@pytest.fixture
def change(build: Callable[..., CodeRecord]) -> Change:
    return lambda old, new: compare(build(old), build(new))


def symbols(change: CodeChange) -> dict[str, list[str]]:
    kinds = ("changed", "grew", "shrank", "added", "removed")
    return {kind: [d.symbol for d in getattr(change, kind)] for kind in kinds if getattr(change, kind)}


# --- what is no change

CALLS = """
NOINLINE static int first(int x) { return x * 3 + 1; }
NOINLINE static int second(int x) { WARN(7); return first(x) + first(x + 1); }
int third(int x) { return second(x) + first(x); }
int (*const table[])(int) = { first, second, third };
"""


def test_comment_and_whitespace_are_none(change: Change) -> None:
    moved = "/* A\n * comment. */\n\n" + CALLS.replace("return x * 3 + 1;", "\n\n\treturn x * 3\n+ 1;\n")
    found = change(CALLS, moved)
    assert found.identical
    assert found.renamed == ()
    assert found.text() == "code: identical for this configuration and compiler (1 objects)"


def test_rename_of_a_static_function_is_told_and_no_change(change: Change) -> None:
    found = change(CALLS, CALLS.replace("first", "a_better_name"))
    assert found.identical
    assert [(r.file, r.old, r.new) for r in found.renamed] == [("a.o", "first", "a_better_name")]
    assert "renamed: first → a_better_name" in found.text()


def test_rename_of_a_local_variable_is_none(change: Change) -> None:
    found = change("int f(int x) { int a = x * x; return a + x; }", "int f(int x) { int abc = x * x; return abc + x; }")
    assert found.identical
    assert not found.renamed


TWO = {
    "a.c": "int shared(int x) { return x * 5; }",
    "b.c": "int shared(int); int user(int x) { return shared(x) + 1; }",
}


def test_rename_of_a_global_function_in_all_files_is_none(change: Change) -> None:
    found = change(TWO, {name: text.replace("shared", "renamed") for name, text in TWO.items()})
    assert found.identical
    assert [(r.old, r.new) for r in found.renamed] == [("shared", "renamed")]


def test_call_that_does_not_follow_a_rename_is_a_change(change: Change) -> None:
    new = {"a.c": TWO["a.c"].replace("shared", "renamed"), "b.c": TWO["b.c"]}
    assert symbols(change(TWO, new)) == {"changed": ["user"]}


def test_call_of_another_of_two_equal_functions_is_a_change(change: Change) -> None:
    old = "NOINLINE static int a(int x) { return x * 9; } NOINLINE static int b(int x) { return x * 9; }"
    old = old.replace("static", "")
    found = change(f"{old} int f(int x) {{ return a(x) - 1; }}", f"{old} int f(int x) {{ return b(x) - 1; }}")
    assert symbols(found) == {"changed": ["f"]}


def test_static_that_becomes_global_is_none(change: Change) -> None:
    assert change(CALLS, CALLS.replace("NOINLINE static int first", "NOINLINE int first")).identical


def test_func_follows_its_function(change: Change) -> None:
    old = 'NOINLINE static int f(int x) { printk("%s: x\\n", __func__); printk(__func__); return x * 3; }'
    old += "static const long after[] = { 1, 2, 3 }; long g(int n) { return after[n] + f(n); }"
    assert change(old, old.replace(" f(", " longer_name(")).identical
    assert not change(old, old.replace("__func__", '__func__ + 1', 1)).identical


def test_function_at_another_place_is_told_and_no_change(change: Change) -> None:
    parts = [f"NOINLINE int f{n}(int x) {{ return x * {n * 7 + 3}; }}" for n in range(4)]
    user = "int user(int x) { return f0(x) + f1(x) + f2(x) + f3(x); }"
    found = change("\n".join([*parts, user]), "\n".join([parts[1], parts[2], parts[0], parts[3], user]))
    assert found.identical
    assert [d.symbol for d in found.moved] == ["f0"]


KASAN = (
    "-fsanitize=kernel-address", "-fasan-shadow-offset=0xdffffc0000000000", "--param=asan-stack=1",
    "--param=asan-globals=1", "--param=asan-instrumentation-with-call-threshold=10000",
)  # fmt: skip
VARIABLES = """
void fill(int *); static int counter; const char *const names[] = { "zero", "first", "another" };
int f(void) { int one[4], two; fill(one); fill(&two); printk("some text"); return one[1] + two + counter++; }
int g(int n) { printk(names[n]); printk("another text"); WARN(4); return 0; }
"""


def test_names_and_lines_of_variables_under_kasan_are_none(build: Callable[..., CodeRecord]) -> None:
    old = build(VARIABLES, *KASAN)
    texts = [t for o in old.objects.values() for item in o.items for t in item.targets if "KASAN frame" in t]
    assert len(texts) == 1
    found = compare(old, build("/* Two\n * lines. */\n" + VARIABLES.replace("two", "second"), *KASAN))
    assert found.identical, found.text()
    found = compare(old, build(VARIABLES.replace("counter", "number"), *KASAN))
    assert found.identical, found.text()
    for good, bad in (("one[4]", "one[5]"), ("some text", "same text"), ('"first"', '"farst"'), ("WARN(4)", "WARN(5)")):
        assert not compare(old, build(VARIABLES.replace(good, bad), *KASAN)).identical, bad


# --- what is one

OPCODES = """
struct opcode { unsigned long flags; int (*execute)(int); };
static int em_add(int x) { return x + 7; }
static int em_sub(int x) { return x - 7; }
static const struct opcode group[] = { { 0x10, em_sub }, { 0x30, em_add } };
static const struct opcode opcode_table[] = { { 0x100, em_add }, { 0x200, em_sub }, { 4, (void *)group } };
int decode(int n) { return opcode_table[n].flags + opcode_table[n].execute(n); }
int unrelated(int n) { return n * n; }
"""


@pytest.mark.parametrize(("old", "new", "table"), [
    ("{ 0x200, em_sub }", "{ 0x201, em_sub }", "opcode_table"),
    ("{ 0x200, em_sub }", "{ 0x200, em_add }", "opcode_table"),
    ("{ 0x30, em_add }", "{ 0x30, em_sub }", "group"),
    ("{ 0x30, em_add }", "{ 0x20, em_add }", "group"),
])  # fmt: skip
def test_one_flag_or_pointer_of_a_table(change: Change, old: str, new: str, table: str) -> None:
    found = change(OPCODES, OPCODES.replace(old, new))
    assert symbols(found) == {"changed": [table]}
    assert found.changed[0].users == ("decode",)
    assert found.functions == ()
    assert f"data {table}: changed" in found.text()


def test_other_function_is_called(change: Change) -> None:
    old = "void f(int x) { enter(x); leave(x); } void g(int x) { leave(x + 1); }"
    assert symbols(change(old, old.replace("leave(x)", "other(x)"))) == {"changed": ["f"]}


def test_offset_into_the_same_object(change: Change) -> None:
    old = "extern int far[]; int f(void) { return far[2]; }"
    assert symbols(change(old, old.replace("far[2]", "far[3]"))) == {"changed": ["f"]}


STRINGS = 'void f(void) { printk("one\\n"); } void g(void) { printk("two\\n"); printk("three\\n"); }'


def test_text_of_a_message(change: Change) -> None:
    assert symbols(change(STRINGS, STRINGS.replace("three", "3"))) == {"changed": ["g"]}
    assert symbols(change(STRINGS, STRINGS.replace("three", "tnree"))) == {"changed": ["g"]}


def test_message_before_others_moves_them_and_changes_only_its_function(change: Change) -> None:
    found = change(STRINGS, 'void e(void) { printk("first of all\\n"); }' + STRINGS)
    assert symbols(found) == {"added": ["e"]}


def test_grown_function_is_the_only_one_though_all_after_it_move(change: Change) -> None:
    found = change(CALLS, CALLS.replace("return x * 3 + 1;", "enter(x); leave(x * 77); return x * 3 + 1;"))
    assert symbols(found) == {"grew": ["first"]}
    assert found.functions == ("first",)
    assert "function first: grew, " in found.text()
    assert symbols(change(CALLS.replace("x * 3 + 1", "x * 3 * x / 7 + 1"), CALLS)) == {"shrank": ["first"]}


def test_function_that_is_gone_and_one_that_is_new(change: Change) -> None:
    old = "int keep(int x) { return x * 3; } int drop(int x) { return x / 3; }"
    new = "int keep(int x) { return x * 3; } int make(int x) { return x % 5 * 7; }"
    assert symbols(change(old, new)) == {"removed": ["drop"], "added": ["make"]}


def test_object_of_its_own(change: Change) -> None:
    both = {**TWO, "c.c": "int more; int extra(void) { return more; }"}
    assert symbols(change(TWO, both)) == {"added": ["extra", "more"]}
    assert symbols(change(both, TWO)) == {"removed": ["extra", "more"]}


def test_function_that_goes_to_another_file_is_told(change: Change) -> None:
    moved = "int moved(int x) { return x * 77; }"
    found = change({"a.c": TWO["a.c"] + moved, "b.c": TWO["b.c"]}, {"a.c": TWO["a.c"], "b.c": TWO["b.c"] + moved})
    assert symbols(found) == {"removed": ["moved"], "added": ["moved"]}
    assert "the same in another object: moved (a.o → b.o)" in found.text()
    other = moved.replace("77", "78")
    found = change({"a.c": TWO["a.c"] + moved, "b.c": TWO["b.c"]}, {"a.c": TWO["a.c"], "b.c": TWO["b.c"] + other})
    assert "the same in another object" not in found.text()


SWITCH = "int pad(int x) { return x + 1; }\nint f(int n) { switch (n) {\n" + "".join(
    f"case {n}: {('enter', 'leave', 'other')[n % 3]}({n * n}); return {n * 31 % 17};\n" for n in range(12)
) + "} return 9; }\nint g(int x) { return x * 3; }"  # fmt: skip


def test_jump_table_of_a_switch(change: Change) -> None:
    assert change(SWITCH, SWITCH.replace("f(int", "renamed(int")).identical
    assert symbols(change(SWITCH, SWITCH.replace("x + 1", "x / 3 + x % 7"))) == {"grew": ["pad"]}
    swapped = SWITCH.replace("case 3:", "case X:").replace("case 6:", "case 3:").replace("case X:", "case 6:")
    found = change(SWITCH, swapped)
    assert found.functions == ("f",)
    assert not found.identical


def test_only_the_jump_table_differs(build: Callable[..., CodeRecord], tmp_path: Path) -> None:
    """The same instructions, two entries exchanged."""
    old = build(SWITCH)
    path = tmp_path / "0" / "a.o"
    elf = read_object(path)
    section = next(s for s in elf.sections if s.name == ".rela.rodata")
    image = bytearray(path.read_bytes())
    third, sixth = (slice(section.offset + 24 * n + 16, section.offset + 24 * n + 24) for n in (3, 6))
    image[third], image[sixth] = image[sixth], image[third]
    path.write_bytes(image)
    found = compare(old, CodeRecord({"a.o": record_object(path)}, "gcc", "CONFIG_X=y"))
    assert symbols(found) == {"changed": [".rodata of f"]}
    assert found.functions == ("f",)


STATICS = """
void f(void) { static int once; if (!once++) enter(1); }
void g(void) { static int once; if (!once++) enter(2); }
"""


def test_static_variable_before_others_of_its_name(change: Change) -> None:
    found = change(STATICS, "void e(void) { static int once; if (!once++) enter(0); }" + STATICS)
    assert symbols(found) == {"added": ["e", "once of e"]}


def test_neighbours_in_memory_are_not_confused(change: Change) -> None:
    """An immediate follows the displacement here: by relocation alone the operand might be the byte before it."""
    old = "static volatile char a = 1, b = 2, c = 3;\nint f(void) { if (a == 9) return 1; b = 5; c = 6; return 0; }"
    assert symbols(change(old, old.replace("b = 5; c = 6", "c = 5; b = 6")))["changed"] == ["f"]
    assert symbols(change(old, old.replace("a == 9", "b == 9")))["changed"] == ["f"]
    before = "static volatile int z = 4; int h(void) { return z; }"
    assert symbols(change(old, before + old)) == {"added": ["h", "z"]}


def test_order_of_data_counts(change: Change) -> None:
    old = "int a[3] = { 1 }; int b[3] = { 2 };"
    found = change(old, "int b[3] = { 2 }; int a[3] = { 1 };")
    assert not found.identical
    assert found.changed[0].moved
    assert "at another place in .data" in found.text()


def test_variable_that_grew(change: Change) -> None:
    old = "int zeroes[4]; int f(void) { return zeroes[2]; }"
    assert symbols(change(old, old.replace("[4]", "[6]"))) == {"grew": ["zeroes"]}


def test_variable_that_becomes_read_only(change: Change) -> None:
    old = "int value = 5; int f(void) { return *(volatile int *)&value; }"
    assert symbols(change(old, old.replace("int value", "const int value"))) == {"changed": ["value"]}


def test_weak_function_that_becomes_strong(change: Change) -> None:
    old = "__attribute__((weak)) int f(int x) { return x + 2; }"
    assert symbols(change(old, old.replace("__attribute__((weak))", ""))) == {"changed": ["f"]}


def test_flags_of_a_warning_count_its_line_does_not(change: Change) -> None:
    found = change(CALLS, CALLS.replace("WARN(7)", "WARN(3)"))
    assert symbols(found) == {"changed": ["__bug_table of second"]}
    assert found.functions == ("second",)
    assert "table __bug_table of second: changed" in found.text()


EXCEPTION = r"""
int f(int *p) { int v; asm volatile("1: mov %1, %0\n nop\n2: inc %0\n3: nop\n.pushsection __ex_table,\"a\"\n"
    ".long 1b - .\n.long 2b - .\n.long 4\n.popsection" : "=r" (v) : "m" (*p)); return v; }
int g(int x) { return x; }
"""


@pytest.mark.parametrize(("old", "new"), [(".long 2b", ".long 3b"), (".long 4", ".long 5")])
def test_exception_table(change: Change, old: str, new: str) -> None:
    found = change(EXCEPTION, EXCEPTION.replace(old, new))
    assert symbols(found) == {"changed": ["__ex_table of f"]}
    assert symbols(change(EXCEPTION, EXCEPTION.replace("return x;", "return x / 3;"))) == {"grew": ["g"]}
    assert symbols(change(EXCEPTION, "int e(int x) { return x / 3; }" + EXCEPTION)) == {"added": ["e"]}


ALTERNATIVE = r"""
int f(int v) { asm volatile("1: nop\n nop\n nop\n2:\n.pushsection .altinstructions,\"a\"\n.long 1b - .\n.long 3f - .\n"
    ".word 17\n .word 0\n .byte 2b-1b, 4f-3f\n.popsection\n.pushsection .altinstr_replacement,\"ax\"\n3: inc %0\n4:\n"
    ".popsection" : "+r" (v)); return v; }
"""


@pytest.mark.parametrize(("old", "new", "name"), [
    (".word 17", ".word 18", ".altinstructions of f"), ("3: inc", "3: dec", ".altinstr_replacement of f"),
])  # fmt: skip
def test_alternatives(change: Change, old: str, new: str, name: str) -> None:
    found = change(ALTERNATIVE, ALTERNATIVE.replace(old, new))
    assert symbols(found) == {"changed": [name]}
    assert found.functions == ("f",)
    assert change(ALTERNATIVE, ALTERNATIVE.replace("int f(", "int g(")).identical


ASSEMBLY = {"a.S": """
.text
.globl first, second, alias
.type first, @function
first: inc %eax
       jmp second
.size first, . - first
.type second, @function
second: dec %eax
alias: ret
.size second, . - second
"""}


def test_assembly(change: Change) -> None:
    text = ASSEMBLY["a.S"]
    assert change(ASSEMBLY, {"a.S": text.replace("second", "other").replace(".text", ".text\n# comment")}).identical
    found = change(ASSEMBLY, {"a.S": text.replace("dec %eax", "inc %eax")})
    assert symbols(found) == {"changed": ["second"]}
    found = change(ASSEMBLY, {"a.S": text.replace("alias: ret", "ret\nalias:")})
    assert not found.identical


def test_order_of_functions_counts_in_assembly(change: Change) -> None:
    one = "\n.type one, @function\none: inc %eax\n.size one, . - one\n"
    halves = [one, one.replace("one", "two").replace("inc", "dec")]
    assert not change({"a.S": "".join(halves)}, {"a.S": "".join(reversed(halves))}).identical


def test_order_of_objects_counts(build: Callable[..., CodeRecord]) -> None:
    old = build(TWO)
    new = CodeRecord(dict(reversed(old.objects.items())), old.compiler, old.configuration)
    found = compare(old, new)
    assert not found.identical
    assert "order of objects: at another place" in found.text()


# --- nothing goes unseen

EVERYTHING = CALLS + OPCODES + SWITCH.replace("int f(", "int s(") + STRINGS.replace("f(", "t(").replace("g(", "u(") + (
    EXCEPTION.replace("f(", "v(").replace("g(", "w(") + ALTERNATIVE.replace("f(", "alternative(")
)  # fmt: skip


def test_every_byte_counts(build: Callable[..., CodeRecord], tmp_path: Path) -> None:
    """Each byte of each section, inverted: a difference, but for line numbers, alignment, and what relocations fill."""
    old = build(EVERYTHING)
    path = tmp_path / "0" / "a.o"
    elf = read_object(path)
    image = path.read_bytes()
    unseen: list[tuple[str, int]] = []
    for section in elf.sections:
        if not section.flags & SHF_ALLOC or section.type == SHT_NOBITS:
            continue
        filled = {
            offset for r in elf.relocations.get(section.number, ())
            for offset in range(r.offset, r.offset + (8 if r.type == 1 else 4))
        }  # fmt: skip
        for offset in set(range(section.size)) - filled:
            broken = bytearray(image)
            broken[section.offset + offset] ^= 0xFF
            path.write_bytes(broken)
            if compare(old, CodeRecord({"a.o": record_object(path)}, "gcc", "")).identical:
                unseen.append((section.name, offset))
    assert {offset % 12 for name, offset in unseen if name == "__bug_table"} == {8, 9}
    assert {name for name, _ in unseen} <= {"__bug_table", ".text"}
    covered = {
        offset for s in elf.symbols if s.size and elf.sections[s.section].name == ".text"
        for offset in range(s.value, s.value + s.size)
    }  # fmt: skip
    assert not {offset for name, offset in unseen if name == ".text"} & covered


def test_every_relocation_counts(build: Callable[..., CodeRecord], tmp_path: Path) -> None:
    """Each relocation of a section that is loaded, with another addend, another symbol, another type."""
    old = build(EVERYTHING)
    path = tmp_path / "0" / "a.o"
    elf = read_object(path)
    image = path.read_bytes()
    loaded = {s.number for s in elf.sections if s.flags & SHF_ALLOC}
    tried = 0
    for section in elf.sections:
        if section.type != 4 or section.info not in loaded:
            continue
        for place in range(section.offset, section.offset + section.size, 24):
            offset, kind, symbol, addend = struct.unpack_from("<QIIq", image, place)
            other = next(n for n, s in enumerate(elf.symbols) if s.name == "other")
            for row in (
                (offset, kind, symbol, addend + 1),
                (offset, kind, other if symbol != other else 0, addend),
                (offset, 10 if kind in (2, 4) else 2, symbol, addend),
            ):
                broken = bytearray(image)
                struct.pack_into("<QIIq", broken, place, *row)
                path.write_bytes(broken)
                tried += 1
                new = CodeRecord({"a.o": record_object(path)}, "gcc", "")
                assert not compare(old, new).identical, (elf.sections[section.info].name, row)
    assert tried > 100


# --- records


def test_record_goes_through_json(build: Callable[..., CodeRecord]) -> None:
    found = build(EVERYTHING)
    again = CodeRecord.from_json(json.loads(json.dumps(found.to_json())))
    assert again == found
    assert compare(found, again).identical
    with pytest.raises(ValueError, match="another version"):
        CodeRecord.from_json(found.to_json() | {"format": 0})


def test_change_goes_to_json(change: Change) -> None:
    found = json.loads(json.dumps(change(OPCODES, OPCODES.replace("0x200", "0x201")).to_json()))
    assert found["identical"] is False
    assert found["changed"][0]["symbol"] == "opcode_table"


def test_other_compiler_and_configuration_are_told(build: Callable[..., CodeRecord]) -> None:
    old = build("int f;")
    text = compare(old, CodeRecord(old.objects, "clang", "CONFIG_X=y\nCONFIG_Y=y")).text()
    assert "compilers differ: gcc and clang" in text
    assert "configurations differ: +CONFIG_Y=y" in text


@pytest.mark.parametrize("content", [b"", b"int f;", b"\x7fELF\2\1" + bytes(90)])
def test_file_that_is_no_object(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.o").write_bytes(content)
    with pytest.raises(ObjectError):
        record_object(tmp_path / "a.o")


def test_damaged_object(build: Callable[..., CodeRecord], tmp_path: Path) -> None:
    build(CALLS)
    path = tmp_path / "0" / "a.o"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ObjectError, match="damaged"):
        record_object(path)


# --- build directories


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """As kbuild leaves it: vmlinux.a, a module of two parts, host tools that do not count."""
    root = tmp_path / "build"
    for name, text in {
        "kernel/fork.c": "int fork(void) { return 1; }", "lib/list.c": "int list(void) { return 2; }",
        "drivers/m_a.c": "int a(void) { return 3; }", "drivers/m_b.c": "int b(void) { return 4; }",
        "drivers/m.mod.c": "int mod;", "scripts/tool.c": "int tool(void) { return 5; }",
    }.items():  # fmt: skip
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
        compile_in(root, name)
    ar = ["ar", "cDPrST"]
    subprocess.run([*ar, "kernel/built-in.a", "kernel/fork.o"], cwd=root, check=True)
    subprocess.run([*ar, "vmlinux.a", "kernel/built-in.a"], cwd=root, check=True)
    subprocess.run([*ar, "lib/lib.a", "lib/list.o"], cwd=root, check=True)
    (root / ".vmlinux.o.cmd").write_text("savedcmd_vmlinux.o := ld -r -o vmlinux.o vmlinux.a --start-group lib/lib.a\n")
    (root / "modules.order").write_text("drivers/m.o\n")
    (root / "drivers/m.mod").write_text("drivers/m_a.o\ndrivers/m_b.o\n")
    (root / ".config").write_text('CONFIG_CC_VERSION_TEXT="gcc 12"\nCONFIG_KVM=y\n')
    return root


def compile_in(root: Path, name: str) -> None:
    subprocess.run(["gcc", *FLAGS, "-c", name, "-o", name[:-2] + ".o"], cwd=root, check=True)


def test_what_counts_of_a_build(directory: Path) -> None:
    found = record(directory)
    assert [*found.objects] == ["kernel/fork.o", "lib/list.o", "drivers/m_a.o", "drivers/m_b.o"]
    assert found.compiler == "gcc 12"


def test_unchanged_objects_are_not_read_again(directory: Path) -> None:
    old = record(directory)
    (directory / "lib/list.c").write_text("int list(void) { return 20; }")
    compile_in(directory, "lib/list.c")
    new = record(directory, old)
    assert new.objects["kernel/fork.o"] is old.objects["kernel/fork.o"]
    assert symbols(compare(old, new)) == {"changed": ["list"]}
    assert compare(old, new).changed[0].file == "lib/list.o"


def test_linker_script_counts(directory: Path) -> None:
    script = directory / "arch/x86/kernel/vmlinux.lds"
    script.parent.mkdir(parents=True)
    script.write_text("SECTIONS { .text : { *(.text) } }\n")
    old = record(directory)
    script.write_text("SECTIONS { .text : { *(.init.text) } }\n")
    found = compare(old, record(directory, old))
    assert [d.symbol for d in found.differences] == ["vmlinux.lds"]


def test_boot_code_that_holds_the_kernels_addresses_is_compared_by_its_sources(directory: Path) -> None:
    boot = directory / "arch/x86/boot"
    (boot / "compressed").mkdir(parents=True)
    (boot / "compressed/misc.c").write_text('#include "../voffset.h"\nlong end = VO__end;')
    (boot / "compressed/.vmlinux.cmd").write_text("cmd := ld arch/x86/boot/compressed/misc.o -o vmlinux\n")
    (boot / "compressed/.misc.o.cmd").write_text(
        "deps := arch/x86/boot/compressed/misc.c arch/x86/boot/compressed/../voffset.h\n"
    )

    def made(end: int) -> CodeRecord:
        (boot / "voffset.h").write_text(f"#define VO__end {end}")
        compile_in(directory, "arch/x86/boot/compressed/misc.c")
        return record(directory)

    assert compare(made(1000), made(2000)).identical
    old = made(1000)
    (boot / "compressed/misc.c").write_text('#include "../voffset.h"\nlong end = VO__end + 1;')
    assert symbols(compare(old, made(1000))) == {"grew": ["misc.c"]}


@pytest.mark.parametrize("bits", ["-m16", "-m32"])
def test_the_setups_code_is_the_same_wherever_it_was_built(tmp_path: Path, bits: str) -> None:
    """Its objects are compared whole, but for debugging information: lines, and the folder of the sources."""

    def made(folder: str, text: str) -> str:
        path = tmp_path / folder / "regs.o"
        path.parent.mkdir()
        (path.parent / "regs.c").write_text(text)
        source = str(path.parent / "regs.c")
        subprocess.run(["gcc", bits, "-O2", "-g", "-fno-pie", "-ffreestanding", "-c", source, "-o", path], check=True)
        return whole_file(path, without=str(tmp_path / folder)).digest

    before = made("one", "int two(void) { return 2; }\n")
    assert made("another", "/* says 2 */\nint two(void) { return 2; }\n") == before
    assert made("third", "int two(void) { return 3; }\n") != before


def test_directory_without_a_build(tmp_path: Path) -> None:
    with pytest.raises(LabInputError, match="no finished build"):
        record(tmp_path)


def test_archive_of_another_kind(directory: Path) -> None:
    (directory / "vmlinux.a").write_text("nothing")
    with pytest.raises(LabInputError, match="no archive of kbuild"):
        record(directory)
