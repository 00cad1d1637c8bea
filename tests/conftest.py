"""What the six layers share: small data, and a way to run the scripts."""

import contextlib
import itertools
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

import denoising_experiment_proper as experiment
from adaptive_attention_moe import AdaptiveAttentionMoE
from experiment.image_sources import load_images
from experiment.user_errors import run_main
from small_vit import MODELS, SmallViT

ROOT = Path(__file__).resolve().parent.parent


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


@pytest.fixture
def vit(seeded):
    """The default model with its zero-initialised projections filled in."""
    model = SmallViT()
    with torch.no_grad():
        for block in model.blocks:
            block.attention.merge.weight.normal_(std=0.1)
            block.ffn[-1].weight.normal_(std=0.1)
    return model


@pytest.fixture
def refined(seeded):
    """The refined model with its zero-initialised layers filled in."""
    model = SmallViT(MODELS["refined"])
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    return model


@pytest.fixture(scope="session")
def photos():
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


@pytest.fixture
def folder(tmp_path):
    """An image folder with two classes: 20 training and 5 test images."""
    for part, count in (("train", 10), ("test", 3)):
        write_images(tmp_path / "images" / part / "a", count, seed=count)
        write_images(tmp_path / "images" / part / "b", count, suffix=".jpg", seed=count + 1)
    return tmp_path / "images"


@pytest.fixture
def call(monkeypatch, tmp_path, capsys):
    """Runs a script's main() in this process, in an empty folder; returns a CompletedProcess."""
    monkeypatch.chdir(tmp_path)

    def run(script, *arguments):
        monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            run_main(script.main)
        printed = capsys.readouterr()
        code = ended.value.code
        return subprocess.CompletedProcess(sys.argv, code, printed.out, printed.err)

    return run


def run_script(name, *arguments, cwd, **environment):
    """Runs a script of the collection as a user would; returns its CompletedProcess."""
    return subprocess.run(
        [sys.executable, str(ROOT / name), *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "PYTHONHASHSEED": "0", **environment},
        capture_output=True,
        text=True,
        timeout=1200,
    )


def assert_refused(process, *words):
    """Exit code 2 and one sentence on stderr that has these words."""
    assert process.returncode == 2, process.stderr
    assert process.stderr.count("\n") == 1, process.stderr
    assert process.stderr.startswith("error: ")
    for word in words:
        assert str(word) in process.stderr


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
    # The refined recipe in small batches: far in little time.
    options = ("--recipe", "refined", "--epochs", 1, "--batch-size", 32, "--output", "model.pt")
    process = run_script(
        "denoising_experiment_proper.py", "--dataset", "photos", *options, cwd=path
    )
    assert process.returncode == 0, process.stderr
    return SimpleNamespace(
        path=path,
        output=process.stdout,
        checkpoint=torch.load(path / "model.pt", weights_only=True),
    )
