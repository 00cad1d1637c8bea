"""Layer 5, torch.hub: its entries from another folder, and every kind of image they denoise."""

import ast
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image

import hubconf
from conftest import ROOT
from experiment import tiling
from experiment.tiling import denoise
from images.image_sources import SIZE
from small_vit import MODELS, SmallViT, ViTConfig, count_parameters, load_model

NAMES = ["gaussian", "photo", "published", "refined", "routed"]


@pytest.fixture(scope="module")
def model():
    return load_model("photo")


def noisy_pixels(height=40, width=52):
    """uint8 [h, w, 3] of a photograph with noise."""
    clean = skimage.data.coffee()[100 : 100 + height, 200 : 200 + width]
    noise = 20 * np.random.default_rng(0).standard_normal(clean.shape)
    return (clean + noise).round().clip(0, 255).astype(np.uint8)


def as_tensor(pixels):
    return torch.from_numpy(pixels.astype(np.float32) / 255).permute(2, 0, 1)


def python(code, folder):
    """A new process in a folder, from which nothing of this project can be imported."""
    command = [sys.executable, "-I", "-W", "error", "-c", f"HERE = {str(ROOT)!r}\n{code}"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)


# torch.hub -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """Files of this project that were read by a program elsewhere, which denoised by the hub.

    The folder of the project is in no path any more when `denoise` is called.
    """
    folder = tmp_path_factory.mktemp("elsewhere")
    Image.fromarray(noisy_pixels()).save(folder / "a.png")
    (folder / "photo").mkdir()  # which is not the model
    code = """
import sys
import numpy as np
import torch
from PIL import Image
photo, gaussian = (torch.hub.load(HERE, name, source="local") for name in ("photo", "gaussian"))
assert HERE not in sys.path and not photo.training
image = Image.open("a.png")
array = photo.denoise("a.png")
assert np.array_equal(array, photo.denoise(np.asarray(image)))
assert np.array_equal(array, np.asarray(photo.denoise(image)))
tensor = torch.from_numpy(np.asarray(image) / np.float32(255)).permute(2, 0, 1)
assert (photo.denoise(tensor) - torch.from_numpy(array / 255).permute(2, 0, 1)).abs().max() < 3e-3
assert not np.array_equal(array, np.asarray(image))
image.putalpha(image.getchannel(0).point(lambda value: 255 * (value > 99)))
photo.denoise(image), gaussian.denoise(image.convert("LA"))  # hidden colours; noise estimated
files = [getattr(module, "__file__", None) or "" for module in sys.modules.values()]
own = [f for f in files if f.startswith(HERE) and ".venv" not in f]  # which may lie there
print(*own, sep="\\n")
"""
    process = python(code, folder)
    assert process.returncode == 0, process.stderr
    return process.stdout.splitlines()


def test_a_model_of_the_hub_denoises_every_kind_of_image_from_another_folder(loaded):
    assert str(ROOT / "small_vit.py") in loaded


def test_every_library_that_is_imported_is_named(loaded):
    imported = set()
    for file in loaded:
        for node in ast.parse(Path(file).read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module.split(".")[0])
    imported -= set(sys.stdlib_module_names) | set(hubconf._MODULES)
    # scikit-image imports the last at the first call.
    assert sorted(hubconf.dependencies) == sorted(imported | {"pywt"})


def test_list_and_help_name_the_five_models_without_loading_a_library(tmp_path):
    code = """
