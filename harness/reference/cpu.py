"""Cpu: the registers of the reference model, the mode they imply, and the helpers that every instruction uses.

Written from the manuals (SDM vol. 1 chapter 3, vol. 3A chapters 2-6; APM vol. 2), never from KVM's source.  The rest
of the model (memory, events, the instruction modules) works on one Cpu; ``execute.py`` drives it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from harness.case import CAP_EXIT_HYPERCALL, CAP_USER_SPACE_MSR, Case
from harness.cpuid import CpuProfile
from harness.exits import Exit
from harness.state import MASK64, SEGMENT_NAMES, CpuState, Events, Segment, Table

if TYPE_CHECKING:
    from harness.reference.execute import CodeEntry
    from harness.reference.memory import Memory
    from harness.reference.svm import Guest

CF, PF, AF, ZF, SF, TF, IF, DF, OF = 1, 4, 0x10, 0x40, 0x80, 0x100, 0x200, 0x400, 0x800
IOPL, NT, RF, VM, AC, VIF, VIP, ID = 0x3000, 0x4000, 0x10000, 0x20000, 0x40000, 0x80000, 0x100000, 0x200000
ARITH: Final = CF | PF | AF | ZF | SF | OF
"""The six status flags; no other flag is ever undefined."""

ES, CS, SS, DS, FS, GS = range(6)
RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI = range(8)
DE, DB, NMI, BP, OFLOW, BR, UD, NM, DF_VECTOR, TS, NP, STACK, GP, PAGE_FAULT = (*range(9), 10, 11, 12, 13, 14)
"""Exception vectors (SDM vol. 3A table 6-1); ``DF_VECTOR`` is #DF, ``STACK`` is #SS, ``OFLOW`` is #OF."""

MASK: Final = {8: 0xFF, 16: 0xFFFF, 32: 0xFFFFFFFF, 64: MASK64}
SHADOW_MOV_SS, SHADOW_STI = 1, 2
APX_XCR0: Final = 1 << 19


class Fault(Exception):
    """An exception of the guest: vector, error code or None, CR2 or None."""

    def __init__(self, vector: int, error: int | None = None, cr2: int | None = None) -> None:
        super().__init__(f"#{vector}" + (f"({error:#x})" if error is not None else ""))
        self.vector, self.error, self.cr2 = vector, error, cr2


class ModelError(Exception):
    """The Case is outside of what the model knows, or depends on what the architecture leaves undefined."""


def _apx_level(profile: CpuProfile) -> int:
    """The decoder's ``apx`` while APX is enabled. Without leaf 29H (not in the first revisions of APX) all of it."""
    if "apx" not in profile.features:
        return 0
    leaf = profile.leaf(0x29)
    return 1 if leaf is None or leaf.ebx & 1 else 2


