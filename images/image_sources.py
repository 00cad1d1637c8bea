"""Where the images come from: CIFAR-10, photographs inside scikit-image, or any image folder.

They are thumbnails of 32×32 pixels or, for training on crops, photographs as large as they are.
"""

import hashlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import skimage  # imported in parts, when they are first used
import torch
from tqdm import tqdm

from common.user_errors import UserError, counted, printable, reason
from images.image_cache import cached_decode
from images.photo_files import read_rgb

SIZE = 32  # side of a thumbnail, pixels
LEAST_SIDE = 12  # of a photograph: SSIM has windows of 7×7, super-resolution leaves out a border
VALIDATION_SHARE = 0.2  # CIFAR-10: 40,000 / 10,000 of the 50,000 training images
WHOLE_VALIDATION_SHARE = 0.05  # of photographs, which have thousands of times the pixels
CROPS_PER_FILE = 64  # at most, from one large image of a folder
PAIR = ("true", "noisy")  # folders of pairs
FEWEST = "training takes 2 or more and testing 1"
MOST_SHIFT, LEAST_RESPONSE = 1.5, 0.25  # pixels; of a phase correlation that is to be trusted
# Whole photographs per split, so that no test crop has a neighbour among the training crops.
PHOTOS = {
    "train": ("astronaut", "stereo_motorcycle", "immunohistochemistry"),
    "val": ("rocket",),
    "test": ("chelsea", "coffee"),
}


@dataclass
class Split:
    """Images of one split."""

    images: torch.Tensor | list  # uint8 [n, 3, h, w], or n of [3, h, w], of pairs [6, h, w]
    labels: torch.Tensor  # int64 [n], the class index (for photos, the photograph's)
    lossless: torch.Tensor  # bool [n], False where the image was stored with lossy compression
    names: Sequence = ()  # of the files that they are from, where they are from files

    @property
    def paired(self) -> bool:
        """Whether the images are pairs, the true and the noisy one."""
        return len(self) > 0 and len(self.images[0]) == 6

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        chosen = torch.arange(len(self))[index].tolist()
        whole = isinstance(self.images, list)
        images = [self.images[i] for i in chosen] if whole else self.images[index]
        names = [self.names[i] for i in chosen] if self.names else ()
        return Split(images, self.labels[index], self.lossless[index], names)


@dataclass
class ImageSource:
    """A named data set: train, val and test splits and the names of the label indices."""

    name: str
    option: str  # what --dataset is for it; of a folder its whole path
    train: Split
    val: Split
    test: Split
    classes: list

    def nbytes(self) -> int:
        """Of the pixels of all splits, in memory."""
        splits = (split.images for split in (self.train, self.val, self.test) if split)
        return sum(image.nbytes for images in splits for image in images)

    def sha256(self) -> str:
        """Of pixels, labels, kinds of files and order of all three splits, as hexadecimal text."""
        digest = hashlib.sha256()
        for split in (self.train, self.val, self.test):
            images = split.images if isinstance(split.images, list) else [split.images]
            for tensor in (*images, split.labels, split.lossless):
                digest.update(str(tuple(tensor.shape)).encode())
                digest.update(tensor.numpy())
        return digest.hexdigest()


