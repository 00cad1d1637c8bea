"""Trains the denoiser, keeps its best epoch, tests it and prints the results.

    python denoising_experiment_proper.py                                         # CIFAR-10
    python denoising_experiment_proper.py --dataset photos --recipe refined --epochs 6

Read it from top to bottom: the recipe, a training step, the loop, the experiment in four stages.
"""

import math
import os
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from adaptive_attention_moe import load_balancing_loss
from common.safe_files import locked, write_figure
from common.user_errors import UserError, run_main
from experiment.checkpoints import (
    check_finite,
    listed,
    read_run,
    restore_optimizer,
    save_run,
    write_checkpoint,
)
from experiment.command_line import (
    PUBLISHED_CHECKPOINT,
    add_output,
    autocast,
    make_parser,
    select_device,
)
from experiment.cuda_graphs import ReplayedModel, compiled, replayed
from experiment.data_parallel import (
    check_shares,
    joined,
    my_batches,
    rank,
    sum_over_processes,
    wait_if,
    world_size,
)
from experiment.evaluation import (
    draw_history,
    epoch_line,
    evaluate,
    result_line,
    results_box,
    validation_batches,
    validation_mse,
)
from experiment.losses import LOSSES
from experiment.muon import make_optimizer
from experiment.run_files import RunFiles
from images.degradations import OPTIONS_OF, check_options, degradation_in
from images.image_sources import SIZE, load_images
from images.noisy_images import NoisyImageDataset, noisy_splits
from small_vit import MODELS, SmallViT, build_model, count_parameters, load_model, load_weights

# What the original kept in this script stays importable from it.
__all__ = ["NoisyImageDataset", "SmallViT", "evaluate", "load_model", "train", "training_step"]

CLIP_NORM = 1.0
WARM_UP = 0.1  # part of all steps
CAPACITIES = (1.0, 0.5, 0.25, 0.125)  # of a model with a capacity; steps take them in turn

# The recipe ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """What decides the result of a training besides the images; the defaults are as published."""

    task: str = "denoise"  # or "super-resolution", "inpaint", "jpeg", see degradations.py
    scale: int = 2  # of super-resolution
    holes: tuple = (0.1, 0.4)  # (low, high) of the share of pixels that inpainting restores
    quality: tuple = (10, 40)  # (least, most) of the JPEG files whose artefacts are removed
    model: str = "published"  # of MODELS
    init: str | None = None  # checkpoint whose weights training starts from; None: random ones
    batch_size: int = 64  # images per step, of all processes together
    steps: int | None = None  # of the training; the epochs are then as many as they take
    epochs: int = 30
    # Of the learning rate: "epoch", a cosine to 0 that falls once per epoch, as published, or
    # "step", WARM_UP of all steps upwards and then straight down to 0, a little in every step.
    schedule: str = "epoch"
    optimizer: str = "adamw"  # or "muon"
    lr: float = 1e-3  # at the start
    weight_decay: float = 1e-4  # decoupled; of all parameters by adamw, of matrices alone by muon
    loss: str = "mse"  # of losses.LOSSES
    crop: int | None = None  # side of the random crops of each step, pixels; None: whole images
    flip: bool = False  # mirror each training image left to right with probability 1/2
    transpose: bool = False  # upside down and axes swapped, each with probability 1/2
    balance_weight: float = 0.01  # of the load-balancing loss of each block
    noise_level: tuple = (0.2, 0.2)  # (low, high) of σ; equal for one σ
    noise_map: str = "uniform"  # or how σ differs over an image, see degradations.sigma_map
    unclipped: bool = False  # noisy images are left outside [0, 1], as the field's benchmarks do
    jpeg_share: float = 0.0  # part of the noisy images that have been JPEG files
    # Part of the training samples that are drawn from losslessly stored images, which alone then
    # serve for validation; None treats all images alike.
    lossless_share: float | None = None
    seed: int = 42  # of initialisation, split, data order and training noise
    dtype: str = "float32"  # of matrix products, or "bfloat16"

    def of_steps(self, train_set):
        """The same with the epochs that its steps take, if it has any."""
        epochs = self.steps and math.ceil(self.steps / train_set.steps_per_epoch(self.batch_size))
        return replace(self, epochs=epochs or self.epochs)

    def splits(self, source):
        """(train, val, test) NoisyImageDatasets of an image source."""
        side, degradation = self.crop or SIZE, degradation_in(asdict(self))
        if side % degradation.multiple:
            raise UserError(
                f"--scale {self.scale} does not divide the {side} pixels of a training image; "
                "give a --crop that it divides"
            )
        return noisy_splits(source, degradation, self.lossless_share)

    def as_dict(self):
        """Plain values that torch.save and JSON give back as they were."""
        return listed(asdict(self))


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
    noise_level=(0.05, 0.4),
    noise_map="regions",
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
    noise_level=(0.01, 0.3),
    unclipped=True,
)


