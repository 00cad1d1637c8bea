"""Reading, checking and writing what training leaves behind: checkpoints, states to resume."""

import math
import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, fields
from errno import EINVAL
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.options import BadOption, Number
from common.safe_files import csv_text, replace_when_complete, write_text
from common.user_errors import Diverged, UserError, exhausted
from experiment.data_parallel import rank
from experiment.muon import state_shapes
from experiment.recipe import Recipe
from experiment.run_files import RunFiles
from images.degradations import KINDS

ADVICE = "use a file that this version of denoising_experiment_proper.py wrote, or copy it again"

# What a file has to hold ----------------------------------------------------------------------


def is_state_dict(value: Any) -> bool:
    """Whether it is a dict of finite float32 tensors, none larger than its memory."""
    return isinstance(value, dict) and all(
        isinstance(t, Tensor)
        and (t.dtype, t.layout, t.device.type) == (torch.float32, torch.strided, "cpu")
        and t.numel() * t.element_size() <= t.untyped_storage().nbytes()
        and bool(t.isfinite().all())
        for t in value.values()
    )


def is_utilisation(value: Any) -> bool:
    """Whether it is, for every block, the mean routing probability of each expert."""
    return isinstance(value, list) and all(
        isinstance(load, list) and all(map(POSITIVE.holds, load)) for load in value
    )


POSITIVE, COUNT = Number(float), Number(int, 1)
CHECKPOINT = {"model": is_state_dict, "config": dict, "recipe": dict, "epoch": COUNT}
CHECKPOINT |= {"val_mse": POSITIVE}
# In "recipe", which had it in every version; what later ones added means its default if missing.
RECIPE = {"dataset": str, "val_images": COUNT, "seed": Number(int), "epochs": COUNT}
TEST = dict.fromkeys(("mse", "psnr_std", "ssim_mean", "ssim_std"), POSITIVE)
TEST |= {"noisy_psnr_mean": float, "psnr_mean": float, "images": COUNT}
TEST |= {"utilisation": is_utilisation}
IF_THERE = {"test": dict, "dataset": str, "train_seconds": POSITIVE}
ROW = dict.fromkeys(("train_mse", "val_mse", "lr", "seconds"), POSITIVE)
ROW |= {"epoch": COUNT, "balance_loss": float}  # rounding takes that below 0
STATE = {"recipe": dict, "history": list, "model": is_state_dict, "optimizer": dict, "best": dict}


def require(values: Any, kinds: Mapping, path: str | Path, where: str = "") -> None:
    """Raises a UserError unless what was read from a file is a dict with the right entries.

    For each name, `kinds` has a type, a Number, or a function that tells whether a value is right.
    In the sentence, `where` precedes the names.
    """
    if not isinstance(values, dict):
        raise UserError(f"{path}: {where.rstrip('.') or 'its content'} {cannot_be(values)}")
    for name, kind in kinds.items():
        if name not in values:
            raise UserError(f"{path} does not hold {where}{name}; {ADVICE}")
        value = values[name]
        if isinstance(kind, type):
            good = isinstance(value, kind)
        else:
            good = kind.holds(value) if isinstance(kind, Number) else kind(value)
        if not good:
            raise UserError(f"{path}: {where}{name} {cannot_be(value)}")


def cannot_be(value: Any) -> str:
    shown = repr(value) if isinstance(value, int | float | str | list) else type(value).__name__
    return f"cannot be {shown:.60}; {ADVICE}"


