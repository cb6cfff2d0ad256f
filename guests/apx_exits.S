# R16-R31 over everything that ends KVM_RUN, and what userspace may do to them meanwhile (harness/paths/apx.py).
.if BITS == 64
.include "common.inc"
.include "apx.inc"

# The guest's own look at its registers: each goes into memory, and changes.
.macro look
mov $(DS_OFF+0x600), %ebx
.set .Lat, 0
.irp r, r16,r17,r18,r19,r20,r21,r22,r23,r24,r25,r26,r27,r28,r29,r30,r31
movq_store %\r, .Lat, %rbx
rex2_rr 0xff, %rax, %\r, 0              # INC
.set .Lat, .Lat+8
.endr
.endm
.macro xcr0 value
xor %ecx, %ecx
mov $\value, %eax
xor %edx, %edx
xsetbv
.endm

# --- one exit each
test out
out %eax, $0x91
look
fin
test in
in $0x92, %al
look
fin
test rep_ins
mov $0x93, %edx
mov $3, %ecx
point_di
rep insw
look
fin
test mmio_store
mov $MMIO_OFF+0x240, %ebx
mov %rcx, 8(%rbx)
look
fin
test mmio_load
mov $MMIO_OFF+0x240, %ebx
mov 0x10(%rbx), %rcx
look
fin
test mmio_add
mov $MMIO_OFF+0x240, %ebx
add %rcx, 0x18(%rbx)
look
fin
test halt
hlt
look
fin
test rdmsr
mov $0x5fffffff, %ecx
rdmsr
look
fin
test wrmsr
mov $0x5fffffff, %ecx
wrmsr
look
fin
test hypercall                          # KVM_HC_MAP_GPA_RANGE
mov $12, %eax
mov $DATA_LINEAR, %ebx
mov $1, %ecx
xor %edx, %edx
vmmcall
look
fin

# --- none: what KVM does by itself
test cpuid
xor %eax, %eax
xor %ecx, %ecx
cpuid
look
fin
test rdmsr_kernel
mov $0xc0000080, %ecx
rdmsr
look
fin
test wrmsr_kernel
mov $0xc0000102, %ecx
mov $0x11000, %eax
xor %edx, %edx
wrmsr
look
fin
test xsetbv
xcr0 3
out %al, $0x94
xcr0 0x80003
look
fin

# --- under single step, kicked by a signal
test step
movq_rr %rax, %r16
movq_rr %r31, %rcx
addq_rr %r16, %r23
bts $9, %rdi
fin
test spin
1: jmp 1b
.globl after_spin
after_spin:
look
fin

# --- XCR0[19] for the first time
test first_enable
xcr0 0x80003
look
fin
# --- with the help of userspace
test enable_late
out %al, $0x95
look
fin

# --- what another vCPU runs
.globl partner_look
partner_look:
look
out %al, $0x96
look
fin
.globl partner_plain
partner_plain:
mov $0x1234, %ecx
out %al, $0x97
inc %rdx
fin
.endif
