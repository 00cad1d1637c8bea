"""Data-parallel training under torchrun: every process takes an equal share of each batch.

Incomplete ones are left out. Without torchrun, all of this does nothing.
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from common.user_errors import UserError, counted


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


@contextlib.contextmanager
def joined(device: torch.device) -> Iterator[torch.device]:
    """Joins the processes that torchrun started; yields the device of this one."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield device
        return
    number, backend = int(os.environ["LOCAL_RANK"]), "gloo"
    if device.type == "cuda" and number < torch.cuda.device_count():
        device, backend = torch.device("cuda", number), "nccl"
        torch.cuda.set_device(device)
    elif device.type != "cpu":
        to_do = "set --nproc-per-node to the number of CUDA GPUs, or --device cpu"
        raise UserError(f"torchrun: {to_do}")
    dist.init_process_group(backend, timeout=timedelta(hours=1))  # others wait for a download
    if rank():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, one log, until the process ends
    yield device
    dist.destroy_process_group()  # not after an error: torchrun has to see it end


def wait_if(condition: bool) -> None:
    """Waits, where the condition holds, until all processes do."""
    if condition and world_size() > 1:
        dist.barrier()


def check_shares(batch_size: int, images: int) -> None:
    """Raises UserError where the processes cannot take equal shares of batches out of `images`."""
    processes = world_size()
    if processes > 1 and (batch_size % processes or batch_size > images):
        raise UserError(
            f"--batch-size {batch_size} for {processes} processes and "
            f"{counted(images, 'training image')}: "
            "it has to be a multiple of the first and at most the second"
        )


def sum_over_processes(tensor: Tensor) -> Tensor:
    """The sum, in place of the tensor."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor
