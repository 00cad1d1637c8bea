"""Trains the denoiser, keeps the best checkpoint, tests it and prints the results.

    python denoising_experiment_proper.py                    # CIFAR-10, the published recipe
    python denoising_experiment_proper.py --dataset photos   # without a network

The experiment in the order of reading: data (NoisyImageDataset), model (SmallViT), evaluation,
checkpoints, training loop, command line.
"""

import math
import pickle
import sys
import time
from collections import deque
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import nn
from tqdm import tqdm

from adaptive_attention_moe import AdaptiveAttentionMoE, load_balancing_loss
from command_line import (
    CHECKPOINT,
    UserError,
    add_noise_level,
    add_output,
    make_parser,
    run_main,
    select_device,
)
from cuda_graphs import replayed
from data_parallel import (
    any_process,
    first_process_first,
    joined,
    my_share,
    parallel,
    rank,
    sum_over_processes,
    wait_for_all,
    world_size,
)
from image_sources import Split, load_images
from muon import Muon
from run_files import RunFiles, StopRequest, draw_history, save_atomically, write_history

BALANCE_WEIGHT = 0.01  # of the load-balancing loss, per block
PSNR_WEIGHT = 1e-3  # with it, 1 dB near 23 dB weighs what it weighs in the mean squared error
PSNR_EPS = 1e-5  # an MSE of 50 dB; bounds the gradient of the logarithm
CLIP_NORM = 1.0
CPU_STEPS_PER_READ, GPU_STEPS_PER_READ = 1, 50  # reading a loss makes the CPU wait for the GPU

# ---------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------


class NoisyImageDataset(torch.utils.data.Dataset):
    """Clean images and their noisy versions: noisy = clamp(clean + σ·N(0, 1), 0, 1).

    The images stay one uint8 tensor on `device`, where training draws its noise, too. There are two
    kinds of noise, both reproducible: `dataset[i]` and `batches()` give image i the same noise
    whatever the batch size, the order, the device or the run (validation and test);
    `shuffled_batches(epoch)` draws fresh noise in every epoch (training).

    Args:
        split: image_sources.Split.
        noise_level: σ, at least 0, for pixel values in [0, 1]; or a pair (low, high), low above 0,
            from which every image draws a σ of its own, see `draw_sigma`.
        stream: a number that keeps the noise of one split apart from that of another.
        device: torch.device of the images and of all that the data set yields.

    Raises:
        ValueError: noise_level is negative or no such pair, or the images are not uint8
            [n, 3, h, w].
    """

    def __init__(self, split, noise_level=0.2, stream=0, device="cpu"):
        low, high = noise_range(noise_level)
        if not 0 <= low <= high or low == 0 < high:
            raise ValueError(
                "noise_level must be a σ of at least 0 or a range that ascends from above 0, "
                f"got {noise_level}"
            )
        if split.images.dtype != torch.uint8 or split.images.ndim != 4:
            raise ValueError(
                "expected uint8 images of shape [n, 3, h, w], got "
                f"{split.images.dtype} {list(split.images.shape)}"
            )
        self.split = Split(split.images.to(device), split.labels.to(device), split.lossless)
        self.noise_level = noise_level
        self.stream = stream
        self.device = torch.device(device)

    def to(self, device):
        """The same data set on another device."""
        return NoisyImageDataset(self.split, self.noise_level, self.stream, device)

    def __len__(self):
        return len(self.split)

    def __getitem__(self, index):
        """(noisy, clean, label): float32 [3, h, w] in [0, 1] twice, and a scalar int64."""
        index = range(len(self))[index]
        return tuple(t[0] for t in self._batch_with_own_noise(range(index, index + 1)))

    def batches(self, batch_size=64):
        """All images in order, each with its own noise: (noisy, clean, labels) batches."""
        for start in range(0, len(self), batch_size):
            yield self._batch_with_own_noise(range(start, min(start + batch_size, len(self))))

    def shuffled_batches(self, batch_size, seed, epoch, lossless_share=None, start=0, flip=False):
        """One epoch of training: (noisy, clean, labels) batches, shuffled, with fresh noise.

        Order and noise depend on (seed, epoch, step) alone, so that a run can stop after any step
        and go on from there as if it had never stopped. The order is the same on every device, the
        noise on every device of one model.

        Args:
            batch_size: images per batch; the last batch may be smaller.
            seed: of order and noise.
            epoch: number of the epoch.
            lossless_share: part of the epoch's samples to draw from losslessly stored images;
                None takes every image once.
            start: batches to skip.
            flip: mirror each image left to right with probability 1/2.
        """
        order = self._order(_generator(seed, epoch), lossless_share).to(self.device)
        for step, indices in enumerate(order.split(batch_size)):
            if step >= start:
                generator = _generator(seed, epoch, step, device=self.device)
                draw = {"generator": generator, "device": self.device}
                noise = torch.randn((len(indices), *self.split.images.shape[1:]), **draw)
                sigma = draw_sigma(torch.rand(len(indices), **draw), self.noise_level)
                mirrored = torch.rand(len(indices), **draw) < 0.5 if flip else None
                yield self._add(noise, sigma, indices, mirrored)

    def _order(self, generator, lossless_share):
        if lossless_share is None:
            return torch.randperm(len(self), generator=generator)
        wanted = round(lossless_share * len(self))
        drawn = []
        for stored_lossless, count in ((True, wanted), (False, len(self) - wanted)):
            pool = (self.split.lossless == stored_lossless).nonzero().flatten()
            while count > 0:  # a pool smaller than its share is gone through again
                drawn.append(pool[torch.randperm(len(pool), generator=generator)][:count])
                count -= len(drawn[-1])
        drawn = torch.cat(drawn)
        return drawn[torch.randperm(len(drawn), generator=generator)]

    def _batch_with_own_noise(self, indices):
        noise, sigma = [], []
        for index in indices:
            generator = np.random.default_rng((self.stream, index))
            shape = self.split.images.shape[1:]
            noise.append(generator.standard_normal(shape, dtype=np.float32))
            sigma.append(draw_sigma(generator.uniform(), self.noise_level))
        noise = torch.from_numpy(np.stack(noise)).to(self.device)
        sigma = torch.tensor(sigma, dtype=torch.float32, device=self.device)
        return self._add(noise, sigma, torch.tensor(indices, device=self.device))

    def _add(self, noise, sigma, indices, mirrored=None):
        clean = self.split.images[indices].float() / 255
        if mirrored is not None:
            clean = torch.where(mirrored.view(-1, 1, 1, 1), clean.flip(3), clean)
        noisy = noise.mul_(sigma.view(-1, 1, 1, 1)).add_(clean).clamp_(0, 1)
        return noisy, clean, self.split.labels[indices]


