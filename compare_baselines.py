"""Compares a trained model with the classical methods for its task on the same test images.

    python compare_baselines.py --dataset photos --checkpoint photos.pt

Where such a method has a strength, it gets the one, out of a short list, that is best on up to a
hundred of these very images: the comparison favours it. Prints a Markdown table.
"""

import math
from collections.abc import Callable
from functools import partial

import cv2
import numpy as np
import torch
from PIL import Image
from skimage import color, filters, restoration  # imported in parts, when they are first used
from torch import nn
from tqdm import tqdm

from common.options import Number, told_as_options
from common.user_errors import UserError, counted, reason, run_main
from experiment import command_line as cli
from experiment.evaluation import evaluate, psnr, ssim
from experiment.reports import plus_minus, print_head, print_row, result_line
from experiment.tiling import OVERLAP, Tiled, noise_at_sizes, whole_noise
from experiment.trained_model import images_for
from images.degradations import Degradation, GaussianNoise
from images.noisy_images import NoisyImageDataset
from small_vit import SmallViT, load_model

STEP, MOST_STEPS = 1.25, 20  # between strengths beyond the lists, and how many of them
LEAST_SIGMA = 1e-3  # less noise than this is below that of 8 bits; some methods divide by it
CHOSEN_ON = 100  # images, on which a strength is chosen


def baselines(sigma: float, bm3d: Callable | None = None) -> dict[str, tuple[Callable, list]]:
    """{name: (function(noisy [3, h, w], strength) -> denoised, first strengths to try)}; all but
    the first two are told σ of the noise, which is above 0. `bm3d` is what `make_bm3d` returns.
    """

    def wavelet(x, strength):
        options = {"convert2ycbcr": True, "rescale_sigma": True, "channel_axis": 0}
        return restoration.denoise_wavelet(x, sigma=strength * sigma, **options)

    def non_local_means(x, strength):
        options = {"patch_size": 3, "patch_distance": 8, "sigma": sigma, "channel_axis": 0}
        return restoration.denoise_nl_means(x, h=strength * sigma, **options)

    scale = sigma / 0.2
    blur = partial(filters.gaussian, channel_axis=0)
    smooth = partial(restoration.denoise_tv_chambolle, channel_axis=0)
    found = {
        "Gaussian blur": (blur, [s * scale**0.5 for s in (0.7, 0.8, 0.9, 1.0)]),
        "total variation": (smooth, [s * scale for s in (0.1, 0.15, 0.2)]),
        "wavelet (YCbCr)": (wavelet, [0.6, 0.8, 1.0, 1.2]),
        "non-local means": (non_local_means, [0.4, 0.6, 0.8]),
    }
    if bm3d:
        found["BM3D"] = (lambda x, strength: bm3d(x, strength * sigma), [0.8, 0.9, 1.0])
    return found


def make_bm3d() -> Callable:
    """function(noisy [3, h, w] of 9×9 pixels or more, sigma) -> denoised by BM3D, as in
    "Collaborative filtering of correlated noise", Mäkinen et al. 2020.

    Raises:
        UserError: there is no package bm3d that works here.
    """
    try:
        from bm3d import BM3DProfile, bm3d_rgb

        profile = BM3DProfile()
    except Exception as error:  # it loads a library of its own, which some machines cannot
        needed = "the package of that name: pip install bm3d"
        raise UserError(f"--bm3d needs {needed} ({reason(error)})") from None
    profile.num_threads = 1  # with more, results differ from call to call

    def denoise(noisy, sigma):
        with np.errstate(all="ignore"):
            denoised = bm3d_rgb(noisy.transpose(1, 2, 0), sigma, profile).transpose(2, 0, 1)
        return np.where(np.isfinite(denoised), denoised, noisy)  # of one colour alone it makes NaN

    return denoise


def measure(
    denoise: Callable | None, strength: float | None, dataset: NoisyImageDataset, every: int = 1
) -> np.ndarray:
    """PSNR in dB and SSIM, [2, images], of a method or of None, on images 0, every, 2 · every …"""
    scores = []
    for index in range(0, len(dataset), every):
        x, y = (image.numpy() for image in dataset[index][:2])
        restored = np.clip(denoise(x, strength), 0, 1).astype(np.float32) if denoise else x
        scores.append((psnr(restored, y), ssim(restored, y)))
    return np.array(scores).T


def best_of(
    denoise: Callable, strengths: list, dataset: NoisyImageDataset
) -> tuple[float, np.ndarray]:
    """The strength of the best mean PSNR on up to CHOSEN_ON images, and its `measure` on these;
    where the best of those given, all above 0, is at an edge, others are tried beyond it.
    """
    every = math.ceil(len(dataset) / CHOSEN_ON)
    found = {s: measure(denoise, s, dataset, every) for s in strengths}
    for _ in range(MOST_STEPS):
        # A blur too small to do anything is as good as another: the larger one goes on from there
        best = max(found, key=lambda s: (found[s][0].mean(), s))
        if min(found) < best < max(found):
            break
        further = best / STEP if best == min(found) else best * STEP
        found[further] = measure(denoise, further, dataset, every)
    return max(found.items(), key=lambda of: of[1][0].mean())


