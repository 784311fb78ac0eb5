"""Softmax attention along a pattern of `pyseqnet.masks`, by name: windows, BigBird, heads that differ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pyseqnet.masks import Global, Local, Pattern, RandomBlocks, Strided, per_head
from pyseqnet.nn.attention import MultiheadAttention
from pyseqnet.nn.efficient.base import positive


class LocalAttention(MultiheadAttention):
    """`MultiheadAttention` with ``pattern=Local(window)``: each position sees `window` neighbours to each side.

    Paper: Beltagy, Peters, Cohan: Longformer: The long-document Transformer, 2020.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        batch_first: bool = False,
        *,
        window: int = 128,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        options = {"batch_first": batch_first, "device": device, "dtype": dtype}
        super().__init__(embed_dim, num_heads, dropout, bias, pattern=Local(window), **options)


class BigBirdAttention(MultiheadAttention):
    """BigBird: a window, global tokens at the beginning, and for each block of queries random blocks of keys.

    Equivalent to::

        MultiheadAttention(..., pattern=per_head(
            [Local(window) | Global(global_tokens) | RandomBlocks(random_blocks, block, seed + head) ...]))

    Pairs grow linearly with the length: but for the global tokens, each row holds at most
    ``2 * window + 1 + global_tokens + random_blocks * block``. With no fewer ``random_blocks`` than there are blocks
    it is dense attention.

    Paper: Zaheer et al.: Big Bird: Transformers for longer sequences, 2020.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        batch_first: bool = False,
        *,
        window: int = 96,
        global_tokens: int = 64,
        random_blocks: int = 3,
        block: int = 64,
        seed: int = 0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        always = Local(window) | Global(global_tokens)
        heads = [always | RandomBlocks(random_blocks, block, seed + head) for head in range(num_heads)]
        options = {"batch_first": batch_first, "device": device, "dtype": dtype}
        super().__init__(embed_dim, num_heads, dropout, bias, pattern=per_head(heads), **options)


def _default_mixture() -> list[Pattern]:
    return [Local(32), Local(128) | Global(1), Local(16) | Strided(16), Local(16) | RandomBlocks(2)]


class MixedHeadAttention(MultiheadAttention):
    """`MultiheadAttention` whose heads take turns with `patterns`: head h has number ``h % len(patterns)``.

    ``patterns`` of `pyseqnet.masks`; None: a short window, a long one with a global token, a strided one and a random
    one. Head for head it is dense attention with that head's mask.

    Papers: Child, Gray, Radford, Sutskever: Generating long sequences with sparse Transformers, 2019; Beltagy, Peters,
    Cohan: Longformer, 2020.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        batch_first: bool = False,
        *,
        patterns: Sequence[Pattern] | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        positive(num_heads=num_heads)
        turns = _default_mixture() if patterns is None else list(patterns)
        if not turns:
            raise ValueError("patterns must not be empty")
        heads = per_head([turns[head % len(turns)] for head in range(num_heads)])
        options = {"batch_first": batch_first, "device": device, "dtype": dtype}
        super().__init__(embed_dim, num_heads, dropout, bias, pattern=heads, **options)
