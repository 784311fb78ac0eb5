"""Helpers for training loops."""

from pyseqnet.training.checkpoint import load_checkpoint, random_state, restore_random_state, save_checkpoint
from pyseqnet.training.fit import History, fit
from pyseqnet.training.order import batches
from pyseqnet.training.truncated import detach, truncated_bptt

__all__ = [
    "History",
    "batches",
    "detach",
    "fit",
    "load_checkpoint",
    "random_state",
    "restore_random_state",
    "save_checkpoint",
    "truncated_bptt",
]
