"""From scores to sequences."""

from pyseqnet.decoding.arpa import ArpaLanguageModel
from pyseqnet.decoding.ctc import CtcHypothesis, ctc_align, ctc_beam_search, ctc_collapse, ctc_greedy_search
from pyseqnet.decoding.generate import generate
from pyseqnet.decoding.parallel import LengthPredictor, decode_parallel, truncate_at_end
from pyseqnet.decoding.protocol import Generated, LogitsHook, Stepper, forbid
from pyseqnet.decoding.sampling import keep_top_k, keep_top_p
from pyseqnet.decoding.steppers import RecurrentStepper, TransformerState, TransformerStepper

__all__ = [
    "ArpaLanguageModel",
    "CtcHypothesis",
    "Generated",
    "LengthPredictor",
    "LogitsHook",
    "RecurrentStepper",
    "Stepper",
    "TransformerState",
    "TransformerStepper",
    "ctc_align",
    "ctc_beam_search",
    "ctc_collapse",
    "ctc_greedy_search",
    "decode_parallel",
    "forbid",
    "generate",
    "keep_top_k",
    "keep_top_p",
    "truncate_at_end",
]
