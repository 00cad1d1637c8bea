"""Layer 6, losses: each is its definition, and falls in training."""

import math

import numpy as np
import pytest
import torch

from common.user_errors import UserError
from conftest import train_few
from experiment import evaluation, losses
from experiment.losses import LOSSES


def pair(photos, count=6):
    clean = photos.test[:count].images.float() / 255
    generator = torch.Generator().manual_seed(0)
    return clean + 0.1 * torch.randn(clean.shape, generator=generator), clean


def test_ssim_is_that_of_scikit_image(photos):
    noisy, clean = pair(photos)
    measured = [evaluation.ssim(x, y) for x, y in zip(noisy.numpy(), clean.numpy(), strict=True)]
    assert 1 - losses.ssim(noisy, clean).item() == pytest.approx(np.mean(measured), abs=1e-4)


def test_ssim_needs_images_of_its_window():
    with pytest.raises(UserError, match="at least 7×7"):
        losses.ssim(torch.zeros(1, 3, 6, 9), torch.zeros(1, 3, 6, 9))


def test_psnr_and_charbonnier_are_their_formulas(photos):
    noisy, clean = (t.double() for t in pair(photos))
    squares = (noisy - clean).square()
    decibels = -10 * (squares.mean((1, 2, 3)) + 1e-5).log10().mean()
    assert losses.psnr(noisy, clean).item() == pytest.approx(-1e-3 * decibels.item())
    expected = (squares + 1e-6).sqrt().mean() - 1e-3
    assert losses.charbonnier(noisy, clean).item() == pytest.approx(expected.item())


@pytest.mark.parametrize("loss", LOSSES)
def test_a_loss_is_least_at_the_true_image_and_its_gradient_leads_there(photos, loss):
    noisy, clean = pair(photos)
    least = LOSSES[loss](clean, clean).item()
    perfect = {"psnr": 1e-2 * math.log10(1e-5), "even-psnr": 1e-2 * math.log10(5e-5)}
    assert least == pytest.approx(perfect.get(loss, 0), abs=1e-6)
    image, values = noisy.clone().requires_grad_(), []
    optimizer = torch.optim.Adam([image], 1e-2)
    for _ in range(20):
        optimizer.zero_grad()
        value = LOSSES[loss](image, clean)
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert np.isfinite(values).all() and values[-1] < 0.7 * values[0] + 0.3 * least
    assert (image - clean).abs().mean() < 0.9 * (noisy - clean).abs().mean()


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_trains(few, loss):
    history = train_few(few, loss=loss)["history"]
    assert history[-1]["val_mse"] < history[0]["val_mse"]


def test_equal_images_have_finite_gradients():
    for name in LOSSES:
        image = torch.full((1, 3, 8, 8), 0.5, requires_grad=True)
        LOSSES[name](image, image.detach().clone()).backward()
        assert image.grad.isfinite().all(), name


def test_sharpness_is_that_of_the_gradients(photos):
    _, clean = pair(photos)
    image = clean[0].numpy()
    blurred = torch.nn.functional.avg_pool2d(clean, 3, 1, 1, count_include_pad=False)[0].numpy()
    assert evaluation.sharpness(image, image) == 1
    assert evaluation.sharpness(0.5 * image, image) == pytest.approx(0.5)
    assert evaluation.sharpness(blurred, image) < 0.9
    assert np.isfinite(evaluation.sharpness(image, np.full_like(image, 0.5)))
