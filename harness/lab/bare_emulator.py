"""BareEmulator: a machine that runs a Case on the emulator itself, with no KVM and no guest kernel in between.

It is the arbiter between "KVM's defect" and "the emulator's", and the oracle for privileged instructions and paging.
The emulator is QEMU with the device ``bare-machine`` (see ``ci/qemu/bare/README.md``), which sets a whole start state,
runs to an exit, and shows the whole state there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Final, Self

from harness.case import (
    PAGE,
    Action,
    Case,
    Complete,
    Inject,
    Memory,
    Observation,
    Pages,
    Run,
    SaveRestore,
    SetState,
    Show,
    Slot,
    Step,
    VmShape,
)
from harness.cpuid import CpuidEntry, CpuProfile
from harness.exits import Debug, Exit, Halt, Io, Mmio, Shutdown, Timeout
from harness.lab.bare_mailbox import Access, EmulatorLike, Mailbox, Operation, Result
from harness.lab.errors import LostError
from harness.machine import case_sections
from harness.memory_diff import MemoryDiff, byte_diff
from harness.state import CpuState, pack_sections, unpack_sections

CPU: Final = "max,+svm"
LIMIT: Final = 2.0
"""Seconds that a guest may take from one exit to the next."""

_ACTIONS: Final = (Run, Complete, SetState, Show, Inject, Step, SaveRestore)
_ALWAYS: Final = ("regs", "sregs2", "events", "debugregs", "xcr0", "egpr", "pkru")
_DR6_STEP: Final = 0xFFFF4FF0  # the bits that read as one, and BS (SDM vol. 3B 17.2.3)
_EXCEPTION, _INTERRUPT, _NMI = 1, 2, 3
_LAST_LEAF: Final[Mapping[int, Callable[[CpuidEntry], bool]]] = {
    4: lambda e: not e.eax & 0x1F, 0xB: lambda e: not e.ecx >> 8 & 0xFF, 0x1F: lambda e: not e.ecx >> 8 & 0xFF,
    0x8000001D: lambda e: not e.eax & 0x1F,
}  # fmt: skip
"""Leaves whose subleaves end with one of type 0 (SDM vol. 2A CPUID; APM vol. 3 E.4.15)."""
_SUBLEAVES: Final = {7: 2, 0xD: 64, 0x12: 3, 0x14: 2, 0x1E: 2, 0x24: 2}


class BareEmulator:
    """Runs Cases on an emulator; a context manager. ``cpu`` is QEMU's ``-cpu``, ``limit`` seconds for each exit.

    An emulator that died is started anew by the next :meth:`load`; the Case it died of ends in LostError. A Case whose
    profile asks for what this emulator cannot do: see :meth:`lacking`.
    """

    def __init__(self, emulator: EmulatorLike, *, cpu: str = CPU, limit: float = LIMIT) -> None:
        self.limit = limit
        self._emulator, self._cpu = emulator, cpu
        self._box: Mailbox | None = None
        self._own: CpuProfile | None = None
        self._profile: CpuProfile | None = None  # None: the emulator's own
        self._shape: VmShape | None = None
        self._offsets: dict[Slot, int] = {}
        self._case: Case | None = None
        self._names: tuple[str, ...] = ()
        self._shown: deque[Observation] = deque()
        self._incomplete: Observation | None = None
        self._inject = (0, 0, 0)
        self._dead = False

    def __enter__(self) -> Self:
        self._started()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the emulator."""
        if self._box is not None:
            self._box.__exit__(None, None, None)
        self._box = self._shape = self._profile = self._case = None

    def _started(self) -> Mailbox:
        if self._box is None:
            self._box = Mailbox(self._emulator, self._cpu).__enter__()
        return self._box

    @property
    def profile(self) -> CpuProfile:
        """The processor that this emulator is by itself."""
        if self._own is None:
            self._own = CpuProfile(tuple(_leaves(self._started())))
        return self._own

    def lacking(self, profile: CpuProfile) -> frozenset[str]:
        """Features of ``profile`` that this emulator does not have."""
        return profile.features - self.profile.features

    def can(self, case: Case) -> bool:
        """Whether the Case asks for nothing but what one processor by itself can show."""
        return not case.others and not case.shape.caps and all(isinstance(a, _ACTIONS) for a in case.actions)

    # --- a Case ---

    def load(self, case: Case) -> None:
        """Start over with ``case``. CaseError when it does not fit; LookupError for an MSR that cannot be observed."""
        box = self._started()
        try:
            self._load(box, case)
        except LostError:
            self.close()
            raise

    def _load(self, box: Mailbox, case: Case) -> None:
        profile = None if case.profile == self.profile else case.profile
        if profile is not self._profile:
            box.set_cpuid(() if profile is None else profile.cpuid)
            self._profile = profile
        if self._shape != case.shape:
            self._shape = None
            self._offsets = box.shape(case.shape)
            self._shape = case.shape
        self._case, self._names = case, case_sections(case)
        self._shown.clear()
        self._incomplete, self._dead = None, False
        e = case.start.events
        self._inject = (0, 0, 0)
        if e.exception_injected or e.exception_pending:
            self._inject = (_EXCEPTION, e.exception_nr, e.exception_error)
        elif e.interrupt_injected:
            self._inject = (_INTERRUPT, e.interrupt_nr, 0)
        box.rewritten(self._fill(box, case.memory))
        self._put(box, case.start)

    def _fill(self, box: Mailbox, memory: Memory) -> list[int]:
        """Lay the initial contents over RAM; the offsets of the pages that changed by it."""
        ram, changed = box.memory, []
        for slot, base in self._offsets.items():
            image = memory.image(slot)
            for offset in range(0, slot.size, PAGE):
                page = image[offset : offset + PAGE]
                if ram[base + offset : base + offset + PAGE] != page:
                    ram[base + offset : base + offset + PAGE] = page
                    changed.append(base + offset)
        return changed

    def _put(self, box: Mailbox, state: CpuState, *, flush: bool = False) -> None:
        case = self._loaded()
        box.put(pack_sections(state, (*_ALWAYS, *(("msrs",) if case.start.msrs else ()))))
        box.fill(seed=case.seed, reads=0 if state is case.start else box.reads, flush=flush)
        if box.request(Operation.LOAD) is Result.BAD_MSR:
            raise LookupError(f"the emulator cannot observe MSR {box.detail:#x}: add it to the device's bare_msr")

    def _loaded(self) -> Case:
        if self._case is None or self._box is None:
            raise RuntimeError("load a Case first")
        return self._case

    def apply(self, action: Action) -> Iterator[Observation]:
        """Do ``action``; what it shows, exit by exit. LostError when the emulator died."""
        try:
            yield from self._apply(action)
        except LostError:
            self.close()
            raise

    def _apply(self, action: Action) -> Iterable[Observation]:
        case, box = self._loaded(), self._started()
        match action:
            case Run(limit=limit, complete=True):
                return self._run(box, limit)
            case Run():
                return self._run_pending(box)
            case Complete():
                return self._complete()
            case Step(count=count):
                return self._step(box, count)
            case SetState():
                self._put(box, self._state(box).with_(action.meant))
            case Show():
                return (Observation(Halt(), box.get(self._names)),)
            case Inject(event="exception", vector=vector, error=error):
                self._inject = (_EXCEPTION, vector, error or 0)
            case Inject(event="interrupt", vector=vector):
                self._inject = (_INTERRUPT, vector, 0)
            case Inject():
                self._inject = (_NMI, 2, 0)
            case SaveRestore():
                self._put(box, self._state(box), flush=True)
            case _:
                raise TypeError(f"no such action: {action!r} in {case.name}")
        return ()

    def _state(self, box: Mailbox) -> CpuState:
        return unpack_sections(box.get((*_ALWAYS, *(("msrs",) if self._loaded().start.msrs else ()))))

    # --- running ---

    def _advance(self, box: Mailbox, *, step: bool = False) -> bool:
        """Run once, queue what it shows; whether a single step has ended."""
        box.fill(step=step, limit=self.limit, seed=self._loaded().seed, reads=box.reads, inject=self._inject)
        self._inject = (0, 0, 0)
        result = box.request(Operation.RUN, self.limit)
        sections = {} if result in (Result.SHUTDOWN, Result.TIMEOUT) else box.get(self._names)
        exits = _exits(box.accesses())
        match result:
            case Result.HALT:
                exits.append(Halt())
            case Result.SHUTDOWN:
                exits.append(Shutdown())
            case Result.TIMEOUT:
                exits.append(Timeout(self.limit))
            case Result.OTHER:
                raise LostError(f"the emulator stopped for a reason of its own ({box.detail:#x})")
        last = len(exits) - 1
        self._shown.extend(Observation(e, sections if n == last else {}) for n, e in enumerate(exits))
        return result is Result.DEBUG

    def _run(self, box: Mailbox, limit: int) -> Iterator[Observation]:
        self._incomplete = None
        done = 0
        while done < limit and not self._dead:
            if not self._shown:
                self._advance(box)
            seen = self._next()
            yield seen
            done += 1
            if seen.exit.terminal:
                return

    def _next(self) -> Observation:
        seen = self._shown.popleft()
        self._dead = seen.exit.terminal and not seen.exit.comparable
        return seen

    def _run_pending(self, box: Mailbox) -> Iterator[Observation]:
        """One exit, as KVM shows it with the operation still pending; here it is complete and waits to be shown."""
        if not self._shown:
            self._advance(box)
        seen = self._next()
        if seen.exit.terminal:
            yield seen
            return
        self._incomplete = seen
        yield Observation(seen.exit, {})

    def _complete(self) -> Iterator[Observation]:
        if self._incomplete is None:
            raise RuntimeError("Complete without an operation pending: use Run(complete=False) before it")
        seen, self._incomplete = self._incomplete, None
        if self._shown and not seen.sections:
            self._incomplete = self._next()
            yield Observation(self._incomplete.exit, {})
        else:
            yield replace(seen, exit=Halt())

    def _step(self, box: Mailbox, count: int) -> Iterator[Observation]:
        for _ in range(count):
            stepped = False
            while not stepped and not self._dead:
                stepped = self._advance(box, step=True)
                while self._shown:
                    seen = self._next()
                    yield seen
                    if seen.exit.terminal:
                        return
            state = self._state(box)
            mask = (1 << 64 if state.cs.l and state.efer >> 10 & 1 else 1 << 32) - 1
            yield Observation(Debug(1, state.cs.base + state.rip & mask, _DR6_STEP), box.get(self._names))

    # --- memory ---

    def memory_diff(self, pages: Pages, ignore: Mapping[int, int]) -> list[MemoryDiff]:
        """Where RAM differs from the Case's initial contents overlaid with ``pages``, bits of ``ignore`` left aside."""
        case, ram = self._loaded(), self._started().memory
        out: list[MemoryDiff] = []
        for slot, base in self._offsets.items():
            expected = case.memory.image(slot)
            inside = [gpa for gpa in pages if slot.gpa <= gpa < slot.gpa + slot.size]
            if inside:
                laid = bytearray(expected)
                for gpa in inside:
                    laid[gpa - slot.gpa : gpa - slot.gpa + PAGE] = pages[gpa]
                expected = bytes(laid)
            got = ram[base : base + slot.size]
            if got != expected:
                out += byte_diff(slot.gpa, expected, got, ignore)
        return out

    def read(self, gpa: int, size: int) -> bytes:
        """Bytes of guest RAM; empty when they lie outside of it."""
        for slot, base in self._offsets.items():
            if slot.gpa <= gpa and gpa + size <= slot.gpa + slot.size:
                return self._started().memory[base + gpa - slot.gpa : base + gpa - slot.gpa + size]
        return b""


