"""Tests a checkpoint on the whole test set and draws what the model and its routers did.

    python visualize_proper_results.py     # best_denoising_model_proper.pt on CIFAR-10

Writes denoising_visualization_proper.png, six images from the worst to the best decile, and
denoising_visualization_proper_images.csv, the figures of every test image; prints PSNR against σ.
"""

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt

from common.safe_files import check_picture, check_writable, csv_text, write_figure, write_text
from common.user_errors import UserError, printable, run_main
from experiment.checkpoints import read_checkpoint
from experiment.command_line import add_output, make_parser
from experiment.evaluation import (
    evaluate,
    psnr,
    psnr_against_noise,
    result_line,
    spread,
    ssim,
)
from experiment.trained_model import load_for_evaluation
from images.degradations import degradation_in
from small_vit import at_each, build_model

# Ranks of the images drawn, as percentiles: the middle of the worst decile to that of the best.
PERCENTILES = (5, 23, 41, 59, 77, 95)
NAMES = {
    "denoise": ("noisy", "denoised", "ground truth"),
    "super-resolution": ("low resolution, enlarged", "restored", "ground truth"),
    "inpaint": ("with holes (figures: filled)", "restored", "ground truth"),
    "jpeg": ("JPEG", "restored", "ground truth"),
}
DETAIL = 96  # side of the enlarged part of a photograph, pixels
SHOWN_CAPACITIES = (0.5, 0.25, 0.125)  # of the tokens that attend, of a model with such a choice


def capacity_table(model, dataset):
    """Markdown table: PSNR and SSIM for all tokens and for SHOWN_CAPACITIES."""
    rows = ["| of the tokens attend | PSNR (dB) | SSIM |", "|---|---|---|"]
    for share in at_each(model, (1.0, *SHOWN_CAPACITIES)):
        result = evaluate(model, dataset)
        figures = f"{result.psnr.mean():.3f} | {result.ssim.mean():.4f}"
        rows.append(f"| {100 * share:g} % | {figures} |")
    return "\n".join(rows)


def rank_images(psnrs):
    """{index of an image: its percentile} for PERCENTILES of PSNR, worst first, each image once."""
    order = np.argsort(psnrs, kind="stable")
    return {int(order[round(p / 100 * (len(order) - 1))]): p for p in PERCENTILES}


