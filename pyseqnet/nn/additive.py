"""Additive attention, plain and location-aware, with its projections.

Bahdanau, Cho, Bengio: Neural machine translation by jointly learning to align and translate, 2015.
Chorowski, Bahdanau, Serdyuk, Cho, Bengio: Attention-based models for speech recognition, 2015.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Linear, Module, Parameter

from pyseqnet import functional as F
from pyseqnet.nn.conv import Conv1d

DEFAULT_CHANNELS, DEFAULT_KERNEL = 10, 201  # of Chorowski et al.: 10 filters, 100 frames to each side


def _without_padding(key: Tensor, key_lengths: Tensor | None) -> Tensor:
    """Zeros in the padding: a projection's weight would otherwise get the gradient 0 * NaN from what lies there."""
    if key_lengths is None or not torch.is_grad_enabled():
        return key
    padding = torch.arange(key.shape[1], device=key.device) >= key_lengths.unsqueeze(1)
    return key.masked_fill(padding.unsqueeze(2), 0.0)


class AdditiveAttention(Module):
    """Attention with the score ``weight . tanh(query_proj(query) + key_proj(key) + bias)``.

    Args:
        query_dim, key_dim: sizes of queries and keys.
        hidden_dim: size that both are projected to.
        bias: whether the sum has one.

    Shapes of ``forward(query, key, value=None)``, batch first; ``value`` defaults to ``key``:
        query ``(B, L, query_dim)`` or, one step of a decoder, ``(B, query_dim)``; key ``(B, S, key_dim)``; value
        ``(B, S, E)``; ``key_lengths`` (B,): keys beyond are padding, whatever they hold.
        Returns ``(output, weights)``: ``(B, L, E)`` and ``(B, L, S)``, for one step ``(B, E)`` and ``(B, S)``;
        weights are None with ``need_weights=False``.

    A decoder projects its keys once: ``projected = attention.project_key(key)``, then pass ``projected_key=projected``
    in each step. Memory is linear in L and S: the sum is never stored.

    >>> attention = AdditiveAttention(6, 4, 8)
    >>> output, weights = attention(torch.zeros(2, 6), torch.zeros(2, 5, 4))
    >>> output.shape, weights.shape
    (torch.Size([2, 4]), torch.Size([2, 5]))

    Paper: Bahdanau, Cho and Bengio, 2015, appendix A.1.2.
    """

    bias: Parameter | None

    def __init__(
        self, query_dim: int, key_dim: int, hidden_dim: int, bias: bool = True, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        for name, size in (("query_dim", query_dim), ("key_dim", key_dim), ("hidden_dim", hidden_dim)):
            if size <= 0:
                raise ValueError(f"{name} must be positive; got {size}")
        factory = {"device": device, "dtype": dtype}
        self.query_dim, self.key_dim, self.hidden_dim = query_dim, key_dim, hidden_dim
        self.query_proj = Linear(query_dim, hidden_dim, bias=False, **factory)
        self.key_proj = Linear(key_dim, hidden_dim, bias=False, **factory)
        self.weight = Parameter(torch.empty(hidden_dim, **factory))
        if bias:
            self.bias = Parameter(torch.empty(hidden_dim, **factory))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The weight as `torch.nn.Linear` would draw it; the bias is 0."""
        self.query_proj.reset_parameters()
        self.key_proj.reset_parameters()
        bound = self.hidden_dim**-0.5
        torch.nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            torch.nn.init.zeros_(self.bias)

    def project_key(self, key: Tensor, key_lengths: Tensor | None = None) -> Tensor:
        """``(B, S, key_dim) -> (B, S, hidden_dim)``: what every query of a source shares."""
        projected: Tensor = self.key_proj(_without_padding(key, key_lengths))
        return projected

    def _check(self, query: Tensor, key: Tensor) -> None:
        if query.dim() not in (2, 3) or query.shape[-1] != self.query_dim:
            raise ValueError(
                f"query must be (B, L, {self.query_dim}) or (B, {self.query_dim}); got {tuple(query.shape)}"
            )
        if key.dim() != 3 or key.shape[-1] != self.key_dim or key.shape[0] != query.shape[0]:
            raise ValueError(f"key must be ({query.shape[0]}, S, {self.key_dim}); got {tuple(key.shape)}")

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor | None = None,
        *,
        key_lengths: Tensor | None = None,
        projected_key: Tensor | None = None,
        need_weights: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        self._check(query, key)
        value = key if value is None else value
        projected = self.project_key(key, key_lengths) if projected_key is None else projected_key
        one_step = query.dim() == 2
        queries = self.query_proj(query.unsqueeze(1) if one_step else query)
        result = F.additive_attention(
            queries,
            projected,
            value,
            self.weight,
            key_lengths=key_lengths,
            bias=self.bias,
            return_weights=need_weights,
        )
        output, weights = result if need_weights else (result, None)
        if one_step:
            output, weights = output.squeeze(1), None if weights is None else weights.squeeze(1)
        return output, weights

    def extra_repr(self) -> str:
        return f"{self.query_dim}, {self.key_dim}, {self.hidden_dim}, bias={self.bias is not None}"


class LocationState(NamedTuple):
    """What location-aware attention remembers of its past, each ``(B, S)``."""

    previous: Tensor  # the last step's weights
    cumulative: Tensor  # the sum of all steps' weights

    def reorder(self, index: Tensor) -> LocationState:
        """Of the batch entries `index` (int64): what a beam search keeps."""
        return LocationState(self.previous.index_select(0, index), self.cumulative.index_select(0, index))


class LocationAwareAttention(AdditiveAttention):
    """Additive attention that sees where it looked before: convolved weights of the past enter the score.

    ``weight . tanh(query_proj(query) + key_proj(key) + location_proj(features) + bias)``, where the features of a key
    are a convolution of the previous step's weights around it, and with ``cumulative=True`` of the sum of all steps'
    weights as well, as in Tacotron 2.

    Args beyond those of `AdditiveAttention`:
        channels, kernel_size: filters of the convolution, and how many keys one spans (odd).
        cumulative: convolve the sum of all weights, too.

    Shapes of ``forward(query, key, value=None, *, state=None)``, batch first:
        query ``(B, query_dim)``: one step; ``(B, L, query_dim)``: L steps in a row, as with teacher forcing; each sees
        the weights of the one before. Returns ``(output, weights, state)``; ``state`` is passed to the next call. At
        the start (None) it is zeros.

    >>> attention = LocationAwareAttention(6, 4, 8, channels=2, kernel_size=3)
    >>> key, state = torch.zeros(2, 5, 4), None
    >>> for _ in range(3):
    ...     output, weights, state = attention(torch.zeros(2, 6), key, state=state)
    >>> state.previous.shape
    torch.Size([2, 5])

    Papers: Chorowski et al., 2015, equation 8; Shen et al., Natural TTS synthesis by conditioning WaveNet on Mel
    spectrogram predictions, 2018 (cumulative).
    """

    def __init__(
        self,
        query_dim: int,
        key_dim: int,
        hidden_dim: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        channels: int = DEFAULT_CHANNELS,
        kernel_size: int = DEFAULT_KERNEL,
        cumulative: bool = False,
    ) -> None:
        super().__init__(query_dim, key_dim, hidden_dim, bias, device, dtype)
        if channels <= 0:
            raise ValueError(f"channels must be positive; got {channels}")
        if kernel_size <= 0 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd and positive; got {kernel_size}")
        self.cumulative = cumulative
        self.location_conv = Conv1d(
            2 if cumulative else 1, channels, kernel_size, padding=kernel_size // 2, bias=False,
            device=device, dtype=dtype,
        )  # fmt: skip
        self.location_proj = Linear(channels, hidden_dim, bias=False, device=device, dtype=dtype)

    def _step(
        self, query: Tensor, projected: Tensor, value: Tensor, key_lengths: Tensor | None, state: LocationState
    ) -> tuple[Tensor, Tensor, LocationState]:
        """One step of a projected query (B, hidden_dim)."""
        past = torch.stack(state, 1) if self.cumulative else state.previous.unsqueeze(1)
        if past.shape[2]:  # without keys there is nowhere to look
            features = self.location_conv(past.to(projected.dtype)).transpose(1, 2)
            projected = projected + self.location_proj(features)
        output, weights = F.additive_attention(
            query.unsqueeze(1),
            projected,
            value,
            self.weight,
            key_lengths=key_lengths,
            bias=self.bias,
            return_weights=True,
        )
        weights = weights.squeeze(1)
        return output.squeeze(1), weights, LocationState(weights, state.cumulative + weights)

    def forward(  # type: ignore[override]
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor | None = None,
        *,
        key_lengths: Tensor | None = None,
        projected_key: Tensor | None = None,
        state: LocationState | None = None,
    ) -> tuple[Tensor, Tensor, LocationState]:
        self._check(query, key)
        value = key if value is None else value
        projected = self.project_key(key, key_lengths) if projected_key is None else projected_key
        if state is None:
            nothing = projected.new_zeros(key.shape[:2])
            state = LocationState(nothing, nothing)
        for name, part in zip(state._fields, state, strict=True):
            if part.shape != key.shape[:2]:
                raise ValueError(f"state.{name} must be {tuple(key.shape[:2])}; got {tuple(part.shape)}")
        queries = self.query_proj(query)
        if query.dim() == 2:
            return self._step(queries, projected, value, key_lengths, state)
        outputs, weights = [], []
        for step in queries.unbind(1):
            output, weight, state = self._step(step, projected, value, key_lengths, state)
            outputs.append(output)
            weights.append(weight)
        if not outputs:
            empty = queries.new_zeros
            return empty(value.shape[0], 0, value.shape[2]), empty(value.shape[0], 0, value.shape[1]), state
        return torch.stack(outputs, 1), torch.stack(weights, 1), state

    def extra_repr(self) -> str:
        return super().extra_repr() + (", cumulative=True" if self.cumulative else "")
