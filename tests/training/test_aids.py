"""Scheduled sampling, guided attention, rewards and policy gradients."""

from __future__ import annotations

import doctest
import importlib
import itertools
import math
import random

import pytest
import torch

from pyseqnet.decoding import Generated, forbid
from pyseqnet.models import CopyingTranslator, RecurrentTranslator, SequenceTranslator
from pyseqnet.training import (
    ScheduledSampling,
    chunk_f1,
    chunks,
    corpus_bleu,
    guided_attention_loss,
    reinforce_loss,
    self_critical_loss,
    sentence_bleu,
    sentence_chunk_f1,
    sequence_log_probs,
    teacher_forcing,
)


@pytest.mark.parametrize("module", ["forcing", "rewards"])
def test_examples(module: str) -> None:
    results = doctest.testmod(importlib.import_module(f"pyseqnet.training.{module}"))
    assert results.attempted
    assert not results.failed


# --- scheduled sampling -----------------------------------------------------------------------------------------


def test_schedules() -> None:
    sigmoid = ScheduledSampling("inverse_sigmoid", 10)
    assert [round(sigmoid.epsilon(i), 4) for i in (0, 10, 50)] == [0.9091, 0.7863, 0.0631]
    assert sigmoid.epsilon(10**9) == 0.0
    assert [ScheduledSampling("linear", 10, floor=0.25).epsilon(i) for i in (0, 5, 9)] == [1.0, 0.5, 0.25]
    assert ScheduledSampling("exponential", 0.9).epsilon(3) == pytest.approx(0.729)
    for arguments, message in (
        (("cosine", 1.0), "kind must be one of linear, exponential, inverse_sigmoid"),
        (("exponential", 1.5), "k = 1.5 is no exponential schedule"),
        (("linear", 0.0), "k = 0.0 is no linear schedule"),
        (("linear", 5.0, 2.0), "floor must be between 0 and 1"),
    ):
        with pytest.raises(ValueError, match=message):
            ScheduledSampling(*arguments)


def test_every_token_has_a_coin_of_its_own() -> None:
    truth, predicted = torch.zeros(200, 300), torch.ones(200, 300)
    mixed = ScheduledSampling("linear", 10).mix(truth, predicted, 3)
    assert mixed.mean().item() == pytest.approx(0.3, abs=0.01)
    assert mixed.mean(0).std() < 0.1  # not one coin a sequence
    assert mixed.mean(1).std() < 0.1


def test_two_passes_are_the_rollout_where_only_the_last_token_matters() -> None:
    # A decoder without memory: what it predicts depends on the token it reads alone, so both forms are the same.
    table = torch.randn(5, 5)
    inputs = torch.randint(0, 5, (4, 6))

    class Memoryless:
        def step(self, tokens, state):
            return table[tokens], state

        def reorder(self, state, index):
            return state

    never = ScheduledSampling("linear", 10)
    assert torch.equal(never.rollout(Memoryless(), None, inputs, 0), table[inputs])
    assert torch.equal(never.two_pass(lambda x: table[x], inputs, 0), table[inputs])
    always = never.rollout(Memoryless(), None, inputs, 10)
    tokens = inputs[:, 0]
    for position in range(6):
        assert torch.equal(always[:, position], table[tokens])
        tokens = table[tokens].argmax(1)
    two = never.two_pass(lambda x: table[x], inputs, 10)
    assert torch.equal(two[:, 0], table[inputs[:, 0]])
    assert torch.equal(two[:, 1:], table[table[inputs[:, :-1]].argmax(2)])


@pytest.mark.parametrize("attention", ["none", "additive", "location"])
def test_rollout_of_a_model_is_teacher_forcing_while_the_truth_is_fed(attention: str) -> None:
    model = RecurrentTranslator(9, 8, attention=attention, embedding_size=5, hidden_size=6)
    source, target = torch.randint(3, 9, (3, 5)), torch.randint(3, 8, (3, 4))
    source[1, 3:] = 0
    inputs = teacher_forcing(target, 1)
    wanted = model(source, inputs)
    found = ScheduledSampling("linear", 10).rollout(model, model.start(source), inputs, 0)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    grads = [torch.autograd.grad(x.square().sum(), model.parameters(), allow_unused=True) for x in (found, wanted)]
    for a, b in zip(*grads, strict=True):
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("attention", ["none", "additive", "location"])
def test_recurrent_translator_writes_what_teacher_forcing_scores(attention: str) -> None:
    model = RecurrentTranslator(9, 8, attention=attention, embedding_size=5, hidden_size=6, layers=2).eval()
    source = torch.randint(3, 9, (4, 5))
    source[1, 2:] = source[3, 4:] = 0
    found = model.search(source, 7, beams=4, results=2, return_alignments=attention != "none")
    with torch.no_grad():
        for result in range(2):
            tokens, lengths = found.tokens[:, result], found.lengths[:, result]
            scores, weights, _ = model.read(teacher_forcing(tokens, 1), model.start(source))
            total = sequence_log_probs(scores, tokens, lengths)
            torch.testing.assert_close(found.log_probs[:, result], total, rtol=1e-4, atol=1e-4)
            if found.alignments is not None:
                real = (torch.arange(tokens.shape[1]) < lengths.unsqueeze(1)).unsqueeze(2)
                torch.testing.assert_close(found.alignments[:, result], weights * real, rtol=1e-4, atol=1e-5)
    # What lies in the padding changes nothing.
    alone = model.search(source[1:2, :2], 7, beams=4, results=2)
    torch.testing.assert_close(found.log_probs[1:2], alone.log_probs, rtol=1e-4, atol=1e-4)


