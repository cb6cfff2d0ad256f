"""Row and Insn: one line of the instruction table, and one decoded instruction with access to its operands.

Operand patterns are those of SDM vol. 2D appendix A: a letter for where (E, G, I, J, M, O, Z: the register in the low
opcode bits, A: far pointer, S/C/D: segment, control, debug register, R: register in rm, X/Y: string source/target),
a letter for how wide (b, w, d, q, v: operand size, z: at most 32 bits, y: 32 or 64, bs: a byte sign-extended,
p: far pointer, s: 16-bit limit and base), or a fixed register (AL, CL, DX, rAX, 1, 3). B is the GPR in VEX.vvvv or
EVEX.vvvv.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from harness.reference.cpu import AF, CF, DS, MASK, OF, PF, SF, SS, UD, ZF, Cpu, Fault

if TYPE_CHECKING:
    from typing import TypeAlias

Operation: TypeAlias = "Callable[[Cpu], None]"
REX2_ONLY, VEX, EVEX = 4, 0x10, 0x20
"""Opcode maps past the legacy ones (0-3): what only REX2 has (JMPABS); VEX and EVEX maps on top of these bases."""
FLAG_LETTERS: Final = {"O": OF, "S": SF, "Z": ZF, "A": AF, "P": PF, "C": CF, "D": 0x400, "I": 0x200}


def flag_mask(letters: str) -> int:
    """``"OSZAPC"`` -> the mask of those RFLAGS bits."""
    return sum(FLAG_LETTERS[c] for c in letters)


@dataclass(frozen=True)
class Row:
    """One encoding of one instruction.

    ``opcode`` is the manual's notation: optional mandatory prefix (``66``, ``F2``, ``F3``; ``NP``: none of them may be
    there; ``NR``: neither F2 nor F3), opcode bytes, ``+r`` for a register in the low three bits, ``/0``..``/7`` for an
    extension in ModRM.reg, ``/r`` for a ModRM byte, ``/r:m`` or ``/0:r`` to demand memory or register in ModRM.rm, or a
    whole ModRM byte after ``=`` (``0F 01 =D0``). ``REX2``: the opcode exists only with that prefix.

    ``VEX`` and ``EVEX`` carry what the prefix holds, parted by dots: a mandatory prefix (``66``, ``F2``, ``F3``; none:
    NP, and 66 where an operand follows the operand size), the map (``M2``, ``M3``; EVEX without one is map 4), and how
    EVEX.ND and EVEX.NF may be (absent: 0; ``ND``, ``NF``: either; ``ND1``, ``NF1``: 1; ``ZU``: ND zeroes the upper part
    of the register; ``SCC``: CCMP and CTEST, whose payload has a condition and default flags instead).

    ``writes``, ``undefined``: status flags written, left undefined.  ``size``: ``v`` by prefixes, ``d64`` 64 by default
    in 64-bit mode (no 32), ``f64`` always 64 there, ``n64`` near branch (64 there; AMD honours 66), ``y`` 64 with W in
    64-bit mode, else 32.  ``modes``: ``all``, ``64``, ``no64``. ``feature``: CPUID name, #UD without it. ``lock``: LOCK
    is valid when the first operand is memory. ``rex2``: a REX2 prefix is allowed. ``operation`` compiles an Insn to a
    function of the Cpu.
    """

    mnemonic: str
    opcode: str
    operands: str
    operation: Callable[[Insn], Operation]
    section: str
    writes: str = ""
    undefined: str = ""
    size: str = "v"
    modes: str = "all"
    feature: str = ""
    lock: bool = False
    rex2: bool = True

    @property
    def undefined_mask(self) -> int:
        """RFLAGS bits that the instruction leaves undefined."""
        return flag_mask(self.undefined)


_SIZE8 = ("al", "cl", "dl", "bl", "ah", "ch", "dh", "bh")
_LEGACY = ("ax", "cx", "dx", "bx", "sp", "bp", "si", "di")
SCC_NAMES: Final = ("o", "no", "b", "ae", "e", "ne", "be", "a", "s", "ns", "t", "f", "l", "ge", "le", "g")
"""Source conditions of CCMP and CTEST: the condition codes, with "true" and "false" in place of the parity flag's."""
_PAIRS: Final = ("push2", "pop2")
_EVEX_ONLY: Final = (*_PAIRS, "cmov", "cfcmov")
SEG_TEXT: Final = ("es", "cs", "ss", "ds", "fs", "gs", "?", "?")
_FIXED: Final = {"AL": (8, 0), "CL": (8, 1), "AX": (16, 0), "DX": (16, 2), "rAX": (0, 0), "eAX": (0, 0)}
_WIDTH: Final = {"b": 8, "bs": 8, "w": 16, "d": 32, "q": 64}
_PTR: Final = {8: "BYTE PTR ", 16: "WORD PTR ", 32: "DWORD PTR ", 64: "QWORD PTR ", 128: "XMMWORD PTR "}


