# RFLAGS by itself: single flags, PUSHF/POPF in every size, LAHF/SAHF, interrupt shadow.
.include "common.inc"
.irp op, stc,clc,cmc,std,cld,sti,cli
test \op
\op
fin
test pushf_\op
\op
pushf
pop pa
fin
.endr
test pushf
pushf
fin
test pushfw
pushfw
fin
test lahf
lahf
fin
.macro t_sahf v
test sahf_\v
mov $0x\v, %ah
sahf
fin
.endm
.irp v, 00,01,04,10,40,80,d5,ff,2a
t_sahf \v
.endr
test sahf
sahf
fin
.macro t_popf v
test popf_\v
push $0x\v
popf
fin
test popfw_\v
pushw $0x\v
popfw
fin
.endm
.irp v, 0000,0001,0004,0010,0040,0080,0400,0800,0cd5,3002,4002,7000
t_popf \v
.endr
test sti_nop
sti
nop
fin
test sti_cli
sti
cli
fin
test sti_sti
sti
sti
fin
test cmc_cmc
cmc
cmc
fin
.if BITS != 64
test pushfl
pushfl
fin
.macro t_popfl v
test popfl_\v
pushl $0x\v
popfl
fin
.endm
.irp v, 00200002,00040002,00010002,00020002,00180002,ffc8802a
t_popfl \v
.endr
.else
test popf_id
push $0x200002
popf
pushf
pop %rax
fin
test popf_ac
push $0x40002
popf
fin
test popf_rf
push $0x10002
popf
fin
test popf_vm
push $0x20002
popf
fin
.endif
test toggle_id
pushf
.if BITS == 16
pop %ax
pushfl
pop %eax
xor $0x200000, %eax
push %eax
popfl
.else
pop pa
xor $0x200000, pa
push pa
popf
.endif
fin
