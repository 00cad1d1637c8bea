"""Times layer, training and evaluation side by side with yardsticks, and how the layer grows.

    python benchmark.py --dataset photos           # all rows, about a quarter of an hour
    python benchmark.py --dataset photos --quick   # about a minute on 2 CPU cores

The yardsticks are the straightforward implementation, which gathers the selected values, and a
vision transformer of the same width with ordinary dense attention; the refined and the routed
model, trained by their own recipes, are shown beside them. All alternate in one run, after a
warm-up; a figure is the median. Prints its tables and writes benchmark_results.json.
"""

import json
import math
import platform
import time
from dataclasses import asdict, dataclass, replace
from functools import partial

import numpy as np
import skimage.data
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.utils import make_grid

import topk_attention
from denoising_experiment_proper import RECIPES, training_step
from experiment.command_line import (
    PHOTOGRAPH_CHECKPOINT,
    add_output,
    autocast,
    make_parser,
    select_device,
)
from experiment.cuda_graphs import (
    WARM_UP_STEPS,
    ReplayedModel,
    ReplayedStep,
    compiled,
    replayed,
)
from experiment.evaluation import evaluate, psnr
from experiment.image_sources import load_images
from experiment.muon import make_optimizer
from experiment.noisy_images import NoisyImageDataset, noisy_splits
from experiment.reference import straightforward_moe
from experiment.run_files import check_writable, write_text
from experiment.tiling import denoise
from experiment.timing import (
    alternate,
    count_flops,
    fresh_peak,
    measured_apart,
    peak_bytes,
    processor_name,
)
from experiment.user_errors import UserError, run_main
from model_variants import DnCNN
from small_vit import MODELS, SmallViT, load_model

ROWS = (
    *("layer forward", "layer forward+backward", "training step", "inference"),
    *("inference, 1,000 images", "evaluation", "tokens", "photograph", "tiles"),
)
PHOTOGRAPH = (321, 481)  # height and width of those of the field's first data set
TILES = ((64, 16), (128, 16), (256, 16), (256, 32), (512, 32), (1024, 32))  # and overlaps
TOKENS = (64, 256, 1024, 4096, 16384)
MOST_GATHERED = 4096  # tokens; at 16,384 the straightforward layer takes tens of GiB


@dataclass
class Effort:
    """How long to measure: rounds per row, at most, seconds after which 3 will do, sizes."""

    rounds: int = 15
    seconds: float = 30
    batch_size: int = 64
    evaluation_images: int = 10_000
    tokens: tuple = TOKENS


QUICK = Effort(rounds=2, seconds=3, evaluation_images=256, tokens=TOKENS[:3])


class DenseAttention(nn.Module):
    """Ordinary multi-head attention in the place of AdaptiveAttentionMoE: the second yardstick."""

    def __init__(self, d_model=128, num_heads=4):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(d_model, 3 * d_model)
        self.out_proj = nn.Linear(d_model, d_model)

    def forward(self, x):
        """[B, N, D] -> [B, N, D] and the routing to the only expert, [B, N, 1]."""
        heads = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        return self.out_proj(attended), x.new_ones(*x.shape[:2], 1)


def make_variants(device, names=("this", "straightforward", "dense", "refined", "routed")):
    """{name: SmallViT}: this model, with the straightforward layer, with dense attention, …"""
    variants = {}
    for name in names:
        torch.manual_seed(0)
        model = SmallViT(MODELS.get(name, MODELS["published"]))
        for block in model.blocks:
            if name == "straightforward":
                block.attention.forward = partial(straightforward_moe, block.attention)
            if name == "dense":
                block.attention = DenseAttention()
        variants[name] = model.to(device)
    return variants


def tokens_of(model, images):
    """What the first layer of a model sees of images: [B, N, D]."""
    with torch.no_grad():
        return model.blocks[0].norm1(model.embed(images)[0])


def forward_pass(module, inputs, in_dtype):
    with torch.inference_mode(), in_dtype():
        module(inputs)


def both_passes(layer, tokens, in_dtype):
    with in_dtype():
        output = layer(tokens.detach().requires_grad_())[0]
    output.float().sum().backward()


