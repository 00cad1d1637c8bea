"""Data-parallel training under torchrun: every process takes an equal share of each batch.

The last, incomplete one of an epoch is dropped. Without torchrun, all of this does nothing.
"""

import contextlib
import itertools
import math
import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from tqdm import tqdm

from common.user_errors import UserError

STEPS_PER_READ = 50  # reading a loss for the progress bar makes the CPU wait for a GPU


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


@contextlib.contextmanager
def joined(device):
    """Joins the processes that torchrun started; yields the device of this one."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield device
        return
    number, backend = int(os.environ["LOCAL_RANK"]), "gloo"
    if device.type == "cuda" and number < torch.cuda.device_count():
        device, backend = torch.device("cuda", number), "nccl"
        torch.cuda.set_device(device)
    elif device.type != "cpu":
        raise UserError(
            "torchrun: set --nproc-per-node to the number of CUDA GPUs, or --device cpu"
        )
    dist.init_process_group(backend, timeout=timedelta(hours=1))  # others wait for a download
    if rank():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, one log, until the process ends
    yield device
    dist.destroy_process_group()  # not after an error: torchrun has to see it end


def wait_if(condition):
    if condition and world_size() > 1:
        dist.barrier()


def my_share(batches, batch_size):
    for batch in batches:
        if world_size() == 1 or len(batch[0]) == batch_size:
            yield [tensor[rank() :: world_size()] for tensor in batch]


def check_shares(batch_size, images):
    """Raises UserError where the processes cannot take equal shares of batches out of `images`."""
    processes = world_size()
    if processes > 1 and (batch_size % processes or batch_size > images):
        raise UserError(
            f"--batch-size {batch_size} for {processes} processes and {images:,} training images: "
            "it has to be a multiple of the first and at most the second"
        )


def sum_over_processes(tensor):
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def my_batches(train_set, recipe, epoch, sums):
    """(step, batch) of this process in an epoch, steps counted over all; a bar reads `sums`."""
    per_epoch = train_set.steps_per_epoch(recipe.batch_size)
    first = (epoch - 1) * per_epoch
    count = min(per_epoch, (recipe.steps or math.inf) - first)
    batches = train_set.shuffled_batches(
        recipe.batch_size,
        recipe.seed,
        epoch,
        lossless_share=recipe.lossless_share,
        flip=recipe.flip,
        transpose=recipe.transpose,
        crop=recipe.crop,
    )
    bar = tqdm(
        itertools.islice(my_share(batches, recipe.batch_size), count),
        f"epoch {epoch}/{recipe.epochs}",
        count,
        unit="step",
        leave=False,
        disable=True if rank() else None,
        dynamic_ncols=True,
    )
    images = 0
    for step, batch in enumerate(bar, 1):
        yield first + step - 1, batch
        images += len(batch[0])
        if not bar.disable and step % STEPS_PER_READ == 0:
            bar.set_postfix_str(f"mse {sums[0].item() / images:.4f}")