def register_name(size: int, index: int, rex: bool = True) -> str:
    """The name of a GPR: ``al``, ``spl``, ``r9d``, ``r31`` ..."""
    if size == 8:
        if index < 4 or (index < 8 and not rex):
            return _SIZE8[index]
        return f"{_LEGACY[index]}l" if index < 8 else f"r{index}b"
    if index < 8:
        return {16: "", 32: "e", 64: "r"}[size] + _LEGACY[index]
    return f"r{index}" + {16: "w", 32: "d", 64: ""}[size]


@dataclass(slots=True)
class Insn:
    """One decoded instruction. ``reg``, ``rm``, ``base``, ``index`` are full register numbers (0-31), -1 for none.

    ``rep`` is 0, 0xF2 or 0xF3. ``rex`` says that a REX or REX2 prefix is there (byte registers), ``rex_w`` its W bit.
    ``seg`` is the segment of the memory operand after overrides, ``override`` the override itself or -1.

    EVEX: ``vreg`` is the register in vvvv; ``dest`` the register that gets the result of operand 0, zero-extended, in
    its stead (-1: operand 0 itself), ``ndd`` says that it is an operand of its own, ``zu`` that ND only zeroes the
    upper part of operand 0's register; ``nf``: no flag is written.
    ``scc`` and ``dfv`` are the source condition (-1: none) and the default OF, SF, ZF, CF of CCMP and CTEST.
    """

    row: Row
    code: bytes
    bits: int
    opsize: int
    addrsize: int
    rep: int = 0
    lock: bool = False
    osz: bool = False
    rex: bool = False
    rex_w: bool = False
    rex2: bool = False
    amd: bool = False
    modrm: int = -1
    mod: int = 3
    reg: int = 0
    rm: int = 0
    base: int = -1
    index: int = -1
    scale: int = 1
    disp: int = 0
    rip_relative: bool = False
    seg: int = DS
    override: int = -1
    imm: int = 0
    imm2: int = 0
    zreg: int = 0
    operands: tuple[str, ...] = ()
    sizes: tuple[int, ...] = field(default=())
    evex: bool = False
    vreg: int = 0
    dest: int = -1
    ndd: bool = False
    zu: bool = False
    nf: bool = False
    scc: int = -1
    dfv: int = 0

    @property
    def length(self) -> int:
        """Bytes of the instruction."""
        return len(self.code)

    @property
    def memory(self) -> bool:
        """Whether ModRM.rm is a memory operand."""
        return self.modrm >= 0 and self.mod != 3

    # --- operands ----------------------------------------------------------------------------------------------------

    def width(self, pattern: str) -> int:
        """Bits of an operand pattern."""
        if pattern in _FIXED:
            return _FIXED[pattern][0] or self.opsize
        tail = pattern[1:]
        if tail in _WIDTH:
            return _WIDTH[tail]
        if tail == "z":
            return min(self.opsize, 32)
        if tail == "y":
            return 64 if self.opsize == 64 else 32
        return self.opsize

    def address(self) -> Callable[[Cpu], int]:
        """The memory operand's offset in its segment, truncated to the address size (SDM vol. 1 3.7.5)."""
        base, index, scale, disp, mask = self.base, self.index, self.scale, self.disp, MASK[self.addrsize]
        if self.rip_relative:
            return lambda cpu: (cpu.rip + disp) & mask
        if base >= 0 and index >= 0:
            return lambda cpu: (cpu.gpr[base] + cpu.gpr[index] * scale + disp) & mask
        if base >= 0:
            return lambda cpu: (cpu.gpr[base] + disp) & mask
        if index >= 0:
            return lambda cpu: (cpu.gpr[index] * scale + disp) & mask
        constant = disp & mask
        return lambda cpu: constant

    def _location(self, n: int) -> tuple[int, int] | None:
        """(size, register) of operand ``n`` when it is a GPR, else None."""
        pattern = self.operands[n]
        if pattern in _FIXED:
            size, index = _FIXED[pattern]
            return size or self.opsize, index
        kind = pattern[0]
        if kind == "G":
            return self.sizes[n], self.reg
        if kind == "Z":
            return self.sizes[n], self.zreg
        if kind == "B":
            return self.sizes[n], self.vreg
        if kind == "R" or (kind == "E" and self.mod == 3):
            return self.sizes[n], self.rm
        return None

    def register(self, n: int) -> tuple[int, int]:
        """(size, number) of operand ``n``, which must be a GPR."""
        place = self._location(n)
        if place is None:
            raise ValueError(f"{self.row.mnemonic}: operand {n} is no register")
        return place

    def is_memory(self, n: int) -> bool:
        """Whether operand ``n`` is in memory."""
        kind = self.operands[n][0]
        return kind in "MO" or (kind == "E" and self.mod != 3)

    def read(self, n: int) -> Callable[[Cpu], int]:
        """A function that reads operand ``n``, zero-extended; immediates as the operand size sees them."""
        pattern = self.operands[n]
        place = self._location(n)
        if place is not None:
            return read_register(*place, self.rex)
        if pattern[0] in "IJ" or pattern in "13":
            imm = {"1": 1, "3": 3}.get(pattern, self.imm) & MASK[self.opsize if pattern[1:] in ("bs", "z") else 64]
            return lambda cpu: imm
        if pattern[0] == "S":
            sreg = self.reg
            return lambda cpu: cpu.seg[sreg].selector
        ea, seg, size = self.address(), self.seg, self.sizes[n] >> 3
        return lambda cpu: cpu.mem.read(seg, ea(cpu), size)

    def write(self, n: int) -> Callable[[Cpu, int], None]:
        """A function that writes operand ``n``: register merge rules or memory."""
        if n == 0 and self.dest >= 0:
            return write_register(64, self.dest, True)
        place = self._location(n)
        if place is not None:
            return write_register(*place, self.rex)
        ea, seg, size = self.address(), self.seg, self.sizes[n] >> 3
        return lambda cpu, value: cpu.mem.write(seg, ea(cpu), size, value)

    def update(self, n: int, f: Callable[[Cpu, int], int]) -> Operation:
        """Read operand ``n``, apply ``f``, write it back.

        A memory operand is checked for writing first: a read-modify-write faults as a write (SDM vol. 3A 4.7) and
        before ``f`` has changed anything. With a new data destination operand ``n`` is read only.
        """
        if n == 0 and self.dest >= 0:
            source, dest = self.read(0), self.dest

            def update_new(cpu: Cpu) -> None:
                cpu.gpr[dest] = f(cpu, source(cpu))

            return update_new
        place = self._location(n)
        if place is not None:
            size, index = place
            if size == 64:

                def update64(cpu: Cpu) -> None:
                    cpu.gpr[index] = f(cpu, cpu.gpr[index])

                return update64
            if size == 32:

                def update32(cpu: Cpu) -> None:
                    cpu.gpr[index] = f(cpu, cpu.gpr[index] & 0xFFFFFFFF)

                return update32
            rd, wr = read_register(size, index, self.rex), write_register(size, index, self.rex)
            return lambda cpu: wr(cpu, f(cpu, rd(cpu)))
        ea, seg, nbytes = self.address(), self.seg, self.sizes[n] >> 3

        def update_memory(cpu: Cpu) -> None:
            offset, mem = ea(cpu), cpu.mem
            mem.write(seg, offset, nbytes, f(cpu, mem.read(seg, offset, nbytes, for_write=True)))

        return update_memory

    # --- text --------------------------------------------------------------------------------------------------------

    def text(self, rip: int | None = None) -> str:
        """Intel-syntax disassembly; ``rip`` (of the instruction) resolves branch targets."""
        operands = [self._operand_text(i, rip) for i in range(len(self.operands))]
        if self.ndd:
            operands.insert(0, register_name(self.sizes[0], self.dest))
        return (self._prefix_text() + self._name() + " " + ",".join(operands)).rstrip()

    def _name(self) -> str:
        name = self.row.mnemonic
        if "/" in name:  # one row, a name for each operand size: cbw/cwde/cdqe
            names = name.split("/")
            return names[{16: 0, 32: 1, 64: 2}[self.opsize]] if len(names) == 3 else names[0]
        if self.scc >= 0:
            default = ",".join(flag for n, flag in enumerate(("of", "sf", "zf", "cf")) if self.dfv << n & 8)
            return f"{name}{SCC_NAMES[self.scc]} {{dfv={default}}}"
        if self.zu:
            return name[:3] + "zu" + name[3:] if name.startswith("set") else name + "zu"
        hint = self.rex_w and (self.rex2 and self.operands == ("Zv",) if name in ("push", "pop") else name in _PAIRS)
        return name + "p" if hint else name  # the push-pop pair hint of APX

    def _prefix_text(self) -> str:
        prefix = "lock " if self.lock else ""
        if self.rep and any(p[0] in "XY" for p in self.operands):
            repeat_while = self.row.mnemonic[:4] in ("cmps", "scas")
            prefix += ("repz " if repeat_while else "rep ") if self.rep == 0xF3 else "repnz "
        if self.nf:
            return "{nf} "
        if self.evex and not self.ndd and not self.zu and self.scc < 0 and not self.row.mnemonic.startswith(_EVEX_ONLY):
            return "{evex} "
        return prefix

    def _operand_text(self, n: int, rip: int | None) -> str:
        pattern, size = self.operands[n], self.sizes[n]
        place = self._location(n)
        if place is not None:
            return register_name(place[0], place[1], self.rex)
        kind = pattern[0]
        if pattern in ("1", "3"):
            return pattern
        if kind == "S":
            return SEG_TEXT[self.reg & 7]
        if kind in "CD":
            return f"{'cr' if kind == 'C' else 'dr'}{self.reg}"
        if kind == "J":
            if rip is None:
                return f".{self.imm + self.length:+#x}"
            return hex((rip + self.length + self.imm) & MASK[64 if self.bits == 64 else self.opsize])
        if kind == "I":
            if pattern == "I2":
                return hex(self.imm2)
            return hex(self.imm & MASK[size if pattern[1:] in ("b", "w", "q") else self.opsize])
        if kind == "A":
            return f"{self.imm2:#x}:{self.imm:#x}"
        if kind in "XY":
            reg = register_name(self.addrsize, 6 if kind == "X" else 7)
            return f"{_PTR[size]}{SEG_TEXT[self.seg if kind == 'X' else 0]}:[{reg}]"
        return ("" if pattern in ("M", "Ms") else _PTR.get(size, "")) + self._memory_text()

    def _memory_text(self) -> str:
        parts = []
        if self.rip_relative:
            parts.append("rip" if self.addrsize == 64 else "eip")
        if self.base >= 0:
            parts.append(register_name(self.addrsize, self.base))
        if self.index >= 0:
            parts.append(register_name(self.addrsize, self.index) + (f"*{self.scale}" if self.addrsize > 16 else ""))
        body = "+".join(parts)
        if self.disp or not parts:
            body += f"{self.disp:+#x}" if parts else hex(self.disp & MASK[self.addrsize])
        seg = f"{SEG_TEXT[self.override]}:" if self.override >= 0 else "" if parts else "ds:"
        return f"{seg}[{body}]"


