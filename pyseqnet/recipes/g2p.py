"""From spelling to sound (CMUdict): LSTMs with three kinds of attention and a Transformer; greedy and beam search.

Yao, Zweig: Sequence-to-sequence neural net models for grapheme-to-phoneme conversion, 2015; Bahdanau, Cho, Bengio,
2015; Chorowski et al., 2015; Vaswani et al., 2017. The subset: words of 3 to 10 letters.
"""

from __future__ import annotations

from typing import Any

import torch

from pyseqnet.data import corpora
from pyseqnet.data.text import Vocabulary
from pyseqnet.models import RecurrentTranslator, SequenceTranslator
from pyseqnet.recipes import Score, Settings
from pyseqnet.recipes.edit_distance import error_rate
from pyseqnet.recipes.sequence_pairs import SPECIAL, Pairs, symbols, train, write

SHORTEST, LONGEST = 3, 10  # letters of a word
HELD_OUT, QUICK_HELD_OUT, QUICK_WORDS = 2000, 100, 2000
GLANCE = 200  # held-out words that are looked at during the training
BATCH, EPOCHS, QUICK_STEPS = 64, 6, 60
BEAMS = 5
MOST_PHONES = 20  # written for a word
SHOWN = 6  # letters at least of the word whose attention is drawn
MODELS = ("LSTM", "LSTM, additive", "LSTM, location-aware", "Transformer")
LEARNING_RATES = {"Transformer": 2e-3}
OTHER_LEARNING_RATE = 4e-3


def build(name: str, letters: Vocabulary, phones: Vocabulary) -> Any:
    if name == "Transformer":
        sizes = {"d_model": 128, "num_encoder_layers": 2, "num_decoder_layers": 2, "dim_feedforward": 256}
        return SequenceTranslator(len(letters), len(phones), dropout=0.1, **sizes, **symbols(phones))
    attention = {"LSTM": "none", "LSTM, additive": "additive", "LSTM, location-aware": "location"}[name]
    return RecurrentTranslator(len(letters), len(phones), attention=attention, dropout=0.1, **symbols(phones))


def phones_of(model: Any, pairs: Pairs, beams: int = 1, count: int | None = None) -> list[list[str]]:
    return [[str(phone) for phone in row] for row in write(model, pairs, MOST_PHONES, beams=beams, count=count)]


def run(settings: Settings) -> list[Score]:
    from pyseqnet.recipes import draw

    entries = [entry for entry in corpora.cmudict() if SHORTEST <= len(entry[0]) <= LONGEST]
    order = torch.randperm(len(entries), generator=torch.Generator().manual_seed(settings.seed)).tolist()
    count = settings.steps(HELD_OUT, QUICK_HELD_OUT)
    held_out = [entries[i] for i in order[:count]]
    training = [entries[i] for i in order[count : count + QUICK_WORDS if settings.quick else None]]
    letters = Vocabulary(word for word, _ in training)
    phones = Vocabulary((sounds for _, sounds in training), special=SPECIAL)
    truth = [sounds for _, sounds in held_out]
    known, test = Pairs(training, letters, phones), Pairs(held_out, letters, phones)

    scores, histories = [], {}
    for name in ("LSTM, additive",) if settings.quick else MODELS:
        torch.manual_seed(settings.seed)
        model = build(name, letters, phones)

        def glance(model: Any = model) -> dict[str, float]:
            return {"error": error_rate(phones_of(model, test, count=GLANCE), truth[:GLANCE])}

        histories[name] = train(
            name, model, known, settings, epochs=EPOCHS, quick_steps=QUICK_STEPS, batch=BATCH, smoothing=0.05,
            rate=LEARNING_RATES.get(name, OTHER_LEARNING_RATE), evaluate=glance,
        )  # fmt: skip
        greedy, beam = (100 * error_rate(phones_of(model, test, beams), truth) for beams in (1, BEAMS))
        goal = 10.0 if name in ("LSTM, additive", "Transformer") else None
        scores.append(Score(f"phone errors, {name}, greedy, %", greedy))
        scores.append(Score(f"phone errors, {name}, {BEAMS} beams, %", beam, goal, at_least=False))
        scores.append(Score.fall(name, histories[name]))
        if name == "LSTM, additive":
            shown = next((word for word, _ in held_out if len(word) >= SHOWN), held_out[0][0])
            found = model.search(letters.encode(shown).unsqueeze(0), MOST_PHONES, return_alignments=True)
            written = [str(phone) for phone in phones.decode(found.tokens[0, 0].tolist())]
            draw.matrix(found.alignments[0, 0], written, list(shown), settings.out / "attention.png", name)
    draw.curves(histories, settings.out / "learning_curves.png")
    return scores
