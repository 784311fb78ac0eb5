"""Linear attention: attention whose scores are products of features, in time and memory linear in the length.

Katharopoulos, Vyas, Pappas, Fleuret: Transformers are RNNs: Fast autoregressive transformers with linear attention,
2020.
Shen, Zhang, Zhao, Yi, Li: Efficient attention: attention with linear complexities, 2021.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from pyseqnet.functional._common import (
    SUPPORTED_DTYPES,
    accumulation_dtype,
    aliases,
    autocast_cast,
    autocast_dtype,
    creates_graph,
    explain,
    same_device,
)

_forward = torch.ops.pyseqnet.linear_attention_forward.default
_backward = torch.ops.pyseqnet.linear_attention_backward.default
_step = torch.ops.pyseqnet.linear_attention_step.default

FeatureMap = str | Callable[[Tensor], Tensor]
State = tuple[Tensor, Tensor]

_IDENTITY, _ELU, _RELU = 0, 1, 2  # enum FeatureMap of kernels/linear_attention/linear_attention.h
_KERNEL_MAPS = {"identity": _IDENTITY, "elu": _ELU, "relu": _RELU}
_CHUNK_ROWS = 64  # LinearAttentionProblem::chunk_rows


def _padding(key: Tensor, key_lengths: Tensor) -> Tensor:
    """True where a key lies beyond its length, (B, 1, S, 1)."""
    positions = torch.arange(key.shape[2], device=key.device)
    return (positions >= key_lengths.unsqueeze(1))[:, None, :, None]


def _features(feature_map: int, x: Tensor) -> Tensor:
    if feature_map == _ELU:
        return torch.where(x > 0, x + 1, x.clamp(max=0).exp())
    return x.relu() if feature_map == _RELU else x


def _plain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_lengths: Tensor | None,
    state: Tensor | None,
    normalizer: Tensor | None,
    feature_map: int,
    causal: bool,
    normalize: bool,
    scale: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The formula in plain torch, differentiable any number of times; memory L*S where causal."""
    dtype = accumulation_dtype(query.dtype)
    if key_lengths is not None:
        beyond = _padding(key, key_lengths)
        key, value = key.masked_fill(beyond, 0), value.masked_fill(beyond, 0)
    a, f, v = _features(feature_map, query.to(dtype) * scale), _features(feature_map, key.to(dtype)), value.to(dtype)
    if key_lengths is not None:
        f = f.masked_fill(beyond, 0)
    last, last_z = f.transpose(2, 3) @ v, f.sum(2)
    if state is not None and normalizer is not None:
        last, last_z = last + state, last_z + normalizer
    if causal:
        scores = (a @ f.transpose(2, 3)).tril()
        out, total = scores @ v, scores.sum(3, keepdim=True)
        if state is not None and normalizer is not None:
            out, total = out + a @ state, total + a @ normalizer.unsqueeze(3)
    else:
        out, total = a @ last, a @ last_z.unsqueeze(3)
    if normalize:
        total = total + eps
        nothing = total == 0
        out = (out / total.masked_fill(nothing, 1)).masked_fill(nothing, 0)
    return out.to(query.dtype), last, last_z


