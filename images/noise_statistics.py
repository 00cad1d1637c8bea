"""What the noise of photographs is like: its level, its correlation, where it is strong."""

import cv2
import numpy as np

from images.noisy_images import NoisyImageDataset

DRIFT = 10  # σ of the blur, in pixels, whose result counts as drift and not as noise
DISTANCES = (1, 2, 3, 4)  # pixels
BINS = 8  # of brightness
LEAST_STD, LEAST_PIXELS = 0.3, 500  # of 255, of an image that counts; of a bin that does
COLOURS = ("red", "green", "blue")


def noise_statistics(dataset: NoisyImageDataset) -> dict[str, np.ndarray]:
    """Of whole photographs with noise, each figure the mean over the images, [3] for the colours.

    "level", the standard deviation in 255ths; "horizontal" and "vertical", the correlations at
    DISTANCES [distances, 3]; "colours", that of red and green, green and blue, blue and red;
    "brightness", the deviation over that of the whole image at each of BINS [BINS, 3], nan where
    there are no such pixels. An image without noise does not count.
    """
    found = []
    for noisy, clean, _ in dataset.batches(1):
        noisy, clean = (255 * x[0].permute(1, 2, 0).double().numpy() for x in (noisy, clean))
        noise = noisy - clean
        noise -= cv2.GaussianBlur(noise, (0, 0), DRIFT)
        if (level := noise.std((0, 1))).min() > LEAST_STD:
            found.append(
                {
                    "level": level,
                    "horizontal": correlation(noise, 1),
                    "vertical": correlation(noise, 0),
                    "colours": np.corrcoef(noise.reshape(-1, 3).T)[[0, 1, 2], [1, 2, 0]],
                    "brightness": over_brightness(noise, clean) / level,
                }
            )
    if not found:
        return {}
    return {name: mean_of_some([of[name] for of in found]) for name in found[0]}


def correlation(noise: np.ndarray, axis: int) -> np.ndarray:
    """Of values [h, w, 3] with those at each of DISTANCES along an axis: [distances, 3]."""
    size, variance = noise.shape[axis], noise.var((0, 1))
    far = [noise.take(range(distance, size), axis) for distance in DISTANCES]
    near = [noise.take(range(size - distance), axis) for distance in DISTANCES]
    means = [(one * other).mean((0, 1)) for one, other in zip(far, near, strict=True)]
    return np.stack(means) / variance


def over_brightness(noise: np.ndarray, clean: np.ndarray) -> np.ndarray:
    """Standard deviation of [h, w, 3] where the clean image is as bright as each bin: [BINS, 3]."""
    smooth = cv2.GaussianBlur(clean, (0, 0), 1.5)
    bins = (smooth * BINS / 256).astype(int).clip(0, BINS - 1)
    squares = np.full((BINS, 3), np.nan)
    for number, colour in np.ndindex(squares.shape):
        chosen = noise[..., colour][bins[..., colour] == number]
        if len(chosen) >= LEAST_PIXELS:
            squares[number, colour] = np.mean(chosen**2)
    return np.sqrt(squares)


def mean_of_some(arrays: list[np.ndarray]) -> np.ndarray:
    """The mean over those that have a value there, nan where none has."""
    values = np.stack(arrays)
    there = np.isfinite(values)
    total = np.where(there, values, 0).sum(0)
    return np.divide(total, there.sum(0), out=np.full(total.shape, np.nan), where=there.any(0))
