/* R16-R31 as XSAVE component 19, in the standard and the compacted format. */
#include "selftest.h"

enum { MXCSR = 24, HEADER = 512, XSTATE_BV = HEADER, XCOMP_BV = HEADER + 8, EXTENDED = HEADER + 64, OFFSET = 960 };
#define COMPACTED (1ul << 63)
#define ALL (XCR0_LEGACY | XCR0_APX)

static uint8_t area[8192] __attribute__((aligned(64)));
static uint64_t values[EGPRS], zeroes[EGPRS], got[EGPRS];

#define SAVE(instruction) \
    static void instruction(uint64_t mask) \
    { \
        asm volatile(#instruction "64 %0" : "+m"(area) : "a"((uint32_t)mask), "d"(0) : "memory"); \
    }
SAVE(xsave)
SAVE(xsaveopt)
SAVE(xsavec)
SAVE(xsaves)
SAVE(xrstor)
SAVE(xrstors)

static void do_xrstor(void *mask)
{
    xrstor((uintptr_t)mask);
}

static void do_xrstors(void *mask)
{
    xrstors((uintptr_t)mask);
}

static uint64_t *word(int offset)
{
    return (uint64_t *)(void *)(area + offset);
}

static void fill_area(void)
{
    memset(area, 0xaa, sizeof(area));
    memset(area + HEADER, 0, 64);
    *(uint32_t *)(void *)(area + MXCSR) = 0x1f80; /* XRSTOR refuses reserved bits */
}

static bool registers_are(const uint64_t *expected)
{
    store_egprs(got);
    return !memcmp(got, expected, sizeof(got));
}

static bool saved_at(int offset)
{
    return !memcmp(area + offset, values, sizeof(values));
}

static void standard_format(void)
{
    load_egprs(values);
    fill_area();
    xsave(XCR0_APX);
    check("XSAVE: XSTATE_BV", *word(XSTATE_BV) == XCR0_APX, *word(XSTATE_BV));
    check("XSAVE: at 960", saved_at(OFFSET), *word(OFFSET));
    check("XSAVE: nothing else", area[OFFSET - 1] == 0xaa && area[OFFSET + 128] == 0xaa && area[0] == 0xaa, 0);
    check("XGETBV(1): in use", xgetbv(1) & XCR0_APX, xgetbv(1));
    load_egprs(zeroes);
    check("XGETBV(1): not in use", !(xgetbv(1) & XCR0_APX), xgetbv(1));
    xrstor(XCR0_APX);
    check("XRSTOR", registers_are(values), got[0]);

    load_egprs(zeroes);
    fill_area();
    xsave(XCR0_APX);
    check("XSAVE of the initial state: XSTATE_BV", *word(XSTATE_BV) == 0, *word(XSTATE_BV));
    load_egprs(values);
    xrstor(XCR0_APX);
    check("XRSTOR to the initial state", registers_are(zeroes), got[0]);
    load_egprs(values);
    xrstor(XCR0_LEGACY);
    check("XRSTOR of other components", registers_are(values), got[0]);
    memset(area, 0, sizeof(area));
    xsaveopt(ALL);
    check("XSAVEOPT", (*word(XSTATE_BV) & XCR0_APX) && saved_at(OFFSET), *word(XSTATE_BV));
}

static void disabled_and_enabled(void)
{
    load_egprs(values);
    *word(XSTATE_BV) = XCR0_APX;
    xsetbv(XCR0_LEGACY);
    check("XRSTOR beyond XCR0 raises #GP", try_call(do_xrstor, (void *)XCR0_APX) == GP, 0);
    xsetbv(ALL);
    check("XCR0[19] off and on keeps the registers", registers_are(values), got[0]);
}

static void compacted_format(void)
{
    load_egprs(values);
    fill_area();
    xsavec(XCR0_APX);
    check("XSAVEC: XSTATE_BV", *word(XSTATE_BV) == XCR0_APX, *word(XSTATE_BV));
    check("XSAVEC: XCOMP_BV", *word(XCOMP_BV) == (COMPACTED | XCR0_APX), *word(XCOMP_BV));
    check("XSAVEC: first", saved_at(EXTENDED), *word(EXTENDED));
    load_egprs(zeroes);
    xrstor(XCR0_APX);
    check("XRSTOR, compacted", registers_are(values), got[0]);

    memset(area, 0, sizeof(area));
    xsavec(ALL);
    check("XSAVEC of all: XCOMP_BV", *word(XCOMP_BV) == (COMPACTED | ALL), *word(XCOMP_BV));
    check("XSAVEC of all: after AVX", saved_at(EXTENDED + 256), *word(EXTENDED + 256));
    load_egprs(zeroes);
    xrstor(ALL);
    check("XRSTOR of all, compacted", registers_are(values), got[0]);
    *word(XCOMP_BV) = COMPACTED | XCR0_LEGACY;
    check("XRSTOR with XSTATE_BV beyond XCOMP_BV raises #GP", try_call(do_xrstor, (void *)XCR0_LEGACY) == GP, 0);
    check("size of the compacted area for XCR0", cpuid(0xd, 1).ebx == EXTENDED + 256 + 128, cpuid(0xd, 1).ebx);
}

static void supervisor_forms(void)
{
    load_egprs(values);
    fill_area();
    xsaves(ALL);
    check("XSAVES: XCOMP_BV", *word(XCOMP_BV) == (COMPACTED | ALL), *word(XCOMP_BV));
    check("XSAVES: after AVX", saved_at(EXTENDED + 256), *word(EXTENDED + 256));
    load_egprs(zeroes);
    xrstors(ALL);
    check("XRSTORS", registers_are(values), got[0]);
    *word(XCOMP_BV) = 0;
    check("XRSTORS of the standard format raises #GP", try_call(do_xrstors, (void *)XCR0_APX) == GP, 0);
}

void test_xsave(void)
{
    uint32_t features = cpuid(0xd, 1).eax;

    for (uint64_t i = 0; i < EGPRS; i++)
        values[i] = 0x0101010101010101ul * (i + 1) + i;
    standard_format();
    disabled_and_enabled();
    if (features & 2) {
        compacted_format();
    } else {
        fill_area();
        *word(XCOMP_BV) = COMPACTED | XCR0_APX;
        check("XRSTOR, compacted, without XSAVEC raises #GP", try_call(do_xrstor, (void *)XCR0_APX) == GP, 0);
    }
    if (features & 8)
        supervisor_forms();
}