def recipe_of(args):
    """The Recipe that a command line asks for, or a UserError."""
    given = {field.name: getattr(args, field.name, None) for field in fields(Recipe)}
    changes = {name: value for name, value in given.items() if value is not None}
    if "epochs" in changes:
        if "steps" in changes:
            raise UserError("--epochs and --steps both say how long to train; name one of them")
        changes["steps"] = None
    elif "steps" in changes:  # may be less than an epoch, in which nothing would fall
        changes["schedule"] = "step"
    recipe = replace(RECIPES[args.recipe], **changes)
    check_options(recipe.task, changes)
    if recipe.task != "denoise":  # nor do other tasks have the noise of the recipe
        plain = {name: getattr(Recipe, name) for name in OPTIONS_OF["denoise"]}
        recipe = replace(recipe, **plain)
    return recipe


# A step --------------------------------------------------------------------------------------


def training_step(model, optimizer, noisy, clean, recipe, capacity=None):
    """One step on a batch: loss + balance_weight · Σ over blocks of the load-balancing loss.

    Args:
        model: denoiser in training mode.
        optimizer: of its parameters.
        noisy, clean: [B, in_channels, h, w] and [B, 3, h, w] on the model's device.
        recipe: its loss, balance_weight and dtype count. bfloat16 runs matrix products under
            autocast; weights, tokens and losses stay in float32.
        capacity: that which the model has, None if it has none.

    Returns:
        float32 [2] on the model's device: mean squared error and sum of the load-balancing losses.
    """
    with autocast(noisy.device, recipe.dtype):
        restored, routings = model(noisy)  # [B, 3, h, w], blocks times [B, N, E]
    objective, mse = (f(restored.float(), clean) for f in (LOSSES[recipe.loss], F.mse_loss))
    balances = [load_balancing_loss(routing.float(), capacity) for routing in routings]
    balance = sum(balances, mse.new_zeros(()))
    optimizer.zero_grad()
    (objective + recipe.balance_weight * balance).backward()
    nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
    optimizer.step()
    return torch.stack([mse, balance]).detach()


# The loop ------------------------------------------------------------------------------------


