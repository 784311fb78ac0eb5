"""Attention over sequences whose positions are spread over the ranks of a process group.

Every rank holds a slice of consecutive positions, in the order of the ranks, and gets the outputs of its own positions;
gradients flow back to the ranks that own what they belong to. Works with any backend of ``torch.distributed``, beside
data parallelism in another group. docs/distributed.md says what it costs.
"""

from pyseqnet.distributed.linear_attention import linear_attention
from pyseqnet.distributed.local_attention import local_attention

__all__ = ["linear_attention", "local_attention"]
