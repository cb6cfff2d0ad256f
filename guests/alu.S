# Arithmetic and logic: every operation in every width, on registers and on memory, and what it does to the flags.
.include "common.inc"

# op S=suffix A=accumulator D=destination S=source
.macro t_binary1 op, s, a, d, c
test \op\()_rr_\s
\op\s %\c, %\d
fin
test \op\()_rm_\s
point_b
\op\s 8(pb), %\d
fin
test \op\()_mr_\s
point_b
\op\s %\c, 0x10(pb)
fin
test \op\()_ri8_\s
\op\s $-3, %\d
fin
test \op\()_ai_\s
\op\s $0x71, %\a
fin
test \op\()_mi_\s
point_b
\op\s $0x5f, 0x18(pb)
fin
test \op\()_same_\s
\op\s %\d, %\d
fin
.endm
.macro t_binary2 op, s, a, d, c
test \op\()_r_\s
\op\s %\d
fin
test \op\()_m_\s
point_b
\op\s 4(pb)
fin
.endm
.macro t_binary3 op, s, a, d, c
test \op\()_1_\s
\op\s %\d
fin
test \op\()_i_\s
\op\s $5, %\d
fin
test \op\()_cl_\s
\op\s %cl, %\d
fin
test \op\()_big_\s
\op\s $0xff, %\d
fin
test \op\()_m_\s
point_b
\op\s $3, 4(pb)
fin
test \op\()_mcl_\s
point_b
\op\s %cl, 4(pb)
fin
.endm
.macro t_binary4 op, s, a, d, c
test \op\()_r_\s
\op\s %\c
fin
test \op\()_m_\s
point_b
\op\s 4(pb)
fin
.endm
.macro t_binary s, a, d, c
.irp op, add,or,adc,sbb,and,sub,xor,cmp
t_binary1 \op, \s, \a, \d, \c
.endr
test test_rr_\s
test\s %\c, %\d
fin
test test_ri_\s
test\s $0x35, %\d
fin
test test_mr_\s
point_b
test\s %\c, (pb)
fin
.irp op, inc,dec,neg,not
t_binary2 \op, \s, \a, \d, \c
.endr
.irp op, shl,shr,sar,rol,ror,rcl,rcr
t_binary3 \op, \s, \a, \d, \c
.endr
.irp op, mul,imul
t_binary4 \op, \s, \a, \d, \c
.endr
test xadd_rr_\s
xadd\s %\c, %\d
fin
test xadd_m_\s
point_b
xadd\s %\c, 4(pb)
fin
test lock_add_\s
point_b
lock add\s %\c, 4(pb)
fin
test lock_xadd_\s
point_b
lock xadd\s %\c, 4(pb)
fin
test cmpxchg_fail_\s
cmpxchg\s %\c, %\d
fin
test cmpxchg_ok_\s
mov %\d, %\a
cmpxchg\s %\c, %\d
fin
test cmpxchg_m_fail_\s
point_b
cmpxchg\s %\c, 4(pb)
fin
test cmpxchg_m_ok_\s
point_b
mov 4(pb), %\a
lock cmpxchg\s %\c, 4(pb)
fin
.endm
t_binary b, al, dl, cl
t_binary w, ax, dx, cx
t_binary l, eax, edx, ecx
.if BITS == 64
t_binary q, rax, rdx, rcx
.endif

