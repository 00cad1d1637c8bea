"""Top-k attention of short sequences as one Triton kernel: scores, selection, softmax and values.

Whole rows of scores stay in registers, so that nothing of [N_q, N_k] is written to memory. The
results are those of `topk_attention.py` within the rounding of float32, forward and backward, ties
included. With TRITON_INTERPRET=1 it runs, slowly, on a CPU.
"""

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # it exists for Linux and for GPUs alone
    triton = None

MOST_KEYS = 64  # with 256, registers and shared memory do not hold what the backward pass needs
ROWS = 32  # queries of a block


def fits(query, key, value):
    """Whether the kernel can do it: [B, H, N, d] of one dtype, N_k <= MOST_KEYS, and Triton."""
    return (
        triton is not None
        and query.ndim == key.ndim == 4
        and key.shape == value.shape
        and query.dtype == key.dtype == value.dtype in (torch.float32, torch.bfloat16)
        and query.shape[:2] == key.shape[:2]
        and query.shape[3] == key.shape[3] in (16, 32, 64)
        and 1 <= key.shape[2] <= MOST_KEYS
        and query.numel() > 0
    )


def topk_attention_short(query, key, value, k_attend):
    """As `topk_attention.topk_attention`, of what `fits`, with any strides."""
    return _TopKAttention.apply(query, key, value, k_attend)


class _TopKAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, k_attend):
        query, key, value, stride = _in_one_layout(query, key, value)
        batch, heads, queries, d_head = query.shape
        out = _new(query)
        threshold = query.new_empty(batch, heads, queries, dtype=torch.float32)
        log_sum = torch.empty_like(threshold)
        tensors = (query, key, value, out, threshold, log_sum)
        ctx.counts = (stride, heads, queries, key.shape[2])
        _forward[(batch * heads, triton.cdiv(queries, ROWS))](
            *tensors, *ctx.counts, k_attend, d_head**-0.5, **_sizes(key)
        )
        ctx.save_for_backward(*tensors)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        query, key, value, out, threshold, log_sum = ctx.saved_tensors
        grads = list(map(_new, (query, key, value)))
        tensors = (query, key, value, out, _packed(grad), *grads, threshold, log_sum)
        batch, heads, _, d_head = query.shape
        _backward[(batch * heads,)](*tensors, *ctx.counts, d_head**-0.5, **_sizes(key))
        return *grads, None


def _new(t):
    """Like t, without values, and packed."""
    batch, heads, tokens, d_head = t.shape
    return t.new_empty(batch, tokens, heads, d_head).transpose(1, 2)


def _packed(t):
    """[B, H, N, d] that lies in memory as [B, N, H, d], in which heads are put together."""
    return t.transpose(1, 2).contiguous().transpose(1, 2)


def _in_one_layout(*tensors):
    """The tensors and the stride of their tokens: views of one projection stay as they are."""
    strides = {t.stride(2) for t in tensors}
    for t in tensors:
        _, heads, tokens, d_head = t.shape
        (step,) = strides if len(strides) == 1 else (0,)
        if t.stride() != (tokens * step, d_head, step, 1) or step < heads * d_head:
            return *map(_packed, tensors), heads * d_head
    return *tensors, step


def _sizes(key):
    keys = max(16, triton.next_power_of_2(key.shape[2]))
    # TF32 holds every bfloat16; three products of it are as exact as float32.
    precision = "tf32" if key.dtype == torch.bfloat16 else "tf32x3"
    sizes = {"D": key.shape[3], "KEYS": keys, "ROWS": ROWS, "PRECISION": precision}
    return sizes | {"num_stages": 1}  # more would take more shared memory than there is


