"""XQuAD, English: 240 paragraphs of Wikipedia with questions, whose answers stand in them (Artetxe et al., 2020)."""

from __future__ import annotations

import json
import re
from typing import NamedTuple

from pyseqnet.data import find
from pyseqnet.data.text import words

FILE = "xquad_en/xquad.en.json"
URL = "https://raw.githubusercontent.com/google-deepmind/xquad/master/xquad.en.json"
SENTENCE = re.compile(r"\S.*?(?:[.!?][\"')\]]?(?=\s+[\"'(A-Z0-9])|$)", re.DOTALL)


class Question(NamedTuple):
    words: list[str]
    sentence: int  # of the paragraph: where the answer begins
    answer: str


class Paragraph(NamedTuple):
    sentences: list[list[str]]
    questions: list[Question]


def paragraphs() -> list[Paragraph]:
    """All paragraphs, cut into sentences at stops before a capital letter or a figure."""
    found = []
    for article in json.loads(find(FILE, URL).read_text(encoding="utf-8"))["data"]:
        for paragraph in article["paragraphs"]:
            text = paragraph["context"]
            ends = [match.end() for match in SENTENCE.finditer(text)]
            starts = [0, *ends[:-1]]
            asked = []
            for question in paragraph["qas"]:
                answer = question["answers"][0]
                place = next(i for i, end in enumerate(ends) if answer["answer_start"] < end)
                asked.append(Question(words(question["question"]), place, answer["text"]))
            sentences = [words(text[start:end]) for start, end in zip(starts, ends, strict=True)]
            found.append(Paragraph(sentences, asked))
    return found
