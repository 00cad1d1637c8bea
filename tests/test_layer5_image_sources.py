"""Layer 5, the sources of images: splits, folders and files of every kind."""

import pickle
import struct
import zlib
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import tifffile
import torch
import torchvision
from PIL import Image, ImageCms

import compare_baselines
from common.user_errors import UserError, reason
from conftest import write_images
from experiment.evaluation import sharpness, ssim
from experiment.recipe import Recipe
from images.degradations import GaussianNoise, SuperResolution
from images.image_sources import LEAST_SIDE, load_images
from images.noisy_images import noisy_splits
from images.photo_files import Photo, read_photo, read_rgb, stored_lossless, write_photo

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()

# Sources -------------------------------------------------------------------------------------


def test_photos_hold_out_whole_photographs(photos):
    labels = [set(split.labels.tolist()) for split in (photos.train, photos.val, photos.test)]
    assert all(labels)
    assert not labels[0] & labels[1] | labels[0] & labels[2] | labels[1] & labels[2]
    assert len(photos.classes) == 6


def test_a_folder_has_classes_splits_and_kinds_of_files(folder):
    source = load_images(str(folder))
    assert source.name == "folder images"
    assert (len(source.train), len(source.val), len(source.test)) == (16, 4, 6)
    assert source.classes == ["a", "b"]
    assert torch.equal(source.test.lossless, source.test.labels == 0)  # b is JPEG
    with Image.open(folder / "test" / "a" / "000.png") as image:
        assert np.array_equal(source.test.images[0].permute(1, 2, 0), np.asarray(image))


def test_split_depends_on_the_seed_alone(folder):
    first, again, other = (load_images(str(folder), seed=s) for s in (1, 1, 2))
    assert torch.equal(first.val.images, again.val.images)
    assert not torch.equal(first.val.images, other.val.images)


def test_large_images_are_cropped_and_their_crops_stay_together(tmp_path):
    for part in ("train", "test"):
        paths = write_images(tmp_path / part, 5, size=(100, 70))
    source = load_images(str(tmp_path))
    assert (len(source.train), len(source.val), len(source.test)) == (4 * 6, 6, 5 * 6)
    crops = [
        [np.asarray(Image.open(path))[y : y + 32, x : x + 32] for y in (0, 32) for x in (0, 32, 64)]
        for path in paths
    ]
    test, held_out = (s.images.permute(0, 2, 3, 1).numpy() for s in (source.test, source.val))
    assert np.array_equal(test, np.concatenate(crops))
    assert any(np.array_equal(held_out, crops_of_one) for crops_of_one in crops)


def test_crops_of_a_huge_image_are_spread_over_it(tmp_path):
    rows = np.arange(640, dtype=np.uint16)[:, None, None] // 3
    image = Image.fromarray(np.broadcast_to(rows, (640, 640, 3)).astype(np.uint8))
    for part in ("train", "test"):
        (tmp_path / part).mkdir()
        for name in "ab":
            image.save(tmp_path / part / f"{name}.png")
    source = load_images(str(tmp_path))
    assert (len(source.train), len(source.val)) == (64, 64)  # one of two files is held out
    first = source.test.images[:64, 0, 0, 0].int()
    assert first[0] == 0 and first[-1] == 608 // 3 and (first.diff() >= 0).all()


@pytest.mark.parametrize(("crop", "held_out"), [(None, 8), (32, 2)])
def test_of_whole_photographs_a_smaller_share_validates(tmp_path, crop, held_out):
    for part in ("train", "test"):
        write_images(tmp_path / part, 40)
    source = load_images(str(tmp_path), crop=crop)
    assert (len(source.train), len(source.val)) == (40 - held_out, held_out)


def test_lossless_files_alone_validate(folder):
    source = load_images(str(folder), seed=4)
    assert not source.val.lossless.all()
    _, val_set, test_set = noisy_splits(source, GaussianNoise(), 0.5)
    assert len(val_set) == source.val.lossless.sum() > 0 and val_set.split.lossless.all()
    assert len(test_set) == len(source.test)