def functions_of(row, variants, train_set, eval_set, effort, args):
    """What a row times, for each variant: ({name: function()}, images that each goes through)."""
    batch_size = 1000 if row.endswith("1,000 images") else effort.batch_size
    noisy, clean, _ = next(train_set.shuffled_batches(batch_size, args.seed, epoch=1))
    in_dtype = partial(autocast, noisy.device, args.dtype)
    functions = {}
    for name, model in variants.items():
        model.train()
        if row.startswith("layer"):
            passes = both_passes if row.endswith("backward") else forward_pass
            layer, tokens = model.blocks[0].attention, tokens_of(model, noisy)
            functions[name] = partial(passes, layer, tokens, in_dtype)
        elif row == "training step":
            functions[name] = partial(make_step(name, model, noisy, clean, args), noisy, clean)
        elif row.startswith("inference"):
            passes = model.eval()
            if name != "straightforward":
                passes = ReplayedModel(compiled(model) if args.compile else model)
            functions[name] = partial(forward_pass, passes, noisy, in_dtype)
            functions[name]()  # a pass is recorded when it comes again
        else:
            functions[name] = partial(evaluate, model, eval_set)
    if row == "evaluation" or (len(noisy) >= 1000 and noisy.device.type == "cpu"):
        del functions["straightforward"]  # takes minutes, and inference has a row of its own
    return functions, len(eval_set) if row == "evaluation" else len(noisy)


def make_step(name, model, noisy, clean, args):
    """The training step of a variant: compiled and replayed as training does it.

    Raises:
        UserError: it could not be recorded.
    """
    recipe = replace(RECIPES.get(name, RECIPES["published"]), dtype=args.dtype)
    optimizer = make_optimizer(model, recipe.optimizer, 1e-4, recipe.weight_decay)
    given = {"recipe": recipe, "capacity": model.capacity}
    if name == "straightforward":
        return partial(training_step, model, optimizer, **given)
    fast = compiled(model) if args.compile else model
    step = replayed(partial(training_step, fast, optimizer, **given), optimizer)
    if isinstance(step, ReplayedStep):
        for _ in range(WARM_UP_STEPS + 1):
            step(noisy, clean)
        if not step.graph:
            raise UserError("there is no replayed step to time; drop this row from --rows")
    return step


