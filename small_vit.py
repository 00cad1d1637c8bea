"""The denoiser: a small vision transformer around the attention layer, and its checkpoints."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptive_attention_moe import AdaptiveAttentionMoE, check_heads
from common.options import Number, check_fields, option
from common.user_errors import UserError, printable
from experiment import tiling
from experiment.checkpoints import Trained, read_checkpoint, recipe_of_file
from experiment.command_line import PUBLISHED_CHECKPOINT
from layers.conv_stages import ConvDecoder, ConvEncoder, NAFBlock, ResidualConv, reflected

SIZE, DEPTH = (Number(int, least, most=2**16 - 1) for least in (1, 0))
SHARE = Number(float, above=True, most=1)


@dataclass(frozen=True)
class ViTConfig:
    """What a SmallViT is built from, or a ValueError; the defaults are the published model."""

    in_channels: int = option(3, "or 4, with a mask of the known pixels", choices=(3, 4))
    image_size: int = option(32, "side of the training's images; others work as well", type=SIZE)
    patch_size: int = option(4, "side of a patch, pixels; has to divide image_size", type=SIZE)
    d_model: int = option(128, "channels of a token, D", type=SIZE)
    num_layers: int = option(2, "transformer blocks", type=SIZE)
    num_heads: int = option(4, "attention heads of each expert", type=SIZE)
    d_ff: int = option(256, "hidden channels of the feed-forward network", type=SIZE)
    k_attend: tuple = option((32, 64, 128), "budget of each expert", type=Number(int, 1))
    # Of a convolutional encoder and decoder in place of the linear patch embedding, from full
    # resolution down; patch_size has to be 2 to the power of their number.
    channels: tuple = option((), "feature channels of convolutions", type=Number(int, 1))
    conv_depth: int = option(2, "NAF blocks at each of their coarser resolutions", type=DEPTH)
    residual: bool = option(False, "whether it predicts the difference to the noisy image")
    positions: bool = option(True, "whether tokens get a learned position embedding")
    local: bool = option(False, "whether a 3×3 depthwise convolution stands beside attention")
    capacity: float | None = option(None, "share of the tokens that attend", type=SHARE)

    def __post_init__(self):
        check_fields(self)
        check_heads(self.d_model, self.num_heads)
        if not self.k_attend:
            raise ValueError("k_attend needs one budget per expert, got none")
        if self.image_size % self.patch_size:
            raise ValueError(
                "patch_size must divide image_size, got "
                f"image_size={self.image_size}, patch_size={self.patch_size}"
            )
        if self.channels and self.patch_size != 2 ** len(self.channels):
            raise ValueError(
                f"{len(self.channels)} channels make patches of {2 ** len(self.channels)}, "
                f"got patch_size={self.patch_size}"
            )


SHIPPED = Path(__file__).parent / "models"  # folder of trained models

# `--model`
MODELS = {
    "published": ViTConfig(),
    "refined": ViTConfig(
        d_model=64, num_heads=1, d_ff=128, channels=(16, 64), conv_depth=3, residual=True
    ),
}
# What learns fastest on a CPU; a budget of 64 keeps all tokens of an image.
MODELS["quick"] = replace(MODELS["refined"], k_attend=(64,), conv_depth=2, local=True)
# A quarter of the tokens attends by default, wherever the router sends them.
MODELS["routed"] = ViTConfig(k_attend=(64,), local=True, capacity=0.25)
# No positions: a photograph has other and more of them than a crop. The budget is that of the
# shipped models; FINAL_REPORT.md finds dense attention ahead of it.
MODELS["photographs"] = ViTConfig(
    image_size=64,
    num_heads=1,
    k_attend=(16,),
    channels=(24, 64),
    conv_depth=3,
    residual=True,
    positions=False,
    local=True,
)
# For a camera's noise: the same weights keep all keys.
MODELS["photo"] = replace(MODELS["photographs"], k_attend=(2**30,))
MODELS["routed-photographs"] = replace(MODELS["photographs"], capacity=0.25)


class TransformerBlock(nn.Module):
    """Pre-norm: x + MoE(LN(x)), then x + FFN(LN(x)).  [B, N, D] -> [B, N, D], routing.

    With `local`, a 3×3 depthwise convolution over the grid of tokens stands beside attention,
    x + MoE(LN(x)) + conv(LN(x)): it also tells where neighbours are, as positions would.
    """

    def __init__(self, config):
        super().__init__()
        d_model, d_ff = config.d_model, config.d_ff
        self.local = None
        if config.local:
            self.local = nn.Conv2d(d_model, d_model, 3, padding=1, groups=d_model)
        self.norm1 = nn.LayerNorm(d_model)
        self.attention = AdaptiveAttentionMoE(
            d_model, config.num_heads, config.k_attend, config.capacity
        )
        self.norm2 = nn.LayerNorm(d_model)
        self.ffn = nn.Sequential(nn.Linear(d_model, d_ff), nn.GELU(), nn.Linear(d_ff, d_model))

    def last_layers(self):
        return [self.attention.merge, self.ffn[-1]] + ([self.local] if self.local else [])

    def forward(self, x, grid=None):
        """Args: tokens [B, N, D]; (rows, columns) of their grid, which `local` needs."""
        normed = self.norm1(x)
        attended, routing = self.attention(normed)  # [B, N, D], [B, N, E]
        x = x + attended
        if self.local:
            image = normed.transpose(1, 2).unflatten(2, grid)  # [B, D, rows, columns]
            x = x + self.local(image).flatten(2).transpose(1, 2)
        return x + self.ffn(self.norm2(x)), routing


class SmallViT(nn.Module):
    """Vision transformer that maps a noisy image to a clean one; 599,689 parameters by default."""

    # What the checkpoint says that `load_model` read: its recipe, the noise that it is for.
    trained: Trained | None = None

    def __init__(self, config=MODELS["published"]):
        super().__init__()
        self.config = config
        d_model, patch = config.d_model, config.patch_size
        self.grid = config.image_size // patch
        if config.channels:
            settings = (config.channels, config.conv_depth, d_model)
            self.encoder = ConvEncoder(*settings, config.in_channels)
        else:
            self.patch_embed = nn.Conv2d(config.in_channels, d_model, patch, stride=patch)
        if config.positions:
            self.position = nn.Parameter(0.02 * torch.randn(1, self.grid**2, d_model))
        self.blocks = nn.ModuleList(TransformerBlock(config) for _ in range(config.num_layers))
        if config.channels:
            self.decoder = ConvDecoder(*settings)
        else:
            self.patch_unembed = nn.ConvTranspose2d(d_model, 3, patch, stride=patch)
        self.start_as_identity()

    def start_as_identity(self):
        """Zeroes the last layer of every residual branch; all else keeps torch's initialisation.

        Otherwise near-uniform attention adds the mean of all tokens to each, and training sits for
        hundreds of steps where every patch is denoised by itself.
        """
        for module in self.modules():
            if isinstance(module, TransformerBlock | ResidualConv | NAFBlock):
                for layer in module.last_layers():
                    zero_(layer)
        if self.config.residual:
            zero_(self.decoder.head if self.config.channels else self.patch_unembed)

    @property
    def capacity(self):
        """Share of the tokens that attend in each block, above 0, at most 1; None: no such choice.

        A model that was built with one may be set to another at any time; else a ValueError.
        """
        return getattr(self.blocks[0].attention, "capacity", None)  # studies put in other layers

    @capacity.setter
    def capacity(self, share):
        if (share is None) != (self.capacity is None):
            raise ValueError("whether there is a capacity is for the model's configuration to say")
        if share is not None:
            for block in self.blocks:
                block.attention.capacity = share

    def forward(self, noisy: Tensor) -> tuple[Tensor, list[Tensor]]:
        """[B, in_channels, h, w] -> images [B, 3, h, w] and each block's routing [B, N, E].

        Of any h and w: the image is continued by reflection to multiples of patch_size, and the
        position embedding interpolated (bicubic). In evaluation mode the result is in [0, 1]. In
        training mode it is not clamped: a clamp has no gradient outside its range, and a model that
        once paints everything black would stay black. A ValueError for another shape.
        """
        patch, (*_, height, width) = self.config.patch_size, noisy.shape
        channels = self.config.in_channels
        if noisy.ndim != 4 or noisy.shape[1] != channels or not height * width:
            raise ValueError(f"expected images [B, {channels}, h, w], got {list(noisy.shape)}")
        noisy = reflected(noisy, -height % patch, -width % patch)
        x, features = self.embed(noisy)  # [B, N, D]
        grid = (noisy.shape[2] // patch, noisy.shape[3] // patch)
        routings = []
        for block in self.blocks:
            x, routing = block(x, grid)  # [B, N, D], [B, N, E]
            routings.append(routing)
        x = x.transpose(1, 2).unflatten(2, grid)  # [B, D, h / patch, w / patch]
        image = self.decoder(x, features) if features else self.patch_unembed(x)  # [B, 3, h, w]
        if self.config.residual:
            image = noisy[:, :3] + image
        if channels == 4:
            image = torch.where(noisy[:, 3:] > 0, noisy[:, :3], image)
        image = image[..., :height, :width]
        return image if self.training else image.clamp(0, 1), routings

    def embed(self, noisy):
        """[B, 3, h, w] -> tokens with their position [B, N, D], and the encoder's feature maps."""
        if self.config.channels:
            x, features = self.encoder(noisy)
        else:
            x, features = self.patch_embed(noisy), []  # [B, D, h / patch, w / patch]
        tokens = x.flatten(2).transpose(1, 2)
        if self.config.positions:
            tokens = tokens + self.positions_of(x.shape[2:])
        return tokens, features

    def positions_of(self, grid):
        """The position embedding of a grid of (rows, columns) patches, [1, rows · columns, D]."""
        if tuple(grid) == (self.grid, self.grid):
            return self.position
        learned = self.position.transpose(1, 2).unflatten(2, (self.grid, self.grid))
        return F.interpolate(learned, grid, mode="bicubic").flatten(2).transpose(1, 2)

    def described(self) -> str:
        """What it is and what it was trained for, of a model that was loaded: one line."""
        sentence = f"{self.trained.path}: {count_parameters(self):,} parameters, {self.trained}"
        return printable(sentence)

    denoise = tiling.denoise  # model.denoise(image): array, PIL image, tensor or path


