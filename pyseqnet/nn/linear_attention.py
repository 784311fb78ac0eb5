"""Multi-head linear attention as a layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Linear, Module, Parameter
from torch.nn.functional import linear
from torch.nn.init import constant_, xavier_uniform_

from pyseqnet import functional as F
from pyseqnet.functional._linear_attention_call import FeatureMap, State, read_decay
from pyseqnet.nn.cache import RecurrentCache


class LinearAttention(Module):
    """Projections, `pyseqnet.functional.linear_attention` on each head, and a projection of the heads' outputs.

    Parameters are named and initialised as those of `torch.nn.MultiheadAttention`: ``in_proj_weight`` (3*embed_dim,
    embed_dim), or ``q_proj_weight``, ``k_proj_weight``, ``v_proj_weight`` where ``kdim`` or ``vdim`` differ;
    ``in_proj_bias``; ``out_proj``. A state_dict of either fits the other.

    Args:
        embed_dim: size of the queries and of the output; split over the heads.
        num_heads: divides ``embed_dim``.
        bias: whether the projections have one.
        kdim, vdim: sizes of the keys and values; None: ``embed_dim``.
        batch_first: tensors are ``(N, L, embed_dim)`` rather than ``(L, N, embed_dim)``.
        feature_map, causal, normalize, decay, scale, eps: as in `pyseqnet.functional.linear_attention`. A module as
            ``feature_map`` is registered, and its parameters are trained. ``decay`` stays float64 and is not in the
            state_dict; a `torch.nn.Parameter` is registered and trained, and must stay between 0 and 1.

    Shapes of ``forward(query, key=None, value=None)``; ``key`` defaults to ``query``, ``value`` to ``key``:
        query ``(L, N, embed_dim)``, key ``(S, N, kdim)``, value ``(S, N, vdim)`` -> ``(L, N, embed_dim)``; without the
        batch ``(L, embed_dim)`` and so on. ``key_lengths`` (N,): keys beyond are padding, whatever they hold.

    Decoding::

        state = None
        for token in tokens:                      # (N, 1, embed_dim) with batch_first
            out, state = layer(token, initial_state=state, return_state=True)

    Paper: Katharopoulos et al., Transformers are RNNs, 2020.
    """

    in_proj_weight: Parameter | None
    q_proj_weight: Parameter | None
    k_proj_weight: Parameter | None
    v_proj_weight: Parameter | None
    in_proj_bias: Parameter | None
    decay: Tensor | None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        bias: bool = True,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        *,
        feature_map: FeatureMap = "elu",
        causal: bool = False,
        normalize: bool | None = None,
        decay: float | Sequence[float] | Tensor | None = None,
        scale: float | None = None,
        eps: float = 1e-6,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if embed_dim <= 0 or num_heads <= 0:
            raise ValueError(f"embed_dim and num_heads must be positive, got {embed_dim} and {num_heads}")
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim must be divisible by num_heads, got {embed_dim} and {num_heads}")
        if not (isinstance(feature_map, str) or callable(feature_map)):
            raise TypeError(f"feature_map must be a name or a callable, got {type(feature_map).__name__}")
        self.embed_dim, self.num_heads, self.head_dim = embed_dim, num_heads, embed_dim // num_heads
        self.kdim = embed_dim if kdim is None else kdim
        self.vdim = embed_dim if vdim is None else vdim
        self.batch_first = batch_first
        self.feature_map, self.causal, self.normalize = feature_map, causal, normalize
        self.scale, self.eps = scale, eps
        # No buffer: casting the layer to half floats would round it, often to 1.
        constant = None if decay is None else read_decay(decay, torch.empty(0), num_heads).clone()
        if constant is not None and constant.requires_grad and not isinstance(decay, Parameter):
            raise ValueError("decay must be a number for each head, or a Parameter to be trained")
        self.decay = decay if isinstance(decay, Parameter) else constant
        factory = {"device": device, "dtype": dtype}
        names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
        if self.kdim == embed_dim and self.vdim == embed_dim:
            self.in_proj_weight = Parameter(torch.empty(3 * embed_dim, embed_dim, **factory))
            for name in names:
                self.register_parameter(name, None)
        else:
            self.register_parameter("in_proj_weight", None)
            for name, size in zip(names, (embed_dim, self.kdim, self.vdim), strict=True):
                self.register_parameter(name, Parameter(torch.empty(embed_dim, size, **factory)))
        if bias:
            self.in_proj_bias = Parameter(torch.empty(3 * embed_dim, **factory))
        else:
            self.register_parameter("in_proj_bias", None)
        self.out_proj = Linear(embed_dim, embed_dim, bias=bias, **factory)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As `torch.nn.MultiheadAttention`, number for number; like there, out_proj's weight keeps its own."""
        for weight in (self.in_proj_weight, self.q_proj_weight, self.k_proj_weight, self.v_proj_weight):
            if weight is not None:
                xavier_uniform_(weight)
        if self.in_proj_bias is not None:
            constant_(self.in_proj_bias, 0.0)
            constant_(self.out_proj.bias, 0.0)

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        weights: tuple[Any, ...] = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        if self.in_proj_weight is not None:
            if query is key and key is value:
                return linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
            weights = self.in_proj_weight.chunk(3)
        biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        return tuple(linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        *,
        key_lengths: Tensor | None = None,
        initial_state: State | None = None,
        return_state: bool = False,
    ) -> Any:
        key = query if key is None else key
        value = key if value is None else value
        for name, t, size in (("query", query, self.embed_dim), ("key", key, self.kdim), ("value", value, self.vdim)):
            if t.dim() not in (2, 3) or t.dim() != query.dim() or t.shape[-1] != size:
                raise ValueError(
                    f"LinearAttention: {name} must have 2 or 3 dimensions, as query has, the last {size}; got "
                    f"{tuple(t.shape)}"
                )
        batched = query.dim() == 3
        rows = 1 if self.batch_first or not batched else 0
        projected = self._project(query, key, value)
        if not batched:
            projected = tuple(x.unsqueeze(0) for x in projected)
        # (N, L, H*D) or (L, N, H*D) -> (N, H, L, D), a view
        heads = tuple(
            x.unflatten(-1, (self.num_heads, self.head_dim)).permute(*((0, 2, 1, 3) if rows else (1, 2, 0, 3)))
            for x in projected
        )
        if self.decay is not None and not isinstance(self.decay, Parameter) and self.decay.device != query.device:
            self.decay = self.decay.to(query.device)
        result = F.linear_attention(
            *heads,
            feature_map=self.feature_map,
            causal=self.causal,
            normalize=self.normalize,
            decay=self.decay,
            key_lengths=key_lengths,
            initial_state=initial_state,
            return_state=return_state,
            scale=self.scale,
            eps=self.eps,
        )
        out, state = result if return_state else (result, None)
        out = self.out_proj(out.permute(*((0, 2, 1, 3) if rows else (2, 0, 1, 3))).flatten(2))
        if not batched:
            out = out.squeeze(0)
        return (out, state) if return_state else out

    def extra_repr(self) -> str:
        map_name = self.feature_map if isinstance(self.feature_map, str) else ""
        words = f"{self.embed_dim}, {self.num_heads}"
        words += f", feature_map={map_name!r}" if map_name else ""
        words += ", causal=True" if self.causal else ""
        words += f", decay={self.decay.tolist()}" if self.decay is not None else ""
        return words + (", batch_first=True" if self.batch_first else "")


