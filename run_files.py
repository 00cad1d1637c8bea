"""Files that training and pictures leave on the disk, and how a run is asked to stop."""

import csv
import math
import os
import signal
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import torch
from matplotlib import pyplot as plt
from matplotlib.backend_bases import FigureCanvasBase

from command_line import UserError, check_writable, replace_when_complete
from data_parallel import started_by_torchrun

matplotlib.use("Agg")  # figures go to files, also where there is no display


def save_atomically(state, path):
    """torch.save to a temporary file, then rename: `path` is never half written."""
    with replace_when_complete(path) as temporary:
        try:
            torch.save(state, temporary)
        except RuntimeError:  # what torch makes of a disk without space
            raise UserError(f"cannot write {path}: the disk is full; make room on it") from None


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


def check_picture(path):
    """Fails now if a picture could not be written to `path`.

    Raises:
        UserError: matplotlib knows no such format, or as check_writable does.
    """
    formats = FigureCanvasBase.get_supported_filetypes()
    if Path(path).suffix.lower().lstrip(".") not in formats:
        raise UserError(f"cannot draw {path}: unknown kind of picture; use .png, .pdf or .svg")
    check_writable(path)


def write_history(history, files):
    """Writes the learning curve of a run as CSV."""
    with replace_when_complete(files.history) as path, open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, history[0].keys())
        writer.writeheader()
        writer.writerows(history)


def draw_history(history, files):
    """Draws the learning curve of a run."""
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
    with replace_when_complete(files.curve) as path:
        figure.savefig(path, dpi=150)
    plt.close(figure)


class StopRequest:
    """Turns Ctrl-C and SIGTERM into a request that the training loop meets between two steps."""

    def __enter__(self):
        self.asked = False
        self.previous = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _ask(self, number, frame):
        self.asked = True
        if not started_by_torchrun():  # which passes on what its processes have already got
            signal.signal(number, self.previous[number])  # asked twice, it stops at once

    def __exit__(self, *exception):
        for name, handler in self.previous.items():
            signal.signal(name, handler)
