"""Removes the noise from photographs of any size.

    python denoise_image.py photo.jpg                 # writes photo_denoised.png beside it
    python denoise_image.py holiday/ --output clean/  # all images of a folder

It removes the noise that the files of cameras have, demosaicked, tone-mapped and compressed, and
noise up to σ = 0.3 that was independent from pixel to pixel, also in JPEG files. In Python:
`denoise(load_model("photo"), "photo.jpg")`.
"""

import glob
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from PIL import Image
from tqdm import tqdm

from common.options import Number
from common.safe_files import check_writable, write_figure
from common.user_errors import UserError, counted, printable, reason, run_main
from experiment import command_line as cli
from experiment.tiling import (
    LEAST_PROBE,
    OVERLAP,
    PROBE,
    TILE,
    as_float,
    center_crop,
    denoise,
    denoise_photo,
    noise_at_sizes,
    whole_noise,
)
from images.image_sources import list_images
from images.photo_files import FORMATS, WRITTEN, check_format, read_photo, write_photo
from images.photo_tags import Tags
from small_vit import SHIPPED, SmallViT, load_model

__all__ = ["denoise", "load_model"]  # what Python scripts take from here

NOTICEABLE = 0.02  # σ of noise that is told of where most of it stays
SURPRISING = 4  # times the estimated noise; that of a camera is up to three times as strong
SUFFIX, COMPARED = "_denoised", "_compare"  # ends of the names that are written


def find_images(names: Iterable[str], recursive: bool = False) -> dict[Path, Path]:
    """{image: its folder, as seen from the one that was named}, of file names, folders, wildcards.

    Raises:
        UserError: one of them stands for none.
    """
    found = {}
    for name in names:
        images = {}
        for place in map(Path, [name] if os.path.exists(name) else matches(name)):
            images |= images_of(place, recursive) if place.is_dir() else {place: Path()}
        if not images:
            raise UserError(f"{name}: no image there; name image files, folders or wildcards")
        found |= images
    return found


def images_of(folder: Path, recursive: bool) -> dict[Path, Path]:
    """The same, of the images of a folder; says what it passes over."""
    known = {suffix for suffix, kind in Image.registered_extensions().items() if kind in FORMATS}
    results = (SUFFIX, SUFFIX + COMPARED)  # of earlier runs
    files = [path for path in list_images(folder, strict=recursive) if path.is_file()]
    files = [path for path in files if not path.stem.endswith(results)]
    here = [path for path in files if recursive or path.parent == folder]
    images = [path for path in here if path.suffix.lower() in known]
    others = [path.suffix or path.name for path in here if path.suffix.lower() not in known]
    if below := sum(path.suffix.lower() in known for path in files) - len(images):
        words = f"passed over {counted(below, 'image')} in subfolders of {folder}"
        print(printable(f"{words}: --recursive takes them"))
    if others:
        kinds = ", ".join(sorted(set(others)))
        print(printable(f"passed over {counted(len(others), 'file')} in {folder}: {kinds}"))
    return {path: path.parent.relative_to(folder) for path in images}


def matches(pattern: str) -> list[str]:
    """Files that a wildcard stands for; a folder in front of it that exists is taken literally."""
    folder, name = os.path.split(pattern)
    folder = glob.escape(folder) if os.path.isdir(folder) else folder
    return sorted(glob.glob(os.path.join(folder, name), recursive=True))


def comparison_of(output: Path) -> Path:
    """The picture of before and after that belongs to an output."""
    return output.with_name(f"{output.stem}{COMPARED}.png")


def distinct_names(places: dict[Path, Path]) -> dict[Path, str]:
    """{image: its name without suffix}, or with it where that would not do, for images that are
    written to these folders; they differ also for a file system that ignores case.
    """

    def key(path, name):
        return str(places[path] / name).casefold()

    stems, names, taken = Counter(key(path, path.stem) for path in places), {}, {}
    for path, place in places.items():
        name = path.stem
        if stems[key(path, name)] > 1:  # a.jpg beside a.tif
            name = path.name.replace(".", "_")
        # A.jpg beside a.JPG; x/a.jpg and y/a.jpg in one folder stay the same, which is refused
        while taken.setdefault(key(path, name), place / path.name) != place / path.name:
            name += "_"
        names[path] = name
    return names


