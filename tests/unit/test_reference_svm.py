"""SVM in the model, worked out by hand: what VMRUN and #VMEXIT switch, what they leave, what the block holds then."""

from dataclasses import replace

import pytest
from reference_cpu import AMD, profile, run, start, stub

from harness import vmcb
from harness.case import Blob
from harness.cpuid import CpuidEntry, CpuProfile, with_features
from harness.modes import CODE_BASE, DATA_BASE, STACK_TOP, setup
from harness.reference.cpu import GP, UD, ModelError

VMCB, HSAVE = DATA_BASE + 0x5000, DATA_BASE + 0x6000
CPU = with_features(profile(AMD), add=["svm"])
INNER = CODE_BASE + 0x80
CONTROL = {"intercepts2": 3, "asid": 1}
SVME = 1 << 12
ENTER = "b8" + VMCB.to_bytes(4, "little").hex() + "0f01d8f4"  # mov eax, VMCB; vmrun; hlt


def inner_state(**flat):
    s = setup("long", entry=INNER, profile=CPU).state
    return replace(s, efer=s.efer | SVME).with_({"rsp": STACK_TOP - 0x800, "rax": 0xAAAA, **flat})


def machine(inner, outer=ENTER, cpu=CPU, state=None, svme=True, **control):
    block = vmcb.block(state or inner_state(), **{**CONTROL, **control})
    made = start("long", outer, cpu=cpu, blobs=(Blob(VMCB, block), Blob(INNER, bytes.fromhex(inner))))
    made.unseen_msrs[0xC0010117] = HSAVE
    return _with(made, efer=made.efer | (SVME if svme else 0))


def _with(cpu, **registers):
    cpu.load_state(cpu.state().with_(registers))
    return cpu


def control(cpu, name):
    return vmcb.read(cpu.mem.physical_read(VMCB, 4096), name)


def saved(cpu, name):
    at = {"rax": 0x1F8, "rsp": 0x1D8, "rip": 0x178}[name]
    return int.from_bytes(cpu.mem.physical_read(VMCB + vmcb.SAVE + at, 8), "little")


def test_rax_and_rsp_are_switched_and_nothing_else_of_the_general_registers():
    cpu = machine("48ffc0 48ffc3 6a00 0f01d9".replace(" ", ""))  # inc rax; inc rbx; push 0; vmmcall
    cpu.gpr[3] = 7
    top = cpu.gpr[4]
    run(cpu)
    assert cpu.gpr[0] == VMCB
    assert cpu.gpr[3] == 8
    assert cpu.gpr[4] == top
    assert (saved(cpu, "rax"), saved(cpu, "rsp")) == (0xAAAB, STACK_TOP - 0x808)
    assert control(cpu, "exit_code") == vmcb.EXITS["vmmcall"]
    assert saved(cpu, "rip") == INNER + 8, "at VMMCALL, not past it"


def test_extended_registers_are_nobodys():
    leaves = (CpuidEntry(0xD, 0, 1, 0x80007, 576, 1088), CpuidEntry(0xD, 19, 1, 128, 960))
    rest = tuple(e for e in CPU.cpuid if (e.function, e.index) != (0xD, 0))
    apx = with_features(CpuProfile((*rest, *leaves)), add=["apx"])
    inner = inner_state(cr4=setup("long", entry=0, profile=apx).state.cr4)
    cpu = machine("d51850 d518ffc7 0f01d9".replace(" ", ""), cpu=apx, state=inner)  # pushp r16; inc r23; vmmcall
    cpu.gpr[16:] = list(range(100, 116))
    run(cpu)
    assert cpu.gpr[16:] == [*range(100, 107), 108, *range(108, 116)]
    assert cpu.mem.linear_read(STACK_TOP - 0x808, 8) == 100


