"""pyseqnet: hand-written kernels for sequence and image models in PyTorch.

    import pyseqnet.functional as F     # torch.nn.functional's names and arguments
    import pyseqnet.nn as nn            # torch.nn's layers: same constructor, same state_dict, same results

Importing makes no CUDA call.
"""

from typing import Any

import torch  # the extension's symbols are resolved against the torch that is loaded first

__version__ = "0.1.0"

try:
    from pyseqnet import _C
except ImportError as error:
    raise ImportError(
        "pyseqnet's compiled part (pyseqnet._C) could not be loaded: "
        f"{error}. Build it with: pip install -e . --no-build-isolation (in the source folder), "
        "or install the package and run Python outside the source folder."
    ) from error

from pyseqnet import _flops, functional, nn
from pyseqnet.conversion import Conversion, convert


def build_info() -> dict[str, Any]:
    """What this binary holds and what this machine runs.

    Returns:
        A dict: ``version``; ``cuda`` (bool: CUDA kernels are compiled in), ``archs`` (for which GPUs), ``nvcc``;
        ``cpu_isa`` (the instruction set in use), ``cpu_isa_detected``, ``cpu_isas_built``; ``torch_target`` (the
        oldest torch the binary runs in), ``torch`` (the one it runs in now), ``compiler``.
    """
    return {"version": __version__, **_C.build_info(), "torch": torch.__version__}


_flops.register_when_imported()

__all__ = ["Conversion", "__version__", "build_info", "convert", "functional", "nn"]
