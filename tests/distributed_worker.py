"""What tests/test_distributed.py starts on every rank, by torchrun: the work of all ranks against that of one process.

torchrun --nproc-per-node 2 tests/distributed_worker.py ddp
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import pyseqnet.distributed as spread
import pyseqnet.functional as F
from pyseqnet import nn
from pyseqnet.masks import Local

STEPS, BATCH, LENGTH, SYMBOLS, WIDTH = 4, 12, 10, 11, 16


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(SYMBOLS, WIDTH)
        self.transformer = nn.Transformer(WIDTH, 2, 2, 2, 32, dropout=0.0, batch_first=True)
        self.out = torch.nn.Linear(WIDTH, SYMBOLS)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        hidden = self.transformer(self.embedding(source), self.embedding(target), tgt_mask=mask, tgt_is_causal=True)
        return self.out(hidden)


def train(model: torch.nn.Module, batches: list[Tensor]) -> list[float]:
    # Not Adam: it would blow up the rounding of gradients that are zero, those of the keys' bias.
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    losses = []
    for batch in batches:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(batch, batch).flatten(0, 1), batch.flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def training(wrap: Callable[[Model], torch.nn.Module]) -> None:
    torch.manual_seed(0)
    alone = Model()
    together = wrap(copy.deepcopy(alone))
    batches = [torch.randint(SYMBOLS, (BATCH, LENGTH)) for _ in range(STEPS)]
    share = BATCH // dist.get_world_size()
    mine = [batch.split(share)[dist.get_rank()] for batch in batches]
    losses = torch.tensor(train(together, mine))
    dist.all_reduce(losses)
    expected = torch.tensor(train(alone, batches))
    torch.testing.assert_close(losses / dist.get_world_size(), expected, rtol=1e-4, atol=1e-5)
    assert expected[-1] < expected[0]
    for (name, a), b in zip(together.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(
            whole(a.detach()), b.detach(), rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


def ddp() -> None:
    training(lambda model: torch.nn.parallel.DistributedDataParallel(model))


def fsdp() -> None:
    def wrap(model: Model) -> Model:
        for part in (*model.transformer.encoder.layers, *model.transformer.decoder.layers, model):
            fully_shard(part)
        return model

    training(wrap)


def compare(
    parallel: Callable[..., Tensor], alone: Callable[..., Tensor], shapes: list[tuple[int, ...]], lengths: list[int]
) -> None:
    """Output and gradients of this rank's slice of dimension 2."""
    torch.manual_seed(1)
    full = [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes]
    mine = [t.detach().split(lengths, 2)[dist.get_rank()].clone().requires_grad_() for t in full]
    expected = alone(*full)
    direction = torch.randn_like(expected)
    expected.backward(direction)
    found = parallel(*mine)
    found.backward(direction.split(lengths, 2)[dist.get_rank()])
    torch.testing.assert_close(found, expected.split(lengths, 2)[dist.get_rank()])
    for a, b in zip(mine, full, strict=True):
        torch.testing.assert_close(a.grad, b.grad.split(lengths, 2)[dist.get_rank()])


def second_derivatives(
    parallel: Callable[..., Tensor], alone: Callable[..., Tensor], shape: tuple[int, ...], lengths: list[int]
) -> None:
    """Of the sum of squares of all gradients: every rank's share of it, and this rank's slice of its gradient."""
    rank = dist.get_rank()
    torch.manual_seed(2)
    full = [torch.randn(shape, dtype=torch.float64).requires_grad_() for _ in range(3)]
    direction = torch.randn(shape, dtype=torch.float64)

    def twice(f: Callable[..., Tensor], tensors: list[Tensor], direction: Tensor) -> list[Tensor]:
        first = torch.autograd.grad((f(*tensors) * direction).sum(), tensors, create_graph=True)
        return list(torch.autograd.grad(sum(g.square().sum() for g in first), tensors))

    expected = twice(alone, full, direction)
    mine = [t.detach().split(lengths, 2)[rank].clone().requires_grad_() for t in full]
    for a, b in zip(twice(parallel, mine, direction.split(lengths, 2)[rank]), expected, strict=True):
        torch.testing.assert_close(a, b.split(lengths, 2)[rank])


