"""Attention within clusters of queries and keys."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from pyseqnet import functional as F
from pyseqnet.nn.efficient.base import MultiheadMixer, positive


def attention_within_clusters(
    query: Tensor, key: Tensor, value: Tensor, query_labels: Tensor, key_labels: Tensor, clusters: int, **options: Any
) -> Tensor:
    """Query i attends to the keys j with ``key_labels[j] == query_labels[i]``; to none gives 0.

    Equivalent to::

        mask = query_labels.unsqueeze(-1) == key_labels.unsqueeze(-2)
        scaled_dot_product_attention(query, key, value, mask)

    query ``(B, H, L, D)``, key ``(B, H, S, D)``, value ``(B, H, S, E)``, labels ``(B, H, L)`` and ``(B, H, S)``, int64,
    ``0 <= label < clusters``. Queries and keys are sorted by cluster, and each cluster is one packed sequence: the time
    is that of the pairs that share a cluster. ``options`` (dropout_p, scale) are those of the attention.
    """
    groups = query.shape[0] * query.shape[1]
    offset = torch.arange(groups, device=query.device).unsqueeze(1) * clusters

    def packed(labels: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        flat = (labels.reshape(groups, -1) + offset).flatten()
        order = flat.argsort(stable=True)
        begins = flat.new_zeros(groups * clusters + 1)
        begins = begins.scatter_add(0, flat + 1, torch.ones_like(flat)).cumsum(0)
        return order, begins.int(), [t.flatten(0, 2)[order].unsqueeze(1) for t in tensors]

    order, begin_q, (q,) = packed(query_labels, query)
    _, begin_k, (k, v) = packed(key_labels, key, value)
    sorted_output = F.scaled_dot_product_attention(
        q, k, v, cu_seqlens_q=begin_q, cu_seqlens_k=begin_k, **options
    ).squeeze(1)
    output = torch.empty_like(sorted_output).index_copy(0, order, sorted_output)
    return output.unflatten(0, query.shape[:3])


def k_means(points: Tensor, clusters: int, iterations: int, counted: Tensor | None = None) -> Tensor:
    """Labels (..., N) of unit vectors (..., N, D) by spherical k-means, which starts from points at equal distances.

    ``counted`` (..., N): False leaves a point out of the centroids. A cluster that loses all points keeps its centroid.
    """
    first = torch.arange(clusters, device=points.device) * points.shape[-2] // clusters
    centroids = points[..., first, :]
    weight = None if counted is None else counted.to(points.dtype).unsqueeze(-1)
    labels = (points @ centroids.transpose(-1, -2)).argmax(-1)
    for _ in range(iterations):
        member = torch.nn.functional.one_hot(labels, clusters).to(points.dtype)
        sums = (member if weight is None else member * weight).transpose(-1, -2) @ points
        centroids = torch.where((sums != 0).any(-1, keepdim=True), normalize(sums, dim=-1), centroids)
        labels = (points @ centroids.transpose(-1, -2)).argmax(-1)
    return labels


class ClusteredAttention(MultiheadMixer):
    """Queries and keys are clustered together, for each sequence and head; attention stays within clusters.

    Equivalent to::

        labels = k_means(normalize(cat([q, k])), clusters, iterations)
        attention(q, k, v, attn_mask=labels_q[:, None] == labels_k)

    Labels carry no gradient and nothing random. One cluster is dense attention; C clusters of one size cost its C-th
    part, and a k-means of ``iterations * C * (L + S)`` products. A query whose cluster has no key gives the output
    projection's bias. Clusters depend on every position, so the layer cannot be causal. Padded keys are left out.

    >>> layer = ClusteredAttention(8, 2, batch_first=True, clusters=4)
    >>> x = torch.randn(3, 50, 8)
    >>> layer(x, x, x)[0].shape
    torch.Size([3, 50, 8])

    Papers: Vyas, Katharopoulos, Fleuret: Fast Transformers with clustered attention, 2020 (which clusters queries); Roy
    et al.: Routing Transformers, 2021 (both).
    """

    never_causal = "the clusters depend on all positions"
    self_attention = False

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        batch_first: bool = False,
        *,
        clusters: int = 8,
        iterations: int = 5,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(embed_dim, num_heads, dropout, bias, batch_first, device=device, dtype=dtype)
        positive(clusters=clusters, iterations=iterations)
        self.clusters, self.iterations = clusters, iterations

    def _attend(self, heads: tuple[Tensor, ...], padding: Tensor | None, causal: bool) -> Tensor:
        query, key, value = heads
        length, keys = query.shape[2], key.shape[2]
        if not query.numel() or not key.numel():
            return query * 0.0
        with torch.no_grad():
            points = normalize(torch.cat([query, key], 2).float(), dim=-1)
            counted = None
            if padding is not None:
                ones = padding.new_ones(padding.shape[0], length)
                counted = torch.cat([ones if length != keys else ~padding, ~padding], 1).unsqueeze(1)
            clusters = min(self.clusters, length + keys)
            labels_q, labels_k = k_means(points, clusters, self.iterations, counted).split([length, keys], -1)
            if padding is not None:  # a cluster of their own, which no query is in
                labels_k = labels_k.masked_fill(padding.unsqueeze(1), clusters)
        return attention_within_clusters(
            query,
            key,
            value,
            labels_q,
            labels_k,
            clusters + (padding is not None),
            dropout_p=self._dropout_p,
            scale=1 / math.sqrt(self.head_dim),
        )
