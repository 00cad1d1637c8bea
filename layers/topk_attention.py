"""Exact top-k attention, for short and for long sequences, and the ways to compute it."""

import os

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from layers import topk_kernel

USE_KERNEL = os.environ.get("TOPK_KERNEL") != "0"  # 0 switches the kernel for GPUs off
# Scores held at a time, 64 MiB in float32: longer sequences are processed in blocks of queries.
MAX_SCORES = 2**24
# Among such sequences, with this many times more keys than are kept, reading the kept ones alone
# beats matrix products.
SPARSE_RATIO = 16
TIES = 8  # keys that the sparse way can keep beyond k_attend because they tie with the last


def topk_attention(query, key, value, k_attend):
    """Scaled dot-product attention in which every query attends to its top-k keys.

    softmax over {j : s_ij among the k_attend largest of row i}, with s = query keyᵀ / √d_head
    ("Explicit Sparse Transformer", Zhao et al. 2019). The selection is exact. Keys that tie with
    the k-th largest score are all kept, so that the result never depends on their order. Memory
    grows linearly with the number of tokens. ARCHITECTURE.md has the five ways to compute it.

    query [..., N_q, d_head], key [..., N_k, d_head], value [..., N_k, d_value], all of the same
    leading dimensions -> [..., N_q, d_value]. Raises a ValueError if k_attend is below 1.
    """
    if k_attend < 1:
        raise ValueError(f"k_attend must be at least 1, got {k_attend}")
    if k_attend >= key.shape[-2]:
        return F.scaled_dot_product_attention(query, key, value)
    if kernel_fits(query, key, value):
        return topk_kernel.topk_attention_short(query, key, value, k_attend)
    num_queries, num_keys = query.shape[-2], key.shape[-2]
    query = query * query.shape[-1] ** -0.5
    block = max(1, MAX_SCORES // max(1, query.shape[:-2].numel() * num_keys))
    if block >= num_queries:
        return attend_by_masking(query, key, value, k_attend)
    if k_attend * SPARSE_RATIO <= num_keys and query.device.type in ("cpu", "cuda"):
        attended = attend_to_selected(query, key, value, k_attend, block)
        if attended is not None:
            return attended
    # Nothing here is random, and a CUDA graph could not record the random state.
    options = {"use_reentrant": False, "preserve_rng_state": False}
    blocks = [
        checkpoint(attend_by_masking, part, key, value, k_attend, **options)
        for part in query.split(block, dim=-2)
    ]
    return torch.cat(blocks, dim=-2)


def kernel_fits(query, key, value):
    """Whether the kernel can do it; torch.compile makes one of its own."""
    wanted = USE_KERNEL and query.is_cuda and not torch.compiler.is_compiling()
    return wanted and topk_kernel.fits(query, key, value)


def attend_by_masking(query, key, value, k_attend):
    """Dense matrix products, with all scores below each row's k-th masked; query is scaled."""
    scores = query @ key.transpose(-2, -1)  # [..., N_q, N_k]
    with torch.no_grad():  # the selection has no gradient of its own
        kept = scores.topk(k_attend, dim=-1, sorted=False).values
        dropped = scores < kept.amin(dim=-1, keepdim=True)
    weights = scores.masked_fill_(dropped, float("-inf")).softmax(dim=-1)
    return weights @ value  # [..., N_q, d_value]


def attend_to_selected(query, key, value, k_attend, block):
    """Reads the selected keys and values alone; query is scaled. None: more than TIES keys tie."""
    width = k_attend + TIES
    groups = (t.reshape(-1, *t.shape[-2:]) for t in (query, key))
    scores, indices = BestScores.apply(*groups, width + 1, block)  # each [G, N_q, width + 1]
    last = scores[..., k_attend - 1 : k_attend].detach()
    if (scores[..., width:] == last).any():
        return None
    weights = scores.masked_fill(scores < last, float("-inf")).softmax(dim=-1).to(value.dtype)
    attended = weighted_rows(value.flatten(0, -2), indices, weights)
    return attended.view(*query.shape[:-1], value.shape[-1])


def weighted_rows(table, indices, weights):
    """Σ_j weights[..., j] · table[indices[..., j]], which materialises no selected row."""
    indices, weights = (t.reshape(-1, indices.shape[-1]) for t in (indices, weights))
    return F.embedding_bag(indices, table, per_sample_weights=weights, mode="sum")


class BestScores(torch.autograd.Function):
    """The largest scores of every query, and a backward pass that touches these alone.

    query [G, N_q, d], already scaled, and key [G, N_k, d] -> scores [G, N_q, width] in descending
    order and int64 indices [G, N_q, width] into the G · N_k keys.
    """

    @staticmethod
    def forward(ctx, query, key, width, block):
        groups, num_queries, num_keys = *query.shape[:2], key.shape[1]
        best = query.new_empty(groups, num_queries, width)
        indices = torch.empty_like(best, dtype=torch.int64)
        # One buffer for all blocks: new ones in each would fragment the heap.
        buffer = query.new_empty(groups, min(block, num_queries), num_keys)
        for start in range(0, num_queries, block):
            rows = slice(start, start + block)
            part = query[:, rows]
            scores = torch.bmm(part, key.transpose(1, 2), out=buffer[:, : part.shape[1]])
            best[:, rows], indices[:, rows] = scores.topk(width, dim=-1)
        first = torch.arange(0, groups * num_keys, num_keys, device=key.device)
        indices += first.view(-1, 1, 1)
        ctx.save_for_backward(query, key, indices)
        ctx.mark_non_differentiable(indices)
        return best, indices

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, _):
        query, key, indices = ctx.saved_tensors
        # Σ_j grad_ij key_j is the gradient of query i. As a function of the keys it is linear, and
        # its transpose, applied to the queries, is Σ_i grad_ij query_i: the gradient of key j.
        with torch.enable_grad():
            key = key.detach().requires_grad_()
            grad_query = weighted_rows(key.flatten(0, 1), indices, grad)
        (grad_key,) = torch.autograd.grad(grad_query, key, query.reshape(grad_query.shape))
        return grad_query.detach().view_as(query), grad_key, None, None
