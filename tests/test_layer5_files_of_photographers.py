"""Layer 5, what photographers hand in: grey, hidden colours, raw files, and what they are told."""

import io
import os
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import tifffile
import torch
from PIL import Image, ImageCms, PngImagePlugin
from skimage.metrics import peak_signal_noise_ratio as psnr
from skimage.restoration import denoise_tv_chambolle

import denoise_image
from common.user_errors import UserError
from conftest import assert_refused
from experiment.tiling import denoise, noise_at_sizes
from images.photo_files import read_photo
from small_vit import load_model


@pytest.fixture(scope="module")
def photo_model():
    return load_model("photo")


def noisy_grey(sigma):
    """(uint8, float64 noisy) images [h, w] in 0 … 255 of a photograph."""
    clean = skimage.data.rocket()[100:292, 240:432].mean(2).round()
    noise = np.random.default_rng(0).standard_normal(clean.shape)
    return clean.astype(np.uint8), clean + sigma * noise


@pytest.mark.parametrize("sigma", [15, 25, 50])
def test_grey_photographs_are_ahead_of_total_variation_and_as_bright_as_before(photo_model, sigma):
    clean, noisy = noisy_grey(sigma)
    noisy = noisy.clip(0, 255).round().astype(np.uint8)
    restored = denoise(photo_model, noisy)
    classical = max(
        psnr(clean / 255, denoise_tv_chambolle(noisy / 255, weight), data_range=1)
        for weight in (0.05, 0.1, 0.15, 0.2, 0.3)
    )
    assert psnr(clean, restored) > classical + 0.5
    assert abs(float(restored.mean()) - float(noisy.mean())) < 2
    as_colours = denoise(photo_model, np.stack([noisy] * 3, 2))  # channels stay equal
    assert np.array_equal(as_colours, np.stack([restored] * 3, 2))


def test_noise_beyond_the_range_is_as_in_a_file_for_a_model_of_files(photo_model):
    clean, noisy = noisy_grey(50)
    restored = denoise(photo_model, (noisy / 255).astype(np.float32))
    in_a_file = denoise(photo_model, (noisy / 255).clip(0, 1).astype(np.float32))
    difference = psnr(clean / 255, restored, data_range=1) - psnr(
        clean / 255, in_a_file, data_range=1
    )
    assert abs(difference) < 0.7


def test_a_file_is_denoised_as_the_command_does_it(photo_model, call):
    """Upright, with alpha and what it hides, grey, of 16 bits; an array that Pillow takes."""
    noisy = np.random.default_rng(0).integers(0, 256, (24, 40, 4), dtype=np.uint8)
    noisy[:9, :9, 3] = 0
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(noisy).save("a.png", exif=turned)
    Image.fromarray(noisy[..., 0].astype(np.uint16) * 257).save("b.png")
    for name, shape in (("a", (40, 24, 4)), ("b", (24, 40))):
        restored = denoise(photo_model, Path(f"{name}.png"))
        assert restored.shape == shape
        assert call(denoise_image, f"{name}.png").returncode == 0
        written = read_photo(f"{name}_denoised.png").array()
        assert np.array_equal(restored, written.reshape(shape))
    with pytest.raises(ValueError, match=r"^missing.png: no file"):
        denoise(photo_model, "missing.png")


def test_a_model_of_another_dtype_is_refused():
    for model in (load_model("photo").half(), load_model("photo").double()):
        with pytest.raises(ValueError, match=r"must be float32; .*bfloat16"):
            denoise(model, np.zeros((8, 8, 3), np.uint8))


@pytest.mark.parametrize("side", [1, 3, 8, 50])
def test_arrays_of_another_range_are_refused_and_strong_noise_is_not(photo_model, side):
    generator = np.random.default_rng(0)
    image = generator.random((side, side, 3), dtype=np.float32)
    strong = image + 0.3 * generator.standard_normal(image.shape, dtype=np.float32)
    assert np.isfinite(denoise(photo_model, strong)).all()
    for wrong in (255 * image + 30, np.full_like(image, np.nan)):
        with pytest.raises(ValueError, match="expected"):
            denoise(photo_model, wrong)
    if side == 50:
        with pytest.raises(ValueError, match=r"expected values in \[0, 1\], got about -"):
            denoise(photo_model, 2 * np.sort(image.ravel()).reshape(image.shape) - 1)


