"""Fewer keys and values than queries: Linformer's learned matrices, and memory-compressed attention's convolution."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.functional import pad

from pyseqnet import functional as F
from pyseqnet.masks import Pattern
from pyseqnet.nn.conv import Conv1d
from pyseqnet.nn.efficient.base import MultiheadMixer, positive, visible_keys


class LinformerAttention(MultiheadMixer):
    """Linformer: keys and values are projected along the positions, from S to `k` rows; L x k scores instead of L x S.

    Equivalent to::

        attention(Q, E[:, :S] @ K, F[:, :S] @ V)     # for each head; E, F (k, seq_len), shared by the heads

    ``key_projection`` is E, ``value_projection`` F (None with ``share_kv``: E serves both). With identities in place of
    both, ``k = seq_len = S``, it is `MultiheadAttention`. Every compressed key mixes all positions, so the layer cannot
    be causal. Padded positions count as zero keys and zero values. At most ``seq_len`` keys.

    >>> layer = LinformerAttention(8, 2, batch_first=True, seq_len=64, k=16)
    >>> x = torch.zeros(3, 50, 8)
    >>> layer(x, x, x)[0].shape
    torch.Size([3, 50, 8])

    Paper: Wang, Li, Khabsa, Fang, Ma: Linformer: Self-attention with linear complexity, 2020.
    """

    never_causal = "each compressed key mixes all positions"
    self_attention = False
    value_projection: Parameter | None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        batch_first: bool = False,
        *,
        seq_len: int = 512,
        k: int = 128,
        share_kv: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(embed_dim, num_heads, dropout, bias, batch_first, device=device, dtype=dtype)
        positive(seq_len=seq_len, k=k)
        self.seq_len, self.k = seq_len, k

        def drawn() -> Parameter:  # N(0, 1/k), of the Johnson-Lindenstrauss lemma that the paper builds on
            return Parameter(torch.randn(k, seq_len, device=device, dtype=dtype) * k**-0.5)

        self.key_projection = drawn()
        self.register_parameter("value_projection", None if share_kv else drawn())

    def _attend(self, heads: tuple[Tensor, ...], padding: Tensor | None, causal: bool) -> Tensor:
        query, key, value = heads
        keys = key.shape[2]
        if keys > self.seq_len:
            self._refuse(f"made for at most seq_len={self.seq_len} keys; got {keys}")
        if padding is not None:
            hole = padding[:, None, :, None]
            key, value = key.masked_fill(hole, 0.0), value.masked_fill(hole, 0.0)
        e = self.key_projection
        f = e if self.value_projection is None else self.value_projection
        output: Tensor = F.scaled_dot_product_attention(
            query, e[:, :keys] @ key, f[:, :keys] @ value, dropout_p=self._dropout_p
        )
        return output


class CompressedCausal(Pattern):
    """Query ``i`` sees compressed key ``j``, made of positions ``j * factor .. j * factor + factor - 1``, where all of
    these are ``<= i``."""

    def __init__(self, factor: int) -> None:
        positive(factor=factor)
        self.factor = factor
        self._seal()

    def _arguments(self) -> tuple[Any, ...]:
        return (self.factor,)

    def _visible(self, i: Tensor, j: Tensor, length: int, keys: int) -> Tensor:
        return (j + 1) * self.factor <= i + 1

    def _classify(
        self, i: tuple[Tensor, Tensor], j: tuple[Tensor, Tensor], length: int, keys: int
    ) -> tuple[Tensor, Tensor]:
        return self._visible(i[1], j[0], length, keys), self._visible(i[0], j[1], length, keys)


class MemoryCompressedAttention(MultiheadMixer):
    """Memory-compressed attention: a strided convolution makes one key and value of every ``factor``.

    Equivalent to::

        attention(Q, conv_k(K), conv_v(V))           # Conv1d(E, E, factor, stride=factor, groups=num_heads)

    The last group is filled up with zeros. Causal, query i sees the groups that end at or before i: the first
    ``factor - 1`` queries see none and give the output projection's bias. (Used beside local attention, as in the
    paper.) A group of padded positions only takes no part; in others they count as zeros. With ``factor=1`` and
    convolutions that are the identity it is `MultiheadAttention`.

    >>> layer = MemoryCompressedAttention(8, 2, batch_first=True, factor=3)
    >>> x = torch.zeros(3, 50, 8)
    >>> layer(x, x, x, is_causal=True)[0].shape
    torch.Size([3, 50, 8])

    Paper: Liu, Saleh, Pot, Goodrich, Sepassi, Kaiser, Shazeer: Generating Wikipedia by summarizing long sequences,
    2018.
    """

    self_attention = False

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        batch_first: bool = False,
        *,
        factor: int = 3,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(embed_dim, num_heads, dropout, bias, batch_first, device=device, dtype=dtype)
        positive(factor=factor)
        self.factor = factor
        shape = (embed_dim, embed_dim, factor, factor)
        self.key_conv = Conv1d(*shape, groups=num_heads, bias=bias, device=device, dtype=dtype)
        self.value_conv = Conv1d(*shape, groups=num_heads, bias=bias, device=device, dtype=dtype)

    def _attend(self, heads: tuple[Tensor, ...], padding: Tensor | None, causal: bool) -> Tensor:
        query, key, value = heads
        keys = key.shape[2]
        if not keys:  # torch's convolution wants one window at least
            return query * 0.0
        groups = -(-keys // self.factor)
        missing = groups * self.factor - keys
        if padding is not None:
            hole = padding[:, None, :, None]
            key, value = key.masked_fill(hole, 0.0), value.masked_fill(hole, 0.0)
            padding = pad(padding, (0, missing), value=True).unflatten(1, (groups, self.factor)).all(2)

        def compressed(t: Tensor, conv: Conv1d) -> Tensor:
            channels = pad(t.transpose(2, 3).flatten(1, 2), (0, missing))  # (B, H * D, S)
            return conv(channels).unflatten(1, (self.num_heads, self.head_dim)).transpose(2, 3)

        output: Tensor = F.scaled_dot_product_attention(
            query,
            compressed(key, self.key_conv),
            compressed(value, self.value_conv),
            visible_keys(padding),
            self._dropout_p,
            pattern=CompressedCausal(self.factor) if causal else None,
        )
        return output
