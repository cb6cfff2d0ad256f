# A processor without APX, or one that hides it: no bit in CPUID, none in XCR0, and its prefixes are #UD.
.if BITS == 64
.include "common.inc"
.include "apx.inc"
test rex2_mov
movq_rr %rax, %r16
fin
test rex2_legacy_registers              # the prefix itself, not the registers
.byte 0xd5, 0x08, 0x89, 0xc8
fin
test rex2_map1
.byte 0xd5, 0x80, 0xaf, 0xc1
fin
test rex2_load
point_b
movq_load 0x10, %rbx, %r20
fin
test rex2_mmio
mov $MMIO_OFF+0x240, %ebx
movq_load 0x10, %rbx, %r20
fin
test rex2_push
pushq_r %r31
fin
test jmpabs
jmpabs_i 1f
1: fin
test evex_add
ev_rr 0x01, %rax, %rcx
fin
test evex_push2
mov %rsp, %rbp
and $-16, %rsp
push2_rr %rax, %rcx
fin
test cpuid_7_1
mov $7, %eax
mov $1, %ecx
cpuid
fin
test cpuid_d
mov $0xd, %eax
xor %ecx, %ecx
cpuid
fin
test cpuid_d_19
mov $0xd, %eax
mov $19, %ecx
cpuid
fin
test cpuid_29
mov $0x29, %eax
xor %ecx, %ecx
cpuid
fin
.if USER == 0
test xsetbv_gp
mov %cr4, %rax
bts $18, %rax
mov %rax, %cr4
xor %ecx, %ecx
mov $0x80003, %eax
xor %edx, %edx
xsetbv
fin
.endif
.endif