class LinearMultiheadAttention(LinearAttention):
    """`LinearAttention` called as `torch.nn.MultiheadAttention` is: what Transformer layers use for
    ``attention="linear"``.

    ``forward(query, key, value, key_padding_mask=None, need_weights=False, attn_mask=None, average_attn_weights=True,
    is_causal=False, *, cache=None)`` returns ``(output, None)``. There are no weights, so none is returned and none
    dropped (``dropout`` is taken for the sake of the signature). Of masks there is the causal one (``is_causal=True``;
    ``attn_mask`` is then not looked at) and padding at the end (a bool ``key_padding_mask``, True = ignore); others
    raise ValueError.

    A `RecurrentCache` (`new_cache`) makes it decode token by token in constant time and memory.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        *,
        feature_map: FeatureMap = "elu",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(
            embed_dim, num_heads, bias, kdim, vdim, batch_first, feature_map=feature_map, device=device, dtype=dtype
        )
        self.dropout = dropout

    def new_cache(
        self, capacity: int | None = None, batch_size: int | None = None, memory: bool = False
    ) -> RecurrentCache:
        """An empty state; it needs no capacity."""
        if memory:
            raise ValueError("linear attention keeps no memory of an encoder: its cross-attention is computed anew")
        return RecurrentCache()

    def _lengths(self, padding: Tensor | None, query: Tensor, positions: int) -> Tensor | None:
        if padding is None:
            return None
        if padding.dtype != torch.bool:
            raise ValueError("linear attention takes a bool key_padding_mask (True = ignore)")
        padding = padding if query.dim() == 3 else padding.unsqueeze(0)
        lengths = positions - padding.sum(1)
        at = torch.arange(positions, device=padding.device)
        if not torch.compiler.is_compiling() and not torch.equal(padding, at >= lengths.unsqueeze(1)):
            raise ValueError("linear attention takes padding at the end of the keys only")
        return lengths

    def forward(  # type: ignore[override]
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        cache: RecurrentCache | None = None,
    ) -> tuple[Tensor, None]:
        if need_weights:
            raise ValueError("linear attention has no weights to return: need_weights must be False")
        if attn_mask is not None and not is_causal:
            raise ValueError("linear attention takes no attn_mask but the causal one, with is_causal=True")
        sequence = 1 if self.batch_first and query.dim() == 3 else 0
        before, self.causal = self.causal, is_causal
        try:
            if cache is None:
                lengths = self._lengths(key_padding_mask, query, key.shape[sequence])
                output: Tensor = super().forward(query, key, value, key_lengths=lengths)
                return output, None
            if not isinstance(cache, RecurrentCache):
                raise TypeError(f"cache must be a RecurrentCache, got {type(cache).__name__}")
            if key_padding_mask is not None:
                raise ValueError("linear attention with a cache takes no key_padding_mask: what it has seen stays")
            if not is_causal:
                raise ValueError("linear attention with a cache is causal: pass is_causal=True")
            output, state = super().forward(query, key, value, initial_state=cache.state, return_state=True)
            cache.update(state, query.shape[sequence])
            return output, None
        finally:
            self.causal = before
