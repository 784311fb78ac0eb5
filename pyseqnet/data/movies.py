"""2000 film reviews, half of them favourable (Pang, Lee: A sentimental education, 2004)."""

from __future__ import annotations

import re
import zipfile
from typing import NamedTuple

from pyseqnet.data import find
from pyseqnet.data.text import words

FILE = "movie_reviews/movie_reviews.zip"
URL = "https://raw.githubusercontent.com/nltk/nltk_data/gh-pages/packages/corpora/movie_reviews.zip"
NAME = re.compile(r"/(?P<side>pos|neg)/cv(?P<fold>\d)\d\d_\d+\.txt$")


class Review(NamedTuple):
    words: list[str]
    label: int  # 1 if favourable
    fold: int  # of the publishers' ten for cross-validation


def reviews() -> list[Review]:
    """All reviews in the order of the archive's names, which tell the fold: cv000 to cv099 are fold 0."""
    found = []
    with zipfile.ZipFile(find(FILE, URL)) as archive:
        for name in sorted(archive.namelist()):
            if place := NAME.search(name):
                text = archive.read(name).decode("latin-1")
                found.append(Review(words(text), int(place["side"] == "pos"), int(place["fold"])))
    return found
