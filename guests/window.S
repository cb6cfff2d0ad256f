# When interrupts can come in: after RFLAGS.IF is set, and not in the shadow of STI.
.include "common.inc"
.macro count
inc %ebx
inc %ecx
inc %ebp
.endm
test sti
sti
count
fin
test sti_twice
sti
sti
count
fin
test sti_cli
sti
cli
count
sti
count
fin
test sti_before_cpuid
xor %eax, %eax
xor %ecx, %ecx
sti
cpuid
count
fin
test sti_before_out
sti
out %al, $0x10
count
fin
test sti_before_in
sti
in $0x12, %al
count
fin
test sti_before_rdmsr
mov $0xc0000080, %ecx
sti
rdmsr
count
fin
test sti_before_mmio_store
.if BITS != 64
push $SEL_MMIO
pop %ds
.endif
mov $(MMIO_OFF+0x340), pb
sti
mov %ecx, 8(pb)
count
fin
test sti_before_mmio_load
.if BITS != 64
push $SEL_MMIO
pop %ds
.endif
mov $(MMIO_OFF+0x340), pb
sti
mov 8(pb), %edx
count
fin
test sti_before_mov_cr
.if BITS == 64
mov %cr0, %rdx
sti
mov %rdx, %cr0
.else
mov %cr0, %edx
sti
mov %edx, %cr0
.endif
count
fin
test sti_before_jump
sti
jmp 1f
nop
1: count
fin
test sti_before_pushf
sti
pushf
pop pd
count
fin
test popf
pushf
pop pd
or $0x200, %dx
push pd
popf
count
fin
test sti_before_ud
sti
ud2
test sti_before_int
sti
int $0x20
test open_from_the_start
count
fin
test never
cli
count
fin
