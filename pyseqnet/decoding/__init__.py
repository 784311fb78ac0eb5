"""From scores to sequences."""

from pyseqnet.decoding.ctc import CtcHypothesis, ctc_align, ctc_beam_search, ctc_collapse, ctc_greedy_search

__all__ = ["CtcHypothesis", "ctc_align", "ctc_beam_search", "ctc_collapse", "ctc_greedy_search"]
