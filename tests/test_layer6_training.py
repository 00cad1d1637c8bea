"""Layer 6, training: a seed repeats, every part of a recipe counts, a step is its definition."""

import copy
import itertools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.utils import parameters_to_vector

import denoising_experiment_proper as experiment
from adaptive_attention_moe import load_balancing_loss
from conftest import Recorder, filled, same_weights, train_few, train_on, without_seconds
from denoising_experiment_proper import RECIPES, Recipe
from experiment.evaluation import evaluate
from experiment.muon import Muon, make_optimizer, orthogonalised
from images.degradations import GaussianNoise
from images.image_sources import load_images
from images.noisy_images import NoisyImageDataset, noisy_splits
from small_vit import MODELS, SmallViT, load_model
from visualize_proper_results import attending

# The loop ------------------------------------------------------------------------------------


def test_a_seed_repeats_bit_for_bit(few, default_run):
    again = train_few(few)
    assert same_weights(again["model"], default_run["model"])
    assert without_seconds(again) == without_seconds(default_run)


def test_seconds_are_those_since_the_first_epoch_began(few, monkeypatch):
    ticks = itertools.count()
    monkeypatch.setattr(experiment, "time", SimpleNamespace(perf_counter=ticks.__next__))
    history = train_few(few)["history"]
    assert [row["seconds"] for row in history] == [1, 2, 3]


@pytest.fixture(scope="module")
def one_epoch(few):
    return copy.deepcopy(train_few(few, epochs=1))


@pytest.mark.parametrize(
    "change",
    [
        *({"seed": 7}, {"loss": "psnr"}, {"optimizer": "muon"}, {"weight_decay": 0.5}),
        *({"flip": True}, {"balance_weight": 1.0}, {"lr": 1e-2}, {"lossless_share": 0.9}),
        *({"batch_size": 5}, {"dtype": "bfloat16"}, {"steps": 4}, {"schedule": "step"}),
    ],
    ids=str,
)
def test_every_part_of_a_recipe_decides(few, one_epoch, change):
    changed = train_few(few, epochs=1, **change)
    assert not same_weights(changed["model"], one_epoch["model"])
    assert without_seconds(changed) != without_seconds(one_epoch)


def test_the_learning_rate_falls_as_a_cosine_once_an_epoch(default_run):
    assert [row["lr"] for row in default_run["history"]] == pytest.approx([1e-3, 0.75e-3, 0.25e-3])


def test_the_learning_rate_rises_and_falls_in_every_step(few):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 1.0)
    recipe = Recipe(steps=20, schedule="step")
    rates = [experiment.set_learning_rate(optimizer, recipe, step, 5) for step in range(20)]
    assert optimizer.param_groups[0]["lr"] == rates[-1]
    expected = [1 / 2, 1, *(down / 18 for down in range(18, 0, -1))]
    assert rates == pytest.approx([1e-3 * part for part in expected])
    history = train_few(few, epochs=2, steps=8, schedule="step")["history"]
    assert [row["lr"] for row in history] == pytest.approx([1e-3 * 4 / 7.2, 1e-3 / 7.2])


def test_a_training_ends_after_its_steps(call, folder, few):
    options = ("--dataset", folder, "--batch-size", 4, "--steps", 6, "--output", "m.pt")
    process = call(experiment, *options)
    assert process.returncode == 0, process.stderr
    recipe = torch.load("m.pt", weights_only=True)["recipe"]
    assert (recipe["steps"], recipe["epochs"], recipe["schedule"]) == (6, 2, "step")
    moments = train_few(few, epochs=2, steps=6)["optimizer"]
    assert {int(of_one["step"]) for of_one in moments.values()} == {6}


def test_the_best_epoch_is_kept_and_tested(call, folder, monkeypatch):
    """Not the last one: validation finds 0.03, 0.01 and 0.02."""
    errors, snapshots = iter([0.03, 0.01, 0.02]), []

    def validation_mse(model, _):
        snapshots.append(copy.deepcopy(model.state_dict()))
        return next(errors)

    monkeypatch.setattr(experiment, "validation_mse", validation_mse)
    process = train_on(call, folder, "m.pt")
    assert process.returncode == 0, process.stderr
    checkpoint = torch.load("m.pt", weights_only=True)
    assert (checkpoint["epoch"], checkpoint["val_mse"]) == (2, 0.01)
    assert same_weights(checkpoint["model"], snapshots[1])
    test_set = noisy_splits(load_images(str(folder)), GaussianNoise())[2]
    assert checkpoint["test"] == evaluate(load_model("m.pt"), test_set).summary()


