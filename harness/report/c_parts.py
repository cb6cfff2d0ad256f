"""The C text that every reproducer shares; emit_c.py puts the Case between these pieces.

``describe`` prints an exit in the words of ``harness.exits.Exit.__str__``.
"""

from __future__ import annotations

from typing import Final

INCLUDES: Final = r"""
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <linux/kvm.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>
"""

TYPES: Final = r"""
struct slot { uint64_t gpa, size; };
struct blob { uint64_t gpa, size; const uint8_t *data; };
/* count 64-bit words, stride bytes apart: value, value + step, value + 2 * step, ... */
struct fill { uint64_t gpa, count, stride, value, step; };
"""

MACHINE: Final = r"""
static int kvm_fd, vm_fd, vcpu_fd;
static struct kvm_run *run;
static size_t run_size;
static uint8_t *ram[NSLOTS];
static int exits;               /* exits seen so far */
static int bad;                 /* something differs from what is expected */
static int elsewhere;           /* the guest came to another exit than where the defect was seen */
static int judged;              /* the exit in question was reached */
static uint64_t reads;          /* device reads answered so far */

static void die(const char *what)
{
	fprintf(stderr, "set-up trouble: %s: %s\n", what, errno ? strerror(errno) : "refused");
	exit(2);
}

#define DO(fd, request, arg) do_ioctl(fd, request, (unsigned long)(arg), #request)

static int do_ioctl(int fd, unsigned long request, unsigned long arg, const char *name)
{
	int ret;

	errno = 0;
	ret = ioctl(fd, request, arg);
	if (ret < 0)
		die(name);
	return ret;
}

static void on_alarm(int sig)
{
	static const char defect[] = "KVM_RUN did not return within 10 s\nDEFECT REPRODUCED\n";
	static const char trouble[] = "set-up trouble: KVM_RUN did not return within 10 s\n";
	ssize_t n;

	(void)sig;
	if (HANG_IS_DEFECT && exits == CHECK_EXIT)
		n = write(1, defect, sizeof(defect) - 1);
	else
		n = write(2, trouble, sizeof(trouble) - 1);
	(void)n;
	_exit(HANG_IS_DEFECT && exits == CHECK_EXIT ? 1 : 2);
}

static uint8_t *at(uint64_t gpa)
{
	int i;

	for (i = 0; i < NSLOTS; i++)
		if (gpa >= slots[i].gpa && gpa - slots[i].gpa < slots[i].size)
			return ram[i] + (gpa - slots[i].gpa);
	fprintf(stderr, "set-up trouble: no RAM at %#" PRIx64 "\n", gpa);
	exit(2);
}

static void make_ram(void)
{
	uint64_t n;
	int i;

	for (i = 0; i < NSLOTS; i++) {
		ram[i] = mmap(NULL, slots[i].size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
		if (ram[i] == MAP_FAILED)
			die("mmap");
	}
	for (i = 0; fills[i].count; i++)
		for (n = 0; n < fills[i].count; n++) {
			uint64_t word = fills[i].value + n * fills[i].step;

			memcpy(at(fills[i].gpa + n * fills[i].stride), &word, 8);
		}
	for (i = 0; blobs[i].size; i++)
		memcpy(at(blobs[i].gpa), blobs[i].data, blobs[i].size);
}

static void make_cpuid(void)
{
	struct kvm_cpuid2 *c = calloc(1, sizeof(*c) + NCPUID * sizeof(c->entries[0]));
	int i;

	if (!c)
		die("calloc");
	for (i = 0; i < NCPUID; i++) {
		c->entries[i].function = cpuid[i][0];
		c->entries[i].index = cpuid[i][1];
		c->entries[i].flags = cpuid[i][2];
		c->entries[i].eax = cpuid[i][3];
		c->entries[i].ebx = cpuid[i][4];
		c->entries[i].ecx = cpuid[i][5];
		c->entries[i].edx = cpuid[i][6];
	}
	c->nent = NCPUID;
	DO(vcpu_fd, KVM_SET_CPUID2, c);
	free(c);
}

static void make_vm(void)
{
	uint64_t identity_map = 0xfffbc000;
	int i;

	vm_fd = DO(kvm_fd, KVM_CREATE_VM, 0);
	(void)!ioctl(vm_fd, KVM_SET_IDENTITY_MAP_ADDR, &identity_map);
	(void)!ioctl(vm_fd, KVM_SET_TSS_ADDR, 0xfffbd000UL);
@SHAPE@	for (i = 0; i < NSLOTS; i++) {
		struct kvm_userspace_memory_region region = {
			.slot = i, .guest_phys_addr = slots[i].gpa, .memory_size = slots[i].size,
			.userspace_addr = (uintptr_t)ram[i],
		};

		DO(vm_fd, KVM_SET_USER_MEMORY_REGION, &region);
	}
	vcpu_fd = DO(vm_fd, KVM_CREATE_VCPU, 0);
	run_size = DO(kvm_fd, KVM_GET_VCPU_MMAP_SIZE, 0);
	run = mmap(NULL, run_size, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu_fd, 0);
	if (run == MAP_FAILED)
		die("mmap of kvm_run");
	make_cpuid();
}
"""

