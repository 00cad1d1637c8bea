"""Writes a trained denoiser as an ONNX file, which other programs run without torch.

    python export_onnx.py                             # models/photo.pt as photo.onnx
    python export_onnx.py --checkpoint mine.pt        # mine.onnx

The file takes images [1, 3, h, w] in [0, 1], float32, and returns them restored, of the same shape
and range. It is compared with torch, in ONNX Runtime, before it is kept.
"""

import contextlib
import logging
import math
import warnings
from pathlib import Path

import numpy as np
import skimage
import torch
from torch import nn

from common.safe_files import check_writable, replace_when_complete
from common.user_errors import UserError, printable, run_main
from experiment import command_line as cli
from experiment.tiling import OVERLAP, TILE, best_tile
from small_vit import SHIPPED, SmallViT, count_parameters, load_model

NAMES = "noisy", "restored"  # of input and output
OPSET = 18  # older programs know it; later ones add nothing that the models need
MOST_DIFFERENCE = 1e-4  # of a restored value, to torch's


class ImageAlone(nn.Module):
    """A denoiser that returns the images without the routing."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, noisy):
        """[1, C, h, w] -> [1, 3, h, w]."""
        return self.model(noisy)[0]


def fixed_side(model: SmallViT) -> int | None:
    """Side of the only images that the file will take; None: any height and width.

    Models for thumbnails are for their size alone, and a share of the tokens is a fixed number.
    """
    return best_tile(model) if model.capacity or not model.trained.recipe.crop else None


def stable_sort(values, stable=None, dim=-1, descending=False):
    """torch's sort of ONNX operators: of equal values, TopK takes the first one first as well."""
    from onnxscript import opset18 as op

    count = op.Gather(op.Shape(values), op.Constant(value_ints=[dim]))
    return op.TopK(values, count, axis=dim, largest=int(descending), sorted=1)


def as_onnx(model: SmallViT):
    """The onnx.ModelProto of a loaded model, with what it is in its metadata."""
    side = fixed_side(model)
    height, width = (side, side) if side else (62, 75)  # not square, and no whole patches
    with quiet_exporter():
        program = torch.onnx.export(
            ImageAlone(model).eval(),
            (torch.rand(1, model.config.in_channels, height, width),),
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes=None if side else {"noisy": {2: "height", 3: "width"}},
            input_names=NAMES[:1],
            output_names=NAMES[1:],
            custom_translation_table={torch.ops.aten.sort.stable: stable_sort},
            verbose=False,
        )
    proto = program.model_proto
    for part in (*proto.graph.node, *proto.graph.input, *proto.graph.output):
        del part.metadata_props[:]  # lines of the source that they come from
    del proto.graph.value_info[:]
    for name, value in described(model, side).items():
        proto.metadata_props.add(key=name, value=value)
    return proto


@contextlib.contextmanager
def quiet_exporter():
    """Within the block, torch keeps advice that is for those who change the model to itself."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def described(model: SmallViT, side: int | None) -> dict[str, str]:
    """Names and values of the file's metadata."""
    size, channels = f"{side}, {side}" if side else "h, w", model.config.in_channels
    mask = "; the fourth channel is 1 where a pixel is known, else 0" if channels == 4 else ""
    least = model.config.patch_size * math.isqrt(min(model.config.k_attend))  # of enough tokens
    small = "" if side or least > TILE else f", h and w above {least}"
    return {
        "description": f"denoiser: {model.trained.recipe.degradation}",
        "input": f"{NAMES[0]}: float32 [1, {channels}, {size}], RGB in [0, 1]{small}{mask}",
        "output": f"{NAMES[1]}: float32 [1, 3, {size}], RGB in [0, 1]",
        "how": f"larger images in tiles of {best_tile(model)} that overlap by {OVERLAP} pixels",
        "model": f"{count_parameters(model):,} parameters, {model.trained}",
        "licence": "MIT; the weights learned from images for research (models/README.md)",
    }


def difference(model: SmallViT, path: Path) -> float:
    """Largest difference of the file's results to the model's, of parts of a noisy photograph."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    side, found = fixed_side(model), []
    for height, width in [(side, side)] if side else [(TILE, TILE), (TILE - 3, TILE // 2 + 1)]:
        clean = skimage.data.chelsea()[:height, 100 : 100 + width].astype(np.float32) / 255
        noise = np.random.default_rng(0).normal(0, 0.1, clean.shape).astype(np.float32)
        known = np.ones_like(clean[..., :1])
        noisy = np.concatenate([(clean + noise).clip(0, 1), known], 2).transpose(2, 0, 1)[None]
        noisy = np.ascontiguousarray(noisy[:, : model.config.in_channels])
        (restored,) = session.run(None, {NAMES[0]: noisy})
        with torch.inference_mode():
            found.append(np.abs(restored - model(torch.from_numpy(noisy))[0].numpy()).max())
    return float(np.max(found))  # of NaN, NaN


def check_packages() -> None:
    """Raises a UserError unless what exporting takes is installed."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        advice = "pip install onnx onnxruntime onnxscript"
        raise UserError(f"a package is missing ({error}); {advice}") from None


def main():
    parser = cli.make_parser(
        "Writes a trained denoiser as an ONNX file of images [1, 3, h, w] in [0, 1], after its "
        "results have been compared with torch's.",
        "python export_onnx.py --checkpoint models/gaussian.pt",
    )
    cli.add_checkpoint(parser, SHIPPED / "photo.pt")
    what = "file to write, .onnx (default: named after the checkpoint)"
    cli.add_output(parser, None, what)
    args = parser.parse_args()
    output = Path(args.output or f"{Path(args.checkpoint).stem}.onnx")
    if output.suffix.lower() != ".onnx":
        raise UserError(f"--output {output}: name a file of .onnx")
    check_packages()
    check_writable(output)
    model = load_model(args.checkpoint)
    print(model.described())
    proto = as_onnx(model)
    with replace_when_complete(output) as temporary:
        temporary.write_bytes(proto.SerializeToString())
        most = difference(model, temporary)
        if not most <= MOST_DIFFERENCE:
            words = f"its results differ from torch's by {most:.1e}; take another --checkpoint"
            raise UserError(f"{output} is not written: {words}")
    print(f"differs from torch by at most {most:.1e} of 1, on parts of a noisy photograph")
    size = proto.metadata_props[1].value
    print(printable(f"wrote {output}, {output.stat().st_size:,} bytes, opset {OPSET}; {size}"))
    return 0


if __name__ == "__main__":
    run_main(main)
