"""`generate` against enumeration of every sequence, against decoding without a cache, and against frequencies."""

from __future__ import annotations

import doctest
import importlib
import itertools
import math

import pytest
import torch
from torch import Tensor

from pyseqnet import nn
from pyseqnet.decoding import (
    RecurrentStepper,
    TransformerStepper,
    decode_parallel,
    forbid,
    generate,
    keep_top_k,
    keep_top_p,
    truncate_at_end,
)
from pyseqnet.models import SequenceTranslator

END = 2


class Tree:
    """Any distribution over sequences: a row of logits for every history of each of B sequences."""

    def __init__(self, logits: Tensor, vocabulary: int) -> None:
        self.logits, self.vocabulary, self.calls = logits, vocabulary, 0  # (B, histories, V)

    @classmethod
    def random(cls, batch: int, vocabulary: int, depth: int) -> Tree:
        histories = sum(vocabulary**t for t in range(depth))
        return cls(2 * torch.randn(batch, histories, vocabulary), vocabulary)

    def start(self) -> tuple[Tensor, Tensor]:
        rows = torch.arange(len(self.logits))
        return rows, torch.full_like(rows, -1)

    def step(self, tokens: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        self.calls += 1
        row, node = state
        node = torch.where(node < 0, 0, node * self.vocabulary + tokens + 1)
        return self.logits[row, node], (row, node)

    def reorder(self, state: tuple[Tensor, Tensor], index: Tensor) -> tuple[Tensor, Tensor]:
        return state[0][index], state[1][index]

    def alignment(self, state: tuple[Tensor, Tensor]) -> Tensor:
        row, node = state
        return torch.stack([row, node], 1).double()

    def outcomes(
        self, row: int, length: int, end: int | None = END, min_length: int = 0
    ) -> dict[tuple[int, ...], float]:
        """Every sequence that can be written, and its log-probability."""
        found = {}

        def walk(written: tuple[int, ...], node: int, total: float) -> None:
            logits = self.logits[row, node].double().clone()
            if end is not None and len(written) < min_length:
                logits[end] = -math.inf
            for token, gained in enumerate(logits.log_softmax(0).tolist()):
                if gained == -math.inf:
                    continue
                longer = (*written, token)
                if token == end or len(longer) == length:
                    found[longer] = total + gained
                else:
                    walk(longer, node * self.vocabulary + token + 1, total + gained)

        walk((), 0, 0.0)
        return found


def begin(batch: int) -> Tensor:
    return torch.zeros(batch, dtype=torch.int64)


@pytest.mark.parametrize("module", ["generate", "parallel", "protocol", "sampling"])
def test_examples(module) -> None:
    module = importlib.import_module(f"pyseqnet.decoding.{module}")
    results = doctest.testmod(module, extraglobs={"torch": torch})
    assert results.attempted
    assert not results.failed


# --- beams ------------------------------------------------------------------------------------------------------


def test_two_beams_find_what_greedy_misses() -> None:
    # The tree of the lecture (golden G16): .6 * .6 * .6 = .216 < .4 * .9 * .9 = .324
    second, third = [[0.6, 0.4], [0.9, 0.1]], [[0.6, 0.4]] * 2 + [[0.9, 0.1], [0.5, 0.5]]
    tree = Tree(torch.tensor([[[0.6, 0.4], *second, *third]]).log(), 2)
    greedy = generate(tree, tree.start(), begin=begin(1), end=None, max_length=3)
    assert greedy.sequences() == [[[0, 0, 0]]]
    assert greedy.log_probs.exp().item() == pytest.approx(0.216)
    beam = generate(tree, tree.start(), begin=begin(1), end=None, max_length=3, beams=2)
    assert beam.sequences() == [[[1, 0, 0]]]
    assert beam.log_probs.exp().item() == pytest.approx(0.324)


@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.5])
@pytest.mark.parametrize("end", [None, END])
@pytest.mark.parametrize("min_length", [0, 2])
def test_enough_beams_are_exhaustive(alpha: float, end: int | None, min_length: int) -> None:
    vocabulary, length, batch, results = 4, 4, 5, 20
    tree = Tree.random(batch, vocabulary, length)
    found = generate(
        tree, tree.start(), begin=begin(batch), end=end, max_length=length, beams=vocabulary**length,
        results=results, length_penalty=alpha, min_length=min_length,
    )  # fmt: skip
    assert tree.calls <= length
    for row, sequences in enumerate(found.sequences()):
        all_of_them = tree.outcomes(row, length, end, min_length)
        score = {s: p / ((5 + len(s)) / 6) ** alpha for s, p in all_of_them.items()}
        best = sorted(score, key=lambda s: -score[s])[:results]
        assert [tuple(s) for s in sequences] == best
        wanted = torch.tensor([all_of_them[s] for s in best])
        torch.testing.assert_close(found.log_probs[row], wanted, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.scores[row], torch.tensor([score[s] for s in best]), rtol=1e-5, atol=1e-5)


