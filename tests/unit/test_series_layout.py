"""KVM's register map: read from objects that gcc makes here, from BTF and DWARF, and held against the rules."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from harness.cli import main
from harness.lab.errors import LabInputError
from harness.series.btf import Btf, BtfError
from harness.series.layout import Layout, changes, check, layout_json, layout_text, violated
from harness.series.typeinfo import RUNNING, LayoutError, file_layout, running_layout

GPRS = ["RAX", "RCX", "RDX", "RBX", "RSP", "RBP", "RSI", "RDI", *(f"R{n}" for n in range(8, 16))]
EGPRS = [f"R{n}" for n in range(16, 32)]
LAZY = ["PDPTR", "CR0", "CR3", "CR4", "RFLAGS", "SEGMENTS", "EXIT_INFO_1", "EXIT_INFO_2"]


def source(ids: list[str], arch: str) -> str:
    return (
        "typedef unsigned int u32; typedef unsigned long ulong_t;\n"
        f"enum kvm_reg {{ {', '.join(ids)} }};\nstruct kvm_vcpu_arch {{ {arch} }};\n"
        "struct kvm_vcpu { int id; volatile struct kvm_vcpu_arch arch; };\n"
        "struct kvm_vcpu vcpu; enum kvm_reg reg; int NR = sizeof(struct kvm_vcpu);\n"
    )


def linux_6() -> str:
    """As from 6.1 to 6.18."""
    ids = [*(f"VCPU_REGS_{r}" for r in GPRS), "VCPU_REGS_RIP", "NR_VCPU_REGS", "VCPU_EXREG_PDPTR = NR_VCPU_REGS"]
    ids += [f"VCPU_EXREG_{r}" for r in LAZY[1:]]
    return source(ids, "unsigned long regs[NR_VCPU_REGS]; u32 regs_avail; u32 regs_dirty; unsigned long cr0;")


def linux_7(egprs: list[str] = []) -> str:  # noqa: B006
    """As in 7.3; with R16 to R31, where a series adds them."""
    ids = [f"VCPU_REGS_{r}" for r in (*GPRS, *egprs)]
    ids += ["NR_VCPU_GENERAL_PURPOSE_REGS", "VCPU_REG_RIP = NR_VCPU_GENERAL_PURPOSE_REGS"]
    for register in LAZY:
        ids.append(f"VCPU_REG_{register}")
        ids += ["VCPU_REG_ERAPS = VCPU_REG_CR3"] * (register == "CR3")
    return source(
        [*ids, "NR_VCPU_TOTAL_REGS"],
        "unsigned long regs[NR_VCPU_GENERAL_PURPOSE_REGS]; ulong_t rip; "
        "unsigned long regs_avail[(NR_VCPU_TOTAL_REGS + 63) / 64]; "
        "unsigned long regs_dirty[(NR_VCPU_TOTAL_REGS + 63) / 64];",
    )


@pytest.fixture
def compiled(tmp_path: Path) -> Callable[..., Path]:
    def make(text: str, *flags: str) -> Path:
        (tmp_path / "a.c").write_text(text)
        subprocess.run(["gcc", "-g", *flags, "-c", "a.c"], cwd=tmp_path, check=True)
        return tmp_path / "a.o"

    return make


@pytest.fixture
def layout(compiled: Callable[..., Path]) -> Callable[..., Layout]:
    return lambda *arguments: file_layout(compiled(*arguments))


def outcomes(layout: Layout) -> dict[str, str]:
    return {c.rule: c.outcome for c in check(layout)}


def broken(layout: Layout) -> dict[str, str]:
    return {c.rule: c.detail for c in check(layout) if c.outcome == "violated"}


# --- right ones


@pytest.mark.parametrize("flags", [("-gdwarf-4",), ("-gdwarf-5",), ("-gdwarf-5", "-gz")])
def test_names_of_linux_6(layout: Callable[..., Layout], flags: tuple[str, ...]) -> None:
    found = layout(linux_6(), *flags)
    assert list(found.ids)[:18] == [*GPRS, "RIP", "PDPTR"]
    assert found.bounds == {"NR_VCPU_REGS": 17}
    assert found.regs == (0, 136, 17)
    assert (found.rip, found.avail, found.dirty) == (None, (136, 4, None), (140, 4, None))
    assert not violated(check(found))
    assert outcomes(found)["ERAPS is another name of CR3"] == "n/a"
    assert outcomes(found)["R16 to R31 follow R15 without a gap"] == "n/a"
    assert "RIP is regs[16]" in layout_text(found)


def test_names_of_linux_7(layout: Callable[..., Layout]) -> None:
    found = layout(linux_7())
    assert found.ids["RIP"] == 16
    assert found.ids["ERAPS"] == found.ids["CR3"] == 19
    assert (found.rip, found.avail) == ((128, 8, None), (136, 8, 1))
    assert not violated(check(found))
    assert outcomes(found)["ERAPS is another name of CR3"] == "ok"
    assert "RIP is in a member of its own" in layout_text(found)


def test_kernel_with_egprs(layout: Callable[..., Layout]) -> None:
    found = layout(linux_7(EGPRS))
    assert found.gprs == 32
    assert found.ids["R31"] == 31
    assert not violated(check(found))
    assert outcomes(found)["R16 to R31 follow R15 without a gap"] == "ok"
    assert max(found.ids.values()) == 40


def test_what_a_patch_changes_of_it(layout: Callable[..., Layout]) -> None:
    old, new = layout(linux_7()), layout(linux_7(EGPRS))
    found = changes(old, new)
    assert "R16: none → 16" in found
    assert "RIP: 16 → 32" in found
    assert "NR_VCPU_TOTAL_REGS: 25 → 41" in found
    assert "regs: at 0, 16 × 8 bytes → at 0, 32 × 8 bytes" in found
    assert "R15" not in " ".join(found)
    assert changes(old, layout(linux_7())) == ()


# --- seeded mistakes

WRONG = {
    "two registers exchanged": (
        lambda: linux_6().replace("RCX, VCPU_REGS_RDX", "RDX, VCPU_REGS_RCX"),
        "RAX to R15 are at their encodings", "RCX is 2, not 1; RDX is 1, not 2",
    ),
    "RIP at the index of R16": (
        lambda: linux_7(EGPRS).replace("VCPU_REG_RIP = NR_VCPU_GENERAL_PURPOSE_REGS", "VCPU_REG_RIP = 16"),
        "RIP is no index of a general-purpose register", "RIP is 16, as R16",
    ),
    "R16 to R31 elsewhere": (
        lambda: linux_7(EGPRS).replace("VCPU_REGS_R20,", "VCPU_REGS_R20 = 21,"),
        "R16 to R31 follow R15 without a gap", "R20 is 21, not 20",
    ),
    "R31 forgotten": (
        lambda: linux_7(EGPRS[:-1]), "R16 to R31 follow R15 without a gap", "R31 is missing, not 31",
    ),
    "ERAPS apart from CR3": (
        lambda: linux_7().replace("ERAPS = VCPU_REG_CR3", "ERAPS"), "ERAPS is another name of CR3",
        "ERAPS is 20, CR3 is 19",
    ),
    "two ids alike": (
        lambda: linux_7().replace("VCPU_REG_CR4", "VCPU_REG_CR4 = VCPU_REG_CR0"), "no two registers share an id",
        "18 is CR0 and CR4",
    ),
    "mask of 32 bits for 41 ids": (
        lambda: linux_7(EGPRS).replace("unsigned long regs_dirty[(NR_VCPU_TOTAL_REGS + 63) / 64]", "u32 regs_dirty"),
        "every id fits into regs_dirty", "it has 32 bits, but RIP is 32",
    ),
    "mask of 16 bits": (
        lambda: linux_6().replace("u32 regs_avail", "unsigned short regs_avail"), "every id fits into regs_avail",
        "it has 16 bits, but RIP is 16",
    ),
    "regs[] too short": (
        lambda: linux_7(EGPRS).replace("regs[NR_VCPU_GENERAL_PURPOSE_REGS]", "regs[16]"),
        "regs[] holds the general-purpose registers; RIP has a place", "regs[] has 16 elements, 32 are needed",
    ),
    "no place for RIP": (
        lambda: linux_7().replace("ulong_t rip;", ""), "regs[] holds the general-purpose registers; RIP has a place",
        "RIP is 16, regs[] has 16 elements, and there is no member rip",
    ),
    "registers of 32 bits": (
        lambda: linux_6().replace("unsigned long regs[", "u32 regs["),
        "regs[] holds the general-purpose registers; RIP has a place", "an element of regs[] has 4 bytes, not 8",
    ),
    "an id after the count": (
        lambda: linux_7().replace("NR_VCPU_TOTAL_REGS }", "NR_VCPU_TOTAL_REGS, VCPU_REG_NEW }"),
        "what counts the registers counts them all", "NR_VCPU_TOTAL_REGS is 25, not 27",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_seeded_mistake_is_named(layout: Callable[..., Layout], name: str) -> None:
    text, rule, detail = WRONG[name]
    found = broken(layout(text()))
    assert detail in found[rule]


# --- BTF


@pytest.fixture(scope="module")
def running() -> Layout:
    if not (RUNNING / "vmlinux").is_file():
        pytest.skip("the kernel here shows no BTF")
    try:
        return running_layout()
    except LayoutError as error:
        if "no enum kvm_reg" not in str(error):
            raise
        pytest.skip("the kernel here has no KVM")


def test_running_kernel(running: Layout) -> None:
    assert not violated(check(running))
    assert running.ids["RSP"] == 4
    assert running.regs is not None
    assert running.avail is not None


def test_running_kernel_by_its_path(running: Layout) -> None:
    assert file_layout(RUNNING / "vmlinux").ids == running.ids


@pytest.mark.skipif(shutil.which("pahole") is None, reason="pahole, which makes BTF, is not here")
@pytest.mark.parametrize("text", [linux_6(), linux_7(), linux_7(EGPRS)])
def test_btf_says_the_same_as_dwarf(compiled: Callable[..., Path], text: str, tmp_path: Path) -> None:
    path = compiled(text)
    expected = file_layout(path)
    subprocess.run(["pahole", "-J", path], check=True)
    stripped = tmp_path / "b.o"
    subprocess.run(["objcopy", "--strip-debug", path, stripped], check=True)
    found = file_layout(stripped)
    assert found.source.endswith("BTF")
    assert layout_json(found) | {"source": ""} == layout_json(expected) | {"source": ""}


@pytest.mark.skipif(not (RUNNING / "vmlinux").is_file(), reason="the kernel here shows no BTF")
def test_damaged_btf() -> None:
    data = (RUNNING / "vmlinux").read_bytes()
    with pytest.raises(BtfError, match="damaged"):
        Btf(data[: len(data) // 3])
    with pytest.raises(BtfError, match="no BTF"):
        Btf(b"\0" * 100)
    with pytest.raises(BtfError, match="damaged"):
        Btf(data[:10])


# --- files that are none


@pytest.mark.parametrize(("content", "words"), [
    (b"", "is empty: give a vmlinux"), (b"int f;\n", "no kernel, module or object"),
    (b"\x7fELF\2\1\1" + bytes(60), "no kernel, module or object|neither BTF nor DWARF"), (b"\x9f\xeb\1\0", "damaged"),
])  # fmt: skip
def test_file_that_is_none(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "f").write_bytes(content)
    with pytest.raises(LayoutError, match=words):
        file_layout(tmp_path / "f")


def test_object_without_types(compiled: Callable[..., Path]) -> None:
    with pytest.raises(LayoutError, match=r"neither BTF nor DWARF: give a vmlinux"):
        file_layout(compiled("int f;", "-g0"))
    with pytest.raises(LayoutError, match=r"no enum kvm_reg and struct kvm_vcpu_arch in BTF or DWARF: give"):
        file_layout(compiled("int f;"))


def test_truncated_object_is_no_traceback(compiled: Callable[..., Path], tmp_path: Path) -> None:
    data = compiled(linux_7()).read_bytes()
    for length in range(0, len(data), 97):
        (tmp_path / "f").write_bytes(data[:length])
        with pytest.raises(LabInputError):
            file_layout(tmp_path / "f")


# --- the command


def test_command_prints_the_table(compiled: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["layout", str(compiled(linux_7()))]) == 0
    text = capsys.readouterr().out
    assert "  4 RSP" in text
    assert "ok        ERAPS is another name of CR3: both are 19" in text
    assert "n/a       R16 to R31" in text


def test_command_fails_for_a_broken_rule(compiled: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    path = str(compiled(WRONG["mask of 32 bits for 41 ids"][0]()))
    assert main(["layout", path]) == 1
    assert "violated  every id fits into regs_dirty" in capsys.readouterr().out
    assert main(["layout", "--json", path]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["violated"] is True
    assert found["ids"]["RIP"] == 32
    assert found["members"]["regs_dirty"]["size"] == 4


@pytest.mark.parametrize(("words", "said"), [
    (["/nowhere"], "/nowhere is not there: check the path"), (["/"], "/ is a folder: give a file in it"),
    (["/etc/passwd"], "no kernel, module or object"), (["--base", "/etc/passwd"], "give that too"),
    (["/dev/zero"], "/dev/zero is a device: give a file"),
    (["/proc/self/mem"], "cannot be read (Input/output error): give another copy"),
])  # fmt: skip
def test_command_says_what_to_give(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["layout", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("kvm-harness: ")
    assert said in error
    assert "Errno" not in error


def test_an_empty_file_is_named_as_that(tmp_path: Path) -> None:
    (tmp_path / "vmlinux").touch()
    with pytest.raises(LabInputError, match=f"{tmp_path}/vmlinux is empty: give a vmlinux"):
        file_layout(tmp_path / "vmlinux")


def test_a_fifo_that_nobody_writes_to_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    command = [sys.executable, "-m", "harness", "layout", str(tmp_path / "fifo")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, f"{tmp_path}/fifo is empty: give a vmlinux" in done.stderr) == (2, True)


def test_a_kernel_may_come_through_a_pipe(compiled: Callable[..., Path]) -> None:
    """As the shell's <(zcat vmlinux.gz)."""
    with subprocess.Popen(["cat", compiled(linux_7())], stdout=subprocess.PIPE) as cat:
        assert cat.stdout is not None
        assert file_layout(Path(f"/dev/fd/{cat.stdout.fileno()}")).ids


