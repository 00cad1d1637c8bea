"""Convolutional encoder and decoder, image to tokens and back, and the padding before them.

h and w are the height and width of the feature map at hand, C its channels, D those of a token, L
the number of resolutions.
"""

from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LayerNorm2d(nn.LayerNorm):
    """Layer norm over the channels of every pixel.  [B, C, h, w] -> [B, C, h, w], same layout."""

    def forward(self, x):
        normed = super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        channels_last = x.is_contiguous(memory_format=torch.channels_last)
        return normed if channels_last else normed.contiguous()


class ResidualConv(nn.Module):
    """x + conv(GELU(conv(norm(x)))), 3×3.  [B, C, h, w] -> [B, C, h, w]."""

    def __init__(self, channels):
        super().__init__()
        self.norm = LayerNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def last_layers(self):
        return [self.conv2]

    def forward(self, x):
        return x + self.conv2(F.gelu(self.conv1(self.norm(x))))


class NAFBlock(nn.Module):
    """A gated depthwise convolution, then a gated feed-forward network.  [B, C, h, w] -> same.

    The block of NAFNet ("Simple Baselines for Image Restoration", Chen et al. 2022) without its
    channel attention, the biases of its 1×1 convolutions, each of whose gradients takes one more
    pass over a feature map, and its learned scales: each half starts as the identity by zeros.
    """

    def __init__(self, channels):
        super().__init__()
        self.norm1, self.norm2 = LayerNorm2d(channels), LayerNorm2d(channels)
        pointwise = partial(nn.Conv2d, kernel_size=1, bias=False)
        self.widen = pointwise(channels, 2 * channels)
        self.depthwise = nn.Conv2d(2 * channels, 2 * channels, 3, padding=1, groups=2 * channels)
        self.project = pointwise(channels, channels)
        self.ffn = nn.ModuleList([pointwise(channels, 2 * channels), pointwise(channels, channels)])

    def last_layers(self):
        return [self.project, self.ffn[1]]

    def forward(self, x):
        x = x + self.project(gate(self.depthwise(self.widen(self.norm1(x)))))
        return x + self.ffn[1](gate(self.ffn[0](self.norm2(x))))


def gate(x):
    """The product of the two halves of the channels.  [B, 2C, h, w] -> [B, C, h, w]."""
    left, right = x.chunk(2, dim=1)
    return left * right


def make_stages(channels, depth):
    """A dense residual pair at full resolution, `depth` NAF blocks at each of the coarser ones."""
    # At full resolution such a pair takes a CPU less time than a NAF block.
    nafs = [nn.Sequential(*(NAFBlock(c) for _ in range(depth))) for c in channels[1:]]
    return nn.ModuleList([ResidualConv(channels[0]), *nafs])


class ConvEncoder(nn.Module):
    """Image to tokens in steps of 2: convolutions at every resolution.

    [B, C, h, w] -> [B, D, h / 2^L, w / 2^L] and the L feature maps on the way,
    [B, channels[l], h / 2^l, w / 2^l], from fine to coarse; C = in_channels.
    """

    def __init__(self, channels, depth, d_model, in_channels=3):
        super().__init__()
        self.stem = nn.Conv2d(in_channels, channels[0], 3, padding=1)
        self.stages = make_stages(channels, depth)
        pairs = pairwise((*channels, d_model))
        self.downs = nn.ModuleList(nn.Conv2d(few, many, 2, stride=2) for few, many in pairs)

    def forward(self, image):
        x, features = self.stem(in_fastest_layout(image)), []
        for stage, down in zip(self.stages, self.downs, strict=True):
            features.append(stage(x))
            x = down(features[-1])
        return x, features


class ConvDecoder(nn.Module):
    """Tokens to image, the mirror of ConvEncoder: its feature maps are added on the way."""

    def __init__(self, channels, depth, d_model):
        super().__init__()
        pairs = pairwise((*channels, d_model))
        self.ups = nn.ModuleList(nn.ConvTranspose2d(many, few, 2, stride=2) for few, many in pairs)
        self.stages = make_stages(channels, depth)
        self.head = nn.Conv2d(channels[0], 3, 3, padding=1)

    def forward(self, x, features):
        for level in reversed(range(len(features))):
            x = self.stages[level](self.ups[level](x) + features[level])
        return self.head(x)  # [B, 3, h, w]


def in_fastest_layout(image):
    """The image in the layout in which convolutions are faster and tokens need no copy."""
    kind = image.device.type  # on a GPU, channels-last is faster for bfloat16, but not for float32
    if kind == "cpu" or (kind == "cuda" and torch.is_autocast_enabled("cuda")):
        return image.contiguous(memory_format=torch.channels_last)
    return image


def reflected(image: Tensor, rows: int, columns: int) -> Tensor:
    """Continues images [..., h, w] by reflection, downwards and to the right, however small."""
    for dim, more in ((-2, rows), (-1, columns)):
        if more:
            size = image.shape[dim]
            index = torch.arange(size + more, device=image.device)
            index %= index.new_full((), max(1, 2 * size - 2))  # ONNX has no remainder by a number
            image = image.index_select(dim, torch.minimum(index, (2 * size - 2 - index).abs()))
    return image
