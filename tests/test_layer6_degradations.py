"""Layer 6, tasks: what is done to images is its definition, repeats, and every script knows it."""

import io
import re
from dataclasses import replace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image

import ablation_study
import compare_baselines
import debug_evaluation
import denoising_experiment_proper as experiment
import visualize_proper_results
from common.options import as_option
from common.user_errors import UserError
from conftest import SHORT, assert_refused, filled, interrupted_in_epoch, run_here, same_weights
from denoise_image import photograph_model
from denoising_experiment_proper import RECIPES
from experiment.checkpoints import write_checkpoint
from experiment.evaluation import evaluate
from experiment.recipe import changed
from experiment.trained_model import images_for
from images import degradations
from images.degradations import (
    Compression,
    GaussianNoise,
    Holes,
    SuperResolution,
    degradation_of,
    draw_mask,
    pull_push,
)
from images.image_sources import Split
from images.noisy_images import NoisyImageDataset
from images.training_batches import training_batches
from small_vit import MODELS, SmallViT, ViTConfig, load_model
from visualize_proper_results import others_for

TASKS = {"super-resolution": SuperResolution(2), "inpaint": Holes(), "jpeg": Compression()}
BASELINES = {
    "super-resolution": ["bicubic", "Lanczos"],
    "inpaint": ["pull-push", "Telea", "biharmonic"],
    "jpeg": ["JPEG", "total variation"],
}


# Images --------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [2, 4])
def test_super_resolution_starts_from_what_pillow_makes(photos, scale):
    """Bicubic reduction, antialiased, in 8 bits, and bicubic enlargement."""
    dataset = NoisyImageDataset(photos.test, SuperResolution(scale))
    for index in (0, 50, 150):
        degraded, clean, _ = dataset[index]
        image = Image.fromarray((255 * clean).byte().permute(1, 2, 0).numpy())
        small = image.resize((32 // scale,) * 2, Image.Resampling.BICUBIC)
        large = np.asarray(small.resize((32, 32), Image.Resampling.BICUBIC)) / 255
        assert np.abs(degraded.permute(1, 2, 0).numpy() - large).max() < 2.5 / 255
        reduced = dataset.degradation.reduced(clean[None])
        assert torch.equal((255 * reduced).round() / 255, reduced)
        small = Image.fromarray((255 * reduced[0]).round().byte().permute(1, 2, 0).numpy())
        large = np.asarray(small.resize((32, 32), Image.Resampling.LANCZOS)).transpose(2, 0, 1)
        by_lanczos = compare_baselines.lanczos(clean.numpy(), dataset.degradation)
        assert np.allclose(255 * by_lanczos, large)


def test_photographs_lose_the_pixels_that_a_scale_does_not_divide():
    split = Split([torch.zeros(3, 33, 47, dtype=torch.uint8)], torch.tensor([0]), torch.tensor([1]))
    (degraded, clean, _), *_ = NoisyImageDataset(split, SuperResolution(3)).batches()
    assert degraded.shape == clean.shape == (1, 3, 33, 45)


def test_holes_cover_the_share_and_nothing_else(photos):
    dataset = NoisyImageDataset(photos.test, Holes((0.2, 0.3)))
    shares = []
    for degraded, clean, _ in (dataset[i] for i in range(60)):
        known = degraded[3] == 1
        assert torch.equal(degraded[:3, known], clean[:, known])
        assert (degraded[:3, ~known] != clean[:, ~known]).float().mean() > 0.9
        shares.append((~known).float().mean().item())
    assert 0.199 < min(shares) < 0.22 and 0.28 < max(shares) < 0.301
    assert torch.equal(dataset.sigma(3)[0], 1 - dataset[3][0][3])
    assert torch.equal(dataset.sigma(-1), dataset.sigma(len(dataset) - 1))


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (1, 11)])
def test_holes_are_filled_from_around_them(seeded, size):
    """A flat image as it was, a ramp nearly so, whatever is in the holes before."""
    known = torch.zeros(1, 1, *size)
    known[..., ::5] = 1
    flat = torch.rand(1, 3, 1, 1).expand(1, 3, *size)
    filled = pull_push(torch.where(known > 0, flat, torch.rand(1, 3, *size)), known)
    assert torch.allclose(filled, flat, atol=1e-6)
    ramp = torch.linspace(0, 1, size[1]).expand(1, 3, *size)
    filled = pull_push(ramp * known, known)
    assert torch.equal(filled[..., ::5], ramp[..., ::5])
    assert (filled - ramp).abs().max() < 4 / (size[1] - 1)
    assert not pull_push(flat, 0 * known).any()


