# Guests that an SMI interrupts after their first exit. The handlers (smm_NAME up to end_NAME) are 16-bit code that
# harness/paths/smm.py puts where SMBASE has them: DS is flat, CS starts at SMBASE.
.include "common.inc"
.set SAVED, 0x3fe00
test go
out %al, $0x20
nop
inc %ebx
inc %ebp
fin
test go_in
in $0x21, %ax
nop
inc %ebx
fin
test rsm_outside
.byte 0x0f, 0xaa
fin

.code16
.macro handler name
.globl smm_\name
smm_\name:
.endm
.macro resume name
rsm
.globl end_\name
end_\name:
.endm
handler nothing
resume nothing
handler exit
out %al, $0x30
resume exit
handler read
in $0x31, %eax
in $0x32, %al
resume read
handler registers
.irp r, eax,ecx,edx,ebx,esp,ebp,esi,edi
mov $0x5a5a5a5a, %\r
.endr
stc
out %al, $0x30
resume registers
handler cr
mov %cr0, %eax
or $2, %al
mov %eax, %cr0
mov %eax, %cr2
out %al, $0x30
resume cr
handler dr
mov $0x12345, %eax
mov %eax, %dr3
mov $0x700, %eax
mov %eax, %dr7
out %al, $0x30
resume dr
# Values of their own into each saved general register but RSP: lower halves, then upper ones.
.macro store n
addr32 movl $(0x11110000+\n*0x101), SAVED+0x180+8*\n
.endm
handler saved_registers
.irp n, 0,1,2,3,4,5,6,7,8,9,10,12,13,14,15
store \n
.endr
resume saved_registers
handler saved_rip	# past the NOP
addr32 addl $1, SAVED+0x178
resume saved_rip
handler saved_flags
addr32 orl $0x801, SAVED+0x170
resume saved_flags
handler saved_segment
addr32 movl $0x11800, SAVED+0x48	# FS.base
addr32 movl $0x12800, SAVED+0x58	# GS.base
resume saved_segment
