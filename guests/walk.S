# From real mode to protected mode to 64-bit mode on tables of its own, with a sign of life in each.
.include "common.inc"
.if BITS == 16
test real_to_long
lgdtl %cs:walk_gdtr
mov %cr0, %eax
or $1, %eax
mov %eax, %cr0
ljmpl $0x08, $walk_protected
.code32
walk_protected:
mov $0x10, %ecx
mov %ecx, %ds
mov %ecx, %es
mov %ecx, %ss
mov $0x1a000, %esp
push %eax
movl $0x6023, 0x5000            # PML4[0], PDPT[0], PD[0]: 2 MiB of identity, accessed and dirty
movl $0x7023, 0x6000
movl $0xe3, 0x7000
mov %cr4, %eax
or $0x20, %eax
mov %eax, %cr4
mov $0x5000, %eax
mov %eax, %cr3
mov $0xc0000080, %ecx
rdmsr
or $0x100, %eax
wrmsr
mov %cr0, %eax
or $0x80000000, %eax
mov %eax, %cr0
rdmsr
ljmp $0x18, $walk_long
.code64
walk_long:
movabs $0x123456789abcdef0, %r15
mov %r15, %r8
push %r15
mov %cr0, %rsi
mov %cr4, %rdi
hlt
.code16
test real_to_protected
lgdtl %cs:walk_gdtr
mov %cr0, %eax
inc %ax
mov %eax, %cr0
ljmpl $0x08, $1f
.code32
1: mov $0x10, %ebx
mov %ebx, %ss
mov $0x1a000, %esp
push %ebp
hlt
.code16
test real_to_protected_and_back
lgdtl %cs:walk_gdtr
mov %cr0, %eax
or $1, %al
mov %eax, %cr0
ljmp $0x20, $1f
1: mov $0x28, %ebx
mov %ebx, %ds
mov %cr0, %eax
and $0xfe, %al
mov %eax, %cr0
ljmp $0, $2f
2: mov $0x1000, %bx
mov %bx, %ds
mov 0x10, %ecx
hlt
test unreal
lgdtl %cs:walk_gdtr
mov %cr0, %eax
or $1, %al
mov %eax, %cr0
mov $0x10, %bx
mov %bx, %fs
and $0xfe, %al
mov %eax, %cr0
mov $0x10010, %ebx
mov %fs:(%ebx), %ecx
hlt
.balign 8
walk_gdt:
.quad 0
.quad 0x00cf9b000000ffff            # 08 code 32
.quad 0x00cf93000000ffff            # 10 data
.quad 0x00af9b000000ffff            # 18 code 64
.quad 0x00009b000000ffff            # 20 code 16
.quad 0x000093010000ffff            # 28 data 16
walk_gdtr:
.word . - walk_gdt - 1
.long walk_gdt
.endif
