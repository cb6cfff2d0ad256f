"""Memory as instructions see it: segmentation, paging, RAM and MMIO (SDM vol. 3A chapters 3-5).

``read``/``write`` take a segment and an offset and apply every check; ``linear_read``/``linear_write`` are the
processor's own accesses to descriptor tables and task state.  RAM is kept page by page and copied from the Case's image
on first use.
"""

from __future__ import annotations

from typing import Final

from harness.exits import Mmio
from harness.reference import paging
from harness.reference.cpu import AC, CS, FS, GP, MASK, SS, STACK, Cpu, Fault, ModelError

PAGE: Final = 4096
_ALIGNMENT_CHECK: Final = 17
_CR0_AM: Final = 1 << 18
_Entry = tuple[bytearray | None, int]


class Memory:
    """The guest-physical memory of one Case, seen through the registers of ``cpu``. Sizes are in bytes."""

    def __init__(self, cpu: Cpu) -> None:
        self.cpu = cpu
        self._slots = cpu.case.shape.slots
        self._ram: dict[int, bytearray | None] = {}
        self._tlb: dict[int, _Entry] = {}
        self._tables: set[int] = set()
        self._versions: dict[int, int] = {}
        self._undefined: dict[int, int] = {}

    def share(self, other: Memory) -> None:
        """Be the same RAM as ``other``, seen through the registers of another processor."""
        self._ram, self._versions, self._undefined = other._ram, other._versions, other._undefined

    # --- what machines show ------------------------------------------------------------------------------------------

    def pages(self) -> dict[int, bytes]:
        """Guest-physical address -> contents of every page that differs from the Case's initial RAM."""
        out = {}
        for number in sorted(self._versions):
            page = self._ram.get(number)
            if page is not None and bytes(page) != self._initial(number):
                out[number * PAGE] = bytes(page)
        return out

    @property
    def pages_ignore(self) -> dict[int, int]:
        """Guest-physical byte address -> bits of that byte that the architecture leaves undefined."""
        return dict(self._undefined)

    def mark_undefined(self, physical: int, mask: int) -> None:
        """The bits of ``mask`` (any width, little-endian from ``physical``) are undefined until the next write."""
        while mask:
            if mask & 0xFF:
                self._undefined[physical] = self._undefined.get(physical, 0) | mask & 0xFF
            mask >>= 8
            physical += 1

    def code_version(self, page: int) -> int:
        """A number that changes with every write to physical page ``page`` (address divided by 4096)."""
        return self._versions.get(page, 0)

    def flush(self) -> None:
        """Forget every cached translation."""
        self._tlb.clear()
        self._tables.clear()

    # --- guest-physical ----------------------------------------------------------------------------------------------

    def _initial(self, number: int) -> bytes | None:
        address = number * PAGE
        for slot in self._slots:
            if slot.gpa <= address < slot.gpa + slot.size:
                start = address - slot.gpa
                return self.cpu.case.memory.image(slot)[start : start + PAGE]
        return None

    def is_ram(self, physical: int) -> bool:
        """Whether a slot backs this address."""
        return self._page(physical >> 12) is not None

    def _page(self, number: int) -> bytearray | None:
        try:
            return self._ram[number]
        except KeyError:
            initial = self._initial(number)
            page = self._ram[number] = None if initial is None else bytearray(initial)
            return page

    def _ram_written(self, number: int) -> None:
        self._versions[number] = self._versions.get(number, 0) + 1
        if number in self._tables:
            self.flush()
            self.cpu.forget_code()

    def table_entry(self, physical: int, size: int) -> int:
        """A paging-structure entry. ModelError when it lies outside RAM."""
        page = self._page(physical >> 12)
        if page is None:
            raise ModelError(f"paging structure at {physical:#x} is not in RAM")
        self._tables.add(physical >> 12)
        at = physical & 0xFFF
        return int.from_bytes(page[at : at + size], "little")

    def set_table_entry(self, physical: int, size: int, value: int) -> None:
        """Accessed and dirty flags: written by the page walker, so cached translations stay valid."""
        page = self._page(physical >> 12)
        assert page is not None
        at = physical & 0xFFF
        page[at : at + size] = value.to_bytes(size, "little")
        self._versions[physical >> 12] = self._versions.get(physical >> 12, 0) + 1

    def physical_read(self, physical: int, size: int) -> bytes:
        """Bytes at a guest-physical address, within one page; outside RAM an MMIO exit for every 8 bytes."""
        page = self._page(physical >> 12)
        at = physical & 0xFFF
        if page is not None:
            return bytes(page[at : at + size])
        out = b""
        while len(out) < size:
            n = min(8, size - len(out))
            out += self.cpu.device_read(Mmio(physical + len(out), n, False), n)
        return out

    def physical_write(self, physical: int, data: bytes) -> None:
        """Write bytes to a guest-physical address, within one page; outside RAM an MMIO exit for every 8 bytes."""
        page = self._page(physical >> 12)
        at = physical & 0xFFF
        if page is None:
            for n in range(0, len(data), 8):
                part = data[n : n + 8]
                self.cpu.device_write(Mmio(physical + n, len(part), True, part))
            return
        page[at : at + len(data)] = data
        if self._undefined:
            for n in range(len(data)):
                self._undefined.pop(physical + n, None)
        self._ram_written(physical >> 12)

    # --- linear ------------------------------------------------------------------------------------------------------

    def _lookup(self, linear: int, kind: int) -> _Entry:
        """RAM page (None for MMIO) and physical address of the page that holds ``linear``."""
        cpu = self.cpu
        if not cpu.paging:
            number = linear >> 12
            return self._page(number), number << 12
        key = linear >> 12 << 4 | kind
        found = self._tlb.get(key)
        if found is None:
            physical = paging.walk(cpu, self, linear, kind) & ~0xFFF
            found = self._tlb[key] = self._page(physical >> 12), physical
        return found

    def translate(self, linear: int, write: bool = False, user: bool = False, fetch: bool = False) -> int:
        """The guest-physical address of ``linear``; Fault #PF where such an access is not allowed."""
        kind = paging.access_kind(self.cpu, write, user, fetch)
        return self._lookup(linear, kind)[1] | linear & 0xFFF

    def _parts(self, linear: int, size: int, kind: int) -> list[tuple[int, int]]:
        """(physical, size) of the pieces of an access: all pages are translated before any is touched."""
        out = []
        wrap = MASK[64] if self.cpu.long64 else MASK[32]
        while size:
            n = min(size, PAGE - (linear & 0xFFF))
            out.append((self._lookup(linear, kind)[1] | linear & 0xFFF, n))
            linear = (linear + n) & wrap
            size -= n
        return out

    def _read_linear(self, linear: int, size: int, kind: int, undefined_ok: bool = False) -> bytes:
        parts = self._parts(linear, size, kind)
        if self._undefined and not undefined_ok:
            for physical, n in parts:
                if any(physical + i in self._undefined for i in range(n)):
                    raise ModelError(f"instruction at {self.cpu.start_rip:#x} reads undefined bits at {physical:#x}")
        return b"".join(self.physical_read(physical, n) for physical, n in parts)

    def _write_linear(self, linear: int, data: bytes, kind: int, undefined: int = 0) -> None:
        done = 0
        for physical, n in self._parts(linear, len(data), kind):
            self.physical_write(physical, data[done : done + n])
            if undefined >> 8 * done and self._page(physical >> 12) is not None:
                self.mark_undefined(physical, undefined >> 8 * done & (1 << 8 * n) - 1)
            done += n

    def linear_read(self, linear: int, size: int, system: bool = True) -> int:
        """Read at a linear address; ``system``: as supervisor whatever the CPL (descriptor tables, TSS)."""
        user = not system and self.cpu.cpl == 3
        kind = paging.access_kind(self.cpu, False, user, implicit=system)
        return int.from_bytes(self._read_linear(linear, size, kind), "little")

    def linear_write(self, linear: int, size: int, value: int, system: bool = True) -> None:
        """Write at a linear address; ``system`` as in :meth:`linear_read`."""
        user = not system and self.cpu.cpl == 3
        kind = paging.access_kind(self.cpu, True, user, implicit=system)
        self._write_linear(linear, value.to_bytes(size, "little"), kind)

    def write_as(self, linear: int, data: bytes, cpl: int, undefined: int = 0) -> None:
        """Write at a linear address with the rights of level ``cpl``: the frame of a handler that runs there."""
        kind = paging.access_kind(self.cpu, True, cpl == 3)
        if self.cpu.dr7 & 0xFF:
            self._watch(linear, len(data), True)
        self._write_linear(linear, data, kind, undefined)

    # --- segments ----------------------------------------------------------------------------------------------------

    def linear(self, index: int, offset: int, size: int, write: bool) -> int:
        """Linear address of an access; #GP(0) or #SS(0) where the segment forbids it (SDM vol. 3A 5.3, 5.4, 3.3.7.1).

        In 64-bit mode only FS and GS have a base and the address must be canonical; in real and virtual-8086 mode the
        limit alone counts.
        """
        cpu = self.cpu
        seg = cpu.seg[index]
        if cpu.long64:
            linear = (offset + seg.base if index >= FS else offset) & MASK[64]
            if not cpu.canonical(linear) or not cpu.canonical(linear + size - 1 & MASK[64]):
                raise Fault(STACK if index == SS else GP, 0)
            return linear
        if cpu.pe and not cpu.vm86:
            kind = seg.type
            if seg.unusable:
                raise Fault(STACK if index == SS else GP, 0)
            if kind & 8:
                if write or not kind & 2:
                    raise Fault(STACK if index == SS else GP, 0)
            elif write and not kind & 2:
                raise Fault(STACK if index == SS else GP, 0)
            if kind & 0xC == 4:
                if offset <= seg.limit or offset + size - 1 > (0xFFFFFFFF if seg.db else 0xFFFF):
                    raise Fault(STACK if index == SS else GP, 0)
                return (seg.base + offset) & 0xFFFFFFFF
        if offset + size - 1 > seg.limit:
            if seg.limit == 0xFFFFFFFF:
                raise ModelError(f"access of {size} bytes at {offset:#x} wraps at 4 GiB: left open (SDM vol. 3A 5.3)")
            raise Fault(STACK if index == SS else GP, 0)
        return (seg.base + offset) & 0xFFFFFFFF

    def _kind(self, write: bool) -> int:
        cpu = self.cpu
        if not cpu.paging:
            return 0
        return paging.access_kind(cpu, write, cpu.cpl == 3)

    def _aligned(self, linear: int, size: int) -> None:
        """#AC(0) at CPL 3 (SDM vol. 3A 6.15, interrupt 17); a page fault goes before it (table 6-2)."""
        cpu = self.cpu
        if cpu.cpl == 3 and cpu.cr0 & _CR0_AM and size in (2, 4, 8) and linear % size:
            raise Fault(_ALIGNMENT_CHECK, 0)

    def read(self, index: int, offset: int, size: int, *, for_write: bool = False) -> int:
        """Read ``size`` bytes, little-endian. ``for_write``: the first half of a read-modify-write.

        ModelError when a byte read has undefined bits.
        """
        linear = self.linear(index, offset, size, for_write)
        kind = self._kind(for_write)
        cpu = self.cpu
        if cpu.rflags & AC:
            self._parts(linear, size, kind)
            self._aligned(linear, size)
        if cpu.dr7 & 0xFF:
            self._watch(linear, size, False)
        at = linear & 0xFFF
        if at + size <= PAGE and not self._undefined:
            page, _ = self._lookup(linear, kind)
            if page is not None:
                return int.from_bytes(page[at : at + size], "little")
        return int.from_bytes(self._read_linear(linear, size, kind), "little")

    def read_undefined(self, index: int, offset: int, size: int) -> tuple[int, int]:
        """Read ``size`` bytes: value, and the mask of its undefined bits."""
        linear = self.linear(index, offset, size, False)
        kind = self._kind(False)
        value = int.from_bytes(self._read_linear(linear, size, kind, undefined_ok=True), "little")
        mask = done = 0
        for physical, n in self._parts(linear, size, kind):
            for i in range(n):
                mask |= self._undefined.get(physical + i, 0) << 8 * (done + i)
            done += n
        if self.cpu.dr7 & 0xFF:
            self._watch(linear, size, False)
        return value, mask

    def write(self, index: int, offset: int, size: int, value: int, undefined: int = 0) -> None:
        """Write ``size`` bytes, little-endian; the bits of ``undefined`` are then undefined in memory."""
        linear = self.linear(index, offset, size, True)
        kind = self._kind(True)
        cpu = self.cpu
        if cpu.rflags & AC:
            self._parts(linear, size, kind)
            self._aligned(linear, size)
        if cpu.dr7 & 0xFF:
            self._watch(linear, size, True)
        at = linear & 0xFFF
        if at + size <= PAGE and not self._undefined and not undefined:
            page, physical = self._lookup(linear, kind)
            if page is not None:
                page[at : at + size] = value.to_bytes(size, "little")
                self._ram_written(physical >> 12)
                return
        self._write_linear(linear, value.to_bytes(size, "little"), kind, undefined)

    def read_bytes(self, index: int, offset: int, size: int) -> bytes:
        """Read ``size`` bytes without an alignment check."""
        linear = self.linear(index, offset, size, False)
        if self.cpu.dr7 & 0xFF:
            self._watch(linear, size, False)
        return self._read_linear(linear, size, self._kind(False))

    def write_bytes(self, index: int, offset: int, data: bytes) -> None:
        """Write bytes without an alignment check."""
        linear = self.linear(index, offset, len(data), True)
        if self.cpu.dr7 & 0xFF:
            self._watch(linear, len(data), True)
        self._write_linear(linear, data, self._kind(True))

    def check(self, index: int, offset: int, size: int, write: bool) -> None:
        """Raise the Fault that such an access would raise; access nothing."""
        linear = self.linear(index, offset, size, write)
        self._parts(linear, size, self._kind(write))
        if self.cpu.rflags & AC:
            self._aligned(linear, size)

    def physical_of(self, index: int, offset: int, size: int, write: bool = False) -> list[tuple[int, int]]:
        """(physical, size) of the pieces of an access."""
        return self._parts(self.linear(index, offset, size, write), size, self._kind(write))

    # --- code --------------------------------------------------------------------------------------------------------

    def fetch(self, offset: int, n: int) -> bytes:
        """``n`` bytes of code at CS:``offset``; #GP(0) past the limit, #PF. ModelError when code is not in RAM."""
        out = b""
        for physical, size in self.fetch_parts(offset, n):
            page = self._page(physical >> 12)
            if page is None:
                raise ModelError(f"code at physical address {physical:#x} is not in RAM")
            if self._undefined and any(physical + i in self._undefined for i in range(size)):
                raise ModelError(f"code at physical address {physical:#x} has undefined bits")
            at = physical & 0xFFF
            out += page[at : at + size]
        return out

    def fetch_parts(self, offset: int, n: int) -> list[tuple[int, int]]:
        """(physical, size) of the pieces of a fetch (SDM vol. 3A 4.6.1 for its rights)."""
        cpu = self.cpu
        cs = cpu.seg[CS]
        if cpu.long64:
            linear = offset & MASK[64]
            if not cpu.canonical(linear) or not cpu.canonical(linear + n - 1 & MASK[64]):
                raise Fault(GP, 0)
        else:
            if offset + n - 1 > cs.limit:
                raise Fault(GP, 0)
            linear = (cs.base + offset) & 0xFFFFFFFF
        return self._parts(linear, n, paging.access_kind(cpu, False, cpu.cpl == 3, fetch=True))

    # --- data breakpoints --------------------------------------------------------------------------------------------

    def _watch(self, linear: int, size: int, write: bool) -> None:
        """Earn B0-B3 where an enabled data breakpoint overlaps the access (SDM vol. 3B 17.2.4, 17.2.5)."""
        cpu = self.cpu
        for n in range(4):
            kind = cpu.dr7 >> 16 + 4 * n & 3
            if not cpu.dr7 >> 2 * n & 3 or kind not in ((1, 3) if write else (3,)):
                continue
            length = (1, 2, 8, 4)[cpu.dr7 >> 18 + 4 * n & 3]
            start = cpu.dr[n] & ~(length - 1)
            if start < linear + size and linear < start + length:
                cpu.trap_bits |= 1 << n
