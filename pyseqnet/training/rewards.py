"""What a finished sequence is worth: BLEU of texts, F1 of chunks. Numbers (B,), for `self_critical_loss` and tests."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def sentence_bleu(hypotheses: Sequence[str], references: Sequence[str]) -> Tensor:
    """BLEU of each text, 0 to 1, by sacrebleu (the extra ``recipes``), smoothed as it does for sentences.

    Papers: Papineni et al., BLEU, 2002; Post, A call for clarity in reporting BLEU scores, 2018.
    """
    from sacrebleu.metrics.bleu import BLEU

    bleu = BLEU(effective_order=True)  # a sentence of three words has no four-grams
    pairs = zip(hypotheses, references, strict=True)
    return torch.tensor([bleu.sentence_score(found, [wanted]).score / 100 for found, wanted in pairs])


def corpus_bleu(hypotheses: Sequence[str], references: Sequence[str]) -> float:
    """BLEU of all texts together, 0 to 100, by sacrebleu: the number that papers give."""
    import sacrebleu

    score: float = sacrebleu.corpus_bleu(list(hypotheses), [list(references)]).score
    return score


def _split(tag: str) -> tuple[str, str]:
    prefix, _, kind = tag.partition("-")
    return prefix, kind or "_"


def chunks(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """The chunks ``(kind, first, last)`` that BIO tags (also IOES, BIOES) mark, by the rules of the CoNLL evaluation.

    A chunk goes on as long as its kind does: an I- behind another kind, or behind O, begins a chunk.

    >>> sorted(chunks(["B-city", "I-city", "O", "I-date", "B-date"]))
    [('city', 0, 1), ('date', 3, 3), ('date', 4, 4)]
    """
    found, first, before, kind_before = set(), 0, "O", ""
    for place, tag in enumerate([*tags, "O"]):
        prefix, kind = _split(tag)
        breaks = kind != kind_before or prefix in ("B", "S", "O") or before in ("E", "S", "O")
        if breaks and before != "O":
            found.add((kind_before, first, place - 1))
        if breaks and prefix != "O":
            first = place
        before, kind_before = prefix, kind
    return found


def _f1(right: int, wanted: int, found: int) -> float:
    return 2 * right / (wanted + found) if wanted + found else 0.0


def chunk_f1(truth: Iterable[Sequence[str]], predicted: Iterable[Sequence[str]]) -> float:
    """F1 over the chunks of all sentences together, 0 to 1: equal to ``seqeval.metrics.f1_score``.

    >>> chunk_f1([["B-a", "I-a", "O"]], [["B-a", "O", "B-b"]])
    0.0

    Paper: Tjong Kim Sang, Buchholz, Introduction to the CoNLL-2000 shared task: chunking, 2000.
    """
    right = wanted = found = 0
    for truth_tags, predicted_tags in zip(truth, predicted, strict=True):
        if len(truth_tags) != len(predicted_tags):
            raise ValueError(f"a sentence has {len(truth_tags)} tags in truth and {len(predicted_tags)} predicted")
        a, b = chunks(truth_tags), chunks(predicted_tags)
        right, wanted, found = right + len(a & b), wanted + len(a), found + len(b)
    return _f1(right, wanted, found)


def sentence_chunk_f1(truth: Iterable[Sequence[str]], predicted: Iterable[Sequence[str]]) -> Tensor:
    """F1 of each sentence, (B,); 1 where there is no chunk and none was found."""
    values = []
    for truth_tags, predicted_tags in zip(truth, predicted, strict=True):
        a, b = chunks(truth_tags), chunks(predicted_tags)
        values.append(_f1(len(a & b), len(a), len(b)) if a or b else 1.0)
    return torch.tensor(values)