class _LinearAttention(torch.autograd.Function):
    """ctx in forward on purpose: setup_context costs 14 us a call."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_lengths: Tensor | None,
        state: Tensor | None,
        normalizer: Tensor | None,
        feature_map: int,
        causal: bool,
        normalize: bool,
        scale: float,
        eps: float,
        with_state: bool,
    ) -> Any:
        out, inverse, saved, last, last_z = _forward(
            query, key, value, key_lengths, state, normalizer,
            feature_map, causal, normalize, scale, eps, with_state, True,
        )  # fmt: skip
        ctx.save_for_backward(query, key, value, key_lengths, state, normalizer, out, inverse, saved)
        ctx.options = (feature_map, causal, normalize, scale, eps)
        ctx.set_materialize_grads(False)
        return (out, last, last_z) if with_state else out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        query, key, value, key_lengths, state, normalizer, out, inverse, saved = ctx.saved_tensors
        feature_map, causal, normalize, scale, _ = ctx.options
        grad_out, grad_state, grad_normalizer = grads if len(grads) == 3 else (grads[0], None, None)
        if creates_graph():
            inputs = aliases(query, key, value, key_lengths, state, normalizer)
            wanted = [t for t, need in zip(inputs, ctx.needs_input_grad, strict=False) if need]
            results = _plain(*inputs, *ctx.options)
            grads_of = (grad_out, grad_state, grad_normalizer)
            pairs = [(r, g) for r, g in zip(results, grads_of, strict=True) if g is not None]
            found: list[Tensor | None] = [None] * len(wanted)
            if pairs:
                outputs, arrived = [r for r, _ in pairs], [g for _, g in pairs]
                found = list(torch.autograd.grad(outputs, wanted, arrived, create_graph=True, allow_unused=True))
            return (*(found.pop(0) if need else None for need in ctx.needs_input_grad[:6]), *(None,) * 6)
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        need_state = ctx.needs_input_grad[4] or ctx.needs_input_grad[5]
        gq, gk, gv, gs, gz = _backward(
            grad_out, grad_state, grad_normalizer, query, key, value, key_lengths, out, inverse, saved,
            feature_map, causal, normalize, scale, need_state,
        )  # fmt: skip
        made = (gq, gk, gv, None, gs, gz)
        return (*(g if need else None for g, need in zip(made, ctx.needs_input_grad, strict=False)), *(None,) * 6)


def _kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_lengths: Tensor | None,
    state: Tensor | None,
    normalizer: Tensor | None,
    feature_map: int,
    causal: bool,
    normalize: bool,
    scale: float,
    eps: float,
    with_state: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    tensors = (query, key, value, state, normalizer)
    recorded = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    if recorded or forward_ad._current_level >= 0:
        result = _LinearAttention.apply(
            query, key, value, key_lengths, state, normalizer,
            feature_map, causal, normalize, scale, eps, with_state,
        )  # fmt: skip
        return result if with_state else (result, None, None)
    out, _, _, last, last_z = _forward(
        query, key, value, key_lengths, state, normalizer,
        feature_map, causal, normalize, scale, eps, with_state, False,
    )  # fmt: skip
    return out, last, last_z


def _prepare(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    feature_map: FeatureMap,
    causal: bool,
    normalize: bool | None,
    decay: Any,
    key_lengths: Tensor | None,
    initial_state: State | None,
    return_state: bool,
    scale: float | None,
    eps: float,
) -> tuple[Any, ...]:
    """The arguments of `_plain`: maps that the kernels do not know are applied here."""
    if decay is not None:
        raise NotImplementedError("linear_attention: decay is not implemented; pass decay=None")
    if torch._C._is_any_autocast_enabled():
        dtype = autocast_dtype(query)
        if dtype is not None:
            query, key, value = (autocast_cast(t, dtype) for t in (query, key, value))
    if key_lengths is not None and key_lengths.dtype != torch.int64:
        if key_lengths.dtype not in (torch.int32, torch.int16, torch.uint8):
            raise TypeError(f"linear_attention: key_lengths must be integers, got {key_lengths.dtype}")
        key_lengths = key_lengths.to(torch.int64)
    factor = 1.0 if scale is None else float(scale)
    state = normalizer = None
    if initial_state is not None:
        if not isinstance(initial_state, (tuple, list)) or len(initial_state) != 2:
            raise TypeError("linear_attention: initial_state must be a pair (S, z) of tensors, as return_state gives")
        state, normalizer = initial_state
        if not isinstance(state, Tensor) or not isinstance(normalizer, Tensor):
            raise TypeError("linear_attention: initial_state must be a pair (S, z) of tensors, as return_state gives")
    number = _KERNEL_MAPS.get(feature_map) if isinstance(feature_map, str) else None
    if number is None:
        number = _IDENTITY
        if feature_map == "softmax":
            _check_softmax(causal, normalize, initial_state, return_state)
            normalize = False
            if key_lengths is not None:
                # Not -inf: a batch without keys would be 0/0. The kernel masks these rows again.
                key = key.masked_fill(_padding(key, key_lengths), torch.finfo(key.dtype).min)
            query, key = (query * factor).softmax(3), key.softmax(2)
        elif callable(feature_map):
            if key_lengths is not None:
                # What padding holds must not reach the map's own parameters as 0 * NaN.
                key = key.masked_fill(_padding(key, key_lengths), 0)
            query, key = feature_map(query if factor == 1 else query * factor), feature_map(key)
        else:
            names = ", ".join(repr(name) for name in (*_KERNEL_MAPS, "softmax"))
            raise ValueError(f"linear_attention: feature_map must be {names} or a callable, got {feature_map!r}")
        factor = 1.0
    normalize = True if normalize is None else normalize
    return query, key, value, key_lengths, state, normalizer, number, bool(causal), bool(normalize), factor, float(eps)


def _check_softmax(causal: bool, normalize: bool | None, initial_state: Any, return_state: bool) -> None:
    reason = "feature_map='softmax' (efficient attention) normalises each key feature over all positions"
    if causal:
        raise ValueError(f"linear_attention: {reason}, so it cannot be causal; got causal=True")
    if normalize:
        raise ValueError(f"linear_attention: {reason}: pass normalize=False or leave it out; got normalize=True")
    if initial_state is not None or return_state:
        raise ValueError(f"linear_attention: {reason}, so it has no state to start from or to return")


def _refuse(error: Exception, query: Any, key: Any, value: Any, causal: bool, key_lengths: Any, state: Any) -> NoReturn:
    """Raises for arguments that were refused, naming what came and what was wanted."""
    name = "linear_attention"
    for label, t in (("query", query), ("key", key), ("value", value)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{name}: {label} must be a Tensor, got {type(t).__name__}") from None
    for t in (query, key, value):
        if t.dtype not in SUPPORTED_DTYPES:
            explain(error, name, (query, key, value), lambda: None)
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
    words = str(error)
    if isinstance(error, ValueError) and words.startswith("linear_attention: key must be"):
        raise ValueError(f"{name}: query and key must have equally many features; got {shapes}") from None
    if isinstance(error, ValueError) and "state" in words and state and all(isinstance(t, Tensor) for t in state):
        got = ", ".join(f"{tuple(t.shape)} {t.dtype}" for t in state)
        raise ValueError(f"{words}; got {got}") from None
    explain(error, name, (query, key, value), lambda: None)


def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    feature_map: FeatureMap = "elu",
    causal: bool = False,
    normalize: bool | None = None,
    decay: Any = None,
    key_lengths: Tensor | None = None,
    initial_state: State | None = None,
    return_state: bool = False,
    scale: float | None = None,
    eps: float = 1e-6,
) -> Any:
    """Attention whose scores are products of features: time and memory grow linearly with the length.

    Equivalent to::

        # without lengths and states
        a, f = phi(scale * query), phi(key)
        scores = a @ f.transpose(2, 3)                      # (B, H, L, S)
        if causal:
            scores = scores.tril()
        out = scores @ value / (scores.sum(-1, keepdim=True) + eps)

    but the scores are never formed for more than 64 positions at a time: what earlier keys say is a state
    ``S = sum of f[j] v[j]^T`` and ``z = sum of f[j]``, of one size whatever the length.

    Args:
        query: ``(B, H, L, D)``; float32, bfloat16, float16 or float64; CPU or CUDA. Any strides: a ``(B, L, H, D)``
            tensor viewed by ``transpose(1, 2)`` is read in place, and the output comes in the same order.
        key: ``(B, H, S, D)``.
        value: ``(B, H, S, E)``.
        feature_map: ``"elu"`` (``elu(x) + 1``), ``"relu"``, ``"identity"``; ``"softmax"``: efficient attention, the
            softmax of a query over its features and of each key feature over the positions; or a callable on tensors
            ``(B, H, length, D)``, which may change ``D``.
        causal: query i sees keys j <= i; needs L == S.
        normalize: divide by ``sum of scores + eps``. None: yes, but not for ``"softmax"``, whose rows sum to one.
        decay: reserved; only None.
        key_lengths: ``(B,)`` integers between 0 and S, on the query's device. Keys beyond the length count nowhere,
            whatever they hold; their gradients are zero. (On CUDA values outside the range count as the nearest.)
        initial_state: ``(S, z)``, ``(B, H, D, E)`` and ``(B, H, D)``, float32 (float64 for float64): what earlier keys
            left, as ``return_state`` gives it. Seen by every query. Differentiable.
        return_state: also return the state after all keys. Differentiable.
        scale: multiplies the query before the feature map; None: 1.
        eps: added to the sum of scores. A row whose sum is then zero is zero, and so are its gradients.

    Returns:
        ``(B, H, L, E)``, or ``(out, (S, z))`` with ``return_state``.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was wanted.
        NotImplementedError: for ``decay``.

    Differentiable twice; torch.compile sees one node. Accumulates in float32 (float64 for float64), is deterministic,
    and on the CPU bitwise equal for any number of threads. A query whose output gradient is all zero adds nothing to
    the gradients of the others, even if it holds NaN.

    A sequence in pieces gives what it gives at once::

        out1, state = linear_attention(q[:, :, :n], k[:, :, :n], v[:, :, :n], causal=True, return_state=True)
        out2 = linear_attention(q[:, :, n:], k[:, :, n:], v[:, :, n:], causal=True, initial_state=state)

    Papers: Katharopoulos et al., Transformers are RNNs, 2020; Shen et al., Efficient attention, 2021 (``"softmax"``).
    """

    def run() -> Any:
        arguments = _prepare(
            query,
            key,
            value,
            feature_map,
            causal,
            normalize,
            decay,
            key_lengths,
            initial_state,
            return_state,
            scale,
            eps,
        )
        out, last, last_z = _kernel(*(*arguments, return_state))
        return (out, (last, last_z)) if return_state else out

    if torch.compiler.is_compiling():
        return run()
    try:
        return run()
    except (ValueError, TypeError, AttributeError, NotImplementedError) as error:
        if str(error).startswith("linear_attention: ") and "decay" in str(error):
            raise
        _refuse(error, query, key, value, causal, key_lengths, initial_state)


def linear_attention_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: State | None = None,
    *,
    feature_map: FeatureMap = "elu",
    normalize: bool | None = None,
    scale: float | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, State]:
    """One position of causal linear attention: what a decoder calls token by token.

    Equivalent to::

        out, state = linear_attention(
            query.unsqueeze(2), key.unsqueeze(2), value.unsqueeze(2),
            causal=True, initial_state=state, return_state=True, **options,
        )
        return out.squeeze(2), state

    Args:
        query, key: ``(B, H, D)``.
        value: ``(B, H, E)``.
        state: what the previous step returned; None before the first.
        feature_map, normalize, scale, eps: as in `linear_attention`; not ``"softmax"``.

    Returns:
        ``(B, H, E)`` and the new state. The old one is left as it was.

    Without gradients one pass reads the state, adds the key, answers the query and writes the state.
    """
    number = _KERNEL_MAPS.get(feature_map) if isinstance(feature_map, str) else None
    if number is not None and not torch._C._is_any_autocast_enabled() and forward_ad._current_level < 0:
        try:
            start, start_z = (None, None) if state is None else state
            recorded = torch.is_grad_enabled() and (
                query.requires_grad
                or key.requires_grad
                or value.requires_grad
                or (start is not None and start_z is not None and (start.requires_grad or start_z.requires_grad))
            )
            if not recorded:
                factor = 1.0 if scale is None else float(scale)
                out, last, last_z = _step(
                    query, key, value, start, start_z, number, normalize is not False, factor, float(eps)
                )
                return out, (last, last_z)
        except (AttributeError, TypeError, ValueError, NotImplementedError):
            pass  # refused: what follows says why, in full
    for label, t, wanted in (("query", query, "D"), ("key", key, "D"), ("value", value, "E")):
        if not isinstance(t, Tensor):
            raise TypeError(f"linear_attention_step: {label} must be a Tensor, got {type(t).__name__}")
        if t.dim() != 3:
            raise ValueError(f"linear_attention_step: {label} must be (B, H, {wanted}), got {tuple(t.shape)}")
    out, new = linear_attention(
        query.unsqueeze(2),
        key.unsqueeze(2),
        value.unsqueeze(2),
        feature_map=feature_map,
        causal=True,
        normalize=normalize,
        initial_state=state,
        return_state=True,
        scale=scale,
        eps=eps,
    )
    return out.squeeze(2), new


def linear_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    feature_map: FeatureMap = "elu",
    causal: bool = False,
    normalize: bool | None = None,
    decay: Any = None,
    key_lengths: Tensor | None = None,
    initial_state: State | None = None,
    return_state: bool = False,
    scale: float | None = None,
    eps: float = 1e-6,
) -> Any:
    """`linear_attention` in plain torch: its definition, with the scores written out where it is causal."""
    arguments = _prepare(
        query, key, value, feature_map, causal, normalize, decay, key_lengths, initial_state, return_state, scale, eps
    )
    out, last, last_z = _plain(*arguments)
    return (out, (last, last_z)) if return_state else out


def linear_attention_step_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: State | None = None,
    *,
    feature_map: FeatureMap = "elu",
    normalize: bool | None = None,
    scale: float | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, State]:
    """`linear_attention_step` in plain torch: `linear_attention_reference` of one position."""
    out, new = linear_attention_reference(
        query.unsqueeze(2),
        key.unsqueeze(2),
        value.unsqueeze(2),
        feature_map=feature_map,
        causal=True,
        normalize=normalize,
        initial_state=state,
        return_state=True,
        scale=scale,
        eps=eps,
    )
    return out.squeeze(2), new


def _empty_heads(like: Tensor, rows: int, width: int) -> Tensor:
    """new_heads of csrc/linear_attention.cpp: where the heads of a row lie side by side, they do in the result."""
    b, h = like.shape[:2]
    if h > 1 and like.shape[2] > 1 and like.stride(1) < like.stride(2):
        return like.new_empty(b, rows, h, width).transpose(1, 2)
    return like.new_empty(b, h, rows, width)


def _check_shapes(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> None:
    """For shape functions, which compilers call before any kernel: what the kernels' border refuses."""
    if query.dim() != 4 or key.dim() != 4 or value.dim() != 4:
        raise ValueError("linear_attention: query, key and value must have 4 dimensions")
    if key.shape[:2] != query.shape[:2] or key.shape[3] != query.shape[3]:
        raise ValueError("linear_attention: key must be (B, H, S, D), query (B, H, L, D)")
    if value.shape[:3] != key.shape[:3]:
        raise ValueError("linear_attention: value must be (B, H, S, E), key (B, H, S, D)")
    if causal and query.shape[2] != key.shape[2]:
        raise ValueError("linear_attention: causal needs as many queries as keys")


