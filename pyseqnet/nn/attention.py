"""Multi-head attention: torch's layer, with softmax(Q K^T / sqrt(D)) V computed by our kernels.

Vaswani et al.: Attention is all you need, 2017.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Bound at import: replacing torch.nn.MultiheadAttention by ours later cannot make the class its own base.
from torch.nn import MultiheadAttention as _TorchMultiheadAttention
from torch.nn.functional import linear

from pyseqnet import functional as F
from pyseqnet.masks import Pattern
from pyseqnet.nn._attention_masks import (
    additive_mask,
    agreed_masks,
    causal_rows,
    finite_padding,
    hidden_prefix,
    hidden_rows,
    merged_mask,
    right_padded_lengths,
)
from pyseqnet.nn.cache import KeyValueCache, MemoryCache, PreallocatedCache


def _on_each(
    function: Callable[[Tensor], Tensor], query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What is one tensor stays one tensor, so that one matrix product projects it."""
    new_query = function(query)
    new_key = new_query if key is query else function(key)
    return new_query, new_key, new_key if value is key else function(value)


class MultiheadAttention(_TorchMultiheadAttention):
    """Drop-in for `torch.nn.MultiheadAttention`: same constructor, parameters, ``state_dict``, errors and results.

    ``query`` (L, B, E), ``key`` (S, B, kdim) and ``value`` (S, B, vdim), with ``batch_first`` (B, L, E) and so on,
    unbatched (L, E) and so on. Returns the output, shaped as ``query``, and the weights: (B, L, S), the mean over the
    heads, or (B, H, L, S) with ``average_attn_weights=False``, or None with ``need_weights=False``.

    Bool masks are torch.nn's here: **True = ignore**. (In `pyseqnet.functional` True = take part.) They are handed on
    as bool and broadcast; on the CPU a ``key_padding_mask`` that only cuts the ends off becomes lengths, and what lies
    beyond is skipped.

    ``need_weights=True``, torch's default, costs the whole L x S matrix; pass False where the weights are not read.

    Where it differs from torch:

    * A query that may see no key gives the output projection's bias (attention 0, weights 0), not NaN.
    * Padded keys never reach an output or a gradient, even if they hold NaN or infinity.
    * There is no inference-only path with other rounding, and nested tensors are refused.

    >>> attention = MultiheadAttention(8, 2, batch_first=True)
    >>> x = torch.zeros(3, 5, 8)
    >>> output, weights = attention(x, x, x)
    >>> output.shape, weights.shape
    (torch.Size([3, 5, 8]), torch.Size([3, 5, 5]))

    >>> ends = torch.arange(5) >= torch.tensor([[5], [2], [4]])  # True: padding
    >>> output, _ = attention(x, x, x, key_padding_mask=ends, need_weights=False)

    ``pattern`` (by keyword, of the constructor): which keys each query sees, from `pyseqnet.masks`, in addition to the
    masks of a call; what it hides costs no time. ``per_head([...])`` gives every head its own.

    >>> from pyseqnet.masks import Global, Local
    >>> longformer = MultiheadAttention(8, 2, batch_first=True, pattern=Local(2) | Global(1))
    >>> longformer(x, x, x)[1][0, 4]
    tensor([0.2500, 0.0000, 0.2500, 0.2500, 0.2500], grad_fn=<SelectBackward0>)

    Decoding token by token (``cache``, by keyword):

    * a `KeyValueCache` or `PreallocatedCache`, self-attention: the projections of ``key`` and ``value``, the new
      positions, are appended, and ``query`` sees all positions so far. Masks have the size of all of them:
      ``attn_mask`` (L, S so far), ``key_padding_mask`` (B, S so far). ``is_causal`` needs no mask here: new position i
      sees what was cached and the new ones up to i (bottom-right alignment).
    * a `MemoryCache`, cross-attention: ``key`` and ``value`` are projected in the first step and not looked at later.

    >>> cache, steps = attention.new_cache(), []
    >>> with torch.no_grad():
    ...     for token in x.split(1, dim=1):
    ...         steps.append(attention(token, token, token, need_weights=False, cache=cache)[0])
    >>> cache.length
    5
    """

    pattern: Pattern | None = None  # also of a converted layer, which never passed through our constructor

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: Any = None,
        dtype: Any = None,
        *,
        pattern: Pattern | None = None,
    ) -> None:
        super().__init__(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype
        )
        if pattern is not None:
            self.set_pattern(pattern)

    def set_pattern(self, pattern: Pattern | None) -> None:
        """Which keys each query sees from now on; None: all."""
        if pattern is not None:
            if not isinstance(pattern, Pattern):
                raise TypeError(f"pattern must come from pyseqnet.masks, got {type(pattern).__name__}")
            if pattern.heads not in (None, self.num_heads):
                raise ValueError(f"pattern is of {pattern.heads} heads, the layer has {self.num_heads}")
            if self.bias_k is not None or self.add_zero_attn:
                raise ValueError(
                    "pattern does not go with add_bias_kv and add_zero_attn: it says nothing of their keys"
                )
        self.pattern = pattern

    def new_cache(
        self, capacity: int | None = None, batch_size: int | None = None, memory: bool = False
    ) -> KeyValueCache | MemoryCache:
        """An empty cache for this layer: one that grows, or one of ``capacity`` positions of ``batch_size`` sequences,
        or (``memory``) one for cross-attention."""
        if memory:
            return MemoryCache()
        if capacity is None:
            return KeyValueCache()
        if batch_size is None:
            raise ValueError("a cache of fixed capacity needs batch_size")
        like = self.out_proj.weight
        kind = like.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else like.dtype
        heads, width = self.num_heads, self.head_dim
        return PreallocatedCache(batch_size, heads, capacity, width, device=like.device, dtype=dtype)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        cache: KeyValueCache | MemoryCache | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        padding, mask = agreed_masks(key_padding_mask, attn_mask, "key_padding_mask", "attn_mask", query.dtype)
        if cache is not None:
            return self._decode(query, key, value, padding, need_weights, mask, average_attn_weights, is_causal, cache)
        hinted = is_causal and not need_weights  # as torch: whoever reads the weights gets those of the mask
        reason = self._refusal(query, key, value, padding, mask, is_causal, hinted and padding is None)
        if reason is not None:
            _TorchMultiheadAttention.forward(
                self, query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
            raise ValueError(f"pyseqnet MultiheadAttention: {reason}")

        batched = query.dim() == 3
        batch_first = self.batch_first or not batched
        if not batched:
            query, key, value = _on_each(lambda t: t.unsqueeze(0), query, key, value)
            padding = padding.unsqueeze(0) if padding is not None else None
        if padding is not None:
            pads = padding
            query_too = query is key
            key_value = _on_each(lambda t: finite_padding(t, pads, batch_first), key, key, value)[1:]
            query, key, value = (key_value[0] if query_too else query, *key_value)

        q, k, v = (self._heads(t, batch_first) for t in self._projections(query, key, value))
        extra = (self.bias_k is not None) + self.add_zero_attn
        # As torch: beside a padding mask the extra keys are seen by all, else they are the last ones.
        causal = hinted and (key_padding_mask is None or not extra)
        mask = None if causal else mask
        call = (need_weights, average_attn_weights, batched, batch_first)
        return self._attend(q, k, v, padding, mask, causal, self.pattern, *call)

    @staticmethod
    def _heads(projected: Tensor, batch_first: bool) -> Tensor:
        """(B, L, H, D) or (L, B, H, D) as (B, H, L, D), a view."""
        return (projected if batch_first else projected.transpose(0, 1)).transpose(1, 2)

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        padding: Tensor | None,
        mask: Tensor | None,
        causal: bool,
        pattern: Pattern | None,
        need_weights: bool,
        average_attn_weights: bool,
        batched: bool,
        batch_first: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """From projected heads to the output."""
        k, v, extra_keys = self._with_extra_keys(k, v)
        lengths = None
        if padding is not None and padding.dtype == torch.bool and not extra_keys:
            lengths = right_padded_lengths(padding)
            padding = padding if lengths is None else None
        result: Any = F.scaled_dot_product_attention(
            q,
            k,
            v,
            merged_mask(padding, mask, self.num_heads, extra_keys),
            self.dropout if self.training else 0.0,
            causal,
            pattern=pattern,
            key_lengths=lengths,
            return_weights=need_weights,
        )
        output, weights = result if need_weights else (result, None)

        output = (output.transpose(1, 2) if batch_first else output.permute(2, 0, 1, 3)).flatten(2)
        output = linear(output, self.out_proj.weight, self.out_proj.bias)
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if not batched:
            output = output.squeeze(0)
            weights = weights.squeeze(0) if weights is not None else None
        return output, weights

    def _decode(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        padding: Tensor | None,
        need_weights: bool,
        mask: Tensor | None,
        average_attn_weights: bool,
        is_causal: bool,
        cache: KeyValueCache | MemoryCache,
    ) -> tuple[Tensor, Tensor | None]:
        """One step with a cache."""
        if not isinstance(cache, (KeyValueCache, MemoryCache)):
            raise TypeError(f"cache must be a KeyValueCache or a MemoryCache, got {type(cache).__name__}")
        batched = query.dim() == 3
        batch_first = self.batch_first or not batched
        grows = isinstance(cache, KeyValueCache)
        filled = not grows and cache.key is not None
        length = query.shape[int(batch_first) if batched else 0]
        new = 0 if filled else key.shape[int(batch_first) if batched else 0]
        total = cache.length + new
        causal = causal_rows(length, total, query.device) if is_causal and mask is None and grows else None
        hidden, first = None, 0
        if self.pattern is not None and grows:
            hidden = hidden_rows(self.pattern, length, total)
            first = hidden_prefix(hidden)
            hidden = hidden.to(query.device)
        if is_causal and mask is None and not grows:
            raise ValueError("is_causal means nothing for the memory of a decoder: give attn_mask")
        if filled:
            reason = self._query_refusal(query, cache, batched, batch_first)
        else:
            reason = self._refusal(query, key, value, None, None, False, False)
        reason = reason or self._mask_refusal(query, padding, mask, total, batched, batch_first)
        if reason is not None:
            raise ValueError(f"pyseqnet MultiheadAttention: {reason}")

        if not batched:
            query, key, value = _on_each(lambda t: t.unsqueeze(0), query, key, value)
            padding = padding.unsqueeze(0) if padding is not None else None
        if padding is not None and not filled:
            pads = padding[:, total - new :]
            own = query is key
            key_value = _on_each(lambda t: finite_padding(t, pads, batch_first), key, key, value)[1:]
            query, key, value = (key_value[0] if own else query, *key_value)
        if filled:
            q, k, v = self._heads(self._project_query(query), batch_first), cache.key, cache.value
        else:
            q, k, v = (self._heads(t, batch_first) for t in self._projections(query, key, value))
            if isinstance(cache, KeyValueCache):
                k, v = cache.append(k, v)
            else:
                k, v = k.contiguous(), v.contiguous()
                cache.fill(k, v)
        assert k is not None
        assert v is not None
        if causal is not None:
            hidden = causal if hidden is None else hidden | causal
        if hidden is not None:
            if hidden.dim() == 3:  # heads have rows of their own
                hidden = hidden.expand(query.shape[0 if batch_first else 1], *hidden.shape).flatten(0, 1)
            additive = [given for given in (padding, mask) if given is not None and given.dtype != torch.bool]
            if additive:
                hidden = additive_mask(hidden, additive[0].dtype)
            mask = hidden if mask is None else hidden | mask if hidden.dtype == torch.bool else hidden + mask
        call = (need_weights, average_attn_weights, batched, batch_first)
        if first and mask is not None and not need_weights:  # nobody sees what lies before: do not read it
            k, v, mask = k[:, :, first:], v[:, :, first:], mask[..., first:]
            padding = padding[:, first:] if padding is not None else None
        return self._attend(q, k, v, padding, mask, False, None, *call)

    def _query_refusal(self, query: Tensor, cache: Any, batched: bool, batch_first: bool) -> str | None:
        """Why a query does not fit the memory that was projected before."""
        if query.dim() not in (2, 3) or query.shape[-1] != self.embed_dim:
            return f"query must be 2-D or 3-D with {self.embed_dim} features; got {tuple(query.shape)}"
        batch = query.shape[0 if batch_first else 1] if batched else 1
        held = cache.key.shape[0]
        return None if batch == held else f"query must have the batch size {held} of the cached memory; got {batch}"

    def _mask_refusal(
        self,
        query: Tensor,
        padding: Tensor | None,
        mask: Tensor | None,
        total: int,
        batched: bool,
        batch_first: bool,
    ) -> str | None:
        """Why masks do not fit `total` positions, cached and new."""
        batch = query.shape[0 if batch_first else 1] if batched else 1
        length = query.shape[1 if batch_first else 0] if batched else query.shape[0]
        shape: tuple[int, ...] = (batch, total) if batched else (total,)
        if padding is not None and tuple(padding.shape) != shape:
            return f"key_padding_mask must have shape {shape}, cached positions included; got {tuple(padding.shape)}"
        shapes = ((length, total), (batch * self.num_heads, length, total))
        if mask is not None and tuple(mask.shape) not in shapes:
            return f"attn_mask must have shape {shapes[0]}, cached positions included; got {tuple(mask.shape)}"
        return None

    def _project_query(self, query: Tensor) -> Tensor:
        weight = self.in_proj_weight[: self.embed_dim] if self._qkv_same_embed_dim else self.q_proj_weight
        bias = self.in_proj_bias[: self.embed_dim] if self.in_proj_bias is not None else None
        return linear(query, weight, bias).unflatten(-1, (self.num_heads, self.head_dim))

    def _refusal(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        padding: Tensor | None,
        mask: Tensor | None,
        is_causal: bool,
        mask_is_unused: bool,
    ) -> str | None:
        """Why the arguments do not fit together; torch, given the same, finds the words."""
        if query.is_nested or key.is_nested or value.is_nested:
            raise AssertionError(
                "pyseqnet MultiheadAttention does not support NestedTensor: pass padded tensors and a key_padding_mask"
            )
        dims = query.dim()
        if dims not in (2, 3) or key.dim() != dims or value.dim() != dims:
            return f"query, key and value must all be 2-D or all 3-D; got {dims}-D, {key.dim()}-D and {value.dim()}-D"
        if is_causal and mask is None:
            return "is_causal is a hint about attn_mask, which is missing"
        sequence, batch = (1, 0) if self.batch_first else (0, 1)
        batches = (1, 1, 1) if dims == 2 else (query.shape[batch], key.shape[batch], value.shape[batch])
        lengths = [t.shape[sequence if dims == 3 else 0] for t in (query, key, value)]
        features = (query.shape[-1], key.shape[-1], value.shape[-1])
        wanted = (self.embed_dim, self.kdim, self.vdim)
        if features != wanted:
            return f"query, key and value must have {wanted} features; got {features}"
        if batches[1] != batches[0] or batches[2] != batches[0]:
            return f"query, key and value must have the same batch size; got {batches}"
        if lengths[1] != lengths[2]:
            return f"key and value must be equally long; got {lengths[1]} and {lengths[2]}"
        if padding is not None:
            shape = (lengths[1],) if dims == 2 else (batches[0], lengths[1])
            if tuple(padding.shape) != shape:
                return f"key_padding_mask must have shape {shape}; got {tuple(padding.shape)}"
        if mask is not None:
            if mask.dim() not in (2, 3):
                return f"attn_mask must be 2-D or 3-D; got {mask.dim()}-D"
            heads = () if mask.dim() == 2 else (batches[0] * self.num_heads,)
            shape = (*heads, lengths[0], lengths[1])
            if tuple(mask.shape) != shape and (not mask_is_unused or (dims == 2 and heads)):
                return f"attn_mask must have shape {shape}; got {tuple(mask.shape)}"
        return None

    def _projections(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """query, key and value through their weights, each (.., .., H, D)."""
        size, heads, bias = self.embed_dim, (self.num_heads, self.head_dim), self.in_proj_bias
        if self._qkv_same_embed_dim and key is value:
            if query is key:
                q, k, v = linear(query, self.in_proj_weight, bias).unflatten(-1, (3, *heads)).unbind(-3)
                return q, k, v
            weight_q, weight_kv = self.in_proj_weight.split([size, 2 * size])
            bias_q, bias_kv = bias.split([size, 2 * size]) if bias is not None else (None, None)
            k, v = linear(key, weight_kv, bias_kv).unflatten(-1, (2, *heads)).unbind(-3)
            return linear(query, weight_q, bias_q).unflatten(-1, heads), k, v
        weights = (
            self.in_proj_weight.chunk(3)
            if self._qkv_same_embed_dim
            else (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        )
        biases = bias.chunk(3) if bias is not None else (None, None, None)
        q, k, v = (linear(*of).unflatten(-1, heads) for of in zip((query, key, value), weights, biases, strict=True))
        return q, k, v

    def _with_extra_keys(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, int]:
        """Appends the learned key and value of `add_bias_kv` and the zeros of `add_zero_attn`; says how many."""
        keys, values = [k], [v]
        shape = (k.shape[0], self.num_heads, 1, self.head_dim)
        if self.bias_k is not None and self.bias_v is not None:
            for parts, row in ((keys, self.bias_k), (values, self.bias_v)):  # (1, 1, E)
                parts.append(row.to(k.dtype).view(1, self.num_heads, 1, self.head_dim).expand(shape))
        if self.add_zero_attn:
            keys.append(k.new_zeros(shape))
            values.append(v.new_zeros(shape))
        if len(keys) == 1:
            return k, v, 0
        return torch.cat(keys, 2), torch.cat(values, 2), len(keys) - 1