def is_plain(value: Any) -> bool:
    """Whether it is numbers, texts, None, or lists and dicts of these, which can be compared."""
    if isinstance(value, dict):
        return all(isinstance(key, str) for key in value) and is_plain(list(value.values()))
    if isinstance(value, list | tuple):
        return all(map(is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


# Checkpoints ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trained:
    """What a checkpoint says of its model besides the weights."""

    path: str
    recipe: Recipe
    checkpoint: dict  # as read_checkpoint gives it, without "model"

    @property
    def knows_grey(self) -> bool:
        """Whether it was trained on grey images, whose noise is the same in all three colours."""
        return self.recipe.gray_share > 0

    @property
    def clipped(self) -> bool:
        """Whether all noise that it was trained on had been clamped to [0, 1], as in files."""
        return not getattr(self.recipe.degradation, "unclipped", False)

    def __str__(self):
        recipe, epoch = self.checkpoint["recipe"], self.checkpoint["epoch"]
        how = f"epoch {epoch} of {self.recipe.epochs}, trained on {recipe['dataset']}"
        return f"{how} with {self.recipe.degradation}"


def read_checkpoint(path: str | Path) -> dict:
    """Reads a trained model's file, without running code from it.

    Returns:
        dict with the model's state_dict ("model"), its "config", what decided its training
        ("recipe"), the best epoch ("epoch"), its validation MSE ("val_mse"), and, where there are
        such, the --dataset of the training, "test" metrics, "train_seconds", "torch_version".

    Raises:
        UserError: the file is missing, damaged, unsafe, or no such file.
    """
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such checkpoint; train one or name another")
    checkpoint = load(path)
    require(checkpoint, CHECKPOINT, path)
    require(checkpoint["recipe"], RECIPE, path, "recipe.")
    recipe_of_file(checkpoint["recipe"], path)
    require(checkpoint, {n: k for n, k in IF_THERE.items() if n in checkpoint}, path)
    if "test" in checkpoint:
        require(checkpoint["test"], TEST, path, "test.")
    return checkpoint


def recipe_of_file(recipe: dict, path: str | Path) -> Recipe:
    """The Recipe of these entries, or a UserError that names the file and the one out of range."""
    try:
        return Recipe.of(recipe)
    except BadOption as error:
        raise UserError(f"{path}: recipe.{error.name} {error.words}; {ADVICE}") from None


def load(path: str | Path) -> Any:
    """torch.load, after what torch leaves unchecked: checksums, and sizes beyond the file's.

    A dict is returned as `without_hooks` leaves it.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            stored = all(m.compress_type == zipfile.ZIP_STORED for m in archive.infolist())
            damaged = not stored or archive.testzip()
        if not damaged:
            content = torch.load(path, map_location="cpu", weights_only=True)
            return without_hooks(content) if isinstance(content, dict) else content
    except Exception as error:  # the unpickler has its own for every kind of damage
        if exhausted(error):
            raise
        if isinstance(error, OSError) and error.errno not in (None, EINVAL):  # of a wrong offset
            raise UserError(f"cannot read {path}: {error.strerror}") from None
    raise UserError(
        f"{path} is damaged, of another kind, or holds more than tensors and plain values, which "
        f"could run code; {ADVICE}"
    )


def without_hooks(checkpoint: dict) -> dict:
    """The checkpoint or state itself, in which all but weights and optimizer can be compared; an
    exception, of any kind, where there is more in it.
    """
    parts = ("model", "optimizer", "best")
    if not is_plain({name: value for name, value in checkpoint.items() if name not in parts}):
        raise ValueError("neither a weight nor a plain value")
    if "model" in checkpoint:  # without attributes and hooks, which torch would believe
        checkpoint["model"] = {n: t.detach() for n, t in dict(checkpoint["model"]).items()}
    if "best" in checkpoint:
        without_hooks(checkpoint["best"])
    return checkpoint


def write_checkpoint(checkpoint: dict, path: str | Path) -> None:
    """torch.save, or a UserError; `path` is never half written."""
    with replace_when_complete(path) as temporary:
        try:
            torch.save(checkpoint, temporary)
        except RuntimeError:  # what torch makes of a disk without space
            raise UserError(f"cannot write {path}: the disk is full; make room on it") from None


# Runs that go on ------------------------------------------------------------------------------


def complete(recipe: Mapping[str, Any]) -> dict:
    """A recipe and its images as this version writes them; others had fewer or more entries."""
    own = {f.name for kind in (Recipe, *KINDS) for f in fields(kind)}
    images = {name: value for name, value in recipe.items() if name not in own}
    return images | Recipe.of(recipe).as_dict()


def check_same_recipe(earlier: Mapping, recipe: Mapping, whose: str, advice: str) -> None:
    """Raises a UserError that names the first entry of `recipe` that differs in the earlier one."""
    before = complete(earlier)
    for name, value in recipe.items():
        if before.get(name) != value:
            shown = f"{name} {before.get(name)!s:.80}, this one has {value!s:.80}"
            raise UserError(f"{whose} {shown}; {advice}")


def check_finite(row: dict, best: dict | None, files: RunFiles | None) -> None:
    """Raises a Diverged that names the last good checkpoint where a figure is not finite."""
    if not all(map(math.isfinite, row.values())):
        kept = f"{files.checkpoint} keeps epoch {best['epoch']}" if files and best else ""
        raise Diverged(
            f"the loss is not finite in epoch {row['epoch']} (training {row['train_mse']:g}, "
            f"validation {row['val_mse']:g}); {kept or 'no epoch is kept'}; try a smaller --lr"
        )


def save_run(state: dict, files: RunFiles, fresh: bool = False) -> None:
    """Writes what --resume needs, a dict as STATE, the best checkpoint and the history of a run."""
    if rank() == 0:
        if fresh:  # what another run left under these names
            files.keep_existing()
        write_checkpoint(state, files.resume)
        write_checkpoint(state["best"], files.checkpoint)
        write_text(csv_text(state["history"]), files.history)
        files.saved = True


def read_run(files: RunFiles, recipe: dict, model: nn.Module) -> dict:
    """The state from which a run of this recipe and model goes on, or a UserError that says why."""
    path = files.resume
    state = load(path)
    require(state, STATE, path)
    best, history = state["best"], state["history"]
    require(best, CHECKPOINT, path, "best.")
    for where, holder in (("recipe.", state), ("best.recipe.", best)):
        require(holder["recipe"], RECIPE, path, where)
        recipe_of_file(holder["recipe"], path)
    advice = "repeat its options, or start a new run without --resume"
    check_same_recipe(state["recipe"], recipe, "--resume: the interrupted run had", advice)
    check_history(history, path)
    least = min((row["val_mse"] for row in history), default=None)
    found = [row["epoch"] for row in history if row["val_mse"] == least]
    if best["epoch"] not in found or complete(best["recipe"]) != complete(state["recipe"]):
        raise UserError(f"{path} holds the best model of another run; {ADVICE}")
    for part in (state, best):
        check_shapes(part["model"], model.state_dict(), path)
    if not left_by_run(files, state):
        files.keep_existing(but=[path])
    return state


def check_history(history: list, path: str | Path) -> None:
    """Raises a UserError unless it has a row for each epoch from 1 on."""
    for epoch, row in enumerate(history, 1):
        where = f"history, epoch {epoch}"
        require(row, ROW, path, f"{where}.")
        if row["epoch"] != epoch or row.keys() != ROW.keys():
            raise UserError(f"{path}: {where} has other columns or another number; {ADVICE}")


def left_by_run(files: RunFiles, state: dict) -> bool:
    """Whether checkpoint and history, where they are there, can be of the run of a state."""
    try:
        checkpoint = os.path.exists(files.checkpoint) and read_checkpoint(files.checkpoint)
        history = os.path.exists(files.history) and files.history.read_text(encoding="utf-8")
    except (UserError, OSError, ValueError):
        return False
    same_run = not checkpoint or complete(checkpoint["recipe"]) == complete(state["recipe"])
    return same_run and csv_text(state["history"]).startswith(history or "")


def check_shapes(tensors: dict, expected: dict, path: str | Path) -> None:
    """Raises a UserError unless names and shapes are as expected, a dict of tensors or shapes."""
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    if shapes != {name: getattr(t, "shape", t) for name, t in expected.items()}:
        raise UserError(f"{path} holds weights of another model; {ADVICE}")


def restore_optimizer(optimizer: torch.optim.Optimizer, moments: dict, path: str | Path) -> None:
    """Loads the moments of a run, {index of a parameter: {name: tensor}}, into its optimizer; a
    UserError if they do not fit, beyond which a fused step would read and write.
    """
    shapes = state_shapes(optimizer)
    if moments.keys() != shapes.keys() or not all(map(is_state_dict, moments.values())):
        raise UserError(f"{path} holds the state of another optimizer; {ADVICE}")
    # With memory of their own, in the usual order, as a fused step takes it to be.
    state, usual = {}, torch.contiguous_format
    for index, of_one in moments.items():
        check_shapes(of_one, shapes[index], path)
        state[index] = {n: t.detach().clone(memory_format=usual) for n, t in of_one.items()}
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
