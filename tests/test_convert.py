"""pyseqnet.convert: torch's layers become ours in place, nothing else changes, and rows of layers are fused."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from support import normal
from torch import Tensor
from torch.nn.utils import parametrizations, parametrize, prune, rnn, weight_norm

import pyseqnet
from pyseqnet import nn
from pyseqnet.conversion import _TWINS

T, B, I, H, W = 5, 3, 8, 4, 12  # noqa: E741 - the house's letter


def sequence() -> Tensor:
    return normal((T, B, I), 0, torch.float32)


def image(channels: int = 4) -> Tensor:
    return normal((B, channels, W, W), 0, torch.float32)


def line() -> Tensor:
    return normal((B, 4, W), 0, torch.float32)


# torch's layer, its arguments, what it is called with
LAYERS: dict[str, tuple[tuple, dict, Callable[[], tuple]]] = {
    "Conv1d": ((4, 6, 3), {"padding": "same"}, lambda: (line(),)),
    "Conv2d": ((4, 6, 3), {"padding": 1, "padding_mode": "reflect"}, lambda: (image(),)),
    "MaxPool1d": ((3, 2), {"return_indices": True}, lambda: (line(),)),
    "MaxPool2d": ((3, 2, 1), {"ceil_mode": True}, lambda: (image(),)),
    "RNN": ((I, H), {"nonlinearity": "relu", "bidirectional": True}, lambda: (sequence(),)),
    "LSTM": ((I, H, 2), {"proj_size": 3}, lambda: (sequence(),)),
    "GRU": ((I, H), {"batch_first": True}, lambda: (sequence(),)),
    "RNNCell": ((I, H), {"nonlinearity": "relu"}, lambda: (sequence()[0],)),
    "LSTMCell": ((I, H), {}, lambda: (sequence()[0],)),
    "GRUCell": ((I, H), {}, lambda: (sequence()[0],)),
    "MultiheadAttention": ((I, 2), {"add_bias_kv": True}, lambda: (sequence(),) * 3),
    "LayerNorm": ((I,), {}, lambda: (sequence(),)),
    "TransformerEncoderLayer": ((I, 2, 16, 0.0), {}, lambda: (sequence(),)),
    "TransformerDecoderLayer": ((I, 2, 16, 0.0), {}, lambda: (sequence(), sequence())),
    "Transformer": ((I, 2, 2, 1, 16, 0.0), {}, lambda: (sequence(), sequence())),
    "CTCLoss": ((), {}, lambda: (sequence().log_softmax(-1), torch.ones(B, 2, dtype=torch.int64), (T,) * B, (2,) * B)),
}


def build(name: str) -> torch.nn.Module:
    if name == "TransformerEncoder":
        return torch.nn.TransformerEncoder(build("TransformerEncoderLayer"), 2, torch.nn.LayerNorm(I))
    if name == "TransformerDecoder":
        return torch.nn.TransformerDecoder(build("TransformerDecoderLayer"), 2)
    args, options, _ = LAYERS[name]
    return getattr(torch.nn, name)(*args, **options)


def arguments_of(name: str) -> tuple:
    return LAYERS[name if name in LAYERS else f"{name}Layer"][2]()


def flat(result: object) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    return [tensor for part in result or () for tensor in flat(part)] if isinstance(result, tuple) else []


def step(model: torch.nn.Module, *arguments: object) -> list[Tensor]:
    """Outputs and every gradient."""
    moved = [
        a.detach().clone().requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments
    ]
    outputs = flat(model(*moved))
    losses = [o.square().sum() for o in outputs if o.is_floating_point()]
    leaves = [a for a in moved if isinstance(a, Tensor) and a.requires_grad]
    found = torch.autograd.grad(sum(losses), [*leaves, *model.parameters()], allow_unused=True)
    return [*outputs, *(g for g in found if g is not None)]


def assert_close(ours: list[Tensor], theirs: list[Tensor], bound: float = 1e-4) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=bound, atol=bound)


@pytest.mark.parametrize("name", sorted(twin.__name__ for twin in _TWINS))
def test_every_layer_with_a_twin_is_replaced(name: str) -> None:
    """Including those that were added after this test: a layer without a case here fails it."""
    theirs = build(name)
    ours = copy.deepcopy(theirs)
    parameters, identity = list(ours.parameters()), id(ours)
    report = pyseqnet.convert(ours)
    assert report.replaced[""] == f"pyseqnet.nn.{name}"
    assert type(ours) is getattr(nn, name)
    assert id(ours) == identity
    assert all(a is b for a, b in zip(parameters, ours.parameters(), strict=True))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(type(part) not in _TWINS for part in ours.modules())
    assert_close(step(ours, *arguments_of(name)), step(theirs, *arguments_of(name)))
    assert repr(ours) == repr(theirs)
    for part in ours.modules():
        if hasattr(part, "reset_parameters"):
            copy.deepcopy(part).reset_parameters()
    again = pyseqnet.convert(ours)
    assert not again.replaced
    assert_close(step(copy.deepcopy(ours), *arguments_of(name)), step(theirs, *arguments_of(name)))


class Reader(torch.nn.Module):
    """Layers of many kinds, tied, shared, nested, hooked and normalised."""

    def __init__(self) -> None:
        super().__init__()
        self.image = torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 3, padding=1),
            torch.nn.ReLU(),
            torch.nn.MaxPool2d(2),
            torch.nn.BatchNorm2d(8),
            torch.nn.Conv2d(8, 8, 3, padding=1),
            torch.nn.ReLU(inplace=True),
            torch.nn.Dropout(0.0),
        )
        self.again = self.image[4]
        self.line = parametrizations.weight_norm(torch.nn.Conv1d(8, 8, 3, padding=1))
        self.rows = torch.nn.LSTM(8, 8, batch_first=True)
        self.head = torch.nn.Linear(8, 8)
        self.head.weight = self.rows.weight_hh_l0_tied = torch.nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        y = self.again(self.image(x)).flatten(2)
        return self.head(self.rows(self.line(y).transpose(1, 2))[0])


def test_a_model_keeps_everything_but_its_kernels() -> None:
    theirs = Reader()
    ours = copy.deepcopy(theirs)
    optimizers = [torch.optim.SGD(model.parameters(), 0.1, momentum=0.9) for model in (ours, theirs)]
    calls: list[str] = []
    ours.rows.register_forward_hook(lambda *_: calls.append("rows"))
    ours.image.register_full_backward_hook(lambda *_: calls.append("image"))
    report = pyseqnet.convert(ours)
    assert report.replaced == {
        "image": "pyseqnet.nn.Sequential",
        "image.0": "pyseqnet.nn.Conv2d",
        "image.2": "pyseqnet.nn.MaxPool2d",
        "image.4": "pyseqnet.nn.Conv2d",
        "line": "pyseqnet.nn.Conv1d",
        "rows": "pyseqnet.nn.LSTM",
    }
    assert report.fused == [("image.0", "image.1", "image.2"), ("image.4", "image.5")]
    assert report.left["head"] == "pyseqnet has no Linear"
    assert ours.again is ours.image[4]
    x = normal((2, 3, 8, 8), 1, torch.float32)
    for _ in range(3):
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    assert calls == ["rows", "image"] * 3
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for key, value in ours.state_dict().items():
        torch.testing.assert_close(value, theirs.state_dict()[key], rtol=1e-4, atol=1e-4)
    for reference, model in ((ours, theirs), (theirs, ours)):
        model.load_state_dict(reference.state_dict(), strict=True)
    text = str(report)
    assert "image.0 + image.1 + image.2" in text
    assert "pyseqnet has no Linear: head" in text


@pytest.mark.parametrize("kind", ["parametrized", "old weight norm", "pruned", "spectral"])
def test_normalised_and_pruned_weights_survive(kind: str) -> None:
    def normalised() -> torch.nn.Module:
        torch.manual_seed(0)
        conv, lstm = torch.nn.Conv2d(4, 6, 3), torch.nn.LSTM(36, 5)
        for layer, name in ((conv, "weight"), (lstm, "weight_hh_l0")):
            if kind == "parametrized":
                parametrizations.weight_norm(layer, name)
            elif kind == "old weight norm":
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    weight_norm(layer, name)
            elif kind == "pruned":
                prune.random_unstructured(layer, name, 0.5)
            else:
                parametrizations.spectral_norm(layer, name)
        return torch.nn.ModuleDict({"conv": conv, "lstm": lstm})

    def run(model: torch.nn.ModuleDict) -> list[Tensor]:
        output, _ = model["lstm"](model["conv"](x).flatten(2))
        return [output, *torch.autograd.grad(output.square().sum(), list(model.parameters()))]

    x = normal((B, 4, 8, 8), 3, torch.float32)
    ours, theirs = normalised(), normalised()
    report = pyseqnet.convert(ours)
    assert set(report.replaced) == {"conv", "lstm"}
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for _ in range(2):
        assert_close(run(ours), run(theirs))
    if kind == "parametrized":
        assert type(ours["conv"]).__name__ == "ParametrizedConv2d"
        assert_close(copy.deepcopy(ours["conv"])(x).unbind(), theirs["conv"](x).unbind())
        parametrize.remove_parametrizations(ours["conv"], "weight")
        assert type(ours["conv"]) is nn.Conv2d
        assert_close(ours["conv"](x).unbind(), theirs["conv"](x).unbind())


# --- what is left ------------------------------------------------------------------------------------------------


class Doubling(torch.nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class OwnEncoder(torch.nn.TransformerEncoder):
    pass


def test_what_is_left_says_why() -> None:
    patched = torch.nn.Conv2d(1, 1, 1)
    patched.forward = lambda input: input  # type: ignore[method-assign]
    model = torch.nn.ModuleDict({
        "subclass": Doubling(1, 1, 1),
        "patched": patched,
        "lazy": torch.nn.LazyConv2d(2, 3),
        "complex": torch.nn.Conv1d(1, 1, 1, dtype=torch.complex64),
        "other": torch.nn.Conv3d(1, 1, 1),
        "scripted": torch.jit.script(torch.nn.Tanh()),
        "encoder": OwnEncoder(torch.nn.TransformerEncoderLayer(I, 2, 16, batch_first=True), 1),
    })  # fmt: skip
    report = pyseqnet.convert(model)
    assert not report.replaced
    assert "derives from torch.nn.Conv2d" in report.left["subclass"]
    assert "replaced on the instance" in report.left["patched"]
    assert "run the model once" in report.left["lazy"]
    assert "complex64" in report.left["complex"]
    assert report.left["other"] == "pyseqnet has no Conv3d"
    assert report.left["scripted"] == "it is scripted"
    assert "nested tensors" in report.left["encoder.layers.0"]
    model["lazy"](torch.zeros(1, 3, 8, 8))
    assert pyseqnet.convert(model).replaced == {"lazy": "pyseqnet.nn.Conv2d"}


def test_skipping() -> None:
    def model() -> torch.nn.Sequential:
        parts = [torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.MaxPool2d(2)]
        return torch.nn.Sequential(torch.nn.Sequential(*parts), torch.nn.Sequential(*copy.deepcopy(parts)))

    one = model()
    report = pyseqnet.convert(one, skip="0")
    assert set(report.replaced) == {"1", "1.0", "1.2"}
    assert report.left["0.0"] == report.left["0.2"] == "skipped"
    by_class = pyseqnet.convert(model(), skip=(torch.nn.MaxPool2d, "1"))
    assert by_class.replaced == {"0": "pyseqnet.nn.Sequential", "0.0": "pyseqnet.nn.Conv2d"}
    assert by_class.fused == [("0.0", "0.1")]
    two = model()
    assert set(pyseqnet.convert(two, [two[0][0]]).replaced) == {"0.2", "1", "1.0", "1.2"}
    assert set(pyseqnet.convert(model(), skip=lambda name, _: name.startswith("0")).replaced) == {"1", "1.0", "1.2"}
    assert pyseqnet.convert(model(), fuse=False).fused == []
    for wrong, error, words in (("2.0", ValueError, "'2.0'"), ((3,), TypeError, "got 3")):
        with pytest.raises(error, match=words):
            pyseqnet.convert(model(), skip=wrong)
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        pyseqnet.convert("model")  # type: ignore[arg-type]


# --- rows of layers ----------------------------------------------------------------------------------------------


def block(**pool: object) -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 16, 3, padding=1), torch.nn.ReLU(), torch.nn.MaxPool2d(2, **pool),
        torch.nn.Conv2d(16, 8, 3, padding="same"), torch.nn.ReLU(inplace=True), torch.nn.Flatten(-2),
        torch.nn.Conv1d(8, 8, 3), torch.nn.ReLU(), torch.nn.MaxPool1d(2), torch.nn.Conv1d(8, 4, 1),
    )  # fmt: skip


@pytest.fixture
def operations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which fused functions were called."""
    called: list[str] = []
    for name in ("conv2d_relu_max_pool2d", "conv2d_relu", "conv1d_relu"):
        function = getattr(pyseqnet.functional, name)

        def spy(*args: object, name: str = name, function: Callable = function, **options: object) -> Tensor:
            called.append(name)
            return function(*args, **options)

        monkeypatch.setattr(pyseqnet.functional, name, spy)
    return called


