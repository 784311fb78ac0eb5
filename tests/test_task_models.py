"""The models of the recipes: shapes, what padding may not do, the maths that is theirs."""

from __future__ import annotations

import doctest
import itertools
import json
import random

import pytest
import torch

from pyseqnet.data import go, shapes, speech, xquad
from pyseqnet.data.text import OTHER, Vocabulary, padded, trigrams
from pyseqnet.models import (
    detr,
    image_gan,
    label_attention,
    memory_network,
    neural_turing_machine,
    question_reader,
    sentence_reader,
    sequence_autoencoder,
    speech_recognizer,
    speech_synthesizer,
    speech_translator,
    spoken_question_answerer,
    text_classifier,
    visual_question_answerer,
)
from pyseqnet.models.memory_network import MemoryNetwork
from pyseqnet.models.speech_recognizer import SpeechRecognizer
from pyseqnet.models.text_classifier import TextClassifier
from pyseqnet.recipes import (
    edit_distance,
    hybrid_digits,
    key_terms,
    multi_label,
    parse,
    reading,
    sagan,
    speech_translation,
    spoken_qa,
    text_autoencoder,
)
from pyseqnet.recipes.detect import mean_average_precision

DOCUMENTED = [
    detr,
    edit_distance,
    image_gan,
    label_attention,
    memory_network,
    neural_turing_machine,
    parse,
    question_reader,
    sentence_reader,
    sequence_autoencoder,
    speech_recognizer,
    speech_synthesizer,
    speech_translation,
    speech_translator,
    text_autoencoder,
    spoken_question_answerer,
    text_classifier,
    visual_question_answerer,
]


@pytest.mark.parametrize("module", DOCUMENTED, ids=lambda module: module.__name__)
def test_examples(module) -> None:
    results = doctest.testmod(module)
    assert results.attempted
    assert not results.failed


def test_vocabulary() -> None:
    vocabulary = Vocabulary([["a", "b", "b", "c"], ["b", "c", "d"]], least=2, special=("<s>",))
    assert vocabulary.entries == ["<padding>", "<other>", "<s>", "b", "c"]
    assert vocabulary.encode(["b", "zebra", "<s>", "<padding>"]).tolist() == [3, OTHER, 2, OTHER]
    assert vocabulary.decode([4, 3]) == ["c", "b"]
    batch, lengths = padded([vocabulary.encode(["b", "c", "b"]), vocabulary.encode(["c"])])
    assert batch.tolist() == [[3, 4, 3], [4, 0, 0]]
    assert lengths.tolist() == [3, 1]
    assert trigrams("apple") == ["#ap", "app", "ppl", "ple", "le#"]
    assert trigrams("a") == ["#a#"]


@pytest.mark.parametrize("reader", text_classifier.READERS)
def test_text_behind_the_end_is_not_read(reader) -> None:
    model = TextClassifier(20, 3, reader=reader).eval()
    text = torch.randint(1, 20, (2, 9))
    lengths = torch.tensor([9, 4])
    text[1, 4:] = 0
    alone = model(text[1:, :4], lengths[1:])
    torch.testing.assert_close(model(text, lengths)[1:], alone)
    with pytest.raises(ValueError, match="reader must be one of"):
        TextClassifier(20, 3, reader="eyes")


@pytest.mark.parametrize("encoder", speech_recognizer.ENCODERS)
def test_speech_behind_the_end_is_not_heard(encoder) -> None:
    model = SpeechRecognizer(5, 4, encoder=encoder).eval()
    frames = torch.randn(2, 41, 5)
    frames[1, 22:] = 1e4
    scores, steps = model(frames, torch.tensor([41, 22]))
    alone, own = model(frames[1:, :22], torch.tensor([22]))
    assert steps.tolist() == [11, 6]
    assert own.tolist() == [6]
    torch.testing.assert_close(scores[:6, 1:], alone)