def test_a_kernel_in_a_folder_is_named(compiled: Callable[..., Path], tmp_path: Path) -> None:
    shutil.copy(compiled(linux_7()), tmp_path / "vmlinux")
    with pytest.raises(LabInputError, match=f"{tmp_path} is a folder: give {tmp_path}/vmlinux"):
        file_layout(tmp_path)


@pytest.mark.parametrize("suffix", [".xz", ".gz", ".zst"])
def test_module_that_does_not_unpack(suffix: str, tmp_path: Path) -> None:
    (tmp_path / f"kvm.ko{suffix}").write_bytes(b"no such thing")
    with pytest.raises(LabInputError, match=rf"is damaged or no {suffix} file .*: copy it again"):
        file_layout(tmp_path / f"kvm.ko{suffix}")


@pytest.mark.parametrize("asked", ["file_layout(RUNNING / 'vmlinux')", "running_layout()"])
def test_no_permission(asked: str, tmp_path: Path) -> None:
    """In a process of its own, which gives up the right to read everything."""
    (tmp_path / "vmlinux").write_bytes(b"")
    (tmp_path / "vmlinux").chmod(0)
    program = (
        "import pathlib, sys\nfrom harness.series import typeinfo\nfrom harness.series.typeinfo import *\n"
        f"RUNNING = typeinfo.RUNNING = pathlib.Path(sys.argv[1])\ntry:\n    {asked}\n"
        "except LabInputError as error:\n    print(error)\n"
    )
    drop = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
    done = subprocess.run(
        [*drop, sys.executable, "-c", program, tmp_path], capture_output=True, text=True, check=False
    )  # fmt: skip
    assert f"{tmp_path}/vmlinux: no permission to read it: run as root, or give" in done.stdout, done.stderr
