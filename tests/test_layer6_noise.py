"""Layer 6, noise: it repeats, differs where it must, and comes with every image once."""

import numpy as np
import pytest
import skimage.data
import torch

from experiment.tiling import estimate_noise
from images.degradations import DRAWS, GaussianNoise
from images.image_sources import Split
from images.noisy_images import NoisyImageDataset, noisy_splits

LOW, HIGH = 0.05, 0.4
any_map = pytest.mark.parametrize("noise_map", DRAWS)


def between(noise_map, unclipped=False):
    return GaussianNoise((LOW, HIGH), noise_map, unclipped)


def of_evaluation(dataset):
    """(noisy, clean, σ) of all images, with their own noise."""
    noisy, clean, _ = next(dataset.batches(len(dataset)))
    return noisy, clean, torch.stack([dataset.sigma(i) for i in range(len(dataset))])


def of_training(dataset):
    """(noisy, clean, σ) of all images, mirrored, with fresh noise."""
    how = {"seed": 0, "epoch": 1, "flip": True, "with_sigma": True}
    noisy, clean, _, sigma = next(dataset.shuffled_batches(len(dataset), **how))
    return noisy, clean, sigma


both_kinds = pytest.mark.parametrize("draw", [of_evaluation, of_training])


@pytest.fixture(scope="module")
def oblong(photos):
    """A function(map) that gives 256 images of 24 rows and 32 columns with noise of it."""
    split = photos.train[:256]
    split.images = split.images[:, :, :24]
    return lambda noise_map: NoisyImageDataset(split, degradation=between(noise_map, True))


# One σ for an image --------------------------------------------------------------------------


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


@pytest.mark.parametrize("level", [(0.2, 0.2), (LOW, HIGH)])
def test_noise_of_one_sigma_is_what_it_always_was(photos, level):
    """Recomputed by hand: figures of trainings and checkpoints rest on it."""

    def generator(*key):
        seed = np.random.SeedSequence(key).generate_state(1)[0]
        return torch.Generator().manual_seed(int(seed))

    low, high = level
    dataset = NoisyImageDataset(photos.train[:40], level, stream=1)
    images = dataset.split.images.float() / 255
    for index in range(40):
        own = np.random.default_rng((1, index))
        noise = own.standard_normal((3, 32, 32), dtype=np.float32)
        sigma = np.float32(low * (high / low) ** own.uniform())
        expected = (torch.from_numpy(noise * sigma) + images[index]).clamp(0, 1)
        assert torch.equal(dataset[index][0], expected)
    order = torch.randperm(40, generator=generator(5, 3)).split(16)
    for step, (noisy, clean, _) in enumerate(dataset.shuffled_batches(16, seed=5, epoch=3)):
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
    first, other = (
        NoisyImageDataset(same, stream=n, degradation=between("regions")) for n in (0, 1)
    )
    maps = [first.sigma(0), first.sigma(1), other.sigma(0)]
    keys = [(0, 1), (0, 2), (1, 1)]  # of seed and epoch
    for key in keys:
        steps = list(first.shuffled_batches(4, *key, with_sigma=True))
        again = next(first.shuffled_batches(4, *key, with_sigma=True))
        assert all(map(torch.equal, steps[0], again))
        maps += [sigma for batch in steps for sigma in batch[3]]
    assert len({sigma.numpy().tobytes() for sigma in maps}) == 3 + 8 * len(keys)


@any_map
def test_other_devices_levels_and_counts_keep_the_map(photos, noise_map):
    dataset = NoisyImageDataset(photos.test[:8], stream=3, degradation=between(noise_map, True))
    assert torch.equal(dataset.to("cpu")[5][0], dataset[5][0])
    fewer = dataset.at((2 * LOW, 2 * HIGH), 6)
    assert len(fewer) == 6 and fewer.degradation.noise_map == noise_map
    assert torch.allclose(fewer.sigma(5), 2 * dataset.sigma(5))
    noise = GaussianNoise(0.1, unclipped=True)
    uniform = NoisyImageDataset(photos.test[:8], stream=3, degradation=noise)
    one = dataset.at(0.1)
    assert torch.allclose(one.sigma(5), torch.tensor(0.1))
    assert torch.allclose(one[5][0], uniform[5][0], atol=1e-6)
    assert str(one.degradation) == "σ = 0.1 (unclipped)"


@pytest.mark.parametrize(
    ("noise_level", "noise_map", "text"),
    [
        (0.2, "uniform", "σ = 0.2"),
        ((0.2, 0.2), "uniform", "σ = 0.2"),
        ((0.2, 0.2), "regions", "σ = 0.2"),
        ((0.05, 0.35), "uniform", "σ = 0.05 to 0.35"),
        ((0.01, 25 / 255), "uniform", "σ = 0.01 to 25/255"),
        ((0.123456, 0.123456), "uniform", "σ = 0.123456"),
        ((0.05, 0.4), "regions", "σ = 0.05 to 0.4 (regions)"),
    ],
)
def test_noise_in_words(noise_level, noise_map, text):
    assert str(GaussianNoise(noise_level, noise_map)) == text


# Reproducible and different -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("level", "noise_map"), [(0.2, "uniform"), *(((LOW, HIGH), noise_map) for noise_map in DRAWS)]
)
def test_evaluation_noise_is_the_same_for_any_batch_size(photos, level, noise_map):
    noise = GaussianNoise(level, noise_map)
    dataset = NoisyImageDataset(photos.test[:50], stream=2, degradation=noise)
    whole = torch.cat([noisy for noisy, _, _ in dataset.batches(50)])
    for size in (1, 7, 64):
        assert torch.equal(torch.cat([noisy for noisy, _, _ in dataset.batches(size)]), whole)
    assert torch.equal(dataset[33][0], whole[33])
    assert torch.equal(dataset[-1][0], whole[-1])


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
    split.lossless[:] = True
    assert len(list(NoisyImageDataset(split).shuffled_batches(64, 0, 1, lossless_share=1.0))) == 16
    with pytest.raises(ValueError, match="no image is lossy"):
        next(dataset.shuffled_batches(64, 0, 1, lossless_share=0.5))


def test_images_of_different_sizes_need_a_crop():
    images = [torch.zeros(3, 8, side, dtype=torch.uint8) for side in (8, 12)]
    dataset = NoisyImageDataset(Split(images, torch.zeros(2), torch.ones(2, dtype=torch.bool)))
    with pytest.raises(ValueError, match="need a crop"):
        next(dataset.shuffled_batches(2, 0, 1))


# Its estimate --------------------------------------------------------------------------------


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
