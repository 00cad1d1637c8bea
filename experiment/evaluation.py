"""What a denoiser is worth: PSNR and SSIM of every image, as all scripts measure them.

A denoiser is any module that maps noisy images [B, 3, h, w] to a tuple of images of that shape and
a list of routing probabilities [B, N, E], empty where nothing is routed.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from tqdm import tqdm

from experiment.cuda_graphs import ReplayedModel
from images.degradations import degradation_in

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

    def summary(self):
        """The figures that a checkpoint stores, as plain numbers."""
        (psnr, psnr_std), (ssim, ssim_std) = spread(self.psnr), spread(self.ssim)
        return {
            "mse": self.mse,
            "noisy_psnr_mean": spread(self.noisy_psnr)[0],
            "psnr_mean": psnr,
            "psnr_std": psnr_std,
            "ssim_mean": ssim,
            "ssim_std": ssim_std,
            "images": len(self.psnr),
            "utilisation": self.utilisation.tolist(),
        }


def psnr(restored, clean):
    """PSNR in dB of one image by scikit-image, at most MOST_PSNR; [3, h, w] in [0, 1]."""
    with np.errstate(divide="ignore"):
        return min(MOST_PSNR, peak_signal_noise_ratio(clean, restored, data_range=1.0))


def psnr_of(mse):
    """PSNR in dB of a mean squared error of values in [0, 1], at most MOST_PSNR."""
    return min(MOST_PSNR, -10 * math.log10(mse)) if mse > 0 else MOST_PSNR


def spread(values):
    """(mean, std) over images or seeds."""
    values = np.asarray(values, dtype=np.float64)
    return float(values.mean()), float(values.std())


def ssim(restored, clean):
    """SSIM of one image by scikit-image, 7×7 window; arrays [3, h, w] in [0, 1]."""
    return structural_similarity(clean, restored, data_range=1.0, channel_axis=0)


def sharpness(restored, clean):
    """Mean gradient magnitude of an image over that of the true one: below 1 it is blurred, above
    there is noise left, or too much contrast; [3, h, w] of at least 2×2 pixels.
    """
    one, other = (np.hypot(*np.gradient(x, axis=(1, 2))).mean() for x in (restored, clean))
    return one / max(other, FLAT)


def eval_batches(dataset, device):
    """Batches of an evaluation on a device, of a size that fits a CPU's cache or fills a GPU.

    It depends on the kind of device alone, so that a figure never depends on how a script batches.
    """
    return dataset.batches(64 if device.type == "cpu" else 1000)


def validation_batches(dataset, device):
    """All of a data set as a list of (noisy, clean) batches that stay on a device.

    The noise is the same after every epoch; drawing it anew would take longer than a GPU validates.
    """
    batches = eval_batches(dataset, device)
    return [(noisy.to(device), clean.to(device)) for noisy, clean, _ in batches]


def validation_mse(model, batches):
    """Mean over the images of each one's mean squared error.

    Args:
        model: denoiser, or a ReplayedModel of it; it is left in evaluation mode.
        batches: of `validation_batches`, on the device of the model.
    """
    model.eval()
    with torch.inference_mode():
        errors = torch.stack([F.mse_loss(model(noisy)[0], clean) for noisy, clean in batches])
    images = [len(clean) for _, clean in batches]
    return sum(e * n for e, n in zip(errors.tolist(), images, strict=True)) / sum(images)


def evaluate(model, dataset):
    """Denoises a whole dataset and measures every image.

    Args:
        model: denoiser; it is left in evaluation mode.
        dataset: NoisyImageDataset.

    Returns:
        Evaluation.
    """
    device, squared_error, scores, load = next(model.parameters()).device, 0.0, [], 0.0
    passes = ReplayedModel(model).eval()
    with tqdm(total=len(dataset), desc="testing", unit="img", leave=False, disable=None) as bar:
        for noisy, clean, _ in eval_batches(dataset, device):
            with torch.inference_mode():
                restored, routings = passes(noisy.to(device))
            restored = restored.cpu()
            squared_error += F.mse_loss(restored, clean).item() * len(clean)
            images = (noisy[:, :3].numpy(), restored.numpy(), clean.numpy())
            for x, y, target in zip(*images, strict=True):
                rounded = (255 * y).round() / 255
                psnrs = (psnr(image, target) for image in (x, y, rounded))
                scores.append((*psnrs, ssim(y, target), sharpness(y, target)))
            if routings:
                load += torch.stack([r.mean(1).sum(0) for r in routings]).cpu().numpy()
            bar.update(len(clean))
    scores = np.array(scores, dtype=np.float64).T
    utilisation = load / len(dataset) if routings else np.empty((0, 0))
    return Evaluation(squared_error / len(dataset), *scores, utilisation)


def psnr_against_noise(model, test_set):
    """Mean PSNR in dB of noisy and denoised images at NOISE_LEVELS.

    Args:
        model: denoiser.
        test_set: NoisyImageDataset; its own σ does not matter.

    Returns:
        list of (σ, PSNR of the noisy images, PSNR of the denoised ones).
    """
    pixels = np.cumsum([image.shape[1] * image.shape[2] for image in test_set.split.images])
    count, rows = max(1, int((pixels <= NOISE_LEVEL_PIXELS).sum())), []
    for noise_level in NOISE_LEVELS:
        result = evaluate(model, test_set.at(noise_level, count))
        rows.append((noise_level, float(result.noisy_psnr.mean()), float(result.psnr.mean())))
    return rows


def plus_minus(values, digits):
    """ "25.04 ± 1.48": mean and std with that many digits."""
    mean, std = spread(values)
    return f"{mean:.{digits}f} ± {std:.{digits}f}"


def result_line(psnr, ssim, dataset_name):
    """The line that ends every script which evaluates."""
    return (
        f"PSNR {plus_minus(psnr, 2)} dB   SSIM {plus_minus(ssim, 4)}   "
        f"images {len(psnr)}   dataset {dataset_name}"
    )


def epoch_line(row):
    """What a training prints of a row of its history."""
    return (
        f"epoch {row['epoch']:3d}  train {row['train_mse']:.5f}  val {row['val_mse']:.5f} "
        f"({psnr_of(row['val_mse']):.2f} dB)  lr {row['lr']:.1e}  {row['seconds']:.0f} s"
    )


def framed(title, rows):
    """A table of (name, value) strings in a frame."""
    width = max(len(name) for name, _ in rows)
    lines = [f" {name:<{width}}  {value} " for name, value in rows]
    inner = max(map(len, lines))
    framed_lines = [f"║{line:<{inner}}║" for line in lines]
    return "\n".join([f"╔{f' {title} ':═^{inner}}╗", *framed_lines, f"╚{'═' * inner}╝"])


def results_box(checkpoint, result, device):
    """A framed table of a run's results."""
    recipe, minutes = checkpoint["recipe"], checkpoint["train_seconds"] / 60
    of_noise = recipe["task"] == "denoise"
    before, after = ("noisy", "denoised") if of_noise else ("degraded", "restored")
    experts = "experts, none" if checkpoint["config"].get("capacity") else "experts"
    rows = [
        ("data set", f"{recipe['dataset']}, {len(result.psnr):,} test images"),
        ("noise" if of_noise else "task", str(degradation_in(recipe))),
        ("parameters", f"{recipe['parameters']:,}"),
        ("training", f"{recipe['epochs']} epochs in {minutes:.1f} min on {device}"),
        ("best epoch", f"{checkpoint['epoch']}, validation MSE {checkpoint['val_mse']:.5f}"),
        (f"{before} PSNR", f"{plus_minus(result.noisy_psnr, 2)} dB"),
        (f"{after} PSNR", f"{plus_minus(result.psnr, 2)} dB"),
        (f"{after} SSIM", plus_minus(result.ssim, 4)),
        *(
            (f"{experts}, block {block}", " / ".join(f"{100 * p:.1f} %" for p in load))
            for block, load in enumerate(result.utilisation, 1)
        ),
    ]
    return framed("FINAL RESULTS", rows)


def draw_history(history):
    """Figure: the learning curve of a run, from its rows of `train`."""
    epochs = [row["epoch"] for row in history]
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, label in (("train_mse", "training"), ("val_mse", "validation")):
        axis.plot(epochs, [psnr_of(row[name]) for row in history], ".-", label=label)
    best = min(history, key=lambda row: row["val_mse"])
    axis.axvline(best["epoch"], color="grey", lw=0.8, ls=":", label=f"best: {best['epoch']}")
    axis.set(xlabel="epoch", ylabel="PSNR of the mean squared error (dB)", title="Learning curve")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(alpha=0.3)
    axis.legend()
    return figure
