"""Layer 5: the experiment as a user runs it, on real photographs, and what it refuses."""

import concurrent.futures
import csv
import io
import json
import multiprocessing
import os
import pickle
import re
import signal
import struct
import subprocess
import sys
import urllib.error
import zipfile
import zlib
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
import torchvision
from PIL import Image
from skimage.metrics import structural_similarity

import ablation_study
import benchmark
import compare_baselines
import debug_evaluation
import debug_test_data
import denoising_experiment_proper as experiment
import visualize_proper_results
import visualize_training_data
from conftest import ROOT, assert_refused, interrupted_in_epoch, write_images
from experiment.checkpoints import read_checkpoint, write_checkpoint
from experiment.evaluation import (
    draw_history,
    evaluate,
    psnr,
    psnr_of,
    spread,
    ssim,
    validation_batches,
    validation_mse,
)
from experiment.image_sources import load_images
from experiment.noisy_images import NoisyImageDataset, noisy_splits
from experiment.photo_files import read_rgb
from experiment.run_files import RunFiles, locked, replace_when_complete
from experiment.user_errors import UserError, run_main
from model_variants import VARIANTS
from small_vit import MODELS, SmallViT, load_model

UMASK = os.umask(0)
os.umask(UMASK)
SHORT = ("--epochs", 1, "--batch-size", 16)


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


# Training ------------------------------------------------------------------------------------


def test_training_lowers_the_loss(trained):
    (row,) = read_csv(trained.path / "model_history.csv")
    noisy = 10 ** (-trained.checkpoint["test"]["noisy_psnr_mean"] / 10)
    assert float(row["val_mse"]) < 0.5 * float(row["train_mse"]) < 0.5 * noisy
    assert float(row["lr"]) == 4e-3 and float(row["balance_loss"]) < 0.01


def test_model_beats_the_best_gaussian_blur(trained, photos):
    test_set = noisy_splits(photos, 0.2)[2]
    blur, strengths = compare_baselines.baselines(0.2)["Gaussian blur"]
    _, blurred, _ = compare_baselines.best_of(blur, strengths, test_set)
    assert trained.checkpoint["test"]["psnr_mean"] > blurred.mean()
    assert (
        trained.checkpoint["test"]["psnr_mean"] > 6 + trained.checkpoint["test"]["noisy_psnr_mean"]
    )


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
    assert recipe["dataset"] == "photos"
    assert (recipe["train_images"], recipe["val_images"]) == (1949, 152)
    assert (recipe["epochs"], recipe["batch_size"], recipe["lr"]) == (1, 32, 4e-3)
    assert (recipe["seed"], recipe["noise_level"]) == (42, [0.2, 0.2])
    history = read_csv(trained.path / "model_history.csv")
    best = min(history, key=lambda row: float(row["val_mse"]))
    assert checkpoint["epoch"] == int(best["epoch"])
    assert checkpoint["val_mse"] == pytest.approx(float(best["val_mse"]))
    assert checkpoint["torch_version"] == torch.__version__
    assert checkpoint["dataset"] == "photos"
    assert recipe["parameters"] == 358_345 and recipe["optimizer"] == "muon"
    assert recipe["images_sha256"] == load_images("photos").sha256()


def test_load_model_gives_the_model_that_was_tested(trained, photos):
    model = load_model(trained.path / "model.pt")
    assert not model.training
    result = evaluate(model, noisy_splits(photos, 0.2)[2])
    assert result.psnr.mean() == pytest.approx(trained.checkpoint["test"]["psnr_mean"], abs=1e-3)


@pytest.mark.parametrize(
    ("name", "model", "psnr_mean", "ssim_mean"),
    [
        ("best_denoising_model_proper.pt", "published", 26.157, 0.7545),
        ("models/refined.pt", "refined", 26.936, 0.7851),
    ],
)
def test_shipped_checkpoints_are_the_models_of_the_options(
    photos, name, model, psnr_mean, ssim_mean
):
    """On photographs that neither has seen; a model trained on their like has 25.5 dB."""
    shipped = load_model(ROOT / name)
    assert shipped.config == MODELS[model]
    figures = evaluate(shipped, noisy_splits(photos, 0.2)[2]).summary()
    assert figures["psnr_mean"] == pytest.approx(psnr_mean, abs=0.02)
    assert figures["ssim_mean"] == pytest.approx(ssim_mean, abs=0.001)


def test_metrics_are_those_of_the_definitions(photos):
    """PSNR = 10 log10(1 / MSE); SSIM is 1 for equal images only."""
    noisy, clean, _ = (t.numpy() for t in NoisyImageDataset(photos.test)[3])
    mse = ((noisy.astype(np.float64) - clean) ** 2).mean()
    assert psnr(noisy, clean) == pytest.approx(10 * np.log10(1 / mse), abs=1e-4)
    assert psnr(clean, clean) == np.inf
    assert ssim(clean, clean) == pytest.approx(1)
    by_hand = structural_similarity(clean, noisy, channel_axis=0, data_range=1.0)
    assert ssim(noisy, clean) == by_hand < 0.7


def test_an_error_of_zero_is_an_infinite_psnr():
    assert psnr_of(0.0) == np.inf and psnr_of(0.01) == pytest.approx(20)
    assert spread([np.inf, np.inf]) == (np.inf, 0.0)
    assert spread([1.0, 3.0]) == (2.0, 1.0)


def test_the_best_epoch_is_marked_in_the_curve():
    rows = [{"epoch": n, "train_mse": 0.1, "val_mse": v} for n, v in enumerate((3, 1, 2), 1)]
    (axis,) = draw_history(rows).axes
    assert list(axis.lines[-1].get_xdata()) == [2, 2]


def test_validation_weighs_every_image_alike(vit, photos):
    """70 images are batches of 64 and 6."""
    dataset = NoisyImageDataset(photos.val[:70])
    noisy, clean, _ = next(dataset.batches(70))
    mse = (vit.denoise(noisy) - clean).square().mean().item()
    batches = validation_batches(dataset, torch.device("cpu"))
    assert [len(clean) for _, clean in batches] == [64, 6]
    assert validation_mse(vit, batches) == pytest.approx(mse, rel=1e-5)


# The other scripts ---------------------------------------------------------------------------


def test_visualization_shows_and_tells_the_whole_test_set(trained, call, monkeypatch):
    monkeypatch.setattr("experiment.evaluation.NOISE_LEVELS", (0.1, 0.2, 0.3))
    process = call(visualize_proper_results, "--checkpoint", trained.path / "model.pt")
    assert process.returncode == 0, process.stderr
    rows = read_csv("denoising_visualization_proper_images.csv")
    psnrs = np.array([float(row["psnr_db"]) for row in rows])
    test = trained.checkpoint["test"]
    assert len(psnrs) == 204
    assert psnrs.mean() == pytest.approx(test["psnr_mean"], abs=1e-3)
    assert process.stdout.splitlines()[-1].startswith(f"PSNR {test['psnr_mean']:.2f} ±")
    worst, best = np.sort(psnrs)[:20].mean(), np.sort(psnrs)[-20:].mean()
    assert f"{worst:.4g}" in process.stdout
    assert f"{best:.4g}" in process.stdout
    with Image.open("denoising_visualization_proper.png") as picture:
        assert min(picture.size) > 800
    rows = re.findall(r"^\| (0\.\d\d) \| ([\d.]+) \| ([\d.]+) \|", process.stdout, re.MULTILINE)
    assert [float(level) for level, *_ in rows] == [0.1, 0.2, 0.3]
    assert float(rows[1][2]) == pytest.approx(test["psnr_mean"], abs=0.006)
    noisy = [float(before) for _, before, _ in rows]
    assert noisy == sorted(noisy, reverse=True)


