# A stack in the MMIO hole: what is pushed leaves for userspace, what is popped comes from there, one exit an item.
# SS has its base there from the start (harness/paths/mmio_stack.py).
.include "common.inc"
.macro mmio_stack
mov $(MMIO_OFF+0x480), psp
.endm
.macro t_push r
test push_\r
mmio_stack
push %\r
fin
test pop_\r
mmio_stack
pop %\r
fin
.endm
each16 t_push
.if BITS != 64
each32 t_push
.else
each64 t_push
.endif
test push_imm
mmio_stack
push $-3
fin
test pushf
mmio_stack
pushf
fin
test call
mmio_stack
call 1f
fin
1: fin
test push_mem
point_b
mmio_stack
push (pb)
fin
test pop_mem
point_b
mmio_stack
pop (pb)
fin
.if BITS != 32	# 16 or 32 bits of the slot are written, depending on the processor's maker
test push_fs
mmio_stack
push %fs
fin
.endif
test leave
mmio_stack
mov $(MMIO_OFF+0x490), pbp
leave
fin
test enter
mmio_stack
enter $8, $0
fin
.if BITS != 64
test pusha
mmio_stack
pusha
fin
test popa
mmio_stack
popa
fin
test pushal
mmio_stack
pushal
fin
test popal
mmio_stack
popal
fin
.endif
.if REALSEG	# where they go to is the device's choice: they are followed as far as there
test ret_far
mmio_stack
lret
test ret_far_imm
mmio_stack
lret $6
test iret
mmio_stack
iretw
.endif
