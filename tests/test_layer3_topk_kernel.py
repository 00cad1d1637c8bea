"""Layer 3, the Triton kernel: that it computes what topk_attention does.

On a CPU it is interpreted, see interpreter.py.
"""

import runpy

import pytest
import torch

from layers import topk_attention as door
from layers.topk_attention import topk_attention
from layers.topk_kernel import MOST_KEYS, fits, topk_attention_short

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def heads_of_one_projection(batch, heads, tokens, d_head, dtype=torch.float32):
    """Query, key and value as views of one tensor, as SparseAttentionExpert makes them."""
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(batch, tokens, 3, heads, d_head, generator=generator).to(DEVICE, dtype)
    return [t.transpose(1, 2).requires_grad_() for t in qkv.unbind(2)]


def random_qkv(queries, keys, heads=1):
    generator = torch.Generator().manual_seed(0)
    sizes = (queries, keys, keys)
    tensors = [torch.randn(1, heads, n, 16, generator=generator).to(DEVICE) for n in sizes]
    return [t.requires_grad_() for t in tensors]


def largest_error(query, key, value, k_attend):
    """Largest deviation from float64 of the result and the three gradients, or NaN."""
    assert fits(query, key, value)
    exact = [t.detach().double().requires_grad_() for t in (query, key, value)]
    result = topk_attention_short(query, key, value, k_attend)
    assert result.dtype == query.dtype
    expected = topk_attention(*exact, k_attend)
    direction = torch.randn(result.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    result.backward(direction.to(result.dtype))
    expected.backward(direction.double())
    pairs = [(result, expected)]
    pairs += [(t.grad, e.grad) for t, e in zip((query, key, value), exact, strict=True)]
    return torch.stack([(t.double() - e).abs().max() for t, e in pairs]).max().item()


@pytest.mark.parametrize(
    ("k_attend", "d_head"), [(1, 32), (7, 32), (63, 32), (64, 32), (100, 32), (7, 64)]
)
def test_kernel_is_exact_forward_and_backward(k_attend, d_head):
    tensors = heads_of_one_projection(2, 2, 64, d_head)
    assert largest_error(*tensors, k_attend) < 5e-6


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (3, 5), (50, 37), (100, 60)])
def test_kernel_takes_odd_numbers_of_queries_and_keys(queries, keys):
    assert largest_error(*random_qkv(queries, keys, heads=2), max(1, keys // 3)) < 5e-6


def test_kernel_keeps_all_keys_that_tie_with_the_last():
    query, key, value = heads_of_one_projection(1, 2, 64, 32)
    with torch.no_grad():
        key[:, :, 1::2] = key[:, :, ::2]  # every score twice: the 7th ties with the 8th
    assert largest_error(query, key, value, 7) < 5e-6


@pytest.mark.parametrize(("other", "kept"), [(0.0, [0, 1, 0]), (2.0, [1, 0, 0])])
def test_kernel_drops_a_key_that_is_a_rounding_below_the_last(other, kept):
    query, value = torch.zeros(1, 1, 1, 16), torch.ones(1, 1, 3, 16)
    key = torch.zeros(1, 1, 3, 16)
    query[..., 0], key[0, 0, :, 0] = 4, torch.tensor([1.0, 1.0, -1.0])
    key[0, 0, 0, 0] = torch.nextafter(torch.tensor(1.0), torch.tensor(other))
    tensors = [t.to(DEVICE).requires_grad_() for t in (query, key, value)]
    topk_attention_short(*tensors, 1).sum().backward()
    assert tensors[2].grad[0, 0, :, 0].tolist() == kept


def test_kernel_holds_minus_zero_and_zero_for_a_tie():
    query, value = torch.zeros(1, 1, 1, 16), torch.arange(16.0).view(1, 1, 1, 16)
    value = torch.cat([value, value + 1], 2)
    key = torch.tensor([0.0, -1.0]).view(1, 1, 2, 1).expand(1, 1, 2, 16).contiguous()
    query[..., 0] = -0.0
    result = topk_attention_short(*(t.to(DEVICE) for t in (query, key, value)), 1)
    assert torch.equal(result.cpu(), value.mean(2, keepdim=True))


def test_kernel_rounds_to_bfloat16():
    tensors = heads_of_one_projection(1, 2, 64, 32, torch.bfloat16)
    assert largest_error(*tensors, 32) < 0.1


def test_kernel_leaves_to_others_what_it_cannot_do():
    def tensors(keys=8, d_head=16, dtype=torch.float32):
        return [torch.zeros(1, 1, n, d_head, dtype=dtype) for n in (8, keys, keys)]

    assert fits(*tensors())
    assert not fits(*tensors(keys=MOST_KEYS + 1))
    assert not fits(*tensors(d_head=24))
    assert not fits(*tensors(dtype=torch.float64))
    assert not fits(*(t[0] for t in tensors()))
    assert not fits(*tensors()[:2], torch.zeros(1, 1, 8, 32))
    assert not fits(*tensors(keys=0))
    for others in (torch.zeros(2, 1, 8, 16), torch.zeros(1, 2, 8, 16), torch.zeros(1, 1, 8, 32)):
        assert not fits(torch.zeros(1, 1, 8, 16), others, others)


def test_kernel_puts_the_threshold_where_rounding_cannot_reach_it():
    """Between kept and dropped scores, or below all of them where there are no dropped ones."""
    query, key, value = random_qkv(3, 60)
    scores = (query @ key.transpose(2, 3) / 4).topk(9).values
    threshold = topk_attention_short(query, key, value, 8).grad_fn.saved_tensors[4]
    assert ((scores[..., 8] < threshold) & (threshold < scores[..., 7])).all()
    same = key[:, :, :1].round().expand_as(key)  # whole numbers: sums in any order are the same
    threshold = topk_attention_short(query.round(), same, value, 8).grad_fn.saved_tensors[4]
    assert (threshold == float("-inf")).all()


@pytest.mark.parametrize(("environment", "used"), [("1", True), ("0", False)])
def test_environment_switches_the_kernel_off(monkeypatch, environment, used):
    class OnCuda(torch.Tensor):
        is_cuda = True

    monkeypatch.setenv("TOPK_KERNEL", environment)
    kernel_fits = runpy.run_path(door.__file__)["kernel_fits"]
    for tokens, fitting in ((MOST_KEYS, True), (MOST_KEYS + 1, False)):
        tensors = [torch.zeros(1, 1, tokens, 16).as_subclass(OnCuda)] * 3
        assert kernel_fits(*tensors) is (used and fitting)
        assert not kernel_fits(*(t.as_subclass(torch.Tensor) for t in tensors))
