"""The reasons for which a machine stops: one small dataclass each.

They carry what the architecture determines (port, size, address, data), not what a particular KVM adds.  Machines
return them; ``harness/kvm_exit.py`` makes them from ``struct kvm_run``, the reference model from its own semantics.
Source: Documentation/virt/kvm/api.rst, section 5, "The kvm_run structure".
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Final

_DECIMAL: Final = ("size", "count", "seconds", "suberror")
_LAST: Final = ("data", "code", "args", "name")


@dataclass(frozen=True, slots=True)
class Exit:
    """Base of all exits. ``terminal``: nothing sensible can run after it; ``comparable``: registers mean something."""

    kind: ClassVar[str] = "exit"
    terminal: ClassVar[bool] = False
    comparable: ClassVar[bool] = True

    def to_json(self) -> dict[str, Any]:
        """A JSON object; bytes as hex."""
        body = {k: v.hex() if isinstance(v, bytes) else v for k, v in asdict(self).items()}
        return {"kind": self.kind, **body}

    def __str__(self) -> str:
        """One line, numbers in hex: ``io write port 0xe9 size 1 count 1 data 41``.

        The C reproducers print and compare the same words: a change here is one in report/c_parts.py.
        """
        body = self.to_json()
        words = [str(body.pop("kind"))]
        if "write" in body:
            words.append("write" if body.pop("write") else "read")
        for name in (n for n in body if n not in _LAST):
            words += [name, str(body[name]) if name in _DECIMAL else hex(body[name])]
        for name in (n for n in _LAST if body.get(n)):
            words += [name, " ".join(map(hex, body[name])) if name == "args" else body[name]]
        return " ".join(words)


@dataclass(frozen=True, slots=True)
class Halt(Exit):
    """HLT executed (KVM_EXIT_HLT; without an in-kernel irqchip). RIP is past it."""

    kind: ClassVar[str] = "halt"
    terminal: ClassVar[bool] = True


@dataclass(frozen=True, slots=True)
class Io(Exit):
    """Port I/O (KVM_EXIT_IO): ``count`` items of ``size`` bytes; ``data`` is what the guest wrote (empty for reads)."""

    port: int
    size: int
    write: bool
    data: bytes = b""
    count: int = 1
    kind: ClassVar[str] = "io"


@dataclass(frozen=True, slots=True)
class Mmio(Exit):
    """An access to guest-physical memory that no slot backs (KVM_EXIT_MMIO)."""

    address: int
    size: int
    write: bool
    data: bytes = b""
    kind: ClassVar[str] = "mmio"


@dataclass(frozen=True, slots=True)
class Debug(Exit):
    """KVM_EXIT_DEBUG under KVM_SET_GUEST_DEBUG: ``exception`` is 1 or 3, ``pc`` is linear."""

    exception: int
    pc: int
    dr6: int
    kind: ClassVar[str] = "debug"


@dataclass(frozen=True, slots=True)
class Shutdown(Exit):
    """Triple fault (KVM_EXIT_SHUTDOWN). What the registers hold afterwards differs between vendors: not compared."""

    kind: ClassVar[str] = "shutdown"
    terminal: ClassVar[bool] = True
    comparable: ClassVar[bool] = False


@dataclass(frozen=True, slots=True)
class Msr(Exit):
    """KVM_EXIT_X86_RDMSR / WRMSR (KVM_CAP_X86_USER_SPACE_MSR)."""

    index: int
    write: bool
    value: int = 0
    kind: ClassVar[str] = "msr"


@dataclass(frozen=True, slots=True)
class Hypercall(Exit):
    """KVM_EXIT_HYPERCALL (KVM_CAP_EXIT_HYPERCALL)."""

    number: int
    args: tuple[int, ...] = ()
    kind: ClassVar[str] = "hypercall"


@dataclass(frozen=True, slots=True)
class IrqWindow(Exit):
    """KVM_EXIT_IRQ_WINDOW_OPEN after ``request_interrupt_window``."""

    kind: ClassVar[str] = "irq-window"


@dataclass(frozen=True, slots=True)
class InternalError(Exit):
    """KVM_EXIT_INTERNAL_ERROR. Suberror 1: this KVM's emulator lacks the instruction in ``code``."""

    suberror: int
    code: bytes = b""
    kind: ClassVar[str] = "internal-error"
    terminal: ClassVar[bool] = True
    comparable: ClassVar[bool] = False


@dataclass(frozen=True, slots=True)
class FailEntry(Exit):
    """KVM_EXIT_FAIL_ENTRY: the hardware refused the guest state; ``reason`` is the processor's."""

    reason: int
    kind: ClassVar[str] = "fail-entry"
    terminal: ClassVar[bool] = True
    comparable: ClassVar[bool] = False


@dataclass(frozen=True, slots=True)
class Timeout(Exit):
    """Not a KVM exit: the time limit of the run ended it."""

    seconds: float
    kind: ClassVar[str] = "timeout"
    terminal: ClassVar[bool] = True
    comparable: ClassVar[bool] = False


@dataclass(frozen=True, slots=True)
class Interrupted(Exit):
    """Not a KVM exit: a signal ended KVM_RUN (EINTR) while the guest ran."""

    kind: ClassVar[str] = "interrupted"


@dataclass(frozen=True, slots=True)
class Answer(Exit):
    """Not a KVM exit: whether KVM took what userspace tried to write, ``what`` being registers and values."""

    what: str
    accepted: bool
    kind: ClassVar[str] = "answer"


@dataclass(frozen=True, slots=True)
class Unknown(Exit):
    """Any other exit reason, by its KVM number and name."""

    reason: int
    name: str = ""
    kind: ClassVar[str] = "unknown"
    terminal: ClassVar[bool] = True
    comparable: ClassVar[bool] = False


KINDS: dict[str, type[Exit]] = {
    c.kind: c
    for c in (
        Halt, Io, Mmio, Debug, Shutdown, Msr, Hypercall, IrqWindow, InternalError, FailEntry, Timeout, Interrupted,
        Answer, Unknown,
    )
}  # fmt: skip


def exit_from_json(body: dict[str, Any]) -> Exit:
    """The inverse of :meth:`Exit.to_json`."""
    body = dict(body)
    cls = KINDS[body.pop("kind")]
    for name in ("data", "code"):
        if name in body:
            body[name] = bytes.fromhex(body[name])
    if "args" in body:
        body["args"] = tuple(body["args"])
    return cls(**body)
