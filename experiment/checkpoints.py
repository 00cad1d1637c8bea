"""Reading, checking and writing what training leaves behind: checkpoints, states to resume."""

import math
import os
import zipfile

import torch

from common.safe_files import csv_text, replace_when_complete, write_text
from common.user_errors import Diverged, UserError
from experiment.data_parallel import rank
from experiment.muon import state_shapes
from images.degradations import DEFAULTS, DRAWS, KINDS

# Checks of single values ----------------------------------------------------------------------


def whole(least):
    """A check: an int of at least `least`, below 2³¹."""
    return lambda value: type(value) is int and least <= value < 2**31


def real(value):
    """A check: a finite number, not negative."""
    return type(value) in (int, float) and 0 <= value < 1e300


def share(value):
    """A check: a number in 0 … 1."""
    return real(value) and value <= 1


def taken_by(task, one):
    """A check: a number or several, each of a check, that the task's degradation takes."""

    def taken(value):
        if not all(map(one, value if isinstance(value, list | tuple) else [value])):
            return False
        try:
            KINDS[task](value)
        except (TypeError, ValueError):
            return False
        return True

    return taken


def weights(value):
    """A check: a state_dict of finite float32 tensors, none larger than its memory."""
    return isinstance(value, dict) and all(
        isinstance(t, torch.Tensor)
        and (t.dtype, t.layout, t.device.type) == (torch.float32, torch.strided, "cpu")
        and t.numel() * t.element_size() <= t.untyped_storage().nbytes()
        and bool(t.isfinite().all())
        for t in value.values()
    )


def loads(value):
    """A check: for every block, the mean routing probability of each expert."""
    return isinstance(value, list) and all(
        isinstance(load, list) and all(map(real, load)) for load in value
    )


RECIPE = {"dataset": str, "seed": whole(0), "epochs": whole(1)}
RECIPE |= {"noise_level": taken_by("denoise", real)}
RECIPE |= {"lossless_share": lambda v: v is None or share(v), "val_images": whole(1)}
CHECKPOINT = {"model": weights, "config": dict, "recipe": RECIPE, "epoch": whole(1)}
CHECKPOINT |= {"val_mse": real}
TEST = dict.fromkeys(("mse", "psnr_std", "ssim_mean", "ssim_std"), real)
TEST |= {"noisy_psnr_mean": float, "psnr_mean": float, "images": whole(1), "utilisation": loads}
LATER = {"crop": lambda v: v is None or whole(1)(v), "unclipped": bool}  # not in old recipes
LATER |= {"jpeg_share": share, "init": lambda v: v is None or isinstance(v, str)}
LATER |= {"noise_map": lambda v: isinstance(v, str) and v in DRAWS}
LATER |= {"task": lambda v: isinstance(v, str) and v in KINDS}
LATER |= {
    "scale": taken_by("super-resolution", whole(1)),
    "holes": taken_by("inpaint", real),
    "quality": taken_by("jpeg", whole(1)),
}
IF_THERE = {"test": TEST, "dataset": str, "train_seconds": real}
ROW = dict.fromkeys(("train_mse", "val_mse", "lr", "seconds"), real)
ROW |= {"balance_loss": float}  # rounding takes it below 0
STATE = {"recipe": RECIPE, "history": list, "model": weights, "optimizer": dict, "best": CHECKPOINT}
ADVICE = "use a file that denoising_experiment_proper.py wrote, or copy it again"


def listed(values):
    """A dict of plain values as torch.save and JSON give it back: tuples have become lists."""
    return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}


EARLIER = listed(DEFAULTS) | {"init": None}  # what recipes that lack it mean


