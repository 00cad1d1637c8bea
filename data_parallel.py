"""Data-parallel training: one process per device, started by torchrun.

    torchrun --nproc-per-node=2 denoising_experiment_proper.py

Every process holds the whole model and takes its share of each batch. Without torchrun there is one
process, and every function here does nothing.
"""

import contextlib
import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from command_line import UserError


def rank():
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextlib.contextmanager
def joined(device):
    """Joins the processes that torchrun started; yields the device of this one.

    All but the first are silent on stdout, so that there is one log.
    """
    if not started_by_torchrun():
        yield device
        return
    local_rank = int(os.environ["LOCAL_RANK"])
    if device.type == "mps":
        raise UserError("torchrun cannot use this machine's GPU; add --device cpu")
    if device.type == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"torchrun started more than one process for each of {torch.cuda.device_count()} "
                "GPUs; set --nproc-per-node to their number"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        timeout=timedelta(hours=1),  # others wait while the first process downloads
        device_id=device if device.type == "cuda" else None,
    )
    with contextlib.ExitStack() as stack:
        if rank():
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
        yield device
    # Not after an error: others may wait for this process, and torchrun has to see it end.
    dist.destroy_process_group()


@contextlib.contextmanager
def first_process_first():
    """The first process runs the block alone, then the others: one of them downloads."""
    if rank():
        dist.barrier()
    yield
    if world_size() > 1 and rank() == 0:
        dist.barrier()


def parallel(model):
    """The model, wrapped so that a backward pass averages the gradients of all processes."""
    return DistributedDataParallel(model) if world_size() > 1 else model


def my_share(batch):
    """This process's images out of the batch of all processes."""
    return batch[rank() :: world_size()]


def sum_over_processes(tensor):
    """The sum of a tensor over all processes, with the gradient that data-parallel training needs.

    The gradient reaches the local summand alone and is world_size() times as large: averaged over
    the processes, as DistributedDataParallel does, it is that of the sum.
    """
    if world_size() == 1:
        return tensor
    total = tensor.detach().clone()
    dist.all_reduce(total)
    mine = world_size() * tensor
    return mine + (total - mine).detach()


def started_by_torchrun():
    return "TORCHELASTIC_RUN_ID" in os.environ


def wait_for_all():
    """Returns when every process has come here: torchrun ends all when one of them leaves early."""
    if world_size() > 1:
        dist.barrier()


def any_process(flag, device):
    """Whether a flag is set in any of the processes."""
    return bool(sum_over_processes(torch.tensor(float(flag), device=device)) > 0)
