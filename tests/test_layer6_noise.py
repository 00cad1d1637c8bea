"""Layer 6, noise: it repeats, differs where it must, and comes with every image once."""

import numpy as np
import pytest
import skimage.data
import torch

from experiment import tiling
from experiment.tiling import denoise, estimate_noise
from images.degradations import NOISE_MAPS, GaussianNoise
from images.image_sources import Split
from images.noisy_images import NoisyImageDataset, noisy_splits
from images.training_batches import random_crop, training_batches

LOW, HIGH = 0.05, 0.4
any_map = pytest.mark.parametrize("noise_map", NOISE_MAPS)


def between(noise_map, unclipped=False):
    return GaussianNoise((LOW, HIGH), noise_map, unclipped)


def of_evaluation(dataset):
    """(noisy, clean, σ) of all images, with their own noise."""
    noisy, clean, _ = next(dataset.batches(len(dataset)))
    return noisy, clean, torch.stack([dataset.sigma(i) for i in range(len(dataset))])


def of_training(dataset):
    """(noisy, clean, σ) of all images, mirrored, with fresh noise."""
    how = {"seed": 0, "epoch": 1, "flip": True, "with_sigma": True}
    noisy, clean, _, sigma = next(training_batches(dataset, len(dataset), **how))
    return noisy, clean, sigma


both_kinds = pytest.mark.parametrize("draw", [of_evaluation, of_training])


@pytest.fixture(scope="module")
def oblong(photos):
    """A function(map) that gives 256 images of 24 rows and 32 columns with noise of it."""
    split = photos.train[:256]
    split.images = split.images[:, :, :24]
    return lambda noise_map: NoisyImageDataset(split, between(noise_map, unclipped=True))


# One σ for an image --------------------------------------------------------------------------


def test_flips_mirror_images_and_leave_the_noise(photos):
    dataset = NoisyImageDataset(photos.train[:64], GaussianNoise(0.1, unclipped=True))
    (noisy, clean, _), (of_flipped, flipped, _) = (
        next(training_batches(dataset, 64, 0, 1, flip=flip)) for flip in (False, True)
    )
    mirrored = (flipped == clean.flip(3)).flatten(1).all(1)
    same = (flipped == clean).flatten(1).all(1)
    assert (mirrored | same).all()
    assert 16 < mirrored.sum() < 48
    assert torch.allclose(of_flipped - flipped, noisy - clean, atol=1e-6)


@pytest.mark.parametrize(
    "level",
    [-0.1, (0.3, 0.1), float("nan"), (-0.1, 0.2), (0, 0.2), (0.1, 0.2, 0.3), 1e-7, (1e-7, 0.2)],
)
def test_impossible_noise_levels_are_refused(level):
    with pytest.raises(ValueError, match="noise_level must be"):
        GaussianNoise(level)


@pytest.mark.parametrize("level", [(0.2, 0.2), (LOW, HIGH)])
def test_noise_of_one_sigma_is_what_it_always_was(photos, level):
    """Recomputed by hand, log-uniform in a range: all figures of trainings rest on it."""

    def generator(*key):
        seed = np.random.SeedSequence(key).generate_state(1)[0]
        return torch.Generator().manual_seed(int(seed))

    low, high = level
    dataset = NoisyImageDataset(photos.train[:40], GaussianNoise(level), stream=1)
    images = dataset.split.images.float() / 255
    for index in range(40):
        own = np.random.default_rng((1, index))
        noise = own.standard_normal((3, 32, 32), dtype=np.float32)
        sigma = np.float32(low * (high / low) ** own.uniform())
        expected = (torch.from_numpy(noise * sigma) + images[index]).clamp(0, 1)
        assert torch.equal(dataset[index][0], expected)
    order = torch.randperm(40, generator=generator(5, 3)).split(16)
    for step, (noisy, clean, _) in enumerate(training_batches(dataset, 16, seed=5, epoch=3)):
        fresh = generator(5, 3, step)
        noise = torch.randn(clean.shape, generator=fresh)
        sigma = low * (high / low) ** torch.rand(len(clean), 1, 1, 1, generator=fresh)
        assert torch.equal(clean, images[order[step]])
        assert torch.equal(noisy, (noise * sigma + clean).clamp(0, 1))


