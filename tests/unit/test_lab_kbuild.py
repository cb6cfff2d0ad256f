"""Building kernels from trees, tried on a toy tree whose `make` compiles one file: no kernel's source is needed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from harness.lab import kbuild, ksource
from harness.lab.cache import area
from harness.lab.edits import Change, Edit, EditError, KernelRange
from harness.lab.errors import LabError, LabInputError
from harness.lab.kbuild import BuildError, compile_errors, kernel_from_tree, wanted_symbols, workspace
from harness.lab.ksource import private_copy, release_of

MAKEFILE = """\
VERSION = 7
PATCHLEVEL = 3
SUBLEVEL = 9
EXTRAVERSION = -rc1
NAME = Toy

allnoconfig:
	@grep -vxFf Kconfig $(KCONFIG_ALLCONFIG) > $(KCONFIG_CONFIG)

bzImage:
	@mkdir -p $(O)/arch/x86/boot $(O)/arch/x86/kvm $(O)/include/config
	@echo "  CC      arch/x86/kvm/emulate.o"
	@gcc -Wall -Werror -c -o $(O)/arch/x86/kvm/emulate.o $(CURDIR)/arch/x86/kvm/emulate.c
	@echo 'savedcmd_arch/x86/kvm/x86.o := gcc -I$(CURDIR)/include -Werror -DX='"'"'"x"'"'"' -c -o x.o x.c ; tool' \\
		> $(O)/arch/x86/kvm/.x86.o.cmd
	@cp $(O)/arch/x86/kvm/emulate.o $(O)/vmlinux
	@cp $(O)/vmlinux $(O)/arch/x86/boot/bzImage
	@echo 7.3.9-rc1 > $(O)/include/config/kernel.release
	@touch $(O)/System.map

mrproper:
	@rm -rf .config include/config
"""
FILES = {
    "Makefile": MAKEFILE,
    "Kbuild": "",
    "Kconfig": "# lines that this tree does not take\n",
    "arch/x86/kvm/Kconfig": "",
    "arch/x86/kvm/emulate.c": "int emulate(void)\n{\n\treturn 0;\n}\n",
    "arch/x86/kvm/x86.c": "int x86;\n",
    "include/linux/kvm_host.h": "struct kvm_vcpu { int regs_avail; };\nenum kvm_reg { VCPU_REGS_RAX };\n",
    "scripts/tool.sh": "#!/bin/sh\n",
}
GIT = ("git", "-c", "user.name=T", "-c", "user.email=t@example.org", "-c", "init.defaultBranch=main")
EMULATE = "arch/x86/kvm/emulate.c"


@pytest.fixture(autouse=True)
def _private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVM_HARNESS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setattr(kbuild, "_check_tools", lambda: None)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "linux"
    for name, text in FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    (root / "scripts/tool.sh").chmod(0o755)
    return root


@pytest.fixture
def repository(tree: Path) -> Path:
    (tree / ".gitignore").write_text("*.o\n.config\n")
    git(tree, "init", "--quiet")
    git(tree, "add", "--all")
    git(tree, "commit", "--quiet", "--message", "first")
    return tree


def git(tree: Path, *arguments: str) -> str:
    return subprocess.run([*GIT, *arguments], cwd=tree, check=True, capture_output=True, text=True).stdout


def returns(value: str) -> Edit:
    """An edit that makes the toy's one function return something else."""
    change = Change(EMULATE, "return 0;", "replace", f"return {value};", "emulate")
    return Edit(f"returns-{value}", "Toy", KernelRange.parse("7.3"), (change,))


def everything(root: Path) -> dict[str, tuple[int, int, bytes]]:
    return {
        str(path.relative_to(root)): (path.stat().st_mtime_ns, path.stat().st_mode, path.read_bytes())
        for path in root.rglob("*")
        if path.is_file()
    }


def checked_out(tree: Path, revision: str | None = None, *edits: Edit) -> Path:
    copy = private_copy(tree)
    copy.checkout(copy.snapshot(revision), edits)
    return copy.source


# --- the private copy


@pytest.mark.parametrize("kind", ["tree", "repository"])
def test_copy_has_what_the_tree_has(kind: str, request: pytest.FixtureRequest) -> None:
    root = request.getfixturevalue(kind)
    (root / "link").symlink_to("Makefile")
    source = checked_out(root)
    assert {name: (source / name).read_text() for name in FILES} == FILES
    assert os.readlink(source / "link") == "Makefile"
    assert os.access(source / "scripts/tool.sh", os.X_OK)
    assert not os.access(source / "Makefile", os.X_OK)