def test_cifar10_is_read_from_its_own_files(tmp_path, monkeypatch):
    """The files' layout, without their content: 4 / 1 split, channels first, right order."""
    folder, labels = tmp_path / "cifar-10-batches-py", [i % 10 for i in range(20)]
    folder.mkdir()
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        data = np.random.default_rng(0).integers(0, 256, (20, 3072), dtype=np.uint8)
        (folder / name).write_bytes(pickle.dumps({"data": data, "labels": labels}))
    names = {"label_names": [f"class{i}" for i in range(10)]}
    (folder / "batches.meta").write_bytes(pickle.dumps(names))
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *_: True)
    source = load_images("cifar10", str(tmp_path))
    assert (len(source.train), len(source.val), len(source.test)) == (80, 20, 20)
    assert np.array_equal(source.test.images.flatten(1), data)
    assert source.test.labels.tolist() == labels
    assert source.name == "CIFAR-10"
    with pytest.raises(UserError, match=r"--crop 96.*CIFAR-10.*32×32"):
        load_images("cifar10", str(tmp_path), crop=96)


# Files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "CMYK", "1"])
def test_other_colour_modes_are_converted(tmp_path, mode):
    suffix = ".tif" if mode == "CMYK" else ".png"
    (path,) = write_images(tmp_path, 1, mode=mode, suffix=suffix)
    image, lossless = read_rgb(path)
    assert image.dtype == np.uint8 and lossless
    with Image.open(path) as stored:
        assert np.array_equal(image, np.asarray(stored.convert("RGB")))
    assert image.std() > 10


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_laid_over_white(tmp_path, mode):
    clear = Image.new(mode, (32, 32), {"RGBA": (10, 20, 30, 0), "LA": (10, 0), "P": 3}[mode])
    if mode == "P":
        clear.putpalette([10, 20, 30] * 4)
    clear.save(tmp_path / "clear.png", **({"transparency": 3} if mode == "P" else {}))
    assert (read_rgb(tmp_path / "clear.png")[0] == 255).all()
    if mode != "P":
        clear.putalpha(51)  # a fifth
        clear.save(tmp_path / "clear.png")
        assert read_rgb(tmp_path / "clear.png")[0][0, 0, 0] == 206  # (10 + 4 · 255) / 5


def png_chunk(kind, content):
    checksum = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + checksum


@pytest.mark.parametrize(
    ("colours", "bits"), [(1, 1), (1, 2), (1, 4), (1, 8), (1, 16), (3, 8), (3, 16)]
)
def test_the_one_clear_colour_of_a_png_is_its_alpha(tmp_path, colours, bits):
    dark = [0] if colours == 1 else [1, 0, 0]  # which shares a channel with the clear colour
    values = np.tile([*dark, *[1] * colours], 16)  # of 32 pixels, dark ones and clear ones
    row = np.packbits(values[:, None] >> np.arange(bits)[::-1] & 1).tobytes()
    header = struct.pack(">IIBBBBB", 32, 32, bits, colours - 1, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"tRNS", struct.pack(">H", 1) * colours)]
    chunks += [(b"IDAT", zlib.compress(32 * (b"\0" + row))), (b"IEND", b"")]
    path = tmp_path / "clear.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks))
    photo, most = read_photo(path), 65535 if bits == 16 else 255
    assert photo.pixels.shape == (32, 32, colours) and photo.pixels.max() == most // (2**bits - 1)
    assert (photo.alpha[:, ::2] == most).all() and not photo.alpha[:, 1::2].any()
    image, _ = read_rgb(path)
    assert image[:, ::2].max() <= 1 and (image[:, 1::2] == 255).all()


def test_sixteen_bits_keep_their_brightness(tmp_path):
    values = np.array([0, 200, 256 * 200, 257 * 77, 65534, 65535], dtype=np.uint16)
    for suffix in ("png", "tif", "pgm"):
        cv2.imwrite(str(tmp_path / f"deep.{suffix}"), np.tile(values, (32, 6)))
        image, _ = read_rgb(tmp_path / f"deep.{suffix}")
        assert image[0, :6, 0].tolist() == [0, 1, 199, 77, 255, 255], suffix
    ten_bits = (np.tile([0, 512, 1023], (32, 11))[:, :32]).astype(">u2")
    (tmp_path / "ten.pgm").write_bytes(b"P5 32 32 1023\n" + ten_bits.tobytes())
    assert read_rgb(tmp_path / "ten.pgm")[0][0, :3, 0].tolist() == [0, 128, 255]


@pytest.mark.parametrize(
    ("layout", "shape", "dtype", "words"),
    [
        ({"photometric": "miniswhite"}, (32, 32), np.uint16, "16 bits"),
        ({"photometric": "rgb", "planarconfig": "separate"}, (3, 32, 32), np.uint16, "16 bits"),
        ({"photometric": "rgb", "extrasamples": [1]}, (32, 32, 4), np.uint16, "16 bits"),
        ({}, (32, 32), np.float32, "of a range"),
        ({}, (32, 32), np.int32, "of a range"),
    ],
)
def test_tiffs_of_which_other_values_would_be_read_are_refused(
    tmp_path, layout, shape, dtype, words
):
    tifffile.imwrite(tmp_path / "odd.tif", np.full(shape, 9000, dtype), **layout)
    with pytest.raises(ValueError, match=words):
        read_rgb(tmp_path / "odd.tif")


