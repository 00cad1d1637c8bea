"""Makes the two folders of images that the project's figures were measured with.

    python -m studies.make_data cifar10
    python -m studies.make_data photographs --bsds BSR/BSDS500/data/images --leave-out CBSD68 \\
        --kodak Kodak24

`cifar10_partial` comes from the original CIFAR-10 (Krizhevsky, University of Toronto), which is
downloaded where it is missing, 170 MB. Nine in ten of its training images become JPEG files, by
another encoder than those of the figures, which changes a few hundredths of a decibel.

`photographs` comes from three collections that you get yourself:

BSDS500: the archive BSR_bsds500.tgz of the Berkeley Computer Vision Group, for non-commercial
    research and education.
CBSD68: 68 of these photographs, the field's test set; testsets/CBSD68 of the GitHub repository
    cszn/IRCNN. Only the names of its files are read.
Kodak24: the Kodak photographs, for unrestricted use, in the 500×500 pixels of the colour denoising
    papers; testsets/Kodak24 of the GitHub repository cszn/FFDNet.
"""

import contextlib
import os
import shutil
import tempfile
from argparse import RawDescriptionHelpFormatter
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from common.safe_files import temporary_prefix
from common.user_errors import UserError, reason, run_main
from experiment.command_line import add_option, make_parser
from images.image_sources import download_cifar10, list_images

BATCH, LOSSLESS = 10_000, 1_017  # images in a batch of CIFAR-10; the first of them, stored as PNG
QUALITY = 75  # of the JPEG files


@contextlib.contextmanager
def folder_when_complete(path: str) -> Iterator[Path]:
    """Yields a new folder beside `path`; renames it to `path` when the block succeeds. A UserError
    if `path` is there and no empty folder, or something cannot be read or written.
    """
    place = Path(os.path.realpath(path))
    try:
        if place.exists() and (not place.is_dir() or any(place.iterdir())):
            raise UserError(f"{path} exists and is no empty folder; name another --output")
        if not place.parent.exists():
            raise UserError(f"cannot make {path}: the folder around it does not exist; create it")
        with tempfile.TemporaryDirectory("", temporary_prefix(place), place.parent) as private:
            folder = Path(private, "open")  # unlike the one around it, for all to read
            folder.mkdir()
            yield folder
            os.replace(folder, place)
    except (OSError, ValueError) as error:  # ValueError: some damaged images
        raise UserError(f"cannot make {path} ({reason(error)})") from None


def make_cifar10(folder: Path, data_dir: str) -> None:
    """Writes train/ and test/ from CIFAR-10, which is in data_dir or gets downloaded there."""
    train, test = download_cifar10(data_dir, "put its folder cifar-10-batches-py there")
    write_images(folder / "train", train_names(train.targets), train)
    write_images(folder / "test", [f"test_{index:05}.png" for index in range(LOSSLESS)], test)


def train_names(labels: Sequence[int]) -> list[str]:
    """File names of the training images, by the class index of each in the order of the batches:
    batchB_NNNNN.png, by the place in the batch, of its first ones, NNNN.jpg, by the place in the
    class, of the others. By their order a seed holds out the same images as in our folder.
    """
    names, in_class = [], Counter()
    for index, label in enumerate(labels):
        batch, place = divmod(index, BATCH)
        png, jpeg = f"batch{batch + 1}_{place:05}.png", f"{in_class[label]:04}.jpg"
        names.append(png if place < LOSSLESS else jpeg)
        in_class[label] += 1
    return names


def write_images(folder: Path, names: Sequence[str], data: Any) -> None:
    """Writes an image of torchvision's CIFAR10 for each name, the first ones, to folder/CLASS/."""
    for name in data.classes:
        (folder / name).mkdir(parents=True)
    for index, name in enumerate(tqdm(names, f"writing {folder.name}", leave=False, disable=None)):
        path = folder / data.classes[data.targets[index]] / name
        Image.fromarray(data.data[index]).save(path, quality=QUALITY)  # a PNG ignores it


def make_photographs(folder: Path, bsds: str, leave_out: str, kodak: str) -> None:
    """Copies BSDS500 without CBSD68 into train/ and Kodak24 into test/, byte for byte; a UserError
    if these are not the published collections, by number or size.
    """
    photographs = {path.stem: path for path in list_images(bsds) if path.suffix == ".jpg"}
    left_out = photographs.keys() & {path.stem for path in list_images(leave_out)}
    test = [path for path in list_images(kodak) if path.suffix == ".png"]
    for found, expected, what in (
        (photographs, 500, f"JPEG photographs in {bsds}"),
        (left_out, 68, f"files in {leave_out} named as one of BSDS500, such as 101085.png"),
        (test, 24, f"PNG files in {kodak}"),
    ):
        if len(found) != expected:
            raise UserError(f"found {len(found)} {what}; {expected} are expected")
    for path in test:
        with Image.open(path) as image:  # reads the header alone
            width, height = image.size
        if (width, height) != (500, 500):
            advice = "take those of 500×500; the originals give other figures"
            raise UserError(f"{path} has {width}×{height} pixels; {advice}")
    train = [photographs[name] for name in photographs.keys() - left_out]
    for part, paths in (("train", train), ("test", test)):
        (folder / part).mkdir()
        for path in paths:
            shutil.copyfile(path, folder / part / path.name)


def add_folder(command, name: str, what: str, default: str | None = None) -> None:
    """An option that names a folder; without a default it has to be given."""
    settings = {"default": default, "required": default is None}
    add_option(command, name, metavar="FOLDER", help=what, **settings)


def main() -> int:
    parser = make_parser(__doc__, "python -m studies.make_data cifar10")
    parser.formatter_class = RawDescriptionHelpFormatter
    parser.prog = "python -m studies.make_data"
    commands = parser.add_subparsers(required=True, metavar="cifar10|photographs")
    cifar10 = commands.add_parser("cifar10", help="makes the folder cifar10_partial")
    cifar10.set_defaults(make=make_cifar10)
    add_folder(cifar10, "--data-dir", "where CIFAR-10 is or is downloaded to", "./data")
    add_folder(cifar10, "--output", "folder to make, none or empty", "cifar10_partial")
    photographs = commands.add_parser("photographs", help="makes the folder photographs")
    photographs.set_defaults(make=make_photographs)
    add_folder(photographs, "--bsds", "BSR/BSDS500/data/images of the archive")
    add_folder(photographs, "--leave-out", "CBSD68, files such as 101085.png")
    add_folder(photographs, "--kodak", "Kodak24 in 500×500 pixels")
    add_folder(photographs, "--output", "folder to make, none or empty", "photographs")
    sources = vars(parser.parse_args())
    make, output = sources.pop("make"), sources.pop("output")
    with folder_when_complete(output) as folder:
        make(folder, **sources)
    counts = [f"{len(list_images(Path(output, p))):,} in {p}/" for p in ("train", "test")]
    print(f"wrote {output}: {' and '.join(counts)}")
    return 0


if __name__ == "__main__":
    run_main(main)
