"""Layer 5, the ablation study: what it trains, what it keeps and what it refuses."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt

import ablation_study
import denoising_experiment_proper as experiment
from common.user_errors import UserError
from conftest import ROOT, assert_refused, interrupted_in_epoch, same_weights, write_images
from experiment.checkpoints import complete
from experiment.recipe import Recipe
from experiment.reports import plus_minus
from experiment.tiling import InTiles
from small_vit import SmallViT
from studies import study_results
from studies.model_variants import VARIANTS
from studies.timing import count_flops

DRAWN = {"dataset": "photos", "noise_level": [0.05, 0.4], "noise_map": "regions", "tiles": []}
NO_STUDY = "no result of ablation_study.py"


@pytest.fixture
def study(call, tmp_path, monkeypatch):
    """Runs ablation_study.py with one step for each variant and an empty picture after it."""
    monkeypatch.setattr(study_results, "draw", lambda *_: plt.figure(figsize=(1, 1)))
    write_images(tmp_path / "few" / "train", 3)
    write_images(tmp_path / "few" / "test", 2)
    options = ("--dataset", tmp_path / "few", "--batch-size", 2, "--epochs", 1)

    def run(*others, seeds=(0,)):
        return call(ablation_study, *options, "--seeds", *seeds, *others)

    return run


def test_ablation_study_trains_every_variant(study):
    process = study("--variants", *VARIANTS)
    assert process.returncode == 0, process.stderr
    results = json.loads(Path("ablation_study.json").read_text())
    assert [row["variant"] for row in results["rows"]] == list(VARIANTS)
    assert max(row["parameters"] for row in results["rows"]) <= 599_689
    routed = {row["variant"]: np.shape(row["utilisation"]) for row in results["rows"]}
    assert routed["published"] == (2, 3) and routed["dense, one expert"] == (2, 1)
    assert routed["DnCNN"] == (0,)
    points = {row["variant"]: {p["at"]: p for p in row["points"]} for row in results["rows"]}
    budgets = points["capacity, by router"]
    assert list(points["published"]) == ["all"]
    assert list(budgets) == ["100 %", "50 %", "25 %", "12.5 %"]
    for figure in ("psnr", "ssim", "mflops"):
        assert len({point[figure] for point in budgets.values()}) == len(budgets), figure
    table = Path("ablation_study.md").read_text()
    assert all(table.count(f"| {name} | ") == len(points[name]) for name in VARIANTS)
    assert f"\n{table}\n" in process.stdout and "–" not in table
    assert Path("ablation_study.png").exists()


@pytest.mark.parametrize(
    ("recipe", "variant", "at"),
    [("published", "published", "all"), ("routed", "capacity, by router, local", "25 %")],
)
def test_ablation_study_trains_as_the_training_script_does(call, folder, recipe, variant, at):
    """The same loop and noise: its figure is that of the checkpoint of the same seed."""
    options = ("--dataset", folder, "--recipe", recipe, "--epochs", 2, "--batch-size", 4)
    assert call(ablation_study, *options, "--variants", variant, "--seeds", 42).returncode == 0
    assert call(experiment, *options, "--output", "m.pt").returncode == 0
    study = json.loads(Path("ablation_study.json").read_text())
    (row,), checkpoint = study["rows"], torch.load("m.pt", weights_only=True)
    (psnr,) = (point["psnr"] for point in row["points"] if point["at"] == at)
    assert psnr == checkpoint["test"]["psnr_mean"]
    assert study["recipe"]["noise_map"] == checkpoint["recipe"]["noise_map"]


@pytest.mark.parametrize(("name", "weight"), [("published", 0.5), ("no load-balancing loss", 0)])
def test_a_variant_is_trained_by_the_recipe_and_has_its_best_epoch(monkeypatch, name, weight):
    recipe, states = Recipe(balance_weight=0.5), [SmallViT().state_dict() for _ in range(2)]

    def train(model, train_set, val_set, asked):
        assert asked == replace(recipe, balance_weight=weight)
        return {"best": {"model": states[0]}, "model": states[1]}

    monkeypatch.setattr(ablation_study, "train", train)
    model = SmallViT()
    ablation_study.train_variant(name, model, recipe, None, None)
    assert same_weights(model.state_dict(), states[0])


def row(seed, *psnrs):
    """A row of a study, with points of two budgets or, without figures, of a diverged training."""
    places = zip(("100 %", "50 %"), psnrs, (1.26, 0.5), strict=False)
    points = [{"at": a, "psnr": p, "ssim": p / 100, "mflops": m} for a, p, m in places]
    about = {"variant": "capacity, by router, local", "seed": seed, "parameters": 1234}
    return about | {"points": points, "train_seconds": 10.0 * seed if psnrs else None}


def test_table_and_picture_tell_means_over_seeds():
    rows = [row(1, 22.0, 21.5), row(2, 20.0, 19.0), row(3)]
    table = study_results.markdown(rows, {"lr": 0.5})
    assert table.startswith("lr 0.5\n") and "| MFLOP | training (s) |" in table
    first, second = table.splitlines()[-2:]
    start = "| capacity, by router, local |"
    assert first == (
        f"{start} 100 % | 1,234 | 2, 1 diverged | 21.000 ± 1.000 | 20.000 | 0.2100 ± 0.0100 | 1.3 "
        "| 15.0 |"
    )
    assert second.startswith(f"{start} 50 % |") and second.endswith("| 0.5 | 15.0 |")
    assert " | 20.250 ± 1.250 | 19.000 | " in second
    (axis,) = study_results.draw(rows, DRAWN).axes
    assert axis.get_title().endswith("\nphotos, σ = 0.05 to 0.4 (regions)")
    assert axis.get_xlabel().startswith("compute per image (MFLOP)")
    ((line, _, (bars,)),) = axis.containers
    assert line.get_xydata().tolist() == [[0.5, 20.25], [1.26, 21.0]]
    assert [np.ptp(bar[:, 1]) for bar in bars.get_segments()] == pytest.approx([2.5, 2.0])
    assert axis.texts[0].xy == (1.26, 21.0)
    plt.close("all")


def test_each_curve_of_a_picture_has_its_label():
    recipe, rows = study_results.read_study(ROOT / "results" / "regions.json")
    names = ["capacity, by router", "capacity, by noise"]
    kept = [row for row in rows if row["variant"] in names]
    (axis,) = study_results.draw(kept, recipe).axes
    assert [text.get_text() for text in axis.texts] == names
    plt.close("all")


@pytest.mark.filterwarnings("error")
def test_a_picture_without_curves_is_drawn_in_silence():
    """Its rows have all diverged."""
    study_results.draw([row(3)], DRAWN)
    plt.close("all")


def test_ablation_study_goes_on_where_it_stopped(study):
    names = ("published", "uniform weights", "no load-balancing loss")
    with interrupted_in_epoch(3):  # of one epoch each
        assert study("--variants", *names).returncode == 130
    process = study("--variants", *names, *names, seeds=(0, 0))
    assert re.findall("^(.*), seed 0$", process.stdout, re.MULTILINE) == [names[-1]]
    assert "| published | all | 599,689 | 1 |" in process.stdout  # each seed counts once
    process = study("--variants", *names, "--lr", 0.5)
    assert_refused(process, "lr 0.001, this one has 0.5", "--output")


POINT = {"at": "all", "psnr": 20.0, "ssim": 0.5, "mflops": 1.0}
ROW = {"variant": "published", "seed": 0, "parameters": 599_689, "points": [POINT]}
ROW |= {"train_seconds": 1.0, "utilisation": None}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"parameters": 7}, "'published' with 7 parameters"),
        ({"variant": "older"}, "'older' with 599,689 parameters"),
        ({"seed": [0]}, NO_STUDY),
        ({"parameters": math.inf}, NO_STUDY),
        ({"train_seconds": None}, NO_STUDY),
        ({"points": None}, NO_STUDY),
        ({"points": [{}]}, NO_STUDY),
        ({"points": [POINT | {"mflops": -1.0}]}, NO_STUDY),
    ],
)
def test_rows_of_other_variants_are_refused(tmp_path, change, words):
    recipe = {"dataset": "photos", **Recipe().as_dict(), "tiles": []}
    for file, row in (("good.json", ROW), ("bad.json", ROW | change)):
        (tmp_path / file).write_text(json.dumps({"recipe": recipe, "rows": [row]}))
    assert ablation_study.read_rows(tmp_path / "good.json", recipe) == [ROW]
    with pytest.raises(UserError, match=words):
        ablation_study.read_rows(tmp_path / "bad.json", recipe)


@pytest.mark.parametrize(
    "text", [100_000 * "[", '{"recipe": {"dataset": "photos", "tiles": []}, "rows": 3}', "[]"]
)
def test_other_json_files_are_no_study(tmp_path, text):
    (tmp_path / "s.json").write_text(text)
    with pytest.raises(UserError, match=f"s.json is {NO_STUDY}"):
        study_results.read_study(tmp_path / "s.json")
    with pytest.raises(UserError, match=r"cannot read .*: Is a directory"):
        study_results.read_study(tmp_path)


def test_ablation_study_does_not_touch_other_files(study):
    Path("mine.json").write_text("[]")
    assert_refused(study("--output", "mine.json"), "mine.json", NO_STUDY)
    assert Path("mine.json").read_text() == "[]"
    for output, words in (
        ("README.json", "README.md is not of this study"),
        ("drawn.json", "drawn.png is not of this study"),
        ("mine.txt", "name a .json file"),
    ):
        Path("README.md").touch()
        Path("drawn.png").touch()
        with pytest.raises(UserError, match=words):
            study_results.files_of(Path(output))


def test_a_variant_that_diverges_does_not_end_the_study(study):
    options = ("--variants", "published", "no load-balancing loss", "--lr", 1e30)
    assert study(*options).returncode == 0
    process = study(*options)
    assert process.returncode == 0, process.stderr
    assert "published, seed 0" not in process.stdout  # it is not tried again
    for name in options[1:3]:
        assert f"| {name} | – | 599,689 | 0, 1 diverged | – | – | – |" in process.stdout


# Tiles ---------------------------------------------------------------------------------------


def test_study_draws_psnr_against_the_size_of_tiles(call, tmp_path):
    for part in ("train", "test"):
        write_images(tmp_path / "few" / part, 3, size=(50, 40))
    options = ("--dataset", tmp_path / "few", "--recipe", "photographs", "--crop", 16)
    options += ("--steps", 1, "--seeds", 0, 1)
    names = ("photographs", "photographs, dense")
    process = call(ablation_study, *options, "--variants", *names, "--tiles", 50, 32, 50)
    assert process.returncode == 0, process.stderr
    rows = json.loads(Path("ablation_study.json").read_text())["rows"]
    places = ["all"] + [
        f"{kind}tiles of {n}×{n}" for n in (32, 50) for kind in ("", "overlapping ")
    ]
    assert [[point["at"] for point in row["points"]] for row in rows] == [places] * 4
    for row in rows:
        whole, small, overlapping, _, in_one = row["points"]
        assert len({point["psnr"] for point in (whole, small, overlapping)}) == 3
        assert in_one["psnr"] == pytest.approx(whole["psnr"], abs=1e-4)  # of no tile's border
        assert small["ssim"] is None
        flops = count_flops(VARIANTS[row["variant"]]().eval(), torch.rand(1, 3, 16, 16))
        assert whole["mflops"] == flops / 1e6 and small["mflops"] is None  # of a crop alone
    table = Path("ablation_study.md").read_text()
    assert len(re.findall(r"\| tiles of 50×50 \| .* ± .* \| – \| – \| ", table)) == 2
    assert Path("ablation_study.png").stat().st_size > 10_000
    process = call(ablation_study, *options, "--variants", *names)
    assert_refused(process, "tiles [32, 50]")
    process = call(ablation_study, *options, "--tiles", 32, "--task", "inpaint")
    assert_refused(process, "--tiles: inpainting is not tested in tiles")
    assert_refused(
        call(ablation_study, "--dataset", "photos", "--tiles", 32), "--recipe photographs"
    )


def test_tiles_are_drawn_in_the_order_of_their_size_and_whole_images_last():
    def points(*psnrs):
        places = ("all", "tiles of 16×16", "tiles of 32×32")
        return [{"at": a, "psnr": p} for a, p in zip(places, psnrs, strict=True)]

    shares = [{"at": a, "psnr": p} for a, p in (("50 %", 1.0), ("25 %", 20.0))]
    rows = [
        {"variant": "photographs", "points": points(22.0, 21.0, 23.0)},
        {"variant": "photographs", "points": points(24.0, 21.0, 23.0)},
        {
            "variant": "photographs, capacity, by router",
            "points": shares + points(0, 19.0, 21.0)[1:],
        },
    ]
    (axis,) = study_results.draw(rows, DRAWN | {"tiles": [16, 32], "crop": 16}).axes
    assert axis.get_title().endswith("photos, σ = 0.05 to 0.4 (regions), trained on crops of 16×16")
    curves = [line.get_ydata().tolist() for (line, *_) in axis.containers]
    assert curves == [[21.0, 23.0, 23.0], [19.0, 21.0, 20.0]]
    axis.figure.canvas.draw()
    labels = [text.get_text() for text in axis.get_xticklabels()]
    assert labels == ["16×16", "32×32", "whole"]
    plt.close("all")


def test_tiles_are_restored_one_by_one():
    """Each tile by itself: what is changed in one changes nothing in the others."""

    def blur(tiles):
        assert tiles.shape == (12, 3, 16, 16)
        return tiles.mean((2, 3), keepdim=True) + 0 * tiles, []

    image = torch.rand(1, 3, 40, 50, generator=torch.Generator().manual_seed(0))
    restored, _ = InTiles(blur, 16)(image)
    assert restored.shape == image.shape
    expected = image[..., 16:32, 32:48].mean((2, 3), keepdim=True)
    assert torch.allclose(restored[..., 16:32, 32:48], expected.expand(1, 3, 16, 16))
    image[..., :16, :16] = 0
    changed, _ = InTiles(blur, 16)(image)
    assert torch.equal(changed[..., 16:, :], restored[..., 16:, :])
    assert torch.equal(changed[..., :, 16:], restored[..., :, 16:])
    assert not changed[..., :16, :16].any()


@pytest.mark.parametrize("path", sorted(ROOT.glob("results/*.json")), ids=lambda path: path.stem)
def test_the_documents_have_the_figures_of_the_kept_studies(path):
    """Of all variants with several seeds, which this version still makes as they were."""
    recipe = complete(json.loads(path.read_text())["recipe"])
    told = "".join((ROOT / name).read_text() for name in ("FINAL_REPORT.md", "results/README.md"))
    of_tiles = bool(recipe["tiles"])
    for points in study_results.points_of(ablation_study.read_rows(path, recipe)).values():
        for at, of_seeds in points.items():
            wanted = at.startswith("tiles of") if of_tiles else True
            if wanted and len(of_seeds) > 1:
                assert plus_minus([point["psnr"] for point in of_seeds], 3) in told
