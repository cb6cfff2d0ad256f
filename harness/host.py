"""What this machine's KVM can really do, found by trying it. For foreign hosts only: a lab has checked-in profiles.

A probe asks "can this host run it at all?": whether the guest reaches its HLT, or KVM says it lacks the instruction.
Never whether a value is right: a wrong value is a defect, not a limit.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Protocol

from harness import kvm_ioctl as k
from harness.case import Action, Blob, Case, Memory, Observation, Run, Step, Window
from harness.cpuid import FEATURES, CpuidEntry, CpuProfile, with_features
from harness.exits import Debug, Exit, Halt, InternalError, Io, IrqWindow
from harness.kvm_machine import KvmMachine
from harness.lockstep import Difference
from harness.modes import CODE_BASE, HIGH, MODES, STUBS, setup
from harness.state import stack_top, unpack_sections
from harness.vm import Kvm

PROBE_LIMIT: Final = 0.3
"""Seconds a probe guest may take; each is a handful of instructions."""

INSTRUCTIONS: Final = {
    "popcnt": "f30fb8c0", "crc32": "f20f38f0c0", "tzcnt": "f30fbcc0", "lzcnt": "f30fbdc0", "adcx": "660f38f6c0",
    "movbe": "0f38f006", "cmpxchg8b": "0fc70e", "daa": "27", "das": "2f", "aaa": "37", "aas": "3f", "bound": "6206",
    "enter n,0": "c8100000", "enter n,1": "c8100001", "leave": "c9", "int3": "cc", "int n": "cd20", "into": "ce",
    "iret": "cf", "icebp": "f1", "cpuid": "0fa2", "rdtsc": "0f31", "xgetbv": "0f01d0", "xsave": "0fae26",
    "fxsave": "0fae06", "fninit": "dbe3", "fld1": "d9e8", "fnstsw ax": "dfe0", "movups": "0f1006", "addps": "0f58c0",
    "movdqu": "f30f6f06", "movnti": "0fc306", "rdrand": "0fc7f0", "bswap": "0fc8", "xadd": "0fc1c0", "shld": "0fa4c003",
}  # fmt: skip
"""What ``probe`` asks a KVM's emulator for: one encoding each (popcnt eax,eax ...; memory operands are [si], [rsi])."""

PARAMETERS: Final = ("npt", "nested", "vgif", "avic", "ept", "unrestricted_guest", "force_emulation_prefix", "tdp_mmu")
_UD, _GP = 6, 13
VECTORS: Final = {1: "#DB", 6: "#UD", 7: "#NM", 8: "#DF", 12: "#SS", 13: "#GP", 14: "#PF"}
"""Exceptions by name."""
_MAP_GPA_RANGE: Final = 12  # KVM_HC_MAP_GPA_RANGE
_FLAGS: Final = 0x8D7  # every arithmetic flag set: INTO is taken
_FRAME_CS: Final = {"real": 2, "prot16": 2, "prot32": 4, "prot32-user": 4, "vm86": 4}  # offset of CS in the frame
_PRIVILEGED: Final = {"long-user": "long", "compat-user": "compat", "prot32-user": "prot32"}
# What CPUID says of the processor it is asked on (APIC ids, node) or of control registers, by function: bits to keep.
_DYNAMIC: Final[Mapping[int, Mapping[str, int]]] = {
    1: {"ebx": 0x00FFFFFF, "ecx": ~(1 << 27)}, 7: {"ecx": ~(1 << 4)}, 0xB: {"edx": 0}, 0x1F: {"edx": 0},
    0x8000001E: {"eax": 0, "ebx": ~0xFF, "ecx": ~0xFF},
}  # fmt: skip


