"""Layer 5, checkpoints that are damaged, forged or of another model."""

import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import compare_baselines
import debug_evaluation
import visualize_proper_results
from common.user_errors import UserError
from conftest import assert_refused, write_images
from experiment.checkpoints import read_checkpoint, trusted
from images.image_sources import load_images


class Attack:
    def __reduce__(self):
        return os.mkdir, ("attacked",)


@pytest.mark.parametrize("script", [visualize_proper_results, debug_evaluation, compare_baselines])
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda good: None, "no such checkpoint"),
        (
            lambda good: Path("bad.pt").write_bytes(good[: len(good) // 2]),
            "is damaged, of another kind",
        ),
        (lambda good: Path("bad.pt").write_bytes(b""), "is damaged, of another kind"),
        (lambda good: Path("bad.pt").write_text("hello"), "is damaged, of another kind"),
        (lambda good: torch.save({"model": Attack()}, "bad.pt"), "is damaged, of another kind"),
        (lambda good: torch.save({"model": {}}, "bad.pt"), "does not hold"),
        (lambda good: torch.save([1, 2], "bad.pt"), "cannot be [1, 2]"),
    ],
    ids=["missing", "truncated", "empty", "text", "attack", "incomplete", "list"],
)
def test_bad_checkpoints_are_refused(trained, call, script, make, words):
    make((trained.path / "model.pt").read_bytes())
    assert_refused(call(script, "--checkpoint", "bad.pt"), "bad.pt", words)
    assert not Path("attacked").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"recipe": None}, "recipe cannot be NoneType"),
        ({"recipe": {}}, "does not hold recipe.dataset"),
        ({"recipe.seed": "42"}, "recipe.seed cannot be '42'"),
        ({"recipe.seed": 2**70}, "recipe.seed cannot be"),
        ({"recipe.noise_level": []}, "recipe.noise_level"),
        ({"recipe.noise_level": [0.1, 0.2, 0.3]}, "recipe.noise_level"),
        ({"recipe.noise_level": [0, 0.2]}, "recipe.noise_level cannot be [0, 0.2]"),
        ({"recipe.noise_level": float("nan")}, "recipe.noise_level cannot be nan"),
        ({"recipe.noise_level": -0.1}, "recipe.noise_level cannot be -0.1"),
        ({"recipe.task": "inpaint"}, "another architecture"),
        ({"recipe.task": "sharpen"}, "recipe.task cannot be 'sharpen'"),
        ({"recipe.scale": [2]}, "recipe.scale cannot be [2]"),
        ({"recipe.holes": 0.3}, "recipe.holes cannot be 0.3"),
        ({"recipe.holes": [0.4, 0.1]}, "recipe.holes cannot be [0.4, 0.1]"),
        ({"recipe.holes": [0.1, 0.95]}, "recipe.holes cannot be [0.1, 0.95]"),
        ({"recipe.holes": [0.0, 0.1]}, "recipe.holes cannot be [0.0, 0.1]"),
        ({"recipe.quality": [40, 10]}, "recipe.quality cannot be [40, 10]"),
        ({"recipe.quality": [10, 96]}, "recipe.quality cannot be [10, 96]"),
        ({"recipe.quality": [10.5, 40]}, "recipe.quality cannot be [10.5, 40]"),
        ({"recipe.jpeg_share": 1.5}, "recipe.jpeg_share cannot be 1.5"),
        ({"recipe.jpeg_share": True}, "recipe.jpeg_share cannot be True"),
        ({"recipe.noise_map": "regions"}, "recipe.noise_map cannot be 'regions' with one σ"),
        ({"recipe.noise_map": "ramp"}, "recipe.noise_map cannot be 'ramp'"),
        ({"recipe.noise_map": "stripes"}, "noise_map cannot be 'stripes'"),
        ({"recipe.noise_map": ["regions"]}, "noise_map cannot be ['regions']"),
        ({"recipe.noise_map": None}, "noise_map cannot be NoneType"),
        ({"recipe.epochs": 1.5}, "recipe.epochs cannot be 1.5"),
        ({"recipe.dataset": "photos\x1b[31m"}, "photos\\x1b[31m"),
        ({"val_mse": float("inf")}, "val_mse cannot be inf"),
        ({"test": {}}, "does not hold test."),
        ({"test.psnr_mean": "25"}, "test.psnr_mean cannot be '25'"),
        ({"config.k_attend": (32.0, 64, 128)}, "another architecture"),
        ({"config.k_attend": ()}, "another architecture"),
        ({"config.k_attend": {32: 1, 64: 2, 128: 3}}, "is damaged"),
        ({"recipe.epochs": torch.tensor(1)}, "is damaged"),
        ({"config.num_heads": 4.0}, "another architecture"),
        ({"config.num_layers": 0}, "another architecture"),
        ({"config.num_layers": 10**9}, "another architecture"),
        ({"config.d_model": 10**7}, "another architecture"),
        ({"config.image_size": 8000}, "another architecture"),
        ({"config.patch_size": 5}, "another architecture"),
        ({"model.position": torch.full((1, 64, 64), float("nan"))}, "model cannot be dict"),
        ({"model.position": torch.zeros(1, 64, 63)}, "another architecture"),
        ({"model.position": torch.zeros(1, 64, 64, dtype=torch.float64)}, "model cannot be dict"),
        ({"model.position": torch.zeros(1).expand(1, 64, 64)}, "model cannot be dict"),
    ],
    ids=str,
)
def test_wrong_contents_of_a_checkpoint_are_named(trained, call, change, words):
    ((name, value),) = change.items()
    forged = {k: dict(v) if isinstance(v, dict) else v for k, v in trained.checkpoint.items()}
    if "." in name:
        outer, inner = name.split(".", 1)
        forged[outer][inner] = value
    else:
        forged[name] = value
    torch.save(forged, "forged.pt")
    process = call(debug_evaluation, "--checkpoint", "forged.pt", "--dataset", "photos")
    assert process.returncode == 2 and "Traceback" not in process.stderr
    assert words in process.stderr and "\x1b" not in process.stderr + process.stdout


