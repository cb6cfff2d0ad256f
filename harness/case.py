"""Case, Action, Observation: pure data that says what to run, what was done to it, and what was seen.

A Case is everything that two machines need to run the same guest: RAM, start state, CPU profile, VM shape, actions.
It serializes to JSON, and its identity is the hash of that JSON.  Nothing here knows KVM or the model.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property, lru_cache
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final

from harness.cpuid import CpuProfile
from harness.exits import Exit
from harness.state import GPR_NAMES, CpuState, flat_text

if TYPE_CHECKING:
    import hashlib

FORMAT: Final = 1
PAGE: Final = 4096
CAP_USER_SPACE_MSR: Final = 188
CAP_EXIT_HYPERCALL: Final = 201
"""KVM_CAP_X86_USER_SPACE_MSR and KVM_CAP_EXIT_HYPERCALL change what a guest sees: the model knows them."""
IRQCHIPS: Final = ("none", "split", "full")


def _sha256(data: bytes = b"") -> hashlib._Hash:
    """Imported when it is used: OpenSSL is large, and the runner in the lab, where Python is slow, hashes nothing."""
    import hashlib

    return hashlib.sha256(data)


class CaseError(ValueError):
    """A Case, or a file that should hold one, is not usable; the text says why and what to do."""


@dataclass(frozen=True, slots=True)
class Blob:
    """Bytes at a guest-physical address."""

    gpa: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Slot:
    """A RAM slot: guest-physical address and size in bytes, both multiples of 4096. Outside every slot is MMIO."""

    gpa: int
    size: int


@dataclass(frozen=True)
class VmShape:
    """The VM around the vCPU: RAM slots, interrupt controller, capabilities to enable (number -> arguments).

    ``smm``: the slots are there in system management mode too, which KVM gives an address space of its own.
    """

    slots: tuple[Slot, ...] = (Slot(0, 0x20000),)
    irqchip: str = "none"
    caps: tuple[tuple[int, tuple[int, ...]], ...] = ()
    smm: bool = False

    def __post_init__(self) -> None:
        if self.irqchip not in IRQCHIPS:
            raise CaseError(f"irqchip {self.irqchip!r}: use one of {', '.join(IRQCHIPS)}")
        for slot in self.slots:
            if slot.gpa % PAGE or slot.size % PAGE or slot.size <= 0:
                raise CaseError(f"slot {slot.gpa:#x}+{slot.size:#x}: address and size must be multiples of 4096")


@dataclass(frozen=True)
class Memory:
    """Initial contents of RAM: blobs in order (a later one overlays an earlier one); everything else is zero.

    Share one Memory between Cases wherever they start from the same RAM: its image is computed once.
    """

    blobs: tuple[Blob, ...]

    def plus(self, *blobs: Blob) -> Memory:
        """A Memory with ``blobs`` laid over this one."""
        return Memory(self.blobs + blobs)

    @cached_property
    def _images(self) -> dict[Slot, bytes]:
        return {}

    def image(self, slot: Slot) -> bytes:
        """The initial bytes of ``slot``."""
        found = self._images.get(slot)
        if found is None:
            ram = bytearray(slot.size)
            for blob in self.blobs:
                start = blob.gpa - slot.gpa
                lo, hi = max(start, 0), min(start + len(blob.data), slot.size)
                if lo < hi:
                    ram[lo:hi] = blob.data[lo - start : hi - start]
            found = self._images[slot] = bytes(ram)
        return found

    @cached_property
    def digest(self) -> str:
        """SHA-256 over addresses and bytes."""
        h = _sha256()
        for blob in self.blobs:
            h.update(f"{blob.gpa}:{len(blob.data)}:".encode())
            h.update(blob.data)
        return h.hexdigest()

    def check(self, shape: VmShape) -> None:
        """CaseError when a blob lies outside every slot of ``shape``."""
        for blob in self.blobs:
            if not any(s.gpa <= blob.gpa and blob.gpa + len(blob.data) <= s.gpa + s.size for s in shape.slots):
                end = blob.gpa + len(blob.data)
                raise CaseError(
                    f"segment {blob.gpa:#x}..{end:#x} lies outside guest memory "
                    f"({', '.join(f'{s.gpa:#x}..{s.gpa + s.size:#x}' for s in shape.slots)}): "
                    "link it lower, or give the Case a slot there"
                )


# --- actions --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Action:
    """Something done to a machine. ``kind`` is its name in JSON."""

    kind: ClassVar[str] = "action"


@dataclass(frozen=True, slots=True)
class Run(Action):
    """Run to the next exit, complete its pending operation, show the state; up to ``limit`` exits or a terminal one.

    A guest that has not ended (HLT, shutdown) after ``limit`` exits is a mismatch only if the other machine's has.
    ``complete=False`` shows the state with the operation of a single exit still pending; a :class:`Complete` follows.
    """

    limit: int = 1
    complete: bool = True
    kind: ClassVar[str] = "run"


@dataclass(frozen=True, slots=True)
class Window(Action):
    """Run until an interrupt can be injected (KVM_EXIT_IRQ_WINDOW_OPEN), up to ``limit`` exits or a terminal one."""

    limit: int = 64
    kind: ClassVar[str] = "window"


@dataclass(frozen=True, slots=True)
class Complete(Action):
    """Complete the operation that ``Run(complete=False)`` left pending, and show the state."""

    kind: ClassVar[str] = "complete"


@dataclass(frozen=True, slots=True)
class SetState(Action):
    """Write some registers (flat names of CpuState). ``via``: ``regs``, ``sregs``, ``sync`` (SYNC_REGS at next run).

    Via ``xsave`` R16-R31 go through KVM_SET_XSAVE with XSTATE_BV[19] set. Via ``xsave-init`` the bit is clear although
    the area holds ``values``: a component in its initial configuration, so that R16-R31 become zero.
    """

    values: tuple[tuple[str, int], ...]
    via: str = "regs"
    kind: ClassVar[str] = "set"

    @property
    def meant(self) -> dict[str, int]:
        """The registers that change, with the values that they get."""
        given = dict(self.values)
        return {**given, **dict.fromkeys(GPR_NAMES[16:], 0)} if self.via == "xsave-init" else given


@dataclass(frozen=True, slots=True)
class Try(Action):
    """Write registers that KVM may have to refuse (EINVAL); shown as :class:`harness.exits.Answer` with the state."""

    values: tuple[tuple[str, int], ...]
    kind: ClassVar[str] = "try"

    @property
    def text(self) -> str:
        """The registers with their values."""
        return " ".join(f"{name}={value:#x}" for name, value in self.values)


@dataclass(frozen=True, slots=True)
class Show(Action):
    """Show the state once more. ``via``: the ioctl that R16-R31 are read with, ``xsave`` or ``xsave2``."""

    via: str = "xsave"
    kind: ClassVar[str] = "show"


@dataclass(frozen=True, slots=True)
class Kick(Action):
    """Run a guest that stands at a jump to itself until a signal ends KVM_RUN with EINTR, and show the state."""

    kind: ClassVar[str] = "kick"


@dataclass(frozen=True, slots=True)
class Switch(Action):
    """What follows is done to another vCPU of the Case: 0, or 1 and up for :attr:`Case.others`."""

    vcpu: int
    kind: ClassVar[str] = "switch"


@dataclass(frozen=True, slots=True)
class Inject(Action):
    """Queue an event for the next run. ``event``: ``exception``, ``interrupt``, ``nmi`` or ``smi``."""

    event: str
    vector: int = 2
    error: int | None = None
    kind: ClassVar[str] = "inject"


@dataclass(frozen=True, slots=True)
class Step(Action):
    """Execute ``count`` instructions one by one (KVM_GUESTDBG_SINGLESTEP); each shows a debug exit."""

    count: int = 1
    kind: ClassVar[str] = "step"


@dataclass(frozen=True, slots=True)
class SaveRestore(Action):
    """Save the whole vCPU and RAM, build a fresh VM from it, go on there."""

    kind: ClassVar[str] = "save-restore"


ACTIONS: Final[dict[str, type[Action]]] = {
    c.kind: c for c in (Run, Window, Complete, SetState, Inject, Step, SaveRestore, Try, Show, Kick, Switch)
}


def _action_json(action: Action) -> dict[str, Any]:
    return {"kind": action.kind, **asdict(action)}


def _action_from_json(body: Mapping[str, Any]) -> Action:
    values = {k: v for k, v in body.items() if k != "kind"}
    if body["kind"] in ("set", "try"):
        values["values"] = tuple((str(k), int(v)) for k, v in values["values"])
    return ACTIONS[body["kind"]](**values)


# --- the Case -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Other:
    """A further vCPU of a Case, in the same RAM: its start state, and its CPUID where it is not the Case's."""

    start: CpuState
    profile: CpuProfile | None = None


