"""Where is what? A detection Transformer on images of rectangles, discs and triangles.

Carion et al., 2020. The images are made on the spot.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyseqnet.data import shapes
from pyseqnet.models.detr import DetectionTransformer, detection_loss, overlaps
from pyseqnet.recipes import Score, Settings
from pyseqnet.training import batches, fit

TRAINING, TESTED = 8000, 500  # images
BATCH = 32
STEPS, QUICK_STEPS = 4000, 20
OVERLAP = 0.5  # from which on a box counts as found


def mean_average_precision(model: DetectionTransformer, scenes: shapes.Scenes) -> float:
    """The area under precision over recall, boxes ranked by their score, mean over the kinds (mAP at IoU 0.5)."""
    with torch.no_grad():
        kinds, boxes = (torch.cat(parts) for parts in zip(*(model(x) for x in scenes.images.split(100)), strict=True))
    chances = kinds.softmax(2)
    areas = []
    for kind in range(model.classes):
        order = chances[:, :, kind].flatten().argsort(descending=True)
        left = [own_boxes[own == kind] for own, own_boxes in zip(scenes.kinds, scenes.boxes, strict=True)]
        total = sum(len(one) for one in left)
        hits = []
        for place in order.tolist():
            image, query = divmod(place, kinds.shape[1])
            fits, _ = overlaps(boxes[image, query], left[image])
            hit = len(fits) > 0 and float(fits.max()) >= OVERLAP
            if hit:  # each object is found once
                left[image] = torch.cat([left[image][: fits.argmax()], left[image][fits.argmax() + 1 :]])
            hits.append(hit)
        right = torch.tensor(hits).double()
        precision = right.cumsum(0) / torch.arange(1, len(hits) + 1)
        best = precision.flip(0).cummax(0).values.flip(0)  # at this recall or a higher one
        areas.append(float((best * right).sum() / total))
    return sum(areas) / len(areas)


def run(settings: Settings) -> list[Score]:
    generator = torch.Generator().manual_seed(settings.seed)
    train = shapes.scenes(settings.steps(TRAINING, 200), generator)
    test = shapes.scenes(settings.steps(TESTED, 50), generator)
    model = DetectionTransformer(len(shapes.KINDS))
    draw_batch = batches(len(train.images), BATCH, settings.seed)

    def loss() -> Tensor:
        chosen = draw_batch()
        kinds, boxes = model(train.images[chosen])
        own = chosen.tolist()
        return detection_loss(kinds, boxes, [train.kinds[i] for i in own], [train.boxes[i] for i in own])

    history = fit(
        model,
        loss,
        settings.steps(STEPS, QUICK_STEPS),
        learning_rate=1e-3,
        weight_decay=1e-4,
        evaluate=lambda: {"mAP": mean_average_precision(model, test)},
        looks=5,
        name="detection",
        progress=settings.progress,
    )
    _draw(model, test, settings)
    return [
        Score("mean average precision at IoU 0.5", mean_average_precision(model, test), 0.9),
        Score.fall("detection", history),
    ]


def _draw(model: DetectionTransformer, scenes: shapes.Scenes, settings: Settings) -> None:
    """Test images with the outlines of what was found, and its kinds above."""
    from pyseqnet.recipes import draw

    shown = scenes.images[:16].clone()
    with torch.no_grad():
        kinds, boxes = model(shown)
    titles = []
    size = shown.shape[-1]
    for image, own_kinds, own_boxes in zip(shown, kinds.argmax(2), boxes, strict=True):
        chosen = own_kinds < model.classes
        titles.append(", ".join(shapes.KINDS[kind] for kind in own_kinds[chosen].tolist()))
        for x, y, width, height in own_boxes[chosen].tolist():
            left, right = (int(min(max(v, 0), 1) * (size - 1)) for v in (x - width / 2, x + width / 2))
            top, bottom = (int(min(max(v, 0), 1) * (size - 1)) for v in (y - height / 2, y + height / 2))
            image[:, top : bottom + 1, [left, right]] = 1
            image[:, [top, bottom], left : right + 1] = 1
    draw.images(shown.permute(0, 2, 3, 1), titles, settings.out / "found.png", columns=4)
