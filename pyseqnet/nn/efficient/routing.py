"""Routing Transformer: attention within clusters that an online k-means keeps."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from pyseqnet import functional as F
from pyseqnet.nn.efficient.base import MultiheadMixer, positive


class RoutingAttention(MultiheadMixer):
    """Each of `clusters` centroids takes the `window` queries and the `window` keys nearest to it; they attend to each
    other. Balanced: every cluster has the same size, and a token may be in none or in several.

    Equivalent to::

        for centroid in centroids[h]:                                      # unit vectors, (num_heads, clusters, D)
            i = topk(normalize(q) @ centroid, window).indices              # j alike, of the keys
            out[i] += attention(q[i], k[j], v[j], mask=pos[i] >= pos[j] if causal)
        out /= number of clusters that each query is in

    A query in no cluster gives the output projection's bias. One cluster with a window of the whole length is dense
    attention. Pairs computed: ``clusters * window**2``; the paper takes ``window = L / clusters``, with about sqrt(L)
    clusters. ``window=None``: ``ceil(L / clusters)``. A window beyond the length is the length.

    Centroids are a buffer, drawn from `seed`; a forward pass in training moves each by ``1 - decay`` towards the mean
    of the queries and keys nearest to it. No gradient flows through the choice. Causal, a later token changes no
    earlier output but by taking another's place in a cluster. Padded tokens are taken last, and never seen.

    >>> layer = RoutingAttention(8, 2, batch_first=True, clusters=4)
    >>> x = torch.randn(3, 50, 8)
    >>> layer(x, x, x, is_causal=True)[0].shape
    torch.Size([3, 50, 8])

    Paper: Roy, Saffar, Vaswani, Grangier: Efficient content-based sparse attention with Routing Transformers, 2021.
    """

    centroids: Tensor

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        batch_first: bool = False,
        *,
        clusters: int = 8,
        window: int | None = None,
        decay: float = 0.999,
        seed: int = 0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(embed_dim, num_heads, dropout, bias, batch_first, device=device, dtype=dtype)
        positive(clusters=clusters, **({} if window is None else {"window": window}))
        if not 0.0 <= decay <= 1.0:
            raise ValueError(f"decay must be between 0 and 1, got {decay}")
        self.clusters, self.window, self.decay = clusters, window, decay
        generator = torch.Generator().manual_seed(seed)
        drawn = normalize(
            torch.randn(num_heads, clusters, self.head_dim, generator=generator, dtype=torch.float64), dim=2
        )
        self.register_buffer("centroids", drawn.to(device=device, dtype=dtype or torch.get_default_dtype()))

    @torch.no_grad()
    def update(self, points: Tensor, counted: Tensor | None = None) -> None:
        """One step of k-means: unit vectors (B, H, N, D) move the centroids; ``counted`` (B, 1, N) says which count."""
        nearest = (points @ self.centroids.transpose(1, 2)).argmax(3)
        member = one_hot(nearest, self.clusters).to(points.dtype)
        if counted is not None:
            member = member * counted.unsqueeze(3)
        sums = torch.einsum("bhnc,bhnd->hcd", member, points)
        moved = normalize(self.decay * self.centroids + (1 - self.decay) * normalize(sums, dim=2), dim=2)
        self.centroids.copy_(torch.where(member.sum((0, 2)).unsqueeze(2) > 0, moved, self.centroids))

    def _taken(self, unit: Tensor, hidden: Tensor | None, window: int) -> Tensor:
        """Which positions each cluster takes, ascending: (B, H, C, window)."""
        affinity = self.centroids @ unit.transpose(2, 3)
        if hidden is not None:
            affinity = affinity.masked_fill(hidden[:, None, None, :], -math.inf)
        return affinity.topk(window, 3).indices.sort(3).values

    def _attend(self, heads: tuple[Tensor, ...], padding: Tensor | None, causal: bool) -> Tensor:
        query, key, value = heads
        length = query.shape[2]
        if not query.numel():
            return query * 0.0
        window = min(-(-length // self.clusters) if self.window is None else self.window, length)
        with torch.no_grad():
            q, k = (normalize(t, dim=3) for t in (query, key))
            rows, columns = self._taken(q, padding, window), self._taken(k, padding, window)
            mask = None
            if padding is not None:
                mask = ~padding[:, None, None, :].expand(*columns.shape[:3], -1).gather(3, columns).unsqueeze(3)
            if causal:
                earlier = rows.unsqueeze(4) >= columns.unsqueeze(3)
                mask = earlier if mask is None else earlier & mask
            if self.training:
                counted = None if padding is None else ~torch.cat([padding, padding], 1).unsqueeze(1)
                self.update(torch.cat([q, k], 2), counted)

        def taken(t: Tensor, at: Tensor) -> Tensor:
            index = at.flatten(2).unsqueeze(3).expand(-1, -1, -1, t.shape[3])
            return t.gather(2, index).unflatten(2, at.shape[2:])

        within = F.scaled_dot_product_attention(
            taken(query, rows), taken(key, columns), taken(value, columns), mask, self._dropout_p
        ).flatten(2, 3)
        index = rows.flatten(2)
        output = torch.zeros_like(query).scatter_add(2, index.unsqueeze(3).expand_as(within), within)
        times = query.new_zeros(query.shape[:3]).scatter_add(2, index, query.new_ones(()).expand_as(index))
        return output / times.clamp(min=1).unsqueeze(3)
