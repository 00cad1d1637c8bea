"""Times layer, training and evaluation side by side with two yardsticks, and how the layer grows.

    python benchmark.py --dataset photos           # all rows, about a quarter of an hour
    python benchmark.py --dataset photos --quick   # about a minute on 2 CPU cores

The yardsticks are the straightforward implementation, which gathers the selected values (the
oracle of the tests), and a vision transformer of the same width with ordinary dense attention.
All variants alternate in one run, after a warm-up; a figure is the median. Prints its tables and
writes benchmark_results.json.
"""

import json
import math
import multiprocessing
import platform
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from torchvision.utils import make_grid

from adaptive_attention_moe import attend_as_one, topk_attention
from command_line import (
    UserError,
    add_output,
    check_writable,
    make_parser,
    number,
    replace_when_complete,
    run_main,
    select_device,
)
from cuda_graphs import WARM_UP_STEPS, ReplayedStep, replayed
from denoising_experiment_proper import (
    MODELS,
    NoisyImageDataset,
    SmallViT,
    autocast,
    compiled,
    count_parameters,
    evaluate,
    make_optimizer,
    noisy_splits,
    training_step,
)
from image_sources import load_images

sys.path.insert(0, str(Path(__file__).parent / "tests"))
from oracle import straightforward_expert, straightforward_moe

ROWS = (
    *("layer forward", "layer forward+backward", "training step", "inference"),
    *("epoch", "evaluation", "tokens", "models", "stages"),
)
TOKENS = (64, 256, 1024, 4096, 16384)
MOST_GATHERED = 4096  # tokens; at 16,384 the straightforward layer takes tens of GiB


@dataclass
class Effort:
    """How long to measure: rounds per row, at most, seconds after which fewer will do, sizes."""

    rounds: int = 15
    seconds: float = 30
    epoch_images: int = 1024  # on a CPU; a GPU goes through all
    evaluation_images: int = 10_000
    tokens: tuple = TOKENS


QUICK = Effort(rounds=2, seconds=3, epoch_images=64, evaluation_images=256, tokens=TOKENS[:3])


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


def make_variants(device):
    """{name: SmallViT}: this model, with the straightforward layer, with dense attention."""
    variants = {}
    for name in ("this", "straightforward", "dense"):
        torch.manual_seed(0)
        model = SmallViT()
        for block in model.blocks:
            if name == "straightforward":
                block.attention.forward = partial(straightforward_moe, block.attention)
            if name == "dense":
                block.attention = DenseAttention()
        variants[name] = model.to(device)
    return variants


def alternate(functions, effort, device):
    """Median seconds of each function; they take turns, so that drift hits all alike."""

    def round_of_all():
        seconds = {}
        for name, function in functions.items():
            started = time.perf_counter()
            function()
            if device.type != "cpu":
                torch.accelerator.synchronize()
            seconds[name] = time.perf_counter() - started
        return seconds

    round_of_all()  # warm-up
    rounds, started = [], time.perf_counter()
    while len(rounds) < effort.rounds:
        rounds.append(round_of_all())
        if len(rounds) >= 3 and time.perf_counter() - started > effort.seconds:
            break
    return {name: statistics.median(r[name] for r in rounds) for name in functions}


def tokens_of(model, images):
    """What the first layer of a model sees of images: [B, N, D]."""
    with torch.no_grad():
        return model.blocks[0].norm1(model.embed(images)[0])


def both_passes(layer, tokens, in_dtype):
    """A function() that runs a layer forward and backward."""
    tokens = tokens.clone().requires_grad_()

    def run():
        with in_dtype():
            output = layer(tokens)[0]
        output.float().sum().backward()

    return run