# A step --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "near", "capacity"),
    [("mse", False, None), ("psnr", False, None), ("psnr", True, None), ("mse", False, 0.5)],
)
def test_a_training_step_minimises_the_sum_of_both_losses(seeded, photos, loss, near, capacity):
    """Its gradients are those of the loss + 0.01 · the load-balancing loss of every block, with
    its capacity. Near the true image the PSNR's stay bounded.
    """
    vit = filled(SmallViT(replace(MODELS["published"], capacity=capacity)))
    noisy, clean, _ = next(NoisyImageDataset(photos.train).batches(4))
    with torch.no_grad():
        for block in vit.blocks:
            block.attention.router.mlp[-1].bias[:3] = torch.tensor([3.0, 0.0, -3.0])
    image, routings = vit(noisy)
    clean = image.detach() + 1e-3 * torch.randn_like(clean) if near else clean
    errors = (image - clean).square().mean((1, 2, 3))
    objective = errors.mean() if loss == "mse" else (errors + 1e-5).log10().mean() / 100
    balance = sum(load_balancing_loss(routing, capacity) for routing in routings)
    (objective + 0.01 * balance).backward()
    torch.nn.utils.clip_grad_norm_(vit.parameters(), 1.0)
    expected = [p.grad.clone() for p in vit.parameters()]
    still = torch.optim.SGD(vit.parameters(), 0.0)
    step = experiment.make_step(vit, vit, still, Recipe(loss=loss, batch_size=4))
    measured, of_routers = step(1, noisy, clean)  # the second, of the capacity 0.5
    assert measured == pytest.approx(errors.mean().item(), rel=1e-5)
    assert of_routers == pytest.approx(balance.item(), rel=1e-5)
    for parameter, gradient in zip(vit.parameters(), expected, strict=True):
        assert torch.allclose(parameter.grad, gradient, rtol=1e-3, atol=1e-6 if near else 1e-7)


def test_gradients_are_clipped_before_the_step(vit, photos):
    """To a norm of 1, however large the error is."""
    noisy, clean, _ = next(NoisyImageDataset(photos.train).batches(4))
    before = parameters_to_vector(vit.parameters()).detach().clone()
    optimizer = torch.optim.SGD(vit.parameters(), 1.0)
    experiment.training_step(vit, optimizer, noisy, 100 * clean, Recipe())
    after = parameters_to_vector(vit.parameters()).detach()
    assert (after - before).norm().item() == pytest.approx(1, rel=1e-2)


# Optimizers ----------------------------------------------------------------------------------


