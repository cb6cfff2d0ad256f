"""KvmMachine: runs Cases on a real KVM, and shows registers, exits and RAM as KVM's ioctls do."""

from __future__ import annotations

import ctypes
import errno
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

from harness import kvm_ioctl as k
from harness.case import (
    PAGE,
    Action,
    Case,
    Complete,
    Inject,
    Kick,
    Observation,
    Pages,
    Run,
    SaveRestore,
    SetState,
    Show,
    Step,
    Switch,
    Try,
    Window,
)
from harness.exits import Answer, Debug, Exit, Halt, Hypercall, Interrupted, Io, IrqWindow, Mmio, Msr, Timeout
from harness.kvm_exit import HALT, read_exit
from harness.machine import Sections, case_sections
from harness.memory_diff import MemoryDiff, byte_diff
from harness.pool import SHARED, Packer, Pool, Warm
from harness.state import CpuState, pack_regs, pack_sections, unpack_sections
from harness.vcpu import RUN_LIMIT, SYNC, RunTimeoutError, Vcpu
from harness.vm import Kvm, KvmUnusableError

_HLT: Final = k.KVM_EXIT_HLT
_NOTHING: Final[Mapping[Any, Any]] = {}
_NO_PKRU: Final = bytes(4)
_INTERRUPTED: Final = Interrupted()
KICK_AFTER: Final = 0.01
"""Seconds that a guest runs before it is kicked: some thousand times around its loop, even emulated."""
_SHOWN_BY: Final = {"xsave": k.KVM_GET_XSAVE, "xsave2": k.KVM_GET_XSAVE2}

# Order in which a start state is written: CPUID-dependent controls first, registers last.
_SET_ORDER: Final = ("xcr0", "sregs2", "msrs", "debugregs", "pkru", "egpr", "events", "regs")