@dataclass
class Host:
    """A KVM host and its probed limits. Probes run at first need and are remembered.

    ``limit`` is the time in seconds that a probe guest may take.
    """

    kvm: Kvm
    limit: float = PROBE_LIMIT
    _machine: KvmMachine | None = None
    _lacks: dict[tuple[str, bytes], bool] = field(default_factory=dict)

    @cached_property
    def kernel(self) -> str:
        """Kernel release (uname -r)."""
        return platform.release()

    @cached_property
    def module(self) -> str:
        """The vendor module behind /dev/kvm: kvm_amd, kvm_intel, another kvm_*, or ``built-in``."""
        found = sorted(p.name for p in Path("/sys/module").glob("kvm_*"))
        return found[0] if found else "built-in"

    @cached_property
    def parameters(self) -> dict[str, str]:
        """Parameters of the KVM modules that open other code paths."""
        out = {}
        for module in ("kvm", self.module):
            for name in PARAMETERS:
                try:
                    out[f"{module}.{name}"] = Path(f"/sys/module/{module}/parameters/{name}").read_text().strip()
                except OSError:
                    continue
        return out

    @cached_property
    def profile(self) -> CpuProfile:
        """What guests of the suite see: the supported CPUID without what depends on the CPU it is asked on."""
        rows = []
        for e in self.kvm.supported_cpuid().cpuid:
            masks = {} if e.function == 7 and e.index else _DYNAMIC.get(e.function, {})
            regs = {r: getattr(e, r) & masks.get(r, 0xFFFFFFFF) & 0xFFFFFFFF for r in ("eax", "ebx", "ecx", "edx")}
            rows.append(CpuidEntry(e.function, e.index, e.flags, **regs))
        return CpuProfile(tuple(rows))

    @property
    def features(self) -> frozenset[str]:
        """Named CPU features of the guest CPUID."""
        return self.profile.features

    def describe(self) -> str:
        """One line for headers and reports."""
        extra = " ".join(f"{name}={value}" for name, value in self.parameters.items())
        vendor = {"AuthenticAMD": "AMD", "GenuineIntel": "Intel"}.get(self.profile.vendor, self.profile.vendor)
        return f"Linux {self.kernel}, {self.module}" + (f" ({extra})" if extra else "") + f", {vendor} guest CPUID"

    # --- probes ---

    def _run(
        self, mode: str, code: bytes, *, step: bool = False, profile: CpuProfile | None = None, rflags: int = 0,
        action: Action | None = None,
    ) -> list[Observation]:  # fmt: skip
        if self._machine is None:
            self._machine = KvmMachine(self.kvm, limit=self.limit)
        start = setup(mode, entry=CODE_BASE, profile=self.profile)
        state = replace(start.state, rflags=start.state.rflags | _FLAGS | rflags)
        case = Case(
            f"probe/{code.hex()}@{mode}", Memory((*start.blobs, Blob(CODE_BASE, code))), state,
            profile or self.profile, bits=start.bits, actions=(action or (Step(1) if step else Run(4)),),
        )  # fmt: skip
        self._machine.load(case)
        return list(self._machine.apply(case.actions[0]))

    def _probe(self, mode: str, code: bytes, *, step: bool = False, rflags: int = 0) -> Exit | str:
        try:
            return self._run(mode, code, step=step, rflags=rflags)[0].exit
        except (k.KvmError, LookupError) as error:
            return str(error)

    @cached_property
    def modes(self) -> dict[str, str]:
        """Mode -> "" when a guest that moves a value and halts runs in it, else what happened instead."""
        out = {}
        for mode in MODES:
            bad = self.feature_missing(mode)
            if not bad:
                seen = self._probe(mode, b"\x90\xb0\x5a\xf4")  # nop; mov al, 0x5a; hlt (CPL3: #GP, whose stub halts)
                bad = "" if isinstance(seen, Halt) else f"a guest of three instructions ends in {seen}"
            out[mode] = bad
        return out

    def feature_missing(self, mode: str) -> str:
        """Why the guest CPUID rules ``mode`` out, or an empty string."""
        wide = "lm" if "long" in mode or "compat" in mode else ""
        need = {"long5": "la57", "pse": "pse", "pae": "pae"}.get(mode, wide)
        return f"no {need} in the guest CPUID" if need and need not in self.profile.features else ""

    @cached_property
    def single_step(self) -> dict[str, bool]:
        """Mode -> KVM_GUESTDBG_SINGLESTEP stops after one instruction."""
        usable = [mode for mode, bad in self.modes.items() if not bad]
        return {mode: isinstance(self._probe(mode, b"\x90\xf4", step=True), Debug) for mode in usable}

    @cached_property
    def traits(self) -> dict[str, str]:
        """Named behaviours a Case may require -> "" when present, else what the probe saw."""
        out = {}
        if not self.modes.get("long-user", "absent"):
            seen = self._probe("long-user", b"\xe6\x10\xf4")  # out 0x10, al at CPL3 with IOPL 0: must be #GP
            out["iopl-at-long-cpl3"] = "OUT at CPL3 with IOPL 0 is executed" if isinstance(seen, Io) else ""
            seen = self._probe("long-user", b"\xe6\x10\xf4", rflags=0x3000)
            out["iopl3-at-long-cpl3"] = "" if isinstance(seen, Io) else "OUT at CPL3 with IOPL 3 is not executed"
            seen_reg = self._rax("long-user", b"\x8c\xc8\xf4")  # mov eax, cs
            want = setup("long-user", entry=CODE_BASE, profile=self.profile).state.cs.selector
            out["selectors-at-long-cpl3"] = "" if seen_reg & 0xFFFF == want else "MOV from CS shows the host's selector"
            cpuid = self._rax("long-user", b"\xb8\x01\x00\x00\x00\x31\xc9\x0f\xa2\xf4")
            leaf = self.profile.leaf(1)
            same = leaf is not None and cpuid & 0xFFFFFFFF == leaf.eax
            flags = self._rax("long-user", b"\x9c\x58\xf4")  # pushf; pop rax
            out["rflags-at-long-cpl3"] = "PUSHF at CPL3 shows the host's RFLAGS.IF" if flags >> 9 & 1 else ""
            cr1 = self._probe_vector("long-user", b"\x0f\x20\xc8")  # mov rax, cr1: #UD before #GP (bare CPU)
            out["cr1-at-long-cpl3"] = "" if cr1 == _UD else f"MOV from CR1 at CPL3 raises vector {cr1}, not #UD"
            same = same and self._leaf_shown("long-user", 0x80000008, "eax") and self._leaf_shown("long-user", 1, "ecx")
            out["cpuid-at-long-cpl3"] = "" if same else "CPUID shows the host's leaves"
            past = self._saved_rip("long-user", b"\xf1") == CODE_BASE + 1  # icebp: #DB is a trap
            out["icebp-at-long-cpl3"] = "" if past else "the #DB of ICEBP at CPL3 saves the RIP of the instruction"
        if not self.modes.get("compat", "absent"):
            # pushf; push cs; push CODE_BASE+8; iret; hlt
            iret = b"\x9c\x0e\x68" + (CODE_BASE + 8).to_bytes(4, "little") + b"\xcf\xf4"
            vector = self._probe_vector("compat", iret)
            out["iret-in-compat"] = "" if vector is None else f"IRET in compatibility mode raises vector {vector}"
        if not self.modes.get("prot32", "absent"):
            for number, register in ((1, "ecx"), (7, "ebx")):
                same = self._leaf_shown("prot32", number, register)
                odd = f"CPUID leaf {number} shows bits that KVM_SET_CPUID2 cleared"
                out[f"cpuid-leaf-{number}"] = "" if same else odd
            # mov ecx, 0x277; xor edx, edx; mov eax, 0x02020202; wrmsr; hlt
            pat = self._probe_vector("prot32", bytes.fromhex("b97702000031d2b8020202020f30f4"))
            out["pat-reserved-types"] = "" if pat == _GP else "WRMSR accepts reserved memory types in PAT"
            out["hypercall"] = self._hypercall_missing()
            out["irq-window"] = self._window_missing()
            has_smm = self.kvm.capability(k.KVM_CAP_X86_SMM) and self.kvm.capability(k.KVM_CAP_MULTI_ADDRESS_SPACE) > 1
            out["smm"] = "" if has_smm else "no system management mode (KVM_CAP_X86_SMM)"
        return out

    def _window_missing(self) -> str:
        """Why KVM does not tell userspace when interrupts are possible, or an empty string.

        Asked often: a KVM that looks at exits only opens the window when an interrupt of the host's happens to come.
        """
        for _ in range(_WINDOWS):
            try:
                seen = self._run("prot32", b"\xfb\x90\x90\xf4", action=Window())  # sti; nop; nop; hlt
            except (k.KvmError, LookupError) as error:
                return str(error)
            if not isinstance(seen[-1].exit, IrqWindow):
                return f"no interrupt window opens: {seen[-1].exit}"
        return ""

    def _hypercall_missing(self) -> str:
        """Why hypercalls cannot be tried here, or an empty string."""
        if not self.kvm.capability(k.KVM_CAP_EXIT_HYPERCALL) >> _MAP_GPA_RANGE & 1:
            return "no hypercall leaves for userspace (KVM_CAP_EXIT_HYPERCALL)"
        name, code = ("VMMCALL", b"\x0f\x01\xd9") if self.profile.amd else ("VMCALL", b"\x0f\x01\xc1")
        seen = self._probe("prot32", b"\xb8\x63\x00\x00\x00" + code + b"\xf4")  # mov eax, 99: there is none
        return "" if isinstance(seen, Halt) else f"{name} ends in {seen}"

    def _leaf_shown(self, mode: str, leaf: int, register: str) -> bool:
        """CPUID in the guest shows a register of a leaf whose named features were taken away with KVM_SET_CPUID2."""
        gone = [name for name, where in FEATURES.items() if where[:3] == (leaf, 0, register)]
        bare = with_features(self.profile, remove=gone)
        entry = bare.leaf(leaf)
        move = {"eax": b"", "ebx": b"\x89\xd8", "ecx": b"\x89\xc8"}[register]  # mov eax, REGISTER
        code = b"\xb8" + leaf.to_bytes(4, "little") + b"\x31\xc9\x0f\xa2" + move + b"\xf4"
        # OSXSAVE and OSPKE follow CR4, whatever the leaves say.
        fixed = _DYNAMIC.get(leaf, {}).get(register, 0xFFFFFFFF) & 0xFFFFFFFF
        return entry is not None and not (self._rax(mode, code, bare) ^ getattr(entry, register)) & fixed

    def _saved_rip(self, mode: str, code: bytes) -> int:
        """RIP in the 64-bit frame of the exception that this instruction ends with."""
        try:
            state = unpack_sections(self._run(mode, code)[-1].sections)
        except (k.KvmError, LookupError):
            return -1
        assert self._machine is not None
        return int.from_bytes(self._machine.read(stack_top(state), 8), "little")

    def _probe_vector(self, mode: str, code: bytes) -> int | None:
        """The exception that a guest of this instruction ends with."""
        try:
            return delivered_vector(self._run(mode, code)[-1])
        except (k.KvmError, LookupError):
            return None

    def _rax(self, mode: str, code: bytes, profile: CpuProfile | None = None) -> int:
        """RAX where the guest stops, -1 when it does not."""
        try:
            seen = self._run(mode, code, profile=profile)[-1]
        except (k.KvmError, LookupError):
            return -1
        return unpack_sections(seen.sections).gpr[0] if seen.sections else -1

    @cached_property
    def delivery(self) -> dict[str, str]:
        """Mode -> "" when a #UD leaves a frame on the handler's stack and clears what it must, else what is odd."""
        out = {}
        for mode, bad in self.modes.items():
            if bad:
                continue
            try:
                seen = self._run(mode, b"\x0f\x0b")[-1]
            except (k.KvmError, LookupError) as error:
                out[mode] = str(error)
                continue
            if not isinstance(seen.exit, Halt):
                out[mode] = f"an exception ends in {seen.exit}"
                continue
            assert self._machine is not None
            state = unpack_sections(seen.sections)
            top = stack_top(state)
            words = [int.from_bytes(self._machine.read(top + n, 2), "little") for n in (0, _FRAME_CS.get(mode, 4))]
            cs = setup(mode, entry=CODE_BASE, profile=self.profile).state.cs.selector
            out[mode] = ""
            if state.cs.base + state.rip != STUBS + 16 * 6 + 1:
                out[mode] = f"an exception goes to RIP {state.rip:#x}"
            elif words[0] != CODE_BASE:
                out[mode] = "the frame of an exception is not at SS:SP"
            elif mode in _FRAME_CS and words[1] != cs:
                out[mode] = "the frame of an exception has the wrong size"
            elif mode == "vm86" and state.es.selector:
                out[mode] = "an exception in virtual-8086 mode does not save and clear the data segments"
        return out

    def lacks(self, mode: str, code: bytes) -> bool:
        """True when a guest of nothing but this instruction ends in KVM's own word that it cannot emulate it."""
        mode = _PRIVILEGED.get(mode, mode)  # for CPL3 KVM has #UD in place of its word, so it is asked at CPL0
        key = (mode, code)
        if key not in self._lacks:
            seen = self._probe(mode, code + b"\xf4")
            lacks = isinstance(seen, InternalError) and seen.suberror == k.KVM_INTERNAL_ERROR_EMULATION
            if lacks:  # at this very instruction, not at one that the guest went on to
                assert self._machine is not None
                lacks = unpack_sections({"regs": self._machine.vcpu.get("regs")}).rip == CODE_BASE
            self._lacks[key] = lacks
        return self._lacks[key]

    def lacking(self) -> dict[str, list[str]]:
        """Instruction -> the modes in which this KVM says that it cannot emulate it; of :data:`INSTRUCTIONS`."""
        out: dict[str, list[str]] = {}
        for name, code in INSTRUCTIONS.items():
            for mode in ("real", "prot32", "long"):
                if not self.modes[mode] and self.lacks(mode, bytes.fromhex(code)):
                    out.setdefault(name, []).append(mode)
        return out

    # --- judging a Case ---

    @property
    def outcomes(self) -> Mapping[str, str]:
        """Nothing is recorded of a foreign host."""
        return {}

    def unsupported(self, case: Case) -> str:
        """Why this host cannot run ``case`` at all, or an empty string."""
        return missing(case, self)

    def excuse(self, case: Case, difference: Difference, read: Callable[[int, int], bytes]) -> str:
        """Why a difference is a limit of this host, shown by a probe, or an empty string: then it is a defect.

        ``read(gpa, size)`` gives guest RAM where the machine stands.
        """
        got = difference.got.exit if difference.got is not None else None
        mode = next((r.removeprefix("mode:") for r in case.requires if r.startswith("mode:")), "real")
        code = b""
        if isinstance(got, InternalError) and got.suberror == k.KVM_INTERNAL_ERROR_EMULATION:
            code = got.code
        elif delivered_vector(difference.got) == _UD and delivered_vector(difference.expected) != _UD:
            code = faulting_code(case, difference.got, read)
        if code and self.lacks(mode, code):
            return f"this KVM's emulator lacks {instruction_name(code)} in {mode}"
        vector = delivered_vector(difference.expected)  # the same exception on both sides: its frame is what is odd
        if vector is not None and delivered_vector(difference.got) == vector and (odd := self.delivery.get(mode)):
            return f"{mode}: {odd}" if all(d.name.startswith(_FRAME) for d in difference.registers) else ""
        return ""

    def to_json(self) -> Mapping[str, Any]:
        """Everything ``kvm-harness probe`` shows."""
        return {
            "kernel": self.kernel,
            "module": self.module,
            "parameters": self.parameters,
            "device": str(self.kvm.device),
            "capabilities": {
                name: value
                for number, name in sorted(k.CAP_NAMES.items())
                if (value := self.kvm.capability(number))
            },
            "vendor": self.profile.vendor,
            "features": sorted(self.profile.features),
            "maxphyaddr": self.profile.maxphyaddr,
            "modes": self.modes,
            "single_step": self.single_step,
            "traits": self.traits,
            "exception_delivery": self.delivery,
            "emulator_lacks": self.lacking(),
            "apx": "apx" in self.profile.features,
            "root": os.geteuid() == 0,
        }

    def close(self) -> None:
        """Close the probes' VMs."""
        if self._machine is not None:
            self._machine.close()
            self._machine = None


