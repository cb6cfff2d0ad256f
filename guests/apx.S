# Intel APX: R16-R31 by REX2 in every operand position, the instructions that are new, and what must be #UD.
# Encodings by macro, for assemblers that do not know APX. In other modes D5 is AAD.
.if BITS == 64
.include "common.inc"
.include "apx.inc"

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
.endm
.irp r, r16,r17,r18,r19,r20,r21,r22,r23,r24,r25,r26,r27,r28,r29,r30,r31
t_egpr \r
.endr

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
# EGPRs as operands of instructions that a hypervisor intercepts or emulates.
.macro rex2_x opc, ext, rm, w=0, m=1    # opcode /ext, register
regno .Lb, \rm
rex2p \m, \w, 0, 0, .Lb
.byte \opc, 0xc0|((\ext)<<3)|(.Lb&7)
.endm
.macro rex2_xm opc, ext, disp, base, w=0, m=1
regno .Lb, \base
rex2p \m, \w, 0, 0, .Lb
.byte \opc, 0x84|((\ext)<<3), 0x20|(.Lb&7)
.long \disp
.endm
.macro t_system r
test cr4_get_\r
rex2_rr 0x20, %rsp, %\r, 0, 1
fin
test cr0_set_\r
mov %cr0, %rax
movq_rr %rax, %\r
rex2_rr 0x22, %rax, %\r, 0, 1
fin
test cr3_set_\r
mov %cr3, %rax
movq_rr %rax, %\r
rex2_rr 0x22, %rbx, %\r, 0, 1
fin
test cr4_set_\r
mov %cr4, %rax
movq_rr %rax, %\r
rex2_rr 0x22, %rsp, %\r, 0, 1
fin
test cr8_get_\r
rex2_rr 0x20, %r8, %\r, 0, 1
fin
test dr0_get_\r
rex2_rr 0x21, %rax, %\r, 0, 1
fin
test dr6_get_\r
rex2_rr 0x21, %rsi, %\r, 0, 1
fin
test smsw_\r
rex2_x 0x01, 4, %\r
fin
test lmsw_\r
movabsq_i 0x31, %\r
rex2_x 0x01, 6, %\r
fin
test sldt_\r
rex2_x 0x00, 0, %\r
fin
test str_\r
rex2_x 0x00, 1, %\r, 1
fin
test verr_\r
movabsq_i SEL_ES, %\r
rex2_x 0x00, 4, %\r
fin
test lar_\r
movabsq_i SEL_CODE64, %\r
rex2_rr 0x02, %\r, %\r, 0, 1
fin
test lsl_\r
movabsq_i SEL_DS, %\r
rex2_rr 0x03, %\r, %\r, 1, 1
fin
test sreg_get_\r
rex2_rr 0x8c, %rbx, %\r, 0
fin
test sreg_set_\r
movabsq_i SEL_ES, %\r
rex2_rr 0x8e, %rsp, %\r, 0
fin
test rdfsbase_\r
.byte 0xf3
rex2_x 0xae, 0, %\r, 1
fin
test sgdt_\r
movabsq_i DS_OFF+0x100, %\r
rex2_xm 0x01, 0, 8, %\r
fin
test sidt_\r
movabsq_i DS_OFF+0x100, %\r
rex2_xm 0x01, 1, 8, %\r
fin
test lgdt_\r
movabsq_i DS_OFF+0x100, %\r
movw $GDT_LIMIT, DS_OFF+0x108
movq $GDT_LINEAR, DS_OFF+0x10a
rex2_xm 0x01, 2, 8, %\r
fin
test lidt_\r
movabsq_i DS_OFF+0x100, %\r
movw $0xfff, DS_OFF+0x108
movq $IDT_LINEAR, DS_OFF+0x10a
rex2_xm 0x01, 3, 8, %\r
fin
test lldt_\r
movabsq_i SEL_LDT, %\r
rex2_x 0x00, 2, %\r
fin
test invlpg_\r
movabsq_i DS_OFF, %\r
rex2_xm 0x01, 7, 8, %\r
fin
test cmpxchg16b_\r
movabsq_i DS_OFF+0x100, %\r
rex2_xm 0xc7, 1, 0x10, %\r, 1
fin
test push_mem_\r
movabsq_i DS_OFF+0x100, %\r
rex2_xm 0xff, 6, 0x20, %\r, 0, 0
fin
test mmio_push_\r
movabsq_i MMIO_OFF+0x200, %\r
rex2_xm 0xff, 6, 8, %\r, 0, 0
fin
test mmio_movzx_\r
mov $MMIO_OFF+0x200, %ebx
rex2_rm 0xb6, %\r, 5, %rbx, 1, 1
fin
test mmio_movsx16_\r
mov $MMIO_OFF+0x200, %ebx
rex2_rm 0xbf, %\r, 6, %rbx, 0, 1
fin
test mmio_add_to_\r
mov $MMIO_OFF+0x200, %ebx
rex2_rm 0x03, %\r, 8, %rbx
fin
test mmio_or_from_\r
mov $MMIO_OFF+0x200, %ebx
rex2_rm 0x09, %\r, 8, %rbx, 0
fin
test mmio_cmp_\r
mov $MMIO_OFF+0x200, %ebx
rex2_rm 0x39, %\r, 0x10, %rbx
fin
test mmio_index_\r
movabsq_i 0x20, %\r
mov $MMIO_OFF+0x200, %ebx
rex2_rmx 0x89, %rcx, 8, %rbx, %\r, 2
fin
test mmio_imm_\r
movabsq_i MMIO_OFF+0x200, %\r
rex2_xm 0xc7, 0, 0x18, %\r, 1, 0
.long 0x89abcdef
fin
test mmio_cmpxchg_\r
mov $MMIO_OFF+0x200, %ebx
rex2_rm 0xb1, %\r, 8, %rbx, 1, 1
fin
.endm
.irp r, r16,r23,r24,r31
t_system \r
.endr
# Rows of legacy map 0 and 1 that stay legal: string I/O, PUSHF, LAHF, XLAT, CPUID ...
test outs_rex2
mov $0x10, %edx
point_si
.byte 0xd5, 0x7f, 0x6e
fin
test ins_rex2
mov $0x11, %edx
point_di
.byte 0xd5, 0x70, 0x6c
fin
test rep_outs_rex2
mov $0x10, %edx
mov $3, %ecx
point_si
.byte 0xf3, 0xd5, 0x00, 0x6e
fin
test lahf_rex2
.byte 0xd5, 0x00, 0x9f
fin
test xlat_rex2
point_b
.byte 0xd5, 0x10, 0xd7
fin
test cpuid_rex2
xor %eax, %eax
.byte 0xd5, 0x80, 0xa2
fin
test nop_rex2
.byte 0xd5, 0x00, 0x90
fin
test pause_rex2
.byte 0xf3, 0xd5, 0x00, 0x90
fin
test cqo_rex2
.byte 0xd5, 0x08, 0x99
fin
test byte_registers_rex2                # 4-7 are SPL, BPL, SIL, DIL
.byte 0xd5, 0x00, 0x88, 0xe6
fin
test prefix_66_w                        # W goes before 66H
.byte 0x66, 0xd5, 0x58, 0x01, 0xc8
fin
test prefix_67
movabsq_i (DS_OFF+0x140)|(0x1234<<32), %r20
.byte 0x67
movq_load 8, %r20, %rcx
fin
test prefix_gs
movabsq_i 0x40, %r20
.byte 0x65
movq_load 8, %r20, %rcx
fin
test rex_before_prefix                  # a REX that is not next to REX2 is ignored
.byte 0x48, 0x66, 0xd5, 0x10, 0x89, 0xc0
fin
test pushp_16
.byte 0x66, 0xd5, 0x18, 0x50
fin
test push_16
.byte 0x66, 0xd5, 0x10, 0x50
fin
test jmpabs_payload                     # R, X and B are ignored
.byte 0xd5, 0x77, 0xa1
.quad 1f
ud2
1: fin
test jmpabs_noncanonical
jmpabs_i 0x800000000000
fin
.irp p, 67,f2,f3,f0
test jmpabs_\p\()_ud
.byte 0x\p, 0xd5, 0, 0xa1
.quad 1f
1: fin
.endr
test fifteen_bytes
.byte 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0xd5, 0x58, 0x01, 0xc8
fin
test sixteen_bytes_gp
.byte 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0xd5, 0x58, 0x01, 0xc8
fin
# Opcode rows that REX2 may not have: map 0 4x 7x Ax Ex, map 1 3x 8x.
.macro t_row0 o
test row0_\o\()_ud
.byte 0xd5, 0x00, 0x\o, 0, 0, 0, 0
fin
.endm
.irp o, 40,4f,70,74,7f,a0,a2,a3,a4,a8,aa,ac,af,e0,e3,e4,e6,e8,e9,eb,ec,ee,ef,0f,26,2e,36,3e,62,64,65,66,67,c4,c5,f0,f2,f3
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
