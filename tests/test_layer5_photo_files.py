"""Layer 5, files of photographs: how they are turned, compressed and what else they say."""

import numpy as np
import pytest
from PIL import Image, ImageOps

from conftest import write_images
from images.photo_files import read_photo, read_rgb, write_photo

TURNED = [(suffix, "RGB") for suffix in ("jpg", "png", "webp", "tif")]
TURNED += [("tif", mode) for mode in ("L", "RGBA", "CMYK", "I;16")]


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize(("suffix", "mode"), TURNED)
def test_every_orientation_is_turned_as_pillow_turns_it(tmp_path, suffix, mode, orientation):
    pixels = np.random.default_rng(0).integers(0, 65536, (32, 40), np.uint16)
    image = Image.fromarray(pixels if mode == "I;16" else pixels.astype(np.uint8)).convert(mode)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / f"lying.{suffix}")
    image.save(tmp_path / f"turned.{suffix}", exif=exif)
    lying, turned = (read_rgb(tmp_path / f"{name}.{suffix}")[0] for name in ("lying", "turned"))
    expected = Image.fromarray(lying)
    expected.getexif()[0x0112] = orientation
    assert np.array_equal(turned, np.asarray(ImageOps.exif_transpose(expected)))


@pytest.mark.parametrize("suffix", [".jpg", ".webp"])
def test_formats_with_loss_are_written_at_quality_95(tmp_path, suffix):
    (path,) = write_images(tmp_path, 1, size=(40, 32))
    write_photo(read_photo(path), tmp_path / f"ours{suffix}")
    Image.open(path).save(tmp_path / f"pillow{suffix}", quality=95)
    ours, pillow = ((tmp_path / f"{name}{suffix}").read_bytes() for name in ("ours", "pillow"))
    assert ours == pillow
