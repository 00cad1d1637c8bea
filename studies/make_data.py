"""Makes cifar10_partial, the folder that the project's figures on CIFAR-10 were measured with.

    python -m studies.make_data cifar10

It comes from the original CIFAR-10 (Krizhevsky, University of Toronto), which is downloaded where
it is missing, 170 MB. Nine in ten of its training images become JPEG files, by another encoder than
those of the figures, which changes a few hundredths of a decibel. TRAINING.md has the commands that
make the folder of photographs.
"""

from argparse import RawDescriptionHelpFormatter
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from common.user_errors import UserError, reason, run_main
from experiment.command_line import add_option, make_parser
from images.image_sources import download_cifar10

BATCH, LOSSLESS = 10_000, 1_017  # images in a batch of CIFAR-10; the first of them, stored as PNG
QUALITY = 75  # of the JPEG files


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


def main() -> int:
    parser = make_parser(__doc__, "python -m studies.make_data cifar10")
    parser.formatter_class = RawDescriptionHelpFormatter
    parser.prog = "python -m studies.make_data"
    parser.add_argument("source", choices=["cifar10"], help="what to make it from")
    what = "where CIFAR-10 is or is downloaded to"
    add_option(parser, "--data-dir", default="./data", metavar="FOLDER", help=what)
    what = "folder to make, none or empty"
    add_option(parser, "--output", default="cifar10_partial", metavar="FOLDER", help=what)
    args = parser.parse_args()
    folder = Path(args.output)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is no empty folder; name another --output")
    advice = "put its folder cifar-10-batches-py there"
    train, test = download_cifar10(args.data_dir, advice)
    of_train, of_test = train_names(train.targets), [f"test_{n:05}.png" for n in range(LOSSLESS)]
    try:
        write_images(folder / "train", of_train, train)
        write_images(folder / "test", of_test, test)
    except OSError as error:
        raise UserError(f"cannot make {folder} ({reason(error)})") from None
    print(f"wrote {folder}: {len(of_train):,} in train/ and {len(of_test):,} in test/")
    return 0


if __name__ == "__main__":
    run_main(main)