def test_drawn_images_go_from_worst_to_best():
    values = np.random.default_rng(0).permutation(1000)
    ranks = [values[i] for i in visualize_proper_results.rank_images(values)]
    assert ranks == sorted(ranks)
    assert ranks[0] < 100
    assert ranks[-1] >= 900


def test_training_data_script_accepts_right_noise(call):
    process = call(visualize_training_data, "--dataset", "photos")
    assert process.returncode == 0, process.stdout
    with Image.open("training_data_verification.png") as picture:
        assert min(picture.size) > 800


@pytest.mark.parametrize("actual", [0.19, 0.21])
def test_training_data_script_notices_wrong_noise(call, monkeypatch, actual):
    def off(self, noise, sigma, *others):
        return original(self, noise, torch.full_like(sigma, actual), *others)

    original = NoisyImageDataset._add
    monkeypatch.setattr(NoisyImageDataset, "_add", off)
    process = call(visualize_training_data, "--dataset", "photos")
    assert process.returncode == 1
    assert "OFF" in process.stdout


def test_theory_of_the_clamped_noise():
    """Against a simulation, for a dark, a middle and a bright value."""
    share = torch.zeros(256, dtype=torch.float64)
    share[[0, 100, 240]] = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    clean = torch.multinomial(share, 10**6, True, generator=generator).double() / 255
    noise = torch.randn(10**6, generator=generator, dtype=torch.float64)
    difference = (clean + 0.3 * noise).clamp(0, 1) - clean
    edges = torch.linspace(-1, 1, 42, dtype=torch.float64)
    mean, std, shares = visualize_training_data.clipped_noise(share, 0.3, edges)
    assert mean == pytest.approx(difference.mean().item(), abs=1e-3)
    assert std == pytest.approx(difference.std().item(), abs=1e-3)
    assert torch.allclose(shares, torch.histogram(difference, edges).hist / 10**6, atol=2e-3)


def test_debug_evaluation_reproduces_the_run(trained, call):
    process = call(debug_evaluation, "--checkpoint", trained.path / "model.pt")
    assert process.returncode == 0, process.stdout + process.stderr
    assert "all figures agree" in process.stdout


def test_debug_evaluation_notices_a_wrong_figure(trained, call, tmp_path):
    forged = {**trained.checkpoint, "test": {**trained.checkpoint["test"], "psnr_mean": 31.0}}
    torch.save(forged, tmp_path / "forged.pt")
    process = call(debug_evaluation, "--checkpoint", "forged.pt")
    assert process.returncode == 1
    assert re.search(r"psnr_mean +31 .*DISAGREES", process.stdout)


def test_debug_test_data_finds_nothing_in_photos(call):
    process = call(debug_test_data, "--dataset", "photos")
    assert process.returncode == 0, process.stdout
    assert "nothing looks wrong" in process.stdout


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x: 255 * x, "not divided by 255"),
        (lambda x: x / 255, "divided by 255 twice"),
        (lambda x: 2 * x - 1, "standardised"),
        (lambda x: x * float("nan"), "not finite"),
    ],
)
def test_wrong_normalisation_is_noticed(photos, change, words):
    images = photos.test.images[:50].float() / 255
    assert debug_test_data.normalisation_problems(images) == []
    assert any(words in p for p in debug_test_data.normalisation_problems(change(images)))


def test_debug_test_data_notices_black_and_leaked_images(folder, call):
    for path in (folder / "train").rglob("*.png"):
        Image.new("RGB", (32, 32)).save(path)
    for path in (folder / "train").rglob("*.jpg"):
        path.unlink()
    Image.new("RGB", (32, 32)).save(folder / "test" / "black.png")
    process = call(debug_test_data, "--dataset", folder)
    assert process.returncode == 1
    assert "all black" in process.stdout
    assert "byte for byte" in process.stdout


@pytest.mark.parametrize("sigma", [0.02, 0.2, 0.6])
def test_classical_methods_get_their_best_strength_at_any_noise(photos, sigma):
    dataset = NoisyImageDataset(photos.test[::40], sigma)
    for name in ("Gaussian blur", "total variation"):
        denoise, strengths = compare_baselines.baselines(sigma)[name]
        best, psnrs, _ = compare_baselines.best_of(denoise, strengths, dataset)
        for other in np.geomspace(0.02, 5, 20):
            _, others, _ = compare_baselines.measure(denoise, other * sigma / 0.2, dataset)
            assert others.mean() < psnrs.mean() + 0.1, (name, best, other * sigma / 0.2)


def test_baselines_table(folder, trained, call):
    process = call(
        compare_baselines, "--checkpoint", trained.path / "model.pt", "--dataset", folder
    )
    assert process.returncode == 0, process.stderr
    rows = dict(re.findall(r"^\| \**([a-zA-Z -]+).*?\| ([\d.]+) ±", process.stdout, re.M))
    scores = {name.strip(): float(value) for name, value in rows.items()}
    assert len(scores) == 6
    assert scores["noisy input"] < scores["wavelet"] < 40
    assert scores["noisy input"] < scores["Gaussian blur"] < 40


def test_refined_model_on_a_range_of_noise(call, folder):
    options = ("--recipe", "refined", "--noise-level", 0.1, 0.3, "--no-flip")
    process = call(experiment, "--dataset", folder, *SHORT, *options, "--output", "m.pt")
    assert process.returncode == 0, process.stderr
    assert "σ = 0.1 to 0.3" in process.stdout
    checkpoint = torch.load("m.pt", weights_only=True)
    assert checkpoint["recipe"]["noise_level"] == [0.1, 0.3]
    recipe = {name: checkpoint["recipe"][name] for name in ("model", "optimizer", "loss", "flip")}
    assert recipe == {"model": "refined", "optimizer": "muon", "loss": "psnr", "flip": False}
    assert load_model("m.pt").config == MODELS["refined"]
    assert call(debug_evaluation, "--dataset", folder, "--checkpoint", "m.pt").returncode == 0
    process = call(compare_baselines, "--dataset", folder, "--checkpoint", "m.pt")
    assert "σ = 0.2" in process.stdout  # the middle


def test_noise_levels_have_to_ascend(call, folder):
    options = ("--dataset", folder, "--noise-level")
    assert_refused(call(experiment, *options, 0.3, 0.1), "--noise-level", "ascending")
    assert_refused(call(experiment, *options, 0.1, 0.2, 0.3), "--noise-level", "ascending")
    assert_refused(call(experiment, *options, 0, 0.3), "--noise-level", "above 0")


# The ablation study --------------------------------------------------------------------------


@pytest.fixture
def study(call, tmp_path):
    """Runs ablation_study.py with one step for each variant."""
    write_images(tmp_path / "few" / "train", 3)
    write_images(tmp_path / "few" / "test", 2)
    options = ("--dataset", tmp_path / "few", "--batch-size", 2, "--epochs", 1)

    def run(*others, seeds=(0,)):
        return call(ablation_study, *options, "--seeds", *seeds, *others)

    return run


