"""The gallery of mechanisms: for each one of CNNs, recurrent networks, self-attention, the Transformer and efficient
attention, what shows that it works. The table is complete by construction: `test_every_mechanism_is_shown` fails when
an entry has nothing to show, or when what it names does not exist or was not reached.

An entry names tests (``folder/file.py::test``, or ``test_name`` for those below), pages (``docs: page.md: words``),
scores of recorded full runs (``recipe: name: score``), whose goal, if they have one, was reached, and recipes
(``recipe: name``), which `test_recipes` runs briefly.
"""

from __future__ import annotations

import ast
import functools
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

import pyseqnet.functional as F
from pyseqnet import decoding, models, nn, recipes, training
from pyseqnet.data.text import trigrams
from pyseqnet.models import neural_turing_machine as ntm

TESTS = Path(__file__).parent
ROOT = TESTS.parent
COUNTS = {"A": 21, "B": 5, "C": 45, "D": 29, "E": 32, "F": 28}  # mechanisms of each part

CONV, LEARNT, POOL = "conv/test_conv.py::", "conv/test_what_convolution_is_for.py::", "pool/test_max_pool.py::"
RNN, OPTIONS, LAYERS = "recurrent/test_recurrent.py::", "recurrent/test_recurrent_options.py::", "recurrent/"
CHAIN, TASK, AIDS = "chain/test_", "test_task_models.py::", "training/test_aids.py::"
ATTENTION, IMAGE, MHA = "attention/test_", "nn/test_image_and_graph_attention.py::", "nn/test_multihead_attention.py::"
EFFICIENT, LINEAR = "nn/test_efficient_members.py::", "linear_attention/test_linear_attention.py::"
TRANSFORMER, WIRING = "nn/test_transformer.py::", "nn/test_transformer_options.py::"
GENERATE = "decoding/test_generate.py::"

