"""The lab's configurations: what hardware the kernel under test sees, and what its KVM is asked for. One table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from harness.lab.errors import LabInputError


@dataclass(frozen=True)
class Configuration:
    """A way to run a kernel. ``parameters`` are KVM's, as words of the kernel command line.

    ``forced``: Cases go through KVM's emulator, instruction by instruction. ``needs``: features that the emulator must
    have beyond a stock one. ``edits``: kernel edits without which the configuration does not exist; a kernel of our
    own, then. The first is the one that makes KVM offer what the configuration is for.
    """

    name: str
    about: str
    cpu: str
    parameters: tuple[str, ...] = ()
    extension: str = "svm"
    forced: bool = False
    needs: frozenset[str] = frozenset()
    edits: tuple[str, ...] = ()


# Without ERMS and FSRM kernels and C libraries do not fill and copy memory by REP STOSB and MOVSB, which cost an
# emulated processor as much for a byte as for eight: a new page takes half the time, a read from a file a third.
_SVM: Final = "max,+svm,-erms,-fsrm"

CONFIGURATIONS: Final = {
    c.name: c
    for c in (
        Configuration("svm", "kvm_amd with nested paging: guests run natively", _SVM, ("kvm_amd.npt=1",)),
        Configuration(
            "svm-shadow", "kvm_amd with shadow paging: page faults, CR3 and CR4 writes exit", _SVM, ("kvm_amd.npt=0",)
        ),
        Configuration(
            "svm-emul", "kvm_amd, every instruction forced through KVM's emulator", _SVM,
            ("kvm_amd.npt=1", "kvm.force_emulation_prefix=1"), forced=True,
        ),
        Configuration(
            "apx", "kvm_amd on emulated APX hardware; a kernel of our own whose KVM exposes it", f"{_SVM},+apxf",
            ("kvm_amd.npt=1",), needs=frozenset({"apx"}), edits=("apx-on-svm", "apx-leaf-29"),
        ),
        Configuration(
            "apx-compact", "apx with XSAVEC and XSAVES: the compacted format", f"{_SVM},+apxf,+xsavec,+xsaves",
            ("kvm_amd.npt=1",), needs=frozenset({"apx"}), edits=("apx-on-svm", "apx-leaf-29"),
        ),
    )
}  # fmt: skip


def configuration(name: str) -> Configuration:
    """The configuration of that name. LabInputError lists those there are."""
    try:
        return CONFIGURATIONS[name]
    except KeyError:
        raise LabInputError(f"no configuration {name!r}: use {', '.join(CONFIGURATIONS)}") from None
