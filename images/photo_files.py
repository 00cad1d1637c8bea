"""Image files: reading them with all that a photograph brings along, and writing them."""

import contextlib
import os
import struct
import warnings
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import cv2
import numpy as np
import tifffile
import torch
from PIL import Image, PngImagePlugin, UnidentifiedImageError

from common.safe_files import replace_when_complete
from common.user_errors import UserError
from images.degradations import pull_push
from images.photo_tags import ORIENTATION, Tags, adobe_rgb_profile, is_adobe_rgb, read_tags

# Read by Pillow itself: others, such as EPS, start programs.
with contextlib.suppress(ImportError):
    from pillow_heif import register_heif_opener

    register_heif_opener()
FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "MPO", "JPEG2000", "AVIF", "HEIF")
LOSSLESS = ("PNG", "BMP", "GIF", "PPM")  # as a rule; TIFF and WebP are asked
WRITTEN = (".png", ".tif", ".tiff", ".jpg", ".jpeg", ".webp")  # others lose alpha or profile
OPENED = ("L", "LA", "RGB", "RGBA", "I;16")  # modes of images that Pillow has opened
MOSAIC = 32803  # photometric interpretation of TIFF: a colour filter array


@dataclass
class Photo:
    """An image as its file has it, turned upright."""

    pixels: np.ndarray  # uint8 or uint16, [h, w, 3], or [h, w, 1] where it is grey
    alpha: np.ndarray | None = None  # [h, w, 1] of the same dtype
    icc_profile: bytes | None = None
    lossless: bool = True  # whether the file stores it without loss
    frames: int = 1  # of the file, or pages, of which it is the first
    tags: Tags = field(default_factory=Tags)

    def array(self) -> np.ndarray:
        """The pixels and, where there is one, alpha: [h, w, 1 to 4]."""
        if self.alpha is None:
            return self.pixels
        return np.concatenate([self.pixels, self.alpha], axis=2)


def read_photo(path: Path | str) -> Photo:
    """Reads an image file of FORMATS; palettes, CMYK and other colours become RGB.

    Raises an Exception of any kind: it is no such image, damaged, or of values of unknown range.
    """
    if not os.path.isfile(path):  # a pipe would be waited for
        raise ValueError("no file, or a link to none")
    Image.init()
    formats = [kind for kind in FORMATS if kind in Image.OPEN]  # not every Pillow has all
    with warnings.catch_warnings(), open(path, "rb") as file:
        warnings.simplefilter("ignore")  # of damaged EXIF, and of a size twice which is refused
        # As a file, since by name Pillow reads some turned TIFFs as stripes.
        try:
            image = Image.open(file, formats=formats)
        except UnidentifiedImageError:
            heic = Path(path).suffix.lower() in (".heic", ".heif") and "HEIF" not in formats
            more = "; pip install pillow-heif reads it" if heic else ""
            known = ", ".join(formats)
            raise ValueError(f"no image of {known}, or of a rare layout{more}") from None
        except Image.DecompressionBombError:
            most = 2 * Image.MAX_IMAGE_PIXELS / 1e6
            raise ValueError(f"more than {most:.0f} megapixels; raise --max-megapixels") from None
        with image:
            refuse_raw(image, file)
            frames = getattr(image, "n_frames", 1) if image.format != "MPO" else 1
            image.seek(0)
            lossless, profile = stored_lossless(image, file), image.info.get("icc_profile")
            profile = profile or (adobe_rgb_profile() if is_adobe_rgb(image) else None)
            deep = is_deep(image, file)
            array = (deep_pixels if deep else plain_pixels)(image, file)
            # Asked now, since Pillow turns TIFFs itself when it reads them, as OpenCV does.
            if not (deep and image.format == "TIFF"):
                array = turned(array, image.getexif().get(ORIENTATION, 1))
            tags = read_tags(image, file)
    has_alpha = array.shape[2] in (2, 4)
    pixels, alpha = np.split(array, [array.shape[2] - has_alpha], axis=2)
    space = {1: b"GRAY", 3: b"RGB "}[pixels.shape[2]]
    if not profile or profile[16:20] != space:  # that of a CMYK file, say
        profile = None
    return Photo(pixels, alpha if has_alpha else None, profile, lossless, frames, tags)


