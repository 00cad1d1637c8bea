"""Layer 6, noise as cameras have it: drawn by its properties, and in pairs of photographs."""

import re
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image

import ablation_study
import compare_baselines
import debug_evaluation
import debug_test_data
import denoising_experiment_proper as experiment
import visualize_proper_results
import visualize_training_data
from common.options import BadOption
from conftest import ROOT, assert_refused, write_images
from experiment.checkpoints import Trained
from experiment.tiling import denoise, noise_at_sizes, whole_noise
from images.camera_noise import NUMBERS, PROPERTIES
from images.degradations import (
    CameraNoise,
    Draws,
    GaussianNoise,
    PairedNoise,
    degradation_of,
)
from images.image_sources import Split, load_images, shift_of
from images.noise_statistics import noise_statistics
from images.noisy_images import NoisyImageDataset
from images.training_batches import random_crop, training_batches
from small_vit import MODELS, SmallViT, load_model
from studies.study_results import read_study

LEVEL = (10 / 255, 10 / 255)
TWO_STEPS = ("--recipe", "photo", "--crop", 40, "--steps", 2, "--batch-size", 4)


def of_ramps(grey=False):
    """24 images from dark on the left to bright on the right."""
    ramp = torch.linspace(0, 1, 96).expand(24, 3, 96, 96)
    return ramp if grey else ramp * torch.tensor([0.9, 1.0, 0.8]).view(3, 1, 1)


def noisy_with(*properties, clean=None, share=1.0):
    """(noisy, σ) of images, by default the ramps, with noise of these properties alone."""
    clean = of_ramps() if clean is None else clean
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(clean.shape, generator=generator)
    uniform = torch.rand(len(clean), NUMBERS, generator=generator)
    return CameraNoise(LEVEL, properties, share)(clean, Draws(normal, uniform))


def correlation(one, other):
    return torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1].item()


def measured(noisy, clean):
    """Correlations of the noise with the next pixel and the next colour, and how much stronger it
    is in the mid-tones than at the bright end; without clipped values.
    """
    noise = (noisy - clean)[..., 16:80]
    middle, bright = noise[..., 16:32].std(), noise[..., 48:].std()
    return (
        correlation(noise[..., 1:], noise[..., :-1]),
        correlation(noise[:, 0], noise[:, 1]),
        (middle / bright).item(),
    )


def test_each_property_brings_what_it_is_named_for():
    clean = of_ramps()
    near, colours, hump = measured(noisy_with()[0], clean)
    assert abs(near) < 0.02 and abs(colours) < 0.02 and hump == pytest.approx(1, abs=0.05)
    near, colours, hump = measured(noisy_with("correlation")[0], clean)
    assert 0.4 < near < 0.9 and abs(colours) < 0.1
    near, colours, hump = measured(noisy_with("colours")[0], clean)
    assert abs(near) < 0.02 and 0.4 < colours < 0.9
    near, colours, hump = measured(noisy_with("brightness")[0], clean)
    assert abs(near) < 0.02 and abs(colours) < 0.02 and hump > 1.15
    with_files, without = (noisy_with(*p)[0] for p in (PROPERTIES, PROPERTIES[:-1]))
    changed = (with_files - without).abs().amax((1, 2, 3)) > 1 / 255  # more than by 8 bits
    assert 10 < changed.sum() < 24


def test_noise_has_the_drawn_standard_deviation():
    clean = torch.full((16, 3, 64, 64), 0.5)
    noisy, sigma = noisy_with("correlation", "brightness", clean=clean)
    assert sigma.square().mean((1, 2, 3)).sqrt().allclose(torch.tensor(LEVEL[0]), rtol=1e-4)
    assert (noisy - clean).std() == pytest.approx(LEVEL[0], rel=0.05)