def test_rows_are_fused_and_give_what_the_layers_give(operations: list[str]) -> None:
    ours, theirs = block(), block()
    report = pyseqnet.convert(ours)
    assert report.fused == [("0", "1", "2"), ("3", "4"), ("6", "7")]
    x = image(3)
    assert_close(step(ours, x), step(theirs, x))
    assert operations == ["conv2d_relu_max_pool2d", "conv2d_relu", "conv1d_relu"]
    assert_close([ours(x[0])], [theirs(x[0])])
    assert list(ours.state_dict()) == list(theirs.state_dict())
    operations.clear()
    for k in range(len(ours) + 1):  # features of every depth, as perceptual losses read them
        assert_close([ours[:k](x)], [theirs[:k](x)])
    taps = [x]
    for layer in ours:
        taps.append(layer(taps[-1]))
    assert_close([taps[3]], [theirs[:3](x)])


def test_double_backward_and_compile() -> None:
    ours, theirs = block(), block()
    pyseqnet.convert(ours)
    results = []
    for model in (ours, theirs):
        x = image(3).requires_grad_()
        (first,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        results.append(
            list(torch.autograd.grad(first.square().sum(), [x, *(p for p in model.parameters() if p.dim() > 1)]))
        )
    scale = max(float(g.abs().max()) for g in results[1])
    assert_close([g / scale for g in results[0]], [g / scale for g in results[1]])
    compiled = torch.compile(ours, fullgraph=True)
    assert_close(step(compiled, image(3)), step(theirs, image(3)))


@pytest.mark.parametrize("where", [0, 1, 2])
@pytest.mark.parametrize("kind", ["forward", "forward pre", "backward", "backward pre", "own forward"])
def test_a_hooked_layer_runs_by_itself(operations: list[str], kind: str, where: int) -> None:
    ours, theirs = block(), block()
    report = pyseqnet.convert(ours)  # and hooked afterwards
    assert ("0", "1", "2") in report.fused
    seen: list[list[Tensor]] = []

    def listen(model: torch.nn.Sequential) -> None:
        layer, heard = model[where], []
        seen.append(heard)
        if kind == "forward":
            layer.register_forward_hook(lambda _, inputs, output: heard.append(output))
        elif kind == "forward pre":
            layer.register_forward_pre_hook(lambda _, inputs: heard.append(inputs[0]))
        elif kind == "backward":
            layer.register_full_backward_hook(lambda _, gx, gy: heard.append(gy[0]))
        elif kind == "backward pre":
            layer.register_full_backward_pre_hook(lambda _, gy: heard.append(gy[0]))
        else:
            forward = layer.forward
            layer.forward = lambda input: forward(heard.append(input) or input)

    for model in (ours, theirs):
        listen(model)
    x = image(3)
    assert_close(step(ours, x), step(theirs, x))
    assert seen[0]
    assert_close(seen[0], seen[1])
    assert operations == (["conv2d_relu"] if where == 2 else []) + ["conv2d_relu", "conv1d_relu"]
    hooked = block()
    listen(hooked)
    if kind != "own forward" or where == 1:
        report = pyseqnet.convert(hooked)
        assert ("0", "1", "2") not in report.fused
        assert "hooked" in report.not_fused["0"]


def test_hooks_on_all_layers_are_heard(operations: list[str]) -> None:
    ours = block()
    pyseqnet.convert(ours)
    heard: list[torch.nn.Module] = []
    handle = torch.nn.modules.module.register_module_forward_hook(lambda layer, *_: heard.append(layer))
    try:
        ours(image(3))
    finally:
        handle.remove()
    assert heard == [*ours, ours]
    assert not operations


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"ceil_mode": True}, "ceil_mode"), ({"padding": 1}, "padding"), ({"dilation": 2}, "dilation"),
        ({"return_indices": True}, "indices"),
    ],
)  # fmt: skip
def test_poolings_that_stay_alone(change: dict, reason: str) -> None:
    ours, theirs = block(**change)[:3], block(**change)[:3]
    report = pyseqnet.convert(ours)
    assert report.fused == [("0", "1")]
    assert reason in report.not_fused["0"]
    x = normal((2, 3, 9, 9), 0, torch.float32)
    assert_close(flat(ours(x)), flat(theirs(x)))


