"""The models: shapes, what they are built of, and that they learn what torch's twin learns."""

from __future__ import annotations

import doctest

import pytest
import torch
from support import environment

from pyseqnet import nn
from pyseqnet.models import (
    ImageClassifier,
    SequenceTagger,
    SequenceTranslator,
    image_classifier,
    language_model,
    recurrent_translator,
    sequence_tagger,
    sequence_translator,
    word_tagger,
)

EXAMPLES = [
    image_classifier,
    language_model,
    recurrent_translator,
    sequence_tagger,
    sequence_translator,
    word_tagger,
]


def torch_twin(model: ImageClassifier) -> torch.nn.Sequential:
    layers: list[torch.nn.Module] = []
    for layer in model.features:
        if isinstance(layer, nn.Conv2d):
            twin = torch.nn.Conv2d(layer.in_channels, layer.out_channels, layer.kernel_size, padding=layer.padding)
            twin.load_state_dict(layer.state_dict())
            layers.append(twin)
        elif isinstance(layer, nn.MaxPool2d):
            layers.append(torch.nn.MaxPool2d(layer.kernel_size))
        else:
            layers.append(torch.nn.ReLU())
    head = torch.nn.Linear(model.head.in_features, model.head.out_features)
    head.load_state_dict(model.head.state_dict())
    return torch.nn.Sequential(*layers, torch.nn.Flatten(), head)


@pytest.mark.parametrize("module", EXAMPLES, ids=lambda m: m.__name__)
def test_examples(module) -> None:
    results = doctest.testmod(module)
    assert results.attempted
    assert not results.failed


def test_parameters_are_those_of_the_lecture() -> None:
    # 3x3x3 weights for each of 64 filters and their biases
    model = ImageClassifier(3, 100, (64,), 10)
    assert sum(p.numel() for p in model.features.parameters()) == 1792


def test_trains_as_torch_does() -> None:
    torch.manual_seed(0)
    ours = ImageClassifier(2, (12, 9), (5, 7), 3)
    theirs = torch_twin(ours)
    images, labels = torch.randn(16, 2, 12, 9), torch.randint(0, 3, (16,))
    losses = []
    for model in (ours, theirs):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
        for _ in range(20):
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
        losses.append(loss.detach())
    assert losses[1] < 1.0
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-3, atol=1e-4)


def test_blocks_run_as_one_operation_unless_somebody_looks(capfd: pytest.CaptureFixture[str]) -> None:
    model = ImageClassifier(2, (12, 9), (5, 7), 3)
    images = torch.randn(4, 2, 12, 9)
    with environment(PYSEQNET_VERBOSE="1"):
        expected = model(images)
        assert [line.split()[1] for line in capfd.readouterr().err.splitlines()] == ["conv_relu_pool_forward"] * 2
        seen: list[torch.Tensor] = []
        handle = model.features[1].register_forward_hook(lambda layer, inputs, output: seen.append(output))
        found = model(images)
        assert capfd.readouterr().err.count("conv_relu_pool_forward") == 1  # the other block
        handle.remove()
    assert seen[0].shape == (4, 5, 12, 9)
    torch.testing.assert_close(found, expected)
    model.features[1] = torch.nn.Identity()
    assert not torch.equal(model(images), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"channels": ()}, "channels is empty"),
        ({"kernel_size": 4}, "kernel_size must be odd"),
        ({"image_size": 7, "channels": (4, 4, 4)}, "3 poolings by 2 leave nothing"),
    ],
)
def test_impossible_shapes_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageClassifier(**arguments)


# --- the tagger -------------------------------------------------------------------------------------------------


def test_tagger_is_embedding_lstm_and_linear() -> None:
    model = SequenceTagger(20, 5, embedding_size=6, hidden_size=7, layers=2)
    theirs = torch.nn.LSTM(6, 7, 2, batch_first=True, bidirectional=True)
    theirs.load_state_dict(model.lstm.state_dict())
    x = torch.randint(0, 20, (3, 11))
    expected = torch.nn.functional.linear(theirs(model.embedding(x))[0], model.head.weight, model.head.bias)
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(model(x[1]), expected[1])


def test_tagger_does_not_read_padding() -> None:
    model = SequenceTagger(20, 5, hidden_size=7)
    x, lengths = torch.randint(0, 20, (3, 11)), torch.tensor([4, 11, 1])
    found = model(x, lengths)
    for row, length in enumerate(lengths.tolist()):
        torch.testing.assert_close(found[row, :length], model(x[row, :length]))


