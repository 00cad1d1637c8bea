"""Compares a trained model with the classical denoisers of scikit-image on the same noisy images.

    python compare_baselines.py --dataset photos --checkpoint photos.pt

Every classical method gets the strength, out of a short list, that is best on these very test
images: the comparison favours them. Prints a Markdown table.
"""

import numpy as np
from skimage.filters import gaussian
from skimage.restoration import denoise_nl_means, denoise_tv_chambolle, denoise_wavelet
from tqdm import tqdm

from experiment.command_line import make_parser
from experiment.evaluation import evaluate, psnr, result_line, ssim
from experiment.noisy_images import noise_text, noisy_splits
from experiment.user_errors import run_main
from small_vit import load_for_evaluation


def baselines(sigma):
    """{name: (function(noisy [3, h, w], strength) -> denoised, list of strengths)}.

    Args:
        sigma: standard deviation of the noise, which wavelet and non-local means are told.
    """
    return {
        "noisy input": (lambda x, _: x, [0]),
        "Gaussian blur": (
            lambda x, s: gaussian(x, sigma=s, channel_axis=0),
            [0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.4],
        ),
        "total variation": (
            lambda x, s: denoise_tv_chambolle(x, weight=s, channel_axis=0),
            [0.1, 0.15, 0.2, 0.25, 0.3],
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
            [0.4, 0.6, 0.8, 1.0],
        ),
    }


def best_of(denoise, strengths, dataset):
    """The best strength by mean PSNR.

    Returns:
        (strength, psnr float64 [n] in dB, ssim float64 [n]).
    """
    results = []
    for strength in strengths:
        scores = []
        for noisy, clean, _ in dataset.batches():
            for x, y in zip(noisy.numpy(), clean.numpy(), strict=True):
                restored = np.clip(denoise(x, strength), 0, 1).astype(np.float32)
                scores.append((psnr(restored, y), ssim(restored, y)))
        results.append((strength, *np.array(scores).T))
    return max(results, key=lambda result: result[1].mean())


def main():
    parser = make_parser(
        "Compares a trained model with classical denoisers on the same noisy test images.",
        "python compare_baselines.py --dataset photos --checkpoint photos.pt",
        *("checkpoint", "dataset", "data-dir", "noise-level", "device", "threads"),
    )
    _, model, source, noise_range = load_for_evaluation(parser.parse_args())
    test_set = noisy_splits(source, noise_range)[2]
    methods = baselines(noise_range[0])
    print(f"\n{source.name}, {len(test_set):,} test images, {noise_text(noise_range)}\n")
    print("| method | PSNR (dB) | SSIM |\n|---|---|---|")
    for name in tqdm(methods, "methods", leave=False, disable=None):
        denoise, strengths = methods[name]
        strength, psnrs, ssims = best_of(denoise, strengths, test_set)
        tuned = f", strength {strength:g}" if len(strengths) > 1 else ""
        print_row(name + tuned, psnrs, ssims)
    result = evaluate(model, test_set)
    print_row("**this model**", result.psnr, result.ssim)
    print(f"\n{result_line(result.psnr, result.ssim, source.name)}")
    return 0


def print_row(name, psnrs, ssims):
    tqdm.write(
        f"| {name} | {psnrs.mean():.2f} ± {psnrs.std():.2f} "
        f"| {ssims.mean():.4f} ± {ssims.std():.4f} |"
    )


if __name__ == "__main__":
    run_main(main)
