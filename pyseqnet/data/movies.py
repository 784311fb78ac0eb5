"""2000 film reviews, half of them favourable (Pang, Lee: A sentimental education, 2004)."""

from __future__ import annotations

import zipfile

from pyseqnet.data import find
from pyseqnet.data.text import words

FILE = "movie_reviews/movie_reviews.zip"
URL = "https://raw.githubusercontent.com/nltk/nltk_data/gh-pages/packages/corpora/movie_reviews.zip"


def reviews() -> list[tuple[list[str], int]]:
    """(words, 1 if favourable else 0) of each review, in the order of the archive's names."""
    found = []
    with zipfile.ZipFile(find(FILE, URL)) as archive:
        for name in sorted(archive.namelist()):
            if name.endswith(".txt"):
                text = archive.read(name).decode("latin-1")
                found.append((words(text), int("/pos/" in name)))
    return found
