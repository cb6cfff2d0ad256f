# SVM inside a guest, on the registers that every 64-bit processor has.
.if BITS == 64
.set APX, 0
.include "nested.inc"
.endif
