"""The readers of text corpora, and the recipes on miniatures of them, written here in the published formats."""

from __future__ import annotations

import gzip
import itertools
import json
import random
from pathlib import Path

import pytest
import torch

from pyseqnet import recipes
from pyseqnet.data import corpora
from pyseqnet.data.text import OTHER, Vocabulary
from pyseqnet.models import LanguageModel, WordTagger
from pyseqnet.recipes import parse, translate

pytest.importorskip("tqdm", reason="recipes need the extra 'recipes'")
pytest.importorskip("matplotlib", reason="recipes need the extra 'recipes'")

CONLLU = """# sent_id = 1
# text = I'll see {0}
1-2\tI'll\t_\t_\t_\t_\t_\t_\t_\t_
1\tI\tI\tPRON\tPRP\t_\t3\tnsubj\t_\t_
2\t'll\twill\tAUX\tMD\t_\t3\taux\t_\t_
3\tsee\tsee\tVERB\tVB\t_\t0\troot\t_\t_
3.1\tghost\tghost\tNOUN\tNN\t_\t_\t_\t_\t_
4\t{0}\t{0}\tPROPN\tNNP\t_\t3\tobj\t_\t_

"""
NAMES = ("anna", "berta", "carla", "dora", "emil")


@pytest.fixture
def miniature(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder with a little of everything."""
    monkeypatch.setenv("PYSEQNET_DATA", str(tmp_path / "data"))
    chance = random.Random(0)
    files: dict[str, str] = {"tinyshakespeare/input.txt": "To be, or not to be: that is the question.\n" * 200}
    for part in ("train", "dev", "test"):
        files[f"ud_ewt/en_ewt-ud-{part}.conllu"] = "".join(CONLLU.format(chance.choice(NAMES)) for _ in range(40))
    for intent in corpora.INTENTS:
        requests = [
            {
                "data": [
                    {"text": "play "},
                    {"text": f"{chance.choice(NAMES)} tonight", "entity": "track"},
                    {"text": " !"},
                ]
            }
            for _ in range(20)
        ]
        for name in (f"train_{intent}_full.json", f"validate_{intent}.json"):
            files[f"snips_cc0/{name}"] = json.dumps({intent: requests})
    spelled = [f"{''.join(letters)} {' '.join(letter.upper() for letter in letters)}"
               for letters in itertools.product("abst", repeat=4)]  # fmt: skip
    files["cmudict/cmudict.dict"] = "\n".join([*spelled, "a(2) EY1", "don't D OW1 N T", "ab AH0 B # place"])
    talks = [f'- - Who is {a}?\n  - "Friend of {b}"\n' for a, b in itertools.permutations(NAMES, 2)]
    for number, name in enumerate(corpora.CHATS):
        files[f"chatterbot_en/{name}.yml"] = f"categories:\n- {name}\nconversations:\n{talks[number]}{talks[0]}"
    for part, count in (("train", 200), ("val", 30), ("test_2016_flickr", 30)):
        pairs = [(chance.choice(NAMES), chance.choice(NAMES)) for _ in range(count)]
        files[f"multi30k/{part}.de"] = "".join(f"Zwei Hunde sehen {a} und {b} .\n" for a, b in pairs)
        files[f"multi30k/{part}.en"] = "".join(f"Two dogs see {a} and {b} .\n" for a, b in pairs)
    for name, text in files.items():
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if "conllu" in name or "multi30k" in name:
            path.with_name(path.name + ".gz").write_bytes(gzip.compress(text.encode()))
        else:
            path.write_bytes(text.encode())
    return tmp_path


def test_readers(miniature: Path) -> None:
    assert corpora.shakespeare().startswith("To be, or")
    sentence = corpora.ewt("dev")[0]
    assert sentence.tags == ["PRON", "AUX", "VERB", "PROPN"]
    assert sentence.words[:3] == ["I", "'ll", "see"]
    request = corpora.snips("validate")[0]
    assert request.tags == ["O", "B-track", "I-track", "O"]
    assert request.words[2:] == ["tonight", "!"]
    entries = corpora.cmudict()
    assert len(entries) == 4**4 + 1
    assert entries[-1] == ("ab", ["AH", "B"])
    tree = corpora.ewt_trees("train")[0]
    assert tree.heads == [2, 2, -1, 2]
    assert tree.relations == ["nsubj", "aux", "root", "obj"]
    # Five names are asked for, each has one answer, the first.
    assert corpora.chatterbot() == [
        (f"Who is {name}?", f"Friend of {'berta' if name == 'anna' else 'anna'}") for name in NAMES
    ]
    pairs = corpora.multi30k("val")
    assert len(pairs) == 30
    assert pairs[0][0].startswith("Zwei Hunde sehen")
    assert pairs[0][1].split()[3:] == [*pairs[0][0].split()[3:-3], "and", *pairs[0][0].split()[-2:]]
    (miniature / "data" / "tinyshakespeare" / "input.txt").write_bytes("café".encode("latin-1"))
    assert corpora.shakespeare() == "café"


@pytest.mark.parametrize("name", ["chat", "g2p", "lm", "parse", "slots", "tagging", "translate"])
def test_miniatures(name: str, miniature: Path) -> None:
    out = miniature / "out"
    out.mkdir()
    scores = recipes.find(name)(recipes.Settings(quick=True, out=out, progress=False, resume=miniature / "kept"))
    assert not recipes.missed(scores, recipes.Settings(quick=True))
    assert (out / "learning_curves.png").stat().st_size > 1000
    assert list((miniature / "kept").glob("*/last.pt"))
    # What was trained is not trained again: the same scores at once.
    again = recipes.find(name)(recipes.Settings(quick=True, out=out, progress=False, resume=miniature / "kept"))
    assert again == scores


@pytest.mark.parametrize("kind", ["lstm", "transformer"])
def test_language_model_does_not_look_ahead(kind: str) -> None:
    model = LanguageModel(6, kind=kind, size=8, layers=2).eval()
    text = torch.randint(0, 6, (2, 7))
    other = text.clone()
    other[:, 4:] = (other[:, 4:] + 1) % 6
    torch.testing.assert_close(model(text)[:, :4], model(other)[:, :4])
    stepper, scores = model.stepper(), []
    state = stepper.start()
    with torch.no_grad():
        for tokens in text.unbind(1):
            found, state = stepper.step(tokens, state)
            scores.append(found)
    torch.testing.assert_close(torch.stack(scores, 1), model(text), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="kind must be one of lstm, transformer"):
        LanguageModel(6, kind="gru")


@pytest.mark.parametrize("reader", ["lstm", "elman", "jordan", "none"])
@pytest.mark.parametrize("crf", [True, False])
def test_word_tagger_ignores_padding(reader: str, crf: bool) -> None:
    model = WordTagger(9, 4, trigrams=7, reader=reader, crf=crf, embedding_size=4, hidden_size=5).eval()
    words, lengths = torch.randint(1, 9, (3, 6)), torch.tensor([6, 2, 4])
    letters, tags = torch.randint(0, 7, (3, 6, 5)), torch.randint(0, 4, (3, 6))
    rows = [
        (words[i : i + 1, :n], lengths[i : i + 1], tags[i : i + 1, :n], letters[i : i + 1, :n])
        for i, n in enumerate(lengths.tolist())
    ]
    alone = sum(model.loss(*row) * int(row[1]) for row in rows) / 12
    torch.testing.assert_close(model.loss(words, lengths, tags, letters), alone, rtol=1e-4, atol=1e-5)
    wanted = [model.decode(w, n, t)[0] for w, n, _, t in rows]
    assert model.decode(words, lengths, letters) == wanted
    with pytest.raises(ValueError, match="reads the trigrams"):
        model(words, lengths)
    with pytest.raises(ValueError, match="reader must be one of"):
        WordTagger(9, 4, reader="gru")


def test_translated_texts_are_read_out_with_what_was_copied() -> None:
    german = Vocabulary([["hunde", "sehen", "und"]])
    english = Vocabulary([["dogs", "see", "anna", "and", "t", "shirt", "-"]], special=translate.SPECIAL)
    corpus = translate.Corpus([("Hunde sehen Anna und Berta, Berta", "Dogs see Anna and Berta")], german, english)
    size = len(english)
    assert corpus.own == [["hunde", "sehen", "und", "berta", ","]]
    assert corpus.places[0].tolist() == [size, size + 1, english["anna"], size + 2, size + 3, size + 4, size + 3]
    assert corpus.copied[0].tolist() == [
        english["<begin>"], english["dogs"], english["see"], english["anna"], english["and"], size + 3,
        english["<end>"],
    ]  # fmt: skip
    assert corpus.targets[0].tolist()[5] == OTHER
    row = [english["dogs"], size + 3, english["t"], english["-"], english["shirt"]]
    assert corpus.text(row, 0) == "dogs berta t-shirt"


def test_scheduled_sampling_goes_on_where_it_was() -> None:
    loss = translate.Sampled(None, None, 10)
    loss.step = 4
    other = translate.Sampled(None, None, 10)
    other.load_state_dict(loss.state_dict())
    assert other.step == 4


def random_tree(chance: random.Random, length: int) -> corpora.Parsed:
    """Any tree, crossing arcs included."""
    order = chance.sample(range(length), length)
    heads = [-1] * length
    for number, word in enumerate(order[1:], 1):
        heads[word] = order[chance.randrange(number)]
    tags = [chance.choice(("NOUN", "VERB")) for _ in range(length)]
    return corpora.Parsed(["w"] * length, tags, heads, [chance.choice(("obj", "nsubj:pass")) for _ in range(length)])


def test_trees_are_brackets_and_broken_ones_are_found() -> None:
    chance = random.Random(1)
    broken = 0
    for _ in range(200):
        tree = random_tree(chance, chance.randrange(1, 9))
        symbols = parse.linear(tree)
        found = parse.brackets(symbols)
        assert found is not None
        assert found.total() == len(set(tree.heads) - {-1})
        assert sum(symbol in ("NOUN", "VERB") for symbol in symbols) == len(tree.words)
        if found:
            place = chance.choice([i for i, symbol in enumerate(symbols) if symbol not in ("NOUN", "VERB")])
            broken += parse.brackets(symbols[:place] + symbols[place + 1 :]) is None
            assert parse.brackets([*symbols, parse.CLOSE]) is None
            assert parse.brackets([*symbols, "NOUN"]) is None
            assert parse.scores([symbols], [symbols], [len(tree.words)])["bracket F1"] == 100
        else:
            assert len(tree.words) == 1
    assert broken > 150
    assert parse.brackets([]) is None
    wrong = parse.scores([["(root", "VERB", ")"], [")"]], [["(root", "VERB", "NOUN", ")"]] * 2, [2, 2])
    assert wrong == {"well-formed": 50, "as many words": 0, "bracket F1": 0}
