"""Helpers for training loops."""

from pyseqnet.training.checkpoint import load_checkpoint, random_state, restore_random_state, save_checkpoint
from pyseqnet.training.fit import History, fit
from pyseqnet.training.forcing import ScheduledSampling, teacher_forcing
from pyseqnet.training.guided import guided_attention_loss
from pyseqnet.training.order import batches
from pyseqnet.training.reinforce import reinforce_loss, self_critical_loss, sequence_log_probs
from pyseqnet.training.rewards import chunk_f1, chunks, corpus_bleu, sentence_bleu, sentence_chunk_f1
from pyseqnet.training.truncated import detach, truncated_bptt

__all__ = [
    "History",
    "ScheduledSampling",
    "batches",
    "chunk_f1",
    "chunks",
    "corpus_bleu",
    "detach",
    "fit",
    "guided_attention_loss",
    "load_checkpoint",
    "random_state",
    "reinforce_loss",
    "restore_random_state",
    "save_checkpoint",
    "self_critical_loss",
    "sentence_bleu",
    "sentence_chunk_f1",
    "sequence_log_probs",
    "teacher_forcing",
    "truncated_bptt",
]