def test_copying_translator_writes_what_teacher_forcing_scores() -> None:
    torch.manual_seed(0)
    model = CopyingTranslator(9, 8, other=3, embedding_size=5, hidden_size=6).eval()
    source = torch.tensor([[4, 5, 6, 7, 8], [5, 8, 0, 0, 0]])
    places = torch.tensor([[4, 9, 8, 9, 10], [5, 8, 0, 0, 0]])
    found = model.search_with_copies(source, places, 7, extra=3, beams=4, results=2, return_alignments=True)
    with torch.no_grad():
        for result in range(2):
            tokens, lengths = found.tokens[:, result], found.lengths[:, result]
            log_probs = model(source, places, teacher_forcing(tokens, 1), extra=3)
            torch.testing.assert_close(log_probs.exp().sum(2), torch.ones(tokens.shape), rtol=1e-5, atol=1e-5)
            total = sequence_log_probs(log_probs, tokens, lengths)
            torch.testing.assert_close(found.log_probs[:, result], total, rtol=1e-4, atol=1e-4)
    # A gate that is shut writes what is copied, an open one what the plain model writes.
    with torch.no_grad():
        model.head.gate.bias.fill_(-1e4)
        copied = model.search_with_copies(source, places, 4, extra=3).tokens[0, 0]
        assert set(copied.tolist()) <= {4, 8, 9, 10}
        model.head.gate.bias.fill_(1e4)
        plain = RecurrentTranslator(9, 8, embedding_size=5, hidden_size=6).eval()
        weights = {name.replace("head.vocabulary", "head"): value for name, value in model.state_dict().items()}
        plain.load_state_dict({name: value for name, value in weights.items() if "gate" not in name})
        target = torch.tensor([[1, 4, 5], [1, 7, 2]])
        torch.testing.assert_close(
            model(source, places, target, extra=3)[..., :8], plain(source, target).log_softmax(2)
        )
    with pytest.raises(ValueError, match="source must hold numbers from 0 to 9"):
        model(source, places, target, extra=2)


