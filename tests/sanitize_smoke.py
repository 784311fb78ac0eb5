"""What `make sanitize` runs in Python: every CPU kernel of every operation on awkward shapes, forward and backward.

Not a pytest file: it runs under a preloaded AddressSanitizer, where only memory and undefined behaviour are judged,
and a quick look at the result tells that the kernels ran at all.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable, Iterator

import torch

import pyseqnet
import pyseqnet.functional as F
from pyseqnet import _C, nn

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# (input, weight, options): odd extents, remainders of every vector length, empty batch, groups, depthwise
CONVOLUTIONS = [
    ((2, 3, 7, 9), (5, 3, 3, 3), {"padding": 1}),
    ((1, 16, 9, 9), (32, 16, 3, 3), {"padding": 1}),
    ((1, 33, 5, 6), (17, 33, 3, 3), {"padding": 2, "stride": 2, "dilation": 2}),
    ((3, 1, 11, 5), (4, 1, 5, 5), {"padding": 2}),
    ((2, 8, 6, 7), (12, 4, 1, 1), {"groups": 2}),
    ((2, 19, 8, 10), (19, 1, 7, 7), {"padding": 3, "groups": 19}),
    ((0, 3, 7, 9), (5, 3, 3, 3), {}),
    ((2, 21, 50), (21, 1, 31), {"padding": 15, "groups": 21}),
    ((2, 30, 17), (10, 30, 5), {}),
]
POOLS = [
    ((2, 3, 7, 9), (2, 2, 0, 1, True)),
    ((1, 17, 12, 11), (3, 2, 1, 1, False)),
    ((2, 5, 9, 9), (3, 1, 1, 2, False)),
    ((1, 2, 40, 41), (17, 5, 8, 1, True)),
    ((0, 3, 8, 8), (2, 2, 0, 1, False)),
]


def kernels_of(*operations: str) -> list[str]:
    """Names of the CPU kernels; those for a machine this one is not refuse, which is fine."""
    tables = _C.dispatch_tables()
    return sorted({name for operation in operations for name in tables[operation]["cpu"]})


def convolution(x: torch.Tensor, w: torch.Tensor, options: dict[str, int]) -> list[torch.Tensor]:
    leaves = [t.requires_grad_() for t in (x, w, torch.randn(w.shape[0]).to(x.dtype))]
    y = (F.conv1d if x.dim() == 3 else F.conv2d)(*leaves, **options)
    return [y, *torch.autograd.grad(y, leaves, torch.randn_like(y))]


def pooling(x: torch.Tensor, arguments: tuple[int, int, int, int, bool]) -> list[torch.Tensor]:
    y, _ = F.max_pool2d(x.requires_grad_(), *arguments, return_indices=True)
    return [y, *torch.autograd.grad(y, [x], torch.randn_like(y))]


def cases() -> Iterator[Callable[[], list[torch.Tensor]]]:
    for dtype, layout in itertools.product(DTYPES, (torch.contiguous_format, torch.channels_last)):

        def tensor(shape: tuple[int, ...], dtype: torch.dtype = dtype, layout: torch.memory_format = layout):
            made = torch.randn(shape).to(dtype)
            return made.contiguous(memory_format=layout) if made.dim() == 4 else made

        for x_shape, w_shape, options in CONVOLUTIONS:
            yield functools.partial(convolution, tensor(x_shape), tensor(w_shape), options)
        for shape, arguments in POOLS:
            yield functools.partial(pooling, tensor(shape), arguments)


def run_all() -> int:
    """Runs every case; the number of those that the pinned kernel took."""
    ran = 0
    for case in cases():
        try:
            results = case()
        except RuntimeError as error:
            if "PYSEQNET_FORCE" not in os.environ or "no kernel takes" not in str(error):
                raise
            continue
        if not all(result.isfinite().all() for result in results):
            raise SystemExit("a result is not finite")
        ran += 1
    return ran


def main() -> None:
    torch.manual_seed(0)
    print("loaded:", pyseqnet.__file__, pyseqnet.build_info()["compiler"])
    print("as dispatched:", run_all(), "cases")
    for isa in ("avx2", "portable"):
        os.environ["PYSEQNET_ISA"] = isa
        print(f"at most {isa}:", run_all(), "cases")
    del os.environ["PYSEQNET_ISA"]
    for operation in sorted(_C.dispatch_tables()):
        for name in kernels_of(operation):
            os.environ["PYSEQNET_FORCE"] = f"{operation}:{name}"
            print(f"{operation}:{name}:", run_all(), "cases")
    del os.environ["PYSEQNET_FORCE"]
    model = torch.nn.Sequential(nn.Conv2d(1, 8, 3), torch.nn.ReLU(), nn.MaxPool2d(2))
    model(torch.randn(4, 1, 13, 13)).sum().backward()
    print("no fault found")


if __name__ == "__main__":
    main()