@pytest.mark.parametrize("kind", ["tree", "repository"])
def test_copy_follows_the_tree_and_keeps_time_stamps_of_the_rest(kind: str, request: pytest.FixtureRequest) -> None:
    root = request.getfixturevalue(kind)
    source = checked_out(root)
    before = everything(source)
    (root / EMULATE).write_text("int emulate;\n")
    (root / "arch/x86/kvm/new.c").write_text("int new;\n")
    (root / "arch/x86/kvm/x86.c").unlink()
    os.utime(root / "Kbuild")  # touched, not changed
    assert checked_out(root) == source
    after = everything(source)
    assert after.keys() - before.keys() == {"arch/x86/kvm/new.c"}
    assert before.keys() - after.keys() == {"arch/x86/kvm/x86.c"}
    assert [name for name in before.keys() & after.keys() if before[name] != after[name]] == [EMULATE]
    assert after[EMULATE][0] > before[EMULATE][0]


@pytest.mark.parametrize("kind", ["tree", "repository"])
def test_snapshot_names_the_content(kind: str, request: pytest.FixtureRequest) -> None:
    root = request.getfixturevalue(kind)
    copy = private_copy(root)
    first = copy.snapshot(None)
    os.utime(root / EMULATE)
    assert copy.snapshot(None) == first
    (root / EMULATE).write_text("int emulate;\n")
    second = copy.snapshot(None)
    assert second != first
    (root / EMULATE).write_text(FILES[EMULATE])
    assert copy.snapshot(None) == first


def test_users_repository_is_not_written(repository: Path) -> None:
    (repository / EMULATE).write_text("int emulate;\n")
    (repository / "untracked.c").write_text("")
    (repository / "Kbuild").write_text("# staged\n")
    git(repository, "add", "Kbuild")
    before = everything(repository)
    checked_out(repository)
    checked_out(repository, "HEAD")
    after = everything(repository)
    assert {name: entry[2] for name, entry in after.items()} == {name: entry[2] for name, entry in before.items()}
    # git renews the time stamps of objects that it would have written, wherever it finds them.
    assert [name for name in before if before[name] != after[name] and not name.startswith(".git/objects/")] == []


def test_what_git_ignores_is_left_out(repository: Path) -> None:
    (repository / "arch/x86/kvm/emulate.o").write_text("object")
    (repository / ".config").write_text("CONFIG_X=y\n")
    source = checked_out(repository)
    assert not (source / "arch/x86/kvm/emulate.o").exists()
    assert not (source / ".config").exists()


def test_revision_leaves_uncommitted_changes_out(repository: Path) -> None:
    (repository / EMULATE).write_text("int second;\n")
    git(repository, "commit", "--quiet", "--all", "--message", "second")
    (repository / EMULATE).write_text("int uncommitted;\n")
    assert (checked_out(repository) / EMULATE).read_text() == "int uncommitted;\n"
    assert (checked_out(repository, "HEAD") / EMULATE).read_text() == "int second;\n"
    assert (checked_out(repository, "HEAD~1") / EMULATE).read_text() == FILES[EMULATE]


def test_linked_worktree_is_a_tree_too(repository: Path, tmp_path: Path) -> None:
    git(repository, "worktree", "add", "--quiet", "--detach", str(tmp_path / "other"))
    (tmp_path / "other" / EMULATE).write_text("int other;\n")
    assert (checked_out(tmp_path / "other") / EMULATE).read_text() == "int other;\n"
    assert (checked_out(repository) / EMULATE).read_text() == FILES[EMULATE]


def test_built_tree_leaves_its_products_behind(tree: Path) -> None:
    (tree / "arch/x86/kvm/emulate.o").write_text("object")
    (tree / ".config").write_text("CONFIG_X=y\n")
    (tree / "include/config").mkdir()
    (tree / "include/config/auto.conf").write_text("")
    source = checked_out(tree)
    assert not (source / "arch/x86/kvm/emulate.o").exists()
    assert not (source / ".config").exists()
    assert not (source / "include/config").exists()
    assert (tree / ".config").exists()


