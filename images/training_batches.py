"""What training steps are shown: shuffled batches, cropped and mirrored, with fresh noise."""

import itertools
import time
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from images.degradations import Draws
from images.noisy_images import NoisyImageDataset

LUMA = (0.299, 0.587, 0.114)  # of red, green and blue, ITU-R BT.601
RESIZED = 0.75  # of the crops, with `resize`
CROP_STREAM = 1  # keeps the places of crops apart from the noise
SECONDS_PER_LINE = 30  # where there is no terminal for a bar
STEPS_PER_READ = 50  # reading a loss for the progress bar makes the CPU wait for a GPU


def training_batches(
    dataset: NoisyImageDataset,
    batch_size: int,
    seed: int,
    epoch: int,
    lossless_share: float | None = None,
    flip: bool = False,
    transpose: bool = False,
    crop: int | None = None,
    resize: tuple | None = None,
    gray_share: float = 0.0,
    with_sigma: bool = False,
    share: tuple[int, int] = (0, 1),
) -> Iterator[tuple[Tensor, ...]]:
    """One epoch of training: (noisy, clean, labels) batches, shuffled, with fresh noise.

    Order and noise depend on (seed, epoch, step) alone, so that a run can go on from any epoch as
    if it had never stopped. The order is the same on every device, the noise on every device of
    one model. The last batch may be smaller.

    Args:
        lossless_share, flip, transpose, crop, resize, gray_share: as of a Recipe; RESIZED of the
            crops are resized.
        with_sigma: yield σ of every pixel, float32 [n, 3, h, w], as the fourth of a batch.
        share: (number, processes): of the whole batches, every so many-th image from that on; all
            processes together yield what one would.

    Raises a ValueError if there is no image of a kind or size that is asked for.
    """
    if dataset.full_size and not crop:
        raise ValueError("images of sizes that differ need a crop")
    # A generator of (seed, epoch) gives the numbers of (seed, epoch, 0): the order shares those of
    # the first step's noise. They mean other things, and shipped models were trained so.
    order = shuffled_order(dataset, generator_of(seed, epoch), lossless_share)
    number, processes = share
    own = slice(number, None, processes)
    for step, indices in enumerate(order.split(batch_size)):
        if processes > 1 and len(indices) < batch_size:
            continue
        # Random numbers are drawn for the whole batch, or they would depend on the processes.
        if crop:
            places = generator_of(seed, epoch, step, CROP_STREAM)
            images = [dataset.split.images[index] for index in indices.tolist()]
            crops = [random_crop(image, crop, places, resize) for image in images]
            clean = torch.stack(crops[own]).to(dataset.device)
        else:
            clean = dataset.split.images[indices[own].to(dataset.device)]
        clean = clean.float() / 255
        generator = generator_of(seed, epoch, step, device=dataset.device)
        here = {"generator": generator, "device": dataset.device}
        normal = torch.randn(len(indices), *clean.shape[1:], **here)[own]
        uniform = torch.rand(len(indices), dataset.degradation.numbers, **here)[own]
        changes = [(0.5, lambda x: x.flip(3))] if flip else []
        changes += [(0.5, lambda x: x.flip(2)), (0.5, lambda x: x.mT)] if transpose else []
        changes += [(gray_share, as_gray)] if gray_share else []
        for chance, changed in changes:
            chosen = torch.rand(len(indices), **here)[own] < chance
            clean = torch.where(chosen.view(-1, 1, 1, 1), changed(clean), clean)
        batch = dataset.degraded(clean, Draws(normal, uniform), indices[own])
        yield batch if with_sigma else batch[:3]


def with_progress(
    batches: Iterator[tuple], sums: Tensor, title: str, first: int, count: int, silent: bool = False
) -> Iterator[tuple[int, tuple]]:
    """(step, batch) of at most `count` batches from step `first` on, with a bar on a terminal.

    To the first value of sums, float32 [2], the caller adds each batch's squared errors.
    """
    looks = {"unit": "step", "leave": False, "dynamic_ncols": True}
    hidden = silent or None  # None: where there is no terminal
    bar = tqdm(itertools.islice(batches, count), title, count, disable=hidden, **looks)
    images, told = 0, time.monotonic()
    for step, batch in enumerate(bar, 1):
        yield first + step - 1, batch
        images += len(batch[0])
        if not bar.disable and step % STEPS_PER_READ == 0:
            bar.set_postfix_str(f"mse {sums[0].item() / images:.4f}")
        if bar.disable and not silent and time.monotonic() - told > SECONDS_PER_LINE:
            print(f"{title}: step {step} of {count}", flush=True)
            told = time.monotonic()


def random_crop(
    image: Tensor, size: int, generator: torch.Generator, resize: tuple | None = None
) -> Tensor:
    """uint8 [3, h, w] -> [3, size, size], scaled where `resize` asks for it."""
    height, width = image.shape[1:]
    side = size
    if resize and torch.rand((), generator=generator) < RESIZED:
        low, high = resize
        scale = low * (high / low) ** torch.rand((), generator=generator).item()
        side = min(round(size / scale), height, width)
    top = torch.randint(height - side + 1, (), generator=generator)
    left = torch.randint(width - side + 1, (), generator=generator)
    part = image[:, top : top + side, left : left + side]
    if side == size:
        return part
    # Bicubic, as cameras and editors do, smoothed first where it becomes smaller.
    return F.interpolate(part[None], (size, size), mode="bicubic", antialias=True)[0]


def shuffled_order(dataset: NoisyImageDataset, generator, lossless_share: float | None) -> Tensor:
    """Indices of the images of an epoch, int64 [epoch_size]."""
    total = dataset.epoch_size
    if lossless_share is None:
        return torch.randperm(total, generator=generator) % len(dataset)
    drawn, wanted = [], round(lossless_share * total)
    for stored_lossless, count in ((True, wanted), (False, total - wanted)):
        pool = (dataset.split.lossless == stored_lossless).nonzero().flatten()
        if count and not len(pool):
            raise ValueError(f"no image is {'lossless' if stored_lossless else 'lossy'}")
        while count > 0:  # a pool smaller than its part is gone through again
            drawn.append(pool[torch.randperm(len(pool), generator=generator)][:count])
            count -= len(drawn[-1])
    drawn = torch.cat(drawn)
    return drawn[torch.randperm(len(drawn), generator=generator)]


def as_gray(images: Tensor) -> Tensor:
    """[n, 3, h, w] -> the same with the luma of each pixel in all three colours."""
    luma = torch.tensordot(images, torch.tensor(LUMA).to(images), ([1], [0]))
    return luma.unsqueeze(1).expand_as(images)


def generator_of(*key: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A torch generator seeded by several numbers, mixed by numpy's SeedSequence."""
    seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    return torch.Generator(device).manual_seed(seed)
