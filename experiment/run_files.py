"""Writing files so that nothing is lost, and the files that a training run leaves on the disk."""

import contextlib
import csv
import math
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib import pyplot as plt
from matplotlib.backend_bases import FigureCanvasBase

from experiment.user_errors import UserError

matplotlib.use("Agg")  # figures go to files, also where there is no display


@contextlib.contextmanager
def replace_when_complete(path):
    """Yields a temporary path beside `path`; renames it to `path` when the block succeeds.

    A link is followed. The temporary name keeps the suffix, from which matplotlib takes the format.

    Raises:
        UserError: `path` is something else than a file, or its folder cannot be written.
    """
    path = Path(os.path.realpath(path))
    try:
        if not path.parent.is_dir():
            raise UserError(f"cannot write {path}: its folder does not exist; create it")
        if path.exists() and not path.is_file():
            raise UserError(f"cannot write {path}: it is a folder or a device; name a file")
        handle, temporary = tempfile.mkstemp(path.suffix, f".{path.stem}.", path.parent)
        os.close(handle)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp's 0o600 would hide the file from a group
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose another folder") from None
    try:
        yield Path(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        Path(temporary).unlink(missing_ok=True)


def check_writable(path):
    """Fails now, not after an hour of work, if `path` could not be written.

    Raises:
        UserError: as replace_when_complete does.
    """
    with contextlib.suppress(_Abandon), replace_when_complete(path):
        raise _Abandon


class _Abandon(Exception):
    pass


def check_picture(path):
    """Fails now if a picture could not be written to `path`.

    Raises:
        UserError: matplotlib knows no such format, or as check_writable does.
    """
    formats = FigureCanvasBase.get_supported_filetypes()
    if Path(path).suffix.lower().lstrip(".") not in formats:
        raise UserError(f"cannot draw {path}: unknown kind of picture; use .png, .pdf or .svg")
    check_writable(path)


def write_figure(figure, path, dpi=110):
    """Saves a matplotlib figure and closes it."""
    with replace_when_complete(path) as temporary:
        figure.savefig(temporary, dpi=dpi)
    plt.close(figure)


def write_csv(rows, path):
    """Writes dicts with the same keys as a CSV file with a header."""
    with replace_when_complete(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


@dataclass
class RunFiles:
    """The files of a run, named after its checkpoint."""

    checkpoint: Path

    def __post_init__(self):
        stem = str(self.checkpoint).removesuffix(".pt")
        self.history = Path(f"{stem}_history.csv")
        self.curve = Path(f"{stem}_curve.png")
        self.resume = Path(f"{stem}_resume.pt")
        self.all = (self.checkpoint, self.history, self.curve, self.resume)

    def check(self):
        """Raises UserError now if they could not be written at the end."""
        for path in self.all:
            check_writable(path)

    def how_to_go_on(self):
        """The sentence that ends an interrupted run."""
        if not self.resume.exists():
            return "interrupted before the first epoch was complete; nothing is kept"
        return (
            f"interrupted; {self.resume} has the run up to its last complete epoch, "
            f"{self.checkpoint} the best model so far; to go on, repeat the command with --resume"
        )

    def keep_existing(self):
        """Renames what an earlier run left under these names; nothing is overwritten."""
        kept, number = self, 0
        while any(path.exists() for path in kept.all):
            number += 1
            kept = RunFiles(self.checkpoint.with_suffix(f".{number}{self.checkpoint.suffix}"))
        for path, new in zip(self.all, kept.all, strict=True):
            if path.exists():
                os.replace(path, new)
                print(f"kept the existing {path} as {new}")


def draw_history(history):
    """Figure: the learning curve of a run, from its rows of `train`."""
    epochs = [row["epoch"] for row in history]
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, label in (("train_mse", "training"), ("val_mse", "validation")):
        axis.plot(epochs, [-10 * math.log10(row[name]) for row in history], ".-", label=label)
    best = min(history, key=lambda row: row["val_mse"])
    axis.axvline(best["epoch"], color="grey", lw=0.8, ls=":", label=f"best: {best['epoch']}")
    axis.set(xlabel="epoch", ylabel="PSNR of the mean squared error (dB)", title="Learning curve")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(alpha=0.3)
    axis.legend()
    return figure