def test_interrupted_copy_is_completed(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checked_out(tree)
    for name in (EMULATE, "arch/x86/kvm/x86.c"):
        (tree / name).write_text("int changed;\n")
    real, written = ksource._write, []

    def interrupted(path: Path, content: bytes, executable: int | None = None) -> None:
        if written:
            raise KeyboardInterrupt
        written.append(path)
        real(path, content, executable)

    monkeypatch.setattr(ksource, "_write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        checked_out(tree)
    monkeypatch.setattr(ksource, "_write", real)
    source = checked_out(tree)
    assert (source / EMULATE).read_text() == (source / "arch/x86/kvm/x86.c").read_text() == "int changed;\n"


@pytest.mark.parametrize("kind", ["tree", "repository"])
def test_edits_come_and_go(kind: str, request: pytest.FixtureRequest) -> None:
    root = request.getfixturevalue(kind)
    clean = everything(checked_out(root))
    edited_once = everything(checked_out(root, None, returns("1")))
    assert b"return 1;" in edited_once[EMULATE][2]
    again = everything(checked_out(root, None, returns("1")))
    assert again == edited_once  # the time stamp too: nothing to compile
    assert b"return 2;" in everything(checked_out(root, None, returns("2")))[EMULATE][2]
    reverted = everything(checked_out(root))
    assert reverted[EMULATE][2] == clean[EMULATE][2]
    assert reverted[EMULATE][0] > edited_once[EMULATE][0]  # its object must be compiled again
    assert {k: v for k, v in reverted.items() if k != EMULATE} == {k: v for k, v in clean.items() if k != EMULATE}
    assert (root / EMULATE).read_text() == FILES[EMULATE]


def test_edit_that_does_not_fit_leaves_no_edit_behind(tree: Path) -> None:
    checked_out(tree, None, returns("1"))
    with pytest.raises(EditError):
        checked_out(tree, None, returns("1"), returns("2"))
    assert (private_copy(tree).source / EMULATE).read_text() == FILES[EMULATE]


# --- what is no kernel tree


def test_release(tree: Path) -> None:
    assert release_of(tree) == ("7.3.9-rc1", (7, 3))


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (lambda tree: (tree / "Kbuild").unlink(), "no Linux source tree: it has no Kbuild"),
        (lambda tree: (tree / "Makefile").write_text("all:\n"), "its Makefile names no kernel version"),
    ],
)
def test_folder_that_is_no_tree(tree: Path, break_it: object, said: str) -> None:
    assert callable(break_it)
    break_it(tree)
    with pytest.raises(LabInputError, match=said):
        kernel_from_tree(tree)


def test_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(LabInputError, match="nowhere: no such directory"):
        kernel_from_tree(tmp_path / "nowhere")


def test_unknown_revision_is_named(repository: Path) -> None:
    with pytest.raises(LabInputError, match="Needed a single revision"):
        kernel_from_tree(repository, revision="v9.9")


def test_revision_of_a_plain_tree(tree: Path) -> None:
    with pytest.raises(LabInputError, match="is no git tree: it has no revision HEAD"):
        kernel_from_tree(tree, revision="HEAD")


def test_series_that_debian_does_not_have() -> None:
    with pytest.raises(LabInputError, match=r"Linux 5\.4 is not known here: choose one of 6\.1"):
        ksource.debian_source("5.4")


# --- building


def test_kernel_and_what_belongs_to_it(tree: Path) -> None:
    said: list[str] = []
    built = kernel_from_tree(tree, progress=said.append)
    assert built.kernel.release == "7.3.9-rc1"
    assert built.kernel.series == "7.3"
    assert built.kernel.label == "7.3.9-rc1 (linux)"
    assert built.kernel.initramfs is None
    for path in (built.kernel.image, built.vmlinux, built.layout, built.config, built.log):
        assert path.stat().st_size, path
        assert built.kernel.image.parent == path.parent
    assert "CONFIG_KVM=y\n" in built.config.read_text()
    assert any("private copy" in line for line in said)


def test_same_content_is_not_built_again(repository: Path) -> None:
    first = kernel_from_tree(repository)
    said: list[str] = []
    second = kernel_from_tree(repository, revision="HEAD", progress=said.append)
    assert second.kernel == first.kernel
    assert said == []


def test_each_content_is_a_kernel_of_its_own(tree: Path) -> None:
    plain, one, debug = (
        kernel_from_tree(tree),
        kernel_from_tree(tree, edits=[returns("1")]),
        kernel_from_tree(tree, variant="debug"),
    )
    assert len({built.kernel.digest for built in (plain, one, debug)}) == 3
    assert one.kernel.image.read_bytes() != plain.kernel.image.read_bytes()
    assert one.kernel.label == "7.3.9-rc1 (linux, returns-1)"
    assert debug.kernel.label == "7.3.9-rc1 (linux, debug)"
    assert "CONFIG_KASAN=y" in debug.config.read_text()
    assert "CONFIG_KASAN=y" not in plain.config.read_text()
    assert plain.build != debug.build


