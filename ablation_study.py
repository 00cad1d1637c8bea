"""What each part contributes: trains variants of the model under one recipe and compares them.

    python ablation_study.py                           # 3 seeds of 30 epochs each: for a GPU
    python ablation_study.py --dataset photos --quick  # minutes on 2 CPU cores
    python ablation_study.py --checkpoint best_denoising_model_proper.pt  # no training, minutes

Every variant has the same data, noise, steps, learning rates and seeds. A run that was interrupted
goes on where it stopped, since finished trainings are read from the output file. Writes a JSON file
and, named after it, a Markdown table and a picture. With --checkpoint, parts of a trained model are
replaced instead, and it is tested again, without any training.
"""

import contextlib
import copy
import itertools
import json
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt
from torch import nn
from tqdm import tqdm

from adaptive_attention_moe import AdaptiveAttentionMoE
from command_line import (
    UserError,
    add_noise_level,
    add_output,
    check_writable,
    make_parser,
    number,
    replace_when_complete,
    run_main,
    select_device,
)
from cuda_graphs import replayed
from denoising_experiment_proper import (
    BALANCE_WEIGHT,
    MODELS,
    NoisyImageDataset,
    SmallViT,
    channels_last_on_cpu,
    check_same_recipe,
    count_parameters,
    evaluate,
    load_for_evaluation,
    make_optimizer,
    noise_text,
    noisy_splits,
    recipe_options,
    result_line,
    training_step,
    zeroed,
)
from image_sources import load_images
from visualize_proper_results import psnr_against_noise

QUICK = {"steps": 60, "seeds": [0], "test_images": 256}

# Routers -------------------------------------------------------------------------------------


class UniformRouter(nn.Module):
    """Gives every expert the same weight."""

    def __init__(self, num_experts):
        super().__init__()
        self.num_experts = num_experts

    def forward(self, x):
        """[B, N, D] -> [B, N, E]."""
        return x.new_full((*x.shape[:2], self.num_experts), 1 / self.num_experts)


class RandomRouter(nn.Module):
    """Weights drawn once for each position of the grid, softmax of N(0, 1), never trained."""

    def __init__(self, tokens, num_experts):
        super().__init__()
        self.register_buffer("routing", torch.randn(1, tokens, num_experts).softmax(-1))

    def forward(self, x):
        """[B, N, D] -> [B, N, E]."""
        return self.routing.expand(len(x), -1, -1)


class FirstChoiceRouter(nn.Module):
    """All weight to the expert that another router likes best."""

    def __init__(self, router):
        super().__init__()
        self.router = router

    def forward(self, x):
        """[B, N, D] -> [B, N, E], zeros and ones."""
        routing = self.router(x)
        return F.one_hot(routing.argmax(-1), routing.shape[-1]).to(routing.dtype)


def with_routers(model, make_router):
    """The model with every router replaced by make_router(that router, number of experts)."""
    for module in model.modules():
        if isinstance(module, AdaptiveAttentionMoE):
            module.router = make_router(module.router, len(module.experts))
    return model


@contextlib.contextmanager
def first_choice(model):
    """Within the block, every token uses its first-choice expert alone."""
    with_routers(model, lambda router, _: FirstChoiceRouter(router))
    yield
    with_routers(model, lambda router, _: router.router)


# Conventional denoisers ----------------------------------------------------------------------


class DnCNN(nn.Module):
    """17 convolutions of 64 channels with batch normalisation that predict the noise.

    "Beyond a Gaussian Denoiser", Zhang et al. 2017. [B, 3, h, w] -> [B, 3, h, w].

    The inner convolutions start as the identity and the last at zero. Drawn at random, so many in
    a row without skips blur each pixel's noise beyond recovery, and training hardly starts.
    """

    def __init__(self, depth=17, channels=64):
        super().__init__()
        layers = [nn.Conv2d(3, channels, 3, padding=1), nn.ReLU()]
        for _ in range(depth - 2):
            conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
            nn.init.dirac_(conv.weight)
            layers += [conv, nn.BatchNorm2d(channels), nn.ReLU()]
        self.noise = nn.Sequential(*layers, zeroed(nn.Conv2d(channels, 3, 3, padding=1)))

    def forward(self, noisy, return_routing=False):
        """As SmallViT, of which each image is the only token of the only expert."""
        noisy = channels_last_on_cpu(noisy)
        return as_denoiser(self, noisy - self.noise(noisy), return_routing)


