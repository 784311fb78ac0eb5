"""Writing sequences: `pyseqnet.decoding.generate`, whose decoders keep a state, beside torch's layers, which read
everything written so far again at each position.

Greedy and with beams, without END: all results are equally long. What is compared is the log-probability of the best
sequence, so that another sequence is another number, unless it is as good.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from bench.case import Case, Cost, Inputs, Rival, Tolerance
from pyseqnet import nn
from pyseqnet.decoding import RecurrentStepper, TransformerStepper, generate

BEGIN, SHARPNESS = 0, 8.0  # an untrained head hardly prefers a word: near ties would be decided by rounding
Logits = Callable[[Tensor], Tensor]  # of everything written so far (R, t) -> of the last position (R, V)


def search_over_prefixes(logits: Logits, rows: int, length: int, beams: int, device: torch.device) -> Tensor:
    """(rows): log-probability of the best of `beams` hypotheses; each position reads all before it again."""
    written = torch.full((rows, 1, 1), BEGIN, device=device)
    total = torch.zeros(rows, 1, device=device)
    for _ in range(length):
        log_probs = logits(written.flatten(0, 1)).log_softmax(-1).unflatten(0, written.shape[:2])
        candidates = (total.to(log_probs.dtype).unsqueeze(-1) + log_probs).flatten(1)
        total, choice = candidates.topk(beams, dim=1)
        origin, token = choice // log_probs.shape[-1], choice % log_probs.shape[-1]
        before = written.gather(1, origin.unsqueeze(-1).expand(-1, -1, written.shape[-1]))
        written = torch.cat([before, token.unsqueeze(-1)], -1)
    return total[:, 0]


def _words(vocabulary: int, width: int) -> tuple[torch.nn.Embedding, torch.nn.Linear]:
    table, head = torch.nn.Embedding(vocabulary, width), torch.nn.Linear(width, vocabulary)
    with torch.no_grad():
        head.weight *= SHARPNESS
    return table, head


def _with_seed(make: Callable[[], tuple[torch.nn.Module, ...]]) -> Callable[..., tuple[torch.nn.Module, ...]]:
    """The same weights whenever asked, in a dtype and on a device; made once for each."""

    @functools.cache
    def made(dtype: torch.dtype, device: torch.device) -> tuple[torch.nn.Module, ...]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            return tuple(module.to(device=device, dtype=dtype).eval().requires_grad_(False) for module in make())

    return made


def _case(name: str, shapes: str, make: Callable[[torch.Generator], Inputs], ours: Callable[..., Tensor],
          theirs: Callable[..., Tensor], cost: Cost, user: Rival | None = None) -> Case:  # fmt: skip
    return Case(
        family="generation",
        name=name,
        shapes=shapes,
        make=make,
        ours=ours,
        torch=theirs,
        forward=cost,
        backward=Cost(),
        gradients=(),
        tolerance=lambda dtype: Tolerance(),
        user=user,
    )


def transformer(
    name: str, batch: int, length: int, *, beams: int = 1, width: int = 128, layers: int = 3, source: int = 32
) -> Case:
    """A decoder over the memory of an encoder."""
    heads, inner, vocabulary = 4, 4 * width, 500
    sizes = {"d_model": width, "nhead": heads, "dim_feedforward": inner, "batch_first": True}

    def make_modules() -> tuple[torch.nn.Module, ...]:
        theirs = torch.nn.TransformerDecoder(torch.nn.TransformerDecoderLayer(**sizes), layers)
        mine = nn.TransformerDecoder(nn.TransformerDecoderLayer(**sizes), layers)
        mine.load_state_dict(theirs.state_dict())
        return (*_words(vocabulary, width), torch.nn.Embedding(length, width), mine, theirs)

    modules = _with_seed(make_modules)

    def make(generator: torch.Generator) -> Inputs:
        return {"memory": torch.randn((batch, source, width), generator=generator)}

    def ours(memory: Tensor) -> Tensor:
        table, head, places, decoder, _ = modules(memory.dtype, memory.device)
        place = torch.arange(length, device=memory.device)
        stepper = TransformerStepper(decoder, lambda tokens, at: table(tokens) + places(place[at]), head)
        begin = torch.full((batch,), BEGIN, device=memory.device)
        return generate(
            stepper, stepper.start(memory), begin=begin, end=None, max_length=length, beams=beams
        ).log_probs[:, 0]

    def theirs(memory: Tensor) -> Tensor:
        table, head, places, _, decoder = modules(memory.dtype, memory.device)
        seen = memory.repeat_interleave(beams, 0)

        def logits(written: Tensor) -> Tensor:
            t = written.shape[1]
            mask = torch.ones((t, t), dtype=torch.bool, device=memory.device).triu(1)
            read = seen if len(written) == len(seen) else memory
            embedded = table(written) + places(torch.arange(t, device=memory.device))
            output: Tensor = head(decoder(embedded, read, tgt_mask=mask, tgt_is_causal=True)[:, -1])
            return output

        return search_over_prefixes(logits, batch, length, beams, memory.device)

    # A position: 6 projections of its token, two layers and two attentions; the memory is projected once.
    weights = layers * (6 * width * width + 2 * width * inner) + width * vocabulary
    products = batch * beams * length * (weights + layers * 2 * width * (length // 2 + source))
    products += batch * source * layers * 2 * width * width
    cost = Cost(2.0 * products, length * weights)
    beam_words = f", {beams} beams" if beams > 1 else ""
    return _case(name, f"B{batch} T{length} E{width}, {layers} layers{beam_words}", make, ours, theirs, cost)


def recurrent(name: str, batch: int, length: int, *, beams: int = 1, width: int = 256) -> Case:
    """An LSTM language model; its input is the state that it begins with. Greedy also beside a loop that carries it."""
    vocabulary = 500

    def make_modules() -> tuple[torch.nn.Module, ...]:
        theirs = torch.nn.LSTM(width, width, batch_first=True)
        mine = nn.LSTM(width, width, batch_first=True)
        mine.load_state_dict(theirs.state_dict())
        return (*_words(vocabulary, width), mine, theirs)

    modules = _with_seed(make_modules)

    def make(generator: torch.Generator) -> Inputs:
        return {name: torch.randn((1, batch, width), generator=generator) for name in ("h", "c")}

    def ours(h: Tensor, c: Tensor) -> Tensor:
        table, head, rnn, _ = modules(h.dtype, h.device)
        stepper = RecurrentStepper(table, rnn, head)
        begin = torch.full((batch,), BEGIN, device=h.device)
        return generate(
            stepper, stepper.start((h, c)), begin=begin, end=None, max_length=length, beams=beams
        ).log_probs[:, 0]

    def theirs(h: Tensor, c: Tensor) -> Tensor:
        table, head, _, rnn = modules(h.dtype, h.device)
        first = tuple(part.repeat_interleave(beams, 1) for part in (h, c))

        def logits(written: Tensor) -> Tensor:
            state = first if len(written) == first[0].shape[1] else (h, c)
            output: Tensor = head(rnn(table(written), state)[0][:, -1])
            return output

        return search_over_prefixes(logits, batch, length, beams, h.device)

    def carried(h: Tensor, c: Tensor) -> Tensor:
        table, head, _, rnn = modules(h.dtype, h.device)
        token, total, state = torch.full((batch,), BEGIN, device=h.device), h.new_zeros(batch), (h, c)
        for _ in range(length):
            output, state = rnn(table(token).unsqueeze(1), state)
            best = head(output.squeeze(1)).log_softmax(-1).max(-1)
            token, total = best.indices, total + best.values
        return total

    weights = 8 * width * width + width * vocabulary
    cost = Cost(2.0 * batch * beams * length * weights, length * weights)
    beam_words = f", {beams} beams" if beams > 1 else ""
    user = Rival("torch, state kept", carried) if beams == 1 else None
    return _case(name, f"B{batch} T{length} H{width}{beam_words}", make, ours, theirs, cost, user)


CASES = [
    transformer("transformer_greedy", 8, 64),
    transformer("transformer_beams", 4, 48, beams=4),
    recurrent("lstm_greedy", 16, 64),
    recurrent("lstm_beams", 4, 48, beams=4),
]