def test_muon_turns_the_momentum_of_matrices_and_kernels_into_orthogonal_steps(seeded):
    """They are U Vᵀ of the singular value decomposition; the others get AdamW's signs."""
    model = SmallViT(MODELS["refined"])
    optimizer = make_optimizer(model, "muon", 1e-2, 0.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    gradients = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        p.grad = gradients[name].clone()
    optimizer.step()
    steps = {name: before[name] - p.detach() for name, p in model.named_parameters()}
    rest = [
        n for n, p in model.named_parameters() if "exp_avg" in optimizer.state[p] and p.ndim > 1
    ]
    assert rest == [
        "position",
        *(f"encoder.stages.1.{i}.depthwise.weight" for i in range(3)),
        *(f"blocks.{i}.attention.router.mlp.2.weight" for i in range(2)),
        *(f"decoder.stages.1.{i}.depthwise.weight" for i in range(3)),
        "decoder.head.weight",
    ]
    for name, step in steps.items():
        if step.ndim == 1 or name in rest:
            clear = gradients[name].abs() > 1e-4  # others are near AdamW's ε
            assert (step / gradients[name].sign() / 1e-2 - 1)[clear].abs().max() < 1e-3, name
            continue
        u, values, v = torch.linalg.svd(gradients[name].flatten(1), full_matrices=False)
        scale = 1e-2 * 0.2 * max(u.shape[0], v.shape[1]) ** 0.5  # a root mean square of 0.2 lr
        step = u.T @ step.flatten(1) @ v.T / scale
        kept = values > 0.02 * values.norm()  # smaller ones take more iterations
        assert kept.float().mean() > 0.7
        assert (step.diagonal()[kept] - 1).abs().max() < 0.25, name
        assert (step - step.diagonal().diag()).abs().max() < 1e-3, name


def test_muon_takes_the_definitions_second_step(seeded):
    """Momentum is a mean that remembers 0.95, looked ahead of (Nesterov); decay comes first."""
    weight = nn.Parameter(torch.randn(6, 5))
    start, first, second = weight.detach().clone(), *torch.randn(2, 6, 5)
    optimizer = Muon([weight], lr=0.1, weight_decay=0.5)
    for gradient in (first, second):
        weight.grad = gradient.clone()
        optimizer.step()
    expected, momentum = start, torch.zeros(6, 5)
    for gradient in (first, second):
        momentum = 0.95 * momentum + 0.05 * gradient
        update = orthogonalised((0.05 * gradient + 0.95 * momentum)[None])[0]
        expected = expected * (1 - 0.1 * 0.5) - 0.1 * 0.2 * 6**0.5 * update
    torch.testing.assert_close(weight.detach(), expected)
    assert (torch.linalg.svdvals(update) - 1).abs().max() < 0.3


def test_muon_moves_weights_in_every_layout(seeded):
    """A convolution's flattened kernel is a copy in channels-last, not the weight itself."""
    convs = [nn.Conv2d(6, 8, 3) for _ in range(2)]
    convs[1].load_state_dict(convs[0].state_dict())
    convs[1].to(memory_format=torch.channels_last)
    for conv in convs:
        optimizer = Muon([conv.weight], lr=0.1, weight_decay=0.5)
        conv(torch.ones(1, 6, 5, 5)).square().sum().backward()
        optimizer.step()
    assert torch.allclose(convs[0].weight, convs[1].weight, atol=1e-6)


def test_muons_other_parameters_forget_squares_within_twenty_steps():
    """β₂ = 0.95, as of language models: a first square weighs 0.05."""
    bias = nn.Parameter(torch.zeros(3))
    optimizer = Muon([bias], lr=0.1)
    bias.grad = torch.full((3,), 2.0)
    optimizer.step()
    assert torch.allclose(optimizer.state[bias]["exp_avg_sq"], torch.full((3,), 0.05 * 4))


@pytest.mark.parametrize(("optimizer", "of_others"), [("muon", 1.0), ("adamw", 0.95)])
def test_weight_decay_is_of_matrices_alone_in_muon_and_of_all_in_adamw(optimizer, of_others):
    layer = torch.nn.Linear(8, 8)
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    for p in layer.parameters():
        p.grad = torch.zeros_like(p)
    make_optimizer(layer, optimizer, 0.1, 0.5).step()
    torch.testing.assert_close(layer.weight.detach(), 0.95 * before["weight"])
    torch.testing.assert_close(layer.bias.detach(), of_others * before["bias"])


def test_muon_takes_matrices_of_one_shape_in_one_batch(seeded):
    counts = []
    for matrices in (1, 20):
        weights = [nn.Parameter(torch.randn(8, 4)) for _ in range(matrices)]
        optimizer = Muon(weights, lr=0.1)
        for weight in weights:
            weight.grad = torch.randn(8, 4)
        with Recorder() as recorder:
            optimizer.step()
        counts.append(recorder.calls["bmm"] + recorder.calls["baddbmm"])
    assert counts == [15, 15]  # 3 products in each of 5 iterations


def test_the_router_learns_where_the_noise_is(photos):
    """Without a local path: noisy tokens attend three times as often as clean ones, and more."""
    recipe = replace(RECIPES["routed"], steps=60, epochs=1, seed=0)
    train_set, _, test_set = recipe.splits(photos)
    torch.manual_seed(recipe.seed)
    model = SmallViT(replace(MODELS["routed"], local=False))
    val_set = NoisyImageDataset(photos.val[:8], recipe.degradation, stream=1)
    experiment.train(model, train_set, val_set, recipe)
    images = range(64)
    noisy = torch.stack([test_set[i][0] for i in images])
    sigma = torch.stack([test_set.sigma(i)[:1] for i in images])
    part = torch.nn.functional.avg_pool2d((sigma > 0.2).float(), 4).flatten(1)  # [n, tokens]
    with torch.inference_mode():
        _, routings = model.eval()(noisy)
    assert model.capacity == 0.25
    for attend in attending(model, routings):
        assert attend[part == 1].float().mean() > 3 * attend[part == 0].float().mean()
