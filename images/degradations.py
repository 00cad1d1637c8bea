"""What is done to clean images: noise, reduction, holes, compression; functions of random numbers.

A degradation maps clean images [n, 3, h, w] in [0, 1] and `Draws` to the degraded images
[n, channels, h, w] and to how damaged each pixel is, of a shape that expands to that of the clean
ones: σ of its noise, 1 in a hole, else 0. Its fields are the options of its task.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, astuple, dataclass
from functools import partial
from typing import NamedTuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common.options import BadOption, Number, check_fields, given_fields, option
from images.camera_noise import NUMBERS, PROPERTIES, add_camera_noise
from images.jpeg_files import through_jpeg

BEST_QUALITY = 95  # of JPEG; above it Pillow's files grow and hardly gain
QUALITY_OF_PHOTOGRAPHS = (75, BEST_QUALITY)  # (least, most) that cameras and editors write
LEAST_NOISE = 1e-6  # σ below which float32 images hardly change
MOST_HOLES = 0.9  # share of the pixels; where all are unknown there is nothing to go by
# How σ differs over an image, see `sigma_map`, and the random numbers that this takes.
NOISE_MAPS = {"uniform": 1, "regions": 4}


class Draws(NamedTuple):
    """The random numbers of a degradation."""

    normal: Tensor  # [n, 3, h, w], N(0, 1)
    uniform: Tensor  # [n, numbers], in [0, 1)


class Degradation:
    """What they have in common; raises a BadOption for a value out of its range."""

    channels = 3  # of the degraded images
    multiple = 1  # of which sides have to be
    numbers = 1  # uniform ones that an image takes
    noise = None  # which of NOISES

    def __post_init__(self):
        check_fields(self)

    def as_dict(self) -> dict:
        """Its task and options as plain values, which `degradation_of` reads."""
        kind = {"task": self.task, "noise": self.noise}
        return {name: value for name, value in kind.items() if value} | asdict(self)


@dataclass(frozen=True)
class GaussianNoise(Degradation):
    """degraded = clamp(clean + σ·N(0, 1), 0, 1), a share of which are then JPEG files."""

    noise_level: tuple = option(  # (low, high) of σ; from one number, twice that
        (0.2, 0.2),
        "standard deviation σ of the Gaussian noise, for pixel values in [0, 1], also as a "
        "fraction: 25/255; two values are a range, see --noise-map",
        type=Number(float, most=1000),
        nargs="+",
        metavar="SIGMA",
    )
    noise_map: str = option(
        "uniform",
        "uniform: every image draws one σ of the range, log-uniformly; regions: the higher one in "
        "a rectangle, the lower one around it",
        choices=list(NOISE_MAPS),
    )
    unclipped: bool = option(
        False, "leave the noisy images outside [0, 1], as the field's benchmarks on photographs do"
    )
    # Such files have colours at half resolution: noise is not independent from pixel to pixel any
    # more, and it is clamped in any case.
    jpeg_share: float = option(
        0.0,
        "part of the noisy images, by chance, that have been JPEG files of quality 75 to 95 with "
        "colours at half resolution",
        type=Number(float, most=1),
        metavar="SHARE",
    )

    task = "denoise"
    noise = "gaussian"

    def __post_init__(self):
        level = self.noise_level if isinstance(self.noise_level, tuple) else (self.noise_level,)
        if not 1 <= len(level) <= 2:
            raise BadOption("noise_level", f"must be one σ, or two in ascending order, got {level}")
        object.__setattr__(self, "noise_level", (level[0], level[-1]))
        check_fields(self)
        low, high = self.noise_level
        if low > high:
            raise BadOption("noise_level", f"must be one σ, or two in ascending order, got {level}")
        if low == 0 < high:
            raise BadOption("noise_level", f"must be a range that starts above 0, got {level}")
        if 0 < low < LEAST_NOISE:
            raise BadOption("noise_level", f"must be 0 or at least {LEAST_NOISE}, got {level}")
        if self.noise_map != "uniform" and low == high:
            words = "lies between two values of σ; give a noise level of two, LOW HIGH"
            raise BadOption("noise_map", f"{self.noise_map} {words}")

    @property
    def numbers(self):
        return NOISE_MAPS[self.noise_map] + (2 if self.jpeg_share else 0)

    def __str__(self):
        """As "σ = 0.2", "σ = 25/255", "σ = 0.05 to 0.4 (regions)", "σ = 0.2 (50 % JPEG)"."""
        low, high = self.noise_level
        notes = [self.noise_map] if self.noise_map != "uniform" else []
        notes += [f"{100 * self.jpeg_share:g} % JPEG"] if self.jpeg_share else []
        notes += ["unclipped"] if self.unclipped and self.jpeg_share < 1 else []
        level = in_short(low) + (f" to {in_short(high)}" if high > low else "")
        return f"σ = {level}" + (f" ({', '.join(notes)})" if notes else "")

    def __call__(self, clean: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        sigma = sigma_map(self.noise_map, clean, self.noise_level, draws.uniform).float()
        noisy = draws.normal * sigma + clean
        noisy = noisy if self.unclipped else noisy.clamp(0, 1)
        if self.jpeg_share:
            chance, number = draws.uniform[:, -2:].unbind(1)
            files = chance < self.jpeg_share
            noisy[files] = through_jpeg(noisy[files], QUALITY_OF_PHOTOGRAPHS, number[files])
        return noisy, sigma


@dataclass(frozen=True)
class CameraNoise(Degradation):
    """What noise is in a camera's files, among clean images and white noise: see camera_noise.py.

    Grey images get grey noise, and a part of all images has been JPEG files.
    """

    noise_level: tuple = option(
        (0.5 / 255, 25 / 255),
        "as GaussianNoise has it",
        type=Number(float, above=True, most=1),
        nargs=2,
    )
    noise_properties: tuple = option(
        PROPERTIES,
        "of --noise camera: what it has; without any it is white",
        choices=PROPERTIES,
        nargs="*",
    )

    camera_share: float = option(
        0.6,
        "of --noise camera: part of the images that have it; a tenth of the others is clean, "
        "the rest have white noise",
        type=Number(float, most=1),
        metavar="SHARE",
    )

    task = "denoise"
    noise = "camera"
    numbers = NUMBERS

    def __str__(self):
        low, high = (in_short(sigma) for sigma in self.noise_level)
        missing = [name for name in PROPERTIES if name not in self.noise_properties]
        return f"camera noise, σ = {low} to {high}" + "".join(f", no {name}" for name in missing)

    def __call__(self, clean: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        return add_camera_noise(clean, *draws, *astuple(self))


@dataclass(frozen=True)
class PairedNoise(Degradation):
    """The noise of real pairs, whose images are [n, 6, h, w]: the truth, then what a camera made of
    it. Its σ is not known, and 0 in its place.
    """

    task = "denoise"
    noise = "pairs"

    def __str__(self):
        return "noise of its own"

    def __call__(self, clean: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        return clean[:, 3:], clean.new_zeros(1, 1, 1, 1)


@dataclass(frozen=True)
class SuperResolution(Degradation):
    """Bicubic reduction, antialiased and rounded to 8 bits as a file is, and enlargement again."""

    scale: int = option(2, "of --task super-resolution", type=int, choices=(2, 3, 4))

    task = "super-resolution"

    @property
    def multiple(self):
        return self.scale

    def __str__(self):
        return f"super-resolution ×{self.scale}"

    def reduced(self, clean: Tensor) -> Tensor:
        """[n, 3, h, w] -> [n, 3, h / scale, w / scale], in 255ths."""
        size = [side // self.scale for side in clean.shape[2:]]
        small = F.interpolate(clean, size, mode="bicubic", antialias=True)
        return (255 * small).round().clamp(0, 255) / 255

    def __call__(self, clean: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        size = clean.shape[2:]
        large = F.interpolate(self.reduced(clean), size, mode="bicubic", antialias=True)
        return large.clamp(0, 1), clean.new_zeros(1, 1, 1, 1)


@dataclass(frozen=True)
class Holes(Degradation):
    """Rectangles and strokes are unknown: filled by `pull_push`, and 0 in a fourth channel."""

    holes: tuple = option(  # (low, high), uniform between them
        (0.1, 0.4),
        "of --task inpaint: share of the pixels that is unknown, drawn between the two",
        type=Number(float, above=True, most=MOST_HOLES),
        nargs=2,
        metavar=("LOW", "HIGH"),
    )

    task = "inpaint"
    channels = 4

    def __str__(self):
        return f"holes of {100 * self.holes[0]:g} to {100 * self.holes[1]:g} %"

    def __call__(self, clean: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        size = clean.shape[2:]
        masks = [draw_mask(size, self.holes, u) for u in draws.uniform.flatten().tolist()]
        known = torch.from_numpy(np.stack(masks)).to(clean).unsqueeze(1)  # [n, 1, h, w]
        return torch.cat([pull_push(clean, known), known], 1), 1 - known


@dataclass(frozen=True)
class Compression(Degradation):
    """JPEG by Pillow, which halves the resolution of the colours."""

    quality: tuple = option(  # (least, most), drawn uniformly
        (10, 40),
        "of --task jpeg: quality of the files, drawn between the two",
        type=Number(int, 1, most=BEST_QUALITY),
        nargs=2,
        metavar=("LOW", "HIGH"),
    )

    task = "jpeg"

    def __str__(self):
        return "JPEG of quality {} to {}".format(*self.quality)

    def __call__(self, clean: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        return through_jpeg(clean, self.quality, draws.uniform.flatten()), clean.new_zeros(1)


NOISES = {kind.noise: kind for kind in (GaussianNoise, CameraNoise, PairedNoise)}
KINDS = (*NOISES.values(), SuperResolution, Holes, Compression)
TASKS = tuple(dict.fromkeys(kind.task for kind in KINDS))


def degradation_of(settings: Mapping) -> Degradation:
    """That of the settings' task and of its fields there; those that are missing are the defaults.

    Raises a BadOption if the task or noise is unknown, or a value is out of its range.
    """
    kind = kind_of(settings)
    return kind(**given_fields(kind, settings))


def kind_of(settings: Mapping) -> type[Degradation]:
    """The class of the settings' "task" and "noise"; a BadOption if there is none."""
    task, noise = (settings.get(name) for name in ("task", "noise"))
    for name, value, known in (("task", task, TASKS), ("noise", noise, NOISES)):
        if value is not None and (not isinstance(value, str) or value not in known):
            raise BadOption(name, f"must be one of {', '.join(known)}, got {value!r:.60}")
    if task in (None, GaussianNoise.task):
        return NOISES[noise or GaussianNoise.noise]
    return next(kind for kind in KINDS if kind.task == task)


