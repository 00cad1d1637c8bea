"""What the study compares the model with: other routers, other budgets, conventional denoisers."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from adaptive_attention_moe import AdaptiveAttentionMoE
from conv_stages import in_fastest_layout
from small_vit import MODELS, SmallViT, reflected, zero_

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


class RandomRouter(nn.Module):
    """Weights drawn once for each of so many tokens, softmax of N(0, 1), never trained."""

    def __init__(self, tokens, num_experts):
        super().__init__()
        self.register_buffer("routing", torch.randn(1, tokens, num_experts).softmax(-1))

    def forward(self, x):
        """[B, N, D] -> [B, N, E]."""
        return self.routing[:, : x.shape[1]].expand(len(x), -1, -1)


class FirstChoiceRouter(nn.Module):
    """All weight to the expert that another router likes best."""

    def __init__(self, router):
        super().__init__()
        self.router = router

    def forward(self, x):
        """[B, N, D] -> [B, N, E], zeros and ones."""
        routing = self.router(x)
        return F.one_hot(routing.argmax(-1), routing.shape[-1]).to(routing.dtype)


def with_routers(model, make_router):
    """The model with every router replaced by make_router(that router, number of experts)."""
    for module in model.modules():
        if isinstance(module, AdaptiveAttentionMoE):
            module.router = make_router(module.router, len(module.experts))
    return model


# Conventional denoisers ----------------------------------------------------------------------


class DnCNN(nn.Module):
    """17 convolutions of 64 channels with batch normalisation that predict the noise.

    "Beyond a Gaussian Denoiser", Zhang et al. 2017. [B, 3, h, w] -> [B, 3, h, w].

    The inner convolutions start as the identity and the last at zero. Drawn at random, so many in
    a row without skips blur each pixel's noise beyond recovery, and training hardly starts.
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


class UNet(nn.Module):
    """Three resolutions, two 3×3 convolutions at each on the way down and up, and skips.

    "U-Net", Ronneberger et al. 2015, predicting the noise. [B, 3, h, w] -> [B, 3, h, w].
    """

    def __init__(self, channels=36):
        super().__init__()
        c1, c2, c3 = channels, 2 * channels, 4 * channels
        self.down1, self.down2, self.middle = two_convs(3, c1), two_convs(c1, c2), two_convs(c2, c3)
        self.up2, self.merge2 = nn.ConvTranspose2d(c3, c2, 2, 2), two_convs(2 * c2, c2)
        self.up1, self.merge1 = nn.ConvTranspose2d(c2, c1, 2, 2), two_convs(2 * c1, c1)
        self.noise = nn.Conv2d(c1, 3, 3, padding=1)

    def forward(self, noisy):
        """As SmallViT's, without any routing."""
        noisy = in_fastest_layout(noisy)
        fine = self.down1(noisy)  # [B, C, h, w]
        coarse = self.down2(F.max_pool2d(fine, 2))  # [B, 2C, h / 2, w / 2]
        x = self.up2(self.middle(F.max_pool2d(coarse, 2)))  # [B, 2C, h / 2, w / 2]
        x = self.up1(self.merge2(torch.cat([x, coarse], 1)))  # [B, C, h, w]
        image = noisy - self.noise(self.merge1(torch.cat([x, fine], 1)))
        return image if self.training else image.clamp(0, 1), []


def two_convs(in_channels, out_channels):
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(out_channels, out_channels, 3, padding=1),
        nn.ReLU(),
    )


# Tiles ---------------------------------------------------------------------------------------


class InTiles(nn.Module):
    """A denoiser that sees an image as separate tiles, continued by reflection to whole ones."""

    def __init__(self, model, tile):
        super().__init__()
        self.model, self.tile = model, tile

    def forward(self, noisy):
        """As the model's; the routings are of the tiles.  [1, 3, h, w] -> [1, 3, h, w]."""
        tile, (height, width) = self.tile, noisy.shape[2:]
        whole = reflected(noisy, -height % tile, -width % tile)
        tiles = whole[0].unfold(1, tile, tile).unfold(2, tile, tile)  # [3, rows, columns, t, t]
        images, routings = self.model(tiles.permute(1, 2, 0, 3, 4).flatten(0, 1))
        rows = images.unflatten(0, tiles.shape[1:3]).permute(2, 0, 3, 1, 4)
        return rows.flatten(3).flatten(1, 2)[None, :, :height, :width], routings


# The variants --------------------------------------------------------------------------------


def vit(model="published", **changes):
    """A function() that makes a SmallViT."""
    return lambda: SmallViT(replace(MODELS[model], **changes))


VARIANTS = {
    "published": vit(),
    "dense, one expert": vit(k_attend=(64,)),
    "dense, one expert, widened": vit(k_attend=(64,), d_model=172, d_ff=344),
    "uniform weights": lambda: with_routers(SmallViT(), lambda _, experts: UniformRouter(experts)),
    "random weights": lambda: with_routers(
        SmallViT(), lambda _, experts: RandomRouter(64, experts)
    ),
    "no load-balancing loss": vit(),
    "k = 4, 16, 64": vit(k_attend=(4, 16, 64)),
    "k = 8, 32, 64": vit(k_attend=(8, 32, 64)),
    "k = 64, 64, 64": vit(k_attend=(64, 64, 64)),
    "refined": vit("refined"),
    "refined, dense, one expert": vit("refined", k_attend=(64,)),
    "quick": vit("quick"),
    "photographs": vit("photographs"),
    "photographs, k = 64": vit("photographs", k_attend=(64,)),
    "photographs, dense": vit("photographs", k_attend=(ALL_KEYS,)),
    "U-Net": UNet,
    "DnCNN": DnCNN,
}