def estimated_sigma(noisy: np.ndarray) -> float:
    """σ of the noise of [3, h, w], as `denoise_image.py` prints it; LEAST_SIGMA at least."""
    return max(LEAST_SIGMA, whole_noise(noise_at_sizes(noisy.transpose(1, 2, 0))))


def denoise_blindly(noisy: np.ndarray, _: None, name: str, bm3d: Callable | None) -> np.ndarray:
    """[3, h, w] -> the same by one of `baselines`, at its middle strength for the estimated σ."""
    method, strengths = baselines(estimated_sigma(noisy), bm3d)[name]
    return method(noisy, strengths[len(strengths) // 2])


def compare(
    model: nn.Module, test_set: NoisyImageDataset, classical: bool, bm3d: Callable | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Prints the table for one σ, on request with classical methods; returns the model's PSNR and
    SSIM of every image. Where σ is not known, a method is told that which is estimated.
    """

    def print_figures(name, psnrs, ssims):
        print_row(name, plus_minus(psnrs, 2), plus_minus(ssims, 4))

    known, sigma = isinstance(test_set.degradation, GaussianNoise), 0.0
    if classical and known:
        # Where it differs over an image, a beginning
        sigma = sum(test_set.degradation.noise_level) / 2
    elif classical:
        sigma = np.mean([estimated_sigma(noisy[0].numpy()) for noisy, *_ in test_set.batches(1)])
    print_head("method", "PSNR (dB)", "SSIM")
    print_figures("noisy input", *measure(None, None, test_set))
    methods = baselines(sigma, bm3d) if sigma >= LEAST_SIGMA else {}
    for name in tqdm(methods, "methods", leave=False, disable=None):
        denoise, strengths = methods[name]
        strength, figures = best_of(denoise, strengths, test_set)
        if len(test_set) > CHOSEN_ON:
            figures = measure(denoise, strength, test_set)
        print_figures(f"{name}, strength {strength:.3g}", *figures)
        if not known:
            blind = partial(denoise_blindly, name=name, bm3d=bm3d)
            print_figures(f"{name}, by the estimated σ", *measure(blind, None, test_set))
    result = evaluate(model, test_set)
    print_figures("**this model**", result.psnr, result.ssim)
    tqdm.write(f"rounded to 8 bits: {plus_minus(result.psnr_8_bits, 2)} dB")
    return result.psnr, result.ssim


def lanczos(clean: np.ndarray, degradation: Degradation) -> np.ndarray:
    """[3, h, w] -> the same, reduced as the model's images are and enlarged by Lanczos's filter."""
    small = degradation.reduced(torch.from_numpy(clean).unsqueeze(0))[0].permute(1, 2, 0)
    file = Image.fromarray((255 * small).round().byte().numpy())
    large = file.resize(clean.shape[:0:-1], Image.Resampling.LANCZOS)
    return np.asarray(large).transpose(2, 0, 1) / np.float32(255)


def telea(degraded: np.ndarray) -> np.ndarray:
    """[4, h, w] -> [3, h, w] by "An image inpainting technique based on the fast marching method",
    Telea 2004, as OpenCV does it, in 8 bits.
    """
    image = np.ascontiguousarray((255 * degraded[:3]).round().astype(np.uint8).transpose(1, 2, 0))
    restored = cv2.inpaint(image, (degraded[3] == 0).astype(np.uint8), 3, cv2.INPAINT_TELEA)
    return restored.transpose(2, 0, 1) / np.float32(255)


def other_baselines(test_set: NoisyImageDataset) -> dict[str, Callable]:
    """{name: function(degraded, clean) -> restored} for what is no noise."""
    degradation = test_set.degradation
    if degradation.task == "super-resolution":
        return {"bicubic": lambda x, _: x, "Lanczos": lambda _, y: lanczos(y, degradation)}
    if degradation.task == "jpeg":
        smooth, strengths = baselines(sigma=0.05)["total variation"]
        best, _ = best_of(smooth, strengths, test_set)
        name = f"total variation, strength {best:.3g}"
        return {"JPEG": lambda x, _: x, name: lambda x, _: smooth(x, best)}
    if degradation.task != "inpaint":  # a new task, which has none yet
        return {"degraded": lambda x, _: x[:3]}
    harmonic = partial(restoration.inpaint_biharmonic, channel_axis=0)
    return {
        "pull-push": lambda x, _: x[:3],
        "Telea": lambda x, _: telea(x),
        "biharmonic": lambda x, _: harmonic(x[:3], x[3] == 0),
    }


def special_psnr(
    degradation: Degradation, degraded: np.ndarray, restored: np.ndarray, clean: np.ndarray
) -> float:
    """PSNR in dB as the task's papers have it: of the luma, for super-resolution without a border
    of `scale` pixels; or of the pixels in the holes.
    """
    if degradation.task == "inpaint":
        holes = degraded[3] == 0
        return psnr(restored[:, holes], clean[:, holes])
    border = degradation.scale if degradation.task == "super-resolution" else 0
    inner = (slice(border, -border or None),) * 2
    one, other = (color.rgb2ycbcr(x, channel_axis=0)[0][inner] / 255 for x in (restored, clean))
    return psnr(one, other)


def compare_others(
    model: SmallViT, test_set: NoisyImageDataset, classical: bool
) -> tuple[np.ndarray, np.ndarray]:
    """As `compare`, for a task that is no noise; the model comes last."""
    degradation, device = test_set.degradation, next(model.parameters()).device

    def this_model(degraded, _):
        return model.denoise(torch.from_numpy(degraded).unsqueeze(0).to(device))[0].cpu().numpy()

    where = "in the holes" if degradation.task == "inpaint" else "luma"
    print_head("method", "PSNR (dB)", "SSIM", f"PSNR (dB), {where}")
    methods = other_baselines(test_set) if classical else {}
    methods["**this model**"] = this_model
    for name in tqdm(methods, "methods", leave=False, disable=None):
        scores = []
        for degraded, clean, _ in test_set.batches(1):
            x, y = degraded[0].numpy(), clean[0].numpy()
            restored = np.clip(methods[name](x, y), 0, 1).astype(np.float32)
            special = special_psnr(degradation, x, restored, y)
            scores.append((psnr(restored, y), ssim(restored, y), special))
        psnrs, ssims, specials = np.array(scores).T
        print_row(name, plus_minus(psnrs, 2), plus_minus(ssims, 4), plus_minus(specials, 2))
    return psnrs, ssims


def parse_args():
    parser = cli.make_parser(
        "Compares a trained model with the classical methods for its task on the same test images. "
        "A folder without test/ counts as one of test images.",
        "python compare_baselines.py --dataset photos --checkpoint photos.pt",
    )
    cli.add_checkpoint(parser)
    cli.add_data(parser, of_model=True)
    about = "by default as in the model's training, at the middle of its range"
    noise = parser.add_argument_group("noise", about)
    what = "one or several σ of the noise, for pixel values in [0, 1], also as a fraction: 25/255"
    names = ("noise_level", "unclipped", "jpeg_share")
    cli.add_fields(noise, GaussianNoise, names, with_defaults=False, noise_level={"help": what})
    group = parser.add_argument_group("comparison")
    what = "restore whole photographs in tiles of this side, as denoise_image.py does (default: no)"
    group.add_argument("--tile", type=Number(int, 2 * OVERLAP), metavar="PIXELS", help=what)
    methods = group.add_mutually_exclusive_group()
    what = "leave the classical methods out (default: no)"
    methods.add_argument("--model-only", action="store_true", help=what)
    what = "measure BM3D as well, by the package bm3d, whose licence is for non-commercial use; a "
    what += "second for a thumbnail, half a minute for a photograph (default: no)"
    methods.add_argument("--bm3d", action="store_true", help=what)
    cli.add_computation(parser)
    return parser.parse_args()


def main():
    args = parse_args()
    model = load_model(args.checkpoint).to(cli.select_device(args.device, args.threads))
    print(model.described())
    of_noise = model.trained.recipe.degradation.task == "denoise"
    for name in ("tile", "bm3d"):
        if getattr(args, name) and not of_noise:
            raise UserError(f"--{name} is for noise; drop the option")
    bm3d = make_bm3d() if args.bm3d else None
    levels = args.noise_level or [None]
    noise = {name: getattr(args, name) for name in ("unclipped", "jpeg_share")}
    noise["noise_level"] = levels[0]
    source, (*_, test_set) = images_for(model.trained, args.dataset, args.data_dir, **noise)
    if args.tile and not test_set.full_size:
        raise UserError("--tile is for whole photographs; the test images here are thumbnails")
    denoiser = Tiled(model, args.tile) if args.tile else model
    for level in levels:
        with told_as_options():
            degraded = test_set if level is None else test_set.at(level)
        print(f"\n{source.name}, {counted(len(degraded), 'test image')}, {degraded.degradation}")
        if of_noise:
            figures = compare(denoiser, degraded, not args.model_only, bm3d)
        else:
            figures = compare_others(denoiser, degraded, not args.model_only)
        print(f"\n{result_line(*figures, source.name)}")
    return 0


if __name__ == "__main__":
    run_main(main)
