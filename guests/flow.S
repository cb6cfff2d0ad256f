# Near control flow: where RIP goes and what the stack holds, with every condition taken and not taken.
.include "common.inc"

.macro flagsto value
push $\value
popf
.endm
.if BITS == 16
.macro longj cc, target
{disp16} j\cc \target
.endm
.else
.macro longj cc, target
{disp32} j\cc \target
.endm
.endif
# OF SF ZF AF PF CF: none, all, SF alone, OF alone
.macro t_jcc cc, set, value
test j\cc\()_\set
flagsto \value
j\cc 1f
mov $0x11, %dl
fin
1: mov $0x22, %dh
fin
test jn_\cc\()_\set
flagsto \value
longj \cc, 1f
mov $0x11, %dl
fin
1: mov $0x22, %dh
fin
.endm
.macro t_jcc4 cc
t_jcc \cc, none, 0x002
t_jcc \cc, all, 0x8d7
t_jcc \cc, sf, 0x082
t_jcc \cc, of, 0x802
.endm
.irp cc, o,no,b,ae,e,ne,be,a,s,ns,p,np,l,ge,le,g
t_jcc4 \cc
.endr

test call_ret
call 1f
mov $0x33, %dl
fin
1: mov $0x44, %dh
ret
test call_ret_imm
push pa
push pd
call 1f
fin
1: ret $8
test call_indirect
mov $1f, pb
call *pb
fin
1: ret
test call_mem
point_b
mov $1f, pd
mov pd, 8(pb)
call *8(pb)
fin
1: fin
test jmp_short
jmp 1f
ud2
1: fin
test jmp_back
jmp 2f
1: fin
2: jmp 1b
test jmp_indirect
mov $1f, pd
jmp *pd
ud2
1: fin
test jmp_mem
point_b
mov $1f, pd
mov pd, (pb)
jmp *(pb)
ud2
1: fin
test ret_stack
push $1f
ret
ud2
1: fin
.macro t_jind r
test jmp_\r
mov $1f, %\r
jmp *%\r
ud2
1: fin
test call_\r
mov $1f, %\r
call *%\r
1: fin
.endm
.if BITS == 16
each16 t_jind
.else
eachc t_jind
.endif
.if BITS == 32
test call_o16
mov $1f, %ebx
call *%bx
1:
fin
test jmp_o16
mov $1f, %edx
jmp *%dx
ud2
1: fin
test ret_o16
pushw $1f
retw
ud2
1: fin
.endif
.if BITS == 16
test call_o32
mov $1f, %ebx
calll *%ebx
fin
1: fin
test ret_o32
pushl $1f
retl
ud2
1: fin
.endif
.macro t_loop op
test \op\()_3
mov $3, pc
xor %dx, %dx
1: inc %dx
\op 1b
fin
test \op\()_1
mov $1, pc
cmp %al, %al
\op 1f
mov $0x55, %dl
fin
1: mov $0x66, %dl
fin
test \op\()_0
mov $0, pc
or $1, %dl
\op 1f
mov $0x55, %dl
fin
1: mov $0x66, %dl
fin
.endm
.irp op, loop,loope,loopne
t_loop \op
.endr
test loop_other_size
mov $0x10002, %ecx
xor %dx, %dx
1: inc %dx
.byte 0x67
loop 2f
fin
2: mov $0x77, %dh
fin
.macro t_jcxz op, r
test \op\()_zero
mov $0, %\r
\op 1f
mov $0x55, %dl
fin
1: mov $0x66, %dl
fin
test \op\()_not
mov $1, %\r
\op 1f
mov $0x55, %dl
fin
1: mov $0x66, %dl
fin
.endm
.if BITS == 64
t_jcxz jrcxz, rcx
t_jcxz jecxz, ecx
test jecxz_high
movabs $0x100000000, %rcx
jecxz 1f
fin
1: mov $0x66, %dl
fin
.else
t_jcxz jcxz, cx
t_jcxz jecxz, ecx
test jcxz_high
mov $0x10000, %ecx
jcxz 1f
fin
1: mov $0x66, %dl
fin
.endif
test loop_high
.if BITS == 64
movabs $0x100000001, %rcx
.else
mov $0x10001, %ecx
.endif
loop 1f
fin
1: mov $0x66, %dl
fin
.if REALSEG	# past 64 KiB the instruction pointer starts over: the halt is at 1100H
.macro t_wraps name, code
test wraps_\name
movb $0xf4, %cs:0x1100
\code
fin
.endm
t_wraps jmp, ".byte 0xe9; .word 0x1100-.-2"
t_wraps call, ".byte 0xe8; .word 0x1100-.-2"
t_wraps jcc, "stc; .byte 0x0f, 0x82; .word 0x1100-.-2"
.endif
