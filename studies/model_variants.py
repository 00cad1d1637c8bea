"""What study and benchmark compare the model with: other routers, budgets, layers and denoisers."""

import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptive_attention_moe import AdaptiveAttentionMoE
from layers.conv_stages import in_fastest_layout
from small_vit import MODELS, SmallViT, zero_
from studies.reference import straightforward_moe

ALL_KEYS = 2**30  # of a budget that no image reaches

# Routers -------------------------------------------------------------------------------------


class UniformRouter(nn.Module):
    """Gives every expert the same weight."""

    def __init__(self, num_experts):
        super().__init__()
        self.num_experts = num_experts

    def forward(self, x):
        """[B, N, D] -> [B, N, E]."""
        return x.new_full((*x.shape[:2], self.num_experts), 1 / self.num_experts)


def with_routers(model: SmallViT, make_router: Callable) -> SmallViT:
    """The model with every router replaced by make_router(that router, number of experts)."""
    for module in model.modules():
        if isinstance(module, AdaptiveAttentionMoE):
            module.router = make_router(module.router, len(module.experts))
    return model


# Which tokens attend: of [B, N, E + 1] the [B, N] ranks; the lowest attend ---------------------


def by_chance(block: int, routing: Tensor) -> Tensor:
    """Any tokens, drawn anew for every image and block."""
    return torch.rand(routing.shape[:2], device=routing.device)


def by_place(ranks_of: Callable, block: int, routing: Tensor) -> Tensor:
    """The same places in every image, in every second block the others."""
    ranks = ranks_of(routing.shape[1], routing.device).expand(len(routing), -1)
    return -ranks if block % 2 else ranks


@functools.cache  # once on each device: a CUDA graph cannot record a copy to it
def drawn_ranks(tokens: int, device: torch.device) -> Tensor:
    """Ranks in an order that is drawn once, int64 [tokens]."""
    return torch.randperm(tokens, generator=torch.Generator().manual_seed(0)).to(device)


@functools.cache
def spread_ranks(tokens: int, device: torch.device | None = None) -> Tensor:
    """Ranks of a square grid's tokens, int64 [tokens]: however many come first, they lie evenly, as
    by the threshold matrix of ordered dithering (Bayer 1973).
    """
    side, order = math.ceil(tokens**0.5), torch.zeros(1, 1, dtype=torch.int64)
    while len(order) < side:
        upper, lower = (4 * order, 4 * order + 2), (4 * order + 3, 4 * order + 1)
        order = torch.cat([torch.cat(upper, 1), torch.cat(lower, 1)])
    return order[:side, :side].flatten()[:tokens].argsort(stable=True).argsort().to(device)


def with_choice(model: SmallViT, choice: Callable) -> SmallViT:
    """The model, where choice(number of the block, routing) ranks the tokens in place of p_none."""
    for number, block in enumerate(model.blocks):
        block.attention.rank_tokens = partial(choice, number)
    return model


class NoisiestAttend(SmallViT):
    """The tokens of the noisiest patches attend: a rule made by hand, in place of a learned one."""

    def forward(self, noisy):
        """As SmallViT's."""
        ranks = -noise_estimate(noisy, self.config.patch_size)
        with_choice(self, lambda block, routing: ranks)
        return super().forward(noisy)


def noise_estimate(noisy: Tensor, patch: int) -> Tensor:
    """[B, 3, h, w] -> [B, N], in proportion to σ in each patch of a flat image: what is left where
    the Laplacian is taken out ("Fast Noise Variance Estimation", Immerkær 1996).
    """
    line = noisy.new_tensor([1.0, -2.0, 1.0])
    kernel = torch.outer(line, line).expand(noisy.shape[1], 1, 3, 3)
    padded = F.pad(noisy, (1, 1, 1, 1), mode="replicate")
    left = F.conv2d(padded, kernel, groups=noisy.shape[1]).abs().mean(1, keepdim=True)
    return F.avg_pool2d(left, patch, ceil_mode=True).flatten(1)


# In the place of attention ---------------------------------------------------------------------


def with_attention(model: SmallViT, make_layer: Callable) -> SmallViT:
    """The model with every block's attention replaced by make_layer(), whose merge starts at 0."""
    for block in model.blocks:
        block.attention = make_layer()
        zero_(block.attention.merge)
    return model


class NoAttention(nn.Module):
    """Nothing in the place of attention: convolutions and feed-forward networks are left."""

    merge = nn.Identity()

    def forward(self, x):
        """[B, N, D] -> zeros [B, N, D] and the routing to the only expert, [B, N, 1]."""
        return torch.zeros_like(x), x.new_ones(*x.shape[:2], 1)


# Conventional denoisers ----------------------------------------------------------------------


