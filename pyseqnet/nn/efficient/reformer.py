"""Reformer: attention of tokens that hash alike."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from pyseqnet import functional as F
from pyseqnet.functional._common import accumulation_dtype
from pyseqnet.nn.efficient.base import MultiheadMixer, positive

SELF_SCORE = -5e4  # added to a token's score with itself: it counts only where nothing else is seen (the authors')
MOST_BUCKETS = 512


def hash_vectors(x: Tensor, rotations: Tensor) -> Tensor:
    """Angular LSH: ``argmax([x R; -x R])`` of x (..., N, D) for every round of R (rounds, D, n): (..., rounds, N)."""
    rotated = x.float().unsqueeze(-3) @ rotations.float()  # in one dtype, so that rounding a layer moves few tokens
    return torch.cat([rotated, -rotated], -1).argmax(-1)


def _before(chunks: Tensor, fill: float) -> Tensor:
    """Each chunk (.., C, m, ...) of dim 3 behind the chunk before it: (.., C, 2m, ...)."""
    earlier = torch.full_like(chunks[:, :, :, :1], fill)
    return torch.cat([torch.cat([earlier, chunks[:, :, :, :-1]], 3), chunks], 4)


class ReformerAttention(MultiheadMixer):
    """LSH attention with shared queries and keys.

    Each round hashes the tokens into buckets by random rotations, sorts them by bucket and position, and cuts the
    order into chunks of `bucket_size`; a token sees those of its own bucket in its chunk and the one before
    (``attend_across_buckets=True``: of every bucket). Equivalent to::

        k = normalize(q)                                                    # shared: k is q / |q|
        seen = union over rounds of (same bucket and neighbouring chunks)
        scores = q @ k.T / sqrt(D);  scores[i, i] -= 5e4                    # itself, only where it is alone
        softmax(scores.masked_fill(~seen, -inf)) @ v

    Rounds are merged by their log-sum-exp, and a pair that was met in n rounds is counted once. So with one chunk for
    all (``bucket_size`` at least the length, ``attend_across_buckets``), or rounds without end, this is dense attention
    with shared queries and keys. Pairs computed: ``n_hashes * L * 2 * bucket_size``.

    ``rotations`` is a buffer, drawn from `seed`: the layer is a function of its input. No gradient flows through the
    hashing. Causal, a later token changes no earlier output but by shifting the bounds of chunks.

    >>> layer = ReformerAttention(8, 2, batch_first=True, bucket_size=8, n_hashes=2)
    >>> x = torch.randn(3, 50, 8)
    >>> layer(x, x, x, is_causal=True)[0].shape
    torch.Size([3, 50, 8])

    Paper: Kitaev, Kaiser, Levskaya: Reformer: The efficient Transformer, 2020.
    """

    projections = 2  # what is query and key at once, and the value
    rotations: Tensor

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        batch_first: bool = False,
        *,
        bucket_size: int = 64,
        n_hashes: int = 4,
        attend_across_buckets: bool = False,
        seed: int = 0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(embed_dim, num_heads, dropout, bias, batch_first, device=device, dtype=dtype)
        positive(bucket_size=bucket_size, n_hashes=n_hashes)
        self.bucket_size, self.n_hashes, self.attend_across_buckets = bucket_size, n_hashes, attend_across_buckets
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(n_hashes, self.head_dim, MOST_BUCKETS // 2, generator=generator, dtype=torch.float64)
        self.register_buffer("rotations", drawn.to(device=device, dtype=dtype or torch.get_default_dtype()))

    def _seen(
        self, order: Tensor, place: Tensor, buckets: Tensor, hidden: Tensor, causal: bool
    ) -> tuple[Tensor, Tensor]:
        """Of chunked pairs (B, H, R, C, m, 2m): whether they are seen in their round, and in how many rounds."""
        rounds, size = order.shape[2], self.bucket_size
        token = order.unflatten(3, (-1, size))
        other = _before(token, -1)
        i, j = token.unsqueeze(5), other.unsqueeze(4)

        def of(table: Tensor, at: Tensor) -> Tensor:
            """table (B, H, N) at tokens (B, H, R, C, n)."""
            return table.gather(2, at.clamp(min=0).flatten(2)).view_as(at)

        count = torch.zeros(*token.shape, 2 * size, dtype=torch.int32, device=order.device)
        own = torch.zeros_like(count, dtype=torch.bool)
        for r in range(rounds):
            chunk = place[:, :, r] // size
            mine, theirs = of(chunk, token).unsqueeze(5), of(chunk, other).unsqueeze(4)
            met = (theirs == mine) | (theirs == mine - 1)
            if not self.attend_across_buckets:
                met &= of(buckets[:, :, r], token).unsqueeze(5) == of(buckets[:, :, r], other).unsqueeze(4)
            count += met
            own[:, :, r] = met[:, :, r]
        allowed = (j >= 0) & ((j == i) | ~of(hidden.expand(-1, order.shape[1], -1), other).unsqueeze(4))
        if causal:
            allowed &= j <= i
        return own & allowed, count

    def _attend(self, heads: tuple[Tensor, ...], padding: Tensor | None, causal: bool) -> Tensor:
        shared, value = heads
        batch, _, length, _ = shared.shape
        if not shared.numel():
            return value
        size = self.bucket_size
        missing = -length % size
        shared, value = (pad(t, (0, 0, 0, missing)) for t in (shared, value))
        total = length + missing
        hidden = torch.arange(total, device=shared.device).expand(batch, 1, total) >= length
        if padding is not None:
            hidden = hidden | pad(padding, (0, missing)).unsqueeze(1)
        with torch.no_grad():
            half = min(-(-total // (2 * size)), MOST_BUCKETS // 2)
            buckets = hash_vectors(shared.detach(), self.rotations[:, :, :half])
            last = torch.where(hidden.unsqueeze(2), 2 * half, buckets)  # padding behind all
            order = last.argsort(dim=3, stable=True)
            place = order.argsort(3)
            seen, count = self._seen(order, place, buckets, hidden, causal)
            wide = accumulation_dtype(shared.dtype)
            mask = torch.where(seen, -count.clamp(min=1).to(wide).log(), -math.inf)
            token = order.unflatten(3, (-1, size))
            mask += SELF_SCORE * (token.unsqueeze(5) == _before(token, -1).unsqueeze(4))

        def sorted_chunks(t: Tensor) -> Tensor:
            rows = t.unsqueeze(2).expand(-1, -1, self.n_hashes, -1, -1)
            return rows.gather(3, order.unsqueeze(4).expand_as(rows)).unflatten(3, (-1, size))

        q = sorted_chunks(shared)
        k, v = _before(normalize(q, dim=-1), 0.0), _before(sorted_chunks(value), 0.0)
        out, lse = F.scaled_dot_product_attention(q, k, v, mask, self._dropout_p, return_lse=True)
        back = place.unsqueeze(4)
        out = out.flatten(3, 4).gather(3, back.expand(-1, -1, -1, -1, out.shape[-1]))
        share = lse.flatten(3, 4).gather(3, place).softmax(2).unsqueeze(4).to(out.dtype)
        return (out * share).sum(2)[:, :, :length]