class UNet(nn.Module):
    """Three resolutions, two 3×3 convolutions at each on the way down and up, and skips.

    "U-Net", Ronneberger et al. 2015, predicting the noise. [B, 3, h, w] -> [B, 3, h, w].
    """

    def __init__(self, channels=36):
        super().__init__()
        c1, c2, c3 = channels, 2 * channels, 4 * channels
        self.down1, self.down2, self.middle = two_convs(3, c1), two_convs(c1, c2), two_convs(c2, c3)
        self.up2, self.merge2 = nn.ConvTranspose2d(c3, c2, 2, 2), two_convs(2 * c2, c2)
        self.up1, self.merge1 = nn.ConvTranspose2d(c2, c1, 2, 2), two_convs(2 * c1, c1)
        self.noise = nn.Conv2d(c1, 3, 3, padding=1)

    def forward(self, noisy, return_routing=False):
        """As SmallViT, of which each image is the only token of the only expert."""
        noisy = channels_last_on_cpu(noisy)
        fine = self.down1(noisy)
        coarse = self.down2(F.max_pool2d(fine, 2))
        x = self.up2(self.middle(F.max_pool2d(coarse, 2)))
        x = self.up1(self.merge2(torch.cat([x, coarse], 1)))
        x = self.merge1(torch.cat([x, fine], 1))
        return as_denoiser(self, noisy - self.noise(x), return_routing)


def two_convs(in_channels, out_channels):
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(out_channels, out_channels, 3, padding=1),
        nn.ReLU(),
    )


def as_denoiser(model, image, return_routing):
    image = image if model.training else image.clamp(0, 1)
    return (image, [image.new_ones(len(image), 1, 1)]) if return_routing else image


# The study -----------------------------------------------------------------------------------


class ClampedViT(SmallViT):
    """SmallViT with the clamp of the published training: no gradient outside [0, 1]."""

    def forward(self, noisy, return_routing=False):
        """As SmallViT, in [0, 1] also while training."""
        image, routings = super().forward(noisy, return_routing=True)
        image = image.clamp(0, 1)
        return (image, routings) if return_routing else image


def with_default_initialisation(model):
    """The model with the zero-initialised layers drawn as torch draws any linear layer."""
    for block in model.blocks:
        block.attention.merge.reset_parameters()
        block.ffn[-1].reset_parameters()
    return model


def vit(**config):
    """A function() that makes a SmallViT."""
    return lambda: SmallViT(**config)


VARIANTS = {
    "published": vit(),
    "dense, one expert": vit(k_attend=(64,)),
    "dense, one expert, widened": vit(k_attend=(64,), d_model=172, d_ff=344),
    "uniform weights": lambda: with_routers(SmallViT(), lambda _, experts: UniformRouter(experts)),
    "random weights": lambda: with_routers(
        SmallViT(), lambda _, experts: RandomRouter(64, experts)
    ),
    "no load-balancing loss": vit(),
    "k = 4, 16, 64": vit(k_attend=(4, 16, 64)),
    "k = 8, 32, 64": vit(k_attend=(8, 32, 64)),
    "k = 64, 64, 64": vit(k_attend=(64, 64, 64)),
    "default initialisation": lambda: with_default_initialisation(SmallViT()),
    "clamped while training": ClampedViT,
    "default initialisation, clamped": lambda: with_default_initialisation(ClampedViT()),
    "predicting the noise": vit(residual=True),
    "refined": vit(**MODELS["refined"]),
    "refined, dense, one expert": vit(**MODELS["refined"] | {"k_attend": (64,)}),
    "U-Net": UNet,
    "DnCNN": DnCNN,
}


def train_variant(name, seed, train_set, args):
    """A trained model and the list of its training errors; cosine annealing in every step."""
    torch.manual_seed(seed)
    model = VARIANTS[name]().to(train_set.device).train()
    optimizer = make_optimizer(model, args.lr, args.optimizer, args.weight_decay)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
    batches = itertools.chain.from_iterable(
        train_set.shuffled_batches(
            args.batch_size, seed, epoch, args.lossless_share, flip=args.flip
        )
        for epoch in itertools.count(1)
    )
    weight = 0.0 if name == "no load-balancing loss" else BALANCE_WEIGHT
    options = {"dtype": getattr(torch, args.dtype), "loss": args.loss, "balance_weight": weight}
    step = replayed(partial(training_step, model, optimizer, **options), optimizer)
    batches = itertools.islice(batches, args.steps)
    losses = []
    for noisy, clean, _ in tqdm(
        batches, name, args.steps, leave=False, disable=None, dynamic_ncols=True
    ):
        losses.append(step(noisy, clean))
        scheduler.step()
    return model, torch.stack(losses)[:, 0].tolist()