def test_ablation_study_trains_every_variant(study):
    process = study()
    assert process.returncode == 0, process.stderr
    results = json.loads(Path("ablation_study.json").read_text())
    assert [row["variant"] for row in results["rows"]] == list(VARIANTS)
    assert max(row["parameters"] for row in results["rows"]) <= 599_689
    routed = {row["variant"]: np.shape(row["utilisation"]) for row in results["rows"]}
    assert routed["published"] == (2, 3) and routed["dense, one expert"] == (2, 1)
    assert routed["U-Net"] == (0,)
    table = Path("ablation_study.md").read_text()
    assert all(f"| {name} | " in table for name in VARIANTS)


def test_ablation_study_trains_as_the_training_script_does(study, call, folder):
    """The same loop: the study's figure is that of the checkpoint of the same seed."""
    options = ("--dataset", folder, "--epochs", 2, "--batch-size", 4)
    names = ("--variants", "published", "--seeds", 42)
    assert call(ablation_study, *options, *names).returncode == 0
    assert call(experiment, *options, "--output", "m.pt").returncode == 0
    (row,) = json.loads(Path("ablation_study.json").read_text())["rows"]
    checkpoint = torch.load("m.pt", weights_only=True)
    assert row["psnr"] == checkpoint["test"]["psnr_mean"]


def test_ablation_study_goes_on_where_it_stopped(study, monkeypatch):
    trained = []
    original = ablation_study.train_variant

    def train_variant(name, *arguments):
        trained.append(name)
        if len(trained) == 3:
            raise KeyboardInterrupt
        return original(name, *arguments)

    monkeypatch.setattr(ablation_study, "train_variant", train_variant)
    names = ("published", "uniform weights", "random weights")
    assert study("--variants", *names).returncode == 130
    assert study("--variants", *names).returncode == 0
    assert trained == [*names, "random weights"]
    process = study("--variants", *names, "--lr", 0.5)
    assert_refused(process, "lr 0.001, this one has 0.5", "--output")


@pytest.mark.parametrize(
    ("replaced", "by", "message"),
    [
        ('"parameters": 599689', '"parameters": 7', "'published' with 7 parameters"),
        ('"variant": "published"', '"variant": "older"', "'older' with 599,689 parameters"),
        ('"ssim"', '"similarity"', "no result of this script"),
    ],
)
def test_ablation_study_refuses_rows_of_other_variants(study, replaced, by, message):
    assert study("--variants", "published").returncode == 0
    output = Path("ablation_study.json")
    output.write_text(output.read_text().replace(replaced, by))
    written = output.read_bytes()
    assert_refused(study("--variants", "published"), message, "--output")
    assert output.read_bytes() == written


def test_parts_of_a_trained_model_are_replaced(trained, call):
    process = call(ablation_study, "--checkpoint", trained.path / "model.pt")  # its own images
    assert process.returncode == 0, process.stderr
    table = dict(re.findall(r"^\| ([a-z].*?) \| ([\d.]+) \|", process.stdout, re.MULTILINE))
    assert len(table) == 10
    assert table["as trained"] == f"{trained.checkpoint['test']['psnr_mean']:.2f}"


def test_every_replaced_part_changes_the_model(vit):
    variants, noisy = ablation_study.replaced_parts(vit, 64), torch.rand(2, 3, 32, 32)
    image = variants.pop("as trained").denoise(noisy)
    for name, variant in variants.items():
        assert (variant.denoise(noisy) - image).abs().max() > 1e-5, name


def test_a_variant_that_diverges_does_not_end_the_study(study, monkeypatch):
    original = ablation_study.train_variant

    def train_variant(name, *arguments):
        if name == "published":
            raise experiment.Diverged("the loss is not finite in epoch 1")
        original(name, *arguments)

    monkeypatch.setattr(ablation_study, "train_variant", train_variant)
    names = ("published", "uniform weights")
    assert study("--variants", *names).returncode == 0
    process = study("--variants", *names)  # it is not tried again
    assert process.returncode == 0, process.stderr
    assert "| published | 599,689 | 0, 1 diverged | – | – |" in process.stdout
    rows = json.loads(Path("ablation_study.json").read_text())["rows"]
    assert [row["psnr"] is None for row in rows] == [True, False]


def test_a_seed_counts_once(study):
    process = study("--variants", "published", seeds=(3, 3, 3))
    assert process.returncode == 0, process.stderr
    assert "| published | 599,689 | 1 |" in process.stdout


def test_an_empty_checkpoint_name_is_no_study(study):
    assert_refused(study("--checkpoint", ""), "no such checkpoint")


def test_ablation_study_does_not_touch_other_files(study):
    Path("README.md").write_text("mine")
    assert_refused(study("--output", "README.json"), "README.md is not of this study")
    assert Path("README.md").read_text() == "mine"
    Path("mine.json").write_text("[]")
    assert_refused(study("--output", "mine.json"), "mine.json", "--output")
    assert Path("mine.json").read_text() == "[]"
    assert_refused(study("--output", "mine.txt"), "mine.txt", ".json")


class Inline:
    """In the place of a process of its own, which takes seconds to start."""

    def __init__(self, *_):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, function, name, *arguments):
        if name == "straightforward":
            with concurrent.futures.ProcessPoolExecutor(
                1, multiprocessing.get_context("spawn")
            ) as pool:
                return pool.submit(function, name, *arguments)
        job = concurrent.futures.Future()
        job.set_result(function(name, *arguments))
        return job


def test_benchmark_times_every_row_side_by_side(folder, call, monkeypatch):
    monkeypatch.setattr(benchmark, "ProcessPoolExecutor", Inline)
    small = benchmark.Effort(1, 0, batch_size=4, evaluation_images=8, tokens=(64, 256))
    monkeypatch.setattr(benchmark, "QUICK", small)
    process = call(benchmark, "--dataset", folder, "--quick", "--dtype", "bfloat16")
    assert process.returncode == 0, process.stderr
    results = json.loads(Path("benchmark_results.json").read_text())
    assert [row["row"] for row in results["rows"]] == list(benchmark.ROWS[:-1])
    assert [row["images"] for row in results["rows"]] == [4, 4, 4, 4, 8]
    assert [row["tokens"] for row in results["tokens"]] == [64, 256]
    assert results["tokens"][1]["extra_bytes"]["straightforward"] > 0
    variants = {"this", "straightforward", "dense"}
    for row in results["rows"][:4]:
        assert row["seconds"].keys() == variants | {"refined"}
        assert row["times_faster"] > 0 and 0 < row["part_of_rate"] < 2
    assert all(row["seconds"].keys() == variants for row in results["tokens"])
    assert results["machine"]["dtype"] == "bfloat16"


def test_benchmark_says_when_its_measuring_process_was_ended(folder, call, monkeypatch):
    def submit(*_):
        job = concurrent.futures.Future()
        job.set_exception(BrokenProcessPool())
        return job

    monkeypatch.setattr(benchmark, "ProcessPoolExecutor", Inline)
    monkeypatch.setattr(Inline, "submit", submit)
    monkeypatch.setattr(benchmark, "QUICK", benchmark.Effort(1, 0, 2, 2, (64,)))
    process = call(benchmark, "--dataset", folder, "--quick", "--rows", "tokens")
    assert_refused(process, "measuring memory", "--rows")