def linear() -> None:
    ranks = dist.get_world_size()
    lengths = [7 + 3 * rank for rank in range(ranks)]
    lengths[0] = 0 if ranks > 2 else lengths[0]
    total = sum(lengths)
    shapes = [(2, 3, total, 8), (2, 3, total, 8), (2, 3, total, 5)]
    for options in ({"causal": True}, {}, {"causal": True, "normalize": False, "feature_map": "relu", "scale": 0.5},
                    {"causal": True, "feature_map": torch.exp},
                    {"causal": True, "decay": [0.5, 0.9, 1.0]}):  # fmt: skip
        compare(
            lambda q, k, v, o=options: spread.linear_attention(q, k, v, **o),
            lambda q, k, v, o=options: F.linear_attention(q, k, v, **o), shapes, lengths,
        )  # fmt: skip
    ends = torch.tensor([total - 2, lengths[0] + 1])  # of the whole sequence, and of each slice
    before = sum(lengths[: dist.get_rank()])
    own = (ends - before).clamp(0, lengths[dist.get_rank()])
    for decay in (None, 0.9):
        compare(
            lambda q, k, v, g=decay: spread.linear_attention(q, k, v, causal=True, decay=g, key_lengths=own),
            lambda q, k, v, g=decay: F.linear_attention(q, k, v, causal=True, decay=g, key_lengths=ends),
            shapes, lengths,
        )  # fmt: skip
    for options in ({}, {"causal": True, "decay": 0.8}):
        second_derivatives(
            lambda q, k, v, o=options: spread.linear_attention(q, k, v, **o),
            lambda q, k, v, o=options: F.linear_attention(q, k, v, **o), (1, 2, total, 4), lengths,
        )  # fmt: skip


def local() -> None:
    ranks = dist.get_world_size()
    options = {"enable_gqa": True, "softcap": 20.0}
    for size, left, right in ((9, 4, 0), (9, 9, None), (5, 3, 2), (4, 7, 0), (3, 4, 8), (3, 0, 0), (80, 70, 5)):
        shapes = [(2, 4, size * ranks, 8), (2, 2, size * ranks, 8), (2, 2, size * ranks, 6)]
        compare(
            lambda q, k, v, w=(left, right): spread.local_attention(q, k, v, *w, **options),
            lambda q, k, v, w=(left, right): F.scaled_dot_product_attention(q, k, v, pattern=Local(*w), **options),
            shapes, [size] * ranks,
        )  # fmt: skip


def groups() -> None:
    """Two groups beside each other, each with a sequence of its own; the second's ranks are not those of the world."""
    ranks = dist.get_world_size()
    pairs = [dist.new_group([r, r + 1]) for r in range(0, ranks, 2)]
    group = pairs[dist.get_rank() // 2]
    torch.manual_seed(dist.get_rank() // 2)
    full = [torch.randn(1, 2, 12, 8, dtype=torch.float64) for _ in range(3)]
    mine = [t.chunk(2, 2)[dist.get_rank() % 2].contiguous() for t in full]
    for found, expected in (
        (spread.linear_attention(*mine, causal=True, group=group), F.linear_attention(*full, causal=True)),
        (
            spread.local_attention(*mine, 4, 1, group=group),
            F.scaled_dot_product_attention(*full, pattern=Local(4, 1)),
        ),
    ):
        torch.testing.assert_close(found, expected.chunk(2, 2)[dist.get_rank() % 2])


def planted() -> None:
    """A fault of the last rank is noticed there, and in its neighbours' gradients: a test of these tests."""
    ranks = dist.get_world_size()
    try:
        compare(
            lambda q, k, v: spread.local_attention(q, k, v, 8) * (1 + 1e-3 * (dist.get_rank() == ranks - 1)),
            lambda q, k, v: F.scaled_dot_product_attention(q, k, v, pattern=Local(8)), [(1, 1, 12, 4)] * 3,
            [12 // ranks] * ranks,
        )  # fmt: skip
    except AssertionError:
        return
    raise RuntimeError("a planted fault was not noticed")


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for name in sys.argv[1:]:
        {f.__name__: f for f in (ddp, fsdp, linear, local, groups, planted)}[name]()
        print(f"rank {dist.get_rank()}: {name} done", flush=True)
    dist.barrier()
    dist.destroy_process_group()