class Cpu:
    """The whole architectural state, writable, with what follows from it (mode, code size, stack size) kept at hand.

    Sizes are in bits (8, 16, 32, 64) everywhere.  ``gpr`` values are unsigned 64-bit.  ``undefined`` is the mask of
    RFLAGS bits whose value the architecture does not define now.  After a change to CS, SS, CR0, CR4, EFER, XCR0,
    RFLAGS.VM or CPL: :meth:`mode_changed`.
    """

    __slots__ = (
        "__dict__", "code", "dr6", "dr7", "gpr", "long64", "mem", "pending_exits", "repeat", "rflags", "rip", "seg",
        "shadow", "stack_bits", "start_rip", "trap_bits", "undefined",
    )  # fmt: skip

    def __init__(self, case: Case) -> None:
        self.gpr: list[int] = [0] * 32
        self.rip = self.start_rip = 0
        self.rflags = 2
        self.undefined = 0
        self.shadow = 0
        self.seg: list[Segment] = [Segment()] * 6
        self.ldtr = self.tr = Segment()
        self.gdtr = self.idtr = Table()
        self.cr0 = self.cr2 = self.cr3 = self.cr4 = self.cr8 = 0
        self.efer = self.apic_base = 0
        self.xcr0 = 1
        self.pdptr: list[int] = [0] * 4
        self.dr: list[int] = [0] * 4
        self.dr6, self.dr7 = 0xFFFF0FF0, 0x400
        self.ssp = self.pkru = 0
        self.msrs: dict[int, int] = {}
        self.nmi_masked = self.nmi_pending = self.smm = 0
        self.retired = 0
        self.repeat = False
        self.guest: Guest | None = None
        """The guest that this guest runs, while it runs (SVM)."""
        self.gif = True
        self.trap_bits = 0
        """DR6 bits of debug traps that the current instruction has earned (data and I/O breakpoints, BD, BT)."""
        self.pending_exits: list[Exit] = []
        self.reads = 0
        self._caches: dict[tuple[Any, ...], dict[int, CodeEntry]] = {}
        self.code: dict[int, CodeEntry] = {}
        self.load(case)

    # --- the whole state ---------------------------------------------------------------------------------------------

    def load(self, case: Case) -> None:
        """Start over with the state, RAM and profile of ``case``."""
        from harness.reference.memory import Memory

        self.case = case
        self.profile: CpuProfile = case.profile
        self.features = case.profile.features
        self.amd = case.profile.amd
        self.forced = "fep" in case.requires
        self.pending_exits, self.reads, self.retired = [], 0, 0
        self.repeat, self.trap_bits = False, 0
        self.guest, self.gif = None, True
        self.unseen_msrs: dict[int, int] = {}
        self.msr_exits = any(number == CAP_USER_SPACE_MSR and args[0] & 2 for number, args in case.shape.caps)
        """MSRs that this processor does not have go to userspace (KVM_MSR_EXIT_REASON_UNKNOWN)."""
        self.hypercall_exits = sum(args[0] for number, args in case.shape.caps if number == CAP_EXIT_HYPERCALL)
        """Hypercalls that go to userspace, a bit each."""
        self.xrstor_area = -1
        """Linear address of the area that the last XRSTOR loaded, for the modified optimization (SDM vol. 1 13.5.6)."""
        self.apx_level = _apx_level(self.profile)
        self.mem: Memory = Memory(self)
        self.load_state(case.start)

    def load_state(self, s: CpuState) -> None:
        """Take over every register of ``s``."""
        self.gpr = list(s.gpr)
        self.rip, self.rflags, self.undefined = s.rip, s.rflags | 2, 0
        self.seg = [getattr(s, name) for name in SEGMENT_NAMES[:6]]
        self.ldtr, self.tr, self.gdtr, self.idtr = s.ldtr, s.tr, s.gdtr, s.idtr
        self.cr0, self.cr2, self.cr3, self.cr4, self.cr8 = s.cr0, s.cr2, s.cr3, s.cr4, s.cr8
        self.efer, self.apic_base, self.xcr0 = s.efer, s.apic_base, s.xcr0
        self.pdptr, self.dr, self.dr6, self.dr7 = list(s.pdptr), list(s.dr), s.dr6, s.dr7
        self.ssp, self.pkru, self.msrs = s.ssp, s.pkru, dict(s.msrs)
        self.shadow = SHADOW_STI if s.events.shadow else 0
        self.nmi_masked, self.nmi_pending, self.smm = s.events.nmi_masked, s.events.nmi_pending, s.events.smm
        self.mem.flush()
        self.forget_code()
        self.mode_changed()

    def state(self) -> CpuState:
        """The registers as a CpuState."""
        segs = dict(zip(SEGMENT_NAMES[:6], self.seg, strict=True))
        p, d = self.pdptr, self.dr
        return CpuState(
            gpr=tuple(self.gpr), rip=self.rip, rflags=self.rflags, **segs, ldtr=self.ldtr, tr=self.tr,
            gdtr=self.gdtr, idtr=self.idtr, cr0=self.cr0, cr2=self.cr2, cr3=self.cr3, cr4=self.cr4, cr8=self.cr8,
            efer=self.efer, apic_base=self.apic_base, xcr0=self.xcr0, pdptr=(p[0], p[1], p[2], p[3]),
            dr=(d[0], d[1], d[2], d[3]), dr6=self.dr6, dr7=self.dr7, ssp=self.ssp, pkru=self.pkru,
            msrs=tuple(sorted(self.msrs.items())),
            events=Events(shadow=int(bool(self.shadow)), nmi_masked=self.nmi_masked, nmi_pending=self.nmi_pending,
                          smm=self.smm),
        )  # fmt: skip

    # --- mode --------------------------------------------------------------------------------------------------------

    def mode_changed(self) -> None:
        """Recompute what follows from CS, SS, CR0, CR4, EFER, XCR0 and RFLAGS.VM (SDM vol. 3A 2.2)."""
        cs, ss = self.seg[CS], self.seg[SS]
        self.pe = bool(self.cr0 & 1)
        self.vm86 = bool(self.pe and self.rflags & VM)
        self.paging = bool(self.cr0 >> 31)
        self.lma = bool(self.efer >> 10 & 1)
        self.long64 = bool(self.lma and cs.l)
        self.bits = 64 if self.long64 else 32 if cs.db and not self.vm86 else 16
        self.stack_bits = 64 if self.long64 else 32 if ss.db and not self.vm86 else 16
        # CPL is the DPL of SS (SDM vol. 3C 26.3.1.2: guest SS.DPL); 0 in real mode, 3 in virtual-8086 mode.
        self.cpl = 0 if not self.pe else 3 if self.vm86 else ss.dpl
        self.apx = self.apx_level if self.cr4 >> 18 & 1 and self.xcr0 & APX_XCR0 else 0
        self.lin_bits = 57 if self.cr4 >> 12 & 1 else 48
        key = (self.bits, self.apx, cs.base, cs.limit, self.cpl, self.cr0 & 0x80000001, self.cr4, self.efer)
        self.code = self._caches.setdefault(key, {})

    def forget_code(self) -> None:
        """Drop every compiled instruction: the translation of code addresses may have changed (TLB flush)."""
        for cache in self._caches.values():
            cache.clear()

    def canonical(self, address: int) -> bool:
        """Whether ``address`` is canonical for the current paging mode (SDM vol. 1 3.3.7.1)."""
        top = address >> (self.lin_bits - 1)
        return top == 0 or top == (1 << (65 - self.lin_bits)) - 1

    def canonical_base(self, address: int) -> bool:
        """Whether ``address`` may go into an MSR or the base of a segment or descriptor table.

        That depends on what the processor can have, not on CR4.LA57 (Intel's 5-level paging paper; measured on silicon:
        Linux commit "KVM: x86: model canonical checks more precisely").
        """
        bits = 57 if "la57" in self.features else 48
        top = address >> (bits - 1)
        return top == 0 or top == (1 << (65 - bits)) - 1

    # --- registers ---------------------------------------------------------------------------------------------------

    def read_reg(self, size: int, index: int, rex: bool = True) -> int:
        """GPR ``index``; 8-bit 4-7 are AH, CH, DH, BH without REX or REX2 (SDM vol. 2A 2.2.1.2)."""
        if size == 8 and not rex and 4 <= index < 8:
            return self.gpr[index - 4] >> 8 & 0xFF
        return self.gpr[index] & MASK[size]

    def write_reg(self, size: int, index: int, value: int, rex: bool = True) -> None:
        """Write a GPR: 8- and 16-bit writes merge, 32-bit writes zero-extend (SDM vol. 1 3.4.1.1)."""
        g = self.gpr
        if size == 64:
            g[index] = value & MASK64
        elif size == 32:
            g[index] = value & 0xFFFFFFFF
        elif size == 16:
            g[index] = g[index] & ~0xFFFF | value & 0xFFFF
        elif not rex and 4 <= index < 8:
            g[index - 4] = g[index - 4] & ~0xFF00 | (value & 0xFF) << 8
        else:
            g[index] = g[index] & ~0xFF | value & 0xFF

    def flags(self, mask: int) -> int:
        """RFLAGS bits of ``mask``, read by an instruction. ModelError when one of them is undefined."""
        if self.undefined & mask:
            raise ModelError(
                f"instruction at {self.start_rip:#x} reads flags that are undefined now: {self.undefined & mask:#x}"
            )
        return self.rflags & mask

    # --- stack -------------------------------------------------------------------------------------------------------

    def set_sp(self, value: int) -> None:
        """Write SP, ESP or RSP, as the stack size says; a 16-bit stack leaves the rest of ESP alone."""
        self.write_reg(self.stack_bits, RSP, value)

    def sp(self) -> int:
        """SP, ESP or RSP, as the stack size says."""
        return self.gpr[RSP] & MASK[self.stack_bits]

    def push(self, value: int, size: int) -> None:
        """Push ``size`` bits. RSP moves only if the write did not fault (SDM vol. 1 6.2, vol. 2B PUSH)."""
        top = (self.gpr[RSP] - (size >> 3)) & MASK[self.stack_bits]
        self.mem.write(SS, top, size >> 3, value & MASK[size])
        self.set_sp(top)

    def pop(self, size: int) -> int:
        """Pop ``size`` bits; RSP moves only if the read did not fault."""
        top = self.gpr[RSP] & MASK[self.stack_bits]
        value = self.mem.read(SS, top, size >> 3)
        self.set_sp(top + (size >> 3))
        return value

    def set_rip(self, target: int, size: int | None = None) -> None:
        """Near transfer: truncate to ``size`` bits, #GP(0) past the CS limit or non-canonical (SDM vol. 2A JMP)."""
        self.rip = self.check_rip(target, self.bits if size is None else size)

    def check_rip(self, target: int, size: int) -> int:
        """The target of a near transfer truncated to ``size`` bits; #GP(0) when CS cannot reach it."""
        target &= MASK[size]
        if self.long64:
            if not self.canonical(target):
                raise Fault(GP, 0)
        elif target > self.seg[CS].limit:
            raise Fault(GP, 0)
        return target

    def again(self) -> None:
        """The current instruction goes on at its own start (REP between iterations)."""
        self.rip = self.start_rip
        self.repeat = True

    def linear_rip(self) -> int:
        """RIP as a linear address."""
        return self.rip if self.long64 else (self.seg[CS].base + self.rip) & 0xFFFFFFFF

    # --- the outside -------------------------------------------------------------------------------------------------

    def device_write(self, exit: Exit) -> None:
        """The instruction writes to a port or to MMIO."""
        self.pending_exits.append(exit)

    def device_read(self, exit: Exit, size: int) -> bytes:
        """The instruction reads ``size`` bytes from a port or from MMIO: what the devices of the Case answer."""
        self.pending_exits.append(exit)
        data = self.case.read_data(self.reads, size)
        self.reads += 1
        return data