def noise_range(noise_level):
    """(low, high) of a σ or of a pair."""
    return tuple(noise_level) if isinstance(noise_level, tuple | list) else (noise_level,) * 2


def draw_sigma(uniform, noise_level):
    """σ out of numbers that are uniform in [0, 1): the fixed one, or log-uniform in a range.

    Every octave of σ gets as many images as any other. With σ itself uniform, few images have
    little noise, where a model needs most training to come near one trained for that σ alone.
    """
    low, high = noise_range(noise_level)
    return low * (high / low) ** uniform if high > low else low + 0 * uniform


def noise_text(noise_level):
    """A σ, or a range of it, in words: "σ = 0.2", "σ = 0.05 to 0.35"."""
    low, high = noise_range(noise_level)
    return f"σ = {low:g}" + (f" to {high:g}" if high > low else "")


def _generator(*key, device="cpu"):
    """A torch generator seeded by several numbers, mixed by numpy's SeedSequence."""
    seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    return torch.Generator(device).manual_seed(seed)


def noisy_splits(source, noise_level, lossless_share=None):
    """(train, val, test) NoisyImageDatasets of an image source, with noise of their own.

    With a lossless_share, validation is left to the losslessly stored images.

    Raises:
        UserError: a lossless_share is given, but there are not both kinds of files.
    """
    train, val, test = source.train, source.val, source.test
    if lossless_share is not None:
        if any(split.lossless.all() or not split.lossless.any() for split in (train, val)):
            raise UserError(
                f"--lossless-share: {source.name} does not mix lossless and lossy files in "
                "training and validation; drop the option"
            )
        val = val[val.lossless]
    return tuple(
        NoisyImageDataset(split, noise_level, stream)
        for stream, split in enumerate((train, val, test))
    )


# ---------------------------------------------------------------------------------------------
# Model
# ---------------------------------------------------------------------------------------------


class TransformerBlock(nn.Module):
    """Pre-norm: x + MoE(LN(x)), then x + FFN(LN(x)).  [B, N, D] -> [B, N, D], routing."""

    def __init__(self, d_model, num_heads, d_ff, k_attend, dropout):
        super().__init__()
        self.norm1 = nn.LayerNorm(d_model)
        self.attention = AdaptiveAttentionMoE(d_model, num_heads, k_attend, dropout)
        self.norm2 = nn.LayerNorm(d_model)
        self.ffn = nn.Sequential(nn.Linear(d_model, d_ff), nn.GELU(), nn.Linear(d_ff, d_model))

    def forward(self, x):
        attended, routing = self.attention(self.norm1(x))
        x = x + attended
        return x + self.ffn(self.norm2(x)), routing


class LayerNorm2d(nn.LayerNorm):
    """Layer norm over the channels of every pixel.  [B, C, h, w] -> [B, C, h, w], same layout."""

    def forward(self, x):
        normed = super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        channels_last = x.is_contiguous(memory_format=torch.channels_last)
        return normed if channels_last else normed.contiguous()


class ResidualConv(nn.Module):
    """x + conv(GELU(conv(norm(x)))), 3×3; starts as the identity.  [B, C, h, w] -> [B, C, h, w]."""

    def __init__(self, channels):
        super().__init__()
        self.norm = LayerNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = zeroed(nn.Conv2d(channels, channels, 3, padding=1))

    def forward(self, x):
        return x + self.conv2(F.gelu(self.conv1(self.norm(x))))


class NAFBlock(nn.Module):
    """A gated depthwise convolution, then a gated feed-forward network.  [B, C, h, w] -> same.

    The block of NAFNet ("Simple Baselines for Image Restoration", Chen et al. 2022) without its
    channel attention, and without biases of the 1×1 convolutions: the norms and the depthwise
    convolution have some, and the gradient of each takes one more pass over a feature map. There,
    each half starts as the identity by a learned scale of zero; here its last layer is zero.
    """

    def __init__(self, channels):
        super().__init__()
        self.norm1, self.norm2 = LayerNorm2d(channels), LayerNorm2d(channels)
        self.widen = nn.Conv2d(channels, 2 * channels, 1, bias=False)
        self.depthwise = nn.Conv2d(2 * channels, 2 * channels, 3, padding=1, groups=2 * channels)
        self.project = zeroed(nn.Conv2d(channels, channels, 1, bias=False))
        self.ffn = nn.ModuleList(
            (
                nn.Conv2d(channels, 2 * channels, 1, bias=False),
                zeroed(nn.Conv2d(channels, channels, 1, bias=False)),
            )
        )

    def forward(self, x):
        x = x + self.project(Gate.apply(self.depthwise(self.widen(self.norm1(x)))))
        return x + self.ffn[1](Gate.apply(self.ffn[0](self.norm2(x))))