def with_each_capacity(model: SmallViT, capacities: Iterable[float]) -> Iterator[float]:
    """Yields each capacity, which the model has then; afterwards it has its own again."""
    own = model.capacity
    try:
        for capacity in capacities:
            model.capacity = capacity
            yield capacity
    finally:
        model.capacity = own


def zero_(layer: nn.Module) -> None:
    """Zeroes the weight and, where it has one, the bias of a layer."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


def count_parameters(model: nn.Module) -> int:
    """Number of trainable scalars."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


# Checkpoints ---------------------------------------------------------------------------------


def load_model(path: str | Path) -> SmallViT:
    """The trained model of a checkpoint file, in evaluation mode, on the CPU; else a UserError.

    The name of a shipped one, such as "photo" or "published", will do where there is no such file.

    What it is for stands in its `trained`: `model.trained.recipe.degradation` is the noise, or what
    else it removes, `model.trained.recipe.crop` tells a model for photographs from one for
    thumbnails, and `model.trained.checkpoint["test"]` has the figures of its test.
    """
    shipped = SHIPPED / f"{path}.pt"
    shipped = SHIPPED.parent / PUBLISHED_CHECKPOINT if str(path) == "published" else shipped
    path = shipped if os.path.isfile(shipped) and not os.path.exists(path) else path
    return build_model(read_checkpoint(path), path)


