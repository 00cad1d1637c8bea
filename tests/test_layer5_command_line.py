"""Layer 5, the command line: its help, what it refuses, and where its scripts have to run."""

import importlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import urllib.error
from pathlib import Path

import pytest
import torch
import torchvision

import ablation_study
import compare_baselines
import debug_evaluation
import debug_test_data
import denoising_experiment_proper as experiment
import visualize_proper_results
import visualize_training_data
from common.user_errors import run_main
from conftest import ROOT, SHORT, assert_refused, read_csv
from experiment.checkpoints import write_checkpoint

# Options -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "script",
    [
        "denoising_experiment_proper",
        "visualize_proper_results",
        "visualize_training_data",
        "debug_evaluation",
        "debug_test_data",
        "compare_baselines",
        "ablation_study",
        "benchmark",
    ],
)
def test_help_explains_every_option(call, script):
    process = call(importlib.import_module(script), "--help")
    assert process.returncode == 0
    assert "\nexample: python " in process.stdout
    options = re.split(r"\n  (?=-)", process.stdout)[2:]  # the first is --help itself
    usage = process.stdout.split("\n\n")[0]
    assert options
    for option in options:
        described = " ".join(option.split())
        assert len(described) > 30, option
        assert "default" in described, option
        for name in re.findall(r"--[a-z]\S*[a-z]", described):
            assert name in usage, option


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--noise-level", "-0.1"), "--noise-level: must be a number at least 0, got '-0.1'"),
        (("--noise-level", "nan"), "got 'nan'"),
        (("--epochs", "0"), "--epochs: must be a whole number at least 1, got '0'"),
        (("--epochs", "two"), "got 'two'"),
        (("--batch-size", "0"), "--batch-size"),
        (("--lr", "0"), "--lr: must be a number above 0, got '0'"),
        (("--lr", "inf"), "--lr"),
        (("--seed", "-1"), "--seed"),
        (("--seed", "99999999999"), "at most 2147483647"),
        (("--device", "tpu"), "--device"),
        (("--lossless-share", "1.5"), "at most 1, got '1.5'"),
        (("--dataset", "nowhere"), "nowhere: no such folder"),
        (("--output", "missing/model.pt"), "missing"),
        (("--resume",), "no interrupted run"),
        (("--lossless-share", "0.5"), "--lossless-share: photos does not mix"),
        (("--no-such-option",), "--no-such-option"),
        (("--output", ""), "--output: must name a file"),
        (("--output", "."), "--output: must name a file"),
        (("--output", "/"), "--output: must name a file"),
        (("--output", "x/"), "--output: must name a file"),
        (("--output", 300 * "x"), "cannot write"),
        (("--threads", "100000"), "--threads: must be at most 1024"),
        (("--noise-level", "1e300"), "--noise-level: must be at most 1000"),
    ],
)
def test_bad_options_are_refused(call, arguments, words):
    assert_refused(call(experiment, "--dataset", "photos", *arguments), words)
    assert not list(Path().iterdir())


def test_noise_levels_have_to_ascend(call, folder):
    options = ("--dataset", folder, "--noise-level")
    assert_refused(call(experiment, *options, 0.3, 0.1), "--noise-level", "ascending")
    assert_refused(call(experiment, *options, 0.1, 0.2, 0.3), "--noise-level", "ascending")
    assert_refused(call(experiment, *options, 0, 0.3), "--noise-level", "above 0")


@pytest.mark.parametrize("script", [experiment, visualize_training_data])
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("regions",), "--noise-map regions lies between two values of σ"),
        (
            ("regions", "--noise-level", 0.1, 0.1),
            "--noise-map regions lies between two values of σ",
        ),
        (("stripes", "--noise-level", 0.1, 0.2), "--noise-map: invalid choice: 'stripes'"),
    ],
)
def test_an_impossible_noise_map_is_refused(call, script, arguments, words):
    assert_refused(call(script, "--dataset", "photos", "--noise-map", *arguments), words)
    assert not list(Path().iterdir())