def test_as_many_results_as_there_are() -> None:
    tree = Tree.random(2, 3, 2)
    found = generate(tree, tree.start(), begin=begin(2), end=END, max_length=2, beams=9, results=9)
    outcomes = len(tree.outcomes(0, 2))
    assert outcomes == 7
    exists = torch.arange(9) < outcomes
    assert torch.equal(found.scores > -math.inf, exists.expand(2, 9))
    assert torch.equal(found.lengths > 0, exists.expand(2, 9))
    assert found.log_probs[:, :outcomes].exp().sum(1).tolist() == pytest.approx([1.0, 1.0])


def brute_beam(tree: Tree, row: int, length: int, beams: int, alpha: float) -> list[tuple[tuple[int, ...], float]]:
    """Beam search as one would write it for a single sequence, with lists."""
    live, bank = [((), 0, 0.0)], []
    for position in range(length):
        candidates = []
        for written, node, total in live:
            gained = tree.logits[row, node].double().log_softmax(0).tolist()
            candidates += [((*written, t), node * tree.vocabulary + t + 1, total + g) for t, g in enumerate(gained)]
        candidates.sort(key=lambda c: -c[2])
        bank += [(c[0], c[2]) for c in candidates[:beams] if c[0][-1] == END]
        live = [c for c in candidates if c[0][-1] != END][:beams]
        if len(bank) >= beams:
            break
        if position == length - 1:
            bank += [(c[0], c[2]) for c in live]
    return sorted(bank, key=lambda c: -c[1] / ((5 + len(c[0])) / 6) ** alpha)


@pytest.mark.parametrize("beams", [2, 3, 5])
@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_beams_are_those_of_a_search_with_lists(beams: int, alpha: float) -> None:
    vocabulary, length, batch = 4, 6, 60
    tree = Tree.random(batch, vocabulary, length)
    found = generate(
        tree, tree.start(), begin=begin(batch), end=END, max_length=length, beams=beams, length_penalty=alpha
    )
    for row, ((sequence,), log_prob) in enumerate(zip(found.sequences(), found.log_probs[:, 0].tolist(), strict=True)):
        best = brute_beam(tree, row, length, beams, alpha)[0]
        assert (tuple(sequence), pytest.approx(log_prob, abs=1e-4)) == best


@pytest.mark.parametrize("min_length", [0, 3])
def test_one_beam_is_greedy(min_length: int) -> None:
    from pyseqnet.decoding.beam import beam_search
    from pyseqnet.decoding.rules import Rules

    tree = Tree.random(100, 5, 5)
    greedy = generate(tree, tree.start(), begin=begin(100), end=END, max_length=5, min_length=min_length)
    rules = Rules(begin(100).unsqueeze(1), END, 0, 5, min_length, 0.0, ())
    beam = beam_search(tree, tree.start(), rules, 1, 1, return_alignments=False)
    assert greedy.sequences() == beam.sequences()
    torch.testing.assert_close(greedy.log_probs, beam.log_probs)
    assert bool((greedy.lengths >= min_length).all())
    lengths = {len(s[0]) for s in greedy.sequences()}
    assert len(lengths) > 1  # rows do end each for itself


def test_alignments_are_of_the_path_that_won() -> None:
    tree = Tree.random(30, 4, 5)
    for beams in (1, 3):
        found = generate(
            tree, tree.start(), begin=begin(30), end=END, max_length=5, beams=beams, results=beams,
            return_alignments=True,
        )  # fmt: skip
        assert found.alignments is not None
        for row, result in itertools.product(range(30), range(beams)):
            node, wanted = 0, []
            for token in found.tokens[row, result, : found.lengths[row, result]].tolist():
                wanted.append([float(row), float(node)])
                node = node * 4 + token + 1
            wanted += [[0.0, 0.0]] * (found.tokens.shape[2] - len(wanted))
            assert found.alignments[row, result].tolist() == wanted


