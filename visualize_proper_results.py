"""Tests a checkpoint on the whole test set and draws what the model and its routers did.

    python visualize_proper_results.py     # best_denoising_model_proper.pt on CIFAR-10

Writes denoising_visualization_proper.png, six images from the worst to the best decile, and
denoising_visualization_proper_images.csv, the figures of every test image; prints PSNR against σ.
"""

from pathlib import Path

import numpy as np
import torch
from matplotlib import pyplot as plt

from experiment.command_line import add_output, make_parser
from experiment.evaluation import (
    evaluate,
    psnr,
    psnr_against_noise,
    result_line,
    spread,
    ssim,
)
from experiment.noisy_images import noise_text, noisy_splits
from experiment.run_files import check_picture, check_writable, write_csv, write_figure
from experiment.user_errors import run_main
from small_vit import load_for_evaluation

# Ranks of the images drawn, as percentiles: the middle of the worst decile to that of the best.
PERCENTILES = (5, 23, 41, 59, 77, 95)


def rank_images(psnrs):
    """Indices of the images at PERCENTILES of PSNR, worst first."""
    order = np.argsort(psnrs, kind="stable")
    return [int(order[round(p / 100 * (len(order) - 1))]) for p in PERCENTILES]


def summary_table(result):
    """Text table: mean, std, median, mean of the worst and of the best decile."""
    rows = ["             mean     std  median  worst 10 %  best 10 %"]
    for name, values in (("PSNR (dB)", result.psnr), ("SSIM", result.ssim)):
        ordered = np.sort(values)
        decile = max(1, len(ordered) // 10)
        (mean, std), median = spread(values), np.median(values)
        edges = f"{ordered[:decile].mean():11.4g} {ordered[-decile:].mean():10.4g}"
        rows.append(f"{name:<9} {mean:7.4g} {std:7.4g} {median:7.4g} {edges}")
    return "\n".join(rows)


def draw_images(model, dataset, indices, k_attend, title):
    """Figure: a row per image; noisy, denoised and true, then each block's expert weights.

    Args:
        model: SmallViT in evaluation mode.
        dataset: NoisyImageDataset.
        indices: images to draw.
        k_attend: budget of each expert, for the headings.
        title: of the figure.
    """
    device = next(model.parameters()).device
    noisy, clean, _ = (torch.stack(t) for t in zip(*(dataset[i] for i in indices), strict=True))
    with torch.inference_mode():
        restored, routings = model(noisy.to(device))
    restored = restored.cpu()
    # [images, blocks, E, grid, grid]
    maps = torch.stack(routings, 1).transpose(2, 3).unflatten(3, (model.grid, model.grid)).cpu()
    blocks, experts = maps.shape[1:3]
    most = (maps - 1 / experts).abs().max().item()  # white is an even split

    columns = 3 + blocks * experts
    ratios = [1.6] * 3 + [1] * (columns - 3)
    figure, axes = plt.subplots(
        len(indices),
        columns,
        figsize=(sum(ratios) * 1.3 + 0.9, len(indices) * 2.0 + 1.2),
        gridspec_kw={"width_ratios": ratios},
        layout="constrained",
        squeeze=False,
    )
    for row, (x, y, target) in enumerate(zip(noisy, restored, clean, strict=True)):
        for axis, image in zip(axes[row], (x, y, target), strict=False):
            axis.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
            if image is not target:
                axis.set_xlabel(
                    f"{psnr(image.numpy(), target.numpy()):.2f} dB, "
                    f"SSIM {ssim(image.numpy(), target.numpy()):.3f}"
                )
        axes[row, 0].set_ylabel(f"percentile {PERCENTILES[row]}")
        for column in range(blocks * experts):
            block, expert = divmod(column, experts)
            weights = maps[row, block, expert].numpy()
            picture = axes[row, 3 + column].imshow(
                weights, cmap="RdBu_r", vmin=1 / experts - most, vmax=1 / experts + most
            )
            axes[row, 3 + column].set_xlabel(f"mean {weights.mean():.2f}")
    for axis, name in zip(axes[0], ("noisy", "denoised", "ground truth"), strict=False):
        axis.set_title(name)
    for column in range(blocks * experts):
        block, expert = divmod(column, experts)
        axes[0, 3 + column].set_title(
            f"block {block + 1}\nexpert k={k_attend[expert]}", fontsize=10
        )
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    bar = figure.colorbar(picture, ax=axes[:, 3:], location="right", shrink=0.5, pad=0.02)
    bar.set_label("routing weight of the token (white: even split)")
    figure.suptitle(title)
    return figure


def main():
    parser = make_parser(
        "Tests a checkpoint on the whole test set; draws six images from the worst to the best "
        "decile with the router's decisions; writes a CSV with every image's figures beside it.",
        "python visualize_proper_results.py --checkpoint photos.pt --output photos.png",
        *("checkpoint", "dataset", "data-dir", "noise-level", "device", "threads"),
    )
    add_output(parser, "denoising_visualization_proper.png", "picture to write")
    args = parser.parse_args()
    output = Path(args.output)
    table = output.with_name(f"{output.stem}_images.csv")
    check_picture(output)
    check_writable(table)
    _, model, source, noise_range = load_for_evaluation(args)
    test_set = noisy_splits(source, noise_range)[2]
    result = evaluate(model, test_set)

    rows = [
        {
            "image": index,
            "class": source.classes[test_set.split.labels[index]],
            "noisy_psnr_db": f"{before:.4f}",
            "psnr_db": f"{after:.4f}",
            "ssim": f"{similarity:.5f}",
        }
        for index, (before, after, similarity) in enumerate(
            zip(result.noisy_psnr, result.psnr, result.ssim, strict=True)
        )
    ]
    write_csv(rows, table)
    line = result_line(result.psnr, result.ssim, source.name)
    title = f"Worst to best of {len(test_set):,} test images, {noise_text(noise_range)}\n{line}"
    budgets = model.config.k_attend
    write_figure(draw_images(model, test_set, rank_images(result.psnr), budgets, title), output)
    print(summary_table(result))
    print("\n| σ | noisy (dB) | denoised (dB) |\n|---|---|---|")
    for level, before, after in psnr_against_noise(model, test_set):
        print(f"| {level:.2f} | {before:.2f} | {after:.2f} |")
    print(f"\nwrote {output} and {table}")
    print(line)
    return 0


if __name__ == "__main__":
    run_main(main)
