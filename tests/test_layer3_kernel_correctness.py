"""Layer 3: sparse attention against a plain loop in float64, its edges and its gradients."""

import pytest
import torch
import torch.nn.functional as F

from adaptive_attention_moe import AdaptiveAttentionMoE
from conftest import Recorder
from layers import topk_attention as door
from layers.conv_stages import NAFBlock
from layers.topk_attention import TIES, topk_attention
from studies.reference import gather_attention, straightforward_expert, straightforward_moe


def loop_attention(query, key, value, k_attend):
    """The definition, one query at a time: query [N, d], key [M, d], value [M, d_v] -> [N, d_v]."""
    rows = []
    for q in query:
        scores = torch.stack([q @ k for k in key]) / len(q) ** 0.5
        kept = sorted(range(len(key)), key=lambda j: -scores[j])[:k_attend]
        weights = torch.softmax(scores[kept], 0)
        rows.append(sum(w * value[j] for w, j in zip(weights, kept, strict=True)))
    return torch.stack(rows)


def random_qkv(*shape, requires_grad=False):
    return [torch.randn(*shape, dtype=torch.float64, requires_grad=requires_grad) for _ in "qkv"]


def attended_with_gradients(inputs, k_attend):
    """The result of topk_attention and, for some direction of it, the gradients of the inputs."""
    attended = topk_attention(*inputs, k_attend)
    generator = torch.Generator().manual_seed(1)
    direction = torch.randn(attended.shape, dtype=torch.float64, generator=generator)
    return attended, *torch.autograd.grad(attended, inputs, direction)


def assert_all_close(found, expected, atol=1e-12):
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, atol=atol)


@pytest.mark.parametrize("k_attend", [1, 2, 5, 9, 10, 11, 1000])
def test_against_a_plain_loop(seeded, k_attend):
    query, key, value = random_qkv(10, 6)
    expected = loop_attention(query, key, value, k_attend)
    assert torch.allclose(topk_attention(query, key, value, k_attend), expected, atol=1e-12)


def test_every_batch_and_head_selects_for_itself(seeded):
    query, key, value = random_qkv(2, 3, 10, 6)
    output = topk_attention(query, key, value, 4)
    for b in range(2):
        for h in range(3):
            expected = loop_attention(query[b, h], key[b, h], value[b, h], 4)
            assert torch.allclose(output[b, h], expected, atol=1e-12)


def test_the_oracle_agrees_with_the_loop(seeded):
    query, key, value = random_qkv(10, 6)
    for k_attend in (1, 4, 10):
        assert torch.allclose(
            gather_attention(query, key, value, k_attend),
            loop_attention(query, key, value, k_attend),
            atol=1e-12,
        )


def test_ties_at_the_edge_are_kept_together():
    """Scores 2, 1, 1, 0 with k = 2: both keys of score 1 stay, whatever their order."""
    query = torch.ones(1, 1, dtype=torch.float64)
    key = torch.tensor([[2.0], [1.0], [1.0], [0.0]], dtype=torch.float64)
    weights = topk_attention(query, key, torch.eye(4, dtype=torch.float64), 2)
    expected = torch.softmax(torch.tensor([2.0, 1.0, 1.0], dtype=torch.float64), 0)
    assert torch.allclose(weights[0, :3], expected)
    assert weights[0, 3] == 0


@pytest.mark.parametrize("k_attend", [1, 3, 6])
def test_gradcheck(seeded, k_attend):
    inputs = random_qkv(2, 6, 4, requires_grad=True)
    assert torch.autograd.gradcheck(lambda q, k, v: topk_attention(q, k, v, k_attend), inputs)


@pytest.mark.parametrize("max_scores", [1, 4 * 2 * 3 * 10])
def test_blocks_of_queries_change_nothing(seeded, monkeypatch, max_scores):
    """One query at a time, and four of ten: output and gradients of the undivided path."""
    inputs = random_qkv(2, 3, 10, 6, requires_grad=True)
    undivided = attended_with_gradients(inputs, 4)
    monkeypatch.setattr(door, "MAX_SCORES", max_scores)
    assert_all_close(attended_with_gradients(inputs, 4), undivided)


def test_blocks_are_made_of_queries_and_all_keys(seeded, monkeypatch):
    """Few queries and many keys: a block holds MAX_SCORES / keys of the former."""
    query, key, value = random_qkv(1, 4, 6)[0], *random_qkv(1, 40, 6)[1:]
    undivided = topk_attention(query, key, value, 7)
    monkeypatch.setattr(door, "MAX_SCORES", 2 * 40)
    with Recorder() as recorder:
        blocked = topk_attention(query, key, value, 7)
    assert recorder.calls["topk"] == 2
    assert torch.allclose(blocked, undivided, atol=1e-12)


def with_ties(inputs, copies):
    """Some of the keys several times over: every query has that many equal scores."""
    query, key, value = (t.detach().clone() for t in inputs)
    key[..., :copies, :] = 30 * query.mean(-2, keepdim=True)  # the best of many
    return [t.requires_grad_() for t in (query, key, value)]


@pytest.mark.parametrize("copies", [0, 2, TIES, 3 * TIES])
@pytest.mark.parametrize("k_attend", [1, 4])
def test_sparse_path_changes_nothing(seeded, monkeypatch, k_attend, copies):
    """Few keys out of many: output and gradients of the masked path, also where keys tie."""
    inputs = with_ties(random_qkv(2, 3, 64, 6), copies)
    masked = attended_with_gradients(inputs, k_attend)
    monkeypatch.setattr(door, "MAX_SCORES", 5 * 2 * 3 * 64)
    with Recorder() as recorder:
        sparse = attended_with_gradients(inputs, k_attend)
    assert (recorder.calls["masked_fill_"] > 0) == (copies > TIES)  # else the sparse path did it
    assert_all_close(sparse, masked)