def test_benchmark_lengthens_sequences_with_real_patches(vit):
    images = torch.rand(5, 3, 32, 32)
    whole = benchmark.mosaic(images, 1024)
    assert whole.shape == (1, 3, 128, 128)
    assert torch.equal(whole[0, :, 32:64, 64:96], images[6 % 5])
    assert benchmark.tokens_of(vit, whole).shape == (1, 1024, 128)


def test_benchmark_compares_the_same_function():
    """The yardstick computes what the timed model computes."""
    variants = benchmark.make_variants(torch.device("cpu"), ("this", "straightforward"))
    generator, outputs = torch.Generator().manual_seed(0), []
    tokens = torch.randn(2, 64, 128, generator=generator)
    for model in variants.values():
        torch.nn.init.eye_(model.blocks[0].attention.merge.weight)
        outputs.append(model.blocks[0].attention(tokens)[0])
    assert outputs[0].abs().max() > 0.01
    assert torch.allclose(*outputs, atol=1e-5)


# Image sources -------------------------------------------------------------------------------


def test_photos_hold_out_whole_photographs(photos):
    labels = [set(split.labels.tolist()) for split in (photos.train, photos.val, photos.test)]
    assert all(labels)
    assert not labels[0] & labels[1] | labels[0] & labels[2] | labels[1] & labels[2]
    assert len(photos.classes) == 6


def test_folder_with_classes_splits_and_kinds(folder):
    source = load_images(str(folder))
    assert (len(source.train), len(source.val), len(source.test)) == (16, 4, 6)
    assert source.classes == ["a", "b"]
    assert torch.equal(source.test.lossless, source.test.labels == 0)  # b is JPEG
    assert source.name == "folder images"


def test_folder_pixels_are_those_of_the_files(folder):
    source = load_images(str(folder))
    with Image.open(folder / "test" / "a" / "000.png") as image:
        assert np.array_equal(source.test.images[0].permute(1, 2, 0), np.asarray(image))


def test_split_depends_on_the_seed_alone(folder):
    first, again, other = (load_images(str(folder), seed=s) for s in (1, 1, 2))
    assert torch.equal(first.val.images, again.val.images)
    assert not torch.equal(first.val.images, other.val.images)


def test_large_images_are_cropped_and_their_crops_stay_together(tmp_path):
    for part in ("train", "test"):
        paths = write_images(tmp_path / part, 5, size=(100, 70))
    source = load_images(str(tmp_path))
    assert len(source.test) == 5 * 3 * 2
    assert (len(source.train), len(source.val)) == (4 * 6, 6)
    with Image.open(tmp_path / "test" / "000.png") as image:
        second = np.asarray(image)[:32, 32:64]
    assert np.array_equal(source.test.images[1].permute(1, 2, 0), second)
    held_out = {crop.tobytes() for crop in source.val.images.numpy()}
    of_files = [{crop.tobytes() for crop in crops_of(path)} for path in paths]
    assert held_out in of_files  # those of one file, and all of them


def crops_of(path):
    pixels = np.asarray(Image.open(path)).transpose(2, 0, 1)
    corners = [(y, x) for y in range(0, pixels.shape[1] - 31, 32) for x in range(0, 69, 32)]
    return [np.ascontiguousarray(pixels[:, y : y + 32, x : x + 32]) for y, x in corners]


def test_crops_of_a_huge_image_are_spread_over_it(tmp_path):
    rows = np.arange(640, dtype=np.uint16)[:, None, None] // 3
    image = Image.fromarray(np.broadcast_to(rows, (640, 640, 3)).astype(np.uint8))
    for part in ("train", "test"):
        (tmp_path / part).mkdir()
        for name in "ab":
            image.save(tmp_path / part / f"{name}.png")
    source = load_images(str(tmp_path))
    assert (len(source.train), len(source.val)) == (64, 64)  # one of two files is held out
    first = source.test.images[:64, 0, 0, 0].int()
    assert first[0] == 0 and first[-1] == 608 // 3 and (first.diff() >= 0).all()


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "CMYK", "1"])
def test_other_colour_modes_are_converted(tmp_path, mode):
    suffix = ".tif" if mode == "CMYK" else ".png"
    (path,) = write_images(tmp_path, 1, mode=mode, suffix=suffix)
    image, lossless = read_rgb(path)
    assert image.dtype == np.uint8 and lossless
    with Image.open(path) as stored:
        assert np.array_equal(image, np.asarray(stored.convert("RGB")))
    assert image.std() > 10


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_laid_over_white(tmp_path, mode):
    clear = Image.new(mode, (32, 32), {"RGBA": (10, 20, 30, 0), "LA": (10, 0), "P": 3}[mode])
    if mode == "P":
        clear.putpalette([10, 20, 30] * 4)
    clear.save(tmp_path / "clear.png", **({"transparency": 3} if mode == "P" else {}))
    assert (read_rgb(tmp_path / "clear.png")[0] == 255).all()


def test_sixteen_bits_keep_their_brightness(tmp_path):
    values = np.array([0, 200, 256 * 200, 257 * 77, 65534, 65535], dtype=np.uint16)
    deep = Image.fromarray(np.tile(values, (32, 6)))
    for suffix in ("png", "tif", "pgm"):
        deep.save(tmp_path / f"deep.{suffix}")
        image, _ = read_rgb(tmp_path / f"deep.{suffix}")
        assert image[0, :6, 0].tolist() == [0, 0, 199, 77, 254, 255], suffix
    ten_bits = (np.tile([0, 512, 1023], (32, 11))[:, :32]).astype(">u2")
    (tmp_path / "ten.pgm").write_bytes(b"P5 32 32 1023\n" + ten_bits.tobytes())
    assert read_rgb(tmp_path / "ten.pgm")[0][0, :3, 0].tolist() == [0, 127, 255]


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "CMYK", "I;16"])
def test_turned_photographs_are_turned_back(tmp_path, suffix, mode):
    if (suffix, mode) not in (
        *((s, "RGB") for s in ("jpg", "png", "webp")),
        *(("tif", m) for m in ("RGB", "L", "RGBA", "CMYK", "I;16")),
    ):
        pytest.skip("the format has no such mode")
    ramp = np.linspace(0, 255, 96 * 64).reshape(96, 64)
    if mode == "I;16":
        upright = Image.fromarray((257 * ramp).astype(np.uint16))
    else:
        upright = Image.fromarray(ramp.astype(np.uint8)).convert(mode)
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its left side
    upright.transpose(Image.Transpose.ROTATE_90).save(
        tmp_path / f"turned.{suffix}", exif=exif, **({"quality": 95} if suffix == "jpg" else {})
    )
    image, _ = read_rgb(tmp_path / f"turned.{suffix}")
    assert image.shape == (96, 64, 3)
    grey = image.astype(int).mean(2)
    assert np.abs(np.diff(grey.mean(1))).max() < 8 and abs(grey[-1].mean() - grey[0].mean()) > 200


@pytest.mark.parametrize(
    "layout", [{"photometric": "miniswhite"}, {"photometric": "rgb", "planarconfig": "separate"}]
)
def test_tiffs_of_which_other_values_would_be_read_are_refused(tmp_path, layout):
    shape = (3, 32, 32) if "planarconfig" in layout else (32, 32)
    tifffile.imwrite(tmp_path / "odd.tif", np.full(shape, 9000, dtype=np.uint16), **layout)
    with pytest.raises(ValueError, match="16 bits"):
        read_rgb(tmp_path / "odd.tif")