def steps_to_leave_the_plateau(errors):
    """The first step at which the mean error of the last 20 is better than 21 dB, or None.

    Near 20 dB every patch is denoised alone; a model that stays there looks at no neighbours.
    """
    means = np.convolve(errors, np.ones(20) / 20)[19 : len(errors)]  # those of 20 whole steps
    left = np.flatnonzero(-10 * np.log10(means) > 21)
    return int(left[0]) + 20 if len(left) else None


def measure(name, seed, train_set, test_set, args):
    """Trains and tests a variant; returns its row of the results."""
    started = time.perf_counter()
    model, errors = train_variant(name, seed, train_set, args)
    seconds = time.perf_counter() - started
    result = evaluate(model, test_set)
    ranged = isinstance(args.noise_level, list)
    row = {
        "variant": name,
        "seed": seed,
        "parameters": count_parameters(model),
        "psnr": float(result.psnr.mean()),
        "ssim": float(result.ssim.mean()),
        "first_choice_psnr": None,
        "plateau_steps": steps_to_leave_the_plateau(errors),
        "train_seconds": seconds,
        "utilisation": result.utilisation.tolist(),
        "noise_levels": psnr_against_noise(model, test_set) if ranged else [],
    }
    if isinstance(model, SmallViT) and len(model.config["k_attend"]) > 1:
        with first_choice(model):
            row["first_choice_psnr"] = float(evaluate(model, test_set).psnr.mean())
    return row


def summarise(rows):
    """One dict per variant: parameters, seeds, (mean, std) of each figure, steps on the plateau.

    After a training on a range of σ, its noise_levels are the means of `psnr_against_noise`.
    """
    summary = []
    for name in VARIANTS:
        of_variant = [row for row in rows if row["variant"] == name]
        if of_variant:
            entry = {
                "variant": name,
                "parameters": of_variant[0]["parameters"],
                "seeds": len(of_variant),
            }
            for figure in ("psnr", "ssim", "first_choice_psnr"):
                values = [row[figure] for row in of_variant]
                entry[figure] = (
                    None if None in values else (float(np.mean(values)), float(np.std(values)))
                )
            entry["plateau_steps"] = [row["plateau_steps"] for row in of_variant]
            levels = [row["noise_levels"] for row in of_variant]
            entry["noise_levels"] = np.mean(levels, 0).tolist()
            summary.append(entry)
    return summary


def markdown(summary, recipe):
    """The results as Markdown: a table and, after a training on a range of σ, one of its σ."""
    options = ", ".join(f"{name} {value}" for name, value in recipe.items())
    lines = [
        f"{options}; mean ± standard deviation over seeds.",
        "",
        "| variant | parameters | seeds | PSNR (dB) | SSIM | PSNR with first choices alone (dB) "
        "| steps to 21 dB |",
        "|---|---|---|---|---|---|---|",
    ]
    for entry in summary:
        choice = entry["first_choice_psnr"]
        steps = sorted(n or recipe["steps"] + 1 for n in entry["plateau_steps"])
        steps = [f"{n:,}" if n <= recipe["steps"] else "never" for n in (steps[0], steps[-1])]
        lines.append(
            f"| {entry['variant']} | {entry['parameters']:,} | {entry['seeds']} "
            f"| {entry['psnr'][0]:.2f} ± {entry['psnr'][1]:.2f} "
            f"| {entry['ssim'][0]:.4f} ± {entry['ssim'][1]:.4f} "
            f"| {'–' if choice is None else f'{choice[0]:.2f} ± {choice[1]:.2f}'} "
            f"| {' to '.join(dict.fromkeys(steps))} |"
        )
    if summary[0]["noise_levels"]:
        levels, noisy, _ = zip(*summary[0]["noise_levels"], strict=True)
        lines += [
            "",
            f"| PSNR (dB) at σ = | {' | '.join(f'{level:.2f}' for level in levels)} |",
            f"|---|{'---|' * len(levels)}",
            f"| noisy | {' | '.join(f'{value:.2f}' for value in noisy)} |",
        ]
        for entry in summary:
            denoised = (f"{value:.2f}" for _, _, value in entry["noise_levels"])
            lines.append(f"| {entry['variant']} | {' | '.join(denoised)} |")
    return "\n".join(lines) + "\n"


