"""Draws training samples and checks that their noise is what it should be.

    python visualize_training_data.py --dataset photos
    python visualize_training_data.py --dataset photos --noise camera

Writes training_data_verification.png. Exit code 1 when a measured figure of Gaussian noise is off.
Of a camera's noise, and of that in a --dataset of pairs, it prints the same statistics.
"""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor

from common.safe_files import check_picture, write_figure
from common.user_errors import UserError, counted, run_main
from experiment import command_line as cli
from experiment.recipe import Recipe, changed
from experiment.reports import print_head, print_row
from images.image_sources import SIZE, has_pairs, load_images
from images.noise_statistics import BINS, COLOURS, DISTANCES, noise_statistics
from images.noisy_images import NoisyImageDataset, noisy_splits
from images.training_batches import training_batches

MEASURED_IMAGES = 4096  # at most; 12.6 million values fix the standard deviation to 0.03 %
DETAIL, DETAILS = 96, 5  # side of a part of a photograph that is drawn, pixels; how many
SIGMAS = 256  # values to which σ is rounded where it differs; 4e-6 of the standard deviation


def joint_frequency(clean: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Of images that are multiples of 1/255 in [0, 1] and the σ of every value: how often each pair
    of σ and value occurs, float64 [s, 256], and the values of σ, float64 [s].
    """
    low, high = (x.double() for x in sigma.aminmax())
    step = ((high - low) / (SIGMAS - 1)).clamp_min(1e-12)
    value = (clean * 255).round().long().flatten()
    rounded = ((sigma.flatten() - low) / step).round().long()
    counts = torch.bincount(256 * rounded + value, minlength=256 * SIGMAS).view(SIGMAS, 256)
    there = counts.sum(1) > 0
    sigmas = low + step * torch.arange(SIGMAS, dtype=torch.float64)
    return counts[there].double() / value.numel(), sigmas[there]


def clipped_noise(frequency: Tensor, sigmas: Tensor) -> tuple[float, float]:
    """Mean and std of noisy - clean in theory, for noisy = clamp(clean + σ·N(0, 1), 0, 1), σ > 0.

    For a clean value c the difference is normal, with all that lies beyond -c and 1 - c moved to
    these two values (a censored normal distribution). Takes what `joint_frequency` gives.
    """
    clean, sigma = torch.arange(256, dtype=torch.float64) / 255, sigmas[:, None]
    low, high = -clean / sigma, (1 - clean) / sigma  # in units of σ
    below, above = torch.special.ndtr(low), torch.special.ndtr(-high)
    root = math.sqrt(2 * math.pi)
    density_low, density_high = (torch.exp(-(x**2) / 2) / root for x in (low, high))
    mean = low * below + high * above + density_low - density_high
    inside = 1 - below - above + low * density_low - high * density_high
    square = low**2 * below + high**2 * above + inside
    mean = (frequency * mean * sigma).sum()
    std = ((frequency * square * sigma**2).sum() - mean**2).sqrt()
    return mean.item(), std.item()


def histograms(frequency: Tensor, sigmas: Tensor, edges: Tensor) -> tuple[Tensor, Tensor]:
    """The same noise after and before the clamp: parts of it between edges [m + 1], float64 [m]."""
    clean, edges = torch.arange(256, dtype=torch.float64) / 255, edges[:, None]
    clamped = unclamped = 0.0
    for of_sigma, sigma in zip(frequency, sigmas, strict=True):
        cumulative = torch.special.ndtr(edges / sigma)
        unclamped = unclamped + of_sigma.sum() * cumulative[:, 0]
        cumulative = cumulative.where(edges >= -clean, 0.0).where(edges < 1 - clean, 1.0)
        clamped = clamped + cumulative @ of_sigma
    return clamped.diff(), unclamped.diff()


def check_noise(noisy: Tensor, clean: Tensor, sigma: Tensor, levels: tuple) -> list[tuple]:
    """Rows (quantity, measured, expected, tolerance) for images [n, 3, h, w] in [0, 1], the σ that
    their noise should have before the clamp, and the levels (low, high) between which that lies.
    """
    difference, (low, high) = (noisy - clean).double(), levels
    mean, std = clipped_noise(*joint_frequency(clean, sigma)) if sigma.any() else (0.0, 0.0)
    error = std / math.sqrt(difference.numel()) + 1e-8  # standard error of the mean; float32
    between = (low + high) / 2, (high - low) / 2 + 1e-6
    return [
        ("mean of the noise", difference.mean().item(), mean, 5 * error),
        ("std of the noise", difference.std().item(), std, 5 * error),
        ("smallest noisy value", noisy.min().item(), 0.5, 0.5),
        ("largest noisy value", noisy.max().item(), 0.5, 0.5),
        ("smallest σ", sigma.min().item(), *between),
        ("largest σ", sigma.max().item(), *between),
    ]


def draw_histogram(axis: plt.Axes, clean: Tensor, difference: Tensor, sigma: Tensor) -> None:
    """Draws how often each value of the noise occurs, and should occur."""
    edges = torch.linspace(-1, 1, 202, dtype=torch.float64)  # no edge at 0, where σ = 0 puts all
    counts = torch.histogram(difference.flatten(), edges).hist / difference.numel()
    width = (edges[1] - edges[0]).item()
    axis.stairs(counts / width, edges, fill=True, color="tab:blue", alpha=0.5, label="measured")
    if sigma.any():
        theory, normal = histograms(*joint_frequency(clean, sigma), edges)
        middle, most = (edges[1:] + edges[:-1]) / 2, max(sigma.max().item(), 1e-3)
        axis.plot(middle, theory / width, "k-", lw=1, label="theory: N(0, σ²) clamped with image")
        axis.plot(middle, normal / width, "r:", lw=1, label="N(0, σ²) before the clamp")
        axis.set_xlim(max(-1, -4.5 * most), min(1, 4.5 * most))
    axis.set(xlabel="noisy − clean", ylabel="probability density", title="Noise of all pixels")
    axis.legend(loc="upper left", fontsize=8)


def draw_samples(noisy: Tensor, clean: Tensor, sigma: Tensor, title: str) -> Figure:
    """Figure: six rows clean → noisy → difference, → σ where that differs, and the histogram."""
    difference = (noisy - clean).double()
    rows, most = min(6, len(clean)), max(sigma.max().item(), 1e-3)
    names = ["clean", "noisy", f"difference (±{3 * most:.2g})"]
    names += ["σ"] if (sigma != sigma[:, :1, :1, :1]).any() else []
    figure = plt.figure(figsize=(11 + 2 * (len(names) - 3), 1.5 * rows + 1), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[len(names) / 3, 1.1])
    axes = left.subplots(rows, len(names), squeeze=False)
    for row in range(rows):
        shown = (clean[row], noisy[row], difference[row] / (6 * most) + 0.5, sigma[row] / most)
        for axis, image in zip(axes[row], shown, strict=False):
            axis.imshow(image.clamp(0, 1).permute(1, 2, 0).numpy(), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
        axes[row, 0].set_ylabel(f"range {clean[row].min():.2f} … {clean[row].max():.2f}")
        axes[row, 2].set_ylabel(f"std {difference[row].std():.3f}")
    for axis, name in zip(axes[0], names, strict=True):
        axis.set_title(name)
    draw_histogram(right.subplots(), clean, difference, sigma)
    figure.suptitle(title)
    return figure


def print_statistics(found: dict[str, np.ndarray]) -> None:
    """Prints what `noise_statistics` found as a Markdown table."""
    print_head("noise of whole photographs", *COLOURS)
    rows = [("standard deviation, of 255", found["level"])]
    for name in ("horizontal", "vertical"):
        rows += [
            (f"{name} correlation at {d}", r) for d, r in zip(DISTANCES, found[name], strict=True)
        ]
    rows += [("correlation with the next colour", found["colours"])]
    names = [f"strength at brightness {(b + 0.5) / BINS:.2f}" for b in range(BINS)]
    rows += zip(names, found["brightness"], strict=True)
    for name, values in rows:
        print_row(name, *(f"{value:.2f}" for value in values))


def draw_statistics(dataset: NoisyImageDataset, found: dict, title: str) -> Figure:
    """Figure: details clean | noisy | with white noise as strong; correlation; strength."""
    figure, count = plt.figure(figsize=(12, 8), layout="constrained"), min(DETAILS, len(dataset))
    left, right = figure.subfigures(1, 2, width_ratios=[1.1, 1])
    axes, white = left.subplots(count, 3, squeeze=False), np.random.default_rng(0)
    for line, index in zip(axes, np.linspace(0, len(dataset) - 1, count).astype(int), strict=True):
        noisy, clean = (x.permute(1, 2, 0).numpy() for x in dataset[int(index)][:2])
        top, left_edge = ((size - min(size, DETAIL)) // 2 for size in clean.shape[:2])
        part = np.s_[top : top + DETAIL, left_edge : left_edge + DETAIL]
        other = clean + (noisy - clean).std() * white.standard_normal(clean.shape)
        for axis, image in zip(line, (clean, noisy, other), strict=True):
            axis.imshow(image[part].clip(0, 1), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
    for axis, name in zip(axes[0], ("clean", "noisy", "white noise as strong"), strict=True):
        axis.set_title(name)
    near, strong = right.subplots(2, 1)
    for colour, name in enumerate(COLOURS):
        values = [1, *found["horizontal"][:, colour]]
        near.plot(range(len(values)), values, ".-", color=f"tab:{name}", label=name)
        places = (np.arange(BINS) + 0.5) / BINS
        strong.plot(places, found["brightness"][:, colour], ".-", color=f"tab:{name}")
    near.plot((0, *DISTANCES), [1] + [0] * len(DISTANCES), "k:", label="white noise")
    near.set(xlabel="distance in pixels, horizontally", title="Correlation", xticks=(0, *DISTANCES))
    near.legend()
    strong.axhline(1, color="k", ls=":")
    strong.set(xlabel="brightness", title="Strength over brightness", ylim=(0, None))
    figure.suptitle(title)
    return figure


def show_statistics(args, recipe) -> int:
    """Prints and draws the noise of whole test images: a camera's as drawn, or that of pairs."""
    source = load_images(args.dataset, args.data_dir, args.seed, crop=SIZE, test_only=True)
    degradation = recipe.for_images(source, vars(args)).degradation
    if not source.test.paired:
        degradation = replace(degradation, camera_share=1.0)
    test_set = noisy_splits(source, degradation)[2]
    found = noise_statistics(test_set)
    title = f"{source.name}, {len(test_set):,} test images, {degradation}"
    print(title)
    if not found:
        raise UserError(f"{source.name}: its images have no noise")
    print_statistics(found)
    write_figure(draw_statistics(test_set, found, title), args.output)
    print(f"\nwrote {args.output}")
    return 0


def main():
    parser = cli.make_parser(
        "Draws training samples, compares their noise with theory, exits with 1 when it is off.",
        "python visualize_training_data.py --dataset photos",
    )
    cli.add_data(parser)
    cli.add_noise(parser)
    what = "picture to write, in place of an earlier one"
    cli.add_output(parser, "training_data_verification.png", what)
    args = parser.parse_args()
    recipe = changed(Recipe(), vars(args))
    degradation = recipe.degradation
    check_picture(args.output)
    if degradation.noise == "camera" or has_pairs(Path(args.dataset)):
        return show_statistics(args, recipe)
    source = load_images(args.dataset, args.data_dir, args.seed)
    train_set = noisy_splits(source, degradation)[0]
    batches = training_batches(train_set, MEASURED_IMAGES, args.seed, epoch=1, with_sigma=True)
    noisy, clean, _, sigma = next(batches)

    print(f"{source.name}: {len(noisy):,} of {counted(len(train_set), 'training image')}")
    wrong = 0
    rows = check_noise(noisy, clean, sigma, degradation.noise_level)
    for quantity, measured, expected, tolerance in rows:
        off = not abs(measured - expected) <= tolerance
        wrong += off
        low, high = expected - tolerance, expected + tolerance
        figures = f"{measured:9.5f}   expected {low:.5f} to {high:.5f}"
        print(f"  {quantity:<20} {figures}{'   OFF' if off else ''}")
    title = f"{source.name}, training samples of epoch 1, {degradation}"
    write_figure(draw_samples(noisy, clean, sigma, title), args.output)
    print(f"wrote {args.output}")
    print("the noise is OFF" if wrong else "the noise is as it should be")
    return 1 if wrong else 0


if __name__ == "__main__":
    run_main(main)
