# PAE paging: the four page-directory-pointer entries are registers, loaded by MOV to CR3 and some changes of CR0 and CR4.
.include "common.inc"
.set pdpt, CR3_VALUE
.set alias, 0x40000000	# what the second entry maps

.macro flat
mov $SEL_FLAT, %eax
mov %eax, %fs
.endm
# The second entry becomes a copy of the first.
.macro second_entry at=pdpt
mov %fs:pdpt, %eax
mov %eax, %fs:(\at+8)
.endm
.macro reload
mov %cr3, %ecx
mov %ecx, %cr3
.endm

test same_cr3
flat
second_entry
reload
mov %fs:(alias+DATA_LINEAR+0x20), %edx
fin
test same_cr3_store
flat
second_entry
reload
mov %esi, %fs:(alias+DATA_LINEAR+0x24)
fin
test entry_removed
flat
second_entry
reload
mov %fs:(alias+DATA_LINEAR+0x28), %edx
movl $0, %fs:(pdpt+8)
reload
mov %fs:(alias+DATA_LINEAR+0x2c), %ebx
fin
test other_cr3
flat
mov %fs:pdpt, %eax
mov %eax, %fs:(pdpt+0x20)
mov %eax, %fs:(pdpt+0x38)
mov $(pdpt+0x20), %eax
mov %eax, %cr3
mov %fs:(0xc0000000+DATA_LINEAR+0x30), %edx
fin
test shown_at_exits
flat
second_entry
reload
out %al, $0x10
movl $0, %fs:(pdpt+8)
reload
out %al, $0x11
in $0x12, %al
fin
test by_pge
flat
second_entry
mov %cr4, %ecx
xor $0x80, %ecx
mov %ecx, %cr4
mov %fs:(alias+DATA_LINEAR+0x34), %edx
fin
test by_paging_off_and_on
flat
second_entry
mov %cr0, %ecx
btr $31, %ecx
mov %ecx, %cr0
bts $31, %ecx
mov %ecx, %cr0
mov %fs:(alias+DATA_LINEAR+0x38), %edx
fin
test no_entry
flat
mov %fs:(alias+DATA_LINEAR), %edx
fin
