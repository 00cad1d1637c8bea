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
import debug_evaluation
import debug_test_data
import denoising_experiment_proper as experiment
import visualize_proper_results
import visualize_training_data
from common.user_errors import UserError, run_main
from conftest import ROOT, assert_refused, read_csv
from denoising_experiment_proper import RECIPES
from experiment import command_line
from experiment.checkpoints import write_checkpoint
from experiment.recipe import Recipe, changed
from images import training_batches

# Help ----------------------------------------------------------------------------------------

SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py") if "run_main(main)" in path.read_text())
OPTION = re.compile(r"--[a-z][a-z-]*[a-z]")


@pytest.mark.parametrize("command", [*SCRIPTS, "studies.make_data"])
def test_help_explains_every_option(call, command):
    """What it does and, where that is no matter of a recipe or a model, its default."""
    name, *arguments = command.split()
    process = call(importlib.import_module(name), *arguments, "--help")
    assert process.returncode == 0
    text = re.sub(r"-\n +", "-", process.stdout)  # lines are broken at hyphens as well
    usage = text.split("\n\n")[0]
    names = set(OPTION.findall(usage))
    required = set(OPTION.findall(re.sub(r"\[.*?\]", "", usage)))
    explained = set()
    for group in re.split(r"\n(?=\S.*:\n)", text):
        of_the_group, *options = re.split(r"\n  (?=--)", group)
        for option in options:
            said, described = re.split(r"\s{2,}", option.split("\n\n")[0], maxsplit=1)
            assert len(described) > 10 and "None" not in described, option
            assert set(OPTION.findall(described)) <= names, option
            default = "default" in described or "without it" in described
            assert default or "by default" in of_the_group or said.split()[0] in required, option
            explained |= set(OPTION.findall(said))
    assert explained == names
    if not arguments:
        example = text.split("\nexample: python ")[1]
        assert re.match(rf"(-m )?{name}\b", example)
        assert set(OPTION.findall(example)) <= names


def as_value(text):
    """What a list of recipes says of a setting: a number, several, a word, or nothing for yes."""
    try:
        values = json.loads(f"[{text.strip().replace(' ', ', ')}]")
    except ValueError:
        values = text.split()
    return values if len(values) > 1 else values[0] if values else True


@pytest.mark.parametrize("script", [experiment, ablation_study])
def test_help_lists_the_values_of_every_recipe(call, script):
    text = call(script, "--help").stdout.split("what they change of it:\n")[1]
    told, first = {}, {}
    for name, listed in re.findall(r"^  (\w+): (.*(?:\n {6}.*)*)", text, re.MULTILINE):
        settings = [words.split(" ", 1) for words in " ".join(listed.split()).split(", ")]
        told[name] = first | {n.replace("-", "_"): as_value("".join(v)) for n, *v in settings}
        first = first or told[name]
    assert list(told) == list(RECIPES)
    for name, recipe in RECIPES.items():
        assert Recipe.of(told[name]) == recipe, name


def test_a_training_tells_what_its_recipe_changes(call, folder):
    """No defaults, no shares of a single expert, and one of a thing in the singular."""
    options = ("--recipe", "quick", "--steps", 1, "--weight-decay", 0, "--output", "m.pt")
    process = call(experiment, "--dataset", folder, *options)
    assert process.returncode == 0, process.stderr
    (line,) = re.findall("^recipe quick: (.*)", process.stdout, re.MULTILINE)
    told = set(line.split(", "))
    assert {"model quick", "weight-decay 0.0", "steps 1", "epochs 1", "flip"} < told
    assert not re.search("seed|None|False|jpeg|noise", line)
    assert "1 epoch in 0." in process.stdout and "experts" not in process.stdout
    process = call(experiment, "--dataset", folder, "--epochs", 30, "--lr", 1e30)
    assert "\nrecipe published: lr 1e+30\n" in process.stdout


def test_help_does_not_wait_for_libraries_that_only_the_work_needs():
    code = f"import sys, {', '.join(SCRIPTS)}\nprint({{'scipy', 'torchvision'}} & {{*sys.modules}})"
    command = [sys.executable, "-c", code]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1200)
    assert process.stdout == "set()\n", process.stderr


# Options -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--noise-level", "-0.1"), "must be a number of at least 0 and at most 1000, got '-0.1'"),
        (("--noise-level", "nan"), "got 'nan'"),
        (("--noise-level", 0.3, 0.1), "--noise-level must be one σ, or two in ascending order"),
        (("--noise-map", "stripes"), "--noise-map: invalid choice: 'stripes'"),
        (("--epochs", "0"), "--epochs: must be a whole number of at least 1, got '0'"),
        (("--lr", "0"), "--lr: must be a number above 0, got '0'"),
        (("--lr", "inf"), "--lr"),
        (("--seed", "99999999999"), "--seed"),
        (("--dataset", "nowhere"), "nowhere: no such folder"),
        (("--output", "missing/model.pt"), "missing"),
        (("--resume",), "no interrupted run"),
        (("--lossless-share", "0.5"), "--lossless-share: photos does not mix"),
        (("--output", ""), "--output: must name a file"),
        (("--output", "."), "--output: must name a file"),
        (("--output", "x/"), "--output: must name a file"),
        (("--output", "/dev/null"), "name a .pt file"),
        (("--output", 300 * "x" + ".pt"), "cannot write"),
        (("--threads", "100000"), "--threads: must be a whole number of at least 1 and at most"),
    ],
)
def test_bad_options_are_refused(call, arguments, words):
    assert_refused(call(experiment, "--dataset", "photos", *arguments), words)
    assert not list(Path().iterdir())


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"noise_level": [0.1, 0.2, 0.3]}, "--noise-level must be one σ, or two in ascending"),
        ({"noise_level": [0, 0.3]}, "--noise-level must be a range that starts above 0"),
        ({"noise_level": [1e-9]}, "--noise-level must be 0 or at least 1e-06"),
        ({"noise_map": "regions"}, "--noise-map regions lies between two values of σ"),
        ({"epochs": 1, "steps": 1}, "--epochs and --steps both say how long"),
    ],
)
def test_impossible_changes_of_a_recipe_name_their_option(given, words):
    with pytest.raises(UserError, match=words):
        changed(RECIPES["published"], given)


