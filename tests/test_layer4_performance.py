"""Layer 4: counted FLOPs, sizes and calls, and how they grow with N and k; never a clock."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from adaptive_attention_moe import AdaptiveAttentionMoE
from conftest import Recorder
from experiment.evaluation import evaluate
from images.noisy_images import NoisyImageDataset
from images.training_batches import training_batches
from layers import topk_attention as door
from layers.topk_attention import TIES, topk_attention
from small_vit import SmallViT
from studies.reference import straightforward_moe
from studies.timing import count_flops


def record(function, *inputs):
    with torch.no_grad(), Recorder() as recorder:
        function(*inputs)
    return recorder


def saved_bytes(function, *inputs):
    """Bytes of the distinct tensors that autograd keeps for the backward pass."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = function(*inputs)  # alive, so that no two storages share an address
    del output
    return sum(storages.values())


@pytest.fixture
def layer(seeded):
    return AdaptiveAttentionMoE()


@pytest.mark.parametrize("tokens", [64, 256])
@pytest.mark.parametrize("budgets", [(32, 64, 128), (1, 8, 63)])
def test_flops_of_the_layer_are_those_of_the_formula(seeded, tokens, budgets):
    """Router, projections, scores and values, merge: nothing else. Masking saves none of it."""
    batch, width, experts = 3, 128, 3
    router = width * 64 + 64 * experts
    projections = experts * 4 * width * width
    attention = experts * 2 * tokens * width
    expected = 2 * batch * tokens * (router + projections + attention + width * width)
    layer = AdaptiveAttentionMoE(k_attend=budgets)
    assert count_flops(layer, torch.randn(batch, tokens, width)) == expected


@pytest.mark.parametrize("capacity", [0.125, 0.25, 0.5, 1.0])
def test_flops_fall_with_the_capacity_as_the_formula_says(seeded, capacity):
    """Keys and values of all tokens; queries, scores, outputs and merge of the chosen ones."""
    batch, tokens, width, experts = 3, 64, 128, 2
    layer = AdaptiveAttentionMoE(k_attend=(32, 64), capacity=capacity)
    chosen = round(capacity * tokens)
    router = tokens * (width * 64 + 64 * (experts + 1))
    keys_and_values = experts * 2 * tokens * width * width
    of_chosen = experts * (2 * width * width + 2 * tokens * width) + width * width
    expected = 2 * batch * (router + keys_and_values + chosen * of_chosen)
    assert count_flops(layer, torch.randn(batch, tokens, width)) == expected


def test_flops_of_inference_per_image():
    """What ARCHITECTURE.md states: 88 MFLOP an image."""
    model = SmallViT().eval()
    with torch.no_grad():
        flops = count_flops(model, torch.rand(64, 3, 32, 32))
    assert flops / 64 == pytest.approx(88e6, rel=0.01)


def test_flops_of_a_training_step_are_three_times_those_of_inference():
    model = SmallViT()
    noisy = torch.rand(8, 3, 32, 32)
    forward = count_flops(model, noisy)
    both = count_flops(lambda x: model(x)[0].sum().backward(), noisy)
    assert 2.8 < both / forward < 3.0  # the image itself needs no gradient


@pytest.mark.parametrize("tokens", [64, 256])
def test_selected_values_are_never_gathered(layer, tokens):
    """No tensor is larger than all projections or one expert's scores."""
    batch = 2
    x = torch.randn(batch, tokens, 128)
    largest = record(layer, x).largest
    assert largest <= max(batch * tokens * 3 * 3 * 128, batch * 4 * tokens * tokens)
    gathered = batch * 4 * tokens * 32 * 32  # [B, H, N, k, d_head] of the smallest budget
    assert record(lambda t: straightforward_moe(layer, t), x).largest >= gathered


@pytest.mark.parametrize("ratio", [1, 10**9], ids=["sparse", "masked"])
def test_memory_of_long_sequences_grows_linearly(monkeypatch, ratio):
    """Blocks of queries: no [N, N] tensor, and nothing of its size is kept for backward."""
    monkeypatch.setattr(door, "MAX_SCORES", 2**15)
    monkeypatch.setattr(door, "SPARSE_RATIO", ratio)
    layer = AdaptiveAttentionMoE(d_model=16, k_attend=(16, 32, 64))
    inputs = {n: torch.randn(1, n, 16) for n in (512, 1024)}
    kept = {n: saved_bytes(layer, x) for n, x in inputs.items()}
    assert kept[1024] < 2.1 * kept[512]
    attention = 3 * 4 * 1024 * 1024
    assert record(layer, inputs[1024]).largest < attention / 3 / 6
    assert 4 * attention > 5 * kept[1024]  # which the undivided path would keep several times


def test_backward_of_the_sparse_path_makes_no_scores(monkeypatch):
    """Beyond the selection the cost is that of the kept keys: no matrix product over all pairs."""
    monkeypatch.setattr(door, "MAX_SCORES", 2**16)
    qkv = [torch.randn(4, 1024, 8, requires_grad=True) for _ in range(3)]
    scores = 2 * 4 * 1024 * 1024 * 8
    with FlopCounterMode(display=False) as counter:
        attended = topk_attention(*qkv, 32)
    assert counter.get_total_flops() == scores
    with FlopCounterMode(display=False) as counter, Recorder() as recorder:
        attended.sum().backward()
    assert counter.get_total_flops() == 0
    assert recorder.largest <= 4 * 1024 * (32 + TIES + 1)


def test_backward_keeps_a_ninth_of_what_gathering_keeps(layer):
    x = torch.randn(32, 64, 128)
    fast = saved_bytes(layer, x)
    slow = saved_bytes(lambda t: straightforward_moe(layer, t), x)
    assert fast * 9 < slow


@pytest.mark.parametrize(("tokens", "selecting"), [(32, 0), (64, 1), (256, 3)])
def test_only_budgets_below_n_select(layer, tokens, selecting):
    """The others, of k = 32, 64 and 128, are dense."""
    calls = record(layer, torch.randn(2, tokens, 128)).calls
    dense = [n for name, n in calls.items() if name.startswith("_scaled_dot_product")]
    assert sum(dense) == 3 - selecting
    assert calls["topk"] == calls["masked_fill_"] == selecting


def test_projections_of_an_expert_are_one_matrix_product(layer):
    """Router 2; for each expert q, k, v and the output; scores and values of one; merge."""
    calls = record(layer, torch.randn(2, 64, 128)).calls
    assert calls["addmm"] == 2 + 3 * 2 + 1


def test_calls_do_not_grow_with_the_batch_or_the_tokens(layer):
    small = record(layer, torch.randn(2, 130, 128)).calls
    assert record(layer, torch.randn(8, 130, 128)).calls == small
    assert record(layer, torch.randn(2, 300, 128)).calls == small


def test_evaluation_runs_the_model_once_per_batch_without_a_graph(vit, photos):
    batches = []

    def note(model, inputs):
        batches.append((len(inputs[0]), torch.is_inference_mode_enabled()))

    vit.register_forward_pre_hook(note)
    evaluate(vit, NoisyImageDataset(photos.test[:130]))
    assert batches == [(64, True), (64, True), (2, True)]


def test_images_stay_one_byte_a_value_but_those_of_a_batch(photos):
    dataset = NoisyImageDataset(photos.train)
    with Recorder() as recorder:
        batches = sum(1 for _ in training_batches(dataset, 64, seed=0, epoch=1))
    assert batches == math.ceil(len(photos.train) / 64) > 10
    assert recorder.largest == 64 * 3 * 32 * 32
    assert dataset.split.images.dtype == torch.uint8