class Abilities(Protocol):
    """What decides whether a Case can run at all: probed (Host), or checked in (a lab cell's profile)."""

    @property
    def modes(self) -> Mapping[str, str]:
        """Mode -> "" when it runs, else what happened instead."""

    @property
    def delivery(self) -> Mapping[str, str]:
        """Mode -> "" when exceptions are delivered as they must, else what is odd."""

    @property
    def traits(self) -> Mapping[str, str]:
        """Trait -> "" when present, else what was seen."""

    @property
    def features(self) -> frozenset[str]:
        """CPU features of the guest CPUID."""


def missing(case: Case, able: Abilities) -> str:
    """Why ``case`` cannot run there at all, or an empty string."""
    for need in sorted(case.requires):
        kind, _, what = need.partition(":")
        if kind == "mode":
            if bad := able.modes.get(what, "no such mode"):
                return f"mode {what}: {bad}"
            if what == "vm86" and (odd := able.delivery.get(what)):  # every guest there ends in an exception
                return f"{what}: {odd}"
        elif kind == "trait":
            if bad := able.traits.get(what, ""):
                return f"{what}: {bad}"
        elif need not in able.features:
            return f"no {need} in the guest CPUID"
    return ""


def delivered_vector(seen: Observation | None) -> int | None:
    """The vector whose stub a Case of harness.paths has ended in, None when in none."""
    if seen is None or not seen.sections:
        return None
    state = unpack_sections(seen.sections)
    at = state.cs.base + state.rip - 1 - STUBS
    return at >> 4 if 0 <= at < 0x1000 and not at & 15 else None