def test_the_decoder_tells_whether_a_file_is_lossless(tmp_path):
    (path,) = write_images(tmp_path, 1)
    image = Image.open(path)
    for name, options, lossless in (
        ("a.JPG", {"format": "JPEG"}, False),
        ("jpeg_inside.png", {"format": "JPEG"}, False),
        ("jpeg_inside.tif", {"compression": "jpeg"}, False),
        ("packed.tif", {"compression": "tiff_lzw"}, True),
        ("a.webp", {"lossless": True}, True),
        ("b.webp", {}, False),
        ("h.webp", {"lossless": True, "icc_profile": b"odd"}, True),  # in the extended format
        ("i.webp", {"icc_profile": b"odd"}, False),
        ("a.jp2", {}, False),
        ("a.bmp", {}, True),
    ):
        image.save(tmp_path / name, **options)
        assert read_rgb(tmp_path / name)[1] == lossless, name
    assert not stored_lossless(SimpleNamespace(format="TIFF", info={"compression": "webp"}), None)


# Files that cannot be used -------------------------------------------------------------------


def test_no_part_of_a_folder_is_left_out_in_silence(folder, tmp_path, capsys):
    write_images(tmp_path / "elsewhere", 3)
    (folder / "test" / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "test" / "linked" / "round").symlink_to(folder / "test")
    (folder / "test" / "a" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    write_images(folder / "test" / ".ipynb_checkpoints", 2)
    source = load_images(str(folder))
    assert source.classes == ["a", "b", "linked"]
    assert len(source.test) == 6 + 3
    assert "gone.png" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (lambda f: [p.unlink() for p in (f / "train").rglob("*.*")], "holds 0 readable"),
        (lambda f: [p.write_text("x") for p in (f / "test").rglob("*.*")], "skipped 6 of 6"),
        (lambda f: (f / "test").rename(f / "exam"), "has no test/ folder"),
    ],
)
def test_a_folder_without_images_is_refused(folder, break_it, words):
    break_it(folder)
    with pytest.raises(UserError, match=words):
        load_images(str(folder))


def test_photographs_smaller_than_the_crop_are_named_and_skipped(tmp_path, capsys):
    for split in ("train", "test"):
        write_images(tmp_path / split, 2, size=(80, 70))
        write_images(tmp_path / split / "small", 1, size=(80, 60))
    source = load_images(tmp_path, crop=64)
    assert [len(split) for split in (source.train, source.val, source.test)] == [1, 1, 2]
    assert "000.png (80×60 pixels, less than 64)" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"at least 128×128.*skipped 3 of 3.*80×60"):
        load_images(tmp_path, crop=128)
    with pytest.raises(UserError, match=r"--crop 1000.*only 512×512"):
        load_images("photos", crop=1000)


@pytest.mark.filterwarnings("error::UserWarning")
def test_unusable_files_are_named_and_skipped(folder, capsys, monkeypatch):
    """One line says so, and nothing but the decoders of images is started."""
    started = "PIL.EpsImagePlugin.Ghostscript"
    monkeypatch.setattr(started, lambda *_, **__: pytest.fail("starts Ghostscript"))
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", 10**5, 10**5, 8, 2, 0, 0, 0))
    for name, content in {
        "program.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n",
        "bomb.png": b"\x89PNG\r\n\x1a\n" + header,
        "cut.png": b"\x89PNG\r\n\x1a\n broken",
        "line\nbreak.txt": b"no image",
    }.items():
        (folder / "train" / "a" / name).write_bytes(content)
    write_images(folder / "train" / "small", 1, size=(31, 40))
    odd_exif = b"Exif\x00\x00MM\x00*\xff\xff\xff\xff"
    Image.new("RGB", (32, 32)).save(folder / "train" / "a" / "exif.png", exif=odd_exif)
    source, warning = load_images(str(folder)), capsys.readouterr().err
    assert len(source.train) + len(source.val) == 21
    assert warning.count("\n") == 1 and "skipped 5 of 26" in warning
    for words in (
        "program.png (no image of",
        "bomb.png (",
        "cut.png (",
        "break.txt (",
        "31×40 pix",
    ):
        assert words in warning


