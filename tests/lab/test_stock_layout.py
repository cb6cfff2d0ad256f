"""The register maps of Debian's kernels, from what is in their packages: kernel image and KVM's module, with BTF."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.lab.bzimage import release_of
from harness.lab.cache import area
from harness.lab.kernel import debian_kernel
from harness.series.layout import check, violated
from harness.series.typeinfo import LayoutError, file_layout


def package(series: str) -> tuple[Path, Path]:
    """(kernel image, kvm.ko) of Debian's kernel."""
    release = debian_kernel(series, print).release
    (module,) = area("kernel").rglob(f"{release}/kernel/arch/x86/kvm/kvm.ko*")
    (image,) = (path for path in area("kernel").rglob("vmlinuz*") if release_of(path) == release)
    return image, module


@pytest.mark.parametrize(("series", "rip", "eraps"), [
    ("6.1", None, False), ("6.12", None, False), ("7.3", (128, 8, None), True),
])  # fmt: skip
def test_stock_kernel(series: str, rip: tuple[int, int, None] | None, eraps: bool) -> None:
    image, module = package(series)
    found = file_layout(image)
    assert not violated(check(found))
    assert found.rip == rip
    assert ("ERAPS" in found.ids) == eraps
    assert found.ids["RIP"] == 16
    assert found.avail is not None
    assert found.avail.size == (8 if eraps else 4)
    of_module = file_layout(module)  # which finds its kernel beside it
    assert "on top of" in of_module.source
    assert check(of_module) == check(found)


def test_module_without_its_kernel(tmp_path: Path) -> None:
    image, module = package("7.3")
    alone = tmp_path / module.name
    alone.write_bytes(module.read_bytes())
    with pytest.raises(LayoutError, match=r"give --base VMLINUX"):
        file_layout(alone)
    assert not violated(check(file_layout(alone, image)))
    with pytest.raises(LayoutError, match=r"is Linux 6\.12\.\S+, but the module is of 7\.3"):
        file_layout(alone, package("6.12")[0])