def _exits(accesses: Iterable[Access]) -> list[Exit]:
    """Accesses of one instruction as exits; items of the same port in a row (REP INS, REP OUTS) are one exit."""
    out: list[Exit] = []
    for access in accesses:
        size, data = len(access.data), access.data if access.write else b""
        if not access.port:
            out.append(Mmio(access.address, size, access.write, data))
            continue
        last = out[-1] if out else None
        if isinstance(last, Io) and (last.port, last.size, last.write) == (access.address, size, access.write):
            out[-1] = replace(last, data=last.data + data, count=last.count + 1)
        else:
            out.append(Io(access.address, size, access.write, data))
    return out


def _leaves(box: Mailbox) -> Iterator[CpuidEntry]:
    """The leaves of the emulator's own CPUID, as KVM_GET_SUPPORTED_CPUID would list them."""
    for first in (0, 0x80000000):
        top = box.query_cpuid(first).eax
        for function in range(first, top + 1):
            entry = box.query_cpuid(function)
            if function not in _LAST_LEAF and function not in _SUBLEAVES:
                if any((entry.eax, entry.ebx, entry.ecx, entry.edx)) or function == first:
                    yield entry
                continue
            for index in range(_SUBLEAVES.get(function, 8)):
                entry = replace(box.query_cpuid(function, index), flags=1)
                if function in _LAST_LEAF and _LAST_LEAF[function](entry):
                    break
                if index < 2 or entry.eax or entry.ebx:
                    yield entry
