"""A Case as one C file that shows its failure with nothing but a compiler and /dev/kvm.

Exit status of the compiled program: 1 the defect shows, 0 the values are the expected ones, 2 it could not be tried.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Final

from harness.case import Action, Case, Complete, Inject, Observation, Run, SaveRestore, SetState, Show, Step, Window
from harness.exits import Timeout, Unknown
from harness.lockstep import Difference, exit_text
from harness.report import c_parts
from harness.report.c_data import comment, memory_c
from harness.report.listing import listing
from harness.report.views import replay_words
from harness.state import GPR_INDEX, SEGMENT_NAMES, CpuState, Events, Segment, msr_index, pae_paging

_MAX_RUNS: Final = 32
_APX, _PKRU = 19, 9
_CONTROL: Final = ("cr0", "cr2", "cr3", "cr4", "cr8", "efer", "apic_base")
_EVENT: Final = {
    "exception_injected": "exception.injected", "exception_nr": "exception.nr",
    "exception_has_error": "exception.has_error_code", "exception_error": "exception.error_code",
    "exception_pending": "exception.pending", "interrupt_injected": "interrupt.injected",
    "interrupt_nr": "interrupt.nr", "interrupt_soft": "interrupt.soft", "shadow": "interrupt.shadow",
    "nmi_pending": "nmi.pending", "nmi_masked": "nmi.masked", "smm": "smi.smm",
}  # fmt: skip
# group -> (structure, get, set)
_GROUPS: Final = {
    "regs": ("kvm_regs", "KVM_GET_REGS", "KVM_SET_REGS"),
    "sregs": ("kvm_sregs", "KVM_GET_SREGS", "KVM_SET_SREGS"),
    "sregs2": ("kvm_sregs2", "KVM_GET_SREGS2", "KVM_SET_SREGS2"),
    "debugregs": ("kvm_debugregs", "KVM_GET_DEBUGREGS", "KVM_SET_DEBUGREGS"),
    "events": ("kvm_vcpu_events", "KVM_GET_VCPU_EVENTS", "KVM_SET_VCPU_EVENTS"),
}


class EmitError(Exception):
    """This Case cannot be written as a C file; the text names the action or register that stands in the way."""


def emit_c(case: Case, difference: Difference | None, host: str, again: str | None = None) -> str:
    """The C source that reproduces ``case``, and judges it at ``difference`` (without one it only shows the exits).

    ``host`` is the line about the machine where it was seen, ``again`` the command for the same under the harness
    (``replay`` of the Case's id if left out). The file needs <linux/kvm.h> of Linux 6.1 and libc.
    Raises EmitError where an action or a register has no C form.
    """
    last = len(case.actions) if difference is None else difference.action + 1
    actions = case.actions[:last]
    body = _actions(case, actions)
    check = _check(case, difference)
    start = _set_start(case)
    parts = [
        _header(case, difference, host, again or replay_words(case.id)),
        c_parts.INCLUDES, _constants(case, difference), c_parts.TYPES,
        memory_c(case, difference), _cpuid(case), c_parts.MACHINE.replace("@SHAPE@", _shape(case)),
    ]  # fmt: skip
    parts += _helpers(start + check + body)
    parts += [start, c_parts.EXITS, c_parts.FINISH, check, c_parts.LOOP]
    kinds = {type(a) for a in actions}
    parts += [c_parts.WINDOW] if Window in kinds else []
    for kind, text in ((Complete, c_parts.COMPLETE), (Step, c_parts.STEP), (SaveRestore, _save_restore(case))):
        parts += [text] if kind in kinds else []
    parts += [c_parts.INJECT] if "inject_exception(" in body else []
    parts += [_set_state(n, a, case) for n, a in enumerate(actions) if isinstance(a, SetState)]
    parts.append(c_parts.MAIN.replace("@ACTIONS@", body).replace("@ENDED@", _ended(difference)))
    return "\n".join(part.strip("\n") + "\n" for part in parts if part)


def _header(case: Case, difference: Difference | None, host: str, again: str) -> str:
    lines = [f"{case.name}, a case of kvm-harness", ""]
    if difference is not None:
        lines += [*textwrap.wrap(f"At exit {difference.index}: {_summary(difference)}", 96), ""]
    code = listing(case, difference)
    lines += [*(f"    {insn}" for insn in code[:24]), *(["    ..."] if len(code) > 24 else []), ""]
    lines += textwrap.wrap(f"Seen on: {host}", 96)
    lines += ["", "Compile and run: gcc -O2 -Wall -Wextra -o repro THIS_FILE.c && ./repro",
              "Exit status: 1 the defect shows, 0 it does not, 2 it could not be tried.",
              f"The same under the harness: {again}"]  # fmt: skip
    return "/*\n" + "\n".join(f" * {comment(line)}".rstrip() for line in lines) + "\n */"


def _summary(difference: Difference) -> str:
    if difference.exits_differ:
        return f"expected {_words(difference.expected)}, got {_words(difference.got)}"
    found = [f"{d.name} expected {d.expected:#x}, got {d.got:#x}" for d in difference.registers]
    found += [str(m) for m in difference.memory[:2]]
    return "; ".join(found[:4]) + ("; ..." if len(found) > 4 else "")


def _words(seen: Observation | None) -> str:
    if seen is not None and isinstance(seen.exit, Unknown):
        return str(replace(seen.exit, name=""))
    return exit_text(seen)


def _constants(case: Case, difference: Difference | None) -> str:
    hang = difference is not None and difference.got is not None and isinstance(difference.got.exit, Timeout)
    return (
        f"#define CHECK_EXIT {difference.index if difference else -1}\n"
        f"#define HANG_IS_DEFECT {int(hang)}\n"
        f"#define SEED {case.seed & (1 << 64) - 1:#x}ULL\n"
    )


def _cpuid(case: Case) -> str:
    rows = [(e.function, e.index, e.flags, e.eax, e.ebx, e.ecx, e.edx) for e in case.profile.cpuid]
    out = ["/* function, index, flags, eax, ebx, ecx, edx */", f"#define NCPUID {len(rows)}",
           "static const uint32_t cpuid[][7] = {"]  # fmt: skip
    out += ["\t{ " + ", ".join(f"{v:#x}" for v in row) + " }," for row in rows or [(0,) * 7]]
    return "\n".join([*out, "};"])


def _shape(case: Case) -> str:
    caps = [(str(number), ", ".join(f"{v:#x}" for v in args) or "0") for number, args in case.shape.caps]
    if case.shape.irqchip == "split":
        caps.append(("KVM_CAP_SPLIT_IRQCHIP", "24"))
    out = [
        f"\tDO(vm_fd, KVM_ENABLE_CAP, (&(struct kvm_enable_cap){{ .cap = {number}, .args = {{ {values} }} }}));"
        for number, values in caps
    ]
    if case.shape.irqchip == "full":
        out.append("\tDO(vm_fd, KVM_CREATE_IRQCHIP, 0);")
    return "".join(line + "\n" for line in out)


def _helpers(text: str) -> Iterator[str]:
    again = "save_restore(" in text
    for name, part in (
        ("set_xcr0(", c_parts.SET_XCR0), ("get_xcr0(", c_parts.GET_XCR0), ("set_msr(", c_parts.SET_MSR),
        ("get_msr(", c_parts.GET_MSR), ("xsave", c_parts.XSAVE), ("xsave_word(", c_parts.XSAVE_WORD),
    ):  # fmt: skip
        if name in text or (again and "xcr0" in name):
            yield part


# --- start state ----------------------------------------------------------------------------------------------------


def _xsave_offset(case: Case, component: int) -> int:
    offset = case.profile.xsave_offset(component)
    if offset is None:
        raise EmitError(f"XSAVE component {component} is set but the Case's profile does not enumerate it")
    return offset


def _segment(name: str, seg: Segment) -> str:
    parts = [f".{f.name} = {getattr(seg, f.name):#x}" for f in fields(Segment)
             if getattr(seg, f.name) or f.name in ("selector", "base")]  # fmt: skip
    return f"\t\t.{'ldt' if name == 'ldtr' else name} = {{ {', '.join(parts)} }},"


def _set_start(case: Case) -> str:
    s = case.start
    if s.ssp or s.events.triple_fault:
        raise EmitError("a start state with SSP or a pending triple fault has no C form")
    kind = "sregs2" if pae_paging(s) else "sregs"
    tables = [f"\t\t.{n[:3]} = {{ .base = {t.base:#x}, .limit = {t.limit:#x} }},"
              for n, t in (("gdtr", s.gdtr), ("idtr", s.idtr))]  # fmt: skip
    out = ["static void set_start(void)", "{", f"\tstruct {_GROUPS[kind][0]} sregs = {{",
           *(_segment(n, getattr(s, n)) for n in SEGMENT_NAMES), *tables,
           "\t\t" + " ".join(f".{n} = {getattr(s, n):#x}," for n in _CONTROL)]  # fmt: skip
    if kind == "sregs2":
        out.append(f"\t\t.flags = 1, .pdptrs = {{ {', '.join(f'{v:#x}' for v in s.pdptr)} }}, /* PDPTRS_VALID */")
    gpr = [f".{n} = {s.gpr[i]:#x}," for n, i in GPR_INDEX.items() if i < 16 and s.gpr[i]]
    rows = textwrap.wrap(" ".join([*gpr, f".rip = {s.rip:#x},", f".rflags = {s.rflags:#x},"]), 90)
    out += ["\t};", "\tstruct kvm_regs regs = {", *(f"\t\t{row}" for row in rows), "\t};", ""]
    if s.xcr0 != 1:
        out.append(f"\tset_xcr0({s.xcr0:#x});")
    out.append(f"\tDO(vcpu_fd, {_GROUPS[kind][2]}, &sregs);")
    out += [f"\tset_msr({index:#x}, {value:#x});" for index, value in s.msrs]
    out += _start_rest(case)
    return "\n".join([*out, "\tDO(vcpu_fd, KVM_SET_REGS, &regs);", "}"])


def _start_rest(case: Case) -> Iterator[str]:
    s, plain = case.start, CpuState()
    if (s.dr, s.dr6, s.dr7) != (plain.dr, plain.dr6, plain.dr7):
        db = ", ".join(f"{v:#x}" for v in s.dr)
        yield "\tDO(vcpu_fd, KVM_SET_DEBUGREGS, (&(struct kvm_debugregs){"
        yield f"\t\t.db = {{ {db} }}, .dr6 = {s.dr6:#x}, .dr7 = {s.dr7:#x} }}));"
    if s.pkru:
        yield f"\txsave_part({_PKRU}, {_xsave_offset(case, _PKRU)}, &(uint32_t){{ {s.pkru:#x} }}, 4, 1);"
    if any(s.gpr[16:]):
        yield f"\txsave_part({_APX}, {_xsave_offset(case, _APX)}, (uint64_t[16]){{"
        yield from ("\t\t" + ", ".join(f"{v:#x}" for v in s.gpr[n : n + 4]) + "," for n in range(16, 32, 4))
        yield "\t}, 128, 1);"
    if s.events != Events():
        yield "\tDO(vcpu_fd, KVM_SET_VCPU_EVENTS, (&(struct kvm_vcpu_events){"
        yield "\t\t.flags = KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SHADOW | KVM_VCPUEVENT_VALID_SMM,"
        yield from (f"\t\t.{c} = {getattr(s.events, n):#x}," for n, c in _EVENT.items() if getattr(s.events, n))
        yield "\t}));"


# --- registers in C -------------------------------------------------------------------------------------------------


def _place(name: str) -> tuple[str, str]:
    """(group, member of its structure) of a register by its flat name; group ``""`` for those without a structure."""
    owner, _, part = name.partition(".")
    if GPR_INDEX.get(name, 16) < 16 or name in ("rip", "rflags"):
        return "regs", name
    if owner in SEGMENT_NAMES:
        return "sregs", f"{'ldt' if owner == 'ldtr' else owner}.{part}"
    if owner in ("gdtr", "idtr"):
        return "sregs", f"{owner[:3]}.{part}"
    if name in _CONTROL:
        return "sregs", name
    if name.startswith("pdptr"):
        return "sregs2", f"pdptrs[{name[-1]}]"
    if name in ("dr6", "dr7"):
        return "debugregs", name
    if name.startswith("dr"):
        return "debugregs", f"db[{name[-1]}]"
    if owner == "events" and part in _EVENT:
        return "events", _EVENT[part]
    return "", name


def _value(case: Case, name: str) -> str:
    """A C expression for what KVM shows of a register, as harness/state.py reads it."""
    group, member = _place(name)
    if name == "events.triple_fault":
        return "((uint8_t *)&events)[28]"  # struct kvm_vcpu_events: triple_fault.pending, since Linux 6.1
    if group == "events":
        part = name.partition(".")[2]
        if part in ("exception_nr", "exception_has_error", "exception_error"):
            return f"events.exception.injected || events.exception.pending ? events.{member} : 0"
        if part in ("interrupt_nr", "interrupt_soft"):
            return f"events.interrupt.injected ? events.{member} : 0"
        return f"!!events.{member}" if part == "shadow" else f"events.{member}"
    if group:
        return f"{group}.{member}"
    if name == "xcr0":
        return "get_xcr0()"
    if name.startswith("msr."):
        return f"get_msr({msr_index(name):#x})"
    if name == "pkru":
        return f"xsave_word({_PKRU}, {_xsave_offset(case, _PKRU)}, 4)"
    if name in GPR_INDEX:
        return f"xsave_word({_APX}, {_xsave_offset(case, _APX) + 8 * (GPR_INDEX[name] - 16)}, 8)"
    raise EmitError(f"register {name} has no C form")


def _check(case: Case, difference: Difference | None) -> str:
    """``check_exit`` and what it needs: is this exit, and what KVM shows at it, as expected?"""
    head = ["static void check_exit(const char *words)", "{"]
    if difference is None:
        return "\n".join([*head, "\t(void)words;", "}"])
    expected = difference.expected
    if expected is None:
        return "\n".join([*head, '\tprintf("exit: expected no further exit got %s\\n", words);', "\tbad = 1;", "}"])
    values = [(d, _value(case, d.name)) for d in difference.registers]
    groups = {g for g in _GROUPS if any(f"{g}." in v or f"&{g})" in v for _, v in values)}
    out = [f"\tstruct {_GROUPS[g][0]} {g};" for g in _GROUPS if g in groups]
    words = _words(expected)
    out += ["", f'\tif (strcmp(words, "{words}")) {{', f'\t\tprintf("exit: expected {words} got %s\\n", words);',
            f"\t\t{'bad' if difference.exits_differ else 'elsewhere'} = 1;", "\t\treturn;", "\t}"]  # fmt: skip
    out += [f"\tDO(vcpu_fd, {_GROUPS[g][1]}, &{g});" for g in _GROUPS if g in groups]
    for d, value in values:
        others = "".join(f"{value} != {v:#x} && " for v in expected.accept.get(d.name, ()))
        guard = f"\tif ({others[:-4]})\n\t" if others else ""
        out.append(f'{guard}\tcheck("{d.name}", {d.expected:#x}, {value}, {expected.ignore.get(d.name, 0):#x});')
    for run in difference.memory[:_MAX_RUNS]:
        out.append(f"\tcheck_bytes({run.gpa:#x}, (uint8_t[]){{ {', '.join(f'{b:#04x}' for b in run.expected)} }},")
        masks = [expected.pages_ignore.get(run.gpa + i, 0) for i in range(len(run.expected))]
        out.append(f"\t\t    (uint8_t[]){{ {', '.join(f'{b:#04x}' for b in masks)} }}, {len(run.expected)});")
    before = (c_parts.CHECK.lstrip() if values else "") + (c_parts.CHECK_BYTES if difference.memory else "")
    return before + "\n" + "\n".join([*head, *out, "}"])


def _ended(difference: Difference | None) -> str:
    if difference is not None and difference.got is None:
        text = f"exit: expected {_words(difference.expected)} got no further exit"
        return f'\t\tprintf("{text}\\n");\n\t\tbad = 1;\n'
    if difference is not None and difference.expected is None:
        return ""
    return '\t\tfprintf(stderr, "set-up trouble: the guest ended before exit %d\\n", CHECK_EXIT);\n\t\treturn 2;\n'


# --- actions --------------------------------------------------------------------------------------------------------


def _actions(case: Case, actions: tuple[Action, ...]) -> str:
    out = []
    for n, action in enumerate(actions):
        match action:
            case Run():
                out.append(f"run_guest({action.limit}, {int(action.complete)});")
            case Complete():
                out.append("complete_pending();")
            case Window():
                out.append(f"window({action.limit});")
            case Step():
                out.append(f"step({action.count});")
            case SetState():
                out.append(f"set_state_{n}();")
            case Inject(event="nmi"):
                out.append("DO(vcpu_fd, KVM_NMI, 0);")
            case Inject(event="interrupt"):
                out.append(f"DO(vcpu_fd, KVM_INTERRUPT, (&(struct kvm_interrupt){{ .irq = {action.vector} }}));")
            case Inject(event="exception"):
                error = int(action.error is not None)
                out.append(f"inject_exception({action.vector}, {error}, {action.error or 0:#x});")
            case SaveRestore():
                out.append("save_restore();")
            case Show(via="xsave") if "apx" in case.requires:
                out.append('plain_xsave = 1; seen("halt"); plain_xsave = 0;')
            case Show():
                out.append('seen("halt");')
            case _:
                raise EmitError(f"action {n} ({action.kind}) of {case.name} has no C form")
    return "".join(f"\t{line}\n" for line in out)


def _set_state(n: int, action: SetState, case: Case) -> str:
    """``set_state_N``: the registers of the sections that ``via`` moves, as harness/kvm_machine.py does it."""
    sync = action.via == "sync"
    moved = {"regs"} if action.via == "regs" else {"regs", "sregs", "events"} if sync else {*_GROUPS, ""} - {"regs"}
    values = [(name, value, *_place(name)) for name, value in action.values]
    values = [v for v in values if v[2] in moved]
    groups = ["regs", "sregs", "events"] if sync else [g for g in _GROUPS if any(v[2] == g for v in values)]
    head = [f"static void set_state_{n}(void)", "{"]
    if sync:
        head += [f"\tstruct {_GROUPS[g][0]} *{g} = (void *)&run->s.regs.{g};" for g in groups]
    else:
        head += [f"\tstruct {_GROUPS[g][0]} {g};" for g in groups]
    ref = "" if sync else "&"
    out = [*head, "", *(f"\tDO(vcpu_fd, {_GROUPS[g][1]}, {ref}{g});" for g in groups)]
    for name, value, group, member in values:
        if group:
            out.append(f"\t{group}{'->' if sync else '.'}{member} = {value:#x};")
        elif name == "xcr0":
            out.append(f"\tset_xcr0({value:#x});")
        elif name.startswith("msr."):
            out.append(f"\tset_msr({msr_index(name):#x}, {value:#x});")
        elif GPR_INDEX.get(name, 0) >= 16:
            offset = _xsave_offset(case, _APX) + 8 * (GPR_INDEX[name] - 16)
            how = 2 if action.via == "xsave-init" else 1
            out.append(f"\txsave_part({_APX}, {offset}, &(uint64_t){{ {value:#x} }}, 8, {how});")
        else:
            raise EmitError(f"action {n} (set): register {name} has no C form")
    if sync:
        out.append("\trun->kvm_dirty_regs |= KVM_SYNC_X86_REGS | KVM_SYNC_X86_SREGS | KVM_SYNC_X86_EVENTS;")
    else:
        out += [f"\tDO(vcpu_fd, {_GROUPS[g][2]}, &{g});" for g in groups]
    return "\n".join([*out, "}"])


def _save_restore(case: Case) -> str:
    _, get, set_ = _GROUPS["sregs2" if pae_paging(case.start) else "sregs"]
    save = restore = ""
    for n, (index, _) in enumerate(case.start.msrs):
        save += f"\tuint64_t msr_{n} = get_msr({index:#x});\n"
        restore += f"\tset_msr({index:#x}, msr_{n});\n"
    if "apx" in case.requires:
        save += f"\tuint64_t egpr[16];\n\n\txsave_part({_APX}, {_xsave_offset(case, _APX)}, egpr, 128, 0);\n"
        restore += f"\txsave_part({_APX}, {_xsave_offset(case, _APX)}, egpr, 128, 1);\n"
    text = c_parts.SAVE_RESTORE.replace("@SAVE@\n", save + "\n").replace("@RESTORE@", restore)
    kind = "kvm_sregs2" if pae_paging(case.start) else "kvm_sregs"
    return text.replace("@SREGS@", kind).replace("@GET_SREGS@", get).replace("@SET_SREGS@", set_)