# --- A: convolution ----------------------------------------------------------------------------------------------
SHOWN: dict[str, list[str]] = {
    "A1 convolutional network": ["recipe: mnist: accuracy, plain, %"],
    "A2 parameters of full connection": [LEARNT + "test_sharing_saves_parameters"],
    "A3 receptive field": [CONV + "test_receptive_field_of_one_neuron"],
    "A4 growing receptive field": [CONV + "test_receptive_field_grows_with_depth"],
    "A5 kernel size": [CONV + "test_functions_agree_with_torch_forward_and_backward"],
    "A6 stride": [CONV + "test_worked_example"],
    "A7 padding": [CONV + "test_golden_output_sizes"],
    "A8 filters": [LEARNT + "test_sharing_saves_parameters"],
    "A9 shared weights": [CONV + "test_translation_equivariance"],
    "A10 locally connected layer": [LEARNT + "test_locally_connected_is_its_definition"],
    "A11 convolution": [CONV + "test_every_kernel_agrees_with_torch"],
    "A12 output size": [CONV + "test_output_sizes_on_a_grid"],
    "A13 worked example": [CONV + "test_worked_example"],
    "A14 feature maps": [LEARNT + "test_sharing_saves_parameters"],
    "A15 three views of convolution": [CONV + "test_three_ways_to_the_same_convolution"],
    "A16 subsampling": [POOL + "test_subsampling"],
    "A17 aliasing": ["docs: conventions.md: aliasing", "test_subsampling_does_not_commute_with_shifts"],
    "A18 max-pooling": [
        POOL + "test_pooling_of_consecutive_numbers",
        POOL + "test_nan_propagates_and_ties_go_to_the_first",
        POOL + "test_last_window_of_ceil_mode_starts_inside",
    ],
    "A19 image classifier": ["recipe: digits: accuracy of the CNN, %", "recipe: fashion: accuracy of the CNN, %"],
    "A20 Go without pooling": [
        LEARNT + "test_policy_of_go",
        LEARNT + "test_boards_need_every_point",
        "recipe: go-net: points gained by not pooling",
    ],
    "A21 augmentation": [
        LEARNT + "test_rotation_has_to_be_shown",
        "recipe: mnist: points lost by turning 45 degrees, plain",
        "recipe: mnist: points lost by turning 45 degrees, augmented",
    ],
    # --- B: words --------------------------------------------------------------------------------------------------
    "B1 slot filling": ["recipe: slots: chunk F1, BiLSTM-CRF, %", AIDS + "test_chunk_f1_by_hand"],
    "B2 no memory without recurrence": ["recipe: slots: points by which context tells arrive from leave"],
    "B3 one-hot": ["test_an_embedding_is_a_product_with_one_hot_rows"],
    "B4 other words": [TASK + "test_vocabulary"],
    "B5 word hashing": ["test_letter_trigrams_of_a_word"],
    # --- C: recurrent networks, sequences, structure ---------------------------------------------------------------
    "C1 recurrent network": [LAYERS + "test_recurrent_layers.py::test_layers_agree_with_torch_forward_and_backward"],
    "C2 worked example": [RNN + "test_worked_example_of_elmans_network"],
    "C3 order matters": [RNN + "test_worked_example_of_elmans_network"],
    "C4 tied over time": [RNN + "test_weights_are_tied_over_time"],
    "C5 deep": [LAYERS + "test_recurrent_layers.py::test_layers_agree_with_torch_forward_and_backward"],
    "C6 Elman": [RNN + "test_worked_example_of_elmans_network"],
    "C7 Jordan": [OPTIONS + "test_worked_example_of_jordans_network"],
    "C8 bidirectional": [RNN + "test_lengths_are_packed_sequences", RNN + "test_padding_never_leaks"],
    "C9 LSTM": [RNN + "test_one_lstm_unit", LAYERS + "test_recurrent_layers.py::test_state_dict_goes_both_ways"],
    "C10 input gate": [RNN + "test_closed_gates"],
    "C11 forget gate": [RNN + "test_closed_gates"],
    "C12 output gate": [RNN + "test_closed_gates"],
    "C13 memory cell": [OPTIONS + "test_lstm_by_hand"],
    "C14 four times the parameters": [RNN + "test_parameter_counts"],
    "C15 stacked projection": [RNN + "test_stacked_projection_is_four"],
    "C16 peepholes": [
        OPTIONS + "test_one_lstm_unit_with_peepholes",
        OPTIONS + "test_no_peepholes_no_difference",
    ],
    "C17 multi-layer LSTM": [
        LAYERS + "test_recurrent_layers.py::test_layers_agree_with_torch_forward_and_backward",
        RNN + "test_dropout_between_layers",
    ],
    "C18 backpropagation through time": [
        LAYERS + "test_recurrent_autograd.py::test_gradcheck",
        RNN + "test_truncated_backpropagation",
    ],
    "C19 exploding and vanishing": [RNN + "test_gradients_explode_or_vanish"],
    "C20 clipping": [LAYERS + "test_recurrent_learning.py::test_clipping_gradients"],
    "C21 constant error carousel": [
        RNN + "test_constant_error_carousel",
        LAYERS + "test_recurrent_learning.py::test_an_lstm_learns_to_add_over_fifty_steps_where_elman_does_not",
    ],
    "C22 sentiment": ["recipe: sentiment: accuracy, lstm, %", TASK + "test_text_behind_the_end_is_not_read"],
    "C23 key terms": ["recipe: key-terms", TASK + "test_each_label_reads_its_own_words_and_no_padding"],
    "C24 trimming": ["decoding/test_ctc_decoding.py::test_collapse"],
    "C25 CTC": [CHAIN + "ctc.py::test_golden_losses", CHAIN + "ctc.py::test_golden_reductions"],
    "C26 CTC decoding": [
        "decoding/test_ctc_decoding.py::test_best_path_is_not_the_best_labelling",
        "decoding/test_ctc_decoding.py::test_a_wide_beam_is_exact",
    ],
    "C27 sequence to sequence": ["test_models.py::test_translator_learns_and_each_row_ends_for_itself"],
    "C28 recurrent translation": ["recipe: translate", "test_attention_copies_what_one_vector_forgets"],
    "C29 parsing as translation": ["recipe: parse", "test_brackets_can_be_forced_to_close"],
    "C30 text auto-encoder": ["recipe: text-autoencoder", "test_a_code_knows_the_order_of_words"],
    "C31 audio to vector": ["recipe: audio2vec: error of the held-out frames (mean of all: 1)"],
    "C32 finding spoken words": ["recipe: audio2vec: mean average precision, same digit, %"],
    "C33 reading a memory": ["test_a_head_addresses_rows", "test_memory_is_read_and_written"],
    "C34 writing a memory": [
        "test_memory_is_read_and_written",
        "recipe: ntm",
    ],
    "C35 machine reading": ["recipe: babi: accuracy, task 1, %", TASK + "test_memory_reading_is_the_papers"],
    "C36 visual questions": ["recipe: vqa: accuracy, %"],
    "C37 spoken questions": ["recipe: spoken-qa", TASK + "test_padding_of_questions_and_memory_is_not_read"],
    "C38 recurrent or structured": ["docs: conventions.md: structured learning"],
    "C39 HMM": [CHAIN + "hmm.py::test_forward_viterbi_and_posteriors_count_every_sequence"],
    "C40 CRF": [CHAIN + "crf.py::test_golden"],
    "C41 structured perceptron": [CHAIN + "posterior.py::test_perceptron_converges_on_what_is_separable"],
    "C42 structured SVM": [CHAIN + "posterior.py::test_hinge_is_never_less_than_the_error"],
    "C43 Viterbi": [CHAIN + "crf.py::test_brute_force", CHAIN + "crf.py::test_equal_scores_prefer_the_lower_tag"],
    "C44 network and HMM": [
        CHAIN + "hmm.py::test_hybrid_takes_the_priors_out_of_a_networks_posteriors",
        "recipe: speech-digits",
    ],
    "C45 BiLSTM and CRF": ["recipe: slots: points gained by the CRF"],
    # --- D: self-attention -----------------------------------------------------------------------------------------
    "D1 sets and sequences": [MHA + "test_padding_reaches_nothing"],
    "D2 one-hot distances": ["test_one_hot_words_are_equally_far_apart"],
    "D3 word embedding": ["test_gradients_of_an_embedding_are_sums_over_occurrences"],
    "D4 frames of speech": [TASK + "test_a_second_has_98_frames"],
    "D5 a graph's nodes": ["test_graph_attention_follows_a_permutation"],
    "D6 a label each": ["recipe: tagging: accuracy, BiLSTM-CRF, %"],
    "D7 one label": ["recipe: sentiment: accuracy, attention, %"],
    "D8 the model decides how many": ["test_models.py::test_translator_learns_and_each_row_ends_for_itself"],
    "D9 I saw a saw": [IMAGE + "test_i_saw_a_saw"],
    "D10 window": [LEARNT + "test_a_window_classifier_is_a_convolution"],
    "D11 whole sentence": ["nn/test_attention_beside_others.py::test_a_layer_over_the_whole_sentence"],
    "D12 self-attention": [ATTENTION + "attention.py::test_golden_numbers"],
    "D13 dot product": [ATTENTION + "attention.py::test_golden_numbers"],
    "D14 additive": [ATTENTION + "additive.py::test_golden_numbers", ATTENTION + "additive.py::test_derivatives"],
    "D15 query, key, value": [MHA + "test_golden_numbers_and_the_order_in_the_packed_weight"],
    "D16 softmax": [ATTENTION + "attention.py::test_large_logits", MHA + "test_row_without_a_key_gives_zero"],
    "D17 weighted sum": [ATTENTION + "attention.py::test_weights_are_a_distribution"],
    "D18 matrix form": ["test_tokens_as_columns_or_rows"],
    "D19 multi-head": [
        MHA + "test_parameter_count_is_the_papers",
        MHA + "test_state_dict_both_ways_copies_and_pickles",
    ],
    "D20 sinusoidal positions": ["nn/test_position.py::test_golden_numbers"],
    "D21 learned positions": [
        "nn/test_position.py::test_positions_break_permutation",
        "nn/test_position.py::test_learned_ends_at_max_len",
    ],
    "D22 truncated": ["nn/test_pattern_layers.py::test_truncated_self_attention"],
    "D23 an image's pixels": [IMAGE + "test_an_image_is_the_set_of_its_pixels"],
    "D24 self-attention GAN": [
        IMAGE + "test_block_of_self_attention_gans",
        "recipe: sagan: distance of what is drawn, with attention",
    ],
    "D25 DETR": ["recipe: detect: mean average precision at IoU 0.5", TASK + "test_matching_is_the_cheapest"],
    "D26 convolution as attention": [
        IMAGE + "test_heads_with_fixed_offsets_are_a_convolution",
        LEARNT + "test_attention_can_be_a_convolution",
    ],
    "D27 few images favour convolution": ["nn/test_attention_beside_others.py::test_few_images_favour_convolution"],
    "D28 parallelism": [
        "nn/test_attention_beside_others.py::test_distance_costs_recurrence_steps_and_attention_none",
    ],
    "D29 attention over edges": [
        IMAGE + "test_edges_and_the_dense_mask_agree",
        "recipe: graph: accuracy on 1000 test papers, %",
    ],
    # --- E: the Transformer ----------------------------------------------------------------------------------------
    "E1 seq2seq": ["test_models.py::test_translator_learns_and_each_row_ends_for_itself"],
    "E2 speech recognition": ["recipe: speech-digits: digit error, attention, best path, %"],
    "E3 translation": ["recipe: translate", "test_models.py::test_generation_is_greedy_decoding"],
    "E4 speech translation": ["recipe: speech-translation: numbers written right, attention, %"],
    "E5 text to speech": ["recipe: tts-toy", TASK + "test_what_is_spoken_step_by_step_is_what_teacher_forcing_scores"],
    "E6 chat": ["recipe: chat", "test_a_translator_learns_answers_by_heart"],
    "E7 parsing": ["recipe: parse", "test_brackets_can_be_forced_to_close"],
    "E8 multi-label": ["recipe: multi-label", TASK + "test_scores_of_sets_of_labels"],
    "E9 detection": ["recipe: detect: mean average precision at IoU 0.5"],
    "E10 encoder and decoder": [TRANSFORMER + "test_results_and_gradients", "test_parameters_of_transformers"],
    "E11 encoder layer": ["test_parameters_of_transformers"],
    "E12 place of the norm": [
        TRANSFORMER + "test_gradients_at_the_start_are_the_papers",
        WIRING + "test_power_norm_follows_the_algorithm_of_the_paper",
    ],
    "E13 autoregression": [TRANSFORMER + "test_decoding_token_by_token_is_the_causal_pass"],
    "E14 causal mask": [ATTENTION + "attention.py::test_later_tokens_change_no_bit"],
    "E15 begin and end": ["test_models.py::test_translator_learns_and_each_row_ends_for_itself"],
    "E16 parallel decoding": [GENERATE + "test_parallel_decoding_ends_at_end_or_at_the_given_length"],
    "E17 length predictor": ["test_lengths_are_predicted_from_the_source"],
    "E18 ignored behind the end": ["test_what_stands_behind_the_end_is_ignored"],
    "E19 cross-attention": [
        MHA + "test_other_key_and_value_sizes",
        "nn/test_incremental.py::test_memory_is_projected_once",
    ],
    "E20 wirings": [WIRING + "test_which_layer_reads_which", WIRING + "test_transformer_with_a_wiring"],
    "E21 cross-entropy": ["test_uniform_scores_cost_the_logarithm_of_the_vocabulary"],
    "E22 teacher forcing": ["test_teacher_forcing_reads_one_position_late"],
    "E23 copying": [
        "nn/test_pointer.py::test_probabilities_are_sums_over_places",
        "nn/test_pointer.py::test_layer_learns_to_copy_what_it_has_never_seen",
    ],
    "E24 guided attention": [AIDS + "test_guided_attention_is_the_formula"],
    "E25 monotonic attention": [
        CHAIN + "monotonic.py::test_expected_alignment_is_the_double_sum",
        CHAIN + "monotonic.py::test_certain_probabilities_give_the_hard_path",
    ],
    "E26 location-aware attention": ["nn/test_additive_attention.py::test_location_aware_is_the_formula"],
    "E27 greedy": [GENERATE + "test_one_beam_is_greedy"],
    "E28 beam search": [
        GENERATE + "test_two_beams_find_what_greedy_misses",
        GENERATE + "test_enough_beams_are_exhaustive",
    ],
    "E29 sampling": [
        GENERATE + "test_frequencies_are_the_probabilities",
        GENERATE + "test_edges_of_the_nucleus",
        GENERATE + "test_temperature_zero_is_greedy",
    ],
    "E30 scheduled sampling": [AIDS + "test_schedules", AIDS + "test_every_token_has_a_coin_of_its_own"],
    "E31 metrics": [AIDS + "test_bleu_is_that_of_sacrebleu"],
    "E32 reinforcement": [
        AIDS + "test_self_critical_training_finds_what_is_rewarded",
        AIDS + "test_a_baseline_lessens_the_variance_and_not_the_mean",
    ],
    # --- F: efficient attention ------------------------------------------------------------------------------------
    "F1 quadratic cost": ["test_attention_costs_the_square_of_the_length"],
    "F2 local": [
        ATTENTION + "patterns.py::test_golden_counts",
        ATTENTION + "patterns.py::test_a_pattern_is_its_dense_mask",
    ],
    "F3 strided": [ATTENTION + "patterns.py::test_golden_counts"],
    "F4 global": [
        ATTENTION + "patterns.py::test_golden_counts",
        "nn/test_pattern_layers.py::test_longformer_has_projections_of_its_own",
    ],
    "F5 a pattern a head": [EFFICIENT + "test_big_bird_and_mixed_heads_are_their_masks"],
    "F6 random": [EFFICIENT + "test_random_blocks_are_a_seeds"],
    "F7 the largest alone": [EFFICIENT + "test_top_k"],
    "F8 clusters": [EFFICIENT + "test_attention_within_given_clusters", EFFICIENT + "test_clustered_attention"],
    "F9 Reformer": [
        EFFICIENT + "test_reformer_is_attention_over_the_union_of_its_rounds",
        EFFICIENT + "test_reformer_tends_to_dense_attention",
    ],
    "F10 Routing": [EFFICIENT + "test_routing", EFFICIENT + "test_routing_learns_its_centroids"],
    "F11 Sinkhorn": [EFFICIENT + "test_sinkhorn_balances", EFFICIENT + "test_sinkhorn_with_a_permutation"],
    "F12 fewer keys": [EFFICIENT + "test_linformer"],
    "F13 compressed": [EFFICIENT + "test_memory_compressed", EFFICIENT + "test_compressed_causal_skips_tiles"],
    "F14 Linformer": [EFFICIENT + "test_linformer"],
    "F15 three matrices": ["test_tokens_as_columns_or_rows"],
    "F16 order of products": [EFFICIENT + "test_multiplications_of_the_lectures"],
    "F17 one query": [ATTENTION + "torch_samples.py::test_golden_attention_matrix"],
    "F18 feature maps": [LINEAR + "test_identities_in_float64"],
    "F19 one summary for all": [EFFICIENT + "test_operations_of_linear_attention_grow_linearly"],
    "F20 templates": ["test_a_state_holds_a_template_a_row"],
    "F21 causal and incremental": [
        LINEAR + "test_steps_give_what_the_whole_gives",
        LINEAR + "test_memory_is_linear_in_the_length",
    ],
    "F22 efficient attention": [LINEAR + "test_efficient_attention_is_its_formula"],
    "F23 linear Transformer": [LINEAR + "test_golden_numbers_of_three_tokens"],
    "F24 random features": [
        "linear_attention/test_random_features.py::test_errors_fall_with_the_root_of_the_number_of_features",
    ],
    "F25 Performer": [
        "linear_attention/test_random_features.py::test_estimates_are_unbiased",
        "linear_attention/test_random_features.py::test_orthogonal_rows_lower_the_variance",
    ],
    "F26 Synthesizer": [EFFICIENT + "test_synthesizer"],
    "F27 no attention": [EFFICIENT + "test_fnet_is_two_matrices", EFFICIENT + "test_gated_and_plain_mlps"],
    "F28 trade-offs": ["docs: ../bench/results/efficient-quality.md: listops"],
}