def test_memory_reading_is_the_papers() -> None:
    model = MemoryNetwork(12, embedding=6, hops=2, memories=8)
    story, question = torch.randint(0, 12, (3, 5, 4)), torch.randint(1, 12, (3, 4))
    count = torch.tensor([5, 2, 1])
    scores, weights = model(story, question, count, need_weights=True)
    place = model.position_weights(4, 6)

    def sentences(hop: int) -> torch.Tensor:
        return (model.words[hop](story) * place).sum(2) + model.times[hop](torch.arange(5))

    state = (model.words[0](question) * place).sum(1)
    for hop in range(2):
        logits = torch.einsum("be,bme->bm", state, sentences(hop))
        wanted = logits.masked_fill(torch.arange(5) >= count[:, None], -torch.inf).softmax(1)
        torch.testing.assert_close(weights[hop], wanted)
        state = state + torch.einsum("bm,bme->be", wanted, sentences(hop + 1))
    torch.testing.assert_close(scores, state @ model.words[2].weight.t())
    with pytest.raises(ValueError, match="has 9 sentences, memories is 8"):
        model(torch.ones(1, 9, 4, dtype=torch.int64), question[:1], count[:1])


def test_edit_distance_against_enumeration() -> None:
    generator = torch.Generator().manual_seed(0)
    words = [torch.randint(0, 3, (n,), generator=generator).tolist() for n in (0, 1, 3, 4, 5)]

    def slow(a: list[int], b: list[int]) -> int:
        if not a or not b:
            return len(a) + len(b)
        return min(slow(a[1:], b) + 1, slow(a, b[1:]) + 1, slow(a[1:], b[1:]) + (a[0] != b[0]))

    for a, b in itertools.product(words, words):
        assert edit_distance.edits(a, b) == slow(a, b)
    assert edit_distance.error_rate([[1, 2], [3]], [[1, 2, 3], [4]]) == 0.5
    with pytest.raises(ValueError, match="no label"):
        edit_distance.error_rate([[1]], [[]])


def test_overlaps_of_boxes() -> None:
    box = torch.tensor([0.5, 0.5, 0.2, 0.2])
    iou, general = detr.overlaps(box, torch.tensor([[0.5, 0.5, 0.2, 0.4], [0.6, 0.5, 0.2, 0.2], [0.8, 0.5, 0.2, 0.2]]))
    torch.testing.assert_close(iou, torch.tensor([0.5, 1 / 3, 0.0]))
    torch.testing.assert_close(general, torch.tensor([0.5, 1 / 3, -0.2]))  # the gap is a fifth of the hull


def test_matching_is_the_cheapest() -> None:
    kinds, boxes = torch.randn(4, 3), torch.rand(4, 4) * 0.4 + 0.1
    true_kinds, true_boxes = torch.tensor([1, 0]), torch.rand(2, 4) * 0.4 + 0.1

    def cost(queries: tuple[int, ...]) -> float:
        chosen = torch.tensor(queries)
        _, general = detr.overlaps(boxes[chosen], true_boxes)
        apart = (boxes[chosen] - true_boxes).abs().sum(1)
        likely = kinds.softmax(1)[chosen, true_kinds]
        return (detr.BOX_WEIGHT * apart - detr.OVERLAP_WEIGHT * general - likely).sum().item()

    queries, objects = detr.match(kinds, boxes, true_kinds, true_boxes)
    found = tuple(queries[objects.argsort()].tolist())
    assert cost(found) == pytest.approx(min(cost(pair) for pair in itertools.permutations(range(4), 2)))


def test_average_precision_of_the_truth_and_of_nonsense() -> None:
    scenes = shapes.scenes(20, torch.Generator().manual_seed(0))

    class Fixed(torch.nn.Module):
        classes = 3

        def __init__(self, shift: float) -> None:
            super().__init__()
            self.shift = shift

        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            kinds = torch.zeros(len(images), 3, 4)
            kinds[..., 3] = 10.0
            boxes = torch.full((len(images), 3, 4), 0.01)
            for i, (own, own_boxes) in enumerate(zip(scenes.kinds, scenes.boxes, strict=True)):
                for q, (kind, box) in enumerate(zip(own, own_boxes, strict=True)):
                    kinds[i, q, 3], kinds[i, q, kind] = 0.0, 10.0
                    boxes[i, q] = box + self.shift
            return kinds, boxes

    assert mean_average_precision(Fixed(0.0), scenes) == pytest.approx(1.0)
    assert mean_average_precision(Fixed(0.9), scenes) == 0.0