def test_some_images_are_clean_and_some_have_white_noise():
    clean = of_ramps()
    noisy, sigma = noisy_with(*PROPERTIES[:-1], share=0.0)
    still = (noisy == clean).flatten(1).all(1)
    assert torch.equal(still, (sigma == 0).flatten(1).all(1)) and 0 < still.sum() < 8
    near, colours, _ = measured(noisy[~still], clean[~still])
    assert abs(near) < 0.05 and abs(colours) < 0.05


def test_grey_images_get_grey_noise():
    clean = of_ramps(grey=True)
    for share in (1.0, 0.0):
        noisy, _ = noisy_with(*PROPERTIES, clean=clean, share=share)
        assert torch.equal(noisy, noisy[:, :1].expand_as(noisy)) and not torch.equal(noisy, clean)


def test_noise_repeats_whatever_the_batch(photos):
    dataset = NoisyImageDataset(photos.test[:6], CameraNoise())
    together, one_by_one = (
        torch.cat([noisy for noisy, *_ in dataset.batches(size)]) for size in (6, 1)
    )
    assert torch.allclose(together, one_by_one, atol=1.5 / 255)  # a file may round otherwise
    assert torch.equal(dataset[3][0], dataset[3][0])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"noise": "film"}, "noise must be one of gaussian, camera, pairs"),
        ({"noise": "camera", "noise_level": (0.2, 0.1)}, "noise_level must be two numbers"),
        ({"noise": "camera", "noise_level": (0.0, 0.1)}, "noise_level must be numbers, each"),
        ({"noise": "camera", "noise_properties": ("rain",)}, "noise_properties must be one of"),
        ({"noise": "camera", "camera_share": 2}, "camera_share must be a number"),
    ],
)
def test_settings_out_of_range_are_refused(settings, words):
    with pytest.raises(BadOption, match=words):
        degradation_of(settings)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--noise", "camera", "--noise-map", "regions"), "--noise-map is of --noise gaussian"),
        (("--noise", "camera", "--jpeg-share", 1), "--jpeg-share is of --noise gaussian"),
        (("--camera-share", 1), "--camera-share is of --noise camera"),
        (("--task", "jpeg", "--noise", "camera"), "--noise is not of --task jpeg"),
        (("--recipe", "photo", "--resize", 2, 1), "--resize must be two numbers in ascending"),
    ],
)
def test_options_of_another_noise_are_one_sentence(call, options, words):
    assert_refused(call(experiment, "--dataset", "photos", *options), words)


# Crops ---------------------------------------------------------------------------------------


def test_resized_crops_show_more_or_less_of_the_image():
    ramp = torch.arange(200, dtype=torch.uint8).expand(3, 200, 200)
    crop = [random_crop(ramp, 32, torch.Generator().manual_seed(s), (0.5, 4.0)) for s in range(60)]
    spans = np.array([int(c[0, 0, -1]) - int(c[0, 0, 0]) for c in crop])
    assert all(c.shape == (3, 32, 32) for c in crop)
    assert 5 < (spans == 31).sum() < 30  # a quarter stays as it is
    assert spans.min() < 12 and spans.max() > 50
    plain, same = (
        random_crop(ramp, 32, torch.Generator().manual_seed(0), resize) for resize in (None, (1, 1))
    )
    assert plain.shape == same.shape and len(same[0].unique()) == 32  # a factor of 1 blurs nothing


def test_a_share_of_the_images_is_made_grey(photos):
    dataset = NoisyImageDataset(photos.train[:64])
    _, clean, _ = next(training_batches(dataset, 64, 0, 1, gray_share=0.5))
    grey = (clean == clean[:, :1]).flatten(1).all(1)
    assert 16 < grey.sum() < 48


# Pairs ---------------------------------------------------------------------------------------


