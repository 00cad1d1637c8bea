"""Layer 5, making the data folders: from made-up files in the layout of the published ones."""

import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torchvision
from PIL import Image

from conftest import assert_refused, write_images
from images.image_sources import load_images
from studies import make_data


def made_up_cifar10(data_dir, train, download):
    """More images than are kept as PNG, the classes in turn a, b, b."""
    count = make_data.LOSSLESS + (4 if train else 1)
    images = np.random.default_rng(train).integers(0, 256, (count, 32, 32, 3), np.uint8)
    targets = [int(index % 3 > 0) for index in range(count)]
    return SimpleNamespace(data=images, targets=targets, classes=["a", "b"])


def test_cifar10_is_written_and_read(call, monkeypatch, tmp_path):
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", made_up_cifar10)
    process = call(make_data, "cifar10", "--data-dir", "data")
    assert process.returncode == 0, process.stderr
    assert process.stdout == "wrote cifar10_partial: 1,021 in train/ and 1,017 in test/\n"
    folder, train = tmp_path / "cifar10_partial", made_up_cifar10("data", True, False).data
    for file, index in {"a/batch1_00000.png": 0, "b/batch1_01016.png": 1016}.items():
        assert np.array_equal(Image.open(folder / "train" / file), train[index])
    # Numbers 1,017 to 1,020 are of the classes a, b, b, a, of which 339 and 678 went before.
    jpegs = {"a/0339.jpg": 1017, "b/0678.jpg": 1018, "b/0679.jpg": 1019, "a/0340.jpg": 1020}
    assert {str(p.relative_to(folder / "train")) for p in folder.rglob("*.jpg")} == set(jpegs)
    for file, index in jpegs.items():
        Image.fromarray(train[index]).save("same.jpg", quality=75)
        assert (folder / "train" / file).read_bytes() == Path("same.jpg").read_bytes()
    assert load_images(str(folder), tmp_path).test.labels.tolist() == [0] * 339 + [1] * 678


def test_names_number_the_batches_and_the_classes():
    names = make_data.train_names([index % 10 for index in range(50_000)])
    assert names[10_000] == "batch2_00000.png"
    assert names[41_016:41_018] == ["batch5_01016.png", "4101.jpg"]
    assert sum(name.endswith(".png") for name in names) == 5_085


SOURCES = ("--bsds", "BSDS500", "--leave-out", "CBSD68", "--kodak", "Kodak24")


@pytest.fixture
def collections(tmp_path):
    """The three collections: their numbers of files, of which only Kodak24's are images."""
    for index in range(500):
        part = tmp_path / "BSDS500" / ("train", "val", "test")[index % 3]
        part.mkdir(parents=True, exist_ok=True)
        (part / f"{index}.jpg").write_text(f"photograph {index}")
    (tmp_path / "CBSD68").mkdir()
    for index in range(200, 268):
        (tmp_path / "CBSD68" / f"{index}.png").touch()
    (first,) = write_images(tmp_path / "Kodak24", 1, (500, 500))
    for index in range(1, 24):
        shutil.copyfile(first, first.with_name(f"{index:03}.png"))
    return tmp_path


def test_photographs_are_copied_without_those_left_out(call, collections):
    (collections / "made").mkdir()  # empty, so that it may be replaced
    process = call(make_data, "photographs", *SOURCES, "--output", "made")
    assert process.returncode == 0, process.stderr
    assert process.stdout == "wrote made: 432 in train/ and 24 in test/\n"
    train, test, kodak = (
        {path.name: path.read_bytes() for path in (collections / name).iterdir()}
        for name in ("made/train", "made/test", "Kodak24")
    )
    kept = [*range(200), *range(268, 500)]
    assert train == {f"{index}.jpg": b"photograph %d" % index for index in kept}
    assert test == kodak
    assert len(list(collections.iterdir())) == 4  # nothing else is left


DAMAGE = {
    "BSDS500": (lambda at: os.remove(at / "BSDS500/train/0.jpg"), ("499 JPEG", "500 are")),
    "one name": (lambda at: os.rename(at / "CBSD68/200.png", at / "CBSD68/x"), ("67 files", "68")),
    "originals": (lambda at: write_images(at / "Kodak24", 1, (512, 768)), ("000.png", "512×768")),
    "no folder": (lambda at: shutil.rmtree(at / "CBSD68"), ("cannot read CBSD68",)),
    "full": (lambda at: write_images(at / "photographs", 1), ("photographs", "--output")),
}


@pytest.mark.parametrize("damage, words", DAMAGE.values(), ids=DAMAGE)
def test_other_collections_and_outputs_are_refused(call, collections, damage, words):
    damage(collections)
    before = sorted(collections.rglob("*"))
    assert_refused(call(make_data, "photographs", *SOURCES), *words)
    assert sorted(collections.rglob("*")) == before


def test_interrupted_leaves_nothing(call, collections, monkeypatch):
    def interrupted(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "copyfile", interrupted)
    before = sorted(collections.rglob("*"))
    assert call(make_data, "photographs", *SOURCES).returncode == 130
    assert sorted(collections.rglob("*")) == before
