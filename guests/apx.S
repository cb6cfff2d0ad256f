# Intel APX: R16-R31 by REX2 in every operand position, the instructions that are new, and what must be #UD.
# Encodings by macro, for assemblers that do not know APX. In other modes D5 is AAD.
.if BITS == 64
.include "common.inc"
.include "apx_macros.inc"

.macro t_egpr r
test mov_to_\r
movq_rr %rax, %\r
fin
test mov_from_\r
movq_rr %\r, %rcx
fin
test mov32_to_\r                        # zeroes the upper half
rex2_rr 0x89, %rax, %\r, 0
fin
test mov32_from_\r
rex2_rr 0x89, %\r, %rdx, 0
fin
test mov8_to_\r
rex2_rr 0x88, %rsi, %\r, 0              # SIL
fin
test mov8_from_\r
rex2_rr 0x88, %\r, %rdi, 0              # DIL
fin
test mov16_to_\r
.byte 0x66
rex2_rr 0x89, %rax, %\r, 0
fin
test load_\r
point_b
movq_load 0x10, %rbx, %\r
fin
test store_\r
point_b
movq_store %\r, 0x18, %rbx
fin
test base_\r
movabsq_i DS_OFF+0x140, %\r
movq_load 8, %\r, %rcx
movq_store %rdx, -8, %\r
fin
test index_\r
movabsq_i 0x20, %\r
point_b
rex2_rmx 0x8b, %rcx, 8, %rbx, %\r, 2
fin
test push_\r
pushq_r %\r
fin
test pop_\r
push %rdx
popq_r %\r
fin
test pushp_popp_\r
pushp_r %\r
popp_r %\r
fin
test movabs_\r
movabsq_i 0xa55a1234deadbeef, %\r
fin
test xchg_\r
xchgq_rr %\r, %r9
fin
test xchg_rax_\r
rex2_o 0x90, %\r, 1
fin
test add_\r
addq_rr %rax, %\r
fin
test mmio_load_\r
mov $MMIO_OFF+0x200, %ebx
movq_load 8, %rbx, %\r
fin
test mmio_store_\r
mov $MMIO_OFF+0x200, %ebx
movq_store %\r, 8, %rbx
fin
test mmio_load32_\r
mov $MMIO_OFF+0x200, %ebx
rex2_rm 0x8b, %\r, 4, %rbx, 0
fin
test mmio_store8_\r
mov $MMIO_OFF+0x200, %ebx
rex2_rm 0x88, %\r, 1, %rbx, 0
fin
test mmio_base_\r
movabsq_i MMIO_OFF+0x200, %\r
movq_store %rcx, 8, %\r
fin
test mmio_xchg_\r
mov $MMIO_OFF+0x200, %ebx
rex2_rm 0x87, %\r, 8, %rbx
fin
test cr2_set_\r
rex2_rr 0x22, %rdx, %\r, 0, 1
fin
test cr0_get_\r
rex2_rr 0x20, %rax, %\r, 0, 1
fin
test cr3_get_\r
rex2_rr 0x20, %rbx, %\r, 0, 1
fin
test cr8_set_\r
movabsq_i 5, %\r
rex2_rr 0x22, %r8, %\r, 0, 1
fin
test dr1_set_\r
rex2_rr 0x23, %rcx, %\r, 0, 1
fin
test dr7_get_\r
rex2_rr 0x21, %rdi, %\r, 0, 1
fin
test imul_\r
rex2_rr 0xaf, %\r, %rcx, 1, 1
fin
test movzx_\r
rex2_rr 0xb6, %\r, %\r, 1, 1
fin
test cmpxchg_\r
rex2_rr 0xb1, %\r, %rcx, 1, 1
fin
test bswap_\r
regno .Lt, %\r
rex2p 1, 1, 0, 0, .Lt
.byte 0xc8|(.Lt&7)
fin
test jmp_\r
movabsq_i 1f, %\r
rex2_rr 0xff, %rsp, %\r, 0              # FF /4
ud2
1: fin
test call_\r
movabsq_i 1f, %\r
rex2_rr 0xff, %rdx, %\r, 0              # FF /2
1: fin
test lea_\r
rex2_rmx 0x8d, %rcx, 0x123, %\r, %\r, 1
fin
test ndd_add_\r                         # EVEX map 4: three operands
add3 %\r, %rax, %rdx
fin
test ndd_add_nf_\r
add3 %rcx, %rax, %\r, 1
fin
test push2_\r
push2_rr %rax, %\r
fin
test ccmpe_\r
ccmp_rr 4, 1, %\r, %rax
fin
.endm
.irp r, r16,r17,r18,r19,r20,r21,r22,r23,r24,r25,r26,r27,r28,r29,r30,r31
t_egpr \r
.endr