def choose_outputs(
    images: dict[Path, Path],
    output: str | None,
    overwrite: bool,
    compare: bool = False,
    skip_existing: bool = False,
) -> dict[Path, Path]:
    """{input: output}; by default the input's name with _denoised.png, beside it.

    Args:
        images: of `find_images`; folders below the one that was named are there below `output`.

    Raises:
        UserError: an output, or its comparison, is there already, is an input, would be written
            twice, or cannot be written.
    """
    is_folder = output and (os.path.isdir(output) or output.endswith(("/", os.sep)))
    is_file = output and not is_folder and Path(output).suffix.lower() in WRITTEN
    folder = is_folder or (output and not is_file and (len(images) > 1 or not Path(output).suffix))
    if len(images) > 1 and (is_file or (folder and os.path.isfile(output))):
        raise UserError(f"--output {output}: name a folder for {len(images)} images")
    if output and not folder and not is_file:
        kinds = f"a file of {', '.join(WRITTEN)}"
        raise UserError(f"--output {output}: name {kinds}, or a folder, with {os.sep} at its end")

    def real(path):  # two files are told apart as by a file system that ignores case
        return os.path.realpath(path).casefold()

    places = {p: Path(output) / below if folder else p.parent for p, below in images.items()}
    inputs, written, chosen = set(map(real, images)), {}, {}
    for path, name in distinct_names(places).items():
        new = Path(output) if output and not folder else places[path] / f"{name}{SUFFIX}.png"
        if skip_existing and os.path.lexists(new):
            continue
        for file in (new, comparison_of(new)) if compare else (new,):
            place = real(file)
            if place in written:
                raise UserError(f"{file} would be written twice; name the images one by one")
            if os.path.lexists(file) and not overwrite:
                raise UserError(f"{file} is there already; give --skip-existing or --overwrite")
            if place in inputs and (file != new or place != real(path)):
                raise UserError(f"{file} is an image to read and would be replaced; leave it out")
            written[place] = file
        chosen[path] = new
    try:
        for place in {new.parent for new in chosen.values() if folder}:
            os.makedirs(place, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {output}: {error.strerror}; name another") from None
    for file in written.values():
        check_writable(file)  # before minutes go by
    return chosen


def draw_comparison(before: np.ndarray, after: np.ndarray, name: str) -> Figure:
    """Figure: before | after | what was removed, four times as strong; the middle of the image."""
    before, after = (as_float(center_crop(a)) for a in (before, after))
    removed = np.clip(0.5 + 4 * (before - after), 0, 1)
    height, width = before.shape[:2]
    scale = max(1, min(300 / width, PROBE / height))  # of a pixel, in hundredths of an inch
    size = (3 * max(300, scale * width) / 100, scale * height / 100 + 0.4)
    figure, axes = plt.subplots(1, 3, figsize=size, layout="constrained")
    titles = ("before", "after", "removed, ×4")
    for axis, image, title in zip(axes, (before, after, removed), titles, strict=True):
        axis.imshow(np.broadcast_to(image, (height, width, 3)), interpolation="nearest")
        axis.set(xticks=[], yticks=[], title=f"{title}: {name}" if title == "before" else title)
    return figure


def denoise_file(
    path: Path,
    output: Path,
    model: SmallViT,
    tile: int = TILE,
    dtype: str = "float32",
    strength: float = 1.0,
    compare: bool = False,
    strip: bool = False,
) -> None:
    """Denoises one file and prints its line; `compare` draws before and after as well.

    Raises:
        Exception: of any kind: it cannot be read, or not be written.
    """
    started = time.perf_counter()
    try:
        photo = read_photo(path)
    except (MemoryError, RuntimeError) as error:  # the decoder's, which end no other file
        raise ValueError(reason(error)) from None
    check_format(photo, output)  # before minutes go by
    restored = denoise_photo(model, photo, tile=tile, dtype=dtype, strength=strength)
    pixels, tags = restored.pixels, photo.tags
    tags = Tags(png_chunks=tags.png_chunks) if strip else tags
    write_photo(replace(restored, tags=tags), output)
    seconds = time.perf_counter() - started
    if compare:
        figure = draw_comparison(photo.pixels, pixels, path.name)
        write_figure(figure, comparison_of(output), dpi=100)
    height, width = pixels.shape[:2]
    before, after = noise_at_sizes(photo.pixels), noise_at_sizes(pixels)
    known = min(height, width) >= LEAST_PROBE
    noise = "too small to tell its noise"
    if known:
        noise = f"noise {whole_noise(before):.4f} → {whole_noise(after):.4f}"
    line = f"{path}  {width}×{height}  {noise}  {seconds:.1f} s  → {output}"
    if photo.frames > 1:
        line += f"  (the first of {photo.frames} frames or pages)"
    if strength == 1 and known:
        removed = as_float(center_crop(photo.pixels)) - as_float(center_crop(pixels))
        line += what_to_look_at(before, after, float(np.sqrt(np.mean(removed**2))))
    tqdm.write(printable(line))


def what_to_look_at(before: list[float], after: list[float], removed: float) -> str:
    """A remark where the result is not what a user hopes for, or "".

    Args:
        before, after: of `noise_at_sizes`.
        removed: root of the mean squared difference of the two images.
    """
    stays = [b > NOTICEABLE and a > b / 2 for b, a in zip(before, after, strict=True)]
    if stays[0]:
        return "  (most of it stays: the model does not know noise of this kind)"
    if any(stays):
        coarse = max(a for a, stay in zip(after, stays, strict=True) if stay)
        return f"  (coarser noise, or texture, of {coarse:.3f} stays)"
    if removed > max(NOTICEABLE, SURPRISING * whole_noise(before)):
        return "  (it changed by far more than its noise: compare the two)"
    return ""


def photograph_model(path: str) -> SmallViT:
    """A model that removes noise from photographs.

    Raises:
        UserError: it cannot be had, or was trained for something else.
    """
    model = load_model(path)
    recipe = model.trained.recipe
    if recipe.degradation.task != "denoise":
        raise UserError(f"{path} was trained for {recipe.degradation}, not for noise")
    if not recipe.crop:
        raise UserError(
            f"{path} was trained on thumbnails; name a model for photographs, as "
            "denoising_experiment_proper.py --recipe photographs trains it"
        )
    return model


def parse_args():
    parser = cli.make_parser(
        "Removes noise from photographs of any size and kind: grey, alpha and the 16 bits of PNG "
        "and TIFF stay as they are, colour profiles and EXIF are kept, its orientation is applied. "
        "Of several frames or pages it takes the first.",
        "python denoise_image.py holiday/*.jpg --output clean/",
    )
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="files, folders or wildcards")
    cli.add_checkpoint(parser, SHIPPED / "photo.pt")
    cli.add_computation(parser, dtype=True)
    group = parser.add_argument_group("output")
    group.add_argument("--output", metavar="FILE|FOLDER", help="where to write (default: beside)")
    for name, what in (
        ("--recursive", "take the images of subfolders, too, which --output then has as well"),
        ("--overwrite", "replace what is there already"),
        ("--skip-existing", "leave images out whose output is there already"),
        ("--strip", "leave EXIF (with place and date), XMP and resolution out"),
        ("--compare", "draw before, after and what was removed as well"),
    ):
        group.add_argument(name, action="store_true", help=f"{what} (default: no)")
    kind, what = Number(float, most=1), "part of the noise to remove, 0 to 1"
    cli.add_option(group, "--strength", type=kind, default=1, help=what)
    kind, what = Number(float, above=True), "refuse larger images, as bad files claim to be"
    cli.add_option(group, "--max-megapixels", type=kind, default=178, metavar="N", help=what)
    kind, what = Number(int, 2 * OVERLAP), "side of the tiles of large images; memory grows with it"
    cli.add_option(group, "--tile", type=kind, default=TILE, metavar="PIXELS", help=what)
    return parser.parse_args()


def main():
    args = parse_args()
    Image.MAX_IMAGE_PIXELS = int(args.max_megapixels * 1e6 / 2)  # Pillow refuses twice as much
    how = (args.output, args.overwrite, args.compare, args.skip_existing)
    outputs = choose_outputs(find_images(args.images, args.recursive), *how)
    if not outputs:
        print("every output is there already")
        return 0
    device = cli.select_device(args.device, args.threads)
    model = photograph_model(args.checkpoint).to(device)
    failed = []
    for path, output in tqdm(outputs.items(), "images", unit="img", leave=False, disable=None):
        try:
            how = (args.tile, args.dtype, args.strength, args.compare, args.strip)
            denoise_file(path, output, model, *how)
        except (MemoryError, RuntimeError):
            raise
        except Exception as error:
            failed.append(f"{path}: {reason(error)}")
    if failed and len(failed) == len(outputs):
        raise UserError("; ".join(failed))
    for sentence in failed:
        print(printable(f"failed: {sentence}"), file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    run_main(main)
