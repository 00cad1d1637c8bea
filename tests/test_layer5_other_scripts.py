"""Layer 5, the scripts that look at a trained model, at the images and at classical methods."""

import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import skimage.data
import torch
from matplotlib import pyplot as plt
from PIL import Image

import compare_baselines
import debug_evaluation
import debug_test_data
import denoising_experiment_proper as experiment
import visualize_proper_results
import visualize_training_data
from common.user_errors import UserError
from conftest import SHORT, assert_refused, read_csv, run_here
from experiment.checkpoints import write_checkpoint
from experiment.evaluation import psnr
from experiment.trained_model import images_for
from images.degradations import NOISE_MAPS, Draws, GaussianNoise
from images.image_sources import load_images
from images.noisy_images import NoisyImageDataset
from small_vit import MODELS, SmallViT, load_model

# Pictures ------------------------------------------------------------------------------------


def titles_of_pictures(script, monkeypatch):
    """A list that gets the titles of a script's picture and its axes, which stays unwritten."""
    titles = []

    def tell(figure, _):
        titles.extend([figure.get_suptitle(), *(axis.get_title() for axis in figure.axes)])
        plt.close(figure)

    monkeypatch.setattr(script, "write_figure", tell)
    return titles


def test_visualization_shows_and_tells_the_whole_test_set(trained, call, monkeypatch):
    monkeypatch.setattr("experiment.evaluation.NOISE_LEVELS", (0.1, 0.2))
    process = call(visualize_proper_results, "--checkpoint", trained.path / "model.pt")
    assert process.returncode == 0, process.stderr
    rows = read_csv("denoising_visualization_proper_images.csv")
    psnrs = np.array([float(row["psnr_db"]) for row in rows])
    test = trained.checkpoint["test"]
    ssims = [float(row["ssim"]) for row in rows]
    assert np.mean(ssims) == pytest.approx(test["ssim_mean"], abs=1e-5)
    assert len(psnrs) == 204
    assert psnrs.mean() == pytest.approx(test["psnr_mean"], abs=1e-3)
    assert process.stdout.splitlines()[-1].startswith(f"PSNR {test['psnr_mean']:.2f} ±")
    worst, best = np.sort(psnrs)[:20].mean(), np.sort(psnrs)[-20:].mean()
    assert re.search(rf"^PSNR .* {worst:.4g} +{best:.4g}$", process.stdout, re.MULTILINE)
    with Image.open("denoising_visualization_proper.png") as picture:
        assert min(picture.size) > 800
    rows = re.findall(r"^\| (0\.\d\d) \| ([\d.]+) \| ([\d.]+) \|", process.stdout, re.MULTILINE)
    assert [float(level) for level, *_ in rows] == [0.1, 0.2]
    assert float(rows[1][2]) == pytest.approx(test["psnr_mean"], abs=0.006)
    assert float(rows[0][1]) > float(rows[1][1]) + 4  # half the noise


def test_other_models_are_drawn_beside(trained, photos):
    """Each under its name with its own figures; what routers do is of the first, of any size."""
    test_set = NoisyImageDataset(photos.test[::40], stream=2)
    first = SmallViT(replace(MODELS["published"], image_size=64, patch_size=16))
    models = [("a/m.pt", first), ("b/m.pt", load_model(trained.path / "model.pt"))]
    figure = visualize_proper_results.draw_images(models, test_set, {0: 5, 1: 95}, "title")
    columns = figure.axes[:4]
    titles = [axis.get_title() for axis in columns]
    assert titles == ["noisy", "denoised:\na/m.pt", "denoised:\nb/m.pt", "ground truth"]
    noisy, clean, _ = test_set[0]
    for axis, (_, model) in zip(columns[1:3], models, strict=True):
        restored = model.denoise(noisy[None])[0]
        assert axis.get_xlabel().startswith(f"{psnr(restored.numpy(), clean.numpy()):.2f} dB")
        shown = axis.images[0].get_array()
        assert np.allclose(shown, restored.permute(1, 2, 0).numpy(), atol=1e-6)
    maps = [axis.images[0].get_array() for axis in figure.axes[4:10]]
    _, routings = first(noisy[None])
    expected = torch.cat([routing[0].T for routing in routings]).unflatten(1, (2, 2)).detach()
    assert np.allclose(maps, expected, atol=1e-6)
    plt.close(figure)


def test_drawn_images_go_from_worst_to_best():
    values = np.random.default_rng(0).permutation(1000)
    ranks = [values[i] for i in visualize_proper_results.rank_images(values, 6)]
    assert ranks == [50, 230, 410, 589, 769, 949]
    assert list(visualize_proper_results.rank_images([3.0, 1.0], 6)) == [1, 0]  # each image once


