"""Layer 5, decoded images: read from one file as long as the folder stays as it was."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

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
    (folder / "train" / "bröken.png").write_text("no image")
    (folder / "train" / "nowhere.png").symlink_to("nothing")
    first, count = load()
    said = capsys.readouterr().err
    again, tried_again = load()
    assert (count, tried_again) == (28, 2)
    assert again.sha256() == first.sha256()
    assert again.classes == first.classes
    assert "bröken.png" in said and "nowhere.png" in said and capsys.readouterr().err == said


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


@pytest.mark.parametrize("figure", ["st_size", "st_mtime_ns", "st_ctime_ns"])
def test_size_and_both_times_of_a_file_tell_whether_it_changed(monkeypatch, figure):
    keys = []
    for value in (1, 2):
        state = SimpleNamespace(**{"st_size": 1, "st_mtime_ns": 1, "st_ctime_ns": 1, figure: value})
        with monkeypatch.context() as patched:
            patched.setattr(os, "stat", lambda path, state=state: state)
            keys.append(image_cache.state_of([Path("/a/b.png")], "/a"))
    assert keys[0] != keys[1]


def test_a_damaged_file_of_decoded_images_is_made_anew(load, tmp_path):
    first, _ = load()
    for kept in (tmp_path / "kept").iterdir():
        content = bytearray(kept.read_bytes())
        content[len(content) // 2] ^= 1
        kept.write_bytes(content)
    second, count = load()
    assert count == 26 and second.sha256() == first.sha256()
    assert load()[1] == 0


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