class KvmMachine:
    """Runs Cases on a real KVM. VMs are kept and reused by (shape, profile); a vCPU that went astray is thrown away.

    ``limit`` is the time in seconds that one KVM_RUN may take. Not thread-safe; open it after a fork.
    """

    POOL: Final = 4

    def __init__(self, kvm: Kvm, *, limit: float = RUN_LIMIT, sync: bool = True) -> None:
        self.kvm = kvm
        self.limit = limit
        if not kvm.capability(k.KVM_CAP_SREGS2):
            raise KvmUnusableError(f"{kvm.device}: this KVM has no KVM_GET_SREGS2: use Linux 5.14 or newer")
        wanted = k.KVM_SYNC_X86_REGS | k.KVM_SYNC_X86_SREGS | k.KVM_SYNC_X86_EVENTS
        self._sync = sync and kvm.sync_fields & wanted == wanted
        self._sync_mask = wanted if self._sync else 0
        self._pool = Pool(kvm, self.POOL)
        self._packer = Packer()
        self._case: Case | None = None
        self._warm: Warm | None = None
        self._vcpus: list[Vcpu] = []  # the Case's, its own first, if it has several
        self._current: Vcpu | None = None
        self._poisoned = False  # the current vCPU went astray
        self._smi = False  # the VM has seen system management mode: not all of what that leaves is in sections
        self._pending = False  # an operation waits for KVM_RUN to complete it; the next Case's would
        self._reads = 0
        self._sections: Sections = ()
        self._shared: Sections = ()
        self._read_all: Sections = ()  # all but the MSRs, which are asked for by index
        self._unmirrored: Sections = ()  # those of them that KVM does not store into kvm_run
        self._msrs: tuple[tuple[int, int], ...] | None = None
        self._requires: frozenset[str] = frozenset()
        self._msr_indices: tuple[int, ...] = ()

    # --- life ---

    def close(self) -> None:
        """Close every VM."""
        self._pool.close()
        self._warm = self._current = None
        self._vcpus = []

    def __enter__(self) -> KvmMachine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def load(self, case: Case) -> None:
        """Give the Case its VM, RAM and start state. KvmError or LookupError when this KVM refuses some of it."""
        warm, start = self._warm, case.start
        if warm is None or self._poisoned or self._pending or self._smi or not warm.serves(case.shape, case.profile):
            warm = self._other_vm(case)
        self._poisoned = True  # until the start state is in whole
        self._case, self._current, self._reads = case, warm.vcpu, 0
        if start.msrs is not self._msrs or case.requires is not self._requires:
            self._choose_sections(case)
        warm.load(case.memory)
        self._set_start(warm, start)
        self._vcpus = []
        if case.others:
            self._add_vcpus(warm, case)
        else:
            self._poisoned = False

    def _other_vm(self, case: Case) -> Warm:
        """A VM of the pool, and the last one back to it if it is still good."""
        last = self._warm
        if last is not None and (self._poisoned or self._pending or self._smi or last.may_be_nested):
            self._pool.drop(last)
        self._warm = self._current = None
        self._pending = self._smi = False
        warm = self._warm = self._pool.get(case.shape, case.profile)
        return warm

    def _choose_sections(self, case: Case) -> None:
        names = case_sections(case)
        self._msrs, self._requires = case.start.msrs, case.requires
        self._msr_indices = tuple([index for index, _ in self._msrs])
        if names is not self._sections:
            self._sections, self._shared = names, tuple(name for name in SHARED if name in names)
            self._read_all = tuple(name for name in names if name != "msrs")
            self._unmirrored = tuple(name for name in self._read_all if name not in ("regs", "sregs2", "events"))

    def _add_vcpus(self, warm: Warm, case: Case) -> None:
        """Those beside the Case's own. A VM of several vCPUs serves one Case: it stays poisoned."""
        self._vcpus = [warm.vcpu]
        for number, other in enumerate(case.others, 1):
            vcpu = Vcpu(warm.vm, other.profile or case.profile, number)
            warm.others.append(vcpu)
            self._vcpus.append(vcpu)
            self._put_state(vcpu, other.start)

    @property
    def vcpu(self) -> Vcpu:
        """The vCPU of the loaded Case that actions are for."""
        if self._current is None:
            raise RuntimeError("load a Case first")
        return self._current

    def distrust(self) -> None:
        """The loaded Case went wrong: what KVM keeps of it beyond the visible state is not for the next one."""
        self._poisoned = True

    def _loaded(self) -> Warm:
        if self._warm is None:
            raise RuntimeError("load a Case first")
        return self._warm

    def _set_start(self, warm: Warm, start: CpuState) -> None:
        """Set what does not already hold the start state's bytes, as the last Case's last observation showed them."""
        vcpu, seen = warm.vcpu, warm.seen
        for name, data in self._packer.rest(start, self._shared):
            if seen.get(name) != data:
                vcpu.put(name, data)
        vcpu.run_page.cr8 = start.cr8  # without an in-kernel APIC, KVM_RUN takes CR8 from here (api.rst section 5)
        if start.pkru or warm.pkru != _NO_PKRU:  # in no section that observations hold
            warm.pkru = pack_sections(start, ("pkru",))["pkru"]
            vcpu.put("pkru", warm.pkru)
        if self._sync:
            vcpu.sync_enable(self._sync_mask)
            vcpu.sync_put("regs", pack_regs(start))
        else:
            vcpu.put("regs", pack_regs(start))

    def _put_state(self, vcpu: Vcpu, start: CpuState) -> None:
        """Set a whole start state on a vCPU of which nothing is known."""
        for name, data in pack_sections(start, tuple(n for n in _SET_ORDER if n in self._sections)).items():
            vcpu.put(name, data)
        vcpu.run_page.cr8 = start.cr8
        vcpu.sync_enable(self._sync_mask)

    # --- actions ---

    def apply(self, action: Action) -> Iterable[Observation]:
        """Do one action; see harness/case.py for their meaning."""
        return self._run(action) if isinstance(action, Run) else self._act(action)

    def _act(self, action: Action) -> Iterator[Observation]:
        match action:
            case Complete():
                vcpu = self.vcpu
                reason = vcpu.complete(self.limit)
                if reason is not None:
                    yield Observation(read_exit(vcpu, reason), {})
                else:
                    self._pending = False
                    yield Observation(Halt(), self._observe(vcpu))
            case Window():
                yield from self._window(action)
            case SetState():
                self._set_registers(action)
            case Try():
                yield Observation(Answer(action.text, self._try(action.values)), self.sections())
            case Show(via=via):
                yield Observation(Halt(), {**self.sections(), **self._egpr_by(via)})
            case Kick():
                yield self._kick()
            case Switch(vcpu=number):
                self._current = self._vcpus[number]
            case Step():
                yield from self._step(action)
            case Inject():
                self._inject(action)
            case SaveRestore():
                self._save_restore()
            case _:
                raise TypeError(f"no such action: {action!r}")

    def _run(self, action: Run) -> Iterable[Observation]:
        """Up to the first exit at once: for most Cases, it is the HLT that ends them."""
        vcpu = self.vcpu
        try:
            reason = vcpu.run(self.limit)
        except RunTimeoutError:
            return (self._timed_out(),)
        if reason == _HLT:
            self._pending = False
            return (Observation(HALT, self._observe(vcpu), _NOTHING, _NOTHING, _NOTHING, _NOTHING),)
        return self._exits(action, vcpu, reason)

    def _exits(self, action: Run, vcpu: Vcpu, reason: int) -> Iterator[Observation]:
        """From an exit on."""
        done = 0
        try:
            while True:
                exit_ = read_exit(vcpu, reason)
                done += 1
                following: int | None = None
                self._pending = False
                if not exit_.comparable:
                    self._poisoned = True
                    yield Observation(exit_, {})
                    return
                if isinstance(exit_, (Io, Mmio, Msr, Hypercall)):
                    self._pending = True
                    self._answer(exit_)
                    if not action.complete:
                        yield Observation(exit_, {})
                        return
                    following = vcpu.complete(self.limit)
                    self._pending = following is not None
                yield Observation(exit_, {} if following is not None else self._observe(vcpu))
                if exit_.terminal or done >= action.limit or isinstance(exit_, IrqWindow):
                    return
                reason = following if following is not None else vcpu.run(self.limit)
        except RunTimeoutError:
            yield self._timed_out()

    def _timed_out(self) -> Observation:
        self._poisoned = True
        return Observation(Timeout(self.limit), {})

    def _observe(self, vcpu: Vcpu) -> dict[str, bytes]:
        """The visible state at an exit, remembered for the next start state."""
        sections, warm = self._read(vcpu), self._warm
        if warm is not None and warm.vcpu is vcpu:
            warm.remember(sections)
        return sections

    def sections(self) -> dict[str, bytes]:
        """The visible state, as bytes, where the vCPU stands now."""
        return self._read(self.vcpu)

    def _read(self, vcpu: Vcpu) -> dict[str, bytes]:
        out = vcpu.mirrored() if self._sync else {}
        vcpu.read(self._unmirrored if out else self._read_all, out)
        if self._msr_indices:
            out["msrs"] = vcpu.get_msrs(self._msr_indices)
        return out

    def state(self) -> CpuState:
        """The visible state, decoded."""
        return unpack_sections(self.sections())

    def _answer(self, exit_: Exit) -> None:
        """Put what the Case's devices answer where the pending read will find it."""
        case, run = self._case, self.vcpu.run_page
        assert case is not None
        if isinstance(exit_, Io) and not exit_.write:
            for n in range(exit_.count):
                data = case.read_data(self._reads, exit_.size)
                self.vcpu.io_data(run.io.data_offset + n * exit_.size, exit_.size)[:] = data
                self._reads += 1
        elif isinstance(exit_, Mmio) and not exit_.write:
            ctypes.memmove(run.mmio.data, case.read_data(self._reads, exit_.size), exit_.size)
            self._reads += 1
        elif isinstance(exit_, Msr):
            run.msr.error = 0
            if not exit_.write:
                run.msr.data = int.from_bytes(case.read_data(self._reads, 8), "little")
                self._reads += 1
        elif isinstance(exit_, Hypercall):
            run.hypercall.ret = int.from_bytes(case.read_data(self._reads, 8), "little")
            self._reads += 1

    def _set_registers(self, action: SetState) -> None:
        if action.via.startswith("xsave"):
            given = self.state().with_(dict(action.values))
            self.vcpu.put_egpr(pack_sections(given, ("egpr",))["egpr"], in_use=action.via == "xsave")
            return
        changed = self.state().with_(dict(action.values))
        regs = ("regs",)
        rest = tuple(n for n in self._sections if n != "regs")
        sync = action.via == "sync" and self._sync
        before = self.sections()
        for name in (rest if action.via == "sregs" else regs) if not sync else (*SYNC,):
            if name not in self._sections and not sync:
                continue
            data = pack_sections(changed, (name,))[name]
            if sync:
                self.vcpu.sync_put(name, data)
            elif before[name] != data:
                self.vcpu.put(name, data)

    def _try(self, values: Sequence[tuple[str, int]]) -> bool:
        """Whether KVM takes these values; EINVAL is its way to refuse them."""
        try:
            self._set_registers(SetState(tuple(values), "sregs"))
        except k.KvmError as error:
            if error.errno != errno.EINVAL:
                raise
            return False
        return True

    def _egpr_by(self, via: str) -> dict[str, bytes]:
        return {"egpr": self.vcpu.egpr_by(_SHOWN_BY[via])} if "egpr" in self._sections else {}

    def _kick(self) -> Observation:
        """KVM_RUN until a signal ends it; an exit that comes first is shown as what it is."""
        try:
            return Observation(read_exit(self.vcpu, self.vcpu.run(KICK_AFTER)), self.sections())
        except RunTimeoutError:
            return Observation(_INTERRUPTED, self.sections())

    def _step(self, action: Step) -> Iterator[Observation]:
        vcpu = self.vcpu
        debug = k.kvm_guest_debug(control=k.KVM_GUESTDBG_ENABLE | k.KVM_GUESTDBG_SINGLESTEP)
        vcpu.control(k.KVM_SET_GUEST_DEBUG, debug)
        try:
            for _ in range(action.count):
                for seen in self._run(Run(64)):  # an instruction may leave for userspace before its step is reported
                    yield seen
                    if isinstance(seen.exit, Debug) or seen.exit.terminal:
                        break
                if seen.exit.terminal:
                    break
        finally:
            vcpu.control(k.KVM_SET_GUEST_DEBUG, k.kvm_guest_debug())
            # A step over HLT leaves the vCPU halted, which no section shows.
            vcpu.control(k.KVM_SET_MP_STATE, k.kvm_mp_state(mp_state=k.KVM_MP_STATE_RUNNABLE))

    def _window(self, action: Window) -> Iterator[Observation]:
        run = self.vcpu.run_page
        run.request_interrupt_window = 1
        try:
            yield from self._run(Run(action.limit))
        finally:
            run.request_interrupt_window = 0

    def _inject(self, action: Inject) -> None:
        vcpu = self.vcpu
        if action.event == "nmi":
            vcpu.control(k.KVM_NMI)
        elif action.event == "smi":
            vcpu.control(k.KVM_SMI)
            self._smi = True
        elif action.event == "interrupt":
            vcpu.control(k.KVM_INTERRUPT, k.kvm_interrupt(irq=action.vector))
        else:
            events = k.kvm_vcpu_events.from_buffer(bytearray(vcpu.get("events")))
            events.exception.injected = 1
            events.exception.nr = action.vector
            events.exception.has_error_code = int(action.error is not None)
            events.exception.error_code = action.error or 0
            vcpu.put("events", bytes(events))

    def _save_restore(self) -> None:
        """Move the vCPU and RAM into a VM made afresh."""
        assert self._case is not None
        old, case = self._loaded(), self._case
        if case.others:
            raise ValueError(f"{case.name}: a Case of several vCPUs cannot be saved and restored")
        saved = self.sections()
        ram = {slot: bytes(mapping) for slot, mapping in old.vm.ram.items()}
        self._pool.drop(old)
        warm = self._warm = self._pool.get(case.shape, case.profile)
        self._current, self._vcpus = warm.vcpu, [warm.vcpu]
        for slot, data in ram.items():
            warm.vm.ram[slot][:] = data
        warm.load(case.memory, write=False)
        for name in _SET_ORDER:
            if name in saved:
                warm.vcpu.put(name, saved[name])
        if self._sync:
            warm.vcpu.sync_enable(self._sync_mask)

    # --- memory ---

    def memory_diff(self, pages: Pages, ignore: Mapping[int, int]) -> list[MemoryDiff]:
        """Where RAM differs from the Case's initial contents overlaid with ``pages``, bits of ``ignore`` left aside."""
        warm = self._loaded()
        if warm.equal(pages) or (ignore and warm.equal(pages := self._settled(pages, ignore))):
            return []
        assert self._case is not None
        out: list[MemoryDiff] = []
        for slot, ram in warm.vm.ram.items():
            expected = bytearray(self._case.memory.image(slot))
            for gpa, data in pages.items():
                if slot.gpa <= gpa < slot.gpa + slot.size:
                    expected[gpa - slot.gpa : gpa - slot.gpa + PAGE] = data
            out += byte_diff(slot.gpa, bytes(expected), ram[:], ignore)
        return out

    def _settled(self, pages: Pages, ignore: Mapping[int, int]) -> dict[int, bytes]:
        """``pages`` with what RAM holds in the undefined bits of ``ignore`` (byte address -> mask)."""
        assert self._case is not None
        out = {gpa: bytearray(data) for gpa, data in pages.items()}
        for slot, ram in self._loaded().vm.ram.items():
            for gpa, mask in ignore.items():
                at = gpa - slot.gpa
                if not 0 <= at < slot.size:
                    continue
                base = gpa & ~(PAGE - 1)
                if base not in out:
                    offset = base - slot.gpa
                    out[base] = bytearray(self._case.memory.image(slot)[offset : offset + PAGE])
                n = gpa - base
                out[base][n] = out[base][n] & ~mask | ram[at] & mask
        return {gpa: bytes(data) for gpa, data in out.items()}

    def read(self, gpa: int, size: int) -> bytes:
        """Bytes of guest RAM; empty when they lie outside of it."""
        for slot, ram in self._loaded().vm.ram.items():
            if slot.gpa <= gpa and gpa + size <= slot.gpa + slot.size:
                return ram[gpa - slot.gpa : gpa - slot.gpa + size]
        return b""

    def pages(self) -> dict[int, bytes]:
        """Pages of RAM that differ from the Case's initial contents."""
        assert self._case is not None
        out = {}
        for slot, ram in self._loaded().vm.ram.items():
            image = self._case.memory.image(slot)
            for offset in range(0, slot.size, PAGE):
                data = ram[offset : offset + PAGE]
                if data != image[offset : offset + PAGE]:
                    out[slot.gpa + offset] = data
        return out
