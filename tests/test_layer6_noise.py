"""Layer 6, noise: it repeats, differs where it must, and comes with every image once."""

import pytest
import torch

from experiment.noisy_images import NoisyImageDataset, noisy_splits


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
