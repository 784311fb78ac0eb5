"""Adapters: layers of `pyseqnet.nn` as decoders that `generate` can drive."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pyseqnet import nn

Embed = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True)
class TransformerState:
    """What a Transformer's decoder knows of R rows: the source of each, and its layers' caches."""

    layers: nn.DecodingState
    memory: Tensor | None = None  # of a decoder: (R, S, E) or (S, R, E)
    ignored: Tensor | None = None  # (R, S), True = padding of the source
    source: Tensor | None = None  # (R,): which source of the batch a row belongs to
    weights: Tensor | None = None  # (R, S), the last step's cross-attention, if it was asked for


class TransformerStepper:
    """An `nn.TransformerDecoder` with its caches, or a causal `nn.TransformerEncoder` as a language model.

    Args:
        stack: the layers; they must be able to decode token by token (``new_state``).
        embed: ``embed(tokens (R, 1), position) -> (R, 1, E)``, positions added.
        head: from the stack's output (R, E) to logits (R, V).
        alignments: keep the last layer's cross-attention (mean of heads) in each step.

    ``generate(stepper, stepper.start(memory, ignored), ...)``; for a language model ``stepper.start()``.

    Equivalent to running the whole stack on all tokens so far in each step, without the quadratic work.
    """

    def __init__(
        self, stack: torch.nn.Module, embed: Embed, head: Callable[[Tensor], Tensor], *, alignments: bool = False
    ) -> None:
        if not hasattr(stack, "new_state"):
            raise TypeError(f"{type(stack).__name__} cannot decode token by token: it has no new_state()")
        self.stack: Any = stack
        self.embed, self.head, self.alignments = embed, head, alignments

    @property
    def _batch_first(self) -> bool:
        return bool(self.stack.layers[0].self_attn.batch_first)

    def start(self, memory: Tensor | None = None, ignored: Tensor | None = None) -> TransformerState:
        """Before the first token: `memory` as the stack takes it, `ignored` (B, S) its ``memory_key_padding_mask``."""
        layers = self.stack.new_state()
        if memory is None:
            return TransformerState(layers)
        rows = memory.shape[0 if self._batch_first else 1]
        return TransformerState(layers, memory, ignored, torch.arange(rows, device=memory.device))

    def step(self, tokens: Tensor, state: TransformerState) -> tuple[Tensor, TransformerState]:
        input = self.embed(tokens.unsqueeze(1), state.layers.length)
        time = 1
        if not self._batch_first:
            input, time = input.transpose(0, 1), 0
        if state.memory is None:
            output = self.stack(input, state=state.layers)
            return self.head(output.select(time, -1)), state
        with self._watching() as seen:
            output = self.stack(input, state.memory, memory_key_padding_mask=state.ignored, state=state.layers)
        weights = seen[0][:, -1] if seen else None
        return self.head(output.select(time, -1)), replace(state, weights=weights)

    def _watching(self) -> AbstractContextManager[list[Tensor]]:
        return _CrossAttention(self.stack.layers[-1].multihead_attn) if self.alignments else nullcontext([])

    def reorder(self, state: TransformerState, index: Tensor) -> TransformerState:
        if state.memory is None or state.source is None:
            state.layers.reorder(index)
            return state
        source = state.source.index_select(0, index)
        weights = None if state.weights is None else state.weights.index_select(0, index)
        if source.shape == state.source.shape and bool((source == state.source).all()):
            # Beams of one source change places among themselves: what was computed of the source stays.
            for layer in state.layers:
                layer.self_attention.reorder(index)
            return replace(state, weights=weights)
        state.layers.reorder(index)
        return replace(
            state,
            memory=state.memory.index_select(0 if self._batch_first else 1, index),
            ignored=None if state.ignored is None else state.ignored.index_select(0, index),
            source=source,
            weights=weights,
        )

    def alignment(self, state: TransformerState) -> Tensor | None:
        return state.weights


class _CrossAttention:
    """While it is open, an attention layer computes its weights too, and they are collected: (R, 1, S) a call."""

    def __init__(self, attention: torch.nn.Module) -> None:
        self.attention = attention
        self.seen: list[Tensor] = []

    def __enter__(self) -> list[Tensor]:
        def ask(layer: torch.nn.Module, args: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            del layer
            return args, {**options, "need_weights": True}

        def collect(layer: torch.nn.Module, args: Any, output: tuple[Tensor, Tensor]) -> None:
            del layer, args
            self.seen.append(output[1])

        self.hooks = [
            self.attention.register_forward_pre_hook(ask, with_kwargs=True),
            self.attention.register_forward_hook(collect),
        ]
        return self.seen

    def __exit__(self, *error: object) -> None:
        for hook in self.hooks:
            hook.remove()


class RecurrentStepper:
    """A language model of an `nn.RNN`, `nn.LSTM`, `nn.GRU` or `nn.JordanRNN`: embedding, layer, head.

    ``start()`` begins with zeros, ``start(hx)`` with a state of the layer, which is unidirectional.
    """

    def __init__(
        self, embed: Callable[[Tensor], Tensor], rnn: torch.nn.Module, head: Callable[[Tensor], Tensor]
    ) -> None:
        if getattr(rnn, "bidirectional", False):
            raise ValueError("a bidirectional layer reads the future: it cannot write token by token")
        self.embed, self.head = embed, head
        self.rnn: Any = rnn

    def start(self, hx: Any = None) -> Any:
        return hx

    def step(self, tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        time = 1 if self.rnn.batch_first else 0
        output, state = self.rnn(self.embed(tokens).unsqueeze(time), state)
        return self.head(output.squeeze(time)), state

    def reorder(self, state: Any, index: Tensor) -> Any:
        if state is None:
            return None
        if isinstance(state, tuple):
            return tuple(part.index_select(1, index) for part in state)
        return state.index_select(1, index)
