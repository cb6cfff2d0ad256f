# A guest that runs a guest by SVM: VMRUN with the block that harness/paths/apx_nested.py puts at VMCB, and back. R16-R31
# are nobody's: what the outer guest has in them the inner one finds, and the other way round.
.if BITS == 64
.include "common.inc"
.set VMCB, DATA_LINEAR+0x5000
.set HSAVE, DATA_LINEAR+0x6000
.include "apx.inc"

.macro look at
mov $(DS_OFF+\at), %ebx
.set .Lat, 0
.irp r, r16,r17,r18,r19,r20,r21,r22,r23,r24,r25,r26,r27,r28,r29,r30,r31
movq_store %\r, .Lat, %rbx
rex2_rr 0xff, %rax, %\r, 0              # INC
.set .Lat, .Lat+8
.endr
.endm
.macro enable_svm
mov $0xc0000080, %ecx
rdmsr
bts $12, %eax
wrmsr
mov $0xc0010117, %ecx
mov $HSAVE, %eax
xor %edx, %edx
wrmsr
.endm
.macro enter
enable_svm
mov $VMCB, %eax
vmrun
.endm

# --- outer guests; the inner ones have the same name
.macro outer name
test \name
enter
look 0x700
fin
.endm
outer vmmcall
outer hlt
outer cpuid
outer ud
outer out
outer mmio
outer xcr0
test twice
enter
look 0x700
mov $VMCB, %eax
mov %rax, %rbp
addq $3, VMCB+0x578                     # RIP past VMMCALL
vmrun
look 0x800
fin
test gif
enter
stgi
look 0x700
clgi
fin
test inner_halts
enter
ud2

# --- inner guests
.macro inner name
.globl i_\name
i_\name:
look 0x600
.endm
inner vmmcall
vmmcall
inner hlt
hlt
inner cpuid
cpuid
inner ud
ud2
inner out
out %eax, $0x99
look 0x680
vmmcall
inner mmio
mov $MMIO_OFF+0x240, %ebx
mov 8(%rbx), %r9
mov %r9, 0x10(%rbx)
vmmcall
inner xcr0
xor %ecx, %ecx
mov $3, %eax
xor %edx, %edx
xsetbv
mov $0x80003, %eax
xsetbv
vmmcall
inner twice
vmmcall
look 0x680
vmmcall
inner gif
vmmcall
inner inner_halts
hlt
.endif
