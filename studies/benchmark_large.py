"""The benchmark's rows of larger images: long sequences, whole photographs, and tiles."""

import math
import time
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import skimage.data
import torch
from torch import Tensor, nn

from experiment.command_line import autocast
from experiment.evaluation import psnr
from experiment.reports import print_head, print_row
from experiment.tiling import TILE, denoise
from small_vit import SmallViT, load_model
from studies.model_variants import VARIANTS, DnCNN, make_yardsticks
from studies.timing import alternate, peaks_apart

MOST_GATHERED = 4096  # tokens; at 16,384 the straightforward layer takes tens of GiB
PHOTOGRAPH = (321, 481)  # height and width of those of the field's first data set
DENOISERS = {
    "photographs": VARIANTS["photographs"],
    "dense": VARIANTS["photographs, dense"],
    "a quarter attends": VARIANTS["photographs, capacity, by router"],
    "no attention": VARIANTS["photographs, no attention"],
    "DnCNN of 20 layers": partial(DnCNN, depth=20),  # of 64 channels
}

# Long sequences ------------------------------------------------------------------------------


def forward_backward(layer: nn.Module, tokens: Tensor, in_dtype: Callable) -> None:
    """Runs an attention layer forward and backward on [B, N, D], in the context in_dtype()."""
    with in_dtype():
        output = layer(tokens.detach().requires_grad_())[0]
    output.float().sum().backward()


def tokens_of(model: SmallViT, images: Tensor) -> Tensor:
    """What the first attention layer of a model sees of images: [B, N, D]."""
    with torch.no_grad():
        return model.blocks[0].norm1(model.embed(images)[0])


def mosaic(images: Tensor, tokens: int) -> Tensor:
    """[1, 3, h, h] of that many patches, 4×4 pixels each, put together from images of 32×32."""
    side = math.isqrt(tokens // 64)
    chosen = images[torch.arange(side * side, device=images.device) % len(images)]
    rows = chosen.unflatten(0, (side, side)).permute(2, 0, 3, 1, 4)  # [3, rows, 32, columns, 32]
    return rows.flatten(3).flatten(1, 2).unsqueeze(0)


def measure_tokens(images: Tensor, effort, device: torch.device) -> list[dict]:
    """The layer forward and backward on one sequence of growing length: a dict per length."""
    models = make_yardsticks(device, ("this", "straightforward", "dense"))
    in_dtype, peaks = partial(autocast, device, effort.dtype), {}
    for name in models:
        lengths = [n for n in effort.tokens if name != "straightforward" or n <= MOST_GATHERED]
        arguments = (name, images.cpu().numpy(), lengths, device, effort.dtype)
        measured = peaks_apart(layer_runs, *arguments, device=device)
        peaks[name] = dict(zip(lengths, measured, strict=True))
    print_head("tokens", *(f"{name} ({unit})" for unit in ("ms", "MiB") for name in models))
    rows = []
    for tokens in effort.tokens:
        extra = {name: peaks[name][tokens] for name in models if tokens in peaks[name]}
        functions = {}
        for name in extra:
            x = tokens_of(models[name], mosaic(images, tokens))
            layer = models[name].blocks[0].attention
            functions[name] = partial(forward_backward, layer, x, in_dtype)
        seconds = alternate(functions, effort.rounds, effort.seconds, device)
        rows.append({"tokens": tokens, "seconds": seconds, "extra_bytes": extra})
        cells = [f"{1e3 * seconds[n]:.1f}" if n in seconds else "–" for n in models]
        cells += [f"{extra[n] / 2**20:.0f}" if n in extra else "–" for n in models]
        print_row(f"{tokens:,}", *cells)
    return rows


def layer_runs(
    name: str, images: np.ndarray, lengths: list[int], device: torch.device, dtype: str
) -> Iterator[None]:
    """Runs a yardstick's layer on sequences of ascending lengths, the first of them twice."""
    model, images = make_yardsticks(device, (name,))[name], torch.from_numpy(images).to(device)
    for tokens in (lengths[0], *lengths):  # made before, the inputs would hide small peaks
        x = tokens_of(model, mosaic(images, tokens))
        yield forward_backward(model.blocks[0].attention, x, partial(autocast, device, dtype))


# Photographs ---------------------------------------------------------------------------------


def noisy_photograph(name: str, size: tuple = (None, None)) -> tuple[np.ndarray, np.ndarray]:
    """(noisy, clean) float32 [h, w, 3] of a photograph inside scikit-image, σ = 25/255."""
    clean = getattr(skimage.data, name)()[: size[0], : size[1]].astype(np.float32) / 255
    noise = np.random.default_rng(0).standard_normal(clean.shape, dtype=np.float32)
    return clean + np.float32(25 / 255) * noise, clean


def measure_photograph(effort, device: torch.device) -> list[dict]:
    """Denoising a photograph, in tiles and as one, by untrained models: a dict for each."""
    noisy, _ = noisy_photograph("astronaut", PHOTOGRAPH)
    models = {name: make().to(device) for name, make in DENOISERS.items()}
    functions = {
        (name, tile): partial(denoise, model, noisy, tile, dtype=effort.dtype)
        for tile in (TILE, max(PHOTOGRAPH))
        for name, model in models.items()
    }
    seconds = alternate(functions, effort.rounds, effort.seconds, device)
    print_head("a photograph of 481×321", "tile", "ms", "ms per megapixel", "peak MiB")
    rows, megapixels = [], math.prod(PHOTOGRAPH) / 1e6
    for (name, tile), taken in seconds.items():
        (peak,) = peaks_apart(photograph_runs, name, tile, device, effort.dtype, device=device)
        rows.append({"model": name, "tile": tile, "seconds": taken, "extra_bytes": peak})
        ms, size = 1e3 * taken, str(tile) if tile == TILE else "whole"
        print_row(name, size, f"{ms:.1f}", f"{ms / megapixels:,.0f}", f"{peak / 2**20:,.0f}")
    return rows


def photograph_runs(name: str, tile: int, device: torch.device, dtype: str) -> Iterator[np.ndarray]:
    """Denoises a small image, then a photograph."""
    model, (noisy, _) = DENOISERS[name]().to(device), noisy_photograph("astronaut", PHOTOGRAPH)
    for image in (noisy[:32, :32], noisy):
        yield denoise(model, image, tile, dtype=dtype)


def measure_tiles(effort, device: torch.device) -> list[dict]:
    """Decibels against seconds of tiles and their overlap, by the shipped model."""
    model = load_model("gaussian").to(device)
    photographs = [noisy_photograph(name) for name in ("astronaut", "coffee", "rocket")]
    print_head("tile", "overlap", "PSNR (dB)", "seconds")
    rows = []
    for tile, overlap in effort.tiles:
        decibels, started = [], time.perf_counter()
        restored = [denoise(model, noisy, tile, overlap, effort.dtype) for noisy, _ in photographs]
        seconds = time.perf_counter() - started
        for image, (_, clean) in zip(restored, photographs, strict=True):
            decibels.append(psnr(image, clean))
        mean = float(np.mean(decibels))
        rows.append({"tile": tile, "overlap": overlap, "psnr": mean, "seconds": seconds})
        print_row(str(tile), str(overlap), f"{mean:.3f}", f"{seconds:.2f}")
    return rows
