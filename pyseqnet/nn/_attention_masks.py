"""Masks in torch.nn's sense (True = ignore) on their way to the attention function (True = take part)."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.nn.functional import pad as _torch_pad

from pyseqnet.masks import Pattern


def agreed_masks(
    padding: Tensor | None, mask: Tensor | None, padding_name: str, mask_name: str, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """Masks in torch.nn's sense (True = ignore) that can be merged: two bool ones, or two additive ones.

    As torch: AssertionError for other dtypes; two different ones warn, and a bool one among them becomes additive.
    """
    for given, name in ((padding, padding_name), (mask, mask_name)):
        if given is not None and given.dtype != torch.bool and not given.is_floating_point():
            raise AssertionError(f"only bool and floating types of {name} are supported")
    if padding is None or mask is None or padding.dtype == mask.dtype:
        return padding, mask
    warnings.warn(
        f"Support for mismatched {padding_name} and {mask_name} is deprecated. Use same type for both instead.",
        stacklevel=3,
    )
    return additive_mask(padding, dtype), additive_mask(mask, dtype)


def additive_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -math.inf)


def may_be_looked_at(tensor: Tensor) -> bool:
    """Whether a decision may depend on its values: elsewhere that stops a GPU or a compiler."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling() and not is_fake(tensor)


def finite_padding(input: Tensor, padding: Tensor | None, batch_first: bool) -> Tensor:
    """`input` with zeros where padded positions hold NaN or infinity, and only there.

    No real output sees a padded position. A gradient does: that of a weight sums `0 * input` over the padding, which
    is NaN for such values. So this is done only where gradients are recorded.
    """
    if padding is None or not torch.is_grad_enabled():
        return input
    ignored = padding if padding.dtype == torch.bool else padding == -math.inf
    if ignored.dim() == 2 and not batch_first:
        ignored = ignored.transpose(0, 1)
    if ignored.shape != input.shape[:-1]:  # refused later, in torch's words
        return input
    if may_be_looked_at(input) and math.isfinite(input.detach()[ignored].sum().item()):
        return input
    return input.masked_fill(ignored.unsqueeze(-1) & ~input.isfinite(), 0.0)


def right_padded_lengths(padding: Tensor) -> Tensor | None:
    """How many keys each row of `padding` (B, S) leaves, if they are its first ones: whole blocks are then skipped.

    None where it cannot be found out.
    """
    if not may_be_looked_at(padding):
        return None
    keys = padding.shape[1]
    lengths = keys - padding.sum(1)
    return lengths if torch.equal(padding, torch.arange(keys) >= lengths.unsqueeze(1)) else None


def merged_mask(padding: Tensor | None, mask: Tensor | None, heads: int, extra_keys: int) -> Tensor | None:
    """One mask for the attention function (True = take part), broadcast over what it does not depend on.

    (B, 1, 1, S), (1, 1, L, S), (B, 1, L, S) or (B, H, L, S). `extra_keys` are appended, visible to all.
    """
    if mask is not None:
        mask = mask[None, None] if mask.dim() == 2 else mask.unflatten(0, (-1, heads))
    if padding is not None:
        padding = padding[:, None, None, :]
    if mask is None or padding is None:
        merged = padding if mask is None else mask
    else:
        merged = mask | padding if mask.dtype == torch.bool else mask + padding
    if merged is not None and extra_keys:
        merged = _torch_pad(merged, (0, extra_keys))
    return ~merged if merged is not None and merged.dtype == torch.bool else merged


def causal_rows(queries: int, keys: int, device: torch.device) -> Tensor | None:
    """True where the last `queries` of `keys` positions would see a later one; None where none would."""
    if queries == 1:
        return None
    return torch.ones(queries, keys, dtype=torch.bool, device=device).triu(keys - queries + 1)


def hidden_rows(pattern: Pattern, queries: int, positions: int) -> Tensor:
    """True where the last `queries` of `positions` may not look: (queries, positions), or (heads, ..) of a pattern with
    heads. On the CPU, and never the whole square."""
    pattern._check(positions, positions)
    i, j = torch.arange(positions - queries, positions).unsqueeze(1), torch.arange(positions).unsqueeze(0)
    of_heads = [pattern] if pattern.heads is None else [pattern._of_head(h) for h in range(pattern.heads)]
    rows = [~part._visible(i, j, positions, positions).expand(queries, positions) for part in of_heads]
    return rows[0] if pattern.heads is None else torch.stack(rows)


def hidden_prefix(hidden: Tensor) -> int:
    """How many of the first positions no row sees: with windows, all but a few."""
    if torch.compiler.is_compiling():
        return 0
    seen = (~hidden).flatten(0, -2).any(0).nonzero()
    return int(seen[0]) if len(seen) else 0
