"""Layer 5, checkpoints that are damaged, forged or of another model; and damaged images."""

import copy
import io
import os
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import compare_baselines
import debug_evaluation
import denoise_image
import visualize_proper_results
from common.user_errors import UserError
from conftest import assert_refused, same_weights, write_images
from experiment.checkpoints import read_checkpoint, without_hooks
from images.image_sources import load_images
from images.photo_files import read_rgb
from small_vit import load_model

# Checkpoints ---------------------------------------------------------------------------------


class Attack:
    def __reduce__(self):
        return os.mkdir, ("attacked",)


def flip(good):
    """torch ignores the checksums of the archive."""
    place = len(good) // 2
    return good[:place] + bytes([good[place] ^ 4]) + good[place + 1 :]


def pack(good):
    """A few kilobytes could become gigabytes."""
    file = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(good)) as stored,
        zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for member in stored.infolist():
            packed.writestr(member.filename, stored.read(member))
    return file.getvalue()


def saved(content):
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


BAD = {
    "truncated": (lambda good: good[: len(good) // 2], "is damaged"),
    "flipped": (flip, "is damaged"),
    "packed": (pack, "is damaged"),
    "empty": (lambda good: b"", "is damaged"),
    "text": (lambda good: b"hello", "is damaged"),
    "attack": (lambda good: saved({"model": Attack()}), "more than tensors"),
    "incomplete": (lambda good: saved({"model": {}}), "does not hold config"),
    "list": (lambda good: saved([1, 2]), "its content cannot be \\[1, 2]"),
}


@pytest.mark.parametrize(("make", "words"), BAD.values(), ids=BAD)
def test_bad_files_are_refused(trained, tmp_path, monkeypatch, make, words):
    monkeypatch.chdir(tmp_path)
    Path("bad.pt").write_bytes(make((trained.path / "model.pt").read_bytes()))
    with pytest.raises(UserError, match=f"bad.pt.*{words}"):
        load_model("bad.pt")
    assert list(tmp_path.iterdir()) == [tmp_path / "bad.pt"]  # no folder "attacked"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(5, "Input/output error"), "cannot read .*model.pt: Input/output error"),
        (FileNotFoundError(2, "No such file or directory"), "cannot read .*model.pt: No such file"),
        (MemoryError(), None),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), None),
        (RuntimeError("of the decoder"), "model.pt is damaged"),
    ],
    ids=repr,
)
def test_what_is_no_damage_is_not_called_so(trained, monkeypatch, error, words):
    """For lack of memory there is a sentence elsewhere."""

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(UserError if words else type(error), match=words):
        load_model(trained.path / "model.pt")


@pytest.mark.parametrize(
    "script",
    [compare_baselines, debug_evaluation, denoise_image, visualize_proper_results],
)
def test_scripts_end_with_one_sentence(call, script):
    Path("bad.pt").write_text("hello")
    images = ["bad.pt"] if script is denoise_image else []
    process = call(script, *images, "--checkpoint", "bad.pt")
    assert_refused(process, "bad.pt is damaged, of another kind")
    assert list(Path().iterdir()) == [Path("bad.pt")]


BARE = {"task": "inpaint", "dataset": "photos", "val_images": 1, "seed": 0, "epochs": 1}


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        ("recipe", None, "recipe cannot be NoneType"),
        ("recipe", {}, "does not hold recipe.dataset"),
        ("recipe.seed", "42", "recipe.seed cannot be '42'"),
        ("recipe.epochs", torch.tensor(1), "is damaged"),
        ("recipe.noise_level", [0, 0.2], "recipe.noise_level must be a range that starts above"),
        ("recipe.noise_level", float("nan"), "recipe.noise_level must be"),
        ("recipe.noise_map", "regions", "recipe.noise_map regions lies between two values of σ"),
        ("recipe.noise_map", "ramp", "noise_map must be one of uniform, regions, got 'ramp'"),
        ("recipe.noise_map", "signal", "noise_map must be one of uniform, regions, got 'signal'"),
        ("recipe.jpeg_share", True, "recipe.jpeg_share must be a number"),
        ("recipe.task", "sharpen", "recipe.task must be one of denoise, super-resolution"),
        ("recipe.task", "inpaint", "another architecture"),
        ("recipe", {**BARE, "holes": 0.3}, "recipe.holes must be"),
        ("val_mse", float("inf"), "val_mse cannot be inf"),
        ("test", {}, "does not hold test."),
        ("test.psnr_mean", "25", "test.psnr_mean cannot be '25'"),
        ("config.k_attend", (), "another architecture"),
        ("config.num_layers", 3, "another architecture"),
        ("config.num_layers", 10**4, "another architecture"),
        ("config.d_model", 10**4, "another architecture"),
        ("config.colour", "red", "another architecture"),
        ("model.position", torch.full((1, 64, 64), float("nan")), "model cannot be dict"),
        ("model.position", torch.zeros(1, 64, 63), "another architecture"),
        ("model.position", torch.zeros(1, 64, 64, dtype=torch.float64), "model cannot be dict"),
        ("model.position", torch.zeros(1).expand(1, 64, 64), "model cannot be dict"),
    ],
)
def test_wrong_contents_of_a_checkpoint_are_named(trained, tmp_path, place, value, words):
    path = forge(trained, tmp_path / "forged.pt", place, value)
    with pytest.raises(UserError, match=re.escape(words)) as caught:
        load_model(path)
    assert str(caught.value).startswith(str(path))


