"""What a training can minimise: functions of restored and clean images, float32 [B, 3, h, w] in
about [0, 1], that return a scalar.
"""

import functools

import torch.nn.functional as F

from common.user_errors import UserError

PSNR_WEIGHT = 1e-3  # with it, 1 dB near 23 dB weighs what it weighs in the mean squared error
PSNR_EPS = 1e-5  # an MSE of 50 dB; bounds the gradient of the logarithm
EVEN_EPS = 5e-5  # one of 43 dB, where some images are nearly clean and would outweigh the others
CHARBONNIER_EPS = 1e-3  # below such differences the loss is a parabola
SSIM_WINDOW = 7  # pixels, scikit-image's default


def psnr(restored, clean, eps=PSNR_EPS):
    """Minus the mean PSNR of the images in dB, times PSNR_WEIGHT; eps is added to each image's
    squared error (HINet, Chen et al. 2021).
    """
    errors = (restored - clean).square().mean((1, 2, 3))
    return 10 * PSNR_WEIGHT * (errors + eps).log10().mean()


def charbonnier(restored, clean):
    """Mean of √(difference² + ε²) - ε, a smooth absolute error (LapSRN, Lai et al. 2017)."""
    return ((restored - clean).square() + CHARBONNIER_EPS**2).sqrt().mean() - CHARBONNIER_EPS


def ssim(restored, clean):
    """1 - SSIM in a uniform window, as scikit-image measures it (Wang et al. 2004); a UserError for
    images that are smaller than the window.
    """
    if min(clean.shape[-2:]) < SSIM_WINDOW:
        raise UserError(f"--loss ssim needs images of at least {SSIM_WINDOW}×{SSIM_WINDOW} pixels")
    mean = functools.partial(F.avg_pool2d, kernel_size=SSIM_WINDOW, stride=1)
    unbiased = SSIM_WINDOW**2 / (SSIM_WINDOW**2 - 1)
    x, y = mean(restored), mean(clean)
    squares = x.square() + y.square()
    variances = unbiased * (mean(restored.square()) + mean(clean.square()) - squares)
    covariance = unbiased * (mean(restored * clean) - x * y)
    c1, c2 = 0.01**2, 0.03**2
    similarity = (2 * x * y + c1) * (2 * covariance + c2) / ((squares + c1) * (variances + c2))
    return 1 - similarity.mean()


LOSSES = {"mse": F.mse_loss, "psnr": psnr, "even-psnr": functools.partial(psnr, eps=EVEN_EPS)}
LOSSES |= {"charbonnier": charbonnier, "ssim": ssim}
