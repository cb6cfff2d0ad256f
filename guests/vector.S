# An exit, after which the VM is another one (harness/paths/vector.py), and then an exception: its delivery is the first
# to touch tables and stack, so it is itself interrupted by exits, and the event has to be delivered again.
.include "common.inc"
.macro elsewhere name
test \name
out %al, $0x10
.endm
elsewhere ud2
ud2
elsewhere int3
int3
fin
elsewhere int80
int $0x80
fin
elsewhere divide
mov $0, %cl
div %cl
fin
elsewhere icebp
.byte 0xf1
fin
.if REALSEG == 0
elsewhere gp_selector
mov $0x3f8, %ecx
mov %ecx, %es
fin
elsewhere np_selector
mov $SEL_ABSENT, %ecx
mov %ecx, %es
fin
.endif
.if BITS != 16
elsewhere absent_read
mov $ABSENT_LINEAR, %ebx
.if BITS == 64
mov 0x14(%rbx), %ecx
.else
mov $SEL_FLAT, %eax
mov %eax, %fs
mov %fs:0x14(%ebx), %ecx
.endif
fin
elsewhere readonly_write
mov $READONLY_LINEAR, %ebx
.if BITS == 64
mov %ecx, 0x14(%rbx)
.else
mov $SEL_FLAT, %eax
mov %eax, %fs
mov %ecx, %fs:0x14(%ebx)
.endif
fin
.endif
.if BITS == 64
elsewhere noncanonical
movabs $0x0100000000000000, %rbx
mov (%rbx), %eax
fin
.endif