def test_far_from_what_is_known_is_the_mean_of_means():
    """Of pairs of pixels, then of pairs of these, whether one of two is known or both."""
    known = torch.tensor([1.0, 1, 1, 0, 0, 0, 0, 0])
    image = torch.tensor([0.1, 0.3, 0.8, 0, 0, 0, 0, 0])
    mean = (0.2 + 0.8) / 2
    expected = [0.1, 0.3, 0.8, 0.75 * 0.8 + mean / 4, 0.8 / 4 + 0.75 * mean, mean, mean, mean]
    filled = pull_push(image.expand(1, 3, 1, 8), known.view(1, 1, 1, 8))
    assert torch.allclose(filled, torch.tensor(expected))


def test_holes_are_rectangles_and_strokes_of_one_piece_and_of_many(monkeypatch):
    """Not single pixels: most unknown pixels have unknown neighbours."""
    stroke, rectangle = Mock(wraps=degradations.stroke), Mock(wraps=degradations.rectangle)
    monkeypatch.setattr(degradations, "stroke", stroke)
    monkeypatch.setattr(degradations, "rectangle", rectangle)
    masks = [draw_mask((32, 32), (0.1, 0.4), number / 20) for number in range(20)]
    assert 0.5 < stroke.call_count / rectangle.call_count < 2
    unknown = 1 - torch.tensor(np.stack(masks)).float().unsqueeze(1)  # [20, 1, 32, 32]
    around = torch.nn.functional.avg_pool2d(unknown, 3, 1, 1)
    assert around[unknown == 1].mean() > 0.6
    assert len({mask.tobytes() for mask in masks}) == 20


def test_no_share_is_too_small_for_a_hole():
    assert (~draw_mask((8, 8), (1e-6, 1e-6), 0.5)).sum() == 1


def test_compression_is_that_of_files_of_the_qualities(photos):
    """Every quality between the two occurs, each as often."""
    images = NoisyImageDataset(photos.test[:100], Compression((20, 22)))
    found = []
    for degraded, clean, _ in (images[i] for i in range(100)):
        best = qualities_of(degraded, clean, range(18, 25))
        assert best
        found += best[:1]
    counts = [found.count(quality) for quality in range(18, 25)]
    assert min(counts[2:5]) > 20 and sum(counts[2:5]) == 100


def test_noise_in_jpeg_files_is_that_of_pillow(photos):
    """Of the share, by chance; the others are as without, and all of the same noise.

    Neither σ nor the quality tells which they are.
    """
    noise = GaussianNoise((0.05, 0.3))
    without, half, all_of_them = (
        NoisyImageDataset(photos.test[:100], degradation)
        for degradation in (
            noise,
            replace(noise, jpeg_share=0.5),
            replace(noise, jpeg_share=1, unclipped=True),
        )
    )
    found = []
    for index in range(100):
        noisy, clean, _ = without[index]
        assert torch.equal(half[index][1], clean)
        assert torch.equal(half.sigma(index), without.sigma(index))
        of_all, of_half = (
            qualities_of(dataset[index][0], noisy, range(75, 96)) for dataset in (all_of_them, half)
        )
        strong = without.sigma(index).max().item() > 0.12
        found.append((of_all[0], bool(of_half), strong))
        assert of_half or torch.equal(half[index][0], noisy)
    qualities, chosen, _ = zip(*found, strict=True)
    assert min(qualities) < 78 and max(qualities) > 92 and len(set(qualities)) > 15
    assert 35 < sum(chosen) < 65
    assert len({(quality > 85, *others) for quality, *others in found}) == 8


def qualities_of(degraded, image, qualities):
    """Those at which Pillow makes [3, h, w] of another image."""
    pixels, found = (255 * image).round().byte().permute(1, 2, 0).numpy(), []
    for quality in qualities:
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=quality)
        same = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1).float() / 255
        found += [quality] if torch.equal(degraded, same) else []
    return found


