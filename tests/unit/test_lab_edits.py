"""Kernel edits: what is read, where an anchor is looked for, and that a tree which has moved on is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.lab.edits import EDITS, MUTANTS, Change, Edit, EditError, KernelRange, edited, load, load_all, named

SOURCE = """\
#define SUPPORTED	(MASK_FP | MASK_SSE \\
			| MASK_YMM)

#define OTHER	(MASK_FP)

static const struct opcode table[256] = {
	I(DstMem | SrcReg, em_add),
	I(DstMem | SrcReg | Lock, em_xadd),
};

static int first(struct ctxt *ctxt)
{
	ctxt->value = read(ctxt,
			1);
	return 0;
}

int second(struct ctxt *ctxt)
{
	ctxt->value = read(ctxt, 1);
	first(ctxt);
	return 0;
}
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "a.c").write_text(SOURCE)
    return tmp_path


def edit(*changes: Change, kernels: str = "7.2..") -> Edit:
    return Edit("some-edit", "Some edit", KernelRange.parse(kernels), changes)


def change(
    find: str, text: str, *, mode: str = "replace", within: str = "", unless: str = "", file: str = "a.c"
) -> Change:
    return Change(file, find, mode, text, within, unless)


# --- ranges of kernels


@pytest.mark.parametrize(
    ("text", "meant", "not_meant"),
    [
        ("6.1", [(6, 1)], [(6, 2), (6, 12), (7, 1)]),
        ("6.1..6.12", [(6, 1), (6, 6), (6, 12)], [(6, 0), (6, 13), (7, 0)]),
        ("7.2..", [(7, 2), (7, 10), (8, 0)], [(7, 1), (6, 20)]),
        ("6.1, 7.3..", [(6, 1), (7, 3)], [(6, 12)]),
    ],
)
def test_range_of_kernels(text: str, meant: list[tuple[int, int]], not_meant: list[tuple[int, int]]) -> None:
    parsed = KernelRange.parse(text)
    assert all(series in parsed for series in meant)
    assert not any(series in parsed for series in not_meant)


@pytest.mark.parametrize("text", ["", "7", "..7.2", "7.2...", "7.2-7.3", "seven"])
def test_range_that_is_none(text: str) -> None:
    with pytest.raises(ValueError, match="no range of kernels"):
        KernelRange.parse(text)


# --- applying


def test_replacement_changes_only_its_place(tree: Path) -> None:
    texts = edited([edit(change("em_add", "em_sub"))], tree, (7, 3)).texts
    assert texts == {"a.c": SOURCE.replace("em_add", "em_sub")}
    assert (tree / "a.c").read_text() == SOURCE


def test_blanks_in_an_anchor_match_any_blanks(tree: Path) -> None:
    texts = edited([edit(change("value = read(ctxt, 1);", "value = 2;", within="first"))], tree, (7, 3)).texts
    assert texts["a.c"].count("value = 2;") == 1
    assert "read(ctxt, 1)" in texts["a.c"]


@pytest.mark.parametrize("mode", ["before", "after"])
def test_text_beside_an_anchor_is_a_line_of_its_own(tree: Path, mode: str) -> None:
    text = "\textra();"
    new = edited([edit(change("first(ctxt);", text, mode=mode))], tree, (7, 3)).texts["a.c"]
    assert [line.strip() for line in new.splitlines() if line not in SOURCE.splitlines()].count("extra();") == 1
    order = ("extra();", "first(ctxt);") if mode == "before" else ("first(ctxt);", "extra();")
    assert new.index(order[0]) < new.index(order[1])


@pytest.mark.parametrize("within", ["first", "second", "table", "SUPPORTED"])
def test_anchor_is_looked_for_in_its_block_only(tree: Path, within: str) -> None:
    anchors = {"first": "return 0;", "second": "return 0;", "table": "em_add", "SUPPORTED": "MASK_FP"}
    new = edited([edit(change(anchors[within], "CHANGED", within=within))], tree, (7, 3)).texts["a.c"]
    before, _, rest = new.partition("CHANGED")
    assert within in before
    assert "CHANGED" not in rest
    nearest = max(("first(struct", "second(struct", "table[", "SUPPORTED", "OTHER"), key=before.rfind)
    assert nearest.startswith(within)


def test_a_call_is_not_taken_for_the_function(tree: Path) -> None:
    (tree / "a.c").write_text(SOURCE.replace("static int first", "static int third"))
    with pytest.raises(EditError, match="has 0 blocks named first"):
        edited([edit(change("return 0;", "return 1;", within="first"))], tree, (7, 3))


def test_words_are_whole(tree: Path) -> None:
    with pytest.raises(EditError, match="0 times"):
        edited([edit(change("em_ad", "em_sub"))], tree, (7, 3))


def test_anchor_that_is_gone_is_named(tree: Path) -> None:
    with pytest.raises(EditError) as caught:
        edited([edit(change("return 0;", "", within="first"), change("em_or", "em_and", within="table"))], tree, (7, 3))
    said = str(caught.value)
    assert "some-edit" in said
    assert "a.c, in table" in said
    assert "'em_or'" in said
    assert "0 times" in said


def test_anchor_elsewhere_is_pointed_at(tree: Path) -> None:
    with pytest.raises(EditError, match="elsewhere in the file at line 7"):
        edited([edit(change("em_add", "em_sub", within="second"))], tree, (7, 3))


def test_anchor_that_is_there_twice_is_refused(tree: Path) -> None:
    with pytest.raises(EditError, match=r"2 times instead of once \(at line 15, 22\)"):
        edited([edit(change("return 0;", "return 1;"))], tree, (7, 3))


