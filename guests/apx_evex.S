# Intel APX in EVEX map 4: new data destinations, no-flags forms, zero-upper, conditional compare, test, load, store and
# set, PUSH2 and POP2, promoted BMI; registers R16-R31 and memory; what must be #UD. In other modes 62H is BOUND.
.if BITS == 64
.include "common.inc"
.include "apx.inc"

# An instruction in the four sizes: name, macro, opcode of the byte form (the others: + 1), arguments up to v.
.macro sizes4 name, m, opc, args:vararg
test \name\()_b
\m \opc, \args, w=0
fin
sizes3 \name, \m, \opc+1, \args
.endm
.macro sizes3 name, m, opc, args:vararg
test \name\()_w
\m \opc, \args, w=0, pp=1
fin
test \name\()_l
\m \opc, \args, w=0
fin
test \name\()_q
\m \opc, \args, w=1
fin
.endm

# --- arithmetic and logic: opcode /r in both directions, and with immediates
.macro t_alu name, base, n, nf
sizes4 \name\()_evex, ev_rr, \base, %r17, %r30
sizes4 \name\()_ndd, ev_rr, \base, %r21, %rcx, v=%r29, nd=1
test \name\()_ndd_same
ev_rr \base+3, %r18, %r18, v=%r18, w=0, nd=1
fin
test \name\()_mem
point_b
ev_rm \base+1, %r27, 0x10, %rbx
fin
test \name\()_egpr_base
movabsq_i DS_OFF+0x140, %r28
ev_rm \base+3, %r9, 8, %r28, w=0
fin
test \name\()_ndd_mem
point_b
ev_rm \base+1, %r24, 0x18, %rbx, v=%r19, nd=1, w=0, pp=1
fin
test \name\()_ndd_from_mem
movabsq_i 0x20, %r31
point_b
ev_rmx \base+3, %r16, 8, %rbx, %r31, 2, v=%r22, nd=1
fin
test \name\()_imm8
ev_xr 0x83, \n, %r25
.byte 0xf5
fin
test \name\()_ndd_imm8
ev_xr 0x83, \n, %r26, v=%rdx, nd=1, w=0
.byte 0x7f
fin
test \name\()_imm32
ev_xr 0x81, \n, %r23
.long 0x89abcdef
fin
test \name\()_immb_mem
point_b
ev_xm 0x80, \n, 5, %rbx, w=0
.byte 0x9c
fin
.if \nf
sizes4 \name\()_nf, ev_rr, \base, %r20, %r16, nf=1
test \name\()_ndd_nf
ev_rr \base+1, %r31, %r8, v=%r17, nd=1, nf=1
fin
test \name\()_nf_mem
point_b
ev_rm \base+1, %r29, 0x20, %rbx, nf=1, w=0
fin
.else
test \name\()_nf_ud
ev_rr \base+1, %r20, %r16, nf=1
fin
.endif
.endm
t_alu add, 0x00, 0, 1
t_alu or, 0x08, 1, 1
t_alu adc, 0x10, 2, 0
t_alu sbb, 0x18, 3, 0
t_alu and, 0x20, 4, 1
t_alu sub, 0x28, 5, 1
t_alu xor, 0x30, 6, 1

# --- one operand
.macro t_unary name, opc, n
sizes4 \name\()_evex, ev_xr, \opc, \n, %r19
sizes4 \name\()_ndd, ev_xr, \opc, \n, %r22, v=%r16, nd=1
test \name\()_mem
point_b
ev_xm \opc+1, \n, 0x28, %rbx
fin
test \name\()_ndd_mem
point_b
ev_xm \opc, \n, 0x29, %rbx, v=%r30, nd=1, w=0
fin
test \name\()_nf
ev_xr \opc+1, \n, %r24, nf=1
fin
.endm
t_unary not, 0xf6, 2
t_unary neg, 0xf6, 3
t_unary inc, 0xfe, 0
t_unary dec, 0xfe, 1

