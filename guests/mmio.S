# Memory-mapped I/O: every access to the hole is an exit, and KVM's instruction emulator has to name the register.
.include "common.inc"
# The hole through DS (64-bit: flat) with base register \r
.macro mmio_ds
.if BITS != 64
push $SEL_MMIO
pop %ds
.endif
.endm
.macro mmio_es
.if BITS != 64
push $SEL_MMIO
pop %es
.endif
.endm
.macro mmio_b
mmio_ds
mov $(MMIO_OFF+0x340), pb
.endm
.macro mmio_si
mmio_ds
mov $(MMIO_OFF+0x340), psi
.endm

.macro t_every r
test load_\r
mmio_b
mov 8(pb), %\r
fin
test store_\r
mmio_b
mov %\r, 8(pb)
fin
test xchg_\r
mmio_b
xchg %\r, (pb)
fin
test add_\r
mmio_b
add (pb), %\r
fin
.endm
each t_every
.if BITS == 64	# every index register, scaled; and bases that need REX.B
.macro t_sib r
test load_index_\r
mov $0x15, %\r
mov $(MMIO_OFF+0x300), pb
mov 8(pb,%\r,4), %edx
mov %edx, 8(pb,%\r,8)
fin
.endm
.irp r, rax,rcx,rbp,rsi,rdi,r8,r9,r10,r11,r12,r13,r14,r15
t_sib \r
.endr
.macro t_base r
test load_base_\r
mov $(MMIO_OFF+0x340), %\r
mov 8(%\r), %edx
mov %edx, 0x1000(%\r)
fin
.endm
.irp r, rax,rcx,rbp,rsi,rdi,r8,r9,r10,r11,r12,r13,r14,r15
t_base \r
.endr
.endif
.macro t_si r
test load_si_\r
mmio_si
mov (psi), %\r
fin
.endm
.irp r, bl,bh,bx,ebx
t_si \r
.endr
.if BITS == 64
t_si rbx
.endif
.macro t_zx8 r
test movzx8_\r
mmio_b
movzb 1(pb), %\r
fin
test movsx8_\r
mmio_b
movsb 1(pb), %\r
fin
.endm
.macro t_zx16 r
test movzx16_\r
mmio_b
movzw 2(pb), %\r
fin
test movsx16_\r
mmio_b
movsw 2(pb), %\r
fin
.endm
.irp r, ax,cx,dx,bp,si,di
t_zx8 \r
.endr
.irp r, eax,ecx,edx,ebp,esi,edi
t_zx8 \r
t_zx16 \r
.endr
each64 t_zx8
each64 t_zx16

.macro t_w s, a, c
.irp op, add,or,adc,sbb,and,sub,xor,cmp
t_w_op \op, \s, \a, \c
.endr
.irp op, inc,dec,neg,not
t_w_one \op, \s
.endr
.irp op, shl,shr,sar,rol,ror,rcl,rcr
t_w_sh \op, \s
.endr
test movi_\s
mmio_b
mov\s $0x5b, 4(pb)
fin
test testi_\s
mmio_b
test\s $0x5b, 4(pb)
fin
test test_\s
mmio_b
test\s %\a, 4(pb)
fin
test xadd_\s
mmio_b
xadd\s %\c, 4(pb)
fin
test cmpxchg_\s
mmio_b
cmpxchg\s %\c, 4(pb)
fin
test mul_\s
mmio_b
mul\s 4(pb)
fin
test movs_from_\s
mmio_si
point_di
cld
movs\s
fin
test movs_to_\s
point_si
mmio_es
mov $(MMIO_OFF+0x400), pdi
cld
movs\s
fin
test stos_\s
mmio_es
mov $(MMIO_OFF+0x400), pdi
cld
stos\s
fin
test lods_\s
mmio_si
cld
lods\s
fin
test lods_down_\s
mmio_si
std
lods\s
fin
test rep_stos_\s
mmio_es
mov $(MMIO_OFF+0x400), pdi
mov $3, pc
cld
rep stos\s
fin
test rep_movs_from_\s
mmio_si
point_di
mov $3, pc
cld
rep movs\s
fin
test rep_movs_to_\s
point_si
mmio_es
mov $(MMIO_OFF+0x400), pdi
mov $3, pc
cld
rep movs\s
fin
test cmps_\s
mmio_si
point_di
cld
cmps\s
fin
test scas_\s
mmio_es
mov $(MMIO_OFF+0x400), pdi
cld
scas\s
fin
test repe_scas_\s
mmio_es
mov $(MMIO_OFF+0x400), pdi
cld
mov $5, pc
repe scas\s
fin
.endm
.macro t_w_op op, s, a, c
test \op\()_mr_\s
mmio_b
\op\s %\c, 4(pb)
fin
test \op\()_mi_\s
mmio_b
\op\s $0x3c, 4(pb)
fin
.endm
.macro t_w_one op, s
test \op\()_\s
mmio_b
\op\s 4(pb)
fin
.endm
.macro t_w_sh op, s
test \op\()_i_\s
mmio_b
\op\s $3, 4(pb)
fin
test \op\()_cl_\s
mmio_b
\op\s %cl, 4(pb)
fin
.endm
t_w b, al, cl
t_w w, ax, cx
t_w l, eax, ecx
.if BITS == 64
t_w q, rax, rcx
.endif
test push_mem
mmio_b
push 8(pb)
fin
test pop_mem
push pd
mmio_b
pop 8(pb)
fin
test moffs_load
mmio_ds
mov MMIO_OFF+0x20, %al
mov MMIO_OFF+0x24, %eax
fin
test moffs_store
mmio_ds
.if BITS == 64
movabs %eax, MMIO_OFF+0x24
movabs %rax, MMIO_OFF+0x28
.else
mov %eax, MMIO_OFF+0x24
.endif
fin
.if BITS == 16	# the device's answer must be an address in RAM
test jmp_mem
mmio_b
call *(pb)
fin
.endif
test cross_page
mmio_b
mov 0xcbe(pb), %eax
fin
test setcc
mmio_b
setc (pb)
fin
test cmov
mmio_b
cmovz (pb), %edx
fin
test bts_i
mmio_b
btsl $5, (pb)
fin
test lock_or
mmio_b
lock orl $1, (pb)
fin
.macro t_movbe r
test movbe_load_\r
mmio_b
movbe 8(pb), %\r
fin
test movbe_store_\r
mmio_b
movbe %\r, 8(pb)
fin
.endm
.irp r, bx,edx
t_movbe \r
.endr
.if BITS == 64
.irp r, r9w,r10d,rdi,r14
t_movbe \r
.endr
test movbe_store_w66	# REX.W is stronger than 66
mmio_b
raw 0x66,0x48,0x0f,0x38,0xf1,0x43,0x08
fin
.endif
