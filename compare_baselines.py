"""Compares a trained model with the classical methods for its task on the same test images.

    python compare_baselines.py --dataset photos --checkpoint photos.pt

Where such a method has a strength, it gets the one, out of a short list, that is best on up to a
hundred of these very images: the comparison favours it. Prints a Markdown table.
"""

import math

import cv2
import numpy as np
import torch
from PIL import Image
from skimage.color import rgb2ycbcr
from skimage.filters import gaussian
from skimage.restoration import (
    denoise_nl_means,
    denoise_tv_chambolle,
    denoise_wavelet,
    inpaint_biharmonic,
)
from tqdm import tqdm

from common.user_errors import UserError, reason, run_main
from experiment.command_line import make_parser, number, ratio
from experiment.evaluation import evaluate, plus_minus, psnr, result_line, ssim
from experiment.tiling import OVERLAP, Tiled
from experiment.trained_model import load_for_evaluation
from small_vit import build_model

STEP, MOST_STEPS = 1.25, 20  # between strengths beyond the lists, and how many of them
LEAST_SIGMA = 1e-3  # less noise than this is below that of 8 bits; some methods divide by it
CHOSEN_ON = 100  # images, on which a strength is chosen


def baselines(sigma, bm3d=None):
    """{name: (function(noisy [3, h, w], strength) -> denoised, first strengths to try)}.

    Args:
        sigma: standard deviation of the noise, above 0, which all but the first two are told.
        bm3d: what `make_bm3d` makes; None leaves BM3D out.
    """
    scale = sigma / 0.2
    found = {
        "Gaussian blur": (
            lambda x, s: gaussian(x, sigma=s, channel_axis=0),
            [0.7 * scale**0.5, 0.8 * scale**0.5, 0.9 * scale**0.5, 1.0 * scale**0.5],
        ),
        "total variation": (
            lambda x, s: denoise_tv_chambolle(x, weight=s, channel_axis=0),
            [0.1 * scale, 0.15 * scale, 0.2 * scale],
        ),
        "wavelet (YCbCr)": (
            lambda x, s: denoise_wavelet(
                x, sigma=s * sigma, channel_axis=0, convert2ycbcr=True, rescale_sigma=True
            ),
            [0.6, 0.8, 1.0, 1.2],
        ),
        "non-local means": (
            lambda x, s: denoise_nl_means(
                x, patch_size=3, patch_distance=8, h=s * sigma, sigma=sigma, channel_axis=0
            ),
            [0.4, 0.6, 0.8],
        ),
    }
    if bm3d:
        found["BM3D"] = (lambda x, s: bm3d(x, s * sigma), [0.8, 0.9, 1.0])
    return found


def make_bm3d():
    """function(noisy [3, h, w] of 9×9 pixels or more, sigma) -> denoised by BM3D, as in
    "Collaborative filtering of correlated noise", Mäkinen et al. 2020.

    Raises:
        UserError: there is no package bm3d that works here.
    """
    try:
        from bm3d import BM3DProfile, bm3d_rgb

        profile = BM3DProfile()
    except Exception as error:  # it loads a library of its own, which some machines cannot
        raise UserError(
            f"--bm3d needs the package of that name: pip install bm3d ({reason(error)})"
        ) from None
    profile.num_threads = 1  # with more, results differ from call to call

    def denoise(noisy, sigma):
        with np.errstate(all="ignore"):
            denoised = bm3d_rgb(noisy.transpose(1, 2, 0), sigma, profile).transpose(2, 0, 1)
        return np.where(np.isfinite(denoised), denoised, noisy)  # of one colour alone it makes NaN

    return denoise


def lanczos(clean, degradation):
    """[3, h, w] -> the same, reduced as the model's images are and enlarged by Lanczos's filter."""
    small = degradation.reduced(torch.from_numpy(clean).unsqueeze(0))[0].permute(1, 2, 0)
    file = Image.fromarray((255 * small).round().byte().numpy())
    large = file.resize(clean.shape[:0:-1], Image.Resampling.LANCZOS)
    return np.asarray(large).transpose(2, 0, 1) / np.float32(255)