# --- registers ------------------------------------------------------------------------------------------------------


def read_register(size: int, index: int, rex: bool) -> Callable[[Cpu], int]:
    """A function that reads one GPR, zero-extended."""
    if size == 64:
        return lambda cpu: cpu.gpr[index]
    if size == 8 and not rex and 4 <= index < 8:
        high = index - 4
        return lambda cpu: cpu.gpr[high] >> 8 & 0xFF
    mask = MASK[size]
    return lambda cpu: cpu.gpr[index] & mask


def write_register(size: int, index: int, rex: bool) -> Callable[[Cpu, int], None]:
    """A function that writes one GPR with the merge rules (SDM vol. 1 3.4.1.1); values must fit the size."""
    if size >= 32:

        def write_whole(cpu: Cpu, value: int) -> None:
            cpu.gpr[index] = value

        return write_whole
    return lambda cpu, value: cpu.write_reg(size, index, value, rex)


def undefined_opcode(insn: Insn) -> Operation:
    """The operation of encodings that raise #UD."""

    def op(cpu: Cpu) -> None:
        raise Fault(UD)

    return op


def stack_segment(base: int) -> int:
    """Default segment of a memory operand: SS for rSP- and rBP-based ones (SDM vol. 1 table 3-5)."""
    return SS if base in (4, 5) else DS