.macro t_mul name, n
sizes4 \name\()_evex, ev_xr, 0xf6, \n, %r21
test \name\()_nf
ev_xr 0xf7, \n, %r29, nf=1
fin
test \name\()_mem
point_b
ev_xm 0xf7, \n, 8, %rbx, w=0
fin
.endm
t_mul mul, 4
t_mul imul, 5
.macro t_div name, n
test \name\()_evex
xor %edx, %edx
movabsq_i 0x12345, %r18
ev_xr 0xf7, \n, %r18
fin
test \name\()_nf
xor %edx, %edx
movabsq_i 0x7fffffff, %r25
shr $1, %eax
ev_xr 0xf7, \n, %r25, w=0, nf=1
fin
test \name\()_zero
movabsq_i 0, %r27
ev_xr 0xf7, \n, %r27
fin
.endm
t_div div, 6
t_div idiv, 7
sizes3 imul2, ev_rr, 0xaf, %r17, %r28
sizes3 imul2_ndd, ev_rr, 0xaf, %r20, %r19, v=%r31, nd=1
test imul2_nf
ev_rr 0xaf, %r20, %r19, nf=1
fin
.macro t_imul3 name, zu, no_flags
test \name\()_w
ev_rr 0x69, %r18, %r23, w=0, pp=1, nd=\zu, nf=\no_flags
.word 0x8123
fin
test \name\()_l
ev_rr 0x69, %r18, %r23, w=0, nd=\zu, nf=\no_flags
.long 0x81234567
fin
test \name\()_q_mem
point_b
ev_rm 0x6b, %r18, 0x10, %rbx, nd=\zu, nf=\no_flags
.byte 0x85
fin
test \name\()_w8
ev_rr 0x6b, %r18, %r23, w=0, pp=1, nd=\zu, nf=\no_flags
.byte 0x7b
fin
.endm
t_imul3 imul3, 0, 0
t_imul3 imulzu, 1, 0
t_imul3 imul3_nf, 0, 1

# --- shifts and rotates: by an immediate, by one, by CL
.macro t_shift name, n, nf
sizes4 \name\()_cl, ev_xr, 0xd2, \n, %r26
sizes4 \name\()_one_ndd, ev_xr, 0xd0, \n, %r17, v=%r23, nd=1
test \name\()_imm
ev_xr 0xc1, \n, %r20
.byte 7
fin
test \name\()_imm_zero
ev_xr 0xc1, \n, %r20, w=0
.byte 0
fin
test \name\()_imm_ndd_zero
ev_xr 0xc1, \n, %r20, v=%r21, nd=1, w=0, pp=1
.byte 32
fin
test \name\()_ndd_mem
point_b
ev_xm 0xc1, \n, 0x30, %rbx, v=%r31, nd=1
.byte 0x25
fin
test \name\()_mem
point_b
ev_xm 0xd3, \n, 0x38, %rbx, w=0
fin
test \name\()_nf
ev_xr 0xd3, \n, %r29, nf=1, v=%r30, nd=1
fin
.endm
t_shift rol, 0
t_shift ror, 1
t_shift rcl, 2
t_shift rcr, 3
t_shift shl, 4
t_shift shr, 5
t_shift sar, 7
.macro t_double name, imm, cl
test \name\()_imm
ev_rr \imm, %r17, %r24
.byte 11
fin
test \name\()_cl
ev_rr \cl, %r17, %r24, w=0
fin
test \name\()_ndd
ev_rr \imm, %r17, %r24, v=%r16, nd=1, w=0
.byte 5
fin
test \name\()_ndd_mem_nf
point_b
ev_rm \cl, %r30, 8, %rbx, v=%r19, nd=1, nf=1
fin
test \name\()_mem
point_b
ev_rm \imm, %r22, 0x10, %rbx
.byte 60
fin
.endm
t_double shld, 0x24, 0xa5
t_double shrd, 0x2c, 0xad

