# Segment registers: loads and stores, overrides, far control flow, null and bad selectors.
.include "common.inc"
.macro t_get seg
t_get_r \seg, bx
t_get_r \seg, edx
.if BITS == 64
t_get_r \seg, rsi
t_get_r \seg, r9
.endif
test get_mem_\seg
point_b
mov %\seg, (pb)
fin
.endm
.macro t_get_r seg, r
test get_\seg\()_\r
mov %\seg, %\r
fin
.endm
.irp seg, es,cs,ss,ds,fs,gs
t_get \seg
.endr

.macro t_set seg, sel, r
test set_\seg\()_\sel\()_\r
mov $\sel, %\r
mov %\r, %\seg
fin
.endm
.macro t_sets seg
.irp sel, SEL_DS,SEL_ES,SEL_FS,SEL_GS,SEL_SS,SEL_FLAT,SEL_OTHER,SEL_CS
t_set \seg, \sel, cx
.endr
t_set \seg, SEL_ES, eax
.if BITS == 64
t_set \seg, SEL_ES, r10d
.endif
test set_mem_\seg
point_b
movw $SEL_DS, 6(pb)
mov 6(pb), %\seg
fin
test set_random_\seg
mov %si, %\seg
fin
test set_null_\seg
xor %eax, %eax
mov %eax, %\seg
fin
test set_null3_\seg
mov $3, %eax
mov %eax, %\seg
fin
.if REALSEG == 0
.irp sel, SEL_ABSENT,SEL_READONLY,SEL_CONFORMING,SEL_LDT_CODE,SEL_KDATA,SEL_UDATA,SEL_TSS
t_set \seg, \sel, dx
.endr
test set_beyond_\seg
mov $0x800, %edx
mov %edx, %\seg
fin
test null_then_use_\seg
xor %eax, %eax
mov %eax, %\seg
mov %\seg:0x10, %ebx
fin
.endif
test use_\seg
mov $SEL_OTHER, %eax
mov %eax, %\seg
mov %\seg:0x20, %ebx
fin
.endm
.irp seg, es,ds,fs,gs
t_sets \seg
.endr

test set_ss_same
mov %ss, %ax
mov %ax, %ss
nop
fin
test set_ss_shadow
mov $SEL_SS, %ax
mov %ax, %ss
mov $(STACK_OFF-0x40), psp
push pa
fin
test set_ss_null
xor %eax, %eax
mov %eax, %ss
nop
fin
test set_cs_ud
mov $SEL_CS, %eax
.byte 0x8e, 0xc8
fin
test set_sreg6_ud
.byte 0x8e, 0xf0
fin

.macro t_pushpop seg
test push_\seg
push %\seg
fin
test push_pop_\seg
push $SEL_OTHER
pop %\seg
fin
test pop_\seg
push $SEL_ES
pop %\seg
mov %\seg, %dx
fin
.endm
.irp seg, fs,gs
t_pushpop \seg
.endr
.if BITS != 64
.irp seg, ds,es
t_pushpop \seg
.endr
test push_cs
push %cs
fin
test push_pop_ss
push %ss
pop %ss
nop
fin
.endif

# Access through every override.
.macro t_over seg, off
test load_\seg
mov $(\off+0x60), psi
mov %\seg:(psi), %edx
mov %\seg:5(psi), %cl
fin
test store_\seg
mov $(\off+0x60), psi
mov %ecx, %\seg:8(psi)
fin
.if BITS == 16
test over_a32_\seg
mov $(\off+0x60), %esi
mov %\seg:(%esi), %edx
fin
.endif
.endm
t_over ds, DS_OFF
t_over es, ES_OFF
t_over fs, FS_OFF
t_over gs, GS_OFF
t_over ss, STACK_OFF-0x100
.if BITS != 64
t_over cs, 0xA000
test bp_is_ss
mov $(STACK_OFF-0x20), pbp
mov 4(pbp), %eax
mov %edx, 8(pbp)
fin
.macro t_limit seg, last
test limit_in_\seg
mov $\last, pb
mov %\seg:(pb), %al
fin
test limit_out_\seg
mov $(\last+1), pb
mov %\seg:(pb), %al
fin
test limit_cross_\seg
mov $(\last-1), pb
mov %\seg:(pb), %eax
fin
.endm
t_limit ds, 0x7fff
t_limit es, 0x6fff
t_limit fs, 0x5fff
t_limit gs, 0x4fff
.endif

.macro t_lfar op, seg
test \op
point_b
movw $0x1234, 4(pb)
.if BITS == 16
movw $SEL_OTHER, 6(pb)
\op 4(pb), %cx
.else
movw $0xabcd, 6(pb)
movw $SEL_OTHER, 8(pb)
\op 4(pb), %ecx
.endif
mov %\seg, %dx
fin
test \op\()_16
point_b
movw $0x9234, 4(pb)
movw $SEL_OTHER, 6(pb)
\op 4(pb), %di
fin
.endm
t_lfar lfs, fs
t_lfar lgs, gs
.if BITS != 64
t_lfar les, es
t_lfar lds, ds
.endif
test lss
point_b
.if BITS == 16
movw $(STACK_OFF-0x60), 4(pb)
movw $SEL_SS, 6(pb)
lss 4(pb), %sp
.else
movl $(STACK_OFF-0x60), 4(pb)
movw $SEL_SS, 8(pb)
lss 4(pb), %esp
.endif
nop
fin

