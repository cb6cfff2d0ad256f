"""Data movement: MOV, XCHG, PUSH, POP, LEA, extensions, conditional moves, CMPXCHG, XADD, ENTER, LEAVE, NOP, UD."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from harness.reference.alu import FUNCTIONS, signed
from harness.reference.cpu import (
    BR,
    CF,
    GP,
    MASK,
    OF,
    PF,
    RAX,
    RBP,
    RBX,
    RCX,
    RDX,
    RSP,
    SF,
    SS,
    ZF,
    Cpu,
    Fault,
    ModelError,
)
from harness.reference.insn import Insn, Operation, Row, undefined_opcode

CONDITIONS: Final = ("o", "no", "b", "ae", "e", "ne", "be", "a", "s", "ns", "p", "np", "l", "ge", "le", "g")


def condition(cc: int) -> Callable[[Cpu], bool]:
    """The test of condition code ``cc`` (SDM vol. 1 appendix B). Reading an undefined flag is a ModelError."""
    wanted = not cc & 1
    kind = cc >> 1
    if kind < 6:
        mask = (OF, CF, ZF, CF | ZF, SF, PF)[kind]

        def plain(cpu: Cpu) -> bool:
            if cpu.undefined:
                cpu.flags(mask)
            return (cpu.rflags & mask != 0) is wanted

        return plain
    mask = SF | OF if kind == 6 else SF | OF | ZF
    zero = ZF if kind == 7 else 0

    def compare(cpu: Cpu) -> bool:
        if cpu.undefined:
            cpu.flags(mask)
        f = cpu.rflags
        return bool((f >> 7 ^ f >> 11) & 1 or f & zero) is wanted

    return compare


def _mov(insn: Insn) -> Operation:
    read, write = insn.read(1), insn.write(0)
    return lambda cpu: write(cpu, read(cpu))


def _mov_immediate(insn: Insn) -> Operation:
    write, value = insn.write(0), insn.imm & MASK[insn.sizes[0]]
    return lambda cpu: write(cpu, value)


def _extend(is_signed: bool) -> Callable[[Insn], Operation]:
    """MOVSX, MOVSXD, MOVZX."""

    def operation(insn: Insn) -> Operation:
        read, write, size, mask = insn.read(1), insn.write(0), insn.sizes[1], MASK[insn.sizes[0]]
        sign = 1 << (size - 1)
        if is_signed:
            return lambda cpu: write(cpu, (read(cpu) ^ sign) - sign & mask)
        return lambda cpu: write(cpu, read(cpu) & mask)

    return operation


def _lea(insn: Insn) -> Operation:
    ea, write, mask = insn.address(), insn.write(0), MASK[insn.sizes[0]]
    return lambda cpu: write(cpu, ea(cpu) & mask)


def _xchg(insn: Insn) -> Operation:
    """XCHG; 90H without an extension bit is NOP and PAUSE, which leave the upper half of RAX alone."""
    if insn.modrm < 0 and insn.zreg == 0:
        return _nop(insn)
    read, write = insn.read(1), insn.write(1)
    if not insn.is_memory(0):
        read0, write0 = insn.read(0), insn.write(0)

        def registers(cpu: Cpu) -> None:
            a, b = read0(cpu), read(cpu)
            write(cpu, a)
            write0(cpu, b)

        return registers
    ea, seg, nbytes = insn.address(), insn.seg, insn.sizes[0] >> 3

    def memory(cpu: Cpu) -> None:
        where = ea(cpu)
        old = cpu.mem.read(seg, where, nbytes, for_write=True)
        cpu.mem.write(seg, where, nbytes, read(cpu))
        write(cpu, old)

    return memory


def _xadd(insn: Insn) -> Operation:
    """XADD: the old destination goes to the source register; where both are one register, the sum stays."""
    size = insn.sizes[0]
    add, read, write = FUNCTIONS["add", size], insn.read(1), insn.write(1)
    if not insn.is_memory(0):
        read0, write0 = insn.read(0), insn.write(0)

        def registers(cpu: Cpu) -> None:
            a = read0(cpu)
            total = add(cpu, a, read(cpu))
            write(cpu, a)
            write0(cpu, total)

        return registers
    ea, seg, nbytes = insn.address(), insn.seg, size >> 3

    def memory(cpu: Cpu) -> None:
        where = ea(cpu)
        old = cpu.mem.read(seg, where, nbytes, for_write=True)
        cpu.mem.write(seg, where, nbytes, add(cpu, old, read(cpu)))
        write(cpu, old)

    return memory


def _cmpxchg(insn: Insn) -> Operation:
    """CMPXCHG (SDM vol. 2A). Memory is written in both outcomes.

    A failing register form leaves its destination register alone, upper half included, although the manual's text
    writes it back: silicon decides (tests/unit/test_bare_cpu.py).
    """
    size = insn.sizes[0]
    compare, source = FUNCTIONS["cmp", size], insn.read(1)
    if not insn.is_memory(0):
        read0, write0 = insn.read(0), insn.write(0)

        def registers(cpu: Cpu) -> None:
            old, new = read0(cpu), source(cpu)
            compare(cpu, cpu.gpr[RAX] & MASK[size], old)
            if cpu.rflags & ZF:
                write0(cpu, new)
            else:
                cpu.write_reg(size, RAX, old)

        return registers
    ea, seg, nbytes = insn.address(), insn.seg, size >> 3

    def memory(cpu: Cpu) -> None:
        where = ea(cpu)
        old, accumulator = cpu.mem.read(seg, where, nbytes, for_write=True), cpu.gpr[RAX] & MASK[size]
        cpu.mem.write(seg, where, nbytes, source(cpu) if old == accumulator else old)
        compare(cpu, accumulator, old)
        if old != accumulator:
            cpu.write_reg(size, RAX, old)

    return memory


def _cmpxchg_wide(insn: Insn) -> Operation:
    """CMPXCHG8B and, with REX.W, CMPXCHG16B: only ZF is written; 16 bytes must be aligned (#GP)."""
    half = 64 if insn.rex_w else 32
    nbytes, ea, seg, mask = half >> 2, insn.address(), insn.seg, MASK[half]

    def op(cpu: Cpu) -> None:
        if half == 64 and "cx16" not in cpu.features:
            return undefined_opcode(insn)(cpu)
        where, g = ea(cpu), cpu.gpr
        if half == 64 and where + (cpu.seg[seg].base if seg >= 4 else 0) & 15:
            raise Fault(GP, 0)
        old = cpu.mem.read(seg, where, nbytes, for_write=True)
        equal = old == ((g[RDX] & mask) << half | g[RAX] & mask)
        cpu.mem.write(seg, where, nbytes, (g[RCX] & mask) << half | g[RBX] & mask if equal else old)
        cpu.rflags = cpu.rflags & ~ZF | (ZF if equal else 0)
        cpu.undefined &= ~ZF
        if not equal:
            g[RAX], g[RDX] = old & mask, old >> half
        return None

    return op


def _movbe(load: bool) -> Callable[[Insn], Operation]:
    def operation(insn: Insn) -> Operation:
        read, write, n = insn.read(1), insn.write(0), insn.sizes[0] >> 3
        return lambda cpu: write(cpu, int.from_bytes(read(cpu).to_bytes(n, "little"), "big"))

    return operation


def _bswap(insn: Insn) -> Operation:
    size, index = insn.opsize, insn.zreg

    def op(cpu: Cpu) -> None:
        if size == 16:
            raise ModelError(f"bswap of a 16-bit register at {cpu.start_rip:#x}: the result is undefined")
        value = cpu.gpr[index] & MASK[size]
        cpu.gpr[index] = int.from_bytes(value.to_bytes(size >> 3, "little"), "big")

    return op


def _convert(insn: Insn) -> Operation:
    """CBW, CWDE, CDQE."""
    size = insn.opsize

    def op(cpu: Cpu) -> None:
        half = size >> 1
        cpu.write_reg(size, RAX, signed(cpu.gpr[RAX] & MASK[half], half) & MASK[size])

    return op


def _double(insn: Insn) -> Operation:
    """CWD, CDQ, CQO."""
    size = insn.opsize
    return lambda cpu: cpu.write_reg(size, RDX, MASK[size] if cpu.gpr[RAX] >> (size - 1) & 1 else 0)


def _xlat(insn: Insn) -> Operation:
    seg, mask = insn.seg, MASK[insn.addrsize]

    def op(cpu: Cpu) -> None:
        g = cpu.gpr
        cpu.write_reg(8, RAX, cpu.mem.read(seg, g[RBX] + (g[RAX] & 0xFF) & mask, 1))

    return op


def _cmov(cc: int) -> Callable[[Insn], Operation]:
    """CMOVcc: the source is always read; a 32-bit destination is zero-extended even when nothing is moved."""
    test = condition(cc)

    def operation(insn: Insn) -> Operation:
        read, write, old = insn.read(1), insn.write(0), insn.read(0)

        def op(cpu: Cpu) -> None:
            value = read(cpu)
            write(cpu, value if test(cpu) else old(cpu))

        return op

    return operation


def _setcc(cc: int) -> Callable[[Insn], Operation]:
    test = condition(cc)

    def operation(insn: Insn) -> Operation:
        write = insn.write(0)
        return lambda cpu: write(cpu, int(test(cpu)))

    return operation


# --- stack ----------------------------------------------------------------------------------------------------------


def _push(insn: Insn) -> Operation:
    read, size = insn.read(0), insn.opsize
    return lambda cpu: cpu.push(read(cpu), size)


def _pop(insn: Insn) -> Operation:
    """POP: a memory destination based on rSP is addressed after the increment (SDM vol. 2B POP)."""
    size, write = insn.opsize, insn.write(0)

    def register(cpu: Cpu) -> None:
        write(cpu, cpu.pop(size))

    def memory(cpu: Cpu) -> None:
        before = cpu.gpr[RSP]
        value = cpu.pop(size)
        try:
            write(cpu, value)
        except Fault:
            cpu.gpr[RSP] = before
            raise

    return memory if insn.is_memory(0) else register


def _pusha(insn: Insn) -> Operation:
    size = insn.opsize

    def op(cpu: Cpu) -> None:
        top, mask, n = cpu.sp(), MASK[cpu.stack_bits], size >> 3
        for index in range(8):
            top = top - n & mask
            cpu.mem.write(SS, top, n, cpu.gpr[index] & MASK[size])
        cpu.set_sp(top)

    return op


def _popa(insn: Insn) -> Operation:
    size = insn.opsize

    def op(cpu: Cpu) -> None:
        top, mask, n = cpu.sp(), MASK[cpu.stack_bits], size >> 3
        values = [cpu.mem.read(SS, top + i * n & mask, n) for i in range(8)]
        for index, value in zip(range(7, -1, -1), values, strict=True):
            if index != RSP:
                cpu.write_reg(size, index, value)
        cpu.set_sp(top + 8 * n)

    return op


def _enter(insn: Insn) -> Operation:
    """ENTER; faults as if it wrote at the final stack pointer too (SDM vol. 2A ENTER)."""
    size, room, level = insn.opsize, insn.imm, insn.imm2 & 31

    def op(cpu: Cpu) -> None:
        n, mask, mem, top = size >> 3, MASK[cpu.stack_bits], cpu.mem, cpu.sp()

        def push(value: int) -> None:
            nonlocal top
            top = top - n & mask
            mem.write(SS, top, n, value & MASK[size])

        push(cpu.gpr[RBP])
        frame, link = top, cpu.gpr[RBP] & mask
        for _ in range(level - 1):
            link = link - n & mask
            push(mem.read(SS, link, n))
        if level:
            push(frame if cpu.stack_bits != 16 else cpu.gpr[RSP] & MASK[size] & ~0xFFFF | frame)
        top = top - room & mask
        mem.check(SS, top, n, True)
        cpu.write_reg(size, RBP, frame if cpu.stack_bits != 16 else cpu.gpr[RSP] & ~0xFFFF | frame)
        cpu.set_sp(top)

    return op


def _leave(insn: Insn) -> Operation:
    size = insn.opsize

    def op(cpu: Cpu) -> None:
        base = cpu.gpr[RBP] & MASK[cpu.stack_bits]
        value = cpu.mem.read(SS, base, size >> 3)
        cpu.set_sp(base + (size >> 3))
        cpu.write_reg(size, RBP, value)

    return op


def _bound(insn: Insn) -> Operation:
    size, ea, seg, read = insn.opsize, insn.address(), insn.seg, insn.read(0)

    def op(cpu: Cpu) -> None:
        n, where = size >> 3, ea(cpu)
        low = signed(cpu.mem.read(seg, where, n), size)
        high = signed(cpu.mem.read(seg, where + n & MASK[insn.addrsize], n), size)
        if not low <= signed(read(cpu), size) <= high:
            raise Fault(BR)

    return op


def _nop(insn: Insn) -> Operation:
    def op(cpu: Cpu) -> None:
        pass

    return op


def _prefetchw(insn: Insn) -> Operation:
    """PREFETCHW: its register form is #UD on AMD (APM vol. 3 PREFETCH) and a reserved NOP on Intel (table A-3)."""
    return undefined_opcode(insn) if insn.amd and insn.mod == 3 else _nop(insn)


def _touch(insn: Insn) -> Operation:
    """CLFLUSH: accesses its byte as a load does."""
    ea, seg = insn.address(), insn.seg
    return lambda cpu: cpu.mem.check(seg, ea(cpu), 1, False)


def _condition_rows() -> list[Row]:
    rows = []
    for cc, name in enumerate(CONDITIONS):
        rows.append(Row(f"cmov{name}", f"0F {0x40 + cc:02X} /r", "Gv,Ev", _cmov(cc), "SDM 2A CMOVcc", feature="cmov"))
        rows.append(Row(f"set{name}", f"0F {0x90 + cc:02X} /r", "Eb", _setcc(cc), "SDM 2B SETcc"))
    return rows


_ARITH, _MOV, _IMM = "OSZAPC", "SDM 2B MOV", "SDM 2B MOV"
DATA_ROWS: Final[list[Row]] = [
    Row("mov", "88 /r", "Eb,Gb", _mov, _MOV),
    Row("mov", "89 /r", "Ev,Gv", _mov, _MOV),
    Row("mov", "8A /r", "Gb,Eb", _mov, _MOV),
    Row("mov", "8B /r", "Gv,Ev", _mov, _MOV),
    Row("mov", "A0", "AL,Ob", _mov, _MOV),
    Row("mov", "A1", "rAX,Ov", _mov, _MOV),
    Row("mov", "A2", "Ob,AL", _mov, _MOV),
    Row("mov", "A3", "Ov,rAX", _mov, _MOV),
    Row("mov", "B0+r", "Zb,Ib", _mov_immediate, _MOV),
    Row("mov", "B8+r", "Zv,Iv", _mov_immediate, _MOV),
    Row("mov", "C6 /0", "Eb,Ib", _mov_immediate, _MOV),
    Row("mov", "C7 /0", "Ev,Iz", _mov_immediate, _MOV),
    Row("movnti", "NP 0F C3 /r:m", "Ey,Gy", _mov, "SDM 2B MOVNTI", feature="sse2"),
    Row("movbe", "NR 0F 38 F0 /r:m", "Gv,Ev", _movbe(True), "SDM 2B MOVBE", feature="movbe"),
    Row("movbe", "NR 0F 38 F1 /r:m", "Ev,Gv", _movbe(False), "SDM 2B MOVBE", feature="movbe"),
    Row("movzx", "0F B6 /r", "Gv,Eb", _extend(False), "SDM 2B MOVZX"),
    Row("movzx", "0F B7 /r", "Gv,Ew", _extend(False), "SDM 2B MOVZX"),
    Row("movsx", "0F BE /r", "Gv,Eb", _extend(True), "SDM 2B MOVSX/MOVSXD"),
    Row("movsx", "0F BF /r", "Gv,Ew", _extend(True), "SDM 2B MOVSX/MOVSXD"),
    Row("movsxd", "63 /r", "Gv,Ed", _extend(True), "SDM 2B MOVSX/MOVSXD", modes="64"),
    Row("lea", "8D /r:m", "Gv,M", _lea, "SDM 2A LEA"),
    Row("xchg", "86 /r", "Eb,Gb", _xchg, "SDM 2B XCHG", lock=True),
    Row("xchg", "87 /r", "Ev,Gv", _xchg, "SDM 2B XCHG", lock=True),
    Row("xchg", "90+r", "Zv,rAX", _xchg, "SDM 2B XCHG"),
    Row("xadd", "0F C0 /r", "Eb,Gb", _xadd, "SDM 2B XADD", _ARITH, lock=True),
    Row("xadd", "0F C1 /r", "Ev,Gv", _xadd, "SDM 2B XADD", _ARITH, lock=True),
    Row("cmpxchg", "0F B0 /r", "Eb,Gb", _cmpxchg, "SDM 2A CMPXCHG", _ARITH, lock=True),
    Row("cmpxchg", "0F B1 /r", "Ev,Gv", _cmpxchg, "SDM 2A CMPXCHG", _ARITH, lock=True),
    Row("cmpxchg8b/cmpxchg8b/cmpxchg16b", "0F C7 /1:m", "M", _cmpxchg_wide, "SDM 2A CMPXCHG8B/CMPXCHG16B", "Z",
        feature="cx8", lock=True),
    Row("bswap", "0F C8+r", "Zv", _bswap, "SDM 2A BSWAP"),
    Row("cbw/cwde/cdqe", "98", "", _convert, "SDM 2A CBW/CWDE/CDQE"),
    Row("cwd/cdq/cqo", "99", "", _double, "SDM 2A CWD/CDQ/CQO"),
    Row("xlat", "D7", "", _xlat, "SDM 2B XLAT"),
    *_condition_rows(),
    Row("push", "50+r", "Zv", _push, "SDM 2B PUSH", size="d64"),
    Row("push", "68", "Iz", _push, "SDM 2B PUSH", size="d64"),
    Row("push", "6A", "Ibs", _push, "SDM 2B PUSH", size="d64"),
    Row("push", "FF /6", "Ev", _push, "SDM 2B PUSH", size="d64"),
    Row("pop", "58+r", "Zv", _pop, "SDM 2B POP", size="d64"),
    Row("pop", "8F /0", "Ev", _pop, "SDM 2B POP", size="d64"),
    Row("pusha/pushad", "60", "", _pusha, "SDM 2B PUSHA", modes="no64"),
    Row("popa/popad", "61", "", _popa, "SDM 2B POPA", modes="no64"),
    Row("enter", "C8", "Iw,I2", _enter, "SDM 2A ENTER", size="d64"),
    Row("leave", "C9", "", _leave, "SDM 2A LEAVE", size="d64"),
    Row("bound", "62 /r:m", "Gv,M", _bound, "SDM 2A BOUND", modes="no64"),
    *(Row("nop", f"0F {b:02X} /r", "Ev", _nop, "SDM 2D table A-3") for b in (0x19, 0x1A, 0x1B, 0x1C, 0x1D, 0x1E, 0x1F)),
    Row("prefetch", "0F 18 /r", "Eb", _nop, "SDM 2B PREFETCHh"),
    Row("prefetchw", "0F 0D /r", "Eb", _prefetchw, "SDM 2B PREFETCHW"),
    Row("lfence", "NP 0F AE /5:r", "", _nop, "SDM 2A LFENCE", feature="sse2"),
    Row("mfence", "NP 0F AE /6:r", "", _nop, "SDM 2B MFENCE", feature="sse2"),
    Row("sfence", "NP 0F AE /7:r", "", _nop, "SDM 2B SFENCE", feature="sse"),
    Row("clflush", "NP 0F AE /7:m", "Eb", _touch, "SDM 2A CLFLUSH", feature="clflush"),
    Row("ud2", "0F 0B", "", undefined_opcode, "SDM 2B UD"),
    Row("ud1", "0F B9 /r", "Gv,Ev", undefined_opcode, "SDM 2B UD"),
    Row("ud0", "0F FF /r", "Gv,Ev", undefined_opcode, "SDM 2B UD"),
]
