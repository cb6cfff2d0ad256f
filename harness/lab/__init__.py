"""The lab: kernels, images and emulators in which a KVM under test runs."""
