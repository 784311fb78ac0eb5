"""Recurrent layers: packed, dense and padded sequences; LSTM, GRU and Elman; both directions; single steps."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import pyseqnet.functional as F
from bench.case import Case, Cost, Inputs, Rival, Tolerance

GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1}
OURS: dict[str, Any] = {"lstm": F.lstm, "gru": F.gru, "rnn_tanh": F.rnn}
THEIRS: dict[str, Any] = {"lstm": torch._VF.lstm, "gru": torch._VF.gru, "rnn_tanh": torch._VF.rnn_tanh}  # type: ignore[attr-defined]
LENGTH_SEED = 0
WEIGHTS = ("w_ih", "w_hh", "b_ih", "b_hh")


def _lengths(steps: int, batch: int) -> Tensor:
    """Uniform between a quarter of the steps and all of them, longest first; one sequence takes all."""
    generator = torch.Generator().manual_seed(LENGTH_SEED)
    lengths = torch.randint(steps // 4, steps + 1, (batch,), generator=generator)
    lengths[0] = steps
    return lengths.sort(descending=True).values


def _weights(gates: int, features: int, hidden: int, directions: int, generator: torch.Generator) -> Inputs:
    """As torch's layers begin."""
    shapes = ((gates * hidden, features), (gates * hidden, hidden), (gates * hidden,), (gates * hidden,))
    bound = 1 / math.sqrt(hidden)
    return {
        f"{name}_{direction}": torch.empty(shape).uniform_(-bound, bound, generator=generator)
        for direction in range(directions)
        for name, shape in zip(WEIGHTS, shapes, strict=True)
    }


def recurrent(
    name: str,
    cell: str,
    steps: int,
    batch: int,
    features: int,
    hidden: int,
    *,
    directions: int = 1,
    sequences: str = "dense",  # or "packed": a PackedSequence; "padded": (T, B, I) and lengths
    dtypes: tuple[str, ...] = ("f32",),
    devices: tuple[str, ...] = ("cpu", "cuda"),
) -> Case:
    lengths = torch.full((batch,), steps) if sequences == "dense" else _lengths(steps, batch)
    rows, gates = int(lengths.sum()), GATES[cell]
    shape = torch.Size((steps, batch, features))
    batch_sizes = torch.tensor([int((lengths > t).sum()) for t in range(steps)])
    bidirectional = directions == 2

    def make(generator: torch.Generator) -> Inputs:
        x = torch.randn(shape, generator=generator)
        if sequences == "packed":
            x = pack_padded_sequence(x, lengths).data
        return {"input": x, **_weights(gates, features, hidden, directions, generator)}

    def ours(input: Tensor, **weights: Tensor) -> Tensor:
        params, options = list(weights.values()), {"bidirectional": bidirectional}
        if sequences == "packed":
            output: Tensor = OURS[cell](PackedSequence(input, batch_sizes), None, params, **options)[0].data
            return output
        return OURS[cell](input, None, params, lengths=None if sequences == "dense" else lengths, **options)[0]

    def theirs(input: Tensor, **weights: Tensor) -> Tensor:
        zeros = input.new_zeros(directions, batch, hidden)
        state = (zeros, zeros) if cell == "lstm" else zeros
        options = (list(weights.values()), True, 1, 0.0, True, bidirectional)
        if sequences == "dense":
            dense: Tensor = THEIRS[cell](input, state, *options, False)[0]
            return dense
        packed = pack_padded_sequence(input, lengths) if sequences == "padded" else PackedSequence(input, batch_sizes)
        data = THEIRS[cell](packed.data, packed.batch_sizes, state, *options)[0]
        return data if sequences == "packed" else pad_packed_sequence(PackedSequence(data, packed.batch_sizes))[0]

    products = 2.0 * directions * rows * gates * hidden * (features + hidden)
    weight_count = directions * gates * hidden * (features + hidden + 2)
    in_count, out_count = rows * features, rows * directions * hidden
    words = f"{cell} T{steps} B{batch} {features} -> {hidden}" + (" both directions" if bidirectional else "")
    words += "" if sequences == "dense" else f", {sequences}, {rows / (steps * batch):.0%} real"
    return Case(
        family="recurrent",
        name=name,
        shapes=words,
        make=make,
        ours=ours,
        torch=theirs,
        # products alone count as operations; the gates and cell states that a step keeps are not counted as moved
        forward=Cost(products, in_count + weight_count + out_count),
        backward=Cost(2 * products, 2 * in_count + 2 * out_count + 2 * weight_count),
        gradients=("input", *(f"{name}_{direction}" for direction in range(directions) for name in WEIGHTS)),
        tolerance=lambda dtype: Tolerance(),
        user=_pad_and_mask(cell, lengths, steps, directions, hidden) if sequences == "padded" else None,
        dtypes=dtypes,
        devices=devices,
    )


