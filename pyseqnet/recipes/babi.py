"""Questions about short stories (bAbI): a memory network reads the sentences in three hops.

Weston et al., 2015 (data); Sukhbaatar, Szlam, Weston, Fergus: End-to-end memory networks, 2015.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyseqnet.data import babi
from pyseqnet.data.text import Vocabulary
from pyseqnet.models.memory_network import MemoryNetwork
from pyseqnet.recipes import Score, Settings
from pyseqnet.training import batches, fit

GOALS = {1: 99.0}  # of the tasks that are trained, accuracy in %
MEMORIES = 50
BATCH = 32
EPOCHS, LINEAR_EPOCHS = 100, 20  # the first ones without softmax


def _tensors(
    questions: list[babi.Question], vocabulary: Vocabulary, longest: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Stories (Q, MEMORIES, longest) with the newest sentence first, questions, numbers of sentences, answers."""
    story = torch.zeros(len(questions), MEMORIES, longest, dtype=torch.int64)
    asked = torch.zeros(len(questions), longest, dtype=torch.int64)
    for i, one in enumerate(questions):
        for j, sentence in enumerate(reversed(one.story[-MEMORIES:])):
            story[i, j, : len(sentence)] = vocabulary.encode(sentence)
        asked[i, : len(one.question)] = vocabulary.encode(one.question)
    counts = torch.tensor([min(len(one.story), MEMORIES) for one in questions])
    return story, asked, counts, torch.tensor([vocabulary[one.answer] for one in questions])


def _train(number: int, settings: Settings) -> list[Score]:
    training, testing = babi.task(number)
    if settings.quick:
        training, testing = training[:200], testing[:100]
    vocabulary = Vocabulary(sentence for one in training for sentence in (*one.story, one.question, (one.answer,)))
    longest = max(len(s) for one in training + testing for s in (*one.story, one.question))
    train, test = _tensors(training, vocabulary, longest), _tensors(testing, vocabulary, longest)
    model = MemoryNetwork(len(vocabulary), memories=MEMORIES)
    draw_batch = batches(len(training), BATCH, settings.seed)
    per_epoch = -(-len(training) // BATCH)

    def loss() -> Tensor:
        chosen = draw_batch()
        story, asked, counts, answers = (part[chosen] for part in train)
        scores = model(story[:, : int(counts.max())], asked, counts)
        return torch.nn.functional.cross_entropy(scores, answers)

    def evaluate() -> dict[str, float]:
        story, asked, counts, answers = test
        return {"accuracy": (model(story, asked, counts).argmax(1) == answers).double().mean().item()}

    for linear, epochs in ((True, settings.steps(LINEAR_EPOCHS, 2)), (False, settings.steps(EPOCHS, 4))):
        model.linear = linear
        history = fit(
            model,
            loss,
            epochs * per_epoch,
            learning_rate=1e-2,
            max_norm=10.0,
            evaluate=evaluate,
            name=f"task {number}{', without softmax' if linear else ''}",
            progress=settings.progress,
        )
    _draw_reading(model, testing[0], test, settings, number)
    accuracy = 100 * history.scores["accuracy"][-1]
    return [Score(f"accuracy, task {number}, %", accuracy, GOALS[number]), Score.fall(f"task {number}", history)]


def _draw_reading(
    model: MemoryNetwork, question: babi.Question, test: tuple[Tensor, ...], settings: Settings, number: int
) -> None:
    from pyseqnet.recipes import draw

    with torch.no_grad():
        _, read = model(test[0][:1], test[1][:1], test[2][:1], need_weights=True)
    told = [" ".join(sentence) for sentence in reversed(question.story[-MEMORIES:])]
    title = f"{' '.join(question.question)} {question.answer}"
    hops = [f"hop {hop + 1}" for hop in range(len(read))]
    draw.matrix(read[:, 0, : len(told)].t(), told, hops, settings.out / f"reading_{number}.png", title)


def run(settings: Settings) -> list[Score]:
    scores = []
    for number in GOALS:
        scores += _train(number, settings)
    return scores
