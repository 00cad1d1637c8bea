"""What each part contributes: trains variants of the model by one recipe and compares them.

    python ablation_study.py                           # 3 seeds of 30 epochs each: for a GPU
    python ablation_study.py --dataset photos --quick  # minutes on 2 CPU cores
    python ablation_study.py --checkpoint best_denoising_model_proper.pt  # no training, minutes

Every variant has the same data, noise, steps, learning rates and seeds, in the loop of the
training script. A run that was interrupted goes on where it stopped, since finished trainings are
read from the output file. Writes a JSON file and, named after it, a Markdown table and a picture.
With --checkpoint, parts of a trained model are replaced instead, and it is tested again.
"""

import copy
import itertools
import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from matplotlib import pyplot as plt

from denoising_experiment_proper import RECIPES, recipe_of, train
from experiment.checkpoints import check_same_recipe
from experiment.command_line import add_output, make_parser, number, select_device
from experiment.evaluation import evaluate, result_line
from experiment.image_sources import load_images
from experiment.noisy_images import noise_text, noisy_splits
from experiment.run_files import check_writable, replace_when_complete, write_figure
from experiment.user_errors import UserError, run_main
from model_variants import (
    VARIANTS,
    FirstChoiceRouter,
    RandomRouter,
    UniformRouter,
    with_routers,
)
from small_vit import SmallViT, count_parameters, load_for_evaluation

QUICK = {"epochs": 2, "seeds": [0], "train_images": 1920, "test_images": 256}


def train_variant(name, recipe, train_set, val_set):
    """The best epoch of a variant trained by the recipe."""
    torch.manual_seed(recipe.seed)
    model = VARIANTS[name]().to(train_set.device)
    weight = 0.0 if name == "no load-balancing loss" else recipe.balance_weight
    print(f"{name}, seed {recipe.seed}", flush=True)
    state = train(model, train_set, val_set, replace(recipe, balance_weight=weight))
    model.load_state_dict(state["best"]["model"])
    return model


def measure(name, recipe, splits):
    """Trains and tests a variant; returns its row of the results."""
    train_set, val_set, test_set = splits
    started = time.perf_counter()
    model = train_variant(name, recipe, train_set, val_set)
    seconds = time.perf_counter() - started
    result = evaluate(model, test_set)
    return {
        "variant": name,
        "seed": recipe.seed,
        "parameters": count_parameters(model),
        "psnr": float(result.psnr.mean()),
        "ssim": float(result.ssim.mean()),
        "train_seconds": seconds,
        "utilisation": result.utilisation.tolist(),
    }


def summarise(rows):
    """One dict per variant: parameters, seeds, (mean, std) of PSNR and SSIM over the seeds."""
    summary = []
    for name in VARIANTS:
        if of_variant := [row for row in rows if row["variant"] == name]:
            entry = {"variant": name, "parameters": of_variant[0]["parameters"]}
            entry["seeds"] = len(of_variant)
            for figure in ("psnr", "ssim"):
                values = [row[figure] for row in of_variant]
                entry[figure] = (float(np.mean(values)), float(np.std(values)))
            summary.append(entry)
    return summary


def markdown(summary, recipe):
    """The results as a Markdown table."""
    lines = [
        ", ".join(f"{name} {value}" for name, value in recipe.items()),
        "",
        "Mean ± standard deviation over seeds:",
        "",
        "| variant | parameters | seeds | PSNR (dB) | SSIM |",
        "|---|---|---|---|---|",
    ]
    for entry in summary:
        (psnr, psnr_std), (ssim, ssim_std) = entry["psnr"], entry["ssim"]
        lines.append(
            f"| {entry['variant']} | {entry['parameters']:,} | {entry['seeds']} "
            f"| {psnr:.3f} ± {psnr_std:.3f} | {ssim:.4f} ± {ssim_std:.4f} |"
        )
    return "\n".join(lines) + "\n"


def draw_summary(summary, recipe):
    """Figure: every variant's PSNR, mean ± std over seeds."""
    figure, axis = plt.subplots(figsize=(8, 0.4 * len(summary) + 1.5), layout="constrained")
    names = [entry["variant"] for entry in summary]
    means, stds = zip(*(entry["psnr"] for entry in summary), strict=True)
    axis.errorbar(means, names, xerr=stds, fmt="o", color="tab:blue", capsize=3)
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.grid(alpha=0.3)
    axis.set_xlabel("test PSNR (dB)")
    noise = noise_text(recipe["noise_level"])
    axis.set_title(f"{recipe['dataset']}, {recipe['epochs']} epochs, {noise}")
    return figure


def replaced_parts(model):
    """{what was replaced: model}, of the same weights otherwise."""
    variants = {"as trained": copy.deepcopy(model)}
    for name, make_router in (
        ("uniform routing weights", lambda _, n: UniformRouter(n)),
        ("random routing weights", lambda _, n: RandomRouter(model.grid**2, n)),
        ("first-choice expert alone", lambda router, _: FirstChoiceRouter(router)),
    ):
        variants[name] = with_routers(copy.deepcopy(model), make_router)
    for keys in (64, 32, 16, 8, 4, 1):
        budgets = (keys,) * len(model.config.k_attend)
        variant = SmallViT(replace(model.config, k_attend=budgets))
        variant.load_state_dict(model.state_dict())
        variants[f"every expert keeps {keys} keys"] = variant
    return variants


