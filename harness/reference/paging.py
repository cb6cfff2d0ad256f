"""Address translation: 32-bit, PAE, 4-level and 5-level paging with every access right (SDM vol. 3A chapter 4).

The walker is coherent: it never uses a stale TLB entry, because :class:`~harness.reference.memory.Memory` forgets its
cached translations whenever a page-table page is written.  A guest that changes a present entry and then relies on the
old one without INVLPG depends on what the architecture leaves open (4.10.2.3).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from harness.reference.cpu import AC, GP, PAGE_FAULT, Cpu, Fault

if TYPE_CHECKING:
    from harness.reference.memory import Memory

P, RW, US, A, D, PS, NX = 1, 2, 4, 1 << 5, 1 << 6, 1 << 7, 1 << 63
CR0_WP, CR0_PG = 1 << 16, 1 << 31
CR4_PSE, CR4_PAE, CR4_LA57, CR4_SMEP, CR4_SMAP, CR4_PKE = 1 << 4, 1 << 5, 1 << 12, 1 << 20, 1 << 21, 1 << 22
EFER_LMA, EFER_NX = 1 << 10, 1 << 11

# Kinds of access, or-ed; they key the TLB too.
WRITE, USER, FETCH, NO_AC = 1, 2, 4, 8
"""NO_AC: a supervisor data access to which SMAP applies (EFLAGS.AC clear, or an implicit system access; 4.6.1)."""

# Bits of the page-fault error code (4.7).
_PF_P, _PF_W, _PF_U, _PF_RSVD, _PF_I, _PF_PK = 1, 2, 4, 8, 16, 32


def access_kind(cpu: Cpu, write: bool, user: bool, fetch: bool = False, implicit: bool = False) -> int:
    """The kind of an access, for :func:`walk`. ``implicit``: a system access, supervisor whatever the CPL (4.6.1)."""
    kind = WRITE if write else 0
    if fetch:
        kind |= FETCH
    if user:
        kind |= USER
    elif cpu.cr4 & CR4_SMAP and not fetch and (implicit or not cpu.rflags & AC):
        kind |= NO_AC
    return kind


def page_fault(cpu: Cpu, linear: int, kind: int, bits: int) -> Fault:
    """#PF with its error code (4.7): I/D only where fetches have rights of their own."""
    error = bits
    if kind & WRITE:
        error |= _PF_W
    if kind & USER:
        error |= _PF_U
    if kind & FETCH and (cpu.cr4 & CR4_SMEP or (cpu.cr4 & CR4_PAE and cpu.efer & EFER_NX)):
        error |= _PF_I
    return Fault(PAGE_FAULT, error, linear)


class _Walk:
    """One walk: the entries used so far and the rights that they leave."""

    __slots__ = ("cpu", "entries", "kind", "linear", "mem", "nx", "pkey", "rw", "us", "width")

    def __init__(self, cpu: Cpu, mem: Memory, linear: int, kind: int, width: int) -> None:
        self.cpu, self.mem, self.linear, self.kind, self.width = cpu, mem, linear, kind, width
        self.entries: list[tuple[int, int]] = []
        self.rw = self.us = True
        self.nx = False
        self.pkey: int | None = None

    def fail(self, bits: int) -> Fault:
        """#PF. Whether the accessed flags of the entries on the way were set is left open (4.8)."""
        for address, entry in self.entries:
            if not entry & A:
                self.mem.mark_undefined(address, A)
        return page_fault(self.cpu, self.linear, self.kind, bits)

    def entry(self, address: int, reserved: int) -> int:
        """Read a paging-structure entry; #PF when it is not present or has a reserved bit set."""
        value = self.mem.table_entry(address, self.width)
        if not value & P:
            raise self.fail(0)
        if value & reserved:
            raise self.fail(_PF_P | _PF_RSVD)
        self.entries.append((address, value))
        self.rw = self.rw and bool(value & RW)
        self.us = self.us and bool(value & US)
        self.nx = self.nx or bool(value & NX)
        return value

    def finish(self, physical: int) -> int:
        """Check the rights (4.6), set the accessed and dirty flags (4.8), and hand back the physical address."""
        cpu, kind = self.cpu, self.kind
        if not self._allowed():
            raise self.fail(_PF_P)
        if self.pkey is not None and self.us and not kind & FETCH and cpu.cr4 & CR4_PKE:  # 4.6.2
            rights = cpu.pkru >> 2 * self.pkey & 3
            if rights & 1 or (rights & 2 and kind & WRITE and (kind & USER or cpu.cr0 & CR0_WP)):
                raise self.fail(_PF_P | _PF_PK)
        last = len(self.entries) - 1
        for n, (address, entry) in enumerate(self.entries):
            want = entry | A | (D if n == last and kind & WRITE else 0)
            if want != entry:
                self.mem.set_table_entry(address, self.width, want)
        return physical

    def _allowed(self) -> bool:
        cpu, kind = self.cpu, self.kind
        nx = self.nx and cpu.efer & EFER_NX
        if kind & USER:
            return self.us and not (kind & WRITE and not self.rw) and not (kind & FETCH and nx)
        if kind & FETCH:
            return not nx and not (self.us and cpu.cr4 & CR4_SMEP)
        if self.us and kind & NO_AC:
            return False
        return not (kind & WRITE and not self.rw and cpu.cr0 & CR0_WP)