def build_model(checkpoint: dict, path: str | Path) -> SmallViT:
    """As load_model, of what `read_checkpoint` gave for a path."""
    weights = checkpoint["model"]
    try:
        settings = dict(checkpoint["config"])
        if settings.pop("dropout", 0.0) != 0.0:  # of earlier versions, where nothing ever set it
            raise ValueError
        settings |= {name: tuple(v) for name, v in settings.items() if isinstance(v, list)}
        config = ViTConfig(**settings)
        recipe = recipe_of_file(checkpoint["recipe"], path)
        if config.in_channels != recipe.degradation.channels:
            raise ValueError
        # Every layer has weights of its own: a configuration cannot ask for more than there are.
        if max(config.num_layers * len(config.k_attend), config.conv_depth) > len(weights):
            raise ValueError
        with torch.device("meta"):  # nothing is allocated before the shapes are known to agree
            model = SmallViT(config)
        model.load_state_dict(weights, assign=True)
    except (TypeError, ValueError, KeyError, RuntimeError, AttributeError):
        raise UserError(
            f"{path} is of another architecture than SmallViT here; "
            "use a checkpoint that denoising_experiment_proper.py wrote"
        ) from None
    about = {name: value for name, value in checkpoint.items() if name != "model"}
    model.trained = Trained(str(path), recipe, about)
    return model.eval()


def load_weights(model: SmallViT, path: str | Path) -> None:
    """Gives a SmallViT the weights of a checkpoint, to train on from them; else a UserError.

    Budgets may differ: the same weights keep any number of keys.
    """
    trained = load_model(path)
    for name, value in asdict(model.config).items():
        other = getattr(trained.config, name)
        if other != value and (name != "k_attend" or len(other) != len(value)):
            raise UserError(
                f"{path}: its {name} is {other}, that of the model to train {value}; name another "
                "checkpoint, or the --model and --task of this one"
            )
    model.load_state_dict(trained.state_dict())
