"""What Transformer layers take beyond torch: attention, norm, lists of layers, wirings of the memory; PowerNorm."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from support import normal
from torch import Tensor

from pyseqnet import nn

B, T, S, E, H = 3, 6, 5, 16, 4


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


# --- attention= and lists of layers ----------------------------------------------------------------------------------


def test_linear_attention_takes_the_weights_of_softmax_attention() -> None:
    soft = nn.TransformerEncoderLayer(E, H, 32, batch_first=True).eval()
    linear = nn.TransformerEncoderLayer(E, H, 32, batch_first=True, attention="linear").eval()
    linear.load_state_dict(soft.state_dict())
    x = normal((B, T, E), 1, torch.float32)
    padding = torch.arange(T) >= torch.tensor([[6], [4], [1]])
    plain = nn.LinearAttention(E, H, batch_first=True)
    plain.load_state_dict(soft.self_attn.state_dict())
    attended = plain(x, key_lengths=torch.tensor([6, 4, 1]))
    expected = linear.norm1(x + attended)
    expected = linear.norm2(expected + linear._ff_block(expected))
    torch.testing.assert_close(linear(x, src_key_padding_mask=padding), expected)
    with pytest.raises(ValueError, match="no attn_mask but the causal one"):
        linear(x, src_mask=torch.rand(T, T) > 0.5)
    with pytest.raises(ValueError, match="padding at the end"):
        linear(x, src_key_padding_mask=~padding)


def test_layers_of_a_list_differ() -> None:
    layers = [
        nn.TransformerEncoderLayer(E, H, 32, batch_first=True),
        nn.TransformerEncoderLayer(E, H, 8, batch_first=True, norm_first=True, attention="linear"),
    ]
    model = nn.TransformerEncoder(layers, None, norm=nn.LayerNorm(E))
    assert list(model.layers) == layers
    assert model.num_layers == 2
    x = normal((B, T, E), 1, torch.float32)
    model.eval()
    torch.testing.assert_close(model(x), model.norm(layers[1](layers[0](x))))
    decoder = nn.TransformerDecoder([nn.TransformerDecoderLayer(E, H, n, batch_first=True) for n in (8, 16)], 2)
    assert [layer.linear1.out_features for layer in decoder.layers] == [8, 16]
    for make in (nn.TransformerEncoder, nn.TransformerDecoder):
        with pytest.raises(ValueError, match="must not be empty"):
            make([], 0)
        with pytest.raises(ValueError, match="num_layers must be the number"):
            make(layers, 3)
        with pytest.raises(TypeError, match="num_layers is needed"):
            make(layers[0], None)


def test_a_factory_makes_the_attention() -> None:
    made = []

    def factory(*arguments: object, **options: object) -> torch.nn.Module:
        made.append((arguments, options))
        return torch.nn.MultiheadAttention(*arguments, **options)

    layer = nn.TransformerDecoderLayer(E, H, 32, 0.25, batch_first=True, bias=False, attention=factory)
    assert made == [((E, H), {"dropout": 0.25, "bias": False, "batch_first": True, "device": None, "dtype": None})]
    assert type(layer.self_attn) is torch.nn.MultiheadAttention
    x = torch.zeros(B, T, E)
    assert layer(x, x).shape == x.shape
    with pytest.raises(ValueError, match="attention must be one of 'softmax', 'linear'"):
        nn.TransformerEncoderLayer(E, H, attention="quadratic")
    with pytest.raises(TypeError, match="attention must be a name or a factory"):
        nn.TransformerEncoderLayer(E, H, attention=3)
    with pytest.raises(ValueError, match="norm must be one of 'layer', 'power'"):
        nn.TransformerEncoderLayer(E, H, norm="batch")


# --- cross-attention wirings (Liu et al., 2020) -----------------------------------------------------------------------


def wired(memory_layers: str, encoders: int, decoders: int) -> tuple[nn.TransformerEncoder, nn.TransformerDecoder]:
    encoder = nn.TransformerEncoder(
        [nn.TransformerEncoderLayer(E, H, 32, batch_first=True) for _ in range(encoders)], None, norm=nn.LayerNorm(E)
    )
    decoder = nn.TransformerDecoder(
        [nn.TransformerDecoderLayer(E, H, 32, batch_first=True) for _ in range(decoders)],
        None,
        memory_layers=memory_layers,
        num_memory_layers=encoders,
    )
    return encoder.eval(), decoder.eval()


@pytest.mark.parametrize(
    ("memory_layers", "encoders", "decoders", "reads"),
    [
        ("last", 3, 3, [2, 2, 2]),
        ("same", 3, 3, [0, 1, 2]),
        ("reverse", 3, 3, [2, 1, 0]),
        ("same", 6, 3, [1, 3, 5]),
        ("same", 2, 4, [0, 0, 1, 1]),
        ("reverse", 6, 2, [5, 2]),
    ],
)
def test_which_layer_reads_which(memory_layers: str, encoders: int, decoders: int, reads: list[int]) -> None:
    encoder, decoder = wired(memory_layers, encoders, decoders)
    source, target = normal((B, S, E), 1, torch.float32), normal((B, T, E), 2, torch.float32)
    output, outputs = encoder(source, return_layers=True)
    assert torch.equal(output, outputs[-1])
    assert len(outputs) == encoders
    expected = target
    for layer, number in zip(decoder.layers, reads, strict=True):
        expected = layer(expected, outputs[number])
    torch.testing.assert_close(decoder(target, outputs), expected)
    if memory_layers == "last":
        torch.testing.assert_close(decoder(target, output), expected)
    else:
        with pytest.raises(ValueError, match="needs a list of the encoder's layers"):
            decoder(target, output)


def test_adaptive_mixture_is_learned() -> None:
    encoder, decoder = wired("adaptive", 3, 2)
    source, target = normal((B, S, E), 1, torch.float32), normal((B, T, E), 2, torch.float32)
    outputs = encoder(source, return_layers=True)[1]
    mean = torch.stack(outputs).mean(0)
    torch.testing.assert_close(decoder(target, outputs), decoder.layers[1](decoder.layers[0](target, mean), mean))
    decoder(target, outputs).square().sum().backward()
    assert decoder.memory_mix.grad.abs().min() > 0
    with torch.no_grad():  # everything from the last layer: torch's decoder
        decoder.memory_mix.copy_(torch.tensor([-math.inf, -math.inf, 0.0]))
    expected = decoder.layers[1](decoder.layers[0](target, outputs[-1]), outputs[-1])
    torch.testing.assert_close(decoder(target, outputs), expected)
    with torch.no_grad():
        state = decoder.new_state()
        steps = [decoder(token, outputs, state=state) for token in target.split(1, 1)]
    mask = torch.ones(T, T, dtype=torch.bool).triu(1)
    torch.testing.assert_close(torch.cat(steps, 1), decoder(target, outputs, tgt_mask=mask, tgt_is_causal=True))
    with pytest.raises(ValueError, match="memory must be 3 layers; got 2"):
        decoder(target, outputs[:2])
    with pytest.raises(ValueError, match="needs num_memory_layers"):
        nn.TransformerDecoder(decoder.layers[0], 2, memory_layers="adaptive")
    with pytest.raises(ValueError, match="memory_layers must be one of"):
        nn.TransformerDecoder(decoder.layers[0], 2, memory_layers="first")
    with pytest.raises(ValueError, match="empty list"):
        decoder(target, [])


@pytest.mark.parametrize("memory_layers", ["last", "same", "reverse", "adaptive"])
def test_transformer_with_a_wiring(memory_layers: str) -> None:
    options = {"num_encoder_layers": 2, "num_decoder_layers": 2, "dim_feedforward": 32, "dropout": 0.0}
    model = nn.Transformer(E, H, batch_first=True, memory_layers=memory_layers, **options)
    plain = torch.nn.Transformer(E, H, batch_first=True, **options)
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if k != "decoder.memory_mix"})
    source, target = normal((B, S, E), 1, torch.float32), normal((B, T, E), 2, torch.float32)
    output, expected = model(source, target), plain(source, target)
    if memory_layers == "last":
        torch.testing.assert_close(output, expected)
    else:
        assert not torch.allclose(output, expected, atol=1e-3)
        outputs = model.encoder(source, return_layers=True)[1]
        torch.testing.assert_close(output, model.decoder(target, outputs))
    with pytest.raises(ValueError, match="belongs to a custom_decoder"):
        nn.Transformer(E, H, custom_decoder=model.decoder, memory_layers="same")


# --- PowerNorm -------------------------------------------------------------------------------------------------------


def test_power_norm_warming_up_divides_by_the_quadratic_mean() -> None:
    norm = nn.PowerNorm(E).double()
    torch.nn.init.normal_(norm.weight)
    x = normal((B, T, E), 1)
    expected = x / (x.square().mean((0, 1)) + norm.eps).sqrt() * norm.weight + norm.bias
    torch.testing.assert_close(norm(x), expected)
    torch.testing.assert_close(norm.running_phi, x.square().mean((0, 1)))
    other = normal((B, T, E), 2) * 3
    norm(other)
    both = torch.cat([x, other]).square().mean((0, 1))
    torch.testing.assert_close(norm.running_phi, both)
    norm.eval()
    torch.testing.assert_close(norm(x), x / (both + norm.eps).sqrt() * norm.weight + norm.bias)


def test_power_norm_follows_the_algorithm_of_the_paper() -> None:
    """Algorithm 2 of Shen et al., step by step in plain torch, with nu as the paper keeps it."""
    momentum = 0.8
    norm = nn.PowerNorm(E, momentum=momentum, warmup=0).double()
    torch.nn.init.normal_(norm.weight)
    psi, nu = torch.ones(E, dtype=torch.float64), torch.zeros(E, dtype=torch.float64)
    for step in range(4):
        x, gradient = normal((B, T, E), step).requires_grad_(), normal((B, T, E), 10 + step)
        y = norm(x)
        scale = (psi + norm.eps).sqrt()
        hat = x.detach() / scale
        torch.testing.assert_close(y, norm.weight * hat + norm.bias)
        found = torch.autograd.grad(y, [x, norm.weight, norm.bias], gradient)
        inner = gradient * norm.weight.detach()
        torch.testing.assert_close(found[0], (inner - nu * hat) / scale)
        torch.testing.assert_close(found[1], (gradient * hat).sum((0, 1)))
        torch.testing.assert_close(found[2], gradient.sum((0, 1)))
        gamma, lam = hat.square().mean((0, 1)), (inner * hat).mean((0, 1))
        nu = nu * (1 - (1 - momentum) * gamma) + (1 - momentum) * lam
        psi = momentum * psi + (1 - momentum) * x.detach().square().mean((0, 1))
        torch.testing.assert_close(norm.running_phi, psi)


def test_power_norm_leaves_padding_out() -> None:
    norm, packed = nn.PowerNorm(E), nn.PowerNorm(E)
    x = normal((B, T, E), 1, torch.float32)
    padding = torch.arange(T) >= torch.tensor([[6], [2], [4]])
    poisoned = x.masked_fill(padding.unsqueeze(2), math.nan).requires_grad_()
    y = norm(poisoned, padding)
    torch.testing.assert_close(y[~padding], packed(x[~padding]))
    torch.testing.assert_close(norm.running_phi, packed.running_phi)
    y[~padding].square().sum().backward()
    assert poisoned.grad.isfinite().all()
    assert not poisoned.grad[padding].any()
    assert norm.ema_gz.isfinite().all()
    layer = nn.TransformerEncoderLayer(E, H, 32, 0.0, norm="power")
    results = []
    for fill in (0.0, 5.0):
        twin = copy.deepcopy(layer)
        filled = x.masked_fill(padding.unsqueeze(2), fill).transpose(0, 1)
        results.append(twin(filled, src_key_padding_mask=padding).transpose(0, 1)[~padding])
    torch.testing.assert_close(*results)


def test_power_norm_trains_and_its_state_is_kept() -> None:
    layer = nn.TransformerEncoderLayer(E, H, 32, 0.0, batch_first=True, norm="power", norm_first=True)
    layer.norm1.warmup = layer.norm2.warmup = 3
    x, target = normal((B, T, E), 1, torch.float32), normal((B, T, E), 2, torch.float32)
    optimizer = torch.optim.Adam(layer.parameters(), 0.01)
    losses = []
    for _ in range(30):
        loss = (layer(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    twin = nn.TransformerEncoderLayer(E, H, 32, 0.0, batch_first=True, norm="power", norm_first=True)
    twin.load_state_dict(layer.state_dict())
    torch.testing.assert_close(twin.eval()(x), layer.eval()(x))


def test_power_norm_refuses() -> None:
    for options, text in (
        ({"num_features": 0}, "num_features"),
        ({"momentum": 2}, "momentum"),
        ({"warmup": -1}, "warmup"),
    ):
        with pytest.raises(ValueError, match=text):
            nn.PowerNorm(**{"num_features": 4, **options})
    norm = nn.PowerNorm(4)
    with pytest.raises(ValueError, match="input must be"):
        norm(torch.zeros(2, 5))
    with pytest.raises(ValueError, match="padding_mask must be bool"):
        norm(torch.zeros(2, 3, 4), torch.zeros(2, 3))
    x = torch.randn(2, 3, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(norm(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
    assert norm(torch.zeros(0, 3, 4)).shape == (0, 3, 4)
    assert nn.PowerNorm(4)(torch.ones(2, 3, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("options", [{"attention": "linear"}, {"norm": "power"}], ids=str)
def test_options_compile(options: dict) -> None:
    layer = nn.TransformerEncoderLayer(E, H, 32, batch_first=True, **options).eval()
    x = normal((B, T, E), 1, torch.float32)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    results: list[Tensor] = [function(x) for function in (layer, compiled)]
    torch.testing.assert_close(*results)
