"""Recurrent layers: packed, dense and padded sequences; LSTM, GRU and Elman; both directions; single steps; and what
torch has no layer for, beside the loop that a user would write."""

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


def projected(name: str, steps: int, batch: int, features: int, hidden: int, projection: int) -> Case:
    """An LSTM with a projection, which torch runs step by step."""
    shapes = {
        "w_ih": (4 * hidden, features), "w_hh": (4 * hidden, projection), "b_ih": (4 * hidden,), "b_hh": (4 * hidden,),
        "w_hr": (projection, hidden),
    }  # fmt: skip

    def theirs(input: Tensor, **weights: Tensor) -> Tensor:
        state = (input.new_zeros(1, batch, projection), input.new_zeros(1, batch, hidden))
        output: Tensor = torch._VF.lstm(input, state, list(weights.values()), True, 1, 0.0, True, False, False)[0]  # type: ignore[attr-defined]
        return output

    products = 2.0 * steps * batch * (4 * hidden * (features + projection) + hidden * projection)
    words = f"lstm with projection T{steps} B{batch} {features} -> {hidden} -> {projection}"
    return _of_weights(name, words, steps, batch, features, projection, hidden, shapes, products, F.lstm, theirs)


def _of_weights(
    name: str,
    words: str,
    steps: int,
    batch: int,
    features: int,
    width: int,
    hidden: int,
    shapes: dict[str, tuple[int, ...]],
    products: float,
    function: Any,
    theirs: Any,
    **options: Any,
) -> Case:
    """A dense layer with weights of these shapes, in this order."""
    bound = 1 / math.sqrt(hidden)

    def make(generator: torch.Generator) -> Inputs:
        found = {"input": torch.randn(steps, batch, features, generator=generator)}
        for key, shape in shapes.items():
            found[key] = torch.empty(shape).uniform_(-bound, bound, generator=generator)
            if key.startswith("gain"):
                found[key] += 1
        return found

    def ours(input: Tensor, **weights: Tensor) -> Tensor:
        output: Tensor = function(input, None, list(weights.values()), **options)[0]
        return output

    count = sum(math.prod(shape) for shape in shapes.values())
    in_count, out_count = steps * batch * features, steps * batch * width
    return Case(
        family="recurrent",
        name=name,
        shapes=words,
        make=make,
        ours=ours,
        torch=theirs,
        forward=Cost(products, in_count + count + out_count),
        backward=Cost(2 * products, 2 * in_count + 2 * out_count + 2 * count),
        gradients=("input", *shapes),
        tolerance=lambda dtype: Tolerance(),
    )


def beyond_torch(name: str, kind: str, steps: int, batch: int, features: int, hidden: int) -> Case:
    """What torch has no layer for: an LSTM with peepholes or normalised, a Jordan network; beside a loop of torch."""
    gates = 1 if kind == "jordan" else 4
    width = hidden
    shapes: dict[str, tuple[int, ...]] = {
        "w_ih": (gates * hidden, features), "w_hh": (gates * hidden, width), "b_ih": (gates * hidden,),
        "b_hh": (gates * hidden,),
    }  # fmt: skip
    options: dict[str, Any] = {}
    if kind == "jordan":
        shapes |= {"w_ho": (width, hidden), "b_ho": (width,)}
    elif kind == "layer norm":
        shapes |= {"gain_ih": (4 * hidden,), "gain_hh": (4 * hidden,), "gain_c": (hidden,), "bias_c": (hidden,)}
        options = {"layer_norm": True}
    else:
        shapes["w_ch"] = (3 * hidden,) if kind == "diagonal" else (4 * hidden, hidden)
        options = {"peephole": kind}
    products = 2.0 * steps * batch * gates * hidden * (features + width)
    products += 2.0 * steps * batch * hidden * width * {"jordan": 1, "full": 4}.get(kind, 0)

    def theirs(input: Tensor, **weights: Tensor) -> Tensor:
        return _jordan_loop(input, weights) if kind == "jordan" else _lstm_loop(kind, input, weights)

    words = f"{'jordan' if kind == 'jordan' else 'lstm, ' + kind} T{steps} B{batch} {features} -> {hidden}"
    function = F.jordan if kind == "jordan" else F.lstm
    form = name, words, steps, batch, features, width, hidden, shapes, products
    return _of_weights(*form, function, theirs, **options)