# --- the table itself --------------------------------------------------------------------------------------------


@functools.cache
def functions_of(file: str) -> set[str]:
    """Functions of a test file, read and not imported."""
    tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@functools.cache
def recorded() -> dict[str, dict[str, bool]]:
    """Whether each score of each recorded full run was reached."""
    rows = json.loads((ROOT / "bench" / "results" / "recipes.json").read_text())
    return {
        row["recipe"]: {score["name"]: score["passed"] for score in row["scores"]} for row in rows if not row["quick"]
    }


def holds(evidence: str) -> bool:
    kind, _, rest = evidence.partition(": ")
    if kind == "docs":
        page, _, words = rest.partition(": ")
        return words in (ROOT / "docs" / page).read_text(encoding="utf-8")
    if kind == "recipe":
        name, _, score = rest.partition(": ")
        return name in recipes.RECIPES and (not score or recorded().get(name, {}).get(score, False))
    file, _, test = evidence.rpartition("::")
    return test in functions_of(file or Path(__file__).name)


def test_every_mechanism_is_shown() -> None:
    known = {entry.split(" ", 1)[0] for entry in SHOWN}
    assert known == {f"{part}{number}" for part, count in COUNTS.items() for number in range(1, count + 1)}
    assert len(SHOWN) == sum(COUNTS.values())
    empty = [entry for entry, evidence in SHOWN.items() if not evidence]
    wrong = {entry: [one for one in evidence if not holds(one)] for entry, evidence in SHOWN.items()}
    assert not empty
    assert not {entry: missing for entry, missing in wrong.items() if missing}


