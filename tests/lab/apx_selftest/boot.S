# Multiboot entry in 32-bit mode; maps 1 GiB one to one and goes to 64-bit mode; exception stubs.
	.section .multiboot, "a"
	.align 4
header:
	.long 0x1badb002, 0x00010000, -(0x1badb002 + 0x00010000)
	.long header, __load_start, __load_end, __bss_end, _start

	.text
	.code32
	.globl _start
_start:
	cli
	movl $stack_top, %esp
	movl $pdpt + 3, pml4
	movl $pd + 3, pdpt
	movl $0x83, %eax			# 2 MiB, writable, present
	xorl %ecx, %ecx
1:	movl %eax, pd(,%ecx,8)
	addl $0x200000, %eax
	incl %ecx
	cmpl $512, %ecx
	jne 1b
	movl $pml4, %eax
	movl %eax, %cr3
	movl %cr4, %eax
	orl $0x620, %eax			# PAE, OSFXSR, OSXMMEXCPT
	movl %eax, %cr4
	movl $0xc0000080, %ecx			# EFER.LME
	rdmsr
	orl $0x100, %eax
	wrmsr
	movl %cr0, %eax
	andl $~0xc, %eax			# EM, TS
	orl $0x80010003, %eax			# PG, WP, MP, PE
	movl %eax, %cr0
	lgdt gdt_pointer
	ljmp $8, $start64

	.code64
start64:
	movw $16, %ax
	movw %ax, %ds
	movw %ax, %es
	movw %ax, %ss
	movq $stack_top, %rsp
	xorl %ebp, %ebp
	movq $stubs, %rdi
	call selftest
1:	cli
	hlt
	jmp 1b

# An exception ends try_call(), with the vector as its result.
	.macro STUB vector, has_error
stub_\vector:
	.if \has_error
	popq fault_error(%rip)
	.endif
	movq (%rsp), %rax
	movq %rax, fault_rip(%rip)
	movl $\vector, %eax
	jmp end_of_call
	.endm
	STUB 0, 0
	STUB 6, 0
	STUB 7, 0
	STUB 12, 1
	STUB 13, 1
	STUB 14, 1

	.globl try_call
try_call:
	pushq %rbp
	pushq %rbx
	pushq %r12
	pushq %r13
	pushq %r14
	pushq %r15
	subq $8, %rsp				# align for the call
	movq %rsp, saved_rsp(%rip)
	movq %rdi, %rax
	movq %rsi, %rdi
	call *%rax
	movq $-1, %rax
end_of_call:
	movq saved_rsp(%rip), %rsp
	addq $8, %rsp
	popq %r15
	popq %r14
	popq %r13
	popq %r12
	popq %rbx
	popq %rbp
	ret

	.data
	.align 16
gdt:	.quad 0, 0x00af9a000000ffff, 0x00cf92000000ffff
gdt_pointer:
	.word 23
	.long gdt
	.align 8
stubs:						# vector, address; ends with address 0
	.quad 0, stub_0, 6, stub_6, 7, stub_7, 12, stub_12, 13, stub_13, 14, stub_14, 0, 0
	.globl fault_rip, fault_error
fault_rip:	.quad 0
fault_error:	.quad 0
saved_rsp:	.quad 0

	.bss
	.align 4096
pml4:	.skip 4096
pdpt:	.skip 4096
pd:	.skip 4096
	.skip 65536
stack_top:
	.section .note.GNU-stack, "", @progbits
