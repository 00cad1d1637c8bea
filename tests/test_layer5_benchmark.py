"""Layer 5, the benchmark: that it times every row, and what it compares."""

import concurrent.futures
import json
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch

import benchmark
from conftest import assert_refused
from experiment import timing


class Inline:
    """In the place of a process of its own, which takes seconds to start."""

    def __init__(self, *_):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, function, *arguments):
        job = concurrent.futures.Future()
        job.set_result(function(*arguments))
        return job


def test_benchmark_times_every_row_side_by_side(folder, call, monkeypatch, another_process):
    class Elsewhere(Inline):
        def submit(self, function, name, *arguments):
            # in a process of its own, where its memory can be seen
            pool = another_process if name == "straightforward" else super()
            return pool.submit(function, name, *arguments)

    monkeypatch.setattr(timing, "ProcessPoolExecutor", Elsewhere)
    photograph = benchmark.noisy_photograph
    monkeypatch.setattr(benchmark, "noisy_photograph", lambda name, *_: photograph(name, (48, 48)))
    monkeypatch.setattr(benchmark, "TILES", ((32, 16),))
    small = benchmark.Effort(1, 0, batch_size=4, evaluation_images=8, tokens=(64, 256))
    monkeypatch.setattr(benchmark, "QUICK", small)
    process = call(benchmark, "--dataset", folder, "--quick", "--dtype", "bfloat16")
    assert process.returncode == 0, process.stderr
    results = json.loads(Path("benchmark_results.json").read_text())
    assert [row["row"] for row in results["rows"]] == list(benchmark.ROWS[:-3])
    assert [row["images"] for row in results["rows"]] == [4, 4, 4, 4, 16, 8]
    assert [row["tokens"] for row in results["tokens"]] == [64, 256]
    assert results["tokens"][1]["extra_bytes"]["straightforward"] > 0
    variants = {"this", "straightforward", "dense"}
    for row in results["rows"][:4]:
        assert row["seconds"].keys() == variants | {"refined", "routed"}
        assert row["times_faster"] > 0 and 0 < row["part_of_rate"] < 2
    assert all(row["seconds"].keys() == variants for row in results["tokens"])
    assert [row["model"] for row in results["photograph"]] == list(benchmark.DENOISERS)
    assert all(row["seconds"] > 0 for row in results["photograph"])
    assert [(row["tile"], row["overlap"]) for row in results["tiles"]] == [(32, 16)]
    assert results["machine"]["dtype"] == "bfloat16"


def test_benchmark_says_when_its_measuring_process_was_ended(folder, call, monkeypatch):
    def submit(*_):
        job = concurrent.futures.Future()
        job.set_exception(BrokenProcessPool())
        return job

    monkeypatch.setattr(timing, "ProcessPoolExecutor", Inline)
    monkeypatch.setattr(Inline, "submit", submit)
    monkeypatch.setattr(benchmark, "QUICK", benchmark.Effort(1, 0, 2, 2, (64,)))
    process = call(benchmark, "--dataset", folder, "--quick", "--rows", "tokens")
    assert_refused(process, "measuring memory", "--rows")


def test_benchmark_lengthens_sequences_with_real_patches(vit):
    images = torch.rand(5, 3, 32, 32)
    whole = benchmark.mosaic(images, 1024)
    assert whole.shape == (1, 3, 128, 128)
    assert torch.equal(whole[0, :, 32:64, 64:96], images[6 % 5])
    assert benchmark.tokens_of(vit, whole).shape == (1, 1024, 128)


def test_benchmark_compares_the_same_function():
    """The yardstick computes what the timed model computes."""
    variants = benchmark.make_variants(torch.device("cpu"), ("this", "straightforward"))
    generator, outputs = torch.Generator().manual_seed(0), []
    tokens = torch.randn(2, 64, 128, generator=generator)
    for model in variants.values():
        torch.nn.init.eye_(model.blocks[0].attention.merge.weight)
        outputs.append(model.blocks[0].attention(tokens)[0])
    assert outputs[0].abs().max() > 0.01
    assert torch.allclose(*outputs, atol=1e-5)
