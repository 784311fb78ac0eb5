"""What attention keeps while a sequence is decoded token by token: keys and values of the tokens so far.

Three kinds, which `MultiheadAttention` and the Transformer's layers take as ``cache=`` or ``state=``. All are changed
in place by a step, can be reordered for a beam search, and know their length, which is the position of the next token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

FIRST_CAPACITY = 64  # positions; doubled when they are full


class KeyValueCache:
    """Keys and values ``(B, H, S, D)`` and ``(B, H, S, E)`` of the positions so far; grows as it must.

    Room doubles when it is full, so that appending costs constant time a position on average. `PreallocatedCache` never
    moves its memory.

    Where gradients are recorded, what is appended must stay as it was: then the cache is a new tensor in each step
    (`torch.cat`), and a step costs time in proportion to the length.

    >>> cache = KeyValueCache()
    >>> key, value = cache.append(torch.zeros(2, 4, 3, 8), torch.zeros(2, 4, 3, 8))
    >>> cache.length, key.shape
    (3, torch.Size([2, 4, 3, 8]))
    """

    def __init__(self) -> None:
        self._key: Tensor | None = None
        self._value: Tensor | None = None
        self._length = 0

    @property
    def length(self) -> int:
        """How many positions are held: the position of the next token."""
        return self._length

    @property
    def key(self) -> Tensor | None:
        """A view of what was appended, None before the first time."""
        return None if self._key is None else self._key[:, :, : self._length]

    @property
    def value(self) -> Tensor | None:
        return None if self._value is None else self._value[:, :, : self._length]

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Takes in new positions; returns the keys and values of all, as views."""
        self._check(key, value)
        new = self._length + key.shape[2]
        if torch.is_grad_enabled() and any(
            t is not None and t.requires_grad for t in (key, value, self._key, self._value)
        ):
            self._append_recorded(key, value)
        else:
            self._make_room(key, value, new)
            assert self._key is not None
            assert self._value is not None
            self._key[:, :, self._length : new] = key
            self._value[:, :, self._length : new] = value
        self._length = new
        assert self._key is not None
        assert self._value is not None
        return self._key[:, :, :new], self._value[:, :, :new]

    def _check(self, key: Tensor, value: Tensor) -> None:
        if key.dim() != 4 or value.dim() != 4 or key.shape[:3] != value.shape[:3]:
            raise ValueError(
                f"key and value must be (B, H, S, D) and (B, H, S, E); got {tuple(key.shape)} and {tuple(value.shape)}"
            )
        for name, new, held in (("key", key, self._key), ("value", value, self._value)):
            if held is None:
                continue
            if (*new.shape[:2], new.shape[3]) != (*held.shape[:2], held.shape[3]):
                wanted = f"({held.shape[0]}, {held.shape[1]}, S, {held.shape[3]})"
                raise ValueError(f"{name} must be {wanted} as what is cached; got {tuple(new.shape)}")
            if new.dtype != held.dtype or new.device != held.device:
                raise ValueError(
                    f"{name} must be {held.dtype} on {held.device} as what is cached; got {new.dtype} on {new.device}"
                )

    def _append_recorded(self, key: Tensor, value: Tensor) -> None:
        if self._key is not None and self._value is not None:
            key = torch.cat([self._key[:, :, : self._length], key], 2)
            value = torch.cat([self._value[:, :, : self._length], value], 2)
        self._key, self._value = key, value

    def _make_room(self, key: Tensor, value: Tensor, length: int) -> None:
        capacity = 0 if self._key is None else self._key.shape[2]
        if self._key is not None and length <= capacity:
            return
        capacity = max(2 * capacity, length, FIRST_CAPACITY)

        def larger(held: Tensor | None, new: Tensor) -> Tensor:
            made = new.new_empty(*new.shape[:2], capacity, new.shape[3])
            if held is not None:
                made[:, :, : self._length] = held[:, :, : self._length]
            return made

        self._key, self._value = larger(self._key, key), larger(self._value, value)

    def reorder(self, index: Tensor) -> None:
        """Keeps the batch entries `index` (int64), in this order: the beams that survived. Entries may repeat."""
        if self._key is not None and self._value is not None:
            self._key = self._key.index_select(0, index)
            self._value = self._value.index_select(0, index)

    def truncate(self, length: int) -> None:
        """Forgets the positions from `length` on: draft tokens that were not accepted."""
        if not 0 <= length <= self._length:
            raise ValueError(f"length must be between 0 and {self._length}; got {length}")
        self._length = length

    def reset(self) -> None:
        """Forgets all positions; memory is kept."""
        self._length = 0

    def __repr__(self) -> str:
        shape = None if self._key is None else tuple(self._key.shape)
        return f"{type(self).__name__}(length={self._length}, memory={shape})"