# Far control flow within this code segment, and to the 32-bit, 16-bit and 64-bit ones.
.if BITS != 64
test far_jmp
ljmp $SEL_CS, $1f
ud2
1: mov %cs, %dx
fin
test far_call
lcall $SEL_CS, $1f
fin
1: mov $0x11, %dl
lret
test far_call_ret_imm
push pa
push pd
lcall $SEL_CS, $1f
fin
1: lret $4
test far_jmp_null
ljmp $0, $1f
1: fin
.if REALSEG == 0
test far_jmp_data
ljmp $SEL_DS, $1f
1: fin
test far_jmp_absent
ljmp $SEL_ABSENT, $1f
1: fin
test far_jmp_conforming
ljmp $SEL_CONFORMING, $1f
1: mov %cs, %dx
fin
.endif
.endif
.if BITS == 16
.macro far_target
movw $1f, (pb)
movw $SEL_CS, 2(pb)
.endm
.else
.macro far_target
movl $1f, (pb)
movw $SEL_CS, 4(pb)
.endm
.endif
test far_jmp_mem
point_b
far_target
ljmp *(pb)
ud2
1: mov %cs, %dx
fin
test far_call_mem
point_b
far_target
lcall *(pb)
fin
1: lret
test far_ret
.if BITS == 64
push $SEL_CS
lea 1f(%rip), %rax
push %rax
lretq
.else
push $SEL_CS
push $1f
lret
.endif
ud2
1: mov $0x12, %dl
fin
test iret_same
.if BITS == 64
mov %rsp, %rbx
push $SEL_SS
push %rbx
push $0x8d7
push $SEL_CS
lea 1f(%rip), %rax
push %rax
iretq
.else
pushf
push $SEL_CS
push $1f
iret
.endif
ud2
1: mov $0x13, %dl
fin
.if REALSEG == 0
.macro t_larlsl op
.irp sel, SEL_CS,SEL_DS,SEL_FLAT,SEL_TSS,SEL_LDT,SEL_ABSENT,SEL_KDATA,SEL_OTHER
t_larlsl_one \op, \sel
.endr
.endm
.macro t_larlsl_one op, sel
test \op\()_\sel
mov $\sel, %ecx
\op %cx, %edx
fin
test \op\()16_\sel
mov $\sel, %ecx
\op %cx, %dx
fin
.endm
.macro t_ver op, sel
test \op\()_\sel
mov $\sel, %esi
\op %si
fin
.endm
.irp sel, SEL_CS,SEL_DS,SEL_READONLY,SEL_KDATA,SEL_TSS,SEL_ABSENT
t_ver verr, \sel
t_ver verw, \sel
.endr
.irp op, lar,lsl
t_larlsl \op
.endr
.endif
.if USER == 0
.if REALSEG == 0
.if BITS == 64
test to_compat
push $SEL_CODE32
lea 1f(%rip), %rax
push %rax
lretq
.code32
1: mov $0x1234, %edx
inc %eax
fin
.code64
.elseif BITS == 32
test to_code16
ljmp $SEL_CODE16, $1f
.code16
1: mov $0x1234, %edx
inc %ax
fin
.code32
.else
test to_code32
ljmp $SEL_CODE32, $1f
.code32
1: mov $0x12345678, %edx
inc %eax
fin
.code16
.endif
.endif
.endif
.if BITS == 64
test syscall
syscall
fin
.else
test push_sreg_o32
.if BITS == 16
pushl %fs
popl %gs
.else
pushw %fs
popw %gs
.endif
fin
.endif
.if REALSEG + USER == 0	# a descriptor whose accessed bit is clear: loading it sets the bit, here and in memory
.macro flat_fs
.if BITS != 64
mov $SEL_FLAT, %eax
mov %eax, %fs
.endif
.endm
.macro at_gdt insn, sel
.if BITS == 64
\insn $~1, GDT_LINEAR+(\sel & ~7)+5
.else
\insn $~1, %fs:GDT_LINEAR+(\sel & ~7)+5
.endif
.endm
.macro t_unaccessed seg
test unaccessed_\seg
flat_fs
at_gdt andb, SEL_ES
mov $SEL_ES, %ecx
mov %ecx, %\seg
fin
.endm
.irp seg, es,ds,gs
t_unaccessed \seg
.endr
test unaccessed_ss
flat_fs
at_gdt andb, SEL_SS
mov $SEL_SS, %ecx
mov %ecx, %ss
fin
test unaccessed_cs
flat_fs
at_gdt andb, SEL_CS
.if BITS == 64
push $SEL_CS
lea 1f(%rip), %rax
push %rax
lretq
.elseif BITS == 32
ljmpl $SEL_CS, $1f
.else
ljmpw $SEL_CS, $1f
.endif
1: fin
.endif