def telea(degraded):
    """[4, h, w] -> [3, h, w] by "An image inpainting technique based on the fast marching method",
    Telea 2004, as OpenCV does it, in 8 bits.
    """
    image = np.ascontiguousarray((255 * degraded[:3]).round().astype(np.uint8).transpose(1, 2, 0))
    restored = cv2.inpaint(image, (degraded[3] == 0).astype(np.uint8), 3, cv2.INPAINT_TELEA)
    return restored.transpose(2, 0, 1) / np.float32(255)


def biharmonic(degraded):
    """[4, h, w] -> [3, h, w], as scikit-image does it."""
    return inpaint_biharmonic(degraded[:3], degraded[3] == 0, channel_axis=0)


def other_baselines(test_set):
    """{name: function(degraded, clean) -> restored} for what is no noise."""
    degradation = test_set.degradation
    if degradation.task == "super-resolution":
        return {"bicubic": lambda x, _: x, "Lanczos": lambda _, y: lanczos(y, degradation)}
    if degradation.task == "jpeg":
        smooth, strengths = baselines(sigma=0.05)["total variation"]
        best, _ = best_of(smooth, strengths, test_set)
        name = f"total variation, strength {best:.3g}"
        return {"JPEG": lambda x, _: x, name: lambda x, _: smooth(x, best)}
    return {
        "pull-push": lambda x, _: x[:3],
        "Telea": lambda x, _: telea(x),
        "biharmonic": lambda x, _: biharmonic(x),
    }


def special_psnr(degradation, degraded, restored, clean):
    """PSNR in dB as the task's papers have it: of the luma, for super-resolution without a border
    of `scale` pixels; or of the pixels in the holes.
    """
    if degradation.task == "inpaint":
        holes = degraded[3] == 0
        return psnr(restored[:, holes], clean[:, holes])
    border = degradation.scale if degradation.task == "super-resolution" else 0
    inner = (slice(border, -border or None),) * 2
    one, other = (rgb2ycbcr(x, channel_axis=0)[0][inner] / 255 for x in (restored, clean))
    return psnr(one, other)


def compare_others(model, test_set, classical):
    """As `compare`, for a task that is no noise; the model comes last."""
    degradation, device = test_set.degradation, next(model.parameters()).device

    @torch.inference_mode()
    def this_model(degraded, _):
        return model(torch.from_numpy(degraded).unsqueeze(0).to(device))[0][0].cpu().numpy()

    model.eval()
    where = "in the holes" if degradation.task == "inpaint" else "luma"
    print(f"\n| method | PSNR (dB) | SSIM | PSNR (dB), {where} |\n|---|---|---|---|")
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
        figures = (plus_minus(psnrs, 2), plus_minus(ssims, 4), plus_minus(specials, 2))
        tqdm.write(f"| {name} | {' | '.join(figures)} |")
    return psnrs, ssims


def measure(denoise, strength, dataset, every=1):
    """(psnr float64 [n] in dB, ssim float64 [n]) of a classical method, or of None.

    Args:
        denoise, dataset: as for `best_of`.
        every: 1 for all images, n for every n-th.
    """
    scores = []
    for index in range(0, len(dataset), every):
        x, y = (image.numpy() for image in dataset[index][:2])
        restored = np.clip(denoise(x, strength), 0, 1).astype(np.float32) if denoise else x
        scores.append((psnr(restored, y), ssim(restored, y)))
    return np.array(scores).T


def best_of(denoise, strengths, dataset):
    """The strength of the best mean PSNR on up to CHOSEN_ON images, and its figures on these.

    Args:
        denoise: function(noisy [3, h, w], strength) -> denoised.
        strengths: at least two, ascending, above 0. Where the best is at an edge, further ones are
            tried beyond it.
        dataset: NoisyImageDataset.

    Returns:
        (strength, what `measure` gives for it).
    """
    every = math.ceil(len(dataset) / CHOSEN_ON)
    found = {s: measure(denoise, s, dataset, every) for s in strengths}
    for _ in range(MOST_STEPS):
        best = max(found, key=lambda s: found[s][0].mean())
        if min(found) < best < max(found):
            break
        further = best / STEP if best == min(found) else best * STEP
        found[further] = measure(denoise, further, dataset, every)
    return max(found.items(), key=lambda of: of[1][0].mean())


