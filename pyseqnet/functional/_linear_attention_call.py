"""Reading the arguments of linear attention: what its kernels take, and what is refused in words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from pyseqnet.functional._common import SUPPORTED_DTYPES, autocast_cast, autocast_dtype, explain

FeatureMap = str | Callable[[Tensor], Tensor]
State = tuple[Tensor, Tensor]

IDENTITY, ELU, RELU, EXP, SOFTMAX = 0, 1, 2, 3, 4  # enum FeatureMap of kernels/linear_attention/linear_attention.h
KERNEL_MAPS = {"identity": IDENTITY, "elu": ELU, "relu": RELU, "exp": EXP}


class Call(NamedTuple):
    """The arguments of one call as the operations take them: maps that the kernels do not know are applied."""

    query: Tensor
    key: Tensor
    value: Tensor
    key_lengths: Tensor | None
    decay: Tensor | None  # (H,) float64
    starts: Tensor | None  # (sequences + 1,) int32
    state: Tensor | None
    normalizer: Tensor | None
    feature_map: int
    causal: bool
    normalize: bool
    scale: float
    eps: float


def padding(key: Tensor, key_lengths: Tensor) -> Tensor:
    """True where a key lies beyond its length, (B, 1, S, 1)."""
    positions = torch.arange(key.shape[2], device=key.device)
    return (positions >= key_lengths.unsqueeze(1))[:, None, :, None]


def read_decay(decay: Any, query: Tensor, heads: int) -> Tensor:
    """(H,) float64 on the query's device; the kernels check the values of tensors."""
    if isinstance(decay, Tensor):
        if not decay.is_floating_point():
            raise TypeError(f"linear_attention: decay must be floating point, got {decay.dtype}")
        numbers = decay.to(query.device, torch.float64)
    elif isinstance(decay, (int, float)) or (
        isinstance(decay, (tuple, list)) and all(isinstance(g, (int, float)) for g in decay)
    ):
        numbers = torch.tensor(decay, dtype=torch.float64)
        if not ((numbers >= 0) & (numbers <= 1)).all():
            raise ValueError(f"linear_attention: decay must lie between 0 and 1, got {decay}")
        numbers = numbers.to(query.device)
    else:
        raise TypeError(f"linear_attention: decay must be a number or one for each head, got {type(decay).__name__}")
    if numbers.dim() > 1 or (numbers.dim() == 1 and numbers.shape[0] != heads):
        raise ValueError(
            f"linear_attention: decay must be a number or have shape ({heads},), got {tuple(numbers.shape)}"
        )
    return numbers.expand(heads)


def read_lengths(key_lengths: Tensor) -> Tensor:
    if key_lengths.dtype == torch.int64:
        return key_lengths
    if key_lengths.dtype not in (torch.int32, torch.int16, torch.uint8):
        raise TypeError(f"linear_attention: key_lengths must be integers, got {key_lengths.dtype}")
    return key_lengths.to(torch.int64)


def _read_state(initial_state: Any) -> State:
    pair = isinstance(initial_state, (tuple, list)) and len(initial_state) == 2
    if not pair or not all(isinstance(t, Tensor) for t in initial_state):
        raise TypeError("linear_attention: initial_state must be a pair (S, z) of tensors, as return_state gives")
    return initial_state[0], initial_state[1]


def _read_starts(cu_seqlens: Any, query: Tensor, key: Tensor, value: Tensor, key_lengths: Any) -> Tensor:
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"linear_attention: cu_seqlens must be a tensor of integers, got {type(cu_seqlens).__name__}")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"linear_attention: cu_seqlens must be int32 or int64, got {cu_seqlens.dtype}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(
            f"linear_attention: cu_seqlens must have shape (sequences + 1,), got {tuple(cu_seqlens.shape)}"
        )
    if cu_seqlens.device != query.device:
        raise ValueError(
            f"linear_attention: cu_seqlens must be on the query's device {query.device}, got {cu_seqlens.device}"
        )
    if key_lengths is not None:
        raise ValueError("linear_attention: key_lengths and cu_seqlens both say how long sequences are: give one")
    shapes = [tuple(t.shape) for t in (query, key, value)]
    if any(len(s) != 4 or s[0] != 1 for s in shapes) or len({s[1:3] for s in shapes}) != 1:
        raise ValueError(
            "linear_attention: packed query, key and value must have shape (positions, heads, width) or "
            f"(1, heads, positions, width), the same positions and heads; got {', '.join(map(str, shapes))}"
        )
    return cu_seqlens.to(torch.int32)


def _apply_map(call: Call, feature_map: FeatureMap) -> Call:
    """With a map that is no kernel's: features in place of query and key."""
    query, key, factor = call.query, call.key, call.scale
    number = IDENTITY
    if callable(feature_map):
        if call.key_lengths is not None:
            # What padding holds must not reach the map's own parameters as 0 * NaN.
            key = key.masked_fill(padding(key, call.key_lengths), 0)
        query = query if factor == 1 else query * factor
        # Half floats would round an exponent where they would only round a feature.
        exponent = getattr(feature_map, "exponent", None) if query.dtype in (torch.float32, torch.float64) else None
        if exponent is not None:
            number = EXP
        of = feature_map if exponent is None else exponent
        query, key = of(query), of(key)
    else:
        names = ", ".join(repr(name) for name in (*KERNEL_MAPS, "softmax"))
        raise ValueError(f"linear_attention: feature_map must be {names} or a callable, got {feature_map!r}")
    return call._replace(query=query, key=key, feature_map=number, scale=1.0)