class Gate(torch.autograd.Function):
    """The product of the two halves of the channels.  [B, 2C, h, w] -> [B, C, h, w].

    The derivative of `chunk` concatenates two gradients; this one writes both where they belong.
    """

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        left, right = x.chunk(2, dim=1)
        return left * right

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        left, right = x.chunk(2, dim=1)
        if torch.compiler.is_compiling():  # out= takes no views there; the compiler fuses this
            return torch.cat((gradient * right, gradient * left), dim=1)
        of_x = torch.empty_like(x)
        of_left, of_right = of_x.chunk(2, dim=1)
        torch.mul(gradient, right, out=of_left)
        torch.mul(gradient, left, out=of_right)
        return of_x


def channels_last_on_cpu(image):
    """The image in the layout in which a CPU's convolutions are faster and tokens need no copy."""
    if image.device.type == "cpu":
        return image.contiguous(memory_format=torch.channels_last)
    return image


def conv_stages(channels, depth):
    """A dense residual pair at full resolution, `depth` NAF blocks at each of the coarser ones.

    At full resolution such a pair takes a CPU less time than a NAF block.
    """
    nafs = [nn.Sequential(*(NAFBlock(c) for _ in range(depth))) for c in channels[1:]]
    return nn.ModuleList([ResidualConv(channels[0]), *nafs])


class ConvEncoder(nn.Module):
    """Image to tokens in steps of 2: convolutions at every resolution.

    [B, in_channels, h, w] -> [B, D, h / 2^L, w / 2^L] and the L feature maps on the way,
    [B, channels[l], h / 2^l, w / 2^l], from fine to coarse.
    """

    def __init__(self, in_channels, channels, depth, d_model):
        super().__init__()
        self.stem = nn.Conv2d(in_channels, channels[0], 3, padding=1)
        self.stages = conv_stages(channels, depth)
        self.downs = nn.ModuleList(
            nn.Conv2d(c, coarser, 2, stride=2)
            for c, coarser in zip(channels, (*channels[1:], d_model), strict=True)
        )

    def forward(self, image):
        x, features = self.stem(channels_last_on_cpu(image)), []
        for stage, down in zip(self.stages, self.downs, strict=True):
            features.append(stage(x))
            x = down(features[-1])
        return x, features


class ConvDecoder(nn.Module):
    """Tokens to image, the mirror of ConvEncoder: its feature maps are added on the way."""

    def __init__(self, out_channels, channels, depth, d_model):
        super().__init__()
        self.ups = nn.ModuleList(
            nn.ConvTranspose2d(coarser, c, 2, stride=2)
            for c, coarser in zip(channels, (*channels[1:], d_model), strict=True)
        )
        self.stages = conv_stages(channels, depth)
        self.head = nn.Conv2d(channels[0], out_channels, 3, padding=1)

    def forward(self, x, features):
        for level in reversed(range(len(features))):
            x = self.stages[level](self.ups[level](x) + features[level])
        return self.head(x)


