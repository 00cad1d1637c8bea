"""Adaptive sparse attention: a router weighs experts that attend to their top-k keys only.

The method and nothing else; it needs torch alone. In the order of reading:

    topk_attention         every query keeps its k_attend best keys
    SparseAttentionExpert  multi-head top-k attention with projections of its own
    TokenRouter            one probability per expert for each token
    AdaptiveAttentionMoE   the experts, weighed by the router, and the merge projection
    load_balancing_loss    keeps every expert in use

Shapes: B images, N tokens, D = d_model, H heads of d_head = D / H channels, E experts.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

# Scores held at a time, 64 MiB in float32: longer sequences are processed in blocks of queries.
MAX_SCORES = 2**24
# Among such sequences, with this many times more keys than are kept, reading the kept ones alone
# beats matrix products.
SPARSE_RATIO = 16
# Keys that the sparse path can keep beyond k_attend because they tie with the last one.
TIES = 8


def topk_attention(query, key, value, k_attend, dropout_p=0.0):
    """Scaled dot-product attention in which every query attends to its top-k keys.

    softmax over {j : s_ij among the k_attend largest of row i}, with s = query keyᵀ / √d_head
    ("Explicit Sparse Transformer", Zhao et al. 2019). The selection is exact.
    Keys that tie with the k-th largest score are all kept, so that the result never depends on
    the order of the keys. One result, computed in one of four ways:

    - k_attend >= N_k is dense attention;
    - scores below each row's k-th largest are masked, and plain matrix products do the rest: at
      moderate lengths this is faster than gathering the selected values;
    - where all scores would be more than MAX_SCORES, that is done in blocks of queries, which are
      recomputed in the backward pass;
    - and if, besides, k_attend <= N_k / SPARSE_RATIO, only the selected scores of each block are
      kept, and all that follows, backward pass included, costs O(N_q · k_attend).

    Memory grows linearly with the number of tokens.

    Args:
        query: [..., N_q, d_head].
        key: [..., N_k, d_head].
        value: [..., N_k, d_value].
        k_attend: keys kept per query, at least 1; at N_k and above this is dense attention.
        dropout_p: probability of dropping an attention weight, 0 to disable.

    Returns:
        [..., N_q, d_value].

    Raises:
        ValueError: k_attend is below 1.
    """
    if k_attend < 1:
        raise ValueError(f"k_attend must be at least 1, got {k_attend}")
    if k_attend >= key.shape[-2]:
        return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout_p)
    num_queries, num_keys = query.shape[-2], key.shape[-2]
    query = query * query.shape[-1] ** -0.5
    block = max(1, MAX_SCORES // max(1, query.shape[:-2].numel() * num_keys))
    if block >= num_queries:
        return _attend_by_masking(query, key, value, k_attend, dropout_p)
    if k_attend * SPARSE_RATIO <= num_keys and query.device.type in ("cpu", "cuda"):
        attended = _attend_to_selected(query, key, value, k_attend, dropout_p, block)
        if attended is not None:
            return attended
    blocks = [
        checkpoint(
            _attend_by_masking,
            *(part, key, value, k_attend, dropout_p),
            use_reentrant=False,
            preserve_rng_state=dropout_p > 0,  # which a CUDA graph could not record
        )
        for part in query.split(block, dim=-2)
    ]
    return torch.cat(blocks, dim=-2)


def _attend_by_masking(query, key, value, k_attend, dropout_p):
    scores = query @ key.transpose(-2, -1)  # [..., N_q, N_k]
    with torch.no_grad():  # the selection has no gradient of its own
        kept = scores.topk(k_attend, dim=-1, sorted=False).values
        dropped = scores < kept.amin(dim=-1, keepdim=True)
    weights = scores.masked_fill_(dropped, float("-inf")).softmax(dim=-1)
    return F.dropout(weights, dropout_p, training=dropout_p > 0) @ value


def _attend_to_selected(query, key, value, k_attend, dropout_p, block):
    """None where more than TIES keys tie with the k-th: there is no room for them."""
    width = k_attend + TIES
    groups = (t.reshape(-1, *t.shape[-2:]) for t in (query, key))
    scores, indices = _BestScores.apply(*groups, width + 1, block)
    last = scores[..., k_attend - 1 : k_attend].detach()
    if (scores[..., width:] == last).any():
        return None
    weights = scores.masked_fill(scores < last, float("-inf")).softmax(dim=-1).to(value.dtype)
    weights = F.dropout(weights, dropout_p, training=dropout_p > 0)
    attended = _weighted_rows(value.flatten(0, -2), indices, weights)
    return attended.view(*query.shape[:-1], value.shape[-1])


def _weighted_rows(table, indices, weights):
    """Σ_j weights[..., j] · table[indices[..., j]], which materialises no selected row."""
    width = indices.shape[-1]
    weights = weights.reshape(-1, width)
    return F.embedding_bag(
        indices.reshape(-1, width), table, per_sample_weights=weights, mode="sum"
    )


class _BestScores(torch.autograd.Function):
    """The largest scores of every query, and a backward pass that touches these alone.

    query [G, N_q, d], already scaled, and key [G, N_k, d] -> scores [G, N_q, width] in descending
    order and int64 indices [G, N_q, width] into the G · N_k keys.
    """

    @staticmethod
    def forward(ctx, query, key, width, block):
        groups, num_queries, _ = query.shape
        num_keys = key.shape[1]
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
            grad_query = _weighted_rows(key.flatten(0, 1), indices, grad)
        (grad_key,) = torch.autograd.grad(grad_query, key, query.reshape(grad_query.shape))
        return grad_query.detach().view_as(query), grad_key, None, None


class SparseAttentionExpert(nn.Module):
    """Multi-head self-attention in which every query and head keeps its top-k keys.

    Args:
        d_model: channels of a token, D.
        num_heads: heads, H; has to divide d_model.
        k_attend: keys kept per query and head, capped at the number of tokens.
        dropout: dropout probability of the attention weights while training, in [0, 1).

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(self, d_model=128, num_heads=4, k_attend=32, dropout=0.0):
        super().__init__()
        if d_model < 1 or num_heads < 1 or d_model % num_heads:
            raise ValueError(
                f"num_heads must divide d_model, got d_model={d_model}, num_heads={num_heads}"
            )
        if k_attend < 1:
            raise ValueError(f"k_attend must be at least 1, got {k_attend}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        self.num_heads = num_heads
        self.k_attend = k_attend
        self.dropout = dropout
        self.query = nn.Linear(d_model, d_model)
        self.key = nn.Linear(d_model, d_model)
        self.value = nn.Linear(d_model, d_model)
        self.out_proj = nn.Linear(d_model, d_model)

    def forward(self, x):
        """[B, N, D] -> [B, N, D]."""
        return self.out_proj(attend_as_one([self], x))


def attend_as_one(experts, x):
    """Attention of experts that share one k_attend, before their output projections.

    Their query, key and value projections run as one matrix product and their heads as one
    attention call over G·H heads, which is the same mathematics in fewer and larger steps.

    Args:
        experts: G experts; num_heads, dropout and the capped k_attend of the first hold for all.
        x: [B, N, D].

    Returns:
        [B, N, G·D], the experts' heads side by side.
    """
    first = experts[0]
    projections = [getattr(e, name) for name in ("query", "key", "value") for e in experts]
    weight = torch.cat([p.weight for p in projections])  # [3·G·D, D]
    bias = torch.cat([p.bias for p in projections])
    batch, tokens, d_model = x.shape
    heads, d_head = len(experts) * first.num_heads, d_model // first.num_heads
    qkv = F.linear(x, weight, bias).view(batch, tokens, 3, heads, d_head)
    query, key, value = (t.transpose(1, 2) for t in qkv.unbind(2))  # each [B, G·H, N, d_head]
    dropout_p = first.dropout if first.training else 0.0
    attended = topk_attention(query, key, value, first.k_attend, dropout_p)
    return attended.transpose(1, 2).flatten(2)


class TokenRouter(nn.Module):
    """Reads each token and gives it one probability per expert: D -> D/2 -> ReLU -> E -> softmax.

    Args:
        d_model: channels of a token, at least 2.
        num_experts: experts to choose among, at least 1.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(self, d_model=128, num_experts=3):
        super().__init__()
        if d_model < 2 or num_experts < 1:
            raise ValueError(
                "d_model must be at least 2 and num_experts at least 1, "
                f"got d_model={d_model}, num_experts={num_experts}"
            )
        self.mlp = nn.Sequential(
            nn.Linear(d_model, d_model // 2), nn.ReLU(), nn.Linear(d_model // 2, num_experts)
        )

    def forward(self, x):
        """[B, N, D] -> routing probabilities [B, N, E]; each token's sum to 1."""
        return self.mlp(x).softmax(dim=-1)


class AdaptiveAttentionMoE(nn.Module):
    """Mixture of sparse attention experts: merge(Σ_e p_e · expert_e(x)), p = router(x).

    Every expert sees every token ("soft" routing), so the router is trained by plain
    backpropagation.

    Args:
        d_model: channels of a token, D.
        num_heads: heads of each expert; has to divide d_model.
        k_attend: one budget per expert, any number of them in any order. A budget at or above
            the number of tokens makes its expert dense.
        dropout: dropout probability of the attention weights while training, in [0, 1).

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(self, d_model=128, num_heads=4, k_attend=(32, 64, 128), dropout=0.0):
        super().__init__()
        if len(k_attend) < 1:
            raise ValueError(f"k_attend needs one budget per expert, got {tuple(k_attend)}")
        self.router = TokenRouter(d_model, len(k_attend))
        self.experts = nn.ModuleList(
            SparseAttentionExpert(d_model, num_heads, k, dropout) for k in k_attend
        )
        self.merge = nn.Linear(d_model, d_model)

    def forward(self, x):
        """Args: x, [B, N, D]. Returns: output [B, N, D], routing probabilities [B, N, E].

        Raises:
            ValueError: x is not [B, N, D].

        Between an expert's attention and the output stand only linear maps and the routing
        weight: merge(Σ_e p_e (W_e a_e + b_e)) = Σ_e (W_m W_e)(p_e a_e) + W_m Σ_e p_e b_e + b_m.
        So each output projection is folded into the merge projection, a product of two small
        matrices in place of one over all tokens.
        """
        d_model = self.merge.in_features
        if x.ndim != 3 or x.shape[-1] != d_model:
            raise ValueError(f"expected tokens of shape [B, N, {d_model}], got {list(x.shape)}")
        batch, tokens, _ = x.shape
        routing = self.router(x)

        shares = routing.unbind(-1)
        groups = {}  # experts that keep the same number of keys attend together
        for index, expert in enumerate(self.experts):
            groups.setdefault(min(expert.k_attend, tokens), []).append(index)

        out_bias = torch.stack([expert.out_proj.bias for expert in self.experts])  # [E, D]
        output = F.linear(routing, self.merge.weight @ out_bias.T, self.merge.bias)
        for indices in groups.values():
            experts = [self.experts[i] for i in indices]
            attended = attend_as_one(experts, x).view(batch, tokens, len(experts), d_model)
            weights = torch.stack([shares[i] for i in indices], dim=-1)  # no index tensor to copy
            weighed = attended * weights.unsqueeze(-1)  # [B, N, G, D]
            out_weight = torch.cat([expert.out_proj.weight for expert in experts], dim=1)
            output = output + F.linear(weighed.flatten(2), self.merge.weight @ out_weight)
        return output, routing


def load_balancing_loss(routing):
    """KL(uniform ‖ mean routing probability) / E: zero when all experts carry the same load.

    Args:
        routing: probabilities [..., E]; the mean is taken over all leading dimensions.

    Returns:
        Scalar, at least 0 (up to rounding). Its gradient pushes probability to experts that are
        used less than 1/E.
    """
    num_experts = routing.shape[-1]
    load = routing.flatten(0, -2).mean(dim=0)
    load = load.clamp_min(torch.finfo(load.dtype).tiny)  # log stays finite after a collapse
    return -(load * num_experts).log().mean() / num_experts
