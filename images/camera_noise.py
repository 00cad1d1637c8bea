"""The noise of a camera's own files, drawn: it has been demosaicked, tone-mapped and compressed.

So neighbouring pixels share it, the colours share it in part, it is strongest in the darker
mid-tones and at edges, and JPEG came after it. Every property is drawn anew for every image, out of
ranges around those measured on pairs of real photographs (PolyU, Xu et al. 2018), which
`visualize_training_data.py` prints for pairs and for what is drawn here. The idea of drawing the
whole chain: CBDNet (Guo et al. 2019), SCUNet (Zhang et al. 2023).
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from images.jpeg_files import as_images, as_pixels, jpeg_round_trip

# What can be left out, to see what it contributes; without any, the noise is white.
PROPERTIES = ("correlation", "colours", "brightness", "files")
OF_CAMERA, OF_FILE = 16, 8  # uniform numbers that decide
NUMBERS = OF_CAMERA + OF_FILE
CLEAN_SHARE = 0.1  # of the images without a camera's noise; the others have white noise
WHITE_LEVEL = (0.01, 0.3)  # σ of white noise
EDGE = 6 / 255  # gradient at which half of an edge's additional noise is reached


def between(number: Tensor, low: float, high: float) -> Tensor:
    """Uniform, of a number that is uniform in [0, 1)."""
    return low + (high - low) * number


def log_between(number: Tensor, low: float, high: float) -> Tensor:
    """Log-uniform: every octave as often as any other."""
    return low * (high / low) ** number


@dataclass
class Camera:
    """The properties of the noise of n images, each [n, 1, 1, 1] but for gains."""

    sigma: Tensor  # root of the mean squared noise of an image
    width: Tensor  # σ of the blur that its correlation is of, pixels
    aspect: Tensor  # horizontal width / vertical width
    tail: Tensor  # part of the variance that is correlated wider
    tail_width: Tensor  # σ of the blur of that part, pixels
    colour_width: Tensor  # width of what the colours do not share, pixels
    common: Tensor  # part of the variance that the colours share
    gains: Tensor  # of the colours, [n, 3, 1, 1]
    peak: Tensor  # brightness of the strongest noise; 1: as the root of the signal
    slope: Tensor  # how fast the noise falls on both sides of it
    floor: Tensor  # of the noise over brightness; 1: the same everywhere
    edges: Tensor  # how much stronger it is at edges, at most


def draw_camera(uniform: Tensor, level: tuple, properties: tuple, share: float) -> Camera:
    """The cameras of n images, out of the first OF_CAMERA of numbers [n, NUMBERS]."""
    *u, kind = uniform[:, :OF_CAMERA, None, None, None].unbind(1)  # each [n, 1, 1, 1]
    u, one = iter(u), torch.ones_like(kind)
    camera = Camera(
        sigma=log_between(next(u), *level),
        width=log_between(next(u), 0.34, 1.2),
        aspect=log_between(next(u), 0.8, 1.25),
        tail=(between(next(u), -0.1, 0.4)).clamp_min(0),
        tail_width=log_between(next(u), 2, 8),
        colour_width=log_between(next(u), 1.1, 5),  # times the width, for now
        common=(1 + 2 * between(next(u), 0.3, 0.97)) / 3,
        gains=torch.cat([log_between(next(u), 0.8, 1.5), one, log_between(next(u), 0.8, 1.5)], 1),
        peak=between(next(u), 0.2, 0.55),
        slope=between(next(u), 0.8, 2.5),
        floor=between(next(u), 0.05, 0.4),
        edges=(between(next(u), -0.6, 2)).clamp_min(0),
    )
    camera.colour_width = (camera.width * camera.colour_width).clamp_max(6)
    shape, white = next(u), next(u)
    camera.peak = torch.where(shape < 0.1, one, camera.peak)
    camera.floor = torch.where(shape > 0.85, one, camera.floor)
    # The other kinds: clean images, and white noise, as it was added to many.
    is_clean, is_white = kind < CLEAN_SHARE * (1 - share), kind < 1 - share
    camera.sigma = torch.where(is_white, log_between(white, *WHITE_LEVEL), camera.sigma)
    camera.sigma = torch.where(is_clean, 0 * one, camera.sigma)
    without = {name: is_white | (name not in properties) for name in PROPERTIES}
    for name, part, value in (
        ("width", "correlation", 0),
        ("tail", "correlation", 0),
        ("colour_width", "correlation", 0),
        ("common", "colours", 1 / 3),
        ("gains", "colours", 1),
        ("floor", "brightness", 1),
        ("edges", "brightness", 0),
    ):
        drawn = getattr(camera, name)
        setattr(camera, name, torch.where(without[part], torch.full_like(drawn, value), drawn))
    if "colours" not in properties:
        camera.colour_width = camera.width
    return camera


def power_of_blur(size: tuple, width: Tensor, aspect: Tensor) -> Tensor:
    """Power spectrum of white noise after a Gaussian blur, of mean 1: [n, 1, h, w // 2 + 1].

    With it, the noise's variance is 1 whatever the width [n, 1, 1, 1], which may be 0.
    """
    frequencies = (torch.fft.fftfreq(n, device=width.device) for n in size)
    widths = (width / aspect.sqrt(), width * aspect.sqrt())
    down, across = (
        torch.exp(-((2 * math.pi * w * f) ** 2)) for w, f in zip(widths, frequencies, strict=True)
    )  # [n, 1, 1, h] and [n, 1, 1, w]
    down, across = (power / power.mean(3, keepdim=True) for power in (down, across))
    return down.transpose(2, 3) * across[..., : size[1] // 2 + 1]


def correlated(white: Tensor, camera: Camera, width: Tensor) -> Tensor:
    """White noise [n, c, h, w] with the camera's correlation in space; variance 1 stays 1."""
    size = white.shape[2:]
    core = power_of_blur(size, width, camera.aspect)
    wide = power_of_blur(size, camera.tail_width.maximum(width), camera.aspect)
    power = (1 - camera.tail) * core + camera.tail * wide
    return torch.fft.irfft2(torch.fft.rfft2(white) * power.sqrt(), s=size)


def in_colours(white: Tensor, camera: Camera, grey: Tensor) -> Tensor:
    """White noise [n, 3, h, w] -> the camera's, of variance 1 in green; of grey images the same in
    all three colours.
    """
    light = white.sum(1, keepdim=True) / 3**0.5  # independent of what is left
    rest = (white - white.mean(1, keepdim=True)) * 1.5**0.5
    common = torch.where(grey, 1.0, camera.common)
    light = correlated(light, camera, camera.width)
    rest = correlated(rest, camera, camera.colour_width)
    noise = common.sqrt() * light + (1 - common).sqrt() * rest
    return noise * torch.where(grey, 1.0, camera.gains)


def strength(clean: Tensor, camera: Camera) -> Tensor:
    """How strong the noise is at every value of images [n, 3, h, w]; its mean square is 1."""
    dark, light = camera.peak, 1 - camera.peak
    value = clean.clamp(1e-3, 1 - 1e-3)
    highest = dark**dark * light**light  # of the hump below
    hump = (value**dark * (1 - value) ** light / highest) ** camera.slope
    factor = camera.floor + (1 - camera.floor) * hump
    smooth = F.avg_pool2d(F.pad(clean.mean(1, keepdim=True), (2, 2, 2, 2), mode="replicate"), 3, 1)
    across = (smooth[:, :, 1:-1, 2:] - smooth[:, :, 1:-1, :-2]) / 2
    down = (smooth[:, :, 2:, 1:-1] - smooth[:, :, :-2, 1:-1]) / 2
    gradient = torch.hypot(across, down)
    factor = factor * (1 + camera.edges * gradient / (gradient + EDGE))
    return factor / factor.square().mean((1, 2, 3), keepdim=True).sqrt()


def as_files(images: Tensor, numbers: Tensor) -> Tensor:
    """Images [n, 3, h, w], some by chance as JPEG files: of all qualities that cameras and editors
    write, most with colours at half resolution, some cut and written once more. numbers [n, 8].
    """
    pixels = as_pixels(images)
    for image, (chance, again, *details) in zip(pixels, numbers.tolist(), strict=True):
        for written, (quality, colours, shift) in (
            (chance < 0.7, details[:3]),
            (again < 0.25 and chance < 0.7, details[3:]),
        ):
            if written:
                low, high = (70, 82) if quality < 0.5 else (75, 97)
                quality = low + int(2 * quality % 1 * (high - low + 1))
                place = divmod(int(256 * shift), 16)  # of the crop in the file's blocks
                kind = "4:2:0" if colours < 0.75 else "4:4:4"
                image[:] = jpeg_round_trip(image, quality, kind, place)
    return as_images(pixels, images)


def add_camera_noise(
    clean: Tensor, normal: Tensor, uniform: Tensor, level: tuple, properties: tuple, share: float
) -> tuple[Tensor, Tensor]:
    """(noisy, σ of every value), both [n, 3, h, w], of clean images in [0, 1].

    Args:
        normal: N(0, 1), [n, 3, h, w].
        uniform: in [0, 1), [n, NUMBERS].
        level: (low, high) of the standard deviation of a camera's noise, log-uniform.
        properties: those of PROPERTIES that it has.
        share: part of the images that have it.
    """
    camera = draw_camera(uniform.float(), level, properties, share)
    grey = (clean == clean[:, :1]).flatten(1).all(1).view(-1, 1, 1, 1)
    sigma = camera.sigma * strength(clean, camera)
    noisy = (clean + sigma * in_colours(normal, camera, grey)).clamp(0, 1)
    return (as_files(noisy, uniform[:, OF_CAMERA:]) if "files" in properties else noisy), sigma
