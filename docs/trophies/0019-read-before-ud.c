/*
 * absent/mmio/movbe_load_bx@real#0, a case of kvm-harness
 *
 * At exit 0: expected halt, got mmio read address 0xa0348 size 2
 *
 *     ad60: 68 00 a0                push 0xa000
 *     ad63: 1f                      pop ds
 *     ad64: bb 40 03                mov bx,0x340
 *     ad67: 0f 38 f0 5f 08          movbe bx,WORD PTR [bx+0x8]
 *     ad6c: f4                      hlt
 *
 * Seen on: Linux 6.18.44, kvm_pvm (kvm.force_emulation_prefix=0 kvm.tdp_mmu=N), AMD guest
 * CPUID
 *
 * Compile and run: gcc -O2 -Wall -Wextra -o repro THIS_FILE.c && ./repro
 * Exit status: 1 the defect shows, 0 it does not, 2 it could not be tried.
 * The same under the harness: kvm-harness replay absent/mmio/movbe_load_bx@real#0
 */

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

#define CHECK_EXIT 0
#define HANG_IS_DEFECT 0
#define SEED 0x735e6260ULL

struct slot { uint64_t gpa, size; };
struct blob { uint64_t gpa, size; const uint8_t *data; };
/* count 64-bit words, stride bytes apart: value, value + step, value + 2 * step, ... */
struct fill { uint64_t gpa, count, stride, value, step; };

#define NSLOTS 1
static const struct slot slots[NSLOTS] = {
	{ 0x0, 0x20000 },
};

static const struct fill fills[] = {
	{ 0x0, 128, 8, 0x401000004000, 0x2000000020 },
	{ 0x4000, 256, 16, 0xccccccccccccccf4, 0x0 },
	{ 0x4008, 256, 16, 0xcccccccccccccccc, 0x0 },
	{ 0 }
};

static const uint8_t code[] = {
	0x68, 0x00, 0xa0,                       /* push 0xa000 */
	0x1f,                                   /* pop ds */
	0xbb, 0x40, 0x03,                       /* mov bx,0x340 */
	0x0f, 0x38, 0xf0, 0x5f, 0x08,           /* movbe bx,WORD PTR [bx+0x8] */
	0xf4,                                   /* hlt */
};

static const uint8_t ram_ad68[] = {
	0x00, 0x00, 0x00, 0x00, 0x00, 0x68, 0x00, 0xa0,
};

static const struct blob blobs[] = {
	{ 0xad68, sizeof(ram_ad68), ram_ad68 },
	{ 0xad60, sizeof(code), code },
	{ 0 }
};

