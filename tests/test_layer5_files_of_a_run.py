"""Layer 5, the files of a run: what the user had is kept, and two runs stay apart."""

import os
import signal
from pathlib import Path

import cv2
import numpy as np
import pytest
import skimage.data
import torch
from matplotlib import pyplot as plt
from PIL import Image

import ablation_study
import denoise_image
import denoising_experiment_proper as experiment
from common.safe_files import locked, replace_when_complete
from common.user_errors import UserError
from conftest import SHORT, assert_refused, interrupted_in_epoch
from experiment.checkpoints import write_checkpoint
from experiment.run_files import RunFiles
from small_vit import SHIPPED, load_model

# Runs ----------------------------------------------------------------------------------------


def test_an_earlier_run_is_kept_under_another_name(call, folder):
    Path("m.pt").write_text("precious")
    for number in (1, 2):
        process = call(experiment, "--dataset", folder, *SHORT, "--output", "m.pt")
        assert process.returncode == 0, process.stderr
        assert f"m.{number}.pt" in process.stdout
    assert Path("m.1.pt").read_text() == "precious"
    load_model("m.2.pt")
    load_model("m.pt")


def test_a_run_that_comes_to_nothing_moves_nothing(call, folder):
    Path("m.pt").write_text("precious")
    process = call(experiment, "--dataset", folder, "--lr", 1e30, *SHORT, "--output", "m.pt")
    assert_refused(process, "not finite")
    assert [p.name for p in Path().glob("m*")] == ["m.pt"]
    assert Path("m.pt").read_text() == "precious"


def test_resuming_overwrites_no_file_of_another_run(call, folder):
    arguments = ("--dataset", folder, "--epochs", 2, "--output", "m.pt")
    with interrupted_in_epoch(2):
        assert call(experiment, *arguments).returncode == 130
    Path("m_history.csv").write_text("precious")
    process = call(experiment, *arguments, "--resume")
    assert process.returncode == 0, process.stderr
    assert Path("m.1_history.csv").read_text() == "precious"
    assert len(Path("m_history.csv").read_text().splitlines()) == 3


def test_a_linked_output_is_written_where_it_leads(call, folder, tmp_path):
    (tmp_path / "disk").mkdir()
    Path("m.pt").symlink_to(tmp_path / "disk" / "real.pt")
    for _ in range(2):
        assert call(experiment, "--dataset", folder, *SHORT, "--output", "m.pt").returncode == 0
    assert Path("m.pt").is_symlink()
    assert {"real.pt", "real.1.pt"} <= {path.name for path in (tmp_path / "disk").iterdir()}


def test_files_of_runs_with_dots_in_their_names_stay_apart():
    one, other = (set(RunFiles(Path(f"sigma0.{i}")).all) for i in (1, 2))
    assert not one & other


# Locks ---------------------------------------------------------------------------------------