def test_hidden_colours_do_not_bleed_and_stay(call):
    image = np.full((64, 64, 4), (230, 200, 90, 255), np.uint8)
    image[:, 32:] = (255, 0, 255, 0)
    Image.fromarray(image).save("a.png")
    assert call(denoise_image, "a.png").returncode == 0
    restored = np.asarray(Image.open("a_denoised.png")).astype(int)
    assert np.abs(restored[:, :32] - image[:, :32]).max() <= 4
    assert np.array_equal(restored[:, 32:], image[:, 32:])


@pytest.mark.parametrize("kind", ["DNG", "preview first", "mosaic below"])
def test_raw_files_are_refused(call, kind):
    preview = np.zeros((120, 160, 3), np.uint8)
    mosaic = np.zeros((64, 64), np.uint16)
    with tifffile.TiffWriter("a.tif") as file:
        tags = [(50706, "B", 4, bytes([1, 4, 0, 0]), True)] if kind == "DNG" else []
        below = 1 if kind == "mosaic below" else 0
        reduced = 1 if kind == "preview first" else 0
        options = {"photometric": "rgb", "extratags": tags, "subifds": below}
        file.write(preview, subfiletype=reduced, metadata=None, **options)
        if below:
            file.write(mosaic, photometric="cfa", metadata=None)
    assert_refused(call(denoise_image, "a.tif", "--output", "b.png"), "raw file; develop it first")


def test_the_first_of_several_frames_is_told_of(call):
    frames = [Image.new("RGB", (40, 40), colour) for colour in ("red", "green", "blue")]
    frames[0].save("a.gif", save_all=True, append_images=frames[1:])
    assert read_photo("a.gif").frames == 3
    assert "(the first of 3 frames or pages)" in call(denoise_image, "a.gif").stdout
    frames[0].save("b.png")
    assert "frames" not in call(denoise_image, "b.png").stdout


def test_large_images_are_read_where_asked(call):
    Image.new("RGB", (1200, 1000)).save("a.png")
    process = call(denoise_image, "a.png", "--max-megapixels", 1)
    assert_refused(process, "more than 1 megapixels; raise --max-megapixels")
    assert call(denoise_image, "a.png", "--max-megapixels", 2).returncode == 0


def test_what_stays_and_what_was_changed_is_told():
    look = denoise_image.what_to_look_at
    assert look([0.05, 0.025, 0.01], [0.001, 0.002, 0.002], 0.05) == ""
    assert "most of it stays" in look([0.05, 0.03, 0.01], [0.04, 0.03, 0.01], 0.02)
    assert "texture, of 0.020 stays" in look([0.01, 0.022, 0.02], [0.004, 0.02, 0.01], 0.02)
    assert "far more than its noise" in look([0.0, 0.0, 0.0], [0.02, 0.0, 0.0], 0.4)


def test_noise_is_estimated_at_half_and_quarter_size():
    """White noise halves with the size, coarse noise does not."""
    rng = np.random.default_rng(0)
    white = 0.5 + 0.1 * rng.standard_normal((256, 256, 1)).astype(np.float32)
    full, half, quarter = noise_at_sizes(white)
    assert full == pytest.approx(0.1, rel=0.1)
    assert half == pytest.approx(0.05, rel=0.15) and quarter == pytest.approx(0.025, rel=0.2)
    coarse = torch.nn.functional.interpolate(
        torch.from_numpy(white[None, ::2, ::2, 0])[None], scale_factor=2
    )
    full, half, _ = noise_at_sizes(coarse[0, 0, :, :, None].numpy())
    assert half == pytest.approx(0.1, rel=0.15) and half > full
    assert len(noise_at_sizes(white[:20, :20])) == 1


def small_images(*names):
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20)).save(name)


