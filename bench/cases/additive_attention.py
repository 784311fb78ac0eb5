"""Additive attention: whole sequences, a long source with padding, and a decoder's step."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

import pyseqnet.functional as F
from bench.case import Case, Cost, Inputs, Tolerance

# Operations a tangent, for the costs by formula: a sum, a tanh counted as one, a multiplication and an addition;
# backward makes it again and adds six.
FORWARD_OPERATIONS, BACKWARD_OPERATIONS = 4.0, 10.0


def additive(
    name: str,
    batch: int,
    queries: int,
    keys: int,
    width: int,
    *,
    lengths: bool = False,
    dtypes: tuple[str, ...] = ("f32",),
) -> Case:
    generator = torch.Generator().manual_seed(1)
    length = torch.randint(keys // 4, keys + 1, (batch,), generator=generator) if lengths else None
    pairs = queries * (batch * keys if length is None else int(length.sum().item()))

    def make(generator: torch.Generator) -> Inputs:
        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        inputs = {"query": normal(batch, queries, width), "key": normal(batch, keys, width)}
        inputs["value"], inputs["weight"], inputs["bias"] = normal(batch, keys, width), normal(width), normal(width)
        return inputs

    @functools.cache
    def fixed(device: torch.device) -> Tensor | None:
        return None if length is None else length.to(device)

    def ours(query: Tensor, key: Tensor, value: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        result: Tensor = F.additive_attention(query, key, value, weight, bias=bias, key_lengths=fixed(query.device))
        return result

    def theirs(query: Tensor, key: Tensor, value: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        scores = torch.tanh(query.unsqueeze(2) + key.unsqueeze(1) + bias) @ weight
        visible = fixed(query.device)
        if visible is not None:
            padding = torch.arange(keys, device=query.device) >= visible.unsqueeze(1)
            scores = scores.masked_fill(padding.unsqueeze(1), -torch.inf)
        return torch.softmax(scores, -1) @ value

    tangents, operands = float(pairs * width), batch * (2 * queries + 2 * keys) * width
    words = f"B{batch} L{queries} S{keys} D{width}" + (" key lengths" if lengths else "")
    return Case(
        family="additive_attention",
        name=name,
        shapes=words,
        make=make,
        ours=ours,
        torch=theirs,
        forward=Cost((FORWARD_OPERATIONS + 2) * tangents, operands),
        backward=Cost((BACKWARD_OPERATIONS + 4) * tangents, 2 * operands),
        gradients=("query", "key", "value", "weight", "bias"),
        tolerance=lambda dtype: Tolerance(ulps=16),  # a score is a sum of `width` rounded tangents
        dtypes=dtypes,
    )


CASES = [
    additive("dense_256", 8, 256, 256, 128, dtypes=("f32", "bf16")),
    additive("lengths_512", 16, 64, 512, 128, lengths=True),
    additive("decode_512", 32, 1, 512, 128),
]
