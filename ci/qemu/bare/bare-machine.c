/*
 * bare-machine: run a guest from a given state up to its next exit
 *
 * A device for "-machine none".  It owns all of physical memory and all I/O
 * ports: RAM is what the client lays out in slots, everything else is a hole.
 * A client shares one memory backend with it, which holds a mailbox and the
 * RAM, and rings through a socket.  The vCPU never runs on its own: it loads
 * the state that stands in the mailbox, runs until HLT, shutdown, the end of
 * an instruction that touched a port or a hole, a single step or a time limit,
 * and leaves its state there.  State has the layout of the KVM ABI.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include <setjmp.h>
#include "qemu/main-loop.h"
#include "qemu/module.h"
#include "qemu/timer.h"
#include "qapi/error.h"
#include "cpu.h"
#include "cpu-internal.h"
#include "exec/address-spaces.h"
#include "exec/exec-all.h"
#include "exec/cpu-common.h"
#include "exec/ram_addr.h"
#include "exec/tb-flush.h"
#include "accel/tcg/cpu-ops.h"
#include "hw/i386/apic.h"
#include "hw/i386/apic_internal.h"
#include "hw/qdev-core.h"
#include "hw/qdev-properties.h"
#include "system/hostmem.h"
#include "system/runstate.h"
#include "system/tcg.h"
#include "tcg/helper-tcg.h"
#include <asm-x86/kvm.h>

#define TYPE_BARE_MACHINE "bare-machine"
OBJECT_DECLARE_SIMPLE_TYPE(BareMachine, BARE_MACHINE)

#define BARE_MAGIC      0x45524142      /* "BARE" */
#define BARE_VERSION    1
#define BARE_MSRS       64
#define BARE_SLOTS      16
#define BARE_PAGES      8192
#define BARE_LEAVES     256
#define BARE_ACCESSES   4096
#define BARE_RAM        0x40000         /* offset of guest RAM in the backend */

enum { OP_QUERY_CPUID = 1, OP_SET_CPUID, OP_SHAPE, OP_LOAD, OP_RUN };

enum {
    RESULT_OK = 1, RESULT_HALT, RESULT_SHUTDOWN, RESULT_ACCESS, RESULT_DEBUG,
    RESULT_TIMEOUT, RESULT_BAD_MSR, RESULT_BAD_SHAPE, RESULT_OTHER,
};

enum { INJECT_NONE, INJECT_EXCEPTION, INJECT_INTERRUPT, INJECT_NMI };

typedef struct BareAccess {
    uint64_t address;
    uint64_t data;
    uint32_t size;
    uint8_t write;
    uint8_t port;
    uint16_t pad;
} BareAccess;

typedef struct BareSlot {
    uint64_t gpa, size, offset;         /* offset: in the backend */
} BareSlot;

typedef struct BareMailbox {
    uint32_t magic, version;
    uint32_t op, result;
    uint32_t step, timeout_ms;
    uint64_t seed, reads;               /* reads: how many were answered */
    uint32_t inject, vector, error;
    uint32_t flush;                     /* forget all translated code */
    uint32_t n_msrs, n_slots, n_pages, n_leaves;
    uint32_t n_accesses;                /* may exceed BARE_ACCESSES */
    uint32_t detail;                    /* what OTHER or BAD_* is about */
    uint8_t pad[256 - 80];
    struct kvm_regs regs;               /* 0x100 */
    uint8_t pad1[256 - sizeof(struct kvm_regs)];
    struct kvm_debugregs debugregs;     /* 0x200 */
    struct kvm_vcpu_events events;      /* 0x280 */
    uint64_t xcr0;                      /* 0x2c0 */
    uint32_t pkru, pad2;
    uint8_t pad3[48];
    uint64_t egpr[16];                  /* 0x300 */
    uint8_t pad4[128];
    struct kvm_sregs2 sregs2;           /* 0x400 */
    uint8_t pad5[512 - sizeof(struct kvm_sregs2)];
    uint64_t msrs[BARE_MSRS][2];        /* 0x600: index, value */
    BareSlot slots[BARE_SLOTS];         /* 0xa00 */
    uint8_t pad6[0x1000 - 0xa00 - BARE_SLOTS * sizeof(BareSlot)];
    uint32_t pages[BARE_PAGES];         /* 0x1000: rewritten by the client */
    struct kvm_cpuid_entry2 leaves[BARE_LEAVES];        /* 0x9000 */
    uint8_t pad7[0x3000 - BARE_LEAVES * sizeof(struct kvm_cpuid_entry2)];
    BareAccess accesses[BARE_ACCESSES]; /* 0xc000 */
} BareMailbox;

