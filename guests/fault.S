# Exceptions: each ends in the HLT of its own stub, with the frame on the stack for all to see.
.include "common.inc"
test ud2
ud2
test de_byte
mov $0, %cl
div %cl
fin
test de_dword
mov $0, %ecx
idivl %ecx
fin
test int3
int3
fin
.macro t_int n
test int_\n
int $0x\n
fin
.endm
.irp n, 00,01,03,04,06,08,0d,0e,20,40,80,c3,ff
t_int \n
.endr
test int3_long
.byte 0xcd, 0x03
fin
test icebp
.byte 0xf1
fin
test push_then_ud
push pa
push pd
mov $0x42, %cl
ud2
test stc_int80
stc
int $0x80
fin
test sti_int80
sti
int $0x80
fin
test tf_flag
pushf
pop pa
or $0x100, %ax
push pa
popf
nop
fin
test absent_read
.if BITS == 64
mov $ABSENT_LINEAR, %ebx
mov 0x10(%rbx), %eax
.else
mov $SEL_FLAT, %eax
mov %eax, %fs
mov $ABSENT_LINEAR, %ebx
mov %fs:0x10(%ebx), %eax
.endif
fin
test absent_write
.if BITS == 64
mov $ABSENT_LINEAR, %ebx
mov %eax, 0x10(%rbx)
.else
mov $SEL_FLAT, %eax
mov %eax, %fs
mov $ABSENT_LINEAR, %ebx
mov %eax, %fs:0x10(%ebx)
.endif
fin
test readonly_read
.if BITS == 64
mov $READONLY_LINEAR, %ebx
mov 0x10(%rbx), %eax
.else
mov $SEL_FLAT, %eax
mov %eax, %fs
mov $READONLY_LINEAR, %ebx
mov %fs:0x10(%ebx), %eax
.endif
fin
test readonly_write
.if BITS == 64
mov $READONLY_LINEAR, %ebx
addl $1, 0x10(%rbx)
.else
mov $SEL_FLAT, %eax
mov %eax, %fs
mov $READONLY_LINEAR, %ebx
addl $1, %fs:0x10(%ebx)
.endif
fin
test cross_into_absent
.if BITS == 64
mov $(ABSENT_LINEAR-2), %ebx
mov %eax, (%rbx)
.else
mov $SEL_FLAT, %eax
mov %eax, %fs
mov $(ABSENT_LINEAR-2), %ebx
mov %eax, %fs:(%ebx)
.endif
fin
.if BITS == 64
test noncanonical_read
movabs $0x0100000000000000, %rbx
mov (%rbx), %eax
fin
test noncanonical_stack
movabs $0x0100000000000000, %rsp
push %rax
fin
test noncanonical_jump
movabs $0x0100000000000000, %rbx
jmp *%rbx
test noncanonical_ret
movabs $0x0100000000000000, %rbx
push %rbx
ret
.macro t_ud64 op
test ud_\op
raw 0x\op, 0xc0, 0, 0, 0
fin
.endm
.irp op, 06,0e,16,1e,27,2f,37,3f,60,61,82,9a,ea,d6
t_ud64 \op
.endr
test ud_d5	# no AAD, and no REX2 for a row of the opcode map that has none
raw 0xd5, 0, 0x40
fin
test ud_d4
raw 0xd4, 0, 0x40
fin
.else
test bound_in
point_b
movl $0x100010, (pb)
movl $0x100, 4(pb)
mov $0x50, %cx
boundw %cx, (pb)
fin
test bound_out
point_b
movl $0x100010, (pb)
mov $0x5, %cx
boundw %cx, (pb)
fin
test into_taken
mov $0x7f, %al
add $1, %al
into
fin
test into_not
xor %al, %al
into
fin
test push_beyond_limit
mov $2, %esp
sub $1, %esp
push pa
fin
.endif
test unmapped_fetch
.if BITS == 64
mov $ABSENT_LINEAR, %ebx
jmp *%rbx
.elseif BITS == 32
mov $ABSENT_LINEAR, %ebx
jmp *%ebx
.else
ud2
.endif
test long_instruction
.byte 0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x90
fin
test longest_instruction
.byte 0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x90
fin
test ud_0fff
.byte 0x0f, 0xff, 0xc0
fin
test fe_7
.byte 0xfe, 0xf8
fin
test ff_7
.byte 0xff, 0xf8
fin
test hlt
hlt
fin
test cli_hlt
cli
hlt
fin
.if BITS == 64	# addresses of more than 32 bits, canonical and mapped nowhere
.macro t_far name, address
test far_read_\name
movabs $\address, %rbx
mov 0x18(%rbx), %eax
fin
test far_write_\name
movabs $\address, %rbx
mov %eax, 0x18(%rbx)
fin
test far_jump_\name
movabs $\address, %rbx
jmp *%rbx
.endm
t_far low, 0x123456789000
t_far high, 0xffff923456789000
.endif