def load_images(
    dataset: str, data_dir: str | Path = "./data", seed=42, crop: int | None = None, test_only=False
) -> ImageSource:
    """Loads an image source.

    Args:
        dataset: "cifar10", "photos", or the path of a folder with train/ and test/.
        data_dir: of CIFAR-10, which may be downloaded, and of the thumbnails of a large folder.
        seed: of the random train/validation split (photos are split by photograph instead).
        crop: side of the crops that training draws from whole photographs; None: thumbnails.
        test_only: of a folder, read test/ alone or, where there is none, all that it holds.

    Raises a UserError if the images cannot be had, or are smaller than a crop.
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


def download_cifar10(data_dir: str | Path, advice: str) -> list:
    """torchvision's training and test set, which are in data_dir or get downloaded there.

    Raises a UserError that ends with the advice if they cannot be had.
    """
    from torchvision.datasets import CIFAR10  # takes a second to import, and only CIFAR needs it

    try:
        return [CIFAR10(data_dir, train=train, download=True) for train in (True, False)]
    except (OSError, RuntimeError) as error:  # URLError and HTTPError are OSErrors
        where = f"CIFAR-10 is not in {data_dir} and could not be downloaded ({error})"
        raise UserError(f"{where}; {advice}") from None


def _load_cifar10(data_dir, seed):
    advice = "use --dataset photos, which needs no download, or your own --dataset FOLDER"
    sets = download_cifar10(data_dir, advice)
    both, test = (_split(data.data, data.targets, [True] * len(data.data), None) for data in sets)
    train, val = _divide(both, torch.arange(len(both)), seed)
    return ImageSource("CIFAR-10", "cifar10", train, val, test, sets[0].classes)


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
        images, labels = [], []
        for name in names:
            photo = getattr(skimage.data, name)()
            photo = photo[0] if name == "stereo_motorcycle" else photo  # the left view
            height, width = photo.shape[:2]
            if crop and min(height, width) < crop:
                raise UserError(
                    f"--crop {crop}: {name}, one of the photographs inside scikit-image, has only "
                    f"{width}×{height} pixels"
                )
            stride = SIZE // 4 if part == "train" else SIZE // 2
            found = [photo] if crop else _thumbnails(photo, stride)
            images.extend(found)
            labels += [classes.index(name)] * len(found)
        splits[part] = _split(images, labels, [True] * len(images), crop)
    return ImageSource("photos", "photos", **splits, classes=classes)


def _thumbnails(photo, stride):
    """Crops of a reduced photograph, as busy as the images of CIFAR-10."""
    steps, reduce = [(n, n, 1) for n in (3, 4, 6, 8)], skimage.transform.downscale_local_mean
    reduced = [reduce(photo.astype(np.float32), step).round() for step in steps]
    large = [image.astype(np.uint8) for image in reduced if min(image.shape[:2]) >= SIZE]
    return np.concatenate([_crops(image, stride) for image in large])


def _split(images, labels, lossless, crop):
    """Split of arrays [h, w, 3], whole ones for training on crops, else all of one size."""
    if crop:
        images = [torch.tensor(image).permute(2, 0, 1).contiguous() for image in images]
    else:
        images = torch.from_numpy(np.asarray(images)).permute(0, 3, 1, 2).contiguous()
    return Split(images, torch.tensor(labels), torch.as_tensor(lossless))


def list_images(folder: Path, strict: bool = True) -> list[Path]:
    """All files below a folder, sorted, links followed, hidden ones left out.

    Raises a UserError if it, or, where that is strict, a folder below it, cannot be read.
    """

    def refuse(error):
        if strict or error.filename == str(folder):
            raise UserError(f"cannot read {error.filename}: {error.strerror}") from None

    found, seen = [], set()
    for root, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        if (place := os.path.realpath(root)) in seen:  # there already, by another link
            folders.clear()
            continue
        seen.add(place)
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(root, name) for name in names if not name.startswith(".")]
    return sorted(found)


def _load_folder(folder, data_dir, seed, crop, test_only):
    parts, paired = _parts_of(folder, crop, test_only)
    paths, class_of = {}, {}
    for part in [part for part in parts if part not in paired]:
        paths[part] = list_images(place := parts[part])
        for path in paths[part]:
            below = path.relative_to(place).parts  # the class is a sub-folder, where there is one
            class_of[path] = printable(below[0]) if len(below) > 1 else ""
        folders = {path.parent.name.lower() for path in paths[part]}
        if folders.issuperset(PAIR):
            right = f"pairs are {place / PAIR[1]} and {place / PAIR[0]}"
            raise UserError(
                f"{place} has folders noisy and true elsewhere; {right}, move them there"
            )
    classes = sorted(set(class_of.values())) or [""]

    def read(part, fewest):
        if part in paired:
            return _read_pairs(parts[part], max(crop, LEAST_SIDE), fewest)
        return _read_split(parts[part], paths[part], class_of, classes, crop, fewest, data_dir)

    train = val = None
    if not test_only:
        share = WHOLE_VALIDATION_SHARE if crop else VALIDATION_SHARE
        train, val = _divide(*read("train", 2), seed, share)
    test, _ = read("test", 1)
    kind = "pairs" if (train or test).paired else "folder"
    name = printable(f"{kind} {folder.resolve().name}")
    return ImageSource(name, str(folder.resolve()), train, val, test, classes)


def _parts_of(folder, crop, test_only):
    """({"test": its folder, "train": its folder unless test_only}, those of them that hold pairs);
    a UserError where one is missing or pairs cannot be used.
    """
    if not os.path.isdir(folder):
        raise UserError(
            f"--dataset {folder}: no such folder; name one with train/ and test/ image files, "
            "or use cifar10 or photos"
        )
    parts = {"test": folder / "test"} | ({} if test_only else {"train": folder / "train"})
    if test_only and not os.path.isdir(parts["test"]):
        parts["test"] = folder
    if has_pairs(folder) and not crop:
        raise UserError(
            f"{folder} holds pairs of photographs, and thumbnails are wanted; take a --recipe, or "
            "a model, for photographs, such as photo"
        )
    for part, place in parts.items():
        if not os.path.isdir(place):
            raise UserError(f"{folder} has no {part}/ folder; put {part} images into it")
    if has_pairs(folder, ["train"]) and not has_pairs(parts["test"], [""]):
        wanted = f"put pairs, noisy/ and true/, into {folder / 'test'}"
        raise UserError(f"{folder / 'train'} holds pairs, which only pairs can test; {wanted}")
    return parts, [part for part, place in parts.items() if has_pairs(place, [""])]


def has_pairs(folder: Path, parts: Sequence[str] = ("", "train", "test")) -> bool:
    """Whether it, or its train/ or test/, holds pairs: noisy/ and true/."""
    return any(os.path.isdir(folder / part / name) for part in parts for name in PAIR)


def _read_pairs(folder, least, fewest):
    """(Split, int64 [n], the number of each) of the pairs below a folder's noisy/ and true/; a
    UserError names one that is none.

    A true and a noisy image are of one size and name, whatever the kind of file; and not shifted.
    """
    true, noisy = (_named(folder / name) for name in PAIR)
    for some, others, name in ((true, noisy, PAIR[1]), (noisy, true, PAIR[0])):
        if alone := sorted(some.keys() - others.keys()):
            partner = f"no file of that name in {folder / name}"
            raise UserError(
                f"{some[alone[0]]} has no partner, {partner}; add it or remove this one"
            )
    if len(true) < fewest:
        raise UserError(f"{folder} holds {counted(len(true), 'pair')}; {FEWEST}; add some")
    images, lossless = [], []
    for name in tqdm(sorted(true), f"reading {folder.name}", leave=False, disable=None):
        files = true[name], noisy[name]
        try:
            (clean, kept), (shot, shot_kept) = map(read_rgb, files)
        except Exception as error:
            raise UserError(f"{files[0]} or {files[1]} cannot be read ({reason(error)})") from None
        sizes = [f"{image.shape[1]}×{image.shape[0]}" for image in (clean, shot)]
        if sizes[0] != sizes[1]:
            raise UserError(f"{files[1]} has {sizes[1]} pixels and its truth {sizes[0]}; crop both")
        if min(clean.shape[:2]) < least:
            raise UserError(f"{files[1]} has {sizes[1]} pixels, less than {least}; remove the pair")
        if shift := shift_of(clean, shot):
            where = "{:.1f} pixels to the right and {:.1f} below".format(*shift)
            raise UserError(f"{files[1]} lies {where} its truth; align the two")
        images.append(np.concatenate([clean, shot], 2))
        lossless.append(kept and shot_kept)
    if beside := [p for p in list_images(folder) if p.relative_to(folder).parts[0] not in PAIR]:
        warning = f"warning: {counted(len(beside), 'file')} beside {folder}/noisy and true"
        print(printable(f"{warning} not read: {beside[0]}"), file=sys.stderr)
    return _split(images, [0] * len(images), lossless, crop=True), torch.arange(len(images))


def _named(folder):
    """{path below a folder, without the kind of file: path} of its images; a UserError if there is
    no such folder.
    """
    if not os.path.isdir(folder):
        raise UserError(f"{folder.parent} has no {folder.name}/ folder; pairs are noisy/ and true/")
    return {path.relative_to(folder).with_suffix(""): path for path in list_images(folder)}


def shift_of(one: np.ndarray, other: np.ndarray) -> tuple[float, float] | None:
    """(x, y) by which a photograph [h, w, 3] lies beside another; None below MOST_SHIFT pixels."""
    grey = [cv2.cvtColor(x, cv2.COLOR_RGB2GRAY).astype(np.float32) for x in (one, other)]
    window = cv2.createHanningWindow(grey[0].shape[::-1], cv2.CV_32F)
    shift, response = cv2.phaseCorrelate(*grey, window)
    return shift if max(map(abs, shift)) > MOST_SHIFT and response > LEAST_RESPONSE else None


def _read_split(folder, paths, class_of, classes, crop, fewest, data_dir):
    """(Split, int64 [n], the file that each image is from) of image files, of `fewest` at least."""
    least = max(crop, LEAST_SIDE) if crop else SIZE  # side of an image that can be used
    decode = partial(_decode, folder, crop=crop, least=least)
    found = decode(paths) if crop else cached_decode(paths, data_dir, decode)
    skipped = found["skipped"]
    named = "; ".join(skipped[:5]) + ("; …" if len(skipped) > 5 else "")
    warning = f"skipped {len(skipped)} of {counted(len(paths), 'file')} in {folder}: {named}"
    files, group = np.unique(found["files"], return_inverse=True)
    if len(files) < fewest:
        raise UserError(
            f"{folder} holds {counted(len(files), 'readable image file')} of at least "
            f"{least}×{least} pixels; " + FEWEST + (f" ({warning})" if len(skipped) else "")
        )
    if len(skipped):
        print(printable(f"warning: {warning}"), file=sys.stderr)
    labels = [classes.index(class_of[paths[file]]) for file in found["files"]]
    split = _split(found["images"], labels, found["lossless"], crop)
    split.names = [str(paths[file]) for file in found["files"]]
    return split, torch.from_numpy(group)


def _decode(folder, paths, crop, least):
    """ "images", whole where there is a crop, else [n, 32, 32, 3], of each the index of its file,
    "files", and whether that is "lossless"; and which were "skipped".
    """
    images, lossless, files, skipped = [], [], [], []
    bar = tqdm(paths, f"reading {folder.name}", unit="file", leave=False, disable=None)
    for index, path in enumerate(bar):
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
        images = np.array(images, np.uint8).reshape(-1, SIZE, SIZE, 3)
    found = {"files": np.array(files, np.int64), "lossless": np.array(lossless, bool)}
    return {"images": images, **found, "skipped": np.array(skipped, str)}
