"""Layer 5, figures that scripts tell: of which images they are, and what counts as equal."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import compare_baselines
import debug_evaluation
import visualize_proper_results
from common.user_errors import UserError
from conftest import write_images
from experiment.checkpoints import Trained
from experiment.evaluation import evaluate
from experiment.recipe import Recipe
from experiment.trained_model import images_for
from images.image_sources import load_images
from images.noisy_images import NoisyImageDataset
from small_vit import load_model


def trained_on(folder, **changes):
    recipe, source = Recipe(**changes), load_images(str(folder))
    about = {"dataset": source.name, "images_sha256": source.sha256()}
    return Trained("m.pt", recipe, {"recipe": about, "dataset": source.option})


def test_a_model_is_tested_again_on_the_images_of_its_training(folder):
    trained = trained_on(folder, lossless_share=0.5)
    _, val_set, test_set = images_for(trained, same_images=True)[1]
    assert val_set.split.lossless.all() and not test_set.full_size
    assert len(images_for(trained)[1][2]) == len(test_set)
    assert images_for(trained_on(folder, crop=96))[1][2].full_size  # smaller than its crops
    write_images(folder / "test" / "a", 1, seed=99)  # another image under the same name
    with pytest.raises(UserError, match="trained and tested on other images than these, folder"):
        images_for(trained, same_images=True)


@pytest.mark.parametrize("factor", [-1.1, -0.9, 0.9, 1.1])
def test_stored_figures_hold_within_their_tolerance(factor):
    tolerances = {"psnr_mean": 0.01, "noisy_psnr_mean": 0.01, "ssim_std": 5e-4, "val_mse": 2e-5}
    stored = {name: 1.0 for name in tolerances}
    measured = {name: 1 + factor * tolerance for name, tolerance in tolerances.items()}
    stored["utilisation"] = [[0.3, 0.7], [1.0]]
    measured["utilisation"] = [[0.3, 0.7 + 0.001 * factor, 0.1]]  # of other experts, too
    agree = {name: agrees for name, *_, agrees in debug_evaluation.compare(stored, measured)}
    assert agree.pop("utilisation 1.1")
    assert not agree.pop("utilisation 1.3") and not agree.pop("utilisation 2.1")
    assert agree == dict.fromkeys(agree, abs(factor) < 1)


def test_baselines_are_told_of_all_images_and_the_model_of_8_bits_too(photos, capsys, monkeypatch):
    result = SimpleNamespace(psnr=[21.0], ssim=[0.5], psnr_8_bits=[19.0])
    monkeypatch.setattr(compare_baselines, "evaluate", lambda *_: result)
    methods = {"none": (lambda x, strength: np.where(x == 1, 2, x), [1.0])}  # clipped as others
    monkeypatch.setattr(compare_baselines, "baselines", lambda *_: methods)
    monkeypatch.setattr(compare_baselines, "best_of", lambda *_: (1.0, np.zeros((2, 75))))
    compare_baselines.compare(None, NoisyImageDataset(photos.test[:150]), classical=True)
    *_, noisy, none, model, of_files = capsys.readouterr().out.splitlines()
    assert noisy.replace("noisy input", "none, strength 1") == none
    assert "| 21.00 ± 0.00 |" in model and "8 bits: 19.00 ± 0.00 dB" in of_files


def test_the_detail_of_a_photograph_is_where_it_varies_most(monkeypatch):
    monkeypatch.setattr(visualize_proper_results, "DETAIL", 8)
    image = torch.full((3, 32, 24), 0.9)
    image[:, 16:24:2, 4:12:2] = 0.1
    assert visualize_proper_results.detail(image) == (slice(16, 24), slice(4, 12))


def test_what_a_capacity_is_worth_and_what_may_go_with_attending_are_measured(photos, capsys):
    model = load_model("routed")
    test_set = NoisyImageDataset(photos.test[::40], model.trained.recipe.degradation)
    noisy, clean, _ = test_set[0]
    images = test_set.sigma(0), clean, (model.denoise(noisy[None])[0] - clean).square()
    patches = [torch.nn.functional.unfold(x[None], 4, stride=4)[0] for x in images]  # [48, 64]
    expected = [patches[0].mean(0), patches[1].std(0, correction=0), patches[2].mean(0)]
    _, causes = visualize_proper_results.decisions(model, test_set, 0)
    assert torch.allclose(causes, torch.stack(expected), atol=1e-4)
    visualize_proper_results.print_capacities(model, test_set)
    told = capsys.readouterr().out
    for model.capacity in (1.0, 0.5, 0.25, 0.125):
        decibels = evaluate(model, test_set).psnr.mean()
        assert f"| {100 * model.capacity:g} % | {decibels:.3f} |" in told


def test_what_goes_with_attending_is_told_by_correlation(photos, capsys, monkeypatch):
    attend = torch.tensor([[1.0, 1.0, 0.0, 0.0]])
    causes = torch.tensor([[8.0, 8.0, 0.0, 0.0], [0.0, 0.0, 0.1, 0.1], [1.0, 1.0, 1.0, 1.0]])
    monkeypatch.setattr(visualize_proper_results, "decisions", lambda *_: (attend, causes))
    visualize_proper_results.print_decisions(None, NoisyImageDataset(photos.test[:2]))
    told = capsys.readouterr().out.splitlines()[-1].split()
    assert told == ["block", "1", "0.0", "%", "50.0", "%", "100.0", "%", "1.000", "-1.000", "–"]
