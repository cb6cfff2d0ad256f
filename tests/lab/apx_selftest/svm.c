/* R16-R31 in an SVM guest. VMCB offsets: AMD APM volume 2, appendix B. */
#include "selftest.h"

enum {
    INTERCEPT_EXCEPTIONS = 0x8, INTERCEPT_MISC2 = 0x10, ASID = 0x58, EXIT_CODE = 0x70, EXIT_INFO_1 = 0x78,
    EXIT_INFO_2 = 0x80, NESTED_CONTROL = 0x90, NESTED_CR3 = 0xb0,
    ES = 0x400, CS = 0x410, SS = 0x420, DS = 0x430, FS = 0x440, GS = 0x450, GDTR = 0x460, LDTR = 0x470, IDTR = 0x480,
    TR = 0x490, EFER = 0x4d0, CR4 = 0x548, CR3 = 0x550, CR0 = 0x558, DR7 = 0x560, DR6 = 0x568, RFLAGS = 0x570,
    RIP = 0x578, RSP = 0x5d8, PAT = 0x668,
};
enum { VMEXIT_EXCEPTION_UD = 0x46, VMEXIT_VMMCALL = 0x81, VMEXIT_XSETBV = 0x8d, VMEXIT_NPF = 0x400 };
enum { MISC2_VMRUN = 1 << 0, MISC2_VMMCALL = 1 << 1, MISC2_XSETBV = 1 << 13 };
enum { MSR_EFER = 0xc0000080, MSR_VM_HSAVE_PA = 0xc0010117, EFER_SVME = 1 << 12 };

/* svm.S: runs the guest with R16-R31 from in[]; they are in out[] afterwards. */
void svm_run(void *vmcb, const uint64_t in[EGPRS], uint64_t out[EGPRS]);
extern const char guest_increment[], guest_ud[], guest_ud_instruction[], guest_npf[], guest_npf_instruction[];
extern const char guest_xsetbv[];

static uint8_t vmcb[4096] __attribute__((aligned(4096))), host_save[4096] __attribute__((aligned(4096)));
static uint8_t guest_stack[4096] __attribute__((aligned(4096)));
static uint64_t nested_pml4[512] __attribute__((aligned(4096))), nested_pdpt[512] __attribute__((aligned(4096)));
static uint64_t nested_pd[512] __attribute__((aligned(4096)));

static uint64_t *quad(int offset)
{
    return (uint64_t *)(void *)(vmcb + offset);
}

static uint32_t *dword(int offset)
{
    return (uint32_t *)(void *)(vmcb + offset);
}

static void set_segment(int offset, uint16_t selector, uint16_t attributes)
{
    *dword(offset) = selector | (uint32_t)attributes << 16;
    *dword(offset + 4) = ~0u;
    *quad(offset + 8) = 0;
}

static void set_table(int offset, const void *descriptor)
{
    uint16_t limit;

    memcpy(&limit, descriptor, 2);
    *dword(offset + 4) = limit;
    memcpy(quad(offset + 8), (const uint8_t *)descriptor + 2, 8);
}

static void prepare(const char *rip)
{
    uint8_t descriptor[10];
    uint64_t cr0, cr3;

    memset(vmcb, 0, sizeof(vmcb));
    *dword(INTERCEPT_MISC2) = MISC2_VMRUN | MISC2_VMMCALL;
    *dword(ASID) = 1;
    set_segment(CS, 8, 0xa9b);
    for (int segment = ES; segment <= GS; segment += 0x10)
        if (segment != CS)
            set_segment(segment, segment >= FS ? 0 : 16, 0xc93);
    set_segment(LDTR, 0, 0x82);
    set_segment(TR, 0, 0x8b);
    asm volatile("sgdt %0" : "=m"(descriptor));
    set_table(GDTR, descriptor);
    asm volatile("sidt %0" : "=m"(descriptor));
    set_table(IDTR, descriptor);
    asm volatile("mov %%cr0, %0; mov %%cr3, %1" : "=r"(cr0), "=r"(cr3));
    *quad(EFER) = rdmsr(MSR_EFER);
    *quad(CR0) = cr0;
    *quad(CR3) = cr3;
    *quad(CR4) = read_cr4();
    *quad(DR6) = 0xffff0ff0;
    *quad(DR7) = 0x400;
    *quad(RFLAGS) = 2;
    *quad(RIP) = (uintptr_t)rip;
    *quad(RSP) = (uintptr_t)(guest_stack + sizeof(guest_stack));
    *quad(PAT) = 0x0007040600070406ul;
}

static void nested_page_fault(const uint64_t *in, uint64_t *out)
{
    nested_pml4[0] = (uintptr_t)nested_pdpt | 7;
    nested_pdpt[0] = (uintptr_t)nested_pd | 7;
    for (uint64_t i = 0; i < 512; i++)
        nested_pd[i] = i * 0x200000 | 0x87;
    nested_pd[0x100] = 0; /* 0x20000000 */
    prepare(guest_npf);
    *quad(NESTED_CONTROL) = 1;
    *quad(NESTED_CR3) = (uintptr_t)nested_pml4;
    svm_run(vmcb, in, out);
    check("SVM: #NPF of a REX2 store",
          *quad(EXIT_CODE) == VMEXIT_NPF && *quad(RIP) == (uintptr_t)guest_npf_instruction
              && *quad(EXIT_INFO_2) == 0x20000030,
          *quad(EXIT_INFO_2));
}

void test_svm(void)
{
    uint64_t in[EGPRS], out[EGPRS];
    bool good = true;

    if (!(cpuid(0x80000001, 0).ecx >> 2 & 1)) {
        put("no SVM\n");
        return;
    }
    wrmsr(MSR_EFER, rdmsr(MSR_EFER) | EFER_SVME);
    wrmsr(MSR_VM_HSAVE_PA, (uintptr_t)host_save);
    for (uint64_t i = 0; i < EGPRS; i++)
        in[i] = 0x1000000000000000ul + i * 0x10101;

    prepare(guest_increment);
    svm_run(vmcb, in, out);
    for (uint64_t i = 0; i < EGPRS; i++) /* the guest pops R16 into R17 */
        good = good && out[i] == (i == 1 ? in[0] + 16 : in[i] + 16 + i);
    check("SVM: the guest sees and changes R16-R31", *quad(EXIT_CODE) == VMEXIT_VMMCALL && good, *quad(EXIT_CODE));

    prepare(guest_ud);
    *quad(CR4) &= ~CR4_OSXSAVE;
    *dword(INTERCEPT_EXCEPTIONS) = 1 << UD;
    svm_run(vmcb, in, out);
    check("SVM: #UD in a guest with CR4.OSXSAVE=0",
          *quad(EXIT_CODE) == VMEXIT_EXCEPTION_UD && *quad(RIP) == (uintptr_t)guest_ud_instruction, *quad(EXIT_CODE));
    check("SVM: REX2 in the host after that", out[EGPRS - 1] == in[EGPRS - 1], out[EGPRS - 1]);

    prepare(guest_xsetbv);
    *dword(INTERCEPT_MISC2) |= MISC2_XSETBV;
    svm_run(vmcb, in, out);
    check("SVM: XSETBV intercept", *quad(EXIT_CODE) == VMEXIT_XSETBV, *quad(EXIT_CODE));
    if (cpuid(0x8000000a, 0).edx & 1)
        nested_page_fault(in, out);
}
