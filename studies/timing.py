"""Seconds, operations and bytes of functions, measured side by side, and tables of them."""

import math
import multiprocessing
import platform
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from common.user_errors import UserError
from experiment.command_line import select_device

# Side of the matrices and values of the tensor by which limits are measured: no cache holds the
# tensor, and on a GPU smaller ones time the launch alone.
LARGE = {"cuda": (8192, 2**28), "cpu": (1024, 2**26)}


def alternate(functions, rounds, seconds, device):
    """Median seconds of each function; they take turns, so that drift hits all alike.

    Args:
        functions: {name: function()}.
        rounds: of all of them, at most.
        seconds: after which 3 rounds will do.
        device: torch.device that they run on.

    Returns:
        {name: median seconds}.
    """

    def round_of_all():
        taken = {}
        for name, function in functions.items():
            started = time.perf_counter()
            function()
            if device.type != "cpu":
                torch.accelerator.synchronize()
            taken[name] = time.perf_counter() - started
        return taken

    round_of_all()  # warm-up
    done, started = [], time.perf_counter()
    while len(done) < rounds:
        done.append(round_of_all())
        if len(done) >= 3 and time.perf_counter() - started > seconds:
            break
    return {name: statistics.median(r[name] for r in done) for name in functions}


def count_flops(function, *inputs):
    """FLOPs of all matrix products and convolutions of function(*inputs), two per multiply-add."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        function(*inputs)
    return counter.get_total_flops()


def count_bytes(function, *inputs):
    """Bytes that the operators of function(*inputs) read and write.

    The sum over all tensors that an operator is given or returns, views left out. This is what
    eager operators move, one by one: caches and fused kernels move less, so that a share of the
    memory's limit reckoned from it is an upper bound, and can pass 100 %.
    """
    with _ByteCounter() as counter:
        function(*inputs)
    return counter.total


class _ByteCounter(TorchDispatchMode):
    total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if not function.is_view and function is not torch.ops.aten._unsafe_view.default:
            leaves = tree_leaves((args, kwargs, result))
            self.total += sum(_bytes_of(leaf) for leaf in leaves if isinstance(leaf, torch.Tensor))
        return result


def _bytes_of(tensor):
    """What it takes in memory, where what is expanded lies once."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return tensor.element_size() * math.prod(size for size, step in sizes if step)


def limits_of(device, dtype):
    """By what a device's limits are measured, beside the functions that they limit.

    Args:
        device: torch.device.
        dtype: torch.dtype of the matrix product.

    Returns:
        Two dicts of "matrix" and "memory": function() that multiplies matrices or copies a tensor,
        and the FLOPs or bytes, read and written, that this takes.
    """
    side, values = LARGE.get(device.type, LARGE["cpu"])
    a, b = torch.randn(2, side, side, device=device, dtype=dtype)
    source, target = torch.ones(2, values, device=device)
    functions = {"memory": lambda: target.copy_(source), "matrix": lambda: a @ b}
    return functions, {"matrix": 2 * side**3, "memory": 2 * source.nbytes}


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


def peaks_apart(runs, *arguments, device):
    """Extra bytes at the peak after each run of a series, beyond that after the first.

    On a CPU in a process of its own: in this one, memory that was freed before would be taken again
    unseen.

    Args:
        runs: generator function of a module: runs(*arguments) runs something before each yield.
        arguments: that can be sent to another process.
        device: torch.device that it runs on.

    Returns:
        An int for each run but the first, in ascending order.

    Raises:
        UserError: the process was ended, as systems do where memory runs out.
    """
    if device.type == "cuda":
        return _peaks(runs, arguments, device)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        job = pool.submit(_peaks, runs, arguments, device, torch.get_num_threads())
        try:
            return job.result()
        except BrokenProcessPool:
            raise UserError("measuring memory was ended; drop this row from --rows") from None


def _peaks(runs, arguments, device, threads=None):
    select_device(device.type, threads)
    series = runs(*arguments)
    next(series)
    if device.type == "cuda":  # else the peak would be that of what was before
        torch.cuda.reset_peak_memory_stats()
    start = peak_bytes(device)
    return [peak_bytes(device) - start for _ in series]


def processor_name():
    """The CPU's name as Linux, or else Python, tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(": ")[1] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def print_head(*columns):
    """The head of a Markdown table."""
    print(f"\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")


def print_row(*cells):
    """A row of it, seen as soon as it is measured."""
    print(f"| {' | '.join(cells)} |", flush=True)