def test_the_decoder_tells_whether_a_file_is_lossless(tmp_path):
    (path,) = write_images(tmp_path, 1)
    image = Image.open(path)
    for name, options, lossless in (
        ("a.JPG", {"format": "JPEG"}, False),
        ("jpeg_inside.png", {"format": "JPEG"}, False),
        ("jpeg_inside.tif", {"compression": "jpeg"}, False),
        ("packed.tif", {"compression": "tiff_lzw"}, True),
        ("a.webp", {"lossless": True}, True),
        ("b.webp", {}, False),
        ("a.jp2", {}, False),
        ("a.bmp", {}, True),
    ):
        image.save(tmp_path / name, **options)
        assert read_rgb(tmp_path / name)[1] == lossless, name


def test_no_part_of_a_folder_is_left_out_in_silence(folder, tmp_path, capsys):
    write_images(tmp_path / "elsewhere", 3)
    (folder / "test" / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "test" / "linked" / "round").symlink_to(folder / "test")
    (folder / "test" / "a" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    write_images(folder / "test" / ".ipynb_checkpoints", 2)
    source = load_images(str(folder))
    assert source.classes == ["a", "b", "linked"]
    assert len(source.test) == 6 + 3
    assert "gone.png" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_values_of_unknown_range_are_not_guessed(tmp_path, kind):
    Image.fromarray(np.full((32, 32), 100, dtype=kind)).save(tmp_path / "raw.tif")
    with pytest.raises(ValueError, match="range"):
        read_rgb(tmp_path / "raw.tif")


def test_unusable_files_are_named_and_skipped(folder, capsys):
    (folder / "train" / "a" / "notes.txt").write_text("not an image")
    (folder / "train" / "a" / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    write_images(folder / "train" / "small", 1, size=(31, 40))
    source = load_images(str(folder))
    assert len(source.train) + len(source.val) == 20
    warning = capsys.readouterr().err
    assert "skipped 3 of 23" in warning
    for words in ("notes.txt (no image of", "cut.png (", "31×40 pixels"):
        assert words in warning


@pytest.mark.parametrize("name", ["program.png", "bomb.png", "exif.png", "line\nbreak.png"])
def test_one_bad_file_does_not_end_a_run(folder, call, monkeypatch, name):
    path = folder / "train" / "a" / name
    if name == "program.png":
        started = "PIL.EpsImagePlugin.Ghostscript"
        monkeypatch.setattr(started, lambda *_, **__: pytest.fail("starts Ghostscript"))
        path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n")
    elif name == "bomb.png":
        header = b"\x00\x00\x00\rIHDR" + struct.pack(">IIBBBBB", 10**5, 10**5, 8, 2, 0, 0, 0)
        checksum = struct.pack(">I", zlib.crc32(header[4:]))
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + checksum)
    elif name == "exif.png":
        Image.new("RGB", (32, 32)).save(path, exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff")
    else:
        path.write_text("no image")
    process = call(debug_test_data, "--dataset", folder)
    assert "Traceback" not in process.stderr and process.returncode in (0, 1)
    if name != "exif.png":
        assert process.stderr.count("\n") == 1 and "skipped 1 of 21" in process.stderr


def test_lossless_files_alone_validate(folder):
    source = load_images(str(folder), seed=4)
    assert not source.val.lossless.all()
    _, val_set, test_set = noisy_splits(source, 0.2, 0.5)
    assert len(val_set) == source.val.lossless.sum() > 0 and val_set.split.lossless.all()
    assert len(test_set) == len(source.test)


def fake_cifar10(folder, count):
    """Writes the files of CIFAR-10 with `count` random images each."""
    folder = folder / "cifar-10-batches-py"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        data = rng.integers(0, 256, (count, 3072), dtype=np.uint8)
        batch = {"data": data, "labels": [i % 10 for i in range(count)]}
        (folder / name).write_bytes(pickle.dumps(batch))
    names = {"label_names": [f"class{i}" for i in range(10)]}
    (folder / "batches.meta").write_bytes(pickle.dumps(names))
    return data


def test_cifar10_is_read_from_its_own_files(tmp_path, monkeypatch):
    """The files' layout, without their content: 4 / 1 split, channels first, right order."""
    test_data = fake_cifar10(tmp_path, 20)
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *_: True)
    source = load_images("cifar10", str(tmp_path))
    assert (len(source.train), len(source.val), len(source.test)) == (80, 20, 20)
    assert np.array_equal(source.test.images.flatten(1), test_data)
    assert source.test.labels.tolist() == [i % 10 for i in range(20)]
    assert source.name == "CIFAR-10"


# Bad input -----------------------------------------------------------------------------------


def test_no_network_names_the_alternatives(call, monkeypatch):
    def fail(*_, **__):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torchvision.datasets.cifar, "download_and_extract_archive", fail)
    assert_refused(call(experiment), "CIFAR-10", "no route", "--dataset photos", "FOLDER")
    assert not Path("best_denoising_model_proper.pt").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--noise-level", "-0.1"), "--noise-level: must be a number at least 0, got '-0.1'"),
        (("--noise-level", "nan"), "got 'nan'"),
        (("--epochs", "0"), "--epochs: must be a whole number at least 1, got '0'"),
        (("--epochs", "two"), "got 'two'"),
        (("--batch-size", "0"), "--batch-size"),
        (("--lr", "0"), "--lr: must be a number above 0, got '0'"),
        (("--lr", "inf"), "--lr"),
        (("--seed", "-1"), "--seed"),
        (("--seed", "99999999999"), "at most 2147483647"),
        (("--device", "tpu"), "--device"),
        (("--lossless-share", "1.5"), "at most 1, got '1.5'"),
        (("--dataset", "nowhere"), "nowhere: no such folder"),
        (("--output", "missing/model.pt"), "missing"),
        (("--resume",), "no interrupted run"),
        (("--lossless-share", "0.5"), "--lossless-share: photos does not mix"),
        (("--no-such-option",), "--no-such-option"),
        (("--output", ""), "--output: must name a file"),
        (("--output", "."), "--output: must name a file"),
        (("--output", "/"), "--output: must name a file"),
        (("--output", "x/"), "--output: must name a file"),
        (("--output", 300 * "x"), "cannot write"),
        (("--threads", "100000"), "--threads: must be at most 1024"),
        (("--noise-level", "1e300"), "--noise-level: must be at most 1000"),
    ],
)
def test_bad_options_are_refused(call, arguments, words):
    assert_refused(call(experiment, "--dataset", "photos", *arguments), words)
    assert not list(Path().iterdir())


def test_a_lossless_share_of_all_is_a_share(call, folder):
    options = ("--dataset", folder, "--seed", 4, "--lossless-share", 1, *SHORT)
    assert call(experiment, *options, "--output", "m.pt").returncode == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the device")
def test_a_missing_device_is_refused(call):
    process = call(experiment, "--dataset", "photos", "--device", "cuda")
    assert_refused(process, "--device cuda", "use cpu")


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (lambda f: [p.unlink() for p in (f / "train").rglob("*.*")], "holds 0 readable"),
        (lambda f: [p.write_text("x") for p in (f / "test").rglob("*.*")], "holds 0 readable"),
        (lambda f: (f / "test").rename(f / "exam"), "has no test/ folder"),
    ],
)
def test_a_folder_without_images_is_refused(folder, call, break_it, words):
    break_it(folder)
    process = call(experiment, "--dataset", folder)
    assert process.returncode == 2
    assert words in process.stderr.splitlines()[-1]
    assert "Traceback" not in process.stderr