# --- ADX, counts, CRC32, MOVBE, BMI
.macro t_adx name, pp
test \name\()_l
ev_rr 0x66, %r16, %r31, w=0, pp=\pp
fin
test \name\()_ndd
ev_rr 0x66, %r16, %r31, v=%r25, nd=1, pp=\pp
fin
test \name\()_ndd_mem
point_b
ev_rm 0x66, %r16, 8, %rbx, v=%r25, nd=1, pp=\pp
fin
.endm
t_adx adcx, 1
t_adx adox, 2
.macro t_count name, opc
sizes3 \name, ev_rr, \opc, %r28, %r17
test \name\()_nf
ev_rr \opc, %r28, %r17, nf=1
fin
test \name\()_mem
point_b
ev_rm \opc, %r28, 0x18, %rbx, w=0, pp=1
fin
.endm
t_count popcnt, 0x88
t_count tzcnt, 0xf4
t_count lzcnt, 0xf5
test crc32_b
ev_rr 0xf0, %r18, %r27, w=0
fin
sizes3 crc32, ev_rr, 0xf1, %r18, %r27
sizes3 movbe_rr, ev_rr, 0x60, %r20, %r26
test movbe_load
point_b
ev_rm 0x60, %r20, 0x10, %rbx
fin
test movbe_store
point_b
ev_rm 0x61, %r20, 0x10, %rbx, w=0, pp=1
fin
.macro t_bmi name, m, pp, opc, nf, reg=%r17, rm=%r24, v=%r31
test \name\()_evex_q
ev_rr \opc, \reg, \rm, v=\v, pp=\pp, m=\m
fin
test \name\()_evex_l
point_b
ev_rm \opc, \reg, 8, %rbx, v=\v, pp=\pp, m=\m, w=0
fin
.if \nf
test \name\()_nf
ev_rr \opc, \reg, \rm, v=\v, pp=\pp, m=\m, nf=1
fin
.else
test \name\()_nf_ud
ev_rr \opc, \reg, \rm, v=\v, pp=\pp, m=\m, nf=1
fin
.endif
.endm
t_bmi andn, 2, 0, 0xf2, 1
t_bmi bextr, 2, 0, 0xf7, 1
t_bmi blsr, 2, 0, 0xf3, 1, %rcx
t_bmi blsmsk, 2, 0, 0xf3, 1, %rdx
t_bmi blsi, 2, 0, 0xf3, 1, %rbx
t_bmi bzhi, 2, 0, 0xf5, 1
t_bmi mulx, 2, 3, 0xf6, 0
t_bmi pdep, 2, 3, 0xf5, 0
t_bmi pext, 2, 2, 0xf5, 0
t_bmi sarx, 2, 2, 0xf7, 0
t_bmi shlx, 2, 1, 0xf7, 0
t_bmi shrx, 2, 3, 0xf7, 0
test rorx_evex
ev_rr 0xf0, %r17, %r24, pp=3, m=3
.byte 13
fin

# --- CCMP and CTEST: every source condition; the default flags differ from what the comparison gives
.macro t_cc n
test ccmp_rr_\n
cc_rr 0x39, \n, 15-\n, %r17, %r26
fin
test ccmp_mem_\n
point_b
cc_rm 0x3b, \n, \n, %r22, 0x10, %rbx, w=0
fin
test ccmp_imm_\n
cc_xr 0x83, \n, \n^5, 7, %r31, w=0, pp=1
.byte 0x80
fin
test ccmp_equal_\n
cc_rr 0x38, \n, 1, %r19, %r19, w=0
fin
test ctest_rr_\n
cc_rr 0x85, \n, 15, %r24, %r16
fin
test ctest_imm_mem_\n
point_b
cc_xm 0xf6, \n, \n^10, 0, 3, %rbx, w=0
.byte 0x55
fin
test ccmp_chain_\n
cmp %rax, %rcx
cc_rr 0x39, \n, 4, %r18, %r19
cc_rr 0x85, \n^1, 2, %r20, %r20
setz %al
fin
.endm
.irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15
t_cc \n
.endr
test ccmp_imm32
cc_xr 0x81, 10, 0, 7, %r30
.long 0x80000001
fin
test ccmp_immb
cc_xr 0x80, 10, 0, 7, %rsi, w=0
.byte 0x40
fin
test ccmp_gb
cc_rr 0x3a, 10, 0, %r29, %rbp, w=0
fin
test ctest_b
cc_rr 0x84, 10, 0, %r29, %rbp, w=0
fin
test ctest_imm32
cc_xr 0xf7, 10, 0, 0, %r21
.long 0x80000000
fin
test ccmpf_pf                           # a false condition: PF is a copy of CF, AF is zero
cc_rr 0x39, 11, 1, %r21, %r22
pushf
pop %rdx
and $0x8d5, %edx
fin
test ccmpf_absent                       # and does not keep the fault of its memory operand away
mov $ABSENT_LINEAR, %ebx
cc_rm 0x3b, 11, 0, %r22, 0x10, %rbx
fin