QEMU_BUILD_BUG_ON(offsetof(BareMailbox, regs) != 0x100);
QEMU_BUILD_BUG_ON(offsetof(BareMailbox, sregs2) != 0x400);
QEMU_BUILD_BUG_ON(offsetof(BareMailbox, msrs) != 0x600);
QEMU_BUILD_BUG_ON(offsetof(BareMailbox, pages) != 0x1000);
QEMU_BUILD_BUG_ON(offsetof(BareMailbox, leaves) != 0x9000);
QEMU_BUILD_BUG_ON(offsetof(BareMailbox, accesses) != 0xc000);
QEMU_BUILD_BUG_ON(sizeof(BareMailbox) > BARE_RAM);

struct BareMachine {
    DeviceState parent_obj;

    HostMemoryBackend *backend;
    int32_t fd;

    CPUState *cs;
    MemoryRegion *ram;
    BareMailbox *box;
    MemoryRegion root, hole, ports;
    MemoryRegion *aliases[BARE_SLOTS];
    unsigned n_aliases;
    QEMUTimer timer;
    bool timed_out, shutdown, serving;
    FeatureWordArray features;
    uint32_t phys_bits, vendor[3];
    struct kvm_cpuid_entry2 leaves[BARE_LEAVES];
    unsigned n_leaves;
};

static BareMachine *the_machine;

/* --- what the guest touches --------------------------------------------- */

/* What a device answers: splitmix64 of the Case's seed and the ordinal. */
static uint64_t bare_answer(BareMailbox *box)
{
    uint64_t z = box->seed + 0x9e3779b97f4a7c15ull * (box->reads++ * 8 + 1);

    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ z >> 27) * 0x94d049bb133111ebull;
    return z ^ z >> 31;
}

static void bare_access(BareMachine *bm, hwaddr address, uint64_t data,
                        unsigned size, bool write, bool port)
{
    BareMailbox *box = bm->box;

    if (box->n_accesses < BARE_ACCESSES) {
        box->accesses[box->n_accesses] = (BareAccess) {
            .address = address, .data = data, .size = size,
            .write = write, .port = port,
        };
    }
    box->n_accesses++;
    /* Stop at the end of this instruction: it is the last of its TB. */
    cpu_exit(bm->cs);
}

static uint64_t bare_read(BareMachine *bm, hwaddr address, unsigned size,
                          bool port)
{
    uint64_t data = bare_answer(bm->box);

    if (size < 8) {
        data &= (1ull << size * 8) - 1;
    }
    bare_access(bm, address, data, size, false, port);
    return data;
}

static uint64_t bare_hole_read(void *opaque, hwaddr address, unsigned size)
{
    return bare_read(opaque, address, size, false);
}

static void bare_hole_write(void *opaque, hwaddr address, uint64_t data,
                            unsigned size)
{
    bare_access(opaque, address, data, size, true, false);
}

static uint64_t bare_port_read(void *opaque, hwaddr address, unsigned size)
{
    return bare_read(opaque, address, size, true);
}

static void bare_port_write(void *opaque, hwaddr address, uint64_t data,
                            unsigned size)
{
    bare_access(opaque, address, data, size, true, true);
}

static const MemoryRegionOps bare_hole_ops = {
    .read = bare_hole_read,
    .write = bare_hole_write,
    .endianness = DEVICE_LITTLE_ENDIAN,
    .undivided = true,
    .valid = { .min_access_size = 1, .max_access_size = 8, .unaligned = true },
    .impl = { .min_access_size = 1, .max_access_size = 8, .unaligned = true },
};

static const MemoryRegionOps bare_port_ops = {
    .read = bare_port_read,
    .write = bare_port_write,
    .endianness = DEVICE_LITTLE_ENDIAN,
    .valid = { .min_access_size = 1, .max_access_size = 4, .unaligned = true },
    .impl = { .min_access_size = 1, .max_access_size = 4, .unaligned = true },
};

static bool bare_shutdown(CPUX86State *env)
{
    the_machine->shutdown = true;
    return true;
}

/* --- CPUID ---------------------------------------------------------------- */