def test_an_unwritable_folder_is_refused_before_the_work(call, monkeypatch):
    def refuse(*_, **__):  # root may write anywhere, so permissions cannot show it
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("experiment.run_files.tempfile.mkstemp", refuse)
    process = call(experiment, "--dataset", "photos")
    assert_refused(process, "cannot write", "Permission denied")


@pytest.mark.parametrize("script", [visualize_training_data, visualize_proper_results])
def test_an_unknown_kind_of_picture_is_refused_before_the_work(call, script):
    assert_refused(call(script, "--output", "picture.xyz"), "picture.xyz", ".png")


def test_devices_and_folders_are_no_output_files(call, tmp_path):
    for path in ("/dev/null", tmp_path):
        assert_refused(call(experiment, "--dataset", "photos", "--output", path), "name a file")
    assert Path("/dev/null").is_char_device()


def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("unexpected pos 64 vs 0")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(UserError, match="disk is full"):
        write_checkpoint({}, tmp_path / "m.pt")
    assert not list(tmp_path.iterdir())


class Attack:
    def __reduce__(self):
        return os.mkdir, ("attacked",)


@pytest.mark.parametrize("script", [visualize_proper_results, debug_evaluation, compare_baselines])
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda good: None, "no such checkpoint"),
        (
            lambda good: Path("bad.pt").write_bytes(good[: len(good) // 2]),
            "is damaged, of another kind",
        ),
        (lambda good: Path("bad.pt").write_bytes(b""), "is damaged, of another kind"),
        (lambda good: Path("bad.pt").write_text("hello"), "is damaged, of another kind"),
        (lambda good: torch.save({"model": Attack()}, "bad.pt"), "is damaged, of another kind"),
        (lambda good: torch.save({"model": {}}, "bad.pt"), "does not hold"),
        (lambda good: torch.save([1, 2], "bad.pt"), "cannot be list"),
    ],
    ids=["missing", "truncated", "empty", "text", "attack", "incomplete", "list"],
)
def test_bad_checkpoints_are_refused(trained, call, script, make, words):
    make((trained.path / "model.pt").read_bytes())
    assert_refused(call(script, "--checkpoint", "bad.pt"), "bad.pt", words)
    assert not Path("attacked").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"recipe": None}, "recipe cannot be NoneType"),
        ({"recipe": {}}, "does not hold recipe.dataset"),
        ({"recipe.seed": "42"}, "recipe.seed cannot be '42'"),
        ({"recipe.seed": 2**70}, "recipe.seed cannot be"),
        ({"recipe.noise_level": []}, "recipe.noise_level"),
        ({"recipe.noise_level": [0.1, 0.2, 0.3]}, "recipe.noise_level"),
        ({"recipe.noise_level": float("nan")}, "recipe.noise_level cannot be nan"),
        ({"recipe.noise_level": -0.1}, "recipe.noise_level cannot be -0.1"),
        ({"recipe.epochs": 1.5}, "recipe.epochs cannot be 1.5"),
        ({"recipe.dataset": "photos\x1b[31m"}, "photos\\x1b[31m"),
        ({"val_mse": float("inf")}, "val_mse cannot be inf"),
        ({"test": {}}, "does not hold test."),
        ({"test.psnr_mean": "25"}, "test.psnr_mean cannot be '25'"),
        ({"config.k_attend": (32.0, 64, 128)}, "another architecture"),
        ({"config.k_attend": ()}, "another architecture"),
        ({"config.k_attend": {32: 1, 64: 2, 128: 3}}, "is damaged"),
        ({"recipe.epochs": torch.tensor(1)}, "is damaged"),
        ({"config.num_heads": 4.0}, "another architecture"),
        ({"config.num_layers": 0}, "another architecture"),
        ({"config.num_layers": 10**9}, "another architecture"),
        ({"config.d_model": 10**7}, "another architecture"),
        ({"config.image_size": 8000}, "another architecture"),
        ({"config.patch_size": 5}, "another architecture"),
        ({"model.position": torch.full((1, 64, 64), float("nan"))}, "model cannot be dict"),
        ({"model.position": torch.zeros(1, 64, 63)}, "another architecture"),
        ({"model.position": torch.zeros(1, 64, 64, dtype=torch.float64)}, "model cannot be dict"),
    ],
    ids=str,
)
def test_wrong_contents_of_a_checkpoint_are_named(trained, call, change, words):
    ((name, value),) = change.items()
    forged = {k: dict(v) if isinstance(v, dict) else v for k, v in trained.checkpoint.items()}
    if "." in name:
        outer, inner = name.split(".", 1)
        forged[outer][inner] = value
    else:
        forged[name] = value
    torch.save(forged, "forged.pt")
    process = call(debug_evaluation, "--checkpoint", "forged.pt", "--dataset", "photos")
    assert process.returncode == 2 and "Traceback" not in process.stderr
    assert words in process.stderr and "\x1b" not in process.stderr + process.stdout


