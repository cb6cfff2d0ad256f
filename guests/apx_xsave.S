# XSAVE state component 19 (R16-R31) in all formats, its initial state, and the rules of XCR0[19].
.if BITS == 64
.include "common.inc"
.include "apx.inc"
.set area, DS_OFF+0x400                 # 64-byte aligned; the standard offset of component 19 is 960
.set APX19, 0x80000

# An area with an empty header (XSTATE_BV \bv, XCOMP_BV \comp), EDX:EAX = the mask.
.macro with_area bv=0, comp=0, at=area
mov $\at, %ebx
lea 0x200(%rbx), %rdi
mov $8, %ecx
xor %eax, %eax
cld
rep stosq
mov $\bv, %eax
mov %rax, 0x200(%rbx)
movabs $\comp, %rax
mov %rax, 0x208(%rbx)
.endm
.macro mask low, high=0
mov $\low, %eax
mov $\high, %edx
.endm
.macro clear_egprs
.irp r, r16,r17,r18,r19,r20,r21,r22,r23,r24,r25,r26,r27,r28,r29,r30,r31
rex2_rr 0x31, %\r, %\r, 0
.endr
.endm

test xsave
with_area
mask APX19
xsave (%rbx)
fin
test xsave_keeps_other_bits             # XSTATE_BV of components that are not asked for stays
with_area 7
mask APX19
xsave (%rbx)
fin
test xsave_nothing
with_area 5
mask 0
xsave (%rbx)
fin
test xsave_all
with_area
mask -1, -1
xsave (%rbx)
fin
test xsave64_all_xrstor
with_area
mask -1, -1
xsave64 (%rbx)
clear_egprs
mask -1, -1
xrstor64 (%rbx)
fin
test xsave_xrstor
with_area
mask APX19
xsave (%rbx)
clear_egprs
mask APX19
xrstor (%rbx)
fin
test xsave_of_zeros
with_area
clear_egprs
mask APX19
xsave (%rbx)
movabsq_i 0x1234, %r17
mask APX19
xrstor (%rbx)
fin
test xsave_one_register
with_area
clear_egprs
movabsq_i 0x8000000000000001, %r31
mask APX19
xsave (%rbx)
fin
test xrstor_from_memory                 # what the data area holds
with_area APX19
mask APX19
xrstor (%rbx)
fin
test xrstor_init
with_area 0
mask APX19
xrstor (%rbx)
fin
test xrstor_not_asked                   # the bit in XSTATE_BV alone does nothing
with_area APX19
mask 0
xrstor (%rbx)
fin
test xrstor_init_others
with_area 0
movl $0x1f80, 0x18(%rbx)
mask 6
xrstor (%rbx)
fin
test xrstor_stale                       # XSTATE_BV[19] clear: the old contents of the area do not count
with_area
mask APX19
xsave (%rbx)
movl $0, 0x200(%rbx)
mask APX19
xrstor (%rbx)
fin
test xrstor_bad_bv
with_area 0x100000
mask APX19
xrstor (%rbx)
fin
test xrstor_bad_bv_mpx
with_area 0x18
mask APX19
xrstor (%rbx)
fin
test xrstor_bad_xcomp
with_area APX19, 1
mask APX19
xrstor (%rbx)
fin
test xrstor_bad_reserved
with_area APX19
movl $1, 0x210(%rbx)
mask APX19
xrstor (%rbx)
fin
test xrstor_bad_mxcsr
with_area 0
movl $0x80000000, 0x18(%rbx)
mask 2
xrstor (%rbx)
fin
test xsave_unaligned
with_area
mask APX19
xsave 8(%rbx)
fin
test xrstor_unaligned
with_area
mask APX19
xrstor 32(%rbx)
fin
# The header is there, the end of the component is not: where a fault of the whole area would be is not architectural.
test xsave_absent
with_area at=ABSENT_LINEAR-0x400
mask APX19
xsave (%rbx)
fin
test xsavec_absent
with_area at=ABSENT_LINEAR-0x280
mask APX19
xsavec (%rbx)
fin
test xrstor_absent
with_area APX19, at=ABSENT_LINEAR-0x400
mask APX19
xrstor (%rbx)
fin
test xrstor_init_absent                 # an initial component is not read
with_area 0, at=ABSENT_LINEAR-0x400
mask APX19
xrstor (%rbx)
fin
test xsaveopt
with_area
mask APX19
xsaveopt (%rbx)
fin
test xsaveopt_xrstor
with_area
mask APX19
xsaveopt (%rbx)
clear_egprs
mask APX19
xrstor (%rbx)
fin
test xsavec
with_area
mask APX19
xsavec (%rbx)
fin
test xsavec_xrstor
with_area
mask APX19
xsavec (%rbx)
clear_egprs
mask APX19
xrstor (%rbx)
fin
test xsavec_all
with_area
mask 0x80007
xsavec (%rbx)
clear_egprs
mask APX19
xrstor (%rbx)
fin
test xrstor_compact
with_area APX19, 0x8000000000080000
mask APX19
xrstor (%rbx)
fin
test xrstor_compact_init
with_area 0, 0x8000000000080000
mask APX19
xrstor (%rbx)
fin
test xrstor_compact_after_avx
with_area APX19, 0x8000000000080004
mask APX19
xrstor (%rbx)
fin
test xrstor_compact_bv_outside
with_area APX19, 0x8000000000000007
mask APX19
xrstor (%rbx)
fin
test xrstor_compact_bad_xcomp
with_area APX19, 0x8000000000180000
mask APX19
xrstor (%rbx)
fin
test xsaves
with_area
mask APX19
xsaves (%rbx)
fin
test xsaves_xrstors
with_area
mask APX19
xsaves (%rbx)
clear_egprs
mask APX19
xrstors (%rbx)
fin
test xrstors_standard                   # XRSTORS has the compacted format only
with_area APX19
mask APX19
xrstors (%rbx)
fin

