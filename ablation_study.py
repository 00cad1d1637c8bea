"""What each part contributes: trains variants of the model by one recipe and compares them.

    python ablation_study.py          # the published parts, 3 seeds of 30 epochs: for a GPU
    python ablation_study.py --dataset photos --epochs 2 --seeds 0  # some minutes on 2 CPU cores
    python ablation_study.py --checkpoint best_denoising_model_proper.pt  # no training, minutes

Every variant has the same data, noise, steps, learning rates and seeds, in the loop of the
training script. A run that was interrupted goes on where it stopped, since finished trainings are
read from the output file. Writes a JSON file and, named after it, a Markdown table and a picture of
PSNR against compute or, with --tiles, against their size. Variants in which a share of the tokens
attends are tested with every share.
With --checkpoint, parts of a trained model are replaced instead, and it is tested again.
"""

import copy
import itertools
import json
import math
import os
import statistics
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from matplotlib import pyplot as plt

from common.safe_files import locked, write_figure, write_text
from common.user_errors import Diverged, UserError, run_main
from denoising_experiment_proper import CAPACITIES, RECIPES, recipe_of, train
from experiment.checkpoints import check, check_same_recipe, loads, real, whole
from experiment.command_line import add_output, make_parser, number, select_device
from experiment.cuda_graphs import ReplayedModel
from experiment.evaluation import evaluate, plus_minus, psnr, result_line, spread
from experiment.tiling import OVERLAP, InTiles, Tiled
from experiment.trained_model import load_for_evaluation
from images.degradations import degradation_in
from images.image_sources import SIZE, load_images
from small_vit import MODELS, at_each, build_model, count_parameters
from studies.model_variants import VARIANTS, replaced_parts
from studies.timing import alternate, count_flops

POINT = {"at": str, "psnr": real, "ssim": lambda v: v is None or real(v)}
POINT["mflops"] = POINT["ssim"]  # None for tiles
ROW = {"variant": str, "seed": whole(0), "parameters": whole(1), "points": list}
# None where training diverged.
ROW |= {
    "train_seconds": lambda v: v is None or real(v),
    "utilisation": lambda v: v is None or loads(v),
}
TIMED_IMAGES, TIMED_ROUNDS, TIMED_SECONDS = 64, 9, 60
PARTS = list(VARIANTS)[:6]  # the published model's
TILES_OF = "tiles of "
IN_TILES = {TILES_OF: InTiles, "overlapping tiles of ": Tiled}  # the latter as denoise_image.py
OF_A_TEST = ("checkpoint", "dataset", "data_dir", "noise_level", "device", "threads")  # options


def train_variant(name, model, recipe, train_set, val_set):
    """Trains a variant by the recipe; leaves it with the weights of its best epoch."""
    weight = 0.0 if name == "no load-balancing loss" else recipe.balance_weight
    print(f"{name}, seed {recipe.seed}", flush=True)
    state = train(model, train_set, val_set, replace(recipe, balance_weight=weight))
    model.load_state_dict(state["best"]["model"])


def measure(name, recipe, splits, tiles):
    """Trains and tests a variant; returns its row, without figures where training diverged."""
    train_set, val_set, test_set = splits
    device = train_set.device
    started = time.perf_counter()
    torch.manual_seed(recipe.seed)
    model = made(name, train_set.degradation.channels).to(device)
    row = {"variant": name, "seed": recipe.seed, "parameters": count_parameters(model)}
    row |= {"points": [], "train_seconds": None, "utilisation": None}
    try:
        train_variant(name, model, recipe, train_set, val_set)
    except Diverged as error:
        print(f"{name}, seed {recipe.seed}: {error}", flush=True)
        return row
    row["train_seconds"] = time.perf_counter() - started
    side = recipe.crop or SIZE
    for capacity in capacities_of(model):
        figures = evaluate(model, test_set).summary()
        point = {"at": at(capacity), "psnr": figures["psnr_mean"], "ssim": figures["ssim_mean"]}
        image = torch.rand(1, train_set.degradation.channels, side, side)
        row["points"].append(point | {"mflops": mflops(model, image)})
        row["utilisation"] = figures["utilisation"]
    for tile, (kind, restore) in itertools.product(tiles, IN_TILES.items()):
        decibels = mean_psnr(restore(model, tile).eval(), test_set, device)
        point = {"at": f"{kind}{tile}×{tile}", "psnr": decibels, "ssim": None}
        row["points"].append(point | {"mflops": None})
    return row


