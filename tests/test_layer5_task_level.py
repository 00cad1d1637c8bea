"""Layer 5: the experiment on real photographs, its files and its figures."""

import itertools
import os
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity

import ablation_study
import compare_baselines
import debug_evaluation
import denoising_experiment_proper as experiment
import visualize_proper_results
import visualize_training_data
from conftest import ROOT, SHORT, assert_refused, read_csv
from denoising_experiment_proper import RECIPES
from experiment.evaluation import (
    evaluate,
    psnr,
    psnr_of,
    spread,
    ssim,
    validation_batches,
    validation_mse,
)
from experiment.losses import LOSSES
from experiment.reports import draw_history
from images.degradations import Compression, GaussianNoise
from images.image_sources import load_images
from images.noisy_images import NoisyImageDataset, noisy_splits
from small_vit import MODELS, load_model

UMASK = os.umask(0)
os.umask(UMASK)

# Training ------------------------------------------------------------------------------------


def test_training_lowers_the_loss(trained):
    first, last = read_csv(trained.path / "model_history.csv")
    noisy = 10 ** (-trained.checkpoint["test"]["noisy_psnr_mean"] / 10)
    assert float(last["val_mse"]) < 0.5 * float(first["train_mse"]) < 0.5 * noisy
    assert float(first["lr"]) == 4e-3 and float(first["balance_loss"]) < 0.01


@pytest.mark.parametrize(
    ("recipe", "dataset", "task", "name"),
    [
        ("published", "cifar10", None, "best_denoising_model_proper.pt"),
        ("quick", "cifar10", None, "quick_cifar10.pt"),
        ("published", "photos", None, "published_photos.pt"),
        ("quick", "/some/where/mine/", "jpeg", "quick_jpeg_mine.pt"),
    ],
)
def test_no_other_run_takes_the_name_of_the_published_one(recipe, dataset, task, name):
    args = SimpleNamespace(recipe=recipe, dataset=dataset, task=task)
    assert experiment.output_name(args) == name


def test_model_beats_the_best_gaussian_blur(trained, photos):
    test_set = noisy_splits(photos, GaussianNoise())[2]
    blur, strengths = compare_baselines.baselines(0.2)["Gaussian blur"]
    strength, _ = compare_baselines.best_of(blur, strengths, test_set)
    blurred, _ = compare_baselines.measure(blur, strength, test_set)
    test = trained.checkpoint["test"]
    assert test["psnr_mean"] > max(blurred.mean(), 6 + test["noisy_psnr_mean"])


def test_results_are_printed(trained):
    test = trained.checkpoint["test"]
    line = (
        f"PSNR {test['psnr_mean']:.2f} ± {test['psnr_std']:.2f} dB   "
        f"SSIM {test['ssim_mean']:.4f} ± {test['ssim_std']:.4f}   images 204   dataset photos"
    )
    assert trained.output.splitlines()[-1] == line
    assert "FINAL RESULTS" in trained.output
    assert "358,345" in trained.output
    percentages = re.findall(r"experts, block \d +(.*) %", trained.output)
    assert len(percentages) == 2
    assert sum(map(float, percentages[0].split(" % / "))) == pytest.approx(100, abs=0.3)


def test_run_leaves_its_files_and_nothing_else(trained):
    names = {path.name for path in trained.path.iterdir()}
    assert names == {"model.pt", "model_history.csv", "model_curve.png"}
    for name in names:  # others may read them as far as the umask allows
        assert (trained.path / name).stat().st_mode & 0o777 == 0o666 & ~UMASK


def test_checkpoint_says_where_it_comes_from(trained):
    checkpoint = trained.checkpoint
    recipe = checkpoint["recipe"]
    expected = {"dataset": "photos", "train_images": 1949, "val_images": 152, "seed": 42}
    expected |= {"epochs": 2, "batch_size": 6, "lr": 4e-3, "noise_level": [0.2, 0.2]}
    expected |= {"parameters": 358_345, "optimizer": "muon"}
    expected["images_sha256"] = load_images("photos").sha256()
    assert {name: recipe[name] for name in expected} == expected
    history = read_csv(trained.path / "model_history.csv")
    best = min(history, key=lambda row: float(row["val_mse"]))
    assert checkpoint["epoch"] == int(best["epoch"])
    assert checkpoint["val_mse"] == pytest.approx(float(best["val_mse"]))
    assert checkpoint["torch_version"] == torch.__version__
    assert checkpoint["dataset"] == "photos"


@pytest.mark.parametrize(
    ("name", "model", "psnr_mean", "ssim_mean"),
    [
        ("best_denoising_model_proper.pt", "published", 26.157, 0.7545),
        ("models/refined.pt", "refined", 26.936, 0.7851),
        ("models/routed.pt", "routed", 24.225, 0.6492),  # σ = 0.2 is none of its training
    ],
)
def test_shipped_checkpoints_are_the_models_of_the_options_and_their_recipes(
    photos, name, model, psnr_mean, ssim_mean
):
    """On photographs that none has seen; a model trained on their like has 25.5 dB."""
    shipped = load_model(ROOT / name)
    assert shipped.config == MODELS[model] and not shipped.training
    own, recipe = shipped.trained.recipe, RECIPES[model]
    epochs = recipe.epochs if recipe.steps else own.epochs  # which follow from the steps
    assert replace(own, dtype="float32", epochs=epochs, lossless_share=None) == recipe
    figures = evaluate(shipped, noisy_splits(photos, GaussianNoise())[2]).summary()
    assert figures["psnr_mean"] == pytest.approx(psnr_mean, abs=0.02)
    assert figures["ssim_mean"] == pytest.approx(ssim_mean, abs=0.001)