def functions_of(row, variants, train_set, eval_set, args):
    """What a row times, for each variant: ({name: function()}, images that each goes through)."""
    dtype = getattr(torch, args.dtype)
    batches = partial(train_set.shuffled_batches, args.batch_size, args.seed, epoch=1)
    noisy, clean, _ = next(batches())
    in_dtype = partial(autocast, noisy.device, dtype)
    functions = {}
    for name, model in variants.items():
        layer, tokens, optimizer = (
            model.blocks[0].attention,
            tokens_of(model, noisy),
            make_optimizer(model, 1e-4),
        )
        fast = model.train()
        if args.compile and name != "straightforward" and row in ("training step", "epoch"):
            fast = compiled(model, noisy, dtype)
            if fast is model:
                raise UserError("--compile: there is nothing compiled to time; drop the option")

        def forward(layer=layer, tokens=tokens):
            with torch.inference_mode(), in_dtype():
                layer(tokens)

        step = partial(training_step, fast, optimizer, dtype=dtype)
        if name != "straightforward" and row in ("training step", "epoch"):
            step = warmed_up(replayed(step, optimizer), noisy, clean)

        def epoch(step=step):
            losses = [step(noisy, clean) for noisy, clean, _ in batches()]
            torch.stack(losses).tolist()

        functions[name] = {
            "layer forward": forward,
            "layer forward+backward": both_passes(layer, tokens, in_dtype),
            "training step": partial(step, noisy, clean),
            "inference": partial(infer, model, noisy, in_dtype),
            "epoch": epoch,
            "evaluation": partial(evaluate, model, eval_set),
        }[row]
        model.train(row not in ("inference", "evaluation"))
    if row == "evaluation":
        del functions["straightforward"]  # takes minutes, and inference has a row of its own
    images = {"epoch": len(train_set), "evaluation": len(eval_set)}.get(row, len(noisy))
    return functions, images


def warmed_up(step, noisy, clean):
    """The step, which has been recorded by then where it is one that gets replayed.

    Raises:
        UserError: it could not be recorded.
    """
    if isinstance(step, ReplayedStep):
        for _ in range(WARM_UP_STEPS + 1):
            step(noisy, clean)
        if not step.graph:
            raise UserError("there is no replayed step to time; drop this row from --rows")
    return step


def grouped_moe(moe, x):
    """AdaptiveAttentionMoE without the folding of its output projections."""
    groups = {}
    for expert in moe.experts:
        groups.setdefault(min(expert.k_attend, x.shape[1]), []).append(expert)
    attended = {}
    for experts in groups.values():
        parts = attend_as_one(experts, x).chunk(len(experts), dim=-1)
        attended |= zip(experts, parts, strict=True)
    return straightforward_moe(moe, x, lambda expert, _: expert.out_proj(attended[expert]))


# What makes the layer fast, one step after the other; each stage includes those before it.
STAGES = {
    "selected values gathered": straightforward_moe,
    "scores masked instead": partial(
        straightforward_moe, run_expert=partial(straightforward_expert, attention=topk_attention)
    ),
    "q, k, v of an expert in one product": partial(
        straightforward_moe, run_expert=lambda expert, x: expert(x)
    ),
    "experts of equal budget together": grouped_moe,
    "output projections folded": None,
}


def make_stages(device):
    """{stage: (this model at that stage, optimizer)}."""
    stages = {}
    for name, forward in STAGES.items():
        model = make_variants(device)["this"]
        for block in model.blocks:
            if forward:
                block.attention.forward = partial(forward, block.attention)
        stages[name] = (model, "adamw")
    return stages


def make_models(device):
    """{name: (model of --model, optimizer)}, each with both optimizers."""
    return {
        f"{name}, {optimizer}": (SmallViT(**config).to(device), optimizer)
        for name, config in MODELS.items()
        for optimizer in ("adamw", "muon")
    }


def measure_side_by_side(contestants, noisy, clean, effort, args):
    """The training step and inference of each (model, optimizer), uncompiled: a dict for each."""
    steps, inference = {}, {}
    dtype = getattr(torch, args.dtype)
    for name, (model, optimizer) in contestants.items():
        optimizer = make_optimizer(model.train(), 1e-4, optimizer)
        step = replayed(partial(training_step, model, optimizer, dtype=dtype), optimizer)
        steps[name] = partial(warmed_up(step, noisy, clean), noisy, clean)
        inference[name] = partial(infer, model, noisy, partial(autocast, noisy.device, dtype))
    step_seconds = alternate(steps, effort, noisy.device)
    for model, _ in contestants.values():
        model.eval()
    inference_seconds = alternate(inference, effort, noisy.device)
    print("\n| | training step (ms) | inference (ms) |\n|---|---|---|")
    rows = []
    for name in contestants:
        seconds = {"training step": step_seconds[name], "inference": inference_seconds[name]}
        rows.append({"name": name, "seconds": seconds})
        print(f"| {name} | {' | '.join(f'{1e3 * s:.1f}' for s in seconds.values())} |", flush=True)
    return rows