test push2_pop2
push2_rr %r16, %r17
pop2_rr %r18, %r19
fin
test push2_unaligned
sub $8, %rsp
push2_rr %r16, %r17
fin
test jmpabs
jmpabs_i 1f
ud2
1: fin
.macro t_chain
.irp r, r17,r18,r19,r20,r21,r22,r23,r24,r25,r26,r27,r28,r29,r30,r31
movq_rr %\r, %r16
pushq_r %\r
.endr
.endm
test chain
t_chain
fin
test jmpabs_w_ud
.byte 0xd5, 0x08, 0xa1
.quad 1f
1: fin
test jmpabs_66_ud
.byte 0x66, 0xd5, 0, 0xa1
.quad 1f
1: fin
test rex_before_ud
.byte 0x48, 0xd5, 0x18, 0x89, 0xc0
fin
test rex_after_ud
.byte 0xd5, 0x18, 0x48, 0x89, 0xc0
fin
test prefix_after_ud
.byte 0xd5, 0x18, 0x66, 0x89, 0xc0
fin
test rex2_twice_ud
.byte 0xd5, 0x18, 0xd5, 0x18, 0x89, 0xc0
fin
test lock_reg_ud
.byte 0xf0, 0xd5, 0x18, 0x01, 0xc0
fin
# Opcode rows that REX2 may not have: map 0 4x 7x Ax Ex, map 1 3x 8x.
.macro t_row0 o
test row0_\o\()_ud
.byte 0xd5, 0x00, 0x\o, 0, 0, 0, 0
fin
.endm
.irp o, 40,4f,70,74,7f,a0,a3,a4,a8,aa,ac,af,e0,e3,e4,e6,e8,e9,eb,ec,ee,ef
t_row0 \o
.endr
.macro t_row1 o
test row1_\o\()_ud
.byte 0xd5, 0x80, 0x\o, 0, 0, 0, 0
fin
.endm
.irp o, 30,31,32,33,34,38,3a,80,84,8f
t_row1 \o
.endr
test rep_movs_plain                     # legacy code must leave R16-R31 alone
point_si
point_di
mov $5, %ecx
cld
rep movsb
fin
test cpuid_all
xor %eax, %eax
xor %ecx, %ecx
cpuid
fin
.if USER == 0
test xcr0_off_on                        # R16-R31 survive XCR0[19] off and on
xor %ecx, %ecx
mov $3, %eax
xor %edx, %edx
xsetbv
mov $0x80003, %eax
xsetbv
movq_rr %r16, %rbx
movq_rr %r31, %rsi
fin
test xcr0_off_ud
xor %ecx, %ecx
mov $3, %eax
xor %edx, %edx
xsetbv
movq_rr %r16, %rbx
fin
test osxsave_off_ud
mov %cr4, %rax
btr $18, %rax
mov %rax, %cr4
movq_rr %r16, %rbx
fin
.endif
test xgetbv
xor %ecx, %ecx
xgetbv
fin
.else
.include "common.inc"
# Outside 64-bit mode D5 is AAD.
test d5_is_aad
.byte 0xd5, 0x0a
fin
test d5_is_aad16
.byte 0xd5, 0x10
fin
test d5_then_mov
.byte 0xd5, 0x18, 0x89, 0xc8
fin
test d5_then_inc
.byte 0xd5, 0x00, 0x40
fin
.endif
