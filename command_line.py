"""What the scripts share on the command line: options, error messages, safe writing of files."""

import argparse
import contextlib
import ctypes
import os
import sys
import tempfile
from pathlib import Path

import torch

CHECKPOINT = "best_denoising_model_proper.pt"
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


class UserError(Exception):
    """Something the user can put right; run_main prints its one sentence, without a traceback."""


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


def number(kind, least, strictly=False):
    """argparse type: a finite float, or an int below 2³¹, of at least `least` (or above it)."""
    words = f"{'above' if strictly else 'at least'} {least}"
    most = 2**31 - 1 if kind is int else sys.float_info.max

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = float("nan")
        if value > most:
            raise argparse.ArgumentTypeError(f"must be at most {most}, got '{text}'")
        if not (value > least if strictly else value >= least):
            noun = "whole number" if kind is int else "number"
            raise argparse.ArgumentTypeError(f"must be a {noun} {words}, got '{text}'")
        return value

    return parse


def share(text):
    """argparse type: a float in [0, 1]."""
    value = number(float, 0)(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"must be between 0 and 1, got '{text}'")
    return value


def make_parser(description, *options):
    """A parser with those of the collection's common options that a script names.

    The same word has the same meaning, default and unit in every script.
    """
    known = {
        "dataset": dict(
            default="cifar10",
            metavar="cifar10|photos|FOLDER",
            help="CIFAR-10; crops of the photographs inside scikit-image, which need no download; "
            "or a folder with train/ and test/ image files",
        ),
        "data-dir": dict(
            default="./data", metavar="DIR", help="where CIFAR-10 is or gets downloaded to"
        ),
        "epochs": dict(type=number(int, 1), default=30, help="passes over the training images"),
        "batch-size": dict(type=number(int, 1), default=64, help="images per step"),
        "lr": dict(type=number(float, 0, True), default=1e-3, help="initial learning rate"),
        "loss": dict(
            default="mse",
            choices=["mse", "psnr"],
            help="mse, as published: mean squared error; psnr: minus the mean PSNR",
        ),
        "optimizer": dict(
            default="adamw",
            choices=["adamw", "muon"],
            help="adamw, as published; muon orthogonalises the momentum of matrices",
        ),
        "weight-decay": dict(
            type=number(float, 0),
            default=1e-4,
            help="decoupled, of all parameters by adamw, of matrices alone by muon",
        ),
        "noise-level": dict(
            type=number(float, 0),
            default=0.2,
            help="standard deviation σ of the Gaussian noise, for pixel values in [0, 1]",
        ),
        "seed": dict(
            type=number(int, 0),
            default=42,
            help="seed of initialisation, train/validation split, data order and training noise",
        ),
        "device": dict(
            default="auto",
            choices=["auto", "cpu", "cuda", "mps"],
            help="auto takes cuda, else mps, else cpu",
        ),
        "threads": dict(
            type=number(int, 1), default=None, help="CPU threads (default: as torch chooses)"
        ),
        "dtype": dict(
            default="float32",
            choices=["float32", "bfloat16"],
            help="of matrix products; bfloat16 runs them under autocast, weights stay float32",
        ),
        "compile": dict(
            default=None,
            action="store_true",
            help="use torch.compile where it works, which takes up to a minute (default: no)",
        ),
        "flip": dict(
            default=None,
            action="store_true",
            help="mirror each training image left to right with probability 1/2 (default: no)",
        ),
        "lossless-share": dict(
            type=share,
            default=None,
            metavar="SHARE",
            help="for a folder that mixes lossless and lossy (JPEG, WebP) files: part of the "
            "training samples to draw from the lossless ones, which alone then serve for "
            "validation (default: all files alike)",
        ),
        "checkpoint": dict(default=CHECKPOINT, metavar="FILE", help="trained model to read"),
    }
    if "checkpoint" in options:  # a script that reads a model takes these from it
        known["dataset"]["default"] = known["noise-level"]["default"] = None
        known["dataset"]["help"] += " (default: photos for a model trained on them, else cifar10)"
        known["noise-level"]["help"] += " (default: that of the training)"
    parser = _Parser(description=description)
    for option in options:
        settings = known[option]
        if settings["default"] is not None:
            settings["help"] += " (default: %(default)s)"
        parser.add_argument(f"--{option}", **settings)
    return parser


class _NoiseLevel(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        if len(values) > 2 or values[0] > values[-1]:
            raise argparse.ArgumentError(self, "must be one σ, or two in ascending order")
        if values[0] == 0 < values[-1]:
            raise argparse.ArgumentError(self, "a range must start above 0")
        setattr(namespace, self.dest, values if len(values) == 2 else values[0])


def add_noise_level(parser):
    """The option --noise-level of scripts that train: a σ, or a range of it as a list."""
    parser.add_argument(
        "--noise-level",
        type=number(float, 0),
        nargs="+",
        action=_NoiseLevel,
        default=0.2,
        metavar="SIGMA",
        help="standard deviation σ of the Gaussian noise, for pixel values in [0, 1]; two values "
        "are a range, from which every image draws its own, log-uniformly (default: %(default)s)",
    )


def add_output(parser, default, what):
    """The option --output, with the same words in every script."""
    parser.add_argument(
        "--output", default=default, metavar="FILE", help=f"{what} (default: %(default)s)"
    )


def select_device(name, threads=None):
    """The torch.device for `--device`; also sets torch's CPU threads to `--threads`.

    Raises:
        UserError: the device does not exist on this machine.
    """
    if threads:
        torch.set_num_threads(threads)
    torch.backends.cudnn.allow_tf32 = False  # float32 convolutions mean float32
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        name = next(device for device, there in available.items() if there)
    if not available[name]:
        there = " or ".join(device for device, there in available.items() if there)
        raise UserError(f"--device {name}: this machine has none; use {there}")
    if name == "cpu":
        keep_freed_memory()
    return torch.device(name)


def keep_freed_memory():
    """Makes glibc keep the blocks that a step frees for the next step, at most its peak.

    By default it returns them to the system, which has to clear every page of them again. Blocks
    above 32 MiB, as without this, still go back. Other C libraries are left as they are.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, 32 * 2**20)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


@contextlib.contextmanager
def replace_when_complete(path):
    """Yields a temporary path beside `path`; renames it to `path` when the block succeeds.

    A link is followed. The temporary name keeps the suffix, from which matplotlib takes the format.

    Raises:
        UserError: `path` is something else than a file, or its folder cannot be written.
    """
    path = Path(os.path.realpath(path))
    try:
        if not path.parent.is_dir():
            raise UserError(f"cannot write {path}: its folder does not exist; create it")
        if path.exists() and not path.is_file():
            raise UserError(f"cannot write {path}: it is a folder or a device; name a file")
        handle, temporary = tempfile.mkstemp(path.suffix, f".{path.stem}.", path.parent)
        os.close(handle)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp's 0o600 would hide the file from a group
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose another folder") from None
    try:
        yield Path(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        Path(temporary).unlink(missing_ok=True)


def check_writable(path):
    """Fails now, not after an hour of work, if `path` could not be written.

    Raises:
        UserError: as replace_when_complete does.
    """
    with contextlib.suppress(_Abandon), replace_when_complete(path):
        raise _Abandon


class _Abandon(Exception):
    pass


def run_main(main):
    """Runs a script's main(); bad input ends in one sentence on stderr and exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # not every terminal and log file knows σ
    try:
        code = main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    sys.exit(code)
