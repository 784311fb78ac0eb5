"""Benchmarks: ours beside what else computes the same, error and speed in one row (`python -m bench`)."""
