"""What the model says of hypercalls, interrupt windows, SMIs, pending operations and instruction pointers that wrap."""

from functools import cache

import pytest

from harness.case import Observation
from harness.cpuid import CpuidEntry, CpuProfile, with_features
from harness.exits import Halt, Hypercall, Io, IrqWindow, Mmio
from harness.known import KnownDivergence
from harness.lockstep import Difference
from harness.machine import record
from harness.modes import HIGH, STUBS
from harness.paths import all_cases
from harness.reference.machine import ReferenceMachine
from harness.state import unpack_sections

VENDOR = {"ebx": 0x68747541, "edx": 0x69746E65, "ecx": 0x444D4163}
HAS = ["lm", "nx", "syscall", "pae", "pse", "msr", "sep", "fxsr", "sse", "xsave", "movbe"]
PROFILE = with_features(CpuProfile((CpuidEntry(0, **VENDOR),)), add=HAS)
EDI = 7


@cache
def family(name):
    return {c.name: c for c in all_cases(PROFILE, families=[name])}


def run(name):
    """(Case, observations, their states where they have one) of a Case by name."""
    case = family(name.partition("/")[0])[name]
    seen = [o for step in record(ReferenceMachine(), case) for o in step]
    return case, seen, [unpack_sections(o.sections) if o.sections else None for o in seen]


# --- hypercalls


@pytest.mark.parametrize(("name", "result"), [
    ("poll@long#0", 0), ("unknown@long#0", -1000), ("unknown@prot32#0", -1000), ("map_unaligned@compat#0", -22),
    ("poll@compat-user#0", -1), ("map@long-user#0", -1), ("number_64@long#0", -1000), ("upper_poll@compat#0", 0),
])  # fmt: skip
def test_results_have_the_width_of_the_caller(name, result):
    _, seen, states = run(f"hypercall/{name}")
    bits = 64 if "@long" in name else 32
    assert len(seen) == 1
    assert states[0].gpr[0] == result & (1 << bits) - 1


def test_a_32_bit_caller_passes_32_bits_and_gets_as_many():
    case, seen, states = run("hypercall/upper_map@compat#0")
    assert seen[0].exit == Hypercall(12, (0x7000, 3, 0x15))
    assert case.start.gpr[3] >> 32
    assert states[0].gpr[0] == int.from_bytes(case.read_data(0, 8), "little") & 0xFFFFFFFF
    assert states[0].gpr[3] == case.start.gpr[3], "arguments stay, upper halves too"


def test_a_64_bit_caller_passes_64_bits():
    _, seen, _ = run("hypercall/map_64@long#0")
    assert seen[0].exit.args == (0x1234567000, 1 << 33, 1 << 63 | 0x10)


# --- interrupt windows


@pytest.mark.parametrize(("entry", "after"), [
    ("sti", "sti; inc"), ("sti_twice", "sti; sti"), ("open_from_the_start", ""), ("sti_before_jump", "sti; jmp"),
])  # fmt: skip
def test_a_window_opens_one_instruction_after_sti(entry, after):
    case, seen, states = run(f"window/{entry}@prot32#0")
    sizes = {"sti": 1, "inc": 1, "jmp": 3}  # JMP is two bytes long, and over one NOP
    assert isinstance(seen[0].exit, IrqWindow)
    assert states[0].rip - case.start.rip == sum(sizes[word] for word in after.split("; ") if word)


def test_an_exit_in_the_shadow_ends_it():
    _, seen, states = run("window/sti_before_out@long#0")
    assert [type(o.exit) for o in seen] == [Io, IrqWindow, Halt]
    assert states[0].rip == states[1].rip
    assert not states[0].events.shadow


def test_an_interrupt_goes_where_the_window_was():
    _, _, states = run("window/sti@long#0")
    assert states[-1].rip == STUBS + 16 * 0x91 + 1
    assert not states[-1].rflags & 0x200


# --- system management mode


@pytest.mark.parametrize("mode", ["real", "prot16", "prot32", "pae", "compat", "long"])
def test_rsm_brings_back_what_the_smi_saved(mode):
    _, _, (before, inside, after) = run(f"smm/exit@{mode}#0")
    assert (inside.events.smm, inside.cr0 & 1, inside.efer, inside.cs.base) == (1, 0, 0, 0x30000)
    for name in ("cr0", "cr3", "cr4", "efer", "cs", "ss", "ds", "es", "fs", "gs", "tr", "ldtr", "gdtr", "idtr"):
        assert getattr(after, name) == getattr(before, name), name
    assert after.gpr[:3] == before.gpr[:3]
    assert (after.events.smm, after.events.nmi_masked) == (0, 0)


def test_rsm_loads_each_register_from_its_own_slot():
    _, _, states = run("smm/saved_registers@long#0")
    assert [v & 0xFFFFFFFF for n, v in enumerate(states[-1].gpr[:16]) if n not in (3, 4, 5)] == [
        0x11110000 + (15 - n) * 0x101 for n in range(16) if n not in (3, 4, 5)
    ]


def test_rsm_outside_of_system_management_mode_is_undefined():
    _, _, states = run("smm/rsm_outside@long#0")
    assert states[-1].rip == STUBS + 16 * 6 + 1


# --- pending operations