@pytest.mark.parametrize(
    "evidence",
    ["test_nothing", "conv/test_conv.py::test_nothing", "docs: conventions.md: no such words", "recipe: mnist: none",
     "recipe: nothing: accuracy, %"],
)  # fmt: skip
def test_what_does_not_exist_shows_nothing(evidence: str) -> None:
    assert not holds(evidence)


# --- checks that stand nowhere else ------------------------------------------------------------------------------


def test_subsampling_does_not_commute_with_shifts() -> None:
    """A17: a shift by the stride shifts the map, a shift by one pixel makes another one of it."""
    image = torch.randn(1, 1, 8, 16)
    pooled = F.max_pool2d(image, 2)
    assert torch.equal(F.max_pool2d(image.roll(2, 3), 2), pooled.roll(1, 3))
    shifted = F.max_pool2d(image.roll(1, 3), 2)
    assert not any(torch.equal(shifted, pooled.roll(step, 3)) for step in range(8))


def test_an_embedding_is_a_product_with_one_hot_rows() -> None:
    table = torch.nn.Embedding(7, 4)
    words = torch.tensor([[3, 0, 6]])
    assert torch.equal(table(words), torch.nn.functional.one_hot(words, 7).float() @ table.weight)


def test_letter_trigrams_of_a_word() -> None:
    """B5: "apple" is app, ppl, ple, and with its borders #ap and le#; a bag of them is the sum of their vectors."""
    found = trigrams("apple")
    assert found[1:-1] == ["app", "ppl", "ple"]
    assert [found[0], found[-1]] == ["#ap", "le#"]
    bag = torch.nn.EmbeddingBag(9, 3, mode="sum")
    assert torch.allclose(bag(torch.tensor([[1, 2, 2]]))[0], bag.weight[1] + 2 * bag.weight[2])