class DnCNN(nn.Module):
    """Convolutions with batch normalisation that predict the noise, [B, 3, h, w] -> the same
    ("Beyond a Gaussian Denoiser", Zhang et al. 2017).

    The inner ones start as the identity and the last at zero: drawn at random, so many in a row
    without skips blur each pixel's noise beyond recovery, and training hardly starts.
    """

    def __init__(self, depth=17, channels=64):
        super().__init__()
        layers = [nn.Conv2d(3, channels, 3, padding=1), nn.ReLU()]
        for _ in range(depth - 2):
            conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
            nn.init.dirac_(conv.weight)
            layers += [conv, nn.BatchNorm2d(channels), nn.ReLU()]
        self.noise = nn.Sequential(*layers, nn.Conv2d(channels, 3, 3, padding=1))
        zero_(self.noise[-1])

    def forward(self, noisy):
        """As SmallViT's, without any routing."""
        noisy = in_fastest_layout(noisy)
        image = noisy - self.noise(noisy)
        return image if self.training else image.clamp(0, 1), []


# The variants --------------------------------------------------------------------------------


def vit(
    model: str = "published",
    kind: type = SmallViT,
    choice: Callable | None = None,
    attention: Callable | None = None,
    **changes,
) -> Callable[..., SmallViT]:
    """A function(**more changes) that makes one of MODELS with other values of its ViTConfig."""

    def make(**more):
        variant = kind(replace(MODELS[model], **changes, **more))
        variant = with_choice(variant, choice) if choice else variant
        return with_attention(variant, attention) if attention else variant

    return make


# A share of the tokens attends; who chooses them differs.
of_tokens = partial(vit, k_attend=(64,), capacity=0.25)
by_pattern = partial(by_place, spread_ranks)  # as far apart as can be
by_halves = partial(by_place, drawn_ranks)

VARIANTS = {
    "published": vit(),
    "uniform weights": lambda: with_routers(SmallViT(), lambda _, experts: UniformRouter(experts)),
    "no load-balancing loss": vit(),
    "k = 64, 64, 64": vit(k_attend=(64, 64, 64)),
    "dense, one expert": vit(k_attend=(64,)),
    "dense, one expert, widened": vit(k_attend=(64,), d_model=172, d_ff=344),
    "dense, one expert, local": vit(k_attend=(64,), local=True),
    "refined": vit("refined"),
    "refined, dense, one expert": vit("refined", k_attend=(64,)),
    "refined, no attention": vit("refined", attention=NoAttention, d_ff=564),
    "quick": vit("quick"),
    "quick, no attention": vit("quick", attention=NoAttention, d_ff=305),
    "photographs": vit("photographs"),
    "photographs, dense": vit("photographs", k_attend=(ALL_KEYS,)),
    "photographs, no attention": vit("photographs", attention=NoAttention, d_ff=610),
    "DnCNN": DnCNN,
    "capacity, by router": of_tokens(),
    "capacity, by noise": of_tokens(kind=NoisiestAttend),
    "capacity, by pattern": of_tokens(choice=by_pattern),
    "capacity, by halves": of_tokens(choice=by_halves),
    "capacity, by chance": of_tokens(choice=by_chance),
    "capacity, by router, local": of_tokens(local=True),
    "capacity, by noise, local": of_tokens(kind=NoisiestAttend, local=True),
    "capacity, by pattern, local": of_tokens(choice=by_pattern, local=True),
    "photographs, capacity, by router": vit("routed-photographs"),
    "photographs, capacity, by pattern": vit("routed-photographs", choice=by_pattern),
}

# Yardsticks of the benchmark -----------------------------------------------------------------


class DenseAttention(nn.Module):
    """Ordinary multi-head attention in the place of AdaptiveAttentionMoE."""

    def __init__(self, d_model=128, num_heads=4):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(d_model, 3 * d_model)
        self.merge = nn.Linear(d_model, d_model)

    def forward(self, x):
        """[B, N, D] -> [B, N, D] and the routing to the only expert, [B, N, 1]."""
        heads = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        return self.merge(attended), x.new_ones(*x.shape[:2], 1)


def straightforward() -> SmallViT:
    """The published model, whose attention gathers the selected values."""
    model = SmallViT()
    for block in model.blocks:
        block.attention.forward = partial(straightforward_moe, block.attention)
    return model


YARDSTICKS = {
    "this": vit(),
    "straightforward": straightforward,
    "dense": vit(attention=DenseAttention),
    "refined": vit("refined"),
    "routed": vit("routed"),
}


def make_yardsticks(device: torch.device, names: Iterable[str]) -> dict[str, SmallViT]:
    """{name: model on the device}, each with the same weights in every process."""
    models = {}
    for name in names:
        torch.manual_seed(0)
        models[name] = YARDSTICKS[name]().to(device)
    return models
