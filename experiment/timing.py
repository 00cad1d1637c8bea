"""Seconds and bytes of functions, measured side by side."""

import multiprocessing
import platform
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from experiment.user_errors import UserError


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


def fresh_peak(device):
    """`peak_bytes` to begin with: on a CUDA device that of now, not of what was before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    return peak_bytes(device)


def measured_apart(function, *arguments, device):
    """What function(*arguments, threads) returns, on a CPU in a process of its own: in this one,
    memory that was freed before would be taken again unseen.

    Raises:
        UserError: the process was ended, as systems do where memory runs out.
    """
    if device.type == "cuda":
        return function(*arguments, None)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        job = pool.submit(function, *arguments, torch.get_num_threads())
        try:
            return job.result()
        except BrokenProcessPool:
            raise UserError("measuring memory was ended; drop this row from --rows") from None


def processor_name():
    """The CPU's name as Linux, or else Python, tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(": ")[1] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