def _overfitted(model: torch.nn.Module, source: Tensor, target: Tensor, steps: int, rate: float) -> float:
    """The share of the targets that are written without a fault after training on them."""

    def loss() -> Tensor:
        scores = model(source, target[:, :-1])
        return torch.nn.functional.cross_entropy(scores.flatten(0, 1), target[:, 1:].flatten(), ignore_index=0)

    training.fit(model, loss, steps, learning_rate=rate, progress=False, looks=1)
    written = model.search(source, target.shape[1] - 1).tokens[:, 0]
    written = torch.nn.functional.pad(written, (0, target.shape[1] - 1 - written.shape[1]))
    return (written == target[:, 1:]).all(1).double().mean().item()


def test_attention_copies_what_one_vector_forgets() -> None:
    """C28: the same LSTMs, the same steps; sixteen random symbols do not fit into one small vector."""
    torch.manual_seed(0)
    source = torch.randint(3, 12, (64, 16))
    target = torch.cat([torch.full((64, 1), 1), source, torch.full((64, 1), 2)], 1)
    right = {}
    for attention in ("none", "additive"):
        torch.manual_seed(1)
        model = models.RecurrentTranslator(12, 12, attention=attention, embedding_size=16, hidden_size=32)
        right[attention] = _overfitted(model, source, target, 150, 2e-2)
    assert right["additive"] > right["none"] + 0.5