# --- CMOV with a new data destination, CFCMOV, SETZU: every condition
.macro t_cond n
test cmov_ndd_\n
ev_rr 0x40+\n, %r17, %r30, v=%r21, nd=1
fin
test cmov_ndd_mem_w_\n
point_b
ev_rm 0x40+\n, %r17, 8, %rbx, v=%r21, nd=1, w=0, pp=1
fin
test cfcmov_\n
ev_rr 0x40+\n, %r23, %r16
fin
test cfcmov_rev_l_\n
ev_rr 0x40+\n, %r23, %r16, nf=1, w=0
fin
test cfcmov_ndd_\n
ev_rr 0x40+\n, %r23, %r16, v=%r28, nd=1, nf=1, w=0, pp=1
fin
test cfcmov_load_\n
point_b
ev_rm 0x40+\n, %r25, 0x10, %rbx, w=0
fin
test cfcmov_store_\n
point_b
ev_rm 0x40+\n, %r25, 0x10, %rbx, nf=1
fin
test cfcmov_load_absent_\n
mov $ABSENT_LINEAR, %ebx
ev_rm 0x40+\n, %r25, 0, %rbx
fin
test cfcmov_store_readonly_\n
mov $READONLY_LINEAR, %ebx
ev_rm 0x40+\n, %r25, 0, %rbx, nf=1, w=0, pp=1
fin
test set_evex_\n
ev_xr 0x40+\n, 0, %r29, w=0, pp=3
fin
test setzu_\n
ev_xr 0x40+\n, 0, %r29, w=0, pp=3, nd=1
fin
test setzu_mem_\n
point_b
ev_xm 0x40+\n, 0, 0x11, %rbx, w=0, pp=3, nd=1
fin
.endm
.irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15
t_cond \n
.endr
test cmov_ndd_absent                    # reads its memory whatever the condition
mov $ABSENT_LINEAR, %ebx
stc
ev_rm 0x43, %r17, 0, %rbx, v=%r21, nd=1
fin

# --- PUSH2, POP2: RSP must be a multiple of 16
.macro t_pair a, b
test push2_\a\()_\b
ev_xr 0xff, 6, %\b, v=%\a, nd=1, w=0
fin
test pop2_\a\()_\b
sub $0x40, %rsp
ev_xr 0x8f, 0, %\b, v=%\a, nd=1, w=0
fin
.endm
t_pair r16, r31
t_pair rax, r17
t_pair r30, rdi
t_pair r8, r15
t_pair rbp, r24
test push2_same
ev_xr 0xff, 6, %r19, v=%r19, nd=1, w=0
fin
test push2p_pop2p
ev_xr 0xff, 6, %r20, v=%r21, nd=1, w=1
ev_xr 0x8f, 0, %r22, v=%r23, nd=1, w=1
fin
test push2_odd
sub $8, %rsp
ev_xr 0xff, 6, %r16, v=%r17, nd=1, w=0
fin
test pop2_odd
sub $0x18, %rsp
ev_xr 0x8f, 0, %r16, v=%r17, nd=1, w=0
fin
.if USER
test push2_absent
mov $ABSENT_LINEAR+0x10, %esp
ev_xr 0xff, 6, %r16, v=%r17, nd=1, w=0
fin
.endif
.macro t_ud name, code:vararg
test \name\()_ud
\code
.long 0x90909090, 0x90909090
fin
.endm
t_ud push2_rsp, ev_xr 0xff, 6, %rsp, v=%r17, nd=1, w=0
t_ud push2_v_rsp, ev_xr 0xff, 6, %r16, v=%rsp, nd=1, w=0
t_ud pop2_rsp, ev_xr 0x8f, 0, %rsp, v=%r17, nd=1, w=0
t_ud pop2_same, ev_xr 0x8f, 0, %r17, v=%r17, nd=1, w=0
t_ud push2_nf, ev_xr 0xff, 6, %r16, v=%r17, nd=1, w=0, nf=1
t_ud push2_66, ev_xr 0xff, 6, %r16, v=%r17, nd=1, w=0, pp=1
t_ud push2_nd0, ev_xr 0xff, 6, %r16, nd=0, w=0
t_ud push2_mem, ev_xm 0xff, 6, 0, %rbp, v=%r17, nd=1, w=0
t_ud pop2_nd0, ev_xr 0x8f, 0, %r16, nd=0, w=0