def summary_table(result):
    """Text table: mean, std, median, mean of the worst and of the best decile."""
    rows = ["             mean     std  median  worst 10 %  best 10 %"]
    for name, values in (
        ("PSNR (dB)", result.psnr),
        ("SSIM", result.ssim),
        ("sharpness", result.sharpness),
    ):
        ordered = np.sort(values)
        decile = max(1, len(ordered) // 10)
        (mean, std), median = spread(values), np.median(values)
        edges = f"{ordered[:decile].mean():11.4g} {ordered[-decile:].mean():10.4g}"
        rows.append(f"{name:<9} {mean:7.4g} {std:7.4g} {median:7.4g} {edges}")
    return "\n".join(rows)


def detail(image):
    """Slices of the DETAIL × DETAIL part of [3, h, w] in which the values vary most."""
    sides = [min(DETAIL, size) for size in image.shape[1:]]
    windows = image.unfold(1, sides[0], sides[0] // 2).unfold(2, sides[1], sides[1] // 2)
    contrast = windows.std((3, 4)).mean(0)  # [rows, columns] of windows
    row, column = divmod(int(contrast.argmax()), contrast.shape[1])
    top, left = row * (sides[0] // 2), column * (sides[1] // 2)
    return slice(None), slice(top, top + sides[0]), slice(left, left + sides[1])


def attending(model, routings):
    """Where the tokens attend: for every block's routing, bool [B, N]."""
    return [
        torch.zeros_like(routing[..., 0], dtype=torch.bool).scatter(
            1, block.attention.choose(routing), True
        )
        for block, routing in zip(model.blocks, routings, strict=True)
    ]


@torch.inference_mode()
def restore(model, noisy):
    """[3, h, w] -> the restored image and maps of what each block did, [blocks, E, rows, columns].

    They are the routing weights of the experts or, with a capacity, for each of SHOWN_CAPACITIES
    ones where a token attends.
    """
    noisy = noisy.unsqueeze(0).to(next(model.parameters()).device)
    rows = math.ceil(noisy.shape[2] / model.config.patch_size)
    restored, routings = model(noisy)
    if model.capacity:
        decisions = [
            [a.float() for a in attending(model, model(noisy)[1])]
            for _ in at_each(model, SHOWN_CAPACITIES)
        ]
        routings = [torch.stack(block, 2) for block in zip(*decisions, strict=True)]
    maps = torch.cat(routings).transpose(1, 2).unflatten(2, (rows, -1))
    return restored[0].cpu(), maps.cpu()


@torch.inference_mode()
def decision_table(model, dataset):
    """Text table: how often a place attends, and what goes with it, over all tokens of a data set.

    Args:
        model: SmallViT with a capacity, in evaluation mode.
        dataset: NoisyImageDataset.
    """
    device, of_blocks, places = next(model.parameters()).device, [], []

    def of_tokens(x):  # [3, h, w] -> [rows, columns], the mean over a patch and the colours
        return F.avg_pool2d(x, model.config.patch_size, ceil_mode=True).mean(0)

    for index in range(len(dataset)):
        noisy, clean, _ = dataset[index]
        restored, routings = model(noisy.unsqueeze(0).to(device))
        error = of_tokens((restored[0].cpu() - clean).square())
        variance = of_tokens(clean.square()) - of_tokens(clean).square()
        causes = [of_tokens(dataset.sigma(index)), variance.clamp_min(0).sqrt(), error]
        of_blocks.append(torch.cat(attending(model, routings)).float().cpu())  # [blocks, N]
        places.append(torch.stack(causes).flatten(1))  # [3, N]
    rows = ["                      a place attends      correlation of attending with"]
    rows.append("          least    mean    most      true σ   local contrast   error after")
    causes = torch.cat(places, 1)  # [3, all tokens]
    for block, chosen in enumerate(zip(*of_blocks, strict=True), 1):
        often = torch.stack(chosen).mean(0) if not dataset.whole else torch.cat(chosen).mean()[None]
        pairs = [torch.corrcoef(torch.stack([torch.cat(chosen), cause]))[0, 1] for cause in causes]
        shares = "  ".join(f"{100 * x:5.1f} %" for x in (often.min(), often.mean(), often.max()))
        # A cause that is the same everywhere has no correlation
        cells = [f"{x:.3f}" if x.isfinite() else "–" for x in pairs]
        rows.append(f"block {block}  {shares}  {cells[0]:>9} {cells[1]:>12} {cells[2]:>14}")
    return "\n".join(rows)


def panel_names(dataset, paths):
    """Titles of the images in a row: as the models get them, as each restores them, the truth."""
    before, after, truth = NAMES[dataset.degradation.task]
    # The end of a path says more than its beginning, and more of it would not fit.
    short = [path if len(path) <= 18 else Path(path).name[-18:] for path in paths]
    several = [f"{after}:\n{printable(path)}" for path in short]
    names = [before, *(several if len(paths) > 1 else [after]), truth]
    return names + [f"{name}, detail" for name in names] * dataset.whole


def draw_images(models, dataset, indices, title):
    """Figure: a row per image; noisy, denoised and true, of photographs a detail of each as well,
    then each block's expert weights where there are several experts.

    Args:
        models: [(path of its checkpoint, SmallViT in evaluation mode)]; the weights are those of
            the first.
        dataset: NoisyImageDataset.
        indices: of `rank_images`, {image to draw: its percentile}.
        title: of the figure.
    """
    (_, model), *others = models
    shown = [dataset[i][:2] for i in indices]
    restored, maps = zip(*(restore(model, noisy) for noisy, _ in shown), strict=True)
    restored = [
        [image, *(other.denoise(noisy.unsqueeze(0))[0] for _, other in others)]
        for image, (noisy, _) in zip(restored, shown, strict=True)
    ]
    blocks, experts = maps[0].shape[:2] if maps[0].shape[1] > 1 else (0, 0)
    most = max((m - 1 / m.shape[1]).abs().max().item() for m in maps)  # white is an even split
    colours = {
        "cmap": "RdBu_r",
        "vmin": 1 / max(1, experts) - most,
        "vmax": 1 / max(1, experts) + most,
    }
    columns = [f"expert k={k}" for k in model.config.k_attend]
    if model.capacity:
        colours = {"cmap": "gray", "vmin": 0, "vmax": 1}
        columns = [f"{100 * share:g} % attend" for share in SHOWN_CAPACITIES]

    damage, names = dataset.degradation, panel_names(dataset, [path for path, _ in models])
    differs = damage.task == "denoise" and damage.noise_map != "uniform"
    sigmas = [dataset.sigma(i) / damage.noise_range[1] for i in indices] if differs else []
    names += ["σ of the noise"] if sigmas else []
    ratios = [1.6] * len(names) + [1] * (blocks * experts)
    figure, axes = plt.subplots(
        len(indices),
        len(ratios),
        figsize=(sum(ratios) * 1.3 + 0.9, len(indices) * 2.0 + 1.2),
        gridspec_kw={"width_ratios": ratios},
        layout="constrained",
        squeeze=False,
    )
    rows = zip(shown, restored, indices.values(), strict=True)
    for row, ((noisy, clean), images, percentile) in enumerate(rows):
        damaged = noisy[:3].clamp(0, 1) * noisy[3:].prod(0)  # black where pixels are unknown
        panels = [damaged, *images, clean]
        part = detail(clean) if dataset.whole else ()
        panels += [panel[part] for panel in panels] if part else []
        panels += [sigmas[row]] if sigmas else []
        for axis, panel in zip(axes[row], panels, strict=False):
            axis.imshow(panel.permute(1, 2, 0).numpy(), interpolation="nearest")
        for axis, x in zip(axes[row], (noisy[:3], *images), strict=False):
            pair = x.numpy(), clean.numpy()
            axis.set_xlabel(f"{psnr(*pair):.2f} dB, SSIM {ssim(*pair):.3f}")
        axes[row, 0].set_ylabel(f"percentile {percentile}")
        for axis, weights in zip(axes[row, len(names) :], maps[row].flatten(0, 1), strict=False):
            picture = axis.imshow(weights.numpy(), **colours)
            if not model.capacity:
                axis.set_xlabel(f"mean {weights.mean():.2f}")
    for axis, name in zip(axes[0], names, strict=False):
        axis.set_title(name)
    for column, axis in enumerate(axes[0, len(names) :]):
        block, expert = divmod(column, experts)
        axis.set_title(f"block {block + 1}\n{columns[expert]}", fontsize=10)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    if experts and not model.capacity:
        bar = figure.colorbar(
            picture, ax=axes[:, len(names) :], location="right", shrink=0.5, pad=0.02
        )
        bar.set_label("routing weight of the token (white: even split)")
    figure.suptitle(title)
    return figure


def others_for(dataset, paths):
    """[(path, SmallViT on the CPU)] of checkpoints for the task of a data set.

    Raises:
        UserError: one cannot be read, or is for another task or scale.
    """
    models = []
    for path in paths:
        checkpoint = read_checkpoint(path)
        own, asked = degradation_in(checkpoint["recipe"]), dataset.degradation
        if (own.task, own.multiple) != (asked.task, asked.multiple):  # which is the scale
            raise UserError(
                f"--beside {path}: it was trained for {own}, not for {asked}; name others"
            )
        models.append((path, build_model(checkpoint, path)))
    return models


def main():
    parser = make_parser(
        "Tests a checkpoint on the whole test set; draws six images from the worst to the best "
        "decile with the router's decisions; writes a CSV with every image's figures beside it.",
        "python visualize_proper_results.py --checkpoint photos.pt --output photos.png",
        *("checkpoint", "dataset", "data-dir", "noise-level", "device", "threads"),
    )
    parser.add_argument(
        "--beside",
        nargs="+",
        default=[],
        metavar="FILE",
        help="models for the same task, drawn beside it on the same images (default: none)",
    )
    add_output(
        parser, "denoising_visualization_proper.png", "picture to write, in place of an earlier one"
    )
    args = parser.parse_args()
    output = Path(args.output)
    table = output.with_name(f"{output.stem}_images.csv")
    check_picture(output)
    check_writable(table)
    _, model, source, (*_, test_set) = load_for_evaluation(args, build_model)
    models = [(args.checkpoint, model), *others_for(test_set, args.beside)]
    result = evaluate(model, test_set)

    rows = [
        {
            "image": index,
            "class": source.classes[test_set.split.labels[index]],
            "noisy_psnr_db": f"{before:.4f}",
            "psnr_db": f"{after:.4f}",
            "ssim": f"{similarity:.5f}",
            "sharpness": f"{sharp:.4f}",
        }
        for index, (before, after, similarity, sharp) in enumerate(
            zip(result.noisy_psnr, result.psnr, result.ssim, result.sharpness, strict=True)
        )
    ]
    write_text(csv_text(rows), table)
    line = result_line(result.psnr, result.ssim, source.name)
    title = f"Worst to best of {len(test_set):,} test images, {test_set.degradation}\n{line}"
    write_figure(draw_images(models, test_set, rank_images(result.psnr), title), output)
    print(summary_table(result))
    if model.capacity:
        print(f"\n{100 * model.capacity:g} % of the tokens attend")
        print(f"{decision_table(model, test_set)}\n\n{capacity_table(model, test_set)}")
    if test_set.degradation.task == "denoise":
        print(f"\n{test_set.degradation}, at other σ:\n\n| σ | noisy (dB) | denoised (dB) |")
        print("|---|---|---|")
        for level, before, after in psnr_against_noise(model, test_set):
            print(f"| {level:.2f} | {before:.2f} | {after:.2f} |")
    print(f"\nwrote {output} and {table}")
    print(line)
    return 0


if __name__ == "__main__":
    run_main(main)
