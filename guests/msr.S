# CPUID, RDMSR, WRMSR: which registers are read, which are written, what happens to upper halves.
.include "common.inc"
.macro t_cpuid name, leaf
test cpuid_\name
mov $\leaf, %eax
xor %ecx, %ecx
cpuid
fin
.endm
t_cpuid 0, 0
t_cpuid 1, 1
t_cpuid 7, 7
t_cpuid 80000000, 0x80000000
t_cpuid 80000001, 0x80000001
t_cpuid 80000002, 0x80000002
t_cpuid 80000003, 0x80000003
t_cpuid 80000004, 0x80000004
t_cpuid 80000005, 0x80000005
t_cpuid 80000006, 0x80000006
t_cpuid 80000007, 0x80000007
t_cpuid 80000008, 0x80000008
test cpuid_7_1
mov $7, %eax
mov $1, %ecx
cpuid
fin
.macro t_msr name, index, low, high
test rdmsr_\name
mov $\index, %ecx
rdmsr
fin
test wrmsr_\name
mov $\index, %ecx
mov $\low, %eax
mov $\high, %edx
wrmsr
mov $0, %eax
mov $0, %edx
rdmsr
fin
test wrmsr_random_\name
mov $\index, %ecx
.if \high == 0
mov $0, %edx	# bits 63:32 are reserved
.endif
.if \index == 0x174
movzwl %ax, %eax	# a selector: of bits 31:16 only Intel says that they can be read and written
.endif
wrmsr
fin
.endm
t_msr star, 0xc0000081, 0x12345678, 0x00230010
t_msr lstar, 0xc0000082, 0x12345678, 0x00001234
t_msr cstar, 0xc0000083, 0x12345678, 0x00001234
t_msr sysenter_cs, 0x174, 0x100, 0
t_msr sysenter_esp, 0x175, 0x9abcdef0, 0
t_msr sysenter_eip, 0x176, 0x12345678, 0
t_msr fmask, 0xc0000084, 0x47700, 0
t_msr kernel_gs_base, 0xc0000102, 0x9abcdef0, 0x00001234
t_msr pat, 0x277, 0x00070406, 0x00010406
test rdmsr_efer
mov $0xc0000080, %ecx
rdmsr
fin
test wrmsr_efer_same
mov $0xc0000080, %ecx
rdmsr
wrmsr
rdmsr
fin
test wrmsr_efer_sce
mov $0xc0000080, %ecx
rdmsr
xor $1, %eax
wrmsr
rdmsr
fin
test wrmsr_efer_reserved
mov $0xc0000080, %ecx
rdmsr
or $2, %eax
wrmsr
fin
test rdmsr_none
mov $0x5fffffff, %ecx
rdmsr
fin
.if BITS == 64
test wrmsr_fs_base
mov $0xc0000100, %ecx
mov $0x11800, %eax
xor %edx, %edx
wrmsr
mov %fs:0x10, %rbx
fin
test wrmsr_gs_base
mov $0xc0000101, %ecx
mov $0x12800, %eax
xor %edx, %edx
wrmsr
mov %gs:0x10, %rbx
fin
test rdmsr_fs_base
mov $0xc0000100, %ecx
rdmsr
fin
.macro t_high_base name, index
test wrmsr_\name\()_high
mov $\index, %ecx
mov $0x9abcdef0, %eax
mov $0x00001234, %edx
wrmsr
out %al, $0x10
rdmsr
fin
.endm
t_high_base fs_base, 0xc0000100
t_high_base gs_base, 0xc0000101
test wrmsr_noncanonical
mov $0xc0000082, %ecx
mov $0, %eax
mov $0x40000000, %edx                   # bit 62: with 57-bit addresses too
wrmsr
fin
test swapgs
mov $0xc0000102, %ecx
mov $0x11000, %eax
xor %edx, %edx
wrmsr
swapgs
mov %gs:0x18, %rsi
fin
.endif