# σ that differs over an image -----------------------------------------------------------------


@both_kinds
@any_map
def test_sigma_lies_between_the_two_values(oblong, noise_map, draw):
    _, clean, sigma = draw(oblong(noise_map))
    assert sigma.shape == clean.shape and sigma.dtype == torch.float32
    assert LOW - 1e-6 < sigma.min() == pytest.approx(LOW, rel=0.05)
    assert HIGH + 1e-6 > sigma.max() == pytest.approx(HIGH, rel=0.05)
    alike = (sigma == sigma[:, :1, :1, :1]).flatten(1).all(1)
    assert alike.all() if noise_map == "uniform" else not alike.any()


@both_kinds
def test_regions_are_rectangles_of_the_higher_sigma(oblong, draw):
    _, _, sigma = draw(oblong("regions"))
    assert sigma.unique().tolist() == pytest.approx([LOW, HIGH])
    inside = sigma[:, 0] == sigma.max()
    assert torch.equal(sigma, torch.where(inside, HIGH, LOW)[:, None].expand_as(sigma))
    rows, columns = inside.any(2), inside.any(1)
    assert torch.equal(inside, rows[:, :, None] & columns[:, None])
    for sides in (rows, columns):
        padded = torch.nn.functional.pad(sides.int(), (1, 1))
        assert (padded.diff().abs().sum(1) == 2).all()  # without gaps
        assert sides[:, 0].any() and sides[:, -1].any() and not sides.all()
    area = inside.float().mean((1, 2))  # a rectangle of 10 × 13 pixels may gain or lose an edge
    assert area.min() == pytest.approx(1 / 6, abs=0.04)
    assert area.max() == pytest.approx(1 / 2, abs=0.04)
    assert area.mean() == pytest.approx(1 / 3, abs=0.02)
    tallness = (rows.float().mean(1) / columns.float().mean(1)).log2()  # uniform from -1 to 1
    assert tallness.mean() == pytest.approx(0, abs=0.12)
    assert tallness.std() == pytest.approx(3**-0.5, abs=0.06)


@both_kinds
@any_map
def test_noise_has_the_sigma_that_is_told(oblong, noise_map, draw):
    noisy, clean, sigma = draw(oblong(noise_map))
    noise = ((noisy - clean) / sigma).double()
    middle = (LOW * HIGH) ** 0.5
    for part in (noise[sigma < middle], noise[sigma > middle]):
        assert part.numel() > 50_000
        assert part.std().item() == pytest.approx(1, abs=4 * (2 * part.numel()) ** -0.5)
        assert part.mean().item() == pytest.approx(0, abs=4 * part.numel() ** -0.5)


def test_every_image_stream_and_step_has_a_map_of_its_own(photos):
    same = photos.test[[0] * 8]
    first, other = (NoisyImageDataset(same, between("regions"), stream) for stream in (0, 1))
    maps = [first.sigma(0), first.sigma(1), other.sigma(0)]
    keys = [(0, 1), (0, 2), (1, 1)]  # of seed and epoch
    for key in keys:
        steps = list(training_batches(first, 4, *key, with_sigma=True))
        again = next(training_batches(first, 4, *key, with_sigma=True))
        assert all(map(torch.equal, steps[0], again))
        maps += [sigma for batch in steps for sigma in batch[3]]
    assert len({sigma.numpy().tobytes() for sigma in maps}) == 3 + 8 * len(keys)


