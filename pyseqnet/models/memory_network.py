"""The end-to-end memory network: a question reads a story, one sentence a vector, several times.

Sukhbaatar, Szlam, Weston, Fergus: End-to-end memory networks, 2015.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyseqnet import functional

DEVIATION = 0.1  # of all embeddings at the start, as in the paper


class MemoryNetwork(torch.nn.Module):
    """Answers a question from a memory of sentences.

    Each hop reads the memory by attention: u ← u + sum_i softmax_i(u . m_i) c_i. Hop k's output vectors c are hop k+1's
    keys m ("adjacent" tying), the first keys embed the question, the last output vectors score the answers. A sentence
    is the sum of its words' vectors, each weighted by its place in the sentence (position encoding), plus a vector for
    how long ago it was told.

    Shapes of ``forward(story, question, sentences)``: story (B, M, W) int64, the newest sentence first, 0 for padding;
    question (B, W); sentences (B,) int64 on the CPU, how many of the M sentences there are. Output (B, symbols), scores
    before softmax; with ``need_weights=True`` also the reading weights of each hop, (hops, B, M).

    >>> model = MemoryNetwork(30)
    >>> model(torch.ones(2, 5, 4, dtype=torch.int64), torch.ones(2, 4, dtype=torch.int64), torch.tensor([5, 3])).shape
    torch.Size([2, 30])
    """

    def __init__(self, symbols: int, *, embedding: int = 20, hops: int = 3, memories: int = 50) -> None:
        super().__init__()
        if hops < 1:
            raise ValueError(f"hops must be at least 1, got {hops}")
        words = [torch.nn.Embedding(symbols, embedding, 0) for _ in range(hops + 1)]
        times = [torch.nn.Embedding(memories, embedding) for _ in range(hops + 1)]
        self.linear = False  # reads with weights that are not normalised: the paper's "linear start" of a training
        for table in (*words, *times):
            torch.nn.init.normal_(table.weight, std=DEVIATION)
        with torch.no_grad():
            for table in words:
                table.weight[0] = 0
        self.words, self.times = torch.nn.ModuleList(words), torch.nn.ModuleList(times)
        self.memories = memories

    @staticmethod
    def position_weights(words: int, embedding: int) -> Tensor:
        """l[j, k] = (1 - j/J) - (k/d) (1 - 2j/J), counted from 1: the order of the words counts."""
        j = torch.arange(1, words + 1).unsqueeze(1) / words
        k = torch.arange(1, embedding + 1) / embedding
        return (1 - j) - k * (1 - 2 * j)

    def _sentences(self, table: torch.nn.Module, text: Tensor) -> Tensor:
        vectors: Tensor = table(text)
        return (vectors * self.position_weights(vectors.shape[-2], vectors.shape[-1]).to(vectors)).sum(-2)

    def _memory(self, hop: int, story: Tensor) -> Tensor:
        times: Tensor = self.times[hop](torch.arange(story.shape[1], device=story.device))
        return self._sentences(self.words[hop], story) + times

    def forward(
        self, story: Tensor, question: Tensor, sentences: Tensor, *, need_weights: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        if story.shape[1] > self.memories:
            raise ValueError(f"the story has {story.shape[1]} sentences, memories is {self.memories}")
        state = self._sentences(self.words[0], question)
        keys = self._memory(0, story)
        read = []
        for hop in range(1, len(self.words)):
            values = self._memory(hop, story)
            if self.linear:
                told = torch.arange(story.shape[1]) < sentences.unsqueeze(1)
                weights = torch.einsum("be,bme->bm", state, keys) * told
                mixed = torch.einsum("bm,bme->be", weights, values)
            else:
                found, looked = functional.scaled_dot_product_attention(
                    state[:, None, None],
                    keys[:, None],
                    values[:, None],
                    key_lengths=sentences,
                    scale=1.0,
                    return_weights=True,
                )
                mixed, weights = found.flatten(1), looked.flatten(1)
            read.append(weights)
            state, keys = state + mixed, values
        scores = torch.nn.functional.linear(state, self.get_parameter(f"words.{len(self.words) - 1}.weight"))
        return (scores, torch.stack(read)) if need_weights else scores