@pytest.mark.parametrize(
    ("inner", "more", "code"),
    [
        ("f4", {"intercepts1": vmcb.INTERCEPT_HLT}, vmcb.EXITS["hlt"]),
        ("0fa2", {"intercepts1": vmcb.INTERCEPT_CPUID}, vmcb.EXITS["cpuid"]),
        ("0f0b", {"exceptions": 1 << UD}, vmcb.EXIT_EXCEPTION + UD),
        ("0f01d8", {}, vmcb.EXITS["vmrun"]),
    ],
)
def test_what_is_intercepted_leaves_with_rip_at_the_instruction(inner, more, code):
    cpu = run(machine(inner, **more))
    assert control(cpu, "exit_code") == code
    assert saved(cpu, "rip") == INNER
    assert cpu.rip == CODE_BASE + len(ENTER) // 2


def test_a_page_fault_leaves_its_address_in_exitinfo_and_cr2_alone():
    cpu = run(machine("48a1efbeadde00000000", exceptions=1 << 14, state=inner_state(cr2=0x1234)))
    assert control(cpu, "exit_code") == vmcb.EXIT_EXCEPTION + 14
    assert (control(cpu, "exit_info1"), control(cpu, "exit_info2")) == (0, 0xDEADBEEF)
    assert cpu.cr2 == 0x1234


def test_what_is_not_intercepted_happens_in_the_inner_guest():
    assert stub(run(machine("0f0b"))) == UD
    cpu = run(machine("f4"))
    assert cpu.rip == INNER + 1
    assert cpu.guest is not None


def test_gif_is_off_after_leaving_and_stgi_turns_it_on():
    cpu = run(machine("0f01d9"))
    assert not cpu.gif
    assert run(machine("0f01d9", outer=ENTER[:-2] + "0f01dcf4")).gif


def test_the_host_save_area_is_undefined_afterwards():
    cpu = run(machine("0f01d9"))
    assert all(cpu.mem.pages_ignore.get(HSAVE + n) == 0xFF for n in range(4096))
    assert VMCB + 0x400 not in cpu.mem.pages_ignore


def test_vmsave_and_vmload_move_what_vmrun_does_not():
    cpu = start("long", "b8" + VMCB.to_bytes(4, "little").hex() + "0f01dbf4", cpu=CPU)
    cpu = _with(cpu, efer=cpu.efer | SVME)
    cpu.unseen_msrs[0xC0000102] = 0x1234567
    run(cpu)
    block = cpu.mem.physical_read(VMCB, 4096)
    assert vmcb.unpack_segment(block, "fs") == cpu.seg[4]
    assert vmcb.unpack_segment(block, "tr") == cpu.tr
    assert int.from_bytes(block[vmcb.SAVE + 0x220 :][:8], "little") == 0x1234567
    assert vmcb.unpack_segment(block, "cs").base == 0, "not VMSAVE's"


@pytest.mark.parametrize(
    ("code", "svme", "vector"),
    [("0f01d8f4", False, UD), ("0f01dbf4", False, UD), ("b808500100" + "0f01d8f4", True, GP)],
)
def test_what_vmrun_refuses(code, svme, vector):
    assert stub(run(machine("0f01d9", outer=code, svme=svme))) == vector


def test_what_the_model_does_not_know_is_said():
    with pytest.raises(ModelError, match="intercepts1"):
        run(machine("0f01d9", intercepts1=1 << 29))
    with pytest.raises(ModelError, match="nested_paging"):
        run(machine("0f01d9", nested_paging=1))


def test_a_state_that_cannot_be_is_refused():
    assert control(run(machine("0f01d9", asid=0)), "exit_code") == vmcb.EXIT_INVALID


def test_a_block_gives_back_the_state_it_was_made_from():
    state = inner_state(cr2=0x5000, rflags=0x8D7)
    entered = vmcb.enter(setup("long", entry=0, profile=CPU).state, vmcb.block(state, **CONTROL))
    assert entered == replace(state, gpr=entered.gpr)
    assert (entered.gpr[0], entered.gpr[4]) == (state.gpr[0], state.gpr[4])
