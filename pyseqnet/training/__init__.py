"""Helpers for training loops."""

from pyseqnet.training.truncated import detach, truncated_bptt

__all__ = ["detach", "truncated_bptt"]