static const struct kvm_cpuid_entry2 *bare_leaf(BareMachine *bm,
                                                uint32_t function,
                                                uint32_t index)
{
    for (unsigned i = 0; i < bm->n_leaves; i++) {
        const struct kvm_cpuid_entry2 *e = &bm->leaves[i];

        if (e->function == function &&
            (e->index == index ||
             !(e->flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX))) {
            return e;
        }
    }
    return NULL;
}

/*
 * CPUID as the client's leaves say.  What follows other registers still comes
 * from them: OSXSAVE, OSPKE, APIC, XSAVE sizes, Intel's SYSCALL bit.
 */
static bool bare_cpuid(CPUX86State *env, uint32_t function, uint32_t index,
                       uint32_t *eax, uint32_t *ebx, uint32_t *ecx,
                       uint32_t *edx)
{
    BareMachine *bm = the_machine;
    const struct kvm_cpuid_entry2 *e = bare_leaf(bm, function, index);
    const struct kvm_cpuid_entry2 *top = bare_leaf(bm, function & 1u << 31, 0);
    bool in_range = top && function <= top->eax;
    uint32_t a, b, c, d;

    if (!bm->n_leaves) {
        return false;
    }
    *eax = *ebx = *ecx = *edx = 0;
    if (!e && !in_range && !IS_AMD_CPU(env)) {
        top = bare_leaf(bm, 0, 0);
        function = top ? top->eax : 0;
        e = bare_leaf(bm, function, index);
    }
    if (!e) {
        if (in_range && (function == 0xb || function == 0x1f)) {
            const struct kvm_cpuid_entry2 *first = bare_leaf(bm, function, 0);
            *ecx = index & 0xff;
            *edx = first ? first->edx : 0;
        }
        return true;
    }
    *eax = e->eax;
    *ebx = e->ebx;
    *ecx = e->ecx;
    *edx = e->edx;
    if (function == 1) {
        *ecx = (*ecx & ~CPUID_EXT_OSXSAVE) |
               (env->cr[4] & CR4_OSXSAVE_MASK ? CPUID_EXT_OSXSAVE : 0);
        if (!cpu_is_apic_enabled(env_archcpu(env)->apic_state)) {
            *edx &= ~CPUID_APIC;
        }
    } else if (function == 7 && index == 0) {
        *ecx = (*ecx & ~CPUID_7_0_ECX_OSPKE) |
               (env->cr[4] & CR4_PKE_MASK ? CPUID_7_0_ECX_OSPKE : 0);
    } else if (function == 0xd && index < 2) {
        cpu_x86_cpuid(env, function, index, &a, &b, &c, &d);
        *ebx = b;
    } else if (function == 0x80000001 && !IS_AMD_CPU(env) &&
               !(env->hflags & HF_CS64_MASK)) {
        *edx &= ~CPUID_EXT2_SYSCALL;
    }
    return true;
}

static uint32_t bare_register(const struct kvm_cpuid_entry2 *e, int reg)
{
    switch (reg) {
    case R_EAX:
        return e->eax;
    case R_EBX:
        return e->ebx;
    case R_ECX:
        return e->ecx;
    default:
        return e->edx;
    }
}

/* Behave as the client's leaves say, as far as this emulator can. */
static void bare_set_cpuid(BareMachine *bm)
{
    X86CPU *cpu = X86_CPU(bm->cs);
    CPUX86State *env = &cpu->env;
    const struct kvm_cpuid_entry2 *e;

    bm->n_leaves = MIN(bm->box->n_leaves, BARE_LEAVES);
    memcpy(bm->leaves, bm->box->leaves, bm->n_leaves * sizeof(bm->leaves[0]));
    memcpy(env->features, bm->features, sizeof(bm->features));
    cpu->phys_bits = bm->phys_bits;
    env->cpuid_vendor1 = bm->vendor[0];
    env->cpuid_vendor2 = bm->vendor[1];
    env->cpuid_vendor3 = bm->vendor[2];
    if (bm->n_leaves) {
        for (FeatureWord w = 0; w < FEATURE_WORDS; w++) {
            FeatureWordInfo *wi = &feature_word_info[w];

            if (wi->type != CPUID_FEATURE_WORD) {
                continue;
            }
            e = bare_leaf(bm, wi->cpuid.eax, wi->cpuid.ecx);
            env->features[w] &= e ? bare_register(e, wi->cpuid.reg) : 0;
        }
        e = bare_leaf(bm, 0, 0);
        if (e) {
            env->cpuid_vendor1 = e->ebx;
            env->cpuid_vendor2 = e->edx;
            env->cpuid_vendor3 = e->ecx;
        }
        e = bare_leaf(bm, 0x80000008, 0);
        cpu->phys_bits = e && (e->eax & 0xff) ? e->eax & 0xff : 36;
    }
    tb_flush(bm->cs);
}