@pytest.mark.parametrize("script", [compare_baselines, visualize_proper_results])
def test_a_trained_model_is_not_asked_for_a_map(call, script):
    assert_refused(call(script, "--noise-map", "regions"), "unrecognized arguments: --noise-map")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the device")
def test_a_missing_device_is_refused(call):
    process = call(experiment, "--dataset", "photos", "--device", "cuda")
    assert_refused(process, "--device cuda", "use cpu")


def test_no_network_names_the_alternatives(call, monkeypatch):
    def fail(*_, **__):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torchvision.datasets.cifar, "download_and_extract_archive", fail)
    assert_refused(call(experiment), "CIFAR-10", "no route", "--dataset photos", "FOLDER")
    assert not Path("best_denoising_model_proper.pt").exists()


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (lambda f: [p.unlink() for p in (f / "train").rglob("*.*")], "holds 0 readable"),
        (lambda f: [p.write_text("x") for p in (f / "test").rglob("*.*")], "holds 0 readable"),
        (lambda f: (f / "test").rename(f / "exam"), "has no test/ folder"),
    ],
)
def test_a_folder_without_images_is_refused(folder, call, break_it, words):
    break_it(folder)
    process = call(experiment, "--dataset", folder)
    assert process.returncode == 2
    assert words in process.stderr.splitlines()[-1]
    assert "Traceback" not in process.stderr


def test_an_unwritable_folder_is_refused_before_the_work(call, monkeypatch):
    def refuse(*_, **__):  # root may write anywhere, so permissions cannot show it
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("common.safe_files.tempfile.mkstemp", refuse)
    process = call(experiment, "--dataset", "photos")
    assert_refused(process, "cannot write", "Permission denied")


@pytest.mark.parametrize("script", [visualize_training_data, visualize_proper_results])
def test_an_unknown_kind_of_picture_is_refused_before_the_work(call, script):
    assert_refused(call(script, "--output", "picture.xyz"), "picture.xyz", ".png")


def test_devices_and_folders_are_no_output_files(call, tmp_path):
    for path in ("/dev/null", tmp_path):
        assert_refused(call(experiment, "--dataset", "photos", "--output", path), "name a file")
    assert Path("/dev/null").is_char_device()


def test_names_too_long_are_one_sentence(call, trained):
    name = 300 * "n"
    assert_refused(call(debug_evaluation, "--checkpoint", name), "no such checkpoint")
    assert_refused(call(debug_test_data, "--dataset", name), "no such folder")
    assert_refused(call(experiment, "--dataset", "photos", "--output", name), "cannot write")
    assert_refused(call(ablation_study, "--output", f"{name}.json"), "cannot write")
    write_checkpoint(trained.checkpoint | {"dataset": name}, "m.pt")
    assert_refused(call(debug_evaluation, "--checkpoint", "m.pt"), "is not at")


# Surroundings --------------------------------------------------------------------------------


def test_a_lost_stdout_costs_nothing(tmp_path, folder):
    """As with `| head -1`, in another folder than the script's."""
    command = (
        f"set -o pipefail; '{sys.executable}' '{ROOT / 'denoising_experiment_proper.py'}' "
        f"--dataset '{folder}' --epochs 2 --batch-size 8 --output a.pt | head -c 1"
    )
    process = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=1200
    )
    assert process.returncode == 0 and "Error" not in process.stderr, process.stderr
    assert torch.load(tmp_path / "a.pt", weights_only=True)["test"]["images"] == 6
    assert len(read_csv(tmp_path / "a_history.csv")) == 2