# Training data -------------------------------------------------------------------------------


@pytest.mark.parametrize("noise_map", NOISE_MAPS)
def test_training_data_script_accepts_every_map(call, monkeypatch, noise_map):
    titles = titles_of_pictures(visualize_training_data, monkeypatch)
    options = ("--noise-level", 0.05, 0.4, "--noise-map", noise_map)
    process = call(visualize_training_data, "--dataset", "photos", *options)
    assert process.returncode == 0, process.stdout
    assert titles[0].endswith(f", {GaussianNoise((0.05, 0.4), noise_map)}")
    assert ("σ" in titles) == (noise_map != "uniform")


STD, MEAN, EDGES = "std of the noise", "mean of the noise", {-0.002: "smallest", 0.002: "largest"}
OFF = [(1, 0, 0, ()), (0.97, 0, 0, (STD,)), (1.03, 0, 0, (STD,)), (1, 0, -0.01, ("largest σ",))]
OFF += [(1, shift, 0, (MEAN, f"{most} noisy value")) for shift, most in EDGES.items()]


@pytest.mark.parametrize("noise", [GaussianNoise(), GaussianNoise((0.05, 0.4), "regions")])
@pytest.mark.parametrize(("factor", "shift", "high", "off"), OFF)
def test_wrong_noise_is_noticed(photos, noise, factor, shift, high, off):
    generator, clean = torch.Generator().manual_seed(0), photos.train.images[:256].float() / 255
    normal = factor * torch.randn(clean.shape, generator=generator)
    uniform = torch.rand(len(clean), noise.numbers, generator=generator)
    noisy, sigma = noise(clean, Draws(normal, uniform))
    levels = noise.noise_level[0], noise.noise_level[1] + high
    checks = visualize_training_data.check_noise(
        noisy + shift, clean, sigma.expand_as(clean), levels
    )
    wrong = [name for name, x, expected, tolerance in checks if abs(x - expected) > tolerance]
    assert set(off) <= set(wrong) and (off or not wrong)


def test_training_data_script_notices_noise_of_another_level(call, monkeypatch):
    """Consistently of σ = 0.19 in place of the 0.2 that was asked for."""
    monkeypatch.setattr(
        "images.degradations.draw_sigma", lambda uniform, _: torch.full_like(uniform, 0.19)
    )
    process = call(visualize_training_data, "--dataset", "photos")
    assert process.returncode == 1
    assert "OFF" in process.stdout


@pytest.mark.parametrize("sigmas", [(0.3, 0.3, 0.3), (0.3, 0.1, 0.05)])
def test_theory_of_the_clamped_noise(sigmas):
    """Against a simulation, for a dark, a middle and a bright value."""
    share = torch.zeros(256, dtype=torch.float64)
    share[[0, 100, 240]] = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    value = torch.multinomial(share, 10**6, True, generator=generator)
    clean, sigma = value.float() / 255, torch.tensor(sigmas)[value // 100]
    noise = sigma.double() * torch.randn(10**6, generator=generator, dtype=torch.float64)
    difference = (clean + noise).clamp(0, 1) - clean
    edges = torch.linspace(-1, 1, 42, dtype=torch.float64)
    pairs = visualize_training_data.joint_frequency(clean, sigma)
    mean, std = visualize_training_data.clipped_noise(*pairs)
    assert mean == pytest.approx(difference.mean().item(), abs=1e-3)
    assert std == pytest.approx(difference.std().item(), abs=1e-3)
    for theory, x in zip(
        visualize_training_data.histograms(*pairs, edges), (difference, noise), strict=True
    ):
        assert torch.allclose(theory, torch.histogram(x, edges).hist / 10**6, atol=2e-3)


# Checks --------------------------------------------------------------------------------------


def test_debug_evaluation_reproduces_all_but_a_wrong_figure(trained, call):
    forged = {**trained.checkpoint, "test": {**trained.checkpoint["test"], "psnr_mean": 31.0}}
    write_checkpoint(forged, "forged.pt")
    process = call(debug_evaluation, "--checkpoint", "forged.pt")
    assert process.returncode == 1
    assert re.search(r"psnr_mean +31 .*DISAGREES", process.stdout)
    assert re.search(r"^1 of \d\d figures disagree", process.stdout, re.MULTILINE)


@pytest.mark.usefixtures("small_picture")
def test_a_model_of_a_folder_is_tested_there_and_says_when_it_has_gone(call, folder):
    assert call(experiment, "--dataset", folder, *SHORT, "--output", "m.pt").returncode == 0
    for script in (visualize_proper_results, debug_evaluation):
        process = call(script, "--checkpoint", "m.pt")
        assert process.returncode == 0 and "folder images" in process.stdout.splitlines()[-1]
    rows = read_csv("denoising_visualization_proper_images.csv")
    names = sorted(map(str, (folder / "test").rglob("*.*")))
    assert [row["file"] for row in rows] == names
    folder.rename(folder.with_name("moved"))
    for same_images in (False, True):
        with pytest.raises(UserError, match=f"not at {folder} any more; .* --dataset"):
            images_for(load_model("m.pt").trained, same_images=same_images)


def test_debug_test_data_finds_nothing_in_photos(call):
    process = call(debug_test_data, "--dataset", "photos")
    assert process.returncode == 0, process.stdout
    assert "nothing looks wrong" in process.stdout


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--noise-level", 0.01, 0.3, "--unclipped"), "σ = 0.01 to 0.3 (unclipped)"),
        (("--noise-level", 0.1, "--jpeg-share", 0.5), "σ = 0.1 (50 % JPEG)"),
        (("--task", "inpaint"), "holes of 10 to 40 %"),
    ],
)
def test_debug_test_data_looks_at_what_models_of_photographs_learn(call, options, told):
    process = call(debug_test_data, "--dataset", "photos", "--crop", 96, *options)
    assert process.returncode == 0, process.stdout + process.stderr
    assert f"classes, {told}\n" in process.stdout and "nothing looks wrong" in process.stdout
    assert "train: 3 images, crops (3, 96, 96)" in process.stdout
    low, high = re.search(r"degraded batch +(\S+) … (\S+),", process.stdout).groups()
    assert (float(low) < -0.3 and float(high) > 1.3) == ("unclipped" in told)


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


