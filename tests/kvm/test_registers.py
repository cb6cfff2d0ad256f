"""The register suite: every Case of harness.paths on this machine's KVM, beside the reference model."""


def test_registers(register_case, lockstep):
    lockstep(register_case)
