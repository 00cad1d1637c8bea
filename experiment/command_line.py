"""Options that several scripts have: the same word with the same meaning and unit everywhere."""

import argparse
import contextlib
import ctypes
import os
import sys
from pathlib import Path

import torch

from common.user_errors import UserError
from experiment.losses import LOSSES
from images.degradations import BEST_QUALITY, DRAWS, MOST_HOLES, OPTIONS_OF, SCALES

PUBLISHED_CHECKPOINT = "best_denoising_model_proper.pt"
SHIPPED = Path(__file__).parent.parent / "models"  # folder of trained models
LEAST_NOISE = 1e-6  # σ below which float32 images hardly change
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


def number(kind, least, strictly=False, most=None):
    """argparse type: a finite float, or an int below 2³¹, of at least `least` (or above it)."""
    words = f"{'above' if strictly else 'at least'} {least}"
    most = most or (2**31 - 1 if kind is int else sys.float_info.max)

    def parse(text):
        try:
            value = kind(text)
        except (ValueError, ZeroDivisionError):
            value = float("nan")
        if value > most:
            raise argparse.ArgumentTypeError(f"must be at most {most}, got '{text}'")
        if not (value > least if strictly else value >= least):
            noun = "whole number" if kind is int else "number"
            raise argparse.ArgumentTypeError(f"must be a {noun} {words}, got '{text}'")
        return value

    return parse


def ratio(text):
    """A float, or a fraction such as 15/255, in which the field writes σ."""
    numerator, _, denominator = text.partition("/")
    return float(numerator) / float(denominator or 1)


def output_file(text):
    """argparse type: the path of a file; of a link, the path that it leads to."""
    if Path(text).name in ("", "..") or text.endswith(("/", os.sep)):
        raise argparse.ArgumentTypeError(f"must name a file, got '{text}'")
    return os.path.realpath(text) if os.path.islink(text) else text


class NoiseLevel(argparse.Action):
    """One σ, or two in ascending order, as a pair."""

    def __call__(self, parser, namespace, values, option_string=None):
        if len(values) > 2 or values[0] > values[-1]:
            raise argparse.ArgumentError(self, "must be one σ, or two in ascending order")
        if values[0] == 0 < values[-1]:
            raise argparse.ArgumentError(self, "a range must start above 0")
        if 0 < values[0] < LEAST_NOISE:
            raise argparse.ArgumentError(self, f"must be 0 or at least {LEAST_NOISE}")
        setattr(namespace, self.dest, (values[0], values[-1]))


OPTIONS = {
    "data": {
        "dataset": dict(
            default="cifar10",
            metavar="cifar10|photos|FOLDER",
            help="CIFAR-10; crops of the photographs inside scikit-image, which need no download; "
            "or a folder with train/ and test/ image files (default: cifar10)",
        ),
        "data-dir": dict(
            default="./data",
            metavar="DIR",
            help="where CIFAR-10 is or gets downloaded to, and where the decoded images of a "
            "large folder are kept",
        ),
        "noise-level": dict(
            type=number(ratio, 0, most=1000),
            nargs="+",
            action=NoiseLevel,
            default=(0.2, 0.2),
            metavar="SIGMA",
            help="standard deviation σ of the Gaussian noise, for pixel values in [0, 1], also as "
            "a fraction: 25/255; two values are a range, see --noise-map (default: 0.2)",
        ),
        "noise-map": dict(
            choices=list(DRAWS),
            default="uniform",
            help="uniform: every image draws one σ of the range, log-uniformly; regions: the "
            "higher one in a rectangle, the lower one around it",
        ),
        "seed": dict(
            type=number(int, 0),
            default=42,
            help="seed of initialisation, train/validation split, data order and training noise",
        ),
    },
    "model": {
        "checkpoint": dict(
            default=PUBLISHED_CHECKPOINT, metavar="FILE", help="trained model to read"
        ),
    },
    "task": {
        "task": dict(
            choices=list(OPTIONS_OF),
            help="what the model restores: noisy images; images enlarged after a bicubic "
            "reduction; images with holes; or JPEG files with their artefacts",
        ),
        "scale": dict(type=int, choices=SCALES, help="of --task super-resolution"),
        "holes": dict(
            type=number(ratio, 0, strictly=True, most=MOST_HOLES),
            nargs=2,
            metavar=("LOW", "HIGH"),
            help="of --task inpaint: share of the pixels that is unknown, drawn between the two",
        ),
        "quality": dict(
            type=number(int, 1, most=BEST_QUALITY),
            nargs=2,
            metavar=("LOW", "HIGH"),
            help="of --task jpeg: quality of the files, drawn between the two",
        ),
    },
    "recipe": {
        "recipe": dict(
            default="published",
            help="published: that of the original; refined: a convolutional encoder and decoder "
            "around the same blocks, trained by Muon; quick: a smaller one, trained in a minute; "
            "routed: noise that differs over the image, attention where the router sends it; "
            "photographs: whole photographs with noise of any level up to 0.3",
        ),
        "model": dict(help="architecture"),
        "init": dict(
            metavar="FILE",
            help="checkpoint of the same architecture whose weights training starts from "
            "(default: random ones)",
        ),
        "epochs": dict(type=number(int, 1), help="passes over the training images"),
        "steps": dict(
            type=number(int, 1),
            help="steps to train for, in place of --epochs; the learning rate then warms up and "
            "falls straight to 0, a little in every step",
        ),
        "batch-size": dict(type=number(int, 1), help="images per step"),
        "optimizer": dict(
            choices=["adamw", "muon"], help="muon orthogonalises the momentum of matrices"
        ),
        "lr": dict(type=number(float, 0, strictly=True), help="initial learning rate"),
        "weight-decay": dict(
            type=number(float, 0), help="decoupled, of all parameters; by muon, of matrices alone"
        ),
        "loss": dict(
            choices=list(LOSSES),
            help="mean squared error; minus the mean PSNR; a smooth absolute error; or 1 - SSIM",
        ),
        "crop": dict(
            type=number(int, 1, most=4096),
            metavar="PIXELS",
            help="train on random square crops of this side, out of images that stay whole; an "
            "epoch is 64 crops of each (default: the recipe's, without it thumbnails of 32×32)",
        ),
        "flip": dict(
            action=argparse.BooleanOptionalAction,
            help="mirror each training image left to right with probability 1/2",
        ),
        "transpose": dict(
            action=argparse.BooleanOptionalAction,
            help="turn it upside down and swap its axes, each with probability 1/2: with --flip, "
            "all eight symmetries of a square",
        ),
        "unclipped": dict(
            action=argparse.BooleanOptionalAction,
            help="do not clamp the noisy images to [0, 1]",
        ),
        "jpeg-share": dict(
            type=number(float, 0, most=1),
            metavar="SHARE",
            help="part of the noisy images, by chance, that have been JPEG files of quality 75 to "
            "95 with colours at half resolution",
        ),
        "lossless-share": dict(
            type=number(float, 0, most=1),
            metavar="SHARE",
            help="for a folder that mixes lossless and lossy (JPEG, WebP) files: part of the "
            "training samples to draw from the lossless ones, which alone then serve for "
            "validation (default: all files alike)",
        ),
    },
    "computation": {
        "device": dict(
            default="auto",
            choices=["auto", "cpu", "cuda", "mps"],
            help="auto takes cuda, else mps, else cpu",
        ),
        "threads": dict(
            type=number(int, 1, most=1024), help="CPU threads (default: as torch chooses)"
        ),
        "dtype": dict(
            default="float32",
            choices=["float32", "bfloat16"],
            help="of matrix products; bfloat16 runs them under autocast, weights stay float32",
        ),
        "compile": dict(
            action="store_true",
            help="use torch.compile, which takes up to a minute at the start (default: no)",
        ),
    },
}
# A script that reads a model takes these from it, one that trains the last from its recipe.
OF_A_MODEL = {
    "dataset": dict(default=None, help="images to use (default: those of the model's training)"),
    "noise-level": dict(
        default=None,
        nargs=1,
        help="σ of the noise, the same everywhere, for pixel values in [0, 1], also as a "
        "fraction: 25/255 (default: the noise of the training)",
    ),
}
OF_A_RECIPE = {
    name: OPTIONS["data"][name]
    | {"default": None, "help": OPTIONS["data"][name]["help"].removesuffix(" (default: 0.2)")}
    for name in ("noise-level", "noise-map")
}