def made(name, channels):
    """A variant, untrained, that reads images of so many channels.

    Raises:
        UserError: it reads three, always.
    """
    try:
        return VARIANTS[name](**({} if channels == 3 else {"in_channels": channels}))
    except TypeError:
        raise UserError(
            f"--variants {name!r} reads three channels, no mask; leave it out"
        ) from None


def capacities_of(model):
    """Every capacity of a model that has one, which it has then; else None once."""
    return at_each(model, CAPACITIES) if getattr(model, "capacity", None) else [None]


def at(capacity):
    return f"{100 * capacity:g} %" if capacity else "all"


@torch.inference_mode()
def mflops(model, image):
    """Millions of FLOPs of an image, on the CPU, which counts what kernels hide."""
    return count_flops(copy.deepcopy(model).cpu().eval(), image) / 1e6


@torch.inference_mode()
def mean_psnr(model, dataset, device):
    """Mean PSNR in dB of a model in evaluation mode; `evaluate` takes long over photographs."""
    return statistics.mean(
        float(psnr(model(noisy.to(device))[0][0].cpu().numpy(), clean[0].numpy()))
        for noisy, clean, _ in dataset.batches(1)
    )


def measure_speed(names, channels, side, device):
    """Seconds in which TIMED_IMAGES images are denoised, side by side: {(variant, at): seconds}."""
    images, functions = torch.rand(TIMED_IMAGES, channels, side, side, device=device), {}
    for name in names:
        model = made(name, channels).to(device)
        passes = ReplayedModel(model).eval()

        def take(capacity, model=model, passes=passes):
            if capacity:
                model.capacity = capacity
            with torch.inference_mode():
                passes(images)

        for capacity in capacities_of(model):
            functions[name, at(capacity)] = partial(take, capacity)
            take(capacity)  # a pass is recorded when it comes again
    return alternate(functions, TIMED_ROUNDS, TIMED_SECONDS, device)


def curves(rows):
    """{variant: {at: its points over seeds}}, of the trainings that did not diverge."""
    found = {name: {} for name in VARIANTS}
    for row in rows:
        for point in row["points"]:
            found[row["variant"]].setdefault(point["at"], []).append(point)
    return {name: points for name, points in found.items() if points}


