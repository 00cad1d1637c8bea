"""Layer 6: ablations differ as they must, seeds repeat, extremes stay finite, no collapse."""

import contextlib
import copy
import csv
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import denoising_experiment_proper as experiment
from adaptive_attention_moe import AdaptiveAttentionMoE, load_balancing_loss
from conftest import ROOT, Recorder, assert_refused
from denoising_experiment_proper import Recipe, train
from experiment import cuda_graphs, data_parallel
from experiment.checkpoints import read_run
from experiment.command_line import PUBLISHED_CHECKPOINT
from experiment.evaluation import evaluate
from experiment.image_sources import load_images
from experiment.muon import Muon, make_optimizer, orthogonalised
from experiment.noisy_images import NoisyImageDataset, noisy_splits
from experiment.run_files import RunFiles
from experiment.user_errors import UserError
from small_vit import MODELS, SmallViT, ViTConfig, load_model

# Ablations -----------------------------------------------------------------------------------


def with_budgets(model, k_attend):
    """The same weights with other budgets."""
    other = SmallViT(ViTConfig(k_attend=k_attend))
    other.load_state_dict(model.state_dict())
    return other.eval()


def test_budgets_at_or_above_n_are_one_model(vit):
    noisy = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        dense = with_budgets(vit, (64, 64, 64))(noisy)[0]
        assert torch.equal(with_budgets(vit, (64, 100, 999))(noisy)[0], dense)


def test_fewer_keys_move_the_output_further_from_dense(vit):
    noisy = torch.rand(4, 3, 32, 32)
    with torch.no_grad():
        dense = with_budgets(vit, (64, 64, 64))(noisy)[0]
        distances = [
            (with_budgets(vit, (k, k, k))(noisy)[0] - dense).square().mean().item()
            for k in (1, 4, 16, 63)
        ]
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] > 0


def replace_routing(model, route):
    """Replaces the routing of every block by route(routing)."""
    for block in model.blocks:
        block.attention.router.register_forward_hook(lambda _, __, routing: route(routing))


def test_uniform_routing_differs_from_the_routers(vit):
    noisy = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        before = vit.denoise(noisy)
        replace_routing(vit, lambda p: torch.full_like(p, 1 / p.shape[-1]))
        after, routings = vit(noisy)
    assert all((r == 1 / 3).all() for r in routings)
    assert (after - before).abs().max() > 1e-4


def test_first_choice_routing_differs_from_soft_routing(vit):
    noisy = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        before = vit.denoise(noisy)
        replace_routing(
            vit, lambda p: torch.nn.functional.one_hot(p.argmax(-1), p.shape[-1]).to(p.dtype)
        )
        assert (vit.denoise(noisy) - before).abs().max() > 1e-3


def test_an_expert_without_weight_can_be_removed(vit):
    noisy = torch.rand(2, 3, 32, 32)

    def silence_last(p):
        p = p.clone()
        p[..., 2] = 0
        return p

    replace_routing(vit, silence_last)
    with torch.no_grad():
        before = vit.denoise(noisy)
        for block in vit.blocks:
            for parameter in block.attention.experts[2].parameters():
                parameter.normal_()
        assert torch.allclose(vit.denoise(noisy), before, atol=1e-5)


def test_identical_experts_make_the_router_irrelevant(moe):
    for expert in moe.experts:
        expert.load_state_dict(moe.experts[0].state_dict())
        expert.k_attend = 5
    x = torch.randn(2, 16, 24, dtype=torch.float64)
    before = moe(x)[0]
    with torch.no_grad():
        moe.router.mlp[-1].bias.copy_(torch.tensor([3.0, 0.0, -3.0]))
    assert torch.allclose(moe(x)[0], before, atol=1e-12)