def prepare(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    feature_map: FeatureMap,
    causal: bool,
    normalize: bool | None,
    decay: Any,
    key_lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    initial_state: State | None,
    return_state: bool,
    scale: float | None,
    eps: float,
) -> Call:
    if torch._C._is_any_autocast_enabled():
        dtype = autocast_dtype(query)
        if dtype is not None:
            query, key, value = (autocast_cast(t, dtype) for t in (query, key, value))
    starts = None
    if cu_seqlens is not None:
        if query.dim() == key.dim() == value.dim() == 3:
            query, key, value = (t.transpose(0, 1).unsqueeze(0) for t in (query, key, value))
        starts = _read_starts(cu_seqlens, query, key, value, key_lengths)
    if key_lengths is not None:
        key_lengths = read_lengths(key_lengths)
    if decay is not None:
        if not causal:
            raise ValueError("linear_attention: decay needs causal=True: it fades what came earlier")
        decay = read_decay(decay, query, query.shape[1])
    state, normalizer = (None, None) if initial_state is None else _read_state(initial_state)
    number = KERNEL_MAPS.get(feature_map) if isinstance(feature_map, str) else None
    if feature_map == "softmax":
        _check_softmax(causal, normalize, initial_state, return_state)
        number, normalize, eps = SOFTMAX, True, 0.0  # the sum of a query's features makes them a softmax
    call = Call(
        query, key, value, key_lengths, decay, starts, state, normalizer, IDENTITY if number is None else number,
        bool(causal), normalize is not False, 1.0 if scale is None else float(scale), float(eps),
    )  # fmt: skip
    return _apply_map(call, feature_map) if number is None else call


def _check_softmax(causal: bool, normalize: bool | None, initial_state: Any, return_state: bool) -> None:
    reason = "feature_map='softmax' (efficient attention) normalises each key feature over all positions"
    if causal:
        raise ValueError(f"linear_attention: {reason}, so it cannot be causal; got causal=True")
    if normalize:
        raise ValueError(f"linear_attention: {reason}: pass normalize=False or leave it out; got normalize=True")
    if initial_state is not None or return_state:
        raise ValueError(f"linear_attention: {reason}, so it has no state to start from or to return")


def refuse(error: Exception, query: Any, key: Any, value: Any, causal: bool, key_lengths: Any, state: Any) -> NoReturn:
    """Raises for arguments that were refused, naming what came and what was wanted."""
    name = "linear_attention"
    for label, t in (("query", query), ("key", key), ("value", value)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{name}: {label} must be a Tensor, got {type(t).__name__}") from None
    for t in (query, key, value):
        if t.dtype not in SUPPORTED_DTYPES:
            explain(error, name, (query, key, value), lambda: None)
    words = str(error)
    if "cu_seqlens" in words or "packed" in words or "decay" in words:
        raise error
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    wanted = "query (B, H, L, D), key (B, H, S, D), value (B, H, S, E)"
    if (
        any(t.dim() != 4 for t in (query, key, value))
        or key.shape[:2] != query.shape[:2]
        or value.shape[:3] != key.shape[:3]
    ):
        raise ValueError(f"{name}: expected {wanted}; got {shapes}") from None
    if not query.dtype == key.dtype == value.dtype:
        got = f"{query.dtype}, {key.dtype}, {value.dtype}"
        raise TypeError(f"{name}: query, key and value must share a dtype; got {got}") from None
    lengths = query.shape[2], key.shape[2]
    if causal and lengths[0] != lengths[1]:
        raise ValueError(
            f"{name}: causal=True needs as many queries as keys (L == S); got L={lengths[0]}, S={lengths[1]}"
        ) from None
    if key_lengths is not None and not isinstance(key_lengths, Tensor):
        raise TypeError(f"{name}: key_lengths must be a Tensor or None, got {type(key_lengths).__name__}") from None
    if key_lengths is not None and key_lengths.shape != query.shape[:1]:
        raise ValueError(
            f"{name}: key_lengths must have shape ({query.shape[0]},), got {tuple(key_lengths.shape)}"
        ) from None
    if isinstance(error, ValueError) and words.startswith("linear_attention: key must be"):
        raise ValueError(f"{name}: query and key must have equally many features; got {shapes}") from None
    if isinstance(error, ValueError) and "state" in words and state and all(isinstance(t, Tensor) for t in state):
        got = ", ".join(f"{tuple(t.shape)} {t.dtype}" for t in state)
        raise ValueError(f"{words}; got {got}") from None
    explain(error, name, (query, key, value), lambda: None)
