"""What decides the result of a training besides the images.

The values of the recipes stand in denoising_experiment_proper.py; `--help` shows them.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from torch import Tensor

from common.options import Number, as_option, check_fields, given_fields, option, told_as_options
from common.user_errors import UserError
from experiment.data_parallel import rank, world_size
from images.degradations import (
    KINDS,
    NOISES,
    Degradation,
    GaussianNoise,
    PairedNoise,
    degradation_of,
    kind_of,
)
from images.image_sources import SIZE, ImageSource
from images.noisy_images import NoisyImageDataset, noisy_splits
from images.training_batches import training_batches


@dataclass(frozen=True)
class Recipe:
    """A training; the defaults are the published one. Values out of their range: BadOption."""

    degradation: Degradation = GaussianNoise()  # noqa: RUF009, it is frozen
    model: str = option("published", "architecture")
    init: str | None = option(
        None,
        "checkpoint of the same architecture whose weights training starts from; without it they "
        "are random",
        metavar="FILE",
    )
    epochs: int = option(30, "passes over the training images", type=Number(int, 1))
    steps: int | None = option(
        None,
        "steps to train for, in place of --epochs; the learning rate then warms up and falls "
        "straight to 0, a little in every step",
        type=Number(int, 1),
    )
    # Of the learning rate: "epoch", a cosine to 0 that falls once per epoch, as published, or
    # "step", WARM_UP of all steps upwards and then straight down to 0, a little in every step.
    schedule: str = field(default="epoch", metadata={"choices": ("epoch", "step")})
    batch_size: int = option(64, "images per step, of all processes together", type=Number(int, 1))
    optimizer: str = option(
        "adamw", "muon orthogonalises the momentum of matrices", choices=["adamw", "muon"]
    )
    lr: float = option(1e-3, "initial learning rate", type=Number(float, above=True))
    weight_decay: float = option(
        1e-4, "decoupled, of all parameters; by muon, of matrices alone", type=Number(float)
    )
    loss: str = option(
        "mse",
        "mean squared error; minus the mean PSNR; the same where some images are nearly clean; a "
        "smooth absolute error; or 1 - SSIM",
    )
    # Of the load-balancing loss of each block.
    balance_weight: float = field(default=0.01, metadata={"type": Number(float)})
    crop: int | None = option(
        None,
        "train on random square crops of this side, out of images that stay whole; an epoch is 64 "
        "crops of each; without it, on thumbnails of 32×32",
        type=Number(int, 1, most=4096),
        metavar="PIXELS",
    )
    resize: tuple | None = option(
        None,
        "with --crop: take three of four crops larger or smaller and scale them, by a factor that "
        "is log-uniform between the two: developed photographs are softer than reduced ones",
        type=Number(float, least=0.25, most=4),
        nargs=2,
        metavar=("LOW", "HIGH"),
    )
    gray_share: float = option(
        0.0,
        "part of the training images, by chance, that are made grey",
        type=Number(float, most=1),
        metavar="SHARE",
    )
    flip: bool = option(False, "mirror each training image left to right with probability 1/2")
    transpose: bool = option(
        False,
        "turn it upside down and swap its axes, each with probability 1/2: with --flip, all eight "
        "symmetries of a square",
    )
    lossless_share: float | None = option(
        None,
        "for a folder that mixes lossless and lossy (JPEG, WebP) files: part of the training "
        "samples to draw from the lossless ones, which alone then serve for validation; without "
        "it, all files alike",
        type=Number(float, most=1),
        metavar="SHARE",
    )
    seed: int = option(
        42,
        "seed of initialisation, train/validation split, data order and training noise",
        type=Number(int),
    )
    dtype: str = option(
        "float32",
        "of matrix products; bfloat16 runs them under autocast, weights stay float32",
        choices=["float32", "bfloat16"],
    )

    def __post_init__(self):
        check_fields(self)

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> "Recipe":
        """The recipe that `as_dict` wrote, also that of an earlier version, with fewer entries."""
        return cls(**given_fields(cls, settings) | {"degradation": degradation_of(settings)})

    def as_dict(self) -> dict:
        """Plain values that torch.save and JSON give back as they were."""
        values = self.degradation.as_dict() | vars(self)
        del values["degradation"]
        return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}

    def of_steps(self, train_set: NoisyImageDataset) -> "Recipe":
        """The same with the epochs that its steps take, if it has any."""
        epochs = self.steps and math.ceil(self.steps / train_set.steps_per_epoch(self.batch_size))
        return replace(self, epochs=epochs or self.epochs)

    def for_images(self, source: ImageSource, given: Mapping[str, Any] | None = None) -> "Recipe":
        """The same for pairs to train on, if the source has them: their noise is there already.

        A UserError if it is for another task than noise, or an option that is given, not None, says
        how to draw noise.
        """
        if source.test.paired and (task := self.degradation.task) != GaussianNoise.task:
            advice = "name other images with --dataset, or drop --task"
            raise UserError(f"{source.name} holds pairs of noise, not for {task}; {advice}")
        if not (source.train or source.test).paired:
            return self
        of_noise = [declared.name for kind in NOISES.values() for declared in fields(kind)]
        for name in (*of_noise, "noise", "resize", "gray_share"):
            if given and given.get(name) is not None:
                raise UserError(f"{as_option(name)}: {source.name} has noise of its own; drop it")
        return replace(self, degradation=PairedNoise(), resize=None, gray_share=0.0)

    def batches(self, train_set: NoisyImageDataset, epoch: int) -> Iterator[tuple[Tensor, ...]]:
        """The (noisy, clean, labels) batches of an epoch, or of them this process's share."""
        names = ("lossless_share", "flip", "transpose", "crop", "resize", "gray_share")
        how = {name: getattr(self, name) for name in names} | {"share": (rank(), world_size())}
        return training_batches(train_set, self.batch_size, self.seed, epoch, **how)

    def splits(self, source: ImageSource) -> tuple[NoisyImageDataset | None, ...]:
        """(train, val, test) data sets of an image source; a UserError if they cannot be made."""
        side, scale = self.crop or SIZE, self.degradation.multiple
        if side % scale:
            wrong = f"--scale {scale} does not divide the {side} pixels of a training image"
            raise UserError(f"{wrong}; give a --crop that it divides")
        return noisy_splits(source, self.degradation, self.lossless_share)