/* function, index, flags, eax, ebx, ecx, edx */
#define NCPUID 61
static const uint32_t cpuid[][7] = {
	{ 0x0, 0x0, 0x0, 0x10, 0x68747541, 0x444d4163, 0x69746e65 },
	{ 0x1, 0x0, 0x0, 0xa00f11, 0x20800, 0x81202000, 0x78bfbff },
	{ 0x2, 0x0, 0x0, 0x0, 0x0, 0x0, 0x0 },
	{ 0x3, 0x0, 0x0, 0x0, 0x0, 0x0, 0x0 },
	{ 0x4, 0x0, 0x1, 0x0, 0x0, 0x0, 0x0 },
	{ 0x5, 0x0, 0x0, 0x0, 0x0, 0x0, 0x0 },
	{ 0x6, 0x0, 0x0, 0x4, 0x0, 0x0, 0x0 },
	{ 0x7, 0x0, 0x1, 0x0, 0x1800002, 0x4, 0xa8000000 },
	{ 0x8, 0x0, 0x0, 0x0, 0x0, 0x0, 0x0 },
	{ 0x9, 0x0, 0x0, 0x0, 0x0, 0x0, 0x0 },
	{ 0xa, 0x0, 0x0, 0x0, 0x0, 0x0, 0x0 },
	{ 0xb, 0x0, 0x1, 0x0, 0x0, 0x0, 0x0 },
	{ 0xc, 0x0, 0x0, 0x0, 0x0, 0x0, 0x0 },
	{ 0xd, 0x0, 0x1, 0x207, 0x988, 0x988, 0x0 },
	{ 0xd, 0x1, 0x1, 0x0, 0x0, 0x0, 0x0 },
	{ 0xd, 0x2, 0x1, 0x100, 0x240, 0x0, 0x0 },
	{ 0xd, 0x9, 0x1, 0x8, 0x980, 0x0, 0x0 },
	{ 0xe, 0x0, 0x0, 0x0, 0x0, 0x0, 0x0 },
	{ 0xf, 0x0, 0x1, 0x0, 0x0, 0x0, 0x0 },
	{ 0x10, 0x0, 0x1, 0x0, 0x0, 0x0, 0x0 },
	{ 0x40000000, 0x0, 0x0, 0x40000001, 0x4b4d564b, 0x564b4d56, 0x4d },
	{ 0x40000001, 0x0, 0x0, 0x1007efb, 0x0, 0x0, 0x0 },
	{ 0x80000000, 0x0, 0x0, 0x80000022, 0x68747541, 0x444d4163, 0x69746e65 },
	{ 0x80000001, 0x0, 0x0, 0xa00f11, 0x40000000, 0x400393, 0x23d3fbff },
	{ 0x80000002, 0x0, 0x0, 0x0, 0x0, 0x0, 0x0 },
	{ 0x80000003, 0x0, 0x0, 0x0, 0x0, 0x0, 0x0 },
	{ 0x80000004, 0x0, 0x0, 0x0, 0x0, 0x0, 0x0 },
	{ 0x80000005, 0x0, 0x0, 0xff40ff40, 0xff40ff40, 0x20080140, 0x20080140 },
	{ 0x80000006, 0x0, 0x0, 0x48002200, 0x68004200, 0x2006140, 0x8009140 },
	{ 0x80000007, 0x0, 0x0, 0x0, 0x0, 0x0, 0x100 },
	{ 0x80000008, 0x0, 0x0, 0x3030, 0x110ad205, 0x7001, 0x0 },
	{ 0x80000009, 0x0, 0x0, 0x0, 0x0, 0x0, 0x0 },
	{ 0x8000000a, 0x0, 0x0, 0x0, 0x0, 0x0, 0x0 },
	{ 0x8000000b, 0x0, 0x0, 0x0, 0x0, 0x0, 0x0 },
	{ 0x8000000c, 0x0, 0x0, 0x0, 0x0, 0x0, 0x0 },
	{ 0x8000000d, 0x0, 0x0, 0x0, 0x0, 0x0, 0x0 },
	{ 0x8000000e, 0x0, 0x0, 0x0, 0x0, 0x0, 0x0 },
	{ 0x8000000f, 0x0, 0x0, 0x0, 0x0, 0x0, 0x0 },
	{ 0x80000010, 0x0, 0x0, 0x0, 0x0, 0x0, 0x0 },
	{ 0x80000011, 0x0, 0x0, 0x0, 0x0, 0x0, 0x0 },
	{ 0x80000012, 0x0, 0x0, 0x0, 0x0, 0x0, 0x0 },
	{ 0x80000013, 0x0, 0x0, 0x0, 0x0, 0x0, 0x0 },
	{ 0x80000014, 0x0, 0x0, 0x0, 0x0, 0x0, 0x0 },
	{ 0x80000015, 0x0, 0x0, 0x0, 0x0, 0x0, 0x0 },
	{ 0x80000016, 0x0, 0x0, 0x0, 0x0, 0x0, 0x0 },
	{ 0x80000017, 0x0, 0x0, 0x0, 0x0, 0x0, 0x0 },
	{ 0x80000018, 0x0, 0x0, 0x0, 0x0, 0x0, 0x0 },
	{ 0x80000019, 0x0, 0x0, 0xf040f040, 0xf0400000, 0x0, 0x0 },
	{ 0x8000001a, 0x0, 0x0, 0x6, 0x0, 0x0, 0x0 },
	{ 0x8000001b, 0x0, 0x0, 0x0, 0x0, 0x0, 0x0 },
	{ 0x8000001c, 0x0, 0x0, 0x0, 0x0, 0x0, 0x0 },
	{ 0x8000001d, 0x0, 0x1, 0x121, 0x1c0003f, 0x3f, 0x0 },
	{ 0x8000001d, 0x1, 0x1, 0x122, 0x1c0003f, 0x3f, 0x0 },
	{ 0x8000001d, 0x2, 0x1, 0x143, 0x1c0003f, 0x3ff, 0x2 },
	{ 0x8000001d, 0x3, 0x1, 0x4163, 0x3c0003f, 0x7fff, 0x1 },
	{ 0x8000001d, 0x4, 0x1, 0x0, 0x0, 0x0, 0x0 },
	{ 0x8000001e, 0x0, 0x0, 0x0, 0x0, 0x0, 0x0 },
	{ 0x8000001f, 0x0, 0x0, 0x0, 0x0, 0x0, 0x0 },
	{ 0x80000020, 0x0, 0x0, 0x0, 0x0, 0x0, 0x0 },
	{ 0x80000021, 0x0, 0x0, 0x18000265, 0x0, 0x6, 0x0 },
	{ 0x80000022, 0x0, 0x0, 0x0, 0x0, 0x0, 0x0 },
};