def test_hooks_see_what_was_written() -> None:
    def no_repeats(logits: Tensor, written: Tensor) -> Tensor:
        return logits.scatter(1, written, -math.inf) if written.shape[1] else logits

    tree = Tree.random(20, 5, 5)
    for options in ({}, {"beams": 4, "results": 4}, {"sample": True, "results": 3}):
        found = generate(
            tree, tree.start(), begin=begin(20), end=END, max_length=5, logits_hooks=[no_repeats, forbid(0)], **options
        )
        for sequence in itertools.chain.from_iterable(found.sequences()):
            assert sequence
            assert len(set(sequence)) == len(sequence)
            assert 0 not in sequence


# --- samples ----------------------------------------------------------------------------------------------------


def chi_square(counts: Tensor, probabilities: Tensor) -> float:
    expected = probabilities.double() * counts.sum()
    assert not counts[expected == 0].any()
    used = expected > 0
    return ((counts[used] - expected[used]) ** 2 / expected[used]).sum().item()


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_frequencies_are_the_probabilities(temperature: float) -> None:
    tree = Tree.random(1, 4, 2)
    found = generate(
        tree, tree.start(), begin=begin(1), end=END, max_length=2, sample=True, results=40_000, temperature=temperature,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    sharp = Tree(tree.logits / temperature, 4).outcomes(0, 2)
    true = tree.outcomes(0, 2)
    drawn = [tuple(s) for s in found.sequences()[0]]
    counts = torch.tensor([float(drawn.count(s)) for s in sharp])
    assert chi_square(counts, torch.tensor([math.exp(p) for p in sharp.values()])) < 40  # 12 degrees of freedom
    wanted = torch.tensor([true[s] for s in drawn])
    torch.testing.assert_close(found.log_probs[0], wanted, rtol=1e-4, atol=1e-4)  # the model's, whatever was drawn from


@pytest.mark.parametrize(
    ("options", "kept"), [({"top_k": 2}, 2), ({"top_p": 0.75}, 3), ({"top_k": 2, "top_p": 0.6}, 2)]
)
def test_tails_are_cut(options: dict[str, float], kept: int) -> None:
    probabilities = torch.tensor([0.4, 0.3, 0.2, 0.1])
    order = torch.tensor([2, 0, 3, 1])
    tree = Tree(probabilities.log()[order].view(1, 1, 4), 4)
    found = generate(
        tree, tree.start(), begin=begin(1), end=None, max_length=1, sample=True, results=20_000,
        generator=torch.Generator().manual_seed(1), **options,
    )  # fmt: skip
    counts = torch.bincount(found.tokens.flatten(), minlength=4).double()
    wanted = torch.where(probabilities >= probabilities[kept - 1], probabilities, 0.0)[order]
    assert chi_square(counts, wanted / wanted.sum()) < 20


def test_edges_of_the_nucleus() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.2]]).log()
    for p, kept in ((1e-9, 1), (0.49, 1), (0.51, 2), (0.79, 2), (0.81, 3), (1.0, 3)):
        assert int((keep_top_p(logits, p) > -math.inf).sum()) == kept, p
    assert torch.equal(keep_top_k(logits, 9), logits)
    assert int((keep_top_k(torch.tensor([[1.0, 1.0, 0.0]]), 1) > -math.inf).sum()) == 2  # equal ones stay
    for p in (0.0, -1.0, 1.1, math.nan):
        with pytest.raises(ValueError, match="top_p must be above 0"):
            keep_top_p(logits, p)
    with pytest.raises(ValueError, match="top_k must be at least 1"):
        keep_top_k(logits, 0)


def test_temperature_zero_is_greedy() -> None:
    tree = Tree.random(50, 5, 4)
    options = {"begin": begin(50), "end": END, "max_length": 4}
    cold = generate(tree, tree.start(), sample=True, temperature=0.0, **options)
    assert cold.sequences() == generate(tree, tree.start(), **options).sequences()


