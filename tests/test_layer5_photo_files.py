"""Layer 5, files of photographs: how they are turned, compressed and what else they say."""

import numpy as np
import pytest
from PIL import Image, ImageOps, PngImagePlugin

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


def saved(path, **told):
    Image.new("RGB", (8, 8)).save(path, **told)
    return read_photo(path)


def test_what_stays_of_what_a_file_says(tmp_path):
    """No resolution of 0, no EXIF that a JPEG file has no room for, nor a TIFF's, its layout."""
    chunks = dict.fromkeys((b"gAMA", b"cHRM", b"sRGB", b"cICP"), 32 * b"1")
    exif, info = Image.Exif(), PngImagePlugin.PngInfo()
    exif[0x0110] = "A camera"
    jpeg, png, tiff = (tmp_path / f"a.{suffix}" for suffix in ("jpg", "png", "tif"))
    tags = saved(jpeg, exif=exif, xmp=b"<x/>", dpi=(300, 72)).tags
    assert b"A camera" in tags.exif and (tags.xmp, tags.dpi) == (b"<x/>", (300, 72))
    assert not saved(tiff, exif=exif).tags.exif
    exif[0x0110] = 66_000 * "A"
    for name, content in chunks.items():
        info.add(name, content)
    tags = saved(png, exif=exif, dpi=(0, 0), pnginfo=info).tags
    assert (tags.exif, tags.dpi, tags.png_chunks) == (b"", None, chunks)


@pytest.mark.parametrize(("space", "option"), [(2, ""), (65535, "R03"), (65535, "R98"), (1, "R03")])
def test_colours_of_adobe_rgb_are_told_by_exif(tmp_path, space, option):
    exif = Image.Exif()
    exif.get_ifd(0x8769).update({0xA001: space, 0xA005: {1: option}})
    profile = saved(tmp_path / "a.jpg", exif=exif).icc_profile
    assert bool(profile) == (space == 2 or (space, option) == (65535, "R03"))