def test_a_translator_learns_answers_by_heart() -> None:
    """E6: questions and answers as in a chat, of different lengths, each answered word by word."""
    torch.manual_seed(0)
    source = torch.randint(3, 30, (24, 7)).masked_fill(torch.arange(7) >= torch.randint(3, 8, (24, 1)), 0)
    lengths = torch.randint(1, 7, (24, 1))
    places = torch.arange(8)
    words = torch.randint(3, 30, (24, 8))
    target = words.masked_fill(places > lengths, 0).masked_fill(places == lengths + 1, 2).masked_fill(places == 0, 1)
    model = models.SequenceTranslator(30, 30, d_model=32, dim_feedforward=64)
    assert _overfitted(model, source, target, 120, 1e-2) >= 0.95


def test_brackets_can_be_forced_to_close() -> None:
    """C29, E7: a tree as a bracket string; whatever a decoder would write, a hook lets it write trees alone."""
    opened, closed, leaf, end = 3, 4, 5, 2
    longest = 14

    def well_formed(logits: Tensor, written: Tensor) -> Tensor:
        depth = (written == opened).sum(1) - (written == closed).sum(1)
        left = longest - written.shape[1]
        allowed = torch.zeros_like(logits, dtype=torch.bool)
        begun = written.shape[1] > 0
        allowed[:, opened] = (depth + 2 < left) & ((depth > 0) | (not begun))
        allowed[:, leaf] = (depth > 0) & (depth + 1 < left)
        allowed[:, closed] = depth > 0
        allowed[:, end] = (depth == 0) & begun
        return logits.masked_fill(~allowed, float("-inf"))

    torch.manual_seed(0)
    model = models.RecurrentTranslator(6, 6, hidden_size=8, embedding_size=8).eval()
    found = model.search(
        torch.randint(3, 6, (32, 5)), longest, sample=True, results=3, logits_hooks=[well_formed],
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    texts = {tuple(row) for rows in found.sequences(end=end) for row in rows}
    assert len(texts) > 10
    for text in texts:
        depth = 0
        for place, symbol in enumerate(text):
            depth += {opened: 1, closed: -1}.get(symbol, 0)
            assert (depth > 0) == (place < len(text) - 1)


def test_a_code_knows_the_order_of_words() -> None:
    """C30: the encoder's last state differs where a bag of words does not; an auto-encoder writes its text again."""
    torch.manual_seed(0)
    text = torch.randint(3, 20, (16, 6))
    model = models.RecurrentTranslator(20, 20, attention="none", embedding_size=32, hidden_size=64)
    forward, backward = (model.start(one).hidden[0][0] for one in (text, text.flip(1)))
    assert ((forward - backward).norm(dim=1) > 1e-2).all()
    target = torch.cat([torch.full((16, 1), 1), text, torch.full((16, 1), 2)], 1)
    assert _overfitted(model, text, target, 150, 1e-2) >= 0.95


def test_a_head_addresses_rows() -> None:
    """C33: weights are a distribution; a strong key finds its row; a shut gate stays, and the shift moves on by one."""
    torch.manual_seed(0)
    memory, before = torch.randn(2, 6, 4), torch.rand(2, 6).softmax(1)
    some = ntm.Address(
        torch.randn(2, 4), torch.rand(2, 1), torch.rand(2, 1), torch.rand(2, 3).softmax(1), torch.ones(2, 1)
    )
    weights = ntm.address(memory, some, before)
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(1), torch.ones(2))
    still, on = torch.tensor([[0.0, 1.0, 0.0]]).expand(2, 3), torch.tensor([[0.0, 0.0, 1.0]]).expand(2, 3)
    one, zero, strong = torch.ones(2, 1), torch.zeros(2, 1), torch.full((2, 1), 200.0)
    found = ntm.address(memory, ntm.Address(memory[:, 3], strong, one, still, one), before)
    torch.testing.assert_close(found, torch.nn.functional.one_hot(torch.tensor([3, 3]), 6).float(), atol=1e-3, rtol=0)
    moved = ntm.address(memory, ntm.Address(memory[:, 3], strong, zero, on, one), before)
    torch.testing.assert_close(moved, before.roll(1, 1), atol=1e-4, rtol=0)
    sharp = ntm.address(memory, ntm.Address(memory[:, 3], strong, zero, still, 50 * one), before)
    assert torch.equal(sharp.argmax(1), before.argmax(1))
    assert sharp.max() > before.max()


