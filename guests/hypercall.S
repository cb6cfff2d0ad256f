# Hypercalls: numbers, arguments and results are registers, which harness/paths/hypercall.py sets.
.include "common.inc"
test vmmcall
.byte 0x0f, 0x01, 0xd9
fin
test vmcall
.byte 0x0f, 0x01, 0xc1
fin