import sys
import torch
torch.hub._get_cache_or_reload = lambda github, *_, **__: HERE  # no download
before = set(sys.modules)
print(*torch.hub.list("OWNER/REPO", trust_repo=True))
print(torch.hub.help("OWNER/REPO", "photo", trust_repo=True))
assert not {"cv2", "skimage", "small_vit"} & (set(sys.modules) - before)
"""
    process = python(code, tmp_path)
    assert process.returncode == 0, process.stderr
    listed, told = process.stdout.split("\n", 1)
    assert listed.split() == NAMES
    assert "noise of photographs" in told and "`model.denoise(image)`" in told and "MIT" in told


@pytest.mark.parametrize("name", NAMES)
def test_an_entry_is_the_shipped_model_and_tells_its_size(name):
    entry = getattr(hubconf, name)
    of_hub, of_name = entry(), load_model(name)
    assert not of_hub.training and of_hub.trained.checkpoint == of_name.trained.checkpoint
    for key, value in of_hub.state_dict().items():
        assert torch.equal(value, of_name.state_dict()[key])
    assert f"{count_parameters(of_hub):,} parameters" in " ".join(entry.__doc__.split())
    if name != "photo":  # which had other images as well in an earlier training
        images = of_hub.trained.checkpoint["recipe"]["train_images"]
        assert f"trained on {images:,} " in entry.__doc__


def test_another_module_of_the_same_name_is_one_sentence(tmp_path):
    (tmp_path / "images.py").write_text("")
    code = """
import sys
import torch
sys.path.insert(0, "")
import images
try:
    torch.hub.load(HERE, "photo", source="local")
except ImportError as error:
    print(error)
