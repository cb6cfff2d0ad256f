# Code around the end of its 4 GiB: EIP goes from FFFFFFFFH to 0. harness/paths/wrap.py gives CS a base for which the
# label end_NAME is at EIP 0.
.include "common.inc"
.macro end name
.globl end_\name
end_\name:
.endm
.macro mmio
push $SEL_MMIO
pop %ds
mov $(MMIO_OFF+0x340), %ebx
.endm

.macro t_io s, a
test out_imm_\s
out %\a, $0x10
end out_imm_\s
fin
test in_imm_\s
in $0x10, %\a
end in_imm_\s
fin
test out_dx_\s
mov $0x8765, %dx
out %\a, %dx
end out_dx_\s
fin
test in_dx_\s
mov $0x8765, %dx
in %dx, %\a
end in_dx_\s
fin
.endm
t_io b, al
t_io w, ax
t_io l, eax
test outs
point_si
outsl
end outs
fin
test rep_outs
point_si
mov $3, %ecx
rep outsb
end rep_outs
fin
test rep_ins
point_di
mov $3, %ecx
rep insb
end rep_ins
fin
test mmio_load
mmio
mov 8(%ebx), %ecx
end mmio_load
fin
test mmio_store
mmio
mov %ecx, 8(%ebx)
end mmio_store
fin
test mmio_add
mmio
add %ecx, 8(%ebx)
end mmio_add
fin
test mov
mov %ecx, %edx
end mov
fin
test push_pop
push %ecx
pop %edx
end push_pop
fin
test cpuid
xor %eax, %eax
xor %ecx, %ecx
cpuid
end cpuid
fin
test rdmsr
mov $0xc0000080, %ecx
rdmsr
end rdmsr
fin
test mov_from_cr0
mov %cr0, %ecx
end mov_from_cr0
fin
test mov_to_cr0
mov %cr0, %ecx
mov %ecx, %cr0
end mov_to_cr0
fin
test mov_to_cr3
mov %cr3, %ecx
mov %ecx, %cr3
end mov_to_cr3
fin
test mov_from_dr7
mov %dr7, %ecx
end mov_from_dr7
fin
test clts
clts
end clts
fin
test wbinvd
wbinvd
end wbinvd
fin
test int3
int3
end int3
fin
test int80
int $0x80
end int80
fin
test jump_forward
jmp 1f
end jump_forward
nop
1: fin
test jump_back
.byte 0xeb, 1f-.-1
2: fin
1: jmp 2b
end jump_back
nop
fin
test jump_back_across
jmp 1f
2: fin
nop
end jump_back_across
nop
1: jmp 2b
fin
test call_back
jmp 1f
2: ret
end call_back
1: call 2b
fin
test call_at_end
call 1f
end call_at_end
fin
1: ret
test hlt
hlt
end hlt
fin