@any_map
def test_another_noise_level_is_the_same_everywhere(photos, noise_map):
    dataset = NoisyImageDataset(photos.test[:8], between(noise_map, unclipped=True), stream=3)
    at_one = dataset.at(0.1, 6)
    uniform = NoisyImageDataset(photos.test[:8], GaussianNoise(0.1, unclipped=True), stream=3)
    assert len(at_one) == 6 and at_one.degradation == uniform.degradation
    assert torch.allclose(at_one.sigma(5), torch.tensor(0.1))
    assert torch.allclose(at_one[5][0], uniform[5][0], atol=1e-6)


@pytest.mark.parametrize(
    ("noise", "text"),
    [
        (GaussianNoise(0.2), "σ = 0.2"),
        (GaussianNoise((0.2, 0.2), unclipped=True), "σ = 0.2 (unclipped)"),
        (GaussianNoise((0.05, 0.35), jpeg_share=0.5), "σ = 0.05 to 0.35 (50 % JPEG)"),
        (GaussianNoise((0.01, 25 / 255)), "σ = 0.01 to 25/255"),
        (GaussianNoise(0.123456), "σ = 0.123456"),
        (GaussianNoise((0.05, 0.4), "regions"), "σ = 0.05 to 0.4 (regions)"),
    ],
)
def test_noise_in_words(noise, text):
    assert str(noise) == text


# Reproducible and different -------------------------------------------------------------------