def test_file_that_is_gone_is_named(tree: Path) -> None:
    with pytest.raises(EditError, match=r"some-edit does not fit this tree: b\.c"):
        edited([edit(change("x", "y", file="b.c"))], tree, (7, 3))


def test_kernel_that_is_not_meant(tree: Path) -> None:
    with pytest.raises(EditError, match=r"is for Linux 7.2 and later; .* is 6.12"):
        edited([edit(change("em_add", "em_sub"))], tree, (6, 12))


def test_edits_build_on_each_other(tree: Path) -> None:
    edits = [edit(change("em_add", "em_sub")), edit(change("em_sub", "em_cmp"))]
    assert "em_cmp" in edited(edits, tree, (7, 3)).texts["a.c"]
    with pytest.raises(EditError):
        edited(edits[1:], tree, (7, 3))


def test_what_the_tree_has_already_is_left_alone(tree: Path) -> None:
    both = edit(
        change("MASK_FP", "MASK_FP | MASK_APX", within="SUPPORTED", unless="MASK_APX"),
        change("em_add", "em_sub", unless="em_sub"),
    )
    assert edited([both], tree, (7, 3)).already_there == ()
    (tree / "a.c").write_text(SOURCE.replace("MASK_YMM", "MASK_APX").replace("em_add", "em_sub"))
    result = edited([both], tree, (7, 3))
    assert result.already_there == ("some-edit",)
    assert result.texts == {}


def test_already_there_counts_in_its_own_block(tree: Path) -> None:
    (tree / "a.c").write_text(SOURCE.replace("#define OTHER	(MASK_FP)", "#define OTHER	(MASK_APX)"))
    wanted = edit(change("MASK_FP", "MASK_FP | MASK_APX", within="SUPPORTED", unless="MASK_APX"))
    assert "(MASK_FP | MASK_APX | MASK_SSE" in edited([wanted], tree, (7, 3)).texts["a.c"]


def test_bytes_that_are_no_utf8_survive(tree: Path) -> None:
    (tree / "a.c").write_bytes(b"/* J\xf6rg */\n" + SOURCE.encode())
    text = edited([edit(change("em_add", "em_sub"))], tree, (7, 3)).texts["a.c"]
    assert text.encode(errors="surrogateescape").startswith(b"/* J\xf6rg */\n")


def test_digest_follows_what_is_done() -> None:
    one, other = edit(change("a", "b")), edit(change("a", "c"))
    assert one.digest == edit(change("a", "b")).digest
    assert one.digest != other.digest


# --- reading

GOOD = """\
[[edit]]
name = "one"
title = "One"
kernels = "7.2.."
[[edit.change]]
file = "a.c"
find = "x"
replace = "y"
"""


def written(folder: Path, text: str, name: str = "edits.toml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('replace = "y"', "", "exactly one of replace, before, after"),
        ('replace = "y"', 'replace = "y"\nafter = "z"', "exactly one of replace, before, after"),
        ('find = "x"', 'find = " "', "find must be a text, and not an empty one"),
        ('file = "a.c"', 'file = "/etc/passwd"', "must be a path inside the tree"),
        ('file = "a.c"', 'file = "../a.c"', "must be a path inside the tree"),
        ('file = "a.c"', 'file = "a.c"\nunless = "("', "unless"),
        ('file = "a.c"', 'file = "a.c"\nfunction = "f"', "unknown key 'function'"),
        ('title = "One"', "", "title must be a text"),
        ('name = "one"', 'name = "One edit"', "small letters, digits and hyphens"),
        ('kernels = "7.2.."', 'kernels = "7.x"', "no range of kernels"),
        ('title = "One"', 'title = "One"\nclass = "5"', "class must be the number"),
        ('title = "One"', 'title = "One"\nconfigurations = "svm"', "configurations must be a list"),
        ("[[edit.change]]", "[[edit.changes]]", "unknown key 'changes'"),
        ("[[edit]]", "[[edits]]", "unknown key"),
        ('name = "one"', "name = one", "edits.toml"),
    ],
)
def test_file_that_is_wrong_says_where(tmp_path: Path, old: str, new: str, said: str) -> None:
    assert load(written(tmp_path, GOOD))[0].name == "one"
    with pytest.raises(EditError, match=r"edits\.toml") as caught:
        load(written(tmp_path, GOOD.replace(old, new)))
    assert said in str(caught.value)


def test_name_that_is_there_twice(tmp_path: Path) -> None:
    written(tmp_path, GOOD)
    written(tmp_path, GOOD, "more.toml")
    with pytest.raises(EditError, match=r"edit one is in edits\.toml too"):
        load_all(tmp_path)


def test_unknown_name_lists_the_known() -> None:
    with pytest.raises(EditError, match="apx-on-svm"):
        named("apx-on-vax")


# --- what is shipped


def test_seeded_bugs_say_what_they_break() -> None:
    mutants = load_all(MUTANTS)
    helpers = load_all(EDITS)
    assert len(mutants) >= 40
    assert sum(name.startswith("apx-") for name in mutants) >= 8
    for mutant in mutants.values():
        assert mutant.bug_class in range(1, 36), mutant.name
        assert mutant.configurations, mutant.name
        assert mutant.select or mutant.equivalent, mutant.name
        assert set(mutant.needs) <= set(helpers), mutant.name
    assert len({mutant.bug_class for mutant in mutants.values()}) >= 20