def test_shapes_fill_their_boxes() -> None:
    scenes = shapes.scenes(30, torch.Generator().manual_seed(1), most=1)
    for image, boxes in zip(scenes.images, scenes.boxes, strict=True):
        bright = (image.amax(0) > 0.2).nonzero()
        low, high = bright.min(0).values / 64, (bright.max(0).values + 1) / 64
        left, top, right, bottom = detr.corners(boxes[0]).tolist()
        assert (low - torch.tensor([top, left])).abs().max() < 0.04
        assert (high - torch.tensor([bottom, right])).abs().max() < 0.04


def test_a_second_has_98_frames() -> None:
    samples = torch.sin(torch.arange(8000) * 2 * torch.pi * 1000 / 8000)
    assert speech.log_mel(samples).shape == (98, speech.BANDS)
    assert speech.log_mel(samples[:10]).shape == (1, speech.BANDS)
    frames = samples.unfold(0, speech.WINDOW, speech.HOP) * torch.hann_window(speech.WINDOW)
    energy = torch.fft.rfft(frames).abs().square() @ speech.mel_filters().t()
    centres = 700 * (10 ** (torch.linspace(0, 2595 * torch.log10(torch.tensor(1 + 4000 / 700)), 42)[1:-1] / 2595) - 1)
    assert abs(centres[energy.mean(0).argmax()] - 1000) < 60  # the band of 1 kHz


def test_stones_without_liberties_are_taken() -> None:
    beside = go.neighbours(3)
    board = [0, 1, -1,
             1, -1, -1,
             0, 1, 0]  # fmt: skip
    assert go.group(board, 2, beside) == ({2, 4, 5}, {8})
    assert go.captures(board, 1, beside) == {8: 3}
    assert go.play(board, 8, 1, beside)
    assert board == [0, 1, 0, 1, 0, 0, 0, 1, 1]
    corner = [0, 1, 0, 1, 0, 0, 0, 0, 0]
    assert not go.play(corner, 0, -1, beside)  # suicide
    assert corner[0] == 0


def test_positions_of_go_have_one_best_move() -> None:
    found = go.positions(6, 0, size=5)
    assert found.planes.shape == (6, go.PLANES, 5, 5)
    beside = go.neighbours(5)
    newest = found.planes.view(6, go.HISTORY, 3, 25)[:, 0]
    assert torch.equal(newest.sum(1), torch.ones(6, 25))  # each point is own, other or empty
    for (own, other, _), move in zip(newest, found.moves.tolist(), strict=True):
        taken = go.captures((own - other).long().tolist(), 1, beside)
        assert [point for point, stones in taken.items() if stones == max(taken.values())] == [move]


