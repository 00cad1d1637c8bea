"""The benchmark's rows of larger images: long sequences, whole photographs, and tiles."""

import math
import time
from functools import partial

import numpy as np
import skimage.data
import torch
from torchvision.utils import make_grid

from experiment.command_line import SHIPPED, autocast
from experiment.cuda_graphs import ReplayedModel
from experiment.evaluation import psnr
from experiment.tiling import TILE, denoise
from small_vit import load_model
from studies.model_variants import VARIANTS, DnCNN, make_yardsticks
from studies.timing import alternate, peaks_apart, print_head, print_row

MOST_GATHERED = 4096  # tokens; at 16,384 the straightforward layer takes tens of GiB
PHOTOGRAPH = (321, 481)  # height and width of those of the field's first data set
DENOISERS = {
    "photographs": VARIANTS["photographs"],
    "dense": VARIANTS["photographs, dense"],
    "a quarter attends": VARIANTS["photographs, capacity, by router"],
    "no attention": VARIANTS["photographs, no attention"],
    "DnCNN of 20 layers": partial(DnCNN, depth=20),
}

# Long sequences ------------------------------------------------------------------------------


def both_passes(layer, tokens, in_dtype):
    """Runs an attention layer forward and backward on [B, N, D], in the context in_dtype()."""
    with in_dtype():
        output = layer(tokens.detach().requires_grad_())[0]
    output.float().sum().backward()


def tokens_of(model, images):
    """What the first attention layer of a model sees of images: [B, N, D]."""
    with torch.no_grad():
        return model.blocks[0].norm1(model.embed(images)[0])


def mosaic(images, tokens):
    """[1, 3, h, h] of that many patches, 4×4 pixels each, put together from images of 32×32."""
    side = math.isqrt(tokens // 64)
    chosen = images[torch.arange(side * side, device=images.device) % len(images)]
    return make_grid(chosen, nrow=side, padding=0).unsqueeze(0)


def measure_tokens(images, effort, device, dtype):
    """The layer forward and backward on 1 sequence of growing length: one dict per length."""
    models = make_yardsticks(device, ("this", "straightforward", "dense"))
    in_dtype, peaks = partial(autocast, device, dtype), {}
    for name in models:
        lengths = [n for n in effort.tokens if name != "straightforward" or n <= MOST_GATHERED]
        arguments = (name, images.cpu().numpy(), lengths, device, dtype)
        measured = peaks_apart(layer_runs, *arguments, device=device)
        peaks[name] = dict(zip(lengths, measured, strict=True))
    print_head("tokens", *(f"{name} ({unit})" for unit in ("ms", "MiB") for name in models))
    rows = []
    for tokens in effort.tokens:
        functions = {}
        for name, model in models.items():
            if tokens in peaks[name]:
                x = tokens_of(model, mosaic(images, tokens))
                functions[name] = partial(both_passes, model.blocks[0].attention, x, in_dtype)
        seconds = alternate(functions, effort.rounds, effort.seconds, device)
        extra = {name: peaks[name][tokens] for name in functions}
        rows.append({"tokens": tokens, "seconds": seconds, "extra_bytes": extra})
        cells = [f"{1e3 * seconds[n]:.1f}" if n in seconds else "–" for n in models]
        cells += [f"{extra[n] / 2**20:.0f}" if n in extra else "–" for n in models]
        print_row(f"{tokens:,}", *cells)
    return rows


def layer_runs(name, images, lengths, device, dtype):
    """Runs a yardstick's layer on sequences of ascending lengths, the first of them twice."""
    model, images = make_yardsticks(device, (name,))[name], torch.from_numpy(images).to(device)
    in_dtype = partial(autocast, device, dtype)
    for tokens in (lengths[0], *lengths):  # made before, the inputs would hide small peaks
        x = tokens_of(model, mosaic(images, tokens))
        yield both_passes(model.blocks[0].attention, x, in_dtype)


# Photographs ---------------------------------------------------------------------------------


def noisy_photograph(name, size=None, sigma=25 / 255):
    """(noisy, clean) float32 [h, w, 3] of a photograph inside scikit-image, unclipped."""
    clean = getattr(skimage.data, name)().astype(np.float32) / 255
    clean = np.ascontiguousarray(clean[: size[0], : size[1]]) if size else clean
    noise = np.random.default_rng(0).standard_normal(clean.shape, dtype=np.float32)
    return clean + np.float32(sigma) * noise, clean


def measure_photograph(effort, device, dtype):
    """Denoising a photograph, in tiles and as one, by untrained models, DnCNN's of 64 channels: a
    dict for each.
    """
    noisy, _ = noisy_photograph("astronaut", PHOTOGRAPH)
    models = {name: ReplayedModel(make().to(device)) for name, make in DENOISERS.items()}
    functions = {
        (name, tile): partial(denoise, model, noisy, tile, dtype=dtype)
        for tile in (TILE, max(PHOTOGRAPH))
        for name, model in models.items()
    }
    seconds = alternate(functions, effort.rounds, effort.seconds, device)
    print_head("a photograph of 481×321", "tile", "ms", "ms per megapixel", "peak MiB")
    rows, megapixels = [], math.prod(PHOTOGRAPH) / 1e6
    for name, tile in functions:
        taken = seconds[name, tile]
        (peak,) = peaks_apart(photograph_runs, name, tile, device, dtype, device=device)
        rows.append({"model": name, "tile": tile, "seconds": taken, "extra_bytes": peak})
        ms, where = 1e3 * taken, str(tile) if tile == TILE else "whole"
        print_row(name, where, f"{ms:.1f}", f"{ms / megapixels:,.0f}", f"{peak / 2**20:,.0f}")
    return rows


def photograph_runs(name, tile, device, dtype):
    """Denoises a small image, then a photograph."""
    model, (noisy, _) = DENOISERS[name]().to(device), noisy_photograph("astronaut", PHOTOGRAPH)
    for image in (noisy[:32, :32], noisy):
        yield denoise(model, image, tile, dtype=dtype)


def measure_tiles(effort, device, dtype):
    """Decibels against seconds of tiles and their overlap, by the shipped model."""
    model = load_model(SHIPPED / "gaussian.pt").to(device)
    photographs = [noisy_photograph(name) for name in ("astronaut", "coffee", "rocket")]
    print_head("tile", "overlap", "PSNR (dB)", "seconds")
    rows = []
    for tile, overlap in effort.tiles:
        started = time.perf_counter()
        restored = [denoise(model, noisy, tile, overlap, dtype) for noisy, _ in photographs]
        seconds = time.perf_counter() - started
        pairs = zip(restored, photographs, strict=True)
        decibels = float(np.mean([psnr(image, clean) for image, (_, clean) in pairs]))
        rows.append({"tile": tile, "overlap": overlap, "psnr": decibels, "seconds": seconds})
        print_row(str(tile), str(overlap), f"{decibels:.3f}", f"{seconds:.2f}")
    return rows
