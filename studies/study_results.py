"""What a study found: its JSON file, a Markdown table and a picture."""

import json
import os
import statistics
from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.text import Text

from common.options import Number
from common.safe_files import write_figure, write_text
from common.user_errors import UserError
from experiment.checkpoints import is_utilisation, require
from experiment.evaluation import spread
from experiment.recipe import Recipe
from experiment.reports import plus_minus, table_head, table_row
from images.degradations import degradation_of
from small_vit import MODELS
from studies.model_variants import VARIANTS

TILES_OF = "tiles of "
POSITIVE = Number(float)
STUDY, OF_STUDY = {"recipe": dict, "rows": list}, {"dataset": str, "tiles": list}
POINT = {"at": str, "psnr": POSITIVE, "ssim": lambda v: v is None or POSITIVE.holds(v)}
POINT["mflops"] = POINT["ssim"]  # None for tiles
ROW = {"variant": str, "seed": Number(int), "parameters": Number(int, 1), "points": list}
# None where training diverged.
ROW |= {"train_seconds": POINT["ssim"], "utilisation": lambda v: v is None or is_utilisation(v)}
COLOURS = 6  # of the first curves; further ones are thin and grey
LABEL = {"textcoords": "offset points", "verticalalignment": "center", "annotation_clip": False}
LINE_HEIGHT = 0.04  # of a label, as a part of the axis

# Files ---------------------------------------------------------------------------------------


def files_of(output: Path) -> tuple[Path, Path, Path]:
    """The JSON file and, named after it, table and picture; a UserError if it is no .json, or one
    of these is there without it: somebody else's.
    """
    if output.suffix != ".json":
        raise UserError(f"--output {output}: name a .json file; table and picture stand beside it")
    table, picture = output.with_suffix(".md"), output.with_suffix(".png")
    for file in (table, picture):
        if os.path.exists(file) and not os.path.exists(output):
            raise UserError(f"--output {output}: {file} is not of this study; name another file")
    return output, table, picture


def write_study(files: tuple[Path, Path, Path], recipe: dict, rows: list[dict]) -> None:
    """Writes JSON, table and picture."""
    write_text(json.dumps({"recipe": recipe, "rows": rows}, indent=2) + "\n", files[0])
    write_text(markdown(rows, recipe), files[1])
    write_figure(draw(rows, recipe), files[2], dpi=150)


def read_study(path: Path) -> tuple[dict, list[dict]]:
    """The recipe and the rows of a JSON file; a UserError if it is no study's."""
    try:
        study = json.loads(path.read_text(encoding="utf-8"))
        require(study, STUDY, path)
        require(study["recipe"], OF_STUDY, path)
        Recipe.of(study["recipe"])
        for row in study["rows"]:
            require(row, ROW, path)
            for point in row["points"]:
                require(point, POINT, path)
            if row["points"] and row["train_seconds"] is None:
                raise ValueError("figures are missing")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError, UserError):
        raise UserError(f"{path} is no result of ablation_study.py; name another file") from None
    return study["recipe"], study["rows"]


def share_name(capacity: float | None) -> str:
    """The name of a point: the share of the tokens that attend."""
    return f"{100 * capacity:g} %" if capacity else "all"


def points_of(rows: list[dict]) -> dict[str, dict[str, list[dict]]]:
    """{variant: {"at": its points over seeds}}; none of a variant whose trainings all diverged."""
    found = {name: {} for name in VARIANTS}
    for row in rows:
        of_variant = found.setdefault(row["variant"], {})
        for point in row["points"]:
            of_variant.setdefault(point["at"], []).append(point)
    trained = {row["variant"] for row in rows}
    return {name: points for name, points in found.items() if name in trained}


# Table ---------------------------------------------------------------------------------------


