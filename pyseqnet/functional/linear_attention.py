"""Linear attention: attention whose scores are products of features, in time and memory linear in the length.

Katharopoulos, Vyas, Pappas, Fleuret: Transformers are RNNs: Fast autoregressive transformers with linear attention,
2020.
Shen, Zhang, Zhao, Yi, Li: Efficient attention: attention with linear complexities, 2021.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from pyseqnet.functional._common import accumulation_dtype, aliases, creates_graph, same_device
from pyseqnet.functional._linear_attention_call import KERNEL_MAPS, Call, FeatureMap, State, prepare, read_decay, refuse
from pyseqnet.functional._linear_attention_reference import (
    linear_attention_reference,
    linear_attention_step_reference,
    plain,
)

__all__ = [
    "FeatureMap",
    "State",
    "linear_attention",
    "linear_attention_reference",
    "linear_attention_step",
    "linear_attention_step_reference",
]

_forward = torch.ops.pyseqnet.linear_attention_forward.default
_backward = torch.ops.pyseqnet.linear_attention_backward.default
_step = torch.ops.pyseqnet.linear_attention_step.default
_step_in_place = torch.ops.pyseqnet.linear_attention_step_.default

_CHUNK_ROWS = 64  # LinearAttentionProblem::chunk_rows


class _LinearAttention(torch.autograd.Function):
    """ctx in forward on purpose: setup_context costs 14 us a call."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_lengths: Tensor | None,
        decay: Tensor | None,
        starts: Tensor | None,
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
            feature_map, causal, normalize, scale, eps, with_state, True, decay, starts,
        )  # fmt: skip
        ctx.save_for_backward(query, key, value, key_lengths, decay, starts, state, normalizer, out, inverse, saved)
        ctx.options = (feature_map, causal, normalize, scale, eps)
        ctx.set_materialize_grads(False)
        return (out, last, last_z) if with_state else out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        *inputs, out, inverse, saved = ctx.saved_tensors
        query, key, value, key_lengths, decay, starts, _, _ = inputs
        feature_map, causal, normalize, scale, _ = ctx.options
        grad_out, grad_state, grad_normalizer = grads if len(grads) == 3 else (grads[0], None, None)
        tensors = len(inputs)
        if creates_graph():
            seen = aliases(*inputs)
            wanted = [t for t, need in zip(seen, ctx.needs_input_grad, strict=False) if need]
            results = plain(Call(*seen, *ctx.options))
            grads_of = (grad_out, grad_state, grad_normalizer)
            pairs = [(r, g) for r, g in zip(results, grads_of, strict=True) if g is not None]
            found: list[Tensor | None] = [None] * len(wanted)
            if pairs:
                outputs, arrived = [r for r, _ in pairs], [g for _, g in pairs]
                found = list(torch.autograd.grad(outputs, wanted, arrived, create_graph=True, allow_unused=True))
            return (*(found.pop(0) if need else None for need in ctx.needs_input_grad[:tensors]), *(None,) * 6)
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        need_decay, need_state = ctx.needs_input_grad[4], ctx.needs_input_grad[6] or ctx.needs_input_grad[7]
        gq, gk, gv, gs, gz, shares = _backward(
            grad_out, grad_state, grad_normalizer, query, key, value, key_lengths, out, inverse, saved,
            feature_map, causal, normalize, scale, need_state, decay, starts, need_decay,
        )  # fmt: skip
        made = (gq, gk, gv, None, shares.double().sum((0, 2)) if need_decay else None, None, gs, gz)
        return (*(g if need else None for g, need in zip(made, ctx.needs_input_grad, strict=False)), *(None,) * 6)