def test_memory_is_read_and_written() -> None:
    """C33, C34: weights of one row read exactly it; erasing all and adding a replaces exactly it."""
    memory, row = torch.randn(1, 5, 3), torch.nn.functional.one_hot(torch.tensor([2]), 5).float()
    assert torch.equal(ntm.read(memory, row), memory[:, 2])
    added = torch.randn(1, 3)
    after = ntm.write(memory, row, torch.ones(1, 3), added)
    assert torch.equal(after[:, 2], added)
    kept = [0, 1, 3, 4]
    assert torch.equal(after[:, kept], memory[:, kept])


def test_one_hot_words_are_equally_far_apart() -> None:
    apart = torch.cdist(torch.eye(5), torch.eye(5))
    torch.testing.assert_close(apart, 2**0.5 * (1 - torch.eye(5)))


def test_gradients_of_an_embedding_are_sums_over_occurrences() -> None:
    model = models.TextClassifier(9, 2, reader="cnn")
    words = torch.tensor([[4, 4, 7, 0, 0]])
    embedded: list[Tensor] = []

    def keep(output: Tensor) -> None:
        output.retain_grad()
        embedded.append(output)

    model.embedding.register_forward_hook(lambda layer, args, output: keep(output))
    model.eval()(words, torch.tensor([3])).sum().backward()
    places, rows = embedded[0].grad[0], model.embedding.weight.grad
    torch.testing.assert_close(rows[4], places[0] + places[1])
    torch.testing.assert_close(rows[7], places[2])
    assert not rows[0].any()  # padding


def test_graph_attention_follows_a_permutation() -> None:
    """D5: nodes in another order, edges renamed: the same outputs in that order."""
    torch.manual_seed(0)
    layer = nn.GraphAttention(3, 4, heads=2).eval()
    nodes, edges = torch.randn(6, 3), torch.randint(0, 6, (2, 11))
    order = torch.randperm(6)
    renamed = order.argsort()[edges]
    torch.testing.assert_close(layer(nodes[order], renamed), layer(nodes, edges)[order], rtol=1e-4, atol=1e-5)