def test_positions_matter(vit, photos):
    """Without its position embedding the model could not tell a shuffled image from the image."""
    noisy = photos.test.images[:4].float() / 255
    patches = noisy.unfold(2, 4, 4).unfold(3, 4, 4)  # [B, 3, 8, 8, 4, 4]

    def shuffle(images, order):
        p = images.unfold(2, 4, 4).unfold(3, 4, 4).flatten(2, 3)[:, :, order]
        return p.unflatten(2, (8, 8)).transpose(3, 4).reshape(images.shape)

    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    assert patches.shape[2:4] == (8, 8)
    with torch.no_grad():
        vit.train()  # not clamped
        vit.position.mul_(50)
        a, b = vit(shuffle(noisy, order))[0], shuffle(vit(noisy)[0], order)
        assert not torch.allclose(a, b, atol=1e-2)
        vit.position.zero_()
        vit.double()
        a, b = vit(shuffle(noisy, order).double())[0], shuffle(vit(noisy.double())[0], order)
        assert torch.allclose(a, b, atol=1e-9)


# Collapse ------------------------------------------------------------------------------------


def load_after_training(balance_weight):
    """Share of each expert after 150 steps that started with a router sure of expert 0."""
    torch.manual_seed(0)
    layer = AdaptiveAttentionMoE(16, 2, (2, 4, 8))
    with torch.no_grad():
        layer.router.mlp[-1].bias.copy_(torch.tensor([4.0, 0.0, 0.0]))
    optimizer = torch.optim.AdamW(layer.parameters(), 1e-2)
    x = torch.randn(8, 8, 16)
    target = layer.experts[0](x).detach()  # the task itself wants expert 0
    for _ in range(150):
        output, routing = layer(x)
        loss = (output - target).square().mean() + balance_weight * load_balancing_loss(routing)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return routing.mean((0, 1)).detach()


def test_load_balancing_prevents_collapse():
    collapsed, balanced = load_after_training(0.0), load_after_training(0.1)
    assert collapsed.max() > 0.6
    assert balanced.max() < 0.4


@pytest.mark.parametrize(("loss", "near"), [("mse", False), ("psnr", False), ("psnr", True)])
def test_a_training_step_minimises_the_sum_of_both_losses(vit, photos, loss, near):
    """Its gradients are those of the loss + 0.01 · the load-balancing loss of every block.

    Near the true image the PSNR's stay bounded.
    """
    noisy, clean, _ = next(NoisyImageDataset(photos.train).batches(4))
    with torch.no_grad():
        for block in vit.blocks:
            block.attention.router.mlp[-1].bias.copy_(torch.tensor([3.0, 0.0, -3.0]))
    image, routings = vit(noisy)
    clean = image.detach() + 1e-3 * torch.randn_like(clean) if near else clean
    errors = (image - clean).square().mean((1, 2, 3))
    objective = errors.mean() if loss == "mse" else (errors + 1e-5).log10().mean() / 100
    (objective + 0.01 * sum(map(load_balancing_loss, routings))).backward()
    torch.nn.utils.clip_grad_norm_(vit.parameters(), 1.0)
    expected = [p.grad.clone() for p in vit.parameters()]
    still = torch.optim.SGD(vit.parameters(), 0.0)
    measured, _ = experiment.training_step(vit, still, noisy, clean, Recipe(loss=loss))
    assert measured == pytest.approx(errors.mean().item(), rel=1e-5)
    for parameter, gradient in zip(vit.parameters(), expected, strict=True):
        assert torch.allclose(parameter.grad, gradient, rtol=1e-3, atol=1e-6 if near else 1e-7)


def test_an_expert_that_is_hardly_used_any_more_is_called_back():
    """However little its load: a clamp of the load would end its gradient."""
    logits = torch.tensor([0.0, -14.0, -14.0]).expand(1, 6, 3).clone().requires_grad_()
    load_balancing_loss(logits.softmax(-1)).backward()
    assert (logits.grad[..., 1:] < -1e-3).all()


def test_trained_routers_use_every_expert(trained):
    for block in trained.checkpoint["test"]["utilisation"]:
        assert min(block) > 0.1
        assert sum(block) == pytest.approx(1, abs=1e-4)


# Reproducibility -----------------------------------------------------------------------------


def train_on(call, folder, output, *options):
    arguments = ("--dataset", folder, "--batch-size", 4, "--epochs", 3, "--output", output)
    return call(experiment, *arguments, *options)


def weights(path):
    return torch.load(path, weights_only=True)["model"]


