"""Layer 5, the scripts that look at a trained model, at the images and at classical methods."""

import re
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from PIL import Image

import ablation_study
import compare_baselines
import debug_evaluation
import debug_test_data
import denoising_experiment_proper as experiment
import visualize_proper_results
import visualize_training_data
from conftest import SHORT, read_csv
from experiment.checkpoints import write_checkpoint
from experiment.noisy_images import NoisyImageDataset
from small_vit import MODELS, SmallViT

# Pictures ------------------------------------------------------------------------------------


def test_visualization_shows_and_tells_the_whole_test_set(trained, call, monkeypatch):
    monkeypatch.setattr("experiment.evaluation.NOISE_LEVELS", (0.1, 0.2))
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
    assert [float(level) for level, *_ in rows] == [0.1, 0.2]
    assert float(rows[1][2]) == pytest.approx(test["psnr_mean"], abs=0.006)
    assert float(rows[0][1]) > float(rows[1][1]) + 4  # half the noise


def test_drawn_images_go_from_worst_to_best():
    values = np.random.default_rng(0).permutation(1000)
    ranks = [values[i] for i in visualize_proper_results.rank_images(values)]
    assert ranks == sorted(ranks)
    assert ranks[0] < 100
    assert ranks[-1] >= 900


@pytest.mark.usefixtures("small_picture")
@pytest.mark.parametrize("script", [visualize_proper_results, ablation_study])
@pytest.mark.parametrize("config", [{"image_size": 64}, {"patch_size": 16}, {"image_size": 16}])
def test_models_of_other_sizes_are_shown(call, folder, trained, config, script):
    changed = replace(MODELS["published"], **config)
    contents = {"model": SmallViT(changed).state_dict(), "config": asdict(changed)}
    write_checkpoint(trained.checkpoint | contents, "m.pt")
    process = call(script, "--checkpoint", "m.pt", "--dataset", folder)
    assert process.returncode == 0, process.stderr


# Training data -------------------------------------------------------------------------------


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
    monkeypatch.setattr(visualize_training_data, "write_figure", lambda *_: None)
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


# Checks --------------------------------------------------------------------------------------


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


def test_debug_evaluation_refuses_other_images(trained, call, folder):
    process = call(debug_evaluation, "--checkpoint", trained.path / "model.pt", "--dataset", folder)
    assert process.returncode == 2
    assert "trained and tested on other images than these, photos" in process.stderr


@pytest.mark.usefixtures("small_picture")
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


# Baselines -----------------------------------------------------------------------------------


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