if triton is not None:

    @triton.jit
    def _ordered(x):
        """float32 as unsigned integers of the same order, in which -0 is 0."""
        bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
        return (bits ^ ((bits >> 31) | -2147483648)).to(tl.uint32, bitcast=True)

    @triton.jit
    def _scores(q, k, scale, columns, keys, PRECISION: tl.constexpr):
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        return tl.where(columns[None, :] < keys, scores, float("-inf"))

    @triton.jit
    def _tile(base, tokens, stride, count, D: tl.constexpr):
        """Rows [tokens, D] of one head, zero from `count` on."""
        places = base + tokens[:, None] * stride + tl.arange(0, D)[None, :]
        return tl.load(places, mask=tokens[:, None] < count, other=0.0).to(tl.float32)

    @triton.jit
    def _store(base, tokens, stride, count, values, D: tl.constexpr):
        places = base + tokens[:, None] * stride + tl.arange(0, D)[None, :]
        tl.store(places, values.to(base.dtype.element_ty), mask=tokens[:, None] < count)

    @triton.jit
    def _forward(
        Q, K, V, OUT, THRESHOLD, LOG_SUM, stride, heads, queries, keys, k_attend, scale,
        D: tl.constexpr, KEYS: tl.constexpr, ROWS: tl.constexpr, PRECISION: tl.constexpr,
    ):  # fmt: skip
        batch, head = (tl.program_id(0) // heads).to(tl.int64), tl.program_id(0) % heads
        rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
        columns = tl.arange(0, KEYS)
        q = _tile(Q + batch * queries * stride + head * D, rows, stride, queries, D)
        k = _tile(K + batch * keys * stride + head * D, columns, stride, keys, D)
        v = _tile(V + batch * keys * stride + head * D, columns, stride, keys, D)
        scores = _scores(q, k, scale, columns, keys, PRECISION)  # [ROWS, KEYS]

        # The largest number that at least k_attend scores reach is the k_attend-th of them: it is
        # found bit by bit.
        ordered = _ordered(scores)
        reached = tl.zeros([ROWS], tl.uint32)
        for bit in tl.static_range(32):
            higher = reached | (1 << (31 - bit))
            enough = tl.sum((ordered >= higher[:, None]).to(tl.int32), 1) >= k_attend
            reached = tl.where(enough, higher, reached)
        kept = ordered >= reached[:, None]
        # In the middle between kept and dropped ones, where rounding cannot reach it, if there is
        # a number between them; below all of them where none is dropped.
        least = tl.min(tl.where(kept, scores, float("inf")), 1)
        dropped = tl.max(tl.where(kept, float("-inf"), scores), 1)
        middle = (least + dropped) / 2
        threshold = tl.where((middle > dropped) | (dropped == float("-inf")), middle, least)

        best = tl.max(scores, 1)
        weights = tl.where(kept, tl.exp(scores - best[:, None]), 0.0)
        total = tl.sum(weights, 1)
        out = tl.dot(weights / total[:, None], v, input_precision=PRECISION)
        _store(OUT + (batch * queries * heads + head) * D, rows, heads * D, queries, out, D)
        places = tl.program_id(0) * queries + rows
        tl.store(THRESHOLD + places, threshold, mask=rows < queries)
        tl.store(LOG_SUM + places, best + tl.log(total), mask=rows < queries)

    @triton.jit
    def _backward(
        Q, K, V, OUT, GRAD, GRAD_Q, GRAD_K, GRAD_V, THRESHOLD, LOG_SUM,
        stride, heads, queries, keys, scale,
        D: tl.constexpr, KEYS: tl.constexpr, ROWS: tl.constexpr, PRECISION: tl.constexpr,
    ):  # fmt: skip
        batch, head = (tl.program_id(0) // heads).to(tl.int64), tl.program_id(0) % heads
        columns = tl.arange(0, KEYS)
        k = _tile(K + batch * keys * stride + head * D, columns, stride, keys, D)
        v = _tile(V + batch * keys * stride + head * D, columns, stride, keys, D)
        of_queries = (batch * queries * heads + head) * D
        of_keys = (batch * keys * heads + head) * D
        grad_k = tl.zeros([KEYS, D], tl.float32)
        grad_v = tl.zeros([KEYS, D], tl.float32)
        for start in range(0, queries, ROWS):
            rows = start + tl.arange(0, ROWS)
            q = _tile(Q + batch * queries * stride + head * D, rows, stride, queries, D)
            grad = _tile(GRAD + of_queries, rows, heads * D, queries, D)
            out = _tile(OUT + of_queries, rows, heads * D, queries, D)
            places = tl.program_id(0) * queries + rows
            threshold = tl.load(THRESHOLD + places, mask=rows < queries, other=float("inf"))
            log_sum = tl.load(LOG_SUM + places, mask=rows < queries, other=0.0)
            scores = _scores(q, k, scale, columns, keys, PRECISION)
            kept = scores >= threshold[:, None]
            weights = tl.where(kept, tl.exp(scores - log_sum[:, None]), 0.0)
            grad_v += tl.dot(tl.trans(weights), grad, input_precision=PRECISION)
            grad_weights = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
            mean = tl.sum(grad * out, 1)
            grad_scores = weights * (grad_weights - mean[:, None]) * scale
            grad_q = tl.dot(grad_scores, k, input_precision=PRECISION)
            _store(GRAD_Q + of_queries, rows, heads * D, queries, grad_q, D)
            grad_k += tl.dot(tl.trans(grad_scores), q, input_precision=PRECISION)
        _store(GRAD_K + of_keys, columns, heads * D, keys, grad_k, D)
        _store(GRAD_V + of_keys, columns, heads * D, keys, grad_v, D)