def _lstm_loop(kind: str, input: Tensor, w: dict[str, Tensor]) -> Tensor:
    """A careful loop: the input's part of all steps at once, then one product a step."""
    linear, norm = torch.nn.functional.linear, torch.nn.functional.layer_norm
    normal = kind == "layer norm"
    hidden = w["w_ih"].shape[0] // 4
    h = c = input.new_zeros(input.shape[1], hidden)
    gates = linear(input, w["w_ih"], None if normal else w["b_ih"])
    if normal:
        gates = norm(gates, gates.shape[-1:], w["gain_ih"], w["b_ih"])
    p_i, p_f, p_o = w["w_ch"].chunk(3) if kind == "diagonal" else (None, None, None)
    outputs = []
    for of_input in gates.unbind():
        recurrent = linear(h, w["w_hh"], None if normal else w["b_hh"])
        if normal:
            recurrent = norm(recurrent, recurrent.shape[-1:], w["gain_hh"], w["b_hh"])
        elif kind == "full":
            recurrent = recurrent + linear(c, w["w_ch"])
        i, f, g, o = (of_input + recurrent).chunk(4, 1)
        if p_i is not None:
            i, f = i + p_i * c, f + p_f * c
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        if p_o is not None:
            o = o + p_o * c
        h = o.sigmoid() * (norm(c, c.shape[-1:], w["gain_c"], w["bias_c"]) if normal else c).tanh()
        outputs.append(h)
    return torch.stack(outputs)


def _jordan_loop(input: Tensor, w: dict[str, Tensor]) -> Tensor:
    linear = torch.nn.functional.linear
    y = input.new_zeros(input.shape[1], w["w_ho"].shape[0])
    outputs = []
    for of_input in linear(input, w["w_ih"], w["b_ih"]).unbind():
        y = linear((of_input + linear(y, w["w_hh"], w["b_hh"])).tanh(), w["w_ho"], w["b_ho"])
        outputs.append(y)
    return torch.stack(outputs)


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
    recurrent("bilstm_packed_long_256", "lstm", 200, 32, 256, 256, directions=2, sequences="packed"),
    recurrent("bigru_packed_128", "gru", 100, 32, 128, 128, directions=2, sequences="packed"),
    recurrent("bielman_packed_128", "rnn_tanh", 100, 32, 128, 128, directions=2, sequences="packed"),
    # all of one length: language models, frames
    recurrent("lstm_dense_256", "lstm", 100, 16, 256, 256, dtypes=BOTH),
    recurrent("bilstm_dense_256", "lstm", 50, 16, 256, 256, directions=2),
    recurrent("gru_dense_128", "gru", 100, 32, 128, 128, dtypes=BOTH),
    recurrent("gru_dense_256", "gru", 50, 16, 256, 256),
    recurrent("lstm_dense_128", "lstm", 50, 32, 128, 128, dtypes=BOTH),
    recurrent("elman_dense_128", "rnn_tanh", 100, 32, 128, 128, dtypes=BOTH),
    recurrent("elman_dense_256", "rnn_tanh", 200, 32, 256, 256),
    # beyond torch's fused layers
    projected("lstm_projection_128", 100, 32, 128, 128, 64),
    beyond_torch("lstm_peephole_128", "diagonal", 100, 32, 128, 128),
    beyond_torch("lstm_full_peephole_128", "full", 100, 32, 128, 128),
    beyond_torch("lstm_layer_norm_128", "layer norm", 100, 32, 128, 128),
    beyond_torch("jordan_128", "jordan", 100, 32, 128, 128),
    # small and odd: hidden units that fill no vector, one sequence, one feature
    recurrent("lstm_odd_100", "lstm", 60, 20, 50, 100),
    recurrent("lstm_single_128", "lstm", 100, 1, 128, 128),
    recurrent("lstm_one_feature_64", "lstm", 200, 32, 1, 64),
    # long sequences on a GPU: recurrent weights that stay in a block, a cluster, the whole device
    *(
        recurrent(f"{name}_b{batch}", cell, 512, batch, hidden, hidden, dtypes=("bf16",), devices=("cuda",))
        for name, cell, hidden in (
            ("lstm_long_128", "lstm", 128),
            ("lstm_long_256", "lstm", 256),
            ("lstm_long_512", "lstm", 512),
            ("lstm_long_1024", "lstm", 1024),
            ("gru_long_512", "gru", 512),
            ("elman_long_512", "rnn_tanh", 512),
        )
        for batch in (16, 64, 128)
    ),
    *(
        recurrent(
            f"bilstm_long_{hidden}_packed",
            "lstm",
            512,
            64,
            hidden,
            hidden,
            directions=2,
            sequences="packed",
            dtypes=("bf16",),
            devices=("cuda",),
        )
        for hidden in (256, 1024)
    ),
    # single steps
    cell_step("lstm_cell_b32_256", 32, 256, 256, dtypes=BOTH),
    cell_step("lstm_cell_b1_128", 1, 128, 128, dtypes=BOTH),
    cell_step("lstm_cell_b1_256", 1, 256, 256),
    cell_step("lstm_cell_b1_512", 1, 512, 512, dtypes=BOTH),
]
