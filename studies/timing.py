"""Seconds, memory and operations of functions, measured side by side."""

import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from common.user_errors import UserError
from experiment.command_line import select_device


def alternate(
    functions: dict[str, Callable], rounds: int, seconds: float, device: torch.device
) -> dict[str, float]:
    """Median seconds of each function, which take turns so that drift hits all alike: after a
    warm-up `rounds` rounds, or 3 if these take as many seconds.
    """
    times = {name: [] for name in functions}
    for number in range(rounds + 1):
        for name, function in functions.items():
            started = time.perf_counter()
            function()
            if device.type != "cpu":
                torch.accelerator.synchronize()
            times[name].append(time.perf_counter() - started)
        if number == 0:  # the warm-up
            began = time.perf_counter()
        elif number >= 3 and time.perf_counter() - began > seconds:
            break
    return {name: statistics.median(taken[1:]) for name, taken in times.items()}


def count_flops(function: Callable, *inputs) -> int:
    """FLOPs of all matrix products and convolutions of function(*inputs), two per multiply-add."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        function(*inputs)
    return counter.get_total_flops()


def peaks_apart(runs: Callable[..., Iterator], *arguments, device: torch.device) -> list[int]:
    """Bytes at the peak after each run of a series but the first, beyond those after the first.

    runs(*arguments) runs something before each yield, on a CPU in a process of its own: in this
    one, memory that was freed before would be taken again unseen. Where memory runs out the system
    ends it, which is a UserError.
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


def peak_bytes(device: torch.device) -> int:
    """Most memory so far: torch's on a CUDA device, else that of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    except OSError:  # no Linux
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def processor_name() -> str:
    """The CPU's name as Linux, or else Python, tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(": ")[1] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