@pytest.mark.parametrize("stream", [None, "closed", "/dev/full"])
def test_a_missing_stream_costs_nothing(monkeypatch, stream, tmp_path):
    if stream == "closed":
        stream = open(tmp_path / "log", "w")  # noqa: SIM115
        stream.close()
    elif stream:
        stream = open(stream, "w", buffering=1)  # noqa: SIM115
    monkeypatch.setattr(sys, "stdout", stream)
    with pytest.raises(SystemExit) as ended:
        run_main(lambda: [print("σ", flush=True) for _ in range(3)] and 0)
    assert ended.value.code == 0
    if stream:
        stream.close()


def test_any_name_is_no_obstacle(folder, tmp_path):
    """A formula, a σ and a byte that is no UTF-8, where the system's encoding is ASCII."""
    odd = tmp_path / "cost $1^{2$ σ"
    folder.rename(odd)
    os.rename(os.fsencode(odd / "test" / "a"), os.fsencode(odd / "test") + b"/caf\xe9")
    runs = (
        ("denoising_experiment_proper", "--dataset", "ODD", "--output", "m.pt", *SHORT),
        ("visualize_proper_results", "--checkpoint", "m.pt"),
        *[("ablation_study", "--dataset", "ODD", "--variants", "published", "--seeds", 0, *SHORT)],
    )
    code = (
        "import importlib, json, os, sys\n"
        "(odd,) = [name for name in os.listdir() if name.startswith('cost')]\n"
        "for name, *arguments in json.loads(sys.argv[1]):\n"
        "    sys.argv = [name, *(odd if a == 'ODD' else a for a in arguments)]\n"
        "    script = importlib.import_module(name)\n"
        "    script.PERCENTILES = (5, 95)\n"  # of images to draw, which takes most of the time
        "    script.TIMED_IMAGES = 2\n"
        "    try: script.run_main(script.main)\n"
        "    except SystemExit as ended: assert ended.code == 0"
    )
    process = subprocess.run(
        [sys.executable, "-c", code, json.dumps([[*map(str, run)] for run in runs])],
        cwd=tmp_path,
        env={
            **os.environ,
            **{"PYTHONPATH": str(ROOT), "LC_ALL": "C", "PYTHONUTF8": "0"},
            **{"PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"},
        },
        capture_output=True,
        timeout=1200,
    )
    assert process.returncode == 0, process.stderr
    assert b"\\u03c3 = 0.2" in process.stdout
    assert "cost $1" in (tmp_path / "ablation_study.md").read_text(encoding="utf-8")


def test_scripts_survive_streams_of_a_notebook(call, monkeypatch):
    class Stream(io.StringIO):
        pass

    monkeypatch.setattr(sys, "stdout", Stream())
    with pytest.raises(SystemExit) as ended:
        run_main(lambda: print("σ"))
    assert ended.value.code is None and not hasattr(Stream, "reconfigure")


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("[enforce fail] allocate memory")])
def test_too_little_memory_is_one_sentence(call, monkeypatch, error):
    def exhausted(*_):
        raise error

    monkeypatch.setattr(debug_test_data, "load_images", exhausted)
    assert_refused(call(debug_test_data, "--dataset", "photos"), "not enough memory")


def test_the_method_works_with_torch_alone(tmp_path):
    """Copied into an empty folder with its layers; no library that only other rooms need."""
    shutil.copy(ROOT / "adaptive_attention_moe.py", tmp_path)
    shutil.copytree(ROOT / "layers", tmp_path / "layers")
    code = (
        "import sys\n"
        "for name in ('matplotlib', 'skimage', 'torchvision', 'PIL', 'cv2', 'tqdm'):\n"
        "    sys.modules[name] = None\n"
        "import torch\n"
        "from adaptive_attention_moe import AdaptiveAttentionMoE\n"
        "from layers.conv_stages import ConvDecoder, ConvEncoder\n"
        "layer = AdaptiveAttentionMoE(16, 2, (2, 4))\n"
        "print(*layer(torch.rand(1, 8, 16))[0].shape)"
    )
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert process.stdout == "1 8 16\n", process.stderr
