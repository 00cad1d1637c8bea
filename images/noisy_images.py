"""Clean images and what has become of them: what training, validation and test see."""

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from common.user_errors import UserError
from images.degradations import Degradation, Draws, GaussianNoise, PairedNoise
from images.image_sources import ImageSource, Split

CROPS_PER_PHOTOGRAPH = 64  # in an epoch, of images that are kept whole


class NoisyImageDataset(torch.utils.data.Dataset):
    """Clean images and what a degradation makes of them: noisy = clamp(clean + σ·N(0, 1), 0, 1).

    Of pairs, [n, 6, h, w] with the noisy image after the true one, see PairedNoise. The images stay
    uint8 tensors on `device`. `dataset[i]` and `batches()` give image i the same noise whatever the
    batch size, the order, the device or the run (validation and test); `training_batches` draw
    fresh noise in every epoch. The number of a stream keeps the noise of the splits apart.

    Raises a ValueError if the images are not uint8 [n, 3, h, w] or a list of [3, h, w].
    """

    def __init__(self, split: Split, degradation=GaussianNoise(), stream=0, device="cpu"):  # noqa: B008, it is frozen
        self.degradation = degradation
        self.full_size = isinstance(split.images, list)  # photographs, of sizes that differ
        tensors = split.images if self.full_size else [split.images]
        for images in tensors:
            if images.dtype != torch.uint8 or images.ndim != (3 if self.full_size else 4):
                raise ValueError(
                    "expected uint8 images of shape [n, 3, h, w] or a list of [3, h, w], got "
                    f"{images.dtype} {list(images.shape)}"
                )
        # Photographs stay where they are: a GPU could not hold many of them.
        images = split.images if self.full_size else split.images.to(device)
        self.split = replace(split, images=images, labels=split.labels.to(device))
        self.stream = stream
        self.device = torch.device(device)

    def to(self, device: torch.device | str) -> "NoisyImageDataset":
        """The same data set on another device."""
        return NoisyImageDataset(self.split, self.degradation, self.stream, device)

    def at(self, noise_level: float, count: int | None = None) -> "NoisyImageDataset":
        """The same images, or the first of them, with noise of another σ, the same everywhere."""
        noise, changes = self.degradation, {"noise_level": noise_level, "noise_map": "uniform"}
        known = isinstance(noise, GaussianNoise)
        noise = replace(noise, **changes) if known else GaussianNoise(**changes)
        return NoisyImageDataset(self.split[:count], noise, self.stream, self.device)

    def __len__(self):
        return len(self.split)

    @property
    def epoch_size(self) -> int:
        """Training samples of an epoch: every image once, but many crops of a whole photograph."""
        return len(self) * (CROPS_PER_PHOTOGRAPH if self.full_size else 1)

    def steps_per_epoch(self, batch_size: int) -> int:
        return math.ceil(self.epoch_size / batch_size)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        """(noisy, clean, label): float32 [3, h, w], of holes 4; [3, h, w] in [0, 1]; int64 []."""
        return tuple(t[0] for t in self._batch_with_own_noise([range(len(self))[index]])[:3])

    def sigma(self, index: int) -> Tensor:
        """σ of the noise of every pixel of image `index`, of holes 1: float32 [3, h, w]."""
        return self._batch_with_own_noise([range(len(self))[index]])[3][0]

    def batches(self, batch_size: int = 64) -> Iterator[tuple[Tensor, ...]]:
        """All images in order, whole ones one by one: (noisy, clean, labels) batches."""
        batch_size = 1 if self.full_size else batch_size
        for start in range(0, len(self), batch_size):
            yield self._batch_with_own_noise(range(len(self))[start : start + batch_size])[:3]

    def _batch_with_own_noise(self, indices):
        clean, normal, uniform = [], [], []
        multiple = self.degradation.multiple
        for index in indices:
            image = self.split.images[index]
            height, width = (side // multiple * multiple for side in image.shape[1:])
            clean.append(image[:, :height, :width])
            generator = np.random.default_rng((self.stream, index))
            normal.append(generator.standard_normal((3, height, width), dtype=np.float32))
            uniform.append(generator.uniform(size=self.degradation.numbers))
        uniform = torch.tensor(np.stack(uniform))
        if self.device.type == "mps":  # which has no float64
            uniform = uniform.float()
        draws = Draws(torch.from_numpy(np.stack(normal)).to(self.device), uniform.to(self.device))
        clean = torch.stack(clean).to(self.device).float() / 255
        return self.degraded(clean, draws, torch.tensor(indices))

    def degraded(self, clean: Tensor, draws: Draws, indices: Tensor) -> tuple[Tensor, ...]:
        """(noisy, clean, labels, σ of every pixel [n, 3, h, w]) of images of these indices."""
        noisy, sigma = self.degradation(clean, draws)
        clean = clean[:, :3]  # of pairs, which are both in one
        labels = self.split.labels[indices.to(self.device)]
        return noisy, clean, labels, sigma.expand_as(clean)


def noisy_splits(source: ImageSource, degradation: Degradation, lossless_share=None) -> tuple:
    """(train, val, test) NoisyImageDatasets with noise of their own; None where a split is missing.

    Pairs keep the noise that they have, whatever the degradation of the others. With a
    lossless_share, validation is left to the losslessly stored images; raises a UserError if there
    are not both kinds of files.
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
        split and NoisyImageDataset(split, PairedNoise() if split.paired else degradation, stream)
        for stream, split in enumerate((train, val, test))
    )
