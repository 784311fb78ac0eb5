"""n-gram language models in the ARPA format, with back-off, for CTC beam search.

Katz: Estimation of probabilities from sparse data for the language model component of a speech recognizer, 1987.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from os import PathLike

_LN10 = math.log(10.0)


class ArpaLanguageModel:
    """A back-off n-gram model, read from an ARPA file: the log-probability of a word after the words before it.

    Called with a prefix of labels and a label it is the ``language_model`` of `pyseqnet.decoding.ctc_beam_search`.

    Args:
        path: a file in ARPA format: ``\\data\\``, then for each order lines of log10 probability, words, and log10
            back-off weight.
        labels: the word of each label; None: labels are words themselves in `score`, and calling is an error.
        unknown: the word that stands for those the file lacks. If the file lacks it as well, their log-probability is
            -inf.

    Attributes:
        order: of the longest n-grams.

    Raises:
        ValueError, with the line's number, for a file that is not of the format.

    Paper: Katz, Estimation of probabilities from sparse data, 1987.
    """

    def __init__(
        self, path: str | PathLike[str], labels: Sequence[str] | None = None, *, unknown: str = "<unk>"
    ) -> None:
        self.labels = None if labels is None else list(labels)
        self.unknown = unknown
        self._ngrams: dict[tuple[str, ...], tuple[float, float]] = {}  # natural log: probability, back-off weight
        self.order = 0
        with open(path, encoding="utf-8") as lines:
            self._read(lines)

    def _read(self, lines: Iterable[str]) -> None:
        expected: dict[int, int] = {}
        found: dict[int, int] = {}
        section: int | None = None  # 0: \data\; n: n-grams
        for number, line in enumerate(lines, 1):
            text = line.strip()
            if not text or (section is None and text != "\\data\\"):
                continue
            try:
                if text == "\\end\\":
                    section = -1
                    break
                if text == "\\data\\":
                    section = 0
                elif text.startswith("\\") and text.endswith("-grams:"):
                    section = int(text[1 : -len("-grams:")])
                    found[section] = 0
                elif section == 0:
                    order, count = text.removeprefix("ngram ").split("=")
                    expected[int(order)] = int(count)
                elif section:
                    self._add(text.split(), section)
                    found[section] += 1
            except ValueError as error:
                raise ValueError(f"ARPA line {number}: {text!r}: {error}") from None
        if section != -1:
            raise ValueError("ARPA: expected \\data\\ and, at the end, \\end\\")
        if found != expected:
            raise ValueError(f"ARPA: \\data\\ announces n-grams {expected}, the file has {found}")
        self.order = max(found, default=0)
        if self.order < 1:
            raise ValueError("ARPA: the file has no n-grams")

    def _add(self, fields: list[str], order: int) -> None:
        if len(fields) not in (order + 1, order + 2):
            raise ValueError(f"expected a probability, {order} words and perhaps a back-off weight")
        backoff = float(fields[order + 1]) if len(fields) == order + 2 else 0.0
        self._ngrams[tuple(fields[1 : order + 1])] = (float(fields[0]) * _LN10, backoff * _LN10)

    def _known(self, word: str) -> str:
        return word if (word,) in self._ngrams else self.unknown

    def log_prob(self, context: Sequence[str], word: str) -> float:
        """Natural log-probability of a word after others (the last ``order - 1`` count); begin with ``"<s>"``."""
        kept = context[max(len(context) - self.order + 1, 0) :]
        history, last = tuple(self._known(w) for w in kept), self._known(word)
        weight = 0.0
        while True:
            entry = self._ngrams.get((*history, last))
            if entry is not None:
                return weight + entry[0]
            if not history:
                return -math.inf
            weight += self._ngrams.get(history, (0.0, 0.0))[1]
            history = history[1:]

    def score(self, words: Sequence[str], *, end: bool = True) -> float:
        """Natural log-probability of a sentence, from ``<s>`` and, unless ``end=False``, to ``</s>``."""
        text = ["<s>", *words, *(["</s>"] if end else [])]
        return sum(self.log_prob(text[:i], text[i]) for i in range(1, len(text)))

    def __call__(self, prefix: tuple[int, ...], label: int) -> float:
        if self.labels is None:
            raise ValueError("ArpaLanguageModel: labels= says which word each label is")
        kept = prefix[max(len(prefix) - self.order + 1, 0) :]
        start = ["<s>"] if len(prefix) < self.order - 1 else []
        return self.log_prob([*start, *(self.labels[c] for c in kept)], self.labels[label])