def test_tagger_needs_both_directions() -> None:
    """Whether a symbol is the sequence's first and whether it is its last: each direction knows one of the two."""
    torch.manual_seed(0)
    model = SequenceTagger(3, 4, embedding_size=4, hidden_size=12)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-2)
    for _ in range(60):
        x = torch.randint(0, 3, (16, 8))
        y = torch.cat([torch.ones(16, 1), torch.zeros(16, 6), torch.full((16, 1), 2)], 1).long()
        y[(x == 2) & (y == 0)] = 3
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten())
        loss.backward()
        optimizer.step()
    assert loss < 0.1


# --- the translator ---------------------------------------------------------------------------------------------

PADDING, BEGIN, END = 0, 1, 2


@pytest.fixture(scope="module")
def reverser() -> SequenceTranslator:
    """Learns to write a sequence of one to five symbols backwards."""
    torch.manual_seed(0)
    model = SequenceTranslator(
        9, 9, d_model=32, nhead=4, num_encoder_layers=1, num_decoder_layers=1, dim_feedforward=64
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(250):
        source, target = reversed_batch(64)
        optimizer.zero_grad()
        scores = model(source, target[:, :-1])
        loss = torch.nn.functional.cross_entropy(scores.flatten(0, 1), target[:, 1:].flatten(), ignore_index=PADDING)
        loss.backward()
        optimizer.step()
    return model.eval()


def reversed_batch(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    source, target = torch.zeros(size, 5, dtype=torch.int64), torch.zeros(size, 7, dtype=torch.int64)
    for row in range(size):
        length = 1 + row % 5
        symbols = torch.randint(3, 9, (length,))
        source[row, :length] = symbols
        target[row, : length + 2] = torch.cat([torch.tensor([BEGIN]), symbols.flip(0), torch.tensor([END])])
    return source, target


def test_translator_learns_and_each_row_ends_for_itself(reverser: SequenceTranslator) -> None:
    torch.manual_seed(1)
    source, target = reversed_batch(50)
    written = reverser.generate(source, max_len=20)
    assert written.shape == (50, 6)  # stopped when the longest had ended
    right = (written == target[:, 1:]).all(1)  # padding behind END, too
    assert right.double().mean() >= 0.9
    short = reverser.generate(source[:1], max_len=20)
    assert short.shape == (1, 2)
    assert torch.equal(short[0], written[0, :2])
    assert reverser.generate(source, max_len=3).shape == (50, 3)


def test_generation_is_greedy_decoding(reverser: SequenceTranslator) -> None:
    """What generate writes is the likeliest symbol of the teacher-forced pass over the same text."""
    torch.manual_seed(2)
    source, _ = reversed_batch(10)
    written = reverser.generate(source, max_len=6)
    target = torch.cat([torch.full((10, 1), BEGIN), written], 1)
    with torch.no_grad():
        likeliest = reverser(source, target[:, :-1]).argmax(-1)
    real = written != PADDING
    assert torch.equal(likeliest[real], written[real])


def test_translator_does_not_read_padding_nor_the_future(reverser: SequenceTranslator) -> None:
    source, target = reversed_batch(10)
    with torch.no_grad():
        wide = torch.cat([source, torch.full((10, 4), PADDING)], 1)
        torch.testing.assert_close(reverser(wide, target), reverser(source, target))
        changed = target.clone()
        changed[:, 3:] = 4
        torch.testing.assert_close(reverser(source, changed)[:, :3], reverser(source, target)[:, :3])


def test_cross_attention_is_a_share_of_the_source(reverser: SequenceTranslator) -> None:
    source, target = reversed_batch(10)
    weights = reverser.cross_attention(source, target)
    assert weights.shape == (10, 7, 5)
    torch.testing.assert_close(weights.sum(-1), torch.ones(10, 7))
    assert not weights[(source == PADDING).unsqueeze(1).expand_as(weights)].any()
    assert not reverser.transformer.decoder.layers[-1].multihead_attn._forward_pre_hooks


@pytest.mark.parametrize("special", [{"padding": 1}, {"end": 9}, {"begin": -1}])
def test_translator_refuses_impossible_symbols(special: dict) -> None:
    with pytest.raises(ValueError, match="padding, begin and end must be three of the 9 symbols; got"):
        SequenceTranslator(9, 9, **special)
