"""Clean images with Gaussian noise: what training, validation and test see."""

import math

import numpy as np
import torch

from experiment.image_sources import Split
from experiment.user_errors import UserError

CROPS_PER_PHOTOGRAPH = 64  # in an epoch, of images that are kept whole
CROP_STREAM = 1  # keeps the places of crops apart from the noise


class NoisyImageDataset(torch.utils.data.Dataset):
    """Clean images and their noisy versions: noisy = clamp(clean + σ·N(0, 1), 0, 1).

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
        clipped: clamp the noisy images to [0, 1]; the field's benchmarks on photographs do not.

    Raises:
        ValueError: noise_level is negative or no such pair, or the images are not uint8
            [n, 3, h, w] or a list of [3, h, w].
    """

    def __init__(self, split, noise_level=0.2, stream=0, device="cpu", clipped=True):
        low, high = as_range(noise_level)
        if not 0 <= low <= high or low == 0 < high:
            raise ValueError(
                "noise_level must be a σ of at least 0 or a range that ascends from above 0, "
                f"got {noise_level}"
            )
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
        self.noise_range = (low, high)
        self.stream = stream
        self.device = torch.device(device)
        self.clipped = clipped

    def to(self, device):
        """The same data set on another device."""
        return NoisyImageDataset(self.split, self.noise_range, self.stream, device, self.clipped)

    def at(self, noise_level, count=None):
        """The same images, or the first of them, with noise of another σ."""
        split = self.split[:count]
        return NoisyImageDataset(split, noise_level, self.stream, self.device, self.clipped)

    def __len__(self):
        return len(self.split)

    @property
    def epoch_size(self):
        """Training samples of an epoch: every image once, but many crops of a whole photograph."""
        return len(self) * (CROPS_PER_PHOTOGRAPH if self.whole else 1)

    def steps_per_epoch(self, batch_size):
        return math.ceil(self.epoch_size / batch_size)

    def __getitem__(self, index):
        """(noisy, clean, label): float32 [3, h, w] twice, clean in [0, 1], and a scalar int64."""
        index = range(len(self))[index]
        return tuple(t[0] for t in self._batch_with_own_noise(range(index, index + 1)))

    def batches(self, batch_size=64):
        """All images in order, each with its own noise: (noisy, clean, labels) batches.

        Images that are kept whole come one by one.
        """
        batch_size = 1 if self.whole else batch_size
        for start in range(0, len(self), batch_size):
            yield self._batch_with_own_noise(range(start, min(start + batch_size, len(self))))

    def shuffled_batches(
        self, batch_size, seed, epoch, lossless_share=None, flip=False, transpose=False, crop=None
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
        """
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
            sigma = draw_sigma(torch.rand(len(clean), **here), self.noise_range)
            if flip:
                clean = half_of_them(clean, clean.flip(3), **here)
            if transpose:
                clean = half_of_them(clean, clean.flip(2), **here)
                clean = half_of_them(clean, clean.transpose(2, 3), **here)
            yield self._add(noise, sigma, clean, indices)

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
            while count > 0:  # a pool smaller than its part is gone through again
                drawn.append(pool[torch.randperm(len(pool), generator=generator)][:count])
                count -= len(drawn[-1])
        drawn = torch.cat(drawn)
        return drawn[torch.randperm(len(drawn), generator=generator)]

    def _batch_with_own_noise(self, indices):
        noise, sigma = [], []
        clean = torch.stack([self.split.images[index] for index in indices]).float() / 255
        for index in indices:
            generator = np.random.default_rng((self.stream, index))
            noise.append(generator.standard_normal(clean.shape[1:], dtype=np.float32))
            sigma.append(draw_sigma(generator.uniform(), self.noise_range))
        noise = torch.from_numpy(np.stack(noise)).to(self.device)
        sigma = torch.tensor(sigma, dtype=torch.float32, device=self.device)
        return self._add(noise, sigma, clean, torch.tensor(indices))

    def _add(self, noise, sigma, clean, indices):
        noisy = noise.mul_(sigma.view(-1, 1, 1, 1)).add_(clean)
        noisy = noisy.clamp_(0, 1) if self.clipped else noisy
        return noisy, clean, self.split.labels[indices.to(self.device)]


def half_of_them(images, others, **generator):
    """[n, 3, h, w] twice -> the same: of each image, by chance, the first or the second."""
    chosen = torch.rand(len(images), **generator) < 0.5
    return torch.where(chosen.view(-1, 1, 1, 1), others, images)


def as_range(noise_level):
    """(low, high) of a σ or of a pair."""
    return tuple(noise_level) if isinstance(noise_level, tuple | list) else (noise_level,) * 2


def draw_sigma(uniform, noise_range):
    """σ out of numbers that are uniform in [0, 1): the fixed one, or log-uniform in a range.

    Every octave of σ gets as many images as any other. With σ itself uniform, few images have
    little noise, where a model needs most training to come near one trained for that σ alone.
    """
    low, high = noise_range
    return low * (high / low) ** uniform if high > low else low + 0 * uniform


def noise_text(noise_range):
    """A range of σ in words: "σ = 0.2", "σ = 0.05 to 0.35"."""
    low, high = noise_range
    return f"σ = {low:g}" + (f" to {high:g}" if high > low else "")


def _generator(*key, device="cpu"):
    """A torch generator seeded by several numbers, mixed by numpy's SeedSequence."""
    seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    return torch.Generator(device).manual_seed(seed)


def noisy_splits(source, noise_level, lossless_share=None, clipped=True):
    """(train, val, test) NoisyImageDatasets of an image source, with noise of their own.

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
        split and NoisyImageDataset(split, noise_level, stream, clipped=clipped)
        for stream, split in enumerate((train, val, test))
    )
