"""Layer 5, photographs of any size: training on crops, and denoising files of every kind."""

import itertools
import re
import struct
import zlib
from pathlib import Path
from unittest.mock import Mock

import cv2
import numpy as np
import pytest
import skimage.data
import tifffile
import torch
from matplotlib import pyplot as plt
from PIL import Image, ImageCms

import compare_baselines
import debug_evaluation
import denoise_image
import denoising_experiment_proper as experiment
import visualize_proper_results
from conftest import ROOT, assert_refused, interrupted_in_epoch, run_here, same_weights
from experiment import tiling
from experiment.evaluation import psnr
from experiment.tiling import OVERLAP, denoise, windows
from experiment.trained_model import images_for
from images import noisy_images
from images.degradations import GaussianNoise
from images.image_sources import load_images
from images.noisy_images import noisy_splits
from images.photo_files import read_photo
from images.training_batches import training_batches
from small_vit import load_model

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


@pytest.fixture(scope="session")
def photographs(tmp_path_factory):
    """A folder with a model that was trained on crops of a few parts of photographs."""
    path = tmp_path_factory.mktemp("photographs")
    for split, names in (("train", ("astronaut", "coffee", "rocket")), ("test", ("chelsea",))):
        (path / "images" / split).mkdir(parents=True)
        for name in names:
            photo = getattr(skimage.data, name)()
            for left in (100, 230):
                part = Image.fromarray(photo[100:230, left : left + 110])
                part.save(path / "images" / split / f"{name}{left}.png")
    options = ("--recipe", "photographs", "--crop", 32, "--epochs", 2, "--output", "model.pt")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        patch.setattr(noisy_images, "CROPS_PER_PHOTOGRAPH", 8)
        process = run_here(
            experiment,
            *("--dataset", "images", *options, "--batch-size", 4, "--noise-level", "25/255"),
        )
    assert process.returncode == 0, process.stderr
    assert "5 training, 1 validation, 2 test images" in process.stdout
    return path


@pytest.fixture
def clean_up(call, photographs):
    """Runs denoise_image.py with that model, in an empty folder."""
    return lambda *arguments: call(
        denoise_image, "--checkpoint", photographs / "model.pt", *arguments
    )


def noisy_photo(height=100, width=130, sigma=25):
    photo = skimage.data.chelsea()[:height, 100 : 100 + width]
    noise = sigma * np.random.default_rng(0).standard_normal(photo.shape)
    return np.clip(photo + noise, 0, 255).round().astype(np.uint8)


def write_photos(*names):
    """The same noisy photograph, 130×100 pixels, under each name."""
    for name in names:
        Image.fromarray(noisy_photo()).save(name, icc_profile=SRGB)


# Training ------------------------------------------------------------------------------------


def test_training_on_crops_tests_whole_photographs(photographs, call, tmp_path):
    checkpoint = torch.load(photographs / "model.pt", weights_only=True)
    recipe, test = checkpoint["recipe"], checkpoint["test"]
    assert (recipe["crop"], recipe["unclipped"], recipe["train_images"]) == (32, True, 5)
    assert test["images"] == 2 and test["psnr_mean"] > test["noisy_psnr_mean"]
    for script in (debug_evaluation, visualize_proper_results, compare_baselines):
        process = call(script, "--checkpoint", photographs / "model.pt")
        assert process.returncode == 0, process.stdout + process.stderr
    assert "σ = 25/255" in process.stdout
    noisy_row = next(row for row in process.stdout.splitlines() if "noisy input" in row)
    assert float(noisy_row.split("|")[2].split("±")[0]) == pytest.approx(20.17, abs=0.02)


