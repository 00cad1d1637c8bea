"""What JPEG leaves of an image."""

import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def jpeg_round_trip(
    pixels: np.ndarray, quality: int, colours: str = "4:2:0", place: tuple = (0, 0)
) -> np.ndarray:
    """What is left of an image, uint8 [h, w, 3], after Pillow has written it as JPEG of a quality.

    The place, (row, column), is that of the image in a larger one, whose blocks it then has.
    """
    file, (top, left) = io.BytesIO(), place
    part = np.pad(pixels, ((top, 0), (left, 0), (0, 0)), mode="symmetric")
    Image.fromarray(part).save(file, "JPEG", quality=quality, subsampling=colours)
    return np.asarray(Image.open(file))[top:, left:]


def through_jpeg(images: Tensor, quality: tuple, numbers: Tensor) -> Tensor:
    """The same of [n, 3, h, w] in [0, 1]; numbers [n] in [0, 1) decide over the quality of each,
    between the least and the most.
    """
    low, high = quality
    pixels = as_pixels(images)
    for image, number in zip(pixels, numbers.tolist(), strict=True):
        image[:] = jpeg_round_trip(image, low + int(number * (high - low + 1)))
    return as_images(pixels, images)


def as_pixels(images: Tensor) -> np.ndarray:
    """Images [n, 3, h, w], clamped to [0, 1] -> uint8 [n, h, w, 3]."""
    return (255 * images.clamp(0, 1)).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def as_images(pixels: np.ndarray, like: Tensor) -> Tensor:
    """The way back, to the dtype and device of another tensor."""
    return torch.from_numpy(pixels).to(like).permute(0, 3, 1, 2) / 255
