"""Top-k attention of long sequences as Triton kernels whose memory grows with N, not with N².

Scores are computed tile by tile and never written to memory. Forward, a kernel finds the k-th
largest score of every row. It goes through the keys with the DEPTH largest scores so far of each of
a tile's columns: a new score sinks through those of its column, by a maximum and a minimum for
each, and nothing moves between threads. The k-th largest of all that the columns hold is that of
the row, unless a column holds larger ones only and may have lost some. Then another round goes
through the scores below these; about every 170 keys that are kept need one. The next kernel
computes softmax and values of what reaches the threshold. Backward has one kernel for the queries
and one for keys and values, as FlashAttention-2 (Dao 2023). Each of these three computes the scores
once, and none adds in an order that could change.

Exact, forward and backward; ties are kept as in `topk_attention.py`, whose results these are within
the rounding of float32. `topk_attention` uses it on a GPU if the environment has TOPK_KERNEL=long.
With TRITON_INTERPRET=1 it runs, slowly, on a CPU.
"""

import torch
import triton
import triton.language as tl

from experiment import topk_kernel
from experiment.topk_kernel import _in_one_layout, _new, _packed, _precision, _scores, _store, _tile

MOST_KEYS = 2**18  # places are counted in 32 bits
TILE = 64  # queries and keys of a tile
DEPTH = 8  # scores that a column keeps for a row; together they take half of the registers


def fits(query, key, value):
    """Whether `topk_attention_long` can do it: [B, H, N, d] of one dtype, N_k <= MOST_KEYS."""
    return topk_kernel.fits(query, key, value, MOST_KEYS) and query.shape[2] <= MOST_KEYS


def topk_attention_long(query, key, value, k_attend):
    """softmax over the k_attend largest of each row of query keyᵀ / √d_head, times value.

    Args:
        query: float32 or bfloat16 [B, H, N_q, d_head], d_head 16, 32 or 64; any strides.
        key, value: the same, [B, H, N_k, d_head], N_k at most MOST_KEYS.
        k_attend: keys kept per query, 1 to N_k; those that tie with the last are kept as well.

    Returns:
        [B, H, N_q, d_head], of the query's dtype.
    """
    return _TopKAttention.apply(query, key, value, k_attend)


class _TopKAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, k_attend):
        query, key, value, stride = _in_one_layout(query, key, value)
        batch, heads, queries, d_head = query.shape
        out = _new(query)
        threshold, best, log_sum = query.new_empty(3, batch, heads, queries, dtype=torch.float32)
        numbers = (stride, heads, queries, key.shape[2], d_head**-0.5)
        grid, options = (batch * heads, triton.cdiv(queries, TILE)), _options(key)
        # With 4 warps, as in the others, the lists would not fit into the registers.
        _thresholds[grid](
            *(query, key, threshold, best, k_attend, *numbers, DEPTH), **options, num_warps=8
        )
        _attend[grid](query, key, value, out, threshold, best, log_sum, *numbers, **options)
        ctx.numbers = numbers
        ctx.save_for_backward(query, key, value, out, threshold, log_sum)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        query, key, value, out, threshold, log_sum = ctx.saved_tensors
        grads = list(map(_new, (query, key, value)))
        mean = (grad.float() * out.float()).sum(-1).contiguous()  # [B, H, N_q]
        given = (query, key, value, _packed(grad), threshold, log_sum, mean)
        for kernel, results in ((_grad_of_queries, grads[:1]), (_grad_of_keys, grads[1:])):
            batch, heads, tokens, _ = results[0].shape
            grid = (batch * heads, triton.cdiv(tokens, TILE))
            kernel[grid](*given, *results, *ctx.numbers, **_options(key))
        return *grads, None


def _options(key):
    sizes = {"D": key.shape[3], "TILE": TILE, "PRECISION": _precision(key)}
    return sizes | {"num_stages": 2}  # the next tile is read meanwhile