static void bare_query_cpuid(BareMachine *bm)
{
    BareMailbox *box = bm->box;

    for (unsigned i = 0; i < MIN(box->n_leaves, BARE_LEAVES); i++) {
        struct kvm_cpuid_entry2 *e = &box->leaves[i];

        cpu_x86_cpuid(cpu_env(bm->cs), e->function, e->index,
                      &e->eax, &e->ebx, &e->ecx, &e->edx);
    }
}

/* --- state ---------------------------------------------------------------- */

static void bare_get_segment(struct kvm_segment *to, const SegmentCache *from)
{
    unsigned flags = from->flags;

    *to = (struct kvm_segment) {
        .base = from->base, .limit = from->limit, .selector = from->selector,
        .type = flags >> DESC_TYPE_SHIFT & 15,
        .present = !!(flags & DESC_P_MASK),
        .dpl = flags >> DESC_DPL_SHIFT & 3,
        .db = flags >> DESC_B_SHIFT & 1,
        .s = !!(flags & DESC_S_MASK),
        .l = flags >> DESC_L_SHIFT & 1,
        .g = !!(flags & DESC_G_MASK),
        .avl = !!(flags & DESC_AVL_MASK),
        .unusable = !(flags & DESC_P_MASK),
    };
}

static void bare_set_segment(SegmentCache *to, const struct kvm_segment *from)
{
    to->selector = from->selector;
    to->base = from->base;
    to->limit = from->limit;
    to->flags = from->type << DESC_TYPE_SHIFT |
                (from->present && !from->unusable ? DESC_P_MASK : 0) |
                from->dpl << DESC_DPL_SHIFT |
                (from->db ? DESC_B_MASK : 0) | (from->s ? DESC_S_MASK : 0) |
                (from->l ? DESC_L_MASK : 0) | (from->g ? DESC_G_MASK : 0) |
                (from->avl ? DESC_AVL_MASK : 0);
}

/* Where an MSR under observation is kept. */
static uint64_t *bare_msr(CPUX86State *env, uint32_t index)
{
    switch (index) {
    case MSR_IA32_SYSENTER_ESP:
        return &env->sysenter_esp;
    case MSR_IA32_SYSENTER_EIP:
        return &env->sysenter_eip;
    case MSR_PAT:
        return &env->pat;
    case MSR_STAR:
        return &env->star;
    case MSR_LSTAR:
        return &env->lstar;
    case MSR_CSTAR:
        return &env->cstar;
    case MSR_FMASK:
        return &env->fmask;
    case MSR_KERNELGSBASE:
        return &env->kernelgsbase;
    case MSR_TSC_AUX:
        return &env->tsc_aux;
    case MSR_IA32_MISC_ENABLE:
        return &env->msr_ia32_misc_enable;
    default:
        return NULL;
    }
}

static const unsigned bare_gpr_order[] = {
    R_EAX, R_EBX, R_ECX, R_EDX, R_ESI, R_EDI, R_ESP, R_EBP,
    8, 9, 10, 11, 12, 13, 14, 15,
};

static void bare_get_sregs(BareMachine *bm, CPUX86State *env)
{
    struct kvm_sregs2 *s = &bm->box->sregs2;
    DeviceState *apic = env_archcpu(env)->apic_state;

    bare_get_segment(&s->cs, &env->segs[R_CS]);
    bare_get_segment(&s->ds, &env->segs[R_DS]);
    bare_get_segment(&s->es, &env->segs[R_ES]);
    bare_get_segment(&s->fs, &env->segs[R_FS]);
    bare_get_segment(&s->gs, &env->segs[R_GS]);
    bare_get_segment(&s->ss, &env->segs[R_SS]);
    bare_get_segment(&s->tr, &env->tr);
    bare_get_segment(&s->ldt, &env->ldt);
    s->gdt = (struct kvm_dtable) { env->gdt.base, env->gdt.limit };
    s->idt = (struct kvm_dtable) { env->idt.base, env->idt.limit };
    s->cr0 = env->cr[0];
    s->cr2 = env->cr[2];
    s->cr3 = env->cr[3];
    s->cr4 = env->cr[4];
    s->cr8 = cpu_get_apic_tpr(apic);
    s->efer = env->efer;
    s->apic_base = cpu_get_apic_base(apic);
    s->flags = 0;
    memset(s->pdptrs, 0, sizeof(s->pdptrs));
    if ((env->cr[0] & CR0_PG_MASK) && (env->cr[4] & CR4_PAE_MASK) &&
        !(env->efer & MSR_EFER_LMA)) {
        /* This emulator has no PDPTE registers: it walks the table. */
        s->flags = KVM_SREGS2_FLAGS_PDPTRS_VALID;
        for (int i = 0; i < 4; i++) {
            s->pdptrs[i] = x86_ldq_phys(bm->cs, (env->cr[3] & ~31ull) + 8 * i);
        }
    }
}