def test_tokens_as_columns_or_rows() -> None:
    """D18, F15: with tokens as columns, O = V softmax(K^T Q) down each column; transposed, it is the row formula."""
    queries, keys, values = torch.randn(3, 5, 4, dtype=torch.float64).unbind(0)
    weights = (keys @ queries.t()).softmax(0)  # K^T Q of (4, 5) matrices of columns
    rows = F.scaled_dot_product_attention(queries[None], keys[None], values[None], scale=1.0)[0]
    torch.testing.assert_close(rows, (values.t() @ weights).t())
    torch.testing.assert_close((values.t() @ keys) @ queries.t(), values.t() @ (keys @ queries.t()))


def _parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_parameters_of_transformers() -> None:
    """E10, E11: of the sizes of the paper, on no device."""
    with torch.device("meta"):
        assert _parameters(nn.TransformerEncoderLayer(512, 8, 2048)) == 3_152_384
        assert _parameters(nn.TransformerDecoderLayer(512, 8, 2048)) == 4_204_032
        assert _parameters(nn.Transformer(512, 8)) == 44_140_544


def test_lengths_are_predicted_from_the_source() -> None:
    """E17: how many copies the first symbol asks for, told from the encoder's states alone."""
    torch.manual_seed(0)
    predictor = decoding.LengthPredictor(8, 6)
    source = torch.eye(8)[torch.randint(0, 6, (64, 3))]
    wanted = source[:, 0].argmax(1)
    states = source[:, :1] + 0.01 * torch.randn(64, 3, 8)

    def loss() -> Tensor:
        return torch.nn.functional.cross_entropy(predictor(states), wanted)

    training.fit(predictor, loss, 150, learning_rate=5e-2, progress=False, looks=1)
    assert torch.equal(predictor(states).argmax(1), wanted)


def test_what_stands_behind_the_end_is_ignored() -> None:
    """E18: "a b END c d" is "a b"."""
    a, b, c, d, end = 3, 4, 5, 6, 2
    tokens, lengths = decoding.truncate_at_end(torch.tensor([[a, b, end, c, d]]), end)
    assert tokens.tolist() == [[a, b, end, 0, 0]]
    assert lengths.tolist() == [3]


def test_uniform_scores_cost_the_logarithm_of_the_vocabulary() -> None:
    """E21: at each written symbol, END among them."""
    model = models.SequenceTranslator(9, 7)
    torch.nn.init.zeros_(model.head.weight)
    torch.nn.init.zeros_(model.head.bias)
    target = torch.tensor([[1, 3, 4, 2], [1, 5, 2, 0]])
    scores = model(torch.tensor([[3, 4], [5, 0]]), target[:, :-1]).flatten(0, 1)
    total = torch.nn.functional.cross_entropy(scores, target[:, 1:].flatten(), ignore_index=0, reduction="sum")
    torch.testing.assert_close(total, 5 * torch.tensor(7.0).log())


def test_teacher_forcing_reads_one_position_late() -> None:
    target = torch.tensor([[5, 6, 7, 2]])
    read = training.teacher_forcing(target, begin=1)
    assert read[0, 0] == 1
    assert torch.equal(read[:, 1:], target[:, :-1])


def test_attention_costs_the_square_of_the_length() -> None:
    """F1: by counted products; the layer's projections, which are linear, outweigh it in short sequences."""
    from torch.utils.flop_counter import FlopCounterMode

    def products(length: int) -> tuple[int, int]:
        layer = nn.MultiheadAttention(64, 4, batch_first=True)
        x = torch.randn(1, length, 64)
        with FlopCounterMode(display=False) as whole:
            layer(x, x, x, need_weights=False)
        heads = torch.randn(1, 4, length, 16)
        with FlopCounterMode(display=False) as alone:
            F.scaled_dot_product_attention(heads, heads, heads)
        return alone.get_total_flops(), whole.get_total_flops() - alone.get_total_flops()

    (short, short_rest), (long, long_rest) = products(64), products(512)
    assert long == 64 * short
    assert long_rest == 8 * short_rest
    assert short < short_rest
    assert long > long_rest


def test_a_state_holds_a_template_a_row() -> None:
    """F20: row m of the summary is the sum of the values by how much each key is like template m."""
    keys, values = torch.rand(1, 2, 7, 3), torch.randn(1, 2, 7, 5)
    _, state = F.linear_attention(keys, keys, values, feature_map="identity", return_state=True)
    summary = state[0]
    assert summary.shape == (1, 2, 3, 5)
    torch.testing.assert_close(summary, torch.einsum("bhnm,bhnd->bhmd", keys, values))
