/* A bare-metal test of the emulator's APX: no kernel, no KVM. Freestanding; results go to the first serial port. */
#ifndef SELFTEST_H
#define SELFTEST_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { UD = 6, GP = 13, NO_FAULT = -1 };

#define CR4_OSXSAVE (1ul << 18)
#define XCR0_LEGACY 7ul            /* x87, SSE, AVX */
#define XCR0_MPX (3ul << 3)
#define XCR0_APX (1ul << 19)
#define EGPRS 16

struct cpuid {
    uint32_t eax, ebx, ecx, edx;
};

/* runtime.c */
void put(const char *text);
void put_hex(uint64_t value);
void check(const char *name, bool good, uint64_t shown_if_not);
void passed_silently(void);
int failures(void);
int passes(void);
struct cpuid cpuid(uint32_t leaf, uint32_t subleaf);
uint64_t xgetbv(uint32_t index);
void xsetbv(uint64_t value);
uint64_t read_cr4(void);
void write_cr4(uint64_t value);
uint64_t rdmsr(uint32_t index);
void wrmsr(uint32_t index, uint64_t value);
void *memset(void *to, int byte, size_t count);
void *memcpy(void *to, const void *from, size_t count);
int memcmp(const void *a, const void *b, size_t count);

/* boot.S: calls function(argument); vector of the exception that ended it (fault_rip, fault_error), or NO_FAULT */
long try_call(void (*function)(void *), void *argument);
extern uint64_t fault_rip, fault_error;

/* Runs bytes as a function of one argument, a pointer to writable memory; they must fault there, or not at all. */
void encoding(const char *name, long vector, const uint8_t *bytes, size_t count);
#define ENCODING(name, vector, ...) \
    do { \
        static const uint8_t bytes_[] = {__VA_ARGS__}; \
        encoding(name, vector, bytes_, sizeof(bytes_)); \
    } while (0)

/* egprs.S */
void load_egprs(const uint64_t from[EGPRS]);
void store_egprs(uint64_t to[EGPRS]);

/* The parts; each returns when it is done. */
void test_enumeration(void);
void test_encodings(void);
void test_evex_encodings(void);
void test_instructions(void);
void test_evex_instructions(void);
void test_xsave(void);
void test_svm(void);
void test_workload(void);

#endif
