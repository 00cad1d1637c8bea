"""Layer 5, decoded images: read from one file as long as the folder stays as it was."""

import os

import numpy as np
import pytest
import torch

from conftest import write_images
from images import image_cache, image_sources
from images.image_sources import load_images


@pytest.fixture
def decoded(monkeypatch):
    """The files that were decoded, of folders with any number of files."""
    paths, original = [], image_sources.read_rgb

    def read_rgb(path):
        paths.append(path)
        return original(path)

    monkeypatch.setattr(image_sources, "read_rgb", read_rgb)
    monkeypatch.setattr(image_cache, "LEAST_FILES", 1)
    return paths


@pytest.fixture
def load(folder, tmp_path, decoded):
    """Loads the folder; returns the source and how many files were decoded for it."""

    def load():
        before = len(decoded)
        source = load_images(str(folder), tmp_path / "kept")
        return source, len(decoded) - before

    return load


def test_images_are_decoded_once(load, folder, capsys):
    (folder / "train" / "broken.png").write_text("no image")
    (folder / "train" / "nowhere.png").symlink_to("nothing")
    first, count = load()
    said = capsys.readouterr().err
    again, tried_again = load()
    assert (count, tried_again) == (28, 2)
    assert again.sha256() == first.sha256()
    assert again.classes == first.classes
    assert "broken.png" in said and "nowhere.png" in said and capsys.readouterr().err == said


def test_what_could_not_be_read_once_is_not_lost(load, folder, tmp_path, monkeypatch):
    whole = load_images(str(folder), tmp_path / "elsewhere")
    read_rgb = image_sources.read_rgb

    def without_memory(path):
        if path.name == "001.png":
            raise MemoryError
        return read_rgb(path)

    with monkeypatch.context() as patched:
        patched.setattr(image_sources, "read_rgb", without_memory)
        assert load()[0].sha256() != whole.sha256()
    assert load()[0].sha256() == whole.sha256()


@pytest.mark.parametrize("change", ["another image", "one more", "one less", "renamed"])
def test_images_are_decoded_anew_when_the_folder_changes(load, folder, change):
    first, _ = load()
    path = folder / "test" / "a" / "001.png"
    if change == "another image":
        write_images(path.parent, 3, seed=99)
    elif change == "one more":
        write_images(folder / "test" / "c", 1)
    elif change == "one less":
        path.unlink()
    else:
        path.rename(path.with_name("009.png"))
    second, count = load()
    assert count == len(second.test) and second.sha256() != first.sha256()


def test_a_damaged_file_of_decoded_images_is_made_anew(load, tmp_path):
    first, _ = load()
    for kept in (tmp_path / "kept").iterdir():
        content = bytearray(kept.read_bytes())
        content[len(content) // 2] ^= 1
        kept.write_bytes(content)
    second, count = load()
    assert count == 26 and second.sha256() == first.sha256()
    assert load()[1] == 0


@pytest.mark.parametrize(
    "change",
    [
        {"images": np.zeros((20, 16, 32, 3), np.uint8)},
        {"images": np.zeros((20, 32, 32, 3))},
        {"files": np.arange(20) + 100},
        {"files": np.arange(20) - 1},
        {"files": np.zeros(3, np.int64)},
        {"lossless": np.array(["yes"] * 20)},
        {"skipped": np.zeros(2)},
        {"skipped": None},
    ],
    ids=str,
)
def test_what_cannot_be_of_the_folder_is_made_anew(load, tmp_path, change):
    first, _ = load()
    for path in (tmp_path / "kept").iterdir():
        with np.load(path) as kept:
            arrays = {name: kept[name] for name in kept.files} | change
        np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    second, count = load()
    assert count >= 20 and second.sha256() == first.sha256()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no FIFOs")
def test_what_is_no_file_is_not_waited_for(load, tmp_path):
    load()
    for path in (tmp_path / "kept").iterdir():
        path.unlink()
        os.mkfifo(path)
    assert load()[1] == 26


def test_a_folder_is_known_by_every_name(load, folder, tmp_path, monkeypatch, decoded):
    load()
    decoded.clear()
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    for name in ("images", "./images", "link"):
        load_images(name, tmp_path / "kept")
    assert not decoded


def test_images_are_read_where_nothing_can_be_kept(load, tmp_path):
    (tmp_path / "kept").write_text("a file where the folder should be")
    assert load()[1] == load()[1] == 26


def test_photographs_and_small_folders_are_not_kept(folder, tmp_path, monkeypatch, decoded):
    load_images(str(folder), tmp_path / "kept", crop=16)
    monkeypatch.setattr(image_cache, "LEAST_FILES", 1000)
    load_images(str(folder), tmp_path / "kept")
    assert not (tmp_path / "kept").exists()


def test_kept_arrays_are_those_that_were_decoded(tmp_path, monkeypatch):
    monkeypatch.setattr(image_cache, "LEAST_FILES", 1)
    paths = write_images(tmp_path / "images", 2)
    arrays = {"images": np.arange(6, dtype=np.uint8), "skipped": np.array(["ä"])}
    for _ in range(2):
        found = image_cache.remembered(paths, tmp_path, lambda: arrays, lambda _: True)
        assert found.keys() == arrays.keys()
        assert all(np.array_equal(found[name], arrays[name]) for name in arrays)
    assert torch.from_numpy(found["images"]).dtype == torch.uint8
