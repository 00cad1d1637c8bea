"""The straightforward implementation: what the fast one has to agree with, and is timed against."""


def gather_attention(query, key, value, k_attend):
    """Gathers the selected values, [..., N, k, d]; arguments and result as `topk_attention`'s."""
    scores = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5  # [..., N, M]
    top, index = scores.topk(min(k_attend, key.shape[-2]), dim=-1)  # [..., N, k]
    index = index.unsqueeze(-1).expand(*index.shape, value.shape[-1])
    values = value.unsqueeze(-3).expand(*scores.shape, value.shape[-1])
    return (top.softmax(-1).unsqueeze(-1) * values.gather(-2, index)).sum(-2)


def straightforward_expert(expert, x):
    """SparseAttentionExpert as the equations say, projection by projection: [B, N, D] -> same."""

    def heads(linear):
        return linear(x).unflatten(-1, (expert.num_heads, -1)).transpose(1, 2)

    query, key, value = heads(expert.query), heads(expert.key), heads(expert.value)
    attended = gather_attention(query, key, value, expert.k_attend)  # [B, H, N, d_head]
    return expert.out_proj(attended.transpose(1, 2).flatten(2))


def straightforward_moe(moe, x):
    """AdaptiveAttentionMoE, expert by expert: [B, N, D] -> [B, N, D], routing [B, N, E]."""
    routing = moe.router(x)
    experts = [straightforward_expert(expert, x) for expert in moe.experts]
    mixed = sum(p.unsqueeze(-1) * y for p, y in zip(routing.unbind(-1), experts, strict=True))
    return moe.merge(mixed), routing