static void bare_get_state(BareMachine *bm)
{
    BareMailbox *box = bm->box;
    CPUX86State *env = cpu_env(bm->cs);
    __u64 *gpr = (__u64 *)&box->regs;
    uint32_t seen = box->n_accesses;

    for (int i = 0; i < 16; i++) {
        gpr[i] = env->regs[bare_gpr_order[i]];
    }
    for (int i = 16; i < ARRAY_SIZE(env->regs); i++) {
        box->egpr[i - 16] = env->regs[i];
    }
    box->regs.rip = env->eip;
    box->regs.rflags = env->eflags;
    bare_get_sregs(bm, env);
    box->n_accesses = seen;     /* a PDPT in a hole is not the guest's access */
    for (int i = 0; i < 4; i++) {
        box->debugregs.db[i] = env->dr[i];
    }
    box->debugregs.dr6 = env->dr[6];
    box->debugregs.dr7 = env->dr[7];
    memset(&box->events, 0, sizeof(box->events));
    box->events.flags = KVM_VCPUEVENT_VALID_NMI_PENDING |
                        KVM_VCPUEVENT_VALID_SHADOW | KVM_VCPUEVENT_VALID_SMM;
    box->events.interrupt.shadow = !!(env->hflags & HF_INHIBIT_IRQ_MASK);
    box->events.nmi.masked = !!(env->hflags2 & HF2_NMI_MASK);
    box->events.nmi.pending =
        !!(bm->cs->interrupt_request & CPU_INTERRUPT_NMI);
    box->events.smi.smm = !!(env->hflags & HF_SMM_MASK);
    box->xcr0 = env->xcr0;
    box->pkru = env->pkru;
    for (unsigned i = 0; i < box->n_msrs; i++) {
        uint32_t index = box->msrs[i][0];
        uint64_t *kept = bare_msr(env, index);

        box->msrs[i][1] = kept ? *kept : env->sysenter_cs;
    }
}

static bool bare_set_msrs(BareMachine *bm, CPUX86State *env)
{
    BareMailbox *box = bm->box;

    env->sysenter_cs = env->sysenter_esp = env->sysenter_eip = 0;
    env->star = env->lstar = env->cstar = env->fmask = env->kernelgsbase = 0;
    env->tsc_aux = env->vm_hsave = 0;
    env->pat = 0x0007040600070406ull;
    for (unsigned i = 0; i < box->n_msrs; i++) {
        uint32_t index = box->msrs[i][0];
        uint64_t *kept = bare_msr(env, index);

        if (kept) {
            *kept = box->msrs[i][1];
        } else if (index == MSR_IA32_SYSENTER_CS) {
            env->sysenter_cs = box->msrs[i][1];
        } else {
            box->detail = index;
            return false;
        }
    }
    return true;
}

static void bare_set_sregs(BareMachine *bm, CPUX86State *env)
{
    const struct kvm_sregs2 *s = &bm->box->sregs2;
    APICCommonState *apic = APIC_COMMON(env_archcpu(env)->apic_state);

    bare_set_segment(&env->segs[R_CS], &s->cs);
    bare_set_segment(&env->segs[R_DS], &s->ds);
    bare_set_segment(&env->segs[R_ES], &s->es);
    bare_set_segment(&env->segs[R_FS], &s->fs);
    bare_set_segment(&env->segs[R_GS], &s->gs);
    bare_set_segment(&env->segs[R_SS], &s->ss);
    bare_set_segment(&env->tr, &s->tr);
    bare_set_segment(&env->ldt, &s->ldt);
    env->gdt.base = s->gdt.base;
    env->gdt.limit = s->gdt.limit;
    env->idt.base = s->idt.base;
    env->idt.limit = s->idt.limit;
    apic->apicbase = s->apic_base;      /* also back from disabled */
    cpu_set_apic_tpr(env_archcpu(env)->apic_state, s->cr8);
    env->int_ctl = s->cr8 & V_TPR_MASK;
    cpu_load_efer(env, s->efer);
    cpu_x86_update_cr4(env, s->cr4);
    env->cr[0] = s->cr0;
    env->cr[2] = s->cr2;
    env->cr[3] = s->cr3;
    env->cr[4] = s->cr4;
}

