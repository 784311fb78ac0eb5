"""torch.utils.flop_counter counts our operations as it counts torch's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from catalog import LAYERS, Layer, floating
from support import normal, run_python
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, flop_registry, sdpa_backward_flop_count

import pyseqnet.functional as F
from pyseqnet import nn


def count(run: Callable[..., Any], *tensors: Tensor) -> tuple[int, int]:
    """Forward, and forward with backward."""
    with FlopCounterMode(display=False) as forward:
        outputs = floating(run(*tensors))
    with FlopCounterMode(display=False) as backward:
        torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])
    return forward.get_total_flops(), backward.get_total_flops()


def leaf(*shape: int) -> Tensor:
    return normal(shape, 0, torch.float32).requires_grad_()


CONVOLUTIONS: list[tuple[str, tuple, tuple, dict]] = [
    ("conv1d", (2, 4, 21), (6, 4, 3), {"stride": 2, "padding": 1}),
    ("conv1d", (2, 4, 21), (6, 2, 3), {"groups": 2}),
    ("conv2d", (2, 4, 9, 10), (6, 4, 3, 2), {"padding": (2, 1), "dilation": (1, 2)}),
    ("conv2d", (2, 4, 9, 10), (4, 1, 3, 3), {"groups": 4, "padding": "same"}),
]


@pytest.mark.parametrize(("name", "x", "w", "options"), CONVOLUTIONS)
def test_convolution(name: str, x: tuple, w: tuple, options: dict) -> None:
    tensors = (leaf(*x), leaf(*w), leaf(w[0]))
    theirs = count(lambda *t: getattr(torch, name)(*t, **options), *tensors)
    assert theirs[0] > 0
    assert theirs[1] > 0
    assert count(lambda *t: getattr(F, name)(*t, **options), *tensors) == theirs
    fused = getattr(F, f"{name}_relu")
    assert count(lambda *t: fused(*t, **options), *tensors) == theirs
    if name == "conv2d":
        assert count(lambda *t: F.conv2d_relu_max_pool2d(*t, **options), *tensors) == theirs
    no_input = (leaf(*x).detach(), *tensors[1:])
    expected = count(lambda *t: getattr(torch, name)(*t, **options), *no_input)
    assert count(lambda *t: getattr(F, name)(*t, **options), *no_input) == expected < theirs


@pytest.mark.parametrize("heads", [4, 2])
@pytest.mark.parametrize("causal", [False, True])
def test_attention(causal: bool, heads: int) -> None:
    q, k, v = leaf(2, 4, 9, 8), leaf(2, heads, 9, 8), leaf(2, heads, 9, 6)
    options = {"is_causal": causal, "enable_gqa": heads != 4}
    with sdpa_kernel(SDPBackend.MATH):  # the fused one of the CPU counts as nothing
        forward, _ = count(lambda *t: torch.nn.functional.scaled_dot_product_attention(*t, **options), q, k, v)
    backward = sdpa_backward_flop_count((2, 4, 9, 6), q.shape, k.shape, v.shape)  # the scores once more
    assert count(lambda *t: F.scaled_dot_product_attention(*t, **options), q, k, v) == (forward, backward)


def test_packed_sequences_count_their_own_pairs() -> None:
    q, k, v = (leaf(10, 2, 8) for _ in range(3))
    cu = torch.tensor([0, 3, 10], dtype=torch.int32)
    forward, backward = count(lambda *t: F.scaled_dot_product_attention(*t, cu_seqlens_q=cu, cu_seqlens_k=cu), q, k, v)
    assert forward == 2 * 2 * (3 * 3 + 7 * 7) * (8 + 8)
    assert backward == 2.5 * forward


def test_additive_and_linear_attention_count_their_formulas() -> None:
    q, k, v, w = leaf(2, 5, 8), leaf(2, 7, 8), leaf(2, 7, 6), leaf(8, 1)

    def plain(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
        return (torch.tanh(q[:, :, None] + k[:, None]) @ w).squeeze(-1).softmax(-1) @ v

    assert count(lambda q, k, v, w: F.additive_attention(q, k, v, w.flatten()), q, k, v, w) == count(plain, q, k, v, w)

    def linear(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return q @ (k.transpose(-1, -2) @ v)

    tensors = (leaf(2, 3, 9, 8), leaf(2, 3, 7, 8), leaf(2, 3, 7, 6))
    options: dict[str, Any] = {"feature_map": "identity", "normalize": False}
    assert count(lambda *t: F.linear_attention(*t, **options), *tensors) == count(linear, *tensors)


TWINS = [layer for layer in LAYERS if layer.twin() is not None and "Attention" not in layer.name]


@pytest.mark.filterwarnings("ignore:enable_nested_tensor", "ignore:LSTM with projections")
@pytest.mark.parametrize("layer", TWINS, ids=lambda layer: layer.name)
def test_layers(layer: Layer) -> None:
    found = []
    for module in (layer.build(), layer.twin()):
        inputs = [x.requires_grad_() for x in layer.inputs()]
        with sdpa_kernel(SDPBackend.MATH), torch.backends.mkldnn.flags(enabled=False):
            module.train()
            found.append(count(lambda *x, m=module: layer.run(m, *x), *inputs))
    if "Transformer" in layer.name:  # attention counts the scores of the backward once more
        assert found[0][0] == found[1][0]
        assert found[0][1] > found[1][1]
    else:
        assert found[0] == found[1]


def test_recurrent_lengths_count_what_is_walked() -> None:
    lstm = nn.LSTM(5, 4)
    x = leaf(6, 3, 5).detach()
    whole, _ = count(lambda x: lstm(x)[0], x)
    short, _ = count(lambda x: lstm(x, lengths=[6, 2, 4])[0], x)
    assert short * 18 == whole * 12


def test_every_operation_with_products_has_a_formula() -> None:
    without = {
        "max_pool_forward", "max_pool_backward", "max_pool_indices", "ctc_loss", "crf_log_likelihood", "crf_gradient",
        "crf_viterbi",
    }  # fmt: skip
    names = {name.removeprefix("pyseqnet::").split(".")[0] for name in torch._C._dispatch_get_all_op_names()
             if name.startswith("pyseqnet::")}  # fmt: skip
    assert names - without == {op._qualified_op_name.removeprefix("pyseqnet::") for op in flop_registry
                               if getattr(op, "_qualified_op_name", "").startswith("pyseqnet::")}  # fmt: skip


@pytest.mark.parametrize("first", ["pyseqnet", "torch.utils.flop_counter"])
def test_in_either_order_of_imports(first: str) -> None:
    second = {"pyseqnet": "torch.utils.flop_counter", "torch.utils.flop_counter": "pyseqnet"}[first]
    result = run_python(
        f"import sys, {first}\n"
        f"assert {first!r} != 'pyseqnet' or 'torch.utils.flop_counter' not in sys.modules\n"
        f"import {second}\n"
        "import torch\n"
        "print(torch.ops.pyseqnet.conv_forward in sys.modules['torch.utils.flop_counter'].flop_registry)"
    )
    assert result.stdout.strip() == "True", result.stderr
