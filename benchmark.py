"""Times layer, training and inference side by side with yardsticks, and how the layer grows.

    python benchmark.py --dataset photos          # a quarter of an hour on 2 CPU cores
    python benchmark.py --dataset photos --quick  # a minute or two

The yardsticks are the straightforward implementation, which gathers the selected values, ordinary
dense attention of the same width, and the refined and the routed model with their own recipes. All
take turns in one run, after a warm-up; a figure is the median. Writes benchmark_results.json.
"""

import json
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from common.safe_files import check_writable, write_text
from common.user_errors import counted, run_main
from denoising_experiment_proper import RECIPES, training_step
from experiment import command_line as cli
from experiment.cuda_graphs import WARM_UP_STEPS, ReplayedModel, ReplayedStep, compiled, replayed
from experiment.muon import make_optimizer
from experiment.recipe import Recipe
from experiment.reports import print_head, print_row
from images.image_sources import load_images
from images.noisy_images import NoisyImageDataset
from images.training_batches import training_batches
from small_vit import SmallViT
from studies import benchmark_large as large
from studies.model_variants import YARDSTICKS, make_yardsticks
from studies.timing import alternate, processor_name

SIDE_BY_SIDE = ("layer forward", "layer forward+backward", "training step")
SIDE_BY_SIDE += ("inference", "inference, 1,000 images")
ROWS = (*SIDE_BY_SIDE, "tokens", "photograph", "tiles")


@dataclass
class Effort:
    """How long to measure: rounds per row, at most, seconds after which 3 will do, sizes."""

    rounds: int = 15
    seconds: float = 30
    batch_size: int = 64
    tokens: tuple = (64, 256, 1024, 4096, 16384)
    tiles: tuple = ((64, 16), (128, 16), (256, 16), (256, 32), (512, 32), (1024, 32))  # overlaps
    dtype: str = "float32"  # of matrix products
    compile: bool = False
    seed: int = 42


QUICK = Effort(rounds=2, seconds=3, tokens=(64, 256, 1024), tiles=((64, 16), (128, 16)))


# Side by side --------------------------------------------------------------------------------


def forward(module: nn.Module, inputs: Tensor, in_dtype: Callable) -> None:
    with torch.inference_mode(), in_dtype():
        module(inputs)


def function_of(
    row: str, name: str, model: SmallViT, batch: tuple[Tensor, Tensor], effort: Effort
) -> Callable[[], None]:
    """What a row times of a yardstick: all but the straightforward one replayed, as in training."""
    images, fast = batch[0], name != "straightforward"
    in_dtype = partial(cli.autocast, images.device, effort.dtype)
    model.train(not row.startswith("inference"))
    if row.startswith("layer"):
        run = large.forward_backward if row.endswith("backward") else forward
        return partial(run, model.blocks[0].attention, large.tokens_of(model, images), in_dtype)
    fast_model = compiled(model) if fast and effort.compile else model
    if row == "training step":
        recipe = replace(RECIPES.get(name, RECIPES["published"]), dtype=effort.dtype)
        optimizer = make_optimizer(model, recipe.optimizer, 1e-4, recipe.weight_decay)
        step = partial(training_step, fast_model, optimizer, recipe=recipe, capacity=model.capacity)
        step = replayed(step, optimizer) if fast else step
        if isinstance(step, ReplayedStep):
            for _ in range(WARM_UP_STEPS + 1):  # in the last of which it is recorded
                step(*batch)
        return partial(step, *batch)
    function = partial(forward, ReplayedModel(fast_model) if fast else model, images, in_dtype)
    function()  # a pass is recorded when it comes again
    return function


def measure(
    row: str, models: dict[str, SmallViT], train_set: NoisyImageDataset, effort: Effort
) -> dict:
    """Times one row and prints it; returns its figures."""
    device, names = train_set.device, list(models)
    batch_size = 1000 if row.endswith("1,000 images") else effort.batch_size
    batch = next(training_batches(train_set, batch_size, effort.seed, epoch=1))[:2]
    images = len(batch[0])
    if images >= 1000 and device.type == "cpu":
        names.remove("straightforward")  # takes minutes
    functions = {name: function_of(row, name, models[name], batch, effort) for name in names}
    seconds = alternate(functions, effort.rounds, effort.seconds, device)
    result = {"row": row, "images": images, "seconds": seconds}
    result["images_per_second"] = images / seconds["this"]
    cells = [f"{1e3 * seconds[n]:.1f}" if n in seconds else "–" for n in models]
    if "straightforward" in seconds:
        result["times_faster"] = seconds["straightforward"] / seconds["this"]
    cells.append(f"{result['times_faster']:.1f}" if "times_faster" in result else "–")
    print_row(f"{row} ({counted(images, 'image')})", *cells, f"{result['images_per_second']:,.0f}")
    return result


# The command ---------------------------------------------------------------------------------


def parse_args():
    parser = cli.make_parser(
        "Times this implementation side by side with the straightforward one, with dense "
        "attention and with other models. On a CUDA device training steps are replayed as in "
        "training, except for the straightforward one.",
        "python benchmark.py --dataset photos --quick",
    )
    cli.add_data(parser)
    cli.add_fields(parser.add_argument_group("batches"), Recipe, ("seed",))
    cli.add_computation(parser, dtype=True, compile=True)
    group = parser.add_argument_group("benchmark")
    group.add_argument(
        "--rows",
        nargs="+",
        choices=ROWS,
        default=ROWS,
        metavar="ROW",
        help=f"what to time, out of: {', '.join(ROWS)} (default: all)",
    )
    group.add_argument(
        "--quick",
        action="store_true",
        help="2 rounds, fewer images, tiles and tokens: a minute or two (default: no)",
    )
    cli.add_output(parser, "benchmark_results.json", "figures to write, in place of earlier ones")
    return parser.parse_args()


def main():
    args = parse_args()
    check_writable(args.output)
    device = cli.select_device(args.device, args.threads)
    how = {"dtype": args.dtype, "compile": args.compile, "seed": args.seed}
    effort = replace(QUICK if args.quick else Effort(), **how)
    source = load_images(args.dataset, args.data_dir, args.seed)
    train_set = Recipe().splits(source)[0].to(device)
    machine = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else processor_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "dataset": source.name,
        **asdict(effort),
    }
    for name, value in machine.items():
        print(f"{name:<21} {value}")

    results = {"machine": machine, "rows": []}
    rows = [row for row in args.rows if row in SIDE_BY_SIDE]
    if rows:
        models = make_yardsticks(device, YARDSTICKS)
        print_head("row", *(f"{n} (ms)" for n in models), "times faster", "this, images/s")
    for row in rows:
        results["rows"].append(measure(row, models, train_set, effort))
    if "tokens" in args.rows:
        images = next(training_batches(train_set, 256, effort.seed, epoch=1))[0]
        results["tokens"] = large.measure_tokens(images, effort, device)
    if "photograph" in args.rows:
        results["photograph"] = large.measure_photograph(effort, device)
    if "tiles" in args.rows:
        results["tiles"] = large.measure_tiles(effort, device)
    write_text(json.dumps(results, indent=2) + "\n", args.output)
    print(f"\nwrote {args.output}")
    return 0


if __name__ == "__main__":
    run_main(main)