def as_photo(image: Image.Image) -> Photo:
    """The pixels and alpha of an image that Pillow has opened; a ValueError for other modes."""
    has_alpha = image.mode.endswith("A")
    if image.mode not in OPENED or ("transparency" in image.info and not has_alpha):
        other = "RGBA" if image.has_transparency_data else "RGB"
        other = "I;16" if image.mode.startswith("I") else other
        wanted = f"expected mode {', '.join(OPENED)} without a transparent colour"
        raise ValueError(f'{wanted}, got {image.mode}; try image.convert("{other}")')
    array = np.atleast_3d(np.asarray(image))
    return Photo(array[:, :, :-1], array[:, :, -1:]) if has_alpha else Photo(array)


def refuse_raw(image: Image.Image, file: BinaryIO) -> None:
    """Raises a ValueError for a camera's raw file, whose first image is a thumbnail."""
    if image.format != "TIFF":
        return
    tags = image.tag_v2  # 50706 is DNGVersion, 254 NewSubfileType, 262 the photometric one
    raw = 50706 in tags or tags.get(254) == 1 or tags.get(262) == MOSAIC
    if 330 in tags:  # directories below the first
        file.seek(0)
        below = tifffile.TiffFile(file).pages[0].pages
        raw = raw or any(page.photometric == MOSAIC for page in below)
    if raw:
        raise ValueError("a camera's raw file; develop it first, into a TIFF or PNG")


def without_hidden(photo: Photo) -> np.ndarray:
    """The pixels, in which colours that alpha 0 hides are those of what is visible around them."""
    most = np.iinfo(photo.pixels.dtype).max
    image = torch.from_numpy(photo.pixels.astype(np.float32) / most).permute(2, 0, 1)[None]
    visible = torch.from_numpy((photo.alpha > 0).astype(np.float32)).permute(2, 0, 1)[None]
    filled = pull_push(image, visible)[0].permute(1, 2, 0).numpy()
    filled = (filled * most).round().astype(photo.pixels.dtype)
    return np.where(photo.alpha > 0, photo.pixels, filled)


def read_rgb(path: Path | str) -> tuple[np.ndarray, bool]:
    """Reads a file as `read_photo` does, but as uint8 RGB [h, w, 3], and whether it is lossless.

    Grey becomes colour, alpha is laid over white.
    """
    photo = read_photo(path)
    pixels, alpha = photo.pixels, photo.alpha
    if alpha is not None:
        most = np.iinfo(pixels.dtype).max
        share = alpha / np.float32(most)
        pixels = (pixels * share + most * (1 - share)).round().astype(pixels.dtype)
    if pixels.dtype == np.uint16:
        pixels = ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)
    return np.broadcast_to(pixels, (*pixels.shape[:2], 3)), photo.lossless


def stored_lossless(image: Image.Image, file: BinaryIO) -> bool:
    """Whether an opened image's file stores its pixels without loss; its name does not tell."""
    # JPEG 2000 counts as lossy: also of what its reversible wavelet made, a part can be left out.
    if image.format == "TIFF":
        return image.info.get("compression") not in ("jpeg", "tiff_jpeg", "webp")
    if image.format == "WEBP":
        file.seek(12)
        while len(head := file.read(8)) == 8:  # of a chunk: name and size
            if head[:4] in (b"VP8L", b"VP8 "):
                return head[:4] == b"VP8L"
            size = int.from_bytes(head[4:], "little")
            file.seek(size + size % 2, os.SEEK_CUR)
        return False
    return image.format in LOSSLESS