def test_registers_set_while_an_output_is_pending_stay():
    case, seen, states = run("resume/pending_set/out_imm_0x10_b@long#0")
    assert states[1].gpr[5] == 0x5A5A1234
    assert states[1].rip == case.start.rip + 2
    assert seen[0].sections == {}


def test_ins_goes_on_from_the_registers_set_meanwhile():
    case, _, states = run("resume/pending_sync/ins_l@long#0")
    down = states[1].rflags & 0x400
    assert states[1].gpr[EDI] == 0x2468 + (-4 if down else 4)
    assert case.actions[1].via == "sync"


def test_a_rip_set_while_a_write_is_pending_is_where_the_guest_goes_on():
    _, _, states = run("resume/pending_rip/store_eax@prot32#0")
    assert states[1].rip == STUBS + 16 * 0x77
    assert states[-1].rip == STUBS + 16 * 0x77 + 1


# --- widths


def test_the_instruction_pointer_of_32_bit_code_wraps():
    case, seen, states = run("wrap/out_imm_b@prot32#0")
    assert case.start.rip == 0xFFFFFFFE
    assert isinstance(seen[0].exit, Io)
    assert states[0].rip == 0


def test_upper_halves_stay_until_the_register_is_written():
    case, _, states = run("upper/io/in_imm_0x10_l@compat#0")
    assert all(v >> 32 for n, v in enumerate(case.start.gpr[:16]) if n != 4)
    assert not states[0].gpr[0] >> 32
    assert states[0].gpr[1] == case.start.gpr[1]


def test_high_code_keeps_all_bits_of_rip():
    case, _, states = run("high/io/out_imm_0x10_b@long#0")
    assert case.start.rip & HIGH == HIGH
    assert states[0].rip == case.start.rip + 2


def test_a_stack_in_mmio_is_one_exit_an_item():
    case, seen, _ = run("mmio_stack/popa@real#0")
    assert case.start.ss.base == 0xA0000
    assert [o.exit.address for o in seen[:-1]] == [0xA0480 + 2 * n for n in range(8)]


# --- MOVBE


@pytest.mark.parametrize(("register", "n", "size", "keeps"), [
    ("bx", 3, 2, 16), ("edx", 2, 4, 64), ("r9w", 9, 2, 16), ("r10d", 10, 4, 64), ("rdi", 7, 8, 64), ("r14", 14, 8, 64),
])  # fmt: skip
def test_what_movbe_moves_has_its_bytes_turned_around(register, n, size, keeps):
    case, seen, states = run(f"mmio/movbe_load_{register}@long#0")
    value = int.from_bytes(case.read_data(0, size), "big")
    base = 0xA0340 if n == 3 else case.start.gpr[n]
    upper = base >> keeps << keeps if keeps < 64 else 0
    assert seen[0].exit == Mmio(0xA0348, size, False)
    assert states[-1].gpr[n] == upper | value
    case, seen, _ = run(f"mmio/movbe_store_{register}@long#0")
    base = 0xA0340 if n == 3 else case.start.gpr[n]
    assert seen[0].exit == Mmio(0xA0348, size, True, (base & (1 << 8 * size) - 1).to_bytes(size, "big"))


def test_rex_w_decides_the_size_of_movbe_whatever_66_says():
    case, seen, _ = run("mmio/movbe_store_w66@long#0")
    assert seen[0].exit == Mmio(0xA0348, 8, True, case.start.gpr[0].to_bytes(8, "big"))


@pytest.mark.parametrize("mode", ["real", "prot32", "long"])
@pytest.mark.parametrize("which", ["from", "to"])
def test_movbe_has_no_register_form(mode, which):
    _, seen, states = run(f"gpr/ud_movbe_{which}_reg@{mode}#0")
    assert [o.exit for o in seen] == [Halt()]
    assert states[0].cs.base + states[0].rip == STUBS + 16 * 6 + 1


def test_an_absent_movbe_is_ud_and_no_access_to_the_device():
    without = family("absent")
    assert {name.split("/")[-1].split("@")[0] for name in without} == {
        *(f"movbe_{what}_{r}" for what in ("load", "store") for r in ("bx", "edx", "r9w", "r10d", "rdi", "r14")),
        "movbe_store_w66",
    }
    for name in without:
        case, seen, states = run(name)
        assert "movbe" not in case.profile.features | case.requires
        assert [o.exit for o in seen] == [Halt()]
        assert states[0].cs.base + states[0].rip == STUBS + 16 * 6 + 1


# --- the divergence that these showed


def test_an_mmio_item_elsewhere_is_known_by_its_distance():
    row = KnownDivergence("x", ("*",), ("*",), (), "mmio-items 1", "", "", "")
    case = family("mmio_stack")["mmio_stack/popa@real#0"]

    def differing(want, got):
        return Difference(2, 0, Observation(want, {}), Observation(got, {}))

    assert row.explains(case, differing(Mmio(0xA0484, 2, False), Mmio(0xA0486, 2, False)))
    assert not row.explains(case, differing(Mmio(0xA0484, 2, False), Mmio(0xA0488, 2, False)))
    assert not row.explains(case, differing(Mmio(0xA0484, 2, False), Mmio(0xA0485, 2, False)))
    assert not row.explains(case, differing(Mmio(0xA0484, 2, False), Mmio(0xA0486, 2, True, b"  ")))
    assert not row.explains(case, differing(Mmio(0xA0484, 2, False), Halt()))

