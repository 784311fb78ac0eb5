"""Recipes: one readable file each that loads data, trains a model, reports the field's metric and draws the result.

``pyseqnet train NAME`` runs one, ``pyseqnet train --list`` names them. A recipe is a module with a docstring and a
function ``run(settings) -> list[Score]``.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from pyseqnet.training import History

RECIPES = {
    "audio2vec": "pyseqnet.recipes.audio2vec",
    "babi": "pyseqnet.recipes.babi",
    "chat": "pyseqnet.recipes.chat",
    "detect": "pyseqnet.recipes.detect",
    "digits": "pyseqnet.recipes.digits",
    "fashion": "pyseqnet.recipes.fashion",
    "g2p": "pyseqnet.recipes.g2p",
    "go-net": "pyseqnet.recipes.go_net",
    "graph": "pyseqnet.recipes.graph",
    "key-terms": "pyseqnet.recipes.key_terms",
    "lm": "pyseqnet.recipes.lm",
    "mnist": "pyseqnet.recipes.mnist",
    "multi-label": "pyseqnet.recipes.multi_label",
    "ntm": "pyseqnet.recipes.ntm",
    "reading": "pyseqnet.recipes.reading",
    "sagan": "pyseqnet.recipes.sagan",
    "parse": "pyseqnet.recipes.parse",
    "sentiment": "pyseqnet.recipes.sentiment",
    "slots": "pyseqnet.recipes.slots",
    "speech-digits": "pyseqnet.recipes.speech_digits",
    "speech-translation": "pyseqnet.recipes.speech_translation",
    "spoken-qa": "pyseqnet.recipes.spoken_qa",
    "tagging": "pyseqnet.recipes.tagging",
    "text-autoencoder": "pyseqnet.recipes.text_autoencoder",
    "translate": "pyseqnet.recipes.translate",
    "tts-toy": "pyseqnet.recipes.tts_toy",
    "vqa": "pyseqnet.recipes.vqa",
}


@dataclass(frozen=True)
class Settings:
    """What a recipe is asked for."""

    seed: int = 0
    quick: bool = False  # a falling loss in well under a minute, not the goals
    out: Path = Path("recipe")  # pictures and tables; it exists
    progress: bool = True
    resume: Path | None = None  # checkpoints are kept there, and an interrupted run goes on from them

    def checkpoints(self, name: str) -> Path | None:
        """The folder of one training's checkpoints, for `pyseqnet.training.fit`; None for none."""
        return None if self.resume is None else self.resume / name.replace(" ", "_").replace(",", "")

    def steps(self, full: int, quick: int) -> int:
        return quick if self.quick else full


@dataclass(frozen=True)
class Score:
    """A measured figure. With a goal it can be missed: it has to be at least, or at most, that."""

    name: str
    value: float
    goal: float | None = None
    at_least: bool = True
    always: bool = False  # has to be reached in a quick run, too

    @property
    def passed(self) -> bool:
        if self.goal is None:
            return True
        return self.value >= self.goal if self.at_least else self.value <= self.goal

    @classmethod
    def fall(cls, name: str, history: History) -> Score:
        """How far the training loss fell from the first look to the last: what a quick run has to show."""
        return cls(f"fall of the loss, {name}", history.loss[0] - history.loss[-1], 0.0, always=True)


def missed(scores: list[Score], settings: Settings) -> list[Score]:
    """The scores that count for this run and are not what they have to be."""
    return [score for score in scores if not score.passed and (score.always or not settings.quick)]


def find(name: str) -> Callable[[Settings], list[Score]]:
    """The ``run`` of a recipe. Raises KeyError with the names there are."""
    if name not in RECIPES:
        raise KeyError(f"no recipe {name!r}; there are {', '.join(sorted(RECIPES))}")
    return cast("Callable[[Settings], list[Score]]", importlib.import_module(RECIPES[name]).run)


def summary(name: str) -> str:
    """The first line of a recipe's docstring."""
    text = importlib.import_module(RECIPES[name]).__doc__ or ""
    return text.strip().splitlines()[0]


__all__ = ["RECIPES", "Score", "Settings", "find", "missed", "summary"]