SET_XCR0: Final = r"""
static void set_xcr0(uint64_t value)
{
	struct kvm_xcrs x = { .nr_xcrs = 1 };

	x.xcrs[0].value = value;
	DO(vcpu_fd, KVM_SET_XCRS, &x);
}
"""

GET_XCR0: Final = r"""
static uint64_t get_xcr0(void)
{
	struct kvm_xcrs x = { .nr_xcrs = 0 };

	DO(vcpu_fd, KVM_GET_XCRS, &x);
	return x.nr_xcrs ? x.xcrs[0].value : 1;
}
"""

SET_MSR: Final = r"""
static void set_msr(uint32_t index, uint64_t value)
{
	struct { struct kvm_msrs head; struct kvm_msr_entry entry; } m = { .head = { .nmsrs = 1 } };

	m.entry.index = index;
	m.entry.data = value;
	if (DO(vcpu_fd, KVM_SET_MSRS, &m) != 1)
		die("KVM_SET_MSRS");
}
"""

GET_MSR: Final = r"""
static uint64_t get_msr(uint32_t index)
{
	struct { struct kvm_msrs head; struct kvm_msr_entry entry; } m = { .head = { .nmsrs = 1 } };

	m.entry.index = index;
	if (DO(vcpu_fd, KVM_GET_MSRS, &m) != 1)
		die("KVM_GET_MSRS");
	return m.entry.data;
}
"""

XSAVE: Final = r"""
static int plain_xsave; /* KVM_GET_XSAVE, even where there is KVM_GET_XSAVE2 */

/*
 * XSAVE state component number, at its offset in the standard format (CPUID leaf 0DH).
 * write: 0 get it, 1 set it, 2 set it with its bit of XSTATE_BV clear: the initial state, whatever data holds
 */
static void xsave_part(int number, uint32_t offset, void *data, uint32_t size, int write)
{
	static uint32_t area[65536 / 4];
	unsigned long get = KVM_GET_XSAVE;
	uint64_t bits;

#ifdef KVM_GET_XSAVE2
	if (!plain_xsave && DO(kvm_fd, KVM_CHECK_EXTENSION, KVM_CAP_XSAVE2) > 0)
		get = KVM_GET_XSAVE2;
#endif
	do_ioctl(vcpu_fd, get, (unsigned long)area, "KVM_GET_XSAVE");
	memcpy(&bits, (uint8_t *)area + 512, 8);
	if (!write) {
		memset(data, 0, size);
		if (bits >> number & 1)
			memcpy(data, (uint8_t *)area + offset, size);
		return;
	}
	memcpy((uint8_t *)area + offset, data, size);
	bits = write == 1 ? bits | 1ULL << number : bits & ~(1ULL << number);
	memcpy((uint8_t *)area + 512, &bits, 8);
	DO(vcpu_fd, KVM_SET_XSAVE, area);
}
"""

XSAVE_WORD: Final = r"""
static uint64_t xsave_word(int number, uint32_t offset, uint32_t size)
{
	uint64_t value = 0;

	xsave_part(number, offset, &value, size, 0);
	return value;
}
"""

