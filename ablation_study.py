"""What each part contributes: trains variants of the model by one recipe and compares them.

    python ablation_study.py          # the published parts, 3 seeds of 30 epochs: for a GPU
    python ablation_study.py --dataset photos --epochs 2 --seeds 0  # some minutes on 2 CPU cores

Every variant has the same data, noise, steps, learning rates and seeds, in the loop of the
training script. Finished trainings are read from the output file, so that an interrupted study goes
on. Writes a JSON file and, named after it, a Markdown table and a picture of PSNR against compute
or, with --tiles, against their size. A model with a capacity is tested with every share of tokens.
"""

import copy
import itertools
import os
import statistics
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from common.options import Number
from common.safe_files import locked
from common.user_errors import Diverged, UserError, run_main
from denoising_experiment_proper import CAPACITIES, RECIPES, train
from experiment import command_line as cli
from experiment.checkpoints import check_same_recipe
from experiment.evaluation import evaluate, psnr
from experiment.losses import LOSSES
from experiment.recipe import Recipe, changed
from experiment.tiling import OVERLAP, InTiles, Tiled
from images.degradations import degradation_of
from images.image_sources import SIZE, load_images
from images.noisy_images import NoisyImageDataset
from small_vit import count_parameters, with_each_capacity
from studies.model_variants import VARIANTS
from studies.study_results import TILES_OF, files_of, markdown, read_study, share_name, write_study
from studies.timing import count_flops

PARTS = list(VARIANTS)[:6]  # the published model's
IN_TILES = {TILES_OF: InTiles, "overlapping tiles of ": Tiled}  # the latter as denoise_image.py

# Trainings -----------------------------------------------------------------------------------


def make_variant(name: str, channels: int) -> nn.Module:
    """A variant, untrained, that reads images of so many channels; a UserError if it cannot."""
    try:
        return VARIANTS[name](**({} if channels == 3 else {"in_channels": channels}))
    except TypeError:
        no_mask = "reads three channels, no mask; leave it out"
        raise UserError(f"--variants {name!r} {no_mask}") from None


def train_variant(
    name: str,
    model: nn.Module,
    recipe: Recipe,
    train_set: NoisyImageDataset,
    val_set: NoisyImageDataset,
) -> None:
    """Trains a variant by the recipe; leaves it with the weights of its best epoch."""
    weight = 0.0 if name == "no load-balancing loss" else recipe.balance_weight
    print(f"{name}, seed {recipe.seed}", flush=True)
    state = train(model, train_set, val_set, replace(recipe, balance_weight=weight))
    model.load_state_dict(state["best"]["model"])


def measure(name: str, recipe: Recipe, splits: tuple, tiles: list[int]) -> dict:
    """Trains and tests a variant; returns its row, without figures where training diverged."""
    train_set, val_set, test_set = splits
    channels = train_set.degradation.channels
    started = time.perf_counter()
    torch.manual_seed(recipe.seed)
    model = make_variant(name, channels).to(train_set.device)
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
        point = {"psnr": figures["psnr_mean"], "ssim": figures["ssim_mean"]}
        point["mflops"] = mflops(model, torch.rand(1, channels, side, side))
        row["points"].append({"at": share_name(capacity), **point})
        row["utilisation"] = figures["utilisation"]
    for tile, (kind, restore) in itertools.product(tiles, IN_TILES.items()):
        decibels = mean_psnr(restore(model, tile).eval(), test_set, train_set.device)
        point = {"psnr": decibels, "ssim": None, "mflops": None}
        row["points"].append({"at": f"{kind}{tile}×{tile}", **point})
    return row


def capacities_of(model: nn.Module) -> Iterable[float | None]:
    """Every capacity of a model that has one, which it has then; else None once."""
    return with_each_capacity(model, CAPACITIES) if getattr(model, "capacity", None) else [None]


@torch.inference_mode()
def mflops(model: nn.Module, image: Tensor) -> float:
    """Millions of FLOPs of an image, on the CPU, which counts what kernels hide."""
    return count_flops(copy.deepcopy(model).cpu().eval(), image) / 1e6


