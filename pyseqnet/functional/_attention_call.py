"""Reading the arguments of scaled_dot_product_attention: from torch's shapes to those of the raw operations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyseqnet.functional._attention_reference import BOTTOM_RIGHT, NOT_CAUSAL, TOP_LEFT
from pyseqnet.functional._common import autocast_cast, autocast_dtype
from pyseqnet.masks import Causal, Pattern

# A call as the raw operations take it: query, key, value, what comes beside them (in the order of `Extras`), options
# (in that of `Options`), the extents of the results before positions (None: they have four dimensions), and the
# dimensions of packed inputs (0: not packed). A plain tuple: a named one costs 0.3 us a call.
Call = tuple[
    Tensor,
    Tensor,
    Tensor,
    tuple[Any, ...],
    tuple[int, float, float, float, int, int],
    "tuple[int, ...] | None",
    int,
]


class Given(NamedTuple):
    """The keyword-only arguments that change what a call computes."""

    pattern: Any = None
    key_lengths: Any = None
    cu_seqlens_q: Any = None
    cu_seqlens_k: Any = None
    bias: Any = None
    alibi_slopes: Any = None
    softcap: Any = None


NOTHING = Given()
NO_EXTRAS: tuple[Any, ...] = (None, None, None, None, None, None, (), None)


def _broadcast(*shapes: Sequence[int]) -> tuple[int, ...]:
    result: list[int] = []
    for dim in range(-max(len(s) for s in shapes), 0):
        extents = [s[dim] for s in shapes if len(s) >= -dim]
        wide = [e for e in extents if e != 1]
        if any(e != wide[0] for e in wide):
            raise ValueError(f"query, key and value do not broadcast: {', '.join(str(tuple(s)) for s in shapes)}")
        result.append(wide[0] if wide else 1)
    return tuple(result)


def _four_dimensional(
    query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool
) -> tuple[Tensor, Tensor, Tensor, tuple[int, ...]]:
    """Query, key and value as (batch, heads, positions, width), and the leading extents of the result."""
    if min(query.dim(), key.dim(), value.dim()) < (3 if enable_gqa else 2):
        raise ValueError("query, key and value need at least 2 dimensions (3 with enable_gqa)")
    q_lead, k_lead, v_lead = query.shape[:-2], key.shape[:-2], value.shape[:-2]
    if enable_gqa:
        heads = q_lead[-1]
        if k_lead[-1] == 0 or v_lead[-1] == 0 or heads % k_lead[-1] or heads % v_lead[-1]:
            raise ValueError("the number of query heads must be a multiple of those of key and value")
        if k_lead[-1] != v_lead[-1]:
            key = key.repeat_interleave(heads // k_lead[-1], dim=-3)
            value = value.repeat_interleave(heads // v_lead[-1], dim=-3)
        batch = _broadcast(q_lead[:-1], k_lead[:-1], v_lead[:-1])
        leading, kv_heads = (*batch, heads), key.shape[-3]
    else:
        leading = _broadcast(q_lead, k_lead, v_lead)
        batch, heads = (leading[:-1], leading[-1]) if len(leading) > 1 else (leading, 1)
        # One key head for all query heads need not be repeated.
        shared = all(len(lead) == 0 or lead[-1] == 1 for lead in (k_lead, v_lead)) and len(leading) > 1
        kv_heads = 1 if shared else heads
    total = math.prod(batch)

    def view(t: Tensor, h: int) -> Tensor:
        inner = (h,) if len(leading) > len(batch) else ()
        return t.expand(*batch, *inner, *t.shape[-2:]).reshape(total, h, *t.shape[-2:])

    return view(query, heads), view(key, kv_heads), view(value, kv_heads), leading


def _four_dimensional_mask(
    mask: Tensor, name: str, leading: tuple[int, ...], shape: tuple[int, int, int, int], gqa: bool
) -> Tensor:
    """The mask as (batch or 1, heads or 1, queries or 1, keys or 1): broadcast dimensions stay of extent 1."""
    full = (*leading, *shape[2:])
    if mask.dim() < 2 or mask.dim() > len(full):
        raise ValueError(f"{name} has {mask.dim()} dimensions, {tuple(full)} is what it must broadcast to")
    if any(m not in (1, f) for m, f in zip(reversed(mask.shape), reversed(full), strict=False)):
        raise ValueError(f"{name} of shape {tuple(mask.shape)} does not broadcast to {tuple(full)}")
    mask = mask.reshape((1,) * (len(full) - mask.dim()) + tuple(mask.shape))
    if len(leading) == 0:
        return mask.reshape(1, 1, *mask.shape)
    if len(leading) == 1:
        return mask.unsqueeze(0 if gqa else 1)
    if len(leading) == 2:
        return mask
    batch = tuple(mask.shape[: len(leading) - 1])
    if any(extent != 1 for extent in batch):
        mask = mask.expand(*leading[:-1], *mask.shape[-3:])
        batch = leading[:-1]
    return mask.reshape(math.prod(batch), *mask.shape[-3:])


def _checked_mask(mask: Any, name: str, query: Tensor) -> Tensor:
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(mask).__name__}")
    allowed = (torch.float32, query.dtype) if name == "bias" else (torch.bool, torch.float32, query.dtype)
    if mask.dtype not in allowed:
        words = "" if name == "bias" else "bool, "
        raise (TypeError if name == "bias" else ValueError)(
            f"{name} must be {words}float32 or {query.dtype}, got {mask.dtype}"
        )
    if mask.device != query.device:
        raise ValueError(f"{name} is on {mask.device}, query on {query.device}")
    return mask


def read(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    given: Given,
    return_weights: bool,
) -> Call:
    """Everything that is wrong with the arguments is said here."""
    if type(is_causal) is not bool or type(enable_gqa) is not bool:
        raise TypeError("is_causal and enable_gqa must be bool")
    bias = given.bias
    if torch._C._is_any_autocast_enabled():
        dtype = autocast_dtype(query)
        if dtype is not None:
            query, key, value = (autocast_cast(t, dtype) for t in (query, key, value))
            mask, bias = (autocast_cast(t, dtype) if isinstance(t, Tensor) else t for t in (mask, bias))
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"dropout_p must be between 0 and 1, got {dropout_p}")
    leading: tuple[int, ...] | None = None
    packed = 0
    if given.cu_seqlens_q is not None or given.cu_seqlens_k is not None:
        packed = query.dim()
        query, key, value = _packed_views(query, key, value, given, enable_gqa)
    q, k = query.shape, key.shape
    if not (
        len(q) == len(k) == value.dim() == 4
        and q[0] == k[0] == value.shape[0]
        and k[1] == value.shape[1]
        and (q[1] == k[1] or (k[1] > 0 and q[1] % k[1] == 0 and (enable_gqa or k[1] == 1)))
    ):
        query, key, value, leading = _four_dimensional(query, key, value, enable_gqa)
        q, k = query.shape, key.shape
    b, h, length, width = q
    keys = k[2]
    if k[3] != width:
        raise ValueError(f"query has head dimension {width}, key {k[3]}")
    if value.shape[2] != keys:
        raise ValueError(f"key has {keys} positions, value {value.shape[2]}")
    factor = 1.0 / math.sqrt(width) if scale is None and width else 1.0 if scale is None else float(scale)
    if mask is None and given is NOTHING:  # spares small calls a few microseconds
        options = (TOP_LEFT if is_causal else NOT_CAUSAL, factor, 0.0, float(dropout_p), 0, 0)
        return query, key, value, NO_EXTRAS, options, leading, 0

    max_q = max_k = 0
    cu_q = cu_k = None
    if packed:
        cu_q, cu_k = _read_sequences(given, query.device)
        b = cu_q.shape[0] - 1
        if mask is not None or bias is not None or given.pattern is not None or return_weights:
            max_q, max_k = _longest(cu_q), _longest(cu_k)
            length, keys = max_q, max_k
    shape = (b, h, length, keys)
    lead = (b, h) if leading is None else leading
    if mask is not None:
        mask = _four_dimensional_mask(_checked_mask(mask, "attn_mask", query), "attn_mask", lead, shape, enable_gqa)
    if bias is not None:
        bias = _four_dimensional_mask(_checked_mask(bias, "bias", query), "bias", lead, shape, enable_gqa)
    if mask is not None and mask.dtype != torch.bool:
        mask, bias = None, mask if bias is None else mask + bias
    lengths = None if given.key_lengths is None else _read_lengths(given.key_lengths, b, query.device)
    slopes = None if given.alibi_slopes is None else _read_slopes(given.alibi_slopes, b, h, query)
    causal = TOP_LEFT if is_causal else NOT_CAUSAL
    tiles: Sequence[Tensor] = ()
    if given.pattern is not None:
        causal, tiles = _read_pattern(given, causal, shape, query.device)
    softcap = _read_softcap(given.softcap)
    extras = (mask, bias, slopes, lengths, cu_q, cu_k, tiles, None)
    options = (causal, factor, softcap, float(dropout_p), max_q, max_k)
    return query, key, value, extras, options, leading, packed


def _read_pattern(
    given: Given, causal: int, shape: tuple[int, int, int, int], device: torch.device
) -> tuple[int, Sequence[Tensor]]:
    pattern, (_, heads, length, keys) = given.pattern, shape
    if not isinstance(pattern, Pattern):
        raise TypeError(f"pattern must be a pyseqnet.masks pattern, got {type(pattern).__name__}")
    if isinstance(pattern, Causal):  # the kernels know causality without a list
        align = TOP_LEFT if pattern.align == "top_left" else BOTTOM_RIGHT
        if causal in (NOT_CAUSAL, align):
            return align, ()
    # Without packed sequences both are None.
    if pattern.depends_on_surplus and given.cu_seqlens_q is not given.cu_seqlens_k:
        raise ValueError(
            "pattern aligned bottom_right with packed sequences needs the same tensor as cu_seqlens_q and "
            "cu_seqlens_k: elsewhere each sequence would have a pattern of its own"
        )
    if torch.compiler.is_compiling() and not pattern._token:  # read, so that a compiler guards on it
        raise AssertionError("every pattern has a token")
    return causal, pattern.compile(length, keys, heads=heads, device=device)


def _read_softcap(softcap: Any) -> float:
    if softcap is None:
        return 0.0
    if isinstance(softcap, bool) or not isinstance(softcap, (int, float)):
        raise TypeError(f"softcap must be a number, got {type(softcap).__name__}")
    if not (softcap > 0 and math.isfinite(softcap)):
        raise ValueError(f"softcap must be positive and finite, got {softcap}")
    return float(softcap)


def _read_slopes(slopes: Any, batch: int, heads: int, query: Tensor) -> Tensor:
    if not isinstance(slopes, Tensor):
        raise TypeError(f"alibi_slopes must be a tensor, got {type(slopes).__name__}")
    if not slopes.is_floating_point():
        raise TypeError(f"alibi_slopes must be floating-point, got {slopes.dtype}")
    if tuple(slopes.shape) not in ((heads,), (batch, heads)):
        raise ValueError(f"alibi_slopes must have shape ({heads},) or ({batch}, {heads}), got {tuple(slopes.shape)}")
    if slopes.device != query.device:
        raise ValueError(f"alibi_slopes must be on the query's device {query.device}, got {slopes.device}")
    if slopes.requires_grad and torch.is_grad_enabled():
        raise ValueError("alibi_slopes has no gradient: detach it, or give the bias as a tensor")
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    return slopes.to(wide).reshape(-1)


def _read_lengths(key_lengths: Any, batch: int, device: torch.device) -> Tensor:
    if not isinstance(key_lengths, Tensor):
        raise TypeError(f"key_lengths must be a tensor of integers, got {type(key_lengths).__name__}")
    if key_lengths.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"key_lengths must be int64 or int32, got {key_lengths.dtype}")
    if key_lengths.dim() != 1 or key_lengths.shape[0] != batch:
        raise ValueError(
            f"key_lengths must have shape ({batch},), one length a batch entry, got {tuple(key_lengths.shape)}"
        )
    if key_lengths.device != device:
        raise ValueError(f"key_lengths must be on the query's device {device}, got {key_lengths.device}")
    return key_lengths.to(torch.int64)


# --- packed sequences ---------------------------------------------------------------------------------------------


def _packed_views(
    query: Tensor, key: Tensor, value: Tensor, given: Given, enable_gqa: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(1, heads, all positions, width) of (all positions, heads, width), or of that itself."""
    if given.cu_seqlens_q is None or given.cu_seqlens_k is None:
        raise ValueError("cu_seqlens_q and cu_seqlens_k must be given together")
    if given.key_lengths is not None:
        raise ValueError("key_lengths and cu_seqlens_k both say how long sequences are: give one of them")
    dims = {query.dim(), key.dim(), value.dim()}
    if dims == {3}:
        query, key, value = (t.transpose(0, 1).unsqueeze(0) for t in (query, key, value))
    elif dims != {4} or any(t.shape[0] != 1 for t in (query, key, value)):
        raise ValueError(
            "packed query, key and value must have shape (positions, heads, width) or (1, heads, positions, width), "
            f"got {', '.join(str(tuple(t.shape)) for t in (query, key, value))}"
        )
    heads, kv_heads = query.shape[1], key.shape[1]
    if value.shape[1] != kv_heads or (heads != kv_heads and (kv_heads == 0 or heads % kv_heads)):
        raise ValueError(f"packed query has {heads} heads, key {kv_heads}, value {value.shape[1]}")
    if heads != kv_heads and not enable_gqa and kv_heads != 1:
        raise ValueError(f"query has {heads} heads and key {kv_heads}: that needs enable_gqa=True")
    return query, key, value


def _read_sequences(given: Given, device: torch.device) -> tuple[Tensor, Tensor]:
    for name, cu in (("cu_seqlens_q", given.cu_seqlens_q), ("cu_seqlens_k", given.cu_seqlens_k)):
        if not isinstance(cu, Tensor):
            raise TypeError(f"{name} must be a tensor of integers, got {type(cu).__name__}")
        if cu.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name} must be int32 or int64, got {cu.dtype}")
        if cu.dim() != 1 or cu.shape[0] < 1:
            raise ValueError(f"{name} must have shape (sequences + 1,), got {tuple(cu.shape)}")
        if cu.device != device:
            raise ValueError(f"{name} must be on the query's device {device}, got {cu.device}")
    cu_q, cu_k = given.cu_seqlens_q, given.cu_seqlens_k
    if cu_q.shape != cu_k.shape:
        raise ValueError(
            f"cu_seqlens_q names {cu_q.shape[0] - 1} sequences, cu_seqlens_k {cu_k.shape[0] - 1}: they must agree"
        )
    return cu_q.to(torch.int32), cu_k.to(torch.int32)


def _longest(cu: Tensor) -> int:
    """Waits for the device."""
    return int(cu.diff().max()) if cu.shape[0] > 1 else 0
