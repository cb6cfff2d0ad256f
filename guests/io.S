# Port I/O: widths, immediate and DX, strings with and without REP. Each access is an exit.
.include "common.inc"
.macro t_io s, a
.irp port, 0x10,0xe0
t_io_port \s, \a, \port
.endr
test in_dx_\s
mov $0x1234, %dx
in %dx, %\a
fin
test out_dx_\s
mov $0x8765, %dx
out %\a, %dx
fin
test in_dx_high_\s
or $0x10000, %edx
in %dx, %\a
fin
test out_in_\s
mov $0x3f8, %edx
out %\a, %dx
in %dx, %\a
out %\a, %dx
fin
.endm
.macro t_io_port s, a, port
test in_imm_\port\()_\s
in $\port, %\a
fin
test out_imm_\port\()_\s
out %\a, $\port
fin
.endm
t_io b, al
t_io w, ax
t_io l, eax
.macro t_str s
test ins_\s
mov $0x5678, %dx
point_di
cld
ins\s (%dx), %es:(pdi)
fin
test ins_down_\s
mov $0x5678, %dx
point_di
std
ins\s (%dx), %es:(pdi)
fin
test rep_ins_\s
mov $0x5678, %dx
mov $3, pc
point_di
cld
rep ins\s (%dx), %es:(pdi)
fin
test rep_ins_none_\s
mov $0x5678, %dx
mov $0, pc
point_di
cld
rep ins\s (%dx), %es:(pdi)
fin
test rep_ins_down_\s
mov $0x5678, %dx
mov $3, pc
point_di
std
rep ins\s (%dx), %es:(pdi)
fin
test outs_\s
mov $0x1ce, %dx
point_si
cld
outs\s (psi), (%dx)
fin
test outs_fs_\s
mov $0x1ce, %dx
mov $(FS_OFF+0x80), psi
cld
outs\s %fs:(psi), (%dx)
fin
test rep_outs_\s
mov $0x1ce, %dx
mov $5, pc
point_si
cld
rep outs\s (psi), (%dx)
fin
test rep_outs_down_\s
mov $0x1ce, %dx
mov $4, pc
point_si
std
rep outs\s (psi), (%dx)
fin
.endm
t_str b
t_str w
t_str l