def faulting_code(case: Case, seen: Observation | None, read: Callable[[int, int], bytes]) -> bytes:
    """The bytes at the RIP in the exception frame that the guest ended with."""
    assert seen is not None
    state = unpack_sections(seen.sections)
    size = 8 if state.efer >> 10 & 1 else 4 if case.bits == 32 else 2
    frame = read(stack_top(state), size)
    return read(int.from_bytes(frame, "little") + case.start.cs.base & ~HIGH, 15)


_WINDOWS: Final = 32
_FRAME: Final = ("rsp", "ss.", "ds.", "es.", "fs.", "gs.")
"""What an exception's delivery of the wrong form gets wrong: the stack, and the segments that leaving vm86 clears."""

_PREFIXES: Final = frozenset(b"\x26\x2e\x36\x3e\x64\x65\x66\x67\xf0\xf2\xf3")


_GROUP_OPCODES: Final = "80 81 83 c0 c1 d0 d1 d2 d3 f6 f7 fe ff 0f00 0f01 0fae 0fba 0fc7"
_GROUPS: Final = frozenset(map(bytes.fromhex, _GROUP_OPCODES.split()))


def instruction_name(code: bytes, bits: int = 0) -> str:
    """The opcode of an instruction, for grouping: legacy prefixes that select an instruction, escape, opcode.

    66 is one of them after 0F 38 and 0F 3A alone (SDM vol. 2D A.3, tables A-4 and A-5). REX is left out before 0F, and
    in 64-bit code everywhere; with ``bits`` a group's opcode has its number (``/4``).
    """
    at = 0
    while at < len(code) - 1 and code[at] in _PREFIXES:
        at += 1
    prefixes = set(code[:at])
    while at < len(code) - 1 and 0x40 <= code[at] <= 0x4F and (bits == 64 or code[at + 1] == 0x0F):
        at += 1
    size = 1 if code[at] != 0x0F else 3 if code[at + 1 : at + 2] in (b"\x38", b"\x3a") else 2
    selecting = prefixes & ({0x66, 0xF2, 0xF3} if size == 3 else {0xF2, 0xF3})
    name = "".join(f"{b:02x} " for b in sorted(selecting)) + code[at : at + size].hex(" ")
    if bits and code[at : at + size] in _GROUPS and at + size < len(code):
        name += f" /{code[at + size] >> 3 & 7}"
    return name
