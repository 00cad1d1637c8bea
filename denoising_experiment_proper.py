"""Trains the denoiser, keeps its best epoch, tests it and prints the results.

    python denoising_experiment_proper.py                                         # CIFAR-10
    python denoising_experiment_proper.py --dataset photos --recipe refined --epochs 6

Read it from top to bottom: the recipe, a training step, the loop, the experiment in four stages.
"""

import argparse
import math
import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from adaptive_attention_moe import load_balancing_loss
from common.safe_files import locked, write_figure
from common.user_errors import UserError, counted, run_main
from experiment import command_line as cli
from experiment.checkpoints import (
    check_finite,
    read_run,
    restore_optimizer,
    save_run,
    write_checkpoint,
)
from experiment.cuda_graphs import compiled, replayed
from experiment.data_parallel import (
    check_shares,
    joined,
    rank,
    sum_over_processes,
    wait_if,
    world_size,
)
from experiment.evaluation import evaluate, validation_batches, validation_mse
from experiment.losses import LOSSES
from experiment.muon import make_optimizer
from experiment.recipe import Recipe, changed
from experiment.reports import draw_history, epoch_line, result_line, results_box
from experiment.run_files import RunFiles
from images.degradations import CameraNoise, GaussianNoise
from images.image_sources import load_images
from images.noisy_images import NoisyImageDataset
from images.training_batches import with_progress
from small_vit import MODELS, SmallViT, build_model, count_parameters, load_model, load_weights

# What the original kept in this script stays importable from it.
__all__ = ["NoisyImageDataset", "SmallViT", "evaluate", "load_model", "train", "training_step"]

CLIP_NORM = 1.0
WARM_UP = 0.1  # part of all steps
CAPACITIES = (1.0, 0.5, 0.25, 0.125)  # of a model with a capacity; steps take them in turn

# The recipes ---------------------------------------------------------------------------------

RECIPES = {
    "published": Recipe(),
    "refined": Recipe(
        model="refined", optimizer="muon", lr=4e-3, weight_decay=0.04, loss="psnr", flip=True
    ),
}
# The published quality in about a minute on 2 CPU cores.
RECIPES["quick"] = replace(
    RECIPES["refined"], model="quick", steps=1050, schedule="step", batch_size=16, lr=6e-3
)
# Noise that differs over the image; any share of the tokens attends, where the router sends them.
RECIPES["routed"] = replace(
    RECIPES["quick"],
    model="routed",
    steps=20_000,
    degradation=GaussianNoise((0.05, 0.4), noise_map="regions"),
    balance_weight=2e-4,
)
# Blind to the noise's level, for whole photographs and the field's benchmarks.
RECIPES["photographs"] = replace(
    RECIPES["refined"],
    model="photographs",
    epochs=24,
    batch_size=16,
    crop=96,
    transpose=True,
    degradation=GaussianNoise((0.01, 0.3), unclipped=True),
)
# For the files of cameras, and whatever else people have.
RECIPES["photo"] = replace(
    RECIPES["photographs"],
    model="photo",
    loss="even-psnr",
    crop=64,
    resize=(1.0, 3.0),
    gray_share=0.1,
    degradation=CameraNoise((2 / 255, 12 / 255), camera_share=0.55),
)


# A step --------------------------------------------------------------------------------------


def training_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    noisy: Tensor,
    clean: Tensor,
    recipe: Recipe,
    capacity: float | None = None,
) -> Tensor:
    """One step on a batch: loss + balance_weight · Σ over blocks of the load-balancing loss.

    noisy [B, in_channels, h, w] and clean [B, 3, h, w] on the device of the model, which is in
    training mode and has this capacity -> float32 [2]: mean squared error and sum of the
    load-balancing losses. Of the recipe its loss, balance_weight and dtype count; in bfloat16,
    weights, tokens and losses stay in float32.
    """
    with cli.autocast(noisy.device, recipe.dtype):
        restored, routings = model(noisy)  # [B, 3, h, w], blocks times [B, N, E]
    objective, mse = (f(restored.float(), clean) for f in (LOSSES[recipe.loss], F.mse_loss))
    balances = [load_balancing_loss(routing.float(), capacity) for routing in routings]
    balance = sum(balances, mse.new_zeros(()))
    optimizer.zero_grad()
    (objective + recipe.balance_weight * balance).backward()
    nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
    optimizer.step()
    return torch.stack([mse, balance]).detach()


