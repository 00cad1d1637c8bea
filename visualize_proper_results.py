"""Tests a checkpoint on the whole test set and draws what the model and its routers did.

    python visualize_proper_results.py     # best_denoising_model_proper.pt on CIFAR-10

Writes denoising_visualization_proper.png, six images from the worst to the best decile, and
denoising_visualization_proper_images.csv, the figures of every test image; prints PSNR against σ.
"""

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor

from common.options import Number
from common.safe_files import check_picture, check_writable, csv_text, write_figure, write_text
from common.user_errors import UserError, counted, printable, run_main
from experiment import command_line as cli
from experiment.evaluation import Evaluation, evaluate, psnr, psnr_against_noise, spread, ssim
from experiment.reports import print_head, print_row, result_line
from experiment.trained_model import images_for
from images.degradations import GaussianNoise
from images.noisy_images import NoisyImageDataset
from small_vit import SmallViT, load_model, with_each_capacity

ROWS = 6  # images drawn, by default
DETAIL = 128  # side of the part of a photograph that is drawn, pixels
SHOWN_CAPACITIES = (0.5, 0.25, 0.125)  # of the tokens that attend, of a model with such a choice
BEFORE = {
    "denoise": "noisy",
    "super-resolution": "low resolution, enlarged",
    "inpaint": "with holes (figures: filled)",
    "jpeg": "JPEG",
}

Models = list[tuple[str, SmallViT]]  # with the paths of their checkpoints


class Panel(NamedTuple):
    """One of the pictures of a test image, which stand in a row."""

    title: str  # of its column
    image: Tensor  # [3, h, w], or what a block did: [rows, columns]
    label: str = ""  # below it


def image_rows(result: Evaluation, test_set: NoisyImageDataset, classes: list[str]) -> list[dict]:
    """The figures of every test image, as the CSV has them."""
    names = test_set.split.names or [""] * len(test_set)
    return [
        {
            "image": index,
            "file": names[index],
            "class": classes[label],
            "noisy_psnr_db": f"{result.noisy_psnr[index]:.4f}",
            "psnr_db": f"{result.psnr[index]:.4f}",
            "ssim": f"{result.ssim[index]:.5f}",
            "sharpness": f"{result.sharpness[index]:.4f}",
        }
        for index, label in enumerate(test_set.split.labels.tolist())
    ]


