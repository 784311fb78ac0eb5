"""Parameters of recurrent layers and cells: their names, and what they begin with."""

from __future__ import annotations

import math
from typing import Any

import torch

# Of `Weights`, what a parameter is called in state_dict, before _l0, _l1, ... and _reverse.
NAMES = {
    "w_ih": "weight_ih", "w_hh": "weight_hh", "b_ih": "bias_ih", "b_hh": "bias_hh", "w_hr": "weight_hr",
    "w_ch": "weight_ch", "gain_ih": "gain_ih", "gain_hh": "gain_hh", "gain_c": "gain_c", "bias_c": "bias_c",
}  # fmt: skip
JORDAN_NAMES = {**NAMES, "w_hr": "weight_ho", "b_hr": "bias_ho"}


def reset(layer: torch.nn.Module, hidden_size: int) -> None:
    """As torch's layers begin; normalisations as the identity."""
    bound = 1 / math.sqrt(hidden_size) if hidden_size > 0 else 0
    for name, parameter in layer.named_parameters():
        if name.startswith("gain"):
            torch.nn.init.ones_(parameter)
        elif name.startswith("bias_c"):
            torch.nn.init.zeros_(parameter)
        else:
            torch.nn.init.uniform_(parameter, -bound, bound)


def open_forget_gates(layer: torch.nn.Module, hidden_size: int, forget_bias: float) -> None:
    """The sum of both biases of every forget gate (Jozefowicz et al., 2015)."""
    forget = slice(hidden_size, 2 * hidden_size)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name.startswith("bias_ih"):
                parameter[forget] = forget_bias
            elif name.startswith("bias_hh"):
                parameter[forget] = 0


def stated(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value not in (None, False, 0.0)}