def draw(summary, recipe):
    """Every variant's PSNR, mean ± std; a cross for its PSNR with first choices alone."""
    figure, axis = plt.subplots(figsize=(8, 0.4 * len(summary) + 1.5), layout="constrained")
    names = [entry["variant"] for entry in summary]
    means, stds = zip(*(entry["psnr"] for entry in summary), strict=True)
    axis.errorbar(means, names, xerr=stds, fmt="o", color="tab:blue", capsize=3)
    for place, entry in enumerate(summary):
        if entry["first_choice_psnr"]:
            axis.plot(entry["first_choice_psnr"][0], place, "x", color="tab:red")
    crosses = [e["first_choice_psnr"][0] for e in summary if e["first_choice_psnr"]]
    axis.set_xlim(min([*means, *crosses]) - 0.5, max(means) + 0.5)
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.grid(alpha=0.3)
    axis.set_xlabel("test PSNR (dB); red crosses: each token uses its first-choice expert alone")
    noise = noise_text(recipe["noise_level"])
    axis.set_title(f"{recipe['dataset']}, {recipe['steps']:,} steps, {noise}")
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
        budgets = (keys,) * len(model.config["k_attend"])
        variant = SmallViT(**{**model.config, "k_attend": budgets})
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
    figure = draw(summary, recipe)
    with replace_when_complete(output.with_suffix(".png")) as path:
        figure.savefig(path, dpi=120)
    plt.close(figure)


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
        variants = {row["variant"]: (row["parameters"], row["noise_levels"]) for row in rows}
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{output} is no result of this script; name another --output") from None
    check_same_recipe(
        before,
        recipe,
        f"{output} holds a study with",
        "repeat its options to go on with it, or name another --output",
    )
    for name, (parameters, _) in variants.items():
        if name not in VARIANTS or count_parameters(VARIANTS[name]()) != parameters:
            raise UserError(
                f"{output} holds {name!r} with {parameters:,} parameters, which this version of "
                "the script does not train; name another --output"
            )
    return rows


def parse_args():
    parser = make_parser(
        "Trains variants of the model under one recipe and compares them. Goes on where an "
        "earlier run with the same --output stopped.",
        *("dataset", "data-dir", "batch-size", "lr", "device", "threads", "dtype"),
        *("loss", "optimizer", "weight-decay", "lossless-share", "flip"),
    )
    add_noise_level(parser)
    parser.add_argument(
        "--checkpoint",
        metavar="FILE",
        help="train nothing: test this model again with parts of it replaced (default: none)",
    )
    parser.add_argument(
        "--steps",
        type=number(int, 1),
        default=18_750,
        help="of each training (default: %(default)s, 30 epochs of 40,000 images)",
    )
    parser.add_argument(
        "--seeds",
        type=number(int, 0),
        nargs="+",
        default=[0, 1, 2],
        metavar="SEED",
        help="of initialisation, order and noise (default: 0 1 2)",
    )
    parser.add_argument(
        "--variants",
        nargs="+",
        choices=VARIANTS,
        default=list(VARIANTS),
        metavar="VARIANT",
        help=f"out of: {'; '.join(VARIANTS)} (default: all)",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"{QUICK['steps']} steps, 1 seed and {QUICK['test_images']} test images: shows that "
        "it works, not which variant is better (default: no)",
    )
    add_output(parser, "ablation_study.json", "figures to write")
    args = parser.parse_args()
    if args.quick:
        args.steps, args.seeds = QUICK["steps"], QUICK["seeds"]
    return args


def main():
    args = parse_args()
    if args.checkpoint:
        return measure_replaced_parts(args)
    output = Path(args.output)
    if output.suffix != ".json":
        raise UserError(f"--output {output}: name a .json file; table and picture stand beside it")
    check_writable(output)
    device = select_device(args.device, args.threads)
    source = load_images(args.dataset, args.data_dir)
    train_set, _, test_set = noisy_splits(source, args.noise_level, args.lossless_share)
    if args.quick:
        test_set = NoisyImageDataset(
            test_set.split[: QUICK["test_images"]], args.noise_level, test_set.stream
        )
    recipe = {
        "dataset": source.name,
        "test_images": len(test_set),
        "steps": args.steps,
        **recipe_options(args),
    }
    rows = read_rows(output, recipe)
    done = {(row["variant"], row["seed"]) for row in rows}
    train_set = train_set.to(device)
    for seed, name in itertools.product(args.seeds, args.variants):
        if (name, seed) not in done:
            rows.append(measure(name, seed, train_set, test_set, args))
            write_results(output, recipe, rows)
            row = rows[-1]
            print(
                f"{name}, seed {seed}: PSNR {row['psnr']:.2f} dB, SSIM {row['ssim']:.4f}, "
                f"{row['train_seconds']:.0f} s",
                flush=True,
            )
    print(f"\n{markdown(summarise(rows), recipe)}")
    print(f"wrote {output}, {output.with_suffix('.md')} and {output.with_suffix('.png')}")
    return 0


if __name__ == "__main__":
    run_main(main)