def markdown(rows: list[dict], recipe: dict) -> str:
    """The results as a Markdown table: mean ± standard deviation over seeds, and the least."""
    columns = ("PSNR (dB)", "least", "SSIM", "MFLOP", "training (s)")
    lines = [", ".join(f"{name} {value}" for name, value in recipe.items()) + "\n"]
    lines.append(table_head("variant", "at", "parameters", "seeds", *columns))
    for name, points in points_of(rows).items():
        of_variant = [row for row in rows if row["variant"] == name]
        parameters = f"{of_variant[0]['parameters']:,}"
        seconds = [row["train_seconds"] for row in of_variant if row["points"]]
        diverged = len(of_variant) - len(seconds)
        note = f", {diverged} diverged" if diverged else ""
        for place, of_seeds in points.items():
            psnrs = [point["psnr"] for point in of_seeds]
            ssims = [point["ssim"] for point in of_seeds]
            mflops = of_seeds[0]["mflops"]
            cells = [name, place, parameters, f"{len(of_seeds)}{note}"]
            cells += [plus_minus(psnrs, 3), f"{min(psnrs):.3f}"]
            cells.append("–" if None in ssims else plus_minus(ssims, 4))
            cells.append(f"{mflops:.1f}" if mflops else "–")
            lines.append(table_row(*cells, f"{statistics.mean(seconds):.1f}"))
        if not points:
            lines.append(table_row(name, "–", parameters, f"0{note}", *("–" for _ in columns)))
    return "\n".join(lines) + "\n"


# Picture -------------------------------------------------------------------------------------


def draw(rows: list[dict], recipe: dict) -> Figure:
    """Figure: PSNR, mean ± std over seeds, against compute or, for tiles, against their size."""
    figure, axis = plt.subplots(figsize=(8, 5), layout="constrained")
    drawn = {name: points for name, points in points_of(rows).items() if points}
    labels = []
    for number, (name, points) in enumerate(drawn.items()):
        curve = against_size(points) if recipe["tiles"] else against_compute(points)
        places = [place for place, _ in curve]
        means, stds = np.transpose([spread([p["psnr"] for p in of_seeds]) for _, of_seeds in curve])
        color, width, size = (f"C{number}", 1.5, 9) if number < COLOURS else ("grey", 0.6, 7)
        style = {"color": color, "lw": width, "fmt": ".--" if name.endswith("local") else ".-"}
        axis.errorbar(places, means, stds, capsize=3, **style)
        style = {"color": color, "fontsize": size, **LABEL}
        labels.append(axis.annotate(name, (places[-1], means[-1]), (8, 0), **style))
    push_apart(labels, LINE_HEIGHT * np.ptp(axis.get_ylim()))
    title, axis_title = "Quality against compute", "compute per image (MFLOP)"
    images = f"{recipe['dataset']}, {degradation_of(recipe)}"
    shares = next((list(points) for points in drawn.values() if len(points) > 1), [])
    if recipe["tiles"]:
        title = "Quality in separate tiles and on whole images"
        axis_title = "size of tiles (pixels)"
        images += f", trained on crops of {recipe['crop']}×{recipe['crop']}"
    elif shares:
        axis_title += f"; points: {', '.join(reversed(shares))} of the tokens attend"
    axis.set(title=f"{title}\n{images}", xlabel=axis_title)
    axis.set_ylabel("PSNR (dB), mean ± std over seeds")
    axis.spines[["top", "right"]].set_visible(False)  # labels lie there
    axis.grid(alpha=0.3)
    return figure


def against_compute(points: dict[str, list[dict]]) -> list[tuple[float, list[dict]]]:
    """[(MFLOP, points over seeds)], in ascending order."""
    return sorted(((p[0]["mflops"], p) for p in points.values()), key=lambda place: place[0])


def against_size(points: dict[str, list[dict]]) -> list[tuple[str, list[dict]]]:
    """[(size of the tiles, then "whole", points over seeds)], whole with the model's capacity."""
    tiles = [(a.removeprefix(TILES_OF), p) for a, p in points.items() if a.startswith(TILES_OF)]
    own = share_name(MODELS["routed-photographs"].capacity)
    return [*tiles, ("whole", points.get("all") or points[own])]


def push_apart(labels: list[Text], least: float) -> None:
    """Moves labels up and down until each is as far from the next as `least`, in dB."""
    labels = sorted(labels, key=lambda text: text.xy[1])
    heights = np.array([text.xy[1] for text in labels])
    for _ in range(200):
        missing = np.clip(least - np.diff(heights), 0, None) / 2
        heights[:-1] -= missing
        heights[1:] += missing
    for text, height in zip(labels, heights, strict=True):
        text.xy = (text.xy[0], height)
