"""Our softmax attention for Hugging Face ``transformers``: importing this module registers it there.

    import pyseqnet.integrations.huggingface  # or pyseqnet.huggingface
    model = AutoModelForCausalLM.from_config(config, attn_implementation="pyseqnet")
    model.set_attn_implementation("pyseqnet")  # of a model that is there already

`pyseqnet.convert` does the second for models that run ``sdpa``. Needs transformers 5, which pyseqnet does not install.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from pyseqnet.functional import scaled_dot_product_attention
from pyseqnet.masks import Causal, Local, Pattern

NAME = "pyseqnet"

# Masks smaller than this many keys are read as they are: a pattern hides whole tiles of 64 x 64.
_WORTH_A_PATTERN = 256


def attention_mask(*, local_size: int | None = None, **options: Any) -> Tensor | None:
    """The mask of a forward, in the way of ``transformers.masking_utils.sdpa_mask``.

    Bool ``(B, 1, L, S)``, True takes part; None where ``is_causal`` alone, or nothing, says it. A sliding window over
    many keys carries its pattern along, so that what the window hides costs `attention` no time. Whether the mask is
    that window is looked at once a forward, not concluded from the model's configuration.
    """
    mask: Tensor | None = sdpa_mask(local_size=local_size, **options)
    if mask is None or local_size is None or mask.shape[-1] < max(_WORTH_A_PATTERN, local_size):
        return mask
    if torch.compiler.is_compiling() or mask.is_meta or mask.shape[-2] == 1:
        return mask
    length, keys = mask.shape[-2:]
    for pattern in (
        Causal("bottom_right") & Local(local_size - 1, 0, align="bottom_right"),
        Local(local_size, align="bottom_right"),
    ):
        if bool((mask == pattern.to_dense(length, keys, mask.device)).all()):
            mask._pyseqnet_pattern = pattern  # type: ignore[attr-defined]
    return mask


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    output_attentions: bool | None = False,
    **_: Any,
) -> tuple[Tensor, Tensor | None]:
    """What a model of that library calls in each of its attention layers.

    Args:
        module: the layer; read for ``is_causal`` (True where it says nothing), where the call does not say.
        query: ``(B, H, L, D)``.
        key: ``(B, H', S, D)``, ``H`` a multiple of ``H'`` (grouped queries); nothing is repeated.
        value: ``(B, H', S, E)``.
        attention_mask: bool or additive, broadcastable to ``(B, H, L, S)``, or None: then causal, if the layer is, from
            the first key on, and of a single query all keys.
        dropout: probability, given by the layer as zero outside training.
        scaling: of the products; None for ``1 / sqrt(D)``.
        position_bias: added to the logits, as T5 has it; differentiable.
        softcap: as Gemma 2 has it.
        s_aux: ``(H,)``: a logit a head that takes part in the softmax and has no value (attention sinks, gpt-oss).
        output_attentions: return the weights as well.

    Returns:
        ``(B, L, H, E)``, and the weights ``(B, H, L, S)`` or None.

    Without sinks equivalent to ``sdpa`` of that library where it takes the arguments. A query that sees no key gives 0.
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = query.shape[2] > 1 and attention_mask is None and bool(causal)
    pattern: Pattern | None = getattr(attention_mask, "_pyseqnet_pattern", None)
    if pattern is not None and tuple(attention_mask.shape[-2:]) == (query.shape[2], key.shape[2]):  # type: ignore[union-attr]
        attention_mask = None
    else:
        pattern = None
    if s_aux is not None and output_attentions:
        raise ValueError("pyseqnet attention: output_attentions with attention sinks (s_aux) is not supported")
    results = scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=attention_mask,
        dropout_p=dropout,
        is_causal=causal,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
        pattern=pattern,
        bias=position_bias,
        softcap=softcap,
        return_weights=bool(output_attentions),
        return_lse=s_aux is not None,
    )
    weights: Tensor | None = None
    if s_aux is not None:  # exp(s) joins the sum that every weight is divided by
        out, lse = results
        share = torch.sigmoid(lse - s_aux.to(lse.dtype).reshape(1, -1, 1))
        out = out * share.unsqueeze(-1).to(out.dtype)
    elif output_attentions:
        out, weights = results
    else:
        out = results
    return out.transpose(1, 2).contiguous(), weights


def switch(model: torch.nn.Module) -> str:
    """Have a model of that library run our attention; the reason why not, or nothing if it does now.

    Only ``sdpa`` is exchanged, which ours computes: whoever asked for another implementation had a reason.
    """
    used = model.config._attn_implementation  # type: ignore[union-attr]
    if used == NAME:
        return ""
    if used != "sdpa":
        return f"its attention is {used!r}, not 'sdpa'" if model._supports_sdpa else "it has no 'sdpa' attention"
    try:
        model.set_attn_implementation(NAME)  # type: ignore[operator]
    except (ValueError, KeyError) as error:
        return str(error)
    return "" if model.config._attn_implementation == NAME else "it cannot change its attention"  # type: ignore[union-attr]


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, attention_mask)
