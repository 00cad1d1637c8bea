"""Where the images come from: CIFAR-10, photographs inside scikit-image, or any image folder.

Each source gives the three splits as uint8 tensors [n, 3, 32, 32] and the name that every result
carries. `load_images` is the door.
"""

import hashlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import skimage.data
import torch
from PIL import Image, ImageOps
from skimage.transform import downscale_local_mean
from tqdm import tqdm

from experiment.user_errors import UserError, printable

SIZE = 32  # side of every image, pixels
VALIDATION_SHARE = 0.2  # CIFAR-10: 40,000 / 10,000 of the 50,000 training images
CROPS_PER_FILE = 64  # at most, from one large image of a folder
# Read by Pillow itself: others, such as EPS, start programs.
FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "MPO", "JPEG2000", "AVIF")
LOSSLESS = ("PNG", "BMP", "GIF", "PPM")  # as a rule; TIFF and WebP are asked
# Whole photographs per split, so that no test crop has a neighbour among the training crops.
PHOTOS = {
    "train": ("astronaut", "stereo_motorcycle", "immunohistochemistry"),
    "val": ("rocket",),
    "test": ("chelsea", "coffee"),
}


@dataclass
class Split:
    """Images of one split."""

    images: torch.Tensor  # uint8 [n, 3, 32, 32]
    labels: torch.Tensor  # int64 [n], the class index (for photos, the photograph's)
    lossless: torch.Tensor  # bool [n], False where the image was stored with lossy compression

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return Split(self.images[index], self.labels[index], self.lossless[index])


@dataclass
class ImageSource:
    """A named data set: train, val and test splits and the names of the label indices."""

    name: str
    option: str  # what --dataset is for it; of a folder its whole path
    train: Split
    val: Split
    test: Split
    classes: list

    def sha256(self):
        """Of pixels, labels, kinds of files and order of all three splits, as hexadecimal text."""
        digest = hashlib.sha256()
        for split in (self.train, self.val, self.test):
            for tensor in (split.images, split.labels, split.lossless):
                digest.update(str(tuple(tensor.shape)).encode())
                digest.update(tensor.numpy())
        return digest.hexdigest()


def load_images(dataset, data_dir="./data", seed=42):
    """Loads an image source.

    Args:
        dataset: "cifar10", "photos", or the path of a folder with train/ and test/.
        data_dir: where CIFAR-10 is or gets downloaded to.
        seed: of the random train/validation split (photos are split by photograph instead).

    Returns:
        ImageSource.

    Raises:
        UserError: the images cannot be had; the message names a way out.
    """
    if dataset == "photos":
        return _load_photos()
    if dataset == "cifar10":
        return _load_cifar10(data_dir, seed)
    return _load_folder(Path(dataset), seed)


def _divide(split, groups, seed):
    """Random train/validation split that keeps images of one group (crops of a file) together."""
    count = int(groups.max()) + 1
    held_out = max(1, int(count * VALIDATION_SHARE))
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    is_val = torch.isin(groups, order[:held_out])
    return split[~is_val], split[is_val]


def _load_cifar10(data_dir, seed):
    from torchvision.datasets import CIFAR10  # takes a second to import, and only CIFAR needs it

    try:
        sets = [CIFAR10(data_dir, train=train, download=True) for train in (True, False)]
    except (OSError, RuntimeError) as error:  # URLError and HTTPError are OSErrors
        raise UserError(
            f"CIFAR-10 is not in {data_dir} and could not be downloaded ({error}); use "
            "--dataset photos, which needs no download, or --dataset FOLDER with your own images"
        ) from None
    splits = []
    for data in sets:
        images = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()
        splits.append(Split(images, torch.tensor(data.targets), torch.ones(len(images)) > 0))
    train, val = _divide(splits[0], torch.arange(len(splits[0])), seed)
    return ImageSource("CIFAR-10", "cifar10", train, val, splits[1], sets[0].classes)


def _crops(image, stride, most=None):
    """[h, w, 3] -> [n, 32, 32, 3]: crops on a grid of that stride; evenly spread ones of many."""
    windows = np.lib.stride_tricks.sliding_window_view(image, (SIZE, SIZE), axis=(0, 1))
    windows = windows[::stride, ::stride]  # [rows, columns, 3, 32, 32], nothing copied yet
    count = windows.shape[0] * windows.shape[1]
    chosen = np.linspace(0, count - 1, min(count, most or count)).astype(int)
    return windows[np.unravel_index(chosen, windows.shape[:2])].transpose(0, 2, 3, 1)


def _load_photos():
    classes = [name for names in PHOTOS.values() for name in names]
    splits = {}
    for part, names in PHOTOS.items():
        stride = SIZE // 4 if part == "train" else SIZE // 2
        images, labels = [], []
        for name in names:
            photo = getattr(skimage.data, name)()
            photo = photo[0] if name == "stereo_motorcycle" else photo  # the left view
            for scale in (3, 4, 6, 8):  # thumbnails, as busy as CIFAR's
                small = downscale_local_mean(photo.astype(np.float32), (scale, scale, 1))
                if min(small.shape[:2]) >= SIZE:
                    images.append(_crops(small.round().astype(np.uint8), stride))
                    labels += [classes.index(name)] * len(images[-1])
        images = torch.from_numpy(np.concatenate(images)).permute(0, 3, 1, 2).contiguous()
        splits[part] = Split(images, torch.tensor(labels), torch.ones(len(images)) > 0)
    return ImageSource("photos", "photos", **splits, classes=classes)


