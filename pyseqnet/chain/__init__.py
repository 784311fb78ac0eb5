"""What is built on linear chains, in plain torch: posteriors, constraints, losses of margins, HMMs, alignments."""

from pyseqnet.chain.constraints import AllowedTransitions, allowed_transitions
from pyseqnet.chain.hmm import (
    HmmCounts,
    HmmParameters,
    emissions_of_symbols,
    hmm_baum_welch_step,
    hmm_decode,
    hmm_expected_counts,
    hmm_log_likelihood,
    hmm_posteriors,
    scaled_log_likelihoods,
)
from pyseqnet.chain.margin import structured_hinge_loss, structured_perceptron_loss
from pyseqnet.chain.monotonic import chunkwise_alignment, hard_monotonic_alignment, monotonic_alignment
from pyseqnet.chain.posterior import crf_entropy, crf_sample

__all__ = [
    "AllowedTransitions",
    "HmmCounts",
    "HmmParameters",
    "allowed_transitions",
    "chunkwise_alignment",
    "crf_entropy",
    "crf_sample",
    "emissions_of_symbols",
    "hard_monotonic_alignment",
    "hmm_baum_welch_step",
    "hmm_decode",
    "hmm_expected_counts",
    "hmm_log_likelihood",
    "hmm_posteriors",
    "monotonic_alignment",
    "scaled_log_likelihoods",
    "structured_hinge_loss",
    "structured_perceptron_loss",
]
