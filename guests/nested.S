# Guests that run guests by VMRUN. What L2 starts with, and what leaves it, is in the VMCB, which harness/paths/nested.py
# fills for each entry: l2_NAME in the mode of L1, l2pae_NAME with PAE paging.
.include "common.inc"
.set VMCB, 0x20000
.set HSAVE, 0x90000

.macro svm_on
mov $0xc0000080, %ecx
rdmsr
or $0x1000, %eax
wrmsr
mov $0xc0010117, %ecx
mov $HSAVE, %eax
xor %edx, %edx
wrmsr
.endm
.macro vmrun at=VMCB
mov $\at, %eax
.byte 0x0f, 0x01, 0xd8
.endm
.macro l2 name, code
.globl l2_\name
l2_\name: \code
hlt
.if BITS == 64
.code32
.globl l2pae_\name
l2pae_\name: \code
hlt
.code64
.endif
.endm
# L1 enters L2 and halts when that has left.
.macro t_enter name, code
test \name
svm_on
vmrun
fin
l2 \name, "\code"
.endm

t_enter vmmcall, ".byte 0x0f,0x01,0xd9"
t_enter registers, "mov $0x1234567, %esi; xchg %ebx, %ebp; mov $0x77777777, %eax; sub $16, %esp; .byte 0x0f,0x01,0xd9"
t_enter flags, "stc; std; .byte 0x0f,0x01,0xd9"
t_enter stores, "mov %ecx, (%esp); add %ecx, -8(%esp); .byte 0x0f,0x01,0xd9"
t_enter shadow, "sti; .byte 0x0f,0x01,0xd9"
t_enter cpuid, "xor %eax, %eax; cpuid"
t_enter cpuid_runs, "xor %eax, %eax; xor %ecx, %ecx; cpuid; .byte 0x0f,0x01,0xd9"
t_enter hlt, "nop; hlt"
t_enter hlt_leaves_for_userspace, "mov $0x55, %ecx; hlt"
t_enter out, "out %al, $0x10"
t_enter out_dx, "mov $0x8765, %edx; out %eax, %dx"
t_enter in, "in $0x12, %ax"
t_enter out_runs, "out %al, $0x10; out %eax, $0x20; .byte 0x0f,0x01,0xd9"
t_enter in_runs, "in $0x12, %eax; .byte 0x0f,0x01,0xd9"
t_enter rdmsr, "mov $0xc0000081, %ecx; rdmsr"
t_enter wrmsr, "mov $0x174, %ecx; wrmsr"
t_enter rdmsr_runs, "mov $0xc0000080, %ecx; rdmsr; .byte 0x0f,0x01,0xd9"
t_enter mmio_store, "mov %ecx, 0xa0340; .byte 0x0f,0x01,0xd9"
t_enter mmio_load, "mov 0xa0340, %ecx; add 0xa0344, %ebx; .byte 0x0f,0x01,0xd9"
t_enter cr0_read, ".byte 0x0f,0x20,0xc1"
t_enter cr0_write, ".byte 0x0f,0x20,0xc1; .byte 0x0f,0x22,0xc1"
t_enter cr3_write, ".byte 0x0f,0x20,0xd9; .byte 0x0f,0x22,0xd9"
t_enter cr4_read, ".byte 0x0f,0x20,0xe1"
t_enter cr_runs, ".byte 0x0f,0x20,0xd9; .byte 0x0f,0x22,0xd9; .byte 0x0f,0x20,0xc2; .byte 0x0f,0x01,0xd9"
t_enter cr2_runs, ".byte 0x0f,0x22,0xd1; .byte 0x0f,0x01,0xd9"
t_enter dr7_read, ".byte 0x0f,0x21,0xf9"
t_enter dr0_write, ".byte 0x0f,0x23,0xc1"
t_enter clts_runs, ".byte 0x0f,0x06; .byte 0x0f,0x01,0xd9"
t_enter wbinvd, "wbinvd"
t_enter invlpg, "invlpg (%esp)"
t_enter pushf, "pushf"
t_enter sidt, "sidt (%esp)"
t_enter ud, "ud2"
t_enter gp, "mov $0x3f8, %ecx; mov %ecx, %es"
t_enter divide, "xor %ecx, %ecx; div %ecx"
t_enter page_fault, "mov 0x1c010, %ecx"
t_enter page_fault_store, "mov %ecx, 0x1c010"
t_enter ud_runs, "ud2"
t_enter inject, "nop; .byte 0x0f,0x01,0xd9"
t_enter rf, ".byte 0x0f,0x01,0xd9"

# Twice: L1 moves L2 past its VMMCALL in between.
test twice
svm_on
vmrun
.if BITS == 64
addl $3, VMCB+0x578
.else
mov $SEL_FLAT, %eax
mov %eax, %fs
addl $3, %fs:VMCB+0x578
.endif
vmrun
fin
l2 twice, "mov $0x51, %esi; .byte 0x0f,0x01,0xd9; mov $0x52, %edi; cpuid"
# What L1 does after L2: it has its own state again.
test afterwards
svm_on
push pc
vmrun
pop pc
pushf
out %al, $0x30
mov %cr0, pc
mov %cr3, pd
mov %dr7, pb
fin
l2 afterwards, "mov $0x61, %esi; .byte 0x0f,0x01,0xd9"

# Without a guest.
test vmrun_refused_address
svm_on
vmrun VMCB+8
fin
test vmrun_without_svme
vmrun
fin
test vmload
svm_on
mov $VMCB, %eax
.byte 0x0f, 0x01, 0xda
fin
test vmsave
svm_on
mov $VMCB, %eax
.byte 0x0f, 0x01, 0xdb
fin
test stgi_clgi
svm_on
.byte 0x0f, 0x01, 0xdd
.byte 0x0f, 0x01, 0xdc
fin
.macro t_invalid what
t_enter invalid_\what, ".byte 0x0f,0x01,0xd9"
.endm
.irp what, asid,intercept,svme,cr0,cr0_high,dr7
t_invalid \what
.endr
