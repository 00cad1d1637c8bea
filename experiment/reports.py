"""What scripts print and draw of their figures: lines, Markdown tables, a learning curve."""

import sys
from collections.abc import Sequence

import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from tqdm import tqdm

from common.user_errors import counted
from experiment.evaluation import Evaluation, psnr_of, spread
from images.degradations import Degradation


def table_head(*columns: str) -> str:
    """The first two lines of a Markdown table."""
    return f"{table_row(*columns)}\n|{'---|' * len(columns)}"


def table_row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def print_head(*columns: str) -> None:
    print(f"\n{table_head(*columns)}")


def print_row(*cells: str) -> None:
    """Prints a row of it, seen as soon as it is measured, above a progress bar."""
    tqdm.write(table_row(*cells))
    sys.stdout.flush()


def plus_minus(values: Sequence[float], digits: int) -> str:
    """ "25.04 ± 1.48": mean and std with that many digits."""
    mean, std = spread(values)
    return f"{mean:.{digits}f} ± {std:.{digits}f}"


def result_line(psnr: Sequence[float], ssim: Sequence[float], dataset_name: str) -> str:
    """The line that ends every script which evaluates."""
    return (
        f"PSNR {plus_minus(psnr, 2)} dB   SSIM {plus_minus(ssim, 4)}   "
        f"images {len(psnr)}   dataset {dataset_name}"
    )


def epoch_line(row: dict) -> str:
    """What a training prints of a row of its history."""
    return (
        f"epoch {row['epoch']:3d}  train {row['train_mse']:.5f}  val {row['val_mse']:.5f} "
        f"({psnr_of(row['val_mse']):.2f} dB)  lr {row['lr']:.1e}  {row['seconds']:.0f} s"
    )


def framed(title: str, rows: list[tuple[str, str]]) -> str:
    """A table of (name, value) strings in a frame."""
    width = max(len(name) for name, _ in rows)
    lines = [f" {name:<{width}}  {value} " for name, value in rows]
    inner = max(map(len, lines))
    lines = [f"║{line:<{inner}}║" for line in lines]
    return "\n".join([f"╔{f' {title} ':═^{inner}}╗", *lines, f"╚{'═' * inner}╝"])


def results_box(
    checkpoint: dict, degradation: Degradation, result: Evaluation, device: torch.device
) -> str:
    """Of a run, tested with this degradation."""
    recipe, minutes = checkpoint["recipe"], checkpoint["train_seconds"] / 60
    of_noise = degradation.task == "denoise"
    before, after = ("noisy", "denoised") if of_noise else ("degraded", "restored")
    experts = "experts, none" if checkpoint["config"].get("capacity") else "experts"
    rows = [
        ("data set", f"{recipe['dataset']}, {counted(len(result.psnr), 'test image')}"),
        ("noise" if of_noise else "task", str(degradation)),
        ("parameters", f"{recipe['parameters']:,}"),
        ("training", f"{counted(recipe['epochs'], 'epoch')} in {minutes:.1f} min on {device}"),
        ("best epoch", f"{checkpoint['epoch']}, validation MSE {checkpoint['val_mse']:.5f}"),
        (f"{before} PSNR", f"{plus_minus(result.noisy_psnr, 2)} dB"),
        (f"{after} PSNR", f"{plus_minus(result.psnr, 2)} dB"),
        (f"{after} SSIM", plus_minus(result.ssim, 4)),
    ]
    for block, load in enumerate(result.utilisation, 1):
        if len(load) > 1:
            shares = " / ".join(f"{100 * p:.1f} %" for p in load)
            rows.append((f"{experts}, block {block}", shares))
    return framed("FINAL RESULTS", rows)


def draw_history(history: list[dict]) -> Figure:
    """Figure: the learning curve of a run, from its rows of `train`."""
    epochs = [row["epoch"] for row in history]
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, label in (("train_mse", "training"), ("val_mse", "validation")):
        axis.plot(epochs, [psnr_of(row[name]) for row in history], ".-", label=label)
    best = min(history, key=lambda row: row["val_mse"])
    axis.axvline(best["epoch"], color="grey", lw=0.8, ls=":", label=f"best: {best['epoch']}")
    axis.set(xlabel="epoch", ylabel="PSNR of the mean squared error (dB)", title="Learning curve")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(alpha=0.3)
    axis.legend()
    return figure