def make_step(
    model: nn.Module, fast: nn.Module, optimizer: torch.optim.Optimizer, recipe: Recipe
) -> Callable[[int, Tensor, Tensor], Tensor]:
    """The step of a training: function(number of the step, noisy, clean) -> as training_step.

    A model with a capacity takes those of CAPACITIES in turn, and keeps the last. `fast`, the same
    model compiled or for several processes, takes all but an epoch's smaller last batch.
    """
    capacities = CAPACITIES if getattr(model, "capacity", None) else (None,)
    takes = [partial(training_step, recipe=recipe, capacity=share) for share in capacities]
    fast_takes = [replayed(partial(take, fast, optimizer), optimizer) for take in takes]
    full_size = recipe.batch_size // world_size()

    def step(number: int, noisy: Tensor, clean: Tensor) -> Tensor:
        turn = number % len(capacities)
        if capacities[turn]:
            model.capacity = capacities[turn]
        if len(clean) == full_size:
            return fast_takes[turn](noisy, clean)
        return takes[turn](model, optimizer, noisy, clean)

    return step


# The loop ------------------------------------------------------------------------------------


def train(
    model: nn.Module,
    train_set: NoisyImageDataset,
    val_set: NoisyImageDataset,
    recipe: Recipe,
    files: RunFiles | None = None,
    about: dict | None = None,
    state: dict | None = None,
    fast: nn.Module | None = None,
) -> dict:
    """Trains until recipe.epochs are done; the best epoch is that of the lowest validation MSE.

    Args:
        model: denoiser on the device of train_set.
        files: to write after every epoch; None writes nothing.
        about: what the checkpoint says besides weights, epoch and validation MSE.
        state: what an earlier run returned, or left in files.resume, to go on from.
        fast: what torch.compile made of the model, for batches of the full size.

    Returns what a run can go on from: "history", a row per epoch, "best", the checkpoint of the
    best, "model" and "optimizer". Raises Diverged where the loss is not finite any more, and
    a UserError for the state of another optimizer.
    """
    # Optimizer, and what an earlier run left
    optimizer = make_optimizer(model, recipe.optimizer, recipe.lr, recipe.weight_decay)
    history, best, about = [], None, about or {}
    if state:
        history, best = state["history"], state["best"]
        model.load_state_dict(state["model"])
        restore_optimizer(optimizer, state["optimizer"], files.resume if files else "the state")
        if files:
            save_run(state, files)  # a run may have been killed between two of its files

    # The step, in parallel and replayed where it can be
    fast = model if fast is None else fast
    fast = DistributedDataParallel(fast) if world_size() > 1 else fast
    step = make_step(model, fast, optimizer, recipe)
    capacity, device = getattr(model, "capacity", None), train_set.device
    steps_per_epoch = train_set.steps_per_epoch(recipe.batch_size)

    validation = validation_batches(val_set, device)
    for epoch in range(len(history) + 1, recipe.epochs + 1):
        # One pass over the images; losses are summed where they arise
        model.train()
        started, sums, images = time.perf_counter(), torch.zeros(2, device=device), 0
        first = (epoch - 1) * steps_per_epoch
        count = min(steps_per_epoch, (recipe.steps or math.inf) - first)
        batches = recipe.batches(train_set, epoch)
        title = f"epoch {epoch}/{recipe.epochs}"
        for number, batch in with_progress(batches, sums, title, first, count, rank() > 0):
            noisy, clean, _ = batch
            lr = set_learning_rate(optimizer, recipe, number, steps_per_epoch)
            sums += len(clean) * step(number, noisy, clean)
            images += len(clean) * world_size()
        train_mse, balance = (sum_over_processes(sums) / images).tolist()
        seconds = time.perf_counter() - started + (history[-1]["seconds"] if history else 0)

        # Validation; the best epoch is kept
        if capacity:
            model.capacity = capacity
        val_mse = validation_mse(model, validation)
        row = {"epoch": epoch, "train_mse": train_mse, "val_mse": val_mse, "balance_loss": balance}
        check_finite(row, best, files)
        history.append(row | {"lr": lr, "seconds": seconds})
        if val_mse == min(row["val_mse"] for row in history):
            weights = {name: tensor.cpu().clone() for name, tensor in model.state_dict().items()}
            best = {"model": weights, **about, "epoch": epoch, "val_mse": val_mse}

        # What a reader and --resume find
        state = {"recipe": about.get("recipe"), "history": history, "best": best}
        state |= {"model": model.state_dict(), "optimizer": optimizer.state_dict()["state"]}
        if files:
            save_run(state, files, fresh=epoch == 1)
        print(epoch_line(history[-1]), flush=True)
    return state


