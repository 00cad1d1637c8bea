"""Entries of torch.hub: `torch.hub.load("OWNER/REPO", "photo").denoise("photo.jpg")`."""

import sys
from pathlib import Path as _Path  # torch.hub lists every other name that can be called

# As they are imported, not as pip names them, which requirements.txt does.
dependencies = ["torch", "numpy", "PIL", "cv2", "filelock", "matplotlib", "pywt", "skimage"]
dependencies += ["tifffile", "tqdm"]

_HERE = _Path(__file__).resolve().parent
_MODULES = ("common", "experiment", "images", "layers", "adaptive_attention_moe", "small_vit")


def _load(name):
    for module in _MODULES:
        file = getattr(sys.modules.get(module), "__file__", None)
        if module in sys.modules and (not file or _HERE not in _Path(file).resolve().parents):
            raise ImportError(
                f"{_HERE} needs its own module {module!r}, but another of this name has been "
                f"imported, of {file or 'a folder'}: load the model in a program without that one"
            )
    from small_vit import load_model  # not above: torch.hub.list and help work without libraries

    return load_model(_HERE / name)


def photo():
    """Removes the noise of photographs: of a camera's files, also JPEG, and white up to σ = 0.3.

    574,213 parameters, trained on 595 photographs (BSDS500, Urban100, Sun-Hays 80, desktop
    backgrounds) with synthetic noise.
    """
    return _load("models/photo.pt")


def gaussian():
    """Removes Gaussian noise up to σ = 0.3 that was not clipped, as benchmarks have it.

    574,213 parameters, trained on 595 photographs, as `photo` was. Not for files.
    """
    return _load("models/gaussian.pt")


def refined():
    """Removes Gaussian noise of σ = 0.2, clamped to [0, 1], best from thumbnails of 32×32.

    358,345 parameters, attention between convolutions, trained on 40,000 images of CIFAR-10.
    """
    return _load("models/refined.pt")


def published():
    """Removes Gaussian noise of σ = 0.2, clamped to [0, 1], from thumbnails of 32×32.

    599,689 parameters, the published architecture, trained on 40,000 images of CIFAR-10.
    """
    return _load("best_denoising_model_proper.pt")


def routed():
    """Removes Gaussian noise, σ = 0.05 and in a rectangle 0.4, from thumbnails of 32×32.

    337,927 parameters, trained on 40,000 images of CIFAR-10; a quarter of the tokens attends, or
    another share of them: `model.capacity = 0.5`.
    """
    return _load("models/routed.pt")


for _entry in (photo, gaussian, refined, published, routed):
    _entry.__doc__ = f"""{_entry.__doc__}
    In evaluation mode, on the CPU; `model.to("cuda")` works. `model.denoise(image)` takes and gives

    * an array [h, w, 3] or, grey, [h, w], uint8, uint16 or float32 in [0, 1]: one like it;
    * a PIL image of mode L, LA, RGB, RGBA or I;16: one of the same mode, with its alpha;
    * the path of an image file: an array, upright;
    * a tensor [3, h, w] or [B, 3, h, w] of floats in [0, 1]: one of float32 on its device,

    of any size, large ones in tiles; anything else is a ValueError. `help(model.denoise)` tells of
    tile, overlap, dtype and strength; `model(batch)` gives images and routing.

    Code and weights: MIT. The images that they learned from are for research, BSDS500 for
    non-commercial one; models/README.md has more.
    """
