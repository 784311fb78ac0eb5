"""PowerNorm: normalisation by running quadratic means.

Shen, Yao, Gholami, Mahoney, Keutzer: PowerNorm: Rethinking batch normalization in Transformers, 2020.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter

DEFAULT_MOMENTUM = 0.9  # alpha of the paper, forward and backward
DEFAULT_WARMUP = 10000  # steps that normalise by the batch's own mean, as the authors' code


class _PowerFunction(torch.autograd.Function):
    """``x / sqrt(scale)`` whose gradient is the paper's approximation (algorithm 2, backward).

    ``direction`` is nu, the running mean of (gradient * result): what is left of the gradient's component along the
    result is fed back into it, and so corrected in later steps.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, taking_part: Tensor | None, direction: Tensor, momentum: float
    ) -> Tensor:
        inverse = scale.rsqrt()
        result = x * inverse
        ctx.save_for_backward(result, inverse, taking_part)
        ctx.direction, ctx.momentum = direction, momentum
        return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        result, inverse, taking_part = ctx.saved_tensors
        if taking_part is not None:
            grad = grad * taking_part
        rest = grad - (1 - ctx.momentum) * ctx.direction * result
        if taking_part is not None:
            rest = rest * taking_part
        count = rest[..., 0].numel() if taking_part is None else taking_part.sum().clamp(min=1)
        ctx.direction.add_((rest * result).flatten(0, -2).sum(0) / count)
        return rest * inverse, None, None, None, None


class PowerNorm(Module):
    """``y = x / sqrt(psi) * weight + bias`` with a running mean ``psi`` of ``x^2`` for each feature.

    Like batch normalisation, the statistics are those of all positions of a batch, but no mean is subtracted and, after
    `warmup` steps, training divides by the running mean as evaluation does: the batch's own varies too much in text.
    The gradient treats ``psi`` as given and corrects itself over the steps (the paper's approximate backward); it can
    be differentiated once only.

    Args:
        num_features: size E of the last dimension.
        eps: added to ``psi``.
        momentum: share of the old value in each running mean.
        warmup: training steps that divide by the batch's own mean.

    Shapes: ``(..., E)``; the output has the input's. ``padding_mask`` (the input's leading dimensions, True = padding):
    positions that do not count, whatever they hold; their output is not to be read.

    Buffers: ``running_phi`` (psi), ``ema_gz`` (nu) and ``iters``, named as in the authors' code.

    >>> norm = PowerNorm(4)
    >>> norm(torch.ones(2, 3, 4)).shape
    torch.Size([2, 3, 4])

    Paper: Shen et al., PowerNorm, 2020.
    """

    running_phi: Tensor
    ema_gz: Tensor
    iters: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = DEFAULT_MOMENTUM,
        warmup: int = DEFAULT_WARMUP,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if num_features <= 0:
            raise ValueError(f"num_features must be positive; got {num_features}")
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum must be between 0 and 1; got {momentum}")
        if warmup < 0:
            raise ValueError(f"warmup must not be negative; got {warmup}")
        self.num_features, self.eps, self.momentum, self.warmup = num_features, eps, momentum, warmup
        self.weight = Parameter(torch.ones(num_features, device=device, dtype=dtype))
        self.bias = Parameter(torch.zeros(num_features, device=device, dtype=dtype))
        statistic = torch.float64 if dtype == torch.float64 else torch.float32
        self.register_buffer("running_phi", torch.ones(num_features, device=device, dtype=statistic))
        self.register_buffer("ema_gz", torch.zeros(num_features, device=device, dtype=statistic))
        self.register_buffer("iters", torch.zeros((), device=device, dtype=torch.int64))

    def reset_parameters(self) -> None:
        torch.nn.init.ones_(self.weight)
        torch.nn.init.zeros_(self.bias)
        self.running_phi.fill_(1)
        self.ema_gz.zero_()
        self.iters.zero_()

    def _batch_mean(self, x: Tensor, taking_part: Tensor | None) -> Tensor:
        squares = x.detach().square().flatten(0, -2)
        if taking_part is None:
            return squares.mean(0)
        return squares.sum(0) / taking_part.sum().clamp(min=1)

    def forward(self, input: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        if input.dim() < 2 or input.shape[-1] != self.num_features:
            raise ValueError(f"input must be (..., {self.num_features}); got {tuple(input.shape)}")
        x = input.to(self.running_phi.dtype)
        taking_part = None
        if padding_mask is not None:
            if padding_mask.dtype != torch.bool or padding_mask.shape != input.shape[:-1]:
                raise ValueError(
                    f"padding_mask must be bool of shape {tuple(input.shape[:-1])}; got {padding_mask.dtype} of "
                    f"{tuple(padding_mask.shape)}"
                )
            x = x.masked_fill(padding_mask.unsqueeze(-1), 0.0)  # 0 * NaN is NaN
            taking_part = (~padding_mask).unsqueeze(-1).to(x.dtype)
        if self.training and x.numel():
            mean = self._batch_mean(x, taking_part)
            self.iters += 1
            count = self.iters.to(mean.dtype)
            warming = self.iters <= self.warmup
            scale = torch.where(warming, mean, self.running_phi) + self.eps
            # The mean of all batches while it warms up, a moving one later.
            share = torch.where(warming, (count - 1) / count, torch.full_like(count, self.momentum))
            self.running_phi.copy_(share * self.running_phi + (1 - share) * mean)
            x = _PowerFunction.apply(x, scale, taking_part, self.ema_gz, self.momentum)
        else:
            x = x * (self.running_phi + self.eps).rsqrt()
        result: Tensor = (x * self.weight + self.bias).to(input.dtype)
        return result

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, warmup={self.warmup}"