def test_of_photographs_a_detail_is_drawn(photographs, monkeypatch):
    model = load_model(photographs / "model.pt")
    (test_set,) = images_for(model.trained)[1][2:]
    monkeypatch.setattr(visualize_proper_results, "DETAIL", 96)
    figure = visualize_proper_results.draw_images([("m.pt", model)], test_set, {0: 50}, "title")
    titles = [axis.get_title() for axis in figure.axes[:3]]
    assert titles == ["noisy, σ = 25/255 (unclipped)", "denoised", "ground truth"]
    assert [axis.images[0].get_array().shape for axis in figure.axes[:3]] == [(96, 96, 3)] * 3
    noisy, clean, _ = test_set[0]
    figures = f"whole photograph:\n{psnr(noisy.numpy(), clean.numpy()):.2f} dB"
    assert figure.axes[0].get_xlabel().startswith(figures)
    plt.close(figure)


def test_crops_are_parts_of_the_photographs_in_all_eight_symmetries(tmp_path):
    part = np.arange(48 * 40 * 3, dtype=np.uint16).reshape(48, 40, 3) % 251
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        for name in ("a", "b"):
            Image.fromarray(part.astype(np.uint8)).save(tmp_path / split / f"{name}.png")
    source = load_images(tmp_path, crop=32)
    train_set = noisy_splits(source, GaussianNoise(0.1))[0]
    image, found = source.train.images[0], set()
    places = {
        image[:, top : top + 32, left : left + 32].numpy().tobytes(): (top, left)
        for top in range(48 - 31)
        for left in range(40 - 31)
    }
    batches = training_batches(train_set, 16, 0, 1, flip=True, transpose=True, crop=32)
    crops = torch.cat([clean for _, clean, _ in batches])
    assert len(crops) == 64
    for crop, turn in itertools.product((255 * crops).round().byte(), range(4)):
        back = crop.rot90(turn, (1, 2))
        for mirrored, image in ((False, back), (True, back.flip(2))):
            place = places.get(image.contiguous().numpy().tobytes())
            found |= {((turn, mirrored), place)} if place else set()
    assert len({symmetry for symmetry, _ in found}) == 8
    assert len({place for _, place in found}) > 30


def test_a_run_on_crops_goes_on_bit_for_bit(call, photographs, monkeypatch):
    monkeypatch.setattr(noisy_images, "CROPS_PER_PHOTOGRAPH", 2)
    options = ("--dataset", photographs / "images", "--recipe", "photographs", "--crop", 16)
    options += ("--jpeg-share", 0.5, "--epochs", 2, "--batch-size", 4, "--output")
    assert call(experiment, *options, "whole.pt").returncode == 0
    with interrupted_in_epoch(2):
        assert call(experiment, *options, "m.pt").returncode == 130
    assert call(experiment, *options, "m.pt", "--resume").returncode == 0
    whole, resumed = (torch.load(name, weights_only=True) for name in ("whole.pt", "m.pt"))
    assert whole["test"] == resumed["test"]
    assert same_weights(whole["model"], resumed["model"])


# Tiles ---------------------------------------------------------------------------------------


class Blur(torch.nn.Module):
    """A denoiser that sees three pixels in each direction."""

    def __init__(self, reach=3):
        super().__init__()
        self.reach, self.weight = reach, torch.nn.Parameter(torch.zeros(()))

    def forward(self, noisy):
        padded = torch.nn.functional.pad(noisy, [self.reach] * 4, mode="replicate")
        return torch.nn.functional.avg_pool2d(padded, 2 * self.reach + 1, 1), []


@pytest.mark.parametrize("size", [1, 63, 64, 65, 100, 1000])
def test_tiles_cover_every_pixel_once(size):
    parts = windows(size, 64, 16)
    total = torch.zeros(size)
    for part, weights in parts:
        total[part] += weights
    assert torch.allclose(total, torch.ones(size))
    assert parts[0][0].start == 0 and parts[-1][0].stop == size
    overlaps = [one.stop - other.start for (one, _), (other, _) in itertools.pairwise(parts)]
    assert all(16 <= overlap <= min(overlaps) + 1 for overlap in overlaps)  # evenly spread