def compare(model, test_set, classical, bm3d=None):
    """Prints the table for one σ; returns the model's PSNR and SSIM of every image.

    Args:
        model: denoiser.
        test_set: NoisyImageDataset.
        classical: whether the classical methods are measured as well.
        bm3d: as for `baselines`.
    """
    sigma = sum(test_set.degradation.noise_range) / 2  # where it differs over an image, a beginning
    print("\n| method | PSNR (dB) | SSIM |\n|---|---|---|")
    print_row("noisy input", *measure(None, None, test_set))
    methods = baselines(sigma, bm3d) if classical and sigma >= LEAST_SIGMA else {}
    for name in tqdm(methods, "methods", leave=False, disable=None):
        denoise, strengths = methods[name]
        strength, figures = best_of(denoise, strengths, test_set)
        if len(test_set) > CHOSEN_ON:
            figures = measure(denoise, strength, test_set)
        print_row(f"{name}, strength {strength:.3g}", *figures)
    result = evaluate(model, test_set)
    print_row("**this model**", result.psnr, result.ssim)
    tqdm.write(f"rounded to 8 bits: {plus_minus(result.psnr_8_bits, 2)} dB")
    return result.psnr, result.ssim


def main():
    parser = make_parser(
        "Compares a trained model with the classical methods for its task on the same test images. "
        "A folder without test/ counts as one of test images.",
        "python compare_baselines.py --dataset photos --checkpoint photos.pt",
        *("checkpoint", "dataset", "data-dir", "unclipped", "jpeg-share", "device", "threads"),
    )
    group = parser.add_argument_group("comparison")
    group.add_argument(
        "--noise-level",
        type=number(ratio, 0, most=1000),
        nargs="+",
        metavar="SIGMA",
        help="one or several σ of the noise, for pixel values in [0, 1], also as a fraction: "
        "25/255 (default: the training's)",
    )
    group.add_argument(
        "--tile",
        type=number(int, 2 * OVERLAP),
        metavar="PIXELS",
        help="restore whole photographs in tiles of this side, as denoise_image.py does (default: "
        "as one)",
    )
    methods = group.add_mutually_exclusive_group()
    methods.add_argument(
        "--model-only", action="store_true", help="leave the classical methods out (default: no)"
    )
    methods.add_argument(
        "--bm3d",
        action="store_true",
        default=None,
        help="measure BM3D as well, by the package bm3d, whose licence is for non-commercial use; "
        "a second for a thumbnail, half a minute for a photograph (default: no)",
    )
    args = parser.parse_args()
    levels, args.noise_level = args.noise_level, None
    _, model, source, (*_, test_set) = load_for_evaluation(args, build_model)
    if args.tile and not test_set.whole:
        raise UserError("--tile is for whole photographs; the test images here are thumbnails")
    model = Tiled(model, args.tile) if args.tile else model
    of_noise = test_set.degradation.task == "denoise"
    if levels and not of_noise:
        what = f"{args.checkpoint} was trained for {test_set.degradation}"
        raise UserError(f"--noise-level: {what}; drop the option")
    for name in ("tile", "unclipped", "jpeg_share", "bm3d"):
        if getattr(args, name) is not None and not of_noise:
            raise UserError(f"--{name.replace('_', '-')} is for noise; drop the option")
    bm3d = make_bm3d() if args.bm3d else None
    for dataset in map(test_set.at, levels) if levels else [test_set]:
        print(f"\n{source.name}, {len(test_set):,} test images, {dataset.degradation}")
        if of_noise:
            figures = compare(model, dataset, not args.model_only, bm3d)
        else:
            figures = compare_others(model, dataset, not args.model_only)
        print(f"\n{result_line(*figures, source.name)}")
    return 0


def print_row(name, psnrs, ssims):
    tqdm.write(f"| {name} | {plus_minus(psnrs, 2)} | {plus_minus(ssims, 4)} |")


if __name__ == "__main__":
    run_main(main)
