/* Console, counting, and the instructions that C has no words for. */
#include "selftest.h"

static int pass_count, fail_count;

static void out8(uint16_t port, uint8_t value)
{
    asm volatile("outb %0, %1" : : "a"(value), "Nd"(port));
}

static uint8_t in8(uint16_t port)
{
    uint8_t value;

    asm volatile("inb %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}

void put(const char *text)
{
    for (; *text; text++) {
        while (!(in8(0x3fd) & 0x20)) { /* until the transmitter is empty */
        }
        out8(0x3f8, (uint8_t)*text);
    }
}

void put_hex(uint64_t value)
{
    char text[19] = "0x";

    for (int i = 0; i < 16; i++)
        text[2 + i] = "0123456789abcdef"[value >> (60 - 4 * i) & 15];
    put(text);
}

void check(const char *name, bool good, uint64_t shown_if_not)
{
    if (good)
        pass_count++;
    else
        fail_count++;
    put(good ? "ok   " : "FAIL ");
    put(name);
    if (!good) {
        put(" ");
        put_hex(shown_if_not);
    }
    put("\n");
}

void passed_silently(void)
{
    pass_count++;
}

int passes(void)
{
    return pass_count;
}

int failures(void)
{
    return fail_count;
}

struct cpuid cpuid(uint32_t leaf, uint32_t subleaf)
{
    struct cpuid r;

    asm volatile("cpuid" : "=a"(r.eax), "=b"(r.ebx), "=c"(r.ecx), "=d"(r.edx) : "a"(leaf), "c"(subleaf));
    return r;
}

uint64_t xgetbv(uint32_t index)
{
    uint32_t low, high;

    asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(index));
    return low | (uint64_t)high << 32;
}

void xsetbv(uint64_t value)
{
    asm volatile("xsetbv" : : "a"((uint32_t)value), "d"((uint32_t)(value >> 32)), "c"(0));
}

uint64_t read_cr4(void)
{
    uint64_t value;

    asm volatile("mov %%cr4, %0" : "=r"(value));
    return value;
}

void write_cr4(uint64_t value)
{
    asm volatile("mov %0, %%cr4" : : "r"(value));
}

uint64_t rdmsr(uint32_t index)
{
    uint32_t low, high;

    asm volatile("rdmsr" : "=a"(low), "=d"(high) : "c"(index));
    return low | (uint64_t)high << 32;
}

void wrmsr(uint32_t index, uint64_t value)
{
    asm volatile("wrmsr" : : "a"((uint32_t)value), "d"((uint32_t)(value >> 32)), "c"(index));
}

void *memset(void *to, int byte, size_t count)
{
    for (uint8_t *p = to; count--; p++)
        *p = (uint8_t)byte;
    return to;
}

void *memcpy(void *to, const void *from, size_t count)
{
    const uint8_t *source = from;

    for (uint8_t *p = to; count--; p++)
        *p = *source++;
    return to;
}

int memcmp(const void *a, const void *b, size_t count)
{
    const uint8_t *p = a, *q = b;

    for (; count--; p++, q++)
        if (*p != *q)
            return *p - *q;
    return 0;
}

static uint8_t code[64] __attribute__((aligned(64)));

void encoding(const char *name, long vector, const uint8_t *bytes, size_t count)
{
    long got;

    memset(code, 0xcc, sizeof(code));
    memcpy(code, bytes, count);
    code[count] = 0xc3; /* RET */
    got = try_call((void (*)(void *))(uintptr_t)code, code + sizeof(code) / 2);
    check(name, got == vector && (got == NO_FAULT || fault_rip == (uintptr_t)code), (uint64_t)got);
}

struct gate {
    uint16_t offset0, selector, type, offset1;
    uint32_t offset2, reserved;
};

void selftest(const uint64_t stubs[][2])
{
    static struct gate idt[32];
    const struct {
        uint16_t limit;
        uint64_t base;
    } __attribute__((packed)) idtr = {sizeof(idt) - 1, (uintptr_t)idt};

    for (; (*stubs)[1]; stubs++) {
        uint64_t address = (*stubs)[1];

        idt[(*stubs)[0]] = (struct gate){
            (uint16_t)address, 8, 0x8e00, (uint16_t)(address >> 16), (uint32_t)(address >> 32), 0,
        };
    }
    asm volatile("lidt %0" : : "m"(idtr));

    test_enumeration();
    if (cpuid(7, 1).edx >> 21 & 1) {
        test_encodings();
        test_instructions();
        test_xsave();
        test_svm();
        test_evex_encodings();
        test_evex_instructions();
        test_workload();
    }
    put("passed ");
    put_hex((uint64_t)passes());
    put(" failed ");
    put_hex((uint64_t)failures());
    put("\n");
    out8(0xf4, failures() ? 1 : 0); /* isa-debug-exit */
}
