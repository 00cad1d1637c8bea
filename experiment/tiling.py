"""Denoising an image of any size in overlapping tiles: memory grows with a tile, not the image."""

import math
import os
import warnings
from dataclasses import replace

import cv2
import numpy as np
import torch
from PIL import Image
from skimage import restoration  # imported in parts, when they are first used
from torch import Tensor, nn
from tqdm import tqdm

from common.user_errors import reason
from experiment.command_line import autocast
from experiment.cuda_graphs import ReplayedModel
from images.image_sources import SIZE
from images.photo_files import Photo, as_photo, read_photo, without_hidden
from layers.conv_stages import reflected

TILE, OVERLAP = 128, 8  # pixels; best and fastest in the table of `benchmark.py --rows tiles`
PROBE, BLOCK = 1024, 64  # sides of the largest part whose noise is estimated and of its blocks
LEAST_PROBE = 16  # side of the smallest
MOST_CLIPPED = 0.01  # part of a block's values
MOST_WHOLE = 2**19  # pixels of an image that training and tests restore as one


def denoise(
    model: nn.Module,
    image: np.ndarray | Tensor | Image.Image | str | os.PathLike,
    tile: int | None = None,
    overlap: int = OVERLAP,
    dtype: str = "float32",
    strength: float = 1.0,
) -> np.ndarray | Tensor | Image.Image:
    """Denoises an array, a PIL image, a tensor or a file; the method `denoise` of models.

    A ValueError if the image or an argument is not as described.

    An image that fits into a tile is restored as a whole. Otherwise tiles of equal size overlap by
    `overlap` pixels at least, where each fades into the next.

    Args:
        model: SmallViT, or another denoiser of images [B, 3, h, w] in [0, 1], of float32; it is
            left in evaluation mode.
        image: array [h, w, 3] or, grey, [h, w] or [h, w, 1]; uint8, uint16, or float32 in [0, 1]
            (noise may lead out of it). The result has its shape and dtype. Three equal channels
            are a grey image, and stay equal. Of a file, which is read as denoise_image.py does, the
            result is as Pillow has it: upright, uint8 or uint16, [h, w] or [h, w, 3], and with its
            alpha, which stays, [h, w, 2] or [h, w, 4].
            PIL image of mode L, LA, RGB, RGBA or I;16: the result is one, too, with its alpha and
            info; it is not turned.
            Tensor [3, h, w] or [B, 3, h, w] of floats in [0, 1]: the result has its shape and
            device, and float32. Where no `tile` is given, a model for photographs restores images
            of up to MOST_WHOLE = 2¹⁹ pixels as a whole: in seven times the time of tiles, for the
            largest of them. Others are restored as arrays are; [B, 4, h, w], with holes, whole.
        tile, overlap: side of the tiles and overlap of two of them, which is below it, pixels;
            None: `best_tile`.
        dtype: name of that of matrix products; bfloat16 runs them under autocast.
        strength: 1 gives the restored image, 0 the input, what is between a mixture.
    """
    how = {"tile": tile, "overlap": overlap, "dtype": dtype, "strength": strength}
    if isinstance(image, Image.Image | str | os.PathLike):
        return denoise_opened(model, image, **how)
    side = best_tile(model) if tile is None else tile
    if not 0 < overlap < side:
        raise ValueError(f"overlap must be in 1 … tile - 1, got tile={side}, overlap={overlap}")
    if dtype not in ("float32", "bfloat16") or not 0 <= strength <= 1:
        wanted = "dtype must be float32 or bfloat16 and strength in 0 … 1"
        raise ValueError(f"{wanted}, got dtype={dtype!r}, strength={strength!r}")
    if any(parameter.dtype != torch.float32 for parameter in model.parameters()):
        raise ValueError('the model must be float32; for faster products give dtype="bfloat16"')
    if isinstance(image, Tensor):
        return denoise_tensor(model, image, **how)
    if not hasattr(image, "__array__"):
        wanted = "expected an array, a tensor, a PIL image or a path"
        raise ValueError(f"{wanted}, got {type(image).__name__}")
    image = np.asarray(image)
    if image.dtype not in (np.uint8, np.uint16, np.float32) or not image.size:
        wanted = "expected at least one pixel, of uint8, uint16 or float32"
        raise ValueError(f"{wanted}, got {image.dtype} {list(image.shape)}")
    if image.ndim not in (2, 3) or image.shape[2:] not in ((), (1,), (3,)):
        raise ValueError(f"expected [h, w], [h, w, 1] or [h, w, 3], got {list(image.shape)}")
    pixels = image.reshape(*image.shape[:2], -1)
    check_range(pixels)
    if all(np.array_equal(pixels[:, :, 0], pixels[:, :, c]) for c in range(1, pixels.shape[2])):
        pixels = np.ascontiguousarray(pixels[:, :, :1])
    trained = getattr(model, "trained", None)
    unknown = pixels.shape[2] == 1 and not (trained and trained.knows_grey)
    sigma = estimate_noise(pixels) if unknown else 0.0
    on_cpu = next(model.parameters()).device.type == "cpu"
    if on_cpu:
        model.to(memory_format=torch.channels_last)  # convolutions take a quarter less time
    try:
        restored = in_overlapping_tiles(model.eval(), pixels, side, overlap, dtype, strength, sigma)
    finally:
        if on_cpu:  # an optimizer's moments have the usual layout, and its weights have to
            model.to(memory_format=torch.contiguous_format)
    channels = image.size // restored[..., 0].size  # three where they were equal
    return restored.repeat(channels // restored.shape[2], axis=2).reshape(image.shape)


def best_tile(model: nn.Module) -> int:
    """Side of tiles where none is given: TILE, or that of the thumbnails that a model learned from.

    On details of four photographs of scikit-image with σ = 0.2, in such tiles and as a whole, the
    published model has 28.27 and 25.21 dB, `refined` 29.27 and 28.60, `routed` 25.88 and 25.53.
    """
    trained = getattr(model, "trained", None)
    return TILE if not trained or trained.recipe.crop else SIZE


def denoise_tensor(
    model: nn.Module, noisy: Tensor, tile: int | None, overlap: int, dtype: str, strength: float
) -> Tensor:
    """As `denoise`, whose arguments are right."""
    *batch, channels, height, width = noisy.shape if noisy.ndim in (3, 4) else (0, 0, 0)
    if not noisy.is_floating_point() or channels not in (3, 4) or not noisy.numel():
        wanted = "expected a tensor [3, h, w] or [B, 3, h, w] of floats in [0, 1]"
        raise ValueError(f"{wanted}, got {noisy.dtype} {list(noisy.shape)}")
    images = noisy.detach().float().reshape(-1, channels, height, width)
    arrays, pixels = images.permute(0, 2, 3, 1).cpu().numpy(), height * width
    side, most = tile or best_tile(model), MOST_WHOLE if tile is None else 0
    if channels == 4 or max(height, width) <= side or (side == TILE and pixels <= most):
        for array in arrays:
            check_range(array)
        replayed = ReplayedModel(model.eval())
        parts = images.split(max(1, MOST_WHOLE // pixels))  # memory stays that of the largest
        restored = torch.cat([restore(replayed, part, dtype).to(noisy.device) for part in parts])
        restored = images[:, :3].lerp(restored, strength) if strength < 1 else restored
    else:
        arrays = [denoise(model, array, side, overlap, dtype, strength) for array in arrays]
        restored = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).to(noisy.device)
    return restored.reshape(*batch, 3, height, width).contiguous()


def denoise_opened(model: nn.Module, image: Image.Image | str | os.PathLike, **how):
    """As `denoise`, of what Pillow opens or has opened."""
    opened = isinstance(image, Image.Image)
    try:
        photo = as_photo(image) if opened else read_photo(image)
    except Exception as error:  # decoders have their own
        raise ValueError(f"{'PIL image' if opened else image}: {reason(error)}") from None
    array = denoise_photo(model, photo, **how).array()
    array = array[:, :, 0] if array.shape[2] == 1 else array
    if not opened:
        return array
    restored = Image.fromarray(array)
    restored.info = image.info.copy()
    return restored


def denoise_photo(model: nn.Module, photo: Photo, **how) -> Photo:
    """As `denoise`, of what a file holds; colours that alpha 0 hides stay as they are."""
    hidden = photo.alpha is not None and bool((photo.alpha == 0).any())
    pixels = denoise(model, without_hidden(photo) if hidden else photo.pixels, **how)
    if hidden:
        pixels = np.where(photo.alpha > 0, pixels, photo.pixels)
    return replace(photo, pixels=pixels)


def in_overlapping_tiles(
    model: nn.Module,
    pixels: np.ndarray,
    tile: int = TILE,
    overlap: int = OVERLAP,
    dtype: str = "float32",
    strength: float = 1.0,
    sigma: float = 0.0,
) -> np.ndarray:
    """As `denoise`, of [h, w, C] that is known to be right; sigma is the noise of a grey image for
    a model that knows none.
    """
    replayed = ReplayedModel(model)
    rows, columns = (windows(size, tile, overlap) for size in pixels.shape[:2])
    restored, unfinished = np.empty_like(pixels), torch.zeros(0, *pixels.shape[1:])
    bar = tqdm(total=len(rows) * len(columns), unit="tile", leave=False, disable=None)
    for number, (rows_of, fade) in enumerate(rows):
        band = torch.zeros(rows_of.stop - rows_of.start, *pixels.shape[1:])  # [rows, w, C]
        for columns_of, fade_across in columns:
            part = restore_tile(replayed, pixels[rows_of, columns_of], dtype, strength, sigma)
            band[:, columns_of] += fade_across[:, None] * part
            bar.update()
        band *= fade[:, None, None]
        band[: len(unfinished)] += unfinished
        end = rows[number + 1][0].start if number + 1 < len(rows) else len(pixels)
        done, unfinished = band.split([end - rows_of.start, rows_of.stop - end])
        restored[rows_of.start : end] = as_stored(done.numpy(), pixels.dtype)
    bar.close()
    return restored


def restore_any_size(model: nn.Module, noisy: Tensor) -> tuple[Tensor, list[Tensor]]:
    """What the model makes of images [B, 3, h, w]; of one beyond MOST_WHOLE pixels in tiles.

    A whole photograph of 12 megapixels would take hours. In tiles there are no routings.
    """
    if isinstance(model, Tiled):  # whose tiles are replayed; the whole waits for the CPU
        return model(noisy)
    if noisy.shape[2] * noisy.shape[3] <= MOST_WHOLE or noisy.shape[1] != 3:
        return ReplayedModel(model)(noisy)
    image = in_overlapping_tiles(model, noisy[0].permute(1, 2, 0).cpu().numpy())
    return torch.from_numpy(image).permute(2, 0, 1).unsqueeze(0).to(noisy.device), []


class Tiled(nn.Module):
    """A denoiser that restores an image as `denoise` does, in tiles of a side of so many pixels."""

    def __init__(self, model, tile):
        super().__init__()
        self.model, self.tile = model, tile

    def forward(self, noisy):
        """As the model's, without routings.  [1, 3, h, w] -> [1, 3, h, w], on the CPU."""
        image = denoise(self.model, noisy[0].permute(1, 2, 0).cpu().numpy(), self.tile)
        return torch.from_numpy(image).permute(2, 0, 1).unsqueeze(0), []


class InTiles(nn.Module):
    """A denoiser that sees an image as separate tiles, continued by reflection to whole ones."""

    def __init__(self, model, tile):
        super().__init__()
        self.model, self.tile = model, tile

    def forward(self, noisy):
        """As the model's; the routings are of the tiles.  [1, 3, h, w] -> [1, 3, h, w]."""
        tile, (height, width) = self.tile, noisy.shape[2:]
        padded = reflected(noisy, -height % tile, -width % tile)
        tiles = padded[0].unfold(1, tile, tile).unfold(2, tile, tile)  # [3, rows, columns, t, t]
        images, routings = self.model(tiles.permute(1, 2, 0, 3, 4).flatten(0, 1))
        rows = images.unflatten(0, tiles.shape[1:3]).permute(2, 0, 3, 1, 4)
        return rows.flatten(3).flatten(1, 2)[None, :, :height, :width], routings


def windows(size: int, tile: int, overlap: int) -> list[tuple[slice, Tensor]]:
    """[(slice, weights float32 [n])]: evenly spread tiles of a side whose weights sum to 1."""
    tile = min(size, tile)
    count = math.ceil((size - overlap) / (tile - overlap)) if size > tile else 1
    starts = np.linspace(0, size - tile, count).round().astype(int).tolist()
    parts = [slice(start, start + tile) for start in starts]
    ramp = (torch.arange(tile) + 0.5).clamp(max=overlap)
    ramp, total = torch.minimum(ramp, ramp.flip(0)), torch.zeros(size)
    for part in parts:
        total[part] += ramp
    return [(part, ramp / total[part]) for part in parts]


def check_range(pixels: np.ndarray) -> None:
    """Raises a ValueError unless float32 [h, w, C] can be an image in [0, 1] with noise on it.

    Means of blocks tell: noise hardly moves them, another range of values does.
    """
    if pixels.dtype != np.float32:
        return
    if not np.isfinite(pixels).all():
        raise ValueError("expected finite values, got NaN or infinity")
    side = min(8, *pixels.shape[:2])
    height, width = (size // side * side for size in pixels.shape[:2])
    blocks = pixels[:height, :width].reshape(height // side, side, width // side, side, -1)
    low, high = (float(f(blocks.mean((1, 3)))) for f in (np.min, np.max))
    most = 0.05 + 1.25 / side  # four standard deviations of the strongest noise
    if low < -most or high > 1 + most:
        raise ValueError(f"expected values in [0, 1], got about {low:.3g} … {high:.3g}")


@torch.inference_mode()
def restore(replayed: ReplayedModel, noisy: Tensor, dtype: str) -> Tensor:
    """[B, C, h, w] -> float32 [B, 3, h, w] in [0, 1], on the model's device.

    A model of clipped noise sees no other.
    """
    device = next(replayed.model.parameters()).device
    trained = getattr(replayed.model, "trained", None)
    if trained and trained.clipped:
        noisy = noisy.clamp(0, 1)
    noisy = noisy.to(device)
    with autocast(device, dtype):
        return replayed(noisy)[0].float()


@torch.inference_mode()
def restore_tile(replayed, part: np.ndarray, dtype: str, strength: float, sigma: float) -> Tensor:
    """[h, w, C] of a stored dtype -> float32 [h, w, C] in [0, 1] on the CPU.

    The noise of a grey image would be the same in all three colours, which most models have never
    seen and take for structure. Where sigma tells of it, noise that sums to zero over the colours
    makes it independent, with √3 σ for each, and drops out of their mean.
    """
    before = torch.from_numpy(as_float(part))
    noisy = before.permute(2, 0, 1).expand(3, -1, -1).unsqueeze(0)  # grey as three colours
    if sigma:
        colours = torch.randn(noisy.shape, generator=torch.Generator().manual_seed(0))
        noisy = noisy + 3**0.5 * sigma * (colours - colours.mean(1, keepdim=True))
    image = restore(replayed, noisy.contiguous(), dtype)[0].cpu().permute(1, 2, 0)
    image = image if part.shape[2] == 3 else image.mean(2, keepdim=True)
    return before.lerp(image, strength) if strength < 1 else image


def center_crop(image: np.ndarray) -> np.ndarray:
    """The middle of [h, w, C], at most PROBE × PROBE pixels."""
    top, left = (max(0, (size - PROBE) // 2) for size in image.shape[:2])
    return image[top : top + PROBE, left : left + PROBE]


def estimate_noise(image: np.ndarray) -> float:
    """σ of the noise in the middle of [h, w, C], from wavelets, in [0, 1]; 0 below LEAST_PROBE.

    It is the tenth percentile over blocks, since texture looks like noise. If there are others,
    blocks in which some of it is clipped or framed do not count.
    """
    part = as_float(center_crop(image))
    if min(part.shape[:2]) < LEAST_PROBE:
        return 0.0
    tops, lefts = (range(0, max(1, size - BLOCK + 1), BLOCK) for size in part.shape[:2])
    blocks = [part[top : top + BLOCK, left : left + BLOCK] for top in tops for left in lefts]
    # A line of one value is no noise, but a frame or a margin.
    blocks = [b for b in blocks if all(np.ptp(b, axis).all() for axis in (0, 1))] or blocks
    clipped = [((block <= 0) | (block >= 1)).mean() for block in blocks]
    most = max(MOST_CLIPPED, min(clipped))
    chosen = [block for block, share in zip(blocks, clipped, strict=True) if share <= most]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of a colour that is the same everywhere
        sigmas = [restoration.estimate_sigma(block, channel_axis=2) for block in chosen]
    return float(np.quantile(np.nan_to_num(sigmas).mean(1), 0.1))


def noise_at_sizes(image: np.ndarray) -> list[float]:
    """`estimate_noise` of [h, w, C] as it is, at half and at a quarter of its size.

    White noise halves from one to the next. What does not is coarser noise, or texture.
    """
    part, found = as_float(center_crop(image)), []
    for _ in range(3):
        found.append(estimate_noise(part))
        if min(part.shape[:2]) < 2 * LEAST_PROBE:
            break
        half = cv2.resize(part, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
        part = half.reshape(*half.shape[:2], -1)  # OpenCV drops the channel of a grey one
    return found


def whole_noise(at_sizes: list[float]) -> float:
    """σ of all noise, white or coarse, out of `noise_at_sizes`.

    Three quarters of the variance of white noise are finer than half the size, three quarters of
    the rest finer than a quarter of it; the noise at half the size has a quarter of the variance.
    """
    last = at_sizes[-1]  # of small images, which end earlier, the rest is taken for white
    full, half, quarter = [*at_sizes, last / 2, last / 4][:3]
    return math.sqrt(0.75 * full**2 + 0.75 * half**2 + quarter**2)


def as_float(values: np.ndarray) -> np.ndarray:
    """uint8, uint16 or float32 values as float32 in [0, 1]."""
    scale = 1 if values.dtype == np.float32 else np.iinfo(values.dtype).max
    return values.astype(np.float32) / scale


def as_stored(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """float32 values in [0, 1] as uint8, uint16 or float32."""
    if dtype == np.float32:
        return values
    return (values * np.iinfo(dtype).max).round().astype(dtype)