def print_summary(result: Evaluation) -> None:
    print("             mean     std  median  worst 10 %  best 10 %")
    measured = {"PSNR (dB)": result.psnr, "SSIM": result.ssim, "sharpness": result.sharpness}
    for name, values in measured.items():
        ordered = np.sort(values)
        decile = max(1, len(ordered) // 10)
        (mean, std), median = spread(values), np.median(values)
        edges = f"{ordered[:decile].mean():11.4g} {ordered[-decile:].mean():10.4g}"
        print(f"{name:<9} {mean:7.4g} {std:7.4g} {median:7.4g} {edges}")


def print_capacities(model: SmallViT, dataset: NoisyImageDataset) -> None:
    print_head("of the tokens attend", "PSNR (dB)", "SSIM")
    for share in with_each_capacity(model, (1.0, *SHOWN_CAPACITIES)):
        result = evaluate(model, dataset)
        print_row(f"{100 * share:g} %", f"{result.psnr.mean():.3f}", f"{result.ssim.mean():.4f}")


def attending(model: SmallViT, routings: list[Tensor]) -> list[Tensor]:
    """Where the tokens attend: for every block's routing, bool [B, N]."""
    return [
        torch.zeros_like(routing[..., 0], dtype=torch.bool).scatter(
            1, block.attention.choose(routing), True
        )
        for block, routing in zip(model.blocks, routings, strict=True)
    ]


@torch.inference_mode()
def decisions(model: SmallViT, dataset: NoisyImageDataset, index: int) -> tuple[Tensor, Tensor]:
    """Of the N tokens of an image: [blocks, N], 1 for those that attend, else 0; and what may go
    with it, [3, N]: the true σ, the local contrast and the error that is left.
    """

    def of_tokens(x):  # [3, h, w] -> [N], the mean over a patch and the colours
        return F.avg_pool2d(x, model.config.patch_size, ceil_mode=True).mean(0).flatten()

    noisy, clean, _ = dataset[index]
    restored, routings = model(noisy.unsqueeze(0).to(next(model.parameters()).device))
    error = of_tokens((restored[0].cpu() - clean).square())
    variance = of_tokens(clean.square()) - of_tokens(clean).square()
    causes = [of_tokens(dataset.sigma(index)), variance.clamp_min(0).sqrt(), error]
    return torch.cat(attending(model, routings)).float().cpu(), torch.stack(causes)


def print_decisions(model: SmallViT, dataset: NoisyImageDataset) -> None:
    """Prints how often a place attends, and what goes with it, over all tokens of a data set."""
    print("                      a place attends      correlation of attending with")
    print("          least    mean    most      true σ   local contrast   error after")
    of_images = (decisions(model, dataset, index) for index in range(len(dataset)))
    attend, causes = zip(*of_images, strict=True)
    causes = torch.cat(causes, 1)  # [3, all tokens]
    for block, places in enumerate(zip(*attend, strict=True), 1):
        chosen = torch.cat(places)  # [all tokens]
        often = chosen.mean()[None] if dataset.full_size else torch.stack(places).mean(0)
        shares = "  ".join(f"{100 * x:5.1f} %" for x in (often.min(), often.mean(), often.max()))
        pairs = [torch.corrcoef(torch.stack([chosen, cause]))[0, 1] for cause in causes]
        # A cause that is the same everywhere has no correlation
        cells = [f"{x:.3f}" if x.isfinite() else "–" for x in pairs]
        print(f"block {block}  {shares}  {cells[0]:>9} {cells[1]:>12} {cells[2]:>14}")


def rank_images(psnrs: np.ndarray, count: int) -> dict[int, int]:
    """{index of an image: the percentile of its PSNR}, from the middle of the worst decile to that
    of the best, each image once.
    """
    order = np.argsort(psnrs, kind="stable")
    percentiles = np.linspace(5, 95, count).round().astype(int).tolist()
    return {int(order[round(p / 100 * (len(order) - 1))]): p for p in percentiles}


def detail(image: Tensor) -> tuple[slice, slice]:
    """Rows and columns, at most DETAIL, of the part of [3, h, w] in which the values vary most."""
    height, width = (min(DETAIL, side) for side in image.shape[1:])
    windows = image.unfold(1, height, height // 2).unfold(2, width, width // 2)
    contrast = windows.std((3, 4)).mean(0)  # [rows, columns] of windows
    row, column = divmod(int(contrast.argmax()), contrast.shape[1])
    top, left = row * (height // 2), column * (width // 2)
    return slice(top, top + height), slice(left, left + width)


def image_panels(models: Models, dataset: NoisyImageDataset, index: int) -> list[Panel]:
    """A test image as the models get it, as each restores it, as it is, and σ where that differs;
    of a photograph a detail.
    """
    noisy, clean, _ = dataset[index]
    damage, full_size = dataset.degradation, dataset.full_size
    of_noise, whole = damage.task == "denoise", "whole photograph:\n" if full_size else ""

    def figures(image):
        pair = image.numpy(), clean.numpy()
        return f"{whole}{psnr(*pair):.2f} dB, SSIM {ssim(*pair):.3f}"

    before = BEFORE.get(damage.task, "degraded") + (f", {damage}" if of_noise and full_size else "")
    damaged = noisy[:3].clamp(0, 1) * noisy[3:].prod(0)  # black where pixels are unknown
    panels = [Panel(before, damaged, figures(noisy[:3]))]
    for path, model in models:
        # The end of a path says more than its beginning, and more of it would not fit.
        name = printable(path if len(path) <= 18 else Path(path).name[-18:])
        after = "denoised" if of_noise else "restored"
        image = model.denoise(noisy.unsqueeze(0).to(next(model.parameters()).device))[0].cpu()
        title = f"{after}:\n{name}" if len(models) > 1 else after
        panels.append(Panel(title, image, figures(image)))
    panels.append(Panel("ground truth", clean))
    if getattr(damage, "noise_map", "uniform") != "uniform":
        panels.append(Panel("σ of the noise", dataset.sigma(index) / damage.noise_level[1]))
    rows, columns = detail(clean) if full_size else (slice(None), slice(None))
    return [panel._replace(image=panel.image[:, rows, columns]) for panel in panels]


@torch.inference_mode()
def map_panels(model: SmallViT, noisy: Tensor) -> list[Panel]:
    """What each block does with the whole of [3, h, w]: the routing weights of its experts, where
    there are several, or, with a capacity, for each of SHOWN_CAPACITIES ones where a token attends.
    """
    noisy = noisy.unsqueeze(0).to(next(model.parameters()).device)
    if model.capacity:
        names = [f"{100 * share:g} % attend" for share in SHOWN_CAPACITIES]
        each = with_each_capacity(model, SHOWN_CAPACITIES)
        maps = zip(*(attending(model, model(noisy)[1]) for _ in each), strict=True)
    elif len(model.config.k_attend) > 1:
        names = [f"expert k={k}" for k in model.config.k_attend]
        maps = [routing.unbind(2) for routing in model(noisy)[1]]
    else:
        return []
    rows, panels = math.ceil(noisy.shape[2] / model.config.patch_size), []
    for block, of_block in enumerate(maps, 1):
        for name, weights in zip(names, of_block, strict=True):
            image = weights[0].float().unflatten(0, (rows, -1)).cpu()
            label = "" if model.capacity else f"mean {image.mean():.2f}"
            panels.append(Panel(f"block {block}\n{name}", image, label))
    return panels


def map_colours(model: SmallViT, maps: list[Tensor]) -> dict:
    """How imshow draws maps of what blocks did."""
    if model.capacity or not maps:
        return {"cmap": "gray", "vmin": 0, "vmax": 1}
    even = 1 / len(model.config.k_attend)  # white
    most = max((weights - even).abs().max().item() for weights in maps)
    return {"cmap": "RdBu_r", "vmin": even - most, "vmax": even + most}


def draw_images(
    models: Models, dataset: NoisyImageDataset, indices: dict[int, int], title: str
) -> Figure:
    """Figure: a row for each image of `rank_images`, its panels and the first model's maps."""
    _, model = models[0]
    rows = [image_panels(models, dataset, i) + map_panels(model, dataset[i][0]) for i in indices]
    maps = [panel.image for row in rows for panel in row if panel.image.ndim == 2]
    colours = map_colours(model, maps)
    ratios = [1.6 if panel.image.ndim == 3 else 1 for panel in rows[0]]
    inches = 1.5 if dataset.full_size else 1.3
    size = sum(ratios) * inches + 0.9, len(rows) * (2.55 if dataset.full_size else 2.0) + 1.2
    figure = plt.figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(rows), len(ratios), squeeze=False, width_ratios=ratios)
    for line, row, percentile in zip(axes, rows, indices.values(), strict=True):
        for axis, (_, image, label) in zip(line, row, strict=True):
            if image.ndim == 3:
                axis.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
            else:
                picture = axis.imshow(image.numpy(), **colours)
            axis.set(xticks=[], yticks=[], xlabel=label)
        line[0].set_ylabel(f"percentile {percentile}")
    for axis, panel in zip(axes[0], rows[0], strict=True):
        axis.set_title(panel.title, fontsize=12 if panel.image.ndim == 3 else 10)
    if maps and not model.capacity:
        beside = axes[:, ratios.index(1) :]
        bar = figure.colorbar(picture, ax=beside, location="right", shrink=0.5, pad=0.02)
        bar.set_label("routing weight of the token (white: even split)")
    figure.suptitle(title)
    return figure


def others_for(dataset: NoisyImageDataset, paths: list[str]) -> Models:
    """Models for the task of a data set, on the CPU; a UserError where one is for another task."""
    models = [(path, load_model(path)) for path in paths]
    asked = dataset.degradation
    for path, model in models:
        own = model.trained.recipe.degradation
        if (own.task, own.multiple) != (asked.task, asked.multiple):  # which is the scale
            words = f"it was trained for {own}, not for {asked}; name others"
            raise UserError(f"--beside {path}: {words}")
    return models


def parse_args():
    parser = cli.make_parser(
        "Tests a checkpoint on the whole test set; draws images from the worst to the best "
        "decile, a detail of photographs, with the router's decisions; writes a CSV with every "
        "image's figures beside it.",
        "python visualize_proper_results.py --checkpoint photos.pt --output photos.png",
    )
    cli.add_checkpoint(parser)
    cli.add_data(parser, of_model=True)
    noise = parser.add_argument_group("noise")
    what = "σ of the noise, the same everywhere, for pixel values in [0, 1], also as a fraction: "
    level = {"nargs": None, "help": f"{what}25/255 (default: the noise of the training)"}
    cli.add_fields(noise, GaussianNoise, ["noise_level"], with_defaults=False, noise_level=level)
    what = "models for the same task, drawn beside it on the same images (default: none)"
    parser.add_argument("--beside", nargs="+", default=[], metavar="FILE", help=what)
    what = "picture to write, in place of an earlier one"
    group = cli.add_output(parser, "denoising_visualization_proper.png", what)
    count = Number(int, 2, most=100)
    cli.add_option(group, "--rows", type=count, default=ROWS, metavar="N", help="images to draw")
    cli.add_computation(parser)
    return parser.parse_args()


def main():
    args = parse_args()
    output = Path(args.output)
    table = output.with_name(f"{output.stem}_images.csv")
    check_picture(output)
    check_writable(table)
    model = load_model(args.checkpoint).to(cli.select_device(args.device, args.threads))
    print(model.described())
    noise = {"noise_level": args.noise_level}
    source, (*_, test_set) = images_for(model.trained, args.dataset, args.data_dir, **noise)
    models = [(args.checkpoint, model), *others_for(test_set, args.beside)]
    result = evaluate(model, test_set)

    write_text(csv_text(image_rows(result, test_set, source.classes)), table)
    line = result_line(result.psnr, result.ssim, source.name)
    images = counted(len(test_set), "test image")
    title = f"Worst to best of {images}, {test_set.degradation}\n{line}"
    shown = rank_images(result.psnr, args.rows)
    write_figure(draw_images(models, test_set, shown, title), output)
    print_summary(result)
    if model.capacity:
        print(f"\n{100 * model.capacity:g} % of the tokens attend")
        print_decisions(model, test_set)
        print_capacities(model, test_set)
    if isinstance(test_set.degradation, GaussianNoise):
        print(f"\n{test_set.degradation}, at other σ:")
        print_head("σ", "noisy (dB)", "denoised (dB)")
        for row in psnr_against_noise(model, test_set):
            print_row(*(f"{value:.2f}" for value in row))
    print(f"\nwrote {output} and {table}")
    print(line)
    return 0


if __name__ == "__main__":
    run_main(main)