def test_spans_of_spoken_strings_are_where_the_recordings_are() -> None:
    generator = torch.Generator().manual_seed(0)
    pool = [speech.Recording(torch.full((1600 + 80 * d,), 0.1 + d), d, 0, 9) for d in range(5)]
    samples, spans = speech.joined([pool[3].samples, pool[1].samples], generator)
    assert [end - start for start, end in spans] == [1840, 1680]
    assert all((samples[start:end] == value).all() for (start, end), value in zip(spans, (3.1, 1.1), strict=True))
    found = speech.strings(pool, 4, generator, 3, 2)
    assert {len(digits) for digits in found.digits} <= {2, 3}
    rows = hybrid_digits.states(found, (found.lengths + 3) // 4)
    assert [hybrid_digits.digits_of(row.tolist()) for row in rows] == found.digits
    model = hybrid_digits.count(rows)
    assert model.transitions.exp().sum(1).unique().tolist() == pytest.approx([0.0, 1.0])


def test_distance_of_normal_distributions() -> None:
    torch.manual_seed(0)
    one = torch.randn(4000, 3)
    assert sagan.frechet_distance(one, one) == pytest.approx(0, abs=1e-6)
    assert sagan.frechet_distance(one, one + torch.tensor([3.0, 0.0, 4.0])) == pytest.approx(25, rel=1e-6)
    assert sagan.frechet_distance(one, 2 * one) == pytest.approx(3, rel=0.1)  # |m|^2 is near 0, tr = 3 (2 - 1)^2


def test_padding_of_questions_and_memory_is_not_read() -> None:
    torch.manual_seed(0)
    reader = question_reader.QuestionReader(9, 5, width=16).eval()
    memory, question = torch.randn(2, 6, 16), torch.tensor([[3, 4, 5], [6, 0, 0]])
    ignored = torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
    scores, weights = reader(memory, question, torch.tensor([3, 1]), ignored, need_weights=True)
    alone = reader(memory[1:, :4], question[1:, :1], torch.tensor([1]))
    torch.testing.assert_close(scores[1:], alone, rtol=1e-4, atol=1e-5)
    assert not weights[1, 4:].any()


def test_each_label_reads_its_own_words_and_no_padding() -> None:
    torch.manual_seed(0)
    model = label_attention.LabelAttention(9, 4).eval()
    text = torch.tensor([[3, 4, 5, 6], [7, 8, 0, 0]])
    scores, weights = model(text, torch.tensor([4, 2]), need_weights=True)
    torch.testing.assert_close(scores[1:], model(text[1:, :2], torch.tensor([2])), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weights.sum(2), torch.ones(2, 4))
    assert not weights[1, :, 2:].any()
    assert not torch.allclose(weights[0, 0], weights[0, 1])


def test_what_is_spoken_step_by_step_is_what_teacher_forcing_scores() -> None:
    torch.manual_seed(0)
    model = speech_synthesizer.SpeechSynthesizer(9, 6, width=8, hidden=12).eval()
    text, lengths = torch.tensor([[3, 4, 5], [6, 7, 0]]), torch.tensor([3, 2])
    spoken = model.speak(text, lengths, 4)
    for found, wanted in zip(spoken, model(text, lengths, spoken.frames), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert not spoken.weights[1, :, 2].any()
    with pytest.raises(ValueError, match="multiple of 4"):
        model(text, lengths, spoken.frames[:, :3])


def test_a_sentence_with_the_questions_words_scores_highest() -> None:
    model = sentence_reader.SentenceReader(50).eval()
    words = torch.randint(1, 50, (4, 6, 5))
    question, rarity = words[2:3, :3].expand(4, -1, -1), torch.rand(1, 3).expand(4, -1)
    scores = model(question, rarity, torch.full((4,), 3), words, torch.full((4,), 6))
    assert scores.argmax() == 2
    padded_words = torch.nn.functional.pad(words, (0, 0, 0, 2), value=7)
    again = model(question, rarity, torch.full((4,), 3), padded_words, torch.full((4,), 6))
    torch.testing.assert_close(again, scores)


def test_paragraphs_are_cut_where_sentences_end(monkeypatch, tmp_path) -> None:
    text = 'Dr. No came. He won 3.5 points in 2016! "Why?" Nobody knew'
    asked = [{"question": "How many points?", "answers": [{"answer_start": text.index("3.5"), "text": "3.5"}]}]
    content = {"data": [{"title": "t", "paragraphs": [{"context": text, "qas": asked}]}]}
    monkeypatch.setenv("PYSEQNET_DATA", str(tmp_path))
    (tmp_path / "xquad_en").mkdir()
    (tmp_path / xquad.FILE).write_text(json.dumps(content))
    (paragraph,) = xquad.paragraphs()
    assert [" ".join(one) for one in paragraph.sentences][2:4] == ["he won 3 . 5 points in 2016 !", '" why ? "']
    assert paragraph.questions[0].sentence == 2
    flat = reading.flatten([paragraph])
    assert reading.counting(flat, None) == 1.0


def test_scores_of_sets_of_labels() -> None:
    assert multi_label.micro_f1([{"a", "b"}, {"c"}], [{"a"}, {"c", "d"}]) == pytest.approx(2 / 3)
    scores = torch.tensor([[9.0, 8, 7, 6, 5, 4], [9.0, 8, 7, 6, 5, 4]])
    marks = torch.tensor([[1.0, 0, 0, 0, 0, 1], [0.0, 1, 1, 0, 0, 0]])
    assert key_terms.hits(scores, marks) == pytest.approx(3 / 4)


def test_questions_about_digits_have_the_right_answers() -> None:
    chance = random.Random(0)
    asked = [spoken_qa.question([3, 9, 1], chance) for _ in range(200)]
    seen = {" ".join(words): answer for words, answer in asked}
    assert seen["which was the second"] == "nine"
    assert seen["which is the smallest"] == "one"
    assert seen["was there a three"] == "yes"
    assert seen["was there a four"] == "no"
