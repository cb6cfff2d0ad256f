"""What to boot, and the command line for it: one function for each kind of emulator."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from harness.cpuid import CpuidEntry, CpuProfile
from harness.lab.errors import LostError
from harness.lab.hardware import Emulator
from harness.vm import Kvm, KvmUnusableError

CONSOLE: Final = "console"
"""The name of the first serial port among a machine's streams."""
QMP: Final = "qmp"
"""The name of the emulator's own control stream."""


@dataclass(frozen=True)
class BootSpec:
    """A machine to start. ``disks`` are raw images, read-only: /dev/vda, /dev/vdb, ... in this order.

    ``channels`` are virtio-serial ports, found inside as /sys/class/virtio-ports/*/name; ``serials`` are further serial
    ports (COM2, ...) for guests without an operating system. ``accel`` is ``tcg`` or ``kvm``.
    """

    emulator: Emulator
    kernel: Path
    initramfs: Path | None = None
    append: tuple[str, ...] = ()
    disks: tuple[Path, ...] = ()
    cpu: str = "max"
    smp: int = 1
    memory: int = 1024  # MiB
    channels: tuple[str, ...] = ()
    serials: tuple[str, ...] = ()
    accel: str = "tcg"
    options: tuple[str, ...] = ()  # further words for the emulator
    incoming: Path | None = None  # go on from what Boot.save() wrote of such a machine

    @property
    def streams(self) -> tuple[str, ...]:
        """The names of all byte streams between us and the guest."""
        return (CONSOLE, *self.serials, *self.channels)

    def check(self) -> None:
        """Raise LostError for what the emulator would refuse with less to go on."""
        binary = self.emulator.binary
        if not binary.is_file() or not os.access(binary, os.X_OK):
            what = "cannot be executed" if binary.exists() else "is not there"
            raise LostError(f"{binary}: the emulator {what}: run `kvm-harness lab build` to have it made anew")
        for path in (self.kernel, self.initramfs, self.incoming, *self.disks):
            if path is not None and not (path.is_file() and os.access(path, os.R_OK)):
                raise LostError(f"{path}: cannot be read: run `kvm-harness lab build` to have it made anew")


def command_line(spec: BootSpec, ends: Mapping[str, int]) -> list[str]:
    """The words that start this machine's emulator.

    ``ends`` are the file descriptors of connected sockets that the emulator inherits, by name: one for each of
    ``spec.streams``, and QMP.
    """
    return _qemu(spec, ends)


def _qemu(spec: BootSpec, ends: Mapping[str, int]) -> list[str]:
    words = [str(spec.emulator.binary), "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"]
    if spec.emulator.firmware is not None:
        words += ["-L", str(spec.emulator.firmware)]
    # A store that changes code invalidates translations before it happens: another thread may translate the old bytes
    # in between, and run them from then on. Linux patches itself (text_poke()), and dies of an INT3 that is gone.
    accel = "tcg,thread=single" if spec.accel == "tcg" and spec.smp > 1 else spec.accel
    words += ["-machine", "pc,usb=off", "-accel", accel, "-cpu", spec.cpu]
    words += ["-smp", str(spec.smp), "-m", f"{spec.memory}M", "-nic", "none", "-vga", "none"]
    words += ["-chardev", f"socket,id=qmp,fd={ends[QMP]}", "-mon", "chardev=qmp,mode=control"]
    for i, name in enumerate((CONSOLE, *spec.serials)):
        words += ["-chardev", f"socket,id=serial{i},fd={ends[name]}", "-serial", f"chardev:serial{i}"]
    for i, path in enumerate(spec.disks):
        # JSON, for a path may have a comma in it.
        file = {"driver": "file", "filename": str(path)}
        node = {"driver": "raw", "node-name": f"disk{i}", "read-only": True, "file": file}
        words += ["-blockdev", json.dumps(node), "-device", f"virtio-blk-pci,drive=disk{i}"]
    if spec.channels:
        words += ["-device", "virtio-serial-pci"]
    for i, name in enumerate(spec.channels):
        words += ["-chardev", f"socket,id=channel{i},fd={ends[name]}"]
        words += ["-device", f"virtserialport,chardev=channel{i},name={name}"]
    words += ["-kernel", str(spec.kernel)]
    if spec.initramfs is not None:
        words += ["-initrd", str(spec.initramfs)]
    if spec.append:
        words += ["-append", " ".join(spec.append)]
    if spec.incoming is not None:
        words += ["-incoming", json.dumps(migration_channel(spec.incoming))]
    return [*words, *spec.options]


def migration_channel(file: Path) -> dict[str, object]:
    """A file as QMP's MigrationChannel."""
    return {"channel-type": "main", "addr": {"transport": "file", "filename": str(file), "offset": 0}}


def outer_acceleration(extension: str = "svm") -> str:
    """``kvm`` when this host's KVM gives its guests hardware virtualization of that kind (svm or vmx), else ``tcg``."""
    try:
        with Kvm() as kvm:
            offered = nested_extension(kvm.supported_cpuid(), Path("/sys/module"))
    except (KvmUnusableError, OSError):
        return "tcg"
    return "kvm" if offered == extension else "tcg"


def nested_extension(cpuid: CpuProfile, modules: Path) -> str | None:
    """Which virtualization (svm, vmx) a KVM hands on to its guests: it must say so in CPUID and in its parameters.

    ``cpuid`` is that of KVM_GET_SUPPORTED_CPUID: leaf 1 ECX[5] is VMX (SDM vol. 2A, CPUID), leaf 80000001H ECX[2] is
    SVM (APM vol. 3, appendix E). ``modules`` is /sys/module.
    """
    nothing = CpuidEntry(0)
    for name, module, function, bit in (("svm", "kvm_amd", 0x80000001, 2), ("vmx", "kvm_intel", 1, 5)):
        if (cpuid.leaf(function) or nothing).ecx >> bit & 1:
            with contextlib.suppress(OSError):
                if (modules / module / "parameters" / "nested").read_text().strip() in ("1", "Y"):
                    return name
    return None
