"""Layer 3, the Triton kernels: that they compute what topk_attention does.

On a CPU it is interpreted, see interpreter.py.
"""

import importlib.util

import pytest
import torch
from test_layer3_kernel_correctness import loop_attention

import topk_attention as door
from experiment.topk_kernel import MOST_KEYS, fits, topk_attention_short
from topk_attention import topk_attention

long = pytest.importorskip("experiment.topk_kernel_long")  # not without Triton
topk_attention_long = long.topk_attention_long
BOTH = (topk_attention_short, topk_attention_long)
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


def largest_error(query, key, value, k_attend, attend=topk_attention_short):
    """Largest deviation from float64 of the result and the three gradients, or NaN."""
    assert (fits if attend is topk_attention_short else long.fits)(query, key, value)
    exact = [t.detach().double().requires_grad_() for t in (query, key, value)]
    result = attend(query, key, value, k_attend)
    assert result.dtype == query.dtype
    expected = topk_attention(*exact, k_attend)
    direction = torch.randn(result.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    result.backward(direction.to(result.dtype))
    expected.backward(direction.double())
    pairs = [(result, expected)]
    pairs += [(t.grad, e.grad) for t, e in zip((query, key, value), exact, strict=True)]
    return torch.stack([(t.double() - e).abs().max() for t, e in pairs]).max().item()


@pytest.mark.parametrize("k_attend", [1, 7, 32, 63, 64, 100])
@pytest.mark.parametrize("d_head", [32, 64])
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


@pytest.mark.parametrize("attend", BOTH)
@pytest.mark.parametrize(("other", "kept"), [(0.0, [0, 1, 0]), (2.0, [1, 0, 0])])
def test_kernel_drops_a_key_that_is_a_rounding_below_the_last(attend, other, kept):
    query, value = torch.zeros(1, 1, 1, 16), torch.ones(1, 1, 3, 16)
    key = torch.zeros(1, 1, 3, 16)
    query[..., 0], key[0, 0, :, 0] = 4, torch.tensor([1.0, 1.0, -1.0])
    key[0, 0, 0, 0] = torch.nextafter(torch.tensor(1.0), torch.tensor(other))
    tensors = [t.to(DEVICE).requires_grad_() for t in (query, key, value)]
    attend(*tensors, 1).sum().backward()
    assert tensors[2].grad[0, 0, :, 0].tolist() == kept


@pytest.mark.parametrize("attend", BOTH)
def test_kernel_holds_minus_zero_and_zero_for_a_tie(attend):
    query, value = torch.zeros(1, 1, 1, 16), torch.arange(16.0).view(1, 1, 1, 16)
    value = torch.cat([value, value + 1], 2)
    key = torch.tensor([0.0, -1.0]).view(1, 1, 2, 1).expand(1, 1, 2, 16).contiguous()
    query[..., 0] = -0.0
    result = attend(*(t.to(DEVICE) for t in (query, key, value)), 1)
    assert torch.equal(result.cpu(), value.mean(2, keepdim=True))


@pytest.mark.parametrize("attend", BOTH)
def test_kernel_rounds_to_bfloat16(attend):
    tensors = heads_of_one_projection(1, 2, 64, 32, torch.bfloat16)
    assert largest_error(*tensors, 32, attend) < 0.1


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


def test_attention_works_without_the_kernel(monkeypatch):
    tensors = [t.detach() for t in heads_of_one_projection(1, 2, 64, 32)]
    expected = topk_attention(*tensors, 8)
    monkeypatch.setattr(door, "topk_kernel", None)
    assert torch.allclose(topk_attention(*tensors, 8), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("d_head", "tokens", "k_attend"), [(16, 100, 1), (32, 65, 64), (64, 70, 20)]
)
def test_long_kernel_is_exact_forward_and_backward(d_head, tokens, k_attend):
    tensors = heads_of_one_projection(1, 1, tokens, d_head)
    assert largest_error(*tensors, k_attend, topk_attention_long) < 5e-6


@pytest.mark.parametrize(("queries", "keys", "k_attend"), [(1, 2, 1), (3, 129, 128), (70, 67, 30)])
def test_long_kernel_takes_odd_numbers_of_queries_and_keys(queries, keys, k_attend):
    assert largest_error(*random_qkv(queries, keys), k_attend, topk_attention_long) < 5e-6


def test_long_kernel_against_a_plain_loop():
    tensors = random_qkv(5, 150)
    exact = [t.detach().cpu().double().requires_grad_() for t in tensors]
    result = topk_attention_long(*tensors, 20)
    heads = zip(*(t[0] for t in exact), strict=True)
    expected = torch.stack([loop_attention(*head, 20) for head in heads])
    assert torch.allclose(result[0].cpu().double(), expected, atol=5e-6)
    result.square().sum().backward()
    expected.square().sum().backward()
    for t, e in zip(tensors, exact, strict=True):
        assert torch.allclose(t.grad.cpu().double(), e.grad, atol=5e-6)


def test_long_kernel_selects_for_the_chosen_tokens():
    """Queries of some tokens, keys and values of all: their strides differ."""
    query = heads_of_one_projection(2, 2, 37, 16)[0]
    _, key, value = heads_of_one_projection(2, 2, 90, 16)
    assert largest_error(query, key, value, 9, topk_attention_long) < 5e-6


def test_long_kernel_keeps_keys_of_other_tiles_that_tie_with_the_last():
    query, key, value = random_qkv(20, 192)
    with torch.no_grad():
        key[:, :, 100:] = key[:, :, :92]
    assert largest_error(query, key, value, 7, topk_attention_long) < 5e-6


@pytest.mark.parametrize(("groups", "k_attend"), [(1, 5), (25, 20), (25, 639)])
def test_long_kernel_keeps_any_number_of_ties(groups, k_attend):
    """All keys the same, or the same 25 again and again."""
    query, key, value = random_qkv(3, 640)
    with torch.no_grad():
        key.copy_(key[:, :, torch.arange(640, device=DEVICE) % groups])
    assert largest_error(query, key, value, k_attend, topk_attention_long) < 5e-6


@pytest.mark.parametrize("k_attend", [8, 30])
def test_long_kernel_finds_the_best_where_they_share_a_column(k_attend):
    """The 18 best of a row are 64 keys apart; a column holds 8 of them at a time."""
    query, key, value = random_qkv(3, 18 * 64)
    with torch.no_grad():
        key[:, :, ::64] = 0.1 * key[:, :, ::64] + query.sum(2, keepdim=True)
    assert largest_error(query, key, value, k_attend, topk_attention_long) < 5e-6


@pytest.mark.parametrize(("attend", "keys"), list(zip(BOTH, (60, 100), strict=True)))
def test_kernel_puts_the_threshold_where_rounding_cannot_reach_it(attend, keys):
    """Between kept and dropped scores, or below all of them where there are no dropped ones."""
    query, key, value = random_qkv(3, keys)
    scores = (query @ key.transpose(2, 3) / 4).topk(9).values
    threshold = attend(query, key, value, 8).grad_fn.saved_tensors[4]
    assert ((scores[..., 8] < threshold) & (threshold < scores[..., 7])).all()
    same = key[:, :, :1].expand_as(key)
    threshold = attend(query, same, value, 8).grad_fn.saved_tensors[4]
    assert (threshold == float("-inf")).all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_long_kernel_knows_no_scores_beyond_the_last_key():
    """Scores of -400: a key that is not there would have a score of 0."""
    query, key, value = (t.detach() for t in random_qkv(3, 70))
    query, key = query.abs() + 10, -(key.abs() + 10)
    tensors = [t.requires_grad_() for t in (query, key, value)]
    assert largest_error(*tensors, 5, topk_attention_long) < 1e-3


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_long_kernel_ends_where_there_are_no_numbers():
    query, key, value = random_qkv(3, 100)
    with torch.no_grad():
        query[0, 0, 0] = float("nan")
    result = topk_attention_long(query, key, value, 20)
    assert result[0, 0, 0].isnan().all() and result[0, 0, 1:].isfinite().all()


def test_long_kernel_gives_the_same_bits_every_time():
    def run():
        tensors = random_qkv(70, 150)
        result = topk_attention_long(*tensors, 30)
        return [result, *torch.autograd.grad(result.square().sum(), tensors)]

    for one, other in zip(run(), run(), strict=True):
        assert torch.equal(one, other)


def test_long_kernel_leaves_to_others_what_it_cannot_do():
    def tensors(queries, keys, d_head=16):
        return [torch.zeros(1, 1, 1, d_head).expand(1, 1, n, -1) for n in (queries, keys, keys)]

    assert long.fits(*tensors(8, long.MOST_KEYS))
    assert not long.fits(*tensors(8, long.MOST_KEYS + 1))
    assert not long.fits(*tensors(long.MOST_KEYS + 1, 8))
    assert not long.fits(*tensors(8, 100, d_head=24))


@pytest.mark.parametrize(
    ("environment", "expected"),
    [(None, (True, False)), ("0", (False, False)), ("long", (True, True))],
)
def test_environment_chooses_the_kernels(monkeypatch, environment, expected):
    class OnCuda(torch.Tensor):
        is_cuda = True

    if environment is None:
        monkeypatch.delenv("TOPK_KERNEL", raising=False)
    else:
        monkeypatch.setenv("TOPK_KERNEL", environment)
    specification = importlib.util.spec_from_file_location("another_door", door.__file__)
    fresh = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(fresh)
    for tokens, kernel, used in zip((MOST_KEYS, MOST_KEYS + 1), BOTH, expected, strict=True):
        tensors = [torch.zeros(1, 1, tokens, 16).as_subclass(OnCuda)] * 3
        assert fresh.kernel_for(*tensors) is (kernel if used else None)
        assert fresh.kernel_for(*(t.as_subclass(torch.Tensor) for t in tensors)) is None
