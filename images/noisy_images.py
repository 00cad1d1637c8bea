"""Clean images and what has become of them: what training, validation and test see."""

import math
from dataclasses import replace

import numpy as np
import torch

from common.user_errors import UserError
from images.degradations import GaussianNoise
from images.image_sources import Split

CROPS_PER_PHOTOGRAPH = 64  # in an epoch, of images that are kept whole
CROP_STREAM = 1  # keeps the places of crops apart from the noise


class NoisyImageDataset(torch.utils.data.Dataset):
    """Clean images and their noisy versions: noisy = clamp(clean + σ·N(0, 1), 0, 1).

    Or, with a `degradation`, what that makes of them.

    The images stay uint8 tensors on `device`, where training draws its noise, too. There are two
    kinds of noise, both reproducible: `dataset[i]` and `batches()` give image i the same noise
    whatever the batch size, the order, the device or the run (validation and test);
    `shuffled_batches(epoch)` draws fresh noise in every epoch (training).

    Args:
        split: image_sources.Split.
        noise_level: σ, at least 0, for pixel values in [0, 1]; or a pair (low, high), low above 0,
            from which every image draws a σ of its own, see `draw_sigma`.
        stream: a number that keeps the noise of one split apart from that of another.
        device: torch.device of the images and of all that the data set yields.
        degradation: of degradations.py, in place of noise of that level.

    Raises:
        ValueError: noise_level is negative or no such pair, or the images are not uint8
            [n, 3, h, w] or a list of [3, h, w].
    """

    def __init__(self, split, noise_level=0.2, stream=0, device="cpu", degradation=None):
        self.degradation = degradation or GaussianNoise(noise_level)
        self.whole = isinstance(split.images, list)
        for images in split.images if self.whole else [split.images]:
            if images.dtype != torch.uint8 or images.ndim != (3 if self.whole else 4):
                raise ValueError(
                    "expected uint8 images of shape [n, 3, h, w] or a list of [3, h, w], got "
                    f"{images.dtype} {list(images.shape)}"
                )
        images = split.images
        images = [image.to(device) for image in images] if self.whole else images.to(device)
        self.split = Split(images, split.labels.to(device), split.lossless)
        self.stream = stream
        self.device = torch.device(device)

    def to(self, device):
        """The same data set on another device."""
        return NoisyImageDataset(self.split, None, self.stream, device, self.degradation)

    def at(self, noise_level, count=None):
        """The same images, or the first of them, with noise of another σ."""
        noise = replace(self.degradation, noise_level=noise_level)
        return NoisyImageDataset(self.split[:count], None, self.stream, self.device, noise)

    def __len__(self):
        return len(self.split)

    @property
    def epoch_size(self):
        """Training samples of an epoch: every image once, but many crops of a whole photograph."""
        return len(self) * (CROPS_PER_PHOTOGRAPH if self.whole else 1)

    def steps_per_epoch(self, batch_size):
        return math.ceil(self.epoch_size / batch_size)

    def __getitem__(self, index):
        """(noisy, clean, label): float32 [3, h, w], of holes [4, h, w]; float32 [3, h, w] in
        [0, 1]; a scalar int64.
        """
        index = range(len(self))[index]
        return tuple(t[0] for t in self._batch_with_own_noise(range(index, index + 1))[:3])

    def sigma(self, index):
        """σ of the noise of every pixel of image `index`, of holes 1: float32 [3, h, w]."""
        index = range(len(self))[index]
        return self._batch_with_own_noise(range(index, index + 1))[3][0]

    def batches(self, batch_size=64):
        """All images in order, each with its own noise: (noisy, clean, labels) batches.

        Images that are kept whole come one by one.
        """
        batch_size = 1 if self.whole else batch_size
        for start in range(0, len(self), batch_size):
            yield self._batch_with_own_noise(range(start, min(start + batch_size, len(self))))[:3]

    def shuffled_batches(
        self,
        batch_size,
        seed,
        epoch,
        lossless_share=None,
        flip=False,
        transpose=False,
        crop=None,
        with_sigma=False,
    ):
        """One epoch of training: (noisy, clean, labels) batches, shuffled, with fresh noise.

        Order and noise depend on (seed, epoch, step) alone, so that a run can go on from any epoch
        as if it had never stopped. The order is the same on every device, the noise on every device
        of one model.

        Args:
            batch_size: images per batch; the last batch may be smaller.
            seed: of order and noise.
            epoch: number of the epoch.
            lossless_share: part of the epoch's samples to draw from losslessly stored images;
                None takes every image once.
            flip: mirror each image left to right with probability 1/2.
            transpose: turn each image upside down, and then swap its axes, each with probability
                1/2; with `flip`, all eight symmetries occur. For square images.
            crop: side of the random crops to take; None takes whole images, which must be of one
                size.
            with_sigma: yield σ of every pixel, float32 [n, 3, h, w], as the fourth of a batch.

        Raises:
            ValueError: there is no image of a kind that the lossless_share asks for, or images of
                different sizes are to be taken whole.
        """
        if self.whole and not crop:
            raise ValueError("images of sizes that differ need a crop")
        order = self._order(_generator(seed, epoch), lossless_share)
        for step, indices in enumerate(order.split(batch_size)):
            if crop:
                places = _generator(seed, epoch, step, CROP_STREAM)
                clean = torch.stack([self._crop(i, crop, places) for i in indices.tolist()])
            else:
                clean = self.split.images[indices.to(self.device)]
            clean = clean.float() / 255
            generator = _generator(seed, epoch, step, device=self.device)
            here = {"generator": generator, "device": self.device}
            noise = torch.randn(clean.shape, **here)
            numbers = torch.rand(len(clean), self.degradation.numbers, **here)
            if flip:
                clean = half_of_them(clean, clean.flip(3), **here)
            if transpose:
                clean = half_of_them(clean, clean.flip(2), **here)
                clean = half_of_them(clean, clean.transpose(2, 3), **here)
            batch = self._add(noise, numbers, clean, indices)
            yield batch if with_sigma else batch[:3]

    def _crop(self, index, size, generator):
        image = self.split.images[index]
        height, width = image.shape[1:]
        top = torch.randint(height - size + 1, (), generator=generator)
        left = torch.randint(width - size + 1, (), generator=generator)
        return image[:, top : top + size, left : left + size]

    def _order(self, generator, lossless_share):
        total = self.epoch_size
        if lossless_share is None:
            return torch.randperm(total, generator=generator) % len(self)
        wanted = round(lossless_share * total)
        drawn = []
        for stored_lossless, count in ((True, wanted), (False, total - wanted)):
            pool = (self.split.lossless == stored_lossless).nonzero().flatten()
            if count and not len(pool):
                raise ValueError(f"no image is {'lossless' if stored_lossless else 'lossy'}")
            while count > 0:  # a pool smaller than its part is gone through again
                drawn.append(pool[torch.randperm(len(pool), generator=generator)][:count])
                count -= len(drawn[-1])
        drawn = torch.cat(drawn)
        return drawn[torch.randperm(len(drawn), generator=generator)]

    def _batch_with_own_noise(self, indices):
        noise, numbers = [], []
        multiple = self.degradation.multiple
        height, width = (n // multiple * multiple for n in self.split.images[indices[0]].shape[1:])
        images = [self.split.images[index][:, :height, :width] for index in indices]
        clean = torch.stack(images).float() / 255
        for index in indices:
            generator = np.random.default_rng((self.stream, index))
            noise.append(generator.standard_normal(clean.shape[1:], dtype=np.float32))
            numbers.append(generator.uniform(size=self.degradation.numbers))
        noise = torch.from_numpy(np.stack(noise)).to(self.device)
        return self._add(noise, torch.tensor(np.stack(numbers)), clean, torch.tensor(indices))

    def _add(self, noise, numbers, clean, indices):
        if clean.device.type == "mps":  # which has no float64
            numbers = numbers.float()
        noisy, sigma = self.degradation(clean, noise, numbers.to(clean.device))
        labels = self.split.labels[indices.to(self.device)]
        return noisy, clean, labels, sigma.expand_as(clean)


def half_of_them(images, others, **generator):
    """[n, 3, h, w] twice -> the same: of each image, by chance, the first or the second."""
    chosen = torch.rand(len(images), **generator) < 0.5
    return torch.where(chosen.view(-1, 1, 1, 1), others, images)


def _generator(*key, device="cpu"):
    """A torch generator seeded by several numbers, mixed by numpy's SeedSequence."""
    seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    return torch.Generator(device).manual_seed(seed)


def noisy_splits(source, degradation, lossless_share=None):
    """(train, val, test) NoisyImageDatasets of an image source, with random numbers of their own.

    With a lossless_share, validation is left to the losslessly stored images. A split that the
    source does not have is None.

    Raises:
        UserError: a lossless_share is given, but there are not both kinds of files.
    """
    train, val, test = source.train, source.val, source.test
    if lossless_share is not None:
        if any(split.lossless.all() or not split.lossless.any() for split in (train, val)):
            raise UserError(
                f"--lossless-share: {source.name} does not mix lossless and lossy files in "
                "training and validation; drop the option"
            )
        val = val[val.lossless]
    return tuple(
        split and NoisyImageDataset(split, stream=stream, degradation=degradation)
        for stream, split in enumerate((train, val, test))
    )