@pytest.fixture
def pairs(tmp_path):
    """A folder with train/ and test/ pairs: the noisy images are the true ones, 10 brighter."""
    for part, count in (("train", 4), ("test", 2)):
        for path in write_images(tmp_path / "pairs" / part / "true", count, (48, 40), seed=count):
            noisy = tmp_path / "pairs" / part / "noisy" / path.name
            noisy.parent.mkdir(exist_ok=True)
            true = np.asarray(Image.open(path)).clip(0, 245)
            Image.fromarray(true).save(path)
            Image.fromarray(true + 10).save(noisy)
    return tmp_path / "pairs"


def test_pairs_train_are_compared_and_drawn(call, pairs, small_picture):
    process = call(experiment, "--dataset", pairs, *TWO_STEPS, "--output", "m.pt")
    assert process.returncode == 0, process.stderr
    assert "noise of its own" in process.stdout
    for option, *values in (
        ("--noise-level", 0.02, 0.1),
        ("--noise", "gaussian"),
        ("--gray-share", 1),
    ):
        refused = call(experiment, "--dataset", pairs, *TWO_STEPS, option, *values)
        assert_refused(refused, option, "noise of its own")
    assert_refused(
        call(visualize_training_data, "--dataset", pairs, "--noise", "camera"), "--noise"
    )
    recipe = load_model("m.pt").trained.recipe
    assert recipe.degradation == PairedNoise() and recipe.resize is None
    process = call(debug_evaluation, "--checkpoint", "m.pt")
    assert process.returncode == 0 and "all figures agree" in process.stdout
    process = call(compare_baselines, "--checkpoint", "m.pt", "--dataset", pairs / "test")
    assert "| noisy input | 28.13 ± 0.00 |" in process.stdout  # 10 of 255
    assert "by the estimated σ" in process.stdout and process.returncode == 0, process.stderr
    process = call(visualize_proper_results, "--checkpoint", "m.pt", "--output", "p.png")
    assert process.returncode == 0 and "at other σ" not in process.stdout, process.stderr
    assert_refused(call(compare_baselines, "--checkpoint", "m.pt", "--dataset", "photos"), "pairs")
    small = write_images(pairs / "small", 2, (36, 36))[0].parent  # than the crops of the training
    options = ("--checkpoint", "m.pt", "--dataset", small, "--noise-level", 0.1, "--model-only")
    assert call(compare_baselines, *options).returncode == 0
    options = ("--checkpoint", "m.pt", "--noise-level", 0.1)
    assert_refused(call(compare_baselines, *options), "--noise-level", "noise of its own")


def test_clean_photographs_teach_what_pairs_test(call, pairs):
    """The noise is drawn in training and validation, and that of the camera in the test."""
    for path in (pairs / "train" / "true").iterdir():
        path.rename(pairs / "train" / path.name)
    for folder in ("true", "noisy"):
        shutil.rmtree(pairs / "train" / folder)
    process = call(experiment, "--dataset", pairs, *TWO_STEPS, "--output", "m.pt")
    assert process.returncode == 0, process.stderr
    assert re.search(r"║ noise +noise of its own", process.stdout)
    trained = load_model("m.pt").trained
    assert trained.recipe.degradation == experiment.RECIPES["photo"].degradation
    assert trained.recipe.resize and trained.recipe.gray_share
    assert trained.checkpoint["test"]["noisy_psnr_mean"] == pytest.approx(28.13, abs=0.01)
    process = call(debug_evaluation, "--checkpoint", "m.pt")
    assert process.returncode == 0 and "all figures agree" in process.stdout, process.stderr
    process = call(compare_baselines, "--checkpoint", "m.pt", "--model-only")
    assert "| noisy input | 28.13 ± 0.00 |" in process.stdout, process.stderr
    study = ("--variants", "photographs, dense", "--seeds", 0, "--output", "s.json")
    process = call(ablation_study, "--dataset", pairs, *TWO_STEPS, *study)
    assert process.returncode == 0, process.stderr
    recipe, rows = read_study(Path("s.json"))
    assert recipe["noise"] == "camera" and recipe["dataset"].endswith("tested on pairs")
    assert 15 < rows[0]["points"][0]["psnr"] < 28.13  # nothing was learned in two steps
    process = call(debug_test_data, "--dataset", pairs, "--crop", 32)
    assert process.returncode == 0, process.stdout
    shared = next((pairs / "test" / "true").iterdir())
    shutil.copy(shared, pairs / "train" / "shared.png")
    process = call(debug_test_data, "--dataset", pairs, "--crop", 32)
    assert process.returncode == 1 and "1 test image in" in process.stdout
    assert_refused(call(experiment, "--dataset", pairs, *TWO_STEPS, "--task", "jpeg"), "--task")


