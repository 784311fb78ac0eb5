"""What every attention pattern of `pyseqnet.masks` is: the base class, its combinations, and what was compiled."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from operator import index
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from pyseqnet._compilers import constant_result
from pyseqnet._pattern_tiles import BLOCK, compiled_tiles

_ALIGNMENTS = ("top_left", "bottom_right")
KEPT_A_PATTERN, _KEPT_IN_ALL = 8, 32  # compiled shapes


class Pattern(ABC):
    """Which keys each query sees. Patterns are immutable, hashable and equal by what they say."""

    _token: str  # tells patterns apart; an attribute, so that torch.compile can guard on it
    heads: int | None = None  # query heads that have patterns of their own; None: one for all
    depends_on_surplus = False  # whether something is aligned bottom-right
    _small = True  # made of a few numbers, so that equal patterns may share what was compiled

    # --- what a kind of pattern says ---

    @abstractmethod
    def _arguments(self) -> tuple[Any, ...]:
        """What makes two patterns of this class equal."""

    @abstractmethod
    def _visible(self, i: Tensor, j: Tensor, length: int, keys: int) -> Tensor:
        """Whether queries i see keys j (int64, broadcasting). Positions may lie past length and keys."""

    @abstractmethod
    def _classify(
        self, i: tuple[Tensor, Tensor], j: tuple[Tensor, Tensor], length: int, keys: int
    ) -> tuple[Tensor, Tensor]:
        """Of tiles from queries i[0] to i[1] and keys j[0] to j[1], inclusive: which may hold a visible pair, and which
        hold nothing else. Doubtful tiles are looked at pair by pair."""

    def _bits(self, i0: Tensor, j0: Tensor, length: int, keys: int) -> Tensor:
        """The pairs (n, 64, 64) of tiles that begin at i0 and j0 (n)."""
        offset = torch.arange(BLOCK)
        return self._visible(
            i0[:, None, None] + offset[:, None], j0[:, None, None] + offset[None, :], length, keys
        ).expand(i0.shape[0], BLOCK, BLOCK)

    def _signature(self, i0: Tensor, j0: Tensor, length: int, keys: int) -> Tensor | None:
        """Integers (n, any) that agree only for tiles with the same pairs; None: look at every tile."""
        return None

    def _of_head(self, head: int) -> Pattern:
        return self

    def _check(self, length: int, keys: int) -> None:  # noqa: B027 (most patterns fit any extents)
        """Raises where the pattern was made for other extents."""

    # --- what all have ---

    def _seal(self) -> None:
        """The last step of every constructor."""
        words = (a._token if isinstance(a, Pattern) else repr(a) for a in self._arguments())
        self._token = f"{type(self).__name__}({', '.join(words)})"
        self._compiled: dict[str, tuple[Tensor, ...]] = {}

    def __and__(self, other: Pattern) -> Pattern:
        return And(self, other) if isinstance(other, Pattern) else NotImplemented

    def __or__(self, other: Pattern) -> Pattern:
        return Or(self, other) if isinstance(other, Pattern) else NotImplemented

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Pattern) and self._token == other._token

    def __hash__(self) -> int:
        return hash(self._token)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(map(repr, self._arguments()))})"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_compiled": {}}

    def to_dense(self, L: int, S: int, device: torch.device | str | None = None) -> Tensor:
        """The bool mask ``(L, S)``, of a pattern with heads ``(H, L, S)``: True takes part."""
        length, keys = extent("L", L), extent("S", S)
        self._check(length, keys)
        i, j = torch.arange(length).unsqueeze(1), torch.arange(keys).unsqueeze(0)
        if self.heads is None:
            return self._visible(i, j, length, keys).expand(length, keys).contiguous().to(device)
        heads = [self._of_head(h)._visible(i, j, length, keys).expand(length, keys) for h in range(self.heads)]
        return torch.stack(heads).to(device)

    def compile(
        self,
        L: int,
        S: int,
        *,
        heads: int = 1,
        device: torch.device | str | None = None,
    ) -> tuple[Tensor, ...]:
        """The tensors of kernels/attention/attention_blocks.h for ``L`` queries and ``S`` keys, on the device:
        row_begin, row_entries, column_begin, column_entries, row_order, column_order, bits. Kept for the next call."""
        # index: under torch.compile lists are made for known extents only.
        return self._compiled[self._prepare(index(L), index(S), index(heads), str(device or "cpu"))]

    # Compilers take its result for a constant, and find the tensors in a dictionary that the pattern holds: so they
    # guard on both, and on the token.
    @constant_result
    def _prepare(self, length: int, keys: int, heads: int, device: str) -> str:
        """Sees to it that a shape is compiled; its name in `_compiled`."""
        if self.heads is not None and self.heads != heads:
            raise ValueError(f"pattern has {self.heads} heads, query {heads}")
        name = f"{int(length)} {int(keys)} {device}"
        equals = (self._token, name)
        found = self._compiled.get(name)
        if found is None and self._small:
            found = compiled_of_equals.get(equals)
        if found is None:
            self._check(int(length), int(keys))
            patterns = [self] if self.heads is None else [self._of_head(h) for h in range(self.heads)]
            # Real tensors, made of numbers alone, for whoever traces (torch.export) or counts.
            with _disable_current_modes():
                found = tuple(t.to(device) for t in compiled_tiles(patterns, int(length), int(keys)))
        keep(self._compiled, name, found, KEPT_A_PATTERN)
        if self._small:
            keep(compiled_of_equals, equals, found, _KEPT_IN_ALL)
        return name


compiled_of_equals: dict[tuple[str, str], tuple[Tensor, ...]] = {}


def keep(cache: dict[Any, Any], name: Any, value: Any, most: int) -> None:
    cache.pop(name, None)
    cache[name] = value  # the last now
    while len(cache) > most:
        del cache[next(iter(cache))]


# --- checks ---------------------------------------------------------------------------------------------------------


def extent(name: str, value: Any) -> int:
    return integer(name, value, 0)


def integer(name: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return value


def alignment(align: Any) -> str:
    if align not in _ALIGNMENTS:
        raise ValueError(f"align must be 'top_left' or 'bottom_right', got {align!r}")
    return str(align)


def bool_tensor(name: str, value: Any, what: str) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a bool tensor, got {type(value).__name__}")
    if value.dtype != torch.bool:
        raise TypeError(f"{name} must be bool, got {value.dtype}")
    if value.dim() not in (2, 3):
        raise ValueError(f"{name} must have shape {what}, got {tuple(value.shape)}")
    return value.detach().to("cpu", copy=True).contiguous()


def digest(tensor: Tensor) -> str:
    return hashlib.sha1(tensor.numpy().tobytes(), usedforsecurity=False).hexdigest()[:16]


# --- combinations ---------------------------------------------------------------------------------------------------


class _Pair(Pattern):
    """Two patterns; where both have heads, as many."""

    _sign = ""

    def __init__(self, left: Pattern, right: Pattern) -> None:
        if left.heads is not None and right.heads is not None and left.heads != right.heads:
            raise ValueError(f"patterns of {left.heads} and {right.heads} heads cannot be combined")
        self.left, self.right = left, right
        self.heads = left.heads if left.heads is not None else right.heads
        self._small = left._small and right._small
        self._seal()

    @property
    def depends_on_surplus(self) -> bool:  # type: ignore[override]
        return self.left.depends_on_surplus or self.right.depends_on_surplus

    def _arguments(self) -> tuple[Any, ...]:
        return self.left, self.right

    def __repr__(self) -> str:
        return f"({self.left!r} {self._sign} {self.right!r})"

    @abstractmethod
    def _combine(self, a: Tensor, b: Tensor) -> Tensor: ...

    def _of_head(self, head: int) -> Pattern:
        return type(self)(self.left._of_head(head), self.right._of_head(head))

    def _check(self, length: int, keys: int) -> None:
        self.left._check(length, keys)
        self.right._check(length, keys)

    def _visible(self, i: Tensor, j: Tensor, length: int, keys: int) -> Tensor:
        return self._combine(self.left._visible(i, j, length, keys), self.right._visible(i, j, length, keys))

    def _bits(self, i0: Tensor, j0: Tensor, length: int, keys: int) -> Tensor:
        return self._combine(self.left._bits(i0, j0, length, keys), self.right._bits(i0, j0, length, keys))

    def _classify(
        self, i: tuple[Tensor, Tensor], j: tuple[Tensor, Tensor], length: int, keys: int
    ) -> tuple[Tensor, Tensor]:
        a, b = self.left._classify(i, j, length, keys), self.right._classify(i, j, length, keys)
        return self._combine(a[0], b[0]), self._combine(a[1], b[1])

    def _signature(self, i0: Tensor, j0: Tensor, length: int, keys: int) -> Tensor | None:
        a, b = self.left._signature(i0, j0, length, keys), self.right._signature(i0, j0, length, keys)
        return None if a is None or b is None else torch.cat([a, b], 1)


class And(_Pair):
    _sign = "&"

    def _combine(self, a: Tensor, b: Tensor) -> Tensor:
        return a & b


class Or(_Pair):
    _sign = "|"

    def _combine(self, a: Tensor, b: Tensor) -> Tensor:
        return a | b


class _PerHead(Pattern):
    def __init__(self, patterns: tuple[Pattern, ...]) -> None:
        self.patterns = patterns
        self.heads = len(patterns)
        self._small = all(p._small for p in patterns)
        self._seal()

    @property
    def depends_on_surplus(self) -> bool:  # type: ignore[override]
        return any(p.depends_on_surplus for p in self.patterns)

    def _arguments(self) -> tuple[Any, ...]:
        return self.patterns

    def __repr__(self) -> str:
        return f"per_head([{', '.join(map(repr, self.patterns))}])"

    def _of_head(self, head: int) -> Pattern:
        return self.patterns[head]

    def _check(self, length: int, keys: int) -> None:
        for pattern in self.patterns:
            pattern._check(length, keys)

    def _visible(self, i: Tensor, j: Tensor, length: int, keys: int) -> Tensor:
        raise AssertionError("heads are asked one by one")

    def _classify(
        self, i: tuple[Tensor, Tensor], j: tuple[Tensor, Tensor], length: int, keys: int
    ) -> tuple[Tensor, Tensor]:
        raise AssertionError("heads are asked one by one")


def per_head(patterns: Sequence[Pattern]) -> Pattern:
    """A pattern for each query head, in their order."""
    if not isinstance(patterns, (list, tuple)):
        raise TypeError(f"patterns must be a sequence of patterns, got {type(patterns).__name__}")
    if not patterns:
        raise ValueError("patterns must not be empty")
    for n, pattern in enumerate(patterns):
        if not isinstance(pattern, Pattern):
            raise TypeError(f"patterns[{n}] must be a pattern, got {type(pattern).__name__}")
        if pattern.heads is not None:
            raise ValueError(f"patterns[{n}] has heads of its own")
    return _PerHead(tuple(patterns))