def test_sparse_path_leaves_too_many_ties_to_the_masked_one(seeded, monkeypatch):
    monkeypatch.setattr(door, "MAX_SCORES", 64)
    query, key, value = random_qkv(64, 4)
    with Recorder() as recorder:
        uniform = topk_attention(query, torch.zeros_like(key), value, 2)
    assert recorder.calls["masked_fill_"] == 64
    assert torch.allclose(uniform, value.mean(0).expand_as(uniform))


def test_gradcheck_of_the_sparse_path(seeded, monkeypatch):
    monkeypatch.setattr(door, "MAX_SCORES", 100)
    query = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    key, value = random_qkv(2, 40, 4, requires_grad=True)[1:]
    assert torch.autograd.gradcheck(lambda *qkv: topk_attention(*qkv, 2), (query, key, value))


def test_permutation_equivariance(moe):
    """The layer knows no positions: permuted tokens give the permuted output."""
    x = torch.randn(2, 16, 24, dtype=torch.float64)
    order = torch.randperm(16)
    output, routing = moe(x)
    permuted, permuted_routing = moe(x[:, order])
    assert torch.allclose(permuted, output[:, order], atol=1e-12)
    assert torch.allclose(permuted_routing, routing[:, order], atol=1e-12)


@pytest.mark.parametrize(
    "budgets", [(4, 16, 32), (32, 16, 4), (16, 16), (5,), (3, 99, 3, 50)], ids=str
)
def test_layer_against_the_straightforward_one(seeded, budgets):
    """Fused projections and masked scores change nothing, gradients included."""
    layer = AdaptiveAttentionMoE(24, 3, budgets).double()
    x = torch.randn(2, 16, 24, dtype=torch.float64, requires_grad=True)
    (fast, _), (slow, _) = layer(x), straightforward_moe(layer, x)
    assert torch.allclose(fast, slow, atol=1e-12)
    direction, inputs = torch.randn_like(fast), (x, *layer.parameters())
    gradients = [torch.autograd.grad(output, inputs, direction) for output in (fast, slow)]
    assert_all_close(*gradients, atol=1e-10)


@pytest.mark.parametrize("capacity", [0.1, 0.5, 1.0])
def test_gathered_tokens_are_the_masked_ones(seeded, capacity):
    """Computing the chosen tokens alone equals computing all of them, forward and backward."""
    moe = AdaptiveAttentionMoE(24, 3, (4, 16), capacity).double()
    x = torch.randn(3, 16, 24, dtype=torch.float64, requires_grad=True)
    output, routing = moe(x)
    places = moe.choose(routing)[..., None]
    chosen = torch.zeros(3, 16, 1, dtype=torch.float64).scatter(1, places, 1)
    experts = [straightforward_expert(expert, x) for expert in moe.experts]
    weights = moe.router(x)[..., :-1].unsqueeze(-1).unbind(2)
    masked = chosen * moe.merge(sum(p * y for p, y in zip(weights, experts, strict=True)))
    assert torch.allclose(output, masked, atol=1e-12)
    direction, inputs = torch.randn_like(output), (x, *moe.parameters())
    gradients = [torch.autograd.grad(y, inputs, direction) for y in (output, masked)]
    assert_all_close(*gradients, atol=1e-10)


def test_default_layer_in_float32(seeded):
    """1e-5 against the oracle wherever rounding did not exchange two keys at the edge."""
    layer, x = AdaptiveAttentionMoE(), torch.randn(4, 64, 128)
    with torch.no_grad():
        error = (layer(x)[0] - straightforward_moe(layer, x)[0]).abs().amax(-1)
    assert (error < 1e-5).double().mean() > 0.99


def test_queries_and_keys_of_different_number(seeded):
    query, key, value = torch.randn(3, 4), torch.randn(9, 4), torch.randn(9, 2)
    expected = loop_attention(query, key, value, 5)
    assert torch.allclose(topk_attention(query, key, value, 5), expected, atol=1e-6)


def test_naf_block_against_its_definition(seeded):
    block = NAFBlock(3).double()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_()
    image = torch.randn(3, 4, 5, dtype=torch.float64)

    def norm(layer, x):
        x = (x - x.mean(0)) / (x.var(0, unbiased=False) + layer.eps).sqrt()
        return layer.weight[:, None, None] * x + layer.bias[:, None, None]

    def pointwise(layer, x):
        return torch.einsum("oi,ihw->ohw", layer.weight[:, :, 0, 0], x)

    def depthwise(layer, x):
        padded = F.pad(x, (1, 1, 1, 1))
        shifts = [
            (dy, dx, padded[:, dy : dy + 4, dx : dx + 5]) for dy in range(3) for dx in range(3)
        ]
        total = sum(layer.weight[:, 0, dy, dx, None, None] * part for dy, dx, part in shifts)
        return total + layer.bias[:, None, None]

    h = depthwise(block.depthwise, pointwise(block.widen, norm(block.norm1, image)))
    h = h[:3] * h[3:]
    expected = image + pointwise(block.project, h)
    h = pointwise(block.ffn[0], norm(block.norm2, expected))
    expected = expected + pointwise(block.ffn[1], h[:3] * h[3:])
    for layout in (torch.contiguous_format, torch.channels_last):
        output = block(image[None].contiguous(memory_format=layout))
        assert torch.allclose(output[0], expected, atol=1e-12)
        assert output.is_contiguous(memory_format=layout)