def test_training_sees_the_two_of_a_pair_in_one_place(pairs):
    source = load_images(str(pairs), crop=32)
    dataset = NoisyImageDataset(source.train, PairedNoise())
    noisy, clean, _ = next(
        training_batches(dataset, 8, 0, 1, flip=True, transpose=True, crop=32, gray_share=0.0)
    )
    assert noisy.shape == clean.shape == (8, 3, 32, 32)
    assert torch.allclose(noisy - clean, torch.tensor(10 / 255), atol=1e-6)


def test_what_is_no_pair_is_named(call, pairs):
    arguments = ("--recipe", "photo", "--crop", 32, "--dataset", pairs)
    noisy = pairs / "test" / "noisy"
    assert_refused(call(experiment, "--dataset", pairs), "pairs", "--recipe")
    assert_refused(call(experiment, *arguments, "--task", "jpeg"), "--task")
    clean = write_images(pairs.parent / "clean" / "test", 2, (48, 40))[0].parent.parent
    shutil.copytree(pairs / "train", clean / "train")
    of_photographs = ("--checkpoint", ROOT / "models" / "photo.pt")
    for script, options in (
        (experiment, arguments[:4]),
        (visualize_training_data, ()),
        (compare_baselines, of_photographs),
    ):
        process = call(script, *options, "--dataset", clean)
        assert_refused(process, "only pairs can test", clean / "test")
    shutil.copytree(pairs / "test", clean / "test" / "scene")
    shutil.rmtree(clean / "train" / "noisy")
    (clean / "train" / "true").rename(clean / "train" / "some")
    assert_refused(
        call(experiment, *arguments[:4], "--dataset", clean), "elsewhere", clean / "test"
    )
    (noisy / "000.png").rename(noisy / "other.png")
    assert_refused(call(experiment, *arguments), "000.png", "no partner", noisy)
    (noisy / "other.png").unlink()
    write_images(noisy, 1, (40, 48))
    assert_refused(call(experiment, *arguments), "000.png", "40×48", "48×40")
    (noisy / "000.png").write_text("no image")
    assert_refused(call(experiment, *arguments), "000.png", "cannot be read")


def test_a_single_pair_can_test_but_not_train(call, pairs):
    for part in ("train", "test"):
        for path in sorted((pairs / part).rglob("*.png")):
            if path.stem != "000":
                path.unlink()
    options = ("--dataset", pairs, "--checkpoint", ROOT / "models" / "photo.pt", "--model-only")
    process = call(compare_baselines, *options)
    assert process.returncode == 0 and "1 test image" in process.stdout, process.stderr
    write_images(pairs / "test", 1)
    process = call(compare_baselines, *options)
    assert process.returncode == 0 and "1 file beside" in process.stderr
    process = call(experiment, "--recipe", "photo", "--crop", 32, "--dataset", pairs)
    assert_refused(process, "1 pair; training takes 2")


def test_a_shifted_pair_is_noticed(photos):
    photo, rng = skimage.data.astronaut(), np.random.default_rng(0)
    noisy = (photo + rng.normal(0, 25, photo.shape)).clip(0, 255).astype(np.uint8)
    assert shift_of(photo, noisy) is None
    across, down = shift_of(photo[:, 3:], noisy[:, :-3])
    assert across == pytest.approx(3, abs=0.2) and down == pytest.approx(0, abs=0.2)