def test_compiler_is_heard(tree: Path) -> None:
    (tree / EMULATE).write_text("int emulate(void)\n{\n\treturn nothing;\n}\n")
    with pytest.raises(BuildError) as caught:
        kernel_from_tree(tree)
    assert caught.value.errors[0].startswith(f"{EMULATE}:3:")
    assert "nothing" in caught.value.errors[0]
    assert caught.value.errors[0] in str(caught.value)
    assert caught.value.status == 2
    assert "error:" in caught.value.log.read_text()
    (tree / EMULATE).write_text(FILES[EMULATE])
    assert kernel_from_tree(tree).kernel.release == "7.3.9-rc1"


def test_line_that_the_tree_does_not_take_is_told(tree: Path) -> None:
    (tree / "Kconfig").write_text("CONFIG_KVM_XEN=y\n")
    said: list[str] = []
    built = kernel_from_tree(tree, progress=said.append)
    assert built.missing == ("CONFIG_KVM_XEN=y",)
    assert any("did not take CONFIG_KVM_XEN=y" in line for line in said)


def test_line_without_which_nothing_works_ends_the_build(tree: Path) -> None:
    (tree / "Kconfig").write_text("CONFIG_KVM_AMD=y\n")
    with pytest.raises(LabInputError, match="does not take CONFIG_KVM_AMD=y, and without it"):
        kernel_from_tree(tree)


def test_configuration_is_renewed_only_when_it_differs(tree: Path) -> None:
    built = kernel_from_tree(tree)
    stamp = (built.build / ".config").stat().st_mtime_ns
    (tree / "Kbuild").write_text("# something\n")
    assert kernel_from_tree(tree).build == built.build
    assert (built.build / ".config").stat().st_mtime_ns == stamp
    (tree / "Kconfig").write_text("CONFIG_KVM_XEN=y\n")
    kernel_from_tree(tree)
    assert (built.build / ".config").stat().st_mtime_ns > stamp


@pytest.mark.parametrize("words", ["No space left on device", "Killed signal terminated program cc1"])
def test_exhausted_machine_is_not_the_trees_fault(tree: Path, words: str) -> None:
    (tree / "Makefile").write_text(MAKEFILE.replace("bzImage:\n", f'bzImage:\n\t@echo "cc1: {words}"; exit 1\n'))
    with pytest.raises(LabError, match="ran out of") as caught:
        kernel_from_tree(tree)
    assert not isinstance(caught.value, LabInputError)
    assert caught.value.status == 4


def test_users_environment_does_not_reach_make(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MAKEFLAGS", "KCFLAGS", "ARCH", "CROSS_COMPILE", "KBUILD_OUTPUT", "LOCALVERSION", "LANG", "LC_CTYPE"):
        monkeypatch.setenv(name, "nonsense")
    (tree / "Makefile").write_text(MAKEFILE.replace("bzImage:\n", "bzImage:\n\t@env > $(O)/environment\n"))
    built = kernel_from_tree(tree)
    assert "nonsense" not in (built.build / "environment").read_text()


@pytest.mark.parametrize("there", [True, False])
def test_ccache_is_used_when_it_is_there(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in ("gcc", "ld", "make", "git", "sh", "mkdir", "grep", "cp", "touch", "as", "rm"):
        found = shutil.which(tool)
        assert found is not None
        (folder / tool).symlink_to(found)
    if there:
        (folder / "ccache").write_text('#!/bin/sh\nexec "$@"\n')
        (folder / "ccache").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))
    (tree / "Makefile").write_text(MAKEFILE.replace("bzImage:\n", "bzImage:\n\t@echo '$(CC)' > $(O)/compiler\n"))
    assert (kernel_from_tree(tree).build / "compiler").read_text() == ("ccache gcc\n" if there else "cc\n")


