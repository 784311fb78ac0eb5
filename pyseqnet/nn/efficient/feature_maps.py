"""Linear attention by its feature map: Performer, random feature attention, and Efficient attention."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import Linear, Module, Parameter
from torch.nn.functional import logsigmoid, normalize, pad

from pyseqnet.nn._attention_masks import finite_padding
from pyseqnet.nn.efficient.base import MixerArguments, positive
from pyseqnet.nn.linear_attention import LinearMultiheadAttention
from pyseqnet.nn.random_features import PositiveRandomFeatures, RandomFourierFeatures

_CHUNK = 64
_EPS = 1e-6


class _Mapped(MixerArguments, LinearMultiheadAttention):
    """Self-attention arguments of `LinearMultiheadAttention`, with what stands in padding kept out of gradients."""

    def forward(  # type: ignore[override]
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None, **options: Any
    ) -> tuple[Tensor, None]:
        self._refuse_causal(bool(options.get("is_causal")))
        if key_padding_mask is not None:
            key_padding_mask = self._hidden(key_padding_mask)
        batch_first = self.batch_first or query.dim() == 2
        clean = finite_padding(key, key_padding_mask, batch_first)
        value = clean if value is key else finite_padding(value, key_padding_mask, batch_first)
        query = clean if query is key else query
        return super().forward(query, clean, value, key_padding_mask, **options)


class PerformerAttention(_Mapped):
    """Performer: softmax attention estimated without bias by positive orthogonal random features (FAVOR+).

    Equivalent to::

        phi(x) = exp(x @ w.T - |x|^2 / 2) / sqrt(m)          # x scaled by D**-0.25; w (m, D) random, orthogonal
        LinearMultiheadAttention(..., feature_map=phi)       # phi(q) . phi(k) is exp(q . k / sqrt(D)) in the mean

    The error falls with ``1 / sqrt(num_features)``. ``num_features``: None for ``D ln D``, the paper's. The projection
    is a buffer, drawn from `seed`; `redraw` draws another. Causal, padded at the end, and decoding with a cache as
    `LinearMultiheadAttention`.

    Paper: Choromanski et al.: Rethinking attention with Performers, 2021.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        batch_first: bool = False,
        *,
        num_features: int | None = None,
        orthogonal: bool = True,
        seed: int = 0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        width = _head_dim(embed_dim, num_heads)
        count = max(1, int(width * math.log(width))) if num_features is None else num_features
        positive(num_features=count)
        phi = PositiveRandomFeatures.draw(
            width,
            count,
            orthogonal=orthogonal,
            generator=torch.Generator().manual_seed(seed),
            device=device,
            dtype=dtype or torch.get_default_dtype(),
        )
        options = {"batch_first": batch_first, "device": device, "dtype": dtype}
        super().__init__(embed_dim, num_heads, dropout, bias, feature_map=phi, **options)

    def redraw(self, generator: torch.Generator | None = None) -> None:
        """Another projection, as a model that trains takes now and then."""
        assert isinstance(self.feature_map, PositiveRandomFeatures)
        self.feature_map.redraw(generator)


def _head_dim(embed_dim: int, num_heads: int) -> int:
    positive(embed_dim=embed_dim, num_heads=num_heads)
    if embed_dim % num_heads:
        raise ValueError(f"embed_dim must be divisible by num_heads, got {embed_dim} and {num_heads}")
    return embed_dim // num_heads