# --- other encodings that must be #UD
t_ud nd_cmp, cc_xr 0x83, 0x14, 0, 7, %r17
t_ud nd_test, cc_rr 0x85, 0x1a, 0, %r16, %r17
t_ud v_without_nd, ev_rr 0x01, %r16, %r17, v=%r18
t_ud nd_mul, ev_xr 0xf7, 4, %r16, v=%r18, nd=1
t_ud nd_popcnt, ev_rr 0x88, %r16, %r17, v=%r18, nd=1
t_ud nd_movbe, ev_rr 0x60, %r16, %r17, v=%r18, nd=1
t_ud nf_movbe, ev_rr 0x60, %r16, %r17, nf=1
t_ud nf_adcx, ev_rr 0x66, %r16, %r17, nf=1, pp=1
t_ud nf_set, ev_xr 0x44, 0, %r16, nf=1, pp=3
t_ud v_set, ev_xr 0x44, 0, %r16, v=%r18, nd=1, pp=3
t_ud v_imulzu, ev_rr 0x6b, %r16, %r17, v=%r18, nd=1
t_ud byte_66, ev_rr 0x00, %r16, %r17, w=0, pp=1
t_ud add_f3, ev_rr 0x01, %r16, %r17, pp=2
t_ud add_f2, ev_rr 0x01, %r16, %r17, pp=3
t_ud mov, ev_rr 0x89, %r16, %r17
t_ud lea, ev_rm 0x8d, %r16, 0, %rbx
t_ud xchg, ev_rr 0x87, %r16, %r17
t_ud call, ev_xr 0xff, 2, %r16
t_ud jmp, ev_xr 0xff, 4, %r16
t_ud push, ev_xr 0xff, 6, %r16, w=0
t_ud fe_2, ev_xr 0xfe, 2, %r16
t_ud crc32_f2, ev_rr 0xf1, %r16, %r17, pp=3
t_ud blsi_nd, ev_rr 0xf3, %rbx, %r17, v=%r18, m=2, nd=1
t_ud rorx_v, ev_rr 0xf0, %r16, %r17, v=%r18, m=3, pp=3
t_ud prefix_66, .byte 0x66, 0x62, 0xfc, 0x7c, 0x08, 0x01, 0xc8
t_ud prefix_f2, .byte 0xf2, 0x62, 0xfc, 0x7c, 0x08, 0x01, 0xc8
t_ud prefix_f3, .byte 0xf3, 0x62, 0xfc, 0x7c, 0x08, 0x01, 0xc8
t_ud prefix_rex, .byte 0x48, 0x62, 0xfc, 0x7c, 0x08, 0x01, 0xc8
t_ud prefix_rex2, .byte 0xd5, 0x00, 0x62, 0xfc, 0x7c, 0x08, 0x01, 0xc8
t_ud prefix_lock, .byte 0xf0, 0x62, 0xf4, 0x7c, 0x08, 0x01, 0x03
t_ud payload_l, .byte 0x62, 0xfc, 0x7c, 0x28, 0x01, 0xc8
t_ud payload_l2, .byte 0x62, 0xfc, 0x7c, 0x48, 0x01, 0xc8
t_ud payload_z, .byte 0x62, 0xfc, 0x7c, 0x88, 0x01, 0xc8
t_ud payload_a0, .byte 0x62, 0xfc, 0x7c, 0x09, 0x01, 0xc8
t_ud payload_a1, .byte 0x62, 0xfc, 0x7c, 0x0a, 0x01, 0xc8
t_ud ccmp_l, .byte 0x62, 0xfc, 0x04, 0x24, 0x39, 0xc8
test prefix_67                          # address size and segment overrides are allowed
movabsq_i (DS_OFF+0x140)|(0xa5a5<<32), %r28
.byte 0x67
ev_rm 0x03, %r9, 8, %r28
fin

# --- memory that is a device
test mmio_ndd_load
mov $MMIO_OFF+0x200, %ebx
ev_rm 0x03, %r17, 8, %rbx, v=%r29, nd=1
fin
test mmio_nf_modify
mov $MMIO_OFF+0x200, %ebx
ev_rm 0x01, %r17, 8, %rbx, nf=1, w=0
fin
test mmio_ccmp
movabsq_i MMIO_OFF+0x200, %r26
cc_rm 0x3b, 10, 0, %r22, 0x10, %r26
fin
test mmio_cfcmov_store
mov $MMIO_OFF+0x200, %ebx
stc
ev_rm 0x42, %r25, 0, %rbx, nf=1
fin
test mmio_cfcmov_none
mov $MMIO_OFF+0x200, %ebx
clc
ev_rm 0x42, %r25, 0, %rbx
fin
.if USER == 0
test xcr0_off_ud
xor %ecx, %ecx
mov $3, %eax
xor %edx, %edx
xsetbv
add3 %r16, %rax, %rdx
fin
test osxsave_off_ud
mov %cr4, %rax
btr $18, %rax
mov %rax, %cr4
cc_rr 0x39, 10, 0, %rax, %rcx
fin
.endif
.else
.include "common.inc"
# Outside 64-bit mode 62H with a memory operand is BOUND.
test bound_in
mov $5, pa
point_b
.if BITS == 16
movl $0x7fff8000, (%bx)
.byte 0x62, 0x07
.else
movl $0x80000000, (%ebx)
movl $0x7fffffff, 4(%ebx)
.byte 0x62, 0x03
.endif
fin
test bound_out
mov $5, pa
point_b
.if BITS == 16
movl $0x00040003, (%bx)
.byte 0x62, 0x07
.else
movl $3, (%ebx)
movl $4, 4(%ebx)
.byte 0x62, 0x03
.endif
fin
.endif
