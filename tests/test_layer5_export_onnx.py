"""Layer 5: denoisers as ONNX files, and the one of the page."""

import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import export_onnx
from conftest import ROOT
from experiment.checkpoints import write_checkpoint
from images.degradations import Holes
from small_vit import MODELS, SmallViT, load_model

onnx = pytest.importorskip("onnx", reason="takes: pip install onnx onnxruntime onnxscript")
onnxruntime = pytest.importorskip("onnxruntime", reason="takes: pip install onnxruntime")
pytest.importorskip("onnxscript", reason="takes: pip install onnxscript")


def results(path, noisy):
    return onnxruntime.InferenceSession(str(path)).run(None, {"noisy": noisy.numpy()})[0]


def check(model, path, sizes, channels=3):
    for height, width in sizes:
        noisy = torch.rand(1, channels, height, width)
        with torch.inference_mode():
            expected = model(noisy)[0].numpy()
        assert np.abs(results(path, noisy) - expected).max() < 1e-5


def test_model_of_the_page_is_the_shipped_one(seeded):
    """Of any size, however small, whole patches or not."""
    sizes = [(1, 1), (2, 3), (16, 16), (37, 21), (128, 128)]
    check(load_model("photo"), ROOT / "web" / "photo.onnx", sizes)


def test_exported_file_says_what_it_is(call, tmp_path, seeded):
    """Of a model that keeps 16 keys of as many tokens as an image of any size has."""
    checkpoint = torch.load(ROOT / "models" / "gaussian.pt", weights_only=True)
    checkpoint["config"]["k_attend"] = (16,)
    checkpoint["recipe"]["model"] = "photographs"
    write_checkpoint(checkpoint, tmp_path / "sparse.pt")
    done = call(export_onnx, "--checkpoint", "sparse.pt")
    assert done.returncode == 0 and "wrote sparse.onnx" in done.stdout
    file = onnx.load(tmp_path / "sparse.onnx")
    onnx.checker.check_model(file, full_check=True)
    about = {entry.key: entry.value for entry in file.metadata_props}
    assert about["input"].startswith("noisy: float32 [1, 3, h, w], RGB in [0, 1], h and w above 16")
    assert "574,213 parameters" in about["model"] and "unclipped" in about["description"]
    assert "small_vit" not in str(file.graph.node)
    check(load_model("sparse.pt"), tmp_path / "sparse.onnx", [(17, 18), (33, 62)])


def test_models_with_a_share_of_tokens_have_a_fixed_size(tmp_path, seeded):
    """Which attend is the same as in torch, also where routers cannot decide."""
    model = load_model("routed")
    for block in model.blocks:  # everything ties
        block.attention.router.mlp[-1].weight.data.zero_()
    for name, some in (("tied", model), ("routed", load_model("routed"))):
        path = tmp_path / f"{name}.onnx"
        path.write_bytes(export_onnx.as_onnx(some).SerializeToString())
        check(some, path, [(32, 32)])
    with pytest.raises(onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument):
        results(path, torch.rand(1, 3, 32, 36))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (("--output", "model.pt"), "--output model.pt: name a file of .onnx"),
        (("--output", "nowhere/model.onnx"), "its folder does not exist"),
        (("--checkpoint", "nothing.pt"), "nothing.pt: no such checkpoint"),
    ],
)
def test_bad_input_is_refused(call, tmp_path, change, sentence):
    done = call(export_onnx, *change)
    assert done.returncode == 2 and sentence in done.stderr and not list(tmp_path.iterdir())


def test_missing_package_is_told(call, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    done = call(export_onnx)
    assert done.returncode == 2 and "pip install onnx onnxruntime onnxscript" in done.stderr
    assert not list(tmp_path.iterdir())


def test_file_that_differs_is_not_kept(call, tmp_path, monkeypatch):
    """Nor is the one that was there lost."""
    (tmp_path / "photo.onnx").write_text("mine")
    wrong = export_onnx.as_onnx(load_model("gaussian"))
    monkeypatch.setattr(export_onnx, "as_onnx", lambda model: wrong)
    done = call(export_onnx)
    assert done.returncode == 2 and "is not written: its results differ from torch" in done.stderr
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [
        ("photo.onnx", "mine")
    ]


def test_mask_is_a_fourth_channel(tmp_path, seeded):
    model = SmallViT(replace(MODELS["published"], in_channels=4)).eval()
    model.trained = SimpleNamespace(recipe=SimpleNamespace(crop=None, degradation=Holes()))
    file = export_onnx.as_onnx(model)
    (tmp_path / "holes.onnx").write_bytes(file.SerializeToString())
    assert "fourth channel is 1 where a pixel is known" in file.metadata_props[1].value
    check(model, tmp_path / "holes.onnx", [(32, 32)], channels=4)
    assert export_onnx.difference(model, tmp_path / "holes.onnx") < 1e-5