def zeroed(layer):
    """The layer with weight and, where it has one, bias zero."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class SmallViT(nn.Module):
    """Vision transformer that maps a noisy image to a clean one; 599,689 parameters by default.

    Args:
        image_size: side of the square images of the training, pixels. Images of other sizes can be
            denoised too, see forward.
        patch_size: side of a patch, pixels; has to divide image_size.
        in_channels: colour channels.
        d_model: channels of a token.
        num_layers: transformer blocks.
        num_heads: attention heads of each expert.
        d_ff: hidden channels of the feed-forward network.
        k_attend: budget of each expert; their number is the number of experts.
        dropout: of the attention weights while training.
        channels: feature channels of a convolutional encoder and decoder, from full resolution
            down, in place of the linear patch embedding and un-embedding; patch_size has to be
            2 to the power of their number. Empty: no convolutions.
        conv_depth: NAF blocks at each of their coarser resolutions, in encoder and decoder each.
        residual: the model predicts the difference to the noisy image.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        image_size=32,
        patch_size=4,
        in_channels=3,
        d_model=128,
        num_layers=2,
        num_heads=4,
        d_ff=256,
        k_attend=(32, 64, 128),
        dropout=0.0,
        channels=(),
        conv_depth=2,
        residual=False,
    ):
        super().__init__()
        self.config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        if patch_size < 1 or image_size < 1 or image_size % patch_size:
            raise ValueError(
                "patch_size must divide image_size, got "
                f"image_size={image_size}, patch_size={patch_size}"
            )
        if channels and patch_size != 2 ** len(channels):
            raise ValueError(
                f"{len(channels)} channels make patches of {2 ** len(channels)}, "
                f"got patch_size={patch_size}"
            )
        self.grid = image_size // patch_size
        if channels:
            self.encoder = ConvEncoder(in_channels, channels, conv_depth, d_model)
        else:
            self.patch_embed = nn.Conv2d(in_channels, d_model, patch_size, stride=patch_size)
        self.position = nn.Parameter(0.02 * torch.randn(1, self.grid**2, d_model))
        self.blocks = nn.ModuleList(
            TransformerBlock(d_model, num_heads, d_ff, k_attend, dropout) for _ in range(num_layers)
        )
        if channels:
            self.decoder = ConvDecoder(in_channels, channels, conv_depth, d_model)
        else:
            self.patch_unembed = nn.ConvTranspose2d(d_model, in_channels, patch_size, patch_size)
        # Every block starts as the identity. Otherwise near-uniform attention adds the mean of all
        # tokens to each, and training sits for hundreds of steps where patches are denoised alone.
        for block in self.blocks:
            zeroed(block.attention.merge)
            zeroed(block.ffn[-1])
        if residual:
            zeroed(self.decoder.head if channels else self.patch_unembed)

    def forward(self, noisy, return_routing=False):
        """Denoises images.

        Args:
            noisy: [B, 3, h, w] in [0, 1], h and w multiples of patch_size. The position embedding
                is interpolated (bicubic) to another number of patches than that of the training.
            return_routing: also return what the routers decided.

        Returns:
            Images of the same shape, in [0, 1] in evaluation mode. In training mode the output is
            not clamped: a clamp has no gradient outside its range, and runs died of it. With
            return_routing, a tuple of the images and the list of each block's routing
            probabilities [B, N, E].

        Raises:
            ValueError: the images have another shape.
        """
        patch, channels = self.config["patch_size"], self.config["in_channels"]
        if noisy.ndim != 4 or noisy.shape[1] != channels or noisy.shape[2:].numel() == 0:
            raise ValueError(f"expected images [B, {channels}, h, w], got {list(noisy.shape)}")
        if noisy.shape[2] % patch or noisy.shape[3] % patch:
            raise ValueError(
                f"height and width have to be multiples of the patch size {patch}, "
                f"got {list(noisy.shape)}"
            )
        x, features = self.embed(noisy)
        routings = []
        for block in self.blocks:
            x, routing = block(x)
            routings.append(routing)
        grid = (noisy.shape[2] // patch, noisy.shape[3] // patch)
        x = x.transpose(1, 2).unflatten(2, grid)
        image = self.decoder(x, features) if features else self.patch_unembed(x)
        if self.config["residual"]:
            image = noisy + image
        if not self.training:
            image = image.clamp(0, 1)
        return (image, routings) if return_routing else image

    def embed(self, noisy):
        """[B, 3, h, w] -> tokens with their position [B, N, D], and the encoder's feature maps."""
        if self.config["channels"]:
            x, features = self.encoder(noisy)
        else:
            x, features = self.patch_embed(noisy), []  # [B, D, h / patch, w / patch]
        return x.flatten(2).transpose(1, 2) + self._position_for(x.shape[2:]), features

    def _position_for(self, grid):
        if tuple(grid) == (self.grid, self.grid):
            return self.position
        learned = self.position.transpose(1, 2).unflatten(2, (self.grid, self.grid))
        return F.interpolate(learned, grid, mode="bicubic").flatten(2).transpose(1, 2)


# `--model`: arguments of SmallViT.
MODELS = {
    "published": {},
    "refined": {
        "d_model": 64,
        "num_heads": 1,
        "d_ff": 128,
        "channels": (16, 64),
        "conv_depth": 3,
        "residual": True,
    },
}


def count_parameters(model):
    """Number of trainable scalars."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


# ---------------------------------------------------------------------------------------------
# Evaluation
# ---------------------------------------------------------------------------------------------


@dataclass
class Evaluation:
    """What `evaluate` measured.

    Attributes:
        mse: mean squared error over all pixels, images in [0, 1].
        noisy_psnr: float64 [n], dB, of the noisy images.
        psnr: float64 [n], dB, of the denoised images.
        ssim: float64 [n], of the denoised images.
        utilisation: float32 [blocks, E], mean routing probability of each expert.
    """

    mse: float
    noisy_psnr: np.ndarray
    psnr: np.ndarray
    ssim: np.ndarray
    utilisation: np.ndarray

    def summary(self):
        """The figures that a checkpoint stores, as plain numbers."""
        return {
            "mse": self.mse,
            "noisy_psnr_mean": float(self.noisy_psnr.mean()),
            "psnr_mean": float(self.psnr.mean()),
            "psnr_std": float(self.psnr.std()),
            "ssim_mean": float(self.ssim.mean()),
            "ssim_std": float(self.ssim.std()),
            "images": len(self.psnr),
            "utilisation": self.utilisation.tolist(),
        }


def psnr(restored, clean):
    """PSNR in dB of one image by scikit-image; arrays [3, h, w] in [0, 1]."""
    with np.errstate(divide="ignore"):  # equal images have an infinite PSNR
        return peak_signal_noise_ratio(clean, restored, data_range=1.0)


def ssim(restored, clean):
    """SSIM of one image by scikit-image, 7×7 window; arrays [3, h, w] in [0, 1]."""
    return structural_similarity(clean, restored, data_range=1.0, channel_axis=0)


def eval_batches(dataset, device):
    """Batches of an evaluation on a device, of a size that fits a CPU's cache or fills a GPU.

    It depends on the kind of device alone, so that a figure never depends on how a script batches.
    """
    return dataset.batches(64 if device.type == "cpu" else 1000)


def denoise_batches(model, dataset):
    """Yields (noisy, restored, clean, routings) of every batch, in evaluation mode.

    The images come back on the CPU: float32 [B, 3, h, w] in [0, 1]. routings is the list of each
    block's routing probabilities [B, N, E], on the device of the model.
    """
    device = next(model.parameters()).device
    model.eval()
    for noisy, clean, _ in eval_batches(dataset, device):
        with torch.inference_mode():
            restored, routings = model(noisy.to(device), return_routing=True)
        yield noisy, restored.cpu(), clean, routings


def validation_batches(dataset, device):
    """All of a data set as a list of (noisy, clean) batches that stay on a device.

    The noise is the same after every epoch; drawing it anew would take longer than a GPU validates.
    """
    batches = eval_batches(dataset, device)
    return [(noisy.to(device), clean.to(device)) for noisy, clean, _ in batches]


def validation_mse(model, batches):
    """Mean squared error over all pixels.

    Args:
        model: SmallViT; it is left in evaluation mode.
        batches: of `validation_batches`, on the device of the model. Under torchrun, each process
            takes its share of them.
    """
    model.eval()
    with torch.inference_mode():
        errors = torch.zeros(len(batches), device=batches[0][0].device)
        for index in my_share(range(len(batches))):
            noisy, clean = batches[index]
            errors[index] = F.mse_loss(model(noisy), clean)
        errors = sum_over_processes(errors).tolist()
    images = [len(clean) for _, clean in batches]
    return sum(e * n for e, n in zip(errors, images, strict=True)) / sum(images)


def evaluate(model, dataset):
    """Denoises a whole dataset and measures every image.

    Args:
        model: SmallViT; it is left in evaluation mode.
        dataset: NoisyImageDataset.

    Returns:
        Evaluation.
    """
    squared_error, scores, load = 0.0, [], 0.0
    with tqdm(total=len(dataset), desc="testing", unit="img", leave=False, disable=None) as bar:
        for noisy, restored, clean, routings in denoise_batches(model, dataset):
            squared_error += F.mse_loss(restored, clean).item() * len(clean)
            for x, y, target in zip(noisy.numpy(), restored.numpy(), clean.numpy(), strict=True):
                scores.append((psnr(x, target), psnr(y, target), ssim(y, target)))
            load += torch.stack([r.mean(1).sum(0) for r in routings]).cpu().numpy()
            bar.update(len(clean))
    scores = np.array(scores, dtype=np.float64).T
    return Evaluation(squared_error / len(dataset), *scores, load / len(dataset))


def result_line(psnr, ssim, dataset_name):
    """The line that ends every script which evaluates."""
    return (
        f"PSNR {psnr.mean():.2f} ± {psnr.std():.2f} dB   "
        f"SSIM {ssim.mean():.4f} ± {ssim.std():.4f}   "
        f"images {len(psnr)}   dataset {dataset_name}"
    )


# ---------------------------------------------------------------------------------------------
# Checkpoints
# ---------------------------------------------------------------------------------------------


def load_checkpoint(path, keys=("model", "config", "recipe", "epoch", "val_mse")):
    """Reads a file that this script wrote, without running code from it.

    Args:
        path: the file.
        keys: what it has to hold.

    Returns:
        dict with the model's state_dict ("model"), its "config", and what is known about its
        training: dataset, recipe, epoch, val_mse, test metrics, seed, versions.

    Raises:
        UserError: the file is missing, damaged, unsafe, or no checkpoint of this collection.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: no such checkpoint; train one or name another with --checkpoint")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(
            f"{path} is damaged or holds more than tensors and plain values, which could run code "
            "when loaded; use a checkpoint that denoising_experiment_proper.py wrote"
        ) from None
    except (OSError, RuntimeError, EOFError, ValueError, KeyError):
        raise UserError(
            f"{path} is not a complete checkpoint (truncated or another kind of file); "
            "copy or train it again"
        ) from None
    if not isinstance(checkpoint, dict) or not set(keys) <= checkpoint.keys():
        raise UserError(
            f"{path} does not hold {', '.join(keys)}; "
            "use a checkpoint that denoising_experiment_proper.py wrote"
        )
    return checkpoint


