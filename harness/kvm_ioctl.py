"""The KVM user interface of Linux 7.3 on x86: request numbers, structures, constants, and one checked `ioctl()`.

Sources: include/uapi/linux/kvm.h ("linux/kvm.h") and arch/x86/include/uapi/asm/kvm.h ("asm/kvm.h"), and for meanings
Documentation/virt/kvm/api.rst ("api.rst"). Names are the kernel's own, so this file reads beside the headers;
`tests/unit/test_kvm_abi.py` compares every number, size and offset with them, in both directions.

- Structures are declared by annotation (`rip: U64`); `_layout` makes the ctypes fields. Members that C reaches through
  an anonymous union are tagged `UNION` and are, as in C, members of the structure itself (`run.io.port`).
- Structures that end in an array of any length come from factories: `cpuid2(n)`, `msrs(n)`, `flexible(type, n)`, ...
- Constants of other architectures are left out, except KVM_CAP_*, KVM_EXIT_* and the exit union, which are complete.
- This module knows nothing of the project. Do not add `from __future__ import annotations`: annotations are data here.
"""

import ctypes
import errno as _errno
import fcntl
import functools
import inspect
import mmap
import os
import sys
from ctypes import Array, Structure, Union, c_int16, c_int32, c_int64, c_uint8, c_uint16, c_uint32, c_uint64
from typing import Annotated, Any, Final, TypeAlias, TypeVar, cast, get_args

# --- how structures are declared --------------------------------------------------------------------------------------

U8: TypeAlias = Annotated[int, c_uint8]
U16: TypeAlias = Annotated[int, c_uint16]
U32: TypeAlias = Annotated[int, c_uint32]
U64: TypeAlias = Annotated[int, c_uint64]
S16: TypeAlias = Annotated[int, c_int16]
S32: TypeAlias = Annotated[int, c_int32]
S64: TypeAlias = Annotated[int, c_int64]
# Arrays: Annotated[U8s, 7] is __u8 name[7]; 0 is an array of any length at the end of a structure; char arrays are U8s.
U8s: TypeAlias = Array[c_uint8]
U32s: TypeAlias = Array[c_uint32]
U64s: TypeAlias = Array[c_uint64]


class Bits(int):
    """Annotated[U8, Bits(3)] is a bit field of three bits."""


class _Union:
    """Neighbours that are annotated with UNION are the members of one anonymous union."""


UNION: Final = _Union()

_Aggregate = TypeVar("_Aggregate", bound=Structure | Union)


def _layout(cls: type[_Aggregate]) -> type[_Aggregate]:
    """Give a ctypes structure or union the fields that its annotations describe."""
    fields: list[tuple[Any, ...]] = []
    anonymous: list[str] = []
    members: list[tuple[Any, ...]] = []
    for name, annotation in inspect.get_annotations(cls).items():
        details = getattr(annotation, "__metadata__", ())
        base = annotation.__origin__ if details else annotation
        ctype = next((detail for detail in details if isinstance(detail, type)), base)
        lengths = [detail for detail in details if isinstance(detail, int) and not isinstance(detail, Bits)]
        if lengths:
            ctype = base
            for _ in lengths:
                (ctype,) = get_args(ctype)
            for length in reversed(lengths):
                ctype = ctype * length
        field = (name, ctype, *(int(detail) for detail in details if isinstance(detail, Bits)))
        if UNION in details:
            if not members:
                anonymous.append(f"_anonymous{len(anonymous)}")
                fields.append((anonymous[-1], None))
            members.append(field)
            fields[-1] = (anonymous[-1], type(f"{cls.__name__}{anonymous[-1]}", (Union,), {"_fields_": tuple(members)}))
        else:
            members = []
            fields.append(field)
    cls._anonymous_ = tuple(anonymous)
    cls._fields_ = cast(Any, fields)
    return cls


def _names(prefix: str) -> dict[int, str]:
    """Name of each constant with that prefix that is declared so far."""
    return {value: name for name, value in globals().items() if name.startswith(prefix)}


# --- asm/kvm.h: registers ---------------------------------------------------------------------------------------------

# Pages of the vCPU's mapping beside kvm_run (api.rst 4.5, 5)
KVM_PIO_PAGE_OFFSET: Final = 1
KVM_COALESCED_MMIO_PAGE_OFFSET: Final = 2
KVM_DIRTY_LOG_PAGE_OFFSET: Final = 64

DE_VECTOR: Final = 0
DB_VECTOR: Final = 1
BP_VECTOR: Final = 3
OF_VECTOR: Final = 4
BR_VECTOR: Final = 5
UD_VECTOR: Final = 6
NM_VECTOR: Final = 7
DF_VECTOR: Final = 8
TS_VECTOR: Final = 10
NP_VECTOR: Final = 11
SS_VECTOR: Final = 12
GP_VECTOR: Final = 13
PF_VECTOR: Final = 14
MF_VECTOR: Final = 16
AC_VECTOR: Final = 17
MC_VECTOR: Final = 18
XM_VECTOR: Final = 19
VE_VECTOR: Final = 20
CP_VECTOR: Final = 21
HV_VECTOR: Final = 28
VC_VECTOR: Final = 29
SX_VECTOR: Final = 30

KVM_NR_INTERRUPTS: Final = 256


@_layout
class kvm_regs(Structure):
    """KVM_GET_REGS, KVM_SET_REGS (api.rst 4.11): the sixteen classic general-purpose registers, RIP, RFLAGS."""

    rax: U64
    rbx: U64
    rcx: U64
    rdx: U64
    rsi: U64
    rdi: U64
    rsp: U64
    rbp: U64
    r8: U64
    r9: U64
    r10: U64
    r11: U64
    r12: U64
    r13: U64
    r14: U64
    r15: U64
    rip: U64
    rflags: U64


@_layout
class kvm_segment(Structure):
    base: U64
    limit: U32
    selector: U16
    type: U8
    present: U8
    dpl: U8
    db: U8
    s: U8
    l: U8
    g: U8
    avl: U8
    unusable: U8
    padding: U8


@_layout
class kvm_dtable(Structure):
    base: U64
    limit: U16
    padding: Annotated[Array[c_uint16], 3]