def changed(recipe: Recipe, given: Mapping[str, Any]) -> Recipe:
    """A recipe with the options that are given, not None; a UserError if one is wrong here."""
    given = {name: value for name, value in given.items() if value is not None}
    changes = given_fields(Recipe, given)
    if "epochs" in changes:
        if "steps" in changes:
            raise UserError("--epochs and --steps both say how long to train; name one of them")
        changes["steps"] = None
    elif "steps" in changes:  # may be less than an epoch, in which nothing would fall
        changes["schedule"] = "step"
    # Another task does not have the noise of the recipe, either, nor has another noise.
    own = recipe.degradation.as_dict()
    if given.get("task", own["task"]) != own["task"]:
        own = {}
    elif given.get("noise", own.get("noise")) != own.get("noise"):
        own = {"task": own["task"]}
    with told_as_options():
        chosen = kind_of(own | given)
        if "noise" in given and not chosen.noise:
            raise UserError(f"--noise is not of --task {chosen.task}; drop it")
        for kind in KINDS:
            same = kind.task == chosen.task
            of = f"--noise {kind.noise}" if same else f"--task {kind.task}"
            for declared in fields(kind):
                if declared.name in given and not hasattr(chosen, declared.name):
                    raise UserError(f"{as_option(declared.name)} is of {of}; drop it")
        return replace(recipe, degradation=degradation_of(own | given), **changes)