# Widths of 16 bits and more.
.macro t_wide1 op, s, a, d, c
test \op\()_i_\s
\op\s $7, %\c, %\d
fin
test \op\()_cl_\s
and $15, %cl	# a count above 16 is undefined
\op\s %cl, %\a, %\d
fin
test \op\()_m_\s
point_b
\op\s $3, %\d, 4(pb)
fin
.endm
.macro t_wide2 op, s, a, d, c
test \op\()_rr_\s
\op\s %\c, %\d
fin
test \op\()_i_\s
\op\s $13, %\d
fin
test \op\()_mi_\s
point_b
\op\s $9, 4(pb)
fin
test \op\()_mr_\s
point_b
mov $77, %\d
\op\s %\d, 4(pb)
fin
test \op\()_mrneg_\s
point_b
mov $-77, %\d
\op\s %\d, 4(pb)
fin
.endm
.macro t_wide3 op, s, a, d, c
test \op\()_\s
\op\s %\c, %\d
fin
test \op\()_m_\s
point_b
\op\s 4(pb), %\d
fin
test \op\()_zero_\s
xor %\c, %\c
\op\s %\c, %\d
fin
.endm
.macro t_wide4 cc, s, a, d, c
test cmov\cc\()_\s
cmov\cc\()\s %\c, %\d
fin
test cmov\cc\()_m_\s
point_b
cmov\cc\()\s 4(pb), %\d
fin
.endm
.macro t_wide s, a, d, c
test imul2_\s
imul\s %\c, %\d
fin
test imul2_m_\s
point_b
imul\s 4(pb), %\d
fin
test imul3_i8_\s
imul\s $-7, %\c, %\d
fin
test imul3_i_\s
imul\s $0x1234, %\c, %\d
fin
.irp op, shld,shrd
t_wide1 \op, \s, \a, \d, \c
.endr
.irp op, bt,bts,btr,btc
t_wide2 \op, \s, \a, \d, \c
.endr
.irp op, bsf,bsr
t_wide3 \op, \s, \a, \d, \c
.endr
.irp cc, o,no,b,ae,e,ne,be,a,s,ns,p,np,l,ge,le,g
t_wide4 \cc, \s, \a, \d, \c
.endr
.endm
t_wide w, ax, dx, cx
t_wide l, eax, edx, ecx
.if BITS == 64
t_wide q, rax, rdx, rcx
.endif

.irp cc, o,no,b,ae,e,ne,be,a,s,ns,p,np,l,ge,le,g
test set\cc\()_r
set\cc %dl
fin
test set\cc\()_m
point_b
set\cc 4(pb)
fin
.endr

# Division: quotients that fit, and #DE.
.irp op, div,idiv
test \op\()_b
mov $0x123, %ax
mov $0x35, %cl
\op\()b %cl
fin
test \op\()_b_overflow
mov $0x7fff, %ax
mov $1, %cl
\op\()b %cl
fin
test \op\()_w
mov $0x12, %dx
mov $0x335, %cx
\op\()w %cx
fin
test \op\()_l
mov $0x12, %edx
mov $0x3350001, %ecx
\op\()l %ecx
fin
test \op\()_l_random
\op\()l %ecx
fin
test \op\()_l_zero
xor %ecx, %ecx
\op\()l %ecx
fin
test \op\()_m
point_b
mov $0, %edx
\op\()l 4(pb)
fin
.if BITS == 64
test \op\()_q
mov $0x12, %edx
mov $0x335000100000000, %rcx
\op\()q %rcx
fin
test \op\()_q_negative
mov $-1, %rdx
mov $-0x12345, %rcx
\op\()q %rcx
fin
test \op\()_q_overflow
mov $-1, %rdx
mov $1, %rcx
\op\()q %rcx
fin
.endif
.endr
test idiv_min_by_minus_one
mov $0x80000000, %eax
cltd
mov $-1, %ecx
idivl %ecx
fin

.macro t_bswap r
test bswap_\r
bswap %\r
fin
.endm
each32 t_bswap
each64 t_bswap
.irp r, cl,ch,dl,dh
test neg_\r
neg %\r
fin
.endr
.if BITS == 64
.irp r, sil,dil,bpl,r8b,r15b
test add_\r
add %al, %\r
fin
.endr
.endif
test cmpxchg8b_fail
point_b
cmpxchg8b (pb)
fin
test cmpxchg8b_ok
point_b
mov (pb), %eax
mov 4(pb), %edx
push pb
lock cmpxchg8b (pb)
fin
.if BITS == 64
test cmpxchg16b_fail
point_b
cmpxchg16b (pb)
fin
test cmpxchg16b_ok
point_b
mov (pb), %rax
mov 8(pb), %rdx
lock cmpxchg16b (pb)
fin
test cmpxchg16b_unaligned
point_b
cmpxchg16b 8(pb)
fin
.else
.irp op, daa,das,aaa,aas
test \op
\op
fin
.endr
test aam
aam
fin
test aam7
aam $7
fin
test aad
aad
fin
test aad16
aad $16
fin
test salc
.byte 0xd6
fin
.endif
test lock_reg_ud
.byte 0xf0, 0x01, 0xc8
fin
test not_lock
point_b
lock notl 4(pb)
lock negb 9(pb)
fin
