"""What Transformer layers and stacks are put together from: choices of attention and norm, states, masks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# Bound at import: replacing torch.nn's classes by ours later cannot make a class its own base.
from torch.nn import LayerNorm as _TorchLayerNorm
from torch.nn import MultiheadAttention as _TorchMultiheadAttention

from pyseqnet.masks import Pattern
from pyseqnet.nn.attention import MultiheadAttention
from pyseqnet.nn.cache import DecodingState, LayerState
from pyseqnet.nn.efficient import EFFICIENT
from pyseqnet.nn.linear_attention import LinearMultiheadAttention
from pyseqnet.nn.norm import LayerNorm
from pyseqnet.nn.power_norm import PowerNorm

Activation = str | Callable[[Tensor], Tensor]
Factory = Callable[..., torch.nn.Module]

# What `attention=` and `norm=` may name. A factory of attention is called as MultiheadAttention:
# factory(d_model, nhead, dropout=, bias=, batch_first=, device=, dtype=); its layer too.
ATTENTION: dict[str, Factory] = {"softmax": MultiheadAttention, "linear": LinearMultiheadAttention, **EFFICIENT}
NORMS: dict[str, Factory] = {"layer": LayerNorm, "power": PowerNorm}
MEMORY_LAYERS = ("last", "same", "reverse", "adaptive")
PARTS: dict[type, type] = {_TorchMultiheadAttention: MultiheadAttention, _TorchLayerNorm: LayerNorm}


def _factory(choice: str | Factory, names: dict[str, Factory], argument: str) -> Factory:
    if isinstance(choice, str):
        if choice not in names:
            raise ValueError(f"{argument} must be one of {', '.join(map(repr, names))}, or a factory; got {choice!r}")
        return names[choice]
    if not callable(choice):
        raise TypeError(f"{argument} must be a name or a factory, got {type(choice).__name__}")
    return choice


def choose_parts(
    layer: Any,
    attention: str | Factory,
    pattern: Pattern | None,
    norm: str | Factory,
    bias: bool,
    factory: dict[str, Any],
) -> None:
    """Replaces what torch's constructor has built by what was asked for."""
    old = layer.self_attn
    if attention != "softmax":
        if pattern is not None:
            raise ValueError("pattern belongs to softmax attention; give it to the factory of another")
        layer.self_attn = _factory(attention, ATTENTION, "attention")(
            old.embed_dim, old.num_heads, dropout=old.dropout, bias=bias, batch_first=old.batch_first, **factory
        )
        # Stacks ask for it, and a module from elsewhere may not know it.
        if getattr(layer.self_attn, "batch_first", None) is None:
            layer.self_attn.batch_first = old.batch_first
    elif pattern is not None:
        layer.self_attn.set_pattern(pattern)
    if norm != "layer":
        make = _factory(norm, NORMS, "norm")
        for name in ("norm1", "norm2", "norm3"):
            if hasattr(layer, name):
                setattr(layer, name, make(old.embed_dim, **(factory if norm in NORMS else {})))


def normalised(norm: torch.nn.Module, x: Tensor, padding: Tensor | None, batch_first: bool) -> Tensor:
    """PowerNorm's statistics leave the padding out; other normalisations see one position at a time."""
    if not isinstance(norm, PowerNorm) or padding is None:
        result: Tensor = norm(x)
        return result
    ignored = padding if padding.dtype == torch.bool else padding == -torch.inf
    if ignored.dim() == 2 and not batch_first:
        ignored = ignored.transpose(0, 1)
    masked: Tensor = norm(x, ignored)
    return masked


def new_cache(attention: Any, capacity: int | None, batch_size: int | None, memory: bool = False) -> Any:
    if not hasattr(attention, "new_cache"):
        raise TypeError(f"{type(attention).__name__} cannot decode token by token: it has no new_cache()")
    return attention.new_cache(capacity, batch_size, memory)


def step(attention: Any, x: Tensor, mask: Tensor | None, padding: Tensor | None, state: LayerState) -> Tensor:
    """Self-attention of new positions, which see those before them."""
    if mask is not None:
        raise ValueError("with state, self-attention is causal by itself: the mask must be None")
    output: Tensor = attention(
        x, x, x, key_padding_mask=padding, is_causal=True, need_weights=False, cache=state.self_attention
    )[0]
    return output


def one_or_list(given: Any, num_layers: int | None, kind: str) -> tuple[Any, int, list[Any] | None]:
    """One layer and how often, and the list where a list was given."""
    if isinstance(given, torch.nn.Module) and not isinstance(given, torch.nn.ModuleList):
        if num_layers is None:
            raise TypeError(f"num_layers is needed where one {kind} is given")
        return given, num_layers, None
    layers = list(given)
    if not layers:
        raise ValueError(f"the list of {kind}s must not be empty")
    if num_layers not in (None, len(layers)):
        raise ValueError(f"num_layers must be the number of {kind}s given, {len(layers)}; got {num_layers}")
    return layers[0], 1, layers


def states_of(stack: Any, state: DecodingState | None) -> Sequence[Any]:
    if state is None:
        return [None] * len(stack.layers)
    if not isinstance(state, DecodingState):
        raise TypeError(f"state must come from new_state(), got {type(state).__name__}")
    if len(state) != len(stack.layers):
        raise ValueError(f"state is of {len(state)} layers; there are {len(stack.layers)}")
    return state


def take_over(module: torch.nn.Module, ours: dict[type, type]) -> None:
    """Every part that torch built becomes ours, with the parameters that it has drawn."""
    for part in module.modules():
        if type(part) in ours:
            part.__class__ = ours[type(part)]


def finds_causal_mask(mask: Tensor | None, hint: bool | None, length: int) -> bool:
    """The hint; without one, whether `mask` is the causal one. As torch, but a compiler is not made to look."""
    if hint is not None or mask is None or torch.compiler.is_compiling():
        return bool(hint)
    if mask.shape != (length, length):
        return False
    causal = torch.full_like(mask, True if mask.dtype == torch.bool else -torch.inf).triu_(1)
    return torch.equal(mask, causal)