@dataclass(frozen=True)
class Case:
    """One guest run, whole. ``name`` is stable and readable, ``id`` identifies its content.

    ``bits`` is the code size at the start (16, 32, 64), for disassembly. ``origin`` is the source of the code
    (``guests/gpr.S:mov_r32``), ``requires`` names CPU features and host traits without which the Case cannot run;
    ``seed`` determines what devices answer to reads. ``start.msrs`` are both set and observed. ``others`` are vCPUs
    that :class:`Switch` turns to; nothing runs on them before.
    """

    name: str
    memory: Memory
    start: CpuState
    profile: CpuProfile
    shape: VmShape = VmShape()
    actions: tuple[Action, ...] = (Run(64),)
    bits: int = 64
    origin: str = ""
    requires: frozenset[str] = frozenset()
    seed: int = 0
    others: tuple[Other, ...] = ()

    @cached_property
    def id(self) -> str:
        """First 12 hex digits of the SHA-256 of everything that decides what happens (``origin`` does not).

        That is the shortest JSON of it, keys sorted; put together from parts, for what Cases share is most of it.
        """
        parts = {
            "format": str(FORMAT), "name": _text(self.name), "memory": _text(self.memory.digest),
            "start": flat_text(self.start), "profile": _text(self.profile.digest), "shape": _shape_text(self.shape),
            "actions": _actions_text(self.actions), "seed": str(self.seed), "bits": str(self.bits),
            "requires": _requires_text(self.requires),
            **{name: _text(value) for name, value in self._others_json(attrgetter("digest")).items()},
        }  # fmt: skip
        body = ",".join([f'"{name}":{parts[name]}' for name in sorted(parts)])
        return _sha256(f"{{{body}}}".encode()).hexdigest()[:12]

    def _others_json(self, profile_form: Callable[[CpuProfile], object]) -> dict[str, Any]:
        """Nothing for a Case of one vCPU, so that its id is what it was before there were more."""
        if not self.others:
            return {}
        return {"others": [[o.start.flat(), profile_form(o.profile or self.profile)] for o in self.others]}

    def read_data(self, ordinal: int, size: int) -> bytes:
        """What the devices of this Case answer to the ``ordinal``-th read (PIO item or MMIO), ``size`` bytes."""
        return device_data(self.seed, ordinal, size)

    def to_json(self) -> dict[str, Any]:
        """The whole Case as a JSON object (numbers decimal, bytes hex)."""
        return {
            "kvm-harness-case": FORMAT, "id": self.id, "name": self.name, "origin": self.origin, "bits": self.bits,
            "seed": self.seed, "requires": sorted(self.requires), "shape": shape_json(self.shape),
            "actions": [_action_json(a) for a in self.actions], "start": self.start.flat(),
            "memory": [[b.gpa, b.data.hex()] for b in self.memory.blobs],
            "cpuid": self.profile.rows, **self._others_json(lambda profile: profile.rows),
        }  # fmt: skip

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> Case:
        """The inverse of :meth:`to_json`. CaseError when the object is no Case of this format or was altered."""
        if not isinstance(body, Mapping) or body.get("kvm-harness-case") != FORMAT:
            raise CaseError(f"not a kvm-harness case file of format {FORMAT}")
        try:
            shape = body["shape"]
            case = cls(
                name=body["name"], origin=body["origin"], bits=body["bits"], seed=body["seed"],
                requires=frozenset(body["requires"]),
                shape=VmShape(
                    tuple(Slot(*s) for s in shape["slots"]), shape["irqchip"],
                    tuple((n, tuple(args)) for n, args in shape["caps"]), bool(shape.get("smm", False)),
                ),
                actions=tuple(_action_from_json(a) for a in body["actions"]),
                start=CpuState.from_flat(body["start"]),
                memory=Memory(tuple(Blob(gpa, bytes.fromhex(data)) for gpa, data in body["memory"])),
                profile=CpuProfile.from_rows(body["cpuid"]),
                others=tuple(
                    Other(CpuState.from_flat(start), CpuProfile.from_rows(rows))
                    for start, rows in body.get("others", ())
                ),
            )  # fmt: skip
        except KeyError as error:
            raise CaseError(f"damaged case file: there is no {error}") from error
        except (TypeError, ValueError) as error:
            raise CaseError(f"damaged case file: {error}") from error
        if "id" in body and body["id"] != case.id:
            raise CaseError(f"case file says id {body['id']} but its content hashes to {case.id}: it was edited")
        return case


