/*
 * The C side of bench/run.py: a real-mode guest of one HLT on a reused VM, no comparison, only the ioctls.
 *
 * loop [-d FIELDS] [-v FIELDS] [-k DEVICE] ITERATIONS REQUEST...
 *
 * REQUEST are ioctl numbers in the order of one iteration, as bench/run.py recorded them from the harness. -v is
 * kvm_run.kvm_valid_regs, -d what is copied into kvm_run and marked dirty before each iteration (KVM_SYNC_X86_*).
 * Prints nanoseconds for all iterations.
 */
#include <err.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define RAM_SIZE 0x20000
#define ENTRY 0xa000
#define MAX_REQUESTS 64

#ifndef KVM_GET_SREGS2 /* linux/kvm.h before 5.14 */
#define KVM_GET_SREGS2 _IOR(KVMIO, 0xcc, char[320])
#define KVM_SET_SREGS2 _IOW(KVMIO, 0xcd, char[320])
#endif

static int vcpu;

/* What each SET writes: the start state, read back once from a vCPU that was put there. */
static struct start {
	struct kvm_regs regs;
	struct kvm_sregs sregs;
	struct kvm_vcpu_events events;
	struct kvm_debugregs debugregs;
	struct kvm_xcrs xcrs;
	char sregs2[320];
} start, seen;

static void *argument(unsigned long request)
{
	switch (request) {
	case KVM_RUN: return NULL;
	case KVM_SET_REGS: return &start.regs;
	case KVM_SET_SREGS: return &start.sregs;
	case KVM_SET_SREGS2: return start.sregs2;
	case KVM_SET_VCPU_EVENTS: return &start.events;
	case KVM_SET_DEBUGREGS: return &start.debugregs;
	case KVM_SET_XCRS: return &start.xcrs;
	case KVM_GET_REGS: return &seen.regs;
	case KVM_GET_SREGS: return &seen.sregs;
	case KVM_GET_SREGS2: return seen.sregs2;
	case KVM_GET_VCPU_EVENTS: return &seen.events;
	case KVM_GET_DEBUGREGS: return &seen.debugregs;
	case KVM_GET_XCRS: return &seen.xcrs;
	}
	errx(2, "no argument known for ioctl %#lx", request);
}

static int call(int fd, unsigned long request, void *arg, const char *name)
{
	int result = ioctl(fd, request, arg);

	if (result < 0)
		err(1, "%s", name);
	return result;
}
#define CALL(fd, request, arg) call(fd, request, (void *)(arg), #request)

static void set_cpuid(int kvm)
{
	static struct { struct kvm_cpuid2 head; struct kvm_cpuid_entry2 entries[256]; } cpuid = { .head.nent = 256 };

	CALL(kvm, KVM_GET_SUPPORTED_CPUID, &cpuid);
	CALL(vcpu, KVM_SET_CPUID2, &cpuid);
}

static void make_start(int has_sregs2)
{
	CALL(vcpu, KVM_GET_SREGS, &start.sregs);
	start.sregs.cs.base = start.sregs.cs.selector = 0;
	CALL(vcpu, KVM_SET_SREGS, &start.sregs);
	start.regs = (struct kvm_regs){ .rip = ENTRY, .rflags = 2, .rsp = 0x2000 };
	CALL(vcpu, KVM_SET_REGS, &start.regs);
	CALL(vcpu, KVM_GET_VCPU_EVENTS, &start.events);
	CALL(vcpu, KVM_GET_DEBUGREGS, &start.debugregs);
	CALL(vcpu, KVM_GET_XCRS, &start.xcrs);
	if (has_sregs2)
		CALL(vcpu, KVM_GET_SREGS2, start.sregs2);
}

int main(int argc, char **argv)
{
	unsigned long requests[MAX_REQUESTS], dirty = 0, valid = 0, count, n, i;
	void *arguments[MAX_REQUESTS];
	const char *device = "/dev/kvm";
	struct timespec from, to;
	struct kvm_run *run;
	int kvm, vm, option;
	char *ram;

	while ((option = getopt(argc, argv, "d:v:k:")) != -1) {
		if (option == 'd')
			dirty = strtoul(optarg, NULL, 0);
		else if (option == 'v')
			valid = strtoul(optarg, NULL, 0);
		else if (option == 'k')
			device = optarg;
		else
			return 2;
	}
	if (optind + 1 >= argc || argc - optind - 1 > MAX_REQUESTS)
		errx(2, "usage: loop [-d FIELDS] [-v FIELDS] [-k DEVICE] ITERATIONS REQUEST...");
	count = strtoul(argv[optind++], NULL, 0);
	for (n = 0; optind < argc; n++) {
		requests[n] = strtoul(argv[optind++], NULL, 0);
		arguments[n] = argument(requests[n]);
	}

	kvm = open(device, O_RDWR | O_CLOEXEC);
	if (kvm < 0)
		err(3, "%s", device);
	vm = CALL(kvm, KVM_CREATE_VM, 0);
	ram = mmap(NULL, RAM_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (ram == MAP_FAILED)
		err(1, "mmap");
	ram[ENTRY] = (char)0xf4;
	ioctl(vm, KVM_SET_TSS_ADDR, 0xfffbd000UL); /* VMX without unrestricted guest; elsewhere it does nothing */
	struct kvm_userspace_memory_region region = { .memory_size = RAM_SIZE, .userspace_addr = (unsigned long)ram };
	CALL(vm, KVM_SET_USER_MEMORY_REGION, &region);
	vcpu = CALL(vm, KVM_CREATE_VCPU, 0);
	run = mmap(NULL, CALL(kvm, KVM_GET_VCPU_MMAP_SIZE, 0), PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
	if (run == MAP_FAILED)
		err(1, "mmap kvm_run");
	set_cpuid(kvm);
	make_start(ioctl(kvm, KVM_CHECK_EXTENSION, 200) > 0); /* KVM_CAP_SREGS2 */
	run->kvm_valid_regs = valid;

	clock_gettime(CLOCK_MONOTONIC, &from);
	for (i = 0; i < count; i++) {
		if (dirty & KVM_SYNC_X86_REGS)
			run->s.regs.regs = start.regs;
		if (dirty & KVM_SYNC_X86_SREGS)
			run->s.regs.sregs = start.sregs;
		if (dirty & KVM_SYNC_X86_EVENTS)
			run->s.regs.events = start.events;
		run->kvm_dirty_regs = dirty;
		for (unsigned long j = 0; j < n; j++)
			if (ioctl(vcpu, requests[j], arguments[j]) < 0)
				err(1, "ioctl %#lx", requests[j]);
		if (run->exit_reason != KVM_EXIT_HLT)
			errx(1, "iteration %lu: exit reason %u, not KVM_EXIT_HLT", i, run->exit_reason);
	}
	clock_gettime(CLOCK_MONOTONIC, &to);
	printf("%lld\n", (to.tv_sec - from.tv_sec) * 1000000000LL + to.tv_nsec - from.tv_nsec);
	return 0;
}
