/* Runs the assembler tests: each function returns 0, or the number of its check that failed. */
#include "selftest.h"

long t_movimm(void), t_mem(void), t_size(void), t_stack(void), t_alu(void), t_sse(void), t_branch(void), t_sys(void);
long t_evex(void);
uint64_t workload(void), workload_apx(void);

static long result;

static void call(void *function)
{
    result = ((long (*)(void))(uintptr_t)function)();
}

static void run(const char *name, long (*function)(void))
{
    long vector = try_call(call, (void *)(uintptr_t)function);

    if (vector == NO_FAULT) {
        check(name, result == 0, (uint64_t)result);
    } else {
        check(name, false, (uint64_t)vector << 56 | fault_rip);
    }
}

void test_instructions(void)
{
    run("move immediates", t_movimm);
    run("addressing", t_mem);
    run("operand sizes", t_size);
    run("stack", t_stack);
    run("arithmetic", t_alu);
    run("SSE", t_sse);
    run("branches", t_branch);
    run("system instructions", t_sys);
}

void test_evex_instructions(void)
{
    if (cpuid(0x29, 0).ebx & 1)
        run("EVEX map 4", t_evex);
}

static void both(void *unused)
{
    (void)unused;
    result = workload() == workload_apx();
}

/* A program as two compilers made it: one for the old registers, one for everything that APX has. */
void test_workload(void)
{
    if (cpuid(0x29, 0).ebx & 1) {
        long vector = try_call(both, NULL);

        check("compiled program", vector == NO_FAULT && result, (uint64_t)vector);
    }
}
