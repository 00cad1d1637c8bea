"""Where the images come from: CIFAR-10, photographs inside scikit-image, or any image folder.

Each source gives the three splits as uint8 tensors [n, 3, 32, 32] and the name that every result
carries. `load_images` is the door.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import skimage.data
import torch
from PIL import Image, ImageOps
from skimage.transform import downscale_local_mean
from tqdm import tqdm

from experiment.user_errors import UserError

SIZE = 32  # side of every image, pixels
VALIDATION_SHARE = 0.2  # CIFAR-10: 40,000 / 10,000 of the 50,000 training images
CROPS_PER_FILE = 64  # at most, from one large image of a folder
LOSSY_SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".avif"}
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
    train: Split
    val: Split
    test: Split
    classes: list


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
    return ImageSource("CIFAR-10", train, val, splits[1], sets[0].classes)


def _crops(image, stride):
    """[h, w, 3] -> [n, 32, 32, 3]: all crops on a grid of that stride."""
    windows = np.lib.stride_tricks.sliding_window_view(image, (SIZE, SIZE), axis=(0, 1))
    return windows[::stride, ::stride].reshape(-1, 3, SIZE, SIZE).transpose(0, 2, 3, 1)


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
    return ImageSource("photos", **splits, classes=classes)


def read_image(path):
    """Reads a file as uint8 RGB [h, w, 3]: grey becomes colour, alpha is laid over white.

    Raises:
        OSError, ValueError, SyntaxError: it is no image, or its values have no known range.
    """
    with Image.open(path) as image:
        is_png = image.format == "PNG"
        image = ImageOps.exif_transpose(image)
        # Pillow releases differ in the mode that they give a PNG of 16 bits.
        if image.mode.startswith("I;16") or (image.mode == "I" and is_png):
            image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
        elif image.mode in ("I", "F"):
            raise ValueError("32 bits per value, of a range that the file does not tell")
        if image.has_transparency_data:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image)
        return np.asarray(image.convert("RGB"))


def _load_folder(folder, seed):
    if not folder.is_dir():
        raise UserError(
            f"--dataset {folder}: no such folder; name one with train/ and test/ image files, "
            "or use cifar10 or photos"
        )
    parts = {}
    for part in ("train", "test"):
        if not (folder / part).is_dir():
            raise UserError(f"{folder} has no {part}/ folder; put {part} images into it")
        parts[part] = sorted(
            p for p in (folder / part).rglob("*") if p.is_file() and not p.name.startswith(".")
        )
    # The class of a file is its sub-folder of train/ or test/, where it has one.
    class_of = {
        path: path.relative_to(folder / part).parts[0] if path.parent != folder / part else ""
        for part, paths in parts.items()
        for path in paths
    }
    classes = sorted(set(class_of.values()))
    splits, groups = {}, {}
    for part, paths in parts.items():
        images, labels, lossless, files, skipped = [], [], [], [], []
        bar = tqdm(paths, f"reading {part}", unit="file", leave=False, disable=None)
        for path in bar:
            try:
                image = read_image(path)
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                skipped.append(f"{path} ({type(error).__name__})")
                continue
            if min(image.shape[:2]) < SIZE:
                skipped.append(f"{path} ({image.shape[1]}×{image.shape[0]} pixels)")
                continue
            crops = _crops(image, SIZE)
            if len(crops) > CROPS_PER_FILE:
                crops = crops[np.linspace(0, len(crops) - 1, CROPS_PER_FILE).astype(int)]
            images.append(crops)
            labels += [classes.index(class_of[path])] * len(crops)
            lossless += [path.suffix.lower() not in LOSSY_SUFFIXES] * len(crops)
            files += [len(images) - 1] * len(crops)
        if skipped:
            named = ", ".join(skipped[:5]) + (", …" if len(skipped) > 5 else "")
            print(
                f"warning: skipped {len(skipped)} of {len(paths)} files in {folder / part} that "
                f"are no images of at least {SIZE}×{SIZE} pixels: {named}",
                file=sys.stderr,
            )
        if len(images) < (2 if part == "train" else 1):
            raise UserError(
                f"{folder / part} holds {len(images)} readable image files of at least "
                f"{SIZE}×{SIZE} pixels; training takes 2 or more and testing 1"
            )
        images = torch.from_numpy(np.concatenate(images)).permute(0, 3, 1, 2).contiguous()
        splits[part] = Split(images, torch.tensor(labels), torch.tensor(lossless))
        groups[part] = torch.tensor(files)
    train, val = _divide(splits["train"], groups["train"], seed)
    return ImageSource(f"folder {folder.resolve().name}", train, val, splits["test"], classes)
