"""What `make sanitize` runs in Python: every CPU kernel of every operation on awkward shapes, forward and backward.

Not a pytest file: it runs under a preloaded AddressSanitizer, where only memory and undefined behaviour are judged,
and a quick look at the result tells that the kernels ran at all.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable, Iterator

import torch

import pyseqnet
import pyseqnet.functional as F
from pyseqnet import _C, nn

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# (input, weight, options): odd extents, remainders of every vector length, empty batch, groups, depthwise
CONVOLUTIONS = [
    ((2, 3, 7, 9), (5, 3, 3, 3), {"padding": 1}),
    ((1, 16, 9, 9), (32, 16, 3, 3), {"padding": 1}),
    ((1, 33, 5, 6), (17, 33, 3, 3), {"padding": 2, "stride": 2, "dilation": 2}),
    ((3, 1, 11, 5), (4, 1, 5, 5), {"padding": 2}),
    ((2, 8, 6, 7), (12, 4, 1, 1), {"groups": 2}),
    ((2, 19, 8, 10), (19, 1, 7, 7), {"padding": 3, "groups": 19}),
    ((0, 3, 7, 9), (5, 3, 3, 3), {}),
    ((2, 21, 50), (21, 1, 31), {"padding": 15, "groups": 21}),
    ((2, 30, 17), (10, 30, 5), {}),
]
POOLS = [
    ((2, 3, 7, 9), (2, 2, 0, 1, True)),
    ((1, 17, 12, 11), (3, 2, 1, 1, False)),
    ((2, 5, 9, 9), (3, 1, 1, 2, False)),
    ((1, 2, 40, 41), (17, 5, 8, 1, True)),
    ((0, 3, 8, 8), (2, 2, 0, 1, False)),
]
# (cell, T, B, I, H, directions, lengths)
RECURRENT = [
    ("lstm", 5, 3, 7, 9, 1, None),
    ("lstm", 6, 4, 17, 33, 2, [6, 1, 3, 5]),
    ("gru", 4, 2, 5, 16, 2, [1, 4]),
    ("rnn", 3, 7, 1, 1, 1, None),
    ("rnn", 2, 70, 19, 40, 2, None),
]
# (B, H, key heads, L, S, D, E, options)
ATTENTION = [
    (2, 2, 2, 5, 7, 9, 11, {}),
    (1, 4, 2, 70, 130, 33, 16, {"is_causal": True, "enable_gqa": True}),
    (2, 1, 1, 1, 65, 64, 64, {"key_lengths": torch.tensor([0, 40])}),
    (1, 2, 2, 19, 19, 1, 1, {"dropout_p": 0.3}),
    (2, 2, 2, 0, 3, 4, 4, {}),
]
# (B, L, S, D, E, lengths)
ADDITIVE = [
    (2, 5, 7, 9, 11, None),
    (1, 70, 130, 33, 16, None),
    (3, 1, 65, 17, 64, torch.tensor([0, 40, 65])),
    (2, 0, 3, 4, 4, None),
]
# (B, H, L, S, D, E, options)
CTC = (  # T B C S from_logits scale: the last goes through the log domain
    (1, 1, 2, 1, True, 1), (20, 3, 33, 7, True, 1), (50, 2, 5, 17, False, 1), (6, 2, 70, 0, True, 1),
    (40, 2, 5, 17, True, 100),
)  # fmt: skip
CRF = (  # B T C scale: the last go through the log domain
    (1, 1, 1, 1), (9, 7, 5, 1), (3, 4, 33, 1), (2, 3, 70, 1), (3, 6, 17, 60),
)  # fmt: skip
LINEAR = [
    (2, 2, 70, 70, 9, 17, {"causal": True}),
    (1, 3, 5, 130, 33, 16, {"feature_map": "relu"}),
    (2, 1, 65, 65, 64, 64, {"key_lengths": torch.tensor([0, 40]), "normalize": False, "feature_map": "identity"}),
    (1, 1, 1, 1, 1, 1, {"causal": True}),
    (2, 2, 70, 70, 9, 17, {"causal": True, "decay": [0.5, 0.9], "feature_map": "exp"}),
    (1, 2, 70, 70, 9, 17, {"causal": True, "decay": 0.9, "cu_seqlens": torch.tensor([0, 65, 65, 70])}),
]


def kernels_of(*operations: str) -> list[str]:
    """Names of the CPU kernels; those for a machine this one is not refuse, which is fine."""
    tables = _C.dispatch_tables()
    return sorted({name for operation in operations for name in tables[operation]["cpu"]})


def convolution(x: torch.Tensor, w: torch.Tensor, options: dict[str, int]) -> list[torch.Tensor]:
    leaves = [t.requires_grad_() for t in (x, w, torch.randn(w.shape[0]).to(x.dtype))]
    y = (F.conv1d if x.dim() == 3 else F.conv2d)(*leaves, **options)
    return [y, *torch.autograd.grad(y, leaves, torch.randn_like(y))]


def pooling(x: torch.Tensor, arguments: tuple[int, int, int, int, bool]) -> list[torch.Tensor]:
    y, _ = F.max_pool2d(x.requires_grad_(), *arguments, return_indices=True)
    return [y, *torch.autograd.grad(y, [x], torch.randn_like(y))]


def fused(x: torch.Tensor, w: torch.Tensor, options: dict[str, int]) -> list[torch.Tensor]:
    leaves = [t.requires_grad_() for t in (x, w, torch.randn(w.shape[0]).to(x.dtype))]
    y = F.conv1d_relu(*leaves, **options) if x.dim() == 3 else F.conv2d_relu_max_pool2d(*leaves, **options)
    return [y, *torch.autograd.grad(y, leaves, torch.randn_like(y))]


def recurrent(case: tuple, dtype: torch.dtype) -> list[torch.Tensor]:
    cell, T, B, features, H, directions, lengths = case
    rows = {"lstm": 4, "gru": 3, "rnn": 1}[cell] * H
    shapes = [(rows, features), (rows, H), (rows,), (rows,)] * directions
    leaves = [torch.randn(shape).to(dtype).requires_grad_() for shape in ((T, B, features), *shapes)]
    function = {"lstm": F.lstm, "gru": F.gru, "rnn": F.rnn}[cell]
    y, _ = function(leaves[0], None, leaves[1:], bidirectional=directions == 2, lengths=lengths)
    return [y, *torch.autograd.grad(y, leaves, torch.randn_like(y))]


def attention(case: tuple, dtype: torch.dtype) -> list[torch.Tensor]:
    B, H, Hk, L, S, D, E, options = case
    leaves = [torch.randn(s).to(dtype).requires_grad_() for s in ((B, H, L, D), (B, Hk, S, D), (B, Hk, S, E))]
    if "is_causal" not in options:
        leaves.append(torch.randn(B, 1, 1, S).to(dtype).requires_grad_())
    y, weights = F.scaled_dot_product_attention(*leaves, **options, return_weights=True)
    return [y, weights, *torch.autograd.grad([y, weights], leaves, [torch.randn_like(y), torch.randn_like(weights)])]


def additive(case: tuple, dtype: torch.dtype) -> list[torch.Tensor]:
    B, L, S, D, E, lengths = case
    leaves = [torch.randn(s).to(dtype).requires_grad_() for s in ((B, L, D), (B, S, D), (B, S, E), (D,), (D,))]
    y, weights = F.additive_attention(*leaves[:4], bias=leaves[4], key_lengths=lengths, return_weights=True)
    return [y, weights, *torch.autograd.grad([y, weights], leaves, [torch.randn_like(y), torch.randn_like(weights)])]


def linear_attention(case: tuple, dtype: torch.dtype) -> list[torch.Tensor]:
    B, H, L, S, D, E, options = case
    leaves = [torch.randn(s).to(dtype).requires_grad_() for s in ((B, H, L, D), (B, H, S, D), (B, H, S, E))]
    y, (state, _) = F.linear_attention(*leaves, **options, return_state=True)
    return [y, state, *torch.autograd.grad([y, state], leaves, [torch.randn_like(y), torch.randn_like(state)])]


def ctc(case: tuple, dtype: torch.dtype) -> list[torch.Tensor]:
    T, B, C, S, from_logits, scale = case
    x = (scale * torch.randn(T, B, C)).to(dtype).requires_grad_()
    targets, counts = torch.randint(1, C, (B, S)), torch.randint(0, S + 1, (B,))
    loss = F.ctc_loss(x, targets, [T] * B, counts, reduction="none", zero_infinity=True, from_logits=from_logits)
    return [loss, *torch.autograd.grad(loss.sum(), x)]


def crf(case: tuple, dtype: torch.dtype) -> list[torch.Tensor]:
    B, T, C, scale = case
    emissions = (scale * torch.randn(B, T, C)).to(dtype).requires_grad_()
    scores = [torch.randn(shape).requires_grad_() for shape in ((C,), (C,), (C, C))]
    mask = torch.arange(T) < torch.randint(1, T + 1, (B, 1))
    llh = F.crf_log_likelihood(emissions, torch.randint(0, C, (B, T)), mask, *scores)
    best = F.crf_decode(emissions, mask, *scores, return_scores=True)[1]
    several = F.crf_decode(emissions, mask, *scores, nbest=min(C, 3), return_scores=True)[1]
    marginals = F.crf_marginals(emissions.detach(), mask, *(score.detach() for score in scores))
    return [llh, best, several, marginals, *torch.autograd.grad(llh.sum(), (emissions, *scores))]


def cases() -> Iterator[tuple[str, Callable[[], list[torch.Tensor]]]]:
    """Each with the beginning of its operations' names."""
    for dtype in DTYPES:
        yield from (("recurrent", functools.partial(recurrent, case, dtype)) for case in RECURRENT)
        yield from (("attention", functools.partial(attention, case, dtype)) for case in ATTENTION)
        yield from (("additive_attention", functools.partial(additive, case, dtype)) for case in ADDITIVE)
        yield from (("linear_attention", functools.partial(linear_attention, case, dtype)) for case in LINEAR)
        yield from (("ctc", functools.partial(ctc, case, dtype)) for case in CTC)
        yield from (("crf", functools.partial(crf, case, dtype)) for case in CRF)
    for dtype, layout in itertools.product(DTYPES, (torch.contiguous_format, torch.channels_last)):

        def tensor(shape: tuple[int, ...], dtype: torch.dtype = dtype, layout: torch.memory_format = layout):
            made = torch.randn(shape).to(dtype)
            return made.contiguous(memory_format=layout) if made.dim() == 4 else made

        for x_shape, w_shape, options in CONVOLUTIONS:
            yield "conv", functools.partial(convolution, tensor(x_shape), tensor(w_shape), options)
            yield "conv_relu_pool", functools.partial(fused, tensor(x_shape), tensor(w_shape), options)
        for shape, arguments in POOLS:
            yield "max_pool", functools.partial(pooling, tensor(shape), arguments)