def infer(model, noisy, in_dtype):
    with torch.inference_mode(), in_dtype():
        model(noisy)


def mosaic(images, tokens):
    """[1, 3, h, h] of that many patches, 4×4 pixels each, put together from images of 32×32."""
    side = math.isqrt(tokens // 64)
    chosen = images[torch.arange(side * side, device=images.device) % len(images)]
    return make_grid(chosen, nrow=side, padding=0).unsqueeze(0)


def measure_tokens(images, effort, device, args):
    """The layer forward and backward on 1 sequence of growing length: one dict per length."""
    variants = make_variants(device)
    in_dtype = partial(autocast, device, getattr(torch, args.dtype))
    peaks = {}
    for name in variants:
        lengths = [n for n in effort.tokens if name != "straightforward" or n <= MOST_GATHERED]
        parameters = (name, images.cpu().numpy(), lengths, device, args.dtype)
        # A process of its own on a CPU, where memory that was freed would be taken again unseen.
        if device.type != "cuda":
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                peaks[name] = pool.apply(peak_memory, (*parameters, torch.get_num_threads()))
        else:
            peaks[name] = peak_memory(*parameters)
    columns = [f"{name} ({unit})" for unit in ("ms", "MiB") for name in variants]
    print(f"\n| tokens | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    rows = []
    for tokens in effort.tokens:
        functions = {}
        for name, model in variants.items():
            if tokens in peaks[name]:
                x = tokens_of(model, mosaic(images, tokens))
                functions[name] = both_passes(model.blocks[0].attention, x, in_dtype)
        seconds = alternate(functions, effort, device)
        extra = {name: peaks[name][tokens] for name in functions}
        rows.append({"tokens": tokens, "seconds": seconds, "extra_bytes": extra})
        cells = [f"{1e3 * seconds[n]:.1f}" if n in seconds else "–" for n in variants]
        cells += [f"{extra[n] / 2**20:.0f}" if n in extra else "–" for n in variants]
        print(f"| {tokens:,} | {' | '.join(cells)} |", flush=True)
    return rows


def peak_memory(name, images, lengths, device, dtype, threads=None):
    """{length: peak extra bytes} of a variant's layer forward and backward; lengths ascend."""
    select_device(device.type, threads)
    model, images = make_variants(device)[name], torch.from_numpy(images).to(device)
    in_dtype = partial(autocast, device, getattr(torch, dtype))
    inputs = {tokens: tokens_of(model, mosaic(images, tokens)) for tokens in lengths}
    both_passes(model.blocks[0].attention, inputs[lengths[0]], in_dtype)()  # warm-up
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    start, peaks = peak_bytes(device), {}
    for tokens, x in inputs.items():
        both_passes(model.blocks[0].attention, x, in_dtype)()
        peaks[tokens] = peak_bytes(device) - start
    return peaks


def peak_bytes(device):
    """Most memory so far: torch's on a CUDA device, else that of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    except OSError:  # no Linux
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def count_flops(function, *inputs):
    """FLOPs of all matrix products and convolutions, two per multiply-add."""
    if isinstance(function, partial) and isinstance(function.func, ReplayedStep):
        function = partial(function.func.step, *function.args)  # a replay calls no operator
    eager = torch.compiler.set_stance("force_eager")  # the counter sees no compiled operator
    with eager, sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        function(*inputs)
    return counter.get_total_flops()


def parse_args():
    parser = make_parser(
        "Times this implementation side by side with the straightforward one and with dense "
        "attention. On a CUDA device training steps are replayed as in training, except for the "
        "straightforward one in the first table.",
        *("dataset", "data-dir", "batch-size", "seed", "device", "threads", "dtype", "compile"),
    )
    parser.add_argument(
        "--repeats",
        type=number(int, 1),
        default=15,
        help="timed rounds per row; slow rows get fewer, but at least 3 (default: %(default)s)",
    )
    parser.add_argument(
        "--rows",
        nargs="+",
        choices=ROWS,
        default=ROWS[:-1],
        metavar="ROW",
        help=f"what to time, out of: {', '.join(ROWS)} (default: all but stages)",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="2 rounds, fewer images, at most 1,024 tokens: about a minute (default: no)",
    )
    add_output(parser, "benchmark_results.json", "figures to write")
    return parser.parse_args()


def main():
    args = parse_args()
    check_writable(args.output)
    device = select_device(args.device, args.threads)
    effort = QUICK if args.quick else Effort(rounds=args.repeats)
    source = load_images(args.dataset, args.data_dir, args.seed)
    train_set, _, test_set = noisy_splits(source, 0.2)
    eval_indices = torch.arange(effort.evaluation_images) % len(test_set)
    eval_set = NoisyImageDataset(test_set.split[eval_indices])
    if device.type == "cpu":
        train_set.split = train_set.split[: effort.epoch_images]
    train_set = train_set.to(device)
    variants = make_variants(device)
    machine = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else processor_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "batch_size": args.batch_size,
        "dtype": args.dtype,
        "compile": bool(args.compile),
        "dataset": source.name,
        **asdict(effort),
    }
    for name, value in machine.items():
        print(f"{name:<18} {value}")
    for name, model in variants.items():
        print(f"{name:<18} {count_parameters(model):,} parameters")

    results = {"machine": machine, "rows": [], "tokens": [], "models": [], "stages": []}
    rows = [row for row in args.rows if row not in ("tokens", "models", "stages")]
    if rows:
        print(
            "\n| row | this (ms) | straightforward (ms) | times faster | dense (ms) "
            "| this, images/s | share of the matmul rate |\n|---|---|---|---|---|---|---|"
        )
    for row in rows:
        results["rows"].append(measure(row, variants, train_set, eval_set, effort, args))
    if "tokens" in args.rows:
        images = next(train_set.shuffled_batches(256, args.seed, epoch=1))[0]
        results["tokens"] = measure_tokens(images, effort, device, args)
    for row, make in (("models", make_models), ("stages", make_stages)):
        if row in args.rows:
            noisy, clean, _ = next(train_set.shuffled_batches(args.batch_size, args.seed, epoch=1))
            results[row] = measure_side_by_side(make(device), noisy, clean, effort, args)
    with replace_when_complete(args.output) as path:
        path.write_text(json.dumps(results, indent=2) + "\n")
    print(f"\nwrote {args.output}")
    return 0


def measure(row, variants, train_set, eval_set, effort, args):
    """Times one row and prints it; returns its figures."""
    functions, images = functions_of(row, variants, train_set, eval_set, args)
    # The machine's own matrix product takes turns with the variants: its rate drifts as well.
    dtype = getattr(torch, args.dtype)
    side = 8192 if train_set.device.type == "cuda" else 1024  # small ones time the launch alone
    a, b = torch.randn(2, side, side, device=train_set.device, dtype=dtype)
    seconds = alternate({**functions, "matmul": lambda: a @ b}, effort, train_set.device)
    result = {"row": row, "images": images, "matmul_gflops": 2e-9 * side**3 / seconds["matmul"]}
    del seconds["matmul"]
    result |= {"seconds": seconds, "images_per_second": images / seconds["this"]}
    if "straightforward" in seconds:
        result["times_faster"] = seconds["straightforward"] / seconds["this"]
    if row not in ("epoch", "evaluation"):
        result["gflop"] = count_flops(functions["this"]) / 1e9
        rate = result["gflop"] / seconds["this"]
        result["share_of_matmul_rate"] = rate / result["matmul_gflops"]
    times = [f"{1e3 * seconds[n]:.1f}" if n in seconds else "–" for n in variants]
    print(
        f"| {row} ({images:,} images) | {times[0]} | {times[1]} "
        f"| {result.get('times_faster', math.nan):.1f} | {times[2]} "
        f"| {result['images_per_second']:,.0f} "
        f"| {result.get('share_of_matmul_rate', math.nan):.0%} |".replace("nan%", "–").replace(
            "nan", "–"
        ),
        flush=True,
    )
    return result


def processor_name():
    """The CPU's name as Linux, or else Python, tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(": ")[1] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    run_main(main)
