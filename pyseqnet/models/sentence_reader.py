"""Finds the sentence that answers a question: each word of the question looks for its like in each sentence.

Weston, Chopra, Bordes: Memory networks, 2015 (a sentence a memory); Hermann et al.: Teaching machines to read and
comprehend, 2015 (an attentive reader); Huang et al., 2013 (words by their letters).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from pyseqnet import functional

SHARPNESS = 10.0  # of a word's attention to the words of a sentence: cosines lie within -1 to 1
START = 10.0  # of the factor of the scores


class SentenceReader(torch.nn.Module):
    """Scores the sentences of a text as answers to a question.

    A word is the mean vector of its letter trigrams: words that were never seen have one, and related forms are alike.
    Each word of the question attends to the words of a sentence and is compared with what it finds; the score is the
    mean of these likenesses, weighted by how telling each word of the question is: softmax of a learned function of its
    vector and its rarity.

    Shapes of ``forward(question, rarity, lengths, sentences, sizes)``: question (P, Q, K), the trigrams of words, 0 for
    padding; rarity (P, Q) float; lengths (P,); sentences (P, S, K) and sizes (P,): P pairs of question and sentence.
    Output (P,); with ``need_weights=True`` also how telling each word is (P, Q).

    >>> reader = SentenceReader(100)
    >>> question, sentences = torch.ones(2, 4, 6, dtype=torch.int64), torch.ones(2, 9, 6, dtype=torch.int64)
    >>> reader(question, torch.zeros(2, 4), torch.tensor([4, 2]), sentences, torch.tensor([9, 5])).shape
    torch.Size([2])
    """

    def __init__(self, trigrams: int, *, width: int = 128) -> None:
        super().__init__()
        self.trigrams = torch.nn.EmbeddingBag(trigrams, width, mode="mean", padding_idx=0)
        self.telling = torch.nn.Linear(width + 1, 1)
        torch.nn.init.zeros_(self.telling.weight)  # at the start all words count alike
        self.factor = torch.nn.Parameter(torch.tensor(START))

    def _vectors(self, letters: Tensor) -> Tensor:
        found: Tensor = self.trigrams(letters.flatten(0, 1)).unflatten(0, letters.shape[:2])
        return found

    def forward(
        self, question: Tensor, rarity: Tensor, lengths: Tensor, sentences: Tensor, sizes: Tensor,
        *, need_weights: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
        asked, told = self._vectors(question), self._vectors(sentences)
        keys = normalize(told, dim=2).unsqueeze(1)
        found: Tensor = functional.scaled_dot_product_attention(
            normalize(asked, dim=2).unsqueeze(1), keys, keys, key_lengths=sizes, scale=SHARPNESS
        ).squeeze(1)
        alike = cosine_similarity(asked, found, dim=2)
        telling = self.telling(torch.cat([asked, rarity.unsqueeze(2)], 2)).squeeze(2)
        padding = torch.arange(question.shape[1]) >= lengths.unsqueeze(1)
        weights = telling.masked_fill(padding, float("-inf")).softmax(1)
        scores: Tensor = self.factor * (weights * alike).sum(1)
        return (scores, weights) if need_weights else scores