def same_weights(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="session")
def few(photos):
    """Training and validation images for trainings of a few steps."""
    train_set = NoisyImageDataset(photos.train[::120])
    train_set.split.lossless[::2] = False
    return train_set, NoisyImageDataset(photos.val[:4], stream=1)


def train_few(few, files=None, state=None, fast=None, name="published", **changes):
    """Three epochs of five steps, the last of each a smaller one."""
    recipe = replace(Recipe(epochs=3, batch_size=4), **changes)
    torch.manual_seed(recipe.seed)
    model = SmallViT(MODELS[name])
    about = {"config": {}, "recipe": {"dataset": "photos", "val_images": 4, **recipe.as_dict()}}
    return train(model, *few, recipe, files, about, state, fast and fast(model))


@pytest.fixture(scope="session")
def plain(few):
    """What the default recipe makes of them."""
    return copy.deepcopy(train_few(few))


def rows(state):
    """The history without the seconds."""
    return [{k: v for k, v in row.items() if k != "seconds"} for row in state["history"]]


def test_a_seed_repeats_bit_for_bit(few, plain):
    again = train_few(few)
    assert same_weights(again["model"], plain["model"])
    assert rows(again) == rows(plain)


@pytest.mark.parametrize(
    "change",
    [
        *({"seed": 7}, {"loss": "psnr"}, {"optimizer": "muon"}, {"weight_decay": 0.5}),
        *({"flip": True}, {"balance_weight": 1.0}, {"lr": 1e-2}, {"lossless_share": 0.9}),
        *({"batch_size": 5}, {"dtype": "bfloat16"}),
    ],
    ids=str,
)
def test_every_part_of_a_recipe_decides(few, plain, change):
    assert not same_weights(train_few(few, epochs=1, **change)["model"], plain["model"])
    assert rows(train_few(few, epochs=1))[0] != rows(train_few(few, epochs=1, **change))[0]


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
    weight = torch.nn.Parameter(torch.randn(6, 5))
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


def test_muons_other_parameters_forget_squares_within_twenty_steps():
    """β₂ = 0.95, as of language models: a first square weighs 0.05."""
    bias = torch.nn.Parameter(torch.zeros(3))
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
        weights = [torch.nn.Parameter(torch.randn(8, 4)) for _ in range(matrices)]
        optimizer = Muon(weights, lr=0.1)
        for weight in weights:
            weight.grad = torch.randn(8, 4)
        with Recorder() as recorder:
            optimizer.step()
        counts.append(recorder.calls["bmm"] + recorder.calls["baddbmm"])
    assert counts == [15, 15]  # 3 products in each of 5 iterations


def test_the_learning_rate_falls_as_a_cosine_once_an_epoch(plain):
    assert [row["lr"] for row in plain["history"]] == pytest.approx([1e-3, 0.75e-3, 0.25e-3])


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
    test_set = noisy_splits(load_images(str(folder)), 0.2)[2]
    assert checkpoint["test"] == evaluate(load_model("m.pt"), test_set).summary()


def test_gradients_are_clipped_before_the_step(vit, photos, monkeypatch):
    noisy, clean, _ = next(NoisyImageDataset(photos.train).batches(4))
    monkeypatch.setattr(experiment, "CLIP_NORM", 1e-3)
    before = torch.cat([p.detach().flatten().clone() for p in vit.parameters()])
    experiment.training_step(vit, torch.optim.SGD(vit.parameters(), 1.0), noisy, clean, Recipe())
    after = torch.cat([p.detach().flatten() for p in vit.parameters()])
    assert (after - before).norm().item() == pytest.approx(1e-3, rel=1e-2)


class Killed(BaseException):
    pass