class PreallocatedCache(KeyValueCache):
    """A `KeyValueCache` of fixed room: its memory never moves, and a step allocates nothing.

    Room for `capacity` positions of ``batch_size`` sequences; IndexError where more come, RuntimeError where gradients
    are recorded. ``value_dim``: None for ``head_dim``.

    >>> PreallocatedCache(2, 4, 100, 8).length
    0
    """

    def __init__(
        self,
        batch_size: int,
        num_heads: int,
        capacity: int,
        head_dim: int,
        value_dim: int | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        sizes = {"num_heads": num_heads, "capacity": capacity, "head_dim": head_dim}
        for name, size in sizes.items():
            if size <= 0:
                raise ValueError(f"{name} must be positive; got {size}")
        if batch_size < 0:
            raise ValueError(f"batch_size must not be negative; got {batch_size}")
        shape = (batch_size, num_heads, capacity)
        width = head_dim if value_dim is None else value_dim
        self._key = torch.empty(*shape, head_dim, device=device, dtype=dtype)
        self._value = torch.empty(*shape, width, device=device, dtype=dtype)

    @property
    def capacity(self) -> int:
        assert self._key is not None
        return self._key.shape[2]

    def _append_recorded(self, key: Tensor, value: Tensor) -> None:
        raise RuntimeError("PreallocatedCache is written in place: use it under torch.no_grad(), or KeyValueCache")

    def _make_room(self, key: Tensor, value: Tensor, length: int) -> None:
        if length > self.capacity:
            raise IndexError(f"the cache has room for {self.capacity} positions; {length} were asked for")

    def reorder(self, index: Tensor) -> None:
        """As `KeyValueCache.reorder`, in place: as many entries as there are."""
        assert self._key is not None
        assert self._value is not None
        if index.shape != (self._key.shape[0],):
            raise ValueError(f"index must have shape ({self._key.shape[0]},); got {tuple(index.shape)}")
        for held in (self._key, self._value):
            held[:, :, : self._length] = held[:, :, : self._length].index_select(0, index)


class MemoryCache:
    """Keys and values of an encoder's output, projected once for all steps of a decoder: cross-attention's cache.

    Filled in the first step; `MultiheadAttention` then does not look at the key and value it is given.
    """

    def __init__(self) -> None:
        self.key: Tensor | None = None
        self.value: Tensor | None = None

    @property
    def length(self) -> int:
        return 0 if self.key is None else self.key.shape[2]

    def fill(self, key: Tensor, value: Tensor) -> None:
        self.key, self.value = key, value

    def reorder(self, index: Tensor) -> None:
        if self.key is not None and self.value is not None:
            self.key, self.value = self.key.index_select(0, index), self.value.index_select(0, index)

    def truncate(self, length: int) -> None:
        """The memory stays."""

    def reset(self) -> None:
        self.key = self.value = None


class RecurrentCache:
    """The state of causal linear attention: as large after a million positions as after one."""

    def __init__(self) -> None:
        self.state: Any = None
        self._length = 0

    @property
    def length(self) -> int:
        return self._length

    def update(self, state: Any, positions: int) -> None:
        self.state = state
        self._length += positions

    def reorder(self, index: Tensor) -> None:
        if self.state is not None:
            self.state = tuple(part.index_select(0, index) if part.numel() else part for part in self.state)

    def truncate(self, length: int) -> None:
        if length != self._length:
            raise ValueError("a recurrent state cannot go back to an earlier position")

    def reset(self) -> None:
        self.state, self._length = None, 0


Cache = KeyValueCache | RecurrentCache


class LayerState:
    """One Transformer layer while it decodes: the cache of its self-attention and, in a decoder, of its memory."""

    def __init__(self, self_attention: Any, memory: Any = None) -> None:
        self.self_attention = self_attention
        self.memory = memory

    def caches(self) -> Iterator[Any]:
        yield self.self_attention
        if self.memory is not None:
            yield self.memory

    @property
    def length(self) -> int:
        length: int = self.self_attention.length
        return length

    def reorder(self, index: Tensor) -> None:
        for cache in self.caches():
            cache.reorder(index)

    def truncate(self, length: int) -> None:
        for cache in self.caches():
            cache.truncate(length)


class DecodingState(Sequence[LayerState]):
    """All layers of an encoder or decoder while it decodes; made by its ``new_state()``, changed by each step."""

    def __init__(self, layers: Sequence[LayerState]) -> None:
        self.layers = list(layers)

    @property
    def length(self) -> int:
        """How many positions were decoded: the offset of the next one, as for `SinusoidalPositions`."""
        return self.layers[0].length if self.layers else 0

    def reorder(self, index: Tensor) -> None:
        """Keeps the batch entries `index` (int64), in this order: the beams that survived."""
        for layer in self.layers:
            layer.reorder(index)

    def truncate(self, length: int) -> None:
        """Forgets the positions from `length` on."""
        for layer in self.layers:
            layer.truncate(length)

    def __getitem__(self, index: Any) -> Any:
        return self.layers[index]

    def __len__(self) -> int:
        return len(self.layers)
