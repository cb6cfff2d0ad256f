"""ReferenceMachine: the register model as a Machine that runs Cases and shows Observations."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Final

from harness.case import (
    Action,
    Case,
    Complete,
    Inject,
    Kick,
    Observation,
    Run,
    SaveRestore,
    SetState,
    Show,
    Step,
    Switch,
    Try,
    Window,
)
from harness.exits import Answer, Debug, Exit, Halt, Interrupted, Io, IrqWindow, Mmio, Shutdown
from harness.reference import events, execute, smm
from harness.reference.control import xcr0_valid
from harness.reference.cpu import IF, RF, Cpu, ModelError
from harness.reference.cpu import RDI as _RDI
from harness.state import GPR_NAMES, MASK64, pack_sections

BUDGET: Final = 1_000_000
DR6_STEP: Final = 0xFFFF4FF0
"""DR6 as a debug exit shows it after a single step: the bits that read as one, and BS (SDM vol. 3B 17.2.3)."""


_Away = tuple[Cpu, deque[Observation], Observation | None, list[Inject], bool]
"""A vCPU of which another has the turn: its registers, and what of its last actions is not shown yet."""


def visible_sections(case: Case) -> tuple[str, ...]:
    """The sections that make up the visible state of ``case``."""
    more = ("msrs",) * bool(case.start.msrs) + ("egpr",) * ("apx" in case.requires)
    return ("regs", "sregs2", "events", "debugregs", "xcr0", *more)


class ReferenceMachine:
    """Runs a Case on the register model.

    ``sections`` are those of :data:`harness.state.SECTIONS` that observations hold (default: those that the Case makes
    visible), ``budget`` is the number of instructions that one exit may take.  ModelError from any method: the Case is
    outside of what the model knows.
    """

    def __init__(self, sections: Iterable[str] | None = None, budget: int = BUDGET) -> None:
        self.budget = budget
        self._fixed = None if sections is None else tuple(sections)
        self.sections: tuple[str, ...] = ()
        self.cpu: Cpu | None = None
        self._away: dict[int, _Away] = {}
        self._number = 0
        self._shown: deque[Observation] = deque()
        self._incomplete: Observation | None = None
        self._before: list[int] = []
        self._events: list[Inject] = []
        self._dead = False

    def load(self, case: Case, sections: Iterable[str] | None = None) -> None:
        """Start over with ``case``; its start state may hold an event to deliver first."""
        chosen = self._fixed if sections is None else tuple(sections)
        self.sections = visible_sections(case) if chosen is None else chosen
        self.cpu = Cpu(case)
        self._away, self._number = {}, 0
        self._shown.clear()
        self._incomplete, self._dead = None, False
        self._events = []
        e = case.start.events
        if e.exception_injected or e.exception_pending:
            error = e.exception_error if e.exception_has_error else None
            self._events.append(Inject("exception", e.exception_nr, error))
        if e.interrupt_injected:
            self._events.append(Inject("interrupt", e.interrupt_nr))

    def apply(self, action: Action) -> list[Observation]:
        """Do ``action``; what it shows, exit by exit."""
        match action:
            case Run(limit=limit, complete=True):
                return self._run(limit)
            case Run():
                return self._run_pending()
            case Window(limit=limit):
                return self._window(limit)
            case Complete():
                return self._complete()
            case SetState() if self._incomplete is not None:
                self._set_pending(self._incomplete, action.meant)
            case SetState():
                self._set(action.meant)
            case Try():
                accepted = self._acceptable(dict(action.values))
                if accepted:
                    self._set(dict(action.values))
                return [self._observe(Answer(action.text, accepted), {})]
            case Show():
                self._need_rest("Show")
                return [self._observe(Halt(), {})]
            case Kick():
                return [self._kick()]
            case Switch(vcpu=number):
                self._switch(number)
            case Step(count=count):
                return self._step(count)
            case Inject():
                self._events.append(action)
            case SaveRestore():
                self._need_rest("SaveRestore")
            case _:
                raise ModelError(f"the model does not know the action {action.kind!r}")
        return []

    # --- registers, vCPUs --------------------------------------------------------------------------------------------

    def _set(self, values: Mapping[str, int]) -> None:
        self._need_rest("SetState")
        cpu = self._cpu()
        undefined = 0 if "rflags" in values else cpu.undefined
        cpu.load_state(cpu.state().with_(values))
        cpu.undefined = undefined

    def _acceptable(self, values: Mapping[str, int]) -> bool:
        """Whether userspace may write these: KVM refuses what the processor would (api.rst KVM_SET_XCRS)."""
        if set(values) != {"xcr0"}:
            raise ModelError(f"what KVM does with {', '.join(values)} is not modelled: Try knows xcr0")
        return xcr0_valid(self._cpu(), values["xcr0"])

    def _switch(self, number: int) -> None:
        """Go on with another vCPU; RAM and devices are the same ones."""
        old = self._cpu()
        self._away[self._number] = old, self._shown, self._incomplete, self._events, self._dead
        if number in self._away:
            cpu, self._shown, self._incomplete, self._events, self._dead = self._away.pop(number)
        else:
            other = old.case.others[number - 1]
            cpu = Cpu(replace(old.case, start=other.start, profile=other.profile or old.case.profile))
            cpu.mem.share(old.mem)
            self._shown, self._incomplete, self._events, self._dead = deque(), None, [], False
        cpu.reads = old.reads
        self.cpu, self._number = cpu, number

    # --- running -----------------------------------------------------------------------------------------------------

    def _cpu(self) -> Cpu:
        if self.cpu is None:
            raise ModelError("no Case is loaded: call load() first")
        return self.cpu

    def _need_rest(self, what: str) -> None:
        if self._shown or self._incomplete:
            raise ModelError(f"{what} in the middle of an instruction with several exits is not modelled")

    def _run(self, limit: int) -> list[Observation]:
        out: list[Observation] = []
        self._incomplete = None
        while len(out) < limit and not self._dead:
            if not self._shown:
                self._advance()
            seen = self._shown.popleft()
            out.append(seen)
            if seen.exit.terminal:
                break
        return out

    def _window(self, limit: int) -> list[Observation]:
        """To the first instruction boundary at which an interrupt can come in (SDM vol. 3A 6.8.1, 6.8.3)."""
        cpu = self._cpu()
        out: list[Observation] = []
        while len(out) < limit:
            if cpu.rflags & IF and not cpu.shadow:
                return [*out, self._observe(IrqWindow(), {})]
            self._instruction(out)
            if out and out[-1].exit.terminal:
                break
        return out

    def _instruction(self, out: list[Observation]) -> bool:
        """What is to be delivered, and one instruction; its exits go to ``out``. See step() for the answer."""
        cpu, string = self._cpu(), False
        cpu.pending_exits.clear()
        try:
            self._deliver()
            string = execute.step(cpu)
        except events.TripleFault:
            self._shutdown()
        else:
            if cpu.pending_exits:
                self._queue(string)
        out.extend(self._shown)
        self._shown.clear()
        return string

    def _run_pending(self) -> list[Observation]:
        """One exit, with its operation still pending: no state is defined yet."""
        if not self._shown:
            self._advance_slowly()
        seen = self._shown.popleft()
        if seen.exit.terminal:
            return [seen]
        self._incomplete = seen
        return [Observation(seen.exit, {}, retired=seen.retired)]

    def _complete(self) -> list[Observation]:
        """The state after the pending exit, shown as Halt; or the next exit of the same instruction, pending too."""
        if self._incomplete is None:
            raise ModelError("Complete without an operation pending: use Run(complete=False) before it")
        seen, self._incomplete = self._incomplete, None
        if self._shown and not seen.sections:
            self._incomplete = seen = self._shown.popleft()
            return [Observation(seen.exit, {}, retired=seen.retired)]
        mem = self._cpu().mem  # as RAM is now: another vCPU may have run
        return [replace(seen, exit=Halt(), pages=mem.pages(), pages_ignore=mem.pages_ignore)]

    def _set_pending(self, seen: Observation, values: Mapping[str, int]) -> None:
        """Registers set while an operation is pending: what is left of the instruction goes on from them.

        A register that the instruction does not write keeps the value; INS moves rDI on from it; after a write nothing
        is left to do, and the guest goes on at the RIP that was set. ModelError where the instruction writes the
        register otherwise.
        """
        cpu = self._cpu()
        if self._shown or not seen.sections:
            raise ModelError("SetState in the middle of an instruction with several exits is not modelled")
        for name, value in values.items():
            if name == "rip" and isinstance(seen.exit, (Io, Mmio)) and seen.exit.write:
                cpu.rip = value
                continue
            n = GPR_NAMES.index(name) if name in GPR_NAMES else -1
            if n < 0:
                raise ModelError(f"SetState of {name} while an operation is pending is not modelled")
            moved = cpu.gpr[n] - self._before[n]
            if moved and (n != _RDI or not isinstance(seen.exit, Io)):
                raise ModelError(f"the pending instruction writes {name}: which value it has then is not said")
            cpu.gpr[n] = value + moved & MASK64
        self._incomplete = replace(seen, sections=pack_sections(cpu.state(), self.sections))

    def _advance_slowly(self) -> None:
        """As :meth:`_advance`, instruction by instruction: what was before the last one is kept."""
        cpu = self._cpu()
        cpu.pending_exits.clear()
        for _ in range(self.budget):
            self._before = list(cpu.gpr)
            try:
                self._deliver()
                string = execute.step(cpu)
            except events.TripleFault:
                self._shutdown()
                return
            if cpu.pending_exits:
                self._queue(string)
                return
        raise ModelError(f"the guest did not exit in {self.budget} instructions; RIP is {cpu.rip:#x}")

    def _advance(self) -> None:
        """Run to the next instruction with exits and queue what it shows."""
        cpu = self._cpu()
        start = cpu.retired
        cpu.pending_exits.clear()
        try:
            self._deliver()
            string = execute.run(cpu, self.budget)
        except events.TripleFault:
            self._shutdown()
            return
        except RecursionError as error:  # a table that maps itself in a way the walker cannot end
            raise ModelError(f"the model recursed too deeply after {cpu.retired - start} instructions") from error
        self._queue(string)

    def _queue(self, string: bool) -> None:
        cpu = self._cpu()
        *first, last = cpu.pending_exits
        for exit in first:
            self._shown.append(Observation(exit, {}, retired=cpu.retired))
        # A machine may show the end of a REP at its restart point, with rCX already zero: as right as past it.
        # Between iterations RFLAGS.RF may be set: "the processor sets RF in the image of RFLAGS that it saves" (SDM
        # vol. 3B 18.3.1.1, on interruptions of repeated string instructions). Neither goes for a REPE or REPNE that ZF
        # has ended with items left: it would go on from there, so it is over, and RF clear (SDM vol. 3B 18.3.1.1).
        done = string and cpu.rip != cpu.start_rip
        seen = self._observe(last, {"rip": (cpu.start_rip,)} if done else {})
        self._shown.append(_without_rf(seen) if string else seen)
        cpu.pending_exits.clear()

    def _shutdown(self) -> None:
        cpu = self._cpu()
        for exit in cpu.pending_exits:
            self._shown.append(Observation(exit, {}, retired=cpu.retired))
        cpu.pending_exits.clear()
        self._shown.append(Observation(Shutdown(), {}, retired=cpu.retired))
        self._dead = True

    def _deliver(self) -> None:
        """Deliver what was injected, before the next instruction."""
        cpu = self._cpu()
        queue, self._events = self._events, []
        for event in queue:
            if event.event == "nmi":
                cpu.nmi_pending = 1
            elif event.event == "smi":
                smm.enter(cpu)
            elif event.event in ("exception", "interrupt"):
                events.deliver(cpu, event.vector, event.error)
            else:
                raise ModelError(f"cannot inject {event.event!r}: use exception, interrupt, nmi or smi")

    def _step(self, count: int) -> list[Observation]:
        cpu = self._cpu()
        out: list[Observation] = []
        self._incomplete = None
        for _ in range(count):
            if self._dead:
                break
            string = self._instruction(out)
            if out and out[-1].exit.terminal:
                break
            seen = self._observe(Debug(1, cpu.linear_rip(), DR6_STEP), {})
            out.append(_without_rf(seen) if string and cpu.rip == cpu.start_rip else seen)
        return out

    def _kick(self) -> Observation:
        """The guest jumps to itself: whenever the signal comes, the state is this one."""
        cpu = self._cpu()
        before = cpu.rip
        if not self._events and not cpu.nmi_pending:
            cpu.pending_exits.clear()
            if not execute.step(cpu) and cpu.rip == before:
                return self._observe(Interrupted(), {})
        raise ModelError("a guest to be kicked must stand at a jump to itself, with nothing to be delivered")

    def _observe(self, exit: Exit, accept: dict[str, tuple[int, ...]]) -> Observation:
        cpu = self._cpu()
        return Observation(
            exit=exit,
            sections=pack_sections(cpu.state(), self.sections),
            pages=cpu.mem.pages(),
            ignore=self._undefined(cpu),
            accept=accept,
            pages_ignore=cpu.mem.pages_ignore,
            retired=cpu.retired,
        )


    def _undefined(self, cpu: Cpu) -> dict[str, int]:
        """Undefined bits by register. IDTR in system management mode: KVM clears it, the manual leaves it alone."""
        out = {"rflags": cpu.undefined} if cpu.undefined else {}
        return {**out, "idtr.base": MASK64, "idtr.limit": MASK64} if cpu.smm else out


def _without_rf(seen: Observation) -> Observation:
    """RFLAGS.RF is not compared: between the iterations of a REP it may be set."""
    return replace(seen, ignore={**seen.ignore, "rflags": seen.ignore.get("rflags", 0) | RF})
