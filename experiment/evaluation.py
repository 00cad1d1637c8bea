"""What a denoiser is worth: PSNR and SSIM of every image, as all scripts measure them; no words.

A denoiser is any module that maps noisy images [B, 3, h, w] to a tuple of images of that shape and
a list of routing probabilities [B, N, E], empty where nothing is routed.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from skimage import metrics  # imported in parts, when they are first used
from torch import Tensor, nn
from tqdm import tqdm

from experiment.tiling import restore_any_size
from images.noisy_images import NoisyImageDataset

NOISE_LEVELS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35)
FLAT = 1e-6  # mean gradient of an image of one value
MOST_PSNR = 100.0  # dB; more than this is rounding, and an infinite one would hide all others
NOISE_LEVEL_PIXELS = 2**20  # of the first images of the test set: 1,024 thumbnails


@dataclass
class Evaluation:
    """What `evaluate` measured; images are in [0, 1]."""

    mse: float  # mean over the images of each one's
    noisy_psnr: np.ndarray  # float64 [n], dB
    psnr: np.ndarray  # float64 [n], dB, of the denoised images
    psnr_8_bits: np.ndarray  # the same, of the denoised images rounded to the values of a file
    ssim: np.ndarray  # float64 [n], of the denoised images
    sharpness: np.ndarray  # float64 [n], of the denoised images
    utilisation: np.ndarray  # float32 [blocks, E], mean routing probability of each expert

    def summary(self) -> dict:
        """The figures that a checkpoint stores, as plain numbers."""
        figures = {"mse": self.mse, "noisy_psnr_mean": spread(self.noisy_psnr)[0]}
        figures["psnr_mean"], figures["psnr_std"] = spread(self.psnr)
        figures["ssim_mean"], figures["ssim_std"] = spread(self.ssim)
        return figures | {"images": len(self.psnr), "utilisation": self.utilisation.tolist()}


def psnr(restored: np.ndarray, clean: np.ndarray) -> float:
    """PSNR in dB of one image by scikit-image, at most MOST_PSNR; [3, h, w] in [0, 1]."""
    with np.errstate(divide="ignore"):
        return min(MOST_PSNR, metrics.peak_signal_noise_ratio(clean, restored, data_range=1.0))


def psnr_of(mse: float) -> float:
    """PSNR in dB of a mean squared error of values in [0, 1], at most MOST_PSNR."""
    return min(MOST_PSNR, -10 * math.log10(mse)) if mse > 0 else MOST_PSNR


def spread(values: Sequence[float]) -> tuple[float, float]:
    """(mean, std) over images or seeds."""
    values = np.asarray(values, dtype=np.float64)
    return float(values.mean()), float(values.std())


def ssim(restored: np.ndarray, clean: np.ndarray) -> float:
    """SSIM of one image by scikit-image, 7×7 window; arrays [3, h, w] in [0, 1]."""
    return metrics.structural_similarity(clean, restored, data_range=1.0, channel_axis=0)


def sharpness(restored: np.ndarray, clean: np.ndarray) -> float:
    """Mean gradient magnitude of an image over that of the true one: below 1 it is blurred, above
    there is noise left, or too much contrast; [3, h, w] of at least 2×2 pixels.
    """
    one, other = (np.hypot(*np.gradient(x, axis=(1, 2))).mean() for x in (restored, clean))
    return one / max(other, FLAT)


def eval_batches(dataset: NoisyImageDataset, device: torch.device) -> Iterator[tuple[Tensor, ...]]:
    """Batches of a size for the kind of device, so that no figure depends on a script's batches."""
    return dataset.batches(64 if device.type == "cpu" else 1000)


def validation_batches(dataset: NoisyImageDataset, device: torch.device) -> list[tuple]:
    """All of a data set as a list of (noisy, clean) batches that stay on a device.

    The noise is the same after every epoch; drawing it anew would take longer than a GPU validates.
    """
    batches = eval_batches(dataset, device)
    return [(noisy.to(device), clean.to(device)) for noisy, clean, _ in batches]


def validation_mse(model: nn.Module, batches: list[tuple]) -> float:
    """Mean of the images' mean squared errors; leaves the model in evaluation mode."""
    model.eval()
    with torch.inference_mode():
        restored = (restore_any_size(model, noisy)[0] for noisy, _ in batches)
        pairs = zip(restored, batches, strict=True)
        errors = torch.stack([F.mse_loss(image, clean) for image, (_, clean) in pairs])
    images = [len(clean) for _, clean in batches]
    return sum(e * n for e, n in zip(errors.tolist(), images, strict=True)) / sum(images)


def evaluate(model: nn.Module, dataset: NoisyImageDataset) -> Evaluation:
    """Denoises a whole dataset and measures every image; the model is left in evaluation mode."""
    device, squared_error, scores, load = next(model.parameters()).device, 0.0, [], 0.0
    routed = 0  # images; none of those that are restored in tiles
    model.eval()
    with tqdm(total=len(dataset), desc="testing", unit="img", leave=False, disable=None) as bar:
        for noisy, clean, _ in eval_batches(dataset, device):
            with torch.inference_mode():
                restored, routings = restore_any_size(model, noisy.to(device))
            restored = restored.cpu()
            squared_error += F.mse_loss(restored, clean).item() * len(clean)
            images = (noisy[:, :3].numpy(), restored.numpy(), clean.numpy())
            for x, y, target in zip(*images, strict=True):
                rounded = (255 * y).round() / 255
                psnrs = (psnr(image, target) for image in (x, y, rounded))
                scores.append((*psnrs, ssim(y, target), sharpness(y, target)))
            if routings:
                load += torch.stack([r.mean(1).sum(0) for r in routings]).cpu().numpy()
                routed += len(clean)
            bar.update(len(clean))
    scores = np.array(scores, dtype=np.float64).T
    utilisation = load / routed if routed else np.empty((0, 0))
    return Evaluation(squared_error / len(dataset), *scores, utilisation)


def psnr_against_noise(model: nn.Module, test_set: NoisyImageDataset) -> list[tuple]:
    """[(σ, mean PSNR in dB of noisy images, of denoised ones)] at NOISE_LEVELS; the test set's own
    σ does not matter.
    """
    pixels = np.cumsum([image.shape[1] * image.shape[2] for image in test_set.split.images])
    count = max(1, int((pixels <= NOISE_LEVEL_PIXELS).sum()))
    results = [(level, evaluate(model, test_set.at(level, count))) for level in NOISE_LEVELS]
    return [(level, float(r.noisy_psnr.mean()), float(r.psnr.mean())) for level, r in results]