/* Nothing of an earlier guest is left: x87, SSE, SVM, events in flight. */
static void bare_clear(BareMachine *bm, CPUX86State *env)
{
    CPUState *cs = bm->cs;

    cs->halted = 0;
    cs->interrupt_request = 0;
    cs->exception_index = -1;
    cs->cflags_next_tb = -1;
    cs->watchpoint_hit = NULL;
    cpu_single_step(cs, 0);
    cpu_breakpoint_remove_all(cs, BP_CPU);
    cpu_watchpoint_remove_all(cs, BP_CPU);
    memset(env->cpu_breakpoint, 0, sizeof(env->cpu_breakpoint));
    env->old_exception = -1;
    env->error_code = 0;
    env->exception_is_int = 0;
    env->a20_mask = ~0;
    env->hflags = 0;
    env->hflags2 = HF2_GIF_MASK | HF2_VGIF_MASK;
    env->vm_vmcb = env->nested_cr3 = env->intercept = 0;
    env->intercept_exceptions = 0;
    env->tsc_offset = 0;
    memset(env->fpregs, 0, sizeof(env->fpregs));
    memset(env->fptags, 1, sizeof(env->fptags));
    env->fpstt = env->fpus = 0;
    cpu_set_fpuc(env, 0x37f);
    memset(env->xmm_regs, 0, sizeof(env->xmm_regs));
    cpu_set_mxcsr(env, 0x1f80);
    memset(env->bnd_regs, 0, sizeof(env->bnd_regs));
    memset(&env->bndcs_regs, 0, sizeof(env->bndcs_regs));
    env->msr_bndcfgs = env->pkrs = 0;
}

static uint32_t bare_load(BareMachine *bm)
{
    BareMailbox *box = bm->box;
    CPUState *cs = bm->cs;
    CPUX86State *env = cpu_env(cs);
    const __u64 *gpr = (const __u64 *)&box->regs;
    ram_addr_t ram = memory_region_get_ram_addr(bm->ram);

    if (box->flush) {
        tb_flush(cs);
    }
    for (unsigned i = 0; i < MIN(box->n_pages, BARE_PAGES); i++) {
        ram_addr_t page = ram + (ram_addr_t)box->pages[i] * TARGET_PAGE_SIZE;

        tb_invalidate_phys_range(page, page + TARGET_PAGE_SIZE - 1);
    }
    bare_clear(bm, env);
    if (!bare_set_msrs(bm, env)) {
        return RESULT_BAD_MSR;
    }
    for (int i = 0; i < 16; i++) {
        env->regs[bare_gpr_order[i]] = gpr[i];
    }
    for (int i = 16; i < ARRAY_SIZE(env->regs); i++) {
        env->regs[i] = box->egpr[i - 16];
    }
    env->eip = box->regs.rip;
    env->eflags = box->regs.rflags | 2;
    env->xcr0 = box->xcr0;
    env->pkru = box->pkru;
    bare_set_sregs(bm, env);
    x86_update_hflags(env);
    cpu_sync_bndcs_hflags(env);
    if (box->events.interrupt.shadow) {
        env->hflags |= HF_INHIBIT_IRQ_MASK;
    }
    if (box->events.nmi.masked) {
        env->hflags2 |= HF2_NMI_MASK;
    }
    if (box->events.smi.smm) {
        env->hflags |= HF_SMM_MASK;
    }
    if (box->events.nmi.pending) {
        cpu_interrupt(cs, CPU_INTERRUPT_NMI);
    }
    for (int i = 0; i < 4; i++) {
        env->dr[i] = box->debugregs.db[i];
    }
    env->dr[6] = box->debugregs.dr6;
    env->dr[7] = DR7_FIXED_1;           /* the next line arms what it enables */
    cpu_x86_update_dr7(env, box->debugregs.dr7);
    tlb_flush(cs);
    return RESULT_OK;
}

