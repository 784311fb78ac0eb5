"""The detection Transformer: object queries read an image, all at once.

Carion, Massa, Synnaeve, Usunier, Kirillov, Zagoruyko: End-to-end object detection with transformers, 2020.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, l1_loss

from pyseqnet import nn

NOTHING_WEIGHT = 0.1  # of queries that found nothing, in the loss, as in the paper
BOX_WEIGHT, OVERLAP_WEIGHT = 5.0, 2.0  # the paper's


class DetectionTransformer(torch.nn.Module):
    """Finds objects: convolutions, a Transformer encoder over the map, a decoder with one object for each query.

    Shapes: input (N, 3, S, S) with S a multiple of 8; output kinds (N, queries, classes + 1), before softmax, the last
    meaning "nothing", and boxes (N, queries, 4): centre x, centre y, width, height, in [0, 1].

    >>> model = DetectionTransformer(3, image_size=32, queries=4)
    >>> kinds, boxes = model(torch.zeros(2, 3, 32, 32))
    >>> kinds.shape, boxes.shape
    (torch.Size([2, 4, 4]), torch.Size([2, 4, 4]))
    """

    def __init__(
        self,
        classes: int,
        *,
        image_size: int = 64,
        queries: int = 6,
        d_model: int = 64,
        nhead: int = 4,
        layers: int = 2,
    ) -> None:
        super().__init__()
        if image_size % 8 or image_size <= 0:
            raise ValueError(f"image_size must be a multiple of 8, got {image_size}")
        self.classes = classes
        blocks: list[torch.nn.Module] = []
        for before, after in ((3, 16), (16, 32), (32, d_model)):
            blocks += [nn.Conv2d(before, after, 3, padding=1), torch.nn.ReLU(), nn.MaxPool2d(2)]
        self.backbone = nn.Sequential(*blocks)
        self.places = nn.LearnedPositions((image_size // 8) ** 2, d_model, batch_first=True)
        common: dict[str, Any] = {
            "dim_feedforward": 4 * d_model,
            "dropout": 0.0,
            "batch_first": True,
            "norm_first": True,
        }
        reader = nn.TransformerEncoderLayer(d_model, nhead, **common)
        self.encoder = nn.TransformerEncoder(reader, layers, nn.LayerNorm(d_model), enable_nested_tensor=False)
        self.decoder = nn.TransformerDecoder(
            nn.TransformerDecoderLayer(d_model, nhead, **common), layers, nn.LayerNorm(d_model)
        )
        self.queries = torch.nn.Parameter(torch.randn(1, queries, d_model))
        self.kind = torch.nn.Linear(d_model, classes + 1)
        self.box = torch.nn.Sequential(
            torch.nn.Linear(d_model, d_model), torch.nn.ReLU(), torch.nn.Linear(d_model, 4), torch.nn.Sigmoid()
        )

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        memory = self.encoder(self.places(self.backbone(image).flatten(2).transpose(1, 2)))
        found = self.decoder(self.queries.expand(len(image), -1, -1), memory)
        return self.kind(found), self.box(found)


def corners(boxes: Tensor) -> Tensor:
    """(..., centre x, centre y, width, height) as (..., left, top, right, bottom)."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([centre - half, centre + half], -1)


def overlaps(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Intersection over union of boxes (..., 4), and its generalised form (Rezatofighi et al., 2019)."""
    (a_low, a_high), (b_low, b_high) = (corners(boxes).split(2, -1) for boxes in (a, b))
    common = (torch.minimum(a_high, b_high) - torch.maximum(a_low, b_low)).clamp_min(0).prod(-1)
    union = a[..., 2:].prod(-1) + b[..., 2:].prod(-1) - common
    hull = (torch.maximum(a_high, b_high) - torch.minimum(a_low, b_low)).prod(-1)
    iou = common / union.clamp_min(1e-9)
    return iou, iou - (hull - union) / hull.clamp_min(1e-9)


def match(kinds: Tensor, boxes: Tensor, true_kinds: Tensor, true_boxes: Tensor) -> tuple[Tensor, Tensor]:
    """The cheapest one-to-one assignment of one image's queries to its objects (Kuhn, 1955): indices of both."""
    from scipy.optimize import linear_sum_assignment

    with torch.no_grad():
        likely = kinds.softmax(1)[:, true_kinds]
        apart = torch.cdist(boxes, true_boxes, p=1)
        _, general = overlaps(boxes.unsqueeze(1), true_boxes.unsqueeze(0))
        cost = BOX_WEIGHT * apart - OVERLAP_WEIGHT * general - likely
    queries, objects = linear_sum_assignment(cost.numpy())
    return torch.as_tensor(queries), torch.as_tensor(objects)


def detection_loss(kinds: Tensor, boxes: Tensor, true_kinds: list[Tensor], true_boxes: list[Tensor]) -> Tensor:
    """The paper's loss: each object is one query's task, all other queries have to say "nothing"."""
    nothing = kinds.shape[2] - 1
    wanted = torch.full(kinds.shape[:2], nothing, dtype=torch.int64)
    found, truth = [], []
    for i, (own_kinds, own_boxes) in enumerate(zip(true_kinds, true_boxes, strict=True)):
        queries, objects = match(kinds[i], boxes[i], own_kinds, own_boxes)
        wanted[i, queries] = own_kinds[objects]
        found.append(boxes[i, queries])
        truth.append(own_boxes[objects])
    weights = kinds.new_ones(nothing + 1)
    weights[nothing] = NOTHING_WEIGHT
    placed, right = torch.cat(found), torch.cat(truth)
    _, general = overlaps(placed, right)
    apart = l1_loss(placed, right, reduction="none").sum(1).mean()
    told = cross_entropy(kinds.flatten(0, 1), wanted.flatten(), weights)
    return told + BOX_WEIGHT * apart + OVERLAP_WEIGHT * (1 - general).mean()
