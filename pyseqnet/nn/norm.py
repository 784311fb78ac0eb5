"""Layer normalisation. Ba, Kiros, Hinton: Layer normalization, 2016."""

from __future__ import annotations

# Bound at import: replacing torch.nn.LayerNorm by ours later cannot make the class its own base.
from torch.nn import LayerNorm as _TorchLayerNorm


class LayerNorm(_TorchLayerNorm):
    """Drop-in for `torch.nn.LayerNorm`, and computed by torch's kernel: it is one pass over memory already.

    ``y = (x - mean) / sqrt(variance + eps) * weight + bias`` over the last dimensions, with the biased variance.
    """
