"""Clean images with Gaussian noise: what training, validation and test see."""

import math

import numpy as np
import torch

from experiment.image_sources import Split
from experiment.user_errors import UserError

CROPS_PER_PHOTOGRAPH = 64  # in an epoch, of images that are kept whole
CROP_STREAM = 1  # keeps the places of crops apart from the noise
# How σ differs over an image, see `sigma_map`, and the random numbers that this takes.
DRAWS = {"uniform": 1, "regions": 4, "ramp": 1, "signal": 1}


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
        noise_map: of DRAWS: how σ differs over an image, between the two of noise_level.

    Raises:
        ValueError: noise_level is negative or no such pair, or the images are not uint8
            [n, 3, h, w] or a list of [3, h, w].
    """

    def __init__(
        self, split, noise_level=0.2, stream=0, device="cpu", clipped=True, noise_map="uniform"
    ):
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
        self.noise_map = noise_map

    def to(self, device):
        """The same data set on another device."""
        how = (self.noise_range, self.stream, device, self.clipped, self.noise_map)
        return NoisyImageDataset(self.split, *how)

    def at(self, noise_level, count=None):
        """The same images, or the first of them, with noise of another σ."""
        how = (noise_level, self.stream, self.device, self.clipped, self.noise_map)
        return NoisyImageDataset(self.split[:count], *how)

    @property
    def noise_text(self):
        """Its noise in words: "σ = 0.2", "σ = 0.05 to 0.35", "σ = 0.05 to 0.4 (regions)"."""
        return noise_text(self.noise_range, self.noise_map)

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
        return tuple(t[0] for t in self._batch_with_own_noise(range(index, index + 1))[:3])

    def sigma(self, index):
        """σ of the noise of every pixel of image `index`: float32 [3, h, w]."""
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
            numbers = torch.rand(len(clean), DRAWS[self.noise_map], **here)
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
            while count > 0:  # a pool smaller than its part is gone through again
                drawn.append(pool[torch.randperm(len(pool), generator=generator)][:count])
                count -= len(drawn[-1])
        drawn = torch.cat(drawn)
        return drawn[torch.randperm(len(drawn), generator=generator)]

    def _batch_with_own_noise(self, indices):
        noise, numbers = [], []
        clean = torch.stack([self.split.images[index] for index in indices]).float() / 255
        for index in indices:
            generator = np.random.default_rng((self.stream, index))
            noise.append(generator.standard_normal(clean.shape[1:], dtype=np.float32))
            numbers.append(generator.uniform(size=DRAWS[self.noise_map]))
        noise = torch.from_numpy(np.stack(noise)).to(self.device)
        return self._add(noise, torch.tensor(np.stack(numbers)), clean, torch.tensor(indices))

    def _add(self, noise, numbers, clean, indices):
        sigma = sigma_map(self.noise_map, clean, self.noise_range, numbers.to(clean.device)).float()
        noisy = noise.mul_(sigma).add_(clean)
        noisy = noisy.clamp_(0, 1) if self.clipped else noisy
        labels = self.split.labels[indices.to(self.device)]
        return noisy, clean, labels, sigma.expand_as(clean)


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


def sigma_map(kind, clean, noise_range, uniform):
    """The standard deviation of the noise of every pixel, between the two values of a range.

    Args:
        kind: "uniform", one σ for an image, see `draw_sigma`; "regions", the higher one in a
            rectangle of a sixth to a half of the image, the lower one around it; "ramp", from one
            to the other in a random direction, evenly in octaves; "signal", a variance that grows
            with the light as that of a sensor, σ² = low² + (high² - low²) · clean ("Practical
            Poissonian-Gaussian noise modeling", Foi et al. 2008).
        clean: [n, 3, h, w] in [0, 1].
        noise_range: (low, high).
        uniform: numbers in [0, 1), [n, DRAWS[kind]].

    Returns:
        [n, 1, 1, 1], [n, 1, h, w] or, for "signal", [n, 3, h, w].
    """
    low, high = noise_range
    first, *others = uniform[:, :, None, None, None].unbind(1)  # each [n, 1, 1, 1]
    if kind == "uniform":
        return draw_sigma(first, noise_range)
    if kind == "signal":
        return (low**2 + (high**2 - low**2) * clean).sqrt()
    y, x = (((torch.arange(n, device=clean.device) + 0.5) / n) for n in clean.shape[2:])
    y = y[:, None]  # from the top edge, 0, to the bottom, 1
    if kind == "ramp":
        along, across = (2 * math.pi * first).cos(), (2 * math.pi * first).sin()
        place = (along * (x - 0.5) + across * (y - 0.5)) / (along.abs() + across.abs()) + 0.5
        return low * (high / low) ** place if high > low else low + 0 * place
    area, (stretch, top, left) = 1 / 6 + first / 3, others
    height = area.sqrt() * 2 ** (stretch - 0.5)  # at most 1, as the width is
    width = area / height
    top, left = top * (1 - height), left * (1 - width)
    inside = (y >= top) & (y < top + height) & (x >= left) & (x < left + width)
    return torch.where(inside, high, low)


def noise_text(noise_range, noise_map="uniform"):
    """A range of σ in words: "σ = 0.2", "σ = 0.05 to 0.35", "σ = 0.05 to 0.4 (regions)"."""
    low, high = noise_range
    of_map = f" ({noise_map})" if noise_map != "uniform" and high > low else ""
    return f"σ = {low:g}" + (f" to {high:g}" if high > low else "") + of_map


def _generator(*key, device="cpu"):
    """A torch generator seeded by several numbers, mixed by numpy's SeedSequence."""
    seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    return torch.Generator(device).manual_seed(seed)


def noisy_splits(source, noise_level, lossless_share=None, clipped=True, noise_map="uniform"):
    """(train, val, test) NoisyImageDatasets of an image source, with noise of their own.

    With a lossless_share, validation is left to the losslessly stored images. A split that the
    source does not have is None.

    Raises:
        UserError: a lossless_share is given, but there are not both kinds of files; or a noise_map
            that needs a range of σ, but one σ alone.
    """
    low, high = as_range(noise_level)
    if noise_map != "uniform" and not low < high:
        raise UserError(
            f"--noise-map {noise_map} lies between two values of σ; give --noise-level LOW HIGH"
        )
    train, val, test = source.train, source.val, source.test
    if lossless_share is not None:
        if any(split.lossless.all() or not split.lossless.any() for split in (train, val)):
            raise UserError(
                f"--lossless-share: {source.name} does not mix lossless and lossy files in "
                "training and validation; drop the option"
            )
        val = val[val.lossless]
    return tuple(
        split and NoisyImageDataset(split, noise_level, stream, "cpu", clipped, noise_map)
        for stream, split in enumerate((train, val, test))
    )
