"""What is done to clean images: noise, reduction, holes, compression; functions of random numbers.

A degradation maps clean images [n, 3, h, w] in [0, 1], normal random numbers of that shape and
uniform ones [n, numbers] to the degraded images [n, channels, h, w] and to how damaged each pixel
is, of a shape that expands to that of the clean ones: σ of its noise, 1 in a hole, else 0. Same
numbers, same images.
"""

import io
import math
from dataclasses import dataclass, fields
from functools import partial

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from common.user_errors import UserError

SCALES = (2, 3, 4)
BEST_QUALITY = 95  # of JPEG; above it Pillow's files grow and hardly gain
QUALITY_OF_PHOTOGRAPHS = (75, BEST_QUALITY)  # (least, most) that cameras and editors write
# How σ differs over an image, see `sigma_map`, and the random numbers that this takes.
DRAWS = {"uniform": 1, "regions": 4}


class Degradation:
    """What most of them have in common; their fields are the options of their task."""

    channels = 3  # of the degraded images
    multiple = 1  # of which sides have to be
    numbers = 1  # uniform ones that an image takes


@dataclass(frozen=True)
class GaussianNoise(Degradation):
    """degraded = clamp(clean + σ·N(0, 1), 0, 1), a share of which are then JPEG files.

    Raises:
        ValueError: noise_level is negative, or a pair that does not ascend from above 0 and is not
            twice the same; an unknown noise_map; or a jpeg_share out of 0 … 1.
    """

    noise_level: tuple | float = (0.2, 0.2)  # (low, high) of σ, or one, of values in [0, 1]
    noise_map: str = "uniform"  # of DRAWS: how σ differs over an image
    unclipped: bool = False  # not clamped to [0, 1], as the field's benchmarks on photographs
    # Part of the noisy images, by chance, that have been JPEG files, which clamp as well. They have
    # colours at half resolution: noise is not independent from pixel to pixel any more.
    jpeg_share: float = 0.0

    task = "denoise"

    def __post_init__(self):
        low, high = self.noise_range
        if self.noise_map not in DRAWS:
            raise ValueError(f"noise_map must be of {', '.join(DRAWS)}, got {self.noise_map}")
        if not 0 <= low <= high or low == 0 < high:
            raise ValueError(
                "noise_level must be a σ of at least 0 or a range that ascends from above 0, "
                f"got {self.noise_range}"
            )
        if not 0 <= self.jpeg_share <= 1:
            raise ValueError(f"jpeg_share must be in 0 … 1, got {self.jpeg_share}")

    @property
    def noise_range(self):
        level = self.noise_level
        return tuple(level) if isinstance(level, tuple | list) else (level,) * 2

    @property
    def numbers(self):
        return DRAWS[self.noise_map] + (2 if self.jpeg_share else 0)

    def __str__(self):
        """As "σ = 0.2", "σ = 25/255", "σ = 0.05 to 0.4 (regions)", "σ = 0.2 (50 % JPEG)"."""
        low, high = self.noise_range
        notes = [self.noise_map] if self.noise_map != "uniform" and high > low else []
        notes += [f"{100 * self.jpeg_share:g} % JPEG"] if self.jpeg_share else []
        notes += ["unclipped"] if self.unclipped and self.jpeg_share < 1 else []
        level = in_short(low) + (f" to {in_short(high)}" if high > low else "")
        return f"σ = {level}" + (f" ({', '.join(notes)})" if notes else "")

    def __call__(self, clean, noise, numbers):
        sigma = sigma_map(self.noise_map, clean, self.noise_range, numbers).float()
        noisy = noise * sigma + clean
        noisy = noisy if self.unclipped else noisy.clamp(0, 1)
        if self.jpeg_share:
            chance, number = numbers[:, -2:].unbind(1)
            files = chance < self.jpeg_share
            noisy[files] = through_jpeg(noisy[files], QUALITY_OF_PHOTOGRAPHS, number[files])
        return noisy, sigma