@triton.jit
def _head(base, tokens, stride, heads, D: tl.constexpr):
    """Where the batch and head of this program begin in a tensor."""
    batch, head = (tl.program_id(0) // heads).to(tl.int64), tl.program_id(0) % heads
    return base + batch * tokens * stride + head * D


@triton.jit
def _number(ordered):
    """The inverse of `_ordered`."""
    bits = ordered.to(tl.int32, bitcast=True)
    return (bits ^ (~(bits >> 31) | -2147483648)).to(tl.float32, bitcast=True)


@triton.jit
def _largest(lists, wanted):
    """The largest number that at least `wanted` scores of a row in the lists reach: [TILE]."""
    reached = tl.zeros_like(wanted).to(tl.uint32)
    for bit in range(32):
        higher = reached | (1 << (31 - bit))
        number = _number(higher)[:, None]
        count = (lists[0] >= number).to(tl.int32)
        for place in tl.static_range(1, len(lists)):
            count += (lists[place] >= number).to(tl.int32)
        reached = tl.where(tl.sum(count, 1) >= wanted, higher, reached)
    return _number(reached)


@triton.jit
def _next(lists, numbers):
    """The largest score of a row in the lists below its number, or minus infinity: [TILE]."""
    below = tl.full(lists[0].shape, float("-inf"), tl.float32)
    for place in tl.static_range(len(lists)):
        lower = lists[place] < numbers[:, None]
        below = tl.maximum(below, tl.where(lower, lists[place], float("-inf")))
    return tl.max(below, 1)


@triton.jit
def _thresholds(
    Q, K, THRESHOLD, BEST, k_attend, stride, heads, queries, keys, scale,
    DEPTH: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(1) * TILE + tl.arange(0, TILE)
    q = _tile(_head(Q, queries, stride, heads, D), rows, stride, queries, D)
    K = _head(K, keys, stride, heads, D)
    nothing = tl.full([TILE, TILE], float("-inf"), tl.float32)
    ceiling = tl.full([TILE], float("inf"), tl.float32)  # a round takes the scores below it
    best = tl.full([TILE], float("-inf"), tl.float32)
    last, dropped = best, best  # the least score that is kept, the largest that is not
    unknown = tl.full([], 1, tl.int32)  # rows
    while unknown > 0:
        lists = (nothing,) * DEPTH  # the largest score of each column, the second, …
        above = tl.zeros([TILE, TILE], tl.int32)
        for start in range(0, keys, TILE):
            columns = start + tl.arange(0, TILE)
            k = _tile(K, columns, stride, keys, D)
            scores = _scores(q, k, scale, columns, keys, PRECISION)
            above += (scores >= ceiling[:, None]).to(tl.int32)
            sinking = tl.where(scores < ceiling[:, None], scores, float("-inf"))
            for place in tl.static_range(len(lists)):
                larger = tl.maximum(lists[place], sinking)
                sinking = tl.minimum(lists[place], sinking)
                lists = lists[:place] + (larger,) + lists[place + 1 :]  # noqa: RUF005 not in Triton
        best = tl.maximum(best, tl.max(lists[0], 1))
        wanted = k_attend - tl.sum(above, 1)
        last = tl.where(wanted > 0, _largest(lists, wanted), ceiling)
        dropped = _next(lists, last)
        full = tl.max(lists[len(lists) - 1], 1)  # all scores above this are in the lists
        known = (last > full) | (full == float("-inf"))
        ceiling = tl.where(known, ceiling, full)
        unknown = tl.sum(1 - known.to(tl.int32), 0)
    # In the middle between kept and dropped ones, where rounding cannot reach it, if there is a
    # number between them.
    middle = (last + dropped) / 2
    threshold = tl.where((middle > dropped) | (dropped == float("-inf")), middle, last)
    places = tl.program_id(0) * queries + rows
    tl.store(THRESHOLD + places, threshold, mask=rows < queries)
    tl.store(BEST + places, best, mask=rows < queries)


@triton.jit
def _attend(
    Q, K, V, OUT, THRESHOLD, BEST, LOG_SUM, stride, heads, queries, keys, scale,
    D: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(1) * TILE + tl.arange(0, TILE)
    q = _tile(_head(Q, queries, stride, heads, D), rows, stride, queries, D)
    K, V = _head(K, keys, stride, heads, D), _head(V, keys, stride, heads, D)
    places = tl.program_id(0) * queries + rows
    threshold = tl.load(THRESHOLD + places, mask=rows < queries, other=0.0)
    best = tl.load(BEST + places, mask=rows < queries, other=0.0)
    total = tl.zeros([TILE], tl.float32)
    out = tl.zeros([TILE, D], tl.float32)
    for start in range(0, keys, TILE):
        columns = start + tl.arange(0, TILE)
        k, v = _tile(K, columns, stride, keys, D), _tile(V, columns, stride, keys, D)
        scores = _scores(q, k, scale, columns, keys, PRECISION)
        weights = tl.where(scores >= threshold[:, None], tl.exp(scores - best[:, None]), 0.0)
        total += tl.sum(weights, 1)
        out += tl.dot(weights, v, input_precision=PRECISION)
    OUT = _head(OUT, queries, heads * D, heads, D)
    _store(OUT, rows, heads * D, queries, out / total[:, None], D)
    tl.store(LOG_SUM + places, best + tl.log(total), mask=rows < queries)


@triton.jit
def _of_queries(THRESHOLD, LOG_SUM, MEAN, rows, queries):
    """What the backward pass needs of rows [TILE, 1] or [1, TILE], in their shape."""
    places = tl.program_id(0) * queries + rows
    threshold = tl.load(THRESHOLD + places, mask=rows < queries, other=0.0)
    log_sum = tl.load(LOG_SUM + places, mask=rows < queries, other=0.0)
    return threshold, log_sum, tl.load(MEAN + places, mask=rows < queries, other=0.0)


@triton.jit
def _gradients(scores, grad_weights, of_queries, scale):
    """The weights of a tile and the gradient of its scores, which may lie either way."""
    threshold, log_sum, mean = of_queries
    weights = tl.where(scores >= threshold, tl.exp(scores - log_sum), 0.0)
    return weights, weights * (grad_weights - mean) * scale


@triton.jit
def _grad_of_queries(
    Q, K, V, GRAD, THRESHOLD, LOG_SUM, MEAN, GRAD_Q, stride, heads, queries, keys, scale,
    D: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(1) * TILE + tl.arange(0, TILE)
    q = _tile(_head(Q, queries, stride, heads, D), rows, stride, queries, D)
    grad = _tile(_head(GRAD, queries, heads * D, heads, D), rows, heads * D, queries, D)
    of_queries = _of_queries(THRESHOLD, LOG_SUM, MEAN, rows[:, None], queries)
    K, V = _head(K, keys, stride, heads, D), _head(V, keys, stride, heads, D)
    grad_q = tl.zeros([TILE, D], tl.float32)
    for start in range(0, keys, TILE):
        columns = start + tl.arange(0, TILE)
        k, v = _tile(K, columns, stride, keys, D), _tile(V, columns, stride, keys, D)
        scores = _scores(q, k, scale, columns, keys, PRECISION)
        grad_weights = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
        _, grad_scores = _gradients(scores, grad_weights, of_queries, scale)
        grad_q += tl.dot(grad_scores, k, input_precision=PRECISION)
    _store(_head(GRAD_Q, queries, heads * D, heads, D), rows, heads * D, queries, grad_q, D)


@triton.jit
def _grad_of_keys(
    Q, K, V, GRAD, THRESHOLD, LOG_SUM, MEAN, GRAD_K, GRAD_V, stride, heads, queries, keys, scale,
    D: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    k = _tile(_head(K, keys, stride, heads, D), columns, stride, keys, D)
    v = _tile(_head(V, keys, stride, heads, D), columns, stride, keys, D)
    Q, GRAD = _head(Q, queries, stride, heads, D), _head(GRAD, queries, heads * D, heads, D)
    grad_k = tl.zeros([TILE, D], tl.float32)
    grad_v = tl.zeros([TILE, D], tl.float32)
    for start in range(0, queries, TILE):
        rows = start + tl.arange(0, TILE)
        q = _tile(Q, rows, stride, queries, D)
        grad = _tile(GRAD, rows, heads * D, queries, D)
        of_queries = _of_queries(THRESHOLD, LOG_SUM, MEAN, rows[None, :], queries)
        scores = _scores(k, q, scale, rows, queries, PRECISION)  # [keys, queries]
        grad_weights = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
        weights, grad_scores = _gradients(scores, grad_weights, of_queries, scale)
        grad_v += tl.dot(weights, grad, input_precision=PRECISION)
        grad_k += tl.dot(grad_scores, q, input_precision=PRECISION)
    _store(_head(GRAD_K, keys, heads * D, heads, D), columns, heads * D, keys, grad_k, D)
    _store(_head(GRAD_V, keys, heads * D, heads, D), columns, heads * D, keys, grad_v, D)