def _pad_and_mask(cell: str, lengths: Tensor, steps: int, directions: int, hidden: int) -> Rival | None:
    """What many write for one direction: run over the padding, then zero what came of it."""
    if directions == 2:
        return None
    real = torch.arange(steps)[:, None, None] < lengths[None, :, None]

    def run(input: Tensor, **weights: Tensor) -> Tensor:
        zeros = input.new_zeros(1, input.shape[1], hidden)
        state = (zeros, zeros) if cell == "lstm" else zeros
        output: Tensor = THEIRS[cell](input, state, list(weights.values()), True, 1, 0.0, True, False, False)[0]
        return output * real.to(output.device)

    return Rival("pad and mask", run)


def cell_step(name: str, batch: int, features: int, hidden: int, *, dtypes: tuple[str, ...] = ("f32",)) -> Case:
    """One step of an LSTM, as a decoder takes it."""

    def make(generator: torch.Generator) -> Inputs:
        x = torch.randn(batch, features, generator=generator)
        h, c = (torch.randn(batch, hidden, generator=generator) for _ in range(2))
        weights = _weights(4, features, hidden, 1, generator)
        return {"input": x, "h": h, "c": c, **{key: weights[f"{key}_0"] for key in WEIGHTS}}

    def ours(input: Tensor, h: Tensor, c: Tensor, **weights: Tensor) -> Tensor:
        output: Tensor = F.lstm_cell(input, (h, c), *weights.values())[0]
        return output

    def theirs(input: Tensor, h: Tensor, c: Tensor, **weights: Tensor) -> Tensor:
        output: Tensor = torch._VF.lstm_cell(input, (h, c), *weights.values())[0]  # type: ignore[attr-defined]
        return output

    products = 8.0 * batch * hidden * (features + hidden)
    weight_count = 4 * hidden * (features + hidden + 2)
    state_count = batch * (features + 4 * hidden)
    return Case(
        family="recurrent",
        name=name,
        shapes=f"one lstm step, B{batch} {features} -> {hidden}",
        make=make,
        ours=ours,
        torch=theirs,
        forward=Cost(products, weight_count + state_count),
        backward=Cost(2 * products, 2 * weight_count + 2 * state_count),
        gradients=("input", "h", "c", *WEIGHTS),
        tolerance=lambda dtype: Tolerance(),
        dtypes=dtypes,
    )


BOTH = ("f32", "bf16")

CASES = [
    # sequences of different lengths: tagging, speech
    recurrent("bilstm_packed_128", "lstm", 100, 32, 128, 128, directions=2, sequences="packed", dtypes=BOTH),
    recurrent("bilstm_padded_128", "lstm", 100, 32, 128, 128, directions=2, sequences="padded"),
    recurrent("lstm_padded_128", "lstm", 100, 32, 128, 128, sequences="padded"),
    recurrent("bilstm_packed_256", "lstm", 50, 32, 256, 256, directions=2, sequences="packed"),
    recurrent("bigru_packed_128", "gru", 100, 32, 128, 128, directions=2, sequences="packed"),
    recurrent("bielman_packed_128", "rnn_tanh", 100, 32, 128, 128, directions=2, sequences="packed"),
    # all of one length: language models, frames
    recurrent("lstm_dense_256", "lstm", 100, 16, 256, 256, dtypes=BOTH),
    recurrent("bilstm_dense_256", "lstm", 50, 16, 256, 256, directions=2),
    recurrent("gru_dense_128", "gru", 100, 32, 128, 128, dtypes=BOTH),
    recurrent("gru_dense_256", "gru", 50, 16, 256, 256),
    recurrent("elman_dense_128", "rnn_tanh", 100, 32, 128, 128, dtypes=BOTH),
    # small and odd: hidden units that fill no vector, one sequence, one feature
    recurrent("lstm_odd_100", "lstm", 60, 20, 50, 100),
    recurrent("lstm_single_128", "lstm", 100, 1, 128, 128),
    recurrent("lstm_one_feature_64", "lstm", 200, 32, 1, 64),
    # single steps
    cell_step("lstm_cell_b32_256", 32, 256, 256, dtypes=BOTH),
    cell_step("lstm_cell_b1_256", 1, 256, 256),
]
