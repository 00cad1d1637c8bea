"""Layer 6: ablations differ as they must, no expert collapses, extremes stay finite."""

import pytest
import torch

from adaptive_attention_moe import AdaptiveAttentionMoE, load_balancing_loss
from images.noisy_images import NoisyImageDataset
from small_vit import SmallViT, ViTConfig

# Ablations -----------------------------------------------------------------------------------


def with_budgets(model, k_attend):
    """The same weights with other budgets."""
    other = SmallViT(ViTConfig(k_attend=k_attend))
    other.load_state_dict(model.state_dict())
    return other.eval()


def test_budgets_at_or_above_n_are_one_model(vit):
    noisy = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        dense = with_budgets(vit, (64, 64, 64))(noisy)[0]
        assert torch.equal(with_budgets(vit, (64, 100, 999))(noisy)[0], dense)


def test_fewer_keys_move_the_output_further_from_dense(vit):
    noisy = torch.rand(4, 3, 32, 32)
    with torch.no_grad():
        dense = with_budgets(vit, (64, 64, 64))(noisy)[0]
        distances = [
            (with_budgets(vit, (k, k, k))(noisy)[0] - dense).square().mean().item()
            for k in (1, 4, 16, 63)
        ]
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] > 0


def replace_routing(model, route):
    """Replaces the routing of every block by route(routing)."""
    for block in model.blocks:
        block.attention.router.register_forward_hook(lambda _, __, routing: route(routing))


def test_uniform_routing_differs_from_the_routers(vit):
    noisy = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        before = vit.denoise(noisy)
        replace_routing(vit, lambda p: torch.full_like(p, 1 / p.shape[-1]))
        after, routings = vit(noisy)
    assert all((r == 1 / 3).all() for r in routings)
    assert (after - before).abs().max() > 1e-4


def test_first_choice_routing_differs_from_soft_routing(vit):
    noisy = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        before = vit.denoise(noisy)
        replace_routing(
            vit, lambda p: torch.nn.functional.one_hot(p.argmax(-1), p.shape[-1]).to(p.dtype)
        )
        assert (vit.denoise(noisy) - before).abs().max() > 1e-3


def test_an_expert_without_weight_can_be_removed(vit):
    noisy = torch.rand(2, 3, 32, 32)

    def silence_last(p):
        p = p.clone()
        p[..., 2] = 0
        return p

    replace_routing(vit, silence_last)
    with torch.no_grad():
        before = vit.denoise(noisy)
        for block in vit.blocks:
            for parameter in block.attention.experts[2].parameters():
                parameter.normal_()
        assert torch.allclose(vit.denoise(noisy), before, atol=1e-5)


def test_identical_experts_make_the_router_irrelevant(moe):
    for expert in moe.experts:
        expert.load_state_dict(moe.experts[0].state_dict())
        expert.k_attend = 5
    x = torch.randn(2, 16, 24, dtype=torch.float64)
    before = moe(x)[0]
    with torch.no_grad():
        moe.router.mlp[-1].bias.copy_(torch.tensor([3.0, 0.0, -3.0]))
    assert torch.allclose(moe(x)[0], before, atol=1e-12)


def test_positions_matter(vit, photos):
    """Without its position embedding the model could not tell a shuffled image from the image."""
    noisy = photos.test.images[:4].float() / 255
    patches = noisy.unfold(2, 4, 4).unfold(3, 4, 4)  # [B, 3, 8, 8, 4, 4]

    def shuffle(images, order):
        p = images.unfold(2, 4, 4).unfold(3, 4, 4).flatten(2, 3)[:, :, order]
        return p.unflatten(2, (8, 8)).transpose(3, 4).reshape(images.shape)

    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    assert patches.shape[2:4] == (8, 8)
    with torch.no_grad():
        vit.train()  # not clamped
        vit.position.mul_(50)
        a, b = vit(shuffle(noisy, order))[0], shuffle(vit(noisy)[0], order)
        assert not torch.allclose(a, b, atol=1e-2)
        vit.position.zero_()
        vit.double()
        a, b = vit(shuffle(noisy, order).double())[0], shuffle(vit(noisy.double())[0], order)
        assert torch.allclose(a, b, atol=1e-9)


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


@pytest.mark.parametrize("value", [0.0, 1.0, 0.5])
def test_flat_images_stay_finite(vit, value):
    noisy = torch.full((2, 3, 32, 32), value)
    image, _ = vit(noisy)
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


@pytest.mark.parametrize("sigma", [0.0, 0.01, 1.0, 100.0])
def test_any_noise_level_stays_in_range(photos, sigma):
    noisy, clean, _ = next(NoisyImageDataset(photos.test, sigma).batches(16))
    assert noisy.isfinite().all()
    assert noisy.min() >= 0
    assert noisy.max() <= 1
    assert torch.equal(noisy, clean) == (sigma == 0)


def test_images_of_another_type_are_refused(photos):
    split = photos.test[:2]
    split.images = split.images.float()
    with pytest.raises(ValueError, match="uint8"):
        NoisyImageDataset(split)


def test_model_output_is_an_image_whatever_the_input(vit):
    with torch.no_grad():
        image = vit.denoise(1e4 * torch.randn(2, 3, 32, 32))
    assert image.min() >= 0
    assert image.max() <= 1
