"""The demo: its parts on a small budget. `make demo` runs the whole."""

from __future__ import annotations

import re

import pytest
import torch

pytest.importorskip("sklearn", reason="the demo needs the extra 'demo'")
pytest.importorskip("matplotlib", reason="the demo needs the extra 'demo'")
pytest.importorskip("jinja2", reason="the demo needs the extra 'demo'")
pytest.importorskip("babel", reason="the demo needs the extra 'demo'")
pytest.importorskip("tqdm", reason="the demo needs the extra 'demo'")

from pyseqnet.data import images
from pyseqnet.demo import dates, jobs, python_source, speed
from pyseqnet.demo.__main__ import main
from pyseqnet.models import SequenceTagger


def test_split_is_stratified_and_seeded() -> None:
    data, again = images.digits(3), images.digits(3)
    assert data.train_images.shape == (1347, 1, 8, 8)
    assert data.test_images.shape == (450, 1, 8, 8)
    assert torch.equal(data.test_images, again.test_images)
    share = torch.bincount(data.test_labels) / torch.bincount(torch.cat([data.train_labels, data.test_labels]))
    assert (share - 0.25).abs().max() < 0.01


def test_shifted_images_are_shifted_images() -> None:
    image = torch.arange(2 * 3 * 4 * 5.0).view(2, 3, 4, 5)
    moved = images.shifted(image.repeat(50, 1, 1, 1), torch.Generator().manual_seed(0))
    assert moved.shape == (100, 3, 4, 5)
    padded = torch.nn.functional.pad(image, [1] * 4, mode="replicate")
    wanted = [padded[:, :, i : i + 4, j : j + 5] for i in range(3) for j in range(3)]
    for n, one in enumerate(moved):
        assert any(torch.equal(one, candidate[n % 2]) for candidate in wanted)


SOURCE = '''def f(x, *, _if=0x1F):  # if
    """Two
    lines"""
    return "é" \\
        if x is not None else 1e-3j
'''
KINDS = """kkk_n+n+_++_nnn+NNNN++__CCCC
____SSSSSSSSSSSSSSSSSSS
____kkkkkk_SSS_+
________kk_n_kk_kkk_kkkk_kkkk_NNNNN
"""  # of its characters; the ends of lines are spaces


def test_every_character_of_a_source_has_its_kind() -> None:
    source = python_source.read("f.py", SOURCE)
    letters = ["_knNSC+"[kind] for kind in source.kinds.tolist()]
    text = "".join("\n" if c == "\n" and k == "_" else k for c, k in zip(SOURCE, letters, strict=True))
    assert text.split() == KINDS.split()
    assert source.symbols[SOURCE.index("é")] == python_source.SYMBOLS - 1


def test_formatted_strings_in_every_python() -> None:
    text = "f'{x!r:>{3}} {{a}}'\n"
    kinds = python_source.read("f.py", text).kinds
    assert kinds[:2].tolist() == [4, 4]
    assert kinds[12:-1].tolist() == [4] * 7
    assert all(kinds[i] or text[i].isspace() for i in range(len(text)))


def test_source_is_split_by_file() -> None:
    sources, held_out = python_source.load(0, 0.02)
    assert not {s.name for s in sources} & {s.name for s in held_out}
    assert sum(len(s.text) for s in sources) >= 0.02 * python_source.TRAINING_CHARACTERS
    assert all(len(s.text) == len(s.symbols) == len(s.kinds) for s in sources + held_out)
    symbols, kinds = python_source.windows(held_out)
    text = "".join(s.text for s in held_out)
    assert symbols.shape == kinds.shape == (len(text) - python_source.WINDOW + 1, python_source.WINDOW)
    again = python_source.load(0, 0.02)[1]
    assert [s.name for s in again] == [s.name for s in held_out]


def test_dates_are_split_by_day() -> None:
    corpus = dates.load(0, 0.02)
    assert not set(corpus.training.iso) & set(corpus.test.iso)
    assert dates.read(corpus.test.target[:, 1:]) == corpus.test.iso
    assert corpus.training.source.max() < corpus.source_symbols
    assert set(corpus.training.locales) == set(dates.LOCALES)
    row = corpus.training.source[0]
    text = corpus.training.texts[0]
    assert "".join(corpus.characters[i - dates.SPECIAL] for i in row[: len(text)].tolist()) == text
    assert not row[len(text) :].any()
    assert dates.read(torch.tensor([[3, 4, 2, 3], [5, 0, 13, 1]])) == ["01", "2?-?"]


def test_report_is_one_page_and_a_missed_goal_is_an_error(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(speed, "measure", lambda: [speed.Row("a row", 1e-3, 2e-3, 1e-7, 1e-7)])
    threads = torch.get_num_threads()
    try:
        status = main(["--out", str(tmp_path / "report"), "--share", "0.01"])
    finally:
        torch.set_num_threads(threads)
    assert status == 1
    missed = capsys.readouterr().err
    assert all(f"missed: {name}" in missed for name in ("digits", "Python source", "dates"))
    names = {path.name for path in (tmp_path / "report").iterdir()}
    pictures = {
        "digits_learning_curve.png", "digits_confusion_matrix.png", "digits_first_layer_filters.png",
        "python_learning_curve.png", "python_confusion_matrix.png", "dates_learning_curve.png",
        "dates_cross_attention.png", "kernel_speed.png",
    }  # fmt: skip
    assert names == {"index.html", *pictures}
    page = (tmp_path / "report" / "index.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == len(pictures)
    assert not re.search(r"(src|href)=\"(?!data:|#)", page)  # nothing is fetched from anywhere
    assert "<mark" in page
    assert sum(f"<td>{locale}</td>" in page for locale in dates.LOCALES) > 8  # the test has 20 dates here


def test_pieces_of_a_file_are_put_together_again() -> None:
    model = SequenceTagger(python_source.SYMBOLS, 7, hidden_size=8)
    source = python_source.read("f.py", SOURCE * 20)
    found = jobs.tag(model, source)
    assert found.shape == source.kinds.shape
    alone = model(source.symbols[jobs.PIECE : 2 * jobs.PIECE]).argmax(-1)
    assert torch.equal(found[jobs.PIECE : 2 * jobs.PIECE], alone)


def test_every_speed_row_is_right(monkeypatch) -> None:
    monkeypatch.setattr(speed, "SECONDS_A_ROW", 0.0)
    monkeypatch.setattr(speed, "FEWEST_ROUNDS", 1)
    for row in speed.measure():
        assert row.error <= 3 * row.torch_error + 5e-6, row