def model_of(checkpoint, path):
    """The SmallViT of a loaded checkpoint, in evaluation mode, on the CPU.

    Raises:
        UserError: configuration and weights do not make a SmallViT; `path` is named in it.
    """
    try:
        model = SmallViT(**checkpoint["config"])
        model.load_state_dict(checkpoint["model"])
    except (TypeError, ValueError, RuntimeError, AttributeError):
        raise UserError(
            f"{path} is of another architecture than SmallViT here; "
            "use a checkpoint that denoising_experiment_proper.py wrote"
        ) from None
    return model.eval()


def load_model(path):
    """The trained SmallViT of a checkpoint file, in evaluation mode, on the CPU.

    Raises:
        UserError: as load_checkpoint and model_of do.
    """
    return model_of(load_checkpoint(path), path)


def load_for_evaluation(args, same_images=False):
    """What a script that reads a model starts with.

    Args:
        args: checkpoint, dataset, data_dir, noise_level (None: the model's), device and threads of
            the command line.
        same_images: refuse a data set other than the one of the training, and keep a range of σ;
            otherwise its middle is taken.

    Returns:
        (checkpoint dict, SmallViT on the device, ImageSource, σ).

    Raises:
        UserError: one of them cannot be had.
    """
    device = select_device(args.device, args.threads)
    checkpoint = load_checkpoint(args.checkpoint)
    model = model_of(checkpoint, args.checkpoint).to(device)
    recipe = checkpoint["recipe"]
    refusal = UserError(
        f"{args.checkpoint} was trained and tested on {recipe['dataset']}; "
        "name the same images with --dataset"
    )
    if same_images and not args.dataset and recipe["dataset"] not in ("photos", "CIFAR-10"):
        raise refusal  # before anything is downloaded
    dataset = args.dataset or ("photos" if recipe["dataset"] == "photos" else "cifar10")
    source = load_images(dataset, args.data_dir, recipe["seed"])
    if same_images and source.name != recipe["dataset"]:
        raise refusal
    noise_level = recipe["noise_level"] if args.noise_level is None else args.noise_level
    if not same_images:
        noise_level = sum(noise_range(noise_level)) / 2
    print(
        f"{args.checkpoint}: {count_parameters(model):,} parameters, epoch {checkpoint['epoch']} "
        f"of {recipe['epochs']}, trained on {recipe['dataset']} with "
        f"{noise_text(recipe['noise_level'])}"
    )
    return checkpoint, model, source, noise_level