def _new_states(query: Tensor, value: Tensor, wanted: bool) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(query.dtype)
    if not wanted:
        return query.new_empty(0, dtype=dtype), query.new_empty(0, dtype=dtype)
    b, h, _, d = query.shape
    return query.new_empty(b, h, d, value.shape[3], dtype=dtype), query.new_empty(b, h, d, dtype=dtype)


@torch.library.register_fake("pyseqnet::linear_attention_forward")
def _forward_fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_lengths: Tensor | None,
    state: Tensor | None,
    normalizer: Tensor | None,
    feature_map: int,
    causal: bool,
    normalize: bool,
    scale: float,
    eps: float,
    with_state: bool,
    with_saved: bool,
) -> tuple[Tensor, ...]:
    same_device("linear_attention", query, key, value, key_lengths, state, normalizer)
    _check_shapes(query, key, value, causal)
    b, h, length, d = query.shape
    width = value.shape[3]
    dtype = accumulation_dtype(query.dtype)
    count = (length + _CHUNK_ROWS - 1) // _CHUNK_ROWS if causal else 1
    saved = query.new_empty((b, h, count * (d * width + d)) if with_saved else 0, dtype=dtype)
    inverse = query.new_empty((b, h, length) if with_saved and normalize else 0, dtype=dtype)
    return _empty_heads(query, length, width), inverse, saved, *_new_states(query, value, with_state)