EXITS: Final = r"""
/* What the devices of this case answer to a read: splitmix64 of (seed, number of the read). */
static void device_data(void *to, size_t size)
{
	uint64_t z = SEED + 0x9e3779b97f4a7c15ULL * (reads++ * 8 + 1);

	z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ULL;
	z = (z ^ z >> 27) * 0x94d049bb133111ebULL;
	z ^= z >> 31;
	memcpy(to, &z, size);
}

static void hex(char *to, const uint8_t *data, size_t size)
{
	size_t i;

	for (i = 0; i < size; i++)
		sprintf(to + 2 * i, "%02x", data[i]);
}

/*
 * Put the exit into words, answer its read; 1: an operation is pending, 2: the run ends here, 3: a step is done, 4: an
 * interrupt can be injected.
 */
static int describe(char *to, size_t room)
{
	char bytes[2 * 4096 + 1] = "";
	uint8_t *data;
	uint32_t i;

	switch (run->exit_reason) {
	case KVM_EXIT_HLT:
		snprintf(to, room, "halt");
		return 2;
	case KVM_EXIT_IO:
		data = (uint8_t *)run + run->io.data_offset;
		if (run->io.direction == KVM_EXIT_IO_OUT)
			hex(bytes, data, run->io.size * run->io.count);
		else
			for (i = 0; i < run->io.count; i++)
				device_data(data + i * run->io.size, run->io.size);
		snprintf(to, room, "io %s port 0x%x size %d count %u%s%s", *bytes ? "write" : "read", run->io.port,
				run->io.size, run->io.count, *bytes ? " data " : "", bytes);
		return 1;
	case KVM_EXIT_MMIO:
		if (run->mmio.is_write)
			hex(bytes, run->mmio.data, run->mmio.len);
		else
			device_data(run->mmio.data, run->mmio.len);
		snprintf(to, room, "mmio %s address 0x%" PRIx64 " size %u%s%s", *bytes ? "write" : "read",
				(uint64_t)run->mmio.phys_addr, run->mmio.len, *bytes ? " data " : "", bytes);
		return 1;
	case KVM_EXIT_DEBUG:
		snprintf(to, room, "debug exception 0x%x pc 0x%" PRIx64 " dr6 0x%" PRIx64,
				run->debug.arch.exception, (uint64_t)run->debug.arch.pc, (uint64_t)run->debug.arch.dr6);
		return 3;
	case KVM_EXIT_SHUTDOWN:
		snprintf(to, room, "shutdown");
		return 2;
#ifdef KVM_EXIT_X86_RDMSR
	case KVM_EXIT_X86_RDMSR:
		run->msr.error = 0;
		device_data(&run->msr.data, 8);
		snprintf(to, room, "msr read index 0x%x value 0x0", run->msr.index);
		return 1;
	case KVM_EXIT_X86_WRMSR:
		run->msr.error = 0;
		snprintf(to, room, "msr write index 0x%x value 0x%" PRIx64, run->msr.index, (uint64_t)run->msr.data);
		return 1;
#endif
	case KVM_EXIT_HYPERCALL:
		device_data(&run->hypercall.ret, 8);
		snprintf(to, room, "hypercall number 0x%" PRIx64, (uint64_t)run->hypercall.nr);
		for (i = 0; i < 3; i++)
			snprintf(to + strlen(to), room - strlen(to), "%s0x%" PRIx64, i ? " " : " args ",
					(uint64_t)run->hypercall.args[i]);
		return 1;
	case KVM_EXIT_IRQ_WINDOW_OPEN:
		snprintf(to, room, "irq-window");
		return 4;
	case KVM_EXIT_INTERNAL_ERROR:
		/* emulation failure: flags, then the number of bytes and the bytes of the instruction */
		data = (uint8_t *)&run->internal.data[1];
		if (run->internal.suberror == KVM_INTERNAL_ERROR_EMULATION && run->internal.ndata >= 1 &&
			(run->internal.data[0] & 1) && data[0] <= 15)
			hex(bytes, data + 1, data[0]);
		snprintf(to, room, "internal-error suberror %u%s%s", run->internal.suberror,
				*bytes ? " code " : "", bytes);
		return 2;
	case KVM_EXIT_FAIL_ENTRY:
		snprintf(to, room, "fail-entry reason 0x%" PRIx64,
				(uint64_t)run->fail_entry.hardware_entry_failure_reason);
		return 2;
	default:
		snprintf(to, room, "unknown reason 0x%x", run->exit_reason);
		return 2;
	}
}
"""

CHECK: Final = r"""
static void check(const char *name, uint64_t expected, uint64_t got, uint64_t undefined)
{
	if (!((expected ^ got) & ~undefined))
		return;
	printf("%s: expected 0x%" PRIx64 " got 0x%" PRIx64 "\n", name, expected, got);
	bad = 1;
}
"""

CHECK_BYTES: Final = r"""
static void check_bytes(uint64_t gpa, const uint8_t *expected, const uint8_t *undefined, size_t size)
{
	size_t i;

	for (i = 0; i < size; i++)
		if ((*at(gpa + i) ^ expected[i]) & ~undefined[i]) {
			printf("memory 0x%" PRIx64 ": expected 0x%02x got 0x%02x\n", gpa + i, expected[i],
				*at(gpa + i));
			bad = 1;
		}
}
"""