class UnitFourierFeatures(Module):
    """Random Fourier features of ``sigma * x / |x|``, sigma a learned scale of each head and channel."""

    def __init__(self, features: RandomFourierFeatures, heads: int, width: int, device: Any, dtype: Any) -> None:
        super().__init__()
        self.features = features
        self.sigma = Parameter(torch.ones(heads, 1, width, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        mapped: Tensor = self.features(normalize(x, dim=-1) * self.sigma)
        return mapped


def gated_linear_attention(query: Tensor, key: Tensor, value: Tensor, log_gate: Tensor) -> Tensor:
    """Causal linear attention of features that forgets by a gate of each token.

    Equivalent to::

        for t in range(L):                                   # g = exp(log_gate), (B, H, L)
            S = g[t] * S + (1 - g[t]) * outer(key[t], value[t])
            z = g[t] * z + (1 - g[t]) * key[t]
            out[t] = query[t] @ S / (query[t] @ z + eps)

    query and key ``(B, H, L, M)``, value ``(B, H, L, E)``. In chunks of 64: products of gates inside a chunk are at
    most 1, so nothing overflows, however many tokens a gate has closed over.
    """
    length = query.shape[2]
    missing = -length % _CHUNK
    key = key * -torch.expm1(log_gate).unsqueeze(3)
    counted = torch.cat([value, value.new_ones(*value.shape[:3], 1)], 3)  # the last column becomes the normaliser
    q, k, v = (pad(t, (0, 0, 0, missing)).unflatten(2, (-1, _CHUNK)) for t in (query, key, counted))
    total = pad(log_gate, (0, missing)).unflatten(2, (-1, _CHUNK)).cumsum(3)
    later = torch.ones(_CHUNK, _CHUNK, dtype=torch.bool, device=query.device).triu(1)
    between = (total.unsqueeze(4) - total.unsqueeze(3)).masked_fill(later, -math.inf).exp()
    output = ((q @ k.transpose(3, 4)) * between) @ v
    end = total[..., -1:]
    added = (k * (end - total).exp().unsqueeze(4)).transpose(3, 4) @ v
    state, before = torch.zeros_like(added[:, :, 0]), []
    for chunk in range(q.shape[2]):
        before.append(state)
        state = state * end[:, :, chunk].exp().unsqueeze(3) + added[:, :, chunk]
    output = output + (q * total.exp().unsqueeze(4)) @ torch.stack(before, 2)
    output = output.flatten(2, 3)[:, :, :length]
    return output[..., :-1] / (output[..., -1:] + _EPS)


class RandomFeatureAttention(_Mapped):
    """Random feature attention (RFA): queries and keys of length one, and random Fourier features of them.

    Equivalent to::

        y = (sigma * x / |x|) @ w.T                          # w (m, D) random; sigma learned, at first 1
        phi(x) = [cos(y), sin(y)] / sqrt(m)
        LinearMultiheadAttention(..., feature_map=phi)       # phi(q) . phi(k) is exp(-|q - k|^2 / 2) in the mean

    The error falls with ``1 / sqrt(num_features)``. ``gate=True``: each token's gate, ``sigmoid(gate(x))`` for each
    head, says how much of the past stays (`gated_linear_attention`); then it is causal self-attention only, without a
    cache.

    Paper: Peng, Pappas, Yogatama, Schwartz, Smith, Kong: Random feature attention, 2021.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        batch_first: bool = False,
        *,
        num_features: int | None = None,
        gate: bool = False,
        seed: int = 0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        width = _head_dim(embed_dim, num_heads)
        positive(**({} if num_features is None else {"num_features": num_features}))
        drawn = RandomFourierFeatures.draw(
            width,
            num_features or 2 * width,
            scale=1.0,
            generator=torch.Generator().manual_seed(seed),
            device=device,
            dtype=dtype or torch.get_default_dtype(),
        )
        phi = UnitFourierFeatures(drawn, num_heads, width, device, dtype)
        options = {"batch_first": batch_first, "device": device, "dtype": dtype}
        super().__init__(embed_dim, num_heads, dropout, bias, feature_map=phi, **options)
        self.gate = Linear(embed_dim, num_heads, device=device, dtype=dtype) if gate else None

    def forward(  # type: ignore[override]
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None, **options: Any
    ) -> tuple[Tensor, None]:
        if self.gate is None:
            return super().forward(query, key, value, key_padding_mask, **options)
        if not options.get("is_causal") or key is not query or value is not query:
            raise ValueError("RandomFeatureAttention: with a gate it is causal self-attention: pass is_causal=True")
        if options.get("cache") is not None or options.get("need_weights"):
            raise ValueError("RandomFeatureAttention: with a gate there is no cache, and there are no weights")
        batched = query.dim() == 3
        x = finite_padding(query, key_padding_mask, self.batch_first or not batched)
        x = x if batched and self.batch_first else x.transpose(0, 1) if batched else x.unsqueeze(0)
        if key_padding_mask is not None:  # at the end: no real position sees it
            self._lengths(key_padding_mask, query, x.shape[1])
        heads = (t.unflatten(2, (self.num_heads, self.head_dim)).transpose(1, 2) for t in self._project(x, x, x))
        q, k, v = heads
        assert isinstance(self.feature_map, UnitFourierFeatures)
        log_gate = logsigmoid(self.gate(x)).transpose(1, 2)
        output = gated_linear_attention(self.feature_map(q), self.feature_map(k), v, log_gate)
        output = self.out_proj(output.transpose(1, 2).flatten(2))
        return (output if batched and self.batch_first else output.transpose(0, 1) if batched else output[0]), None


class EfficientAttention(_Mapped):
    """Efficient attention: a softmax of each query over its features, and of each key feature over the positions.

    Equivalent to::

        softmax(q, -1) @ (softmax(k, -2).T @ v)              # for each head

    Rows of the implied weights sum to one, so there is no denominator; the time is ``2 L D E`` a head, less than that
    of dense attention where ``L > 2 D E / (D + E)``. A key's weight depends on all positions, so it cannot be causal.

    Paper: Shen, Zhang, Zhao, Yi, Li: Efficient attention: Attention with linear complexities, 2021.
    """

    never_causal = "each key feature is normalised over all positions"

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        batch_first: bool = False,
        *,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        options = {"batch_first": batch_first, "device": device, "dtype": dtype}
        super().__init__(embed_dim, num_heads, dropout, bias, feature_map="softmax", **options)