def test_splits_epochs_and_images_have_noise_of_their_own(photos):
    train, val, test = noisy_splits(photos, GaussianNoise())
    val.split = test.split  # the same images, so that only the noise can differ
    assert torch.equal(val[0][1], test[0][1])
    assert not torch.equal(val[0][0], test[0][0])
    grey = NoisyImageDataset(photos.test[[0, 0]])
    assert not torch.equal(grey[0][0], grey[1][0])
    shifted = NoisyImageDataset(photos.test[[0, 0]], stream=1)
    assert not torch.equal(shifted[0][0], grey[1][0])  # stream 1, image 0; stream 0, image 1
    train.split = train.split[[0] * 8]  # one image, so that the order does not matter
    first, again, second, other = (
        next(training_batches(train, 8, seed, epoch))[0]
        for seed, epoch in ((0, 1), (0, 1), (0, 2), (1, 1))
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    assert not torch.equal(first, other)
    steps = [noisy for noisy, _, _ in training_batches(train, 4, seed=0, epoch=1)]
    assert not torch.equal(*steps)


def test_an_epoch_sees_every_image_once(photos):
    split = photos.val[:]
    split.labels = torch.arange(len(split))
    batches = training_batches(NoisyImageDataset(split), 64, seed=0, epoch=3)
    seen = torch.cat([labels for _, _, labels in batches])
    assert not torch.equal(seen, split.labels)
    assert torch.equal(seen.sort().values, split.labels)


def test_lossless_share_is_kept(photos):
    split = photos.train[:1000]
    split.lossless = torch.arange(1000) < 100
    split.labels = split.lossless.long()
    dataset = NoisyImageDataset(split)
    for lossless_share in (0.0, 0.5, 1.0):
        batches = training_batches(dataset, 64, 0, 1, lossless_share)
        labels = torch.cat([labels for _, _, labels in batches])
        assert len(labels) == 1000
        assert labels.double().mean().item() == lossless_share
    split.lossless[:] = True
    assert len(list(training_batches(dataset, 64, 0, 1, lossless_share=1.0))) == 16
    with pytest.raises(ValueError, match="no image is lossy"):
        next(training_batches(dataset, 64, 0, 1, lossless_share=0.5))


def test_images_of_different_sizes_need_a_crop():
    images = [torch.zeros(3, 8, side, dtype=torch.uint8) for side in (8, 12)]
    dataset = NoisyImageDataset(Split(images, torch.zeros(2), torch.ones(2, dtype=torch.bool)))
    with pytest.raises(ValueError, match="need a crop"):
        next(training_batches(dataset, 2, 0, 1))


def test_crops_come_from_every_place_up_to_the_edges():
    image, generator = torch.arange(6 * 7).view(1, 6, 7), torch.Generator().manual_seed(0)
    corners = [int(random_crop(image, 4, generator)[0, 0, 0]) for _ in range(200)]
    assert set(corners) == {7 * top + left for top in range(3) for left in range(4)}


# Its estimate --------------------------------------------------------------------------------


def test_of_large_images_the_middle_is_looked_at(monkeypatch):
    monkeypatch.setattr(tiling, "PROBE", 2)
    assert tiling.center_crop(np.arange(16).reshape(4, 4)).tolist() == [[5, 6], [9, 10]]


def test_texture_is_not_taken_for_noise():
    """A coat and a lawn: wavelets alone see σ = 4 of 255."""
    photograph = skimage.data.camera()[300:492, 100:292, None]
    assert estimate_noise(photograph) < 1.5 / 255
    grainy = photograph / np.float32(255)
    grainy += 0.1 * np.random.default_rng(0).standard_normal(grainy.shape, dtype=np.float32)
    assert estimate_noise(grainy) == pytest.approx(0.1, rel=0.1)


@pytest.mark.parametrize("channels", [1, 3])
def test_parts_without_noise_do_not_hide_it(channels):
    """Such as are clipped, or of one colour, a frame; nor is there any where all is."""
    image = np.full((256, 256, channels), 100, np.uint8)
    noise = np.random.default_rng(0).normal(0, 20, image.shape)
    image = np.clip(image + noise, 0, 255).round().astype(np.uint8)
    image[:150] = 255
    assert estimate_noise(image) == pytest.approx(20 / 255, rel=0.1)
    assert estimate_noise(image[:128]) < 1e-6
    assert estimate_noise(image[:15]) == 0
    assert estimate_noise(image[240:]) == pytest.approx(20 / 255, rel=0.15)
    image[:150] = 128
    assert estimate_noise(image) == pytest.approx(20 / 255, rel=0.1)


@pytest.fixture
def noise():
    return np.random.default_rng(0).standard_normal((192, 192, 3), dtype=np.float32)


@pytest.mark.parametrize("edge", [0, 1])
def test_where_half_of_the_noise_is_clipped_it_does_not_count_unless_all_is_so(noise, edge):
    wall = np.full_like(noise, edge)
    assert estimate_noise((wall + 0.1 * noise).clip(0, 1)) == pytest.approx(0.05, rel=0.1)
    wall[64:] = 0.5
    assert estimate_noise((wall + 0.1 * noise).clip(0, 1)) == pytest.approx(0.1, rel=0.1)


@pytest.mark.parametrize(("share", "counts"), [(0.005, True), (0.03, False)])
def test_blocks_with_a_few_clipped_values_count(noise, share, counts):
    image = 0.5 + 0.1 * noise
    image[:64, :128] = 0.5 + 0.02 * noise[:64, :128]
    image[:64, :128].flat[:: round(1 / share)] = 0
    assert (estimate_noise(image) < 0.06) == counts


def test_grey_noise_reaches_a_model_as_that_of_independent_colours(noise):
    """√3 times as strong as it was, so that their mean is what it was."""
    grey, shown, model = 0.5 + 0.05 * noise[:, :, :1], [], torch.nn.Conv2d(3, 3, 1)
    model.forward = lambda noisy: shown.append(noisy) or (noisy, [])
    assert np.allclose(denoise(model, grey, tile=192), grey, atol=1e-6)
    covariance = np.cov(shown[0][0].flatten(1))
    assert np.allclose(covariance, 3 * 0.05**2 * np.eye(3), atol=0.3 * 0.05**2)


def test_the_noise_of_colours_is_their_mean(noise):
    image = 0.5 + noise * np.float32([0.02, 0.04, 0.12])
    assert estimate_noise(image) == pytest.approx(0.06, rel=0.1)