def mosaic(images, tokens):
    """[1, 3, h, h] of that many patches, 4×4 pixels each, put together from images of 32×32."""
    side = math.isqrt(tokens // 64)
    chosen = images[torch.arange(side * side, device=images.device) % len(images)]
    return make_grid(chosen, nrow=side, padding=0).unsqueeze(0)


def measure_tokens(images, effort, device, args):
    """The layer forward and backward on 1 sequence of growing length: one dict per length."""
    variants = make_variants(device, ("this", "straightforward", "dense"))
    in_dtype = partial(autocast, device, args.dtype)
    peaks = {}
    for name in variants:
        lengths = [n for n in effort.tokens if name != "straightforward" or n <= MOST_GATHERED]
        parameters = (name, images.cpu().numpy(), lengths, device, args.dtype)
        peaks[name] = measured_apart(peak_memory, *parameters, device=device)
    columns = [f"{name} ({unit})" for unit in ("ms", "MiB") for name in variants]
    print(f"\n| tokens | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    rows = []
    for tokens in effort.tokens:
        functions = {}
        for name, model in variants.items():
            if tokens in peaks[name]:
                x = tokens_of(model, mosaic(images, tokens))
                functions[name] = partial(both_passes, model.blocks[0].attention, x, in_dtype)
        seconds = alternate(functions, effort.rounds, effort.seconds, device)
        extra = {name: peaks[name][tokens] for name in functions}
        rows.append({"tokens": tokens, "seconds": seconds, "extra_bytes": extra})
        cells = [f"{1e3 * seconds[n]:.1f}" if n in seconds else "–" for n in variants]
        cells += [f"{extra[n] / 2**20:.0f}" if n in extra else "–" for n in variants]
        print(f"| {tokens:,} | {' | '.join(cells)} |", flush=True)
    return rows


def peak_memory(name, images, lengths, device, dtype, threads):
    """{length: peak extra bytes} of a variant's layer forward and backward; lengths ascend."""
    select_device(device.type, threads)
    model, images = make_variants(device, (name,))[name], torch.from_numpy(images).to(device)
    in_dtype = partial(autocast, device, dtype)
    layer = model.blocks[0].attention
    both_passes(layer, tokens_of(model, mosaic(images, lengths[0])), in_dtype)  # warm-up
    start, peaks = fresh_peak(device), {}
    for tokens in lengths:  # their inputs one by one: made before, they would hide small peaks
        both_passes(layer, tokens_of(model, mosaic(images, tokens)), in_dtype)
        peaks[tokens] = peak_bytes(device) - start
    return peaks


def noisy_photograph(name, size=None, sigma=25 / 255):
    """(noisy, clean) float32 [h, w, 3] of a photograph inside scikit-image, unclipped."""
    clean = getattr(skimage.data, name)().astype(np.float32) / 255
    clean = np.ascontiguousarray(clean[: size[0], : size[1]]) if size else clean
    noise = np.random.default_rng(0).standard_normal(clean.shape, dtype=np.float32)
    return clean + np.float32(sigma) * noise, clean


DENOISERS = {
    "photographs": lambda: SmallViT(MODELS["photographs"]),
    "a quarter attends": lambda: SmallViT(replace(MODELS["photographs"], capacity=0.25)),
    "DnCNN of 20 layers": lambda: DnCNN(depth=20),
}


def peak_of_photograph(name, device, dtype, threads):
    """Peak extra bytes of denoising a photograph, beyond those of a small image."""
    select_device(device.type, threads)
    model, (noisy, _) = DENOISERS[name]().to(device), noisy_photograph("astronaut", PHOTOGRAPH)
    denoise(model, noisy[:32, :32], dtype=dtype)  # warm-up
    start = fresh_peak(device)
    denoise(model, noisy, dtype=dtype)
    return peak_bytes(device) - start


def measure_photograph(effort, device, args):
    """Denoising a photograph by untrained models, DnCNN's of 64 channels: a dict for each."""
    noisy, _ = noisy_photograph("astronaut", PHOTOGRAPH)
    functions = {
        name: partial(denoise, make().to(device), noisy, dtype=args.dtype)
        for name, make in DENOISERS.items()
    }
    seconds = alternate(functions, effort.rounds, effort.seconds, device)
    print("\n| a photograph of 481×321 | ms | ms per megapixel | peak MiB |\n|---|---|---|---|")
    rows = []
    for name in DENOISERS:
        peak = measured_apart(peak_of_photograph, name, device, args.dtype, device=device)
        rows.append({"model": name, "seconds": seconds[name], "extra_bytes": peak})
        ms, megapixels = 1e3 * seconds[name], math.prod(PHOTOGRAPH) / 1e6
        print(f"| {name} | {ms:.1f} | {ms / megapixels:,.0f} | {peak / 2**20:,.0f} |", flush=True)
    return rows


def measure_tiles(device, args):
    """Decibels against seconds of tiles and their overlap, by the shipped model."""
    model = load_model(PHOTOGRAPH_CHECKPOINT).to(device)
    photographs = [noisy_photograph(name) for name in ("astronaut", "coffee", "rocket")]
    print("\n| tile | overlap | PSNR (dB) | seconds |\n|---|---|---|---|")
    rows = []
    for tile, overlap in TILES:
        started = time.perf_counter()
        restored = [denoise(model, noisy, tile, overlap, args.dtype) for noisy, _ in photographs]
        seconds = time.perf_counter() - started
        pairs = zip(restored, photographs, strict=True)
        decibels = float(np.mean([psnr(image, clean) for image, (_, clean) in pairs]))
        rows.append({"tile": tile, "overlap": overlap, "psnr": decibels, "seconds": seconds})
        print(f"| {tile} | {overlap} | {decibels:.3f} | {seconds:.2f} |", flush=True)
    return rows


def flops_of(function):
    """`count_flops` of what a row times."""
    if isinstance(function, partial) and isinstance(function.func, ReplayedStep):
        function = partial(function.func.step, *function.args)  # a replay calls no operator
    if isinstance(function, partial) and isinstance(function.args[0], ReplayedModel):
        function = partial(function.func, function.args[0].model, *function.args[1:])
    with torch.compiler.set_stance("force_eager"):  # the counter sees no compiled operator
        used, topk_attention.USE_KERNEL = topk_attention.USE_KERNEL, False  # nor a kernel
        try:
            return count_flops(function)
        finally:
            topk_attention.USE_KERNEL = used


def parse_args():
    parser = make_parser(
        "Times this implementation side by side with the straightforward one, with dense "
        "attention and with other models. On a CUDA device training steps are replayed as in "
        "training, except for the straightforward one.",
        "python benchmark.py --dataset photos --quick",
        *("dataset", "data-dir", "seed", "device", "threads", "dtype", "compile"),
    )
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
        help="2 rounds, fewer images, at most 1,024 tokens: about a minute (default: no)",
    )
    add_output(parser, "benchmark_results.json", "figures to write, in place of earlier ones")
    return parser.parse_args()


def main():
    args = parse_args()
    check_writable(args.output)
    device = select_device(args.device, args.threads)
    effort = QUICK if args.quick else Effort()
    source = load_images(args.dataset, args.data_dir, args.seed)
    train_set, _, test_set = noisy_splits(source, 0.2)
    eval_indices = torch.arange(effort.evaluation_images) % len(test_set)
    eval_set = NoisyImageDataset(test_set.split[eval_indices])
    train_set = train_set.to(device)
    variants = make_variants(device)
    machine = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else processor_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "dtype": args.dtype,
        "compile": args.compile,
        "dataset": source.name,
        **asdict(effort),
    }
    for name, value in machine.items():
        print(f"{name:<18} {value}")

    results = {"machine": machine, "rows": [], "tokens": []}
    rows = [row for row in args.rows if row not in ("tokens", "photograph", "tiles")]
    if rows:
        columns = [f"{name} (ms)" for name in variants]
        columns += ["times faster", "this, images/s", "part of the matmul rate"]
        print(f"\n| row | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    for row in rows:
        results["rows"].append(measure(row, variants, train_set, eval_set, effort, args))
    if "tokens" in args.rows:
        images = next(train_set.shuffled_batches(256, args.seed, epoch=1))[0]
        results["tokens"] = measure_tokens(images, effort, device, args)
    if "photograph" in args.rows:
        results["photograph"] = measure_photograph(effort, device, args)
    if "tiles" in args.rows:
        results["tiles"] = measure_tiles(device, args)
    write_text(json.dumps(results, indent=2) + "\n", args.output)
    print(f"\nwrote {args.output}")
    return 0


def measure(row, variants, train_set, eval_set, effort, args):
    """Times one row and prints it; returns its figures."""
    functions, images = functions_of(row, variants, train_set, eval_set, effort, args)
    # The machine's own matrix product takes turns with the variants: its rate drifts as well.
    dtype = getattr(torch, args.dtype)
    side = 8192 if train_set.device.type == "cuda" else 1024  # small ones time the launch alone
    a, b = torch.randn(2, side, side, device=train_set.device, dtype=dtype)
    functions["matmul"] = lambda: a @ b
    seconds = alternate(functions, effort.rounds, effort.seconds, train_set.device)
    result = {"row": row, "images": images, "matmul_gflops": 2e-9 * side**3 / seconds["matmul"]}
    del seconds["matmul"]
    result |= {"seconds": seconds, "images_per_second": images / seconds["this"]}
    if "straightforward" in seconds:
        result["times_faster"] = seconds["straightforward"] / seconds["this"]
    if row != "evaluation":
        result["gflop"] = flops_of(functions["this"]) / 1e9
        result["part_of_rate"] = result["gflop"] / seconds["this"] / result["matmul_gflops"]
    cells = [f"{1e3 * seconds[n]:.1f}" if n in seconds else "–" for n in variants]
    cells.append(f"{result['times_faster']:.1f}" if "times_faster" in result else "–")
    cells.append(f"{result['images_per_second']:,.0f}")
    cells.append(f"{result['part_of_rate']:.0%}" if "part_of_rate" in result else "–")
    print(f"| {row} ({images:,} images) | {' | '.join(cells)} |", flush=True)
    return result


if __name__ == "__main__":
    run_main(main)