def test_files_that_are_passed_over_are_named(call):
    small_images("trip/a.png")
    for name in ("b.CR9", "c.txt", "d.txt"):
        Path("trip", name).write_text("no image")
    process = call(denoise_image, "trip", "--output", "clean")  # one image, and still a folder
    assert "passed over 3 files in trip: .CR9, .txt" in process.stdout
    assert Path("clean/a_denoised.png").is_file()


def test_subfolders_are_told_of_or_taken_with_their_structure(call):
    small_images("trip/a.png", "trip/day/a.png", "trip/day/2/b.png", "trip/day/b_denoised.png")
    for name in ("trip/day/b_denoised_compare.png", "trip/.trash/c.png"):
        small_images(name)
    process = call(denoise_image, "trip", "--output", "clean/")
    assert process.returncode == 0, process.stderr
    assert "passed over 2 images in subfolders of trip: --recursive" in process.stdout
    options = ("--recursive", "--skip-existing")
    process = call(denoise_image, "trip", "--output", "clean/", *options)
    assert process.returncode == 0 and "passed over" not in process.stdout, process.stderr
    written = {str(path.relative_to("clean")) for path in Path("clean").rglob("*.png")}
    assert written == {"a_denoised.png", "day/a_denoised.png", "day/2/b_denoised.png"}
    assert call(denoise_image, "tri*", "--recursive").returncode == 0  # a wildcard of a folder
    assert Path("trip/day/2/b_denoised.png").is_file()
    assert "1 image in" in call(denoise_image, "trip/day", "--output", "c/").stdout