@pytest.mark.parametrize(
    ("stop_after", "recipe"),
    [(5, "published"), (8, "published"), (14, "published"), (8, "refined")],
)
def test_resume_gives_the_weights_of_an_uninterrupted_run(
    few, plain, monkeypatch, tmp_path, stop_after, recipe
):
    """Killed between epochs, in the second and in the last; all but the last epoch is kept."""
    changes = {} if recipe == "published" else {"optimizer": "muon", "lr": 4e-3, "name": "refined"}
    whole = train_few(few, **changes) if changes else plain
    files, steps = RunFiles(tmp_path / "m.pt"), []
    original = torch.nn.utils.clip_grad_norm_

    def kill(*arguments):
        steps.append(1)
        if len(steps) > stop_after:
            raise Killed
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(experiment.nn.utils, "clip_grad_norm_", kill)
        with pytest.raises(Killed):
            train_few(few, files, **changes)
        files.history.unlink()  # as if it had been killed between two files
        files.checkpoint.write_text("of somebody else")
        state = read_run(files, {"epochs": 3}, SmallViT(MODELS[recipe]))
        with pytest.raises(Killed):
            train_few(few, files, state, **changes)
    state = read_run(files, {"epochs": 3}, SmallViT(MODELS[recipe]))
    assert len(state["history"]) == stop_after // 5
    assert load_history(files) == rows(state)
    assert same_weights(weights(files.checkpoint), state["best"]["model"])
    state = train_few(few, files, state, **changes)
    assert same_weights(state["model"], whole["model"])
    assert same_weights(weights(files.checkpoint), whole["best"]["model"])
    assert rows(state) == rows(whole) == load_history(files)


@pytest.fixture
def interrupted(few, tmp_path, monkeypatch):
    """A run that was killed in its second epoch: function(change of its state) -> RunFiles."""
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(experiment, "print_epoch", raise_killed)
        with pytest.raises(Killed):
            train_few(few, RunFiles(Path("m.pt")))
    state = torch.load("m_resume.pt", weights_only=True)

    def forge(change):
        change(state)
        torch.save(state, "m_resume.pt")
        return RunFiles(Path("m.pt"))

    return forge


def raise_killed(*_):
    raise Killed


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s["optimizer"][3].update(exp_avg=torch.zeros(1)),  # fused steps trust its size
        lambda s: s["optimizer"][3].update(exp_avg=s["optimizer"][3]["exp_avg"].double()),
        lambda s: s["optimizer"][0].update(step=torch.zeros(2)),
        lambda s: s["optimizer"].pop(5),
        lambda s: s["optimizer"].update({7: None}),
        lambda s: s["optimizer"].update({99: {}}),
        lambda s: s.update(optimizer=[]),
        lambda s: s["model"].pop("position"),
        lambda s: s["model"].update(position=torch.zeros(1, 64, 127)),
        lambda s: s["best"]["model"].update(position=torch.full((1, 64, 128), float("inf"))),
        lambda s: s["best"].pop("val_mse"),
        lambda s: s["history"][0].pop("train_mse"),
        lambda s: s["history"][0].update(seconds="0"),
        lambda s: s["history"][0].update(epoch=2),
        lambda s: s["history"].append(None),
        lambda s: s["history"].clear(),
        lambda s: s["best"].update(epoch=30),
        lambda s: s["best"].update(recipe=s["recipe"] | {"lr": 0.5}),
        lambda s: s.update(history=None),
        lambda s: s.update(recipe=[]),
        lambda s: s.pop("model"),
    ],
)
def test_damaged_states_are_refused(few, interrupted, change):
    files = interrupted(change)
    written = files.checkpoint.read_bytes()
    with pytest.raises(UserError, match=r"m_resume.pt|interrupted run"):
        train_few(few, files, read_run(files, {"epochs": 3}, SmallViT()))
    assert files.checkpoint.read_bytes() == written


def test_good_states_are_not_refused(few, interrupted):
    """Two epochs alike, and a balance that rounding takes below zero."""

    def change(state):
        row = state["history"][0] | {"balance_loss": -1e-8}
        state["history"][:] = [row, row | {"epoch": 2}]
        state["best"]["epoch"] = 2

    files = interrupted(change)
    state = train_few(few, files, read_run(files, {"epochs": 3}, SmallViT()))
    assert len(state["history"]) == 3


def test_moments_without_memory_of_their_own_get_it(few, interrupted):
    """A fused step would write beyond an expanded tensor."""

    def change(state):
        for of_one in state["optimizer"].values():
            of_one["exp_avg"] = torch.zeros(1).expand(of_one["exp_avg"].shape)

    files = interrupted(change)
    train_few(few, files, read_run(files, {"epochs": 3}, SmallViT()))


