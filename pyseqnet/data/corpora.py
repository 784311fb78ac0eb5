"""Readers of text corpora: tiny Shakespeare, UD English EWT, SNIPS (slots), CMUdict (pronunciations), Multi30k."""

from __future__ import annotations

import gzip
import json
import re
from typing import NamedTuple

from pyseqnet import data
from pyseqnet.data.text import words

_GITHUB = "https://raw.githubusercontent.com"
SHAKESPEARE = f"{_GITHUB}/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
EWT = f"{_GITHUB}/UniversalDependencies/UD_English-EWT/master"
SNIPS = f"{_GITHUB}/snipsco/nlu-benchmark/master/2017-06-custom-intent-engines"
CMUDICT = f"{_GITHUB}/cmusphinx/cmudict/master/cmudict.dict"
MULTI30K = f"{_GITHUB}/multi30k/dataset/master/data/task1/raw"
INTENTS = (
    "AddToPlaylist", "BookRestaurant", "GetWeather", "PlayMusic", "RateBook", "SearchCreativeWork",
    "SearchScreeningEvent",
)  # fmt: skip
CHATTERBOT = f"{_GITHUB}/gunthercox/chatterbot-corpus/master/chatterbot_corpus/data/english"
CHATS = (
    "ai", "botprofile", "computers", "conversations", "emotion", "food", "gossip", "greetings", "health", "history",
    "humor", "literature", "money", "movies", "politics", "psychology", "science", "sports", "trivia",
)  # fmt: skip
WORD_COLUMN, UPOS_COLUMN, HEAD_COLUMN, RELATION_COLUMN = 1, 3, 6, 7  # of CoNLL-U


class Tagged(NamedTuple):
    """A sentence, each word with its tag."""

    words: list[str]
    tags: list[str]


def _text(name: str, url: str, origin: str) -> str:
    """A file of the data folder, compressed or not; UTF-8, or Latin-1 where it is not that."""
    packed = data.folder() / f"{name}.gz"
    raw = gzip.decompress(packed.read_bytes()) if packed.exists() else data.find(name, url, origin).read_bytes()
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw.decode("latin-1")


def shakespeare() -> str:
    """A megabyte of plays, one text (Karpathy's char-rnn)."""
    return _text("tinyshakespeare/input.txt", SHAKESPEARE, "github.com/karpathy/char-rnn")


class Parsed(NamedTuple):
    """A sentence as a dependency tree: of each word its tag, its head's place (-1: none) and its relation to it."""

    words: list[str]
    tags: list[str]
    heads: list[int]
    relations: list[str]


def ewt(part: str) -> list[Tagged]:
    """Sentences of the English Web Treebank with universal parts of speech; part: "train", "dev" or "test"."""
    return [Tagged(sentence.words, sentence.tags) for sentence in ewt_trees(part)]


def ewt_trees(part: str) -> list[Parsed]:
    """Sentences of the English Web Treebank with their dependency trees; part: "train", "dev" or "test".

    Silveira et al., A gold standard dependency corpus for English, 2014.
    """
    name = f"en_ewt-ud-{part}.conllu"
    text = _text(f"ud_ewt/{name}", f"{EWT}/{name}", "github.com/UniversalDependencies/UD_English-EWT")
    sentences = []
    for block in text.split("\n\n"):
        rows = [line.split("\t") for line in block.splitlines() if line and not line.startswith("#")]
        rows = [row for row in rows if row[0].isdigit()]  # not 3-4 (a contraction) and 5.1 (an ellipsis)
        if rows:
            columns = list(zip(*rows, strict=True))
            heads = [int(head) - 1 for head in columns[HEAD_COLUMN]]
            sentences.append(
                Parsed(list(columns[WORD_COLUMN]), list(columns[UPOS_COLUMN]), heads, list(columns[RELATION_COLUMN]))
            )
    return sentences


def snips(part: str) -> list[Tagged]:
    """Requests to an assistant with BIO tags of their slots; part: "train" (13784) or "validate" (700).

    Coucke et al., Snips voice platform, 2018.
    """
    requests = []
    for intent in INTENTS:
        name = f"train_{intent}_full.json" if part == "train" else f"{part}_{intent}.json"
        text = _text(f"snips_cc0/{name}", f"{SNIPS}/{intent}/{name}", "github.com/snipsco/nlu-benchmark")
        for request in json.loads(text)[intent]:
            found = Tagged([], [])
            for piece in request["data"]:
                inside = words(piece["text"])
                slot = piece.get("entity")
                found.words.extend(inside)
                found.tags.extend(["O" if slot is None else f"{'I' if i else 'B'}-{slot}" for i in range(len(inside))])
            if found.words:
                requests.append(found)
    return requests


def cmudict() -> list[tuple[str, list[str]]]:
    """Words and their phones without stress marks, the first pronunciation of each; no digits or punctuation."""
    entries = []
    for line in _text("cmudict/cmudict.dict", CMUDICT, "github.com/cmusphinx/cmudict").splitlines():
        word, *phones = line.split("#")[0].split()
        if word.isalpha() and word.isascii():
            entries.append((word, [re.sub(r"\d", "", phone) for phone in phones]))
    return entries


def multi30k(part: str) -> list[tuple[str, str]]:
    """Captions in German and English; part: "train" (29000), "val" (1014), "test_2016_flickr" (1000).

    Elliott, Frank, Sima'an, Specia, Multi30K: multilingual English-German image descriptions, 2016.
    """
    sides = []
    for language in ("de", "en"):
        name = f"{part}.{language}.gz"
        path = data.find(f"multi30k/{name}", f"{MULTI30K}/{name}", "github.com/multi30k/dataset")
        sides.append(gzip.decompress(path.read_bytes()).decode("utf-8").splitlines())
    return list(zip(*sides, strict=True))


def chatterbot() -> list[tuple[str, str]]:
    """What is said to a chat bot and what it answers (ChatterBot's English corpus), the first answer of each.

    Needs PyYAML (the extra ``recipes``).
    """
    import yaml

    answers: dict[str, str] = {}
    for name in CHATS:
        file = f"{name}.yml"
        text = _text(f"chatterbot_en/{file}", f"{CHATTERBOT}/{file}", "github.com/gunthercox/chatterbot-corpus")
        for said, answer, *_ in (talk for talk in yaml.safe_load(text)["conversations"] if len(talk) > 1):
            answers.setdefault(str(said), str(answer))
    return list(answers.items())
