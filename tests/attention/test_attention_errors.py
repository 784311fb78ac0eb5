"""Bad input of softmax attention is refused in words; raw operations never crash."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import pyseqnet.functional as F
from pyseqnet import masks
from pyseqnet.functional._attention_reference import Extras, Options

ops = torch.ops.pyseqnet
sdpa = torch.nn.functional.scaled_dot_product_attention

# --- errors -------------------------------------------------------------------------------------------------------


def attention_arguments(**changes: Any) -> dict[str, Any]:
    q, k, v = torch.randn(2, 4, 5, 6), torch.randn(2, 4, 7, 6), torch.randn(2, 4, 7, 3)
    return {"query": q, "key": k, "value": v, **changes}


REFUSED: dict[str, dict[str, Any]] = {
    "one dimension": {"query": torch.randn(6)},
    "head dimensions": {"key": torch.randn(2, 4, 7, 5)},
    "heads": {"key": torch.randn(2, 2, 7, 6), "value": torch.randn(2, 2, 7, 3)},
    "heads that do not divide": {"key": torch.randn(2, 3, 7, 6), "value": torch.randn(2, 3, 7, 3), "enable_gqa": True},
    "batches": {"key": torch.randn(3, 4, 7, 6), "value": torch.randn(3, 4, 7, 3)},
    "dtypes": {"key": torch.randn(2, 4, 7, 6).double()},
    "mask dtype": {"attn_mask": torch.ones(5, 7, dtype=torch.int32)},
    "mask of another float": {"attn_mask": torch.ones(5, 7, dtype=torch.float64)},
    "mask shape": {"attn_mask": torch.ones(5, 8, dtype=torch.bool)},
    "mask of one dimension": {"attn_mask": torch.ones(7, dtype=torch.bool)},
    "mask larger than the batch": {"attn_mask": torch.ones(3, 4, 5, 7, dtype=torch.bool)},
    "mask no tensor": {"attn_mask": [1]},
    "dropout": {"dropout_p": 1.5},
    "negative dropout": {"value": torch.randn(2, 4, 7, 6), "dropout_p": -0.5},
    "causal": {"is_causal": 1},
    "scale": {"scale": "a"},
    "query no tensor": {"query": 3},
}


@pytest.mark.parametrize("name", REFUSED)
def test_errors_are_torchs(name: str) -> None:
    arguments = attention_arguments(**REFUSED[name])
    places = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    defaults = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False}
    positional = [arguments.pop(name, defaults.get(name)) for name in places]
    with pytest.raises(Exception) as theirs:
        sdpa(*positional, **arguments)
    with pytest.raises(type(theirs.value)) as ours:
        F.scaled_dot_product_attention(*positional, **arguments)
    assert str(ours.value) == str(theirs.value)


OURS_ALONE: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "lengths shape": ({"key_lengths": torch.ones(3, dtype=torch.int64)}, ValueError, r"key_lengths.*\(2,\).*\(3,\)"),
    "lengths dtype": ({"key_lengths": torch.ones(2)}, TypeError, "key_lengths.*int64.*float32"),
    "lengths no tensor": ({"key_lengths": [1, 2]}, TypeError, "key_lengths.*list"),
    "lengths too large": ({"key_lengths": torch.tensor([1, 8])}, ValueError, "key_lengths.*7.*8"),
    "lengths negative": ({"key_lengths": torch.tensor([1, -1])}, ValueError, "key_lengths.*-1"),
    "values": ({"value": torch.randn(2, 4, 8, 6)}, ValueError, "7.*8"),  # torch reads past the end
}


@pytest.mark.parametrize("name", OURS_ALONE)
def test_errors_of_our_own(name: str) -> None:
    changes, kind, words = OURS_ALONE[name]
    with pytest.raises(kind, match=words) as caught:
        F.scaled_dot_product_attention(**attention_arguments(**changes))
    assert ".cpp" not in str(caught.value)


def test_other_dtypes_are_refused_by_name() -> None:
    q = torch.randn(1, 2, 3, 4).to(torch.float8_e4m3fn)
    with pytest.raises((TypeError, RuntimeError, NotImplementedError)):
        F.scaled_dot_product_attention(q, q, q)


def hostile_calls() -> list[tuple[Any, tuple[Any, ...]]]:
    q, k, v = torch.randn(2, 4, 5, 6), torch.randn(2, 2, 7, 6), torch.randn(2, 2, 7, 3)
    lse, out = torch.randn(2, 4, 5), torch.randn(2, 4, 5, 3)
    options, none, nothing = Options(0, 1.0, 0.0, 0.0, 0, 0), Extras(), (None, None, None)
    forward, backward, weights = ops.attention_forward, ops.attention_backward, ops.attention_weights
    flags = (True, True, False)
    w = torch.ones(2, 4, 5, 7)
    tiles = masks.Local(2).compile(5, 7)
    ends = torch.tensor([0, 2, 5], dtype=torch.int32)

    def extras(**given: Any) -> tuple[Any, ...]:
        return (q, k, v, *none._replace(**given), *options)

    plain = ops.attention_plain
    return [
        (plain, (q[0], k, v, True, 1.0)),
        (plain, (q, k[:1], v, True, 1.0)),
        (plain, (q, k, v[:, :, :3], True, 1.0)),
        (plain, (q[:, :3], k, v, False, 1.0)),
        (plain, (q, k, v.half(), False, 1.0)),
        (forward, (q[0], k, v, *none, *options)),
        (forward, (q, k[:1], v, *none, *options)),
        (forward, (q, k, v[:, :, :3], *none, *options)),
        (forward, (q, k[..., :3], v, *none, *options)),
        (forward, (q[:, :3], k, v, *none, *options)),
        (forward, (q, k[:, :0], v[:, :0], *none, *options)),
        (forward, (q, k.double(), v, *none, *options)),
        (forward, (q, k, v.half(), *none, *options)),
        (forward, (q[..., :0], k[..., :0], v, *none, *options)),
        (forward, (q.int(), k.int(), v.int(), *none, *options)),
        (forward, extras(mask=torch.ones(5, 7, dtype=torch.bool))),
        (forward, extras(mask=torch.ones(2, 4, 6, 7, dtype=torch.bool))),
        (forward, extras(mask=torch.ones(1, 1, 5, 7))),
        (forward, extras(mask=torch.ones(1, 1, 5, 7, dtype=torch.uint8))),
        (forward, extras(bias=torch.ones(1, 1, 5, 7).half())),
        (forward, extras(bias=torch.ones(1, 1, 5, 7, dtype=torch.bool))),
        (forward, extras(bias=torch.ones(1, 3, 5, 7))),
        (forward, extras(slopes=torch.ones(3))),
        (forward, extras(slopes=torch.ones(4, dtype=torch.float64))),
        (forward, extras(slopes=torch.ones(2, 4))),
        (forward, extras(key_lengths=torch.tensor([1]))),
        (forward, extras(key_lengths=torch.tensor([1, 99]))),
        (forward, extras(key_lengths=torch.tensor([1.0, 2.0]))),
        (forward, extras(pattern=tiles[:6])),
        (forward, extras(pattern=(*tiles[:6], tiles[6].int()))),
        (forward, extras(pattern=masks.Local(2).compile(5, 70))),
        (forward, extras(pattern=masks.per_head([masks.Local(2)] * 3).compile(5, 7, heads=3))),
        (forward, (q[:1], k[:1], v[:1], *none._replace(cu_q=ends), *options)),
        (forward, (q[:1], k[:1], v[:1], *none._replace(cu_q=ends, cu_k=ends[:2]), *options)),
        (forward, (q[:1], k[:1], v[:1], *none._replace(cu_q=ends, cu_k=ends), *options)),  # 7 keys
        (forward, (q[:1], k[:1], v[:1], *none._replace(cu_q=ends, cu_k=ends.long()), *options)),
        (forward, (q[:1], k[:1, :, :5], v[:1, :, :5], *none._replace(cu_q=ends.flip(0), cu_k=ends), *options)),
        (forward, (q, k[:, :, :5], v[:, :, :5], *none._replace(cu_q=ends, cu_k=ends), *options)),
        (forward, (q, k, v, *none, *options._replace(causal=3))),
        (forward, (q, k, v, *none, *options._replace(dropout_p=1.0))),
        (forward, (q, k, v, *none, *options._replace(dropout_p=-1.0))),
        (forward, (q, k, v, *none, *options._replace(dropout_p=math.nan))),
        (forward, (q, k, v, *none, *options._replace(dropout_p=0.5))),  # no seed
        (forward, (q, k, v, *none._replace(seed=torch.zeros(0).long()), *options._replace(dropout_p=0.5))),
        (weights, (q, k, lse[:, :2], *none, *options)),
        (weights, (q, k, lse.double(), *none, *options)),
        (backward, (out[..., :2], q, k, v, out, lse, *none, *nothing, *options, *flags)),
        (backward, (out, q, k, v, out[:, :2], lse, *none, *nothing, *options, *flags)),
        (backward, (out, q, k, v, out, lse[..., :2], *none, *nothing, *options, *flags)),
        (backward, (out, q, k, v, out, lse, *none, None, w, None, *options, *flags)),
        (backward, (out, q, k, v, out, lse, *none, w, w[0], None, *options, *flags)),
        (backward, (out, q, k, v, out, lse, *none, None, None, torch.ones(3), *options, *flags)),
        (backward, (out, q, k, v, out, lse, *none, *nothing, *options, True, True, True)),
    ]  # fmt: skip


@pytest.mark.parametrize("number", range(len(hostile_calls())))
def test_raw_operations_refuse_what_is_not_safe(number: int) -> None:
    operation, arguments = hostile_calls()[number]
    with pytest.raises((ValueError, RuntimeError)) as caught:
        operation(*arguments)
    assert ".cpp" not in str(caught.value)