def test_damage_inside_a_checkpoint_is_seen(trained, call):
    """torch ignores the checksums of the archive."""
    data = bytearray((trained.path / "model.pt").read_bytes())
    data[len(data) // 2] ^= 4
    Path("flipped.pt").write_bytes(data)
    assert_refused(call(debug_evaluation, "--checkpoint", "flipped.pt"), "is damaged")


def test_a_packed_checkpoint_is_not_unpacked(trained, call):
    """A few kilobytes could become gigabytes."""
    with (
        zipfile.ZipFile(trained.path / "model.pt") as good,
        zipfile.ZipFile("packed.pt", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for member in good.infolist():
            packed.writestr(member.filename, good.read(member))
    assert_refused(call(debug_evaluation, "--checkpoint", "packed.pt"), "is damaged")


def test_random_damage_ends_in_a_sentence(trained, tmp_path):
    """300 checkpoints and 300 images, each cut, overwritten or with a few bits turned."""
    rng = np.random.default_rng(0)

    def damaged(data):
        data = bytearray(data)
        for _ in range(rng.integers(1, 4)):
            place = int(rng.integers(len(data)))
            kind = rng.integers(3)
            if kind == 0:
                data[place] ^= 1 << int(rng.integers(8))
            elif kind == 1:
                data[place : place + 16] = rng.bytes(16)
            else:
                del data[place : place + int(rng.integers(1, 2000))]
        return bytes(data) or b"x"

    small = {**trained.checkpoint, "model": {"position": torch.zeros(1, 64, 2)}}
    torch.save(small, tmp_path / "small.pt")
    good, read = (tmp_path / "small.pt").read_bytes(), 0
    for _ in range(300):
        (tmp_path / "bad.pt").write_bytes(damaged(good))
        try:
            read += read_checkpoint(tmp_path / "bad.pt") is not None
        except UserError as error:
            assert "bad.pt" in str(error)
    assert read < 150  # what only touched padding
    suffixes = ("png", "jpg", "webp", "tif", "bmp", "gif", "ppm", "jp2", "avif", "mpo")
    (path,) = write_images(tmp_path / "test", 1, size=(48, 40))
    (tmp_path / "train").mkdir()
    for index in range(300):
        suffix = suffixes[index % len(suffixes)]
        target = tmp_path / "train" / f"{index}.{suffix}"
        Image.open(path).save(target)
        target.write_bytes(damaged(target.read_bytes()))
    source = load_images(str(tmp_path))
    assert len(source.train) + len(source.val) < 300


@pytest.mark.parametrize("change", [{"d_model": 128}, {"num_layers": 3}, {"colour": "red"}])
def test_another_architecture_is_refused(trained, call, change):
    other = {**trained.checkpoint, "config": {**trained.checkpoint["config"], **change}}
    torch.save(other, "other.pt")
    process = call(visualize_proper_results, "--checkpoint", "other.pt", "--dataset", "photos")
    assert_refused(process, "another architecture")


def test_debug_evaluation_refuses_other_images(trained, call, folder):
    process = call(debug_evaluation, "--checkpoint", trained.path / "model.pt", "--dataset", folder)
    assert process.returncode == 2
    assert "trained and tested on other images than these, photos" in process.stderr


def test_a_loss_that_is_not_finite_stops_the_run(call, folder):
    options = ("--dataset", folder, "--batch-size", 4, "--epochs", 2, "--lr", 1e30)
    process = call(experiment, *options, "--output", "m.pt")
    assert_refused(process, "not finite in epoch 1", "no epoch is kept", "smaller --lr")
    assert not Path("m.pt").exists()


def test_a_validation_loss_that_is_not_finite_stops_the_run(call, folder):
    """One step an epoch: only the validation sees what the step did."""
    options = ("--dataset", folder, "--batch-size", 64, "--epochs", 2, "--lr", 1e30)
    process = call(experiment, *options, "--output", "m.pt")
    assert_refused(process, "not finite in epoch 1", "no epoch is kept")
    assert not list(Path().glob("*.pt"))


def test_a_late_loss_that_is_not_finite_keeps_the_last_good_model(call, folder, monkeypatch):
    original = experiment.F.mse_loss
    steps = []

    def poisoned(restored, clean, **options):
        steps.append(restored.requires_grad)
        return original(restored, clean, **options) * (float("nan") if sum(steps) > 6 else 1)

    monkeypatch.setattr(experiment.F, "mse_loss", poisoned)
    options = ("--dataset", folder, "--batch-size", 4, "--epochs", 3)  # 4 steps an epoch
    process = call(experiment, *options, "--output", "m.pt")
    assert_refused(process, "not finite in epoch 2", "m.pt keeps epoch 1")
    assert all(p.isfinite().all() for p in load_model("m.pt").parameters())


def test_no_noise_is_no_obstacle(call, folder):
    options = ("--dataset", folder, "--noise-level", 0)
    process = call(experiment, *options, *SHORT, "--recipe", "refined", "--output", "m.pt")
    assert process.returncode == 0, process.stderr
    assert call(debug_evaluation, "--checkpoint", "m.pt").returncode == 0
    for script in (visualize_proper_results, compare_baselines):
        process = call(script, "--checkpoint", "m.pt", *options)
        assert process.returncode == 0, process.stderr
        assert "nan" not in process.stdout and "inf ± 0.00" in process.stdout
    assert_refused(call(ablation_study, *options), "--noise-level", "no noise")
    assert call(visualize_training_data, *options).returncode == 0
    process = call(visualize_training_data, "--dataset", folder, "--noise-level", 1e-30)
    assert_refused(process, "must be 0 or at least")


def test_a_lost_stdout_costs_nothing(tmp_path, folder):
    """As with `| head -1`, in another folder than the script's."""
    command = (
        f"set -o pipefail; '{sys.executable}' '{ROOT / 'denoising_experiment_proper.py'}' "
        f"--dataset '{folder}' --epochs 2 --batch-size 8 --output a.pt | head -c 1"
    )
    process = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=1200
    )
    assert process.returncode == 0 and "Error" not in process.stderr, process.stderr
    assert torch.load(tmp_path / "a.pt", weights_only=True)["test"]["images"] == 6
    assert len(read_csv(tmp_path / "a_history.csv")) == 2


@pytest.mark.parametrize("stream", [None, "closed", "/dev/full"])
def test_a_missing_stream_costs_nothing(monkeypatch, stream, tmp_path):
    if stream == "closed":
        stream = open(tmp_path / "log", "w")  # noqa: SIM115
        stream.close()
    elif stream:
        stream = open(stream, "w", buffering=1)  # noqa: SIM115
    monkeypatch.setattr(sys, "stdout", stream)
    with pytest.raises(SystemExit) as ended:
        run_main(lambda: [print("σ", flush=True) for _ in range(3)] and 0)
    assert ended.value.code == 0
    if stream:
        stream.close()


def test_any_name_is_no_obstacle(folder, tmp_path):
    """A formula, a σ and a byte that is no UTF-8, where the system's encoding is ASCII."""
    odd = tmp_path / "cost $1^{2$ σ"
    folder.rename(odd)
    os.rename(os.fsencode(odd / "test" / "a"), os.fsencode(odd / "test") + b"/caf\xe9")
    runs = (
        ("denoising_experiment_proper", "--dataset", "ODD", "--output", "m.pt", *SHORT),
        ("visualize_proper_results", "--checkpoint", "m.pt"),
        *[("ablation_study", "--dataset", "ODD", "--variants", "published", "--seeds", 0, *SHORT)],
    )
    code = (
        "import importlib, json, os, sys\n"
        "(odd,) = [name for name in os.listdir() if name.startswith('cost')]\n"
        "for name, *arguments in json.loads(sys.argv[1]):\n"
        "    sys.argv = [name, *(odd if a == 'ODD' else a for a in arguments)]\n"
        "    script = importlib.import_module(name)\n"
        "    try: script.run_main(script.main)\n"
        "    except SystemExit as ended: assert ended.code == 0"
    )
    process = subprocess.run(
        [sys.executable, "-c", code, json.dumps([[*map(str, run)] for run in runs])],
        cwd=tmp_path,
        env={
            **os.environ,
            **{"PYTHONPATH": str(ROOT), "LC_ALL": "C", "PYTHONUTF8": "0"},
            **{"PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"},
        },
        capture_output=True,
        timeout=1200,
    )
    assert process.returncode == 0, process.stderr
    assert b"\\u03c3 = 0.2" in process.stdout
    assert "cost $1" in (tmp_path / "ablation_study.md").read_text(encoding="utf-8")


def test_scripts_survive_streams_of_a_notebook(call, monkeypatch):
    class Stream(io.StringIO):
        pass

    monkeypatch.setattr(sys, "stdout", Stream())
    with pytest.raises(SystemExit) as ended:
        run_main(lambda: print("σ"))
    assert ended.value.code is None and not hasattr(Stream, "reconfigure")


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("[enforce fail] allocate memory")])
def test_too_little_memory_is_one_sentence(call, monkeypatch, error):
    def exhausted(*_):
        raise error

    monkeypatch.setattr(debug_test_data, "load_images", exhausted)
    assert_refused(call(debug_test_data, "--dataset", "photos"), "not enough memory")


# What the user had ---------------------------------------------------------------------------


def test_an_earlier_run_is_kept_under_another_name(call, folder):
    Path("m.pt").write_text("precious")
    for number in (1, 2):
        process = call(experiment, "--dataset", folder, *SHORT, "--output", "m.pt")
        assert process.returncode == 0, process.stderr
        assert f"m.{number}.pt" in process.stdout
    assert Path("m.1.pt").read_text() == "precious"
    load_model("m.2.pt")
    load_model("m.pt")


