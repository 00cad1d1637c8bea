"""Layer 2: routing probabilities, the load-balancing loss and its gradient, utilisation."""

import contextlib
import math

import pytest
import torch

from adaptive_attention_moe import AdaptiveAttentionMoE, TokenRouter, load_balancing_loss
from experiment.evaluation import evaluate
from images.noisy_images import NoisyImageDataset
from small_vit import MODELS, SmallViT, with_each_capacity
from studies.model_variants import VARIANTS, UniformRouter, spread_ranks
from studies.reference import straightforward_expert


def test_probabilities_are_valid_and_differ_from_token_to_token(seeded):
    routing = TokenRouter(32, 5)(10 * torch.randn(4, 50, 32))
    assert (routing >= 0).all()
    assert torch.allclose(routing.sum(-1), torch.ones(4, 50))
    assert routing.std(dim=1).min() > 1e-3


def test_each_token_is_routed_by_itself(seeded):
    """Another token in the sequence or in the batch changes nothing."""
    router, x = TokenRouter(32, 3).double(), torch.randn(4, 50, 32, dtype=torch.float64)
    together = router(x)
    assert torch.allclose(together[2, 7], router(x[2:3, 7:8])[0, 0], atol=1e-12)


@pytest.mark.parametrize("chosen", [0, 1, 2])
def test_a_certain_router_uses_one_expert(moe, chosen):
    with torch.no_grad():
        moe.router.mlp[-1].weight.zero_()
        moe.router.mlp[-1].bias.fill_(-1e4)[chosen] = 0
    x = torch.randn(2, 16, 24, dtype=torch.float64)
    alone = moe.merge(straightforward_expert(moe.experts[chosen], x))
    assert torch.allclose(moe(x)[0], alone, atol=1e-12)


def test_gradient_of_the_router_is_that_of_finite_differences(moe):
    x = torch.randn(1, 6, 24, dtype=torch.float64)
    bias = moe.router.mlp[-1].bias

    def loss():
        return moe(x)[0].square().sum()

    loss().backward()
    for expert in range(3):
        with torch.no_grad():
            bias[expert] += 1e-5
            above = loss()
            bias[expert] -= 2e-5
            below = loss()
            bias[expert] += 1e-5
        assert bias.grad[expert].item() == pytest.approx((above - below).item() / 2e-5, rel=1e-5)


def test_experts_that_share_the_tokens_evenly_cost_nothing():
    """However decided the tokens are."""
    decided = torch.eye(4).repeat(1, 2, 1)
    assert load_balancing_loss(decided).item() == pytest.approx(0, abs=1e-7)


def test_loss_is_the_divergence_over_the_number_of_experts(seeded):
    routing = torch.randn(4, 9, 5, dtype=torch.float64).softmax(-1)
    load = routing.mean((0, 1))
    uniform = torch.full_like(load, 1 / 5)
    expected = torch.nn.functional.kl_div(load.log(), uniform, reduction="sum") / 5
    assert torch.allclose(load_balancing_loss(routing), expected)


def test_loss_is_checked_by_gradcheck(seeded):
    logits = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: load_balancing_loss(t.softmax(-1)), logits)


def test_a_total_collapse_has_a_finite_loss():
    collapsed = torch.tensor([1.0, 0.0, 0.0]).expand(2, 5, 3).clone().requires_grad_()
    loss = load_balancing_loss(collapsed)
    loss.backward()
    assert torch.isfinite(loss)
    assert loss > 1
    assert torch.isfinite(collapsed.grad).all()


def test_utilisation_is_the_mean_over_all_tokens(vit, photos):
    dataset = NoisyImageDataset(photos.test[:70])  # more than one batch, the last one short
    result = evaluate(vit, dataset)
    noisy = torch.stack([dataset[i][0] for i in range(70)])
    with torch.inference_mode():
        _, routings = vit(noisy)
    expected = torch.stack([r.mean((0, 1)) for r in routings])
    assert result.utilisation == pytest.approx(expected.numpy(), abs=1e-5)
    assert result.utilisation.sum(1) == pytest.approx(1, abs=1e-5)


def test_blocks_and_experts_start_different():
    first, second = (block.attention for block in SmallViT().blocks)
    assert not torch.equal(first.router.mlp[0].weight, second.router.mlp[0].weight)
    assert not torch.equal(first.experts[0].query.weight, first.experts[1].query.weight)


# Which tokens attend ---------------------------------------------------------------------------


@pytest.fixture
def choosing(seeded):
    """A float64 layer of which a quarter of the tokens attends."""
    return AdaptiveAttentionMoE(24, 3, (4, 16), capacity=0.25).double()


@pytest.mark.parametrize(
    ("capacity", "tokens", "count"),
    [(1e-9, 16, 1), (0.25, 16, 4), (0.26, 16, 5), (1.0, 16, 16), (0.07, 100, 7)],
)
def test_the_share_of_tokens_that_attend_is_the_capacity(choosing, capacity, tokens, count):
    """Rounded up, in every image, but not where it is rounding: 0.07 · 100 is a little over 7."""
    choosing.capacity = capacity  # it may be changed at any time
    output, routing = choosing(torch.randn(3, tokens, 24, dtype=torch.float64))
    assert (output != 0).any(2).sum(1).tolist() == [count] * 3
    assert choosing.choose(routing).shape == (3, count)


