# SVM inside a guest: R16-R31 over VMRUN and #VMEXIT.
.if BITS == 64
.set APX, 1
.include "nested.inc"
.endif