# Statistics ----------------------------------------------------------------------------------


def test_statistics_find_what_was_put_in():
    rng = np.random.default_rng(0)
    white = rng.standard_normal((3, 257, 256))
    noise = 6 * (white[:, 1:] + white[:, :-1]) / 2**0.5  # correlated downwards by 1/2
    noise[1] = noise[0]
    noisy = torch.from_numpy((128 + noise).round().clip(0, 255).astype(np.uint8))
    pair = torch.cat([torch.full_like(noisy, 128), noisy])
    split = Split([pair, pair], torch.zeros(2), torch.ones(2, dtype=torch.bool))
    found = noise_statistics(NoisyImageDataset(split, PairedNoise()))
    assert found["level"] == pytest.approx(6, rel=0.03)
    assert found["vertical"][0] == pytest.approx(0.5, abs=0.03)
    assert found["vertical"][1] == pytest.approx(0, abs=0.03)
    assert found["horizontal"][0] == pytest.approx(0, abs=0.03)
    assert found["colours"] == pytest.approx([1, 0, 0], abs=0.03)
    assert found["brightness"][4] == pytest.approx(1, abs=0.01)
    assert np.isnan(found["brightness"][0]).all()


def test_the_script_prints_them(call, pairs):
    process = call(visualize_training_data, "--dataset", "photos", "--noise", "camera")
    assert process.returncode == 0, process.stderr
    assert "| horizontal correlation at 1 |" in process.stdout
    assert_refused(call(visualize_training_data, "--dataset", pairs), "no noise")


def test_the_printed_noise_is_that_of_all_sizes():
    rng = np.random.default_rng(0)
    white = (0.5 + 0.05 * rng.standard_normal((256, 256, 3))).astype(np.float32)
    blurred = cv2.GaussianBlur(white - 0.5, (0, 0), 0.8)
    coarse = (0.5 + blurred * (0.05 / blurred.std())).astype(np.float32)
    assert whole_noise(noise_at_sizes(white)) == pytest.approx(0.05, rel=0.05)
    assert noise_at_sizes(coarse)[0] < 0.02 < 0.03 < whole_noise(noise_at_sizes(coarse)) < 0.06
    assert whole_noise([0.04]) == pytest.approx(0.04) == whole_noise([0.04, 0.02])


def test_a_model_that_knows_grey_sees_it_as_it_is():
    """Other models are shown colours that make grey noise independent."""

    class Shown(torch.nn.Module):
        def __init__(self, gray_share):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))
            self.trained = Trained("", experiment.Recipe(gray_share=gray_share), {})

        def forward(self, noisy):
            self.grey = torch.equal(noisy[:, 0], noisy[:, 1])
            return noisy, []

    image = np.random.default_rng(0).integers(0, 255, (64, 64), dtype=np.uint8)
    for share in (0.0, 0.1):
        model = Shown(share)
        denoise(model, image)
        assert model.grey == bool(share)


def test_a_strength_that_does_nothing_is_not_where_the_search_ends(photos):
    dataset = NoisyImageDataset(photos.test[:4], GaussianNoise(0.2))
    blur, _ = compare_baselines.baselines(0.2)["Gaussian blur"]
    strength, _ = compare_baselines.best_of(blur, [0.05, 0.06, 0.07], dataset)
    assert 0.5 < strength < 2


def test_denoising_leaves_the_layout_of_weights(photos):
    """An optimizer's moments have it, too; with another, fused steps would go astray."""
    model = SmallViT(MODELS["photo"])
    before = {name: (p.stride(), p.clone()) for name, p in model.named_parameters()}
    denoise(model, np.zeros((40, 40, 3), np.uint8))
    for name, parameter in model.named_parameters():
        assert parameter.stride() == before[name][0] and torch.equal(parameter, before[name][1])
