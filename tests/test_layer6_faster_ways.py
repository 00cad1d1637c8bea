"""Layer 6, faster ways to the same result: processes, compilers, CUDA graphs, bfloat16."""

import contextlib
import copy
import gc
import socket
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist

import denoising_experiment_proper as experiment
from common.user_errors import UserError
from conftest import filled, load_history, run_here, same_weights, train_few
from denoising_experiment_proper import Recipe
from experiment import cuda_graphs, data_parallel
from experiment.evaluation import evaluate
from experiment.muon import make_optimizer
from experiment.run_files import RunFiles
from experiment.tiling import Tiled, denoise, restore_any_size
from images.degradations import KINDS, GaussianNoise, PairedNoise
from images.image_sources import Split
from images.noisy_images import NoisyImageDataset
from images.training_batches import training_batches
from small_vit import MODELS, SmallViT

needs_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="of CUDA graphs")

# Processes -----------------------------------------------------------------------------------


def as_process(number, port, folder, *arguments):
    """The training script as that one of two processes, with what torchrun sets for it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        # where the other one has failed
        patch.setattr(data_parallel, "timedelta", lambda **_: timedelta(minutes=2))
        for name, value in {
            **{"TORCHELASTIC_RUN_ID": "none", "MASTER_ADDR": "localhost", "MASTER_PORT": port},
            **{"WORLD_SIZE": 2, "RANK": number, "LOCAL_RANK": number},
        }.items():
            patch.setenv(name, str(value))
        try:
            return run_here(experiment, *arguments)
        finally:
            if dist.is_initialized():  # all that follows would wait for the other one
                dist.destroy_process_group()


def test_two_processes_train_as_one_does(call, folder, another_process, tmp_path):
    """One log, one checkpoint, the curve of one process."""
    options = ("--dataset", folder, "--batch-size", 4, "--epochs", 3, "--seed", 3)
    options += ("--device", "cpu")
    assert call(experiment, *options, "--output", "one.pt").returncode == 0
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    second = another_process.submit(as_process, 1, port, tmp_path, *options)
    first = as_process(0, port, tmp_path, *options)
    assert first.returncode == 0, first.stderr
    assert (second.result().returncode, second.result().stdout) == (0, "")
    assert first.stdout.count("epoch   2") == first.stdout.count("FINAL RESULTS") == 1
    assert "2 processes" in first.stdout
    assert sorted(p.name for p in Path().glob("*.pt")) == ["one.pt", "published_images.pt"]
    one, two = (load_history(RunFiles(Path(p))) for p in ("one.pt", "published_images.pt"))
    assert len(one) == len(two) == 3
    for expected, row in zip(one, two, strict=True):
        for name in ("train_mse", "val_mse"):
            assert row[name] == pytest.approx(expected[name], rel=1e-3)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind is not PairedNoise])
def test_processes_share_every_whole_batch_and_degrade_their_own_images(few, kind, monkeypatch):
    """Together they have bit for bit the batch of one, of which the incomplete one is left out."""
    noise = GaussianNoise((0.05, 0.4), "regions", jpeg_share=0.5)
    damage, degraded = noise if kind is GaussianNoise else kind(), []
    dataset = NoisyImageDataset(few[0].split[:8], damage)
    how = {"flip": True, "transpose": True, "crop": 24, "with_sigma": True}
    one = next(training_batches(dataset, 6, 0, 1, **how))
    original = dataset.degraded
    monkeypatch.setattr(
        dataset, "degraded", lambda x, *a: degraded.append(len(x)) or original(x, *a)
    )
    for number in range(3):
        batches = list(training_batches(dataset, 6, 0, 1, share=(number, 3), **how))
        assert len(batches) == 1
        assert all(torch.equal(a, b[number::3]) for a, b in zip(batches[0], one, strict=True))
    assert degraded == [2, 2, 2]


def test_a_recipe_takes_the_share_of_its_process(few, monkeypatch):
    whole = next(Recipe(batch_size=4).batches(few[0], 1))
    for name, value in (("rank", 1), ("world_size", 2)):
        monkeypatch.setattr(f"experiment.recipe.{name}", lambda value=value: value)
    share = next(Recipe(batch_size=4).batches(few[0], 1))
    assert all(torch.equal(a, b[1::2]) for a, b in zip(share, whole, strict=True))


def test_processes_take_equal_shares_or_none(monkeypatch):
    monkeypatch.setattr(data_parallel, "world_size", lambda: 3)
    data_parallel.check_shares(batch_size=6, images=6)
    for batch_size, images in ((64, 100), (6, 5)):
        with pytest.raises(UserError, match="--batch-size"):
            data_parallel.check_shares(batch_size, images)


# Compilers -----------------------------------------------------------------------------------


def test_training_goes_on_where_torch_compile_fails(few, default_run, monkeypatch, capsys):
    def backend(graph, inputs):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    with torch._dynamo.config.patch(suppress_errors=False):  # put back afterwards
        state = train_few(few, fast=experiment.compiled)
    torch.compiler.reset()  # or the functions that failed would be skipped from now on
    assert same_weights(state["model"], default_run["model"])
    printed = capsys.readouterr()
    assert printed.out.count("torch.compile does not work here") == 1
    assert "Traceback" not in printed.err


def test_training_runs_what_torch_compile_made(few, default_run):
    calls = []

    class Fast(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, noisy):
            calls.append(len(noisy))
            return self.model(noisy)

    assert same_weights(train_few(few, fast=Fast)["model"], default_run["model"])
    assert calls == [4] * 3 * 4  # a smaller batch is left to the model itself


@pytest.mark.parametrize(
    "config", [replace(MODELS["refined"], num_layers=1, conv_depth=1), MODELS["routed"]]
)
def test_models_compile_to_one_graph(seeded, config):
    """Without the code generator, which needs a C++ compiler; a break in the graph would raise."""
    model, gradients = filled(SmallViT(config)), []
    for run in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        model.zero_grad()
        run(torch.ones(2, 3, 32, 32))[0].square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    for eager, compiled in zip(*gradients, strict=True):
        assert torch.allclose(compiled, eager, rtol=1e-3, atol=1e-5)


# Graphs and types ----------------------------------------------------------------------------


def train_in_steps(model, optimizer, replay=False):
    """Losses of eight steps, each at a learning rate of its own, the sixth on fewer images."""
    optimizer = make_optimizer(model.train(), optimizer, 1e-3, 1e-4)
    step = partial(experiment.training_step, model, optimizer, recipe=Recipe())
    step = cuda_graphs.ReplayedStep(step, optimizer) if replay else step
    device = next(model.parameters()).device
    generator, losses = torch.Generator().manual_seed(0), []
    for n, images in enumerate((4, 4, 4, 4, 4, 3, 4, 4), 1):
        for group in optimizer.param_groups:
            group["lr"] = 1e-4 * n
        clean = torch.rand(images, 3, 32, 32, generator=generator).to(device)
        losses.append(step(clean.flip(3), clean))
    assert all(isinstance(group["lr"], float) for group in optimizer.param_groups)
    return torch.stack(losses)


@needs_a_gpu
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("name", ["vit", "refined"])
def test_a_replayed_step_is_the_step(name, optimizer, request):
    stepwise = request.getfixturevalue(name).cuda()
    replayed, calls = copy.deepcopy(stepwise), []
    losses = train_in_steps(stepwise, optimizer)
    replayed.register_forward_hook(lambda *_: calls.append(1))
    assert torch.allclose(train_in_steps(replayed, optimizer, replay=True), losses, rtol=1e-3)
    assert len(calls) == cuda_graphs.WARM_UP_STEPS + 1 + 1  # the recording; the smaller batch
    others = dict(stepwise.named_parameters())
    for key, one in replayed.named_parameters():
        if not key.endswith("key.bias"):  # whose gradient is nothing but rounding
            assert (one - others[key]).norm() <= 0.02 * others[key].norm(), key


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_learning_rates_in_tensors_mean_the_same(vit, optimizer):
    models = vit, copy.deepcopy(vit)
    usual, recordable = (make_optimizer(model, optimizer, 3e-3, 0.1) for model in models)
    for _ in range(2):
        for one, other in zip(*(model.parameters() for model in models), strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        usual.step()
        with cuda_graphs.rates_on_device(recordable) as rates:
            for group, rate in zip(recordable.param_groups, rates, strict=True):
                assert group["lr"] is rate and rate.item() == pytest.approx(3e-3)
                assert group["capturable"]
            recordable.step()
    for group in recordable.param_groups:
        assert (type(group["lr"]), group["lr"], group["capturable"]) == (float, 3e-3, False)
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-7)


def test_training_goes_on_where_no_graph_can_be_recorded(vit, monkeypatch, capsys):
    """With streams that do nothing, since a machine without CUDA has none."""

    class Stream:
        def wait_stream(self, other):
            pass

    def graph(graph, stream):
        raise RuntimeError("no graphs")

    stepwise, replayed = vit, copy.deepcopy(vit)
    losses = train_in_steps(stepwise, "muon")
    for name, replacement in (
        ("Stream", Stream),
        ("current_stream", Stream),
        ("stream", contextlib.nullcontext),
        ("set_stream", lambda stream: None),
        ("CUDAGraph", object),
        ("graph", graph),
    ):
        monkeypatch.setattr(torch.cuda, name, replacement)
    assert torch.equal(train_in_steps(replayed, "muon", replay=True), losses)
    said = capsys.readouterr().out
    assert said.count("CUDA graphs do not work here (RuntimeError: no graphs)") == 1
    assert all(map(torch.equal, replayed.parameters(), stepwise.parameters()))


@needs_a_gpu
def test_passes_are_recorded_for_every_capacity(seeded):
    model = filled(SmallViT(MODELS["routed"])).cuda().eval()
    images = torch.rand(2, 3, 32, 32).cuda()
    passes = cuda_graphs.ReplayedModel(model)
    with torch.inference_mode():
        for model.capacity in (1.0, 0.25) * 3:
            assert torch.allclose(passes(images)[0], model(images)[0], atol=1e-5)
    assert len(passes.passes) == 2 and all(passes.passes.values())


def test_bfloat16_stays_close_to_float32_and_keeps_float32_weights(few, default_run):
    state = train_few(few, dtype="bfloat16")
    one, other = (s["history"][-1]["train_mse"] for s in (default_run, state))
    assert other == pytest.approx(one, rel=0.02)
    assert other != one
    assert all(t.dtype == torch.float32 for t in state["best"]["model"].values())


@needs_a_gpu
def test_replayed_passes_are_those_of_the_model(vit):
    model, batches = vit.cuda().eval(), torch.rand(6, 3, 32, 32, device="cuda").split([2, 1, 3])
    passes = cuda_graphs.ReplayedModel(model)
    with torch.inference_mode():
        for _ in range(3):  # as it comes, recorded, replayed
            for batch in batches:
                image, routings = passes(batch)
                expected, of_blocks = model(batch)
                assert torch.allclose(image, expected, atol=1e-5)
                assert all(map(torch.allclose, routings, of_blocks))
            with torch.no_grad():
                model.patch_embed.weight.mul_(0.9)  # as training changes it
    assert all(passes.passes.values()) and len(passes.passes) == 3


@pytest.fixture
def recordings(monkeypatch):
    """Tensors say that they are on a GPU; a recording is counted, and its replay is the model."""
    recorded = []

    def record(passes, noisy):
        recorded.append(noisy.shape)
        held = noisy.clone()
        return SimpleNamespace(replay=lambda: None), held, passes.model(held)

    monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)
    monkeypatch.setattr(cuda_graphs.ReplayedModel, "_record", record)
    return recorded


class Same(torch.nn.Module):
    """A denoiser that changes nothing."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def forward(self, noisy):
        return noisy, []


def test_what_is_recorded_stays_with_the_model_until_its_weights_move(recordings):
    image, model = np.zeros((40, 40, 3), np.uint8), Same()
    for _ in range(3):
        denoise(model, image)
    assert len(recordings) == 1  # not in the first pass, and not again
    model.weight.data = torch.zeros(1)
    for _ in range(2):
        denoise(model, image)
    assert len(recordings) == 2
    kept = len(cuda_graphs.PASSES)
    del model
    gc.collect()
    assert len(cuda_graphs.PASSES) == kept - 1


def test_a_model_in_tiles_is_recorded_by_tiles(recordings):
    model = Tiled(Same(), 48)
    for _ in range(3):
        restore_any_size(model, torch.rand(1, 3, 80, 80))
    images = torch.zeros(2, 3, 80, 80, dtype=torch.uint8)
    split = Split(list(images), torch.zeros(2, dtype=torch.int64), torch.ones(2, dtype=torch.bool))
    evaluate(model, NoisyImageDataset(split))
    assert set(recordings) == {(1, 3, 48, 48)}
