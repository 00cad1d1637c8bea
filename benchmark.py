"""Times the layer, the training step and inference side by side with two yardsticks.

    python benchmark.py --dataset photos

The yardsticks are the straightforward implementation, which gathers the selected values (the
oracle of the tests), and a vision transformer of the same width with ordinary dense attention.
All variants alternate in one run, after warm-up; a figure is the median. Prints a table and writes
benchmark_results.json.
"""

import json
import platform
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from command_line import (
    add_output,
    check_writable,
    make_parser,
    number,
    replace_when_complete,
    run_main,
    select_device,
)
from denoising_experiment_proper import (
    SmallViT,
    count_parameters,
    make_optimizer,
    noisy_splits,
    training_step,
)
from image_sources import load_images

sys.path.insert(0, str(Path(__file__).parent / "tests"))
from oracle import straightforward_moe

ROWS = ("layer forward", "layer forward+backward", "training step", "inference")


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


def alternate(functions, repeats, device):
    """Median seconds of each function; they take turns, so that drift hits all alike."""
    seconds = {name: [] for name in functions}
    for turn in range(-2, repeats):  # two rounds of warm-up
        for name, function in functions.items():
            started = time.perf_counter()
            function()
            if device.type != "cpu":
                torch.accelerator.synchronize()
            if turn >= 0:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def functions_of(row, variants, noisy, clean):
    """What a row times, for each variant: {name: function()}."""
    functions = {}
    for name, model in variants.items():
        block = model.blocks[0]
        with torch.no_grad():
            tokens = model.patch_embed(noisy).flatten(2).transpose(1, 2) + model.position
            tokens = block.norm1(tokens)
        tokens = tokens.detach().requires_grad_(row == "layer forward+backward")

        def forward(layer=block.attention, tokens=tokens):
            with torch.inference_mode():
                layer(tokens)

        def both(layer=block.attention, tokens=tokens):
            layer(tokens)[0].sum().backward()

        def infer(model=model):
            with torch.inference_mode():
                model(noisy)

        step = partial(training_step, model, make_optimizer(model, 1e-4), noisy, clean)
        functions[name] = dict(zip(ROWS, (forward, both, step, infer), strict=True))[row]
        model.train(row != "inference")
    return functions


def count_flops(function, *inputs):
    """FLOPs of all matrix products and convolutions, two per multiply-add."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        function(*inputs)
    return counter.get_total_flops()


def main():
    parser = make_parser(
        "Times this implementation side by side with the straightforward one and with dense "
        "attention.",
        *("dataset", "data-dir", "batch-size", "seed", "device", "threads"),
    )
    parser.add_argument(
        "--repeats",
        type=number(int, 1),
        default=15,
        help="timed rounds per row (default: %(default)s)",
    )
    parser.add_argument(
        "--rows",
        nargs="+",
        choices=ROWS,
        default=ROWS,
        metavar="ROW",
        help=f"what to time, out of: {', '.join(ROWS)} (default: all)",
    )
    add_output(parser, "benchmark_results.json", "figures to write")
    args = parser.parse_args()
    check_writable(args.output)
    device = select_device(args.device, args.threads)
    source = load_images(args.dataset, args.data_dir, args.seed)
    train_set = noisy_splits(source, 0.2)[0]
    noisy, clean, _ = next(train_set.shuffled_batches(args.batch_size, args.seed, epoch=1))
    noisy, clean = noisy.to(device), clean.to(device)
    variants = make_variants(device)

    machine = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else processor_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "batch_size": len(noisy),
        "dtype": "float32",
        "repeats": args.repeats,
        "dataset": source.name,
    }
    for name, value in machine.items():
        print(f"{name:<14} {value}")
    for name, model in variants.items():
        print(f"{name:<16} {count_parameters(model):,} parameters")
    print(
        "\n| row | this (ms) | straightforward (ms) | times faster | dense (ms) "
        "| share of the matmul rate |\n|---|---|---|---|---|---|"
    )
    # The machine's own matrix product takes turns with the variants: its rate drifts as well.
    a, b = torch.randn(2, 1024, 1024, device=device)
    results = []
    for row in args.rows:
        functions = functions_of(row, variants, noisy, clean)
        flops = count_flops(functions["this"])
        seconds = alternate({**functions, "matmul": lambda: a @ b}, args.repeats, device)
        matmul_rate = 2 * 1024**3 / seconds.pop("matmul")
        result = {
            "row": row,
            "seconds": seconds,
            "times_faster": seconds["straightforward"] / seconds["this"],
            "gflop": flops / 1e9,
            "matmul_gflops": matmul_rate / 1e9,
            "share_of_matmul_rate": flops / seconds["this"] / matmul_rate,
        }
        results.append(result)
        print(
            f"| {row} | {1e3 * seconds['this']:.1f} | {1e3 * seconds['straightforward']:.1f} "
            f"| {result['times_faster']:.1f} | {1e3 * seconds['dense']:.1f} "
            f"| {result['share_of_matmul_rate']:.0%} |",
            flush=True,
        )
    with replace_when_complete(args.output) as path:
        path.write_text(json.dumps({"machine": machine, "rows": results}, indent=2) + "\n")
    print(f"\nwrote {args.output}")
    return 0


def processor_name():
    """The CPU's name as Linux, or else Python, tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(": ")[1] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    run_main(main)