def test_two_runs_do_not_write_the_same_files(call, folder, tmp_path):
    (tmp_path / "link.pt").symlink_to(tmp_path / "m.pt")
    (tmp_path / ".m.pt.incomplete-x.pt").write_text("left by a run that was killed")
    with locked([Path("link.pt")]):
        assert not list(tmp_path.glob(".m.pt.incomplete-x*"))
        process = call(experiment, "--dataset", folder, *SHORT, "--output", "m.pt")
        assert_refused(process, "another run is writing", "m.pt", "--output")
    with locked(RunFiles(Path("m")).all):  # another name, but the same history
        process = call(experiment, "--dataset", folder, *SHORT, "--output", "m.pt")
        assert_refused(process, "another run is writing", "m_history.csv")
    with locked([Path("s.json")]):
        assert_refused(call(ablation_study, "--output", "s.json"), "another run is writing")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["images", "link.pt"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of a fork where there are threads
def test_a_lock_dies_with_its_process(tmp_path):
    child = os.fork()
    if not child:
        with locked([tmp_path / "m.pt"]):
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    with locked([tmp_path / "m.pt"]):
        pass
    assert not list(tmp_path.iterdir())


def test_a_lock_that_cannot_be_removed_while_it_is_held_is_released(tmp_path, monkeypatch):
    """As on Windows."""
    original = Path.unlink

    def unlink(path, missing_ok=False):
        if path.name.endswith("lock"):
            raise PermissionError(13, "it is in use")
        original(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", unlink)
    for _ in range(2):
        with locked([tmp_path / "m.pt"]):
            pass


def test_a_lock_removes_its_own_files_alone(tmp_path):
    others = [".m.pt.lock", ".m_x.png.incomplete-1.png", ".m.incomplete-1.pt"]
    for name in others:
        (tmp_path / name).write_text("of somebody else")
    (tmp_path / ".m.pt.incomplete-folder").mkdir()
    (tmp_path / ".m.pt.incomplete-1.pt").write_text("left by a run that was killed")
    with locked([tmp_path / "m.pt"]):
        pass
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {*others, ".m.pt.incomplete-folder"}
    assert (tmp_path / others[0]).read_text() == "of somebody else"
    with pytest.raises(UserError, match="create it"), locked([tmp_path / "no" / "m.pt"]):
        pass
    assert not (tmp_path / "no").exists()


# Denoised photographs ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("there", "arguments", "words"),
    [
        (("a.png", "a_denoised.png"), ("a.png", "a_denoised.png"), "a_denoised.png is an image to"),
        (("a.png", "a_denoised_compare.png"), ("a.png",), "a_denoised_compare.png is there"),
        (("a_compare.png",), ("a_compare.png", "--output", "a.png"), "a_compare.png is an image"),
        (("a.png",), ("a.png", "b/../a.png"), "written twice"),
        (("a.png",), ("a.png", "--output", "a.ico"), "--output a.ico: name a file of .png, .tif"),
        (("a.png",), ("a.png", "--output", "clean.xyz"), "or a folder, with / at its end"),
        (("a.png",), ("a.png", "--output", "a.png/b/"), "cannot write to a.png/b/: Not a"),
    ],
)
def test_no_photograph_is_lost(call, there, arguments, words):
    """Neither one that is read, nor another by the picture of --compare."""
    Path("b").mkdir()
    for number, name in enumerate(there):
        Image.new("RGB", (20, 20), (number, 0, 0)).save(name)
    before = {name: Path(name).read_bytes() for name in there}
    overwrite = [] if "is there" in words else ["--overwrite"]
    assert_refused(call(denoise_image, *arguments, "--compare", *overwrite), words)
    assert {p.name: p.read_bytes() for p in Path().iterdir() if p.is_file()} == before


def test_of_a_folder_neither_results_nor_hidden_files_are_read(call):
    for name in ("a.png", ".b.png", "c_denoised.png", "c_denoised_compare.png"):
        Image.new("RGB", (1, 1000)).save(name)  # of which a picture is still drawn
    process = call(denoise_image, ".", "--compare")
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("\n") == 1 and process.stdout.startswith("a.png  1×1000  too small")
    with Image.open("a_denoised_compare.png") as picture:
        assert max(picture.size) < 2000


def test_a_link_to_nowhere_is_not_written_through(call):
    Image.new("RGB", (20, 20)).save("a.png")
    Path("a_denoised.png").symlink_to("nowhere.png")
    assert_refused(call(denoise_image, "a.png"), "a_denoised.png is there already")
    assert call(denoise_image, "a.png", "--skip-existing").returncode == 0
    assert not Path("nowhere.png").exists()


@pytest.mark.parametrize("folder", ["out", None])
def test_names_tell_apart_what_is_written_into_one_folder(tmp_path, folder):
    paths = [tmp_path / name / file for name, file in (("x", "a.png"), ("y", "a.jpg"))]
    for path in paths:
        path.parent.mkdir()
    output = folder and f"{tmp_path / folder}/"
    found = dict.fromkeys(paths, Path())
    outputs = denoise_image.choose_outputs(found, output, overwrite=False)
    names = ("a_png", "a_jpg") if folder else ("a", "a")
    assert [path.name for path in outputs.values()] == [f"{name}_denoised.png" for name in names]


def test_the_picture_shows_what_was_removed():
    before, after = (np.full((8, 8, 1), value, np.float32) for value in (0.6, 0.5))
    figure = denoise_image.draw_comparison(before, after, "a.png")
    shown = [axis.images[0].get_array()[0, 0].tolist() for axis in figure.axes]
    assert np.allclose(shown, [[0.6] * 3, [0.5] * 3, [0.9] * 3])  # four times a difference of 0.1
    plt.close(figure)


@pytest.mark.parametrize(
    ("channels", "dtype", "output", "words"),
    [(4, np.uint8, "b.jpg", ".jpg has no alpha"), (3, np.uint16, "b.webp", ".webp has no 16 bits")],
)
def test_what_a_format_cannot_hold_is_said_before_minutes_go_by(
    tmp_path, monkeypatch, channels, dtype, output, words
):
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((20, 20, channels), dtype))
    monkeypatch.setattr(denoise_image, "denoise_photo", None)
    with pytest.raises(UserError, match=words):
        denoise_image.denoise_file(tmp_path / "a.png", tmp_path / output, None)


