"""Where the images come from: CIFAR-10, photographs inside scikit-image, or any image folder.

Each source gives three splits and the name that every result carries. Their images are thumbnails
of 32×32 pixels, or, for training on crops, photographs as large as they are. `load_images` is the
door.
"""

import hashlib
import os
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import skimage.data
import torch
from skimage.transform import downscale_local_mean
from tqdm import tqdm

from common.user_errors import UserError, printable, reason
from images.image_cache import remembered
from images.photo_files import read_rgb

SIZE = 32  # side of a thumbnail, pixels
LEAST_SIDE = 12  # of a photograph: SSIM has windows of 7×7, super-resolution leaves out a border
VALIDATION_SHARE = 0.2  # CIFAR-10: 40,000 / 10,000 of the 50,000 training images
WHOLE_VALIDATION_SHARE = 0.05  # of photographs, which have thousands of times the pixels
CROPS_PER_FILE = 64  # at most, from one large image of a folder
# Whole photographs per split, so that no test crop has a neighbour among the training crops.
PHOTOS = {
    "train": ("astronaut", "stereo_motorcycle", "immunohistochemistry"),
    "val": ("rocket",),
    "test": ("chelsea", "coffee"),
}


@dataclass
class Split:
    """Images of one split."""

    images: torch.Tensor | list  # uint8 [n, 3, h, w], or n of [3, h, w] of sizes that differ
    labels: torch.Tensor  # int64 [n], the class index (for photos, the photograph's)
    lossless: torch.Tensor  # bool [n], False where the image was stored with lossy compression

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        images = self.images
        if isinstance(images, list):
            images = [images[i] for i in torch.arange(len(images))[index].tolist()]
        else:
            images = images[index]
        return Split(images, self.labels[index], self.lossless[index])


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
            images = split.images if isinstance(split.images, list) else [split.images]
            for tensor in (*images, split.labels, split.lossless):
                digest.update(str(tuple(tensor.shape)).encode())
                digest.update(tensor.numpy())
        return digest.hexdigest()


def load_images(dataset, data_dir="./data", seed=42, crop=None, test_only=False):
    """Loads an image source.

    Args:
        dataset: "cifar10", "photos", or the path of a folder with train/ and test/.
        data_dir: where CIFAR-10 is or gets downloaded to, and where the thumbnails of a large
            folder are kept.
        seed: of the random train/validation split (photos are split by photograph instead).
        crop: side of the crops that training draws; photographs, also those of a folder, then stay
            whole. None makes thumbnails of them.
        test_only: of a folder, read the test images alone: those in test/ or, without such a
            folder, all that it holds.

    Returns:
        ImageSource.

    Raises:
        UserError: the images cannot be had, or are smaller than a crop; the message names a way
            out.
    """
    if dataset == "photos":
        return _load_photos(crop)
    if dataset != "cifar10":
        return _load_folder(Path(dataset), data_dir, seed, crop, test_only)
    if crop and crop > SIZE:
        raise UserError(f"--crop {crop}: the images of CIFAR-10 have {SIZE}×{SIZE} pixels")
    return _load_cifar10(data_dir, seed)


def _divide(split, groups, seed, share=VALIDATION_SHARE):
    """Random train/validation split that keeps images of one group (crops of a file) together."""
    count = int(groups.max()) + 1
    held_out = max(1, int(count * share))
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


def _load_photos(crop):
    classes = [name for names in PHOTOS.values() for name in names]
    splits = {}
    for part, names in PHOTOS.items():
        stride = SIZE // 4 if part == "train" else SIZE // 2
        images, labels = [], []
        for name in names:
            photo = getattr(skimage.data, name)()
            photo = photo[0] if name == "stereo_motorcycle" else photo  # the left view
            before = len(images)
            if crop and min(photo.shape[:2]) < crop:
                raise UserError(
                    f"--crop {crop}: {name}, one of the photographs inside scikit-image, has only "
                    f"{photo.shape[1]}×{photo.shape[0]} pixels"
                )
            if crop:
                images.append(photo)
            for scale in () if crop else (3, 4, 6, 8):  # thumbnails, as busy as CIFAR's
                small = downscale_local_mean(photo.astype(np.float32), (scale, scale, 1))
                if min(small.shape[:2]) >= SIZE:
                    images.extend(_crops(small.round().astype(np.uint8), stride))
            labels += [classes.index(name)] * (len(images) - before)
        splits[part] = _split(images, labels, [True] * len(images), crop)
    return ImageSource("photos", "photos", **splits, classes=classes)


def _split(images, labels, lossless, crop):
    """Split of arrays [h, w, 3], whole ones for training on crops, otherwise all of a size."""
    if crop:
        images = [torch.tensor(image).permute(2, 0, 1).contiguous() for image in images]
    else:
        images = torch.from_numpy(np.asarray(images)).permute(0, 3, 1, 2).contiguous()
    return Split(images, torch.tensor(labels), torch.as_tensor(lossless))


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