@pytest.mark.parametrize(
    "degradation",
    [*TASKS.values(), GaussianNoise((0.1, 0.3)), GaussianNoise((0.1, 0.3), "regions", False, 0.5)],
    ids=str,
)
def test_what_is_done_repeats(photos, degradation):
    dataset = NoisyImageDataset(photos.test[:7], degradation, stream=2)
    one, other = (torch.cat([x for x, _, _ in dataset.batches(size)]) for size in (2, 5))
    assert torch.equal(one, other)
    assert torch.equal(one[4], dataset[4][0]) and torch.equal(one[6], dataset[-1][0])
    batches = [next(training_batches(dataset, 7, 0, epoch)) for epoch in (1, 1, 2)]
    assert torch.equal(batches[0][0], batches[1][0])
    assert not torch.equal(batches[0][0], batches[2][0])
    moved = dataset.to("cpu")
    assert moved.degradation == degradation and torch.equal(moved[3][0], dataset[3][0])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: GaussianNoise(noise_map="stripes"), "noise_map .* got 'stripes'"),
        (lambda: GaussianNoise(noise_map="regions"), "regions lies between two values"),
        (lambda: GaussianNoise(jpeg_share=1.5), "jpeg_share .* got 1.5"),
        (lambda: SuperResolution(5), "scale must be one of 2, 3, 4, got 5"),
        (lambda: Holes((0.1, 0.95)), "holes .* at most 0.9"),
        (lambda: Holes((0.3, 0.2)), "holes .* ascending"),
        (lambda: Compression((40, 10)), "quality .* ascending"),
        (lambda: Compression((10, 96)), "quality .* at most 95"),
        (lambda: degradation_of({"task": "paint"}), "task must be one of denoise, .* got 'paint'"),
        (lambda: ViTConfig(in_channels=5), "in_channels .* got 5"),
        (lambda: SmallViT(ViTConfig(in_channels=4))(torch.zeros(1, 3, 32, 32)), "4, h, w"),
    ],
)
def test_impossible_degradations_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


# Models --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["published", "quick", "routed"])
def test_known_pixels_stay_as_they_are(seeded, name):
    model = filled(SmallViT(replace(MODELS[name], in_channels=4)))
    images, known = torch.rand(2, 3, 32, 32), torch.rand(2, 1, 32, 32) > 0.3
    restored = model.denoise(torch.cat([images * known, known.float()], 1))
    known = known.expand(-1, 3, -1, -1)
    assert torch.equal(restored[known], images[known])
    assert (restored[~known] != 0).float().mean() > 0.3
    other = model.denoise(torch.cat([images * known, torch.ones(2, 1, 32, 32)], 1))
    assert torch.equal(other, images * known)


def test_resolution_is_restored_better_than_by_the_bicubic_filter(photos):
    """In a training of seconds, by half a decibel."""
    halved = SuperResolution(2)
    recipe = replace(RECIPES["quick"], degradation=halved, steps=30, epochs=1)
    train_set, _, test_set = recipe.splits(photos)
    torch.manual_seed(0)
    model = SmallViT(MODELS["quick"])
    test_set = NoisyImageDataset(test_set.split[::4], halved, stream=2)
    experiment.train(model, train_set, test_set, recipe)
    result = evaluate(model, test_set)
    assert result.psnr.mean() > result.noisy_psnr.mean() + 0.5


@pytest.mark.parametrize(
    ("task", "border"), [("super-resolution", 2), ("jpeg", 0), ("inpaint", None)]
)
def test_the_second_psnr_is_that_of_papers(task, border):
    """Of the luma of BT.601, for super-resolution without a border; or of what is in the holes."""
    clean, restored = np.random.default_rng(0).random((2, 3, 12, 10), dtype=np.float32)
    degraded = np.concatenate([clean, np.zeros((1, 12, 10), np.float32)])
    degraded[3, 3:] = 1
    error = (restored - clean)[:, :3]
    if task != "inpaint":
        luma = np.tensordot([65.481, 128.553, 24.966], restored - clean, 1) / 255
        error = luma[border : 12 - border, border : 10 - border]
    found = compare_baselines.special_psnr(TASKS[task], degraded, restored, clean)
    assert found == pytest.approx(-10 * np.log10((error**2).mean()), abs=1e-3)


# Scripts -------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=TASKS)
def restorer(request, folder_of_images, tmp_path_factory):
    """(task, a model trained for it on a few images)."""
    path = tmp_path_factory.mktemp("restorer") / "m.pt"
    options = ("--dataset", folder_of_images, "--recipe", "quick", "--steps", 2, "--output", path)
    process = run_here(experiment, *options, "--task", request.param)
    assert process.returncode == 0, process.stderr
    assert re.search(f"║ task +{TASKS[request.param]} +║", process.stdout)
    assert "║ restored PSNR" in process.stdout and "noisy" not in process.stdout
    return request.param, path


