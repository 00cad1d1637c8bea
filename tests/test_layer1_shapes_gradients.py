"""Layer 1: shapes through every component, gradients to every parameter, dtypes, odd sizes."""

import math

import pytest
import torch

from adaptive_attention_moe import (
    AdaptiveAttentionMoE,
    SparseAttentionExpert,
    TokenRouter,
    load_balancing_loss,
)
from conftest import filled
from layers.conv_stages import reflected
from layers.topk_attention import topk_attention
from small_vit import MODELS, SmallViT, ViTConfig, count_parameters
from studies.model_variants import DnCNN


@pytest.mark.parametrize(("batch", "tokens"), [(2, 1), (2, 15), (2, 100), (0, 16)])
def test_moe_takes_any_number_of_tokens(moe, batch, tokens):
    output, routing = moe(torch.randn(batch, tokens, 24, dtype=torch.float64))
    assert output.shape == (batch, tokens, 24)
    assert routing.shape == (batch, tokens, 3)


@pytest.mark.parametrize(("tokens", "capacity"), [(1, 0.1), (7, 0.3), (16, 1)])
def test_moe_takes_any_capacity(seeded, tokens, capacity):
    moe = AdaptiveAttentionMoE(24, 3, (4, 16), capacity)
    output, routing = moe(torch.randn(2, tokens, 24))
    assert output.shape == (2, tokens, 24)
    assert routing.shape == (2, tokens, 3)  # the last: not to attend
    assert torch.allclose(routing.sum(-1), torch.ones(2, tokens))


def test_default_model_has_the_published_parameters():
    model = SmallViT()
    block = model.blocks[0]
    assert count_parameters(model) == 599_689
    assert count_parameters(model.patch_embed) == 6_272
    assert model.position.numel() == 8_192
    assert count_parameters(block) == 289_539
    assert count_parameters(block.attention.router) == 8_451
    assert count_parameters(block.attention.experts) == 198_144
    assert count_parameters(block.attention.merge) == 16_512
    assert count_parameters(block.ffn) == 65_920
    assert count_parameters(model.patch_unembed) == 6_147


@pytest.mark.parametrize(
    "config",
    [
        {"image_size": 48},
        {"image_size": 12, "patch_size": 2, "num_layers": 1},
        {"d_model": 20, "num_heads": 5, "d_ff": 7, "k_attend": (3, 300)},
    ],
)
def test_vit_of_other_sizes(config):
    model = SmallViT(ViTConfig(**config))
    shape = (2, 3, model.config.image_size, model.config.image_size)
    assert model(torch.rand(shape))[0].shape == shape


@pytest.mark.parametrize("size", [(32, 32), (20, 64), (4, 4), (1, 1), (2, 31), (33, 3)])
def test_vit_takes_images_of_any_size(vit, size):
    image, routings = vit(torch.rand(2, 3, *size))
    assert image.shape == (2, 3, *size)
    tokens = math.ceil(size[0] / 4) * math.ceil(size[1] / 4)
    assert [r.shape for r in routings] == [(2, tokens, 3)] * 2


def test_images_are_continued_by_reflection():
    image = torch.arange(12.0).view(1, 1, 3, 4)
    for size in (3, 2):
        part = image[..., :size]
        padded = torch.nn.functional.pad(part, (0, 1, 0, 2), mode="reflect")
        assert torch.equal(reflected(part, 2, 1), padded)
    assert reflected(image[..., :2], 0, 5).tolist()[0][0][0] == [0, 1, 0, 1, 0, 1, 0]
    assert reflected(image[..., :1, :1], 3, 3).unique().tolist() == [0]


def test_positions_are_interpolated_in_their_place(vit):
    """Twice the patches: the mean of 2×2 new positions is close to the old one."""
    grid = torch.linspace(0, 1, 8)
    smooth = (grid[:, None] + 2 * grid[None, :]).reshape(1, 64, 1)  # rows and columns differ
    with torch.no_grad():
        vit.position.copy_(smooth.expand(1, 64, 128))
        doubled = vit.positions_of((16, 16)).reshape(8, 2, 8, 2, 128).mean((1, 3))
    assert torch.allclose(doubled.reshape(1, 64, 128), vit.position, atol=0.05)
    assert vit.positions_of((8, 8)) is vit.position


