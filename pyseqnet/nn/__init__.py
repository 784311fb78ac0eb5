"""Layers with torch.nn's constructors, parameters and results, computed by pyseqnet's kernels."""

from pyseqnet.nn.conv import Conv1d, Conv2d
from pyseqnet.nn.pool import MaxPool1d, MaxPool2d

__all__ = ["Conv1d", "Conv2d", "MaxPool1d", "MaxPool2d"]