def read_image(path):
    """Reads a file as uint8 RGB [h, w, 3]: grey becomes colour, alpha is laid over white.

    Returns:
        (array, whether the file stores it without loss).

    Raises:
        Exception: of any kind: it is no image of FORMATS, damaged, or of values of unknown range.
    """
    if not os.path.isfile(path):  # a pipe would be waited for
        raise ValueError("no file, or a link to none")
    Image.init()
    formats = [kind for kind in FORMATS if kind in Image.OPEN]  # not every Pillow has all
    # As a file, since by name Pillow reads some turned TIFFs as stripes.
    with open(path, "rb") as file, Image.open(file, formats=formats) as image:
        kind, lossless = image.format, stored_lossless(image, file)
        if kind == "TIFF":
            check_tiff(image.tag_v2)
        image = ImageOps.exif_transpose(image)
        # Pillow has 16 bits in one of these modes, depending on its release.
        if image.mode.startswith("I;16") or (image.mode == "I" and kind in ("PNG", "PPM")):
            image = Image.fromarray((np.asarray(image).astype(np.int64) // 257).astype(np.uint8))
        elif image.mode in ("I", "F"):
            raise ValueError("32 bits per value, of a range that the file does not tell")
        if image.has_transparency_data:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image)
        return np.asarray(image if image.mode == "RGB" else image.convert("RGB")), lossless


def stored_lossless(image, file):
    """Whether an opened image's file stores its pixels without loss; its name does not tell."""
    if image.format == "TIFF":
        return image.info.get("compression") not in ("jpeg", "tiff_jpeg", "webp")
    if image.format == "WEBP":
        file.seek(12)
        return file.read(4) == b"VP8L"
    return image.format in LOSSLESS


def check_tiff(tags):
    """Raises a ValueError for layouts of which Pillow makes other values than the file's."""
    bits, photometric, planar = (tags.get(tag) for tag in (258, 262, 284))
    bits = set(bits) if isinstance(bits, tuple) else {bits or 1}
    if not bits <= {1, 2, 4, 8, 16, 32}:
        raise ValueError(f"TIFF of {', '.join(map(str, sorted(bits)))} bits; save it with 8 or 16")
    if bits == {16} and (photometric == 0 or planar == 2):
        raise ValueError("TIFF of 16 bits, inverted or in planes; save it in another way")


def list_images(folder):
    """All files below a folder, sorted, links followed, hidden files and folders left out.

    Raises:
        UserError: a part of it cannot be read.
    """

    def refuse(error):
        raise UserError(f"cannot read {error.filename}: {error.strerror}") from None

    found, seen = [], set()
    for root, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        place = os.path.realpath(root)
        folders[:] = [] if place in seen else [n for n in folders if not n.startswith(".")]
        names = [] if place in seen else names
        seen.add(place)
        found += [Path(root, name) for name in names if not name.startswith(".")]
    return sorted(found)


def _load_folder(folder, seed):
    if not folder.is_dir():
        raise UserError(
            f"--dataset {folder}: no such folder; name one with train/ and test/ image files, "
            "or use cifar10 or photos"
        )
    for part in ("train", "test"):
        if not (folder / part).is_dir():
            raise UserError(f"{folder} has no {part}/ folder; put {part} images into it")
    paths = {part: list_images(folder / part) for part in ("train", "test")}
    # The class of a file is its sub-folder of train/ or test/, where it has one.
    class_of = {
        path: path.relative_to(folder / part).parts[0] if path.parent != folder / part else ""
        for part in paths
        for path in paths[part]
    }
    class_of = {path: printable(name) for path, name in class_of.items()}
    classes = sorted(set(class_of.values()))
    whole, groups = _read_split(folder / "train", paths["train"], class_of, classes)
    train, val = _divide(whole, groups, seed)
    test, _ = _read_split(folder / "test", paths["test"], class_of, classes)
    name = printable(f"folder {folder.resolve().name}")
    return ImageSource(name, str(folder.resolve()), train, val, test, classes)


def _read_split(folder, paths, class_of, classes):
    """(Split, int64 [n], the file that each image is from) of image files."""
    images, labels, lossless, files, skipped = [], [], [], [], []
    for path in tqdm(paths, f"reading {folder.name}", unit="file", leave=False, disable=None):
        try:
            image, kept_all = read_image(path)
            if min(image.shape[:2]) < SIZE:
                raise ValueError(f"{image.shape[1]}×{image.shape[0]} pixels, less than {SIZE}")
        except Exception as error:  # decoders have their own for every kind of damage
            skipped.append(f"{path} ({str(error) or type(error).__name__})")
            continue
        crops = _crops(image, SIZE, CROPS_PER_FILE)
        images.append(crops)
        labels += [classes.index(class_of[path])] * len(crops)
        lossless += [kept_all] * len(crops)
        files += [len(images) - 1] * len(crops)
    if skipped:
        named = "; ".join(skipped[:5]) + ("; …" if len(skipped) > 5 else "")
        count = f"{len(skipped)} of {len(paths)} files in {folder}"
        print(printable(f"warning: skipped {count}: {named}"), file=sys.stderr)
    if len(images) < (2 if folder.name == "train" else 1):
        raise UserError(
            f"{folder} holds {len(images)} readable image files of at least {SIZE}×{SIZE} pixels; "
            "training takes 2 or more and testing 1"
        )
    images = torch.from_numpy(np.concatenate(images)).permute(0, 3, 1, 2).contiguous()
    return Split(images, torch.tensor(labels), torch.tensor(lossless)), torch.tensor(files)