def train(model, train_set, val_set, recipe, files=None, about=None, state=None, fast=None):
    """Trains until recipe.epochs are done; the best epoch is that of the lowest validation MSE.

    Args:
        model: denoiser on the device of train_set.
        train_set, val_set: NoisyImageDataset.
        recipe: Recipe, with the epochs that its steps take.
        files: RunFiles to write after every epoch; None writes nothing.
        about: dict of what the checkpoint says besides weights, epoch and validation MSE.
        state: what an earlier run returned, or left in files.resume, to go on from.
        fast: what torch.compile made of the model, for batches of the full size.

    Returns:
        dict: "history", a row per epoch; "best", the checkpoint of the best one; and "model",
        "optimizer" and `about`'s "recipe", from which a run can go on.

    Raises:
        Diverged: the loss is not finite any more.
        UserError: the state is of another optimizer.
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

    # The step, parallel and replayed where it can be; a smaller last batch is left as it is
    whole, device = recipe.batch_size // world_size(), train_set.device
    fast = model if fast is None else fast
    fast = DistributedDataParallel(fast) if world_size() > 1 else fast
    capacity = getattr(model, "capacity", None)
    steps, odd_steps = {}, {}
    for share in CAPACITIES if capacity else [None]:
        step = partial(training_step, recipe=recipe, capacity=share)
        steps[share] = replayed(partial(step, fast, optimizer), optimizer)
        odd_steps[share] = partial(step, model, optimizer)

    validation, passes = validation_batches(val_set, device), ReplayedModel(model)
    for epoch in range(len(history) + 1, recipe.epochs + 1):
        # One pass over the images; losses are summed where they arise
        model.train()
        started, sums, images = time.perf_counter(), torch.zeros(2, device=device), 0
        for number, (noisy, clean, _) in my_batches(train_set, recipe, epoch, sums):
            lr = set_learning_rate(optimizer, recipe, number, train_set)
            model.capacity = list(steps)[number % len(steps)]
            take = (steps if len(clean) == whole else odd_steps)[model.capacity]
            sums += len(clean) * take(noisy, clean)
            images += len(clean) * world_size()
        train_mse, balance = (sum_over_processes(sums) / images).tolist()
        seconds = time.perf_counter() - started + (history[-1]["seconds"] if history else 0)

        # Validation; the best epoch is kept
        model.capacity = capacity
        val_mse = validation_mse(passes, validation)
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


def set_learning_rate(optimizer, recipe, step, train_set):
    """Sets and returns that of a step, counted from 0: see Recipe.schedule."""
    per_epoch = train_set.steps_per_epoch(recipe.batch_size)
    if recipe.schedule == "epoch":
        lr = recipe.lr * (1 + math.cos(math.pi * (step // per_epoch) / recipe.epochs)) / 2
    else:
        total = recipe.steps or recipe.epochs * per_epoch
        up, down = (step + 1) / (WARM_UP * total), (total - step) / ((1 - WARM_UP) * total)
        lr = recipe.lr * min(1, up, down)
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr


# The experiment ------------------------------------------------------------------------------


def parse_args():
    parser = make_parser(
        "Trains SmallViT to remove noise or to restore images, keeps its best epoch by validation "
        "loss and tests it. Writes FILE after every epoch, and beside it FILE's name with "
        "_history.csv, _curve.png and, until the run is complete, _resume.pt.",
        "python denoising_experiment_proper.py --dataset photos --recipe refined --epochs 6",
        *("dataset", "data-dir", "noise-level", "noise-map", "seed"),
        *("init", "task", "scale", "holes", "quality", "device", "threads", "dtype", "compile"),
        recipe=RECIPES,
        model=MODELS,
    )
    group = add_output(parser, PUBLISHED_CHECKPOINT, "checkpoint to write")
    group.add_argument(
        "--resume",
        action="store_true",
        help="go on after the last complete epoch of the run with the same --output (default: no)",
    )
    return parser.parse_args()


def main():
    args = parse_args()
    files = RunFiles(Path(args.output))
    with (
        joined(select_device(args.device, args.threads)) as device,
        locked(files.all) if rank() == 0 else nullcontext(),
    ):
        files.saved = args.resume and os.path.exists(files.resume)
        try:
            return run_experiment(args, recipe_of(args), files, device)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(files.how_to_go_on()) from None


def run_experiment(args, recipe, files, device):
    """Trains and tests as the command line asks; returns the exit code."""
    # Model
    torch.manual_seed(recipe.seed)
    in_channels = degradation_in(asdict(recipe)).channels
    model = SmallViT(replace(MODELS[recipe.model], in_channels=in_channels))
    if recipe.init is not None and not args.resume:
        load_weights(model, recipe.init)
    model = model.to(device)

    # Images: three splits, each with noise of its own
    wait_if(rank() > 0)  # the first process downloads
    source = load_images(args.dataset, args.data_dir, recipe.seed, recipe.crop)
    wait_if(rank() == 0)
    train_set, val_set, test_set = recipe.splits(source)
    check_shares(recipe.batch_size, train_set.epoch_size)
    recipe = recipe.of_steps(train_set)

    print(
        f"{source.name}: {len(train_set):,} training, {len(val_set):,} validation, "
        f"{len(test_set):,} test images; {count_parameters(model):,} parameters on {device}"
        + (f", {world_size()} processes" if world_size() > 1 else "")
    )
    settings = recipe.as_dict()
    print(f"recipe {args.recipe}: {', '.join(f'{name} {v}' for name, v in settings.items())}")

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
    print(results_box(checkpoint, result, device))
    print(f"wrote {files.checkpoint}, {files.history} and {files.curve}")
    print(result_line(result.psnr, result.ssim, source.name))
    return 0


if __name__ == "__main__":
    run_main(main)