def make_parser(description, example, *options, **choices):
    """A parser with those of the collection's common options that a script names.

    Args:
        description: what the script does.
        example: a command line that shows it.
        options: names out of OPTIONS.
        choices: further names, with the values to choose among. "recipe" brings all options of its
            group with it but "model" and "init".
    """
    parser = _Parser(
        description=description,
        epilog=f"example: {example}",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32),
    )
    named = {*options, *choices}
    if "recipe" in choices:
        named |= OPTIONS["recipe"].keys() - {"model", "init"}
    changes = OF_A_RECIPE if "recipe" in choices else OF_A_MODEL if "checkpoint" in named else {}
    for title, group in OPTIONS.items():
        if named.isdisjoint(group):
            continue
        arguments = parser.add_argument_group(title)
        for option in (option for option in group if option in named):
            settings = group[option] | changes.get(option, {})
            if option in choices:
                settings["choices"] = list(choices[option])
            of_recipe = title in ("task", "recipe") or (option in changes and "recipe" in choices)
            if of_recipe and not settings.get("default") and "default" not in settings["help"]:
                settings["help"] += " (default: the recipe's)"
            add_option(arguments, f"--{option}", **settings)
    return parser


def add_option(group, name, **settings):
    """add_argument, with the default named in the help text."""
    if settings.get("default") is not None and "(default" not in settings["help"]:
        settings["help"] += " (default: %(default)s)"
    group.add_argument(name, **settings)


def add_output(parser, default, what):
    """The option --output, with the same words in every script."""
    group = parser.add_argument_group("output")
    add_option(group, "--output", type=output_file, default=default, metavar="FILE", help=what)
    return group


def select_device(name, threads=None):
    """The torch.device for `--device`; also sets torch's CPU threads to `--threads`.

    Raises:
        UserError: the device does not exist on this machine.
    """
    if threads:
        torch.set_num_threads(threads)
    torch.backends.cudnn.allow_tf32 = False  # float32 convolutions mean float32
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    available = [device for device in there if there[device]] + ["cpu"]
    name = available[0] if name == "auto" else name
    if name not in available:
        raise UserError(f"--device {name}: this machine has none; use {' or '.join(available)}")
    if name == "cpu":
        keep_freed_memory()
    return torch.device(name)


def autocast(device, dtype):
    """Context in which matrix products run in `dtype` (a name); float32 leaves all as it is."""
    return torch.autocast(device.type, getattr(torch, dtype), enabled=dtype != "float32")


def keep_freed_memory():
    """Makes glibc keep the blocks that a step frees for the next step, at most its peak.

    By default it returns them to the system, which has to clear every page of them again; about a
    tenth of the refined model's step goes there. Other C libraries are left as they are.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, 32 * 2**20)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