@pytest.mark.parametrize("shape", [(200, 90, 3), (64, 300, 3), (150, 150, 1), (150, 70), (5, 1, 3)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_an_identity_leaves_every_image_as_it_is(shape, dtype):
    image = np.random.default_rng(0).random(shape, dtype=np.float32)
    if dtype != np.float32:
        image = (image * np.iinfo(dtype).max).round().astype(dtype)
    restored = denoise(Blur(0), image, tile=64, overlap=16)
    assert restored.dtype == dtype and restored.shape == shape
    assert np.allclose(restored, image, atol=1e-6 if dtype == np.float32 else 0)
    assert not denoise(Blur(0), np.zeros_like(image)).any()  # of which no noise can be estimated


def test_tiles_make_no_seam():
    image = noisy_photo(300, 340)
    whole, tiled = (denoise(Blur(), image, tile=t, overlap=32) for t in (512, 96))
    difference = np.abs(whole.astype(int) - tiled)
    assert difference.max() <= 10  # weighted down where a tile sees less than its neighbour
    assert (difference > 1).mean() < 0.01


def test_a_model_in_tiles_is_as_good_as_whole(photographs):
    clean = skimage.data.coffee()[:240, :200].astype(np.float32) / 255
    noise = np.random.default_rng(0).standard_normal(clean.shape, dtype=np.float32)
    model = load_model(photographs / "model.pt")
    errors = [(denoise(model, clean + 0.1 * noise, tile=tile) - clean) ** 2 for tile in (512, 128)]
    whole, tiled = (10 * np.log10(1 / error.mean()) for error in errors)
    assert whole - tiled < 0.02
    starts = [part.start for part, _ in windows(240, 128, OVERLAP)][1:]
    border = np.concatenate([errors[1][start : start + OVERLAP] for start in starts])
    border_whole = np.concatenate([errors[0][start : start + OVERLAP] for start in starts])
    assert border.mean() < 1.02 * border_whole.mean()


@pytest.mark.parametrize(("most", "tiled"), [(160 * 40 - 1, True), (160 * 40, False)])
def test_only_beyond_a_size_images_are_tested_in_tiles(monkeypatch, most, tiled):
    monkeypatch.setattr(tiling, "MOST_WHOLE", most)
    noisy = torch.rand(1, 3, 160, 40, generator=torch.Generator().manual_seed(0))
    in_tiles = denoise(Blur(), noisy[0].permute(1, 2, 0).numpy()).transpose(2, 0, 1)
    image, _ = tiling.restore_any_size(Blur(), noisy)
    assert np.array_equal(image[0], in_tiles) == tiled != torch.equal(image, Blur()(noisy)[0])


def test_baselines_compare_the_model_in_tiles(photographs, call, monkeypatch):
    monkeypatch.chdir(photographs)
    tiles = []
    original = tiling.restore_tile
    monkeypatch.setattr(tiling, "restore_tile", lambda *a: tiles.append(a[1].shape) or original(*a))
    options = ("--checkpoint", "model.pt", "--dataset", "images", "--noise-level", 0.1, 0.3)
    process = call(compare_baselines, *options, "--model-only", "--tile", 48)
    assert process.returncode == 0, process.stderr
    assert max(max(shape) for shape in tiles) == 48 and "**this model**" in process.stdout
    assert len(set(re.findall(r"noisy input \| ([\d.]+)", process.stdout))) == 2
    thumbnails = ("--checkpoint", ROOT / "models" / "refined.pt", "--dataset", "photos")
    assert_refused(call(compare_baselines, *thumbnails, "--tile", 48), "--tile", "thumbnails")


def test_strength_blends_with_the_input():
    image = noisy_photo()
    full = denoise(Blur(), image).astype(float)
    assert (denoise(Blur(), image, strength=0.0) == image).all()
    half = denoise(Blur(), image, strength=0.5)
    assert np.abs(half - (full + image) / 2).max() <= 1


@pytest.mark.parametrize("bad", [np.zeros((4, 4, 3)), np.zeros((4, 4, 2), np.uint8), [[1.0]]])
def test_arrays_that_are_no_images_are_refused(bad):
    with pytest.raises(ValueError, match="expected"):
        denoise(Blur(), bad)


# Files ---------------------------------------------------------------------------------------


def write_kinds(folder):
    """One file of every kind that a photograph may have; {name: (mode, size)} of the result."""
    folder.mkdir()
    pixels = noisy_photo()
    image, deep = Image.fromarray(pixels), pixels.astype(np.uint16) * 257 + 3
    image.save(folder / "rgb.jpg", quality=95, icc_profile=SRGB)
    for mode in ("L", "LA", "P"):
        image.convert(mode).save(folder / f"{mode}.png")
    image.convert("CMYK").save(folder / "cmyk.tif")
    image.putalpha(Image.fromarray(pixels[:, :, 0]))
    image.save(folder / "RGBA.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(pixels).save(folder / "turned.png", exif=turned)
    Image.fromarray(pixels[:1, :1]).save(folder / "one.bmp")
    Image.fromarray(pixels[:3]).save(folder / "flat.webp", lossless=True)
    cv2.imwrite(str(folder / "deep.png"), deep[:, :, ::-1])
    cv2.imwrite(str(folder / "deep_grey.png"), deep[:, :, 0])
    tifffile.imwrite(folder / "deep_tif.tif", deep, photometric="rgb", iccprofile=SRGB)
    kinds = dict.fromkeys(("rgb", "P", "cmyk", "deep", "deep_tif"), ("RGB", (130, 100)))
    kinds |= {mode: (mode, (130, 100)) for mode in ("L", "LA", "RGBA")}
    kinds["deep_grey"] = ("I;16", (130, 100))
    kinds |= {"turned": ("RGB", (100, 130)), "one": ("RGB", (1, 1)), "flat": ("RGB", (130, 3))}
    return kinds


def test_every_kind_of_file_keeps_what_it_was(clean_up, tmp_path):
    kinds = write_kinds(tmp_path / "in")
    process = clean_up("in", "--output", "out")
    assert process.returncode == 0, process.stderr
    assert len(process.stdout.splitlines()) == len(kinds)
    for name, (mode, size) in kinds.items():
        path = tmp_path / "out" / f"{name}_denoised.png"
        with Image.open(path) as image:
            found = "I;16" if image.mode == "I" else image.mode  # as Pillow's release has it
            assert (found, image.size) == (mode, size), name
            assert image.getexif().get(0x0112, 1) == 1
            kept = image.info.get("icc_profile")
            assert kept == (SRGB if name in ("rgb", "deep_tif") else None), name
        depth = struct.unpack(">B", path.read_bytes()[24:25])[0]
        assert depth == (16 if name.startswith("deep") else 8)
        (source,) = (tmp_path / "in").glob(f"{name}.*")
        before, after = read_photo(source), read_photo(path)
        if before.alpha is not None:
            assert (before.alpha == after.alpha).all()
        if size == (130, 100):
            most = np.iinfo(before.pixels.dtype).max
            difference = np.abs(before.pixels / most - after.pixels / most).mean()
            assert 0.005 < difference < 0.15, name  # changed, but the same picture


def test_the_noise_becomes_less(clean_up):
    write_photos("in.png")
    process = clean_up("in.png", "--compare")
    assert process.returncode == 0, process.stderr
    noise = re.match(r"in.png  130×100  noise (0.10\d+) → (0.0\d+)  ", process.stdout).groups()
    assert float(noise[1]) < 0.5 * float(noise[0])
    clean = skimage.data.chelsea()[:100, 100:230]
    before, after = (np.asarray(Image.open(f"in{s}.png")) for s in ("", "_denoised"))
    errors = [((image / 255 - clean / 255) ** 2).mean() for image in (before, after)]
    assert errors[1] < errors[0] / 2
    with Image.open("in_denoised_compare.png") as picture:
        assert picture.width > 3 * 130


def test_options_reach_the_denoiser(clean_up, monkeypatch):
    blur = Mock(side_effect=lambda model, image, **how: cv2.blur(image, (5, 5)))
    monkeypatch.setattr(tiling, "denoise", blur)
    write_photos("in.png")
    options = ("--output", "out.tif", "--tile", 64, "--strength", 0.5, "--dtype", "bfloat16")
    assert clean_up("in.png", *options).returncode == 0
    assert blur.call_args.kwargs == {"tile": 64, "dtype": "bfloat16", "strength": 0.5}
    assert Path("out.tif").read_bytes()[:2] == b"II" and read_photo("out.tif").icc_profile == SRGB
    assert "(" not in clean_up("in.png").stdout  # where noise is gone there is nothing to look at


def test_nothing_is_overwritten(clean_up, tmp_path):
    write_photos("a.png", "a.jpg", "b.png")
    before = Path("b.png").read_bytes()
    assert clean_up("*.png", "a.jpg").returncode == 0
    names = {path.name for path in tmp_path.glob("*_denoised.png")}
    assert names == {"a_png_denoised.png", "a_jpg_denoised.png", "b_denoised.png"}
    assert_refused(clean_up("b.png"), "b_denoised.png is there already", "--overwrite")
    assert_refused(clean_up("b.png", "--output", "b.png"), "b.png is there already")
    assert Path("b.png").read_bytes() == before
    assert clean_up("b.png", "--output", "b.png", "--overwrite").returncode == 0
    assert Path("b.png").read_bytes() != before


def test_a_file_that_fails_does_not_stop_the_others(clean_up, tmp_path):
    write_photos("good.png")
    Path("cut.png").write_bytes(Path("good.png").read_bytes()[:3000])
    Path("text.jpg").write_text("no image")
    process = clean_up("cut.png", "good.png", "text.jpg")
    assert process.returncode == 1
    assert "failed: cut.png" in process.stderr and "text.jpg: no image of" in process.stderr
    assert {p.name for p in tmp_path.glob("*_denoised*")} == {"good_denoised.png"}
    assert_refused(clean_up("cut.png"), "cut.png", "truncated")


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("damage of its own kind")])
def test_what_a_decoder_raises_ends_no_other_file(clean_up, monkeypatch, error):
    def broken(path):
        if path.name == "a.png":
            raise error
        return read_photo(path)

    monkeypatch.setattr(denoise_image, "read_photo", broken)
    write_photos("a.png", "b.png")
    process = clean_up("a.png", "b.png")
    assert process.returncode == 1 and process.stderr.startswith("failed: a.png: ")
    assert "damage" in process.stderr and Path("b_denoised.png").exists()


def test_bad_input_is_one_sentence(clean_up, call, trained, tmp_path):
    write_photos("in.png", "other.png")
    bomb = bytearray(Path("in.png").read_bytes())
    bomb[16:24] = struct.pack(">II", 60_000, 60_000)
    bomb[29:33] = struct.pack(">I", zlib.crc32(bomb[12:29]))
    Path("bomb.png").write_bytes(bomb)
    assert_refused(clean_up("nothing*.png"), "nothing*.png", "no image")
    assert_refused(clean_up("bomb.png"), "bomb.png", "more than 178 megapixels")
    assert_refused(clean_up("in.png", "--tile", OVERLAP), "--tile", f"at least {2 * OVERLAP}")
    assert_refused(clean_up("in.png", "--strength", 2), "--strength", "at most 1")
    assert_refused(clean_up("in.png", "--output", "no/out.png"), "no", "create it")
    assert_refused(clean_up("in.png", "other.png", "--output", "in.png"), "name a folder")
    arguments = ("--checkpoint", trained.path / "model.pt", "in.png")
    assert_refused(call(denoise_image, *arguments), "thumbnails", "--recipe photographs")
    assert not list(tmp_path.glob("*_denoised*"))
