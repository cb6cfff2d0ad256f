"""The decoder: bytes to :class:`~harness.reference.insn.Insn` through the table (SDM vol. 2A chapter 2, APX 3.1).

Where APX is concerned, three decoders have been asked besides the specification: Intel's XED (its data files), GNU
objdump 2.44 and LLVM 19; a comment says so where they do not agree.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Final

from harness.cpuid import CpuProfile
from harness.reference.cpu import GP, MASK, UD, Fault, ModelError
from harness.reference.insn import EVEX, REX2_ONLY, VEX, Insn, Row, stack_segment, undefined_opcode

if TYPE_CHECKING:
    from harness.reference.table import Entry, Table

_SEGMENT_PREFIX: Final = {0x26: 0, 0x2E: 1, 0x36: 2, 0x3E: 3, 0x64: 4, 0x65: 5}
# Bytes that are a prefix, an escape, or absent in 64-bit mode; after REX2 there is only an opcode (APX 3.1.2.1).
_NO_REX2: Final = frozenset(
    {0x0F, 0x26, 0x2E, 0x36, 0x3E, 0x62, 0x64, 0x65, 0x66, 0x67, 0xC4, 0xC5, 0xD5, 0xF0, 0xF2, 0xF3}
)
_NO_REX2_ROWS: Final = ((4, 7, 0xA, 0xE), (3, 8))
# EVEX map 4 opcode -> pp of instructions that the model does not know: WRUSS, WRSS, MOVRS, SHA and Key Locker, INVEPT,
# INVVPID, MOVDIR64B with ENQCMD and USER_MSR, MOVDIRI, RAO-INT.
_ANY_PP: Final = (0, 1, 2, 3)
_MAP4_UNKNOWN: Final = {
    0x65: (1,), 0x66: (0,), 0x8A: (0,), 0x8B: (0, 1), 0xD4: _ANY_PP, **dict.fromkeys(range(0xD8, 0xE0), _ANY_PP),
    0xF0: (2,), 0xF1: (2,), 0xF8: (1, 2, 3), 0xF9: (0,), 0xFC: _ANY_PP,
}  # fmt: skip
# 0F 01 with these ModRM bytes is MONITOR, MWAIT, SERIALIZE, MONITORX, MWAITX, CLZERO, RDPRU, INVLPGB or TLBSYNC, whose
# CPUID bits the harness does not name.
_GROUP7_UNKNOWN: Final = frozenset({0xC8, 0xC9, 0xE8, *range(0xFA, 0x100)})
_BASE16: Final = ((3, 6), (3, 7), (5, 6), (5, 7), (6, -1), (7, -1), (5, -1), (3, -1))
_INVALID: Final = Row("(bad)", "", "", undefined_opcode, "SDM 2D A.2", size="v")


class Truncated(Exception):
    """The bytes end inside of the instruction."""


@lru_cache(maxsize=64)
def _features(profile: CpuProfile | None) -> frozenset[str] | None:
    return None if profile is None else profile.features


class _Decoder:
    """One pass over the bytes of one instruction."""

    def __init__(self, table: Table, code: bytes, bits: int, features: frozenset[str] | None, amd: bool, apx: int):
        self.table, self.code, self.bits = table, code, bits
        self.features, self.amd, self.apx = features, amd, apx
        self.at = 0
        self.osz = self.asz = self.lock = self.rex2 = False
        self.rep, self.override, self.rex = 0, -1, -1
        self.ext = [0, 0, 0]  # bit 4 of reg, index and base
        self.vex = self.evex = False
        self.map = self.pp = self.v = self.p2 = self.long = 0

    def byte(self) -> int:
        if self.at >= len(self.code):
            if self.at >= 15:
                raise Fault(GP, 0)  # longer than 15 bytes (SDM vol. 2A 2.3.11, vol. 3A 6.15 #GP)
            raise Truncated
        self.at += 1
        if self.at > 15:
            raise Fault(GP, 0)
        return self.code[self.at - 1]

    def signed(self, size: int) -> int:
        n = size >> 3
        raw = bytes(self.byte() for _ in range(n))
        return int.from_bytes(raw, "little", signed=True)

    def prefixes(self) -> int:
        """Consume prefixes; the first opcode byte."""
        while True:
            b = self.byte()
            if b == 0x66:
                self.osz = True
            elif b == 0x67:
                self.asz = True
            elif b == 0xF0:
                self.lock = True
            elif b in (0xF2, 0xF3):
                self.rep = b
            elif b in _SEGMENT_PREFIX:
                # In 64-bit mode the ES, CS, SS and DS overrides are ignored (SDM vol. 2A 2.1.1, vol. 1 3.4.4).
                if self.bits != 64 or b >= 0x64:
                    self.override = _SEGMENT_PREFIX[b]
            elif self.bits == 64 and b & 0xF0 == 0x40:
                self.rex = b & 0xF
                continue
            elif self.bits == 64 and b == 0xD5:
                return self.prefix_rex2()
            else:
                return b
            self.rex = -1  # a REX that is not the last prefix is ignored (SDM vol. 2A 2.2.1)

    def prefix_rex2(self) -> int:
        if not self.apx or self.rex >= 0:
            raise Fault(UD)
        self.rex2 = True
        p = self.byte()
        self.rex = p & 0xF
        self.ext = [p >> 6 & 1, p >> 5 & 1, p >> 4 & 1]
        self.map1 = p >> 7
        return self.byte()

    def opcode(self) -> tuple[int, int]:
        """(map as in table.Entry, byte); #UD for what a prefix does not allow."""
        b = self.prefixes()
        if self.rex2:
            return self.rex2_opcode(b)
        if b in (0x62, 0xC4, 0xC5):
            peek = self.code[self.at] if self.at < len(self.code) else -1
            if self.bits == 64 or peek >= 0xC0 or peek < 0:  # else BOUND, LES, LDS
                return self.vex_opcode(b)
        if b != 0x0F:
            return 0, b
        b = self.byte()
        if b == 0x38:
            return 2, self.byte()
        if b == 0x3A:
            return 3, self.byte()
        return 1, b

    def rex2_opcode(self, b: int) -> tuple[int, int]:
        """#UD for the rows that REX2 reserves, and for what is no opcode (APX 3.1.2.1)."""
        if b == 0xA1 and not self.map1:
            # JMPABS: 66, 67, F2, F3, LOCK and W are #UD (binutils' tests of bad JMPABS; XED); of segment overrides
            # and the other payload bits nobody says so.
            if self.rex & 8 or self.osz or self.asz or self.rep or self.lock:
                raise Fault(UD)
            return REX2_ONLY, b
        if b >> 4 in _NO_REX2_ROWS[self.map1] or (not self.map1 and b in _NO_REX2):
            raise Fault(UD)
        return self.map1, b

    # --- VEX and EVEX ------------------------------------------------------------------------------------------------

    def vex_opcode(self, b: int) -> tuple[int, int]:
        """The opcode after a VEX or EVEX prefix, of the instructions on GPRs; the others are a ModelError.

        66, F2, F3, LOCK and REX before the prefix are #UD (SDM vol. 2A 2.3.2-2.3.5, 2.7).
        """
        bad = self.osz or bool(self.rep) or self.lock or self.rex >= 0
        p0 = self.byte()
        if b == 0xC5:
            self.unknown("VEX encoding")
        p1 = self.byte()
        wide = self.bits == 64
        self.pp, self.v = p1 & 3, ~p1 >> 3 & (15 if wide else 7)
        self.rex = p1 >> 4 & 8 | (~p0 >> 5 & 7 if wide else 0)
        if b == 0xC4:
            self.vex, self.map, self.long = True, p0 & 31, p1 >> 2 & 1
            return self.gpr_opcode(VEX, bad)
        self.evex, self.map = True, p0 & 7
        self.p2 = self.byte()
        self.v |= ~self.p2 << 1 & 16
        self.ext = [~p0 >> 4 & 1, ~p1 >> 2 & 1, p0 >> 3 & 1]
        if self.map == 4 and (not wide or not self.apx):
            raise Fault(UD)
        return self.gpr_opcode(EVEX, bad)

    def gpr_opcode(self, base: int, bad: bool) -> tuple[int, int]:
        key = base + self.map, self.byte()
        if not self.table.lookup(*key) and self.map != 4:
            self.unknown("VEX or EVEX encoding")
        if bad or (self.evex and not self.apx):
            raise Fault(UD)
        return key

    def pick_extended(self, map_: int, b: int) -> Row:
        """The row for an opcode with a VEX or EVEX prefix, #UD's where reserved bits are not what they must be."""
        if self.at >= len(self.code):
            self.byte()
        peek, p2 = self.code[self.at], self.p2
        nd, nf = p2 >> 4 & 1, p2 >> 2 & 1
        for entry in self.table.lookup(map_, b):
            if not entry.extended(peek, self.pp, nd, nf) or not self.has(entry.row):
                continue
            if not self.payload_fits(entry):
                return _INVALID
            if self.apx == 2 and self.evex:
                self.without_nci(entry, nd, nf)
            self.osz = self.pp == 1 and not entry.prefix
            return entry.row
        if self.map == 4 and self.pp in _MAP4_UNKNOWN.get(b, ()):
            self.unknown("EVEX encoding")
        return _INVALID

    def payload_fits(self, entry: Entry) -> bool:
        """Reserved bits: L, L', z and b; aaa but for NF; vvvv where it selects nothing (APX 3.1.2.3, XED's NOEVSR)."""
        if entry.nd == "SCC":
            return not self.p2 & 0xE0
        if self.long or self.p2 & (0xE3 if self.map == 4 else 0xF3):
            return False
        return not self.v or entry.uses_vvvv or (entry.nd == "*" and bool(self.p2 & 0x10))

    def without_nci(self, entry: Entry, nd: int, nf: int) -> None:
        """CPUID.29H:EBX[0] clear: no NDD, no NF, no new conditional instructions.

        "Any Intel processor that enumerates APX_F also enumerates APX_NCI_NDD_NF" (OpenJDK pull request 27320, by
        Intel); what is left of the promoted forms then is not said.
        """
        if entry.row.mnemonic in ("push2", "pop2"):
            return
        if nd or nf or entry.nd == "SCC" or entry.row.mnemonic.startswith("cfcmov"):
            raise Fault(UD)
        if self.map == 4:
            self.unknown("EVEX map 4 without CPUID.29H:EBX[0]")

    def has(self, row: Row) -> bool:
        """Whether this processor in this mode has ``row``."""
        if row.modes == ("no64" if self.bits == 64 else "64"):
            return False
        return not row.feature or self.features is None or row.feature in self.features

    # --- rows --------------------------------------------------------------------------------------------------------

    def pick(self, map_: int, b: int) -> Row:
        """The row for the opcode; needs the ModRM byte only to look at it."""
        if map_ >= VEX:
            return self.pick_extended(map_, b)
        peek = self.code[self.at] if self.at < len(self.code) else -1
        known = False
        for entry in self.table.lookup(map_, b):
            if entry.modrm and peek < 0:
                self.byte()
            row = entry.row
            if not entry.selected(peek, self.osz, self.rep):
                continue
            known = True
            if not entry.operand_fits(peek):
                continue
            if not self.has(row):
                continue
            return row if row.rex2 or not self.rex2 else _INVALID
        if known and not ((map_, b) == (1, 1) and peek in _GROUP7_UNKNOWN):
            return _INVALID
        self.unknown("no row in the table")
        raise AssertionError

    def unknown(self, why: str) -> None:
        raise ModelError(f"unknown instruction {self.code[: self.at + 6].hex(' ')} ({self.bits}-bit code): {why}")

    def decode(self) -> Insn:
        map_, b = self.opcode()
        row = self.pick(map_, b)
        entry = self.table.entry(row)
        insn = Insn(row, b"", self.bits, self.operand_size(row), self.address_size())
        insn.rep, insn.lock, insn.osz, insn.amd = self.rep, self.lock, self.osz, self.amd
        insn.rex, insn.rex_w, insn.rex2 = self.rex >= 0, self.rex >= 8, self.rex2
        insn.override = self.override
        insn.zreg = b & 7 | self.extension(2)
        insn.vreg, insn.evex = self.v, self.evex
        insn.operands = entry.operands if entry else ()
        insn.sizes = tuple(insn.width(p) for p in insn.operands)
        insn.seg = 3 if self.override < 0 else self.override
        if entry is not None and entry.modrm:
            self.modrm(insn)
        if self.evex and entry is not None:
            self.apx_fields(insn, entry)
        for pattern in insn.operands:
            self.immediate(insn, pattern)
        insn.code = self.code[: self.at]
        if insn.lock and not (row.lock and insn.operands and insn.is_memory(0)):
            insn.row = _INVALID  # LOCK where it is not allowed: #UD (SDM vol. 2A LOCK)
        return insn

    def apx_fields(self, insn: Insn, entry: Entry) -> None:
        """New data destination, no-flags form, source condition (APX 3.1.3)."""
        nd = self.p2 >> 4 & 1
        if entry.nd == "SCC":
            insn.scc, insn.dfv = self.p2 & 15, ~self.v & 15
            return
        insn.nf = entry.nf == "*" and bool(self.p2 & 4)
        if entry.nd == "*" and nd:
            insn.dest, insn.ndd = self.v, True
        elif entry.nd == "ZU" and nd:
            insn.zu = True
            if not insn.is_memory(0):  # memory has no upper part
                insn.dest = insn.register(0)[1]

    def extension(self, which: int) -> int:
        """Bits 3 and 4 that REX and REX2 add to reg (0), index (1) or base (2)."""
        low = (self.rex >> (2 - which) & 1) << 3 if self.rex >= 0 else 0
        return low | self.ext[which] << 4

    def operand_size(self, row: Row) -> int:
        """SDM vol. 1 3.6.1, vol. 2A 2.2.1.7; APM vol. 3 1.2.2."""
        if self.bits == 64:
            if row.size == "y":
                return 64 if self.rex >= 8 else 32
            if row.size == "f64" or (row.size == "n64" and not (self.amd and self.osz and self.rex < 8)):
                return 64
            if self.rex >= 8:
                return 64
            if row.size == "d64":
                return 16 if self.osz else 64
            return 16 if self.osz else 32
        if row.size == "y":
            return 32
        return 16 if (self.bits == 16) != self.osz else 32

    def address_size(self) -> int:
        if self.bits == 64:
            return 32 if self.asz else 64
        return 16 if (self.bits == 16) != self.asz else 32

    def modrm(self, insn: Insn) -> None:
        m = insn.modrm = self.byte()
        insn.mod = m >> 6
        insn.reg = m >> 3 & 7 | self.extension(0)
        if insn.mod == 3 or any(p[0] == "R" for p in insn.operands):  # MOV CR/DR take ModRM.mod as 3
            insn.mod = 3
            insn.rm = m & 7 | self.extension(2)
            return
        if insn.addrsize == 16:
            base, index = _BASE16[m & 7]
            if m & 7 == 6 and insn.mod == 0:
                base, insn.disp = -1, self.signed(16)
            insn.base, insn.index = base, index
        elif m & 7 == 4:
            sib = self.byte()
            index = sib >> 3 & 7 | self.extension(1)
            insn.index, insn.scale = (-1 if index == 4 else index), 1 << (sib >> 6)
            if sib & 7 == 5 and insn.mod == 0:
                insn.disp = self.signed(32)
            else:
                insn.base = sib & 7 | self.extension(2)
        elif m & 7 == 5 and insn.mod == 0:
            insn.disp, insn.rip_relative = self.signed(32), self.bits == 64
        else:
            insn.base = m & 7 | self.extension(2)
        if insn.mod == 1:
            insn.disp = self.signed(8)
        elif insn.mod == 2:
            insn.disp = self.signed(min(insn.addrsize, 32))
        if self.override < 0:
            stack = insn.base == 5 if insn.addrsize == 16 else stack_segment(insn.base) == 2
            insn.seg = 2 if stack else 3

    def immediate(self, insn: Insn, pattern: str) -> None:
        kind, tail = pattern[0], pattern[1:]
        if kind == "I":
            if tail == "v":
                value = self.signed(insn.opsize)
            elif tail == "q":  # JMPABS
                value = self.signed(64)
            elif tail == "2":  # ENTER's second immediate
                insn.imm2 = self.byte()
                return
            elif tail == "w":
                value = self.signed(16) & 0xFFFF
            else:
                value = self.signed(8 if tail in ("b", "bs") else min(insn.opsize, 32))
                if tail == "b":
                    value &= 0xFF
            insn.imm = value
        elif kind == "J":
            insn.imm = self.signed(8 if tail == "b" else min(insn.opsize, 32))
        elif kind == "O":
            insn.disp = self.signed(insn.addrsize) & MASK[insn.addrsize]
        elif pattern == "Ap":
            insn.imm = self.signed(insn.opsize) & MASK[insn.opsize]
            insn.imm2 = self.signed(16) & 0xFFFF


def decode(
    code: bytes, rip: int | None = None, bits: int = 64, *, profile: CpuProfile | None = None, amd: bool = False,
    apx: int = 0, features: frozenset[str] | None = None,
) -> Insn:  # fmt: skip
    """Decode the instruction at the start of ``code``. ``rip`` is for error messages only.

    Without profile or features, every row of the table is taken to be there. ``apx``: 0 not enabled; 1 enabled; 2
    enabled on a processor whose CPUID.29H:EBX[0] is clear.
    Fault(#UD), Fault(#GP) for a bad encoding; Truncated when more bytes are needed; ModelError when unknown.
    """
    from harness.reference.table import TABLE

    if profile is not None:
        features, amd = _features(profile), profile.amd
    try:
        return _Decoder(TABLE, code[:15], bits, features, amd, apx).decode()
    except ModelError as error:
        raise error if rip is None else ModelError(f"{error} at RIP {rip:#x}") from None
