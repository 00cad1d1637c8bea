"""Data-parallel training: one process per device, started by torchrun.

    torchrun --nproc-per-node=2 denoising_experiment_proper.py

Every process holds the whole model and takes its share of each batch. Without torchrun there is one
process, and every function here does nothing.
"""

import contextlib
import os

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel


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
    if "TORCHELASTIC_RUN_ID" not in os.environ:  # not started by torchrun
        yield device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        with contextlib.ExitStack() as stack:
            if rank():
                nowhere = stack.enter_context(open(os.devnull, "w"))
                stack.enter_context(contextlib.redirect_stdout(nowhere))
            yield device
    finally:
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


def any_process(flag, device):
    """Whether a flag is set in any of the processes."""
    return bool(sum_over_processes(torch.tensor(float(flag), device=device)) > 0)