@_layout
class kvm_sregs(Structure):
    """KVM_GET_SREGS, KVM_SET_SREGS (api.rst 4.13)."""

    cs: kvm_segment
    ds: kvm_segment
    es: kvm_segment
    fs: kvm_segment
    gs: kvm_segment
    ss: kvm_segment
    tr: kvm_segment
    ldt: kvm_segment
    gdt: kvm_dtable
    idt: kvm_dtable
    cr0: U64
    cr2: U64
    cr3: U64
    cr4: U64
    cr8: U64
    efer: U64
    apic_base: U64
    interrupt_bitmap: Annotated[U64s, (KVM_NR_INTERRUPTS + 63) // 64]


KVM_SREGS2_FLAGS_PDPTRS_VALID: Final = 1


@_layout
class kvm_sregs2(Structure):
    """KVM_GET_SREGS2, KVM_SET_SREGS2 (api.rst 4.131): no interrupt bitmap, but the PAE page-directory pointers."""

    cs: kvm_segment
    ds: kvm_segment
    es: kvm_segment
    fs: kvm_segment
    gs: kvm_segment
    ss: kvm_segment
    tr: kvm_segment
    ldt: kvm_segment
    gdt: kvm_dtable
    idt: kvm_dtable
    cr0: U64
    cr2: U64
    cr3: U64
    cr4: U64
    cr8: U64
    efer: U64
    apic_base: U64
    flags: U64
    pdptrs: Annotated[U64s, 4]


@_layout
class kvm_fpu(Structure):
    """KVM_GET_FPU, KVM_SET_FPU (api.rst 4.22). `ftwx` is the abridged tag word of FXSAVE."""

    fpr: Annotated[Array[Array[c_uint8]], 8, 16]
    fcw: U16
    fsw: U16
    ftwx: U8
    pad1: U8
    last_opcode: U16
    last_ip: U64
    last_dp: U64
    xmm: Annotated[Array[Array[c_uint8]], 16, 16]
    mxcsr: U32
    pad2: U32


@_layout
class kvm_xsave(Structure):
    """KVM_GET_XSAVE, KVM_GET_XSAVE2, KVM_SET_XSAVE (api.rst 4.42, 4.134): an XSAVE area in the standard format.

    The kernel reads and writes as many bytes as KVM_CHECK_EXTENSION(KVM_CAP_XSAVE2) says, at least 4096: see `xsave()`.
    """

    region: Annotated[U32s, 1024]
    extra: Annotated[U32s, 0]


KVM_MAX_XCRS: Final = 16


@_layout
class kvm_xcr(Structure):
    xcr: U32
    reserved: U32
    value: U64


@_layout
class kvm_xcrs(Structure):
    """KVM_GET_XCRS, KVM_SET_XCRS (api.rst 4.44)."""

    nr_xcrs: U32
    flags: U32
    xcrs: Annotated[Array[kvm_xcr], KVM_MAX_XCRS]
    padding: Annotated[U64s, 16]


@_layout
class kvm_debugregs(Structure):
    """KVM_GET_DEBUGREGS, KVM_SET_DEBUGREGS (api.rst 4.33)."""

    db: Annotated[U64s, 4]
    dr6: U64
    dr7: U64
    flags: U64
    reserved: Annotated[U64s, 9]


# kvm_vcpu_events.flags: which optional fields KVM_SET_VCPU_EVENTS takes
KVM_VCPUEVENT_VALID_NMI_PENDING: Final = 0x00000001
KVM_VCPUEVENT_VALID_SIPI_VECTOR: Final = 0x00000002
KVM_VCPUEVENT_VALID_SHADOW: Final = 0x00000004
KVM_VCPUEVENT_VALID_SMM: Final = 0x00000008
KVM_VCPUEVENT_VALID_PAYLOAD: Final = 0x00000010
KVM_VCPUEVENT_VALID_TRIPLE_FAULT: Final = 0x00000020
# kvm_vcpu_events.interrupt.shadow
KVM_X86_SHADOW_INT_MOV_SS: Final = 0x01
KVM_X86_SHADOW_INT_STI: Final = 0x02


@_layout
class kvm_vcpu_events_exception(Structure):
    injected: U8
    nr: U8
    has_error_code: U8
    pending: U8
    error_code: U32


@_layout
class kvm_vcpu_events_interrupt(Structure):
    injected: U8
    nr: U8
    soft: U8
    shadow: U8


@_layout
class kvm_vcpu_events_nmi(Structure):
    injected: U8
    pending: U8
    masked: U8
    pad: U8


@_layout
class kvm_vcpu_events_smi(Structure):
    smm: U8
    pending: U8
    smm_inside_nmi: U8
    latched_init: U8


@_layout
class kvm_vcpu_events_triple_fault(Structure):
    pending: U8


@_layout
class kvm_vcpu_events(Structure):
    """KVM_GET_VCPU_EVENTS, KVM_SET_VCPU_EVENTS (api.rst 4.31)."""

    exception: kvm_vcpu_events_exception
    interrupt: kvm_vcpu_events_interrupt
    nmi: kvm_vcpu_events_nmi
    sipi_vector: U32
    flags: U32
    smi: kvm_vcpu_events_smi
    triple_fault: kvm_vcpu_events_triple_fault
    reserved: Annotated[U8s, 26]
    exception_has_payload: U8
    exception_payload: U64


# kvm_run.kvm_valid_regs and kvm_dirty_regs (api.rst 6.74)
KVM_SYNC_X86_REGS: Final = 1 << 0
KVM_SYNC_X86_SREGS: Final = 1 << 1
KVM_SYNC_X86_EVENTS: Final = 1 << 2
KVM_SYNC_X86_VALID_FIELDS: Final = KVM_SYNC_X86_REGS | KVM_SYNC_X86_SREGS | KVM_SYNC_X86_EVENTS


@_layout
class kvm_sync_regs(Structure):
    """The registers that KVM_RUN itself takes and gives, in kvm_run.s (KVM_CAP_SYNC_REGS)."""

    regs: kvm_regs
    sregs: kvm_sregs
    events: kvm_vcpu_events


# ONE_REG register numbers of x86 (api.rst 4.68)
KVM_X86_REG_TYPE_MSR: Final = 2
KVM_X86_REG_TYPE_KVM: Final = 3
KVM_REG_GUEST_SSP: Final = 0

# --- asm/kvm.h: MSRs and CPUID ----------------------------------------------------------------------------------------


@_layout
class kvm_msr_entry(Structure):
    index: U32
    reserved: U32
    data: U64


@_layout
class kvm_msrs(Structure):
    """KVM_GET_MSRS, KVM_SET_MSRS (api.rst 4.18): make one with `msrs(n)`. The call returns how many MSRs it did."""

    nmsrs: U32
    pad: U32
    entries: Annotated[Array[kvm_msr_entry], 0]


@_layout
class kvm_msr_list(Structure):
    """KVM_GET_MSR_INDEX_LIST, KVM_GET_MSR_FEATURE_INDEX_LIST (api.rst 4.3): make one with `msr_list(n)`."""

    nmsrs: U32
    indices: Annotated[U32s, 0]


KVM_MSR_FILTER_MAX_BITMAP_SIZE: Final = 0x600
KVM_MSR_FILTER_READ: Final = 1 << 0
KVM_MSR_FILTER_WRITE: Final = 1 << 1
KVM_MSR_FILTER_RANGE_VALID_MASK: Final = KVM_MSR_FILTER_READ | KVM_MSR_FILTER_WRITE
KVM_MSR_FILTER_MAX_RANGES: Final = 16
KVM_MSR_FILTER_DEFAULT_ALLOW: Final = 0 << 0
KVM_MSR_FILTER_DEFAULT_DENY: Final = 1 << 0
KVM_MSR_FILTER_VALID_MASK: Final = KVM_MSR_FILTER_DEFAULT_DENY


@_layout
class kvm_msr_filter_range(Structure):
    flags: U32
    nmsrs: U32
    base: U32
    bitmap: U64  # address; keep the bitmap alive until the call is done


@_layout
class kvm_msr_filter(Structure):
    """KVM_X86_SET_MSR_FILTER (api.rst 4.97)."""

    flags: U32
    ranges: Annotated[Array[kvm_msr_filter_range], KVM_MSR_FILTER_MAX_RANGES]


@_layout
class kvm_cpuid_entry(Structure):
    function: U32
    eax: U32
    ebx: U32
    ecx: U32
    edx: U32
    padding: U32


@_layout
class kvm_cpuid(Structure):
    """KVM_SET_CPUID (api.rst 4.20): make one with `cpuid(n)`."""

    nent: U32
    padding: U32
    entries: Annotated[Array[kvm_cpuid_entry], 0]


KVM_CPUID_FLAG_SIGNIFCANT_INDEX: Final = 1 << 0  # the kernel's spelling
KVM_CPUID_FLAG_STATEFUL_FUNC: Final = 1 << 1
KVM_CPUID_FLAG_STATE_READ_NEXT: Final = 1 << 2


@_layout
class kvm_cpuid_entry2(Structure):
    function: U32
    index: U32
    flags: U32
    eax: U32
    ebx: U32
    ecx: U32
    edx: U32
    padding: Annotated[U32s, 3]


@_layout
class kvm_cpuid2(Structure):
    """KVM_SET_CPUID2 and every KVM_GET_*CPUID* (api.rst 4.46): make one with `cpuid2(n)`."""

    nent: U32
    padding: U32
    entries: Annotated[Array[kvm_cpuid_entry2], 0]


# --- asm/kvm.h: interrupt controllers and timers ----------------------------------------------------------------------


@_layout
class kvm_pic_state(Structure):
    last_irr: U8
    irr: U8
    imr: U8
    isr: U8
    priority_add: U8
    irq_base: U8
    read_reg_select: U8
    poll: U8
    special_mask: U8
    init_state: U8
    auto_eoi: U8
    rotate_on_auto_eoi: U8
    special_fully_nested_mode: U8
    init4: U8
    elcr: U8
    elcr_mask: U8


KVM_IOAPIC_NUM_PINS: Final = 24


@_layout
class kvm_ioapic_state_redirtbl_fields(Structure):
    vector: U8
    delivery_mode: Annotated[U8, Bits(3)]
    dest_mode: Annotated[U8, Bits(1)]
    delivery_status: Annotated[U8, Bits(1)]
    polarity: Annotated[U8, Bits(1)]
    remote_irr: Annotated[U8, Bits(1)]
    trig_mode: Annotated[U8, Bits(1)]
    mask: Annotated[U8, Bits(1)]
    reserve: Annotated[U8, Bits(7)]
    reserved: Annotated[U8s, 4]
    dest_id: U8


@_layout
class kvm_ioapic_state_redirtbl(Union):
    bits: U64
    fields: kvm_ioapic_state_redirtbl_fields


@_layout
class kvm_ioapic_state(Structure):
    base_address: U64
    ioregsel: U32
    id: U32
    irr: U32
    pad: U32
    redirtbl: Annotated[Array[kvm_ioapic_state_redirtbl], KVM_IOAPIC_NUM_PINS]


KVM_IRQCHIP_PIC_MASTER: Final = 0
KVM_IRQCHIP_PIC_SLAVE: Final = 1
KVM_IRQCHIP_IOAPIC: Final = 2
KVM_NR_IRQCHIPS: Final = 3

KVM_APIC_REG_SIZE: Final = 0x400


@_layout
class kvm_lapic_state(Structure):
    """KVM_GET_LAPIC, KVM_SET_LAPIC (api.rst 4.57): the local APIC's register page."""

    regs: Annotated[U8s, KVM_APIC_REG_SIZE]


@_layout
class kvm_pit_channel_state(Structure):
    count: U32
    latched_count: U16
    count_latched: U8
    status_latched: U8
    status: U8
    read_state: U8
    write_state: U8
    write_latch: U8
    rw_mode: U8
    mode: U8
    bcd: U8
    gate: U8
    count_load_time: S64


@_layout
class kvm_pit_state(Structure):
    channels: Annotated[Array[kvm_pit_channel_state], 3]


KVM_PIT_FLAGS_HPET_LEGACY: Final = 0x00000001
KVM_PIT_FLAGS_SPEAKER_DATA_ON: Final = 0x00000002


@_layout
class kvm_pit_state2(Structure):
    """KVM_GET_PIT2, KVM_SET_PIT2 (api.rst 4.72)."""

    channels: Annotated[Array[kvm_pit_channel_state], 3]
    flags: U32
    reserved: Annotated[U32s, 9]


@_layout
class kvm_reinject_control(Structure):
    """KVM_REINJECT_CONTROL (api.rst 4.99)."""

    pit_reinject: U8
    reserved: Annotated[U8s, 31]


KVM_X2APIC_API_USE_32BIT_IDS: Final = 1 << 0
KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK: Final = 1 << 1
KVM_X2APIC_ENABLE_SUPPRESS_EOI_BROADCAST: Final = 1 << 2
KVM_X2APIC_DISABLE_SUPPRESS_EOI_BROADCAST: Final = 1 << 3

# kvm_device_attr of a vCPU (Documentation/virt/kvm/devices/vcpu.rst)
KVM_VCPU_TSC_CTRL: Final = 0
KVM_VCPU_TSC_OFFSET: Final = 0

# --- asm/kvm.h: debugging, machine checks, performance counters -------------------------------------------------------


@_layout
class kvm_debug_exit_arch(Structure):
    exception: U32
    pad: U32
    pc: U64
    dr6: U64
    dr7: U64


# kvm_guest_debug.control, the bits of x86 (api.rst 4.87)
KVM_GUESTDBG_USE_SW_BP: Final = 0x00010000
KVM_GUESTDBG_USE_HW_BP: Final = 0x00020000
KVM_GUESTDBG_INJECT_DB: Final = 0x00040000
KVM_GUESTDBG_INJECT_BP: Final = 0x00080000
KVM_GUESTDBG_BLOCKIRQ: Final = 0x00100000


@_layout
class kvm_guest_debug_arch(Structure):
    debugreg: Annotated[U64s, 8]


@_layout
class kvm_x86_mce(Structure):
    """KVM_X86_SET_MCE (api.rst 4.106)."""

    status: U64
    addr: U64
    misc: U64
    mcg_status: U64
    bank: U8
    pad1: Annotated[U8s, 7]
    pad2: Annotated[U64s, 3]


@_layout
class kvm_pmu_event_filter(Structure):
    """KVM_SET_PMU_EVENT_FILTER (api.rst 4.120): make one with `pmu_event_filter(n)`."""

    action: U32
    nevents: U32
    fixed_counter_bitmap: U32
    flags: U32
    pad: Annotated[U32s, 4]
    events: Annotated[U64s, 0]


KVM_PMU_EVENT_ALLOW: Final = 0
KVM_PMU_EVENT_DENY: Final = 1
KVM_PMU_EVENT_FLAG_MASKED_EVENTS: Final = 1 << 0
KVM_PMU_EVENT_FLAGS_VALID_MASK: Final = KVM_PMU_EVENT_FLAG_MASKED_EVENTS
KVM_PMU_MASKED_ENTRY_EVENT_SELECT: Final = 0xFF | 0xF << 32
KVM_PMU_MASKED_ENTRY_UMASK_MASK: Final = 0xFF << 56
KVM_PMU_MASKED_ENTRY_UMASK_MATCH: Final = 0xFF << 8
KVM_PMU_MASKED_ENTRY_EXCLUDE: Final = 1 << 55
KVM_PMU_MASKED_ENTRY_UMASK_MASK_SHIFT: Final = 56

# --- asm/kvm.h: what a VM is, and KVM's quirks ------------------------------------------------------------------------

# KVM_CREATE_VM's argument
KVM_X86_DEFAULT_VM: Final = 0
KVM_X86_SW_PROTECTED_VM: Final = 1
KVM_X86_SEV_VM: Final = 2
KVM_X86_SEV_ES_VM: Final = 3
KVM_X86_SNP_VM: Final = 4
KVM_X86_TDX_VM: Final = 5

# kvm_run.flags
KVM_RUN_X86_SMM: Final = 1 << 0
KVM_RUN_X86_BUS_LOCK: Final = 1 << 1
KVM_RUN_X86_GUEST_MODE: Final = 1 << 2

# KVM_CAP_DISABLE_QUIRKS2 (api.rst 7.31)
KVM_X86_QUIRK_LINT0_REENABLED: Final = 1 << 0
KVM_X86_QUIRK_CD_NW_CLEARED: Final = 1 << 1
KVM_X86_QUIRK_LAPIC_MMIO_HOLE: Final = 1 << 2
KVM_X86_QUIRK_OUT_7E_INC_RIP: Final = 1 << 3
KVM_X86_QUIRK_MISC_ENABLE_NO_MWAIT: Final = 1 << 4
KVM_X86_QUIRK_FIX_HYPERCALL_INSN: Final = 1 << 5
KVM_X86_QUIRK_MWAIT_NEVER_UD_FAULTS: Final = 1 << 6
KVM_X86_QUIRK_SLOT_ZAP_ALL: Final = 1 << 7
KVM_X86_QUIRK_STUFF_FEATURE_MSRS: Final = 1 << 8
KVM_X86_QUIRK_IGNORE_GUEST_PAT: Final = 1 << 9
KVM_X86_QUIRK_VMCS12_ALLOW_FREEZE_IN_SMM: Final = 1 << 10
KVM_X86_QUIRK_NESTED_SVM_SHARED_PAT: Final = 1 << 11

# kvm_device_attr of /dev/kvm itself (KVM_CAP_SYS_ATTRIBUTES)
KVM_X86_GRP_SYSTEM: Final = 0
KVM_X86_XCOMP_GUEST_SUPP: Final = 0
KVM_X86_GRP_SEV: Final = 1
KVM_X86_SEV_VMSA_FEATURES: Final = 0
KVM_X86_SNP_POLICY_BITS: Final = 1
KVM_X86_SEV_SNP_REQ_CERTS: Final = 2

# --- asm/kvm.h: nested virtualization (api.rst 4.114) -----------------------------------------------------------------

KVM_STATE_NESTED_FORMAT_VMX: Final = 0
KVM_STATE_NESTED_FORMAT_SVM: Final = 1
KVM_STATE_NESTED_GUEST_MODE: Final = 0x00000001
KVM_STATE_NESTED_RUN_PENDING: Final = 0x00000002
KVM_STATE_NESTED_EVMCS: Final = 0x00000004
KVM_STATE_NESTED_MTF_PENDING: Final = 0x00000008
KVM_STATE_NESTED_GIF_SET: Final = 0x00000100
KVM_STATE_NESTED_SMM_GUEST_MODE: Final = 0x00000001
KVM_STATE_NESTED_SMM_VMXON: Final = 0x00000002
KVM_STATE_NESTED_VMX_VMCS_SIZE: Final = 0x1000
KVM_STATE_NESTED_SVM_VMCB_SIZE: Final = 0x1000
KVM_STATE_VMX_PREEMPTION_TIMER_DEADLINE: Final = 0x00000001


@_layout
class kvm_vmx_nested_state_data(Structure):
    vmcs12: Annotated[U8s, KVM_STATE_NESTED_VMX_VMCS_SIZE]
    shadow_vmcs12: Annotated[U8s, KVM_STATE_NESTED_VMX_VMCS_SIZE]


@_layout
class kvm_vmx_nested_state_hdr_smm(Structure):
    flags: U16


@_layout
class kvm_vmx_nested_state_hdr(Structure):
    vmxon_pa: U64
    vmcs12_pa: U64
    smm: kvm_vmx_nested_state_hdr_smm
    pad: U16
    flags: U32
    preemption_timer_deadline: U64


@_layout
class kvm_svm_nested_state_data(Structure):
    vmcb12: Annotated[U8s, KVM_STATE_NESTED_SVM_VMCB_SIZE]


@_layout
class kvm_svm_nested_state_hdr(Structure):
    vmcb_pa: U64
    gpat: U64


@_layout
class kvm_nested_state_hdr(Union):
    vmx: kvm_vmx_nested_state_hdr
    svm: kvm_svm_nested_state_hdr
    pad: Annotated[U8s, 120]


@_layout
class kvm_nested_state_data(Union):
    vmx: Annotated[Array[kvm_vmx_nested_state_data], 0]
    svm: Annotated[Array[kvm_svm_nested_state_data], 0]


@_layout
class kvm_nested_state(Structure):
    """KVM_GET_NESTED_STATE, KVM_SET_NESTED_STATE: make one with `nested_state()`."""

    flags: U16
    format: U16
    size: U32
    hdr: kvm_nested_state_hdr
    data: kvm_nested_state_data


# --- asm/kvm.h: Xen (api.rst 4.28, 4.126 to 4.129, 8.30) --------------------------------------------------------------

KVM_XEN_HVM_CONFIG_HYPERCALL_MSR: Final = 1 << 0
KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL: Final = 1 << 1
KVM_XEN_HVM_CONFIG_SHARED_INFO: Final = 1 << 2
KVM_XEN_HVM_CONFIG_RUNSTATE: Final = 1 << 3
KVM_XEN_HVM_CONFIG_EVTCHN_2LEVEL: Final = 1 << 4
KVM_XEN_HVM_CONFIG_EVTCHN_SEND: Final = 1 << 5
KVM_XEN_HVM_CONFIG_RUNSTATE_UPDATE_FLAG: Final = 1 << 6
KVM_XEN_HVM_CONFIG_PVCLOCK_TSC_UNSTABLE: Final = 1 << 7
KVM_XEN_HVM_CONFIG_SHARED_INFO_HVA: Final = 1 << 8
KVM_XEN_MSR_MIN_INDEX: Final = 0x40000000
KVM_XEN_MSR_MAX_INDEX: Final = 0x4FFFFFFF
KVM_XEN_INVALID_GFN: Final = 0xFFFFFFFFFFFFFFFF
KVM_XEN_INVALID_GPA: Final = 0xFFFFFFFFFFFFFFFF
KVM_XEN_EVTCHN_DEASSIGN: Final = 1 << 0
KVM_XEN_EVTCHN_UPDATE: Final = 1 << 1
KVM_XEN_EVTCHN_RESET: Final = 1 << 2

KVM_XEN_ATTR_TYPE_LONG_MODE: Final = 0x0
KVM_XEN_ATTR_TYPE_SHARED_INFO: Final = 0x1
KVM_XEN_ATTR_TYPE_UPCALL_VECTOR: Final = 0x2
KVM_XEN_ATTR_TYPE_EVTCHN: Final = 0x3
KVM_XEN_ATTR_TYPE_XEN_VERSION: Final = 0x4
KVM_XEN_ATTR_TYPE_RUNSTATE_UPDATE_FLAG: Final = 0x5
KVM_XEN_ATTR_TYPE_SHARED_INFO_HVA: Final = 0x6

KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO: Final = 0x0
KVM_XEN_VCPU_ATTR_TYPE_VCPU_TIME_INFO: Final = 0x1
KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_ADDR: Final = 0x2
KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_CURRENT: Final = 0x3
KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_DATA: Final = 0x4
KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_ADJUST: Final = 0x5
KVM_XEN_VCPU_ATTR_TYPE_VCPU_ID: Final = 0x6
KVM_XEN_VCPU_ATTR_TYPE_TIMER: Final = 0x7
KVM_XEN_VCPU_ATTR_TYPE_UPCALL_VECTOR: Final = 0x8
KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO_HVA: Final = 0x9


@_layout
class kvm_xen_hvm_config(Structure):
    flags: U32
    msr: U32
    blob_addr_32: U64
    blob_addr_64: U64
    blob_size_32: U8
    blob_size_64: U8
    pad2: Annotated[U8s, 30]


@_layout
class kvm_xen_hvm_attr_u_shared_info(Union):
    gfn: U64
    hva: U64


@_layout
class kvm_xen_hvm_attr_u_evtchn_deliver_port(Structure):
    port: U32
    vcpu: U32
    priority: U32


@_layout
class kvm_xen_hvm_attr_u_evtchn_deliver_eventfd(Structure):
    port: U32
    fd: S32


@_layout
class kvm_xen_hvm_attr_u_evtchn_deliver(Union):
    port: kvm_xen_hvm_attr_u_evtchn_deliver_port
    eventfd: kvm_xen_hvm_attr_u_evtchn_deliver_eventfd
    padding: Annotated[U32s, 4]


@_layout
class kvm_xen_hvm_attr_u_evtchn(Structure):
    send_port: U32
    type: U32
    flags: U32
    deliver: kvm_xen_hvm_attr_u_evtchn_deliver


@_layout
class kvm_xen_hvm_attr_u(Union):
    long_mode: U8
    vector: U8
    runstate_update_flag: U8
    shared_info: kvm_xen_hvm_attr_u_shared_info
    evtchn: kvm_xen_hvm_attr_u_evtchn
    xen_version: U32
    pad: Annotated[U64s, 8]


@_layout
class kvm_xen_hvm_attr(Structure):
    type: U16
    pad: Annotated[Array[c_uint16], 3]
    u: kvm_xen_hvm_attr_u


@_layout
class kvm_xen_vcpu_attr_u_runstate(Structure):
    state: U64
    state_entry_time: U64
    time_running: U64
    time_runnable: U64
    time_blocked: U64
    time_offline: U64


@_layout
class kvm_xen_vcpu_attr_u_timer(Structure):
    port: U32
    priority: U32
    expires_ns: U64


@_layout
class kvm_xen_vcpu_attr_u(Union):
    gpa: U64
    hva: U64
    pad: Annotated[U64s, 8]
    runstate: kvm_xen_vcpu_attr_u_runstate
    vcpu_id: U32
    timer: kvm_xen_vcpu_attr_u_timer
    vector: U8


@_layout
class kvm_xen_vcpu_attr(Structure):
    type: U16
    pad: Annotated[Array[c_uint16], 3]
    u: kvm_xen_vcpu_attr_u


# --- asm/kvm.h: Hyper-V -----------------------------------------------------------------------------------------------


@_layout
class kvm_hyperv_eventfd(Structure):
    """KVM_HYPERV_EVENTFD (api.rst 4.113)."""

    conn_id: U32
    fd: S32
    flags: U32
    padding: Annotated[U32s, 3]


KVM_HYPERV_CONN_ID_MASK: Final = 0x00FFFFFF
KVM_HYPERV_EVENTFD_DEASSIGN: Final = 1 << 0

# --- asm/kvm.h: memory encryption, AMD (Documentation/virt/kvm/x86/amd-memory-encryption.rst) -------------------------

KVM_SEV_INIT: Final = 0
KVM_SEV_ES_INIT: Final = 1
KVM_SEV_LAUNCH_START: Final = 2
KVM_SEV_LAUNCH_UPDATE_DATA: Final = 3
KVM_SEV_LAUNCH_UPDATE_VMSA: Final = 4
KVM_SEV_LAUNCH_SECRET: Final = 5
KVM_SEV_LAUNCH_MEASURE: Final = 6
KVM_SEV_LAUNCH_FINISH: Final = 7
KVM_SEV_SEND_START: Final = 8
KVM_SEV_SEND_UPDATE_DATA: Final = 9
KVM_SEV_SEND_UPDATE_VMSA: Final = 10
KVM_SEV_SEND_FINISH: Final = 11
KVM_SEV_RECEIVE_START: Final = 12
KVM_SEV_RECEIVE_UPDATE_DATA: Final = 13
KVM_SEV_RECEIVE_UPDATE_VMSA: Final = 14
KVM_SEV_RECEIVE_FINISH: Final = 15
KVM_SEV_GUEST_STATUS: Final = 16
KVM_SEV_DBG_DECRYPT: Final = 17
KVM_SEV_DBG_ENCRYPT: Final = 18
KVM_SEV_CERT_EXPORT: Final = 19
KVM_SEV_GET_ATTESTATION_REPORT: Final = 20
KVM_SEV_SEND_CANCEL: Final = 21
KVM_SEV_INIT2: Final = 22
KVM_SEV_SNP_LAUNCH_START: Final = 100
KVM_SEV_SNP_LAUNCH_UPDATE: Final = 101
KVM_SEV_SNP_LAUNCH_FINISH: Final = 102
KVM_SEV_SNP_ENABLE_REQ_CERTS: Final = 103
KVM_SEV_NR_MAX: Final = 104

KVM_SEV_PAGE_TYPE_INVALID: Final = 0x0
KVM_SEV_SNP_PAGE_TYPE_NORMAL: Final = 0x1
KVM_SEV_SNP_PAGE_TYPE_ZERO: Final = 0x3
KVM_SEV_SNP_PAGE_TYPE_UNMEASURED: Final = 0x4
KVM_SEV_SNP_PAGE_TYPE_SECRETS: Final = 0x5
KVM_SEV_SNP_PAGE_TYPE_CPUID: Final = 0x6
KVM_SEV_SNP_ID_BLOCK_SIZE: Final = 96
KVM_SEV_SNP_ID_AUTH_SIZE: Final = 4096
KVM_SEV_SNP_FINISH_DATA_SIZE: Final = 32


@_layout
class kvm_sev_cmd(Structure):
    id: U32
    pad0: U32
    data: U64
    error: U32
    sev_fd: U32


@_layout
class kvm_sev_init(Structure):
    vmsa_features: U64
    flags: U32
    ghcb_version: U16
    pad1: U16
    pad2: Annotated[U32s, 8]


@_layout
class kvm_sev_launch_start(Structure):
    handle: U32
    policy: U32
    dh_uaddr: U64
    dh_len: U32
    pad0: U32
    session_uaddr: U64
    session_len: U32
    pad1: U32


@_layout
class kvm_sev_launch_update_data(Structure):
    uaddr: U64
    len: U32
    pad0: U32


@_layout
class kvm_sev_launch_secret(Structure):
    hdr_uaddr: U64
    hdr_len: U32
    pad0: U32
    guest_uaddr: U64
    guest_len: U32
    pad1: U32
    trans_uaddr: U64
    trans_len: U32
    pad2: U32


@_layout
class kvm_sev_launch_measure(Structure):
    uaddr: U64
    len: U32
    pad0: U32


@_layout
class kvm_sev_guest_status(Structure):
    handle: U32
    policy: U32
    state: U32


@_layout
class kvm_sev_dbg(Structure):
    src_uaddr: U64
    dst_uaddr: U64
    len: U32
    pad0: U32


@_layout
class kvm_sev_attestation_report(Structure):
    mnonce: Annotated[U8s, 16]
    uaddr: U64
    len: U32
    pad0: U32


@_layout
class kvm_sev_send_start(Structure):
    policy: U32
    pad0: U32
    pdh_cert_uaddr: U64
    pdh_cert_len: U32
    pad1: U32
    plat_certs_uaddr: U64
    plat_certs_len: U32
    pad2: U32
    amd_certs_uaddr: U64
    amd_certs_len: U32
    pad3: U32
    session_uaddr: U64
    session_len: U32
    pad4: U32


@_layout
class kvm_sev_send_update_data(Structure):
    hdr_uaddr: U64
    hdr_len: U32
    pad0: U32
    guest_uaddr: U64
    guest_len: U32
    pad1: U32
    trans_uaddr: U64
    trans_len: U32
    pad2: U32


@_layout
class kvm_sev_receive_start(Structure):
    handle: U32
    policy: U32
    pdh_uaddr: U64
    pdh_len: U32
    pad0: U32
    session_uaddr: U64
    session_len: U32
    pad1: U32


@_layout
class kvm_sev_receive_update_data(Structure):
    hdr_uaddr: U64
    hdr_len: U32
    pad0: U32
    guest_uaddr: U64
    guest_len: U32
    pad1: U32
    trans_uaddr: U64
    trans_len: U32
    pad2: U32


@_layout
class kvm_sev_snp_launch_start(Structure):
    policy: U64
    gosvw: Annotated[U8s, 16]
    flags: U16
    pad0: Annotated[U8s, 6]
    pad1: Annotated[U64s, 4]


@_layout
class kvm_sev_snp_launch_update(Structure):
    gfn_start: U64
    uaddr: U64
    len: U64
    type: U8
    pad0: U8
    flags: U16
    pad1: U32
    pad2: Annotated[U64s, 4]


@_layout
class kvm_sev_snp_launch_finish(Structure):
    id_block_uaddr: U64
    id_auth_uaddr: U64
    id_block_en: U8
    auth_key_en: U8
    vcek_disabled: U8
    host_data: Annotated[U8s, KVM_SEV_SNP_FINISH_DATA_SIZE]
    pad0: Annotated[U8s, 3]
    flags: U16
    pad1: Annotated[U64s, 4]


# --- asm/kvm.h: memory encryption, Intel (Documentation/virt/kvm/x86/intel-tdx.rst) -----------------------------------

KVM_TDX_CAPABILITIES: Final = 0
KVM_TDX_INIT_VM: Final = 1
KVM_TDX_INIT_VCPU: Final = 2
KVM_TDX_INIT_MEM_REGION: Final = 3
KVM_TDX_FINALIZE_VM: Final = 4
KVM_TDX_GET_CPUID: Final = 5
KVM_TDX_CMD_NR_MAX: Final = 6
KVM_TDX_MEASURE_MEMORY_REGION: Final = 1 << 0


@_layout
class kvm_tdx_cmd(Structure):
    id: U32
    flags: U32
    data: U64
    hw_error: U64


@_layout
class kvm_tdx_capabilities(Structure):
    supported_attrs: U64
    supported_xfam: U64
    kernel_tdvmcallinfo_1_r11: U64
    user_tdvmcallinfo_1_r11: U64
    kernel_tdvmcallinfo_1_r12: U64
    user_tdvmcallinfo_1_r12: U64
    reserved: Annotated[U64s, 250]
    cpuid: kvm_cpuid2


@_layout
class kvm_tdx_init_vm(Structure):
    attributes: U64
    xfam: U64
    mrconfigid: Annotated[U64s, 6]
    mrowner: Annotated[U64s, 6]
    mrownerconfig: Annotated[U64s, 6]
    reserved: Annotated[U64s, 12]
    cpuid: kvm_cpuid2


@_layout
class kvm_tdx_init_mem_region(Structure):
    source_addr: U64
    gpa: U64
    nr_pages: U64


# --- linux/kvm.h: memory ----------------------------------------------------------------------------------------------

KVM_API_VERSION: Final = 12


@_layout
class kvm_userspace_memory_region(Structure):
    """KVM_SET_USER_MEMORY_REGION (api.rst 4.35). A size of 0 deletes the slot."""

    slot: U32
    flags: U32
    guest_phys_addr: U64
    memory_size: U64
    userspace_addr: U64


@_layout
class kvm_userspace_memory_region2(Structure):
    """KVM_SET_USER_MEMORY_REGION2 (api.rst 4.140)."""

    slot: U32
    flags: U32
    guest_phys_addr: U64
    memory_size: U64
    userspace_addr: U64
    guest_memfd_offset: U64
    guest_memfd: U32
    pad1: U32
    pad2: Annotated[U64s, 14]


KVM_MEM_LOG_DIRTY_PAGES: Final = 1 << 0
KVM_MEM_READONLY: Final = 1 << 1
KVM_MEM_GUEST_MEMFD: Final = 1 << 2


@_layout
class kvm_memory_attributes(Structure):
    """KVM_SET_MEMORY_ATTRIBUTES (api.rst 4.141)."""

    address: U64
    size: U64
    attributes: U64
    flags: U64


KVM_MEMORY_ATTRIBUTE_PRIVATE: Final = 1 << 3


@_layout
class kvm_create_guest_memfd(Structure):
    """KVM_CREATE_GUEST_MEMFD (api.rst 4.142)."""

    size: U64
    flags: U64
    reserved: Annotated[U64s, 6]


GUEST_MEMFD_FLAG_MMAP: Final = 1 << 0
GUEST_MEMFD_FLAG_INIT_SHARED: Final = 1 << 1


@_layout
class kvm_pre_fault_memory(Structure):
    """KVM_PRE_FAULT_MEMORY (api.rst 4.143)."""

    gpa: U64
    size: U64
    flags: U64
    padding: Annotated[U64s, 5]


@_layout
class kvm_enc_region(Structure):
    """KVM_MEMORY_ENCRYPT_REG_REGION, KVM_MEMORY_ENCRYPT_UNREG_REGION (api.rst 4.111)."""

    addr: U64
    size: U64


@_layout
class kvm_translation(Structure):
    """KVM_TRANSLATE (api.rst 4.15)."""

    linear_address: U64
    physical_address: U64
    valid: U8
    writeable: U8
    usermode: U8
    pad: Annotated[U8s, 5]


@_layout
class kvm_dirty_log(Structure):
    """KVM_GET_DIRTY_LOG (api.rst 4.8)."""

    slot: U32
    padding1: U32
    dirty_bitmap: Annotated[U64, UNION]  # address
    padding2: Annotated[U64, UNION]


@_layout
class kvm_clear_dirty_log(Structure):
    """KVM_CLEAR_DIRTY_LOG (api.rst 4.117)."""

    slot: U32
    num_pages: U32
    first_page: U64
    dirty_bitmap: Annotated[U64, UNION]  # address
    padding2: Annotated[U64, UNION]


KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE: Final = 1 << 0
KVM_DIRTY_LOG_INITIALLY_SET: Final = 1 << 1

KVM_DIRTY_GFN_F_DIRTY: Final = 1 << 0
KVM_DIRTY_GFN_F_RESET: Final = 1 << 1
KVM_DIRTY_GFN_F_MASK: Final = 0x3


@_layout
class kvm_dirty_gfn(Structure):
    """One entry of a vCPU's dirty ring, mapped at KVM_DIRTY_LOG_PAGE_OFFSET (api.rst 7.36)."""

    flags: U32
    slot: U32
    offset: U64


@_layout
class kvm_coalesced_mmio_zone(Structure):
    """KVM_REGISTER_COALESCED_MMIO, KVM_UNREGISTER_COALESCED_MMIO (api.rst 4.116)."""

    addr: U64
    size: U32
    pad: Annotated[U32, UNION]
    pio: Annotated[U32, UNION]


@_layout
class kvm_coalesced_mmio(Structure):
    phys_addr: U64
    len: U32
    pad: Annotated[U32, UNION]
    pio: Annotated[U32, UNION]
    data: Annotated[U8s, 8]


@_layout
class kvm_coalesced_mmio_ring(Structure):
    """The page at KVM_COALESCED_MMIO_PAGE_OFFSET of the vCPU's mapping."""

    first: U32
    last: U32
    coalesced_mmio: Annotated[Array[kvm_coalesced_mmio], 0]


KVM_COALESCED_MMIO_MAX: Final = (4096 - ctypes.sizeof(kvm_coalesced_mmio_ring)) // ctypes.sizeof(kvm_coalesced_mmio)

# --- linux/kvm.h: interrupts, timers, eventfds ------------------------------------------------------------------------


@_layout
class kvm_irq_level(Structure):
    """KVM_IRQ_LINE, KVM_IRQ_LINE_STATUS (api.rst 4.25)."""

    irq: Annotated[U32, UNION]
    status: Annotated[S32, UNION]
    level: U32


@_layout
class kvm_irqchip_chip(Union):
    dummy: Annotated[U8s, 512]
    pic: kvm_pic_state
    ioapic: kvm_ioapic_state


@_layout
class kvm_irqchip(Structure):
    """KVM_GET_IRQCHIP, KVM_SET_IRQCHIP (api.rst 4.26)."""

    chip_id: U32
    pad: U32
    chip: kvm_irqchip_chip


@_layout
class kvm_pit_config(Structure):
    """KVM_CREATE_PIT2 (api.rst 4.71)."""

    flags: U32
    pad: Annotated[U32s, 15]


KVM_PIT_SPEAKER_DUMMY: Final = 1


@_layout
class kvm_interrupt(Structure):
    """KVM_INTERRUPT (api.rst 4.16)."""

    irq: U32


@_layout
class kvm_msi(Structure):
    """KVM_SIGNAL_MSI (api.rst 4.71)."""

    address_lo: U32
    address_hi: U32
    data: U32
    flags: U32
    devid: U32
    pad: Annotated[U8s, 12]


KVM_MSI_VALID_DEVID: Final = 1 << 0


@_layout
class kvm_irq_routing_irqchip(Structure):
    irqchip: U32
    pin: U32


@_layout
class kvm_irq_routing_msi(Structure):
    address_lo: U32
    address_hi: U32
    data: U32
    pad: Annotated[U32, UNION]
    devid: Annotated[U32, UNION]


@_layout
class kvm_irq_routing_s390_adapter(Structure):
    ind_addr: U64
    summary_addr: U64
    ind_offset: U64
    summary_offset: U32
    adapter_id: U32


@_layout
class kvm_irq_routing_hv_sint(Structure):
    vcpu: U32
    sint: U32


@_layout
class kvm_irq_routing_xen_evtchn(Structure):
    """Also KVM_XEN_HVM_EVTCHN_SEND (api.rst 4.135)."""

    port: U32
    vcpu: U32
    priority: U32


KVM_IRQ_ROUTING_XEN_EVTCHN_PRIO_2LEVEL: Final = 0xFFFFFFFF
KVM_IRQ_ROUTING_IRQCHIP: Final = 1
KVM_IRQ_ROUTING_MSI: Final = 2
KVM_IRQ_ROUTING_S390_ADAPTER: Final = 3
KVM_IRQ_ROUTING_HV_SINT: Final = 4
KVM_IRQ_ROUTING_XEN_EVTCHN: Final = 5


@_layout
class kvm_irq_routing_entry_u(Union):
    irqchip: kvm_irq_routing_irqchip
    msi: kvm_irq_routing_msi
    adapter: kvm_irq_routing_s390_adapter
    hv_sint: kvm_irq_routing_hv_sint
    xen_evtchn: kvm_irq_routing_xen_evtchn
    pad: Annotated[U32s, 8]


@_layout
class kvm_irq_routing_entry(Structure):
    gsi: U32
    type: U32
    flags: U32
    pad: U32
    u: kvm_irq_routing_entry_u


@_layout
class kvm_irq_routing(Structure):
    """KVM_SET_GSI_ROUTING (api.rst 4.52): make one with `irq_routing(n)`."""

    nr: U32
    flags: U32
    entries: Annotated[Array[kvm_irq_routing_entry], 0]


KVM_IRQFD_FLAG_DEASSIGN: Final = 1 << 0
KVM_IRQFD_FLAG_RESAMPLE: Final = 1 << 1


@_layout
class kvm_irqfd(Structure):
    """KVM_IRQFD (api.rst 4.75)."""

    fd: U32
    gsi: U32
    flags: U32
    resamplefd: U32
    pad: Annotated[U8s, 16]


kvm_ioeventfd_flag_nr_datamatch: Final = 0
kvm_ioeventfd_flag_nr_pio: Final = 1
kvm_ioeventfd_flag_nr_deassign: Final = 2
kvm_ioeventfd_flag_nr_virtio_ccw_notify: Final = 3
kvm_ioeventfd_flag_nr_fast_mmio: Final = 4
kvm_ioeventfd_flag_nr_max: Final = 5
KVM_IOEVENTFD_FLAG_DATAMATCH: Final = 1 << kvm_ioeventfd_flag_nr_datamatch
KVM_IOEVENTFD_FLAG_PIO: Final = 1 << kvm_ioeventfd_flag_nr_pio
KVM_IOEVENTFD_FLAG_DEASSIGN: Final = 1 << kvm_ioeventfd_flag_nr_deassign
KVM_IOEVENTFD_FLAG_VIRTIO_CCW_NOTIFY: Final = 1 << kvm_ioeventfd_flag_nr_virtio_ccw_notify
KVM_IOEVENTFD_VALID_FLAG_MASK: Final = (1 << kvm_ioeventfd_flag_nr_max) - 1


@_layout
class kvm_ioeventfd(Structure):
    """KVM_IOEVENTFD (api.rst 4.59)."""

    datamatch: U64
    addr: U64
    len: U32
    fd: S32
    flags: U32
    pad: Annotated[U8s, 36]


# Do not use 1: KVM_CHECK_EXTENSION returned it before there were flags.
KVM_CLOCK_TSC_STABLE: Final = 2
KVM_CLOCK_REALTIME: Final = 1 << 2
KVM_CLOCK_HOST_TSC: Final = 1 << 3


@_layout
class kvm_clock_data(Structure):
    """KVM_GET_CLOCK, KVM_SET_CLOCK (api.rst 4.29)."""

    clock: U64
    flags: U32
    pad0: U32
    realtime: U64
    host_tsc: U64
    pad: Annotated[U32s, 4]


@_layout
class kvm_tpr_access_ctl(Structure):
    """KVM_TPR_ACCESS_REPORTING."""

    enabled: U32
    flags: U32
    reserved: Annotated[U32s, 8]


@_layout
class kvm_vapic_addr(Structure):
    """KVM_SET_VAPIC_ADDR."""

    vapic_addr: U64


# --- linux/kvm.h: vCPU control, ONE_REG, capabilities, devices, statistics --------------------------------------------


@_layout
class kvm_signal_mask(Structure):
    """KVM_SET_SIGNAL_MASK (api.rst 4.21): make one with `signal_mask(n)`, n being the kernel's 8 bytes."""

    len: U32
    sigset: Annotated[U8s, 0]


KVM_MP_STATE_RUNNABLE: Final = 0
KVM_MP_STATE_UNINITIALIZED: Final = 1
KVM_MP_STATE_INIT_RECEIVED: Final = 2
KVM_MP_STATE_HALTED: Final = 3
KVM_MP_STATE_SIPI_RECEIVED: Final = 4
KVM_MP_STATE_STOPPED: Final = 5
KVM_MP_STATE_CHECK_STOP: Final = 6
KVM_MP_STATE_OPERATING: Final = 7
KVM_MP_STATE_LOAD: Final = 8
KVM_MP_STATE_AP_RESET_HOLD: Final = 9
KVM_MP_STATE_SUSPENDED: Final = 10
MP_STATE_NAMES: Final = _names("KVM_MP_STATE_")


@_layout
class kvm_mp_state(Structure):
    """KVM_GET_MP_STATE, KVM_SET_MP_STATE (api.rst 4.38)."""

    mp_state: U32


KVM_GUESTDBG_ENABLE: Final = 0x00000001
KVM_GUESTDBG_SINGLESTEP: Final = 0x00000002


@_layout
class kvm_guest_debug(Structure):
    """KVM_SET_GUEST_DEBUG (api.rst 4.87)."""

    control: U32
    pad: U32
    arch: kvm_guest_debug_arch


@_layout
class kvm_enable_cap(Structure):
    """KVM_ENABLE_CAP (api.rst 4.37)."""

    cap: U32
    flags: U32
    args: Annotated[U64s, 4]
    pad: Annotated[U8s, 64]


# KVM_CAP_X86_DISABLE_EXITS (api.rst 7.13)
KVM_X86_DISABLE_EXITS_MWAIT: Final = 1 << 0
KVM_X86_DISABLE_EXITS_HLT: Final = 1 << 1
KVM_X86_DISABLE_EXITS_PAUSE: Final = 1 << 2
KVM_X86_DISABLE_EXITS_CSTATE: Final = 1 << 3
KVM_X86_DISABLE_EXITS_APERFMPERF: Final = 1 << 4

# KVM_CAP_X86_BUS_LOCK_EXIT, KVM_CAP_PMU_CAPABILITY, KVM_CAP_X86_NOTIFY_VMEXIT (api.rst 7.22, 7.37, 7.33)
KVM_BUS_LOCK_DETECTION_OFF: Final = 1 << 0
KVM_BUS_LOCK_DETECTION_EXIT: Final = 1 << 1
KVM_PMU_CAP_DISABLE: Final = 1 << 0
KVM_X86_NOTIFY_VMEXIT_ENABLED: Final = 1 << 0
KVM_X86_NOTIFY_VMEXIT_USER: Final = 1 << 1

KVM_REG_ARCH_MASK: Final = 0xFF00000000000000
KVM_REG_GENERIC: Final = 0x0000000000000000
KVM_REG_X86: Final = 0x2000000000000000
KVM_REG_SIZE_SHIFT: Final = 52
KVM_REG_SIZE_MASK: Final = 0x00F0000000000000
KVM_REG_SIZE_U8: Final = 0x0000000000000000
KVM_REG_SIZE_U16: Final = 0x0010000000000000
KVM_REG_SIZE_U32: Final = 0x0020000000000000
KVM_REG_SIZE_U64: Final = 0x0030000000000000
KVM_REG_SIZE_U128: Final = 0x0040000000000000
KVM_REG_SIZE_U256: Final = 0x0050000000000000
KVM_REG_SIZE_U512: Final = 0x0060000000000000
KVM_REG_SIZE_U1024: Final = 0x0070000000000000
KVM_REG_SIZE_U2048: Final = 0x0080000000000000


@_layout
class kvm_one_reg(Structure):
    """KVM_GET_ONE_REG, KVM_SET_ONE_REG (api.rst 4.68): `addr` is where the value is."""

    id: U64
    addr: U64


@_layout
class kvm_reg_list(Structure):
    """KVM_GET_REG_LIST (api.rst 4.84): make one with `reg_list(n)`."""

    n: U64
    reg: Annotated[U64s, 0]


KVM_CREATE_DEVICE_TEST: Final = 1
KVM_DEV_VFIO_FILE: Final = 1
KVM_DEV_VFIO_FILE_ADD: Final = 1
KVM_DEV_VFIO_FILE_DEL: Final = 2
KVM_DEV_VFIO_GROUP: Final = KVM_DEV_VFIO_FILE
KVM_DEV_VFIO_GROUP_ADD: Final = KVM_DEV_VFIO_FILE_ADD
KVM_DEV_VFIO_GROUP_DEL: Final = KVM_DEV_VFIO_FILE_DEL
KVM_DEV_TYPE_VFIO: Final = 4


@_layout
class kvm_create_device(Structure):
    """KVM_CREATE_DEVICE (api.rst 4.79)."""

    type: U32
    fd: U32
    flags: U32


@_layout
class kvm_device_attr(Structure):
    """KVM_SET_DEVICE_ATTR, KVM_GET_DEVICE_ATTR, KVM_HAS_DEVICE_ATTR (api.rst 4.80)."""

    flags: U32
    group: U32
    attr: U64
    addr: U64


@_layout
class kvm_stats_header(Structure):
    """The start of what a KVM_GET_STATS_FD descriptor reads (api.rst 4.133)."""

    flags: U32
    name_size: U32
    num_desc: U32
    id_offset: U32
    desc_offset: U32
    data_offset: U32


@_layout
class kvm_stats_desc(Structure):
    """One statistic: make one with `flexible(kvm_stats_desc, name_size)`."""

    flags: U32
    exponent: S16
    size: U16
    offset: U32
    bucket_size: U32
    name: Annotated[U8s, 0]


KVM_STATS_TYPE_SHIFT: Final = 0
KVM_STATS_TYPE_MASK: Final = 0xF << KVM_STATS_TYPE_SHIFT
KVM_STATS_TYPE_CUMULATIVE: Final = 0x0 << KVM_STATS_TYPE_SHIFT
KVM_STATS_TYPE_INSTANT: Final = 0x1 << KVM_STATS_TYPE_SHIFT
KVM_STATS_TYPE_PEAK: Final = 0x2 << KVM_STATS_TYPE_SHIFT
KVM_STATS_TYPE_LINEAR_HIST: Final = 0x3 << KVM_STATS_TYPE_SHIFT
KVM_STATS_TYPE_LOG_HIST: Final = 0x4 << KVM_STATS_TYPE_SHIFT
KVM_STATS_TYPE_MAX: Final = KVM_STATS_TYPE_LOG_HIST
KVM_STATS_UNIT_SHIFT: Final = 4
KVM_STATS_UNIT_MASK: Final = 0xF << KVM_STATS_UNIT_SHIFT
KVM_STATS_UNIT_NONE: Final = 0x0 << KVM_STATS_UNIT_SHIFT
KVM_STATS_UNIT_BYTES: Final = 0x1 << KVM_STATS_UNIT_SHIFT
KVM_STATS_UNIT_SECONDS: Final = 0x2 << KVM_STATS_UNIT_SHIFT
KVM_STATS_UNIT_CYCLES: Final = 0x3 << KVM_STATS_UNIT_SHIFT
KVM_STATS_UNIT_BOOLEAN: Final = 0x4 << KVM_STATS_UNIT_SHIFT
KVM_STATS_UNIT_MAX: Final = KVM_STATS_UNIT_BOOLEAN
KVM_STATS_BASE_SHIFT: Final = 8
KVM_STATS_BASE_MASK: Final = 0xF << KVM_STATS_BASE_SHIFT
KVM_STATS_BASE_POW10: Final = 0x0 << KVM_STATS_BASE_SHIFT
KVM_STATS_BASE_POW2: Final = 0x1 << KVM_STATS_BASE_SHIFT
KVM_STATS_BASE_MAX: Final = KVM_STATS_BASE_POW2

# --- linux/kvm.h: why KVM_RUN returned (api.rst 5) --------------------------------------------------------------------

KVM_EXIT_UNKNOWN: Final = 0
KVM_EXIT_EXCEPTION: Final = 1
KVM_EXIT_IO: Final = 2
KVM_EXIT_HYPERCALL: Final = 3
KVM_EXIT_DEBUG: Final = 4
KVM_EXIT_HLT: Final = 5
KVM_EXIT_MMIO: Final = 6
KVM_EXIT_IRQ_WINDOW_OPEN: Final = 7
KVM_EXIT_SHUTDOWN: Final = 8
KVM_EXIT_FAIL_ENTRY: Final = 9
KVM_EXIT_INTR: Final = 10
KVM_EXIT_SET_TPR: Final = 11
KVM_EXIT_TPR_ACCESS: Final = 12
KVM_EXIT_S390_SIEIC: Final = 13
KVM_EXIT_S390_RESET: Final = 14
KVM_EXIT_DCR: Final = 15
KVM_EXIT_NMI: Final = 16
KVM_EXIT_INTERNAL_ERROR: Final = 17
KVM_EXIT_OSI: Final = 18
KVM_EXIT_PAPR_HCALL: Final = 19
KVM_EXIT_S390_UCONTROL: Final = 20
KVM_EXIT_WATCHDOG: Final = 21
KVM_EXIT_S390_TSCH: Final = 22
KVM_EXIT_EPR: Final = 23
KVM_EXIT_SYSTEM_EVENT: Final = 24
KVM_EXIT_S390_STSI: Final = 25
KVM_EXIT_IOAPIC_EOI: Final = 26
KVM_EXIT_HYPERV: Final = 27
KVM_EXIT_ARM_NISV: Final = 28
KVM_EXIT_X86_RDMSR: Final = 29
KVM_EXIT_X86_WRMSR: Final = 30
KVM_EXIT_DIRTY_RING_FULL: Final = 31
KVM_EXIT_AP_RESET_HOLD: Final = 32
KVM_EXIT_X86_BUS_LOCK: Final = 33
KVM_EXIT_XEN: Final = 34
KVM_EXIT_RISCV_SBI: Final = 35
KVM_EXIT_RISCV_CSR: Final = 36
KVM_EXIT_NOTIFY: Final = 37
KVM_EXIT_LOONGARCH_IOCSR: Final = 38
KVM_EXIT_MEMORY_FAULT: Final = 39
KVM_EXIT_TDX: Final = 40
KVM_EXIT_ARM_SEA: Final = 41
KVM_EXIT_ARM_LDST64B: Final = 42
KVM_EXIT_SNP_REQ_CERTS: Final = 43
EXIT_NAMES: Final = _names("KVM_EXIT_")

# What the members of the exit union hold
KVM_EXIT_IO_IN: Final = 0
KVM_EXIT_IO_OUT: Final = 1
KVM_EXIT_HYPERV_SYNIC: Final = 1
KVM_EXIT_HYPERV_HCALL: Final = 2
KVM_EXIT_HYPERV_SYNDBG: Final = 3
KVM_EXIT_XEN_HCALL: Final = 1
KVM_EXIT_HYPERCALL_LONG_MODE: Final = 1 << 0
KVM_EXIT_ARM_SEA_FLAG_GPA_VALID: Final = 1 << 0

KVM_INTERNAL_ERROR_EMULATION: Final = 1
KVM_INTERNAL_ERROR_SIMUL_EX: Final = 2
KVM_INTERNAL_ERROR_DELIVERY_EV: Final = 3
KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON: Final = 4
INTERNAL_ERROR_NAMES: Final = _names("KVM_INTERNAL_ERROR_")
KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES: Final = 1 << 0

KVM_SYSTEM_EVENT_SHUTDOWN: Final = 1
KVM_SYSTEM_EVENT_RESET: Final = 2
KVM_SYSTEM_EVENT_CRASH: Final = 3
KVM_SYSTEM_EVENT_WAKEUP: Final = 4
KVM_SYSTEM_EVENT_SUSPEND: Final = 5
KVM_SYSTEM_EVENT_SEV_TERM: Final = 6
KVM_SYSTEM_EVENT_TDX_FATAL: Final = 7
SYSTEM_EVENT_NAMES: Final = _names("KVM_SYSTEM_EVENT_")

KVM_MSR_EXIT_REASON_INVAL: Final = 1 << 0
KVM_MSR_EXIT_REASON_UNKNOWN: Final = 1 << 1
KVM_MSR_EXIT_REASON_FILTER: Final = 1 << 2
KVM_MSR_EXIT_REASON_VALID_MASK: Final = (
    KVM_MSR_EXIT_REASON_INVAL | KVM_MSR_EXIT_REASON_UNKNOWN | KVM_MSR_EXIT_REASON_FILTER
)
KVM_NOTIFY_CONTEXT_INVALID: Final = 1 << 0
KVM_MEMORY_EXIT_FLAG_PRIVATE: Final = 1 << 3


@_layout
class kvm_hyperv_exit_u_synic(Structure):
    msr: U32
    pad2: U32
    control: U64
    evt_page: U64
    msg_page: U64


@_layout
class kvm_hyperv_exit_u_hcall(Structure):
    input: U64
    result: U64
    params: Annotated[U64s, 2]


@_layout
class kvm_hyperv_exit_u_syndbg(Structure):
    msr: U32
    pad2: U32
    control: U64
    status: U64
    send_page: U64
    recv_page: U64
    pending_page: U64


@_layout
class kvm_hyperv_exit_u(Union):
    synic: kvm_hyperv_exit_u_synic
    hcall: kvm_hyperv_exit_u_hcall
    syndbg: kvm_hyperv_exit_u_syndbg


@_layout
class kvm_hyperv_exit(Structure):
    type: U32
    pad1: U32
    u: kvm_hyperv_exit_u


@_layout
class kvm_xen_exit_u_hcall(Structure):
    longmode: U32
    cpl: U32
    input: U64
    result: U64
    params: Annotated[U64s, 6]


@_layout
class kvm_xen_exit_u(Union):
    hcall: kvm_xen_exit_u_hcall


@_layout
class kvm_xen_exit(Structure):
    type: U32
    u: kvm_xen_exit_u


@_layout
class kvm_exit_snp_req_certs(Structure):
    gpa: U64
    npages: U64
    ret: U64


@_layout
class kvm_run_hw(Structure):
    hardware_exit_reason: U64


@_layout
class kvm_run_fail_entry(Structure):
    hardware_entry_failure_reason: U64
    cpu: U32


@_layout
class kvm_run_ex(Structure):
    exception: U32
    error_code: U32


@_layout
class kvm_run_io(Structure):
    direction: U8
    size: U8
    port: U16
    count: U32
    data_offset: U64


@_layout
class kvm_run_debug(Structure):
    arch: kvm_debug_exit_arch


@_layout
class kvm_run_mmio(Structure):
    phys_addr: U64
    data: Annotated[U8s, 8]
    len: U32
    is_write: U8


@_layout
class kvm_run_iocsr_io(Structure):
    phys_addr: U64
    data: Annotated[U8s, 8]
    len: U32
    is_write: U8


@_layout
class kvm_run_hypercall(Structure):
    nr: U64
    args: Annotated[U64s, 6]
    ret: U64
    longmode: Annotated[U32, UNION]
    flags: Annotated[U64, UNION]


@_layout
class kvm_run_tpr_access(Structure):
    rip: U64
    is_write: U32
    pad: U32


@_layout
class kvm_run_s390_sieic(Structure):
    icptcode: U8
    ipa: U16
    ipb: U32


@_layout
class kvm_run_s390_ucontrol(Structure):
    trans_exc_code: U64
    pgm_code: U32


@_layout
class kvm_run_dcr(Structure):
    dcrn: U32
    data: U32
    is_write: U8


@_layout
class kvm_run_internal(Structure):
    suberror: U32
    ndata: U32
    data: Annotated[U64s, 16]


@_layout
class kvm_run_emulation_failure(Structure):
    suberror: U32
    ndata: U32
    flags: U64
    insn_size: U8
    insn_bytes: Annotated[U8s, 15]


@_layout
class kvm_run_osi(Structure):
    gprs: Annotated[U64s, 32]


@_layout
class kvm_run_papr_hcall(Structure):
    nr: U64
    ret: U64
    args: Annotated[U64s, 9]


@_layout
class kvm_run_s390_tsch(Structure):
    subchannel_id: U16
    subchannel_nr: U16
    io_int_parm: U32
    io_int_word: U32
    ipb: U32
    dequeued: U8


@_layout
class kvm_run_epr(Structure):
    epr: U32


@_layout
class kvm_run_system_event(Structure):
    type: U32
    ndata: U32
    flags: Annotated[U64, UNION]
    data: Annotated[U64s, 16, UNION]


@_layout
class kvm_run_s390_stsi(Structure):
    addr: U64
    ar: U8
    reserved: U8
    fc: U8
    sel1: U8
    sel2: U16


@_layout
class kvm_run_eoi(Structure):
    vector: U8


@_layout
class kvm_run_arm_nisv(Structure):
    esr_iss: U64
    fault_ipa: U64


@_layout
class kvm_run_msr(Structure):
    error: U8
    pad: Annotated[U8s, 7]
    reason: U32
    index: U32
    data: U64


@_layout
class kvm_run_riscv_sbi(Structure):
    extension_id: U64
    function_id: U64
    args: Annotated[U64s, 6]
    ret: Annotated[U64s, 2]


@_layout
class kvm_run_riscv_csr(Structure):
    csr_num: U64
    new_value: U64
    write_mask: U64
    ret_value: U64


@_layout
class kvm_run_notify(Structure):
    flags: U32


@_layout
class kvm_run_memory_fault(Structure):
    flags: U64
    gpa: U64
    size: U64


@_layout
class kvm_run_tdx_unknown(Structure):
    ret: U64
    data: Annotated[U64s, 5]


@_layout
class kvm_run_tdx_get_quote(Structure):
    ret: U64
    gpa: U64
    size: U64


@_layout
class kvm_run_tdx_get_tdvmcall_info(Structure):
    ret: U64
    leaf: U64
    r11: U64
    r12: U64
    r13: U64
    r14: U64


@_layout
class kvm_run_tdx_setup_event_notify(Structure):
    ret: U64
    vector: U64


@_layout
class kvm_run_tdx(Structure):
    flags: U64
    nr: U64
    unknown: Annotated[kvm_run_tdx_unknown, UNION]
    get_quote: Annotated[kvm_run_tdx_get_quote, UNION]
    get_tdvmcall_info: Annotated[kvm_run_tdx_get_tdvmcall_info, UNION]
    setup_event_notify: Annotated[kvm_run_tdx_setup_event_notify, UNION]


@_layout
class kvm_run_arm_sea(Structure):
    flags: U64
    esr: U64
    gva: U64
    gpa: U64


SYNC_REGS_SIZE_BYTES: Final = 2048


@_layout
class kvm_run_s(Union):
    regs: kvm_sync_regs
    padding: Annotated[U8s, SYNC_REGS_SIZE_BYTES]


@_layout
class kvm_run(Structure):
    """The page that a vCPU's descriptor maps at offset 0 (api.rst 5). Size of the mapping: KVM_GET_VCPU_MMAP_SIZE.

    `kvm_run.from_buffer(mapping)` lays it over an mmap object. `exit_reason` says which member of the exit union holds.
    """

    request_interrupt_window: U8
    immediate_exit: U8
    padding1: Annotated[U8s, 6]
    exit_reason: U32
    ready_for_interrupt_injection: U8
    if_flag: U8
    flags: U16
    cr8: U64
    apic_base: U64
    hw: Annotated[kvm_run_hw, UNION]
    fail_entry: Annotated[kvm_run_fail_entry, UNION]
    ex: Annotated[kvm_run_ex, UNION]
    io: Annotated[kvm_run_io, UNION]
    debug: Annotated[kvm_run_debug, UNION]
    mmio: Annotated[kvm_run_mmio, UNION]
    iocsr_io: Annotated[kvm_run_iocsr_io, UNION]
    hypercall: Annotated[kvm_run_hypercall, UNION]
    tpr_access: Annotated[kvm_run_tpr_access, UNION]
    s390_sieic: Annotated[kvm_run_s390_sieic, UNION]
    s390_reset_flags: Annotated[U64, UNION]
    s390_ucontrol: Annotated[kvm_run_s390_ucontrol, UNION]
    dcr: Annotated[kvm_run_dcr, UNION]
    internal: Annotated[kvm_run_internal, UNION]
    emulation_failure: Annotated[kvm_run_emulation_failure, UNION]
    osi: Annotated[kvm_run_osi, UNION]
    papr_hcall: Annotated[kvm_run_papr_hcall, UNION]
    s390_tsch: Annotated[kvm_run_s390_tsch, UNION]
    epr: Annotated[kvm_run_epr, UNION]
    system_event: Annotated[kvm_run_system_event, UNION]
    s390_stsi: Annotated[kvm_run_s390_stsi, UNION]
    eoi: Annotated[kvm_run_eoi, UNION]
    hyperv: Annotated[kvm_hyperv_exit, UNION]
    arm_nisv: Annotated[kvm_run_arm_nisv, UNION]
    msr: Annotated[kvm_run_msr, UNION]
    xen: Annotated[kvm_xen_exit, UNION]
    riscv_sbi: Annotated[kvm_run_riscv_sbi, UNION]
    riscv_csr: Annotated[kvm_run_riscv_csr, UNION]
    notify: Annotated[kvm_run_notify, UNION]
    memory_fault: Annotated[kvm_run_memory_fault, UNION]
    tdx: Annotated[kvm_run_tdx, UNION]
    arm_sea: Annotated[kvm_run_arm_sea, UNION]
    snp_req_certs: Annotated[kvm_exit_snp_req_certs, UNION]
    padding: Annotated[U8s, 256, UNION]
    kvm_valid_regs: U64
    kvm_dirty_regs: U64
    s: kvm_run_s


# --- linux/kvm.h: capabilities, of all architectures (KVM_CHECK_EXTENSION, api.rst 4.4, 6, 7, 8) ----------------------

KVM_CAP_IRQCHIP: Final = 0
KVM_CAP_HLT: Final = 1
KVM_CAP_MMU_SHADOW_CACHE_CONTROL: Final = 2
KVM_CAP_USER_MEMORY: Final = 3
KVM_CAP_SET_TSS_ADDR: Final = 4
KVM_CAP_VAPIC: Final = 6
KVM_CAP_EXT_CPUID: Final = 7
KVM_CAP_CLOCKSOURCE: Final = 8
KVM_CAP_NR_VCPUS: Final = 9
KVM_CAP_NR_MEMSLOTS: Final = 10
KVM_CAP_PIT: Final = 11
KVM_CAP_NOP_IO_DELAY: Final = 12
KVM_CAP_PV_MMU: Final = 13
KVM_CAP_MP_STATE: Final = 14
KVM_CAP_COALESCED_MMIO: Final = 15
KVM_CAP_SYNC_MMU: Final = 16
KVM_CAP_IOMMU: Final = 18
KVM_CAP_DESTROY_MEMORY_REGION_WORKS: Final = 21
KVM_CAP_USER_NMI: Final = 22
KVM_CAP_SET_GUEST_DEBUG: Final = 23
KVM_CAP_REINJECT_CONTROL: Final = 24
KVM_CAP_IRQ_ROUTING: Final = 25
KVM_CAP_IRQ_INJECT_STATUS: Final = 26
KVM_CAP_ASSIGN_DEV_IRQ: Final = 29
KVM_CAP_JOIN_MEMORY_REGIONS_WORKS: Final = 30
KVM_CAP_MCE: Final = 31
KVM_CAP_IRQFD: Final = 32
KVM_CAP_PIT2: Final = 33
KVM_CAP_SET_BOOT_CPU_ID: Final = 34
KVM_CAP_PIT_STATE2: Final = 35
KVM_CAP_IOEVENTFD: Final = 36
KVM_CAP_SET_IDENTITY_MAP_ADDR: Final = 37
KVM_CAP_XEN_HVM: Final = 38
KVM_CAP_ADJUST_CLOCK: Final = 39
KVM_CAP_INTERNAL_ERROR_DATA: Final = 40
KVM_CAP_VCPU_EVENTS: Final = 41
KVM_CAP_S390_PSW: Final = 42
KVM_CAP_PPC_SEGSTATE: Final = 43
KVM_CAP_HYPERV: Final = 44
KVM_CAP_HYPERV_VAPIC: Final = 45
KVM_CAP_HYPERV_SPIN: Final = 46
KVM_CAP_PCI_SEGMENT: Final = 47
KVM_CAP_PPC_PAIRED_SINGLES: Final = 48
KVM_CAP_INTR_SHADOW: Final = 49
KVM_CAP_DEBUGREGS: Final = 50
KVM_CAP_X86_ROBUST_SINGLESTEP: Final = 51
KVM_CAP_PPC_OSI: Final = 52
KVM_CAP_PPC_UNSET_IRQ: Final = 53
KVM_CAP_ENABLE_CAP: Final = 54
KVM_CAP_XSAVE: Final = 55
KVM_CAP_XCRS: Final = 56
KVM_CAP_PPC_GET_PVINFO: Final = 57
KVM_CAP_PPC_IRQ_LEVEL: Final = 58
KVM_CAP_ASYNC_PF: Final = 59
KVM_CAP_TSC_CONTROL: Final = 60
KVM_CAP_GET_TSC_KHZ: Final = 61
KVM_CAP_PPC_BOOKE_SREGS: Final = 62
KVM_CAP_SPAPR_TCE: Final = 63
KVM_CAP_PPC_SMT: Final = 64
KVM_CAP_PPC_RMA: Final = 65
KVM_CAP_MAX_VCPUS: Final = 66
KVM_CAP_PPC_HIOR: Final = 67
KVM_CAP_PPC_PAPR: Final = 68
KVM_CAP_SW_TLB: Final = 69
KVM_CAP_ONE_REG: Final = 70
KVM_CAP_S390_GMAP: Final = 71
KVM_CAP_TSC_DEADLINE_TIMER: Final = 72
KVM_CAP_S390_UCONTROL: Final = 73
KVM_CAP_SYNC_REGS: Final = 74
KVM_CAP_PCI_2_3: Final = 75
KVM_CAP_KVMCLOCK_CTRL: Final = 76
KVM_CAP_SIGNAL_MSI: Final = 77
KVM_CAP_PPC_GET_SMMU_INFO: Final = 78
KVM_CAP_S390_COW: Final = 79
KVM_CAP_PPC_ALLOC_HTAB: Final = 80
KVM_CAP_READONLY_MEM: Final = 81
KVM_CAP_IRQFD_RESAMPLE: Final = 82
KVM_CAP_PPC_BOOKE_WATCHDOG: Final = 83
KVM_CAP_PPC_HTAB_FD: Final = 84
KVM_CAP_S390_CSS_SUPPORT: Final = 85
KVM_CAP_PPC_EPR: Final = 86
KVM_CAP_ARM_PSCI: Final = 87
KVM_CAP_ARM_SET_DEVICE_ADDR: Final = 88
KVM_CAP_DEVICE_CTRL: Final = 89
KVM_CAP_IRQ_MPIC: Final = 90
KVM_CAP_PPC_RTAS: Final = 91
KVM_CAP_IRQ_XICS: Final = 92
KVM_CAP_ARM_EL1_32BIT: Final = 93
KVM_CAP_SPAPR_MULTITCE: Final = 94
KVM_CAP_EXT_EMUL_CPUID: Final = 95
KVM_CAP_HYPERV_TIME: Final = 96
KVM_CAP_IOAPIC_POLARITY_IGNORED: Final = 97
KVM_CAP_ENABLE_CAP_VM: Final = 98
KVM_CAP_S390_IRQCHIP: Final = 99
KVM_CAP_IOEVENTFD_NO_LENGTH: Final = 100
KVM_CAP_VM_ATTRIBUTES: Final = 101
KVM_CAP_ARM_PSCI_0_2: Final = 102
KVM_CAP_PPC_FIXUP_HCALL: Final = 103
KVM_CAP_PPC_ENABLE_HCALL: Final = 104
KVM_CAP_CHECK_EXTENSION_VM: Final = 105
KVM_CAP_S390_USER_SIGP: Final = 106
KVM_CAP_S390_VECTOR_REGISTERS: Final = 107
KVM_CAP_S390_MEM_OP: Final = 108
KVM_CAP_S390_USER_STSI: Final = 109
KVM_CAP_S390_SKEYS: Final = 110
KVM_CAP_MIPS_FPU: Final = 111
KVM_CAP_MIPS_MSA: Final = 112
KVM_CAP_S390_INJECT_IRQ: Final = 113
KVM_CAP_S390_IRQ_STATE: Final = 114
KVM_CAP_PPC_HWRNG: Final = 115
KVM_CAP_DISABLE_QUIRKS: Final = 116
KVM_CAP_X86_SMM: Final = 117
KVM_CAP_MULTI_ADDRESS_SPACE: Final = 118
KVM_CAP_GUEST_DEBUG_HW_BPS: Final = 119
KVM_CAP_GUEST_DEBUG_HW_WPS: Final = 120
KVM_CAP_SPLIT_IRQCHIP: Final = 121
KVM_CAP_IOEVENTFD_ANY_LENGTH: Final = 122
KVM_CAP_HYPERV_SYNIC: Final = 123
KVM_CAP_S390_RI: Final = 124
KVM_CAP_SPAPR_TCE_64: Final = 125
KVM_CAP_ARM_PMU_V3: Final = 126
KVM_CAP_VCPU_ATTRIBUTES: Final = 127
KVM_CAP_MAX_VCPU_ID: Final = 128
KVM_CAP_X2APIC_API: Final = 129
KVM_CAP_S390_USER_INSTR0: Final = 130
KVM_CAP_MSI_DEVID: Final = 131
KVM_CAP_PPC_HTM: Final = 132
KVM_CAP_SPAPR_RESIZE_HPT: Final = 133
KVM_CAP_PPC_MMU_RADIX: Final = 134
KVM_CAP_PPC_MMU_HASH_V3: Final = 135
KVM_CAP_IMMEDIATE_EXIT: Final = 136
KVM_CAP_MIPS_VZ: Final = 137
KVM_CAP_MIPS_TE: Final = 138
KVM_CAP_MIPS_64BIT: Final = 139
KVM_CAP_S390_GS: Final = 140
KVM_CAP_S390_AIS: Final = 141
KVM_CAP_SPAPR_TCE_VFIO: Final = 142
KVM_CAP_X86_DISABLE_EXITS: Final = 143
KVM_CAP_ARM_USER_IRQ: Final = 144
KVM_CAP_S390_CMMA_MIGRATION: Final = 145
KVM_CAP_PPC_FWNMI: Final = 146
KVM_CAP_PPC_SMT_POSSIBLE: Final = 147
KVM_CAP_HYPERV_SYNIC2: Final = 148
KVM_CAP_HYPERV_VP_INDEX: Final = 149
KVM_CAP_S390_AIS_MIGRATION: Final = 150
KVM_CAP_PPC_GET_CPU_CHAR: Final = 151
KVM_CAP_S390_BPB: Final = 152
KVM_CAP_GET_MSR_FEATURES: Final = 153
KVM_CAP_HYPERV_EVENTFD: Final = 154
KVM_CAP_HYPERV_TLBFLUSH: Final = 155
KVM_CAP_S390_HPAGE_1M: Final = 156
KVM_CAP_NESTED_STATE: Final = 157
KVM_CAP_ARM_INJECT_SERROR_ESR: Final = 158
KVM_CAP_MSR_PLATFORM_INFO: Final = 159
KVM_CAP_PPC_NESTED_HV: Final = 160
KVM_CAP_HYPERV_SEND_IPI: Final = 161
KVM_CAP_COALESCED_PIO: Final = 162
KVM_CAP_HYPERV_ENLIGHTENED_VMCS: Final = 163
KVM_CAP_EXCEPTION_PAYLOAD: Final = 164
KVM_CAP_ARM_VM_IPA_SIZE: Final = 165
KVM_CAP_MANUAL_DIRTY_LOG_PROTECT: Final = 166
KVM_CAP_HYPERV_CPUID: Final = 167
KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2: Final = 168
KVM_CAP_PPC_IRQ_XIVE: Final = 169
KVM_CAP_ARM_SVE: Final = 170
KVM_CAP_ARM_PTRAUTH_ADDRESS: Final = 171
KVM_CAP_ARM_PTRAUTH_GENERIC: Final = 172
KVM_CAP_PMU_EVENT_FILTER: Final = 173
KVM_CAP_ARM_IRQ_LINE_LAYOUT_2: Final = 174
KVM_CAP_HYPERV_DIRECT_TLBFLUSH: Final = 175
KVM_CAP_PPC_GUEST_DEBUG_SSTEP: Final = 176
KVM_CAP_ARM_NISV_TO_USER: Final = 177
KVM_CAP_ARM_INJECT_EXT_DABT: Final = 178
KVM_CAP_S390_VCPU_RESETS: Final = 179
KVM_CAP_S390_PROTECTED: Final = 180
KVM_CAP_PPC_SECURE_GUEST: Final = 181
KVM_CAP_HALT_POLL: Final = 182
KVM_CAP_ASYNC_PF_INT: Final = 183
KVM_CAP_LAST_CPU: Final = 184
KVM_CAP_SMALLER_MAXPHYADDR: Final = 185
KVM_CAP_S390_DIAG318: Final = 186
KVM_CAP_STEAL_TIME: Final = 187
KVM_CAP_X86_USER_SPACE_MSR: Final = 188
KVM_CAP_X86_MSR_FILTER: Final = 189
KVM_CAP_ENFORCE_PV_FEATURE_CPUID: Final = 190
KVM_CAP_SYS_HYPERV_CPUID: Final = 191
KVM_CAP_DIRTY_LOG_RING: Final = 192
KVM_CAP_X86_BUS_LOCK_EXIT: Final = 193
KVM_CAP_PPC_DAWR1: Final = 194
KVM_CAP_SET_GUEST_DEBUG2: Final = 195
KVM_CAP_SGX_ATTRIBUTE: Final = 196
KVM_CAP_VM_COPY_ENC_CONTEXT_FROM: Final = 197
KVM_CAP_PTP_KVM: Final = 198
KVM_CAP_HYPERV_ENFORCE_CPUID: Final = 199
KVM_CAP_SREGS2: Final = 200
KVM_CAP_EXIT_HYPERCALL: Final = 201
KVM_CAP_PPC_RPT_INVALIDATE: Final = 202
KVM_CAP_BINARY_STATS_FD: Final = 203
KVM_CAP_EXIT_ON_EMULATION_FAILURE: Final = 204
KVM_CAP_ARM_MTE: Final = 205
KVM_CAP_VM_MOVE_ENC_CONTEXT_FROM: Final = 206
KVM_CAP_VM_GPA_BITS: Final = 207
KVM_CAP_XSAVE2: Final = 208
KVM_CAP_SYS_ATTRIBUTES: Final = 209
KVM_CAP_PPC_AIL_MODE_3: Final = 210
KVM_CAP_S390_MEM_OP_EXTENSION: Final = 211
KVM_CAP_PMU_CAPABILITY: Final = 212
KVM_CAP_DISABLE_QUIRKS2: Final = 213
KVM_CAP_VM_TSC_CONTROL: Final = 214
KVM_CAP_SYSTEM_EVENT_DATA: Final = 215
KVM_CAP_ARM_SYSTEM_SUSPEND: Final = 216
KVM_CAP_S390_PROTECTED_DUMP: Final = 217
KVM_CAP_X86_TRIPLE_FAULT_EVENT: Final = 218
KVM_CAP_X86_NOTIFY_VMEXIT: Final = 219
KVM_CAP_VM_DISABLE_NX_HUGE_PAGES: Final = 220
KVM_CAP_S390_ZPCI_OP: Final = 221
KVM_CAP_S390_CPU_TOPOLOGY: Final = 222
KVM_CAP_DIRTY_LOG_RING_ACQ_REL: Final = 223
KVM_CAP_S390_PROTECTED_ASYNC_DISABLE: Final = 224
KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP: Final = 225
KVM_CAP_PMU_EVENT_MASKED_EVENTS: Final = 226
KVM_CAP_COUNTER_OFFSET: Final = 227
KVM_CAP_ARM_EAGER_SPLIT_CHUNK_SIZE: Final = 228
KVM_CAP_ARM_SUPPORTED_BLOCK_SIZES: Final = 229
KVM_CAP_ARM_SUPPORTED_REG_MASK_RANGES: Final = 230
KVM_CAP_USER_MEMORY2: Final = 231
KVM_CAP_MEMORY_FAULT_INFO: Final = 232
KVM_CAP_MEMORY_ATTRIBUTES: Final = 233
KVM_CAP_GUEST_MEMFD: Final = 234
KVM_CAP_VM_TYPES: Final = 235
KVM_CAP_PRE_FAULT_MEMORY: Final = 236
KVM_CAP_X86_APIC_BUS_CYCLES_NS: Final = 237
KVM_CAP_X86_GUEST_MODE: Final = 238
KVM_CAP_ARM_WRITABLE_IMP_ID_REGS: Final = 239
KVM_CAP_ARM_EL2: Final = 240
KVM_CAP_ARM_EL2_E2H0: Final = 241
KVM_CAP_RISCV_MP_STATE_RESET: Final = 242
KVM_CAP_ARM_CACHEABLE_PFNMAP_SUPPORTED: Final = 243
KVM_CAP_GUEST_MEMFD_FLAGS: Final = 244
KVM_CAP_ARM_SEA_TO_USER: Final = 245
KVM_CAP_S390_USER_OPEREXEC: Final = 246
KVM_CAP_S390_KEYOP: Final = 247
KVM_CAP_S390_VSIE_ESAMODE: Final = 248
KVM_CAP_S390_HPAGE_2G: Final = 249
KVM_CAP_PPC_COMPAT_CAPS: Final = 250
KVM_CAP_ARM_PMU_V3_STRICT: Final = 251
CAP_NAMES: Final = _names("KVM_CAP_")

# --- linux/kvm.h: requests; the comment is the section of api.rst -----------------------------------------------------

KVMIO: Final = 0xAE


def _IO(number: int) -> int:
    return KVMIO << 8 | number


def _IOW(number: int, argument: type[Structure] | type[c_uint64]) -> int:
    return 1 << 30 | ctypes.sizeof(argument) << 16 | KVMIO << 8 | number


def _IOR(number: int, argument: type[Structure] | type[c_uint64]) -> int:
    return 2 << 30 | ctypes.sizeof(argument) << 16 | KVMIO << 8 | number


def _IOWR(number: int, argument: type[Structure] | type[c_uint64]) -> int:
    return 3 << 30 | ctypes.sizeof(argument) << 16 | KVMIO << 8 | number


_earlier = frozenset(globals())

KVM_GET_API_VERSION: Final = _IO(0x00)  # 4.1
KVM_CREATE_VM: Final = _IO(0x01)  # 4.2
KVM_GET_MSR_INDEX_LIST: Final = _IOWR(0x02, kvm_msr_list)  # 4.3
KVM_CHECK_EXTENSION: Final = _IO(0x03)  # 4.4
KVM_GET_VCPU_MMAP_SIZE: Final = _IO(0x04)  # 4.5
KVM_GET_SUPPORTED_CPUID: Final = _IOWR(0x05, kvm_cpuid2)  # 4.46
KVM_GET_EMULATED_CPUID: Final = _IOWR(0x09, kvm_cpuid2)  # 4.88
KVM_GET_MSR_FEATURE_INDEX_LIST: Final = _IOWR(0x0A, kvm_msr_list)  # 4.3
KVM_CREATE_VCPU: Final = _IO(0x41)  # 4.7
KVM_GET_DIRTY_LOG: Final = _IOW(0x42, kvm_dirty_log)  # 4.8
KVM_SET_NR_MMU_PAGES: Final = _IO(0x44)
KVM_GET_NR_MMU_PAGES: Final = _IO(0x45)
KVM_SET_USER_MEMORY_REGION: Final = _IOW(0x46, kvm_userspace_memory_region)  # 4.35
KVM_SET_TSS_ADDR: Final = _IO(0x47)  # 4.36
KVM_SET_IDENTITY_MAP_ADDR: Final = _IOW(0x48, c_uint64)  # 4.40
KVM_SET_USER_MEMORY_REGION2: Final = _IOW(0x49, kvm_userspace_memory_region2)  # 4.140
KVM_CREATE_IRQCHIP: Final = _IO(0x60)  # 4.24
KVM_IRQ_LINE: Final = _IOW(0x61, kvm_irq_level)  # 4.25
KVM_GET_IRQCHIP: Final = _IOWR(0x62, kvm_irqchip)  # 4.26
KVM_SET_IRQCHIP: Final = _IOR(0x63, kvm_irqchip)  # 4.27
KVM_CREATE_PIT: Final = _IO(0x64)
KVM_GET_PIT: Final = _IOWR(0x65, kvm_pit_state)
KVM_SET_PIT: Final = _IOR(0x66, kvm_pit_state)
KVM_IRQ_LINE_STATUS: Final = _IOWR(0x67, kvm_irq_level)
KVM_REGISTER_COALESCED_MMIO: Final = _IOW(0x67, kvm_coalesced_mmio_zone)  # 4.116
KVM_UNREGISTER_COALESCED_MMIO: Final = _IOW(0x68, kvm_coalesced_mmio_zone)  # 4.116
KVM_SET_GSI_ROUTING: Final = _IOW(0x6A, kvm_irq_routing)  # 4.52
KVM_REINJECT_CONTROL: Final = _IO(0x71)  # 4.99
KVM_IRQFD: Final = _IOW(0x76, kvm_irqfd)  # 4.75
KVM_CREATE_PIT2: Final = _IOW(0x77, kvm_pit_config)  # 4.71
KVM_SET_BOOT_CPU_ID: Final = _IO(0x78)  # 4.41
KVM_IOEVENTFD: Final = _IOW(0x79, kvm_ioeventfd)  # 4.59
KVM_XEN_HVM_CONFIG: Final = _IOW(0x7A, kvm_xen_hvm_config)  # 4.28
KVM_SET_CLOCK: Final = _IOW(0x7B, kvm_clock_data)  # 4.30
KVM_GET_CLOCK: Final = _IOR(0x7C, kvm_clock_data)  # 4.29
KVM_GET_PIT2: Final = _IOR(0x9F, kvm_pit_state2)  # 4.72
KVM_SET_PIT2: Final = _IOW(0xA0, kvm_pit_state2)  # 4.73
KVM_SET_TSC_KHZ: Final = _IO(0xA2)  # 4.55
KVM_GET_TSC_KHZ: Final = _IO(0xA3)  # 4.56
KVM_SIGNAL_MSI: Final = _IOW(0xA5, kvm_msi)  # 4.71
KVM_SET_PMU_EVENT_FILTER: Final = _IOW(0xB2, kvm_pmu_event_filter)  # 4.120
KVM_CREATE_DEVICE: Final = _IOWR(0xE0, kvm_create_device)  # 4.79
KVM_SET_DEVICE_ATTR: Final = _IOW(0xE1, kvm_device_attr)  # 4.80
KVM_GET_DEVICE_ATTR: Final = _IOW(0xE2, kvm_device_attr)  # 4.80
KVM_HAS_DEVICE_ATTR: Final = _IOW(0xE3, kvm_device_attr)  # 4.81
KVM_RUN: Final = _IO(0x80)  # 4.10
KVM_GET_REGS: Final = _IOR(0x81, kvm_regs)  # 4.11
KVM_SET_REGS: Final = _IOW(0x82, kvm_regs)  # 4.12
KVM_GET_SREGS: Final = _IOR(0x83, kvm_sregs)  # 4.13
KVM_SET_SREGS: Final = _IOW(0x84, kvm_sregs)  # 4.14
KVM_TRANSLATE: Final = _IOWR(0x85, kvm_translation)  # 4.15
KVM_INTERRUPT: Final = _IOW(0x86, kvm_interrupt)  # 4.16
KVM_GET_MSRS: Final = _IOWR(0x88, kvm_msrs)  # 4.18
KVM_SET_MSRS: Final = _IOW(0x89, kvm_msrs)  # 4.19
KVM_SET_CPUID: Final = _IOW(0x8A, kvm_cpuid)  # 4.20
KVM_SET_SIGNAL_MASK: Final = _IOW(0x8B, kvm_signal_mask)  # 4.21
KVM_GET_FPU: Final = _IOR(0x8C, kvm_fpu)  # 4.22
KVM_SET_FPU: Final = _IOW(0x8D, kvm_fpu)  # 4.23
KVM_GET_LAPIC: Final = _IOR(0x8E, kvm_lapic_state)  # 4.57
KVM_SET_LAPIC: Final = _IOW(0x8F, kvm_lapic_state)  # 4.58
KVM_SET_CPUID2: Final = _IOW(0x90, kvm_cpuid2)
KVM_GET_CPUID2: Final = _IOWR(0x91, kvm_cpuid2)
KVM_TPR_ACCESS_REPORTING: Final = _IOWR(0x92, kvm_tpr_access_ctl)
KVM_SET_VAPIC_ADDR: Final = _IOW(0x93, kvm_vapic_addr)
KVM_GET_MP_STATE: Final = _IOR(0x98, kvm_mp_state)  # 4.38
KVM_SET_MP_STATE: Final = _IOW(0x99, kvm_mp_state)  # 4.39
KVM_NMI: Final = _IO(0x9A)  # 4.64
KVM_SET_GUEST_DEBUG: Final = _IOW(0x9B, kvm_guest_debug)  # 4.87
KVM_X86_SETUP_MCE: Final = _IOW(0x9C, c_uint64)  # 4.105
KVM_X86_GET_MCE_CAP_SUPPORTED: Final = _IOR(0x9D, c_uint64)  # 4.104
KVM_X86_SET_MCE: Final = _IOW(0x9E, kvm_x86_mce)  # 4.106
KVM_GET_VCPU_EVENTS: Final = _IOR(0x9F, kvm_vcpu_events)  # 4.31
KVM_SET_VCPU_EVENTS: Final = _IOW(0xA0, kvm_vcpu_events)  # 4.32
KVM_GET_DEBUGREGS: Final = _IOR(0xA1, kvm_debugregs)  # 4.33
KVM_SET_DEBUGREGS: Final = _IOW(0xA2, kvm_debugregs)  # 4.34
KVM_ENABLE_CAP: Final = _IOW(0xA3, kvm_enable_cap)  # 4.37
KVM_GET_XSAVE: Final = _IOR(0xA4, kvm_xsave)  # 4.42
KVM_SET_XSAVE: Final = _IOW(0xA5, kvm_xsave)  # 4.43
KVM_GET_XCRS: Final = _IOR(0xA6, kvm_xcrs)  # 4.44
KVM_SET_XCRS: Final = _IOW(0xA7, kvm_xcrs)  # 4.45
KVM_GET_ONE_REG: Final = _IOW(0xAB, kvm_one_reg)  # 4.69
KVM_SET_ONE_REG: Final = _IOW(0xAC, kvm_one_reg)  # 4.68
KVM_KVMCLOCK_CTRL: Final = _IO(0xAD)  # 4.70
KVM_GET_REG_LIST: Final = _IOWR(0xB0, kvm_reg_list)  # 4.84
KVM_SMI: Final = _IO(0xB7)  # 4.96
KVM_MEMORY_ENCRYPT_OP: Final = _IOWR(0xBA, c_uint64)  # 4.110
KVM_MEMORY_ENCRYPT_REG_REGION: Final = _IOR(0xBB, kvm_enc_region)  # 4.111
KVM_MEMORY_ENCRYPT_UNREG_REGION: Final = _IOR(0xBC, kvm_enc_region)  # 4.112
KVM_HYPERV_EVENTFD: Final = _IOW(0xBD, kvm_hyperv_eventfd)  # 4.113
KVM_GET_NESTED_STATE: Final = _IOWR(0xBE, kvm_nested_state)  # 4.114
KVM_SET_NESTED_STATE: Final = _IOW(0xBF, kvm_nested_state)  # 4.115
KVM_CLEAR_DIRTY_LOG: Final = _IOWR(0xC0, kvm_clear_dirty_log)  # 4.117
KVM_GET_SUPPORTED_HV_CPUID: Final = _IOWR(0xC1, kvm_cpuid2)  # 4.118
KVM_X86_SET_MSR_FILTER: Final = _IOW(0xC6, kvm_msr_filter)  # 4.97
KVM_RESET_DIRTY_RINGS: Final = _IO(0xC7)
KVM_XEN_HVM_GET_ATTR: Final = _IOWR(0xC8, kvm_xen_hvm_attr)  # 4.127
KVM_XEN_HVM_SET_ATTR: Final = _IOW(0xC9, kvm_xen_hvm_attr)  # 4.126
KVM_XEN_VCPU_GET_ATTR: Final = _IOWR(0xCA, kvm_xen_vcpu_attr)  # 4.129
KVM_XEN_VCPU_SET_ATTR: Final = _IOW(0xCB, kvm_xen_vcpu_attr)  # 4.128
KVM_XEN_HVM_EVTCHN_SEND: Final = _IOW(0xD0, kvm_irq_routing_xen_evtchn)  # 4.135
KVM_GET_SREGS2: Final = _IOR(0xCC, kvm_sregs2)  # 4.131
KVM_SET_SREGS2: Final = _IOW(0xCD, kvm_sregs2)  # 4.132
KVM_GET_STATS_FD: Final = _IO(0xCE)  # 4.133
KVM_GET_XSAVE2: Final = _IOR(0xCF, kvm_xsave)  # 4.134
KVM_SET_MEMORY_ATTRIBUTES: Final = _IOW(0xD2, kvm_memory_attributes)  # 4.141
KVM_CREATE_GUEST_MEMFD: Final = _IOWR(0xD4, kvm_create_guest_memfd)  # 4.142
KVM_PRE_FAULT_MEMORY: Final = _IOWR(0xD5, kvm_pre_fault_memory)  # 4.143
REQUEST_NAMES: Final = {
    value: name for name, value in list(globals().items()) if name.startswith("KVM_") and name not in _earlier
}


# --- the function-like macros of both headers -------------------------------------------------------------------------


def KVM_REG_SIZE(id: int) -> int:
    """Bytes of a ONE_REG register (linux/kvm.h)."""
    return 1 << ((id & KVM_REG_SIZE_MASK) >> KVM_REG_SIZE_SHIFT)


def KVM_X86_KVM_REG_SIZE(reg: int) -> int:
    """Size bits of one of KVM's own registers; 0 where there is none of that number (asm/kvm.h)."""
    return KVM_REG_SIZE_U64 if reg == KVM_REG_GUEST_SSP else 0


def KVM_X86_REG_TYPE_SIZE(type: int, reg: int) -> int:
    """Type and size bits of an x86 ONE_REG register (asm/kvm.h)."""
    size = {KVM_X86_REG_TYPE_MSR: KVM_REG_SIZE_U64, KVM_X86_REG_TYPE_KVM: KVM_X86_KVM_REG_SIZE(reg)}.get(type, 0)
    return type << 32 | size


def KVM_X86_REG_ID(type: int, index: int) -> int:
    """ONE_REG number of an x86 register (asm/kvm.h, api.rst 4.68)."""
    return KVM_REG_X86 | KVM_X86_REG_TYPE_SIZE(type, index) | index


def KVM_X86_REG_MSR(index: int) -> int:
    """ONE_REG number of an MSR (asm/kvm.h)."""
    return KVM_X86_REG_ID(KVM_X86_REG_TYPE_MSR, index)


def KVM_X86_REG_KVM(index: int) -> int:
    """ONE_REG number of a register of KVM's own, such as KVM_REG_GUEST_SSP (asm/kvm.h)."""
    return KVM_X86_REG_ID(KVM_X86_REG_TYPE_KVM, index)


def KVM_PMU_ENCODE_MASKED_ENTRY(event_select: int, mask: int, match: int, exclude: bool) -> int:
    """One masked event of a PMU event filter (asm/kvm.h, api.rst 4.120)."""
    select = event_select & 0xFF | (event_select & 0xF00) << 24
    return select | (mask & 0xFF) << 56 | (match & 0xFF) << 8 | bool(exclude) << 55


# --- structures of any length -----------------------------------------------------------------------------------------

_S = TypeVar("_S", bound=Structure)


def flexible(base: type[_S], count: int) -> type[_S]:
    """`base`, whose last array has any length, as a type with `count` elements in that array; the same type every time.

    Its instances are instances of `base`. For kvm_tdx_capabilities and kvm_tdx_init_vm, which end in a kvm_cpuid2, the
    array is `entries` of the structure itself. The kernel believes the count in a structure: never raise it above the
    room that the structure has. Raises TypeError where `base` ends in no such array.
    """
    return cast(type[_S], _flexible(base, count))


@functools.cache
def _flexible(base: type[Structure], count: int) -> type[Structure]:
    last: Any = base
    name = ""
    while issubclass(last, Structure):
        name, last = cast(Any, last._fields_[-1])
    if not (issubclass(last, Array) and last._length_ == 0):
        raise TypeError(f"{base.__name__} does not end in an array of any length")
    return type(f"{base.__name__}_{count}", (base,), {"_fields_": [(name, last._type_ * count)]})


def cpuid(n: int) -> kvm_cpuid:
    """A kvm_cpuid with room for `n` entries, and `nent` saying so."""
    return flexible(kvm_cpuid, n)(nent=n)


def cpuid2(n: int) -> kvm_cpuid2:
    """A kvm_cpuid2 with room for `n` entries, and `nent` saying so."""
    return flexible(kvm_cpuid2, n)(nent=n)


def msrs(n: int) -> kvm_msrs:
    """A kvm_msrs with room for `n` entries (at most 255 for the kernel), and `nmsrs` saying so."""
    return flexible(kvm_msrs, n)(nmsrs=n)


def msr_list(n: int) -> kvm_msr_list:
    """A kvm_msr_list with room for `n` indices, and `nmsrs` saying so."""
    return flexible(kvm_msr_list, n)(nmsrs=n)


def reg_list(n: int) -> kvm_reg_list:
    """A kvm_reg_list with room for `n` register numbers, and `n` saying so."""
    return flexible(kvm_reg_list, n)(n=n)


def irq_routing(n: int) -> kvm_irq_routing:
    """A kvm_irq_routing with room for `n` entries, and `nr` saying so."""
    return flexible(kvm_irq_routing, n)(nr=n)


def pmu_event_filter(n: int) -> kvm_pmu_event_filter:
    """A kvm_pmu_event_filter with room for `n` events, and `nevents` saying so."""
    return flexible(kvm_pmu_event_filter, n)(nevents=n)


def signal_mask(n: int = 8) -> kvm_signal_mask:
    """A kvm_signal_mask of `n` bytes, and `len` saying so. The kernel's own signal set has 8."""
    return flexible(kvm_signal_mask, n)(len=n)


def xsave(size: int = 4096) -> kvm_xsave:
    """A kvm_xsave of `size` bytes: what KVM_CHECK_EXTENSION(KVM_CAP_XSAVE2) says for the VM, and at least 4096."""
    return flexible(kvm_xsave, max(0, size - ctypes.sizeof(kvm_xsave) + 3) // 4)()


@_layout
class _NestedStateRoom(kvm_nested_state_data):
    vmx: Annotated[Array[kvm_vmx_nested_state_data], 1]
    svm: Annotated[Array[kvm_svm_nested_state_data], 1]


@_layout
class _NestedState(kvm_nested_state):
    data: _NestedStateRoom


def nested_state() -> kvm_nested_state:
    """A kvm_nested_state with room for VMX's or SVM's data (`data.vmx[0]`, `data.svm[0]`), and `size` saying so."""
    return _NestedState(size=ctypes.sizeof(_NestedState))


# --- errors -----------------------------------------------------------------------------------------------------------

_MSR_LIST: Final = "the list is longer than the room for it, nmsrs now says how long: ask again with msr_list(nmsrs)"
_CPUID_ROOM: Final = "there are more entries than nent said there is room for: ask again with a larger cpuid2(n)"
_NO_IRQCHIP: Final = "this VM has no interrupt controller in the kernel: KVM_CREATE_IRQCHIP comes first"
_NO_PIT: Final = "this VM has no PIT in the kernel: KVM_CREATE_PIT2 comes first"
_NO_LAPIC: Final = "this vCPU has no local APIC in the kernel: KVM_CREATE_IRQCHIP or KVM_CAP_SPLIT_IRQCHIP comes first"
_SREGS: Final = (
    "no processor of this CPUID can be in that state, e.g. CR0.PG without CR0.PE, EFER.LMA without CR4.PAE, reserved "
    "bits of CR3, CR4 or EFER, a bad APIC base: check it against what KVM_SET_CPUID2 was given"
)
_SLOT: Final = (
    "addresses and size must be multiples of 4096, the flags known, the slot below KVM_CAP_NR_MEMSLOTS; a slot in use "
    "can be moved, deleted or change its flags, but not change its size or host address"
)
_SLOT_OVERLAP: Final = "the range overlaps another memory slot: delete or move that one first"
_SVM_VMX_TAKEN: Final = "another hypervisor on this host holds VMX or SVM: unload it"

_EHWPOISON: Final = 133  # Python's errno module does not have it

# What an errno means for one request: api.rst's own section, or the code where it says nothing.
_MEANINGS: Final[dict[str, dict[int, str]]] = {
    "KVM_CREATE_VM": {
        _errno.EINVAL: "KVM has no such VM type: KVM_CHECK_EXTENSION(KVM_CAP_VM_TYPES) lists them",
        _errno.EBUSY: _SVM_VMX_TAKEN,
    },
    "KVM_GET_API_VERSION": {_errno.EINVAL: "the argument must be 0"},
    "KVM_GET_MSR_INDEX_LIST": {_errno.E2BIG: _MSR_LIST},
    "KVM_GET_MSR_FEATURE_INDEX_LIST": {_errno.E2BIG: _MSR_LIST},
    "KVM_GET_SUPPORTED_CPUID": {_errno.E2BIG: _CPUID_ROOM},
    "KVM_GET_EMULATED_CPUID": {_errno.E2BIG: _CPUID_ROOM},
    "KVM_GET_SUPPORTED_HV_CPUID": {_errno.E2BIG: _CPUID_ROOM},
    "KVM_GET_CPUID2": {_errno.E2BIG: _CPUID_ROOM},
    "KVM_SET_CPUID": {_errno.E2BIG: "more entries than KVM takes (256)"},
    "KVM_SET_CPUID2": {
        _errno.E2BIG: "more entries than KVM takes (256)",
        _errno.EINVAL: (
            "KVM refuses this CPUID: linear addresses of other than 48 or 57 bits, or a vCPU that has run or holds "
            "nested state and whose CPUID may not change any more: set it once, before KVM_RUN"
        ),
    },
    "KVM_CREATE_VCPU": {
        _errno.EEXIST: "the VM has a vCPU of this number already",
        _errno.EINVAL: "the number is above KVM_CAP_MAX_VCPU_ID, or the VM has KVM_CAP_MAX_VCPUS of them",
    },
    "KVM_SET_USER_MEMORY_REGION": {
        _errno.EEXIST: _SLOT_OVERLAP,
        _errno.EINVAL: _SLOT,
    },
    "KVM_SET_USER_MEMORY_REGION2": {
        _errno.EEXIST: _SLOT_OVERLAP,
        _errno.EINVAL: _SLOT,
    },
    "KVM_GET_DIRTY_LOG": {_errno.ENOENT: "no such slot, or it was made without KVM_MEM_LOG_DIRTY_PAGES"},
    "KVM_CLEAR_DIRTY_LOG": {_errno.ENOENT: "no such slot, or it was made without KVM_MEM_LOG_DIRTY_PAGES"},
    "KVM_SET_TSS_ADDR": {_errno.EINVAL: "the three pages must end below 4 GiB"},
    "KVM_SET_IDENTITY_MAP_ADDR": {_errno.EINVAL: "too late: the VM has vCPUs"},
    "KVM_SET_BOOT_CPU_ID": {_errno.EBUSY: "too late: the VM has vCPUs"},
    "KVM_CREATE_IRQCHIP": {
        _errno.EEXIST: "the VM has an interrupt controller already",
        _errno.EINVAL: "too late: the VM has vCPUs",
    },
    "KVM_CREATE_PIT2": {
        _errno.EEXIST: "the VM has a PIT already",
        _errno.ENOENT: _NO_IRQCHIP,
    },
    "KVM_IRQ_LINE": {_errno.ENXIO: _NO_IRQCHIP},
    "KVM_IRQ_LINE_STATUS": {_errno.ENXIO: _NO_IRQCHIP},
    "KVM_GET_IRQCHIP": {_errno.ENXIO: _NO_IRQCHIP},
    "KVM_SET_IRQCHIP": {_errno.ENXIO: _NO_IRQCHIP},
    "KVM_GET_PIT": {_errno.ENXIO: _NO_PIT},
    "KVM_SET_PIT": {_errno.ENXIO: _NO_PIT},
    "KVM_GET_PIT2": {_errno.ENXIO: _NO_PIT},
    "KVM_SET_PIT2": {_errno.ENXIO: _NO_PIT},
    "KVM_REINJECT_CONTROL": {_errno.ENXIO: _NO_PIT},
    "KVM_GET_LAPIC": {_errno.EINVAL: _NO_LAPIC},
    "KVM_SET_LAPIC": {_errno.EINVAL: _NO_LAPIC},
    "KVM_SET_GSI_ROUTING": {
        _errno.EINVAL: "an unknown entry type or pin, too many entries, or no irqchip in the kernel",
    },
    "KVM_IRQFD": {_errno.EBUSY: "this eventfd is bound already"},
    "KVM_IOEVENTFD": {_errno.EEXIST: "an eventfd waits for this address and value already"},
    "KVM_ENABLE_CAP": {
        _errno.EINVAL: (
            "this descriptor has no such capability, its arguments are not known, or it is too late (most capabilities "
            "of a VM come before its vCPUs): see KVM_CHECK_EXTENSION, and api.rst 6 (vCPUs) and 7 (VMs)"
        ),
    },
    "KVM_CREATE_DEVICE": {
        _errno.ENODEV: "this kernel has no such device type",
        _errno.EEXIST: "the VM has this device already and there can be only one",
    },
    "KVM_SET_DEVICE_ATTR": {
        _errno.ENXIO: "no such group or attribute here, or the hardware for it is missing",
        _errno.EPERM: "the attribute cannot be set (read-only, or not in this state)",
    },
    "KVM_GET_DEVICE_ATTR": {
        _errno.ENXIO: "no such group or attribute here, or the hardware for it is missing",
        _errno.EPERM: "the attribute cannot be read in this state",
    },
    "KVM_HAS_DEVICE_ATTR": {_errno.ENXIO: "no such group or attribute here, or the hardware for it is missing"},
    "KVM_RUN": {
        _errno.EFAULT: (
            "the guest touched memory that the host cannot give it; if exit_reason is KVM_EXIT_MEMORY_FAULT, then "
            "memory_fault says where: check that the slot's host memory is still mapped and writable"
        ),
        _EHWPOISON: "the guest touched memory with a hardware error; memory_fault says where",
        _errno.EINVAL: (
            "kvm_valid_regs or kvm_dirty_regs has unknown bits (KVM_CHECK_EXTENSION(KVM_CAP_SYNC_REGS) lists the "
            "known), the registers given that way are impossible, or kvm_run.cr8 is above 15"
        ),
        _errno.ENOEXEC: "the vCPU has not been initialized",
        _errno.EPERM: "the vCPU may not run: its protected (SEV or TDX) set-up is not finished",
    },
    "KVM_SET_SREGS": {_errno.EINVAL: _SREGS},
    "KVM_SET_SREGS2": {_errno.EINVAL: _SREGS},
    "KVM_GET_MSRS": {_errno.E2BIG: "more entries than KVM takes in one call (255): split the list"},
    "KVM_SET_MSRS": {_errno.E2BIG: "more entries than KVM takes in one call (255): split the list"},
    "KVM_SET_SIGNAL_MASK": {_errno.EINVAL: "len must be 8, the size of the kernel's signal set"},
    "KVM_INTERRUPT": {
        _errno.EEXIST: "an interrupt is queued already",
        _errno.EINVAL: "no interrupt of this number: 0 to 255",
        _errno.ENXIO: "the interrupt controller is in the kernel: use KVM_IRQ_LINE or KVM_SIGNAL_MSI",
    },
    "KVM_SET_MP_STATE": {
        _errno.EINVAL: (
            "this vCPU cannot be in that state: those other than KVM_MP_STATE_RUNNABLE need a local APIC in the kernel"
        ),
    },
    "KVM_GET_XSAVE": {_errno.EINVAL: "the vCPU's state is larger than 4096 bytes: use KVM_GET_XSAVE2 with xsave(size)"},
    "KVM_SET_XSAVE": {_errno.EINVAL: "XSTATE_BV, the header or MXCSR has bits that this vCPU does not have"},
    "KVM_SET_XCRS": {_errno.EINVAL: "XCR0 has bits, or a combination, that this vCPU's CPUID does not allow"},
    "KVM_SET_DEBUGREGS": {_errno.EINVAL: "flags must be 0, the upper halves of DR6 and DR7 too"},
    "KVM_SET_VCPU_EVENTS": {
        _errno.EINVAL: (
            "unknown flags, an exception that is no exception, or an optional field without its capability enabled"
        ),
    },
    "KVM_SET_GUEST_DEBUG": {
        _errno.EBUSY: "an exception is pending already: #DB or #BP cannot be injected before it is taken",
    },
    "KVM_SET_TSC_KHZ": {_errno.EINVAL: "the hardware cannot scale the TSC to this frequency"},
    "KVM_GET_TSC_KHZ": {_errno.EIO: "the host's TSC is not stable"},
    "KVM_KVMCLOCK_CTRL": {_errno.EINVAL: "the guest has not set kvmclock up"},
    "KVM_SMI": {_errno.ENOTTY: "this KVM has no system-management mode"},
    "KVM_GET_NESTED_STATE": {
        _errno.E2BIG: "the state is larger than size, which now says how large: use nested_state()",
    },
    "KVM_SET_NESTED_STATE": {
        _errno.EINVAL: (
            "the state is not of this vendor's format, or does not fit the vCPU's CPUID, CR4, EFER or VMX MSRs: set "
            "these first"
        ),
    },
    "KVM_GET_ONE_REG": {
        _errno.EINVAL: "no such register, or not with this vCPU's CPUID: KVM_GET_REG_LIST has those there are",
    },
    "KVM_SET_ONE_REG": {_errno.EINVAL: "no such register, or a value that it cannot have"},
    "KVM_GET_REG_LIST": {_errno.E2BIG: "the list is longer than the room for it; n now says how long: use reg_list(n)"},
    "KVM_SET_PMU_EVENT_FILTER": {
        _errno.E2BIG: "more events than KVM takes (300)",
        _errno.EBUSY: "no memory for the filter",
    },
    "KVM_X86_SET_MSR_FILTER": {
        _errno.EINVAL: "an empty or too long range, unknown flags, or KVM_MSR_FILTER_DEFAULT_DENY without any range",
    },
    "KVM_MEMORY_ENCRYPT_OP": {_errno.ENOTTY: "the VM is neither SEV nor TDX: see KVM_CREATE_VM's type"},
    "KVM_SET_MEMORY_ATTRIBUTES": {_errno.EINVAL: "an attribute that this VM lacks, or a range not of whole pages"},
    "KVM_PRE_FAULT_MEMORY": {
        _errno.ENOENT: "the address is outside all memory slots",
        _errno.EOPNOTSUPP: "not in this vCPU's mode, or not without two-dimensional paging",
    },
    "KVM_HYPERV_EVENTFD": {_errno.EEXIST: "the connection id is taken"},
}

# What an errno means for any other request.
_GENERAL_MEANINGS: Final[dict[int, str]] = {
    _errno.EPERM: "KVM does not allow this here: missing privilege, or a VM or vCPU in the wrong state",
    _errno.ENOENT: "there is no such thing in this VM",
    _errno.EIO: (
        "the VM was killed by the kernel (look for a WARN in the host's kernel log), or another process made it: "
        "open VMs and vCPUs after the fork"
    ),
    _errno.ENXIO: "the device or attribute that this needs is not there, often an interrupt controller in the kernel",
    _errno.E2BIG: "more entries than there is room for: ask again with a larger structure",
    _errno.EBADF: "the descriptor is closed, or was never open",
    _errno.EAGAIN: "not now: try again",
    _errno.ENOMEM: "the host's kernel has no memory for this",
    _errno.EFAULT: "an address in the argument is not this process's memory: keep buffers alive across the call",
    _errno.EBUSY: "too late, or in use: most settings of a VM come before its vCPUs",
    _errno.EEXIST: "there is one already",
    _errno.ENODEV: "this kernel has no such device",
    _errno.EINVAL: "KVM refuses the argument: an unknown value, flag or reserved field, or the wrong time for it",
    _errno.EMFILE: "this process has too many open files: close some, or raise RLIMIT_NOFILE",
    _errno.ENFILE: "this system has too many open files",
    _errno.ENOTTY: (
        "the descriptor is no KVM device, or one of another kind (/dev/kvm, VM, vCPU), or this kernel is too old: "
        "KVM_CHECK_EXTENSION says what it has"
    ),
    _errno.ENOSYS: "this kernel does not have it",
    _errno.EOPNOTSUPP: "this KVM or this VM does not support it",
}


class KvmError(OSError):
    """A KVM ioctl failed.

    `request` is its name, `number` its number, `errno` the error, `meaning` what that error means for this request and
    what to do next; str() has it all in one line.
    """

    def __init__(self, number: int, errno: int) -> None:
        self.number = number
        self.request = request_name(number)
        self.meaning = _MEANINGS.get(self.request, {}).get(errno) or _GENERAL_MEANINGS.get(errno, "")
        text = f"{self.request}: {_errno.errorcode.get(errno, f'errno {errno}')} ({os.strerror(errno)})"
        super().__init__(errno, f"{text}: {self.meaning}" if self.meaning else text)

    def __str__(self) -> str:
        return str(self.strerror)

    def __reduce__(self) -> tuple[type["KvmError"], tuple[int, int]]:
        return type(self), (self.number, cast(int, self.errno))


def request_name(number: int) -> str:
    """The name of an ioctl request, or its number in hexadecimal where it is none of KVM's."""
    return REQUEST_NAMES.get(number) or f"ioctl {number:#x}"


# --- the call ---------------------------------------------------------------------------------------------------------

Argument: TypeAlias = (
    "int | Structure | Union | Array[Any] | ctypes._SimpleCData[Any] | bytearray | memoryview | mmap.mmap"
)

# libc's ioctl and not fcntl.ioctl: that one refuses integers of 2^31 and more, copies short buffers, and from Python
# 3.14 on restarts an interrupted call, so that a KVM_RUN with immediate_exit would never return.
_ioctl = ctypes.CDLL(None, use_errno=True).ioctl
_ioctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_ulong)
_ioctl.restype = ctypes.c_int
_addressof = ctypes.addressof
_sizeof = ctypes.sizeof
_get_errno = ctypes.get_errno

# Requests that take a plain number, but by address: an int is put into memory for them.
_BY_ADDRESS: Final = frozenset((KVM_SET_IDENTITY_MAP_ADDR, KVM_X86_SETUP_MCE))


def ioctl(fd: int, request: int, arg: Argument = 0) -> int:
    """Call `request` on a descriptor of KVM and return what it returns (0, a count, a new descriptor, ...).

    `arg` is an int of up to 64 bits (a number, or an address that the caller keeps alive), a ctypes object, or another
    writable buffer such as a bytearray; the kernel reads and writes it in place. KVM_SET_IDENTITY_MAP_ADDR and
    KVM_X86_SETUP_MCE, which take a number by address, take a plain int too.

    Raises KvmError. For KVM_RUN alone, InterruptedError where a signal or kvm_run.immediate_exit ended it (EINTR), and
    BlockingIOError where it came back without running (EAGAIN): both happen all the time and carry no explanation. Any
    other request that a signal ends is called again, once the signal's handler has run: KVM_CREATE_VM may be one, in
    mm_take_all_locks(), and KVM_PRE_FAULT_MEMORY, which goes on from where it was. TypeError for an argument that the
    kernel could not write to (bytes), ValueError for one that is too short.
    """
    if isinstance(arg, int):
        if request in _BY_ADDRESS:
            return ioctl(fd, request, c_uint64(arg))
        address = arg
    else:
        try:
            address = _addressof(arg)  # type: ignore[arg-type]
            size = _sizeof(arg)  # type: ignore[arg-type]
        except TypeError:
            return ioctl(fd, request, _writable(request, arg))
        if size < request >> 16 & 0x3FFF:
            raise ValueError(
                f"{request_name(request)}: the argument has {size} bytes, the kernel takes {request >> 16 & 0x3FFF}"
            )
    while True:
        result: int = _ioctl(fd, request, address)
        if result != -1:
            return result
        if request == KVM_RUN or _get_errno() != _errno.EINTR:
            raise _failure(request)


def enter_by_libc(fd: int) -> None:
    """``ioctl(fd, KVM_RUN)``, with its errors."""
    if _ioctl(fd, KVM_RUN, 0) == -1:
        raise _failure(KVM_RUN)


def enter_by_fcntl(fd: int) -> None:
    """The same in two thirds of the time, where Python's own ioctl takes EINTR for an answer: before 3.14."""
    try:
        fcntl.ioctl(fd, KVM_RUN)
    except (InterruptedError, BlockingIOError):
        raise
    except OSError as error:
        raise KvmError(KVM_RUN, error.errno or 0) from None


enter: Final = enter_by_fcntl if sys.version_info < (3, 14) else enter_by_libc
"""KVM_RUN, which happens more often than everything else."""


def _failure(request: int) -> OSError:
    """What errno says of a request that has just failed."""
    error = _get_errno()
    if error == _errno.EINTR:
        return InterruptedError(error, "KVM ioctl interrupted")
    if error == _errno.EAGAIN and request == KVM_RUN:
        return BlockingIOError(error, "KVM_RUN did not run")
    return KvmError(request, error)


def _writable(request: int, arg: Any) -> Array[c_uint8]:
    """The memory of a writable buffer, as a ctypes object that keeps it alive."""
    try:
        with memoryview(arg) as view:
            return (c_uint8 * view.nbytes).from_buffer(arg)
    except (TypeError, ValueError, BufferError) as error:
        raise TypeError(
            f"{request_name(request)}: pass an int, a ctypes object or a writable buffer such as bytearray, "
            f"not {type(arg).__name__} (the kernel writes to it): {error}"
        ) from None
