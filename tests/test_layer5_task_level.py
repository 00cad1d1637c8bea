"""Layer 5: the experiment as a user runs it, on real photographs, and what it refuses."""

import csv
import json
import os
import pickle
import re
import subprocess
import sys
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import ablation_study
import benchmark
import compare_baselines
import debug_evaluation
import debug_test_data
import denoising_experiment_proper as experiment
import visualize_proper_results
import visualize_training_data
from conftest import ROOT, assert_refused, run_script, write_images
from experiment.checkpoints import write_checkpoint
from experiment.evaluation import NOISE_LEVELS, evaluate, psnr, ssim
from experiment.image_sources import load_images, read_image
from experiment.noisy_images import NoisyImageDataset, noisy_splits
from experiment.run_files import RunFiles, replace_when_complete
from experiment.user_errors import UserError
from model_variants import VARIANTS
from small_vit import MODELS, load_model

SHORT = ("--epochs", 1, "--batch-size", 16)


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


# Training ------------------------------------------------------------------------------------


def test_training_lowers_the_loss(trained):
    history = read_csv(trained.path / "model_history.csv")
    assert [int(row["epoch"]) for row in history] == [1, 2]
    assert float(history[-1]["train_mse"]) < 0.5 * float(history[0]["train_mse"])
    assert float(history[-1]["val_mse"]) < 0.8 * float(history[0]["val_mse"])
    assert [float(row["lr"]) for row in history] == pytest.approx([4e-3, 2e-3])


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
    assert "599,689" in trained.output
    percentages = re.findall(r"experts, block \d +(.*) %", trained.output)
    assert len(percentages) == 2
    assert sum(map(float, percentages[0].split(" % / "))) == pytest.approx(100, abs=0.3)


def test_run_leaves_its_files_and_nothing_else(trained):
    names = {path.name for path in trained.path.iterdir()}
    assert names >= {"model.pt", "model_history.csv", "model_curve.png"}
    assert not any("resume" in name or name.startswith(".") for name in names)


def test_checkpoint_says_where_it_comes_from(trained):
    checkpoint = trained.checkpoint
    recipe = checkpoint["recipe"]
    assert recipe["dataset"] == "photos"
    assert (recipe["train_images"], recipe["val_images"]) == (1949, 152)
    assert (recipe["epochs"], recipe["batch_size"], recipe["lr"]) == (2, 16, 4e-3)
    assert (recipe["seed"], recipe["noise_level"]) == (42, [0.2, 0.2])
    history = read_csv(trained.path / "model_history.csv")
    best = min(history, key=lambda row: float(row["val_mse"]))
    assert checkpoint["epoch"] == int(best["epoch"])
    assert checkpoint["val_mse"] == pytest.approx(float(best["val_mse"]))
    assert checkpoint["torch_version"] == torch.__version__


def test_load_model_gives_the_model_that_was_tested(trained, photos):
    model = load_model(trained.path / "model.pt")
    assert not model.training
    result = evaluate(model, noisy_splits(photos, 0.2)[2])
    assert result.psnr.mean() == pytest.approx(trained.checkpoint["test"]["psnr_mean"], abs=1e-3)


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("best_denoising_model_proper.pt", "published"),
        ("models/refined.pt", "refined"),
    ],
)
def test_shipped_checkpoints_are_the_models_of_the_options_and_denoise(photos, name, model):
    """On photographs that neither has seen; a model trained on their like has 23.8 dB."""
    shipped = load_model(ROOT / name)
    assert shipped.config == MODELS[model]
    assert evaluate(shipped, noisy_splits(photos, 0.2)[2]).psnr.mean() > 26


def test_metrics_are_those_of_the_definitions(photos):
    """PSNR = 10 log10(1 / MSE); SSIM is 1 for equal images only."""
    noisy, clean, _ = (t.numpy() for t in NoisyImageDataset(photos.test)[3])
    mse = ((noisy.astype(np.float64) - clean) ** 2).mean()
    assert psnr(noisy, clean) == pytest.approx(10 * np.log10(1 / mse), abs=1e-4)
    assert psnr(clean, clean) == np.inf
    assert ssim(clean, clean) == pytest.approx(1)
    assert ssim(noisy, clean) < 0.7


# The other scripts ---------------------------------------------------------------------------


def test_visualization_shows_and_tells_the_whole_test_set(trained, call):
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
    assert min(Image.open("denoising_visualization_proper.png").size) > 800
    rows = re.findall(r"^\| (0\.\d\d) \| ([\d.]+) \| ([\d.]+) \|", process.stdout, re.MULTILINE)
    assert [float(level) for level, *_ in rows] == list(NOISE_LEVELS)
    assert float(rows[3][2]) == pytest.approx(test["psnr_mean"], abs=0.006)
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
    assert min(Image.open("training_data_verification.png").size) > 800


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
def study(call, folder, monkeypatch):
    """Runs ablation_study.py with one step for each variant."""
    quick = {"epochs": 1, "seeds": [0], "train_images": 2, "test_images": 2}
    monkeypatch.setattr(ablation_study, "QUICK", quick)

    def run(*options):
        return call(ablation_study, "--dataset", folder, "--batch-size", 2, "--quick", *options)

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
    with Image.open("ablation_study.png") as picture:
        assert picture.size[0] > 500


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
    assert float(table["every expert keeps 1 keys"]) < float(table["as trained"])


