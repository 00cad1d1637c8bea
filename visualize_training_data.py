"""Draws training samples and checks that their noise is what it should be.

    python visualize_training_data.py --dataset photos

Writes training_data_verification.png. Exit code 1 when a measured figure is off.
"""

import math

import torch
from matplotlib import pyplot as plt

from experiment.command_line import add_output, make_parser
from experiment.image_sources import load_images
from experiment.noisy_images import noisy_splits
from experiment.run_files import check_picture, write_figure
from experiment.user_errors import run_main

MEASURED_IMAGES = 4096  # at most; 12.6 million values fix the standard deviation to 0.03 %


def clipped_noise(value_frequency, sigma, edges):
    """Theory of noisy - clean for noisy = clamp(clean + σ·N(0, 1), 0, 1).

    For a clean value c the difference is normal, with all that lies beyond -c and 1 - c moved to
    these two values (a censored normal distribution).

    Args:
        value_frequency: float64 [256], part of each clean value 0/255 … 255/255.
        sigma: standard deviation of the noise, above 0.
        edges: float64 [m + 1], edges of histogram bins.

    Returns:
        (mean, std, part of the values in each bin [m]).
    """
    clean = torch.arange(256, dtype=torch.float64) / 255
    low, high = -clean / sigma, (1 - clean) / sigma  # in units of σ
    below, above = torch.special.ndtr(low), torch.special.ndtr(-high)
    density_low, density_high = (
        torch.exp(-(t**2) / 2) / math.sqrt(2 * math.pi) for t in (low, high)
    )
    mean = low * below + high * above + density_low - density_high
    inside = 1 - below - above + low * density_low - high * density_high
    square = low**2 * below + high**2 * above + inside
    mean = (value_frequency * mean).sum() * sigma
    std = ((value_frequency * square).sum() * sigma**2 - mean**2).sqrt()

    edges = edges[:, None]
    cumulative = torch.special.ndtr(edges / sigma)
    cumulative = cumulative.where(edges >= -clean, 0.0).where(edges < 1 - clean, 1.0)
    return mean.item(), std.item(), ((cumulative * value_frequency).sum(1)).diff()


def check_noise(noisy, clean, sigma):
    """Compares noise with its theory.

    Args:
        noisy, clean: float32 [n, 3, h, w] in [0, 1].
        sigma: standard deviation that the noise should have before the clamp.

    Returns:
        (list of (quantity, measured, expected, tolerance), difference noisy - clean).
    """
    difference = (noisy - clean).double()
    values = difference.numel()
    frequency = torch.bincount((clean * 255).round().long().flatten(), minlength=256) / values
    if sigma > 0:
        mean, std, _ = clipped_noise(frequency.double(), sigma, torch.zeros(1, dtype=torch.float64))
    else:
        mean, std = 0.0, 0.0
    error = std / math.sqrt(values) + 1e-8  # standard error of the mean; float32
    return [
        ("mean of the noise", difference.mean().item(), mean, 5 * error),
        ("std of the noise", difference.std().item(), std, 5 * error),
        ("smallest noisy value", noisy.min().item(), 0.5, 0.5),
        ("largest noisy value", noisy.max().item(), 0.5, 0.5),
    ], difference


def draw_samples(noisy, clean, difference, sigma, title):
    """Figure: six rows clean → noisy → difference, and the histogram of the noise."""
    rows = min(6, len(clean))
    figure = plt.figure(figsize=(11, 1.5 * rows + 1), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1, 1.1])
    axes = left.subplots(rows, 3, squeeze=False)
    for row in range(rows):
        shown = (clean[row], noisy[row], (difference[row] / (6 * max(sigma, 1e-3)) + 0.5))
        for axis, image in zip(axes[row], shown, strict=True):
            axis.imshow(image.clamp(0, 1).permute(1, 2, 0).numpy(), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
        axes[row, 0].set_ylabel(f"range {clean[row].min():.2f} … {clean[row].max():.2f}")
        axes[row, 2].set_ylabel(f"std {difference[row].std():.3f}")
    for axis, name in zip(axes[0], ("clean", "noisy", "difference (±3σ)"), strict=True):
        axis.set_title(name)

    axis = right.subplots()
    edges = torch.linspace(-1, 1, 202, dtype=torch.float64)  # no edge at 0, where σ = 0 puts all
    counts = torch.histogram(difference.flatten(), edges).hist / difference.numel()
    width = (edges[1] - edges[0]).item()
    axis.stairs(counts / width, edges, fill=True, color="tab:blue", alpha=0.5, label="measured")
    if sigma > 0:
        counted = torch.bincount((clean * 255).round().long().flatten(), minlength=256)
        _, _, theory = clipped_noise(counted / counted.sum().double(), sigma, edges)
        middle = (edges[1:] + edges[:-1]) / 2
        axis.plot(middle, theory / width, "k-", lw=1, label="theory: N(0, σ²) clamped with image")
        normal = torch.exp(-((middle / sigma) ** 2) / 2) / (sigma * math.sqrt(2 * math.pi))
        axis.plot(middle, normal, "r:", lw=1, label="N(0, σ²) before the clamp")
        axis.set_xlim(-4.5 * sigma, 4.5 * sigma)
    axis.set(xlabel="noisy − clean", ylabel="probability density", title="Noise of all pixels")
    axis.legend(loc="upper left", fontsize=8)
    figure.suptitle(title)
    return figure


def main():
    parser = make_parser(
        "Draws training samples, compares their noise with its theory and exits with 1 when it "
        "is off.",
        "python visualize_training_data.py --dataset photos",
        *("dataset", "data-dir", "noise-level", "seed"),
    )
    add_output(
        parser, "training_data_verification.png", "picture to write, in place of an earlier one"
    )
    args = parser.parse_args()
    check_picture(args.output)
    source = load_images(args.dataset, args.data_dir, args.seed)
    train_set = noisy_splits(source, args.noise_level)[0]
    sigma = args.noise_level[0]
    noisy, clean, _ = next(train_set.shuffled_batches(MEASURED_IMAGES, args.seed, epoch=1))
    checks, difference = check_noise(noisy, clean, sigma)

    print(f"{source.name}: {len(noisy):,} of {len(train_set):,} training images")
    wrong = 0
    for quantity, measured, expected, tolerance in checks:
        off = not abs(measured - expected) <= tolerance
        wrong += off
        print(
            f"  {quantity:<20} {measured:9.5f}   expected {expected:.5f} ± {tolerance:.5f}"
            f"{'   OFF' if off else ''}"
        )
    title = f"{source.name}, training samples of epoch 1, σ = {sigma:g}"
    write_figure(draw_samples(noisy, clean, difference, sigma, title), args.output)
    print(f"wrote {args.output}")
    print("the noise is OFF" if wrong else "the noise is as it should be")
    return 1 if wrong else 0


if __name__ == "__main__":
    run_main(main)
