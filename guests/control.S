# Control and debug registers with every GPR, LMSW/SMSW/CLTS, descriptor-table registers.
.include "common.inc"
.macro t_cr r
.irp n, 0,2,3,4
t_cr_get \n, \r
.endr
test cr0_same_\r
mov %cr0, %\r
mov %\r, %cr0
fin
test cr0_ts_\r
mov %cr0, %\r
or $8, %\r
mov %\r, %cr0
mov %cr0, %\r
fin
test cr2_set_\r
mov %\r, %cr2
mov %cr2, %\r
fin
test cr3_same_\r
mov %cr3, %\r
mov %\r, %cr3
fin
test cr4_same_\r
mov %cr4, %\r
mov %\r, %cr4
fin
test cr4_de_\r
mov %cr4, %\r
or $8, %\r
mov %\r, %cr4
mov %cr4, %\r
fin
.irp n, 0,1,2,3
t_dr \n, \r
.endr
test dr6_get_\r
mov %dr6, %\r
fin
test dr6_set_\r
mov $0, %\r
mov %\r, %dr6
mov %dr6, %\r
fin
test dr7_get_\r
mov %dr7, %\r
fin
test dr7_set_\r
mov $0x700, %\r
mov %\r, %dr7
mov %dr7, %\r
fin
.if BITS == 64
test cr8_get_\r
mov %cr8, %\r
fin
test cr8_set_\r
and $15, %\r
mov %\r, %cr8
mov %cr8, %\r
fin
test cr8_bad_\r
or $16, %\r
mov %\r, %cr8
fin
.endif
.endm
.macro t_cr_get n, r
test cr\n\()_get_\r
mov %cr\n, %\r
fin
.endm
.macro t_dr n, r
test dr\n\()_set_\r
mov %\r, %dr\n
fin
test dr\n\()_get_\r
mov %dr\n, %\r
fin
.endm
eachc t_cr

.macro t_smsw r
test smsw_\r
smsw %\r
fin
.endm
each16 t_smsw
each32 t_smsw
each64 t_smsw
.macro t_lmsw r
test lmsw_\r
smsw %\r
or $0xa, %\r
lmsw %\r
fin
.endm
each16 t_lmsw
test smsw_mem
point_b
smsw (pb)
fin
test lmsw_mem
point_b
smsw (pb)
orw $8, (pb)
lmsw (pb)
fin
test clts
smsw %ax
or $8, %ax
lmsw %ax
clts
smsw %dx
fin
test cr1_ud
.byte 0x0f, 0x20, 0xc8
fin
test cr5_ud
.byte 0x0f, 0x20, 0xe8
fin
test dr4_alias
.byte 0x0f, 0x21, 0xe0
fin
test sgdt
point_b
sgdt (pb)
fin
test sidt
point_b
sidt (pb)
fin
test lgdt_same
point_b
sgdt (pb)
lgdt (pb)
fin
test lidt_same
point_b
sidt (pb)
lidt (pb)
fin
test lgdt_other
point_b
movw $0x3f, (pb)
movl $0x123456, 2(pb)
.if BITS == 64
movl $0, 6(pb)
.endif
lgdt (pb)
sgdt 0x10(pb)
fin
test lidt_other
point_b
movw $0x7f, (pb)
movl $0x12123456, 2(pb)
.if BITS == 64
movl $0x7f, 6(pb)
.endif
lidt (pb)
sidt 0x10(pb)
fin
test invlpg
point_b
invlpg (pb)
fin
test wbinvd
wbinvd
fin
.if REALSEG == 0
test sldt
sldt %ax
sldt %edx
fin
test str
str %cx
str %edx
fin
test sldt_mem
point_b
sldt (pb)
str 4(pb)
fin
test lldt_null
xor %ax, %ax
lldt %ax
fin
test lldt_same
mov $SEL_LDT, %ax
lldt %ax
fin
test ltr_busy
mov $SEL_TSS, %ax
ltr %ax
fin
.endif
.if BITS == 64
test cr0_pg_off
mov %cr0, %rax
btr $31, %rax
mov %rax, %cr0
fin
test cr4_pae_off
mov %cr4, %rax
btr $5, %rax
mov %rax, %cr4
fin
test cr0_high_bits
mov %cr0, %rax
bts $40, %rax
mov %rax, %cr0
fin
test cr4_high_bits
mov %cr4, %rax
bts $40, %rax
mov %rax, %cr4
fin
test swapgs
swapgs
fin
.endif
test cr4_reserved
.if BITS == 64
mov %cr4, %rax
bts $31, %rax
mov %rax, %cr4
.else
mov %cr4, %eax
or $0x80000000, %eax
mov %eax, %cr4
.endif
fin
.macro t_osxsave r
test osxsave_\r
mov %cr4, %\r
or $0x40000, %\r
mov %\r, %cr4
mov $1, %eax
xor %ecx, %ecx
cpuid
fin
test osxsave_off_\r
mov %cr4, %\r
or $0x40000, %\r
mov %\r, %cr4
xor $0x40000, %\r
mov %\r, %cr4
mov $1, %eax
xor %ecx, %ecx
cpuid
fin
.endm
.if BITS == 64
t_osxsave rsi
t_osxsave r15
.else
t_osxsave esi
.endif
