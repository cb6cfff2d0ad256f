"""Pool: VMs with one vCPU each, kept for reuse, with what is known to be in them, so that a start state costs little.

Knowledge is never assumed: it is what a comparison or an observation has just shown, and any KVM_RUN or write to the
vCPU ends it (``Vcpu.epoch``).
"""

from __future__ import annotations

import ctypes
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from mmap import mmap
from operator import attrgetter
from typing import Final

from harness.case import PAGE, Memory, Pages, Slot, VmShape
from harness.cpuid import CpuProfile
from harness.state import SEGMENT_NAMES, CpuState, pack_sections
from harness.vcpu import Vcpu
from harness.vm import Kvm, Vm

_libc = ctypes.PyDLL(None)  # keeps the GIL: giving it away takes as long as comparing some KiB
_memcmp: Callable[[int, int, int], int] = _libc.memcmp
_libc.memcmp.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
_NO_PAGES: Final = ()
_IDLE: Final = VmShape(slots=())
_CR4_BYTE1, _EFER_BYTE1 = 249, 265  # in kvm_sregs and kvm_sregs2
_VMXE, _SVME = 1 << 5, 1 << 4  # bit 13 of CR4, bit 12 of EFER


class Warm:
    """A VM and its vCPU. Owns both."""

    def __init__(self, kvm: Kvm, shape: VmShape, profile: CpuProfile | None) -> None:
        self.vm = Vm(kvm, shape)
        try:
            self.vcpu = Vcpu(self.vm, profile)
        except BaseException:
            self.vm.close()
            raise
        self.shape, self._profile = shape, profile
        self.others: list[Vcpu] = []
        """Further vCPUs, made for the one Case that this VM then serves."""
        self.pkru = bytes(4)
        self._seen: Mapping[str, bytes] = {}
        self._seen_epoch = self._equal_epoch = -1
        self._ram = [_Ram(slot, ram, self.vm.address[slot]) for slot, ram in self.vm.ram.items()]
        self._memory: Memory | None = None  # what RAM was laid out from
        self._clean = False  # it was seen to be just that

    def close(self) -> None:
        """Give both back."""
        for vcpu in (*self.others, self.vcpu):
            vcpu.close()
        self._ram.clear()
        self.vm.close()

    def serves(self, shape: VmShape, profile: CpuProfile) -> bool:
        """Whether this is the VM for such a Case; not once its guest may have nested state."""
        return self.shape is shape and self._profile is profile and not may_be_nested(self._seen)

    @property
    def may_be_nested(self) -> bool:
        """Its guest may have nested state, which no section shows, by what was last seen of it, be that over or not."""
        return may_be_nested(self._seen)

    # --- registers ---

    @property
    def seen(self) -> Mapping[str, bytes]:
        """The sections as they were last observed; empty once anything may have changed them."""
        return self._seen if self._seen_epoch == self.vcpu.epoch else {}

    def remember(self, sections: Mapping[str, bytes]) -> None:
        """``sections`` were observed just now."""
        self._seen, self._seen_epoch = sections, self.vcpu.epoch

    # --- RAM ---

    def load(self, memory: Memory, *, write: bool = True) -> None:
        """Lay the initial contents over all of RAM; only over pages that differ, where they are known.

        Without ``write`` RAM stays, and ``memory`` is only what :meth:`equal` compares with.
        """
        known = self._equal_epoch == self.vcpu.epoch
        self._equal_epoch = -1
        if known and self._clean and memory is self._memory:
            return
        self._memory = memory
        for ram in self._ram:
            ram.load(memory.image(ram.slot), known=known, write=write)

    def equal(self, pages: Pages) -> bool:
        """Whether RAM is, to the byte, the initial contents of :meth:`load` overlaid with ``pages``."""
        self._equal_epoch = -1
        for ram in self._ram:
            if ram.differs(pages):
                return False
        self._clean, self._equal_epoch = not pages, self.vcpu.epoch
        return True


