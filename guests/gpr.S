# Every GPR in every width through the plain data moves: which register, which part of it, what happens to the rest.
.include "common.inc"

.macro t_plain r
test mov_from_\r
mov %\r, %\r
point_b
mov %\r, (pb)
fin
test load_\r
point_b
mov 5(pb), %\r
fin
test xchg_mem_\r
point_b
xchg %\r, 3(pb)
fin
.endm
each t_plain

.macro t_imm8 r
test movi_\r
mov $0xa5, %\r
fin
test xchg_al_\r
xchg %\r, %al
fin
test mov_to_dl_\r
mov %\r, %dl
mov %cl, %\r
fin
test movzx16_\r
movzbw %\r, %dx
fin
test movsx16_\r
movsbw %\r, %cx
fin
test movzx32_\r
movzbl %\r, %esi
fin
test movsx32_\r
movsbl %\r, %edi
fin
.endm
each8 t_imm8

.macro t_imm16 r
test movi_\r
mov $0xa55a, %\r
fin
test mov_cx_\r
mov %\r, %cx
mov %dx, %\r
fin
test xchg_\r
xchg %\r, %ax
xchg %\r, %si
fin
test push_\r
push %\r
fin
test pop_\r
push %dx
pop %\r
fin
test movzx32_\r
movzwl %\r, %edx
fin
test movsx32_\r
movswl %\r, %ecx
fin
test movzxb_\r
point_b
movzbw 1(pb), %\r
fin
test movsxb_\r
point_b
movsbw 2(pb), %\r
fin
test lea_\r
point_b
lea 0x11(pb,psi), %\r
fin
.endm
each16 t_imm16

.macro t_imm32 r
test movi_\r
mov $0xa55a1234, %\r
fin
test mov_ecx_\r
mov %\r, %ecx
mov %edx, %\r
fin
test xchg_\r
xchg %\r, %eax
xchg %\r, %esi
fin
.if BITS != 64
test push_\r
push %\r
fin
test pop_\r
push %edx
pop %\r
fin
.endif
test movzxb_\r
point_b
movzbl 1(pb), %\r
fin
test movsxb_\r
point_b
movsbl 2(pb), %\r
fin
test movzxw_\r
point_b
movzwl 4(pb), %\r
fin
test movsxw_\r
point_b
movswl 6(pb), %\r
fin
test lea_\r
lea 0x1234(%\r,%\r,4), %\r
fin
test base_\r
mov $(DS_OFF+0x140), %\r
mov 4(%\r), %edx
fin
.endm
each32 t_imm32

.macro t_imm64 r
test movi_\r
mov $-0x5aa5edcc, %\r
fin
test movabs_\r
movabs $0xa55a1234deadbeef, %\r
fin
test mov_rcx_\r
mov %\r, %rcx
mov %rdx, %\r
fin
test xchg_\r
xchg %\r, %rax
xchg %\r, %r12
fin
test push_\r
push %\r
fin
test pop_\r
push %rdx
pop %\r
fin
test movsxd_\r
point_b
movslq 4(pb), %\r
fin
test movzxb_\r
point_b
movzbq 1(pb), %\r
fin
test movsxw_\r
point_b
movswq 2(pb), %\r
fin
test lea_\r
lea 0x1234(%rdx,%\r,8), %\r
fin
test lea_rip_\r
lea 0x100(%rip), %\r
fin
test base64_\r
mov $(DS_OFF+0x140), %\r
mov 8(%\r), %rdx
mov %rdx, -8(%\r)
fin
test index_\r
mov $0x20, %\r
mov DS_OFF(,%\r,8), %rcx
fin
.endm
each64 t_imm64

# The stack pointer itself.
test push_sp
push psp
fin
test pop_sp
push $0x1230
pop psp
fin
test mov_from_sp
mov psp, pd
fin
test mov_to_sp
mov $(STACK_OFF-0x80), psp
push pa
fin
test lea_sp
lea -0x20(%esp), %ebp
fin
test push_imm8
push $-5
fin
test push_imm
push $0x1234
fin
test push_mem
point_b
push (pb)
fin
test pop_mem
point_b
push pa
pop 8(pb)
fin
test push_spmem
push -8(%esp)
fin
test pop_spmem
push pa
push pd
pop 4(%esp)
fin
.if BITS != 64
test pusha
pusha
fin
test popa
pusha
mov $0x7777, pa
mov pa, pdi
popa
fin
test pushal
pushal
mov $0, pc
popal
fin
test pusha16
.byte 0x66
pusha
fin
.endif
test enter_leave
enter $0x20, $0
push pa
leave
fin
test enter1
mov psp, pbp
enter $0x20, $1
fin
test moffs_load8
mov DS_OFF+0x110, %al
fin
test moffs_store
.if BITS == 64
movabs %eax, DS_OFF+0x110
movabs DS_OFF+0x118, %rax
.else
mov %eax, DS_OFF+0x110
mov DS_OFF+0x118, %ax
.endif
fin
test cbw
cbtw
fin
test cwde
cwtl
fin
test cwd
cwtd
fin
test cdq
cltd
fin
.if BITS == 64
test cdqe
cltq
fin
test cqo
cqto
fin
test nop_is_no_xchg
xchg %eax, %eax
nop
fin
test mov_ah_to_bh
mov %ah, %bh
mov %ch, %dl
fin
.endif
test xlat
point_b
xlat
fin
.macro t_movbe r
test movbe_load_\r
point_b
movbe 5(pb), %\r
fin
test movbe_store_\r
point_b
movbe %\r, 3(pb)
fin
.endm
.irp r, bx,edx
t_movbe \r
.endr
.if BITS == 64
.irp r, r9w,r10d,rdi,r14
t_movbe \r
.endr
test movbe_load_w66	# REX.W is stronger than 66
point_b
raw 0x66,0x48,0x0f,0x38,0xf0,0x43,0x05
fin
.endif
test ud_movbe_from_reg	# there is no register form
raw 0x0f,0x38,0xf0,0xd3
fin
test ud_movbe_to_reg
raw 0x0f,0x38,0xf1,0xd3
fin
.if BITS == 16	# the stack pointer has 16 bits, whatever is above them
.macro t_high_esp name, code
test high_esp_\name
or $0x5a5a0000, %esp
\code
fin
.endm
t_high_esp push_pop, "push %cx; pop %dx"
t_high_esp pushl_popl, "pushl %ecx; popl %edx"
t_high_esp pusha_popa, "pusha; popa"
t_high_esp push_mem, "point_b; push (pb); pop 2(pb)"
t_high_esp pushf_popf, "pushf; popf"
t_high_esp call_ret, "call 1f; jmp 2f; 1: ret; 2: nop"
t_high_esp enter_leave, "enter $8, $0; leave"
test sp_wraps
mov $0x7fff0000, %esp
push %cx
pop %dx
fin
.endif