def test_memory_is_not_reserved_for_what_a_damaged_file_claims(tmp_path, monkeypatch):
    """OpenCV would, also of 2 GB."""
    path = tmp_path / "deep.png"
    Image.fromarray(np.zeros((32, 32), np.uint16)).save(path)
    content = path.read_bytes()
    end = content.index(b"IEND") - 4
    path.write_bytes(content[:end] + struct.pack(">I", 2**31 - 1) + b"IDAT")
    monkeypatch.setattr(cv2, "imdecode", lambda *_: pytest.fail("is asked to"))
    with pytest.raises(OSError, match="Truncated"):
        read_rgb(path)


def test_what_a_format_cannot_hold_is_one_sentence(tmp_path):
    photo = Photo(np.zeros((1, 70_000, 3), np.uint8))  # encoders have exceptions of their own
    with pytest.raises(UserError, match=r"cannot write .*wide.gif: .*; name a .png file"):
        write_photo(photo, tmp_path / "wide.gif")


def test_a_stumbling_decoder_speaks_of_damage(tmp_path):
    """A PNG of 16 bits without pixels: "list index out of range" says nothing to its owner."""
    Image.fromarray(np.full((32, 32), 9000, np.uint16)).save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(content[:33] + content[-12:])
    with pytest.raises(Exception) as caught:
        read_rgb(tmp_path / "a.png")
    assert reason(caught.value).startswith("damaged")
    assert reason(ValueError("too wide")) == "too wide" and "memory" in reason(MemoryError())


@pytest.mark.parametrize("suffix", [".png", ".tif", ".jpg", ".webp"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("alpha", [False, True])
def test_what_is_written_can_be_read(tmp_path, suffix, dtype, channels, alpha):
    """With profile and alpha, or it is refused; values stay where the format has no loss."""
    values = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, (7, 5, 4), dtype)
    pixels, profile = values[:, :, :channels], SRGB
    if channels == 1:
        profile = SRGB[:16] + b"GRAY" + SRGB[20:]
    path = tmp_path / f"a{suffix}"
    photo = Photo(pixels, values[:, :, 3:] if alpha else None, profile)
    if (dtype == np.uint16 and suffix in (".jpg", ".webp")) or (alpha and suffix == ".jpg"):
        with pytest.raises(UserError, match="name a"):
            write_photo(photo, path)
        return
    write_photo(photo, path)
    found = read_photo(path)
    assert found.pixels.dtype == dtype and (found.alpha is not None) == alpha
    assert not alpha or (found.alpha == photo.alpha).all()
    # Grey becomes colour where no such file is read by Pillow, without its profile.
    grey = suffix != ".webp" and not (suffix == ".tif" and alpha and dtype == np.uint16)
    assert found.pixels.shape[2] == (channels if grey else 3)
    assert found.icc_profile == (profile if grey or channels == 3 else None)
    with Image.open(path) as image:
        assert image.info.get("icc_profile") == found.icc_profile
    if suffix in (".png", ".tif"):
        assert (found.pixels == pixels).all()


def test_of_a_damaged_file_no_decoder_speaks_by_itself(tmp_path, capfd):
    tifffile.imwrite(tmp_path / "a.tif", np.full((32, 32), 9000, np.uint16))
    (tmp_path / "a.tif").write_bytes((tmp_path / "a.tif").read_bytes()[:1000])
    cv2.utils.logging.setLogLevel(3)
    with pytest.raises(ValueError, match="damaged"):
        read_photo(tmp_path / "a.tif")
    assert not capfd.readouterr().err


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_photographs_too_small_for_the_figures_are_skipped(tmp_path, capsys, scale):
    """SSIM has windows of 7×7; a training would find out in its test, at the very end."""
    for part in ("train", "test"):
        for side in (LEAST_SIDE - 1, LEAST_SIDE, LEAST_SIDE + 1):
            write_images(tmp_path / part / str(side), 1, size=(40, side))
    recipe = Recipe(SuperResolution(scale), crop=scale)
    _, _, test_set = recipe.splits(load_images(tmp_path, crop=scale))
    assert len(test_set) == 2 and "(40×11 pixels, less than 12)" in capsys.readouterr().err
    for degraded, clean, _ in test_set.batches():
        x, y = degraded[0].numpy(), clean[0].numpy()
        assert np.isfinite([ssim(x, y), sharpness(x, y)]).all()
        assert np.isfinite(compare_baselines.special_psnr(test_set.degradation, x, x, y))