@dataclass(frozen=True)
class SuperResolution(Degradation):
    """Bicubic reduction, antialiased and rounded to 8 bits as a file is, and enlargement again.

    Raises:
        ValueError: the scale is none of SCALES.
    """

    scale: int = 2

    task = "super-resolution"

    def __post_init__(self):
        if self.scale not in SCALES:
            raise ValueError(f"scale must be one of {SCALES}, got {self.scale}")

    @property
    def multiple(self):
        return self.scale

    def __str__(self):
        return f"super-resolution ×{self.scale}"

    def reduced(self, clean):
        """[n, 3, h, w] -> [n, 3, h / scale, w / scale], in 255ths."""
        size = [side // self.scale for side in clean.shape[2:]]
        small = F.interpolate(clean, size, mode="bicubic", antialias=True)
        return (255 * small).round().clamp(0, 255) / 255

    def __call__(self, clean, noise, numbers):
        size = clean.shape[2:]
        large = F.interpolate(self.reduced(clean), size, mode="bicubic", antialias=True)
        return large.clamp(0, 1), clean.new_zeros(1, 1, 1, 1)


@dataclass(frozen=True)
class Holes(Degradation):
    """Rectangles and strokes are unknown: filled by `pull_push`, marked by 0 in a fourth channel.

    Raises:
        ValueError: the shares do not ascend in 0 … MOST_HOLES, without 0.
    """

    holes: tuple = (0.1, 0.4)  # (low, high) of the pixels that are unknown, uniform between them

    task = "inpaint"
    channels = 4

    def __post_init__(self):
        low, high = self.holes
        if not 0 < low <= high <= MOST_HOLES:
            raise ValueError(f"shares must ascend in 0 … {MOST_HOLES}, got {self.holes}")

    def __str__(self):
        return f"holes of {100 * self.holes[0]:g} to {100 * self.holes[1]:g} %"

    def __call__(self, clean, noise, numbers):
        size = clean.shape[2:]
        masks = [draw_mask(size, self.holes, u) for u in numbers.flatten().tolist()]
        known = torch.from_numpy(np.stack(masks)).to(clean).unsqueeze(1)  # [n, 1, h, w]
        return torch.cat([pull_push(clean, known), known], 1), 1 - known


MOST_HOLES = 0.9  # share of the pixels; where all are unknown there is nothing to go by


@dataclass(frozen=True)
class Compression(Degradation):
    """JPEG by Pillow, which halves the resolution of the colours.

    Raises:
        ValueError: the qualities do not ascend in 1 … BEST_QUALITY.
    """

    quality: tuple = (10, 40)  # (least, most), drawn uniformly

    task = "jpeg"

    def __post_init__(self):
        low, high = self.quality
        if not 1 <= low <= high <= BEST_QUALITY:
            raise ValueError(f"qualities must ascend in 1 … {BEST_QUALITY}, got {self.quality}")

    def __str__(self):
        return "JPEG of quality {} to {}".format(*self.quality)

    def __call__(self, clean, noise, numbers):
        return through_jpeg(clean, self.quality, numbers.flatten()), clean.new_zeros(1)


def through_jpeg(images, quality, numbers):
    """What is left of images after Pillow has written them as JPEG, which halves the resolution of
    their colours.

    Args:
        images: [n, 3, h, w]; they are clamped to [0, 1] and rounded to 8 bits first.
        quality: (least, most) of the files.
        numbers: [n] in [0, 1), which decide over the quality of each.
    """
    low, high = quality
    pixels = (255 * images.clamp(0, 1)).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    for image, number in zip(pixels, numbers.tolist(), strict=True):
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=low + int(number * (high - low + 1)))
        image[:] = Image.open(file)
    return torch.from_numpy(pixels).to(images).permute(0, 3, 1, 2) / 255


def pull_push(image, known):
    """Fills what is unknown with the mean of what is known around it, from near or from far.

    From resolution to resolution, downwards the mean of known pixels and upwards by interpolation
    ("The Lumigraph", Gortler et al. 1996). A model that starts from this need not learn it first.

    Args:
        image: [n, 3, h, w]; what it has at unknown pixels does not matter.
        known: 1 where it is known, else 0, [n, 1, h, w].

    Returns:
        [n, 3, h, w]; 0 where nothing is known at all.
    """
    size = image.shape[2:]
    if max(size) == 1:
        return image * known
    pool = partial(F.avg_pool2d, kernel_size=2, ceil_mode=True)
    weight = pool(known)
    coarse = pull_push(pool(image * known) / weight.clamp_min(1e-6), (weight > 0).to(image))
    return torch.where(known > 0, image, F.interpolate(coarse, size, mode="bilinear"))


def draw_mask(size, shares, number):
    """Which pixels are known: bool [h, w].

    Rectangles and free-form strokes of a brush (as "Free-Form Image Inpainting with Gated
    Convolution", Yu et al. 2019), one after the other, until a share of the pixels is covered; the
    last covers no more than that.

    Args:
        size: (h, w).
        shares: (low, high), from which the share is drawn uniformly.
        number: in [0, 1), that decides over everything.
    """
    rng = np.random.default_rng(int(number * 2**53))
    height, width = size
    wanted = max(1, round(rng.uniform(*shares) * height * width))
    known, side = np.ones(size, bool), math.sqrt(height * width)
    while (missing := wanted - (~known).sum()) > 0:
        shape = rectangle(size, side, rng) if rng.random() < 0.5 else stroke(size, side, rng)
        new = np.flatnonzero(shape & known)
        known.flat[new[:missing]] = False
    return known