# --- models -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"beams": 4, "results": 3, "length_penalty": 0.7}])
def test_translator_with_caches_writes_what_it_would_without(options) -> None:
    model = SequenceTranslator(11, 9, d_model=16, nhead=2, dim_feedforward=32).eval()
    source = torch.randint(3, 11, (5, 7))
    source[1, 4:] = source[3, 2:] = 0
    memory, ignored = model.encode(source)

    class Recomputed:
        def step(self, tokens, state):
            rows, written = state
            written = tokens[:, None] if written is None else torch.cat([written, tokens[:, None]], 1)
            return model.decode(written, memory[rows], ignored[rows])[:, -1], (rows, written)

        def reorder(self, state, index):
            return state[0][index], None if state[1] is None else state[1][index]

    common = {"begin": torch.ones(5, dtype=torch.int64), "end": 2, "max_length": 12, **options}
    slow = generate(Recomputed(), (torch.arange(5), None), **common)
    fast = model.search(source, 12, return_alignments=True, **options)
    assert torch.equal(slow.tokens, fast.tokens)
    torch.testing.assert_close(slow.scores, fast.scores, rtol=1e-4, atol=1e-4)
    best = torch.cat([torch.ones(5, 1, dtype=torch.int64), fast.tokens[:, 0]], 1)
    looked = model.cross_attention(source, best[:, :-1])
    assert fast.alignments is not None
    for row, length in enumerate(fast.lengths[:, 0].tolist()):
        torch.testing.assert_close(fast.alignments[row, 0, :length], looked[row, :length], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch_first", [True, False])
def test_layers_that_are_not_batch_first(batch_first: bool) -> None:
    layer = nn.TransformerDecoderLayer(8, 2, 16, batch_first=batch_first)
    decoder, table, head = nn.TransformerDecoder(layer, 2).eval(), torch.nn.Embedding(6, 8), torch.nn.Linear(8, 6)
    memory = torch.randn(3, 5, 8)
    ignored = torch.arange(5) >= torch.tensor([5, 2, 4]).unsqueeze(1)
    given = memory if batch_first else memory.transpose(0, 1)
    stepper = TransformerStepper(decoder, lambda tokens, position: table(tokens) + position / 10, head)
    found = generate(stepper, stepper.start(given, ignored), begin=begin(3), end=None, max_length=5, beams=3)
    tokens = torch.cat([begin(3).unsqueeze(1), found.tokens[:, 0]], 1)[:, :-1]
    embedded = table(tokens) + torch.arange(5).view(1, 5, 1) / 10
    mask = torch.ones(5, 5, dtype=torch.bool).triu(1)
    output = decoder(
        embedded if batch_first else embedded.transpose(0, 1), given, tgt_mask=mask, memory_key_padding_mask=ignored
    )
    log_probs = head(output if batch_first else output.transpose(0, 1)).log_softmax(2)
    total = log_probs.gather(2, found.tokens[:, 0].unsqueeze(2)).sum((1, 2))
    torch.testing.assert_close(found.log_probs[:, 0], total, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
@pytest.mark.parametrize("batch_first", [True, False])
def test_recurrent_language_models_with_a_prompt(kind, batch_first: bool) -> None:
    rnn = kind(4, 7, 2, batch_first=batch_first)
    table, head = torch.nn.Embedding(5, 4), torch.nn.Linear(7, 5)
    prompt = torch.randint(0, 5, (3, 4))
    stepper = RecurrentStepper(table, rnn, head)
    found = generate(stepper, stepper.start(), begin=prompt, end=END, max_length=6, beams=3, results=2)
    for row, result in itertools.product(range(3), range(2)):
        length = int(found.lengths[row, result])
        tokens = torch.cat([prompt[row], found.tokens[row, result, :length]]).unsqueeze(0)
        embedded = table(tokens)
        output = rnn(embedded if batch_first else embedded.transpose(0, 1))[0].view(-1, 7)
        log_probs = head(output).log_softmax(1)[3:-1]
        total = log_probs.gather(1, tokens[0, 4:].unsqueeze(1)).sum()
        torch.testing.assert_close(found.log_probs[row, result], total, rtol=1e-4, atol=1e-4)


def test_transformer_as_a_language_model() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()
    table, head = torch.nn.Embedding(6, 8), torch.nn.Linear(8, 6)
    stepper = TransformerStepper(encoder, lambda tokens, position: table(tokens), head)
    found = generate(stepper, stepper.start(), begin=begin(2), end=None, max_length=5, beams=2)
    tokens = torch.cat([begin(2).unsqueeze(1), found.tokens[:, 0]], 1)
    output = encoder(table(tokens[:, :-1]), mask=torch.ones(5, 5, dtype=torch.bool).triu(1))
    total = head(output).log_softmax(2).gather(2, tokens[:, 1:].unsqueeze(2)).sum((1, 2))
    torch.testing.assert_close(found.log_probs[:, 0], total, rtol=1e-4, atol=1e-4)
    with pytest.raises(TypeError, match="does not attend"):
        generate(stepper, stepper.start(), begin=begin(2), end=None, max_length=2, return_alignments=True)


# --- all positions at once --------------------------------------------------------------------------------------


def test_parallel_decoding_ends_at_end_or_at_the_given_length() -> None:
    logits = torch.randn(40, 6, 4)
    best = logits.argmax(2)
    by_end = decode_parallel(logits, end=END, padding=9)
    lengths = torch.randint(0, 7, (40,))
    by_length = decode_parallel(logits, lengths=lengths, padding=9)
    log_probs = logits.log_softmax(2).amax(2)
    for row in range(40):
        tokens = best[row].tolist()
        length = tokens.index(END) + 1 if END in tokens else 6
        assert by_end.tokens[row, 0].tolist() == tokens[:length] + [9] * (6 - length)
        assert by_end.lengths[row].item() == length
        assert by_end.log_probs[row].item() == pytest.approx(log_probs[row, :length].sum().item(), abs=1e-5)
        assert by_length.sequences()[row] == [tokens[: lengths[row]]]
    tokens, counts = truncate_at_end(torch.tensor([4, 5, END, 6, 7]), END)  # "a b END c d" -> "a b"
    assert (tokens.tolist(), int(counts)) == ([4, 5, END, 0, 0], 3)
    with pytest.raises(ValueError, match="one of lengths and end"):
        decode_parallel(logits)
    with pytest.raises(ValueError, match="numbers from 0 to 6"):
        decode_parallel(logits, lengths=torch.full((40,), 7))


# --- bad input --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 0}, "max_length must be at least 1; got 0"),
        ({"beams": 0}, "beams must be at least 1; got 0"),
        ({"beams": 2, "results": 3}, "results must be at most beams, 2; got 3"),
        ({"min_length": 9}, "min_length must be between 0 and max_length, 4; got 9"),
        ({"length_penalty": -1.0}, "length_penalty must not be negative"),
        ({"top_k": 3}, "need sample=True"),
        ({"sample": True, "beams": 2}, "does not go with beams"),
        ({"sample": True, "temperature": -1.0}, "temperature must not be negative"),
        ({"end": 7}, "end must be one of the 4 tokens; got 7"),
        ({"begin": torch.zeros(2)}, "begin must be int64"),
        ({"begin": torch.zeros(2, 0, dtype=torch.int64)}, "P > 0"),
        ({"logits_hooks": [forbid(0, 1, 2, 3)]}, "every token is forbidden"),
        ({"logits_hooks": [forbid(0, 1, 2, 3)], "beams": 2}, "every token is forbidden"),
    ],
)
def test_bad_options(options, message: str) -> None:
    tree = Tree.random(2, 4, 4)
    with pytest.raises(ValueError, match=message):
        generate(tree, tree.start(), **{"begin": begin(2), "end": END, "max_length": 4, **options})


@pytest.mark.parametrize("options", [{}, {"beams": 3}])
def test_nan_is_an_error_and_an_empty_batch_is_not(options) -> None:
    tree = Tree.random(3, 4, 3)
    empty = Tree(tree.logits[:0], 4)
    found = generate(empty, empty.start(), begin=begin(0), end=END, max_length=3, **options)
    assert found.tokens.shape[:2] == (0, 1)
    tree.logits[1, 0, 3] = math.nan
    with pytest.raises(ValueError, match="logits hold NaN"):
        generate(tree, tree.start(), begin=begin(3), end=END, max_length=3, **options)