def plain(value):
    """A check: numbers, texts, None, and lists and dicts of these, which can be compared."""
    if isinstance(value, dict):
        return all(isinstance(key, str) for key in value) and plain(list(value.values()))
    if isinstance(value, list | tuple):
        return all(map(plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def check(value, kind, path, name=""):
    """Compares what was read with what it has to be: a type, a check, or a dict of these by key.

    Raises:
        UserError: `name` in the file `path` is not of its kind.
    """
    if isinstance(kind, dict):
        check(value, dict, path, name)
        for key, inner in kind.items():
            where = f"{name}.{key}" if name else key
            if key not in value:
                raise UserError(f"{path} does not hold {where}; {ADVICE}")
            check(value[key], inner, path, where)
    elif not (isinstance(value, kind) if isinstance(kind, type) else kind(value)):
        shown = repr(value) if isinstance(value, int | float | str | list) else type(value).__name__
        raise UserError(f"{path}: {name or 'its content'} cannot be {shown:.60}; {ADVICE}")


# Files ----------------------------------------------------------------------------------------


def read_checkpoint(path):
    """Reads a trained model's file, without running code from it.

    Args:
        path: the file.

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
    check(checkpoint, CHECKPOINT, path)
    for part, kinds, name in ((checkpoint, IF_THERE, ""), (checkpoint["recipe"], LATER, "recipe")):
        check(part, {key: kind for key, kind in kinds.items() if key in part}, path, name)
    kind, level = checkpoint["recipe"].get("noise_map"), checkpoint["recipe"]["noise_level"]
    if kind not in (None, "uniform") and not (isinstance(level, list) and level[0] < level[1]):
        raise UserError(f"{path}: recipe.noise_map cannot be {kind!r} with one σ; {ADVICE}")
    return checkpoint


def load(path):
    """torch.load, after what torch leaves unchecked: checksums, and sizes beyond the file's.

    Returns:
        What the file holds; a dict as `trusted` leaves it.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            stored = all(m.compress_type == zipfile.ZIP_STORED for m in archive.infolist())
            damaged = not stored or archive.testzip()
        if not damaged:
            content = torch.load(path, map_location="cpu", weights_only=True)
            return trusted(content) if isinstance(content, dict) else content
    except PermissionError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except Exception:  # the unpickler has its own for every kind of damage
        pass
    raise UserError(
        f"{path} is damaged, of another kind, or holds more than tensors and plain values, which "
        f"could run code; {ADVICE}"
    )


def trusted(checkpoint):
    """The checkpoint or state itself, in which all but weights and optimizer can be compared.

    Raises:
        Exception: of any kind: there is more in it.
    """
    parts = ("model", "optimizer", "best")
    if not plain({name: value for name, value in checkpoint.items() if name not in parts}):
        raise ValueError("neither a weight nor a plain value")
    if "model" in checkpoint:  # without attributes and hooks, which torch would believe
        checkpoint["model"] = {n: t.detach() for n, t in dict(checkpoint["model"]).items()}
    if "best" in checkpoint:
        trusted(checkpoint["best"])
    return checkpoint


def write_checkpoint(checkpoint, path):
    """torch.save to a temporary file, then rename: `path` is never half written.

    Raises:
        UserError: it cannot be written.
    """
    with replace_when_complete(path) as temporary:
        try:
            torch.save(checkpoint, temporary)
        except RuntimeError:  # what torch makes of a disk without space
            raise UserError(f"cannot write {path}: the disk is full; make room on it") from None


def check_same_recipe(earlier, recipe, whose, advice):
    """Raises a UserError that names the first entry of `recipe` that differs in the earlier one."""
    for name, value in recipe.items():
        before = earlier.get(name, EARLIER.get(name))
        if before != value:
            shown = f"{name} {before!s:.80}, this one has {value!s:.80}"
            raise UserError(f"{whose} {shown}; {advice}")


def check_finite(row, best, files):
    """Raises a Diverged that names the last good checkpoint where a figure is not finite."""
    if not all(map(math.isfinite, row.values())):
        kept = f"{files.checkpoint} keeps epoch {best['epoch']}" if files and best else ""
        raise Diverged(
            f"the loss is not finite in epoch {row['epoch']} (training {row['train_mse']:g}, "
            f"validation {row['val_mse']:g}); {kept or 'no epoch is kept'}; try a smaller --lr"
        )


def save_run(state, files, fresh=False):
    """Writes what --resume needs, the best checkpoint and the history of a run.

    Args:
        state: dict with the keys of STATE.
        files: RunFiles.
        fresh: keep what an earlier run left under their names.
    """
    if rank() == 0:
        if fresh:
            files.keep_existing()
        write_checkpoint(state, files.resume)
        write_checkpoint(state["best"], files.checkpoint)
        write_text(csv_text(state["history"]), files.history)
        files.saved = True


def read_run(files, recipe, model):
    """The state that --resume goes on from.

    Args:
        files: RunFiles.
        recipe: dict of the run that is to go on.
        model: what the state's weights are for.

    Raises:
        UserError: there is none, it is damaged, or of another recipe.
    """
    if not os.path.isfile(files.resume):
        raise UserError(
            f"--resume: there is no interrupted run at {files.resume}; start one without --resume"
        )
    state = load(files.resume)
    check(state, STATE, files.resume)
    advice = "repeat its options, or start a new run without --resume"
    check_same_recipe(state["recipe"], recipe, "--resume: the interrupted run had", advice)
    history, best = state["history"], state["best"]
    for epoch, row in enumerate(history, 1):
        kind = ROW | {"epoch": lambda value, epoch=epoch: value == epoch}
        check(row, kind, files.resume, f"history, epoch {epoch}")
        if row.keys() != kind.keys():
            raise UserError(f"{files.resume}: history, epoch {epoch} has other columns; {ADVICE}")
    least = min((row["val_mse"] for row in history), default=None)
    found = [row["epoch"] for row in history if row["val_mse"] == least]
    if best["epoch"] not in found or EARLIER | best["recipe"] != EARLIER | state["recipe"]:
        raise UserError(f"{files.resume} holds the best model of another run; {ADVICE}")
    for part in (state, best):
        check_shapes(part["model"], model.state_dict(), files.resume)
    if not left_by_run(files, state):
        files.keep_existing(but=[files.resume])
    return state


def left_by_run(files, state):
    """Whether checkpoint and history, where they are there, can be of the run of a state."""
    try:
        checkpoint = os.path.exists(files.checkpoint) and read_checkpoint(files.checkpoint)
        history = os.path.exists(files.history) and files.history.read_text(encoding="utf-8")
    except (UserError, OSError, ValueError):
        return False
    same_run = not checkpoint or EARLIER | checkpoint["recipe"] == EARLIER | state["recipe"]
    return same_run and csv_text(state["history"]).startswith(history or "")


def check_shapes(tensors, expected, path):
    """Raises a UserError unless the dicts have tensors of the same names and shapes.

    Args:
        tensors: what was read from `path`.
        expected: dict of tensors, or of shapes.
    """
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    if shapes != {name: getattr(t, "shape", t) for name, t in expected.items()}:
        raise UserError(f"{path} holds weights of another model; {ADVICE}")


def restore_optimizer(optimizer, moments, path):
    """Loads the moments of a run into its optimizer.

    Args:
        optimizer: of make_optimizer.
        moments: {index of a parameter: {name: tensor}}, as read from `path`.

    Raises:
        UserError: they do not fit; a fused step would read and write beyond them.
    """
    shapes = state_shapes(optimizer)
    if moments.keys() != shapes.keys() or not all(map(weights, moments.values())):
        raise UserError(f"{path} holds the state of another optimizer; {ADVICE}")
    for index, expected in shapes.items():
        check_shapes(moments[index], expected, path)
    # With memory of their own, in the usual order, as a fused step takes it to be.
    moments = {
        index: {
            name: tensor.detach().clone(memory_format=torch.contiguous_format)
            for name, tensor in of_one.items()
        }
        for index, of_one in moments.items()
    }
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": moments, "param_groups": groups})
