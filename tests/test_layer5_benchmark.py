"""Layer 5, the benchmark: that it times every row, and what it compares."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import benchmark
from common.user_errors import UserError
from studies import benchmark_large, timing
from studies.model_variants import make_yardsticks
from studies.timing import peaks_apart


def test_benchmark_times_every_row_side_by_side(folder, call, monkeypatch):
    def peaks_here(runs, *arguments, device):
        return [0 for _ in runs(*arguments)][1:]

    monkeypatch.setattr(benchmark_large, "peaks_apart", peaks_here)
    photograph = benchmark_large.noisy_photograph
    monkeypatch.setattr(
        benchmark_large, "noisy_photograph", lambda name, *_: photograph(name, (48, 48))
    )
    small = benchmark.Effort(1, 0, 4, tokens=(64, 256), tiles=((32, 16),))
    monkeypatch.setattr(benchmark, "QUICK", small)
    process = call(benchmark, "--dataset", folder, "--quick", "--dtype", "bfloat16")
    assert process.returncode == 0, process.stderr
    results = json.loads(Path("benchmark_results.json").read_text())
    assert [row["row"] for row in results["rows"]] == list(benchmark.SIDE_BY_SIDE)
    assert [row["images"] for row in results["rows"]] == [4, 4, 4, 4, 16]
    assert [row["tokens"] for row in results["tokens"]] == [64, 256]
    yardsticks = {"this", "straightforward", "dense"}
    for row in results["rows"][:4]:
        assert row["seconds"].keys() == yardsticks | {"refined", "routed"}
        seconds = row["seconds"]
        assert row["times_faster"] == seconds["straightforward"] / seconds["this"]
        assert row["images_per_second"] == row["images"] / seconds["this"]
    assert all(row["seconds"].keys() == yardsticks for row in results["tokens"])
    models = list(benchmark_large.DENOISERS)
    assert [row["model"] for row in results["photograph"]] == 2 * models
    tiles = [tile for tile in (128, 481) for _ in models]
    assert [row["tile"] for row in results["photograph"]] == tiles
    assert all(row["seconds"] > 0 for row in results["photograph"])
    assert [(row["tile"], row["overlap"]) for row in results["tiles"]] == [(32, 16)]
    assert results["machine"]["dtype"] == "bfloat16"


def test_memory_is_seen_in_a_process_of_its_own():
    images, cpu = np.zeros((1, 3, 32, 32), np.float32), torch.device("cpu")
    arguments = ("straightforward", images, [64, 256], cpu, "float32")
    less, more = peaks_apart(benchmark_large.layer_runs, *arguments, device=cpu)
    assert 2**28 > more > less >= 0
    with pytest.raises(UserError, match=r"measuring memory was ended; .* --rows"):
        peaks_apart(os._exit, 1, device=cpu)


@pytest.mark.parametrize(
    ("rounds", "seconds", "taken"), [(5, 1e9, [3, 1, 5, 4, 9]), (5, 2, [3, 1, 5]), (2, 0, [3, 1])]
)
def test_the_median_is_told_of_the_rounds_after_a_warm_up(monkeypatch, rounds, seconds, taken):
    """Of 3 at least where they take too long."""
    clock, lengths = [0], {"a": iter([100, 3, 1, 5, 4, 9]), "b": iter([1] * 6)}
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    functions = {name: lambda n=name: clock.append(clock.pop() + next(lengths[n])) for name in "ab"}
    medians = timing.alternate(functions, rounds, seconds, torch.device("cpu"))
    assert medians == {"a": np.median(taken), "b": 1}
    assert len(list(lengths["b"])) == 5 - len(taken)


def test_benchmark_measures_on_real_patches_and_noise(vit):
    images = torch.rand(5, 3, 32, 32)
    large = benchmark_large.mosaic(images, 1024)
    assert large.shape == (1, 3, 128, 128)
    assert torch.equal(large[0, :, 32:64, 64:96], images[6 % 5])
    assert benchmark_large.tokens_of(vit, large).shape == (1, 1024, 128)
    noisy, clean = benchmark_large.noisy_photograph("coffee", (99, 99))
    assert clean.shape == (99, 99, 3) and (noisy - clean).std() == pytest.approx(25 / 255, rel=0.02)


def test_benchmark_compares_the_same_function():
    """The yardstick computes what the timed model computes."""
    variants = make_yardsticks(torch.device("cpu"), ("this", "straightforward"))
    generator, outputs = torch.Generator().manual_seed(0), []
    tokens = torch.randn(2, 64, 128, generator=generator)
    for model in variants.values():
        torch.nn.init.eye_(model.blocks[0].attention.merge.weight)
        outputs.append(model.blocks[0].attention(tokens)[0])
    assert outputs[0].abs().max() > 0.01
    assert torch.allclose(*outputs, atol=1e-5)