# Writing -------------------------------------------------------------------------------------


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), replace_when_complete(path) as temporary:
        assert temporary.parent == path.parent  # where a name is changed at once
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("unexpected pos 64 vs 0")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(UserError, match="disk is full"):
        write_checkpoint({}, tmp_path / "m.pt")
    assert not list(tmp_path.iterdir())


# Shipped models ------------------------------------------------------------------------------

of_photographs = pytest.mark.parametrize("name", ["photo", "gaussian"])


def psnr(image, clean):
    """Decibels, of 8 bits."""
    return 10 * np.log10(255**2 / ((np.asarray(image) - 1.0 * clean) ** 2).mean())


def noisy_file(clean):
    """What an 8-bit file holds of an image with σ = 25/255."""
    noisy = clean + 25 * np.random.default_rng(0).standard_normal(clean.shape)
    return noisy.round().clip(0, 255).astype(np.uint8)


@of_photographs
def test_shipped_models_leave_alone_what_is_clean(name):
    clean = skimage.data.coffee()[100:260, 100:260]
    restored = denoise_image.denoise(load_model(SHIPPED / f"{name}.pt"), clean)
    assert psnr(restored, clean) > 40


@of_photographs
def test_grey_photographs_are_denoised_too(name):
    clean = skimage.data.coffee()[100:260, 100:260].mean(2)
    noisy = noisy_file(clean)
    restored = denoise_image.denoise(load_model(SHIPPED / f"{name}.pt"), noisy)
    assert psnr(restored, clean) > psnr(noisy, clean) + 5


@pytest.mark.parametrize(
    ("name", "model"), [("a.png", "photo"), ("a.jpg", "photo"), ("a.jpg", "gaussian")]
)
def test_noise_in_files_is_removed_or_told_of(call, name, model):
    """JPEG stores colours at half resolution, which joins the noise of four pixels."""
    photo = skimage.data.chelsea()[:128, 100:228]
    Image.fromarray(noisy_file(photo)).save(name, quality=97)
    process = call(denoise_image, name, "--checkpoint", SHIPPED / f"{model}.pt")
    assert process.returncode == 0, process.stderr
    before, after = (psnr(Image.open(path), photo) for path in (name, "a_denoised.png"))
    knows = name == "a.png" or model == "photo"
    assert (after > before + 6) == knows
    assert ("most of it stays" in process.stdout) != knows


@pytest.mark.parametrize("bad", [{"strength": -1}, {"strength": 2}, {"dtype": "float31"}])
def test_options_of_denoise_out_of_their_range_are_refused(bad):
    with pytest.raises(ValueError, match="strength in 0 … 1"):
        denoise_image.denoise(None, np.zeros((8, 8, 3), np.uint8), **bad)