def test_a_subfolder_that_cannot_be_read_stops_only_who_asks_for_it(call, monkeypatch):
    small_images("trip/a.png", "trip/day/b.png")
    original = os.scandir

    def refuse(path):
        if str(path).endswith("day"):
            raise PermissionError(13, "Permission denied", str(path))
        return original(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert_refused(call(denoise_image, "trip", "--recursive"), "cannot read trip/day: Permission")
    assert_refused(call(denoise_image, "trip/day"), "cannot read trip/day: Permission")
    assert call(denoise_image, "trip").returncode == 0


@pytest.mark.parametrize("names", [("A.jpg", "a.JPG", "a.tif", "b.png"), ("D/a.png", "d/a.png")])
def test_outputs_differ_also_where_a_file_system_ignores_case(tmp_path, names):
    small_images(*(tmp_path / name for name in names))
    images = denoise_image.find_images([str(tmp_path)], recursive=True)
    for output in (None, f"{tmp_path}/clean/"):
        chosen = denoise_image.choose_outputs(images, output, False)
        assert len({str(new).casefold() for new in chosen.values()}) == len(names)
    if "b.png" in names:
        assert chosen[tmp_path / "b.png"].name == "b_denoised.png"


def test_no_image_is_replaced_where_a_file_system_ignores_case(tmp_path):
    images = {tmp_path / name: Path() for name in ("a.png", "A_Denoised.PNG")}
    with pytest.raises(UserError, match="is an image to read and would"):
        denoise_image.choose_outputs(images, None, True)


def test_a_folder_goes_on_where_it_stopped(call):
    small_images("trip/a.png", "trip/b.png")
    assert call(denoise_image, "trip/a.png", "--output", "clean/").returncode == 0
    before = Path("clean/a_denoised.png").stat().st_mtime_ns
    assert_refused(call(denoise_image, "trip", "--output", "clean"), "--skip-existing")
    process = call(denoise_image, "trip", "--output", "clean", "--skip-existing")
    assert process.returncode == 0 and process.stdout.count("→ clean") == 1
    assert Path("clean/a_denoised.png").stat().st_mtime_ns == before
    process = call(denoise_image, "trip", "--output", "clean", "--skip-existing")
    assert process.returncode == 0 and "every output is there already" in process.stdout


def test_folders_in_front_of_a_wildcard_are_literal(call):
    small_images("[2023] trip/a.png")
    assert call(denoise_image, "[2023] trip/*.png").returncode == 0
    assert Path("[2023] trip/a_denoised.png").is_file()


def test_one_file_is_no_output_of_two_images(call):
    small_images("x/a.png", "x/b.png")
    process = call(denoise_image, "x/a.png", "x/b.png", "--output", "b.png")
    assert_refused(process, "--output b.png: name a folder for 2 images")
    assert not Path("b.png").exists()


def test_what_cannot_be_written_is_said_before_the_work(call, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("denoised before the output was checked")

    small_images("x/a.png")
    monkeypatch.setattr(denoise_image, "denoise_photo", refuse)
    assert_refused(call(denoise_image, "x/a.png", "--output", f"{250 * 'n'}.png"), "cannot write")


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_what_a_camera_wrote_beside_the_pixels_stays(call, suffix):
    exif = Image.Exif()
    exif[0x0112], exif[0x0110], exif[0x0132] = 6, "A camera", "2026:01:02 03:04:05"
    exif.get_ifd(0x8825)[1] = "N"  # GPS
    Image.new("RGB", (60, 40), (90, 120, 60)).save("a.jpg", exif=exif, dpi=(300, 300), quality=95)
    for options, there in (((), True), (("--strip",), False)):
        process = call(denoise_image, "a.jpg", "--output", f"b{suffix}", "--overwrite", *options)
        assert process.returncode == 0, process.stderr
        with Image.open(f"b{suffix}") as image:
            found = image.getexif()
            assert image.size == (40, 60)
            assert found.get(0x0112, 1) == 1
            assert (found.get(0x0110), found.get(0x0132)) == (
                ("A camera", "2026:01:02 03:04:05") if there else (None, None)
            )
            assert (found.get_ifd(0x8825).get(1) == "N") is there
            if suffix != ".webp":  # which has no resolution
                assert (round(image.info.get("dpi", (0, 0))[0]) == 300) is there


def test_colours_of_adobe_rgb_keep_what_they_are(call):
    """From EXIF alone to a profile: Pillow's conversion to sRGB is that of the definition."""
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0xA001] = 65535
    exif.get_ifd(0x8769)[0xA005] = {1: "R03"}
    Image.new("RGB", (32, 32), (90, 150, 120)).save("a.jpg", exif=exif, quality=95, subsampling=0)
    assert call(denoise_image, "a.jpg", "--output", "b.png").returncode == 0
    with Image.open("b.png") as image:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(image.info["icc_profile"]))
    shown = Image.new("RGB", (1, 1), (90, 150, 120))
    converted = ImageCms.profileToProfile(shown, profile, ImageCms.createProfile("sRGB"))
    linear = (np.array([90, 150, 120]) / 255) ** (563 / 256)
    to_xyz = [[0.57667, 0.18556, 0.18823], [0.29734, 0.62736, 0.07529], [0.02703, 0.07069, 0.99134]]
    from_xyz = [[3.2406, -1.5372, -0.4986], [-0.9689, 1.8758, 0.0415], [0.0557, -0.204, 1.057]]
    light = np.array(from_xyz) @ np.array(to_xyz) @ linear
    expected = 255 * np.where(light > 0.0031308, 1.055 * light.clip(0) ** (1 / 2.4) - 0.055, 0)
    assert np.abs(np.array(converted.getpixel((0, 0))) - expected)[1:].max() < 2.5


@pytest.mark.parametrize("deep", [False, True])
def test_the_gamma_of_a_png_stays(call, deep):
    info = PngImagePlugin.PngInfo()
    info.add(b"gAMA", (100000).to_bytes(4, "big"))
    dtype, value = (np.uint16, 30000) if deep else (np.uint8, 120)
    Image.fromarray(np.full((32, 32), value, dtype)).save("a.png", pnginfo=info, dpi=(72, 72))
    assert call(denoise_image, "a.png").returncode == 0
    with Image.open("a_denoised.png") as image:
        assert image.info["gamma"] == pytest.approx(1.0)
        assert round(image.info["dpi"][0]) == 72


def test_shipped_models_are_known_by_name_and_files_go_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_model("photo").trained.path.endswith("photo.pt")
    with pytest.raises(UserError, match="no-such: no such checkpoint"):
        load_model("no-such")
    Path("photo").write_text("a file of that name")
    with pytest.raises(UserError, match="photo is damaged"):
        load_model("photo")