@pytest.mark.parametrize(
    ("name", "parameters", "size"),
    [
        ("published", 599_689, (32, 32)),
        ("refined", 358_345, (32, 32)),
        ("quick", 240_709, (32, 32)),
        ("routed", 337_927, (32, 32)),
        ("photographs", 574_213, (48, 64)),
    ],
)
def test_gradients_reach_every_parameter(seeded, name, parameters, size):
    model = filled(SmallViT(MODELS[name]))
    assert count_parameters(model) == parameters
    image, routings = model(torch.rand(2, 3, *size))
    balance = sum(load_balancing_loss(routing, model.capacity) for routing in routings)
    (image.square().mean() + balance).backward()
    no_choice = len(model.config.k_attend) == 1 and not model.capacity  # of a single expert
    for path, parameter in model.named_parameters():
        if path.endswith("key.bias"):
            continue  # it shifts all scores of a query alike, which no softmax and no top-k sees
        reached = parameter.grad.abs().max() > 1e-9
        assert reached != (no_choice and "router" in path), path


def test_refined_model_starts_as_the_identity_and_computes_in_the_fast_layout(refined):
    noisy = torch.rand(2, 3, 32, 32)
    fresh = SmallViT(MODELS["refined"]).eval()
    assert torch.equal(fresh(noisy)[0], noisy)
    assert not torch.equal(refined.eval()(noisy)[0], noisy)
    tokens, features = refined.encoder(noisy)
    for feature in (tokens, *features, refined.decoder(tokens, features)):
        assert feature.is_contiguous(memory_format=torch.channels_last)
    assert refined(torch.rand(1, 3, 48, 20))[0].shape == (1, 3, 48, 20)


def test_every_block_starts_as_the_identity():
    """Which those of the refined model do not show: its last layer is zero as well."""
    model = SmallViT(MODELS["refined"])
    for stage, channels in zip(model.encoder.stages, model.config.channels, strict=True):
        x = torch.rand(2, channels, 6, 4)
        assert torch.equal(stage(x), x)
    tokens = torch.rand(2, 9, 64)
    assert torch.equal(model.blocks[1](tokens)[0], tokens)


def test_dncnn_computes_in_the_fast_layout():
    denoiser, layouts = DnCNN(depth=3, channels=4), []

    def note(layer, inputs, output):
        layouts.append(output.is_contiguous(memory_format=torch.channels_last))

    for layer in denoiser.modules():
        if isinstance(layer, torch.nn.Conv2d):
            layer.register_forward_hook(note)
    denoiser(torch.rand(2, 3, 8, 8))
    assert layouts and all(layouts)


def test_dncnn_starts_as_the_identity_with_every_pixel_in_its_place():
    """Drawn at random, its inner layers blur a pixel over 31 × 31, and training hardly starts."""
    torch.manual_seed(0)
    model, noisy = DnCNN().eval(), torch.rand(1, 3, 32, 32)
    assert torch.equal(model(noisy)[0], noisy)
    features = model.noise[:2](noisy).detach().requires_grad_()
    model.noise[2:-1](features)[0, :, 16, 16].sum().backward()
    assert features.grad[0].abs().sum(0).nonzero().tolist() == [[16, 16]]


def test_decoder_sees_every_resolution_of_the_encoder(refined):
    """The skips: what a stage of the encoder makes reaches the output past the tokens."""
    noisy = torch.rand(1, 3, 32, 32)
    _, features = refined.embed(noisy)
    assert [f.shape[1:] for f in features] == [(16, 32, 32), (64, 16, 16)]
    x = torch.zeros(1, 64, 8, 8)
    image = refined.decoder(x, features)
    for level in range(2):
        changed = [f + (i == level) for i, f in enumerate(features)]
        assert not torch.allclose(refined.decoder(x, changed), image)


def test_training_starts_where_gradients_can_move(seeded):
    """Zero-initialised branches are the identity, yet their last layers get a gradient."""
    model = SmallViT()
    x = torch.randn(2, 64, 128)
    assert torch.equal(model.blocks[0](x)[0], x)
    model(torch.rand(2, 3, 32, 32))[0].square().mean().backward()
    for block in model.blocks:
        assert block.attention.merge.weight.grad.abs().max() > 0
        assert block.ffn[-1].weight.grad.abs().max() > 0