@torch.library.register_fake("pyseqnet::linear_attention_backward")
def _backward_fake(
    grad_output: Tensor,
    grad_state: Tensor | None,
    grad_normalizer: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_lengths: Tensor | None,
    output: Tensor,
    inverse: Tensor,
    saved: Tensor,
    feature_map: int,
    causal: bool,
    normalize: bool,
    scale: float,
    need_state: bool,
) -> tuple[Tensor, ...]:
    same_device("linear_attention", grad_output, query, key, value, output, saved)
    _check_shapes(query, key, value, causal)
    return (
        _empty_heads(query, query.shape[2], query.shape[3]),
        _empty_heads(key, key.shape[2], key.shape[3]),
        _empty_heads(value, value.shape[2], value.shape[3]),
        *_new_states(query, value, need_state),
    )


@torch.library.register_fake("pyseqnet::linear_attention_step")
def _step_fake(
    query: Tensor, key: Tensor, value: Tensor, state: Tensor | None, normalizer: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    same_device("linear_attention_step", query, key, value, state, normalizer)
    if query.dim() != 3 or key.shape != query.shape or value.dim() != 3 or value.shape[:2] != query.shape[:2]:
        raise ValueError("linear_attention_step: expected query and key (B, H, D), value (B, H, E)")
    (b, h, d), width = query.shape, value.shape[2]
    dtype = accumulation_dtype(query.dtype)
    return (
        query.new_empty(b, h, width),
        query.new_empty(b, h, d, width, dtype=dtype),
        query.new_empty(b, h, d, dtype=dtype),
    )
