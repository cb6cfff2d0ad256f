"""kvm-harness: run tiny guests on real KVM and compare every register with an independent model."""

__version__ = "0.1.0"