def test_bfloat16(seeded):
    layer = AdaptiveAttentionMoE(16, 2, (2, 9)).bfloat16()
    output, routing = layer(torch.randn(1, 6, 16, dtype=torch.bfloat16))
    assert output.dtype == routing.dtype == torch.bfloat16
    assert torch.isfinite(output).all()


def test_autocast_runs_the_whole_model(vit):
    vit.eval()
    noisy = torch.rand(2, 3, 32, 32)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        half = vit(noisy)[0].float()
    assert (half - vit.denoise(noisy)).square().mean() < 1e-3


def test_clamped_in_evaluation_only(vit):
    with torch.no_grad():
        vit.patch_unembed.bias.fill_(5.0)
        assert vit.train()(torch.rand(1, 3, 32, 32))[0].max() > 1
        assert vit.eval()(torch.rand(1, 3, 32, 32))[0].max() == 1


def test_denoise_gives_the_images_as_they_are_shown(vit):
    noisy = torch.rand(2, 3, 32, 32)
    image = vit.train().denoise(noisy)
    assert not vit.training and not image.requires_grad
    assert torch.equal(image, vit(noisy)[0])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: SparseAttentionExpert(10, 3), "d_model=10, num_heads=3"),
        (lambda: SparseAttentionExpert(8, 0), "num_heads=0"),
        (lambda: SparseAttentionExpert(8, 2, k_attend=0), "got 0"),
        (lambda: TokenRouter(8, 0), "num_experts=0"),
        (lambda: AdaptiveAttentionMoE(8, 2, ()), r"got \(\)"),
        (lambda: AdaptiveAttentionMoE(8, 2, (4, -1)), "got -1"),
        (lambda: AdaptiveAttentionMoE(8, 2, (4,))(torch.zeros(2, 5, 9)), r"\[2, 5, 9\]"),
        (lambda: AdaptiveAttentionMoE(8, 2, (4,))(torch.zeros(5, 8)), r"\[5, 8\]"),
        (lambda: AdaptiveAttentionMoE(8, 2, (4,), 0), "got 0"),
        (lambda: AdaptiveAttentionMoE(8, 2, (4,), 1.01), "got 1.01"),
        (lambda: AdaptiveAttentionMoE(8, 2, (4,), float("nan")), "got nan"),
        (lambda: ViTConfig(capacity=-0.5), "got -0.5"),
        (lambda: ViTConfig(capacity="all"), "got 'all'"),
        (lambda: ViTConfig(capacity=True), "got True"),
        (lambda: setattr(SmallViT(MODELS["routed"]), "capacity", 2), "got 2"),
        (lambda: setattr(SmallViT(MODELS["routed"]), "capacity", None), "configuration"),
        (lambda: setattr(SmallViT(), "capacity", 0.5), "configuration"),
        (lambda: setattr(AdaptiveAttentionMoE(), "capacity", 0.5), "without a capacity"),
        (lambda: setattr(AdaptiveAttentionMoE(capacity=0.5), "capacity", -1), "got -1"),
        (lambda: setattr(AdaptiveAttentionMoE(capacity=0.5), "capacity", None), "got None"),
        (lambda: topk_attention(*[torch.zeros(1, 4, 2)] * 3, 0), "got 0"),
        (lambda: ViTConfig(image_size=30), "image_size=30, patch_size=4"),
        (lambda: ViTConfig(num_heads=3), "num_heads must divide d_model"),
        (lambda: ViTConfig(k_attend=()), "got none"),
        (lambda: ViTConfig(conv_depth=-1), "got -1"),
        (lambda: ViTConfig(residual="no"), "residual must be true or false"),
        (lambda: ViTConfig(channels=(8, 8, 8)), "make patches of 8, got patch_size=4"),
        (lambda: SmallViT()(torch.zeros(3, 32, 32)), r"\[3, 32, 32\]"),
        (lambda: SmallViT()(torch.zeros(1, 1, 32, 32)), r"\[1, 1, 32, 32\]"),
        (lambda: SmallViT()(torch.zeros(1, 3, 0, 32)), r"\[1, 3, 0, 32\]"),
    ],
)
def test_wrong_arguments_are_named(make, words):
    with pytest.raises(ValueError, match=words):
        make()