def test_every_script_knows_the_task_of_a_model(restorer, call, monkeypatch):
    task, path = restorer
    figures = []
    monkeypatch.setattr(visualize_proper_results, "write_figure", lambda f, _: figures.append(f))
    assert call(debug_evaluation, "--checkpoint", path).returncode == 0
    process = call(visualize_proper_results, "--checkpoint", path, "--beside", path, "--rows", 2)
    assert process.returncode == 0, process.stderr
    assert f"with {TASKS[task]}" in process.stdout and "| σ |" not in process.stdout
    titles = [axis.get_title().split(":")[0] for axis in figures[0].axes[:4]]
    assert titles[1:] == ["restored", "restored", "ground truth"]
    shown, *_, truth = (axis.images[0].get_array() for axis in figures[0].axes[:4])
    holes = (shown == 0).all(2) & (truth != 0).any(2)  # are drawn black
    assert (holes.mean() > 0.05) == (task == "inpaint")
    process = call(compare_baselines, "--checkpoint", path)
    rows = [line.split(" | ") for line in process.stdout.splitlines() if line.startswith("| ")]
    names = [row[0].strip("| ") for row in rows]
    names = [name.split(", strength")[0] for name in names]
    assert names == ["method", *BASELINES[task], "**this model**"]
    special = [float(row[3].split(" ± ")[0]) for row in rows[1:]]
    if task == "inpaint":
        assert max(special[:2]) < special[2]
    else:
        assert special[0] != special[1] == pytest.approx(special[0], abs=6)
    assert process.stdout.splitlines()[-1].startswith("PSNR ")
    for script in (visualize_proper_results, compare_baselines):
        process = call(script, "--checkpoint", path, "--noise-level", 0.1)
        assert_refused(process, "--noise-level is for noise", TASKS[task])
    assert_refused(call(compare_baselines, "--checkpoint", path, "--bm3d"), "--bm3d is for noise")


def test_a_model_of_one_task_is_none_of_another(restorer, trained, photos, tmp_path):
    task, path = restorer
    of_noise = str(tmp_path / "of_noise.pt")
    write_checkpoint(trained.checkpoint, of_noise)
    test_set = NoisyImageDataset(photos.test, TASKS[task])
    with pytest.raises(UserError, match=f"of_noise.pt: .* for σ = 0.2, not for {TASKS[task]}"):
        others_for(test_set, [of_noise])
    if task == "super-resolution":
        with pytest.raises(UserError, match=r"for super-resolution ×2, not for .* ×3"):
            others_for(NoisyImageDataset(photos.test, SuperResolution(3)), [path])
    with pytest.raises(UserError, match="not for noise"):
        photograph_model(path)
    for name, value in {"noise_level": 0.1, "unclipped": False, "jpeg_share": 1}.items():
        words = f"{as_option(name)} is for noise; .* for {TASKS[task]}"
        with pytest.raises(UserError, match=words):
            images_for(load_model(path).trained, **{name: value})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"task": "inpaint", "noise_level": [0.1]}, "--noise-level is of --task denoise"),
        ({"task": "inpaint", "unclipped": False}, "--unclipped is of --task denoise"),
        ({"task": "jpeg", "jpeg_share": 0.5}, "--jpeg-share is of --task denoise"),
        ({"scale": 2}, "--scale is of --task super-resolution"),
        ({"holes": [0.1, 0.2]}, "--holes is of --task inpaint"),
        ({"quality": [10, 40]}, "--quality is of --task jpeg"),
        ({"task": "inpaint", "holes": [0.4, 0.1]}, "--holes must be .* ascending"),
    ],
)
def test_options_are_of_one_task(options, words):
    with pytest.raises(UserError, match=words):
        changed(RECIPES["published"], options)


def test_impossible_tasks_end_in_a_sentence(call, folder):
    for options, words in (
        (("--task", "super-resolution", "--scale", 3), "--scale 3 does not divide the 32 pixels"),
        (("--task", "jpeg", "--quality", 0, 10), "argument --quality: must be a whole number"),
    ):
        process = call(experiment, "--dataset", folder, *options, *SHORT, "--output", "m.pt")
        assert_refused(process, words)


def test_the_study_trains_variants_that_read_a_mask(call, folder):
    options = ("--dataset", folder, "--task", "inpaint", "--recipe", "quick", "--steps", 1)
    options += ("--seeds", 0, "--variants")
    process = call(ablation_study, *options, "capacity, by pattern")
    assert process.returncode == 0, process.stderr
    assert "| capacity, by pattern | 25 % | 337,415 |" in process.stdout  # 2,048 more
    with pytest.raises(UserError, match="'DnCNN' reads three channels, no mask"):
        ablation_study.make_variant("DnCNN", 4)


def test_a_model_for_inpainting_goes_on_bit_for_bit(call, folder):
    options = ("--dataset", folder, "--batch-size", 4, "--epochs", 2, "--task", "inpaint")
    assert call(experiment, *options, "--output", "at_once.pt").returncode == 0
    with interrupted_in_epoch(2):
        assert call(experiment, *options, "--output", "m.pt").returncode == 130
    process = call(experiment, *options, "--output", "m.pt", "--resume")
    assert process.returncode == 0, process.stderr
    one, other = (load_model(name).state_dict() for name in ("m.pt", "at_once.pt"))
    assert same_weights(one, other)