def test_convolutions_that_stay_alone() -> None:
    ours = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), torch.nn.ReLU())
    theirs = copy.deepcopy(ours)
    report = pyseqnet.convert(ours)
    assert report.fused == []
    assert "circular" in report.not_fused["0"]
    assert type(ours) is torch.nn.Sequential
    assert_close(step(ours, image(3)), step(theirs, image(3)))

    class Row(torch.nn.Sequential):
        pass

    report = pyseqnet.convert(row := Row(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU()))
    assert type(row) is Row
    assert "subclass of Sequential" in report.not_fused["0"]


def test_fused_rows_with_normalised_weights(operations: list[str]) -> None:
    ours = torch.nn.Sequential(parametrizations.weight_norm(torch.nn.Conv2d(3, 4, 3)), torch.nn.ReLU())
    theirs = copy.deepcopy(ours)
    assert pyseqnet.convert(ours).fused == [("0", "1")]
    assert_close(step(ours, image(3)), step(theirs, image(3)))
    assert operations == ["conv2d_relu"]


# --- the fused layers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["zeros", "replicate"])
def test_fused_layers_are_the_separate_ones(mode: str) -> None:
    def pair(fused: type, plain: type, *after: torch.nn.Module, **options: object) -> None:
        ours = fused(4, 6, 3, padding=2, padding_mode=mode, **options)
        conv = plain(4, 6, 3, padding=2, padding_mode=mode)
        conv.load_state_dict(ours.state_dict(), strict=True)
        theirs = torch.nn.Sequential(conv, torch.nn.ReLU(), *after)
        x = line() if plain is torch.nn.Conv1d else image()
        assert_close(step(ours, x), step(theirs, x))
        assert_close([copy.deepcopy(ours)(x)], [theirs(x)])

    pair(nn.Conv1dReLU, torch.nn.Conv1d)
    pair(nn.Conv2dReLU, torch.nn.Conv2d)
    pair(nn.Conv2dReLUMaxPool2d, torch.nn.Conv2d, torch.nn.MaxPool2d(2))
    pair(nn.Conv2dReLUMaxPool2d, torch.nn.Conv2d, torch.nn.MaxPool2d(3, (2, 1)), pool_size=3, pool_stride=(2, 1))


def test_fused_layers_say_and_refuse_their_windows() -> None:
    layer = nn.Conv2dReLUMaxPool2d(3, 4, 3, pool_size=(2, 3))
    assert "pool_size=(2, 3), pool_stride=(2, 3)" in repr(layer)
    with pytest.raises(ValueError, match="pool_size=0"):
        nn.Conv2dReLUMaxPool2d(3, 4, 3, pool_size=0)


def test_packed_sequences_after_conversion() -> None:
    ours = torch.nn.GRU(I, H)
    theirs = copy.deepcopy(ours)
    pyseqnet.convert(ours)
    packed = rnn.pack_padded_sequence(sequence(), torch.tensor([5, 2, 1]))
    assert_close([ours(packed)[0].data, ours(packed)[1]], [theirs(packed)[0].data, theirs(packed)[1]])


def test_examples() -> None:
    import doctest

    from pyseqnet import conversion
    from pyseqnet.nn import conv, sequential

    for module in (conversion, conv, sequential):
        found = doctest.testmod(module, extraglobs={"torch": torch, "MaxPool2d": nn.MaxPool2d})
        assert found.attempted
        assert not found.failed