def set_learning_rate(
    optimizer: torch.optim.Optimizer, recipe: Recipe, step: int, steps_per_epoch: int
) -> float:
    """Sets and returns that of a step, counted from 0: see Recipe.schedule."""
    if recipe.schedule == "epoch":
        lr = recipe.lr * (1 + math.cos(math.pi * (step // steps_per_epoch) / recipe.epochs)) / 2
    else:
        total = recipe.steps or recipe.epochs * steps_per_epoch
        up, down = (step + 1) / (WARM_UP * total), (total - step) / ((1 - WARM_UP) * total)
        lr = recipe.lr * min(1, up, down)
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr


# The experiment ------------------------------------------------------------------------------


def parse_args():
    parser = cli.make_parser(
        "Trains SmallViT to remove noise or to restore images, keeps its best epoch by validation "
        "loss and tests it. Writes FILE after every epoch, and beside it FILE's name with "
        "_history.csv, _curve.png and, until the run is complete, _resume.pt.",
        "python denoising_experiment_proper.py --dataset photos --recipe refined --epochs 6",
        RECIPES,
    )
    cli.add_data(parser)
    cli.add_recipe(parser, RECIPES, model=MODELS, loss=LOSSES)
    cli.add_computation(parser, compile=True)
    what = f"checkpoint to write (default: {cli.PUBLISHED_CHECKPOINT} for the published recipe on "
    what += "CIFAR-10, else a name of recipe, task and data: quick_photos.pt)"
    group = cli.add_output(parser, None, what)
    group.add_argument(
        "--resume",
        action="store_true",
        help="go on after the last complete epoch of the run with the same --output (default: no)",
    )
    return parser.parse_args()


def output_name(args: argparse.Namespace) -> str:
    """The default of --output: the original's for its recipe on CIFAR-10, else one that tells."""
    if (args.recipe, args.dataset, args.task) == ("published", "cifar10", None):
        return cli.PUBLISHED_CHECKPOINT
    data = os.path.basename(os.path.realpath(args.dataset))
    return "_".join([args.recipe, *([args.task] if args.task else []), data]) + ".pt"


def main():
    args = parse_args()
    files = RunFiles(Path(args.output or output_name(args)))
    if files.checkpoint.suffix != ".pt":
        raise UserError(f"--output {files.checkpoint}: name a .pt file")
    if args.resume and not files.resume.is_file():
        none = f"--resume: there is no interrupted run at {files.resume}"
        raise UserError(f"{none}; start one without --resume")
    with (
        joined(cli.select_device(args.device, args.threads)) as device,
        locked(files.all) if rank() == 0 else nullcontext(),
    ):
        files.saved = args.resume and os.path.exists(files.resume)
        try:
            return run_experiment(args, changed(RECIPES[args.recipe], vars(args)), files, device)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(files.how_to_go_on()) from None


def run_experiment(args, recipe, files, device):
    """Trains and tests as the command line asks; returns the exit code."""
    # Model
    torch.manual_seed(recipe.seed)
    config = replace(MODELS[recipe.model], in_channels=recipe.degradation.channels)
    model = SmallViT(config)
    if recipe.init is not None and not args.resume:
        load_weights(model, recipe.init)
    model = model.to(device)

    # Images: three splits, each with noise of its own
    wait_if(rank() > 0)  # the first process downloads
    source = load_images(args.dataset, args.data_dir, recipe.seed, recipe.crop)
    wait_if(rank() == 0)
    recipe = recipe.for_images(source, vars(args))
    train_set, val_set, test_set = recipe.splits(source)
    check_shares(recipe.batch_size, train_set.epoch_size)
    recipe = recipe.of_steps(train_set)

    print(
        f"{source.name}: {len(train_set):,} training, {len(val_set):,} validation, "
        f"{counted(len(test_set), 'test image')}; {count_parameters(model):,} parameters "
        f"on {device}"
        + (f", {world_size()} processes" if world_size() > 1 else "")
        + (f"; {source.nbytes() / 2**30:.1f} GiB of images in memory" if recipe.crop else "")
    )
    settings = recipe.as_dict()
    changes = cli.differences(settings, Recipe().as_dict())
    print(f"recipe {args.recipe}: {changes or 'as published'}")

    if device.type == "cpu" and (hint := cli.hint_of_load(args.threads)):
        print(hint, flush=True)

    # Training
    about = {
        "config": asdict(model.config),
        "recipe": {
            "dataset": source.name,
            **settings,
            "parameters": count_parameters(model),
            "train_images": len(train_set),
            "val_images": len(val_set),
            "images_sha256": source.sha256(),
        },
        "dataset": source.option,
        "torch_version": str(torch.__version__),
    }
    state = read_run(files, about["recipe"], model) if args.resume else None
    fast = compiled(model) if args.compile else None
    state = train(model, train_set.to(device), val_set, recipe, files, about, state, fast)
    if rank():
        return 0

    # Test of the best epoch
    checkpoint = state["best"]
    result = evaluate(build_model(checkpoint, files.checkpoint).to(device), test_set)
    checkpoint |= {"test": result.summary(), "train_seconds": state["history"][-1]["seconds"]}
    write_checkpoint(checkpoint, files.checkpoint)
    write_figure(draw_history(state["history"]), files.curve, dpi=150)
    files.resume.unlink(missing_ok=True)
    print(results_box(checkpoint, test_set.degradation, result, device))
    print(f"wrote {files.checkpoint}, {files.history} and {files.curve}")
    print(result_line(result.psnr, result.ssim, source.name))
    return 0


if __name__ == "__main__":
    run_main(main)