def test_refined_model_on_a_range_of_noise(call, folder):
    options = ("--recipe", "refined", "--noise-level", 0.1, 0.3, "--no-flip")
    options += ("--lossless-share", 1)  # all is a share, too
    process = call(experiment, "--dataset", folder, *SHORT, *options, "--output", "m.pt")
    assert process.returncode == 0, process.stderr
    assert "σ = 0.1 to 0.3" in process.stdout
    expected = {"model": "refined", "optimizer": "muon", "loss": "psnr", "flip": False}
    expected |= {"noise_level": [0.1, 0.3], "lossless_share": 1}
    recipe = torch.load("m.pt", weights_only=True)["recipe"]
    assert {name: recipe[name] for name in expected} == expected
    assert load_model("m.pt").config == MODELS["refined"]
    assert call(debug_evaluation, "--dataset", folder, "--checkpoint", "m.pt").returncode == 0


@pytest.mark.usefixtures("small_picture")
def test_no_noise_is_no_obstacle(call, folder):
    options = ("--dataset", folder, "--noise-level", 0)
    process = call(experiment, *options, *SHORT, "--recipe", "refined", "--output", "m.pt")
    assert process.returncode == 0, process.stderr
    assert call(debug_evaluation, "--checkpoint", "m.pt").returncode == 0
    for script in (visualize_proper_results, compare_baselines):
        process = call(script, "--checkpoint", "m.pt", *options)
        assert process.returncode == 0, process.stderr
        assert "nan" not in process.stdout and "100.00 ± 0.00" in process.stdout
    assert_refused(call(ablation_study, *options), "--noise-level", "no noise")
    assert call(visualize_training_data, *options).returncode == 0


# Figures -------------------------------------------------------------------------------------


def test_metrics_are_those_of_the_definitions(photos):
    """PSNR = 10 log10(1 / MSE); SSIM is 1 for equal images only."""
    noisy, clean, _ = (t.numpy() for t in NoisyImageDataset(photos.test)[3])
    mse = ((noisy.astype(np.float64) - clean) ** 2).mean()
    assert psnr(noisy, clean) == pytest.approx(10 * np.log10(1 / mse), abs=1e-4)
    assert psnr(clean, clean) == 100
    assert ssim(clean, clean) == pytest.approx(1)
    by_hand = structural_similarity(clean, noisy, channel_axis=0, data_range=1.0)
    assert ssim(noisy, clean) == by_hand < 0.7


def test_an_error_of_zero_hides_no_other():
    assert psnr_of(0.0) == psnr_of(1e-11) == 100 and psnr_of(0.01) == pytest.approx(20)
    assert spread([1.0, 3.0]) == (2.0, 1.0)


def test_an_image_without_damage_does_not_choose_the_strength(photos):
    """A white image comes back from JPEG as it was, and by every strength of total variation."""
    split = photos.test[torch.arange(8)]  # a copy, not a view of what other tests see
    smooth, strengths = compare_baselines.baselines(0.05)["total variation"]
    jpeg = NoisyImageDataset(split, degradation=Compression(quality=(10, 10)))
    strength, _ = compare_baselines.best_of(smooth, strengths, jpeg)
    split.images[-1] = 255
    again, _ = compare_baselines.best_of(smooth, strengths, jpeg)
    assert again == pytest.approx(strength, rel=0.5)


def test_the_best_epoch_is_marked_in_the_curve():
    rows = [{"epoch": n, "train_mse": 0.1, "val_mse": v} for n, v in enumerate((3, 1, 2), 1)]
    (axis,) = draw_history(rows).axes
    assert list(axis.lines[-1].get_xdata()) == [2, 2]


def test_validation_and_test_weigh_every_image_alike(vit, photos):
    """70 images are batches of 64 and 6."""
    dataset = NoisyImageDataset(photos.val[:70])
    noisy, clean, _ = next(dataset.batches(70))
    mse = (vit.denoise(noisy) - clean).square().mean().item()
    batches = validation_batches(dataset, torch.device("cpu"))
    assert [len(clean) for _, clean in batches] == [64, 6]
    assert validation_mse(vit, batches) == pytest.approx(mse, rel=1e-5)
    result, rounded = evaluate(vit, dataset), (255 * vit.denoise(noisy)).round() / 255
    assert result.mse == pytest.approx(mse, rel=1e-5)
    of_files = [psnr(*pair) for pair in zip(rounded.numpy(), clean.numpy(), strict=True)]
    assert np.allclose(result.psnr_8_bits, of_files, rtol=0, atol=1e-6)


# A loss that is not finite -------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [4, 64])
def test_a_loss_that_is_not_finite_stops_the_run(call, folder, batch_size):
    """With one step an epoch, only the validation sees what the step did."""
    options = ("--dataset", folder, "--batch-size", batch_size, "--epochs", 2, "--lr", 1e30)
    process = call(experiment, *options, "--output", "m.pt")
    assert_refused(process, "not finite in epoch 1", "no epoch is kept", "smaller --lr")
    assert not list(Path().glob("*.pt"))


def test_a_late_loss_that_is_not_finite_keeps_the_last_good_model(call, folder, monkeypatch):
    original, steps = LOSSES["mse"], itertools.count(1)

    def poisoned(restored, clean):
        return original(restored, clean) * (float("nan") if next(steps) > 6 else 1)

    monkeypatch.setitem(LOSSES, "mse", poisoned)
    options = ("--dataset", folder, "--batch-size", 4, "--epochs", 3)  # 4 steps an epoch
    process = call(experiment, *options, "--output", "m.pt")
    assert_refused(process, "not finite in epoch 2", "m.pt keeps epoch 1")
    assert all(p.isfinite().all() for p in load_model("m.pt").parameters())
