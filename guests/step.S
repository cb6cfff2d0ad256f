# Stepped through one instruction at a time (harness/paths/step.py). The number in a name says how many steps it takes
# to the HLT; what is named mmio takes two more outside 64-bit code.
.include "common.inc"
.macro t_io s, a
test 1_out_imm_\s
out %\a, $0x80
fin
test 2_out_dx_\s
mov $0x8765, %dx
out %\a, %dx
fin
test 3_outs_\s
mov $0x5678, %dx
point_si
outs\s
fin
test 1_in_imm_\s
in $0x80, %\a
fin
test 2_in_dx_\s
mov $0x1234, %dx
in %dx, %\a
fin
test 3_ins_\s
mov $0x5678, %dx
point_di
ins\s
fin
.endm
t_io b, al
t_io w, ax
t_io l, eax

.macro mmio_b
.if BITS != 64
push $SEL_MMIO
pop %ds
.endif
mov $(MMIO_OFF+0x340), pb
.endm
.macro t_mmio r
test 2_mmio_store_\r
mmio_b
mov %\r, 8(pb)
fin
test 2_mmio_load_\r
mmio_b
mov 8(pb), %\r
fin
test 2_mmio_add_\r
mmio_b
add %\r, (pb)
fin
test 2_mmio_cmp_\r
mmio_b
cmp %\r, (pb)
fin
.endm
t_mmio cl
t_mmio cx
t_mmio ecx
.if BITS == 64
t_mmio rcx
.endif

test 2_inc
inc %ecx
inc %ecx
fin
test 2_jump
jmp 1f
fin
1: nop
fin
test 2_call
call 1f
fin
1: ret
test 2_push_pop
push pc
pop pd
fin
test 3_store_load
point_b
mov %ecx, (pb)
mov (pb), %edx
fin
test 6_rep_movs
mov $3, pc
point_si
point_di
rep movsb
fin
test 3_cpuid
xor %eax, %eax
xor %ecx, %ecx
cpuid
fin
test 2_rdmsr
mov $0xc0000080, %ecx
rdmsr
fin
.macro t_cr r
test 2_cr0
mov %cr0, %\r
mov %\r, %cr0
fin
test 2_cr3
mov %cr3, %\r
mov %\r, %cr3
fin
test 2_dr7
mov %dr7, %\r
mov %\r, %dr7
fin
.endm
.if BITS == 64
t_cr rcx
.else
t_cr ecx
.endif