"""
    process = python(code, tmp_path)
    assert process.returncode == 0, process.stderr
    told = process.stdout
    assert told.count("\n") == 1 and "needs its own module 'images', but another" in told
    assert str(tmp_path / "images.py") in told


@pytest.mark.parametrize("name", hubconf._MODULES)
def test_a_folder_without_a_file_is_another_module_too(monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, ModuleType(name))
    with pytest.raises(ImportError, match=f"its own module '{name}', .* of a folder: load"):
        hubconf.photo()


def test_every_module_of_this_project_is_looked_for(loaded):
    tops = {Path(file).relative_to(ROOT).parts[0].removesuffix(".py") for file in loaded}
    assert tops == set(hubconf._MODULES)


# Kinds of images -----------------------------------------------------------------------------


def test_function_and_method_are_one():
    assert SmallViT.denoise is denoise


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "I;16"])
def test_a_pil_image_keeps_its_mode_its_alpha_and_its_info(model, mode):
    pixels = noisy_pixels()
    if mode == "I;16":
        image = Image.fromarray(pixels[:, :, 0].astype(np.uint16) * 257)
    else:
        image = Image.fromarray(pixels)
        if mode.endswith("A"):
            alpha = pixels[:, :, 1].copy()
            alpha[:10], pixels[:10] = 0, 255
            image = Image.fromarray(np.dstack([pixels, alpha]))
        image = image.convert(mode)
    image.info["icc_profile"] = b"a profile"
    restored = model.denoise(image)
    assert (restored.mode, restored.size, restored.info) == (mode, image.size, image.info)
    before, after = (np.atleast_3d(np.asarray(i)) for i in (image, restored))
    colours = before.shape[2] - mode.endswith("A")
    assert np.array_equal(before[:, :, colours:], after[:, :, colours:])
    if mode.endswith("A"):
        assert np.array_equal(before[:10], after[:10])  # what alpha hides
    else:
        expected = model.denoise(before if colours == 3 else before[:, :, 0])
        assert np.array_equal(np.atleast_3d(expected), after)
    assert not np.array_equal(before, after)


@pytest.mark.parametrize(
    ("mode", "other"), [("P", "RGB"), ("PA", "RGBA"), ("CMYK", "RGB"), ("1", "RGB"), ("I", "I;16")]
)
def test_other_modes_are_refused_with_what_helps(model, mode, other):
    image = Image.new(mode, (9, 9))
    with pytest.raises(ValueError, match=rf'^PIL image: .*got {mode}; try .*"{other}"'):
        model.denoise(image)
    assert model.denoise(image.convert(other)).mode == other


def test_a_transparent_colour_is_refused_since_the_result_has_it_elsewhere(model, tmp_path):
    Image.fromarray(noisy_pixels()).save(tmp_path / "a.png", transparency=(1, 2, 3))
    image = Image.open(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r'transparent colour, got RGB; try .*"RGBA"'):
        model.denoise(image)


def test_the_shown_frame_of_an_animation_is_denoised(model, tmp_path):
    frames = [Image.fromarray(noisy_pixels() // part) for part in (1, 2)]
    frames[0].save(tmp_path / "a.png", save_all=True, append_images=frames[1:])
    image = Image.open(tmp_path / "a.png")
    image.seek(1)
    assert np.array_equal(model.denoise(image), model.denoise(np.asarray(frames[1])))


def test_a_damaged_pil_image_is_one_sentence(model, tmp_path):
    Image.fromarray(noisy_pixels()).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"^PIL image: image file is truncated"):
        model.denoise(Image.open(tmp_path / "b.png"))


def test_a_tensor_keeps_its_shape_and_is_restored_as_a_whole(model):
    """Of other floats float32; the result has no gradient, and may be part of what has one."""
    images = torch.stack([as_tensor(noisy_pixels(200, 140)), as_tensor(noisy_pixels(200, 140)) / 2])
    with torch.inference_mode():
        whole = model(images)[0]
    assert torch.equal(model.denoise(images.clone().requires_grad_()), whole)
    assert model.denoise(images[0]).shape == (3, 200, 140)
    assert torch.allclose(model.denoise(images[1]), whole[1], atol=1e-5)
    for dtype in (torch.float64, torch.float16):
        restored = model.denoise(images.to(dtype))
        assert restored.dtype == torch.float32
        assert torch.allclose(restored, whole, atol=0.01)
    restored = model.denoise(images)
    assert restored.is_contiguous() and not restored.requires_grad
    weight = torch.ones((), requires_grad=True)
    (weight * restored).sum().backward()
    assert weight.grad == pytest.approx(float(restored.sum()), rel=1e-4)


def test_large_tensors_and_those_with_a_tile_are_restored_in_tiles(model, monkeypatch):
    pixels = noisy_pixels(150, 90)
    images = torch.stack([as_tensor(pixels), as_tensor(pixels).flip(2)])
    arrays = images.permute(0, 2, 3, 1).numpy()
    in_tiles = [np.stack([denoise(model, a, t) for a in arrays]) for t in (64, 128)]
    assert np.array_equal(model.denoise(images, tile=64).permute(0, 2, 3, 1), in_tiles[0])
    assert np.array_equal(model.denoise(images, tile=128).permute(0, 2, 3, 1), in_tiles[1])
    whole = model.denoise(images)
    assert not np.array_equal(whole.permute(0, 2, 3, 1), in_tiles[1])
    monkeypatch.setattr(tiling, "MOST_WHOLE", 150 * 90)  # an image at a time
    assert torch.allclose(model.denoise(images), whole, atol=1e-5)
    monkeypatch.setattr(tiling, "MOST_WHOLE", 150 * 90 - 1)
    assert np.array_equal(model.denoise(images).permute(0, 2, 3, 1), in_tiles[1])
    assert model.denoise(images).is_contiguous()


def test_memory_does_not_grow_with_the_batch(monkeypatch):
    sizes = []
    model = SmallViT(MODELS["photo"])
    model.register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[0])))
    monkeypatch.setattr(tiling, "MOST_WHOLE", 2 * 32 * 32 + 5)
    assert model.denoise(torch.rand(5, 3, 32, 32)).shape == (5, 3, 32, 32)
    assert sizes == [2, 2, 1]


def test_images_with_holes_are_restored_as_a_whole():
    model, images = SmallViT(ViTConfig(in_channels=4)), torch.rand(2, 4, 40, 40)
    restored = model.denoise(images, tile=32)
    assert torch.equal(restored, model(images)[0])
    halfway = model.denoise(images, strength=0.5)
    assert torch.allclose(halfway, (restored + images[:, :3]) / 2, atol=1e-6)


def test_a_tensor_takes_the_options(model):
    image = as_tensor(noisy_pixels())
    whole = model.denoise(image)
    assert torch.equal(model.denoise(image, strength=0.0), image)
    assert torch.allclose(model.denoise(image, strength=0.5), (whole + image) / 2, atol=1e-6)
    half = model.denoise(image, dtype="bfloat16")
    assert half.dtype == torch.float32 and 0 < (half - whole).abs().mean() < 0.01
    with pytest.raises(ValueError, match="overlap must be in"):
        model.denoise(image, tile=8)


def test_noise_beyond_the_range_is_clipped_for_a_model_of_files(model):
    image = as_tensor(noisy_pixels()) - 0.1
    assert torch.equal(model.denoise(image), model.denoise(image.clamp(0, 1)))


@pytest.mark.parametrize("name", ["published", "refined", "routed"])
def test_models_of_thumbnails_restore_photographs_in_tiles_at_least_as_well(name):
    thumbnails = load_model(name)
    clean = skimage.data.astronaut()[:160, 150:310].astype(np.float32) / 255
    noise = np.random.default_rng(0).standard_normal(clean.shape, dtype=np.float32)
    noisy = (clean + 0.2 * noise).clip(0, 1)
    by_default = thumbnails.denoise(noisy)
    assert np.array_equal(by_default, thumbnails.denoise(noisy, tile=SIZE))
    errors = [((i - clean) ** 2).mean() for i in (by_default, thumbnails.denoise(noisy, tile=160))]
    assert errors[0] < errors[1]
    tensor = torch.from_numpy(noisy).permute(2, 0, 1)
    assert np.array_equal(thumbnails.denoise(tensor).permute(1, 2, 0), by_default)


TENSOR = r"expected a tensor \[3, h, w\] or \[B, 3, h, w\] of floats in \[0, 1\], got torch"
RANGE = r"expected values in \[0, 1\]"
KIND = "expected an array, a tensor, a PIL image or a path, got"


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (torch.zeros(3, 9, 9, dtype=torch.uint8), f"{TENSOR}.uint8"),
        (torch.zeros(3, 9, 9, dtype=torch.bool), f"{TENSOR}.bool"),
        (torch.zeros(9, 9), TENSOR),
        (torch.zeros(9, 9, 3), TENSOR),
        (torch.zeros(1, 1, 9, 9), TENSOR),
        (torch.zeros(0, 3, 9, 9), TENSOR),
        (torch.zeros(3, 0, 9), TENSOR),
        (torch.zeros(1, 4, 9, 9), r"expected images \[B, 3, h, w\]"),
        (torch.full((1, 3, 9, 9), torch.nan), "expected finite values"),
        (torch.full((3, 9, 9), 99.0), RANGE),
        (torch.full((3, 300, 9), 99.0), RANGE),
        (np.zeros((0, 9, 3), np.uint8), "expected at least one pixel"),
        (np.zeros((9, 9, 3), bool), "of uint8, uint16 or float32, got bool"),
        (Image.new("RGB", (0, 9)), "expected at least one pixel"),
        ([[1], [1, 2]], f"{KIND} list"),
        ([torch.zeros(3, 9, 9, requires_grad=True)], f"{KIND} list"),
        (b"a.png", f"{KIND} bytes"),
        (None, f"{KIND} NoneType"),
    ],
)
def test_what_is_no_image_is_refused_in_one_sentence(model, image, words):
    with pytest.raises(ValueError, match=words):
        model.denoise(image)


@pytest.mark.parametrize("size", [(1, 1), (1, 200), (3, 2)])
def test_the_smallest_images_of_every_kind(model, size):
    pixels = noisy_pixels(*size)
    assert model.denoise(pixels).shape == (*size, 3)
    assert model.denoise(Image.fromarray(pixels)).size == size[::-1]
    assert model.denoise(as_tensor(pixels)).shape == (3, *size)


def test_the_published_model_is_known_by_name_and_a_file_goes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Path(load_model("published").trained.path) == ROOT / "best_denoising_model_proper.pt"
    Path("published").write_text("a file of that name")
    with pytest.raises(Exception, match="published is damaged"):
        load_model("published")