@torch.inference_mode()
def mean_psnr(model: nn.Module, dataset: NoisyImageDataset, device: torch.device) -> float:
    """Mean PSNR in dB of a model in evaluation mode; `evaluate` takes long over photographs."""
    return statistics.mean(
        float(psnr(model(noisy.to(device))[0][0].cpu().numpy(), clean[0].numpy()))
        for noisy, clean, _ in dataset.batches(1)
    )


def read_rows(output: Path, recipe: dict) -> list[dict]:
    """Rows of an earlier run; a UserError if it had another recipe, or other variants."""
    if not os.path.exists(output):
        return []
    earlier, rows = read_study(output)
    advice = "repeat its options to go on with it, or name another --output"
    check_same_recipe(earlier, recipe, f"{output} holds a study with", advice)
    channels = degradation_of(recipe).channels
    for name, parameters in {(row["variant"], row["parameters"]) for row in rows}:
        if name not in VARIANTS or count_parameters(make_variant(name, channels)) != parameters:
            raise UserError(
                f"{output} holds {name!r} with {parameters:,} parameters, which this version of "
                "the script does not train; name another --output"
            )
    return rows


# The command ---------------------------------------------------------------------------------


def parse_args():
    parser = cli.make_parser(
        "Trains variants of the model by one recipe and compares them. Goes on where an earlier "
        "run with the same --output stopped.",
        "python ablation_study.py --dataset photos --recipe refined --epochs 10 --seeds 0 1 2",
        RECIPES,
    )
    cli.add_data(parser)
    cli.add_recipe(parser, RECIPES, without=("model", "init", "seed"), loss=LOSSES)
    group = parser.add_argument_group("study")
    group.add_argument(
        "--seeds",
        type=Number(int),
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
        "--tiles",
        type=Number(int, 2 * OVERLAP, most=4096),
        nargs="+",
        default=[],
        metavar="PIXELS",
        help="also test in square tiles of these sides, separate and overlapping, for whole "
        "photographs; draw PSNR against the size of the separate ones (default: none)",
    )
    cli.add_output(parser, "ablation_study.json", "figures to write")
    cli.add_computation(parser)
    args = parser.parse_args()
    args.tiles = sorted(set(args.tiles))
    return args


def main():
    args = parse_args()
    device = cli.select_device(args.device, args.threads)
    recipe, files = changed(RECIPES[args.recipe], vars(args)), files_of(Path(args.output))
    with locked(files):
        return run_study(args, recipe, files, device)


def run_study(args, recipe, files, device):
    """Trains what is not in the files yet; returns the exit code."""
    if args.tiles and not recipe.crop:
        raise UserError("--tiles are parts of whole photographs; add --recipe photographs")
    if args.tiles and recipe.degradation.task == "inpaint":
        raise UserError("--tiles: inpainting is not tested in tiles; drop one of the two")
    if getattr(recipe.degradation, "noise_level", (1, 1))[1] < 1e-4:
        raise UserError(f"{recipe.degradation}: there is no noise to remove; raise --noise-level")
    source = load_images(args.dataset, args.data_dir, crop=recipe.crop)
    recipe = recipe.for_images(source, vars(args))
    train_set, val_set, test_set = recipe.splits(source)
    recipe = recipe.of_steps(train_set)
    mixed = source.test.paired and not source.train.paired
    settings = {
        "dataset": source.name + (", tested on pairs" if mixed else ""),
        "images_sha256": source.sha256(),
        "train_images": len(train_set),
        "test_images": len(test_set),
        **recipe.as_dict(),
        "tiles": args.tiles,
    }
    for name in ("model", "seed"):
        del settings[name]  # every variant and seed has its own
    for name in args.variants:  # before hours go by
        make_variant(name, train_set.degradation.channels)
    rows = read_rows(files[0], settings)
    done = {(row["variant"], row["seed"]) for row in rows}
    splits = (train_set.to(device), val_set, test_set)
    for seed, name in itertools.product(*map(dict.fromkeys, (args.seeds, args.variants))):
        if (name, seed) not in done:
            rows.append(measure(name, replace(recipe, seed=seed), splits, args.tiles))
            write_study(files, settings, rows)
    write_study(files, settings, rows)
    print(f"\n{markdown(rows, settings)}\nwrote {', '.join(map(str, files))}")
    return 0


if __name__ == "__main__":
    run_main(main)
