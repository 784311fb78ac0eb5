"""Efficient attention: layers called as `MultiheadAttention`, on the kernels of softmax and linear attention.

`EFFICIENT` names them for ``attention=`` of Transformer layers; options beside the defaults go through
`functools.partial`: ``attention=partial(LinformerAttention, seq_len=4096, k=256)``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from pyseqnet.nn.efficient.attention_free import FNetMixing, GatedMLPMixing, MLPMixing
from pyseqnet.nn.efficient.clustered import ClusteredAttention
from pyseqnet.nn.efficient.feature_maps import EfficientAttention, PerformerAttention, RandomFeatureAttention
from pyseqnet.nn.efficient.patterns import BigBirdAttention, LocalAttention, MixedHeadAttention
from pyseqnet.nn.efficient.reduced_keys import LinformerAttention, MemoryCompressedAttention
from pyseqnet.nn.efficient.reformer import ReformerAttention
from pyseqnet.nn.efficient.routing import RoutingAttention
from pyseqnet.nn.efficient.sinkhorn import SinkhornAttention
from pyseqnet.nn.efficient.synthesizer import SynthesizerAttention
from pyseqnet.nn.efficient.top_k import TopKAttention

EFFICIENT: dict[str, Callable[..., torch.nn.Module]] = {
    "local": LocalAttention,
    "big_bird": BigBirdAttention,
    "mixed_heads": MixedHeadAttention,
    "top_k": TopKAttention,
    "clustered": ClusteredAttention,
    "reformer": ReformerAttention,
    "routing": RoutingAttention,
    "sinkhorn": SinkhornAttention,
    "memory_compressed": MemoryCompressedAttention,
    "linformer": LinformerAttention,
    "efficient": EfficientAttention,
    "rfa": RandomFeatureAttention,
    "performer": PerformerAttention,
    "synthesizer": SynthesizerAttention,
    "fnet": FNetMixing,
    "gmlp": GatedMLPMixing,
    "mlp_mixer": MLPMixing,
}

__all__ = [
    "EFFICIENT",
    "BigBirdAttention",
    "ClusteredAttention",
    "EfficientAttention",
    "FNetMixing",
    "GatedMLPMixing",
    "LinformerAttention",
    "LocalAttention",
    "MLPMixing",
    "MemoryCompressedAttention",
    "MixedHeadAttention",
    "PerformerAttention",
    "RandomFeatureAttention",
    "ReformerAttention",
    "RoutingAttention",
    "SinkhornAttention",
    "SynthesizerAttention",
    "TopKAttention",
]