static int kvm_fd, vm_fd, vcpu_fd;
static struct kvm_run *run;
static size_t run_size;
static uint8_t *ram[NSLOTS];
static int exits;               /* exits seen so far */
static int bad;                 /* something differs from what is expected */
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
	for (i = 0; i < NSLOTS; i++) {
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

static void set_start(void)
{
	struct kvm_sregs sregs = {
		.es = { .selector = 0x1100, .base = 0x11000, .limit = 0xffff, .type = 0x3, .s = 0x1, .present = 0x1 },
		.cs = { .selector = 0x0, .base = 0x0, .limit = 0xffff, .type = 0xb, .s = 0x1, .present = 0x1 },
		.ss = { .selector = 0x1800, .base = 0x18000, .limit = 0xffff, .type = 0x3, .s = 0x1, .present = 0x1 },
		.ds = { .selector = 0x1000, .base = 0x10000, .limit = 0xffff, .type = 0x3, .s = 0x1, .present = 0x1 },
		.fs = { .selector = 0x1200, .base = 0x12000, .limit = 0xffff, .type = 0x3, .s = 0x1, .present = 0x1 },
		.gs = { .selector = 0x1300, .base = 0x13000, .limit = 0xffff, .type = 0x3, .s = 0x1, .present = 0x1 },
		.ldt = { .selector = 0x0, .base = 0x0, .limit = 0xffff, .type = 0x2, .present = 0x1 },
		.tr = { .selector = 0x0, .base = 0x0, .limit = 0xffff, .type = 0xb, .present = 0x1 },
		.gdt = { .base = 0x0, .limit = 0xffff },
		.idt = { .base = 0x0, .limit = 0x3ff },
		.cr0 = 0x30, .cr2 = 0x0, .cr3 = 0x0, .cr4 = 0x0, .cr8 = 0x0, .efer = 0x0, .apic_base = 0xfee00900,
	};
	struct kvm_regs regs = {
		.rax = 0x6360694d, .rcx = 0x85d7e7c5, .rdx = 0xf6d38968, .rbx = 0xffff, .rsp = 0x2000,
		.rbp = 0x67ea8556, .rsi = 0x33323130, .rdi = 0x3b3a3938, .r8 = 0x43424140, .r9 =
		0x4b4a4948, .r10 = 0x53525150, .r11 = 0x5b5a5958, .r12 = 0x63626160, .r13 = 0x6b6a6968,
		.r14 = 0xddfaf956, .r15 = 0x7b7a7978, .rip = 0xad60, .rflags = 0x803,
	};

	DO(vcpu_fd, KVM_SET_SREGS, &sregs);
	DO(vcpu_fd, KVM_SET_REGS, &regs);
}

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

static void finish(void)
{
	if (bad)
		printf("DEFECT REPRODUCED\n");
	else if (CHECK_EXIT >= 0)
		printf("not reproduced: agrees\n");
	exit(bad);
}

static void check_exit(const char *words)
{

	if (strcmp(words, "halt")) {
		printf("exit: expected halt got %s\n", words);
		bad = 1;
		return;
	}
}

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
	run_guest(64, 1);
	if (CHECK_EXIT >= 0 && !judged) {
		fprintf(stderr, "set-up trouble: the guest ended before exit %d\n", CHECK_EXIT);
		return 2;
	}
	finish();
	return 0;
}
