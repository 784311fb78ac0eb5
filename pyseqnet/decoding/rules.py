"""What every search obeys: where sequences begin and end, how long they may be, what they are worth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyseqnet.decoding.protocol import LogitsHook, Stepper


@dataclass(frozen=True)
class Rules:
    """Checked arguments of `generate`; prompt (B, P), P at least 1."""

    prompt: Tensor
    end: int | None
    padding: int
    max_length: int
    min_length: int
    length_penalty: float
    hooks: Sequence[LogitsHook]

    @property
    def batch(self) -> int:
        return self.prompt.shape[0]

    @property
    def device(self) -> torch.device:
        return self.prompt.device

    @staticmethod
    def score_dtype(logits: Tensor) -> torch.dtype:
        """Sums of log-probabilities are float32 at least."""
        return torch.promote_types(logits.dtype, torch.float32)

    def read_prompt(self, stepper: Stepper, prompt: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Logits (R, V) behind the last token of the prompt (R, P)."""
        for token in prompt.unbind(1):
            logits, state = stepper.step(token, state)
        self._check(logits, prompt.shape[0])
        return logits, state

    def _check(self, logits: Tensor, rows: int) -> None:
        if logits.dim() != 2 or logits.shape[0] != rows or not logits.is_floating_point():
            raise ValueError(f"step must return logits ({rows}, V) of floating point; got {tuple(logits.shape)}")
        if self.end is not None and not 0 <= self.end < logits.shape[1]:
            raise ValueError(f"end must be one of the {logits.shape[1]} tokens; got {self.end}")

    def log_probs(self, logits: Tensor, written: Tensor, position: int) -> Tensor:
        """Normalised (R, V), after the hooks and the rule on the minimum length."""
        for hook in self.hooks:
            logits = hook(logits, written)
        if self.end is not None and position < self.min_length:
            logits = logits.clone()
            logits[:, self.end] = float("-inf")
        return logits.log_softmax(1, dtype=self.score_dtype(logits))

    @staticmethod
    def refuse_nan(chosen: Tensor) -> None:
        """NaN is the largest number to argmax and topk, so that it shows among the chosen."""
        if bool(chosen.isnan().any()):
            raise ValueError("logits hold NaN, or every token is forbidden at some position")

    def penalty(self, lengths: Tensor) -> Tensor:
        """((5 + n) / 6) ** length_penalty (Wu et al., Google's neural machine translation system, 2016)."""
        penalty: Tensor = ((5.0 + lengths) / 6.0) ** self.length_penalty
        return penalty