def test_tokens_attend_for_which_the_router_wants_it_most(choosing):
    output, routing = choosing(torch.randn(3, 16, 24, dtype=torch.float64))
    attend = (output != 0).any(2)
    for attends, not_to_attend in zip(attend, routing[..., -1], strict=True):
        assert not_to_attend[attends].max() < not_to_attend[~attends].min()


def test_among_equal_tokens_the_first_attend(choosing):
    output, routing = choosing(torch.ones(2, 16, 24, dtype=torch.float64))
    assert choosing.choose(routing).tolist() == [[0, 1, 2, 3]] * 2
    assert (output[0] != 0).any(1).tolist() == [True] * 4 + [False] * 12


@pytest.mark.parametrize("divisor", [1, 0])
def test_a_model_has_its_own_capacity_again_also_after_an_error(divisor):
    model = SmallViT(MODELS["routed"])
    with contextlib.suppress(ZeroDivisionError):
        for capacity in with_each_capacity(model, (1.0, 0.5)):
            assert model.blocks[1].attention.capacity == capacity / divisor
    assert model.capacity == MODELS["routed"].capacity


@pytest.mark.parametrize("name", ["capacity, by router", "capacity, by router, local"])
def test_a_token_that_does_not_attend_gets_the_local_path_alone(seeded, name):
    block = VARIANTS[name]().blocks[0].double().eval()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x = torch.randn(1, 64, 128, dtype=torch.float64)
    with torch.no_grad():
        output, routing = block(x, (8, 8))
        alone = x
        if block.local:
            image = block.norm1(x).transpose(1, 2).unflatten(2, (8, 8))
            alone = x + block.local(image).flatten(2).transpose(1, 2)
        alone = alone + block.ffn(block.norm2(alone))
    attend = torch.zeros(64, dtype=torch.bool)
    attend[block.attention.choose(routing)[0]] = True
    assert torch.allclose(output[0, ~attend], alone[0, ~attend], atol=1e-10)
    assert (output[0, attend] - alone[0, attend]).abs().amax(1).min() > 1e-3


def test_balance_with_a_capacity_is_the_divergence_from_it(seeded):
    """The experts share what attends evenly; the last probability is not to attend."""
    routing = torch.randn(4, 9, 3, dtype=torch.float64).softmax(-1)
    wanted = torch.tensor([0.2, 0.2, 0.6], dtype=torch.float64)
    load = routing.mean((0, 1))
    expected = torch.nn.functional.kl_div(load.log(), wanted, reduction="sum") / 3
    assert torch.allclose(load_balancing_loss(routing, 0.4), expected)
    dense = load_balancing_loss(routing, 1.0)
    assert torch.allclose(dense, -(load[:2] * 2).log().mean() / 3)


@pytest.mark.parametrize("choice", ["pattern", "halves"])
def test_fixed_choices_serve_every_place_once_in_two_blocks(choice):
    model = VARIANTS[f"capacity, by {choice}"]()
    model.capacity = 0.5
    routing, blocks = torch.rand(2, 64, 2), model.blocks
    first, second = (block.attention.choose(routing) for block in blocks)
    assert torch.equal(first[0], first[1])
    assert sorted(first[0].tolist() + second[0].tolist()) == list(range(64))


@pytest.mark.parametrize("size", [(32, 32), (30, 45)])
def test_the_noisiest_attend(seeded, size):
    """The quarter of a ramp that has noise."""
    model = VARIANTS["capacity, by noise"]()
    high, wide = (n // 8 for n in size)  # in patches
    image = torch.linspace(0, 1, size[1]).expand(1, 3, *size).clone()
    image[..., : 4 * high, : 4 * wide] += 0.3 * torch.randn(3, 4 * high, 4 * wide)
    noisy = torch.zeros([math.ceil(n / 4) for n in size], dtype=torch.bool)
    noisy[:high, :wide] = True
    model.capacity = noisy.float().mean().item()
    _, routings = model(image)
    for block, routing in zip(model.blocks, routings, strict=True):
        chosen = block.attention.choose(routing)[0]
        assert sorted(chosen.tolist()) == noisy.flatten().nonzero().flatten().tolist()


def test_the_pattern_lies_evenly():
    """Half of the tokens are a checkerboard, a quarter every second one of every second row."""
    ranks = spread_ranks(64).view(8, 8)
    rows, columns = torch.arange(8).view(8, 1), torch.arange(8)
    assert torch.equal(ranks < 32, (rows + columns) % 2 == 0)
    assert torch.equal(ranks < 16, (rows % 2 == 0) & (columns % 2 == 0))
    assert sorted(spread_ranks(36).tolist()) == list(range(36))


def test_chance_draws_other_tokens_for_every_image_and_pass():
    layer = VARIANTS["capacity, by chance"]().blocks[0].attention
    routing = torch.rand(2, 64, 2)
    drawn = [sorted(places.tolist()) for _ in range(2) for places in layer.choose(routing)]
    assert len(set(map(tuple, drawn))) == 4


# Routers of the ablation study ---------------------------------------------------------------


def test_routers_that_learn_nothing():
    x = torch.randn(2, 64, 128)
    assert torch.equal(UniformRouter(4)(x), torch.full((2, 64, 4), 0.25))
    model = VARIANTS["uniform weights"]()
    assert not [n for n, _ in model.named_parameters() if "router" in n]