def is_deep(image: Image.Image, file: BinaryIO) -> bool:
    """Whether a PNG or TIFF has 16 bits, of which Pillow drops half where there are colours.

    Raises a ValueError for a TIFF of which Pillow makes other values than the file's.
    """
    if image.format == "PNG":
        file.seek(24)
        return file.read(1) == b"\x10"
    if image.format != "TIFF":
        return False
    tags = (258, 262, 284, 338, 339)
    bits, photometric, planar, extra, signed = (image.tag_v2.get(tag) for tag in tags)
    bits = set(bits) if isinstance(bits, tuple) else {bits or 1}
    if not bits <= {1, 2, 4, 8, 16, 32}:
        shown = ", ".join(map(str, sorted(bits)))  # of a damaged file, thousands
        raise ValueError(f"TIFF of {shown:.60} bits; save it with 8 or 16")
    if 2 in (signed if isinstance(signed, tuple) else (signed,)):
        raise ValueError("TIFF of signed numbers, of a range that the file does not tell")
    premultiplied = extra in (1, (1,))  # colours by alpha, which Pillow undoes for 8 bits
    if bits == {16} and (photometric == 0 or planar == 2 or premultiplied):
        layout = "inverted, in planes or premultiplied"
        raise ValueError(f"TIFF of 16 bits, {layout}; save it in another way")
    return bits == {16}


def deep_pixels(image: Image.Image, file: BinaryIO) -> np.ndarray:
    """uint16 [h, w, C] of a PNG or TIFF opened by Pillow."""
    file.seek(0)
    if image.format == "PNG":  # OpenCV reserves the gigabytes that a damaged chunk claims
        Image.open(file, formats=["PNG"]).verify()
        file.seek(0)
    content = np.frombuffer(file.read(), np.uint8)
    level = cv2.utils.logging.setLogLevel(0)  # of damage it prints pages, and we a sentence
    array = cv2.imdecode(content, cv2.IMREAD_UNCHANGED)
    cv2.utils.logging.setLogLevel(level)
    if array is None or array.dtype != np.uint16:
        raise ValueError("an image of 16 bits that is damaged, or of an unknown layout")
    array = array.reshape(*array.shape[:2], -1)
    if array.shape[2] > 1:
        array = array[:, :, [2, 1, 0, 3][: array.shape[2]]]  # OpenCV has blue first
    if bytes(content[1:4]) == b"PNG" and content[25] == 4:  # grey with alpha
        array = array[:, :, [0, 3]]
    clear = image.info.get("transparency")  # one colour of a PNG; OpenCV passes over a grey one
    if clear is not None:
        opaque = (array[:, :, :3] != clear).any(2, keepdims=True)
        array = np.concatenate([array[:, :, :3], opaque * np.uint16(65535)], axis=2)
    return array