def pull_push(image: Tensor, known: Tensor) -> Tensor:
    """Fills what is unknown with the mean of what is known around it, from near or from far.

    From resolution to resolution, downwards the mean of known pixels and upwards by interpolation
    ("The Lumigraph", Gortler et al. 1996). A model that starts from this need not learn it first.
    image [n, 3, h, w] and known [n, 1, h, w], 1 or 0 -> [n, 3, h, w]; 0 if nothing is known at all.
    """
    size = image.shape[2:]
    if max(size) == 1:
        return image * known
    pool = partial(F.avg_pool2d, kernel_size=2, ceil_mode=True)
    weight = pool(known)
    coarse = pull_push(pool(image * known) / weight.clamp_min(1e-6), (weight > 0).to(image))
    return torch.where(known > 0, image, F.interpolate(coarse, size, mode="bilinear"))


def draw_mask(size: tuple, shares: tuple, number: float) -> np.ndarray:
    """Which pixels are known: bool [h, w], of that size.

    Rectangles and free-form strokes of a brush (as "Free-Form Image Inpainting with Gated
    Convolution", Yu et al. 2019), one after the other, until a share of the pixels, uniform between
    the two, is covered; the last covers no more than that. The number, in [0, 1), decides over all.
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


def draw_sigma(uniform: Tensor, noise_level: tuple) -> Tensor:
    """σ out of numbers that are uniform in [0, 1): the fixed one, or log-uniform in a range.

    Every octave of σ gets as many images as any other. With σ itself uniform, few images have
    little noise, where a model needs most training to come near one trained for that σ alone.
    """
    low, high = noise_level
    return low * (high / low) ** uniform if high > low else low + 0 * uniform


def sigma_map(kind: str, clean: Tensor, noise_level: tuple, uniform: Tensor) -> Tensor:
    """The standard deviation σ of the noise of every pixel: [n, 1, 1, 1] or [n, 1, h, w].

    "uniform": one for an image, see `draw_sigma`. "regions": the higher one in a rectangle of a
    sixth to a half of the image, the lower one around it. Takes the first NOISE_MAPS[kind] numbers.
    """
    first, *others = uniform[:, : NOISE_MAPS[kind], None, None, None].unbind(1)  # each [n, 1, 1, 1]
    if kind == "uniform":
        return draw_sigma(first, noise_level)
    y, x = (((torch.arange(n, device=clean.device) + 0.5) / n) for n in clean.shape[2:])
    y = y[:, None]  # from the top edge, 0, to the bottom, 1
    area, (stretch, top, left) = 1 / 6 + first / 3, others
    height = area.sqrt() * 2 ** (stretch - 0.5)  # at most 1, as the width is
    width = area / height
    top, left = top * (1 - height), left * (1 - width)
    inside = (y >= top) & (y < top + height) & (x >= left) & (x < left + width)
    low, high = noise_level
    return torch.where(inside, high, low)


def in_short(sigma: float) -> str:
    """As the field writes it: "25/255" where no short decimal fraction is as exact."""
    of_255 = round(255 * sigma)
    long = len(f"{sigma:g}") > len("0.0001") and math.isclose(255 * sigma, of_255)
    return f"{of_255}/255" if long else f"{sigma:g}"