# No member of the family may have a REX2 prefix.
.macro t_no_rex2 name, opc, ext
test rex2_\name\()_ud
with_area
mask APX19
rex2p 1, 0, 0, 0, 3
.byte \opc, (\ext<<3)|3
fin
.endm
t_no_rex2 xsave, 0xae, 4
t_no_rex2 xrstor, 0xae, 5
t_no_rex2 xsaveopt, 0xae, 6
t_no_rex2 xrstors, 0xc7, 3
t_no_rex2 xsavec, 0xc7, 4
t_no_rex2 xsaves, 0xc7, 5
.if USER == 0
.macro xcr0 value
xor %ecx, %ecx
mask \value
xsetbv
.endm
test xcr0_off_xsave                     # without XCR0[19] the component is neither saved nor restored
xcr0 3
with_area
mask APX19
xsave (%rbx)
fin
test xcr0_off_xrstor_gp
xcr0 3
with_area APX19
mask APX19
xrstor (%rbx)
fin
test xcr0_off_on_keeps
xcr0 3
xcr0 0x80003
with_area
mask APX19
xsave (%rbx)
fin
test xcr0_off_save_others_on
xcr0 3
with_area
mask 3
xsave (%rbx)
mask 3
xrstor (%rbx)
xcr0 0x80003
movq_rr %r16, %rax
fin
test xcr0_mpx_gp
xor %ecx, %ecx
mask 0x8001b
xsetbv
fin
test xcr0_mpx_half_gp
xor %ecx, %ecx
mask 0x8000b
xsetbv
fin
test xcr0_apx_alone
xcr0 0x80001
movq_rr %r31, %rax
fin
test xcr0_no_x87_gp
xor %ecx, %ecx
mask 0x80000
xsetbv
fin
test osxsave_off_ud
mov %cr4, %rax
btr $18, %rax
mov %rax, %cr4
with_area
mask APX19
xsave (%rbx)
fin
test ts_nm
with_area
mov %cr0, %rax
bts $3, %rax
mov %rax, %cr0
mask APX19
xsave (%rbx)
fin
test ts_rex2                            # CR0.TS does not guard R16-R31
mov %cr0, %rax
bts $3, %rax
mov %rax, %cr0
movq_rr %r16, %r17
fin
.endif
test xgetbv
xor %ecx, %ecx
xgetbv
fin
test cpuid_component
mov $0xd, %eax
mov $19, %ecx
cpuid
fin
test cpuid_size
mov $0xd, %eax
xor %ecx, %ecx
cpuid
fin
test cpuid_29
mov $0x29, %eax
xor %ecx, %ecx
cpuid
fin
.endif