static uint32_t bare_shape(BareMachine *bm)
{
    BareMailbox *box = bm->box;

    memory_region_transaction_begin();
    for (unsigned i = 0; i < bm->n_aliases; i++) {
        memory_region_del_subregion(&bm->root, bm->aliases[i]);
        object_unparent(OBJECT(bm->aliases[i]));
        bm->aliases[i] = NULL;          /* freed with its last reference */
    }
    bm->n_aliases = 0;
    for (unsigned i = 0; i < MIN(box->n_slots, BARE_SLOTS); i++) {
        const BareSlot *slot = &box->slots[i];
        MemoryRegion *alias = MEMORY_REGION(object_new(TYPE_MEMORY_REGION));

        if (slot->offset < BARE_RAM || slot->offset > bm->backend->size ||
            slot->size > bm->backend->size - slot->offset) {
            box->detail = i;
            object_unref(OBJECT(alias));
            memory_region_transaction_commit();
            return RESULT_BAD_SHAPE;
        }
        memory_region_init_alias(alias, OBJECT(bm), "bare-ram[*]", bm->ram,
                                 slot->offset, slot->size);
        memory_region_add_subregion_overlap(&bm->root, slot->gpa, alias, 1);
        bm->aliases[bm->n_aliases++] = alias;
    }
    memory_region_transaction_commit();
    tb_flush(bm->cs);
    return RESULT_OK;
}

/* --- running -------------------------------------------------------------- */

static void bare_inject(BareMachine *bm)
{
    BareMailbox *box = bm->box;
    CPUState *cs = bm->cs;
    CPUX86State *env = cpu_env(cs);

    switch (box->inject) {
    case INJECT_EXCEPTION:
        cs->exception_index = box->vector;
        env->error_code = box->error;
        env->exception_is_int = 0;
        env->exception_next_eip = env->eip;
        break;
    case INJECT_INTERRUPT:
        cs->cc->tcg_ops->cpu_exec_enter(cs);
        if (sigsetjmp(cs->jmp_env, 0) == 0) {
            do_interrupt_x86_hardirq(env, box->vector, 1);
        }       /* else it faulted: exception_index says with what */
        cs->cc->tcg_ops->cpu_exec_exit(cs);
        break;
    case INJECT_NMI:
        cpu_interrupt(cs, CPU_INTERRUPT_NMI);
        break;
    }
    box->inject = INJECT_NONE;
}

static uint32_t bare_run(BareMachine *bm)
{
    BareMailbox *box = bm->box;
    CPUState *cs = bm->cs;
    uint32_t result = 0;

    box->n_accesses = 0;
    bm->shutdown = bm->timed_out = false;
    cs->halted = 0;
    if (!!box->step != !!cs->singlestep_enabled) {
        cpu_single_step(cs, box->step ?
                        SSTEP_ENABLE | SSTEP_NOIRQ | SSTEP_NOTIMER : 0);
    }
    bare_inject(bm);
    timer_mod(&bm->timer, qemu_clock_get_ms(QEMU_CLOCK_REALTIME) +
                          box->timeout_ms);
    while (!result) {
        int r;

        process_queued_cpu_work(cs);
        bql_unlock();
        cpu_exec_start(cs);
        r = cpu_exec(cs);
        cpu_exec_end(cs);
        if (r == EXCP_ATOMIC) {
            cpu_exec_step_atomic(cs);
        }
        bql_lock();
        if (bm->shutdown) {
            result = RESULT_SHUTDOWN;
        } else if (r == EXCP_HLT) {
            result = RESULT_HALT;
        } else if (r == EXCP_DEBUG) {
            result = RESULT_DEBUG;
        } else if (r != EXCP_INTERRUPT && r != EXCP_ATOMIC) {
            box->detail = r;
            result = RESULT_OTHER;
        } else if (box->n_accesses) {
            result = RESULT_ACCESS;
        } else if (bm->timed_out) {
            result = RESULT_TIMEOUT;
        }
    }
    timer_del(&bm->timer);
    qatomic_set_mb(&cs->exit_request, 0);
    bare_get_state(bm);
    return result;
}

static void bare_expired(void *opaque)
{
    BareMachine *bm = opaque;

    bm->timed_out = true;
    cpu_exit(bm->cs);
}

static uint32_t bare_do(BareMachine *bm)
{
    switch (bm->box->op) {
    case OP_QUERY_CPUID:
        bare_query_cpuid(bm);
        return RESULT_OK;
    case OP_SET_CPUID:
        bare_set_cpuid(bm);
        return RESULT_OK;
    case OP_SHAPE:
        return bare_shape(bm);
    case OP_LOAD:
        return bare_load(bm);
    case OP_RUN:
        return bare_run(bm);
    default:
        bm->box->detail = bm->box->op;
        return RESULT_OTHER;
    }
}