def rectangle(size, side, rng):
    """bool [h, w] of a rectangle with sides of an eighth to three eighths of the image's."""
    area, (top, left) = np.zeros(size, bool), (int(rng.integers(n)) for n in size)
    height, width = (max(1, round(side * rng.uniform(1 / 8, 3 / 8))) for _ in range(2))
    area[top : top + height, left : left + width] = True
    return area


def stroke(size, side, rng):
    """bool [h, w] of a brush that turns as it goes."""
    width, angle = 1 + side * rng.uniform(1 / 32, 1 / 12), rng.uniform(0, 2 * math.pi)
    angles = angle + rng.uniform(-0.6, 0.6, int(rng.integers(8, 24))).cumsum()
    steps = width / 2 * np.stack([np.cos(angles), np.sin(angles)], 1)
    places = rng.uniform(0, size[::-1]) + steps.cumsum(0)  # x, y
    area = np.zeros(size, np.uint8)
    cv2.polylines(area, [places.round().astype(np.int32)], False, 1, round(width))
    return area == 1


KINDS = {kind.task: kind for kind in (GaussianNoise, SuperResolution, Holes, Compression)}
OPTIONS_OF = {task: [field.name for field in fields(kind)] for task, kind in KINDS.items()}
DEFAULTS = {"task": GaussianNoise.task}  # of a recipe
DEFAULTS |= {field.name: field.default for kind in KINDS.values() for field in fields(kind)}


def degradation_in(recipe):
    """The degradation of a recipe, or of a script's options, as a dict.

    Raises:
        UserError: its entries are out of their range; or a noise_map that needs a range of σ has
            one σ alone.
    """
    settings = DEFAULTS | recipe  # earlier versions wrote fewer
    task = settings["task"]
    values = (settings[name] for name in OPTIONS_OF[task])
    try:
        degradation = KINDS[task](*(tuple(v) if isinstance(v, list) else v for v in values))
    except ValueError as error:
        raise UserError(f"--task {task}: {error}") from None
    noise_map = getattr(degradation, "noise_map", "uniform")
    if noise_map != "uniform" and len(set(degradation.noise_range)) == 1:
        raise UserError(
            f"--noise-map {noise_map} lies between two values of σ; give --noise-level LOW HIGH"
        )
    return degradation


def check_options(task, given):
    """Raises a UserError that names the first of the options given that is of another task."""
    for other, names in OPTIONS_OF.items():
        for name in names:
            if other != task and name in given:
                raise UserError(f"--{name.replace('_', '-')} is of --task {other}; drop it")


# Noise ----------------------------------------------------------------------------------------


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
        kind: "uniform", one σ for an image, see `draw_sigma`; or "regions", the higher one in a
            rectangle of a sixth to a half of the image, the lower one around it.
        clean: [n, 3, h, w] in [0, 1].
        noise_range: (low, high).
        uniform: numbers in [0, 1), [n, DRAWS[kind]]; further ones do not count.

    Returns:
        [n, 1, 1, 1] or [n, 1, h, w].
    """
    low, high = noise_range
    first, *others = uniform[:, : DRAWS[kind], None, None, None].unbind(1)  # each [n, 1, 1, 1]
    if kind == "uniform":
        return draw_sigma(first, noise_range)
    y, x = (((torch.arange(n, device=clean.device) + 0.5) / n) for n in clean.shape[2:])
    y = y[:, None]  # from the top edge, 0, to the bottom, 1
    area, (stretch, top, left) = 1 / 6 + first / 3, others
    height = area.sqrt() * 2 ** (stretch - 0.5)  # at most 1, as the width is
    width = area / height
    top, left = top * (1 - height), left * (1 - width)
    inside = (y >= top) & (y < top + height) & (x >= left) & (x < left + width)
    return torch.where(inside, high, low)


def in_short(sigma):
    """As the field writes it: "25/255" where no short decimal fraction is as exact."""
    of_255 = round(255 * sigma)
    long = len(f"{sigma:g}") > len("0.0001") and math.isclose(255 * sigma, of_255)
    return f"{of_255}/255" if long else f"{sigma:g}"