def forge(trained, path, place, value):
    """Writes the checkpoint with another value at a place such as recipe.seed; returns its path."""
    forged = copy.deepcopy(trained.checkpoint)
    *outer, inner = place.split(".")
    (forged[outer[0]] if outer else forged)[inner] = value
    torch.save(forged, path)
    return path


def test_control_characters_of_a_file_do_not_reach_the_terminal(trained, call):
    path = forge(trained, "forged.pt", "recipe.dataset", "photos\x1b[31m")
    process = call(debug_evaluation, "--checkpoint", path, "--dataset", "photos")
    assert_refused(process, "photos\\x1b[31m")
    assert "\x1b" not in process.stderr + process.stdout


def test_hooks_of_a_weight_are_dropped(tmp_path):
    weight = torch.zeros(2)
    weight._backward_hooks = "none"  # as the unpickler leaves what a damaged file says
    torch.save(without_hooks({"model": {"weight": weight}}), tmp_path / "m.pt")


# Random damage -------------------------------------------------------------------------------


def damaged(data, rng):
    """Cut, overwritten or with a few bits turned, one to three times."""
    data = bytearray(data)
    for _ in range(rng.integers(1, 4)):
        data = data or bytearray(b"x")
        place, kind = int(rng.integers(len(data))), rng.integers(3)
        if kind == 0:
            data[place] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            data[place : place + 16] = rng.bytes(16)
        else:
            del data[place : place + int(rng.integers(1, 2000))]
    return bytes(data)


def test_a_damaged_checkpoint_is_read_as_it_was_or_refused(trained, tmp_path):
    """A few are read: what only touched padding."""
    rng, path, read = np.random.default_rng(0), tmp_path / "bad.pt", 0
    torch.save({**trained.checkpoint, "model": {"position": torch.rand(1, 64, 2)}}, path)
    content, good = path.read_bytes(), read_checkpoint(path)
    weights = good.pop("model")
    for _ in range(300):
        path.write_bytes(damaged(content, rng))
        try:
            found = read_checkpoint(path)
        except UserError as error:
            assert "bad.pt is damaged" in str(error)
            continue
        read += 1
        assert same_weights(found.pop("model"), weights) and found == good
    assert 0 < read < 30


def test_a_damaged_image_keeps_its_size_or_is_skipped(tmp_path, capsys):
    """Damaged pixels of a format without checksums look like any others."""
    rng, skipped = np.random.default_rng(0), []
    suffixes = ("png", "jpg", "webp", "tif", "bmp", "gif", "ppm", "jp2", "avif", "mpo")
    (good,) = write_images(tmp_path / "test", 1, size=(48, 40))
    (tmp_path / "train").mkdir()
    for index in range(200):
        path = tmp_path / "train" / f"{index:03}.{suffixes[index % len(suffixes)]}"
        Image.open(good).save(path)
        path.write_bytes(damaged(path.read_bytes(), rng))
        try:
            image, _ = read_rgb(path)
        except Exception:
            skipped.append(path)
        else:
            assert image.shape == (40, 48, 3), path
    source, warning = load_images(str(tmp_path)), capsys.readouterr().err
    assert len(source.train) + len(source.val) == 200 - len(skipped)
    assert warning.count("\n") == 1 and f"skipped {len(skipped)} of 200 files" in warning
    assert all(f"{path} (" in warning for path in skipped[:5])
