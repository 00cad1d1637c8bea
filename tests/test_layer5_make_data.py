"""Layer 5, making the data folder: from made-up images in the layout of the published ones."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torchvision
from PIL import Image

from conftest import assert_refused
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


def test_only_an_empty_folder_is_filled(call, monkeypatch, tmp_path):
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", made_up_cifar10)
    (tmp_path / "cifar10_partial").mkdir()
    assert call(make_data, "cifar10").returncode == 0
    before = sorted(tmp_path.rglob("*"))
    assert_refused(call(make_data, "cifar10"), "cifar10_partial exists", "--output")
    assert sorted(tmp_path.rglob("*")) == before