def _kernel(call: Call, with_state: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    tensors = (call.query, call.key, call.value, call.decay, call.state, call.normalizer)
    recorded = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    if recorded or forward_ad._current_level >= 0:
        result = _LinearAttention.apply(*call, with_state)
        return result if with_state else (result, None, None)
    query, key, value, key_lengths, decay, starts, state, normalizer, *options = call
    out, _, _, last, last_z = _forward(
        query, key, value, key_lengths, state, normalizer, *options, with_state, False, decay, starts
    )
    return out, last, last_z


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
    cu_seqlens: Tensor | None = None,
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
            scores = scores.tril() * decay ** (i - j)       # decay (H, 1, 1); 1 without
        out = scores @ value / (scores.sum(-1, keepdim=True) + eps)

    but the scores are never formed for more than 64 positions at a time: what earlier keys say is a state
    ``S = sum of f[j] v[j]^T`` and ``z = sum of f[j]``, of one size whatever the length.

    Args:
        query: ``(B, H, L, D)``; float32, bfloat16, float16 or float64; CPU or CUDA. Any strides: a ``(B, L, H, D)``
            tensor viewed by ``transpose(1, 2)`` is read in place, and the output comes in the same order.
        key: ``(B, H, S, D)``.
        value: ``(B, H, S, E)``.
        feature_map: ``"elu"`` (``elu(x) + 1``), ``"relu"``, ``"exp"``, ``"identity"``; ``"softmax"``: efficient
            attention, the softmax of a query over its features and of each key feature over the positions; or a
            callable on tensors ``(B, H, length, D)``, which may change ``D``. Of a callable that has a method
            ``exponent``, as `pyseqnet.nn.PositiveRandomFeatures`, the exp is left to the kernel (float32, float64).
        causal: query i sees keys j <= i; needs L == S.
        normalize: divide by ``sum of scores + eps``. None: yes, but not for ``"softmax"``, whose rows sum to one.
        decay: a number between 0 and 1 or one for each head, ``(H,)``: the state fades by it at every position, and
            key j weighs ``decay ** (i - j)`` with query i (retention). Needs ``causal``. Differentiable. A float64
            tensor on the query's device is taken as it is.
        key_lengths: ``(B,)`` integers between 0 and S, on the query's device. Keys beyond the length count nowhere,
            whatever they hold; their gradients are zero; nothing fades there. (On CUDA values outside the range count
            as the nearest.)
        cu_seqlens: ``(N + 1,)`` int32 on the query's device: the tensors hold ``N`` sequences one behind the other,
            sequence ``n`` the positions ``cu_seqlens[n]`` to ``cu_seqlens[n + 1]`` of query, key and value alike. They
            are then ``(total, H, width)``, as flash_attn_varlen_func has it, or ``(1, H, total, width)``, and so is the
            result; states are ``(N, H, ...)``. The first element is 0, the last ``total``.
        initial_state: ``(S, z)``, ``(B, H, D, E)`` and ``(B, H, D)``, float32 (float64 for float64): what earlier keys
            left, as ``return_state`` gives it. Seen by every query, faded where there is decay. Differentiable.
        return_state: also return the state after all keys. Differentiable.
        scale: multiplies the query before the feature map; None: 1.
        eps: added to the sum of scores. A row whose sum is then zero is zero, and so are its gradients.

    Returns:
        ``(B, H, L, E)``, or ``(out, (S, z))`` with ``return_state``.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was wanted.

    Differentiable twice; torch.compile sees one node. Accumulates in float32 (float64 for float64), is deterministic,
    and on the CPU bitwise equal for any number of threads. A query whose output gradient is all zero adds nothing to
    the gradients of the others, even if it holds NaN.

    A sequence in pieces gives what it gives at once::

        out1, state = linear_attention(q[:, :, :n], k[:, :, :n], v[:, :, :n], causal=True, return_state=True)
        out2 = linear_attention(q[:, :, n:], k[:, :, n:], v[:, :, n:], causal=True, initial_state=state)

    Papers: Katharopoulos et al., Transformers are RNNs, 2020; Shen et al., Efficient attention, 2021 (``"softmax"``);
    Sun et al., Retentive network, 2023 (``decay``).
    """

    def run() -> Any:
        call = prepare(
            query, key, value, feature_map, causal, normalize, decay, key_lengths, cu_seqlens, initial_state,
            return_state, scale, eps,
        )  # fmt: skip
        out, last, last_z = _kernel(call, return_state)
        if call.starts is not None and query.dim() == 3:
            out = out.squeeze(0).transpose(0, 1)
        return (out, (last, last_z)) if return_state else out

    if torch.compiler.is_compiling():
        return run()
    try:
        return run()
    except (ValueError, TypeError, AttributeError, NotImplementedError) as error:
        refuse(error, query, key, value, causal, key_lengths, initial_state)


def linear_attention_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: State | None = None,
    *,
    feature_map: FeatureMap = "elu",
    normalize: bool | None = None,
    decay: Any = None,
    scale: float | None = None,
    eps: float = 1e-6,
    in_place: bool = False,
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
        feature_map, normalize, decay, scale, eps: as in `linear_attention`; not ``"softmax"``.
        in_place: the new state takes the memory of ``state``, which saves an allocation of its size and half of the
            traffic. For inference: ValueError where gradients are recorded.

    Returns:
        ``(B, H, E)`` and the new state. The old one is left as it was, unless ``in_place``.

    Without gradients one pass reads the state, adds the key, answers the query and writes the state.
    """
    number = KERNEL_MAPS.get(feature_map) if isinstance(feature_map, str) else None
    if number is not None and not torch._C._is_any_autocast_enabled() and forward_ad._current_level < 0:
        try:
            start, start_z = (None, None) if state is None else state
            recorded = torch.is_grad_enabled() and (
                query.requires_grad
                or key.requires_grad
                or value.requires_grad
                or (start is not None and start_z is not None and (start.requires_grad or start_z.requires_grad))
                or (isinstance(decay, Tensor) and decay.requires_grad)
            )
            if not recorded:
                factor = 1.0 if scale is None else float(scale)
                if decay is not None:
                    decay = read_decay(decay, query, query.shape[1])
                if in_place and start is not None and start_z is not None:
                    out = _step_in_place(
                        query, key, value, start, start_z, number, normalize is not False, factor, float(eps), decay
                    )
                    return out, (start, start_z)
                out, last, last_z = _step(
                    query, key, value, start, start_z, number, normalize is not False, factor, float(eps), decay
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
        decay=decay,
        initial_state=state,
        return_state=True,
        scale=scale,
        eps=eps,
    )
    if in_place and state is not None:
        raise ValueError(
            "linear_attention_step: in_place needs contiguous states and a kernel's map; no gradients, no autocast"
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


def _new_states(query: Tensor, value: Tensor, sequences: int, wanted: bool) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(query.dtype)
    if not wanted:
        return query.new_empty(0, dtype=dtype), query.new_empty(0, dtype=dtype)
    h, d, width = query.shape[1], query.shape[3], value.shape[3]
    return query.new_empty(sequences, h, d, width, dtype=dtype), query.new_empty(sequences, h, d, dtype=dtype)


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
    decay: Tensor | None = None,
    starts: Tensor | None = None,
) -> tuple[Tensor, ...]:
    same_device("linear_attention", query, key, value, key_lengths, state, normalizer, decay, starts)
    _check_shapes(query, key, value, causal)
    b, h, length, d = query.shape
    width = value.shape[3]
    dtype = accumulation_dtype(query.dtype)
    sequences = b if starts is None else starts.shape[0] - 1
    if not causal:
        shape = (sequences, h, d * width + d)
    elif starts is None:
        shape = (b, h, (length + _CHUNK_ROWS - 1) // _CHUNK_ROWS * (d * width + d))
    else:  # LinearAttentionProblem::slots
        shape = (1, h, (length // _CHUNK_ROWS + sequences) * (d * width + d))
    saved = query.new_empty(shape if with_saved else 0, dtype=dtype)
    inverse = query.new_empty((b, h, length) if with_saved and normalize else 0, dtype=dtype)
    states = _new_states(query, value, sequences, with_state)
    return _empty_heads(query, length, width), inverse, saved, *states


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
    decay: Tensor | None = None,
    starts: Tensor | None = None,
    need_decay: bool = False,
) -> tuple[Tensor, ...]:
    same_device("linear_attention", grad_output, query, key, value, output, saved)
    _check_shapes(query, key, value, causal)
    return (
        _empty_heads(query, query.shape[2], query.shape[3]),
        _empty_heads(key, key.shape[2], key.shape[3]),
        _empty_heads(value, value.shape[2], value.shape[3]),
        *_new_states(query, value, query.shape[0] if starts is None else starts.shape[0] - 1, need_state),
        saved.new_empty(_shares(saved, query, value) if need_decay else 0),
    )


def _shares(saved: Tensor, query: Tensor, value: Tensor) -> tuple[int, int, int]:
    """A number for each saved state of a causal call."""
    b, h, numbers = saved.shape
    return b, h, numbers // (query.shape[3] * (value.shape[3] + 1))


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


@torch.library.register_fake("pyseqnet::linear_attention_step_")
def _step_in_place_fake(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
    return _step_fake(query, key, value, *rest)[0]