def measure_replaced_parts(args):
    """Prints what becomes of a trained model when parts of it are replaced."""
    _, model, source, noise_level = load_for_evaluation(args)
    test_set = noisy_splits(source, noise_level)[2]
    device = next(model.parameters()).device
    torch.manual_seed(0)  # of the random weights
    print("\n| replaced | PSNR (dB) | SSIM |\n|---|---|---|")
    for name, variant in replaced_parts(model.cpu()).items():
        result = evaluate(variant.to(device), test_set)
        if name == "as trained":
            whole = result
        print(f"| {name} | {result.psnr.mean():.2f} | {result.ssim.mean():.4f} |", flush=True)
    print(result_line(whole.psnr, whole.ssim, source.name))
    return 0


def write_results(output, recipe, rows):
    summary = summarise(rows)
    with replace_when_complete(output) as path:
        results = {"recipe": recipe, "summary": summary, "rows": rows}
        path.write_text(json.dumps(results, indent=2) + "\n")
    with replace_when_complete(output.with_suffix(".md")) as path:
        path.write_text(markdown(summary, recipe))
    write_figure(draw_summary(summary, recipe), output.with_suffix(".png"))


def read_rows(output, recipe):
    """Rows of an earlier run of the same recipe.

    Raises:
        UserError: the file is of another recipe or of other variants, or none of this script.
    """
    if not output.exists():
        return []
    try:
        earlier = json.loads(output.read_text())
        rows, before = earlier["rows"], earlier["recipe"]
        variants = {row["variant"]: (row["parameters"], row["psnr"], row["ssim"]) for row in rows}
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{output} is no result of this script; name another --output") from None
    check_same_recipe(
        before,
        recipe,
        f"{output} holds a study with",
        "repeat its options to go on with it, or name another --output",
    )
    for name, (parameters, *_) in variants.items():
        if name not in VARIANTS or count_parameters(VARIANTS[name]()) != parameters:
            raise UserError(
                f"{output} holds {name!r} with {parameters:,} parameters, which this version of "
                "the script does not train; name another --output"
            )
    return rows


def parse_args():
    parser = make_parser(
        "Trains variants of the model by one recipe and compares them. Goes on where an earlier "
        "run with the same --output stopped.",
        "python ablation_study.py --dataset photos --recipe refined --epochs 10 --seeds 0 1 2",
        *("dataset", "data-dir", "noise-level", "device", "threads", "dtype"),
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
        default=list(VARIANTS),
        metavar="VARIANT",
        help=f"out of: {'; '.join(VARIANTS)} (default: all)",
    )
    group.add_argument(
        "--quick",
        action="store_true",
        help=f"{QUICK['epochs']} epochs of {QUICK['train_images']} images, 1 seed and "
        f"{QUICK['test_images']} test images: shows that it works, not which variant is better "
        "(default: no)",
    )
    group.add_argument(
        "--checkpoint",
        metavar="FILE",
        help="train nothing: test this model again with parts of it replaced, on the images and "
        "with the noise of its training unless others are named (default: none)",
    )
    add_output(parser, "ablation_study.json", "figures to write")
    args = parser.parse_args()
    if args.quick:
        args.epochs, args.seeds = QUICK["epochs"], QUICK["seeds"]
    return args


def main():
    args = parse_args()
    if args.checkpoint is not None:
        return measure_replaced_parts(args)
    output, recipe = Path(args.output), recipe_of(args)
    if output.suffix != ".json":
        raise UserError(f"--output {output}: name a .json file; table and picture stand beside it")
    check_writable(output)
    device = select_device(args.device, args.threads)
    source = load_images(args.dataset or "cifar10", args.data_dir)
    splits = noisy_splits(source, recipe.noise_level, recipe.lossless_share)
    if args.quick:
        splits[0].split = splits[0].split[: QUICK["train_images"]]
        splits[2].split = splits[2].split[: QUICK["test_images"]]
    settings = {
        "dataset": source.name,
        "train_images": len(splits[0]),
        "test_images": len(splits[2]),
        **recipe.as_dict(),
    }
    for name in ("model", "seed"):
        del settings[name]  # every variant and seed has its own
    rows = read_rows(output, settings)
    done = {(row["variant"], row["seed"]) for row in rows}
    splits = (splits[0].to(device), *splits[1:])
    for seed, name in itertools.product(args.seeds, args.variants):
        if (name, seed) not in done:
            rows.append(measure(name, replace(recipe, seed=seed), splits))
            write_results(output, settings, rows)
            row = rows[-1]
            print(
                f"{name}, seed {seed}: PSNR {row['psnr']:.2f} dB, SSIM {row['ssim']:.4f}, "
                f"{row['train_seconds']:.0f} s",
                flush=True,
            )
    print(f"\n{markdown(summarise(rows), settings)}")
    print(f"wrote {output}, {output.with_suffix('.md')} and {output.with_suffix('.png')}")
    return 0


if __name__ == "__main__":
    run_main(main)