def test_two_runs_do_not_write_the_same_files(call, folder, tmp_path):
    (tmp_path / "link.pt").symlink_to(tmp_path / "m.pt")
    (tmp_path / ".m.pt.incomplete-x.pt").write_text("left by a run that was killed")
    with locked([Path("link.pt")]):
        assert not list(tmp_path.glob(".m.pt.incomplete-x*"))
        process = call(experiment, "--dataset", folder, *SHORT, "--output", "m.pt")
        assert_refused(process, "another run is writing", "m.pt", "--output")
    with locked(RunFiles(Path("m")).all):  # another name, but the same history
        process = call(experiment, "--dataset", folder, *SHORT, "--output", "m.pt")
        assert_refused(process, "another run is writing", "m_history.csv")
    with locked([Path("s.json")]):
        assert_refused(call(ablation_study, "--output", "s.json"), "another run is writing")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["images", "link.pt"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of a fork where there are threads
def test_a_lock_dies_with_its_process(tmp_path):
    child = os.fork()
    if not child:
        with locked([tmp_path / "m.pt"]):
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    with locked([tmp_path / "m.pt"]):
        pass
    assert not list(tmp_path.iterdir())


def test_resuming_overwrites_no_file_of_another_run(call, folder):
    arguments = ("--dataset", folder, "--epochs", 2, "--output", "m.pt")
    with interrupted_in_epoch(2):
        assert call(experiment, *arguments).returncode == 130
    Path("m_history.csv").write_text("precious")
    process = call(experiment, *arguments, "--resume")
    assert process.returncode == 0, process.stderr
    assert Path("m.1_history.csv").read_text() == "precious"
    assert len(Path("m_history.csv").read_text().splitlines()) == 3


def test_a_linked_output_is_written_where_it_leads(call, folder, tmp_path):
    (tmp_path / "disk").mkdir()
    Path("m.pt").symlink_to(tmp_path / "disk" / "real.pt")
    for _ in range(2):
        assert call(experiment, "--dataset", folder, *SHORT, "--output", "m.pt").returncode == 0
    assert Path("m.pt").is_symlink()
    assert {"real.pt", "real.1.pt"} <= {path.name for path in (tmp_path / "disk").iterdir()}


def test_a_lock_removes_its_own_files_alone(tmp_path):
    others = [".m.pt.lock", ".m_x.png.incomplete-1.png", ".m.incomplete-1.pt"]
    for name in others:
        (tmp_path / name).write_text("of somebody else")
    (tmp_path / ".m.pt.incomplete-folder").mkdir()
    (tmp_path / ".m.pt.incomplete-1.pt").write_text("left by a run that was killed")
    with locked([tmp_path / "m.pt"]):
        pass
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {*others, ".m.pt.incomplete-folder"}
    assert (tmp_path / others[0]).read_text() == "of somebody else"
    with pytest.raises(UserError, match="create it"), locked([tmp_path / "no" / "m.pt"]):
        pass
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("script", [visualize_proper_results, ablation_study])
@pytest.mark.parametrize("config", [{"image_size": 64}, {"patch_size": 16}, {"image_size": 16}])
def test_models_of_other_sizes_are_shown(call, folder, trained, config, script, monkeypatch):
    changed = replace(MODELS["published"], **config)
    contents = {"model": SmallViT(changed).state_dict(), "config": asdict(changed)}
    write_checkpoint(trained.checkpoint | contents, "m.pt")
    process = call(script, "--checkpoint", "m.pt", "--dataset", folder)
    assert process.returncode == 0, process.stderr


def test_names_too_long_are_one_sentence(call, trained):
    name = 300 * "n"
    assert_refused(call(debug_evaluation, "--checkpoint", name), "no such checkpoint")
    assert_refused(call(debug_test_data, "--dataset", name), "no such folder")
    assert_refused(call(experiment, "--dataset", "photos", "--output", name), "cannot write")
    assert_refused(call(ablation_study, "--output", f"{name}.json"), "cannot write")
    write_checkpoint(trained.checkpoint | {"dataset": name}, "m.pt")
    assert_refused(call(debug_evaluation, "--checkpoint", "m.pt"), "is not at")


@pytest.mark.parametrize(
    "text",
    [
        100_000 * "[",
        '{"recipe": {}, "rows": [{"variant": "published", "seed": [0]}]}',
        '{"recipe": {}, "rows": [{"variant": "published", "parameters": 1e400}]}',
        '{"recipe": {}, "rows": 3}',
        "[]",
    ],
)
def test_other_json_files_are_no_study(call, folder, text):
    Path("s.json").write_text(text)
    process = call(ablation_study, "--dataset", folder, "--output", "s.json")
    assert_refused(process, "s.json", "no result of this script")
    assert Path("s.json").read_text() == text


def test_a_run_that_comes_to_nothing_moves_nothing(call, folder):
    Path("m.pt").write_text("precious")
    process = call(experiment, "--dataset", folder, "--lr", 1e30, *SHORT, "--output", "m.pt")
    assert_refused(process, "not finite")
    assert [p.name for p in Path().glob("m*")] == ["m.pt"]
    assert Path("m.pt").read_text() == "precious"


def test_a_model_of_a_folder_is_tested_there_and_says_when_it_has_gone(call, folder):
    assert call(experiment, "--dataset", folder, *SHORT, "--output", "m.pt").returncode == 0
    for script in (visualize_proper_results, debug_evaluation):
        process = call(script, "--checkpoint", "m.pt")
        assert process.returncode == 0 and "folder images" in process.stdout.splitlines()[-1]
    folder.rename(folder.with_name("moved"))
    for script in (visualize_proper_results, debug_evaluation):
        process = call(script, "--checkpoint", "m.pt")
        assert process.returncode == 2
        assert f"not at {folder} any more" in process.stderr and "--dataset" in process.stderr


def test_links_are_followed(tmp_path):
    (tmp_path / "target.txt").write_text("old")
    (tmp_path / "link.txt").symlink_to(tmp_path / "target.txt")
    with replace_when_complete(tmp_path / "link.txt") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "link.txt").is_symlink()
    assert (tmp_path / "target.txt").read_text() == "new"


def test_files_of_runs_with_dots_in_their_names_stay_apart():
    one, other = (set(RunFiles(Path(f"sigma0.{i}")).all) for i in (1, 2))
    assert not one & other


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), replace_when_complete(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "script",
    [
        "denoising_experiment_proper",
        "visualize_proper_results",
        "visualize_training_data",
        "debug_evaluation",
        "debug_test_data",
        "compare_baselines",
        "ablation_study",
        "benchmark",
    ],
)
def test_help_explains_every_option(call, script):
    process = call(sys.modules[script], "--help")
    assert process.returncode == 0
    assert "\nexample: python " in process.stdout
    options = re.split(r"\n  (?=-)", process.stdout)[2:]  # the first is --help itself
    assert options
    for option in options:
        described = " ".join(option.split())
        assert len(described) > 30, option
        assert "default" in described, option


def test_method_imports_torch_alone():
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['torchvision', 'skimage', 'matplotlib']));"
        "import adaptive_attention_moe as m; print(m.AdaptiveAttentionMoE.__name__)"
    )
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=1200
    )
    assert process.stdout.strip() == "AdaptiveAttentionMoE", process.stderr