def test_a_run_does_not_go_on_with_other_images(call, folder, monkeypatch):
    """Names and numbers stay: one file is replaced, two exchange their names."""
    with monkeypatch.context() as patch:
        patch.setattr(experiment, "print_epoch", raise_killed)
        with pytest.raises(Killed):
            train_on(call, folder, "m.pt")
    one, other = (folder / "test" / "a" / f"00{n}.png" for n in (0, 1))
    first, second = one.read_bytes(), other.read_bytes()
    for of_one, of_other in ((second, second), (second, first)):
        one.write_bytes(of_one)
        other.write_bytes(of_other)
        process = train_on(call, folder, "m.pt", "--resume")
        assert_refused(process, "the interrupted run had images_sha256", "--resume")
    one.write_bytes(first)
    other.write_bytes(second)
    assert train_on(call, folder, "m.pt", "--resume").returncode == 0


def test_a_kept_run_can_be_gone_on_with(call, folder, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(experiment, "print_epoch", raise_killed)
        with pytest.raises(Killed):
            train_on(call, folder, "m.pt")
    process = train_on(call, folder, "m.pt")
    assert process.returncode == 0 and "--resume --output m.1.pt" in process.stdout
    assert train_on(call, folder, "m.1.pt", "--resume").returncode == 0
    assert same_weights(weights("m.1.pt"), weights("m.pt"))


def test_an_interrupted_run_says_how_to_go_on(call, folder, monkeypatch):
    original = torch.nn.utils.clip_grad_norm_
    steps = []

    def press_ctrl_c(*arguments):
        steps.append(1)
        if len(steps) in (3, 11):  # 4 steps an epoch
            signal.raise_signal(signal.SIGINT)
        return original(*arguments)

    monkeypatch.setattr(experiment.nn.utils, "clip_grad_norm_", press_ctrl_c)
    process = train_on(call, folder, "m.pt")
    assert process.returncode == 130
    assert "nothing is kept" in process.stderr and not list(Path().glob("*.pt"))
    process = train_on(call, folder, "m.pt")
    assert process.returncode == 130
    assert "repeat the command with --resume" in process.stderr
    load_model("m.pt")
    process = train_on(call, folder, "m.pt", "--resume", "--lr", 0.5)
    assert_refused(process, "the interrupted run had lr 0.001, this one has 0.5")
    process = train_on(call, folder, "m.pt", "--resume")
    assert process.returncode == 0, process.stderr
    assert "epoch   1 " not in process.stdout and "epoch   2 " in process.stdout
    assert not Path("m_resume.pt").exists()


# Faster ways to the same result --------------------------------------------------------------


def load_history(files):
    with open(files.history, newline="") as file:
        table = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
    return rows({"history": table})


def test_two_processes_train_as_one_does(call, folder):
    """One log, one checkpoint, the curve of one process."""
    options = ("--dataset", folder, "--batch-size", 4, "--epochs", 3, "--seed", 3)
    assert call(experiment, *options, "--output", "one.pt").returncode == 0
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2")
    process = subprocess.run(
        [*torchrun, ROOT / "denoising_experiment_proper.py", *map(str, options)],
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("epoch   2") == process.stdout.count("FINAL RESULTS") == 1
    assert "2 processes" in process.stdout
    assert sorted(p.name for p in Path().glob("*.pt")) == [PUBLISHED_CHECKPOINT, "one.pt"]
    one, two = (load_history(RunFiles(Path(p))) for p in ("one.pt", PUBLISHED_CHECKPOINT))
    assert len(one) == len(two) == 3
    for expected, row in zip(one, two, strict=True):
        for name in ("train_mse", "val_mse"):
            assert row[name] == pytest.approx(expected[name], rel=1e-3)


def test_processes_share_every_whole_batch_without_overlap(monkeypatch):
    batches = [(torch.arange(6), torch.arange(6, 12)), (torch.arange(3), torch.arange(3))]
    monkeypatch.setattr(data_parallel, "world_size", lambda: 3)
    shares = []
    for rank in range(3):
        monkeypatch.setattr(data_parallel, "rank", lambda rank=rank: rank)
        ((first, second),) = data_parallel.my_share(batches, 6)  # the incomplete one is dropped
        assert torch.equal(second, first + 6)
        shares.append(first)
    assert torch.cat(shares).sort().values.tolist() == list(range(6))


def test_processes_take_equal_shares_or_none(monkeypatch):
    monkeypatch.setattr(experiment, "world_size", lambda: 3)
    experiment.check_shares(Recipe(batch_size=6), SimpleNamespace(epoch_size=6))
    for batch_size, images in ((64, 100), (6, 5)):
        with pytest.raises(UserError, match="--batch-size"):
            few = SimpleNamespace(epoch_size=images)
            experiment.check_shares(Recipe(batch_size=batch_size), few)


def test_training_goes_on_where_torch_compile_fails(few, plain, monkeypatch, capsys):
    def backend(graph, inputs):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    with torch._dynamo.config.patch(suppress_errors=False):  # put back afterwards
        state = train_few(few, fast=experiment.compiled)
    torch.compiler.reset()  # or the functions that failed would be skipped from now on
    assert same_weights(state["model"], plain["model"])
    printed = capsys.readouterr()
    assert printed.out.count("torch.compile does not work here") == 1
    assert "Traceback" not in printed.err


def test_training_runs_what_torch_compile_made(few, plain):
    calls = []

    class Fast(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, noisy):
            calls.append(len(noisy))
            return self.model(noisy)

    assert same_weights(train_few(few, fast=Fast)["model"], plain["model"])
    assert calls == [4] * 3 * 4  # a smaller batch is left to the model itself


def train_in_steps(model, optimizer, replay=False):
    """Losses of eight steps, each at a learning rate of its own, the sixth on fewer images."""
    optimizer = make_optimizer(model.train(), optimizer, 1e-3, 1e-4)
    step = partial(experiment.training_step, model, optimizer, recipe=Recipe())
    step = cuda_graphs.ReplayedStep(step, optimizer) if replay else step
    device = next(model.parameters()).device
    generator, losses = torch.Generator().manual_seed(0), []
    for n, images in enumerate((4, 4, 4, 4, 4, 3, 4, 4), 1):
        for group in optimizer.param_groups:
            group["lr"] = 1e-4 * n
        clean = torch.rand(images, 3, 32, 32, generator=generator).to(device)
        losses.append(step(clean.flip(3), clean))
    assert all(isinstance(group["lr"], float) for group in optimizer.param_groups)
    return torch.stack(losses)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need such a device")
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("name", ["vit", "refined"])
def test_a_replayed_step_is_the_step(name, optimizer, request):
    plain = request.getfixturevalue(name).cuda()
    replayed, calls = copy.deepcopy(plain), []
    losses = train_in_steps(plain, optimizer)
    replayed.register_forward_hook(lambda *_: calls.append(1))
    assert torch.allclose(train_in_steps(replayed, optimizer, replay=True), losses, rtol=1e-3)
    assert len(calls) == cuda_graphs.WARM_UP_STEPS + 1 + 1  # the recording; the smaller batch
    others = dict(plain.named_parameters())
    for key, one in replayed.named_parameters():
        if not key.endswith("key.bias"):  # whose gradient is nothing but rounding
            assert (one - others[key]).norm() <= 0.02 * others[key].norm(), key


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_learning_rates_in_tensors_mean_the_same(vit, optimizer):
    models = vit, copy.deepcopy(vit)
    plain, recordable = (make_optimizer(model, optimizer, 3e-3, 0.1) for model in models)
    for _ in range(2):
        for one, other in zip(*(model.parameters() for model in models), strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        plain.step()
        with cuda_graphs.rates_on_device(recordable) as rates:
            assert all(rate.item() == pytest.approx(3e-3) for rate in rates)
            assert all(
                group["lr"] is rate
                for group, rate in zip(recordable.param_groups, rates, strict=True)
            )
            assert all(group["capturable"] for group in recordable.param_groups)
            recordable.step()
    for group in recordable.param_groups:
        assert (group["lr"], group["capturable"]) == (3e-3, False)
        assert isinstance(group["lr"], float)
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-7)


def test_training_goes_on_where_no_graph_can_be_recorded(vit, monkeypatch, capsys):
    """With streams that do nothing, since a machine without CUDA has none."""

    class Stream:
        def wait_stream(self, other):
            pass

    def graph(graph, stream):
        raise RuntimeError("no graphs")

    plain, replayed = vit, copy.deepcopy(vit)
    losses = train_in_steps(plain, "muon")
    for name, replacement in (
        ("Stream", Stream),
        ("current_stream", Stream),
        ("stream", contextlib.nullcontext),
        ("set_stream", lambda stream: None),
        ("CUDAGraph", object),
        ("graph", graph),
    ):
        monkeypatch.setattr(torch.cuda, name, replacement)
    assert torch.equal(train_in_steps(replayed, "muon", replay=True), losses)
    assert (
        capsys.readouterr().out.count("CUDA graphs do not work here (RuntimeError: no graphs)") == 1
    )
    assert all(map(torch.equal, replayed.parameters(), plain.parameters()))


def test_batches_of_another_shape_are_not_replayed(vit, monkeypatch):
    monkeypatch.setattr(torch.cuda, "Stream", object)
    step = cuda_graphs.ReplayedStep(lambda noisy, clean: len(noisy), None)
    step.shape, step.warm_up, step.graph = torch.Size([4, 3, 32, 32]), 0, "recorded for four"
    assert step(torch.rand(1, 3, 32, 32), torch.rand(1, 3, 32, 32)) == 1


def test_models_compile_to_one_graph(seeded):
    """Without the code generator, which needs a C++ compiler; a break in the graph would raise."""
    model, gradients = SmallViT(replace(MODELS["refined"], num_layers=1, conv_depth=1)), []
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    for run in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        model.zero_grad()
        run(torch.ones(2, 3, 32, 32))[0].square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    for eager, compiled in zip(*gradients, strict=True):
        assert torch.allclose(compiled, eager, rtol=1e-3, atol=1e-5)


def test_bfloat16_stays_close_to_float32_and_keeps_float32_weights(few, plain):
    state = train_few(few, dtype="bfloat16")
    one, other = (s["history"][-1]["train_mse"] for s in (plain, state))
    assert other == pytest.approx(one, rel=0.02)
    assert other != one
    assert all(t.dtype == torch.float32 for t in state["best"]["model"].values())


# Noise ---------------------------------------------------------------------------------------


def test_flips_mirror_image_and_noise_free_target_alike(photos):
    dataset = NoisyImageDataset(photos.train[:64], noise_level=0.0)
    plain, flipped = (
        next(dataset.shuffled_batches(64, seed=0, epoch=1, flip=flip)) for flip in (False, True)
    )
    mirrored = (flipped[1] == plain[1].flip(3)).flatten(1).all(1)
    same = (flipped[1] == plain[1]).flatten(1).all(1)
    assert (mirrored | same).all()
    assert 16 < mirrored.sum() < 48
    assert torch.equal(flipped[0], flipped[1])
    noisy = [
        next(NoisyImageDataset(photos.train[:64]).shuffled_batches(64, 0, 1, flip=flip))
        for flip in (False, True)
    ]
    assert torch.equal(noisy[0][0][same], noisy[1][0][same])  # the published noise is left alone


def test_every_image_draws_its_noise_level_from_a_range(photos):
    grey = photos.train[[0] * 256]
    grey.images = torch.full_like(grey.images, 128)  # far enough from the ends to clamp little
    dataset = NoisyImageDataset(grey, (0.02, 0.1))
    for batch in (next(dataset.batches(256)), next(dataset.shuffled_batches(256, 0, 1))):
        sigma = (batch[0] - batch[1]).flatten(1).std(1)
        assert sigma.min() == pytest.approx(0.02, abs=0.003)
        assert sigma.max() == pytest.approx(0.1, abs=0.003)
        assert sigma.median() == pytest.approx((0.02 * 0.1) ** 0.5, abs=0.006)  # log-uniform
    assert torch.equal(dataset[7][0], next(dataset.batches(256))[0][7])


@pytest.mark.parametrize("level", [-0.1, (0.3, 0.1), float("nan"), (-0.1, 0.2), (0, 0.2)])
def test_impossible_noise_levels_are_refused(photos, level):
    with pytest.raises(ValueError, match="noise_level must be"):
        NoisyImageDataset(photos.test, level)


def test_evaluation_noise_is_the_same_for_any_batch_size(photos):
    dataset = NoisyImageDataset(photos.test[:50], stream=2)
    whole = torch.cat([noisy for noisy, _, _ in dataset.batches(50)])
    for size in (1, 7, 64):
        assert torch.equal(torch.cat([noisy for noisy, _, _ in dataset.batches(size)]), whole)
    assert torch.equal(dataset[33][0], whole[33])
    assert torch.equal(dataset[-1][0], whole[-1])


def test_splits_epochs_and_images_have_noise_of_their_own(photos):
    train, val, test = noisy_splits(photos, 0.2)
    val.split = test.split  # the same images, so that only the noise can differ
    assert torch.equal(val[0][1], test[0][1])
    assert not torch.equal(val[0][0], test[0][0])
    grey = NoisyImageDataset(photos.test[[0, 0]])
    assert not torch.equal(grey[0][0], grey[1][0])
    shifted = NoisyImageDataset(photos.test[[0, 0]], stream=1)
    assert not torch.equal(shifted[0][0], grey[1][0])  # stream 1, image 0; stream 0, image 1
    train.split = train.split[[0] * 8]  # one image, so that the order does not matter
    first, again, second, other = (
        next(train.shuffled_batches(8, seed, epoch))[0]
        for seed, epoch in ((0, 1), (0, 1), (0, 2), (1, 1))
    )
    assert torch.equal(first, again)
    steps = [noisy for noisy, _, _ in train.shuffled_batches(4, seed=0, epoch=1)]
    assert not torch.equal(*steps)
    assert not torch.equal(first, second)
    assert not torch.equal(first, other)


def test_an_epoch_sees_every_image_once(photos):
    labels = torch.arange(len(photos.val))
    photos_val = photos.val[:]
    photos_val.labels = labels
    dataset = NoisyImageDataset(photos_val)
    seen = torch.cat([batch[2] for batch in dataset.shuffled_batches(64, seed=0, epoch=3)])
    assert not torch.equal(seen, labels)
    assert torch.equal(seen.sort().values, labels)


def test_lossless_share_is_kept(photos):
    split = photos.train[:1000]
    split.lossless = torch.arange(1000) < 100
    split.labels = split.lossless.long()
    dataset = NoisyImageDataset(split)
    for lossless_share in (0.0, 0.5, 1.0):
        batches = dataset.shuffled_batches(64, 0, 1, lossless_share)
        labels = torch.cat([labels for _, _, labels in batches])
        assert len(labels) == 1000
        assert labels.double().mean().item() == lossless_share


# Extremes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0.0, 1.0, 0.5])
def test_flat_images_stay_finite(vit, value):
    noisy = torch.full((2, 3, 32, 32), value)
    image, _ = vit(noisy)
    image.square().mean().backward()
    assert image.isfinite().all()
    assert all(p.grad.isfinite().all() for p in vit.parameters())


@pytest.mark.parametrize("scale", [1e-6, 1e3, 1e6])
def test_extreme_tokens_stay_finite(seeded, scale):
    layer = AdaptiveAttentionMoE(16, 2, (1, 4, 64))
    x = (scale * torch.randn(2, 9, 16)).requires_grad_()
    output, routing = layer(x)
    (output.square().mean() + load_balancing_loss(routing)).backward()
    assert output.isfinite().all()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("sigma", [0.0, 0.01, 1.0, 100.0])
def test_any_noise_level_stays_in_range(photos, sigma):
    noisy, clean, _ = next(NoisyImageDataset(photos.test, sigma).batches(16))
    assert noisy.isfinite().all()
    assert noisy.min() >= 0
    assert noisy.max() <= 1
    assert torch.equal(noisy, clean) == (sigma == 0)


def test_images_of_another_type_are_refused(photos):
    split = photos.test[:2]
    split.images = split.images.float()
    with pytest.raises(ValueError, match="uint8"):
        NoisyImageDataset(split)


def test_model_output_is_an_image_whatever_the_input(vit):
    with torch.no_grad():
        image = vit.denoise(1e4 * torch.randn(2, 3, 32, 32))
    assert image.min() >= 0
    assert image.max() <= 1