/* The vCPU's whole life: serve the client until it hangs up. */
static void bare_serve(CPUState *cs, run_on_cpu_data data)
{
    BareMachine *bm = data.host_ptr;
    char bell = 0;

    for (;;) {
        ssize_t n;

        process_queued_cpu_work(cs);
        bql_unlock();
        do {
            n = read(bm->fd, &bell, 1);
        } while (n < 0 && errno == EINTR);
        if (n != 1) {
            _exit(0);
        }
        bql_lock();
        bm->box->result = bare_do(bm);
        do {
            n = write(bm->fd, &bell, 1);
        } while (n < 0 && errno == EINTR);
    }
}

static void bare_state_changed(void *opaque, bool running, RunState state)
{
    BareMachine *bm = opaque;

    if (running && !bm->serving) {
        bm->serving = true;
        async_run_on_cpu(bm->cs, bare_serve, RUN_ON_CPU_HOST_PTR(bm));
    }
}

static void bare_realize(DeviceState *dev, Error **errp)
{
    BareMachine *bm = BARE_MACHINE(dev);
    X86CPU *cpu;

    if (the_machine || !first_cpu || !tcg_enabled()) {
        error_setg(errp, "bare-machine: needs TCG and one vCPU, and is one");
        return;
    }
    cpu = X86_CPU(first_cpu);
    if (!bm->backend || bm->backend->size <= BARE_RAM || !cpu->apic_state) {
        error_setg(errp, "bare-machine: needs a memory backend and an APIC");
        return;
    }
    the_machine = bm;
    bm->cs = first_cpu;
    bm->ram = host_memory_backend_get_memory(bm->backend);
    bm->box = memory_region_get_ram_ptr(bm->ram);
    host_memory_backend_set_mapped(bm->backend, true);
    memcpy(bm->features, cpu->env.features, sizeof(bm->features));
    bm->phys_bits = cpu->phys_bits;
    bm->vendor[0] = cpu->env.cpuid_vendor1;
    bm->vendor[1] = cpu->env.cpuid_vendor2;
    bm->vendor[2] = cpu->env.cpuid_vendor3;
    bm->box->magic = BARE_MAGIC;
    bm->box->version = BARE_VERSION;
    bm->box->result = RESULT_OK;

    memory_region_init(&bm->root, OBJECT(dev), "bare-root", UINT64_MAX);
    memory_region_init_io(&bm->hole, OBJECT(dev), &bare_hole_ops, bm,
                          "bare-hole", UINT64_MAX);
    memory_region_add_subregion(&bm->root, 0, &bm->hole);
    memory_region_init_io(&bm->ports, OBJECT(dev), &bare_port_ops, bm,
                          "bare-ports", 0x10000);
    /* Above everything else: the local APIC's page is a hole too. */
    memory_region_add_subregion_overlap(get_system_memory(), 0, &bm->root,
                                        0x10000);
    memory_region_add_subregion_overlap(get_system_io(), 0, &bm->ports,
                                        0x10000);
    timer_init_ms(&bm->timer, QEMU_CLOCK_REALTIME, bare_expired, bm);
    tcg_x86_shutdown_hook = bare_shutdown;
    tcg_x86_cpuid_hook = bare_cpuid;
    qemu_add_vm_change_state_handler(bare_state_changed, bm);
}

static const Property bare_properties[] = {
    DEFINE_PROP_LINK("memory", BareMachine, backend, TYPE_MEMORY_BACKEND,
                     HostMemoryBackend *),
    DEFINE_PROP_INT32("fd", BareMachine, fd, -1),
};

static void bare_class_init(ObjectClass *klass, void *data)
{
    DeviceClass *dc = DEVICE_CLASS(klass);

    dc->realize = bare_realize;
    dc->hotpluggable = false;
    dc->desc = "Runs guests from a given state to their next exit";
    device_class_set_props(dc, bare_properties);
    set_bit(DEVICE_CATEGORY_MISC, dc->categories);
}

static const TypeInfo bare_info = {
    .name = TYPE_BARE_MACHINE,
    .parent = TYPE_DEVICE,
    .instance_size = sizeof(BareMachine),
    .class_init = bare_class_init,
};

static void bare_register_types(void)
{
    type_register_static(&bare_info);
}

type_init(bare_register_types)