LOOP: Final = r"""
/* Complete the operation that an exit left pending (api.rst 5, immediate_exit); 1: it led to a further exit. */
static int complete(void)
{
	int ret;

	run->immediate_exit = 1;
	ret = ioctl(vcpu_fd, KVM_RUN, 0);
	run->immediate_exit = 0;
	if (ret < 0 && errno != EINTR)
		die("KVM_RUN");
	return ret == 0;
}

static void seen(const char *words)
{
	printf("exit %d: %s\n", exits, words);
	if (exits++ == CHECK_EXIT) {
		judged = 1;
		check_exit(words);
		finish();
	}
}

static int stepping;

/* Up to limit exits, as far as one that ends the run (or the step); 1: it has ended. */
static int run_guest(int limit, int completing)
{
	static char words[2 * 4096 + 256];
	int what, done = 0, further = 0;

	for (;;) {
		if (!further)
			while (ioctl(vcpu_fd, KVM_RUN, 0) < 0)
				if (errno != EINTR && errno != EAGAIN)
					die("KVM_RUN");
		what = describe(words, sizeof(words));
		further = what == 1 && completing && complete();
		seen(words);
		if (what == 2 || what == 4 || (what == 3 && stepping) || ++done >= limit || (what == 1 && !completing))
			return what == 2;
	}
}
"""

WINDOW: Final = r"""
static void window(int limit)
{
	run->request_interrupt_window = 1;
	run_guest(limit, 1);
	run->request_interrupt_window = 0;
}
"""

COMPLETE: Final = r"""
static void complete_pending(void)
{
	static char words[2 * 4096 + 256];

	if (complete())
		describe(words, sizeof(words));
	else
		strcpy(words, "halt");  /* nothing left pending */
	seen(words);
}
"""

STEP: Final = r"""
static void step(int count)
{
	struct kvm_guest_debug debug = { .control = KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP };

	DO(vcpu_fd, KVM_SET_GUEST_DEBUG, &debug);
	stepping = 1;
	while (count-- && !run_guest(64, 1)) /* an instruction may leave for a device before its step is reported */
		;
	stepping = 0;
	memset(&debug, 0, sizeof(debug));
	DO(vcpu_fd, KVM_SET_GUEST_DEBUG, &debug);
}
"""

INJECT: Final = r"""
static void inject_exception(int vector, int has_error, uint32_t error)
{
	struct kvm_vcpu_events e;

	DO(vcpu_fd, KVM_GET_VCPU_EVENTS, &e);
	e.exception.injected = 1;
	e.exception.nr = vector;
	e.exception.has_error_code = has_error;
	e.exception.error_code = error;
	DO(vcpu_fd, KVM_SET_VCPU_EVENTS, &e);
}
"""

SAVE_RESTORE: Final = r"""
/* Move the vCPU into a VM made afresh around the same RAM. */
static void save_restore(void)
{
	struct kvm_vcpu_events events;
	struct kvm_debugregs debugregs;
	struct @SREGS@ sregs;
	struct kvm_regs regs;
	uint64_t xcr0 = get_xcr0();
@SAVE@
	DO(vcpu_fd, KVM_GET_REGS, &regs);
	DO(vcpu_fd, @GET_SREGS@, &sregs);
	DO(vcpu_fd, KVM_GET_VCPU_EVENTS, &events);
	DO(vcpu_fd, KVM_GET_DEBUGREGS, &debugregs);
	munmap(run, run_size);
	close(vcpu_fd);
	close(vm_fd);
	make_vm();
	set_xcr0(xcr0);
	DO(vcpu_fd, @SET_SREGS@, &sregs);
@RESTORE@	DO(vcpu_fd, KVM_SET_DEBUGREGS, &debugregs);
	DO(vcpu_fd, KVM_SET_VCPU_EVENTS, &events);
	DO(vcpu_fd, KVM_SET_REGS, &regs);
}
"""

FINISH: Final = r"""
static void finish(void)
{
	if (bad)
		printf("DEFECT REPRODUCED\n");
	else if (elsewhere)
		printf("this defect cannot be tried here: the guest comes to another exit\n");
	else if (CHECK_EXIT >= 0)
		printf("not reproduced: agrees\n");
	exit(bad ? 1 : elsewhere ? 2 : 0);
}
"""

MAIN: Final = r"""
int main(void)
{
	setvbuf(stdout, NULL, _IONBF, 0);
	signal(SIGALRM, on_alarm);
	kvm_fd = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	if (kvm_fd < 0)
		die("/dev/kvm");
	make_ram();
	make_vm();
	set_start();
	alarm(10);
@ACTIONS@	if (CHECK_EXIT >= 0 && !judged) {
@ENDED@	}
	finish();
	return 0;
}
"""
