"""Adaptive sparse attention: a router weighs experts that attend to their top-k keys only.

The method and nothing else, in the order of the equations:

    SparseAttentionExpert  expert_e(x): multi-head attention, every query keeps its top-k keys
    TokenRouter            p = softmax(router(x)), one probability per expert for each token
    AdaptiveAttentionMoE   y = merge(Σ_e p_e · expert_e(x))
    load_balancing_loss    keeps every expert in use

With a capacity the router decides first which tokens attend at all; the others get zero.

Shapes: B images, N tokens, D = d_model, H heads of d_head = D / H channels, E experts.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layers.topk_attention import topk_attention


class SparseAttentionExpert(nn.Module):
    """Multi-head self-attention in which every query and head keeps its top-k keys.

    A ValueError if num_heads does not divide d_model or k_attend, capped at N, is below 1.
    """

    def __init__(self, d_model: int = 128, num_heads: int = 4, k_attend: int = 32):
        super().__init__()
        check_heads(d_model, num_heads)
        if k_attend < 1:
            raise ValueError(f"k_attend must be at least 1, got {k_attend}")
        self.num_heads = num_heads
        self.k_attend = k_attend
        self.query = nn.Linear(d_model, d_model)
        self.key = nn.Linear(d_model, d_model)
        self.value = nn.Linear(d_model, d_model)
        self.out_proj = nn.Linear(d_model, d_model)

    def forward(self, x: Tensor, chosen: Tensor | None = None) -> Tensor:
        """[B, N, D] -> [B, N, D]; with `chosen` [B, M, D] these alone are queries -> [B, M, D]."""
        if chosen is None:
            query, key, value = self.project(x, self.query, self.key, self.value)
        else:
            (query,) = self.project(chosen, self.query)  # [B, H, M, d_head]
            key, value = self.project(x, self.key, self.value)
        attended = topk_attention(query, key, value, self.k_attend)  # as query
        return self.out_proj(attended.transpose(1, 2).flatten(2))

    def project(self, x: Tensor, *layers: nn.Linear) -> list[Tensor]:
        """[B, N, D] -> [B, H, N, d_head] by each of the layers."""
        # Layers of their own, so that an optimizer treats each by itself, but one matrix product.
        weight = torch.cat([layer.weight for layer in layers])
        bias = torch.cat([layer.bias for layer in layers])
        heads = F.linear(x, weight, bias).unflatten(-1, (len(layers), self.num_heads, -1))
        return [t.transpose(1, 2) for t in heads.unbind(2)]


class TokenRouter(nn.Module):
    """Reads each token and gives it one probability per expert: D -> D/2 -> ReLU -> E -> softmax.

    A ValueError if d_model is below 2 or num_experts below 1.
    """

    def __init__(self, d_model: int = 128, num_experts: int = 3):
        super().__init__()
        if d_model < 2 or num_experts < 1:
            raise ValueError(
                "d_model must be at least 2 and num_experts at least 1, "
                f"got d_model={d_model}, num_experts={num_experts}"
            )
        self.mlp = nn.Sequential(
            nn.Linear(d_model, d_model // 2), nn.ReLU(), nn.Linear(d_model // 2, num_experts)
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] -> routing probabilities [B, N, E]; each token's sum to 1."""
        return self.mlp(x).softmax(dim=-1)