def load_case(path: Path) -> Case:
    """Read a case file. CaseError says what is wrong with it."""
    try:
        body = json.loads(path.read_text())
    except OSError as error:
        raise CaseError(f"{path}: {error.strerror}: give a file from the cases/ of a run's folder") from error
    except ValueError as error:
        raise CaseError(f"{path}: no case file (not JSON): give one from the cases/ of a run's folder") from error
    try:
        return Case.from_json(body)
    except CaseError as error:
        raise CaseError(f"{path}: {error}") from error


def _text(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


@lru_cache(maxsize=256)
def _shape_text(shape: VmShape) -> str:
    return _text(shape_json(shape))


@lru_cache(maxsize=256)
def _actions_text(actions: tuple[Action, ...]) -> str:
    return _text([_action_json(a) for a in actions])


@lru_cache(maxsize=1024)
def _requires_text(requires: frozenset[str]) -> str:
    return _text(sorted(requires))


def shape_json(shape: VmShape) -> dict[str, Any]:
    """A VmShape as JSON."""
    return {
        "slots": [[s.gpa, s.size] for s in shape.slots],
        "irqchip": shape.irqchip,
        "caps": [[n, list(args)] for n, args in shape.caps],
        **({"smm": True} if shape.smm else {}),
    }


def device_data(seed: int, ordinal: int, size: int) -> bytes:
    """Bytes that a device answers with: splitmix64 of (seed, ordinal), so every read of a Case sees another value."""
    mask = (1 << 64) - 1
    out = b""
    block = 0
    while len(out) < size:
        z = (seed + 0x9E3779B97F4A7C15 * (ordinal * 8 + block + 1)) & mask
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ z >> 27) * 0x94D049BB133111EB & mask
        out += (z ^ z >> 31).to_bytes(8, "little")
        block += 1
    return out[:size]


# --- what a machine shows -------------------------------------------------------------------------------------------

Pages = Mapping[int, bytes]
"""Guest-physical page address -> its 4096 bytes, for pages that differ from the Case's initial RAM."""


@dataclass(slots=True)  # not frozen: one is made at every exit, and a frozen one costs three times as much
class Observation:
    """A machine at an exit: the exit and its whole visible state. Also the Expectation: then with undefined bits.

    ``sections`` are the state's bytes as ``harness.state.SECTIONS`` lays them out; empty where the machine cannot show
    a state at this exit (an operation of several exits in flight, or an exit that is not ``comparable``).
    ``ignore``: flat register name -> bits the architecture leaves undefined. ``accept``: flat name -> further values
    that are as right as the one in ``sections``. ``pages``: RAM that differs from the Case's initial contents;
    ``pages_ignore``: guest-physical byte address -> undefined bits of that byte. ``retired``: instructions so far.
    """

    exit: Exit
    sections: Mapping[str, bytes]
    pages: Pages = field(default_factory=dict)
    ignore: Mapping[str, int] = field(default_factory=dict)
    accept: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    pages_ignore: Mapping[int, int] = field(default_factory=dict)
    retired: int = 0