def test_second_build_of_a_tree_waits(tree: Path) -> None:
    said: list[str] = []
    done: list[float] = []

    def other() -> None:
        with workspace(tree, progress=said.append):
            done.append(time.monotonic())

    with workspace(tree):
        thread = threading.Thread(target=other)
        thread.start()
        while not said:
            time.sleep(0.01)
        released = time.monotonic()
    thread.join(10)
    assert "another process builds it: waiting" in said[0]
    assert done[0] >= released


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_interrupt_ends_the_compilers(tree: Path, tmp_path: Path) -> None:
    mark = tmp_path / "pid"
    (tree / "Makefile").write_text(MAKEFILE.replace("bzImage:\n", f"bzImage:\n\t@echo $$$$ > {mark}; exec sleep 60\n"))
    program = (
        "import sys; from pathlib import Path; from harness.lab import kbuild; kbuild._check_tools = lambda: None\n"
        "kbuild.kernel_from_tree(Path(sys.argv[1]))"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(tree)], stderr=subprocess.PIPE)
    limit = time.monotonic() + 20
    while not (mark.is_file() and mark.read_text().strip()) and time.monotonic() < limit:
        time.sleep(0.02)
    compiler = int(mark.read_text())
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert b"KeyboardInterrupt" in errors
    limit = time.monotonic() + 10  # its parent is gone: whoever adopted it reaps it in its own time
    while _alive(compiler) and time.monotonic() < limit:
        time.sleep(0.02)
    assert not _alive(compiler)
    assert not list(area("kernels").glob("*/bzImage"))


def test_missing_tools_are_named_as_packages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.undo()
    for name in ("make", "gcc", "ld", "bc"):
        (tmp_path / name).symlink_to("/bin/true")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LabInputError, match=r"apt-get install flex bison lz4$"):
        kbuild._check_tools()


# --- fragments and messages


def test_lines_are_for_their_series() -> None:
    lines = [
        "# comment", "", "CONFIG_A=y", "CONFIG_B=y   # from 6.2", "CONFIG_C=y # before 7.3", "CONFIG_D=8 # required",
        "CONFIG_A=n",
    ]  # fmt: skip
    assert [symbol for symbol, _, _ in wanted_symbols(lines, (6, 1))] == ["CONFIG_A", "CONFIG_C", "CONFIG_D"]
    assert [symbol for symbol, _, _ in wanted_symbols(lines, (7, 3))] == ["CONFIG_A", "CONFIG_B", "CONFIG_D"]
    assert wanted_symbols(lines, (6, 12))[0] == ("CONFIG_A", "n", False)
    assert ("CONFIG_D", "8", True) in wanted_symbols(lines, (6, 12))


@pytest.mark.parametrize("line", ["CONFIG_A = y", "CONFIG_A=y # until 6.2", "A=y", "CONFIG_A=y CONFIG_B=y"])
def test_line_that_is_none(line: str) -> None:
    with pytest.raises(LabError, match="has a line that is none"):
        wanted_symbols([line], (7, 3))


@pytest.mark.parametrize("series", [(6, 1), (6, 12), (7, 3)])
def test_shipped_fragments(series: tuple[int, int]) -> None:
    lines = [line for name in kbuild._FRAGMENTS["debug"] for line in (kbuild._CONFIGS / name).read_text().splitlines()]
    symbols = {symbol: (value, required) for symbol, value, required in wanted_symbols(lines, series)}
    assert symbols["CONFIG_KVM"] == ("y", True)
    assert symbols["CONFIG_KASAN"] == ("y", False)
    assert ("CONFIG_KVM_HYPERV" in symbols) == (series >= (6, 8))


@pytest.mark.parametrize(
    ("said", "first"),
    [
        (
            "  CC a.o\n/s/arch/x86/kvm/x86.c: In function 'f':\n"
            "/s/arch/x86/kvm/x86.c:7:2: warning: unused\n/s/arch/x86/kvm/x86.c:12:3: error: 'y' undeclared\n"
            "make[2]: *** [/s/scripts/Makefile.build:1: x86.o] Error 1\n",
            "arch/x86/kvm/x86.c:12:3: error: 'y' undeclared",
        ),
        ("ld: vmlinux.o: in function `f':\nx86.c:(.text+0x1): undefined reference to `g'\n",
         "x86.c:(.text+0x1): undefined reference to `g'"),
        ("arch/x86/kvm/Kconfig:3: syntax error\nmake: *** [Makefile:1: x] Error 1\n",
         "arch/x86/kvm/Kconfig:3: syntax error"),
        ("one\n\ntwo\n", "one"),
    ],
)  # fmt: skip
def test_first_error_is_found(said: str, first: str) -> None:
    assert compile_errors(said, Path("/s"))[0] == first