class AdaptiveAttentionMoE(nn.Module):
    """Mixture of sparse attention experts: merge(Σ_e p_e · expert_e(x)), p = router(x).

    Every expert sees every token ("soft" routing, as in "Outrageously Large Neural Networks",
    Shazeer et al. 2017, before its top-k gate), so the router is trained by backpropagation alone.

    Args:
        d_model, num_heads: of every expert.
        k_attend: one budget per expert, any number of them in any order. A budget at or above
            the number of tokens makes its expert dense.
        capacity: share of the tokens that attend, above 0, at most 1: those to which the router
            gives the least of one more choice, not to attend ("Mixture-of-Depths", Raposo et al.
            2024). May be set to another share at any time. None: all attend.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        d_model: int = 128,
        num_heads: int = 4,
        k_attend: Sequence[int] = (32, 64, 128),
        capacity: float | None = None,
    ):
        super().__init__()
        if len(k_attend) < 1:
            raise ValueError(f"k_attend needs one budget per expert, got {tuple(k_attend)}")
        if capacity is not None:
            check_capacity(capacity)
        self._capacity = capacity
        self.router = TokenRouter(d_model, len(k_attend) + (capacity is not None))
        self.experts = nn.ModuleList(SparseAttentionExpert(d_model, num_heads, k) for k in k_attend)
        self.merge = nn.Linear(d_model, d_model)

    @property
    def capacity(self) -> float | None:
        return self._capacity

    @capacity.setter
    def capacity(self, share: float):
        if self._capacity is None:
            raise ValueError(
                "this layer was made without a capacity: its router has no such choice"
            )
        check_capacity(share)
        self._capacity = share

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[B, N, D] -> the same and the routing probabilities [B, N, E]; else a ValueError.

        With a capacity the output is zero for tokens that do not attend, all but those that
        `choose` names, and the last of E + 1 probabilities is that of not attending.
        """
        d_model = self.merge.in_features
        if x.ndim != 3 or x.shape[-1] != d_model:
            raise ValueError(f"expected tokens of shape [B, N, {d_model}], got {list(x.shape)}")
        routing = self.router(x)  # [B, N, E] or, with a capacity, [B, N, E + 1]
        if self.capacity is None:
            return self.mix(routing, x), routing  # [B, N, D], [B, N, E]
        places = self.choose(routing).unsqueeze(-1)  # [B, M, 1]
        tokens, weights = (t.gather(1, places.expand(-1, -1, t.shape[-1])) for t in (x, routing))
        mixed = self.mix(weights[..., :-1], x, tokens).to(x.dtype)  # [B, M, D]
        return torch.zeros_like(x).scatter(1, places.expand_as(mixed), mixed), routing

    def mix(self, routing: Tensor, x: Tensor, chosen: Tensor | None = None) -> Tensor:
        """merge(Σ_e p_e · expert_e(x)) of all tokens or of the chosen ones."""
        weights = routing.unsqueeze(-1).unbind(2)  # E times [B, M, 1]
        experts = zip(weights, self.experts, strict=True)
        return self.merge(sum(p * expert(x, chosen) for p, expert in experts))

    def choose(self, routing: Tensor) -> Tensor:
        """Places of the ⌈capacity · N⌉ tokens that attend, int64 [B, M]; ties go to the first."""
        count = max(1, math.ceil(self.capacity * routing.shape[1] - 1e-6))  # 0.07 · 100 > 7
        return self.rank_tokens(routing).argsort(dim=1, stable=True)[:, :count]

    def rank_tokens(self, routing: Tensor) -> Tensor:
        """[B, N, E + 1] -> [B, N]: the tokens with the lowest values attend."""
        return routing[..., -1].detach()


def check_heads(d_model: int, num_heads: int) -> None:
    """Raises a ValueError unless both are positive and num_heads divides d_model."""
    if d_model < 1 or num_heads < 1 or d_model % num_heads:
        raise ValueError(
            f"num_heads must divide d_model, got d_model={d_model}, num_heads={num_heads}"
        )


def check_capacity(share: float) -> None:
    """Raises a ValueError unless it is a number above 0 and at most 1."""
    if type(share) not in (int, float) or not 0 < share <= 1:
        raise ValueError(f"capacity must be above 0 and at most 1, got {share!r}")


def load_balancing_loss(routing: Tensor, capacity: float | None = None) -> Tensor:
    """KL(uniform ‖ mean routing probability) / E: zero when all experts carry the same load.

    routing [..., E] -> scalar, at least 0 (up to rounding), whose gradient pushes probability to
    experts that are used less than 1/E; the mean is over all leading dimensions, one or more. With
    a capacity, the share of the tokens that attend, the last of `routing` is the probability not to
    attend, whose load should be what remains, and E - 1 experts share the rest.
    """
    num_experts = routing.shape[-1]
    load = routing.flatten(0, -2).mean(dim=0)  # [E]
    load = load.clamp_min(torch.finfo(load.dtype).tiny)  # log stays finite after a collapse
    if capacity is None:
        return -(load * num_experts).log().mean() / num_experts
    wanted = load.new_full((num_experts - 1,), capacity / (num_experts - 1))
    wanted = F.pad(wanted, (0, 1), value=1 - capacity)  # [E]
    return (torch.xlogy(wanted, wanted) - wanted * load.log()).sum() / num_experts
