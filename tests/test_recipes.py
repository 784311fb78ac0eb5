"""The recipes: each runs, its loss falls, its scores are what it says; the command line around them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pyseqnet import recipes
from pyseqnet.__main__ import main
from pyseqnet.data import MissingData, find, images
from pyseqnet.recipes import record
from pyseqnet.training import batches, fit


@pytest.mark.parametrize("name", sorted(recipes.RECIPES))
def test_quick_run(name, tmp_path) -> None:
    torch.manual_seed(0)
    settings = recipes.Settings(quick=True, out=tmp_path, progress=False)
    try:
        scores = recipes.find(name)(settings)
    except MissingData as missing:
        pytest.skip(str(missing))
    assert any(score.always for score in scores), "a quick run must show a falling loss"
    assert not recipes.missed(scores, settings)
    assert any(score.goal is not None and not score.always for score in scores), "a full run must have a goal"
    assert list(tmp_path.iterdir()), "nothing was drawn"


def test_command_line(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", "digits", "--quick", "--json", "--record", "table.json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["recipe"] == "digits"
    assert json.loads(Path("table.json").read_text()) == [row]
    assert Path("recipe_digits/errors.png").exists()
    assert main(["train", "--list"]) == 0
    assert "digits" in capsys.readouterr().out
    assert main(["train", "nothing"]) == 2
    assert "no recipe 'nothing'; there are" in capsys.readouterr().err
    assert main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["torch"] == torch.__version__


def test_a_missed_goal_is_an_exit_code(monkeypatch, tmp_path, capsys) -> None:
    missed = [recipes.Score("error, %", 7.0, 5.0, at_least=False), recipes.Score("fall", 1.0, 0.0, always=True)]
    monkeypatch.setattr(recipes, "find", lambda name: lambda settings: missed)
    assert main(["train", "any", "--out", str(tmp_path)]) == 1
    assert "(at most 5)  MISSED" in capsys.readouterr().out
    assert main(["train", "any", "--out", str(tmp_path), "--quick"]) == 0


def test_missing_data_is_named(monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.setenv("PYSEQNET_DATA", str(tmp_path))
    with pytest.raises(MissingData, match=r"corpus\.txt is missing .*PYSEQNET_DATA.*origin: somebody"):
        find("corpus.txt", origin="somebody")
    with pytest.raises(MissingData, match="origin: file://"):
        find("corpus.txt", f"file://{tmp_path}/nowhere.txt")
    monkeypatch.setenv("PYSEQNET_DOWNLOAD", "1")
    with pytest.raises(MissingData, match="could not be read"):
        find("corpus.txt", f"file://{tmp_path}/nowhere.txt")
    assert not list(tmp_path.iterdir())
    assert main(["train", "fashion", "--quick", "--out", str(tmp_path / "out")]) == 2
    assert "fashion_mnist_900.npz is missing" in capsys.readouterr().err


def test_download_fills_the_folder(monkeypatch, tmp_path) -> None:
    source = tmp_path / "published.txt"
    source.write_text("text")
    monkeypatch.setenv("PYSEQNET_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("PYSEQNET_DOWNLOAD", "1")
    assert find("set/corpus.txt", source.as_uri()).read_text() == "text"
    source.unlink()
    assert find("set/corpus.txt", source.as_uri()).read_text() == "text"


def test_table_keeps_one_row_a_recipe(tmp_path) -> None:
    table = tmp_path / "table.json"
    settings = recipes.Settings(seed=3)
    for name, value in (("b", 1.0), ("a", 2.0), ("b", 3.0)):
        record.keep(table, record.row(name, settings, [recipes.Score("s", value, 2.0)], 1.0))
    rows = json.loads(table.read_text())
    assert [row["recipe"] for row in rows] == ["a", "b"]
    assert rows[1]["scores"] == [
        {"name": "s", "value": 3.0, "goal": 2.0, "at_least": True, "always": False, "passed": True}
    ]


def test_fit_and_batches() -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1)
    x = torch.randn(40, 3)
    y = x @ torch.tensor([[1.0], [-2.0], [0.5]])
    draw = batches(40, 16, seed=1)
    seen = []

    def loss() -> torch.Tensor:
        seen.append(draw())
        return (model(x[seen[-1]]) - y[seen[-1]]).square().mean()

    history = fit(model, loss, 300, learning_rate=0.1, evaluate=lambda: {"n": 1.0}, looks=7, progress=False)
    assert history.loss[-1] < 1e-3 < history.loss[0]
    assert history.at[-1] == 300
    assert len(history.at) == len(history.loss) == len(history.scores["n"])
    assert [len(one) for one in seen[:3]] == [16, 16, 8]
    assert sorted(torch.cat(seen[:3]).tolist()) == list(range(40))
    assert not model.training
    with pytest.raises(FloatingPointError, match="step 1 is nan"):
        fit(model, lambda: model.weight.sum() * float("nan"), 3, progress=False)
    with pytest.raises(ValueError, match="at least 1"):
        fit(model, loss, 0, progress=False)


def test_turned_by_a_right_angle() -> None:
    image = torch.arange(25.0).view(1, 1, 5, 5)
    turned = images.turned_and_scaled(image.expand(2, -1, -1, -1), torch.tensor([0.0, 90.0]), 1.0)
    torch.testing.assert_close(turned[0], image[0])
    torch.testing.assert_close(turned[1, 0], torch.rot90(image[0, 0]))
    half = images.turned_and_scaled(torch.nn.functional.pad(torch.ones(1, 1, 4, 4), [2] * 4), 0.0, 0.5)
    assert half.sum().item() == pytest.approx(4, abs=0.6)  # a quarter of the area
