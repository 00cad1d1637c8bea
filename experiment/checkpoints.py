"""Reading, checking and writing what training leaves behind: checkpoints, states to resume."""

from pathlib import Path

import torch

from experiment.data_parallel import rank
from experiment.run_files import replace_when_complete, write_csv
from experiment.user_errors import UserError

CHECKPOINT_KEYS = ("model", "config", "recipe", "epoch", "val_mse")
RESUME_KEYS = ("recipe", "history", "model", "optimizer", "scheduler", "best")


def read_checkpoint(path, keys=CHECKPOINT_KEYS):
    """Reads a file that training wrote, without running code from it.

    Args:
        path: the file.
        keys: what it has to hold: CHECKPOINT_KEYS or RESUME_KEYS.

    Returns:
        dict with these keys. Of a checkpoint: the model's state_dict ("model"), its "config", what
        decided its training ("recipe"), the best epoch and its validation MSE, and, where there
        are such, the --dataset of the training, "test" metrics, "train_seconds", "torch_version".

    Raises:
        UserError: the file is missing, damaged, unsafe, or no such file.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: no such checkpoint; train one or name another with --checkpoint")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # the unpickler has its own for every kind of damage
        raise UserError(
            f"{path} is no complete checkpoint: truncated, another kind of file, or with more in "
            "it than tensors and plain values, which could run code; copy or train it again"
        ) from None
    if not isinstance(checkpoint, dict) or not set(keys) <= checkpoint.keys():
        raise UserError(
            f"{path} does not hold {', '.join(keys)}; "
            "use a checkpoint that denoising_experiment_proper.py wrote"
        )
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
        if earlier.get(name) != value:
            raise UserError(f"{whose} {name} {earlier.get(name)}, this one has {value}; {advice}")


def save_run(state, files, fresh=False):
    """Writes what --resume needs, the best checkpoint and the history of a run.

    Args:
        state: dict with RESUME_KEYS.
        files: RunFiles.
        fresh: keep what an earlier run left under their names.
    """
    if rank() == 0:
        if fresh:
            files.keep_existing()
        write_checkpoint(state, files.resume)
        write_checkpoint(state["best"], files.checkpoint)
        write_csv(state["history"], files.history)


def read_run(files, recipe):
    """The state that --resume goes on from; the other files of the run are written again from it.

    Raises:
        UserError: there is none, or it is of another recipe.
    """
    if not files.resume.exists():
        raise UserError(
            f"--resume: there is no interrupted run at {files.resume}; start one without --resume"
        )
    state = read_checkpoint(files.resume, RESUME_KEYS)
    check_same_recipe(
        state["recipe"],
        recipe,
        "--resume: the interrupted run had",
        "repeat its options, or start a new run without --resume",
    )
    save_run(state, files)
    return state
