"""nn.CRF beside pytorch-crf, where that is installed: state, values, gradients, lists, errors word for word."""

from __future__ import annotations

import pytest
import torch
from support import normal

import pyseqnet.nn as nn

torchcrf = pytest.importorskip("torchcrf")

BATCH_FIRST = pytest.mark.parametrize("batch_first", [False, True])


def pair(tags: int, batch_first: bool):
    torch.manual_seed(0)
    theirs = torchcrf.CRF(tags, batch_first=batch_first)
    ours = nn.CRF(tags, batch_first=batch_first)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def test_both_begin_alike() -> None:
    torch.manual_seed(3)
    theirs = torchcrf.CRF(7)
    torch.manual_seed(3)
    ours = nn.CRF(7)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert repr(ours) == repr(theirs)


@BATCH_FIRST
@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "token_mean"])
@pytest.mark.parametrize("mask_dtype", [None, torch.uint8, torch.bool])
def test_same_values_gradients_and_lists(batch_first: bool, reduction: str, mask_dtype: torch.dtype | None) -> None:
    for tags, steps, batch in ((1, 1, 1), (2, 5, 3), (5, 9, 4), (30, 6, 2)):
        ours, theirs = pair(tags, batch_first)
        generator = torch.Generator().manual_seed(steps)
        gold = torch.randint(0, tags, (batch, steps), generator=generator)
        lengths = torch.randint(1, steps + 1, (batch, 1), generator=generator)
        mask = None if mask_dtype is None else (torch.arange(steps) < lengths).to(mask_dtype)
        e = normal((batch, steps, tags), steps, torch.float32)
        if not batch_first:
            e, gold, mask = e.transpose(0, 1), gold.t(), None if mask is None else mask.t()
        results = []
        for crf in (ours, theirs):
            x = e.detach().clone().requires_grad_()
            llh = crf(x, gold, mask, reduction=reduction)
            results.append(
                (llh.detach(), *torch.autograd.grad(llh.sum(), [x, *crf.parameters()], materialize_grads=True))
            )
        for a, b in zip(*results, strict=True):
            assert a.shape == b.shape
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        assert ours.decode(e, mask) == theirs.decode(e, mask)


@BATCH_FIRST
def test_same_errors(batch_first: bool) -> None:
    ours, theirs = pair(2, batch_first)
    e, y = torch.zeros(3, 4, 2), torch.zeros(3, 4, dtype=torch.int64)
    off = torch.ones(3, 4, dtype=torch.bool)
    off[0, 0] = False
    calls = (
        lambda crf: crf(e[0], y[0]),
        lambda crf: crf(torch.zeros(3, 4, 5), y),
        lambda crf: crf(e, y[:2]),
        lambda crf: crf(e, y[:, :2]),
        lambda crf: crf(e, y, off[:2]),
        lambda crf: crf(e, y, off),
        lambda crf: crf(e, y, reduction="median"),
        lambda crf: crf.decode(e[0]),
        lambda crf: crf.decode(torch.zeros(3, 4, 5)),
        lambda crf: crf.decode(e, off[:, :1]),
        lambda crf: crf.decode(e, off),
        lambda crf: type(crf)(0),
        lambda crf: type(crf)(-1),
    )
    for call in calls:
        messages = []
        for crf in (ours, theirs):
            with pytest.raises(ValueError) as error:
                call(crf)
            messages.append(str(error.value))
        assert messages[0] == messages[1]