# ---------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------


def make_optimizer(model, lr, name="adamw", weight_decay=1e-4):
    """The optimizer of `--optimizer`.

    Args:
        model: its parameters are trained.
        lr: learning rate.
        name: "adamw", as published, all parameters in one fused step; or "muon", which
            orthogonalises the momentum of weight matrices and convolution kernels (Jordan et al.
            2024), scaled so that a learning rate means what it means to AdamW (Liu et al. 2025).
            Parameters with fewer than 4 rows or columns, such as biases, the position embedding and
            depthwise kernels get AdamW (β₂ = 0.95).
        weight_decay: decoupled, times the learning rate; "muon" has it for matrices alone.
    """
    if name == "muon":
        return Muon(model.parameters(), lr, weight_decay)
    return torch.optim.AdamW(model.parameters(), lr, weight_decay=weight_decay, fused=True)


def autocast(device, dtype):
    """Context in which matrix products run in dtype; float32 leaves everything as it is."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def compiled(model, noisy, dtype):
    """The model as torch.compile makes it, or itself where that does not work, which it says.

    Args:
        model: SmallViT in training mode.
        noisy: [B, 3, h, w], an example of the batches to come; batches of another size are left to
            the model itself.
        dtype: of its autocast.
    """
    failure = None
    try:
        # Several processes record no whole step, see `replayed`; torch records the model for them.
        graphs = noisy.device.type == "cuda" and world_size() > 1
        mode = "reduce-overhead" if graphs else "default"
        fast = torch.compile(model, mode=mode, dynamic=False)
        for _ in range(3 if graphs else 1):  # compiles; records CUDA graphs; replays them
            model.zero_grad()
            with autocast(noisy.device, dtype):
                restored, routings = fast(noisy, return_routing=True)
            sum(output.float().sum() for output in (restored, *routings)).backward()
    except Exception as error:  # every layer below has its own exceptions
        failure = error
    model.zero_grad()
    if any_process(failure is not None, noisy.device):
        why = type(failure).__name__ if failure else "in another process"
        print(f"torch.compile does not work here ({why}); going on without it")
        return model
    return fast


def training_step(
    model,
    optimizer,
    noisy,
    clean,
    batch_size=None,
    dtype=torch.float32,
    loss="mse",
    balance_weight=BALANCE_WEIGHT,
):
    """One step on a batch, or on this process's share of it.

    Args:
        model: SmallViT in training mode, or what `compiled` or `parallel` made of it.
        optimizer: of its parameters.
        noisy, clean: [B, 3, h, w] on the model's device.
        batch_size: images of all processes together; default B.
        dtype: bfloat16 runs matrix products under autocast; weights, tokens and losses
            stay in float32.
        loss: "mse", or "psnr": minus the mean PSNR of the images in dB, times PSNR_WEIGHT; PSNR_EPS
            is added to each image's MSE (HINet, Chen et al. 2021).
        balance_weight: of the load-balancing loss of each block.

    Returns:
        float32 [2] on the model's device: mean squared error and the sum of the blocks'
        load-balancing losses, both of the whole batch.
    """
    share = len(noisy)
    batch_size = batch_size or share
    if share == 0:  # kernels want an image; its weight is zero
        noisy = clean = noisy.new_zeros(1, *noisy.shape[1:])
    with autocast(noisy.device, dtype):
        restored, routings = model(noisy, return_routing=True)
    errors = F.mse_loss(restored.float(), clean, reduction="none").mean((1, 2, 3))  # [B]
    objectives = errors if loss == "mse" else PSNR_WEIGHT * 10 * (errors + PSNR_EPS).log10()
    loads = torch.stack([routing.float().sum((0, 1)) / routing.shape[1] for routing in routings])
    # Sums, not means: shares of a batch may differ in size.
    sums = torch.cat([errors.sum().view(1), objectives.sum().view(1), loads.flatten()])
    sums = sum_over_processes(sums * min(share, 1) / batch_size)
    mse, objective, *loads = sums.split([1, 1] + [loads.shape[1]] * len(loads))
    balance = sum(load_balancing_loss(load.unsqueeze(0)) for load in loads)
    optimizer.zero_grad()
    (objective.squeeze() + balance_weight * balance).backward()
    nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
    optimizer.step()
    return torch.stack([mse.squeeze(), balance]).detach()


def train(model, train_set, val_set, args, files, recipe, describe):
    """Trains until args.epochs are done, keeping the best checkpoint by validation loss.

    Args:
        model: SmallViT.
        train_set, val_set: NoisyImageDataset; the first one on the model's device.
        args: epochs, batch_size, lr, loss, optimizer, seed, lossless_share, flip, dtype, compile
            and resume of the command line.
        files: RunFiles.
        recipe: dict of all that decides the result; a run resumes only under the same recipe.
        describe: function(model state_dict, epoch, val_mse) -> checkpoint dict.

    Returns:
        (history, seconds): one dict per epoch, and the training time. The history is shorter than
        args.epochs when the user asked to stop.

    Raises:
        UserError: the loss is not finite any more, or there is nothing to resume.
    """
    optimizer = make_optimizer(model, args.lr, args.optimizer, args.weight_decay)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)
    progress = {"epoch": 1, "step": 0, "loss_sums": [0.0, 0.0], "seconds": 0.0, "history": []}
    if args.resume:
        progress = _resume(files, recipe, model, optimizer, scheduler)
    elif rank() == 0:
        files.keep_existing()
    device, dtype = train_set.device, getattr(torch, args.dtype)
    validation = validation_batches(val_set, device)
    fast = model.train()
    if args.compile:
        example = next(train_set.shuffled_batches(args.batch_size, args.seed, epoch=1))[0]
        fast = compiled(fast, my_share(example), dtype)
    fast = parallel(fast)
    take_step = partial(training_step, fast, optimizer, dtype=dtype, loss=args.loss)
    take_whole_step = replayed(take_step, optimizer)

    def save_progress():
        save(
            {
                "recipe": recipe,
                "progress": progress,
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "scheduler": scheduler.state_dict(),
            },
            files.resume,
        )

    def save(state, path):
        if rank() == 0:
            save_atomically(state, path)

    def check_finite(loss, step):
        if not math.isfinite(loss):
            kept = f"{files.checkpoint} keeps the best model so far" if history else ""
            raise UserError(
                f"the loss became {loss} in epoch {progress['epoch']}, step {step}; "
                f"{kept or 'no epoch was complete'}; try a smaller --lr than {args.lr:g}"
            )

    history = progress["history"]
    steps = math.ceil(len(train_set) / args.batch_size)
    done = (progress["epoch"] - 1) * steps + progress["step"]
    bar = tqdm(
        total=args.epochs * steps,
        initial=done,
        unit="step",
        disable=True if rank() else None,
        dynamic_ncols=True,
    )
    recent = deque(maxlen=50)
    unread = []  # (images, losses) of the last steps
    steps_per_read = CPU_STEPS_PER_READ if device.type == "cpu" else GPU_STEPS_PER_READ

    def read_losses():
        losses = torch.stack([losses for _, losses in unread]).tolist()
        first = progress["step"] - len(unread) + 1
        for step, ((images, _), (mse, balance)) in enumerate(
            zip(unread, losses, strict=True), first
        ):
            check_finite(mse + BALANCE_WEIGHT * balance, step)
            progress["loss_sums"][0] += mse * images
            progress["loss_sums"][1] += balance * images
            recent.append(mse)
        mean = sum(recent) / len(recent)
        bar.set_postfix_str(f"mse {mean:.4f}, {-10 * math.log10(mean):.2f} dB", False)
        bar.update(len(unread))
        unread.clear()

    def draw():
        if history and rank() == 0:
            draw_history(history, files)

    with StopRequest() as stop, bar, ExitStack() as at_the_end:
        at_the_end.callback(draw)  # not after every epoch: a GPU takes 100 steps in that time
        while progress["epoch"] <= args.epochs:
            epoch, started = progress["epoch"], time.perf_counter()
            bar.set_description(f"epoch {epoch}/{args.epochs}")
            model.train()
            for noisy, clean, _ in train_set.shuffled_batches(
                args.batch_size,
                args.seed,
                epoch,
                args.lossless_share,
                start=progress["step"],
                flip=args.flip,
            ):
                images, noisy, clean = len(clean), my_share(noisy), my_share(clean)
                whole = images == min(args.batch_size, len(train_set))
                step = take_whole_step if whole else take_step
                with torch.compiler.set_stance("default" if whole else "force_eager"):
                    losses = step(noisy, clean, images)
                unread.append((images, losses))
                progress["step"] += 1
                if len(unread) == steps_per_read or progress["step"] == steps:
                    read_losses()
                    stopping = any_process(stop.asked, device)
                    if stopping:
                        break
            progress["seconds"] += time.perf_counter() - started
            if stopping and progress["step"] < steps:
                save_progress()
                if not history:  # the first epoch was cut short: its model is the best there is
                    val_mse = validation_mse(model, validation)
                    save(describe(model.state_dict(), epoch, val_mse), files.checkpoint)
                break

            val_mse = validation_mse(model, validation)
            check_finite(val_mse, progress["step"])
            history.append(
                {
                    "epoch": epoch,
                    "train_mse": progress["loss_sums"][0] / len(train_set),
                    "val_mse": val_mse,
                    "balance_loss": progress["loss_sums"][1] / len(train_set),
                    "lr": scheduler.get_last_lr()[0],
                    "seconds": progress["seconds"],
                }
            )
            bar.write(
                f"epoch {epoch:3d}  train {history[-1]['train_mse']:.5f}  val {val_mse:.5f} "
                f"({-10 * math.log10(val_mse):.2f} dB)  lr {history[-1]['lr']:.1e}  "
                f"{progress['seconds']:.0f} s",
                file=sys.stdout,
            )
            sys.stdout.flush()
            if val_mse == min(row["val_mse"] for row in history):
                save(describe(model.state_dict(), epoch, val_mse), files.checkpoint)
            scheduler.step()
            progress |= {"epoch": epoch + 1, "step": 0, "loss_sums": [0.0, 0.0]}
            save_progress()
            if rank() == 0:
                write_history(history, files)
            if stopping:
                break
    wait_for_all()
    return history, progress["seconds"]


def _resume(files, recipe, model, optimizer, scheduler):
    if not files.resume.exists():
        raise UserError(
            f"--resume: there is no interrupted run at {files.resume}; start one without --resume"
        )
    state = load_checkpoint(files.resume, ("recipe", "progress", "model", "optimizer", "scheduler"))
    check_same_recipe(
        state["recipe"],
        recipe,
        "--resume: the interrupted run had",
        "repeat its options, or start a new run without --resume",
    )
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])
    return state["progress"]


def check_same_recipe(earlier, recipe, whose, advice):
    """Raises a UserError that names the first entry of `recipe` that differs in the earlier one."""
    for name, value in recipe.items():
        if earlier.get(name) != value:
            raise UserError(f"{whose} {name} {earlier.get(name)}, this one has {value}; {advice}")


def recipe_options(args):
    """Those options of the command line that decide the result of any training, as plain values."""
    return {
        "batch_size": args.batch_size,
        "lr": args.lr,
        "loss": args.loss,
        "optimizer": args.optimizer,
        "weight_decay": args.weight_decay,
        "noise_level": args.noise_level,
        "lossless_share": args.lossless_share,
        "flip": bool(args.flip),
        "dtype": args.dtype,
    }


def results_box(rows):
    """A framed table of (name, value) strings."""
    width = max(len(name) for name, _ in rows)
    lines = [f" {name:<{width}}  {value} " for name, value in rows]
    inner = max(map(len, lines))
    title = " FINAL RESULTS "
    return "\n".join(
        [f"╔{title:═^{inner}}╗", *(f"║{line:<{inner}}║" for line in lines), f"╚{'═' * inner}╝"]
    )


def parse_args():
    parser = make_parser(
        "Trains SmallViT to remove Gaussian noise, keeps the best checkpoint by validation loss "
        "and tests it. Writes FILE, and beside it FILE's name with _history.csv, _curve.png and, "
        "until the run is complete, _resume.pt.",
        *("dataset", "data-dir", "epochs", "batch-size", "lr", "seed", "device", "threads"),
        *("dtype", "compile", "loss", "optimizer", "weight-decay", "flip", "lossless-share"),
    )
    add_noise_level(parser)
    add_output(parser, CHECKPOINT, "checkpoint to write")
    parser.add_argument(
        "--model",
        choices=MODELS,
        default="published",
        help="published: the architecture of the original; refined: the same blocks between a "
        "convolutional encoder and decoder, predicting the noise (default: %(default)s)",
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on with the interrupted run of the same --output"
    )
    return parser.parse_args()


def main():
    args = parse_args()
    with joined(select_device(args.device, args.threads)) as device:
        return run(args, device)


def run(args, device):
    """Trains and tests as the command line asks; returns the exit code."""
    files = RunFiles(Path(args.output))
    files.check()
    with first_process_first():
        source = load_images(args.dataset, args.data_dir, args.seed)
    train_set, val_set, test_set = noisy_splits(source, args.noise_level, args.lossless_share)

    torch.manual_seed(args.seed)
    model = SmallViT(**MODELS[args.model]).to(device)
    recipe = {
        "dataset": source.name,
        "train_images": len(train_set),
        "val_images": len(val_set),
        "epochs": args.epochs,
        "seed": args.seed,
        "model": args.model,
        "parameters": count_parameters(model),
        **recipe_options(args),
    }
    print(
        f"{source.name}: {len(train_set):,} training, {len(val_set):,} validation, "
        f"{len(test_set):,} test images; {count_parameters(model):,} parameters on {device}"
        + (f", {world_size()} processes" if world_size() > 1 else "")
    )

    def describe(state_dict, epoch, val_mse):
        return {
            "model": state_dict,
            "config": model.config,
            "recipe": recipe,
            "epoch": epoch,
            "val_mse": val_mse,
            "torch_version": str(torch.__version__),
        }

    history, seconds = train(model, train_set.to(device), val_set, args, files, recipe, describe)
    if len(history) < args.epochs:
        print(
            f"stopped; the run's state is in {files.resume}, the best model so far in "
            f"{files.checkpoint}; to go on, repeat the command with --resume"
        )
        return 130

    if rank():
        return 0  # the first process tests
    checkpoint = load_checkpoint(files.checkpoint)
    result = evaluate(model_of(checkpoint, files.checkpoint).to(device), test_set)
    checkpoint |= {"test": result.summary(), "train_seconds": seconds}
    save_atomically(checkpoint, files.checkpoint)
    files.resume.unlink(missing_ok=True)
    print(
        results_box(
            [
                (
                    "data set",
                    f"{source.name}, {len(test_set):,} test images, {noise_text(args.noise_level)}",
                ),
                ("parameters", f"{count_parameters(model):,}"),
                ("training", f"{args.epochs} epochs in {seconds / 60:.1f} min on {device}"),
                (
                    "best epoch",
                    f"{checkpoint['epoch']}, validation MSE {checkpoint['val_mse']:.5f}",
                ),
                (
                    "noisy PSNR",
                    f"{result.noisy_psnr.mean():.2f} ± {result.noisy_psnr.std():.2f} dB",
                ),
                ("denoised PSNR", f"{result.psnr.mean():.2f} ± {result.psnr.std():.2f} dB"),
                ("denoised SSIM", f"{result.ssim.mean():.4f} ± {result.ssim.std():.4f}"),
                *(
                    (f"experts, block {block}", " / ".join(f"{100 * p:.1f} %" for p in load))
                    for block, load in enumerate(result.utilisation, 1)
                ),
            ]
        )
    )
    print(f"wrote {files.checkpoint}, {files.history} and {files.curve}")
    print(result_line(result.psnr, result.ssim, source.name))
    return 0


if __name__ == "__main__":
    run_main(main)