def markdown(rows, recipe, speed):
    """The results as a Markdown table: mean ± standard deviation over seeds, and the least."""
    columns = ["variant", "at", "parameters", "seeds", "PSNR (dB)", "least", "SSIM", "MFLOP"]
    columns += [f"ms for {TIMED_IMAGES} images", "training (s)"]
    lines = [", ".join(f"{name} {value}" for name, value in recipe.items()) + "\n"]
    lines += [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    found = curves(rows)
    for name in VARIANTS:
        of_variant = [row for row in rows if row["variant"] == name]
        seconds = [row["train_seconds"] for row in of_variant if row["points"]]
        diverged = len(of_variant) - len(seconds)
        for where, points in found.get(name, {"–": []} if of_variant else {}).items():
            cells = [name, where, f"{of_variant[0]['parameters']:,}", str(len(points))]
            cells[3] += f", {diverged} diverged" if diverged else ""
            if points:
                psnrs = [point["psnr"] for point in points]
                ssims = [point["ssim"] for point in points]
                cells += [plus_minus(psnrs, 3), f"{min(psnrs):.3f}"]
                cells.append("–" if None in ssims else plus_minus(ssims, 4))
                cells.append(f"{points[0]['mflops']:.1f}" if points[0]["mflops"] else "–")
                taken = speed.get((name, where))
                cells += [f"{1e3 * taken:.1f}" if taken else "–", f"{statistics.mean(seconds):.1f}"]
            cells += ["–"] * (len(columns) - len(cells))
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(rows, recipe):
    """Figure: PSNR, mean ± std over seeds, against compute or, for tiles, against their size."""
    figure, axis = plt.subplots(figsize=(8, 5), layout="constrained")
    found = curves(rows)
    axis.set_prop_cycle(color=plt.get_cmap("turbo")(np.linspace(0, 1, max(1, len(found)))))
    for name, points in found.items():
        if recipe["tiles"]:
            points = against_size(points)
        means, stds = zip(*(spread([p["psnr"] for p in of]) for of in points.values()), strict=True)
        places = list(points) if recipe["tiles"] else [of[0]["mflops"] for of in points.values()]
        style = "--" if name.endswith("local") else "-"
        axis.errorbar(places, means, stds, fmt=f".{style}", capsize=3, label=name)
    title = f"{recipe['dataset']}, {degradation_in(recipe)}"
    if recipe["tiles"]:
        title += f", trained on crops of {recipe['crop']}×{recipe['crop']}"
    place = "separate tiles (pixels)" if recipe["tiles"] else "MFLOP per image"
    axis.set(ylabel="PSNR (dB)", xlabel=place, title=title)
    axis.grid(alpha=0.3)
    if axis.containers:  # none where all have diverged
        axis.legend(fontsize="small")
    return figure


def against_size(points):
    """{size of the tiles, then "whole": points}, of a model with a capacity those with its own."""
    tiles = {a.removeprefix(TILES_OF): of for a, of in points.items() if a.startswith(TILES_OF)}
    return tiles | {"whole": points.get("all") or points[at(MODELS["routed-photographs"].capacity)]}


def measure_replaced_parts(args):
    """Prints what becomes of a trained model when parts of it are replaced."""
    _, model, source, (*_, test_set) = load_for_evaluation(args, build_model)
    if model.capacity:
        raise UserError(
            f"--checkpoint {args.checkpoint}: its router also chooses which tokens attend, and "
            "cannot be replaced; name a model without a capacity"
        )
    device, patch = next(model.parameters()).device, model.config.patch_size
    sizes = [image.shape[1:] for image in test_set.split.images]
    tokens = max(math.ceil(h / patch) * math.ceil(w / patch) for h, w in sizes)
    torch.manual_seed(0)  # of the random weights
    print("\n| replaced | PSNR (dB) | SSIM |\n|---|---|---|")
    for name, variant in replaced_parts(model.cpu(), tokens).items():
        result = evaluate(variant.to(device), test_set)
        if name == "as trained":
            whole = result
        print(f"| {name} | {result.psnr.mean():.2f} | {result.ssim.mean():.4f} |", flush=True)
    print(result_line(whole.psnr, whole.ssim, source.name))
    return 0


def files_of(output):
    """The JSON file and, named after it, the table and the picture.

    Raises:
        UserError: it is no .json, or one of them is there without it: somebody else's.
    """
    named_after = [output.with_suffix(end) for end in (".md", ".png")]
    if output.suffix != ".json":
        raise UserError(f"--output {output}: name a .json file; table and picture stand beside it")
    for file in named_after:
        if os.path.exists(file) and not os.path.exists(output):
            raise UserError(f"--output {output}: {file} is not of this study; name another file")
    return output, *named_after


def write_results(files, recipe, rows, speed=None):
    text = json.dumps({"recipe": recipe, "rows": rows}, indent=2)
    write_text(text + "\n", files[0])
    write_text(markdown(rows, recipe, speed or {}), files[1])
    write_figure(draw(rows, recipe), files[2], dpi=150)


def read_rows(output, recipe):
    """Rows of an earlier run of the same recipe.

    Raises:
        UserError: the file is of another recipe or of other variants, or none of this script.
    """
    if not os.path.exists(output):
        return []
    try:
        earlier = json.loads(output.read_text(encoding="utf-8"))
        check(earlier, {"rows": list, "recipe": dict}, output)
        for row in earlier["rows"]:
            check(row, ROW, output, "a row")
            for point in row["points"]:
                check(point, POINT, output, "a point")
            if row["points"] and row["train_seconds"] is None:
                raise ValueError("figures are missing")
    except (OSError, ValueError, RecursionError, UserError):
        raise UserError(f"{output} is no result of this script; name another --output") from None
    advice = "repeat its options to go on with it, or name another --output"
    check_same_recipe(earlier["recipe"], recipe, f"{output} holds a study with", advice)
    channels = 4 if recipe["task"] == "inpaint" else 3
    for name, parameters in {(row["variant"], row["parameters"]) for row in earlier["rows"]}:
        if name not in VARIANTS or count_parameters(made(name, channels)) != parameters:
            raise UserError(
                f"{output} holds {name!r} with {parameters:,} parameters, which this version of "
                "the script does not train; name another --output"
            )
    return earlier["rows"]


def parse_args():
    parser = make_parser(
        "Trains variants of the model by one recipe and compares them. Goes on where an earlier "
        "run with the same --output stopped.",
        "python ablation_study.py --dataset photos --recipe refined --epochs 10 --seeds 0 1 2",
        *("dataset", "data-dir", "noise-level", "noise-map"),
        *("task", "scale", "holes", "quality", "device", "threads", "dtype"),
        recipe=RECIPES,
    )
    parser.set_defaults(dataset=None)
    group = parser.add_argument_group("study")
    group.add_argument(
        "--seeds",
        type=number(int, 0),
        nargs="+",
        default=[0, 1, 2],
        metavar="SEED",
        help="of initialisation, order and noise (default: 0 1 2)",
    )
    group.add_argument(
        "--variants",
        nargs="+",
        choices=VARIANTS,
        default=PARTS,
        metavar="VARIANT",
        help=f"out of: {'; '.join(VARIANTS)} (default: the first six)",
    )
    group.add_argument(
        "--checkpoint",
        metavar="FILE",
        help="train nothing: test this model again with parts of it replaced, on the images and "
        "with the noise of its training unless others are named (default: none)",
    )
    group.add_argument(
        "--tiles",
        type=number(int, 2 * OVERLAP, most=4096),
        nargs="+",
        default=[],
        metavar="PIXELS",
        help="also test in square tiles of these sides, separate and overlapping, for whole "
        "photographs; draw PSNR against the size of the separate ones (default: none)",
    )
    add_output(parser, "ablation_study.json", "figures to write")
    args = parser.parse_args()
    args.tiles = sorted(set(args.tiles))
    given = [name for name, value in vars(args).items() if value != parser.get_default(name)]
    others = [name for name in given if name not in OF_A_TEST]
    if args.checkpoint is not None and others:
        raise UserError(f"--{others[0].replace('_', '-')} is of trainings; drop it or --checkpoint")
    return args


def main():
    args = parse_args()
    if args.checkpoint is not None:
        if args.noise_level and args.noise_level[0] < args.noise_level[1]:
            raise UserError("--noise-level: name one σ beside --checkpoint")
        return measure_replaced_parts(args)
    recipe, files = recipe_of(args), files_of(Path(args.output))
    with locked(files):
        return run_study(args, recipe, files, select_device(args.device, args.threads))


def run_study(args, recipe, files, device):
    """Trains what is not in the files yet; returns the exit code."""
    if args.tiles and not recipe.crop:
        raise UserError("--tiles are parts of whole photographs; add --recipe photographs")
    if args.tiles and recipe.task == "inpaint":
        raise UserError("--tiles: inpainting is not tested in tiles; drop one of the two")
    if recipe.noise_level[1] < 1e-4:
        raise UserError(f"--noise-level {recipe.noise_level[1]:g}: there is no noise to remove")
    source = load_images(args.dataset or "cifar10", args.data_dir, crop=recipe.crop)
    splits = recipe.splits(source)
    if args.tiles:
        largest = max(max(image.shape[1:]) for image in splits[2].split.images)
        if args.tiles[-1] > largest:
            raise UserError(f"--tiles {args.tiles[-1]}: no side of a test image is above {largest}")
    recipe = recipe.of_steps(splits[0])
    settings = {
        "dataset": source.name,
        "images_sha256": source.sha256(),
        "train_images": len(splits[0]),
        "test_images": len(splits[2]),
        **recipe.as_dict(),
        "tiles": args.tiles,
    }
    for name in ("model", "seed"):
        del settings[name]  # every variant and seed has its own
    for name in args.variants:  # before hours go by
        made(name, splits[0].degradation.channels)
    rows = read_rows(files[0], settings)
    done = {(row["variant"], row["seed"]) for row in rows}
    splits = (splits[0].to(device), *splits[1:])
    for seed, name in itertools.product(dict.fromkeys(args.seeds), args.variants):
        if (name, seed) not in done:
            rows.append(measure(name, replace(recipe, seed=seed), splits, args.tiles))
            write_results(files, settings, rows)
    names = dict.fromkeys(row["variant"] for row in rows if row["points"])
    speed = measure_speed(names, splits[0].degradation.channels, recipe.crop or SIZE, device)
    write_results(files, settings, rows, speed)
    print(f"\n{markdown(rows, settings, speed)}\nwrote {', '.join(map(str, files))}")
    return 0


if __name__ == "__main__":
    run_main(main)
