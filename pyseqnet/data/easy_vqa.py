"""easy-VQA: 5000 images of one coloured shape and 48 000 simple questions about them (Zhou, 2019)."""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pyseqnet.data import find
from pyseqnet.data.text import words

ORIGIN = "https://github.com/vzhou842/easy-VQA, images as one .npz"


@dataclass(frozen=True)
class Part:
    """Images (I, 3, 64, 64) in [0, 1]; for each question its words, the row of its image, and its answer (Q,)."""

    images: Tensor
    questions: list[list[str]]
    image: Tensor
    answers: Tensor


def load() -> tuple[Part, Part, list[str]]:
    """The training part, the test part, and the 13 answers."""
    answers = find("easy_vqa/answers.txt", origin=ORIGIN).read_text().split()
    numbers = {answer: number for number, answer in enumerate(answers)}
    parts = []
    for part in ("train", "test"):
        with np.load(find("easy_vqa/images.npz", origin=ORIGIN), allow_pickle=False) as file:
            images = torch.from_numpy(file[f"img_{part}"]).permute(0, 3, 1, 2).contiguous() / 255
            rows = {int(name): row for row, name in enumerate(file[f"id_{part}"])}
        with gzip.open(find(f"easy_vqa/questions_{part}.json.gz", origin=ORIGIN), "rt") as lines:
            asked = json.load(lines)
        parts.append(
            Part(
                images,
                [words(question) for question, _, _ in asked],
                torch.tensor([rows[image] for _, _, image in asked]),
                torch.tensor([numbers[answer] for _, answer, _ in asked]),
            )
        )
    return parts[0], parts[1], answers