def plain_pixels(image: Image.Image, file: BinaryIO) -> np.ndarray:
    """uint8 [h, w, C] of an image opened by Pillow, or uint16 where it is grey of 16 bits."""
    # Pillow has 16 bits in one of these modes, depending on its release.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        return np.asarray(image).astype(np.uint16)[:, :, None]
    if image.mode in ("I", "F"):
        raise ValueError("32 bits per value, of a range that the file does not tell")
    if image.format == "PNG" and image.mode in "1L" and "transparency" in image.info:
        file.seek(24)  # less than 8 bits, to which Pillow stretches them, but not the clear value
        most = 2 ** file.read(1)[0] - 1
        image.info["transparency"] = (image.info["transparency"] & most) * (255 // most)
    mode = "L" if image.mode in ("1", "L", "LA", "La") else "RGB"
    mode += "A" * image.has_transparency_data
    # Converting to its own mode would copy it, which takes a large one beyond 2 GiB.
    array = np.asarray(image if image.mode == mode else image.convert(mode))
    return array.reshape(*array.shape[:2], -1)


def turned(array: np.ndarray, orientation: int) -> np.ndarray:
    """Applies an EXIF orientation, 1 to 8; of another value, nothing."""
    if orientation in (5, 6, 7, 8):
        array = array.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        array = array[:, ::-1]
    return array[::-1] if orientation in (3, 4, 7, 8) else array


def check_format(photo: Photo, path: Path) -> None:
    """Raises a UserError if the format that the name of the file asks for cannot hold the Photo."""
    deep, suffix = photo.pixels.dtype == np.uint16, path.suffix.lower()
    no_16_bits = deep and suffix not in (".png", ".tif", ".tiff")
    if no_16_bits or (photo.alpha is not None and suffix in (".jpg", ".jpeg")):
        lacks = "16 bits" if no_16_bits else "alpha"
        raise UserError(f"cannot write {path}: {suffix} has no {lacks}; name a .png file")


def write_photo(photo: Photo, path: Path) -> None:
    """Writes a Photo in the format that the file's name asks for, or raises a UserError."""
    check_format(photo, path)
    array, profile, suffix = photo.array(), photo.icc_profile, path.suffix.lower()
    deep, grey = array.dtype == np.uint16, array.shape[2] < 3
    tiff = suffix in (".tif", ".tiff")
    # WebP has no grey, and Pillow reads no TIFF of 16 bits that is grey with alpha: as colours,
    # to which a profile of grey does not belong.
    if grey and (suffix == ".webp" or (tiff and deep and array.shape[2] == 2)):
        array, profile, grey = array[:, :, [0, 0, 0, 1][: array.shape[2] + 2]], None, False
    array = np.ascontiguousarray(array)
    shown = array[:, :, 0] if array.shape[2] == 1 else array
    with replace_when_complete(path) as temporary:
        try:
            if tiff:
                colours = "minisblack" if grey else "rgb"
                extra = ["unassalpha"] if photo.alpha is not None else None
                kind = {"photometric": colours, "extrasamples": extra, "compression": "zlib"}
                if photo.tags.dpi:
                    kind |= {"resolution": photo.tags.dpi, "resolutionunit": "INCH"}
                tifffile.imwrite(temporary, shown, iccprofile=profile, planarconfig=1, **kind)
            elif not deep:
                more = photo.tags.for_pillow() | {"icc_profile": profile}
                if suffix == ".png":
                    more["pnginfo"] = PngImagePlugin.PngInfo()
                    for name, content in photo.tags.png_chunks.items():
                        more["pnginfo"].add(name, content)
                else:
                    more["quality"] = 95
                Image.fromarray(shown).save(temporary, **more)
            else:
                temporary.write_bytes(deep_png(array, profile, photo.tags))
        except Exception as error:  # encoders have their own for every kind of refusal
            if getattr(error, "errno", None):  # of the disk
                raise
            why = str(error) or type(error).__name__
            raise UserError(f"cannot write {path}: {why}; name a .png file") from None


def deep_png(array: np.ndarray, profile: bytes | None, tags: Tags) -> bytes:
    """The bytes of a PNG of uint16 [h, w, C], grey or colours, with alpha or without; neither
    Pillow nor OpenCV writes all of them, nor the profile.
    """
    height, width, channels = array.shape
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    packer, above, packed = zlib.compressobj(3), np.uint8(0), []
    for row in array.reshape(height, -1):  # one by one: an image can be large
        row = row.astype(">u2").view(np.uint8)
        packed.append(packer.compress(b"\2" + (row - above).tobytes()))  # filter 2, "up"
        above = row
    packed.append(packer.flush())
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0))]
    chunks += [(b"iCCP", b"ICC profile\0\0" + zlib.compress(profile))] if profile else []
    chunks += list(tags.png_chunks.items())
    chunks += [(b"eXIf", tags.exif.removeprefix(b"Exif\0\0"))] if tags.exif else []
    if tags.dpi:
        chunks += [(b"pHYs", struct.pack(">IIB", *(round(n / 0.0254) for n in tags.dpi), 1))]
    chunks += [(b"IDAT", part) for part in packed if part]
    content = [b"\x89PNG\r\n\x1a\n"]
    for name, data in (*chunks, (b"IEND", b"")):
        content += [struct.pack(">I", len(data)), name, data]
        content += [struct.pack(">I", zlib.crc32(data, zlib.crc32(name)))]
    return b"".join(content)
