"""The disk, without a guest."""
