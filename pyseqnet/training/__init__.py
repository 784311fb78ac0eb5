"""Helpers for training loops."""

from pyseqnet.training.fit import History, batches, fit
from pyseqnet.training.truncated import detach, truncated_bptt

__all__ = ["History", "batches", "detach", "fit", "truncated_bptt"]