def walk(cpu: Cpu, mem: Memory, linear: int, kind: int) -> int:
    """Linear to guest-physical address for an access of ``kind``. Fault #PF where it is not allowed."""
    if not cpu.cr4 & CR4_PAE:
        return _walk32(_Walk(cpu, mem, linear, kind, 4))
    if not cpu.efer & EFER_LMA:
        return _walk_pae(_Walk(cpu, mem, linear, kind, 8))
    return _walk_long(_Walk(cpu, mem, linear, kind, 8))


def _walk32(w: _Walk) -> int:
    """32-bit paging (4.3), with PSE-36 (tables 4-4, 4-5)."""
    cpu, linear = w.cpu, w.linear
    w.nx = False
    pde = w.entry((cpu.cr3 & 0xFFFFF000) + (linear >> 22) * 4, 0)
    if pde & PS and cpu.cr4 & CR4_PSE:
        width = min(40, cpu.profile.maxphyaddr) if "pse36" in cpu.features else 32
        reserved = 1 << 21 | sum(1 << n for n in range(13 + width - 32, 21))
        if pde & reserved:
            raise w.fail(_PF_P | _PF_RSVD)
        high = (pde >> 13 & 0xFF) & (1 << (width - 32)) - 1
        return w.finish(high << 32 | pde & 0xFFC00000 | linear & 0x3FFFFF)
    pte = w.entry((pde & 0xFFFFF000) + (linear >> 12 & 0x3FF) * 4, 0)
    return w.finish(pte & 0xFFFFF000 | linear & 0xFFF)


def _reserved(cpu: Cpu, top: int) -> int:
    """Address bits from MAXPHYADDR to ``top``, and XD where EFER.NXE is clear."""
    bits = (1 << top) - (1 << cpu.profile.maxphyaddr) if cpu.profile.maxphyaddr < top else 0
    return bits | (0 if cpu.efer & EFER_NX else NX)


def _walk_pae(w: _Walk) -> int:
    """PAE paging (4.4). The PDPTEs come from the registers that MOV to CR3 loaded (4.4.1)."""
    cpu, linear = w.cpu, w.linear
    pdpte = cpu.pdptr[linear >> 30 & 3]
    if not pdpte & P:
        raise w.fail(0)
    reserved = _reserved(cpu, 63)
    frame = ((1 << cpu.profile.maxphyaddr) - 1) & ~0xFFF
    pde = w.entry((pdpte & frame) + (linear >> 21 & 0x1FF) * 8, reserved)
    if pde & PS:
        if pde & 0x1FE000:
            raise w.fail(_PF_P | _PF_RSVD)
        return w.finish(pde & frame & ~0x1FFFFF | linear & 0x1FFFFF)
    pte = w.entry((pde & frame) + (linear >> 12 & 0x1FF) * 8, reserved)
    return w.finish(pte & frame | linear & 0xFFF)


def _walk_long(w: _Walk) -> int:
    """4-level and 5-level paging (4.5)."""
    cpu, linear = w.cpu, w.linear
    reserved = _reserved(cpu, 52)
    frame = ((1 << min(cpu.profile.maxphyaddr, 52)) - 1) & ~0xFFF
    table = cpu.cr3 & frame
    for shift in (48, 39, 30, 21, 12) if cpu.cr4 & CR4_LA57 else (39, 30, 21, 12):
        no_ps = shift >= 39 or (shift == 30 and "pdpe1gb" not in cpu.features)
        entry = w.entry(table + (linear >> shift & 0x1FF) * 8, reserved | (PS if no_ps else 0))
        if shift == 12 or (entry & PS and not no_ps):
            inside = (1 << shift) - 1
            if entry & inside & ~0x1FFF and shift != 12:
                raise w.fail(_PF_P | _PF_RSVD)
            w.pkey = entry >> 59 & 0xF
            return w.finish(entry & frame & ~inside | linear & inside)
        table = entry & frame
    raise AssertionError("the last level always ends the walk")


def read_pdptes(cpu: Cpu, cr3: int) -> list[int]:
    """The four PDPTEs at ``cr3``; #GP(0) when a present one has a reserved bit set (4.4.1)."""
    base = cr3 & 0xFFFFFFE0
    values = [cpu.mem.table_entry(base + 8 * n, 8) for n in range(4)]
    reserved = 0x1E6 | ((1 << 64) - (1 << cpu.profile.maxphyaddr))
    if any(v & P and v & reserved for v in values):
        raise Fault(GP, 0)
    return values