@pytest.mark.parametrize("script", [debug_test_data, visualize_training_data])
def test_scripts_that_look_at_data_name_the_option_too(call, script):
    process = call(script, "--dataset", "photos", "--noise-map", "regions")
    assert_refused(process, "--noise-map regions lies between two values of σ")


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


def test_an_unwritable_folder_is_refused_before_the_work(call, monkeypatch):
    def refuse(*_, **__):  # root may write anywhere, so permissions cannot show it
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("common.safe_files.tempfile.mkstemp", refuse)
    process = call(experiment, "--dataset", "photos")
    assert_refused(process, "cannot write", "Permission denied")


@pytest.mark.parametrize("script", [visualize_training_data, visualize_proper_results])
def test_an_unknown_kind_of_picture_is_refused_before_the_work(call, script):
    assert_refused(call(script, "--output", "picture.xyz"), "picture.xyz", ".png")


def test_names_too_long_are_one_sentence(call, trained):
    name = 300 * "n"
    assert_refused(call(debug_evaluation, "--checkpoint", name), "no such checkpoint")
    assert_refused(call(debug_test_data, "--dataset", name), "no such folder")
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


@pytest.mark.parametrize("kind", ["none", "closed", "full", "of a notebook"])
def test_a_missing_stream_costs_nothing(monkeypatch, kind, tmp_path):
    stream = None
    if kind == "of a notebook":
        stream = io.StringIO()  # cannot be reconfigured, either
    elif kind != "none":
        name = "/dev/full" if kind == "full" else tmp_path / "log"
        stream = open(name, "w", buffering=1)  # noqa: SIM115
    if kind == "closed":
        stream.close()
    monkeypatch.setattr(sys, "stdout", stream)
    with pytest.raises(SystemExit) as ended:
        run_main(lambda: [print("σ", flush=True) for _ in range(3)] and 0)
    assert ended.value.code == 0
    if stream:
        stream.close()


ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
ASCII["PYTHONIOENCODING"] = "ascii"


def test_any_name_is_no_obstacle(folder, tmp_path):
    """A formula, a σ and a byte that is no UTF-8, where the system's encoding is ASCII."""
    odd = tmp_path / "cost $1^{2$ σ"
    folder.rename(odd)
    os.rename(os.fsencode(odd / "test" / "a"), os.fsencode(odd / "test") + b"/caf\xe9")
    code = (
        "import sys, ablation_study, denoising_experiment_proper, visualize_proper_results\n"
        "visualize_proper_results.ROWS = 2\n"  # most of its time goes into axes
        "data = ['--dataset', sys.argv[1], '--epochs', '1', '--batch-size', '16']\n"
        "for script, *arguments in (\n"
        "    (denoising_experiment_proper, *data, '--output', 'm.pt'),\n"
        "    (visualize_proper_results, '--checkpoint', 'm.pt'),\n"
        "    (ablation_study, *data, '--variants', 'published', '--seeds', '0'),\n"
        "):\n"
        "    sys.argv[1:] = arguments\n"
        "    try: script.run_main(script.main)\n"
        "    except SystemExit as ended: assert ended.code == 0"
    )
    process = subprocess.run(
        [sys.executable, "-c", code, os.fsencode(odd)],
        cwd=tmp_path,
        env={**os.environ, **ASCII, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        timeout=1200,
    )
    assert process.returncode == 0, process.stderr
    assert b"\\u03c3 = 0.2" in process.stdout
    assert "cost $1" in (tmp_path / "ablation_study.md").read_text(encoding="utf-8")


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


def test_a_busy_machine_is_told_of_before_the_training(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    for load, threads, told in ((1.9, None, True), (0.2, None, False), (1.9, 1, False)):
        monkeypatch.setattr(os, "getloadavg", lambda load=load: (load, 0, 0))
        assert ("--threads 1" in command_line.hint_of_load(threads)) is told


def test_a_training_without_a_terminal_tells_how_far_it_is(capsys, monkeypatch):
    monkeypatch.setattr(training_batches, "SECONDS_PER_LINE", -1)
    batches = [(torch.zeros(2, 3, 4, 4),)] * 3
    for silent in (True, False):
        steps = training_batches.with_progress(batches, torch.zeros(2), "epoch 1/2", 7, 2, silent)
        assert [number for number, _ in steps] == [7, 8]
    assert capsys.readouterr().out == "epoch 1/2: step 1 of 2\nepoch 1/2: step 2 of 2\n"