def test_ablation_study_does_not_touch_other_files(study):
    Path("mine.json").write_text("[]")
    assert_refused(study("--output", "mine.json"), "mine.json", "--output")
    assert Path("mine.json").read_text() == "[]"
    assert_refused(study("--output", "mine.txt"), "mine.txt", ".json")


def test_benchmark_times_every_row_side_by_side(folder, call, monkeypatch):
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
        write_images(tmp_path / part, 5, size=(100, 70))
    source = load_images(str(tmp_path))
    assert len(source.test) == 5 * 3 * 2
    assert (len(source.train), len(source.val)) == (4 * 6, 6)
    with Image.open(tmp_path / "test" / "000.png") as image:
        second = np.asarray(image)[:32, 32:64]
    assert np.array_equal(source.test.images[1].permute(1, 2, 0), second)


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "CMYK", "1"])
def test_other_colour_modes_are_converted(tmp_path, mode):
    suffix = ".tif" if mode == "CMYK" else ".png"
    (path,) = write_images(tmp_path, 1, mode=mode, suffix=suffix)
    image = read_image(path)
    assert image.shape == (32, 32, 3)
    assert image.dtype == np.uint8


def test_transparency_is_laid_over_white(tmp_path):
    Image.new("RGBA", (32, 32), (10, 20, 30, 0)).save(tmp_path / "clear.png")
    assert (read_image(tmp_path / "clear.png") == 255).all()


def test_sixteen_bits_keep_their_brightness(tmp_path):
    Image.fromarray(np.full((32, 32), 257 * 77, dtype=np.uint16)).save(tmp_path / "deep.png")
    assert (read_image(tmp_path / "deep.png") == 77).all()


@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_values_of_unknown_range_are_not_guessed(tmp_path, kind):
    Image.fromarray(np.full((32, 32), 100, dtype=kind)).save(tmp_path / "raw.tif")
    with pytest.raises(ValueError, match="range"):
        read_image(tmp_path / "raw.tif")


def test_unusable_files_are_named_and_skipped(folder, capsys):
    (folder / "train" / "a" / "notes.txt").write_text("not an image")
    (folder / "train" / "a" / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    write_images(folder / "train" / "small", 1, size=(31, 40))
    source = load_images(str(folder))
    assert len(source.train) + len(source.val) == 20
    warning = capsys.readouterr().err
    assert "skipped 3 of 23" in warning
    for name in ("notes.txt", "cut.png", "31×40"):
        assert name in warning


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
    ],
)
def test_bad_options_are_refused(call, arguments, words):
    assert_refused(call(experiment, "--dataset", "photos", *arguments), words)
    assert not list(Path().iterdir())


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
        (lambda good: Path("bad.pt").write_bytes(good[: len(good) // 2]), "no complete checkpoint"),
        (lambda good: Path("bad.pt").write_bytes(b""), "no complete checkpoint"),
        (lambda good: Path("bad.pt").write_text("hello"), "no complete checkpoint"),
        (lambda good: torch.save({"model": Attack()}, "bad.pt"), "no complete checkpoint"),
        (lambda good: torch.save({"model": {}}, "bad.pt"), "does not hold"),
        (lambda good: torch.save([1, 2], "bad.pt"), "does not hold"),
    ],
    ids=["missing", "truncated", "empty", "text", "attack", "incomplete", "list"],
)
def test_bad_checkpoints_are_refused(trained, call, script, make, words):
    make((trained.path / "model.pt").read_bytes())
    assert_refused(call(script, "--checkpoint", "bad.pt"), "bad.pt", words)
    assert not Path("attacked").exists()


@pytest.mark.parametrize("change", [{"d_model": 64}, {"num_layers": 3}, {"colour": "red"}])
def test_another_architecture_is_refused(trained, call, change):
    other = {**trained.checkpoint, "config": {**trained.checkpoint["config"], **change}}
    torch.save(other, "other.pt")
    process = call(visualize_proper_results, "--checkpoint", "other.pt", "--dataset", "photos")
    assert_refused(process, "another architecture")


def test_debug_evaluation_refuses_other_images(trained, call, folder):
    process = call(debug_evaluation, "--checkpoint", trained.path / "model.pt", "--dataset", folder)
    assert process.returncode == 2
    assert "tested on photos, not on folder images" in process.stderr


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


def test_a_terminal_without_greek_is_no_obstacle(trained, tmp_path):
    arguments = ("--checkpoint", trained.path / "model.pt", "--dataset", "photos")
    process = run_script("debug_evaluation.py", *arguments, cwd=tmp_path, PYTHONIOENCODING="ascii")
    assert process.returncode == 0, process.stderr


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


def test_scripts_start_from_any_folder(tmp_path):
    process = run_script("visualize_proper_results.py", "--checkpoint", "none.pt", cwd=tmp_path)
    assert_refused(process, "none.pt: no such checkpoint")


def test_method_imports_torch_alone():
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['torchvision', 'skimage', 'matplotlib']));"
        "import adaptive_attention_moe as m; print(m.AdaptiveAttentionMoE.__name__)"
    )
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=1200
    )
    assert process.stdout.strip() == "AdaptiveAttentionMoE", process.stderr
