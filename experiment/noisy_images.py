"""Clean images with Gaussian noise: what training, validation and test see."""

import numpy as np
import torch

from experiment.image_sources import Split
from experiment.user_errors import UserError


class NoisyImageDataset(torch.utils.data.Dataset):
    """Clean images and their noisy versions: noisy = clamp(clean + σ·N(0, 1), 0, 1).

    The images stay one uint8 tensor on `device`, where training draws its noise, too. There are two
    kinds of noise, both reproducible: `dataset[i]` and `batches()` give image i the same noise
    whatever the batch size, the order, the device or the run (validation and test);
    `shuffled_batches(epoch)` draws fresh noise in every epoch (training).

    Args:
        split: image_sources.Split.
        noise_level: σ, at least 0, for pixel values in [0, 1]; or a pair (low, high), low above 0,
            from which every image draws a σ of its own, see `draw_sigma`.
        stream: a number that keeps the noise of one split apart from that of another.
        device: torch.device of the images and of all that the data set yields.

    Raises:
        ValueError: noise_level is negative or no such pair, or the images are not uint8
            [n, 3, h, w].
    """

    def __init__(self, split, noise_level=0.2, stream=0, device="cpu"):
        low, high = as_range(noise_level)
        if not 0 <= low <= high or low == 0 < high:
            raise ValueError(
                "noise_level must be a σ of at least 0 or a range that ascends from above 0, "
                f"got {noise_level}"
            )
        if split.images.dtype != torch.uint8 or split.images.ndim != 4:
            raise ValueError(
                "expected uint8 images of shape [n, 3, h, w], got "
                f"{split.images.dtype} {list(split.images.shape)}"
            )
        self.split = Split(split.images.to(device), split.labels.to(device), split.lossless)
        self.noise_range = (low, high)
        self.stream = stream
        self.device = torch.device(device)

    def to(self, device):
        """The same data set on another device."""
        return NoisyImageDataset(self.split, self.noise_range, self.stream, device)

    def __len__(self):
        return len(self.split)

    def __getitem__(self, index):
        """(noisy, clean, label): float32 [3, h, w] in [0, 1] twice, and a scalar int64."""
        index = range(len(self))[index]
        return tuple(t[0] for t in self._batch_with_own_noise(range(index, index + 1)))

    def batches(self, batch_size=64):
        """All images in order, each with its own noise: (noisy, clean, labels) batches."""
        for start in range(0, len(self), batch_size):
            yield self._batch_with_own_noise(range(start, min(start + batch_size, len(self))))

    def shuffled_batches(self, batch_size, seed, epoch, lossless_share=None, flip=False):
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
        """
        order = self._order(_generator(seed, epoch), lossless_share).to(self.device)
        for step, indices in enumerate(order.split(batch_size)):
            generator = _generator(seed, epoch, step, device=self.device)
            here = {"generator": generator, "device": self.device}
            noise = torch.randn((len(indices), *self.split.images.shape[1:]), **here)
            sigma = draw_sigma(torch.rand(len(indices), **here), self.noise_range)
            mirrored = torch.rand(len(indices), **here) < 0.5 if flip else None
            yield self._add(noise, sigma, indices, mirrored)

    def _order(self, generator, lossless_share):
        if lossless_share is None:
            return torch.randperm(len(self), generator=generator)
        wanted = round(lossless_share * len(self))
        drawn = []
        for stored_lossless, count in ((True, wanted), (False, len(self) - wanted)):
            pool = (self.split.lossless == stored_lossless).nonzero().flatten()
            while count > 0:  # a pool smaller than its part is gone through again
                drawn.append(pool[torch.randperm(len(pool), generator=generator)][:count])
                count -= len(drawn[-1])
        drawn = torch.cat(drawn)
        return drawn[torch.randperm(len(drawn), generator=generator)]

    def _batch_with_own_noise(self, indices):
        noise, sigma = [], []
        for index in indices:
            generator = np.random.default_rng((self.stream, index))
            shape = self.split.images.shape[1:]
            noise.append(generator.standard_normal(shape, dtype=np.float32))
            sigma.append(draw_sigma(generator.uniform(), self.noise_range))
        noise = torch.from_numpy(np.stack(noise)).to(self.device)
        sigma = torch.tensor(sigma, dtype=torch.float32, device=self.device)
        return self._add(noise, sigma, torch.tensor(indices, device=self.device))

    def _add(self, noise, sigma, indices, mirrored=None):
        clean = self.split.images[indices].float() / 255
        if mirrored is not None:
            clean = torch.where(mirrored.view(-1, 1, 1, 1), clean.flip(3), clean)
        noisy = noise.mul_(sigma.view(-1, 1, 1, 1)).add_(clean).clamp_(0, 1)
        return noisy, clean, self.split.labels[indices]


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


def noisy_splits(source, noise_level, lossless_share=None):
    """(train, val, test) NoisyImageDatasets of an image source, with noise of their own.

    With a lossless_share, validation is left to the losslessly stored images.

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
        NoisyImageDataset(split, noise_level, stream)
        for stream, split in enumerate((train, val, test))
    )