def test_debug_test_data_notices_leaked_photographs(call):
    for name in ("train/a.png", "train/b.png", "test/a.png"):
        Path("d", name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(skimage.data.chelsea()[:80, ord(name[-5]) :][:, :100]).save(f"d/{name}")
    process = call(debug_test_data, "--dataset", "d", "--crop", 32)
    assert process.returncode == 1
    assert re.search("WRONG: 1 test image in (train|val) as well, byte", process.stdout)
    assert process.stdout.endswith("\n1 problem\n")


@pytest.mark.parametrize("part", ["train", "val"])
def test_debug_test_data_notices_leaked_images(folder, call, part):
    leaked = getattr(load_images(str(folder)), part).images[0].permute(1, 2, 0).numpy()
    Image.fromarray(leaked).save(folder / "test" / "leak.png")
    process = call(debug_test_data, "--dataset", folder)
    assert process.returncode == 1
    words = r"(\d+) test image in (\w+) as well, byte for byte"
    assert re.findall(words, process.stdout) == [("1", part)]


def test_debug_test_data_notices_black_images(folder, call):
    for path in (folder / "train").rglob("*.*"):
        Image.new("RGB", (32, 32)).save(path)
    process = call(debug_test_data, "--dataset", folder)
    assert process.returncode == 1
    assert "all black" in process.stdout and "of 16 images of a single value" in process.stdout


# Noise that differs over an image ------------------------------------------------------------

REGIONS = ("--noise-level", 0.05, 0.4, "--noise-map", "regions")


@pytest.fixture(scope="module")
def of_regions(tmp_path_factory):
    """The checkpoint of two steps with noise of a higher σ in a rectangle."""
    output = tmp_path_factory.mktemp("of_regions") / "model.pt"
    options = ("--recipe", "quick", "--steps", 2, *REGIONS, "--output", output)
    process = run_here(experiment, "--dataset", "photos", *options)
    assert process.returncode == 0, process.stderr
    assert re.search(r"noise +σ = 0.05 to 0.4 \(regions\)", process.stdout)
    return output


@pytest.fixture
def few_tested(monkeypatch):
    """One of 16 test images where a checkpoint is evaluated."""
    monkeypatch.setattr("experiment.evaluation.NOISE_LEVELS", (0.2,))
    monkeypatch.setattr(
        "experiment.trained_model.load_images",
        lambda *a: replace(source := load_images(*a), test=source.test[::16]),
    )


def test_a_checkpoint_names_its_map_and_is_reproduced(of_regions, call):
    recipe = torch.load(of_regions, weights_only=True)["recipe"]
    assert (recipe["noise_map"], recipe["noise_level"]) == ("regions", [0.05, 0.4])
    process = call(debug_evaluation, "--checkpoint", of_regions)
    assert process.returncode == 0, process.stdout + process.stderr
    assert "trained on photos with σ = 0.05 to 0.4 (regions)" in process.stdout


@pytest.mark.usefixtures("few_tested", "small_picture")
@pytest.mark.parametrize(
    ("options", "text"),
    [((), "σ = 0.05 to 0.4 (regions)"), (("--noise-level", 0.2), "σ = 0.2")],
    ids=["as trained", "another σ"],
)
def test_a_model_is_tested_with_its_map_or_with_one_sigma(
    of_regions, photos, call, monkeypatch, options, text
):
    noise = GaussianNoise(0.2) if options else GaussianNoise((0.05, 0.4), "regions")
    test_set = NoisyImageDataset(photos.test[::16], stream=2, degradation=noise)
    noisy = compare_baselines.measure(None, None, test_set)[0].mean()
    process = call(compare_baselines, "--checkpoint", of_regions, "--model-only", *options)
    assert process.returncode == 0, process.stderr
    assert f"\nphotos, 13 test images, {text}\n" in process.stdout
    assert f"| noisy input | {noisy:.2f} ±" in process.stdout

    titles = titles_of_pictures(visualize_proper_results, monkeypatch)
    process = call(visualize_proper_results, "--checkpoint", of_regions, *options)
    assert process.returncode == 0, process.stderr
    assert titles[0].startswith(f"Worst to best of 13 test images, {text}\n")
    assert ("σ of the noise" in titles) == (not options)
    rows = read_csv("denoising_visualization_proper_images.csv")
    mean = np.mean([float(row["noisy_psnr_db"]) for row in rows])
    assert mean == pytest.approx(noisy, abs=1e-3)


@pytest.mark.usefixtures("few_tested")
def test_recipes_from_before_the_maps_mean_one_sigma_for_an_image(of_regions, call):
    checkpoint = torch.load(of_regions, weights_only=True)
    del checkpoint["recipe"]["noise_map"]
    write_checkpoint(checkpoint, "old.pt")
    options = ("--model-only", "--unclipped", "--jpeg-share", 0.5)
    process = call(compare_baselines, "--checkpoint", "old.pt", *options)
    assert process.returncode == 0, process.stderr
    assert "trained on photos with σ = 0.05 to 0.4\n" in process.stdout
    (test_set,) = images_for(load_model("old.pt").trained)[1][2:]
    assert str(test_set.degradation) == "σ = 0.225"  # their middle
    changed = "σ = 0.225 (50 % JPEG, unclipped)"
    assert f"\nphotos, 13 test images, {changed}\n" in process.stdout


# Baselines -----------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [0.02, 0.2, 0.6])
def test_classical_methods_get_their_best_strength_at_any_noise(photos, sigma):
    dataset = NoisyImageDataset(photos.test[::40], GaussianNoise(sigma))
    for name in ("Gaussian blur", "total variation"):
        denoise, strengths = compare_baselines.baselines(sigma)[name]
        best, (psnrs, _) = compare_baselines.best_of(denoise, strengths, dataset)
        for other in np.geomspace(0.02, 5, 20):
            others, _ = compare_baselines.measure(denoise, other * sigma / 0.2, dataset)
            assert others.mean() < psnrs.mean() + 0.1, (name, best, other * sigma / 0.2)


def test_a_strength_is_chosen_on_up_to_a_hundred_images(photos):
    dataset, calls = NoisyImageDataset(photos.test[:150]), []

    def blur(x, strength):
        calls.append(strength)
        return compare_baselines.baselines(0.2)["Gaussian blur"][0](x, strength)

    assert compare_baselines.best_of(blur, [0.2, 1.0, 5.0], dataset)[0] == 1.0
    assert [calls.count(s) for s in (0.2, 1.0, 5.0)] == [75] * 3


def test_bm3d_is_a_row_where_it_is_asked_for(folder, trained, call, monkeypatch):
    told = []

    def bm3d_rgb(noisy, sigma, profile):
        told.append((noisy.shape, round(sigma, 6), profile.num_threads))
        return np.full_like(noisy, np.nan)

    package = SimpleNamespace(bm3d_rgb=bm3d_rgb, BM3DProfile=SimpleNamespace)
    monkeypatch.setitem(sys.modules, "bm3d", package)
    options = ("--checkpoint", trained.path / "model.pt", "--dataset", folder)
    process = call(compare_baselines, *options, "--noise-level", 0.1, "--bm3d")
    rows = re.findall(r"^\| (BM3D|noisy input).*?\| ([\d.]+ ± [\d.]+)", process.stdout, re.M)
    assert [name for name, _ in rows] == ["noisy input", "BM3D"]
    assert rows[0][1] == rows[1][1]  # what it cannot restore stays as it was
    assert {(shape, threads) for shape, _, threads in told} == {((32, 32, 3), 1)}
    assert {0.08, 0.09, 0.1} <= {sigma for _, sigma, _ in told}
    for broken in (None, SimpleNamespace(bm3d_rgb=bm3d_rgb)):
        monkeypatch.setitem(sys.modules, "bm3d", broken)
        assert_refused(call(compare_baselines, *options, "--bm3d"), "pip install bm3d")


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