@pytest.mark.parametrize("experts", [2, 4])
def test_figures_of_another_number_of_experts_disagree(trained, call, experts):
    forged = {**trained.checkpoint, "test": dict(trained.checkpoint["test"])}
    forged["test"]["utilisation"] = [[*of, 0.1][:experts] for of in forged["test"]["utilisation"]]
    torch.save(forged, "forged.pt")
    process = call(debug_evaluation, "--checkpoint", "forged.pt", "--dataset", "photos")
    assert process.returncode == 1 and "2 of" in process.stdout


def test_damage_inside_a_checkpoint_is_seen(trained, call):
    """torch ignores the checksums of the archive."""
    data = bytearray((trained.path / "model.pt").read_bytes())
    data[len(data) // 2] ^= 4
    Path("flipped.pt").write_bytes(data)
    assert_refused(call(debug_evaluation, "--checkpoint", "flipped.pt"), "is damaged")


def test_hooks_of_a_weight_are_dropped(tmp_path):
    weight = torch.zeros(2)
    weight._backward_hooks = "none"  # as the unpickler leaves what a damaged file says
    torch.save(trusted({"model": {"weight": weight}}), tmp_path / "m.pt")


def test_a_packed_checkpoint_is_not_unpacked(trained, call):
    """A few kilobytes could become gigabytes."""
    with (
        zipfile.ZipFile(trained.path / "model.pt") as good,
        zipfile.ZipFile("packed.pt", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for member in good.infolist():
            packed.writestr(member.filename, good.read(member))
    assert_refused(call(debug_evaluation, "--checkpoint", "packed.pt"), "is damaged")


def test_random_damage_ends_in_a_sentence(trained, tmp_path):
    """300 checkpoints and 300 images, each cut, overwritten or with a few bits turned."""
    rng = np.random.default_rng(0)

    def damaged(data):
        data = bytearray(data)
        for _ in range(rng.integers(1, 4)):
            place = int(rng.integers(len(data)))
            kind = rng.integers(3)
            if kind == 0:
                data[place] ^= 1 << int(rng.integers(8))
            elif kind == 1:
                data[place : place + 16] = rng.bytes(16)
            else:
                del data[place : place + int(rng.integers(1, 2000))]
        return bytes(data) or b"x"

    small = {**trained.checkpoint, "model": {"position": torch.zeros(1, 64, 2)}}
    torch.save(small, tmp_path / "small.pt")
    good, read = (tmp_path / "small.pt").read_bytes(), 0
    for _ in range(300):
        (tmp_path / "bad.pt").write_bytes(damaged(good))
        try:
            read += read_checkpoint(tmp_path / "bad.pt") is not None
        except UserError as error:
            assert "bad.pt" in str(error)
    assert read < 150  # what only touched padding
    suffixes = ("png", "jpg", "webp", "tif", "bmp", "gif", "ppm", "jp2", "avif", "mpo")
    (path,) = write_images(tmp_path / "test", 1, size=(48, 40))
    (tmp_path / "train").mkdir()
    for index in range(300):
        suffix = suffixes[index % len(suffixes)]
        target = tmp_path / "train" / f"{index}.{suffix}"
        Image.open(path).save(target)
        target.write_bytes(damaged(target.read_bytes()))
    source = load_images(str(tmp_path))
    assert len(source.train) + len(source.val) < 300


@pytest.mark.parametrize("change", [{"d_model": 128}, {"num_layers": 3}, {"colour": "red"}])
def test_another_architecture_is_refused(trained, call, change):
    other = {**trained.checkpoint, "config": {**trained.checkpoint["config"], **change}}
    torch.save(other, "other.pt")
    process = call(visualize_proper_results, "--checkpoint", "other.pt", "--dataset", "photos")
    assert_refused(process, "another architecture")
