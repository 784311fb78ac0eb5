"""Questions about speech: the states of a speech encoder are the memory that a question reads.

Tseng, Shen, Lee, Lee: Towards machine comprehension of spoken content, 2016.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyseqnet.models.question_reader import QuestionReader
from pyseqnet.models.speech_recognizer import SpeechEncoder


class SpokenQuestionAnswerer(torch.nn.Module):
    """Answers written questions about what was said: a `SpeechEncoder` and a `QuestionReader`.

    Shapes of ``forward(frames, spoken, question, lengths)``: frames (B, T, bands) and how many are real, ``spoken``
    (B,); question (B * Q, W) int64, Q for each recording one after the other, and their lengths (B * Q,). Output
    (B * Q, answers), before softmax; with ``need_weights=True`` also where it listened, (B * Q, T').

    >>> model = SpokenQuestionAnswerer(40, 20, 12)
    >>> frames, spoken = torch.zeros(2, 50, 40), torch.tensor([50, 31])
    >>> model(frames, spoken, torch.ones(6, 4, dtype=torch.int64), torch.tensor([4, 4, 3, 2, 4, 1])).shape
    torch.Size([6, 12])
    """

    def __init__(self, bands: int, symbols: int, answers: int, *, width: int = 64) -> None:
        super().__init__()
        self.encoder = SpeechEncoder(bands, width=width)
        self.reader = QuestionReader(symbols, answers, width=2 * width)

    def forward(
        self, frames: Tensor, spoken: Tensor, question: Tensor, lengths: Tensor, *, need_weights: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        states, steps = self.encoder(frames, spoken)
        each = len(question) // len(frames)
        memory, counts = states.repeat_interleave(each, 0), steps.repeat_interleave(each)
        ignored = torch.arange(memory.shape[1]) >= counts.unsqueeze(1)
        answer: Tensor | tuple[Tensor, Tensor] = self.reader(
            memory, question, lengths, ignored, need_weights=need_weights
        )
        return answer
