# String instructions on RAM: widths, directions, REP, REPNE, address sizes, segment overrides.
.include "common.inc"
.macro t_dir dir, s
.irp op, movs,stos,lods,cmps,scas
t_one \op, \dir, \s
.endr
test repe_cmps_\dir\()_\s
point_si
point_di
mov $6, pc
\dir
repe cmps\s
fin
test repne_cmps_\dir\()_\s
point_si
point_di
mov $6, pc
\dir
repne cmps\s
fin
test repe_cmps_same_\dir\()_\s
.if BITS == 64
mov $(DS_OFF+0x1200), psi
.else
mov $0x1200, psi
.endif
mov $(ES_OFF+0x200), pdi
mov $6, pc
\dir
repe cmps\s
fin
test repne_scas_\dir\()_\s
point_di
mov $5, pc
\dir
repne scas\s
fin
.endm
.macro t_one op, dir, s
test \op\()_\dir\()_\s
point_si
point_di
\dir
\op\s
fin
test rep_\op\()_\dir\()_\s
point_si
point_di
mov $5, pc
\dir
rep \op\s
fin
test rep0_\op\()_\dir\()_\s
point_si
point_di
mov $0, pc
\dir
rep \op\s
fin
.endm
.irp s, b,w,l
t_dir cld, \s
t_dir std, \s
.endr
.if BITS == 64
t_dir cld, q
t_dir std, q
.endif
.macro t_seg seg, off
test movs_\seg
mov $(\off+0x40), psi
point_di
cld
movsb %\seg:(psi), %es:(pdi)
fin
test lods_\seg
mov $(\off+0x48), psi
std
lodsl %\seg:(psi), %eax
fin
.endm
t_seg fs, FS_OFF
t_seg gs, GS_OFF
.if BITS == 64
test movs_a32
mov $(DS_OFF+0x100), %esi
mov $(ES_OFF+0x100), %edi
mov $3, %ecx
cld
rep movsl (%esi), (%edi)
fin
test stos_a32_high
mov $(ES_OFF+0x100), %rdi
bts $40, %rdi
bts $40, %rcx
mov $3, %cl
movzbl %cl, %ecx
cld
rep stosb %al, (%edi)
fin
test movs_overlap
mov $(DS_OFF+0x100), %rsi
lea 1(%rsi), %rdi
mov $9, %ecx
cld
rep movsb
fin
.else
test movs_other_size
.if BITS == 16
mov $0x100, %esi
mov $0x100, %edi
mov $3, %ecx
cld
rep movsl (%esi), (%edi)
.else
mov $0x80100, %esi
mov $0x80100, %edi
mov $0xffff0003, %ecx
cld
rep movsl (%si), (%di)
.endif
fin
.endif
