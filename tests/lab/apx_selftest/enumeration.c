/* CPUID, XCR0, and what the instructions do while the state is off. */
#include "selftest.h"

static void do_xsetbv(void *value)
{
    xsetbv((uintptr_t)value);
}

static long fault_of_xsetbv(uint64_t value)
{
    return try_call(do_xsetbv, (void *)(uintptr_t)value);
}

static void invalid_in_64_bit_mode(void)
{
    /* Silicon raises #UD for these too (tried on an AMD EPYC). */
    ENCODING("AAM", UD, 0xd4, 0x0a);
    ENCODING("SALC", UD, 0xd6);
    ENCODING("INTO", UD, 0xce);
    ENCODING("mov cs, eax", UD, 0x8e, 0xc8);
    ENCODING("REX.R mov cs, eax", UD, 0x44, 0x8e, 0xc8);
    ENCODING("mov segment register 6, eax", UD, 0x8e, 0xf0);
    ENCODING("mov eax, segment register 7", UD, 0x8c, 0xf8);
    ENCODING("REX.R mov eax, ss", NO_FAULT, 0x44, 0x8c, 0xd0);
    ENCODING("0F C7 /2 with memory", UD, 0x0f, 0xc7, 0x17);
    ENCODING("0F C7 /0 with memory", UD, 0x0f, 0xc7, 0x07);
}

void test_enumeration(void)
{
    bool apx = cpuid(7, 1).edx >> 21 & 1;
    struct cpuid r;

    put("CPUID (7,1).EDX ");
    put_hex(cpuid(7, 1).edx);
    put("\n");
    invalid_in_64_bit_mode();
    ENCODING("REX2 with CR4.OSXSAVE=0", UD, 0xd5, 0x00, 0x89, 0xc0);
    write_cr4(read_cr4() | CR4_OSXSAVE);
    if (!apx) {
        ENCODING("REX2 without APX", UD, 0xd5, 0x00, 0x89, 0xc0);
        check("XCR0[19] without APX raises #GP", fault_of_xsetbv(XCR0_LEGACY | XCR0_APX) == GP, 0);
        return;
    }
    check("highest leaf", cpuid(0, 0).eax >= 0x29, cpuid(0, 0).eax);
    r = cpuid(0x29, 0);
    check("leaf 29H", !(r.ebx & ~1u) && !r.eax && !r.ecx && !r.edx, r.ebx);
    r = cpuid(0xd, 0);
    check("leaf DH has component 19", r.eax >> 19 & 1, r.eax);
    check("leaf DH has no MPX", !(r.eax & XCR0_MPX), r.eax);
    r = cpuid(0xd, 19);
    check("component 19 is 128 bytes", r.eax == 128, r.eax);
    check("component 19 is at 960", r.ebx == 960, r.ebx);
    check("component 19 is a user component, unaligned", r.ecx == 0, r.ecx);

    xsetbv(XCR0_LEGACY);
    ENCODING("REX2 with XCR0[19]=0", UD, 0xd5, 0x00, 0x89, 0xc0);
    check("XCR0 with APX and MPX raises #GP", fault_of_xsetbv(XCR0_LEGACY | XCR0_MPX | XCR0_APX) == GP, 0);
    xsetbv(XCR0_LEGACY | XCR0_APX);
    check("XGETBV", xgetbv(0) == (XCR0_LEGACY | XCR0_APX), xgetbv(0));
    check("size of the area for XCR0", cpuid(0xd, 0).ebx == 1088, cpuid(0xd, 0).ebx);
    ENCODING("REX2 mov eax, eax", NO_FAULT, 0xd5, 0x00, 0x89, 0xc0);
}