def test_copying_translator_learns_to_copy() -> None:
    torch.manual_seed(0)
    model = CopyingTranslator(9, 8, other=3, embedding_size=8, hidden_size=16)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(80):
        source = torch.randint(4, 9, (16, 4))
        places = source + 4  # none of them is in the vocabulary
        end = torch.full((16, 1), 2)
        loss = model.loss(source, places, torch.cat([torch.full((16, 1), 1), places, end], 1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    # The words as they stood, though the vocabulary has none of them: chance is a fifth a word.
    model.eval()
    written = model.search_with_copies(source, places, 4, extra=5, logits_hooks=[forbid(2)]).tokens[:, 0]
    assert (written >= 8).all()
    assert (written == places).float().mean() > 0.5


# --- guided attention -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [(), (2,)])
def test_guided_attention_is_the_formula(heads: tuple[int, ...]) -> None:
    weights = torch.rand(3, *heads, 5, 7, dtype=torch.float64)
    target, source = torch.tensor([5, 3, 1]), torch.tensor([7, 2, 4])
    total, count = 0.0, 0
    for b in range(3):
        for t, s in itertools.product(range(int(target[b])), range(int(source[b]))):
            off = t / int(target[b]) - s / int(source[b])
            total += (1 - math.exp(-(off**2) / (2 * 0.2**2))) * weights[b, ..., t, s].sum().item()
            count += math.prod(heads)
    weights[1, ..., 3:, :] = math.nan  # of padding
    assert guided_attention_loss(weights, target, source).item() == pytest.approx(total / count)
    assert guided_attention_loss(torch.eye(9).unsqueeze(0)) == 0
    far = torch.zeros(1, 9, 9)
    far[0, 8, 0] = 81.0
    assert guided_attention_loss(far).item() > 0.99
    with pytest.raises(ValueError, match=r"target_lengths must be \(3,\)"):
        guided_attention_loss(weights, torch.tensor([1]))


# --- rewards ----------------------------------------------------------------------------------------------------

TAGS = ["O", "B-a", "I-a", "B-b", "I-b", "E-a", "S-b"]


def test_chunks_are_those_of_seqeval() -> None:
    seqeval = pytest.importorskip("seqeval.metrics")
    labels = importlib.import_module("seqeval.metrics.sequence_labeling")
    chance = random.Random(0)
    for _ in range(400):
        truth = [[chance.choice(TAGS) for _ in range(chance.randint(1, 9))] for _ in range(4)]
        found = [[tag if chance.random() < 0.7 else chance.choice(TAGS) for tag in tags] for tags in truth]
        assert chunks(truth[0]) == set(labels.get_entities(truth[0]))
        assert chunk_f1(truth, found) == pytest.approx(seqeval.f1_score(truth, found, zero_division=0))


def test_chunk_f1_by_hand() -> None:
    truth = [["B-a", "I-a", "O", "B-b"], ["O", "O"]]
    found = [["B-a", "I-a", "O", "B-a"], ["O", "O"]]
    assert chunk_f1(truth, found) == 0.5
    assert sentence_chunk_f1(truth, found).tolist() == [0.5, 1.0]
    with pytest.raises(ValueError, match="2 tags in truth and 1 predicted"):
        chunk_f1([["O", "O"]], [["O"]])


def test_bleu_is_that_of_sacrebleu() -> None:
    sacrebleu = pytest.importorskip("sacrebleu")
    truth = [f"the cat number {i} sat on the mat , said {i * i} people ." for i in range(10)]
    found = [text.replace("sat", "lay") if i % 2 else text[: 20 + i] for i, text in enumerate(truth)]
    assert corpus_bleu(found, truth) == sacrebleu.corpus_bleu(found, [truth]).score
    wanted = [sacrebleu.sentence_bleu(a, [b]).score / 100 for a, b in zip(found, truth, strict=True)]
    torch.testing.assert_close(sentence_bleu(found, truth), torch.tensor(wanted))
    assert sentence_bleu(truth, truth).tolist() == pytest.approx([1.0] * 10)


# --- policy gradients -------------------------------------------------------------------------------------------


def test_the_gradient_is_that_of_the_expected_reward() -> None:
    logits = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64, requires_grad=True)
    worth = torch.tensor([1.0, 3.0, -2.0], dtype=torch.float64)
    wanted = torch.autograd.grad(-(logits.softmax(0) * worth).sum(), logits)[0]
    for baseline in (0.0, 1.7):
        found = torch.zeros(3, dtype=torch.float64)
        for action in range(3):  # every action as often as it is drawn
            loss = reinforce_loss(logits.log_softmax(0)[action].view(1), worth[action].view(1), baseline)
            found += logits.softmax(0)[action].detach() * torch.autograd.grad(loss, logits)[0]
        torch.testing.assert_close(found, wanted)
    with pytest.raises(ValueError, match=r"rewards must be \(1,\)"):
        reinforce_loss(logits.log_softmax(0)[:1], worth)


def test_a_baseline_lessens_the_variance_and_not_the_mean() -> None:
    logits = torch.zeros(1000, 2, requires_grad=True)
    actions = torch.randint(0, 2, (1000,))
    rewards = 10.0 + actions
    spread = []
    for baseline in (0.0, 10.5):
        log_probs = logits.log_softmax(1).gather(1, actions.unsqueeze(1)).squeeze(1)
        grads = torch.autograd.grad(reinforce_loss(log_probs, rewards, baseline), logits)[0][:, 1] * 1000
        spread.append(grads.var().item())
        assert grads.mean().item() == pytest.approx(-0.25, abs=0.5)
    assert spread[1] < spread[0] / 100


def test_self_critical_training_finds_what_is_rewarded() -> None:
    model = SequenceTranslator(
        6, 6, d_model=16, nhead=2, dim_feedforward=16, num_encoder_layers=1, num_decoder_layers=1
    )
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    source = torch.randint(3, 6, (16, 3))

    def reward(result: Generated) -> torch.Tensor:  # how many of the first three are 4
        return (result.tokens[:, 0, :3] == 4).float().sum(1)

    def log_probs(tokens: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        return sequence_log_probs(model(source, teacher_forcing(tokens, 1)), tokens, lengths)

    means = []
    for _ in range(60):
        sampled = model.search(source, 4, sample=True)
        loss, mean = self_critical_loss(log_probs, sampled, model.search(source, 4), reward)
        torch.testing.assert_close(log_probs(sampled.tokens[:, 0], sampled.lengths[:, 0]), sampled.log_probs[:, 0])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        means.append(mean.item())
    assert means[0] < 1.5
    assert sum(means[-5:]) / 5 > 2.7
    with pytest.raises(ValueError, match="one result a sequence"):
        self_critical_loss(log_probs, model.search(source, 4, sample=True, results=2), sampled, reward)
