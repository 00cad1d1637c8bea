"""What the six layers share: small data, and a way to run the scripts."""

import interpreter  # noqa: F401  isort: skip

import contextlib
import copy
import csv
import io
import itertools
import multiprocessing
import os
import subprocess
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

import denoising_experiment_proper as experiment
import visualize_proper_results
from adaptive_attention_moe import AdaptiveAttentionMoE
from common.user_errors import run_main
from images.image_sources import load_images
from images.noisy_images import NoisyImageDataset
from small_vit import MODELS, SmallViT

ROOT = Path(__file__).resolve().parent.parent
torch.set_num_threads(1)  # tests run on all cores already, and what they compute is small
SHORT = ("--epochs", 1, "--batch-size", 16)  # of a run that only has to come to its end


class Recorder(TorchDispatchMode):
    """Counts operator calls and remembers the largest tensor that one of them made."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()
        self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.calls[function.overloadpacket.__name__] += 1
        for tensor in result if isinstance(result, tuple | list) else (result,):
            # expanded views have no memory of their own
            if isinstance(tensor, torch.Tensor) and 0 not in tensor.stride():
                self.largest = max(self.largest, tensor.numel())
        return result


@pytest.fixture
def seeded():
    """The same random numbers in every test that asks for them."""
    torch.manual_seed(0)


@pytest.fixture
def moe(seeded):
    """A small float64 layer whose budgets are below, at and above the 16 tokens of its tests."""
    return AdaptiveAttentionMoE(d_model=24, num_heads=3, k_attend=(4, 16, 32)).double()


def filled(model):
    """The model with what starts at zero drawn at random, so that every branch does something."""
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    return model


@pytest.fixture
def vit(seeded):
    """The default model, filled."""
    return filled(SmallViT())


@pytest.fixture
def refined(seeded):
    """The refined model, filled."""
    return filled(SmallViT(MODELS["refined"]))


@pytest.fixture(scope="session")
def photos():
    """The thumbnails of the photographs inside scikit-image."""
    return load_images("photos")


def write_images(folder, count, size=(32, 32), mode="RGB", suffix=".png", seed=0):
    """Writes `count` random smooth images into a folder and returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    paths = []
    for index in range(count):
        small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        image = small.resize(size, Image.Resampling.BICUBIC).convert(mode)
        paths.append(folder / f"{index:03}{suffix}")
        image.save(paths[-1])
    return paths


def make_folder(path):
    """Fills a folder with two classes of images, PNG and JPEG files; returns its path."""
    for part, count in (("train", 10), ("test", 3)):
        write_images(path / part / "a", count, seed=count)
        write_images(path / part / "b", count, suffix=".jpg", seed=count + 1)
    return path


@pytest.fixture
def folder(tmp_path):
    """An image folder with two classes: 20 training and 6 test images."""
    return make_folder(tmp_path / "images")


@pytest.fixture(scope="session")
def folder_of_images(tmp_path_factory):
    """The same, for fixtures of whole modules."""
    return make_folder(tmp_path_factory.mktemp("folder") / "images")


@pytest.fixture
def small_picture(monkeypatch):
    """Two rows of images in a picture in place of six, of which most of its time goes into axes."""
    monkeypatch.setattr(visualize_proper_results, "ROWS", 2)


def run_here(script, *arguments):
    """Runs a script's main() in this process; returns a CompletedProcess.

    A process of its own takes seconds to import what this one has imported.
    """
    out, err = io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        patch.setattr(sys, "argv", [script.__name__, *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            run_main(script.main)
        return subprocess.CompletedProcess(
            sys.argv, ended.value.code, out.getvalue(), err.getvalue()
        )


@pytest.fixture
def call(monkeypatch, tmp_path):
    """`run_here`, in an empty folder that the test stays in."""
    monkeypatch.chdir(tmp_path)
    return run_here


@pytest.fixture(scope="session")
def another_process():
    """An executor of one process, which takes seconds to start, for what this one cannot do."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        yield pool
        pool.submit(os._exit, 0)  # an orderly end takes a second


def assert_refused(process, *words):
    """Exit code 2 and one sentence on stderr that has these words."""
    assert process.returncode == 2, process.stderr
    assert process.stderr.count("\n") == 1, process.stderr
    assert process.stderr.startswith("error: ")
    for word in words:
        assert str(word) in process.stderr


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def load_history(files):
    """What `without_seconds` gives for the state that a run left in its files."""
    history = [{k: float(v) for k, v in row.items()} for row in read_csv(files.history)]
    return without_seconds({"history": history})


def without_seconds(state):
    """The history of a training without what differs from run to run."""
    return [{k: v for k, v in row.items() if k != "seconds"} for row in state["history"]]


def same_weights(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


def train_on(call, folder, output, *options):
    """The training script, four steps an epoch."""
    arguments = ("--dataset", folder, "--batch-size", 4, "--epochs", 3, "--output", output)
    return call(experiment, *arguments, *options)


@pytest.fixture(scope="session")
def few(photos):
    """Training and validation images for trainings of a few steps."""
    train_set = NoisyImageDataset(photos.train[::120])
    train_set.split.lossless[::2] = False
    return train_set, NoisyImageDataset(photos.val[:4], stream=1)


def train_few(few, files=None, state=None, fast=None, name="published", **changes):
    """Three epochs of five steps, the last of each a smaller one, of the model of that name.

    `changes` are of the recipe; `fast` makes of the model what takes its steps.
    """
    recipe = replace(experiment.Recipe(epochs=3, batch_size=4), **changes)
    torch.manual_seed(recipe.seed)
    model = SmallViT(MODELS[name])
    about = {"config": {}, "recipe": {"dataset": "photos", "val_images": 4, **recipe.as_dict()}}
    return experiment.train(model, *few, recipe, files, about, state, fast and fast(model))


@pytest.fixture(scope="session")
def default_run(few):
    """What the default recipe makes of the few images: the state that `train` returns."""
    return copy.deepcopy(train_few(few))


@contextlib.contextmanager
def interrupted_in_epoch(number):
    """Within the block, Ctrl-C ends a training while it validates that epoch."""
    original, epochs = experiment.validation_mse, itertools.count(1)

    def interrupted(*validation):
        if next(epochs) == number:
            raise KeyboardInterrupt
        return original(*validation)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment, "validation_mse", interrupted)
        yield


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A run of the training script on photos: its folder, its output, its checkpoint."""
    path = tmp_path_factory.mktemp("trained")
    # The refined recipe in small batches, on part of the images: far in little time.
    options = ("--recipe", "refined", "--epochs", 2, "--batch-size", 6, "--output", "model.pt")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        patch.setattr(NoisyImageDataset, "epoch_size", 192)
        process = run_here(experiment, "--dataset", "photos", *options)
    assert process.returncode == 0, process.stderr
    return SimpleNamespace(
        path=path,
        output=process.stdout,
        checkpoint=torch.load(path / "model.pt", weights_only=True),
    )