def run_all(operation: str = "") -> int:
    """Runs every case, or those of an operation's family; the number of those that the pinned kernel took."""
    ran = 0
    for family, case in cases():
        if not operation.startswith(family) and operation:
            continue
        try:
            results = case()
        except RuntimeError as error:
            if "PYSEQNET_FORCE" not in os.environ or "no kernel takes" not in str(error):
                raise
            continue
        if not all(result.isfinite().all() for result in results):
            raise SystemExit(f"{family}: a result is not finite")
        ran += 1
    return ran


def main() -> None:
    torch.manual_seed(0)
    print("loaded:", pyseqnet.__file__, pyseqnet.build_info()["compiler"])
    print("as dispatched:", run_all(), "cases")
    for isa in ("avx2", "portable"):
        os.environ["PYSEQNET_ISA"] = isa
        print(f"at most {isa}:", run_all(), "cases")
    del os.environ["PYSEQNET_ISA"]
    for operation in sorted(_C.dispatch_tables()):
        for name in kernels_of(operation):
            os.environ["PYSEQNET_FORCE"] = f"{operation}:{name}"
            print(f"{operation}:{name}:", run_all(operation), "cases")
    del os.environ["PYSEQNET_FORCE"]
    model = torch.nn.Sequential(nn.Conv2d(1, 8, 3), torch.nn.ReLU(), nn.MaxPool2d(2))
    model(torch.randn(4, 1, 13, 13)).sum().backward()
    print("no fault found")


if __name__ == "__main__":
    main()