def _load_folder(folder, data_dir, seed, crop, test_only):
    if not os.path.isdir(folder):
        raise UserError(
            f"--dataset {folder}: no such folder; name one with train/ and test/ image files, "
            "or use cifar10 or photos"
        )
    parts = {"test": folder / "test"} | ({} if test_only else {"train": folder / "train"})
    if test_only and not os.path.isdir(parts["test"]):
        parts["test"] = folder
    for part, place in parts.items():
        if not os.path.isdir(place):
            raise UserError(f"{folder} has no {part}/ folder; put {part} images into it")
    paths = {part: list_images(place) for part, place in parts.items()}
    # The class of a file is its sub-folder of train/ or test/, where it has one.
    class_of = {
        path: path.relative_to(place).parts[0] if path.parent != place else ""
        for part, place in parts.items()
        for path in paths[part]
    }
    class_of = {path: printable(name) for path, name in class_of.items()}
    classes = sorted(set(class_of.values()))
    train = val = None
    if not test_only:
        share = WHOLE_VALIDATION_SHARE if crop else VALIDATION_SHARE
        both = _read_split(parts["train"], paths["train"], class_of, classes, crop, 2, data_dir)
        train, val = _divide(*both, seed, share)
    test, _ = _read_split(parts["test"], paths["test"], class_of, classes, crop, 1, data_dir)
    name = printable(f"folder {folder.resolve().name}")
    return ImageSource(name, str(folder.resolve()), train, val, test, classes)


def least_side(crop):
    """Of an image that can be used, pixels."""
    return max(crop, LEAST_SIDE) if crop else SIZE


def _read_split(folder, paths, class_of, classes, crop, fewest, data_dir):
    """(Split, int64 [n], the file that each image is from) of image files, of `fewest` at least."""
    decode = partial(_decode, folder, paths, crop)
    of_these = partial(_can_be_decoded_from, folder, paths)
    found = decode() if crop else remembered(paths, data_dir, decode, of_these)
    skipped = ""
    if len(found["skipped"]):
        named = "; ".join(found["skipped"][:5]) + ("; …" if len(found["skipped"]) > 5 else "")
        skipped = f"skipped {len(found['skipped'])} of {len(paths)} files in {folder}: {named}"
    files, group = np.unique(found["files"], return_inverse=True)
    if len(files) < fewest:
        least = least_side(crop)
        raise UserError(
            f"{folder} holds {len(files)} readable image files of at least "
            f"{least}×{least} pixels; training takes 2 or more and testing 1"
            + (f" ({skipped})" if skipped else "")
        )
    if skipped:
        print(printable(f"warning: {skipped}"), file=sys.stderr)
    labels = [classes.index(class_of[paths[file]]) for file in found["files"]]
    return _split(found["images"], labels, found["lossless"], crop), torch.from_numpy(group)


def _can_be_decoded_from(folder, paths, found):
    """Whether `found` is what `_decode` makes of these files today.

    Those that were skipped are tried again: there may be more memory now, or another decoder.
    """
    images, files, lossless, skipped = (
        found[name] for name in ("images", "files", "lossless", "skipped")
    )
    kinds = [(images.dtype, images.shape[1:]), files.dtype, lossless.dtype, skipped.dtype.kind]
    return (
        kinds == [(np.uint8, (SIZE, SIZE, 3)), np.int64, bool, "U"]
        and files.shape == lossless.shape == images.shape[:1]
        and skipped.ndim == 1
        and (np.diff(files, prepend=0) >= 0).all()
        and (files < len(paths)).all()
        and not len(_decode(folder, np.delete(paths, files).tolist(), None)["files"])
    )


def _decode(folder, paths, crop):
    """What image files hold: "images", whole where there is a crop, otherwise [n, 32, 32, 3]; for
    each the index of its file, "files", and whether that is "lossless"; which were "skipped".
    """
    images, lossless, files, skipped, least = [], [], [], [], least_side(crop)
    for index, path in enumerate(
        tqdm(paths, f"reading {folder.name}", unit="file", leave=False, disable=None)
    ):
        try:
            image, kept_all = read_rgb(path)
            if min(image.shape[:2]) < least:
                raise ValueError(f"{image.shape[1]}×{image.shape[0]} pixels, less than {least}")
        except Exception as error:
            skipped.append(f"{path} ({reason(error)})")
            continue
        parts = [image] if crop else _crops(image, SIZE, CROPS_PER_FILE)
        images.extend(parts)
        lossless += [kept_all] * len(parts)
        files += [index] * len(parts)
    if not crop:
        images = np.stack(images) if images else np.empty((0, SIZE, SIZE, 3), np.uint8)
    files, lossless = np.array(files, np.int64), np.array(lossless, bool)
    return {
        "images": images,
        "files": files,
        "lossless": lossless,
        "skipped": np.array(skipped, str),
    }