class _Ram:
    """The RAM of one slot, beside the bytes that it was laid out from. ``dirty``: offsets of pages that differ."""

    def __init__(self, slot: Slot, ram: mmap, address: int) -> None:
        self.slot, self._ram, self._address, self._size = slot, ram, address, slot.size
        self._image = b""
        self._image_address = 0
        self._dirty: Sequence[int] = _NO_PAGES

    def load(self, image: bytes, *, known: bool, write: bool) -> None:
        """Take ``image``. ``known``: the last :meth:`equal` was right, and RAM is still what it was then."""
        if not write:
            pass
        elif known and image is self._image:
            for offset in self._dirty:
                self._ram[offset : offset + PAGE] = image[offset : offset + PAGE]
        else:
            self._ram[:] = image
        self._image = image
        self._image_address = ctypes.cast(ctypes.c_char_p(image), ctypes.c_void_p).value or 0

    def differs(self, pages: Pages) -> int:
        """Whether the slot holds anything else than the image overlaid with ``pages``."""
        if not pages:
            self._dirty = _NO_PAGES
            return _memcmp(self._address, self._image_address, self._size)
        first, size = self.slot.gpa, self.slot.size
        start = 0
        self._dirty = sorted([gpa - first for gpa in pages if first <= gpa < first + size])
        for offset in self._dirty:
            if self._differ(start, offset) or self._ram[offset : offset + PAGE] != pages[first + offset]:
                return True
            start = offset + PAGE
        return self._differ(start, size)

    def _differ(self, start: int, end: int) -> int:
        return _memcmp(self._address + start, self._image_address + start, end - start) if start < end else 0


def may_be_nested(sections: Mapping[str, bytes]) -> bool:
    """Whether a guest seen in this state has SVM or VMX enabled: it may have nested state that no section shows."""
    sregs = sections.get("sregs2") or sections.get("sregs")
    return sregs is not None and bool(sregs[_CR4_BYTE1] & _VMXE or sregs[_EFER_BYTE1] & _SVME)


class Pool:
    """Warm VMs by (shape, profile), at most ``size``; the one least recently used makes room.

    Beside them one VM that never runs: the first VM of a machine enables virtualization on every processor, its first
    vCPU without a local APIC patches the kernel's code (``kvm_has_noapic_vcpu``), and the last ones undo both. That is
    most of what making and closing a lone VM costs.
    """

    def __init__(self, kvm: Kvm, size: int) -> None:
        self.kvm, self.size = kvm, size
        self._all: OrderedDict[tuple[VmShape, int], Warm] = OrderedDict()
        self._last: Warm | None = None
        self._idle: Warm | None = None

    def get(self, shape: VmShape, profile: CpuProfile) -> Warm:
        """A VM of this shape whose vCPU has this profile; made afresh if there is none."""
        last = self._last
        if last is not None and last.shape is shape and last.vcpu.profile is profile:
            return last
        key = (shape, id(profile))  # a pooled vCPU keeps its profile alive
        warm = self._all.get(key)
        if warm is None:
            while len(self._all) >= self.size:
                self.drop(next(iter(self._all.values())))
            if self._idle is None:
                self._idle = Warm(self.kvm, _IDLE, None)
            warm = self._all[key] = Warm(self.kvm, shape, profile)
        else:
            self._all.move_to_end(key)
            warm.shape = shape  # an equal one, but the next Cases will have this object: serves() asks no more
        self._last = warm
        return warm

    def drop(self, warm: Warm) -> None:
        """Close a VM of the pool."""
        if self._last is warm:
            self._last = None
        for key in [key for key, other in self._all.items() if other is warm]:
            del self._all[key]
        warm.close()

    def close(self) -> None:
        """Close every VM."""
        while self._all:
            self.drop(next(iter(self._all.values())))
        if self._idle is not None:
            self._idle.close()
            self._idle = None


class Packer:
    """``pack_sections`` for start states, most of which share everything but the general-purpose registers.

    Packs anew only where the registers are not those of the last call: equal registers pack to equal bytes.
    """

    def __init__(self) -> None:
        self._key: object = None
        self._packed: tuple[tuple[str, bytes], ...] = ()

    def rest(self, state: CpuState, names: tuple[str, ...]) -> tuple[tuple[str, bytes], ...]:
        """``names``, of :data:`SHARED`, with their bytes."""
        key = (names, _INPUTS(state), state.gpr[16:] if "egpr" in names else ())
        if self._key != key:
            self._packed, self._key = tuple(pack_sections(state, names).items()), key
        return self._packed


SHARED: Final = ("xcr0", "sregs2", "sregs", "msrs", "debugregs", "egpr", "events")
"""The sections that :class:`Packer` packs, in the order in which a start state is written."""
_INPUTS: Final = attrgetter(
    *SEGMENT_NAMES, "gdtr", "idtr", "cr0", "cr2", "cr3", "cr4", "cr8", "efer", "apic_base", "pdptr", "xcr0", "dr",
    "dr6", "dr7", "events", "msrs",
)  # fmt: skip
