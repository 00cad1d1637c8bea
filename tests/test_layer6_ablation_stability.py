"""Layer 6: ablations differ as they must, no expert collapses, extremes stay finite."""

from dataclasses import replace

import pytest
import torch

from adaptive_attention_moe import AdaptiveAttentionMoE, load_balancing_loss
from images.degradations import GaussianNoise
from images.noisy_images import NoisyImageDataset
from small_vit import SmallViT

# Ablations -----------------------------------------------------------------------------------


def test_fewer_keys_move_the_output_further_from_dense(vit):
    noisy, images = torch.rand(4, 3, 32, 32), {}
    for keys in (64, 32, 16, 8, 4, 1):
        variant = SmallViT(replace(vit.config, k_attend=(keys,) * 3))
        variant.load_state_dict(vit.state_dict())
        images[keys] = variant.denoise(noisy)
    dense = images.pop(64)
    distances = [(image - dense).square().mean().item() for image in images.values()]
    assert len(distances) == 5
    assert distances == sorted(distances) and distances[0] > 0


def test_positions_matter(vit, photos):
    """Without its position embedding the model could not tell a shuffled image from the image."""
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))

    def shuffled(images):
        patches = images.unfold(2, 4, 4).unfold(3, 4, 4).flatten(2, 3)[:, :, order]
        return patches.unflatten(2, (8, 8)).transpose(3, 4).reshape(images.shape)

    images = photos.test.images[:4].double() / 255
    vit.double().train()  # not clamped
    with torch.no_grad():
        vit.position.mul_(50)
        assert not torch.allclose(vit(shuffled(images))[0], shuffled(vit(images)[0]), atol=1e-2)
        vit.position.zero_()
        assert torch.allclose(vit(shuffled(images))[0], shuffled(vit(images)[0]), atol=1e-9)


# Collapse ------------------------------------------------------------------------------------


def load_after_training(balance_weight):
    """Share of each expert after 150 steps that started with a router sure of expert 0."""
    torch.manual_seed(0)
    layer = AdaptiveAttentionMoE(16, 2, (2, 4, 8))
    with torch.no_grad():
        layer.router.mlp[-1].bias.copy_(torch.tensor([4.0, 0.0, 0.0]))
    optimizer = torch.optim.AdamW(layer.parameters(), 1e-2)
    x = torch.randn(8, 8, 16)
    target = layer.experts[0](x).detach()  # the task itself wants expert 0
    for _ in range(150):
        output, routing = layer(x)
        loss = (output - target).square().mean() + balance_weight * load_balancing_loss(routing)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return routing.mean((0, 1)).detach()


def test_load_balancing_prevents_collapse():
    collapsed, balanced = load_after_training(0.0), load_after_training(0.1)
    assert collapsed.max() > 0.6
    assert balanced.max() < 0.4


def test_an_expert_that_is_hardly_used_any_more_is_called_back():
    """However little its load: a clamp of the load would end its gradient."""
    logits = torch.tensor([0.0, -14.0, -14.0]).expand(1, 6, 3).clone().requires_grad_()
    load_balancing_loss(logits.softmax(-1)).backward()
    assert (logits.grad[..., 1:] < -1e-3).all()


def test_trained_routers_use_every_expert(trained):
    for block in trained.checkpoint["test"]["utilisation"]:
        assert min(block) > 0.1
        assert sum(block) == pytest.approx(1, abs=1e-4)


# Extremes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0.0, 1.0, 1e4])
def test_flat_images_stay_finite(vit, value):
    image, _ = vit(torch.full((2, 3, 32, 32), value))
    image.square().mean().backward()
    assert image.isfinite().all()
    assert all(p.grad.isfinite().all() for p in vit.parameters())


@pytest.mark.parametrize("scale", [1e-6, 1e3, 1e6])
def test_extreme_tokens_stay_finite(seeded, scale):
    layer = AdaptiveAttentionMoE(16, 2, (1, 4, 64))
    x = (scale * torch.randn(2, 9, 16)).requires_grad_()
    output, routing = layer(x)
    (output.square().mean() + load_balancing_loss(routing)).backward()
    assert output.isfinite().all()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("sigma", [0.0, 0.01, 100.0])
def test_any_noise_level_stays_in_range(photos, sigma):
    noisy, clean, _ = next(NoisyImageDataset(photos.test, GaussianNoise(sigma)).batches(16))
    assert noisy.isfinite().all() and noisy.min() >= 0 and noisy.max() <= 1
    assert torch.equal(noisy, clean) == (sigma == 0)


def test_images_of_another_type_are_refused(photos):
    split = photos.test[:2]
    split.images = split.images.float()
    with pytest.raises(ValueError, match="uint8"):
        NoisyImageDataset(split)
